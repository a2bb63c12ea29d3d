"""Editing tokens: what is kept stays and is seen by what is generated; nothing kept is plain generation."""

import pytest
import torch

from engine.edit import edit_tokens, whole_order
from engine.generate import generate_tokens
from models.lpd import NO_LABEL
from orders.lpd_order import make_orders
from orders.schedule import cosine_group_sizes

L = 16
LABELS = torch.tensor([0, 3, NO_LABEL])


def keep_some(count, n=3):
    """`count` random tokens of each of n images: bool [n, L]."""
    return torch.rand(n, L, generator=torch.Generator().manual_seed(count)).argsort(dim=1) < count


def some_tokens(n=3):
    return torch.randint(32, (n, L), generator=torch.Generator().manual_seed(0))


def orders_of(keep, sizes, kind="lpd", ids=None):
    orders = make_orders(kind, len(keep), sizes, 4, known=keep.numpy(), image_ids=ids)
    return torch.from_numpy(orders.astype("int64"))


def edit(model, count, steps=3, kind="lpd", **settings):
    """Three edited images [3, L], the tokens they were made of, what was kept, and the group sizes."""
    keep, tokens, sizes = keep_some(count), some_tokens(), cosine_group_sizes(L - count, steps)
    edited = edit_tokens(model, tokens, keep, LABELS, orders_of(keep, sizes, kind), sizes, **settings)
    return edited, tokens, keep, sizes


@pytest.mark.parametrize("settings", [{}, {"cfg": 3.0}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("count", [1, 7, 14])
def test_kept_tokens_come_back_and_the_others_are_generated(tiny_lpd, count, settings):
    edited, tokens, keep, _ = edit(tiny_lpd, count, steps=2, **settings)
    assert torch.equal(edited[keep], tokens[keep])
    assert (edited[~keep] != tokens[~keep]).any()


@pytest.mark.parametrize("settings", [{}, {"cfg": 3.0}, {"cfg": 3.0, "cfg_schedule": "constant", "top_k": 9}])
@pytest.mark.parametrize("kind", ["lpd", "random", "raster", "halton"])
def test_with_nothing_kept_it_is_plain_generation_token_for_token(tiny_lpd, kind, settings):
    edited, _, keep, sizes = edit(tiny_lpd, 0, steps=4, kind=kind, seed=5, **settings)
    plain_order = torch.from_numpy(make_orders(kind, 3, sizes, 4).astype("int64"))
    assert torch.equal(edited, generate_tokens(tiny_lpd, LABELS, plain_order, sizes, seed=5, **settings))


def test_with_everything_kept_it_is_a_copy(tiny_lpd):
    tokens, keep = some_tokens(), torch.ones(3, L, dtype=torch.bool)
    edited = edit_tokens(tiny_lpd, tokens, keep, LABELS, torch.empty(3, 0, dtype=torch.int64), ())
    assert torch.equal(edited, tokens) and edited.data_ptr() != tokens.data_ptr()


def test_tokens_that_are_not_kept_do_not_matter(tiny_lpd):
    edited, tokens, keep, sizes = edit(tiny_lpd, 7)
    other = torch.where(keep, tokens, (tokens + 1) % 32)
    again = edit_tokens(tiny_lpd, other, keep, LABELS, orders_of(keep, sizes), sizes)
    assert torch.equal(again, edited)


@pytest.mark.parametrize("kind", ["lpd", "random", "raster"])
@pytest.mark.parametrize("count", [1, 7, 14])
def test_logits_are_those_of_the_masked_pass_with_the_kept_tokens_as_its_first_group(
    tiny_lpd, monkeypatch, count, kind
):
    """1e-5: the same fp32 sums in another order; logits are of size 1."""
    logits, predict = [], tiny_lpd.predict
    monkeypatch.setattr(tiny_lpd, "predict", lambda *a: logits.append(predict(*a)) or logits[-1])
    edited, _, keep, sizes = edit(tiny_lpd, count, steps=2, kind=kind)
    whole = whole_order(keep, orders_of(keep, sizes, kind))
    with torch.no_grad():
        expected = tiny_lpd(edited, LABELS, whole, (count, *sizes))[:, count:]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-5)


def test_kept_tokens_enter_in_one_pass(tiny_lpd, monkeypatch):
    """The class token by itself, then the kept ones with the first queries, then group by group."""
    rows, predict = [], tiny_lpd.predict

    def recorded(context, positions, kv_cache):
        rows.append((tuple(context.shape[:2]), positions.shape[1]))
        return predict(context, positions, kv_cache)

    monkeypatch.setattr(tiny_lpd, "predict", recorded)
    _, _, _, sizes = edit(tiny_lpd, 6, steps=3, cfg=2.0)
    assert sizes == (1, 4, 5)
    assert rows == [((6, 1), 0), ((6, 6), 1), ((6, 1), 4), ((6, 4), 5)]


def test_kept_tokens_count_as_slots_passed_in_guidance(tiny_lpd, monkeypatch):
    """Linear guidance of 5 after 12 of 16 kept tokens begins with 1 + 4 * 12 / 16."""
    scales = []
    guide = lambda cond, uncond, s: scales.extend(s.tolist()) or cond  # noqa: E731
    monkeypatch.setattr("engine.generate.guide", guide)
    edit(tiny_lpd, 12, steps=2, cfg=5.0)
    assert scales == [4.0, 4.25, 4.5, 4.75]


def test_an_edited_image_is_the_same_in_any_batch(tiny_lpd):
    keep, tokens, sizes = keep_some(6, n=8), some_tokens(8), cosine_group_sizes(10, 3)

    def edit_in_batches(size):
        return torch.cat([
            edit_tokens(
                tiny_lpd, tokens[b], keep[b], b % 5, orders_of(keep[b], sizes, ids=b.numpy()), sizes,
                cfg=2.0, seed=3, image_ids=b,
            )
            for b in torch.arange(8).split(size)
        ])  # fmt: skip

    whole = edit_in_batches(8)
    assert torch.equal(edit_in_batches(1), whole)
    assert torch.equal(edit_in_batches(3), whole)


def test_the_callback_sees_the_kept_tokens_from_the_first_group_on(tiny_lpd):
    seen = []
    edited, tokens, keep, _ = edit(
        tiny_lpd, 6, on_group=lambda tokens, filled: seen.append((tokens.clone(), filled))
    )
    assert [filled for _, filled in seen] == [7, 11, 16]
    assert all(torch.equal(partial[keep], tokens[keep]) for partial, _ in seen)
    assert torch.equal(seen[-1][0], edited)


KEEP, OTHERS = torch.arange(L).expand(3, L) < 6, torch.arange(6, L).repeat(3, 1)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": torch.zeros(3, 15, dtype=torch.int64)}, r"\[3, 15\].* needed is \[3, 16\]"),
        ({"keep": KEEP[:2]}, r"keep is \[2, 16\]"),
        ({"keep": torch.arange(L) < torch.tensor([[6], [7], [6]])}, "from 6 to 7 tokens"),
        ({"order": OTHERS[:, 1:]}, r"order is \[3, 9\], needed is \[3, 10\]"),
        ({"order": OTHERS - 1}, "each place that is not kept once"),
        ({"order": OTHERS.clamp(min=7)}, "each place that is not kept once"),
        ({"group_sizes": (1, 8)}, "sum to 9, the model has 16 tokens an image, 10 of them unknown"),
        ({"group_sizes": ()}, "1 or more"),
    ],
    ids=["tokens", "keep", "unequal", "short order", "kept in order", "twice", "sum", "no groups"],
)
def test_arguments_that_do_not_fit_are_refused_with_the_numbers(tiny_lpd, change, message):
    good = {
        "tokens": some_tokens(), "keep": KEEP, "labels": LABELS, "order": OTHERS, "group_sizes": (1, 9),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        edit_tokens(tiny_lpd, **{**good, **change})
