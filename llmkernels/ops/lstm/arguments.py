"""What a call of lstm or lstm_cell may look like: checks with one error text for all backends."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmkernels._dtypes import FLOAT_DTYPES, dtype_error


class Layer(NamedTuple):
    """The parameters of one layer and direction. Those of a layer norm are None without one."""

    w_ih: Tensor  # [4 * H, I]
    w_hh: Tensor  # [4 * H, R]
    b_ih: Tensor | None  # [4 * H]
    b_hh: Tensor | None  # [4 * H]
    w_hr: Tensor | None  # [R, H]
    norm_ih: Tensor | None = None  # [4 * H]
    norm_hh: Tensor | None = None  # [4 * H]
    norm_c: Tensor | None = None  # [H]
    norm_c_bias: Tensor | None = None  # [H]


NORMS = 4  # of the fields, the last


def layers_of(params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool,
              norms: Sequence[Tensor] | None, op: str = "lstm") -> list[Layer]:  # fmt: skip
    """The flat list of parameters, torch's order, by layer and direction; `norms` likewise."""
    count = num_layers * (2 if bidirectional else 1)
    plain = 4 if has_biases else 2
    allowed = (count * plain, count * (plain + 1)) if op == "lstm" else (count * plain,)
    if num_layers <= 0 or len(params) not in allowed:
        projection = f", or {allowed[1]} with a projection," if op == "lstm" else ""
        raise ValueError(
            f"{op}: params has {len(params)} tensors, expected {allowed[0]}{projection} for num_layers={num_layers},"
            f" has_biases={has_biases}, bidirectional={bidirectional}"
        )
    if norms is not None and len(norms) != NORMS * count:
        raise ValueError(f"lstm: norms has {len(norms)} tensors, expected {NORMS * count}")
    size, layers = len(params) // count, []
    for index in range(count):
        w_ih, w_hh, *rest = params[index * size : (index + 1) * size]
        b_ih, b_hh = rest[:2] if has_biases else (None, None)
        w_hr = rest[-1] if size > plain else None
        own = () if norms is None else norms[index * NORMS : (index + 1) * NORMS]
        layers.append(Layer(w_ih, w_hh, b_ih, b_hh, w_hr, *own))
    return layers


def check_input(op: str, input: Tensor, dims: tuple[int, ...], size: int) -> None:
    """A floating tensor with one of these numbers of dimensions, the last of them `size`."""
    if input.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "input", input.dtype)
    if input.dim() not in dims or input.shape[-1] != size:
        expected = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)}, expected {expected} with {size} columns, as w_ih has"
        )


def check_like(op: str, input: Tensor, named: Sequence[tuple[str, Tensor | None, tuple[int, ...]]]) -> None:
    """Each (name, tensor, shape) has that shape, and the dtype and device of `input`; a None is absent."""
    for name, tensor, shape in named:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if tensor.dtype != input.dtype:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected {input.dtype}, the dtype of input")
        if tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {input.device}, the device of input")


def check_layers(
    input: Tensor, layers: list[Layer], directions: int, op: str = "lstm", gates: int = 4
) -> tuple[int, int]:
    """Every parameter fits; returns (H, R)."""
    first = layers[0]
    if first.w_ih.dim() != 2 or first.w_ih.shape[0] % gates:
        raise ValueError(f"{op}: w_ih of layer 0 has shape {tuple(first.w_ih.shape)}, expected [{gates} * H, I]")
    hidden = first.w_ih.shape[0] // gates
    size = hidden if first.w_hr is None else first.w_hr.shape[0]
    if first.w_hr is not None and size >= hidden:
        raise ValueError(f"lstm: w_hr of layer 0 has {size} rows, expected fewer than the hidden size, {hidden}")
    for index, layer in enumerate(layers):
        columns = first.w_ih.shape[1] if index < directions else directions * size
        where = f"of layer {index // directions}{' reverse' if index % directions else ''}"
        wide = gates * hidden
        shapes = ((wide, columns), (wide, size), (wide,), (wide,), (size, hidden), (wide,), (wide,), (hidden,),
                  (hidden,))  # fmt: skip
        check_like(
            op,
            input,
            [(f"{name} {where}", *rest) for name, *rest in zip(layer._fields, layer, shapes, strict=True)],
        )
    return hidden, size


def check_probability(op: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} is {value}, expected a probability in [0, 1]")


def checked_lengths(op: str, lengths: Tensor | Sequence[int], batch: int, steps: int) -> Tensor:
    """`lengths` as an int64 tensor `[B]`; its values are seen only outside of a compiler."""
    lengths = torch.as_tensor(lengths)
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(
            f"{op}: lengths has shape {tuple(lengths.shape)} and dtype {lengths.dtype}, expected integers ({batch},)"
        )
    if not torch.compiler.is_compiling() and batch and not 0 < int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(
            f"{op}: lengths are {int(lengths.min())} to {int(lengths.max())}, expected 1 to {steps}, the steps of input"
        )
    return lengths.to(torch.int64)
