"""safetensors files: opened memory-mapped, written so that a file is whole or not there."""

import os
from pathlib import Path

from torch import Tensor


def safetensors():
    """The package. Raises: ModuleNotFoundError that says what to do."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("checkpoints need safetensors: pip install safetensors") from error
    return safetensors


class Reader:
    """The tensors of one or several files by name. Memory-mapped: on a CPU a tensor is read when its values are."""

    def __init__(self, paths: list[Path], device: str = "cpu"):
        """Raises: FileNotFoundError; ValueError, a file is none of safetensors, is cut off, or repeats a name."""
        package = safetensors()
        self.metadata: dict[str, str] = {}
        self._files = {}
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: there is no such file")
            try:
                file = package.safe_open(path, framework="pt", device=device)
            except (package.SafetensorError, OSError) as error:
                raise ValueError(f"{path}: no safetensors file, or not all of one: {error}") from error
            self.metadata.update(file.metadata() or {})
            for name in file.keys():  # noqa: SIM118, it is no dict
                if name in self._files:
                    raise ValueError(f"{path}: has {name}, which another file has too")
                self._files[name] = file

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file beside `path` first, and put it there when it is whole."""
    package = safetensors()
    part = path.with_name(path.name + ".part")
    try:
        package.torch.save_file(tensors, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
