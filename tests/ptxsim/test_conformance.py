"""One instruction after the other: what the interpreter makes of it against results computed with exact arithmetic."""

import numpy as np
import pytest
import torch

from tests.ptxsim import conformance, sim
from tests.ptxsim.launching import KERNELS

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=str(sim.absent()))


def differs(kind: str, got: np.ndarray, expected: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """Where; `got` are words of 32 or 64 bits."""
    if kind in ("bits", "bits64"):
        return got.astype(object) != expected.astype(object) & (0xFFFFFFFF if kind == "bits" else (1 << 64) - 1)
    if kind == "fp8x2":
        ours, wanted = got.astype(object), expected.astype(object)
        parts = [(ours >> shift & 0xFF, wanted >> shift & 0xFF) for shift in (0, 8)]
        return np.any([(a != b) & ((a | b) != 0x80) for a, b in parts], axis=0)
    if kind in ("f32", "approx"):
        with np.errstate(all="ignore"):
            wanted = expected.astype(np.float32)
        if kind == "approx":
            with np.errstate(all="ignore"):
                error = abs(got.view(np.float32).astype(np.float64) - expected) / abs(expected)
            normal = np.isfinite(expected) & (abs(expected) > 2.0**-126) & (abs(expected) < 2.0**127)
            return normal & ~(error <= tolerance)
        return (got != wanted.view(np.uint32)) & ~(np.isnan(got.view(np.float32)) & np.isnan(wanted))
    if kind == "f64":
        wanted = expected.astype(np.float64)
        return (got != wanted.view(np.uint64)) & ~(np.isnan(got.view(np.float64)) & np.isnan(wanted))
    exponent = 0x7C00 if kind == "f16x2" else 0x7F80
    expected, wrong = expected.astype(np.uint64).astype(np.uint32), np.zeros(got.shape, bool)
    for shift in (0, 16):
        ours, wanted = got >> shift & 0xFFFF, expected >> shift & 0xFFFF
        nans = (ours & 0x7FFF > exponent) & (wanted & 0x7FFF > exponent)
        wrong |= (ours != wanted) & ~nans
    return wrong


@pytest.mark.parametrize("reference", conformance.KERNELS, ids=lambda reference: reference.__name__)
def test_scalar(reference):
    words = conformance.inputs()
    rows = list(reference(*words))
    counts = [2 if kind in ("bits64", "f64") else 1 for _, kind, *_ in rows]
    given = torch.from_numpy(words.view(np.int32))
    # Rows that a kernel puts beyond those of the reference are for comparisons with hardware.
    out = torch.zeros(sum(counts) + 8, words.shape[1], dtype=torch.int32)
    grid = (conformance.BLOCKS, conformance.THREADS)
    source, arch = ("conformance_sm90.cu", "sm_90a") if "fp8" in reference.__name__ else ("conformance.cu", "sm_80")
    sim.launch(reference.__name__, *grid, 0, given, out, source=KERNELS / source, arch=arch)
    got, first, wrong = out.numpy().view(np.uint32), 0, []
    for (name, kind, *expected), count in zip(rows, counts, strict=True):
        row = got[first]
        if count == 2:
            row = row.astype(np.uint64) | got[first + 1].astype(np.uint64) << np.uint64(32)
        bad = differs(kind, row, *expected)
        if bad.any():
            i = int(bad.argmax())
            args = ", ".join(f"{int(word):#010x}" for word in words[:, i])
            wrong.append(f"{name}({args}): got {int(row[i]):#x}, expected {expected[0][i]} ({int(bad.sum())} wrong)")
        first += count
    assert not wrong, "\n".join(wrong)


def test_control_and_memory():
    words = conformance.inputs()
    given = torch.from_numpy(words.view(np.int32))
    out = torch.zeros(11, words.shape[1], dtype=torch.int32)
    grid = (conformance.BLOCKS, conformance.THREADS)
    sim.launch("control_and_memory", *grid, 0, given, out, source=KERNELS / "conformance.cu")
    for i, got in enumerate(out.numpy().view(np.uint32).T.tolist()):
        x, y = (int(row[i]) for row in words[:2])
        n, steps = x % 97 + 1, 0
        while n != 1:
            n, steps = n // 2 if n % 2 == 0 else 3 * n + 1, steps + 1
        case = {0: x + 11, 1: (x ^ 0x5555) * 3, 2: x * 3, 3: int(f"{x:032b}"[::-1], 2), 4: x - y, 5: ~x}.get(
            y % 7, x >> 3
        )
        data, lane = x.to_bytes(4, "little"), i % 32
        block, thread = divmod(i, conformance.THREADS)
        halves = [x & 0xFFFF, x >> 16]
        expected = [
            steps, case, (3, 1, 4, 1, 5, 9, 2, 6)[y % 8], (y % 8 - x) % 8 * y, data[x % 4],
            data[y % 4] - (data[y % 4] >> 7 << 8), halves[x % 2], halves[y % 2] - (halves[y % 2] >> 15 << 16),
            lane, (1 << lane) - 1, thread + 1000 * block + 1000000 * conformance.BLOCKS,
        ]  # fmt: skip
        assert got == [value & 0xFFFFFFFF for value in expected], (i, x, y)
