"""Entries come from our files, entry points and a user's files; listing them imports none."""

import subprocess
import sys
import textwrap

import pytest

from nemo_minitron import registry
from nemo_minitron.config.compose import compose
from nemo_minitron.errors import MinitronError
from nemo_minitron.registry import LOSSES, Registry, load_extensions

TOY = """
class Toy:
    name = "{name}"
LOSS = Toy()
"""


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A registry of its own, over a package with two entries, and a helper file that is none."""
    package = tmp_path / "nemo_minitron_room"
    package.mkdir()
    for name in ("b", "a", "_shared"):
        (package / f"{name}.py").write_text(TOY.format(name=name))
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    found = Registry("toy", "LOSS", "nemo_minitron_room", "minitron.toys", "b")
    monkeypatch.setattr(registry, "_EXTENSIBLE", (found,))
    return found


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_files_of_the_package_are_entries_the_first_one_first(room):
    assert room.names() == ("b", "a")


def test_listing_imports_nothing():
    code = (
        "import sys; from nemo_minitron.registry import FAMILIES, LOSSES, METRICS\n"
        "[r.names() for r in (FAMILIES, LOSSES, METRICS)]; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_refused_with_the_nearest(room):
    with pytest.raises(MinitronError, match=r"no toy 'bb'; known are b, a. Did you mean 'b'"):
        room.get("bb")


def test_an_extension_file_adds_by_its_name(room, tmp_path):
    file = write(tmp_path / "mine.py", TOY.format(name="mine"))
    assert load_extensions([file]) == [tmp_path / "mine.py"]
    assert room.names() == ("b", "a", "mine") and room.get("mine").name == "mine"
    load_extensions([file])  # again: as every stage of a recipe does


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "expected one of LOSS in it, found none"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("LOSS = object()", "LOSS must have a name, found None"),
        (TOY.format(name="a"), "there is a toy 'a' already"),
    ],
)
def test_a_wrong_extension_file_is_refused_by_name(room, tmp_path, text, message):
    file = write(tmp_path / "wrong.py", text)
    for _ in range(2):  # a file that failed is not taken for loaded
        with pytest.raises(MinitronError, match=f"extensions: .*wrong.py.*{message}"):
            load_extensions([file])


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(MinitronError, match=r"expected a file that ends in .py, found '.*absent.py'"):
        load_extensions([str(tmp_path / "absent.py")])


def test_two_files_cannot_hold_one_name(room, tmp_path):
    files = [write(tmp_path / f"{name}.py", TOY.format(name="same")) for name in ("one", "two")]
    with pytest.raises(MinitronError, match=r"two.py: the toy 'same' is already in .*one.py"):
        load_extensions(files)


def test_an_entry_point_is_found_and_loaded_late(room, tmp_path, monkeypatch):
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[minitron.toys]\ntheirs = other_toy:LOSS\ngone = other_gone:LOSS\n")
    (tmp_path / "other_toy.py").write_text(TOY.format(name="theirs"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert room.names() == ("b", "a", "gone", "theirs") and "other_toy" not in sys.modules
    assert room.get("theirs").name == "theirs"
    with pytest.raises(MinitronError, match=r"entry point minitron.toys 'gone': cannot load other_gone:LOSS"):
        room.get("gone")


def test_a_command_loads_the_extensions_of_its_config(room, tmp_path):
    file = write(tmp_path / "mine.py", TOY.format(name="mine"))
    compose("convert", ["input_name_or_path=a", "output_path=b", f"extensions=[{file}]"])
    assert "mine" in room.names()


def test_extensions_of_the_wrong_type_are_refused(room):
    with pytest.raises(MinitronError, match="extensions"):
        compose("convert", ["input_name_or_path=a", "output_path=b", "extensions=mine.py"])


def test_losses_have_their_entry_point_group():
    assert LOSSES.group == "minitron.losses"
