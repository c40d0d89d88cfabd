"""accelerate on torch.nn.GRU and GRUCell: what is swapped agrees, what is wrong is refused, and why one stays."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import rnn

import llmkernels
from llmkernels import registry
from llmkernels.accelerate import Candidate
from llmkernels.accelerate.candidate import fan_in, user_rules
from llmkernels.accelerate.kinds import gru as kind
from llmkernels.testing.inputs import short_name
from tests.recurrent_candidates import assert_verified, lengths_ignored, without_dropout

LENGTHS = torch.tensor([4, 7, 2])
X = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(1))
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not registry.has("gru", name), reason=f"gru has no {name} kernel"))
    for name in ("torch", "cpu")
]
GRID = (
    {}, {"num_layers": 2}, {"bias": False}, {"batch_first": True}, {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False, "dropout": 0.3},
)  # fmt: skip


def calls(gru, x):
    """Every kind of call, the results in a flat list."""
    states = gru.num_layers * (2 if gru.bidirectional else 1)
    h = torch.randn(states, 3, 12, generator=torch.Generator().manual_seed(3)).to(x)
    packed = rnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    whole = x.transpose(0, 1) if gru.batch_first else x
    torch.manual_seed(7)
    found = [gru(whole), gru(whole, h), gru(x[:, 0]), gru(x[:, 0], h[:, 0]), gru(packed), gru(packed, h)]
    outputs = [output.data if isinstance(output, rnn.PackedSequence) else output for output, _ in found]
    return [*outputs, *(state for _, state in found)]


def with_gradients(module, run):
    outputs = run()
    grads = torch.autograd.grad(sum(out.float().cos().sum() for out in outputs), list(module.parameters()))
    return [*(out.detach() for out in outputs), *grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", GRID, ids=str)
def test_every_option_is_swapped_and_agrees(options, backend):
    torch.manual_seed(0)
    gru = nn.GRU(8, 12, **options)
    expected, keys = with_gradients(gru, lambda: calls(gru, X)), list(gru.state_dict())
    report = llmkernels.accelerate(gru, backend=backend)
    assert [entry.detail for entry in report.swapped] == [f"gru on {backend}"], str(report)
    torch.testing.assert_close(with_gradients(gru, lambda: calls(gru, X)), expected, rtol=1e-4, atol=1e-5)
    assert list(gru.state_dict()) == keys and isinstance(gru, nn.GRU)
    assert llmkernels.restore(gru) == 1 and type(gru) is nn.GRU


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=short_name)
def test_every_dtype_is_swapped(dtype, backend):
    gru = nn.GRU(8, 12, 2).to(dtype)
    expected = calls(gru, X.to(dtype))
    report = llmkernels.accelerate(gru, backend=backend)
    assert report.swapped, str(report)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(calls(gru, X.to(dtype)), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", (True, False))
def test_cells(bias, backend):
    cell, h = nn.GRUCell(8, 12, bias), torch.randn(3, 12)
    run = lambda: [cell(X[0]), cell(X[0], h), cell(X[0, 0]), cell(X[0, 0], h[0])]
    expected = with_gradients(cell, run)
    report = llmkernels.accelerate(cell, backend=backend)
    assert [entry.detail for entry in report.swapped] == [f"gru_cell on {backend}"], str(report)
    torch.testing.assert_close(with_gradients(cell, run), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", (lambda: nn.GRU(8, 12), lambda: nn.GRUCell(8, 12)))
def test_without_a_kernel_it_stays(make, monkeypatch):
    """Ours in plain PyTorch is no faster than torch's own."""
    usual = registry.entries
    only_torch = lambda op: tuple(entry for entry in usual(op) if entry.name == "torch")
    monkeypatch.setattr(registry, "_candidates", lambda op, forced: only_torch(op))
    module = make()
    (entry,) = llmkernels.accelerate(module).kept
    assert "nothing faster than plain PyTorch runs it here" in entry.detail and type(module) in (nn.GRU, nn.GRUCell)


def test_copies_and_pickles():
    gru = nn.GRU(8, 12, 2)
    llmkernels.accelerate(gru, backend="torch")
    for other in (copy.deepcopy(gru), pickle.loads(pickle.dumps(gru))):
        assert torch.equal(other(X)[0], gru(X)[0]) and llmkernels.restore(other) == 1 and type(other) is nn.GRU


# --- what must be refused: each is offered by a rule, as a mistake of ours would be ---------------------------------


class Mine(nn.GRU):
    """A type of its own, so that a rule can be made for it."""


class MyCell(nn.GRUCell):
    pass


class _Plain(nn.Module):
    def __init__(self, module, run):
        super().__init__()
        self.m, self.run = module, run

    def forward(self, *args):
        return self.run(self.m, *args, backend="torch")


def _with_parameters(change, run=kind.gru):
    def altered(module, *args, backend=None):
        other = {f"m.{name}": change(name, parameter) for name, parameter in module.named_parameters()}
        return torch.func.functional_call(_Plain(module, run), other, args)

    return altered


def _gates(order, run=kind.gru):
    return _with_parameters(lambda name, p: p.unflatten(0, (3, -1))[list(order)].flatten(0, 1), run)


def _state_forgotten(module, input, hx=None, *, backend=None):
    return kind.gru(module, input, None, backend="torch")


def _layers_of_states_swapped(module, input, hx=None, *, backend=None):
    output, h = kind.gru(module, input, hx, backend="torch")
    return output, h.flip(0)


WRONG = {
    "r and z swapped": _gates((1, 0, 2)),
    "z and n swapped": _gates((0, 2, 1)),
    "state forgotten": _state_forgotten,
    "layers of states swapped": _layers_of_states_swapped,
    "packed lengths ignored": lengths_ignored(kind.gru),
    "no dropout": without_dropout(kind.gru),
    "biases added before the reset gate": _with_parameters(
        lambda name, p: torch.cat((p[:24], 0.0 * p[24:])) if name == "bias_hh_l0" else p
    ),
    "one percent off": _with_parameters(lambda name, p: 1.01 * p if name == "weight_hh_l0" else p),
}
WRONG_CELLS = {
    "r and z swapped": _gates((1, 0, 2), kind.gru_cell),
    "state forgotten": lambda module, input, hx=None, *, backend=None: kind.gru_cell(module, input),
}


@pytest.mark.parametrize("wrong", (None, *WRONG))
def test_a_wrong_gru_is_refused(wrong):
    options = (kind.probe_gru, fan_in, kind.gru_example)
    assert_verified(Mine, "gru", WRONG.get(wrong, kind.gru), options, wrong)


@pytest.mark.parametrize("wrong", (None, *WRONG_CELLS))
def test_a_wrong_cell_is_refused(wrong):
    run, options = WRONG_CELLS.get(wrong, kind.gru_cell), (kind.probe_cell, fan_in, kind.cell_example)
    user_rules[MyCell] = lambda module: [Candidate("gru_cell", "candidate", (8,), run, *options)]
    try:
        report = llmkernels.accelerate(MyCell(8, 12), backend="torch")
    finally:
        del user_rules[MyCell]
    assert bool(report.swapped) == (wrong is None), str(report)


class Reversed(nn.GRU):
    def forward(self, input, hx=None):
        return super().forward(input.flip(0), hx)


def test_a_forward_of_its_own_is_left_alone():
    report = llmkernels.accelerate(nn.Sequential(Reversed(8, 12), llmkernels.nn.GRUCell(8, 12)), backend="torch")
    assert [(e.module, e.detail) for e in report.entries] == [("Reversed", "its forward is not torch's")]
