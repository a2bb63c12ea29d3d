"""The LPD transformer: context tokens and position query tokens in, logits of the queried positions out.

Source: arXiv 2507.01957. B batch, L tokens of an image (= grid_size^2), D width, V codebook size, c context
rows and n queries of one decoding step.
"""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.layers import AddNorm, Block, Linear
from models.masks import cached_training_mask
from models.weights import Pretrained, find, load_state, read_weights
from util.cli import setting
from util.distributed import say

NO_LABEL = -1  # the label of the unconditional branch; `fake_latent` replaces its class embedding


@dataclass(frozen=True)
class LPDConfig:
    """Sizes of an LPD model. `dropout` and `label_drop_prob` act in training only. Fields made with `setting`
    are flags of main_lpd.py."""

    grid_size: int = 16
    vocab_size: int = 16384
    num_classes: int = 1000
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    dropout: float = 0.1
    label_drop_prob: float = setting(0.1, least=0, most=0.99)

    def __post_init__(self):
        for name in ("grid_size", "vocab_size", "num_classes", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
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
    "lpd_micro": LPDConfig(embed_dim=128, depth=4, num_heads=2),  # 0.8 M in the blocks: 256 tokens on a CPU
}


@dataclass(frozen=True)
class Execution:
    """How a training pass is computed; every choice gives the same numbers but for rounding.

    Attributes:
        mask: form of the mask, as of `cached_training_mask`; None is the form that suits the device.
        loss_rows: logits of the loss exist for this many rows at a time, or for all (None).
        grad_checkpointing: recompute the blocks in the backward pass to save memory.
    """

    mask: torch.dtype | str | None = None
    loss_rows: int | None = None
    grad_checkpointing: bool = False


class LabelDropout(nn.Module):
    """Replaces labels by NO_LABEL with probability `prob` in training, which teaches the unconditional
    branch."""

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
    and codes), `fake_latent` (the embedding of a dropped label), `mask_token` (the learned query vector),
    `pos_embed` [1, 1 + L, D] (index 0 for the class token, 1 + p for grid position p), `z_proj_ln` (the
    LayerNorm of everything that enters the first block).
    """

    config_class, marker = LPDConfig, "pos_embed"

    def __init__(self, config, execution=Execution()):
        super().__init__()
        self.config, self.execution = config, execution
        D = config.embed_dim
        self.class_emb = nn.Embedding(config.num_classes, D)
        self.fake_latent = nn.Parameter(torch.zeros(1, D))
        self.token_emb = nn.Embedding(config.vocab_size, D)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens + 1, D))
        self.z_proj_ln = nn.LayerNorm(D, eps=1e-6)
        self.label_dropout = LabelDropout(config.label_drop_prob)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = AddNorm(D, eps=1e-6)
        self.head = Linear(D, config.vocab_size, bias=False)
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
        """labels [B] in 0..num_classes-1 or NO_LABEL -> the class tokens [1, B, D]."""
        labels = labels[None, :]  # [1, B]
        known = self.class_emb(labels.clamp(min=0))  # [1, B, D]
        content = torch.where((labels == NO_LABEL)[..., None], self.fake_latent, known)  # [1, B, D]
        return self.z_proj_ln(content + self.pos_embed[:, :1])

    def embed_tokens(self, tokens, positions):
        """tokens [n, B] at grid positions [n, B] -> context tokens [n, B, D]."""
        return self.z_proj_ln(self.token_emb(tokens) + self.pos_embed[0, 1 + positions])

    def embed_queries(self, positions):
        """grid positions [n, B] -> position query tokens [n, B, D]."""
        return self.z_proj_ln(self.mask_token + self.pos_embed[0, 1 + positions])

    def query_table(self):
        """The position query tokens of all positions, [L, D]: a query depends on its position alone."""
        return self.z_proj_ln(self.mask_token[0] + self.pos_embed[0, 1:])

    def first_rows(self, labels, query_table, order, num_queries):
        """The rows of the first decoding step, float32 [1 + q, R, D]: the class tokens of labels [R], then
        the queries of the first q slots of order [B, L]. R is B or a multiple of it."""
        queries = query_table[order[:, :num_queries].T]  # [q, B, D]
        return torch.cat([self.embed_labels(labels), queries.repeat(1, len(labels) // len(order), 1)])

    def next_rows(self, query_table, ids, order, slot, sizes):
        """The rows of a later step, float32 [N, R, D]: context, which is the ids [B, c] of the slots from
        `slot` on, then the queries of the q slots after them. `sizes` are q and R / B."""
        (q, branches), end = sizes, slot + ids.shape[1]
        context = self.embed_tokens(ids.T, order[:, slot:end].T)  # [c, B, D]
        x = torch.cat([context, query_table[order[:, end : end + q].T]])  # [N, B, D]
        return x.repeat(1, branches, 1)  # [N, R, D]

    # The transformer, for training and decoding.

    def features(self, x, mask, kv_cache=None):
        """What enters the head for the query rows of x [N, B, D], under their `Mask`: [N - context, B, D].

        Args:
            kv_cache: a `new_kv_cache`, cut to the rows before x and those of x, [depth, M, B, 3D]; it takes
            in x's keys and values. Without it there are no rows but x.
        """
        y, recompute = None, self.execution.grad_checkpointing and self.training
        for layer, block in enumerate(self.blocks):
            if kv_cache is None:
                x, y = checkpoint(block, x, y, mask, use_reentrant=False) if recompute else block(x, y, mask)
            elif layer < len(self.blocks) - 1:
                x, y = block(x, y, mask, kv_cache[layer])
            else:  # nothing more is computed from the context rows
                x, y = block(x, y, mask.of_queries(), kv_cache[layer], first=mask.context)
        first = mask.context if kv_cache is None else 0
        return self.norm(x[first:], y[first:])[1]

    # Training: all groups in one masked pass.

    def forward(self, tokens, labels, order, group_sizes):
        """Logits of every token given the groups before its own.

        Args:
            tokens: int64 [B, L], codebook ids in raster order. labels: int64 [B].
            order: int64 [B, L]; order[b, t] is the raster position generated at slot t.
            group_sizes: tuple of ints that sum to L.
        Returns:
            logits [B, L, V], in generation order.
        """
        return self.head(self._query_features(tokens, labels, order, group_sizes).transpose(0, 1))

    def loss(self, tokens, labels, order, group_sizes):
        """Mean cross-entropy over all L query rows, float32; arguments as of `forward`.

        With `execution.loss_rows` the logits never exist for more rows at once; the backward pass recomputes
        them.
        """
        x = self._query_features(tokens, labels, order, group_sizes).flatten(0, 1)  # [L B, D]
        targets = tokens.gather(1, order).T.flatten()  # [L B]
        rows = self.execution.loss_rows or len(targets)

        def summed(x, targets):
            return F.cross_entropy(self.head(x).float(), targets, reduction="sum")

        if len(targets) <= rows:
            return summed(x, targets) / len(targets)
        chunks = zip(x.split(rows), targets.split(rows), strict=True)
        losses = [checkpoint(summed, *c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
        return torch.stack(losses).sum() / len(targets)

    def _query_features(self, tokens, labels, order, group_sizes):
        L = self.config.num_tokens
        if sum(group_sizes) != L:
            raise ValueError(f"group sizes sum to {sum(group_sizes)}, the model has {L} tokens")
        generated, order = tokens.gather(1, order).T, order.T  # [L, B], in generation order
        class_token = self.embed_labels(self.label_dropout(labels))  # [1, B, D]
        context = self.embed_tokens(generated[:-1], order[:-1])  # [L - 1, B, D]
        x = torch.cat([class_token, context, self.embed_queries(order)])  # [2L, B, D]
        return self.features(x, self.training_mask(tuple(group_sizes), x.device))

    def training_mask(self, group_sizes, device):
        """The `Mask` of a training pass."""
        suitable = torch.float32 if device.type == "cpu" else torch.bool
        return cached_training_mask(group_sizes, device, self.execution.mask or suitable)

    # Decoding (engine/decoding.py): one group at a time.

    def new_kv_cache(self, batch):
        """Room for what the rows of `batch` images are projected to, [depth, 1 + L, B, 3D]: on a GPU in this
        order, so that products write there; on a CPU image by image, which is as fast (benchmarks/LOG.md)."""
        c, weight = self.config, self.head.weight
        rows, width = 1 + c.num_tokens, 3 * c.embed_dim
        given = {"dtype": weight.dtype, "device": weight.device}
        if weight.device.type == "cpu":
            return torch.empty(c.depth, batch, rows, width, **given).transpose(1, 2)
        return torch.empty(c.depth, rows, batch, width, **given)

    def bf16_linears(self):
        """Store the weights of all linears in bfloat16, for decoding; returns self.

        Embeddings, LayerNorms and the residual stream stay float32: the same numbers as under autocast, with
        half the weights to read. All of the model in bfloat16 is two to five times farther from float32.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.bfloat16()
        return self

    # Weights of other sizes and files.

    @staticmethod
    def config_of(state, recorded, size):
        """The recorded config, checked against the size's name if given; for released files, the named size
        with the grid, vocabulary and classes of the weights."""
        named = LPD_CONFIGS[size] if size else None
        if recorded and named and (recorded.embed_dim, recorded.depth) != (named.embed_dim, named.depth):
            raise ValueError(
                f"width {recorded.embed_dim} and depth {recorded.depth}, "
                f"--model {size} has {named.embed_dim} and {named.depth}"
            )
        if recorded:
            return recorded
        if not named:
            raise ValueError("the file does not record its size: give --model")
        _, positions, width = state["pos_embed"].shape
        if width != named.embed_dim:
            raise ValueError(f"width {width}, --model {size} has {named.embed_dim}")
        return dataclasses.replace(
            named, grid_size=int((positions - 1) ** 0.5), vocab_size=state["token_emb.weight"].shape[0],
            num_classes=state["class_emb.weight"].shape[0],
        )

    def start_from(self, name, class_names=()):
        """Load weights that `find` knows into this model, resizing the position embeddings to its grid
        (used to start a 512 px model from 256 px weights). Of other classes than `class_names`, those found
        by name keep their embedding, the others begin as the unconditional branch, and a line names them.
        Raises as `load` does."""
        path = find(name)
        state, info = read_weights(path, LPD)
        with suppress(LookupError, RuntimeError, TypeError):  # absent or no grid: load_state reports it
            state["pos_embed"] = resize_pos_embed(state["pos_embed"], self.config.grid_size)
            known, names = info.get("class_names") or [], list(class_names)
            old, new = state["class_emb.weight"], state["fake_latent"].repeat(self.config.num_classes, 1)
            if names and names != known and (known or len(new) != len(old)):
                kept = [name for name in names if name in known]
                new[[names.index(name) for name in kept]] = old[[known.index(name) for name in kept]]
                state["class_emb.weight"] = new
                others = ", ".join(name for name in names if name not in known)[:200] or "none"
                say(f"{path}: {len(kept)} classes, found by name, keep their embedding; new: {others}")
        load_state(self, state, path)


def resize_pos_embed(pos_embed, grid_size):
    """Resize `pos_embed` [1, 1 + g*g, D] bicubically to another grid; index 0 (class token) is kept."""
    old = int((pos_embed.shape[1] - 1) ** 0.5)
    if old == grid_size:
        return pos_embed
    grid = pos_embed[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)  # [1, D, g, g]
    grid = F.interpolate(grid.float(), size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # [1, L, D]
    return torch.cat([pos_embed[:, :1], grid], dim=1)
