"""scripts/analysis/pictures.py on the shared small run: 4x4 tokens, random features."""

import csv

import numpy as np
import pytest
import torch
from helpers import ON_CPU, call_main, contents, images, tokenizer, trained, words_of
from processes import finished

from benchmarks.classifier import Classifier, ClassifierConfig
from engine.decoding import generate_tokens
from engine.generate import resolve_settings
from engine.measure import MetricSpec
from models.weights import save_weights
from scripts.analysis import pictures
from util.files import read_json


class Brightness:
    """An extractor of two features."""

    name, digest, num_features = "brightness", "0", 2

    @staticmethod
    def metric_name(kind):
        return kind

    def __call__(self, pixels):
        pixels = pixels.float().flatten(1)
        return {"features": torch.stack([pixels.mean(1), pixels.std(1)], dim=1), "logits": pixels[:, :3]}


@pytest.fixture
def flags(tmp_path, monkeypatch):
    spec = MetricSpec([Brightness()], {"brightness": {"mu": np.zeros(2), "sigma": np.eye(2)}})
    monkeypatch.setattr(MetricSpec, "load", lambda *_: spec)
    classifier = Classifier(ClassifierConfig(("a", "b", "c"), 16))
    save_weights(tmp_path / "classifier.safetensors", classifier, accuracy=0.5, epochs=1)

    def words(folder="out", **changes):
        given = {
            "pretrained_ckpt": trained() / "lpd.safetensors", "vqgan_path": tokenizer(), "num_images": 6,
            "fid_stats": "x.npz", "classifier": tmp_path / "classifier.safetensors", "orders": ["lpd"],
            "steps": [3], "seeds": [0, 1], "output_dir": tmp_path / folder,
        }
        return [*words_of({**given, **changes}), *ON_CPU]

    return words


def test_a_row_states_the_mean_over_seeds_and_the_work(flags, tmp_path):
    """3 steps of 16 tokens: groups of 2 or more are context once, the class token too."""
    orders = ["lpd", "confident"]
    finished(call_main(pictures.main, *flags(orders=orders)))
    with (tmp_path / "out/pictures.csv").open() as file:
        plain, looking = csv.DictReader(file)
    results = [read_json(tmp_path / f"out/lpd_3_seed{seed}.json") for seed in (0, 1)]
    shares = [result["metrics"]["recognised"] for result in results]
    assert float(plain["recognised"]) == pytest.approx(sum(shares) / 2) and plain["seeds"] == "2"
    sizes = results[0]["protocol"]["group_sizes"]
    assert plain["forwards"] == looking["forwards"] == "3"
    assert int(plain["rows"]) == 1 + 2 * 16 - sizes[-1]
    assert int(looking["rows"]) == int(plain["rows"]) + 15 + sizes[2]
    before = contents(tmp_path / "out")
    again = finished(call_main(pictures.main, *flags(orders=orders)))
    assert "seed" not in again.out.split("order")[0]  # nothing was measured anew
    assert contents(tmp_path / "out") == before


def test_given_groups_are_those_of_real_images_or_of_a_sequential_sample(flags, monkeypatch):
    seen = []

    def spy(model, labels, order, sizes, **options):
        seen.append((order, sizes, options.get("known")))
        return generate_tokens(model, labels, order, sizes, **options)

    monkeypatch.setattr(pictures, "generate_tokens", spy)
    finished(call_main(pictures.main, *flags("sample", seeds=[0], given=2)))
    (order, alone, _), (_, rest, known) = seen
    sizes = resolve_settings(4, generation_steps=3).group_sizes
    assert (alone, rest) == ((1,) * 16, sizes[2:]) and known.shape == (6, sum(sizes[:2]))
    seen.clear()
    finished(call_main(pictures.main, *flags("real", seeds=[0], given=2, data_path=images())))
    assert len(seen) == 1 and torch.equal(order, seen[0][0])  # nothing was sampled for the given groups
    assert seen[0][2].shape == known.shape and not torch.equal(seen[0][2], known)


@pytest.mark.parametrize("changes, message", [
    ({"given": 3}, "--given 3 is not fewer than 3 groups"),
    ({"given": 1, "orders": ["confident"]}, "confident decides its first groups itself"),
    ({"classifier": "none.safetensors"}, "no such file"),
])
def test_wrong_usage_names_the_flag(flags, tmp_path, changes, message):
    result = call_main(pictures.main, *flags(**changes))
    assert result.status == 2 and message in result.err
    assert not (tmp_path / "out").exists()
