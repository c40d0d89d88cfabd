"""Our own files: the state_dict of a model, and in the metadata what its quantized layers are.

The metadata `llmkernels` is JSON:

    {"version": 1,
     "layers": {path: {"kind": "linear" | "embedding" | "lstm", "scheme": ..., "group_size": ..., "tensors": [...]}},
     "tied": {name: the name under which the same tensor is in the file}}

Tensors are as the formats' files draw them (docs/quantization-formats.md), whatever machine wrote them.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llmkernels.nn import QuantizedEmbedding, QuantizedLinear, QuantizedLSTM
from llmkernels.ops.quantized_linear.module import BUFFERS, QuantizedModule
from llmkernels.quantization import SCHEMES, linears
from llmkernels.quantization.checkpoints import placing
from llmkernels.quantization.checkpoints.files import Reader, write
from llmkernels.quantization.tensor import QuantizedTensor

KEY, VERSION = "llmkernels", 1
OF = {QuantizedLinear: "linear", QuantizedEmbedding: "embedding", QuantizedLSTM: "lstm"}


def save(model: nn.Module, path: str | Path) -> None:
    """Write a model with quantized layers, all of its state_dict, to one safetensors file.

    Raises: TypeError, the state_dict has something that is no tensor; ValueError, a tensor is on the meta device;
        ModuleNotFoundError, safetensors is not installed.
    """
    tensors, tied, seen = {}, {}, {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"save: {name} is a {type(tensor).__name__}, expected a tensor: safetensors holds no other")
        if tensor.is_meta:
            raise ValueError(f"save: {name} is on the meta device, expected one with values")
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key in seen:
            tied[name] = seen[key]
        else:
            seen[key], tensors[name] = name, tensor.contiguous()
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    for name, tensor in tensors.items():
        # safetensors takes no two views of the same memory.
        if storages.count(tensor.untyped_storage().data_ptr()) > 1:
            tensors[name] = tensor.clone()
    layers = {p: _described(m) for p, m in model.named_modules(remove_duplicate=False) if type(m) in OF}
    document = json.dumps({"version": VERSION, "layers": layers, "tied": tied})
    write(Path(path), tensors, {"format": "pt", KEY: document})


def has_quantized(model: nn.Module) -> bool:
    """Whether `save` writes quantized layers of this model."""
    return any(type(module) in OF for module in model.modules())


def _described(module: nn.Module) -> dict[str, Any]:
    found = {"kind": OF[type(module)], "tensors": sorted(module.state_dict())}
    if isinstance(module, QuantizedModule):
        found |= {"scheme": module.scheme, "group_size": module.group_size}
    return found


def load(model: nn.Module, path: str | Path) -> None:
    """Read a file of `save` into a model of the same architecture, quantized or not, which may be on the meta device.

    Layers that are quantized in the file become so in the model; all tensors of the model are then the file's, with its
    dtypes, on the device where the model's were. On a CPU they are memory-mapped: the file must not be changed while
    the model lives.

    Raises: FileNotFoundError; ValueError, and the model is as it was: the file is none of ours, of a newer version, cut
        off, has values that its formats cannot have, or another architecture; ModuleNotFoundError, safetensors is not
        installed.
    """
    path = Path(path)
    who = f"load: {path.name}"
    reader = Reader([path], placing.device_of(model))
    document = _document(reader, who)
    names, layers = set(reader.names), {}
    for layer_path, about in document["layers"].items():
        kind, given = about.get("kind"), about.get("tensors")
        if str(kind) not in placing.KINDS or not isinstance(given, list):
            raise ValueError(f"{who}: {layer_path} is of the kind {kind!r}, expected one of {', '.join(placing.KINDS)}")
        module = placing.target(model, layer_path, kind, who)
        full = {name: f"{layer_path}.{name}".lstrip(".") for name in given}
        stored = {name: document["tied"].get(each, each) for name, each in full.items()}
        for name, each in stored.items():
            if each not in reader.names:
                raise ValueError(f"{who}: the file has no {full[name]}, which its metadata names")
        parts = {name: reader.read(each) for name, each in stored.items()}
        names -= set(stored.values())
        layers[layer_path] = _layer(module, layer_path, kind, about, parts, who)
    tensors = {name: reader.read(name) for name in names}
    inside = tuple(f"{layer_path}." if layer_path else "" for layer_path in layers)
    for name, other in document["tied"].items():
        if not (inside and name.startswith(inside)):
            tensors[name] = reader.read(other)
    placing.place(model, layers, tensors, who)


def _document(reader: Reader, who: str) -> dict[str, Any]:
    try:
        document = json.loads(reader.metadata[KEY])
        version, layers, tied = document["version"], document["layers"], document["tied"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{who}: has no metadata {KEY!r} that can be read: llmkernels did not write it") from None
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{who}: is of version {version!r}, expected up to {VERSION}: a newer llmkernels wrote it")
    if not isinstance(layers, dict) or not all(isinstance(about, dict) for about in layers.values()):
        raise ValueError(f"{who}: metadata 'layers' is no description of layers")
    if not isinstance(tied, dict) or not set(map(str, tied.values())) <= set(reader.names):
        raise ValueError(f"{who}: metadata 'tied' names tensors that are not there")
    return document


def _layer(module: nn.Module, path: str, kind: str, about: dict, parts: dict[str, Tensor], who: str) -> nn.Module:
    """The quantized layer that `module` is to become. Raises: ValueError, it does not fit, or has impossible values."""
    try:
        if kind == "lstm":
            made = QuantizedLSTM(
                module.input_size, module.hidden_size, module.num_layers, module.bias, module.batch_first,
                module.dropout, module.bidirectional, module.proj_size, device="meta",
            )  # fmt: skip
            made.load_state_dict(parts, assign=True)
            return made
        scheme = about.get("scheme")
        if scheme not in SCHEMES:
            raise ValueError(f"scheme is {scheme!r}, expected one of {', '.join(SCHEMES)}")
        format, activations = SCHEMES[scheme]
        known = {*BUFFERS.values(), *(("bias", "input_scale") if kind == "linear" else ())}
        if "weight" not in parts or "weight_scales" not in parts or not set(parts) <= known:
            raise ValueError(f"it has {', '.join(sorted(parts))}, expected some of {', '.join(sorted(known))}")
        shape = linears.features(module)[::-1] if kind == "linear" else (module.num_embeddings, module.embedding_dim)
        held = {part: parts.get(name) for part, name in BUFFERS.items()}
        group_size = about.get("group_size")
        weight = QuantizedTensor(format, shape, group_size=group_size, activations=activations, **held)
        if kind == "linear":
            bias, plain = parts.get("bias"), module.bias
            if (bias is None) != (plain is None):
                raise ValueError(f"it has {'no' if bias is None else 'a'} bias, the model's has {_a(plain)}")
            if bias is not None:
                bias = nn.Parameter(bias, requires_grad=plain.requires_grad)
            made = QuantizedLinear.from_tensor(weight, bias, parts.get("input_scale"))
        else:
            dtype = module.dtype if isinstance(module, QuantizedEmbedding) else module.weight.dtype
            made = QuantizedEmbedding.from_tensor(weight, module.padding_idx, dtype)
        made.check_values(path)
        return made
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(f"{who}: {path}: {error}") from error


def _a(bias: Tensor | None) -> str:
    return "none" if bias is None else "one"
