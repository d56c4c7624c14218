"""Faults that a test must see: one change of one file each, and the test that is to fail by it.

As a script it copies the package and the tests, and runs each test in a fork of one process that has imported torch:
once as the code is, where all must pass, and once with each of its faults. ``python tests/mutants.py [WORDS …]`` takes
the faults whose file or change has one of the words.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300
"""Of one test."""


class Mutant(NamedTuple):
    """``old``, which occurs once in ``nemo_minitron/FILE``, becomes ``new``; then ``tests/TEST`` fails."""

    file: str
    old: str
    new: str
    test: str


_CONVERT, _FUSED = "test_convert.py::", "distill/test_fused.py::"
_SPEC = "nemo/test_spec.py::"
_GATE = _CONVERT + "test_gate_and_up_are_what_transformers_makes_of_them"
_TENSOR_PARALLEL = _FUSED + "test_tensor_parallel_equals_dense"
_DECODER = "model/test_decoder.py::test_streams_and_logits_are_those_of_transformers"
_BIASES = "prune/test_resolve_biases.py::"
_LEAN = "nemo/test_lean.py::"
_GENERATE = "test_generate.py::"
_DOCTOR = "test_doctor.py::"
_CHAT, _DOCUMENTS, _PACKED = "data/test_chat.py::", "nemo/test_documents.py::", "nemo/test_packed_chats.py::"
_COUNTED = "data/test_blocks.py::test_blocks_without_a_label_that_counts_are_passed_over"
_ECHOES = "importance/test_reconstruction.py::test_echoes_rank_heads_and_groups_alone"
_PROMPTS = "importance/test_reconstruction.py::test_prompts_weigh_what_the_answers_need_of_them"
_IMPORTANCE = "test_prune.py::test_importance_counts_what_the_mask_says"
_FITTED = "prune/test_layers.py::test_only_what_counts_is_lost_and_prompts_weigh_in_the_fit_what_they_are_worth"
_REDUCED = "importance/test_reductions.py::"
_DROPPED = "prune/test_resolve.py::test_fc2_before_a_dropped_layer_weighs_tokens_by_the_stream_after_it"

MUTANTS = [
    # conversations: which tokens count, and which may attend to which
    Mutant(
        "data/chat.py",
        "if begin <= first < end]",
        "if begin <= first <= end]",
        _CHAT + "test_answers_count_under_every_template",
    ),
    Mutant(
        "data/chat.py",
        "begins = [min(first, before[1])",
        "begins = [max(first, before[1])",
        _CHAT + "test_a_token_that_begins_in_the_opening_of_a_turn_is_not_said",
    ),
    Mutant(
        "data/chat.py",
        "return last if last and ids[last - 1] in self._ends else len(ids)",
        "return len(ids)",
        _CHAT + "test_smollm2_says_its_answers_and_ends_them",
    ),
    Mutant(
        "nemo/documents.py",
        "np.concatenate(counts)[1:]",
        "np.concatenate(counts)[:-1]",
        _DOCUMENTS + "test_samples_say_which_tokens_count_and_which_document_they_are_of",
    ),
    Mutant(
        "nemo/documents.py",
        "offset = begin if place == first else 0",
        "offset = 0",
        _DOCUMENTS + "test_samples_say_which_tokens_count_and_which_document_they_are_of",
    ),
    Mutant(
        "nemo/documents.py", "& earlier)", "& earlier.t())", _DOCUMENTS + "test_attention_is_causal_within_documents"
    ),
    Mutant(
        "nemo/teacher.py",
        "hidden = model(**self._student.model_inputs(batch), hidden_only=True)",
        'hidden = model(**self._student.model_inputs(batch) | {"attention_mask": None}, hidden_only=True)',
        _PACKED + "test_packed_conversations_are_learned_from_as_if_alone",
    ),
    Mutant(
        "nemo/anywhere.py",
        "angles[self._rotary_positions.t()].squeeze(2)",
        "angles",
        _PACKED + "test_positions_restart_where_documents_are_attended_to_together",
    ),
    # calibration on conversations
    Mutant(
        "data/blocks.py",
        "_rows(mask.tokens, places, width)[:, 1:]).bool()",
        "_rows(mask.tokens, places, width)[:, :-1]).bool()",
        _COUNTED,
    ),
    Mutant(
        "data/blocks.py",
        "if mask.tokens[start : start + width][labels].any():",
        "if mask.tokens[start : start + width].any():",
        _COUNTED,
    ),
    Mutant(
        "data/calibration.py",
        "torch.ones_like(one.tokens, dtype=torch.bool) if",
        "torch.zeros_like(one.tokens, dtype=torch.bool) if",
        "data/test_conversations.py::test_calibration_knows_what_the_assistant_says",
    ),
    Mutant("model/next_token.py", "~counted[..., :-1], IGNORED", "~counted[..., 1:], IGNORED", _PROMPTS),
    Mutant(
        "importance/walk.py", "labels = next_labels(tokens, counted)", "labels = next_labels(tokens, None)", _PROMPTS
    ),
    Mutant(
        "importance/walk.py",
        "            difference[labels == IGNORED] = 0\n",
        "",
        "importance/metrics/test_taylor.py::test_worth_is_that_of_the_loss_of_tokens_that_count",
    ),
    Mutant(
        "importance/walk.py",
        "mine = [tokens.numel(), label_count(tokens, counted)]",
        "mine = [tokens.numel(), label_count(tokens, None)]",
        "importance/metrics/test_taylor.py::test_worth_is_that_of_the_loss_of_tokens_that_count",
    ),
    Mutant(
        "importance/reconstruction.py",
        "return stream_weights(stream) * loss_shares(gradient.norm(dim=-1), counted)",
        "return stream_weights(stream) * counted",
        _PROMPTS,
    ),
    Mutant(
        "importance/reconstruction.py",
        "_weights(seen.leaving, seen.leaving_gradient, seen.counted)",
        "_weights(seen.leaving, seen.leaving_gradient, None)",
        _PROMPTS,
    ),
    Mutant(
        "importance/reconstruction.py",
        "self._add(seen.entering, seen.entering_gradient, seen.counted, share)",
        "self._add(seen.entering, seen.entering_gradient, None, share)",
        _PROMPTS,
    ),
    Mutant(
        "importance/reconstruction.py",
        "flat if counted is None else flat[:, counted.reshape(-1)]",
        "flat",
        "importance/test_reconstruction.py::test_what_is_long_is_told_beside_the_tokens_that_count",
    ),
    Mutant(
        "moments.py",
        "squared.masked_fill(~counted, 0.0).sum(dim=-1",
        "squared.sum(dim=-1",
        "test_moments.py::test_tokens_that_do_not_count_weigh_what_the_loss_depends_on_them",
    ),
    Mutant(
        "importance/stream.py",
        "seen.mask[:, sample : sample + 1]",
        "seen.mask[:, :1]",
        "importance/test_stream.py::test_positions_that_count",
    ),
    Mutant(
        "importance/stream.py",
        "counted.split(at_once)[number]",
        "counted.split(at_once)[0]",
        "importance/test_stream.py::test_positions_that_count",
    ),
    Mutant(
        "importance/measure.py",
        "torch.ones(count, length, dtype=torch.bool)",
        "torch.zeros(count, length, dtype=torch.bool)",
        _IMPORTANCE,
    ),
    Mutant("importance/measure.py", "counted[: len(drawn)]", "counted[-len(drawn) :]", _IMPORTANCE),
    Mutant("nemo/scoring.py", "pair[:, 1].bool()", "pair[:, 1].bool() | True", _IMPORTANCE),
    Mutant(
        "importance/scores.py",
        'digest.update(b"counted" + ',
        'digest.copy().update(b"counted" + ',
        "importance/test_scores.py::test_what_counted_is_kept_with_the_tokens",
    ),
    Mutant(
        "importance/layer_loss.py",
        "self._labels = next_labels(tokens, counted)",
        "self._labels = next_labels(tokens, None)",
        "importance/test_layer_loss.py::test_only_labels_that_count_are_lost",
    ),
    Mutant(
        "importance/layer_loss.py",
        "weights * given[layer, sample]",
        "weights",
        "importance/test_layer_loss.py::test_stand_ins_are_fitted_to_weighted_tokens",
    ),
    Mutant("prune/layers.py", "scores.sensitivity[1::2]", "scores.sensitivity[::2]", _FITTED),
    Mutant(
        "prune/tried.py",
        "counted = torch.tensor(scores.counted)",
        "pass",
        _FITTED,
    ),
    Mutant(
        "prune/groups.py",
        ".pow(WEIGHTING)",
        "",
        "prune/test_groups.py::test_losses_are_of_all_kinds_and_the_fit_is_weighted_as_compensation_weights_it",
    ),
    Mutant(
        "prune/frame.py",
        "row.nonzero()[::every, 0] for row in counted[:solved, :-1]",
        "row.nonzero()[::every, 0] for row in counted[:solved, :-1] | True",
        "prune/test_gain.py::test_the_step_is_that_of_dense_float64",
    ),
    Mutant(
        "prune/frame.py",
        "None if counted is None else counted[:solved])",
        "None)",
        "prune/test_gain.py::test_fewer_of_those_that_count_are_evenly_spread",
    ),
    Mutant(
        "prune/guard.py",
        "frame.counted[self.first :]",
        "frame.counted[: len(self.tokens)]",
        "prune/test_guard.py::test_losses_are_those_of_tokens_that_count",
    ),
    Mutant(
        "prune/guard.py",
        "int((labels != IGNORED).sum())",
        "len(labels)",
        "prune/test_guard.py::test_losses_are_those_of_tokens_that_count",
    ),
    Mutant(
        "prune/student.py",
        "torch.tensor(scores.counted)[order]",
        "torch.tensor(scores.counted)[sorted(order)]",
        "prune/test_student.py::test_what_is_measured_is_what_the_files_lose",
    ),
    Mutant(
        "search/measure.py",
        "else scores.counted[some]",
        "else scores.counted[: len(some)]",
        "search/test_rounds.py::test_calibration_tokens_can_be_fewer",
    ),
    Mutant(
        "distill/activations.py",
        "+ run.value * run.pairs",
        "+ run.pairs",
        "nemo/test_memory.py::test_a_model_keeps_what_the_plan_says",
    ),
    # linear layers with a bias
    Mutant(
        "prune/frame.py",
        "if layout.is_norm(parameter):",
        "if parameter.axes == (layout.HIDDEN,):",
        "prune/test_resolve.py::test_turning_loses_nothing_where_the_stream_is_narrow",
    ),
    Mutant(
        "prune/resolve.py",
        "if rows and shape.qkv_bias",
        "if False",
        _BIASES + "test_first_qkv_reads_the_narrower_stream_with_an_intercept",
    ),
    Mutant(
        "prune/resolve.py",
        "student.tensors[bias.key] = self.frame.rounded(offset)",
        "student[bias].copy_(self.frame.rounded(offset))",
        _BIASES + "test_the_source_is_left_as_it_was",
    ),
    Mutant(
        "moments.py",
        "total = cross[-1] + pull * bias.to(cross)",
        "total = cross[-1]",
        _BIASES + "test_first_fc2_is_the_least_squares_with_an_intercept",
    ),
    Mutant(
        "nemo/spec.py",
        "super().__init__(*args, bias=False, **options)",
        "super().__init__(*args, bias=bias, **options)",
        _SPEC + "test_a_layer_has_the_biases_that_are_named",
    ),
    Mutant(
        "checkpoint/biases.py",
        "return every or qkv, every, every",
        "return qkv, every, every",
        "checkpoint/test_biases.py::test_bias_alone_means_every_linear_layer",
    ),
    Mutant(
        "importance/reconstruction.py",
        "ffn = around_mean(ffn) if self._job.shape.mlp_bias else ffn",
        "ffn = ffn[:-1, :-1] if self._job.shape.mlp_bias else ffn",
        "importance/test_reconstruction.py::test_a_neuron_that_always_says_the_same_goes_first_where_a_bias_can_say_it",
    ),
    # layers in Megatron-Core
    Mutant(
        "nemo/spec.py",
        "attn_mask=None if attention_mask is None else ~attention_mask",
        "attn_mask=None if attention_mask is None else attention_mask",
        _SPEC + "test_core_attention_is_a_softmax_over_what_each_token_may_see",
    ),
    Mutant(
        "nemo/spec.py",
        "is_causal=attention_mask is None and s > 1",
        "is_causal=attention_mask is None",
        _SPEC + "test_the_cache_gives_the_logits_of_one_pass",
    ),
    Mutant(
        "nemo/spec.py",
        "self.weight.sequence_parallel = config.sequence_parallel",
        "self.weight.sequence_parallel = False",
        _SPEC + "test_logits_and_gradients_equal_transformers",
    ),
    # layout and fusing
    Mutant(
        "model/layout.py",
        '(_HM + "gate_proj.weight", _HM + "up_proj.weight")',
        '(_HM + "up_proj.weight", _HM + "gate_proj.weight")',
        _GATE,
    ),
    Mutant(
        "model/layout.py",
        '(_HA + "q_proj.weight", _HA + "k_proj.weight", _HA + "v_proj.weight")',
        '(_HA + "q_proj.weight", _HA + "v_proj.weight", _HA + "k_proj.weight")',
        _CONVERT + "test_fused_qkv_is_group_major",
    ),
    Mutant(
        "checkpoint/fuse.py",
        "return torch.cat(cells, dim=1).reshape(-1, *rest)",
        "return torch.cat([c.flatten(0, 1) for c in cells]).reshape(-1, *rest)",
        _CONVERT + "test_fused_qkv_is_group_major",
    ),
    Mutant(
        "checkpoint/fuse.py",
        "cells[:, per_group : per_group + 1], cells[:, per_group + 1 :])",
        "cells[:, per_group + 1 :], cells[:, per_group : per_group + 1])",
        "checkpoint/test_gguf_write.py::test_transformers_loads_it_with_the_logits_of_the_source",
    ),
    Mutant(
        "checkpoint/fuse.py",
        "before = sum(heights[:part])",
        "before = sum(heights[part + 1 :])",
        _CONVERT + "test_fused_qkv_is_group_major",
    ),
    # the decoder
    Mutant("model/decoder.py", "return F.silu(left) * right", "return left * F.silu(right)", _DECODER),
    Mutant(
        "model/decoder.py",
        "(1 - alpha) * frequencies / scaling.factor + alpha * frequencies",
        "alpha * frequencies / scaling.factor + (1 - alpha) * frequencies",
        _DECODER,
    ),
    Mutant("model/decoder.py", "torch.cat((-high, low), dim=-1)", "torch.cat((high, -low), dim=-1)", _DECODER),
    Mutant(
        "model/decoder.py",
        "keepdim=True) + epsilon)",
        "keepdim=True))",
        "model/test_decoder.py::test_norm_of_a_small_stream_is_that_of_transformers",
    ),
    Mutant(
        "model/decoder.py",
        "y = x.float()\n",
        "y = x\n",
        "model/test_decoder.py::test_norm_in_bfloat16_is_computed_in_float32",
    ),
    Mutant(
        "model/decoder.py",
        "if change is not None:",
        "if False:",
        "model/families/test_qwen3.py::test_the_plain_decoder_computes_what_transformers_does",
    ),
    Mutant(
        "model/decoder.py",
        "return frequencies / scaling.factor",
        "return frequencies",
        "model/test_decoder.py::test_streams_and_logits_are_those_of_transformers",
    ),
    Mutant(
        "nemo/restore.py",
        "reader.shape.check_window(length,",
        "reader.shape.check_window(0,",
        "nemo/test_window.py::test_a_sequence_longer_than_the_window_is_refused",
    ),
    Mutant(
        "nemo/spec.py",
        "if self._config.finalize_model_grads_func is None:",
        "if False:",
        "nemo/test_qwen3.py::test_gradients_are_those_of_a_dense_model",
    ),
    Mutant(
        "checkpoint/gguf_rope.py",
        "wavelengths > length / low",
        "wavelengths > length / high",
        "checkpoint/test_gguf.py::test_llama3_scaling_from_its_factors",
    ),
    Mutant(
        "checkpoint/gguf_write.py",
        "permute(part, heads) if heads else part",
        "part",
        "checkpoint/test_gguf_write.py::test_transformers_loads_it_with_the_logits_of_the_source",
    ),
    Mutant(
        "checkpoint/gguf_tokenizer.py",
        '"pre_tokenizer": cutting',
        '"pre_tokenizer": PRE["gpt-2"].sections()[1]',
        "checkpoint/test_gguf_tokenizer.py::test_ids_are_those_of_the_tokenizer_that_went_in",
    ),
    Mutant(
        "checkpoint/gguf_tokenizer.py",
        "if kind in (CONTROL, USER_DEFINED, UNKNOWN)",
        "if kind == CONTROL",
        "checkpoint/test_gguf_tokenizer.py::test_ids_are_those_of_the_tokenizer_that_went_in",
    ),
    Mutant(
        "checkpoint/gguf_parts.py",
        '"split.no": number}',
        '"split.count": len(files)}',
        "checkpoint/test_gguf.py::test_parts_that_do_not_belong_together",
    ),
    Mutant(
        "checkpoint/gguf_names.py",
        "if family.gguf_permuted else 0",
        "if True else 0",
        "checkpoint/test_gguf.py::test_qwen2_equals_transformers",
    ),
    # losses
    Mutant(
        "distill/block.py",
        "return BlockLosses(tau**2 * found.distance,",
        "return BlockLosses(found.distance,",
        _FUSED + "test_one_rank_equals_dense",
    ),
    Mutant(
        "distill/block.py",
        "(mix.kd_weight * mix.temperature * weights)",
        "(mix.kd_weight * weights)",
        _FUSED + "test_one_rank_equals_dense",
    ),
    Mutant(
        "distill/block.py",
        "label.add_slope(z, plain, total, mix.lm_weight * weights)",
        "label.add_slope(z, plain, total, weights)",
        _FUSED + "test_one_rank_equals_dense",
    ),
    Mutant(
        "distill/shard.py",
        "return max(0, min(rows, self.vocab_size - self.start))",
        "return rows",
        _FUSED + "test_padding_receives_no_gradient",
    ),
    Mutant("distill/shard.py", "local = index - self.start", "local = index", _TENSOR_PARALLEL),
    Mutant(
        "distill/shard.py",
        "list(parallel.all_reduce(torch.stack(rows), self.group).double().unbind())",
        "list(torch.stack(rows).double().unbind())",
        _TENSOR_PARALLEL,
    ),
    Mutant(
        "distill/losses/jsd.py",
        "beta * of_q + (1.0 - beta) * of_p",
        "(1.0 - beta) * of_q + beta * of_p",
        _FUSED + "test_one_rank_equals_dense",
    ),
    Mutant(
        "distill/losses/topk.py",
        "kl = (log_q.exp() * (log_q - log_p)).sum(-1) + in_tail",
        "kl = (log_q.exp() * (log_q - log_p)).sum(-1)",
        _FUSED + "test_one_rank_equals_dense",
    ),
    Mutant(
        "distill/losses/sampled_kl.py",
        "column, ours, -weights)",
        "column, ours, -teacher.log_probs.exp())",
        "distill/test_sampled.py::test_what_is_learnt_from_a_draw_equals_dense",
    ),
    Mutant(
        "distill/sampled.py",
        "drawn = likely * left <= tail",
        "drawn = likely * k <= tail",
        "distill/test_sampled.py::test_weights_are_unbiased_and_sum_to_1",
    ),
    Mutant(
        "distill/memory.py",
        "moment = 4 * values",
        "moment = run.weight * values",
        "distill/test_memory.py::test_the_lean_mode_has_what_torchao_allocates",
    ),
    Mutant(
        "distill/memory.py",
        "return held + max(loss, work)",
        "return held + loss",
        "distill/test_memory.py::test_recomputation_shows_in_the_peak",
    ),
    Mutant(
        "distill/cards.py",
        "if needed > usable(card):",
        "if needed > 1.1 * usable(card):",
        "distill/test_cards.py::test_each_cell_is_the_largest_micro_batch_that_fits",
    ),
    # the lean mode's optimizer
    Mutant(
        "nemo/lean.py",
        "return rounded_stochastically(values) if dtype == torch.bfloat16 else values",
        "return values",
        _LEAN + "test_rounding_is_to_a_neighbour_and_unbiased",
    ),
    Mutant(
        "nemo/lean.py",
        "mixed = (seed * 0x9E3779B1 + step) % 2**63",
        "mixed = torch.initial_seed() + step",
        _LEAN + "test_what_is_drawn_follows_from_seed_and_step",
    ),
    Mutant(
        "nemo/lean.py",
        "(1 - beta2**step) ** 0.5",
        "1 - beta2**step",
        _LEAN + "test_the_update_is_torchaos",
    ),
    Mutant(
        "nemo/lean.py",
        "tensor.copy_(saved[name])",
        "pass",
        _LEAN + "test_what_is_drawn_follows_from_seed_and_step",
    ),
    # importance
    Mutant(
        "importance/reductions.py", "return absolute / count", "return plain.abs() / count", _REDUCED + "test_sequence"
    ),
    Mutant(
        "importance/reductions.py",
        "if mask is not None:",
        "if mask is None:",
        _REDUCED + "test_masked_tokens_do_not_count_whatever_they_hold",
    ),
    Mutant(
        "importance/reductions.py",
        "(square / samples - (plain / samples).square())",
        "(square / samples)",
        _REDUCED + "test_batch",
    ),
    Mutant(
        "importance/reductions.py",
        "runs = channels.unflatten(-1, (-1, width))",
        "runs = channels.unflatten(-1, (width, -1)).transpose(-1, -2)",
        _REDUCED + "test_heads_are_group_major_where_model_optimizer_reads_them_crosswise",
    ),
    Mutant(
        "importance/depth.py",
        "torch.diagonal(cosine, offset=1)",
        "torch.diagonal(cosine, offset=2)",
        "importance/test_stream.py::test_definitions",
    ),
    Mutant(
        "importance/reconstruction.py",
        "enumerate((seen.middle_gradient, seen.leaving_gradient))",
        "enumerate((seen.leaving_gradient, seen.middle_gradient))",
        "importance/test_reconstruction.py::test_sensitivity_is_the_gradient_of_the_loss",
    ),
    Mutant("importance/reconstruction.py", "    hears_echoes = True\n", "", _ECHOES),
    Mutant("importance/reconstruction.py", "        if seen.echo:\n            return\n", "", _ECHOES),
    Mutant(
        "importance/walk.py",
        "leaves = [] if echo else list(self._leaves.values())",
        "leaves = list(self._leaves.values())",
        "importance/test_reconstruction.py::test_echoes_leave_other_metrics_alone",
    ),
    Mutant(
        "importance/walk.py",
        "embedding + output if tied else embedding",
        "output if tied else embedding",
        "importance/metrics/test_taylor.py::test_worth_is_that_of_dense_autograd",
    ),
    Mutant(
        "importance/reductions.py",
        'sums["groups"] = cells.sum(dim=1)',
        'sums["groups"] = cells[:, : shape.heads_per_group].sum(dim=1)',
        "importance/metrics/test_taylor.py::test_worth_is_that_of_dense_autograd",
    ),
    Mutant(
        "importance/scores.py",
        'digest.update(f"tokens {self.tokens_fingerprint()}".encode())',
        'digest.update(f"token {self.tokens_fingerprint()}".encode())',
        "importance/test_scores.py::test_a_folder_of_format_1_is_read_with_the_same_meaning_and_fingerprints",
    ),
    Mutant(
        "model/next_token.py",
        "labels = tokens[..., 1:]",
        "labels = tokens[..., :-1]",
        "importance/test_layer_loss.py::test_loss_is_that_of_the_model_without_the_layers",
    ),
    Mutant(
        "importance/layer_loss.py",
        "chosen = Removed(order[:count])",
        "chosen = Removed(order[-count:])",
        "importance/test_layer_loss.py::test_leave_one_out_and_contiguous",
    ),
    Mutant(
        "model/next_token.py",
        'reduction="sum", ignore_index=IGNORED',
        'reduction="sum", ignore_index=-1',
        "model/test_next_token.py::test_sums_are_those_of_dense_float64",
    ),
    Mutant(
        "model/next_token.py",
        "rms_norm(part, norm, epsilon)",
        "rms_norm(part, None, epsilon)",
        "model/test_next_token.py::test_gradient_is_that_of_dense_float64",
    ),
    # plans
    Mutant(
        "prune/choose.py",
        'np.argsort(-worth, kind="stable")',
        'np.argsort(worth, kind="stable")',
        "prune/test_choose.py::test_each_axis_keeps_its_best",
    ),
    Mutant(
        "prune/choose.py",
        "tied = np.sort(order[at_cut])",
        "tied = np.sort(order[at_cut])[::-1]",
        "prune/test_choose.py::test_ties_keep_the_lower_index",
    ),
    Mutant(
        "prune/choose.py",
        "> TIE * np.maximum",
        "> 0 * np.maximum",
        "prune/test_choose.py::test_noise_between_equals_never_changes_the_choice",
    ),
    Mutant(
        "prune/choose.py",
        "if layer + 1 not in drop_layers",
        "if layer not in drop_layers",
        "prune/test_choose.py::test_drop_layers_counts_from_one_and_may_drop_the_last",
    ),
    Mutant(
        "prune/choose.py",
        "ffn = tuple(keep_top(worth[layer], new.ffn_hidden_size) for layer in layers)",
        "ffn = tuple(keep_top(worth[at], new.ffn_hidden_size) for at, layer in enumerate(layers))",
        "prune/test_choose.py::test_width_indices_follow_the_kept_layers",
    ),
    Mutant(
        "prune/choose.py",
        "(first,) = keep_top(-distance, 1)",
        "(first,) = keep_top(distance, 1)",
        "prune/test_choose.py::test_layers_as_one_block",
    ),
    Mutant(
        "prune/plan.py",
        "owners != [group for group in groups for _ in range(target.heads_per_group)]",
        "sorted(set(owners)) != list(groups)",
        "prune/test_plan.py::test_every_kept_group_keeps_equally_many_heads",
    ),
    # cutting
    Mutant(
        "prune/cut.py",
        "(first + heads % r, first + r, first + r + 1)",
        "(first + heads % r, first + r + 1, first + r)",
        "prune/test_cut.py::test_zeroed_heads_leave_logits",
    ),
    Mutant(
        "prune/cut.py",
        "return torch.cat((neurons, neurons + source.ffn_hidden_size))",
        "return torch.cat((neurons, neurons + len(neurons)))",
        "prune/test_cut.py::test_zeroed_neurons_leave_logits",
    ),
    Mutant(
        "prune/cut.py",
        "position = None if layer is None else plan.position(layer)",
        "position = layer",
        "prune/test_cut.py::test_dropped_layers_leave_the_others",
    ),
    # compensation
    Mutant(
        "prune/resolve.py",
        "2 * dropped.stop - 1, self.frame.ridge.ffn)",
        "2 * number + 1, self.frame.ridge.ffn)",
        _DROPPED,
    ),
    Mutant(
        "prune/resolve.py",
        "2 * dropped.stop - 1, self.frame.ridge.ffn)",
        "2 * dropped.stop - 2, self.frame.ridge.ffn)",
        _DROPPED,
    ),
    Mutant(
        "prune/resolve.py",
        "2 * dropped.stop - 1, self.frame.ridge.ffn)",
        "2 * dropped.stop - 1, self.frame.ridge.attention)",
        _DROPPED,
    ),
    Mutant(
        "prune/frame.py",
        "two_pass_moments(parts, len(self.solved), (",
        "two_pass_moments(parts, len(self.samples), (",
        "prune/test_guard.py::test_nothing_is_solved_on_what_is_held_out",
    ),
    Mutant(
        "prune/measured.py",
        "any(found.resolved > found.cut",
        "all(found.resolved > found.cut",
        "prune/test_measured.py::test_worse_on_one_kind_is_worse",
    ),
    Mutant(
        "prune/student.py",
        "dataclasses.replace(plan, compensation=None)",
        "plan",
        "prune/test_student.py::test_a_student_worse_than_a_cut_one_is_cut",
    ),
    Mutant(
        "prune/head.py",
        "gain = gain * _scale(frame, student, frame.rounded(gain), table)",
        "gain = gain / _scale(frame, student, frame.rounded(gain), table)",
        "prune/test_resolve.py::test_the_final_norm_is_scaled_to_the_least_cross_entropy",
    ),
    Mutant(
        "moments.py",
        "torch.cholesky_solve(cross + lam * prior.T.to(cross), factor)",
        "torch.cholesky_solve(cross, factor)",
        "test_moments.py::test_ridge_solution_is_that_of_the_stacked_least_squares",
    ),
    Mutant(
        "moments.py",
        "lam = ridge * moment.diagonal().mean()\n    regularised",
        "lam = ridge * moment.diagonal().sum()\n    regularised",
        "test_moments.py::test_ridge_solution_is_that_of_the_stacked_least_squares",
    ),
    Mutant(
        "moments.py",
        "second_moment(x, y, weights, other, out=cross)",
        "second_moment(x, y, None, other, out=cross)",
        "test_moments.py::test_two_passes_give_the_same_bits_in_any_order_and_those_of_dense_float64",
    ),
    Mutant(
        "prune/rotation.py",
        ".eigenvectors.flip(1)",
        ".eigenvectors",
        "prune/test_rotation.py::test_untied_basis_is_orthonormal_and_keeps_the_most_energy",
    ),
    # files
    Mutant(
        "files/staging.py",
        "            if path.is_file() or path.is_dir():\n                _sync(path)\n",
        "            pass\n",
        "test_flushed.py::test_flushed",
    ),
    Mutant(
        "files/staging.py",
        "        self.abort()\n        if isinstance(failure",
        "        if isinstance(failure",
        "test_flushed.py::test_a_small_file_that_cannot_be_written_leaves_the_earlier_one",
    ),
    Mutant(
        "files/staging.py",
        "            os.replace(self.path, self.destination)\n",
        "            shutil.copy(self.path, self.destination)\n",
        "files/test_staging.py::test_leftovers_go_and_the_living_stay",
    ),
    Mutant(
        "files/staging.py",
        "if old_enough and _is_free(lock, unknown=False):",
        "if old_enough:",
        "files/test_staging.py::test_leftovers_go_and_the_living_stay",
    ),
    Mutant(
        "checkpoint/tar.py",
        '".." in pure.parts',
        "False",
        "checkpoint/test_nemo_file.py::test_hostile_members_are_refused",
    ),
    Mutant(
        "checkpoint/tar.py",
        "if info.type not in _PLAIN or sparse:",
        "if sparse:",
        "checkpoint/test_nemo_file.py::test_hostile_members_are_refused",
    ),
    Mutant(
        "checkpoint/pickles.py",
        "if found is None:\n            raise pickle.UnpicklingError",
        "if found is None:\n            return super().find_class(module, name)\n"
        "        if found == ():\n            raise pickle.UnpicklingError",
        "checkpoint/test_nemo_file.py::test_code_in_metadata_never_runs",
    ),
    Mutant(
        "checkpoint/megatron_fields.py",
        'if fact.name != "factor" and found != fixed:',
        "if False:",
        "checkpoint/test_megatron_write.py::test_a_scaling_that_megatron_core_has_not_built_in_is_refused",
    ),
    Mutant(
        "checkpoint/megatron_write.py",
        "if there.exists() and not",
        "if False and not",
        "checkpoint/test_megatron_write.py::test_only_our_own_output_is_replaced",
    ),
    Mutant(
        "checkpoint/megatron_args.py",
        "not value if f.inverted else value",
        "value",
        "checkpoint/test_megatron_write.py::test_megatron",
    ),
    # data
    Mutant(
        "data/blocks.py",
        "width = seq_length + 1",
        "width = seq_length",
        "data/test_blocks.py::test_blocks_cut_the_stream_without_overlap_or_padding",
    ),
    Mutant(
        "data/blocks.py",
        "generator=torch.Generator().manual_seed(seed)",
        "generator=None",
        "data/test_blocks.py::test_blocks_are_shuffled_by_seed_alone",
    ),
    Mutant(
        "data/index.py",
        "if tokens != data.stat().st_size:",
        "if tokens > data.stat().st_size:",
        "data/test_index.py::test_hostile_indices",
    ),
    # shapes and search
    Mutant(
        "model/shape.py",
        "(self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels",
        "(self.num_attention_heads + self.num_query_groups) * self.kv_channels",
        "model/test_shape.py::test_parameter_counts",
    ),
    Mutant(
        "search/space.py",
        "return int(np.prod([len(sizes) for sizes in self.axes.values()]))",
        "return int(np.sum([len(sizes) for sizes in self.axes.values()]))",
        "search/test_space.py::test_blocks_hold_every_shape_once",
    ),
    Mutant(
        "search/scan.py",
        'self.costs["num_parameters"], self.loss))',
        'self.loss, self.costs["num_parameters"]))',
        "search/test_space.py::test_scan_agrees_with_one_shape_at_a_time",
    ),
    Mutant(
        "search/predict.py",
        "return self.source_loss * np.exp(damage)",
        "return self.source_loss * damage",
        "search/test_predict.py::test_a_fit_on_enough_shapes_finds_the_coefficients_and_predicts_others",
    ),
    # the command line and its processes
    Mutant(
        "cli.py",
        'print(f"minitron: {rank}{message}", file=sys.stderr)\n        return 2',
        'print(f"minitron: {rank}{message}", file=sys.stderr)\n        return 1',
        "test_cli.py::test_user_errors_are_one_line_and_status_2",
    ),
    Mutant(
        "jobs/interruption.py",
        "class Interrupted(SystemExit)",
        "class Interrupted(KeyboardInterrupt)",
        "jobs/test_interruption.py::test_ctrl_c_unwinds_a_command_and_says_how_to_go_on",
    ),
    Mutant(
        "jobs/interruption.py", "path.stat().st_mtime >= since", "True", "jobs/test_interruption.py::test_how_to_go_on"
    ),
    Mutant(
        "jobs/launch.py",
        "failure.exitcode == 2 and isinstance(message, dict)",
        "isinstance(message, dict)",
        "jobs/test_launch.py::test_explanations",
    ),
    Mutant(
        "jobs/lifeline.py",
        "        os.register_at_fork(after_in_child=_hold_fork)\n",
        "        pass\n",
        "jobs/test_lifeline.py::test_a_family_ends_with_its_head",
    ),
    # talking to a model
    Mutant(
        "generate/talker.py",
        "min(self._words.room, self._words.positions - len(ids))",
        "self._words.room",
        _GENERATE + "test_an_answer_ends_where_the_positions_do",
    ),
    Mutant(
        "generate/talker.py",
        "ends = [*(theirs if isinstance(theirs, list) else [theirs]), ",
        "ends = [",
        _GENERATE + "test_any_end_that_the_model_names_ends_a_text",
    ),
    Mutant(
        "generate/talker.py",
        "older_reads(reader.hf_config, rope)",
        "True",
        _GENERATE + "test_a_rope_that_transformers_4_does_not_find_is_followed",
    ),
    Mutant(
        "generate/talker.py",
        "print(plain(text),",
        "print(text,",
        _GENERATE + "test_what_a_model_says_does_nothing_to_the_terminal",
    ),
    Mutant(
        "generate/chat.py",
        "history = history[2:]",
        "history = history[-1:]",
        _GENERATE + "test_a_chat_forgets_what_no_longer_fits",
    ),
    Mutant(
        "generate/batch.py",
        "[0] * (width - len(prompt)) + [1] * len(prompt)",
        "[1] * width",
        "test_generate_batch.py::test_each_ends_by_its_own_end_or_room",
    ),
    Mutant(
        "generate/batch.py",
        "[prompt[0]] *",
        "[0] *",
        "test_generate_batch.py::test_a_penalty_for_repetition_does_not_see_the_padding",
    ),
    Mutant(
        "generate/batch.py",
        "for number in numbers]",
        "for number in range(len(numbers))]",
        "test_generate_batch.py::test_what_is_drawn_does_not_depend_on_the_batch",
    ),
    Mutant(
        "generate/talker.py",
        "row[width:][:room]",
        "row[width:]",
        "test_generate_batch.py::test_each_ends_by_its_own_end_or_room",
    ),
    # the page on the machine
    Mutant(
        "doctor/page.py",
        "    said = _PATH.sub(_file, said)\n",
        "",
        _DOCTOR + "test_the_json_says_the_same_without_paths_and_names",
    ),
    Mutant(
        "doctor/page.py",
        'f"…/{name}" if "." in name[1:] else "…"',
        'f"…/{name}"',
        _DOCTOR + "test_the_json_says_the_same_without_paths_and_names",
    ),
    Mutant(
        "doctor/probe.py",
        "except BaseException as error:",
        "except Exception as error:",
        _DOCTOR + "test_what_an_import_does_stays_in_its_process",
    ),
    Mutant(
        "doctor/versions.py",
        "contains(version, prereleases=True)",
        "contains(version)",
        _DOCTOR + "test_local_and_early_versions_are_compared",
    ),
    Mutant(
        "files/staging.py",
        "return _is_free(held, unknown=False) and not _is_free(other, unknown=True)",
        "return _is_free(held, unknown=False)",
        _DOCTOR + "test_locks",
    ),
    Mutant(
        "recipe/records.py",
        "inputs |= {path: self.content(path) for path in named_inputs(stage)}",
        "pass",
        "test_recipe.py::test_what_a_configuration_names_decides_as_inputs_do",
    ),
    Mutant(
        "recipe/stage.py",
        "return [stage for stage in stages.values() if cfg.stages is None or stage.name in cfg.stages]",
        "return list(stages.values()) if cfg.stages is None else [stages[name] for name in cfg.stages]",
        "test_recipe.py::test_chosen_stages_run_in_the_order_of_the_recipe",
    ),
    Mutant(
        "recipe/walk.py",
        "if writer in old and os.path.isfile(path):",
        "if writer is None:",
        "test_recipe.py::test_an_evaluation_of_other_settings_is_compared_with_nothing",
    ),
    Mutant(
        "nemo/run_record.py",
        "return bool(one != other)",
        "return False",
        "nemo/test_run_record.py::test_a_cache_stands_for_its_own_teacher_alone",
    ),
    Mutant(
        "distill/cache.py",
        'or (name == "architecture" and found[name] is None)',
        'or name == "architecture"',
        "distill/test_cache.py::test_the_same_weights_in_another_architecture_are_another_teacher",
    ),
    Mutant(
        "checkpoint/canonical.py",
        "found = None if table or known is None else known.get(name)",
        "found = None if known is None else known.get(name)",
        "nemo/test_run_record.py::test_the_trusted_fingerprint_is_that_of_all_tensors",
    ),
    Mutant(
        "config/unheeded.py",
        "if one.holds(cfg):",
        "if True:",
        "config/test_unheeded.py::test_a_key_at_its_default_says_nothing",
    ),
]


def main(words: list[str]) -> int:
    """Print each fault that no test sees, and how many; the exit status says whether there are any."""
    chosen = [m for m in MUTANTS if not words or any(word in m.file + m.old + m.new for word in words)]
    if "SHARD" in os.environ:  # 0/3 is every third, from the first
        first, step = map(int, os.environ["SHARD"].split("/"))
        chosen = chosen[first::step]
    started, troubles, survivors = time.monotonic(), [], []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        for name in ("nemo_minitron", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "setup.py", "README.md", "docs", "conf", "tutorials"):
            (copy / name).symlink_to(ROOT / name)
        import numpy  # noqa: F401
        import pytest  # noqa: F401
        import torch
        import transformers  # noqa: F401

        torch.set_num_threads(1)
        if (code := _run(copy, *sorted({m.test for m in chosen}))) != 0:
            troubles.append(f"where nothing is changed, the tests end with {code}")
        for number, mutant in enumerate(chosen):
            path = copy / "nemo_minitron" / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                troubles.append(f"{mutant.file} has {text.count(mutant.old)} times {mutant.old!r}")
                continue
            path.write_text(text.replace(mutant.old, mutant.new))
            code = _run(copy, mutant.test)
            path.write_text(text)
            print(f"{number + 1}/{len(chosen)} {mutant.file}: {_VERDICTS.get(code, f'ends with {code}')}", flush=True)
            if code == 0:
                survivors.append(mutant)
            elif code not in _VERDICTS:
                troubles.append(f"{mutant} ends with {code}")
    for line in (*troubles, *(f"survived: {mutant}" for mutant in survivors)):
        print(line)
    print(f"{len(chosen)} mutants in {time.monotonic() - started:.0f} s, troubles: {len(troubles)}")
    print(f"survivors: {len(survivors)}")
    return 1 if survivors or troubles else 0


_VERDICTS = {0: "survives", 1: "is seen", -signal.SIGKILL: "is seen: it hangs"}


def _run(copy: Path, *tests: str) -> int:
    """Exit status of pytest, from a fork that has not imported the package yet."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            os.chdir(copy)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            sys.path[:0] = [str(copy)]
            os.environ["PYTHONPATH"] = str(copy)
            sys.dont_write_bytecode = True
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + TIMEOUT_S * len(tests)
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])


if __name__ == "__main__":
    sys.path = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests")]
    sys.exit(main(sys.argv[1:]))
