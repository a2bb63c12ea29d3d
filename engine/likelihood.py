"""The likelihood of given tokens when they are decoded in groups: what an order and a schedule cost."""

import torch
import torch.nn.functional as F

from engine.decoding import generate_tokens


@torch.no_grad()  # not inference_mode: training may go on with the mask that is made here
def token_nll(model, tokens, labels, order, group_sizes):
    """-log p of every token given the groups before its own, as decoding without guidance would see it.

    The tokens of a group are drawn independently of one another, so the sum over an image is -log p(image).

    Args:
        model: LPD in eval mode. The others are those of `LPD.forward`; a label may be NO_LABEL.
    Returns:
        nats, float32 [B, L], in generation order; divide by log 2 for bits.
    """
    logits = model(tokens, labels, order, group_sizes).float()  # [B, L, V]
    targets = tokens.gather(1, order)  # [B, L]
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # [B L]
    return nats.view(targets.shape)


def decided_order(model, policy, tokens, labels, group_sizes, **options):
    """The order, int64 [B, L] on the CPU, in which a policy would have these tokens decoded; the arguments
    are those of `token_nll` and `generate_tokens`."""
    given = {"teacher": tokens, "return_order": True, **options}
    return generate_tokens(model, labels, policy, group_sizes, **given)[1].cpu()
