"""Other libraries' interfaces over these kernels: code written for them runs here, on the CPU too."""

from llmkernels.compat import flash_attn

__all__ = ["flash_attn"]
