"""Attention and losses of transformers' models: which of them are set to ours, with the entries of the report."""

import torch
from torch import nn

from llmkernels.accelerate import swap, timing
from llmkernels.accelerate.candidate import at_home, device_of, parameter_dtype
from llmkernels.accelerate.huggingface import attention, is_pretrained, loss
from llmkernels.accelerate.report import Entry


def apply(session) -> list[Entry]:
    """Set what may be set on the models of a session. Returns the entries."""
    return [*_attention(session), *_losses(session)]


# --- attention ------------------------------------------------------------------------------------------------------


def _attention(session) -> list[Entry]:
    configs = attention.configs_of(session.model)
    groups: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in attention.attention_modules(session.model):
        if id(module.config) in configs:
            groups.setdefault(id(module.config), []).append((path, module))
    entries: list[Entry] = []
    refused, set_from = False, set()
    for key, modules in groups.items():
        config, owners = configs[key]
        judged = [_judge(session, path, module, owners) for path, module in modules]
        if not all(entry.swapped for entry in judged):
            refused = True
            first = next(entry for entry in judged if not entry.swapped)
            judged = [
                entry
                if not entry.swapped
                else _entry(entry.path, entry, f"{first.path} reads the same config: {first.detail}")
                for entry in judged
            ]
        elif not attention.is_ours(config):
            set_from.add(config._attn_implementation)
            _set(session, config, owners)
        entries += judged
    if not refused and groups:
        # Of the models around them, whose configs make masks for generation.
        for key, (config, owners) in configs.items():
            if key not in groups and config._attn_implementation in set_from:
                _set(session, config, owners)
    return entries


def _set(session, config, owners: list[nn.Module]) -> None:
    setting = attention.Implementation(config, config._attn_implementation, session.backend)
    for owner in owners:
        swap.keep(owner, setting)


def _entry(path: str, like: Entry, why: str) -> Entry:
    return Entry(path, like.module, False, why, like.error, speed=like.speed)


def _judge(session, path: str, module: nn.Module, owners: list[nn.Module]) -> Entry:
    name = swap.original_class(module).__name__
    if attention.is_ours(module.config):
        return Entry(path, name, True, "swapped before", replacement="swapped before")
    reason = session.selection.why_not(module) or attention.why_not(module, owners)
    if reason is not None:
        return Entry(path, name, False, reason)
    like = torch.empty(1, 1, 1, 16, dtype=parameter_dtype(module), device=device_of(module))
    runs, reason = session.runs_on(attention.OP, (like, like, like, None, None, None))
    error = speed = None
    if reason is None and session.verify:
        reason, error = session.verifier.once(
            attention.alike(module), lambda: attention.verify(module, session.backend)
        )
    if reason is None and session.benchmark:
        speed = session.measured(("attention", attention.alike(module)), lambda: _attention_speed(session, module))
        reason = timing.refusal(speed)
    if reason is not None:
        return Entry(path, name, False, reason, error, speed=speed)
    to = f"fused attention, was {module.config._attn_implementation}"
    return Entry(path, name, True, f"{to}, on {runs}", error, to, runs, speed)


def _attention_speed(session, module: nn.Module) -> float:
    long = attention.trials(module, parameter_dtype(module), session.backend, length=128)
    return timing.ratio(timing.calls(long[0], module.training))


# --- losses ---------------------------------------------------------------------------------------------------------


def _losses(session) -> list[Entry]:
    entries = []
    for path, module in session.model.named_modules():
        if not is_pretrained(module) or not loss.uses_hook(module):
            continue
        name = type(module).__name__
        if isinstance(vars(module).get("_loss_function"), loss.TokenLoss):
            entries.append(Entry(path, name, True, "swapped before", replacement="swapped before"))
            continue
        reason = session.selection.why_not(module)
        runs, error, speed = "", None, None
        if reason is None:
            like = torch.empty(1, 8, dtype=parameter_dtype(module), device=device_of(module))
            runs, reason = session.runs_on(loss.OP, (like, like.new_zeros(1, dtype=torch.int64), None))
        if reason is None:
            with at_home(parameter_dtype(module), device_of(module)):
                found, reason, error = loss.find(module, session.backend)
        if reason is None and session.benchmark:
            speed = loss.speed(module, found)
            reason = timing.refusal(speed)
        if reason is not None:
            entries.append(Entry(path, name, False, reason, error, speed=speed))
            continue
        swap.keep(module, loss.LossFunction.set(module, found))
        to = "loss by cross_entropy"
        entries.append(Entry(path, name, True, f"{to} on {runs}", error, to, runs, speed))
    return entries
