"""Time a candidate beside the original, for `benchmark=True`."""

import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llmkernels.accelerate.candidate import Candidate, Trial, device_of, parameter_dtype
from llmkernels.accelerate.trials import plain_copy

PAIRS = 15  # calls of each, in turns: a median that one interruption does not move
ROWS = 256  # of generated input
SLOWER = 0.97  # below this it is slower, above it within the noise of a median of PAIRS


def speed(module: nn.Module, candidate: Candidate, captured: tuple | None, backend: str | None) -> float:
    """How many times as fast the candidate is, in the mode that the module is in: forward, and backward in training.

    On what the model gave the module, where that is known, else on generated rows, or what the candidate has to time.
    """
    if captured is None and candidate.timed is not None:
        return ratio(calls(candidate.timed(module, parameter_dtype(module), backend), module.training))
    copied = plain_copy(module)
    replaced = functools.partial(candidate.run, copied, backend=backend)
    if captured is not None:
        args, kwargs = captured
        one = lambda forward: forward(*args, **kwargs)
        leaves = [x for x in pytree.tree_leaves(captured) if isinstance(x, Tensor) and x.is_floating_point()]
    else:
        size = (1, ROWS, *candidate.normalized_shape)
        rows = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(
            device_of(module), parameter_dtype(module)
        )
        one, leaves = lambda forward: candidate.probe(copied, forward, rows), [rows]
    parameters = [p for p in copied.parameters() if p.requires_grad]
    return ratio(tuple(_call(functools.partial(one, f), [*leaves, *parameters], module.training)
                       for f in (copied.forward, replaced)))  # fmt: skip


def refusal(speed: float) -> str | None:
    """Why a replacement with this speed is not kept, or None."""
    return None if speed >= SLOWER else "measured, it is slower"


def calls(trial: Trial, training: bool) -> tuple[Callable, Callable]:
    """Both functions of a trial as calls without arguments."""
    call = lambda function: _call(lambda: function(*trial.inputs), list(trial.inputs), training)
    return call(trial.original), call(trial.replacement)


def _call(function: Callable, leaves: list[Tensor], training: bool) -> Callable:
    def run():
        if not training:
            with torch.no_grad():
                function()
            return
        found = [x for x in pytree.tree_leaves(function()) if isinstance(x, Tensor) and x.requires_grad]
        if found:
            torch.autograd.grad([x.sum() for x in found], leaves, allow_unused=True)

    for leaf in leaves if training else ():
        leaf.requires_grad_(True)
    return run


def ratio(functions: tuple[Callable, Callable]) -> float:
    """The median of the ratios of times, original by replacement, of calls that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        for _ in range(PAIRS + 2):  # the first two warm up
            for function, spent in zip(functions, times, strict=True):
                _synchronize()
                start = time.perf_counter()
                function()
                _synchronize()
                spent.append(time.perf_counter() - start)
    return statistics.median(old / new for old, new in list(zip(*times, strict=True))[2:])


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
