"""What accelerate sets on models of Hugging Face's transformers through the interfaces that they have.

Transformers is never imported here unless a model comes from it.
"""

import sys

from torch import nn


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a PreTrainedModel of transformers."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def has_pretrained(model: nn.Module) -> bool:
    """Whether there is one anywhere in a model."""
    return "transformers.modeling_utils" in sys.modules and any(map(is_pretrained, model.modules()))
