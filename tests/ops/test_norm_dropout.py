"""dropout_add_layer_norm and dropout_add_rms_norm: what is dropped, and that the backward replays it."""

import pytest
import torch
import torch.utils.checkpoint

import llmkernels
from llmkernels import _random, functional
from llmkernels.ops.norm import cases, reference
from llmkernels.testing.battery import evaluate, failures, judge_results
from llmkernels.testing.inputs import outputs_and_gradients, short_name

OPS = tuple(op for op in cases.OPS if op.startswith("dropout_"))
every_op = pytest.mark.parametrize("op", OPS)
every_dtype = pytest.mark.parametrize("dtype", cases.DTYPES, ids=short_name)


def make(op, shape=(64, 40), dtype=torch.float32, device="cpu", **options):
    case = cases.NormCase(op, shape, shape[-1:], dtype, **options)
    return case, cases.make_inputs(case, device)


# Deliberately wrong formulas: the rule has to reject each of them.


class _Replayed(torch.autograd.Function):
    """x * forward, whose gradient is multiplied with `backward`."""

    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.save_for_backward(backward)
        return (x * forward).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).to(grad.dtype), None, None


def _wrong(case, inputs, change):
    p, scale = case.dropout, _random.keep_scale(case.dropout)
    rows, columns = torch.arange(case.rows)[:, None], torch.arange(case.cols)
    mask = lambda seed, rows=rows, columns=columns: _random.keep(torch.tensor(seed), rows, columns, p) * scale
    right = mask(cases.SEED)
    forward, backward, of_residual = {
        "none": (right, right, None),
        "not_scaled": (right / scale, right / scale, None),
        "other_seed": (mask(cases.SEED + 1), mask(cases.SEED + 1), None),
        "rows_share_a_mask": (mask(cases.SEED, rows * 0), mask(cases.SEED, rows * 0), None),
        "columns_in_pairs": (mask(cases.SEED, columns=columns // 2),) * 2 + (None,),
        "kept_and_dropped_swapped": (scale - right, scale - right, None),
        "backward_not_replayed": (right, mask(cases.SEED + 1), None),
        "backward_not_scaled": (right, right / scale, None),
        "backward_lets_all_through": (right, torch.full_like(right, 1.0), None),
        "residual_dropped_too": (right, right, right),
        "residual_gradient_dropped": (right, right, "gradient"),
    }[change]

    def formula(leaves):
        residual = leaves.residual
        if of_residual is not None:
            residual = _Replayed.apply(residual, torch.ones(()) if isinstance(of_residual, str) else right, right)
        total = _Replayed.apply(leaves.x, forward, backward) + residual
        return cases.norm_torch(case, leaves, total)

    return outputs_and_gradients(inputs, formula)


@pytest.mark.parametrize(
    "change",
    (
        "not_scaled", "other_seed", "rows_share_a_mask", "columns_in_pairs", "kept_and_dropped_swapped",
        "backward_not_replayed", "backward_not_scaled", "backward_lets_all_through", "residual_dropped_too",
        "residual_gradient_dropped",
    ),
)  # fmt: skip
@every_op
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_rule_rejects_wrong_dropout(op, dtype, change):
    case, inputs = make(op, dtype=dtype)
    assert failures(judge_results(cases, case, inputs, _wrong(case, inputs, "none"))) == []
    assert failures(judge_results(cases, case, inputs, _wrong(case, inputs, change))) != []


# What is dropped.


@every_op
@every_dtype
@pytest.mark.parametrize("cols", (33, 72, 1030))
def test_the_sum_is_bitwise_the_same_on_every_backend(op, dtype, cols, backend, device, poison):
    for p in (0.1, 0.5, 0.9):
        case, inputs = make(op, (7, cols), dtype, device, dropout=p)
        new_residual = cases.call(case, inputs, backend)[1]
        assert torch.equal(new_residual, cases.summed(case, inputs))


@every_op
def test_dropped_elements_leave_the_residual_alone(op, backend, device, poison):
    case, inputs = make(op, (5, 40), device=device)
    results = evaluate(cases, case, inputs, backend)
    keep = cases.kept(case, device)
    assert torch.equal(results["new_residual"] == inputs.residual, ~keep)
    assert torch.equal(results["dx"] != 0, keep)


@every_op
@pytest.mark.parametrize("shape", ((37, 72), (300, 200)))
def test_any_number_of_threads_drops_the_same(op, shape):
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    case, inputs = make(op, shape, torch.bfloat16)
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(evaluate(cases, case, inputs, "cpu"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(run[name], value) for name, value in runs[0].items())


@every_op
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_share_that_is_kept(op, p):
    """All, each row and each column within six standard deviations; another seed drops others."""
    shape = (400, 500)
    x, residual = torch.ones(shape), torch.zeros(shape)
    run = lambda seed: getattr(functional, op)(x, residual, (500,), dropout_p=p, seed=torch.tensor(seed))[1] != 0
    kept = run(5)
    for dims, count in (((0, 1), 200_000), (1, 500), (0, 400)):
        deviation = (kept.float().mean(dims) - (1 - p)).abs().max()
        assert deviation < 6 * (p * (1 - p) / count) ** 0.5
    agreement = (kept == run(6)).float().mean()
    assert abs(agreement - (p * p + (1 - p) ** 2)) < 0.01


@every_op
def test_nothing_dropped_is_the_residual_add(op, backend, device, poison):
    _, inputs = make(op, (6, 24), device=device)
    plain = getattr(functional, op.removeprefix("dropout_"))
    arguments = (inputs.x, inputs.residual, (24,), inputs.weight)
    expected = plain(*arguments, backend=backend)
    state = torch.get_rng_state()
    for settings in ({}, {"dropout_p": 0.0}, {"dropout_p": 0.7, "training": False}):
        found = getattr(functional, op)(*arguments, backend=backend, **settings)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"


@every_op
def test_everything_dropped(op, backend, device, poison):
    case, inputs = make(op, (6, 24), device=device, dropout=1.0)
    results = evaluate(cases, case, inputs, backend)
    assert torch.equal(results["new_residual"], inputs.residual)
    assert not results["dx"].any() and results["dresidual"].any()


@every_op
def test_nan_and_infinity_that_are_dropped_are_zero(op, backend, device):
    case, inputs = make(op, (4, 40), device=device)
    keep = cases.kept(case, device)
    for value in (float("nan"), float("inf")):
        x = torch.where(keep, inputs.x, value)
        y, new_residual = cases.call(case, inputs.replace(x=x), backend)
        assert y.isfinite().all() and torch.equal(new_residual[~keep], inputs.residual[~keep])


# The seed, and its replay.


@every_op
def test_seed_is_drawn_from_torchs_generator(op, backend, device):
    _, inputs = make(op, (6, 24), device=device)
    call = lambda **settings: getattr(functional, op)(
        inputs.x, inputs.residual, (24,), dropout_p=0.4, backend=backend, **settings
    )[1]
    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    seed = _random.draw_seed(torch.device(device))
    assert torch.equal(call(seed=seed), first) and not torch.equal(first, second)


@every_op
def test_backward_replays_under_checkpointing(op, backend, device, poison):
    _, inputs = make(op, (6, 24), device=device)
    leaves = inputs.requiring_grad()
    call = lambda x, residual: getattr(functional, op)(x, residual, (24,), dropout_p=0.5, backend=backend)
    torch.manual_seed(8)
    plain = call(leaves.x, leaves.residual)
    torch.manual_seed(8)
    again = torch.utils.checkpoint.checkpoint(call, leaves.x, leaves.residual, use_reentrant=False)
    pairs = (
        torch.autograd.grad(out, (leaves.x, leaves.residual), (inputs.dy, inputs.dresidual)) for out in (plain, again)
    )
    for first, second in zip(*pairs, strict=True):
        assert torch.equal(first, second)


@every_op
def test_no_mask_is_saved(op, backend, device):
    case, inputs = make(op, (16, 64), device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        cases.call(case, inputs.requiring_grad(), backend)
    assert sum(t.numel() >= inputs.x.numel() for t in saved) == 1, "the sum alone is saved"


# As part of torch.


@every_op
def test_compiled_call_draws_its_own_seed(op):
    torch._dynamo.reset()
    _, inputs = make(op, (6, 24))

    def call(x, residual):
        return getattr(functional, op)(x, residual, (24,), dropout_p=0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = [call(inputs.x, inputs.residual)[1] for _ in range(2)]
    torch.manual_seed(1)
    found = [compiled(inputs.x, inputs.residual)[1] for _ in range(2)]
    assert torch.equal(torch.stack(found), torch.stack(expected)) and not torch.equal(*found)


@every_op
def test_functorch(op):
    case, inputs = make(op, (6, 24))
    ours = lambda x, weight: cases.call(case, inputs.replace(x=x, weight=weight))[0]
    theirs = lambda x, weight: cases.call_torch(case, inputs.replace(x=x, weight=weight))[0]
    arguments = inputs.x, inputs.weight
    tangents = torch.randn_like(inputs.x), torch.randn_like(inputs.weight)
    transforms = {
        "grad": lambda f: torch.func.grad(lambda x, w: f(x, w).cos().sum(), (0, 1))(*arguments),
        "jvp": lambda f: torch.func.jvp(f, arguments, tangents),
        "vmap of weights": lambda f: torch.func.vmap(f, (None, 0))(inputs.x, torch.stack([inputs.weight] * 2)),
        "hessian": lambda f: torch.func.hessian(lambda w: f(inputs.x, w).cos().sum())(inputs.weight),
    }
    for name, transform in transforms.items():
        torch.testing.assert_close(
            transform(ours), transform(theirs), rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@every_op
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_cpu_autocast_is_that_of_the_residual_add(op, dtype):
    _, inputs = make(op, (6, 24), dtype)
    arguments = (inputs.x, inputs.residual, (24,), inputs.weight)
    with torch.autocast("cpu", torch.bfloat16):
        ours = getattr(functional, op)(*arguments, dropout_p=0.5)
        plain = getattr(functional, op.removeprefix("dropout_"))(*arguments)
    assert [out.dtype for out in ours] == [out.dtype for out in plain]


@pytest.mark.parametrize("name", ("cpu", "triton", "cuda", "cuda-sim-sm80", "portable"))
def test_raw_ops_pass_opcheck(name):
    from tests.conftest import absent, device_of

    backend = "cpu" if name == "portable" else name
    if absent(backend):
        pytest.skip(f"{backend}: {absent(backend)}")
    namespace = (
        torch.ops.llmkernels if name == "portable" else getattr(torch.ops, f"llmkernels_{name.replace('-', '_')}")
    )
    device = device_of(backend)
    x, dy, residual = (torch.randn(5, 24, device=device) for _ in range(3))
    weight, bias = torch.randn(24, device=device), torch.randn(24, device=device)
    mean, rstd, seed = x.mean(-1), torch.rsqrt(x.var(-1) + 1e-5), torch.tensor(7, device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if backend == "triton" and device == "cpu":
        tests = tests[:3]
    check = lambda op, *arguments: torch.library.opcheck(getattr(namespace, op).default, arguments, test_utils=tests)
    check("dropout_add_layer_norm_fwd", x, residual, weight, bias, seed, [24], 1e-5, 0.3)
    for wanted in ([True] * 4, [False, True, False, True], [True, False, True, False]):
        check("dropout_add_layer_norm_bwd", dy, residual, x, weight, mean, rstd, seed, [24], 0.3, wanted)
    check("dropout_add_rms_norm_fwd", x, residual, weight, seed, [24], 1e-5, 1.0, 0.3)
    for wanted in ([True] * 3, [False, True, True], [True, False, False]):
        check("dropout_add_rms_norm_bwd", dy, None, x, weight, rstd, seed, [24], 0.0, 0.3, wanted)


@every_op
def test_public_op_has_the_functions_options(op):
    _, inputs = make(op, (6, 24))
    seed = torch.tensor(cases.SEED)
    arguments = (inputs.x.clone().requires_grad_(), inputs.residual, [24], inputs.weight)
    public = getattr(torch.ops.llmkernels, op)
    found = public(*arguments, dropout_p=0.3, seed=seed)
    expected = getattr(functional, op)(*arguments, dropout_p=0.3, seed=seed)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not torch.equal(found[1], public(*arguments, dropout_p=0.3, training=False)[1])
    torch.library.opcheck(
        public.default, arguments, {"dropout_p": 0.3, "seed": seed}, test_utils=("test_schema", "test_faketensor")
    )


@every_op
def test_errors_name_the_argument(op):
    x = torch.randn(3, 8)
    call = lambda **settings: getattr(functional, op)(x, x, (8,), **{"dropout_p": 0.5, **settings})
    wrong = [
        (ValueError, rf"{op}: dropout_p is 1.5, expected a probability between 0 and 1", {"dropout_p": 1.5}),
        (ValueError, rf"{op}: dropout_p is nan, expected", {"dropout_p": float("nan")}),
        (ValueError, rf"{op}: dropout_p is -0.1, expected", {"dropout_p": -0.1, "training": False}),
        (TypeError, rf"{op}: seed has dtype torch.int32, expected torch.int64", {"seed": torch.tensor(1).int()}),
        (ValueError, rf"{op}: seed has shape \(1,\), expected \(\)", {"seed": torch.tensor([1])}),
        (ValueError, rf"{op}: seed is on meta, expected cpu", {"seed": torch.tensor(1, device="meta")}),
    ]
    for error, message, settings in wrong:
        with pytest.raises(error, match=message):
            call(**settings)
    with pytest.raises(ValueError, match=rf"{op}: residual has shape \(2, 8\), expected"):
        getattr(functional, op)(x, x[:2], (8,), dropout_p=0.5, training=False)


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"] is not None:
        pytest.skip("cpu: " + llmkernels.backends()["cpu"])
    raw, x, seed = torch.ops.llmkernels_cpu, torch.randn(3, 8), torch.tensor(1)
    wrong = (
        lambda: raw.dropout_add_layer_norm_fwd(x, x[:2], None, None, seed, [8], 1e-5, 0.5),
        lambda: raw.dropout_add_layer_norm_fwd(x, x, None, None, seed.int(), [8], 1e-5, 0.5),
        lambda: raw.dropout_add_layer_norm_fwd(x, x, None, None, seed[None], [8], 1e-5, 0.5),
        lambda: raw.dropout_add_rms_norm_fwd(x, x, None, seed, [8], 1e-5, 0.0, 1.5),
        lambda: raw.dropout_add_rms_norm_bwd(x, None, x, None, x[:, 0], seed, [8], 0.0, float("nan"), [True] * 3),
    )
    for call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            call()


def test_reference_drops_by_rows_of_the_whole_tensor():
    """Rows are counted over all leading dimensions, columns over all normalized ones."""
    x, seed = torch.ones(2, 3, 4, 5), torch.tensor(9)
    flat = reference.dropped(x.view(6, 20), seed, (20,), 0.4)
    assert torch.equal(reference.dropped(x, seed, (4, 5), 0.4), flat.view(x.shape)) and 0 < (flat != 0).sum() < 120
