"""LSTM and LSTMCell as modules: torch's constructors, parameters, state_dicts and inputs."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llmkernels.ops.lstm import sequence
from llmkernels.ops.lstm.arguments import NORMS, check_input, check_layers, check_like, check_probability, layers_of
from llmkernels.ops.lstm.cell import lstm_cell


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

    def _settings(self) -> dict:
        return {"zoneout": self.zoneout, "recurrent_dropout": self.recurrent_dropout,
                "return_cells": self.return_cells, "backend": self.backend}  # fmt: skip

    def _params(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Asked by name at every call: functional_call and pruning put other tensors there."""
        norms = [getattr(self, name) for name in self.norm_names] if self.layer_norm else None
        return [getattr(self, name) for names in self._all_weights for name in names], norms

    def forward(self, input, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None):
        params, norms = self._params()
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("LSTM: lengths is given with a PackedSequence, expected None: it has its own")
            return self._forward_packed(input, hx, params, norms)
        output, h_n, c_n, *cells = sequence.lstm(
            input, hx, params, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional,
            self.batch_first, lengths=lengths, norms=norms, **self._settings(),
        )  # fmt: skip
        return output, (h_n, c_n), *cells

    def _forward_packed(self, packed: PackedSequence, hx, params, norms):
        rows, batch_sizes, order, back = packed
        rows, params, hx, norms = sequence._autocast(rows, params, hx, norms)
        layers = layers_of(params, self.bias, self.num_layers, self.bidirectional, norms)
        check_input("lstm", rows, (2,), self.input_size)
        directions = 2 if self.bidirectional else 1
        hidden, size = check_layers(rows, layers, directions)
        # Only without both is the number of sequences a value, which a compiler cannot see.
        batch = hx[0].shape[1] if hx is not None and hx[0].dim() == 3 else None
        if batch is None or not torch.compiler.is_compiling():
            batch = int(batch_sizes[0]) if order is None else order.shape[0]
        if hx is None:
            h0, c0 = (rows.new_zeros(len(layers), batch, columns) for columns in (size, hidden))
        else:
            h0, c0 = hx
            shape = (len(layers), batch)
            check_like("lstm", rows, (("h0", h0, (*shape, size)), ("c0", c0, (*shape, hidden))))
            if order is not None:
                h0, c0 = (state.index_select(1, order) for state in (h0, c0))
        settings = sequence.Settings(
            self.dropout, self.training, directions, sequence.zoneout_pair(self.zoneout), self.recurrent_dropout,
            self.return_cells, self.backend,
        )  # fmt: skip
        y, h_n, c_n, cells = sequence.run(rows, h0, c0, layers, batch_sizes, settings)
        if back is not None:
            h_n, c_n = (state.index_select(1, back) for state in (h_n, c_n))
        output = PackedSequence(y, batch_sizes, order, back)
        if cells is None:
            return output, (h_n, c_n)
        return output, (h_n, c_n), PackedSequence(cells, batch_sizes, order, back)

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
        if input.dim() not in (1, 2):
            raise ValueError(f"LSTMCell: input has shape {tuple(input.shape)}, expected 1-D or 2-D")
        one = input.dim() == 1
        if hx is None:
            zeros = input.new_zeros(*input.shape[:-1], self.hidden_size)
            hx = (zeros, zeros)
        if one:
            input, hx = input[None], tuple(state[None] for state in hx)
        parameters = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        h, c = lstm_cell(input, hx, *parameters, backend=self.backend)
        return (h[0], c[0]) if one else (h, c)
