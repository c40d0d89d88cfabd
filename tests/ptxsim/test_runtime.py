"""The emulated CUDA runtime, the tracking allocator and the Python interface of the PTX interpreter."""

import ctypes
import subprocess
import sys

import pytest
import torch

import llmkernels
from llmkernels import functional
from tests.ptxsim import sim

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=f"ptxsim: {sim.absent()}")
on_both = pytest.mark.parametrize("arch", sim.ARCHITECTURES)
SOURCE = "tests/ptxsim/runtime/host_test.cu"


@pytest.fixture
def host():
    return sim.module().host_test


def ints(*shape: int) -> torch.Tensor:
    with sim.tracking():
        return torch.empty(shape, dtype=torch.int32)


# Launches by host code: nvcc's stubs and the functions of the CUDA runtime.


@on_both
def test_a_launch_fills_what_it_owns_and_one_block_too_many_is_an_error(arch, host):
    out = ints(96)
    assert (out == -1).all()
    with sim.device(arch=arch):
        assert host.iota(out.data_ptr(), 3) is None
        assert torch.equal(out, torch.arange(96, dtype=torch.int32))
        error = host.iota(out.data_ptr(), 4)
        assert "iota_kernel(int*)" in error and "host_test.cu:" in error and "384" in error, error
        # The next call works.
        assert host.iota(out.data_ptr(), 3) is None


def test_memory_of_nobody_is_an_error(host):
    outside = torch.zeros(32, dtype=torch.int32)
    with sim.device(arch="sm_80"):
        assert "out of bounds" in host.iota(outside.data_ptr(), 1)
        with sim.visible({"x": outside}):
            assert host.iota(outside.data_ptr(), 1) is None
        assert "out of bounds" in host.iota(outside.data_ptr(), 1)
        assert "out of bounds" in host.iota(0, 1)


def test_an_empty_grid_is_an_error_as_in_cuda(host):
    with sim.device(arch="sm_80"):
        assert "invalid configuration argument: grid (0, 1, 1)" in host.iota(ints(32).data_ptr(), 0)


@pytest.mark.parametrize("arch, most", (("sm_80", 163 << 10), ("sm_90a", 227 << 10)))
def test_dynamic_shared_memory_is_limited(arch, most, host):
    out = ints(32)
    with sim.device(arch=arch):
        assert host.through_shared(out.data_ptr(), 48 << 10, False) is None
        assert torch.equal(out, torch.arange(32, dtype=torch.int32))
        assert "without cudaFuncSetAttribute" in host.through_shared(out.data_ptr(), (48 << 10) + 16, False)
        assert host.through_shared(out.data_ptr(), most, True) is None
        assert f"possible are {most} on {arch}" in host.through_shared(out.data_ptr(), most + 16, True)
        # Opted in to less than is asked for.
        assert host.through_shared(out.data_ptr(), 64 << 10, True) is None
        assert f"allowed are {64 << 10}" in host.through_shared(out.data_ptr(), most, False)


def test_occupancy_is_limited_by_threads_and_shared_memory(host):
    with sim.device(arch="sm_80"):
        assert [host.occupancy(bytes) for bytes in (0, 40 << 10, 100 << 10)] == [8, 4, 1]


def test_clusters(host):
    out = ints(8)
    with sim.device(arch="sm_90a"):
        assert host.cluster_ranks(out.data_ptr(), 8, 4) is None
        assert out.tolist() == [0, 1, 2, 3] * 2
        assert "invalid cluster size" in host.cluster_ranks(out.data_ptr(), 6, 4)
        assert "invalid cluster size" in host.cluster_ranks(out.data_ptr(), 16, 16)
    with sim.device(arch="sm_80"):
        assert "invalid cluster size" in host.cluster_ranks(out.data_ptr(), 8, 4)


@on_both
def test_cooperative_launch(arch, host):
    with sim.device(arch=arch):
        out, scratch = ints(6), ints(6)
        assert host.cooperative_sum(out.data_ptr(), scratch.data_ptr(), 6) is None
        assert out.tolist() == [15] * 6
        with sim.device(multiprocessors=1):
            assert "too many blocks in cooperative launch" in host.cooperative_sum(out.data_ptr(), out.data_ptr(), 33)


def test_memset_and_memcpy_stay_inside_a_region(host):
    out, copy = ints(8), ints(8)
    assert host.set_and_copy(out.data_ptr(), copy.data_ptr(), 32) is None
    assert (copy == 0x01010101).all()
    assert "cudaMemsetAsync: 33 bytes" in host.set_and_copy(out.data_ptr(), copy.data_ptr(), 33)
    assert "cudaMemcpyAsync, destination" in host.set_and_copy(out.data_ptr(), copy[1:].data_ptr(), 32)


@on_both
def test_device_variables(arch, host):
    out = ints(1)
    with sim.device(arch=arch):
        for _ in range(2):
            assert host.variables(out.data_ptr()) is None
            assert out.item() == 2


def test_tensor_maps(host):
    given, out = ints(40, 8), ints(32, 8)
    given.copy_(torch.arange(320).view(40, 8))
    with sim.device(arch="sm_90a"):
        assert host.tensor_map(given.data_ptr(), 40, 16, out.data_ptr()) is None
        # Rows past the end are zeros.
        assert torch.equal(out, torch.cat([given[16:], torch.zeros(8, 8, dtype=torch.int32)]))
        assert "cuTensorMapEncodeTiled" in host.refused_tensor_map(given.data_ptr())


# The library's launchers.


@on_both
def test_a_fault_surfaces_as_the_ops_exception_and_the_process_lives(arch):
    x = torch.randn(4, 24)
    raw = torch.ops.llmkernels_cuda.rms_norm_fwd
    with sim.device(arch=arch):
        with pytest.raises(RuntimeError, match=r"rms_norm_fwd: CUDA says: .*norm_fwd.*kernel.*out of bounds.*"):
            raw(x, None, None, [24], 1e-5, 0.0)
        with sim.tracking(), sim.visible({"x": x}):
            y = raw(x, None, None, [24], 1e-5, 0.0)[0]
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (24,), eps=1e-5))


def test_one_element_short_names_tensor_and_line():
    x = torch.randn(5, 24)
    short = torch.randn(120)[:119]
    given = torch.as_strided(short, (5, 24), (24, 1))
    with (
        sim.device(arch="sm_80"), sim.tracking(), sim.visible({"x": short}),
        pytest.raises(RuntimeError, match=r"x, \(119,\) float32") as caught,
    ):  # fmt: skip
        torch.ops.llmkernels_cuda.rms_norm_fwd(given, None, None, [24], 1e-5, 0.0)
    assert ".cuh:" in str(caught.value) or ".cu:" in str(caught.value)
    assert functional.rms_norm(x, (24,), backend="cuda-sim-sm80").isfinite().all()


def test_simulated_backends_are_forced_or_absent():
    x = torch.randn(3, 8)
    assert "cuda-sim-sm80" not in llmkernels.registry.BACKENDS
    assert "cuda-sim-sm80" not in str(llmkernels.explain("layer_norm", x, (8,)))
    explained = llmkernels.explain("layer_norm", x, (8,), backend="cuda-sim-sm80")
    assert explained.chosen == "cuda-sim-sm80" and "cuda-sim-sm80 runs" in str(explained)
    with llmkernels.use_backend("cuda-sim-sm80"), sim.device(record=True) as launches:
        functional.layer_norm(x, (8,))
    assert "norm_fwd" in launches.all[0]["kernel"] and launches.all[0]["warp_instructions"] > 0
    with pytest.raises(llmkernels.NoBackendError, match="not on the CPU"):
        functional.layer_norm(x.to("meta"), (8,), backend="cuda-sim-sm80")


def test_outside_the_tests_they_do_not_exist():
    code = "import llmkernels, torch; llmkernels.functional.rms_norm(torch.ones(2, 8), (8,), backend='cuda-sim-sm80')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=sim.ROOT)
    assert "unknown backend 'cuda-sim-sm80'; known: cuda, triton, cpu, torch" in run.stderr


# The allocator.


def test_tracked_tensors_begin_as_nan_and_end_exactly():
    with sim.tracking():
        x = torch.empty(33)
    assert x.isnan().all() and x.data_ptr() % 64 == 0
    assert sim.module().is_tracked(x.data_ptr())
    assert not sim.module().is_tracked(torch.empty(33).data_ptr())
    address = x.data_ptr()
    del x
    assert not sim.module().is_tracked(address)


def test_tracked_tensors_may_grow_and_outlive_their_context():
    with sim.tracking():
        x = torch.arange(4)
    x.resize_(1000)
    assert x[:4].tolist() == [0, 1, 2, 3]
    assert not sim.module().is_tracked(x.data_ptr())


# One kernel from Python.


@on_both
def test_launch_from_python(launch, arch):
    out = torch.zeros(64, dtype=torch.int32)
    counters = launch("iota_kernel", 2, 32, 0, out, source=SOURCE, arch=arch)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32))
    assert counters["global_requests"] == 2 and counters["global_sectors"] == 8
    with pytest.raises(sim.Fault) as caught:
        launch("iota_kernel", 3, 32, 0, out, source=SOURCE, arch=arch)
    assert caught.value.kind == "out of bounds"
    assert "argument 0" in str(caught.value) and "host_test.cu:" in str(caught.value)


def test_what_cannot_be_launched_says_why(launch):
    out = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"0 kernels are called 'nothing'; there are: .*iota_kernel"):
        launch("nothing", 1, 32, 0, out, source=SOURCE)
    with pytest.raises(ValueError, match="2 arguments, the kernel has 1 parameters"):
        launch("iota_kernel", 1, 32, 0, out, 1, source=SOURCE)
    with pytest.raises(ValueError, match="arch is 'sm_70'"):
        sim.compile_ptx(SOURCE, "sm_70")
    with pytest.raises(ValueError, match="innermost stride"):
        sim.TensorMap(torch.zeros(8, 8).t(), (8, 8)).encode()


def test_arguments_are_packed_as_the_parameter_list():
    class Pair(ctypes.Structure):
        _fields_ = (("a", ctypes.c_int), ("b", ctypes.c_double))

    x = torch.zeros(1)
    layout = ((0, 8), (8, 4), (12, 4), (16, 16), (32, 2), (40, 8))
    packed = sim.pack(layout, (x, -1, 1.5, Pair(7, 2.5), b"ab", None))
    expected = x.data_ptr().to_bytes(8, "little") + b"\xff" * 4 + b"\x00\x00\xc0\x3f"
    assert packed[:16] == expected and packed[16:32] == bytes(Pair(7, 2.5)) and packed[32:34] == b"ab"
    with pytest.raises(ValueError, match="argument 0 has 1 bytes, the parameter has 8"):
        sim.pack(((0, 8),), (b"a",))


def test_compiled_ptx_is_cached_by_content(tmp_path, monkeypatch):
    source, header = tmp_path / "k.cu", sim.ROOT / "build" / "ptxsim_cache_test.h"
    monkeypatch.setattr(sim, "CACHE", tmp_path / "cache")
    header.write_text("#define VALUE 41\n")
    source.write_text(f'#include "{header}"\nextern "C" __global__ void k(int* out) {{ *out = VALUE; }}\n')
    try:
        first = sim.compile_ptx(source, "sm_80")
        assert "41" in first
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", None)  # cached: no compiler runs
            assert sim.compile_ptx(source, "sm_80") == first
        header.write_text("#define VALUE 43\n")
        assert "43" in sim.compile_ptx(source, "sm_80")
    finally:
        header.unlink()
    source.write_text("this is no CUDA\n")
    with pytest.raises(RuntimeError, match="nvcc cannot compile"):
        sim.compile_ptx(source, "sm_80")
