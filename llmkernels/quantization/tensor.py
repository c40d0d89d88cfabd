"""QuantizedTensor: a weight matrix in one of the formats, with what it takes to read it."""

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llmkernels.quantization import FORMATS


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight `[N, K]`, N output channels, in `dtype` before. `data` and `scales` are what the file of `format` says.

    Raises: ValueError, an unknown format, or data or scales of another shape or dtype.
    """

    format: str
    shape: tuple[int, int]
    data: Tensor
    scales: Tensor
    dtype: torch.dtype = torch.float32

    def __post_init__(self):
        if self.format not in FORMATS:
            raise ValueError(f"QuantizedTensor: format is {self.format!r}, expected one of {', '.join(FORMATS)}")
        if not torch.compiler.is_compiling():  # which cannot trace the import
            self.module.check(self)

    @property
    def module(self):
        """The module of the format, which has `quantize`, `check` and `dequantize`."""
        return importlib.import_module(f"llmkernels.quantization.{self.format}")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight `[N, K]` in its own dtype, or in `dtype`."""
        return self.module.dequantize(self, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scales.nbytes

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / max(self.shape[0] * self.shape[1], 1)

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.format}, {list(self.shape)}, {self.bits_per_weight:.2f} bits per weight)"
