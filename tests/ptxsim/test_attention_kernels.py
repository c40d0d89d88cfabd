"""The CUDA attention kernels beyond the battery of tests/ops: caches, values that nobody checked, schedules, work."""

import dataclasses

import pytest
import torch

from llmkernels import functional
from llmkernels.ops.attention import cases, reference
from llmkernels.testing.battery import evaluate, failures, judge
from tests.ptxsim import backend as simulated
from tests.ptxsim import golden_cases, goldens, sim

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=f"ptxsim: {sim.absent()}")
on_both = pytest.mark.parametrize("backend", tuple(simulated.CUDA))
SDPA, VARLEN = cases.OPS
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def kernel(backend: str, name: str):
    return getattr(getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}"), name).default


@pytest.mark.parametrize("case", list(golden_cases.PARTS["attention"]()), ids=lambda case: case.name)
def test_tile_products_are_exact(case):
    own, stream = (tensor.double() for tensor in case.args[:2])
    found = goldens.interpreted(case).double().unflatten(1, (12, 2, 2))
    g, t = torch.arange(32) // 4, torch.arange(32) % 4
    rows = g[:, None, None, None] + 8 * torch.arange(2)[:, None]
    scores = own @ stream.T
    side = torch.arange(2)
    columns = 8 * torch.arange(4)[:, None, None] + 2 * t[:, None, None, None] + side
    assert torch.equal(found[:, :4], scores[rows, columns])
    if case.name.endswith("f32"):  # four neighbours of two tiles
        n = torch.arange(8)[:, None, None]
        columns = n // 2 * 16 + n % 2 * 2 + 4 * t[:, None, None, None] + side
    else:
        columns = 8 * torch.arange(8)[:, None, None] + 2 * t[:, None, None, None] + side
    rounded = scores.to(case.args[0].dtype).double()
    assert torch.equal(found[:, 4:], (rounded @ stream)[rows, columns])


@dataclasses.dataclass(frozen=True)
class Cache:
    """One call of attention_kvcache_fwd."""

    lengths: tuple[int, ...] = (150, 3, 0, 77)
    T: int = 160
    H: int = 4
    Hk: int = 2
    S: int = 1
    D: int = 64
    Dv: int | None = None
    dtype: torch.dtype = torch.bfloat16
    page: int | None = None
    window: tuple[int, int] = (-1, -1)
    top_left: bool = False
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    multiprocessors: int = 1

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self)
                   if getattr(self, f.name) != f.default]  # fmt: skip
        return "-".join(changed).replace("torch.", "").replace(" ", "") or "plain"

    def arguments(self, garbage: float) -> tuple:
        """Arguments of the op; what is beyond the lengths is `garbage`, and so are pages of nobody."""
        generator = torch.Generator().manual_seed(1)
        normal = lambda *shape: torch.randn(shape, generator=generator).to(self.dtype)
        B, Dv = len(self.lengths), self.Dv or self.D
        q = normal(B, self.H, self.S, self.D)
        k, v = normal(B, self.Hk, self.T, self.D), normal(B, self.Hk, self.T, Dv)
        for b, length in enumerate(self.lengths):
            k[b, :, length:], v[b, :, length:] = garbage, garbage
        table = None
        if self.page is not None:
            pages = -(-self.T // self.page)
            table = torch.randperm(B * pages + 3, generator=generator)[: B * pages].view(B, pages).int()
            k, v = (self.paged(x, table, garbage) for x in (k, v))
        slopes = torch.linspace(0.1, 1.0, B * self.H).view(B, self.H) if self.alibi else None
        sinks = torch.linspace(-1.0, 2.0, self.H) if self.sinks else None
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        return (q, k, v, slopes, sinks, lengths, table, self.D**-0.5, *self.window, self.top_left, self.softcap)

    def paged(self, x: torch.Tensor, table: torch.Tensor, garbage: float) -> torch.Tensor:
        B, heads, T, dim = x.shape
        padded = torch.cat((x, x.new_full((B, heads, -T % self.page, dim), garbage)), 2)
        pages = padded.unflatten(2, (-1, self.page)).permute(0, 2, 1, 3, 4).flatten(0, 1)
        found = x.new_full((B * table.shape[1] + 3, *pages.shape[1:]), garbage)
        found[table.flatten().long()] = pages
        return found


CACHES = [
    Cache(), Cache(dtype=torch.float32), Cache(dtype=torch.float16), Cache(S=5, window=(-1, 0)), Cache(S=40, D=32),
    Cache(page=16), Cache(page=24, S=3, window=(40, 0), Hk=1), Cache(page=16, S=40, window=(-1, 0), D=24, Dv=40),
    Cache(D=128, H=8, Hk=1), Cache(D=256, T=90, lengths=(80, 90)), Cache(D=256, T=40, lengths=(40, 9), dtype=torch.float32),
    Cache(D=128, dtype=torch.float32, Dv=100), Cache(D=30, Dv=7), Cache(softcap=3.0, alibi=True, sinks=True),
    Cache(softcap=3.0, alibi=True, sinks=True, S=40, page=32, top_left=True, window=(60, 60)), Cache(H=32, Hk=1),
    *(Cache((1500, 3, 700), 1500, multiprocessors=16, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)),
    Cache((1500, 3, 700), 1500, multiprocessors=16, page=64, sinks=True, window=(900, 0), S=2),
]  # fmt: skip


@pytest.mark.parametrize("case", CACHES, ids=str)
@on_both
def test_cache_is_the_reference(case, backend):
    expected = reference.attention_kvcache_fwd(*case.arguments(0.0))
    with sim.device(multiprocessors=case.multiprocessors):
        found = kernel(backend, "attention_kvcache_fwd")(*case.arguments(torch.nan))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=ROUNDING[case.dtype], atol=ROUNDING[case.dtype])


def test_a_long_cache_is_split():
    case = Cache((1500,), 1500, H=4, Hk=1, multiprocessors=16)
    with sim.device(multiprocessors=16, record=True) as launches:
        kernel("cuda-sim-sm80", "attention_kvcache_fwd")(*case.arguments(0.0))
    grids = {launch["kernel"].partition("<")[0].split("::")[-1]: launch["grid"][0] for launch in launches.all}
    assert grids == {"attention_kvcache_kernel": 6, "attention_kvcache_merge_kernel": 1}


@pytest.mark.parametrize("S", (1, 40))
def test_no_value_of_a_table_or_a_length_reads_outside(S):
    """On a GPU nobody has looked at them. The result is not defined; an access outside the tensors would raise."""
    q, k, v, slopes, sinks, lengths, table, *rest = Cache(page=16, S=S).arguments(0.0)
    wild = [-(2**31), 2**31 - 1, -1, 10**6]
    table.view(-1)[::3] = torch.tensor(wild).int().repeat(len(table.view(-1)))[: len(table.view(-1)[::3])]
    for change in (0, 1, 2):
        lengths = torch.tensor(wild[change:] + wild[:change]).int()
        out, *_ = kernel("cuda-sim-sm80", "attention_kvcache_fwd")(q, k, v, slopes, sinks, lengths, table, *rest)
        assert torch.isfinite(out).all()


def test_no_value_of_cu_seqlens_reads_or_writes_outside():
    """Sequences that overlap are written twice: only the bounds are checked."""
    q, k, v = (torch.randn(1, 2, 30, 16) for _ in range(3))
    dout, options = torch.randn_like(q), (0.25, -1, 0, False, 0.0, 0.0)
    for ends in ((0, 40, 20, 30), (-5, 10, 2**31 - 1, -(2**31)), (25, 5, 30, 7)):
        cu = torch.tensor(ends).int()
        absent = (None, None, None, None)
        tensors = (q, k, v, *absent, cu, cu, 30)
        with sim.device(check=False):
            out, top, total = kernel("cuda-sim-sm80", "attention_fwd")(*tensors, *options)
            kernel("cuda-sim-sm80", "attention_bwd")(
                dout, None, *tensors, 30, out, top, total, *options, (True, True, True, False, False)
            )


SCHEDULED = [
    cases.AttentionCase(SDPA, B=1, H=2, Hk=1, S=70, T=150, D=64, dtype=torch.bfloat16, causal="bottom_right"),
    cases.AttentionCase(SDPA, B=1, H=2, S=70, T=90, D=24, dtype=torch.float16, mask="additive", mask_shape="ST"),
    cases.AttentionCase(SDPA, B=1, H=1, S=40, T=90, D=16, dtype=torch.float32, dropout=0.2, sinks=True),
    cases.AttentionCase(VARLEN, H=1, D=128, dtype=torch.bfloat16, lengths=((70, 3), (90, 20))),
]


@pytest.mark.parametrize("async_mode", ("eager", "lazy", "random"))
@pytest.mark.parametrize("case", SCHEDULED, ids=str)
@on_both
def test_schedules_do_not_change_a_bit(case, backend, async_mode):
    simulated.assert_same_in_any_schedule(cases, case, backend, async_mode)


def _filled(name: str, value: float):
    def edit(tensors):
        tensors[name][0, 0, 5] = value

    return edit


HARD = {
    "nan_q": (_filled("q", torch.nan), {}),
    "nan_k": (_filled("k", torch.nan), {"causal": "top_left"}),
    "nan_v": (_filled("v", torch.nan), {"causal": "top_left"}),
    "inf_k": (_filled("k", torch.inf), {}),
    "large": (lambda tensors: tensors["q"].mul_(1e4), {}),
    "tiny": (lambda tensors: tensors["v"].mul_(1e-20), {}),
    "scale_negative": (None, {"scale": -0.3}),
    "scale_zero": (None, {"scale": 0.0}),
    "dropout_all": (None, {"dropout_p": 1.0}),
    "sink_infinite": (None, {"sinks": torch.tensor([-torch.inf, 3.0]), "window": (0, 0)}),
    "sink_nan": (None, {"sinks": torch.tensor([torch.nan, 3.0])}),
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("name", HARD)
def test_hard_values(name, dtype):
    """NaN and Inf where the reference has them, of the plain kernels (bf16) and the general ones."""
    edit, options = HARD[name]
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(1, 2, 40, 16, generator=generator).to(dtype) for key in "qkv"}
    if edit is not None:
        edit(tensors)
    found = []
    for backend in ("cuda-sim-sm80", "torch"):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
        results = functional.scaled_dot_product_attention(*leaves, return_lse=True, backend=backend, **options)
        grads = torch.autograd.grad(results, leaves, [torch.ones_like(result) for result in results])
        found.append([x.detach().float() for x in (*results, *grads)])
    rounding = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding, equal_nan=True)


# Tiles end at 31, 32, 63, 64, ...; a warp's rows too. An entry of a window one off shows in one of these.
EDGES = [
    cases.AttentionCase(SDPA, B=1, H=1, S=S, T=T, D=16, causal=causal, window=window, dtype=torch.bfloat16)
    for S, T, causal, window in (
        (65, 127, None, None), (31, 63, None, None), (128, 64, None, None), (33, 129, None, None), (95, 96, None, None),
        (66, 128, "bottom_right", None), (34, 96, "bottom_right", None), (65, 128, "bottom_right", None),
        (67, 128, "bottom_right", None), (100, 70, "bottom_right", None), (128, 128, "top_left", None),
        (128, 128, None, (30, 0)), (128, 128, None, (31, 0)), (128, 128, None, (32, 1)), (130, 130, None, (62, 31)),
        (130, 130, None, (63, 32)), (130, 130, None, (64, 33)), (96, 140, None, (127, 63)), (96, 140, None, (1, 62)),
    )
]  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("case", EDGES, ids=str)
def test_edges_of_tiles(case, dtype):
    case = dataclasses.replace(case, dtype=dtype)
    assert failures(judge(cases, case, "cuda-sim-sm80")) == []


def test_work_grows_with_the_window():
    """Instructions of forward and backward: S * w, not S * T."""
    spent = {}
    for S in (256, 512):
        case = cases.AttentionCase(SDPA, B=1, H=1, S=S, T=S, D=64, dtype=torch.bfloat16, window=(40, 0))
        with sim.device(record=True, check=False) as launches:
            evaluate(cases, case, cases.make_inputs(case), "cuda-sim-sm80")
        spent[S] = sum(launch["warp_instructions"] for launch in launches.all)
    assert spent[512] < 2.2 * spent[256]
