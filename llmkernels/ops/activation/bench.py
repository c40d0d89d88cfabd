"""What is worth timing of gelu and silu, and the peers to beat."""

import torch

from llmkernels.ops.activation import cases
from llmkernels.ops.activation.cases import ActivationCase
from llmkernels.testing.inputs import fewer

SIZE, LONG = (4096, 1024), (2048, 14336)


def bench_cases(op: str, full: bool) -> list[ActivationCase]:
    """Cases of `op`: with a bias, and with `full` also without, and long rows."""
    dtypes = (torch.float32, torch.bfloat16)
    found = [ActivationCase(op, shape, dtype) for shape in ((SIZE, LONG) if full else (SIZE,)) for dtype in dtypes]
    return found + [ActivationCase(op, SIZE, dtype, bias=False) for dtype in dtypes if full]


def small(case: ActivationCase, elements: int) -> ActivationCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    return cases.reshaped(case, fewer(case.shape, elements))


def overhead_case(op: str) -> ActivationCase:
    """One short row: the time is that of the call, not of the kernel."""
    return ActivationCase(op, (1, 256))


def peers(case: ActivationCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: cases.call_torch(case, inputs))
    return {"torch eager": lambda inputs: cases.call_torch(case, inputs), "torch.compile": compiled}


def forward_peers(case: ActivationCase, device: str) -> dict:
    """As `peers`, without a backward: none."""
    return {}
