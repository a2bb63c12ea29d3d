"""Group sizes: how many tokens each decoding step generates.

`group_sizes` is a tuple of G ints that starts with 1 and sums to the number of tokens L.
Source: Locality-aware Parallel Decoding, arXiv 2507.01957.
"""

import math
from itertools import pairwise

# Step counts as published; the group sizes of each are `cosine_group_sizes`. The published training lists
# differ from these by one token in some groups, for 8 and 24 steps (256 px) and for 256, 224, 192, 160, 128,
# 96, 80, 64 and 56 steps (512 px).
TRAINING_STEPS_256 = (256, 128, 64, 32, 24, 20, 16, 12, 8)
TRAINING_STEPS_1024 = (1024, 512, 256, 224, 192, 160, 128, 96, 80, 64, 56, 48, 40, 32)
FEWEST_SCALED_STEPS = 4  # fewer, on a small grid, would train on almost independent tokens


def cosine_group_sizes(num_tokens, steps):
    """The paper's cosine schedule: `steps` rising group sizes that start with 1 and sum to `num_tokens`.

    Raises ValueError if there is no such list: more steps than tokens, or one step for several tokens.
    """
    if num_tokens < 1 or not 1 <= steps <= num_tokens or (steps == 1 and num_tokens > 1):
        raise ValueError(f"{steps} steps for {num_tokens} tokens: there must be 2 to {num_tokens} steps")
    angles = [math.pi * i / (2 * steps) for i in range(steps + 1)]
    sizes = [max(1, round(num_tokens * (math.cos(a) - math.cos(b)))) for a, b in pairwise(angles)]
    sizes[0] = 1
    missing = num_tokens - sum(sizes)
    last = steps - 1
    while missing:  # one token at a time, from the last group backwards; the first group stays 1
        change = 1 if missing > 0 else -1
        if sizes[last] + change >= 1:
            sizes[last] += change
            missing -= change
        last = last - 1 if last > 1 else steps - 1
    return tuple(sorted(sizes))


def check_group_sizes(group_sizes, num_tokens):
    """`group_sizes` as a tuple of ints; ValueError unless positive, starting with 1, of sum `num_tokens`."""
    sizes = tuple(int(size) for size in group_sizes)
    if not sizes or sizes[0] != 1:
        raise ValueError(f"group sizes must start with 1, not {sizes[0] if sizes else 'be empty'}")
    if min(sizes) < 1:
        raise ValueError(f"group sizes must be 1 or more, not {min(sizes)}")
    if sum(sizes) != num_tokens:
        raise ValueError(f"group sizes sum to {sum(sizes)}, but there are {num_tokens} tokens")
    return sizes


def in_brief(schedule, num_tokens):
    """The number of steps of `cosine_group_sizes` that make this schedule, else the schedule as a tuple."""
    if isinstance(schedule, int):
        return schedule
    sizes, steps = tuple(schedule), len(schedule)
    possible = 1 < steps <= num_tokens or num_tokens == 1
    return steps if possible and sizes == cosine_group_sizes(num_tokens, steps) else sizes


def training_steps(num_tokens):
    """The step counts that training draws from, in falling order.

    The published lists for 256 and 1024 tokens. For another L, the list of 256 scaled by L / 256 and rounded,
    without those below 4; L itself (one token at a time) is always included.
    """
    if num_tokens == 1024:
        return TRAINING_STEPS_1024
    scaled = (round(steps * num_tokens / 256) for steps in TRAINING_STEPS_256)
    counts = {steps for steps in scaled if steps >= FEWEST_SCALED_STEPS} | {num_tokens}
    return tuple(sorted(counts, reverse=True))
