"""``kill -9`` of a command: whatever works for it ends too, wherever in its work it was."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.jobs import lifeline
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA

ROOT = Path(__file__).parents[2]
MINITRON = [sys.executable, "-u", "-m", "nemo_minitron"]
PATIENCE_S = 10

# Every way in which a process of ours comes to be; each child stays for ever.
FAMILY = """
import os, subprocess, sys, time
from multiprocessing import get_context
from concurrent.futures import ProcessPoolExecutor
from nemo_minitron.jobs import lifeline
from nemo_minitron import runtime

if __name__ == "__main__":
    lifeline.hold()
    runtime.prepare()
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    filesystem_async._get_write_results_queue().put(1)
    pool = ProcessPoolExecutor(2, lifeline.fork_server([]))
    [pool.submit(time.sleep, 600) for _ in range(2)]
    get_context("fork").Process(target=time.sleep, args=(600,)).start()
    rank = "from nemo_minitron.jobs.lifeline import hold as h; h(); import os, time; os.fork(); time.sleep(600)"
    with lifeline.starting():
        subprocess.Popen([sys.executable, "-c", rank])
    time.sleep(3)
    print("all there", flush=True)
    time.sleep(600)
"""


class Marked:
    """A command whose processes are found by a variable in their environment."""

    def __init__(self, arguments: list[str], *, start_new_session: bool = False) -> None:
        self.mark = f"MINITRON_TEST_MARK={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MINITRON_"))}
        environment = kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", name: value}
        self.process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=start_new_session,
        )  # fmt: skip

    def alive(self) -> list[str]:
        """``PID COMMAND`` of each process that carries the mark; the dead that nobody has waited for have lost it."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(f"{folder.name} {(folder / 'cmdline').read_bytes().replace(bytes(1), b' ').decode()}")
            except OSError:  # gone, or another user's
                continue
        return found

    def left_after_kill(self) -> list[str]:
        """Kill the first process; those that still run after :data:`PATIENCE_S`, which are then ended."""
        self.process.kill()
        self.process.wait()
        deadline = time.monotonic() + PATIENCE_S
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for line in left:
            os.kill(int(line.split()[0]), signal.SIGKILL)
        return left


def test_a_family_ends_with_its_head(tmp_path):
    script = tmp_path / "family.py"
    script.write_text(FAMILY)
    job = Marked([sys.executable, str(script)])
    try:
        assert job.process.stdout.readline() == "all there\n"
        # head, queue server, fork server, two workers, fork, rank, its fork, and multiprocessing's resource tracker
        assert len(job.alive()) == 9, job.alive()
    finally:
        left = job.left_after_kill()
    assert not left


def test_a_command_outlives_the_shell_that_started_it(tmp_path):
    """Only what works for another process is tied to it: ``nohup minitron … &`` goes on."""
    hold = "from nemo_minitron.jobs.lifeline import hold; hold()"
    code = f"{hold}; import time; time.sleep(3); print('went on', flush=True)"
    shell = ["sh", "-c", f'"{sys.executable}" -c "{code}" & sleep 1; kill -9 $$']
    assert Marked(shell).process.communicate(timeout=30)[0].endswith("went on\n")


# ----------------------------------------------------------------------------------------------------- twenty commands


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, list[str]]:
    """Command lines of long work on a random model, by name."""
    folder = tmp_path_factory.mktemp("commands")
    convert(make_llama(folder / "hf", GQA), folder / "model.nemo")
    convert(make_llama(folder / "hf7", GQA, seed=7), folder / "student.nemo")
    (folder / "text.txt").write_text("A rank that dies ends the whole job.\n" * 2000)
    (folder / "long.txt").write_text("Whatever ends a command ends all that works for it.\n" * 1_000_000)
    preprocess(str(folder / "text.txt"), folder / "text", tokenizer_type=str(folder / "model.nemo"))
    tokens = f"{folder}/text_text_document"
    training = [
        f"model.restore_from_path={folder}/student.nemo",
        f"model.data.data_prefix={{train:[1.0,{tokens}],validation:[{tokens}],test:[{tokens}]}}",
        "model.data.seq_length=64", "model.micro_batch_size=2", "model.global_batch_size=8", "trainer.max_steps=100000",
        "trainer.val_check_interval=5", "trainer.limit_val_batches=1", f"exp_manager.exp_dir={folder}/exp",
        f"model.nemo_path={folder}/out.nemo",
    ]  # fmt: skip
    distil = [*MINITRON, "distill", *training, f"model.kd_teacher_restore_from_path={folder}/model.nemo"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    return {
        "checkpoints": distil,
        "two ranks": [*distil, "trainer.devices=2", f"exp_manager.exp_dir={folder}/exp2"],
        "torchrun": [*torchrun, "nemo_minitron", *distil[len(MINITRON) :], f"exp_manager.exp_dir={folder}/exp3"],
        "recipe": [*MINITRON, "run", "recipe=tiny", f"run_dir={folder}/run"],
        "recipe on two ranks": [
            *MINITRON, "run", "recipe=tiny", f"run_dir={folder}/run2", "recipe.settings.devices=2",
            "recipe.settings.global_batch_size=32",
        ],
        "preprocess": [
            *MINITRON, "preprocess", f"input={folder}/long.txt", f"tokenizer.type={folder}/model.nemo",
            f"output_prefix={folder}/long", "workers=2",
        ],
    }  # fmt: skip


@pytest.mark.slow
def test_twenty_kills(commands, capsys):
    dice, left, counts = random.Random(20), {}, []
    for number in range(20):
        name = list(commands)[number % len(commands)]
        job = Marked(commands[name])
        moment = dice.uniform(2, 50)
        time.sleep(moment)
        counts.append(len(job.alive()))
        if found := job.left_after_kill():
            left[f"{number} {name} after {moment:.0f} s"] = found
        with capsys.disabled():
            print(f"\nkill {number}: {name}, after {moment:.1f} s, of {counts[-1]} processes {len(found)} left", end="")
    assert not left
    assert max(counts) >= 4


def test_a_fork_server_imports_without_a_word_of_torchao():
    with ProcessPoolExecutor(1, lifeline.fork_server([])) as pool:
        level = pool.submit(logging.getLogger("torchao").getEffectiveLevel).result(timeout=60)
    assert level == logging.ERROR
