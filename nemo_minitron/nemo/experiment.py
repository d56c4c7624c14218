"""The folder and the loggers of a run: NeMo's exp_manager, a CSV table, Weights & Biases and MLflow.

NeMo takes a W&B project of null for one and can make no MLflow logger at all (it gives ``run_name`` twice), so both are
made here from exp_manager's own keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from nemo.utils.app_state import AppState
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron import runtime
from nemo_minitron.errors import MinitronError
from nemo_minitron.nemo.metrics_log import MetricsLog
from nemo_minitron.nemo.settings import plain_kwargs

FLAGS = ("create_wandb_logger", "create_mlflow_logger")


class OneRunWandb(WandbLogger):
    """A run that ends with its training: the next one of this process is a run of its own."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


def start(trainer: Trainer, manager: DictConfig, resumed_at: int | None = None) -> Path:
    """Make the run's folder, its callbacks and its loggers, and return the folder.

    Args:
        resumed_at: the step whose rows of ``metrics.csv`` are taken again; None begins anew.

    Raises:
        MinitronError: the folder cannot be made, a value has a type that NeMo does not take, or a logger refuses.
    """
    try:
        folder = Path(exp_manager(trainer, cast(DictConfig, OmegaConf.merge(manager, dict.fromkeys(FLAGS, False)))))
    except OSError as error:
        raise MinitronError(f"exp_manager: the run's folder cannot be made: {error}") from None
    except OmegaConfBaseException as error:
        said = next(iter(str(error).splitlines()), "")
        raise MinitronError(f"exp_manager.{error.full_key}: {said}") from None
    others = _others(manager, folder, AppState().version or None)
    trainer.loggers = [*trainer.loggers, MetricsLog(folder, resumed_at), *others]
    return folder


def _others(manager: DictConfig, folder: Path, version: str | None) -> list[Logger]:
    """The loggers that ``exp_manager`` asks for, started, so that a refusal comes before a weight is read.

    Args:
        folder: of the run; where W&B keeps its files unless told otherwise.
        version: names the run.

    Raises:
        MinitronError: the service does not take the run: no login, no such server, a value that it does not know.
    """
    wandb, mlflow = (plain_kwargs(manager, f"{name}_logger_kwargs") for name in ("wandb", "mlflow"))
    wandb = {"save_dir": str(folder), "version": None if wandb.get("id") else version, **wandb}
    mlflow = {"experiment_name": manager.get("name"), "run_name": version, **mlflow}
    found: list[Logger] = []
    kinds: tuple[tuple[str, Callable[..., Any], dict[str, Any]], ...] = (
        (FLAGS[0], OneRunWandb, wandb),
        (FLAGS[1], MLFlowLogger, mlflow),
    )
    for flag, kind, arguments in kinds:
        if not manager.get(flag):
            continue
        try:
            logger = kind(**arguments)
            if runtime.rank() == 0:
                _ = logger.experiment
        except Exception as error:  # of a client of another service: its own words in one line
            said = " ".join(str(error).split()) or type(error).__name__
            raise MinitronError(f"exp_manager.{flag}=true: the run was not accepted: {said}") from None
        found.append(logger)
    return found
