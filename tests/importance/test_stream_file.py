"""A tensor in a file: what was written is there after its pages were handed back."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from nemo_minitron.importance.stream_file import StreamFile


def test_content_outlives_a_release(tmp_path):
    file = StreamFile(tmp_path / "streams", (3, 5, 7))
    assert file.tensor.abs().max() == 0
    values = torch.randn(3, 5, 7)
    file.tensor.copy_(values)
    file.release()
    assert torch.equal(file.tensor, values)
    file.tensor[1] = 1.0
    file.release()
    values[1] = 1.0
    assert torch.equal(file.tensor, values)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc")
def test_released_pages_are_not_this_processs_memory(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    file = StreamFile(tmp_path / "streams", (32, 1 << 18))
    before = resident()
    file.tensor.fill_(1.0)
    full = resident()
    file.release()
    assert full - before > 30 << 20 and resident() - before < 8 << 20
