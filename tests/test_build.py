"""What is built and installed: symbols, registers, versions, wheels, and the package without a compiler."""

import importlib.util
import json
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import llmkernels
from llmkernels import _native
from llmkernels.testing import resources
from tests.tree import ROOT, copy_tree, python, run


def needs(name: str):
    reason = _native.why_absent(name)
    return pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}")


@needs("cpu")
def test_no_weak_symbols_in_what_is_compiled_for_one_instruction_set():
    """The linker may pick a weak symbol for everybody; compiled for AVX-512 it would crash an older CPU."""
    objects = [
        path for path in ROOT.glob("build/*/CMakeFiles/llmkernels_cpu_*.dir/**/*.o") if "sanitize" not in str(path)
    ]
    if not objects:
        pytest.skip("cpu: the build folder is not here")
    isas = {re.search(r"llmkernels_cpu_(\w+)\.dir", str(path)).group(1) for path in objects}
    assert isas >= {"DEFAULT"}
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        assert re.search("norm_(fwd|bwd)", symbols) or "norm" not in path.name
        assert [line for line in symbols.splitlines() if " W " in line] == [], path


@needs("cuda")
@pytest.mark.skipif(resources.CUOBJDUMP is None, reason="cuobjdump: comes with triton, which is not installed")
def test_no_cuda_kernel_spills():
    kernels = resources.usage(_native.module("cuda").__file__)
    assert len(kernels) > 100
    assert [name for name, row in kernels.items() if row["STACK"] or row["LOCAL"]] == []
    # Blocks of the others have up to 512 threads; attention's have 128, quantized_linear's 256 or 128, and those of
    # lstm's recurrences that have a multiprocessor to themselves (fp64, or their last argument is true) 256, with as
    # many registers as a thread can have.
    wide = re.compile("attention|quantized|lstm_recurrence.*(Lb1E|Id)")
    large = [name for name, row in kernels.items() if row["REG"] > 128 and not wide.search(name)]
    assert large == [], "a block of 512 threads, or two of 256, need 128 or fewer"


@needs("cuda")
def test_the_cuda_module_says_what_it_is():
    """It imports without a GPU, also with a CPU build of torch."""
    info = _native.module("cuda").build_info()
    assert info["torch"] == torch.__version__ and info["targets"] == "sm_80,compute_80"
    names = {schema.split("(")[0] for schema in _native.module("cuda").kernels()}
    assert "llmkernels_cuda::layer_norm_fwd" in names


@needs("cpu")
def test_the_cpu_module_says_what_it_is():
    module = _native.module("cpu")
    assert module.build_info()["torch"] == torch.__version__
    assert module.isa() in module.available_isas()
    assert "llmkernels_cpu::rms_norm_bwd" in {schema.split("(")[0] for schema in module.kernels()}


def test_a_module_for_another_torch_is_a_clear_message(monkeypatch):
    """It would be an undefined symbol, or worse."""
    monkeypatch.setattr(_native, "_facts", lambda: {"torch": "2.3.1"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    module, why = _native._load("cpu")
    assert module is None
    assert why.startswith(f"built for torch 2.3.1, but torch {torch.__version__} is running: rebuild with")


def test_metadata_needs_neither_torch_nor_a_compiler(tmp_path):
    """pip asks for metadata before anything is installed."""
    tree = copy_tree(tmp_path / "tree", compiled=False)
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    out = python("-c", code, cwd=tree, PATH="/nowhere")
    assert out.strip().splitlines()[-1] == llmkernels.__version__


def test_without_a_compiler_it_says_so_once_and_works(tmp_path):
    tree = copy_tree(tmp_path / "tree", compiled=False)
    out = python("setup.py", "-q", "build_ext", "--inplace", cwd=tree, PATH="/nowhere", CXX="")
    assert out.count("installing the Python part only (no C++ compiler was found)") == 1
    facts = json.loads((tree / "llmkernels/_build_facts.json").read_text())
    assert facts["built"] == []
    out = python("-m", "llmkernels.cli", "check", "--dtype", "fp32", "--shape", "6x24", cwd=tree)
    assert "FAIL" not in out and "not built (no C++ compiler was found)" in out
    out = python("-m", "llmkernels.cli", "demo", "--quick", "--threads", "1", cwd=tree)
    assert "loss curves agree" in out and "nothing was swapped" in out
    for choice, message in (("cpu", "but no C++ compiler was found"), ("gpu", "expected one of auto, none, cpu, cuda")):
        out = python(
            "setup.py",
            "-q",
            "build_ext",
            "--inplace",
            cwd=tree,
            expect=1,
            PATH="/nowhere",
            CXX="",
            LLMKERNELS_BUILD=choice,
        )
        assert message in out


def _environment(folder: Path) -> Path:
    """An empty virtual environment that sees torch but not this checkout; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(torch.__file__).parent.parent
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "torch_is_there.pth").write_text(f"{packages}\n")
    return folder / "bin/python"


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip: not installed")
@pytest.mark.parametrize("choice", ("none", "cpu"))
def test_a_wheel_in_a_clean_environment(choice, tmp_path):
    if choice == "cpu" and _native.why_absent("cpu"):
        pytest.skip(f"cpu: {_native.why_absent('cpu')}")
    tree = copy_tree(tmp_path / "tree", compiled=False)
    pip = ("-m", "pip", "--disable-pip-version-check")
    python(
        *pip,
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        tmp_path,
        tree,
        cwd=tmp_path,
        LLMKERNELS_BUILD=choice,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert (f"llmkernels/_cpu{suffix}" in names) == (choice == "cpu")
    assert wheel.name.endswith("none-any.whl") == (choice == "none")
    assert not [
        name
        for name in names
        if name.split("/")[0] not in ("llmkernels", f"llmkernels-{llmkernels.__version__}.dist-info")
    ]
    interpreter = _environment(tmp_path / "venv")
    python(*pip, "--python", interpreter, "install", "-q", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    code = (
        "import torch, llmkernels; x = torch.randn(3, 8)\n"
        "print(llmkernels.__file__); print(llmkernels.explain('layer_norm', x, (8,)).chosen)\n"
        "torch.testing.assert_close(llmkernels.functional.layer_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)))"
    )
    done = run(interpreter, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, chosen = done.stdout.split()
    assert Path(where).is_relative_to(tmp_path / "venv")
    assert chosen == ("cpu" if choice == "cpu" else "torch")
