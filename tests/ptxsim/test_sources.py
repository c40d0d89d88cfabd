"""Rules for CUDA sources that the interpreter's users rely on."""

import re

from tests.tree import ROOT

# One instruction per function, and nothing else, so that a wrong operand order has one place.
WRAPPERS = {"ptx.cuh", "ptx_sm90.cuh", "wgmma.cuh"}


def test_inline_ptx_is_in_the_wrappers_only():
    """An empty asm, which only makes the compiler forget a value, is no PTX."""
    sources = [path for pattern in ("*.cu", "*.cuh", "*.h") for path in (ROOT / "csrc").rglob(pattern)]
    assert {path.name for path in sources} >= WRAPPERS
    for path in sources:
        if path.name not in WRAPPERS:
            assert re.findall(r'\basm\b[^"]*"(?!")', path.read_text()) == [], path


def test_kernels_and_launchers_are_free_of_torch():
    for path in (*(ROOT / "csrc/common/cuda").iterdir(), *(ROOT / "csrc/ops").rglob("*.cu")):
        assert not re.search(r"#include <(torch|ATen|c10)/", path.read_text()), path
