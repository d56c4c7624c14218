"""What NeMo and Lightning are given of a training's checked config: what the machine has, and what they would take
otherwise than their documentation says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_minitron import runtime
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo import schedule
from nemo_minitron.values.check import schedule_arguments
from nemo_minitron.values.model import LEAN
from nemo_minitron.values.rules import Rule
from nemo_minitron.values.trainer import EXP_MANAGER, TRAINER

APEX = {"fused_adam": None, "megatron_fused_adam": "fused_adam", "distributed_fused_adam": "mcore_distributed_optim"}
"""Optimizers of Apex, and what to take instead where it is missing; ``fused_adam`` has torch's as its equal."""


def settle(cfg: DictConfig) -> DictConfig:
    """A copy of a training's config in which every value stands as NeMo and Lightning need it to mean what it says.

    Raises:
        MinitronError: this machine lacks what a value asks for, or the schedule has a step without a learning rate.
    """
    cfg = cast(DictConfig, OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
    with open_dict(cfg):
        _trainer(cfg.trainer)
        _optimizer(cfg.model, int(cfg.trainer.max_steps))
        _lean(cfg.model, str(cfg.trainer.get("precision") or 32))
        cfg.exp_manager = cfg.get("exp_manager") or {}
        _experiment(cfg.exp_manager)
    return cfg


def _trainer(trainer: DictConfig) -> None:
    if runtime.has_cuda() and trainer.get("accelerator") == "cpu":
        raise MinitronError(
            "trainer.accelerator=cpu: this machine has a GPU, which is used; hide it with CUDA_VISIBLE_DEVICES="
        )
    if not runtime.has_cuda() and trainer.get("accelerator") in ("gpu", "cuda"):
        note(f"trainer.accelerator={trainer.accelerator}: there is no GPU here, so the CPU is used")
    if not runtime.has_cuda() and str(trainer.get("precision")) in ("16", "16-mixed"):
        raise MinitronError(
            f"trainer.precision={trainer.precision} needs a GPU, whose gradient scaler it relies on: take bf16 or 32"
        )
    for name in list(trainer):
        rule = TRAINER.get(str(name))
        if trainer[name] is None or (isinstance(rule, Rule) and rule.kind != "applied"):
            del trainer[name]  # what is done in any case is told to Lightning by ``build_trainer``
    trainer.max_epochs = -1
    trainer.limit_test_batches = 0
    interval = trainer.get("val_check_interval", 1.0)
    if isinstance(interval, float):
        interval = max(1, int(interval * trainer.max_steps))
    trainer.val_check_interval = interval
    if interval > trainer.max_steps and trainer.get("limit_val_batches", 1.0):
        trainer.check_val_every_n_epoch = None  # else Lightning may refuse an interval that is never reached
        note(f"trainer.val_check_interval={interval} is more than trainer.max_steps={trainer.max_steps}: no validation")


def _optimizer(model: DictConfig, max_steps: int) -> None:
    optim = model.optim
    if optim.name in APEX and importlib.util.find_spec("apex") is None:
        if APEX[optim.name] is not None or optim.get("master_weights") or optim.get("capturable"):
            other = APEX[optim.name] or "adamw"
            raise MinitronError(f"model.optim.name={optim.name} needs Apex, which is not installed; take {other}")
        optim.name = "adamw"
        for key in ("master_weights", "capturable"):
            optim.pop(key, None)
        note("model.optim.name=fused_adam: there is no Apex here, so torch's adamw takes the same steps")
    if optim.name not in ("adam", "adamw", LEAN) and not runtime.has_cuda():
        raise MinitronError(f"model.optim.name={optim.name} needs a GPU; take adamw")
    for key in [key for key in optim if optim[key] is None]:
        del optim[key]
    if "sched" not in optim:
        return
    asked = schedule_arguments(optim.sched)
    optim.sched = schedule.in_nemo(asked)
    schedule.check_rates(optim.sched, float(optim.lr), max_steps)
    warmup = asked.get("warmup_steps") or 0
    if warmup >= max_steps > 2:
        note(f"model.optim.sched.warmup_steps={warmup} of trainer.max_steps={max_steps}: model.optim.lr is not reached")


def _lean(model: DictConfig, precision: str) -> None:
    """What ``adamw_8bit`` needs, and what it cannot go with."""
    if model.optim.name != LEAN:
        return
    if importlib.util.find_spec("torchao") is None:
        raise MinitronError(
            f"model.optim.name={LEAN} needs the package torchao; install it with: pip install 'nemo_minitron[lean]'"
        )
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if (model.get(key) or 1) != 1:
            raise MinitronError(
                f"model.optim.name={LEAN} needs model.{key}=1, found {model[key]}: the scales of its moments are not "
                "split; take mcore_distributed_optim"
            )
    if precision.startswith("16"):
        raise MinitronError(
            f"model.optim.name={LEAN} rounds to bf16, and found trainer.precision={precision}: take bf16 or 32"
        )
    if model.get("megatron_amp_O2") and not precision.startswith("bf16"):
        model.megatron_amp_O2 = False
        note(f"model.megatron_amp_O2=true: weights are float32 with trainer.precision={precision}")


def _experiment(manager: DictConfig) -> None:
    if manager.get("explicit_log_dir") is not None:
        manager.exp_dir = manager.version = None  # NeMo would say in an error that it does not heed them
    for flag, package in (("create_wandb_logger", "wandb"), ("create_mlflow_logger", "mlflow")):
        if manager.get(flag) and importlib.util.find_spec(package) is None:
            raise MinitronError(
                f"exp_manager.{flag}=true needs the package {package}; install it with: "
                f"pip install 'nemo_minitron[{package}]'"
            )
    for file in manager.get("files_to_copy") or []:
        if not Path(file).is_file():
            raise MinitronError(f"exp_manager.files_to_copy: no file {file}")
    for name in list(manager):
        rule = EXP_MANAGER.get(str(name))
        if isinstance(rule, Rule) and rule.kind == "neutral":
            del manager[name]
    params = manager.setdefault("checkpoint_callback_params", {})
    params.update(save_nemo_on_train_end=False, always_save_nemo=False, save_best_model=False)
    if params.get("every_n_train_steps"):
        params.every_n_epochs = 0  # NeMo's own default clashes with it
    if manager.get("create_early_stopping_callback"):
        manager.setdefault("early_stopping_callback_params", {}).check_on_train_epoch_end = False


def note(text: str) -> None:
    """Say on the first rank what is done otherwise than one may expect."""
    if runtime.rank() == 0:
        print(f"note: {text}", file=sys.stderr)


def plain_kwargs(manager: Any, name: str) -> dict[str, Any]:
    """Keyword arguments below ``exp_manager.NAME`` that have a value."""
    found = cast(dict, OmegaConf.to_container(manager)).get(name) or {}
    return {key: value for key, value in found.items() if value is not None}
