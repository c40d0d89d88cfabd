"""What the arguments of the attention functions mean, checked once for every backend: one error for each mistake."""

import itertools
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels._dtypes import FLOAT_DTYPES, dtype_error
from llmkernels.ops.attention.reference import Options

CAUSAL = (None, "top_left", "bottom_right")
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
INTEGERS = (int, torch.SymInt, Tensor)  # what the schema of an op takes for one
LONGEST = 2**31 - 1  # of a sequence: positions are int32 in some kernels


def options(op: str, head_dim: int, *, scale, is_causal, causal, window, softcap, dropout_p) -> Options:
    """Causal becomes a window that ends at the query; the alignment of windows and ALiBi is bottom-right by default."""
    if causal not in CAUSAL:
        raise ValueError(f"{op}: causal is {causal!r}, expected 'top_left', 'bottom_right' or None")
    if is_causal and causal == "bottom_right":
        raise ValueError(f"{op}: is_causal=True is 'top_left', got causal='bottom_right' with it, expected one of them")
    if is_causal:
        causal = "top_left"
    left, right = _window(op, window)
    if causal is not None:
        right = 0
    if not (isinstance(softcap, (int, float)) and (softcap == 0.0 or SMALLEST <= softcap <= LARGEST)):
        raise ValueError(f"{op}: softcap is {softcap}, expected 0 (off) or a positive number within the range of fp32")
    if not (isinstance(dropout_p, (int, float)) and 0.0 <= dropout_p <= 1.0):
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability between 0 and 1")
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim) if head_dim > 0 else 1.0
    try:
        scale = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: scale is {scale!r}, expected a number or None") from None
    return Options(scale, left, right, causal == "top_left", float(softcap), float(dropout_p))


def _window(op: str, window: Sequence[int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    is_pair = isinstance(window, Sequence) and len(window) == 2
    if not is_pair or not all(isinstance(entry, int) and entry >= -1 for entry in window):
        raise ValueError(f"{op}: window is {window}, expected (left, right), numbers of keys of which -1 means all")
    left, right = window
    return left if left < LONGEST else -1, right if right < LONGEST else -1


def check_tensor(op: str, name: str, tensor: Tensor, query: Tensor, dtype: torch.dtype | None) -> None:
    """The device of `query`, and `dtype` if it is given."""
    if tensor.device != query.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {query.device}, the device of query")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}")


def check_dtypes(op: str, query: Tensor, **others: Tensor) -> None:
    """A floating type for all of them, on one device."""
    dtype, device = query.dtype, query.device
    if dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "query", dtype)
    for name, tensor in others.items():
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}, the device of query")
        if tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}, the dtype of query")


def check_heads(op: str, heads: int, key_heads: int, value_heads: int, *, grouped: bool) -> None:
    """`grouped`: several query heads may share a key head. Else a single head broadcasts, of any of the three."""
    if grouped:
        if value_heads != key_heads:
            raise ValueError(f"{op}: value has {value_heads} heads, expected {key_heads}, as many as key")
        if heads != key_heads and (key_heads == 0 or heads % key_heads):
            raise ValueError(f"{op}: query has {heads} heads, expected a multiple of {key_heads}, the number of key's")
    elif len({heads, key_heads, value_heads} - {1}) > 1:
        raise ValueError(
            f"{op}: query has {heads} heads, key {key_heads} and value {value_heads}, expected as many or 1"
            " (enable_gqa=True allows a multiple)"
        )


def head_vector(op: str, name: str, tensor: Tensor | None, query: Tensor, heads: int, batch: int | None) -> None:
    """[H], or [B, H] where `batch` is given; a floating dtype."""
    if tensor is None:
        return
    if tensor.device != query.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {query.device}, the device of query")
    if tensor.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, name, tensor.dtype)
    shapes = [(heads,)] if batch is None else [(heads,), (batch, heads)]
    if tuple(tensor.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}: one for each query head")


def values_are_checked(tensor: Tensor) -> bool:
    """Values are looked at on the CPU, where it is free; on a GPU, where it waits for it, only when asked to."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    if tensor.is_cpu:
        return not isinstance(tensor, torch._subclasses.FakeTensor)
    return os.environ.get("LLMKERNELS_VALIDATE", "0") == "1" and not torch.cuda.is_current_stream_capturing()


def cu_seqlens(op: str, name: str, ends: Tensor, query: Tensor, total: int, longest: int, longest_name: str) -> None:
    """[sequences + 1] int32: starts at 0, never falls, ends at `total`; no sequence is longer than `longest`."""
    check_tensor(op, name, ends, query, torch.int32)
    if not isinstance(longest, INTEGERS) or (isinstance(longest, int) and not 0 <= longest <= LONGEST):
        raise ValueError(f"{op}: {longest_name} is {longest!r}, expected the rows of the longest sequence")
    if ends.dim() != 1 or ends.shape[0] < 1:
        raise ValueError(f"{op}: {name} has shape {tuple(ends.shape)}, expected (sequences + 1,)")
    if not values_are_checked(ends):
        return
    values = ends.tolist()
    lengths = [after - before for before, after in itertools.pairwise(values)]
    if values[0] != 0 or values[-1] != total:
        raise ValueError(f"{op}: {name} runs from {values[0]} to {values[-1]}, expected from 0 to {total}, all rows")
    if lengths and min(lengths) < 0:
        at = lengths.index(min(lengths))
        raise ValueError(f"{op}: {name}[{at + 1}] is {values[at + 1]} after {values[at]}, expected no less than that")
    if lengths and max(lengths) > longest:
        at = lengths.index(max(lengths))
        raise ValueError(
            f"{op}: {longest_name} is {longest}, expected at least {max(lengths)}, the length of sequence {at}"
        )
