"""linear_cross_entropy: the cross entropy of a linear layer's logits, a chunk of tokens at a time.

The products are torch.matmul's on every backend; what a backend brings is the cross entropy of a chunk.
"""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import accumulate_dtype, autocast_dtype, without_autocast
from llmkernels.ops.cross_entropy import op as cross_entropy_op
from llmkernels.ops.cross_entropy import reference
from llmkernels.ops.cross_entropy.heads import head_of
from llmkernels.ops.cross_entropy.op import arriving, check_float, check_place
from llmkernels.ops.cross_entropy.reference import Settings
from llmkernels.ops.quantized_linear import op as quantized_op
from llmkernels.quantization.tensor import QuantizedTensor

OP = "linear_cross_entropy"

CHUNK_ELEMENTS = 1 << 24  # logits of a chunk
CHUNK_ROWS = 64  # at least: fewer rows leave the products waiting for the weight
CLASSES = 2048  # whose gradients are summed, or rounded, at a time: what is between lies in a cache


def chunk_rows(classes: int) -> int:
    return max(CHUNK_ROWS, CHUNK_ELEMENTS // max(classes, 1))


def _chunks(rows: int, classes: int):
    """Slices of the rows. They depend on the shapes alone, so that what is wanted does not change a bit."""
    step = chunk_rows(classes)
    return [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


# --- autograd -------------------------------------------------------------------------------------------------------


class _Gradients:
    """Sums of the wanted gradients over chunks: dinput in its own type, those of the layer in the type of sums."""

    def __init__(self, input, linear_weight, linear_bias, head, wanted):
        acc = accumulate_dtype(input.dtype)
        self.head = head
        self.dinput = torch.empty_like(input) if wanted[0] else None
        self.dweight = torch.zeros_like(linear_weight, dtype=acc) if wanted[1] else None
        self.dbias = torch.zeros_like(linear_bias, dtype=acc) if wanted[2] else None

    def add(self, part: slice, dlogits: Tensor, rows: Tensor) -> None:
        if self.dinput is not None:
            self.head.dinput(dlogits, self.dinput[part])
        if self.dweight is not None:
            if rows.dtype == self.dweight.dtype:
                self.dweight.addmm_(dlogits.t(), rows)
            else:
                # A part of the classes at a time: the product, of 16 bits, is not what the sum is kept in.
                for some in range(0, dlogits.shape[1], CLASSES):
                    self.dweight[some : some + CLASSES] += dlogits[:, some : some + CLASSES].t() @ rows
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)

    def all(self) -> tuple[Tensor | None, ...]:
        return self.dinput, self.dweight, self.dbias


class LinearCrossEntropyFunction(torch.autograd.Function):
    """apply(input, linear_weight, linear_bias, target, weight, divisor, reduction, settings, dtype, chosen, frozen)
    -> loss.

    `input` is `[rows, H]`, `linear_weight` `[C, H]`, `linear_bias` `[C]`; in place of a `linear_weight` that is None
    `frozen` has the (parts, kind, backend) of a quantized one; the others are those of `CrossEntropyFunction`. With a
    mean or a sum the gradients are computed in the forward and scaled by what arrives: the logits are computed once.
    With "none" that scale differs from row to row, and the logits are computed again.
    """

    @staticmethod
    def forward(
        ctx, input, linear_weight, linear_bias, target, weight, divisor, reduction, settings, dtype, chosen, frozen
    ):
        fwd = registry.entry(OP, chosen).fwd
        wanted = ctx.needs_input_grad[:3]
        now = reduction != "none" and any(wanted) and not ctx.needs_input_grad[3]
        rows, acc = input.shape[0], accumulate_dtype(input.dtype)
        loss, stats = input.new_empty(rows, dtype=acc), input.new_empty((3, rows), dtype=acc)
        with without_autocast(input.device):
            head = head_of(linear_weight, frozen, input.shape[1])
            gradients = _Gradients(input, linear_weight, linear_bias, head, wanted if now else (False,) * 3)
            one = torch.ones((), dtype=acc, device=input.device)
            for part in _chunks(rows, head.classes):
                logits = head.logits(input[part], linear_bias)
                dloss = one.expand(logits.shape[0]) if now else None
                loss[part], stats[:, part], dlogits = fwd(logits, target[part], weight, dloss, *settings)
                if now:
                    gradients.add(part, dlogits, input[part])
        is_tensor = isinstance(divisor, Tensor)
        ctx.save_for_backward(
            input, linear_weight, linear_bias, target, weight, stats, divisor if is_tensor else None, *gradients.all()
        )
        ctx.settings = (reduction, settings, dtype, chosen, frozen, None if is_tensor else divisor, now)
        return reference.reduced(loss, divisor, reduction).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        input, linear_weight, linear_bias, target, weight, stats, divisor, *gradients = ctx.saved_tensors
        reduction, settings, dtype, chosen, frozen, rows, now = ctx.settings
        head = head_of(linear_weight, frozen, input.shape[1])
        needs = ctx.needs_input_grad
        dtarget = None
        if is_differentiated():
            formula = lambda *tensors: _formula(*tensors, weight, reduction, settings, dtype, frozen)
            tensors = (input, linear_weight, linear_bias, target)
            *gradients, dtarget = differentiable_backward(formula, tensors, (grad,))
        else:
            divisor = rows if divisor is None else divisor
            dloss = arriving(grad, divisor, reduction, input.shape[0], stats.dtype)
            if now:
                # With nothing to average the loss is NaN and, as in torch, the gradient zero.
                scale = arriving(grad, divisor, reduction, 1, stats.dtype)
                if isinstance(divisor, Tensor):
                    scale = torch.where(divisor == 0, 0.0, scale)
                elif divisor == 0.0:
                    scale = torch.zeros_like(scale)
                like = (input, linear_weight, linear_bias)
                gradients = [_scaled(t, scale, x) for t, x in zip(gradients, like, strict=True)]
            else:
                gradients, dtarget = _recomputed(
                    dloss, input, linear_weight, linear_bias, head, target, weight, stats, settings, chosen, needs
                )
                gradients = [
                    None if t is None else t.to(x.dtype)
                    for t, x in zip(gradients, (input, linear_weight, linear_bias), strict=True)
                ]
        return *gradients, dtarget, None, None, None, None, None, None, None


def _scaled(gradient: Tensor | None, scale: Tensor, like: Tensor) -> Tensor | None:
    """`gradient * scale` in the dtype of `like`, without a copy of all of it in another one."""
    if gradient is None:
        return None
    result = torch.empty(gradient.shape, dtype=like.dtype, device=gradient.device)
    for begin in range(0, gradient.shape[0], CLASSES):
        result[begin : begin + CLASSES] = gradient[begin : begin + CLASSES] * scale
    return result


def _recomputed(dloss, input, linear_weight, linear_bias, head, target, weight, stats, settings, chosen, needs):
    """The gradients from logits that are computed again."""
    bwd = registry.entry(OP, chosen).bwd
    dtarget = torch.empty_like(target) if needs[3] else None
    gradients = _Gradients(input, linear_weight, linear_bias, head, needs[:3])
    for part in _chunks(input.shape[0], head.classes):
        known = (head.logits(input[part], linear_bias), target[part], weight, stats[:, part].contiguous())
        if any(needs[:3]):
            gradients.add(part, bwd(dloss[part], *known, *settings), input[part])
        if dtarget is not None:
            dtarget[part] = reference.cross_entropy_dtarget(dloss[part], *known, settings)
    return gradients.all(), dtarget


def _formula(input, linear_weight, linear_bias, target, weight, reduction, settings, dtype, frozen):
    logits = head_of(linear_weight, frozen, input.shape[1]).formula(input, linear_bias)
    return reference.cross_entropy(logits, target, weight, reduction, settings, dtype)


# --- the public function --------------------------------------------------------------------------------------------


def _check(input: Tensor, linear_weight: Tensor | QuantizedTensor, linear_bias: Tensor | None) -> None:
    is_quantized = isinstance(linear_weight, QuantizedTensor)
    weight = None if is_quantized else linear_weight
    for name, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", linear_bias)):
        if tensor is None:
            continue
        check_float(OP, name, tensor)
        if tensor.dtype != input.dtype:
            raise TypeError(f"{OP}: {name} has dtype {tensor.dtype}, expected {input.dtype}, the dtype of input")
    if input.dim() == 0:
        raise ValueError(f"{OP}: input has shape (), expected [*, H]")
    shape = tuple(linear_weight.shape)
    if len(shape) != 2 or shape[0] == 0:
        raise ValueError(f"{OP}: linear_weight has shape {shape}, expected [C, H]")
    if shape[1] != input.shape[-1]:
        raise ValueError(f"{OP}: linear_weight has shape {shape}, expected {(shape[0], input.shape[-1])}, [C, H]")
    place = linear_weight.data if is_quantized else linear_weight
    check_place(OP, "linear_weight", place, place.shape, input.device, "[C, H]")
    if linear_bias is not None:
        check_place(OP, "linear_bias", linear_bias, shape[:1], input.device, "one number for each class")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor | QuantizedTensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy(linear(input, linear_weight, linear_bias), target)` that never holds all the logits.

    Tokens are taken in chunks of about 2^24 logits. With a mean or a sum each chunk's logits become its share of the
    gradients at once, where something wants one: only gradients that are wanted are computed (none of `linear_weight`
    if it is frozen). An exported graph has all the logits at once: the number of chunks would be frozen into it.

    Args:
        input: `[*, H]`, fp64, fp32, bf16 or fp16.
        linear_weight, linear_bias: `[C, H]` and `[C]`, of the dtype of `input`; or a quantized weight
            (`quantize_tensor`, `QuantizedLinear.quantized_weight()`), which is frozen and never written out.
        target: `[*]` class indices, or `[*, C]` probabilities.
        weight, reduction, ignore_index, label_smoothing, z_loss, softcap, backend: as `cross_entropy`.
    Returns: the loss, as `cross_entropy`. The gradient of `linear_weight` is summed over chunks in fp32 (fp64 for
        fp64).
    Raises: as `cross_entropy`.
    """
    cross_entropy_op.check_options(OP, reduction, label_smoothing, z_loss, softcap)
    to = autocast_dtype(input.device)
    if to is not None:  # as torch's linear, followed by a cross entropy in fp32
        cast = lambda t: t if t is None or t.dtype == torch.float64 else t.to(to)
        input, linear_bias = cast(input), cast(linear_bias)
        linear_weight = linear_weight if isinstance(linear_weight, QuantizedTensor) else cast(linear_weight)
    _check(input, linear_weight, linear_bias)
    classes, batch = linear_weight.shape[0], tuple(input.shape[:-1])
    target = cross_entropy_op.prepared_target(OP, target, batch, (*batch, classes), input, ignore_index)
    is_index = not target.is_floating_point()
    may_ignore = is_index and cross_entropy_op.check_indices(OP, target, classes, ignore_index)
    weight = cross_entropy_op.prepared_weight(OP, weight, classes, input)
    rows, frozen = input.reshape(-1, input.shape[-1]), None
    if isinstance(linear_weight, QuantizedTensor):
        frozen = (*quantized_op.parts_of(linear_weight, OP), backend)
        rows = rows if linear_weight.order is None else rows.index_select(1, linear_weight.order)
        linear_weight = None
    target = target.reshape(-1) if is_index else target.reshape(-1, classes)
    settings = Settings(ignore_index, label_smoothing, z_loss, softcap)
    dtype = accumulate_dtype(input.dtype) if to is not None else input.dtype
    tensors = (rows, linear_weight, linear_bias, target, weight)
    chosen = registry.pick(OP, tensors, backend)
    if chosen.name == "torch" and transform_active():
        loss = _formula(*tensors, reduction, settings, dtype, frozen)
    elif chosen.name == registry.PORTABLE:  # exporting: the number of chunks would be frozen into the graph
        logits = head_of(linear_weight, frozen, rows.shape[1]).whole(rows, linear_bias)
        loss = cross_entropy_op.of_rows(logits, target, weight, reduction, settings, dtype, backend, may_ignore)
    else:
        divisor = cross_entropy_op.mean_divisor(target, weight, reduction, settings, may_ignore)
        loss = _of_chunks(*tensors, divisor, reduction, settings, dtype, chosen, frozen)
    return loss.view(batch) if reduction == "none" else loss


def _of_chunks(rows, linear_weight, linear_bias, target, weight, divisor, reduction, settings, dtype, chosen, frozen):
    if needs_grad(rows, linear_weight, linear_bias, target):
        return LinearCrossEntropyFunction.apply(
            rows, linear_weight, linear_bias, target, weight, divisor, reduction, settings, dtype, chosen.name, frozen
        )
    head = head_of(linear_weight, frozen, rows.shape[1])
    losses = [
        chosen.fwd(head.logits(rows[part], linear_bias), target[part], weight, None, *settings)[0]
        for part in _chunks(rows.shape[0], head.classes)
    ]
    loss = torch.cat(losses) if losses else rows.new_empty(0, dtype=accumulate_dtype(rows.dtype))
    return reference.reduced(loss, divisor, reduction).to(dtype)


_op.define_public(
    OP,
    "(Tensor input, Tensor linear_weight, Tensor target, *, Tensor? linear_bias=None, Tensor? weight=None,"
    ' str reduction="mean", int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0)'
    " -> Tensor",
    linear_cross_entropy,
)
