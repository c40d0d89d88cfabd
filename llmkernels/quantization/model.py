"""`quantize(model, scheme)`: the layers of a model with quantized weights, in place, all of them or none.

As `accelerate` does, a swap changes the class and the contents of a module object. The object stays, and with it the
references that somebody holds, hooks and shared uses; restoring is changing both back.
"""

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmkernels.ops.cross_entropy.module import LinearCrossEntropyLoss
from llmkernels.ops.lstm.quantized import SCALE, QuantizedLSTM
from llmkernels.ops.quantized_linear.embedding import QuantizedEmbedding
from llmkernels.ops.quantized_linear.module import ORIGINAL, QuantizedLinear, QuantizedModule
from llmkernels.quantization import SCHEMES, linears
from llmkernels.quantization import calibration as scales_of_inputs
from llmkernels.quantization.report import Layer, Report
from llmkernels.quantization.tensor import QuantizedTensor

DEFAULT_SKIP = ("lm_head",)
# Modules that read the weights of those in them instead of calling them, wherever or in some fast path.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, LinearCrossEntropyLoss)


def quantize(
    model: nn.Module,
    scheme: str,
    *,
    group_size: int | None = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
    skip: Iterable[str] = DEFAULT_SKIP,
    embeddings: bool = False,
    lstms: bool = False,
    calibration: Iterable[Any] | None = None,
    keep_original: bool = False,
    progress: bool | None = None,
    **options,
) -> Report:
    """Quantize the weights of a model's linear layers, in place; of all that are chosen, or after an error of none.

    Chosen are torch.nn.Linear, transformers' Conv1D (GPT-2), whose weight `[in, out]` is transposed, and subclasses
    that do not override `forward`. Left alone, with the reason in the report, are what `skip` and `filter` say, weights
    that another module has too (tied embeddings), parametrized weights, layers whose weight the module around them
    reads itself, and what is on the meta device.

    Args:
        scheme: "int8", "int4", "nf4", "fp8" (weights alone), "w8a8", "w4a8", "fp8_dynamic" (activations rounded too).
        group_size: columns that share a scale; None: the format's default (64 for int4 and nf4), -1: the whole row.
        filter: called with the path and the module; what it returns False for is left as it is.
        skip: names of modules left as they are with all in them: whole paths, or the ends of paths.
        embeddings: quantize torch.nn.Embedding too, in the scheme's format.
        lstms: with "w8a8", make each torch.nn.LSTM an nn.QuantizedLSTM, which is for inference.
        calibration: batches that the model is run on: a tuple or list is its arguments, a dict its keyword arguments,
            anything else its one argument. The columns of weights are then scaled for the least error of the outputs
            on them, and inputs by the inverse (Lin et al. 2023, arXiv:2306.00978).
        keep_original: hold on to the weights, so that `restore(model)` gives them back.
        progress: show a progress bar; None: where rich is installed and standard error is a terminal.
        options: of the format's `quantize`: `symmetric`, `scale_dtype`, `double`.
    Returns: the report; print it.
    Raises: TypeError or ValueError: `model` is no module, an unknown scheme or option, a name in `skip` that the model
        does not have, a weight with a NaN or an infinity (the layer is named), calibration that reaches no layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}, expected a torch.nn.Module")
    check_options(scheme, group_size, skip, lstms, options)
    report = Report(scheme, bytes_before=bytes_of(model), kept=keep_original)
    chosen, skipped = choose(model, skip=tuple(skip), filter=filter, embeddings=embeddings, lstms=lstms)
    samples = {}
    if calibration is not None:
        linear = {path: module for path, module in chosen.items() if linears.kind_of(module)}
        samples = scales_of_inputs.collect(model, linear, calibration)
    made: dict[str, nn.Module] = {}
    entries = {layer.path: layer for layer in skipped}
    with _progress(len(chosen), scheme, progress) as advance:
        for path, module in chosen.items():
            x = samples.get(path)
            made[path], entries[path] = _quantized(path, module, scheme, group_size, options, x)
            advance(path)
    for path, module in chosen.items():
        swap(module, made[path], keep_original)
    report.layers = [entries[path] for path, _ in model.named_modules() if path in entries]
    report.bytes_after = bytes_of(model)
    return report


def check_options(scheme: str, group_size: int | None, skip: Iterable[str], lstms: bool, options: dict) -> None:
    """Raises what `quantize` raises for arguments that fit no model."""
    if isinstance(skip, str):
        raise TypeError(f"quantize: skip is {skip!r}, expected a tuple of names")
    if lstms and scheme != "w8a8":
        raise ValueError(f"quantize: lstms=True with scheme {scheme!r}, expected 'w8a8', which QuantizedLSTM is")
    QuantizedLinear(0, 0, scheme=scheme, group_size=group_size, **options)


def choose(model: nn.Module, *, skip: tuple[str, ...] = DEFAULT_SKIP, filter: Callable | None = None,
           embeddings: bool = False, lstms: bool = False) -> tuple[dict[str, nn.Module], list[Layer]]:  # fmt: skip
    """(path -> module of what is to be quantized, what is not and why). Raises: ValueError, see `quantize`."""
    owners = _owners(model)
    paths: dict[int, list[str]] = {}  # of a module object, which may have several
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    everywhere = [path for several in paths.values() for path in several]
    unknown = [name for name in skip if name not in DEFAULT_SKIP and not any(_named([p], (name,)) for p in everywhere)]
    if unknown:
        raise ValueError(f"quantize: skip names {unknown[0]!r}, but the model has no such module")
    unwanted = {}
    if not embeddings:
        unwanted[nn.Embedding] = "embeddings=False"
    if not lstms:
        unwanted[nn.LSTM] = "lstms=False"
    chosen, skipped = {}, []
    for path, module in model.named_modules():
        if isinstance(module, QuantizedModule | QuantizedLSTM):
            skipped.append(Layer(path, type(module).__name__, False, "quantized before"))
            continue
        kind = _kind(module)
        if kind is None:
            continue
        if named := _named(paths[id(module)], skip):
            reason = f"skip names {named!r}"
        elif kind in unwanted:
            reason = unwanted[kind]
        else:
            parents = [model.get_submodule(each.rpartition(".")[0]) for each in paths[id(module)] if each]
            reason = _refusal(module, kind, parents, owners)
        if reason is None and filter is not None and not filter(path, module):
            reason = "filter returned False"
        if reason is None:
            chosen[path] = module
        else:
            skipped.append(Layer(path, type(module).__name__, False, reason))
    return chosen, skipped


def _kind(module: nn.Module) -> type | None:
    """Linear, Embedding or LSTM of torch.nn, transformers' Conv1D, or None."""
    if isinstance(module, nn.RNNBase):  # which our own LSTM is
        return nn.LSTM if module.mode == "LSTM" else None
    return nn.Embedding if isinstance(module, nn.Embedding) else linears.kind_of(module)


def _named(paths: list[str], names: tuple[str, ...]) -> str | None:
    """The one of `names` that ends a path of a module or of one around it."""
    for path in paths:
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            around = ".".join(parts[:end])
            for name in names:
                if around == name or around.endswith("." + name):
                    return name
    return None


def _refusal(module: nn.Module, kind: type, parents: list[nn.Module], owners: dict) -> str | None:
    """Why a module of a kind of `_kind` cannot be quantized, or None."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    ours = kind is nn.LSTM and type(module).__module__.startswith("llmkernels.")
    if (type(module).forward is not kind.forward and not ours) or "forward" in vars(module):
        return f"{type(module).__name__} overrides forward"
    for parent in parents:
        if isinstance(parent, READERS):
            return f"{type(parent).__name__} reads its weight itself"
    if getattr(module, "max_norm", None) is not None:
        return "it has max_norm, which changes the weight"
    for options in ("zoneout", "layer_norm", "return_cells"):
        if kind is nn.LSTM and getattr(module, options, 0.0) not in (0.0, (0.0, 0.0), False):
            return f"QuantizedLSTM has no {options}"
    if kind is not nn.LSTM and module._parameters.get("weight") is None:
        return "its weight is no parameter: something computes it"
    for name, parameter in module.named_parameters(recurse=False):
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.is_meta:
            return "it is on the meta device"
        if parameter.dim() < 2:
            continue
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return f"its {name} is {parameter.dtype}"
        others = [path for path, owner in owners[_key(parameter)] if owner is not module]
        if others:
            return f"its {name} is also {others[0]}"
    return None


def _key(tensor: Tensor) -> int:
    """The same for tensors that begin at the same place in memory."""
    return id(tensor) if is_lazy(tensor) or tensor.is_meta or not tensor.numel() else tensor.data_ptr()


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """Memory of a parameter or buffer -> (its path, the module that has it)."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        tensors = (*module._parameters.items(), *module._buffers.items())
        for name, tensor in tensors:
            if tensor is not None:
                owners.setdefault(_key(tensor), []).append((f"{path}.{name}".lstrip("."), module))
    return owners


def _quantized(path: str, module: nn.Module, scheme: str, group_size: int | None, options: dict,
               sample: Tensor | None) -> tuple[nn.Module, Layer]:  # fmt: skip
    name, before, output_error = f"{path}.weight".lstrip("."), bytes_of(module), None
    if isinstance(module, nn.RNNBase):
        try:
            made = QuantizedLSTM.from_lstm(module)
        except ValueError as error:
            raise ValueError(f"quantize: {path or 'the model'}: {error}") from error
        pairs = [(_lstm_weight(made, name), getattr(module, name)) for name in made._buffers
                 if name + SCALE in made._buffers]  # fmt: skip
        detail = "QuantizedLSTM, int8 weights and activations"
    elif isinstance(module, nn.Embedding):
        format = SCHEMES[scheme][0]
        made = QuantizedEmbedding.from_embedding(module, format, group_size=group_size, name=name, **options)
        pairs, detail = [(made.quantized_weight, module.weight)], made._described()
    else:
        linear = linears.as_linear(module)
        if sample is None:
            made = QuantizedLinear.from_linear(linear, scheme, group_size=group_size, name=name, **options)
        else:
            made, output_error = scales_of_inputs.search(linear, sample, scheme, group_size, name, options)
        pairs, detail = [(made, linear.weight)], made._described()
    error = _relative_error(pairs)
    return made, Layer(path, type(module).__name__, True, detail, error, before, bytes_of(made), output_error)


def _lstm_weight(made: QuantizedLSTM, name: str) -> QuantizedTensor:
    data = made._buffers[name]
    return QuantizedTensor("int8", tuple(data.shape), data, made._buffers[name + SCALE])


@torch.no_grad()
def _relative_error(pairs: list) -> float:
    lost = sum(float((weight.dequantize() - truth.float()).norm()) ** 2 for weight, truth in pairs)
    size = sum(float(truth.float().norm()) ** 2 for _, truth in pairs)
    return (lost / size) ** 0.5 if size else 0.0


def swap(module: nn.Module, made: nn.Module, keep_original: bool) -> None:
    """Make `module` what `made` is: its class and contents; hooks, mode and foreign attributes stay."""
    original = nn.Module.__new__(type(module))
    original.__dict__.update(vars(module))
    hooks = _hooks(module)
    foreign = {name: value for name, value in vars(module).items() if name not in vars(made)}
    own = {} if isinstance(module, nn.RNNBase) else foreign
    module.__class__ = type(made)
    vars(module).clear()
    vars(module).update(own | vars(made) | hooks)
    if keep_original:
        vars(module)[ORIGINAL] = original


def _hooks(module: nn.Module) -> dict[str, Any]:
    """What a module object keeps whatever it becomes: its hooks, whether it is training, settings of `accelerate`."""
    kept = lambda name: "_hook" in name or name == "training" or name.startswith("_llmkernels_")
    return {name: value for name, value in vars(module).items() if kept(name)}


def restore_quantized(model: nn.Module, but: Collection[int] = ()) -> int:
    """Undo `quantize(model, keep_original=True)`: the same module objects get class and weights back. Returns how many.

    Conversions and moves of the model since then are done to the weights too; a bias is kept as it is now. Modules
    whose id is in `but` stay quantized.
    """
    swapped = [module for module in model.modules() if ORIGINAL in vars(module) and id(module) not in but]
    for module in swapped:
        original = vars(module)[ORIGINAL]
        if isinstance(module, QuantizedLSTM):
            now = next((b for name, b in module.named_buffers() if name.startswith("bias")), module.weight_ih_l0)
            original.to(now.device, now.dtype if now.is_floating_point() else None)
        hooks = _hooks(module)
        if linears.kind_of(original):
            original._parameters["bias"] = module.bias
        module.__class__ = type(original)
        vars(module).clear()
        vars(module).update(vars(original) | hooks)
    return len(swapped)


def bytes_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers, of those that have a size yet."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor))


def is_lazy(tensor: Tensor) -> bool:
    """Whether it is to get its shape from the first input."""
    return isinstance(tensor, nn.parameter.UninitializedTensorMixin)


@contextlib.contextmanager
def _progress(count: int, scheme: str, wanted: bool | None) -> Iterator[Callable[[str], None]]:
    """A function that is called after each of `count` layers, with its path."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        if wanted:
            raise
        yield lambda path: None
        return
    console = Console(stderr=True)
    if not (console.is_terminal if wanted is None else wanted):
        yield lambda path: None
        return
    with Progress(console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(f"quantizing to {scheme}", total=count)
        yield lambda path: bar.update(task, advance=1, description=f"{scheme}: {path}")
