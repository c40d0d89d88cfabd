"""Formats of quantized weights, one file each: the bits, quantize, pack and dequantize in plain PyTorch."""

FORMATS = ("int8",)
