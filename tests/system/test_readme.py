"""Commands in README.md and docs/ parse, files that the README names exist, and the demo's weights work."""

import importlib
import json
import re
import shlex

import numpy as np
import pytest
from helpers import ON_CPU, call, picture
from processes import REPO, finished

from models.lpd import LPD
from models.vqgan import VQModel
from models.weights import state_digest

README = (REPO / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for page in (README, *(path.read_text() for path in sorted((REPO / "docs").glob("*.md"))))
    for block in re.findall(r"```bash\n(.*?)```", page, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if re.search(r"\.(py|sh)\b", line)
]
FASHION = REPO / "assets/fashion_mnist"


def test_readme_has_commands():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("command", COMMANDS)
def test_command_names_a_program_and_valid_flags(command):
    words = [word for word in shlex.split(command) if not re.match("[A-Z_]+=", word)]
    words = [word for word in words if word != "scripts/cli/agent.py"]  # which is torchrun
    at = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    assert (REPO / words[at]).is_file()
    if words[at].startswith("main_"):
        importlib.import_module(words[at].removesuffix(".py")).parse_args(words[at + 1 :])


def test_python_example_runs(monkeypatch):
    monkeypatch.chdir(REPO)
    names = {}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    assert names["images"].shape == (10, 32, 32, 3)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_link_leads_to_a_file(path):
    assert (REPO / path).exists()


def test_files_of_the_map_exist_and_every_program_is_in_it():
    paths, folder = set(), ""
    for line in re.search(r"## Map\n+```\n(.*?)```", README, re.S)[1].splitlines():
        names = [name for name in re.split(r"\s{2,}", line.strip()) if " " not in name]
        folder = folder if line.startswith(" ") else ""
        for name in names:
            choice = re.search(r"\{(.*?)\}", name)
            options = choice[1].split(",") if choice else [""]
            paths |= {folder + (name.replace(choice[0], option) if choice else name) for option in options}
        folder = names[0] if names[0].endswith("/") else folder
    assert not [path for path in paths if not (REPO / path).exists()]
    assert {path.name for path in REPO.glob("main_*.py")} <= paths


def test_assets_are_small_and_belong_together():
    assert sum(path.stat().st_size for path in (REPO / "assets").rglob("*") if path.is_file()) < 25e6
    model, info = LPD.load(FASHION / "lpd.safetensors")
    tokenizer, _ = VQModel.load(FASHION / "tokenizer.safetensors")
    assert info["tokenizer_digest"] == state_digest(tokenizer)
    assert len(info["class_names"]) == model.config.num_classes == 10
    described = json.loads((FASHION / "weights.json").read_text())["lpd"]
    assert described["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert described["train_config"]["epochs"] == info["train_config"]["epochs"]


def test_demo_command_makes_recognisable_shapes(tmp_path):
    """Trousers leave the middle of the bottom row dark between the legs, T-shirts do not: a model that
    ignores its label fails."""
    script = (REPO / "scripts/demo.sh").read_text().replace("\\\n", " ")
    line = re.search(r'"\$repo/main_sample.py"(.*)', script)[1]
    words = [FASHION / "lpd.safetensors" if word == "$lpd" else word for word in shlex.split(line)[:-1]]
    words = [tmp_path if str(word).endswith("/output/demo") else word for word in words]
    outcome = finished(call("sample", *words, "--classes", 0, 1, "--num_per_class", 3, *ON_CPU))
    assert re.search(r"alone: .* in 8 steps, .* in 64: ", outcome.out)

    def bottom_middle(name):
        images = (tmp_path / "images_8_steps" / name).glob("*.png")
        return np.mean([picture(path)[24:29, 15:17].mean() for path in images])

    assert bottom_middle("0_t-shirt") > bottom_middle("1_trouser") + 30
