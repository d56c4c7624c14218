"""``minitron synthesize``: a random Llama with a tokenizer, as an HF folder."""

from __future__ import annotations

from pathlib import Path

from nemo_minitron.config.schema import SynthesizeConfig
from nemo_minitron.errors import MinitronError
from nemo_minitron.files.staging import Staging
from nemo_minitron.model.shape import shape_of

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What :func:`run` writes, and may replace."""


def run(cfg: SynthesizeConfig) -> None:
    """Write a random model of the shape in ``model`` to the folder ``output_path``, replacing one made before.

    Raises:
        MinitronError: an impossible shape, an unknown precision; a destination that cannot be written or holds
            anything else.
    """
    from nemo_minitron.checkpoint.nemo_config import dtype_from_precision
    from nemo_minitron.synthetic import make_llama

    shape, dtype = shape_of(cfg.model), dtype_from_precision(cfg.precision)
    folder = Path(cfg.output_path)
    try:
        with Staging(folder, folder=True, replaceable=_FILES) as staging:
            make_llama(staging.path, shape, seed=cfg.seed, dtype=dtype)
    except OSError as error:
        raise MinitronError(f"output_path {folder} cannot be written: {error.strerror}") from error
    print(f"{folder}: {shape.num_parameters():,} parameters")
