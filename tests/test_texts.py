"""The corpora of ``benchmarks/texts.py``, from packages that are made here."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import texts
import texts_debian
import texts_html

PAGE = b"""<!DOCTYPE html><html><head><title>No</title><style>p {}</style></head><body><nav>Contents</nav>
<div class="sphinxsidebar">Side</div><main><h1>Title<a class="headerlink" href="#t">\xc2\xb6</a></h1>
<p>One <b>bold</b> and
a <!-- note --> second.</p><ul><li>first<li>second</ul><pre>a = 1
  b</pre><p>Last.</p></main><footer>Made today</footer></body></html>"""
SENTENCE = "In the {} of a word there is that which is to be read, and it is for the reader of it that the rest is."

OTHER = "\n".join(f"Of the {word} that is in a {word}, and of the {word} to be, {word} is." for word in "abcdefgh")


def english(*words: str) -> str:
    return "\n".join(SENTENCE.format(word) for word in words)


def test_a_page_without_its_navigation():
    expected = "Title\nOne bold and a second.\n\nfirst\nsecond\n\na = 1\n  b\n\nLast."
    assert texts_html.text_of(PAGE) == expected
    assert texts_html.text_of(b"") == ""


def test_english_is_told_by_its_commonest_words():
    assert texts_html.is_english(english("midst", "end"))
    assert not texts_html.is_english(english("end").split(",")[0]), "too short"
    assert not texts_html.is_english("Le début est la moitié du tout, et la fin est dans le début. " * 10)


def rows(*documents: str) -> list[dict[str, str]]:
    return [{"text": text, "source": str(number), "licence": "MIT"} for number, text in enumerate(documents)]


def test_near_duplicates_and_repeated_lines_are_left_out():
    new = texts.NewText("prose")
    first = english("midst", "end", "sight", "whole")
    found = list(new.of(rows(first, f"{first} More.", f"{OTHER}\n{SENTENCE.format('end')}")))
    assert [row["source"] for row in found] == ["0", "2"] and new.left_out == 1
    assert found[0]["text"] == first and found[1]["text"] == OTHER, "the line that both have is the first one's"


def test_python_keeps_its_lines():
    code = "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(20))
    other = "".join(f"class C{n}:\n    value = {n}\n\n" for n in range(20)) + code[:34]
    new = texts.NewText("python")
    assert [row["text"] for row in new.of(rows(code, code + "# end\n", other))] == [code, other]


def build_deb(folder: Path, name: str, files: dict[str, bytes], version: str = "1:2.0-1") -> Path:
    tree = folder / f"{name}.tree"
    for path, data in {**files, "DEBIAN/control": b""}.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(data)
    control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b>\nDescription: b\n"
    (tree / "DEBIAN" / "control").write_text(control)
    path = folder / f"{name}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(path)], check=True, capture_output=True)
    return path


def build_wheel(folder: Path, name: str, licence: str, files: dict[str, str]) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for at, text in files.items():
            wheel.writestr(at, text)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\n{licence}\n")
    return path


needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb, of Debian")


@needs_dpkg
def test_files_and_licences_of_a_debian_package(tmp_path):
    says = b"Format: x\n\nFiles: *\nLicense: MIT\n\nFiles: a\nLicense: GPL-2+\n text\n"
    path = build_deb(
        tmp_path,
        "a-doc",
        {"usr/share/doc/a-doc/copyright": says, "usr/b.html.gz": gzip.compress(b"b"), "usr/a.html": b"a", "c": b"c"},
    )
    found = list(texts_debian.archive_files(path, texts.re.compile(r"\.html(\.gz)?$")))
    assert found == [("usr/a.html", b"a"), ("usr/b.html.gz", b"b")]
    of, text = texts_debian.copyright_of(path, "a-doc")
    assert of == "a-doc" and texts_debian.licences(text) == "GPL-2+, MIT"
    assert texts_debian.licences("License: as is\n") == "", "not for machines"
    assert texts_debian.licences("see /usr/share/common-licenses/GFDL-1.3.") == "GFDL-1.3"
    assert texts_debian.download("a-doc", tmp_path) == path, "what is there is not fetched"
    path.write_bytes(b"no archive")
    with pytest.raises(SystemExit, match="cannot read it"):
        list(texts_debian.archive_files(path, texts.re.compile("a")))


def test_a_licence_is_the_expression_or_the_classifiers():
    assert texts.licence_of("License-Expression: MIT\nClassifier: License :: OSI Approved :: BSD License\n") == "MIT"
    assert texts.licence_of("Classifier: License :: OSI Approved :: BSD License\n") == "BSD License"
    assert texts.licence_of("License: Apache 2.0\n and more\n") == "Apache 2.0"
    assert texts.licence_of("Name: a\n") == ""


CODE = "".join(f"def function_{n}(argument):\n    return argument + {n}\n\n\n" for n in range(10))


def test_a_wheel_under_another_licence_is_refused(tmp_path):
    (tmp_path / "packages").mkdir()
    build_wheel(tmp_path / "packages", "b", "License-Expression: GPL-3.0-only", {"b/__init__.py": CODE})
    with pytest.raises(SystemExit, match="expected a licence of MIT"):
        texts.from_wheel(tmp_path, "b", "1.0")


@needs_dpkg
def test_the_same_packages_give_the_same_bytes(tmp_path, monkeypatch, capsys):
    """Validation comes first and keeps what both have; a hash that is another's is refused."""
    folder = tmp_path / "texts"
    (packages := folder / "packages").mkdir(parents=True)
    held, learnt = english("midst", "end", "sight"), OTHER
    page = "<html><body><p>{}</p></body></html>".format
    build_deb(packages, "held-doc", {"usr/share/doc/held-doc/a.html": page(held).encode()})
    both = {"a.html": page(held).encode(), "b.html": page(learnt).encode(), "c.html": b"<p>short</p>"}
    build_deb(packages, "other-doc", {f"usr/share/doc/other-doc/{name}": data for name, data in both.items()})
    build_deb(packages, "stdlib", {"usr/lib/python3.11/json/decoder.py": CODE.replace("function", "decode").encode()})
    files = {"c/__init__.py": f"# SPDX-License-Identifier: BSD-3-Clause\n{CODE}", "c/tests/test_a.py": CODE}
    build_wheel(packages, "c", "License-Expression: MIT", files)
    build_wheel(packages, "d", "License-Expression: MIT", {"d.py": CODE.replace("function", "method")})
    monkeypatch.setattr(texts, "PROSE", {"held-doc": "", "other-doc": r"/[ab]\.html"})
    monkeypatch.setattr(texts, "PROSE_HELD_OUT", ("held-doc",))
    monkeypatch.setattr(texts, "STDLIB", ("stdlib",))
    monkeypatch.setattr(texts, "PYTHON", {"c": "1.0", "d": "1.0"})
    monkeypatch.setattr(texts, "PYTHON_HELD_OUT", ("d",))

    def run(*words: str) -> dict[str, bytes]:
        monkeypatch.setattr(sys, "argv", ["texts.py", str(folder), *words])
        texts.main()
        return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}

    manifest = tmp_path / "manifest.json"
    found = run("--json", str(manifest))

    def of(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in found[f"{name}.jsonl"].splitlines()]

    assert [row["source"] for row in of("prose_validation")] == ["held-doc:usr/share/doc/held-doc/a.html"]
    assert [row["source"] for row in of("prose_train")] == ["other-doc:usr/share/doc/other-doc/b.html"]
    sources = [(row["source"], row["licence"]) for row in of("python_train")]
    assert sources == [("stdlib:json/decoder.py", "PSF-2.0"), ("c:c/__init__.py", "BSD-3-Clause")]
    assert [row["source"] for row in of("python_validation")] == ["d:d.py"]
    said = json.loads(manifest.read_text())
    assert said["packages"]["held-doc"]["version"] == "1:2.0-1" and said["packages"]["c"]["licence"] == "MIT"
    assert said["outputs"]["prose"]["train"]["near_duplicates"] == 1
    assert "1 near-duplicates left out" in capsys.readouterr().out
    for path in (*folder.glob("*.jsonl"), *folder.glob("documents/*")):
        path.unlink()
    assert run("--like", str(manifest)) == found
    said["packages"]["d"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(said))
    with pytest.raises(SystemExit, match="d: expected SHA-256 0000"):
        run("--like", str(manifest))
