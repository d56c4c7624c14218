"""One rank of Megatron-Core: build a model from what a checkpoint says of itself, load it strictly, run it, save it.

Run by test_megatron_write.py, on whatever Megatron-Core the interpreter finds first. Every size, switch and dtype comes
from the checkpoint, under Megatron's own names; only what a CPU cannot do is set here.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import yaml

from nemo_minitron.runtime import init_distributed

ON_A_CPU = {"use_cpu_initialization": True, "masked_softmax_fusion": False, "gradient_accumulation_fusion": False}
SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


def bridge(folder: Path) -> tuple[dict, dict]:
    """Arguments of TransformerConfig and of GPTModel, as Megatron-Bridge's provider makes them."""
    model = yaml.safe_load((folder / "run_config.yaml").read_text())["model"]
    assert model["activation_func"] == SILU and model["should_pad_vocab"]
    multiple = model["make_vocab_size_divisible_by"] * int(os.environ["WORLD_SIZE"])
    config = {k: DTYPES[v["_target_"]] if k.endswith("dtype") else v for k, v in model.items()}
    config["activation_func"] = torch.nn.functional.silu
    rest = {
        "vocab_size": -(-model["vocab_size"] // multiple) * multiple,
        "max_sequence_length": model["seq_length"],
        **{k: model[k] for k in ("rope_scaling", "rope_scaling_factor", "share_embeddings_and_output_weights")},
        "seq_len_interpolation_factor": model["seq_len_interpolation_factor"],
        **{k: model[k] for k in ("position_embedding_type", "rotary_percent", "rotary_base")},
    }
    return config, rest


def megatron(folder: Path) -> tuple[dict, dict]:
    """The same, as Megatron-LM's ``core_transformer_config_from_args`` and ``model_provider`` make them."""
    from megatron.core import dist_checkpointing

    args = dist_checkpointing.load_common_state_dict(str(folder))["args"]
    config = vars(args) | {
        "layernorm_epsilon": args.norm_epsilon,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": args.swiglu,
        "bias_activation_fusion": False,
        "apply_query_key_layer_scaling": False,
        "cp_comm_type": "p2p",
    }
    rest = {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
        "rope_scaling": args.use_rope_scaling,
        "rope_scaling_factor": args.rope_scaling_factor,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
    }
    return config, rest


def nemo2(folder: Path) -> tuple[dict, dict]:
    """The same, as NeMo 2's ``GPTConfig.configure_model`` makes them; Llama 3.1's then scales the frequencies."""
    model = yaml.safe_load((folder.parent / "context" / "model.yaml").read_text())["config"]
    assert model["activation_func"] == SILU
    config = {k: DTYPES[v["_target_"]] if k.endswith("dtype") else v for k, v in model.items()}
    config["activation_func"] = torch.nn.functional.silu
    rest = {
        "max_sequence_length": model["seq_length"],
        "seq_len_interpolation_factor": model["seq_len_interpolation_factor"],
        **{k: model[k] for k in ("vocab_size", "share_embeddings_and_output_weights")},
        **{k: model[k] for k in ("position_embedding_type", "rotary_percent", "rotary_base")},
    }
    if "scale_factor" in model:  # as Megatron-Core scales, for the numbers that it has built in
        assert [model[k] for k in ("low_freq_factor", "high_freq_factor", "old_context_len")] == [1.0, 4.0, 8192]
        rest |= {"rope_scaling": True, "rope_scaling_factor": model["scale_factor"]}
    return config, rest


def main() -> None:
    """Every case of a JSON file: ``[dress, source, prompt, target]``."""
    world = int(os.environ["WORLD_SIZE"])
    init_distributed(world)
    torch.cuda.synchronize, torch.cuda.current_device = lambda *_: None, lambda: "cpu"  # save of 0.16 calls them
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(world, *case)


def run(world: int, dress: str, source: str, prompt: str, target: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    described, rest = globals()[dress](Path(source))
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    config = TransformerConfig(
        **{k: v for k, v in described.items() if k in known} | ON_A_CPU | {"tensor_model_parallel_size": world}
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    model = GPTModel(config, spec, parallel_output=False, **rest).eval()
    prefix = "module." if dress == "nemo2" else ""
    # raise_all: a key that the model asks for and the file lacks, or the reverse, is an error
    asked = {"model": model.sharded_state_dict(prefix=prefix)}
    loaded = dist_checkpointing.load(asked, source, strict="raise_all")["model"]
    model.load_state_dict({key.removeprefix(prefix): value for key, value in loaded.items()})
    tokens = torch.load(prompt)
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1])[None], mask)
    if os.environ["RANK"] == "0":
        Path(target).mkdir(parents=True)
        torch.save(logits.float(), f"{target}.logits.pt")
    torch.distributed.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(prefix=prefix)}, target)


if __name__ == "__main__":
    main()
