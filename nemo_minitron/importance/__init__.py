"""Activation-based importance (arXiv 2407.14679, section 2.2): pure reductions, depth metrics, collection by hooks."""

from nemo_minitron.importance.collect import Groups, collect
from nemo_minitron.importance.reductions import Aggregation

__all__ = ["Aggregation", "Groups", "collect"]
