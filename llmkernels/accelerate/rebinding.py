"""Copies of a class' forward that differ in one thing: a global name, or the code that is made of its source."""

import types
from typing import Any


def rebound(forward: types.FunctionType, names: dict[str, Any], code: types.CodeType | None = None):
    """`forward` with other global `names`, and with another `code` of the same arguments. Other globals are as now."""
    # Without the module's name: a compiler would look globals up in the module of that name, where ours are not.
    scope = {key: value for key, value in forward.__globals__.items() if key != "__name__"} | names
    copied = types.FunctionType(
        code or forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__, copied.__annotations__ = forward.__kwdefaults__, forward.__annotations__
    return copied
