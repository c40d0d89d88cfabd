"""What attention means, as properties that hold on every backend, bit for bit where the answer is exact."""

import pytest
import torch

import llmkernels
from llmkernels import functional
from llmkernels.ops.attention import cases
from llmkernels.testing.battery import evaluate, failures, judge
from llmkernels.testing.inputs import short_name
from tests.ops.attention_support import (
    SDPA,
    close,
    every_dtype,
    grads,
    normal_on,
    run,
    sdpa,
    varlen,
)
from tests.support import assert_same_with_any_threads


@pytest.fixture
def random(device):
    return normal_on(device)


# --- who sees whom --------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("causal", ("top_left", "bottom_right"))
def test_causal_output_does_not_depend_on_what_comes_later(causal, dtype, backend, random, poison):
    q, k, v = random(1, 2, 40, 16, dtype=dtype), random(1, 2, 70, 16, dtype=dtype), random(1, 2, 70, 16, dtype=dtype)
    first, shift = 23, 0 if causal == "top_left" else 30
    out, lse = sdpa(backend, q, k, v, causal=causal)
    later = lambda x: torch.cat((x[:, :, : first + shift], -100.0 * x[:, :, first + shift :]), 2)
    changed, changed_lse = sdpa(backend, q, later(k), later(v), causal=causal)
    assert torch.equal(changed[:, :, :first], out[:, :, :first])
    assert torch.equal(changed_lse[:, :, :first], lse[:, :, :first])
    assert not torch.equal(changed[:, :, first], out[:, :, first])


def test_causal_gradients_of_later_keys_are_zero(backend, random, poison):
    q, k, v = (random(1, 2, 50, 16).requires_grad_() for _ in range(3))
    out, _ = sdpa(backend, q, k, v, causal="top_left")
    dout = random(*out.shape)
    dout[:, :, 20:] = 0.0
    for grad in torch.autograd.grad(out, (q, k, v), dout):
        assert not grad[:, :, 20:].any() and grad[:, :, :20].any()


@pytest.mark.parametrize("window", ((4, 2), (0, 0), (-1, 3), (6, -1)))
def test_window_sees_exactly_its_keys(window, backend, random, poison):
    """A key outside of the window changes nothing, and the window equals a mask of the same shape."""
    q, k, v = random(2, 2, 33, 8), random(2, 2, 45, 8), random(2, 2, 45, 8)
    center, j = torch.arange(33)[:, None] + 12, torch.arange(45)
    left, right = (entry if entry >= 0 else 100 for entry in window)
    mask = ((j >= center - left) & (j <= center + right)).to(q.device)
    for mine, other in zip(sdpa(backend, q, k, v, window=window), sdpa(backend, q, k, v, mask), strict=True):
        close(mine, other)


def test_window_that_is_large_enough_is_no_window(backend, random, poison):
    tensors = [random(1, 2, length, 16).requires_grad_() for length in (40, 70, 70)]
    plain = sdpa(backend, *tensors)
    for options in ({"window": (70, 70)}, {"window": (-1, 10**6)}, {"window": (10**6, -1)}, {"window": (2**63, 2**31)}):
        wide = sdpa(backend, *tensors, **options)
        close(wide, plain)
        close(grads(wide, *tensors), grads(sdpa(backend, *tensors), *tensors))
    close(
        sdpa(backend, *tensors, causal="bottom_right", window=(70, 5)), sdpa(backend, *tensors, causal="bottom_right")
    )


# --- keys -----------------------------------------------------------------------------------------------------------


def test_the_order_of_keys_does_not_matter(backend, random, poison):
    tensors = [random(2, 4, 20, 16), random(2, 2, 70, 16), random(2, 2, 70, 8), random(20, 70)]
    q, k, v, mask = (tensor.requires_grad_() for tensor in tensors)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1)).to(q.device)
    plain = sdpa(backend, q, k, v, mask)
    permuted = sdpa(backend, q, k[:, :, order], v[:, :, order], mask[:, order])
    close(permuted, plain)
    close(grads(permuted, q, k, v, mask), grads(plain, q, k, v, mask))


@every_dtype
@pytest.mark.parametrize("kind", ("bool", "additive"))
def test_masked_keys_change_nothing(kind, dtype, backend, random, poison):
    """Padding may hold any finite numbers."""
    q = random(2, 2, 20, 16, dtype=dtype).requires_grad_()
    k, v = (random(2, 2, 37, 16, dtype=dtype).requires_grad_() for _ in range(2))
    padding = torch.full((2, 2, 30, 16), 1e4, dtype=dtype, device=q.device)
    mask = torch.ones(67, dtype=torch.bool, device=q.device)
    mask[37:] = False
    if kind == "additive":
        mask = torch.zeros(67, dtype=dtype, device=q.device).masked_fill(~mask, -torch.inf)
    plain = sdpa(backend, q, k, v)
    padded = sdpa(backend, q, torch.cat((k, padding), 2), torch.cat((v, padding), 2), mask)
    tolerance = {"rtol": 0.02, "atol": 0.02} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(padded, plain, **tolerance)
    torch.testing.assert_close(grads(padded, q, k, v), grads(plain, q, k, v), **tolerance)


@pytest.mark.parametrize("kv_heads", (1, 2))
def test_grouped_queries_are_repeated_heads(kv_heads, backend, random, poison):
    q, k, v = (
        random(2, heads, length, 16).requires_grad_() for heads, length in ((4, 20), (kv_heads, 37), (kv_heads, 37))
    )
    grouped = sdpa(backend, q, k, v, causal="bottom_right")
    repeated = sdpa(backend, q, *(x.repeat_interleave(4 // kv_heads, 1) for x in (k, v)), causal="bottom_right")
    close(grouped, repeated)
    close(grads(grouped, q, k, v), grads(repeated, q, k, v))


def test_parts_of_the_keys_merge_by_their_lse(backend, random, poison):
    q, k, v = (random(1, 2, length, 16).requires_grad_() for length in (20, 70, 70))
    cuts = ((0, 33), (33, 34), (34, 70))
    parts = [sdpa(backend, q, k[:, :, a:b], v[:, :, a:b]) for a, b in cuts]
    lse = torch.logsumexp(torch.stack([part for _, part in parts]), 0)
    merged = sum(out * torch.exp(part - lse)[..., None] for out, part in parts), lse
    whole = sdpa(backend, q, k, v)
    close(merged, whole)
    close(grads(merged, q, k, v), grads(whole, q, k, v))


def test_a_sink_is_a_key_whose_value_is_zero(backend, random, poison):
    q, k, v, sinks = random(2, 4, 20, 16), random(2, 4, 37, 16), random(2, 4, 37, 16), random(4)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v, sinks)]
    mask = torch.cat((q.new_zeros(4, 1, 37), sinks[:, None, None]), 2).expand(4, 20, 38)
    zero = q.new_zeros(2, 4, 1, 16)
    ours, theirs = (
        sdpa(backend, q, k, v, sinks=sinks),
        sdpa(backend, q, torch.cat((k, zero), 2), torch.cat((v, zero), 2), mask),
    )
    close(ours, theirs)
    close(grads(ours, *tensors), grads(theirs, *tensors))


# --- packed sequences -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ({}, {"causal": "bottom_right"}, {"causal": "top_left", "window": (5, 0)}), ids=str)
def test_packed_sequences_are_sequences_one_by_one(options, backend, random, poison):
    lengths_q, lengths_k = (5, 0, 33, 1, 12), (7, 4, 33, 0, 40)
    q, k, v = (
        random(sum(n), heads, 8).requires_grad_() for n, heads in ((lengths_q, 4), (lengths_k, 2), (lengths_k, 2))
    )
    packed = varlen(backend, q, k, v, lengths_q, lengths_k, **options)
    parts = [
        sdpa(backend, *(x.transpose(0, 1)[None] for x in sequence), **options)
        for sequence in zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    ]
    alone = torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)
    close(packed, alone)
    close(grads(packed, q, k, v), grads(alone, q, k, v))


def test_a_packed_sequence_does_not_feel_its_neighbours(backend, random, poison):
    lengths = (20, 13, 37)
    q, k, v = (random(70, 2, 16) for _ in range(3))
    out, lse = varlen(backend, q, k, v, lengths, lengths)
    spoil = lambda x: torch.cat((x[:20] * float("nan"), x[20:33], x[33:] * float("nan")))
    others, others_lse = varlen(backend, spoil(q), spoil(k), spoil(v), lengths, lengths)
    assert torch.equal(others[20:33], out[20:33]) and torch.equal(others_lse[:, 20:33], lse[:, 20:33])
    assert torch.isnan(others[:20]).all() and torch.isnan(others[33:]).all()


@pytest.mark.parametrize("lengths", ((), (0,), (0, 0)), ids=str)
def test_packed_batches_of_nothing(lengths, backend, device, poison):
    q, k, v = (torch.zeros(0, heads, 8, device=device, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device)
    out, lse = run(functional.attention_varlen, q, k, v, ends, ends, 0, 0, return_lse=True, backend=backend)
    assert out.shape == (0, 4, 8) and lse.shape == (4, 0)
    for grad, tensor in zip(torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)), (q, k, v), strict=True):
        assert grad.shape == tensor.shape


# --- rows that are special ------------------------------------------------------------------------------------------


@every_dtype
def test_a_row_of_finfo_min_is_the_mean_with_its_true_gradients(dtype, backend, random, poison):
    """As Hugging Face pads; s = finfo.min whatever q . k is, and the derivative of s is still k."""
    q, k, v = (random(1, 1, length, 16, dtype=dtype).requires_grad_() for length in (5, 40, 40))
    mask = torch.full((5, 40), torch.finfo(dtype).min, dtype=dtype, device=q.device, requires_grad=True)
    out, lse = sdpa(backend, q, k, v, mask)
    (dout,) = (random(*out.shape, dtype=dtype),)
    found = torch.autograd.grad(out, (q, k, v, mask), dout)
    wq, wk, wv, wd = (x.detach().double()[0, 0] for x in (q, k, v, dout))
    if torch.finfo(dtype).min < -1e30:  # fp16's -65504 leaves the scores some digits
        close(lse.double(), torch.full_like(lse, torch.finfo(dtype).min).double())
        dp = wd @ wv.T
        ds = (dp - dp.mean(-1, keepdim=True)) / 40
        truth = (wv.mean(0).expand(5, 16), ds @ wk / 4, ds.T @ wq / 4, wd.sum(0).expand(40, 16) / 40, ds)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        for mine, expected in zip((out, *found), truth, strict=True):
            mine = mine.double().reshape(expected.shape)
            assert (mine - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=0.1)
    else:
        case = cases.AttentionCase(SDPA, B=1, H=1, S=5, T=40, D=16, dtype=dtype, mask="finfo_min")
        assert failures(judge(cases, case, backend, q.device.type)) == []


def empty_rows(kind, device):
    """(options, which of 12 queries see no key of 8)."""
    empty = torch.zeros(12, dtype=torch.bool)
    if kind == "causal":
        empty[:4] = True
        return {"causal": "bottom_right"}, empty
    if kind == "window":
        empty[8 + 2 :] = True
        return {"causal": "top_left", "window": (2, -1)}, empty
    empty[1::3] = True
    mask = (~empty)[:, None].expand(12, 8).contiguous().to(device)
    return {"mask": mask if kind == "bool" else torch.zeros(12, 8, device=device).masked_fill(~mask, -torch.inf)}, empty


@pytest.mark.parametrize("sinks", (False, True), ids=("", "sinks"))
@pytest.mark.parametrize("kind", ("causal", "window", "bool", "infinite"))
def test_a_row_without_keys_is_zero_and_has_no_gradient(kind, sinks, backend, random, device, poison):
    q, k, v = (random(2, 2, length, 16).requires_grad_() for length in (12, 8, 8))
    options, empty = empty_rows(kind, device)
    sink = random(2) if sinks else None
    out, lse = sdpa(backend, q, k, v, **options, sinks=sink)
    assert not out[:, :, empty].any() and out[:, :, ~empty].any(-1).all()
    expected = sink[:, None].expand(2, 2, int(empty.sum())) if sinks else torch.full_like(lse[:, :, empty], -torch.inf)
    assert torch.equal(lse[:, :, empty], expected)
    dout, dlse = random(*out.shape), random(*lse.shape)
    only_empty = (dout * empty.to(device)[:, None], dlse * empty.to(device))
    for grad in torch.autograd.grad((out, lse), (q, k, v), only_empty, retain_graph=True):
        assert not grad.any()  # neither a number nor NaN
    for grad in torch.autograd.grad((out, lse), (q, k, v), (dout, dlse)):
        assert torch.isfinite(grad).all()


@every_dtype
def test_nan_comes_out_as_nan(dtype, backend, random, poison):
    tensors = lambda: [random(1, 2, length, 16, dtype=dtype) for length in (20, 37, 37)]
    nan = lambda x: torch.isnan(x[0, 0])
    q, k, v = tensors()
    q[0, 0, 3, 5] = float("nan")
    out, lse = sdpa(backend, q, k, v)
    rows = torch.arange(20, device=q.device) == 3
    assert torch.equal(nan(out), rows[:, None].expand(20, 16)) and torch.equal(nan(lse), rows)
    assert not torch.isnan(out[0, 1]).any()
    q, k, v = tensors()
    k[0, 0, 30, 2] = float("nan")
    out, lse = sdpa(backend, q, k, v, causal="bottom_right")
    assert torch.isnan(out[0, 0, 13:]).all() and torch.isnan(lse[0, 0, 13:]).all() and not nan(lse)[:13].any()
    q, k, v = tensors()
    v[0, 0, 36, 2] = float("nan")
    out, lse = sdpa(backend, q, k, v)
    assert nan(out)[:, 2].all() and not nan(out)[:, 3:].any() and not nan(lse).any()
    q, k, v = tensors()
    mask = torch.zeros(20, 37, dtype=dtype, device=q.device)
    mask[4, 7] = float("nan")
    out, _ = sdpa(backend, q, k, v, mask)
    assert torch.equal(nan(out).all(-1), torch.arange(20, device=q.device) == 4)
    out, _ = sdpa(backend, *(x * 0.1 for x in tensors()), sinks=q.new_tensor([float("nan"), 0.0], dtype=torch.float32))
    assert nan(out).all() and not torch.isnan(out[0, 1]).any()


@pytest.mark.parametrize("S, T", ((0, 5), (5, 0), (0, 0)))
def test_no_queries_and_no_keys(S, T, backend, random, device, poison):
    q, k, v = (random(2, 2, length, 8).requires_grad_() for length in (S, T, T))
    mask, sinks = random(2, 1, S, T).requires_grad_(), random(2).requires_grad_()
    out, lse = sdpa(backend, q, k, v, mask, sinks=sinks, causal="bottom_right")
    assert torch.equal(out, torch.zeros(2, 2, S, 8, device=device))
    assert torch.equal(lse, sinks.detach()[:, None].expand(2, 2, S))
    for grad, tensor in zip(grads((out, lse), q, k, v, mask), (q, k, v, mask), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))
    if not S:
        return
    (dsinks,) = torch.autograd.grad(sdpa(backend, q, k, v, sinks=sinks)[1].sum(), sinks)
    assert torch.equal(dsinks, torch.full_like(dsinks, 10.0))
    assert torch.equal(sdpa(backend, q, k, v)[1], torch.full((2, 2, S), -torch.inf, device=device))


def test_no_heads_and_heads_of_no_elements(backend, random, device, poison):
    q, k, v = (random(2, 2, length, 8).requires_grad_() for length in (5, 7, 7))
    for cut in (lambda x: x[:, :0], lambda x: x[:0]):
        out, lse = sdpa(backend, cut(q), cut(k), cut(v), dropout_p=0.5)
        assert (out.shape, lse.shape) == (cut(q).shape, cut(q).shape[:3])
        assert all(not grad.any() for grad in grads((out, lse), q, k, v))
    out, lse = sdpa(backend, q[..., :0], k[..., :0], v)  # every score is 0
    close((out, lse), (v.mean(2, keepdim=True).expand(2, 2, 5, 8), torch.full((2, 2, 5), 7.0, device=device).log()))
    assert sdpa(backend, q, k, v[..., :0])[0].shape == (2, 2, 5, 0)


# --- integers, whose products and sums are exact ---------------------------------------------------------------------


@pytest.fixture
def integers(device):
    generator = torch.Generator().manual_seed(5)

    def make(*shape, dtype, low=-2, high=2):
        return torch.randint(low, high + 1, shape, generator=generator).to(dtype).to(device)

    return make


@every_dtype
@pytest.mark.parametrize("D, Dv", ((16, 16), (64, 32), (40, 24)))
def test_integers_whose_best_key_takes_all(D, Dv, dtype, backend, integers, poison):
    """With a scale of 32 the second best key weighs 1e-14: rounded to 16 bits, out is a row of v, bit for bit."""
    q, k = (integers(1, 2, length, D, dtype=dtype) for length in (40, 70))
    v = integers(1, 2, 70, Dv, dtype=dtype, low=-9, high=9)
    scores = q.double() @ k.double().transpose(-1, -2)
    best, at = scores.topk(2, -1)
    unique = best[..., 0] > best[..., 1]
    out, lse = sdpa(backend, q, k, v.requires_grad_(), scale=32.0)
    expected = v.detach().gather(2, at[..., :1].expand(-1, -1, -1, Dv))
    assert unique.sum() > 20
    if dtype == torch.float32:
        torch.testing.assert_close(out[unique], expected[unique], rtol=1e-5, atol=1e-5)
    else:
        nonzero = unique[..., None] & (expected != 0)
        assert torch.equal(out[nonzero], expected[nonzero]) and (out - expected)[unique].abs().max() < 1e-6
    torch.testing.assert_close(lse[unique], 32.0 * best[..., 0][unique].float(), rtol=1e-6, atol=1e-4)
    dout = integers(*out.shape, dtype=dtype) * unique[..., None].to(dtype)
    (dv,) = torch.autograd.grad(out, v, dout)
    chosen = torch.nn.functional.one_hot(at[..., 0], 70).double()
    truth = chosen.transpose(-1, -2) @ dout.double()
    assert torch.equal(dv.round(), truth.to(dtype)) and (dv.double() - truth).abs().max() < 1e-3


@every_dtype
@pytest.mark.parametrize("zero", ("q", "k"))
@pytest.mark.parametrize("D, Dv", ((16, 16), (64, 64), (64, 32)))
def test_integers_that_are_all_alike(D, Dv, zero, dtype, backend, integers, poison):
    """Scores of 0 and 64 keys: every weight is 1/64. Each v has its negative beside it, so that delta is 0."""
    q, k = integers(1, 2, 32, D, dtype=dtype), integers(1, 2, 64, D, dtype=dtype)
    q, k = (torch.zeros_like(q), k) if zero == "q" else (q, torch.zeros_like(k))
    half = integers(1, 2, 32, Dv, dtype=dtype, low=-1, high=1)
    v = torch.stack((half, -half), 3).flatten(2, 3)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    out, lse = sdpa(backend, *tensors, scale=0.125)
    assert not out.any()
    close(lse, torch.full_like(lse, 64.0).log())
    dout = integers(*out.shape, dtype=dtype, low=-1, high=1)
    dq, dk, dv = torch.autograd.grad(out, tensors, dout)
    wide = [x.detach().double() for x in (q, k, v, dout)]
    ds = wide[3] @ wide[2].transpose(-1, -2) / 64
    assert torch.equal(dq, (0.125 * ds @ wide[1]).to(dtype))
    assert torch.equal(dk, (0.125 * ds.transpose(-1, -2) @ wide[0]).to(dtype))
    assert torch.equal(dv, (wide[3].sum(2, keepdim=True) / 64).expand_as(wide[2]).to(dtype))


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
@pytest.mark.parametrize("B, H, S, T", ((1, 1, 300, 300), (2, 4, 40, 200), (1, 2, 1, 600)))
def test_bitwise_equal_for_any_thread_count(B, H, S, T, dtype):
    if llmkernels.backends()["cpu"]:
        pytest.skip(f"cpu: {llmkernels.backends()['cpu']}")
    case = cases.AttentionCase(SDPA, B, H, S, T, 32, dtype, Hk=1, causal="bottom_right", sinks=True, dropout=0.1)
    inputs = cases.make_inputs(case)
    assert_same_with_any_threads(lambda: evaluate(cases, case, inputs, "cpu"))
