"""nemo_minitron: prune a pretrained Llama-type model and distil the original into it, on NVIDIA NeMo."""

__version__ = "0.1.0"
