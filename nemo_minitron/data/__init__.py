"""Text to Megatron ``.bin/.idx`` and back to token blocks: sources, tokenizers, preprocessing, reading."""
