"""Adapters of low rank over a quantized base: they train as over the same weights written out."""

import copy

import pytest
import torch
from torch import nn

import llmkernels
from llmkernels.demo.model import LanguageModel
from llmkernels.nn import QuantizedLinear

STEPS = 25


class LoRA(nn.Module):
    """base(x) + (x A^T) B^T / rank (Hu et al. 2021, arXiv:2106.09685); B begins as zero."""

    def __init__(self, base: nn.Module, rank: int, generator: torch.Generator):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features, generator=generator) * base.in_features**-0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + (x @ self.a.t()) @ self.b.t()


def written_out(model):
    """The same model with torch.nn.Linear that have the quantized weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is QuantizedLinear:
                linear = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                state = {"weight": child.dequantize()} | ({} if child.bias is None else {"bias": child.bias.detach()})
                linear.load_state_dict(state)
                setattr(module, name, linear)
    return model


def with_adapters(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "out", "up", "down"):
            setattr(block, name, LoRA(getattr(block, name), 4, generator))
    return model


def train(model, checkpointed):
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert len(adapters) == 16
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    pattern = torch.randint(0, 256, (33,), generator=generator)
    losses = []
    for _ in range(STEPS):
        shifts = torch.randint(0, 33, (4, 1), generator=generator)
        rows = pattern[(torch.arange(33) + shifts) % 33]
        call = lambda tokens: model(tokens)
        if checkpointed:
            call = lambda tokens: torch.utils.checkpoint.checkpoint(model, tokens, use_reentrant=False)
        loss = nn.functional.cross_entropy(call(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scheme, options, checkpointed", [
    ("int4", {}, False), ("int4", {"symmetric": False}, True), ("nf4", {}, False), ("nf4", {"double": True}, True),
])  # fmt: skip
def test_the_loss_falls_as_over_the_weights_written_out(scheme, options, checkpointed):
    torch.manual_seed(0)
    model = LanguageModel(64, 2, 4, 32)
    nn.init.normal_(model.head.weight, std=0.2)
    llmkernels.quantize(model, scheme, skip=("head",), **options)
    plain = with_adapters(written_out(copy.deepcopy(model)))
    ours = with_adapters(model)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    expected, losses = train(plain, checkpointed), train(ours, checkpointed)
    assert losses[-1] < 0.6 * losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=2e-3, atol=0)
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())
    # The base matters: over other weights the losses are others.
    torch.manual_seed(0)
    other = LanguageModel(64, 2, 4, 32)
    nn.init.normal_(other.head.weight, std=0.2)
    difference = torch.tensor(train(with_adapters(other), False)) - torch.tensor(expected)
    assert (difference / torch.tensor(expected)).abs().max() > 4e-3
