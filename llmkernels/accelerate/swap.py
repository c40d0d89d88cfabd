"""How a model is changed and changed back: the class of a module object, or a setting that a model has.

A swap changes the class of a module object to a subclass of its own class with another forward. The object stays, and
with it parameters, buffers, hooks, state_dict keys, attributes, ties, isinstance checks and every reference that
somebody holds; restoring is changing the class back. What to restore is kept in the modules themselves, so that it
goes along with copies and pickles.
"""

import functools
from collections.abc import Callable
from typing import Protocol

from torch import nn


class Accelerated:
    """Mixin of the subclasses that swapped modules belong to; `_llmkernels` holds (forward, backend)."""

    def forward(self, *args, **kwargs):
        run, backend = self._llmkernels
        if kwargs and not args and len(kwargs) == 1:
            return run(self, *kwargs.values(), backend=backend)  # the one input, by whatever name the original has
        return run(self, *args, backend=backend, **kwargs)

    def __reduce_ex__(self, protocol):
        # The subclass is made at run time, so a pickle or deep copy names the original class instead.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # object has none in 3.10
        return _rebuild, (type(self)._original, *self._llmkernels), state


@functools.cache
def _subclass(original: type, binds: Callable | None, backend: str | None) -> type:
    names = {"_original": original, "__module__": original.__module__}
    if binds is not None:
        names["forward"] = binds.bind(original.forward, backend)
    return type(f"Accelerated{original.__name__}", (Accelerated, original), names)


def _class_for(original: type, run: Callable, backend: str | None) -> type:
    """The subclass with the forward that calls `run`, or with the one that `run.bind` makes of the original's."""
    binds = run if hasattr(run, "bind") else None  # equal ones make one class: a method of each would not be equal
    return _subclass(original, binds, None if binds is None else backend)


def _rebuild(original: type, run: Callable, backend: str | None) -> nn.Module:
    return nn.Module.__new__(_class_for(original, run, backend))


def swap(module: nn.Module, run: Callable, backend: str | None) -> None:
    """Give `module` the forward `run`, of a subclass of its own class."""
    module._llmkernels = (run, backend)
    module.__class__ = _class_for(type(module), run, backend)


def original_class(module: nn.Module) -> type:
    """The class that a module has or had before it was swapped."""
    return type(module)._original if isinstance(module, Accelerated) else type(module)


class Setting(Protocol):
    """A change of something else than a forward. Copies and pickles along with the model that holds it."""

    def undo(self, module: nn.Module) -> bool:
        """Set back what was there before, unless somebody changed it since. Returns whether it was set back.

        `module` is the one that holds this.
        """


SETTINGS = "_llmkernels_settings"


def keep(module: nn.Module, setting: Setting) -> None:
    """Remember on `module` a setting that was made."""
    vars(module).setdefault(SETTINGS, []).append(setting)


def forget(module: nn.Module, setting: Setting) -> None:
    """Take a setting that was undone, or is not to be, off the module that holds it."""
    made = vars(module)[SETTINGS]
    made[:] = [each for each in made if each is not setting]
    if not made:
        del vars(module)[SETTINGS]


def settings_of(module: nn.Module) -> list[Setting]:
    return vars(module).get(SETTINGS, [])


def undo(module: nn.Module, *, swapped: bool = False, settings: int = 0) -> int:
    """Undo what was changed of this one module, but for what is said to have been there. Returns how many changes."""
    count = 0
    if isinstance(module, Accelerated) and not swapped:
        module.__class__ = type(module)._original
        del module._llmkernels
        count += 1
    made = settings_of(module)
    while len(made) > settings:
        count += made.pop().undo(module)
    if not made:
        vars(module).pop(SETTINGS, None)
    return count


def state(model: nn.Module) -> dict[int, tuple[bool, int]]:
    """What each module has of ours, to come back to with `back_to`."""
    return {id(m): (isinstance(m, Accelerated), len(settings_of(m))) for m in model.modules()}


def back_to(model: nn.Module, before: dict[int, tuple[bool, int]]) -> None:
    """Undo what was changed since `before`."""
    for module in model.modules():
        was_swapped, settings = before.get(id(module), (False, 0))
        undo(module, swapped=was_swapped, settings=settings)
