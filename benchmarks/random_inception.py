"""Inception weights of random numbers in the layout of the released file (566 keys), for tests and timings.

What is measured with them means nothing; how long it takes and how much memory does not depend on them.
"""

import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity


class _Empty(fidelity.FeatureExtractorInceptionV3):
    """The network as it is made, before any weights are loaded."""

    def load_state_dict(self, *_):
        pass


def save_random_inception(path, seed=0):
    """Write such a file; its features differ from image to image."""
    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Empty("random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        for name, weight in network.named_parameters():
            if name.endswith("conv.weight"):  # torch's own init would let the differences of images fade away
                torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
        torch.nn.init.normal_(network.fc.weight, std=2.0)  # logits far enough apart for a score above 1
    torch.save(network.state_dict(), path)
    return path
