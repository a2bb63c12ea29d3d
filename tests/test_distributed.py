"""Several processes do what one does: the same token cache and training, each image once and the same."""

import os

import programs
import pytest
import torch
from programs import TRAIN, cache_flags, call, contents, finished, torchrun, train_flags

from engine.checkpoint import load_checkpoint, load_lpd, load_tokenizer
from engine.evaluate import balanced_label, generated_images
from engine.settings import resolve_settings
from util import cli
from util.dist import World
from util.images import UnreadableImage
from util.logging import read_metrics


def test_two_processes_make_the_token_cache_of_one(tmp_path):
    """Byte for byte, and each of the three shards is written by one process only."""
    outcome = finished(torchrun(2, "cache", *cache_flags(tmp_path / "cache")))
    assert outcome.out.count(f"{TRAIN} images, 3 shards") == 1
    assert contents(tmp_path / "cache") == contents(programs.token_cache())


def trainable(path):
    """The weights of a checkpoint but the biases of the attention's keys: these shift all scores of a query
    alike, so their gradient is nothing but rounding, of which AdamW makes steps of full size."""
    weights = load_checkpoint(path)["model"]
    for name, weight in weights.items():
        if name.endswith("attn.qkv.bias"):
            third = len(weight) // 3
            weight[third : 2 * third] = 0
    return weights


def test_two_processes_of_two_images_train_as_one_of_four(tmp_path):
    """1e-5, a tenth of one step of AdamW at this rate: the same sums in another order. AdamW does not see a
    gradient that is summed in place of averaged, its norm in the log does."""
    flags = {"epochs": 1, "lr": 1e-4, "proj_dropout": 0, "label_drop_prob": 0}
    finished(torchrun(2, "lpd", *train_flags(tmp_path / "two", batch_size=2, **flags)))
    finished(call("lpd", *train_flags(tmp_path / "one", batch_size=4, **flags)))
    logs = [read_metrics(tmp_path / run) for run in ("one", "two")]
    for name, rounding in (("loss", 2e-5), ("grad_norm", 2e-4)):  # written to 5 and to 4 places
        one, two = ([line[name] for line in log] for log in logs)
        assert len(one) == 5 and two == pytest.approx(one, abs=rounding)
    one, two = (trainable(tmp_path / run / "checkpoint-last.pth") for run in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def generation():
    """Model, tokenizer and settings of the shared run."""
    model, _ = load_lpd(programs.trained() / "lpd.safetensors")
    settings = resolve_settings(4, generation_steps=4, cfg=2.0, seed=3)
    return model, load_tokenizer(programs.tokenizer()), settings


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_every_image_of_an_evaluation_is_made_by_one_process(generation, size):
    """7 images, also where some processes have none or other numbers of batches than the others."""
    ids = []
    for rank in range(size):
        world = World(rank, size, torch.device("cpu"))
        for batch, images in generated_images(*generation, 7, 2, world):
            assert len(batch) == len(images) <= 2
            ids += batch.tolist()
    assert sorted(ids) == list(range(7))


def test_image_is_the_same_for_one_and_two_processes(generation):
    """One grey level: the decoder's convolutions may sum in another order in another batch."""
    images = {}
    for size in (1, 2):
        for rank in range(size):
            world = World(rank, size, torch.device("cpu"))
            for ids, batch in generated_images(*generation, 7, 3, world):
                images |= {(size, i): image.int() for i, image in zip(ids.tolist(), batch, strict=True)}
    for i in range(7):
        assert (images[1, i] - images[2, i]).abs().max() <= 1
    assert (images[1, 0] - images[1, 1]).abs().max() > 1  # different images are told apart by this


@pytest.mark.parametrize("num_images,counts", [(9, [3, 3, 3]), (10, [4, 3, 3]), (2, [1, 1, 0])])
def test_classes_of_an_evaluation_are_balanced(num_images, counts):
    labels = balanced_label(torch.arange(num_images), num_images, 3)
    assert labels.tolist() == sorted(labels.tolist())
    assert sorted(torch.bincount(labels, minlength=3).tolist(), reverse=True) == counts


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("error", [cli.UsageError, cli.Failure, UnreadableImage, OSError])
def test_fault_is_told_once_and_never_swallowed(rank, error, monkeypatch, capsys):
    """All processes find a fault in the flags, so the first tells it; a failure may be any one's alone."""

    def main():
        raise error("what happened")

    monkeypatch.setitem(os.environ, "RANK", rank)
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    wrong_usage = error is cli.UsageError
    assert end.value.code == (2 if wrong_usage else 1)
    silent = wrong_usage and rank == "1"
    assert capsys.readouterr().err == ("" if silent else "error: what happened\n")
