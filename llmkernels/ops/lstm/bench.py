"""What is worth timing for lstm, gru and their cells, and the peers to beat."""

from dataclasses import replace

import torch

from llmkernels.benchmarking import onnx_peer
from llmkernels.ops.lstm import cases
from llmkernels.ops.lstm.cases import LSTMCase
from llmkernels.testing.inputs import fewer

# T, B, I = H: the goals' sizes.
SIZES = ((128, 1, 256), (128, 32, 256), (64, 64, 1024), (128, 1, 1024))


def bench_cases(op: str, full: bool) -> list[LSTMCase]:
    """The goals' sizes; with `full` also packed and bidirectional ones."""
    dtypes = (torch.float32, torch.bfloat16)
    if op.endswith("_cell"):
        sizes = ((1, 128), (1, 1024), (64, 1024)) if full else ((1, 128), (64, 1024))
        return [LSTMCase(op, T=1, B=B, I=H, H=H, dtype=dtype) for dtype in dtypes for B, H in sizes]
    found = [LSTMCase(op, T, B, H, H, dtype) for dtype in dtypes for T, B, H in SIZES]
    if full:
        lengths = tuple(range(8, 136, 4))
        found += [LSTMCase(op, 132, 32, 256, 256, dtype, lengths=lengths) for dtype in dtypes]
        found += [LSTMCase(op, 128, 32, 256, 256, dtype, layers=2, bidirectional=True) for dtype in dtypes]
    return found


def small(case: LSTMCase, elements: int) -> LSTMCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    T, B, _ = fewer(fewer((case.T, case.B, case.H), elements, 0), elements, 1)
    lengths = None if case.lengths is None else (T,) * B
    return replace(case, T=T, B=B, lengths=lengths)


def overhead_case(op: str) -> LSTMCase:
    """One short step: the time is that of the call, not of the kernel."""
    return LSTMCase(op, T=1, B=1, I=16, H=16)


def peers(case: LSTMCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns."""
    found = {"torch eager": lambda inputs: cases.call_torch(case, inputs)}
    plain = case.op == "lstm" and case.layers == 1 and not case.bidirectional and case.lengths is None
    if plain and case.H <= 512:
        found["torch cells"] = lambda inputs: _cells(inputs)
    return found


def _cells(inputs) -> tuple:
    """A loop of torch's cell over the steps."""
    h, c, outputs = inputs.h0[0], inputs.c0[0], []
    parameters = inputs.parameters()
    for x in inputs.input.unbind():
        h, c = torch.lstm_cell(x, (h, c), *parameters)
        outputs.append(h)
    return torch.stack(outputs), h[None], c[None]


def forward_peers(case: LSTMCase, device: str) -> dict:
    """As `peers`, without a backward: ONNX Runtime's LSTM, whose gates are in the order i, o, f, c."""
    plain = case.op == "lstm" and case.layers == 1 and not (case.proj or case.batch_first or case.lengths)
    if not (onnx_peer.AVAILABLE and plain and device == "cpu" and case.dtype == torch.float32):
        return {}
    inputs, prepared = cases.make_inputs(case), {}
    count, hidden = case.directions, case.H

    def weights(inputs) -> list:
        """In ONNX Runtime's order; made once for the same parameters, as a model has them."""
        key = id(inputs.tensors)
        if key not in prepared:
            reorder = lambda w: w.unflatten(0, (4, hidden))[[0, 3, 1, 2]].flatten(0, 1).detach()
            own = [[reorder(w) for w in inputs.parameters()[4 * d : 4 * d + 4]] for d in range(count)]
            w, r = (torch.stack([part[k] for part in own]).contiguous() for k in (0, 1))
            prepared[key] = (inputs, [w, r, torch.stack([torch.cat(part[2:]) for part in own])])
        return prepared[key][1]

    lengths = torch.full((case.B,), case.T, dtype=torch.int32)
    arguments = lambda inputs: [inputs.input, *weights(inputs), lengths, inputs.h0, inputs.c0]
    run = onnx_peer.operator(
        "LSTM", arguments(inputs), ["y", "h_n", "c_n"], hidden_size=hidden,
        direction="bidirectional" if case.bidirectional else "forward",
    )  # fmt: skip

    def call(inputs):
        y, h_n, c_n = run(*arguments(inputs))
        return y.transpose(1, 2).flatten(2), h_n, c_n

    return {"onnxruntime": call}
