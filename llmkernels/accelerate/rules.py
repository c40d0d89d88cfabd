"""Which modules can be run by llmkernels, found by what they are made of, and the forward they get.

A rule looks at one module and returns candidates: forwards that may replace the module's own. Nothing is believed:
verify.py runs each beside the original and the first that agrees is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels import functional
from llmkernels.accelerate import recurrent
from llmkernels.ops.attention.module import multihead_attention
from llmkernels.ops.lstm.module import LSTMCell

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "rms_norm_eps")


def _one_tensor(module: nn.Module, forward: Callable, input: Tensor) -> Tensor:
    return forward(input)


def _about_one(values: Tensor) -> Tensor:
    return 1.0 + 0.5 * values


@dataclass(frozen=True)
class Candidate:
    """A forward for a module: `run(module, *args, backend=..., **kwargs)` with the arguments of a call.

    `normalized_shape` says what to feed it when verifying. `probe(module, forward, input)` makes one tensor of what it
    does with that, by default `forward(input)`. `weights` makes parameters for that from normal values. `example` gives
    the tensors with which the backends of `op` are asked whether they run it, by default rows of that shape.
    """

    op: str
    description: str
    normalized_shape: tuple[int, ...]
    run: Callable[..., Any]
    probe: Callable[[nn.Module, Callable, Tensor], Tensor] = _one_tensor
    weights: Callable[[Tensor], Tensor] = _about_one
    example: Callable[[nn.Module], tuple[Tensor | None, ...]] | None = None


def _layer_norm(module, input: Tensor, backend: str | None) -> Tensor:
    return functional.layer_norm(
        input, module.normalized_shape, module.weight, module.bias, module.eps, backend=backend
    )


def _rms_norm(module, input: Tensor, backend: str | None) -> Tensor:
    return functional.rms_norm(input, module.normalized_shape, module.weight, module.eps, backend=backend)


def _attend(module: nn.Module, forward: Callable, input: Tensor) -> Tensor:
    """MultiheadAttention without dropout: of itself, of other keys, with each kind of mask; outputs and weights."""
    rows = input - input.mean(-1, keepdim=True)
    rows = 2.0 * rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # scores of about one
    rows = rows.transpose(0, 1) if not module.batch_first else rows
    length = rows.shape[1 if module.batch_first else 0]
    wide = lambda width: rows.repeat(1, 1, -(-width // module.embed_dim))[..., :width]
    key, value = wide(module.kdim), wide(module.vdim)
    causal = torch.ones(length, length, dtype=torch.bool, device=input.device).triu(1)
    padding = torch.zeros(1, length, dtype=torch.bool, device=input.device)
    padding[:, length // 2 :] = True
    bias = torch.linspace(-1, 1, length * length, dtype=input.dtype, device=input.device).view(length, length)
    was_training = module.training
    module.training = False
    try:
        calls = [
            forward(rows, key, value, average_attn_weights=False),
            forward(rows, key, value, key_padding_mask=padding, need_weights=False),
            forward(rows, key, value, attn_mask=bias),
            forward(rows, key, value, attn_mask=causal, is_causal=True, need_weights=False),
        ]
    finally:
        module.training = was_training
    return torch.cat([result.flatten() for call in calls for result in call if result is not None])


class _StructuralRMSNorm:
    """rms_norm over the last dimension with the module's `weight` and the eps found under `eps_name`."""

    def __init__(self, eps_name: str, weight_offset: float):
        self.eps_name, self.weight_offset = eps_name, weight_offset

    def __call__(self, module, input: Tensor, backend: str | None) -> Tensor:
        weight, eps = module.weight, getattr(module, self.eps_name)
        return functional.rms_norm(
            input, tuple(weight.shape), weight, eps, weight_offset=self.weight_offset, backend=backend
        )


_user_rules: dict[type, Callable[[nn.Module], list[Candidate]]] = {}


def rule(module_type: type) -> Callable:
    """Decorator: `@accelerate.rule(MyNorm)` on a function from a module to its list of `Candidate`s.

    Candidates are verified like the built-in ones. The rule applies to exactly this type; the last one given counts.
    """

    def decorate(function: Callable[[nn.Module], list[Candidate]]) -> Callable:
        _user_rules[module_type] = function
        return function

    return decorate


def is_reported(module: nn.Module) -> bool:
    """Whether the report should say something about this module: a norm, or a kind of torch's LSTM."""
    known = type(module) in _user_rules or isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or _is_lstm(module)
    return known or ("norm" in type(module).__name__.lower() and not list(module.children()))


def _is_lstm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LSTM, nn.LSTMCell)) and not isinstance(module, LSTMCell)


def candidates(module: nn.Module) -> tuple[list[Candidate], str]:
    """The candidates for a module, best first; if there are none, why."""
    if "forward" in vars(module):
        return [], "its forward was replaced on the instance"
    if type(module) in _user_rules:
        return _user_rules[type(module)](module), "its rule offers nothing"
    if type(module).forward is nn.LayerNorm.forward:
        return [Candidate("layer_norm", "layer_norm", tuple(module.normalized_shape), _layer_norm)], ""
    if type(module).forward is nn.RMSNorm.forward:
        return [Candidate("rms_norm", "rms_norm", tuple(module.normalized_shape), _rms_norm)], ""
    if type(module).forward is nn.MultiheadAttention.forward:
        op = "scaled_dot_product_attention"
        return [Candidate(op, "fused attention", (module.embed_dim,), multihead_attention, _attend)], ""
    if type(module).forward is nn.LSTM.forward:
        shape, options = (module.input_size,), (recurrent.probe_lstm, recurrent.gate_weights, recurrent.lstm_example)
        return [Candidate("lstm", "lstm", shape, recurrent.lstm, *options)], ""
    if type(module).forward is nn.LSTMCell.forward:
        shape, options = (module.input_size,), (recurrent.probe_cell, recurrent.gate_weights, recurrent.cell_example)
        return [Candidate("lstm_cell", "lstm_cell", shape, recurrent.lstm_cell, *options)], ""
    if _is_lstm(module):
        return [], "its forward is not torch's"
    return _structural(module)


def _structural(module: nn.Module) -> tuple[list[Candidate], str]:
    """RMS norms as Hugging Face models write them: one `weight`, an eps, no other state."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return [], f"not a known norm: parameters {sorted(parameters) or 'none'}, expected one 1-D weight"
    if list(module.children()) or list(module.buffers()):
        return [], "not a known norm: it has buffers or submodules"
    names = [name for name in EPS_NAMES if isinstance(getattr(module, name, None), Real)]
    if len(names) != 1:
        return [], f"not a known norm: eps attributes {names or 'none'}, expected one of {', '.join(EPS_NAMES)}"
    shape = tuple(parameters["weight"].shape)
    return [
        Candidate("rms_norm", "rms_norm (weight)", shape, _StructuralRMSNorm(names[0], 0.0)),
        Candidate("rms_norm", "rms_norm (1 + weight)", shape, _StructuralRMSNorm(names[0], 1.0)),
    ], ""


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a module works in: that of its parameters, else fp32."""
    parameter = next(module.parameters(), None)
    return torch.float32 if parameter is None else parameter.dtype


def device_of(module: nn.Module) -> torch.device:
    """Where a module lives: the device of its parameters, else the CPU."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
