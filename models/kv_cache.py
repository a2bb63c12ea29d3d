"""Keys and values kept between decoding steps.

Knows layers, rows and how many rows are final. Does not know what the rows stand for.
"""

import torch


class KVCache:
    """Keys and values of all layers, allocated once and written by slice.

    A step writes its rows behind the `length` rows that are kept, then calls `keep(n)` to keep the first n of
    them; the others (the queries) are overwritten by the next step.

    Args:
        depth, batch, heads, max_rows, head_dim: sizes. dtype, device: as of the model.
    """

    def __init__(self, depth, batch, heads, max_rows, head_dim, *, dtype, device):
        shape = (depth, 2, batch, heads, max_rows, head_dim)  # keys, then values
        self.rows = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer, rows):
        """Write the step's keys and values [B, n, 2, H, d] of a layer; return all of its keys and all of its
        values, each [B, H, length + n, d]."""
        end = self.length + rows.shape[1]
        if end > self.rows.shape[4]:
            raise ValueError(f"KV cache holds {self.rows.shape[4]} rows, {end} are needed")
        self.rows[layer, ..., self.length : end, :] = rows.permute(2, 0, 3, 1, 4)
        return self.rows[layer, ..., :end, :]

    def keep(self, num_rows):
        """Keep the first `num_rows` rows of the step that was written last."""
        self.length += num_rows
