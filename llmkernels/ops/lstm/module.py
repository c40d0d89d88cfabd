"""LSTM and LSTMCell as modules: torch's constructors, parameters, state_dicts and inputs."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llmkernels.ops.lstm import sequence
from llmkernels.ops.lstm.arguments import NORMS, check_probability
from llmkernels.ops.lstm.cell import lstm_cell


def run_lstm(module: torch.nn.RNNBase, input, hx=None, lengths=None, *, backend: str | None = None, norms=None,
             zoneout=0.0, recurrent_dropout=0.0, return_cells=False):  # fmt: skip
    """The forward of torch.nn.LSTM, or of one with more, on the parameters of `module`."""
    if lengths is not None and isinstance(input, PackedSequence):
        raise ValueError("LSTM: lengths is given with a PackedSequence, expected None: it has its own")
    params = [getattr(module, name) for names in module._all_weights for name in names]
    output, states, cells = sequence.run_batch(
        input, hx, params, module.bias, module.num_layers, module.dropout, module.training, module.bidirectional,
        module.batch_first, lengths, norms, zoneout, recurrent_dropout, return_cells, backend,
    )  # fmt: skip
    return (output, states) if cells is None else (output, states, cells)


def run_lstm_cell(module: torch.nn.RNNCellBase, input: Tensor, hx=None, *, backend: str | None = None):
    """The forward of torch.nn.LSTMCell on the parameters of `module`."""
    if input.dim() not in (1, 2):
        raise ValueError(f"LSTMCell: input has shape {tuple(input.shape)}, expected 1-D or 2-D")
    one = input.dim() == 1
    if hx is None:
        zeros = input.new_zeros(*input.shape[:-1], module.hidden_size)
        hx = (zeros, zeros)
    if one:
        input, hx = input[None], tuple(state[None] for state in hx)
    parameters = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
    h, c = lstm_cell(input, hx, *parameters, backend=backend)
    return (h[0], c[0]) if one else (h, c)


class LSTM(torch.nn.RNNBase):
    """torch.nn.LSTM run by llmkernels: same constructor, same state_dict, same inputs and outputs.

    Not a subclass of torch.nn.LSTM, because torch.compile refuses to look into those. `forward` also takes `lengths`
    `[B]` of a padded batch in any order. Keyword-only, as `functional.lstm` has them: `zoneout`, `recurrent_dropout`,
    `layer_norm` (adds parameters norm_ih, norm_hh, norm_c and norm_c_bias of each layer and direction) and
    `return_cells` (`forward` returns (output, (h_n, c_n), cells)). `backend` forces a backend.
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
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        layer_norm: bool = False,
        return_cells: bool = False,
        backend: str | None = None,
    ):
        sequence.zoneout_pair(zoneout)
        check_probability("LSTM", "recurrent_dropout", recurrent_dropout)
        self.norm_names: list[str] = []
        super().__init__("LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
                         proj_size, device, dtype)  # fmt: skip
        self.zoneout, self.recurrent_dropout = zoneout, recurrent_dropout
        self.layer_norm, self.return_cells, self.backend = layer_norm, return_cells, backend
        if layer_norm:
            self._add_norms({"device": device, "dtype": dtype})

    def _add_norms(self, factory: dict) -> None:
        sizes = {"norm_ih": 4, "norm_hh": 4, "norm_c": 1, "norm_c_bias": 1}
        assert len(sizes) == NORMS
        for weights in self._all_weights:
            suffix = weights[0].removeprefix("weight_ih")
            for name, quarters in sizes.items():
                start = torch.zeros if name.endswith("bias") else torch.ones
                self.norm_names.append(name + suffix)
                setattr(self, name + suffix, torch.nn.Parameter(start(quarters * self.hidden_size, **factory)))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in self.norm_names:
            torch.nn.init.constant_(getattr(self, name), 0.0 if "norm_c_bias" in name else 1.0)

    def forward(self, input, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None):
        # Asked by name at every call: functional_call and pruning put other tensors there.
        norms = [getattr(self, name) for name in self.norm_names] if self.layer_norm else None
        return run_lstm(
            self, input, hx, lengths, norms=norms, zoneout=self.zoneout, recurrent_dropout=self.recurrent_dropout,
            return_cells=self.return_cells, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        extras = {name: getattr(self, name) for name in ("zoneout", "recurrent_dropout", "layer_norm", "return_cells")}
        return super().extra_repr() + "".join(f", {name}={value}" for name, value in extras.items() if value)


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell run by llmkernels: same constructor, same state_dict. `backend` forces a backend."""

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

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return run_lstm_cell(self, input, hx, backend=self.backend)
