"""Memory of attention: nothing of the size of the scores."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llmkernels
from llmkernels import functional
from llmkernels.ops.attention import reference
from tests.support import run_python


class Largest(TorchDispatchMode):
    """The size in elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.dtype.itemsize)
        return result


def test_the_torch_backend_holds_no_more_scores_than_a_chunk():
    q, k, v = (torch.randn(1, 4, 4096, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest, llmkernels.use_backend("torch"):
        out = functional.scaled_dot_product_attention(q, k, v, causal="bottom_right")
        out.sum().backward()
    assert reference.CHUNK_ELEMENTS // 2 < largest.elements <= reference.CHUNK_ELEMENTS < 4 * 4096**2
    assert torch.isfinite(q.grad).all()


def test_kernels_of_the_cpu_need_no_memory_for_scores():
    """At S = 8192 the scores of a head are 256 MB in fp32."""
    if llmkernels.backends()["cpu"]:
        pytest.skip(f"cpu: {llmkernels.backends()['cpu']}")
    code = """
        import resource, torch
        from llmkernels import functional
        make = lambda length: [torch.randn(1, 2, length, 32, requires_grad=True) for _ in range(3)]
        def attend(length):
            q, k, v = make(length)
            options = {"causal": "bottom_right", "window": (3000, 0), "backend": "cpu"}
            out = functional.scaled_dot_product_attention(q, k, v, **options)
            out.backward(torch.ones_like(out))
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        attend(256)
        before = peak()
        attend(8192)
        print(peak() - before)
    """
    assert int(run_python(code)) < 100
