"""Folders with a quantized or plain model of Hugging Face's transformers, and all that it takes to run it again.

    config.json                what the model is, as transformers has it; `quantization_config` says that it is ours
    llmkernels.safetensors     the weights, as own.py writes them; of a model without quantized layers model.safetensors
    tokenizer files and others, copied
    llmkernels.json            {"version": 1, "dtype": ..., "weights": ..., "swapped": [paths] | null,
                                "buffers": {name: dtype}}

llmkernels.json is written last: a folder with it is whole. `buffers` are those that models make themselves and that no
checkpoint has, as tables of angles: `model.to(dtype)` rounds them, so their dtypes are part of what is computed.
transformers itself reads a folder that has no quantized layer.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels.accelerate import Report, accelerate
from llmkernels.accelerate.swap import original_class
from llmkernels.quantization.checkpoints import hugging_face, own
from llmkernels.quantization.checkpoints.hugging_face import CONFIG

ABOUT, VERSION = "llmkernels.json", 1
QUANTIZED_WEIGHTS, PLAIN_WEIGHTS = "llmkernels.safetensors", "model.safetensors"


def save_folder(model: nn.Module, folder: str | Path, *, source: str | Path | None = None,
                report: Report | None = None) -> None:  # fmt: skip
    """Write a model of transformers into a folder that `load_folder` reads.

    Args:
        model: quantized, accelerated, both or neither.
        folder: made if it is not there; expected to be empty.
        source: the folder that the model came from, of which config.json, tokenizer, licence and other small files are
            taken, or its config.json alone. Default: config.json is written from `model.config`.
        report: that of `accelerate`: what it swapped, and nothing else, is swapped after loading. Default: all that
            is recognised.
    Raises: TypeError, no model of transformers; FileExistsError, the folder is not empty; FileNotFoundError, there is
        no such source; what `save` raises.
    """
    package, folder = hugging_face.transformers(), Path(folder)
    kind = original_class(model).__name__
    if not isinstance(model, package.PreTrainedModel) or not isinstance(model, getattr(package, kind, ())):
        raise TypeError(f"save_folder: model is a {kind}, expected a model class of transformers")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty")
    if source is None:
        document, files = json.loads(model.config.to_json_string(use_diff=False)), []
        document.pop("_attn_implementation", None)
    else:
        source = Path(source)
        document = hugging_face.json_of(source if source.is_file() else source / CONFIG)
        files = hugging_face.small_files(source) if source.is_dir() else []
    dtype = _name(model.dtype)
    document = {name: value for name, value in document.items() if name not in ("torch_dtype", "quantization_config")}
    document |= {"architectures": [kind], "dtype": dtype}
    if own.has_quantized(model):
        document["quantization_config"] = {"quant_method": "llmkernels"}
        weights = QUANTIZED_WEIGHTS
    else:
        weights = PLAIN_WEIGHTS
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        if path.name != ABOUT:
            shutil.copyfile(path, folder / path.name)
    _write(folder / CONFIG, document)
    own.save(model, folder / weights)
    swapped = None if report is None else sorted({entry.path for entry in report.swapped})
    buffers = {name: _name(buffer.dtype) for name, (_, buffer) in _own_buffers(model).items()}
    about = {"version": VERSION, "dtype": dtype, "weights": weights, "swapped": swapped, "buffers": buffers}
    _write(folder / ABOUT, about)


def load_folder(folder: str | Path, *, accelerated: bool = True, device: str = "cpu", **options) -> nn.Module:
    """A model of a folder of `save_folder`, ready to run: quantized as it was, accelerated, in eval mode.

    Attention that is not swapped is what transformers chooses, as in a model that it loads.

    Args:
        accelerated: False leaves the model to plain PyTorch, but for its quantized layers.
        device: where it is put. On the CPU its weights are memory-mapped: the folder must not change while it lives.
        options: those of `accelerate`, as `verify` or `backend`. `include` is by default what was swapped when the
            model was saved.
    Returns: the model; `llmkernels.restore` undoes the acceleration.
    Raises: FileNotFoundError; ValueError: the folder is none of ours, not whole, of a newer version, or its files do
        not fit each other; TypeError, options without acceleration; ModuleNotFoundError: transformers or safetensors is
        not installed; what `accelerate` raises.
    """
    if options and not accelerated:
        raise TypeError(f"load_folder: {', '.join(options)} with accelerated=False, expected no options of accelerate")
    folder = Path(folder)
    who = f"load_folder: {folder.name}"
    hugging_face.transformers()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    about, document = _about(folder, who), hugging_face.json_of(folder / CONFIG)
    model = hugging_face.make(document, hugging_face.DTYPES[about["dtype"]], f"{who}: {CONFIG}", initialised=False)
    own.load(model, folder / about["weights"])
    _convert_buffers(model, about["buffers"], who)
    _read_generation_config(model, folder)
    model.to(device)
    if accelerated:
        if about["swapped"] is not None and "include" not in options:
            swapped = set(about["swapped"])
            options["include"] = lambda path, module: path in swapped
        accelerate(model, **options)
    return model


def is_ours(folder: Path) -> bool:
    """Whether `save_folder` wrote a folder."""
    return (folder / ABOUT).is_file()


def _about(folder: Path, who: str) -> dict[str, Any]:
    if not is_ours(folder):
        raise ValueError(f"{who}: has no {ABOUT}: llmkernels did not write it, or not all of it")
    about = hugging_face.json_of(folder / ABOUT)
    version, swapped = about.get("version"), about.get("swapped")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"{who}: is of version {version!r}, expected up to {VERSION}: a newer llmkernels wrote it")
    if str(about.get("dtype")) not in hugging_face.DTYPES:
        raise ValueError(
            f"{who}: {ABOUT}: dtype is {about.get('dtype')!r}, expected one of {', '.join(hugging_face.DTYPES)}"
        )
    if about.get("weights") not in (QUANTIZED_WEIGHTS, PLAIN_WEIGHTS):
        expected = f"{QUANTIZED_WEIGHTS} or {PLAIN_WEIGHTS}"
        raise ValueError(f"{who}: {ABOUT}: weights is {about.get('weights')!r}, expected {expected}")
    if swapped is not None and not (isinstance(swapped, list) and all(isinstance(path, str) for path in swapped)):
        raise ValueError(f"{who}: {ABOUT}: swapped is no list of paths")
    buffers = about.get("buffers")
    if not isinstance(buffers, dict) or not set(map(str, buffers.values())) <= set(hugging_face.DTYPES):
        raise ValueError(f"{who}: {ABOUT}: buffers is no table of names and dtypes")
    return about


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _own_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, Tensor]]:
    """Floating buffers that are in no checkpoint: name -> (module, buffer)."""
    return {
        f"{path}.{name}".lstrip("."): (module, buffer)
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set and buffer is not None and buffer.is_floating_point()
    }


def _convert_buffers(model: nn.Module, dtypes: dict[str, str], who: str) -> None:
    buffers = _own_buffers(model)
    if set(buffers) != set(dtypes):
        names = ", ".join(sorted(set(buffers) ^ set(dtypes))[:3])
        raise ValueError(f"{who}: the model and {ABOUT} do not have the same buffers: {names}")
    for name, (module, buffer) in buffers.items():
        module._buffers[name.rpartition(".")[2]] = buffer.to(hugging_face.DTYPES[dtypes[name]])


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    if model.can_generate() and (folder / "generation_config.json").is_file():
        made = hugging_face.transformers().GenerationConfig.from_dict
        model.generation_config = made(hugging_face.json_of(folder / "generation_config.json"))


def _write(path: Path, document: dict[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(document, indent=2) + "\n")
    os.replace(part, path)
