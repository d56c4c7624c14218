"""Every value of NeMo's and Lightning's keys: applied, without effect and said so, or refused by name.

Standard library only; a config is looked at as nested mappings. What depends on the machine or the data is checked
where a training begins (``nemo_minitron.nemo.settings``, ``nemo_minitron.data.splits``).
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_minitron.errors import MinitronError, did_you_mean
from nemo_minitron.values.model import DISTRIBUTED, MODEL, SCHEDULES
from nemo_minitron.values.rules import Rule, Rules, shown
from nemo_minitron.values.trainer import AGREEMENT, EXP_MANAGER, FORWARD, MONITOR, TRAINER

TABLE: Rules = {"trainer": TRAINER, "exp_manager": EXP_MANAGER, "model": MODEL}
TRAININGS = ("finetune", "distill", "search")
FORWARD_ONLY = ("importance", "prune", "evaluate")
LOSSES = {
    "finetune": ("lm_loss",),
    "distill": ("lm_loss", "kd_loss", AGREEMENT, "hidden_loss"),
}


def check(command: str, cfg: Mapping[str, Any]) -> None:
    """Refuse the first value of a command's composed config that cannot do what it says.

    Raises:
        MinitronError: naming the key, what was expected and what was found.
    """
    if command in FORWARD_ONLY:
        _walk({name: rule for name, rule in FORWARD.items()}, cfg.get("trainer") or {}, "trainer", known_only=False)
        precision = (cfg.get("trainer") or {}).get("precision")
        if str(precision) in ("16", "16-mixed"):
            raise MinitronError(
                f"trainer.precision: expected 32 or bf16, found {shown(precision)}: only trainings scale"
            )
        return
    if command not in TRAININGS or (command == "search" and not (cfg.get("model") or {}).get("restore_from_path")):
        return
    found = {section: cfg.get(section) or {} for section in TABLE}
    if command == "search":  # its steps and data are its own
        found["trainer"] = {"max_steps": int(cfg["search"]["distill_steps"]), **found["trainer"]}
        if found["model"].get("data", {}).get("data_prefix") is None:
            found["model"] = {**found["model"], "data": {**found["model"].get("data", {}), "data_prefix": ["?"]}}
    for section, values in found.items():
        _walk(TABLE[section], values, section)
    trainer, manager, model = found["trainer"], found["exp_manager"], found["model"]
    _check_trainer(trainer)
    _check_model(model, cfg, trainer)
    _check_optim(model.get("optim") or {}, trainer["max_steps"])
    _check_logging(manager)
    validated = _check_callbacks(manager, trainer, LOSSES["finetune" if command == "finetune" else "distill"])
    if validated and "distill" in cfg:
        _known_value("distill.monitor", cfg["distill"]["monitor"], validated)


def rules(tree: Rules | None = None, prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """Every rule of the table with its full key."""
    for name, rule in (TABLE if tree is None else tree).items():
        if isinstance(rule, Rule):
            yield prefix + name, rule
        else:
            yield from rules(rule, f"{prefix}{name}.")


def _walk(tree: Rules, values: Any, prefix: str, known_only: bool = True) -> None:
    if not isinstance(values, Mapping):
        raise MinitronError(f"{prefix}: expected keys below it ({prefix}.KEY=…), found {shown(values)}")
    for name, value in values.items():
        key, rule = f"{prefix}.{name}", tree.get(str(name))
        if rule is None:
            if known_only:
                raise MinitronError(f"unknown key '{key}'.{did_you_mean(str(name), tree)}")
            continue
        if isinstance(rule, Rule):
            if (complaint := rule.complaint(value)) is not None:
                raise MinitronError(f"{key}: {complaint}")
        elif value is not None:
            _walk(rule, value, key)
    for name, rule in tree.items():
        if isinstance(rule, Rule) and rule.needed and name not in values:
            raise MinitronError(f"{prefix}.{name}: {rule.complaint(None)}")


# ------------------------------------------------------------------------------- what one key says of another


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    if (trainer.get("min_steps") or 0) > trainer["max_steps"]:
        raise MinitronError(
            f"trainer.min_steps={trainer['min_steps']} is more than trainer.max_steps={trainer['max_steps']}"
        )


def _check_model(model: Mapping[str, Any], cfg: Mapping[str, Any], trainer: Mapping[str, Any]) -> None:
    seed = cfg.get("seed")
    if seed is not None and model.get("seed") not in (None, seed):
        raise MinitronError(f"model.seed={model['seed']} disagrees with seed={seed}, which is used: set seed alone")
    precision = str(trainer.get("precision") or 32)
    if model.get("precision") is not None and _kind(model["precision"]) != _kind(precision):
        raise MinitronError(
            f"model.precision={model['precision']} disagrees with trainer.precision={precision}, which is used: set "
            "trainer.precision alone"
        )
    granularity = model.get("activations_checkpoint_granularity")
    method, layers = (model.get(f"activations_checkpoint_{name}") for name in ("method", "num_layers"))
    if granularity == "full" and (method is None or layers is None):
        raise MinitronError(
            "model.activations_checkpoint_granularity=full needs model.activations_checkpoint_method (uniform or "
            "block) and model.activations_checkpoint_num_layers"
        )
    if granularity != "full" and method is not None:
        raise MinitronError(
            f"model.activations_checkpoint_method={method} goes with model.activations_checkpoint_granularity=full, "
            f"found {shown(granularity)}"
        )


def _kind(precision: Any) -> str:
    return str(precision).partition("-")[0]


def _check_optim(optim: Mapping[str, Any], max_steps: int) -> None:
    name = optim.get("name")
    for key, value in optim.items():
        note = MODEL["optim"][key].note if isinstance(MODEL["optim"][key], Rule) else ""
        if value is None or not note.startswith("of "):
            continue
        if "distributed_fused_adam and" in note and name not in DISTRIBUTED:
            raise MinitronError(f"model.optim.{key}={shown(value)}: {note}, found model.optim.name={name}")
        if "with Apex" in note and name not in ("fused_adam", "megatron_fused_adam"):
            raise MinitronError(f"model.optim.{key}={shown(value)}: {note}, found model.optim.name={name}")
    if optim.get("amsgrad") and name not in ("adam", "adamw"):
        raise MinitronError(f"model.optim.amsgrad=true: expected model.optim.name=adam or adamw, found {name}")
    sched = optim.get("sched")
    if sched:
        _check_schedule(sched, optim["lr"], max_steps)


def schedule_arguments(sched: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``model.optim.sched`` that its schedule takes, without those that say nothing."""
    heeded = {f"{part}_{unit}" for part in SCHEDULES[sched["name"]].split() for unit in ("steps", "ratio")}
    heeded |= set(SCHEDULES[sched["name"]].split())
    return {"name": sched["name"]} | {k: v for k, v in sched.items() if k in heeded and v is not None}


_PARTS = ("warmup", "constant", "hold")


def _check_schedule(sched: Mapping[str, Any], lr: float, max_steps: int) -> None:
    name, key = sched["name"], "model.optim.sched"
    taken = schedule_arguments(sched)
    for other, value in sched.items():
        silent = other in ("name", "max_steps", "last_epoch", "monitor", "reduce_on_plateau", "min_lr")
        if value and not silent and other not in taken:
            raise MinitronError(f"{key}.{other}={shown(value)}: {name} has no such part; leave it out")
    for part in _PARTS:
        if taken.get(f"{part}_steps") and taken.get(f"{part}_ratio"):
            raise MinitronError(f"{key}.{part}_steps and {key}.{part}_ratio: give one of them")
    parts = {part: taken.get(f"{part}_steps") or int((taken.get(f"{part}_ratio") or 0) * max_steps) for part in _PARTS}
    if (parts["constant"] or parts["hold"]) and sum(parts.values()) > max_steps:
        told = " + ".join(f"{key}.{part}_steps={steps}" for part, steps in parts.items() if steps)
        raise MinitronError(f"{told}: more than trainer.max_steps={max_steps}; set them for a run of that length")
    if sched.get("max_steps") not in (None, -1, max_steps):
        raise MinitronError(
            f"{key}.max_steps={sched['max_steps']} disagrees with trainer.max_steps={max_steps}, which is used: leave "
            "it out"
        )
    low = sched.get("min_lr") or 0
    if lr < low:
        raise MinitronError(f"model.optim.lr={lr} is below {key}.min_lr={low}, which the schedule ends with; set both")


def _check_logging(manager: Mapping[str, Any]) -> None:
    if manager.get("log_local_rank_0_only") and manager.get("log_global_rank_0_only"):
        raise MinitronError(
            "exp_manager.log_local_rank_0_only and exp_manager.log_global_rank_0_only: give one of them"
        )
    if manager.get("create_wandb_logger") and not (manager.get("wandb_logger_kwargs") or {}).get("project"):
        raise MinitronError(
            "exp_manager.wandb_logger_kwargs.project: exp_manager.create_wandb_logger=true needs a project, found none"
        )
    named = (manager.get("mlflow_logger_kwargs") or {}).get("experiment_name") or manager.get("name")
    if manager.get("create_mlflow_logger") and not named:
        raise MinitronError(
            "exp_manager.mlflow_logger_kwargs.experiment_name: exp_manager.create_mlflow_logger=true needs an "
            "experiment (or exp_manager.name), found none"
        )


def _check_callbacks(manager: Mapping[str, Any], trainer: Mapping[str, Any], losses: tuple[str, ...]) -> set[str]:
    """What is logged after a validation; nothing where there is none."""
    validated = {"val_loss", *(f"val_{name}" for name in losses)}
    if trainer.get("limit_val_batches") in (0, 0.0):
        validated = set()
    trained = {"reduced_train_loss", "lr", "global_step", "consumed_samples", "tokens", "tokens_per_second"}
    trained |= {f"train_{name}" for name in losses} | ({"grad_norm"} if trainer.get("gradient_clip_val") else set())
    logged = validated | trained
    if manager.get("create_early_stopping_callback"):
        stopping, key = (
            manager.get("early_stopping_callback_params") or {},
            "exp_manager.early_stopping_callback_params",
        )
        monitor = stopping.get("monitor") or MONITOR
        _known_value(f"{key}.monitor", monitor, validated)
        _check_mode(key, monitor, stopping.get("mode") or "min")
    if manager.get("create_checkpoint_callback", True):
        _check_checkpoints(manager.get("checkpoint_callback_params") or {}, validated, logged)
    return validated


def _check_mode(key: str, monitor: str, mode: str) -> None:
    """Refuse to take the worst of a loss, or of the share of tokens on which both models agree, for the best."""
    better = "max" if monitor.endswith(AGREEMENT) else "min" if monitor.endswith("loss") else mode
    if mode != better:
        raise MinitronError(f"{key}.mode: expected {better} with {key}.monitor={monitor}, found {mode}")


def _check_checkpoints(params: Mapping[str, Any], validated: set[str], logged: set[str]) -> None:
    key = "exp_manager.checkpoint_callback_params"
    monitor, every = params.get("monitor"), params.get("every_n_train_steps")
    if validated or not str(monitor).startswith("val_"):  # without validations the last checkpoint is kept, and no best
        _known_value(f"{key}.monitor", monitor, logged)
    _check_mode(key, str(monitor), str(params.get("mode")))
    name = str(params.get("filename") or "")
    if "/" in name:
        raise MinitronError(f"{key}.filename: expected a name without folders, found {name!r}; {key}.dirpath is one")
    shown_values = set()
    try:
        for _, value, form, _ in string.Formatter().parse(name):
            if value is not None:
                shown_values.add(value)
                format(1 if value in ("step", "epoch") else 1.0, form or "")
    except ValueError as error:
        raise MinitronError(f"{key}.filename: expected {{NAME:FORMAT}} parts, found {name!r} ({error})") from None
    for value in shown_values - {"step", "epoch"} - ({"val_loss"} if not validated else set()):
        _known_value(f"{key}.filename", value, logged)
    if every:
        if params.get("every_n_epochs"):
            raise MinitronError(f"{key}.every_n_train_steps and {key}.every_n_epochs: give one of them")
        stale = next((v for v in (monitor, *sorted(shown_values)) if str(v).startswith("val_")), None)
        if stale is not None:
            where = "monitor" if stale == monitor else "filename"
            raise MinitronError(
                f"{key}.every_n_train_steps={every}: {key}.{where} has {stale}, which is not known between validations;"
                " take reduced_train_loss, or global_step with mode=max"
            )


def _known_value(key: str, value: Any, known: set[str]) -> None:
    if value not in known:
        listed = ", ".join(sorted(known)) or "nothing, as trainer.limit_val_batches is 0"
        raise MinitronError(f"{key}={value}: not logged in time; known: {listed}.{did_you_mean(str(value), known)}")
