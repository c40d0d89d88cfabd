"""The Triton kernel of attention to a cache, against the reference in fp64, with several shares of the keys and one."""

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


def test_head_dims_that_no_tile_holds_are_refused():
    x = torch.ones(1, 1, 2, 513, device=device_of("triton"))
    with pytest.raises(llmkernels.NoBackendError, match="head_dim is 513, more than 512"):
        functional.scaled_dot_product_attention(x, x, x, backend="triton")
