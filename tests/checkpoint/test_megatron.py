"""Megatron-Core's own loader and saver against ours, at TP 1 and 2, each rank a process over gloo."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint import NemoReader, each_tensor
from nemo_minitron.convert import convert
from nemo_minitron.synthetic import make_llama
from tests.llamas import SHAPES


def run_ranks(world: int, *args: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    root = Path(__file__).parents[2]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.megatron_rank", *args],
            cwd=root,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, outputs[0][-3000:]


@pytest.mark.parametrize(("name", "world"), [("gqa", 2), pytest.param("qkv_bias", 1, marks=pytest.mark.slow)])
def test_megatron_core_loads_ours_strictly_and_we_read_its_save(name, world, tmp_path):
    ours = convert(make_llama(tmp_path / "hf", SHAPES[name]), tmp_path / "ours")  # a folder, as Megatron wants it
    theirs = tmp_path / "theirs"
    (theirs / "model_weights").mkdir(parents=True)
    shutil.copy(ours / "model_config.yaml", theirs)
    run_ranks(world, name, str(ours / "model_weights"), str(theirs / "model_weights"))

    with NemoReader(ours) as a, NemoReader(theirs) as b:
        for parameter, layer in each_tensor(a.shape):
            assert torch.equal(a.tensor(parameter, layer), b.tensor(parameter, layer)), (parameter.key, layer)
        assert a.fingerprint() == b.fingerprint()
        assert b.checksums() is None
        keys = set(b._model.index)
        assert keys == set(a._model.index)
