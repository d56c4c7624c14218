"""``minitron search``: the best shape for a budget, chosen by evidence.

A journey, as ``minitron run`` is: it calls stages, and meets them through their files. Shapes are enumerated and
counted (:mod:`.space`), their loss predicted from scores (:mod:`.predict`), the best measured as they are and after
short distillations of growing length (:mod:`.measure`), and what was found is written (:mod:`.output`).
"""

from nemo_minitron.search.journey import run

__all__ = ["run"]
