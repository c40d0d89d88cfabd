"""What tests, `llmkernels check` and benchmarks run for quantized_linear and rms_norm_quantized_linear: shapes, inputs,
truth, baseline, bytes."""

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels import functional
from llmkernels.ops.norm.reference import rms_norm
from llmkernels.ops.quantized_linear import reference
from llmkernels.quantization import fp8, int8
from llmkernels.quantization.tensor import QuantizedTensor, quantize_tensor
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("quantized_linear", "rms_norm_quantized_linear")
EPS = 1e-6
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# The words of tests/coverage.toml -> (scheme, options of quantize).
VARIANTS = {
    "int8": ("int8", {}),
    "int4": ("int4", {}),
    "int4_32": ("int4", {"group_size": 32}),
    "int4_128": ("int4", {"group_size": 128, "scale_dtype": torch.float16}),
    "int4_row": ("int4", {"group_size": None, "scale_dtype": torch.float32}),
    "int4_zeros": ("int4", {"symmetric": False}),
    "int4_128_zeros": ("int4", {"group_size": 128, "symmetric": False, "scale_dtype": torch.float16}),
    "nf4": ("nf4", {}),
    "nf4_double": ("nf4", {"double": True}),
    "nf4_row": ("nf4", {"group_size": None, "scale_dtype": torch.float32}),
    "fp8": ("fp8", {}),
    "fp8_block": ("fp8", {"group_size": 128}),
    "w8a8": ("w8a8", {}),
    "w4a8": ("w4a8", {}),
    "w4a8_zeros": ("w4a8", {"group_size": 32, "symmetric": False}),
    "w4a8_row": ("w4a8", {"group_size": None}),
    "fp8_dynamic": ("fp8_dynamic", {}),
    "fp8_dynamic_block": ("fp8_dynamic", {"group_size": 128}),
}
# Of rms_norm_quantized_linear: each kind of activations, and weights of each size without.
NORM_VARIANTS = ("int8", "nf4", "w8a8", "w4a8", "w4a8_zeros", "fp8_dynamic")


@dataclass(frozen=True)
class QuantizedLinearCase:
    """One call: x `[M, K]`, weight `[N, K]`. `data` names the distribution of x and of the weight: normal, large, zeros
    (some rows of both), scaled (rows and columns of very different size).

    Of rms_norm_quantized_linear x has multiples of 1/8, whose squares are added exactly: the order of a kernel's sums
    must not decide to which integer an activation is rounded.
    """

    variant: str  # of VARIANTS
    M: int
    N: int
    K: int
    dtype: torch.dtype = torch.float32
    bias: bool = True
    data: str = "normal"
    op: str = OPS[0]

    @property
    def rows(self) -> str:
        """The range of M: one row; a few, up to 8; some, up to 64; many."""
        return "one" if self.M <= 1 else "few" if self.M <= 8 else "some" if self.M <= 64 else "many"

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        return f"{self.variant}-{self.rows}" if self.data == "normal" else self.data

    @property
    def elements(self) -> int:
        return self.M * self.N * self.K // 64

    def __str__(self) -> str:
        options = [] if self.data == "normal" else [self.data]
        options += [] if self.bias else ["no_bias"]
        shape = f"{self.M}x{self.N}x{self.K}"
        return "-".join([self.op, self.variant, shape, short_name(self.dtype), *options])


@dataclass
class QuantizedLinearInputs(Inputs):
    """Tensors of one case: the arguments and the gradient that arrives at the output. The weight is no leaf."""

    LEAVES = ("x", "bias", "norm_weight")
    OUTPUTS = ("y",)
    GRADS = ("dy",)

    x: Tensor
    bias: Tensor | None
    dy: Tensor
    weight: QuantizedTensor
    norm_weight: Tensor | None = None


def _weight(case: QuantizedLinearCase, seed: int) -> QuantizedTensor:
    """The weight on the CPU, the same for any number of rows of x."""
    return _quantized(replace(case, M=0, bias=False, op=OPS[0]), seed)


@functools.lru_cache(maxsize=64)
def _quantized(case: QuantizedLinearCase, seed: int) -> QuantizedTensor:
    """Quantizing takes longer than many a case."""
    generator = torch.Generator().manual_seed(seed + 1000)
    weight = torch.randn(case.N, case.K, generator=generator, dtype=torch.float64) * max(case.K, 1) ** -0.5
    if case.data == "large":
        weight *= 1000.0
    elif case.data == "zeros":
        weight[::3], weight[:, : case.K // 2] = 0.0, 0.0
    elif case.data == "scaled":
        weight *= torch.logspace(-3, 3, max(case.N, 1), dtype=torch.float64)[: case.N, None]
    scheme, options = VARIANTS[case.variant]
    return quantize_tensor(weight.to(case.dtype), scheme, **options)


def make_inputs(case: QuantizedLinearCase, device: str | torch.device = "cpu", seed: int = 0) -> QuantizedLinearInputs:
    """Random tensors; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    x, dy, bias = normal(case.M, case.K), normal(case.M, case.N), normal(case.N)
    if case.data == "zeros":
        x[::2] = 0.0
    elif case.data == "scaled":
        x *= torch.logspace(-2, 2, max(case.M, 1), dtype=torch.float64)[: case.M, None]
    norm_weight = None
    if case.op != OPS[0]:
        x = (8.0 * x).round() / 8.0
        norm_weight = (1.0 + 0.1 * normal(case.K)).to(case.dtype).to(device)
    x, dy, bias = (t.to(case.dtype).to(device) for t in (x, dy, bias))
    weight = _weight(case, seed)
    if weight.data.device != x.device:
        weight = replace(weight, **{name: part.to(device) for name, part in weight.parts.items()})
    return QuantizedLinearInputs(x, bias if case.bias else None, dy, weight, norm_weight)


def call(case: QuantizedLinearCase, inputs: QuantizedLinearInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (y,)."""
    x, weight, bias = inputs.x, inputs.weight, inputs.bias
    if case.op == OPS[0]:
        return (functional.quantized_linear(x, weight, bias, backend=backend),)
    return (functional.rms_norm_quantized_linear(x, weight, bias, inputs.norm_weight, EPS, backend=backend),)


def _normed(case: QuantizedLinearCase, inputs: QuantizedLinearInputs) -> Tensor:
    """What is multiplied by the weight, before it is rounded."""
    return inputs.x if case.op == OPS[0] else rms_norm(inputs.x, None, inputs.norm_weight, (case.K,), EPS, 0.0)


class _Rounded(torch.autograd.Function):
    """A linear layer of rounded activations in the dtype of x, with the weight's gradient of plain ones."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight = weight
        parts = (weight.data, weight.scales, weight.zeros, weight.second_scales)
        kind = (weight.format, weight.group_size or 0, weight.activations)
        return reference.linear_fwd(x, *parts, bias, *kind)

    @staticmethod
    def backward(ctx, dy):
        dbias = dy.sum(0) if ctx.needs_input_grad[1] else None
        return dy @ ctx.weight.dequantize(dy.dtype), dbias, None


def call_torch(case: QuantizedLinearCase, inputs: QuantizedLinearInputs) -> tuple[Tensor, ...]:
    """The same by torch's linear and a weight written out: the baseline of accuracy.

    Of rounded activations, whose integers torch's linear would round once more, it is the reference.
    """
    x = _normed(case, inputs)
    if inputs.weight.activations:
        return (_Rounded.apply(x, inputs.bias, inputs.weight),)
    return (torch_functional.linear(x, inputs.weight.dequantize(x.dtype), inputs.bias),)


@torch.no_grad()
def _rounded(case: QuantizedLinearCase, inputs: QuantizedLinearInputs) -> Tensor:
    """What is multiplied by the weight in fp64, rounded as that says: from the dtype of x."""
    if not inputs.weight.activations:
        return _normed(case, _wide(inputs))
    quantize_rows = (int8 if inputs.weight.activations == "int8" else fp8).quantize_rows
    values, scales = quantize_rows(_normed(case, inputs))
    return values.double() * scales.double()


def _wide(inputs: QuantizedLinearInputs) -> QuantizedLinearInputs:
    names = [*inputs.leaf_names(), "dy"]
    return inputs.replace(**{name: getattr(inputs, name).double() for name in names})


def truth(case: QuantizedLinearCase, inputs: QuantizedLinearInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64. The gradient passes the rounding of activations as if there were none."""
    weight, rounded = inputs.weight.dequantize(torch.float64), _rounded(case, inputs)

    def linear(leaves):
        x = _normed(case, leaves)
        return (torch_functional.linear(x + (rounded - x.detach()), weight, leaves.bias),)

    return outputs_and_gradients(_wide(inputs), linear)


def as_rows(case: QuantizedLinearCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`: the bias is one row."""
    return tensor if tensor.dim() == 2 else tensor[None]


def term_size(case: QuantizedLinearCase, inputs: QuantizedLinearInputs, name: str) -> Tensor | None:
    """`[rows]`: the rms size of a sum of terms of a row's size, which may cancel."""
    wide = inputs.weight.dequantize(torch.float64).square()
    if name == "y":
        sums = _rounded(case, inputs).square() @ wide.t()
    elif name == "dbias":
        sums = inputs.dy.double().square().sum(0)[None]
    else:
        sums = inputs.dy.double().square() @ wide
        if case.op != OPS[0]:
            x, norm_weight = inputs.x.double(), inputs.norm_weight.double()
            rstd = (x.square().mean(-1, keepdim=True) + EPS).rsqrt()
            by = norm_weight * rstd if name == "dx" else x * rstd
            sums = sums * by.square()
        if name == "dnorm_weight":
            sums = sums.sum(0)[None]
    return sums.mean(-1).sqrt()


def flops(case: QuantizedLinearCase, direction: str) -> int:
    """Multiplications and additions: "fwd", "bwd" or "fwd+bwd"."""
    return {"fwd": 2, "bwd": 2, "fwd+bwd": 4}[direction] * case.M * case.N * case.K


def bytes_moved(case: QuantizedLinearCase, direction: str) -> int:
    """Bytes of input, output and the packed weight, read and written once in each direction."""
    packed = _weight(case, 0).nbytes
    size = packed + case.M * (case.K + case.N) * case.dtype.itemsize
    return {"fwd": 1, "bwd": 1, "fwd+bwd": 2}[direction] * size


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> QuantizedLinearCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    # The norm is in a kernel only with rounded activations, whose gradient is not that of what is computed.
    variant = "int8" if op == OPS[0] or dtype == torch.float64 else "w8a8"
    M, N, K = (2, 3, 5) if tiny else (5, 48, 64)
    return QuantizedLinearCase(variant, M, N, K, dtype, op=op)


def reshaped(case: QuantizedLinearCase, shape: tuple[int, ...]) -> QuantizedLinearCase:
    """The same call on tensors of another shape, one that a user gives: (M, N, K), or fewer of the last ones."""
    M, N, K = (1,) * (3 - len(shape)) + tuple(shape[-3:])
    return replace(case, M=M, N=N, K=K)


def test_cases() -> list[QuantizedLinearCase]:
    """The cases of the test battery: each variant, dtype and range of M, awkward sizes, hard data."""
    make = QuantizedLinearCase
    cases = []
    for dtype in DTYPES:
        for variant in VARIANTS:
            # Sizes that are multiples of nothing, and larger than a block of 128.
            cases += [make(variant, M, 150, 296, dtype) for M in (1, 3, 17)]
            cases.append(make(variant, 70, 72, 136, dtype))
    for dtype in (torch.float32, torch.bfloat16):
        for variant in ("int8", "int4", "int4_zeros", "nf4_double", "fp8_block", "w8a8", "w4a8"):
            cases += [make(variant, 4, 40, 200, dtype, data=data) for data in ("large", "zeros", "scaled")]
            cases += [make(variant, 3, 33, K, dtype, bias=False) for K in (1, 2, 31, 63, 65, 127, 128, 129, 257)]
            cases += [make(variant, 2, N, 96, dtype) for N in (1, 2, 7, 8, 15, 16, 17, 31, 64, 65, 129)]
            cases += [make(variant, M, 24, 64, dtype) for M in (2, 4, 5, 6, 7, 8, 9, 15, 16, 32, 33, 64, 65, 129)]
    # Several tiles of each kind along every side.
    for dtype in (torch.float32, torch.bfloat16):
        cases += [make(variant, M, 520, 1040, dtype) for variant in ("int8", "int4", "w8a8") for M in (1, 48)]
    for variant in VARIANTS:
        cases += [make(variant, *sizes) for sizes in ((0, 5, 16), (3, 0, 16), (3, 5, 0))]
    return cases + _norm_cases()


def _norm_cases() -> list[QuantizedLinearCase]:
    """Those of rms_norm_quantized_linear: what it is composed of has its own."""
    make = functools.partial(QuantizedLinearCase, op=OPS[1])
    cases = []
    for dtype in DTYPES:
        for variant in NORM_VARIANTS:
            cases += [make(variant, M, 40, 200, dtype) for M in (1, 3, 17, 70)]
    for dtype in (torch.float32, torch.bfloat16):
        for variant in ("int8", "w8a8", "w4a8"):
            cases.append(make(variant, 4, 40, 136, dtype, data="zeros"))
            cases += [make(variant, 2, 9, K, dtype, bias=False) for K in (1, 2, 31, 64, 65, 257)]
            cases.append(make(variant, 1, 9, 37, dtype))  # one row is read in vectors, its end is not
            cases.append(make(variant, 2, 16, 2100, dtype))  # more than a block's vectors
    cases += [make("w8a8", *sizes) for sizes in ((0, 5, 16), (3, 0, 16), (3, 5, 0))]
    return cases
