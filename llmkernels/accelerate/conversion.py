"""`dtype=` and `quantize=` of one run: when a model is cast and quantized, and what that is said to have changed.

The replacements are verified on the cast model, as they will run; a whole model in its own dtype too, where rounding
hides less. Weights are quantized from what they were before the cast.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from llmkernels._dtypes import FLOAT_DTYPES, dtype_names
from llmkernels.accelerate import precision
from llmkernels.quantization import model as quantization
from llmkernels.quantization.report import Report as QuantizationReport


class Conversion:
    """What is asked for; `report` is that of the quantization, once it is done.

    Raises: TypeError or ValueError: an argument has a wrong type or value; a DistributedDataParallel is in the model.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, quantize: str | Mapping[str, Any] | None):
        self.model, self.dtype = model, dtype
        self.options = None if quantize is None else _options(quantize)
        self.report: QuantizationReport | None = None
        self._changed: list | None = None
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"accelerate: dtype is {dtype!r}, expected a torch.dtype or None")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise ValueError(f"accelerate: dtype is {dtype}, expected one of {dtype_names()}")
        if dtype is not None and any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
            raise ValueError("accelerate: dtype of a model with TorchScript in it; cast the module that it was made of")
        if (dtype is not None or quantize is not None) and any(
            isinstance(module, DistributedDataParallel) for module in model.modules()
        ):
            name = "dtype" if dtype is not None else "quantize"
            raise ValueError(
                f"accelerate: {name} of a model in a DistributedDataParallel, whose buckets of gradients are made for"
                " the parameters that it has; accelerate the model before it is wrapped"
            )

    def to_quantize(self) -> set[int]:
        """The ids of modules that are quantized in the end, and not swapped for that."""
        if self.options is None:
            return set()
        choice = {name: self.options[name] for name in ("filter", "embeddings", "lstms") if name in self.options}
        chosen, _ = quantization.choose(self.model, skip=self.options["skip"], **choice)
        return {id(module) for module in chosen.values()}

    def cast(self) -> None:
        if self.dtype is not None:
            self._changed = precision.cast(self.model, self.dtype)

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The model in its own dtype for the length of a block."""
        if self._changed is not None:
            precision.uncast(self._changed)
        yield
        self.cast()

    def cast_inputs(self, call: tuple[tuple, dict]) -> tuple[tuple, dict]:
        """Floating arguments in the dtype that the model takes now."""
        if self.dtype is None:
            return call
        change = lambda x: x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        return pytree.tree_map(change, call)

    def quantize(self) -> None:
        """With the weights kept, for an exception after this one to undo it."""
        if self.options is not None:
            with self.as_it_was():
                self.report = quantization.quantize(self.model, **self.options | {"keep_original": True})

    @property
    def keeps_weights(self) -> bool:
        """Whether quantized layers are to be restored one day."""
        return self.options is None or self.options.get("keep_original", True)

    def names(self) -> tuple[str | None, str | None]:
        """Of the dtype and of the scheme."""
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return dtype, None if self.options is None else self.options["scheme"]


def _options(quantize) -> dict[str, Any]:
    """The arguments of `llmkernels.quantize`. Raises: TypeError, ValueError."""
    options = {"scheme": quantize} if isinstance(quantize, str) else quantize
    if not isinstance(options, Mapping) or "scheme" not in options or "model" in options:
        raise TypeError(
            f"accelerate: quantize is {quantize!r}, expected a scheme, or a dict with 'scheme' and other arguments of"
            " llmkernels.quantize"
        )
    options = dict(options) | {"skip": options.get("skip", quantization.DEFAULT_SKIP)}
    options["skip"] = options["skip"] if isinstance(options["skip"], str) else tuple(options["skip"])
    names = inspect.signature(quantization.quantize).parameters
    of_format = {name: value for name, value in options.items() if name not in names}
    quantization.check_options(
        options["scheme"], options.get("group_size"), options["skip"], options.get("lstms", False), of_format
    )
    return options
