"""The fast path gives what the plain one gives; trajectories are captured seldom and kept few."""

import pytest
import torch

from engine.fast_generate import FastGenerator
from engine.generate import generate_images, generate_tokens
from models.packed import packed
from orders.lpd_order import make_orders
from util import dist

GROUPS = (1, 3, 5, 7)
MODES = {
    "plain": {},
    "greedy": {"temperature": 0},
    "guided": {"cfg": 3.0, "temperature": 0.9},
    "constant": {"cfg": 2.0, "cfg_schedule": "constant"},
    "cut": {"top_k": 9, "top_p": 0.8},
}


def examples(n, first=0):
    """Labels, orders and image ids of images first..first+n-1."""
    ids = torch.arange(first, first + n)
    orders = make_orders("lpd", n, GROUPS, 4, image_ids=ids.numpy()).astype("int64")
    return ids % 5, torch.from_numpy(orders), ids


class CountingCapture:
    """Stands for `dist.GraphCapture`: counts, and like a graph hands out the same memory at each replay."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function):
        self.captured += 1
        output = function().clone()

        def replay():
            self.replayed += 1
            return output.copy_(function())

        return replay


@pytest.fixture
def fast(tiny_lpd, tiny_vq):
    return FastGenerator(tiny_lpd, tiny_vq, capture=CountingCapture())


# the same results


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_fast_tokens_are_the_plain_ones(tiny_lpd, fast, settings):
    labels, order, ids = examples(3, first=7)
    settings = {**settings, "seed": 5, "image_ids": ids}
    expected = generate_tokens(tiny_lpd, labels, order, GROUPS, **settings)
    assert torch.equal(fast.generate_tokens(labels, order, GROUPS, **settings), expected)


def test_fast_images_are_the_plain_ones(tiny_lpd, tiny_vq, fast):
    labels, order, _ = examples(3)
    expected = generate_images(tiny_lpd, tiny_vq, labels, order, GROUPS, cfg=3.0)
    assert torch.equal(fast.generate_images(labels, order, GROUPS, cfg=3.0), expected)


def test_logits_with_packed_linears_are_the_plain_ones(tiny_lpd):
    """1e-5: the same fp32 products in another order; logits are of size 1."""
    labels, order, _ = examples(3)
    tokens = torch.arange(48).view(3, 16) % 32
    with torch.inference_mode():
        logits = [model(tokens, labels, order, GROUPS) for model in (tiny_lpd, packed(tiny_lpd))]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_packing_leaves_the_model_as_it_was(tiny_lpd):
    names = [type(module) for module in tiny_lpd.modules()]
    copy = packed(tiny_lpd)
    assert [type(module) for module in tiny_lpd.modules()] == names
    assert copy.pos_embed is tiny_lpd.pos_embed


def test_what_came_before_leaves_no_trace(tiny_lpd, fast):
    """Inputs, noise and cache of one call are in the same memory as those of the call before."""
    for first, seed in ((0, 0), (9, 1), (4, 2)):
        labels, order, ids = examples(3, first)
        settings = {"seed": seed, "image_ids": ids, "cfg": 3.0}
        expected = generate_tokens(tiny_lpd, labels, order, GROUPS, **settings)
        assert torch.equal(fast.generate_tokens(labels, order, GROUPS, **settings), expected)
    assert fast.capture.captured == 1


def test_a_result_outlives_the_next_call(fast):
    first = fast.generate_tokens(*examples(2)[:2], GROUPS, seed=0)
    kept = first.clone()
    fast.generate_tokens(*examples(2)[:2], GROUPS, seed=1)
    assert torch.equal(first, kept)


def test_a_callback_takes_the_plain_path(fast):
    filled = []
    fast.generate_tokens(*examples(2)[:2], GROUPS, on_group=lambda tokens, slots: filled.append(slots))
    fast.generate_images(*examples(2)[:2], GROUPS, on_group=lambda tokens, slots: filled.append(slots))
    assert filled == [1, 4, 9, 16] * 2 and fast.capture.captured == 0


# what is captured


def test_a_partial_batch_is_padded_and_gives_the_same_images(tiny_lpd, fast):
    settings = {"cfg": 3.0, "seed": 3}
    whole = torch.cat([
        fast.generate_tokens(*examples(n, first)[:2], GROUPS, image_ids=examples(n, first)[2], **settings)
        for first, n in ((0, 4), (4, 4), (8, 3), (11, 1))
    ])  # fmt: skip
    labels, order, ids = examples(12)
    assert torch.equal(whole, generate_tokens(tiny_lpd, labels, order, GROUPS, image_ids=ids, **settings))
    assert fast.capture.captured == 1


def test_a_batch_is_padded_to_the_least_that_fits(fast):
    for n, captured in ((1, 1), (4, 2), (8, 3), (3, 3), (1, 3)):
        fast.generate_tokens(*examples(n)[:2], GROUPS)
        assert fast.capture.captured == captured
    assert [batch for batch, _ in fast.trajectories] == [8, 4, 1]


@pytest.mark.parametrize(
    "other",
    [{"cfg": 2.0}, {"cfg_schedule": "constant"}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.5}],
)
def test_other_settings_are_captured_by_themselves(fast, other):
    fast.generate_tokens(*examples(2)[:2], GROUPS, cfg=3.0)
    fast.generate_tokens(*examples(2)[:2], GROUPS, **{"cfg": 3.0, **other})
    fast.generate_tokens(*examples(2)[:2], GROUPS, cfg=3.0)
    assert fast.capture.captured == 2


def test_images_and_tokens_are_captured_apart(fast):
    fast.generate_tokens(*examples(2)[:2], GROUPS)
    fast.generate_images(*examples(2)[:2], GROUPS)
    assert fast.capture.captured == 2


def test_the_store_is_bounded_and_drops_what_was_unused_for_longest(tiny_lpd):
    fast = FastGenerator(tiny_lpd, capacity=2, capture=CountingCapture())
    for temperature, captured in ((1.0, 1), (0.9, 2), (1.0, 2), (0.8, 3), (1.0, 3), (0.9, 4)):
        fast.generate_tokens(*examples(2)[:2], GROUPS, temperature=temperature)
        assert fast.capture.captured == captured and len(fast.trajectories) <= 2


def test_a_refused_call_captures_nothing(fast):
    with pytest.raises(ValueError, match="sum to 15"):
        fast.generate_tokens(*examples(2)[:2], (1, 3, 5, 6))
    assert fast.capture.captured == 0 and not fast.trajectories


def test_off_a_gpu_capture_returns_the_function():
    def function():
        return 1

    assert dist.GraphCapture(torch.device("cpu"))(function) is function
