"""Debian packages without installing them: fetched by apt-get, read as a stream by dpkg-deb, with their licences."""

from __future__ import annotations

import gzip
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def download(name: str, folder: Path, version: str | None = None) -> Path:
    """The ``.deb`` of a package in a folder, where it may lie already; None: the version that the archive offers.

    Raises:
        SystemExit: apt-get is absent, or has no such package or version.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(folder.glob(f"{name}_{(version or '*').replace(':', '%3a')}_*.deb"))
    if not there:
        wanted = f"{name}={version}" if version else name
        try:
            done = subprocess.run(["apt-get", "download", "-q", wanted], cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit("apt-get: not found; prose is made of Debian's packages, on Debian") from None
        there = sorted(folder.glob(f"{name}_*.deb"))
        if done.returncode or not there:
            raise SystemExit(f"{wanted}: apt-get download failed: {done.stderr.strip()}; `apt-get update` first")
    return there[-1]


def archive_files(package: Path, name: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Path and content of the plain files of a ``.deb`` whose path has ``name``, in sorted order, gunzipped."""
    found = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as process:
        try:
            for path, data in _plain_files(process.stdout, name):
                found[path] = gzip.decompress(data) if path.endswith(".gz") else data
        except tarfile.ReadError:
            process.wait()
    if process.returncode:
        raise SystemExit(f"{package}: dpkg-deb cannot read it")
    yield from sorted(found.items())


def _plain_files(stream: Any, name: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if member.isfile() and name.search(member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield member.name.removeprefix("./"), file.read()


def copyright_of(package: Path, name: str) -> tuple[str, str]:
    """The package whose copyright file holds, this or the one that its folder of documents links to, and its text, ""
    where that lies in the other."""
    files = dict(archive_files(package, re.compile(rf"/usr/share/doc/{re.escape(name)}/copyright(\.gz)?$")))
    for data in files.values():
        return name, data.decode("utf-8", "replace")
    listing = subprocess.run(["dpkg-deb", "-c", str(package)], capture_output=True, text=True, check=True).stdout
    linked = re.search(rf"/usr/share/doc/{re.escape(name)}(?:/copyright)? -> (\S+)", listing)
    return (Path(linked[1].removesuffix("/copyright")).name if linked else name), ""


def licences(copyright_file: str) -> str:
    """Short names of a machine-readable copyright file, else the common licences that it names, else "".

    They are those of all files of the source package, of which the pages are a part.
    """
    is_for_machines = re.search(r"^Format: ", copyright_file, re.M)
    named = re.findall(r"^License: *(\S[^\n]*)$", copyright_file, re.M) if is_for_machines else []
    common = [one.rstrip(".") for one in re.findall(r"/usr/share/common-licenses/([\w.+-]+)", copyright_file)]
    return ", ".join(sorted({one.strip() for one in named or common}))
