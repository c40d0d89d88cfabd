"""Run a candidate beside the original and judge it row by row.

On copies in fp64 and fp32 with random parameters, on inputs with mean 3, rows scaled from 1e-3 to 1e3 and one
outlier: outputs and gradients. Then once in the module's own dtype with its own parameters, and, where
there are inputs that the model itself made for the module, on these. The original's hooks are not run, its parameters
and the global random state are not touched.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llmkernels.accelerate import trials as trial_kit
from llmkernels.accelerate.candidate import Candidate, Trial, parameter_dtype
from llmkernels.accelerate.trials import compare, default_trials, name_of

# Largest error of a row relative to its largest value. fp64 allows for originals that compute in fp32 inside; a wrong
# eps, form or statistic is off by a percent and more in at least one row.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 5e-5}


def own_tolerance(dtype: torch.dtype) -> float:
    """Originals may round once more than we do, before the product with the weight."""
    return max(4 * torch.finfo(dtype).eps, TOLERANCE.get(dtype, 0.0))


def backend_for(dtype: torch.dtype, backend: str | None) -> str | None:
    """The backend to verify with: in fp64, which not all kernels have, the first that can; the formula is the same."""
    return None if dtype == torch.float64 and backend != "torch" else backend


class Verifier:
    """Verifies the candidates of one call of accelerate. Modules that are alike are verified once."""

    def __init__(self, backend: str | None):
        self.backend = backend
        self._known: dict[tuple, tuple[str | None, float]] = {}

    def verify(self, module: nn.Module, candidate: Candidate, captured: tuple | None) -> tuple[str | None, float]:
        """(None, largest relative error of a row) if the candidate agrees with `module`, else (why not, that error).

        `captured` is (args, kwargs) of a call of the module in the model, if there was one.
        """
        key = None
        if candidate.alike is not None:
            key = (candidate.op, candidate.description, candidate.alike(module))
        with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            problem, error = self.once(key, lambda: self._generated(module, candidate))
            if problem is None and captured is not None and candidate.trials is None:
                problem, seen = compare_captured(module, candidate, captured, self.backend)
                error = max(error, seen)
        return problem, error

    def once(self, key: tuple | None, judge: Callable) -> tuple[str | None, float]:
        """What was found for modules that are alike, or what `judge` finds; without a key always the latter."""
        if key is None:
            return judge()
        if key not in self._known:
            self._known[key] = judge()
        return self._known[key]

    def _generated(self, module: nn.Module, candidate: Candidate) -> tuple[str | None, float]:
        own, worst = parameter_dtype(module), 0.0
        for dtype in (torch.float64, torch.float32, None):
            is_own = dtype is None
            dtype = own if is_own else dtype
            backend = backend_for(dtype, self.backend)
            if candidate.trials is not None:
                cases = candidate.trials(module, dtype, backend)
            else:
                cases = default_trials(module, candidate, dtype, backend, own=is_own)
            tolerance = own_tolerance(dtype) if is_own else TOLERANCE[dtype]
            for trial in cases:
                problem, error = compare(trial, tolerance, gradients=not is_own)
                if problem:
                    where = f"its own {name_of(dtype)}" if is_own else name_of(dtype)
                    return f"{candidate.description} disagrees in {where}: {problem}", error
                # Rounding to 16 bits says nothing about the candidate.
                worst = worst if is_own else max(worst, error)
        return None, worst


def compare_captured(module, candidate: Candidate, captured: tuple, backend: str | None) -> tuple[str | None, float]:
    """Both forwards on what the model gave the module: outputs and gradients, in the module's own dtype."""
    leaves, spec = pytree.tree_flatten(captured)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    copied = trial_kit.plain_copy(module)

    def call(forward, *inputs):
        filled = list(leaves)
        for i, value in zip(at, inputs, strict=True):
            filled[i] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        found = [x.flatten() for x in pytree.tree_leaves(forward(*args, **kwargs)) if isinstance(x, Tensor)]
        return torch.cat([x for x in found if x.is_floating_point()])

    copied.eval()  # dropout would be drawn anew
    trial = Trial(
        functools.partial(call, copied.forward),
        functools.partial(call, functools.partial(candidate.run, copied, backend=backend)),
        tuple(leaves[i] for i in at),
        tuple(copied.named_parameters()),
    )
    # A gradient here is a sum over all rows of the input, whose rounding errors add up.
    dtype = parameter_dtype(module)
    problem, error = compare(trial, 8 * own_tolerance(dtype), gradients=True)
    return (problem and f"{candidate.description} disagrees on the example inputs: {problem}"), error
