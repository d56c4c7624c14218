"""Distillation losses on vocabulary-sharded logits."""
