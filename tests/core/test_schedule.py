"""Group sizes: the published lists, their shape for any step count, and the errors."""

import pytest

from orders.schedule import check_group_sizes, cosine_group_sizes, training_steps

LIST_256_20 = (1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20)
LIST_256_32 = (
    *(1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9),
    *(9, 10, 10, 10, 11, 11, 11, 11, 12, 12, 12, 12, 12, 12, 12, 12),
)
LIST_1024_48 = (
    *range(1, 24),
    *(23, 24, 25, 26, 26, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32, 32, 33, 33, 33, 33, 33, 33, 33, 34),
)


@pytest.mark.parametrize("published", [LIST_256_20, LIST_256_32, LIST_1024_48])
def test_published_lists_are_exact(published):
    assert cosine_group_sizes(sum(published), len(published)) == published


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 64, 100, 256])
def test_cosine_sizes_are_valid_and_rise_for_every_step_count(num_tokens):
    for steps in range(2 if num_tokens > 1 else 1, num_tokens + 1):
        sizes = cosine_group_sizes(num_tokens, steps)
        assert len(check_group_sizes(list(sizes), num_tokens)) == steps
        assert sizes == tuple(sorted(sizes))


@pytest.mark.parametrize("num_tokens, steps", [(256, 0), (256, -3), (256, 1), (256, 257), (0, 1)])
def test_impossible_step_counts_are_refused_with_both_numbers(num_tokens, steps):
    with pytest.raises(ValueError, match=f"{steps} steps for {num_tokens} tokens"):
        cosine_group_sizes(num_tokens, steps)


WRONG_SIZES = [
    ([], "must start with 1, not be empty"), ([2, 14], "must start with 1, not 2"),
    ([1, 0, 15], "must be 1 or more, not 0"), ([1, 14], "sum to 15, but there are 16 tokens"),
]


@pytest.mark.parametrize("sizes, message", WRONG_SIZES)
def test_wrong_sizes_are_refused_with_the_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        check_group_sizes(sizes, 16)


def test_training_draws_from_the_published_step_counts():
    assert training_steps(256) == (256, 128, 64, 32, 24, 20, 16, 12, 8)
    assert training_steps(1024) == (1024, 512, 256, 224, 192, 160, 128, 96, 80, 64, 56, 48, 40, 32)
    assert training_steps(64) == (64, 32, 16, 8, 6, 5, 4)


@pytest.mark.parametrize("num_tokens", [1, 4, 9, 49, 64, 256, 1024, 4096])
def test_every_training_step_count_has_group_sizes(num_tokens):
    for steps in training_steps(num_tokens):
        assert len(cosine_group_sizes(num_tokens, steps)) == steps
