"""What is a linear layer: torch.nn.Linear, and transformers' Conv1D (GPT-2), whose weight is `[in, out]`."""

from torch import nn

CONV1D = ("transformers.pytorch_utils", "Conv1D")  # by name: transformers need not be installed


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The class whose `forward` makes a module a linear layer, or None."""
    if isinstance(module, nn.Linear):
        return nn.Linear
    return next((each for each in type(module).__mro__ if (each.__module__, each.__name__) == CONV1D), None)


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, quantized or not."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def as_linear(module: nn.Module) -> nn.Linear:
    """The torch.nn.Linear that computes what a linear layer does: itself, or one with its weight transposed (a copy)
    and its bias."""
    if isinstance(module, nn.Linear):
        return module
    linear = nn.Linear(*features(module), bias=False, device="meta").train(module.training)
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=False)
    linear.bias = module.bias
    return linear
