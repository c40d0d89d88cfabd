"""accelerate on torch.nn.LSTM and LSTMCell: what is swapped and agrees, what is refused, what stays torch's."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, rnn

import llmkernels
from llmkernels import _native
from llmkernels.accelerate.candidate import Candidate, fan_in, user_rules
from llmkernels.accelerate.kinds import recurrent
from llmkernels.testing.inputs import short_name
from tests.recurrent_candidates import assert_verified, lengths_ignored, without_dropout

warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")

BACKENDS = ("torch", *(["cpu"] if _native.why_absent("cpu") is None else []))
X, LENGTHS = torch.randn(6, 3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 6, 4])
GRID = list(itertools.product((1, 2), (True, False), (False, True), (False, True), (0, 5)))
NAMES = ("num_layers", "bias", "batch_first", "bidirectional", "proj_size")


def tolerance(dtype):
    return {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-5}


def calls(lstm, x):
    """Every kind of call, the results in a flat list."""
    states = lstm.num_layers * (2 if lstm.bidirectional else 1)
    generator = torch.Generator().manual_seed(3)
    h, c = (torch.randn(states, 3, n, generator=generator).to(x) for n in (lstm.proj_size or 12, 12))
    packed = rnn.pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    whole = x.transpose(0, 1) if lstm.batch_first else x
    found = [lstm(whole), lstm(whole, (h, c)), lstm(x[:, 0]), lstm(x[:, 0], (h[:, 0], c[:, 0])), lstm(packed),
             lstm(packed, (h, c))]  # fmt: skip
    outputs = [output.data if isinstance(output, rnn.PackedSequence) else output for output, _ in found]
    return [*outputs, *(state for _, ends in found for state in ends)]


def with_gradients(module, run):
    outputs = run()
    grads = torch.autograd.grad(sum(out.float().cos().sum() for out in outputs), list(module.parameters()))
    return [*(out.detach() for out in outputs), *grads]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", GRID, ids=lambda values: "-".join(map(str, values)))
def test_every_option_is_swapped_and_agrees(values, backend):
    torch.manual_seed(0)
    lstm = nn.LSTM(8, 12, **dict(zip(NAMES, values, strict=True)))
    expected, keys = with_gradients(lstm, lambda: calls(lstm, X)), list(lstm.state_dict())
    report = llmkernels.accelerate(lstm, backend=backend)
    assert [entry.detail for entry in report.swapped] == [f"lstm on {backend}"], str(report)
    torch.testing.assert_close(with_gradients(lstm, lambda: calls(lstm, X)), expected, **tolerance(torch.float32))
    assert list(lstm.state_dict()) == keys and isinstance(lstm, nn.LSTM)
    assert llmkernels.restore(lstm) == 1 and type(lstm) is nn.LSTM
    assert all(map(torch.equal, with_gradients(lstm, lambda: calls(lstm, X)), expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=short_name)
def test_every_dtype_is_swapped(dtype, backend):
    torch.manual_seed(0)
    model = nn.ModuleDict({"lstm": nn.LSTM(40, 130, 3, bidirectional=True), "cell": nn.LSTMCell(40, 130)}).to(dtype)
    x = torch.randn(5, 4, 40, dtype=dtype)
    run = lambda: [model["lstm"](x)[0], *model["cell"](x[0])]
    with torch.no_grad():
        expected = run()
        report = llmkernels.accelerate(model, backend=backend)
        assert len(report.swapped) == 2, str(report)
        torch.testing.assert_close(run(), expected, **tolerance(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", (True, False))
def test_cells(bias, backend):
    torch.manual_seed(0)
    cell = nn.LSTMCell(8, 12, bias)
    hx = torch.randn(3, 12), torch.randn(3, 12)
    run = lambda: [*cell(X[0]), *cell(X[0], hx), *cell(X[0, 0]), *cell(X[0, 0], tuple(s[0] for s in hx))]
    expected = with_gradients(cell, run)
    report = llmkernels.accelerate(cell, backend=backend)
    assert [entry.detail for entry in report.swapped] == [f"lstm_cell on {backend}"]
    torch.testing.assert_close(with_gradients(cell, run), expected)
    assert llmkernels.restore(cell) == 1 and type(cell) is nn.LSTMCell


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("batch_first", (False, True))
def test_dropout_in_training_is_torchs(batch_first, packed):
    lstm = nn.LSTM(8, 12, 3, dropout=0.4, bidirectional=True, batch_first=batch_first)
    x = rnn.pack_padded_sequence(X, LENGTHS, enforce_sorted=False) if packed else X.transpose(0, int(batch_first))

    def run():
        torch.manual_seed(7)
        return lstm(x)[0].data if packed else lstm(x)[0]

    expected = run()
    assert llmkernels.accelerate(lstm, backend="torch").swapped and lstm.training
    torch.testing.assert_close(run(), expected)
    torch.testing.assert_close(lstm.eval()(x)[1], llmkernels.restore(lstm) and lstm(x)[1])


# What must be refused: each is offered by a rule, as a mistake of ours would be.


class Mine(nn.LSTM):
    """A type of its own, so that a rule can be made for it."""


class MyCell(nn.LSTMCell):
    pass


def _with_parameters(change):
    def run(module, input, hx=None, *, backend=None):
        altered = {name: change(name, parameter) for name, parameter in module.named_parameters()}
        return torch.func.functional_call(_Plain(module), {f"m.{k}": v for k, v in altered.items()}, (input, hx))

    return run


class _Plain(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.m = module

    def forward(self, input, hx):
        return recurrent.lstm(self.m, input, hx, backend="torch")


def _gates(order):
    return _with_parameters(lambda name, p: p if "hr" in name else p.unflatten(0, (4, -1))[list(order)].flatten(0, 1))


def _states_swapped(module, input, hx=None, *, backend=None):
    output, (h, c) = recurrent.lstm(module, input, hx, backend="torch")
    return output, (c, h)


def _given_states_swapped(module, input, hx=None, *, backend=None):
    return recurrent.lstm(module, input, hx and hx[::-1], backend="torch")


def _states_forgotten(module, input, hx=None, *, backend=None):
    return recurrent.lstm(module, input, None, backend="torch")


def _not_reversed(module, input, hx=None, *, backend=None):
    """The second direction reads forward too: what it gives on an input that was reversed beforehand."""
    output, ends = recurrent.lstm(module, input, hx, backend="torch")
    if isinstance(input, rnn.PackedSequence):
        return output, ends
    time = 1 if module.batch_first and input.dim() == 3 else 0
    other, _ = recurrent.lstm(module, input.flip(time), hx, backend="torch")
    half = output.shape[-1] // 2
    return torch.cat((output[..., :half], other[..., half:].flip(time)), -1), ends


WRONG = {
    "i and f swapped": _gates((1, 0, 2, 3)),
    "g and o swapped": _gates((0, 1, 3, 2)),
    "h and c swapped": _states_swapped,
    "h0 and c0 swapped": _given_states_swapped,
    "states forgotten": _states_forgotten,
    "reverse not reversed": _not_reversed,
    "packed lengths ignored": lengths_ignored(recurrent.lstm),
    "no dropout": without_dropout(recurrent.lstm),
    "a bias forgotten": _with_parameters(lambda name, p: p * 0.0 if name == "bias_hh_l1" else p),
    "one percent off": _with_parameters(lambda name, p: 1.01 * p if name == "weight_hh_l0" else p),
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
def test_a_wrong_lstm_is_refused(wrong):
    options = (recurrent.probe_lstm, fan_in, recurrent.lstm_example)
    assert_verified(Mine, "lstm", WRONG.get(wrong, recurrent.lstm), options, wrong)


@pytest.mark.parametrize("wrong", (None, "swapped", "forgotten"))
def test_a_wrong_cell_is_refused(wrong):
    def run(module, input, hx=None, *, backend=None):
        h, c = recurrent.lstm_cell(module, input, None if wrong == "forgotten" else hx, backend="torch")
        return (c, h) if wrong == "swapped" else (h, c)

    options = (recurrent.probe_cell, fan_in, recurrent.cell_example)
    user_rules[MyCell] = lambda module: [Candidate("lstm_cell", "candidate", (8,), run, *options)]
    try:
        report = llmkernels.accelerate(MyCell(8, 12), backend="torch")
    finally:
        del user_rules[MyCell]
    assert bool(report.swapped) == (wrong is None), str(report)


class Reversed(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input.flip(0), hx)


def test_the_report_names_what_is_left_alone():
    report = llmkernels.accelerate(nn.Sequential(Reversed(8, 12), llmkernels.nn.LSTMCell(8, 12)), backend="torch")
    assert [(e.module, e.swapped, e.detail) for e in report.entries] == [
        ("Reversed", False, "its forward is not torch's")
    ]


# What users do to a module after it was accelerated.


@pytest.mark.parametrize("change", ("load", "replace", "in place", "flatten", "double", "prune", "parametrize"))
def test_changes_after_acceleration_are_seen(change):
    torch.manual_seed(0)
    lstm, other = nn.LSTM(8, 12, 2), nn.LSTM(8, 12, 2)
    llmkernels.accelerate(lstm, backend="torch")
    before, x = lstm(X)[0].detach(), X
    if change == "load":
        lstm.load_state_dict(other.state_dict())
    elif change == "replace":
        lstm.weight_hh_l1 = nn.Parameter(other.weight_hh_l1.detach().clone())
    elif change == "in place":
        with torch.no_grad():
            lstm.bias_ih_l0.add_(1.0)
    elif change == "flatten":
        lstm.flatten_parameters()
    elif change == "double":
        lstm.double()
        x = X.double()
    elif change == "prune":
        prune.l1_unstructured(lstm, "weight_hh_l0", 0.5)
    else:
        parametrize.register_parametrization(lstm, "weight_hh_l0", nn.ReLU())
    found = lstm(x)[0]
    if change not in ("flatten", "double"):
        assert not torch.allclose(found, before, atol=1e-3)
    if change != "parametrize":  # its class is another one since
        assert llmkernels.restore(lstm) == 1
        torch.testing.assert_close(found, lstm(x)[0])


def test_copies_and_pickles():
    lstm = nn.LSTM(8, 12, 2)
    llmkernels.accelerate(lstm, backend="torch")
    expected = lstm(X)[0]
    duplicate = copy.deepcopy(lstm)
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(2.0)
    assert torch.equal(duplicate(X)[0], expected)
    file = io.BytesIO()
    torch.save(duplicate, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(X)[0], expected) and llmkernels.restore(loaded) == 1
    torch.testing.assert_close(loaded(X)[0], expected)


def test_nothing_of_the_users_is_touched():
    model = nn.Sequential(nn.LSTM(8, 12, 2, dropout=0.5), nn.LSTMCell(8, 12))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert len(llmkernels.accelerate(model, backend="torch").swapped) == 2
    assert torch.equal(torch.get_rng_state(), state) and calls == [] and model.training
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert all(parameter.grad is None for parameter in model.parameters())
