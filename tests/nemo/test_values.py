"""Keys of ``trainer``, ``exp_manager``, ``model.optim`` and ``model.data`` in tiny trainings: what each is seen to do,
and what is refused before a weight is read."""

from __future__ import annotations

import json
import time

import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.values.model import SCHEDULES


@pytest.fixture(scope="module")
def brief(models, tmp_path_factory) -> str:
    """Prefix of many short documents: an end-of-text token in every sample, and few validation batches."""
    from nemo_minitron.data.preprocess import preprocess

    folder = tmp_path_factory.mktemp("brief")
    lines = [json.dumps({"text": f"document number {number}"}) for number in range(60)]
    (folder / "brief.jsonl").write_text("\n".join(lines))
    (prefix,) = preprocess(folder / "brief.jsonl", folder / "brief", tokenizer_type=str(models / "hf"))
    return str(prefix)


@pytest.fixture
def run(models, brief, zygote, tmp_path):
    """Run a training under further keys and return what was seen of it."""

    def run(*keys: str, command: str = "finetune", data: str | None = None) -> dict:
        prefix = brief
        data = data or f"{{train: [{prefix}], validation: [{prefix}]}}"
        given = [
            f"model.restore_from_path={models}/model.nemo",
            f"model.nemo_path={tmp_path}/out.nemo",
            f"model.data.data_prefix={data}".replace("PREFIX", prefix),
            "model.data.seq_length=32",
            f"model.data.index_mapping_dir={tmp_path}/index",
            "model.micro_batch_size=2",
            "model.global_batch_size=4",
            "trainer.max_steps=4",
            "trainer.val_check_interval=2",
            "trainer.limit_val_batches=1",
            "trainer.log_every_n_steps=1",
            "trainer.enable_progress_bar=false",
            f"exp_manager.explicit_log_dir={tmp_path}/log",
            "exp_manager.create_checkpoint_callback=false",
            *([f"model.kd_teacher_restore_from_path={models}/model.nemo"] if command == "distill" else []),
        ]
        (seen,) = zygote.run("tests.nemo.value_jobs:observed", 1, command, [*given, *keys], str(tmp_path))
        return seen

    return run


def refused(seen: dict, *said: str) -> None:
    assert seen["refused"] is not None and not seen["read"], seen
    assert all(part in seen["refused"] for part in said), seen["refused"]
    assert not any(name.endswith(".nemo") for name in seen["files"])


# --------------------------------------------------------------------------------------------------- validation


@pytest.mark.slow
def test_shares_of_validation_and_of_steps(run):
    seen = run(
        "trainer.limit_val_batches=0.5",
        "trainer.val_check_interval=0.5",
        "trainer.num_sanity_val_steps=1",
        "exp_manager.create_early_stopping_callback=true",
        "exp_manager.early_stopping_callback_params={patience: 1, min_delta: 100}",
        "trainer.max_steps=8",
        "~model.optim.sched",
    )
    assert seen["refused"] is None
    assert seen["validated"].pop(-1) == 1
    assert list(seen["validated"]) == [4, 8]  # the second is no better by 100
    (half,) = set(seen["validated"].values())
    whole = run("trainer.limit_val_batches=1.0", "trainer.max_steps=1", "trainer.val_check_interval=1")["validated"][1]
    assert half == whole // 2 > 0
    assert seen["rates"] == pytest.approx([1e-4] * 8)


def test_no_validation_and_intervals_beyond_the_run(run):
    for keys in (("trainer.limit_val_batches=0",), ("trainer.val_check_interval=100000",)):
        seen = run(*keys)
        assert (seen["validated"], len(seen["losses"]), seen["refused"]) == ({}, 4, None)
        assert {"out.nemo", "out.last.nemo"} <= set(seen["files"])


# --------------------------------------------------------------------------------------------------------- data


def test_one_prefix_with_the_default_shares_is_refused(run):
    refused(run(data="[PREFIX]"), "model.data.splits_string=98,1,1", "documents")


def test_shares_without_a_test_split_train(run):
    assert len(run("model.data.splits_string='60,40,0'", data="[PREFIX]")["losses"]) == 4


@pytest.mark.parametrize("weights", ["0, PREFIX, 1, PREFIX", "nan, PREFIX", "-1, PREFIX"])
def test_weights_that_mean_nothing_are_refused(run, weights):
    refused(run(data=f"{{train: [{weights}], validation: [PREFIX]}}"), "model.data.data_prefix.train", "above 0")


def test_blends_train_with_weights_or_without(run):
    data = "{train: [PREFIX, PREFIX], validation: [0.5, PREFIX, 0.5, PREFIX], test: [PREFIX]}"
    seen = run("trainer.max_steps=40", "trainer.val_check_interval=40", data=data)  # more than one pass over the text
    assert seen["refused"] is None and len(seen["losses"]) == 40 and seen["validated"] == {40: 1}


# ------------------------------------------------------------------------------------------ optimizer, precision


def test_warm_up_to_a_constant_end_has_no_step_without_a_rate(run):
    seen = run("model.optim.sched.constant_steps=1", "model.optim.sched.warmup_steps=2", "model.optim.name=fused_adam",
               "trainer.accelerator=gpu", "+trainer.replace_sampler_ddp=false", "trainer.precision=bf16-mixed",
               "model.data.eod_mask_loss=true")  # fmt: skip
    assert seen["rates"] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4, 1e-5])
    assert sum(seen["tokens"]) < 4 * 4 * 32  # end-of-text tokens are left out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("model.optim.sched.constant_steps=2", "model.optim.sched.min_lr=0"), "learning rate of 0"),
        (("model.optim.name=distributed_fused_adam",), "Apex"),
        (("model.optim.name=mcore_distributed_optim",), "needs a GPU"),
        (("trainer.precision=16",), "trainer.precision=16 needs a GPU"),
        (("model.optim.sched.name=NoamHoldAnnealing", "model.optim.sched.warmup_steps=0"), "without warmup steps"),
        (("exp_manager.files_to_copy=[absent.txt]",), "exp_manager.files_to_copy: no file absent.txt"),
        (("exp_manager.explicit_log_dir=/proc/none",), "exp_manager: the run's folder cannot be made"),
    ],
)
def test_what_this_machine_or_schedule_cannot_do_is_refused(run, keys, said):
    refused(run(*keys), said)


SHAPES = {
    "hold": {"hold_steps": 5},
    "constant": {"constant_steps": 5},
    "power": {"power": 2.0},
    "min_lr": {"min_lr": 1e-5},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_every_accepted_schedule_moves_at_each_step(name, warmup):
    from nemo_minitron.nemo import schedule

    asked = {"name": name, "warmup_steps": warmup}
    for part in SCHEDULES[name].split():
        asked |= SHAPES.get(part, {})
    if name == "NoamHoldAnnealing" and not warmup:
        with pytest.raises(MinitronError, match="warmup"):
            schedule.check_rates(schedule.in_nemo(asked), 1e-3, 20)
        return
    schedule.check_rates(schedule.in_nemo(asked), 1e-3, 20)
    found = [rate for _, rate in schedule.rates(schedule.in_nemo(asked), 1e-3, 20)]
    assert found[:warmup] == pytest.approx([1e-3 * (step + 1) / (warmup + 1) for step in range(warmup)])
    assert max(found) == pytest.approx(1e-3)


# --------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_by_steps_and_by_validations(run):
    seen = run(
        "exp_manager.create_checkpoint_callback=true",
        "exp_manager.checkpoint_callback_params={every_n_train_steps: 3, monitor: global_step, mode: max}",
        "exp_manager.checkpoint_callback_params.filename='at-{step}'",
    )
    assert {"log/checkpoints/at-step=3", "log/checkpoints/at-step=4-last"} <= set(seen["files"])


# ------------------------------------------------------------------------------------------------------- loggers


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    import importlib.util

    from nemo_minitron.config.compose import compose
    from nemo_minitron.nemo.settings import settle

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    keys = [f"exp_manager.create_{package}_logger=true", "exp_manager.wandb_logger_kwargs={project: p}"]
    base = ["model.restore_from_path=a", "model.nemo_path=b", "model.data.data_prefix=[c]"]
    with pytest.raises(MinitronError, match=rf"pip install 'nemo_minitron\[{package}\]'"):
        settle(compose("finetune", [*base, *keys]))


def test_offline_wandb(run, tmp_path):
    pytest.importorskip("wandb", reason="needs nemo_minitron[wandb], which the extra test has")
    seen = run(
        "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs={project: minitron, name: tiny, offline: true}",
    )
    assert seen["refused"] is None
    (written,) = tmp_path.glob("log/wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 60
    while b"val_loss" not in written.read_bytes() and time.monotonic() < deadline:  # a process of W&B's own writes it
        time.sleep(0.1)
    assert b"val_loss" in written.read_bytes() and b"minitron" in written.read_bytes()


def test_mlflow_in_a_folder(run, tmp_path):
    pytest.importorskip("mlflow", reason="needs nemo_minitron[mlflow], which the extra test has")
    seen = run(
        "exp_manager.create_mlflow_logger=true",
        f"exp_manager.mlflow_logger_kwargs={{experiment_name: minitron, tracking_uri: 'file:{tmp_path}/mlruns'}}",
    )
    assert seen["refused"] is None
    (values,) = tmp_path.glob("mlruns/*/*/metrics/val_loss")
    assert len(values.read_text().splitlines()) == 2
    assert {"reduced_train_loss", "tokens"} <= {path.name for path in values.parent.iterdir()}
