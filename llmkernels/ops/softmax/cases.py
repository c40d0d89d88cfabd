"""What tests, `llmkernels check` and benchmarks run for softmax and log_softmax: shapes, inputs, truth, bytes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkernels import functional
from llmkernels.ops.softmax import reference
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("softmax", "log_softmax")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SoftmaxCase:
    """One call over the last dimension.

    `mask` is "" (none), "bool", or added: "bias" (finite), "add" (-inf in places) or "add_fp32"; `mask_shape` is None
    for one of the shape of x. `data` names the distribution of x: normal, small, large, offset (all near 10,000). Of a
    mask's first row nothing is left, `dead_row`.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    mask: str = ""
    mask_shape: tuple[int, ...] | None = None
    data: str = "normal"
    dead_row: bool = True

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        if math.prod(self.shape[-1:]) > 8192:
            return "long_row"
        if self.data != "normal":
            return self.data
        if self.mask:
            return f"mask_{self.mask}"
        return "plain" if self.scale == 1.0 else "scale"

    def __str__(self) -> str:
        options = [self.data] if self.data != "normal" else []
        options += [f"scale{self.scale}"] if self.scale != 1.0 else []
        options += [self.mask] if self.mask else []
        options += ["x".join(map(str, self.mask_shape))] if self.mask_shape is not None else []
        return "-".join([self.op, "x".join(map(str, self.shape)), short_name(self.dtype), *options])


@dataclass
class SoftmaxInputs(Inputs):
    """Tensors of one case: the arguments and the gradient that arrives. `mask` is added, `keep` is boolean."""

    LEAVES = ("x", "mask")
    OUTPUTS = ("y",)
    GRADS = ("dy",)

    x: Tensor
    mask: Tensor | None
    keep: Tensor | None
    dy: Tensor


_SCALE = {"normal": 2.0, "small": 1e-4, "large": 30.0, "offset": 1.0}


def make_inputs(case: SoftmaxCase, device: str | torch.device = "cpu", seed: int = 0) -> SoftmaxInputs:
    """Random tensors, the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale=1.0):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    x = normal(case.shape, _SCALE[case.data]) + (1e4 if case.data == "offset" else 0.0)
    dy = normal(case.shape)
    mask = keep = None
    if case.mask:
        shape = case.shape if case.mask_shape is None else case.mask_shape
        keep = torch.rand(shape, generator=generator) < 0.7
        if case.dead_row and keep.dim() > 1 and keep.numel() > 0:
            keep.view(-1, shape[-1])[0] = False
        if case.mask != "bool":
            mask = normal(shape)
            mask = mask if case.mask == "bias" else mask.masked_fill(~keep, float("-inf"))
            mask = mask.to(torch.float32 if case.mask == "add_fp32" else case.dtype).to(device)
            keep = None
        else:
            keep = keep.to(device)
    return SoftmaxInputs(x.to(case.dtype).to(device), mask, keep, dy.to(case.dtype).to(device))


def call(case: SoftmaxCase, inputs: SoftmaxInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (y,)."""
    mask = inputs.keep if inputs.mask is None else inputs.mask
    return (getattr(functional, case.op)(inputs.x, scale=case.scale, mask=mask, backend=backend),)


def call_torch(case: SoftmaxCase, inputs: SoftmaxInputs) -> tuple[Tensor, ...]:
    """The same by torch's own function, of s in the dtype of sums: the baseline of accuracy."""
    s = reference.scores(inputs.x, inputs.keep if inputs.mask is None else inputs.mask, case.scale)
    nothing = (s == float("-inf")).all(-1, keepdim=True)
    s = torch.where(nothing, 0.0, s)
    if case.op == "softmax":
        y = torch.where(nothing, 0.0, torch.softmax(s, -1))
    else:
        y = torch.where(nothing | (s == float("-inf")), float("-inf"), torch.log_softmax(s, -1))
    return (y.to(inputs.x.dtype),)


def _wide(inputs: SoftmaxInputs) -> SoftmaxInputs:
    names = ("x", "mask", "dy")
    return inputs.replace(**{n: getattr(inputs, n).double() for n in names if getattr(inputs, n) is not None})


def truth(case: SoftmaxCase, inputs: SoftmaxInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64."""
    return outputs_and_gradients(_wide(inputs), lambda leaves: call_torch(case, leaves))


def as_rows(case: SoftmaxCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`."""
    cols = tensor.shape[-1] if tensor.dim() > 0 else 1
    return tensor.reshape(tensor.numel() // max(cols, 1), cols)


def term_size(case: SoftmaxCase, inputs: SoftmaxInputs, name: str) -> Tensor | None:
    """`[rows]`: the rms size of the terms that a gradient is a sum of; of log_softmax the size of s."""
    wide = _wide(inputs)
    s = reference.scores(wide.x, wide.keep if wide.mask is None else wide.mask, case.scale)
    if s.numel() == 0:
        return None
    if name == "y":
        if case.op == "softmax":
            return None
        return as_rows(case, name, s.masked_fill(s == float("-inf"), 0.0)).abs().amax(-1)
    (y,) = call_torch(case, wide)
    p = y.exp() if case.op == "log_softmax" else y
    if case.op == "log_softmax":
        # The rounding of y is as many times that of p as y is large.
        terms = wide.dy.abs() + p * (1.0 - y.clamp(min=-1e3)) * wide.dy.abs().sum(-1, keepdim=True)
    else:
        terms = p * (wide.dy.abs() + (p * wide.dy.abs()).sum(-1, keepdim=True))
    if name == "dmask":
        # Made of the y that is kept: its rounding shows in a mask of more digits.
        coarser = torch.finfo(case.dtype).eps / torch.finfo(inputs.mask.dtype).eps
        terms = terms.sum_to_size(inputs.mask.shape) * max(coarser, 1.0)
    else:
        terms = terms * abs(case.scale)
    rows = as_rows(case, name, terms)
    # Of large data one element has nearly all of the sum, and its terms, which cancel, say nothing in an rms.
    return rows.amax(-1) if case.data == "large" else rows.square().mean(-1).sqrt()


def bytes_moved(case: SoftmaxCase, direction: str) -> int:
    """Bytes that must be read and written once: "fwd", "bwd" or "fwd+bwd"."""
    count, size = math.prod(case.shape), case.dtype.itemsize
    mask = 0
    if case.mask:
        each = {"bool": 1, "bias": size, "add": size, "add_fp32": 4}[case.mask]
        mask = each * math.prod(case.shape if case.mask_shape is None else case.mask_shape)
    return {"fwd": 2 * count * size + mask, "bwd": 3 * count * size, "fwd+bwd": 5 * count * size + mask}[direction]


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> SoftmaxCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    shape = (3, 5) if tiny else (6, 24)
    return SoftmaxCase(op, shape, dtype, scale=0.5, mask="bias", mask_shape=shape[1:])


def reshaped(case: SoftmaxCase, shape: tuple[int, ...]) -> SoftmaxCase:
    """The same call on tensors of another shape, one that a user gives: `llmkernels check --shape`."""
    return replace(case, shape=shape, mask_shape=None if case.mask_shape is None else shape[-1:])


def test_cases() -> list[SoftmaxCase]:
    """The cases of the test battery: each option, each dtype, masks that expand, awkward row lengths, hard data."""
    cases = []
    for op in OPS:
        for dtype in DTYPES:
            of = lambda shape, op=op, dtype=dtype, **options: SoftmaxCase(op, shape, dtype, **options)
            cases += [of((5, 33)), of((3, 4, 40)), of((6, 100), scale=0.125), of((6, 100), scale=-0.75)]
            cases += [of((6, 100), data=data) for data in ("small", "large", "offset")]
            for mask in ("bool", "add", "add_fp32"):
                cases += [of((5, 33), mask=mask), of((2, 3, 4, 40), scale=0.5, mask=mask, mask_shape=(2, 1, 4, 40))]
            cases += [of((2, 3, 4, 40), mask=mask, mask_shape=(2, 3, 1, 1)) for mask in ("bool", "add")]
            cases += [of((2, 3, 4, 40), mask="bool", mask_shape=shape) for shape in ((40,), (3, 1, 40), (4, 1))]
            cases.append(of((3, 2056), scale=0.5, mask="bool"))
        cases += [SoftmaxCase(op, (3, cols)) for cols in (1, 2, 7, 8, 16, 17, 64, 65, 1000, 1025, 3000)]
        cases += [SoftmaxCase(op, (3, cols), torch.bfloat16) for cols in (1024, 4104, 5000)]
        # More rows than the blocks of a small GPU take at a time; five dimensions of a mask that no two of go together.
        cases += [SoftmaxCase(op, (301, 72), torch.bfloat16), SoftmaxCase(op, (50, 24), torch.float16, mask="add")]
        cases.append(SoftmaxCase(op, (2, 3, 2, 3, 24), mask="bool", mask_shape=(2, 1, 2, 1, 24)))
        cases += [SoftmaxCase(op, shape) for shape in ((0, 16), (4, 0), (16,))]
        cases += [SoftmaxCase(op, shape, mask="add") for shape in ((0, 16), (4, 0), (16,))]
    return cases


def long_cases() -> list[SoftmaxCase]:
    """Rows of up to 262,144 columns: too slow for an interpreter."""
    return [
        SoftmaxCase(op, (2, cols), dtype, mask=mask, mask_shape=None)
        for op in OPS
        for cols, mask in ((8193, "add"), (40_000, ""), (262_144, ""))
        for dtype in (torch.float32, torch.bfloat16)
    ]
