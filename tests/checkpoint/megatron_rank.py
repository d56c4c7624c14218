"""One rank of Megatron-Core: load a checkpoint strictly at the world's TP, save it again. Run by test_megatron.py."""

import os
import sys

import torch

from nemo_minitron.runtime import init_distributed
from tests.llamas import SHAPES


def main() -> None:
    name, source, target = sys.argv[1:]
    shape, tensor_parallel = SHAPES[name], int(os.environ["WORLD_SIZE"])
    init_distributed(tensor_parallel)
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        tensor_model_parallel_size=tensor_parallel,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        shape.padded_vocab_size,
        shape.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.share_embeddings_and_output_weights,
    )
    # raise_all: a key that the model asks for and the file lacks, or the reverse, is an error
    loaded = dist_checkpointing.load(model.sharded_state_dict(prefix="model."), source, strict="raise_all")
    model.load_state_dict({key.removeprefix("model."): value for key, value in loaded.items()})
    dist_checkpointing.save(model.sharded_state_dict(prefix="model."), target)


if __name__ == "__main__":
    main()
