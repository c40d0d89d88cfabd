"""Shuffles, votes, atomics, cp.async and Hopper's barriers, clusters and TMA against the PTX manual."""

import itertools

import pytest
import torch

from tests.ptxsim import sim
from tests.ptxsim.launching import KERNELS

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=str(sim.absent()))

LANES = torch.arange(32)


def words(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator, dtype=torch.int64).int()


def run(kernel: str, given: torch.Tensor, rows: int, *, threads=32, blocks=1, source="conformance_warp.cu", **settings):
    out = torch.zeros(rows, threads * blocks, dtype=torch.int32)
    sim.launch(kernel, blocks, threads, 0, given, out, source=KERNELS / source, **settings)
    return out


# --- shuffles and votes ----------------------------------------------------------------------------------------------


def shuffled(mode: str, value: torch.Tensor, lane: torch.Tensor, limits: int) -> list[torch.Tensor]:
    """The results and predicates of shfl.sync, from the pseudo code of the manual."""
    clamp, segments = limits & 31, limits >> 8 & 31
    results, valid = [], []
    for i in range(32):
        offset = int(lane[i])
        last = (i & segments) | (clamp & ~segments)
        first = i & segments
        if mode == "up":
            j = i - offset
            inside = j >= last
        elif mode == "down":
            j = i + offset
            inside = j <= last
        elif mode == "bfly":
            j = i ^ offset
            inside = j <= last
        else:
            j = first | (offset & ~segments)
            inside = j <= last
        results.append(int(value[j if inside else i]))
        valid.append(int(inside))
    return [torch.tensor(results), torch.tensor(valid)]


def test_shuffles():
    given = words(2, 32)
    x, y = given[0], given[1].long() % 32
    calls = [
        ("idx", y, 0x1F), ("idx", y, 0x1807), ("idx", 9, 0x1C03), ("up", 1, 0), ("up", 5, 0x1800), ("down", 1, 0x1F),
        ("down", 3, 0x1807), ("bfly", 16, 0x1F), ("bfly", 7, 0x1F), ("bfly", 1, 0x1C03),
    ]  # fmt: skip
    out = run("shuffles", given, 2 * len(calls)).long()
    for i, (mode, lane, limits) in enumerate(calls):
        lane = lane if isinstance(lane, torch.Tensor) else torch.full((32,), lane)
        for got, expected in zip(out[2 * i : 2 * i + 2], shuffled(mode, x, lane, limits), strict=True):
            assert got.equal(expected), (mode, limits)


def mask(chosen) -> int:
    return sum(1 << i for i, bit in enumerate(chosen) if bit)


@pytest.mark.parametrize("same", [False, True])
def test_votes(same):
    given = words(2, 32)
    if same:
        given[:] = 7
    x, y = ([int(value) & 0xFFFFFFFF for value in row] for row in given)
    odd = [value % 2 == 1 for value in x]
    everyone = 0xFFFFFFFF
    xor = low = 0
    high = everyone
    for value in x:
        xor, low, high = xor ^ value, low | value & 0xFF, high & (value | 0xFF)
    all_same = len(set(y)) == 1
    expected = [
        all(odd), any(odd), mask(odd), [mask(other % 5 == value % 5 for other in x) for value in x], everyone, 1,
        everyone if all_same else 0, all_same, sum(x), int(given[0].min()), max(x), high, low, xor,
        [mask(odd) if bit else mask(not b and v % 2 == 0 for b, v in zip(odd, y, strict=True)) for bit in odd],
    ]  # fmt: skip
    out = run("votes", given, len(expected))
    for row, (got, wanted) in enumerate(zip(out.tolist(), expected, strict=True)):
        wanted = wanted if isinstance(wanted, list) else [wanted] * 32
        assert [value & everyone for value in got] == [int(value) & everyone for value in wanted], row


# --- atomics ---------------------------------------------------------------------------------------------------------

WORD, LONG = (1 << 32) - 1, (1 << 64) - 1


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


def added(word: int, dtype: torch.dtype, *terms: float) -> int:
    """A word (or two, for float64) of floats, with a term added to each of them."""
    size = 8 if dtype == torch.float64 else 4
    values = torch.frombuffer(bytearray(word.to_bytes(size, "little")), dtype=dtype)
    total = (values.double() + torch.tensor(terms, dtype=torch.float64)).to(dtype)
    if total.isnan().any():  # payloads are nobody's business
        total[total.isnan()] = torch.nan
    return int.from_bytes(bytes(total.view(torch.uint8).tolist()), "little")


def atomics(x: int, y: int, place: int, wide: int, wide_place: int) -> list[int]:
    """What run_atomics of conformance_warp.cu puts: old values, in words."""
    put = []
    for operation in (
        lambda p: p + y,
        lambda p: p - x,
        lambda p: min(p, y),
        lambda p: max(p, x),
        lambda p: min(p, y, key=signed),
        lambda p: max(p, x, key=signed),
        lambda p: p & (y | 3),
        lambda p: p | x & 0x1010,
        lambda p: p ^ y,
        lambda p: 0 if p >= x else p + 1,
        lambda p: y if p == 0 or p > y else p - 1,
        lambda p: x,
        lambda p: y if p == x else p,
        lambda p: y if p == x else p,
        lambda p: added(p, torch.float32, 1.5),
        lambda p: 0x3C003800,
        lambda p: added(p, torch.float16, 0.25, 1024.0),
        lambda p: 0x3F803F00,
        lambda p: added(p, torch.bfloat16, 0.25, 8.0),
    ):
        put.append(place)
        place = operation(place) & WORD
    put.append(place)
    for operation in (
        lambda p: p + wide,
        lambda p: max(p, wide ^ 0x123456789ABCDEF),
        lambda p: 0x3FF8000000000000,
        lambda p: added(p, torch.float64, 0.5),
        lambda p: wide if p == 0x4000000000000000 else p,
        lambda p: p,
    ):
        put += [wide_place & WORD, wide_place >> 32]
        wide_place = operation(wide_place) & LONG
    return put


def unsigned(tensor: torch.Tensor) -> list:
    return (tensor.long() & WORD).tolist()


def test_shared_atomics():
    given = words(3, 32)
    x, y, z = unsigned(given)
    out = unsigned(run("shared_atomics", given, 33).T)
    total = xor = 0
    for i in range(32):
        total, xor = (total + x[i]) & WORD, xor ^ y[i]
    for i, got in enumerate(out):
        wide_place, wide = y[i] | z[i] << 32, x[i] | y[i] << 32
        assert got == [*atomics(x[i], y[i], z[i], wide, wide_place), (total, xor, max(z))[i % 3]], i


def test_global_atomics():
    given, threads = words(3, 128), 128
    x, y, _ = unsigned(given)
    out = torch.zeros(32 * threads + 2 + 3 * threads, dtype=torch.int32)
    sim.launch("global_atomics", 2, 64, 0, given, out, source=KERNELS / "conformance_warp.cu")
    put = unsigned(out[: 32 * threads].view(32, threads).T)
    for i, got in enumerate(put):
        assert got == atomics(x[i], y[i], 0, x[i] | y[i] << 32, 0), i
    xor = 0
    for value in y:
        xor ^= value
    assert unsigned(out[32 * threads : 32 * threads + 2]) == [sum(x) & WORD, xor]


# --- cp.async --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("async_mode", ["eager", "lazy", "random"])
def test_cp_async(async_mode):
    given = words(4 * 32)
    out = run("cp_async", given, 14, async_mode=async_mode)
    data, first = given.view(torch.uint8), 0
    for size in (4, 8, 16):
        for part in (False, True):
            expected = torch.zeros(32, size, dtype=torch.uint8)
            for lane in range(32):
                count = (int(given[lane]) & 0xFFFFFFFF) % (size + 1) if part else size
                expected[lane, :count] = data[lane * size : lane * size + count]
            got = out[first : first + size // 4].T.contiguous()[LANES ^ 1].view(torch.uint8)
            assert got.equal(expected), (size, part)
            first += size // 4


# --- Hopper ----------------------------------------------------------------------------------------------------------


def hopper(kernel: str, given: torch.Tensor, rows: int, **settings) -> torch.Tensor:
    return run(kernel, given, rows, source="conformance_sm90.cu", arch="sm_90a", **settings)


def test_mbarrier_phases():
    given = words(1, 32)
    out = hopper("mbarrier_phases", given, 14)
    # Of a new barrier the phase before, of parity 1, counts as over. A phase that is under way is not over, then it is,
    # and the other parity is the next one's.
    expected = [0, 1] + 3 * [0, 1, 0, None]
    for row, wanted in zip(out, expected, strict=True):
        assert row.equal(given[0] if wanted is None else torch.full((32,), wanted, dtype=torch.int32))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_cluster_ring(size):
    given = words(2, 32 * 2 * size)
    out = hopper("cluster_ring", given, 3, blocks=2 * size, cluster=size)
    before = given.view(2, 2, size, 32).roll(1, 2).view(2, -1)
    assert out[0].equal(before[0])
    assert out[1].equal(before[1])
    block = torch.arange(2 * size).repeat_interleave(32)
    assert out[2].equal((block % size + 100 * size + 10000 * (block // size)).int())


# --- TMA -------------------------------------------------------------------------------------------------------------

SPAN = {sim.Swizzle.NONE: 64, sim.Swizzle.B32: 32, sim.Swizzle.B64: 64, sim.Swizzle.B128: 128}
BITS = {sim.Swizzle.NONE: 0, sim.Swizzle.B32: 1, sim.Swizzle.B64: 2, sim.Swizzle.B128: 3}
DTYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def places(box: tuple[int, ...], size: int, swizzle: int) -> torch.Tensor:
    """Where in shared memory, in bytes, the first byte of each element of the box lies, innermost dimension last."""
    count = torch.Size(box).numel()
    offset = torch.arange(count) * size
    return offset ^ ((offset >> 7) & ((1 << BITS[swizzle]) - 1)) << 4


def tma_case(rank: int, swizzle: int, size: int):
    """A tensor with strange strides, a box, and coordinates (all as in torch) from which it hangs over two edges."""
    inner = SPAN[swizzle] // size
    shape = (*(3, 2, 4, 5)[5 - rank :], inner * 2 if rank > 1 else inner * 2 + 16 // size)
    strides, step = [], shape[-1] * size + 16
    for length in reversed(shape[:-1]):
        strides.append(step // size)
        step *= length
    storage = torch.arange(step // size).to(DTYPES[size])
    tensor = storage.as_strided(shape, (*reversed(strides), 1))
    box = (*(2, 2, 3, 4)[5 - rank :], inner)
    at = (*(-1, 1, 2, 3)[5 - rank :], inner + 16 // size)
    return tensor, box, at


def inside(tensor: torch.Tensor, box: tuple[int, ...], at: tuple[int, ...]):
    """(place in the box, place in the tensor) of each element of the box that the tensor has."""
    for i, offsets in enumerate(itertools.product(*(range(length) for length in box))):
        place = tuple(start + offset for start, offset in zip(at, offsets, strict=True))
        if all(0 <= p < length for p, length in zip(place, tensor.shape, strict=True)):
            yield i, place


ALL_BOXES = pytest.mark.parametrize(
    "rank, swizzle, size", [(r, s, z) for r in range(1, 6) for s in SPAN for z in (1, 2, 4) if r > 1 or z == 2]
)


def box_arguments(tensor, box, at, swizzle, size):
    count = torch.Size(box).numel() * size
    header = torch.zeros(8, dtype=torch.int32)
    header[0] = count // 4
    header[1 : 1 + len(at)] = torch.tensor(at[::-1])
    return sim.TensorMap(tensor, box, swizzle), header, -(-count // 1024) * 1024


@ALL_BOXES
def test_tma_load(rank, swizzle, size):
    tensor, box, at = tma_case(rank, swizzle, size)
    box_map, header, shared = box_arguments(tensor, box, at, swizzle, size)
    out = torch.zeros(int(header[0]), dtype=torch.int32)
    source = KERNELS / "conformance_sm90.cu"
    sim.launch(f"tma_load_{rank}d", 1, 32, shared, box_map, header, out, source=source, arch="sm_90a")
    expected = torch.zeros(torch.Size(box).numel(), dtype=DTYPES[size])
    for i, place in inside(tensor, box, at):
        expected[i] = tensor[place]
    assert out.view(DTYPES[size])[places(box, size, swizzle) // size].equal(expected)


@ALL_BOXES
def test_tma_store(rank, swizzle, size):
    tensor, box, at = tma_case(rank, swizzle, size)
    box_map, header, shared = box_arguments(tensor, box, at, swizzle, size)
    contents = words(int(header[0]), seed=rank)
    before = tensor.clone()
    given, out = torch.cat([header, contents]), torch.zeros(1, dtype=torch.int32)
    source = KERNELS / "conformance_sm90.cu"
    sim.launch(f"tma_store_{rank}d", 1, 32, shared, box_map, given, out, source=source, arch="sm_90a")
    stored = contents.view(DTYPES[size])[places(box, size, swizzle) // size]
    for i, place in inside(tensor, box, at):
        before[place] = stored[i]
    assert out.item() == 1
    assert tensor.equal(before)
