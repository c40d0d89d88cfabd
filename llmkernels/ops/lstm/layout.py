"""What all recurrent layers share: layers and directions, batches, lengths and packed sequences around one recurrence.

A recurrence is run on rows `[N, I]` of all steps as reference.py has them, with its states (h alone, or h and c), each
`[L * D, B, size]`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llmkernels._autograd import transform_active
from llmkernels._dtypes import autocast_dtype
from llmkernels.ops.lstm.arguments import check_like, checked_lengths

STATE_NAMES = ("h0", "c0")


class Result(NamedTuple):
    """What a recurrence returns; `output` and `cells` are rows, or what the user's input was."""

    output: Tensor | PackedSequence
    states: tuple[Tensor, ...]
    cells: Tensor | PackedSequence | None = None  # every c of the last layer, where it is wanted


Run = Callable[[Tensor, tuple[Tensor, ...], Tensor | None], Result]  # (rows, states, batch_sizes)


class States(NamedTuple):
    """The states a user may give: of what op, how many (layers times directions), and the columns of each."""

    op: str
    count: int
    sizes: tuple[int, ...]

    def checked(self, hx: Sequence[Tensor] | None, input: Tensor, batch: tuple[int, ...]) -> tuple[Tensor, ...]:
        """`hx`, which must fit, or zeros; `batch` is (B,), or () for one sequence."""
        shape = (self.count, *batch)
        if hx is None:
            return tuple(input.new_zeros(*shape, columns) for columns in self.sizes)
        named = zip(STATE_NAMES, hx, self.sizes, strict=False)
        check_like(self.op, input, [(name, state, (*shape, columns)) for name, state, columns in named])
        return tuple(hx)


def autocast(input: Tensor, *others: Sequence[Tensor] | None) -> tuple:
    """Under autocast all tensors in its dtype, as torch's LSTM has them."""
    dtype = autocast_dtype(input.device)
    if dtype is None or input.dtype == torch.float64:
        return input, *others
    return input.to(dtype), *(None if group is None else [t.to(dtype) for t in group] for group in others)


# --- layers and directions ------------------------------------------------------------------------------------------


def over_layers(rows: Tensor, count: int, directions: int, dropout: float, train: bool, one: Callable,
                both: Callable | None = None) -> Result:  # fmt: skip
    """Each layer on the outputs of the one before; `one(rows, index, reverse, last)` runs one of a direction.

    It returns (y, its states, its cells or None), the states `[B, size]`. Dropout between layers is torch's.
    `both(rows, index, last)`, where given, runs the two directions of a layer and gives two of these.
    """
    last, states, cells = count - directions, [], []
    for first in range(0, count, directions):
        outputs = []
        if both is not None and directions == 2:
            found = both(rows, first, first == last)
        else:
            found = [one(rows, index, index > first, first == last) for index in range(first, first + directions)]
        for y, ends, every_c in found:
            outputs.append(y)
            states.append(ends)
            if every_c is not None:
                cells.append(every_c)
        rows = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if first != last and dropout > 0.0:
            rows = torch_functional.dropout(rows, dropout, train)
    ends = tuple(torch.stack(parts) for parts in zip(*states, strict=True))
    return Result(rows, ends, torch.cat(cells, -1) if cells else None)


# --- batches --------------------------------------------------------------------------------------------------------


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


def over_batch(input: Tensor, hx: Sequence[Tensor] | None, states: States, batch_first: bool,
               lengths: Tensor | Sequence[int] | None, run: Run) -> Result:  # fmt: skip
    """`run` on a batch `[T, B, I]` (`[B, T, I]` with `batch_first`) or on one sequence `[T, I]`."""
    op, one = states.op, input.dim() == 2
    if one:
        if lengths is not None:
            raise ValueError(f"{op}: lengths is given with one sequence, expected None or a 3-D input")
        input, batch_first = input[:, None], False
    steps, batch = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    if steps == 0:
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}, expected at least one step")
    given = states.checked(hx, input, () if one else (batch,))
    if one:
        given = tuple(state[:, None] for state in given)
    if lengths is None:
        found = _uniform(input, given, batch_first, run)
    else:
        ragged = _ragged(checked_lengths(op, lengths, batch, steps), steps, batch, batch_first, input.device)
        found = _with_lengths(input, given, ragged, run)
    if one:
        output, ends, cells = found
        ends = tuple(state.squeeze(1) for state in ends)
        found = Result(output.squeeze(1), ends, None if cells is None else cells.squeeze(1))
    return found


def _uniform(input: Tensor, given: tuple[Tensor, ...], batch_first: bool, run: Run) -> Result:
    if batch_first:
        input = input.transpose(0, 1)
    steps, batch = input.shape[:2]
    y, ends, cells = run(input.reshape(steps * batch, input.shape[2]), given, None)

    def shaped(rows: Tensor) -> Tensor:
        whole = rows.view(steps, batch, rows.shape[-1])
        return whole.transpose(0, 1) if batch_first else whole

    return Result(shaped(y), ends, None if cells is None else shaped(cells))


def _with_lengths(input: Tensor, given: tuple[Tensor, ...], ragged: _Ragged, run: Run) -> Result:
    rows = input.flatten(0, 1).index_select(0, ragged.index)
    if ragged.live is not None:
        rows = rows.masked_fill(~ragged.live, 0.0)  # what stands there may be NaN
    y, ends, cells = run(rows, _permuted(given, ragged.order), ragged.batch_sizes)

    def padded(rows: Tensor) -> Tensor:
        if ragged.live is not None:
            rows = rows.masked_fill(~ragged.live, 0.0)
        whole = rows.new_zeros(input.shape[0] * input.shape[1], rows.shape[-1])
        return whole.index_copy(0, ragged.index, rows).unflatten(0, input.shape[:2])

    ends = _permuted(ends, ragged.order.argsort())
    return Result(padded(y), ends, None if cells is None else padded(cells))


def _permuted(states: tuple[Tensor, ...], order: Tensor | None) -> tuple[Tensor, ...]:
    return states if order is None else tuple(state.index_select(1, order) for state in states)


def over_packed(packed: PackedSequence, rows: Tensor, hx: Sequence[Tensor] | None, states: States, run: Run) -> Result:
    """`run` on a PackedSequence whose data are `rows` (in autocast's dtype)."""
    _, batch_sizes, order, back = packed
    # Only without both is the number of sequences a value, which a compiler cannot see.
    batch = hx[0].shape[1] if hx is not None and hx[0].dim() == 3 else None
    if batch is None or not torch.compiler.is_compiling():
        batch = int(batch_sizes[0]) if order is None else order.shape[0]
    given = states.checked(hx, rows, (batch,))
    y, ends, cells = run(rows, given if hx is None else _permuted(given, order), batch_sizes)
    packing = lambda data: PackedSequence(data, batch_sizes, order, back)
    return Result(packing(y), _permuted(ends, back), None if cells is None else packing(cells))
