"""``minitron evaluate`` on bad input; its numbers are judged on every grid in ``test_grids.py``."""

from __future__ import annotations

import pytest

from nemo_minitron.cli import main

CASES = {
    "missing checkpoint": (["model.restore_from_path=DIR/absent.nemo"], "absent.nemo: expected a .nemo"),
    "no model_weights": (["model.restore_from_path=DIR/bare"], "expected the member model_weights/"),
    "missing tokens": (["evaluate.data_prefix=DIR/absent"], "absent"),
    "tokens of another vocabulary": (["evaluate.data_prefix=DIR/permuted_text_document"], "another vocabulary"),
    "tokens that the model does not have": (["evaluate.data_prefix=DIR/foreign_text_document"], "320"),
    "sequence too long": (["evaluate.seq_length=1000"], "max_position_embeddings=128"),
    "unwritable": (["output_path=OUT/file/out.json"], "expected a writable destination"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_leaves_the_destination_untouched(case, models, tmp_path, capsys):
    changes, message = CASES[case]
    (tmp_path / "out.json").write_text("an earlier result")
    (tmp_path / "file").write_text("in the way")
    keys = [
        f"model.restore_from_path={models}/model.nemo",
        f"evaluate.data_prefix={models}/own_text_document",
        "evaluate.seq_length=32",
        f"output_path={tmp_path}/out.json",
        *(key.replace("DIR", str(models)).replace("OUT", str(tmp_path)) for key in changes),
    ]
    assert main(["evaluate", *keys]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    assert message in line
    found = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert found == {"out.json": "an earlier result", "file": "in the way"}
