"""Several processes: how they are started, that they agree with one, and that none is left waiting for a dead one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.jobs import launch
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import make_llama

ROOT = Path(__file__).parents[2]
MINITRON = [sys.executable, "-u", "-m", "nemo_minitron"]
TP2 = ["model.tensor_model_parallel_size=2"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """``evaluate`` and its keys, on a random model."""
    folder = tmp_path_factory.mktemp("tiny")
    shape = ModelShape(
        num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, kv_channels=16,
        vocab_size=300, padded_vocab_size=300, max_position_embeddings=128,
    )  # fmt: skip
    convert(make_llama(folder / "hf", shape), folder / "tiny.nemo")
    (folder / "text.txt").write_text("A rank that dies ends the whole job.\n" * 600)
    prefixes = preprocess(str(folder / "text.txt"), folder / "text", tokenizer_type=str(folder / "tiny.nemo"))
    return ["evaluate", f"model.restore_from_path={folder}/tiny.nemo", f"evaluate.data_prefix={prefixes[0]}"]


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def start(arguments: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Outputs of processes that are to end well."""
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def measured(path: Path) -> tuple[float, int]:
    metrics = json.loads(path.read_text())
    return metrics["val_loss"], metrics["tokens"]


def one_process(tiny: list[str], folder: Path) -> tuple[float, int]:
    finish(start([*MINITRON, *tiny, "evaluate.seq_length=64", f"output_path={folder}/one.json"]))
    return measured(folder / "one.json")


# --------------------------------------------------------------------------------------------------------- errors


def failure(exitcode: int, message: str | None = None, folder: Path | None = None) -> ProcessFailure:
    path = "absent"
    if message is not None and folder is not None:
        path = str(folder / "error.json")
        Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": "0"}}}))
    return ProcessFailure(local_rank=0, pid=77, exitcode=exitcode, error_file=path)


def test_explanations(tmp_path):
    def explain(**failures: ProcessFailure) -> tuple[str, int]:
        return launch.explain(ChildFailedError("minitron", {int(rank[1:]): f for rank, f in failures.items()}))

    ended = failure(-signal.SIGTERM)  # by the agent
    killed, status = explain(r1=failure(-signal.SIGKILL), r0=ended)
    assert (killed, status) == ("rank 1 (pid 77) died by SIGKILL; the job was stopped", 1)
    failed, status = explain(r0=failure(1), r1=ended)
    assert failed.startswith("rank 0 (pid 77) failed with exit status 1") and status == 1
    assert explain(r1=failure(2, "key: expected 1, found 2", tmp_path), r0=ended) == ("key: expected 1, found 2", 2)
    failed, status = explain(r1=failure(1, "a message beside another status", tmp_path), r0=ended)
    assert failed.startswith("rank 1 (pid 77) failed with exit status 1") and status == 1


def test_only_a_rank_whose_agent_reports_hands_its_error_over(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))  # plain torchrun's as well
    assert not launch.hand_over("no")
    monkeypatch.setenv(launch._REPORTING, "1")
    assert launch.hand_over("yes") and "yes" in (tmp_path / "error.json").read_text()


def test_a_users_error_on_all_ranks_is_one_line(tmp_path):
    broken = tmp_path / "broken.nemo"
    broken.write_bytes(b"no tar" * 100)  # only the ranks see it
    arguments = ["importance", f"model.restore_from_path={broken}", f"output_path={tmp_path}/scores"]
    done = subprocess.run(
        [*MINITRON, *arguments, "calibration.data_prefix=x", "trainer.devices=2"],
        env=environment(), capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    ours = [line for line in done.stderr.splitlines() if line.startswith("minitron:")]
    assert len(ours) == 1 and str(broken) in ours[0]
    assert "Traceback" not in done.stderr and "FAILED" not in done.stderr
    assert list(tmp_path.iterdir()) == [broken]


def at_work(tiny: list[str], folder: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A job of two ranks in the midst of its work, and the ranks in their order."""
    many = ["evaluate.seq_length=8", f"output_path={folder}/out.json", "trainer.devices=2"]
    job = start([*MINITRON, *tiny, *many, *TP2])
    while True:
        time.sleep(0.5)
        assert job.poll() is None, job.communicate()[0]
        found = psutil.Process(job.pid).children(recursive=True)
        ranks = sorted((rank for rank in found if "RANK" in rank.environ()), key=lambda rank: rank.environ()["RANK"])
        if ranks and all(any(c.status == "ESTABLISHED" for c in rank.net_connections("tcp")) for rank in ranks):
            time.sleep(3)  # they have met; the model is read in less
            return job, ranks


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(tiny, tmp_path):
    """Rank 1 is killed while rank 0 waits for it in a collective."""
    job, ranks = at_work(tiny, tmp_path)
    killed = time.monotonic()
    ranks[1].kill()
    output = job.communicate(timeout=60)[0]
    assert time.monotonic() - killed < 60 and job.returncode == 1
    lines = [line for line in output.splitlines() if line.startswith("minitron:")]
    assert lines == [f"minitron: rank 1 (pid {ranks[1].pid}) died by SIGKILL; the job was stopped"], output
    assert not any(rank.is_running() for rank in ranks) and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, "minitron: stopped by SIGTERM"), (signal.SIGINT, "minitron: interrupted")]
)
def test_a_signal_to_the_command_ends_all_ranks(tiny, tmp_path, number, expected):
    job, ranks = at_work(tiny, tmp_path)
    job.send_signal(number)
    output = job.communicate(timeout=60)[0]
    assert job.returncode == 128 + number and output.splitlines()[-1].startswith(expected), output
    assert not any(rank.is_running() for rank in ranks) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- launchers


@pytest.mark.slow
def test_trainer_devices_starts_them(tiny, tmp_path):
    finish(
        start(
            [*MINITRON, *tiny, "evaluate.seq_length=64", f"output_path={tmp_path}/two.json", "trainer.devices=2", *TP2]
        )
    )
    assert measured(tmp_path / "two.json") == pytest.approx(one_process(tiny, tmp_path), rel=1e-6)


@pytest.mark.slow
def test_two_machines_by_rendezvous(tiny, tmp_path):
    """Two torchrun agents, as on two machines: the command of docs/running.md."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=job", "--local-addr=127.0.0.1", "-m", "nemo_minitron",
    ]  # fmt: skip
    keys = ["evaluate.seq_length=64", f"output_path={tmp_path}/two.json", "trainer.num_nodes=2", *TP2]
    finish(*(start([*torchrun, *tiny, *keys]) for _ in range(2)))
    assert measured(tmp_path / "two.json") == pytest.approx(one_process(tiny, tmp_path), rel=1e-6)


@pytest.mark.slow
def test_the_tasks_of_a_slurm_step(tiny, tmp_path):
    """What srun sets, on two tasks; the batch script says where they meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {
        "SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "minitron-evaluate", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0",
        "SLURM_STEP_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    keys = ["evaluate.seq_length=64", f"output_path={tmp_path}/two.json", *TP2]
    tasks = [start([*MINITRON, *tiny, *keys], **step, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    finish(*tasks)
    assert measured(tmp_path / "two.json") == pytest.approx(one_process(tiny, tmp_path), rel=1e-6)
