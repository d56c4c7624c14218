"""``minitron run``: a whole recipe."""

from __future__ import annotations

from nemo_minitron.config.schema import RunConfig


def run(cfg: RunConfig) -> None:
    """Walk ``recipe``; see :func:`nemo_minitron.recipe.run`."""
    from nemo_minitron import recipe
    from nemo_minitron.config.compose import compose

    recipe.run(cfg, compose)
