"""What is worth timing in the gated family, and the peers to beat."""

import torch

from llmkernels.ops.gated import cases
from llmkernels.ops.gated.cases import GatedCase
from llmkernels.testing.inputs import fewer

SIZE, LONG = (4096, 1024), (2048, 14336)  # the goals' size; LLaMA's MLP


def bench_cases(op: str, full: bool) -> list[GatedCase]:
    """Cases of `op`: the goals' size, and with `full` long rows and packed ones."""
    dtypes = (torch.float32, torch.bfloat16)
    found = [GatedCase(op, shape, dtype) for shape in ((SIZE, LONG) if full else (SIZE,)) for dtype in dtypes]
    return found + [GatedCase(op, SIZE, dtype, packed=True) for dtype in dtypes if full]


def small(case: GatedCase, elements: int) -> GatedCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    return cases.reshaped(case, fewer(case.shape, elements))


def overhead_case(op: str) -> GatedCase:
    """One short row: the time is that of the call, not of the kernel."""
    return GatedCase(op, (1, 256))


def peers(case: GatedCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs: cases.call_torch(case, inputs))
    return {"torch eager": lambda inputs: cases.call_torch(case, inputs), "torch.compile": compiled}


def forward_peers(case: GatedCase, device: str) -> dict:
    """As `peers`, without a backward: none."""
    return {}
