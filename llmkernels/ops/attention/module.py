"""MultiheadAttention as a module: torch's constructor, arguments and state_dict around the fused attention."""

import math

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels import _random
from llmkernels._dtypes import accumulate_dtype, without_autocast
from llmkernels.ops.attention.op import attend
from llmkernels.ops.attention.reference import Options
from llmkernels.ops.attention.sdpa import autocast

NAME = "MultiheadAttention"


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention run by llmkernels: same constructor, same state_dict, same call.

    `backend` forces a backend. With `need_weights=False` nothing of the size of the scores is made, but masks as large
    as those that are given. With `need_weights=True`, torch's default, plain PyTorch computes the weights beside the
    fused output, which costs more than that: ask for them only where they are used.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ):
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"{NAME}: embed_dim is {embed_dim}, expected a positive multiple of {num_heads} heads")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{NAME}: dropout is {dropout}, expected a probability between 0 and 1")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's.

        Args:
            query: `[L, N, E]`, `[N, L, E]` with batch_first, or `[L, E]`.
            key, value: `[S, N, kdim]` and `[S, N, vdim]` (or batch first, or without N).
            key_padding_mask: `[N, S]` (`[S]`): boolean (True is hidden), or added to the scores.
            need_weights: also return the weights, after dropout.
            attn_mask: `[L, S]` or `[N * H, L, S]`: boolean (True is hidden), or added to the scores.
            average_attn_weights: weights `[N, L, S]`, the mean over heads; else `[N, H, L, S]`.
            is_causal: a hint that attn_mask, which has to be given, is the causal mask: it is then not read where there
                is no key_padding_mask and no weights are wanted.
        Returns: (output in the layout of query, weights or None). A query all of whose keys are hidden attends to
            nothing: its output is the projection of zeros, where torch's may be NaN.
        Raises: ValueError or TypeError, shapes, dtypes or hints disagree; NoBackendError, a forced backend cannot run
            this call (the message says why).
        Reference: Vaswani et al. 2017, arXiv:1706.03762.
        """
        return multihead_attention(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal,
            backend=self.backend,
        )  # fmt: skip


def multihead_attention(
    module: torch.nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False, *, backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """MultiheadAttention.forward with the parameters and settings of a torch.nn.MultiheadAttention."""
    is_batched = query.dim() == 3
    batch_first = module.batch_first and is_batched
    batch, queries, keys = _check(module, query, key, value, key_padding_mask, attn_mask, is_causal)
    if is_causal and key_padding_mask is None and not need_weights:
        attn_mask = None
    else:
        is_causal = False
    q, k, v = _projected(module, query, key, value)
    if module.bias_k is not None:
        k, v = _appended(k, module.bias_k, batch_first), _appended(v, module.bias_v, batch_first)
    q, k, v = (_heads(x, module.num_heads, is_batched, batch_first) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = (torch.cat((x, x.new_zeros(*x.shape[:2], 1, x.shape[3])), 2) for x in (k, v))
    mask = _mask(key_padding_mask, attn_mask, (batch, module.num_heads, queries, keys), k.shape[2] - keys, query.dtype)
    q, k, v, mask = autocast(q, k, v, mask)
    dropout = module.dropout if module.training else 0.0
    seed = _random.draw_seed(q.device) if dropout > 0.0 else None
    options = Options(1.0 / math.sqrt(module.head_dim), -1, 0 if is_causal else -1, True, 0.0, dropout)
    out = attend(
        "scaled_dot_product_attention", q, k, v, mask, None, None, seed, None, None, queries, k.shape[2], options,
        False, backend,
    )  # fmt: skip
    out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
    out = torch_functional.linear(out, module.out_proj.weight, module.out_proj.bias)
    weights = _weights(q, k, mask, seed, options) if need_weights else None
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not is_batched:
        return out[:, 0], None if weights is None else weights[0]
    return out, weights


def _check(module, query, key, value, key_padding_mask, attn_mask, is_causal) -> tuple[int, int, int]:
    """(N, L, S), if everything fits."""
    dims = query.dim()
    for name, tensor, width in (
        ("query", query, module.embed_dim),
        ("key", key, module.kdim),
        ("value", value, module.vdim),
    ):
        if tensor.is_nested:
            raise TypeError(f"{NAME}: {name} is a nested tensor, expected a padded one with its key_padding_mask")
        if tensor.dim() != dims or dims not in (2, 3) or tensor.shape[-1] != width:
            shape = ("length",) if dims == 2 else ("batch", "length") if module.batch_first else ("length", "batch")
            expected = ", ".join((*shape, str(width)))
            raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected ({expected})")
    if value.shape[:-1] != key.shape[:-1]:
        raise ValueError(
            f"{NAME}: value has shape {tuple(value.shape)}, expected {tuple(key.shape[:-1])} before its width, as key"
        )
    length = 1 if dims == 3 and module.batch_first else 0
    batch = query.shape[1 - length] if dims == 3 else 1
    queries, keys = query.shape[length], key.shape[length]
    if dims == 3 and key.shape[1 - length] != batch:
        raise ValueError(f"{NAME}: key has shape {tuple(key.shape)}, expected a batch of {batch}, as query has")
    _check_mask("key_padding_mask", key_padding_mask, query, [(batch, keys) if dims == 3 else (keys,)])
    _check_mask("attn_mask", attn_mask, query, [(queries, keys), (batch * module.num_heads, queries, keys)])
    if is_causal and attn_mask is None:
        raise ValueError(f"{NAME}: is_causal=True is a hint about attn_mask, which is None, expected the causal mask")
    return batch, queries, keys


def _check_mask(name: str, mask: Tensor | None, query: Tensor, shapes: list[tuple[int, ...]]) -> None:
    if mask is None:
        return
    if mask.device != query.device:
        raise ValueError(f"{NAME}: {name} is on {mask.device}, expected {query.device}, the device of query")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"{NAME}: {name} has dtype {mask.dtype}, expected bool or a floating type")
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{NAME}: {name} has shape {tuple(mask.shape)}, expected {' or '.join(map(str, shapes))}")


def _projected(module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in-projections, as few products as there are different inputs."""
    bias = module.in_proj_bias
    if module.in_proj_weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        return tuple(map(torch_functional.linear, (query, key, value), weights, biases))
    if query is key and key is value:
        return torch_functional.linear(query, module.in_proj_weight, bias).chunk(3, -1)
    width = module.embed_dim
    split = lambda x: (None, None) if x is None else x.split((width, 2 * width))
    (q_weight, kv_weight), (q_bias, kv_bias) = split(module.in_proj_weight), split(bias)
    q = torch_functional.linear(query, q_weight, q_bias)
    if key is value:
        return (q, *torch_functional.linear(key, kv_weight, kv_bias).chunk(2, -1))
    biases = (None, None) if kv_bias is None else kv_bias.chunk(2)
    return (q, *map(torch_functional.linear, (key, value), kv_weight.chunk(2), biases))


def _appended(x: Tensor, bias: Tensor, batch_first: bool) -> Tensor:
    """One more key, the same for each sequence; `bias` [1, 1, E]."""
    if x.dim() == 2:
        return torch.cat((x, bias[0]))
    sizes = (x.shape[0], 1) if batch_first else (1, x.shape[1])
    return torch.cat((x, bias.expand(*sizes, -1)), 1 if batch_first else 0)


def _heads(x: Tensor, heads: int, is_batched: bool, batch_first: bool) -> Tensor:
    """[N, heads, length, head_dim], a view."""
    x = (x if is_batched else x[:, None]).unflatten(-1, (heads, -1))
    return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)


def _mask(padding: Tensor | None, mask: Tensor | None, sizes: tuple, extra: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one of four dimensions as scaled_dot_product_attention reads it; all see the `extra` keys."""
    batch, heads, queries, keys = sizes
    if padding is not None:
        padding = padding.reshape(batch, 1, 1, keys)
    if mask is not None:
        mask = mask.reshape(1, 1, queries, keys) if mask.dim() == 2 else mask.reshape(batch, heads, queries, keys)
    given = [each for each in (padding, mask) if each is not None]
    if not given:
        return None
    if all(each.dtype == torch.bool for each in given):
        seen = ~(given[0] if len(given) == 1 else given[0] | given[1])
        return torch.nn.functional.pad(seen, (0, extra), value=True) if extra else seen
    added = sum(_additive(each, dtype) for each in given)
    return torch.nn.functional.pad(added, (0, extra)) if extra else added


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    return mask if mask.dtype in (dtype, torch.float32) else mask.to(dtype)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, seed: Tensor | None, options: Options) -> Tensor:
    """The weights of the fused product after dropout, [N, H, L, S] in the dtype of q, by plain PyTorch."""
    acc = accumulate_dtype(q.dtype)
    with without_autocast(q.device):
        scores = (q.to(acc) @ k.to(acc).transpose(-1, -2)) * options.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        empty = (scores == -torch.inf).all(-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    else:
        weights = torch.softmax(scores, -1)
    if seed is not None:
        batch, heads, rows, keys = weights.shape
        numbers = torch.arange(batch * heads * rows, device=q.device).view(batch, heads, rows, 1)
        keep = _random.keep(seed, numbers, torch.arange(keys, device=q.device), options.dropout_p)
        weights = torch.where(keep, weights / max(1.0 - options.dropout_p, 1e-30), 0.0)
    return weights.to(q.dtype)
