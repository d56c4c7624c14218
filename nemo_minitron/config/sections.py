"""Sections of our own: what stands below ``prune``, ``distill``, ``calibration``, … in a command's config.

Every default that is ours stands here or in :mod:`nemo_minitron.config.schema`, and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.keys import REQUIRED, SEED, key, known, section
from nemo_minitron.config.layer_selection import LAYER_SELECTIONS
from nemo_minitron.registry import LOSSES, METRICS

TOKENIZER_LIBRARIES = ("huggingface", "sentencepiece")
ON_BAD_RECORD = ("stop", "skip")
DOCUMENTS = ("article", "line", "file")
"""What becomes one document of a text (:class:`nemo_minitron.data.sources.Source`)."""
HELDOUT_PARTS = ("train", "heldout")
LOSS_ON = ("responses", "all")
"""Which tokens of a conversation a loss counts (:mod:`nemo_minitron.data.chat`)."""
GROUP_SELECTIONS = ("ranking", "loss")
HIDDEN_LOSSES = ("cosine", "mse")
"""Distances between hidden states (:mod:`nemo_minitron.distill.hidden`)."""


@dataclass
class Tokenizer:
    library: str = key("huggingface", "tokenizer family, as NeMo names it", TOKENIZER_LIBRARIES)
    type: str | None = key(None, "HF tokenizer: its name, a folder, or a .nemo that holds one")
    model: str | None = key(None, "SentencePiece tokenizer.model file")
    split_special_tokens: bool = key(False, "take <|endoftext|> and the like in a text as text, not as control tokens")


@dataclass
class Dataset:
    name: str | None = key(None, "data set, where `input` does not say it: pydoc_topics, brown, or a name on HF's hub")
    config: str | None = key(None, "its configuration, for instance wikitext-103-v1; a subfolder of a local folder")
    split: str | None = key(None, "split to read where there are splits; train when null")


@dataclass
class Chat:
    loss_on: str = key("responses", "tokens of a conversation that a loss counts: the assistant's, or all", LOSS_ON)


@dataclass
class Calibration:
    data_prefix: Any = key(None, "preprocessed .bin/.idx prefix, or a weighted list of them as NeMo takes")
    path: str | None = key(None, "text instead of a prefix, as preprocess.input, tokenized with the model's tokenizer")
    on_bad_record: str = key("stop", "of calibration.path: as preprocess has it", ON_BAD_RECORD)
    split_special_tokens: bool = key(False, "of calibration.path: as preprocess's tokenizer.split_special_tokens")
    num_samples: int = key(1024, "token blocks drawn, shuffled, without padding")
    seq_length: int | None = key(None, "tokens per block; the model's own length when null")
    micro_batch_size: int = key(1, "blocks per forward pass")
    seed: int = key(SEED, "seed of the drawing")
    reconstruction: bool = key(True, "also rank units by what is lost once the others are re-solved; for compensation")
    reconstruction_tokens: int = key(65536, "tokens that serve for that and are kept for compensation")
    own_samples: int | None = key(
        None, "blocks that the model writes itself, kept beside those, for text unlike them; as many again when null"
    )


@dataclass
class Importance:
    stream: bool = key(False, "read the checkpoint layer by layer instead of building the model: any size, any machine")
    metrics: list[str] = key([], "further metrics to rank by, beside minitron and reconstruction", METRICS.names)


@dataclass
class Serving:
    """What is to serve the student; nothing of it is asked for where all is null."""

    tensor_parallel: int | None = key(None, "GPUs that vLLM, SGLang or TensorRT-LLM will split the student over")
    row_multiple: int | None = key(None, "what rows of weights are to be a multiple of: 256 for llama.cpp's K-quants")
    fp8: bool = key(False, "weights in FP8 by Marlin's kernels: 64 x 16 on each GPU")


@dataclass
class Prune:
    hidden_size: int | None = key(None, "hidden channels to keep")
    ffn_hidden_size: int | None = key(None, "FFN neurons to keep in every layer")
    num_attention_heads: int | None = key(None, "query heads to keep (kv_channels never changes)")
    num_query_groups: int | None = key(None, "query groups (KV heads) to keep; heads go with their group")
    num_layers: int | None = key(None, "layers to keep, chosen by prune.layer_selection")
    drop_layers: list[int] = key([], "layers to remove by number, 1-indexed as NeMo's")
    layer_selection: str = key(
        "block_influence",
        "how prune.num_layers chooses layers: by scores, or by the loss without them, alone, as a block or one by one",
        tuple(LAYER_SELECTIONS),
    )
    layer_tokens: int = key(6144, "tokens on which layers and query groups are chosen by loss, half of them said twice")
    group_selection: str = key(
        "ranking", "how query groups are chosen: by prune.ranking, or by the loss without each", GROUP_SELECTIONS
    )
    beam_width: int = key(3, "of prune.layer_selection=beam: sets of layers that are kept at every size")
    scores: str | None = key(None, "scores folder of `minitron importance`; computed first when null and needed")
    compensate: bool | None = key(None, "re-solve the kept weights; when null: if the scores hold calibration tokens")
    rotate: bool | None = key(
        None, "turn the residual stream before hidden channels are cut; when null: if weights are re-solved"
    )
    ranking: str | None = key(
        None,
        "metric of the scores that units are ranked by; when null: reconstruction (loss once re-solved) where weights "
        "are re-solved, else minitron (arXiv 2407.14679)",
        METRICS.names,
    )
    calib_dataset: str | None = key(None, "calibration data when scores are computed here: .bin/.idx prefix or text")
    num_calib_size: int = key(1024, "calibration token blocks")
    calib_seq_length: int | None = key(None, "tokens per calibration block; the model's own length when null")
    calib_stream: bool = key(False, "as importance.stream")
    plan: str | None = key(None, "apply this plan file instead of making one")
    serving: Serving = section(Serving, "what is to serve the student: a shape that it would refuse is an error")


@dataclass
class Export:
    save_path: str = key(REQUIRED, "student .nemo to write")
    plan_path: str | None = key(None, "plan file to write; beside the student as NAME.plan.yaml when null")


@dataclass
class Distill:
    temperature: float = key(1.0, "softmax temperature tau; the loss is scaled by tau squared")
    kd_weight: float = key(1.0, "weight of the distillation term")
    lm_weight: float = key(0.0, "weight of the next-token cross-entropy")
    loss: str = key("forward_kl", "distillation term", LOSSES.names)
    jsd_beta: float = key(0.5, "of distill.loss=jsd: the teacher's share of the mixture; near 0 it is forward_kl")
    top_k: int = key(64, "of distill.loss=topk: the teacher's likeliest tokens; all others share one bucket")
    teacher_samples: int = key(12, "of distill.loss=sampled_kl: tokens drawn from the teacher's distribution")
    hidden_pairs: list[Any] = key([], "[student layer, teacher layer] pairs whose outputs are to agree, 1-indexed")
    hidden_loss: str = key("cosine", "distance of distill.hidden_pairs", HIDDEN_LOSSES)
    hidden_weight: float = key(1.0, "weight of the sum over distill.hidden_pairs")
    teacher_cache: str | None = key(
        None, "folder of a teacher's answers (distill.loss=sampled_kl or topk), written once"
    )
    loss_memory_mib: int | None = key(None, "most that heads and losses take beside gradients; 896 on GPU, else 384")
    monitor: str = key("val_loss", "loss of a validation, or val_top1_agreement, by which the best student is kept")


@dataclass
class LmEval:
    tasks: list[str] = key([], "tasks of lm-evaluation-harness: names, patterns, YAML files or folders of them")
    include_path: str | None = key(None, "folder of YAML files whose tasks and groups are known by name too")
    num_fewshot: int | None = key(None, "examples before every item; each task's own number when null")
    limit: float | None = key(None, "items of every task, a share of them below 1; all of them when null")
    batch_size: int = key(1, "requests per forward pass")
    log_samples: bool = key(False, "also write every item's answers to NAME.samples.jsonl beside output_path")


@dataclass
class Evaluate:
    perplexity: bool = key(True, "loss on evaluate.data_prefix")
    data_prefix: str | None = key(None, "held-out .bin/.idx prefix; needed for perplexity")
    seq_length: int | None = key(2048, "tokens per block; the model's own length when null")
    num_samples: int | None = key(None, "blocks to read; all of them when null")
    micro_batch_size: int = key(1, "blocks per forward pass")
    throughput: bool = key(False, "time prefill and decode apart, with a key-value cache")
    batch_size: int = key(1, "of throughput: sequences that each replica of the model serves together")
    prefill_tokens: int = key(512, "of throughput: length of the prompt, read in one pass")
    decode_tokens: int = key(32, "of throughput: tokens made after it, one by one")
    repeats: int = key(3, "of throughput: runs whose median is told, after one that warms up")
    energy: bool = key(False, "joules per token of both, where the machine counts them (RAPL, NVML)")
    lm_eval: LmEval = section(LmEval, "tasks of EleutherAI's lm-evaluation-harness")


@dataclass
class EvaluateData(Evaluate):
    data_prefix: str | None = key(None, "held-out .bin/.idx prefix")  # type: ignore[assignment]


@dataclass
class Inference:
    greedy: bool = key(False, "take the likeliest token each time instead of drawing one")
    temperature: float = key(0.7, "of the softmax that tokens are drawn from; 0 is greedy as well")
    top_k: int = key(0, "draw from this many of the likeliest tokens; from all when 0")
    top_p: float = key(0.9, "draw from the likeliest tokens that together have this probability; from all when 1")
    repetition_penalty: float = key(1.0, "above 1 makes tokens less likely that are there already")
    add_BOS: bool | None = key(None, "begin a prompt with the BOS token; as the tokenizer does when null")
    tokens_to_generate: int = key(256, "most tokens of an answer; fewer where the model has no more positions")


@dataclass
class Budget:
    num_parameters: float | None = key(None, "most parameters, a nominal size: 4.5e9, 100e6")
    memory_gib: float | None = key(None, "most memory of weights and KV cache")
    latency_ms: float | None = key(None, "longest decoding step on this device, modelled from its measured rates")
    batch_size: int = key(1, "sequences decoded at a time, for memory and latency")
    seq_length: int | None = key(None, "tokens of each in the KV cache; 2048, or the model's own length, when null")
    bytes_per_value: int = key(2, "of weights and KV cache: 2 for bf16")
    tolerance: float = key(0.005, "share by which budget.num_parameters may be exceeded")


@dataclass
class Search:
    shrink: list[str] = key(
        ["num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "num_attention_heads"],
        "sizes that may become smaller; heads within their group",
    )
    hidden_step: int | None = key(None, "hidden sizes are multiples of it; 128, or less for small models, when null")
    ffn_step: int | None = key(None, "the same for FFN sizes")
    layers_step: int = key(1, "the same for numbers of layers")
    groups_step: int = key(1, "the same for query groups")
    min_fraction: float = key(0.25, "least share of each size that is tried")
    until: str = key("distill", "last stage: predict needs scores alone", ("predict", "zero_shot", "distill"))
    probes: list[float] = key([0.15, 0.35], "shares cut of one size at a time, measured to fit the prediction")
    measure: int = key(12, "best predicted shapes whose zero-shot loss is measured")
    validate: int = key(8, "further shapes measured, drawn from all that use the budget, to judge the prediction by")
    spread: float = key(0.1, "least difference between measured shapes in some size, as a share")
    finalists: int = key(4, "best measured shapes that are distilled; half of them go on for twice the steps, …")
    distill_steps: int = key(20, "steps of the first round of distillation")
    shapes: list[Any] = key([], "shapes of your own to rank and measure as well, {hidden_size: …, ffn_hidden_size: …}")
    layer_selection: str = key(
        "block_influence",
        "how layers are chosen; greedy: by one search by loss, which also predicts what depth costs",
        tuple(name for name, selection in LAYER_SELECTIONS.items() if selection.in_search),
    )
    group_selection: str = key("ranking", "as prune.group_selection, once for all students", GROUP_SELECTIONS)
    layer_tokens: int = key(6144, "as prune.layer_tokens, for layers by greedy and for query groups by loss")
    compensate: bool | None = key(None, "as prune.compensate")
    tokens: int | None = key(None, "calibration tokens that students are re-solved on; those in the scores when null")
    keep_students: bool = key(False, "keep the students that are not distilled; plans are kept in any case")
    serving: Serving = section(Serving, "what is to serve the student: shapes that it would refuse are left out")


@dataclass
class Recipe:
    """A file of ``conf/recipe/``: the stages of a run in their order."""

    name: str = key(REQUIRED, "name of the recipe")
    description: str = key("", "one line on what it does")
    settings: dict[str, Any] = known(None, "values that several stages share, meant to be changed")
    order: list[str] = key([], "names of the stages to walk, in their order")
    stages: dict[str, Any] = known(None, "stage name to Stage")
    roles: dict[str, str] = key({}, "teacher, pruned and distilled: the JSON that `evaluate` wrote for each")


@dataclass
class Stage:
    """One stage of a recipe: a command of ours with its configuration."""

    command: str = key(REQUIRED, "command to run")
    config: dict[str, Any] = known(None, "the command's keys")
    overrides: list[str] = key([], "Hydra overrides on top, for instance prune=minitron_4b_width")
    inputs: list[str] = key([], "files, folders or patterns it reads: their content decides whether it is up to date")
    outputs: list[str] = key([], "files or folders it writes")
    work: str | None = key(None, "folder of its own for checkpoints; emptied before a start that is not a resumption")


@dataclass
class Cluster:
    """A Slurm job: every command takes it as ``+cluster=slurm cluster.KEY=…``."""

    nodes: int | None = key(None, "machines; trainer.num_nodes when null")
    ntasks_per_node: int | None = key(None, "processes on each; trainer.devices when null")
    gpus_per_node: int | None = key(None, "GPUs on each, 0 for none; as many as processes when null")
    partition: str | None = key(None, "partition to queue in")
    account: str | None = key(None, "account to charge")
    time_limit: str | None = key(None, "longest run, [DAYS-]HOURS:MINUTES:SECONDS")
    job_name: str | None = key(None, "name of the job and of its files; minitron-COMMAND when null")
    exclusive: bool = key(False, "share the machines with no other job")
    mem: str | None = key(None, "memory of each machine, for instance 200G; 0 takes all of it")
    dependency: str | None = key(None, "what to wait for, for instance afterok:1234")
    container_image: str | None = key(None, "image to run in (pyxis)")
    container_mounts: list[str] = key([], "FROM:TO folders to mount; the current one and cluster.folder always are")
    env: dict[str, Any] = known(None, "environment variables of the job")
    setup: list[str] = key([], "shell lines to run first on the first machine, for instance: module load cuda")
    sbatch_args: list[str] = key([], "further options of sbatch, for instance ['--qos=high']")
    srun_args: list[str] = key([], "further options of srun")
    python: str | None = key(None, "interpreter; this one when null, `python` in a container")
    folder: str = key("slurm", "where script, config, log and job number are written")
    dry_run: bool = key(False, "print the script and submit nothing")
    stages: dict[str, Any] = known(
        None, "of `run`: keys of the above for some stages or commands, {distill: {mem: 500G}}"
    )


@dataclass
class WithCluster:
    """The section's place in a command's config; not there unless asked for."""

    cluster: Cluster = section(Cluster, "Slurm job to submit")
