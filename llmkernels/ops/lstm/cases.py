"""What is tested and timed of lstm, gru and their cells: shapes, options, inputs, truth, work."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import rnn

from llmkernels import functional
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("lstm", "lstm_cell", "gru", "gru_cell")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class LSTMCase:
    """One call. T is 1 for a cell; `lengths` are those of each sequence."""

    op: str
    T: int = 5
    B: int = 3
    I: int = 12  # noqa: E741 - the field's name of the input size
    H: int = 20
    dtype: torch.dtype = torch.float32
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    bias: bool = True
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None
    data: str = "normal"  # of the input: normal, small, large (gates at their limits)
    name: str | None = None  # the word in tests/coverage.toml; default: made of the options

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def cell(self) -> bool:
        return self.op.endswith("_cell")

    @property
    def gates(self) -> int:
        return 3 if self.op.startswith("gru") else 4

    @property
    def size(self) -> int:
        """R: the size of h."""
        return self.proj or self.H

    @property
    def words(self) -> list[str]:
        words = ["layers"] if self.layers > 1 else []
        words += [word for word in ("bidirectional", "proj", "batch_first", "lengths") if getattr(self, word)]
        words += [] if self.bias else ["no_bias"]
        return words + ([self.data] if self.data != "normal" else [])

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        words = self.words
        return self.name or ("plain" if not words else words[0] if len(words) == 1 else "combined")

    def __str__(self) -> str:
        shape = f"{self.T}x{self.B}x{self.I}x{self.H}" if not self.cell else f"{self.B}x{self.I}x{self.H}"
        return "-".join([self.op, shape, short_name(self.dtype), *self.words])

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of torch's flat list."""
        found = {}
        for layer in range(self.layers):
            for suffix in [f"_l{layer}", f"_l{layer}_reverse"][: self.directions]:
                columns = self.I if layer == 0 else self.directions * self.size
                wide = self.gates * self.H
                found |= {f"w_ih{suffix}": (wide, columns), f"w_hh{suffix}": (wide, self.size)}
                found |= {f"b_{kind}{suffix}": (wide,) for kind in ("ih", "hh") if self.bias}
                found |= {f"w_hr{suffix}": (self.proj, self.H)} if self.proj else {}
        return found


class LSTMInputs(Inputs):
    """Tensors of one case by name: input, h0, c0, the parameters, and the gradients that arrive at the outputs."""

    def __init__(self, tensors: dict[str, Tensor], outputs: tuple[str, ...]):
        self.tensors, self.OUTPUTS = tensors, outputs
        self.GRADS = tuple(f"d{name}" for name in outputs)
        self.truth: dict[str, Tensor] | None = None

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def leaf_names(self) -> list[str]:
        return [name for name in self.tensors if name not in self.GRADS]

    def replace(self, **tensors: Tensor | None) -> "LSTMInputs":
        return LSTMInputs(self.tensors | tensors, self.OUTPUTS)

    def without_leaves(self) -> "LSTMInputs":
        return self  # calls take their arguments from leaf_names: gradients are checked always

    def states(self) -> list[Tensor]:
        return [self.tensors[name] for name in ("h0", "c0") if name in self.tensors]

    def parameters(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.leaf_names()[1 + len(self.states()) :]]


_SCALE = {"normal": 1.0, "small": 1e-4, "large": 12.0}


def make_inputs(case: LSTMCase, device: str | torch.device = "cpu", seed: int = 0) -> LSTMInputs:
    """Random tensors, never zeros; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype).to(device)

    def uniform(*shape):  # as torch initialises
        values = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2.0 - 1.0) * max(case.H, 1) ** -0.5
        return values.to(case.dtype).to(device)

    scale, states = _SCALE[case.data], case.layers * case.directions
    if case.cell:
        shapes = {"input": (case.B, case.I), "h0": (case.B, case.H), "c0": (case.B, case.H)}
        outputs = {"h": shapes["h0"], "c": shapes["c0"]}
    else:
        outer = (case.B, case.T) if case.batch_first else (case.T, case.B)
        shapes = {"input": (*outer, case.I), "h0": (states, case.B, case.size), "c0": (states, case.B, case.H)}
        outputs = {"output": (*outer, case.directions * case.size), "h_n": shapes["h0"], "c_n": shapes["c0"]}
    if case.gates == 3:  # no c
        shapes, outputs = ({name: shape for name, shape in d.items() if name[0] != "c"} for d in (shapes, outputs))
    tensors = {name: normal(*shape, scale=scale if name == "input" else 0.5) for name, shape in shapes.items()}
    tensors |= {name: uniform(*shape) for name, shape in case.parameters().items()}
    tensors |= {f"d{name}": normal(*shape) for name, shape in outputs.items()}
    return LSTMInputs(tensors, tuple(outputs))


def call(case: LSTMCase, inputs: LSTMInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`."""
    state, parameters = inputs.states(), inputs.parameters()
    if case.gates == 3:
        state = state[0]
    if case.cell:
        found = getattr(functional, case.op)(inputs.input, state, *parameters, backend=backend)
        return (found,) if case.gates == 3 else found
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    return getattr(functional, case.op)(
        inputs.input, state, parameters, case.bias, case.layers, 0.0, True, case.bidirectional, case.batch_first,
        lengths=lengths, backend=backend,
    )  # fmt: skip


def call_torch(case: LSTMCase, inputs: LSTMInputs) -> tuple[Tensor, ...]:
    """The same by torch's own functions: the baseline of accuracy and of speed."""
    states, parameters = inputs.states(), inputs.parameters()
    own = (lambda states: states[0]) if case.gates == 3 else tuple
    function = getattr(torch, case.op)
    if case.cell:
        found = function(inputs.input, own(states), *parameters)
        return (found,) if case.gates == 3 else found
    settings = (parameters, case.bias, case.layers, 0.0, True, case.bidirectional)
    if case.lengths is None:
        return function(inputs.input, own(states), *settings, case.batch_first)
    lengths = torch.tensor(case.lengths)
    packed = rnn.pack_padded_sequence(inputs.input, lengths, case.batch_first, enforce_sorted=False)
    states = [tensor[:, packed.sorted_indices] for tensor in states]
    data, *ends = function(packed.data, packed.batch_sizes, own(states), *settings)
    output, _ = rnn.pad_packed_sequence(packed._replace(data=data), case.batch_first, total_length=case.T)
    return output, *(tensor[:, packed.unsorted_indices] for tensor in ends)


def _wide(inputs: LSTMInputs) -> LSTMInputs:
    return LSTMInputs({name: tensor.double() for name, tensor in inputs.tensors.items()}, inputs.OUTPUTS)


def truth(case: LSTMCase, inputs: LSTMInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64; computed once for the same inputs."""
    if inputs.truth is None:
        inputs.truth = outputs_and_gradients(_wide(inputs), lambda leaves: call_torch(case, leaves))
    return inputs.truth


def as_rows(case: LSTMCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`: a vector is one row."""
    cols = tensor.shape[-1]
    return tensor.reshape(tensor.numel() // max(cols, 1), cols)


def term_size(case: LSTMCase, inputs: LSTMInputs, name: str) -> Tensor | None:
    """`[rows]`: twice the rms size of all rows, or of the row itself if that is more.

    c, a gradient, a projection are sums of terms of that size, which may cancel. A term is a product of several
    activations or slopes, each with an error of its own, and the elements of a short sum have them in common. At the
    gates' limits each term of a gradient has the factor s * (1 - s), where 1 - s cancels.
    """
    rows = as_rows(case, name, truth(case, inputs)[name]).square()
    lost = 8.0 if case.data == "large" and name not in inputs.OUTPUTS else 2.0
    return lost * torch.maximum(rows.mean(-1), rows.mean() if rows.numel() else rows.sum()).sqrt()


def flops(case: LSTMCase, direction: str) -> int:
    """Multiplications and additions of the products: "fwd", "bwd" or "fwd+bwd"."""
    rows = sum(case.lengths) if case.lengths is not None else case.T * case.B
    weights = sum(shape[0] * shape[1] for shape in case.parameters().values() if len(shape) == 2)
    return {"fwd": 2, "bwd": 4, "fwd+bwd": 6}[direction] * rows * weights


def bytes_moved(case: LSTMCase, direction: str) -> int:
    """Bytes of input, output and weights, read and written once; with a backward also their gradients."""
    rows = case.T * case.B
    weights = sum(shape[0] * shape[1] for shape in case.parameters().values() if len(shape) == 2)
    size = rows * (case.I + case.directions * case.size) + weights
    return {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction] * size * case.dtype.itemsize


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> LSTMCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    if op.endswith("_cell"):
        return LSTMCase(op, T=1, dtype=dtype, **({"B": 2, "I": 2, "H": 2} if tiny else {"B": 6, "I": 16, "H": 24}))
    if tiny:
        return LSTMCase(op, T=2, B=2, I=2, H=3, dtype=dtype, proj=2 if op == "lstm" else 0, lengths=(1, 2))
    return LSTMCase(op, T=4, B=3, I=16, H=24, dtype=dtype, layers=2)


def reshaped(case: LSTMCase, shape: tuple[int, ...]) -> LSTMCase:
    """The same call on tensors of another shape, one that a user gives: (T, B, H), or fewer of the last ones."""
    T, B, H = (1,) * (3 - len(shape)) + tuple(shape[-3:])
    return replace(case, T=1 if case.cell else T, B=B, I=H, H=H, lengths=None)


def test_cases() -> list[LSTMCase]:
    """The cases of the test battery: each option, each dtype, awkward sizes, hard data."""
    make = lambda op="lstm", **options: LSTMCase(op, **options)
    cases = []
    for dtype in DTYPES:
        for op in OPS:
            cases += [make(op, dtype=dtype), make(op, dtype=dtype, bias=False)]
            cases += [make(op, dtype=dtype, data=data) for data in ("small", "large")]
        for op in ("lstm", "gru"):
            cases += [make(op, dtype=dtype, layers=2), make(op, dtype=dtype, bidirectional=True)]
            cases += [make(op, dtype=dtype, batch_first=True), make(op, dtype=dtype, lengths=(2, 5, 3))]
            cases.append(make(op, dtype=dtype, layers=2, bidirectional=True, lengths=(3, 1, 5), batch_first=True))
        cases += [
            make(dtype=dtype, proj=7),
            make(dtype=dtype, layers=2, bidirectional=True, proj=9, bias=False, lengths=(4, 4, 2)),
            make(dtype=dtype, B=1, T=7, layers=2), make(dtype=dtype, B=1, bidirectional=True, lengths=(3,)),
        ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        # Hidden sizes about a vector and a tile, batches about the rows of a tile.
        cases += [make(T=2, B=2, H=H, dtype=dtype, name="sizes") for H in (1, 2, 7, 8, 15, 16, 17, 33, 64, 65, 130)]
        cases += [make(T=2, B=B, H=20, dtype=dtype, name="sizes") for B in (1, 2, 4, 6, 7, 8, 13, 29)]
        cases += [make("lstm_cell", B=B, H=H, dtype=dtype, name="sizes") for B, H in ((1, 1), (1, 130), (9, 33))]
        cases.append(make(T=12, B=5, H=40, dtype=dtype, lengths=(12, 1, 7, 12, 3), bidirectional=True, name="sizes"))
        cases += [
            make("gru", T=2, B=B, H=H, dtype=dtype, name="sizes")
            for B, H in ((1, 1), (2, 17), (1, 130), (13, 20), (7, 65))
        ]
        cases.append(
            make("gru", T=12, B=5, H=40, dtype=dtype, lengths=(12, 1, 7, 12, 3), bidirectional=True, name="sizes")
        )
    cases += [make(op, B=0, name="empty") for op in OPS]
    return cases


def long_cases() -> list[LSTMCase]:
    """More steps and units than an interpreter has patience for."""
    return [
        LSTMCase(op, T=100, B=B, I=32, H=H, dtype=dtype, lengths=lengths, name="long")
        for op in ("lstm", "gru")
        for dtype in (torch.float32, torch.bfloat16)
        for B, H, lengths in ((1, 300, None), (17, 130, None), (4, 70, (100, 3, 60, 99)))
    ]
