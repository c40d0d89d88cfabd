"""Gated MLPs, `down(act(gate(x)) * up(x))`: three linear layers, or two with gate and up in one, found by their sizes.

The linear layers stay modules of the model and are called as such, so what hangs on them (adapters, quantized weights,
hooks) stays. What runs between them is one gated unit. Which layer is the gate, which activation it has and where a
dropout stands is tried out on a stand-in with small layers.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmkernels.accelerate.candidate import (
    Candidate,
    Found,
    Trial,
    device_of,
    fan_in,
    original_forward,
    parameter_dtype,
)
from llmkernels.accelerate.kinds.activations import activation_of, hooked
from llmkernels.accelerate.trials import module_trial, name_of, plain_copy, randomised, rows
from llmkernels.ops.gated.op import OP_OF, gated

_WIDTH, _INNER = 48, 64  # of the stand-in: apart, so that no layer fits in another's place


def recognise(module: nn.Module) -> Found:
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if _is_linear(child)}
    rest = {name: child for name, child in children.items() if name not in linears}
    if len(linears) not in (2, 3) or list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
        return None
    dropouts = [name for name, child in rest.items() if type(child) is nn.Dropout]
    acts = [name for name, child in rest.items() if name not in dropouts and _is_leaf(child)]
    roles = _roles(linears)
    if roles is None or len(dropouts) > 1 or len(acts) > 1 or len(acts) + len(dropouts) != len(rest):
        return None
    act = acts[0] if acts else None
    names = _activations(module, act)
    if not names and act is None:
        return None
    if not names:
        return [], f"its activation {type(rest[act]).__name__} is none of silu, gelu, tanh gelu and relu"
    weights = (getattr(child, "weight", None) for child in linears.values())  # quantized ones take any dtype
    dtypes = {w.dtype for w in weights if isinstance(w, Tensor) and w.is_floating_point() and w.dtype.itemsize > 1}
    if len(dtypes) > 1:  # as T5 in fp16, which converts between them
        return [], f"its layers are in {' and '.join(sorted(map(name_of, dtypes)))}, expected one dtype"
    unit = _Gated(*roles, activation="", act=act)
    if unit.runnable(module) is None:  # an attention module has such layers too
        return None
    units = [replace(each, activation=name) for each in _orders(unit) for name in names]
    if dropouts:
        units = [replace(each, dropout=dropouts[0], inside=inside) for each in units for inside in (True, False)]
    return [run.candidate(module, trials=run.trials, example=run.example) for run in units], ""


def _is_linear(module: nn.Module) -> bool:
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )


def _is_leaf(module: nn.Module) -> bool:
    return not (list(module.children()) or list(module.parameters()) or list(module.buffers()))


def _roles(linears: dict[str, nn.Module]) -> tuple[str, str | None, str] | None:
    """(gate, up or None, down), by the sizes alone and, of gate and up, in the order of their definition."""
    if len(linears) == 2:
        for (first, wide), (second, down) in (tuple(linears.items()), tuple(linears.items())[::-1]):
            if wide.out_features == 2 * down.in_features and wide.in_features == down.out_features:
                return first, None, second
        return None
    for name, down in reversed(linears.items()):
        pair = [(other, linear) for other, linear in linears.items() if other != name]
        sizes = {(linear.in_features, linear.out_features) for _, linear in pair}
        if sizes == {(down.out_features, down.in_features)}:
            return pair[0][0], pair[1][0], name
    return None


def _activations(module: nn.Module, act: str | None) -> list[str]:
    """What the activation may be: what the module has computes, or anything where it is written in the forward."""
    functions = [getattr(module, act).forward] if act else []
    functions += [] if act else [value for value in vars(module).values() if callable(value)]
    found = [name for name in map(activation_of, functions) if name is not None]
    words = {"silu", "gelu", "relu"} & set(getattr(getattr(original_forward(module), "__code__", None), "co_names", ()))
    return found or [name for name in OP_OF if not act and name.split("_")[0] in words]


def _orders(unit: "_Gated") -> list["_Gated"]:
    if unit.up is None:
        return [unit, replace(unit, up_first=True)]
    return [unit, replace(unit, gate=unit.up, up=unit.gate)]


@dataclass(frozen=True)
class _Gated:
    """The forward: names of the layers; `up` is None where `gate` is both, of which `up_first` names the order."""

    gate: str
    up: str | None
    down: str
    activation: str
    act: str | None = None
    up_first: bool = False
    dropout: str | None = None
    inside: bool = True  # the dropout stands before `down`

    def __str__(self) -> str:
        names = f"{self.gate}, {self.up}" if self.up else f"{self.gate}, {'up first' if self.up_first else 'packed'}"
        form = " tanh" if self.activation == "gelu_tanh" else ""
        return f"{OP_OF[self.activation]}{form} ({names})"

    @property
    def covers(self) -> tuple[str, ...]:
        """The activation, which is not called."""
        return (self.act,) if self.act else ()

    def __call__(self, module: nn.Module, *args, backend: str | None = None, **kwargs) -> Tensor:
        layers = module._modules
        if len(args) != 1 or kwargs or (self.act is not None and hooked(layers[self.act])):
            return original_forward(module)(module, *args, **kwargs)
        (input,) = args
        gate = layers[self.gate](input)
        if self.up is not None:
            y = gated(gate, layers[self.up](input), self.activation, backend)
        elif self.up_first:
            up, gate = gate.chunk(2, -1)
            y = gated(gate, up, self.activation, backend)
        else:
            y = gated(gate, None, self.activation, backend)
        if self.dropout is not None and self.inside:
            y = layers[self.dropout](y)
        y = layers[self.down](y)
        return layers[self.dropout](y) if self.dropout is not None and not self.inside else y

    def example(self, module: nn.Module) -> tuple[Tensor | None, ...]:
        like = torch.empty(1, _INNER, dtype=parameter_dtype(module), device=device_of(module))
        return like, None if self.up is None else like

    def trials(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> list[Trial]:
        """On a stand-in, in eval mode and in training, where what is dropped is drawn from one seed for both."""
        stand_in = self.runnable(module)
        candidate = self.candidate(stand_in, probe=_seeded)
        input = rows(candidate.normalized_shape, dtype, device_of(module))
        stand_in = randomised(stand_in, dtype, fan_in)
        modes = stand_in.eval(), plain_copy(stand_in).train()
        return [module_trial(each, candidate, input, backend) for each in modes]

    def runnable(self, module: nn.Module) -> nn.Module | None:
        """A stand-in that the forward runs with; the module where its forward knows the sizes of the layers."""
        for each in (self._stand_in(module), module):
            width = getattr(each, self.gate).in_features
            if _runs(each, rows((width,), parameter_dtype(each), device_of(module))):
                return each
        return None

    def candidate(self, module: nn.Module, **options) -> Candidate:
        """What runs, for rows as wide as those of `module`."""
        width = getattr(module, self.gate).in_features
        return Candidate(OP_OF[self.activation], str(self), (width,), self, **options)

    def _stand_in(self, module: nn.Module) -> nn.Module:
        duplicate, dtype, device = plain_copy(module), parameter_dtype(module), device_of(module)
        inner = 2 * _INNER if self.up is None else _INNER
        sizes = {self.gate: (_WIDTH, inner), self.down: (_INNER, _WIDTH)} | (
            {self.up: (_WIDTH, inner)} if self.up else {}
        )
        for name, size in sizes.items():
            bias = getattr(getattr(module, name), "bias", None) is not None
            duplicate._modules[name] = nn.Linear(*size, bias=bias, dtype=dtype, device=device)
        return duplicate


def _seeded(module: nn.Module, forward, input: Tensor) -> Tensor:
    torch.manual_seed(5)
    return forward(input)


def _runs(module: nn.Module, input: Tensor) -> bool:
    try:
        with torch.no_grad():
            return plain_copy(module).forward(input).shape == input.shape
    except Exception:  # whatever a user's forward raises: then it is tried with its own layers
        return False
