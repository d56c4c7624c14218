"""Models that a format or a tool has no words for, with what is said of each."""

from __future__ import annotations

_WINDOW = "sliding_window must be null"
_LINEAR = "Megatron-LM (0.13 to 0.19) builds its GPT without it"
REFUSED: dict[tuple[str, str], str] = {
    **{("Mistral", name): _WINDOW for name in ("gguf", "bridge", "megatron", "nemo2")},
    ("Llama, linear RoPE", "megatron"): _LINEAR,
    ("Llama, linear RoPE", "Megatron-LM"): "rotary_seq_len_interpolation_factor must be 1",
}
"""By model and by origin or output format: what the message says."""
WITHOUT_A_WINDOW = ("GGUF", "NeMo 2", "Megatron-Bridge", "Megatron-LM")
"""Origins of which a Mistral comes in as a model without a window, since they are laid without one."""


def refusal(model: str, source: str, target: str | None = None) -> str | None:
    """Why a model does not come from ``source``, or does not go from it to ``target``; None where it does."""
    why = REFUSED.get((model, source)) or REFUSED.get((model, target or ""))
    return None if why == _WINDOW and source in WITHOUT_A_WINDOW else why
