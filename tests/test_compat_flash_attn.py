"""llmkernels.compat.flash_attn: the signatures of flash-attn 2, and its meaning by definitions, with gradients."""

import inspect
import math

import pytest
import torch

import llmkernels
from llmkernels import functional
from llmkernels.compat import flash_attn
from llmkernels.testing.inputs import short_name

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,"
    " deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {LENGTHS}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": (
        "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,"
        " cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,"
        " window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,"
        " return_softmax_lse=False"
    ),
}


def test_signatures_are_flash_attns():
    assert set(SIGNATURES) == set(flash_attn.__all__)
    for name, expected in SIGNATURES.items():
        function = getattr(flash_attn, name)
        parameters = inspect.signature(function).parameters.values()
        assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == expected
        assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) and len(function.__doc__) > 60


@pytest.fixture
def forced(backend):
    """The backend, forced on every call."""
    if backend not in llmkernels.registry.BACKENDS:
        pytest.skip(f"{backend}: these functions only call those that tests/ops runs there")
    with llmkernels.use_backend(backend):
        yield backend


def definition(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """(out `[S, H, D]`, lse `[H, S]`) of one sequence, key by key what flash-attn's documentation says."""
    rows, heads, dim = q.shape
    keys, group = k.shape[0], heads // k.shape[1]
    q, k, v = q.transpose(0, 1), k.repeat_interleave(group, 1).transpose(0, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(dim) if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    center = torch.arange(rows)[:, None] + keys - rows
    distance = torch.arange(keys) - center
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance.abs()
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(rows, keys, dtype=torch.bool)
    seen &= (distance >= -left) if left >= 0 else True
    seen &= (distance <= right) if right >= 0 else True
    nothing = ~seen.any(-1)
    scores = scores.masked_fill(~(seen | nothing[:, None]), -torch.inf)
    weights = torch.softmax(scores, -1) if keys else scores
    out = (weights @ v.transpose(0, 1)).masked_fill(nothing[:, None], 0.0)
    lse = torch.logsumexp(scores, -1).masked_fill(nothing, -torch.inf) if keys else scores.sum(-1) - torch.inf
    return out.transpose(0, 1), lse


def made(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


SLOPES = 2.0 ** -torch.arange(1.0, 5.0)
OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "causal window": {"causal": True, "window_size": (4, 2)},
    "softcap": {"softcap": 2.0},
    "softcap off": {"softcap": -1.0},
    "alibi": {"alibi_slopes": SLOPES, "causal": True},
    "alibi of a batch": {"alibi_slopes": torch.stack((SLOPES, SLOPES * 0.5)), "deterministic": True},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def expected(q, k, v, options, b=0):
    """`definition` with flash-attn's words."""
    slopes = options.get("alibi_slopes")
    slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
    return definition(
        q, k, v, scale=options.get("softmax_scale"), causal=options.get("causal", False),
        window=options.get("window_size", (-1, -1)), softcap=options.get("softcap", 0.0),
        slopes=None if slopes is None else slopes.double(),
    )  # fmt: skip


def check(ours, theirs, ours_of, theirs_of):
    """(out, lse, None) against (out, lse) in fp64, and the gradients of both with respect to one tensor each."""
    assert len(ours) == 3 and ours[2] is None
    near = {"rtol": 1e-4, "atol": 2e-5} if ours_of.dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for mine, other in zip(ours[:2], theirs, strict=True):
        torch.testing.assert_close(mine.double().cpu(), other, **near)
    dout = made(*theirs[0].shape, seed=9)
    found = torch.autograd.grad((ours[0].double().cpu() * dout).sum(), ours_of)[0]
    wanted = torch.autograd.grad((theirs[0] * dout).sum(), theirs_of, retain_graph=True)[0]
    torch.testing.assert_close(found.double().cpu(), wanted, **near)


def leaves(tensor, device):
    """The tensor on the device, and the same in fp64."""
    return tensor.to(device).requires_grad_(), tensor.double().requires_grad_()


def on(device, options):
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}


@every_option
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=short_name)
def test_qkvpacked(options, dtype, forced, device):
    mine, wide = leaves(made(2, 9, 3, 4, 16, dtype=dtype), device)
    ours = flash_attn.flash_attn_qkvpacked_func(mine, return_attn_probs=True, **on(device, options))
    theirs = [torch.stack(x) for x in zip(*(expected(*wide[b].unbind(1), options, b) for b in range(2)), strict=True)]
    check(ours, theirs, mine, wide)


@every_option
@pytest.mark.parametrize("rows, keys", ((5, 9), (9, 5)))
def test_kvpacked_and_apart_with_fewer_key_heads(options, rows, keys, forced, device):
    q = made(2, rows, 4, 16, seed=1)
    mine, wide = leaves(made(2, keys, 2, 2, 16), device)
    theirs = [
        torch.stack(x)
        for x in zip(*(expected(q.double()[b], *wide[b].unbind(1), options, b) for b in range(2)), strict=True)
    ]
    given = {"return_attn_probs": True, **on(device, options)}
    check(flash_attn.flash_attn_kvpacked_func(q.to(device), mine, **given), theirs, mine, wide)
    k, v = mine.unbind(2)
    check(flash_attn.flash_attn_func(q.to(device), k, v, **given), theirs, mine, wide)
    query, wide_query = leaves(q, device)
    theirs = [
        torch.stack(x)
        for x in zip(*(expected(wide_query[b], *wide.detach()[b].unbind(1), options, b) for b in range(2)), strict=True)
    ]
    check(flash_attn.flash_attn_func(query, k.detach(), v.detach(), **given), theirs, query, wide_query)
    out = flash_attn.flash_attn_func(query, k, v, **on(device, options))
    assert isinstance(out, torch.Tensor) and out.shape == q.shape and out.is_contiguous()


ROWS, KEYS = (3, 0, 6), (7, 2, 5)


def ends(lengths, device):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)


def packed(options, q, kv, rows, keys):
    """The definition of packed sequences, `kv` `[total, 2, Hk, D]`."""
    parts = [
        expected(x, *y.unbind(1), options, b)
        for b, (x, y) in enumerate(zip(q.split(rows), kv.split(keys), strict=True))
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)


@every_option
def test_varlen_and_its_packed_forms(options, forced, device):
    if getattr(options.get("alibi_slopes"), "ndim", 1) == 2:
        options = {**options, "alibi_slopes": torch.stack((SLOPES, SLOPES * 0.5, SLOPES * 0.1))}
    q = made(9, 4, 16, seed=1)
    mine, wide = leaves(made(14, 2, 2, 16), device)
    given = {"return_attn_probs": True, **on(device, options)}
    lengths = (ends(ROWS, device), ends(KEYS, device), 6, 7)
    theirs = packed(options, q.double(), wide, ROWS, KEYS)
    check(flash_attn.flash_attn_varlen_kvpacked_func(q.to(device), mine, *lengths, **given), theirs, mine, wide)
    k, v = mine.unbind(1)
    check(flash_attn.flash_attn_varlen_func(q.to(device), k, v, *lengths, **given), theirs, mine, wide)
    mine, wide = leaves(made(14, 3, 4, 16), device)
    theirs = packed(options, wide[:, 0], wide[:, 1:], KEYS, KEYS)
    check(flash_attn.flash_attn_varlen_qkvpacked_func(mine, ends(KEYS, device), 7, **given), theirs, mine, wide)


def test_varlen_with_pages_and_their_gradient(forced, device):
    q = made(9, 4, 16, seed=1)
    pages, wide = leaves(made(5, 4, 2, 2, 16), device)  # [pages, page_size, 2, Hk, D]
    table = torch.tensor([[3, 0], [2, -1], [4, 1]], dtype=torch.int32)
    rows = [wide[table[b].clamp(min=0)].flatten(0, 1)[:length] for b, length in enumerate(KEYS)]
    theirs = packed({"causal": True}, q.double(), torch.cat(rows), ROWS, KEYS)
    lengths = (ends(ROWS, device), ends(KEYS, device), 6, 7)
    given = {"causal": True, "return_attn_probs": True, "block_table": table.to(device)}
    ours = flash_attn.flash_attn_varlen_func(q.to(device), *pages.unbind(2), *lengths, **given)
    check(ours, theirs, pages, wide)


def test_dropout_is_that_of_scaled_dot_product_attention(forced, device):
    q, k, v = (made(2, 6, 4, 16, seed=seed).to(device) for seed in range(3))
    torch.manual_seed(3)
    ours, lse, pattern = flash_attn.flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
    torch.manual_seed(3)
    theirs = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.4, causal="bottom_right", return_lse=True
    )
    torch.testing.assert_close((ours, lse), (theirs[0].transpose(1, 2), theirs[1]))
    assert pattern is None


# --- the cache ------------------------------------------------------------------------------------------------------

GARBAGE = float("nan")
CACHE_CASES = [(name, "first rows", None) for name in OPTIONS]
CACHE_CASES += [("causal", where, rotary) for where in ("first rows", "batch index", "left padding", "both", "pages")
                for rotary in (None, "interleaved", "half")]  # fmt: skip
CACHE_CASES += [(name, where, "interleaved") for name in ("plain", "window") for where in ("first rows", "both")]


def turned(x, first, kind):
    """Rows `[n, H, D]` turned as from position `first` on, the first 8 elements of each."""
    at = (torch.arange(x.shape[0]) if kind["each"] else torch.zeros(x.shape[0])) + first
    angles = at[:, None] / 10.0 ** (torch.arange(4) / 4.0)
    turn = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    pairs = x[..., :8].unflatten(-1, (4, 2)) if kind["interleaved"] else x[..., :8].unflatten(-1, (2, 4)).mT
    pairs = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    pairs = pairs.flatten(-2) if kind["interleaved"] else pairs.mT.flatten(-2)
    return torch.cat((pairs, x[..., 8:]), -1)


@pytest.mark.parametrize("name, where, rotary", dict.fromkeys(CACHE_CASES))
def test_kvcache(name, where, rotary, forced, device):
    options = {word: value for word, value in OPTIONS[name].items() if word != "deterministic"}
    lengths, padding, new, room = (6, 9), (2, 5), 3, 14
    rows = {"batch index": (3, 1), "both": (3, 1)}.get(where, (0, 1))
    padding = padding if where in ("left padding", "both") else (0, 0)
    q, k, v = made(2, 3, 4, 16, seed=1), made(2, new, 2, 16, seed=2), made(2, new, 2, 16, seed=3)
    old = made(2, 2, room, 2, 16, seed=4)
    caches = [torch.full((4, room, 2, 16), GARBAGE) for _ in range(2)]
    for cache, filled in zip(caches, old, strict=True):
        for b, row in enumerate(rows):
            cache[row, padding[b] : lengths[b]] = filled[b, padding[b] : lengths[b]]
    ints = lambda values: torch.tensor(values, dtype=torch.int32, device=device)
    given = {"cache_seqlens": ints(lengths), **on(device, options)}
    if where in ("batch index", "both"):
        given["cache_batch_idx"] = ints(rows)
    if where in ("left padding", "both"):
        given["cache_leftpad"] = ints(padding)
    mine = [cache.to(device) for cache in caches]
    if where == "pages":
        given["block_table"] = ints([[5, 2], [7, 0]])
        mine = []
        for cache in caches:
            paged = torch.full((8, 7, 2, 16), GARBAGE)
            paged[[5, 2]], paged[[7, 0]] = cache[0].unflatten(0, (2, 7)), cache[1].unflatten(0, (2, 7))
            mine.append(paged.to(device))
    if rotary is not None:
        angles = torch.arange(20.0)[:, None] / 10.0 ** (torch.arange(4) / 4.0)
        given |= {"rotary_cos": angles.cos().to(device), "rotary_sin": angles.sin().to(device)}
        given |= {} if rotary == "interleaved" else {"rotary_interleaved": False}
    new_rows = {"k": k.to(device), "v": v.to(device)}
    out, lse = flash_attn.flash_attn_with_kvcache(
        q.to(device), *mine, **new_rows, num_splits=3, return_softmax_lse=True, **given
    )
    ordered = options.get("causal", False) or "window_size" in options
    for b in range(2):
        query, keys = q[b].double(), k[b].double()
        if rotary is not None:
            query = turned(query, lengths[b], {"each": ordered, "interleaved": rotary == "interleaved"})
            keys = turned(keys, lengths[b], {"each": True, "interleaved": rotary == "interleaved"})
        keys = torch.cat((old[0, b, padding[b] : lengths[b]].double(), keys))
        values = torch.cat((old[1, b, padding[b] : lengths[b]], v[b])).double()
        wanted = expected(query, keys, values, options, b)
        for found, other in zip((out[b], lse[b]), wanted, strict=True):
            torch.testing.assert_close(found.double().cpu(), other, rtol=1e-4, atol=2e-5)
        if where != "pages":
            written = mine[0][rows[b], lengths[b] : lengths[b] + new]
            torch.testing.assert_close(written.double().cpu(), keys[-new:], rtol=1e-5, atol=1e-5)


def test_kvcache_without_an_append(forced, device):
    q, k, v = (made(3, rows, 2, 16, seed=rows).to(device) for rows in (2, 5, 6))
    v = v[:, :5]
    out = flash_attn.flash_attn_with_kvcache(q[:2], k, v, cache_seqlens=4)  # a cache for more sequences than there are
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, k[:, :4], v[:, :4])[:2])
    whole = flash_attn.flash_attn_with_kvcache(q, k, v)
    torch.testing.assert_close(whole, flash_attn.flash_attn_func(q, k, v))
    padded = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    out = flash_attn.flash_attn_with_kvcache(q, k.contiguous(), v.contiguous(), cache_leftpad=padded)
    torch.testing.assert_close(out[:1], whole[:1])
    torch.testing.assert_close(out[1:2], flash_attn.flash_attn_func(q[1:2], k[1:2, 2:], v[1:2, 2:]))
    assert not bool(out[2].any())


def test_calls_are_one_graph_of_a_compiler(forced, device):
    if forced == "triton" and device == "cpu":
        pytest.skip("triton: an interpreted kernel cannot be traced into a compiled graph's runtime checks")
    torch._dynamo.reset()
    q, k, v = (made(2, n, 4, 16, seed=n).to(device) for n in (3, 8, 9))
    v = v[:, :8].clone()
    ints = lambda *values: torch.tensor(values, dtype=torch.int32, device=device)

    def calls(q, k, v, k_cache, v_cache):
        options = {"causal": True, "window_size": (4, 0), "softcap": 5.0}
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        return (
            *flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)[:2],
            flash_attn.flash_attn_varlen_func(*packed, ints(0, 3, 6), ints(0, 8, 16), 3, 8, **options),
            flash_attn.flash_attn_with_kvcache(
                q, k_cache, v_cache, k[:, :3], v[:, :3], cache_seqlens=ints(2, 1), cache_batch_idx=ints(1, 0), **options
            ),
        )

    mine, theirs = (k.clone(), v.clone()), (k.clone(), v.clone())
    compiled = torch.compile(calls, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, *mine), calls(q, k, v, *theirs))
    torch.testing.assert_close(mine, theirs)
    assert not torch.equal(mine[0], k)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_bad_arguments_have_one_clear_message_and_nothing_is_written():
    q, k, v = made(2, 3, 4, 16), made(2, 8, 2, 16), made(2, 8, 2, 16)
    k_cache, v_cache = k.clone(), v.clone()
    ints = lambda *values: torch.tensor(values, dtype=torch.int32)
    new = {"k": k[:, :3], "v": v[:, :3], "cache_seqlens": ints(1, 2)}
    cache = lambda **options: flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, **{**new, **options})
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    packed_k = lambda table, lengths=(0, 6, 9): flash_attn.flash_attn_varlen_func(
        q.flatten(0, 1), k, v, ints(0, 3, 6), ints(*lengths), 3, 9, block_table=table
    )
    wrong = [
        ("flash_attn_func: q has shape .3, 4, 16., expected .batch", lambda: flash_attn.flash_attn_func(q[0], k, v)),
        ("flash_attn_func: k has a batch of 1, expected 2", lambda: flash_attn.flash_attn_func(q, k[:1], v)),
        ("query has 3 heads, expected a multiple of 2", lambda: flash_attn.flash_attn_func(q[:, :, :3], k, v)),
        ("window is .-2, 0., expected", lambda: flash_attn.flash_attn_func(q, k, v, window_size=(-2, 0))),
        ("dropout_p is 1.5, expected", lambda: flash_attn.flash_attn_func(q, k, v, 1.5)),
        (r"flash_attn_kvpacked_func: kv has shape \(2, 8, 2, 16\), expected \(batch, seqlen, 2",
         lambda: flash_attn.flash_attn_kvpacked_func(q, k)),
        (r"flash_attn_qkvpacked_func: qkv has shape \(2, 2, 2, 2, 16\), expected \(batch, seqlen, 3",
         lambda: flash_attn.flash_attn_qkvpacked_func(made(2, 2, 2, 2, 16))),
        (r"flash_attn_varlen_qkvpacked_func: qkv has shape \(2, 3, 16\)",
         lambda: flash_attn.flash_attn_varlen_qkvpacked_func(made(2, 3, 16), ints(0, 2), 2)),
        ("flash_attn_varlen_func: a sequence has 9 keys, expected no more than 8", lambda: packed_k(table, (0, 9, 9))),
        (r"block_table has shape \(1, 1\), expected \(2, pages", lambda: packed_k(table[:1])),
        ("block_table has pages from 0 to 2, expected 0 to 1", lambda: packed_k(table * 2)),
        ("cache_seqlens.1. is 6 and 3 keys are appended", lambda: cache(cache_seqlens=ints(1, 6))),
        ("cache_batch_idx.1. is 2, expected 0 to 1", lambda: cache(cache_batch_idx=ints(0, 2))),
        (r"cache_batch_idx has shape \(1,\), expected \(2,\)", lambda: cache(cache_batch_idx=ints(0))),
        ("cache_leftpad.1. is 3, expected no more than 2, its length", lambda: cache(cache_leftpad=ints(1, 3))),
        ("cache_seqlens.1. is 6, expected 0 to 5", lambda: cache(cache_leftpad=ints(0, 0), cache_seqlens=ints(1, 6))),
        ("cache_leftpad is given with a block_table", lambda: cache(cache_leftpad=ints(0, 0), block_table=table)),
        ("cache_batch_idx is given with a block_table", lambda: cache(cache_batch_idx=ints(0, 0), block_table=table)),
        ("num_splits is -1, expected 0", lambda: cache(num_splits=-1)),
        ("one of rotary_cos and rotary_sin is given", lambda: cache(rotary_cos=made(8, 4))),
        ("cos has 4 positions, expected at least 5", lambda: cache(rotary_cos=made(4, 4), rotary_sin=made(4, 4))),
        ("cos has 4 positions, expected at least 5",
         lambda: cache(rotary_cos=made(4, 4), rotary_sin=made(4, 4), cache_leftpad=ints(0, 0))),
        ("in one piece, for cache_leftpad",
         lambda: flash_attn.flash_attn_with_kvcache(q, made(2, 16, 2, 16)[:, :8], v_cache, cache_leftpad=ints(0, 0))),
        ("rotary is given without k and v",
         lambda: flash_attn.flash_attn_with_kvcache(q, k, v, rotary_cos=made(8, 4), rotary_sin=made(8, 4))),
        ("cache_seqlens is missing", lambda: cache(cache_seqlens=None)),
        ("cache_seqlens is missing", lambda: cache(cache_seqlens=None, cache_leftpad=ints(0, 0))),
        ("query requires a gradient",
         lambda: flash_attn.flash_attn_with_kvcache(q.clone().requires_grad_(), k_cache, v_cache)),
    ]  # fmt: skip
    for message, wrong_call in wrong:
        with pytest.raises(ValueError, match=message):
            wrong_call()
    assert torch.equal(k_cache, k) and torch.equal(v_cache, v)
