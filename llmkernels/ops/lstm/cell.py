"""lstm_cell: one step of one layer."""

from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import needs_grad
from llmkernels.ops.lstm import op
from llmkernels.ops.lstm.arguments import check_input, check_like
from llmkernels.ops.lstm.products import linear

# The kernel of whole sequences reads w_hh where it is for so few rows: one step of it is cheaper than a product and
# the rest of a step apart.
FEW_ROWS = 2


def _check(input: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih, b_hh) -> None:
    if w_ih.dim() != 2 or w_ih.shape[0] % 4:
        raise ValueError(f"lstm_cell: w_ih has shape {tuple(w_ih.shape)}, expected [4 * H, I]")
    check_input("lstm_cell", input, (2,), w_ih.shape[1])
    batch, gates, hidden = input.shape[0], w_ih.shape[0], w_ih.shape[0] // 4
    state = (batch, hidden)
    check_like("lstm_cell", input, (("h", h, state), ("c", c, state), ("w_ih", w_ih, w_ih.shape),
                                    ("w_hh", w_hh, (gates, hidden)), ("b_ih", b_ih, (gates,)),
                                    ("b_hh", b_hh, (gates,))))  # fmt: skip


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of a long short-term memory: torch.lstm_cell. All but its two products is one kernel.

    Args:
        input: `[B, I]`, fp64, fp32, bf16 or fp16.
        hx: (h `[B, H]`, c `[B, H]`).
        w_ih, w_hh: `[4 * H, I]`, `[4 * H, H]`, gates in the order i, f, g, o; b_ih, b_hh: `[4 * H]`.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: (h, c) after the step, each `[B, H]`.
    Raises: ValueError or TypeError, shapes, dtypes or devices do not fit; NoBackendError, a forced backend cannot run
        this call (the message says why).
    Reference: Hochreiter, Schmidhuber 1997, doi:10.1162/neco.1997.9.8.1735.
    """
    h, c = hx
    _check(input, h, c, w_ih, w_hh, b_ih, b_hh)
    chosen = registry.pick("lstm_cell", (input, h, c, w_ih, w_hh, b_ih, b_hh), backend)
    gates_x = linear(input, w_ih, b_ih)
    if gates_x.dtype != c.dtype:  # under autocast
        gates_h = linear(h, w_hh, b_hh)
        return op.cell(gates_x.to(c.dtype), gates_h.to(c.dtype), c, chosen)
    if chosen.name == "cpu" and len(input) <= FEW_ROWS and not needs_grad(gates_x, h, c, w_hh, b_hh):
        gates_x = gates_x if b_hh is None else gates_x + b_hh
        return registry.entry("lstm", "cpu").fwd(gates_x, h, c, w_hh, None, None, False, False)[:2]
    return op.cell(gates_x, linear(h, w_hh, b_hh), c, chosen)


_op.define_public(
    "lstm_cell",
    "(Tensor input, Tensor[] hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, Tensor? b_hh=None) -> (Tensor, Tensor)",
    lstm_cell,
)
