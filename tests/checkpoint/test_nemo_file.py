import gzip
import io
import os
import pickle
import random
import re
import shutil
import tarfile
import zipfile

import pytest
import torch
from omegaconf import OmegaConf

from nemo_minitron.checkpoint import HfReader, NemoReader, NemoWriter, each_tensor, tensor_name, verify
from nemo_minitron.checkpoint.archive import ArchiveWriter, open_archive
from nemo_minitron.checkpoint.distcp import DistcpWriter
from nemo_minitron.convert import compare, convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.layout import EMBEDDING, FC1_WEIGHT, FINAL_NORM, QKV_WEIGHT, parameters
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA


@pytest.fixture(scope="module")
def nemo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nemo")
    return convert(make_llama(folder / "hf", GQA), folder / "m.nemo")


@pytest.fixture
def folder(nemo, tmp_path):
    """A private copy, as a folder of the same members."""
    with tarfile.open(nemo) as tar:
        tar.extractall(tmp_path / "folder", filter="data")
    return tmp_path / "folder"


def canonical(path):
    with NemoReader(path) as reader:
        return {(p.key, layer): reader.tensor(p, layer) for p, layer in each_tensor(reader.shape)}


def write(path, config, shape, tensors, dtype=torch.float32, **kwargs):
    with NemoWriter(path, config, shape, dtype, **kwargs) as writer:
        for parameter, layer in each_tensor(shape):
            writer.write(parameter, tensors[parameter.key, layer], layer)
    return path


def test_every_archive_kind_reads_the_same(nemo, folder, tmp_path):
    packed = tmp_path / "m.gz.nemo"
    packed.write_bytes(gzip.compress(nemo.read_bytes()))
    with NemoReader(nemo) as a, NemoReader(folder) as b, NemoReader(packed) as c:
        assert a.shape == b.shape == c.shape == GQA
        assert a.config == b.config == c.config
        assert a.fingerprint() == b.fingerprint() == c.fingerprint()


def test_fingerprint_ignores_padding_and_sees_a_bit(nemo, tmp_path):
    tensors = canonical(nemo)
    with NemoReader(nemo) as reader:
        config, expected = reader.config, reader.fingerprint()
    padded = write(tmp_path / "p.nemo", config, GQA.replace(padded_vocab_size=384), tensors)
    tensors[FINAL_NORM.key, None] = tensors[FINAL_NORM.key, None].clone()
    tensors[FINAL_NORM.key, None][5] += 1e-6
    changed = write(tmp_path / "c.nemo", config, GQA, tensors)
    with NemoReader(padded) as a, NemoReader(changed) as b:
        assert a.fingerprint() == expected != b.fingerprint()
        assert a.shape.padded_vocab_size == 384


def test_equal_content_gives_equal_bytes(nemo, tmp_path):
    with NemoReader(nemo) as reader:
        config = reader.config
    a, b = (write(tmp_path / name, config, GQA, canonical(nemo)) for name in ("a.nemo", "b.nemo"))
    assert a.read_bytes() == b.read_bytes()


def test_rewriting_what_was_read_gives_the_same_file(nemo, tmp_path):
    with NemoReader(nemo) as reader:
        config, tokenizer = reader.config, reader.tokenizer_folder()
    again = write(tmp_path / "m.nemo", config, GQA, canonical(nemo), tokenizer=tokenizer)
    assert again.read_bytes() == nemo.read_bytes()


def test_rows_are_slices(nemo):
    with NemoReader(nemo) as reader:
        for parameter, layer in each_tensor(reader.shape):
            whole = reader.tensor(parameter, layer)
            for rows in (slice(3, 7), slice(None, 5), slice(-4, None), slice(4, 4)):
                assert torch.equal(reader.tensor(parameter, layer, rows), whole[rows])


def test_chunks_of_any_grid_are_joined(nemo, tmp_path):
    """Chunks as TP4 writes them: columns and rows split, gate and up apart, the table in four."""
    tensors = canonical(nemo)
    archive = ArchiveWriter(tmp_path / "grid")
    weights = DistcpWriter(archive)
    for parameter in parameters(GQA):
        size = parameter.size(GQA)
        for layer in range(GQA.num_layers) if parameter.per_layer else [None]:
            tensor, lead = tensors[parameter.key, layer], () if layer is None else (layer,)
            dim, pieces = parameter.tp_dim or 0, 1 if parameter.tp_dim is None else 4
            if parameter == FC1_WEIGHT:
                pieces = 8
            for i, part in reversed(list(enumerate(tensor.chunk(pieces, dim)))):
                at = [0] * len(size)
                at[dim] = i * part.shape[dim]
                whole = ((GQA.num_layers,) if lead else ()) + size
                weights.add(f"model.{parameter.key}", part[None] if lead else part, whole, (*lead, *at))
    weights.close()
    archive.commit()
    with NemoReader(nemo) as reader:
        expected = reader.fingerprint()
        OmegaConf.save(OmegaConf.create(reader.config), tmp_path / "grid" / "model_config.yaml")
    with NemoReader(tmp_path / "grid") as reader:
        assert reader.fingerprint() == expected
        assert torch.equal(reader.tensor(QKV_WEIGHT, 1, slice(30, 70)), tensors[QKV_WEIGHT.key, 1][30:70])


def test_torch_distributed_checkpoint_reads_ours(nemo, folder):
    """PyTorch's own loader, without Megatron."""
    import torch.distributed.checkpoint as dcp

    qkv = torch.empty(GQA.num_layers, *QKV_WEIGHT.size(GQA))
    table = torch.empty(EMBEDDING.size(GQA))
    state = {f"model.{QKV_WEIGHT.key}": qkv, f"model.{EMBEDDING.key}": table}
    dcp.load(state, checkpoint_id=folder / "model_weights", no_dist=True)
    tensors = canonical(nemo)
    assert torch.equal(table, tensors[EMBEDDING.key, None])
    assert torch.equal(qkv, torch.stack([tensors[QKV_WEIGHT.key, i] for i in range(GQA.num_layers)]))


def test_tar_is_a_plain_one(nemo):
    with tarfile.open(nemo, "r:") as tar:
        members = tar.getmembers()
    assert all(m.isreg() and m.name.startswith("./") for m in members)
    assert members[0].name == "./model_config.yaml"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read(form, tmp_path):
    """As Python, GNU tar and NeMo (pax, with times in fractions of a second) write them."""
    names = ["./a", "model_weights/" + "b" * 80, "c" * 90 + "/" + "d" * 90]
    names += [] if form == tarfile.USTAR_FORMAT else ["e" * 300, "naïve/模型"]
    with tarfile.open(tmp_path / "m.tar", "w", format=form) as tar:
        tar.addfile(info("./folder", type=tarfile.DIRTYPE))
        for number, name in enumerate(names):
            tar.addfile(info(name, size=600 + number, mtime=1.5), io.BytesIO(bytes([number]) * (600 + number)))
    archive = open_archive(tmp_path / "m.tar")
    assert archive.names() == sorted(name.removeprefix("./") for name in names)
    for number, name in enumerate(names):
        assert archive.read(name.removeprefix("./")) == bytes([number]) * (600 + number)
    archive.close()


def test_member_beyond_8_gib(tmp_path):
    """A sparse file stands for the data; the header must use base-256 and every offset must survive."""
    writer = ArchiveWriter(tmp_path / "big.nemo")
    with writer.member("big") as file:
        file.seek((9 << 30) - 1, os.SEEK_CUR)
        file.write(b"x")
    writer.add("small", b"after")
    writer.commit()
    archive = open_archive(tmp_path / "big.nemo")
    assert archive.size("big") == 9 << 30
    assert archive.read("big", (9 << 30) - 1) == b"x"
    assert archive.read("small") == b"after"
    archive.close()
    with tarfile.open(tmp_path / "big.nemo") as tar:
        assert tar.getmember("./big").size == 9 << 30


def test_extra_members_and_verify(nemo, tmp_path):
    with NemoReader(nemo) as reader:
        config = reader.config
    path = write(tmp_path / "m.nemo", config, GQA, canonical(nemo), extra_members={"minitron/plan.yaml": b"a: 1"})
    with tarfile.open(path) as tar:
        assert tar.extractfile("./minitron/plan.yaml").read() == b"a: 1"
    verify(path)


def test_verify_names_the_damaged_tensor(nemo, tmp_path):
    data = bytearray(nemo.read_bytes())
    needle = canonical(nemo)[FC1_WEIGHT.key, 1].numpy().tobytes()
    data[data.index(needle) + 400] ^= 1
    bad = tmp_path / "bad.nemo"
    bad.write_bytes(data)
    with pytest.raises(MinitronError, match=r"decoder\.layers\.1\.mlp\.linear_fc1\.weight"):
        verify(bad)


def test_any_flipped_byte_is_found(nemo, tmp_path):
    """Bytes of every tensor, in a .nemo by its sidecar and in both kinds of output by comparison with the source."""
    hf = convert(nemo, tmp_path / "hf")
    weights, dice = hf / "model.safetensors", random.Random(0)
    packed, plain = bytearray(nemo.read_bytes()), bytearray(weights.read_bytes())
    bad = tmp_path / "bad.nemo"
    with NemoReader(nemo) as reader:
        for parameter, layer in each_tensor(reader.shape):
            name = re.escape(tensor_name(parameter, layer))
            values = reader.tensor(parameter, layer)
            last = values.reshape(-1)[-8:].numpy().tobytes()  # a run of bytes that is nowhere else, in HF's order too
            size = values.numel() * 4
            for data, path in ((packed, bad), (plain, weights)):
                end = data.index(last) + len(last)
                at = end - 1 - dice.randrange(size if path == bad else 32)
                bit = 1 << dice.randrange(8)
                data[at] ^= bit
                path.write_bytes(data)
                if path == bad:
                    with pytest.raises(MinitronError, match=name):
                        verify(bad)
                    with pytest.raises(MinitronError, match=name):
                        convert(bad, tmp_path / "out", verify=True)
                    assert not (tmp_path / "out").exists()
                after = NemoReader(bad) if path == bad else HfReader(hf)
                with after, pytest.raises(MinitronError, match=name):
                    compare(reader, after)
                data[at] ^= bit


# ------------------------------------------------------------------------------------------------------ bad writing


def test_writer_checks(nemo, tmp_path):
    tensors, target = canonical(nemo), tmp_path / "sub" / "m.nemo"
    with NemoReader(nemo) as reader:
        config = reader.config

    def attempt(change, message):
        changed = dict(tensors)
        change(changed)
        with pytest.raises(MinitronError, match=message):
            write(target, config, GQA, changed)
        assert list(tmp_path.iterdir()) == []

    key = (FINAL_NORM.key, None)
    attempt(lambda t: t.update({key: torch.ones(63)}), r"final_layernorm.weight' must have the size \(64,\)")
    attempt(lambda t: t.update({key: torch.full((64,), float("inf"))}), r"final_layernorm.weight' must be finite")
    with (
        pytest.raises(MinitronError, match=r"found none for 'decoder\.layers\.0"),
        NemoWriter(target, config, GQA, torch.float32) as writer,
    ):
        writer.write(EMBEDDING, tensors[EMBEDDING.key, None])
    with (
        pytest.raises(MinitronError, match="found a second write"),
        NemoWriter(target, config, GQA, torch.float32) as writer,
    ):
        writer.write(EMBEDDING, tensors[EMBEDDING.key, None])
        writer.write(EMBEDDING, tensors[EMBEDDING.key, None])
    with pytest.raises(KeyboardInterrupt), NemoWriter(target, config, GQA, torch.float32) as writer:
        writer.write(EMBEDDING, tensors[EMBEDDING.key, None])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ bad reading


def refuse(path, message):
    with pytest.raises(MinitronError, match=message) as caught:
        NemoReader(path)
    assert "\n" not in str(caught.value)


def hostile(tmp_path, nemo, *infos):
    path = tmp_path / "hostile.nemo"
    shutil.copy(nemo, path)
    with tarfile.open(path, "a") as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    return path


def info(name, **fields):
    entry = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(entry, key, value)
    return entry


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (info("../evil", size=1), "relative path"),
        (info("a/../../evil", size=1), "relative path"),
        (info("/tmp/evil", size=1), "relative path"),
        (info("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "plain file"),
        (info("hard", type=tarfile.LNKTYPE, linkname="model_config.yaml"), "plain file"),
        (info("device", type=tarfile.CHRTYPE), "plain file"),
        (info("fifo", type=tarfile.FIFOTYPE), "plain file"),
        (info("model_config.yaml", size=1), "found twice"),
    ],
)
def test_hostile_members_are_refused(entry, message, nemo, tmp_path):
    refuse(hostile(tmp_path, nemo, entry), message)


def test_not_a_nemo(nemo, tmp_path):
    refuse(tmp_path / "none.nemo", "expected a .nemo file or folder, found none")
    bad = tmp_path / "bad.nemo"
    bad.write_bytes(b"hello" * 1000)
    refuse(bad, "expected a .nemo")
    bad.write_bytes(nemo.read_bytes()[: nemo.stat().st_size // 2])
    refuse(bad, "truncated|unexpected end")
    bad.write_bytes(gzip.compress(nemo.read_bytes())[:-2000])
    refuse(bad, "gzip")


def test_without_parts(folder):
    (folder / "model_config.yaml").rename(folder / "x")
    refuse(folder, "expected the member model_config.yaml")
    (folder / "x").rename(folder / "model_config.yaml")
    weights = folder / "model_weights"
    (weights / "__0_0.distcp").rename(folder / "x")
    refuse(folder, "no member 'model_weights/__0_0.distcp'")
    shutil.rmtree(weights)
    refuse(folder, "expected the member model_weights/")
    (folder / "mp_rank_00").mkdir()
    (folder / "mp_rank_00" / "model_weights.ckpt").write_bytes(b"")
    refuse(folder, "legacy model_weights.ckpt")


def test_zarr_is_refused_by_name(folder):
    (folder / "model_weights" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refuse(folder, "expected dist_ckpt_format torch_dist, found zarr")


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_metadata_never_runs(folder, tmp_path):
    (folder / "model_weights" / ".metadata").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    refuse(folder, "posix.mkdir' has no place")
    assert not (tmp_path / "canary").exists()
    for name in ("torch.distributed.checkpoint.filesystem\nos.system", "torch.serialization\nload"):
        (folder / "model_weights" / ".metadata").write_bytes(f"c{name}\n(S'true'\ntR.".encode())
        refuse(folder, "has no place")
    (folder / "model_weights" / ".metadata").write_bytes(b"\x80\x04N.")
    refuse(folder, "found damage")


def test_code_in_a_record_never_runs(folder, tmp_path):
    """The first record's place is taken by a pickle of the same length with a payload."""
    data = bytearray((folder / "model_weights" / "__0_0.distcp").read_bytes())
    payload = io.BytesIO()
    torch.save(Canary(tmp_path / "canary"), payload)
    data[: len(payload.getvalue())] = payload.getvalue()
    (folder / "model_weights" / "__0_0.distcp").write_bytes(data)
    with NemoReader(folder) as reader, pytest.raises(MinitronError, match=r"record .* is damaged"):
        reader.tensor(EMBEDDING)
    assert not (tmp_path / "canary").exists()


def deflated(length):
    """A zip of ``length`` bytes, an entry of which is ten times as large when read."""

    def write(filler):
        bomb = io.BytesIO()
        with zipfile.ZipFile(bomb, "w") as entries:
            entries.writestr("archive/filler", bytes(filler))
            entries.writestr("archive/data.pkl", b"N.")
            entries.writestr("archive/data/0", bytes(10 * length), zipfile.ZIP_DEFLATED)
        return bomb.getvalue()

    return write(length - len(write(0)))


def test_a_record_that_expands_is_refused(folder):
    """A deflated zip in the place of the first record, ten times its size when read."""
    data = bytearray((folder / "model_weights" / "__0_0.distcp").read_bytes())
    with NemoReader(folder) as reader:
        length = reader._model.index[EMBEDDING.key][1].chunks[0].length
    data[:length] = deflated(length)
    (folder / "model_weights" / "__0_0.distcp").write_bytes(data)
    with NemoReader(folder) as reader, pytest.raises(MinitronError, match="it is compressed"):
        reader.tensor(EMBEDDING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, r"must have the size \(4, 64\), found \(3, 64\)"),
        ({"ffn_hidden_size": 95}, "linear_fc1.weight' must have the size"),
        ({"qkv_bias": True}, "linear_qkv.bias"),
        ({"num_query_groups": 3}, "must divide"),
        ({"normalization": "layernorm1p"}, "normalization"),
        ({"activation": "gelu"}, "activation"),
        ({"bias": True}, "linear_qkv.bias"),
        ({"mcore_gpt": False}, "mcore_gpt"),
        ({"hidden_size": "many"}, "hidden_size must be an integer"),
        ({"rotary_percentage": 0.5}, "rotary_percentage"),
    ],
)
def test_config_that_disagrees(changes, message, folder):
    config = OmegaConf.load(folder / "model_config.yaml")
    OmegaConf.save(OmegaConf.merge(config, changes), folder / "model_config.yaml")
    refuse(folder, message)
