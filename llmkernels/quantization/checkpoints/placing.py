"""Put quantized layers and plain tensors into a model: all is checked before anything is changed."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llmkernels.nn import QuantizedEmbedding, QuantizedLinear, QuantizedLSTM
from llmkernels.quantization import linears
from llmkernels.quantization.model import swap

# What becomes what.
KINDS = {
    "linear": (nn.Linear, QuantizedLinear),
    "embedding": (nn.Embedding, QuantizedEmbedding),
    "lstm": (nn.RNNBase, QuantizedLSTM),
}


def target(model: nn.Module, path: str, kind: str, who: str) -> nn.Module:
    """The module at `path` that a quantized layer of `kind` is to replace. Raises: ValueError, there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{who}: the model has no {path!r}, which is a quantized {kind} in the file") from None
    plain, quantized = KINDS[kind]
    if kind == "linear":
        plain = linears.kind_of(module) or plain
    if not isinstance(module, plain | quantized):
        got = type(module).__name__
        raise ValueError(f"{who}: {path} is a {got} in the model, but a quantized {kind} in the file")
    if kind != "lstm" and isinstance(module, plain) and type(module).forward is not plain.forward:
        raise ValueError(f"{who}: {path} is a {type(module).__name__}, which overrides forward")
    return module


def device_of(model: nn.Module) -> str:
    """Where the model's tensors are; "cpu" for those on the meta device."""
    devices = (tensor.device for tensor in (*model.parameters(), *model.buffers()))
    return str(next((device for device in devices if device.type != "meta"), "cpu"))


def _few(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def place(model: nn.Module, layers: dict[str, nn.Module], tensors: dict[str, Tensor], who: str) -> None:
    """Make the modules at the paths of `layers` what those are, and all other parameters and buffers `tensors`.

    Tied parameters stay tied, and need to be in `tensors` once. Raises: ValueError, and nothing is changed: a tensor is
    missing, has another shape, belongs to nothing, or would be left on the meta device.
    """
    replaced = {id(model.get_submodule(path)) for path in layers}
    slots: dict[str, tuple[nn.Module, str, Tensor]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if id(module) in replaced:
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            full = f"{path}.{name}".lstrip(".")
            if name not in module._non_persistent_buffers_set:
                slots[full] = (module, name, tensor)
            elif tensor.is_meta:
                raise ValueError(f"{who}: {full} is on the meta device and never saved: make it before loading")
    if unexpected := set(tensors) - set(slots):
        raise ValueError(f"{who}: the model has no {_few(unexpected)}, which the file has")
    aliases: dict[int, list[str]] = {}
    for name, (_, _, tensor) in slots.items():
        aliases.setdefault(id(tensor), []).append(name)
    missing = {name for names in aliases.values() for name in names if not any(each in tensors for each in names)}
    if missing:
        raise ValueError(f"{who}: the file has no {_few(missing)}, which the model has")
    for names in aliases.values():
        given = [name for name in names if name in tensors]
        for name in given:
            got, expected = tuple(tensors[name].shape), tuple(slots[name][2].shape)
            if got != expected:
                raise ValueError(f"{who}: {name} has shape {got} in the file, expected {expected}")
            if name != given[0] and not torch.equal(tensors[name], tensors[given[0]]):
                raise ValueError(f"{who}: {given[0]} and {name} are one in the model, but differ in the file")

    done = set()
    for path, made in layers.items():
        module = model.get_submodule(path)
        if id(module) not in done:
            done.add(id(module))
            swap(module, made, keep_original=False)
    for names in aliases.values():
        tensor = next(tensors[name] for name in names if name in tensors)
        old = slots[names[0]][2]
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for name in names:
            owner, attribute, _ = slots[name]
            setattr(owner, attribute, tensor)
