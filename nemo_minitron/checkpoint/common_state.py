"""What a Megatron checkpoint stores beside its tensors, as plain data: ``common.pt``, or an object in a ``.distcp``.

Megatron-Core up to 0.18 writes ``common.pt``; 0.19 the object ``common_state/shard_0_1``, a list with the same dict in
it. Both are pickles in a zip of ``torch.save``: what they name is never imported.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import torch

from nemo_minitron.checkpoint.allowed import is_allowed
from nemo_minitron.checkpoint.archive import Archive
from nemo_minitron.checkpoint.distcp import Place, part
from nemo_minitron.checkpoint.pickles import DTYPES, Anything, Inert, InertUnpickler
from nemo_minitron.checkpoint.record import Read, RecordError, pickled
from nemo_minitron.errors import MinitronError

FILE, OBJECT = "common.pt", "common_state/shard_0_1"
_LIMIT = 64 << 20


class Namespace(Inert):
    """Stands for ``argparse.Namespace``: its ``vars`` are the arguments."""

    def __init__(self) -> None:
        super().__init__()
        del self.args


class _StateUnpickler(InertUnpickler):
    def stand_in(self, module: str, name: str) -> Any:
        if not is_allowed(f"{module}.{name}"):
            return None
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        special = {"argparse.Namespace": Namespace, "collections.OrderedDict": dict, "torch.Size": tuple}
        return special.get(f"{module}.{name}", Anything)

    def persistent_load(self, pid: Any) -> Any:
        return Anything()  # values of a tensor, which nothing here needs


def read_common(archive: Archive, objects: Mapping[str, Place], where: str) -> dict[str, Any]:
    """The common state; empty where the checkpoint has none.

    Args:
        objects: places of the objects in the ``.distcp`` files, by key.

    Raises:
        MinitronError: a pickle that is damaged, too long or that names what has no place in a checkpoint.
    """
    if FILE in archive.names():
        place = (FILE, 0, archive.size(FILE))
    elif OBJECT in objects:
        place = objects[OBJECT]
    else:
        return {}
    state = unpickle(part(archive, *place), place[2], f"{where}: {place[0]}")
    if isinstance(state, list) and len(state) == 1:
        state = state[0]
    if not isinstance(state, dict):
        raise MinitronError(f"{where}: expected a dict in {place[0]}, found {type(state).__name__}")
    return {str(key): value for key, value in state.items()}


def unpickle(read: Read, length: int, where: str) -> Any:
    """The object of a file or record of ``torch.save``: plain data, objects and tensors as inert stand-ins.

    Raises:
        MinitronError: no such file, or as :func:`read_common`.
    """
    try:
        return _StateUnpickler(pickled(read, length, _LIMIT)).read_all()
    except (RecordError, pickle.UnpicklingError) as error:
        raise MinitronError(f"{where} is refused: {error}") from None


def arguments(state: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """Megatron-LM's ``args`` in a common state, plain values by name; None where it has none.

    Raises:
        MinitronError: ``args`` that are no namespace.
    """
    args = state.get("args")
    if args is None:
        return None
    if not isinstance(args, Namespace):
        raise MinitronError(f"{where}: args must be an argparse.Namespace, found {type(args).__name__}")
    return {str(key): _plain(value) for key, value in vars(args).items()}


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
