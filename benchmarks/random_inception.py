"""Random Inception weights in the layout of the released file (566 keys), for tests and timings.

Metrics computed with them mean nothing; time and memory do not depend on the weights.
"""

import torch


def save_random_inception(path, seed=0):
    """Write such a file; its features differ from image to image. Returns the path."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # takes seconds

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            pass

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Unloaded("random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        for name, weight in network.named_parameters():
            if name.endswith("conv.weight"):  # with torch's own init the differences between images fade
                torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
        torch.nn.init.normal_(network.fc.weight, std=4.0)  # logits far enough apart for a score above 1
    torch.save(network.state_dict(), path)
    return path
