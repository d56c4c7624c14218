"""A training that would go on from a checkpoint with code in it: refused before NeMo unpickles anything."""

import pytest

from nemo_minitron.cli import main
from tests.checkpoint.test_training_folder import calls


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_code_in_a_checkpoint_is_refused_before_it_is_resumed(name, models, tmp_path, capsys):
    checkpoint = tmp_path / "exp" / "checkpoints" / "megatron_gpt_finetune--step=1-consumed_samples=1.0-last"
    checkpoint.mkdir(parents=True)
    (checkpoint / name).write_bytes(calls("os", "mkdir").replace(b"/nowhere", str(tmp_path / "canary").encode()))
    keys = [
        f"model.restore_from_path={models}/model.nemo",
        f"model.nemo_path={tmp_path}/out.nemo",
        f"model.data.data_prefix={{train: [{models}/own_text_document], validation: [{models}/own_text_document]}}",
        "model.data.seq_length=32",
        "model.global_batch_size=1",
        f"exp_manager.explicit_log_dir={tmp_path}/exp",
        "exp_manager.resume_if_exists=true",
    ]
    assert main(["finetune", *keys]) == 2
    said = capsys.readouterr().err
    assert f"{name} is refused" in said and "mkdir' has no place in it" in said and "Traceback" not in said
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out.nemo").exists()
