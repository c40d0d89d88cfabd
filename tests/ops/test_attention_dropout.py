"""Dropout of attention: the same bits on every backend, and bits that are as good as random."""

import shutil
import subprocess

import pytest
import torch

from llmkernels import _random
from tests.ops.attention_support import close, every_dtype, normal_on, sdpa, varlen
from tests.tree import ROOT


@pytest.fixture
def random(device):
    return normal_on(device)


# --- in attention ---------------------------------------------------------------------------------------------------


def what_is_kept(backend, shape, p, device, dtype=torch.float32, seed=11, **options):
    """keep / (T (1 - p)), read off values that are the rows of an identity; (that, the seed that was drawn)."""
    B, H, S, T = shape
    q, k = torch.zeros(B, H, S, 8, device=device, dtype=dtype), torch.zeros(B, H, T, 8, device=device, dtype=dtype)
    v = torch.eye(T, device=device, dtype=dtype).expand(B, H, T, T)
    torch.manual_seed(seed)
    out, _ = sdpa(backend, q, k, v, dropout_p=p, **options)
    torch.manual_seed(seed)
    return out, _random.draw_seed(torch.device(device))


@every_dtype
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_dropout_has_the_bits_of_the_generator(p, dtype, backend, device, poison):
    B, H, S, T = shape = (2, 3, 37, 40)
    for seed in (11, 12):
        out, drawn = what_is_kept(backend, shape, p, device, dtype, seed)
        rows = torch.arange(B * H * S, device=device).view(B, H, S, 1)
        keep = _random.keep(drawn, rows, torch.arange(T, device=device), p)
        assert torch.equal(out != 0, keep)
        expected = torch.tensor(1.0 / (T * (1.0 - p)))
        torch.testing.assert_close(out[keep].float().cpu(), expected.expand(int(keep.sum())), rtol=0.01, atol=1e-4)


def test_dropout_of_packed_sequences_has_the_bits_of_the_generator(backend, device, poison):
    lengths, H = (5, 20, 12), 2
    q, k = (torch.zeros(37, H, 8, device=device) for _ in range(2))
    v = torch.cat([torch.eye(20, device=device)[:length] for length in lengths])[:, None].expand(37, H, 20)
    torch.manual_seed(4)
    out, _ = varlen(backend, q, k, v, lengths, lengths, dropout_p=0.4)
    torch.manual_seed(4)
    drawn = _random.draw_seed(torch.device(device))
    rows = torch.arange(37, device=device)[:, None] + 37 * torch.arange(H, device=device)
    keep = _random.keep(drawn, rows[..., None], torch.arange(20, device=device), 0.4)
    inside = (
        torch.arange(20, device=device)
        < torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)).to(device)[:, None]
    )
    assert torch.equal(out != 0, keep & inside[:, None])


def test_dropout_of_zero_and_of_one(backend, random, device, poison):
    q, k, v = (random(1, 2, length, 16).requires_grad_() for length in (20, 37, 37))
    state = torch.get_rng_state()
    assert torch.equal(sdpa(backend, q, k, v, dropout_p=0.0)[0], sdpa(backend, q, k, v)[0])
    assert torch.equal(torch.get_rng_state(), state), "without dropout nothing is drawn"
    out, lse = sdpa(backend, q, k, v, dropout_p=1.0)
    assert not out.any()
    close(lse, sdpa(backend, q, k, v)[1])
    for grad in torch.autograd.grad(out, (q, k, v), random(*out.shape)):
        assert not grad.any()


def test_dropout_is_drawn_anew_and_replayed_for_a_seed(backend, device):
    shape = (1, 2, 20, 40)
    first, _ = what_is_kept(backend, shape, 0.5, device, seed=1)
    again, _ = what_is_kept(backend, shape, 0.5, device, seed=1)
    other, _ = what_is_kept(backend, shape, 0.5, device, seed=2)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("checkpointed", (False, True))
def test_dropout_is_replayed_in_the_backward(checkpointed, backend, random, device, poison):
    """The gradient of v sums what was kept in the forward, also when activation checkpointing runs it again."""
    q, k, v = (random(1, 2, length, 16).requires_grad_() for length in (20, 37, 37))
    eye = torch.eye(37, device=device).expand(1, 2, 37, 37)
    attend = lambda v: sdpa(backend, q, k, v, dropout_p=0.5)[0]
    torch.manual_seed(8)
    kept = attend(eye)
    torch.manual_seed(8)
    out = torch.utils.checkpoint.checkpoint(attend, v, use_reentrant=False) if checkpointed else attend(v)
    dout = random(*out.shape)
    close(torch.autograd.grad(out, v, dout)[0], kept.transpose(-1, -2) @ dout)


# --- the generator --------------------------------------------------------------------------------------------------


def bits(seed, rows, columns):
    return _random.bits(torch.tensor(seed), rows[:, None], columns)


def test_bits_are_those_of_the_definition():
    """splitmix64 of seed 1234567 is known (Vigna, prng.di.unimi.it): its outputs are the keys of the rows."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    low, high = _random.row_keys(torch.tensor(1234567), torch.arange(5))
    assert [(int(b) << 32) | int(a) for a, b in zip(low, high, strict=True)] == expected

    def by_hand(key0, key1, column):
        h = (column + key0) & 0xFFFFFFFF
        h = (((h ^ h >> 16) * 0x21F0AAAD) & 0xFFFFFFFF) ^ key1
        h = ((h ^ h >> 15) * 0x735A2D97) & 0xFFFFFFFF
        return h ^ h >> 15

    columns = torch.tensor([0, 1, 77, 2**31, 2**32 - 1])
    found = bits(1234567, torch.arange(5), columns)
    for row, whole in enumerate(expected):
        keys = whole & 0xFFFFFFFF, whole >> 32
        assert found[row].tolist() == [by_hand(*keys, int(column)) for column in columns]


def test_bits_in_cpp_are_those_in_python(tmp_path):
    """csrc/common/random.h, on its own: rows beyond 2^32 too, and a vector of columns."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    header = ROOT / "csrc" / "common" / "random.h"
    if compiler is None or not header.exists():
        pytest.skip("no C++ compiler, or no sources")
    seeds, rows = (0, 1, -1, 2**62 + 12345, -(2**63)), (0, 1, 77, 2**31, 2**33 + 5)
    columns = (0, 1, 63, 4096, 2**31 - 1, 2**32 - 1)
    numbers = lambda values, kind: ", ".join(f"static_cast<{kind}>({value % 2**64}u)" for value in values)
    source = f"""
        #include <cstdio>
        #include <initializer_list>
        #include "{header}"
        using Four = uint32_t __attribute__((vector_size(16)));
        int main() {{
          for (int64_t seed : {{{numbers(seeds, "int64_t")}}})
            for (int64_t row : {{{numbers(rows, "int64_t")}}})
              for (uint32_t column : {{{numbers(columns, "uint32_t")}}}) {{
                const llmkernels::RowKeys keys = llmkernels::row_keys(seed, row);
                const Four both = llmkernels::random_bits(keys, Four{{column, column + 1}});
                std::printf("%u %u %u\\n", llmkernels::random_bits(keys, column), both[0], both[1]);
              }}
        }}
    """
    (tmp_path / "bits.cpp").write_text(source)
    subprocess.run([compiler, "-std=c++17", "bits.cpp", "-o", "bits"], cwd=tmp_path, check=True, timeout=120)
    printed = subprocess.run([tmp_path / "bits"], capture_output=True, text=True, check=True).stdout
    found = torch.tensor([list(map(int, line.split())) for line in printed.splitlines()])
    expected = [bits(seed, torch.tensor(rows), torch.tensor(columns)).flatten() for seed in seeds]
    after = [bits(seed, torch.tensor(rows), (torch.tensor(columns) + 1) % 2**32).flatten() for seed in seeds]
    assert torch.equal(found[:, 0], torch.cat(expected)) and torch.equal(found[:, 1], found[:, 0])
    assert torch.equal(found[:, 2], torch.cat(after))


@pytest.mark.parametrize("seed", (0, 1, -1, 2**62 + 12345))
def test_bits_are_as_good_as_random(seed):
    """Rates, and correlations between neighbours in rows, columns and seeds, within five standard deviations."""
    rows, columns = torch.arange(512), torch.arange(1024)
    here = bits(seed, rows, columns)
    count = here.numel()
    single = torch.stack([(here >> position) & 1 for position in range(8, 32)]).double()
    assert (single.mean((1, 2)) - 0.5).abs().max() < 5 * 0.5 / count**0.5
    assert (single.mean(1) - 0.5).abs().max() < 6 * 0.5 / 512**0.5  # of each column
    assert (single.mean(2) - 0.5).abs().max() < 6 * 0.5 / 1024**0.5  # and each row
    for p in (0.01, 0.1, 0.5, 0.9):
        keep = _random.keep(torch.tensor(seed), rows[:, None], columns, p).double()
        assert abs(keep.mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
        centred = keep - keep.mean()
        others = [
            *(centred.roll(lag, axis) for axis in (0, 1) for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128)),
            centred.roll((1, 1), (0, 1)),
            centred.roll((1, -1), (0, 1)),
            *(
                (bits(seed + step, rows, columns) >> 8 >= _random.threshold(p)).double() - keep.mean()
                for step in (1, 2)
            ),
        ]
        for other in others:
            assert abs((centred * other).mean()) < 5 * p * (1 - p) / count**0.5


def test_a_pair_of_rows_that_share_a_key_is_not_alike():
    """Rows whose first key is nearly the same differ by the second; shifted columns do not repeat a row."""
    rows = torch.arange(200_000)
    key0, _ = _random.row_keys(torch.tensor(3), rows)
    order = key0.argsort()
    near = (
        order[(key0[order][1:] - key0[order][:-1]).argsort()[:20]],
        order[1:][(key0[order][1:] - key0[order][:-1]).argsort()[:20]],
    )
    columns = torch.arange(4096)
    for a, b in zip(*near, strict=True):
        shift = int(key0[b] - key0[a])
        assert shift < 1000
        first, second = (_random.keep(torch.tensor(3), row, columns, 0.5).double() - 0.5 for row in (a, b))
        assert abs((first[shift:] * second[: 4096 - shift]).mean()) < 5 * 0.25 / (4096 - shift) ** 0.5


def test_threshold_rounds_to_24_bits():
    assert [_random.threshold(p) for p in (0.0, 1.0, 0.5, 2.0**-24, 1e-9)] == [0, 2**24, 2**23, 1, 0]
    columns = torch.arange(100_000)
    for p, kept in ((0.0, True), (1.0, False)):
        assert bool((_random.keep(torch.tensor(9), torch.tensor(4), columns, p) == kept).all())
