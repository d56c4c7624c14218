"""Two corpora from packages of public registries: English technical prose, and Python; each to train and to validate.

    python benchmarks/texts.py FOLDER --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --json texts.json

``prose`` is the pages of Debian's documentation packages, from HTML to text by lxml, of the release of the machine that
runs this (apt-get, dpkg-deb); ``python`` is CPython's library as Debian ships it and wheels of PyPI, tests left out.
:mod:`texts_packages` lists the packages. Validation is whole packages that training never sees, and it comes first:
what training has of it is what is left out. A line of ``{prose,python}_{train,validation}.jsonl`` is a document with
its ``source`` and ``licence``, the package's or what an SPDX line of the file says.

A document is left out where more than half of its shingles (8 words, or 3 lines of Python; one in four of all, by their
CRC) stand in earlier ones, and so are lines of prose that an earlier document has. Prose is a page of at least 50 words
of which an eighth are among the ten commonest of English.

``manifest.json``, and ``--json``, has the version, SHA-256 and licence of every package, and the hashes, sizes and
tokens of the outputs, counted by the tokenizer of ``--source`` with ``minitron preprocess``; its files stay in FOLDER.
``--like`` asks for the versions of such a file, and refuses packages with other hashes: the same packages give the same
bytes. What is downloaded, read or tokenized is not done again. Copyright files are kept in FOLDER/licences.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

from provenance import provenance
from texts_debian import archive_files, copyright_of, download, licences
from texts_html import is_english, text_of
from texts_packages import PERMISSIVE, PROSE, PROSE_HELD_OUT, PYTHON, PYTHON_HELD_OUT, STDLIB
from tqdm import tqdm

KINDS, SPLITS = ("prose", "python"), ("validation", "train")
_NO_PAGES = re.compile(r"/(genindex|search|py-modindex|_modules/|_static/|_sources/)")
_NO_SOURCES = re.compile(
    r"(^|/)(tests?|testing|idle_test|lib2to3|_?vendor|_vendored|extern|pydoc_data|encodings)/|\.dist-info/"
)
_SPDX = re.compile(r"SPDX-License-Identifier: *([^\n]*)")
SHINGLES = {"prose": 8, "python": 3}
"""Words, and lines, that are compared at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", type=Path, help="GGUF, HF folder or .nemo, whose tokenizer counts")
    parser.add_argument("--like", type=Path, help="manifest whose versions and hashes are asked for")
    parser.add_argument("--json", type=Path, help="write the manifest here too")
    given = parser.parse_args()
    wanted = json.loads(given.like.read_text())["packages"] if given.like else {}
    packages = read_packages(given.folder, wanted)
    outputs = {kind: write(given.folder, kind, packages) for kind in KINDS}
    if given.source:
        count(given.folder, given.source, outputs)
    facts = {name: one["facts"] for name, one in sorted(packages.items())}
    manifest = {"outputs": outputs, "packages": facts} | provenance()
    for path in filter(None, (given.folder / "manifest.json", given.json)):
        path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    show(outputs)


def read_packages(folder: Path, wanted: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Facts and documents' file of every package, each read once.

    Raises:
        SystemExit: a package that cannot be had, or one with another hash than ``wanted`` says.
    """
    found = {}
    bar = tqdm([*PROSE, *STDLIB, *PYTHON], desc="packages", unit="package", disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        kept = folder / "documents" / f"{name}.jsonl"
        facts = kept.with_suffix(".facts.json")
        if not facts.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            version = wanted.get(name, {}).get("version") or PYTHON.get(name)
            documents, about = (from_wheel if name in PYTHON else from_debian)(folder, name, version)
            temporary = kept.with_suffix(".tmp")
            write_lines(temporary, documents)
            temporary.replace(kept)
            facts.write_text(json.dumps(about, indent=2) + "\n")
        about = json.loads(facts.read_text())
        if name in wanted and about["sha256"] != wanted[name]["sha256"]:
            raise SystemExit(f"{name}: expected SHA-256 {wanted[name]['sha256']}, found {about['sha256']}")
        found[name] = {"facts": about, "path": kept}
    return found


def from_debian(folder: Path, name: str, version: str | None) -> tuple[Iterator[dict[str, str]], dict[str, str]]:
    """Documents of a Debian package, HTML pages of ``PROSE`` or sources of CPython, and what the package is."""
    path = download(name, folder / "packages", version)
    of, says = copyright_of(path, name)
    licence = licences(says) or ("in its copyright file" if says else f"as of {of}")
    (folder / "licences").mkdir(exist_ok=True)
    (folder / "licences" / name).write_text(says or f"see {of}\n", encoding="utf-8")
    if name in STDLIB:
        files = archive_files(path, re.compile(r"\.py$"))
        documents = sources(name, "PSF-2.0", ((at.split("python3.11/", 1)[-1], data) for at, data in files))
        licence = "PSF-2.0"
    else:
        wanted = re.compile(PROSE[name] or ".")
        files = archive_files(path, re.compile(r"\.html?(\.gz)?$"))
        documents = pages(name, licence, ((at, data) for at, data in files if wanted.search(at)))
    return documents, {"version": path.name.split("_")[1].replace("%3a", ":"), "licence": licence} | facts_of(path)


def pages(name: str, licence: str, files: Iterable[tuple[str, bytes]]) -> Iterator[dict[str, str]]:
    """English prose of the files that have some."""
    for at, data in files:
        if not _NO_PAGES.search(at) and is_english(text := text_of(data)):
            yield {"text": text, "source": f"{name}:{at}", "licence": licence}


def from_wheel(folder: Path, name: str, version: str | None) -> tuple[Iterator[dict[str, str]], dict[str, str]]:
    """Python files of a wheel that is for every platform, and what the wheel is.

    Raises:
        SystemExit: there is none of that version, or its licence is not of ``PERMISSIVE``.
    """
    to = folder / "packages"
    stem = name.replace("-", "_")
    found = sorted(to.glob(f"{stem}-{version}-*.whl"), key=str) or sorted(to.glob(f"{name}-{version}-*.whl"))
    if not found:
        everywhere = ["--platform", "any", "--python-version", "3.11", "--implementation", "py", "--abi", "none"]
        call = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", *everywhere]
        before = set(to.glob("*.whl")) if to.is_dir() else set()
        done = subprocess.run([*call, "-d", str(to), f"{name}=={version}"], capture_output=True, text=True)
        found = sorted(set(to.glob("*.whl")) - before)
        if done.returncode or not found:
            raise SystemExit(f"{name}=={version}: pip download failed: {done.stderr.strip().splitlines()[-1:]}")
    path = found[0]
    with zipfile.ZipFile(path) as archive:
        metadata = next(at for at in archive.namelist() if at.endswith(".dist-info/METADATA"))
        licence = licence_of(archive.read(metadata).decode("utf-8", "replace"))
    if not any(word in licence for word in PERMISSIVE) or "GPL" in licence:
        raise SystemExit(f"{name}=={version}: expected a licence of {', '.join(PERMISSIVE)}, found {licence!r}")

    def files() -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(path) as archive:
            for at in sorted(archive.namelist()):
                if at.endswith(".py"):
                    yield at, archive.read(at)

    return sources(name, licence, files()), {"version": str(version), "licence": licence} | facts_of(path)


def licence_of(metadata: str) -> str:
    """What the metadata of a wheel says: an expression, else classifiers, else the first line of its own words."""
    fields = HeaderParser().parsestr(metadata)
    if expression := fields.get("License-Expression"):
        return expression
    classifiers = [one.split(" :: ")[-1] for one in fields.get_all("Classifier", []) if one.startswith("License ::")]
    classifiers = [one for one in classifiers if one != "OSI Approved"]
    return " AND ".join(classifiers) or (fields.get("License") or "").strip().split("\n")[0]


def sources(name: str, licence: str, files: Iterable[tuple[str, bytes]]) -> Iterator[dict[str, str]]:
    """Python files that are no tests, copies of other packages, or tables of data."""
    for at, data in files:
        text = data.decode("utf-8", "replace").replace("\r\n", "\n")
        if _NO_SOURCES.search(at) or len(text) < 200 or max(map(len, text.splitlines())) > 1000 or len(text) > 1 << 20:
            continue
        said = _SPDX.search(text[:4000])
        yield {"text": text, "source": f"{name}:{at}", "licence": said[1].strip() if said else licence}


def facts_of(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def write_lines(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ------------------------------------------------------------------------------------------------------------- outputs


def write(folder: Path, kind: str, packages: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Both splits of a kind, without near-duplicates, validation first; what they are."""
    held_out = {"prose": PROSE_HELD_OUT, "python": PYTHON_HELD_OUT}[kind]
    names = {
        "validation": held_out,
        "train": [name for name in (PROSE if kind == "prose" else [*STDLIB, *PYTHON]) if name not in held_out],
    }
    new, found = NewText(kind), {}
    for split in SPLITS:
        path = folder / f"{kind}_{split}.jsonl"
        left_out = new.left_out
        rows = (row for name in names[split] for row in new.of(read_lines(packages[name]["path"])))
        write_lines(path, tqdm(rows, desc=f"{kind}, {split}", unit="document", disable=None))
        data = path.read_bytes()
        found[split] = {
            "documents": data.count(b"\n"),
            "near_duplicates": new.left_out - left_out,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    return found


def read_lines(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


class NewText:
    """What of a stream of documents has not been in it before; ``left_out`` counts the documents that had."""

    def __init__(self, kind: str) -> None:
        self.kind, self.left_out = kind, 0
        self._shingles: set[int] = set()
        self._lines: set[int] = set()

    def of(self, rows: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
        """Documents that are not near-duplicates of earlier ones, prose without the lines that earlier ones have."""
        for row in rows:
            marks = shingles(row["text"], self.kind)
            if sum(mark in self._shingles for mark in marks) > len(marks) / 2:
                self.left_out += 1
                continue
            self._shingles.update(marks)
            if self.kind == "prose":
                row = {**row, "text": self._new_lines(row["text"])}
                if not is_english(row["text"]):
                    self.left_out += 1
                    continue
            yield row

    def _new_lines(self, text: str) -> str:
        lines = text.split("\n")
        marks = [zlib.crc32(line.encode()) if line else None for line in lines]
        kept = [line for line, mark in zip(lines, marks, strict=True) if mark not in self._lines]
        self._lines.update(mark for mark in marks if mark is not None)
        return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def shingles(text: str, kind: str) -> Sequence[int]:
    """CRCs of a document's shingles, of which every fourth value counts."""
    pieces = text.split() if kind == "prose" else [line.strip() for line in text.splitlines() if line.strip()]
    size = SHINGLES[kind]
    joined = (" ".join(pieces[at : at + size]).encode() for at in range(max(1, len(pieces) - size + 1)))
    return [mark for mark in map(zlib.crc32, joined) if mark % 4 == 0]


def count(folder: Path, source: Path, outputs: Mapping[str, Mapping[str, dict[str, Any]]]) -> None:
    """Tokenize each output whose bytes have not been, and say how many tokens it has."""
    from nemo_minitron.convert import convert
    from nemo_minitron.data.preprocess import preprocess, read_facts

    model = source if source.suffix == ".nemo" else folder / "tokenizer.nemo"
    if not model.exists():
        convert(source, model)
    for kind in KINDS:
        for split, one in outputs[kind].items():
            prefix, mark = folder / f"{kind}_{split}_text_document", folder / f"{kind}_{split}.tokenized"
            facts = f"{one['sha256']} {source.name}"
            if not mark.is_file() or mark.read_text() != facts:
                preprocess(folder / f"{kind}_{split}.jsonl", folder / f"{kind}_{split}", tokenizer_type=str(model))
                mark.write_text(facts)
            one["tokens"] = read_facts(prefix)["tokens"]


def show(outputs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    for kind, splits in outputs.items():
        for split, one in splits.items():
            tokens = f"{one['tokens']:>12,} tokens" if "tokens" in one else ""
            print(
                f"{kind:<8}{split:<12}{one['documents']:>8,} documents{one['bytes'] / 1e6:>9.1f} MB{tokens}"
                f"  {one['near_duplicates']:,} near-duplicates left out  {one['sha256'][:12]}"
            )


if __name__ == "__main__":
    main()
