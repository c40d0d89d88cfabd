"""int8: one signed byte a weight, one fp32 scale an output channel, symmetric.

    weight[n, k]  ~  scales[n] * q[n, k]            scales[n] = max_k |weight[n, k]| / 127

    byte n * K + k of the packed form, row-major, `data` `[N, K]` int8:

      bit   7   6   5   4   3   2   1   0
          +---+---+---+---+---+---+---+---+
          | s |       magnitude           |   two's complement, -127 ... 127
          +---+---+---+---+---+---+---+---+

    q is rounded to nearest, ties to even. -128 (1000 0000) is never written, so that -q is always there too, and is
    refused where it is read. A row of zeros has scale 1. `scales` `[N]` fp32, finite and above zero.

Activations may be int8 too, dynamically: each row of x `[.., K]` has its own scale, found when it arrives. The product
of both is a sum of integers, exact in 32 bits for K up to 133,000, and then scaled:

    y[m, n]  =  (x_scales[m] * scales[n]) * sum_k xq[m, k] q[n, k]

A row of x with a NaN or an infinity gives a row of NaN.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmkernels import registry
from llmkernels._dtypes import without_autocast
from llmkernels.quantization import _checks, _rows
from llmkernels.quantization.tensor import QuantizedTensor

MAX = 127
# So many products of two int8 have a sum that fp32 holds exactly, in whatever order it is made.
EXACT_COLUMNS = 2**24 // MAX**2
MAX_COLUMNS = (2**31 - 1) // MAX**2


def quantize(weight: Tensor, name: str = "weight", *, activations: str | None = None, **options) -> QuantizedTensor:
    """A weight `[N, K]` of any floating dtype as int8, for activations as they are or rounded to "int8".

    Raises: ValueError or TypeError: `weight` is not a floating matrix, is too wide for a sum in 32 bits, or a row of it
        has a NaN, an infinity or values that no fp32 scale reaches. `name` is what the messages call it.
    """
    _checks.no_option("int8", options)
    wide = _checks.finite_matrix("int8", weight, name)
    if wide.shape[1] > MAX_COLUMNS:
        raise ValueError(f"int8: {name} has shape {tuple(wide.shape)}, expected [N, K] with K up to {MAX_COLUMNS}")
    largest = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    scales = _checks.finite_scales("int8", largest, MAX, torch.float32, name)
    values = (wide / scales.double()[:, None]).round().clamp(-MAX, MAX)
    return QuantizedTensor("int8", tuple(weight.shape), pack(values), scales, weight.dtype, activations=activations)


def empty(shape: tuple[int, int], device=None, *, activations: str | None = None, **options) -> QuantizedTensor:
    """Zeros of a shape `[N, K]`, for what is loaded later. Raises: TypeError for an option."""
    _checks.no_option("int8", options)
    data = torch.zeros(shape, dtype=torch.int8, device=device)
    scales = torch.ones(shape[0], dtype=torch.float32, device=device)
    return QuantizedTensor("int8", shape, data, scales, activations=activations)


def pack(values: Tensor) -> Tensor:
    """Integers -127 ... 127 `[N, K]` of any dtype as the packed form. Raises: ValueError, others are among them."""
    if values.numel() and not bool((values.abs() <= MAX).all()):
        raise ValueError(f"int8: values are {values.min()} to {values.max()}, expected -{MAX} to {MAX}")
    return values.to(torch.int8).contiguous()


def unpack(data: Tensor) -> Tensor:
    """The packed form as int32 `[N, K]`."""
    return data.to(torch.int32)


def check(tensor: QuantizedTensor) -> None:
    """Raises ValueError where the parts do not have the shapes and dtypes that this file says."""
    _checks.absent("int8", zeros=tensor.zeros, second_scales=tensor.second_scales)
    _checks.group("int8", tensor.group_size, (None,))
    check_parts(tensor.data, tensor.scales, tensor.shape)


def check_parts(data: Tensor, scales: Tensor, shape: tuple[int, int], name: str = "data") -> None:
    """`check` of the two tensors of a weight `shape` that are called `name` and `name`_scale."""
    _checks.part("int8", name, data, (torch.int8,), tuple(shape))
    _checks.part("int8", f"{name}'s scales", scales, (torch.float32,), (shape[0],))


def check_values(tensor: QuantizedTensor, name: str = "data") -> None:
    """Raises ValueError for bytes and scales that `quantize` never writes; for what comes from a file."""
    if bool((tensor.data == -MAX - 1).any()):
        raise ValueError(f"int8: {name} has a -128, expected -{MAX} to {MAX}")
    _checks.finite_positive("int8", tensor.scales, name)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """scales * q, `[N, K]`, in `dtype` or the weight's own."""
    wide = torch.float64 if (dtype or tensor.dtype) == torch.float64 else torch.float32
    return (tensor.data.to(wide) * tensor.scales.to(wide)[:, None]).to(dtype or tensor.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[.., K]` as (int8 `[.., K]`, scales fp32 `[.., 1]`)."""
    values, scales = _rows.scaled(x, MAX)
    return values.round().clamp(-MAX, MAX).to(torch.int8), scales


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a `[M, K]` times b `[N, K]` transposed: int32 `[M, N]`, exact, by fp32 products of few enough columns.

    Both are int8, or fp32 that holds such integers.
    """
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    with without_autocast(a.device):
        for first in range(0, a.shape[1], EXACT_COLUMNS):
            part = slice(first, first + EXACT_COLUMNS)
            total += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return total


def _kernel(x: Tensor, weight: QuantizedTensor):
    """The native forward of quantized_linear, if it runs on x with int8 activations, else None."""
    if not x.is_cpu:
        return None
    chosen = registry.pick("quantized_linear", (x, weight.data, weight.scales, None, None, None, "int8", 0, "int8"))
    return chosen.fwd if chosen.name == "cpu" else None


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    """x `[M, K]` times the transposed weight, plus bias `[N]`, with int8 activations: fp32 `[M, N]`.

    The native kernel gives the same bits.
    """
    return linear_for(x, weight, bias)(x)


def linear_for(like: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """`linear` as a function of x, for many x of the device and dtype of `like`: what it takes is made once."""
    kernel, wide = _kernel(like, weight), None if bias is None else bias.float()
    if kernel is not None:
        return lambda x: kernel(x.float(), weight.data, weight.scales, None, None, wide, "int8", 0, "int8")
    integers = weight.data.float()

    def product(x: Tensor) -> Tensor:
        values, scales = quantize_rows(x)
        y = integer_product(values, integers).float() * (scales * weight.scales)
        return y if wide is None else y + wide

    return product
