"""Rotary embedding in modules that call a function for it, `apply_rotary_pos_emb(q, k, cos, sin)` by any name.

The function is a global name of the file that the module's class is in. The class that a module gets instead has the
same forward with that one name bound to ours: nothing outside the module changes. The function is found by its
arguments and recognised by what it computes.
"""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkernels import functional
from llmkernels.accelerate.candidate import Candidate, Found, Trial, device_of, original_forward, parameter_dtype
from llmkernels.accelerate.rebinding import rebound

_ARGUMENTS = ["q", "k", "cos", "sin"]
_SIZE, _LENGTH = 16, 6

# How the columns of cos and sin belong to elements: each half of the columns for all pairs (j, j + R/2), as in LLaMA;
# the same for pairs (2j, 2j + 1), as in GLM; columns beside the elements of pairs (2j, 2j + 1), as in Cohere's models;
# or one column for each pair (j, j + R/2), as in GPT-OSS.
FORMS = ("halves", "interleaved", "pairs", "half tables")


def recognise(module: nn.Module) -> Found:
    forward = original_forward(module)
    if not isinstance(forward, types.FunctionType) or not list(module.children()):
        return None
    names = [name for name in forward.__code__.co_names if _turns(forward.__globals__.get(name))]
    if len(names) != 1:
        return None
    runs = [_Rebound(names[0], form) for form in FORMS]
    make = lambda run: Candidate(
        "rope", f"rope ({run.form})", (), run, trials=run.trials, timed=run.timed, example=_example, alike=run.alike
    )
    return [make(run) for run in runs], ""


def _turns(thing) -> bool:
    """Whether a thing is a function whose first arguments are q, k, cos and sin, and the others need not be given."""
    if not isinstance(thing, types.FunctionType):
        return False
    parameters = list(inspect.signature(thing).parameters.values())
    first, others = parameters[:4], parameters[4:]
    return [p.name for p in first] == _ARGUMENTS and all(p.default is not p.empty for p in others)


def _example(module: nn.Module) -> tuple[Tensor | None, ...]:
    q = torch.empty(1, 2, 1, _SIZE, dtype=parameter_dtype(module), device=device_of(module))
    table = q.new_empty(1, _SIZE // 2)
    return q, q, table, table, None


def rotary(original: Callable, form: str, backend: str | None) -> Callable:
    """`original` by functional.rope; calls with what that does not have go to `original`.

    Ours reads half of the columns of the tables. Whether the others are the same is the model's affair, not that of the
    function that was tried out, so the first prompt is looked at.
    """
    fits: list[bool] = []  # what was found there

    def apply(q, k, cos, sin, *rest, **options):
        heads = options.get("unsqueeze_dim", 1)  # the dimension of q that cos has not
        usual = not rest and options.keys() <= {"unsqueeze_dim"} and heads in (1, 2)
        usual = usual and q.dim() == k.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape
        usual = usual and cos.shape[0] in (1, q.shape[0]) and cos.shape[1] == q.shape[3 - heads] == k.shape[3 - heads]
        columns = _columns(form, cos.shape[-1])
        if not usual or columns is None or 2 * len(range(cos.shape[-1])[columns]) > q.shape[-1]:
            return original(q, k, cos, sin, *rest, **options)
        # The first position alone says nothing: its angles are all zero.
        if not fits and not torch.compiler.is_compiling() and type(cos) is Tensor and cos.shape[1] > 1:
            fits.append(_repeats(cos, form) and _repeats(sin, form))
        if fits and not fits[0]:
            return original(q, k, cos, sin, *rest, **options)
        if q.dtype != cos.dtype or k.dtype != cos.dtype:  # under autocast; products are of the common type
            q, k = q.to(torch.promote_types(q.dtype, cos.dtype)), k.to(torch.promote_types(k.dtype, cos.dtype))
        # One row for the whole batch is taken out along with the columns: a decoded token feels every view.
        read = (0, slice(None), columns) if cos.shape[0] == 1 else (..., columns)
        cos, sin, interleaved = cos[read], sin[read], form in ("interleaved", "pairs")
        return functional.rope(q, k, cos, sin, interleaved=interleaved, seq_dim=-1 - heads, backend=backend)

    return apply


def _columns(form: str, count: int) -> slice | None:
    """Which of `count` columns of a table there is one of for each pair of elements; None: the number is odd."""
    if form == "half tables":
        return slice(None)
    return None if count % 2 else slice(0, None, 2) if form == "pairs" else slice(0, count // 2)


def _tables(form: str, angles: Tensor) -> Tensor:
    """Angles, one for each pair of elements, as columns of a table."""
    if form == "half tables":
        return angles
    return angles.repeat_interleave(2, -1) if form == "pairs" else torch.cat((angles, angles), -1)


def _repeats(table: Tensor, form: str) -> bool:
    """Whether the columns that are not read are those that are."""
    if form in ("interleaved", "half tables"):  # the original does not read others, or there are none
        return True
    first, second = (table[..., ::2], table[..., 1::2]) if form == "pairs" else table.chunk(2, -1)
    return torch.equal(first, second)


@dataclass(frozen=True)
class _Rebound:
    name: str
    form: str

    def __call__(self, module: nn.Module, *args, backend: str | None = None, **kwargs):
        return self.bind(original_forward(module), backend)(module, *args, **kwargs)

    def bind(self, forward: types.FunctionType, backend: str | None) -> types.FunctionType:
        """The forward itself, made once for a class: a compiler cannot look into the making."""
        ours = rotary(forward.__globals__[self.name], self.form, backend)
        return rebound(forward, {self.name: ours})

    def alike(self, module: nn.Module) -> tuple:
        function = original_forward(module).__globals__[self.name]
        return function, parameter_dtype(module), device_of(module)

    def trials(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> list[Trial]:
        """Heads of which all and of which half is turned, with as many and with fewer key heads."""
        sizes = ((_SIZE, 4), (_SIZE, 2), (_SIZE // 2, 2))
        found = [self._trial(module, dtype, backend, (2, 4, _LENGTH, _SIZE), *each) for each in sizes]
        return [trial for i, trial in enumerate(found) if i < 2 or _works(trial)]  # most turn whole heads only

    def timed(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> Trial:
        """A prompt of 256 tokens."""
        return self._trial(module, dtype, backend, (1, 8, 256, 64), 64, 8)

    def _trial(self, module, dtype, backend, shape: tuple[int, ...], turned: int, key_heads: int) -> Trial:
        function, device = original_forward(module).__globals__[self.name], device_of(module)
        batch, _, length, size = shape
        generator = torch.Generator().manual_seed(6)
        normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
        angles = 3.0 * normal(batch, length, turned // 2)
        angles = _tables(self.form, angles)
        cos, sin = (1.1 * angles.cos()).to(dtype), (1.1 * angles.sin()).to(dtype)
        call = lambda function, q, k: torch.cat(function(q, k, cos, sin), 1)
        inputs = normal(*shape).to(dtype), normal(batch, key_heads, length, size).to(dtype)
        ours = rotary(function, self.form, backend)
        return Trial(functools.partial(call, function), functools.partial(call, ours), inputs)


def _works(trial: Trial) -> bool:
    try:
        return trial.original(*trial.inputs) is not None
    except RuntimeError:
        return False
