"""The HF tokenizer that travels inside a ``.nemo`` as ``minitron/tokenizer/<file>``, which NeMo ignores."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from nemo_minitron.checkpoint.archive import Archive, ArchiveWriter, read_member
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging, remove_leftovers
from nemo_minitron.files.text import parse_json

PREFIX = "minitron/tokenizer/"
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""All names that are packed and unpacked: no code, no weights, no path separators."""
CONFIG = "tokenizer_config.json"
INPUTS = {"model_input_names": ["input_ids", "attention_mask"]}
"""What a tokenizer gives to a model, as its config says it. Without it transformers 4's general class adds
``token_type_ids``, which no Llama takes: ``model.generate(**tokenizer(text))`` is an error then."""
_LIMIT = 256 << 20
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,100}")
_PICKLED = ("TransfoXL", "Rag")  # classes of transformers that unpickle a vocabulary, or open other folders
_FILE_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "added_tokens_file", "chat_template_file")


def tokenizer_files(folder: Path) -> list[Path]:
    """Tokenizer files of a HF folder, by the allow-list.

    Raises:
        MinitronError: a link to a file of another name elsewhere (the blobs of a hub's cache excepted), a file that is
            too large, or a config that names a file outside of the folder.
    """
    root = folder.resolve()
    found = [folder / name for name in FILES if (folder / name).is_file()]
    for file in found:
        place = file.resolve()
        if not (place.is_relative_to(root) or place.name == file.name or place.parent.name == "blobs"):
            raise MinitronError(
                f"{file}: expected a plain file or a link to one of the same name, found a link out of the folder to "
                f"{place}"
            )
        if file.stat().st_size > _LIMIT:
            raise MinitronError(f"{file}: expected at most {_LIMIT} bytes, found {file.stat().st_size}")
        if file.name == CONFIG:
            check_config(file.read_bytes(), str(file))
    return found


def check_config(data: bytes, where: str) -> None:
    """Refuse a ``tokenizer_config.json`` by which transformers would read files from elsewhere, or unpickle them."""
    content = parse_json(data, where)
    for key, value in content.items():
        if key in _FILE_KEYS and value is not None and (not isinstance(value, str) or value not in FILES):
            raise MinitronError(f"{where}: {key} must name a file of the folder, found {value!r:.80}")
    kind = content.get("tokenizer_class")
    if kind is not None and not (isinstance(kind, str) and _CLASS.fullmatch(kind) and not kind.startswith(_PICKLED)):
        raise MinitronError(f"{where}: tokenizer_class must be one that reads data alone, found {kind!r:.80}")


def _carried(folder: Path) -> dict[str, bytes]:
    """Files, by name, that go with a model to where others read them: these must not ask anybody to run code.

    Raises:
        MinitronError: as :func:`tokenizer_files`; a config with ``auto_map``.
    """
    files = _contents(folder)
    if CONFIG in files and parse_json(files[CONFIG], CONFIG).get("auto_map"):
        raise MinitronError(
            f"{folder / CONFIG}: auto_map must be absent, for it names code to run, which does not go with a model; "
            "remove it if the tokenizer does without"
        )
    return files


def _contents(folder: Path) -> dict[str, bytes]:
    files = {file.name: file.read_bytes() for file in tokenizer_files(folder)}
    if CONFIG in files:
        files[CONFIG] = for_both(files[CONFIG], str(folder / CONFIG))
    return files


def for_both(data: bytes, where: str) -> bytes:
    """A ``tokenizer_config.json`` that transformers 4 and 5 read; as it is, unless only 5 would.

    transformers 5 writes its new class and a list of extra tokens. The tokens themselves are in ``tokenizer.json`` as
    ever, and it still reads the older names.
    """
    config = parse_json(data, where)
    older = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        older = INPUTS | older | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(extra := config.get("extra_special_tokens"), list):
        del older["extra_special_tokens"]
        known = config.get("additional_special_tokens")
        known = known if isinstance(known, list) else []
        older["additional_special_tokens"] = [*known, *(token for token in extra if token not in known)]
    return data if older == config else (json.dumps(older, indent=2, ensure_ascii=False) + "\n").encode()


def readable(folder: Path) -> Path:
    """The folder itself, or, where only transformers 5 reads its config, a folder in the cache that 4 reads as well."""
    config = folder / CONFIG
    if not config.is_file() or for_both(data := config.read_bytes(), str(config)) == data:
        return folder
    return lay_out(_contents(folder))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of one folder into another."""
    for name, data in _carried(source).items():
        (target / name).write_bytes(data)


def pack(writer: ArchiveWriter, folder: Path, where: str = PREFIX) -> None:
    """Add a folder's tokenizer files to a checkpoint that is being written, in its folder ``where``."""
    for name, data in _carried(folder).items():
        writer.add(where + name, data)


def unpack(archive: Archive, model: str | None = None, prefix: str = PREFIX) -> Path | None:
    """The packed files as a folder, see :func:`lay_out`; None where none are packed.

    Args:
        model: the member that is a sentencepiece model, as NeMo packs it; used where no files of ours are packed.
        prefix: beginning of the members' names, a folder of a checkpoint.
    """
    present = set(archive.names())
    files = {name: read_member(archive, prefix + name, _LIMIT) for name in FILES if prefix + name in present}
    if not files and model is not None:
        files = {"tokenizer.model": read_member(archive, model, _LIMIT)}
    if CONFIG in files:
        check_config(files[CONFIG], prefix + CONFIG)
        files[CONFIG] = for_both(files[CONFIG], prefix + CONFIG)
    return lay_out(files) if files else None


def lay_out(files: dict[str, bytes]) -> Path:
    """Lay files, by name, into the user's cache, in a folder named by their content.

    The cache is ``$XDG_CACHE_HOME`` or ``~/.cache``, then ``nemo_minitron/tokenizers``.
    """
    digest = hashlib.sha256()
    for name, data in sorted(files.items()):
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "nemo_minitron" / "tokenizers" / digest.hexdigest()[:16]
    if folder.is_dir():
        remove_leftovers(folder)  # of a process that was killed here while another was faster
        return folder
    try:
        with Staging(folder, folder=True) as staging:
            for name, data in files.items():
                (staging.path / name).write_bytes(data)
    except (OSError, MinitronError) as error:
        if not folder.is_dir():  # another process was faster: the content is the same by its name
            raise MinitronError(f"{folder}: expected to unpack the tokenizer here, found: {error}") from None
    return folder
