"""What a ``prune`` section asks for: the part about serving."""

from __future__ import annotations

import pytest

from nemo_minitron.config.sections import Serving
from nemo_minitron.errors import MinitronError
from nemo_minitron.prune.request import check_serving
from tests.model.test_serving import LLAMA, SMOL


def test_a_student_that_an_engine_would_refuse_is_an_error_with_every_reason():
    student = LLAMA.replace(num_attention_heads=24, num_query_groups=6, ffn_hidden_size=9217)
    with pytest.raises(MinitronError) as caught:
        check_serving(LLAMA, student, Serving(tensor_parallel=8))
    assert str(caught.value) == (
        "prune.serving: the student would be refused: ffn_hidden_size 9217 does not divide over 8 GPUs; "
        "num_query_groups 6 neither divides over 8 GPUs nor they over it"
    )


def test_only_what_pruning_made_worse_is_told():
    assert check_serving(SMOL, SMOL.replace(ffn_hidden_size=1024), Serving()) == []  # rows of 576 are the source's
    (told,) = check_serving(SMOL, SMOL.replace(hidden_size=512), Serving())
    assert told.startswith("hidden_size 512 is no multiple of 9 heads: transformers 5 refuses")
    (told,) = check_serving(LLAMA, LLAMA.replace(hidden_size=2688), Serving())
    assert told.startswith("hidden_size 2688 is no multiple of 256: llama.cpp's K-quants store ")
    assert check_serving(LLAMA, LLAMA.replace(hidden_size=2688), Serving(row_multiple=128)) == []
