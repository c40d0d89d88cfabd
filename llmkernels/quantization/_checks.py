"""What every format refuses, in the same words."""

import torch
from torch import Tensor

from llmkernels._dtypes import FLOAT_DTYPES, dtype_error

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def matrix_shape(format: str, weight: Tensor, name: str) -> tuple[int, int]:
    """The shape of a weight `[N, K]`. Raises: TypeError or ValueError, it is no floating matrix."""
    if weight.dtype not in FLOAT_DTYPES:
        raise dtype_error(format, name, weight.dtype)
    if weight.dim() != 2:
        raise ValueError(f"{format}: {name} has shape {tuple(weight.shape)}, expected [N, K]")
    return tuple(weight.shape)


def finite_matrix(format: str, weight: Tensor, name: str, first: int = 0) -> Tensor:
    """A weight `[N, K]`, whose rows are those from `first` on, in fp64.

    Raises: TypeError or ValueError, it is not a floating matrix of finite values.
    """
    matrix_shape(format, weight, name)
    wide = weight.detach().double()
    bad = ~wide.isfinite().all(1)
    if bad.any():
        row = first + int(bad.nonzero()[0])
        raise ValueError(f"{format}: row {row} of {name} has a NaN or an infinity, expected finite values")
    return wide


def finite_scales(format: str, largest: Tensor, steps: float, dtype: torch.dtype, name: str, first: int = 0) -> Tensor:
    """largest / steps in `dtype`, 1 where that is zero, of rows from `first` on.

    Raises: ValueError, `dtype` does not reach one.
    """
    scales = (largest / steps).to(dtype)
    if (huge := ~scales.isfinite()).any():
        row = first + int(huge.nonzero()[0, 0])
        reached, kind = float(largest[huge].max()), str(dtype).removeprefix("torch.")
        raise ValueError(f"{format}: row {row} of {name} reaches {reached:.1e}, expected less: scales are {kind}")
    return torch.where(scales == 0.0, torch.ones_like(scales), scales)


def part(format: str, name: str, tensor: Tensor | None, dtypes: tuple, shape: tuple[int, ...]) -> None:
    """Raises ValueError where a part of a quantized weight is absent or has another dtype or shape."""
    wanted = " or ".join(map(str, dtypes))
    if tensor is None:
        raise ValueError(f"{format}: {name} is absent, expected {wanted} {shape}")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        raise ValueError(f"{format}: {name}: {tensor.dtype} {tuple(tensor.shape)}, expected {wanted} {shape}")


def absent(format: str, **parts: Tensor | None) -> None:
    """Raises ValueError where a part that the format does not have is given."""
    for name, tensor in parts.items():
        if tensor is not None:
            raise ValueError(f"{format}: {name} is given, expected None: the format has none")


def no_option(format: str, options: dict) -> None:
    """Raises TypeError for options of quantize that the format does not have."""
    for name, value in options.items():
        raise TypeError(f"{format}: {name}={value!r} is given, but the format has no such option")


def group(format: str, group_size: int | None, known: tuple[int | None, ...]) -> None:
    """Raises ValueError for a group size that is not one of `known`."""
    if group_size not in known:
        names = ", ".join("None (the whole row)" if size is None else str(size) for size in known)
        raise ValueError(f"{format}: group_size is {group_size!r}, expected one of {names}")


def scale_dtype(format: str, dtype: torch.dtype) -> None:
    """Raises ValueError for a dtype that scales of groups cannot have."""
    if dtype not in SCALE_DTYPES:
        raise ValueError(f"{format}: scale_dtype is {dtype}, expected one of {', '.join(map(str, SCALE_DTYPES))}")


def finite_positive(format: str, scales: Tensor, name: str) -> None:
    """Raises ValueError for scales that quantize never writes; for what comes from a file."""
    if not bool((scales.isfinite() & (scales > 0.0)).all()):
        raise ValueError(f"{format}: {name}'s scales have a value that is not finite and above zero")
