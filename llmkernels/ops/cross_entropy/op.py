"""cross_entropy: schemas, fakes, argument checks, autograd, backend order. linear_op.py builds on it."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, autocast_dtype, dtype_error
from llmkernels.ops.cross_entropy import reference
from llmkernels.ops.cross_entropy.reference import Settings

REDUCTIONS = ("none", "mean", "sum")
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)

# --- raw ops: rows of logits, the loss of each row --------------------------------------------------------------------

_SETTINGS = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def _fwd_fake(input, target, weight, dloss, *settings):
    acc = accumulate_dtype(input.dtype)
    rows = input.shape[0]
    dinput = input.new_empty(0 if dloss is None else input.shape)
    return input.new_empty(rows, dtype=acc), input.new_empty((3, rows), dtype=acc), dinput


def _bwd_fake(dloss, input, target, weight, stats, *settings):
    return input.new_empty(input.shape)


def _portable_fwd(input, target, weight, dloss, *settings):
    return registry.pick("cross_entropy", (input, target, weight)).fwd(input, target, weight, dloss, *settings)


def _portable_bwd(dloss, input, target, weight, stats, *settings):
    return registry.pick("cross_entropy", (input, target, weight)).bwd(dloss, input, target, weight, stats, *settings)


_op.define_kernel(
    "cross_entropy_fwd",
    f"(Tensor input, Tensor target, Tensor? weight, Tensor? dloss, {_SETTINGS})"
    " -> (Tensor loss, Tensor stats, Tensor dinput)",
    _fwd_fake,
    _portable_fwd,
)
_op.define_kernel(
    "cross_entropy_bwd",
    f"(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor stats, {_SETTINGS}) -> Tensor",
    _bwd_fake,
    _portable_bwd,
)
_op.lazy_triton("llmkernels.ops.cross_entropy.triton_kernels", ("cross_entropy_fwd", "cross_entropy_bwd"))

# --- autograd -------------------------------------------------------------------------------------------------------


def arriving(grad: Tensor, divisor: Tensor | float | None, reduction: str, rows: int, acc: torch.dtype) -> Tensor:
    """`[rows]`: the gradient at the loss of each row, from the one at the result."""
    grad = grad.to(acc)
    if reduction == "mean":
        grad = grad / divisor
    return grad if reduction == "none" else grad.expand(rows)


class CrossEntropyFunction(torch.autograd.Function):
    """apply(input, target, weight, divisor, reduction, settings, dtype, chosen) -> loss, of type `dtype`.

    `input` is `[rows, C]`, `target` `[rows]` (int64) or `[rows, C]`, `weight` `[C]` in the type of sums; `divisor` that
    of a mean; `settings` a `reference.Settings`; `chosen` names the backend of both directions. The gradient is
    computed when it arrives, from the logits and three numbers of each row: on a CPU as fast as in the forward's pass
    (4,096 x 32,000, one thread of a Zen 5: 45.4 ms against 43.6 in fp32, 37.5 against 37.9 in bf16), and a second
    tensor of the size of the logits is not kept, nor rounded before it is scaled.
    """

    @staticmethod
    def forward(ctx, input, target, weight, divisor, reduction, settings, dtype, chosen):
        fwd = registry.entry("cross_entropy", chosen).fwd
        loss, stats, _ = fwd(input, target, weight, None, *settings)
        is_tensor = isinstance(divisor, Tensor)
        ctx.save_for_backward(input, target, weight, stats, divisor if is_tensor else None)
        ctx.settings = (reduction, settings, dtype, chosen, None if is_tensor else divisor)
        return reference.reduced(loss, divisor, reduction).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        input, target, weight, stats, divisor = ctx.saved_tensors
        reduction, settings, dtype, chosen, rows = ctx.settings
        dinput = dtarget = None
        if is_differentiated():
            formula = lambda input, target: reference.cross_entropy(input, target, weight, reduction, settings, dtype)
            dinput, dtarget = differentiable_backward(formula, (input, target), (grad,))
        else:
            divisor = rows if divisor is None else divisor
            dloss = arriving(grad, divisor, reduction, input.shape[0], stats.dtype)
            if ctx.needs_input_grad[0]:
                bwd = registry.entry("cross_entropy", chosen).bwd
                dinput = bwd(dloss, input, target, weight, stats, *settings)
            if ctx.needs_input_grad[1]:
                dtarget = reference.cross_entropy_dtarget(dloss, input, target, weight, stats, settings)
        return dinput, dtarget, None, None, None, None, None, None


# --- arguments ------------------------------------------------------------------------------------------------------


def check_options(op: str, reduction: str, label_smoothing: float, z_loss: float, softcap: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction is {reduction!r}, expected 'none', 'mean' or 'sum'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected a number from 0 to 1")
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"{op}: z_loss is {z_loss}, expected a number that is not negative")
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive number, or 0 for none")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, name, tensor.dtype)


def check_place(op: str, name: str, tensor: Tensor, shape: tuple, device: torch.device, what: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}, {what}")
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}, the device of input")


def prepared_target(op: str, target: Tensor, batch: tuple, probabilities: tuple, input: Tensor, ignore: int) -> Tensor:
    """`target`, int64 if it is class indices, after checks of its shape and, where that costs no wait, its values.

    `batch` is the shape of indices, `probabilities` that of probabilities.
    """
    if target.is_floating_point():
        check_float(op, "target", target)
        check_place(op, "target", target, probabilities, input.device, "the shape of the logits, for probabilities")
        if ignore >= 0:
            raise ValueError(f"{op}: ignore_index is {ignore}, expected a negative one with probabilities as target")
        acc = accumulate_dtype(input.dtype)
        return target if target.dtype == input.dtype else target.to(acc)
    if target.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"{op}: target has dtype {target.dtype}, expected int64, int32 or uint8 for class indices, or probabilities"
        )
    check_place(op, "target", target, batch, input.device, "the shape of input without its classes")
    return target.long()


def check_indices(op: str, target: Tensor, classes: int, ignore_index: int) -> bool:
    """Name the first index that is no class; False: none is to be ignored.

    On a GPU looking would wait for it: there the loss is NaN instead, and the answer True.
    """
    # Tensors that only stand for others (compilation, transforms) have no values to look at.
    plain = type(target) in (Tensor, torch.nn.Parameter)
    if not plain or not target.is_cpu or not target.numel() or torch.compiler.is_compiling() or transform_active():
        return True
    lowest, highest = (bound.item() for bound in torch.aminmax(target))
    if lowest >= 0 and highest < classes:
        return lowest <= ignore_index <= highest
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise IndexError(
            f"{op}: target is {target[where].item()} at position {where},"
            f" expected 0 to {classes - 1}, or {ignore_index}, the ignore_index"
        )
    return True


def mean_divisor(target: Tensor, weight: Tensor | None, reduction: str, settings: Settings, may_ignore: bool):
    """What the sum of the losses of `target`, `[rows]` or `[rows, C]`, is divided by; None where it is not a mean."""
    if reduction != "mean":
        return None
    if weight is None and not may_ignore:
        return float(target.shape[0])
    return reference.denominator(target, weight, target.shape[0], settings.ignore_index)


def prepared_weight(op: str, weight: Tensor | None, classes: int, input: Tensor) -> Tensor | None:
    """Class weights in the type of sums."""
    if weight is None:
        return None
    check_float(op, "weight", weight)
    check_place(op, "weight", weight, (classes,), input.device, "one number for each class")
    if weight.requires_grad:
        raise ValueError(f"{op}: weight requires a gradient, which class weights have not here; detach it")
    return weight.to(accumulate_dtype(input.dtype))


# --- the public function --------------------------------------------------------------------------------------------


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.cross_entropy in one pass over the logits, and one for their gradient.

    Args:
        input: logits, `[C]`, `[N, C]` or `[N, C, d1, ...]`, fp64, fp32, bf16 or fp16, any strides. Classes that are not
            the last dimension are moved there, which copies.
        target: class indices, `[]`, `[N]` or `[N, d1, ...]`, int64, int32 or uint8; or probabilities of the shape of
            `input`, of its dtype or wider, which may have a gradient.
        weight: `[C]`, class weights; they get no gradient.
        ignore_index: rows with this index have loss and gradient zero and do not count in the mean; probabilities have
            none, and only a negative one is accepted with them.
        reduction: "none" | "mean" | "sum"; the mean divides by the weight of all targets, as torch's does.
        label_smoothing: in [0, 1].
        z_loss: adds `z_loss * logsumexp^2` to the loss of each row that is not ignored, before the reduction and
            whatever its class weight: with "mean" it is divided by what the loss is divided by.
        softcap: logits become `softcap * tanh(input / softcap)` first; 0: they stay.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: the loss in the dtype of `input` (under autocast fp32), summed in fp32 (fp64 for fp64) and rounded once.
        The backward reads the logits again; neither direction changes them.
    Raises: ValueError or TypeError, shapes, devices, dtypes or options do not fit; IndexError, an index on the CPU is
        no class (on a GPU, and in compiled code, the loss and the gradient of its row are NaN); NoBackendError, a
        forced backend cannot run this call (the message says why).
    Reference: Szegedy et al. 2015, arXiv:1512.00567 (smoothing); Chowdhery et al. 2022, arXiv:2204.02311 (z-loss);
        Gemma Team 2024, arXiv:2408.00118 (softcap).
    """
    op = "cross_entropy"
    check_options(op, reduction, label_smoothing, z_loss, softcap)
    check_float(op, "input", input)
    axis = 1 if input.dim() > 1 else 0
    if input.dim() == 0 or input.shape[axis] == 0:
        raise ValueError(
            f"{op}: input has shape {tuple(input.shape)}, expected [N, C, ...] or [C] with a class or more"
        )
    classes = input.shape[axis]
    batch = (*input.shape[:axis], *input.shape[axis + 1 :])
    target = prepared_target(op, target, batch, tuple(input.shape), input, ignore_index)
    is_index = not target.is_floating_point()
    may_ignore = is_index and check_indices(op, target, classes, ignore_index)
    weight = prepared_weight(op, weight, classes, input)
    rows = _as_rows(input, axis, classes)
    target = target.reshape(-1) if is_index else _as_rows(target, axis, classes)
    dtype = accumulate_dtype(input.dtype) if autocast_dtype(input.device) else input.dtype
    settings = Settings(ignore_index, label_smoothing, z_loss, softcap)
    loss = of_rows(rows, target, weight, reduction, settings, dtype, backend, may_ignore)
    return loss.view(batch) if reduction == "none" else loss


def _as_rows(tensor: Tensor, axis: int, classes: int) -> Tensor:
    return tensor.reshape(-1, classes) if axis == tensor.dim() - 1 else tensor.movedim(axis, -1).reshape(-1, classes)


def of_rows(rows, target, weight, reduction, settings, dtype, backend, may_ignore):
    chosen = registry.pick("cross_entropy", (rows, target, weight), backend)
    if chosen.name == "torch" and transform_active():
        return reference.cross_entropy(rows, target, weight, reduction, settings, dtype)
    divisor = mean_divisor(target, weight, reduction, settings, may_ignore)
    if needs_grad(rows, target):
        return CrossEntropyFunction.apply(rows, target, weight, divisor, reduction, settings, dtype, chosen.name)
    loss, _, _ = chosen.fwd(rows, target, weight, None, *settings)
    return reference.reduced(loss, divisor, reduction).to(dtype)


# --- backends, best first -------------------------------------------------------------------------------------------

_RAW = ("cross_entropy_fwd", "cross_entropy_bwd", reference.cross_entropy_fwd, reference.cross_entropy_bwd)
registry.register("cross_entropy", *_op.backends("cross_entropy", *_RAW))
registry.register("linear_cross_entropy", *_op.backends("linear_cross_entropy", *_RAW))

_op.define_public(
    "cross_entropy",
    '(Tensor input, Tensor target, Tensor? weight=None, int ignore_index=-100, str reduction="mean",'
    " float label_smoothing=0.0, *, float z_loss=0.0, float softcap=0.0) -> Tensor",
    cross_entropy,
)
