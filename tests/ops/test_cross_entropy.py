"""What is particular to cross_entropy and linear_cross_entropy; test_battery.py has the rest."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as torch_functional

from llmkernels import functional
from llmkernels.ops.cross_entropy import cases, linear_op
from llmkernels.ops.cross_entropy.cases import CrossEntropyCase
from llmkernels.testing.battery import failures, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name

# Deliberately wrong formulas: the rule has to reject each of them. Name -> (options of the case, the formula).


def _log_p(leaves):
    return torch.log_softmax(leaves.input, -1)


def _picked(leaves):
    return -_log_p(leaves).gather(-1, leaves.index.clamp(min=0).unsqueeze(-1)).squeeze(-1)


def _without_z(leaves, **options):
    return torch_functional.cross_entropy(leaves.input, leaves.index, **options)


WRONG = {
    "ignored rows count in the mean": ({"ignored": True}, lambda x: (_picked(x) * (x.index != -100)).mean()),
    "ignored rows are not ignored": ({"ignored": True}, lambda x: _picked(x).mean()),
    "weighted mean divides by rows": ({"weight": True}, lambda x: (_picked(x) * x.weight[x.index]).mean()),
    "smoothing over the other classes only": (
        {"label_smoothing": 0.5},
        lambda x: 0.5 * _picked(x).mean() - 0.5 * (_log_p(x).sum(-1) + _picked(x)).mean() / 31),
    "smoothing forgets the weights": (
        {"label_smoothing": 0.5, "weight": True},
        lambda x: 0.5 * _without_z(x, weight=x.weight) - 0.5 * _log_p(x).mean(-1).mean()),
    "z-loss of the logits' mean": (
        {"z_loss": 1e-2}, lambda x: _without_z(x) + 1e-2 * x.input.mean(-1).square().mean()),
    "z-loss not squared": (
        {"z_loss": 1e-2}, lambda x: _without_z(x) + 1e-2 * torch.logsumexp(x.input, -1).abs().mean()),
    "z-loss of ignored rows": (
        {"z_loss": 1e-2, "ignored": True},
        lambda x: _without_z(x) + 1e-2 * torch.logsumexp(x.input, -1).square().mean()),
    "softcap as a clamp": ({"softcap": 2.0}, lambda x: torch_functional.cross_entropy(x.input.clamp(-2, 2), x.index)),
    "softcap of the loss": ({"softcap": 2.0}, lambda x: 2.0 * torch.tanh(_without_z(x) / 2.0)),
    "sum for mean": ({}, lambda x: _without_z(x, reduction="sum")),
    "no largest logit subtracted": (
        {"data": "offset"}, lambda x: (torch.log(x.input.exp().sum(-1)) + _picked(x) - _picked(x)).mean()),
    "probabilities unweighted": (
        {"target": "probabilities", "weight": True}, lambda x: -(x.probabilities * _log_p(x)).sum(-1).mean()),
    "one percent off": ({}, lambda x: 1.01 * _without_z(x)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_variants(dtype, wrong):
    options, variant = WRONG[wrong]
    case = CrossEntropyCase("cross_entropy", (12, 32), dtype, **options)
    inputs = cases.make_inputs(case)

    def wide(leaves):
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        given = {name: None if (t := getattr(leaves, name)) is None else t.to(acc) for name in
                 ("input", "weight", "probabilities")}  # fmt: skip
        return (variant(leaves.replace(**given)).to(dtype),)

    assert failures(judge_results(cases, case, inputs, outputs_and_gradients(inputs, wide))) != []


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_gradients(dtype):
    case = CrossEntropyCase("linear_cross_entropy", (24, 40), dtype, hidden=16, bias=True)
    inputs = cases.make_inputs(case)
    right = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, "torch"))
    assert failures(judge_results(cases, case, inputs, right)) == []
    logits = torch_functional.linear(inputs.input.float(), inputs.linear_weight.float(), inputs.linear_bias.float())
    p = torch.softmax(logits, -1) * inputs.dloss.float() / 24
    last = p[-6:].t() @ inputs.input[-6:].float()
    wrong = {
        "target forgotten": {"dinput": p @ inputs.linear_weight.float(), "dlinear_bias": p.sum(0)},
        "last rows forgotten": {"dlinear_weight": right["dlinear_weight"].float() - last},
        "not divided by the rows": {name: right[name].float() * 24 for name in ("dinput", "dlinear_weight")},
    }  # fmt: skip
    for name, results in wrong.items():
        results = right | {key: value.to(dtype) for key, value in results.items()}
        assert failures(judge_results(cases, case, inputs, results)) != [], name


# The same meaning as torch.


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("shape", ((7,), (4, 7), (4, 7, 3), (2, 7, 3, 2)), ids=str)
def test_every_option_means_what_torchs_does(shape, reduction, backend, device):
    if backend == "triton" and device == "cpu" and len(shape) != 2:
        pytest.skip("triton: its interpreter is slow, and kernels see rows, whatever the shape")
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(shape, generator=generator).to(device)
    batch = (*shape[:1], *shape[2:]) if len(shape) > 1 else ()
    index = torch.randint(7, batch, generator=generator).to(device)
    some = index.clone()
    some.view(-1)[0] = 3
    soft = torch.softmax(torch.randn(shape, generator=generator), min(1, len(shape) - 1)).to(device)
    weight = torch.rand(7, generator=generator).to(device)
    for target, given, smoothing, ignored in itertools.product(
        (some, soft), (None, weight), (0.0, 0.3, 1.0), (3, -100)
    ):
        if target is soft and ignored >= 0:
            continue
        arguments = (target, given, ignored, reduction, smoothing)
        leaves = [input.clone().requires_grad_() for _ in range(2)]
        ours = functional.cross_entropy(leaves[0], *arguments, backend=backend)
        theirs = torch_functional.cross_entropy(leaves[1], target, given, None, ignored, None, reduction, smoothing)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        grads = [
            torch.autograd.grad(1.7 * loss.sum(), leaf)[0] for loss, leaf in zip((ours, theirs), leaves, strict=True)
        ]
        if not math.isnan(theirs.sum()):
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", (False, True))
def test_nothing_to_average_is_what_torch_has(layer, backend, device):
    hidden, classes = 6, 9
    weight = torch.randn(classes, hidden, device=device)
    for rows, target in ((4, torch.full((4,), -100)), (0, torch.empty(0, dtype=torch.int64)), (4, torch.full((4,), 5))):
        target = target.to(device)
        for reduction, class_weight in itertools.product(("mean", "sum", "none"), (None, torch.zeros(classes))):
            class_weight = None if class_weight is None else class_weight.to(device)
            options = {"weight": class_weight, "reduction": reduction}
            if layer:
                input = torch.randn(rows, hidden, device=device, requires_grad=True)
                ours = functional.linear_cross_entropy(input, weight, target, **options, backend=backend)
                theirs = torch_functional.cross_entropy(input @ weight.t(), target, **options)
            else:
                input = torch.randn(rows, classes, device=device, requires_grad=True)
                ours = functional.cross_entropy(input, target, **options, backend=backend)
                theirs = torch_functional.cross_entropy(input, target, **options)
            torch.testing.assert_close(ours, theirs, equal_nan=True)
            (grad,) = torch.autograd.grad(ours.sum(), input)
            if class_weight is None or reduction != "mean":
                torch.testing.assert_close(grad, torch.autograd.grad(theirs.sum(), input)[0], equal_nan=True)


@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_special_values_propagate_as_in_torch(value, smoothing, backend, device):
    input = torch.randn(6, 40, device=device)
    input[1, 7] = input[2, 39] = value
    input[3] = value
    input[4, :33] = value  # a whole block of nothing, for short blocks
    index = torch.tensor([0, 7, 8, 3, 35, 1], device=device)
    leaves = [input.clone().requires_grad_() for _ in range(2)]
    ours = functional.cross_entropy(leaves[0], index, None, -100, "none", smoothing, backend=backend)
    theirs = torch_functional.cross_entropy(leaves[1], index, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    if smoothing and value == -math.inf:
        return  # an infinite loss: torch's gradients are NaN in part, ours those of the softmax
    grads = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*grads, equal_nan=True)


def test_masked_classes_that_fill_whole_blocks(backend, device):
    """The largest logit so far is -Inf for a while."""
    input = torch.full((2, 9000), -math.inf, device=device)
    input[0, 8500:] = torch.randn(500, device=device) - 300.0
    input[1, :500] = torch.randn(500, device=device) + 300.0
    index = torch.tensor([8600, 3], device=device)
    leaves = [input.clone().requires_grad_() for _ in range(2)]
    losses = (
        functional.cross_entropy(leaves[0], index, backend=backend),
        torch_functional.cross_entropy(leaves[1], index),
    )
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cap", (0.5, 30.0, 1e4))
def test_softcap_over_its_whole_range(cap, backend, device):
    """From where tanh is its argument to where it is one, on every path of the kernels."""
    input = torch.cat((torch.linspace(-6, 6, 2001), torch.logspace(-6, 1, 200), torch.tensor([0.0]))) * cap
    input = input.to(device).unsqueeze(0).requires_grad_()
    index = torch.tensor([1100], device=device)
    wide = input.detach().double().requires_grad_()
    ours = functional.cross_entropy(input, index, softcap=cap, backend=backend)
    theirs = torch_functional.cross_entropy(cap * torch.tanh(wide / cap), index)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    ours, theirs = torch.autograd.grad(ours, input)[0].double(), torch.autograd.grad(theirs, wide)[0]
    # tanh(x) has an ulp of its own, which is an error of cap * 2^-24 in the logit, and of as much in exp(logit).
    assert ((ours - theirs).abs() <= 1e-9 + theirs.abs() * (1e-5 + cap * 2.4e-7)).all()


def test_inputs_are_never_written(backend, device):
    input, index = torch.randn(5, 70, device=device, requires_grad=True), torch.randint(70, (5,), device=device)
    before = input.detach().clone()
    loss = functional.cross_entropy(input, index, backend=backend)
    for _ in range(2):
        first = torch.autograd.grad(loss, input, torch.tensor(3.0, device=device), retain_graph=True)[0]
        assert torch.equal(input.detach(), before)
        torch.testing.assert_close(first, 3.0 * torch.autograd.grad(loss, input, retain_graph=True)[0])


def test_fp16_gradients_survive_a_loss_scale(backend, device):
    """p / rows is below what fp16 holds; times the scale it is not, and it is scaled before it is rounded."""
    input = torch.randn(64, 3000, device=device).half().requires_grad_()
    index, scale = torch.randint(3000, (64,), device=device), 65504.0
    arriving = torch.tensor(scale, device=device).half()
    (grad,) = torch.autograd.grad(functional.cross_entropy(input, index, backend=backend), input, arriving)
    wide = input.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(torch_functional.cross_entropy(wide, index) * scale, wide)
    torch.testing.assert_close(grad.double(), expected, rtol=2e-3, atol=1e-5)


def test_an_index_that_is_no_class_is_named():
    input, layer = torch.randn(2, 5, 3), torch.randn(5, 5)
    for wrong in (5, -1, 10**12):
        index = torch.tensor([[0, 1, -100], [2, wrong, 9]])
        with pytest.raises(
            IndexError, match=rf"cross_entropy: target is {wrong} at position \(1, 1\), expected 0 to 4, or"
        ):
            functional.cross_entropy(input, index)
        with pytest.raises(IndexError, match=rf"linear_cross_entropy: target is {wrong} at position \(1, 1\)"):
            functional.linear_cross_entropy(input.transpose(1, 2), layer, index)
    assert functional.cross_entropy(input, torch.full((2, 3), 7), ignore_index=7).isnan()


def test_kernels_are_safe_with_an_index_that_is_no_class(backend, device):
    """What a GPU does, where nobody looks at the indices beforehand: NaN in that row, and no access out of bounds."""
    from llmkernels import registry

    entry = registry.entry("cross_entropy", backend)
    input, weight = torch.randn(5, 40, device=device), torch.rand(40, device=device)
    index = torch.tensor([3, 40, -1, -100, 2**40], device=device)
    for smoothing, given in itertools.product((0.0, 0.1), (None, weight)):
        settings = (-100, smoothing, 0.01, 2.0)
        loss, stats, fused = entry.fwd(input, index, given, torch.ones(5, device=device), *settings)
        dinput = entry.bwd(torch.ones(5, device=device), input, index, given, stats, *settings)
        for result in (loss.unsqueeze(1), dinput, fused):
            assert result.isnan().all(1).tolist() == [False, True, True, False, True]
            assert not result[0].isnan().any() and (result[3] == 0).all()


def test_gradient_in_the_forwards_pass_is_that_of_the_backward(backend, device, poison):
    from llmkernels import registry

    entry = registry.entry("cross_entropy", backend)
    for dtype, kind in itertools.product((torch.float32, torch.bfloat16), ("index", "probabilities")):
        case = CrossEntropyCase("cross_entropy", (5, 72), dtype, target=kind, label_smoothing=0.1, softcap=3.0)
        inputs, dloss = cases.make_inputs(case, device), torch.rand(1, device=device).expand(5)
        _, stats, dinput = entry.fwd(inputs.input, inputs.target, None, dloss, *case.settings)
        again = entry.bwd(dloss, inputs.input, inputs.target, None, stats, *case.settings)
        torch.testing.assert_close(dinput, again, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


# Chunks of linear_cross_entropy.


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(linear_op, "CHUNK_ELEMENTS", 1 << 9)
    monkeypatch.setattr(linear_op, "CHUNK_ROWS", 4)


CHUNKED = (
    {},
    {"reduction": "none"},
    {"reduction": "sum", "weight": True, "ignored": True},
    {"target": "wide", "softcap": 4.0},
    {"label_smoothing": 0.1, "bias": True},
)


@pytest.mark.parametrize("options", CHUNKED, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)
def test_many_chunks_match_fp64_truth(dtype, options, backend, device, small_chunks, poison):
    case = CrossEntropyCase("linear_cross_entropy", (70, 60), dtype, hidden=24, **options)
    assert linear_op.chunk_rows(60) == 8
    inputs = cases.make_inputs(case, device)
    results = outputs_and_gradients(inputs, lambda leaves: cases.call(case, leaves, backend))
    assert failures(judge_results(cases, case, inputs, results)) == []


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any tensor made here has, and shapes of those that look like all the logits."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_all_the_logits_never_exist(reduction, small_chunks):
    rows, classes, hidden = 256, 64, 8
    input = torch.randn(rows, hidden, requires_grad=True)
    weight = torch.randn(classes, hidden, requires_grad=True)
    index = torch.randint(classes, (rows,))
    with _Largest() as seen:
        functional.linear_cross_entropy(input, weight, index, reduction=reduction).sum().backward()
    assert linear_op.chunk_rows(classes) * classes <= seen.elements < rows * classes // 4
    with _Largest() as seen:
        torch_functional.cross_entropy(torch_functional.linear(input, weight), index).backward()
    assert seen.elements >= rows * classes


def test_only_wanted_products_are_computed():
    """A frozen head costs two products of three; without gradients there is one."""

    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
            return function(*args, **(kwargs or {}))

    input, weight, index = torch.randn(64, 16), torch.randn(40, 16), torch.randint(40, (64,))
    for wanted, products in (((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((input, weight))]
        with Products() as counter:
            loss = functional.linear_cross_entropy(*leaves, index)
            if wanted:
                loss.backward()
        assert counter.count == products
        assert [leaf.grad is not None for leaf in leaves] == [i in wanted for i in range(2)]
