"""Parallel decoding: what is asked of the model, and that an image belongs to its number alone."""

from types import SimpleNamespace

import pytest
import torch

from engine.generate import generate_images, generate_tokens
from models.lpd import NO_LABEL
from orders.lpd_order import make_orders

GROUPS = (1, 3, 5, 7)


def orders_of(image_ids, kind="lpd"):
    return torch.from_numpy(make_orders(kind, len(image_ids), GROUPS, 4, image_ids=image_ids).astype("int64"))


class MockModel:
    """Has the methods `generate_tokens` uses, known logits, and a record of what it was asked.

    With a label, position p of 16 has code `(5 * p + 1) % 32` as the likeliest. Without one, all codes alike.
    A row of a context is the label or the code it stands for, the place it has (-1 for the label), and
    whether its branch has a label.
    """

    config = SimpleNamespace(num_tokens=16)
    pos_embed = torch.zeros(1)

    def __init__(self, cond=None, uncond=None):
        likeliest = torch.nn.functional.one_hot((5 * torch.arange(16) + 1) % 32, 32).float()
        self.cond = likeliest if cond is None else cond  # [L, V]
        self.uncond = torch.zeros_like(self.cond) if uncond is None else uncond  # [L, V]
        self.caches, self.contexts, self.positions = [], [], []

    def new_kv_cache(self, batch):
        self.caches.append(batch)
        return object()

    def embed_labels(self, labels):
        self.has_label = labels != NO_LABEL
        return torch.stack([labels, torch.full_like(labels, -1)], dim=-1)[:, None]

    def embed_tokens(self, tokens, positions):
        return torch.stack([tokens, positions], dim=-1)

    def query_table(self):
        return torch.arange(16)[:, None]

    def predict(self, context, queries, kv_cache):
        """queries are the places themselves [B, n, 1]."""
        positions = queries[..., 0]
        self.contexts.append(context)
        self.positions.append(positions)
        return torch.where(self.has_label[:, None, None], self.cond[positions], self.uncond[positions])


def generate(model, n=3, **settings):
    order = orders_of(range(n))
    return generate_tokens(model, torch.arange(n) % 5, order, GROUPS, **{"temperature": 0, **settings}), order


# what is asked of the model


@pytest.mark.parametrize("kind", ["lpd", "random", "raster", "halton"])
def test_each_position_is_generated_exactly_once_in_order(kind):
    model, order = MockModel(), orders_of(range(3), kind)
    generate_tokens(model, torch.arange(3), order, GROUPS)
    assert [positions.shape[1] for positions in model.positions] == list(GROUPS)
    assert torch.equal(torch.cat(model.positions, dim=1), order)
    assert torch.equal(torch.cat(model.positions, dim=1).sort(dim=1).values, torch.arange(16).expand(3, 16))


def test_tokens_come_back_in_raster_order():
    tokens, _ = generate(MockModel())
    assert torch.equal(tokens, ((5 * torch.arange(16) + 1) % 32).expand(3, 16))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_the_context_of_a_step_is_the_group_before_with_its_places(cfg):
    model = MockModel()
    tokens, order = generate(model, cfg=cfg)
    assert torch.equal(model.contexts[0][:3, 0], torch.tensor([[0, -1], [1, -1], [2, -1]]))
    for context, positions in zip(model.contexts[1:], model.positions, strict=False):
        group = torch.stack([tokens.gather(1, positions[:3]), positions[:3]], dim=-1)
        assert torch.equal(context, group.repeat(len(context) // 3, 1, 1))


def test_guidance_one_computes_no_unconditional_branch():
    model = MockModel()
    generate(model, cfg=1.0)
    assert model.caches == [3] and all(len(context) == 3 for context in model.contexts)


def test_guidance_computes_a_branch_without_labels_beside_the_other():
    model = MockModel()
    generate(model, cfg=4.0)
    assert model.caches == [6] and all(len(context) == 6 for context in model.contexts)
    assert model.has_label.tolist() == [True] * 3 + [False] * 3
    assert all(torch.equal(positions[:3], positions[3:]) for positions in model.positions)


@pytest.mark.parametrize(
    "cfg, schedule, first", [(1.0, "linear", 16), (5.0, "linear", 7), (5.0, "constant", 0)]
)
def test_guidance_acts_by_slot(cfg, schedule, first):
    """Code 0 leads by 2.5 without a label and by 1.5 with one: by 2.5 - s under guidance s, so code 1 leads
    where s > 2.5. Linear: 1 + 4 t / 16 > 2.5 from slot 7 on (slot 6 is a tie, which argmax gives to code 0).
    """
    model = MockModel(torch.tensor([1.5, 0.0]).expand(16, 2), torch.tensor([2.5, 0.0]).expand(16, 2))
    tokens, order = generate(model, cfg=cfg, cfg_schedule=schedule)
    assert torch.equal(tokens.gather(1, order), (torch.arange(16) >= first).long().expand(3, 16))


# images and their numbers


@pytest.mark.parametrize(
    "settings",
    [{}, {"cfg": 3.0}, {"top_k": 5, "top_p": 0.9, "temperature": 0.8}],
    ids=["plain", "guided", "cut"],
)
def test_an_image_is_the_same_for_batch_sizes_1_3_and_8(tiny_lpd, settings):
    def generate_in_batches(size):
        batches = torch.arange(8).split(size)
        return torch.cat([
            generate_tokens(tiny_lpd, b % 5, orders_of(b.numpy()), GROUPS, seed=3, image_ids=b, **settings)
            for b in batches
        ])  # fmt: skip

    whole = generate_in_batches(8)
    assert torch.equal(generate_in_batches(1), whole)
    assert torch.equal(generate_in_batches(3), whole)


def test_images_are_numbered_from_zero_unless_told(tiny_lpd):
    order = orders_of(range(3))
    labels = torch.arange(3)
    named = generate_tokens(tiny_lpd, labels, order, GROUPS, image_ids=torch.arange(3))
    assert torch.equal(generate_tokens(tiny_lpd, labels, order, GROUPS), named)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"image_ids": torch.tensor([9, 10, 11])}], ids=["seed", "image_ids"]
)
def test_seed_and_image_number_decide_the_noise(tiny_lpd, other):
    labels, order = torch.zeros(3, dtype=torch.int64), orders_of([0, 0, 0])
    a, b = (generate_tokens(tiny_lpd, labels, order, GROUPS, **settings) for settings in ({}, other))
    assert (a != b).any(dim=1).all()
    assert (a[0] != a[1]).any()


def test_greedy_tokens_are_the_likeliest_of_the_masked_pass(tiny_lpd):
    """Holds for the whole path: order, context, cache and scatter. Ties have probability 0."""
    labels, order = torch.arange(3), orders_of(range(3))
    tokens = generate_tokens(tiny_lpd, labels, order, GROUPS, temperature=0)
    with torch.no_grad():
        logits = tiny_lpd(tokens, labels, order, GROUPS)
    assert torch.equal(logits.argmax(dim=-1), tokens.gather(1, order))


# the callback


def test_on_group_is_called_once_a_group_with_what_is_there():
    seen = []
    tokens, order = generate(
        MockModel(), on_group=lambda tokens, filled: seen.append((tokens.clone(), filled))
    )
    assert [filled for _, filled in seen] == [1, 4, 9, 16]
    for partial, filled in seen:
        there = torch.zeros(3, 16, dtype=torch.bool).scatter(1, order[:, :filled], True)
        assert torch.equal(partial[there], tokens[there])
        assert (partial[~there] == 0).all()


# what is refused


@pytest.mark.parametrize(
    "change, message",
    [
        ({"order": torch.arange(15).repeat(2, 1)}, r"order is \[2, 15\], needed is \[2, 16\]"),
        ({"order": torch.arange(16).repeat(3, 1)}, r"order is \[3, 16\], needed is \[2, 16\]"),
        ({"group_sizes": (1, 3, 5, 6)}, "sum to 15, .* 16 tokens"),
        ({"group_sizes": (1, 0, 8, 7)}, r"1 or more, not \[1, 0, 8, 7\]"),
        ({"group_sizes": ()}, r"1 or more, not \[\]"),
        ({"cfg_schedule": "cosine"}, "'cosine', not linear or constant"),
        ({"image_ids": torch.tensor([3])}, "1 image_ids for 2 labels"),
    ],
    ids=["short order", "too many orders", "sum", "empty group", "no groups", "schedule", "image_ids"],
)
def test_arguments_that_do_not_fit_are_refused_with_the_numbers(change, message):
    model = MockModel()
    good = {"order": torch.arange(16).repeat(2, 1), "group_sizes": GROUPS}
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, torch.zeros(2, dtype=torch.int64), **{**good, **change})
    assert model.positions == []


# pixels


def test_images_are_bytes_of_the_decoded_tokens(tiny_lpd, tiny_vq):
    labels, order = torch.arange(3), orders_of(range(3))
    images = generate_images(tiny_lpd, tiny_vq, labels, order, GROUPS, seed=5)
    assert images.dtype == torch.uint8 and images.shape == (3, 8, 8, 3)
    with torch.no_grad():
        pixels = tiny_vq.decode(generate_tokens(tiny_lpd, labels, order, GROUPS, seed=5))
    expected = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert torch.equal(images, expected.to(torch.uint8))
