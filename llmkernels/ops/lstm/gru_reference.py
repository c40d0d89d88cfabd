"""gru_cell and the recurrence of one layer and direction of a GRU in plain PyTorch: the `torch` backend, and the maths.

    x_r, x_z, x_n = the thirds of  gates_x            gates_x = x @ w_ih^T + b_ih, for all steps at once
    h_r, h_z, h_n = the thirds of  h @ w_hh^T + b_hh
    r = sigmoid(x_r + h_r)    z = sigmoid(x_z + h_z)    n = tanh(x_n + r * h_n)    h' = n + z * (h - n)

r comes after the product of h, as in torch and cuDNN, not before it as in the paper. Shapes as in reference.py, with 3
gates instead of 4 and h `[B, H]` as the only state. Sums are fp32 (fp64 for fp64); h is rounded to the dtype at every
step. Cho et al. 2014, arXiv:1406.1078.
"""

import torch
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype
from llmkernels.ops.lstm.reference import _joined, _over, step_rows


def _step(x: Tensor, hidden: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(h', [r, z, n, h_n] side by side), all wide."""
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = hidden.chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return n + z * (h - n), torch.cat((r, z, n, h_n), -1)


def gru_cell(gates_x: Tensor, gates_h: Tensor, h: Tensor) -> Tensor:
    """The differentiable formula of one step behind its two products, `[B, 3 * H]` each: h'."""
    acc = accumulate_dtype(h.dtype)
    return _step(gates_x.to(acc), gates_h.to(acc), h.to(acc))[0].to(h.dtype)


def recurrence(gates_x: Tensor, h0: Tensor, w_hh: Tensor, b_hh: Tensor | None, batch_sizes: Tensor | None,
               reverse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The differentiable formula: (y `[N, H]`, h_n)."""
    return _forward(gates_x, h0, w_hh, b_hh, batch_sizes, reverse)[:2]


def _forward(gates_x, h0, w_hh, b_hh, batch_sizes, reverse):
    dtype, acc = gates_x.dtype, accumulate_dtype(gates_x.dtype)
    steps, room = step_rows(len(gates_x), len(h0), batch_sizes)
    h, weight, bias = h0, w_hh.to(acc).t(), None if b_hh is None else b_hh.to(acc)
    outputs, gates = [], []
    for first, count in reversed(steps) if reverse else steps:
        last = h[:count].to(acc)
        hidden = last @ weight if bias is None else torch.addmm(bias, last, weight)
        new, step_gates = _step(gates_x[first : first + count].to(acc), hidden, last)
        outputs.append(new.to(dtype))
        gates.append(step_gates.to(dtype))
        h = _over(outputs[-1], h)
    if reverse:
        outputs, gates = outputs[::-1], gates[::-1]
    like = gates_x.new_empty(0, 4 * h0.shape[1])
    return _joined(outputs, room, h0), h, _joined(gates, room, like)


def gru_recurrence_fwd(gates_x, h0, w_hh, b_hh, batch_sizes, reverse, save):
    """Returns (y, h_n, gates `[N, 4 * H]`: r, z, n, h_n of each row); the last is empty unless `save`."""
    y, h_n, gates = _forward(gates_x, h0, w_hh, b_hh, batch_sizes, reverse)
    # A raw op returns no alias of its inputs; without steps h0 is what is left.
    return y, h_n.clone() if h_n is h0 else h_n, gates if save else gates.new_empty(0)


def gru_recurrence_bwd(dy, dh_n, h0, w_hh, batch_sizes, reverse, y, gates, wanted):
    """Returns (dgates_x, dh0, dw_hh, db_hh); what is not wanted is an empty tensor. None for dy or dh_n is zero."""
    dtype, acc = gates.dtype, accumulate_dtype(gates.dtype)
    steps, room = step_rows(len(gates), len(h0), batch_sizes)
    weight, order = w_hh.to(acc), steps[::-1] if reverse else steps
    dh = torch.zeros_like(h0, dtype=acc) if dh_n is None else dh_n.to(acc)
    found, dw_hh, db_hh = [], torch.zeros_like(weight), weight.new_zeros(len(weight))
    for at in reversed(range(len(order))):
        first, count = order[at]
        rows, last = slice(first, first + count), h0[:count]
        if at > 0:
            before, known = order[at - 1][0], min(order[at - 1][1], count)
            last = _over(y[before : before + known], last)
        last = last.to(acc)
        step = dh[:count] if dy is None else dh[:count] + dy[rows].to(acc)
        r, z, n, h_n = gates[rows].to(acc).chunk(4, -1)
        dn = step * (1.0 - z) * (1.0 - n * n)
        dr, dz, dproduct = dn * h_n * r * (1.0 - r), step * (last - n) * z * (1.0 - z), dn * r
        dhidden = torch.cat((dr, dz, dproduct), -1)
        if wanted[2]:
            dw_hh += dhidden.t() @ last
        if wanted[3]:
            db_hh += dhidden.sum(0)
        # Not addmm: a sum that starts at the large step * z rounds all its small terms to that (2 to 3 times as wrong).
        dh = _over(step * z + dhidden @ weight, dh)
        found.append(torch.cat((dr, dz, dn), -1).to(dtype))
    dgates_x = _joined(found if reverse else found[::-1], room, gates.new_empty(0, len(weight)))
    grads = (dgates_x, dh, dw_hh, db_hh)
    return tuple(grad.to(dtype) if want else gates.new_empty(0) for grad, want in zip(grads, wanted, strict=True))
