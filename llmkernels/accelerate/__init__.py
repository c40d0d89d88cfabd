"""`accelerate(model)`: run a model's norms, gated MLPs, attention and losses by llmkernels; `restore(model)` undoes it.

kinds/ has what is recognised and what runs instead, one file a kind; huggingface/ what is set on transformers' models;
verify.py the proof, swap.py how a model is changed and changed back, session.py one run of it all.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels import registry
from llmkernels.accelerate import swap
from llmkernels.accelerate.candidate import Candidate, rule
from llmkernels.accelerate.conversion import Conversion
from llmkernels.accelerate.functional_mode import FunctionalMode
from llmkernels.accelerate.report import Report
from llmkernels.accelerate.select import Selector
from llmkernels.accelerate.session import Session
from llmkernels.accelerate.snapshot import Snapshot
from llmkernels.quantization.model import restore_quantized

__all__ = ["Candidate", "Report", "accelerate", "accelerated", "restore"]


def accelerate(
    model: nn.Module,
    *,
    quantize: str | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    verify: bool = True,
    example_inputs: Tensor | tuple | Mapping[str, Any] | None = None,
    benchmark: bool = False,
    inplace: bool = True,
) -> Report:
    """Run what llmkernels knows of `model` by llmkernels, where it is verified to agree; undone by `restore`.

    Found by what modules are made of and compute: LayerNorm, RMSNorm and what models write in their place (Llama's and
    Gemma's form), gated MLPs, GELU and SiLU, rotary embedding in attention modules, MultiheadAttention, LSTM, GRU,
    their cells, Softmax, LogSoftmax, CrossEntropyLoss; sums of a residual before these norms, in the layers around
    them; in models of Hugging Face's transformers the attention itself and the loss, through the interfaces that the
    models have; and what `@accelerate.rule(MyModule)` adds. Each replacement is first run beside the original in fp64,
    fp32 and the module's own dtype; one that disagrees in any row is refused. Modules of one class, shapes and settings
    are verified once. Dropout of attention is drawn from torch's generator, but it is not torch's bit for bit;
    that of an LSTM on the CPU is.

    Args:
        model: any module; a second call on it reports the same and changes nothing more. If anything raises, the model
            is as it was before.
        quantize: a scheme, as "int4", or a dict of the arguments of `llmkernels.quantize`, with "scheme": layers are
            quantized after all else is done, in one report. Their weights are kept for `restore`, but with
            `"keep_original": False`. With example inputs the report says how far the outputs are off then.
        dtype: floating parameters and buffers are cast to it, as `model.to(dtype)` does: Parameter objects stay. The
            tensors that they held are kept, and `restore` gives these back, bit for bit; what changed since, as in
            training, keeps its values, in the dtype of before. Floating example inputs are cast too.
        backend: force a backend for what is swapped. By default a module is left alone where nothing faster than plain
            PyTorch could run it.
        include, exclude: what may be swapped (default: all), and what not; each a path, a glob of paths (`"*.mlp"`), a
            class, a function of a path and a module, or several of these in a list. A path stands for all under it.
        verify: False swaps the first candidate of each module unseen, for a model that was verified before. What is
            told apart by trying alone (Llama's or Gemma's norm, the order of a gated unit) is still tried.
        example_inputs: arguments for the model: a tensor, a tuple, or a dict of keywords. Replacements are then also
            compared on what they are given in the model, outputs and gradients, and after all the model's outputs and
            gradients: if these disagree, nothing is swapped and the report says so. The model runs in eval mode, twice;
            what a keyword `attention_mask` hides is not compared.
        benchmark: time each replacement beside its original, in the mode that the model is in (in training with the
            backward), on the example inputs or on generated ones, and leave alone what would be slower.
        inplace: False accelerates a deep copy, which is the report's `model`.
    Returns: the report; print it.
    Raises: ValueError, unknown backend, dtype or scheme, dtype or quantize of a model in a DistributedDataParallel;
        TypeError, an argument has a wrong type; what the model raises on the example inputs, and what `quantize` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model is a {type(model).__name__}, expected a torch.nn.Module")
    if backend is not None:
        registry.checked_name(backend, "accelerate")
    model = model if inplace else copy.deepcopy(model)
    conversion = Conversion(model, dtype, quantize)
    session = Session(model, backend, include, exclude, conversion, verify=verify, benchmark=benchmark)
    before = Snapshot(model)
    try:
        return session.run(example_inputs)
    except BaseException:
        before.come_back()
        raise


def restore(model: nn.Module) -> int:
    """Undo `accelerate` and `quantize(model, keep_original=True)`: the same objects are what they were.

    Module objects get their own class back, settings and tensors what they were. Returns how many changes were undone.
    A setting that somebody changed since stays as it is.
    """
    return restore_quantized(model) + sum(swap.undo(module) for module in model.modules())


@contextlib.contextmanager
def accelerated(model: nn.Module | None = None, *, backend: str | None = None, **options) -> Iterator:
    """For the length of a `with`: a model, or without one the functions of torch.nn.functional.

    `with accelerated(model) as report:` accelerates the model, with the options of `accelerate` but for `inplace`, and
    restores it at the end, also after an exception. Modules that were accelerated before stay so.

    `with accelerated() as calls:` touches no model. Calls of torch's layer_norm, rms_norm, cross_entropy and
    scaled_dot_product_attention in the block run by llmkernels where a kernel takes them, and as ever where none does;
    for code that cannot be edited. `calls` counts them. In eager PyTorch, torch.compile and
    torch.export; other threads are not affected.

    Raises: as `accelerate`; TypeError, options without a model.
    """
    if model is None:
        if options:
            raise TypeError(f"accelerated: {', '.join(options)} without a model, expected backend alone")
        with FunctionalMode(backend) as mode:
            yield mode.calls
        return
    if "inplace" in options:
        raise TypeError("accelerated: inplace is no option here, the model itself is accelerated and restored")
    before = Snapshot(model) if isinstance(model, nn.Module) else None
    report = accelerate(model, backend=backend, **options)
    try:
        yield report
    finally:
        before.come_back()


accelerate.rule = rule
