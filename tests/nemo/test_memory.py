"""The memory plan against what a model keeps for backward, and against measured runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.distill.memory import Run, layer_activations
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.synthetic import make_llama


def test_a_layer_keeps_what_the_plan_says(pair, trainer):
    """Storages that autograd saves in the decoder, without parameters; the final norm and small tables are the rest."""
    from nemo_minitron.nemo.restore import load_model

    _, nemo, shape = pair
    (module,) = load_model(nemo, trainer).get_model_module_list()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def save(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    tokens = torch.randint(0, shape.vocab_size, (2, 64))
    positions = torch.arange(64).expand(2, -1)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        hidden = module(input_ids=tokens, position_ids=positions, attention_mask=None, hidden_only=True)
    run = Run(shape, None, seq_length=64, micro_batch_size=2, micro_batches=1)
    expected = shape.num_layers * layer_activations(shape, run) + 4 * 3 * 128 * shape.hidden_size
    assert hidden.requires_grad
    assert sum(kept.values()) == pytest.approx(expected, rel=0.1)


# (seq_length, micro-batch, global batch) for three runs of different make: many tokens, many weights, accumulation
MEASURED = {
    "activations": ("narrow", 512, 8, 8),
    "weights": ("wide", 64, 1, 2),
    "accumulation": ("narrow", 256, 8, 16),
}
SHAPES = {
    "narrow": ModelShape(8, 256, 1024, 8, 4, 32, 8000, 8064, True, 10000.0, None, 512),
    "wide": ModelShape(6, 1024, 3072, 16, 4, 64, 8000, 8064, False, 10000.0, None, 512),
}


@pytest.fixture(scope="module", params=list(MEASURED))
def journey(request, tmp_path_factory):
    name, *sizes = MEASURED[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_llama(folder / "hf", SHAPES[name], seed=1)
    convert(folder / "hf", folder / "model.nemo")
    preprocess("pydoc_topics", folder / "data", tokenizer_type=str(folder / "hf"))
    return folder, sizes


@pytest.mark.slow
def test_the_plan_is_near_the_measured_peak(journey):
    folder, (length, micro, whole) = journey
    command = [sys.executable, "-m", "nemo_minitron", "distill", f"model.restore_from_path={folder}/model.nemo"]
    command += [f"model.kd_teacher_restore_from_path={folder}/model.nemo", f"model.nemo_path={folder}/out.nemo"]
    prefix = folder / "data_text_document"
    command += [f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}"]
    command += [f"model.data.seq_length={length}", f"model.micro_batch_size={micro}"]
    command += [f"model.global_batch_size={whole}", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    command += ["trainer.limit_val_batches=1", f"exp_manager.exp_dir={folder}/exp"]
    command += ["exp_manager.create_checkpoint_callback=false"]
    plan = subprocess.run([*command, "plan_only=true"], capture_output=True, text=True, check=True).stdout
    predicted = int(re.search(r"in all +([\d,]+) MiB", plan).group(1).replace(",", ""))
    # freed pieces go back to the kernel, as docs/running.md says: what malloc keeps of them is not in a plan
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0 and Path(f"{folder}/out.nemo").exists()
    measured = usage.ru_maxrss / 1024
    print(f"{plan}measured peak {measured:,.0f} MiB, predicted {predicted:,} ({predicted / measured - 1:+.1%})")
    assert predicted == pytest.approx(measured, rel=0.1)
