"""What the tests of attention on every backend share: calls that may be refused, and arriving gradients."""

import pytest
import torch

import llmkernels
from llmkernels import functional
from llmkernels.ops.attention import cases
from llmkernels.testing.inputs import short_name

SDPA, VARLEN = cases.OPS
every_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=short_name)


def normal_on(device: str):
    """normal(*shape): numbers on the device, the same in every run."""
    generator = torch.Generator().manual_seed(7)
    return lambda *shape, dtype=torch.float32: torch.randn(shape, generator=generator).to(dtype).to(device)


def run(function, *arguments, **options):
    """A backend may refuse a call with a sentence; what it must not refuse, tests/coverage.toml lists."""
    try:
        return function(*arguments, **options)
    except llmkernels.NoBackendError as error:
        pytest.skip(str(error).split(": ", 1)[-1])


def sdpa(backend, q, k, v, mask=None, **options):
    """(out, lse)."""
    return run(
        functional.scaled_dot_product_attention,
        q,
        k,
        v,
        mask,
        enable_gqa=True,
        return_lse=True,
        backend=backend,
        **options,
    )


def grads(outputs, *tensors, seed=3):
    """Gradients for arriving gradients that are the same for every call."""
    generator = torch.Generator().manual_seed(seed)
    arriving = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
    return torch.autograd.grad(outputs, tensors, arriving)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def varlen(backend, q, k, v, lengths_q, lengths_k, **options):
    ends = [torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(q.device) for lengths in (lengths_q, lengths_k)]
    longest = max(lengths_q), max(lengths_k)
    return run(functional.attention_varlen, q, k, v, *ends, *longest, return_lse=True, backend=backend, **options)
