"""Transformer layers: attention, MLP, block. One attention path, with or without a KV cache.

Knows rows, masks and caches. Does not know what a row stands for. B batch, N rows of this call,
M rows attended to, D width, H heads, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def attend(q, k, v, mask=None):
    """Scaled dot-product attention; q [B, H, N, d], k and v [B, H, M, d].

    The mask is [N, M], bool (True = may see) or added to the scores; or a BlockMask, for FlexAttention, which
    is to be compiled. Training on a CPU spells the products out: the fused kernel's backward there takes
    nearly twice as long as the whole step without it (measured, 128 rows).
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, N, M]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(dim=-1).to(v.dtype) @ v  # [B, H, N, d]


class Attention(nn.Module):
    """Multi-head self-attention over the rows of this call and, given a cache, the rows kept in it."""

    def __init__(self, dim, num_heads, dropout, layer):
        super().__init__()
        self.num_heads = num_heads
        self.layer = layer  # our place in the KV cache
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        x = attend(q, k, v, mask)  # [B, H, N, d]
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.proj_drop(self.proj(x))

    def decode(self, x, kv_cache, num_context, first):
        """One decoding step, behind the rows kept in the cache: two attentions without a mask are exact.

        Args:
            x: [B, N, D], `num_context` context rows, which do not see the others, then query rows, which see
                all. kv_cache: takes the keys and values of all N.
            first: rows before it need no result.
        Returns:
            [B, N - first, D].
        """
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q = qkv[:, :, 0].transpose(1, 2)  # [B, H, N, d]
        k, v = kv_cache.extend(self.layer, qkv[:, :, 1:])  # [B, H, M, d]
        seen = k.shape[2] - N + num_context  # rows that the context sees
        parts = [attend(q[:, :, num_context:], k, v)]
        if first < num_context:
            parts.insert(0, attend(q[:, :, first:num_context], k[:, :, :seen], v[:, :, :seen]))
        x = torch.cat([part.transpose(1, 2) for part in parts], dim=1)  # [B, N - first, H, d]
        return self.proj(x.flatten(2))


class MLP(nn.Module):
    """Two linears around an exact GELU."""

    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, num_heads, mlp_ratio, dropout, layer):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, dropout, layer)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, int(dim * mlp_ratio), dropout)

    def forward(self, x, mask=None):
        x = x + self.attn(self.norm1(x), mask)  # [B, N, D]
        return x + self.mlp(self.norm2(x))  # [B, N, D]

    def decode(self, x, kv_cache, num_context, first=0):
        """One decoding step, as `Attention.decode`."""
        x = x[:, first:] + self.attn.decode(self.norm1(x), kv_cache, num_context, first)  # [B, N - first, D]
        return x + self.mlp(self.norm2(x))  # [B, N - first, D]
