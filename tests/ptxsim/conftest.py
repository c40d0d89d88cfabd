import shutil

import core
import pytest

from tests.ptxsim import sim


@pytest.fixture(scope="session", autouse=True)
def interpreter():
    """The interpreter, compiled from its sources."""
    if shutil.which("cmake") is None:
        pytest.skip("ptxsim: no cmake to build the interpreter with")
    return core.library()


@pytest.fixture(scope="session")
def nvcc():
    """Compiles CUDA to PTX, once per source."""
    if shutil.which("nvcc") is None:
        pytest.skip("ptxsim: no nvcc to make PTX with")
    return core.nvcc


@pytest.fixture
def launch():
    """`launch(kernel, grid, block, smem, *args, source=..., arch=...)` on CPU tensors; see sim.launch."""
    if sim.absent() is not None:
        pytest.skip(f"ptxsim: {sim.absent()}")
    return sim.launch
