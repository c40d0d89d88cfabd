"""`llmkernels accelerate` on small models that the tests save themselves, and the way back: checkpoints.load_folder."""

import argparse
import html
import json
import shutil
import sys

import pytest
import torch

import llmkernels
from llmkernels.cli import accelerate as command
from llmkernels.cli import main
from llmkernels.quantization import SCHEMES, checkpoints
from llmkernels.quantization.checkpoints import folders
from tests.hf_models import FAMILIES, output_of
from tests.quantization import packers
from tests.tree import ROOT

WORDS = ["[UNK]", "<s>", "</s>", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
TEXT = "the quick brown fox jumps over the lazy dog"


def add_tokenizer(folder) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a Llama, a T5 (tied) and a GPT-2 (Conv1D) with weights, as transformers saves them."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "t5", "gpt2"):
        FAMILIES[name].make().save_pretrained(root / name)
        add_tokenizer(root / name)
        (root / name / "LICENSE").write_text("as you like\n")
    return root


def original(folder, **options):
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("scheme", (None, "int4", "w8a8", "fp8"))
@pytest.mark.parametrize("name, dtype", (("llama", "bfloat16"), ("t5", None), ("gpt2", None)))
def test_written_and_read_again_bit_by_bit(name, dtype, scheme, saved, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--quantize", scheme] if scheme else []
    options += ["--dtype", dtype] if dtype else []
    assert main(["accelerate", str(saved / name), "--out", str(out), *options]) == 0
    family, inputs = FAMILIES[name], FAMILIES[name].inputs()
    dtype = getattr(torch, dtype or "float32")
    expected = original(saved / name)
    llmkernels.accelerate(expected, dtype=dtype, quantize=scheme)
    if scheme is None:
        read = original(saved / name, dtype=dtype)
        assert all(torch.equal(p, q) for p, q in zip(read.parameters(), expected.parameters(), strict=True))
    again = checkpoints.load_folder(out)
    assert type(again).__name__ == family.model and not again.training and again.dtype == dtype
    with torch.no_grad():
        assert torch.equal(output_of(again, inputs), output_of(expected, inputs))
    report = llmkernels.accelerate(again)
    assert not report.kept and all(entry.detail == "swapped before" for entry in report.swapped)
    assert llmkernels.restore(again) > 0 and not llmkernels.restore(again)
    # What belongs to the model came along, but for the weights; transformers reads what has no layers of ours.
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"} <= names
    assert (
        names & {"model.safetensors", "llmkernels.safetensors"} == {folders.QUANTIZED_WEIGHTS}
        if scheme
        else {folders.PLAIN_WEIGHTS}
    )
    if scheme is None:
        plain = original(out)
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    assert "written: " in capsys.readouterr().out


@pytest.mark.parametrize("name", ("gemma2", "bert", "vit"))
def test_other_families_from_python(name, tmp_path):
    """Without a source: config.json is written from the model. `.to(dtype)` also rounds tables that no file has."""
    family = FAMILIES[name]
    model = family.make().to(torch.bfloat16)
    report = llmkernels.accelerate(model, exclude="*.0.*")
    llmkernels.quantize(model, "int8", embeddings=True)
    checkpoints.save_folder(model, tmp_path / "out", report=report)
    again = checkpoints.load_folder(tmp_path / "out")
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.inputs().items()}
    with torch.no_grad():
        assert torch.equal(output_of(again, inputs), output_of(model, inputs))
    swapped = {(entry.path, entry.module) for entry in llmkernels.accelerate(again, exclude="*.0.*").swapped}
    assert swapped == {(entry.path, entry.module) for entry in report.swapped}
    plain = checkpoints.load_folder(tmp_path / "out", accelerated=False)
    assert llmkernels.restore(plain) == 0
    with pytest.raises(FileExistsError, match="not empty"):
        checkpoints.save_folder(model, tmp_path / "out")
    mine = type("Mine", (type(family.make()),), {})(model.config)
    for other in (torch.nn.Linear(2, 2), mine):
        with pytest.raises(TypeError, match="expected a model class of transformers"):
            checkpoints.save_folder(other, tmp_path / "other")
    with pytest.raises(TypeError, match="verify with accelerated=False"):
        checkpoints.load_folder(tmp_path / "out", accelerated=False, verify=False)


def test_reports_and_prompt(saved, tmp_path, capsys):
    arguments = ["accelerate", str(saved / "llama"), "--quantize", "int4", "--group-size", "32", "--prompt", TEXT]
    for ending in ("html", "json", "txt"):
        assert main([*arguments, "--report", str(tmp_path / f"report.{ending}")]) == 0
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["model"]["class"] == "LlamaForCausalLM" and document["model"]["random_weights"] is False
    assert document["accelerate"]["swapped"] == 14 and document["accelerate"]["quantization"]["quantized"] == 14
    assert "outputs differ by" in document["accelerate"]["whole"] and document["machine"]["torch"]
    prompt = document["prompt"]
    assert prompt["tokens"] == 9 and 0.01 < prompt["error"] < 0.5 and 0.0 <= prompt["same"] <= 1.0
    assert abs(prompt["loss"][0] - prompt["loss"][1]) < 0.5 and 3.0 < prompt["loss"][0] < 7.0
    memory = document["accelerate"]["memory"]
    assert memory["after"] < 0.5 * memory["before"] and memory["kept"] == 0
    assert document["accelerate"]["lost"]["int4"] == pytest.approx(prompt["error"], rel=0.3)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.txt").read_text()
    for part in ("swiglu (gate_proj, up_proj)", "fused attention, was sdpa", "int4, groups of 32", "on the prompt"):
        assert part in html.unescape(page) and part in text
    assert page.startswith("<!doctype html>") and page.count("<table>") == 3 and "http" not in page
    assert "14 swapped" in capsys.readouterr().out


def test_config_alone_has_random_weights_and_says_so(saved, tmp_path, capsys):
    config = saved / "llama/config.json"
    assert main(["accelerate", str(config), "--out", str(tmp_path / "a"), "--quantize", "nf4"]) == 0
    assert "random weights, since there are no others" in capsys.readouterr().out
    assert main(["accelerate", str(config), "--out", str(tmp_path / "b"), "--quantize", "nf4"]) == 0
    inputs = FAMILIES["llama"].inputs()
    with torch.no_grad():
        a, b = (output_of(checkpoints.load_folder(tmp_path / name), inputs) for name in "ab")
    assert torch.equal(a, b) and float(a.std()) > 0.0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "llmkernels.json", "llmkernels.safetensors",
    }  # fmt: skip


def test_what_is_written_can_be_given_again(saved, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["accelerate", str(saved / "llama"), "--quantize", "int8", "--out", str(first)]) == 0
    assert main(["accelerate", str(first), "--out", str(second), "--exclude", "*.mlp"]) == 0
    inputs = FAMILIES["llama"].inputs()
    one, two = (checkpoints.load_folder(folder) for folder in (first, second))
    paths = [{entry.path for entry in llmkernels.accelerate(m, exclude="*.mlp").swapped} for m in (one, two)]
    assert paths[0] - paths[1] == {"model.layers.0.mlp", "model.layers.1.mlp"}
    with torch.no_grad():
        torch.testing.assert_close(output_of(one, inputs), output_of(two, inputs))
    assert main(["accelerate", str(first), "--quantize", "int4"]) == 2
    assert main(["accelerate", str(first), "--dtype", "bfloat16"]) == 2
    error = capsys.readouterr().err
    assert "quantized before" in error and "was written in torch.float32" in error


@pytest.mark.parametrize("method", ("awq", "gptq"))
def test_packed_folders_become_ours(method, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, max_position_embeddings=32, **sizes)
    model, arrays = transformers.LlamaForCausalLM(config).eval(), {}
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("_proj.weight"):
            layer = packers.random_layer(number, *tensor.shape[::-1], 32, desc_act=method == "gptq")
            packed = getattr(packers, method)(layer)
            arrays |= {f"{name.removesuffix('.weight')}.{part}": array for part, array in packed.items()}
        else:
            arrays[name] = tensor.numpy().copy()
    packed, out = tmp_path / "packed", tmp_path / "out"
    packed.mkdir()
    packers.write_folder(packed, arrays, {"quant_method": method, "bits": 4, "group_size": 32})
    written = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(written | config.to_dict()))
    assert main(["accelerate", str(packed), "--out", str(out)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out
    assert len(checkpoints.load_pretrained(model, packed)) == 7
    llmkernels.accelerate(model)
    tokens = torch.arange(20).view(2, 10)
    with torch.no_grad():
        assert torch.equal(checkpoints.load_folder(out)(tokens).logits, model(tokens).logits)


def test_options_of_accelerate(saved, capsys):
    assert main(["accelerate", str(saved / "llama"), "--include", "*norm*", "--benchmark", "--backend", "torch"]) == 0
    assert "not included" in capsys.readouterr().out


def changed(folder, tmp_path, **values):
    """A copy of a folder with other values in its config.json; None takes one away."""
    copied = tmp_path / "changed"
    shutil.copytree(folder, copied)
    config = json.loads((copied / "config.json").read_text()) | values
    kept = {name: value for name, value in config.items() if value is not None}
    (copied / "config.json").write_text(json.dumps(kept))
    return copied


def refused(capsys, *arguments) -> str:
    """The one line that a command says when it refuses."""
    capsys.readouterr()
    assert main(["accelerate", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("llmkernels accelerate: ") and len(error.splitlines()) == 1, error
    return error


def test_refuses_arguments(saved, tmp_path, capsys):
    llama = saved / "llama"
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere")
    assert "has no config.json" in refused(capsys, tmp_path)
    assert f"expected one of {', '.join(SCHEMES)}" in refused(capsys, llama, "--quantize", "int3")
    assert "group_size" in refused(capsys, llama, "--quantize", "int4", "--group-size", "7")
    assert "--group-size without --quantize" in refused(capsys, llama, "--group-size", "64")
    assert "skip names 'nothing'" in refused(capsys, llama, "--quantize", "int8", "--skip", "nothing")
    assert "--dtype is 'int8'" in refused(capsys, llama, "--dtype", "int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "is there and not empty" in refused(capsys, llama, "--out", tmp_path / "full")
    assert "is there and not empty" in refused(capsys, llama, "--out", tmp_path / "full/file")
    assert "--out: cannot write to" in refused(capsys, llama, "--out", "/dev/null/out")
    assert ".html, .json, .txt" in refused(capsys, llama, "--report", tmp_path / "report.pdf")
    assert "--report: no folder" in refused(capsys, llama, "--report", tmp_path / "nowhere/report.txt")
    assert "64 at most" in refused(capsys, llama, "--prompt", "fox " * 65)
    assert "has no tokenizer" in refused(capsys, llama / "config.json", "--prompt", TEXT)
    none = refused(capsys, saved / "gpt2", "--quantize", "int4", "--skip", "lm_head", "--skip", "h")
    assert "no linear layer that can be: " in none and "transformer.h.0.attn.c_attn: skip names 'h'" in none


def test_refuses_folders(saved, tmp_path, capsys):
    def config(**values):
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        return changed(saved / "llama", tmp_path, **values)

    assert "unknown model type 'nonesuch'" in refused(capsys, config(model_type="nonesuch"))
    assert "unknown model type None" in refused(capsys, config(model_type=None))
    assert "unknown model type ['llama']" in refused(capsys, config(model_type=["llama"]))
    assert "architectures is ['LlamaForWeather']" in refused(capsys, config(architectures=["LlamaForWeather"]))
    assert "architectures is [1]" in refused(capsys, config(architectures=[1]))
    assert "weights cannot be read" in refused(capsys, config(hidden_size=64))
    assert "do not have" in refused(capsys, config(num_hidden_layers=3))
    assert "quant_method is 'hqq'" in refused(capsys, config(quantization_config={"quant_method": "hqq"}))
    assert "no layer is packed" in refused(capsys, config(quantization_config={"quant_method": "awq", "bits": 4}))
    folder = config()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "weights cannot be read" in refused(capsys, folder)
    (folder / "config.json").write_text("[1]")
    assert "holds a list, expected an object" in refused(capsys, folder)
    (folder / "config.json").write_text("{")
    assert "no JSON that can be read" in refused(capsys, folder)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide"}')
    (folder / "model.safetensors").unlink()
    assert "describes no LlamaForCausalLM: " in refused(capsys, folder)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": -3}')
    assert "describes no LlamaForCausalLM" in refused(capsys, folder)


def test_a_model_that_disagrees_on_the_prompt_is_status_one(saved, tmp_path, capsys, monkeypatch):
    from llmkernels.accelerate import whole

    monkeypatch.setattr(whole, "compare", lambda before, after: (False, "outputs differ by 1 of their size"))
    arguments = ["accelerate", str(saved / "llama"), "--prompt", TEXT, "--quantize", "int8", "--dtype", "bfloat16"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    text = capsys.readouterr().out
    assert "0 swapped" in text and "nothing was swapped, nor is it in bfloat16 and int8" in text
    assert "off by 0.0e+00" in text and "not written: " in text and not (tmp_path / "out").exists()


def test_every_option_is_explained():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    page = (ROOT / "docs/accelerate.md").read_text()
    options = [option for action in parser._actions for option in action.option_strings if option != "--help"]
    assert len(options) > 10
    assert all(option == "-h" or f"`{option}" in page for option in options)


def test_refuses_without_transformers(saved, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refused(capsys, saved / "llama")


def test_load_folder_refuses_what_is_not_whole(tmp_path):
    model = FAMILIES["llama"].make()
    llmkernels.quantize(model, "int4")
    folder = tmp_path / "folder"
    checkpoints.save_folder(model, folder)
    about = json.loads((folder / "llmkernels.json").read_text())
    for values, message in (
        ({"version": 2}, "a newer llmkernels wrote it"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": []}, "dtype is .., expected"),
        ({"weights": "../other"}, "weights is '../other'"),
        ({"swapped": 3}, "swapped is no list"),
        ({"buffers": {}}, "do not have the same buffers"),
        ({"buffers": None}, "buffers is no table"),
    ):
        (folder / "llmkernels.json").write_text(json.dumps(about | values))
        with pytest.raises(ValueError, match=message):
            checkpoints.load_folder(folder)
    (folder / "llmkernels.json").unlink()
    with pytest.raises(ValueError, match="did not write it, or not all of it"):
        checkpoints.load_folder(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        checkpoints.load_folder(tmp_path / "nowhere")
    (folder / "llmkernels.json").write_text(json.dumps(about))
    data = (folder / "llmkernels.safetensors").read_bytes()
    (folder / "llmkernels.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="not all of one"):
        checkpoints.load_folder(folder)
