"""Folders of Hugging Face's models: config.json, and models of transformers made from it. Never from the network."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

CONFIG = "config.json"
# What goes along with a model: tokenizer, templates, settings of generation, licence. Weights have other endings.
SMALL = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".md")
NAMED = ("LICENSE", "NOTICE")
LEFT = (CONFIG, "quantize_config.json")  # what says how the weights are stored, as an index does
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def transformers():
    """The package. Raises: ModuleNotFoundError that says what to do."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "models of Hugging Face need transformers: pip install transformers safetensors"
        ) from error
    return transformers


def json_of(path: Path) -> dict[str, Any]:
    """Raises: FileNotFoundError; ValueError, the file holds no JSON object."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        document = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: no JSON that can be read: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: holds a {type(document).__name__}, expected an object")
    return document


def class_of(document: dict[str, Any], who: str) -> type[nn.Module]:
    """The class that a config names in `architectures`; else the causal language model of its type, or the plain model.

    Raises: ValueError, transformers has no such type or class.
    """
    package, kind = transformers(), document.get("model_type")
    if not isinstance(kind, str) or kind not in package.CONFIG_MAPPING:
        raise ValueError(f"{who}: unknown model type {kind!r}: transformers {package.__version__} has no such model")
    names = document.get("architectures")
    if names:
        found = getattr(package, names[0], None) if isinstance(names, list) and isinstance(names[0], str) else None
        if not (isinstance(found, type) and issubclass(found, package.PreTrainedModel)):
            raise ValueError(f"{who}: architectures is {names!r}, expected the name of a model class of transformers")
        return found
    config = package.CONFIG_MAPPING[kind]
    for mapping in (package.MODEL_FOR_CAUSAL_LM_MAPPING, package.MODEL_MAPPING):
        if config in mapping:
            return mapping[config]
    raise ValueError(f"{who}: has no architectures, and model type {kind!r} has no model of its own")


def dtype_of(document: dict[str, Any]) -> torch.dtype:
    """The dtype that a config names; float32 if it names none."""
    return DTYPES.get(str(document.get("dtype", document.get("torch_dtype"))).removeprefix("torch."), torch.float32)


def make(document: dict[str, Any], dtype: torch.dtype, who: str, *, initialised: bool) -> nn.Module:
    """A model on the CPU in eval mode, with random weights; or with whatever is in memory, which costs no time.

    Raises: ValueError, the config does not describe a model.
    """
    package, kind = transformers(), class_of(document, who)
    from transformers import initialization

    plain = {name: value for name, value in document.items() if name != "quantization_config"}
    try:
        config = package.CONFIG_MAPPING[document["model_type"]].from_dict(plain)
        if initialised:
            return kind._from_config(config, dtype=dtype).eval()
        with initialization.no_init_weights():
            model = kind._from_config(config, dtype=dtype)
        model.tie_weights()
        return model.eval()
    except Exception as error:  # what impossible sizes lead to inside of transformers may be anything
        raise ValueError(f"{who}: describes no {kind.__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The message of an error, shortened to one line: the first, and the next where it ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def small_files(folder: Path) -> list[Path]:
    """What is copied along with a model."""
    left = lambda name: name in LEFT or name.endswith(".index.json")
    wanted = lambda name: name.startswith(NAMED) or (name.endswith(SMALL) and not left(name))
    return sorted(path for path in folder.iterdir() if path.is_file() and wanted(path.name))


def has_weights(folder: Path) -> bool:
    return any(True for ending in WEIGHTS for _ in folder.glob(ending))


def read(folder: Path, document: dict[str, Any], dtype: torch.dtype | None) -> nn.Module:
    """The model of a folder with weights as transformers writes them, in eval mode; None: the dtype of the files.

    Raises: ValueError, the weights cannot be read, or are not all there.
    """
    kind = class_of(document, f"{folder.name}: {CONFIG}")
    try:
        model, found = kind.from_pretrained(
            folder, local_files_only=True, dtype=dtype or "auto", output_loading_info=True
        )
    except Exception as error:  # of transformers, safetensors or pickle, whatever is wrong with a file
        raise ValueError(
            f"{folder.name}: its weights cannot be read as {kind.__name__}: {first_line(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{folder.name}: its weights do not have {', '.join(missing[:3])}{more}, which {kind.__name__} has"
        )
    return model.eval()
