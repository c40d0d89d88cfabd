"""Copies to try candidates on, the inputs they are tried with, and the comparison of two functions row by row."""

import copy
import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn

from llmkernels.accelerate.candidate import Candidate, Trial, device_of
from llmkernels.accelerate.swap import SETTINGS
from llmkernels.ops.quantized_linear.module import ORIGINAL

ROWS = 8
CANNOT_RUN = "the original cannot be run on generated input"
GRADIENTS = 20.0  # times the tolerance of outputs, in fp32


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy without gradients or hooks, which has the values of the parameters but not these themselves.

    Parameters are views of the originals, which no forward writes to; buffers are copied. (deepcopy refuses parameters
    that are not leaves, and takes the memory of all.)
    """
    duplicate = copy.copy(module)
    duplicate._parameters = {
        name: None if p is None else nn.Parameter(p.detach(), p.is_floating_point())
        for name, p in module._parameters.items()
    }
    duplicate._buffers = {name: None if b is None else b.detach().clone() for name, b in module._buffers.items()}
    duplicate._modules = {name: None if m is None else plain_copy(m) for name, m in module._modules.items()}
    for ours in (ORIGINAL, SETTINGS):  # which conversions of a copy would reach, too
        vars(duplicate).pop(ours, None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(duplicate, hooks, OrderedDict())
    if isinstance(duplicate, nn.RNNBase):
        duplicate._init_flat_weights()  # torch's forward reads the parameters from a list
    return duplicate


def randomised(module: nn.Module, dtype: torch.dtype, weights) -> nn.Module:
    """A copy in `dtype` with parameters that `weights` makes from normal values."""
    duplicate = plain_copy(module).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in duplicate.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = weights(values).to(parameter)
    return duplicate


def rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[1, 8, *shape]`: rows of mean 3 scaled by 1e-3 ... 1e3, and one of scale 1 with an outlier."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn((ROWS, *shape), generator=generator, dtype=torch.float64) + 3.0
    scales = torch.cat([torch.logspace(-3, 3, ROWS - 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    values = values * scales.view(ROWS, *[1] * len(shape))
    values[ROWS - 1].view(-1)[0] = 100.0
    return values[None].to(dtype).to(device)


def module_trial(module: nn.Module, candidate: Candidate, input: Tensor, backend: str | None) -> Trial:
    """`candidate` beside the module's own forward."""
    replaced = functools.partial(candidate.run, module, backend=backend)
    return Trial(
        lambda x: candidate.probe(module, module.forward, x),
        lambda x: candidate.probe(module, replaced, x),
        (input,),
        tuple(module.named_parameters()),
    )


def default_trials(
    module: nn.Module, candidate: Candidate, dtype: torch.dtype, backend: str | None, *, own: bool
) -> list[Trial]:
    """The whole module on rows: with its `own` parameters as it is, or with random ones in `dtype`.

    In fp64 it is in training, in fp32 in eval mode: a forward may drop something without a module for it.
    """
    copied = plain_copy(module) if own else randomised(module, dtype, candidate.weights).train(dtype == torch.float64)
    return [module_trial(copied, candidate, rows(candidate.normalized_shape, dtype, device_of(module)), backend)]


def compare(trial: Trial, tolerance: float, *, gradients: bool) -> tuple[str | None, float]:
    """(None, largest relative error of a row) if both functions agree, else (why not, that error).

    In fp32 gradients, in which the rounding errors of a forward come back multiplied, may be off by more.
    """
    try:
        expected = _run(trial.original, trial, gradients)
    except Exception as error:  # whatever a user's module raises is the reason that is reported
        return f"{CANNOT_RUN} ({type(error).__name__}: {error})", float("inf")
    try:
        actual = _run(trial.replacement, trial, gradients)
    except Exception as error:
        return f"it cannot be run on generated input ({type(error).__name__}: {error})", float("inf")
    worst, floor = 0.0, 0.0
    if trial.rounding:
        sizes = [expected[f"gradient of {name}"] for name, _ in trial.parameters if gradients]
        floor = trial.rounding * max((grad.abs().max().item() for grad in sizes if grad is not None), default=0.0)
    own = {f"gradient of {name}" for name, _ in trial.parameters}
    for name, want in expected.items():
        got = actual[name]
        if got is None or want is None:
            if got is not want:
                return f"{name} is None in one and not in the other", float("inf")
            continue
        if got.dtype != want.dtype or got.shape != want.shape:
            ours, theirs = (f"{name_of(t.dtype)} {tuple(t.shape)}" for t in (got, want))
            return f"{name} is {ours}, the original's {theirs}", float("inf")
        count = ROWS if got.shape == trial.inputs[0].shape and got.shape[:2] == (1, ROWS) else 1
        want_dtype = want.dtype
        want, got = want.double().reshape(count, -1), got.double().reshape(count, -1)
        if not torch.equal(torch.isnan(want), torch.isnan(got)):
            return f"{name}: NaN in one and not in the other", float("inf")
        off = relative_error(got, want, floor if name in own else 0.0)
        worst = max(worst, off)
        allowed = tolerance * (GRADIENTS if name != "output" and want_dtype == torch.float32 else 1.0)
        if want_dtype.itemsize == 2:  # a parameter that took part as it is
            allowed = max(allowed, 4 * torch.finfo(want_dtype).eps)
        if off > allowed:
            return f"{name} of a row is off by {off:.1e} of its largest value, allowed {allowed:.1e}", off
    return None, worst


def relative_error(got: Tensor, want: Tensor, floor: float = 0.0) -> float:
    """The largest error of a row of two matrices, relative to its largest value, or to `floor` if that is more."""
    if want.numel() == 0:
        return 0.0
    return ((got - want).abs().nan_to_num(0.0).amax(-1) / want.abs().amax(-1).clamp_min(max(floor, 1e-30))).max().item()


def _run(function, trial: Trial, gradients: bool) -> dict[str, Tensor | None]:
    inputs = [x.detach().clone().requires_grad_(gradients) for x in trial.inputs]
    y = function(*inputs)
    if not isinstance(y, Tensor):
        raise TypeError(f"returns {type(y).__name__}, expected a tensor")
    results = {"output": y.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(3)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        names, parameters = zip(*trial.parameters, strict=True) if trial.parameters else ((), ())
        labels = ["input"] if len(inputs) == 1 else [f"input {i}" for i in range(len(inputs))]
        # An input or parameter that takes no part has no gradient in either.
        grads = torch.autograd.grad(y, (*inputs, *parameters), dy, allow_unused=True)
        results |= {f"gradient of {name}": grad for name, grad in zip((*labels, *names), grads, strict=True)}
    return results
