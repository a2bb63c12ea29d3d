"""The shipped weights are whole, small, belong together, and the demo runs on them."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import programs
from PIL import Image

from engine.checkpoint import load_lpd, load_tokenizer, state_digest

ROOT = Path(__file__).resolve().parents[1]
FASHION = ROOT / "assets" / "fashion_mnist"


def test_assets_stay_under_25_mb():
    assert sum(path.stat().st_size for path in (ROOT / "assets").rglob("*") if path.is_file()) < 25e6


def test_shipped_model_was_trained_with_the_shipped_tokenizer():
    _, info = load_lpd(FASHION / "lpd.safetensors")
    assert info["tokenizer_digest"] == state_digest(load_tokenizer(FASHION / "tokenizer.safetensors"))


def test_shipped_model_names_its_ten_classes():
    model, info = load_lpd(FASHION / "lpd.safetensors")
    assert len(info["class_names"]) == model.config.num_classes == 10


def test_what_is_said_of_the_weights_is_what_they_hold():
    model, info = load_lpd(FASHION / "lpd.safetensors")
    said = json.loads((FASHION / "weights.json").read_text())["lpd"]
    assert said["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert said["train_config"]["epochs"] == info["train_config"]["epochs"]


def test_demo_command_makes_recognisable_shapes(tmp_path):
    """The demo's own flags, two images a class. Trousers leave the middle of the bottom row dark between two
    legs; t-shirts do not: a model that ignores its label fails this."""
    script = (ROOT / "scripts" / "demo.sh").read_text().replace("\\\n", " ")
    line = re.search(r'"\$repo/main_sample.py"(.*)', script)[1]
    values = {"$lpd": FASHION / "lpd.safetensors", "$tokenizer": FASHION / "tokenizer.safetensors"}
    flags = [str(values.get(word, word)) for word in shlex.split(line) if word != "$@"]
    flags = [str(tmp_path / "demo") if word.endswith("/output/demo") else word for word in flags]
    outcome = programs.finished(programs.call("sample", *flags, "--num_per_class", 2, *programs.ON_CPU))
    assert "64" in outcome.out and "one image alone" in outcome.out

    def bottom_middle(name):
        images = sorted((tmp_path / "demo" / "images_8_steps" / name).glob("*.png"))
        return np.mean([np.asarray(Image.open(path))[24:29, 15:17].mean() for path in images])

    assert bottom_middle("0_t-shirt") > bottom_middle("1_trouser") + 30
