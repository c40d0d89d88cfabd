"""What is worth timing in softmax and log_softmax, and the peers to beat."""

from dataclasses import replace

import torch

from llmkernels.ops.softmax.cases import SoftmaxCase
from llmkernels.testing.inputs import fewer

SIZE, VOCABULARY, SCORES = (4096, 1024), (256, 32_000), (2, 8, 512, 512)


def bench_cases(op: str, full: bool) -> list[SoftmaxCase]:
    """Cases of `op`: rows of a usual length, masked scores of attention, and with `full` rows of a vocabulary.

    Each masked row keeps something: torch's function gives NaN where nothing is left.
    """
    dtypes = (torch.float32, torch.bfloat16)
    found = [SoftmaxCase(op, SIZE, dtype) for dtype in dtypes]
    found += [SoftmaxCase(op, SCORES, dtype, 0.125, "bool", (2, 1, 512, 512), dead_row=False) for dtype in dtypes]
    return found + [SoftmaxCase(op, VOCABULARY, dtype) for dtype in dtypes if full]


def small(case: SoftmaxCase, elements: int) -> SoftmaxCase:
    """A case of `bench_cases` with about so many elements in each tensor, for what is counted and not timed."""
    shape = fewer(case.shape, elements, -2)
    mask_shape = None if case.mask_shape is None else (*case.mask_shape[:-2], *shape[-2:])
    return replace(case, shape=shape, mask_shape=mask_shape)


def overhead_case(op: str) -> SoftmaxCase:
    """One short row: the time is that of the call, not of the kernel."""
    return SoftmaxCase(op, (1, 256))


def peers(case: SoftmaxCase) -> dict:
    """Name -> function of the inputs; each must return what `cases.call` returns."""
    torch._dynamo.reset()
    function = getattr(torch, case.op)

    def usual(inputs):
        s = inputs.x if case.scale == 1.0 else inputs.x * case.scale
        if inputs.keep is not None:
            s = s.masked_fill(~inputs.keep, float("-inf"))
        return (function(s if inputs.mask is None else s + inputs.mask, -1),)

    return {"torch eager": usual, "torch.compile": torch.compile(usual)}


def forward_peers(case: SoftmaxCase, device: str) -> dict:
    """As `peers`, without a backward: none."""
    return {}
