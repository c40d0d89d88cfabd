"""Facts about the machine that belong beside every measurement."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import llmkernels
from llmkernels import _native


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def cache_sizes() -> dict[str, int]:
    """Bytes of each data cache that one core sees, by level ("1", "2", "3"); empty where the system does not say."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            text = (index / "size").read_text().strip()
            factor = {"K": 2**10, "M": 2**20}.get(text[-1], 1)
            sizes[(index / "level").read_text().strip()] = int(text.rstrip("KM")) * factor
    return sizes


def _commit() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    run = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


def facts() -> dict:
    """CPU, caches, GPU, versions and date, ready for JSON."""
    cpu = _native.module("cpu")
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cache_bytes": cache_sizes(),
        "isa": cpu.isa() if cpu else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llmkernels": llmkernels.__version__,
        "commit": _commit(),
    }
