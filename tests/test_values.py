"""Every key of NeMo's and Lightning's that is accepted, with the values they document: through, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from nemo_minitron.config import nemo_keys
from nemo_minitron.config.compose import Source, compose
from nemo_minitron.errors import MinitronError
from nemo_minitron.values.check import TABLE, check, rules
from nemo_minitron.values.model import MODEL
from nemo_minitron.values.rules import Rule

VALUES = yaml.safe_load((Path(__file__).parent / "values.yaml").read_text())
BASE = [
    "model.restore_from_path=a.nemo",
    "model.nemo_path=b.nemo",
    "model.data.data_prefix={train:[1.0,t],validation:[v]}",
]


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return OmegaConf.to_container(compose("finetune", BASE))


def cases(tree: dict[str, Any] = VALUES, prefix: str = "") -> Iterator[tuple[str, list, list]]:
    for name, below in tree.items():
        if set(below) == {"good", "bad"}:
            yield prefix + name, below["good"], below["bad"]
        else:
            yield from cases(below, f"{prefix}{name}.")


def leaves(tree: nemo_keys.Tree, prefix: str) -> Iterator[str]:
    for name, below in tree.items():
        yield from [f"{prefix}.{name}"] if below is None else leaves(below, f"{prefix}.{name}")


def outcome(plain: dict[str, Any], key: str, value: Any) -> str | None:
    """What ``check`` says of a config with this value."""
    cfg = deepcopy(plain)
    *path, last = key.split(".")
    section = cfg
    for name in path:
        section = section.setdefault(name, {})
    section[last] = value
    try:
        check("finetune", cfg)
    except MinitronError as error:
        return str(error)
    return None


ALL = {
    **{key: nemo_keys.TRAINER for key in leaves(nemo_keys.TRAINER, "trainer")},
    **{key: nemo_keys.EXP_MANAGER for key in leaves(nemo_keys.EXP_MANAGER, "exp_manager")},
    **{key: nemo_keys.MODEL for key in leaves(nemo_keys.MODEL, "model")},
}


def test_every_known_name_has_a_rule_and_documented_values():
    ruled = {key for key, _ in rules()} | {key.rpartition(".")[0] for key, _ in rules()}
    assert {key for key in ALL if not key.startswith("model.tokenizer.")} <= ruled
    walked = {key for key, _, _ in cases()}
    sections = ("trainer.", "exp_manager.", "model.optim.", "model.data.")
    assert {key for key in ALL if key.startswith(sections)} == walked


@pytest.mark.parametrize(("key", "good", "bad"), cases(), ids=lambda value: value if isinstance(value, str) else "")
def test_documented_values_go_through_or_are_refused_by_name(plain, key, good, bad):
    for value in good:
        assert outcome(plain, key, value) is None, value
    for value in bad:
        said = outcome(plain, key, value)
        assert said is not None and "\n" not in said, value
        assert key in said or (key == "exp_manager.create_wandb_logger" and "project" in said), said


def test_keys_of_model_that_are_fixed_refuse_another_value(plain):
    for name, rule in MODEL.items():
        if isinstance(rule, Rule) and rule.kind == "fixed":
            other = not rule.values[0] if rule.values and isinstance(rule.values[0], bool) else "another"
            said = outcome(plain, f"model.{name}", other)
            assert said is not None and f"model.{name}" in said and rule.note in said
            assert all(outcome(plain, f"model.{name}", value) is None for value in rule.values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.optim.sched.max_steps": 7}, "model.optim.sched.max_steps=7 disagrees with trainer.max_steps=100"),
        ({"model.seed": 7}, "model.seed=7 disagrees with seed=1234"),
        ({"model.precision": "bf16"}, "model.precision=bf16 disagrees with trainer.precision=32"),
        ({"model.activations_checkpoint_granularity": "full"}, "needs model.activations_checkpoint_method"),
        (
            {"model.activations_checkpoint_granularity": "selective", "model.activations_checkpoint_method": "uniform"},
            "goes with model.activations_checkpoint_granularity=full",
        ),
        (
            {
                "exp_manager.create_wandb_logger": True,
                "exp_manager.wandb_logger_kwargs": {"project": None, "name": "a"},
            },
            "exp_manager.wandb_logger_kwargs.project",
        ),
        (
            {"exp_manager.create_mlflow_logger": True, "exp_manager.name": None},
            "exp_manager.mlflow_logger_kwargs.experiment_name",
        ),
        (
            {"trainer.limit_val_batches": 0, "exp_manager.create_early_stopping_callback": True},
            "exp_manager.early_stopping_callback_params.monitor=val_loss: not logged",
        ),
        (
            {"exp_manager.checkpoint_callback_params.monitor": "val_kd_loss"},
            "val_kd_loss: not logged in time",  # of distillation alone
        ),
        (
            {"exp_manager.checkpoint_callback_params.mode": "max"},
            "exp_manager.checkpoint_callback_params.mode: expected min with "
            "exp_manager.checkpoint_callback_params.monitor=val_loss, found max",
        ),
        (
            {
                "exp_manager.create_early_stopping_callback": True,
                "exp_manager.early_stopping_callback_params": {"monitor": "val_lm_loss", "mode": "max"},
            },
            "exp_manager.early_stopping_callback_params.mode: expected min",
        ),
        ({"model.optim.sched.name": "WarmupAnnealing", "model.optim.sched.constant_steps": 5}, "has no such part"),
        ({"model.optim.sched.warmup_steps": 60, "model.optim.sched.constant_steps": 50}, "trainer.max_steps=100"),
    ],
)
def test_keys_that_contradict_each_other(plain, changes, said):
    cfg = deepcopy(plain)
    for key, value in changes.items():
        put(cfg, key, value)
    with pytest.raises(MinitronError) as caught:
        check("finetune", cfg)
    assert said in str(caught.value)


@pytest.mark.parametrize("command", ["distill", "search"])
def test_the_best_is_known_by_what_a_validation_measures(command):
    """A value of which more is better must not be taken for a loss, nor a step's own for a measure of a model."""
    keys = {
        "distill": [*BASE, "model.kd_teacher_restore_from_path=t.nemo"],
        "search": ["scores=s", "output_path=o", "model.restore_from_path=a.nemo", "budget.num_parameters=9"],
    }[command]
    for name in ("val_loss", "val_kd_loss", "val_top1_agreement"):
        assert compose(command, [*keys, f"distill.monitor={name}"]).distill.monitor == name
    for name in ("tokens", "lr", "train_kd_loss", "val_kd_los"):
        with pytest.raises(MinitronError, match=rf"^distill\.monitor={name}: not logged in time"):
            compose(command, [*keys, f"distill.monitor={name}"])
    compose(command, [*keys, "distill.monitor=train_kd_loss", "trainer.limit_val_batches=0"])  # nobody looks at it
    keys.append("exp_manager.create_checkpoint_callback=true")
    params = "exp_manager.checkpoint_callback_params"
    compose(command, [*keys, f"{params}.monitor=val_top1_agreement", f"{params}.mode=max"])
    with pytest.raises(MinitronError, match=rf"^{params}\.mode: expected max with .*val_top1_agreement, found min"):
        compose(command, [*keys, f"{params}.monitor=val_top1_agreement"])


@pytest.mark.parametrize(
    "asked, said",
    [
        (["distill.top_k=32"], r"distill\.top_k=32: of distill\.loss=topk alone, found forward_kl"),
        (
            ["distill.loss=topk", "distill.teacher_samples=8"],
            r"distill\.teacher_samples=8: of distill\.loss=sampled_kl",
        ),
        (["distill.loss=reverse_kl", "distill.jsd_beta=0.1"], r"distill\.jsd_beta=0\.1: of distill\.loss=jsd alone"),
        (["distill.hidden_weight=2"], r"distill\.hidden_weight=2\.0: of distill\.hidden_pairs, which are none"),
        (["distill.hidden_loss=mse"], r"distill\.hidden_loss=mse: of distill\.hidden_pairs, which are none"),
    ],
)
def test_what_the_loss_does_not_heed_is_refused(asked, said):
    keys = [*BASE, "model.kd_teacher_restore_from_path=t.nemo"]
    with pytest.raises(MinitronError, match=said):
        compose("distill", [*keys, *asked])
    heeded = ["distill.loss=topk", "distill.top_k=32", "distill.hidden_pairs=[[1,1]]", "distill.hidden_weight=2"]
    compose("distill", [*keys, *heeded])


def test_a_loss_of_ones_own_may_heed_any(tmp_path):
    file = tmp_path / "heeds.py"
    file.write_text(
        "from nemo_minitron.distill.losses.forward_kl import ForwardKL\n"
        "class Heeds(ForwardKL):\n    name = 'heeds'\nLOSS = Heeds()\n"
    )
    keys = [*BASE, "model.kd_teacher_restore_from_path=t.nemo", f"extensions=[{file}]", "distill.loss=heeds"]
    assert compose("distill", [*keys, "distill.top_k=32"]).distill.top_k == 32


def put(cfg: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        cfg = cfg[name]
    cfg[last] = value


@pytest.mark.parametrize("command", ["importance", "prune", "evaluate"])
def test_forward_commands_refuse_what_they_cannot_multiply_in(command):
    base = {"importance": ["output_path=o"], "prune": ["export.save_path=o"], "evaluate": ["output_path=o"]}[command]
    for precision, good in (("bf16", True), (32, True), (16, False), ("16-mixed", False), (64, False)):
        keys = ["model.restore_from_path=a", *base, f"trainer.precision={precision}"]
        if good:
            compose(command, keys)
        else:
            with pytest.raises(MinitronError, match=r"trainer\.precision"):
                compose(command, keys)


NEMO = """
trainer: {devices: 1, num_nodes: 1, accelerator: gpu, precision: 16, logger: false, enable_checkpointing: false,
  SAMPLER: false, max_epochs: 1000, max_steps: 100000, log_every_n_steps: 10, val_check_interval: 100,
  limit_val_batches: 50, limit_test_batches: 500, accumulate_grad_batches: 1, gradient_clip_val: 1.0, benchmark: false}
exp_manager: {explicit_log_dir: null, exp_dir: null, name: megatron_gpt, create_wandb_logger: false,
  wandb_logger_kwargs: {project: null, name: null}, resume_if_exists: true, resume_ignore_no_checkpoint: true,
  create_checkpoint_callback: true, checkpoint_callback_params: {monitor: val_loss, save_top_k: 10, mode: min,
    always_save_nemo: false, save_nemo_on_train_end: false, model_parallel_size: 1,
    filename: 'megatron_gpt--{val_loss:.2f}-{step}-{consumed_samples}'}}
model: {mcore_gpt: true, micro_batch_size: 4, global_batch_size: 8, resume_from_checkpoint: null,
  restore_from_ckpt: null, hidden_dropout: 0.0, attention_dropout: 0.0, ffn_dropout: 0.0, pre_process: true,
  apply_query_key_layer_scaling: true, headscale: false, transformer_block_type: pre_ln, openai_gelu: false,
  normalize_attention_scores: true, attention_type: multihead, overlap_p2p_comm: false, batch_p2p_comm: true,
  native_amp_init_scale: 4294967296, native_amp_growth_interval: 1000, hysteresis: 2, megatron_amp_O2: false,
  fp16_lm_cross_entropy: false, fp32_residual_connection: false, grad_allreduce_chunk_size_mb: 125, seed: 1234,
  get_attention_mask_from_fusion: true, transformer_engine: true, fp8: false, fp8_hybrid: true, use_emha: false,
  activations_checkpoint_granularity: null, activations_checkpoint_method: null, sequence_parallel: false,
  nsys_profile: {enabled: false, start_step: 10, end_step: 10, ranks: [0], gen_shape: false},
  data: {index_mapping_dir: null, data_impl: mmap, splits_string: '900,50,50', seq_length: 512, skip_warmup: true,
    num_workers: 2, dataloader_type: single, reset_position_ids: false, reset_attention_mask: false,
    eod_mask_loss: false, validation_drop_last: true, shuffle_documents: true},
  optim: {name: fused_adam, lr: 2e-4, weight_decay: 0.01, betas: [0.9, 0.98],
    sched: {name: CosineAnnealing, warmup_steps: 500, constant_steps: 50000, min_lr: 2e-5}}}
"""
"""The values of ``megatron_gpt_config.yaml`` and ``megatron_llama_distill.yaml``."""


@pytest.mark.parametrize("sampler", ["replace_sampler_ddp", "use_distributed_sampler"])
@pytest.mark.parametrize("command", ["finetune", "distill"])
def test_the_defaults_of_nemo_own_files_are_accepted(command, sampler, tmp_path):
    (tmp_path / "job.yaml").write_text(NEMO.replace("SAMPLER", sampler))
    teacher = ["model.kd_teacher_restore_from_path=t.nemo"] if command == "distill" else []
    cfg = compose(command, [*BASE, *teacher], Source(path=str(tmp_path), name="job"))
    assert cfg.model.optim.sched.constant_steps == 50000


def test_sections_of_the_table_are_those_of_a_training():
    assert set(TABLE) == {"trainer", "exp_manager", "model"}
