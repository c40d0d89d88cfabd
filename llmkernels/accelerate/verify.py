"""Run a candidate beside the original and judge it row by row.

On copies in fp64 and fp32 with random parameters, on inputs with mean 3, rows scaled from 1e-3 to 1e3 and one
outlier: outputs, and in fp64 the gradients too. Then once in the module's own dtype with its own parameters. The
original's hooks are not run, its parameters and the global random state are not touched.
"""

import copy
import functools

import torch
from torch import Tensor, nn

from llmkernels.accelerate.rules import Candidate, device_of, parameter_dtype

# Largest error of a row relative to its largest value. fp64 allows for originals that compute in fp32 inside; a wrong
# eps, form or statistic is off by a percent and more in at least one row.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-5}


def verify(module: nn.Module, candidate: Candidate, backend: str | None) -> tuple[str | None, float]:
    """(None, largest relative error of a row) if the candidate agrees with `module`, else (why not, that error)."""
    worst = 0.0
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float64, torch.float32):
            original = _randomised(module, dtype, candidate)
            x = _inputs(candidate.normalized_shape, dtype, device_of(module))
            problem, error = _compare(
                original, candidate, x, backend, _TOLERANCE[dtype], gradients=dtype == torch.float64
            )
            worst = max(worst, error)
            if problem:
                return f"{candidate.description} disagrees in {_name(dtype)}: {problem}", error
        own = parameter_dtype(module)
        # Originals may round once more than we do, before the product with the weight.
        tolerance = max(4 * torch.finfo(own).eps, _TOLERANCE.get(own, 0.0))
        x = _inputs(candidate.normalized_shape, own, device_of(module))
        problem, error = _compare(_copy(module), candidate, x, backend, tolerance, gradients=False)
        if problem:
            return f"{candidate.description} disagrees in its own {_name(own)}: {problem}", error
    return None, worst


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy(module: nn.Module) -> nn.Module:
    """A copy without gradients or hooks of its own; parameters that are not leaves cannot be deep-copied."""
    duplicate = copy.copy(module)
    duplicate._parameters = {
        name: None if p is None else nn.Parameter(p.detach().clone()) for name, p in module._parameters.items()
    }
    duplicate._buffers = {name: None if b is None else b.detach().clone() for name, b in module._buffers.items()}
    duplicate._modules = {name: None if m is None else _copy(m) for name, m in module._modules.items()}
    if isinstance(duplicate, nn.RNNBase):
        duplicate._init_flat_weights()  # torch's forward reads the parameters from a list
    return duplicate


def _randomised(module: nn.Module, dtype: torch.dtype, candidate: Candidate) -> nn.Module:
    duplicate = _copy(module).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in duplicate.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = candidate.weights(values).to(parameter)
    return duplicate


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[1, 8, *shape]`: rows of mean 3 scaled by 1e-3 ... 1e3, and one of scale 1 with an outlier."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn((8, *shape), generator=generator, dtype=torch.float64) + 3.0
    scales = torch.cat([torch.logspace(-3, 3, 7, dtype=torch.float64), torch.ones(1, dtype=torch.float64)])
    rows = rows * scales.view(8, *[1] * len(shape))
    rows[7].view(-1)[0] = 100.0
    return rows[None].to(dtype).to(device)


def _compare(
    original: nn.Module, candidate: Candidate, x: Tensor, backend: str | None, tolerance: float, *, gradients: bool
) -> tuple[str | None, float]:
    try:
        expected = _run(lambda t: candidate.probe(original, original.forward, t), original, x, gradients)
    except Exception as error:  # whatever a user's module raises is the reason that is reported
        return f"the original cannot be run on one tensor ({type(error).__name__}: {error})", float("inf")
    replaced = functools.partial(candidate.run, original, backend=backend)
    actual = _run(lambda t: candidate.probe(original, replaced, t), original, x, gradients)
    worst = 0.0
    for name, want in expected.items():
        got = actual[name]
        if got.dtype != want.dtype or got.shape != want.shape:
            ours, theirs = (f"{_name(t.dtype)} {tuple(t.shape)}" for t in (got, want))
            return f"{name} is {ours}, the original's {theirs}", float("inf")
        rows = 8 if got.shape == x.shape else 1
        want, got = want.double().reshape(rows, -1), got.double().reshape(rows, -1)
        if not torch.equal(torch.isnan(want), torch.isnan(got)):
            return f"{name}: NaN in one and not in the other", float("inf")
        error = ((got - want).abs().nan_to_num(0.0).amax(-1) / want.abs().amax(-1).clamp_min(1e-30)).max().item()
        worst = max(worst, error)
        if error > tolerance:
            return f"{name} of a row is off by {error:.1e} of its largest value, allowed {tolerance:.1e}", error
    return None, worst


def _run(forward, module: nn.Module, x: Tensor, gradients: bool) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(gradients)
    y = forward(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"returns {type(y).__name__}, expected a tensor")
    results = {"output": y.detach()}
    if gradients:
        generator = torch.Generator().manual_seed(3)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        names, parameters = zip(*module.named_parameters(), strict=True) if list(module.parameters()) else ((), ())
        grads = torch.autograd.grad(y, (x, *parameters), dy)
        results |= {f"gradient of {name}": grad for name, grad in zip(("input", *names), grads, strict=True)}
    return results
