"""linear_cross_entropy of a quantized head."""

import dataclasses

import pytest
import torch

from llmkernels import functional
from llmkernels.ops.cross_entropy import linear_op
from llmkernels.quantization.tensor import quantize_tensor


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(linear_op, "CHUNK_ELEMENTS", 1 << 9)
    monkeypatch.setattr(linear_op, "CHUNK_ROWS", 4)


@pytest.mark.parametrize("scheme", ("int8", "int4", "nf4", "fp8", "w8a8"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_quantized_head(scheme, dtype, small_chunks):
    """The loss and the gradients of both functions one after the other."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = quantize_tensor(normal(40, 64).float(), scheme)
    leaves = [tensor.requires_grad_() for tensor in (normal(5, 30, 64), normal(40))]
    index = torch.randint(40, (5, 30), generator=generator)
    index[0, :3] = -100
    soft = torch.softmax(normal(5, 30, 40).float(), -1).to(dtype).requires_grad_()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for target, reduction in ((index, "mean"), (index, "none"), (soft, "sum")):
        loss = functional.linear_cross_entropy(leaves[0], weight, target, linear_bias=leaves[1], reduction=reduction)
        logits = functional.quantized_linear(leaves[0], weight, leaves[1])
        apart = functional.cross_entropy(logits.movedim(-1, 1), target if target is index else target.movedim(-1, 1),
                                         reduction=reduction)  # fmt: skip
        wanted = [*leaves, target] if target is soft else leaves
        found = (loss, *torch.autograd.grad(loss.sum(), wanted))
        expected = (apart, *torch.autograd.grad(apart.sum(), wanted))
        for got, want in zip(found, expected, strict=True):
            assert got.dtype == dtype and got.shape == want.shape
            assert (got - want).norm() <= tolerance * want.norm()
    with torch.no_grad():
        plain = functional.linear_cross_entropy(leaves[0], weight, index, linear_bias=leaves[1])
        assert torch.equal(
            plain, functional.linear_cross_entropy(leaves[0].clone(), weight, index, linear_bias=leaves[1])
        )


def test_a_quantized_head_in_graphs_and_second_derivatives():
    weight = quantize_tensor(torch.randn(20, 16), "int8")
    ordered = dataclasses.replace(weight, order=torch.randperm(16))
    input, index = torch.randn(9, 16, dtype=torch.float64, requires_grad=True), torch.randint(20, (9,))
    for some in (weight, ordered):
        function = lambda x, some=some: functional.linear_cross_entropy(x, some, index)
        assert torch.autograd.gradcheck(function, input) and torch.autograd.gradgradcheck(function, input)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        gradients = [torch.autograd.grad(f(input), input)[0] for f in (function, compiled)]
        torch.testing.assert_close(*gradients)
        rows = torch.func.vmap(lambda x, y, some=some: functional.linear_cross_entropy(x, some, y))
        torch.testing.assert_close(rows(input.detach(), index).mean(), function(input).detach())


def test_bad_input_of_a_quantized_head():
    weight, index = quantize_tensor(torch.randn(20, 16), "int8"), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"linear_weight has shape \(20, 16\), expected \(20, 8\), \[C, H\]"):
        functional.linear_cross_entropy(torch.randn(3, 8), weight, index)
    with pytest.raises(ValueError, match=r"linear_bias has shape \(4,\), expected \(20,\)"):
        functional.linear_cross_entropy(torch.randn(3, 16), weight, index, linear_bias=torch.randn(4))
    with pytest.raises(IndexError, match="target is 20 at position"):
        functional.linear_cross_entropy(torch.randn(3, 16), weight, index + 20)
