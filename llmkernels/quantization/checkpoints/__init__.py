"""Quantized models in safetensors files: our own, and those of AWQ and GPTQ. Nothing is pickled.

    save(model, path)               a model with quantized layers, in one file
    load(model, path)               such a file into a model of the same architecture
    save_folder(model, folder)      a model of transformers, with its config.json and tokenizer
    load_folder(folder)             such a folder, ready to run: quantized and accelerated as it was
    load_pretrained(model, folder)  a folder of AWQ or GPTQ, as Hugging Face has them: config.json and safetensors
    from_awq, from_gptq             one layer of a state_dict

A model is loaded as a whole or, after an error, not at all. It may be on the meta device.
"""

from llmkernels.quantization.checkpoints.folders import load_folder, save_folder
from llmkernels.quantization.checkpoints.own import load, save
from llmkernels.quantization.checkpoints.packed import from_awq, from_gptq
from llmkernels.quantization.checkpoints.pretrained import load_pretrained

__all__ = ["from_awq", "from_gptq", "load", "load_folder", "load_pretrained", "save", "save_folder"]
