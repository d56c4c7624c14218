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
# # 5 · Results
#
# Teacher, pruned and distilled students beside each other; a page for people; and the way back to Hugging Face.

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from workspace import Workspace

workspace = Workspace(MODEL)
RUN, minitron = workspace.folder, workspace.minitron
workspace.needs("04a_distilling_depth", "04b_distilling_width")  # runs them if their files are not there

# %% [markdown]
# ## The numbers
#
# All that `minitron evaluate` wrote in the notebooks before, on the same held-out tokens.

# %%
results = {"teacher": workspace.read("evaluation/teacher.json")}
for student in ("depth", "width"):
    for state in ("pruned", "distilled"):
        results[f"{student}, {state}"] = workspace.read(f"{student}/evaluation/{state}.json")

columns = {"parameters": 12, "layers": 8, "hidden": 8, "ffn": 6, "loss": 9, "perplexity": 12, "above teacher": 15}
print(" " * 18 + "".join(f"{name:>{width}}" for name, width in columns.items()))
for name, one in results.items():
    print(f"{name:<18}{one['num_parameters']:>12,}{one['num_layers']:>8}{one['hidden_size']:>8}"
          f"{one['ffn_hidden_size']:>6}{one['val_loss']:>9.3f}{one['perplexity']:>12.2f}"
          f"{one['val_loss'] - results['teacher']['val_loss']:>+15.3f}")  # fmt: skip

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
size = {name: one["num_parameters"] / 1e6 for name, one in results.items()}
loss = {name: one["val_loss"] for name, one in results.items()}
colours = {"depth": "#b3541e", "width": "#1e6fb3"}
left.plot(size["teacher"], loss["teacher"], "k*", markersize=12, label="teacher")
for student, colour in colours.items():
    states = [f"{student}, {state}" for state in ("pruned", "distilled")]
    left.plot([size[name] for name in states], [loss[name] for name in states], "-", color=colour, linewidth=1)
    left.plot(size[states[0]], loss[states[0]], "o", color=colour, markerfacecolor="white", label=states[0])
    left.plot(size[states[1]], loss[states[1]], "o", color=colour, label=states[1])
left.set(xlabel="parameters, millions", ylabel="held-out loss, nats/token", title="quality against size")
left.margins(0.15)
left.legend(fontsize=8)

places = {"depth": 0, "width": 1}
for student, place in places.items():
    pruned, distilled = (loss[f"{student}, {state}"] - loss["teacher"] for state in ("pruned", "distilled"))
    for offset, value, colour in ((-0.2, pruned, "#bbbbbb"), (0.2, distilled, colours[student])):
        right.bar_label(right.bar(place + offset, value, width=0.38, color=colour), fmt="%+.3f")
    print(f"{student}: distillation closed {(pruned - distilled) / pruned:.0%} of the gap")
right.set_xticks(list(places.values()), list(places))
right.axhline(0, color="black", linewidth=0.8)
right.margins(y=0.35)  # room for the legend
right.set(ylabel="loss above the teacher's, nats/token", title="what pruning cost, and what is left")
labels = {"pruned, before training": "#bbbbbb", **{f"{name}, distilled": colour for name, colour in colours.items()}}
right.legend(handles=[Patch(color=colour, label=label) for label, colour in labels.items()], fontsize=8)
figure.tight_layout()

# %% [markdown]
# On the left the way down from an open to a filled circle is what distillation won, at no change of size; what is
# missing to the star's height is still lost. Depth and width have nearly the same number of parameters here, so that
# they can be compared; but for short trainings only: which shape is better after a long one is another question.
#
# ## A page for people
#
# `minitron report` reads a run's folder. What both students share is linked into each, so that the page finds it there.

# %%
for student in ("depth", "width"):
    for name, shared in (("scores", "scores"), ("finetune", "finetune"), ("evaluation/teacher.json", "")):
        link = RUN / student / name
        if not link.exists():
            link.symlink_to(RUN / (shared or name))

# %%
for student in ("depth", "width"):
    minitron(f"report run_dir={student}")

# %%
page = (RUN / "width/report.md").read_text()
print(page.split("## Shape")[0].strip())

# %% [markdown]
# ## Back to Hugging Face
#
# The student is an ordinary Llama of a smaller shape: `config.json`, safetensors and tokenizer, no code of ours. From
# here on it is transformers alone.

# %%
for name in ("corrected", "width/pruned", "width/distilled"):
    minitron(f"convert input_name_or_path={name}.nemo output_path={name}_hf")

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer

for name in ("corrected", "width/pruned", "width/distilled"):
    model = AutoModelForCausalLM.from_pretrained(RUN / f"{name}_hf")
    tokenizer = AutoTokenizer.from_pretrained(RUN / f"{name}_hf")
    prompt = tokenizer("The while statement is used for", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print(f"{name + ':':<17}", repr(tokenizer.decode(answer[0])))

# %% [markdown]
# The same prompt to teacher, pruned and distilled student: the loss in the table says how far apart they are on
# average, the text what that looks like. The tiny model learned some hundred thousand tokens in its whole life and
# writes accordingly.
#
# ## What to do next
#
# - **More tokens.** The published students are distilled on billions of tokens; with few, the gap stays.
# - **Text like that of the later use**, for calibration and for training; `calibration.own_samples` protects what the
#   calibration text lacks.
# - **Another shape.** [06_search](06_search.ipynb) finds the best one for a number of parameters, memory or latency.
# - **Tasks instead of loss**: `minitron evaluate … evaluate.lm_eval.tasks=[arc_easy,hellaswag]`.
#
# ## The same with Llama-3.1-8B
#
# ```console
# $ minitron report run_dir=width
# $ minitron convert input_name_or_path=width/distilled.nemo output_path=width/distilled_hf
# $ minitron evaluate model.restore_from_path=width/distilled.nemo evaluate.perplexity=false \
#     evaluate.lm_eval.tasks=[arc_easy,hellaswag] evaluate.lm_eval.batch_size=16 trainer.precision=bf16 \
#     output_path=width/tasks.json
# ```
