"""Articles with lines that cannot be taken, or that have no end."""

from __future__ import annotations

from nemo_minitron.data import wikitext as module
from nemo_minitron.data.sources import Source
from nemo_minitron.data.wikitext import looks_like_wikitext


def test_a_bad_line_is_the_fault_of_its_article(tmp_path):
    path = tmp_path / "wiki.train.tokens"
    path.write_bytes(b" = One = \n fine \n = Two = \n caf\xe9 \n more \n = Three = \n fine \n")
    one, two, three = Source(str(path)).records()
    assert one.texts == (" = One = \n fine \n",) and three.texts == (" = Three = \n fine \n",)
    assert (two.where, two.fault) == (f"{path}:4", "expected UTF-8 text, found byte 0xe9")
    assert (one.where, three.where) == (f"{path}:1", f"{path}:6")


def test_an_article_without_end_is_not_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORD", 40)
    path = tmp_path / "wiki.train.tokens"
    path.write_text(" = One = \n fine \n = Two = \n" + " more \n" * 10 + " = Three = \n fine \n")
    one, two, three = Source(str(path)).records()
    assert one.texts and three.texts and "an article of at most" in two.fault and not two.texts


def test_blank_rows_are_not_kept_while_looking(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n" * 1000 + " = One = \ntext\n")
    rows = Source(str(path), document="line")._rows(("text",))
    found, rest = looks_like_wikitext(rows)
    assert found and [row.texts for row in rest] == [(" = One = ",), ("text",)]
