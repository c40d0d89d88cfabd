"""Layers that add a residual and norm the sum: the same forward with both in one pass over the rows.

A forward is known by its source (rewriting.py); all of it but the sums and norms is what it was: arguments, caches,
masks, outputs. The norms have to be swapped already; where one of them is watched by hooks, or was given back since,
it adds and norms as ever.
"""

import copy
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llmkernels.accelerate import swap
from llmkernels.accelerate.candidate import Candidate, Trial, device_of, original_forward, parameter_dtype, unfit
from llmkernels.accelerate.kinds.activations import hooked
from llmkernels.accelerate.kinds.norms import with_residual
from llmkernels.accelerate.rebinding import rebound
from llmkernels.accelerate.rewriting import ADD_NORM, innermost, rewritten
from llmkernels.accelerate.trials import ROWS, plain_copy


def add_norm(norm: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(first + second), first + second), in one pass where the norm is swapped and nobody watches it."""
    run, backend = norm._llmkernels if isinstance(norm, swap.Accelerated) else (None, None)
    fused = with_residual(run)
    if fused is None or hooked(norm) or not _fits(norm, first, second):
        total = first + second
        return norm(total), total
    return fused(norm, first, second, backend)


def _fits(norm: nn.Module, first: Tensor, second: Tensor) -> bool:
    """Whether both are plain tensors of one kind, and of the weight's where that is in 16 bits."""
    if not (type(first) is type(second) is Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return False
    weight = norm.weight
    if weight is not None and weight.dtype.itemsize == 2 and weight.dtype != first.dtype:
        return False
    # Under CUDA's autocast norms are in fp32, sums are not.
    return not (first.is_cuda and torch.is_autocast_enabled("cuda"))


def recognise(module: nn.Module) -> Candidate | None:
    """What may replace a layer's forward; None: it has no sum before a norm that is swapped."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    norms = [name for name, child in module.named_children() if _can_add(child)]
    forward = innermost(original_forward(module)) if norms and unfit(module) is None else None
    made = None if forward is None else rewritten(forward, frozenset(norms))
    if made is None:
        return None
    run = _Fused(tuple(name for name in norms if name in made.norms))
    ops = [
        "add_layer_norm" if isinstance(getattr(module, name), nn.LayerNorm) else "add_rms_norm" for name in run.norms
    ]
    groups = {op: [name for name, of in zip(run.norms, ops, strict=True) if of == op] for op in ops}
    description = ", ".join(f"{op} ({', '.join(of)})" for op, of in groups.items())
    return Candidate(ops[0], description, (), run, trials=run.trials, timed=run.timed, example=run.example)


def _can_add(child: nn.Module) -> bool:
    return isinstance(child, swap.Accelerated) and with_residual(child._llmkernels[0]) is not None


# --- the forward and its proof --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fused:
    """The forward of a layer with these norms, made once for a class."""

    norms: tuple[str, ...]

    def __call__(self, module: nn.Module, *args, backend: str | None = None, **kwargs):
        return self.bind(original_forward(module), backend)(module, *args, **kwargs)

    def bind(self, forward: Callable, backend: str | None) -> types.FunctionType:
        """The rewritten forward. Each norm has a backend of its own."""
        forward = innermost(forward)
        return rebound(forward, {ADD_NORM: add_norm}, rewritten(forward, frozenset(self.norms)).code)

    def example(self, module: nn.Module) -> tuple[Tensor | None, ...]:
        norm = getattr(module, self.norms[0])
        x = torch.empty(1, *_shape(norm), dtype=parameter_dtype(norm), device=device_of(module))
        return x, x, norm.weight, getattr(norm, "bias", None)

    def trials(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> list[Trial]:
        """The layer as it was, no module of it swapped, beside itself with nothing but sums and norms fused.

        Matrices are the module's own, of which a large model has too many for new ones; vectors are random.
        """
        copied = plain_copy(module).to(dtype).train(dtype == torch.float64)
        vectors = {name: p for name, p in copied.named_parameters() if p.dim() < 2}
        generator = torch.Generator().manual_seed(1)
        for parameter in vectors.values():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
        before, after = _shared(copied), _shared(copied)
        norms = [getattr(after, name) for name in self.norms]
        for each in (*before.modules(), *after.modules()):
            if any(each is norm for norm in norms):
                each._llmkernels = (each._llmkernels[0], backend)
            elif isinstance(each, swap.Accelerated):
                each.__class__ = type(each)._original
        return [self._trial(before, after, self._arguments(before, dtype, ROWS), tuple(vectors.items()))]

    def timed(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> Trial:
        """256 rows, by the layer as it is by now and with its sums fused."""
        copied = plain_copy(module)
        return self._trial(copied, copied, self._arguments(copied, dtype, 256))

    def _trial(self, before: nn.Module, after: nn.Module, arguments: dict, parameters: tuple = ()) -> Trial:
        forward, name = innermost(original_forward(before)), next(iter(arguments))
        return Trial(
            lambda x: _first_tensor(forward, before, arguments | {name: x}),
            lambda x: _first_tensor(self.bind(forward, None), after, arguments | {name: x}),
            (arguments[name],),
            parameters,
            rounding=1e-3,
        )

    def _arguments(self, module: nn.Module, dtype: torch.dtype, count: int) -> dict:
        """Arguments that the layer runs with, by name; the first of those that were tried, where it runs with none."""
        forward, tried = innermost(original_forward(module)), []
        norm, device = getattr(module, self.norms[0]), device_of(module)
        width = _shape(norm)[-1]
        heads = [m.head_dim for m in module.modules() if isinstance(getattr(m, "head_dim", None), int)]
        inner = [m.in_features for m in module.modules() if isinstance(getattr(m, "in_features", None), int)]
        for first in dict.fromkeys((width, *inner)):
            for turned in (*dict.fromkeys(head // part for part in (1, 2, 4) for head in heads), 0):
                both = _rows(count, first, 2), _rows(count, width, 3)
                tried.append(_arguments(forward, *(x.to(device, dtype) for x in both), turned))
                if _runs(forward, module, tried[-1]):
                    return tried[-1]
        return tried[0]


def _rows(count: int, width: int, seed: int) -> Tensor:
    """`[1, count, width]`, of scales 0.3 to 3: larger ones, which the norms have seen, would saturate an attention."""
    values = torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    return values * torch.logspace(-0.5, 0.5, count, dtype=torch.float64)[:, None]


def _arguments(forward: Callable, first: Tensor, other: Tensor, turned: int) -> dict:
    """For each parameter what its name or place says: rows, others to add or of an encoder, angles, no mask."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    found, count, device = {parameters[0].name: first}, first.shape[1], first.device
    for parameter in parameters[1:]:
        wanted = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if parameter.name == "position_embeddings" and turned:
            angles = torch.linspace(0.0, 3.0, count * turned, dtype=torch.float64, device=device).view(1, count, turned)
            found[parameter.name] = angles.cos().to(first.dtype), angles.sin().to(first.dtype)
        elif parameter.name == "position_ids":
            found[parameter.name] = torch.arange(count, device=device)[None]
        elif wanted or parameter.name == "encoder_hidden_states":
            found[parameter.name] = None if "mask" in parameter.name else other
    return found


def _runs(forward: Callable, module: nn.Module, arguments: dict) -> bool:
    try:
        with torch.no_grad():
            return _first_tensor(forward, module, arguments) is not None
    except Exception:  # whatever a user's layer raises: then it is tried with others
        return False


def _first_tensor(forward: Callable, module: nn.Module, arguments: dict) -> Tensor:
    """What comes out first; what is dropped is drawn from one seed."""
    torch.manual_seed(5)
    return next(x for x in pytree.tree_leaves(forward(module, **arguments)) if isinstance(x, Tensor))


def _shape(norm: nn.Module) -> tuple[int, ...]:
    return tuple(norm.normalized_shape if norm.weight is None else norm.weight.shape)


def _shared(module: nn.Module) -> nn.Module:
    """Other module objects with the same tensors."""
    duplicate = copy.copy(module)
    duplicate._parameters, duplicate._buffers = dict(module._parameters), dict(module._buffers)
    duplicate._modules = {name: None if m is None else _shared(m) for name, m in module._modules.items()}
    if isinstance(duplicate, nn.RNNBase):
        duplicate._init_flat_weights()
    return duplicate
