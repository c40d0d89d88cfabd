"""The torch.autograd.Functions themselves, for people who write their own modules: `X.apply(...)`."""

from llmkernels.ops.gated.op import GatedFunction
from llmkernels.ops.norm.op import LayerNormFunction, RMSNormFunction
from llmkernels.ops.rope.op import RopeFunction, RopeInplaceFunction
from llmkernels.ops.softmax.op import SoftmaxFunction

__all__ = [
    "GatedFunction",
    "LayerNormFunction",
    "RMSNormFunction",
    "RopeFunction",
    "RopeInplaceFunction",
    "SoftmaxFunction",
]
