"""Layers that add a residual and norm the sum: the same forward with both in one pass over the rows.

A forward is known by its source. Where it adds two things and norms the sum next,

    x = residual + self.dropout(x)          normed, x = add_norm(self.norm, residual, self.dropout(x))
    residual = x                     ->     residual = x
    x = self.norm(x)                        x = normed

or norms a sum that it does not keep, `self.norm(x + y)`, it is compiled again with a call that does both; all else is
the forward that it was: its arguments, caches, masks, outputs. The norms have to be swapped already; where one of them
is watched by hooks, or was given back since, the call adds and norms as ever.
"""

import ast
import copy
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from llmkernels.accelerate import swap
from llmkernels.accelerate.candidate import Candidate, Trial, device_of, original_forward, parameter_dtype, unfit
from llmkernels.accelerate.kinds.activations import hooked
from llmkernels.accelerate.kinds.norms import with_residual
from llmkernels.accelerate.rebinding import rebound
from llmkernels.accelerate.trials import ROWS, plain_copy

_ADD_NORM, _NORMED = "_llmkernels_add_norm", "_llmkernels_normed"
_CHECKPOINTING = "forward_with_checkpointing"  # what transformers' layers wrap forward in, that of a subclass again


def add_norm(norm: nn.Module, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(norm(first + second), first + second), in one pass where the norm is swapped and nobody watches it."""
    run, backend = norm._llmkernels if isinstance(norm, swap.Accelerated) else (None, None)
    fused = with_residual(run)
    if fused is None or hooked(norm) or not _fits(norm, first, second):
        total = first + second
        return norm(total), total
    return fused(norm, first, second, backend)


def _fits(norm: nn.Module, first: Tensor, second: Tensor) -> bool:
    """Whether both are plain tensors of one kind, and of the weight's where that is in 16 bits."""
    if not (type(first) is type(second) is Tensor) or first.shape != second.shape or first.dtype != second.dtype:
        return False
    weight = norm.weight
    if weight is not None and weight.dtype.itemsize == 2 and weight.dtype != first.dtype:
        return False
    # Under CUDA's autocast norms are in fp32, sums are not.
    return not (first.is_cuda and torch.is_autocast_enabled("cuda"))


def recognise(module: nn.Module) -> Candidate | None:
    """What may replace a layer's forward; None: it has no sum before a norm that is swapped."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    norms = [name for name, child in module.named_children() if _can_add(child)]
    forward = _innermost(original_forward(module)) if norms and unfit(module) is None else None
    made = None if forward is None else _rewritten(forward, frozenset(norms))
    if made is None:
        return None
    run = _Fused(tuple(name for name in norms if name in made.norms))
    ops = [
        "add_layer_norm" if isinstance(getattr(module, name), nn.LayerNorm) else "add_rms_norm" for name in run.norms
    ]
    groups = {op: [name for name, of in zip(run.norms, ops, strict=True) if of == op] for op in ops}
    description = ", ".join(f"{op} ({', '.join(of)})" for op, of in groups.items())
    return Candidate(ops[0], description, (), run, trials=run.trials, timed=run.timed, example=run.example)


def _can_add(child: nn.Module) -> bool:
    return isinstance(child, swap.Accelerated) and with_residual(child._llmkernels[0]) is not None


# --- the source -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rewritten:
    code: types.CodeType
    norms: tuple[str, ...]  # names of the children that sums go to


def _innermost(forward: Callable) -> types.FunctionType | None:
    """A forward without transformers' wrapper; None where it is wrapped in something else."""
    while getattr(getattr(forward, "__code__", None), "co_name", None) == _CHECKPOINTING:
        forward = forward.__wrapped__
    plain = isinstance(forward, types.FunctionType) and not hasattr(forward, "__wrapped__")
    return forward if plain and not forward.__code__.co_freevars else None


@functools.cache
def _rewritten(forward: types.FunctionType, names: frozenset[str]) -> _Rewritten | None:
    """A forward with its sums and norms in one call, for norms of these names; None: it has none, or no source."""
    try:
        lines, start = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    found = tuple(dict.fromkeys(_fuse(function, names)))
    if not found:
        return None
    # Defaults and annotations are those of the forward: only the code is taken of what is compiled.
    arguments = function.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
        if each is not None:
            each.annotation = None
    function.returns, arguments.defaults, arguments.kw_defaults = None, [], [None] * len(arguments.kwonlyargs)
    ast.increment_lineno(ast.fix_missing_locations(tree), start - 1)  # tracebacks show the source as it is
    compiled = compile(tree, forward.__code__.co_filename, "exec", dont_inherit=True)
    return _Rewritten(next(each for each in compiled.co_consts if isinstance(each, types.CodeType)), found)


def _fuse(function: ast.FunctionDef, names: frozenset[str]) -> Iterator[str]:
    """Rewrite the statements of a function in place. Gives the names of the norms that were found."""
    for block in list(_blocks(function)):
        for i, statement in enumerate(block):
            yield from _unkept_sums(statement, names)
            total = _target_of_sum(statement)
            if total is None:
                continue
            after = next((each for each in block[i + 1 :] if not _renames(each, total)), None)
            norms = [] if after is None else _norms_of(after, names, total)
            if len(norms) != 1:
                continue
            (call,) = norms
            yield call.func.attr
            both = ast.Tuple([ast.Name(_NORMED, ast.Store()), statement.targets[0]], ast.Store())
            value = _call(call.func, statement.value)
            block[i] = ast.copy_location(ast.Assign([both], ast.copy_location(value, statement.value)), statement)
            _Replace(call, ast.Name(_NORMED, ast.Load())).visit(after)


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and block and isinstance(block[0], ast.stmt):
                yield block


def _call(norm: ast.expr, total: ast.BinOp) -> ast.Call:
    return ast.Call(ast.Name(_ADD_NORM, ast.Load()), [copy.deepcopy(norm), total.left, total.right], [])


def _is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _norms_in(statement: ast.stmt, names: frozenset[str]) -> list[ast.Call]:
    """The calls `self.name(one argument)` in a plain statement."""
    if not isinstance(statement, (ast.Assign, ast.Return)) or statement.value is None:
        return []
    calls = [node for node in ast.walk(statement.value) if isinstance(node, ast.Call) and len(node.args) == 1]
    return [
        call for call in calls
        if not call.keywords and isinstance(call.func, ast.Attribute) and call.func.attr in names
        and isinstance(call.func.value, ast.Name) and call.func.value.id == "self"
    ]  # fmt: skip


def _target_of_sum(statement: ast.stmt) -> str | None:
    """x of `x = a + b`."""
    one = isinstance(statement, ast.Assign) and len(statement.targets) == 1 and _is_sum(statement.value)
    return statement.targets[0].id if one and isinstance(statement.targets[0], ast.Name) else None


def _renames(statement: ast.stmt, total: str) -> bool:
    """Whether it is `other = x`."""
    return (
        isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name) and statement.value.id == total
        and all(isinstance(target, ast.Name) and target.id != total for target in statement.targets)
    )  # fmt: skip


def _norms_of(statement: ast.stmt, names: frozenset[str], total: str) -> list[ast.Call]:
    """The calls `self.name(x)`."""
    arguments = ((call, call.args[0]) for call in _norms_in(statement, names))
    return [call for call, argument in arguments if isinstance(argument, ast.Name) and argument.id == total]


def _unkept_sums(statement: ast.stmt, names: frozenset[str]) -> Iterator[str]:
    """Rewrite each `self.name(a + b)`."""
    for call in [call for call in _norms_in(statement, names) if _is_sum(call.args[0])]:
        yield call.func.attr
        made = ast.Subscript(_call(call.func, call.args[0]), ast.Constant(0), ast.Load())
        _Replace(call, ast.copy_location(made, call)).visit(statement)


class _Replace(ast.NodeTransformer):
    """One node of a tree by another."""

    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


# --- the forward and its proof --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fused:
    """The forward of a layer with these norms, made once for a class."""

    norms: tuple[str, ...]

    def __call__(self, module: nn.Module, *args, backend: str | None = None, **kwargs):
        return self.bind(original_forward(module), backend)(module, *args, **kwargs)

    def bind(self, forward: Callable, backend: str | None) -> types.FunctionType:
        """The rewritten forward. Each norm has a backend of its own."""
        forward = _innermost(forward)
        return rebound(forward, {_ADD_NORM: add_norm}, _rewritten(forward, frozenset(self.norms)).code)

    def example(self, module: nn.Module) -> tuple[Tensor | None, ...]:
        norm = getattr(module, self.norms[0])
        x = torch.empty(1, *_shape(norm), dtype=parameter_dtype(norm), device=device_of(module))
        return x, x, norm.weight, getattr(norm, "bias", None)

    def trials(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> list[Trial]:
        """The layer as it was, no module of it swapped, beside itself with nothing but sums and norms fused.

        Matrices are the module's own, of which a large model has too many for new ones; vectors are random.
        """
        copied = plain_copy(module).to(dtype).train(dtype == torch.float64)
        vectors = {name: p for name, p in copied.named_parameters() if p.dim() < 2}
        generator = torch.Generator().manual_seed(1)
        for parameter in vectors.values():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)
        before, after = _shared(copied), _shared(copied)
        norms = [getattr(after, name) for name in self.norms]
        for each in (*before.modules(), *after.modules()):
            if any(each is norm for norm in norms):
                each._llmkernels = (each._llmkernels[0], backend)
            elif isinstance(each, swap.Accelerated):
                each.__class__ = type(each)._original
        return [self._trial(before, after, self._arguments(before, dtype, ROWS), tuple(vectors.items()))]

    def timed(self, module: nn.Module, dtype: torch.dtype, backend: str | None) -> Trial:
        """256 rows, by the layer as it is by now and with its sums fused."""
        copied = plain_copy(module)
        return self._trial(copied, copied, self._arguments(copied, dtype, 256))

    def _trial(self, before: nn.Module, after: nn.Module, arguments: dict, parameters: tuple = ()) -> Trial:
        forward, name = _innermost(original_forward(before)), next(iter(arguments))
        return Trial(
            lambda x: _first_tensor(forward, before, arguments | {name: x}),
            lambda x: _first_tensor(self.bind(forward, None), after, arguments | {name: x}),
            (arguments[name],),
            parameters,
            rounding=1e-3,
        )

    def _arguments(self, module: nn.Module, dtype: torch.dtype, count: int) -> dict:
        """Arguments that the layer runs with, by name; the first of those that were tried, where it runs with none."""
        forward, tried = _innermost(original_forward(module)), []
        norm, device = getattr(module, self.norms[0]), device_of(module)
        width = _shape(norm)[-1]
        heads = [m.head_dim for m in module.modules() if isinstance(getattr(m, "head_dim", None), int)]
        inner = [m.in_features for m in module.modules() if isinstance(getattr(m, "in_features", None), int)]
        for first in dict.fromkeys((width, *inner)):
            for turned in (*dict.fromkeys(head // part for part in (1, 2, 4) for head in heads), 0):
                both = _rows(count, first, 2), _rows(count, width, 3)
                tried.append(_arguments(forward, *(x.to(device, dtype) for x in both), turned))
                if _runs(forward, module, tried[-1]):
                    return tried[-1]
        return tried[0]


def _rows(count: int, width: int, seed: int) -> Tensor:
    """`[1, count, width]`, of scales 0.3 to 3: larger ones, which the norms have seen, would saturate an attention."""
    values = torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3
    return values * torch.logspace(-0.5, 0.5, count, dtype=torch.float64)[:, None]


def _arguments(forward: Callable, first: Tensor, other: Tensor, turned: int) -> dict:
    """For each parameter what its name or place says: rows, others to add or of an encoder, angles, no mask."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    found, count, device = {parameters[0].name: first}, first.shape[1], first.device
    for parameter in parameters[1:]:
        wanted = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if parameter.name == "position_embeddings" and turned:
            angles = torch.linspace(0.0, 3.0, count * turned, dtype=torch.float64, device=device).view(1, count, turned)
            found[parameter.name] = angles.cos().to(first.dtype), angles.sin().to(first.dtype)
        elif parameter.name == "position_ids":
            found[parameter.name] = torch.arange(count, device=device)[None]
        elif wanted or parameter.name == "encoder_hidden_states":
            found[parameter.name] = None if "mask" in parameter.name else other
    return found


def _runs(forward: Callable, module: nn.Module, arguments: dict) -> bool:
    try:
        with torch.no_grad():
            return _first_tensor(forward, module, arguments) is not None
    except Exception:  # whatever a user's layer raises: then it is tried with others
        return False


def _first_tensor(forward: Callable, module: nn.Module, arguments: dict) -> Tensor:
    """What comes out first; what is dropped is drawn from one seed."""
    torch.manual_seed(5)
    return next(x for x in pytree.tree_leaves(forward(module, **arguments)) if isinstance(x, Tensor))


def _shape(norm: nn.Module) -> tuple[int, ...]:
    return tuple(norm.normalized_shape if norm.weight is None else norm.weight.shape)


def _shared(module: nn.Module) -> nn.Module:
    """Other module objects with the same tensors."""
    duplicate = copy.copy(module)
    duplicate._parameters, duplicate._buffers = dict(module._parameters), dict(module._buffers)
    duplicate._modules = {name: None if m is None else _shared(m) for name, m in module._modules.items()}
    if isinstance(duplicate, nn.RNNBase):
        duplicate._init_flat_weights()
    return duplicate
