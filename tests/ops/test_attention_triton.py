"""Attention in Triton: the kernel for a cache against the reference in fp64, with several shares of the keys and one;
keys and values by descriptors and by pointers."""

import pytest
import torch

import llmkernels
from llmkernels import functional
from llmkernels.ops.attention import reference
from llmkernels.testing.compare import compare_rows
from llmkernels.testing.inputs import short_name
from tests.conftest import absent, device_of

pytestmark = pytest.mark.skipif(absent("triton") is not None, reason=f"triton: {absent('triton')}")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What differs from B=2, H=4, Hk=4, S=1, D=16 and a cache of 150 keys, all of them in use.
CASES = {
    "plain": {},
    "lengths": {"lengths": (150, 37)},
    "no_keys": {"lengths": (0, 3), "sinks": True},
    "paged": {"lengths": (150, 65), "page": 16},
    "odd_page": {"lengths": (44, 131), "page": 24, "Hk": 2},
    "prefill": {"S": 19, "lengths": (150, 40), "window": (-1, 0)},
    "prefill_longer_than_keys": {"S": 30, "lengths": (10, 29), "window": (-1, 0)},
    "top_left": {"S": 9, "window": (20, 0), "top_left": True},
    "window": {"S": 3, "window": (40, 0), "lengths": (150, 90)},
    "softcap": {"softcap": 5.0},
    "alibi": {"alibi": True, "lengths": (100, 150)},
    "sinks": {"sinks": True},
    "gqa": {"Hk": 1, "S": 5},
    "dv": {"Dv": 40, "D": 24},
    "together": {"S": 20, "Hk": 2, "D": 64, "lengths": (149, 70), "page": 32, "window": (60, 0), "softcap": 8.0,
                 "alibi": True, "sinks": True},
}  # fmt: skip


def make(dtype, B=2, H=4, Hk=4, S=1, D=16, Dv=None, T=150, lengths=None, page=None, window=(-1, -1), top_left=False,
         softcap=0.0, alibi=False, sinks=False):  # fmt: skip
    """Arguments of the op. What no sequence uses of the cache is NaN."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    q, k, v = normal(B, H, S, D), normal(B, Hk, T, D), normal(B, Hk, T, Dv or D)
    table = None
    for b, length in enumerate(lengths or ()):
        k[b, :, length:], v[b, :, length:] = torch.nan, torch.nan
    if page is not None:
        pages = -(-T // page)
        table = torch.randperm(B * pages + 3, generator=generator)[: B * pages].view(B, pages).to(torch.int32)
        k, v = (_paged(cache, table, page) for cache in (k, v))
    slopes = torch.linspace(0.5, 0.1, B * H).view(B, H) if alibi else None
    sink = torch.linspace(-1.0, 2.0, H) if sinks else None
    seqlens = torch.tensor(lengths, dtype=torch.int32) if lengths else None
    return [q, k, v, slopes, sink, seqlens, table, D**-0.5, *window, top_left, softcap]


def _paged(cache, table, page):
    """[B, Hk, T, D] as pages in the order of the table; those that no sequence has are NaN."""
    batch, heads, keys, dim = cache.shape
    whole = torch.full((batch, heads, table.shape[1] * page, dim), torch.nan, dtype=cache.dtype)
    whole[:, :, :keys] = cache
    pages = torch.full((table.numel() + 3, heads, page, dim), torch.nan, dtype=cache.dtype)
    pages[table.flatten().long()] = whole.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
    return pages


def wide(arguments):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments]


def on_device(arguments):
    device = device_of("triton")
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.fixture(params=(64, 10**6), ids=("split", "whole"))
def shares(request, monkeypatch):
    from llmkernels.ops.attention import triton_kvcache

    monkeypatch.setattr(triton_kvcache, "KEYS_PER_SPLIT", request.param)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=short_name)
def test_kvcache_matches_fp64_truth(dtype, name, shares):
    arguments = make(dtype, **CASES[name])
    truth = reference.attention_kvcache_fwd(*wide(arguments))
    baseline = reference.attention_kvcache_fwd(*arguments)
    results = [x.cpu() for x in torch.ops.llmkernels_triton.attention_kvcache_fwd(*on_device(arguments))]
    stats = lambda row_max, log_sum: row_max + log_sum
    assert results[0].stride() == baseline[0].stride()
    rows = lambda x: x.reshape(-1, x.shape[-1])
    floor = torch.ones(rows(truth[0]).shape[0], dtype=torch.float64)  # the size of the values
    assert compare_rows(*(rows(x[0]) for x in (results, truth, baseline)), floor=floor).message is None
    torch.testing.assert_close(stats(*results[1:]).double(), stats(*truth[1:]), rtol=1e-5, atol=1e-5)
    assert torch.equal(results[1] == -torch.inf, truth[1] == -torch.inf)


@pytest.mark.parametrize("layout", ("rows between heads", "every second column", "misaligned"))
def test_kvcache_layouts(layout, shares):
    arguments = make(torch.float32, S=3, Hk=2)
    expected = torch.ops.llmkernels_triton.attention_kvcache_fwd(*on_device(arguments))

    def strange(x):
        if layout == "rows between heads":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "every second column":
            return torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
        return torch.cat((torch.zeros(1), x.flatten()))[1:].view(x.shape)

    arguments[:3] = map(strange, arguments[:3])
    for got, want in zip(
        torch.ops.llmkernels_triton.attention_kvcache_fwd(*on_device(arguments)), expected, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_kvcache_without_rows():
    arguments = make(torch.float32)
    arguments[0] = arguments[0][:, :, :0]
    out, row_max, log_sum = torch.ops.llmkernels_triton.attention_kvcache_fwd(*on_device(arguments))
    assert (out.shape, row_max.shape, log_sum.shape) == ((2, 4, 0, 16), (2, 4, 0), (2, 4, 0))


# --- descriptors ----------------------------------------------------------------------------------------------------


def _rows_between_heads(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _within_nan(x):
    """With NaN behind the last row and the last column of each head."""
    batch, heads, count, dim = x.shape
    whole = torch.full((batch, heads, count + 3, dim + 8), torch.nan, dtype=x.dtype, device=x.device)
    whole[:, :, :count, :dim] = x
    return whole[:, :, :count, :dim]


DESCRIBED = {
    "contiguous": lambda x: x,
    "rows between heads": _rows_between_heads,
    "NaN around": _within_nan,
    "strange strides of single elements": lambda x: x[:1, :1].as_strided((1, 1, *x.shape[2:]), (3, 5, x.shape[3], 1)),
}
NOT_DESCRIBED = {
    "expanded heads": lambda x: x[:, :1].expand(-1, 2, -1, -1),
    "odd row stride": lambda x: torch.cat((x, x[..., :3]), -1)[..., :-3],
    "misaligned": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "every second column": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
    "nothing": lambda x: x[:, :, :0],
}


@pytest.mark.parametrize("layout", DESCRIBED | NOT_DESCRIBED)
def test_what_descriptors_are_made_for(layout):
    from llmkernels._triton import described, has_tma

    x = torch.randn(2, 2, 70, 40, dtype=torch.bfloat16, device=device_of("triton"))
    tensor = (DESCRIBED | NOT_DESCRIBED)[layout](x)
    found = described(tensor, 64, 64)
    assert (found is not None) == (layout in DESCRIBED and has_tma(x))
    if found is not None:
        assert found.block_shape == [1, 1, 64, 64] and found.base is tensor


@pytest.mark.parametrize("options", ({}, {"causal": "bottom_right"}, {"window": (20, 9)}, {"dropout_p": 0.3}), ids=str)
@pytest.mark.parametrize("layout", DESCRIBED)
def test_descriptors_read_what_pointers_read(layout, options, monkeypatch):
    from llmkernels import _triton

    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).bfloat16().to(device_of("triton"))
    q, k, v = (DESCRIBED[layout](x) for x in (normal(2, 2, 50, 40), normal(2, 2, 90, 40), normal(2, 2, 90, 24)))
    made = []
    usual = _triton.TensorDescriptor
    monkeypatch.setattr(_triton, "TensorDescriptor", lambda *args: made.append(usual(*args)) or made[-1])

    def attend():
        torch.manual_seed(3)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        found = functional.scaled_dot_product_attention(*leaves, return_lse=True, backend="triton", **options)
        dout = _rows_between_heads(torch.linspace(-1, 1, found[0].numel()).view(found[0].shape).to(q))
        return *found, *torch.autograd.grad(found[0], leaves, dout)

    results = attend()
    assert len(made) == (6 if _triton.has_tma(q) else 0)  # two for each of the three kernels
    monkeypatch.setattr(_triton, "has_tma", lambda tensor: False)
    for one, other in zip(results, attend(), strict=True):
        torch.testing.assert_close(one, other)  # products of other instructions may round otherwise
        assert not torch.isnan(one).any()
    assert len(made) <= 6


def test_head_dims_that_no_tile_holds_are_refused():
    x = torch.ones(1, 1, 2, 513, device=device_of("triton"))
    with pytest.raises(llmkernels.NoBackendError, match="head_dim is 513, more than 512"):
        functional.scaled_dot_product_attention(x, x, x, backend="triton")
