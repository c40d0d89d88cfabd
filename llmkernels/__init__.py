"""Kernels for language models that drop into PyTorch: every kernel, every backend, proven, explained, undoable."""

from llmkernels import autograd, compat, functional, nn
from llmkernels._explain import backends, explain
from llmkernels.accelerate import accelerate, accelerated, restore
from llmkernels.generation import generate
from llmkernels.quantization.model import quantize
from llmkernels.registry import NoBackendError, use_backend
from llmkernels.sdpa_hook import disable_sdpa, enable_sdpa

__version__ = "0.1.0"

__all__ = [
    "NoBackendError",
    "accelerate",
    "accelerated",
    "autograd",
    "backends",
    "compat",
    "disable_sdpa",
    "enable_sdpa",
    "explain",
    "functional",
    "generate",
    "nn",
    "quantize",
    "restore",
    "use_backend",
]
