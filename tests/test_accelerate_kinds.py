"""Kinds of module that accelerate finds by what they compute: each form that it takes, and wrong ones it must not."""

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import nn

import llmkernels
from llmkernels import _native
from llmkernels.accelerate.kinds import gated, losses, softmax
from llmkernels.accelerate.kinds.activations import activation_of

BACKENDS = ("torch", *(["cpu"] if _native.why_absent("cpu") is None else []))


def accelerate(model, backend="torch", **options):
    return llmkernels.accelerate(model, backend=backend, **options)


def agrees(module, x, backend, *, gradients=True):
    """Swap `module` and compare output and gradients with what they were. Returns what it was swapped for."""

    def run():
        y = module(x)
        grads = torch.autograd.grad(y.sin().sum(), list(module.parameters())) if gradients else ()
        return [y.detach(), *grads]

    expected, kind = run(), type(module)
    report = accelerate(module, backend)
    assert type(module) is not kind, str(report)
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    assert llmkernels.restore(module) and type(module) is kind
    assert all(map(torch.equal, run(), expected))
    return report.swapped[0].replacement


# --- gated MLPs -------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """LLaMA's; the others differ from it in one thing each."""

    def __init__(self, act=nn.SiLU, width=16, inner=24, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias), nn.Linear(width, inner, bias)
        self.down_proj, self.act_fn = nn.Linear(inner, width, bias), act()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class UpIsTheGate(MLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Packed(nn.Module):
    def __init__(self, width=16, inner=24):
        super().__init__()
        self.act, self.down, self.both = nn.GELU(), nn.Linear(inner, width), nn.Linear(width, 2 * inner)

    def forward(self, x):
        gate, up = self.both(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


class PackedUpFirst(Packed):
    def forward(self, x):
        up, gate = self.both(x).chunk(2, -1)
        return self.down(up * self.act(gate))


class PackedBySize(Packed):
    """Knows the sizes of its layers."""

    def forward(self, x):
        gate, up = self.both(x).split(24, -1)
        return self.down(self.act(gate) * up)


class Written(nn.Module):
    """The activation stands in the forward, as in LLaMA's own code."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x):
        return self.w2(torch_functional.silu(self.w1(x)) * self.w3(x))


class FunctionAttribute(MLP):
    def __init__(self):
        super().__init__()
        del self.act_fn
        self.activation = torch_functional.relu

    def forward(self, x):
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class WithDropout(MLP):
    def __init__(self, p=0.5):
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class DropoutAfter(WithDropout):
    def forward(self, x):
        return self.dropout(super(WithDropout, self).forward(x))


GOOD = {
    "silu": (MLP, "swiglu (gate_proj, up_proj)"),
    "exact gelu": (lambda: MLP(nn.GELU), "geglu (gate_proj, up_proj)"),
    "tanh gelu": (lambda: MLP(lambda: nn.GELU("tanh")), "geglu tanh (gate_proj, up_proj)"),
    "relu": (lambda: MLP(nn.ReLU), "reglu (gate_proj, up_proj)"),
    "bias": (lambda: MLP(bias=True), "swiglu (gate_proj, up_proj)"),
    "square": (lambda: MLP(width=16, inner=16), "swiglu (gate_proj, up_proj)"),
    "up is the gate": (UpIsTheGate, "swiglu (up_proj, gate_proj)"),
    "packed": (Packed, "geglu (both, packed)"),
    "packed, up first": (PackedUpFirst, "geglu (both, up first)"),
    "packed by size": (PackedBySize, "geglu (both, packed)"),
    "written out": (Written, "swiglu (w1, w3)"),
    "a function": (FunctionAttribute, "reglu (gate_proj, up_proj)"),
    "dropout": (lambda: WithDropout().eval(), "swiglu (gate_proj, up_proj)"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOOD)
def test_gated_mlps(name, backend):
    torch.manual_seed(0)
    make, expected = GOOD[name]
    assert agrees(make(), torch.randn(2, 5, 16), backend) == expected


@pytest.mark.parametrize("kind", (WithDropout, DropoutAfter))
def test_dropout_stands_where_it_stood(kind):
    module, x = kind(), torch.randn(3, 16)

    def run():
        torch.manual_seed(3)
        return module(x)

    expected = run()
    assert accelerate(module).swapped
    torch.testing.assert_close(run(), expected)


class Sum(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class BothActivated(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))


class ActivatedAfter(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) * self.up_proj(x)))


class OnePercentOff(MLP):
    def forward(self, x):
        return 1.001 * super().forward(x)


class Residual(MLP):
    def forward(self, x):
        return x + super().forward(x)


class OtherActivation(MLP):
    """The module is one GELU, the forward the other."""

    def __init__(self):
        super().__init__(nn.GELU)

    def forward(self, x):
        y = torch_functional.gelu(self.gate_proj(x), approximate="tanh")
        return self.down_proj(y * self.up_proj(x))


class DropsInTraining(MLP):
    def __init__(self):
        super().__init__()
        self.eval()

    def forward(self, x):
        return torch_functional.dropout(super().forward(x), 0.2, self.training)


class Clipped(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=50.0) * self.up_proj(x))


@pytest.mark.parametrize(
    "kind", (Sum, BothActivated, ActivatedAfter, OnePercentOff, Residual, OtherActivation, Clipped, DropsInTraining)
)
def test_what_is_no_gated_mlp_is_refused(kind):
    module = kind()
    report = accelerate(module, exclude=(nn.GELU, nn.SiLU))
    assert type(module) is kind and "disagrees" in report.kept[0].detail, str(report)


@pytest.mark.parametrize(
    "change", ({"gate": "up_proj", "up": "gate_proj"}, {"activation": "gelu_tanh"}, {"activation": "gelu"})
)
def test_wrong_roles_are_refused(monkeypatch, change):
    """A mistake of ours in telling the roles: gate and up swapped, one GELU for the other, GELU for SiLU."""
    module = MLP(nn.GELU if change.get("activation") == "gelu_tanh" else nn.SiLU)
    usual = gated._orders
    monkeypatch.setattr(gated, "_orders", lambda unit: usual(unit)[:1])
    monkeypatch.setattr(gated, "replace", lambda unit, **given: gated._Gated(**vars(unit) | given | change))
    report = accelerate(module, exclude=(nn.GELU, nn.SiLU))
    assert type(module) is MLP and "disagrees in float64" in report.kept[0].detail, str(report)


def test_attention_layers_and_plain_mlps_are_no_gated_mlps():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1) @ self.v(x)

    assert not accelerate(Attention()).entries
    assert not accelerate(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))).entries
    report = accelerate(MLP(nn.Tanh))
    assert "its activation Tanh is none of" in report.kept[0].detail


def test_hooks_and_adapters_of_the_layers_are_run():
    module, x, calls = MLP(), torch.randn(2, 16), []
    expected = module(x)
    report = accelerate(module)
    assert [entry.module for entry in report.entries] == ["MLP"], "its activation is part of it"
    handle = module.gate_proj.register_forward_hook(lambda *_: calls.append("gate"))
    module.act_fn.register_forward_hook(lambda *_: calls.append("act"))
    torch.testing.assert_close(module(x), expected)
    assert calls == ["gate", "act"], "a watched activation is called as it was"
    handle.remove()
    adapter = nn.Linear(16, 24, bias=False)
    module.up_proj = nn.Sequential(adapter)  # as an adapter takes the place of a layer
    torch.testing.assert_close(module(x), MLP.forward(module, x))


# --- activations ------------------------------------------------------------------------------------------------------


class NewGELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1.0 + torch.tanh((2.0 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class GELUScaled(nn.Module):
    def forward(self, x):
        return torch_functional.gelu(x).clamp(max=10.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "make, expected",
    ((nn.GELU, "gelu"), (lambda: nn.GELU("tanh"), "gelu by tanh"), (nn.SiLU, "silu"), (NewGELU, "gelu by tanh")),
)
def test_activations(make, expected, backend):
    x = torch.randn(3, 16)
    assert agrees(make(), x, backend, gradients=False) == expected
    module = nn.Sequential(nn.Linear(16, 16), make())
    plain = torch.autograd.grad(module(x).sum(), module[0].weight)
    accelerate(module, backend)
    torch.testing.assert_close(torch.autograd.grad(module(x).sum(), module[0].weight), plain)


@pytest.mark.parametrize("kind", (QuickGELU, GELUScaled))
def test_other_activations_are_left_alone(kind):
    module = nn.Sequential(kind())
    report = accelerate(module)
    assert type(module[0]) is kind and len(report.kept) == 1


def test_what_an_activation_is():
    assert activation_of(lambda x: torch_functional.gelu(x)) == "gelu"
    assert activation_of(lambda x: torch_functional.gelu(x, approximate="tanh")) == "gelu_tanh"
    assert activation_of(torch.relu) == "relu" and activation_of(torch.tanh) is None
    assert activation_of(lambda x: x[0]) is None and activation_of(lambda: None) is None


# --- CrossEntropyLoss -------------------------------------------------------------------------------------------------

LOSSES = {
    "plain": {},
    "weighted": {"weight": torch.rand(7) + 0.5},
    "smoothed": {"label_smoothing": 0.1},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "another index ignored": {"ignore_index": 2},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_loss(name, backend):
    torch.manual_seed(0)
    module = nn.CrossEntropyLoss(**LOSSES[name])
    logits = torch.randn(6, 7, requires_grad=True)
    targets = [torch.tensor([0, 2, 6, module.ignore_index, 1, 2])]
    targets += [torch.rand(6, 7)] if module.ignore_index < 0 else []

    def run():
        values = [module(logits, target) for target in targets]
        return [*values, torch.autograd.grad(sum(value.sum() for value in values), logits)[0]]

    expected = run()
    assert accelerate(module, backend).swapped[0].replacement == "cross_entropy"
    torch.testing.assert_close(run(), expected)
    assert list(module.state_dict()) == list(nn.CrossEntropyLoss(**LOSSES[name]).state_dict())


@pytest.mark.parametrize("change", ("ignore_index", "label_smoothing", "reduction"))
def test_a_wrong_loss_is_refused(monkeypatch, change):
    value = {"ignore_index": 1, "label_smoothing": 0.01, "reduction": "sum"}[change]

    def wrong(module, input, target, *, backend=None):
        options = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"} | {change: value}
        return torch_functional.cross_entropy(input, target, **options)

    monkeypatch.setattr(losses, "_loss", wrong)
    report = accelerate(nn.CrossEntropyLoss())
    assert not report.swapped and "disagrees" in report.kept[0].detail


# --- softmax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", (nn.Softmax, nn.LogSoftmax))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_softmax_of_enough_elements(make, dtype, backend, monkeypatch):
    module, ours = make(-1), []
    usual = softmax._Softmax.ours
    monkeypatch.setattr(softmax._Softmax, "ours", lambda *args: ours.append(1) or usual(*args))
    report = llmkernels.accelerate(nn.ModuleList([module, nn.Linear(2, 2).to(dtype)]), backend=backend)
    name = "softmax" if make is nn.Softmax else "log_softmax"
    assert [entry.detail for entry in report.swapped] == [f"{name} on {backend}"], str(report)
    ours.clear()
    generator = torch.Generator().manual_seed(4)
    for shape, count in (((4, 8, 4096), 1), ((4096, 32), 1), ((2, 9), 0), ((5,), 0)):
        x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        dy = torch.randn(shape, generator=generator).to(dtype)
        found, expected = module(x), make(-1)(x)
        assert found.dtype == dtype and len(ours) == count
        ours.clear()
        grads = [torch.autograd.grad(y, x, dy)[0] for y in (found, expected)]
        tolerance = {"rtol": 2e-2, "atol": 4e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close((found, grads[0]), (expected, grads[1]), **tolerance)


def test_softmax_along_other_dimensions_is_torchs(monkeypatch):
    monkeypatch.setattr(softmax._Softmax, "ours", lambda *args: pytest.fail("it is no call for ours"))
    run = softmax._Softmax(False)
    x = torch.randn(2, 2**17)
    assert torch.equal(run(nn.Softmax(0), x), x.softmax(0))
    assert torch.equal(run(nn.Softmax(1), x[:, :9]), x[:, :9].softmax(1))
    assert torch.equal(run(nn.Softmax(-1), x.half()[:, :4]), x.half()[:, :4].softmax(-1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(nn.Softmax(-1), x), x.softmax(-1))


def test_a_wrong_softmax_is_refused(monkeypatch):
    for wrong in (
        lambda self, x, backend: x.softmax(-2),
        lambda self, x, backend: (1.001 * x).softmax(-1),
        lambda self, x, backend: x.softmax(-1).detach() + 0.0 * x.nan_to_num(0.0, 0.0, 0.0),
    ):
        monkeypatch.setattr(softmax._Softmax, "ours", wrong)
        report = llmkernels.accelerate(nn.Sequential(nn.Softmax(-1)), backend="torch")
        assert "softmax disagrees" in report.kept[0].detail
    report = llmkernels.accelerate(nn.Sequential(nn.Softmax()), backend="torch")
    assert "its dim is None" in report.kept[0].detail
