"""AMX: its tiles in emulation, what attention multiplies on them, and where the instructions are.

On a machine with AMX the same products and calls are compared with what the instructions give, bit by bit.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llmkernels import _native
from llmkernels.ops.attention import cases
from llmkernels.ops.attention.cases import AttentionCase
from llmkernels.testing.battery import evaluate, failures, judge
from tests.support import assert_same_with_any_threads
from tests.tree import ROOT

pytestmark = pytest.mark.skipif(_native.why_absent("cpu") is not None, reason=f"cpu: {_native.why_absent('cpu')}")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
FLAGS = (  # as in CMakeLists.txt
    *("-std=c++20", "-O2", "-Wall", "-Werror", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-ffp-contract=fast"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mavx512vnni", "-mavx512bf16"),
    *("-DCPU_CAPABILITY_AVX512", "-DCPU_CAPABILITY_AVX512_BF16", "-DCPU_CAPABILITY_AMX", f"-I{ROOT / 'csrc'}"),
)
EMULATED = ("-DCPU_CAPABILITY=AMX_EMULATED", "-DCPU_CAPABILITY_AMX_EMULATED", "-fsanitize=address,undefined")
REAL = ("-DCPU_CAPABILITY=AMX", "-mamx-tile", "-mamx-bf16", "-mamx-int8")


def needs(isa: str) -> None:
    if isa not in _native.module("cpu").available_isas():
        pytest.skip(f"cpu: {isa} does not run on this machine")


def compiled(folder: Path, *flags: str) -> Path:
    needs("avx512_bf16")
    if COMPILER is None:
        pytest.skip("c++: no compiler was found")
    program = folder / "amx_tiles"
    build = subprocess.run(
        [COMPILER, *FLAGS, *flags, ROOT / "tests/amx_tiles.cpp", "-o", program], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr[-3000:]
    return program


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    """tests/amx_tiles.cpp with the emulated instructions; AddressSanitizer watches what products read."""
    return compiled(tmp_path_factory.mktemp("emulated"), *EMULATED)


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    needs("amx")
    return compiled(tmp_path_factory.mktemp("real"), *REAL)


def output(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.strip()


def test_emulated_tiles_and_products_are_plain_sums(emulated):
    """All sizes from 1 to 40 in tiles of every shape; products of attention with NaN in the rows that pad them."""
    wrong, count = re.fullmatch(r"(\d+) wrong of (\d+)", output(emulated, "products")).groups()
    assert wrong == "0" and int(count) > 40**3


def test_what_the_processor_refuses_ends_the_emulation(emulated):
    count = int(output(emulated, "illegal"))
    assert count > 10
    for index in range(count):
        done = subprocess.run([emulated, "illegal", str(index)], capture_output=True, text=True)
        assert done.returncode != 0 and "illegal use of an emulated AMX tile: " in done.stderr, index


def test_emulated_tiles_are_what_the_instructions_do(emulated, real):
    assert output(real, "products").startswith("0 wrong")
    assert output(real, "random") == output(emulated, "random")


def test_program_with_the_instructions_compiles(tmp_path):
    compiled(tmp_path, *REAL)


def forced(isa: str, function):
    module = _native.module("cpu")
    before = module.isa()
    try:
        module.force_isa(isa)
        return function()
    finally:
        module.force_isa(before)


# Sizes about those of tiles, of blocks and of what products sum over at a time.
RAGGED = [
    AttentionCase(
        "scaled_dot_product_attention", 1, 2, S, T, D, torch.bfloat16, Hk=1, Dv=Dv, causal=causal, name="ragged"
    )
    for S, T, D, Dv in (
        *((17, 1, 1, 16), (31, 15, 3, 17), (32, 16, 16, 1), (33, 17, 31, 33), (48, 31, 32, 48), (49, 32, 33, 31)),
        *((95, 33, 48, 8), (96, 64, 64, 64), (97, 65, 65, 80), (111, 127, 80, 65), (129, 128, 96, 96)),
        *((193, 129, 2, 130), (100, 257, 128, 2)),
    )
    for causal in (None, "bottom_right")
] + [
    AttentionCase("scaled_dot_product_attention", 1, 1, 150, 290, 40, torch.bfloat16, window=(left, right))
    for left, right in ((0, 0), (16, 0), (33, 5), (-1, 31), (100, 0))
]
OPTIONS = [
    AttentionCase("scaled_dot_product_attention", 2, 4, 110, 140, 40, torch.bfloat16, Hk=2, **options)
    for options in (
        {"softcap": 4.0, "alibi": True, "sinks": True, "causal": "bottom_right"},
        {"mask": "holes", "dropout": 0.3},
        {"mask": "bool", "window": (30, 20)},
        *({"mask": "additive", "mask_shape": shape} for shape in ("BHST", "HST", "ST", "T", "BS")),
        {"mask": "finfo_min"},
        {"mask": "additive_fp32"},
        {"data": "large"},
    )
] + [
    AttentionCase(
        "attention_varlen",
        B=4,
        H=2,
        D=32,
        dtype=torch.bfloat16,
        lengths=((200, 3, 17, 33), (210, 0, 90, 31)),
        **options,
    )
    for options in ({}, {"causal": "bottom_right", "sinks": True}, {"window": (20, 10), "dropout": 0.1})
]


@pytest.mark.parametrize("case", RAGGED + OPTIONS, ids=str)
def test_attention_on_emulated_tiles(case, poison):
    needs("amx_emulated")
    assert forced("amx_emulated", lambda: failures(judge(cases, case, "cpu"))) == []


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_attention_on_emulated_tiles_is_bitwise_equal_for_any_thread_count(case):
    needs("amx_emulated")
    inputs = cases.make_inputs(case)
    forced("amx_emulated", lambda: assert_same_with_any_threads(lambda: evaluate(cases, case, inputs, "cpu")))


@pytest.mark.parametrize("case", RAGGED + OPTIONS, ids=str)
def test_attention_in_emulation_is_what_the_instructions_give(case):
    needs("amx"), needs("amx_emulated")
    inputs = cases.make_inputs(case)
    results, expected = (forced(isa, lambda: evaluate(cases, case, inputs, "cpu")) for isa in ("amx", "amx_emulated"))
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_emulated_tiles_are_used():
    """The order of sums is that of the instructions, so results differ from those of vectors in some last digit."""
    needs("amx_emulated")
    case = RAGGED[-1]
    inputs = cases.make_inputs(case)
    tiles, vectors = (
        forced(isa, lambda: evaluate(cases, case, inputs, "cpu")) for isa in ("amx_emulated", "avx512_bf16")
    )
    assert not torch.equal(tiles["lse"], vectors["lse"])


def test_amx_needs_the_processor():
    words = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    module = _native.module("cpu")
    if {"amx_tile", "amx_bf16", "amx_int8"} <= set(words):
        pytest.skip("cpu: this processor has AMX")
    assert "amx" not in module.available_isas() and module.isa() != "amx"
    with pytest.raises(ValueError, match="force_isa: instruction set 'amx' was not built or cannot run on this CPU"):
        module.force_isa("amx")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump: not installed")
def test_only_kernels_for_amx_have_its_instructions():
    if "AMX" not in _native.module("cpu").build_info()["isas"].split(","):
        pytest.skip("cpu: built for another processor")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", _native.module("cpu").__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    functions, function = {}, ""
    for line in lines:
        if line.endswith(">:"):
            function = line.split(" ", 1)[1]
        elif found := re.search(r"\t(ldtilecfg|tile\w+|tdp\w+) *(.*)", line):
            functions.setdefault(function, set()).add(" ".join(found.groups()).strip())
    assert [name for name in functions if "llmkernels::cpu::AMX::" not in name] == []
    found = set().union(*functions.values())
    assert {text for text in found if text.startswith("tdp")} == {
        f"{name} %tmm{6 + j},%tmm{4 + i},%tmm{2 * i + j}"
        for name in ("tdpbf16ps", "tdpbsud") for i in (0, 1) for j in (0, 1)
    }  # fmt: skip
    of_bytes = [name for name, texts in functions.items() if any(text.startswith("tdpbsud") for text in texts)]
    assert of_bytes and all("signed char" in name for name in of_bytes)
    for entry in ("attention_fwd(", "attention_bwd("):
        texts = set().union(*(found for name, found in functions.items() if f"AMX::{entry}" in name))
        assert {text.split()[0] for text in texts} == {"ldtilecfg", "tilerelease"}
