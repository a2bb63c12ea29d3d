"""Linears for a CPU: weights laid out once as its matrix products read them.

Knows linears. Does not know what they compute for. B batch, N rows.
"""

import copy

import torch
from torch import nn


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference whose weight is in oneDNN's own layout.

    At the few rows of a decoding step a plain product spends a third of its time on the layout. These
    operators are those that torch.compile's own CPU code calls.
    """

    def __init__(self, linear, rows=32):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def packed(model):
    """A copy of a model for inference on a CPU that shares all but the weights of its linears.

    Where torch has no oneDNN, the copy shares these too.
    """
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    if torch.backends.mkldnn.is_available():
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, PackedLinear(child))
    return model
