"""Which backend runs a call, and why the others do not.

Every op has an ordered list of backends, best first, ending in `torch`, which never refuses. An entry either
accepts a call or says in one sentence why not. Overrides, strongest first: the `backend=` argument, `with
use_backend("triton")`, the environment variable LLMKERNELS_BACKEND, the order of the list.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from llmkernels._autograd import transform_active

BACKENDS = ("cuda", "triton", "cpu", "torch")
PORTABLE = "portable"  # not a choice of the user's: ops that pick a backend when they run, for exported graphs

_log = logging.getLogger("llmkernels")


class _Forced(threading.local):
    """Each thread has its own; a context variable would be that too, but torch.compile cannot trace one."""

    name: str | None = None


_forced = _Forced()
_registry: dict[str, tuple["Backend", ...]] = {}
_on_cpu: dict[str, tuple["Backend", ...]] = {}  # the same without CUDA kernels, which refuse every tensor on the CPU
_by_name: dict[tuple[str, str], "Backend"] = {}
_extra_names: set[str] = set()
_observer: Callable | None = None
_reported: set[tuple[str, str]] = set()


class NoBackendError(RuntimeError):
    """A forced backend cannot run this call; the message says why."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One implementation of one op. `why_not(*tensors)` and then `refuses(*tensors)` return None or one sentence.

    `why_not` is about the machine and the device, `refuses` about what the kernels of this op cannot do.
    """

    op: str
    name: str
    fwd: Callable
    bwd: Callable | None  # None: the op has no backward
    why_not: Callable[..., str | None]
    refuses: Callable[..., str | None] | None = None
    way: Callable[..., str] | None = None  # of several ways to run a call, the one that `explain` names

    def reason(self, tensors: tuple) -> str | None:
        """Why this backend cannot run a call with `tensors`, or None."""
        found = self.why_not(*tensors)
        return self.refuses(*tensors) if found is None and self.refuses is not None else found


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: one line per backend, and which of them runs; of some also in which way."""

    op: str
    chosen: str | None
    reasons: dict[str, str | None]
    ways: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.chosen or 'no backend'} runs"]
        for name, reason in self.reasons.items():
            state = "runs" if name == self.chosen else reason or "can run"
            state += f" ({self.ways[name]})" if name in self.ways else ""
            lines.append(f"  {name:<7} {state}")
        return "\n".join(lines)


def register(op: str, *entries: Backend) -> None:
    """Register the backends of `op`, best first: the last must be `torch`; one named PORTABLE is kept apart."""
    if op in _registry:
        raise ValueError(f"{op} is registered already")
    choices = tuple(entry for entry in entries if entry.name != PORTABLE)
    if choices[-1].name != "torch":
        raise ValueError(f"{op}: the last backend must be 'torch', which never refuses, got {choices[-1].name!r}")
    _registry[op] = choices
    _on_cpu[op] = tuple(entry for entry in choices if entry.name != "cuda")
    _by_name.update({(op, entry.name): entry for entry in entries})


def register_extra(entry: Backend) -> None:
    """Add a backend that runs only where it is forced by name. For tests: no list of backends mentions it."""
    if entry.name in BACKENDS or (entry.op, entry.name) in _by_name:
        raise ValueError(f"{entry.op}: backend {entry.name!r} is registered already")
    _extra_names.add(entry.name)
    _by_name[entry.op, entry.name] = entry


def ops() -> tuple[str, ...]:
    """The names of all registered ops."""
    return tuple(_registry)


def entries(op: str) -> tuple[Backend, ...]:
    """The backends of `op`, best first."""
    try:
        return _registry[op]
    except KeyError:
        raise ValueError(f"unknown op {op!r}; known: {', '.join(_registry)}") from None


def entry(op: str, name: str) -> Backend:
    """One backend of `op` by its name."""
    return _by_name[op, name]


def has(op: str, name: str) -> bool:
    """Whether `op` has a backend of this name, one that was registered as an extra included."""
    return (op, name) in _by_name


def checked_name(name: str, source: str) -> str:
    if name not in BACKENDS and name not in _extra_names:
        raise ValueError(f"{source}: unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return name


def forced_backend(argument: str | None = None) -> str | None:
    """The backend forced on this call, if any: the argument, then `use_backend`, then LLMKERNELS_BACKEND."""
    if argument is not None:
        return checked_name(argument, "backend")
    if _forced.name is not None:
        return _forced.name
    environment = _environment("LLMKERNELS_BACKEND")
    return checked_name(environment, "LLMKERNELS_BACKEND") if environment else None


def _environment(name: str) -> str | None:
    """`os.environ.get(name)` as it is now; ten times as fast for a name that is absent."""
    stored = getattr(os.environ, "_data", None)
    if stored is not None and os.name == "posix" and name.encode() not in stored:
        return None
    return os.environ.get(name)


def pick(op: str, tensors: tuple, backend: str | None = None) -> Backend:
    """The backend that runs `op` on `tensors` (the tensor arguments in order, None where absent).

    While a graph is exported it is the portable one, for graphs that run where other backends are.
    """
    if _observer is not None:
        _observer(op, tensors, backend)
    forced = forced_backend(backend)
    refusals = []
    asked = _on_cpu[op] if forced is None and tensors[0].is_cpu else _candidates(op, forced)
    for entry in asked:
        reason = entry.reason(tensors)
        if reason is None:
            if refusals and entry.name == "torch":
                _report_fallback(op, tensors, refusals)
            return _portable(entry) if torch.compiler.is_exporting() else entry
        refusals.append((entry.name, reason))
    raise NoBackendError(f"{op}: backend {forced!r} cannot run this call: {_sentence(refusals) or 'not registered'}")


def willing(op: str, tensors: tuple, backend: str | None = None) -> Backend | None:
    """The backend that `pick` would find, without the portable one in its place; None where it would raise."""
    return next((entry for entry in _candidates(op, forced_backend(backend)) if entry.reason(tensors) is None), None)


def _portable(entry: Backend) -> Backend:
    """What stands in an exported graph for `entry`: ops that pick when they run, but for the formula in a transform."""
    in_formula = entry.name == "torch" and transform_active()
    return entry if in_formula else _by_name.get((entry.op, PORTABLE), entry)


def _sentence(refusals: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in refusals)


def _candidates(op: str, forced: str | None) -> tuple[Backend, ...]:
    """What may run: every backend, best first, or the one that is forced, if the op has it."""
    if forced is None:
        return _registry[op]
    entry = _by_name.get((op, forced))
    return () if entry is None else (entry,)


def explain_call(op: str, tensors: tuple, backend: str | None = None) -> Explanation:
    """Ask every backend of `op`, and say which one `pick` takes."""
    forced = forced_backend(backend)
    candidates = _candidates(op, forced)
    # A forced extra backend is not among the entries.
    asked = dict.fromkeys((*entries(op), *candidates))
    reasons = {entry.name: entry.reason(tensors) for entry in asked}
    chosen = next((entry.name for entry in candidates if reasons[entry.name] is None), None)
    ways = {entry.name: entry.way(*tensors) for entry in asked if entry.way is not None and reasons[entry.name] is None}
    return Explanation(op, chosen, reasons, ways)


@contextlib.contextmanager
def observe(observer: Callable) -> Iterator[None]:
    """Show every `pick` (op, tensors, backend argument) to `observer` before it is answered."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for every op called in this context (and thread)."""
    before, _forced.name = _forced.name, checked_name(name, "use_backend")
    try:
        yield
    finally:
        _forced.name = before


def _report_fallback(op: str, tensors: tuple, refusals: list[tuple[str, str]]) -> None:
    """Falling to `torch` on a GPU costs speed silently: say so once for each op and reason."""
    if not tensors[0].is_cuda:
        return
    text = _sentence(refusals)
    if (op, text) not in _reported:
        _reported.add((op, text))
        _log.warning("%s runs on the torch backend: %s", op, text)
