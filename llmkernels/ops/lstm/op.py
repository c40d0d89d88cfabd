"""The kernels of lstm and lstm_cell: schemas, fakes, autograd, backend order. sequence.py and cell.py are what users
call; reference.py has the maths and the shapes.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import accumulate_dtype
from llmkernels.ops.lstm import reference
from llmkernels.ops.lstm.reference import Extras

# --- raw ops --------------------------------------------------------------------------------------------------------


def _cell_fwd_fake(gates_x, gates_h, c, save):
    return torch.empty_like(c), torch.empty_like(c), c.new_empty(gates_x.shape if save else 0)


def _cell_bwd_fake(dh, dc, gates, c, next_c):
    return torch.empty_like(gates), torch.empty_like(c)


def _fwd_fake(gates_x, h0, c0, w_hh, w_hr, batch_sizes, reverse, save):
    rows, acc = gates_x.shape[0], accumulate_dtype(gates_x.dtype)
    gates = gates_x.new_empty(gates_x.shape if save else 0)
    cells = c0.new_empty((rows, c0.shape[1]) if save else 0, dtype=acc)
    return h0.new_empty(rows, h0.shape[1]), h0.new_empty(h0.shape), c0.new_empty(c0.shape), gates, cells


def _bwd_fake(dy, dh_n, dc_n, dcells, h0, c0, w_hh, w_hr, batch_sizes, reverse, y, gates, cells, wanted):
    likes = (gates, h0, c0, w_hh, w_hr)
    return tuple(gates.new_empty(like.shape if want else 0) for like, want in zip(likes, wanted, strict=True))


def _fwd_both_fake(*args):
    *tensors, batch_sizes, save = args
    halves = (tensors[:4], tensors[4:])
    return tuple(t for half in halves for t in _fwd_fake(*half, None, batch_sizes, False, save))


def _bwd_both_fake(*args):
    *tensors, _batch_sizes, wanted = args
    likes = [half[at] for half in (tensors[:10], tensors[10:]) for at in (8, 4, 5, 6)]  # gates, h0, c0, w_hh
    return tuple(like.new_empty(like.shape if want else 0) for like, want in zip(likes, wanted, strict=True))


def _portable_cell_fwd(gates_x, gates_h, c, save):
    return registry.pick("lstm_cell", (gates_x, gates_h, c)).fwd(gates_x, gates_h, c, save)


def _portable_cell_bwd(dh, dc, gates, c, next_c):
    return registry.pick("lstm_cell", (gates, gates, c)).bwd(dh, dc, gates, c, next_c)


def _portable_fwd(gates_x, h0, c0, w_hh, w_hr, *rest):
    return registry.pick("lstm", (gates_x, h0, c0, w_hh, w_hr)).fwd(gates_x, h0, c0, w_hh, w_hr, *rest)


def _portable_bwd(dy, dh_n, dc_n, dcells, h0, c0, w_hh, w_hr, *rest):
    chosen = registry.pick("lstm", (rest[3], h0, c0, w_hh, w_hr))
    return chosen.bwd(dy, dh_n, dc_n, dcells, h0, c0, w_hh, w_hr, *rest)


_op.define_kernel(
    "lstm_cell_fwd",
    "(Tensor gates_x, Tensor gates_h, Tensor c, bool save) -> (Tensor next_h, Tensor next_c, Tensor gates)",
    _cell_fwd_fake,
    _portable_cell_fwd,
)
_op.define_kernel(
    "lstm_cell_bwd",
    "(Tensor? dh, Tensor? dc, Tensor gates, Tensor c, Tensor next_c) -> (Tensor dgates, Tensor dlast_c)",
    _cell_bwd_fake,
    _portable_cell_bwd,
)
_op.define_kernel(
    "lstm_recurrence_fwd",
    "(Tensor gates_x, Tensor h0, Tensor c0, Tensor w_hh, Tensor? w_hr, Tensor? batch_sizes, bool reverse, bool save)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    _fwd_fake,
    _portable_fwd,
)
_op.define_kernel(
    "lstm_recurrence_bwd",
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor h0, Tensor c0, Tensor w_hh, Tensor? w_hr,"
    " Tensor? batch_sizes, bool reverse, Tensor y, Tensor gates, Tensor cells, bool[5] wanted)"
    " -> (Tensor dgates, Tensor dh0, Tensor dc0, Tensor dw_hh, Tensor dw_hr)",
    _bwd_fake,
    _portable_bwd,
)

# Both directions of a layer, which the CUDA kernels run side by side. Two times the arguments of one.
_BOTH = ("", "_reverse")
_fwd_both = _op.define_own_kernel(
    "cuda",
    "lstm_both_fwd",
    "("
    + "".join(f"Tensor gates_x{end}, Tensor h0{end}, Tensor c0{end}, Tensor w_hh{end}, " for end in _BOTH)
    + "Tensor? batch_sizes, bool save) -> ("
    + ", ".join(
        f"Tensor y{end}, Tensor h_n{end}, Tensor c_n{end}, Tensor gates{end}, Tensor cells{end}" for end in _BOTH
    )
    + ")",
    _fwd_both_fake,
)
_bwd_both = _op.define_own_kernel(
    "cuda",
    "lstm_both_bwd",
    "("
    + "".join(
        f"Tensor? dy{end}, Tensor? dh_n{end}, Tensor? dc_n{end}, Tensor? dcells{end}, Tensor h0{end}, Tensor c0{end},"
        f" Tensor w_hh{end}, Tensor y{end}, Tensor gates{end}, Tensor cells{end}, "
        for end in _BOTH
    )
    + "Tensor? batch_sizes, bool[8] wanted) -> ("
    + ", ".join(f"Tensor dgates{end}, Tensor dh0{end}, Tensor dc0{end}, Tensor dw_hh{end}" for end in _BOTH)
    + ")",
    _bwd_both_fake,
)

# --- autograd -------------------------------------------------------------------------------------------------------


class LSTMCellFunction(torch.autograd.Function):
    """apply(gates_x, gates_h, c, chosen) -> (h', c'): all of a step but its two products, which are their sum's.

    Saves the activated gates and both c.
    """

    @staticmethod
    def forward(ctx, gates_x, gates_h, c, chosen):
        h, next_c, gates = registry.entry("lstm_cell", chosen).fwd(gates_x, gates_h, c, True)
        ctx.save_for_backward(gates_x, gates_h, c, next_c, gates)
        ctx.chosen = chosen
        ctx.set_materialize_grads(False)
        return h, next_c

    @staticmethod
    def backward(ctx, dh, dc):
        gates_x, gates_h, c, next_c, gates = ctx.saved_tensors
        if is_differentiated():
            return (*differentiable_backward(reference.lstm_cell, (gates_x, gates_h, c), (dh, dc)), None)
        dgates, dlast_c = registry.entry("lstm_cell", ctx.chosen).bwd(dh, dc, gates, c, next_c)
        grads = (dgates, dgates, dlast_c)
        return (*(grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)), None)


class LSTMFunction(torch.autograd.Function):
    """apply(gates_x, h0, c0, w_hh, w_hr, batch_sizes, reverse, chosen) -> (y, h_n, c_n, cells).

    One layer and direction behind its input's product. Saves y, the activated gates and every c.
    """

    @staticmethod
    def forward(ctx, gates_x, h0, c0, w_hh, w_hr, batch_sizes, reverse, chosen):
        inputs = (gates_x, h0, c0, w_hh, w_hr, batch_sizes)
        y, h_n, c_n, gates, cells = registry.entry("lstm", chosen).fwd(*inputs, reverse, True)
        ctx.save_for_backward(*inputs, y, gates, cells)
        ctx.settings = (reverse, chosen)
        ctx.set_materialize_grads(False)
        return y, h_n, c_n, cells

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dcells):
        *inputs, batch_sizes, y, gates, cells = ctx.saved_tensors
        reverse, chosen = ctx.settings
        wanted = ctx.needs_input_grad[:5]
        if is_differentiated():
            formula = lambda *tensors: reference.recurrence(*tensors, batch_sizes, reverse)
            grads = differentiable_backward(formula, inputs, (dy, dh_n, dc_n, dcells))
        else:
            bwd = registry.entry("lstm", chosen).bwd
            grads = bwd(dy, dh_n, dc_n, dcells, *inputs[1:], batch_sizes, reverse, y, gates, cells, wanted)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None)


class LSTMBothFunction(torch.autograd.Function):
    """apply(gates_x, h0, c0, w_hh, the same of the reverse, batch_sizes, chosen) -> (y, h_n, c_n, cells) and the same.

    Both directions of a layer without a projection, in one launch where they fit. Saves what LSTMFunction saves of
    each.
    """

    @staticmethod
    def forward(ctx, *args):
        inputs, (batch_sizes, chosen) = args[:8], args[8:]
        found = registry.entry("lstm", chosen).both[0](*inputs, batch_sizes, True)
        shown, saved = [], []
        for y, h_n, c_n, gates, cells in (found[:5], found[5:]):
            shown += (y, h_n, c_n, cells)
            saved += (y, gates, cells)
        ctx.save_for_backward(*inputs, batch_sizes, *saved)
        ctx.chosen = chosen
        ctx.set_materialize_grads(False)
        return tuple(shown)

    @staticmethod
    def backward(ctx, *arriving):
        tensors = ctx.saved_tensors
        inputs, batch_sizes, saved = tensors[:8], tensors[8], tensors[9:]
        wanted = ctx.needs_input_grad[:8]
        if is_differentiated():

            def formula(*tensors):
                ahead = reference.recurrence(*tensors[:4], None, batch_sizes, False)
                return *ahead, *reference.recurrence(*tensors[4:], None, batch_sizes, True)

            grads = differentiable_backward(formula, inputs, arriving)
        else:
            bwd = registry.entry("lstm", ctx.chosen).both[1]
            ahead = (*arriving[:4], *inputs[1:4], *saved[:3])
            back = (*arriving[4:], *inputs[5:], *saved[3:])
            grads = bwd(*ahead, *back, batch_sizes, wanted)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None)


# --- the choice of the backend, and of autograd's way -----------------------------------------------------------------


def cell(gates_x: Tensor, gates_h: Tensor, c: Tensor, chosen: registry.Backend) -> tuple[Tensor, Tensor]:
    """One step behind its products, on the backend that was picked for it."""
    if chosen.name == "torch" and transform_active():
        return reference.lstm_cell(gates_x, gates_h, c)
    if needs_grad(gates_x, gates_h, c):
        return LSTMCellFunction.apply(gates_x, gates_h, c, chosen.name)
    return chosen.fwd(gates_x, gates_h, c, False)[:2]


# What a direction is run on: gates_x, h0, c0, w_hh and w_hr, and what no kernel has.
Given = tuple[tuple[Tensor | None, ...], Extras]


def recurrence(tensors: tuple[Tensor | None, ...], extras: Extras, batch_sizes: Tensor | None, reverse: bool,
               cells: bool, backend: str | None) -> tuple[Tensor, ...]:  # fmt: skip
    """One layer and direction behind its input's product: (y, h_n, c_n, every c), the last one empty unless `cells`."""
    chosen = registry.pick("lstm", (*tensors, *extras), backend)
    if any(extra is not None for extra in extras) or (chosen.name == "torch" and transform_active()):
        return reference.recurrence(*tensors, batch_sizes, reverse, extras)
    if needs_grad(*tensors):
        return LSTMFunction.apply(*tensors, batch_sizes, reverse, chosen.name)
    y, h_n, c_n, _, every_c = chosen.fwd(*tensors, batch_sizes, reverse, cells)
    return y, h_n, c_n, every_c


def recurrence_both(first: Given, second: Callable[[], Given], batch_sizes: Tensor | None, cells: bool,
                    backend: str | None) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
    """Both directions of a layer, the second one's tensors made when they are needed; the results of each.

    In one call where the backend has that.
    """
    ahead, extras = first
    chosen = registry.pick("lstm", (*ahead, *extras, ahead[0]), backend)
    if chosen.both is None or ahead[4] is not None:
        yield recurrence(*first, batch_sizes, False, cells, backend)
        yield recurrence(*second(), batch_sizes, True, cells, backend)
        return
    tensors = (*ahead[:4], *second()[0][:4])
    if needs_grad(*tensors):
        found = LSTMBothFunction.apply(*tensors, batch_sizes, chosen.name)
        yield from (found[:4], found[4:])
        return
    found = chosen.both[0](*tensors, batch_sizes, cells)
    for y, h_n, c_n, _, every_c in (found[:5], found[5:]):
        yield y, h_n, c_n, every_c


# --- backends, best first -------------------------------------------------------------------------------------------


# Of a call of both directions, `pick` sees the tensors of the first one and then its gates again.
_ONE = 5 + len(Extras._fields)


def _kernels_refuse(*tensors) -> str | None:
    if any(extra is not None for extra in tensors[5:_ONE]):
        return "zoneout and layer norm are computed on torch alone"
    return None


def _no_kernel(*_) -> str:
    return "it has no kernel of whole sequences"


_CELL_KERNELS = ("lstm_cell_fwd", "lstm_cell_bwd")
_CELL_REFERENCES = (reference.lstm_cell_fwd, reference.lstm_cell_bwd)
_op.lazy_triton("llmkernels.ops.lstm.triton_kernels", _CELL_KERNELS)
registry.register("lstm_cell", *_op.backends("lstm_cell", *_CELL_KERNELS, *_CELL_REFERENCES))
# The numbers of sequences of the steps are values, and a loop over all steps would be traced step by step.
_KERNELS = ("lstm_recurrence_fwd", "lstm_recurrence_bwd")
_OPAQUE = map(_op.opaque_reference, _KERNELS, (reference.lstm_recurrence_fwd, reference.lstm_recurrence_bwd))
_REFUSE = {"cuda": _kernels_refuse, "triton": _no_kernel, "cpu": _kernels_refuse}
_cuda_way = _op.define_question(
    "cuda", "lstm_recurrence_way", "(Tensor gates_x, Tensor h0, Tensor c0, Tensor w_hh, Tensor? w_hr, bool both) -> str"
)
_WAYS = {"cuda": lambda *tensors: _cuda_way(*tensors[:5], len(tensors) > _ONE)}
_TOGETHER = {"cuda": (_fwd_both, _bwd_both)}
registry.register("lstm", *_op.backends("lstm", *_KERNELS, *_OPAQUE, refuse=_REFUSE, ways=_WAYS, both=_TOGETHER))
