"""A built NeMo model from a ``.nemo`` and a run's settings: the architecture always comes from the checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from nemo_minitron import runtime
from nemo_minitron.checkpoint import NemoReader
from nemo_minitron.checkpoint.nemo_config import family_from_nemo, nemo_keys
from nemo_minitron.checkpoint.nemo_gate import for_model_class
from nemo_minitron.checkpoint.tokenizer_open import SENTENCEPIECE, choose, library_of
from nemo_minitron.config.keys import SEED
from nemo_minitron.errors import MinitronError
from nemo_minitron.values.model import LEAN

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from nemo_minitron.nemo.model import MinitronGPTModel

ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "normalization",
    "layernorm_epsilon",
    "bias",
    "qkv_bias",
    "activation",
    "position_embedding_type",
    "rotary_base",
    "rotary_percentage",
    "scale_positional_embedding",
    "scale_factor",
    "low_freq_factor",
    "high_freq_factor",
    "old_context_len",
    "seq_len_interpolation_factor",
    "window_size",
    "share_embeddings_and_output_weights",
    "make_vocab_size_divisible_by",
    "override_vocab_size",
)
"""Keys of ``model`` that describe the network. A run may restate them, but not change them."""

_UNSAID = {"seq_len_interpolation_factor": 1}
"""What a checkpoint means that is silent on one of these keys, where that is neither null, 0 nor false."""

_FUSIONS = (
    "persist_layer_norm",
    "masked_softmax_fusion",
    "gradient_accumulation_fusion",
    "bias_activation_fusion",
    "bias_dropout_add_fusion",
    "apply_rope_fusion",
)


def merge_config(checkpoint: dict[str, Any], run: DictConfig | dict[str, Any], path: Path) -> DictConfig:
    """Checkpoint's ``model`` section with the run's settings laid over it.

    Of the checkpoint's, what :func:`for_model_class` lets through, without ``tokenizer``. Upstream, every key of the
    YAML's ``model:`` overrides the checkpoint, so that a forgotten ``num_layers`` trains
    another network; here an architecture key that disagrees is an error, one that agrees is redundant.

    Raises:
        MinitronError: an architecture key disagrees; names key, asked and found. A key of the checkpoint's that
            describes the network has a value of another kind.
    """
    asked = cast(dict, OmegaConf.to_container(run, resolve=True)) if isinstance(run, DictConfig) else dict(run)
    where = f"{path}: model_config.yaml"
    merged, keys = for_model_class(checkpoint, where), nemo_keys(family_from_nemo(checkpoint, where))
    for key, value in asked.items():
        if key in ARCHITECTURE and value is not None:
            found = _UNSAID.get(key) if checkpoint.get(key) is None else checkpoint[key]
            if not _same(value, found):
                raise MinitronError(
                    f"model.{key}={value!r} disagrees with the checkpoint {path}, which has {found!r}; "
                    "the architecture always comes from the checkpoint: leave the key out"
                )
        elif value is not None and (problem := keys.problem(key, value)):
            raise MinitronError(f"model.{key} {problem}; the architecture always comes from the checkpoint")
        elif key not in (*ARCHITECTURE, "encoder_seq_length", "tokenizer"):
            merged[key] = value
    cfg = OmegaConf.create(merged)
    _check_seq_length(cfg, asked)
    cfg.use_cpu_initialization = not runtime.has_cuda()
    if not runtime.has_cuda() and (asked.get("optim") or {}).get("name") != LEAN:
        cfg.megatron_amp_O2 = False
    from nemo_minitron.nemo.spec import has_transformer_engine

    if not (runtime.has_cuda() and has_transformer_engine()):
        cfg.transformer_engine = False
        for key in _FUSIONS:
            cfg[key] = False
        # Megatron-Core's own, which torch.compile makes: 4% of a step and 2 GiB of an 8B's distillation
        compiles = runtime.has_cuda() and importlib.util.find_spec("triton") is not None
        cfg.bias_activation_fusion = compiles and asked.get("bias_activation_fusion") is not False
    return cfg


def _check_seq_length(cfg: DictConfig, run: dict[str, Any]) -> None:
    """``encoder_seq_length`` and ``data.seq_length`` of a run are one number (NeMo's tutorial has 8192 and 4096)."""
    asked = run.get("encoder_seq_length")
    data = run.get("data") or {}
    length = data.get("seq_length")
    if asked is not None and length is not None and asked != length:
        raise MinitronError(
            f"model.encoder_seq_length={asked} and model.data.seq_length={length} disagree: training would use "
            f"{length}; set one, or both alike"
        )
    length = length or asked
    if length is not None:
        if length > cfg.max_position_embeddings:
            raise MinitronError(
                f"model.data.seq_length={length} is longer than the checkpoint's "
                f"max_position_embeddings={cfg.max_position_embeddings}"
            )
        cfg.encoder_seq_length = length
        if cfg.get("data") is not None:
            cfg.data.seq_length = length


def tokenizer_folder(reader: NemoReader, asked: Any) -> Path:
    """Folder of the tokenizer for a checkpoint's model: the one that is packed, else the one that the run asks for.

    Args:
        asked: the run's ``model.tokenizer``.

    Raises:
        MinitronError: the run's section asks for what is not allowed or not there; neither has one.
    """
    folder = choose(reader, asked, "model.tokenizer")
    if folder is None:
        named = reader.named_tokenizer()
        where = (
            f"; the tokenizer that it names, '{named}', is opened only where a key of yours says so" if named else ""
        )
        raise MinitronError(
            f"{reader.path} carries no tokenizer{where}: give its Hugging Face name, a folder or a .nemo, "
            "model.tokenizer.type=..., or a sentencepiece file, model.tokenizer.model=..."
        )
    return folder


def _tokenizer_section(folder: Path) -> dict[str, Any]:
    """All that NeMo is told of a tokenizer: one of two libraries, and files of ours."""
    if library_of(folder) == "sentencepiece":
        return {"library": "sentencepiece", "type": None, "model": str(folder / SENTENCEPIECE)}
    return {"library": "huggingface", "type": str(folder), "model": None, "use_fast": True, "trust_remote_code": False}


def _check_stages(cfg: DictConfig, layers: int, stages: int) -> None:
    """Every pipeline stage whose layers are not given must get as many as the others, and at least one."""
    if cfg.get("virtual_pipeline_model_parallel_size") is not None:
        raise MinitronError(
            f"model.virtual_pipeline_model_parallel_size={cfg.virtual_pipeline_model_parallel_size}: only null is "
            "supported; a stage here is one piece"
        )
    ends = {name: cfg.get(f"num_layers_in_{name}_pipeline_stage") for name in ("first", "last")}
    given = [int(number) for number in ends.values() if number]
    rest, others = layers - sum(given), stages - len(given)
    if given and (rest != 0 if others == 0 else others < 0 or rest < others or rest % others):
        names = ", ".join(f"model.num_layers_in_{name}_pipeline_stage={n}" for name, n in ends.items() if n)
        raise MinitronError(
            f"{names}: leaves {rest} of {layers} layers for {max(0, others)} of "
            f"model.pipeline_model_parallel_size={stages} stages, which cannot share them equally"
        )


def _set_batch_sizes(cfg: DictConfig, run: DictConfig | dict[str, Any], data_parallel: int) -> None:
    """A run that trains says its global batch; one that only runs forward has one micro-batch per rank."""
    micro = int(run.get("micro_batch_size") or 1)
    if run.get("global_batch_size") == 0:  # a second model in a job: micro-batches have been counted
        cfg.micro_batch_size, cfg.global_batch_size = micro, None
        return
    whole = int(run.get("global_batch_size") or micro * data_parallel)
    if whole % (micro * data_parallel):
        raise MinitronError(
            f"model.global_batch_size ({whole}) must be a multiple of model.micro_batch_size ({micro}) x "
            f"{data_parallel} data-parallel ranks"
        )
    cfg.micro_batch_size, cfg.global_batch_size = micro, whole


def _same(asked: Any, found: Any) -> bool:
    if isinstance(asked, str) and isinstance(found, str):
        return asked.lower() == found.lower()
    if isinstance(asked, (int, float)) and isinstance(found, (int, float)):
        return float(asked) == float(found)
    return asked == found or (not asked and not found)


def job_config(reader: NemoReader, run: DictConfig | dict[str, Any]) -> tuple[DictConfig, tuple[int, int]]:
    """Config of a checkpoint's model on this job, and its (TP, PP): all that can be wrong without reading a weight.

    Raises:
        MinitronError: architecture override; no tokenizer; sequence or batch sizes that contradict; a grid that does
            not fit the model or the processes of the job; a sequence longer than the window; context parallelism.
    """
    run = run or {}
    cfg = merge_config(reader.config, run, reader.path)
    cfg.tokenizer = _tokenizer_section(tokenizer_folder(reader, run.get("tokenizer")))
    grid = (cfg.get("tensor_model_parallel_size", 1) or 1, cfg.get("pipeline_model_parallel_size", 1) or 1)
    multiple = cfg.get("make_vocab_size_divisible_by", 128) * grid[0]
    padded = -(-reader.shape.vocab_size // multiple) * multiple
    reader.shape.replace(padded_vocab_size=padded).check_parallel(*grid)
    if cfg.get("num_layers_in_last_pipeline_stage") is None:
        given = cfg.get("num_layers_in_first_pipeline_stage")
        cfg.num_layers_in_first_pipeline_stage = given or reader.shape.first_stage_layers(grid[1])
    _check_stages(cfg, reader.shape.num_layers, grid[1])
    length = cfg.get("encoder_seq_length") or 0
    reader.shape.check_window(length, f"{reader.path}: model.data.seq_length")
    if cfg.get("sequence_parallel") and length % grid[0]:
        raise MinitronError(
            f"the sequence length ({length}) must be a multiple of model.tensor_model_parallel_size ({grid[0]}) under "
            "model.sequence_parallel"
        )
    if cfg.get("context_parallel_size", 1) not in (None, 1):
        raise MinitronError(
            f"model.context_parallel_size={cfg.context_parallel_size}: only 1 is supported; the losses and "
            "statistics here are not defined over split sequences"
        )
    runtime.check_world_size(*grid)
    _set_batch_sizes(cfg, run, runtime.world_size() // (grid[0] * grid[1]))
    return cfg, grid


def load_model(
    path: str | Path,
    trainer: Trainer,
    run: DictConfig | dict[str, Any] | None = None,
    cls: type[MinitronGPTModel] | None = None,
) -> MinitronGPTModel:
    """Build the model of a ``.nemo`` on this process's grid and load its weights.

    Args:
        path: ``.nemo`` file or folder, written at any grid.
        trainer: Lightning trainer with our strategy (:mod:`nemo_minitron.nemo.trainer`).
        run: the run's ``model`` section: parallel sizes, batch sizes, data, optim, precision.
        cls: model class, :class:`MinitronGPTModel` by default.

    Raises:
        MinitronError: unreadable checkpoint, architecture override, or a grid that does not fit (before any weight
            is read).
    """
    runtime.prepare()
    path = Path(path)
    with NemoReader(path) as reader:
        cfg, grid = job_config(reader, run or {})
        runtime.init_distributed(*grid, seed=int(cfg.get("seed") or SEED))
        from nemo_minitron.nemo.model import MinitronGPTModel

        model = (cls or MinitronGPTModel)(cfg, trainer)
        model.shape = reader.shape
        model.checkpoint_config = reader.config
        model.storage_dtype = reader.dtype
        model.tokenizer_folder = Path(cfg.tokenizer.type or Path(cfg.tokenizer.model).parent)
        from nemo_minitron.nemo import weights

        weights.load(model, reader)
    return model
