"""The tables that rope reads, and the scalings of frequencies that take a model beyond the length it was trained on."""

import math

import torch
from torch import Tensor

from llmkernels._dtypes import FLOAT_DTYPES, dtype_names

# What each scaling has to be told, and what it may be told.
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


def _checked(scaling: dict | None, theta: float) -> tuple[str, dict]:
    """(the kind of scaling, its parameters). Hugging Face's dicts also hold the kind, under either name, and theta."""
    settings = dict(scaling or {"rope_type": "default"})
    kinds = {settings.pop(name) for name in ("rope_type", "type") if name in settings}
    if len(kinds) != 1 or not kinds <= set(_REQUIRED):
        raise ValueError(
            f"rope_cache: scaling has rope_type {sorted(map(str, kinds))}, expected one of {', '.join(_REQUIRED)}"
        )
    (kind,) = kinds
    if settings.pop("rope_theta", theta) != theta:
        raise ValueError(f"rope_cache: scaling has another rope_theta than {theta}, which is theta")
    allowed = (*_REQUIRED[kind], *_OPTIONAL.get(kind, ()))
    missing = [name for name in _REQUIRED[kind] if settings.get(name) is None]
    unknown = [name for name in settings if name not in allowed]
    if missing or unknown:
        wanted = ", ".join(_REQUIRED[kind]) or "nothing else"
        wanted += f" and perhaps {', '.join(_OPTIONAL[kind])}" if kind in _OPTIONAL else ""
        raise ValueError(f"rope_cache: {kind} scaling has {sorted(settings)}, expected {wanted}")
    if kind != "default" and not settings["factor"] >= 1.0:
        raise ValueError(f"rope_cache: factor is {settings['factor']}, expected 1 or more")
    return kind, settings


def frequencies(theta: float, dim: int, length: int, scaling: dict | None = None) -> tuple[Tensor, float]:
    """(radians from a position to the next, `[dim / 2]` fp64; the factor of cos and sin). Arguments as `rope_cache`."""
    if dim <= 0 or dim % 2:
        raise ValueError(f"rope_cache: dim is {dim}, expected an even number above zero")
    if not theta > 0.0:
        raise ValueError(f"rope_cache: theta is {theta}, expected a number above zero")
    if length < 0:
        raise ValueError(f"rope_cache: length is {length}, expected 0 or more")
    kind, settings = _checked(scaling, theta)
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = theta**-exponents
    if kind == "default":
        return plain, 1.0
    factor = float(settings["factor"])
    if kind == "linear":
        return plain / factor, 1.0
    trained = settings["original_max_position_embeddings"]
    if kind == "dynamic":
        if dim == 2:
            return plain, 1.0  # its one frequency is 1 for any theta
        stretched = factor * max(length, trained) / trained - (factor - 1.0)
        return (theta * stretched ** (dim / (dim - 2))) ** -exponents, 1.0
    if kind == "llama3":
        return _llama3(plain, factor, trained, settings), 1.0
    return _yarn(plain, theta, dim, factor, trained, settings), _yarn_attention_factor(factor, settings)


def _llama3(plain: Tensor, factor: float, trained: int, settings: dict) -> Tensor:
    """Long waves are stretched, short ones kept, and in between both are mixed."""
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    if not high > low:
        raise ValueError(f"rope_cache: high_freq_factor is {high}, expected more than low_freq_factor, {low}")
    kept = ((trained * plain / (2.0 * math.pi) - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * plain / factor + kept * plain


def _yarn(plain: Tensor, theta: float, dim: int, factor: float, trained: int, settings: dict) -> Tensor:
    """As above, with a ramp from the pair that turns `beta_fast` times in the trained length to that of `beta_slow`."""

    def pair_turning(times: float) -> float:
        return dim * math.log(trained / (times * 2.0 * math.pi)) / (2.0 * math.log(theta))

    first, last = (
        pair_turning(_given(settings, name, default)) for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if _given(settings, "truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001  # the ramp is a step
    kept = 1.0 - ((torch.arange(dim // 2, dtype=torch.float64) - first) / (last - first)).clamp(0.0, 1.0)
    return (1.0 - kept) * plain / factor + kept * plain


def _yarn_attention_factor(factor: float, settings: dict) -> float:
    """The temperature of attention, put into cos and sin."""

    def temperature(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    given, mscale, of_all = (settings.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if given is not None:
        return float(given)
    return temperature(mscale) / temperature(of_all) if mscale and of_all else temperature(1.0)


def _given(settings: dict, name: str, default):
    value = settings.get(name)
    return default if value is None else value


def rope_cache(
    theta: float,
    dim: int,
    length: int,
    *,
    scaling: dict | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each `[length, dim / 2]`: the tables of `rope` for the positions below `length`.

    Args:
        theta: the base of the frequencies, `theta ** (-2 j / dim)` for pair j; 10,000 in the paper.
        dim: how many elements of a head are turned, an even number.
        scaling: None, or a dict in the form of Hugging Face's `rope_scaling`, with `rope_type` (or `type`):
            "linear": `factor` (Chen et al. 2023, arXiv:2306.15595);
            "dynamic": `factor`, `original_max_position_embeddings`; theta grows with `length`, dynamic NTK;
            "yarn": these two, and perhaps `attention_factor`, `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim`,
            `truncate` (Peng et al. 2023, arXiv:2309.00071); its attention factor multiplies cos and sin;
            "llama3": these two, `low_freq_factor`, `high_freq_factor` (Grattafiori et al. 2024, arXiv:2407.21783);
            "default": nothing.
        dtype: of the tables; the angles are computed in fp64 whatever it is.
    Raises: ValueError or TypeError, an argument or a parameter of the scaling is missing, unknown or out of range.
    """
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"rope_cache: dtype is {dtype}, expected one of {dtype_names()}")
    each, factor = frequencies(theta, dim, length, scaling)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), each)
    return tuple((factor * table).to(dtype).to(device) for table in (angles.cos(), angles.sin()))
