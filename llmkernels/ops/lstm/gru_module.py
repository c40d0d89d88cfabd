"""GRU and GRUCell as modules: torch's constructors, parameters, state_dicts and inputs."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llmkernels.ops.lstm import gru


def run_gru(module: torch.nn.RNNBase, input, hx: Tensor | None = None, lengths=None, *, backend: str | None = None):
    """The forward of torch.nn.GRU on the parameters of `module`, with lengths."""
    if lengths is not None and isinstance(input, PackedSequence):
        raise ValueError("GRU: lengths is given with a PackedSequence, expected None: it has its own")
    # Asked by name at every call: functional_call and pruning put other tensors there.
    params = [getattr(module, name) for names in module._all_weights for name in names]
    found = gru.run_batch(
        input, hx, params, module.bias, module.num_layers, module.dropout, module.training, module.bidirectional,
        module.batch_first, lengths, backend,
    )  # fmt: skip
    return found.output, found.states[0]


def run_gru_cell(module: torch.nn.RNNCellBase, input: Tensor, hx: Tensor | None = None, *, backend: str | None = None):
    """The forward of torch.nn.GRUCell on the parameters of `module`."""
    if input.dim() not in (1, 2):
        raise ValueError(f"GRUCell: input has shape {tuple(input.shape)}, expected 1-D or 2-D")
    one = input.dim() == 1
    h = input.new_zeros(*input.shape[:-1], module.hidden_size) if hx is None else hx
    if one:
        input, h = input[None], h[None]
    parameters = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    h = gru.gru_cell(input, h, *parameters, backend=backend)
    return h[0] if one else h


class GRU(torch.nn.RNNBase):
    """torch.nn.GRU run by llmkernels: same constructor, same state_dict, same inputs and outputs.

    Not a subclass of torch.nn.GRU, because torch.compile refuses to look into those. `forward` also takes `lengths`
    `[B]` of a padded batch in any order. `backend` forces a backend.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ):
        super().__init__("GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         device=device, dtype=dtype)  # fmt: skip
        self.backend = backend

    def forward(self, input, hx: Tensor | None = None, lengths: Tensor | None = None):
        return run_gru(self, input, hx, lengths, backend=self.backend)


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell run by llmkernels: same constructor, same state_dict. `backend` forces a backend."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ):
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return run_gru_cell(self, input, hx, backend=self.backend)
