"""Which tokenizer goes with a converted model, and whether it fits its table."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.formats import Reader
from nemo_minitron.checkpoint.nemo_gate import not_taken_over
from nemo_minitron.checkpoint.sentencepiece_files import with_hf_files
from nemo_minitron.checkpoint.tokenizer_cache import in_cache
from nemo_minitron.checkpoint.tokenizer_files import tokenizer_files
from nemo_minitron.checkpoint.tokenizer_open import SENTENCEPIECE, choose, facts, library_of
from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.processes import notice

Ids = dict[str, "int | None"]
"""``bos_token_id`` and its like, as ``config.json`` has them."""


def fitting(folder: Path, rows: int, where: Path) -> tuple[int, Ids]:
    """Entries and ids of a folder's tokenizer, which must not be larger than the model's table of ``rows`` rows.

    Raises:
        MinitronError: it is; ``where`` names the model.
    """
    entries, ids = facts(folder)
    if entries > rows:
        raise MinitronError(
            f"{where}: the tokenizer has {entries} entries, the model's table {rows} rows; expected a tokenizer no "
            "larger than the table"
        )
    return entries, ids


def for_export(reader: Reader, asked: Mapping[str, Any] | None, stack: ExitStack) -> tuple[Path | None, Ids, str]:
    """:func:`tokenizer_for` an export, with a line about what is left out; the reason is why the export has none."""
    for key in not_taken_over(reader.config) if isinstance(reader, NemoReader) else ():
        notice(f"{reader.path}: {key} has no place in the export and is left out")
    folder, ids, reason = tokenizer_for(reader, asked, stack)
    if folder is None:
        reason = f"{reason}; the export has none. tokenizer.type=... gives one"
        notice(reason)
    return folder, ids, reason


def tokenizer_for(reader: Reader, asked: Mapping[str, Any] | None, stack: ExitStack) -> tuple[Path | None, Ids, str]:
    """Tokenizer of a checkpoint, its ids (null where they are not known), and why there is none.

    What the checkpoint carries comes first, then what the user asks for. A folder of this machine that a ``.nemo``
    merely names, as NeMo's do, or the copy in the hub's cache of a name, is the last resort: it is said, files with a
    tokenizer's names and plain content are all that is read there, and it must fit the table. Nothing is downloaded.
    """
    unknown: Ids = {"bos_token_id": None, "eos_token_id": None}
    rows = reader.shape.vocab_size
    folder = choose(reader, asked, "tokenizer")
    packed = folder is not None and folder == reader.tokenizer_folder()
    if packed and reader.hf_config is not None:
        return folder, {}, ""  # the ids are the source's; it was read when it was packed
    if folder is not None:
        try:
            return folder, fitting(folder, rows, reader.path)[1], ""
        except MinitronError as error:
            if not packed:
                raise
            notice(f"{error}; it is exported as it is, with no bos_token_id and eos_token_id")
            return folder, unknown, ""
    made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if reader.save_tokenizer(made):
        return made, fitting(made, rows, reader.path)[1], ""
    named = reader.named_tokenizer() if isinstance(reader, NemoReader) else None
    said = "carries no tokenizer"
    if named is not None:
        path, of_hub = Path(named), not Path(named).is_absolute()
        try:
            found = in_cache(named) if of_hub else path if path.is_dir() and tokenizer_files(path) else None
            if found is not None:
                ids = fitting(found, rows, reader.path)[1]
                whose = f"the hub's cache for the name '{named}'" if of_hub else f"the folder that it names, {named}"
                notice(f"{reader.path} carries no tokenizer; taken from {whose}")
                return found, ids, ""
            absent = f"only the name '{named}', which is not in the hub's cache and is not downloaded"
            said += f", {absent}" if of_hub else f", and {named}, which it names, holds none here"
        except MinitronError as error:
            said += f", and the folder that it names cannot be used: {error}"
    return None, unknown, f"{reader.path} {said}"


def loadable(folder: Path | None) -> Path | None:
    """The folder itself; for a sentencepiece model alone, one in the user's cache with files that transformers loads.

    What cannot be made is said, and the model goes alone.
    """
    if folder is None or library_of(folder) != "sentencepiece":
        return folder
    try:
        made = with_hf_files(folder)
    except MinitronError as error:
        notice(f"{error}; {SENTENCEPIECE} is exported alone")
        return folder
    notice(f"tokenizer.json is made of {SENTENCEPIECE}; it adds no token at either end of a text, as NeMo adds none")
    return made
