"""The memory plan against what a model keeps for backward, and against measured runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from nemo_minitron import recipe
from nemo_minitron.config import check
from nemo_minitron.config.compose import compose, configure
from nemo_minitron.config.schema import COMMANDS
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.distill import duration
from nemo_minitron.distill.activations import kept, layer_activations
from nemo_minitron.distill.cards import table
from nemo_minitron.distill.memory import ITEMS, memory
from nemo_minitron.distill.run import Run
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape, shape_of
from nemo_minitron.nemo.memory import plan_memory, run_of
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA


def storages(module: torch.nn.Module, run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """Bytes of the storages that autograd saves while ``run`` runs, without the module's parameters; its output."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}
    alive = []  # a storage that is freed while others are counted would give its address away

    def save(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        output = run()
    return sum(saved.values()), output


APART = {"documents_apart": True, "positions_restart": True}


@pytest.mark.parametrize("how", [{}, APART, APART | {"recompute": True}], ids=["together", "apart", "recomputed"])
def test_a_model_keeps_what_the_plan_says(how, pair, trainer, monkeypatch):
    """Storages that autograd saves in the decoder, without parameters; the output is the final norm's last part."""
    from nemo_minitron.nemo.documents import attention_mask
    from nemo_minitron.nemo.restore import load_model

    _, nemo, shape = pair
    (module,) = load_model(nemo, trainer).get_model_module_list()
    tokens = torch.randint(0, shape.vocab_size, (2, 64))
    positions = torch.arange(64).expand(2, -1)
    inputs = {
        "attention_mask": attention_mask(torch.arange(64).expand(2, -1) // 24),
        "rotary_positions": positions % 24,
    }
    inputs = inputs if how else {"attention_mask": None}
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    for name, value in recompute.items() if "recompute" in how else ():
        monkeypatch.setattr(module.config, name, value)
    found, hidden = storages(
        module.train(), lambda: module(input_ids=tokens, position_ids=positions, hidden_only=True, **inputs)
    )
    run = Run(shape, None, seq_length=64, micro_batch_size=2, micro_batches=1, **how)
    assert hidden.requires_grad
    assert found + hidden.nbytes == pytest.approx(kept(shape, run, shape.num_layers), rel=0.02)
    if how:  # or this test could not tell
        least = 2 * 64 * 64 * (1 if "recompute" in how else 4 * shape.num_layers)
        assert found + hidden.nbytes > 1.02 * kept(shape, replace(run, documents_apart=False), shape.num_layers) > least


LAYERS = {
    "gqa": ModelShape(1, 96, 208, 8, 2, 16, 512, 512),  # head_dim is not hidden / heads
    "mha": ModelShape(1, 96, 208, 4, 4, 16, 512, 512),
    "qwen3": ModelShape(1, 96, 208, 8, 2, 16, 512, 512, family="qwen3"),
    "qwen3_mha": ModelShape(1, 96, 208, 4, 4, 16, 512, 512, family="qwen3"),
}


@pytest.mark.parametrize("name", list(LAYERS))
@pytest.mark.parametrize("kind", ["float32", "autocast", "half_weights", "half_weights, one kernel"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_keeps_what_the_plan_says(name, kind, batch, trainer, monkeypatch):
    """One layer of Megatron's in each precision. Norms in one kernel are those of CUDA: what its derivative saves, its
    input and a float32 number a row, is put in its place here."""
    shape, half = LAYERS[name], kind != "float32"
    weights = torch.bfloat16 if "half_weights" in kind else torch.float32
    run = Run(shape, None, 48, batch, 1, half=half, half_weights=weights == torch.bfloat16,
              device="cuda" if "kernel" in kind else "cpu")  # fmt: skip
    if "kernel" in kind:
        monkeypatch.setattr(functional, "rms_norm", lambda x, _, weight, eps: OneKernel.apply(x, weight, eps))
    layer = megatron_layer(shape, weights)
    x = torch.randn(48, batch, shape.hidden_size, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)

    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        found, output = storages(layer, lambda: layer(x))
        assert output.dtype == x.dtype
        assert found == layer_activations(shape, run)
        found, _ = storages(layer, lambda: checkpoint(layer, x, use_reentrant=True))
    assert found == layer_activations(shape, replace(run, recompute=True)) == x.nbytes


class OneKernel(torch.autograd.Function):
    """RMSNorm that saves what torch's ``_fused_rms_norm`` saves on CUDA: input, weight and reciprocal root."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x.float() * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError


def megatron_layer(shape: ModelShape, dtype: torch.dtype) -> torch.nn.Module:
    """One decoder layer with its RoPE, hidden states in, hidden states out."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_minitron.nemo.spec import layer_spec

    config = TransformerConfig(
        num_layers=1, hidden_size=shape.hidden_size, ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads, num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels, normalization="RMSNorm", activation_func=functional.silu,
        gated_linear_unit=True, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, params_dtype=dtype,
        bf16=dtype == torch.bfloat16, pipeline_dtype=dtype, use_cpu_initialization=True,
        qk_layernorm=shape.family == "qwen3", bias_activation_fusion=False, masked_softmax_fusion=False,
        persist_layer_norm=False, apply_rope_fusion=False, bias_dropout_fusion=False,
    )  # fmt: skip
    layer = build_module(layer_spec(False, config.qk_layernorm), config=config, layer_number=1).to(dtype)
    rope = RotaryEmbedding(shape.kv_channels, 1.0, use_cpu_initialization=True)

    class WithRope(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, attention_mask=None, rotary_pos_emb=rope(len(x)))[0]

    return WithRope()


def test_the_command_plans_for_this_machine_and_for_others(models, trainer):
    """What it prints is of the shape in the file and of the keys that were asked."""
    overrides = [
        f"model.restore_from_path={models}/model.nemo", f"model.kd_teacher_restore_from_path={models}/model.nemo",
        "model.nemo_path=x", "model.data.data_prefix=[x]", "model.data.seq_length=32", "trainer.precision=bf16",
        "model.global_batch_size=6", "model.activations_checkpoint_granularity=full",
        "model.activations_checkpoint_method=block", "model.activations_checkpoint_num_layers=2",
    ]  # fmt: skip
    cfg = configure("distill", overrides)
    text = plan_memory(cfg)
    run = run_of(cfg, GQA, GQA, on_gpu=False)
    assert (run.half, run.half_weights, run.micro_batches) == (True, False, 6)
    assert (run.recompute, run.recompute_block, run.recompute_layers) == (True, True, 2)
    assert re.search(rf"teacher +{memory(run)['teacher'] / 2**20:,.0f} MiB", text)
    assert f"\n\n{table(run)}\n\n" in text and "allocated" not in text
    assert text.endswith(duration.table(run, 100, torch.cuda.get_device_name() if torch.cuda.is_available() else None))
    apart = run_of(configure("distill", [*overrides, *KEPT_APART]), GQA, GQA, on_gpu=False)
    assert apart == replace(run, documents_apart=True, positions_restart=True, process=apart.process)
    cfg.trainer["max_steps"] = -1
    assert plan_memory(cfg).endswith(table(run)), "no time of a run without an end"
    split = configure("distill", [*overrides, "model.optim.name=adamw_8bit", "model.tensor_model_parallel_size=2",
                                  "trainer.devices=2"])  # fmt: skip
    with pytest.raises(MinitronError, match="adamw_8bit needs tensor and pipeline size 1, found 2 and 1"):
        plan_memory(split)


RECIPES = {"llama3_1_8b_width": 80, "llama3_1_8b_depth": 80, "llama3_1_8b_width_1gpu": 72, "llama3_1_8b_depth_1gpu": 72}
"""GB that a rank of each may take; of one GPU a tenth is to spare."""
DOCUMENT = Path(__file__).parents[2] / "docs" / "running.md"


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_for_an_8b_fit_in_80_gb_as_the_document_says(name, tmp_path):
    """Both trainings of each, from the shape in conf/model and the targets in conf/prune: no weights are needed."""
    lines = DOCUMENT.read_text().splitlines()
    for stage, run in planned(name, tmp_path):
        assert run.half and run.device == "cuda" and run.lean == ("1gpu" in name)
        items = memory(run)
        assert sum(items.values()) <= RECIPES[name] * 10**9
        assert (
            line_of(
                f"{name.removeprefix('llama3_1_8b_')} {stage}", [f"{items[item] / 1e9:.1f}" for item in ITEMS], items
            )
            in lines
        )
    assert line_of("recipe, training", ITEMS) in lines


def planned(name: str, folder: Path) -> Iterator[tuple[str, Run]]:
    """The trainings of a recipe, each by the keys that its command gets."""
    cfg = configure("run", [f"recipe={name}", f"run_dir={folder}", "recipe.settings.source=x"])
    stages = recipe.load_stages(cfg, compose)
    teacher = shape_of(compose("synthesize", ["model=llama3_1_8b", "output_path=x"]).model)
    target = stages["prune"].config["prune"]
    if target["drop_layers"]:
        student = teacher.replace(num_layers=teacher.num_layers - len(target["drop_layers"]))
    else:
        student = teacher.replace(hidden_size=target["hidden_size"], ffn_hidden_size=target["ffn_hidden_size"])
    for stage, shapes in (("finetune", (teacher, None)), ("distill", (student, teacher))):
        yield stage, run_of(check.instance(COMMANDS[stage], stages[stage].config), *shapes, on_gpu=True)


def line_of(name: str, cells: Sequence[str], items: Mapping[str, int] | None = None) -> str:
    """A line of the document's table."""
    whole = "in all" if items is None else f"{sum(items.values()) / 1e9:.1f}"
    return f"{name:<20}" + "".join(f"{cell:>12}" for cell in (*cells, whole)).rstrip()


# (seq_length, micro-batch, global batch): many tokens, many weights, accumulation, the lean mode, a mask of documents
MEASURED = {
    "activations": ("narrow", 512, 8, 8),
    "weights": ("wide", 64, 1, 2),
    "accumulation": ("narrow", 256, 8, 16),
    "lean": ("wide", 256, 1, 2),
    "documents": ("narrow", 2048, 2, 2),
}
KEPT_APART = ["model.data.reset_attention_mask=true", "model.data.reset_position_ids=true"]
LEAN = ["trainer.precision=bf16", "model.megatron_amp_O2=true", "model.optim.name=adamw_8bit"]
SHAPES = {
    "narrow": ModelShape(8, 256, 1024, 8, 4, 32, 8000, 8064, True, 10000.0, None, 2048),
    "wide": ModelShape(6, 1024, 3072, 16, 4, 64, 8000, 8064, False, 10000.0, None, 512),
}


@pytest.fixture(scope="module", params=list(MEASURED))
def journey(request, tmp_path_factory):
    name, *sizes = MEASURED[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    make_llama(folder / "hf", SHAPES[name], seed=1)
    convert(folder / "hf", folder / "model.nemo")
    preprocess("pydoc_topics", folder / "data", tokenizer_type=str(folder / "hf"))
    return folder, sizes, {"lean": LEAN, "documents": KEPT_APART}.get(request.param, [])


@pytest.mark.slow
def test_the_plan_is_near_the_measured_peak(journey):
    folder, (length, micro, whole), settings = journey
    command = [sys.executable, "-m", "nemo_minitron", "distill", f"model.restore_from_path={folder}/model.nemo"]
    command += [f"model.kd_teacher_restore_from_path={folder}/model.nemo", f"model.nemo_path={folder}/out.nemo"]
    prefix = folder / "data_text_document"
    command += [f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}"]
    command += [f"model.data.seq_length={length}", f"model.micro_batch_size={micro}"]
    command += [f"model.global_batch_size={whole}", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    command += ["trainer.limit_val_batches=1", f"exp_manager.exp_dir={folder}/exp"]
    command += ["exp_manager.create_checkpoint_callback=false", *settings]
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
