"""`dtype=`: a model's floating tensors in another dtype while it is accelerated, and bit for bit what they were after.

As in `module.to(dtype)`, Parameter objects stay, and with them optimizers and ties: what changes is the tensor that
each holds. The tensors that they held are kept in their modules, as settings that can be undone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkernels.accelerate import swap
from llmkernels.accelerate.huggingface import is_pretrained
from llmkernels.ops.quantized_linear.module import FIXED, QuantizedModule
from llmkernels.quantization.model import is_lazy

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class Cast:
    """The tensors that one module held before they were in `dtype`: of parameters, their gradients, and buffers."""

    dtype: torch.dtype
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def undo(self, module: nn.Module) -> bool:
        """Give the tensors back. What was changed since, as by training, keeps its values, in the dtype of before.

        What somebody converted since stays as it is. Returns whether anything was given back.
        """
        found = 0
        for name, before in self.parameters.items():
            parameter = module._parameters.get(name)  # None: it is quantized, for good
            if parameter is None or parameter.dtype != self.dtype:
                continue
            gradient = parameter.grad
            parameter.data = _given_back(parameter.data, before)
            if gradient is not None:
                gradient.data = _given_back(gradient.data, self.gradients.get(name), before.dtype)
            found += 1
        for name, before in self.buffers.items():
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.dtype == self.dtype:
                module._buffers[name] = _given_back(buffer, before)
                found += 1
        return bool(found)

    def tensors(self) -> list[Tensor]:
        return [*self.parameters.values(), *self.gradients.values(), *self.buffers.values()]


def _given_back(now: Tensor, before: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """`before`, where `now` is, if `now` is what was made of it; else what it is now, in the dtype of before."""
    if before is None:
        return now.to(dtype)
    there = before.to(now.device)
    if now.is_meta:
        return there
    bits = _BITS[now.dtype.itemsize]
    same = now.shape == there.shape and torch.equal(now.view(bits), there.to(now.dtype).view(bits))
    return there if same else now.to(before.dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> list[tuple[nn.Module, Cast]]:
    """Floating parameters, gradients and buffers of a model in `dtype`. Returns what `uncast` undoes.

    As they are stay: eight-bit weights; buffers that transformers' models make themselves (tables of angles) and those
    of modules with a conversion of their own; and in 16 bits what a model of transformers wants kept in fp32.
    """
    changed, kept = [], _kept_in_fp32(model, dtype)
    cache: dict[tuple, Tensor] = {}
    done: dict[int, tuple[Tensor, Tensor | None]] = {}  # parameters that several modules have

    def converted(tensor: Tensor) -> Tensor:
        """One for all tensors that are the same memory."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.is_meta or not tensor.numel():
            return tensor.detach().to(dtype)
        if key not in cache:
            cache[key] = tensor.detach().to(dtype)
        return cache[key]

    inside = {id(module) for each in filter(is_pretrained, model.modules()) for module in each.modules()}
    for module in model.modules():
        made = Cast(dtype, {}, {}, {})
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in kept:
                continue
            if id(parameter) not in done:
                if not _converts(parameter, dtype):
                    continue
                gradient = parameter.grad
                done[id(parameter)] = parameter.data, None if gradient is None else gradient.data
                parameter.data = converted(parameter.data)
                if gradient is not None:
                    gradient.data = gradient.data.to(dtype)
            made.parameters[name], gradient = done[id(parameter)]
            if gradient is not None:
                made.gradients[name] = gradient
        for name, buffer in _convertible_buffers(module, inside).items():
            if _converts(buffer, dtype) and id(buffer) not in kept:
                made.buffers[name] = buffer
                module._buffers[name] = converted(buffer)
        if made.tensors():
            swap.keep(module, made)
            changed.append((module, made))
    return changed


def uncast(changed: list[tuple[nn.Module, Cast]]) -> None:
    """Undo `cast`."""
    for module, made in changed:
        made.undo(module)
        swap.forget(module, made)


def _converts(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1 and tensor.dtype != dtype and not is_lazy(tensor)


def _convertible_buffers(module: nn.Module, inside: set[int]) -> dict[str, Tensor]:
    """Those that a conversion may touch; `inside` are modules of transformers' models."""
    if isinstance(module, QuantizedModule):
        left = set(FIXED)
    elif swap.original_class(module)._apply is not nn.Module._apply:
        return {}
    else:
        left = module._non_persistent_buffers_set if id(module) in inside else set()
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None and name not in left}


def _kept_in_fp32(model: nn.Module, dtype: torch.dtype) -> set[int]:
    """Tensors that a model of transformers says are to stay in fp32 (its second list is for fp16 alone)."""
    found: set[int] = set()
    for module in filter(is_pretrained, model.modules()):
        names = set(getattr(module, "_keep_in_fp32_modules_strict", None) or ()) if dtype.itemsize == 2 else set()
        names |= set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
        for path, tensor in (*module.named_parameters(), *module.named_buffers()):
            if any(f".{name}." in f".{path}." for name in names):
                found.add(id(tensor))
    return found
