"""Scales of a linear layer's input, found on data, that lower the error of its outputs.

    y  =  x W^T  =  (x / s) (W s)^T             s `[K]`, one for each column

Columns whose inputs are large matter most. Multiplied by s > 1 they are rounded to finer steps, relative to their size,
at the cost of the others in their group. s = size^alpha of the inputs' mean size, for the alpha of 0, 0.1 ... 1 with
the least error of y on samples of x; what the layer keeps is 1 / s, as `input_scale`, and the rounded W s. Where
activations are rounded too, smaller inputs of large columns are easier on them, and largest sizes are tried beside mean
ones. int4 moreover chooses the scales of its groups by the error of y, not of W: each column counts by its inputs.

References: Lin et al. 2023, arXiv:2306.00978 (AWQ); Xiao et al. 2022, arXiv:2211.10438 (SmoothQuant).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels.ops.quantized_linear.module import QuantizedLinear, format_options
from llmkernels.quantization import SCHEMES
from llmkernels.quantization.tensor import quantize_tensor

ROWS = 512  # of inputs kept for each layer: 8 MB with 4096 columns
CALL_ROWS = 128  # of one call, evenly spaced
ALPHAS = tuple(step / 10 for step in range(1, 11))
# Scales that gain less are not worth multiplying each input by them.
GAIN = 0.03


@torch.no_grad()
def collect(model: nn.Module, layers: dict[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    """Inputs of each of `layers` (path -> module) `[up to ROWS, K]` in fp32, while the model runs in eval mode.

    Raises: ValueError: there is no batch, none of the layers is called, or an input of one is not finite.
    """
    found: dict[str, list[Tensor]] = {}

    def keep(path: str):
        def hook(module, args, kwargs):
            x = args[0] if args else next(iter(kwargs.values()))  # it has one argument, of some name
            x = x.detach().reshape(-1, x.shape[-1])
            rows = x[:: max(1, -(-len(x) // CALL_ROWS))].float()
            if not bool(rows.isfinite().all()):
                raise ValueError(f"quantize: calibration gives {path} an input with a NaN or an infinity")
            kept = found.setdefault(path, [])
            kept.append(rows)
            if sum(map(len, kept)) >= 2 * ROWS:
                found[path] = [torch.cat(kept)[::2]]

        return hook

    handles = [module.register_forward_pre_hook(keep(path), with_kwargs=True) for path, module in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    count = 0
    try:
        model.eval()
        for batch in batches:
            count += 1
            if isinstance(batch, dict):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not count:
        raise ValueError("quantize: calibration has no batch")
    if layers and not found:
        raise ValueError(f"quantize: calibration calls none of the {len(layers)} layers")
    samples = {path: torch.cat(rows) for path, rows in found.items()}
    return {path: rows[:: -(-len(rows) // ROWS)] for path, rows in samples.items() if len(rows)}


@torch.no_grad()
def search(linear: nn.Linear, x: Tensor, scheme: str, group_size: int | None, name: str,
           options: dict) -> tuple[QuantizedLinear, tuple[float, float]]:  # fmt: skip
    """(the quantized layer, its relative errors on inputs x `[M, K]` without and with what this file does)."""
    options = dict(format_options("QuantizedLinear", scheme, group_size, options))
    weight = linear.weight.detach().float()
    truth = x @ weight.t()
    size = float(truth.norm()) or 1.0

    squares = x.square().mean(0) if SCHEMES[scheme][0] == "int4" else None

    def made(scale: Tensor | None, counted: bool = True) -> tuple[float, QuantizedLinear]:
        scaled = linear.weight.detach() if scale is None else weight * scale
        if squares is not None and counted:
            options["importance"] = squares if scale is None else squares / scale.square()
        layer = QuantizedLinear.from_tensor(quantize_tensor(scaled, scheme, name, **options), linear.bias,
                                            None if scale is None else 1.0 / scale)  # fmt: skip
        y = layer(x) - (0.0 if linear.bias is None else linear.bias.float())
        return float((y - truth).norm()) / size, layer

    without = made(None, counted=False)
    plain = best = made(None) if squares is not None else without
    sizes = [x.abs().mean(0), *([x.abs().amax(0)] if best[1].quantized_weight.activations else [])]
    for columns in sizes:
        # A column that is nearly never used must not make the scales of all others lie far apart.
        columns = columns.clamp(min=float(columns.max()) * 1e-4)
        if not bool((columns > 0.0).all()):
            continue
        for alpha in ALPHAS:
            scale = columns**alpha
            tried = made(scale / (scale.max() * scale.min()).sqrt())
            if tried[0] < best[0]:
                best = tried
    chosen = best if best[0] < (1.0 - GAIN) * plain[0] else plain
    chosen = min(chosen, without, key=lambda pair: pair[0])
    return chosen[1].train(linear.training), (without[0], chosen[0])
