"""accelerate on families of Hugging Face models: what is found, that it agrees, generates alike, and comes off."""

from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")

import llmkernels
from llmkernels import _native
from tests.hf_models import FAMILIES, PAD, Family, output_of

BEST = "cpu" if _native.why_absent("cpu") is None else "torch"
BACKENDS = tuple(dict.fromkeys((BEST, "torch")))
GENERATING = tuple(name for name, family in FAMILIES.items() if family.kind in ("decoder", "seq2seq"))


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


def counted(report) -> dict[str, int]:
    """How many of each replacement, by its first words."""
    counts = Counter(entry.replacement for entry in report.swapped)
    return {("loss" if "loss" in name else name.split(",")[0] if "attention" in name else name): count
            for name, count in counts.items()}  # fmt: skip


def trained(model, family: Family):
    """The output and, of a loss where the model has one, the gradients of all parameters."""
    inputs = family.inputs()
    output = family.kept(output_of(model, inputs))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    loss = (output * weights).sum()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return output.detach(), {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None}


@pytest.mark.parametrize("backend", BACKENDS)
def test_finds_all_and_agrees_forward_and_backward(family, backend):
    model = family.make()
    expected, gradients = trained(model, family)
    report = llmkernels.accelerate(model, backend=backend)
    found = counted(report)
    assert found == {name: count for name, count in family.found.items() if count}, str(report)
    assert all(entry.backend == backend for entry in report.swapped) and not report.kept, str(report)
    output, found = trained(model, family)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=2e-5)
    assert found.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * float(largest), msg=name)


def test_restores_bit_for_bit_with_one_state_dict(family):
    model = family.make()
    before = output_of(model, family.inputs()).detach()
    objects, types = list(model.modules()), [type(module) for module in model.modules()]
    parameters, keys = list(model.parameters()), list(model.state_dict())
    configs = {id(m.config): (m.config, m.config._attn_implementation) for m in model.modules() if hasattr(m, "config")}
    attributes = [set(vars(module)) for module in model.modules()]
    plain = family.make()
    llmkernels.accelerate(model, backend=BEST)
    assert list(model.state_dict()) == keys
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)
    assert all(isinstance(module, kind) for module, kind in zip(objects, types, strict=True))
    assert llmkernels.restore(model) > 0
    assert all(map(lambda a, b: a is b, model.modules(), objects)) and [type(m) for m in model.modules()] == types
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))
    assert all(config._attn_implementation == name for config, name in configs.values())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(output_of(model, family.inputs()), before)


@pytest.mark.parametrize("name", GENERATING)
def test_generates_the_same_tokens_with_padding_and_cache(name):
    family = FAMILIES[name]
    model = family.make()
    inputs = {key: value for key, value in family.inputs().items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(**inputs, **options)
    assert len(llmkernels.accelerate(model, backend=BEST).swapped) > 4
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert torch.equal(model.generate(**inputs, **options, use_cache=False), expected), "without a cache"


@pytest.mark.parametrize("name", ("llama", "gemma2", "t5"))
def test_generates_the_same_with_a_static_cache(name):
    family = FAMILIES[name]
    model = family.make()
    inputs = {key: value for key, value in family.inputs().items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD, "cache_implementation": "static"}
    options["disable_compile"] = True
    expected = model.generate(**inputs, **options)
    llmkernels.accelerate(model, backend=BEST)
    assert torch.equal(model.generate(**inputs, **options), expected)


def test_bf16_is_as_near_to_the_truth_as_the_model_was(family):
    """Logits of given tokens, beside fp32: greedy tokens of bf16 hang on ties."""
    model, inputs = family.make(), family.inputs()
    with torch.no_grad():
        truth = family.kept(output_of(model, inputs)).double()
        model, inputs = model.to(torch.bfloat16), _to(inputs, torch.bfloat16)
        before = family.kept(output_of(model, inputs))
        report = llmkernels.accelerate(model, backend=BEST)
        assert counted(report) == {name: count for name, count in family.found.items() if count}, str(report)
        after = family.kept(output_of(model, inputs))
    assert after.dtype == before.dtype == torch.bfloat16
    error = lambda y: (y.double() - truth).norm() / truth.norm()
    assert error(after) <= 1.5 * error(before) + 2e-3, f"{error(after)} against {error(before)}"


def _to(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", ("llama", "gpt2"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_loss_hook(name, dtype):
    family = FAMILIES[name]
    model = family.make().to(dtype)
    inputs = family.inputs()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for options in ({}, {"num_items_in_batch": torch.tensor(7)}):
        expected = model(**inputs, labels=labels, **options).loss
        llmkernels.accelerate(model, backend=BEST)
        found = model(**inputs, labels=labels, **options).loss
        assert found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)
        found.backward()
        assert model.get_input_embeddings().weight.grad.isfinite().all()
        assert llmkernels.restore(model) and "_loss_function" not in vars(model)


# --- dtype and quantize ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", (None, "int8"))
@pytest.mark.parametrize("name", ("llama", "gemma3", "t5", "bert", "vit"))
def test_cast_quantized_and_restored(name, quantize):
    family = FAMILIES[name]
    model, inputs = family.make(), family.inputs()
    before, objects = output_of(model, inputs), [id(p) for p in model.parameters()]
    tensors = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    tables = {key: buffer for key, buffer in model.named_buffers() if key not in tensors}
    report = llmkernels.accelerate(model, dtype=torch.bfloat16, quantize=quantize, example_inputs=inputs)
    assert len(report.swapped) == len(llmkernels.accelerate(family.make()).swapped)
    assert model.dtype == torch.bfloat16 and max(report.lost.values()) < 0.1
    assert all(dict(model.named_buffers())[key] is buffer for key, buffer in tables.items()), "angles stay in fp32"
    read = type(model)(model.config)
    read.to(torch.bfloat16).load_state_dict({key: value for key, (_, value) in tensors.items()})
    if quantize is None and name != "bert":  # whose masks are made for a dtype, on the way
        inputs = {key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()}
        with torch.no_grad():
            error = (family.kept(output_of(model, inputs) - output_of(read.eval(), inputs))).norm() / before.norm()
        assert error < 0.05
    llmkernels.restore(model)
    assert [id(p) for p in model.parameters()] == objects and torch.equal(output_of(model, family.inputs()), before)
    for key, tensor in model.state_dict().items():
        assert (tensor.data_ptr(), tensor.dtype) == (tensors[key][0], tensors[key][1].dtype)
        assert torch.equal(tensor, tensors[key][1])


def test_what_a_model_wants_kept_in_fp32_stays_in_fp16():
    """T5 says that of `wo`, whose outputs can be larger than fp16 holds; of bf16 it does not."""
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = FAMILIES["t5"].make()
        llmkernels.accelerate(model, dtype=dtype)
        found = {p.dtype for name, p in model.named_parameters() if ".wo." in name}
        assert found == {expected} and model.shared.weight.dtype == dtype
        assert output_of(model, FAMILIES["t5"].inputs()).isfinite().all()
