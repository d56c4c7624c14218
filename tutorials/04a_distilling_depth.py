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
# the vocabulary, which says more than the one token that came next; the loss is the KL divergence from the teacher's
# distribution to the student's.

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import matplotlib.pyplot as plt
from workspace import Workspace

from nemo_minitron.report.curves import read_training

workspace = Workspace(MODEL)
RUN, minitron = workspace.folder, workspace.minitron
workspace.needs("03a_depth_pruning")  # runs it, and what it needs, if its files are not there

if MODEL == "tiny":
    STEPS, BATCH, LENGTH, RATE = 80, 16, 64, 5e-3
else:
    STEPS, BATCH, LENGTH, RATE = 16, 4, 256, 1e-4  # a step of 4 x 256 tokens takes some 8 seconds on two cores
DATA = "{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}"

# %% [markdown]
# ## Train
#
# Both models are `.nemo` files of one vocabulary, which is checked first. The teacher has no gradients and no optimizer
# state. A high rate would undo what re-solving gained before it gains anything of its own, so the real model trains
# with a small one.

# %%
minitron(f"""
    distill model.restore_from_path=depth/pruned.nemo model.kd_teacher_restore_from_path=corrected.nemo
    model.nemo_path=depth/distilled.nemo 'model.data.data_prefix={DATA}' model.data.seq_length={LENGTH}
    model.micro_batch_size={BATCH} model.global_batch_size={BATCH}
    model.optim.lr={RATE} model.optim.sched.min_lr={RATE / 10}
    trainer.max_steps={STEPS} trainer.val_check_interval={STEPS // 4} trainer.limit_val_batches=4
    trainer.log_every_n_steps=1 exp_manager.exp_dir=depth/distill exp_manager.create_checkpoint_callback=false
""")

# %%
minitron(f"""
    evaluate model.restore_from_path=depth/distilled.nemo evaluate.data_prefix=data/validation_text_document
    evaluate.seq_length={LENGTH} evaluate.micro_batch_size={BATCH} output_path=depth/evaluation/distilled.json
""")

# %% [markdown]
# ## What was logged
#
# Every loss under its own name, in TensorBoard's files and as CSV: `train_kd_loss` is what is trained, `train_lm_loss`
# the next-token loss of the same batch, told for comparison (`distill.lm_weight` would add it), and
# `val_top1_agreement` the share of tokens for which the student's likeliest next token is the teacher's.

# %%
training = read_training(RUN / "depth/distill")
models = {
    "teacher": workspace.read("evaluation/teacher.json"),
    "pruned": workspace.read("depth/evaluation/pruned.json"),
    "distilled": workspace.read("depth/evaluation/distilled.json"),
}

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6))
for axis, kind, title in ((left, "kd", "KL to the teacher"), (middle, "lm", "next-token loss")):
    for split, style, label in (("train", "-", "training, each batch"), ("val", "o-", "validation, 4 batches")):
        curve = training.curves[f"{split}_{kind}_loss"]
        axis.plot(curve.at, curve.values, style, color="#9dbbd6" if split == "train" else "#1e6fb3", label=label)
    axis.set(xlabel="tokens seen", ylabel="loss, nats/token", title=title)
    low, high = axis.get_ylim()
    axis.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
    axis.legend(fontsize=8)
losses = {name: model["val_loss"] for name, model in models.items()}
bars = right.bar(list(losses), list(losses.values()), color=["#b3541e", "#bbbbbb", "#1e6fb3"], width=0.6)
right.bar_label(bars, fmt="%.3f")
low, high = min(losses.values()), max(losses.values())
right.set_ylim(low - 0.3 * (high - low), high + 0.3 * (high - low))
right.set(ylabel="loss, nats/token (axis is cut)", title="held-out text, all of it")
figure.tight_layout()

agreement = training.curves["val_top1_agreement"].values
print(f"same likeliest token as the teacher: {agreement[0]:.1%} at first, {agreement[-1]:.1%} at the last validation")
lost, won = losses["pruned"] - losses["teacher"], losses["pruned"] - losses["distilled"]
print(f"pruning cost {lost:.3f} nats/token, distillation won {won:.3f} back: {won / lost:.0%}, ", end="")
print(f"on {training.tokens:,} tokens")

# %% [markdown]
# The left and middle panels are of the training itself: the KL divergence is what is minimised, and where the
# next-token loss falls with it, what the teacher knows is what the text needs. The right panel is the result, on the
# whole held-out part: the step from the second bar to the third is the share that is printed below. It was won on very
# few tokens, with training text of the same kind.
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
