"""Logits -> token ids. Seeds are fixed; a false alarm is the probability over all seeds."""

import math
from functools import partial

import numpy as np
import pytest
import scipy  # its parts are imported when they are used
import torch

from engine import sampling
from engine.sampling import Sampling, guidance_scales, guide, image_words, keep_top_k, keep_top_p, sample

INF = float("inf")

# codes 0, 1 and 16383 of images 3 and 50,000 at positions 0 and 255, under seed 2^40 + 17
PINNED = [[-0.2955066, 0.0155347, -0.8514697], [0.3765118, 1.7916515, -0.6188557]]


def gumbel_noise(seed, image_ids, positions, vocab_size):
    return sampling.gumbel_noise(image_words(seed, image_ids), positions, vocab_size)


def noise_of(seed, n, vocab_size):
    """Noise [n, 1, V] of n images at position 0."""
    return gumbel_noise(seed, torch.arange(n), torch.zeros(n, 1, dtype=torch.int64), vocab_size)


# Guidance.


@pytest.mark.parametrize("schedule, scales", [("linear", [1, 2, 3, 4]), ("constant", [5, 5, 5, 5])])
def test_guidance_scales_by_hand(schedule, scales):
    """Linear: 1 + (5 - 1) t / 4."""
    assert guidance_scales(Sampling(cfg=5.0, cfg_schedule=schedule), 4).tolist() == scales


def test_guide_by_hand():
    """Two slots with their own scales: uncond + s (cond - uncond); scale 1 is the conditional branch."""
    cond, uncond = torch.tensor([[[1.0, 3.0], [0.0, 4.0]]]), torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    expected = torch.tensor([[[0.5, 4.0], [-1.0, 7.0]]])
    assert torch.equal(guide(cond, uncond, torch.tensor([1.5, 2.0])), expected)
    assert torch.equal(guide(cond, uncond, torch.ones(2)), cond)


def test_unknown_guidance_schedule_is_refused():
    with pytest.raises(ValueError, match="'cosine', not linear or constant"):
        Sampling(cfg_schedule="cosine")


# Top-k and top-p.


@pytest.mark.parametrize("k, kept", [(2, [0, 3]), (0, [0, 1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])])
def test_top_k_by_hand(k, kept):
    logits = torch.tensor([3.0, 1.0, 2.0, 5.0])
    cut = keep_top_k(logits, k)
    assert cut.isfinite().nonzero().flatten().tolist() == kept
    assert torch.equal(cut[kept], logits[kept])


@pytest.mark.parametrize(
    "p, kept",
    [(0, [1]), (0.49, [1]), (0.51, [1, 3]), (0.79, [1, 3]), (0.81, [0, 1, 3]), (1, [0, 1, 2, 3])],
)
def test_top_p_by_hand(p, kept):
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log()
    assert keep_top_p(logits, p).isfinite().nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_equals_sorting(p):
    """In float64. Rows with a boundary within 1e-6 of p, where float32 may decide otherwise, are left out."""
    logits = torch.randn(200, 500, generator=torch.Generator().manual_seed(1)) * 3
    ranked, index = logits.double().softmax(dim=-1).sort(dim=-1, descending=True)
    before = ranked.cumsum(dim=-1) - ranked  # probability of the codes ranked above
    clear = ((before - p).abs() > 1e-6).all(dim=-1)
    expected = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before < p)
    assert clear.sum() > 190
    assert torch.equal(keep_top_p(logits, p).isfinite()[clear], expected[clear])


@pytest.mark.parametrize("cut", [partial(keep_top_p, p=0.5), partial(keep_top_k, k=2)])
def test_ties_at_the_threshold_are_kept(cut):
    """0.4 and one 0.2 reach 0.5, and are the two largest."""
    assert cut(torch.tensor([0.2, 0.4, 0.2, 0.2]).log()).isfinite().all()
    assert cut(torch.tensor([0.2, 0.4, 0.3, 0.1]).log()).isfinite().sum() == 2


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.0}], ids=str)
def test_sampling_can_be_greedy(settings):
    logits = torch.randn(50, 1, 20, generator=torch.Generator().manual_seed(0))
    noise = None if "temperature" in settings else noise_of(0, 50, 20)
    assert torch.equal(sample(logits, noise, Sampling(**settings)), logits.argmax(dim=-1))


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.8}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 0.5, "top_p": 0.8}, [16 / 25, 9 / 25, 0, 0]),  # temperature comes first
    ],
    ids=str,
)
def test_draws_follow_the_softmax(settings, expected):
    """Chi-square over 200,000 images; false alarm 1e-6 per case."""
    n = 200_000
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(n, 1, 4)
    drawn = sample(logits, noise_of(1, n, 4), Sampling(**settings)).flatten()
    counts = torch.bincount(drawn, minlength=4).numpy()
    possible = np.array(expected) > 0
    assert counts[~possible].sum() == 0
    assert scipy.stats.chisquare(counts[possible], n * np.array(expected)[possible]).pvalue > 1e-6


def test_draws_from_a_large_codebook_follow_the_softmax():
    """Chi-square of 3000 draws of 4096 codes in 64 random sets of codes; false alarm 1e-6."""
    n, vocab_size = 3000, 4096
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits.expand(n, 1, vocab_size), noise_of(2, n, vocab_size), Sampling()).flatten().numpy()
    probability = logits.double().softmax(dim=-1).numpy()
    parts = np.array_split(np.random.default_rng(0).permutation(vocab_size), 64)
    counts = np.bincount(drawn, minlength=vocab_size)
    observed, expected = ([values[part].sum() for part in parts] for values in (counts, n * probability))
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-6


def test_noise_is_standard_gumbel():
    """Kolmogorov-Smirnov over a million values; false alarm 1e-6. None can lie above 24 log 2, and all lie
    below 11 with probability exp(-17)."""
    noise = gumbel_noise(3, torch.arange(16), torch.arange(64).repeat(16, 1), 1024)
    assert scipy.stats.kstest(noise.flatten().numpy(), "gumbel_r").pvalue > 1e-6
    assert noise.isfinite().all() and 11 < noise.max() <= 24 * math.log(2) + 1e-5


def test_noise_depends_on_neither_batch_nor_group_nor_codebook():
    positions = torch.arange(12).view(3, 4)
    batch = gumbel_noise(4, torch.tensor([7, 0, 12345]), positions, 50)
    for i, image_id in enumerate((7, 0, 12345)):
        alone = gumbel_noise(4, torch.tensor([image_id]), positions[i : i + 1], 50)
        assert torch.equal(alone[0], batch[i])
    part = gumbel_noise(4, torch.tensor([7]), torch.tensor([[3, 1]]), 20)
    assert torch.equal(part[0], batch[0, [3, 1], :20])


@pytest.mark.parametrize(
    "seed, image, position, code",
    [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 1, 9, 0), (0, 2**32, 0, 0),
     (2**32, 0, 0, 0)],
)
def test_noises_are_independent(seed, image, position, code):
    """2^20 pairs: correlation (6 sigma, false alarm 2e-9), chi-square over 32 x 32 equal cells (1e-6)."""
    images, positions = torch.arange(64), torch.arange(64).repeat(64, 1)
    first = gumbel_noise(5, images, positions, 256)
    second = gumbel_noise(5 + seed, images + image, positions + position, 256 + code)[..., code:]
    a, b = ((-(-noise).exp()).exp().flatten().double().numpy() for noise in (first, second))
    assert abs(np.corrcoef(a, b)[0, 1]) < 6 / math.sqrt(2**20)
    counts, *_ = np.histogram2d(a, b, bins=32, range=[[0, 1], [0, 1]])
    assert scipy.stats.chisquare(counts.flatten()).pvalue > 1e-6


def test_noise_is_the_same_in_every_version():
    """A changed hash would change every image of a seed. Relative 1e-5: two logarithms in fp32."""
    noise = gumbel_noise(2**40 + 17, torch.tensor([3, 50_000]), torch.tensor([[0], [255]]), 16384)
    torch.testing.assert_close(noise[:, 0, [0, 1, 16383]], torch.tensor(PINNED), rtol=1e-5, atol=1e-6)
