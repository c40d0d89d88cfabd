"""`accelerate(model)`: run norms, attention and LSTMs of a model by llmkernels; `restore(model)` undoes it.

A swap changes the class of a module object to a subclass of its own class with another forward. The object stays, and
with it parameters, buffers, hooks, state_dict keys, attributes, ties, isinstance checks and every reference that
somebody holds; restoring is changing the class back.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn

from llmkernels import registry
from llmkernels.accelerate.report import Entry, Report
from llmkernels.accelerate.rules import Candidate, candidates, device_of, is_reported, parameter_dtype, rule
from llmkernels.accelerate.verify import verify

__all__ = ["Candidate", "Report", "accelerate", "accelerated", "restore"]


class Accelerated:
    """Mixin of the subclasses that swapped modules belong to; `_llmkernels` holds (candidate, backend)."""

    def forward(self, *args, **kwargs):
        candidate, backend = self._llmkernels
        return candidate.run(self, *args, backend=backend, **kwargs)

    def __reduce_ex__(self, protocol):
        # The subclass is made at run time, so a pickle or deep copy names the original class instead.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # object has none in 3.10
        return _rebuild, (type(self)._original,), state


@functools.cache
def _subclass(original: type) -> type:
    return type(f"Accelerated{original.__name__}", (Accelerated, original), {"_original": original})


def _rebuild(original: type) -> nn.Module:
    return nn.Module.__new__(_subclass(original))


def accelerate(model: nn.Module, *, backend: str | None = None) -> Report:
    """Run norms, MultiheadAttention, LSTM and LSTMCell of `model` by llmkernels, in place, where verified to agree.

    Found are torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.MultiheadAttention, torch.nn.LSTM, torch.nn.LSTMCell, RMS
    norms as Hugging Face models write them (a `weight`, an eps, no other state; Llama's or Gemma's form), and what
    `@accelerate.rule(MyModule)` adds. Each replacement is first run beside the original in fp64, fp32 and the module's
    own dtype; one that disagrees in any row is refused. Dropout of attention is drawn from torch's generator, but it is
    not torch's bit for bit; that of an LSTM on the CPU is.

    Args:
        model: any module; a second call on it reports the same and changes nothing more.
        backend: force a backend for the swapped modules. By default a module is left alone where nothing faster
            than plain PyTorch could run it.
    Returns: the report; print it.
    Raises: ValueError, unknown backend; TypeError, `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}, expected a torch.nn.Module")
    if backend is not None:
        registry.checked_name(backend, "accelerate")
    report = Report()
    for path, module in model.named_modules():
        if isinstance(module, Accelerated):
            report.entries.append(Entry(path, type(module)._original.__name__, True, "swapped before"))
            continue
        found, why = candidates(module)
        if found or is_reported(module):
            report.entries.append(_swap(path, module, found, why, backend))
    return report


def _swap(path: str, module: nn.Module, found: list[Candidate], why: str, backend: str | None) -> Entry:
    name = type(module).__name__
    reasons = [] if found else [why]
    for candidate in found:
        runs, refusal = _runs_on(module, candidate, backend)
        if refusal is None:
            refusal, error = verify(module, candidate, backend)
        if refusal is None:
            module._llmkernels = (candidate, backend)
            module.__class__ = _subclass(type(module))
            return Entry(path, name, True, f"{candidate.description} on {runs}", error)
        if refusal not in reasons:
            reasons.append(refusal)
    return Entry(path, name, False, "; ".join(reasons))


def _runs_on(module: nn.Module, candidate: Candidate, backend: str | None) -> tuple[str, str | None]:
    """The backend that would run the module, and None; or why there is nothing to gain."""
    if candidate.example is not None:
        tensors = candidate.example(module)
    else:
        shape = (1, *candidate.normalized_shape)
        example = torch.empty(shape, dtype=parameter_dtype(module), device=device_of(module))
        tensors = (*[example] * 3, None, None, None)
    explained = registry.explain_call(candidate.op, tensors, backend)
    if explained.chosen is None:
        return "", f"backend {backend!r} cannot run it: {explained.reasons[backend]}"
    if explained.chosen == "torch" and registry.forced_backend(backend) is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in explained.reasons.items() if reason)
        return "", f"nothing faster than plain PyTorch runs it here ({reasons})"
    return explained.chosen, None


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: the same module objects get their own class back. Returns how many."""
    swapped = [module for module in model.modules() if isinstance(module, Accelerated)]
    for module in swapped:
        _undo(module)
    return len(swapped)


def _undo(module: Accelerated) -> None:
    module.__class__ = type(module)._original
    del module._llmkernels


@contextlib.contextmanager
def accelerated(model: nn.Module, *, backend: str | None = None) -> Iterator[Report]:
    """`with accelerated(model) as report:` accelerates, and restores at the end, also after an exception.

    Modules that were accelerated before stay so.
    """
    before = {id(module) for module in model.modules() if isinstance(module, Accelerated)}
    report = accelerate(model, backend=backend)
    try:
        yield report
    finally:
        for module in model.modules():
            if isinstance(module, Accelerated) and id(module) not in before:
                _undo(module)


accelerate.rule = rule
