"""``minitron search``: the best shape for a budget, chosen by evidence.

As ``minitron run`` does, it calls stages, and meets them through their files. Shapes are enumerated and
counted (:mod:`.space`), their loss predicted from scores (:mod:`.predict`), the best measured as they are and after
short distillations of growing length (:mod:`.measure`), and what was found is written (:mod:`.output`).
"""

from nemo_minitron.search.rounds import run

__all__ = ["run"]
