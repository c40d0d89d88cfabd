"""`restore(model)`: the opposite of whatever this library did to a model."""

from torch import nn

from llmkernels.accelerate import restore as restore_accelerated
from llmkernels.quantization.model import restore_quantized


def restore(model: nn.Module) -> int:
    """Undo `quantize(model, keep_original=True)` and `accelerate(model)`: the same objects are what they were.

    Returns how many modules.
    """
    return restore_quantized(model) + restore_accelerated(model)
