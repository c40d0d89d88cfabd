"""A forward compiled again from its source, with a sum and the norm of it in one call.

    x = residual + self.dropout(x)          normed, x = add_norm(self.norm, residual, self.dropout(x))
    residual = x                     ->     residual = x
    x = self.norm(x)                        x = normed

and `self.norm(x + y)` the same way. All else is the code that it was, at the lines where it was.
"""

import ast
import copy
import functools
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

ADD_NORM, _NORMED = "_llmkernels_add_norm", "_llmkernels_normed"
_CHECKPOINTING = "forward_with_checkpointing"  # what transformers' layers wrap forward in, that of a subclass again


@dataclass(frozen=True)
class Rewritten:
    code: types.CodeType
    norms: tuple[str, ...]  # names of the children that sums go to


def innermost(forward: Callable) -> types.FunctionType | None:
    """A forward without transformers' wrapper; None where it is wrapped in something else."""
    while getattr(getattr(forward, "__code__", None), "co_name", None) == _CHECKPOINTING:
        forward = forward.__wrapped__
    plain = isinstance(forward, types.FunctionType) and not hasattr(forward, "__wrapped__")
    return forward if plain and not forward.__code__.co_freevars else None


@functools.cache
def rewritten(forward: types.FunctionType, names: frozenset[str]) -> Rewritten | None:
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
    return Rewritten(next(each for each in compiled.co_consts if isinstance(each, types.CodeType)), found)


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
    return ast.Call(ast.Name(ADD_NORM, ast.Load()), [copy.deepcopy(norm), total.left, total.right], [])


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
