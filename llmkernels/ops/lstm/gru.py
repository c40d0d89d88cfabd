"""gru and gru_cell: the kernels' schemas, fakes, autograd and backends, and what users call, with the layers, lengths
and packed sequences of layout.py.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels.ops.lstm import gru_reference, layout
from llmkernels.ops.lstm.arguments import check_input, check_layers, check_like, check_probability, layers_of
from llmkernels.ops.lstm.products import linear

GATES = 3

# --- the recurrence: opaque to a compiler, which would trace it step by step ------------------------------------------


def _fwd_fake(gates_x, h0, w_hh, b_hh, batch_sizes, reverse, save):
    rows, hidden = gates_x.shape[0], h0.shape[1]
    gates = gates_x.new_empty((rows, 4 * hidden) if save else 0)
    return h0.new_empty(rows, hidden), h0.new_empty(h0.shape), gates


def _bwd_fake(dy, dh_n, h0, w_hh, batch_sizes, reverse, y, gates, wanted):
    shapes = ((gates.shape[0], w_hh.shape[0]), h0.shape, w_hh.shape, (w_hh.shape[0],))
    return tuple(gates.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


_KERNELS = ("gru_recurrence_fwd", "gru_recurrence_bwd")
_op.define_kernel(
    "gru_recurrence_fwd",
    "(Tensor gates_x, Tensor h0, Tensor w_hh, Tensor? b_hh, Tensor? batch_sizes, bool reverse, bool save)"
    " -> (Tensor y, Tensor h_n, Tensor gates)",
    _fwd_fake,
    lambda *args: registry.pick("gru", args[:4]).fwd(*args),
)
_op.define_kernel(
    "gru_recurrence_bwd",
    "(Tensor? dy, Tensor? dh_n, Tensor h0, Tensor w_hh, Tensor? batch_sizes, bool reverse, Tensor y, Tensor gates,"
    " bool[4] wanted) -> (Tensor dgates_x, Tensor dh0, Tensor dw_hh, Tensor db_hh)",
    _bwd_fake,
    lambda *args: registry.pick("gru", (args[7], *args[2:4])).bwd(*args),
)


class GRUFunction(torch.autograd.Function):
    """apply(gates_x, h0, w_hh, b_hh, batch_sizes, reverse, chosen) -> (y, h_n).

    One layer and direction behind its input's product. Saves y and four values of each unit and step.
    """

    @staticmethod
    def forward(ctx, gates_x, h0, w_hh, b_hh, batch_sizes, reverse, chosen):
        y, h_n, gates = registry.entry("gru", chosen).fwd(gates_x, h0, w_hh, b_hh, batch_sizes, reverse, True)
        ctx.save_for_backward(gates_x, h0, w_hh, b_hh, batch_sizes, y, gates)
        ctx.settings = (reverse, chosen)
        ctx.set_materialize_grads(False)
        return y, h_n

    @staticmethod
    def backward(ctx, dy, dh_n):
        *inputs, batch_sizes, y, gates = ctx.saved_tensors
        (reverse, chosen), wanted = ctx.settings, ctx.needs_input_grad[:4]
        if is_differentiated():
            formula = lambda *tensors: gru_reference.recurrence(*tensors, batch_sizes, reverse)
            grads = differentiable_backward(formula, inputs, (dy, dh_n))
        else:
            bwd = registry.entry("gru", chosen).bwd
            grads = bwd(dy, dh_n, *inputs[1:3], batch_sizes, reverse, y, gates, wanted)
        return (*(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None)


def _recurrence(gates_x, h0, w_hh, b_hh, batch_sizes, reverse: bool, chosen: registry.Backend) -> tuple[Tensor, Tensor]:
    tensors = (gates_x, h0, w_hh, b_hh)
    if chosen.name == "torch" and transform_active():
        return gru_reference.recurrence(*tensors, batch_sizes, reverse)
    if needs_grad(*tensors):
        return GRUFunction.apply(*tensors, batch_sizes, reverse, chosen.name)
    return chosen.fwd(*tensors, batch_sizes, reverse, False)[:2]


# --- backends, best first ---------------------------------------------------------------------------------------------


def _no_kernel(*_) -> str:
    return "it has no kernel of a GRU"


_REFUSE = {"cuda": _no_kernel, "triton": _no_kernel}
_OPAQUE = map(_op.opaque_reference, _KERNELS, (gru_reference.gru_recurrence_fwd, gru_reference.gru_recurrence_bwd))
registry.register("gru", *_op.backends("gru", *_KERNELS, *_OPAQUE, refuse=_REFUSE))
# A cell is one step of a sequence there, and plain PyTorch elsewhere.
registry.register(
    "gru_cell",
    *(
        replace(backend, op="gru_cell")
        for backend in _op.backends("gru", *_KERNELS, gru_reference.gru_cell, None, refuse=_REFUSE)
        if backend.name != registry.PORTABLE
    ),
)

# --- what users call --------------------------------------------------------------------------------------------------


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units of several layers over whole sequences: torch.gru, with lengths.

    Args:
        input: `[T, B, I]`, `[B, T, I]` with `batch_first`, or one sequence `[T, I]`; fp64, fp32, bf16 or fp16.
        hx: h0 `[L * D, B, H]`, without B for one sequence; None: zeros. D is 2 if `bidirectional`.
        params: torch's flat list: for each layer, and within it for each direction, w_ih `[3 * H, I]` (of later layers
            `[3 * H, D * H]`), w_hh `[3 * H, H]`, with `has_biases` b_ih and b_hh `[3 * H]`; gates in the order r, z, n.
        dropout: what becomes of the outputs of all layers but the last, while `train`: torch's dropout.
        lengths: `[B]`, how many steps each sequence has. Later steps are not read; `output` is zero there, and h_n
            belongs to each sequence's own last step.
        backend: "cpu" | "torch"; default: the first that can run this call.
    Returns: (output `[T, B, D * H]`, h_n `[L * D, B, H]`).
    Raises: ValueError or TypeError, shapes, dtypes, devices, lengths or probabilities do not fit, or T is 0;
        NoBackendError, a forced backend cannot run this call (the message says why).
    Reference: Cho et al. 2014, arXiv:1406.1078.
    """
    found = run_batch(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, lengths,
                      backend)  # fmt: skip
    return found.output, found.states[0]


def run_batch(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, lengths,
              backend) -> layout.Result:  # fmt: skip
    """The arguments of `gru`; `input` may also be a PackedSequence, which has its own lengths."""
    packed = input if isinstance(input, PackedSequence) else None
    rows = input if packed is None else packed.data
    hx = None if hx is None else [hx]
    if not rows.is_cpu:  # where torch's GRU is not in autocast's list: there only its products are in the lower dtype
        rows, params, hx = layout.autocast(rows, params, hx)
    layers = layers_of(params, has_biases, num_layers, bidirectional, None, op="gru")
    check_input("gru", rows, (2, 3) if packed is None else (2,), layers[0].w_ih.shape[-1])
    check_probability("gru", "dropout", dropout)
    directions = 2 if bidirectional else 1
    hidden, _ = check_layers(rows, layers, directions, op="gru", gates=GATES)

    native = registry.forced_backend(backend) in (None, "cpu")

    def recur(rows: Tensor, given: tuple[Tensor, ...], batch_sizes: Tensor | None) -> layout.Result:
        def one(rows: Tensor, index: int, reverse: bool, _last: bool):
            layer = layers[index]
            gates_x = linear(rows, layer.w_ih, layer.b_ih, native).to(rows.dtype)
            tensors = (gates_x, given[0][index], layer.w_hh, layer.b_hh)
            y, h_n = _recurrence(*tensors, batch_sizes, reverse, registry.pick("gru", tensors, backend))
            return y, (h_n,), None

        return layout.over_layers(rows, len(layers), directions, dropout, train, one)

    states = layout.States("gru", len(layers), (hidden,))
    if packed is not None:
        return layout.over_packed(packed, rows, hx, states, recur)
    return layout.over_batch(rows, hx, states, batch_first, lengths, recur)


def gru_cell(
    input: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """One step of gated recurrent units: torch.gru_cell.

    Args:
        input: `[B, I]`, fp64, fp32, bf16 or fp16.
        h: `[B, H]`.
        w_ih, w_hh: `[3 * H, I]`, `[3 * H, H]`, gates in the order r, z, n; b_ih, b_hh: `[3 * H]`.
        backend: "cpu" | "torch"; default: the first that can run this call.
    Returns: h after the step, `[B, H]`.
    Raises: ValueError or TypeError, shapes, dtypes or devices do not fit; NoBackendError, a forced backend cannot run
        this call (the message says why).
    Reference: Cho et al. 2014, arXiv:1406.1078.
    """
    if w_ih.dim() != 2 or w_ih.shape[0] % GATES:
        raise ValueError(f"gru_cell: w_ih has shape {tuple(w_ih.shape)}, expected [3 * H, I]")
    check_input("gru_cell", input, (2,), w_ih.shape[1])
    gates, hidden = w_ih.shape[0], w_ih.shape[0] // GATES
    check_like("gru_cell", input, (("h", h, (input.shape[0], hidden)), ("w_ih", w_ih, w_ih.shape),
                                   ("w_hh", w_hh, (gates, hidden)), ("b_ih", b_ih, (gates,)),
                                   ("b_hh", b_hh, (gates,))))  # fmt: skip
    chosen = registry.pick("gru_cell", (input, h, w_ih, w_hh, b_ih, b_hh), backend)
    gates_x = linear(input, w_ih, b_ih)
    if chosen.name == "cpu":
        return _recurrence(gates_x.to(h.dtype), h, w_hh, b_hh, None, False, chosen)[0]
    return chosen.fwd(gates_x, linear(h, w_hh, b_hh), h)


_op.define_public(
    "gru",
    "(Tensor input, Tensor? hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train,"
    " bool bidirectional, bool batch_first, *, Tensor? lengths=None) -> (Tensor, Tensor)",
    gru,
)
_op.define_public(
    "gru_cell",
    "(Tensor input, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, Tensor? b_hh=None) -> Tensor",
    gru_cell,
)
