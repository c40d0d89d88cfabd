"""What tests, `llmkernels check` and benchmarks run for the gated family: shapes, inputs, truth, baseline, bytes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkernels import functional
from llmkernels.ops.gated import reference
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("swiglu", "geglu", "reglu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GatedCase:
    """One call. `data` names the distribution of the gate: normal, small, large."""

    op: str
    shape: tuple[int, ...]  # of y
    dtype: torch.dtype = torch.float32
    packed: bool = False
    approximate: str = "none"  # geglu only
    data: str = "normal"

    @property
    def activation(self) -> str:
        if self.op == "geglu":
            return "gelu" if self.approximate == "none" else "gelu_tanh"
        return {"swiglu": "silu", "reglu": "relu"}[self.op]

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        if math.prod(self.shape[-1:]) > 8192:
            return "long_row"
        if self.data != "normal":
            return self.data
        if self.packed:
            return "packed"
        return "plain" if self.approximate == "none" else self.approximate

    def __str__(self) -> str:
        options = [self.data] if self.data != "normal" else []
        options += ["packed"] if self.packed else []
        options += [self.approximate] if self.approximate != "none" else []
        return "-".join([self.op, "x".join(map(str, self.shape)), short_name(self.dtype), *options])


@dataclass
class GatedInputs(Inputs):
    """Tensors of one case: the arguments and the gradient that arrives at the output. `up` is None if packed."""

    LEAVES = ("gate", "up")
    OUTPUTS = ("y",)
    GRADS = ("dy",)

    gate: Tensor
    up: Tensor | None
    dy: Tensor


_SCALE = {"normal": 1.0, "small": 1e-4, "large": 12.0}  # with 12 the activations reach both of their limits


def make_inputs(case: GatedCase, device: str | torch.device = "cpu", seed: int = 0) -> GatedInputs:
    """Random tensors, never zeros; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale=1.0):
        return (torch.randn(case.shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype).to(device)

    gate, up, dy = normal(_SCALE[case.data]), normal(), normal()
    return GatedInputs(torch.cat((gate, up), -1), None, dy) if case.packed else GatedInputs(gate, up, dy)


def call(case: GatedCase, inputs: GatedInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (y,)."""
    settings = {"approximate": case.approximate} if case.op == "geglu" else {}
    return (getattr(functional, case.op)(inputs.gate, inputs.up, **settings, backend=backend),)


def call_torch(case: GatedCase, inputs: GatedInputs) -> tuple[Tensor, ...]:
    """The same by torch's own functions: the baseline of accuracy and of speed."""
    gate, up = reference.factors(inputs.gate, inputs.up)
    return (reference.ACTIVATIONS[case.activation](gate) * up,)


def _wide(inputs: GatedInputs) -> GatedInputs:
    return GatedInputs(*(None if t is None else t.double() for t in (inputs.gate, inputs.up, inputs.dy)))


def truth(case: GatedCase, inputs: GatedInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64."""
    return outputs_and_gradients(_wide(inputs), lambda leaves: call_torch(case, leaves))


def as_rows(case: GatedCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`: the gradients of a packed row are two rows."""
    cols = math.prod(case.shape[-1:])
    return tensor.reshape(tensor.numel() // max(cols, 1), cols)


def term_size(case: GatedCase, inputs: GatedInputs, name: str) -> Tensor | None:
    """`[rows]`: the rms size of the terms that a result is a sum or difference of; None where there is only one.

    1 + erf and 1 + tanh cancel where gate is far below zero, the two terms of a slope about its zero.
    """
    if case.activation == "relu":
        return None
    wide = _wide(inputs)
    gate, up = reference.factors(wide.gate, wide.up)
    value, slope = slope_terms(gate, case.activation)
    sizes = {"y": value * up, "dgate": slope * up * wide.dy, "dup": value * wide.dy}
    rows = [as_rows(case, name, sizes[name]).square().mean(-1).sqrt() for name in ("y", "dgate", "dup")]
    if case.packed and name == "dgate":
        return torch.stack(rows[1:], 1).flatten()
    return rows[("y", "dgate", "dup").index(name)]


def slope_terms(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Of act(gate) and of its slope."""
    if activation == "gelu":
        density = torch.exp(-0.5 * gate.square()) / math.sqrt(2.0 * math.pi)
        return 0.5 * gate, 0.5 + (gate * density).abs()
    argument, factor = gate, 1.0
    if activation == "gelu_tanh":
        scale, cubic = 2.0 * math.sqrt(2.0 / math.pi), 0.044715
        argument, factor = gate * scale * (1.0 + cubic * gate.square()), scale * (1.0 + 3.0 * cubic * gate.square())
    s = torch.sigmoid(argument)
    # The slope is s + gate * s * (1 - s) * factor, where 1 - s cancels until s is 1 in every digit.
    slope = s + torch.where(argument < 40.0, (gate * s * factor).abs(), 0.0)
    return gate * s if activation == "silu" else 0.5 * gate, slope


def bytes_moved(case: GatedCase, direction: str) -> int:
    """Bytes that must be read and written once: "fwd", "bwd" or "fwd+bwd"."""
    return {"fwd": 3, "bwd": 5, "fwd+bwd": 8}[direction] * math.prod(case.shape) * case.dtype.itemsize


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> GatedCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    return GatedCase(op, (3, 5) if tiny else (6, 24), dtype)


def reshaped(case: GatedCase, shape: tuple[int, ...]) -> GatedCase:
    """The same call on tensors of another shape, one that a user gives: `llmkernels check --shape`."""
    return replace(case, shape=shape)


def test_cases() -> list[GatedCase]:
    """The cases of the test battery: each option, each dtype, awkward row lengths, hard data."""
    cases = []
    for op in OPS:
        for dtype in DTYPES:
            cases += [GatedCase(op, (5, 33), dtype), GatedCase(op, (3, 4, 40), dtype)]
            cases += [GatedCase(op, (6, 100), dtype, data=data) for data in ("small", "large")]
            cases += [GatedCase(op, shape, dtype, packed=True) for shape in ((5, 33), (3, 4, 40))]
            if op == "geglu":
                cases += [GatedCase(op, (6, 100), dtype, approximate="tanh", packed=packed) for packed in (False, True)]
                cases.append(GatedCase(op, (6, 100), dtype, approximate="tanh", data="large"))
        cases += [GatedCase(op, (3, cols)) for cols in (1, 2, 7, 8, 16, 17, 64, 65, 1000, 1025)]
        # More rows and longer rows than the blocks of a small GPU take at a time.
        cases += [GatedCase(op, shape, torch.bfloat16, packed=True) for shape in ((301, 72), (40, 4104))]
        cases += [GatedCase(op, shape, packed=True) for shape in ((0, 16), (4, 0), (16,))]
        cases += [GatedCase(op, shape) for shape in ((0, 16), (4, 0), (16,), ())]
    return cases


def long_cases() -> list[GatedCase]:
    """Rows of up to 262,144 columns: too slow for an interpreter."""
    return [
        GatedCase(op, (2, cols), dtype, packed=packed)
        for op in ("swiglu", "geglu")
        for cols, packed in ((8193, True), (262_144, False))
        for dtype in (torch.float32, torch.bfloat16)
    ]
