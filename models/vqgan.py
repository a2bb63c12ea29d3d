"""The image tokenizer: LlamaGen's VQ model (arXiv 2406.06525), VQ-16 by default, smaller ones by their
config, and with the same codebook one of patches.

The state dict has the keys of the released `vq_ds16_c2i.pt`. B batch, C channels, h = H / stride, L = h * w,
V codebook size, e code width.
"""

import fnmatch
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from models.weights import TOKENIZER, USUAL, Pretrained


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ tokenizer. The defaults are VQ-16: one token for 16x16 pixels. With a `patch`, a token is
    that many pixels a side, and networks of z_channels work at the resolution of the tokens only; base_width
    and multipliers are not used then."""

    vocab_size: int = 16384
    code_dim: int = 8
    base_width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    groups: int = 32
    patch: int = 0

    def __post_init__(self):
        object.__setattr__(self, "multipliers", tuple(self.multipliers))  # JSON gives a list
        name = "z_channels" if self.patch else "base_width"
        if (width := getattr(self, name)) % self.groups:
            raise ValueError(f"{name} {width} is not a multiple of {self.groups} (GroupNorm)")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be positive ints, not {self.multipliers}")
        if not 1 <= self.vocab_size <= 65536:
            raise ValueError(
                f"vocab_size must lie in 1..65536 (tokens are stored as uint16), not {self.vocab_size}"
            )

    @property
    def stride(self):
        """Pixels per token, along one side."""
        return self.patch or 2 ** (len(self.multipliers) - 1)


class GroupNorm(nn.GroupNorm):
    """The GroupNorm of this network, eps 1e-6. It computes in the precision of its weights, under autocast
    too, as on CUDA: on a CPU the backward pass in mixed precision takes four times as long."""

    def __init__(self, groups, channels):
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


class ResBlock(nn.Module):
    def __init__(self, groups, in_channels, out_channels):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # [B, C_out, h, w]
        h = self.conv2(F.silu(self.norm2(h)))  # [B, C_out, h, w]
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a feature map."""

    def __init__(self, groups, channels):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))  # [B, hw, C]
        h = F.scaled_dot_product_attention(q, k, v)  # [B, hw, C]
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # [B, C, h / 2, w / 2]


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # [B, C, 2h, 2w]


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if asked, and a resampling."""

    def __init__(self, groups, in_channels, out_channels, num_blocks, attention):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.res = nn.ModuleList(ResBlock(groups, a, b) for a, b in pairwise(widths))
        count = num_blocks if attention else 0
        self.attn = nn.ModuleList(AttnBlock(groups, out_channels) for _ in range(count))

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def middle(groups, channels):
    """Residual block, attention, residual block, at the lowest resolution of both networks."""
    first, last = (ResBlock(groups, channels, channels) for _ in range(2))
    return nn.Sequential(first, AttnBlock(groups, channels), last)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.base_width * m for m in config.multipliers]
        self.conv_in = nn.Conv2d(3, config.base_width, 3, padding=1)
        self.conv_blocks = nn.Sequential()
        channels = config.base_width
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            level = Level(config.groups, channels, width, config.num_res_blocks, attention=lowest)
            if not lowest:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
            channels = width
        self.mid = middle(config.groups, channels)
        self.norm_out = GroupNorm(config.groups, channels)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_blocks(self.conv_in(x)))  # [B, C, h, w]
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, z_channels, h, w]


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = [config.base_width * m for m in reversed(config.multipliers)]
        channels = widths[0]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = middle(config.groups, channels)
        self.conv_blocks = nn.Sequential()
        for i, width in enumerate(widths):
            level = Level(config.groups, channels, width, config.num_res_blocks + 1, attention=i == 0)
            if i < len(widths) - 1:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
            channels = width
        self.norm_out = GroupNorm(config.groups, channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_blocks(self.mid(self.conv_in(x)))  # [B, C, H, W]
        return self.conv_out(F.silu(self.norm_out(x)))  # [B, 3, H, W]


def res_blocks(config, count):
    """Residual blocks at the resolution of the tokens."""
    width = config.z_channels
    return nn.Sequential(*(ResBlock(config.groups, width, width) for _ in range(count)))


class PatchEncoder(nn.Module):
    """Each patch of pixels becomes a vector, as in a vision transformer; then residual blocks."""

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * self.patch**2, config.z_channels, 1)
        self.blocks = res_blocks(config, config.num_res_blocks)

    def forward(self, x):
        return self.blocks(self.conv_in(F.pixel_unshuffle(x, self.patch)))  # [B, z_channels, h, w]


class PatchDecoder(nn.Module):
    """Residual blocks; then each vector becomes a patch of pixels."""

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        self.blocks = res_blocks(config, config.num_res_blocks + 1)
        self.conv_out = nn.Conv2d(config.z_channels, 3 * self.patch**2, 1)

    def forward(self, x):
        return F.pixel_shuffle(self.conv_out(self.blocks(x)), self.patch)  # [B, 3, H, W]


class Codebook(nn.Module):
    """V unit vectors of width e, looked up by id or by the nearest vector."""

    def __init__(self, vocab_size, code_dim):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, code_dim)
        self.embedding.weight.data = F.normalize(self.embedding.weight)  # short ones have steep gradients
        self.register_buffer("codebook_used", torch.zeros(65536))  # unused, but in the released weights

    def forward(self, tokens):
        """ids [...] -> unit vectors [..., e]."""
        return F.normalize(F.embedding(tokens, self.embedding.weight), dim=-1)

    def nearest(self, z):
        """vectors [..., e] of any length -> ids [...] of the codes at the smallest angle."""
        codes = F.normalize(self.embedding.weight, dim=-1)
        return (F.normalize(z, dim=-1) @ codes.T).argmax(dim=-1)


def as_square(tokens):
    """tokens [B, L] in raster order -> [B, h, h]."""
    side = int(tokens.shape[1] ** 0.5)
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not make a square image")
    return tokens.unflatten(1, (side, side))


class VQModel(Pretrained, nn.Module):
    """Pixels to tokens and back. Gradients flow through `forward` only."""

    config_class, marker = VQConfig, "quantize.embedding.weight"
    usual_files = TOKENIZER, *USUAL

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = (PatchEncoder if config.patch else Encoder)(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.quantize = Codebook(config.vocab_size, config.code_dim)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
        self.decoder = (PatchDecoder if config.patch else Decoder)(config)

    @staticmethod
    def config_of(state, recorded, size):
        """The recorded config, or else that of the shapes, as of LlamaGen's VQ-8 and VQ-16."""
        name = "encoder.conv_blocks.{}.res.{}.conv1.weight".format
        first, blocks = (sorted(fnmatch.filter(state, name(*place))) for place in (("*", 0), (0, "*")))
        if recorded or not first:  # the names of another kind of tokenizer fit no config
            return recorded or VQConfig()
        base_width, z_channels = (len(state[f"encoder.{conv}.weight"]) for conv in ("conv_in", "conv_out"))
        multipliers = tuple(len(state[name]) // base_width for name in first)
        return VQConfig(*state[VQModel.marker].shape, base_width, multipliers, len(blocks), z_channels)

    @classmethod
    def build(cls, state, info, size, path):
        """As in `Pretrained`; `codebook_used`, which counts codes in training, may be missing."""
        return super().build({"quantize.codebook_used": torch.zeros(65536), **state}, info, size, path)

    def latents(self, pixels):
        """pixels [B, 3, H, W] in [-1, 1] -> unit vectors [B, h, w, e], before quantisation."""
        height, width = pixels.shape[-2:]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"image of {width}x{height} pixels is not a multiple of the stride {self.config.stride}"
            )
        z = self.quant_conv(self.encoder(pixels))  # [B, e, h, w]
        return F.normalize(z.permute(0, 2, 3, 1), dim=-1)  # [B, h, w, e]

    def decode_codes(self, codes):
        """code vectors [B, h, w, e] -> pixels [B, 3, H, W], about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(codes.permute(0, 3, 1, 2)))

    @torch.no_grad()
    def encode(self, pixels):
        """pixels [B, 3, H, W] in [-1, 1], square -> tokens int64 [B, L] in raster order."""
        return self.quantize.nearest(self.latents(pixels)).flatten(1)

    @torch.no_grad()
    def decode(self, tokens):
        """tokens int64 [B, L] in raster order, of a square image -> pixels [B, 3, H, W], about [-1, 1]."""
        return self.decode_codes(self.quantize(as_square(tokens)))

    def forward(self, pixels):
        """One training pass; the gradient passes straight through the quantisation.

        Returns:
            reconstruction [B, 3, H, W]; latents [B, h, w, e]; their codes [B, h, w, e]; tokens [B, h, w].
        """
        latents = self.latents(pixels).float()
        tokens = self.quantize.nearest(latents.detach())
        codes = self.quantize(tokens)
        through = latents + (codes - latents).detach()
        return self.decode_codes(through), latents, codes, tokens
