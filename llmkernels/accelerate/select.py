"""`include` and `exclude`: which modules accelerate may change."""

import fnmatch
from collections.abc import Callable, Iterable

from torch import nn

Selector = str | type | Callable[[str, nn.Module], bool]


class Selection:
    """Modules that are in `include`, if it is given, and not in `exclude`."""

    def __init__(self, model: nn.Module, include, exclude):
        self._include = None if include is None else _selectors("include", include)
        self._exclude = [] if exclude is None else _selectors("exclude", exclude)
        self._paths: dict[int, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(path)

    def why_not(self, module: nn.Module) -> str | None:
        """Why the module is to be left alone, or None. A shared module is in either if one of its paths is."""
        if any(_matches(each, path, module) for each in self._exclude for path in self._paths[id(module)]):
            return "excluded"
        if self._include is not None and not any(
            _matches(each, path, module) for each in self._include for path in self._paths[id(module)]
        ):
            return "not included"
        return None


def _selectors(name: str, given) -> list[Selector]:
    many = given if isinstance(given, Iterable) and not isinstance(given, (str, type)) else [given]
    many = list(many)
    for each in many:
        if not (isinstance(each, str) or callable(each)):
            raise TypeError(
                f"accelerate: {name} has {each!r}, expected a path or glob, a module class, or a function of a path and"
                " a module"
            )
    return many


def _matches(selector: Selector, path: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        # A path stands for all that is under it too.
        parts = path.split(".")
        return any(fnmatch.fnmatchcase(".".join(parts[:i]), selector) for i in range(1, len(parts) + 1))
    if isinstance(selector, type):
        return isinstance(module, selector)
    return bool(selector(path, module))
