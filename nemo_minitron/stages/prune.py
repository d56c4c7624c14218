"""``minitron prune``: a plan of what to keep, and the student ``.nemo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nemo_minitron.checkpoint import NemoReader, NemoWriter
from nemo_minitron.checkpoint.archive import ArchiveWriter
from nemo_minitron.checkpoint.tokenizer_open import choose
from nemo_minitron.config.sections import Calibration
from nemo_minitron.errors import MinitronError, required
from nemo_minitron.files.staging import Staging
from nemo_minitron.importance.scores import Scores
from nemo_minitron.jobs.processes import notice
from nemo_minitron.model.shape import ModelShape
from nemo_minitron.prune.choose import LOSS_SELECTIONS, needs_scores, plan_from_scores, target_shape
from nemo_minitron.prune.cut import check_source, prune_checkpoint
from nemo_minitron.prune.plan import TARGETS, Plan, format_ranges


def run(cfg: DictConfig) -> Plan:
    """Prune ``model.restore_from_path`` into ``export.save_path`` and ``export.plan_path``.

    What is kept comes from ``prune.plan`` (applied as it is), or from the requested sizes with ``prune.scores``;
    without either, scores are computed first from ``prune.calib_dataset`` and kept beside the student as
    ``NAME.scores``. Layers named in ``prune.drop_layers`` need no scores.

    Where the scores hold calibration tokens, the kept weights are re-solved on them (``prune.compensate``); the plan
    says so, and is applied again with the same scores. Under any grid all processes share the samples.

    Raises:
        MinitronError: impossible, contradictory or empty requests, missing or foreign files and unwritable outputs,
            all before any weight is read; scores or a plan of other weights, before anything is written.
    """
    from nemo_minitron import runtime

    source, save_path = Path(required(cfg, "model.restore_from_path")), Path(required(cfg, "export.save_path"))
    name = save_path.name.removesuffix(".nemo")
    plan_path = Path(cfg.export.get("plan_path") or save_path.with_name(f"{name}.plan.yaml"))
    options: dict[str, Any] = OmegaConf.to_container(cfg.prune, resolve=True)  # type: ignore[assignment]
    if save_path.resolve() == source.resolve():
        raise MinitronError(f"export.save_path: '{save_path}' is the checkpoint that is read; choose another name")
    with NemoReader(source) as reader:
        plan = Plan.load(options["plan"], reader.shape) if options.get("plan") else None
        new = _new_shape(reader.shape, options, plan)
        tokenizer = choose(reader, cfg.model.get("tokenizer"), "model.tokenizer")
        if tokenizer is None:
            notice(
                f"{source} carries no tokenizer, and the student will not either; model.tokenizer.type=... gives one"
            )
        _check_grid(new, cfg.model)
        scores = Scores.load(options["scores"], reader.shape) if options.get("scores") else None
        calibration = None
        wanted = needs_scores(reader.shape, new, options.get("drop_layers")) or options.get("compensate")
        if plan is None and scores is None and wanted:
            calibration = _calibration(options, int(cfg.get("seed") or 1234))
        if runtime.rank() == 0:  # who writes; others would take its temporaries for leftovers
            _check_writable(save_path, plan_path)
        if calibration is not None:
            from nemo_minitron.nemo.scoring import measure_and_save

            scores_path = save_path.with_name(f"{name}.scores")
            stream, trainer = bool(options.get("calib_stream")), cfg.get("trainer") or {}
            scores = measure_and_save(source, scores_path, calibration, stream, cfg.model, trainer)
        if plan is None:
            precision = str((cfg.get("trainer") or {}).get("precision", 32))
            plan = _make(reader, options, scores, half=precision.startswith("bf16"))
        _check_compensation(plan, options, scores)
        if plan.compensation is not None or runtime.rank() == 0:
            _write(reader, plan, save_path, plan_path, scores, tokenizer)
        if runtime.rank() == 0:
            print(table(plan))
            print(f"student: {save_path}\nplan:    {plan_path}")
    return plan


def table(plan: Plan) -> str:
    """What the plan changes, for people: one row per size."""
    source, target = plan.source, plan.target
    sizes = [(size, getattr(source, size), getattr(target, size)) for size in ("num_layers", *TARGETS[:4])]
    sizes.append(("parameters", source.num_parameters(), target.num_parameters()))
    lines = [f"{'':<22}{'before':>16}{'after':>16}{'kept':>8}"]
    lines += [f"{size:<22}{old:>16,}{new:>16,}{new / old:>8.1%}" for size, old, new in sizes]
    dropped = sorted(set(range(1, source.num_layers + 1)) - {layer + 1 for layer in plan.layers})
    if dropped:
        lines.append(f"layers removed (counted from 1): {format_ranges(dropped)}")
    if plan.compensation is not None and plan.compensation.rotate:
        lines.append("residual stream turned onto its directions of most energy")
    lines.append("kept weights " + ("cut" if plan.compensation is None else "re-solved on the calibration tokens"))
    return "\n".join(lines)


def _new_shape(shape: ModelShape, options: dict[str, Any], plan: Plan | None) -> ModelShape:
    """The student's shape, from the plan or from the request, which exclude each other."""
    names = (*TARGETS, "drop_layers", *(("scores",) if plan is None or plan.compensation is None else ()))
    asked = [name for name in names if options.get(name)]
    if plan is not None and asked:
        raise MinitronError(f"prune.plan: says everything already; leave out prune.{', prune.'.join(asked)}")
    if plan is not None:
        return plan.target
    return target_shape(
        shape,
        {name: options.get(name) for name in TARGETS},
        options.get("drop_layers"),
        options.get("layer_selection") or "block_influence",
    )


def _check_grid(new: ModelShape, model: DictConfig) -> None:
    """The student must fit the grid that is asked for; the vocabulary is padded anew on every grid."""
    tensor, pipeline = (int(model.get(f"{kind}_model_parallel_size") or 1) for kind in ("tensor", "pipeline"))
    padded = -(-new.vocab_size // tensor) * tensor
    new.replace(padded_vocab_size=padded).check_parallel(tensor, pipeline)


def _calibration(options: dict[str, Any], seed: int) -> Calibration:
    dataset = options.get("calib_dataset")
    if not dataset:
        raise MinitronError(
            "prune.scores: this target needs scores; give a folder from `minitron importance`, or prune.calib_dataset "
            "to compute them"
        )
    is_prefix = not isinstance(dataset, str) or Path(f"{dataset}.idx").is_file()
    if not is_prefix and not Path(dataset).exists():
        raise MinitronError(f"prune.calib_dataset: found neither '{dataset}.idx' nor a text file '{dataset}'")
    return Calibration(
        data_prefix=dataset if is_prefix else None,
        path=None if is_prefix else dataset,
        num_samples=int(options.get("num_calib_size") or 1024),
        seq_length=options.get("calib_seq_length"),
        seed=seed,
    )


def _check_writable(save_path: Path, plan_path: Path) -> None:
    """Prove both destinations before the work starts; leaves nothing."""
    Staging(plan_path).abort()
    ArchiveWriter(save_path).abort()


def _make(reader: NemoReader, options: dict[str, Any], scores: Scores | None, half: bool) -> Plan:
    fingerprint = reader.fingerprint()
    if scores is not None:
        scores.check_matches(fingerprint, reader.shape)
    if options.get("compensate") and (scores is None or scores.tokens is None):
        raise MinitronError(
            "prune.compensate: the scores hold no calibration tokens to re-solve weights on; "
            "run `minitron importance calibration.reconstruction=true`, or set prune.compensate=false"
        )
    selection = options.get("layer_selection") or "block_influence"
    layers = options.get("num_layers") or reader.shape.num_layers
    if selection in LOSS_SELECTIONS and not options.get("drop_layers") and layers < reader.shape.num_layers:
        from nemo_minitron.prune.layers import drop_by_loss

        options = options | {"drop_layers": drop_by_loss(reader, selection, options, scores, half)}
    return plan_from_scores(reader.shape, fingerprint, options, scores)


def _check_compensation(plan: Plan, options: dict[str, Any], scores: Scores | None) -> None:
    """A plan that re-solves weights needs the tokens that it was made with, and no contradiction."""
    wanted = options.get("compensate")
    if plan.compensation is None:
        if wanted:
            raise MinitronError("prune.compensate: the plan asks for no compensation; make a new plan with it")
        return
    if wanted is False:
        raise MinitronError("prune.compensate: false asked, but the plan says that weights are re-solved")
    found = None if scores is None else scores.tokens_fingerprint()
    if found != plan.compensation.tokens:
        raise MinitronError(
            f"prune.scores: the plan re-solves weights on calibration tokens {plan.compensation.tokens[:16]}, "
            f"found {'none' if found is None else found[:16]}; give the scores folder that it was made with"
        )
    if plan.compensation.rotate and scores.stream_moment is None:  # type: ignore[union-attr]
        raise MinitronError("prune.scores: the plan turns the residual stream, but these scores lack 'stream_moment'")


def _write(
    reader: NemoReader, plan: Plan, save_path: Path, plan_path: Path, scores: Scores | None, tokenizer: Path | None
) -> None:
    """Student and plan appear together, or neither does; processes other than the first lend their samples only."""
    from nemo_minitron import runtime

    check_source(plan, reader)
    if runtime.rank() > 0:
        _fill(reader, plan, None, scores)
        return
    with (
        Staging(plan_path) as staging,
        NemoWriter(save_path, reader.config, plan.target, reader.dtype, tokenizer=tokenizer) as writer,
    ):
        staging.path.write_text(plan.to_yaml(), encoding="utf-8", newline="\n")
        _fill(reader, plan, writer, scores)


def _fill(reader: NemoReader, plan: Plan, writer: NemoWriter | None, scores: Scores | None) -> None:
    """Write the student's tensors, cut or re-solved."""
    if plan.compensation is None or scores is None:
        if writer is not None:
            prune_checkpoint(reader, plan, writer)
        return
    import torch
    from tqdm import tqdm

    from nemo_minitron import parallel, runtime
    from nemo_minitron.prune.resolve import compensate

    if runtime.world_size() > 1 and parallel.world() is None:  # the scores were given: nobody has met yet
        runtime.init_distributed()
    world = parallel.world()
    tokens = torch.from_numpy(scores.tokens.astype("int64"))  # type: ignore[union-attr]
    sensitivity = torch.tensor(scores.sensitivity)
    mine = slice(runtime.rank(), None, parallel.size(world))
    share, weights = tokens[mine].to(runtime.device()), sensitivity[:, mine].to(runtime.device())
    moment = torch.tensor(scores.stream_moment) if plan.compensation.rotate else None
    quiet = None if runtime.rank() == 0 else True
    with tqdm(total=plan.source.num_layers, desc="compensate", unit="layer", disable=quiet) as bar:
        compensate(
            reader,
            plan,
            share,
            weights,
            writer,
            stream_moment=moment,
            dtype=reader.dtype,
            group=world,
            progress=bar.update,
        )
