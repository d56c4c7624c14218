"""Pickles of an untrusted checkpoint, read without importing or calling anything that they name."""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from typing import Any

import torch

_MAX_TUPLE_DEPTH = 16
_OPCODES = """
    PROTO FRAME MARK STOP POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    BINFLOAT UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE BINBYTES BINBYTES8 SHORT_BINBYTES BINSTRING
    SHORT_BINSTRING STRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT
    SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL
    STACK_GLOBAL REDUCE BUILD NEWOBJ NEWOBJ_EX BINPERSID
"""
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


class Inert:
    """Stands for a class that a pickle names: it keeps what it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


# The module's pure Python class: the C one allocates what a length or a memo index claims before it looks at the data.
_Base: Any = pickle._Unpickler  # type: ignore[attr-defined]


class InertUnpickler(_Base):
    """Builds plain data; a subclass says in :meth:`stand_in` which names may occur and what stands for them.

    Only the opcodes that data need are known, and tuples nest no deeper than hashing them on the C stack allows.

    Args:
        data: the whole pickle. Nothing is allocated that is not backed by it.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self._depths: dict[int, tuple[int, tuple[Any, ...]]] = {}  # the tuple is held so that its id stays its own

    def stand_in(self, module: str, name: str) -> Any:
        """What to use for ``module.name``; None to refuse it."""
        return None

    def find_class(self, module: str, name: str) -> Any:
        found = self.stand_in(module, name)
        if found is None:
            raise pickle.UnpicklingError(f"'{module}.{name}' has no place in it")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to something outside has no place in it")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("an extension code has no place in it")

    def read_all(self) -> Any:
        """The object.

        Raises:
            pickle.UnpicklingError: whatever is wrong with the pickle.
        """
        try:
            return self.load()
        except pickle.UnpicklingError:
            raise
        except KeyError as error:
            raise pickle.UnpicklingError(f"damaged at an opcode or reference {error}") from None
        except (
            AttributeError,
            EOFError,
            IndexError,
            MemoryError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
            struct.error,
        ) as error:
            raise pickle.UnpicklingError(f"damaged: {' '.join(str(error).split())[:200]}") from None

    def _measure_tuple(self) -> None:
        made = self.stack[-1]
        depth = 1 + max((self._depths.get(id(item), (1,))[0] for item in made if isinstance(item, tuple)), default=0)
        if depth > _MAX_TUPLE_DEPTH:
            raise pickle.UnpicklingError(f"tuples must nest at most {_MAX_TUPLE_DEPTH} deep")
        if depth > 1:
            self._depths[id(made)] = (depth, made)


def _measured(load: Any) -> Any:
    def load_tuple(self: InertUnpickler) -> None:
        load(self)
        self._measure_tuple()

    return load_tuple


def _dispatch() -> dict[int, Any]:
    code_of = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
    table = {code_of[name]: _Base.dispatch[code_of[name]] for name in _OPCODES.split()}
    for name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
        table[code_of[name]] = _measured(table[code_of[name]])
    return table


InertUnpickler.dispatch = _dispatch()


class Anything(Inert):
    """Takes part in whatever a pickle does with an object."""

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class NameCollector(InertUnpickler):
    """Notes in ``names`` every ``module.name`` that unpickling this would import."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.names: set[str] = set()

    def stand_in(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return dict if (module, name) == ("collections", "OrderedDict") else Anything

    def persistent_load(self, pid: Any) -> Any:
        return Anything()
