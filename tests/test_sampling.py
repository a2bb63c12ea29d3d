"""Logits -> ids: guidance by hand numbers, the cuts, the draws and their noise.

False-alarm probabilities are those over seeds; with the seeds written here every test is deterministic.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from engine import sampling
from engine.sampling import guidance_scales, guide, image_words, keep_top_k, keep_top_p, sample

INF = float("inf")

# codes 0, 1 and 16383 of images 3 and 50,000 at positions 0 and 255, under seed 2^40 + 17
PINNED = [[-0.2955066, 0.0155347, -0.8514697], [0.3765118, 1.7916515, -0.6188557]]


def ids(*values):
    return torch.tensor(values)


def gumbel_noise(seed, image_ids, positions, vocab_size):
    return sampling.gumbel_noise(image_words(seed, image_ids), positions, vocab_size)


def noise_of(seed, n, vocab_size):
    """Noise [n, 1, V] of n images at position 0."""
    return gumbel_noise(seed, torch.arange(n), torch.zeros(n, 1, dtype=torch.int64), vocab_size)


# guidance


def test_linear_guidance_scales_by_hand():
    """1 + (5 - 1) t / 4."""
    assert guidance_scales(5.0, "linear", 4).tolist() == [1.0, 2.0, 3.0, 4.0]


def test_constant_guidance_scales_by_hand():
    assert guidance_scales(5.0, "constant", 3).tolist() == [5.0, 5.0, 5.0]


def test_guide_by_hand():
    """Two places with their own scales: uncond + s (cond - uncond)."""
    cond, uncond = torch.tensor([[[1.0, 3.0], [0.0, 4.0]]]), torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    expected = torch.tensor([[[0.5, 4.0], [-1.0, 7.0]]])
    assert torch.equal(guide(cond, uncond, torch.tensor([1.5, 2.0])), expected)


def test_guidance_of_scale_one_is_the_conditional_branch():
    cond, uncond = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[2.0, 1.0]]])
    assert torch.equal(guide(cond, uncond, torch.ones(1)), cond)


# the cuts


def test_top_k_keeps_the_k_largest():
    logits = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert keep_top_k(logits, 2).tolist() == [3.0, -INF, -INF, 5.0]


@pytest.mark.parametrize("k", [0, 4, 9])
def test_top_k_of_zero_or_of_the_codebook_keeps_all(k):
    logits = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert torch.equal(keep_top_k(logits, k), logits)


@pytest.mark.parametrize(
    "p, kept",
    [(0, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1, [0, 1, 2, 3])],
)
def test_top_p_by_hand(p, kept):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert keep_top_p(logits, p).isfinite().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_least_sufficient_set(p):
    """The kept probability reaches p, without its least code it does not, and no code left out is likelier
    than a kept one. 1e-5: cumulative fp32 sums over 500 codes."""
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(0)) * 3
    kept = keep_top_p(logits, p).isfinite()
    probability = logits.double().softmax(dim=-1)
    least = probability.masked_fill(~kept, 1.0).amin(dim=-1)
    total = probability.masked_fill(~kept, 0.0).sum(dim=-1)
    assert (total >= p - 1e-5).all()
    assert (total - least < p + 1e-5).all()
    assert (probability.masked_fill(kept, 0.0).amax(dim=-1) <= least).all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_what_a_sort_keeps(p):
    """In float64; a boundary within 1e-6 of p, where float32 may decide otherwise, is left out."""
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(1)) * 3
    ranked, index = logits.double().softmax(dim=-1).sort(dim=-1, descending=True)
    before = ranked.cumsum(dim=-1) - ranked  # of the codes ranked above
    clear = ((before - p).abs() > 1e-6).all(dim=-1)
    expected = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before < p)
    assert clear.sum() > 190
    assert torch.equal(keep_top_p(logits, p).isfinite()[clear], expected[clear])


@pytest.mark.parametrize(
    "cut", [partial(keep_top_p, p=0.5), partial(keep_top_k, k=2)], ids=["top_p", "top_k"]
)
def test_codes_equal_to_the_last_kept_are_kept_too(cut):
    """0.4 and one 0.2 are the least sufficient set, and the two largest."""
    assert cut(torch.tensor([0.2, 0.4, 0.2, 0.2]).log()).isfinite().all()
    assert cut(torch.tensor([0.2, 0.4, 0.3, 0.1]).log()).isfinite().sum() == 2


# sample


def test_temperature_zero_is_argmax():
    logits = torch.randn(50, 3, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, None, temperature=0), logits.argmax(dim=-1))


def test_top_k_one_is_argmax():
    logits = torch.randn(50, 1, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, noise_of(0, 50, 20), top_k=1), logits.argmax(dim=-1))


def test_top_p_zero_is_argmax():
    logits = torch.randn(50, 1, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits, noise_of(0, 50, 20), top_p=0.0), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 0.5, "top_p": 0.8}, [16 / 25, 9 / 25, 0, 0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "top_p_after_temperature"],
)
def test_draws_follow_the_softmax(settings, expected):
    """Chi-square over 200,000 images; false alarm 1e-6 a case."""
    n = 200_000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(n, 1, 4)
    counts = torch.bincount(sample(logits, noise_of(1, n, 4), **settings).flatten(), minlength=4).numpy()
    possible = np.array(expected) > 0
    assert counts[~possible].sum() == 0
    assert stats.chisquare(counts[possible], n * np.array(expected)[possible]).pvalue > 1e-6


def test_draws_over_a_large_codebook_follow_the_softmax():
    """Chi-square of 3000 draws of 4096 codes, in 64 random sets of codes; false alarm 1e-6. Here the noises
    of many codes compete, above only four."""
    n, vocab_size = 3000, 4096
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits.expand(n, 1, vocab_size), noise_of(2, n, vocab_size)).flatten().numpy()
    probability = logits.double().softmax(dim=-1).numpy()
    parts = np.array_split(np.random.default_rng(0).permutation(vocab_size), 64)
    counts = np.bincount(drawn, minlength=vocab_size)
    observed, expected = ([values[part].sum() for part in parts] for values in (counts, n * probability))
    assert stats.chisquare(observed, expected).pvalue > 1e-6


# the noise


def test_noise_is_standard_gumbel():
    """Kolmogorov-Smirnov over a million values, whose steps of 2^-23 it cannot see; false alarm 1e-6."""
    noise = gumbel_noise(3, torch.arange(16), torch.arange(64).repeat(16, 1), 1024)
    assert stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-6


def test_noise_of_an_image_does_not_depend_on_the_batch():
    positions = torch.arange(12).view(3, 4)
    batch = gumbel_noise(4, ids(7, 0, 12345), positions, 50)
    for i, image_id in enumerate((7, 0, 12345)):
        assert torch.equal(gumbel_noise(4, ids(image_id), positions[i : i + 1], 50)[0], batch[i])


def test_noise_of_a_position_does_not_depend_on_the_group():
    whole = gumbel_noise(4, ids(7), torch.arange(8)[None], 50)
    assert torch.equal(gumbel_noise(4, ids(7), ids(5, 2)[None], 50)[0], whole[0, [5, 2]])


def test_noise_of_a_code_does_not_depend_on_the_codebook():
    assert torch.equal(noise_of(4, 2, 20), noise_of(4, 2, 50)[..., :20])


@pytest.mark.parametrize(
    "seed, image_id, position",
    [(1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 2**32, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)],
)
def test_noise_differs_between_seeds_images_and_positions(seed, image_id, position):
    """Of 10,000 values, two noises have one in common 1 in 800 times, and three 1 in 3e9 times."""
    a = gumbel_noise(0, ids(0), ids(0)[None], 10_000)
    b = gumbel_noise(seed, ids(image_id), ids(position)[None], 10_000)
    assert (a == b).sum() < 3


def neighbours(kind):
    """Two float arrays of 2^20 noises, uniform in (0, 1), each of the second beside one of the first."""
    images, positions = torch.arange(64), torch.arange(64).repeat(64, 1)
    first = gumbel_noise(5, images, positions, 256)
    second = {
        "image": lambda: gumbel_noise(5, images + 1, positions, 256),
        "position": lambda: gumbel_noise(5, images, positions + 1, 256),
        "code": lambda: gumbel_noise(5, images, positions, 257)[..., 1:],
        "seed": lambda: gumbel_noise(6, images, positions, 256),
        "image and position": lambda: gumbel_noise(5, images + 1, positions - 1 + 64, 256),
    }[kind]()
    return [(-(-noise).exp()).exp().flatten().double().numpy() for noise in (first, second)]


@pytest.mark.parametrize("kind", ["image", "position", "code", "seed", "image and position"])
def test_noises_of_neighbours_are_uncorrelated(kind):
    """Of 2^20 pairs the coefficient has standard deviation 2^-10; false alarm (6 of them) 2e-9."""
    assert abs(np.corrcoef(*neighbours(kind))[0, 1]) < 6 / math.sqrt(2**20)


@pytest.mark.parametrize("kind", ["image", "position", "code", "seed", "image and position"])
def test_noises_of_neighbours_are_independent(kind):
    """Chi-square of the 2^20 pairs over 32 x 32 equal cells: sees what a correlation does not; false alarm
    1e-6."""
    counts, *_ = np.histogram2d(*neighbours(kind), bins=32, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.flatten()).pvalue > 1e-6


def test_noise_is_finite_and_reaches_far_into_the_tail():
    """Four million values. All lie below 11 with probability exp(-70), and none can lie above 24 log 2."""
    noise = gumbel_noise(6, torch.arange(64), torch.arange(256).repeat(64, 1), 256)
    assert noise.isfinite().all()
    assert 11 < noise.max() <= 24 * math.log(2) + 1e-5


def test_noise_is_the_same_in_every_version():
    """A changed hash would change every image of a seed. Relative 1e-5: two logarithms in fp32."""
    noise = gumbel_noise(2**40 + 17, ids(3, 50_000), ids(0, 255)[:, None], 16384)
    torch.testing.assert_close(noise[:, 0, [0, 1, 16383]], torch.tensor(PINNED), rtol=1e-5, atol=1e-6)
