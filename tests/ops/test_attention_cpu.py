"""What is particular to attention on the CPU: the cache, threads, instruction sets, memory, values that it checks."""

import itertools

import pytest
import torch

from llmkernels import _native, functional
from llmkernels.ops.attention import cases, reference
from llmkernels.ops.attention.cases import AttentionCase
from llmkernels.testing.battery import evaluate
from tests.support import assert_same_with_any_threads, run_python, with_threads

pytestmark = pytest.mark.skipif(_native.why_absent("cpu") is not None, reason=f"cpu: {_native.why_absent('cpu')}")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OP = "scaled_dot_product_attention"
# By dtype: what scores and weights in that type may differ by.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
PLAIN = {"scale": 0.3, "window_left": -1, "window_right": -1, "top_left": False, "softcap": 0.0}
CACHES = {
    "plain": {},
    "one query": {"S": 1},
    "grouped": {"S": 1, "Hk": 1},
    "many splits": {"S": 2, "Hk": 2, "T": 1300, "lengths": (1300, 513)},
    "causal": {"S": 5, "window_right": 0},
    "prefill": {"S": 70, "T": 200, "window_right": 0, "lengths": (200, 111)},
    "window": {"S": 3, "T": 700, "window_left": 40, "window_right": 0},
    "options": {"S": 4, "Hk": 1, "softcap": 6.0, "alibi": True, "sinks": True, "T": 600, "lengths": (600, 0)},
    "odd dims": {"S": 2, "D": 21, "Dv": 13},
    "wide": {"S": 1, "D": 144, "Dv": 192},
}


def cache_inputs(dtype, *, B=2, H=4, Hk=4, S=3, T=150, D=32, Dv=None, lengths=(150, 37), alibi=False, sinks=False,
                 paged=None, **options):  # fmt: skip
    """Arguments of attention_kvcache_fwd, with NaN in every row of the cache that no sequence has."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    lengths = torch.tensor([min(length, T) for length in lengths], dtype=torch.int32)
    q = normal(B, H, S, D)
    caches, table = [normal(B, Hk, T, D), normal(B, Hk, T, D if Dv is None else Dv)], None
    for cache, b in itertools.product(caches, range(B)):
        cache[b, :, lengths[b] :] = torch.nan
    if paged is not None:
        pages = -(-T // paged)
        order = torch.randperm(B * pages, generator=generator)
        table = order.view(B, pages).int()
        for index, cache in enumerate(caches):
            padded = torch.nn.functional.pad(cache, (0, 0, 0, pages * paged - T), value=torch.nan)
            split = padded.unflatten(2, (pages, paged)).transpose(1, 2).flatten(0, 1)
            caches[index] = torch.empty_like(split)
            caches[index][order] = split
    slopes = torch.linspace(0.02, 0.3, H).expand(B, H) * torch.tensor([[1.0], [0.5]]) if alibi else None
    sink = torch.linspace(-1.0, 2.0, H) if sinks else None
    return (q, *caches, slopes, sink, lengths, table, *{**PLAIN, **options}.values())


def kvcache(*arguments):
    return torch.ops.llmkernels_cpu.attention_kvcache_fwd(*arguments)


@pytest.mark.parametrize("paged", (None, 16, 48))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CACHES)
def test_cache_is_the_reference(name, dtype, paged):
    """Garbage behind a sequence is not read."""
    arguments = cache_inputs(dtype, paged=paged, **CACHES[name])
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]
    out, row_max, log_sum = kvcache(*arguments)
    expected, top, total = reference.attention_kvcache_fwd(*wide)
    torch.testing.assert_close(out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close((row_max + log_sum).double(), top + total, rtol=2e-5, atol=2e-5)


def test_cache_on_every_instruction_set(isa):
    for name, dtype in itertools.product(CACHES, DTYPES):
        test_cache_is_the_reference(name, dtype, 16)


def test_paged_is_bitwise_the_same():
    for dtype, options in itertools.product(DTYPES, CACHES.values()):
        whole = kvcache(*cache_inputs(dtype, **options))
        paged = kvcache(*cache_inputs(dtype, paged=32, **options))
        assert all(torch.equal(a, b) for a, b in zip(whole, paged, strict=True))


THREADED = [
    AttentionCase(OP, B=1, H=2, Hk=1, S=250, T=300, D=40, dtype=dtype, causal="bottom_right", dropout=0.2, **mask)
    for dtype in (torch.float32, torch.bfloat16)
    for mask in ({}, {"mask": "additive"}, {"mask": "additive", "mask_shape": "ST"})
] + [
    AttentionCase(OP, B=3, H=3, S=130, T=90, D=64, dtype=torch.bfloat16, window=(50, 9)),
    *(
        AttentionCase(OP, B=2, H=4, Hk=2, S=110, T=140, D=16, dtype=torch.bfloat16, mask="additive", mask_shape=shape)
        for shape in ("HST", "BST", "BHT", "ST", "T", "BS")
    ),
    AttentionCase("attention_varlen", B=3, H=2, D=32, lengths=((200, 3, 100), (210, 0, 90)), sinks=True),
]


@pytest.mark.parametrize("case", THREADED, ids=str)
def test_bitwise_equal_for_any_thread_count(case):
    """More threads than heads make the backward take seven products instead of five."""
    inputs = cases.make_inputs(case)
    assert_same_with_any_threads(lambda: evaluate(cases, case, inputs, "cpu"))


def test_cache_is_bitwise_equal_for_any_thread_count():
    for options in CACHES.values():
        arguments = cache_inputs(torch.bfloat16, **options)
        first, *others = with_threads(lambda arguments=arguments: kvcache(*arguments))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def mask_gradient(x, call, saved, options):
    return reference.attention_bwd(x.dout, None, *call, 0, *saved, *options, [False, False, False, True, False])[3]


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("mask_shape", ("BHST", "HT"))
def test_each_gradient_alone(wanted, mask_shape):
    """Whatever else is wanted."""
    case = AttentionCase(OP, B=2, H=2, S=200, T=170, D=16, mask="additive", mask_shape=mask_shape)
    x = cases.make_inputs(case)
    call = (x.q, x.k, x.v, x.mask, None, None, None, None, None, 0)
    options = (0.25, 20, -1, False, 0.0, 0.0)
    kernels = torch.ops.llmkernels_cpu
    saved = kernels.attention_fwd(*call, *options)
    grads = lambda wanted: kernels.attention_bwd(x.dout, None, *call, 0, *saved, *options, [*wanted, False])
    for want, grad, whole in zip(wanted, grads(wanted), grads((True,) * 4), strict=False):
        assert torch.equal(grad, whole) if want else grad.numel() == 0
    if wanted[3]:  # blocks that are skipped too
        torch.testing.assert_close(grads(wanted)[3], mask_gradient(x, call, saved, options), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", ((1, 4, 2, 16, 16), (2, 4, 4, 24, 8), (1, 12, 3, 7, 5), (1, 8, 2, 128, 64)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "options", ({}, {"window": (270, -1), "sinks": True}, {"causal": "bottom_right", "alibi": True}), ids=str
)
def test_heads_side_by_side_are_heads_apart(options, dtype, sizes):
    """A cache in the order of memory, all heads at once, against one head after the other."""
    S, H, Hk, D, Dv = sizes
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(dtype)
    q, k, v = normal(2, S, H, D), normal(2, 700, Hk, D), normal(2, 700, Hk, Dv)
    lengths = torch.tensor([690, 259], dtype=torch.int32)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:], v[b, length:] = torch.nan, torch.nan
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 1.0, H)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.linspace(0.1, 0.01, H)
    apart = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    one, other = (
        functional.attention_kvcache(q, *caches, cache_seqlens=lengths, return_lse=True, backend="cpu", **options)
        for caches in ((k, v), (apart(k), apart(v)))
    )
    tolerance = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(one[0], other[0], **tolerance)
    torch.testing.assert_close(one[1], other[1])


def test_values_that_would_read_elsewhere_are_errors():
    arguments = list(cache_inputs(torch.float32, paged=16))
    for index, value, message in ((5, 1000, r"seqlens_k\[0\] is 1000, expected 0 to 160"),
                                  (6, 99, r"block_table\[0, 0\] is 99, expected 0 to 19")):  # fmt: skip
        wrong = list(arguments)
        wrong[index] = arguments[index].clone()
        wrong[index].view(-1)[0] = value
        with pytest.raises(ValueError, match=f"attention_kvcache_fwd: {message}"):
            kvcache(*wrong)
    x = torch.randn(1, 2, 10, 8)
    ends = torch.tensor([0, 12, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"attention_fwd: cu_seqlens_q\[1\] is 12, expected a number that does not"):
        torch.ops.llmkernels_cpu.attention_fwd(
            x, x, x, None, None, None, None, ends, ends, 10, 1.0, -1, -1, False, 0.0, 0.0
        )


def gradients(q, k, v, mask, dout):
    """The output, and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = functional.scaled_dot_product_attention(*leaves, mask, backend="cpu")
    return out, *torch.autograd.grad(out, leaves, dout)


def test_keys_outside_a_window_are_not_touched():
    q, k, v = (torch.randn(1, 1, 300, 64) for _ in range(3))
    expected = functional.scaled_dot_product_attention(q, k, v, window=(30, 0), causal="bottom_right", backend="cpu")
    k[:, :, 260:] = torch.nan
    v[:, :, 290:] = torch.nan
    actual = functional.scaled_dot_product_attention(q, k, v, window=(30, 0), causal="bottom_right", backend="cpu")
    assert torch.equal(actual[:, :, :192], expected[:, :, :192])
    assert actual[:, :, 260:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_that_a_boolean_mask_hides_are_not_touched(dtype):
    """Their keys and values may be NaN, whether they are packed (many queries) or read where they are."""
    for S in (300, 2):
        q, k, v, dout = (torch.randn(1, 1, rows, 64, dtype=dtype) for rows in (S, 400, 400, S))
        mask = torch.zeros(S, 400, dtype=torch.bool)
        mask[:, 128:256] = torch.rand(S, 128) < 0.8
        run = lambda: gradients(q, k, v, mask, dout)  # noqa: B023
        expected = run()
        for x in (k, v):
            x[:, :, :128], x[:, :, 256:] = torch.nan, torch.nan
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), expected, strict=True))


def test_memory_grows_with_the_length():
    """Peak memory of a process: scores of 6000 x 6000 in fp32 would be 144 MB for each head."""
    out = run_python(
        """
        import resource, torch
        from llmkernels import functional
        torch.set_num_threads(1)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def run(S):
            q, k, v = (torch.randn(1, 2, S, 64, requires_grad=True) for _ in range(3))
            functional.scaled_dot_product_attention(q, k, v, is_causal=True, backend="cpu").sum().backward()
            return peak()

        run(64)
        before = peak()
        print(run(6000) - before)
        """
    )
    assert float(out) < 80
