"""Distillation losses, fused with the output head, on a vocabulary sharded over tensor-parallel ranks."""
