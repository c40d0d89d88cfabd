"""The battery that every op passes on every backend, read from the families' cases: a new op is tested by its cases."""

import pytest
import torch

import llmkernels
from llmkernels import functional, ops
from llmkernels.testing.battery import evaluate, failures, judge
from llmkernels.testing.inputs import short_name
from tests.ptxsim import backend as simulated

FAMILIES = [ops.cases_of(name) for name in ops.FAMILIES]
OPS = [pytest.param(cases, op, id=op) for cases in FAMILIES for op in cases.OPS]
every_op = pytest.mark.parametrize("cases, op", OPS)


def pairs(method: str):
    """(cases, case) of every family that has such cases."""
    lists = [(cases, getattr(cases, method, list)()) for cases in FAMILIES]
    return pytest.mark.parametrize(
        "cases, case", [pytest.param(cases, case, id=str(case)) for cases, found in lists for case in found]
    )


def skip_if_refused(cases, case, backend, device):
    """A backend may refuse a case with a sentence; not one that tests/coverage.toml lists for it."""
    try:
        cases.call(case, cases.make_inputs(case, device), backend)
    except llmkernels.NoBackendError as error:
        pytest.skip(str(error).split(": ", 2)[-1])


@pytest.fixture(autouse=True)
def willing(request):
    """Skips a test of an op on a backend that refuses an ordinary call of it."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and {"op", "backend"} <= parameters.params.keys():
        cases, op = parameters.params["cases"], parameters.params["op"]
        backend, device = (request.getfixturevalue(name) for name in ("backend", "device"))
        skip_if_refused(cases, cases.plain_case(op), backend, device)


def check(cases, case, backend, device, covers):
    skip_if_refused(cases, case, backend, device)
    assert failures(judge(cases, case, backend, device)) == []
    for direction in ("fwd", "bwd"):
        covers(case.op, backend, short_name(case.dtype), case.option, direction)


@pairs("test_cases")
def test_matches_fp64_truth(cases, case, backend, device, poison, covers):
    check(cases, case, backend, device, covers)


@pairs("long_cases")
def test_matches_fp64_truth_when_long(cases, case, backend, device, poison, covers):
    if backend == "triton" and device == "cpu":
        pytest.skip(
            "triton: cases this long take minutes in the interpreter; test_triton_aot.py has short ones like them"
        )
    if reason := simulated.too_slow(backend, getattr(case, "elements", 0)):
        pytest.skip(reason)
    check(cases, case, backend, device, covers)


@every_op
@pytest.mark.parametrize("seed", range(5))
def test_reference_is_torch_in_fp64(cases, op, seed):
    case = cases.plain_case(op, torch.float64)
    inputs = cases.make_inputs(case, seed=seed)
    truth = cases.truth(case, inputs)
    for name, result in evaluate(cases, case, inputs, "torch").items():
        torch.testing.assert_close(result, truth[name], rtol=1e-12, atol=1e-12)


@every_op
def test_gradcheck_and_gradgradcheck(cases, op, backend, device):
    case = cases.plain_case(op, torch.float64, tiny=True)
    skip_if_refused(cases, case, backend, device)
    inputs = cases.make_inputs(case, device)
    names = inputs.leaf_names()

    def function(*tensors):
        return cases.call(case, inputs.replace(**dict(zip(names, tensors, strict=True))), backend)

    leaves = inputs.requiring_grad().leaves()
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@every_op
def test_only_what_is_needed_gets_a_gradient(cases, op, backend, device, poison):
    case = cases.plain_case(op)
    inputs = cases.make_inputs(case, device)
    whole = evaluate(cases, case, inputs, backend)
    for name in inputs.leaf_names():
        leaf = getattr(inputs, name).clone().requires_grad_()
        outputs = cases.call(case, inputs.replace(**{name: leaf}), backend)
        arriving = [getattr(inputs, grad) for grad in inputs.GRADS]
        live = [(out, grad) for out, grad in zip(outputs, arriving, strict=False) if out.requires_grad]
        (grad,) = torch.autograd.grad([out for out, _ in live], leaf, [grad for _, grad in live])
        assert torch.equal(grad, whole[f"d{name}"])


@every_op
def test_each_output_alone_has_its_gradient(cases, op, backend, device, poison):
    case = cases.plain_case(op)
    inputs = cases.make_inputs(case, device).requiring_grad()
    for index in range(len(cases.call(case, inputs, backend))):
        arriving = getattr(inputs, inputs.GRADS[index])
        ours, theirs = (
            torch.autograd.grad(outputs[index], inputs.leaves(), arriving, allow_unused=True, materialize_grads=True)
            for outputs in (cases.call(case, inputs, backend), cases.call_torch(case, inputs))
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@every_op
def test_twice_run_is_bitwise_equal(cases, op, backend, device):
    case = cases.plain_case(op)
    inputs = cases.make_inputs(case, device)
    first, second = (evaluate(cases, case, inputs, backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@every_op
def test_compile_fullgraph_equals_eager(cases, op, backend, device):
    if backend == "triton" and device == "cpu":
        pytest.skip("triton: an interpreted kernel cannot be traced into a compiled graph's runtime checks")
    torch._dynamo.reset()
    case = cases.plain_case(op)
    inputs = cases.make_inputs(case, device)
    names = inputs.leaf_names()

    def run(function):
        fresh = inputs.requiring_grad()
        outputs = function(*fresh.leaves())
        return outputs, fresh.backward(outputs)

    def call(*tensors):
        return cases.call(case, inputs.replace(**dict(zip(names, tensors, strict=True))), backend)

    torch.testing.assert_close(run(torch.compile(call, fullgraph=True, backend="aot_eager")), run(call))


def _strange(x):
    """The same values, laid out in ways that are not simply contiguous."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() > 1 else x.reshape(1, -1)
    wide = x.new_zeros(flat.shape[0], 2 * flat.shape[1])
    wide[:, 1::2] = flat
    offset = x.new_zeros(x.numel() + 1)
    offset[1:] = x.flatten()
    rows = x.new_zeros(flat.shape[0], flat.shape[1] + 3)
    rows[:, 2 : 2 + flat.shape[1]] = flat
    return {
        "every second column": wide[:, 1::2].view(x.shape) if x.dim() < 3 else wide[:, 1::2].unflatten(0, x.shape[:-1]),
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "misaligned": offset[1:].view(x.shape),
        "row stride": rows[:, 2 : 2 + flat.shape[1]].unflatten(0, x.shape[:-1]) if x.dim() > 1 else rows[0, 2:-1],
    }


@every_op
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_strides_and_offsets(cases, op, dtype, backend, device, poison):
    case = cases.plain_case(op, dtype)
    inputs = cases.make_inputs(case, device)
    expected = evaluate(cases, case, inputs, backend)
    names = [*inputs.leaf_names(), *inputs.GRADS[: len(cases.call(case, inputs, backend))]]
    for layout in _strange(torch.ones(1, 1)):
        strange = inputs.replace(**{name: _strange(getattr(inputs, name))[layout] for name in names})
        assert all(torch.equal(getattr(strange, name), getattr(inputs, name)) for name in names)
        for result, value in evaluate(cases, case, strange, backend).items():
            torch.testing.assert_close(value, expected[result], msg=lambda m, n=layout, r=result: f"{n}, {r}: {m}")


@every_op
def test_every_backend_explains_itself(cases, op):
    case = cases.plain_case(op)
    inputs = cases.make_inputs(case)
    seen = []
    with llmkernels.registry.observe(lambda name, tensors, backend: seen.append((name, tensors))):
        cases.call(case, inputs, None)
    explained = llmkernels.registry.explain_call(*seen[0])
    assert seen[0][0] == op and explained.chosen is not None
    assert list(explained.reasons)[-1] == "torch"
    assert [line.split()[0] for line in str(explained).splitlines()[1:]] == list(explained.reasons)
    assert hasattr(functional, op) and hasattr(torch.ops.llmkernels, op)


@every_op
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the cpu backend is not the one that is forced")
def test_forced_kernel_under_a_transform_raises_why(cases, op):
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    case = cases.plain_case(op)
    inputs = cases.make_inputs(case)
    name = inputs.leaf_names()[0]
    if not llmkernels.registry.has(op, "cpu"):
        pytest.skip(f"cpu: {op} has no such kernel")
    with pytest.raises(llmkernels.NoBackendError, match="needs plain PyTorch"):
        torch.func.grad(lambda t: cases.call(case, inputs.replace(**{name: t}), "cpu")[0].sum())(getattr(inputs, name))
