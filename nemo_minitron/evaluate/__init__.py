"""What a model is worth and what it costs: held-out loss, speed, energy, and tasks of lm-evaluation-harness.

``loss`` and ``throughput`` run NeMo's model on the job's grid, ``energy`` reads the machine's own counters, ``harness``
runs lm-eval on an HF folder.
"""

from nemo_minitron.evaluate.loss import evaluate, facts

__all__ = ["evaluate", "facts"]
