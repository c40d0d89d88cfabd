"""The commands: info, check, bench, demo, and what they say to a wrong argument."""

import json

import pytest
import torch

from llmkernels import registry
from llmkernels.benchmarking.runner import _distance
from llmkernels.cli import main


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(backend in text for backend in registry.BACKENDS)
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["torch"] == "present" and "layer_norm" in facts["ops"]


@pytest.mark.parametrize("op", ("rms_norm", "swiglu"))
def test_check_on_a_users_shape(op, capsys):
    assert main(["check", op, "--shape", "5x77", "--dtype", "fp32", "--backend", "torch"]) == 0
    text = capsys.readouterr().out
    assert op in text and "ok" in text and "FAIL" not in text


def test_check_fails_on_a_wrong_kernel(capsys, monkeypatch):
    entry = registry.entry("rms_norm", "torch")
    wrong = registry.Backend(
        "rms_norm", "torch", lambda *args: tuple(1.01 * t for t in entry.fwd(*args)), entry.bwd, entry.why_not
    )
    monkeypatch.setitem(registry._registry, "rms_norm", (*registry.entries("rms_norm")[:-1], wrong))
    monkeypatch.setitem(registry._by_name, ("rms_norm", "torch"), wrong)
    assert main(["check", "rms_norm", "--dtype", "fp32", "--backend", "torch"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_bench_writes_what_it_measured(tmp_path, capsys):
    out = tmp_path / "norms.json"
    arguments = ["bench", "rms_norm", "--threads", "1", "--dtype", "float32", "--seconds", "0.01", "--no-compile"]
    assert main([*arguments, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert {result["mode"] for result in document["results"]} == {"fwd", "fwd+bwd", "call"}
    for result in document["results"]:
        assert result["wrong"] == {} and result["best_peer"] in result["candidates"]
        assert all(times["median"] > 0 for times in result["candidates"].values())
    assert document["machine"]["threads"] == 1 and document["machine"]["torch"]
    assert out.with_suffix(".png").stat().st_size > 1000


def test_bench_of_what_the_filter_is_found_in(tmp_path, capsys):
    out = tmp_path / "norms.json"
    arguments = ["bench", "rms_norm", "--seconds", "0.01", "--no-compile", "--backend", "torch", "--json", str(out)]
    assert main([*arguments, "--filter", "fp32 fwd$"]) == 0
    results = json.loads(out.read_text())["results"]
    assert results and {(result["dtype"], result["mode"]) for result in results} == {("float32", "fwd")}
    assert all("torch" in result["ratios"] and "cpu" not in result["candidates"] for result in results)


def test_bench_checks_no_gradient_where_the_forward_alone_is_timed(capsys, monkeypatch):
    entry = registry.entry("rms_norm", "torch")
    wrong = registry.Backend(
        "rms_norm", "torch", entry.fwd, lambda *args: tuple(1.01 * t for t in entry.bwd(*args)), entry.why_not
    )
    monkeypatch.setitem(registry._registry, "rms_norm", (*registry.entries("rms_norm")[:-1], wrong))
    monkeypatch.setitem(registry._by_name, ("rms_norm", "torch"), wrong)
    arguments = ["bench", "rms_norm", "--seconds", "0.01", "--no-compile", "--backend", "torch", "--filter"]
    assert main([*arguments, "4096x1024-fp32 fwd$"]) == 0
    assert main([*arguments, "4096x1024-fp32 fwd"]) == 1
    assert "no time, wrong answer: rms_norm-4096x1024-fp32 on torch: dx" in capsys.readouterr().out


def test_bench_compares_what_is_infinite():
    """log_softmax of what is hidden is -inf, in the truth too."""
    want = torch.tensor([3.0, -4.0, -torch.inf])
    assert _distance(want + torch.tensor([1.0, 1.0, 0.0]), want) == pytest.approx((1.0, 12.5**0.5))
    assert _distance(torch.zeros(3), want)[0] == torch.inf


def test_bench_gives_no_time_to_a_wrong_answer(capsys, monkeypatch):
    entry = registry.entry("rms_norm", "torch")
    wrong = registry.Backend(
        "rms_norm", "torch", lambda *args: tuple(1.01 * t for t in entry.fwd(*args)), entry.bwd, entry.why_not
    )
    monkeypatch.setitem(registry._registry, "rms_norm", (*registry.entries("rms_norm")[:-1], wrong))
    monkeypatch.setitem(registry._by_name, ("rms_norm", "torch"), wrong)
    assert main(["bench", "rms_norm", "--dtype", "float32", "--seconds", "0.01", "--no-compile"]) == 1
    assert "no time, wrong answer: rms_norm-4096x1024-fp32 on torch" in capsys.readouterr().out


def test_demo_quick(tmp_path, capsys):
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert list(result["models"]) == ["Transformer", "LSTM"]
    for part in result["models"].values():
        assert part["agreement"]["agrees"] and part["restored"]["same_objects"]
        assert len(part["losses"]["eager"]) == 8
    assert (tmp_path / "demo.png").stat().st_size > 1000
    assert capsys.readouterr().out.count("loss curves agree") == 2


def test_demo_on_a_users_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 3000)
    assert main(["demo", "--quick", "--steps", "3", "--text", str(text), "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/demo.json").read_text())["config"]["text"] == str(text)


@pytest.mark.parametrize(
    "arguments, message",
    (
        (["check", "conv"], "check: unknown op 'conv', expected one of"),
        (["check", "--device", "tpu"], "device 'tpu' is not there"),
        (["check", "rms_norm", "--backend", "cuda"], "backend 'cuda' ran none of"),
        (["bench", "conv"], "bench: unknown op 'conv'"),
        (["bench", "--threads", "0"], "--threads is 0, expected at least 1"),
        (["bench", "--filter", "nowhere"], "has no case to time with these arguments"),
        (["bench", "--filter", "("], "--filter '(' is no regular expression"),
        (["bench", "rms_norm", "--seconds", "0.01", "--backend", "cuda"], "--backend cuda: "),
        (["bench", "--json", "/nowhere/out.json"], "--json: no folder /nowhere"),
        (["demo", "--steps", "1"], "--steps is 1, expected at least 2"),
        (["demo", "--text", "/nowhere/file"], "--text: cannot read /nowhere/file"),
        (["demo", "--text", __file__], "expected at least 100000"),
        (["demo", "--out", "/dev/null/out"], "--out: cannot write to"),
    ),
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shape", ("4x", "x", "-1x3", "big"))
def test_wrong_shape(shape, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["check", f"--shape={shape}"])
    assert stop.value.code == 2 and "expected sizes like 4096x1024" in capsys.readouterr().err
