"""The kinds of module that accelerate knows, one file each: `recognise(module)` in a module here is asked of all.

It answers with candidates, best first, and if there are none, why; None where the module is not of its kind at all.
A new kind is a new file.
"""

import importlib
import pkgutil

import torch
from torch import nn

from llmkernels.accelerate.candidate import Found, unfit, user_rules

KINDS = tuple(
    importlib.import_module(f"{__name__}.{name}")
    for name in sorted(found.name for found in pkgutil.iter_modules(__path__))
)


def recognise(module: nn.Module) -> Found:
    """The candidates for a module, best first; if there are none, why; None if it is nothing that we know."""
    if isinstance(module, torch.jit.ScriptModule):  # whose class has no forward to look at
        return [], "it is TorchScript; accelerate the module that it was made of"
    found = _recognise(module)
    reason = None if found is None else unfit(module)
    return found if reason is None else ([], reason)


def _recognise(module: nn.Module) -> Found:
    if type(module) in user_rules:
        return user_rules[type(module)](module), "its rule offers nothing"
    for kind in KINDS:
        found = kind.recognise(module)
        if found is not None:
            return found
    return None
