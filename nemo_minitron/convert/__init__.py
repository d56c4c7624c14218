"""Any checkpoint that is read to any that is written: one tensor at a time, so memory stays at a layer's worth."""

from nemo_minitron.convert.walk import compare, convert

__all__ = ["compare", "convert"]
