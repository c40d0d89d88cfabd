"""Interleaved timing: A B C A B C ..., so that a machine that slows down slows every candidate."""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable

import torch


def _seconds_by_clock(function: Callable[[], object], calls: int, device: str) -> float:
    """Seconds of one call as the caller sees them."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def _seconds_by_events(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call as the GPU sees them: between two events, with `calls` calls in its queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of giving it back to the system, for every candidate alike.

    A large result is otherwise mapped and cleared anew in some calls and not in others, depending on what was freed
    before, and the page faults take longer than the kernel.
    """
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold, huge = -1, -3, 1 << 30
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, huge)
        libc.mallopt(mmap_threshold, huge)


def interleave(
    candidates: dict[str, Callable[[], object]],
    device: str,
    seconds: float,
    calls: int = 1,
    *,
    overhead: bool = False,
    warm: int = 2,
    least: int = 7,
) -> dict[str, list[float]]:
    """Seconds of one call, for each round, by candidate.

    Rounds go on until `seconds` are spent, at least `least` and at most 200, after `warm` that are not counted; where
    one round takes longer than `seconds`, three are enough: noise is short beside them.
    `calls` in a row make one measurement, for functions too short to be timed alone. The order is rotated from round to
    round: what runs before a candidate decides what is in the cache. On a GPU its own events take the time, unless it
    is the `overhead` of the caller that is asked for.
    """
    by_events = device == "cuda" and not overhead
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin = None
    for round_number in range(warm + 200):
        if round_number == warm:
            begin = time.perf_counter()
        for index in range(len(names)):
            name = names[(index + round_number) % len(names)]
            function = candidates[name]
            taken = _seconds_by_events(function, calls) if by_events else _seconds_by_clock(function, calls, device)
            if round_number >= warm:
                times[name].append(taken)
        if begin is not None:
            rounds, taken = round_number - warm + 1, time.perf_counter() - begin
            if taken > seconds and rounds >= (least if taken < seconds * rounds else min(least, 3)):
                break
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median, tenth and ninetieth percentile, in milliseconds."""
    ordered = sorted(times)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
    values = {"median": statistics.median(ordered), "p10": at(0.1), "p90": at(0.9)}
    return {name: value * 1e3 for name, value in values.items()} | {"rounds": len(ordered)}


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster `fast` is: the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))
