"""Grids that cannot be: refused by every command in one line, from the configs alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.nemo_file import each_tensor
from nemo_minitron.cli import main
from nemo_minitron.convert import convert
from nemo_minitron.data.preprocess import preprocess
from nemo_minitron.errors import MinitronError
from nemo_minitron.synthetic import make_llama
from tests.llamas import GQA  # 3 layers, 8 heads in 4 groups


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory) -> Path:
    """Folder of ``student`` and ``teacher`` whose every weight is damaged, and of their tokens ``text_text_document``.

    What is refused here with a message on the grid has been refused before any weight was read.
    """
    folder = tmp_path_factory.mktemp("unreadable")
    make_llama(folder / "hf", GQA)
    preprocess("pydoc_topics", folder / "text", tokenizer_type=str(folder / "hf"))
    for name in ("student", "teacher"):
        nemo = convert(folder / "hf", folder / name)  # a folder of a .nemo's members
        (records,) = (nemo / "model_weights").glob("*.distcp")
        with NemoReader(nemo) as reader:
            chunks = [chunk for _, stored in reader._model.index.values() for chunk in stored.chunks]
        with records.open("r+b") as file:
            for chunk in chunks:
                file.seek(chunk.start)
                file.write(bytes(chunk.length))
        with NemoReader(nemo) as reader:
            for parameter, layer in each_tensor(reader.shape):
                with pytest.raises(MinitronError, match="damaged"):
                    reader.tensor(parameter, layer)
    return folder


def command(name: str, folder: Path, out: Path) -> list[str]:
    prefix = folder / "text_text_document"
    training = [
        f"model.nemo_path={out}/out.nemo",
        f"model.data.data_prefix={{train: [{prefix}], validation: [{prefix}]}}",
        "model.data.seq_length=32",
        f"exp_manager.exp_dir={out}/exp",
    ]
    return [
        name,
        f"model.restore_from_path={folder}/student",
        *{
            "importance": [
                f"calibration.data_prefix={prefix}",
                f"output_path={out}/scores",
                "calibration.seq_length=32",
            ],
            "prune": [f"prune.calib_dataset={prefix}", f"export.save_path={out}/out.nemo", "prune.ffn_hidden_size=48"],
            "finetune": training,
            "distill": [*training, f"model.kd_teacher_restore_from_path={folder}/teacher"],
            "evaluate": [f"evaluate.data_prefix={prefix}", f"output_path={out}/out.json", "evaluate.seq_length=32"],
        }[name],
    ]


GRIDS = {
    "TP does not divide groups": (6, ["model.tensor_model_parallel_size=3"], ["(3)", "num_query_groups (4)"]),
    "TP does not divide the few groups": (8, ["model.tensor_model_parallel_size=8"], ["(8)", "num_query_groups (4)"]),
    "PP larger than layers": (4, ["model.pipeline_model_parallel_size=4"], ["(4)", "num_layers (3)"]),
    "processes that do not factor": (
        6,
        ["model.tensor_model_parallel_size=4"],
        ["world size (6)", "model.tensor_model_parallel_size (4)", "model.pipeline_model_parallel_size (1)"],
    ),
    "fewer processes than the grid": (
        1,
        ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"],
        ["world size (1)", "model.tensor_model_parallel_size (2)", "model.pipeline_model_parallel_size (2)"],
    ),
}


@pytest.mark.parametrize("name", ["importance", "prune", "finetune", "distill", "evaluate"])
@pytest.mark.parametrize("case", GRIDS)
def test_a_broken_grid_is_refused_before_any_weight_is_read(case, name, unreadable, tmp_path, monkeypatch, capsys):
    world, grid, words = GRIDS[case]
    if world > 1:  # as the ranks of a launcher find themselves
        for variable, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}.items():
            monkeypatch.setenv(variable, str(value))
    assert main([*command(name, unreadable, tmp_path / "out"), *grid]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minitron:")]
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())
