"""torch.nn.GRU and GRUCell for accelerate, where a backend has a kernel of them, and how they are verified."""

from collections.abc import Callable

from torch import Tensor, nn

from llmkernels.accelerate.candidate import Candidate, Found, fan_in
from llmkernels.accelerate.kinds.recurrent import probe_sequences, probe_steps
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


def probe_gru(module: nn.GRU, forward: Callable, input: Tensor) -> Tensor:
    return probe_sequences(module, forward, input, (module.hidden_size,))


def probe_cell(module: nn.GRUCell, forward: Callable, input: Tensor) -> Tensor:
    return probe_steps(forward, input, (module.hidden_size,))
