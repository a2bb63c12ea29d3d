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
        shape = (depth, batch, heads, max_rows, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer, keys, values):
        """Write the step's rows [B, H, n, d] of a layer; return all its rows [B, H, length + n, d]."""
        end = self.length + keys.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"KV cache holds {self.keys.shape[3]} rows, {end} are needed")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def keep(self, num_rows):
        """Keep the first `num_rows` rows of the step that was written last."""
        self.length += num_rows
