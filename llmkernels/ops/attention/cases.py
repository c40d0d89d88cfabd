"""What tests, `llmkernels check` and benchmarks run for attention: shapes, options, inputs, truth, baseline, work."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmkernels import _random, functional
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("scaled_dot_product_attention", "attention_varlen")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SEED = 1234  # of torch's generator when dropout is drawn


@dataclass(frozen=True)
class AttentionCase:
    """One call. The lengths of attention_varlen are those of each sequence; B is then their number."""

    op: str
    B: int = 2
    H: int = 4
    S: int = 33
    T: int = 40
    D: int = 16
    dtype: torch.dtype = torch.float32
    Hk: int | None = None  # default: H
    Dv: int | None = None  # default: D
    causal: str | None = None
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    mask: str | None = (
        None  # bool, additive, additive_fp32, holes (rows without keys), finfo_min (rows of nothing else)
    )
    mask_shape: str = "BHST"  # the dimensions that are not broadcast
    dropout: float = 0.0
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    data: str = "normal"  # of q and k: normal, large, integer (exact in every type)
    name: str | None = None  # the word in tests/coverage.toml; default: made of the options
    lse: bool = True  # is returned, which torch's functions do not do

    @property
    def key_heads(self) -> int:
        return self.H if self.Hk is None else self.Hk

    @property
    def value_dim(self) -> int:
        return self.D if self.Dv is None else self.Dv

    @property
    def elements(self) -> int:
        """Scores of all heads: what the time of an interpreter grows with."""
        pairs = [(self.S, self.T)] * self.B if self.lengths is None else zip(*self.lengths, strict=True)
        return self.H * sum(rows * keys for rows, keys in pairs)

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        if self.name is not None:
            return self.name
        words = [f"mask_{self.mask}"] if self.mask else []
        words += [self.causal] if self.causal else []
        words += [word for word in ("window", "softcap", "alibi", "sinks", "dropout") if getattr(self, word)]
        words += ["gqa"] if self.key_heads != self.H else []
        words += ["dv"] if self.value_dim != self.D else []
        words += [self.data] if self.data != "normal" else []
        return "plain" if not words else words[0] if len(words) == 1 else "combined"

    def __str__(self) -> str:
        shape = f"{self.B}x{self.H}x{self.S}x{self.T}x{self.D}"
        if self.lengths is not None:
            shape = "_".join(f"{s}.{t}" for s, t in zip(*self.lengths, strict=True)) + f"x{self.H}x{self.D}"
        options = [f"kv{self.key_heads}"] if self.key_heads != self.H else []
        options += [f"dv{self.value_dim}"] if self.value_dim != self.D else []
        options += [self.causal] if self.causal else []
        options += [f"window{self.window[0]}.{self.window[1]}"] if self.window else []
        options += [word for word in ("softcap", "alibi", "sinks", "dropout") if getattr(self, word)]
        options += [f"{self.mask}.{self.mask_shape}"] if self.mask else []
        options += [self.data] if self.data != "normal" else []
        return "-".join([self.op, shape, short_name(self.dtype), *options])


@dataclass
class AttentionInputs(Inputs):
    """Tensors of one case: the arguments and the gradients that arrive at out and lse."""

    LEAVES = ("q", "k", "v", "mask", "sinks")
    OUTPUTS = ("out", "lse")
    GRADS = ("dout", "dlse")

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    dout: Tensor
    dlse: Tensor
    alibi_slopes: Tensor | None = None
    boolean_mask: Tensor | None = None  # apart, because it is no leaf
    cu_seqlens: tuple[Tensor, Tensor] | None = None


def make_inputs(case: AttentionCase, device: str | torch.device = "cpu", seed: int = 0) -> AttentionInputs:
    """Random tensors, never zeros; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=case.dtype, scale=1.0):
        if case.data == "integer":
            return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(device)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    cu_seqlens = None
    rows, keys = case.S, case.T
    shape = lambda heads, length, dim: (case.B, heads, length, dim)
    if case.lengths is not None:
        ends = [torch.tensor([0, *itertools.accumulate(lengths)]) for lengths in case.lengths]
        cu_seqlens = tuple(end.to(torch.int32).to(device) for end in ends)
        rows, keys = (int(end[-1]) for end in ends)
        shape = lambda heads, length, dim: (length, heads, dim)
    scale = 6.0 if case.data == "large" else 1.0
    q = normal(*shape(case.H, rows, case.D), scale=scale)
    k = normal(*shape(case.key_heads, keys, case.D), scale=scale)
    v, dout = normal(*shape(case.key_heads, keys, case.value_dim)), normal(*shape(case.H, rows, case.value_dim))
    dlse = normal(*((case.H, rows) if case.lengths is not None else (case.B, case.H, rows)), dtype=wide)
    sinks = normal(case.H, dtype=wide) if case.sinks else None
    slopes = None
    if case.alibi:
        slopes = torch.exp2(-torch.arange(1, case.H + 1) * (8.0 / case.H)).to(wide).to(device)
        if case.B % 2 == 0:
            slopes = slopes * torch.linspace(1.0, 0.5, case.B, device=device, dtype=wide)[:, None]
    mask, boolean_mask = _make_mask(case, generator, device)
    return AttentionInputs(q, k, v, mask, sinks, dout, dlse, slopes, boolean_mask, cu_seqlens)


def _make_mask(case: AttentionCase, generator, device) -> tuple[Tensor | None, Tensor | None]:
    """(additive mask, boolean mask)."""
    if case.mask is None:
        return None, None
    whole = dict(zip("BHST", (case.B, case.H, case.S, case.T), strict=True))
    sizes = tuple(size if letter in case.mask_shape else 1 for letter, size in whole.items())
    if case.mask == "documents":  # several in one row, each seen by itself: most blocks are hidden whole
        length = max(case.S, case.T) / 5.0
        document = lambda count: torch.arange(count) // length
        return None, (document(case.S)[:, None] == document(case.T)).expand(sizes).to(device)
    if case.mask in ("bool", "holes"):
        mask = torch.rand(sizes, generator=generator) < 0.7
        if case.mask == "holes" and "S" in case.mask_shape:
            mask[:, :, 1::3] = False
        return None, mask.to(device)
    dtype = torch.float32 if case.mask == "additive_fp32" and case.dtype != torch.float64 else case.dtype
    mask = torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
    if case.mask == "finfo_min":  # as Hugging Face masks padding
        mask = torch.zeros(sizes, dtype=dtype)
        mask[torch.rand(sizes, generator=generator) > 0.7] = torch.finfo(dtype).min
        mask[:, :, 1::3] = torch.finfo(dtype).min
    elif case.mask == "infinite":  # some keys of every row, all keys of some rows
        mask = torch.where(torch.rand(sizes, generator=generator) < 0.7, mask, -torch.inf).to(dtype)
        mask[:, :, 1::3] = -torch.inf
    return mask.to(device), None


def call(case: AttentionCase, inputs: AttentionInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (out, lse), or (out,)."""
    options = {
        "dropout_p": case.dropout, "causal": case.causal, "window": case.window, "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes, "sinks": inputs.sinks, "return_lse": case.lse, "backend": backend,
    }  # fmt: skip
    if case.dropout:
        torch.manual_seed(SEED)
    if case.lengths is not None:
        longest = (max(lengths, default=0) for lengths in case.lengths)
        found = functional.attention_varlen(inputs.q, inputs.k, inputs.v, *inputs.cu_seqlens, *longest, **options)
    else:
        mask = inputs.boolean_mask if inputs.mask is None else inputs.mask
        found = functional.scaled_dot_product_attention(
            inputs.q, inputs.k, inputs.v, mask, enable_gqa=case.key_heads != case.H, **options
        )
    return found if case.lse else (found,)


def call_torch(case: AttentionCase, inputs: AttentionInputs) -> tuple[Tensor, ...]:
    """The definition in the dtype of the inputs: the baseline of accuracy and, in fp64, the truth."""
    return _defined(case, inputs)[: 2 if case.lse else 1]


def _defined(case: AttentionCase, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """(out, lse) by the definition."""
    seed = None
    if case.dropout:
        torch.manual_seed(SEED)
        seed = _random.draw_seed(inputs.q.device)
    if case.lengths is None:
        mask = inputs.boolean_mask if inputs.mask is None else inputs.mask
        return _definition(case, inputs.q, inputs.k, inputs.v, mask, inputs.alibi_slopes, inputs.sinks, seed)
    results, first_q, first_k = [], 0, 0
    for b, (rows, keys) in enumerate(zip(*case.lengths, strict=True)):
        q, k, v = (
            x[first : first + count].transpose(0, 1)[None]
            for x, first, count in ((inputs.q, first_q, rows), (inputs.k, first_k, keys), (inputs.v, first_k, keys))
        )
        slopes = inputs.alibi_slopes
        slopes = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        results.append(_definition(case, q, k, v, None, slopes, inputs.sinks, seed, first_q, inputs.q.shape[0]))
        first_q, first_k = first_q + rows, first_k + keys
    out, lse = (torch.cat(parts, 2) for parts in zip(*results, strict=True))
    return out[0].transpose(0, 1), lse[0]


def _definition(case, q, k, v, mask, slopes, sinks, seed, base=0, row_count=None):
    """softmax(scores) @ v for [B, H, S, D], all scores at once."""
    (batch, heads, rows), keys = q.shape[:3], k.shape[2]
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(case.D)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = scores.to(wide)
    i, j = torch.arange(rows, device=q.device)[:, None], torch.arange(keys, device=q.device)
    center = i if case.causal == "top_left" else i + keys - rows
    if slopes is not None:
        scores = scores - slopes.to(wide).reshape(-1, heads, 1, 1) * (j - center).abs()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    left, right = case.window or (-1, -1)
    right = 0 if case.causal else right
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    seen &= (j >= center - left) if left >= 0 else True
    seen &= (j <= center + right) if right >= 0 else True
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.to(wide).reshape(1, heads, 1, 1).expand(batch, heads, rows, 1)
        scores = torch.cat((scores, sink), -1)
    weights, lse = _softmax(scores, keys)
    if seed is not None:
        head = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
        numbers = head * (rows if row_count is None else row_count) + base + i
        weights = torch.where(_random.keep(seed, numbers, j, case.dropout), weights / (1.0 - case.dropout), 0.0)
    return weights.to(q.dtype) @ v, lse


def _softmax(scores: Tensor, keys: int) -> tuple[Tensor, Tensor]:
    """(weights of the first `keys` columns, lse), whose gradients torch's own functions lose: those of a row without
    keys, and the one of lse where the scores are so large that it equals their largest."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    if scores.shape[-1] == 0:
        return scores, scores.sum(-1) - torch.inf
    safe = scores.masked_fill(empty, 0.0)
    top = safe.detach().amax(-1, keepdim=True)
    powers = torch.exp(safe - top)
    total = powers.sum(-1, keepdim=True)
    lse = (top + torch.log(total)).masked_fill(empty, -torch.inf)
    return (powers / total).masked_fill(empty, 0.0)[..., :keys], lse[..., 0]


def _wide(inputs: AttentionInputs) -> AttentionInputs:
    """In fp64."""
    names = ("q", "k", "v", "mask", "sinks", "dout", "dlse", "alibi_slopes")
    return inputs.replace(**{name: x.double() for name in names if (x := getattr(inputs, name)) is not None})


def truth(case: AttentionCase, inputs: AttentionInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64."""
    return outputs_and_gradients(_wide(inputs), lambda leaves: call_torch(case, leaves))


def as_rows(case: AttentionCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`: a query or key of a head; of a sinks' gradient, all heads."""
    cols = tensor.shape[-1]
    return tensor.reshape(tensor.numel() // max(cols, 1), cols)


def term_size(case: AttentionCase, inputs: AttentionInputs, name: str) -> Tensor | None:
    """`[rows]`: the rms size of the terms of each sum, and of what the error of a score does to them.

    A gradient of the scores is p * (dp - delta), a difference of sums; a score that is a sum of large products has an
    error of ulps of those, and p a relative error as large as that. Terms of 16-bit products are rounded each by
    itself, so their errors add up as squares.
    """
    if name == "lse":
        return None
    if case.lengths is None:
        sizes = _term_sizes(case, _wide(inputs))
    else:
        parts = [_term_sizes(replace(case, lengths=None), part) for part in _unpacked(case, _wide(inputs))]
        sizes = {key: torch.cat([part[key] for part in parts], 2) for key in ("out", "dq", "dk", "dv")}
        sizes = {key: value[0].transpose(0, 1) for key, value in sizes.items()}
        sizes["dsinks"] = sum(part["dsinks"] for part in parts)
    return as_rows(case, name, sizes[name]).square().mean(-1).sqrt()


def _unpacked(case: AttentionCase, inputs: AttentionInputs) -> Iterator[AttentionInputs]:
    """The sequences of a packed batch, each as a batch of one."""
    ends = [[0, *itertools.accumulate(lengths)] for lengths in case.lengths]
    for b in range(len(case.lengths[0])):
        queries, keys = slice(*ends[0][b : b + 2]), slice(*ends[1][b : b + 2])
        cut = lambda x, rows: x[rows].transpose(0, 1)[None]
        slopes = inputs.alibi_slopes
        yield inputs.replace(
            q=cut(inputs.q, queries),
            k=cut(inputs.k, keys),
            v=cut(inputs.v, keys),
            dout=cut(inputs.dout, queries),
            dlse=inputs.dlse[None, :, queries],
            alibi_slopes=slopes[b] if slopes is not None and slopes.dim() == 2 else slopes,
        )


def _term_sizes(case: AttentionCase, inputs: AttentionInputs) -> dict[str, Tensor]:
    power = 1 if case.dtype.itemsize > 2 else 2  # how errors add up
    group = inputs.q.shape[1] // inputs.k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (inputs.k, inputs.v))
    size = lambda x: x.abs() ** power
    product = lambda x, y: (size(x) @ size(y)) ** (1 / power)
    mask = inputs.boolean_mask if inputs.mask is None else inputs.mask
    scale = 1.0 / math.sqrt(case.D)
    plain = replace(case, dropout=0.0)
    weights = _definition(plain, inputs.q, k, torch.eye(k.shape[2], dtype=k.dtype, device=k.device), mask,
                          inputs.alibi_slopes, inputs.sinks, None)[0]  # fmt: skip
    terms = product(inputs.q, k.transpose(-1, -2)) * scale
    if case.alibi and power == 1:  # 16-bit inputs have it added in fp32
        i, j = (torch.arange(length, device=k.device) for length in (inputs.q.shape[2], k.shape[2]))
        center = i if case.causal == "top_left" else i + len(j) - len(i)
        slopes = inputs.alibi_slopes.reshape(-1, inputs.q.shape[1], 1, 1)
        terms = terms + slopes * (j - center[:, None]).abs()
    weights = weights * (1.0 + terms) / (1.0 - case.dropout)
    dweights = product(inputs.dout, v.transpose(-1, -2))
    delta = product(weights, dweights.transpose(-1, -2)).diagonal(dim1=-2, dim2=-1)
    if case.lse:
        delta = delta + inputs.dlse.abs()
    dscores = weights * (dweights + delta[..., None])
    summed = lambda x: (size(x).unflatten(1, (inputs.k.shape[1], group)).sum(2)) ** (1 / power)
    sizes = {
        "out": product(weights, v),
        "dv": summed(product(weights.transpose(-1, -2), inputs.dout)),
        "dq": product(dscores, k) * scale,
        "dk": summed(product(dscores.transpose(-1, -2), inputs.q) * scale),
        "dsinks": delta.abs().sum((0, 2)),
    }
    if inputs.mask is not None:
        sizes["dmask"] = size(dscores).sum_to_size(inputs.mask.shape) ** (1 / power)
    return sizes


def flops(case: AttentionCase, direction: str) -> int:
    """Multiplications and additions of the products, of the keys that are seen: "fwd", "bwd" or "fwd+bwd"."""
    lengths = zip(*case.lengths, strict=True) if case.lengths is not None else [(case.S, case.T)] * case.B
    pairs = sum(_seen(case, rows, keys) for rows, keys in lengths)
    products = {"fwd": (1, 1), "bwd": (3, 2), "fwd+bwd": (4, 3)}[direction]
    return 2 * case.H * pairs * (products[0] * case.D + products[1] * case.value_dim)


def _seen(case: AttentionCase, rows: int, keys: int) -> int:
    """How many pairs of a query and a key the causal mask and the window leave."""
    left, right = case.window or (-1, -1)
    right = 0 if case.causal else right
    shift = 0 if case.causal == "top_left" else keys - rows
    total = 0
    for i in range(rows):
        first = max(0, i + shift - left) if left >= 0 else 0
        last = min(keys - 1, i + shift + right) if right >= 0 else keys - 1
        total += max(0, last - first + 1)
    return total


def bytes_moved(case: AttentionCase, direction: str) -> int:
    """Bytes of q, k, v and out, read and written once; with a backward also their gradients."""
    rows, keys = case.B * case.S, case.B * case.T
    if case.lengths is not None:
        rows, keys = map(sum, case.lengths)
    size = rows * case.H * (case.D + case.value_dim) + keys * case.key_heads * (case.D + case.value_dim)
    return {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction] * size * case.dtype.itemsize


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> AttentionCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    sizes = {"B": 1, "H": 2, "Hk": 1, "S": 2, "T": 3, "D": 2} if tiny else {"Hk": 2, "S": 20, "T": 24, "D": 16}
    case = AttentionCase(op, dtype=dtype, sinks=True, **sizes)
    if op == "attention_varlen":
        return replace(case, lengths=((2, 1), (1, 2)) if tiny else ((5, 12), (9, 7)))
    return replace(case, mask="additive")


def reshaped(case: AttentionCase, shape: tuple[int, ...]) -> AttentionCase:
    """The same call on tensors of another shape, one that a user gives: (B, H, S, D), or fewer of the last ones."""
    B, H, S, D = (1,) * (4 - len(shape)) + tuple(shape[-4:])
    case = replace(case, B=B, H=H, S=S, T=S, D=D, Hk=None, Dv=None)
    return case if case.lengths is None else replace(case, lengths=((S,) * B, (S,) * B))


def _sdpa_cases(dtype: torch.dtype) -> list[AttentionCase]:
    op = "scaled_dot_product_attention"
    make = lambda **options: AttentionCase(op, dtype=dtype, **options)
    cases = [make(), make(S=70, T=70, D=64, B=1, H=2), make(S=1, T=150, D=32)]
    cases += [make(causal=causal, S=S, T=T) for causal in ("top_left", "bottom_right") for S, T in ((40, 40), (20, 50))]
    cases.append(make(causal="bottom_right", S=50, T=20))  # the first queries see nothing
    cases += [make(window=window, S=50, T=60) for window in ((8, 3), (-1, 5), (0, 0), (70, 70))]
    cases += [make(softcap=5.0), make(alibi=True, S=30), make(sinks=True), make(Hk=2), make(Hk=1), make(Dv=24)]
    cases += [make(mask="bool", mask_shape=shape) for shape in ("BHST", "BT", "ST", "")]
    cases += [make(mask="additive", mask_shape=shape) for shape in ("BHST", "HST", "BT", "BS")]
    cases += [make(mask="additive_fp32", mask_shape="ST"), make(mask="holes"), make(mask="finfo_min", mask_shape="BST")]
    # Of 16-bit inputs this gradient has more digits than out, from which delta is usually made.
    precise = {"mask": "additive_fp32", "name": "mask_additive_fp32", "Hk": 2}
    cases += [make(S=50, T=60, window=(30, 20), mask_shape=shape, **precise) for shape in ("BHST", "HST")]
    cases += [make(S=20, T=50, dropout=0.2, softcap=5.0, sinks=True, **precise), make(S=5, T=1, **precise)]
    cases += [make(mask="infinite", mask_shape="HST"), make(dropout=0.3), make(dropout=0.3, Hk=2, causal="top_left")]
    cases += [make(data="large"), make(D=24, S=20, T=20, name="head_dim"), make(D=7, Dv=5, S=9, T=9, name="head_dim")]
    cases.append(make(S=40, T=70, Hk=2, Dv=32, causal="bottom_right", window=(20, 4), softcap=8.0, alibi=True,
                      sinks=True, mask="additive", mask_shape="BST", dropout=0.2))  # fmt: skip
    return cases


def _varlen_cases(dtype: torch.dtype) -> list[AttentionCase]:
    make = lambda lengths, **options: AttentionCase("attention_varlen", B=len(lengths[0]), dtype=dtype, lengths=lengths,
                                                    **options)  # fmt: skip
    mixed, long = ((5, 1, 33, 0, 7), (9, 4, 33, 3, 0)), ((70, 20), (66, 90))
    return [
        make(mixed), make(long, D=64, H=2), make(mixed, causal="bottom_right"), make(long, causal="top_left"),
        make(long, window=(9, 4)), make(mixed, softcap=5.0), make(long, alibi=True), make(mixed, sinks=True),
        make(mixed, Hk=2), make(mixed, Dv=24), make(mixed, dropout=0.3),
        make(long, Hk=1, causal="bottom_right", window=(30, 0), softcap=8.0, alibi=True, sinks=True, dropout=0.2),
    ]  # fmt: skip


def test_cases() -> list[AttentionCase]:
    """The cases of the test battery: each option, each dtype, ragged tiles, rows without keys, empty tensors."""
    cases = [case for dtype in DTYPES for case in _sdpa_cases(dtype) + _varlen_cases(dtype)]
    op = OPS[0]
    cases += [AttentionCase(op, S=S, T=T, D=8, name="empty") for S, T in ((0, 5), (5, 0), (0, 0))]
    cases += [AttentionCase(op, B=0, name="empty"), AttentionCase(op, S=5, T=0, sinks=True, name="empty")]
    cases.append(AttentionCase(OPS[1], B=2, lengths=((0, 0), (0, 0)), name="empty"))
    # Head dimensions about what a tile or a vector has, and beyond.
    for D, dtype in itertools.product((1, 2, 8, 33, 80, 96, 128, 160, 256, 512), (torch.float32, torch.bfloat16)):
        cases.append(AttentionCase(op, 1, 2, 20, 37, D, dtype, Hk=1, causal="bottom_right", name="head_dim"))
    # More queries and keys than a tile has, with blocks that are skipped.
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cases += [
            AttentionCase(op, B=1, H=1, S=300, T=300, D=64, dtype=dtype, causal="top_left", name="tiles"),
            AttentionCase(op, B=1, H=1, S=200, T=333, D=64, dtype=dtype, window=(40, 10), name="tiles"),
            AttentionCase(op, B=1, H=1, S=130, T=260, D=128, dtype=dtype, mask="bool", name="tiles"),
            AttentionCase(op, B=1, H=1, S=230, T=331, D=32, dtype=dtype, mask="documents", mask_shape="ST"),
        ]
    return cases


def long_cases() -> list[AttentionCase]:
    """More keys than an interpreter has patience for."""
    return [
        AttentionCase(OPS[0], B=1, H=2, S=1500, T=1700, D=64, dtype=dtype, causal="bottom_right", name="long")
        for dtype in (torch.float32, torch.bfloat16)
    ]
