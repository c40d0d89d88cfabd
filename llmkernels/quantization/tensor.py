"""QuantizedTensor: a weight matrix in one of the formats, with what it takes to read it."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from llmkernels.quantization import FORMATS, SCHEMES

ACTIVATIONS = (None, "int8", "fp8")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight `[N, K]`, N output channels, in `dtype` before. Its parts are what the file of `format` says.

    `group_size` columns share a scale, None: all of a row. `activations` says how `quantized_linear` rounds its input:
    not at all, or row by row to "int8" or "fp8", with a scale found when it arrives. `order` `[K]` int64 is given where
    the columns are stored in another order: stored column j is column order[j] of the weight.

    Raises: ValueError, an unknown format, or parts of another shape or dtype.
    """

    format: str
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor
    dtype: torch.dtype = torch.float32
    zeros: Tensor | None = None
    second_scales: Tensor | None = None
    group_size: int | None = None
    activations: str | None = None
    order: Tensor | None = None

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"QuantizedTensor: format is {self.format!r}, expected one of {', '.join(FORMATS)}")
        if torch.compiler.is_compiling():  # which cannot trace the import
            return
        allowed = {activations for format, activations in SCHEMES.values() if format == self.format}
        if self.activations not in allowed:
            names = " or ".join(map(repr, sorted(allowed, key=str)))
            raise ValueError(f"{self.format}: activations is {self.activations!r}, expected {names}")
        if self.order is not None and (self.order.dtype, tuple(self.order.shape)) != (torch.int64, self.shape[1:]):
            got = f"{self.order.dtype} {tuple(self.order.shape)}"
            raise ValueError(f"{self.format}: order: {got}, expected torch.int64 ({self.shape[1]},)")
        self.module.check(self)

    @property
    def module(self) -> ModuleType:
        """The module of the format, which has `quantize`, `check` and `dequantize`."""
        return importlib.import_module(f"llmkernels.quantization.{self.format}")

    @property
    def scheme(self) -> str:
        """The word of `SCHEMES` for format and activations."""
        return next(name for name, pair in SCHEMES.items() if pair == (self.format, self.activations))

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        found = {name: getattr(self, name) for name in ("data", "scales", "zeros", "second_scales", "order")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[N, K]` in its own dtype, or in `dtype`."""
        stored = self.module.dequantize(self, dtype)
        return stored if self.order is None else torch.empty_like(stored).index_copy_(1, self.order, stored)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(tensor.nbytes for tensor in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / max(self.shape[0] * self.shape[1], 1)

    def __repr__(self) -> str:
        groups = f", groups of {self.group_size}" if self.group_size else ""
        bits = f"{self.bits_per_weight:.2f} bits per weight"
        return f"QuantizedTensor({self.scheme}, {list(self.shape)}{groups}, {bits})"


def quantize_tensor(weight: Tensor, scheme: str, name: str = "weight", **options) -> QuantizedTensor:
    """A weight `[N, K]` of any floating dtype in `scheme`: int8, int4, nf4, fp8, w8a8, w4a8 or fp8_dynamic.

    Args:
        options: those of the format's `quantize`, for instance `group_size`; `name` is what errors call the weight.
    Raises: ValueError or TypeError, an unknown scheme or option, or a weight that is not a finite floating matrix.
    """
    module, activations = scheme_of("quantize_tensor", scheme)
    return module.quantize(weight, name, activations=activations, **options)


def empty_tensor(shape: tuple[int, int], scheme: str, device=None, **options) -> QuantizedTensor:
    """Zeros in `scheme`, for what is loaded later. Raises: as `quantize_tensor`."""
    module, activations = scheme_of("empty_tensor", scheme)
    return module.empty(tuple(shape), device, activations=activations, **options)


def concatenate(weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Weights of one input under each other, `[N1 + N2 + ..., K]`: query, key and value, gate and up.

    Nothing is rounded again: what it dequantizes to is what they do.

    Raises: ValueError: there is none, or they are not alike; nf4 with double=True, whose scales share numbers across
        rows; fp8 in blocks of 128 rows, of which one but the last weight has a part.
    """
    if not weights:
        raise ValueError("concatenate: weights is empty, expected one at least")
    first, rows = weights[0], sum(weight.shape[0] for weight in weights)
    for number, weight in enumerate(weights):
        for (name, got), expected in zip(_alike(weight).items(), _alike(first).values(), strict=True):
            if got != expected:
                raise ValueError(f"concatenate: {name} of weight {number} is {got}, expected {expected}, weight 0's")
        if first.order is not None and not torch.equal(weight.order, first.order):
            raise ValueError(f"concatenate: the columns of weight {number} are stored in another order than weight 0's")
        if weight.second_scales is not None:
            raise ValueError("concatenate: weights are nf4 with double=True, whose scales share numbers across rows")
        blocks = first.group_size if first.format == "fp8" and first.group_size else 1
        if weight.shape[0] % blocks and number + 1 < len(weights):
            got = weight.shape[0]
            raise ValueError(f"concatenate: weight {number} has {got} rows, expected whole blocks of {blocks}")
    names = [name for name in first.parts if name != "order"]
    parts = {name: torch.cat([getattr(weight, name) for weight in weights]) for name in names}
    return replace(first, shape=(rows, first.shape[1]), **parts)


def _alike(weight: QuantizedTensor) -> dict:
    """What weights that are concatenated have in common."""
    return {
        "scheme": weight.scheme,
        "columns": weight.shape[1],
        "group_size": weight.group_size,
        "parts": ", ".join(weight.parts),
        "dtype of scales": weight.scales.dtype,
        "device": weight.data.device,
    }


def scheme_of(who: str, scheme: str) -> tuple[ModuleType, str | None]:
    """(the module of its format, its activations). Raises: ValueError, unknown; `who` begins the message."""
    if scheme not in SCHEMES:
        raise ValueError(f"{who}: scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")
    format, activations = SCHEMES[scheme]
    return importlib.import_module(f"llmkernels.quantization.{format}"), activations
