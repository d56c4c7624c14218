"""Which tokenizer goes with a checkpoint: what it packs, then what a key of the user's names, and nothing else."""

import io
import json
import shutil
import tarfile

import pytest
import yaml
from transformers import AutoConfig, AutoTokenizer

from nemo_minitron.checkpoint import NemoReader, NemoWriter, each_tensor
from nemo_minitron.checkpoint.tokenizer_open import asked_folder, choose, facts, library_of, load_sentencepiece
from nemo_minitron.cli import main
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_hostile import SHAPE


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    hf = make_llama(folder / "hf", SHAPE)
    return hf, convert(hf, folder / "m.nemo")


def pieces(count):
    """A sentencepiece model of so many pieces."""
    from pydoc_data.topics import topics

    from sentencepiece import SentencePieceTrainer

    made = io.BytesIO()
    lines = [line for text in list(topics.values())[:8] for line in text.splitlines() if line.strip()]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=made, vocab_size=count, minloglevel=2, bos_id=1, eos_id=2, unk_id=0
    )
    return made.getvalue()


def of_nemos_own(source, target, tokenizer, **members):
    """A .nemo as NeMo leaves it: without a section of ours, nothing packed by us."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for info in old.getmembers():
            name, data = info.name.removeprefix("./"), old.extractfile(info).read()
            if name.startswith("minitron/"):
                continue
            if name == "model_config.yaml":
                config = yaml.safe_load(data)
                del config["minitron"]
                data = yaml.safe_dump(config | {"tokenizer": tokenizer}).encode()
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
        for name, data in members.items():
            info = tarfile.TarInfo(f"./{name.replace('__', '.')}")
            info.size = len(data)
            new.addfile(info, io.BytesIO(data))
    return target


def hf(name):
    return {"library": "huggingface", "type": name, "model": None}


def test_what_is_packed_goes_before_its_old_path(tmp_path):
    source = make_llama(tmp_path / "hf", SHAPE)
    right = (source / "tokenizer.json").read_bytes()
    convert(source, tmp_path / "m.nemo")
    other = json.loads(right)
    other["added_tokens"][0]["content"] = "<other>"
    (source / "tokenizer.json").write_text(json.dumps(other))
    assert (convert(tmp_path / "m.nemo", tmp_path / "a") / "tokenizer.json").read_bytes() == right
    for file in source.iterdir():
        file.unlink()
    assert (convert(tmp_path / "m.nemo", tmp_path / "b") / "tokenizer.json").read_bytes() == right


def test_a_folder_that_is_named_is_read_as_data_and_said(pair, tmp_path, capsys):
    source, nemo = pair
    file = of_nemos_own(nemo, tmp_path / "dir.nemo", hf(str(source)))
    assert main(["convert", f"input_name_or_path={file}", f"output_path={tmp_path}/out"]) == 0
    assert f"taken from the folder that it names, {source}" in capsys.readouterr().err
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    ids = json.loads((source / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == ids["eos_token_id"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("some-org/some-model", "only the name 'some-org/some-model', which is not in the hub's cache"),
        ("relative/folder", "only the name 'relative/folder', which is not in the hub's cache"),
        ("/absent", "/absent, which it names, holds none here"),
        ("/proc/self/fd", "/proc/self/fd, which it names, holds none here"),
        (None, "carries no tokenizer; the export has none"),
    ],
)
def test_a_tokenizer_that_is_lost_is_said(name, said, pair, tmp_path, capsys, monkeypatch):
    (tmp_path / "relative").mkdir()
    (tmp_path / "relative/folder").symlink_to(pair[0])
    monkeypatch.chdir(tmp_path)
    file = of_nemos_own(pair[1], tmp_path / "x.nemo", hf(name))
    assert main(["convert", f"input_name_or_path={file}", f"output_path={tmp_path}/out"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert said in line and "tokenizer.type=..." in line
    assert said in (tmp_path / "out/tokenizer.missing.txt").read_text()
    assert not (tmp_path / "out/tokenizer.json").exists()
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] is None  # no guess of transformers'


def test_a_name_is_looked_up_in_the_hubs_cache_alone(pair, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some-org--some-model"
    shutil.copytree(pair[0], repo / "snapshots" / "0123abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0123abc")
    file = of_nemos_own(pair[1], tmp_path / "x.nemo", hf("some-org/some-model"))
    out = convert(file, tmp_path / "out")
    assert "taken from the hub's cache for the name 'some-org/some-model'" in capsys.readouterr().err
    assert (out / "tokenizer.json").read_bytes() == (pair[0] / "tokenizer.json").read_bytes()


def test_a_key_of_the_users_gives_one(pair, tmp_path, capsys):
    source, nemo = pair
    file = of_nemos_own(nemo, tmp_path / "x.nemo", hf("some-org/some-model"))
    argv = ["convert", f"input_name_or_path={file}", f"output_path={tmp_path}/out"]
    assert main([*argv, f"tokenizer.type={nemo}"]) == 0
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert main([*argv[:2], f"output_path={tmp_path}/no", "tokenizer.type=/absent"]) == 2
    assert "tokenizer.type: expected a folder" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_tokenizer_that_does_not_fit_is_not_taken(pair, tmp_path):
    _, nemo = pair
    larger = make_llama(tmp_path / "larger", SHAPE.replace(vocab_size=600, padded_vocab_size=600))
    file = of_nemos_own(nemo, tmp_path / "x.nemo", hf(str(larger)))
    out = convert(file, tmp_path / "out")
    assert "the tokenizer has 600 entries" in (out / "tokenizer.missing.txt").read_text()
    with pytest.raises(MinitronError, match="the tokenizer has 600 entries"):
        convert(file, tmp_path / "again", tokenizer={"type": str(larger)})


def test_a_sentencepiece_member_comes_along(pair, tmp_path):
    model = pieces(300)
    section = {"library": "sentencepiece", "type": None, "model": "nemo:abc_tokenizer.model"}
    file = of_nemos_own(pair[1], tmp_path / "sp.nemo", section, abc_tokenizer__model=model)
    out = convert(file, tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == model
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    text = "what transformers makes of it"
    expected = load_sentencepiece(out / "tokenizer.model", "here").encode(text)
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == expected
    with NemoReader(file) as reader:
        folder = reader.tokenizer_folder()
        assert library_of(folder) == "sentencepiece" and facts(folder)[0] == 300
        with NemoWriter(tmp_path / "copy.nemo", reader.config, reader.shape, reader.dtype, tokenizer=folder) as writer:
            for parameter, layer in each_tensor(reader.shape):
                writer.write(parameter, reader.tensor(parameter, layer), layer)
    with tarfile.open(tmp_path / "copy.nemo") as copy:  # as NeMo itself finds it
        assert copy.extractfile("./abc_tokenizer.model").read() == model
    with NemoReader(tmp_path / "copy.nemo") as reader:
        assert reader.tokenizer_folder() == folder


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"library": "tabular", "vocab_file": "x"}, "model.tokenizer.library must be huggingface or sentencepiece"),
        ({"type": "a", "trust_remote_code": True}, "model.tokenizer.trust_remote_code must be absent"),
        ({"type": "a", "vocab_file": "x"}, "model.tokenizer.vocab_file must be absent"),
        ({"type": "a", "special_tokens": {"a": "b"}}, "model.tokenizer.special_tokens must be absent"),
        ({"type": "a", "model": "b"}, "expected one of model.tokenizer.type and model.tokenizer.model"),
        ({"library": "sentencepiece", "model": "/absent"}, "model.tokenizer.model: no sentencepiece file"),
        ({"type": "/absent"}, "model.tokenizer.type: expected a folder"),
        ("text", "model.tokenizer must be a section"),
    ],
)
def test_what_a_run_may_not_ask_for(section, message):
    with pytest.raises(MinitronError, match=message):
        asked_folder(section, "model.tokenizer")


def test_what_is_asked_for_in_vain_is_said_and_not_opened(pair, capsys):
    with NemoReader(pair[1]) as reader:
        assert choose(reader, {"type": "some-org/not-to-be-downloaded"}, "model.tokenizer") == reader.tokenizer_folder()
        with pytest.raises(MinitronError, match="library"):
            choose(reader, {"library": "tabular"}, "model.tokenizer")
    assert "carries its own tokenizer, which is used; model.tokenizer is not" in capsys.readouterr().err


def test_nothing_asked_for_is_none():
    assert asked_folder(None, "x") is asked_folder({"library": "huggingface", "type": None}, "x") is None
