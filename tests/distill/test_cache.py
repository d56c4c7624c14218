"""The cache's files: what is written is read, whole, and only where it belongs."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint import each_tensor
from nemo_minitron.distill.cache import SHARD, Identity, TeacherCache, architecture_of, teacher_of
from nemo_minitron.distill.loss import Mix
from nemo_minitron.distill.sampled import Sampled, teacher_samples
from nemo_minitron.distill.shard import Shard
from nemo_minitron.distill.top_k import TopK
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import LinearScaling, RopeScaling
from tests.llamas import GQA

LENGTH, K = 5, 4


def _identity(vocab_size: int = 70000, **changes) -> Identity:
    return dataclasses.replace(Identity("t", "d", "v", LENGTH, vocab_size, K, 1.0), **changes)


def _answers(samples: int, vocab_size: int) -> tuple[torch.Tensor, TopK]:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab_size, (samples, LENGTH), generator=g)
    log_p = torch.randn(samples, LENGTH, 50, generator=g, dtype=torch.float64).mul(3).log_softmax(-1)
    top = log_p.topk(K, -1)
    ids = torch.randint(0, vocab_size, top.indices.shape, generator=g)
    return tokens, TopK(top.values, ids, torch.log1p(-top.values.exp().sum(-1)))


def _rows(answers: TopK, rows: slice) -> TopK:
    return TopK(*(x[rows] for x in answers))


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_base": 500000.0},
        {"rope_scaling": RopeScaling()},
        {"rope_scaling": LinearScaling(2.0)},
        {"layernorm_epsilon": 1e-6},
        {"num_attention_heads": 2, "num_query_groups": 1, "kv_channels": 32},
        {"sliding_window": 64},
    ],
)
def test_the_same_weights_in_another_architecture_are_another_teacher(tmp_path, change):
    """Their sizes and values are equal, and their answers are not."""
    other = GQA.replace(**change)
    assert [p.size(GQA) for p, _ in each_tensor(GQA)] == [p.size(other) for p, _ in each_tensor(other)]
    ours, theirs = (architecture_of(shape) for shape in (GQA, other))
    assert architecture_of(GQA.replace(padded_vocab_size=GQA.vocab_size + 64)) == ours != theirs
    TeacherCache(tmp_path, _identity(architecture=ours)).create()
    TeacherCache(tmp_path, _identity(architecture=ours))
    TeacherCache(tmp_path, _identity(teacher=None))
    with pytest.raises(MinitronError, match=r"is of another architecture: it has llama, .*, this run llama, "):
        TeacherCache(tmp_path, _identity(architecture=theirs))


def test_a_cache_of_before_says_no_architecture(tmp_path):
    TeacherCache(tmp_path, _identity()).create()
    assert "architecture" not in json.loads((tmp_path / "cache.json").read_text())
    TeacherCache(tmp_path, _identity(architecture=architecture_of(GQA)))
    assert teacher_of(tmp_path) == "t" and teacher_of(tmp_path / "none") is None


@pytest.mark.parametrize("vocab_size", [300, 65536, 128256, 1 << 20])
def test_what_is_written_is_read(tmp_path, vocab_size):
    cache = TeacherCache(tmp_path / "cache", _identity(vocab_size))
    cache.create()
    assert cache.missing("train", SHARD + 10) == [0, 1]
    tokens, answers = _answers(SHARD + 10, vocab_size)
    for number, rows in enumerate((slice(0, SHARD), slice(SHARD, SHARD + 10))):
        batches = [(tokens[rows][:3], _rows(_rows(answers, rows), slice(0, 3)))]
        batches.append((tokens[rows][3:], _rows(_rows(answers, rows), slice(3, None))))
        cache.write("train", number, batches)
    again = TeacherCache(tmp_path / "cache", _identity(vocab_size, teacher=None))
    assert again.missing("train", SHARD + 10) == []
    wanted = torch.tensor([SHARD + 9, 0, 17])
    found = again.read("train", wanted, tokens[wanted])
    assert torch.equal(found.tokens, answers.tokens[wanted])
    torch.testing.assert_close(found.log_probs, answers.log_probs[wanted], rtol=1e-3, atol=1e-3)
    mass = found.log_probs.exp().sum(-1) + found.log_tail.exp()
    torch.testing.assert_close(mass, torch.ones_like(mass))
    size = sum(f.stat().st_size for f in (tmp_path / "cache" / "train").iterdir())
    assert size <= cache.identity.bytes_per_token * LENGTH * (SHARD + 10) + 2 * 512  # two headers
    assert not [f for f in tmp_path.rglob("*") if f.name.endswith(".tmp")]


def _drawn(samples: int, vocab_size: int, k: int) -> tuple[torch.Tensor, Sampled]:
    g = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, vocab_size, (samples, LENGTH), generator=g)
    logits = torch.randn(samples * LENGTH, 300, generator=g, dtype=torch.float64).mul(3)
    drawn = teacher_samples(logits, k, 1.0, torch.rand(samples * LENGTH, generator=g, dtype=torch.float64), Shard(300))
    ids = vocab_size - 300 + drawn.tokens  # the last ones: their bytes are full
    return tokens, Sampled(*(x.unflatten(0, (samples, LENGTH)) for x in (drawn.log_probs, ids, drawn.log_weights)))


@pytest.mark.parametrize("vocab_size", [300, 65536, 65537, 152000, 1 << 24, (1 << 24) + 1])
def test_what_was_drawn_is_read(tmp_path, vocab_size):
    """In at most 64 bytes a token with the default number; weights sum to 1 in spite of float16."""
    k = Mix().teacher_samples
    identity = _identity(vocab_size, top_k=0, samples=k)
    cache = TeacherCache(tmp_path / "cache", identity)
    cache.create()
    tokens, answers = _drawn(7, vocab_size, k)
    cache.write("train", 0, [(tokens[:3], answers.rows(slice(0, 3))), (tokens[3:], answers.rows(slice(3, None)))])
    again = TeacherCache(tmp_path / "cache", dataclasses.replace(identity, teacher=None))
    wanted = torch.tensor([6, 0, 2])
    found = again.read("train", wanted, tokens[wanted])
    assert isinstance(found, Sampled) and torch.equal(found.tokens, answers.tokens[wanted])
    torch.testing.assert_close(found.log_probs, answers.log_probs[wanted], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.log_weights, answers.log_weights[wanted], rtol=1e-3, atol=5e-3)
    mass = found.log_weights.exp().sum(-1)
    torch.testing.assert_close(mass, torch.ones_like(mass))
    size = (tmp_path / "cache" / "train" / "00000000.npy").stat().st_size
    assert size <= identity.bytes_per_token * LENGTH * 7 + 512
    if vocab_size <= 1 << 24:
        assert dataclasses.replace(identity, seq_length=2048).bytes_per_token <= 64


@pytest.mark.parametrize("k", [1, 300, 400])
def test_few_and_all_tokens_are_read(tmp_path, k):
    cache = TeacherCache(tmp_path, _identity(300, top_k=0, samples=k))
    tokens, answers = _drawn(2, 300, k)
    cache.write("train", 0, [(tokens, answers)])
    found = cache.read("train", torch.arange(2), tokens)
    torch.testing.assert_close(found.log_weights, answers.log_weights, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("changes,message", [
    ({"tokens": 255}, "sample 0: expected ids below the vocabulary's 70000, found"),
    ({"log_probs": np.nan}, "sum to 1"),
    ({"log_probs": 2.0}, "sum to 1"),
    ({"log_each": np.inf}, "sum to 1"),
    ({"log_each": np.nan}, "sum to 1"),
    ({"log_each": 0.0}, "sum to 1"),
])  # fmt: skip
def test_draws_that_are_none_are_refused(tmp_path, changes, message):
    cache = TeacherCache(tmp_path, _identity(top_k=0, samples=4))
    tokens, answers = _drawn(2, 70000, 4)
    cache.write("train", 0, [(tokens, answers)])
    path = tmp_path / "train" / "00000000.npy"
    records = np.load(path)
    for name, value in changes.items():
        records[name][0, 0] = value
    np.save(path, records)
    with pytest.raises(MinitronError, match=message):
        TeacherCache(tmp_path, cache.identity).read("train", torch.arange(2), tokens)
    cache.read("train", torch.tensor([1]), tokens[1:])


def test_draws_and_likeliest_tokens_are_no_cache_of_each_other(tmp_path):
    drawn = _identity(top_k=0, samples=12)
    TeacherCache(tmp_path / "drawn", drawn).create()
    TeacherCache(tmp_path / "likeliest", _identity()).create()
    assert "samples" not in (tmp_path / "likeliest" / "cache.json").read_text()  # as earlier versions wrote it
    with pytest.raises(MinitronError, match=f"another top_k: it has 0, this run {K}"):
        TeacherCache(tmp_path / "drawn", _identity())
    with pytest.raises(MinitronError, match=r"another (top_k: it has 4, this run 0|samples: it has 0, this run 12)"):
        TeacherCache(tmp_path / "likeliest", drawn)
    with pytest.raises(MinitronError, match="another samples: it has 12, this run 20"):
        TeacherCache(tmp_path / "drawn", dataclasses.replace(drawn, samples=20))


def test_a_cache_that_does_not_say_so_attended_to_whole_samples(tmp_path):
    """As all did before documents could be kept apart."""
    TeacherCache(tmp_path, _identity()).create()
    manifest = tmp_path / "cache.json"
    said = {k: v for k, v in json.loads(manifest.read_text()).items() if not k.startswith("reset_")}
    manifest.write_text(json.dumps(said))
    TeacherCache(tmp_path, _identity())
    with pytest.raises(MinitronError, match="another reset_position_ids: it has False, this run True"):
        TeacherCache(tmp_path, _identity(reset_position_ids=True))


@pytest.mark.parametrize(
    "name,value", [("teacher", "x"), ("data", "x"), ("tokenizer", "x"), ("top_k", 9), ("reset_attention_mask", True)]
)
def test_another_identity_is_refused_with_both(tmp_path, name, value):
    cache = TeacherCache(tmp_path, _identity())
    cache.create()
    expected = getattr(cache.identity, name)
    with pytest.raises(MinitronError, match=f"another {name}: it has {expected}, this run {value}"):
        TeacherCache(tmp_path, _identity(**{name: value}))


def test_samples_of_other_tokens_or_none_are_refused(tmp_path):
    cache = TeacherCache(tmp_path, _identity())
    tokens, answers = _answers(3, 300)
    cache.write("train", 0, [(tokens, answers)])
    with pytest.raises(MinitronError, match="train sample 1 is of other tokens"):
        cache.read("train", torch.tensor([1]), tokens[:1])
    for split, number in (("train", 3), ("train", 64), ("validation", 0)):
        with pytest.raises(MinitronError, match=f"{split} sample {number} is not in it"):
            cache.read(split, torch.tensor([number]), tokens[:1])


def test_an_empty_cache_needs_a_teacher(tmp_path):
    with pytest.raises(MinitronError, match="kd_teacher_restore_from_path"):
        TeacherCache(tmp_path / "none", _identity(teacher=None))


def test_a_foreign_file_is_refused(tmp_path):
    cache = TeacherCache(tmp_path, _identity())
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "00000000.npy", np.zeros(3))
    with pytest.raises(MinitronError, match="expected records"):
        cache.read("train", torch.tensor([0]), torch.zeros(1, LENGTH, dtype=torch.long))


def _written(folder, **changes) -> tuple[TeacherCache, torch.Tensor]:
    """A cache of three samples whose records are changed: by a value at the front of a field."""
    cache = TeacherCache(folder, _identity(300))
    cache.create()
    tokens, answers = _answers(3, 300)
    cache.write("train", 0, [(tokens, answers)])
    path = folder / "train" / "00000000.npy"
    records = np.load(path)
    for name, value in changes.items():
        records[name].flat[0] = value
    np.save(path, records)
    return TeacherCache(folder, _identity(300)), tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 300}, "sample 0: expected ids below the vocabulary's 300, found 300; remove the file"),
        ({"tokens": 65535}, "found 65535"),
        ({"log_probs": np.nan}, "probabilities that sum to 1"),
        ({"log_probs": np.inf}, "probabilities that sum to 1"),
        ({"log_probs": 3.0}, "probabilities that sum to 1"),
        ({"log_tail": np.nan}, "probabilities that sum to 1"),
        ({"log_tail": np.inf}, "probabilities that sum to 1"),
    ],
)
def test_answers_that_are_none_are_refused(tmp_path, changes, message):
    cache, tokens = _written(tmp_path, **changes)
    with pytest.raises(MinitronError, match=message) as caught:
        cache.read("train", torch.arange(3), tokens)
    assert "train/00000000.npy" in str(caught.value)
    cache.read("train", torch.tensor([1, 2]), tokens[1:])  # the others are what they were


def _resized(name, size):
    def damage(path):
        with path.open("r+b") as file:
            file.truncate(size)

    return name, damage


def _replaced(name, content):
    return name, lambda path: path.write_bytes(content)


def _claims(count):
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count},)}}\n".encode()


DAMAGE = {
    "shard cut short": (*_resized("train/00000000.npy", 300), "expected .* found"),
    "shard of nothing": (*_resized("train/00000000.npy", 0), "expected a numpy array"),
    "shard of a TB": (*_resized("train/00000000.npy", 1 << 40), "regular file of at most"),
    "shard that claims": (
        *_replaced("train/00000000.npy", b"\x93NUMPY\x01\0\x60\0" + _claims(10**12).ljust(96)),
        "expected .* values",
    ),
    "shard of JSON": (*_replaced("train/00000000.npy", b"{}" * 100), "expected a numpy array"),
    "broken JSON": (*_replaced("cache.json", b"{"), "cache.json: expected JSON"),
    "JSON list": (*_replaced("cache.json", b"[]"), "expected a JSON object"),
    "JSON twice": (*_replaced("cache.json", b'{"data": "d", "data": "d"}'), "given twice"),
    "JSON of a TB": (*_resized("cache.json", 1 << 40), "expected at most 65536 bytes"),
    "empty JSON": (*_replaced("cache.json", b"{}"), "of another teacher"),
    "long value": (*_replaced("cache.json", b'{"teacher": "' + b"x" * 9999 + b'"}'), "of another teacher"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path, case):
    name, damage, message = DAMAGE[case]
    _, tokens = _written(tmp_path)
    damage(tmp_path / name)
    with pytest.raises(MinitronError, match=message) as caught:
        TeacherCache(tmp_path, _identity(300)).read("train", torch.arange(3), tokens)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 800


def test_a_shard_of_too_many_records_is_refused(tmp_path):
    cache, tokens = _written(tmp_path)
    np.save(tmp_path / "train" / "00000000.npy", np.zeros(SHARD + 1, cache.identity.record()))
    with pytest.raises(MinitronError, match=rf"at most {SHARD} records, found an array of size \[{SHARD + 1}\]"):
        cache.read("train", torch.arange(3), tokens)
