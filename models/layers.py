"""Transformer layers: attention, MLP, block, and the KV cache of decoding.

B batch, N rows of this call, M rows attended to, D width, H heads, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention


class KVCache:
    """Keys and values of all layers, allocated once and written by slice.

    A step writes its rows after the `length` cached ones, then calls `keep(n)` to keep the first n of them
    (the context); the others (the queries) are overwritten by the next step.
    """

    def __init__(self, depth, batch, heads, max_rows, head_dim, *, dtype, device):
        shape = (depth, 2, batch, heads, max_rows, head_dim)  # keys, then values
        self.rows = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer, rows):
        """Write a layer's keys and values of this step, [B, N, 2, H, d]; return all its keys and all its
        values, each [B, H, length + N, d]."""
        end = self.length + rows.shape[1]
        if end > self.rows.shape[4]:
            raise ValueError(f"KV cache holds {self.rows.shape[4]} rows, {end} are needed")
        self.rows[layer, ..., self.length : end, :] = rows.permute(2, 0, 3, 1, 4)
        return self.rows[layer, ..., :end, :]

    def keep(self, num_rows):
        """Keep the first `num_rows` rows of the last step."""
        self.length += num_rows


def attend(q, k, v, mask=None):
    """Scaled dot-product attention; q [B, H, N, d], k and v [B, H, M, d].

    The mask [N, M] is bool, True where a row may see a column, or float, added to the scores. Compiled
    callers may give a BlockMask.
    """
    if isinstance(mask, BlockMask):
        return flex_attention(q, k, v, block_mask=mask)
    if mask is None or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return attend_on_cpu(q, k, v, mask)


def attend_on_cpu(q, k, v, mask):
    """`attend` with a `training_mask` [2L, 2L]. Its first L rows, the context, see no query, so they attend
    to the first L columns in a call of their own: a quarter less work. Two products are faster than the fused
    kernel in bfloat16, and slower in float32 (benchmarks/LOG.md)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    attention = F.scaled_dot_product_attention if q.dtype == torch.float32 else attend_in_products
    L = mask.shape[0] // 2
    context = attention(q[:, :, :L], k[:, :, :L], v[:, :, :L], mask[:L, :L])  # [B, H, L, d]
    return torch.cat([context, attention(q[:, :, L:], k, v, mask[L:])], dim=2)  # [B, H, 2L, d]


def attend_in_products(q, k, v, mask):
    """Attention as two products; the mask is added to the scores."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [B, H, N, M]
    scores += mask
    return scores.softmax(dim=-1).to(v.dtype) @ v  # [B, H, N, d]


class Linear(nn.Linear):
    """A linear layer that casts its input to the weights' dtype if that is not float32
    (`LPD.bf16_linears`)."""

    def forward(self, x):
        return super().forward(x if self.weight.dtype == torch.float32 else x.to(self.weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim, num_heads, dropout, layer):
        super().__init__()
        self.num_heads = num_heads
        self.layer = layer  # index into the KV cache
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        """x [B, N, D] -> [B, N, D]."""
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, N, d]
        x = attend(q, k, v, mask)  # [B, H, N, d]
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.proj_drop(self.proj(x))

    def decode(self, x, kv_cache, num_context, first):
        """One decoding step, after the rows in the KV cache.

        Two attention calls without a mask are exact, since all rows of a kind see the same rows: context rows
        see the cached rows and the context, query rows see all rows.

        Args:
            x: [B, N, D], `num_context` context rows, then query rows. kv_cache: takes all their keys and
            values. first: rows before it need no result.
        Returns:
            [B, N - first, D].
        """
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)
        q = qkv[:, :, 0].transpose(1, 2)  # [B, H, N, d]
        k, v = kv_cache.extend(self.layer, qkv[:, :, 1:])  # [B, H, M, d]
        visible = k.shape[2] - N + num_context  # to the context rows
        parts = [attend(q[:, :, num_context:], k, v)]
        if first < num_context:
            context = q[:, :, first:num_context]
            parts.insert(0, attend(context, k[:, :, :visible], v[:, :, :visible]))
        x = torch.cat([part.transpose(1, 2) for part in parts], dim=1)  # [B, N - first, H, d]
        return self.proj(x.flatten(2))


class MLP(nn.Module):
    """Two linears around an exact GELU."""

    def __init__(self, dim, hidden_dim, dropout):
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.fc2 = Linear(hidden_dim, dim)
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
