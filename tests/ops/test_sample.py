"""sample: which tokens may come, how often they do, seeds, errors."""

import math

import pytest
import torch

import llmkernels
from llmkernels import functional, registry
from llmkernels.ops.softmax.sample import taken
from llmkernels.testing.inputs import short_name
from tests.conftest import TESTED, absent, device_of
from tests.ptxsim import backend as simulated

# Their kernels are interpreted.
SLOW = (*simulated.CUDA, "triton") if not torch.cuda.is_available() else tuple(simulated.CUDA)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[name for name in TESTED if registry.has("sample", name)])
def backend(request) -> str:
    if absent(request.param):
        pytest.skip(f"{request.param}: {absent(request.param)}")
    return request.param


@pytest.fixture
def device(backend) -> str:
    return device_of(backend)


def _generator(device, seed=0):
    return torch.Generator(device).manual_seed(seed)


def _logits(rows, columns, dtype=torch.float32, device="cpu", seed=0):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0).to(dtype).to(device)


def _by_sorting(logits, temperature, top_k, top_p, min_p):
    """The tokens that may come, from one row's sorted list, a step at a time; equal logits are not parted."""
    values = sorted(logits.tolist(), reverse=True)
    weights = [math.exp((value - values[0]) / temperature) for value in values]
    count = min(top_k, len(values)) if top_k else len(values)
    least = values[count - 1]
    total, sum_, last = math.fsum(w for v, w in zip(values, weights, strict=True) if v >= least), 0.0, values[0]
    for value, weight in zip(values, weights, strict=True):
        last = value
        sum_ += weight
        if sum_ >= top_p * total * (1.0 - 1e-9) or top_p == 1.0:
            break
    if top_p < 1.0:
        least = max(least, last)
    return {
        index
        for index, value in enumerate(logits.tolist())
        if value >= least and math.exp((value - values[0]) / temperature) >= min_p
    }


OPTIONS = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"temperature": 0.3, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 3.0, "top_k": 20, "top_p": 0.95},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_exactly_these_tokens_come(dtype, options, backend, device):
    """Every token that may come does, at the numbers that stand for it, and no other one."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    logits = _logits(6, 31 if backend in SLOW else 61, dtype, device)
    kept, p = taken(logits, **settings)
    raw = registry.entry("sample", backend).fwd
    for row in range(1 if backend in SLOW else logits.shape[0]):
        allowed = _by_sorting(logits[row], **settings)
        assert set(kept[row].nonzero().flatten().tolist()) == allowed
        shares = torch.where(kept[row], p[row], 0.0)
        ends = (shares / shares.sum()).cumsum(0)
        middles = ends - 0.5 * shares / shares.sum()
        tokens = sorted(allowed)
        u = torch.cat((middles[tokens], torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64, device=device)))
        came = raw(logits[row].expand(len(u), -1), u, *settings.values()).tolist()
        assert came[:-2] == tokens and came[-2] == tokens[0] and came[-1] == tokens[-1]


@pytest.mark.parametrize("columns", (1, 2, 15, 1023, 1024, 1025, 32_000))
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backends_agree(options, columns, backend, device):
    if backend in SLOW and columns > 1025:
        pytest.skip(f"{backend}: more than 1,025 columns take too long")
    logits = _logits(5, columns, device=device)
    ours, theirs = (
        functional.sample(logits, **options, generator=_generator(device), backend=name) for name in (backend, "torch")
    )
    assert torch.equal(ours, theirs) and ours.dtype == torch.int64 and ours.shape == (5,)


def _chi_square(counts, expected):
    """The sum of squares, and a bound that it exceeds once in 10,000 times (Wilson and Hilferty)."""
    free = len(counts) - 1
    bound = free * (1.0 - 2.0 / (9.0 * free) + 3.72 * math.sqrt(2.0 / (9.0 * free))) ** 3
    return ((counts - expected) ** 2 / expected).sum().item(), bound


@pytest.mark.parametrize("options", ({}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}), ids=str)
def test_frequencies(options, backend, device):
    if backend in SLOW:
        pytest.skip(f"{backend}: enough draws take too long; test_exactly_these_tokens_come has every token")
    draws, settings = 40_000, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    logits = _logits(1, 12, device=device) * 0.7
    tokens = functional.sample(logits.expand(draws, 12), **options, generator=_generator(device, 5), backend=backend)
    kept, p = taken(logits, **settings)
    shares = torch.where(kept, p, 0.0)[0].cpu()
    counts = torch.bincount(tokens.cpu(), minlength=12).double()
    assert (counts[shares == 0.0] == 0.0).all()
    present = shares > 0.0
    value, bound = _chi_square(counts[present], draws * shares[present] / shares.sum())
    assert value < bound


def test_frequencies_over_a_vocabulary(backend, device):
    """In sixteen groups of 2,000 tokens, and independent from row to row."""
    if backend in SLOW:
        pytest.skip(f"{backend}: enough draws take too long; test_exactly_these_tokens_come has every token")
    draws = 4000
    logits = _logits(1, 32_000, device=device)
    tokens = functional.sample(logits.expand(draws, -1), top_p=0.9, generator=_generator(device), backend=backend).cpu()
    kept, p = taken(logits, 1.0, 0, 0.9, 0.0)
    shares = torch.where(kept, p, 0.0)[0].cpu().view(16, -1).sum(-1)
    value, bound = _chi_square(torch.bincount(tokens // 2000, minlength=16).double(), draws * shares / shares.sum())
    assert value < bound
    halves = (tokens >= 16_000).double() - (tokens >= 16_000).double().mean()
    assert abs((halves[1:] * halves[:-1]).mean().item()) < 4.0 * halves.square().mean().item() / math.sqrt(draws)


def test_greedy(backend, device):
    logits = _logits(7, 500, device=device)
    logits[2, 100] = logits[2, 300] = 50.0
    expected = logits.argmax(-1)
    expected[2] = 100
    for options in ({"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5}, {"temperature": 1e-30}, {"top_k": 1}):
        got = functional.sample(logits, **options, backend=backend)
        assert torch.equal(got[[0, 1, 3, 4, 5, 6]], expected[[0, 1, 3, 4, 5, 6]])
        assert got[2] == 100 if options.get("temperature") == 0.0 else got[2] in (100, 300)


def test_what_is_minus_infinity_never_comes(backend, device):
    logits = torch.full((4, 300), float("-inf"), device=device)
    logits[:, 123] = -1e30
    for options in OPTIONS:
        assert (functional.sample(logits, **options, backend=backend) == 123).all()


def test_seeds_and_shapes(backend, device):
    logits = _logits(12, 100, device=device).view(3, 4, 100)
    run = lambda seed, x=logits: functional.sample(x, generator=_generator(device, seed), backend=backend)
    assert run(1).shape == (3, 4) and torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert run(1, logits[0, 0]).shape == () and run(1, logits[:0]).shape == (0, 4)
    wide = torch.zeros(3, 4, 200, device=device)
    wide[..., ::2] = logits
    assert torch.equal(run(1), run(1, wide[..., ::2])) and torch.equal(run(1), run(1, logits.double()))
    torch.manual_seed(3)
    first = functional.sample(logits, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(first, functional.sample(logits.requires_grad_(), backend=backend))
    assert not first.requires_grad


def test_the_same_for_any_number_of_threads():
    if absent("cpu"):
        pytest.skip(f"cpu: {absent('cpu')}")
    logits, threads, results = _logits(33, 3000), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(functional.sample(logits, top_p=0.9, generator=_generator("cpu"), backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


def test_every_instruction_set(isa):
    for dtype in DTYPES:
        for options in OPTIONS:
            logits = _logits(4, 1037, dtype)
            ours, theirs = (
                functional.sample(logits, **options, generator=_generator("cpu"), backend=name)
                for name in ("cpu", "torch")
            )
            assert torch.equal(ours, theirs), options


def test_compiles_and_has_an_op():
    logits = _logits(3, 50)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: functional.sample(x, top_k=3, temperature=0.0), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(logits), logits.argmax(-1))
    assert torch.equal(torch.ops.llmkernels.sample(logits, temperature=0.0), logits.argmax(-1))
    u = torch.rand(3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.llmkernels.sample_tokens.default, (logits, u, 1.0, 3, 0.9, 0.0))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), "nothing"))
def test_rows_that_are_no_distribution(value, backend, device):
    logits = _logits(4, 40, device=device)
    if value == "nothing":
        logits[2] = float("-inf")
    else:
        logits[2, 39] = value
    for temperature in (0.0, 1.0):
        if backend in ("cpu", "torch") and device == "cpu":
            with pytest.raises(ValueError, match="sample: row 2 of logits has a NaN or \\+inf, or nothing but -inf"):
                functional.sample(logits, temperature=temperature, backend=backend)
        else:
            tokens = functional.sample(logits, temperature=temperature, backend=backend)
            assert tokens[2] == -1 and (tokens >= 0).sum() == 3


def test_bad_arguments_have_one_clear_message():
    x = torch.randn(2, 8)
    wrong = [
        (TypeError, "sample: logits has dtype torch.int64", lambda: functional.sample(x.long())),
        (ValueError, r"sample: logits has shape \(2, 0\), expected", lambda: functional.sample(x[:, :0])),
        (ValueError, r"sample: logits has shape \(\), expected", lambda: functional.sample(x[0, 0])),
        (ValueError, "sample: temperature is -1.0, expected 0 or", lambda: functional.sample(x, temperature=-1.0)),
        (ValueError, "sample: temperature is nan", lambda: functional.sample(x, temperature=float("nan"))),
        (ValueError, "sample: top_k is -1, expected", lambda: functional.sample(x, top_k=-1)),
        (ValueError, "sample: top_k is 2.0, expected", lambda: functional.sample(x, top_k=2.0)),
        (ValueError, "sample: top_p is 0.0, expected", lambda: functional.sample(x, top_p=0.0)),
        (ValueError, "sample: top_p is 1.5, expected", lambda: functional.sample(x, top_p=1.5)),
        (ValueError, "sample: min_p is -0.1, expected", lambda: functional.sample(x, min_p=-0.1)),
        (ValueError, "sample: min_p is 2.0, expected", lambda: functional.sample(x, min_p=2.0)),
        (llmkernels.NoBackendError, "cuda: input is on the CPU", lambda: functional.sample(x, backend="cuda")),
    ]  # fmt: skip
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=message):
            wrong_call()


def test_raw_op_never_crashes():
    if absent("cpu"):
        pytest.skip(f"cpu: {absent('cpu')}")
    raw, x, u = torch.ops.llmkernels_cpu.sample_tokens, torch.randn(3, 8), torch.rand(3, dtype=torch.float64)
    wrong = (
        lambda: raw(x.double(), u, 1.0, 0, 1.0, 0.0),
        lambda: raw(x[:, :0], u, 1.0, 0, 1.0, 0.0),
        lambda: raw(x, u[:2], 1.0, 0, 1.0, 0.0),
        lambda: raw(x, u.float(), 1.0, 0, 1.0, 0.0),
    )
    for wrong_call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected"):
            wrong_call()
