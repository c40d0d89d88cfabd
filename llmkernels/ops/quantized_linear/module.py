"""nn.QuantizedLinear, and what it shares with nn.QuantizedEmbedding: the parts of a weight as buffers of a module."""

import torch
from torch import Tensor, nn

from llmkernels.ops.norm.op import rms_norm
from llmkernels.ops.quantized_linear import norm_op
from llmkernels.ops.quantized_linear.op import _check, run
from llmkernels.quantization import SCHEMES
from llmkernels.quantization.tensor import QuantizedTensor, empty_tensor, quantize_tensor, scheme_of

# A part of a QuantizedTensor -> the buffer that holds it.
BUFFERS = {
    "data": "weight",
    "scales": "weight_scales",
    "zeros": "weight_zeros",
    "second_scales": "weight_second_scales",
    "order": "weight_order",
}
FIXED = (*BUFFERS.values(), "input_scale")  # by conversions of a module
WHOLE_ROW = -1
# The attribute with the module that a module was before `quantize(model, keep_original=True)`.
ORIGINAL = "_original"


def format_options(who: str, scheme: str, group_size: int | None, options: dict) -> dict:
    """Options of a format's `quantize`: group_size None is the format's own choice, -1 the whole row."""
    module, _ = scheme_of(who, scheme)
    if group_size is None or (group_size == WHOLE_ROW and not hasattr(module, "GROUP_SIZES")):
        return options
    return options | {"group_size": None if group_size == WHOLE_ROW else group_size}


class QuantizedModule(nn.Module):
    """A module whose buffers are the parts of one quantized weight: never converted, checked when loaded."""

    def _hold(self, weight: QuantizedTensor) -> None:
        self.scheme, self.group_size, self._shape = weight.scheme, weight.group_size, weight.shape
        self._kind = (weight.format, weight.group_size or 0, weight.activations or "")
        for part, name in BUFFERS.items():
            self.register_buffer(name, getattr(weight, part))

    def _weight(self, tensors: dict[str, Tensor | None], dtype: torch.dtype = torch.float32) -> QuantizedTensor:
        """A QuantizedTensor of this module's kind from buffers' names. Raises: ValueError, they do not fit."""
        parts = {part: tensors.get(name) for part, name in BUFFERS.items()}
        format, activations = SCHEMES[self.scheme]
        return QuantizedTensor(
            format, self._shape, group_size=self.group_size, activations=activations, dtype=dtype, **parts
        )

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The weight as `functional.quantized_linear` takes it; its tensors are the module's."""
        return self._weight(self._buffers)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight written out, `[N, K]`."""
        return self.quantized_weight.dequantize(dtype)

    def check_values(self, name: str = "weight") -> None:
        """Raises ValueError for values that quantizing never writes; for what comes from a file. `name` begins it."""
        _check_values(self.quantized_weight, name)
        _check_input_scale(type(self).__name__, self._buffers.get("input_scale"), name)

    def requires_grad_(self, requires_grad: bool = True):
        """Raises RuntimeError if True: the weight takes no gradient. False freezes the bias."""
        if requires_grad:
            raise RuntimeError(
                f"{type(self).__name__}: its weight is {self.scheme} and takes no gradient; a bias alone is trained by"
                " layer.bias.requires_grad_(), the weight by an adapter beside it"
            )
        return super().requires_grad_(False)

    def _apply(self, fn, recurse=True):
        """The parts of the weight keep their dtypes in a module that is converted."""
        parts = {id(tensor) for name, tensor in self._buffers.items() if name in FIXED and tensor is not None}

        def kept(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            if id(tensor) not in parts or made.dtype == tensor.dtype:
                return made
            return torch.empty_like(tensor, device=made.device) if tensor.is_meta else tensor.to(made.device)

        if (original := vars(self).get(ORIGINAL)) is not None:
            original._apply(fn, recurse)
        return super()._apply(kept, recurse)

    def __getstate__(self):
        # Pickle alone cannot read a tensor of fp8 back (torch.save can), so it goes as its bytes.
        state = self.__dict__.copy()
        if self.weight.dtype == torch.float8_e4m3fn:
            state["_buffers"] = {**self._buffers, "weight": self.weight.view(torch.uint8)}
        return state

    def __setstate__(self, state):
        super().__setstate__(state)
        if self._kind[0] == "fp8":
            self._buffers["weight"] = self.weight.view(torch.float8_e4m3fn)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, *rest):
        who = f"{type(self).__name__}: {prefix}weight"
        there = [name for name in BUFFERS.values() if self._buffers[name] is not None]
        given = {name: state_dict[prefix + name] for name in BUFFERS.values() if prefix + name in state_dict}
        data = given.get("weight")
        if data is not None and not (data.dtype == self.weight.dtype or data.dtype.itemsize == 1):
            raise ValueError(
                f"{who} is {data.dtype}, expected {self.weight.dtype}: load it into a module that is not quantized,"
                " and quantize that"
            )
        if given:
            for name in sorted(set(there) ^ set(given)):
                word = "absent" if name in there else "given, expected none"
                raise ValueError(f"{type(self).__name__}: {prefix}{name} is {word}: {self.scheme} here has {there}")
            try:
                found = self._weight(given)
            except ValueError as error:
                raise ValueError(f"{who}: {error}") from error
            _check_values(found, prefix + "weight")
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            tensor = state_dict.get(prefix + name)
            if name not in given and own is not None and tensor is not None and tensor.shape != own.shape:
                got, expected = tuple(tensor.shape), tuple(own.shape)
                raise ValueError(f"{type(self).__name__}: {prefix}{name} has shape {got}, expected {expected}")
        if self._buffers.get("input_scale") is not None:
            _check_input_scale(type(self).__name__, state_dict.get(prefix + "input_scale"), prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *rest)

    def _described(self) -> str:
        weight = self.quantized_weight
        groups = f", groups of {self.group_size}" if self.group_size else ""
        return f"{self.scheme}{groups}, {weight.bits_per_weight:.2f} bits per weight"


def _check_values(weight: QuantizedTensor, name: str) -> None:
    weight.module.check_values(weight, name)
    order = weight.order
    if order is not None and not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
        raise ValueError(f"{weight.format}: {name}_order is no permutation of its columns")


def _check_input_scale(who: str, scale: Tensor | None, name: str) -> None:
    if scale is not None and not bool(scale.isfinite().all()):
        raise ValueError(f"{who}: the input_scale of {name} has a NaN or an infinity, expected finite values")


class QuantizedLinear(QuantizedModule):
    """torch.nn.Linear with a quantized weight, which is frozen; input and bias have gradients.

    Made by `from_linear`, `from_tensor`, or the constructor and `load_state_dict`. The state_dict has the weight's
    bytes as `weight` and what it takes to read them beside it: `weight_scales`, and where the format has them
    `weight_zeros`, `weight_second_scales`, `weight_order` (columns stored in another order); `input_scale` `[K]` fp32
    where the input is multiplied by it first (AWQ); `bias` `[N]`. Converting the module to another dtype converts the
    bias alone.

    Args:
        in_features, out_features, bias: as torch's.
        scheme: "int8", "int4", "nf4", "fp8", "w8a8", "w4a8" or "fp8_dynamic".
        group_size: columns that share a scale: what the format allows, -1 for the whole row, None for its default.
        ordered, scaled_input: whether there are `weight_order` and `input_scale`.
        options: of the format's `quantize`: `symmetric`, `scale_dtype`, `double`.
    Raises: ValueError or TypeError, an unknown scheme or option.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str = "int8",
        *,
        group_size: int | None = None,
        ordered: bool = False,
        scaled_input: bool = False,
        device=None,
        dtype=None,
        **options,
    ):
        super().__init__()
        options = format_options("QuantizedLinear", scheme, group_size, options)
        self._hold(empty_tensor((out_features, in_features), scheme, device, **options))
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight_order", torch.arange(in_features, device=device) if ordered else None)
        self.register_buffer("input_scale", torch.ones(in_features, device=device) if scaled_input else None)
        made = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", made)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str, *, group_size: int | None = None, name: str = "weight", **options
    ) -> "QuantizedLinear":
        """The quantized form of a torch.nn.Linear, in the same mode (training or not); it shares the bias.

        Args:
            scheme, group_size, options: as the constructor's; `name` is what errors call the weight.
        Raises: TypeError, it is no Linear; ValueError, its weight has a NaN or an infinity, or is on the meta device.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"QuantizedLinear: linear is a {type(linear).__name__}, expected a torch.nn.Linear")
        _not_meta("QuantizedLinear", linear.weight)
        options = format_options("QuantizedLinear", scheme, group_size, options)
        weight = quantize_tensor(linear.weight.detach(), scheme, name, **options)
        return cls.from_tensor(weight, linear.bias).train(linear.training)

    @classmethod
    def from_tensor(
        cls, weight: QuantizedTensor, bias: Tensor | None = None, input_scale: Tensor | None = None
    ) -> "QuantizedLinear":
        """The layer of a QuantizedTensor, whose tensors it takes as they are.

        Args:
            bias: `[N]`, a parameter is kept as it is; input_scale: `[K]`, what the input is multiplied by first.
        Raises: ValueError, of another shape.
        """
        rows, columns = weight.shape
        for name, tensor, size in (("bias", bias, rows), ("input_scale", input_scale, columns)):
            if tensor is not None and tuple(tensor.shape) != (size,):
                raise ValueError(f"QuantizedLinear: {name} has shape {tuple(tensor.shape)}, expected ({size},)")
        made = cls(columns, rows, False, device="meta")
        made._hold(weight)
        made.input_scale = None if input_scale is None else input_scale.float()
        made.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return made

    def forward(self, input: Tensor, *, norm_weight: Tensor | None = None, norm_eps: float | None = None) -> Tensor:
        """`[*, K]` to `[*, N]`; with `norm_eps` of `rms_norm(input, (K,), norm_weight, norm_eps)`, in one kernel where
        there is one: `layer(x, norm_weight=norm.weight, norm_eps=norm.eps)`."""
        held = self._buffers  # one look-up each: attributes of modules cost several
        weight, scales, input_scale = held["weight"], held["weight_scales"], held["input_scale"]
        if weight.requires_grad or scales.requires_grad:
            raise RuntimeError(f"QuantizedLinear: a gradient of the weight is asked for, but {self.scheme} has none")
        parts, bias = (weight, scales, held["weight_zeros"], held["weight_second_scales"]), self._parameters["bias"]
        if norm_eps is not None and input_scale is None:
            of_norm = (norm_weight, norm_eps, held["weight_order"])
            return norm_op.run(input, parts, self._shape, self._kind, bias, *of_norm)
        if norm_eps is not None:
            input = rms_norm(input, (self.in_features,), norm_weight, norm_eps)
        elif norm_weight is not None:
            raise ValueError("QuantizedLinear: norm_weight is given without norm_eps, expected both or norm_eps alone")
        if input_scale is not None:
            _check(input, parts, *self._shape, bias)
            input = input * input_scale.to(input.dtype)
        return run(input, parts, self._shape, self._kind, bias, held["weight_order"])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight written out, `[N, K]`, times `input_scale` where there is one: that of a torch.nn.Linear."""
        weight = super().dequantize(dtype)
        return weight if self.input_scale is None else weight * self.input_scale.to(dtype)

    def extra_repr(self) -> str:
        scaled = ", scaled input" if self.input_scale is not None else ""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._described()}{scaled}"


def _not_meta(who: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise ValueError(f"{who}: its weight is on the meta device, expected one with values")
