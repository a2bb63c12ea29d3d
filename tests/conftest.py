"""Fixtures that several test files share: tiny models with seeded weights, and the golden values.

They import torch when they are used: the process that only hands out tests does without it.
"""

import signal
from pathlib import Path

import pytest

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and in child processes too


@pytest.fixture
def tiny_config():
    """4x4 tokens of 32 codes, 5 classes."""
    from models.lpd import LPDConfig

    return LPDConfig(grid_size=4, vocab_size=32, num_classes=5, embed_dim=32, depth=2, num_heads=4)


@pytest.fixture
def tiny_lpd(tiny_config):
    """A new `LPD(tiny_config)` in eval mode, the same weights each time."""
    from models.lpd import LPD

    return seeded(LPD, tiny_config)


@pytest.fixture
def tiny_vq():
    """A new `VQModel` of stride 2 with the codes of `tiny_config`, in eval mode, the same each time."""
    from models.vqgan import VQConfig, VQModel

    sizes = {"base_width": 32, "multipliers": (1, 2), "num_res_blocks": 1}
    return seeded(VQModel, VQConfig(vocab_size=32, code_dim=4, **sizes))


def seeded(build, config):
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(config).eval()


@pytest.fixture(scope="session")
def golden():
    """The folder of values made with the published code; its README describes them."""
    return Path(__file__).parent / "golden"


def pytest_collection_modifyitems(items):
    """Start with the SLURM tests, which wait for minutes: the others run beside them."""
    items.sort(key=lambda item: "test_slurm" not in item.nodeid)
