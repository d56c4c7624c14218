"""Names on the hub: downloaded by ``huggingface_hub`` from a server that answers as the hub does."""

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

from nemo_minitron.checkpoint import HfReader, hub
from nemo_minitron.checkpoint.tokenizer_open import find_folder
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_hf_folder import sharded  # noqa: F401  # a fixture
from tests.hub import COMMIT, TOKEN, Repository, serving
from tests.llamas import GQA


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = make_llama(tmp_path_factory.mktemp("model") / "hf", GQA.replace(num_layers=1))
    shutil.copy(folder / "model.safetensors", folder / "pytorch_model.bin")  # both kinds, as many repositories have
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"x")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path, model):
    with serving(monkeypatch, tmp_path / "home") as served:
        served.repositories["org/model-1.0"] = Repository(model)
        yield served


def test_a_model_is_downloaded_once_and_only_what_is_read(server, model, tmp_path):
    by_name = convert("org/model-1.0", tmp_path / "a.nemo")
    assert server.downloaded == {path.name for path in model.iterdir() if path.is_file()} - {
        "pytorch_model.bin",
        "modeling.py",
    }
    with HfReader(model) as reader, HfReader(hub.model_folder("org/model-1.0", "x")) as cached:
        assert cached.fingerprint() == reader.fingerprint()
    server.asked.clear()
    assert convert(f"org/model-1.0@{COMMIT}", tmp_path / "b.nemo").read_bytes() == by_name.read_bytes()
    assert server.downloaded == set()


def test_from_the_command_line(server, tmp_path):
    """Another process, with the server, the cache and the token from its environment."""
    server.repositories["org/model-1.0"].access = "private"
    argv = ["-m", "nemo_minitron", "convert", "input_name_or_path=org/model-1.0", f"output_path={tmp_path}/m.nemo"]
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    assert done.returncode == 2 and "HF_TOKEN" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(TOKEN)
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.nemo").is_file()


@pytest.mark.parametrize("index", [True, False])
def test_shards(index, server, sharded, tmp_path):  # noqa: F811
    if not index:
        (sharded / "model.safetensors.index.json").unlink()
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "pytorch_model.bin")
    server.repositories["org/model-1.0"].folder = sharded
    with HfReader(hub.model_folder("org/model-1.0", "x")) as reader, HfReader(sharded) as original:
        assert reader.fingerprint() == original.fingerprint()
    assert "pytorch_model.bin" not in server.downloaded


def private(served):
    served.repositories["org/model-1.0"].access = "private"


def gated(served):
    served.repositories["org/model-1.0"].access = "gated"


def barred(served):
    gated(served)
    served.repositories["org/model-1.0"].member = False


def broken(served):
    served.broken = True


REFUSED = {
    "absent": ("org/absent", None, False, r"'org/absent' is no path here, .*\(401\).*HF_TOKEN"),
    "absent for a token": ("org/absent", None, True, r"has no such model \(404\); give a folder or its name"),
    "private": ("org/model-1.0", private, False, r"'org/model-1.0' .*\(401\): there is none, or it is private"),
    "gated": ("org/model-1.0", gated, False, r"is gated \(401\): accept its conditions at http.*/org/model-1.0, then"),
    "gated for others": ("org/model-1.0", barred, True, r"is gated \(403\): accept"),
    "revision": ("org/model-1.0@v2", None, False, r"no branch, tag or commit 'v2' \(404\)"),
    "a name that none has": ("org/model..1", None, False, "expected a path or a name on the hub, found 'org/model..1'"),
    "down": ("org/model-1.0", broken, False, "not asked or not reached .*503.*no copy in the cache .*hf download"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, server, tmp_path, monkeypatch):
    name, change, token, message = REFUSED[case]
    if token:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    if change:
        change(server)
    with pytest.raises(MinitronError, match=f"^input_name_or_path: .*{message}") as caught:
        convert(name, tmp_path / "m.nemo")
    assert "\n" not in str(caught.value) and not (tmp_path / "m.nemo").exists()


def test_a_token_opens_what_is_private_or_gated(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for change in (private, gated):
        change(server)
        assert (hub.model_folder("org/model-1.0", "x") / "config.json").is_file()
        shutil.rmtree(constants.HF_HUB_CACHE)


@pytest.mark.parametrize("how", ["offline", "down"])
def test_without_a_network_the_cache_is_used_if_it_is_whole(how, server, monkeypatch, capsys):
    find_folder("org/model-1.0", "tokenizer.type")
    if how == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        server.broken = True
    asked = len(server.asked)
    with pytest.raises(MinitronError, match="found only a part of it in the cache"):
        hub.model_folder("org/model-1.0", "key")
    assert (find_folder("org/model-1.0", "tokenizer.type") / "tokenizer.json").is_file()
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    server.broken = False
    folder = hub.model_folder("org/model-1.0", "key")
    server.broken = how == "down"
    if how == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        asked = len(server.asked)
    assert hub.model_folder("org/model-1.0", "key") == folder
    assert "key: the hub was not asked or not reached" in capsys.readouterr().err
    assert how == "down" or len(server.asked) == asked


def test_an_unreachable_server(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MinitronError, match=r"not reached .*ConnectionError.* found no copy in the cache"):
        hub.model_folder("org/model-1.0", "key")


def test_a_repository_without_weights_of_ours(server, tmp_path):
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m-q4.gguf").write_bytes(b"x")
    server.repositories["org/gguf"] = Repository(tmp_path / "gguf")
    with pytest.raises(MinitronError, match=r"weights of a HF folder .* found m-q4.gguf; download the file"):
        hub.model_folder("org/gguf", "key")
    (tmp_path / "gguf" / "adapter_config.json").write_text("{}")
    with pytest.raises(MinitronError, match="found a PEFT adapter"):
        convert("org/gguf", tmp_path / "m.nemo")


def test_a_tokenizer_by_name(server, model, tmp_path):
    folder = find_folder("org/model-1.0", "tokenizer.type")
    assert (folder / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert not [name for name in server.downloaded if name.endswith((".safetensors", ".bin"))]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({}))
    server.repositories["org/bare"] = Repository(tmp_path / "bare")
    with pytest.raises(MinitronError, match=r"a tokenizer in .org/bare. on the hub, found none"):
        find_folder("org/bare", "tokenizer.type")


def test_a_path_is_never_looked_up(server, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "org" / "model-1.0")
    assert str(hub.located("org/model-1.0", "x")) == "org/model-1.0"
    for path in ("./org/a", "/org/a", "../a", "org/a/b", "org/a.nemo", "org/a.gguf", "a", "~/a", "runs/m.safetensors"):
        with pytest.raises(MinitronError, match="found nothing at"):
            convert(path, tmp_path / "m.nemo")
    assert server.asked == []
