"""What may replace a module's forward, and what has to be shown before it does.

A kind (kinds/) looks at one module and returns candidates. Nothing is believed: verify.py runs each beside the original
and the first that agrees is kept.
"""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn


def _one_tensor(module: nn.Module, forward: Callable, input: Tensor) -> Tensor:
    return forward(input)


def _about_one(values: Tensor) -> Tensor:
    return 1.0 + 0.5 * values


def fan_in(values: Tensor) -> Tensor:
    """Parameters from normal values, with which a linear layer keeps the size of what it is given."""
    return values * (values.shape[-1] ** -0.5 if values.dim() > 1 else 0.5)


_PLACES = ("layer_idx",)  # attributes that say where a module stands, for a cache, and not what it computes


def signature(module: nn.Module) -> tuple:
    """What verification of a module depends on: its class, shapes, dtypes, devices and settings, and its children's."""
    tensors = tuple(
        (name, None if t is None else (tuple(t.shape), t.dtype, str(t.device)))
        for name, t in (*module._parameters.items(), *module._buffers.items())
    )
    settings = tuple(
        (name, value if _is_plain(value) else id(value))
        for name, value in vars(module).items()
        if (not name.startswith("_") or _is_plain(value)) and name not in _PLACES
    )
    children = tuple((name, None if m is None else signature(m)) for name, m in module._modules.items())
    return type(module), tensors, settings, children


def _is_plain(value) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, bool, Real, torch.dtype, torch.device))


@dataclass(frozen=True)
class Trial:
    """Two functions that have to give the same for `inputs`: `original(*inputs)` and `replacement(*inputs)`.

    Both return a tensor. `inputs` are floating; gradients are compared of them and of the named `parameters`. Of these
    one may be nothing but rounding, as that of a key's bias; so it is measured by no less than `rounding` of the
    largest value in any.
    """

    original: Callable[..., Tensor]
    replacement: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    parameters: tuple[tuple[str, Tensor], ...] = ()
    rounding: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A forward for a module: `run(module, *args, backend=..., **kwargs)` with the arguments of a call.

    Args:
        op: the op of llmkernels that does the work, whose backends are asked.
        description: what runs, for the report.
        normalized_shape: the shape of one row of input, to verify and to time with; () where a row says nothing.
        run: the forward. It may have `covers`, names of submodules whose work it does, and `bind(forward, backend)`,
            which makes a whole forward from the original one, for a compiler to see no more than that.
        probe: `probe(module, forward, input)` makes one tensor of what a forward does with rows `[1, 8, *shape]`; by
            default `forward(input)`.
        weights: makes parameters for that from normal values.
        example: the tensors with which the backends of `op` are asked whether they run it; by default rows.
        trials: for what is not verified as a whole module: `trials(module, dtype, backend)` gives what to compare.
        timed: for what has no row: `timed(module, dtype, backend)` gives what to time.
        alike: modules for which `alike(module)` is equal are verified once; None: each by itself.
    """

    op: str
    description: str
    normalized_shape: tuple[int, ...]
    run: Callable[..., Any]
    probe: Callable[[nn.Module, Callable, Tensor], Tensor] = _one_tensor
    weights: Callable[[Tensor], Tensor] = _about_one
    example: Callable[[nn.Module], tuple[Tensor | None, ...]] | None = None
    trials: Callable[[nn.Module, torch.dtype, str | None], Sequence[Trial]] | None = None
    timed: Callable[[nn.Module, torch.dtype, str | None], Trial] | None = None
    alike: Callable[[nn.Module], Hashable] | None = signature


# What a kind says of a module: candidates, best first, and if there are none, why. None: it is not of this kind.
Found = tuple[list[Candidate], str] | None

user_rules: dict[type, Callable[[nn.Module], list[Candidate]]] = {}


def rule(module_type: type) -> Callable:
    """Decorator: `@accelerate.rule(MyNorm)` on a function from a module to its list of `Candidate`s.

    Candidates are verified like the built-in ones, each module by itself. The rule applies to exactly this type; the
    last one given counts.
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"accelerate.rule: module_type is {module_type!r}, expected a subclass of torch.nn.Module")

    def decorate(function: Callable[[nn.Module], list[Candidate]]) -> Callable:
        user_rules[module_type] = function
        return function

    return decorate


def original_forward(module: nn.Module) -> Callable:
    """The forward of the module's own class, swapped or not: a function of the module and its arguments."""
    return getattr(type(module), "_original", type(module)).forward


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*module.parameters(), *module.buffers()]


_home: tuple[torch.dtype, torch.device] = (torch.float32, torch.device("cpu"))


@contextlib.contextmanager
def at_home(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """What modules without tensors of their own are taken to work in: dtype and device of the model around them."""
    global _home
    before, _home = _home, (dtype, device)
    try:
        yield
    finally:
        _home = before


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a module works in: that of its floating parameters or buffers, else that of the model around it.

    Eight bits are those of a quantized weight, in which nothing is computed.
    """
    dtypes = (t.dtype for t in tensors_of(module))
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), _home[0])


def device_of(module: nn.Module) -> torch.device:
    """Where a module lives: the device of its parameters or buffers, else that of the model around it."""
    tensor = next(iter(tensors_of(module)), None)
    return _home[1] if tensor is None else tensor.device


def unfit(module: nn.Module) -> str | None:
    """Why no candidate can be tried on this module, whatever its kind; or None."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    tensors = tensors_of(module)
    if any(isinstance(tensor, nn.parameter.UninitializedTensorMixin) for tensor in tensors):
        return "its parameters have no shape before its first input; accelerate it once they have"
    if any(tensor.is_meta for tensor in tensors):
        return "it is on the meta device, where there is nothing to verify with; accelerate it once it has values"
    if any(tensor.is_inference() for tensor in tensors):
        return "its tensors were made in inference mode, in which there are no gradients to compare"
    if any(hasattr(tensor, "placements") for tensor in tensors):
        return "its tensors are distributed; accelerate the model before it is sharded"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        return f"its tensors are on {' and '.join(devices)}, expected one device"
    return None
