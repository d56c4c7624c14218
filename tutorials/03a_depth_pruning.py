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
# A student with fewer layers. Which ones can go? Two answers: *Block Influence*, how much a layer turns the stream that
# passes through it (arXiv 2403.03853), and the *loss without it*, which costs more forward passes and asks what counts.

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import re

import matplotlib.pyplot as plt
import numpy as np
import yaml
from matplotlib.patches import Patch
from workspace import Workspace

workspace = Workspace(MODEL)
RUN, minitron = workspace.folder, workspace.minitron
workspace.needs("02_teacher_finetuning")  # runs it if its files are not there

if MODEL == "tiny":
    SAMPLES, LENGTH, BATCH, KEEP, TOKENS = 64, 64, 16, 2, 4096
else:
    SAMPLES, LENGTH, BATCH, KEEP, TOKENS = 24, 256, 4, 24, 1024

# %% [markdown]
# ## What each unit is worth
#
# Forward passes over calibration text; nothing is trained. One folder of scores serves for depth and for width.

# %%
minitron(f"""
    importance model.restore_from_path=corrected.nemo output_path=scores
    calibration.data_prefix=data/train_text_document calibration.num_samples={SAMPLES}
    calibration.seq_length={LENGTH} calibration.micro_batch_size={BATCH}
""")

# %% [markdown]
# ## Three students of the same size
#
# By Block Influence and cut only, which is the published method; by Block Influence with the weights around each gap
# re-solved, so that they stand in for what is gone; and re-solved with the layers chosen by loss, one after the other
# (`layer_selection=greedy`): in each round the layer goes without which the calibration loss is least.

# %%
students = {
    "cut": "prune.compensate=false",
    "block_influence": "",
    "pruned": f"prune.layer_selection=greedy prune.layer_tokens={TOKENS}",
}
printed = {}
for name, choice in students.items():
    printed[name] = minitron(f"""
        prune model.restore_from_path=corrected.nemo prune.scores=scores prune.num_layers={KEEP} {choice}
        export.save_path=depth/{name}.nemo
    """)

# %% [markdown]
# ## The plan
#
# The plan file says what is kept, by index, and nothing about machines or times: the same scores and sizes give the
# same file, byte for byte. It can be read, changed, and applied again with `prune.plan=FILE`.

# %%
lines = (RUN / "depth/pruned.plan.yaml").read_text().splitlines()
keep = lines.index("keep:")
for line in [*lines[lines.index("target:") : keep + 5], "    ...", *lines[lines.index("compensation:") :]]:
    print(line[:100] + (" ..." if len(line) > 100 else ""))

# %% [markdown]
# ## What each choice costs before any training

# %%
for name in students:
    minitron(f"""
        evaluate model.restore_from_path=depth/{name}.nemo evaluate.data_prefix=data/validation_text_document
        evaluate.seq_length={LENGTH} evaluate.micro_batch_size={BATCH} output_path=depth/evaluation/{name}.json
    """)

# %%
influence = np.load(RUN / "scores/arrays.npz")["block_influence"]
total = len(influence)


def removed(name):
    """Layers that a student lacks, counted from 1, from its plan."""
    kept = yaml.safe_load((RUN / f"depth/{name}.plan.yaml").read_text())["keep"]["layers"]
    ranges = [[int(n) for n in piece.split("-")] for piece in str(kept).split()]
    return sorted(set(range(1, total + 1)) - {layer + 1 for r in ranges for layer in range(r[0], r[-1] + 1)})


by_influence, by_loss = removed("block_influence"), removed("pruned")
teacher = workspace.read("evaluation/teacher.json")["val_loss"]
losses = {name: workspace.read(f"depth/evaluation/{name}.json")["val_loss"] for name in students}
steps = re.findall(r"without layers ([\d, ]+): loss \S+ \(([+-][\d.]+)\)", printed["pruned"])

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), width_ratios=(1.5, 1, 1))
colours = ["#b3541e" if layer in by_influence else "#9dbbd6" for layer in range(1, total + 1)]
left.bar(range(1, total + 1), influence, color=colours)
(triangles,) = left.plot(by_loss, np.full(len(by_loss), -0.04 * influence.max()), "k^", markersize=5)
left.set(xlabel="layer", ylabel="Block Influence, 1 - cosine", title="what a layer does to the stream")
left.xaxis.get_major_locator().set_params(integer=True)
left.legend([Patch(color="#b3541e"), triangles], ["removed by Block Influence", "removed by loss"], fontsize=8)
middle.plot(range(len(steps) + 1), [0, *(float(more) for _, more in steps)], "o-", color="#1e6fb3", label="by loss")
middle.set(xlabel="layers removed", ylabel="loss above the teacher's, nats/token", title="calibration text, one by one")
middle.xaxis.get_major_locator().set_params(integer=True)
middle.legend(fontsize=8)
names = {"cut": "influence,\ncut only", "block_influence": "influence,\nre-solved", "pruned": "by loss,\nre-solved"}
bars = right.bar(list(names.values()), [losses[name] for name in names], color=["#bbbbbb", "#9dbbd6", "#1e6fb3"])
right.bar_label(bars, fmt="%.3f", fontsize=8)
right.axhline(teacher, color="#b3541e", linewidth=1, label=f"teacher, {teacher:.3f}")
low, high = min([teacher, *losses.values()]), max(losses.values())
right.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
right.set(ylabel="loss, nats/token (axis is cut)", title=f"held-out text, {KEEP} of {total} layers")
right.legend(fontsize=8)
figure.tight_layout()

changes = [f"{name} {loss:.3f} ({loss - teacher:+.3f})" for name, loss in losses.items()]
print("; ".join([f"teacher {teacher:.3f}", *changes]))
print("removed by Block Influence:", *by_influence, " by loss:", *by_loss)

# %% [markdown]
# On the left, both choices over the same scores: where the triangles are not below the coloured bars, a layer that
# turns the stream little matters to the loss all the same, or the other way round. The middle shows the price of each
# further layer on the text that the choice was made on; the right shows the three students on text that nobody has
# seen, which is what counts. The student that goes on to distillation is the one on the right, `depth/pruned.nemo`,
# whichever bar is lowest here: with few calibration tokens the order of close ones is chance.
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
