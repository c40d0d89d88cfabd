"""The dtypes of floating ops, the type that their sums and intermediate values have, and that of autocast."""

import contextlib

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dtype_names() -> str:
    """FLOAT_DTYPES for an error's text."""
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


def dtype_error(op: str, name: str, dtype: torch.dtype) -> TypeError:
    """The error of an argument `name` that is not of one of FLOAT_DTYPES."""
    return TypeError(f"{op}: {name} has dtype {dtype}, expected one of {dtype_names()}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics, sums and intermediate values: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast has on a device where it is on; None: it is off, or (meta) the device has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A block in which autocast is off on a device; torch.autocast itself refuses the meta device."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
