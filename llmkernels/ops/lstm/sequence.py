"""lstm: layers, directions, lengths and dropout around the recurrence of op.py."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels import _op
from llmkernels._autograd import transform_active
from llmkernels.ops.lstm import op
from llmkernels.ops.lstm.arguments import (
    Layer,
    check_input,
    check_layers,
    check_like,
    check_probability,
    checked_lengths,
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


def _gates_of_input(rows: Tensor, layer: Layer) -> Tensor:
    """[N, 4 * H]: what the input adds to the gates at all steps, in one product."""
    bias = None if layer.b_ih is None else layer.b_ih + layer.b_hh
    if layer.norm_ih is None:
        return linear(rows, layer.w_ih, bias)
    normed = torch_functional.layer_norm(linear(rows, layer.w_ih, None), layer.norm_ih.shape, layer.norm_ih)
    return normed if bias is None else normed + bias


def run(rows: Tensor, h0: Tensor, c0: Tensor, layers: list[Layer], batch_sizes: Tensor | None,
        settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """All layers on rows `[N, I]`: (y `[N, D * R]`, h_n, c_n, the last layer's cells `[N, D * H]` if they are wanted).

    Rows and `batch_sizes` as in reference.py; h0 `[L * D, B, R]` and c0 `[L * D, B, H]`.
    """
    directions, last = settings.directions, len(layers) - settings.directions
    dtype, hidden, size = rows.dtype, c0.shape[-1], h0.shape[-1]
    states, cells = [], []
    for first in range(0, len(layers), directions):
        outputs = []
        for index in range(first, first + directions):
            layer, cells_wanted = layers[index], settings.return_cells and first == last
            gates_x = _gates_of_input(rows, layer)
            w_hh = layer.w_hh
            if settings.recurrent_dropout > 0.0:
                w_hh = torch_functional.dropout(w_hh, settings.recurrent_dropout, settings.train)
            extras = _extras(layer, rows, hidden, size, settings)
            y, h_n, c_n, every_c = op.recurrence(
                gates_x, h0[index], c0[index], w_hh, layer.w_hr, batch_sizes, index > first, extras, cells_wanted,
                settings.backend,
            )  # fmt: skip
            outputs.append(y)
            states.append((h_n, c_n))
            if cells_wanted:
                cells.append(every_c.to(dtype))
        rows = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if first != last and settings.dropout > 0.0:
            rows = torch_functional.dropout(rows, settings.dropout, settings.train)
    h_n, c_n = (torch.stack(parts) for parts in zip(*states, strict=True))
    return rows, h_n, c_n, torch.cat(cells, -1) if cells else None


class _Ragged(NamedTuple):
    """Sequences of different lengths, the longest first, and how their rows are found in the user's tensor."""

    order: Tensor  # [B]: the sequences by falling length
    index: Tensor  # [N]: where each row is in the first two dimensions of the input
    live: Tensor | None  # [N, 1]: which rows have a sequence; None: all
    batch_sizes: Tensor  # [T] on the CPU


def _ragged(lengths: Tensor, steps: int, batch: int, batch_first: bool, device: torch.device) -> _Ragged:
    """Rows without a sequence are left out, unless a compiler or a transform needs shapes that no value decides."""
    fixed = torch.compiler.is_compiling() or transform_active()
    if not fixed:
        lengths = lengths.cpu()
    falling, order = lengths.sort(descending=True, stable=True)
    time = torch.arange(steps, device=lengths.device)[:, None]
    live = time < falling
    index = order * steps + time if batch_first else time * batch + order
    batch_sizes = live.sum(1).cpu()
    if fixed:
        return _Ragged(order.to(device), index.flatten().to(device), live.flatten()[:, None].to(device), batch_sizes)
    return _Ragged(order.to(device), index[live].to(device), None, batch_sizes)


def _autocast(input: Tensor, *others: Sequence[Tensor]) -> tuple:
    """Under autocast all tensors in its dtype, as torch's LSTM has them."""
    kind = input.device.type
    if not torch.is_autocast_enabled(kind) or input.dtype == torch.float64:
        return input, *others
    dtype = torch.get_autocast_dtype(kind)
    return input.to(dtype), *(None if group is None else [t.to(dtype) for t in group] for group in others)


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
    input, params, hx, norms = _autocast(input, params, hx, norms)
    layers = layers_of(params, has_biases, num_layers, bidirectional, norms)
    check_input("lstm", input, (2, 3), layers[0].w_ih.shape[-1])
    directions = 2 if bidirectional else 1
    hidden, size = check_layers(input, layers, directions)
    for name, value in (("dropout", dropout), ("recurrent_dropout", recurrent_dropout)):
        check_probability("lstm", name, value)
    one = input.dim() == 2
    if one:
        if lengths is not None:
            raise ValueError("lstm: lengths is given with one sequence, expected None or a 3-D input")
        input, batch_first = input[:, None], False
    steps, batch = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    if steps == 0:
        raise ValueError(f"lstm: input has shape {tuple(input.shape)}, expected at least one step")
    shape = (len(layers),) if one else (len(layers), batch)
    if hx is None:
        hx = [input.new_zeros(*shape, columns) for columns in (size, hidden)]
    h0, c0 = hx
    check_like("lstm", input, [("h0", h0, (*shape, size)), ("c0", c0, (*shape, hidden))])
    if one:
        h0, c0 = h0[:, None], c0[:, None]
    settings = Settings(dropout, train, directions, zoneout_pair(zoneout), recurrent_dropout, return_cells, backend)
    if lengths is None:
        found = _uniform(input, h0, c0, layers, batch_first, settings)
    else:
        ragged = _ragged(checked_lengths(lengths, batch, steps), steps, batch, batch_first, input.device)
        found = _with_lengths(input, h0, c0, layers, ragged, settings)
    if one:
        found = tuple(result.squeeze(1) for result in found)
    return found


def _uniform(input, h0, c0, layers, batch_first, settings) -> tuple[Tensor, ...]:
    if batch_first:
        input = input.transpose(0, 1)
    steps, batch = input.shape[:2]
    y, h_n, c_n, cells = run(input.reshape(steps * batch, input.shape[2]), h0, c0, layers, None, settings)

    def shaped(rows: Tensor) -> Tensor:
        whole = rows.view(steps, batch, rows.shape[-1])
        return whole.transpose(0, 1) if batch_first else whole

    return (shaped(y), h_n, c_n) if cells is None else (shaped(y), h_n, c_n, shaped(cells))


def _with_lengths(input, h0, c0, layers, ragged: _Ragged, settings) -> tuple[Tensor, ...]:
    rows = input.flatten(0, 1).index_select(0, ragged.index)
    if ragged.live is not None:
        rows = rows.masked_fill(~ragged.live, 0.0)  # what stands there may be NaN
    sorted_state = (state.index_select(1, ragged.order) for state in (h0, c0))
    y, h_n, c_n, cells = run(rows, *sorted_state, layers, ragged.batch_sizes, settings)

    def padded(rows: Tensor) -> Tensor:
        if ragged.live is not None:
            rows = rows.masked_fill(~ragged.live, 0.0)
        whole = rows.new_zeros(input.shape[0] * input.shape[1], rows.shape[-1])
        return whole.index_copy(0, ragged.index, rows).unflatten(0, input.shape[:2])

    back = ragged.order.argsort()
    h_n, c_n = (state.index_select(1, back) for state in (h_n, c_n))
    return (padded(y), h_n, c_n) if cells is None else (padded(y), h_n, c_n, padded(cells))


_op.define_public(
    "lstm",
    "(Tensor input, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train,"
    " bool bidirectional, bool batch_first, *, Tensor? lengths=None) -> (Tensor, Tensor, Tensor)",
    lstm,
)
