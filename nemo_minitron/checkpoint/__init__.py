"""Sole owner of the ``.nemo`` and HF formats: canonical tensors in, canonical tensors out, one layer at a time."""

from nemo_minitron.checkpoint.canonical import each_tensor, tensor_name
from nemo_minitron.checkpoint.hf import HfReader
from nemo_minitron.checkpoint.hf_write import HfWriter
from nemo_minitron.checkpoint.nemo_config import nemo_config_from_hf, shape_from_nemo, update_shape
from nemo_minitron.checkpoint.nemo_file import NemoReader, NemoWriter, verify

__all__ = [
    "HfReader",
    "HfWriter",
    "NemoReader",
    "NemoWriter",
    "each_tensor",
    "nemo_config_from_hf",
    "shape_from_nemo",
    "tensor_name",
    "update_shape",
    "verify",
]
