"""QuantizedLSTM: an LSTM for inference with int8 weights and dynamic int8 activations, a step at a time."""

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from llmkernels import registry
from llmkernels._autograd import needs_grad
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, dtype_error
from llmkernels.ops.lstm import layout
from llmkernels.ops.lstm.reference import _joined, _over, step_rows
from llmkernels.quantization import int8
from llmkernels.quantization.tensor import QuantizedTensor

SCALE = "_scale"


class QuantizedLSTM(torch.nn.Module):
    """torch.nn.LSTM with int8 weights, one scale a row, and activations quantized row by row at every step.

    Made by `from_lstm`, or by the constructor (torch.nn.LSTM's) and `load_state_dict`. Inputs, outputs, options and
    parameters' names are torch.nn.LSTM's; weights are int8 buffers with fp32 scales beside them (`weight_ih_l0_scale`
    `[4 * H]`), biases are buffers. Gates, c and sums are fp32, h is rounded to the input's dtype. `forward` also takes
    `lengths` `[B]` of a padded batch. For inference: it takes no gradient, and refuses one that is asked for.
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
    ):
        super().__init__()
        # torch's own checks of the arguments, names and shapes.
        shape = torch.nn.LSTM(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
                              device="meta", dtype=dtype)  # fmt: skip
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, float(dropout), bidirectional
        self.proj_size, self._all_weights = proj_size, [list(names) for names in shape._all_weights]
        for name, parameter in shape.named_parameters():
            if parameter.dim() == 2:
                self.register_buffer(name, torch.zeros(parameter.shape, dtype=torch.int8, device=device))
                self.register_buffer(name + SCALE, torch.ones(len(parameter), dtype=torch.float32, device=device))
            else:
                self.register_buffer(name, torch.zeros(parameter.shape, dtype=parameter.dtype, device=device))

    @classmethod
    def from_lstm(cls, lstm: torch.nn.RNNBase) -> "QuantizedLSTM":
        """The int8 form of a torch.nn.LSTM or llmkernels.nn.LSTM, in the same mode (training or not) as it is.

        Raises: TypeError, it is neither; ValueError, it has zoneout, layer norm or return_cells, or a weight has a NaN
            or an infinity (the weight and the row are named).
        """
        if not isinstance(lstm, torch.nn.RNNBase) or lstm.mode != "LSTM":
            raise TypeError(f"QuantizedLSTM: lstm is a {type(lstm).__name__}, expected a torch.nn.LSTM or nn.LSTM")
        for name, nothing in (("zoneout", (0.0, (0.0, 0.0))), ("layer_norm", (False,)), ("return_cells", (False,))):
            if getattr(lstm, name, nothing[0]) not in nothing:
                raise ValueError(f"QuantizedLSTM: lstm has {name}={getattr(lstm, name)}, expected one without")
        first = getattr(lstm, lstm._all_weights[0][0])
        made = cls(lstm.input_size, lstm.hidden_size, lstm.num_layers, lstm.bias, lstm.batch_first, lstm.dropout,
                   lstm.bidirectional, lstm.proj_size, device=first.device, dtype=first.dtype)  # fmt: skip
        for name in (name for names in lstm._all_weights for name in names):
            tensor = getattr(lstm, name).detach()
            if tensor.dim() == 2:
                quantized = int8.quantize(tensor, name)
                made._buffers[name], made._buffers[name + SCALE] = quantized.data, quantized.scales
            else:
                made._buffers[name] = tensor.clone()
        return made.train(lstm.training)

    def _weight(self, name: str) -> QuantizedTensor:
        data = getattr(self, name)
        return QuantizedTensor("int8", tuple(data.shape), data, getattr(self, name + SCALE))

    def forward(self, input, hx: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None):
        packed = input if isinstance(input, PackedSequence) else None
        rows = input if packed is None else packed.data
        self._check(rows, packed is not None, hx, lengths)
        recur = lambda rows, given, batch_sizes: self._layers(rows, given, batch_sizes)
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        states = layout.States("QuantizedLSTM", len(self._all_weights), sizes)
        if packed is not None:
            found = layout.over_packed(packed, rows, hx, states, recur)
        else:
            found = layout.over_batch(rows, hx, states, self.batch_first, lengths, recur)
        return found.output, found.states

    def _check(self, rows: Tensor, packed: bool, hx, lengths) -> None:
        if rows.dtype not in FLOAT_DTYPES:
            raise dtype_error("QuantizedLSTM", "input", rows.dtype)
        if rows.dim() not in ((2,) if packed else (2, 3)) or rows.shape[-1] != self.input_size:
            expected = f"{'2-D' if packed else '2-D or 3-D'} with {self.input_size} columns"
            raise ValueError(f"QuantizedLSTM: input has shape {tuple(rows.shape)}, expected {expected}")
        if packed and lengths is not None:
            raise ValueError("QuantizedLSTM: lengths is given with a PackedSequence, expected None: it has its own")
        if needs_grad(rows, *(hx or ())):
            raise RuntimeError(
                "QuantizedLSTM: a gradient of input or hx is asked for, expected none: rounded activations have none;"
                " call it under torch.no_grad()"
            )
        if self.training and self.dropout > 0.0 and self.num_layers > 1:
            raise RuntimeError(
                f"QuantizedLSTM: it is in training mode with dropout={self.dropout}, expected eval(), for inference"
            )

    def _layers(self, rows: Tensor, given: tuple[Tensor, ...], batch_sizes: Tensor | None) -> layout.Result:
        def one(rows: Tensor, index: int, reverse: bool, _last: bool):
            w_ih, w_hh, *rest = self._all_weights[index]
            biases = [getattr(self, name).float() for name in rest if name.startswith("bias")]
            w_hr = self._weight(rest[-1]) if self.proj_size else None
            gates_x = int8.linear(rows, self._weight(w_ih), sum(biases) if biases else None)
            h0, c0 = (state[index] for state in given)
            y, *ends = recurrence(gates_x, h0, c0, self._weight(w_hh), w_hr, batch_sizes, reverse)
            return y, ends, None

        return layout.over_layers(rows, len(self._all_weights), 2 if self.bidirectional else 1, 0.0, False, one)

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedLSTM":
        """Raises RuntimeError if True: int8 weights take no gradient."""
        if requires_grad:
            raise RuntimeError(
                "QuantizedLSTM: its weights are int8 and take no gradient; train the LSTM it is made from"
            )
        return self

    def _apply(self, fn, recurse=True):
        """Scales stay fp32 in a module that is converted."""
        scales = {name: buffer for name, buffer in self._buffers.items() if name.endswith(SCALE)}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            now = self._buffers[name]
            if now.dtype != torch.float32:
                self._buffers[name] = now.float() if before.is_meta else before.to(now.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in (name for names in self._all_weights for name in names if not name.startswith("bias")):
            data, scales = (state_dict.get(prefix + each) for each in (name, name + SCALE))
            if data is not None and scales is not None:
                int8.check_parts(data, scales, tuple(getattr(self, name).shape), prefix + name)
                int8.check_values(QuantizedTensor("int8", tuple(data.shape), data, scales), prefix + name)
            elif data is not None and data.dtype != torch.int8:
                raise ValueError(
                    f"QuantizedLSTM: {prefix + name} is {data.dtype}, expected torch.int8: load it into an LSTM, and"
                    " make this from it with from_lstm"
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def extra_repr(self) -> str:
        options = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
                   "proj_size": 0}  # fmt: skip
        given = "".join(f", {k}={getattr(self, k)}" for k, usual in options.items() if getattr(self, k) != usual)
        weights = [self._weight(name) for names in self._all_weights for name in names if not name.startswith("bias")]
        bits = 8.0 * sum(w.nbytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)
        return f"{self.input_size}, {self.hidden_size}{given}, int8, {bits:.2f} bits per weight"


def recurrence(gates_x: Tensor, h0: Tensor, c0: Tensor, w_hh: QuantizedTensor, w_hr: QuantizedTensor | None,
               batch_sizes: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h_n, c_n) of one layer and direction, as reference.recurrence has them; gates_x `[N, 4 * H]` is fp32."""
    dtype, acc = h0.dtype, accumulate_dtype(torch.float32)
    steps, room = step_rows(len(gates_x), len(h0), batch_sizes)
    h, c, outputs = h0, c0.to(acc), []
    # Chosen once, not at every step.
    of_h, project = int8.linear_for(h, w_hh), None if w_hr is None else int8.linear_for(c, w_hr)
    cell = registry.pick("lstm_cell", (gates_x, gates_x, c)).fwd
    for first, count in reversed(steps) if reverse else steps:
        new_h, new_c, _ = cell(gates_x[first : first + count], of_h(h[:count]), c[:count], False)
        if project is not None:
            new_h = project(new_h)
        outputs.append(new_h.to(dtype))
        h, c = _over(outputs[-1], h), _over(new_c, c)
    return _joined(outputs[::-1] if reverse else outputs, room, h0), h, c.to(dtype)
