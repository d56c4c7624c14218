"""Talking to a model: what is asked, the tokenizer's side, answers of transformers' model, and a chat."""
