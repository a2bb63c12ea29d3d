"""Orders that are decided while an image is decoded. A policy is asked for each group when its turn comes,
and is handed what is known then (`engine.decoding.Progress`); what it picks for an image must depend on that
image alone, and no cell may be picked twice.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Confident:
    """The cells whose tokens are most certain (least entropy) first; no two cells of a group are nearer than
    `repulsion_threshold`, while there are others. The first group is random.

    The entropy of a cell is that of one step before: extra query rows look at the context of the group that
    is being predicted, so no forward is added.
    """

    grid_size: int
    repulsion_threshold: float
    looks = True  # wants `Progress.logits`

    def __call__(self, size, progress):
        """Pick `size` of the m cells of each image: their indices into `progress.cells`, int64 [B, size]."""
        cost = progress.noise if progress.logits is None else entropy(progress.logits)  # [B, m]
        x, y = (progress.cells % self.grid_size).float(), (progress.cells // self.grid_size).float()
        crowded, picked = torch.zeros_like(cost), []
        for _ in range(size):
            best = (cost + crowded).argmin(dim=1, keepdim=True)  # [B, 1]
            distance = torch.hypot(x - x.gather(1, best), y - y.gather(1, best))  # [B, m]
            crowded = crowded.masked_fill(distance < self.repulsion_threshold, 1000.0)  # after all others
            cost = cost.scatter(1, best, float("inf"))
            picked.append(best)
        return torch.cat(picked, dim=1)


def entropy(logits):
    """Of the softmax of logits [..., V], in nats: [...]."""
    log_p = logits.log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


POLICIES = {"confident": Confident}
