"""Cross entropy as part of torch: ops, transforms, export, autocast, errors, modules, memory."""

import pytest
import torch
import torch.nn.functional as torch_functional

import llmkernels
from llmkernels import functional, nn
from llmkernels.ops.cross_entropy import cases
from llmkernels.ops.cross_entropy.cases import CrossEntropyCase
from llmkernels.testing.battery import evaluate
from llmkernels.testing.inputs import short_name
from tests.support import assert_same_with_any_threads, check_exported

cpu = pytest.mark.skipif(llmkernels.backends()["cpu"] is not None, reason=f"cpu: {llmkernels.backends()['cpu']}")

OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}


@pytest.fixture
def layer():
    """input [6, 16], linear_weight [24, 16], linear_bias [24], index [6]."""
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    return normal(6, 16), normal(24, 16), normal(24), torch.randint(24, (6,), generator=generator)


def ours(input, weight, bias, index, **options):
    return functional.linear_cross_entropy(input, weight, index, linear_bias=bias, **options)


def formula(input, weight, bias, index, z_loss=0.0, softcap=0.0, **options):
    logits = torch_functional.linear(input, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = torch_functional.cross_entropy(logits, index, **options)
    return loss + z_loss * torch.logsumexp(logits, -1).square().mean()


@pytest.mark.parametrize("options", ({}, OPTIONS), ids=("plain", "options"))
def test_functorch(layer, options):
    input, weight, bias, index = layer
    tangents = tuple(torch.randn_like(t) for t in (input, weight, bias))
    transforms = {
        "grad": lambda f: torch.func.grad(lambda *t: f(*t, index, **options), (0, 1, 2))(input, weight, bias),
        "jvp": lambda f: torch.func.jvp(lambda *t: f(*t, index, **options), (input, weight, bias), tangents),
        "hessian": lambda f: torch.func.hessian(lambda b: f(input, weight, b, index, **options))(bias),
        "vmap": lambda f: torch.func.vmap(lambda x: f(x, weight, bias, index, **options))(torch.stack((input, -input))),
        "per sample": lambda f: torch.func.vmap(
            torch.func.grad(lambda x, i: f(x[None], weight, bias, i[None], **options)))(input, index),
    }  # fmt: skip
    unfused = lambda x, w, b, i, **given: functional.cross_entropy(torch_functional.linear(x, w, b), i, **given)
    for name, transform in transforms.items():
        expected = transform(formula)
        for function in (ours, unfused):
            torch.testing.assert_close(  # the tangents of torch's own are fp64
                transform(function),
                expected,
                rtol=1e-4,
                atol=1e-5,
                check_dtype=False,
                msg=lambda m, name=name: f"{name}: {m}",
            )


@pytest.mark.parametrize("target", ("index", "probabilities"))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("op", cases.OPS)
def test_second_order(op, reduction, target, backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("triton: its interpreter is slow, and the second order is plain PyTorch")
    layer = {"hidden": 3, "bias": True} if op == "linear_cross_entropy" else {}
    case = CrossEntropyCase(
        op, (3, 5), torch.float64, target=target, weight=True, reduction=reduction, **layer, **OPTIONS
    )
    inputs = cases.make_inputs(case, device)
    names = inputs.leaf_names()
    function = lambda *tensors: cases.call(case, inputs.replace(**dict(zip(names, tensors, strict=True))), backend)
    leaves = inputs.requiring_grad().leaves()
    assert torch.autograd.gradcheck(function, leaves) and torch.autograd.gradgradcheck(function, leaves)


def test_public_ops_are_differentiable_and_checked(layer):
    input, weight, bias, index = layer
    public = torch.ops.llmkernels
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    torch.testing.assert_close(public.cross_entropy(input, index % 16), functional.cross_entropy(input, index % 16))
    loss = public.linear_cross_entropy(input, weight, index, linear_bias=bias, **OPTIONS)
    torch.testing.assert_close(loss, ours(*leaves, index, **OPTIONS))
    loss.backward()
    assert all(leaf.grad is not None for leaf in leaves)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(public.cross_entropy.default, (input, index % 16), test_utils=tests)
    torch.library.opcheck(public.linear_cross_entropy.default, (input, weight, index), test_utils=tests)


def test_raw_ops_pass_opcheck(raw):
    for target, smoothing, weight in (("index", 0.0, False), ("probabilities", 0.1, True)):
        case = CrossEntropyCase("cross_entropy", (5, 24), target=target, weight=weight)
        inputs = cases.make_inputs(case, raw.device)
        dloss, settings = torch.rand(5, device=raw.device), (-100, smoothing, 0.1, 0.0)
        given = (inputs.input, inputs.target, inputs.weight)
        for arriving in (None, dloss):
            raw.check(raw.ops.cross_entropy_fwd.default, (*given, arriving, *settings))
        stats = raw.ops.cross_entropy_fwd(*given, None, *settings)[1]
        raw.check(raw.ops.cross_entropy_bwd.default, (dloss, *given, stats, *settings))


def test_export_is_portable(tmp_path):
    """Exported here, it runs where nothing is compiled, on the torch backend, with any number of rows."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss, self.layer = nn.CrossEntropyLoss(**OPTIONS), nn.LinearCrossEntropyLoss(16, 24, bias=True)

        def forward(self, logits, index, input):
            return self.loss(logits, index), self.layer(input, index)

    module = Both()
    arguments = (torch.randn(7, 24), torch.randint(24, (7,)), torch.randn(7, 16))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(module, arguments, dynamic_shapes=({0: rows},) * 3)
    longer = (torch.randn(9, 24), torch.randint(24, (9,)), torch.randn(9, 16))
    with torch.no_grad():
        expected = module(*longer)
    check_exported(program, "cross_entropy_fwd", longer, expected, tmp_path)


def test_autocast_gives_the_dtypes_of_torch(layer):
    input, weight, bias, index = (t.requires_grad_() if t.is_floating_point() else t for t in layer)
    with torch.autocast("cpu", torch.bfloat16):
        for logits in (input, input.bfloat16()):
            given = functional.cross_entropy(logits, index % 16)
            assert given.dtype == torch_functional.cross_entropy(logits, index % 16).dtype == torch.float32
        loss, expected = ours(input, weight, bias, index), formula(input, weight, bias, index)
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    grads, others = (torch.autograd.grad(value, (input, weight, bias)) for value in (loss, expected))
    for grad, other in zip(grads, others, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, other, rtol=5e-2, atol=5e-3)


def test_compiled_with_dynamic_rows_and_without_a_look_at_indices(layer):
    input, _, _, index = layer
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: functional.cross_entropy(*t), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 4):
        torch.testing.assert_close(
            compiled(input[:rows], index[:rows] % 16), functional.cross_entropy(input[:rows], index[:rows] % 16)
        )
    assert compiled(input, index + 16).isnan()


def test_bad_arguments_have_one_clear_message(layer):
    x, w, b, i = layer
    loss, linear = functional.cross_entropy, functional.linear_cross_entropy
    i = i % 16
    wrong = [
        (ValueError, r"cross_entropy: target has shape \(5,\), expected \(6,\)", lambda: loss(x, i[:5])),
        (ValueError, r"cross_entropy: target has shape \(6, 4\), expected \(6, 16\)", lambda: loss(x, x[:, :4])),
        (ValueError, r"cross_entropy: input has shape \(\)", lambda: loss(x[0, 0], i[0])),
        (ValueError, r"cross_entropy: input has shape \(6, 0\)", lambda: loss(x[:, :0], i)),
        (TypeError, "cross_entropy: input has dtype torch.int64, expected one of float32", lambda: loss(i, i)),
        (TypeError, "cross_entropy: target has dtype torch.bool, expected int64", lambda: loss(x, i > 3)),
        (TypeError, "cross_entropy: target has dtype torch.complex64", lambda: loss(x, x + 0j)),
        (ValueError, "cross_entropy: target is on meta, expected cpu", lambda: loss(x, i.to("meta"))),
        (ValueError, r"cross_entropy: weight has shape \(24,\), expected \(16,\)", lambda: loss(x, i, b)),
        (TypeError, "cross_entropy: weight has dtype torch.int64", lambda: loss(x, i, torch.ones(16).long())),
        (ValueError, "weight requires a gradient", lambda: loss(x, i, torch.ones(16).requires_grad_())),
        (ValueError, "reduction is 'avg', expected 'none', 'mean' or 'sum'", lambda: loss(x, i, reduction="avg")),
        (ValueError, "label_smoothing is 1.5, expected a number from 0 to 1", lambda: loss(x, i, label_smoothing=1.5)),
        (ValueError, "label_smoothing is nan", lambda: loss(x, i, label_smoothing=float("nan"))),
        (ValueError, "z_loss is -1.0, expected a number that is not negative", lambda: loss(x, i, z_loss=-1.0)),
        (ValueError, "softcap is -2.0, expected a positive number, or 0", lambda: loss(x, i, softcap=-2.0)),
        (ValueError, "ignore_index is 3, expected a negative one with probabilities", 
         lambda: loss(x, x, ignore_index=3)),
        (ValueError, "unknown backend 'gpu'", lambda: loss(x, i, backend="gpu")),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: loss(x, i, backend="cuda")),
        (ValueError, r"linear_weight has shape \(24, 8\), expected \(24, 16\)", lambda: linear(x, w[:, :8], i)),
        (ValueError, r"linear_weight has shape \(24,\), expected \[C, H\]", lambda: linear(x, b, i)),
        (TypeError, "linear_weight has dtype torch.float64, expected torch.float32", lambda: linear(x, w.double(), i)),
        (ValueError, r"linear_bias has shape \(16,\), expected \(24,\)", lambda: linear(x, w, i, linear_bias=w[0])),
        (ValueError, r"linear_cross_entropy: target has shape \(6, 16\), expected \(6, 24\)", lambda: linear(x, w, x)),
        (ValueError, r"linear_cross_entropy: softcap is inf", lambda: linear(x, w, i, softcap=float("inf"))),
        (ValueError, "CrossEntropyLoss: z_loss is -1", lambda: nn.CrossEntropyLoss(z_loss=-1.0)),
        (ValueError, "LinearCrossEntropyLoss: reduction is 'x'", 
         lambda: nn.LinearCrossEntropyLoss(4, 8, reduction="x")),
        (ValueError, r"LinearCrossEntropyLoss: weight has shape \(4,\), expected \(8,\)",
         lambda: nn.LinearCrossEntropyLoss(4, 8, weight=torch.ones(4))),
    ]  # fmt: skip
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=message):
            wrong_call()


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    raw, x, i = torch.ops.llmkernels_cpu, torch.randn(3, 8), torch.tensor([1, 2, 3])
    settings = (-100, 0.0, 0.0, 0.0)
    stats, one = torch.zeros(3, 3), torch.ones(3)
    wrong = (
        lambda: raw.cross_entropy_fwd(x[0], i, None, None, *settings),
        lambda: raw.cross_entropy_fwd(x, i[:2], None, None, *settings),
        lambda: raw.cross_entropy_fwd(x, i.int(), None, None, *settings),
        lambda: raw.cross_entropy_fwd(x, x[:, :4], None, None, *settings),
        lambda: raw.cross_entropy_fwd(x, x.double(), None, None, *settings),
        lambda: raw.cross_entropy_fwd(x, i, torch.ones(7), None, *settings),
        lambda: raw.cross_entropy_fwd(x, i, torch.ones(8).half(), None, *settings),
        lambda: raw.cross_entropy_fwd(x, i, None, one[:2], *settings),
        lambda: raw.cross_entropy_fwd(i.view(3, 1), i, None, None, *settings),
        lambda: raw.cross_entropy_bwd(one, x, i, None, stats[:2], *settings),
        lambda: raw.cross_entropy_bwd(one.double(), x, i, None, stats, *settings),
    )
    for wrong_call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            wrong_call()


def test_modules_are_torchs():
    weight, index = torch.rand(24), torch.randint(24, (6,))
    given = {"weight": weight, "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}
    logits = torch.randn(6, 24)
    torch.testing.assert_close(
        nn.CrossEntropyLoss(**given)(logits, index), torch.nn.CrossEntropyLoss(**given)(logits, index)
    )
    module = nn.CrossEntropyLoss(z_loss=0.1, softcap=2.0)
    assert isinstance(module, torch.nn.CrossEntropyLoss) and "z_loss=0.1, softcap=2.0" in repr(module)
    module = nn.LinearCrossEntropyLoss(16, 24, bias=True, z_loss=0.1, **given)
    assert sorted(module.state_dict()) == ["linear.bias", "linear.weight", "weight"] and "z_loss=0.1" in repr(module)
    input = torch.randn(2, 3, 16)
    expected = functional.cross_entropy(module.linear(input).reshape(6, 24), index, z_loss=0.1, **given)
    torch.testing.assert_close(module(input, index.view(2, 3)), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(16, 24, bias=True, **given)
        theirs.load_state_dict(module.state_dict())
        plain = nn.LinearCrossEntropyLoss(16, 24, bias=True, **given)
        plain.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(plain(input.view(6, 16), index), theirs(input.view(6, 16), index))
    assert nn.LinearCrossEntropyLoss(4, 8, dtype=torch.bfloat16, device="meta").linear.weight.dtype == torch.bfloat16


def test_targets_of_every_integer_type_and_strange_layouts():
    logits, index = torch.randn(40, 6), torch.randint(6, (40,))
    expected = torch_functional.cross_entropy(logits, index)
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(functional.cross_entropy(logits, index.to(dtype)), expected)
    spread = torch.stack((index, index), 1)[:, 0]
    torch.testing.assert_close(functional.cross_entropy(logits.t().contiguous().t(), spread), expected)
    soft = torch.softmax(torch.randn(6, 40), 0).t()
    torch.testing.assert_close(functional.cross_entropy(logits, soft), torch_functional.cross_entropy(logits, soft))


@cpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_bitwise_equal_for_any_thread_count(dtype):
    case = CrossEntropyCase("cross_entropy", (517, 200), dtype, label_smoothing=0.1, reduction="none")
    inputs = cases.make_inputs(case)
    assert_same_with_any_threads(lambda: evaluate(cases, case, inputs, "cpu"))


@cpu
def test_more_than_two_to_the_31_elements():
    """Rows that all lie on the same memory, so that the logits take none."""
    rows, classes = 2**19 + 3, 2**12
    row, index = torch.randn(1, classes).bfloat16(), torch.randint(classes, (rows,))
    loss = functional.cross_entropy(row.expand(rows, classes), index, reduction="none", backend="cpu")
    for place in (0, 2**18 + 1, rows - 1):
        assert loss[place] == functional.cross_entropy(row, index[place : place + 1], backend="cpu")
