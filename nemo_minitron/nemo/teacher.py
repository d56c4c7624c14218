"""A frozen teacher on the student's grid, and its answers written to a cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from nemo.utils import AppState
from torch import Tensor

from nemo_minitron import parallel, runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.config.keys import SEED
from nemo_minitron.distill.cache import SHARD, TeacherCache
from nemo_minitron.distill.fused import Head, head_samples, head_top_k
from nemo_minitron.distill.hidden import outputs_of
from nemo_minitron.distill.sampled import uniforms
from nemo_minitron.jobs.progress import progress_bar
from nemo_minitron.nemo import vocabulary
from nemo_minitron.nemo.anywhere import HeadlessGPT
from nemo_minitron.nemo.model import MinitronGPTModel
from nemo_minitron.nemo.restore import load_model

SHARED_WITH_STUDENT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "sequence_parallel",
    "micro_batch_size",
    "encoder_seq_length",
    "precision",
    "megatron_amp_O2",
    "transformer_engine",
    "seed",
    "optim",
)


class Teacher:
    """Runs forward only, with the RoPE scaling, norms and epsilon of its own checkpoint.

    It has no gradients, no optimizer state and no DDP buffers, and is no submodule of the student, so neither
    checkpoints nor ``.to()`` see it. Where the student's TP does not divide the teacher's groups or heads, it runs
    whole on each tensor-parallel rank (its memory and time are then not shared out); layers go over pipeline stages
    unequally where they must.

    Raises:
        MinitronError: vocabularies or tokenizers differ from the student's.
    """

    def __init__(self, path: str | Path, student: MinitronGPTModel) -> None:
        self._student = student
        self._grid: Callable[[], AbstractContextManager[None]] = nullcontext
        run = {key: student.cfg[key] for key in SHARED_WITH_STUDENT if key in student.cfg} | {"global_batch_size": 0}
        with NemoReader(path) as reader:
            shape = reader.shape
            if reader.tokenizer_folder() is None:
                run["tokenizer"] = {"type": str(student.tokenizer_folder)}
        if not shape.splits_over(student.cfg.get("tensor_model_parallel_size", 1) or 1):
            # its heads or groups do not divide over the student's ranks
            self._grid = runtime.whole_on_each_rank
            run |= {"tensor_model_parallel_size": 1, "sequence_parallel": False}
        with self._grid(), _own_app_state():
            model = load_model(path, student.trainer, run)
        vocabulary.check_sizes(model.true_vocab_size, student.true_vocab_size)
        vocabulary.check_tokenizers(model.tokenizer, student.tokenizer)
        self.shape = model.shape
        self._module: HeadlessGPT
        (self._module,) = model.get_model_module_list()
        self._module.requires_grad_(False).eval()
        self._found: deque[tuple[Tensor, dict[int, Tensor]]] = deque()

    @torch.no_grad()
    def run(self, batches: list[dict[str, Tensor]], layers: Sequence[int] = ()) -> None:
        """Run forward over the step's micro-batches; keep final hidden states and outputs of ``layers`` (1-indexed).

        Documents that the student's attention keeps apart are apart here too, and positions are the same.

        Megatron's own schedule, forward only: under pipeline parallelism the last stage ends up with one
        ``[s, b, H_t]`` per micro-batch (``[s/tp, b, H_t]`` with sequence parallel), never with logits, and the
        student's schedule then runs as it always does.
        """
        self._found.clear()
        kept: list[dict[int, Tensor]] = []

        def forward_step(iterator: Iterator, model: HeadlessGPT) -> tuple[Tensor, Any]:
            batch = next(iterator)
            with outputs_of(model.decoder.layers, layers) as outputs:
                hidden = model(**self._student.model_inputs(batch), hidden_only=True)
            kept.append(outputs)
            return hidden, lambda output, non_loss_data: output

        with self._grid():
            hidden = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(batches),
                model=self._module,
                num_microbatches=len(batches),
                seq_length=batches[0]["tokens"].shape[1],
                micro_batch_size=batches[0]["tokens"].shape[0],
                forward_only=True,
                collect_non_loss_data=True,
            )
        self._found.extend(zip(hidden, kept, strict=False))  # earlier stages have no hidden states

    def next_head(self) -> tuple[Head, dict[int, Tensor]]:
        """Final hidden states of the next micro-batch with the output weight, and outputs of layers (last stage).

        Of a teacher that is whole on each rank, this rank's rows of the vocabulary only; its table may end before the
        student's padding does.
        """
        hidden, layers = self._found.popleft()
        head = self._module.head(hidden)
        if self._grid is not nullcontext:
            student = self._student
            head = Head(hidden, head.weight[student.vocab_start : student.vocab_start + student.vocab_part])
        return head, layers

    def layer_outputs(self) -> list[dict[int, Tensor]]:
        """Outputs of layers for all micro-batches of the step; they stay for :meth:`next_head`."""
        return [layers for _, layers in self._found]

    def fill(self, cache: TeacherCache, split: str, dataset: Any, samples: int, micro_batch_size: int) -> None:
        """Write the shards that ``cache`` lacks for the first ``samples`` samples of ``dataset``.

        Data-parallel ranks take shards in turns. A shard is always made of the same micro-batches, so that a killed
        and resumed run writes the same bytes.
        """
        group = parallel_state.get_data_parallel_group()
        rank, ranks = torch.distributed.get_rank(group), parallel.size(group)
        missing = cache.missing(split, samples)
        parallel.barrier()  # all ranks look before one of them writes
        first = torch.distributed.get_rank() == 0
        with progress_bar(len(missing) * SHARD, f"teacher, {split}", "sample", show=first) as bar:
            for turn in range(-(-len(missing) // ranks)):
                mine = missing[turn * ranks + rank : turn * ranks + rank + 1]
                for number in mine:
                    self._fill_shard(cache, split, number, dataset, micro_batch_size)
                bar.update(min(SHARD * ranks, bar.total - bar.done))

    def _fill_shard(self, cache: TeacherCache, split: str, number: int, dataset: Any, micro_batch_size: int) -> None:
        """All ranks of one data-parallel replica together; the first tensor-parallel rank of the last stage writes."""
        numbers = range(number * SHARD, min((number + 1) * SHARD, len(dataset)))
        answers = []
        for start in range(numbers.start, numbers.stop, micro_batch_size):
            these = range(start, min(start + micro_batch_size, numbers.stop))
            samples = [dataset[i] for i in these]
            batch = {
                key: torch.stack([sample[key] for sample in samples]).to(runtime.device())
                for key in ("tokens", "position_ids", "documents")
                if key in samples[0]
            }
            self.run([batch])
            if parallel_state.is_pipeline_last_stage():
                answers.append((batch["tokens"], self._answer(cache, split, these)))
        if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
            cache.write(split, number, answers)

    def _answer(self, cache: TeacherCache, split: str, numbers: range) -> Any:
        """What a cache keeps of these samples; random numbers are those of the samples' numbers in the split."""
        student, identity = self._student, cache.identity
        head, _ = self.next_head()
        hidden = head.hidden
        if hidden.shape[0] != identity.seq_length:
            hidden = parallel.all_gather(hidden, student.tensor_parallel_group)
        head, place, tau = Head(hidden, head.weight), student.head_place(), identity.temperature
        with student.autocast():
            if not identity.samples:
                return head_top_k(head, identity.top_k, tau, **place)
            seed = int(student.cfg.get("seed") or SEED)
            drawn = torch.stack([uniforms(seed, split, number, identity.seq_length) for number in numbers])
            return head_samples(head, identity.samples, tau, drawn, **place)


@contextmanager
def _own_app_state() -> Iterator[None]:
    """Keep what NeMo remembers of the student's grid and step while another model is built."""
    state = AppState()
    before = dict(state.__dict__)
    try:
        yield
    finally:
        state.__dict__.update(before)
