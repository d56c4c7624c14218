"""Distillation losses, one a file: ``NAME.py`` holds ``LOSS``, the :class:`~nemo_minitron.distill.loss.Loss` of that
name."""
