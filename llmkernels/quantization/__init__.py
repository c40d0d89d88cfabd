"""Formats of quantized weights, one file each: the bits, quantize, pack and dequantize in plain PyTorch."""

# What a file of this package is named after.
FORMATS = ("int8", "int4", "nf4", "fp8")

# What users ask for -> (format of the weight, how the activations are rounded: not at all, to int8, to fp8).
SCHEMES = {
    "int8": ("int8", None),
    "int4": ("int4", None),
    "nf4": ("nf4", None),
    "fp8": ("fp8", None),
    "w8a8": ("int8", "int8"),
    "w4a8": ("int4", "int8"),
    "fp8_dynamic": ("fp8", "fp8"),
}
