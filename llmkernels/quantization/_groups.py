"""Groups of columns and pairs of nibbles, which int4 and nf4 share.

A row `[K]` is cut into groups of `group_size` columns, each with a scale; the last may be shorter. Two codes of four
bits share a byte:

      byte j of a row:   bit   7   6   5   4   3   2   1   0
                             +---------------+---------------+
                             | column 2j + 1 |   column 2j   |
                             +---------------+---------------+

With odd K the high half of the last byte is zero.
"""

import torch
from torch import Tensor


def count(columns: int, group_size: int | None) -> int:
    """Groups in a row of so many columns, one at least."""
    return max(1, -(-columns // group_size)) if group_size else 1


def split(rows: Tensor, group_size: int | None) -> Tensor:
    """`[N, K]` as `[N, G, group_size]`, with zeros behind the last column."""
    width = group_size or max(rows.shape[1], 1)
    groups = count(rows.shape[1], group_size)
    padded = torch.nn.functional.pad(rows, (0, groups * width - rows.shape[1]))
    return padded.unflatten(1, (groups, width))


def join(groups: Tensor, columns: int) -> Tensor:
    """The opposite of `split`."""
    return groups.flatten(1)[:, :columns]


def spread(scales: Tensor, columns: int, group_size: int | None) -> Tensor:
    """Scales `[N, G]` for each column: `[N, K]`, or `[N, 1]` if a row has one."""
    return scales if not group_size else scales.repeat_interleave(group_size, 1)[:, :columns]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 ... 15 `[N, K]` of any dtype as bytes `[N, (K + 1) // 2]`."""
    if codes.numel() and not bool(((codes >= 0) & (codes <= 15)).all()):
        raise ValueError(f"pack_nibbles: codes are {codes.min()} to {codes.max()}, expected 0 to 15")
    even = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return even[:, 0::2] | even[:, 1::2] << 4


def unpack_nibbles(data: Tensor, columns: int) -> Tensor:
    """The opposite of `pack_nibbles`: uint8 `[N, K]`."""
    return torch.stack((data & 15, data >> 4), 2).flatten(1)[:, :columns]
