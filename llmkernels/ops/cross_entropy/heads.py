"""The layers whose logits `linear_cross_entropy` takes, of a weight that is a tensor and of a quantized one."""

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels import registry
from llmkernels.ops.quantized_linear import op as quantized
from llmkernels.ops.quantized_linear import reference as quantized_reference
from llmkernels.ops.quantized_linear.op import Kind, Parts


class LinearHead:
    """Of a weight `[C, H]`. Products are torch.matmul's; logits of one chunk after the other lie in the same memory, as
    fresh pages would cost more than a softmax."""

    def __init__(self, weight: Tensor):
        self.weight, self.space = weight, None

    @property
    def classes(self) -> int:
        return self.weight.shape[0]

    def logits(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        """`[rows, C]`, until the next call, which must not have more rows."""
        if self.space is None:
            self.space = rows.new_empty(rows.shape[0], self.classes)
        out = self.space[: rows.shape[0]]
        if bias is None:
            return torch.mm(rows, self.weight.t(), out=out)
        return torch.addmm(bias, rows, self.weight.t(), out=out)

    def dinput(self, dlogits: Tensor, out: Tensor) -> None:
        torch.mm(dlogits, self.weight, out=out)

    def whole(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """All logits at once, by the op that a graph keeps."""
        return torch_functional.linear(input, self.weight, bias)

    # All logits, with derivatives of every order.
    formula = whole


class QuantizedHead:
    """Of a QuantizedTensor `[C, H]`, which has no gradient."""

    def __init__(self, parts: Parts, kind: Kind, backend: str | None, columns: int):
        self.parts, self.kind, self.backend, self.columns = parts, kind, backend, columns

    @property
    def classes(self) -> int:
        return self.parts[0].shape[0]

    def logits(self, rows: Tensor, bias: Tensor | None) -> Tensor:
        chosen = registry.pick(quantized.OP, (rows, *self.parts, bias, *self.kind), self.backend)
        return chosen.fwd(rows, *self.parts, bias, *self.kind)

    def dinput(self, dlogits: Tensor, out: Tensor) -> None:
        kind = (*self.kind[:2], "")
        chosen = registry.pick(quantized.OP, (dlogits, *self.parts, None, *kind), self.backend)
        out.copy_(chosen.bwd(dlogits, *self.parts, self.columns, *kind[:2]))

    def whole(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return quantized.run(input, self.parts, (self.classes, self.columns), self.kind, bias, None, self.backend)

    def formula(self, input: Tensor, bias: Tensor | None) -> Tensor:
        return quantized_reference.formula(input, bias, *self.parts, *self.kind)


Frozen = tuple[Parts, Kind, str | None]  # of a quantized layer: its weight, and the backend that is forced


def head_of(weight: Tensor | None, frozen: Frozen | None, columns: int) -> LinearHead | QuantizedHead:
    return LinearHead(weight) if frozen is None else QuantizedHead(*frozen, columns)
