"""What a model has of ours at some time: swapped modules, settings, quantized layers; to come back to."""

from torch import Tensor, nn

from llmkernels.accelerate import swap
from llmkernels.accelerate.candidate import tensors_of
from llmkernels.accelerate.precision import Cast
from llmkernels.ops.quantized_linear.module import ORIGINAL
from llmkernels.quantization.model import is_lazy, restore_quantized


class Snapshot:
    """A model as it is now; `come_back()` undoes what was changed since."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._swaps = swap.state(model)
        self._quantized = {id(module) for module in model.modules() if ORIGINAL in vars(module)}

    def come_back(self) -> None:
        # What was done last is undone first: quantized layers hold settings that were made before.
        restore_quantized(self.model, but=self._quantized)
        swap.back_to(self.model, self._swaps)

    def forget_originals(self) -> None:
        """Let go of the weights of layers that were quantized since, which stay quantized."""
        for module in self.model.modules():
            if id(module) not in self._quantized:
                vars(module).pop(ORIGINAL, None)


def bytes_kept(model: nn.Module) -> int:
    """Bytes of the tensors that are kept to restore the model with, and are not in use."""
    kept: list[Tensor] = []
    for module in model.modules():
        if (original := vars(module).get(ORIGINAL)) is not None:
            kept += [*original.parameters(), *original.buffers()]
        for setting in swap.settings_of(module):
            kept += setting.tensors() if isinstance(setting, Cast) else []
    used = {tensor.data_ptr() for tensor in tensors_of(model) if not is_lazy(tensor)}
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in kept if tensor.data_ptr() not in used}.values())
