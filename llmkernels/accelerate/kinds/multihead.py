"""torch.nn.MultiheadAttention by the fused attention."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmkernels.accelerate.candidate import Candidate, Found
from llmkernels.ops.attention.module import multihead_attention


def recognise(module: nn.Module) -> Found:
    if type(module).forward is nn.MultiheadAttention.forward:
        op = "scaled_dot_product_attention"
        return [Candidate(op, "fused attention", (module.embed_dim,), multihead_attention, _attend)], ""
    return None


def _attend(module: nn.Module, forward: Callable, input: Tensor) -> Tensor:
    """MultiheadAttention without dropout: of itself, of other keys, with each kind of mask; outputs and weights."""
    rows = input - input.mean(-1, keepdim=True)
    rows = 2.0 * rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # scores of about one
    rows = rows.transpose(0, 1) if not module.batch_first else rows
    length = rows.shape[1 if module.batch_first else 0]
    wide = lambda width: rows.repeat(1, 1, -(-width // module.embed_dim))[..., :width]
    key, value = wide(module.kdim), wide(module.vdim)
    causal = torch.ones(length, length, dtype=torch.bool, device=input.device).triu(1)
    padding = torch.zeros(1, length, dtype=torch.bool, device=input.device)
    padding[:, length // 2 :] = True
    bias = torch.linspace(-1, 1, length * length, dtype=input.dtype, device=input.device).view(length, length)
    was_training = module.training
    module.training = False
    try:
        calls = [
            forward(rows, key, value, average_attn_weights=False),
            forward(rows, key, value, key_padding_mask=padding, need_weights=False),
            forward(rows, key, value, attn_mask=bias),
            forward(rows, key, value, attn_mask=causal, is_causal=True, need_weights=False),
        ]
    finally:
        module.training = was_training
    return torch.cat([result.flatten() for call in calls for result in call if result is not None])
