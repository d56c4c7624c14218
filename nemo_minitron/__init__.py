"""nemo_minitron: prune a pretrained Llama-type model and distil the original into it, on NVIDIA NeMo."""

import warnings

# Megatron-Core says it three times on import; that neither is needed is said by the README
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (are|is) not installed")

__version__ = "0.1.0"
