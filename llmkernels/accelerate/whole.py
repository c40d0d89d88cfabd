"""Run a whole model on example inputs: what its modules are given, and what comes out before and after.

The model runs in eval mode, so that dropout does not tell two runs apart; its own hooks run, as they do in every call.
Where an argument `attention_mask` hides tokens, outputs are not compared.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Error of a tensor relative to its size, as norms: what rounding leaves of sums through some tens of layers.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Outcome:
    """Floating outputs (logits, hidden states, a loss) and the gradients of the parameters."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    problem: str | None = None  # why there are no gradients


def as_call(example_inputs) -> tuple[tuple, dict]:
    """`example_inputs` as the arguments of a call: a tensor, a tuple of arguments, or a dict of keywords."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if hasattr(example_inputs, "keys"):
        return (), {name: example_inputs[name] for name in example_inputs.keys()}  # noqa: SIM118 - BatchEncoding
    raise TypeError(
        f"accelerate: example_inputs is a {type(example_inputs).__name__}, expected a tensor, a tuple of arguments"
        " or a dict of keyword arguments"
    )


def run(
    model: nn.Module, call: tuple[tuple, dict], watched: Iterable[nn.Module] = (), *, gradients: bool = True
) -> tuple[Outcome, dict]:
    """The outcome, and what each `watched` module was given first, if that can be repeated: {id: (args, kwargs)}."""
    seen: dict[int, tuple] = {}
    handles = [module.register_forward_pre_hook(_Keep(seen), with_kwargs=True) for module in watched]
    modes = [(module, module.training) for module in model.modules()]
    args, kwargs = call
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
            torch.manual_seed(0)
            outputs = [x for x in pytree.tree_leaves(_plain(model(*args, **kwargs))) if isinstance(x, Tensor)]
            kept = kwargs.get("attention_mask")
            outputs = [_without_padding(x, kept) for x in outputs if x.is_floating_point()]
            found, problem = _gradients(outputs, parameters)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return Outcome([x.detach() for x in outputs], found, problem), seen


def _gradients(outputs: list[Tensor], parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Tensor], str | None]:
    """The gradients of the parameters, and why there are none if the model has no backward."""
    differentiable = [x for x in outputs if x.requires_grad]
    if not differentiable or not parameters:
        return {}, None
    cotangents = [_cotangent(x, i) for i, x in enumerate(differentiable)]
    try:
        found = torch.autograd.grad(differentiable, list(parameters.values()), cotangents, allow_unused=True)
    except RuntimeError as error:  # as a model has it that overwrites its state
        return {}, str(error).splitlines()[0]
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}, None


def _without_padding(x: Tensor, mask) -> Tensor:
    """`x` with zeros where an attention mask hides the token: what comes out there is anybody's choice."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or x.dim() < 2 or x.shape[:2] != mask.shape:
        return x
    return x.masked_fill((mask == 0).view(*mask.shape, *[1] * (x.dim() - 2)), 0.0)


class _Keep:
    def __init__(self, seen: dict[int, tuple]):
        self.seen = seen

    def __call__(self, module, args, kwargs):
        if id(module) not in self.seen and _repeatable((args, kwargs)):
            keep = lambda x: x.detach().clone() if isinstance(x, Tensor) else x
            self.seen[id(module)] = pytree.tree_map(keep, (args, kwargs))


def _repeatable(value) -> bool:
    """Whether a call with this can be made again: of a cache the first call changes what the next one sees."""
    if isinstance(value, dict):
        return all(map(_repeatable, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_repeatable, value))
    return value is None or isinstance(value, (Tensor, str, bool, int, float))


def _plain(output):
    """What pytree can look into: a ModelOutput as a dict; of a cache, which is no result, nothing."""
    if hasattr(output, "items"):
        return {name: value for name, value in output.items() if name != "past_key_values"}
    return output


def _cotangent(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)


def compare(before: Outcome, after: Outcome) -> tuple[bool, str]:
    """Whether both agree, and a sentence with the figures."""
    if [x.shape for x in before.outputs] != [x.shape for x in after.outputs]:
        return False, "its outputs have other shapes"
    if before.problem is None and after.problem is not None:
        return False, f"its backward raises: {after.problem}"
    if before.problem is None and before.gradients.keys() != after.gradients.keys():
        return False, f"other parameters have gradients: {sorted(before.gradients.keys() ^ after.gradients.keys())[:3]}"
    pairs = [("outputs", a, b) for a, b in zip(before.outputs, after.outputs, strict=True)]
    pairs += [(f"gradient of {n}", grad, after.gradients[n]) for n, grad in before.gradients.items()]
    # A gradient that is nothing but rounding, as a key bias has, is measured by the size of all of them.
    scale = max((g.double().norm().item() for g in before.gradients.values()), default=0.0)
    worst = {"outputs": 0.0, "gradients": 0.0}
    for name, want, got in pairs:
        floor = 1e-3 * scale if name != "outputs" else 0.0
        size = max(want.double().norm().item(), floor, 1e-30)
        error = (got.double() - want.double()).norm().item() / size
        if not error <= TOLERANCE.get(want.dtype, 0.0):  # NaN is no agreement
            if torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num()):
                continue
            return False, f"{name} is off by {error:.1e} of its size, allowed {TOLERANCE.get(want.dtype, 0.0):.0e}"
        kind = name if name == "outputs" else "gradients"
        worst[kind] = max(worst[kind], error)
    tail = f", gradients {worst['gradients']:.0e}" if before.gradients else ""
    tail += f"; it has no backward ({before.problem})" if before.problem else ""
    return True, f"outputs differ by {worst['outputs']:.0e} of their size{tail}"


def error(before: Outcome, after: Outcome) -> float | None:
    """The largest error of an output relative to its size, as norms; None: there is no floating output."""
    pairs = zip(before.outputs, after.outputs, strict=True)
    found = [((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)).item() for a, b in pairs]
    return float(torch.tensor(found).max()) if found else None  # NaN, if there is one
