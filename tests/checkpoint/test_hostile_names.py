"""What a checkpoint names, one case a line: code, files elsewhere, names on the hub. Refused, or left where it lies.

Beside :mod:`tests.checkpoint.test_hostile`, whose helpers these cases use.
"""

import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.nemo_gate import for_model_class
from nemo_minitron.convert import convert
from nemo_minitron.data.tokenizer import TokenizerSpec
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_gguf import write_gguf
from tests.checkpoint.test_hostile import (
    CANARY,
    SHAPE,
    Code,
    edited,
    header,
    hf_file,
    member,
    origin,  # noqa: F401  a fixture
    patched,
    pax,
    tar,
)

# ------------------------------------------------------------------------------------------------ text in tar headers


def named(name, kind=tarfile.XHDTYPE, text=b"20 comment=xxxxxxxx\n"):
    """An extension header whose own name, which no reader uses, is ``name``."""
    return patched(header("x", len(text), kind), 0, name.ljust(100, b"\0")) + text.ljust(512, b"\0")


def records(text):
    return header("p", len(text), tarfile.XHDTYPE) + text + b"\0" * (-len(text) % 512) + header("ok")


HEADERS = {
    "pickle in a pax header's name": (tar(named(b"cposix\nsystem\n(S'true'\ntR.")), "must have a printable UTF-8 name"),
    "pickle in a long name's name": (
        tar(named(b"cposix\nsystem\n(S'true'\ntR.", tarfile.GNUTYPE_LONGNAME)),
        "must have a printable UTF-8 name",
    ),
    "pickle in a global header's name": (
        tar(named(b"cposix\nsystem\n(S'true'\ntR.", tarfile.XGLTYPE)),
        "must have a printable UTF-8 name",
    ),
    "pax header named as a path elsewhere": (tar(named(b"../../evil")), "must be a relative path inside"),
    "pax header with an absolute name": (tar(named(b"/tmp/evil")), "must be a relative path inside"),
    "pickle in an owner": (tar(header("x", uname="cposix\nsystem")), "must have a printable UTF-8 name"),
    "escape in a group": (tar(header("x", gname="\x1b[31m")), "must have a printable UTF-8 name"),
    "line in a link's name": (tar(header("x", linkname="a\nb")), "must have a printable UTF-8 name"),
    "pickle in a pax value": (
        tar(pax(comment="cposix\nsystem\n(S'true'\ntR.") + header("x")),
        "the pax record 'comment' must be printable",
    ),
    "pickle in a pax key": (tar(records(b"17 cos\x00\nsystem=x\n")), "the pax record 'cos.*must be printable"),
    "pax value that is not utf-8": (tar(records(b"8 a=\xff\xfe\xff\n")), "the pax record 'a' must be printable"),
    "pax link elsewhere": (tar(pax(linkpath="/etc/passwd") + header("x")), "'/etc/passwd' must be a relative path"),
    "pax path twice": (tar(records(b"10 path=a\n10 path=b\n")), "the pax record 'path' must be there once"),
    "many pax records": (
        tar(records(b"".join(b"10 k%02d=xx\n" % n for n in range(99)))),
        "at most 64 records in a pax header",
    ),
    "global pax link": (
        tar(patched(pax(linkpath="a")[:512], 156, b"g") + pax(linkpath="a")[512:]),
        "global pax header",
    ),
}

# --------------------------------------------------------------------------------------------- the tokenizer of a .nemo


def tokenizer(packed=False, **section):
    """The unpacked .nemo with another tokenizer section, and by default nothing packed."""

    def make(folder):
        path = folder / "nemo" / "model_config.yaml"
        config = yaml.safe_load(path.read_text())
        config["tokenizer"] = {"library": "huggingface", "type": None, "model": None, **section}
        path.write_text(yaml.safe_dump(config))
        if not packed:
            shutil.rmtree(folder / "nemo" / "minitron" / "tokenizer")
        (folder / "nemo" / "columns.pkl").write_bytes(pickle.dumps(Code()))
        return folder / "nemo"

    return make


def archived(make):
    """The same as a tar."""

    def packed(folder):
        source = make(folder)
        with tarfile.open(folder / "bad.nemo", "w") as file:
            for path in sorted(source.rglob("*")):
                if path.is_file():
                    file.add(path, path.relative_to(source).as_posix())
        return folder / "bad.nemo"

    return packed


LIBRARY = "tokenizer.library must be one of huggingface, sentencepiece, megatron, found"
TOKENIZERS = {
    "tabular": (tokenizer(library="tabular", vocab_file="/proc/self/fd/3", type="x"), f"{LIBRARY} 'tabular'"),
    "tabular of a member": (tokenizer(library="tabular", vocab_file="nemo:columns.pkl"), f"{LIBRARY} 'tabular'"),
    "tabular beside packed files": (tokenizer(True, library="tabular", vocab_file="/x"), f"{LIBRARY} 'tabular'"),
    "tabular in a tar": (archived(tokenizer(library="tabular", vocab_file="/proc/self/fd/4")), f"{LIBRARY} 'tabular'"),
    "library of another spelling": (tokenizer(library="Tabular"), f"{LIBRARY} 'Tabular'"),
    "library of a list": (tokenizer(library=["tabular"]), LIBRARY),
    "regex": (tokenizer(library="regex", model="nemo:columns.pkl"), f"{LIBRARY} 'regex'"),
    "word": (tokenizer(library="word", vocab_file="/etc/passwd"), f"{LIBRARY} 'word'"),
    "byte-level": (tokenizer(library="byte-level"), f"{LIBRARY} 'byte-level'"),
    "tiktoken": (tokenizer(library="tiktoken", vocab_file="/etc/passwd"), f"{LIBRARY} 'tiktoken'"),
    "huggingface with a vocabulary elsewhere": (tokenizer(vocab_file="/etc/passwd"), "vocab_file must name a member"),
    "huggingface with merges elsewhere": (tokenizer(merge_file="merges.txt"), "merge_file must name a member"),
    "megatron with a vocabulary elsewhere": (
        tokenizer(library="megatron", type="GPT2BPETokenizer", vocab_file="/proc/self/environ"),
        "tokenizer.vocab_file must name a member",
    ),
    "sentencepiece elsewhere": (
        tokenizer(library="sentencepiece", model="/etc/passwd"),
        "tokenizer.model must name a member, found '/etc/passwd'",
    ),
    "sentencepiece of a descriptor": (
        tokenizer(library="sentencepiece", model="/proc/self/fd/0"),
        "tokenizer.model must name a member",
    ),
    "sentencepiece by its older key": (
        tokenizer(library="sentencepiece", tokenizer_model="../x.model"),
        "tokenizer.tokenizer_model must name a member",
    ),
    "sentencepiece that is absent": (
        tokenizer(library="sentencepiece", model="nemo:absent.model"),
        "tokenizer.model must name a member",
    ),
    "sentencepiece over the config": (
        tokenizer(library="sentencepiece", model="nemo:model_config.yaml"),
        "tokenizer.model must name a member",
    ),
    "sentencepiece over the weights": (
        tokenizer(library="sentencepiece", model="nemo:model_weights/.metadata"),
        "tokenizer.model must name a member",
    ),
    "any key with a member that is absent": (tokenizer(extra="nemo:../../x"), "tokenizer.extra must name a member"),
    "model of a mapping": (tokenizer(model={"a": 1}), "tokenizer.model must name a member"),
    "type of a list": (tokenizer(type=["a"]), "tokenizer.type must be a name or path"),
    "type with an escape": (tokenizer(type="a\x1b[31m"), "tokenizer.type must be a name or path"),
    "type of great length": (tokenizer(type="a" * 5000), "tokenizer.type must be a name or path"),
}


def packed_config(**content):
    return member("minitron/tokenizer/tokenizer_config.json", json.dumps(content).encode())


PACKED = {
    "packed class that unpickles": (packed_config(tokenizer_class="TransfoXLTokenizer"), "tokenizer_class must be one"),
    "packed class of a module": (packed_config(tokenizer_class="os.system"), "tokenizer_class must be one"),
    "packed class of a path": (packed_config(tokenizer_class="../evil"), "tokenizer_class must be one"),
    "packed class of a mapping": (packed_config(tokenizer_class={"a": 1}), "tokenizer_class must be one"),
    "packed code": (
        packed_config(tokenizer_class="LlamaTokenizer", auto_map={"AutoTokenizer": ["evil/repo--evil.Evil", None]}),
        "auto_map must be absent",
    ),
    "packed chat template elsewhere": (packed_config(chat_template_file="/etc/passwd"), "chat_template_file must name"),
    "packed merges elsewhere": (packed_config(merges_file="../merges.txt"), "merges_file must name a file"),
    "packed config of nonsense": (
        member("minitron/tokenizer/tokenizer_config.json", b"["),
        "tokenizer_config.json: expected JSON",
    ),
}

# ---------------------------------------------------------------------------------------------------------- HF folders


def evil_module(change):
    def make(folder):
        (folder / "hf" / "evil.py").write_text(f"import os\nos.mkdir({CANARY!r})\nclass Evil: pass\n")
        return change(folder)

    return make


AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
HF = {
    "class in a module of the folder": (
        evil_module(edited("tokenizer_config.json", tokenizer_class="Evil", auto_map=AUTO_MAP)),
        "expected a tokenizer that transformers loads",
    ),
    "code beside a known class": (
        evil_module(edited("tokenizer_config.json", auto_map=AUTO_MAP)),
        "auto_map must be absent",
    ),
    "code of another repository": (
        edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/repo--evil.Evil", None]}),
        "auto_map must be absent",
    ),
    "class that unpickles": (
        edited("tokenizer_config.json", tokenizer_class="TransfoXLTokenizerFast"),
        "tokenizer_class must be one that reads data alone",
    ),
    "class that opens other folders": (
        edited("tokenizer_config.json", tokenizer_class="RagTokenizer"),
        "tokenizer_class must be one that reads data alone",
    ),
    "class of a module": (edited("tokenizer_config.json", tokenizer_class="evil.Evil"), "tokenizer_class must be one"),
    "a panic of Rust": (
        edited("tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AA=="}),
        "expected a tokenizer that transformers loads, found: Precompiled",
    ),
    "a token of a great number": (
        hf_file("tokenizer.json", b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":18446744073709551615}}}'),
        "expected a tokenizer that transformers loads",
    ),
    "added tokens of nonsense": (hf_file("added_tokens.json", b'{"a": "x"}'), "expected a tokenizer that transformers"),
}

CASES = HEADERS | TOKENIZERS | PACKED | {f"hf: {name}": case for name, case in HF.items()}


@pytest.mark.parametrize("name", CASES)
def test_refused(name, origin, tmp_path, monkeypatch):  # noqa: F811
    make, message = CASES[name]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    for part in ("hf", "nemo"):
        shutil.copytree(origin / part, tmp_path / part)
    shutil.copy(origin / "m.nemo", tmp_path / "m.nemo")
    path, target = make(tmp_path), tmp_path / "out" / ("out.nemo" if name.startswith("hf: ") else "out")
    target.parent.mkdir()
    with pytest.raises(MinitronError, match=message) as caught:
        convert(path, target)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert not list(target.parent.iterdir())
    assert not os.path.exists(CANARY)


def test_enough_cases():
    assert len(CASES) == len(HEADERS) + len(TOKENIZERS) + len(PACKED) + len(HF) >= 50


# ------------------------------------------------------------------------------------ what is kept, and goes no further

ELSEWHERE = {
    "restore_from_path": "/x/a.nemo",
    "restore_from_ckpt": "/x/a.ckpt",
    "resume_from_checkpoint": "/x/a.ckpt",
    "init_from_nemo_model": "/x/a.nemo",
    "init_from_ptl_ckpt": {"a": {"path": "/x/a.ckpt"}},
    "init_from_pretrained_model": "evil/model",
    "nccl_communicator_config_path": "/x/nccl.yaml",
    "ub_tp_comm_overlap": True,
    "ub_tp_comm_overlap_cfg": "/x/ub.yaml",
    "mcore_customization_config": {"new_decoder_architecture": True},
    "target": "evil.module.Class",
    "name": "megatron_falcon_gpt",
    "language_model": {"config_file": "/x", "lm_checkpoint": "/x", "pretrained_model_name": "evil"},
    "train_ds": {"file_path": "/x"},
    "validation_ds": {"file_path": "/x"},
    "data": {"data_prefix": ["/x"], "index_mapping_dir": "/x", "add_fim": True},
    "optim": {"name": "evil", "cls": "os.system", "params": {"command": "true"}},
    "nsys_profile": {"enabled": True},
    "memory_profile": {"enabled": True, "output_path": "/x"},
    "chakra_profile": {"enabled": True, "trace_dir": "/x"},
    "dump_debug_info": True,
    "dump_debug_info_to_file": True,
    "encoder_tokenizer": {"library": "tabular", "vocab_file": "/x"},
    "decoder_tokenizer": {"library": "tabular", "vocab_file": "/x"},
    "hiddens": {"transform": {"q": {"cls_name": "os.system"}}},
    "adapter_tuning": {"target": "/x"},
    "peft": {"restore_from_path": "/x"},
    "hyena": {"a": "/x"},
    "tensor_model_parallel_size": 512,
    "context_parallel_size": 8,
    "fp8": True,
    "softmax_scale": 7.0,
    "calculate_per_token_loss": True,
}


def test_nothing_that_a_config_names_reaches_the_model_class(origin, tmp_path):  # noqa: F811
    with NemoReader(origin / "nemo") as reader:
        clean = reader.config
    assert for_model_class({**clean, **ELSEWHERE}, "x") == for_model_class(clean, "x")
    assert "tokenizer" not in for_model_class(clean, "x")
    section = {"vocab_size": 512, "hf_config": {"auto_map": {}}}
    assert for_model_class({**clean, "minitron": section}, "x")["minitron"] == {"vocab_size": 512}


@pytest.mark.parametrize(
    ("key", "value"),
    [("activation", "/etc/passwd"), ("normalization", "a" * 40), ("hidden_dropout", "0.1"), ("bias", {"_": 1})],
)
def test_a_network_key_of_another_kind_is_refused(key, value):
    with pytest.raises(MinitronError, match=f"x: {key} must be"):
        for_model_class({key: value}, "x")


def test_code_names_do_not_leave_in_an_export(origin, tmp_path):  # noqa: F811
    shutil.copytree(origin / "nemo", tmp_path / "nemo")
    path = tmp_path / "nemo" / "model_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["minitron"]["hf_config"]["auto_map"] = {"AutoModelForCausalLM": "evil/repo--evil.Evil"}
    path.write_text(yaml.safe_dump(config))
    out = convert(tmp_path / "nemo", tmp_path / "out")
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_a_gguf_is_read_by_itself(tmp_path, monkeypatch):
    """What lies beside it is not taken for its own, least of all code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    letters = [chr(number) for number in range(0x4E00, 0x4E00 + 320)]
    said = {"model": "llama", "tokens": letters, "scores": [0.0] * 320, "bos_token_id": 1, "eos_token_id": 2}
    alone = write_gguf(tmp_path / "m.gguf", keys={f"tokenizer.ggml.{key}": value for key, value in said.items()})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": AUTO_MAP}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({CANARY!r})\n")
    convert(alone, tmp_path / "out.nemo")
    made = json.loads((tmp_path / "out.tokenizer" / "tokenizer_config.json").read_text())
    assert made["tokenizer_class"].startswith("Llama") and "auto_map" not in made
    assert not os.path.exists(CANARY)


@pytest.mark.parametrize("kind", ["folder", "config.json alone"])
def test_preprocessing_asks_nothing_and_runs_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = make_llama(tmp_path / "hf", SHAPE)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({CANARY!r})\nclass Evil: pass\n")
    changes = {"tokenizer_class": "Evil", "auto_map": AUTO_MAP}
    if kind == "folder":
        edited("tokenizer_config.json", **changes)(tmp_path)
    else:
        (folder / "tokenizer_config.json").unlink()
        edited("config.json", model_type="evil", auto_map={**AUTO_MAP, "AutoConfig": "evil.Evil"})(tmp_path)
    with pytest.raises(MinitronError, match=r"tokenizer\.type: .* expected a tokenizer that transformers loads"):
        TokenizerSpec("huggingface", str(folder)).load()
    assert not os.path.exists(CANARY)


def test_a_panic_while_tokenizing_names_the_tokenizer(tmp_path):
    folder = make_llama(tmp_path / "hf", SHAPE)
    edited("tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="})(tmp_path)
    with pytest.raises(MinitronError, match=f"{folder}: expected a tokenizer that can make tokens of this text"):
        TokenizerSpec("huggingface", str(folder)).load().encode(["any text"])


def test_the_only_calls_of_transformers_say_that_no_code_is_run():
    """Every ``from_pretrained`` of ours has ``trust_remote_code=False``: without it transformers asks on stdin."""
    import ast

    import nemo_minitron

    calls = [
        (file.name, {key.arg: getattr(key.value, "value", None) for key in node.keywords})
        for file in Path(nemo_minitron.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained"
    ]
    assert calls
    assert [name for name, keys in calls if keys.get("trust_remote_code") is not False] == []
