"""nn.QuantizedEmbedding: an embedding whose table is quantized; only the rows that are asked for are written out."""

import torch
from torch import Tensor, nn

from llmkernels._dtypes import FLOAT_DTYPES, dtype_error
from llmkernels.ops.quantized_linear.module import QuantizedModule, _not_meta, format_options
from llmkernels.ops.quantized_linear.reference import FORMATS
from llmkernels.quantization import SCHEMES, fp8, nf4
from llmkernels.quantization.tensor import QuantizedTensor, empty_tensor, quantize_tensor

INDEX_DTYPES = (torch.int64, torch.int32)


class QuantizedEmbedding(QuantizedModule):
    """torch.nn.Embedding with a quantized table, which is frozen.

    Made by `from_embedding`, or the constructor and `load_state_dict`. Buffers are named as QuantizedLinear's. Rows
    come out in `dtype`, which follows the conversions of the module.

    Args:
        num_embeddings, embedding_dim, padding_idx: as torch's. `padding_idx` says which row takes no gradient; here
            none does.
        scheme: "int8", "int4", "nf4" or "fp8".
        group_size, options: as QuantizedLinear's.
    Raises: ValueError or TypeError, an unknown scheme or option, or `padding_idx` outside of the table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scheme: str = "int8",
        *,
        group_size: int | None = None,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        if padding_idx is not None:
            if not -num_embeddings <= padding_idx < num_embeddings:
                raise ValueError(
                    f"QuantizedEmbedding: padding_idx is {padding_idx}, expected one of {num_embeddings} rows"
                )
            padding_idx %= num_embeddings
        self.padding_idx = padding_idx
        options = format_options("QuantizedEmbedding", scheme, group_size, options)
        if SCHEMES[scheme][1]:
            names = ", ".join(FORMATS)
            raise ValueError(
                f"QuantizedEmbedding: scheme is {scheme!r}, expected one of {names}: it has no activations"
            )
        self._hold(empty_tensor((num_embeddings, embedding_dim), scheme, device, **options))
        self._set_dtype(dtype or torch.get_default_dtype())

    def _set_dtype(self, dtype: torch.dtype) -> None:
        # Conversions of the module find it and convert it. It is never on the meta device, from which nothing is moved.
        self.register_buffer("_rows_dtype", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that come out."""
        return self._rows_dtype.dtype

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, scheme: str, *, group_size: int | None = None, name: str = "weight", **options
    ) -> "QuantizedEmbedding":
        """The quantized form of a torch.nn.Embedding, in the same mode.

        Raises: TypeError, it is no Embedding; ValueError, it has max_norm, which would change the table, its weight has
            a NaN or an infinity, or is on the meta device.
        """
        if not isinstance(embedding, nn.Embedding):
            got = type(embedding).__name__
            raise TypeError(f"QuantizedEmbedding: embedding is a {got}, expected a torch.nn.Embedding")
        if embedding.max_norm is not None:
            raise ValueError(f"QuantizedEmbedding: embedding has max_norm={embedding.max_norm}, expected None")
        _not_meta("QuantizedEmbedding", embedding.weight)
        options = format_options("QuantizedEmbedding", scheme, group_size, options)
        weight = quantize_tensor(embedding.weight.detach(), scheme, name, **options)
        return cls.from_tensor(weight, embedding.padding_idx, embedding.weight.dtype).train(embedding.training)

    @classmethod
    def from_tensor(
        cls, weight: QuantizedTensor, padding_idx: int | None = None, dtype: torch.dtype | None = None
    ) -> "QuantizedEmbedding":
        """The embedding of a QuantizedTensor, whose tensors it takes as they are; rows come out in `dtype`.

        Raises: ValueError, it has activations, or columns in another order.
        """
        if weight.order is not None:
            raise ValueError("QuantizedEmbedding: weight has an order of its columns, expected none")
        if weight.activations:
            names = ", ".join(FORMATS)
            raise ValueError(
                f"QuantizedEmbedding: scheme is {weight.scheme!r}, expected one of {names}: it has no activations"
            )
        made = cls(*weight.shape, padding_idx, device="meta", dtype=dtype)
        made._hold(weight)
        return made

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype not in INDEX_DTYPES:
            got, expected = input.dtype, " or ".join(map(str, INDEX_DTYPES))
            raise TypeError(f"QuantizedEmbedding: input has dtype {got}, expected {expected}")
        if self.dtype not in FLOAT_DTYPES:
            raise dtype_error("QuantizedEmbedding", "dtype", self.dtype)
        return self._rows(input.flatten()).view(*input.shape, self.embedding_dim)

    def _rows(self, index: Tensor) -> Tensor:
        """The rows of the table at `index` `[M]`: `[M, K]`."""
        format, group_size, _ = self._kind
        scales, zeros, second = self.weight_scales, self.weight_zeros, self.weight_second_scales
        # torch selects no fp8.
        data = self.weight.view(torch.uint8).index_select(0, index).view(self.weight.dtype)
        if format == "fp8" and group_size:
            wide = torch.float64 if self.dtype == torch.float64 else torch.float32
            spread = scales.index_select(0, index // fp8.BLOCK).repeat_interleave(fp8.BLOCK, 1)[:, : data.shape[1]]
            return (data.to(wide) * spread.to(wide)).to(self.dtype)
        rows = scales.index_select(0, index)
        if second is not None:
            groups = torch.arange(scales.shape[1], device=index.device)
            steps = second[1:][(index[:, None] * len(groups) + groups) // nf4.SECOND]
            rows = second[0] + steps * rows.float()
        zeros = None if zeros is None else zeros.index_select(0, index)
        shape = (len(index), self.embedding_dim)
        found = QuantizedTensor(format, shape, data, rows, torch.float32, zeros, None, group_size or None)
        return FORMATS[format].dequantize(found, self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._described()}"
