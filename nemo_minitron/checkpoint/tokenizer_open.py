"""Opening tokenizers whose files may be hostile: from a folder alone, no code of theirs, every failure one message."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from nemo_minitron.checkpoint import hub, tokenizer_files
from nemo_minitron.config.sections import TOKENIZER_LIBRARIES, Tokenizer
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line
from nemo_minitron.jobs.processes import notice

SENTENCEPIECE = "tokenizer.model"
_HF = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Whatever the libraries raise inside on a file that is not as they expect becomes a :class:`MinitronError`.

    tokenizers raises a bare ``Exception``, and a panic of its Rust code derives from ``BaseException``.

    Args:
        what: names the file, and what was expected of it.
    """
    try:
        yield
    except (MinitronError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise MinitronError(f"{what}, found: {one_line(error)}") from None


def library_of(folder: Path) -> str:
    """``sentencepiece`` for a folder with nothing but its model, else ``huggingface``, as NeMo names them."""
    if (folder / SENTENCEPIECE).is_file() and not any((folder / name).is_file() for name in _HF):
        return "sentencepiece"
    return "huggingface"


def load_hf(folder: Path, where: str) -> Any:
    """transformers' tokenizer of a local folder, of a class of transformers' own; nothing is asked or downloaded.

    Raises:
        MinitronError: its files are not what :func:`tokenizer_files` allows, or cannot be loaded without their code.
    """
    from transformers import AutoTokenizer

    tokenizer_files.tokenizer_files(folder)
    with foreign(f"{where}: expected a tokenizer that transformers loads"):
        return AutoTokenizer.from_pretrained(
            str(tokenizer_files.readable(folder)), local_files_only=True, trust_remote_code=False
        )


def load_sentencepiece(file: Path, where: str) -> Any:
    """sentencepiece's processor of a ``.model`` file."""
    from sentencepiece import SentencePieceProcessor

    with foreign(f"{where}: expected a sentencepiece model"):
        return SentencePieceProcessor(model_file=str(file))


def facts(folder: Path) -> tuple[int, dict[str, int | None]]:
    """Entries of a folder's tokenizer, added tokens included, and its ids as ``config.json`` has them.

    Ids are ``bos_token_id`` and ``eos_token_id`` (None where it has none), and ``pad_token_id`` where it has one.
    """
    if library_of(folder) == "sentencepiece":
        model = load_sentencepiece(folder / SENTENCEPIECE, str(folder))
        size, found = model.GetPieceSize(), {"bos": model.bos_id(), "eos": model.eos_id(), "pad": model.pad_id()}
        ids = {name: number if number >= 0 else None for name, number in found.items()}
    else:
        backend = load_hf(folder, str(folder))
        with foreign(f"{folder}: expected a tokenizer that transformers loads"):
            size = len(backend)
            ids = {name: getattr(backend, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return size, {f"{name}_token_id": n for name, n in ids.items() if name != "pad" or n is not None}


def find_folder(name: str, key: str) -> Path:
    """Local folder of the HF tokenizer that a *user's* key names: a folder, a ``.nemo`` that packs one, or a hub name.

    Of a hub's repository only the tokenizer's files are downloaded (:mod:`nemo_minitron.checkpoint.hub`).

    Raises:
        MinitronError: naming ``key``: nothing there, or not to be had.
    """
    path = Path(name).expanduser()
    if name.endswith(".nemo") or (path / "model_config.yaml").is_file():
        if not path.exists():
            raise MinitronError(f"{key}: no .nemo at '{name}'")
        from nemo_minitron.checkpoint.nemo_file import NemoReader

        with NemoReader(path) as reader:
            folder = reader.tokenizer_folder()
        if folder is None:
            raise MinitronError(f"{key}: no tokenizer is packed in '{name}'; give its Hugging Face name or folder")
        return folder
    if path.is_dir():
        if not any((path / file).is_file() for file in (*_HF, SENTENCEPIECE)):
            raise MinitronError(f"{key}: '{name}' holds no tokenizer (any of {', '.join(_HF)}, {SENTENCEPIECE})")
        return path
    if not hub.is_name(name):
        raise MinitronError(f"{key}: expected a folder with a tokenizer at '{name}', found none")
    return hub.tokenizer_folder(name, key)


def asked_for(asked: Mapping[str, Any] | None, key: str) -> dict[str, str]:
    """What a run's own tokenizer section asks for: ``type`` or ``model``, or nothing.

    Args:
        asked: ``library``, ``type`` and ``model``, as NeMo names them.
        key: the section's name in messages.

    Raises:
        MinitronError: another key that has a value, another library, or both ``type`` and ``model``.
    """
    if asked is not None and not isinstance(asked, Mapping):
        raise MinitronError(f"{key} must be a section with type or model, found {asked!r:.80}")
    given = {name: value for name, value in (asked or {}).items() if value not in (None, "", False)}
    library = str(given.pop("library", Tokenizer.library))
    if library not in TOKENIZER_LIBRARIES:
        raise MinitronError(f"{key}.library must be huggingface or sentencepiece, found {library!r:.80}")
    for name in given.keys() - {"type", "model", "use_fast", "sentencepiece_legacy"}:
        raise MinitronError(
            f"{key}.{name} must be absent: a tokenizer is used as its files have it, and code of theirs is never run; "
            f"found {given[name]!r:.80}"
        )
    wanted: dict[str, str] = {name: str(given[name]) for name in ("type", "model") if name in given}
    if len(wanted) == 2:
        raise MinitronError(f"{key}: expected one of {key}.type and {key}.model, found both")
    return wanted


def asked_folder(asked: Mapping[str, Any] | None, key: str) -> Path | None:
    """Local folder of the tokenizer that :func:`asked_for` finds; None where nothing is asked for.

    Raises:
        MinitronError: as there; nothing where it says, or no sentencepiece model.
    """
    wanted = asked_for(asked, key)
    if "type" in wanted:
        return find_folder(wanted["type"], f"{key}.type")
    if "model" not in wanted:
        return None
    file = Path(wanted["model"]).expanduser()
    if not file.is_file():
        raise MinitronError(f"{key}.model: no sentencepiece file at '{file}'")
    load_sentencepiece(file, f"{key}.model: '{file}'")
    return tokenizer_files.lay_out({SENTENCEPIECE: file.read_bytes()})


class Carrier(Protocol):
    """A checkpoint that may carry a tokenizer."""

    path: Path

    def tokenizer_folder(self) -> Path | None:
        """Folder of the tokenizer that it carries."""


def choose(reader: Carrier, asked: Mapping[str, Any] | None, key: str) -> Path | None:
    """Folder of the tokenizer that a checkpoint carries, else of the one that a run asks for, see :func:`asked_folder`;
    None without either. What is asked for in vain is not opened, and that is said."""
    packed = reader.tokenizer_folder()
    if packed is None:
        return asked_folder(asked, key)
    if asked_for(asked, key):
        notice(f"{reader.path} carries its own tokenizer, which is used; {key} is not")
    return packed
