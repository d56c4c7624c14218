"""Jobs that wait for one another: all of them are submitted, or none stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.errors import MinitronError
from nemo_minitron.jobs.slurm_chain import Link, cancel, submit_chain, waiting
from tests.jobs.slurm import Slurm, on_path

LINKS = [
    Link("a", Path("a.sh")),
    Link("b", Path("b.sh"), ("a",)),
    Link("c", Path("c.sh")),
    Link("d", Path("d.sh"), ("b", "c")),
]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return on_path(tmp_path / "bin", monkeypatch)


def submitted(slurm: Slurm) -> list[list[str]]:
    return [call["argv"][1:] for call in slurm.calls("sbatch")]


def test_each_waits_for_those_before_it(slurm):
    told = []
    assert submit_chain(LINKS, tell=lambda numbers: told.append(dict(numbers))) == dict(
        a="101", b="102", c="103", d="104"
    )
    assert submitted(slurm) == [
        ["--parsable", "a.sh"],
        ["--parsable", "--dependency=afterok:101", "b.sh"],
        ["--parsable", "c.sh"],
        ["--parsable", "--dependency=afterok:102:103", "d.sh"],
    ]
    assert [len(numbers) for numbers in told] == [1, 2, 3, 4] and not slurm.calls("scancel")


def test_those_that_wait_for_none_wait_for_what_was_asked(slurm):
    submit_chain(LINKS, "afterany:7")
    waits = [words[1].removeprefix("--dependency=") for words in submitted(slurm)]
    assert waits == ["afterany:7", "afterok:101", "afterany:7", "afterok:102:103"]


def test_a_refusal_cancels_what_was_submitted(slurm):
    slurm.number_jobs(refused_from=2)
    with pytest.raises(MinitronError) as caught:
        submit_chain(LINKS)
    assert str(caught.value) == (
        "sbatch refused c.sh: sbatch: error: QOSMaxSubmitJobPerUserLimit; the 2 jobs submitted before (101, 102) were "
        "cancelled"
    )
    assert [call["argv"] for call in slurm.calls("scancel")] == [["scancel", "101", "102"]]
    assert len(submitted(slurm)) == 3


def test_the_first_refusal_cancels_nothing(slurm):
    slurm.number_jobs(refused_from=0)
    with pytest.raises(MinitronError, match=r"QOSMaxSubmitJobPerUserLimit$"):
        submit_chain(LINKS)
    assert not slurm.calls("scancel")


def test_an_interruption_cancels_too(slurm, capsys):
    def interrupted(numbers):
        if len(numbers) == 1:
            raise SystemExit(130)

    with pytest.raises(SystemExit):
        submit_chain(LINKS, tell=interrupted)
    assert capsys.readouterr().err == "minitron: the job submitted before (101) was cancelled\n"
    assert [call["argv"] for call in slurm.calls("scancel")] == [["scancel", "101"]]


def test_what_cannot_be_cancelled_is_said(slurm):
    slurm.install("scancel", "sys.exit('scancel: error: not yours')")
    assert cancel(["101", "102"]) == (
        "the 2 jobs submitted before could not be cancelled (scancel: error: not yours): run scancel 101 102"
    )
    (slurm.folder / "scancel").unlink()
    assert "could not be cancelled" in cancel(["101"])
    assert cancel([]) == ""


def test_which_jobs_wait(slurm, monkeypatch):
    slurm.install("squeue", r"print('101 PENDING\n9 RUNNING\n')")
    assert waiting(["101", "102"]) == {"101": "PENDING"}
    assert slurm.calls("squeue")[0]["argv"] == ["squeue", "--noheader", "--format=%i %T", "--jobs=101,102"]
    slurm.install("squeue", "sys.exit('slurm_load_jobs error: Invalid job id specified')")
    assert waiting(["101"]) == {} == waiting([])
    monkeypatch.setenv("PATH", "/nowhere")
    assert waiting(["101"]) == {}
