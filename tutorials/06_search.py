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
# # 6 · The best shape for a budget
#
# The notebooks before chose their shapes by hand. `minitron search` chooses by evidence: it counts every shape that the
# budget allows, predicts from the scores what each would lose, measures the best of them without training, and distils
# the best of these for a few steps.

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import matplotlib.pyplot as plt
import yaml
from IPython.display import Image, display
from workspace import Workspace

workspace = Workspace(MODEL)
RUN, minitron = workspace.folder, workspace.minitron
workspace.needs("02_teacher_finetuning", "03b_width_pruning")  # runs them if their files are not there

# %% [markdown]
# ## Search
#
# The budget is the size of the student of [03b](03b_width_pruning.ipynb), whose shape is given as a rival
# (`search.shapes`): it goes through every round beside the others. With two cores few shapes are measured and the
# trainings are short; the defaults measure several times as many. A search that was stopped goes on where it was.

# %%
if MODEL == "tiny":
    BUDGET, HIDDEN, FFN, LENGTH, BATCH, RATE = "200e3", 48, 128, 64, 16, 5e-3
    EFFORT = "search.probes=[0.3] search.measure=3 search.validate=2 search.finalists=2 search.distill_steps=20"
else:
    BUDGET, HIDDEN, FFN, LENGTH, BATCH, RATE = "113.6e6", 512, 1408, 256, 4, 1e-4
    EFFORT = """search.probes=[] search.measure=2 search.validate=1 search.finalists=2 search.distill_steps=6
        search.tokens=2048"""
DATA = "{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}"

printed = minitron(f"""
    search scores=scores output_path=search model.restore_from_path=corrected.nemo budget.num_parameters={BUDGET}
    search.shrink=[num_layers,hidden_size,ffn_hidden_size] {EFFORT}
    'search.shapes=[{{hidden_size: {HIDDEN}, ffn_hidden_size: {FFN}}}]'
    evaluate.data_prefix=data/validation_text_document evaluate.seq_length={LENGTH} evaluate.micro_batch_size={BATCH}
    'model.data.data_prefix={DATA}' model.data.seq_length={LENGTH}
    model.micro_batch_size={BATCH} model.global_batch_size={BATCH}
    model.optim.lr={RATE} model.optim.sched.min_lr={RATE / 10}
""")

# %% [markdown]
# ## Can the prediction be trusted?
#
# Measured against predicted loss; on the dotted line both agree. `probe` are the shapes that the prediction was fitted
# to (one size cut at a time), `validation` shapes that were drawn only to judge it by.

# %%
display(Image(RUN / "search/prediction.png", width=420))

# %% [markdown]
# ## Loss against each cost
#
# The line is the Pareto front by prediction: no shape is predicted to be both smaller and better. Points above it lose
# more than was predicted.

# %%
display(Image(RUN / "search/pareto.png", width=1000))

# %% [markdown]
# ## What to choose
#
# `candidates.yaml` has every candidate with its losses and its plan.

# %%
found = yaml.safe_load((RUN / "search/candidates.yaml").read_text())
candidates = [one for one in found["candidates"] if "zero_shot" in one and one["role"] != "probe"]


def label(one):
    shape = f"{one['num_layers']} layers, hidden {one['hidden_size']}, ffn {one['ffn_hidden_size']}"
    return f"{shape}  ({one['num_parameters'] / 1e6:.4g}M, {one['role']})"


figure, axis = plt.subplots(figsize=(10, 0.55 * len(candidates) + 1.2))
rows = range(len(candidates))
axis.scatter([one["zero_shot"] for one in candidates], rows, color="#bbbbbb", s=50, label="before training")
trained = [(one["distilled"][-1], row) for row, one in enumerate(candidates) if "distilled" in one]
axis.scatter(*zip(*trained, strict=True), color="#1e6fb3", s=50, label="after its last round")
axis.axvline(found["source"]["loss"], color="#b3541e", linewidth=1, label="teacher")
axis.set_yticks(rows, [label(one) for one in candidates], fontsize=9)
axis.invert_yaxis()
axis.grid(axis="y", color="#eeeeee")
axis.set_axisbelow(True)
axis.set(xlabel="held-out loss, nats/token", title=f"candidates for {float(BUDGET) / 1e6:.4g}M parameters, best first")
axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.5 / len(candidates) - 0.12), ncols=3, frameon=False)
figure.tight_layout()

winner = candidates[0]
given = next(one for one in candidates if one["role"] == "given")
print("best:", label(winner))
if winner is given:
    print("no other shape was better after the same training than the one of 03b")
else:
    print(f"its loss is {winner['distilled'][-1]:.3f}, that of the shape of 03b {given['distilled'][-1]:.3f}, "
          "after the same training" if len(winner["distilled"]) == len(given["distilled"]) else "")  # fmt: skip

# %% [markdown]
# Grey points are what pruning leaves, blue ones what a short training makes of it; candidates without a blue point were
# out before. Differences between close rows are smaller than what a longer training or another text would change, and
# short trainings favour shapes that lose little at once: a reason to keep the second best as well. The winner's plan
# makes the student for the long distillation of [04b](04b_distilling_width.ipynb): `minitron prune …
# prune.scores=scores prune.plan=search/plans/NAME.yaml`.
#
# ## The same with Llama-3.1-8B on eight GPUs
#
# `minitron_4b_width`'s shape is the rival:
#
# ```console
# $ DATA='{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}'
# $ GPUS='trainer.devices=8 trainer.precision=bf16 model.tensor_model_parallel_size=8 model.sequence_parallel=true'
# $ minitron search scores=scores output_path=search model.restore_from_path=corrected.nemo \
#     budget.num_parameters=4.5e9 'search.shapes=[{hidden_size: 3072, ffn_hidden_size: 9216}]' \
#     "model.data.data_prefix=$DATA" model.data.seq_length=8192 model.micro_batch_size=1 model.global_batch_size=128 \
#     evaluate.data_prefix=data/validation_text_document evaluate.seq_length=8192 $GPUS
# ```
