"""Outputs under SIGKILL, full and read-only disks: whole or as before, and what was left is cleared by the next run."""

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from tqdm import tqdm

from nemo_minitron.checkpoint import NemoReader, NemoWriter, each_tensor
from nemo_minitron.config.schema import ConvertConfig
from nemo_minitron.convert import convert
from nemo_minitron.errors import MinitronError
from nemo_minitron.files import staging as module
from nemo_minitron.files.staging import Staging
from nemo_minitron.prune.choose import make_plan
from nemo_minitron.prune.cut import prune_checkpoint
from nemo_minitron.stages import convert as stage
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA


def tree(path):
    if path.is_dir():
        return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return path.read_bytes() if path.exists() else None


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def in_child(action, limit=None):
    """Start ``action`` in a fork; its exit status is 0, or 2 and a message on standard error for a MinitronError."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())  # the inherited one is shared: a child killed in it would stop all others
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        action()
        status = 0
    except MinitronError as error:
        os.write(2, f"minitron: {error}\n".encode())
        status = 2
    finally:
        os._exit(status)


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ------------------------------------------------------------------------------------------------------------ killing


class Job:
    """Something that writes ``target``, over an earlier output or over nothing."""

    def __init__(self, name, target, action, earlier):
        self.name, self.target, self.action = name, target, action
        started = time.monotonic()
        assert wait(in_child(action)) == 0
        self.seconds = time.monotonic() - started
        self.expected = tree(target)
        self.earlier = earlier

    def prepare(self, fresh):
        if self.target.is_dir():
            shutil.rmtree(self.target)
        self.target.unlink(missing_ok=True)
        if not fresh:
            copy = shutil.copytree if self.earlier.is_dir() else shutil.copy
            copy(self.earlier, self.target)
        return tree(self.target)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    sources = []
    for seed in (0, 1):
        hf = make_llama(root / f"hf{seed}", GQA, seed=seed)
        for file in hf.glob("*token*"):
            file.unlink()
        sources.append(hf)
    nemos = [convert(hf, root / f"source{seed}.nemo") for seed, hf in enumerate(sources)]
    folders = [convert(hf, root / f"source{seed}") for seed, hf in enumerate(sources)]
    with NemoReader(nemos[0]) as reader:
        config = reader.config
        plan = make_plan(GQA, None, {}, drop_layers=[2], source_fingerprint=reader.fingerprint())
        tensors = [(p, layer, reader.tensor(p, layer)) for p, layer in each_tensor(GQA)]
    out = root / "out"
    out.mkdir()

    def prune():
        with (
            NemoReader(nemos[0]) as reader,
            NemoWriter(out / "student.nemo", config, plan.target, torch.float32) as writer,
        ):
            prune_checkpoint(reader, plan, writer)

    def save():
        with NemoWriter(out / "best.nemo", config, GQA, torch.float32) as writer:
            for parameter, layer, tensor in tensors:
                writer.write(parameter, tensor, layer)

    def to(name, source, **kwargs):
        return lambda: convert(source, out / name, **kwargs)

    made = [
        Job("HF to .nemo", out / "m.nemo", to("m.nemo", sources[0], verify=True), nemos[1]),
        Job("HF to a folder", out / "folder", to("folder", sources[0]), folders[1]),
        Job(".nemo to HF", out / "hf", to("hf", nemos[0], max_shard_size="100KB"), sources[1]),
        Job("prune", out / "student.nemo", prune, nemos[1]),
        Job("checkpoint saving", out / "best.nemo", save, nemos[1]),
    ]
    for job in made:
        job.prepare(fresh=True)
    return made


def kill_at_random(jobs, count, seed):
    dice, moments = random.Random(seed), {"before": 0, "after": 0}
    for number in range(count):
        job = jobs[number % len(jobs)]
        before = job.prepare(fresh=number // len(jobs) % 2 == 0)
        pid = in_child(job.action)
        time.sleep(dice.uniform(0, 1.1 * job.seconds))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        found = tree(job.target)
        assert found in (before, job.expected), f"{job.name}, kill {number}: a destination that is neither old nor new"
        moments["before" if found == before else "after"] += 1
        assert wait(in_child(job.action)) == 0
        assert tree(job.target) == job.expected, f"{job.name}, after kill {number}"
        left = [name for name in names(job.target.parent) if name.startswith(".")]
        assert not left, f"{job.name}, kill {number}: {left}"
        job.prepare(fresh=True)
    return moments


def test_a_child_does_not_wait_for_the_bar_of_another(tmp_path):
    """As if one was killed while it drew: its lock is a semaphore of all that were forked from one process."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with tqdm.get_lock():
            held.set()
            done.wait()

    threading.Thread(target=hold).start()
    held.wait()
    with (tmp_path / "bar").open("w") as file:
        pid = in_child(lambda: list(tqdm(range(3), file=file)))
        deadline = time.monotonic() + 30
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
    done.set()
    if ended == (0, 0):
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    assert ended == (pid, 0)


def test_a_few_kills(jobs):
    kill_at_random(jobs, 12, seed=0)


@pytest.mark.slow
def test_two_hundred_kills(jobs):
    moments = kill_at_random(jobs, 200, seed=1)
    print(moments)
    assert moments["before"] >= 50  # else they came too late to tell anything


# -------------------------------------------------------------------------------------------------------- leftovers


def test_leftovers_go_and_the_living_stay(tmp_path):
    target = tmp_path / "out"
    pid = in_child(
        lambda: os.kill(Staging(target, folder=True).path.joinpath("x").write_bytes(b"x") and os.getpid(), 9)
    )
    assert wait(pid) == -9 and len(names(tmp_path)) == 1
    alive = Staging(target)  # a file this time: leftovers of both kinds are cleared
    assert names(tmp_path) == [alive.path.name]
    other = Staging(target)
    assert names(tmp_path) == sorted([alive.path.name, other.path.name])
    other.abort()
    alive.path.write_bytes(b"whole")
    alive.commit()
    assert tree(tmp_path) == {"out": b"whole"}


def test_another_machines_leftovers_wait_a_day(tmp_path):
    path = tmp_path / ".out.00000000-12345678.tmp"
    path.write_bytes(b"")
    Staging(tmp_path / "out").abort()
    assert path.exists()
    os.utime(path, (0, 0))
    Staging(tmp_path / "out").abort()
    assert not path.exists()


def test_foreign_names_and_links_are_left_alone(tmp_path):
    for name in (".out.tmp", ".out.0123.tmp", ".outer.00000000-12345678.tmp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f".out.{module._kernel()}-00000000.tmp").symlink_to(tmp_path)
    before = names(tmp_path)
    Staging(tmp_path / "out").abort()
    assert names(tmp_path) == before


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    path = tmp_path / f".out.{module._kernel()}-12345678.tmp"
    path.write_bytes(b"")
    monkeypatch.setattr(fcntl, "flock", flock)
    staging = Staging(tmp_path / "out")
    assert path.exists()
    staging.commit()
    assert (tmp_path / "out").exists()


def test_folders_are_swapped_where_the_system_cannot(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"")
    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: object())
    staging = Staging(tmp_path / "out", folder=True, replaceable=("old",))
    (staging.path / "new").write_bytes(b"")
    staging.commit()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]
    # killed between the two renames: the next run gives the old one its name back before it starts
    (tmp_path / "out").rename(tmp_path / f".out.{module._kernel()}-12345678.old")
    Staging(tmp_path / "out", folder=True, replaceable=("new",)).abort()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["new"]


# ------------------------------------------------------------------------------------------- full and read-only disks


@pytest.fixture
def mount(tmp_path):
    """Mount a tmpfs with options, where this process may."""
    mounted = []

    def make(options):
        folder = tmp_path / "mounted"
        folder.mkdir(exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("needs leave to mount a tmpfs")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def llama(tmp_path):
    return make_llama(tmp_path / "hf", GQA)


def run_stage(source, target):
    stage.run(ConvertConfig(input_name_or_path=str(source), output_path=str(target)))


@pytest.mark.parametrize("name", ["m.nemo", "folder"])
def test_a_small_disk_is_refused_before_work(name, llama, mount):
    disk, before = mount("size=64k"), tree(llama)
    with pytest.raises(MinitronError, match=r"expected room for [\d,]+ bytes, found [\d,]+ free"):
        run_stage(llama, disk / name)
    assert names(disk) == [] and tree(llama) == before


@pytest.mark.parametrize("name", ["m.nemo", "folder", "hf"])
def test_a_disk_that_fills_up(name, llama, mount, tmp_path, monkeypatch):
    source = convert(llama, tmp_path / "m.nemo") if name == "hf" else llama
    disk, before = mount("size=256k"), tree(source)
    monkeypatch.setattr(Staging, "_check_room", lambda *_: None)  # as if another process filled it meanwhile
    with pytest.raises(MinitronError, match=r"expected room to write, found: .*No space left"):
        run_stage(source, disk / name)
    assert names(disk) == [] and tree(source) == before


@pytest.mark.parametrize("name", ["m.nemo", "folder", "hf"])
@pytest.mark.parametrize("limit", [50_000, 200_000])
def test_a_limit_on_file_sizes(name, limit, llama, tmp_path, capfd):
    source = convert(llama, tmp_path / "m.nemo") if name == "hf" else llama
    out = tmp_path / "out"
    out.mkdir()
    assert wait(in_child(lambda: run_stage(source, out / name), limit=limit)) == 2
    assert "expected room to write, found: [Errno 27]" in capfd.readouterr().err
    assert names(out) == []


def test_a_read_only_disk(llama, mount):
    disk, before = mount("ro"), tree(llama)
    with pytest.raises(MinitronError, match=r"expected a writable destination, found: .*Read-only"):
        run_stage(llama, disk / "m.nemo")
    assert names(disk) == [] and tree(llama) == before
