"""Joules from a tree of files like Linux's powercap; where there is none, the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron import runtime
from nemo_minitron.evaluate.energy import Meter


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch):
    monkeypatch.setattr(runtime, "has_cuda", lambda: False)


def zone(root: Path, folder: str, name: str, microjoules: int, at_most: int = 10_000_000) -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "name").write_text(f"{name}\n")
    (root / folder / "max_energy_range_uj").write_text(f"{at_most}\n")
    (root / folder / "energy_uj").write_text(f"{microjoules}\n")
    return root / folder / "energy_uj"


def test_packages_are_summed_and_a_counter_may_begin_again(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 9_500_000)
    part = zone(tmp_path, "intel-rapl:0:0", "core", 0)
    platform = zone(tmp_path, "intel-rapl:2", "psys", 0)
    meter = Meter(tmp_path)
    before = meter.read()
    for file, value in ((first, 3_500_000), (second, 500_000), (part, 9_000_000), (platform, 9_000_000)):
        file.write_text(f"{value}\n")
    assert meter.since(before) == pytest.approx(2.5 + 1.0)  # 3.5 - 1, and 10 - 9.5 + 0.5
    assert meter.of_the_job([3.5]) == [3.5]
    assert meter.report({"decode": 0.1}) == {
        "available": True,
        "counters": ["rapl:package-0", "rapl:package-1"],
        "joules_per_token": {"decode": 0.1},
    }


def test_only_the_first_rank_of_a_machine_counts_its_processors(tmp_path, monkeypatch):
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    meter = Meter(tmp_path)
    assert meter.counters == [] and meter.reason is None


@pytest.mark.parametrize("case", ["absent", "broken"])
def test_no_counter_is_told_with_its_reason(tmp_path, case):
    if case == "broken":
        zone(tmp_path, "intel-rapl:0", "package-0", 1).write_text("no number\n")
    meter = Meter(tmp_path)
    assert meter.of_the_job([0.0]) is None
    report = meter.report(None)
    assert report["available"] is False
    assert ("no RAPL" if case == "absent" else "intel-rapl:0/energy_uj cannot be read") in report["reason"]


def test_a_gpu_without_nvml_is_told(tmp_path, monkeypatch):
    import sys

    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    monkeypatch.setattr(runtime, "has_cuda", lambda: True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml, which is not installed" in Meter(tmp_path).reason
