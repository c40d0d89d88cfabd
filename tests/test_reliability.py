"""Promises that hold for every op: threads, forks, leaks, instruction sets, very large tensors."""

import concurrent.futures
import gc
import re
import resource
from pathlib import Path

import pytest
import torch

import llmkernels
from llmkernels import _native, functional
from llmkernels.ops.gated import cases as gated
from llmkernels.ops.norm import cases
from llmkernels.ops.rope import cases as rope
from llmkernels.ops.softmax import cases as softmax
from llmkernels.testing.battery import evaluate
from tests.support import assert_same_with_any_threads, run_python

cpu = pytest.mark.skipif(_native.why_absent("cpu") is not None, reason=f"cpu: {_native.why_absent('cpu')}")


def test_every_instruction_set(isa):
    """Resolved once in a process, so each gets its own."""
    out = run_python(
        """
        import warnings; warnings.simplefilter("ignore")
        from llmkernels import NoBackendError, _native, ops
        from llmkernels.testing.battery import failures, judge
        wrong = []
        for cases, case in ((cases, case) for cases in map(ops.cases_of, ops.FAMILIES) for case in cases.test_cases()):
            try:
                found = failures(judge(cases, case, "cpu"))
            except NoBackendError:  # what must not be refused is written in coverage.toml
                continue
            wrong += [(str(case), found)] if found else []
        print(_native.module("cpu").isa(), len(wrong), wrong[:3])
        """,
        LLMKERNELS_ISA=isa,
    )
    assert out.split()[:2] == [isa, "0"], out


@cpu
def test_unknown_instruction_set_is_a_clear_error():
    out = run_python(
        """
        import torch, llmkernels
        try:
            llmkernels.functional.rms_norm(torch.randn(2, 8), (8,), backend="cpu")
        except Exception as error:
            print(error)
        """,
        LLMKERNELS_ISA="sse9",
    )
    assert "LLMKERNELS_ISA: unknown instruction set 'sse9', expected one of " in out
    assert "default, avx2, avx512, avx512_vnni, avx512_bf16, amx, amx_emulated\n" in out
    with pytest.raises(ValueError, match="force_isa: unknown instruction set"):
        _native.module("cpu").force_isa("sse9")


THREADED = [
    (family, case)
    for dtype in (torch.float32, torch.bfloat16)
    for family, case in (
        *((cases, cases.NormCase(op, (517, 200), (200,), dtype)) for op in cases.OPS),
        *(
            (gated, gated.GatedCase(op, (517, 200), dtype, packed=packed))
            for op in gated.OPS
            for packed in (False, True)
        ),
        *(
            (rope, rope.RopeCase("rope", (2, 5, 517, 40), dtype, rotary=24, interleaved=pairs))
            for pairs in (False, True)
        ),
    )
]


@cpu
@pytest.mark.parametrize(
    "cases, case", THREADED, ids=lambda value: "" if value in (cases, gated, rope, softmax) else str(value)
)
def test_bitwise_equal_for_any_thread_count(cases, case):
    inputs = cases.make_inputs(case)
    assert_same_with_any_threads(lambda: evaluate(cases, case, inputs, "cpu"))


def test_called_from_eight_threads_at_once():
    case = cases.NormCase("add_rms_norm", (64, 96), (96,))
    inputs = [cases.make_inputs(case, seed=seed) for seed in range(8)]
    alone = [evaluate(cases, case, item) for item in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for expected, actual in zip(alone, pool.map(lambda item: evaluate(cases, case, item), inputs), strict=True):
                assert all(torch.equal(expected[name], actual[name]) for name in actual)


def test_use_backend_is_of_its_own_thread():
    x = torch.randn(2, 8)
    with llmkernels.use_backend("torch"), concurrent.futures.ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(lambda: llmkernels.explain("layer_norm", x, (8,)).chosen).result()
        assert llmkernels.explain("layer_norm", x, (8,)).chosen == "torch"
    assert elsewhere == llmkernels.explain("layer_norm", x, (8,)).chosen


@cpu
def test_more_than_one_thread_works():
    """at::parallel_for is silently serial in a module compiled without OpenMP."""
    out = run_python(
        """
        import time, torch, llmkernels.functional as F
        torch.set_num_threads(2)
        x = torch.randn(4096, 1024)
        F.rms_norm(x, (1024,), backend="cpu")
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(60): F.rms_norm(x, (1024,), backend="cpu")
        threads = [int(t) for t in __import__("os").listdir("/proc/self/task")]
        busy = sum(int(open(f"/proc/self/task/{t}/stat").read().split()[13]) > 0 for t in threads)
        print(busy)
        """
    )
    assert int(out) > 1


def test_works_in_a_forked_child():
    out = run_python(
        """
        import os, torch, llmkernels.functional as F
        torch.set_num_threads(1)
        x = torch.randn(64, 256)
        expected = F.layer_norm(x, (256,))
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(F.layer_norm(x, (256,)), expected) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert out.strip() == "0"


def test_no_leak():
    case = cases.NormCase("add_layer_norm", (256, 1024), (1024,))
    inputs = cases.make_inputs(case)

    def run(count):
        for _ in range(count):
            evaluate(cases, case, inputs)
        gc.collect()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        return tensors, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    run(30)
    tensors, peak = run(30)
    later_tensors, later_peak = run(150)
    assert later_tensors <= tensors  # tests before this one may have left some that only now go
    assert later_peak - peak < 20_000, "kilobytes; one leaked result of 150 calls would be 150,000"


@cpu
@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_more_than_two_to_the_31_elements(op):
    """Rows that all lie on the same memory, so that the input takes none; the last rows are at offsets past 2^31."""
    rows, cols = 2**19 + 3, 2**12
    row = torch.randn(1, cols).bfloat16()
    x = row.expand(rows, cols)
    assert x.numel() > 2**31
    y = getattr(functional, op)(x, (cols,), backend="cpu")
    expected = getattr(functional, op)(row, (cols,), backend="cpu")[0]
    assert torch.equal(y[0], expected) and torch.equal(y[-1], expected) and torch.equal(y[2**18 + 1], expected)


@cpu
def test_more_than_two_to_the_31_elements_gated():
    """As above; a packed row, so that the stride is not that of the output."""
    rows, cols = 2**19 + 3, 2**12
    packed = torch.randn(1, 2 * cols).bfloat16()
    y = functional.swiglu(packed.expand(rows, 2 * cols), backend="cpu")
    expected = functional.swiglu(packed, backend="cpu")[0]
    assert torch.equal(y[0], expected) and torch.equal(y[-1], expected) and torch.equal(y[2**18 + 1], expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_all_16_bit_inputs_through_load_and_store(dtype, isa):
    """The residual of an add is a pure elementwise sum: every bit pattern plus zero comes back as it was."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    _, total = functional.add_rms_norm(x, torch.zeros_like(x), (256,), backend="cpu")
    _, doubled = functional.add_rms_norm(x, x, (256,), backend="cpu")
    nan = torch.isnan(x)
    assert torch.equal(torch.isnan(total), nan) and torch.equal(torch.isnan(doubled), nan)
    assert torch.equal(total[~nan], (x + 0.0)[~nan])
    assert torch.equal(doubled[~nan], (x + x)[~nan])


@cpu
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages")
@pytest.mark.parametrize("megabytes, asked", ((16, False), (48, True)))
def test_large_results_lie_in_huge_pages(megabytes, asked):
    """In what the C library maps afresh in each call; never in pages that reach beyond the result."""
    x = torch.randn(megabytes << 10, 256)
    y = functional.softmax(x, -1)
    middle, inside = y.data_ptr() + y.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if place := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(text, 16) for text in place.groups())
            inside = begin <= middle < end
        elif inside and line.startswith("VmFlags"):
            assert ("hg" in line.split()) == asked
            assert not asked or (y.data_ptr() <= begin and end <= y.data_ptr() + y.nbytes)
            return
    raise AssertionError("no such mapping")
