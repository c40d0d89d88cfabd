"""Planted bugs that the checker must name, with their line, and legal patterns that it must leave alone."""

import numpy as np
import pytest
from core import Fault
from test_core_control import check, run  # noqa: F401

# name: (fault, grid, block, source); the line that must be named carries HERE.
BUGS = {
    "missing barrier": (Fault.UNINITIALIZED, 1, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s[64]; s[threadIdx.x] = threadIdx.x;
        out[threadIdx.x] = s[63 - threadIdx.x];  // HERE
    }"""),
    "missing barrier before reuse": (Fault.RACE, 1, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s[64]; s[threadIdx.x] = 1; __syncthreads();
        int x = s[63 - threadIdx.x];
        s[threadIdx.x] = x + threadIdx.x;  // HERE
        __syncthreads(); out[threadIdx.x] = s[63 - threadIdx.x];
    }"""),
    "missing syncwarp": (Fault.RACE, 1, 32, """extern "C" __global__ void kernel(int* out) {
        __shared__ volatile int s[32]; s[threadIdx.x] = 0; __syncthreads(); *(int*)&s[threadIdx.x] = threadIdx.x;
        out[threadIdx.x] = *(int*)&s[threadIdx.x ^ 1];  // HERE
    }"""),
    "different values to one place": (Fault.RACE, 1, 32, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s; *(int*)&s = threadIdx.x;  // HERE
        __syncthreads(); out[threadIdx.x] = s;
    }"""),
    "sum across blocks": (Fault.RACE, 4, 32, """extern "C" __global__ void kernel(int* out) {
        out[threadIdx.x] += 1;  // HERE
    }"""),
    "exited lane in a mask": (Fault.DIVERGENCE, 1, 32, """extern "C" __global__ void kernel(int* out) {
        if (threadIdx.x > 20) return;
        out[threadIdx.x] = __shfl_down_sync(0xffffffffu, threadIdx.x, 1);
    }"""),
    "shuffle by half a warp": (Fault.DIVERGENCE, 1, 32, """extern "C" __global__ void kernel(int* out) {
        int x = out[threadIdx.x];
        if (threadIdx.x < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);
        __syncthreads();
        out[threadIdx.x] = x;
    }"""),
    "barrier in a branch": (Fault.DIVERGENCE, 1, 64, """extern "C" __global__ void kernel(int* out) {
        if (threadIdx.x < 32) { out[threadIdx.x] = 1; __syncthreads(); out[threadIdx.x] += 2; }
        else { out[threadIdx.x] = 3; __syncthreads(); out[threadIdx.x] += 4; }
    }"""),
    "too few threads at a named barrier": (Fault.DEADLOCK, 1, 64, """extern "C" __global__ void kernel(int* out) {
        if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;");  // HERE
        out[threadIdx.x] = 1;
    }"""),
    "unwaited cp.async": (Fault.ASYNC_IN_FLIGHT, 1, 32, """extern "C" __global__ void kernel(int* out) {
        __shared__ __align__(16) int s[128];
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(s + 4 * threadIdx.x)), "l"(out));  // HERE
        asm volatile("cp.async.commit_group;");
    }"""),
    "misaligned cp.async": (Fault.MISALIGNED, 1, 32, """extern "C" __global__ void kernel(int* out) {
        __shared__ __align__(16) int s[132];
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"((unsigned)__cvta_generic_to_shared(s + 1 + 4 * threadIdx.x)), "l"(out));  // HERE
        asm volatile("cp.async.wait_all;");
    }"""),
    "misaligned ldmatrix": (Fault.MISALIGNED, 1, 32, """extern "C" __global__ void kernel(int* out) {
        __shared__ __align__(16) int s[160]; for (int i = threadIdx.x; i < 160; i += 32) s[i] = 0; __syncthreads();
        int r; asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"((unsigned)__cvta_generic_to_shared(s + 1 + 4 * (threadIdx.x & 7))));  // HERE
        out[threadIdx.x] = r;
    }"""),
    "flag without a fence": (Fault.RACE, 2, 32, """extern "C" __global__ void kernel(int* out) {
        if (threadIdx.x != 0) return;
        if (blockIdx.x == 0) { out[0] = 5; atomicExch(out + 1, 1); }
        else { while (atomicAdd(out + 1, 0) == 0) {} out[2] = out[0]; }  // HERE
    }"""),
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_bug_is_named(run, name, seed):  # noqa: F811
    fault, grid, block, source = BUGS[name]
    result = run(source, [np.zeros(256, np.int32)], grid=grid, block=block, seed=seed, max_instructions=1 << 20)
    if fault == Fault.UNINITIALIZED and result.fault == Fault.RACE:  # whichever warp comes first
        fault = Fault.RACE
    check(result, fault, source if "HERE" in source else None)


LEGAL = {
    "early exit before a barrier": (1, 96, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s[64]; if (threadIdx.x >= 70) return; if (threadIdx.x < 64) s[threadIdx.x] = threadIdx.x;
        __syncthreads(); if (threadIdx.x < 64) out[threadIdx.x] = s[63 - threadIdx.x];
    }"""),
    "arrive and sync": (1, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s[32];
        if (threadIdx.x < 32) { s[threadIdx.x] = threadIdx.x; asm volatile("bar.arrive 1, 64;" ::: "memory"); }
        else { asm volatile("bar.sync 1, 64;" ::: "memory"); out[threadIdx.x] = s[threadIdx.x - 32]; }
    }"""),
    "half-warp masks": (1, 32, """extern "C" __global__ void kernel(int* out) {
        int x = threadIdx.x;
        if (threadIdx.x < 16) x += __shfl_xor_sync(0x0000ffffu, x, 1); else x += __shfl_xor_sync(0xffff0000u, x, 2);
        out[threadIdx.x] = x;
    }"""),
    "exchange in a warp": (1, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s[64]; s[threadIdx.x] = threadIdx.x; __syncwarp(); int x = s[threadIdx.x ^ 5]; __syncwarp();
        s[threadIdx.x] = x + 1; __syncwarp(); out[threadIdx.x] = s[threadIdx.x ^ 1];
    }"""),
    "the same value to one place": (1, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s[2]; s[threadIdx.x / 32] = 7; __syncthreads(); out[threadIdx.x] = s[1 - threadIdx.x / 32];
    }"""),
    "atomics on one place": (3, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ int s; if (threadIdx.x == 0) s = 0; __syncthreads(); atomicAdd(&s, 1); __syncthreads();
        if (threadIdx.x == 0) atomicAdd(out, s);
    }"""),
    "last block adds up": (4, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ bool last; out[8 + blockIdx.x * 64 + threadIdx.x] = threadIdx.x; __threadfence(); __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(out, 1) == gridDim.x - 1;
        __syncthreads();
        if (last) { __threadfence(); int sum = 0; for (int b = 0; b < 3; ++b) sum += out[8 + b * 64 + threadIdx.x % 32]; if (threadIdx.x < 4) out[1 + threadIdx.x] = sum; }
    }"""),
    "flag with fences": (2, 32, """extern "C" __global__ void kernel(int* out) {
        if (threadIdx.x != 0) return;
        if (blockIdx.x == 0) { out[0] = 5; __threadfence(); atomicExch(out + 1, 1); }
        else { while (atomicAdd(out + 1, 0) == 0) {} __threadfence(); out[2] = out[0]; }
    }"""),
    "release and acquire": (2, 32, """extern "C" __global__ void kernel(int* out) {
        int x;
        if (threadIdx.x != 0) return;
        if (blockIdx.x == 0) { out[0] = 5; asm volatile("st.release.gpu.global.u32 [%0], 1;" :: "l"(out + 1) : "memory"); }
        else { do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(out + 1) : "memory"); while (x == 0); out[2] = out[0]; }
    }"""),
    "bytes of one word by different threads": (1, 64, """extern "C" __global__ void kernel(int* out) {
        __shared__ unsigned char s[64]; s[threadIdx.x] = threadIdx.x; __syncthreads();
        s[threadIdx.x ^ 1] = s[threadIdx.x ^ 1] + 1; __syncthreads();
        out[threadIdx.x] = s[63 - threadIdx.x];
    }"""),
}  # fmt: skip


@pytest.mark.parametrize("name", LEGAL)
@pytest.mark.parametrize("seed", range(4))
def test_legal_pattern_raises_nothing(run, name, seed):  # noqa: F811
    grid, block, source = LEGAL[name]
    check(
        run(source, [np.zeros(512, np.int32)], grid=grid, block=block, seed=seed, max_instructions=1 << 20), Fault.NONE
    )


def test_counters(run):  # noqa: F811
    x = np.zeros(32 * 33 + 32, np.float32)
    x = x[(-x.ctypes.data // 4) % 32 :]
    source = """extern "C" __global__ void kernel(float* x, int stride) {
        __shared__ float s[32 * 32];
        s[threadIdx.x * stride] = x[threadIdx.x * stride];
        __syncthreads();
        if (stride == 99) x[0] = s[threadIdx.x];
    }"""
    flat = run(source, [x, 1])
    assert (flat.global_requests, flat.global_sectors, flat.shared_requests, flat.shared_wavefronts) == (1, 4, 1, 1)
    wide = run(source, [x, 32])
    assert (wide.global_sectors, wide.shared_wavefronts) == (32, 32)
    two = run(source, [x, 2])
    assert (two.global_sectors, two.shared_wavefronts) == (8, 2)


def test_seeds_repeat(run):  # noqa: F811
    source = BUGS["sum across blocks"][3]
    messages = {
        run(source, [np.zeros(256, np.int32)], grid=8, block=128, seed=5).message.split("global address")[0]
        for _ in range(3)
    }
    assert len(messages) == 1
