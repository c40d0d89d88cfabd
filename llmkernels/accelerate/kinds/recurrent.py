"""torch.nn.LSTM and LSTMCell for accelerate: their forwards, and what verification does with them."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from llmkernels.accelerate.candidate import Candidate, Found, fan_in
from llmkernels.ops.lstm.module import LSTMCell, run_lstm, run_lstm_cell


def recognise(module: nn.Module) -> Found:
    if type(module).forward is nn.LSTM.forward:
        return [Candidate("lstm", "lstm", (module.input_size,), lstm, probe_lstm, fan_in, lstm_example)], ""
    if type(module).forward is nn.LSTMCell.forward:
        return [
            Candidate("lstm_cell", "lstm_cell", (module.input_size,), lstm_cell, probe_cell, fan_in, cell_example)
        ], ""
    if isinstance(module, (nn.LSTM, nn.LSTMCell)) and not isinstance(module, LSTMCell):
        return [], "its forward is not torch's"
    return None


def lstm(module: nn.LSTM, input, hx=None, *, backend: str | None = None):
    """torch.nn.LSTM.forward: batched, one sequence, or a PackedSequence."""
    return run_lstm(module, input, hx, backend=backend)


def lstm_cell(module: nn.LSTMCell, input: Tensor, hx=None, *, backend: str | None = None):
    """torch.nn.LSTMCell.forward."""
    return run_lstm_cell(module, input, hx, backend=backend)


def lstm_example(module: nn.LSTM) -> tuple[Tensor | None, ...]:
    """Tensors for the question which backend would run it."""
    hidden, size = module.hidden_size, module.proj_size or module.hidden_size
    shapes = ((1, 4 * hidden), (1, size), (1, hidden), (4 * hidden, size), (size, hidden) if module.proj_size else None)
    like = module.weight_ih_l0
    return *(None if shape is None else like.new_empty(shape) for shape in shapes), *[None] * 5


def cell_example(module: nn.LSTMCell) -> tuple[Tensor | None, ...]:
    """Tensors for the question which backend would run it."""
    hidden, like = module.hidden_size, module.weight_ih
    return like.new_empty(1, module.input_size), *[like.new_empty(1, hidden)] * 2, like, module.weight_hh, None, None


def states_like(count: tuple[int, ...], sizes: tuple[int, ...], like: Tensor) -> tuple[Tensor, ...]:
    """A state `[*count, size]` for each size, which differ."""
    generator = torch.Generator().manual_seed(4)
    return tuple(
        (0.5 * torch.randn((*count, size), generator=generator, dtype=torch.float64)).to(like) for size in sizes
    )


def probe_lstm(module: nn.LSTM, forward: Callable, input: Tensor) -> Tensor:
    return probe_sequences(module, forward, input, (module.proj_size or module.hidden_size, module.hidden_size))


def probe_cell(module: nn.LSTMCell, forward: Callable, input: Tensor) -> Tensor:
    return probe_steps(forward, input, (module.hidden_size, module.hidden_size))


def probe_sequences(module: nn.RNNBase, forward: Callable, input: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Outputs and states of these `sizes`: with and without states given, of one sequence, packed, on the CPU with
    dropout."""
    rows = torch.sin(input[0])  # rows of every size would close the gates
    batch = torch.stack((rows, 0.5 * rows.flip(0)), 1)
    packed = rnn.pack_padded_sequence(batch, torch.tensor([5, 8]), enforce_sorted=False)
    batch = batch.transpose(0, 1) if module.batch_first else batch
    states = states_like((module.num_layers * (2 if module.bidirectional else 1), 2), sizes, rows)
    hx, of_one = _as_given(states), _as_given(tuple(state[:, 0] for state in states))
    was_training, results = module.training, []
    try:
        # With dropout both draw the same masks; on a GPU cuDNN has a generator of its own.
        for training in (False, True) if input.is_cpu else (False,):
            module.train(training)
            torch.manual_seed(5)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
                results += [forward(batch), forward(batch, hx), forward(rows, of_one)]
                results += [forward(packed), forward(packed, hx)]
    finally:
        module.train(was_training)
    flat = []
    for output, ends in results:
        output = output.data if isinstance(output, rnn.PackedSequence) else output
        flat += [result.flatten() for result in (output, *_all(ends))]
    return torch.cat(flat)


def probe_steps(forward: Callable, input: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """States after a step: with and without states given, of a batch and of one row."""
    rows = torch.sin(input[0])
    states = states_like((len(rows),), sizes, rows)
    hx, of_one = _as_given(states), _as_given(tuple(state[0] for state in states))
    results = [forward(rows), forward(rows, hx), forward(rows[0]), forward(rows[0], of_one)]
    return torch.cat([result.flatten() for ends in results for result in _all(ends)])


def _as_given(states: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """As torch's modules take them: a state alone is no tuple."""
    return states if len(states) > 1 else states[0]


def _all(states: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)
