"""What tests, `llmkernels check` and benchmarks run for rope: shapes, inputs, truth, baseline, bytes."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkernels import functional
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("rope", "rope_")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class RopeCase:
    """One call. `shape` is that of q: `[*, H, S, D]`, or `[*, S, H, D]` if `seq_dim` is -3.

    `positions` is "" (none), "1d", "2d" or "int32"; `table` is "own" (the dtype of q), "fp32", "repeated" (D columns)
    or "batched" (`[B, S, R/2]`). `data` names the distribution of q and k: normal, small, large.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    kv_heads: int | None = 1  # None: no k
    rotary: int | None = None  # None: all of D
    interleaved: bool = False
    seq_dim: int = -2
    positions: str = ""
    table: str = "own"
    data: str = "normal"

    @property
    def seq(self) -> int:
        return self.shape[self.seq_dim]

    @property
    def k_shape(self) -> tuple[int, ...] | None:
        if self.kv_heads is None:
            return None
        shape, heads = list(self.shape), -5 - self.seq_dim
        if -heads <= len(shape):
            shape[heads] = self.kv_heads
        return tuple(shape)

    @property
    def half(self) -> int:
        return (self.shape[-1] if self.rotary is None else self.rotary) // 2

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        if self.data != "normal":
            return self.data
        if self.table != "own":
            return f"table_{self.table}"
        if self.positions:
            return f"positions_{self.positions}"
        if self.rotary is not None:
            return "partial_interleaved" if self.interleaved else "partial"
        if self.seq_dim == -3:
            return "seq_first"
        return "interleaved" if self.interleaved else "plain"

    def __str__(self) -> str:
        options = [self.data] if self.data != "normal" else []
        options += ["q"] if self.kv_heads is None else [f"kv{self.kv_heads}"]
        options += [f"r{self.rotary}"] if self.rotary is not None else []
        options += ["interleaved"] if self.interleaved else []
        options += ["seq_first"] if self.seq_dim == -3 else []
        options += [self.table] if self.table != "own" else []
        options += [self.positions] if self.positions else []
        return "-".join([self.op, "x".join(map(str, self.shape)), short_name(self.dtype), *options])


@dataclass
class RopeInputs(Inputs):
    """Tensors of one case: the arguments and the gradients that arrive at the outputs."""

    LEAVES = ("q", "k")
    OUTPUTS = ("q_turned", "k_turned")
    GRADS = ("dq_turned", "dk_turned")

    q: Tensor
    k: Tensor | None
    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    dq_turned: Tensor
    dk_turned: Tensor | None


_SCALE = {"normal": 1.0, "small": 1e-4, "large": 5e3}
_SPARE = 3  # rows of a table that no place of the sequence needs


def make_inputs(case: RopeCase, device: str | torch.device = "cpu", seed: int = 0) -> RopeInputs:
    """Random tensors and angles, never zeros; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale=1.0):
        if shape is None:
            return None
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype).to(device)

    q, k = (normal(shape, _SCALE[case.data]) for shape in (case.shape, case.k_shape))
    batch, length = case.shape[0], case.seq + _SPARE
    rows = (batch, case.seq) if case.table == "batched" else (length,)
    angles = torch.rand(*rows, case.half, generator=generator, dtype=torch.float64) * (2.0 * math.pi)
    angles = torch.cat((angles, angles), -1) if case.table == "repeated" else angles
    dtype = torch.float32 if case.table == "fp32" else case.dtype
    cos, sin = (table.to(dtype).to(device) for table in (angles.cos(), angles.sin()))
    positions = None
    if case.positions:
        shape = (batch, case.seq) if case.positions == "2d" else (case.seq,)
        positions = torch.randint(length, shape, generator=generator)
        positions = positions.to(torch.int32 if case.positions == "int32" else torch.int64).to(device)
    return RopeInputs(q, k, cos, sin, positions, normal(case.shape), normal(case.k_shape))


def call(case: RopeCase, inputs: RopeInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (q, k), or (q,) without k."""
    q, k = inputs.q, inputs.k
    if case.op == "rope_":  # leaves of autograd's graph are not overwritten
        q, k = q.clone(), None if k is None else k.clone()
    settings = {"interleaved": case.interleaved, "seq_dim": case.seq_dim, "backend": backend}
    turned = getattr(functional, case.op)(q, k, inputs.cos, inputs.sin, inputs.positions, **settings)
    return turned if k is not None else turned[:1]


def rows_of(case: RopeCase, table: Tensor, positions: Tensor | None) -> Tensor:
    """cos or sin as D or R columns that multiply a head, broadcastable to q."""
    if case.table != "repeated":
        table = table.repeat_interleave(2, -1) if case.interleaved else torch.cat((table, table), -1)
    if table.dim() == 2:
        table = table[: case.seq] if positions is None else table[positions.long()]
    if case.seq_dim == -3:
        return table.unsqueeze(-2)
    return table.unsqueeze(1) if table.dim() == 3 else table


def rotate_usual(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The usual code: x cos + rotate_half(x) sin, with as many columns of cos and sin as are turned."""
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if interleaved:
        swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    else:
        a, b = x.chunk(2, -1)
        swapped = torch.cat((-b, a), -1)
    y = (x * cos + swapped * sin).to(x.dtype)
    return torch.cat((y, rest), -1) if rest.shape[-1] else y


def call_torch(case: RopeCase, inputs: RopeInputs) -> tuple[Tensor, ...]:
    """The same by the usual code: the baseline of accuracy and of speed."""
    cos, sin = (rows_of(case, table, inputs.positions) for table in (inputs.cos, inputs.sin))
    return tuple(rotate_usual(x, cos, sin, case.interleaved) for x in (inputs.q, inputs.k) if x is not None)


def truth(case: RopeCase, inputs: RopeInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64."""
    names = ("q", "k", "cos", "sin", "dq_turned", "dk_turned")
    wide = {name: getattr(inputs, name).double() for name in names if getattr(inputs, name) is not None}
    return outputs_and_gradients(inputs.replace(**wide), lambda leaves: call_torch(case, leaves))


def as_rows(case: RopeCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[heads, D]`."""
    cols = case.shape[-1]
    return tensor.reshape(tensor.numel() // max(cols, 1), cols)


def term_size(case: RopeCase, inputs: RopeInputs, name: str) -> Tensor | None:
    """None: turning keeps the size of a pair, and a row has as many terms that grow as terms that cancel."""
    return None


def bytes_moved(case: RopeCase, direction: str) -> int:
    """Bytes that must be read and written once: "fwd", "bwd" or "fwd+bwd"."""
    elements = math.prod(case.shape) + (math.prod(case.k_shape) if case.k_shape is not None else 0)
    table = 4 if case.table == "fp32" else case.dtype.itemsize
    once = 2 * elements * case.dtype.itemsize + 2 * case.seq * case.half * table
    return {"fwd": 1, "bwd": 1, "fwd+bwd": 2}[direction] * once


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> RopeCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    return RopeCase(op, (2, 2, 4) if tiny else (2, 3, 5, 16), dtype, kv_heads=1 if tiny else 2)


def reshaped(case: RopeCase, shape: tuple[int, ...]) -> RopeCase:
    """The same call on tensors of another shape, one that a user gives: `llmkernels check --shape`."""
    return replace(case, shape=shape)


def _every_option(op: str, dtype: torch.dtype) -> list[RopeCase]:
    """Each option alone, and those that meet in a kernel; heads of less than a vector and of several."""
    of = lambda shape, **options: RopeCase(op, shape, dtype, **options)
    cases = []
    for interleaved in (False, True):
        for dim in (10, 64, 144):
            cases.append(of((2, 3, 5, dim), interleaved=interleaved, kv_heads=2))
        cases.append(of((2, 3, 5, 48), rotary=20, interleaved=interleaved))
        cases.append(of((2, 5, 3, 80), rotary=32, interleaved=interleaved, seq_dim=-3, kv_heads=2))
        cases.append(of((2, 5, 3, 64), interleaved=interleaved, seq_dim=-3, positions="2d"))
    cases.append(of((2, 5, 3, 64), seq_dim=-3, kv_heads=2))
    for positions in ("1d", "2d", "int32"):
        cases.append(of((2, 3, 5, 64), positions=positions))
    for table in ("fp32", "repeated", "batched"):
        cases.append(of((2, 3, 5, 64), table=table))
    cases += [of((2, 5, 3, 32), table=table, seq_dim=-3) for table in ("fp32", "repeated", "batched")]
    cases += [of((2, 3, 5, 32), data=data, kv_heads=None) for data in ("small", "large")]
    return cases


def test_cases() -> list[RopeCase]:
    """The cases of the test battery: each option, each dtype, awkward heads, packed sequences, nothing at all."""
    cases = []
    for op in OPS:
        for dtype in DTYPES:
            cases += _every_option(op, dtype)
        cases += [RopeCase(op, (2, 3, dim), kv_heads=2) for dim in (2, 4, 6, 8, 12, 16, 18, 32, 34, 66, 130, 258)]
        cases += [RopeCase(op, (2, 3, dim), interleaved=True) for dim in (2, 4, 6, 14, 16, 18, 32, 34, 66, 130)]
        cases += [
            RopeCase(op, (9, 2), rotary=2),
            RopeCase(op, (3, 7), rotary=4),
            RopeCase(op, (3, 9), kv_heads=None, rotary=6),
        ]
        for dtype in (torch.float32, torch.bfloat16):
            # Packed; more places than a block of a small GPU, or of a CPU, takes at a time; and a long head.
            cases.append(RopeCase(op, (37, 3, 64), dtype, seq_dim=-3, positions="1d"))
            cases.append(RopeCase(op, (1, 2, 70, 64), dtype, table="fp32"))
            cases.append(RopeCase(op, (1, 2, 3, 4608), dtype))
        cases += [RopeCase(op, shape) for shape in ((0, 2, 5, 8), (2, 2, 0, 8), (2, 0, 5, 8))]
        cases += [RopeCase(op, (2, 3, 5, 8), kv_heads=0)]
    return cases
