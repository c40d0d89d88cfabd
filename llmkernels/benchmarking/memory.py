"""The most memory that a call holds at once."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_memory(function: Callable[[], Any], device: str) -> float:
    """Bytes by which a call raises the most memory that is held at once; 0 where the system does not say."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is reused and not seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    function()
    return max(0.0, _resident("VmHWM") - before)


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return float(line.split()[1]) * 1024.0
