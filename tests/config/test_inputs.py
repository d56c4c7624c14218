"""Paths that are not there are told by their keys, before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from nemo_minitron.cli import main
from nemo_minitron.config.compose import compose
from nemo_minitron.config.inputs import INPUTS, refuse_absent
from nemo_minitron.config.schema import COMMANDS
from nemo_minitron.errors import MinitronError


def test_a_wrong_path_needs_no_torch(tmp_path):
    code = (
        "import sys; from nemo_minitron.cli import main; "
        f"assert main(['prune', 'model.restore_from_path={tmp_path}/no.nemo', 'export.save_path=s.nemo']) == 2; "
        "sys.exit(' '.join({'torch', 'nemo', 'transformers', 'megatron'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = f"minitron: model.restore_from_path: expected a .nemo file or folder, found nothing at {tmp_path}/no.nemo\n"
    assert result.stderr == said


@pytest.mark.parametrize("key", INPUTS)
def test_each_key_is_checked(key, tmp_path):
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, key, str(tmp_path / "no"))
    with pytest.raises(MinitronError, match=f"^{key}: expected .*, found nothing at {tmp_path}/no$"):
        refuse_absent("prune", cfg)
    OmegaConf.update(cfg, key, str(tmp_path))
    refuse_absent("prune", cfg)


def test_what_a_command_makes_itself_need_not_be_there(tmp_path):
    refuse_absent("run", compose("run", ["recipe=tiny", f"run_dir={tmp_path}/new"]))


def test_generate_says_itself_what_it_reads(tmp_path, capsys):
    assert main(["generate", f"model.restore_from_path={tmp_path}/no", "prompt=a"]) == 2
    said = capsys.readouterr().err
    assert f"expected a .nemo, an HF folder or a GGUF, found nothing at {tmp_path}/no" in said


def test_names_on_the_hub_are_not_paths(tmp_path):
    refuse_absent("convert", compose("convert", ["input_name_or_path=meta-llama/Llama-3.2-1B", "output_path=x.nemo"]))
    absent = compose("convert", [f"input_name_or_path={tmp_path}/Llama", "output_path=x.nemo"])
    with pytest.raises(MinitronError, match="input_name_or_path: expected a HF folder"):
        refuse_absent("convert", absent)


@pytest.mark.parametrize("key", INPUTS)
def test_keys_are_those_of_some_command(key):
    configs = [OmegaConf.to_container(compose(command, complete=False)) for command in COMMANDS]
    section, _, last = key.rpartition(".")
    assert any(last in (cfg.get(section) or {} if section else cfg) for cfg in configs)
