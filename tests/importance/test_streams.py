"""Where streams are kept, which are made again, and that a walk gives the same bits whatever was kept."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from nemo_minitron.importance import streams as module
from nemo_minitron.importance.reconstruction import measure
from nemo_minitron.importance.streams import Streams, room
from nemo_minitron.registry import METRICS
from tests.canonical import random_model
from tests.importance.test_collect import SHAPE, TOKENS

CPU = torch.device("cpu")
SIZE = (3, 5, 7)


def limited(monkeypatch, streams: int, size: tuple[int, int, int] = SIZE) -> None:
    """Room in memory for that many streams of ``size``."""
    monkeypatch.setattr(module, "room", lambda *_, **__: streams * 4 * size[0] * size[1] * size[2])


def in_file(monkeypatch) -> Streams:
    limited(monkeypatch, 0)
    return Streams(4, SIZE, CPU)


def test_a_stream_keeps_what_was_written_in_memory_and_in_a_file(monkeypatch):
    for kept in (Streams(4, SIZE, CPU), in_file(monkeypatch)):
        with kept:
            values = torch.randn(5, *SIZE)
            for depth in range(5):
                kept[depth].copy_(values[depth])
            kept.release()
            assert all(torch.equal(kept[depth], values[depth]) for depth in range(5))


def test_a_file_is_gone_at_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with in_file(monkeypatch) as kept:
        kept[2].fill_(1.0)
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc")
def test_released_pages_of_a_file_are_not_this_processs_memory(monkeypatch):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    limited(monkeypatch, 0)
    with Streams(31, (1, 1, 1 << 18), CPU) as kept:
        before = resident()
        for depth in range(32):
            kept[depth].fill_(1.0)
        full = resident()
        kept.release()
        assert full - before > 30 << 20 and resident() - before < 8 << 20


def test_a_dropped_streams_room_serves_the_next(monkeypatch):
    with Streams(4, SIZE, CPU) as kept:
        first = kept[0].data_ptr()
        kept.drop(0)
        assert kept[3].data_ptr() == first and 0 not in kept and 3 in kept


def chosen_step(layers: int, slots: int, final: bool = False) -> int | None:
    """The step that a GPU with room for ``slots`` streams would take; None for the file."""
    kept = Streams.__new__(Streams)
    kept._layers, kept._size, kept._device = layers, SIZE, torch.device("cuda")
    kept._rooms, kept._file = {CPU: slots}, None
    step = kept._steps(final)
    if kept._file is not None:
        kept._file.close()
        return None
    return step


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 30, 32, 61])
@pytest.mark.parametrize("final", [False, True])
def test_the_streams_that_a_step_holds_at_once_have_room(layers, final):
    for slots in range(layers + 2):
        step = chosen_step(layers, slots, final)
        if slots > layers:
            assert step == layers
        elif step is not None:
            assert most_at_once(layers, step, final) <= slots
        else:
            assert all(most_at_once(layers, other, final) > slots for other in range(2, layers))


def most_at_once(layers: int, step: int, final: bool) -> int:
    """Streams alive at the worst moment of a walk, by going through it."""
    last, held, most = (layers - 1) // step * step, {0}, 1
    for layer in range(layers):
        held.add(layer + 1)
        most = max(most, len(held))
        if layer % step and layer < last:
            held.discard(layer)
    held = held if final else held - {layers}
    for layer in reversed(range(layers)):
        start = max(depth for depth in held if depth <= layer)
        held |= set(range(start, layer + 1))
        most = max(most, len(held))
        held.discard(layer)
    return most


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.parametrize("metric", ["reconstruction", "taylor"])
def test_a_walk_that_makes_streams_again_gives_the_same_bits(step, metric, monkeypatch):
    metrics = {metric: METRICS.get(metric)}
    whole, found = measure(random_model(SHAPE), TOKENS, metrics)
    monkeypatch.setattr(Streams, "_steps", lambda *_: step)
    made = []
    monkeypatch.setattr("nemo_minitron.importance.walk._Forward.again", counted(made))
    again, other = measure(random_model(SHAPE), TOKENS, metrics)
    assert made and SHAPE.num_layers > step
    for axis, worth in whole[metric].items():
        assert (again[metric][axis] == worth).all()
    if found is not None:
        assert (other.sensitivity == found.sensitivity).all() and (other.stream_moment == found.stream_moment).all()


def counted(made: list[int]):
    """``_Forward.again``, which notes the depths whose streams were not there."""
    from nemo_minitron.importance.walk import _Forward

    again = _Forward.again

    def note(self, depth: int) -> None:
        if depth not in self._streams:
            made.append(depth)
        again(self, depth)

    return note


def test_room_is_a_share_of_the_memory_that_is_left_for_each_process(monkeypatch):
    monkeypatch.setattr(module, "_memory_left", lambda: 1000)
    assert room(CPU) == 500 and room(CPU, workspace=200) == 300 and room(CPU, on_gpu=True) == 250
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert room(CPU) == 125
    monkeypatch.undo()
    assert module._memory_left() > 1 << 20
