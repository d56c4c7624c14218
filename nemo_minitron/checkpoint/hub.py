"""Models and tokenizers under their names on Hugging Face's hub, through ``huggingface_hub``'s cache and token.

Only a *user's* key can name one; what a checkpoint names is never looked up. A path goes before a name: what exists
here, what begins like a path or ends like a file is never asked for on the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nemo_minitron.checkpoint import tokenizer_files
from nemo_minitron.checkpoint.hf_folder import shards
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.text import one_line
from nemo_minitron.jobs.processes import notice

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?", re.ASCII)
_FILES = (".nemo", ".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".tar", ".json", ".model")
TOKENIZER = (*tokenizer_files.FILES, "spiece.model")
_SMALL = (*TOKENIZER, "config.json", "generation_config.json", "adapter_config.json")
_WEIGHTS = (("model", "safetensors"), ("pytorch_model", "bin"))
_SECONDS = 10.0  # to wait for a listing
Choose = Callable[[Sequence[str]], list[str]]
"""Chooses, of the names of a repository's files, those to download; raises what it likes where they do not do."""


def is_name(text: str) -> bool:
    """Whether a text can be a name on the hub, ``ORG/NAME`` or ``NAME``, with ``@REVISION`` or without, and no path."""
    return bool(_NAME.fullmatch(text)) and not text.endswith(_FILES) and not os.path.exists(text)


def located(name: str | Path, key: str) -> Path:
    """Path of a checkpoint that a user's key gives: the path itself, or :func:`model_folder` of ``ORG/NAME``.

    Args:
        name: a text; a :class:`Path` is never looked up on the hub.
    """
    if isinstance(name, str) and is_name(name) and "/" in name.partition("@")[0]:
        return model_folder(name, key)
    return Path(name)


def model_folder(name: str, key: str) -> Path:
    """Folder of a model on the hub in the cache, once the files that are read here are there.

    These are the configs, the tokenizer, and of the weights one kind: safetensors, else ``pytorch_model.bin``.

    Args:
        name: ``ORG/NAME``, or ``ORG/NAME@REVISION`` for another branch, tag or commit than ``main``.
        key: of the user, in messages.

    Raises:
        MinitronError: no such model, one that is not open to the user's token, no weights that are read here, or no
            network and no whole copy in the cache.
    """

    def first(files: Sequence[str]) -> list[str]:
        small = [file for file in files if file in _SMALL or file in _index_names()]
        if not any(_weights(files)) and "adapter_config.json" not in files:
            others = sorted(file for file in files if file.endswith((".gguf", ".nemo", ".pth", ".bin", ".safetensors")))
            found = f"{others[0]}; download the file, and name it" if others else "none"
            raise MinitronError(f"{key}: expected weights of a HF folder in '{name}' on the hub, found {found}")
        return small + _whole_files(files)

    folder = _snapshot(name, key, first, _is_whole)
    indexed = [str(file) for kind in _WEIGHTS for file, names in shards(folder, *kind) if names is not None][:10_000]
    if any(not (folder / file).is_file() for file in indexed):
        folder = _snapshot(name, key, lambda files: [file for file in files if file in indexed], _is_whole)
    return folder


def tokenizer_folder(name: str, key: str) -> Path:
    """Folder of a repository's tokenizer in the cache; raises as :func:`model_folder`."""

    def files(names: Sequence[str]) -> list[str]:
        found = [file for file in names if file in (*TOKENIZER, "config.json")]
        if not any(file in TOKENIZER for file in found):
            raise MinitronError(f"{key}: expected a tokenizer in '{name}' on the hub, found none")
        return found

    return _snapshot(name, key, files, lambda folder: any((folder / file).is_file() for file in TOKENIZER))


def _weights(files: Sequence[str]) -> Iterator[str]:
    """Names of a repository's weights of a HF folder."""
    for stem, suffix in _WEIGHTS:
        form = re.compile(rf"{stem}(-\d{{5}}-of-\d{{5}})?\.{suffix}(\.index\.json)?")
        yield from (file for file in files if form.fullmatch(file))


def _index_names() -> list[str]:
    return [f"{stem}.{suffix}.index.json" for stem, suffix in _WEIGHTS]


def _whole_files(files: Sequence[str]) -> list[str]:
    """Weights that are known without an index: one file, or a numbered set; none where there is an index to be read."""
    for stem, suffix in _WEIGHTS:
        if f"{stem}.{suffix}" in files:
            return [f"{stem}.{suffix}"]
        if f"{stem}.{suffix}.index.json" in files:
            return []
        numbered = [file for file in _weights(files) if file.startswith(f"{stem}-") and file.endswith(f".{suffix}")]
        if numbered:
            return numbered
    return []


def _is_whole(folder: Path) -> bool:
    """Whether a folder of the cache has all that is read of a model."""
    try:
        found = next((files for kind in _WEIGHTS if (files := list(shards(folder, *kind)))), [])
    except MinitronError:
        return False
    return bool(found) and all((folder / file).is_file() for file in ("config.json", *(name for name, _ in found)))


def _snapshot(name: str, key: str, choose: Choose, is_whole: Callable[[Path], bool]) -> Path:
    """Folder in the cache with the files that ``choose`` takes of a repository's; without the network a whole copy."""
    import huggingface_hub
    from huggingface_hub import HfApi, constants

    repo, _, revision = name.partition("@")
    where = revision or constants.DEFAULT_REVISION
    offline = constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    unreached = "HF_HUB_OFFLINE is set" if offline else None
    if unreached is None:
        with _spoken(repo, where, key) as trouble:
            siblings = HfApi().model_info(repo, revision=where, timeout=_SECONDS).siblings or []
            files = choose([sibling.rfilename for sibling in siblings])
            return Path(huggingface_hub.snapshot_download(repo, revision=where, allow_patterns=files))
        unreached = trouble[0]
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, revision=where, local_files_only=True))
    except (OSError, ValueError):
        folder = None
    if folder is None or not is_whole(folder):
        part = "no copy" if folder is None else "only a part of it"
        raise MinitronError(
            f"{key}: '{name}' is no path here, and the hub ({constants.ENDPOINT}) was not asked or not reached "
            f"({unreached}); found {part} in the cache {constants.HF_HUB_CACHE}; give a folder, or download it with "
            f"`hf download {repo}` where there is a network"
        )
    notice(f"{key}: the hub was not asked or not reached ({unreached}); the copy in the cache is used, {folder}")
    return folder


@contextmanager
def _spoken(repo: str, revision: str, key: str) -> Iterator[list[str]]:
    """What the hub answers becomes one line; that it was not reached goes into the list, for the cache to be tried."""
    from huggingface_hub import constants, errors

    trouble: list[str] = []
    try:
        yield trouble
    except (MinitronError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except errors.RevisionNotFoundError:
        raise MinitronError(f"{key}: '{repo}' on the hub has no branch, tag or commit '{revision}' (404)") from None
    except errors.HFValidationError as error:
        raise MinitronError(f"{key}: expected a path or a name on the hub, found '{repo}': {one_line(error)}") from None
    except errors.HfHubHTTPError as error:
        code = getattr(error.response, "status_code", None)
        if code in (401, 403, 404):
            gated = isinstance(error, errors.GatedRepoError)
            raise MinitronError(f"{key}: {_refusal(repo, code, gated, constants.ENDPOINT)}") from None
        trouble.append(one_line(error))
    except Exception as error:  # of requests or httpx, by version
        trouble.append(f"{type(error).__name__}: {one_line(error)}")


def _refusal(repo: str, code: int, gated: bool, endpoint: str) -> str:
    token = "log in with `hf auth login` or set HF_TOKEN, or give a folder"
    if gated:
        return f"'{repo}' on the hub is gated ({code}): accept its conditions at {endpoint}/{repo}, then {token}"
    if code == 404:
        return f"'{repo}' is no path here, and the hub ({endpoint}) has no such model (404); give a folder or its name"
    if code == 401:
        return (
            f"'{repo}' is no path here, and the hub ({endpoint}) shows no such model without a token that may read it "
            f"(401): there is none, or it is private; {token}"
        )
    return f"'{repo}' on the hub may not be read with this token (403); {token}"
