"""Versions of Python and of the packages that every command stands on, beside those that ``setup.py`` pins."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Iterator

from nemo_minitron import __version__
from nemo_minitron.doctor.line import Line

PYTHON = ">=3.10,<3.13"
PINS = {
    "torch": "==2.13.0",
    "nemo_toolkit": "==2.4.1",
    "megatron-core": "==0.13.1",
    "lightning": "==2.4.0",
    "transformers": ">=4.51.3,<4.58",
    "numpy": "==1.26.4",
    "hydra-core": "==1.3.2",
    "omegaconf": "==2.3.0",
}
"""Distribution → what ``setup.py`` asks for, which a test compares; here, since a wheel has no ``setup.py``."""
MODULES = {"nemo_toolkit": "nemo", "megatron-core": "megatron.core", "hydra-core": "hydra"}
"""Distribution → the module that it brings, where the names differ."""


def versions() -> Iterator[Line]:
    """A line for Python, this package, and each of :data:`PINS`; one for all other packages that are required."""
    yield pinned("Python", platform.python_version(), PYTHON)
    yield _own()
    for name, pin in PINS.items():
        found = installed(name)
        if found is not None:
            yield pinned(name, found, pin)
        elif present(MODULES.get(name, name)):
            yield Line("note", name, f"there, but says no version; setup.py pins {pin}")
        else:
            yield Line("problem", name, f"not installed; setup.py pins {pin}")
    yield _others()


def pinned(name: str, found: str, pin: str) -> Line:
    """A version beside its pin."""
    fits = within(found, pin)
    if fits is None:
        return Line("note", name, f"{found}; setup.py pins {pin}, which could not be compared")
    if fits:
        return Line("ok", name, f"{found}, as pinned ({pin})")
    return Line("note", name, f"{found} differs from what setup.py pins ({pin}) and was tested")


def within(version: str, pin: str) -> bool | None:
    """Whether a version satisfies a pin; None where that cannot be said."""
    try:
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(pin).contains(version, prereleases=True)
    except Exception:  # no such package, or no such version as it knows
        return None


def installed(distribution: str) -> str | None:
    """Version of an installed package; None where there is none."""
    try:
        return importlib.metadata.version(distribution) or None
    except Exception:  # broken metadata raise what they like
        return None


def present(module: str) -> bool:
    """Whether a module is there to be imported; its parents alone are."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:
        return False


def _own() -> Line:
    found = installed("nemo_minitron")
    if found is None:
        return Line("note", "nemo_minitron", f"{__version__}, used from its folder without being installed")
    if found != __version__:
        return Line("note", "nemo_minitron", f"{__version__}, but {found} is what was installed: pip install it again")
    return Line("ok", "nemo_minitron", __version__)


def _others() -> Line:
    """The other packages of ``install_requires``, as the installed package lists them."""
    try:
        listed = importlib.metadata.requires("nemo_minitron") or []
    except Exception:
        listed = []
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in listed if "extra ==" not in line]
    names = [name for name in names if name not in PINS]
    missing = [name for name in names if installed(name) is None and not present(name.replace("-", "_"))]
    if not names:
        return Line("note", "other packages", "not checked, since nemo_minitron is not installed")
    if missing:
        return Line("problem", "other packages", f"not installed: pip install {' '.join(missing)}")
    return Line("ok", "other packages", f"all {len(names)} that setup.py requires are installed")
