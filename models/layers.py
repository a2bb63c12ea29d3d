"""Transformer layers: attention, MLP and block, the same for training and for decoding.

Rows come first, so that a product writes keys and values where the KV cache holds them. N rows of this call,
M rows attended to, B batch, D width, H heads, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def attend(q, k, v, mask):
    """Scaled dot-product attention under a `Mask`; q [B, H, N, d], k and v [B, H, M, d] -> [B, H, N, d]."""
    if isinstance(mask.seen, BlockMask):
        return flex_attention(q, k, v, block_mask=mask.seen)
    if mask.context == 0 or (mask.seen is not None and q.device.type != "cpu"):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.seen)
    return attend_by_kind(q, k, v, mask)


def attend_by_kind(q, k, v, mask):
    """`attend` as two calls, one for each kind of row, since context rows see no queries. Exact without a
    mask if all rows of a kind see the same; with a mask a quarter less work in training on a CPU."""
    context, seen = mask
    attention = F.scaled_dot_product_attention
    if seen is not None and seen.dtype != torch.bool and q.dtype != torch.float32:
        attention, seen = attend_in_products, seen.to(q.dtype)  # faster on CPUs (benchmarks/LOG.md)

    def part(rows, columns):
        own = None if seen is None else seen[rows, :columns]
        return attention(q[:, :, rows], k[:, :, :columns], v[:, :, :columns], own).transpose(1, 2)

    total = k.shape[2]
    parts = part(slice(context), total - q.shape[2] + context), part(slice(context, None), total)
    return torch.cat(parts, dim=1).transpose(1, 2)  # [B, H, N, d]


def attend_in_products(q, k, v, mask):
    """Attention as two products; the mask is added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, N, M]
    scores += mask
    return scores.softmax(dim=-1).to(v.dtype) @ v  # [B, H, N, d]


class Linear(nn.Linear):
    """A linear layer that casts its input to the weights' dtype if that is not float32
    (`LPD.bf16_linears`)."""

    def cast(self, x):
        return x if self.weight.dtype == torch.float32 else x.to(self.weight.dtype)

    def forward(self, x):
        return super().forward(self.cast(x))

    def write(self, x, out):
        """Apply the layer to x [N, B, D] and write the result into `out`; for inference."""
        if out.is_contiguous():
            torch.addmm(self.bias, self.cast(x).flatten(0, 1), self.weight.T, out=out.flatten(0, 1))
        else:
            out.copy_(self(x))


class AddNorm(nn.LayerNorm):
    """Adds what a layer computed, y, to the residual stream x: the sum and its LayerNorm, each [N, B, D]."""

    def forward(self, x, y=None):
        x = x if y is None else x + y
        return x, super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention; `config` is an `LPDConfig`, here and below."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, dim = config.num_heads, config.embed_dim
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, x, mask, kv=None, first=0):
        """x [N, B, D] -> [N - first, B, D].

        Args:
            mask: the `Mask` of the rows from `first` on. first: no result is needed for the rows before it.
            kv: a layer's part of the KV cache, [M, B, 3D]: the earlier rows, then N that are written here.
        """
        if kv is None:
            kv = self.qkv(x)  # [M = N, B, 3D]
        else:
            self.qkv.write(x, kv[-len(x) :])
        q, k, v = self.heads(kv)
        y = attend(q[:, :, len(kv) - len(x) + first :], k, v, mask)  # [B, H, N - first, d]
        return self.proj_drop(project(self.proj, y))

    def heads(self, projected):
        """Queries, keys and values of what `qkv` gave, [M, B, 3D]: each [B, H, M, d]."""
        return projected.unflatten(2, (3, self.num_heads, -1)).permute(2, 1, 3, 0, 4)


def project(linear, y):
    """Apply a linear to attention's result y [B, H, N, d] -> [N, B, D]; no copy, however y is laid out."""
    rows_first = y.stride(2) > y.stride(0)
    y = y.permute(2, 0, 1, 3) if rows_first else y.transpose(1, 2)
    y = linear(y.flatten(2))
    return y if rows_first else y.transpose(0, 1)


class MLP(nn.Module):
    """Two linears around an exact GELU."""

    def __init__(self, config):
        super().__init__()
        dim, hidden_dim = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block. What it adds last is handed to the next block's first norm, since an
    addition and the LayerNorm after it can be one kernel."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = AddNorm(config.embed_dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = AddNorm(config.embed_dim, eps=1e-6)
        self.mlp = MLP(config)

    def forward(self, x, y, mask, kv=None, first=0):
        """The residual stream x and what is still to be added, y (None before the first block), both
        [N, B, D] -> the same, [N - first, B, D]; the others are as in `Attention.forward`."""
        x, h = self.norm1(x, y)
        x, h = self.norm2(x[first:], self.attn(h, mask, kv, first))
        return x, self.mlp(h)
