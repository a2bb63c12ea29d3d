"""Logits -> token ids: guidance, temperature, top-k, top-p, and noise that belongs to an image.

Knows logits, scales and counters. Does not call models. B images, n places, V codes.
"""

import torch

MASK_32 = 0xFFFFFFFF


def guidance_scales(cfg, schedule, num_tokens, device=None):
    """Guidance scale of every slot: `constant`: cfg. `linear`: 1 + (cfg - 1) t / L at slot t of L
    (arXiv 2507.01957).

    Returns:
        float32 [L], made on the device: nothing waits for it.
    """
    if schedule == "constant":
        return torch.full((num_tokens,), cfg, dtype=torch.float32, device=device)
    return 1 + (cfg - 1) * torch.arange(num_tokens, device=device) / num_tokens


def guide(cond, uncond, scales):
    """Classifier-free guidance: uncond + s (cond - uncond); logits [B, n, V], scales [n]."""
    return uncond + scales[:, None] * (cond - uncond)


def _mix(x):
    """A bijection of 32-bit words (held in int64) in which every input bit moves every output bit."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & MASK_32
    x = (x ^ (x >> 15)) * 0x735A2D97 & MASK_32
    return x ^ (x >> 15)


def _as_int32(x):
    """32-bit words held in int64 -> the same bits as int32, whose products wrap and cost half."""
    return ((x ^ 0x80000000) - 0x80000000).to(torch.int32)


def _image_word(seed, image_ids, start):
    word = torch.full_like(image_ids, start)
    for part in (seed & MASK_32, (seed >> 32) & MASK_32, image_ids & MASK_32, image_ids >> 32):
        word = _mix((word + 0x9E3779B9 & MASK_32) ^ part)
    return word


def image_words(seed, image_ids):
    """64 bits of each image that depend on the seed and the image's id: what its noise begins with.

    Args:
        seed: int in 0..2^64-1. image_ids: int64 [B] >= 0.
    Returns:
        int64 [B, 2], two words of 32 bits.
    """
    return torch.stack([_image_word(seed, image_ids, start) for start in (0x9E3779B9, 0x7F4A7C15)], dim=1)


def gumbel_noise(words, positions, vocab_size):
    """Standard Gumbel noise that depends on (seed, image id, grid position, code) alone.

    Counter-based: a hash of the four numbers, with no generator state, so an image's noise is the same in
    any batch, on any process and on any device, and decoding never waits for a generator.

    Args:
        words: int64 [B, 2] from `image_words`. positions: int64 [B, n].
    Returns:
        float32 [B, n, V].
    """
    first, second = words[:, :1], words[:, 1:]
    # Two words of each row, both of all 64 bits of the image's: an offset and an odd factor for every code.
    offset = _mix(_mix(first ^ positions) + second & MASK_32)[..., None]  # [B, n, 1]
    factor = _mix(_mix(second ^ positions) + first & MASK_32)[..., None] | 1  # [B, n, 1]
    codes = _as_int32(_mix(torch.arange(1, vocab_size + 1, device=positions.device)))  # [V]
    bits = (codes ^ _as_int32(offset)) * _as_int32(factor)  # [B, n, V]
    bits = (bits ^ (bits >> 16 & 0xFFFF)) * 0x21F0AAAD
    bits = bits ^ (bits >> 15 & 0x1FFFF)
    uniform = ((bits >> 9 & 0x7FFFFF).float() + 0.5) * 2.0**-23  # in (0, 1), exact in float32
    return -(-uniform.log()).log()


def keep_top_k(logits, k):
    """Logits [..., V] with all but the k largest, and those equal to the last of them, at -inf. k = 0 keeps
    all."""
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, float("-inf"))


def keep_top_p(logits, p):
    """Logits [..., V] with all at -inf but the likeliest codes whose probability together first reaches p.

    Codes as likely as the last of them are kept too. The least probability kept is found bit by bit: always
    30 sums, no sort.
    """
    if p >= 1:
        return logits
    probability = logits.softmax(dim=-1)
    bits = probability.view(torch.int32)  # those of floats above 0 are ordered as the floats
    least = torch.zeros_like(bits[..., :1])  # becomes the largest with which enough is kept
    for bit in reversed(range(30)):  # 1.0 is below 2^30
        higher = least | 1 << bit
        enough = probability.masked_fill(bits < higher, 0).sum(dim=-1, keepdim=True) >= p
        least = torch.where(enough, higher, least)
    least = torch.minimum(least, bits.amax(dim=-1, keepdim=True))  # p = 0 keeps the likeliest
    return logits.masked_fill(bits < least, float("-inf"))


def sample(logits, noise, *, temperature=1.0, top_k=0, top_p=1.0):
    """Draw ids from softmax(logits / temperature), cut to top-k and top-p, as an argmax with Gumbel noise.

    Args:
        logits: float32 [B, n, V]. noise: float32 of that shape, or None when it does not matter.
        temperature: 0 takes the likeliest code.
    Returns:
        int64 [B, n].
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = keep_top_p(keep_top_k(logits / temperature, top_k), top_p)
    return (logits + noise).argmax(dim=-1)
