"""Decoding that is told what to draw: its logits are to be those of the masked training pass."""

import torch

from engine.decoding import EAGER, decode, decoding_inputs, guided_logits
from engine.sampling import Sampling


@torch.inference_mode()
def decoded_logits(model, tokens, labels, order, group_sizes, sampling=Sampling(), parts=EAGER, known=0):
    """Logits [B, L - known, V] of all steps of the decoding loop, in generation order, when every draw gives
    `tokens` [B, L]; the first `known` slots are given."""
    found = []

    def draw(x, head, scales, inputs, slot, _sampling):
        own = scales if scales is None else scales[slot : slot + len(x)]
        found.append(guided_logits(x, head, own))
        return tokens.gather(1, order[:, slot : slot + len(x)])

    given = tokens.gather(1, order[:, :known])
    inputs = decoding_inputs(model, labels, order, group_sizes, known=given)
    made, _ = decode(model, inputs, group_sizes, sampling, parts=parts._replace(draw=draw), known=given)
    assert torch.equal(made, tokens)
    return torch.cat(found, dim=1)
