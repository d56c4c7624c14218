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
# from the same forward passes, and the published method cuts the units that score least (arXiv 2407.14679). What is
# kept was made for inputs that are now gone; re-solving it in closed form repairs much of that before any training.

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import matplotlib.pyplot as plt
import numpy as np
from workspace import Workspace

from nemo_minitron.prune.plan import Plan

workspace = Workspace(MODEL)
RUN, minitron = workspace.folder, workspace.minitron
workspace.needs("02_teacher_finetuning")  # runs it if its files are not there

if MODEL == "tiny":
    SAMPLES, LENGTH, BATCH, HIDDEN, FFN = 64, 64, 16, 48, 128
else:
    SAMPLES, LENGTH, BATCH, HIDDEN, FFN = 24, 256, 4, 512, 1408  # as many parameters as 24 whole layers

# %% [markdown]
# ## What each unit is worth
#
# The same command as for depth; where that was run, its scores are found again. A neuron's score is how large its
# activation gets: the mean over a sample's tokens, the L2 norm over samples.

# %%
minitron(f"""
    importance model.restore_from_path=corrected.nemo output_path=scores
    calibration.data_prefix=data/train_text_document calibration.num_samples={SAMPLES}
    calibration.seq_length={LENGTH} calibration.micro_batch_size={BATCH}
""")

# %%
arrays = np.load(RUN / "scores/arrays.npz")
scores = {axis: arrays[f"rankings/minitron/{axis}"] for axis in ("ffn", "heads", "hidden")}
figure, panels = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=(2, 1.2, 1.2), layout="constrained")
left, middle, right = panels
layers, width = scores["ffn"].shape
ranked = np.sort(scores["ffn"], axis=1)[:, ::-1]
image = left.imshow(np.log10(ranked + 1e-12), aspect="auto", cmap="viridis", extent=(0, width, layers + 0.5, 0.5),
                    interpolation="nearest")  # fmt: skip
left.axvline(FFN, color="white", linestyle="--", linewidth=1)
left.text(FFN, 0.45, "kept | cut", ha="center", va="bottom", fontsize=8)
left.set(xlabel="FFN neuron, best first in every layer", ylabel="layer")
left.set_title("FFN", loc="left")
figure.colorbar(image, ax=left, label="log10 of the score")
image = middle.imshow(scores["heads"], aspect="auto", cmap="viridis", interpolation="nearest",
                      extent=(0.5, scores["heads"].shape[1] + 0.5, layers + 0.5, 0.5))  # fmt: skip
middle.set(xlabel="head", ylabel="layer", title="heads, all kept")
figure.colorbar(image, ax=middle, label="score")
for axis in (left.yaxis, middle.xaxis, middle.yaxis):
    axis.get_major_locator().set_params(integer=True)
hidden = np.sort(scores["hidden"])[::-1]
right.plot(hidden, color="#1e6fb3", label="score")
right.axvline(HIDDEN, color="grey", linestyle=":", label="kept to the left")
right.set(xlabel="hidden channel, best first", ylabel="score", title="hidden channels")
right.legend(fontsize=8)
right.set_yscale("log" if hidden[0] > 10 * hidden[-1] else "linear")

# %% [markdown]
# ## Two students of the same shape
#
# `prune.compensate=false` cuts rows and columns and leaves the rest as it was. By default the kept weights are
# re-solved on the calibration tokens that the scores hold, units are ranked by the loss that is left after that, and
# the stream is turned before channels are cut, so that what goes is not single channels but the directions with the
# least energy.

# %%
for name, choice in (("cut", "prune.compensate=false"), ("pruned", "")):
    minitron(f"""
        prune model.restore_from_path=corrected.nemo prune.scores=scores prune.hidden_size={HIDDEN}
        prune.ffn_hidden_size={FFN} {choice} export.save_path=width/{name}.nemo
    """)

# %% [markdown]
# ## The plan
#
# Kept indices of every axis and, where weights are re-solved, how. The same scores and sizes give the same file, byte
# for byte.

# %%
lines = (RUN / "width/pruned.plan.yaml").read_text().splitlines()
for line in [*lines[lines.index("target:") :][:14], "  ...", *lines[lines.index("compensation:") :]]:
    print(line[:100] + (" ..." if len(line) > 100 else ""))

plans = {name: Plan.load(RUN / f"width/{name}.plan.yaml") for name in ("cut", "pruned")}
shared = [len(set(a) & set(b)) / FFN for a, b in zip(plans["cut"].ffn, plans["pruned"].ffn, strict=True)]
print(f"\nof the neurons that one ranking keeps, the other keeps {min(shared):.0%} to {max(shared):.0%}, by layer")

# %% [markdown]
# ## What each costs before any training

# %%
for name in ("cut", "pruned"):
    minitron(f"""
        evaluate model.restore_from_path=width/{name}.nemo evaluate.data_prefix=data/validation_text_document
        evaluate.seq_length={LENGTH} evaluate.micro_batch_size={BATCH} output_path=width/evaluation/{name}.json
    """)

# %%
teacher = workspace.read("evaluation/teacher.json")["val_loss"]
losses = {name: workspace.read(f"width/evaluation/{name}.json")["val_loss"] for name in plans}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(1, 1.4))
bars = left.bar(["cut only", "re-solved"], list(losses.values()), color=["#bbbbbb", "#1e6fb3"], width=0.6)
left.bar_label(bars, fmt="%.3f")
left.axhline(teacher, color="#b3541e", linewidth=1, label=f"teacher, {teacher:.3f}")
low, high = min([teacher, *losses.values()]), max(losses.values())
left.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
left.set(ylabel="loss, nats/token (axis is cut)", title="held-out text, before training")
left.legend(fontsize=8)
right.plot(range(1, layers + 1), [100 * share for share in shared], "o-", color="#1e6fb3", label="kept by both")
right.axhline(100 * FFN / width, color="grey", linestyle=":", label="by chance")
right.set(xlabel="layer", ylabel="share of the kept neurons, %", ylim=(0, 103), title="do both rankings keep the same?")
right.xaxis.get_major_locator().set_params(integer=True)
right.legend(fontsize=8)
figure.tight_layout()
changes = [f"{name} {loss:.3f} ({loss - teacher:+.3f})" for name, loss in losses.items()]
print("; ".join([f"teacher {teacher:.3f}", *changes]))

# %% [markdown]
# The left shows what the cut alone costs, and what is left of that cost once the same shape is re-solved; both students
# have the same size and run equally fast. The right shows that they keep partly different neurons: activation size says
# which neuron is large, the other ranking which one the rest cannot stand in for. Calibration and validation text are
# of the same kind here; on text that nothing was calibrated on, re-solved students can be the worse ones (see the
# [page on pruning](../docs/pruning.md#calibration)).
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
