"""Memory that is used again, and never while anything refers to it."""

import torch

from nemo_minitron.checkpoint.buffers import _KEPT, _SMALL, Buffers


def test_memory_is_used_again_once_nobody_holds_it():
    buffers = Buffers()
    first = buffers.take(2 * _SMALL)
    address = first.data_ptr()
    first.fill_(7)
    view = first.view(torch.bfloat16)[10:20]
    del first
    second = buffers.take(2 * _SMALL)
    assert second.data_ptr() != address and bool((view.view(torch.uint8) == 7).all())  # the view holds it
    array = view.view(torch.uint8).numpy()
    del view
    third = buffers.take(2 * _SMALL)
    assert third.data_ptr() not in (address, second.data_ptr()) and (array == 7).all()  # so does numpy's
    del array
    assert buffers.take(int(1.5 * _SMALL)).data_ptr() == address
    assert second.data_ptr() % 64 == 0 and address % 64 == 0


def test_what_is_kept_is_bounded():
    buffers = Buffers()
    for count in (_KEPT // 4, _KEPT // 3, _KEPT // 2, _KEPT // 8, _KEPT // 5):
        buffers.take(count)
        assert sum(array.size for array in buffers._arrays) <= _KEPT
    assert buffers.take(_KEPT).numel() == _KEPT and buffers.take(3).numel() == 3
    assert all(_SMALL <= array.size <= _KEPT // 2 for array in buffers._arrays)


def test_a_held_buffer_outlives_the_list():
    buffers = Buffers()
    held = [buffers.take(_KEPT // 3).fill_(n) for n in range(5)]
    assert [int(tensor[n]) for n, tensor in enumerate(held)] == [0, 1, 2, 3, 4]
    assert len({tensor.data_ptr() for tensor in held}) == 5
