"""torch.nn.GRU and GRUCell for accelerate, where a backend has a kernel of them, and how they are verified."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from llmkernels.accelerate.candidate import Candidate, Found, fan_in
from llmkernels.accelerate.kinds.recurrent import states_like
from llmkernels.ops.lstm.gru_module import GRUCell, run_gru, run_gru_cell


def recognise(module: nn.Module) -> Found:
    if type(module).forward is nn.GRU.forward:
        return [Candidate("gru", "gru", (module.input_size,), gru, probe_gru, fan_in, gru_example)], ""
    if type(module).forward is nn.GRUCell.forward:
        return [Candidate("gru_cell", "gru_cell", (module.input_size,), gru_cell, probe_cell, fan_in, cell_example)], ""
    if isinstance(module, (nn.GRU, nn.GRUCell)) and not isinstance(module, GRUCell):
        return [], "its forward is not torch's"
    return None


def gru(module: nn.GRU, input, hx=None, *, backend: str | None = None):
    """torch.nn.GRU.forward: batched, one sequence, or a PackedSequence."""
    return run_gru(module, input, hx, backend=backend)


def gru_cell(module: nn.GRUCell, input: Tensor, hx=None, *, backend: str | None = None):
    """torch.nn.GRUCell.forward."""
    return run_gru_cell(module, input, hx, backend=backend)


def gru_example(module: nn.GRU) -> tuple[Tensor | None, ...]:
    """Tensors for the question which backend would run it."""
    hidden, like = module.hidden_size, module.weight_hh_l0
    return like.new_empty(1, 3 * hidden), like.new_empty(1, hidden), like, getattr(module, "bias_hh_l0", None)


def cell_example(module: nn.GRUCell) -> tuple[Tensor | None, ...]:
    """Tensors for the question which backend would run it."""
    like = module.weight_ih
    states = like.new_empty(1, module.input_size), like.new_empty(1, module.hidden_size)
    return *states, like, module.weight_hh, module.bias_ih, module.bias_hh


def probe_gru(module: nn.Module, forward: Callable, input: Tensor) -> Tensor:
    """Outputs and states: with and without a state given, of one sequence, packed, and on the CPU with dropout."""
    rows = torch.sin(input[0])  # rows of every size would close the gates
    batch = torch.stack((rows, 0.5 * rows.flip(0)), 1)
    packed = rnn.pack_padded_sequence(batch, torch.tensor([5, 8]), enforce_sorted=False)
    batch = batch.transpose(0, 1) if module.batch_first else batch
    (hx,) = states_like((module.num_layers * (2 if module.bidirectional else 1), 2), (module.hidden_size,), rows)
    was_training, results = module.training, []
    try:
        # With dropout both draw the same masks; on a GPU cuDNN has a generator of its own.
        for training in (False, True) if input.is_cpu else (False,):
            module.train(training)
            torch.manual_seed(5)
            results += [forward(batch), forward(batch, hx), forward(rows, hx[:, 0])]
            results += [forward(packed), forward(packed, hx)]
    finally:
        module.train(was_training)
    flat = []
    for output, ends in results:
        output = output.data if isinstance(output, rnn.PackedSequence) else output
        flat += [output.flatten(), ends.flatten()]
    return torch.cat(flat)


def probe_cell(module: nn.Module, forward: Callable, input: Tensor) -> Tensor:
    """The state after a step: with and without a state given, of a batch and of one row."""
    rows = torch.sin(input[0])
    (hx,) = states_like((len(rows),), (module.hidden_size,), rows)
    results = [forward(rows), forward(rows, hx), forward(rows[0]), forward(rows[0], hx[0])]
    return torch.cat([result.flatten() for result in results])
