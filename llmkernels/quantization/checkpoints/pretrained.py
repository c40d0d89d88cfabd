"""Folders of AWQ and GPTQ as Hugging Face has them: config.json, and one safetensors file or several with an index."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from llmkernels.ops.quantized_linear.module import QuantizedLinear
from llmkernels.quantization import linears
from llmkernels.quantization.checkpoints import placing
from llmkernels.quantization.checkpoints.files import Reader
from llmkernels.quantization.checkpoints.packed import BITS, WHOLE_ROW, from_awq, from_gptq

INDEX = "model.safetensors.index.json"
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")
# Tables of angles that older files have and models make themselves.
IGNORED = ("rotary_emb.inv_freq",)
GPTQ_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def load_pretrained(model: nn.Module, folder: str | Path, *, ignore: Iterable[str] = IGNORED) -> list[str]:
    """Read a folder of AWQ (gemm) or GPTQ, four bits, into a model of that architecture.

    The model may be on the meta device. Each linear layer that is packed in the files becomes an nn.QuantizedLinear;
    all other parameters and buffers are the files'. How they are packed is what config.json's `quantization_config`
    (or quantize_config.json) says.

    Args:
        ignore: ends of names of tensors that the files may have and the model need not.
    Returns: the paths of the quantized layers.
    Raises: FileNotFoundError; ValueError, and the model is as it was: another method, number of bits or layout, a file
        that is cut off, another architecture, or values that cannot be; ModuleNotFoundError, safetensors is not
        installed.
    """
    folder = Path(folder)
    who = f"load_pretrained: {folder.name}"
    read = _method(who, _config(folder, who))
    reader = Reader(_files(folder, who), placing.device_of(model))
    names = set(reader.names)
    packed = sorted(name.removesuffix("qweight").rstrip(".") for name in names if name.split(".")[-1] == "qweight")
    if not packed:
        raise ValueError(f"{who}: no layer is packed: the files have no qweight")
    layers = {}
    for path in packed:
        full = {name: f"{path}.{name}".lstrip(".") for name in PARTS}
        parts = {name: reader.read(each) for name, each in full.items() if each in names}
        names -= set(full.values())
        layers[path] = _fitted(who, path, placing.target(model, path, "linear", who), read, parts)
    known = set(model.state_dict())
    ignored = {name for name in names - known for end in ignore if f".{name}".endswith(f".{end}")}
    placing.place(model, layers, {name: reader.read(name) for name in names - ignored}, who)
    return packed


def _fitted(who: str, path: str, module: nn.Module, read, parts: dict) -> QuantizedLinear:
    try:
        made = read(parts)
    except ValueError as error:
        raise ValueError(f"{who}: {path}: {error}") from error
    got, expected = linears.features(made), linears.features(module)
    if got != expected:
        raise ValueError(f"{who}: {path} has (in, out) features {got} in the files, expected {expected}")
    if made.bias is not None and module.bias is None:
        if bool(made.bias.any()):
            raise ValueError(f"{who}: {path} has a bias in the files, but none in the model")
        made.bias = None  # some packers write zeros
    elif made.bias is None and module.bias is not None:
        raise ValueError(f"{who}: {path} has a bias in the model, but none in the files")
    if made.bias is not None:
        made.bias.requires_grad_(module.bias.requires_grad)
    return made


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: no JSON that can be read: {error}") from error


def _config(folder: Path, who: str) -> dict[str, Any]:
    """The quantization_config of a folder."""
    main, old = folder / "config.json", folder / "quantize_config.json"
    if not folder.is_dir() or not (main.is_file() or old.is_file()):
        raise FileNotFoundError(f"{folder}: there is no such folder, or no config.json in it")
    config = _json(main).get("quantization_config") if main.is_file() else None
    if config is None and old.is_file():
        config = {"quant_method": "gptq", **_json(old)}
    if not isinstance(config, dict):
        raise ValueError(f"{who}: config.json has no quantization_config: the model is not quantized")
    return config


def _method(who: str, config: dict[str, Any]):
    """A function that makes a layer of its tensors, as `config` says. Raises: ValueError, nothing here can read it."""
    method, bits = config.get("quant_method"), config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size", 128))
    if method not in ("awq", "gptq"):
        raise ValueError(f"{who}: quant_method is {method!r}, expected 'awq' or 'gptq'")
    if bits != BITS:
        raise ValueError(f"{who}: bits is {bits!r}, expected {BITS}")
    if group_size not in (32, 64, 128, WHOLE_ROW):
        raise ValueError(f"{who}: group_size is {group_size!r}, expected 32, 64, 128 or -1")
    if config.get("dynamic"):
        raise ValueError(
            f"{who}: dynamic is {config['dynamic']!r}, expected none: layers differ in how they are packed"
        )
    if method == "awq":
        layout = str(config.get("version", "gemm")).lower()
        if layout != "gemm":
            raise ValueError(f"{who}: version is {layout!r}, expected 'gemm': the order of its bits is another")
        return lambda parts: from_awq(parts, group_size=group_size)
    layout = config.get("checkpoint_format", config.get("format", "gptq"))
    if layout not in GPTQ_VERSIONS:
        raise ValueError(f"{who}: checkpoint_format is {layout!r}, expected one of {', '.join(GPTQ_VERSIONS)}")
    version, symmetric = GPTQ_VERSIONS[layout], bool(config.get("sym", False))
    return lambda parts: from_gptq(parts, group_size=group_size, version=version, symmetric=symmetric)


def _files(folder: Path, who: str) -> list[Path]:
    index = folder / INDEX
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise FileNotFoundError(f"{folder}: there is no *.safetensors in it")
        return found
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{who}: {INDEX} has no weight_map")
    for name in set(names.values()):
        if Path(name).name != name:
            raise ValueError(f"{who}: {INDEX} names {name!r}, expected a file of the folder")
    return [folder / name for name in sorted(set(names.values()))]
