"""What tests, `llmkernels check` and benchmarks run for attention_kvcache: as cases.py, without anything's gradient."""

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from llmkernels import functional
from llmkernels.ops.attention import cases as attention_cases
from llmkernels.ops.attention.cases import AttentionCase, AttentionInputs
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("attention_kvcache",)
DTYPES = attention_cases.DTYPES
GARBAGE = float("nan")  # what a cache holds beyond its sequences


@dataclass(frozen=True)
class CacheCase:
    """One call. `lengths` are those before the append; the cache has room for T keys of each sequence."""

    name: str  # the word in tests/coverage.toml
    lengths: tuple[int, ...] = (40, 40)
    S: int = 1
    H: int = 4
    Hk: int = 4
    D: int = 16
    Dv: int = 16
    T: int = 40
    page_size: int | None = None
    appended: int = 0
    rotary: str | None = None  # half, interleaved, part (of each head)
    causal: str | None = None
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dtype: torch.dtype = torch.float32
    lse: bool = True  # is returned

    op: ClassVar[str] = OPS[0]
    data: ClassVar[str] = "normal"

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        return self.name

    def __str__(self) -> str:
        lengths = "_".join(map(str, self.lengths))
        options = [f"page{self.page_size}"] if self.page_size else []
        options += [f"append{self.appended}"] if self.appended else []
        options += [f"dv{self.Dv}"] if self.Dv != self.D else []
        options += [f"window{self.window[0]}.{self.window[1]}"] if self.window else []
        options += [word for word in (self.rotary, self.causal) if word]
        shape = f"{lengths}x{self.S}x{self.H}x{self.D}-kv{self.Hk}"
        return "-".join([self.op, self.name, shape, short_name(self.dtype), *options])

    def sequence(self, b: int) -> AttentionCase:
        """What sequence `b` computes, as a call of scaled_dot_product_attention."""
        return AttentionCase(
            attention_cases.OPS[0], 1, self.H, self.S, self.lengths[b] + self.appended, self.D, self.dtype, self.Hk,
            self.Dv, self.causal, self.window, self.softcap, self.alibi, self.sinks,
        )  # fmt: skip


@dataclass
class CacheInputs(Inputs):
    """The arguments of one case, and the keys and values of each sequence from which the caches were made."""

    LEAVES = ()
    OUTPUTS = ("out", "lse")
    GRADS = ()

    q: Tensor  # [B, S, H, D]
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor | None
    block_table: Tensor | None
    keys: list[Tensor]  # of each sequence, what is appended included: [T_b, Hk, D]
    values: list[Tensor]
    alibi_slopes: Tensor | None  # [B, H]
    sinks: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    def wide(self) -> "CacheInputs":
        """In fp64, but for the caches, which the definition does not read."""
        names = ("q", "alibi_slopes", "sinks", "cos", "sin")
        tensors = {name: x.double() for name in names if (x := getattr(self, name)) is not None}
        lists = {name: [x.double() for x in getattr(self, name)] for name in ("keys", "values")}
        return self.replace(**tensors, **lists)

    @functools.cached_property
    def heads_first(self) -> tuple[Tensor, Tensor]:
        """The caches as torch's users keep them, `[B, Hk, T, D]` contiguous."""
        return self.k_cache.transpose(1, 2).contiguous(), self.v_cache.transpose(1, 2).contiguous()


def make_inputs(case: CacheCase, device: str | torch.device = "cpu", seed: int = 0) -> CacheInputs:
    """Random tensors; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=case.dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    batch, totals = len(case.lengths), [length + case.appended for length in case.lengths]
    q = normal(batch, case.S, case.H, case.D)
    keys, values = ([normal(total, case.Hk, dim) for total in totals] for dim in (case.D, case.Dv))
    slopes = torch.rand((batch, case.H), generator=generator).to(device, wide) if case.alibi else None
    sinks = normal(case.H, dtype=wide) if case.sinks else None
    cos = sin = None
    if case.rotary is not None:
        pairs = case.D // 4 if case.rotary == "part" else case.D // 2
        angles = torch.arange(max(totals) + case.S)[:, None] / 30.0 ** (torch.arange(pairs) / pairs)
        cos, sin = angles.cos().to(device, wide), angles.sin().to(device, wide)
    k_cache, v_cache = (_contiguous(case, rows) for rows in (keys, values))
    table = None
    if case.page_size is not None:
        (k_cache, v_cache), table = _paged(case, (k_cache, v_cache))
    new = (None, None)
    if case.appended:
        new = (torch.stack([x[-case.appended :] for x in rows]) for rows in (keys, values))
    whole = table is None and not case.appended and all(length == case.T for length in case.lengths)
    lengths = None if whole else torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return CacheInputs(q, k_cache, v_cache, *new, lengths, table, keys, values, slopes, sinks, cos, sin)


def _contiguous(case: CacheCase, rows: list[Tensor]) -> Tensor:
    """The keys before the append, and garbage in all the rest."""
    cache = rows[0].new_full((len(rows), case.T, *rows[0].shape[1:]), GARBAGE)
    for b, length in enumerate(case.lengths):
        cache[b, :length] = rows[b][:length]
    return cache


def _paged(case: CacheCase, caches: tuple[Tensor, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The caches in pages of no order, of which two belong to nobody; table entries that are not needed are -1."""
    batch, each = len(case.lengths), -(-case.T // case.page_size)
    order = torch.randperm(batch * each + 2, generator=torch.Generator().manual_seed(3))[: batch * each]
    order = order.view(batch, each).to(caches[0].device)
    found = []
    for cache in caches:
        padded = cache.new_full((batch, each * case.page_size, *cache.shape[2:]), GARBAGE)
        padded[:, : case.T] = cache
        pages = cache.new_full((batch * each + 2, case.page_size, *cache.shape[2:]), GARBAGE)
        pages[order] = padded.unflatten(1, (each, case.page_size))
        found.append(pages)
    table = order.to(torch.int32)
    for b, length in enumerate(case.lengths):
        table[b, -(-(length + case.appended) // case.page_size) :] = -1
    return found, table


def call(case: CacheCase, inputs: CacheInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function: (out, lse), or (out,). It may be repeated, since what it appends is then there already."""
    rotary = None if case.rotary is None else (inputs.cos, inputs.sin, case.rotary == "interleaved")
    found = functional.attention_kvcache(
        inputs.q, inputs.k_cache, inputs.v_cache, k=inputs.k, v=inputs.v, cache_seqlens=inputs.cache_seqlens,
        block_table=inputs.block_table, rotary=rotary, causal=case.causal, window=case.window, softcap=case.softcap,
        alibi_slopes=inputs.alibi_slopes, sinks=inputs.sinks, return_lse=case.lse, backend=backend,
    )  # fmt: skip
    return found if case.lse else (found,)


def turned(x: Tensor, cos: Tensor, sin: Tensor, kind: str) -> Tensor:
    """Rows `[n, heads, D]` turned by `[n, pairs]` angles, rounded once."""
    if x.dtype.itemsize == 2:
        return turned(x.float(), cos, sin, kind).to(x.dtype)
    pairs = cos.shape[-1]
    a, b = (x[..., 0::2], x[..., 1::2]) if kind == "interleaved" else (x[..., :pairs], x[..., pairs : 2 * pairs])
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b = a * cos - b * sin, a * sin + b * cos
    return torch.stack((a, b), -1).flatten(-2) if kind == "interleaved" else torch.cat((a, b, x[..., 2 * pairs :]), -1)


def _sequences(case: CacheCase, inputs: CacheInputs):
    """(AttentionCase, AttentionInputs) of each sequence, turned where that is asked for."""
    for b, length in enumerate(case.lengths):
        q, k, v = inputs.q[b], inputs.keys[b], inputs.values[b]
        if case.rotary is not None:
            ordered = case.causal is not None or case.window is not None
            at = torch.arange(case.S if ordered else 1, device=q.device) + length
            q = turned(q, inputs.cos[at], inputs.sin[at], case.rotary)
            new = slice(length, length + case.appended)
            k = torch.cat((k[:length], turned(k[length:], inputs.cos[new], inputs.sin[new], case.rotary)))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes[b]
        dout = torch.ones(1, case.H, case.S, case.Dv, dtype=q.dtype, device=q.device)
        arriving = (dout, torch.zeros_like(dout[..., 0]))
        yield case.sequence(b), AttentionInputs(q, k, v, None, inputs.sinks, *arriving, slopes)


def call_torch(case: CacheCase, inputs: CacheInputs) -> tuple[Tensor, ...]:
    """The definition in the dtype of the inputs, sequence by sequence."""
    parts = [attention_cases.call_torch(*each) for each in _sequences(case, inputs)]
    out = torch.cat([out for out, _ in parts]).transpose(1, 2)
    return (out, torch.cat([lse for _, lse in parts])) if case.lse else (out,)


def truth(case: CacheCase, inputs: CacheInputs) -> dict[str, Tensor]:
    """Outputs in fp64."""
    return outputs_and_gradients(inputs.wide(), lambda inputs: call_torch(case, inputs))


def as_rows(case: CacheCase, name: str, tensor: Tensor) -> Tensor:
    """out as `[B * S * H, Dv]`, lse as `[B * H, S]`."""
    return tensor.reshape(-1, tensor.shape[-1]) if name == "out" else tensor.flatten(0, 1)


def term_size(case: CacheCase, inputs: CacheInputs, name: str) -> Tensor | None:
    """`[rows]`: as cases.term_size; of lse, what the one rounding of turned queries and keys does to a score."""
    parts = list(_sequences(case, inputs.wide()))
    if name == "out":
        sizes = [attention_cases.term_size(*part, "out").view(case.H, case.S) for part in parts]
        return torch.stack(sizes).transpose(1, 2).flatten()
    if case.rotary is None or case.dtype.itemsize > 2:
        return None
    sizes = []
    for _, tensors in parts:
        k = tensors.k.square().repeat_interleave(case.H // case.Hk, 1)
        sizes.append((tensors.q.square() @ k.transpose(-1, -2)).amax((-1, -2)).sqrt() / math.sqrt(case.D))
    # In ulps of fp32, the dtype of lse.
    return torch.cat(sizes).flatten() * (torch.finfo(case.dtype).eps / torch.finfo(torch.float32).eps)


def bytes_moved(case: CacheCase, direction: str) -> int:
    """Bytes of q, out and the keys and values that are seen, read and written once, and of what is appended."""
    keys = sum(case.lengths) + 3 * len(case.lengths) * case.appended
    rows = len(case.lengths) * case.S * case.H
    return (keys * case.Hk + rows) * (case.D + case.Dv) * case.dtype.itemsize


def reshaped(case: CacheCase, shape: tuple[int, ...]) -> CacheCase:
    """The same call on tensors of another shape, one that a user gives: (B, H, T, D), or fewer of the last ones."""
    B, H, T, D = (1,) * (4 - len(shape)) + tuple(shape[-4:])
    return replace(case, lengths=(T,) * B, T=T, H=H, Hk=H, D=D, Dv=D)


def test_cases() -> list[CacheCase]:
    """Each option and dtype, with ragged lengths, pages that do not end with a tile, sequences without keys."""
    return [case for dtype in DTYPES for case in _cases(dtype)]


def _cases(dtype: torch.dtype) -> list[CacheCase]:
    make = lambda name, **options: CacheCase(name, dtype=dtype, **options)
    ragged = {"lengths": (5, 33, 0, 40), "T": 48}
    chunk = {"lengths": (0, 17, 30), "S": 9, "appended": 9, "T": 48, "causal": "bottom_right"}
    return [
        make("plain"), make("plain", S=5, D=64, Dv=64, lengths=(40,)),
        make("lengths", **ragged), make("lengths", S=3, causal="bottom_right", **ragged),
        make("gqa", Hk=2, **ragged), make("gqa", Hk=1, S=2),
        make("paged", page_size=16, **ragged), make("paged", page_size=16, S=4, Hk=2, Dv=24, **ragged),
        make("paged", page_size=1, **ragged), make("paged", page_size=7, causal="bottom_right", S=2, **ragged),
        make("prefill", **chunk), make("prefill", page_size=16, Hk=2, **chunk),
        make("prefill", **{**chunk, "lengths": (0, 0), "S": 70, "appended": 70, "T": 70}),
        *(make("window", S=2, window=window, **ragged) for window in ((8, 0), (3, 4), (-1, 0), (0, 0))),
        make("softcap", softcap=3.0, **ragged), make("alibi", alibi=True, S=2, **ragged),
        make("sinks", sinks=True, **ragged), make("sinks", sinks=True, S=3, causal="top_left", **ragged),
        make("append", appended=1, **ragged), make("append", appended=3, S=2, page_size=5, **ragged),
        *(make("rotary", rotary=kind, appended=2, S=2, causal="bottom_right", **ragged)
          for kind in ("half", "interleaved", "part")),
        make("rotary", rotary="half", appended=1, S=3, **ragged),  # all queries are at one position
        make("rotary", rotary="interleaved", appended=2, S=2, window=(9, 0), page_size=16, **ragged),
        make("split", lengths=(900,), T=1000, H=2, Hk=1, D=64, Dv=64),
        make("split", lengths=(700, 3), T=1000, H=4, Hk=2, D=32, Dv=32, page_size=50, sinks=True),
        make("combined", appended=2, S=2, Hk=2, Dv=24, causal="bottom_right", window=(20, 3), softcap=8.0, alibi=True,
             sinks=True, rotary="half", page_size=16, **ragged),
    ]  # fmt: skip
