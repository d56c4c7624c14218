"""Checkpoints of a training: honest ones pass, and what would run code is named before anything is unpickled."""

import collections
import io
import os
import pickle
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from nemo_minitron.checkpoint.training_folder import check_checkpoint
from nemo_minitron.errors import MinitronError


def saved(thing):
    out = io.BytesIO()
    torch.save(thing, out)
    return out.getvalue()


def calls(module, name):
    """A pickle that calls a name."""
    return f"c{module}\n{name}\n(V/nowhere\ntR.".encode()


def stack_global(module, name):
    """The same in protocol 4, where a name may go through attributes."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93\x8c\x04true\x85R."


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """What Megatron and Lightning leave: sharded tensors and an object, and what is common to all ranks."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("run") / "m--val_loss=1.00-step=5-last"
    state = {"model.weight": torch.ones(4, 2), "model._extra_state": io.BytesIO(b"x")}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    common = {
        "epoch": 0,
        "pytorch-lightning_version": "2.4.0",
        "optimizer_states": [
            {"param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}], "state": collections.defaultdict(dict)}
        ],
        "callbacks": {"Checkpoint": {"best_model_score": torch.tensor(6.3), "monitor": None}},
        "lr_schedulers": [collections.OrderedDict(min_lr=1e-5)],
        "hyper_parameters": OmegaConf.create({"cfg": {"optim": {"betas": [0.9, 0.95]}, "seed": 1}}),
        "hparams_type": type(OmegaConf.create({})),
        "dtype": torch.bfloat16,
        "rng": torch.zeros(4, dtype=torch.uint8),
    }
    (folder / "common.pt").write_bytes(saved(common))
    (folder / "metadata.json").write_text("{}")
    return folder


def test_honest_checkpoints_pass(honest, tmp_path):
    check_checkpoint(None)
    check_checkpoint(honest)
    shutil.copy(honest / "common.pt", tmp_path / "one.ckpt")
    check_checkpoint(str(tmp_path / "one.ckpt"))


def file(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def infect_object(folder):
    """Put code where the object's record lies."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index, info = next((i, s) for i, s in metadata.storage_data.items() if i.offset is None)
    assert index.fqn == "model._extra_state"
    path = folder / info.relative_path
    data, code = path.read_bytes(), calls("os", "system")
    path.write_bytes(data[: info.offset] + code.ljust(info.length, b"\0") + data[info.offset + info.length :])


def place_outside(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../{info.relative_path}"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def as_pipe(folder):
    (folder / "common.pt").unlink()
    os.mkfifo(folder / "common.pt")


HOSTILE = {
    "common.pt": (file("common.pt", calls("os", "system")), "common.pt is refused: 'os.system'"),
    "common.pt as a zip": (file("common.pt", saved(collections.Counter)), "'collections.Counter' has no place"),
    "through an attribute": (
        file("common.pt", stack_global("torch.distributed.checkpoint.filesystem", "os.system")),
        "'torch.distributed.checkpoint.filesystem.os.system' has no place",
    ),
    "through megatron": (
        file("common.pt", stack_global("megatron.core.parallel_state", "os.system")),
        "'megatron.core.parallel_state.os.system' has no place",
    ),
    "through omegaconf": (file("common.pt", stack_global("omegaconf.base", "sys.exit")), "'omegaconf.base.sys.exit'"),
    "a pickle in a pickle": (file("common.pt", calls("torch.storage", "_load_from_bytes")), "_load_from_bytes"),
    "a function of torch": (file("common.pt", calls("torch", "load")), "'torch.load'"),
    "a function of Megatron": (
        file("common.pt", calls("megatron.core.dist_checkpointing", "load")),
        "checkpointing.load",
    ),
    "a function of DCP": (
        file("common.pt", calls("torch.distributed.checkpoint.format_utils", "torch_save_to_dcp")),
        "torch_save_to_dcp",
    ),
    "getattr": (file("common.pt", calls("builtins", "getattr")), "'builtins.getattr'"),
    "partial": (file("common.pt", calls("functools", "partial")), "'functools.partial'"),
    ".metadata": (file(".metadata", calls("os", "system")), ".metadata is refused: 'os.system'"),
    ".metadata through an attribute": (
        file(".metadata", stack_global("torch.distributed.checkpoint.filesystem", "pickle.loads")),
        "filesystem.pickle.loads",
    ),
    ".metadata of nothing": (file(".metadata", pickle.dumps({})), ".metadata is refused"),
    ".metadata cut short": (file(".metadata", b"\x80\x04]"), ".metadata is refused"),
    "places outside": (place_outside, "outside of its folder"),
    "an object": (infect_object, "__0_0.distcp with 'model._extra_state' is refused: 'os.system'"),
    "another file": (file("extra.pt", calls("os", "system")), "extra.pt is refused: 'os.system'"),
    "no pickle": (file("common.pt", b"\0" * 100), "common.pt is refused"),
    "a pipe": (as_pipe, "common.pt: expected a regular file"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_checkpoints_are_refused_by_name(honest, tmp_path, case):
    change, message = HOSTILE[case]
    folder = tmp_path / "m-last"
    shutil.copytree(honest, folder)
    change(folder)
    with pytest.raises(MinitronError) as caught:
        check_checkpoint(folder)
    assert message in str(caught.value) and str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_one_file(tmp_path):
    (tmp_path / "last.ckpt").write_bytes(calls("os", "system"))
    with pytest.raises(MinitronError, match=r"last\.ckpt is refused: 'os\.system'"):
        check_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(MinitronError, match=r"none: expected a readable file"):
        check_checkpoint(tmp_path / "none")
