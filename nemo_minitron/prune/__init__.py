"""Pruning: what a student keeps (a plan), how it is chosen, and how the weights are cut or re-solved."""
