"""Timing that can be trusted: answers checked first, candidates interleaved, ratios pair by pair."""
