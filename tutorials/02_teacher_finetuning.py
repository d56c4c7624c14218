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
# A teacher that has seen little of the text that it is to teach gives poor answers on it, and a student that follows it
# learns these. So the teacher first trains on the text for a while (*teacher correction*, arXiv 2408.11796, section
# 3.1). Its architecture is read from the checkpoint and need not be said again.

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import matplotlib.pyplot as plt
from workspace import Workspace

from nemo_minitron.report.curves import read_training

workspace = Workspace(MODEL)
RUN, minitron = workspace.folder, workspace.minitron
workspace.needs("01_model_and_data")  # runs it if its files are not there

# %% [markdown]
# ## Train
#
# Keys under `model`, `trainer` and `exp_manager` are NeMo's and Lightning's own. `data_prefix` names the token files of
# either part. The random tiny model learns all that it will ever know here; SmolLM2 needs little, and a small rate.

# %%
if MODEL == "tiny":
    STEPS, BATCH, LENGTH, RATE = 200, 16, 64, 5e-3
else:
    STEPS, BATCH, LENGTH, RATE = 16, 4, 256, 5e-5  # a step of 4 x 256 tokens takes some 8 seconds on two cores
DATA = "{train:[1.0,data/train_text_document],validation:[data/validation_text_document]}"

minitron(f"""
    finetune model.restore_from_path=converted.nemo model.nemo_path=corrected.nemo
    'model.data.data_prefix={DATA}' model.data.seq_length={LENGTH}
    model.micro_batch_size={BATCH} model.global_batch_size={BATCH}
    model.optim.lr={RATE} model.optim.sched.min_lr={RATE / 10}
    trainer.max_steps={STEPS} trainer.val_check_interval={STEPS // 4} trainer.limit_val_batches=4
    trainer.log_every_n_steps=1 exp_manager.exp_dir=finetune exp_manager.create_checkpoint_callback=false
""")

# %% [markdown]
# The best model by validation loss is in `corrected.nemo`, the last one in `corrected.last.nemo`. Checkpoints for
# resuming are left out here (`create_checkpoint_callback=false`); with them and `exp_manager.resume_if_exists=true` a
# run that was stopped goes on where it was.
#
# ## Measure
#
# `minitron evaluate` reads the whole validation part, while validation during training reads a few batches of it.

# %%
for name, checkpoint in (("original", "converted.nemo"), ("teacher", "corrected.nemo")):
    minitron(f"""
        evaluate model.restore_from_path={checkpoint} evaluate.data_prefix=data/validation_text_document
        evaluate.seq_length={LENGTH} evaluate.micro_batch_size={BATCH} output_path=evaluation/{name}.json
    """)

# %%
training = read_training(RUN / "finetune")
before, after = (workspace.read(f"evaluation/{name}.json")["val_loss"] for name in ("original", "teacher"))

figure, axis = plt.subplots(figsize=(7, 3.5))
train, validation = (training.curves[name] for name in ("train_lm_loss", "val_lm_loss"))
axis.plot(train.at, train.values, color="#9dbbd6", label="training, each batch")
axis.plot(validation.at, validation.values, "o-", color="#1e6fb3", label="validation, 4 batches")
for loss, style, name in ((before, "--", "before"), (after, "-", "after")):
    axis.axhline(loss, color="#b3541e", linestyle=style, linewidth=1, label=f"held out, whole: {name}, {loss:.3f}")
axis.set(xlabel="tokens seen", ylabel="next-token loss, nats/token", title="teacher fine-tuning")
axis.legend(fontsize=8)
figure.tight_layout()
print(f"held-out loss {before:.3f} before, {after:.3f} after: {after - before:+.3f} nats/token")

# %% [markdown]
# Training loss goes up and down because each batch is another text; the two lines across are measured on the same
# held-out tokens and can be compared. Their difference, printed with the figure, is what the correction was worth:
# where it is negative, the teacher now knows this kind of text better than the model it came from. All students are
# compared with the corrected teacher from here on.
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
