"""Real text that every machine has: the source files of Python's standard library, as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from llmkernels.cli import UsageError

MIN_BYTES = 100_000


def standard_library(limit: int = 4_000_000) -> bytes:
    """The .py files of the standard library's top level in alphabetical order, up to `limit` bytes."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return b"\n".join(path.read_bytes() for path in files)[:limit]


def read(path: Path | None) -> bytes:
    """The bytes of a file, or without one the standard library. Raises: UsageError, it is absent or too short."""
    if path is None:
        return standard_library()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"--text: cannot read {path}: {error.strerror}") from error
    if len(data) < MIN_BYTES:
        raise UsageError(f"--text: {path} has {len(data)} bytes, expected at least {MIN_BYTES}")
    return data


def split(text: bytes) -> tuple[Tensor, Tensor]:
    """(training, held-out) bytes as uint8 tensors; the last tenth is held out."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def batch(data: Tensor, step: int, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(input, target), each `[size, length]`; the same for a seed and step whoever asks."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(data) - length - 1, (size,), generator=generator)
    rows = torch.stack([data[start : start + length + 1] for start in starts]).long()
    return rows[:, :-1], rows[:, 1:]
