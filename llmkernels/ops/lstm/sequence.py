"""lstm: layers, directions, lengths and dropout around the recurrence of op.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llmkernels import _op, registry
from llmkernels.ops.lstm import layout, op
from llmkernels.ops.lstm.arguments import (
    Layer,
    check_input,
    check_layers,
    check_probability,
    layers_of,
)
from llmkernels.ops.lstm.products import linear
from llmkernels.ops.lstm.reference import Extras


class Settings(NamedTuple):
    """How the layers are run; the arguments of `lstm` of the same names."""

    dropout: float
    train: bool
    directions: int
    zoneout: tuple[float, float]  # of h, of c
    recurrent_dropout: float
    return_cells: bool
    backend: str | None


def _extras(layer: Layer, rows: Tensor, hidden: int, size: int, settings: Settings) -> Extras:
    def keep(p: float, columns: int) -> Tensor | None:
        if p == 0.0:
            return None
        whole = rows.new_full((rows.shape[0], columns), p)
        return torch.bernoulli(whole) if settings.train else whole

    return Extras(
        keep(settings.zoneout[0], size),
        keep(settings.zoneout[1], hidden),
        layer.norm_hh,
        layer.norm_c,
        layer.norm_c_bias,
    )


def _gates_of_input(rows: Tensor, layer: Layer, native: bool) -> Tensor:
    """[N, 4 * H]: what the input adds to the gates at all steps, in one product."""
    bias = None if layer.b_ih is None else layer.b_ih + layer.b_hh
    if layer.norm_ih is None:
        return linear(rows, layer.w_ih, bias, native)
    normed = torch_functional.layer_norm(linear(rows, layer.w_ih, None, native), layer.norm_ih.shape, layer.norm_ih)
    return normed if bias is None else normed + bias


def run(rows: Tensor, h0: Tensor, c0: Tensor, layers: list[Layer], batch_sizes: Tensor | None,
        settings: Settings) -> layout.Result:  # fmt: skip
    """All layers on rows `[N, I]`: (y `[N, D * R]`, (h_n, c_n), the last layer's cells `[N, D * H]` if wanted).

    Rows and `batch_sizes` as in reference.py; h0 `[L * D, B, R]` and c0 `[L * D, B, H]`.
    """
    dtype, hidden, size = rows.dtype, c0.shape[-1], h0.shape[-1]
    native = registry.forced_backend(settings.backend) in (None, "cpu")

    def given(rows: Tensor, index: int) -> op.Given:
        layer, w_hh = layers[index], layers[index].w_hh
        gates_x = _gates_of_input(rows, layer, native)
        if settings.recurrent_dropout > 0.0:
            w_hh = torch_functional.dropout(w_hh, settings.recurrent_dropout, settings.train)
        extras = _extras(layer, rows, hidden, size, settings)
        return (gates_x, h0[index], c0[index], w_hh, layer.w_hr), extras

    def result(found: tuple[Tensor, ...], cells_wanted: bool):
        y, h_n, c_n, every_c = found
        return y, (h_n, c_n), every_c.to(dtype) if cells_wanted else None

    def one(rows: Tensor, index: int, reverse: bool, last: bool):
        cells = settings.return_cells and last
        found = op.recurrence(*given(rows, index), batch_sizes, reverse, cells, settings.backend)
        return result(found, cells)

    def both(rows: Tensor, index: int, last: bool):
        cells = settings.return_cells and last
        other = lambda: given(rows, index + 1)
        found = op.recurrence_both(given(rows, index), other, batch_sizes, cells, settings.backend)
        return (result(direction, cells) for direction in found)

    return layout.over_layers(rows, len(layers), settings.directions, settings.dropout, settings.train, one, both)


def zoneout_pair(zoneout: float | tuple[float, float]) -> tuple[float, float]:
    """The probabilities of h and of c, from one of h alone or from both."""
    pair = (zoneout, 0.0) if isinstance(zoneout, int | float) else tuple(zoneout)
    for p in pair:
        check_probability("lstm", "zoneout", p)
    return pair


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    recurrent_dropout: float = 0.0,
    norms: Sequence[Tensor] | None = None,
    return_cells: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """A long short-term memory of several layers over whole sequences: torch.lstm, and more.

    Args:
        input: `[T, B, I]`, `[B, T, I]` with `batch_first`, or one sequence `[T, I]`; fp64, fp32, bf16 or fp16.
        hx: (h0 `[L * D, B, R]`, c0 `[L * D, B, H]`), without B for one sequence; None: zeros. D is 2 if
            `bidirectional`, R the size of a projection, else H.
        params: torch's flat list: for each layer, and within it for each direction, w_ih `[4 * H, I]` (of later layers
            `[4 * H, D * R]`), w_hh `[4 * H, R]`, with `has_biases` b_ih and b_hh `[4 * H]`, with a projection w_hr
            `[R, H]`; gates in the order i, f, g, o.
        dropout: what becomes of the outputs of all layers but the last, while `train`: torch's dropout.
        lengths: `[B]`, how many steps each sequence has. Later steps are not read; `output` is zero there, and h_n and
            c_n belong to each sequence's own last step.
        zoneout: the probability with which a unit of h keeps its last value, or a pair of them, of h and of c. Its
            expectation if not `train`.
        recurrent_dropout: dropout of w_hh while `train`, the same for all steps (DropConnect).
        norms: layer norms; for each layer and direction norm_ih `[4 * H]`, norm_hh `[4 * H]`, norm_c `[H]` and
            norm_c_bias `[H]`: the weights of those of x @ w_ih^T, of h @ w_hh^T and of c, the last one with its bias.
        return_cells: also return c of every step of the last layer, `[T, B, D * H]` as `output` is.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: (output `[T, B, D * R]`, h_n `[L * D, B, R]`, c_n `[L * D, B, H]`), with `return_cells` the cells too. c is
        carried in fp32 (fp64 for fp64), h in the dtype of `input`.
    Raises: ValueError or TypeError, shapes, dtypes, devices, lengths or probabilities do not fit, or T is 0;
        NoBackendError, a forced backend cannot run this call (the message says why).
    Reference: Hochreiter, Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; zoneout: Krueger et al. 2016,
        arXiv:1606.01305; DropConnect: Merity et al. 2017, arXiv:1708.02182; layer norm: Ba et al. 2016,
        arXiv:1607.06450.
    """
    found = run_batch(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, lengths,
                      norms, zoneout, recurrent_dropout, return_cells, backend)  # fmt: skip
    return (found.output, *found.states) if found.cells is None else (found.output, *found.states, found.cells)


def run_batch(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, lengths, norms,
              zoneout, recurrent_dropout, return_cells, backend) -> layout.Result:  # fmt: skip
    """The arguments of `lstm`; `input` may also be a PackedSequence, which has its own lengths."""
    packed = input if isinstance(input, PackedSequence) else None
    rows = input if packed is None else packed.data
    rows, params, hx, norms = layout.autocast(rows, params, hx, norms)
    layers = layers_of(params, has_biases, num_layers, bidirectional, norms)
    check_input("lstm", rows, (2, 3) if packed is None else (2,), layers[0].w_ih.shape[-1])
    directions = 2 if bidirectional else 1
    hidden, size = check_layers(rows, layers, directions)
    for name, value in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
        check_probability("lstm", name, value)
    settings = Settings(dropout, train, directions, zoneout_pair(zoneout), recurrent_dropout, return_cells, backend)
    states = layout.States("lstm", len(layers), (size, hidden))
    recur = lambda rows, given, batch_sizes: run(rows, *given, layers, batch_sizes, settings)
    if packed is not None:
        return layout.over_packed(packed, rows, hx, states, recur)
    return layout.over_batch(rows, hx, states, batch_first, lengths, recur)


_op.define_public(
    "lstm",
    "(Tensor input, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train,"
    " bool bidirectional, bool batch_first, *, Tensor? lengths=None) -> (Tensor, Tensor, Tensor)",
    lstm,
)
