"""Which images make up which training step."""

import numpy as np
import pytest

from engine.batches import num_steps, own_part, step_images

N, BATCH = 12, 8  # three steps are two epochs


def stream(seed, steps, num_images=N, batch=BATCH):
    """Indices and views of the first steps, one after another."""
    parts = [step_images(num_images, seed, batch, step) for step in range(steps)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


def test_each_image_is_seen_once_an_epoch():
    indices, _ = stream(0, 6)
    for epoch in indices.reshape(4, N):
        assert sorted(epoch) == list(range(N))


def test_a_batch_of_several_epochs_sees_each_image_as_often():
    indices, _ = step_images(5, 0, 15, 1)
    assert sorted(indices) == sorted([*range(5)] * 3)


def test_each_epoch_is_shuffled_anew():
    indices, _ = stream(0, 6, num_images=24, batch=24)
    assert len({tuple(epoch) for epoch in indices.reshape(6, 24)}) == 6


def test_views_are_mirrored_half_the_time():
    """20,000 coin throws: mean 10,000, standard deviation 71; 6 of these are missed 1 in 5e8 times, were the
    seed not fixed."""
    _, views = stream(0, 20, num_images=5000, batch=1000)
    assert set(views) == {0, 1}
    assert abs(views.sum() - 10_000) < 6 * 71


def test_an_image_is_seen_in_both_views_over_the_epochs():
    """Twenty epochs of 12 images; one has a single view with probability 12 / 2^19 (over seeds)."""
    indices, views = stream(0, 30)
    assert len(set(zip(indices.tolist(), views.tolist(), strict=True))) == 2 * N


def test_the_stream_depends_on_the_seed():
    assert not np.array_equal(stream(0, 3)[0], stream(1, 3)[0])


def test_the_stream_does_not_depend_on_the_batch_size():
    for part, other in zip(stream(3, 6, batch=8), stream(3, 4, batch=12), strict=True):
        assert np.array_equal(part, other)


def test_any_step_can_be_the_first_after_a_resume():
    """Asked for alone, in falling order: no state is carried from step to step."""
    whole = [step_images(N, 5, BATCH, step) for step in range(8)]
    for step in reversed(range(8)):
        for part, expected in zip(step_images(N, 5, BATCH, step), whole[step], strict=True):
            assert np.array_equal(part, expected)


def test_changing_a_batch_in_place_does_not_change_the_epoch():
    first = step_images(N, 6, N, 0)[0]
    first += 100
    assert sorted(step_images(N, 6, N, 0)[0]) == list(range(N))


@pytest.mark.parametrize("world_size, accum_iter", [(1, 1), (2, 1), (1, 4), (2, 2), (8, 1)])
def test_processes_and_micro_batches_share_out_a_step_without_rest(world_size, accum_iter):
    values = np.arange(BATCH)
    parts = [own_part(values, rank, world_size, accum_iter) for rank in range(world_size)]
    assert all(part.shape == (accum_iter, BATCH // (world_size * accum_iter)) for part in parts)
    assert sorted(np.concatenate(parts, axis=None)) == list(range(BATCH))


def test_a_part_keeps_an_image_and_its_order_together():
    indices, rows = np.arange(BATCH), np.arange(BATCH)[:, None] * np.ones((1, 3), dtype=int)
    assert np.array_equal(own_part(rows, 1, 2, 2)[..., 0], own_part(indices, 1, 2, 2))


@pytest.mark.parametrize("epochs, steps", [(1, 2), (2, 3), (2.5, 4), (0.1, 1)])
def test_steps_are_rounded_up_to_whole_ones(epochs, steps):
    assert num_steps(N, epochs, BATCH) == steps
