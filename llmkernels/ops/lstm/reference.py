"""lstm_cell and the recurrence of one layer and direction in plain PyTorch: the `torch` backend, and the maths.

    i, f, g, o = the four quarters of  gates_x + h @ w_hh^T       gates_x = x @ w_ih^T + b, for all steps at once
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(c'),  then  @ w_hr^T  with a projection

Shapes: N rows of all steps, ordered by step; B sequences, T steps, H hidden size, R the size of h (H, or that of the
projection). gates `[.., 4 * H]`, h0 `[B, R]`, c0 `[B, H]`, w_hh `[4 * H, R]`, w_hr `[R, H]`.
Rows: `batch_sizes` `[T]`, int64 on the CPU, never increasing, is how many sequences step t has; None: all of them. Its
rows follow each other without gaps (N is the sum), or every step has room for B of them (N is T * B); rows without a
sequence are zero. `reverse` goes through the steps from the last one.
Precision: sums and c are fp32 (fp64 for fp64); h is rounded to the dtype at every step, c where it is returned as c_n.
Hochreiter, Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735; Gers et al. 2000, doi:10.1162/089976600300015015 (forget
gate); Sak et al. 2014, arXiv:1402.1128 (projection); Krueger et al. 2016, arXiv:1606.01305 (zoneout); Ba et al. 2016,
arXiv:1607.06450 (layer norm).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype


class Extras(NamedTuple):
    """What no compiled kernel has. Zoneout: a unit keeps its last value with this probability, row by row."""

    keep_h: Tensor | None = None  # [N, R], 1 where the last h stays; its expectation when not training
    keep_c: Tensor | None = None  # [N, H]
    norm_hh: Tensor | None = None  # [4 * H]: layer norm of h @ w_hh^T, all quarters together
    norm_c: Tensor | None = None  # [H]: layer norm of c' before its tanh
    norm_c_bias: Tensor | None = None  # [H]


NO_EXTRAS = Extras()


# --- one step -------------------------------------------------------------------------------------------------------


def _activated(gates: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = gates.chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)


def lstm_cell(gates_x: Tensor, gates_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable formula of one step: (h', c')."""
    dtype, acc = c.dtype, accumulate_dtype(c.dtype)
    i, f, g, o = _activated(gates_x.to(acc) + gates_h.to(acc))
    c = f * c.to(acc) + i * g
    return (o * torch.tanh(c)).to(dtype), c.to(dtype)


def lstm_cell_fwd(gates_x, gates_h, c, save):
    """Returns (h', c', the activated gates if `save`, else an empty tensor)."""
    dtype, acc = c.dtype, accumulate_dtype(c.dtype)
    i, f, g, o = _activated(gates_x.to(acc) + gates_h.to(acc))
    next_c = f * c.to(acc) + i * g
    gates = torch.cat((i, f, g, o), -1).to(dtype) if save else c.new_empty(0)
    return (o * torch.tanh(next_c)).to(dtype), next_c.to(dtype), gates


def lstm_cell_bwd(dh, dc, gates, c, next_c):
    """Returns (dgates, the gradient of c). `dh` and `dc` arrive at h' and c'; None is zero."""
    dtype, acc = c.dtype, accumulate_dtype(c.dtype)
    dh, dc = (torch.zeros_like(c, dtype=acc) if d is None else d.to(acc) for d in (dh, dc))
    dgates, dc = _step_bwd(dh, dc, gates.to(acc), c.to(acc), next_c.to(acc))
    return dgates.to(dtype), dc.to(dtype)


def _step_bwd(dh, dc, gates, c, next_c):
    """(gradient of the gates before their activation, gradient of c)."""
    i, f, g, o = gates.chunk(4, -1)
    t = torch.tanh(next_c)
    dc = dc + dh * o * (1.0 - t * t)
    di, df, dg, do = dc * g * i * (1.0 - i), dc * c * f * (1.0 - f), dc * i * (1.0 - g * g), dh * t * o * (1.0 - o)
    return torch.cat((di, df, dg, do), -1), dc * f


# --- the rows of the steps ------------------------------------------------------------------------------------------


def step_rows(rows: int, batch: int, batch_sizes: Tensor | None) -> tuple[list[tuple[int, int]], int]:
    """(first row, number of rows with a sequence) of each step, and how many rows a step takes if all take as many."""
    if batch_sizes is None:
        return [(first, batch) for first in range(0, rows, batch)] if batch else [], batch
    counts = batch_sizes.tolist()
    if rows == len(counts) * batch:
        return [(step * batch, count) for step, count in enumerate(counts)], batch
    firsts = [0]
    for count in counts:
        firsts.append(firsts[-1] + count)
    return list(zip(firsts, counts, strict=False)), 0


def _over(new: Tensor, old: Tensor) -> Tensor:
    """`old` with its first rows replaced."""
    return new if len(new) == len(old) else torch.cat((new, old[len(new) :]))


def _joined(parts: list[Tensor], room: int, like: Tensor) -> Tensor:
    """The rows of all steps; those without a sequence are zero."""
    if not parts:
        return like.new_zeros(0, like.shape[-1])
    if room:
        parts = [torch_functional.pad(part, (0, 0, 0, room - len(part))) for part in parts]
    return torch.cat(parts)


# --- the recurrence -------------------------------------------------------------------------------------------------


def recurrence(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    extras: Extras = NO_EXTRAS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The differentiable formula: (y `[N, R]`, h_n, c_n, cells `[N, H]`: every c', not rounded)."""
    return _forward(gates_x, h0, c0, w_hh, w_hr, batch_sizes, reverse, extras)[:4]


def _forward(gates_x, h0, c0, w_hh, w_hr, batch_sizes, reverse, extras=NO_EXTRAS):
    dtype, acc = gates_x.dtype, accumulate_dtype(gates_x.dtype)
    steps, room = step_rows(len(gates_x), len(h0), batch_sizes)
    h, c, weight = h0, c0.to(acc), w_hh.to(acc).t()
    found = [[], [], []]  # y, cells, activated gates of each step
    for first, count in reversed(steps) if reverse else steps:
        rows = slice(first, first + count)
        last_h, last_c = h[:count], c[:count]
        product = last_h.to(acc) @ weight
        if extras.norm_hh is not None:
            product = torch_functional.layer_norm(product, product.shape[-1:], extras.norm_hh.to(acc))
        i, f, g, o = _activated(gates_x[rows].to(acc) + product)
        new_c = f * last_c + i * g
        if extras.keep_c is not None:
            new_c = torch.lerp(new_c, last_c, extras.keep_c[rows].to(acc))
        shown = new_c
        if extras.norm_c is not None:
            bias = None if extras.norm_c_bias is None else extras.norm_c_bias.to(acc)
            shown = torch_functional.layer_norm(new_c, new_c.shape[-1:], extras.norm_c.to(acc), bias)
        new_h = o * torch.tanh(shown)
        if w_hr is not None:
            new_h = new_h @ w_hr.to(acc).t()
        if extras.keep_h is not None:
            new_h = torch.lerp(new_h, last_h.to(acc), extras.keep_h[rows].to(acc))
        new_h = new_h.to(dtype)
        h, c = _over(new_h, h), _over(new_c, c)
        for list_, part in zip(found, (new_h, new_c, torch.cat((i, f, g, o), -1).to(dtype)), strict=True):
            list_.append(part)
    if reverse:
        found = [list_[::-1] for list_ in found]
    y, cells, gates = (_joined(list_, room, x) for list_, x in zip(found, (h, c, gates_x), strict=True))
    return y, h, c.to(dtype), cells, gates


def lstm_recurrence_fwd(gates_x, h0, c0, w_hh, w_hr, batch_sizes, reverse, save):
    """Returns (y, h_n, c_n, activated gates, cells); the last two are empty unless `save`."""
    y, h_n, c_n, cells, gates = _forward(gates_x, h0, c0, w_hh, w_hr, batch_sizes, reverse)
    # A raw op returns no view or alias of its inputs; without steps h0 and c0 are what is left.
    h_n, c_n = (result.clone() if result is given else result for result, given in ((h_n, h0), (c_n, c0)))
    if not save:
        gates, cells = gates.new_empty(0), cells.new_empty(0)
    return y, h_n, c_n, gates, cells


def lstm_recurrence_bwd(dy, dh_n, dc_n, dcells, h0, c0, w_hh, w_hr, batch_sizes, reverse, y, gates, cells, wanted):
    """Returns (dgates, dh0, dc0, dw_hh, dw_hr); what is not wanted is an empty tensor.

    dy, dh_n, dc_n and dcells arrive at y, h_n, c_n and cells; None is zero. dgates is the gradient of gates_x too.
    """
    dtype, acc = gates.dtype, accumulate_dtype(gates.dtype)
    steps, room = step_rows(len(gates), len(h0), batch_sizes)
    weight, projection = w_hh.to(acc), None if w_hr is None else w_hr.to(acc)
    dh = torch.zeros_like(h0, dtype=acc) if dh_n is None else dh_n.to(acc)
    dc = torch.zeros_like(c0, dtype=acc) if dc_n is None else dc_n.to(acc)
    found, dw_hh, dw_hr = [], torch.zeros_like(weight), None if w_hr is None else torch.zeros_like(projection)
    order = steps[::-1] if reverse else steps
    for at in reversed(range(len(order))):
        first, count = order[at]
        rows = slice(first, first + count)
        last_h, last_c = h0[:count], c0[:count].to(acc)
        if at > 0:
            before, known = order[at - 1][0], min(order[at - 1][1], count)
            last_h = _over(y[before : before + known], last_h)
            last_c = _over(cells[before : before + known], last_c)
        dh_step, dc_step = dh[:count], dc[:count]
        if dy is not None:
            dh_step = dh_step + dy[rows].to(acc)
        if dcells is not None:
            dc_step = dc_step + dcells[rows].to(acc)
        dhidden = dh_step if projection is None else dh_step @ projection
        step_gates, step_cells = gates[rows].to(acc), cells[rows].to(acc)
        dgates, dc_step = _step_bwd(dhidden, dc_step, step_gates, last_c, step_cells)
        if wanted[3]:
            dw_hh += dgates.t() @ last_h.to(acc)
        if wanted[4]:
            dw_hr += dh_step.t() @ (step_gates.chunk(4, -1)[3] * torch.tanh(step_cells))
        dh, dc = _over(dgates @ weight, dh), _over(dc_step, dc)
        found.append(dgates)
    dgates = _joined(found if reverse else found[::-1], room, gates)
    grads = (dgates, dh, dc, dw_hh, dw_hr)
    return tuple(grad.to(dtype) if want else gates.new_empty(0) for grad, want in zip(grads, wanted, strict=True))
