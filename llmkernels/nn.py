"""Modules with the constructors and state_dicts of torch.nn's."""

from llmkernels.ops.norm.module import LayerNorm, RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
