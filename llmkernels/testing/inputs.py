"""The tensors of one case, and how outputs and gradients are had from them: the same for every op family."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor


def short_name(dtype: torch.dtype) -> str:
    """fp64, fp32, bf16 or fp16."""
    return {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(dtype)[6:]]


def fewer(shape: tuple[int, ...], elements: int, dim: int = 0) -> tuple[int, ...]:
    """`shape` with dimension `dim` cut, to one at least, so that there are at most `elements` in all."""
    sizes = list(shape)
    sizes[dim] = 1
    sizes[dim] = max(1, min(shape[dim], elements // math.prod(sizes)))
    return tuple(sizes)


@dataclasses.dataclass
class Inputs:
    """Base of a family's inputs: a dataclass of tensors, None where an optional one is absent.

    LEAVES names the fields that can have a gradient, in the order of the call; OUTPUTS the results of the op in order;
    GRADS the fields that hold the gradient arriving at each of OUTPUTS. The gradient of leaf `x` is called `dx`.
    """

    LEAVES: ClassVar[tuple[str, ...]]
    OUTPUTS: ClassVar[tuple[str, ...]]
    GRADS: ClassVar[tuple[str, ...]]
    WATCHED: ClassVar[bool] = True  # whether leaves are to have gradients

    def leaf_names(self) -> list[str]:
        return [name for name in self.LEAVES if getattr(self, name) is not None]

    def leaves(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.leaf_names()]

    def replace(self, **tensors: Tensor | None) -> "Inputs":
        """The same inputs with other tensors under these names."""
        return dataclasses.replace(self, **tensors)

    def unwatched(self) -> "Inputs":
        """The same inputs, of which nothing has a gradient: what is run on them has outputs only."""
        found, kind = copy.copy(self), type(self)
        found.__class__ = type(kind.__name__, (kind,), {"WATCHED": False})
        return found

    def requiring_grad(self) -> "Inputs":
        """The same inputs with leaves of autograd's graph."""
        if not self.WATCHED:
            return self
        return self.replace(**{name: getattr(self, name).detach().requires_grad_() for name in self.leaf_names()})

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of the leaves, in their order."""
        if not self.WATCHED or not self.leaf_names():
            return ()  # the latter of an op without a backward
        arriving = [getattr(self, name) for name in self.GRADS[: len(outputs)]]
        return torch.autograd.grad(outputs, self.leaves(), arriving)


def outputs_and_gradients(inputs: Inputs, function: Callable[[Inputs], tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Run `function` on fresh leaves, and its backward: every output and gradient by name."""
    fresh = inputs.requiring_grad()
    outputs = function(fresh)
    grads = fresh.backward(outputs)
    results = dict(zip(inputs.OUTPUTS, (out.detach() for out in outputs), strict=False))
    names = inputs.leaf_names() if inputs.WATCHED else ()
    return results | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
