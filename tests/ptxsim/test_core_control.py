"""Control flow, calls, memory spaces, and what goes wrong with them."""

import core
import numpy as np
import pytest
from core import Fault

PRELUDE = """
#include <cstdint>
#include <cstdio>
#include <cassert>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
"""


@pytest.fixture
def run(nvcc):
    def run(source, args, *, grid=1, block=32, kernel="kernel", arch="sm_80", **options):
        module = core.Module(nvcc(PRELUDE + source, arch), "kernel.ptx")
        options.setdefault("raises", False)
        return module.launch(kernel, grid, block, args, arch=arch, **options)

    return run


def marked(source: str, mark: str = "HERE") -> str:
    """The line of the source, as messages name it."""
    lines = (PRELUDE + source).split("\n")
    return f".cu:{next(i for i, line in enumerate(lines, 1) if mark in line)}"


def check(result, fault, source=None, *words):
    assert result.fault == fault, result.message
    if source is not None:
        assert marked(source) in result.message, result.message
    for word in words:
        assert word in result.message, result.message


@pytest.mark.parametrize("seed", range(4))
def test_divergence(run, seed):
    out = np.zeros(128, np.int32)
    result = run("""extern "C" __global__ void kernel(int* out) {
        int x = 0;
        for (int i = 0; i < threadIdx.x % 7; ++i) { if (i & 1) x += 3; else x += threadIdx.x; if (x > 100) break; }
        switch (threadIdx.x % 5) { case 0: x += 1; break; case 1: x *= 2; break; case 2: x -= 7; break; case 3: x ^= 55; default: x += 9; }
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, x, 1) + x;
    }""", [out], block=128, seed=seed)  # fmt: skip
    check(result, Fault.NONE)

    def one(t):
        x = 0
        for i in range(t % 7):
            x += 3 if i & 1 else t
            if x > 100:
                break
        k = t % 5
        return x + 1 if k == 0 else x * 2 if k == 1 else x - 7 if k == 2 else (x ^ 55) + 9 if k == 3 else x + 9

    assert out.tolist() == [one(t) + one(t ^ 1) for t in range(128)]


def test_calls_recursion_and_pointers(run):
    out = np.zeros(64, np.int32)
    result = run("""
    __device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
    __device__ __noinline__ int twice(int x) { return 2 * x; }
    __device__ __noinline__ int square(int x) { return x * x; }
    extern "C" __global__ void kernel(int* out) {
        int (*f)(int) = threadIdx.x & 1 ? twice : square;
        if (threadIdx.x % 3 == 0) f = fibonacci;
        out[threadIdx.x] = f(threadIdx.x % 12);
    }""", [out], block=64)  # fmt: skip
    check(result, Fault.NONE)
    fib = [0, 1]
    while len(fib) < 12:
        fib.append(fib[-1] + fib[-2])
    want = [fib[t % 12] if t % 3 == 0 else 2 * (t % 12) if t & 1 else (t % 12) ** 2 for t in range(64)]
    assert out.tolist() == want


def test_printf(run):
    result = run(r"""extern "C" __global__ void kernel(int n, double x) {
        if (threadIdx.x == 3) printf("%d %5.2f %s %c %lld %%\n", n, x, "word", 'z', 1234567890123LL);
    }""", [7, 2.5])  # fmt: skip
    assert result.printed == "7  2.50 word z 1234567890123 %\n"


def test_assert_and_trap(run):
    source = """extern "C" __global__ void kernel(int n) {
        assert(n != 4);  // HERE
    }"""
    check(run(source, [4]), Fault.TRAP, source, "n != 4")
    check(run('extern "C" __global__ void kernel() { __trap(); }', []), Fault.TRAP)


def test_device_globals(run, nvcc):
    source = (
        PRELUDE
        + """__device__ int counter; __constant__ float table[4] = {1, 2, 3, 4};
    extern "C" __global__ void kernel(float* out, int i) { atomicAdd(&counter, 1); out[threadIdx.x] = table[(threadIdx.x + i) & 3]; }"""
    )
    module = core.Module(nvcc(source), "kernel.ptx")
    out = np.zeros(32, np.float32)
    for _ in range(2):
        module.launch("kernel", 1, 32, [out, 1])
    assert out.tolist() == [float((t + 1) % 4 + 1) for t in range(32)]
    import ctypes

    address, size = module.symbol("counter")
    assert size == 4 and ctypes.c_int.from_address(address).value == 64


def test_local_arrays(run):
    out = np.zeros(32, np.int32)
    source = """extern "C" __global__ void kernel(int* out, int n) {
        int a[8];
        for (int i = 0; i < n; ++i) a[i] = i * threadIdx.x;
        out[threadIdx.x] = a[(threadIdx.x + 3) & 7];  // HERE
    }"""
    check(run(source, [out, 8]), Fault.NONE)
    assert out.tolist() == [((t + 3) & 7) * t for t in range(32)]
    check(run(source, [out, 5]), Fault.UNINITIALIZED, source)


def test_bounds(run):
    out = np.zeros(64, np.int32)
    source = """extern "C" __global__ void kernel(int* out, int by) {
        out[threadIdx.x + by] = 1;  // HERE
    }"""
    check(run(source, [out, 32]), Fault.NONE)
    check(
        run(source, [out, 33], names=["out"]), Fault.OUT_OF_BOUNDS, source, "4 bytes past the end of `out`", "lane 31"
    )
    check(run(source, [out, -1], names=["out"]), Fault.OUT_OF_BOUNDS, source, "lane 0")
    check(run(source, [0, 0]), Fault.OUT_OF_BOUNDS, source, "null")
    check(run(source, [0x10000000000, 0]), Fault.OUT_OF_BOUNDS, source)


def test_shared_bounds_and_alignment(run):
    source = """extern "C" __global__ void kernel(int by) {
        extern __shared__ char s[];
        *reinterpret_cast<volatile int*>(s + 4 * threadIdx.x + by) = 1;  // HERE
    }"""
    check(run(source, [0], shared=128), Fault.NONE)
    check(run(source, [4], shared=128), Fault.OUT_OF_BOUNDS, source, "4 bytes past the end of shared memory")
    check(run(source, [2], shared=256), Fault.MISALIGNED, source)
    check(run(source, [-4], shared=128), Fault.OUT_OF_BOUNDS, source)


def test_misaligned_vector(run):
    x = np.zeros(64, np.float32)
    source = """extern "C" __global__ void kernel(float* x) {
        const float4 v = *reinterpret_cast<const float4*>(x + 1 + 4 * (threadIdx.x & 7));  // HERE
        x[0] = v.x + v.w;
    }"""
    base = np.zeros(80, np.float32)
    x = base[(-base.ctypes.data // 4) % 4 :][:64]
    check(run(source, [x]), Fault.MISALIGNED, source, "16")


def test_stack_overflow_is_a_fault(run):
    source = """__device__ __noinline__ int deep(int n, int* p) { int a[16]; a[n & 15] = n; return n == 0 ? *p : deep(n - 1, p) + a[(n + *p) & 15]; }
    extern "C" __global__ void kernel(int* out) { out[0] = deep(1 << 30, out); }"""
    check(run(source, [np.zeros(1, np.int32)], check=False), Fault.OUT_OF_BOUNDS, None, "stack overflow")


def test_endless_loop_is_a_fault(run):
    source = 'extern "C" __global__ void kernel(volatile int* p) { while (*p == 0) {} }'
    check(run(source, [np.zeros(1, np.int32)], max_instructions=10000), Fault.LIMIT)


def test_bad_launches(run):
    source = 'extern "C" __global__ void __launch_bounds__(64) kernel(int* p) { p[0] = 1; }'
    p = np.zeros(1, np.int32)
    check(run(source, [p], block=128), Fault.BAD_LAUNCH, None, "64")
    check(run(source, [p], grid=0), Fault.BAD_LAUNCH)
    check(run(source, [p], block=2048), Fault.BAD_LAUNCH)
    check(run(source, [p], shared=200 << 10), Fault.BAD_LAUNCH, None, "shared memory")
    check(run(source, [p], grid=(1 << 31) - 1, block=1, max_instructions=5000, check=False), Fault.LIMIT)
    check(run(source, [p], cooperative=True, grid=100000), Fault.BAD_LAUNCH)


def test_unknown_instruction_only_when_launched():
    text = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry good() { ret; }\n.visible .entry bad() {\n frobnicate.u32;\n ret; }\n"
    module = core.Module(text, "odd.ptx")
    assert module.launch("good").fault == Fault.NONE
    with pytest.raises(RuntimeError, match="frobnicate.u32.*line 6"):
        module.launch("bad")
    with pytest.raises(RuntimeError, match="line 1"):
        core.Module("nonsense", "x.ptx")


def test_lanes_that_spin_on_each_other(run):
    out = np.zeros(32, np.int32)
    source = """extern "C" __global__ void kernel(int* lock, int* out) {
        while (atomicCAS(lock, 0, 1) != 0) {}
        __threadfence();
        out[0] += 1;
        __threadfence();
        atomicExch(lock, 0);
    }"""
    check(run(source, [np.zeros(1, np.int32), out], grid=2, block=64, max_instructions=1 << 22), Fault.NONE)
    assert out[0] == 128


def test_cooperative_grid_barrier(run):
    source = """#include <cooperative_groups.h>
    extern "C" __global__ void kernel(int* a, int* b) {
        a[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x + 1;
        cooperative_groups::this_grid().sync();
        int sum = 0;
        for (int i = 0; i < gridDim.x; ++i) sum += a[i * blockDim.x + threadIdx.x];
        b[blockIdx.x * blockDim.x + threadIdx.x] = sum;
    }"""
    a, b = np.zeros(6 * 64, np.int32), np.zeros(6 * 64, np.int32)
    for seed in range(3):
        check(run(source, [a, b], grid=6, block=64, cooperative=True, seed=seed), Fault.NONE)
        assert (b == 21).all()


def test_lanes_that_jump_back_join_those_that_wait_there():
    """Triton's compiler puts the end of a loop's body before its start."""
    ptx = """
    .version 7.0
    .target sm_80
    .address_size 64
    .visible .entry kernel(.param .u64 out)
    {
        .reg .pred %p;
        .reg .b32 %r<4>;
        .reg .b64 %rd<4>;
        ld.param.u64 %rd0, [out];
        mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd1, %r0, 4;
        add.u64 %rd2, %rd0, %rd1;
        bra.uni START;
    JOIN:
        shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;
        st.global.u32 [%rd2], %r1;
        ret;
    START:
        and.b32 %r2, %r0, 1;
        setp.eq.u32 %p, %r2, 0;
        @%p bra JOIN;
        add.u32 %r0, %r0, 100;
        bra.uni JOIN;
    }
    """
    out = np.zeros(32, np.int32)
    check(core.Module(ptx).launch("kernel", 1, 32, [out], raises=False), Fault.NONE)
    assert list(out) == [t + 101 if t % 2 == 0 else t - 1 for t in range(32)]
