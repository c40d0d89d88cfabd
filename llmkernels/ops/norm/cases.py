"""What tests, `llmkernels check` and benchmarks run for the norm family: shapes, inputs, truth, baseline, bytes."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels import _random, functional
from llmkernels._dtypes import accumulate_dtype
from llmkernels.ops.norm import reference
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "dropout_add_layer_norm", "dropout_add_rms_norm")
SEED = 1234  # of dropout
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NormCase:
    """One call. `data` names the distribution of the input: normal, offset, small, large, outlier."""

    op: str
    shape: tuple[int, ...]
    normalized_shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: that of the input
    weight: bool = True
    bias: bool = True  # layer_norm only
    weight_offset: float = 0.0  # rms_norm only
    eps: float = 1e-5
    data: str = "normal"
    dropout: float = 0.3  # dropout_add_* only

    @property
    def is_layer_norm(self) -> bool:
        return self.op.endswith("layer_norm")

    @property
    def adds(self) -> bool:
        return "add_" in self.op

    @property
    def drops(self) -> bool:
        return self.op.startswith("dropout_")

    @property
    def cols(self) -> int:
        return math.prod(self.normalized_shape)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[: len(self.shape) - len(self.normalized_shape)])

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        if self.cols > 8192:
            return "long_row"
        if self.data != "normal":
            return self.data
        if self.dropout == 1.0:
            return "all_dropped"
        if not self.weight:
            return "no_weight"
        if self.weight_dtype:
            return f"weight_{short_name(self.weight_dtype)}"
        if self.is_layer_norm and not self.bias:
            return "no_bias"
        if self.weight_offset:
            return "weight_offset"
        return "dims" if len(self.normalized_shape) > 1 else "plain"

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        options = [self.data] if self.data != "normal" else []
        options += [f"dropout{self.dropout:g}"] if self.dropout != 0.3 else []
        options += [] if self.weight else ["no_weight"]
        options += [] if self.bias or not self.is_layer_norm else ["no_bias"]
        options += [f"offset{self.weight_offset:g}"] if self.weight_offset else []
        options += [f"weight_{short_name(self.weight_dtype)}"] if self.weight_dtype else []
        options += [f"dims{len(self.normalized_shape)}"] if len(self.normalized_shape) > 1 else []
        return "-".join([self.op, size, short_name(self.dtype), *options])


@dataclass
class NormInputs(Inputs):
    """Tensors of one case: the arguments and the gradients that arrive at the outputs."""

    LEAVES = ("x", "residual", "weight", "bias")
    OUTPUTS = ("y", "new_residual")
    GRADS = ("dy", "dresidual")

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    dresidual: Tensor | None


_SCALE = {"normal": 1.0, "offset": 1.0, "small": 1e-4, "large": 1e4, "outlier": 1.0}


def make_inputs(case: NormCase, device: str | torch.device = "cpu", seed: int = 0) -> NormInputs:
    """Random tensors, never zeros; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    x = torch.randn(case.shape, generator=generator, dtype=torch.float64) * _SCALE[case.data]
    if case.data == "offset":  # mean = 10,000 x std; fp16 cannot hold it, so there 1,000 x
        x = x + (1e3 if case.dtype == torch.float16 else 1e4)
    if case.data == "outlier" and x.numel():
        x.view(-1, case.cols)[:, 0] = 1e3
    parameter_dtype = case.weight_dtype or case.dtype
    weight = normal(case.normalized_shape, parameter_dtype) if case.weight else None
    bias = normal(case.normalized_shape, parameter_dtype) if case.bias and case.is_layer_norm else None
    residual = normal(case.shape) if case.adds else None
    dresidual = normal(case.shape) if case.adds else None
    return NormInputs(x.to(case.dtype).to(device), residual, weight, bias, normal(case.shape), dresidual)


def call(case: NormCase, inputs: NormInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (y,) or (y, new_residual)."""
    tensors = (inputs.x, inputs.residual) if case.adds else (inputs.x,)
    function = getattr(functional, case.op)
    settings = {"backend": backend}
    if case.drops:
        settings |= {"dropout_p": case.dropout, "seed": torch.tensor(SEED, device=inputs.x.device)}
    if case.is_layer_norm:
        out = function(*tensors, case.normalized_shape, inputs.weight, inputs.bias, case.eps, **settings)
    else:
        settings["weight_offset"] = case.weight_offset
        out = function(*tensors, case.normalized_shape, inputs.weight, case.eps, **settings)
    return out if isinstance(out, tuple) else (out,)


def kept(case: NormCase, device: str | torch.device) -> Tensor:
    """What dropout keeps: bool, the shape of the input."""
    rows, columns = (torch.arange(size, device=device) for size in (case.rows, case.cols))
    return _random.keep(torch.tensor(SEED, device=device), rows[:, None], columns, case.dropout).view(case.shape)


def summed(case: NormCase, inputs: NormInputs) -> Tensor:
    """What is normed, each step rounded to the dtype of the case."""
    x = inputs.x
    if case.drops:
        x = torch.where(kept(case, x.device), x * _random.keep_scale(case.dropout), 0.0)
    return x + inputs.residual if case.adds else x


def call_torch(case: NormCase, inputs: NormInputs) -> tuple[Tensor, ...]:
    """The same by torch's own functions: the baseline of accuracy, and of speed where nothing is dropped."""
    return norm_torch(case, inputs, summed(case, inputs))


def norm_torch(case: NormCase, inputs: NormInputs, x: Tensor) -> tuple[Tensor, ...]:
    """The norm of `x` by torch's own functions, and `x` where the case has a residual."""
    weight = inputs.weight
    if case.is_layer_norm:
        if weight is None and inputs.bias is not None and inputs.bias.dtype != x.dtype:
            weight = torch.ones_like(inputs.bias)
        y = torch_functional.layer_norm(x, case.normalized_shape, weight, inputs.bias, case.eps)
    elif case.weight_offset:
        # Gemma's module: everything in fp32 (fp64), one cast at the end.
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = weight.to(wide) + case.weight_offset
        y = torch_functional.rms_norm(x.to(wide), case.normalized_shape, scale, case.eps).to(x.dtype)
    else:
        y = torch_functional.rms_norm(x, case.normalized_shape, weight, case.eps)
    return (y, x) if case.adds else (y,)


def truth(case: NormCase, inputs: NormInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64, of the sum as it is rounded to the dtype under test."""
    s = summed(case, inputs)
    wide = NormInputs(
        *(None if t is None else t.double() for t in (s, None, inputs.weight, inputs.bias, inputs.dy, None))
    )

    def formula(leaves):
        if case.is_layer_norm:
            return (reference.layer_norm(leaves.x, None, leaves.weight, leaves.bias, case.normalized_shape, case.eps),)
        args = (leaves.x, None, leaves.weight, case.normalized_shape, case.eps, case.weight_offset)
        return (reference.rms_norm(*args),)

    results = outputs_and_gradients(wide, formula)
    if case.adds:
        results["dx"] = results["dx"] + inputs.dresidual.double()
        results |= {"new_residual": s.double(), "dresidual": results["dx"]}
    if case.drops:
        results["dx"] = torch.where(kept(case, s.device), results["dx"] * _random.keep_scale(case.dropout), 0.0)
    return results


def as_rows(case: NormCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`: the gradient of a parameter is one row."""
    return tensor.reshape(1, -1) if name in ("dweight", "dbias") else tensor.reshape(case.rows, case.cols)


def term_size(case: NormCase, inputs: NormInputs, name: str) -> Tensor | None:
    """`[rows]`: the rms size of the terms that a result is a sum or difference of; None where there is only one.

    Terms can cancel, most of all in rows of few columns, and then their rounding is all there is to see.
    """
    if name == "new_residual" or (name == "y" and inputs.bias is None):
        return None
    s = summed(case, inputs).double().reshape(case.rows, case.cols)
    centered = s - s.mean(-1, keepdim=True) if case.is_layer_norm else s
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + case.eps)
    dy = inputs.dy.double().reshape(case.rows, case.cols)
    scale = 1.0 if inputs.weight is None else inputs.weight.double().flatten() + case.weight_offset
    passed = kept(case, s.device).view(s.shape) * _random.keep_scale(case.dropout) if case.drops else 1.0
    terms = {
        "y": lambda: (centered * rstd * scale).abs() + (0.0 if inputs.bias is None else inputs.bias.flatten().abs()),
        "dx": lambda: rstd * dy * scale * passed,
        "dresidual": lambda: rstd * dy * scale,
        "dweight": lambda: (dy * centered * rstd).abs().sum(0, keepdim=True),
        "dbias": lambda: dy.abs().sum(0, keepdim=True),
    }
    return terms[name]().square().mean(-1).sqrt()


def bytes_moved(case: NormCase, direction: str) -> int:
    """Bytes that must be read and written once: "fwd", "bwd" or "fwd+bwd". Parameters and statistics count too."""
    size = case.rows * case.cols * case.dtype.itemsize
    parameters = (
        case.cols * (case.weight_dtype or case.dtype).itemsize * (case.weight + (case.bias and case.is_layer_norm))
    )
    stats = case.rows * accumulate_dtype(case.dtype).itemsize * (2 if case.is_layer_norm else 1)
    forward = size * (4 if case.adds else 2) + parameters + stats
    backward = size * (5 if case.drops else 4 if case.adds else 3) + 2 * parameters + stats
    return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[direction]


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> NormCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    shape = (3, 5) if tiny else (6, 24)
    return NormCase(op, shape, shape[-1:], dtype)


def reshaped(case: NormCase, shape: tuple[int, ...]) -> NormCase:
    """The same call on tensors of another shape, one that a user gives: `llmkernels check --shape`."""
    return replace(case, shape=shape, normalized_shape=shape[-1:])


def test_cases() -> list[NormCase]:
    """The cases of the test battery: each option, each dtype, awkward row lengths, hard data."""
    cases = []
    for op in OPS:
        for dtype in DTYPES:
            cases.append(NormCase(op, (5, 33), (33,), dtype))
            cases += [
                NormCase(op, (6, 100), (100,), dtype, data=data) for data in ("offset", "small", "large", "outlier")
            ]
            cases.append(NormCase(op, (3, 4, 6, 8), (6, 8), dtype))
            cases.append(NormCase(op, (7, 40), (40,), dtype, weight=False, bias=False))
            if dtype in (torch.bfloat16, torch.float16):
                cases.append(NormCase(op, (5, 72), (72,), dtype, weight_dtype=torch.float32))
            if op.endswith("layer_norm"):
                cases.append(NormCase(op, (5, 40), (40,), dtype, bias=False))
            else:
                cases.append(NormCase(op, (5, 40), (40,), dtype, weight_offset=1.0))
            if op.startswith("dropout_"):
                cases += [NormCase(op, (5, 40), (40,), dtype, dropout=p) for p in (0.9, 1.0)]
        cases.append(NormCase(op, (301, 72), (72,), torch.bfloat16))
        cases += [
            NormCase(op, (3, cols), (cols,))
            for cols in (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 127, 1000, 1025)
        ]
        cases += [NormCase(op, (4, 1025), (1025,), torch.bfloat16), NormCase(op, (1, 5000), (5000,))]
        # Just past what one warp holds, with more rows than a small GPU has blocks at a time.
        cases += [NormCase(op, (40, 1032), (1032,), torch.bfloat16), NormCase(op, (40, 1030), (1030,))]
        cases += [NormCase(op, shape, shape[-1:]) for shape in ((0, 16), (4, 0), (16,), (33,))]
    return cases


def long_cases() -> list[NormCase]:
    """Rows of up to 262,144 columns: too slow for an interpreter."""
    return [
        NormCase(op, (2, cols), (cols,), dtype, data=data)
        for op in ("layer_norm", "add_rms_norm", "dropout_add_layer_norm", "dropout_add_rms_norm")
        for cols, dtype, data in (
            (8193, torch.bfloat16, "normal"),
            (65_536, torch.float32, "offset"),
            (262_144, torch.float32, "normal"),
            (262_144, torch.bfloat16, "outlier"),
        )
    ]
