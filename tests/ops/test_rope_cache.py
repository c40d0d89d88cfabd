"""rope_cache: the frequencies of each scaling, by formulas written out and beside Hugging Face's; the errors."""

import importlib
import math

import pytest
import torch

from llmkernels import functional
from llmkernels.ops.rope.cache import frequencies

THETA, DIM, LENGTH = 10000.0, 64, 40
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 2048},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "yarn of deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn not cut": {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
        "attention_factor": 1.25,
    },
    "llama3": LLAMA3,
}


def test_tables_are_cos_and_sin_of_position_times_frequency():
    cos, sin = functional.rope_cache(THETA, DIM, LENGTH)
    assert cos.shape == sin.shape == (LENGTH, DIM // 2) and cos.dtype == torch.float32
    for position in (0, 1, 17, 39):
        for pair in (0, 1, 15, 31):
            angle = position * THETA ** (-2.0 * pair / DIM)
            assert math.isclose(cos[position, pair].item(), math.cos(angle), abs_tol=1e-7)
            assert math.isclose(sin[position, pair].item(), math.sin(angle), abs_tol=1e-7)
    cos, sin = functional.rope_cache(5e5, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(cos**2 + sin**2, torch.ones(3, 4, dtype=torch.float64))


def test_linear_is_a_longer_step():
    long, short = (functional.rope_cache(THETA, DIM, n, scaling=s) for n, s in ((80, SCALINGS["linear"]), (20, None)))
    for stretched, plain in zip(long, short, strict=True):
        torch.testing.assert_close(stretched[::4], plain)


def test_dynamic_keeps_what_was_trained_and_then_stretches_the_slowest_pair():
    plain, _ = frequencies(THETA, DIM, 2048)
    assert torch.equal(frequencies(THETA, DIM, 2048, SCALINGS["dynamic"])[0], plain)
    longer, factor = frequencies(THETA, DIM, 8192, SCALINGS["dynamic"])
    assert factor == 1.0
    # (s l / L - (s - 1)) ^ (d / (d - 2)) in theta is a factor of 1 for the first pair and of 7 for the last.
    torch.testing.assert_close(longer[0], plain[0])
    torch.testing.assert_close(longer[-1], plain[-1] / 7.0)


def test_llama3_keeps_short_waves_and_divides_long_ones():
    plain, scaled = (frequencies(5e5, 128, 10, scaling)[0] for scaling in (None, LLAMA3))
    for before, after in zip(plain.tolist(), scaled.tolist(), strict=True):
        wave = 2.0 * math.pi / before
        if wave < 8192 / 4.0:
            expected = before
        elif wave > 8192 / 1.0:
            expected = before / 8.0
        else:
            smooth = (8192 / wave - 1.0) / (4.0 - 1.0)
            expected = (1.0 - smooth) * before / 8.0 + smooth * before
        assert math.isclose(after, expected, rel_tol=1e-12)


def test_yarn_by_its_formula():
    plain, (scaled, factor) = frequencies(THETA, 128, 10)[0], frequencies(THETA, 128, 10, SCALINGS["yarn"])
    assert math.isclose(factor, 0.1 * math.log(4.0) + 1.0)
    for pair, (before, after) in enumerate(zip(plain.tolist(), scaled.tolist(), strict=True)):
        low = math.floor(128 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(THETA)))
        high = math.ceil(128 * math.log(4096 / (1 * 2 * math.pi)) / (2 * math.log(THETA)))
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        assert math.isclose(after, before / 4.0 * stretched + before * (1.0 - stretched), rel_tol=1e-12)
    cos, sin = functional.rope_cache(THETA, 128, 10, scaling=SCALINGS["yarn"], dtype=torch.float64)
    torch.testing.assert_close((cos**2 + sin**2).sqrt(), torch.full_like(cos, factor))


@pytest.mark.parametrize("length", (1000, 4096, 20_000))
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_are_hugging_faces(name, length):
    pytest.importorskip("transformers")
    utils = importlib.import_module("transformers.modeling_rope_utils")
    config = importlib.import_module("transformers").LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, head_dim=DIM, max_position_embeddings=2048
    )
    scaling = SCALINGS[name]
    trained = scaling.get("original_max_position_embeddings", 2048)
    config.max_position_embeddings = trained
    config.rope_theta, config.rope_scaling = THETA, dict(scaling)
    config.rope_parameters = {**scaling, "rope_theta": THETA}
    if name == "default":
        theirs, factor = 1.0 / THETA ** (torch.arange(0, DIM, 2).double() / DIM), 1.0
    else:
        theirs, factor = utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    ours, our_factor = frequencies(THETA, DIM, length, scaling)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-6, atol=0.0)
    assert math.isclose(our_factor, factor, rel_tol=1e-9)


def test_hugging_faces_dict_may_hold_theta_and_the_old_name():
    cos, _ = functional.rope_cache(THETA, DIM, LENGTH, scaling={"type": "linear", "factor": 2, "rope_theta": THETA})
    assert torch.equal(
        cos, functional.rope_cache(THETA, DIM, LENGTH, scaling={"rope_type": "linear", "factor": 2.0})[0]
    )


def test_bad_arguments_have_one_clear_message():
    def cache(theta=THETA, dim=DIM, length=LENGTH, dtype=torch.float32, **scaling):
        return lambda: functional.rope_cache(theta, dim, length, scaling=scaling or None, dtype=dtype)

    wrong = [
        (ValueError, "dim is 7, expected an even", cache(dim=7)),
        (ValueError, "dim is 0, expected an even", cache(dim=0)),
        (ValueError, "theta is -1.0, expected", cache(theta=-1.0)),
        (ValueError, "length is -1, expected 0", cache(length=-1)),
        (TypeError, "dtype is torch.int64, expected one of", cache(dtype=torch.int64)),
        (
            ValueError,
            r"rope_type \['longrope'\], expected one of default, linear",
            cache(rope_type="longrope", factor=2),
        ),
        (ValueError, "rope_type", cache(factor=2.0)),
        (ValueError, r"linear scaling has \[\], expected factor", cache(rope_type="linear")),
        (ValueError, "expected factor", cache(rope_type="linear", factor=2.0, beta_fast=32)),
        (ValueError, "expected factor, original_max_position_embeddings", cache(rope_type="dynamic", factor=2.0)),
        (ValueError, "factor is 0.5, expected 1 or more", cache(rope_type="linear", factor=0.5)),
        (ValueError, "another rope_theta", cache(rope_type="linear", factor=2.0, rope_theta=5e5)),
        (ValueError, "high_freq_factor is 1.0, expected more", cache(**{**LLAMA3, "high_freq_factor": 1.0})),
    ]
    for error, message, wrong_call in wrong:
        with pytest.raises(error, match=f"rope_cache: .*{message}"):
            wrong_call()
