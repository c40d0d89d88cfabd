"""How every op becomes differentiable in all of torch's ways.

Nothing needs a gradient: the kernel is called. Ordinary autograd: an old-style Function (the cheapest kind) around the
kernels. torch.func transforms and forward-mode AD: the reference itself, plain PyTorch operations that every transform
knows. Double backward (create_graph=True): the gradient of the reference, which can be differentiated again.
"""

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

_functorch_active = torch._C._are_functorch_transforms_active


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - half the time of any(), and every call pays it
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def transform_active() -> bool:
    """Whether a torch.func transform (grad, vmap, ...) or forward-mode AD surrounds this call.

    Kernels have neither tangents nor batching rules, so only plain PyTorch may run: a missing tangent would
    otherwise be a silent zero.
    """
    return _functorch_active() or forward_ad._current_level >= 0


def is_differentiated() -> bool:
    """In a backward: whether it is itself recorded (create_graph=True). A compiler records no second order."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable_backward(
    reference: Callable, tensors: Sequence[torch.Tensor | None], grads: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Gradients of `reference(*tensors)` that can themselves be differentiated (create_graph=True).

    Each input is seen through a view of its own: were one tensor passed twice, `autograd.grad` would otherwise
    return the sum of both gradients for each of them.
    """
    with torch.enable_grad():
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]
        outputs = reference(*views)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
        wanted = [view for view in views if view is not None and view.requires_grad]
        found = torch.autograd.grad(
            [out for out, _ in pairs], wanted, [grad for _, grad in pairs], create_graph=True, allow_unused=True
        )
    by_view = dict(zip(map(id, wanted), found, strict=True))
    return [None if view is None else by_view.get(id(view)) for view in views]
