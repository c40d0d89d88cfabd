"""Modules with the constructors and state_dicts of torch.nn's, or of the models that have them."""

from llmkernels.ops.cross_entropy.module import CrossEntropyLoss, LinearCrossEntropyLoss
from llmkernels.ops.gated.module import SwiGLU
from llmkernels.ops.norm.module import LayerNorm, RMSNorm

__all__ = ["CrossEntropyLoss", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm", "SwiGLU"]
