"""ptxas, which the interpreter replaces, accepts the test kernels and the inline PTX of csrc/common/cuda; no spills."""

import re
import subprocess

import pytest

from tests.ptxsim import sim
from tests.ptxsim.launching import KERNELS

pytestmark = pytest.mark.skipif(sim.nvcc_absent() is not None, reason=str(sim.nvcc_absent()))

SPILLS = {"micro.cu"}  # it overflows a stack


@pytest.mark.parametrize("source", sorted(path.name for path in KERNELS.glob("*.cu")))
def test_kernels_compile(source, tmp_path):
    hopper = source.startswith("hopper") or "sm90" in source
    flags = [flag for flag in sim.NVCC_FLAGS if flag != "-ptx"]
    command = [sim.nvcc(), "-cubin", *flags, f"-arch={'sm_90a' if hopper else 'sm_80'}", "-Xptxas", "-v"]
    run = subprocess.run([*command, "-o", tmp_path / "cubin", KERNELS / source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    if source not in SPILLS:
        assert set(re.findall(r"(\d+) bytes spill", run.stderr)) <= {"0"}
    assert "ignored" not in run.stderr, run.stderr  # setmaxnreg, when ptxas cannot see the number of registers
