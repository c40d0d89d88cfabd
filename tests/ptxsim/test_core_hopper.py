"""mbarriers, bulk copies, tensor maps, clusters, and the pipelined kernels with planted bugs."""

from pathlib import Path

import core
import numpy as np
import pytest
import torch
from core import Fault
from test_core_control import check, run  # noqa: F401

KERNELS = Path(__file__).with_name("kernels")


def attention(nvcc, length, bug=0, **options):
    module = core.Module(nvcc(KERNELS / "core_attention.cu", "sm_80", f"-DBUG={bug}"), "core_attention.ptx")
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 64).bfloat16() for _ in range(3))
    out = torch.full_like(q, float("nan"))
    result = module.launch("attention", ((length + 63) // 64, 2), 128, [q, k, v, out, length, 0.125 * 1.4426950408889634], shared=40960,
                           raises=False, names=["q", "k", "v", "out"], **options)  # fmt: skip
    want = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    return result, (out.double() - want).abs().max().item()


@pytest.mark.parametrize("mode", [core.EAGER, core.LAZY, core.RANDOM])
@pytest.mark.parametrize("length", [1, 33, 128, 200])
def test_attention(nvcc, length, mode):
    for checked in (True, False):
        result, error = attention(nvcc, length, asynchronous=mode, seed=length, check=checked)
        check(result, Fault.NONE)
        assert error < 0.02


ATTENTION_BUGS = {1: Fault.OUT_OF_BOUNDS, 2: Fault.ASYNC_IN_FLIGHT, 3: None, 4: "numbers", 5: Fault.ASYNC_IN_FLIGHT, 6: "numbers", 7: None,
                  8: Fault.DIVERGENCE, 9: Fault.RACE}  # fmt: skip


@pytest.mark.parametrize("bug", ATTENTION_BUGS)
def test_attention_bugs(nvcc, bug):
    result, error = attention(nvcc, 200, bug, seed=1)
    expected = ATTENTION_BUGS[bug]
    if expected == "numbers":
        assert result.fault == Fault.NONE and not error < 0.1
    else:
        assert result.fault == expected or (expected is None and result.fault), result.message
        assert "core_attention.cu:" in result.message


def gemm(nvcc, m, n, k, stages, bug=0, **options):
    module = core.Module(nvcc(KERNELS / "gemm_sm90.cu", "sm_90a", f"-DBUG={bug}", f"-DSTAGES={stages}"), "gemm.ptx")
    torch.manual_seed(0)
    a, b = torch.randint(-3, 4, (m, k)).bfloat16(), torch.randint(-3, 4, (n, k)).bfloat16()
    c = torch.full((m, n), float("nan")).bfloat16()
    maps = [core.tensor_map(t, [k, len(t)], [2 * k], [64, 64], element_bytes=2, swizzle=3) for t in (a, b)]
    with core.registered(a, b, names=["a", "b"]):
        result = module.launch("gemm", ((m + 63) // 64, (n + 63) // 64), 160, [*maps, c, m, n, k], shared=stages * 16384, raises=False, arch="sm_90a",
                               max_instructions=1 << 22, **options)  # fmt: skip
    return result, torch.equal(c.double(), (a.double() @ b.double().T).bfloat16().double())


@pytest.mark.parametrize("mode", [core.EAGER, core.LAZY, core.RANDOM])
@pytest.mark.parametrize("case", [(64, 64, 64, 4), (100, 72, 200, 4), (128, 64, 512, 2)])
def test_gemm(nvcc, case, mode):
    for checked in (True, False):
        result, exact = gemm(nvcc, *case, asynchronous=mode, check=checked, seed=3)
        check(result, Fault.NONE)
        assert exact


GEMM_BUGS = {31: Fault.BARRIER, 32: Fault.DEADLOCK, 33: None, 34: "numbers", 35: Fault.RACE, 37: None, 38: Fault.RACE}


@pytest.mark.parametrize("bug", GEMM_BUGS)
def test_gemm_bugs(nvcc, bug):
    result, exact = gemm(nvcc, 128, 64, 512, 2, bug, seed=1)
    expected = GEMM_BUGS[bug]
    if expected == "numbers":
        assert result.fault == Fault.NONE and not exact
    else:
        assert result.fault == expected or (expected is None and result.fault), result.message
        assert "gemm_sm90.cu:" in result.message


def tma_source(rank: int, store: bool, count: int) -> str:
    coordinates = ", ".join(f"%{i + 2}" for i in range(rank))
    inputs = ", ".join(f'"r"(c[{i}])' for i in range(rank))
    copy_in = f"""if (threadIdx.x == 0) {{
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(bar) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(bar), "r"({count}) : "memory");
        asm volatile("cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {{{coordinates}}}], [%{rank + 2}];"
          :: "r"(s), "l"(&map), {inputs}, "r"(bar) : "memory");
    }}
    __syncthreads();
    unsigned done = 0;
    while (!done) asm volatile("{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }}" : "=r"(done) : "r"(bar) : "memory");
    for (int i = threadIdx.x; i < {count}; i += 32) data[i] = shared[i];"""  # fmt: skip
    copy_out = f"""for (int i = threadIdx.x; i < {count}; i += 32) shared[i] = data[i];
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (threadIdx.x == 0) {{
        asm volatile("cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%1, {{{coordinates}}}], [%0];" :: "r"(s), "l"(&map), {inputs} : "memory");
        asm volatile("cp.async.bulk.commit_group;"); asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }}"""  # fmt: skip
    return f"""struct alignas(64) Map {{ char opaque[128]; }};
    extern "C" __global__ void kernel(const __grid_constant__ Map map, unsigned char* data, int c0, int c1, int c2, int c3, int c4) {{
    extern __shared__ __align__(1024) unsigned char shared[];
    __shared__ unsigned long long barrier;
    const int c[5] = {{c0, c1, c2, c3, c4}};
    unsigned s = (unsigned)__cvta_generic_to_shared(shared), bar = (unsigned)__cvta_generic_to_shared(&barrier);
    {copy_out if store else copy_in}
    }}"""


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_tensor_copies(nvcc, rank, swizzle):
    shape, box = [24, 5, 4, 3, 2][:rank], [8, 4, 2, 2, 1][:rank]
    at = [20, -1, 3, 1, 0][:rank]
    x = np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape[::-1]) + 1
    strides = [2 * int(np.prod(shape[: i + 1])) for i in range(rank - 1)]
    count = 2 * int(np.prod(box))
    descriptor = core.tensor_map(x, shape, strides, box, element_bytes=2, swizzle=swizzle)
    want = np.zeros(box[::-1], np.uint16)
    for index in np.ndindex(*box[::-1]):
        source = [at[rank - 1 - d] + index[d] for d in range(rank)]
        if all(0 <= source[d] < shape[rank - 1 - d] for d in range(rank)):
            want[index] = x[tuple(source)]
    image = np.zeros(count, np.uint8)
    flat, mask = want.reshape(-1).view(np.uint8), [0, 1, 3, 7][swizzle]
    for i in range(0, count, 16):
        to = i ^ (((i >> 7) & mask) << 4)
        image[to : to + 16] = flat[i : i + 16]
    out = np.zeros(count, np.uint8)
    coordinates = at + [0] * (5 - rank)
    with core.registered(x, names=["x"]):
        module = core.Module(nvcc(tma_source(rank, False, count), "sm_90a"), "tma.ptx")
        module.launch("kernel", 1, 32, [descriptor, out, *coordinates], shared=count, arch="sm_90a", seed=swizzle)
        assert np.array_equal(out, image)
        before = x.copy()
        x[:] = 0
        module = core.Module(nvcc(tma_source(rank, True, count), "sm_90a"), "tma.ptx")
        module.launch("kernel", 1, 32, [descriptor, image, *coordinates], shared=count, arch="sm_90a", seed=swizzle)
    for index in np.ndindex(*x.shape):
        inside = all(0 <= index[d] - at[rank - 1 - d] < box[rank - 1 - d] for d in range(rank))
        assert x[index] == (before[index] if inside else 0)


def test_tensor_map_checks():
    x = np.zeros(4096, np.uint8)
    good = dict(tensor=x.ctypes.data // 16 * 16, sizes=[64, 8], strides=[128], box=[64, 8], element_bytes=2, swizzle=3)
    core.tensor_map(**good)
    for change, words in ((dict(strides=[120]), "multiple of 16"), (dict(box=[128, 8]), "swizzle span"), (dict(box=[64, 300]), "box"),
                          (dict(tensor=8), "aligned"), (dict(box=[4, 8]), "inner box"), (dict(sizes=[64, 0]), "size")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            core.tensor_map(**{**good, **change})


def test_missing_proxy_fence(nvcc):
    source = tma_source(2, True, 128).replace('asm volatile("fence.proxy.async.shared::cta;" ::: "memory");', "")
    x, data = np.zeros((8, 8), np.uint16), np.zeros(128, np.uint8)
    descriptor = core.tensor_map(x, [8, 8], [16], [8, 8], element_bytes=2)
    with core.registered(x):
        result = core.Module(nvcc(source, "sm_90a"), "tma.ptx").launch(
            "kernel", 1, 32, [descriptor, data, 0, 0, 0, 0, 0], shared=128, arch="sm_90a", raises=False
        )
    check(result, Fault.PROXY)


def test_unwaited_bulk_store(nvcc):
    source = tma_source(2, True, 128).replace('asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");', "")
    x, data = np.zeros((8, 8), np.uint16), np.zeros(128, np.uint8)
    descriptor = core.tensor_map(x, [8, 8], [16], [8, 8], element_bytes=2)
    with core.registered(x):
        result = core.Module(nvcc(source, "sm_90a"), "tma.ptx").launch(
            "kernel", 1, 32, [descriptor, data, 0, 0, 0, 0, 0], shared=128, arch="sm_90a", raises=False
        )
    check(result, Fault.ASYNC_IN_FLIGHT)


CLUSTER = """#include <cooperative_groups.h>
namespace cg = cooperative_groups;
extern "C" __global__ void __cluster_dims__(4, 1, 1) kernel(int* out) {
  __shared__ int s[32];
  auto cluster = cg::this_cluster();
  s[threadIdx.x] = 100 * cluster.block_rank() + threadIdx.x;
  FIRST
  int sum = 0;
  for (int r = 0; r < 4; ++r) sum += cluster.map_shared_rank(s, r)[threadIdx.x];  // HERE
  SECOND
  out[blockIdx.x * 32 + threadIdx.x] = sum;
}"""


@pytest.mark.parametrize("seed", range(3))
def test_distributed_shared_memory(run, seed):  # noqa: F811
    out = np.zeros(8 * 32, np.int32)
    source = CLUSTER
    good = source.replace("FIRST", "cluster.sync();").replace("SECOND", "cluster.sync();")
    options = dict(grid=8, block=32, arch="sm_90a", seed=seed)
    check(run(good, [out], **options), Fault.NONE)
    assert out.reshape(8, 32).tolist() == [[600 + 4 * t for t in range(32)]] * 8
    bad = source.replace("FIRST", "__syncthreads();").replace("SECOND", "cluster.sync();")
    result = run(bad, [out], **options)
    assert result.fault in (Fault.RACE, Fault.UNINITIALIZED), result.message
    early = run(source.replace("FIRST", "cluster.sync();").replace("SECOND", ""), [out], **options)
    assert early.fault in (Fault.OUT_OF_BOUNDS, Fault.NONE), early.message


def test_remote_arrival_and_multicast(run):  # noqa: F811
    source = """extern "C" __global__ void __cluster_dims__(2, 1, 1) kernel(const int* in, int* out) {
      __shared__ __align__(128) int s[64];
      __shared__ unsigned long long full, empty;
      unsigned rank, f = (unsigned)__cvta_generic_to_shared(&full), e = (unsigned)__cvta_generic_to_shared(&empty), to = (unsigned)__cvta_generic_to_shared(s);
      asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
      if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(f) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 64;" :: "r"(e) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" :: "r"(f) : "memory");
      }
      asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
      if (rank == 0 && threadIdx.x == 0)
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 256, [%2], %3;"
          :: "r"(to), "l"(in), "r"(f), "h"((short)3) : "memory");
      unsigned done = 0;
      while (!done) asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(f) : "memory");
      out[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x]; out[blockIdx.x * 64 + 32 + threadIdx.x] = s[32 + threadIdx.x];
      unsigned remote;
      asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(remote) : "r"(e));
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" :: "r"(remote) : "memory");
      if (rank == 0) {
        done = 0;
        while (!done) asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(e) : "memory");
      }
      asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
    }"""  # fmt: skip
    base = np.zeros(96, np.int32)
    data = base[(-base.ctypes.data // 4) % 4 :][:64]
    data[:] = np.arange(64)
    for seed in range(4):
        out = np.zeros(4 * 64, np.int32)
        check(run(source, [data, out], grid=4, arch="sm_90a", seed=seed), Fault.NONE)
        assert np.array_equal(out.reshape(4, 64), np.tile(data, (4, 1)))
