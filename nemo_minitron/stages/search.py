"""``minitron search``: the best shape for a budget."""

from __future__ import annotations

from nemo_minitron.config.schema import SearchConfig


def run(cfg: SearchConfig) -> None:
    """Search within ``budget`` and write ``output_path``; see :func:`nemo_minitron.search.run`."""
    from nemo_minitron.config.compose import compose
    from nemo_minitron.search import run as search

    search(cfg, compose)
