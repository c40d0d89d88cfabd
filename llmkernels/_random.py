"""The random bits of dropout: a pure function of (seed, row, column), the same on every backend and thread count.

The seed is an int64 tensor on the device of the call, so that CUDA graphs, compilers and activation checkpointing
replay it. A row has two 32-bit keys, the halves of splitmix64's output number `row` (Steele, Lea, Flood 2014,
doi:10.1145/2660193.2660195); an element hashes its column with them in two rounds of multiply and xor-shift, whose
constants are those of a 32-bit mixer with a bias of 0.107 (the `hash-prospector` search, public domain). 64- and
32-bit arithmetic wraps around. csrc/common/random.h is the same in C++.

    z = seed + (row + 1) * 0x9e3779b97f4a7c15
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9
    z = (z ^ z >> 27) * 0x94d049bb133111eb
    z = z ^ z >> 31;  key0 = low half of z, key1 = high half
    h = column + key0
    h = (h ^ h >> 16) * 0x21f0aaad ^ key1
    h = (h ^ h >> 15) * 0x735a2d97
    bits = h ^ h >> 15

An element is kept where bits >> 8 is at least round(p * 2^24): p = 0 keeps and p = 1 drops everything.
"""

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from torch's generator of `device`: int64, shape ()."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """What 24 random bits are compared with: an element is kept where they are not below."""
    return round(p * 2**24)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied with; with p = 1 nothing is kept."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shifted(z: Tensor, count: int) -> Tensor:
    """A logical shift to the right of 64 bits."""
    return (z >> count) & ((1 << (64 - count)) - 1)


def row_keys(seed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The two keys of each row; int64 tensors of the shape of `rows` that hold 32 bits."""
    z = seed + (rows + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    return z & _LOW, _shifted(z, 32)


def bits(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """32 random bits for each pair of `rows` and `columns`, which broadcast; int64."""
    key0, key1 = row_keys(seed, rows)
    h = (columns + key0) & _LOW
    h = (((h ^ (h >> 16)) * 0x21F0AAAD) & _LOW) ^ key1
    h = ((h ^ (h >> 15)) * 0x735A2D97) & _LOW
    return h ^ (h >> 15)


def keep(seed: Tensor, rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """Which elements dropout with probability `p` keeps: bool, the broadcast shape of `rows` and `columns`."""
    return (bits(seed, rows, columns) >> 8) >= threshold(p)
