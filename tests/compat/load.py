"""Loads HF folders with whichever transformers is first on the path, and saves what it made of them.

``python load.py CASES.json OUT``: ``CASES.json`` maps names to ``{"folder", "tokens", "texts", "chat"}``; ``OUT`` is
one ``torch.save`` of plain values by name. Imports nothing of the package, nor of the tests.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


@torch.no_grad()
def model(folder, tokens):
    stored = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto")  # transformers 5 knows this name as well
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    return {
        "class": type(loaded).__name__,
        "dtype": str(stored.dtype),
        "inv_freq": loaded.model.rotary_emb.inv_freq.clone(),
        "scaling": float(loaded.model.rotary_emb.attention_scaling),
        "logits": loaded(torch.tensor([tokens])).logits[0].clone(),
        "info": {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")},
    }


def tokenizer(folder, texts, chat):
    loaded = AutoTokenizer.from_pretrained(folder)
    ids = [loaded(text).input_ids for text in texts]
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "additional_special_tokens")
    return {
        "ids": ids,
        "decoded": [loaded.decode(one, skip_special_tokens=True, clean_up_tokenization_spaces=False) for one in ids],
        "special": sorted(map(str, loaded.all_special_tokens)),
        "named": {name: str(getattr(loaded, name)) for name in names[:4]},
        "chat": loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) if chat else None,
        "length": len(loaded),
        "regex": getattr(loaded, "fix_mistral_regex", None),  # not None: we were told to ask for another's rules
    }


def generation(folder):
    loaded = GenerationConfig.from_pretrained(folder).to_diff_dict()
    return {key: value for key, value in loaded.items() if key != "transformers_version"}


def attempt(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:1000]}


def main(cases, out):
    found = {"version": transformers.__version__, "file": transformers.__file__}
    for name, case in json.loads(Path(cases).read_text()).items():
        folder = case["folder"]
        found[name] = {"model": attempt(model, folder, case["tokens"])}
        if (Path(folder) / "tokenizer_config.json").is_file():
            found[name]["tokenizer"] = attempt(tokenizer, folder, case["texts"], case["chat"])
        if (Path(folder) / "generation_config.json").is_file():
            found[name]["generation"] = attempt(generation, folder)
    torch.save(found, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
