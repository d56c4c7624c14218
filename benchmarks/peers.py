"""Other ways of making a small model whose remaining weights make up for what went, on ``zero_shot.py``'s tokens.

``oscar``: OSSCAR (arXiv 2403.12983) as LinkedIn's fmchisel 0.1.2 has it (BSD-2; ``pip download fmchisel==0.1.2
--no-deps``). Its core, ``osscar_sparsify.py``, is run out of the wheel, unmodified, with the defaults of its
``OSSCARModifier`` (``--update-iter``: neurons that go between two updates of what is left; each takes time by the
square of the FFN's width). llmcompressor, whose pipeline calls it there, is not needed: of it the core takes one dtype
(float32, of moments), and its pipeline is followed here. Layer by layer, one pass gives the moments of what
``down_proj`` and ``o_proj`` read, both are made sparse, and the layer runs again, so that the next sees the student's
stream. Neurons go, and whole query groups with their heads; neither hidden channels nor layers. fmchisel's packing
asks the config for ``head_dim``, which Qwen2's lacks, so units without weights are taken out here.

``replaceme``: ReplaceMe's least squares (arXiv 2505.02819, section 3), written from the paper. Of all blocks of the
asked number of layers that have a layer before them the one goes whose input and output are nearest in cosine, mean
over the calibration's tokens. M is the output of the MLP before it, Y the stream that this is added to, L the stream
behind the block: T = (MᵀM)⁻¹ Mᵀ (L - Y) in float64, folded into that MLP's ``down_proj``.

Both are done on transformers' model in float32; the student becomes a ``.nemo`` and is measured as all others are.
Not here: SliceGPT (arXiv 2401.15024), which no package index has and whose students are not plain Llamas.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4
"""Samples that run at once."""
CORE = "fmchisel/pruning/osscar/utils/osscar_sparsify.py"
DAMPENING, UPDATE_ITER = 0.01, 1
"""Defaults of ``OSSCARModifier``: relative to the mean of a moment's diagonal; units that go between two updates."""


class CannotPrune(Exception):
    """A target that a peer does not do."""


def student_of(bench: Any, method: str, target: Mapping[str, int], path: Path) -> None:
    """Write a peer's student of ``bench``'s teacher as ``.nemo``, in the teacher's dtype.

    Raises:
        CannotPrune: before anything is loaded.
    """
    from nemo_minitron import runtime
    from nemo_minitron.checkpoint import NemoReader
    from nemo_minitron.convert import convert

    check(method, target)
    teacher = bench.folder / "teacher_hf"
    if not teacher.is_dir():
        convert(bench.teacher, teacher)
    with NemoReader(bench.teacher) as reader:
        dtype = reader.dtype
    model, tokens = load(teacher).to(runtime.device()), bench.calibration.to(runtime.device())
    if method == "oscar":
        core = osscar_core(bench.fmchisel)
        config = model.config
        neurons = config.intermediate_size - target.get("ffn_hidden_size", config.intermediate_size)
        groups = config.num_key_value_heads - target.get("num_query_groups", config.num_key_value_heads)
        student = packed(oscar(model, tokens, neurons, groups, core, bench.update_iter), neurons, groups)
    else:
        student = replaceme(model, tokens, model.config.num_hidden_layers - target["num_layers"])
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        student.to(dtype).save_pretrained(folder)
        for file in teacher.glob("*token*"):
            shutil.copy(file, folder)
        path.unlink(missing_ok=True)
        convert(folder, path)


def check(method: str, target: Mapping[str, int]) -> None:
    """Refuse what a method of a peer does not do.

    Raises:
        CannotPrune: naming it.
    """
    layers = {"num_layers"}
    does = {"oscar": {"ffn_hidden_size", "num_query_groups"}, "replaceme": layers, "ours_greedy": layers}.get(method)
    if does is not None and (rest := target.keys() - does):
        raise CannotPrune(f"{method} does not prune {', '.join(sorted(rest))}")


def load(folder: Path) -> Any:
    """transformers' model of an HF folder, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="sdpa").eval()


def osscar_core(fmchisel: Path | None) -> Any:
    """fmchisel's module of the algorithm, from its wheel or from the folder that this was unpacked to.

    Raises:
        SystemExit: no such file.
    """
    if fmchisel is None or not fmchisel.exists():
        raise SystemExit(f"oscar: expected --fmchisel WHEEL of fmchisel 0.1.2, found {fmchisel}")
    if fmchisel.is_dir():
        source = (fmchisel / CORE).read_text()
    else:
        with zipfile.ZipFile(fmchisel) as wheel:
            source = wheel.read(CORE).decode()
    names = ["llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.obcq"]
    stand_ins = {name: types.ModuleType(name) for name in [*names, f"{names[-1]}.sgpt_sparsify"]}
    stand_ins[f"{names[-1]}.sgpt_sparsify"].SGPT_PRECISION = torch.float32  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in stand_ins}
    core = types.ModuleType("osscar_sparsify")
    sys.modules.update(stand_ins)
    try:
        exec(compile(source, f"{fmchisel.name}/{CORE}", "exec"), core.__dict__)
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return core


@torch.no_grad()
def first_inputs(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first layer is called with: streams ``[n, s, H]`` and the keywords of a batch of ``BATCH`` samples.

    Every batch has the same length and no padding, so that masks and positions of one hold for all.
    """

    class Caught(Exception):
        pass

    seen: list[dict[str, Any]] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)
        raise Caught

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.model(tokens[:1], use_cache=False)
    except Caught:
        pass
    finally:
        hook.remove()
    keywords = {name: value for name, value in seen[0].items() if name != "hidden_states"}
    return model.model.embed_tokens(tokens), keywords


def run(layer: nn.Module, streams: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """A layer's output ``[b, s, H]``."""
    found = layer(streams, **keywords)
    return found[0] if isinstance(found, tuple) else found


@contextmanager
def inputs_of(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Calls ``see`` with the name and the first input of each of the modules whenever it runs."""
    hooks = [
        module.register_forward_hook(lambda module, args, output, name=name: see(name, args[0]))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def oscar(model: Any, tokens: Tensor, neurons: int, groups: int, core: Any, update_iter: int = UPDATE_ITER) -> Any:
    """The model, in place, with ``neurons`` and ``groups`` of every layer without weights in what reads them."""
    from tqdm import tqdm

    config = model.config
    streams, keywords = first_inputs(model, tokens)
    for layer in tqdm(model.model.layers, desc="oscar", unit="layer", disable=None):
        modules: dict[str, nn.Module] = {}
        if groups:
            modules["o_proj"] = layer.self_attn.o_proj
        if neurons:
            modules["down_proj"] = layer.mlp.down_proj
        moments = {
            name: module.weight.new_zeros(module.in_features, module.in_features) for name, module in modules.items()
        }
        counts = dict.fromkeys(modules, 0)

        def see(name: str, x: Tensor, modules: Any = modules, moments: Any = moments, counts: Any = counts) -> None:
            moments[name], counts[name] = core.accumulate_hessian(x, modules[name], moments[name], counts[name])

        with inputs_of(modules, see):
            for batch in streams.split(BATCH):
                run(layer, batch, keywords)
        for name, module in modules.items():
            units = config.num_key_value_heads if name == "o_proj" else config.intermediate_size
            gone = groups if name == "o_proj" else neurons
            _, weight = core.sparsify_weight(
                module=module,
                hessians_dict={module: moments[name]},
                num_keep=units - gone,
                update_iter=update_iter if name == "down_proj" else UPDATE_ITER,
                num_cin=units,
                percdamp=DAMPENING,
            )
            module.weight.copy_(weight)
        streams = torch.cat([run(layer, batch, keywords) for batch in streams.split(BATCH)])
    return model


@torch.no_grad()
def packed(model: Any, neurons: int, groups: int) -> Any:
    """A smaller model without the units of a sparse one that have no weights."""
    from transformers import AutoModelForCausalLM

    config, before = type(model.config).from_dict(model.config.to_dict()), model.config
    width = getattr(before, "head_dim", None) or before.hidden_size // before.num_attention_heads
    config.head_dim = width
    heads = before.num_attention_heads // before.num_key_value_heads
    config.intermediate_size -= neurons
    config.num_key_value_heads -= groups
    config.num_attention_heads -= groups * heads
    weights = model.state_dict()
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}"
        if neurons:
            rows = layer.mlp.down_proj.weight.norm(dim=0).nonzero(as_tuple=True)[0]
            weights[f"{prefix}.mlp.down_proj.weight"] = layer.mlp.down_proj.weight[:, rows]
            _keep(weights, f"{prefix}.mlp", ("gate_proj", "up_proj"), rows)
        if groups:
            of_group = layer.self_attn.o_proj.weight.T.reshape(before.num_key_value_heads, -1)
            kept = of_group.norm(dim=1).nonzero(as_tuple=True)[0]
            queries, keys = (
                (kept[:, None] * size + torch.arange(size, device=kept.device)).flatten()
                for size in (heads * width, width)
            )
            weights[f"{prefix}.self_attn.o_proj.weight"] = layer.self_attn.o_proj.weight[:, queries]
            _keep(weights, f"{prefix}.self_attn", ("q_proj",), queries)
            _keep(weights, f"{prefix}.self_attn", ("k_proj", "v_proj"), keys)
    student = AutoModelForCausalLM.from_config(config)
    student.load_state_dict(weights)
    return student.eval()


def _keep(weights: dict[str, Tensor], prefix: str, modules: tuple[str, ...], rows: Tensor) -> None:
    """Cut the rows of weights and biases."""
    for module in modules:
        for kind in ("weight", "bias"):
            if (name := f"{prefix}.{module}.{kind}") in weights:
                weights[name] = weights[name][rows]


@torch.no_grad()
def replaceme(model: Any, tokens: Tensor, count: int) -> Any:
    """The model, in place, without ``count`` consecutive layers, the MLP before them standing in for them too."""
    first = nearest_block(model, tokens, count)
    before = model.model.layers[first - 1]
    before.mlp.down_proj.weight.copy_(transform(model, tokens, first, count).T @ before.mlp.down_proj.weight.double())
    layers = [layer for number, layer in enumerate(model.model.layers) if not first <= number < first + count]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[: len(layers)]
    return model


@torch.no_grad()
def nearest_block(model: Any, tokens: Tensor, count: int) -> int:
    """First layer, not the very first, of the ``count`` whose input and output are nearest in cosine."""
    from tqdm import tqdm

    layers = model.model.layers
    sums = torch.zeros(len(layers) + 1 - count, dtype=torch.float64, device=tokens.device)
    streams, keywords = first_inputs(model, tokens)
    for batch in tqdm(streams.split(BATCH), desc="replaceme", unit="batch", disable=None):
        seen = [batch]
        for layer in layers:
            seen.append(run(layer, seen[-1], keywords))
        for at in range(len(sums)):
            sums[at] += torch.cosine_similarity(seen[at], seen[at + count], dim=-1).double().sum()
    return 1 + int(sums[1:].argmax())


@torch.no_grad()
def transform(model: Any, tokens: Tensor, first: int, count: int) -> Tensor:
    """T ``[H, H]`` float64 by least squares, for layers ``first`` to ``first + count - 1`` and the MLP before them."""
    layers = model.model.layers
    width = model.config.hidden_size
    moment, cross = (torch.zeros(width, width, dtype=torch.float64, device=tokens.device) for _ in range(2))
    added: list[Tensor] = []
    hook = layers[first - 1].mlp.register_forward_hook(lambda module, args, output: added.append(output))
    try:
        streams, keywords = first_inputs(model, tokens)
        for x in streams.split(BATCH):
            for number, layer in enumerate(layers[: first + count]):
                x = run(layer, x, keywords)
                if number == first - 1:
                    entering = x
            mlp = added.pop().flatten(0, 1).double()
            rest = entering.flatten(0, 1).double() - mlp
            moment += mlp.T @ mlp
            cross += mlp.T @ (x.flatten(0, 1).double() - rest)
    finally:
        hook.remove()
    return torch.linalg.solve(moment, cross)
