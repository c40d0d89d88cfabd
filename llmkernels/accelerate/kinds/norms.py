"""LayerNorm and RMSNorm of torch, and RMS norms as models write them, found by what they are made of."""

from collections.abc import Callable
from numbers import Real

from torch import Tensor, nn

from llmkernels import functional
from llmkernels.accelerate.candidate import Candidate, Found, original_forward

EPS_NAMES = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "rms_norm_eps")


def recognise(module: nn.Module) -> Found:
    if type(module).forward is nn.LayerNorm.forward:
        return [Candidate("layer_norm", "layer_norm", tuple(module.normalized_shape), layer_norm)], ""
    if type(module).forward is nn.RMSNorm.forward:
        return [Candidate("rms_norm", "rms_norm", tuple(module.normalized_shape), rms_norm)], ""
    found = _structural(module)
    named = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or "norm" in type(module).__name__.lower()
    is_norm = found[0] or (named and not list(module.children()) and not isinstance(module, _OTHER_NORMS))
    return found if is_norm else None


# Norms over other dimensions than the last ones, which nobody expects to be swapped.
_OTHER_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)


def layer_norm(module, input: Tensor, backend: str | None) -> Tensor:
    return functional.layer_norm(
        input, module.normalized_shape, module.weight, module.bias, module.eps, backend=backend
    )


def rms_norm(module, input: Tensor, backend: str | None) -> Tensor:
    return functional.rms_norm(input, module.normalized_shape, module.weight, module.eps, backend=backend)


def add_layer_norm(module, input: Tensor, residual: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return functional.add_layer_norm(
        input, residual, module.normalized_shape, module.weight, module.bias, module.eps, backend=backend
    )


def add_rms_norm(module, input: Tensor, residual: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    return functional.add_rms_norm(input, residual, module.normalized_shape, module.weight, module.eps, backend=backend)


class _StructuralRMSNorm:
    """rms_norm over the last dimension with the module's `weight` and the eps found under `eps_name`."""

    def __init__(self, eps_name: str, weight_offset: float):
        self.eps_name, self.weight_offset = eps_name, weight_offset

    def __call__(self, module, input: Tensor, backend: str | None) -> Tensor:
        weight = module.weight
        if weight.dtype.itemsize == 2 and input.dtype != weight.dtype:  # T5's converts such an input, Llama's does not
            return original_forward(module)(module, input)
        shape, eps, offset = self._settings(module)
        return functional.rms_norm(input, shape, weight, eps, weight_offset=offset, backend=backend)

    def add(self, module, input: Tensor, residual: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
        """For an input and a residual of one shape and dtype."""
        shape, eps, offset = self._settings(module)
        return functional.add_rms_norm(
            input, residual, shape, module.weight, eps, weight_offset=offset, backend=backend
        )

    def _settings(self, module) -> tuple:
        return tuple(module.weight.shape), getattr(module, self.eps_name), self.weight_offset


def with_residual(run: Callable | None) -> Callable | None:
    """Of the forward of a swapped norm that of `norm(input + residual)` and the sum; None: it has none."""
    return run.add if isinstance(run, _StructuralRMSNorm) else _ADDING.get(run)


_ADDING = {layer_norm: add_layer_norm, rms_norm: add_rms_norm}


def _structural(module: nn.Module) -> tuple[list[Candidate], str]:
    """RMS norms as Hugging Face models write them: one `weight`, an eps, no other state."""
    parameters = dict(module.named_parameters())
    if set(parameters) != {"weight"} or parameters["weight"].dim() != 1:
        return [], f"not a known norm: parameters {sorted(parameters) or 'none'}, expected one 1-D weight"
    if list(module.children()) or list(module.buffers()):
        return [], "not a known norm: it has buffers or submodules"
    names = [name for name in EPS_NAMES if isinstance(getattr(module, name, None), Real)]
    if len(names) != 1:
        return [], f"not a known norm: eps attributes {names or 'none'}, expected one of {', '.join(EPS_NAMES)}"
    shape = tuple(parameters["weight"].shape)
    return [
        Candidate("rms_norm", "rms_norm (weight)", shape, _StructuralRMSNorm(names[0], 0.0)),
        Candidate("rms_norm", "rms_norm (1 + weight)", shape, _StructuralRMSNorm(names[0], 1.0)),
    ], ""
