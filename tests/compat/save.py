"""Saves an HF folder again with whichever transformers is first on the path: ``python save.py FOLDER``.

Two entries of the vocabulary become special tokens, which transformers 5 notes as a list.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

(folder,) = sys.argv[1:]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
tokenizer.add_special_tokens({"additional_special_tokens": tokenizer.convert_ids_to_tokens([300, 310])})
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
