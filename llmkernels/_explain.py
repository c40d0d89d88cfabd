"""`explain` and `backends`: what runs, and why the rest does not."""

from collections.abc import Callable

import torch

from llmkernels import _native, functional, registry
from llmkernels._op import triton_absent


class _Asked(Exception):
    """Carries the explanation out of the public function, once its arguments are checked and prepared."""

    def __init__(self, explanation: registry.Explanation):
        self.explanation = explanation


def explain(op: str, *args, **kwargs) -> registry.Explanation:
    """Which backend would run `llmkernels.functional.<op>(*args, **kwargs)`, and why each other one would not.

    Nothing is computed, written or drawn. Prints as one line per backend. Raises ValueError for an unknown op, and what
    the function itself raises for bad arguments.
    """
    function: Callable = getattr(functional, op) if op in registry.ops() else registry.entries(op)
    generators = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    asking = registry.observe(lambda *call: _raise(_Asked(registry.explain_call(*call))))
    with torch.random.fork_rng(generators), asking:  # dropout draws its seed before it asks
        try:
            function(*args, **kwargs)
        except _Asked as asked:
            return asked.explanation
    raise RuntimeError(f"{op} did not ask the registry for a backend")


def _raise(error: Exception):
    raise error


def backends() -> dict[str, str | None]:
    """Each backend and None if it is present on this machine, else one sentence why it is absent.

    `triton` and `cuda` need a CUDA device as well; what a given call would do is `explain`'s question.
    """
    no_gpu = None if torch.cuda.is_available() else "no CUDA device"
    return {
        "cuda": _native.why_absent("cuda") or no_gpu,
        "triton": triton_absent() or no_gpu,
        "cpu": _native.why_absent("cpu"),
        "torch": None,
    }
