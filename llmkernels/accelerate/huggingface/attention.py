"""Which attention modules of transformers may run through our implementation, and the setting that makes them.

A module is known by its forward, which asks ALL_ATTENTION_FUNCTIONS for a function by the name in its config. That
function, as it is set now, is run beside ours. All modules that read one config have to agree, since the name is there.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmkernels.accelerate.candidate import Trial, device_of, original_forward, parameter_dtype, unfit
from llmkernels.accelerate.huggingface import interface, is_pretrained
from llmkernels.accelerate.trials import compare, name_of
from llmkernels.accelerate.verify import TOLERANCE, backend_for, own_tolerance

OP = "scaled_dot_product_attention"
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_SETTINGS = ("scaling", "softcap", "s_aux")  # of the keywords, those that a module has a value for
_EAGER = "eager_attention_forward"
_REPLACED = ("eager", "sdpa")  # others were chosen by somebody who wants them


@dataclass
class Implementation:
    """The name of an implementation in a config, as a setting of a model that can be undone."""

    config: object
    before: str
    backend: str | None
    name: str = field(init=False)

    def __post_init__(self):
        self.name = interface.register(self.backend)
        self.config._attn_implementation_internal = self.name

    def undo(self, model: nn.Module) -> bool:
        if self.config._attn_implementation_internal != self.name:
            return False
        self.config._attn_implementation_internal = self.before
        return True

    def __setstate__(self, state):
        """A pickle may be read where nothing was accelerated before."""
        vars(self).update(state)
        interface.register(self.backend)


def attention_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The modules inside of transformers' models that call their attention by way of its interface."""
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        names = getattr(getattr(inspect.unwrap(original_forward(module)), "__code__", None), "co_names", ())
        if _INTERFACE in names and hasattr(module, "config"):
            yield path, module


def is_ours(config) -> bool:
    return str(config._attn_implementation).split("_")[0] == interface.NAME


def why_not(module: nn.Module, owners: Iterable[nn.Module] = ()) -> str | None:
    """Why this module's attention is not to be replaced, or None. `owners` are the models with its config."""
    current = module.config._attn_implementation
    if current not in _REPLACED:
        return f"its attention is {current!r}, which somebody chose, expected 'eager' or 'sdpa'"
    if (reason := unfit(module)) is not None:
        return reason
    forward = inspect.unwrap(original_forward(module))
    # A mask that only hides later keys is not made for us, nor for transformers' sdpa: the module is to say it.
    supported = any(getattr(owner, "_supports_sdpa", False) for owner in owners)
    if not getattr(module, "is_causal", True) and not supported and "create_causal_mask" in forward.__globals__:
        return "it does not say that it is causal, and its model, which has no sdpa either, makes causal masks"
    keywords = call_of_interface(forward)
    if keywords is None or current_function(module) is None:
        return "how it calls its attention is not known"
    unknown = sorted(set(keywords) - interface.KNOWN)
    if unknown:
        return f"it gives its attention {', '.join(unknown)}, which ours does not have"
    return None


@functools.lru_cache(None)
def call_of_interface(forward) -> dict[str, ast.expr] | None:
    """The keyword arguments, but for **kwargs, with which a forward calls the function that the interface gave it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    given = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and _INTERFACE in ast.dump(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    calls = [
        n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in given
    ]
    if len(calls) != 1:
        return None
    return {keyword.arg: keyword.value for keyword in calls[0].keywords if keyword.arg is not None}


def _value(module: nn.Module, expression: ast.expr | None):
    """A number, or an attribute of the module, as a forward writes it; None for everything else."""
    if isinstance(expression, ast.Constant):
        return expression.value
    if (
        isinstance(expression, ast.Attribute)
        and isinstance(expression.value, ast.Name)
        and expression.value.id == "self"
    ):
        return getattr(module, expression.attr, None)
    return None


def current_function(module: nn.Module):
    """What the module calls as its config is now."""
    scope, name = inspect.unwrap(original_forward(module)).__globals__, module.config._attn_implementation
    return scope.get(_EAGER) if name == "eager" else scope[_INTERFACE][name]


def alike(module: nn.Module) -> tuple:
    keywords = call_of_interface(inspect.unwrap(original_forward(module)))
    values = tuple((name, _value(module, keywords.get(name))) for name in _SETTINGS)
    attributes = tuple(getattr(module, name, None) for name in ("is_causal", "num_key_value_groups", "head_dim"))
    return current_function(module), values, attributes, parameter_dtype(module), device_of(module)


def verify(module: nn.Module, backend: str | None) -> tuple[str | None, float]:
    """(None, largest relative error) if ours gives what the module's attention gives, else (why not, error)."""
    worst, own = 0.0, parameter_dtype(module)
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for dtype in (torch.float64, torch.float32, own):
            tolerance = TOLERANCE.get(dtype) or own_tolerance(dtype)
            for trial in trials(module, dtype, backend_for(dtype, backend)):
                problem, error = compare(trial, tolerance, gradients=dtype.itemsize > 2)
                if problem:
                    return f"fused attention disagrees in {name_of(dtype)}: {problem}", error
                worst = max(worst, error if dtype.itemsize > 2 else 0.0)
    return None, worst


def trials(module: nn.Module, dtype: torch.dtype, backend: str | None, length: int = 7) -> list[Trial]:
    """A prompt without and with padding, and one query with the keys of a cache."""
    keywords = call_of_interface(inspect.unwrap(original_forward(module)))
    options = {name: _value(module, keywords[name]) for name in _SETTINGS if name in keywords}
    sinks = options.get("s_aux")
    current, is_eager = current_function(module), module.config._attn_implementation == "eager"
    groups = getattr(module, "num_key_value_groups", 1)
    size = getattr(module, "head_dim", None) or 16
    generator, device = torch.Generator().manual_seed(8), device_of(module)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
    causal = getattr(module, "is_causal", True)
    found = []
    for rows, keys, padded in ((length, length, False), (length, length, True), (1, length + 2, False)):
        shared = 2 if sinks is None else sinks.shape[0] // groups  # sinks belong to the heads that the module has
        q, k, v = normal(2, shared * groups, rows, size), normal(2, shared, keys, size), normal(2, shared, keys, size)
        k = k * size**-0.5 if options.get("scaling") == 1.0 else k  # or one key would have all the weight
        inputs = [q, k, v]
        mask = _mask(rows, keys, causal, padded=padded, device=device) if padded else None
        seen = mask
        if is_eager and mask is None and causal and rows > 1:
            seen = _mask(rows, keys, causal, padded=False, device=device)
        if is_eager and seen is not None:
            seen = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        if "position_bias" in keywords:
            inputs.append(normal(1, shared * groups, rows, keys))
        call = functools.partial(_call, module, options=options)
        ours = functools.partial(interface.attention, backend=backend)
        both = functools.partial(call, current, seen), functools.partial(call, ours, mask)
        found.append(Trial(*both, tuple(inputs), () if sinks is None else (("sinks", sinks),)))
    return found


def _call(module, function, mask, q, k, v, bias=None, *, options) -> Tensor:
    more = {} if bias is None else {"position_bias": bias}
    return function(module, q, k, v, mask, dropout=0.0, **options, **more)[0]


def _mask(rows: int, keys: int, causal: bool, *, padded: bool, device) -> Tensor:
    """True takes part; no row without a key, of which opinions differ."""
    kept = torch.ones(2, 1, rows, keys, dtype=torch.bool, device=device)
    kept = kept.tril(keys - rows) if causal else kept
    if padded:
        kept[1, :, :, keys - 2 :] = False
    return kept


def configs_of(model: nn.Module) -> dict[int, tuple[object, list[nn.Module]]]:
    """The configs of the PreTrainedModels in a model, and which of them have each."""
    found: dict[int, tuple[object, list[nn.Module]]] = {}
    for module in model.modules():
        if is_pretrained(module):
            found.setdefault(id(module.config), (module.config, []))[1].append(module)
    return found
