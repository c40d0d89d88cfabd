"""What tests, `llmkernels check` and benchmarks run for cross entropy: shapes, inputs, truth, baseline, bytes."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels import functional
from llmkernels.ops.cross_entropy import reference
from llmkernels.ops.cross_entropy.reference import Settings
from llmkernels.testing.inputs import Inputs, outputs_and_gradients, short_name

OPS = ("cross_entropy", "linear_cross_entropy")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CrossEntropyCase:
    """One call. `shape` is that of the logits; `hidden` that of the layer before them, 0 without one.

    `target` is "index", "probabilities" (of the dtype of the logits) or "wide" (probabilities in fp32); `data` names
    the distribution of the logits: normal, large, offset, masked (some are -Inf), sure (one is far above the others).
    """

    op: str
    shape: tuple[int, ...]  # [C], [N, C] or, without a layer, [N, C, d1, ...]
    dtype: torch.dtype = torch.float32
    hidden: int = 0
    bias: bool = False
    target: str = "index"
    weight: bool = False
    ignored: bool = False
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    data: str = "normal"

    @property
    def axis(self) -> int:
        """That of the classes."""
        return min(1, len(self.shape) - 1) if not self.hidden else len(self.shape) - 1

    @property
    def classes(self) -> int:
        return self.shape[self.axis]

    @property
    def option(self) -> str:
        """The word for this case in tests/coverage.toml."""
        if self.classes > 8192:
            return "long_row"
        for name, value in (
            (self.data, self.data != "normal"),
            (self.target, self.target != "index"),
            ("smoothing", self.label_smoothing),
            ("z_loss", self.z_loss),
            ("softcap", self.softcap),
            ("weight", self.weight),
            ("ignored", self.ignored),
            ("dims", len(self.shape) > 2),
        ):
            if value:
                return name
        return self.reduction

    def __str__(self) -> str:
        words = [self.op, "x".join(map(str, self.shape)), short_name(self.dtype)]
        words += [f"h{self.hidden}"] if self.hidden else []
        words += [name for name in ("bias", "weight", "ignored") if getattr(self, name)]
        words += [
            f"{name}{getattr(self, name):g}" for name in ("label_smoothing", "z_loss", "softcap") if getattr(self, name)
        ]
        words += [self.target] if self.target != "index" else []
        words += [self.reduction] if self.reduction != "mean" else []
        return "-".join([*words, *([self.data] if self.data != "normal" else [])])

    @property
    def settings(self) -> Settings:
        return Settings(-100, self.label_smoothing, self.z_loss, self.softcap)

    @property
    def options(self) -> dict:
        return {"reduction": self.reduction, **self.settings._asdict()}


@dataclass
class CrossEntropyInputs(Inputs):
    """Tensors of one case: the arguments and the gradient that arrives at the loss."""

    LEAVES = ("input", "linear_weight", "linear_bias", "probabilities")
    OUTPUTS = ("loss",)
    GRADS = ("dloss",)

    input: Tensor
    linear_weight: Tensor | None
    linear_bias: Tensor | None
    probabilities: Tensor | None
    index: Tensor | None
    weight: Tensor | None
    dloss: Tensor

    @property
    def target(self) -> Tensor:
        return self.index if self.probabilities is None else self.probabilities


def make_inputs(case: CrossEntropyCase, device: str | torch.device = "cpu", seed: int = 0) -> CrossEntropyInputs:
    """Random tensors; the same for a case and seed on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, scale=1.0):
        # fp64 only where its digits matter: benchmarks draw 10^8 numbers.
        wide = torch.float32 if math.prod(shape) > 1 << 22 else torch.float64
        return torch.randn(shape, generator=generator, dtype=wide) * scale

    def placed(tensor, dtype=case.dtype):
        return tensor.to(dtype).to(device)

    axis, batch = case.axis, (*case.shape[: case.axis], *case.shape[case.axis + 1 :])
    index = torch.randint(case.classes, batch, generator=generator)
    if case.hidden:
        input, linear_weight = normal((*batch, case.hidden)), normal((case.classes, case.hidden), case.hidden**-0.5)
        linear_bias = normal((case.classes,)) if case.bias else None
    else:
        input, linear_weight, linear_bias = _spread(case, normal(case.shape), index), None, None
    probabilities = None
    if case.target != "index":
        wide = torch.float64 if case.dtype == torch.float64 else torch.float32
        kind = wide if case.target == "wide" else case.dtype
        probabilities = placed(torch.softmax(normal(case.shape), axis), kind)
    if case.ignored and index.numel():
        index[..., ::3] = -100 if index.dim() else index
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    weight = torch.rand(case.classes, generator=generator, dtype=torch.float64) + 0.5
    dloss = normal(batch if case.reduction == "none" else ())
    return CrossEntropyInputs(
        placed(input),
        None if linear_weight is None else placed(linear_weight),
        None if linear_bias is None else placed(linear_bias),
        probabilities,
        index.to(device) if probabilities is None else None,
        placed(weight, case.dtype if case.dtype.itemsize > 2 else acc) if case.weight else None,
        placed(dloss),
    )


def _spread(case: CrossEntropyCase, logits: Tensor, index: Tensor) -> Tensor:
    """Logits of the distribution that `case.data` names."""
    if case.data == "large":
        return logits * 30.0
    if case.data == "offset":
        return logits + 1000.0
    if case.data == "masked":  # a third of the classes, never the target
        place = torch.arange(case.classes).view(-1, *[1] * (len(case.shape) - 1 - case.axis)) % 3 == 0
        targets = torch.zeros_like(logits, dtype=torch.bool).scatter_(case.axis, index.unsqueeze(case.axis), True)
        return logits.masked_fill(place & ~targets, -math.inf)
    if case.data == "sure":
        return logits.scatter_add(case.axis, index.unsqueeze(case.axis), torch.full_like(logits, 20.0))
    return logits


def call(case: CrossEntropyCase, inputs: CrossEntropyInputs, backend: str | None = None) -> tuple[Tensor, ...]:
    """The public function on the tensors of `inputs`: (loss,)."""
    options = {**case.options, "weight": inputs.weight, "backend": backend}
    if case.op == "cross_entropy":
        return (functional.cross_entropy(inputs.input, inputs.target, **options),)
    options["linear_bias"] = inputs.linear_bias
    return (functional.linear_cross_entropy(inputs.input, inputs.linear_weight, inputs.target, **options),)


def call_torch(case: CrossEntropyCase, inputs: CrossEntropyInputs) -> tuple[Tensor, ...]:
    """The same by torch's own functions: the baseline of accuracy and of speed."""
    logits = inputs.input
    if case.hidden:
        logits = torch_functional.linear(logits, inputs.linear_weight, inputs.linear_bias)
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    target, axis = inputs.target, case.axis
    if case.hidden:
        logits, axis = logits.reshape(-1, case.classes), 1
        target = target.reshape(-1) if inputs.probabilities is None else target.reshape(-1, case.classes)
    if inputs.probabilities is not None and case.dtype.itemsize == 2 and case.target == "wide":
        logits = logits.float()
    weight = None if inputs.weight is None else inputs.weight.to(logits.dtype)
    options = {"weight": weight, "label_smoothing": case.label_smoothing}
    loss = torch_functional.cross_entropy(logits, target, reduction=case.reduction, **options)
    if case.z_loss:
        z = case.z_loss * torch.logsumexp(logits, axis).square()
        if inputs.probabilities is None:
            z = torch.where(target == -100, 0.0, z)
        kept = reference.denominator(target.reshape(-1), weight, target.numel() // case.classes, -100)
        loss = loss + (z if case.reduction == "none" else z.sum() if case.reduction == "sum" else z.sum() / kept)
    if case.hidden and case.reduction == "none":
        loss = loss.view(case.shape[:-1])
    return (loss.to(case.dtype),)


def _wide(inputs: CrossEntropyInputs) -> CrossEntropyInputs:
    names = ("input", "linear_weight", "linear_bias", "probabilities", "weight", "dloss")
    found = {name: getattr(inputs, name) for name in names}
    return inputs.replace(**{name: None if t is None else t.double() for name, t in found.items()})


def truth(case: CrossEntropyCase, inputs: CrossEntropyInputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64."""
    return outputs_and_gradients(_wide(inputs), lambda leaves: call_torch(replace(case, dtype=torch.float64), leaves))


def as_rows(case: CrossEntropyCase, name: str, tensor: Tensor) -> Tensor:
    """A result as `[rows, cols]`."""
    if name == "loss":
        return tensor.reshape(-1, 1)
    if name == "dlinear_bias":
        return tensor.reshape(1, -1)
    if name == "dinput" and case.hidden:
        return tensor.reshape(-1, case.hidden)
    if name == "dlinear_weight":
        return tensor
    return tensor.movedim(case.axis, -1).reshape(-1, case.classes)


def term_size(case: CrossEntropyCase, inputs: CrossEntropyInputs, name: str) -> Tensor | None:
    """`[rows]`: the rms size of the terms that a result is a sum or difference of; None where there is only one."""
    if math.prod(case.shape) > 1 << 24:
        return None  # of benchmarks, where this would take minutes; rows as long as theirs are judged without it too
    wide = _wide(inputs)
    logits = wide.input
    if case.hidden:
        logits = torch_functional.linear(logits, wide.linear_weight, wide.linear_bias)
    u = reference.capped(logits, case.softcap).movedim(case.axis, -1).reshape(-1, case.classes)
    target = wide.target
    if wide.probabilities is not None:
        target = target.movedim(case.axis, -1).reshape(-1, case.classes)
    else:
        target = target.reshape(-1)
    stats = reference.cross_entropy_fwd(u, target, wide.weight, None, *case.settings)[1]
    _, p, q = reference.of_rows(u, target, wide.weight, stats, case.settings._replace(softcap=0.0))
    kept = torch.ones_like(stats[0]) if wide.probabilities is not None else (target != -100).double()
    divisor = reference.denominator(target, wide.weight, u.shape[0], -100) if case.reduction == "mean" else 1.0
    lse = stats[0] + stats[1]
    distance = torch.where(q > 0, (u - stats[0].unsqueeze(-1)).abs() * q, 0.0).sum(-1)
    if name == "loss":
        # A sum of exponentials has the term 1, of the largest logit: its logarithm has no more digits than that.
        sizes = kept * (stats[2] * (1.0 + stats[1]) + distance + case.z_loss * lse.square())
        # The sum and the division of a reduced loss, one number with no others to average with, round again.
        return sizes if case.reduction == "none" else 2.0 * sizes.sum().reshape(1) / divisor
    dloss = kept * wide.dloss.abs().reshape(-1) / divisor
    if name == "dprobabilities":
        return None
    # p = exp(log p) is as uncertain as its argument, which is rounded by up to half an ulp of its own size.
    uncertain = torch.where(p > 0, p * (1.0 + 0.25 * (u - lse.unsqueeze(-1)).abs()), 0.0)
    terms = dloss.unsqueeze(-1) * ((stats[2] + 2.0 * case.z_loss * lse.abs()).unsqueeze(-1) * uncertain + q)
    if name == "dinput" and not case.hidden:
        return terms.square().mean(-1).sqrt()
    if name == "dinput":
        return (terms.square() @ wide.linear_weight.square()).mean(-1).sqrt()
    if name == "dlinear_bias":
        return terms.square().sum(0).mean().sqrt().reshape(1)
    return (terms.square().t() @ wide.input.reshape(-1, case.hidden).square()).mean(-1).sqrt()


def bytes_moved(case: CrossEntropyCase, direction: str) -> int:
    """Bytes that must be read and written once: "fwd", "bwd" or "fwd+bwd". With a layer: its tensors."""
    size = math.prod(case.shape)
    if case.hidden:
        size = (size // case.classes + case.classes) * case.hidden
    return {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction] * size * case.dtype.itemsize


def plain_case(op: str, dtype: torch.dtype = torch.float32, *, tiny: bool = False) -> CrossEntropyCase:
    """An ordinary call of `op` with every tensor present; `tiny` where each element is perturbed alone."""
    layer = {"hidden": 4 if tiny else 24, "bias": True} if op == "linear_cross_entropy" else {}
    return CrossEntropyCase(op, (3, 5) if tiny else (6, 24), dtype, reduction="none", **layer)


def reshaped(case: CrossEntropyCase, shape: tuple[int, ...]) -> CrossEntropyCase:
    """The same call on logits of another shape, one that a user gives: `llmkernels check --shape`."""
    return replace(case, shape=shape)


def _options(op: str) -> list[dict]:
    """Each option alone, and together."""
    every = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0}
    found = [{"reduction": reduction} for reduction in ("none", "mean", "sum")]
    found += [{"weight": True}, {"ignored": True}, {"ignored": True, "reduction": "none"}]
    found += [{"label_smoothing": 0.1}, {"label_smoothing": 0.2, "weight": True, "ignored": True}]
    found += [{"z_loss": 1e-2}, {"z_loss": 1e-2, "weight": True, "ignored": True}, {"softcap": 2.0}, every]
    found += [{"target": target} for target in ("probabilities", "wide")]
    found += [{"target": "probabilities", "weight": True, **every}, {"target": "wide", "reduction": "none"}]
    if op == "cross_entropy":
        found += [{"data": data} for data in ("large", "offset", "masked", "sure")]
        found += [{"data": "masked", "reduction": "none", "weight": True}]
    return found


def test_cases() -> list[CrossEntropyCase]:
    """The cases of the test battery: each option, each dtype, awkward row lengths, hard data."""
    cases = []
    for dtype in DTYPES:
        cases += [CrossEntropyCase("cross_entropy", (5, 33), dtype, **options) for options in _options("cross_entropy")]
        cases += [CrossEntropyCase("cross_entropy", (2, 7, 3), dtype, reduction=way) for way in ("mean", "none")]
        for options in _options("linear_cross_entropy"):
            cases.append(CrossEntropyCase("linear_cross_entropy", (5, 33), dtype, hidden=16, **options))
        cases.append(CrossEntropyCase("linear_cross_entropy", (2, 3, 19), dtype, hidden=8, bias=True))
    op = "cross_entropy"
    cases += [CrossEntropyCase(op, (3, cols)) for cols in (1, 2, 7, 8, 16, 17, 64, 65, 1000, 1025, 2049)]
    # More rows and longer rows than the blocks of a small GPU take at a time.
    cases += [CrossEntropyCase(op, shape, torch.bfloat16, ignored=True) for shape in ((301, 72), (40, 4104))]
    cases += [CrossEntropyCase(op, (9, 1500), torch.bfloat16, label_smoothing=0.1, softcap=5.0, weight=True)]
    cases += [CrossEntropyCase(op, (9, 1500), torch.float32, target="probabilities", softcap=5.0, z_loss=1e-3)]
    cases += [CrossEntropyCase(op, (17,), reduction=way) for way in ("mean", "none", "sum")]
    cases += [CrossEntropyCase(op, (17,), target="probabilities"), CrossEntropyCase(op, (0, 17), reduction="sum")]
    cases += [CrossEntropyCase(op, (2, 3, 4, 5), target="probabilities", reduction="none", weight=True)]
    cases += [CrossEntropyCase(op, (0, 17), reduction="none"), CrossEntropyCase(op, (2, 5, 3, 4), ignored=True)]
    cases += [CrossEntropyCase("linear_cross_entropy", (0, 17), hidden=8, reduction="sum")]
    cases += [CrossEntropyCase("linear_cross_entropy", (150, 40), torch.bfloat16, hidden=24, bias=True, ignored=True)]
    return cases


def long_cases() -> list[CrossEntropyCase]:
    """Rows of up to 131,072 classes: too slow for an interpreter."""
    return [
        CrossEntropyCase("cross_entropy", shape, dtype, **options)
        for shape, options in (
            ((3, 8200), {"label_smoothing": 0.1}),
            ((2, 50257), {}),
            ((2, 131_072), {"z_loss": 1e-4}),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]
