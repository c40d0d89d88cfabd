"""Decide whether to compile; CMakeLists.txt decides how.

LLMKERNELS_BUILD: auto (default: what the tools at hand allow), none (Python only), cpu, cuda (both; fails without
nvcc). LLMKERNELS_TORCH_ROOT: the torch package to compile against, if it is not the one of this interpreter.
LLMKERNELS_BUILD_TESTS=1, for builds in place: also the kernels of AMX with its instructions emulated, and where nvcc is
the emulated CUDA runtime of tests/ptxsim.
LLMKERNELS_CMAKE_ARGS: more arguments for CMake. MAX_JOBS: how many compilers run at once.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda")


def build_choice() -> str:
    choice = os.environ.get("LLMKERNELS_BUILD", "auto")
    if choice not in CHOICES:
        raise SystemExit(f"LLMKERNELS_BUILD is {choice!r}, expected one of {', '.join(CHOICES)}")
    return choice


def torch_root() -> Path | None:
    """The torch package, found without importing it, also from inside pip's build isolation."""
    if os.environ.get("LLMKERNELS_TORCH_ROOT"):
        return Path(os.environ["LLMKERNELS_TORCH_ROOT"])
    spec = importlib.util.find_spec("torch")
    candidates = [Path(spec.origin).parent] if spec and spec.origin else []
    candidates += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    return next((path for path in candidates if (path / "include").is_dir()), None)


def torch_version(root: Path) -> str:
    return re.search(r"__version__ = ['\"]([^'\"]+)", (root / "version.py").read_text()).group(1)


def find_nvcc() -> str | None:
    default = Path("/usr/local/cuda/bin/nvcc")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or (str(default) if default.exists() else None)


def missing_tool(choice: str) -> str | None:
    """Why nothing can be compiled, or None."""
    if choice == "none":
        return "LLMKERNELS_BUILD=none"
    if not (os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")):
        return "no C++ compiler was found"
    if not shutil.which("cmake"):
        return "cmake was not found"
    if torch_root() is None:
        return "torch was not found"
    return None


class CMakeBuild(build_ext):
    """Runs CMake; without the tools it says so once and leaves a Python-only package."""

    def run(self):
        choice, reason = build_choice(), missing_tool(build_choice())
        package = ROOT / "llmkernels" if self.inplace else Path(self.build_lib) / "llmkernels"
        package.mkdir(parents=True, exist_ok=True)
        if reason is not None:
            if choice in ("cpu", "cuda"):
                raise SystemExit(f"llmkernels: LLMKERNELS_BUILD={choice}, but {reason}")
            print(f"llmkernels: installing the Python part only ({reason}); every op runs on the torch backend")
            facts = {"built": [], "absent": {"cpu": reason, "cuda": reason}}
        else:
            facts = self.compile(package, choice)
        (package / "_build_facts.json").write_text(json.dumps(facts, indent=1) + "\n")

    def compile(self, package: Path, choice: str) -> dict:
        root = torch_root()
        version, nvcc = torch_version(root), find_nvcc() if choice != "cpu" else None
        if choice == "cuda" and nvcc is None:
            raise SystemExit("llmkernels: LLMKERNELS_BUILD=cuda, but nvcc was not found")
        folder = f"{sys.implementation.cache_tag}-torch{version}".replace("+", "-")
        build = Path(os.environ.get("LLMKERNELS_BUILD_DIR", ROOT / "build")) / folder
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DTORCH_ROOT={root}", f"-DTORCH_VERSION={version}"]
        configure += [f"-DPYBIND11_INCLUDE={self.pybind11_include()}", f"-DPACKAGE_DIR={package.resolve()}"]
        configure += [f"-DPYTHON_INCLUDE={sysconfig.get_path('include')}"]
        configure += [f"-DMODULE_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}"]
        configure += [f"-DLLMKERNELS_TESTS={'ON' if self.inplace else 'OFF'}"]
        for_tests = self.inplace and os.environ.get("LLMKERNELS_BUILD_TESTS", "0") == "1"
        configure += [f"-DLLMKERNELS_AMX_EMULATED={'ON' if for_tests else 'OFF'}"]
        configure += [f"-DLLMKERNELS_NVCC={nvcc or ''}", *shlex.split(os.environ.get("LLMKERNELS_CMAKE_ARGS", ""))]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        quiet = {} if self.verbose else {"stdout": subprocess.DEVNULL}
        subprocess.run(configure, check=True, **quiet)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        simulator = for_tests and nvcc is not None
        targets = ["all", "ptxsim"] if simulator else ["all"]
        subprocess.run(["cmake", "--build", str(build), "-j", jobs, "--target", *targets], check=True, **quiet)
        for folder in [build, build / "tests" / "ptxsim" / "runtime"] if simulator else [build]:
            subprocess.run(["cmake", "--install", str(folder)], check=True, stdout=subprocess.DEVNULL)
        built = ["cpu", "cuda"] if nvcc else ["cpu"]
        reason = "LLMKERNELS_BUILD=cpu" if choice == "cpu" else "nvcc was not found"
        absent = {} if nvcc else {"cuda": reason}
        return {"torch": version, "built": built, "absent": absent, "nvcc": bool(nvcc)}

    @staticmethod
    def pybind11_include() -> str:
        spec = importlib.util.find_spec("pybind11")
        if spec is None:
            raise SystemExit("llmkernels: pybind11 was not found: `pip install 'pybind11>=3.0' ninja`")
        return str(Path(spec.origin).parent / "include")

    def get_outputs(self):
        return []


# One nominal extension makes setuptools run build_ext and mark the wheel as belonging to this platform.
extensions = [] if build_choice() == "none" else [Extension("llmkernels._cpu", sources=[])]
setup(ext_modules=extensions, cmdclass={"build_ext": CMakeBuild})
