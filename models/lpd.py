"""The LPD transformer: context tokens and position query tokens in, logits of the queried places out.

Knows embeddings, the training forward, one decoding step, the loss, init and the resize of position
embeddings. Does not know sampling, guidance, random orders or files. Source: arXiv 2507.01957.

B batch, L tokens of an image (= grid_size^2), D width, V codebook size, n places of one call.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.kv_cache import KVCache
from models.layers import Block
from models.masks import cached_training_mask
from models.pretrained import Pretrained

NO_LABEL = -1  # the label of an image without one: `fake_latent` stands for its class embedding


@dataclass(frozen=True)
class LPDConfig:
    """Sizes of an LPD model. `dropout` and `label_drop_prob` act in training only."""

    grid_size: int = 16
    vocab_size: int = 16384
    num_classes: int = 1000
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    label_drop_prob: float = 0.1

    def __post_init__(self):
        for name in ("grid_size", "vocab_size", "num_classes", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}")
        for name in ("dropout", "label_drop_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")

    @property
    def num_tokens(self):
        """L, tokens of an image."""
        return self.grid_size**2


LPD_CONFIGS = {
    "lpd_l": LPDConfig(embed_dim=1024, depth=24, num_heads=16),  # 337 M parameters
    "lpd_xl": LPDConfig(embed_dim=1280, depth=36, num_heads=20),  # 752 M
    "lpd_xxl": LPDConfig(embed_dim=1536, depth=48, num_heads=24),  # 1.4 B
    "lpd_small": LPDConfig(embed_dim=384, depth=11, num_heads=6),  # 20 M in the blocks: small data on a GPU
    "lpd_tiny": LPDConfig(embed_dim=192, depth=7, num_heads=6),  # 3 M in the blocks: small data on a CPU
}


def run_block(block, x, mask):
    """A training pass through a block; x [B, 2L, D]. What is compiled is this, once for all blocks."""
    return block(x, mask)


class LabelDropout(nn.Module):
    """In training, turns a label into NO_LABEL with probability `prob`: guidance needs the other branch."""

    def __init__(self, prob):
        super().__init__()
        self.prob = prob

    def forward(self, labels):
        if not self.training or self.prob == 0:
            return labels
        dropped = torch.rand(labels.shape, device=labels.device) < self.prob
        return labels.masked_fill(dropped, NO_LABEL)


class LPD(Pretrained, nn.Module):
    """Decoder transformer with learned position query tokens.

    The state dict has the keys of the released weights: `class_emb` and `token_emb` (embeddings of classes
    and codes), `fake_latent` (stands for a dropped label), `mask_token` (the vector of a position query
    token), `pos_embed` [1, 1 + L, D] (index 0 for the class token, 1 + p for grid position p) and `z_proj_ln`
    (the LayerNorm of everything that enters the first block).
    """

    config_class = LPDConfig

    def __init__(self, config):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.class_emb = nn.Embedding(config.num_classes, D)
        self.fake_latent = nn.Parameter(torch.zeros(1, D))
        self.token_emb = nn.Embedding(config.vocab_size, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens + 1, D))
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        self.label_dropout = LabelDropout(config.label_drop_prob)
        self.blocks = nn.ModuleList(
            Block(D, config.num_heads, config.mlp_ratio, config.dropout, layer)
            for layer in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=1e-6)
        self.head = nn.Linear(D, config.vocab_size, bias=False)
        self.grad_checkpointing = False
        self.run_block = run_block  # or one compiled function, shared by all blocks
        self.mask_of = cached_training_mask  # or another form of it, from (group_sizes, device)
        self.loss_rows = None  # or what training is to give `forward`
        self.init_weights()

    def init_weights(self):
        """Normal(0, 0.02) for what is looked up, Xavier-uniform for what multiplies, zero for biases."""
        for parameter in (self.fake_latent, self.mask_token, self.pos_embed):
            nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    # Embeddings: every row is content plus position, normalised.

    def embed_labels(self, labels):
        """labels [B] in 0..num_classes-1 or NO_LABEL -> the class token [B, 1, D]."""
        labels = labels[:, None]  # [B, 1]
        known = self.class_emb(labels.clamp(min=0))  # [B, 1, D]
        content = torch.where((labels == NO_LABEL)[..., None], self.fake_latent, known)  # [B, 1, D]
        return self.z_proj_ln(content + self.pos_embed[:, :1])

    def embed_tokens(self, tokens, positions):
        """tokens [B, n] at grid positions [B, n] -> context tokens [B, n, D]."""
        return self.z_proj_ln(self.token_emb(tokens) + self.pos_embed[0, 1 + positions])

    def embed_queries(self, positions):
        """grid positions [B, n] -> position query tokens [B, n, D]."""
        return self.z_proj_ln(self.mask_token + self.pos_embed[0, 1 + positions])

    def query_table(self):
        """The position query tokens of all places [L, D]: a query depends on its place alone."""
        return self.z_proj_ln(self.mask_token[0] + self.pos_embed[0, 1:])

    # The transformer, all groups at once (training) or one group at a time (decoding).

    def forward(self, tokens, labels, order, group_sizes, *, loss_rows=None):
        """Logits of every token given the groups before its own, in one masked pass.

        Args:
            tokens: int64 [B, L] codebook ids in raster order.
            labels: int64 [B].
            order: int64 [B, L]; order[b, t] is the raster position generated at slot t.
            group_sizes: tuple of ints that sum to L.
            loss_rows: give the loss in place of the logits, which then never exist for more rows at once.
        Returns:
            logits [B, L, V], in generation order; with `loss_rows` what `lpd_loss` makes of them.
        """
        L = self.config.num_tokens
        if sum(group_sizes) != L:
            raise ValueError(f"group sizes sum to {sum(group_sizes)}, the model has {L} tokens")
        generated = tokens.gather(1, order)  # [B, L], in generation order
        context = torch.cat(
            [
                self.embed_labels(self.label_dropout(labels)),
                self.embed_tokens(generated[:, :-1], order[:, :-1]),
            ],
            dim=1,
        )  # [B, L, D]
        x = torch.cat([context, self.embed_queries(order)], dim=1)  # [B, 2L, D]
        mask = self.mask_of(tuple(group_sizes), x.device)  # [2L, 2L]
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(self.run_block, block, x, mask, use_reentrant=False)
            else:
                x = self.run_block(block, x, mask)
        x = self.norm(x[:, L:])  # [B, L, D]
        if loss_rows is None:
            return self.head(x)  # [B, L, V]
        return chunked_loss(self.head, x.flatten(0, 1), generated.flatten(), loss_rows)

    def predict(self, context, queries, kv_cache):
        """One decoding step: takes in the newest context, predicts the tokens at any places, all at once.

        Has no dropout, and waits for no device.

        Args:
            context: [B, c, D] from `embed_labels` (first step) or `embed_tokens` (the group before).
            queries: [B, n, D], of the places to predict, from `query_table`.
            kv_cache: from `new_kv_cache`; afterwards it also holds the c context rows.
        Returns:
            logits [B, n, V].
        """
        c = context.shape[1]
        x = torch.cat([context, queries], dim=1)  # [B, c + n, D]
        for block in self.blocks[:-1]:
            x = block.decode(x, kv_cache, c)  # [B, c + n, D]
        x = self.blocks[-1].decode(x, kv_cache, c, first=c)  # [B, n, D]: of the context, keys and values do
        kv_cache.keep(c)
        return self.head(self.norm(x))  # [B, n, V]

    def new_kv_cache(self, batch):
        """An empty KV cache for one whole generation of `batch` images."""
        c = self.config
        weight = self.pos_embed
        return KVCache(
            c.depth, batch, c.num_heads, c.num_tokens + 1, c.embed_dim // c.num_heads,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip


def lpd_loss(logits, tokens, order):
    """Mean cross-entropy over all query rows.

    Args:
        logits: [B, L, V] in generation order. tokens: int64 [B, L] raster. order: int64 [B, L].
    Returns:
        scalar, float32.
    """
    targets = tokens.gather(1, order)  # [B, L]
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def chunked_loss(head, x, targets, rows):
    """Mean cross-entropy of head(x). Of more than `rows` rows the logits are made so many at a time, and once
    more in the backward pass.

    Args:
        head: module from [n, D] to logits [n, V]. x: [N, D]. targets: int64 [N].
    Returns:
        scalar, float32.
    """

    def summed(x, targets):
        return F.cross_entropy(head(x).float(), targets, reduction="sum")

    if len(targets) <= rows:
        return summed(x, targets) / len(targets)
    chunks = zip(x.split(rows), targets.split(rows), strict=True)
    losses = [checkpoint(summed, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return torch.stack(losses).sum() / len(targets)


def resize_pos_embed(pos_embed, grid_size):
    """Resize `pos_embed` [1, 1 + g*g, D] bicubically to another grid; index 0 (class token) is kept.

    This is how a 512 px model starts from 256 px weights.
    """
    old = int((pos_embed.shape[1] - 1) ** 0.5)
    if old == grid_size:
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, g, g]
    grid = F.interpolate(grid.float(), size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # [1, L, D]
    return torch.cat([pos_embed[:, :1], grid], dim=1)
