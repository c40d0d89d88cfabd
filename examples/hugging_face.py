"""Hugging Face's models for the examples: from a local folder, never from the network."""

import os
from pathlib import Path

from llmkernels.cli import UsageError

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def transformers():
    """The package. Raises: UsageError, it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError("transformers is not installed: pip install transformers") from error
    return transformers


def from_folder(folder: Path, kind: str, **options):
    """(model, tokenizer) of a local folder. Raises: UsageError, there is no such model in it."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"--model: {folder} has no config.json, expected the folder of a model")
    try:
        model = getattr(transformers(), kind).from_pretrained(folder, **options)
        return model, transformers().AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: {folder} cannot be read: {str(error).splitlines()[0]}") from error
