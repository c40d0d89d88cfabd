"""Drop-ins for torch's loss modules."""

import torch
from torch import Tensor

from llmkernels.ops.cross_entropy.linear_op import linear_cross_entropy
from llmkernels.ops.cross_entropy.op import check_options, cross_entropy

_OPTIONS = ("weight", "ignore_index", "reduction", "label_smoothing", "z_loss", "softcap", "backend")


def _shown(module: torch.nn.Module) -> str:
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in _OPTIONS[1:-1])


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss with `z_loss`, `softcap` and `backend`: see `functional.cross_entropy`."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average=None,
        ignore_index: int = -100,
        reduce=None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        check_options("CrossEntropyLoss", self.reduction, label_smoothing, z_loss, softcap)
        self.z_loss = z_loss
        self.softcap = softcap
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, **{name: getattr(self, name) for name in _OPTIONS})

    def extra_repr(self) -> str:
        return _shown(self)


class LinearCrossEntropyLoss(torch.nn.Module):
    """A linear layer and the cross entropy of its output, which is never held: see `functional.linear_cross_entropy`.

    Constructor, state_dict and the name `linear` of the layer are those of torch.nn.LinearCrossEntropyLoss, without its
    `out_features` and `options`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        softcap: float = 0.0,
        backend: str | None = None,
    ):
        super().__init__()
        check_options("LinearCrossEntropyLoss", reduction, label_smoothing, z_loss, softcap)
        if weight is not None and tuple(weight.shape) != (num_classes,):
            shape = tuple(weight.shape)
            raise ValueError(f"LinearCrossEntropyLoss: weight has shape {shape}, expected ({num_classes},)")
        self.linear = torch.nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.softcap = softcap
        self.backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options = {name: getattr(self, name) for name in _OPTIONS}
        return linear_cross_entropy(input, self.linear.weight, target, linear_bias=self.linear.bias, **options)

    def extra_repr(self) -> str:
        return _shown(self)
