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

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import matplotlib.pyplot as plt
from workspace import Workspace

from nemo_minitron.report.curves import read_training

workspace = Workspace(MODEL)
RUN, minitron = workspace.folder, workspace.minitron
workspace.needs("03b_width_pruning")  # runs it, and what it needs, if its files are not there

if MODEL == "tiny":
    STEPS, BATCH, LENGTH, RATE = 80, 16, 64, 5e-3
else:
    STEPS, BATCH, LENGTH, RATE = 16, 4, 256, 1e-4  # a step of 4 x 256 tokens takes some 8 seconds on two cores
DATA = "{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}"

# %% [markdown]
# ## Will it fit?
#
# `plan_only=true` reads the shapes of both models, trains nothing, and says what memory a process needs, item by item.

# %%
command = f"""
    distill model.restore_from_path=width/pruned.nemo model.kd_teacher_restore_from_path=corrected.nemo
    model.nemo_path=width/distilled.nemo 'model.data.data_prefix={DATA}' model.data.seq_length={LENGTH}
    model.micro_batch_size={BATCH} model.global_batch_size={BATCH}
    model.optim.lr={RATE} model.optim.sched.min_lr={RATE / 10}
    trainer.max_steps={STEPS} trainer.val_check_interval={STEPS // 4} trainer.limit_val_batches=4
    trainer.log_every_n_steps=1 exp_manager.exp_dir=width/distill exp_manager.create_checkpoint_callback=false
"""
minitron(f"{command} plan_only=true")

# %% [markdown]
# ## Train

# %%
minitron(command)

# %%
minitron(f"""
    evaluate model.restore_from_path=width/distilled.nemo evaluate.data_prefix=data/validation_text_document
    evaluate.seq_length={LENGTH} evaluate.micro_batch_size={BATCH} output_path=width/evaluation/distilled.json
""")

# %%
training = read_training(RUN / "width/distill")
models = {
    "teacher": workspace.read("evaluation/teacher.json"),
    "pruned": workspace.read("width/evaluation/pruned.json"),
    "distilled": workspace.read("width/evaluation/distilled.json"),
}

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
for split, style, label in (("train", "-", "training, each batch"), ("val", "o-", "validation, 4 batches")):
    curve = training.curves[f"{split}_kd_loss"]
    left.plot(curve.at, curve.values, style, color="#9dbbd6" if split == "train" else "#1e6fb3", label=label)
left.set(xlabel="tokens seen", ylabel="loss, nats/token", title="KL to the teacher")
left.legend(fontsize=8)
curve = training.curves["val_top1_agreement"]
middle.plot(curve.at, 100 * curve.values, "o-", color="#1e6fb3", label="validation, 4 batches")
middle.set(xlabel="tokens seen", ylabel="share of tokens, %", title="same likeliest token as the teacher")
middle.legend(fontsize=8)
losses = {name: model["val_loss"] for name, model in models.items()}
bars = right.bar(list(losses), list(losses.values()), color=["#b3541e", "#bbbbbb", "#1e6fb3"], width=0.6)
right.bar_label(bars, fmt="%.3f")
low, high = min(losses.values()), max(losses.values())
right.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
right.set(ylabel="loss, nats/token (axis is cut)", title="held-out text, all of it")
figure.tight_layout()

lost, won = losses["pruned"] - losses["teacher"], losses["pruned"] - losses["distilled"]
print(f"pruning cost {lost:.3f} nats/token, distillation won {won:.3f} back: {won / lost:.0%}, ", end="")
print(f"on {training.tokens:,} tokens")

# %% [markdown]
# The left panel is what is minimised, the middle what it means: how often both models would have written the same
# token. The right panel compares the three models on the whole held-out part; the printed share is what came back of
# the loss that pruning cost. Both students trained on the same batches in the same order, so that 04a and 04b can be
# compared: [05_results](05_results.ipynb) does.
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
