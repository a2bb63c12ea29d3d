"""scripts/export.py: the folder it writes, its model card, and what it refuses."""

import importlib
import re

import helpers
import pytest
import torch
from helpers import call_main
from processes import finished

from models.lpd import LPD
from models.vqgan import VQModel
from models.weights import state_digest
from scripts import export


def exported(checkpoint, folder, *flags):
    finished(call_main(export.main, "--checkpoint", checkpoint, "--output_dir", folder, *flags))
    return folder


def test_export_has_the_weights_and_info_of_its_source(tmp_path):
    for Model, source in ((LPD, helpers.trained() / "lpd.safetensors"), (VQModel, helpers.tokenizer())):
        folder = exported(source, tmp_path / Model.__name__)
        (model, info), (copy, copied_info) = Model.load(source), Model.load(folder)
        assert state_digest(copy) == state_digest(model) and copied_info == info


def test_card_has_sizes_digests_and_training_settings(tmp_path):
    text = (exported(helpers.trained(), tmp_path / "small", "--license", "mit") / "README.md").read_text()
    model, info = LPD.load(helpers.trained() / "lpd.safetensors")
    assert text.startswith("---\nlicense: mit\n---\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    for value in (f"{parameters:,}", "16x16 px", info["tokenizer_digest"], state_digest(model)):
        assert value in text
    assert all(name in text for name in info["class_names"])
    assert "| epochs | 4.0 |" in text and "| global_batch | 4 |" in text
    assert str(tmp_path) not in text


def test_card_invents_no_training_settings_for_released_weights(tmp_path, tiny_lpd):
    info = {"config": vars(tiny_lpd.config)}
    torch.save({"model": tiny_lpd.state_dict(), "info": info}, tmp_path / "a.pth")
    text = (exported(tmp_path / "a.pth", tmp_path / "small") / "README.md").read_text()
    assert "does not record how it was trained" in text and "license" not in text


@pytest.mark.parametrize("source", [helpers.trained, helpers.tokenizer])
def test_command_of_the_card_is_valid(source, tmp_path):
    text = (exported(source(), tmp_path / "small") / "README.md").read_text()
    program, flags = re.search(r"```bash\npython (main_\w+)\.py (.*)\n", text).groups()
    args = importlib.import_module(program).parse_args(flags.split())
    assert "hf://OWNER/small" in vars(args).values()


def test_earlier_export_is_replaced_only_with_overwrite(tmp_path):
    folder = exported(helpers.tokenizer(), tmp_path / "vq")
    argv = ["--checkpoint", helpers.tokenizer(seed=1), "--output_dir", folder]
    outcome = call_main(export.main, *argv)
    assert outcome.status == 2 and f"--output_dir {folder} is not empty" in outcome.err
    finished(call_main(export.main, *argv, "--overwrite"))
    expected = VQModel.load(helpers.tokenizer(seed=1))[0]
    assert state_digest(VQModel.from_pretrained(folder)) == state_digest(expected)


@pytest.mark.parametrize("flags, message", [
    (["--checkpoint", "{tmp}/absent.pth"], "--checkpoint: no such file: {tmp}/absent.pth"),
    (["--checkpoint", "{tmp}/unsized.pth"], "{tmp}/unsized.pth"),
    (["--license", "my own!"], "--license 'my own!'"),
    (["--output_dir", "{tmp}/unsized.pth"], "{tmp}/unsized.pth is not a folder"),
])
def test_mistake_is_one_line_and_nothing_is_written(flags, message, tmp_path, tiny_lpd):
    torch.save({"model": tiny_lpd.state_dict()}, tmp_path / "unsized.pth")
    argv = {"--checkpoint": helpers.tokenizer(), "--output_dir": tmp_path / "out"}
    argv[flags[0]] = flags[1].format(tmp=tmp_path)
    outcome = call_main(export.main, *[word for pair in argv.items() for word in pair])
    assert outcome.status == 2 and outcome.err.startswith("error: ") and outcome.err.count("\n") == 1
    assert message.format(tmp=tmp_path) in outcome.err
    assert not (tmp_path / "out").exists()
