"""A page on this machine: whether the commands work here, and what each absence costs.

Each module looks at one thing and gives :class:`~nemo_minitron.doctor.line.Line`; ``page`` puts them together. Nothing
here imports torch or another heavy package: ``probe`` does, in processes of their own that may fail.
"""
