"""What tests, `llmkernels check` and benchmarks run for gelu and silu: shapes, inputs, truth, baseline, bytes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkernels import functional
from llmkernels.ops.gated.cases import slope_terms
from llmkernels.ops.gated.reference import ACTIVATIONS
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("gelu", "silu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ActivationCase:
    """One call. `data` names the distribution of the input: normal, small, large."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    bias: bool = True
    approximate: str = "none"  # gelu only
    data: str = "normal"

    @property
    def activation(self) -> str:
        return self.op if self.approximate == "none" else "gelu_tanh"

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        if self.data != "normal":
            return self.data
        if not self.bias:
            return "no_bias"
        return "plain" if self.approximate == "none" else self.approximate

    def __str__(self) -> str:
        words = [self.op, "x".join(map(str, self.shape)), short_name(self.dtype)]
        words += [] if self.bias else ["no_bias"]
        words += [self.approximate] if self.approximate != "none" else []
        return "-".join([*words, *([self.data] if self.data != "normal" else [])])


@dataclass
class ActivationInputs(Inputs):
    """Tensors of one case: the arguments and the gradient that arrives at the output."""

    LEAVES = ("input", "bias")
    OUTPUTS = ("y",)
    GRADS = ("dy",)

    input: Tensor
    bias: Tensor | None
    dy: Tensor


_SCALE = {"normal": 1.0, "small": 1e-4, "large": 12.0}  # with 12 the activations reach both of their limits


def make_inputs(case: ActivationCase, device: str | torch.device = "cpu", seed: int = 0) -> ActivationInputs:
    """Random tensors, never zeros; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype).to(device)

    scale = _SCALE[case.data]
    bias = normal(case.shape[-1:], scale) if case.bias else None
    return ActivationInputs(normal(case.shape, scale), bias, normal(case.shape))


def call(case: ActivationCase, inputs: ActivationInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (y,)."""
    settings = {"approximate": case.approximate} if case.op == "gelu" else {}
    return (getattr(functional, case.op)(inputs.input, inputs.bias, **settings, backend=backend),)


def call_torch(case: ActivationCase, inputs: ActivationInputs) -> tuple[Tensor, ...]:
    """The same by torch's own functions: the baseline of accuracy and of speed."""
    return (ACTIVATIONS[case.activation](inputs.input if inputs.bias is None else inputs.input + inputs.bias),)


def _wide(inputs: ActivationInputs) -> ActivationInputs:
    return ActivationInputs(*(None if t is None else t.double() for t in (inputs.input, inputs.bias, inputs.dy)))


def truth(case: ActivationCase, inputs: ActivationInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64."""
    return outputs_and_gradients(_wide(inputs), lambda leaves: call_torch(case, leaves))


def as_rows(case: ActivationCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`; each element of dbias is a sum of its own."""
    if name == "dbias":
        return tensor.reshape(-1, 1)
    cols = math.prod(case.shape[-1:])
    return tensor.reshape(tensor.numel() // max(cols, 1), cols)


def term_size(case: ActivationCase, inputs: ActivationInputs, name: str) -> Tensor | None:
    """`[rows]`: the rms size of the terms that a result is a sum or difference of.

    1 + erf and 1 + tanh cancel where the input is far below zero, the two terms of a slope about its zero, and
    input + bias anywhere: then the sum is off by its terms' rounding, and what follows by the slope of that.
    """
    wide = _wide(inputs)
    at = wide.input if wide.bias is None else wide.input + wide.bias
    value, slope = slope_terms(at, case.activation)
    spread = wide.input.abs() if wide.bias is None else wide.input.abs() + wide.bias.abs()
    if name == "y":
        return as_rows(case, name, value.abs() + slope.abs() * spread).square().mean(-1).sqrt()
    sizes = (slope.abs() + spread) * wide.dy.abs()  # a second derivative is at most about one
    if name == "dinput":
        return as_rows(case, name, sizes).square().mean(-1).sqrt()
    # One number has no others to average its roundings with, and the sum adds its own.
    return 2.0 * sizes.reshape(math.prod(case.shape[:-1]), case.shape[-1]).square().sum(0).sqrt()


def bytes_moved(case: ActivationCase, direction: str) -> int:
    """Bytes that must be read and written once: "fwd", "bwd" or "fwd+bwd"."""
    return {"fwd": 2, "bwd": 3, "fwd+bwd": 5}[direction] * math.prod(case.shape) * case.dtype.itemsize


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> ActivationCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    return ActivationCase(op, (3, 5) if tiny else (6, 24), dtype)


def reshaped(case: ActivationCase, shape: tuple[int, ...]) -> ActivationCase:
    """The same call on tensors of another shape, one that a user gives: `llmkernels check --shape`."""
    return replace(case, shape=shape)


def test_cases() -> list[ActivationCase]:
    """The cases of the test battery: each option, each dtype, awkward row lengths, hard data."""
    cases = []
    for op in OPS:
        for dtype in DTYPES:
            for bias in (True, False):
                cases += [ActivationCase(op, shape, dtype, bias) for shape in ((5, 33), (3, 4, 40))]
            cases += [ActivationCase(op, (6, 100), dtype, data=data) for data in ("small", "large")]
            if op == "gelu":
                cases += [ActivationCase(op, (6, 100), dtype, bias, "tanh") for bias in (False, True)]
        cases += [ActivationCase(op, (3, cols)) for cols in (1, 2, 7, 8, 16, 17, 64, 65, 1000, 1025)]
        # More rows than a block or a slab of sums takes, and longer rows.
        cases += [ActivationCase(op, shape, torch.bfloat16) for shape in ((301, 72), (40, 4104))]
        cases += [ActivationCase(op, shape) for shape in ((0, 16), (4, 0), (16,), (200, 3))]
        cases += [ActivationCase(op, shape, bias=False) for shape in ((0, 16), (4, 0), (16,), ())]
    return cases
