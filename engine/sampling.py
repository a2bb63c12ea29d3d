"""From logits to token ids: guidance, temperature, top-k, top-p, and noise that belongs to an image.

B images, n tokens of one group, V codes.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from util.cli import setting

GUIDANCE_SCHEDULES = {  # (cfg, slots t int64 [L], L) -> guidance scale of each; linear: arXiv 2507.01957
    "linear": lambda cfg, t, L: 1 + (cfg - 1) * t / L,
    "constant": lambda cfg, t, L: torch.full_like(t, cfg, dtype=torch.float32),
}
MASK_32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """How token ids are drawn from logits; the fields are also the flags of the programs."""

    cfg: float = setting(1.0, "guidance scale; 1 is none, 3 to 6 are usual", least=0)
    cfg_schedule: str = setting("linear", "guidance scale over the slots", choices=[*GUIDANCE_SCHEDULES])
    temperature: float = setting(1.0, "0 takes the likeliest token", least=0)
    top_k: int = setting(0, "draw from the k likeliest tokens; 0 keeps all", least=0)
    top_p: float = setting(1.0, "draw from the likeliest tokens that reach this probability", least=0, most=1)

    def __post_init__(self):
        if self.cfg_schedule not in GUIDANCE_SCHEDULES:
            raise ValueError(f"cfg_schedule is {self.cfg_schedule!r}, not {' or '.join(GUIDANCE_SCHEDULES)}")


# Classifier-free guidance.


@lru_cache(maxsize=32)
def guidance_scales(sampling, num_tokens, device=None):
    """Guidance scale of every slot, float32 [L]."""
    slots = torch.arange(num_tokens, device=device)
    return GUIDANCE_SCHEDULES[sampling.cfg_schedule](sampling.cfg, slots, num_tokens)


def guide(cond, uncond, scales):
    """uncond + s (cond - uncond) for logits [B, n, V] and scales [n]."""
    return (cond - uncond).mul_(scales[:, None]).add_(uncond)


# The noise is a hash of (seed, image id, position, code) instead of the output of a generator. A generator's
# numbers depend on how many were drawn before, so an image would change with its batch, the number of GPUs,
# or the point where a run was resumed. A hash has no state, and is the same on every device.


def _mix(x):
    """A bijection of 32-bit words (held in int64) in which every input bit affects every output bit."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & MASK_32
    x = (x ^ (x >> 15)) * 0x735A2D97 & MASK_32
    return x ^ (x >> 15)


def _as_int32(x):
    """32-bit words held in int64 -> the same bits as int32, whose products wrap and cost half as much."""
    return ((x ^ 0x80000000) - 0x80000000).to(torch.int32)


def _image_word(seed, image_ids, start):
    word = torch.full_like(image_ids, start)
    for part in (seed & MASK_32, (seed >> 32) & MASK_32, image_ids & MASK_32, image_ids >> 32):
        word = _mix((word + 0x9E3779B9 & MASK_32) ^ part)
    return word


def image_words(seed, image_ids):
    """Hash of a seed (0..2^64-1) and image ids int64 [B] (>= 0): two 32-bit words per image, int64 [B, 2]."""
    return torch.stack([_image_word(seed, image_ids, start) for start in (0x9E3779B9, 0x7F4A7C15)], dim=1)


def cell_noise(words, positions):
    """A number in (0, 1), float32 [B, n], for `image_words` [B, 2] and positions int64 [B, n]."""
    bits = _mix(_mix(words[:, :1] + positions & MASK_32) ^ words[:, 1:])
    return ((bits >> 9).float() + 0.5) * 2.0**-23


def gumbel_noise(words, positions, vocab_size):
    """Standard Gumbel noise, float32 [B, n, V], for `image_words` [B, 2] and positions int64 [B, n]."""
    first, second = words[:, :1], words[:, 1:]
    # Each row hashes to an offset and an odd factor, both from all 64 bits of the image; codes enter last.
    offset = _mix(_mix(first ^ positions) + second & MASK_32)[..., None]  # [B, n, 1]
    factor = _mix(_mix(second ^ positions) + first & MASK_32)[..., None] | 1  # [B, n, 1]
    codes = _as_int32(_mix(torch.arange(1, vocab_size + 1, device=positions.device)))  # [V]
    # In place: on a CPU new memory costs as much as the arithmetic.
    bits = (codes ^ _as_int32(offset)).mul_(_as_int32(factor))  # [B, n, V]
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x21F0AAAD)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF))
    bits = (bits >> 9).bitwise_and_(0x7FFFFF)
    uniform = bits.float().add_(0.5).mul_(2.0**-23)  # in (0, 1), exact in float32
    return uniform.log_().neg_().log_().neg_()


# The draw.


def keep_top_k(logits, k):
    """Logits [..., V] with -inf below the k-th largest; ties with it are kept. k = 0 keeps all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, float("-inf"))


def keep_top_p(logits, p):
    """Logits [..., V] with -inf outside the smallest set of likeliest codes whose probability reaches p.

    Ties with the least likely of them are kept. The threshold is found by its 30 bits, without a sort: two at
    a time where this is compiled, so that the logits are read once for three sums.
    """
    if p >= 1:
        return logits
    probability = logits.softmax(dim=-1)
    step = 2 if torch.compiler.is_compiling() else 1
    bits = probability.view(torch.int32)  # positive floats are ordered as their bits are
    threshold = torch.zeros_like(bits[..., :1])  # grows to the largest with which enough is kept
    for shift in reversed(range(0, 30, step)):  # 1.0 is below 2^30
        higher = [threshold + (digit << shift) for digit in range(1, 2**step)]
        kept = [probability.masked_fill(bits < least, 0).sum(dim=-1, keepdim=True) for least in higher]
        threshold = threshold + (sum(mass >= p for mass in kept) << shift)
    threshold = torch.minimum(threshold, bits.amax(dim=-1, keepdim=True))  # p = 0 keeps the likeliest
    return logits.masked_fill(bits < threshold, float("-inf"))


def sample(logits, noise, sampling):
    """Draw ids int64 [B, n] from softmax(logits / temperature), cut to top-k, then top-p (Gumbel-max trick);
    logits and noise float32 [B, n, V], at temperature 0 without noise."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = keep_top_p(keep_top_k(logits / sampling.temperature, sampling.top_k), sampling.top_p)
    return logits.add_(noise).argmax(dim=-1)
