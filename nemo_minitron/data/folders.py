"""Which files of a folder are the data of one configuration and split: by their names, or as its README.md says.

Nothing in a folder is run, and nothing outside of it is asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from nemo_minitron.data import readers
from nemo_minitron.data.lines import regular_size
from nemo_minitron.data.tables import SPLITS, saved_files
from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.files.text import parse_plain_yaml
from nemo_minitron.jobs.processes import notice

_SPLIT_FILE = re.compile(
    rf"(?:wiki\.)?({'|'.join(SPLITS)})(?:-\d+-of-\d+(?:-\w+)?)?\.[a-z]+(?:\.gz|\.bz2|\.xz|\.zst)?", re.IGNORECASE
)
_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
_SCRIPT = re.compile(rb"\b(?:GeneratorBasedBuilder|ArrowBasedBuilder|BeamBasedBuilder|DatasetBuilder)\b")
_MAX_README = 1 << 20
_CONFIG_KEYS = ("config_name", "data_files", "data_dir", "default", "version", "description")


def data_files(path: Path, config: str | None, split: str) -> list[Path]:
    """Files to read, in order, of a file or of a folder.

    Args:
        config: a configuration that the folder's README.md describes, or a subfolder; none of one file.
        split: ``train``, or the one that names of files or folders or the README.md say.

    Raises:
        MinitronError: nothing to read, an unclear choice, a script, or something that is no regular file.
    """
    wanted = SPLITS.get(split, split)
    if not path.is_dir():
        return [_single(path, config, split, wanted)]
    _refuse_script(path)
    saved = saved_files(path, split)
    if saved is not None:
        if config:
            raise MinitronError(f"dataset.config: the saved data set '{path}' has no configurations, found '{config}'")
        return saved
    described = _configurations(path)
    if described:
        return _described(path, described, config, split)
    if config:
        if not (path / config).is_dir():
            found = sorted(child.name for child in path.iterdir() if child.is_dir())
            raise MinitronError(f"dataset.config: no folder '{config}' in '{path}', found {found}")
        path = path / config
    return _of_split(path, _known(path), split, wanted)


def _single(path: Path, config: str | None, split: str, wanted: str) -> Path:
    if readers.format_of(path) is None:
        raise MinitronError(
            f"input: '{path}' has an unknown extension; known: {', '.join(readers.FORMATS)} "
            "(text also as .gz, .bz2, .xz or .zst), and .tgz for the Brown corpus"
        )
    if split != "train" and _split_of(PurePosixPath(path.name))[0] != wanted:
        raise MinitronError(f"dataset.split is '{split}', but the name of input '{path}' does not say so")
    if config and "wikitext" not in config.lower():  # that name says how the lines of any file are to be joined
        raise MinitronError(f"dataset.config: input '{path}' is one file, without configurations, found '{config}'")
    return path


def _known(path: Path) -> list[Path]:
    """Files under a folder that have a known extension, in sorted order of relative paths."""
    every = sorted(_walk(path), key=lambda file: file.relative_to(path).as_posix())
    files = [file for file in every if readers.format_of(file) and file.name not in _METADATA]
    if not files:
        raise MinitronError(
            f"input: no files with a known extension ({', '.join(readers.FORMATS)}) in '{path}', "
            f"found {len(every)} others"
        )
    for file in files:
        regular_size(file)
    if len(files) < len(every):
        notice(f"input: {len(every) - len(files)} files in '{path}' have other extensions and are left out")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Everything under a folder that is no folder and has no hidden name on its way; each folder once."""

    def fail(error: OSError) -> NoReturn:
        raise MinitronError(f"{error.filename}: cannot be read: {error.strerror}")

    seen = set()
    for home, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(home)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            yield from (Path(home, name) for name in names if not name.startswith("."))
        seen.add(real)


def _of_split(path: Path, files: list[Path], split: str, wanted: str) -> list[Path]:
    splits = {file: _split_of(PurePosixPath(file.relative_to(path).as_posix())) for file in files}
    found = sorted({said for said, _ in splits.values() if said})
    if not found and wanted == "train":
        return files
    unnamed = [file.name for file, (said, _) in splits.items() if said is None]
    if unnamed and wanted == "train":
        raise MinitronError(
            f"input: '{path}' has files named by split ({', '.join(found)}) and others ({unnamed[0]}, …), so that "
            "which of them are to be read is unclear; name one file, or keep the others in another folder"
        )
    chosen = [file for file, (said, _) in splits.items() if said == wanted]
    if not chosen:
        raise MinitronError(f"dataset.split: no '{split}' files in '{path}', found splits {found}")
    homes = sorted({splits[file][1] for file in chosen})
    if len(homes) > 1:
        raise MinitronError(f"input: '{path}' holds several configurations {homes}; set dataset.config to one")
    return chosen


def _split_of(file: PurePosixPath) -> tuple[str | None, str]:
    """Split that the name of a file, or of a folder on the way to it, says, and the folder in which it says so."""
    if match := _SPLIT_FILE.fullmatch(file.name):
        return SPLITS[match[1].lower()], file.parent.as_posix()
    for folder in file.parents:
        if folder.name.lower() in SPLITS:
            return SPLITS[folder.name.lower()], folder.parent.as_posix()
    return None, file.parent.as_posix()


def _refuse_script(folder: Path) -> None:
    for file in sorted(file for file in folder.glob("*.py") if file.is_file()):
        with open(file, "rb") as source:
            if file.stem == folder.resolve().name or _SCRIPT.search(source.read(_MAX_README)):
                raise MinitronError(f"input: '{file}' is a data set's script, which is not run; name its data files")


def _configurations(folder: Path) -> dict[str, dict]:
    """Configurations that the YAML at the head of a README.md describes, as Hugging Face's repositories have it."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        text = file.read(_MAX_README).decode("utf-8", "replace").removeprefix("\ufeff").replace("\r\n", "\n")
    head = re.match(r"---\n(.*?\n)---(?:\n|$)", text, re.DOTALL)
    if head is None or not re.search(r"\bconfigs\b['\"]?\s*:", head[1]):
        return {}  # other YAML, or a rule between two paragraphs
    entries = parse_plain_yaml(head[1].encode(), str(path)).get("configs")
    if entries is None:
        return {}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "config_name" in e for e in entries):
        raise MinitronError(f"{path}: configs must be a list of configurations, each with its config_name")
    return {str(entry["config_name"]): entry for entry in entries}


def _described(folder: Path, described: dict[str, dict], config: str | None, split: str) -> list[Path]:
    readme = folder / "README.md"
    if config is None:
        chosen = [name for name, entry in described.items() if entry.get("default")] or [
            name for name in described if name == "default" or len(described) == 1
        ]
        if len(chosen) != 1:
            raise MinitronError(f"input: '{folder}' holds several configurations {list(described)}; set dataset.config")
        config = chosen[0]
    if config not in described:
        raise MinitronError(
            f"dataset.config: no configuration '{config}' in '{readme}', found {list(described)}."
            f"{did_you_mean(config, described)}"
        )
    entry = described[config]
    unknown = sorted(map(str, set(entry) - set(_CONFIG_KEYS)))
    if unknown:
        raise MinitronError(
            f"{readme}: configuration '{config}' is to be read with {unknown}, which is not supported; name its files"
        )
    base = folder / _inside(entry.get("data_dir") or ".", readme)
    if entry.get("data_files") is None:
        return _of_split(base, _known(base), split, SPLITS.get(split, split))
    patterns = _patterns(entry["data_files"], readme)
    wanted = split if split in patterns else SPLITS.get(split, split)
    if wanted not in patterns:
        raise MinitronError(f"dataset.split: no '{split}' of configuration '{config}' in '{readme}': {list(patterns)}")
    files: dict[Path, None] = {}
    for pattern in patterns[wanted]:
        found = sorted(file for file in base.glob(_inside(pattern, readme)) if not file.is_dir())
        if not found:
            raise MinitronError(f"{readme}: configuration '{config}' names '{pattern}', of which there is no file")
        files |= dict.fromkeys(found)
    for file in files:
        regular_size(file)
        if readers.format_of(file) is None:
            raise MinitronError(f"{readme}: configuration '{config}' names '{file}', whose extension is unknown")
    return list(files)


def _patterns(given: Any, readme: Path) -> dict[str, list[str]]:
    """Patterns of file names by split; without splits, all are ``train``."""
    every = given if isinstance(given, list) else [given]
    if not all(isinstance(item, dict) and set(item) == {"split", "path"} for item in every):
        every = [{"split": "train", "path": every}]
    found: dict[str, list[str]] = {}
    for item in every:
        paths = item["path"] if isinstance(item["path"], list) else [item["path"]]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise MinitronError(
                f"{readme}: data_files must be paths, or a list of a split and a path each, found {str(given)[:80]}"
            )
        found.setdefault(str(item["split"]), []).extend(paths)
    return found


def _inside(pattern: Any, readme: Path) -> str:
    """A path or pattern that cannot leave the folder."""
    parts = PurePosixPath(str(pattern)).parts
    if ".." in parts or str(pattern).startswith(("/", "~")) or ":" in str(pattern) or "\0" in str(pattern):
        raise MinitronError(f"{readme}: expected paths inside of its own folder, found '{pattern}'")
    return str(pattern)
