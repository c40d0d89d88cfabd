"""What quantizing costs in accuracy: errors of weights and products, and bits per byte of the demo's Transformer.

    python benchmarks/quantization.py --json benchmarks/results/<machine>/quantization-accuracy.json

Trains the Transformer of `llmkernels demo` first, a quarter of an hour on one core; `--weights` keeps what came of it.
Every scheme is then measured on normal weights and inputs, on the trained weights with the inputs that each layer gets
on held-out text, and by the bits per byte of held-out text, with and without calibration on training text.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import llmkernels
from llmkernels import functional, machine
from llmkernels.demo import text as source
from llmkernels.demo.model import LanguageModel
from llmkernels.demo.train import Run, bits_per_byte, lockstep
from llmkernels.quantization import calibration, int4
from llmkernels.quantization.tensor import quantize_tensor

# name -> (scheme, options)
SCHEMES = {
    "int8": ("int8", {}),
    "int4, groups of 32": ("int4", {"group_size": 32}),
    "int4, groups of 64": ("int4", {"group_size": 64}),
    "int4, groups of 128": ("int4", {"group_size": 128}),
    "int4, groups of 64, zero points": ("int4", {"group_size": 64, "symmetric": False}),
    "NF4, groups of 64": ("nf4", {"group_size": 64}),
    "NF4, groups of 64, double": ("nf4", {"group_size": 64, "double": True}),
    "fp8": ("fp8", {}),
    "fp8, blocks of 128": ("fp8", {"group_size": 128}),
    "W8A8": ("w8a8", {}),
    "W4A8, groups of 64": ("w4a8", {"group_size": 64}),
    "fp8 weights and activations": ("fp8_dynamic", {}),
}
SIZE, LENGTH, SEED = 8, 256, 0
BATCHES = 48  # of held-out text: 98,304 bytes
CALIBRATION = 8  # batches of training text


def train(data: Tensor, steps: int) -> LanguageModel:
    torch.manual_seed(SEED)
    run = Run("eager", LanguageModel(length=LENGTH), torch.get_num_threads())
    for step in lockstep([run], data, steps, SIZE, LENGTH, SEED, "cpu"):
        if step % 50 == 0:
            print(f"step {step}: loss {run.losses[-1]:.3f}", flush=True)
    return run.model.eval()


def relative(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def root_mean_square(errors: list[float]) -> float:
    return (sum(error**2 for error in errors) / len(errors)) ** 0.5


def errors(layers: list[tuple[Tensor, Tensor]], scheme: str, options: dict) -> tuple[float, float, float]:
    """(bits per weight, error of weights, error of products) of (weight, inputs), root mean squares over layers."""
    weights, products, bits = [], [], []
    for weight, x in layers:
        found = quantize_tensor(weight, scheme, **options)
        weights.append(relative(found.dequantize(), weight))
        products.append(relative(functional.quantized_linear(x, found), x @ weight.t()))
        bits.append(found.bits_per_weight * weight.numel())
    numel = sum(weight.numel() for weight, _ in layers)
    return sum(bits) / numel, root_mean_square(weights), root_mean_square(products)


def without_search(layers: list[tuple[Tensor, Tensor]], options: dict) -> float:
    """The error of int4 weights whose largest is always at the last step."""
    name = "SYMMETRIC_STEPS" if options.get("symmetric", True) else "ASYMMETRIC_STEPS"
    steps = getattr(int4, name)
    setattr(int4, name, steps[:1])
    try:
        return errors(layers, "int4", options)[1]
    finally:
        setattr(int4, name, steps)


@torch.no_grad()
def measure(model: LanguageModel, training: Tensor, held_out: Tensor) -> dict:
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    batch = lambda data, index: source.batch(data, index, SIZE, LENGTH, seed=77)[0]
    inputs = calibration.collect(model, linears, [batch(held_out, index) for index in range(4)])
    trained = [(linears[path].weight.detach(), inputs[path]) for path in linears]
    generator = torch.Generator().manual_seed(SEED)
    normal = [(torch.randn(1024, 1024, generator=generator), torch.randn(256, 1024, generator=generator))]
    batches = [batch(training, index) for index in range(CALIBRATION)]
    judge = lambda model: bits_per_byte(model, held_out, SIZE, LENGTH, BATCHES, "cpu")
    full = judge(model)
    results = [{"name": "fp32", "bits_per_weight": 32.0, "bits_per_byte": full}]
    for name, (scheme, options) in SCHEMES.items():
        bits, weight, product = errors(trained, scheme, options)
        _, weight_normal, product_normal = errors(normal, scheme, options)
        result = {
            "name": name, "scheme": scheme, "bits_per_weight": bits,
            "weight_error": {"normal": weight_normal, "trained": weight},
            "product_error": {"normal": product_normal, "trained": product},
        }  # fmt: skip
        if scheme == "int4":
            plain = {"normal": without_search(normal, options), "trained": without_search(trained, options)}
            result["weight_error_without_search"] = plain
        for key, data in (("bits_per_byte", None), ("bits_per_byte_calibrated", batches)):
            quantized = copy.deepcopy(model)
            report = llmkernels.quantize(quantized, scheme, calibration=data, **options)
            assert len(report.quantized) == len(linears)
            result[key] = judge(quantized)
            result[key.replace("per_byte", "per_byte_ratio")] = result[key] / full
        results.append(result)
        print(json.dumps(result), flush=True)
    return {"results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--weights", type=Path, help="read the trained weights here, or write them if it is absent")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    training, held_out = source.split(source.standard_library())
    if args.weights and args.weights.exists():
        model = LanguageModel(length=LENGTH).eval()
        model.load_state_dict(torch.load(args.weights, weights_only=True))
    else:
        model = train(training, args.steps)
        if args.weights:
            torch.save(model.state_dict(), args.weights)
    config = {
        "steps": args.steps, "batch": SIZE, "length": LENGTH, "seed": SEED,
        "held_out_bytes": BATCHES * SIZE * LENGTH, "calibration_bytes": CALIBRATION * SIZE * LENGTH,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    document = {"table": "accuracy", "machine": machine.facts(), "config": config, **measure(model, training, held_out)}
    args.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
