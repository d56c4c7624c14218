"""Processes that share one import of NeMo."""

from __future__ import annotations

import pytest

from tests.zygote import Zygote


@pytest.fixture(scope="session")
def zygote():
    """Runs functions on grids of real processes that share one import of NeMo."""
    handle = Zygote()
    yield handle
    handle.close()
