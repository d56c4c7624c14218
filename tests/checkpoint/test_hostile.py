"""Hostile and broken inputs, one line each: refused by name, nothing executed, the destination as it was."""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import types
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.checkpoint.test_gguf import write_gguf
from tests.llamas import GQA

SHAPE = GQA.replace(num_layers=1)
CANARY = os.path.abspath(f"/tmp/minitron_canary_{os.getpid()}")
QKV = "model.decoder.layers.self_attention.linear_qkv.weight"
FC2 = "model.decoder.layers.mlp.linear_fc2.weight"
WEIGHTS = "model_weights"
DATA = "__0_0.distcp"


class Code:
    """Pickled, it leaves the canary when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (CANARY,)


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("origin")
    convert(make_llama(folder / "hf", SHAPE), folder / "m.nemo")
    with tarfile.open(folder / "m.nemo") as tar:
        tar.extractall(folder / "nemo", filter="data")
    return folder


# ------------------------------------------------------------------------------------------------------ tar and gzip


def header(name, size=0, kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def patched(block, at, field):
    """A header block with a field replaced and the checksum made right again."""
    block = bytearray(block)
    block[at : at + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def tar(*blocks, pack=bytes):
    """The good archive with ``blocks`` before its end."""

    def make(folder):
        data = (folder / "m.nemo").read_bytes().rstrip(b"\0")
        data += b"\0" * (-len(data) % 512) + b"".join(blocks) + b"\0" * 10240
        (folder / "bad.nemo").write_bytes(pack(data))
        return folder / "bad.nemo"

    return make


def pax(**records):
    text = b""
    for key, value in records.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(rest) + 2 if len(rest) + 2 < 100 else len(rest) + 3
        text += str(length).encode() + rest
    return header("pax", len(text), tarfile.XHDTYPE) + text + b"\0" * (-len(text) % 512)


def raw(data):
    def make(folder):
        (folder / "bad.nemo").write_bytes(data)
        return folder / "bad.nemo"

    return make


def many_members(folder):
    blocks = (header(f"m{i}") for i in range(20_001))
    (folder / "bad.nemo").write_bytes(b"".join(blocks) + b"\0" * 1024)
    return folder / "bad.nemo"


def truncated(folder):
    data = (folder / "m.nemo").read_bytes()
    (folder / "bad.nemo").write_bytes(data[: len(data) // 2])
    return folder / "bad.nemo"


def gzip_bomb(folder):
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(header("./model_config.yaml", 1 << 27))
        for _ in range(1 << 3):
            file.write(bytes(1 << 24))
    (folder / "bad.nemo").write_bytes(packed.getvalue())
    return folder / "bad.nemo"


GOOD_BLOCK = header("x", 512)
TAR = {
    "parent": (tar(header("../evil", 1) + bytes(512)), r"'\.\./evil' must be a relative path"),
    "parent inside": (tar(header("a/../../evil", 1) + bytes(512)), r"'a/\.\./\.\./evil' must be a relative path"),
    "absolute": (tar(header("/tmp/evil", 1) + bytes(512)), "'/tmp/evil' must be a relative path"),
    "backslash": (tar(header("..\\evil")), "must be a relative path"),
    "symbolic link": (tar(header("link", kind=tarfile.SYMTYPE, linkname="/etc/passwd")), "'link' must be a plain file"),
    "hard link": (tar(header("hard", kind=tarfile.LNKTYPE, linkname="m")), "'hard' must be a plain file"),
    "device": (tar(header("dev", kind=tarfile.CHRTYPE)), "'dev' must be a plain file"),
    "block device": (tar(header("blk", kind=tarfile.BLKTYPE)), "'blk' must be a plain file"),
    "fifo": (tar(header("pipe", kind=tarfile.FIFOTYPE)), "'pipe' must be a plain file"),
    "sparse": (tar(header("sparse", kind=tarfile.GNUTYPE_SPARSE)), "'sparse' must be a plain file"),
    "pax sparse": (tar(pax(GNU__sparse__major="1") + header("sp")), "'sp' must be a plain file"),
    "unknown kind": (tar(header("odd", kind=b"Z")), "'odd' must be a plain file"),
    "twice": (tar(header("./model_config.yaml")), "'model_config.yaml' must be there once"),
    "twice by spelling": (tar(header(".//minitron/./checksums.json")), "'minitron/checksums.json' must be there once"),
    "control character": (tar(header("a\x1b[31mb")), r"'a\\x1b\[31mb' must have a printable"),
    "not utf-8": (tar(patched(GOOD_BLOCK, 0, b"\xff\xfe")), r"must have a printable UTF-8 name"),
    "beyond the end": (tar(header("huge", 1 << 60)), "truncated inside member 'huge'"),
    "negative size": (tar(patched(GOOD_BLOCK, 124, b"\xff" * 12)), "'x' must have a size of 0 or more"),
    "bad size": (tar(patched(GOOD_BLOCK, 124, b"zzzzzzzzzzz\0")), "expected a .nemo .tar., found at byte"),
    "bad checksum": (tar(GOOD_BLOCK[:148] + b"000000\0 " + GOOD_BLOCK[156:]), "expected a .nemo .tar., found at byte"),
    "long name bomb": (tar(header("n", 1 << 40, tarfile.GNUTYPE_LONGNAME)), "of header extension before member 'n'"),
    "pax bomb": (tar(header("p", 1 << 40, tarfile.XHDTYPE)), "of header extension before member 'p'"),
    "pax traversal": (tar(pax(path="../../evil") + header("nice")), r"'\.\./\.\./evil' must be a relative path"),
    "pax negative size": (tar(pax(size="-1024") + header("nice")), "'nice' must have a size of 0 or more"),
    "pax damage": (tar(header("p", 20, tarfile.XHDTYPE) + b"999 path=x\n".ljust(512, b"\0")), "damaged pax header"),
    "global pax": (tar(patched(pax(path="evil")[:512], 156, b"g") + pax(path="evil")[512:]), "global pax header"),
    "many members": (many_members, "expected at most 20000 members"),
    "truncated": (truncated, "truncated inside member"),
    "no tar": (raw(b"hello" * 1000), "expected a .nemo .tar., found at byte 0"),
    "nothing": (raw(b""), "found no member"),
    "zeros": (raw(bytes(10240)), "expected the member model_config.yaml"),
    "gzip of nonsense": (raw(gzip.compress(b"hello" * 1000)), "expected a .nemo .tar."),
    "gzip cut short": (tar(pack=lambda data: gzip.compress(data)[:-2000]), "expected a whole gzip"),
    "gzip damage": (raw(b"\x1f\x8b" + b"\x08\0" + os.urandom(3000)), "expected a .*gzip"),
    "gzip bomb": (gzip_bomb, "expected a gzip of at most"),
}

# ------------------------------------------------------------------------------------------- metadata and records


def metadata(change):
    """The unpacked .nemo with its metadata, real classes and all, changed."""

    def make(folder):
        path = folder / "nemo" / WEIGHTS / ".metadata"
        content = pickle.loads(path.read_bytes())
        change(content)
        path.write_bytes(pickle.dumps(content))
        return folder / "nemo"

    return make


def member(name, data):
    def make(folder):
        path = folder / "nemo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return folder / "nemo"

    return make


def place_of(content, key):
    return next((index, info) for index, info in content.storage_data.items() if index.fqn == key)


def moved(key, **changes):
    """The record's place changed."""

    def change(content):
        index, info = place_of(content, key)
        fields = {"relative_path": info.relative_path, "offset": info.offset, "length": info.length} | changes
        content.storage_data[index] = type(info)(**fields)

    return metadata(change)


def stored(key, **changes):
    return metadata(lambda content: content.state_dict_metadata[key].__dict__.update(changes))


def chunked(key, *chunks):
    """Other chunks, all of them in the record of the first."""

    def change(content):
        index, info = place_of(content, key)
        kind = type(content.state_dict_metadata[key].chunks[0])
        content.state_dict_metadata[key].chunks = [kind(torch.Size(o), torch.Size(s)) for o, s in chunks]
        for offsets, _ in chunks:
            content.storage_data[type(index)(key, torch.Size(offsets))] = info

    return metadata(change)


def record(key, blob):
    """The record replaced by another, at the end of its file."""

    def make(folder):
        data = folder / "nemo" / WEIGHTS / DATA
        start = data.stat().st_size
        with data.open("ab") as file:
            file.write(blob)
        return moved(key, offset=start, length=len(blob))(folder)

    return make


def saved(thing):
    out = io.BytesIO()
    torch.save(thing, out)
    return out.getvalue()


def zipped(*entries, method=zipfile.ZIP_STORED, filler=1 << 20):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in entries:
            file.writestr(name, data)
        file.writestr(zipfile.ZipInfo("archive/filler"), bytes(filler), zipfile.ZIP_STORED)
    return out.getvalue()


def tensor_pickle(
    size, stride, numel=10, offset=0, storage=b"FloatStorage", function=b"torch._utils\n_rebuild_tensor_v2"
):
    """What ``torch.save`` would write, with any numbers (up to 2**63)."""

    def number(value):
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    stored_at = b"(X\x07\0\0\0storagectorch\n" + storage + b"\nX\x01\0\0\x000X\x03\0\0\0cpu" + number(numel) + b"tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return (
        b"\x80\x02c" + function + b"\n(" + stored_at + number(offset) + numbers(size) + numbers(stride) + hooks + b"tR."
    )


def tensor_record(size, stride, values=40, **kwargs):
    return zipped(("archive/data.pkl", tensor_pickle(size, stride, **kwargs)), ("archive/data/0", bytes(values)))


def bomb_opcodes():
    """A memo index for which the C unpickler would fill tens of gigabytes."""
    return b"\x80\x02Nr\xff\xff\xff\x7f."


def nested_tuples():
    return b"\x80\x02}" + b")" + b"\x85" * 500_000 + b"Ns."


SIZE = (1, SHAPE.qkv_rows, SHAPE.hidden_size)
ROWS, HIDDEN = SIZE[1:]
EXTRA = "model.decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"
NEMO = {
    "code in metadata": (member(f"{WEIGHTS}/.metadata", pickle.dumps(Code())), r"\.metadata is refused: 'posix.mkdir'"),
    "code by a metadata module": (
        member(f"{WEIGHTS}/.metadata", b"ctorch.distributed.checkpoint.filesystem\nos.system\n(S'true'\ntR."),
        r"\.metadata is refused: .*os.system",
    ),
    "torch.load in metadata": (
        member(f"{WEIGHTS}/.metadata", b"ctorch.serialization\nload\n(S'x'\ntR."),
        "'torch.serialization.load' has no place",
    ),
    "extension code": (member(f"{WEIGHTS}/.metadata", b"\x80\x02\x82\x01."), r"\.metadata is refused"),
    "persistent id": (member(f"{WEIGHTS}/.metadata", b"\x80\x02NQ."), r"\.metadata is refused"),
    "memo bomb": (member(f"{WEIGHTS}/.metadata", bomb_opcodes()), r"\.metadata"),
    "bytes bomb": (member(f"{WEIGHTS}/.metadata", b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f."), r"\.metadata is refused"),
    "nested tuples": (member(f"{WEIGHTS}/.metadata", nested_tuples()), r"\.metadata is refused: tuples must nest"),
    "metadata of nothing": (member(f"{WEIGHTS}/.metadata", b"\x80\x04N."), r"\.metadata, found damage"),
    "empty metadata": (member(f"{WEIGHTS}/.metadata", b""), r"\.metadata is refused"),
    "code in common.pt": (
        member(f"{WEIGHTS}/common.pt", saved(Code())),
        "'model_weights/common.pt' is refused: 'posix.mkdir'",
    ),
    "legacy code in common.pt": (
        member(f"{WEIGHTS}/common.pt", pickle.dumps(Code())),
        "'model_weights/common.pt' is refused: 'posix.mkdir'",
    ),
    "hub code in common.pt": (
        member(f"{WEIGHTS}/common.pt", b"ctorch.hub\nload\n(S'evil/repo'\ntR."),
        "'model_weights/common.pt' is refused: 'torch.hub.load'",
    ),
    "code in extra state": (record(EXTRA, saved(Code())), f"{DATA}' with '{EXTRA}' is refused: 'posix.mkdir'"),
    "code in a record": (record(FC2, saved(Code())), f"{FC2}': its record in .*{DATA} is damaged|'{FC2}'|in .*{FC2}"),
    "code in a large record": (record(FC2, zipped(("archive/data.pkl", pickle.dumps(Code())))), "posix.mkdir"),
    "no tensor in a record": (record(FC2, zipped(("archive/data.pkl", b"N."))), f"{FC2}': .* expected a tensor"),
    "two pickles in a record": (
        record(FC2, zipped(("a/data.pkl", b"N."), ("b/data.pkl", b"N."))),
        "expected one data.pkl, found 2",
    ),
    "compressed record": (
        record(
            FC2, zipped(("archive/data.pkl", b"N."), ("archive/data/0", bytes(1 << 22)), method=zipfile.ZIP_DEFLATED)
        ),
        "it is compressed",
    ),
    "overflowing size": (
        record(FC2, tensor_record((1 << 61, 1 << 61), (1, 1))),
        f"{FC2}': .* expected {1 << 122} values",
    ),
    "wrong size in a record": (record(FC2, tensor_record((10,), (1,))), rf"{FC2}': .* expected \(1, 64, 96\)"),
    "values beyond the storage": (record(FC2, tensor_record((1, 64, 96), (6144, 96, 1))), "6144 values in its storage"),
    "negative offset in a record": (record(FC2, tensor_record((10,), (1,), offset=-8)), "must be positive numbers"),
    "negative stride": (record(FC2, tensor_record((10,), (-1,))), "must be positive numbers"),
    "another storage": (
        record(FC2, tensor_record((10,), (1,), storage=b"QInt8Storage")),
        "'torch.QInt8Storage' has no",
    ),
    "a function in a record": (
        record(FC2, tensor_record((10,), (1,), function=b"torch._utils\n_rebuild_wrapper_subclass")),
        "_rebuild_wrapper_subclass' has no place",
    ),
    "a filled stand-in in a record": (
        record(FC2, zipped(("archive/data.pkl", tensor_pickle((10,), (1,))[:-1] + b"}X\x07\0\0\0storageK\x05sb."))),
        "a state of a tensor has no place",
    ),
    "no zip": (record(FC2, bytes(1 << 20)), f"{FC2}': .* expected a zip"),
    "zip directory elsewhere": (
        record(FC2, bytes((1 << 20) - 22) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, 1000, 1 << 31, 0)),
        f"{FC2}': .* expected a zip",
    ),
    "absurd shape": (stored(FC2, size=torch.Size((1, 1 << 40, 1 << 20))), f"{FC2} of"),
    "shape of another number of dimensions": (stored(FC2, size=torch.Size((64, 96))), f"a chunk of .* in {FC2}"),
    "negative shape": (stored(FC2, size=[-1, 64, 96]), "sizes or offsets that are not numbers"),
    "shape of text": (stored(FC2, size="many"), r"\.metadata, found damage: no sizes"),
    "many dimensions": (stored(FC2, size=[1] * 1000), "at most 8 dimensions"),
    "negative place": (moved(FC2, offset=-100), f"member 'model_weights/{DATA}', which has .* for {FC2}"),
    "place beyond the member": (moved(FC2, offset=1 << 40), f"member 'model_weights/{DATA}', which has .* for {FC2}"),
    "length beyond the member": (moved(FC2, length=1 << 62), f"member 'model_weights/{DATA}', which has .* for {FC2}"),
    "record too short": (moved(FC2, length=100), f"100 bytes in member 'model_weights/{DATA}' for a chunk"),
    "member elsewhere": (
        moved(FC2, relative_path="../../../etc/passwd"),
        "no member 'model_weights/../../../etc/passwd'",
    ),
    "chunk outside": (chunked(QKV, ((0, 1, 0), SIZE)), rf"a chunk of .* at \(0, 1, 0\) in {QKV}"),
    "overlapping chunks": (
        chunked(QKV, ((0, 0, 0), (1, ROWS // 2, HIDDEN)), ((0, 1, 0), (1, ROWS // 2, HIDDEN))),
        f"'{QKV}': its record in .* is damaged|chunks in .* overlap",
    ),
    "a hole between chunks": (chunked(QKV, ((0, 0, 0), (1, ROWS - 8, HIDDEN))), f"chunks of .* in {QKV}"),
    "tensor missing": (metadata(lambda content: content.state_dict_metadata.pop(FC2)), f"expected the tensor '{FC2}'"),
    "integers": (
        stored(FC2, properties=types.SimpleNamespace(dtype=torch.int32)),
        r"\.metadata is refused|must be float32",
    ),
    "json that is no object": (member(f"{WEIGHTS}/metadata.json", b"[1]"), r"metadata.json: expected a JSON object"),
    "json bomb": (member(f"{WEIGHTS}/metadata.json", b"[" * 500_000), r"metadata.json: expected JSON"),
    "yaml tag": (
        member("model_config.yaml", f"a: !!python/object/apply:os.mkdir ['{CANARY}']".encode()),
        "model_config.yaml: .* the tag",
    ),
    "yaml bomb": (
        member(
            "model_config.yaml",
            b"a: &a [x,x]\n" + b"".join(b"%c: &%c [*%c,*%c]\n" % (c, c, c - 1, c - 1) for c in range(98, 120)),
        ),
        r"model_config.yaml: .* an alias",
    ),
    "yaml depth": (
        member("model_config.yaml", b"a: " + b"[" * 100_000),
        "model_config.yaml: .* (nested more than 64|nesting depth)",
    ),
    "yaml length": (
        member("model_config.yaml", b"a: b\n" * (1 << 18)),
        r"member 'model_config.yaml': expected at most",
    ),
    "yaml count": (
        member("model_config.yaml", b"a: [" + b"1," * 30_000 + b"]"),
        "model_config.yaml: .* more than 20000",
    ),
    "yaml number": (member("model_config.yaml", b"a: 1" + b":59" * 100_000), "model_config.yaml: .* a number of"),
    "yaml not utf-8": (member("model_config.yaml", b"a: \xff\xfe"), "model_config.yaml: .*utf-8"),
    "yaml interpolation": (member("model_config.yaml", b"a: ${ oc.env:HOME}"), "model_config.yaml: .* interpolation"),
    "yaml escaped interpolation": (
        member("model_config.yaml", b'a: "\\x24{oc.env:HOME}"'),
        "model_config.yaml: .* interpolation",
    ),
    "yaml target": (
        member("model_config.yaml", b"optim: {_target_: os.system, command: 'true'}"),
        "model_config.yaml: .*_target_",
    ),
    "yaml list": (member("model_config.yaml", b"- 1"), "model_config.yaml: expected a mapping, found list"),
    "yaml key twice": (member("model_config.yaml", b"a: 1\na: 2"), "model_config.yaml: .*duplicate key"),
}


def config(**changes):
    def make(folder):
        path = folder / "nemo" / "model_config.yaml"
        text = path.read_text()
        for key, value in changes.items():
            kept = [line for line in text.splitlines() if not line.startswith(f"{key}:")]
            text = "\n".join([*kept, f"{key}: {value}"]) + "\n"
        path.write_text(text)
        return folder / "nemo"

    return make


def tokenizer_path(folder):
    path = folder / "nemo" / "model_config.yaml"
    path.write_text(path.read_text().replace("\n  model: null", "\n  model: nemo:../../../etc/passwd"))
    return folder / "nemo"


def packed_tokenizer(folder):
    """The packed files are used where ``tokenizer.type`` is no folder here."""
    path = folder / "nemo" / "model_config.yaml"
    path.write_text(path.read_text().replace("\n  type: /", "\n  type: /absent/"))
    return member("minitron/tokenizer/tokenizer_config.json", b'{"tokenizer_file": "/etc/passwd"}')(folder)


def linked(folder):
    (folder / "secret").write_text("{}")
    (folder / "nemo" / "minitron" / "secret.json").symlink_to(folder / "secret")
    return folder / "nemo"


NEMO |= {
    "no heads": (config(num_attention_heads=0), "model_config.yaml: num_attention_heads must be at least 1"),
    "absurd layers": (config(num_layers=10**18), "must have the size"),
    "layers of text": (config(num_layers="[1]"), "model_config.yaml: num_layers must be an integer"),
    "infinite rope": (config(rotary_base=".inf"), "model_config.yaml: rotary_base must be a number"),
    "section of text": (config(minitron="evil"), "must be a mapping|mapping values|expected YAML"),
    "tokenizer elsewhere": (tokenizer_path, "model_config.yaml: tokenizer.model must name a member"),
    "packed tokenizer names a file elsewhere": (
        packed_tokenizer,
        "minitron/tokenizer/tokenizer_config.json: tokenizer_file must name a file of the folder",
    ),
    "link out of a folder": (linked, "'minitron/secret.json' must be a plain file, found a link"),
}

# ------------------------------------------------------------------------------------------------------ HF and GGUF


def edited(name, **changes):
    def make(folder):
        path = folder / "hf" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder / "hf"

    return make


def hf_file(name, data):
    def make(folder):
        (folder / "hf" / name).write_bytes(data)
        return folder / "hf"

    return make


def safetensors(change=None, blob=None):
    """The weights with their header changed, as an object or byte by byte."""

    def make(folder):
        path = folder / "hf" / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        content = json.loads(data[8 : 8 + length])
        text = blob(data[8 : 8 + length]) if blob else None
        if change:
            change(content)
            text = json.dumps(content).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        return folder / "hf"

    return make


def entry(**changes):
    return safetensors(lambda content: content["model.norm.weight"].update(changes))


def index(weight_map):
    def make(folder):
        path = folder / "hf" / "model.safetensors"
        names = list(load_file(path))
        path.rename(folder / "hf" / "one.safetensors")
        shutil.copy(folder / "hf" / "one.safetensors", folder / "hf" / "two.safetensors")
        shutil.copy(folder / "hf" / "one.safetensors", folder / "one.safetensors")
        content = {"weight_map": dict.fromkeys(names, "one.safetensors") | weight_map}
        (folder / "hf" / "model.safetensors.index.json").write_text(json.dumps(content))
        return folder / "hf"

    return make


def tokenizer_link(folder):
    (folder / "secret").write_bytes((folder / "hf" / "tokenizer.json").read_bytes())
    (folder / "hf" / "tokenizer.json").unlink()
    (folder / "hf" / "tokenizer.json").symlink_to(folder / "secret")
    return folder / "hf"


HF = {
    "header length": (hf_file("model.safetensors", b"\xff" * 100), "model.safetensors: .* header"),
    "short file": (hf_file("model.safetensors", b"\1\0"), "model.safetensors: .* header"),
    "header of nonsense": (safetensors(blob=lambda text: b"\xfe" + text), "model.safetensors: .* expected JSON"),
    "header bomb": (safetensors(blob=lambda text: b"[" * 500_000), "model.safetensors: .* expected JSON"),
    "header list": (safetensors(blob=lambda text: b"[1]"), "model.safetensors: .* expected a JSON object"),
    "header too long": (safetensors(blob=lambda text: text + b" " * (33 << 20)), "header of at most"),
    "tensor twice": (
        safetensors(blob=lambda text: b'{"model.norm.weight":{},' + text.lstrip()[1:]),
        "'model.norm.weight' given twice",
    ),
    "overlapping tensors": (entry(data_offsets=[0, 256]), "must not overlap"),
    "negative offsets": (entry(data_offsets=[-256, 0]), "'model.norm.weight' must have sizes and offsets from 0"),
    "offsets beyond": (entry(data_offsets=[1 << 40, (1 << 40) + 256]), "truncated inside tensor 'model.norm.weight'"),
    "overflowing shape": (entry(shape=[1 << 61, 1 << 61]), "'model.norm.weight' must have"),
    "negative tensor": (entry(shape=[-64]), "'model.norm.weight' must have sizes"),
    "fractional shape": (entry(shape=[64.5]), "'model.norm.weight' must have sizes"),
    "shape of many dimensions": (entry(shape=[1] * 100), "'model.norm.weight' must have a size of at most 8"),
    "wrong dtype": (entry(dtype="I64"), "'model.norm.weight' must be one of F32"),
    "dtype of a list": (entry(dtype=["F32"]), "'model.norm.weight' must be one of F32"),
    "entry of text": (
        safetensors(lambda content: content.update({"model.norm.weight": "x"})),
        "'model.norm.weight' must",
    ),
    "index elsewhere": (index({"model.norm.weight": "../one.safetensors"}), r"index.json: .*'\.\./one.safetensors'"),
    "index of the parent": (index({"model.norm.weight": ".."}), r"index.json: .*'\.\.'"),
    "absolute index": (index({"model.norm.weight": "/etc/passwd"}), "index.json: .*'/etc/passwd'"),
    "index of an absent file": (index({"model.norm.weight": "three.safetensors"}), "three.safetensors: expected a"),
    "tensor in two files": (index({"model.norm.weight": "two.safetensors"}), "must be there once, found also in"),
    "config bomb": (hf_file("config.json", b'{"a":' * 200_000), "config.json: expected JSON"),
    "config key twice": (hf_file("config.json", b'{"a":1,"a":2}'), "config.json: .*'a' given twice"),
    "config not utf-8": (hf_file("config.json", b'{"a":"\xff"}'), "config.json: expected JSON"),
    "config without heads": (
        edited("config.json", num_attention_heads=0, head_dim=None),
        "config.json: num_attention_heads must be a positive integer, found 0",
    ),
    "config of infinite size": (
        edited("config.json", hidden_size=float("inf")),
        "config.json: hidden_size must be a positive integer, found inf",
    ),
    "config of absurd layers": (edited("config.json", num_hidden_layers=10**15), "layers.1.input_layernorm"),
    "config rope of text": (
        edited("config.json", rope_scaling="llama3"),
        "config.json: rope_scaling must be a mapping",
    ),
    "config architecture": (
        edited("config.json", architectures={"0": "x"}),
        "config.json: architectures must be a list",
    ),
    "config interpolation": (edited("config.json", note="${oc.env:HOME}"), "interpolation"),
    "tokenizer elsewhere": (
        edited("tokenizer_config.json", vocab_file="../../secret"),
        "tokenizer_config.json: vocab_file",
    ),
    "tokenizer code": (
        edited("tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}),
        "expected a tokenizer that transformers loads",
    ),
    "tokenizer of nonsense": (
        hf_file("tokenizer.json", b'{"model": 1}'),
        "expected a tokenizer that transformers loads",
    ),
    "tokenizer link": (tokenizer_link, "tokenizer.json: expected a plain file or .* found a link out of the folder"),
    "safetensors under another name": (
        lambda folder: (folder / "hf" / "model.safetensors").rename(folder / "hf" / "pytorch_model.bin").parent,
        "pytorch_model.bin: expected a zip as torch has written",
    ),
}


def pickled(make, name="pytorch_model.bin"):
    """The weights as a pickle, made of them: bytes, or what ``torch.save`` is to save."""

    def spoil(folder):
        path = folder / "hf" / "model.safetensors"
        content = make(load_file(path))
        path.unlink()
        (folder / "hf" / name).write_bytes(content if isinstance(content, bytes) else saved(content))
        return folder / "hf"

    return spoil


def dict_of(body):
    """A record of a dict with one tensor, pickled as ``tensor_pickle`` does, or what else ``body`` is."""
    name = b"model.norm.weight"
    text = b"\x80\x02}X" + struct.pack("<I", len(name)) + name + body.removeprefix(b"\x80\x02").removesuffix(b".")
    return lambda tensors: zipped(("archive/data.pkl", text + b"s."), ("archive/data/0", bytes(40)))


def overlapping(tensors):
    """The second storage's entry leads to the first's bytes."""
    data = bytearray(saved({name: tensors[name] for name in list(tensors)[:3]}))
    first, second = (data.rindex(b"archive/data/%d" % number) - 46 for number in (0, 1))  # in the central directory
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(data)


def index_of_pickles(weight_map):
    def make(folder):
        pickled(lambda tensors: tensors, "one.bin")(folder)
        shutil.copy(folder / "hf" / "one.bin", folder / "outside.bin")
        content = {"weight_map": {"model.norm.weight": "one.bin"} | weight_map}
        (folder / "hf" / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        return folder / "hf"

    return make


FILLED = tensor_pickle((10,), (1,))[:-1] + b"}X\x07\0\0\0storageK\x05sb."
HF |= {
    "bin of code": (pickled(lambda t: t | {"model.norm.weight": Code()}), "pytorch_model.bin: .* 'posix.mkdir' has no"),
    "bin that is code": (pickled(lambda t: Code()), "pytorch_model.bin: .* 'posix.mkdir' has no place"),
    "bin of bare code": (pickled(lambda t: pickle.dumps(Code())), "pytorch_model.bin: expected a zip"),
    "bin of a module": (pickled(lambda t: torch.nn.Linear(2, 2)), "'torch.nn.modules.linear.Linear' has no place"),
    "bin cut short": (pickled(lambda t: saved(t)[:-3000]), "pytorch_model.bin: .* expected a zip"),
    "bin without values": (
        pickled(lambda t: zipped(("archive/data.pkl", pickle.dumps({})))),
        "expected the tensor 'model.embed_tokens.weight'",
    ),
    "empty bin": (pickled(lambda t: b""), "pytorch_model.bin: .* expected a zip"),
    "bin of overlapping storages": (pickled(overlapping), "found two that overlap"),
    "bin of an overflowing size": (
        pickled(dict_of(tensor_pickle((1 << 61, 1 << 61), (1, 1)))),
        "'model.norm.weight': expected .* values in its storage",
    ),
    "bin of an expanded value": (pickled(dict_of(tensor_pickle((1 << 40,), (0,)))), "values in its storage, found 40"),
    "bin of values beyond": (pickled(dict_of(tensor_pickle((10,), (1,), offset=1))), "10 values in its storage"),
    "bin of a negative stride": (pickled(dict_of(tensor_pickle((10,), (-1,)))), "must be positive numbers"),
    "bin of a filled stand-in": (pickled(dict_of(FILLED)), "its pickle is refused: a state of a tensor"),
    "bin of a memo bomb": (pickled(dict_of(bomb_opcodes())), "found NoneType at 'model.norm.weight'"),
    "bin of nested tuples": (
        pickled(lambda t: zipped(("archive/data.pkl", nested_tuples()))),
        "its pickle is refused: tuples must nest",
    ),
    "bin index elsewhere": (index_of_pickles({"x": "../outside.bin"}), r"index.json: .*'\.\./outside.bin'"),
    "bin index of an absent file": (index_of_pickles({"x": "two.bin"}), "two.bin: expected a"),
    "bin index of an absent tensor": (index_of_pickles({"x": "one.bin"}), "tensor 'x' that the index promises"),
}


def gguf(change):
    def make(folder):
        path = write_gguf(folder / "bad.gguf")
        path.write_bytes(change(path.read_bytes()))
        return path

    return make


def put(at, data):
    return lambda blob: blob[:at] + data + blob[at + len(data) :]


def after(needle, data, skip=0):
    """Bytes that follow ``needle`` replaced."""
    return lambda blob: put(blob.index(needle) + len(needle) + skip, data)(blob)


def gguf_parts(change):
    """A model in two parts, of which ``change`` gets the paths; it may return another to convert."""

    def make(folder):
        write_gguf(folder / "m.gguf", parts_of=20)
        parts = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
        changed = change(parts)
        return changed if isinstance(changed, Path) and not parts[0].exists() else parts[0]

    return make


def gguf_tokenizer(**change):
    said = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "merges": ["a b"], "token_type": [1, 1], **change}
    keys = {f"tokenizer.ggml.{key}": value for key, value in said.items()}
    return lambda folder: write_gguf(folder / "bad.gguf", keys=keys)


GGUF = {
    "gguf magic": (gguf(put(0, b"GGML")), "header: another magic number"),
    "gguf version": (gguf(put(4, b"\xff" * 4)), "header: version"),
    "gguf tensor count": (gguf(put(8, b"\xff" * 8)), "header: .* tensors"),
    "gguf key count": (gguf(put(16, b"\xff" * 7 + b"\x7f")), "header: .* keys"),
    "gguf key length": (gguf(put(24, b"\xff" * 8)), "metadata key 0: a text of"),
    "gguf value kind": (
        gguf(after(b"general.architecture", b"\x63\0\0\0")),
        "'general.architecture': a value of kind 99",
    ),
    "gguf text length": (gguf(after(b"general.architecture", b"\xff" * 8, 4)), "'general.architecture': a text of"),
    "gguf array count": (
        gguf(after(b"llama.block_count", struct.pack("<IIQ", 9, 4, 1 << 60))),
        "'llama.block_count': .* values",
    ),
    "gguf nested array": (
        gguf(after(b"llama.block_count", struct.pack("<IIQ", 9, 9, 1))),
        "'llama.block_count': an array of kind 9",
    ),
    "gguf text that is not utf-8": (gguf(after(b"general.name", b"\xff\xfe\xff\xfe", 12)), "'general.name': .*UTF-8"),
    "gguf dimensions": (gguf(after(b"token_embd.weight", b"\xff" * 4)), "'token_embd.weight': .* dimensions"),
    "gguf shape": (gguf(after(b"token_embd.weight", struct.pack("<QQ", 1 << 62, 1 << 62), 4)), "'token_embd.weight': "),
    "gguf tensor kind": (gguf(after(b"token_embd.weight", b"\xee\0\0\0", 20)), "'token_embd.weight': values of kind"),
    "gguf tensor offset": (gguf(after(b"token_embd.weight", b"\xff" * 8, 24)), "'token_embd.weight': .* beyond"),
    "gguf tensors overlap": (gguf(after(b"output.weight", bytes(8), 24)), "found in tensor .* overlap those of"),
    "gguf tensor unaligned": (gguf(after(b"token_embd.weight", b"\x01", 24)), "no multiple of the alignment 32"),
    "gguf array of many": (
        gguf(after(b"llama.block_count", struct.pack("<IIQ", 9, 0, 1_200_001))),
        "'llama.block_count': 1200001 values, with which",
    ),
    "gguf array of many texts": (
        gguf(after(b"llama.block_count", struct.pack("<IIQ", 9, 8, 600_001))),
        "'llama.block_count': 600001 values, with which",
    ),
    "gguf truncated": (gguf(lambda blob: blob[:-5000]), "beyond the file's end"),
    "gguf header alone": (gguf(lambda blob: blob[:200]), "its end"),
    "gguf part missing": (gguf_parts(lambda parts: parts[1].unlink()), "m-00002-of-00002.gguf: expected all 2 parts"),
    "gguf part twice": (
        gguf_parts(lambda parts: shutil.copy(parts[0], parts[1])),
        "m-00002-of-00002.gguf: split.no must be 1, found 0",
    ),
    "gguf part of another": (
        gguf_parts(lambda parts: shutil.copy(parts[1], parts[0])),
        "expected the metadata key general.architecture, found none",
    ),
    "gguf part count": (
        gguf_parts(lambda parts: parts[1].write_bytes(after(b"split.count", b"\x09", 4)(parts[1].read_bytes()))),
        "m-00002-of-00002.gguf: split.count must be 2, found 9",
    ),
    "gguf part truncated": (
        gguf_parts(lambda parts: parts[1].write_bytes(parts[1].read_bytes()[:-5000])),
        "m-00002-of-00002.gguf: .* beyond the file's end",
    ),
    "gguf part number": (
        gguf_parts(lambda parts: parts[0].rename(parts[0].with_name("m-00009-of-00002.gguf"))),
        "expected a part of 1 to 2, found part 9 of 2",
    ),
    "gguf rope factors of another size": (
        lambda folder: write_gguf(folder / "bad.gguf", extra={"rope_freqs.weight": numpy.ones(3, "float32")}),
        r"'rope_freqs.weight' must have the size \(4,\), found \(3,\)",
    ),
    "gguf rope factors of nothing": (
        lambda folder: write_gguf(folder / "bad.gguf", extra={"rope_freqs.weight": numpy.zeros(4, "float32")}),
        "'rope_freqs.weight' must be the result of Llama 3.1's RoPE scaling",
    ),
    "gguf integers": (
        lambda folder: write_gguf(folder / "bad.gguf", extra={"blk.0.attn_q.bias": numpy.ones(4, "int32")}),
        "'blk.0.attn_q.bias' has values of kind I32, which are not read",
    ),
    "gguf tokenizer of another kind": (gguf_tokenizer(model="bert"), "tokenizer.ggml.model must be gpt2 or llama"),
    "gguf tokenizer cut otherwise": (gguf_tokenizer(pre="tekken"), "tokenizer.ggml.pre must be one of .*'tekken'"),
    "gguf tokens that are numbers": (gguf_tokenizer(tokens=[1, 2]), "tokenizer.ggml.tokens must be a list of str"),
    "gguf merge of no tokens": (gguf_tokenizer(merges=["x y"]), "expected a tokenizer that transformers reads"),
    "gguf kinds of too few tokens": (gguf_tokenizer(token_type=[1]), "token_type must have 2 entries, .* found 1"),
}

CASES = TAR | NEMO | {f"hf: {name}": case for name, case in HF.items()} | GGUF


@pytest.mark.parametrize("name", CASES)
def test_refused(name, origin, tmp_path):
    make, message = CASES[name]
    for part in ("hf", "nemo"):
        shutil.copytree(origin / part, tmp_path / part)
    shutil.copy(origin / "m.nemo", tmp_path / "m.nemo")
    path = make(tmp_path)
    to_nemo = name in GGUF or name.startswith("hf: ")
    target = tmp_path / "out" / ("out.nemo" if to_nemo else "out")
    target.parent.mkdir()
    before = {p.name for p in target.parent.iterdir()}
    with pytest.raises(MinitronError, match=message) as caught:
        convert(path, target)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert {p.name for p in target.parent.iterdir()} == before
    assert not os.path.exists(CANARY)


def test_the_payload_is_live():
    """The canary of the cases above would be there if anything had been run."""
    pickle.loads(pickle.dumps(Code()))
    assert os.path.isdir(CANARY)
    os.rmdir(CANARY)


def test_enough_cases():
    assert len(CASES) == len(TAR) + len(NEMO) + len(HF) + len(GGUF) >= 100


def test_leave_to_run_tokenizer_code_is_not_taken_from_a_file(origin, tmp_path):
    shutil.copytree(origin / "nemo", tmp_path / "nemo")
    path = tmp_path / "nemo" / "model_config.yaml"
    path.write_text(path.read_text().replace("\n  model: null", "\n  model: null\n  trust_remote_code: true"))
    with NemoReader(tmp_path / "nemo") as reader:
        assert "trust_remote_code" not in reader.config["tokenizer"]
