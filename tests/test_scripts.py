"""The shell scripts and the data converter: what they start, what they refuse, what they leave behind.

Nothing here installs, downloads or trains: `DRY_RUN=1` prints the command, a stand-in plays Python.
"""

import gzip
import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main_lpd

REPO = Path(__file__).resolve().parents[1]
SHELL_SCRIPTS = [REPO / "environment_setup.sh", REPO / ".ci/run", *sorted(REPO.glob("[!.]*/**/*.sh"))]
CLEAN = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}

TRAIN_COMMON = {
    "--blr": "1e-4", "--min_lr": "1e-5", "--weight_decay": "0.02", "--grad_clip": "3.0",
    "--label_drop_prob": "0.1",
}  # fmt: skip
FROM_256 = {"--epochs": "50", "--lr_schedule": "cosine", "--warmup_epochs": "1"}
FROM_START = {
    "--epochs": "450", "--lr_schedule": "constant+cosine", "--warmup_epochs": "50",
    "--lr_decay_start_epoch": "400",
}  # fmt: skip
TRAINING = {  # model, pixels, global batch, the rest
    "lpd_l_256": ("lpd_l", 256, 2048, FROM_START),
    "lpd_xl_256": ("lpd_xl", 256, 1024, FROM_START),
    "lpd_xxl_256": ("lpd_xxl", 256, 1024, FROM_START),
    "lpd_l_512": ("lpd_l", 512, 2048, FROM_256),
    "lpd_xl_512": ("lpd_xl", 512, 1024, FROM_256),
}
EVALUATION = {  # model, pixels, steps, guidance scale, repulsion of the order file
    "lpd_l_res256_steps20": ("lpd_l", 256, 20, 4.8, 2),
    "lpd_xl_res256_steps20": ("lpd_xl", 256, 20, 4.9, 2),
    "lpd_xxl_res256_steps20": ("lpd_xxl", 256, 20, 5.9, 3),
    "lpd_l_res256_steps32": ("lpd_l", 256, 32, 5.4, 2),
    "lpd_xl_res256_steps32": ("lpd_xl", 256, 32, 5.0, 2),
    "lpd_l_res512_steps48": ("lpd_l", 512, 48, 7.3, 4),
    "lpd_xl_res512_steps48": ("lpd_xl", 512, 48, 6.0, 4),
}
RECIPES = [f"train/{name}" for name in TRAINING] + [f"eval/{name}" for name in EVALUATION]


def bash(script, *args, env=None, cwd="/"):
    """Run a script with bash, from another working directory, in an environment of its own."""
    return subprocess.run(
        ["bash", str(script), *args], env={**CLEAN, **(env or {})}, cwd=cwd, capture_output=True, text=True
    )


def flags_of(command):
    """The flags after main_lpd.py in a printed command, as a dict; a flag without a value has ''."""
    words = shlex.split(command)
    flags = {}
    for word in words[words.index(str(REPO / "main_lpd.py")) + 1 :]:
        if word.startswith("--"):
            flag = word
            flags[flag] = ""
        else:
            flags[flag] = word
    return flags


@pytest.fixture
def paths(tmp_path):
    """An environment that names everything a recipe needs, in a folder with a space in its name."""
    folder = tmp_path / "my files"
    folder.mkdir()
    env = {"OUTPUT_DIR": str(folder / "out"), "CACHED_PATH": str(folder), "DRY_RUN": "1", "NGPU": "8"}
    for name in ("VQGAN_PATH", "PRETRAINED_CKPT", "FID_STATS", "LPD_ORDER_FILE"):
        env[name] = str(folder / name.lower())
        Path(env[name]).touch()
    return env


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda p: str(p.relative_to(REPO)))
def test_shell_scripts_are_well_formed(script):
    assert bash("-n", str(script)).returncode == 0
    if script.name not in ("common.sh", "environment.sh"):  # these are sourced
        assert "set -euo pipefail" in script.read_text()


def test_there_is_a_script_for_every_published_run():
    assert {p.stem for p in (REPO / "scripts/train").iterdir()} == set(TRAINING)
    assert {p.stem for p in (REPO / "scripts/eval").iterdir()} == set(EVALUATION)


@pytest.mark.parametrize("name", TRAINING)
def test_training_script_gives_the_published_recipe(name, paths):
    model, pixels, batch, recipe = TRAINING[name]
    result = bash(REPO / f"scripts/train/{name}.sh", "--seed", "7", env=paths)
    assert (result.returncode, result.stderr) == (0, "")
    flags = flags_of(result.stdout)
    expected = {
        **TRAIN_COMMON, **recipe, "--model": model, "--img_size": str(pixels), "--bf16": "",
        "--use_cached": "", "--batch_size": str(batch // 8), "--accum_iter": "1",
        "--cached_path": paths["CACHED_PATH"], "--vqgan_path": paths["VQGAN_PATH"],
        "--output_dir": paths["OUTPUT_DIR"], "--seed": "7",
    }  # fmt: skip
    assert expected.items() <= flags.items()
    assert flags.get("--pretrained_ckpt") == (paths["PRETRAINED_CKPT"] if pixels == 512 else None)


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_script_gives_the_published_setting(name, paths):
    model, pixels, steps, cfg, _ = EVALUATION[name]
    result = bash(REPO / f"scripts/eval/{name}.sh", "--eval_bsz", "5", env=paths)
    assert (result.returncode, result.stderr) == (0, "")
    flags = flags_of(result.stdout)
    expected = {
        "--evaluate": "", "--model": model, "--img_size": str(pixels), "--generation_steps": str(steps),
        "--num_images": "50000", "--cfg_schedule": "linear", "--temperature": "1.0", "--eval_bsz": "5",
        "--pretrained_ckpt": paths["PRETRAINED_CKPT"], "--fid_stats": paths["FID_STATS"],
        "--lpd_order_file": paths["LPD_ORDER_FILE"], "--vqgan_path": paths["VQGAN_PATH"],
    }  # fmt: skip
    assert expected.items() <= flags.items()
    assert float(flags["--cfg"]) == cfg


def test_scripts_pass_names_on_the_hub_on(paths):
    names = {name: f"hf://owner/{name}" for name in ("PRETRAINED_CKPT", "VQGAN_PATH", "LPD_ORDER_FILE")}
    result = bash(REPO / "scripts/eval/lpd_l_res256_steps20.sh", env={**paths, **names})
    assert (result.returncode, result.stderr) == (0, "")
    assert {f"--{name.lower()}": value for name, value in names.items()}.items() <= flags_of(
        result.stdout
    ).items()


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_script_asks_for_the_published_order_file(name, paths):
    model, pixels, steps, _, repulsion = EVALUATION[name]
    paths["LPD_ORDER_FILE"] = str(Path(paths["OUTPUT_DIR"], "none.json"))
    result = bash(REPO / f"scripts/eval/{name}.sh", env=paths)
    assert result.returncode == 2 and "LPD_ORDER_FILE" in result.stderr
    text = (REPO / f"scripts/eval/{name}.sh").read_text()
    assert f"res{pixels}_steps{steps}_repulsion{repulsion} " in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_unset_or_missing_is_named_before_anything_starts(recipe, paths):
    needed = {"OUTPUT_DIR"} | ({"CACHED_PATH"} if "train" in recipe else {"PRETRAINED_CKPT", "FID_STATS"})
    needed |= {"PRETRAINED_CKPT"} if "512" in recipe else set()
    script = REPO / f"scripts/{recipe}.sh"
    for name in needed:
        result = bash(script, env={k: v for k, v in paths.items() if k != name})
        assert result.returncode == 2 and result.stderr.startswith(f"error: {name} is not set")
    for name in needed - {"OUTPUT_DIR"} | {"VQGAN_PATH"}:
        result = bash(script, env={**paths, name: "/no/such/path"})
        assert result.returncode == 2 and f"{name}: /no/such/path does not exist" in result.stderr
    assert not Path(paths["OUTPUT_DIR"]).exists()


@pytest.mark.parametrize(
    "env, batch_size, accum_iter",
    [
        ({"NGPU": "8"}, 256, 1),
        ({"NGPU": "8", "NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "node0"}, 64, 1),
        ({"NGPU": "8", "MAX_BATCH_PER_GPU": "100"}, 64, 4),
        ({"NGPU": "1", "MAX_BATCH_PER_GPU": "256"}, 256, 8),
    ],
)
def test_batch_per_gpu_times_gpus_times_accumulation_is_the_global_batch(env, batch_size, accum_iter, paths):
    result = bash(REPO / "scripts/train/lpd_l_256.sh", env={**paths, **env})
    flags = flags_of(result.stdout)
    assert (flags["--batch_size"], flags["--accum_iter"]) == (str(batch_size), str(accum_iter))
    assert batch_size * accum_iter * int(env["NGPU"]) * int(env.get("NNODES", 1)) == 2048


@pytest.mark.parametrize(
    "env, message",
    [
        ({"NGPU": "3"}, "NGPU x NNODES = 3 does not divide the global batch of 2048"),
        ({"NGPU": "two"}, "NGPU=two is not a whole number"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "node0"}, "NODE_RANK is not set"),
        ({"MAX_BATCH_PER_GPU": "0"}, "MAX_BATCH_PER_GPU=0 is not a whole number"),
    ],
)
def test_a_layout_that_cannot_work_is_refused(env, message, paths):
    result = bash(REPO / "scripts/train/lpd_l_256.sh", env={**paths, **env})
    assert result.returncode == 2 and message in result.stderr


# Set-up: a stand-in for Python answers what environment_setup.sh asks, and writes down each pip install.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    -c*) echo "$FAKE_VERSION" ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "${@: -1}" >>pip.log; exit "${FAKE_PIP_STATUS:-0}" ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what environment_setup.sh works on, with a stand-in for Python beside it."""
    for name in ("environment_setup.sh", *(path.name for path in REPO.glob("requirements*.txt"))):
        shutil.copy(REPO / name, tmp_path)
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)

    def setup(*args, version="3.12", **env):
        env = {"PYTHON": str(fake), "FAKE_VERSION": version, "PATH": "/usr/bin:/bin", **env}
        return bash(tmp_path / "environment_setup.sh", *args, env=env)

    def installed():
        log = tmp_path / "pip.log"
        return log.read_text().split() if log.exists() else []

    return tmp_path, setup, installed


@pytest.mark.parametrize("version", ["2.7", "3.9"])
def test_setup_refuses_an_old_python(version, checkout):
    folder, setup, _ = checkout
    result = setup(version=version)
    assert result.returncode == 2
    assert result.stderr.startswith("error: PYTHON=") and version in result.stderr
    assert not (folder / ".venv").exists()


def test_setup_installs_once_and_again_what_changed(checkout):
    folder, setup, installed = checkout
    assert setup().returncode == 0
    assert installed() == ["requirements.txt"]
    assert setup("--dev").returncode == 0
    assert installed() == ["requirements.txt", "requirements-dev.txt"]
    assert setup("--dev").returncode == 0 and setup().returncode == 0
    assert len(installed()) == 2
    (folder / "requirements.txt").write_text("torch\n")
    assert setup("--dev").returncode == 0
    assert installed()[2:] == ["requirements.txt"]
    assert setup("--app").returncode == 0
    assert installed()[3:] == ["requirements-app.txt"]


def test_setup_goes_on_after_a_failed_install(checkout):
    _, setup, installed = checkout
    result = setup(FAKE_PIP_STATUS="1")
    assert result.returncode == 1 and "installing requirements.txt" in result.stderr
    assert setup().returncode == 0
    assert installed() == ["requirements.txt", "requirements.txt"]


def test_setup_makes_a_broken_venv_again(checkout):
    folder, setup, installed = checkout
    (folder / ".venv/bin").mkdir(parents=True)
    result = setup()
    assert result.returncode == 0 and ".venv does not work: making it again" in result.stdout
    assert installed() == ["requirements.txt"]


@pytest.mark.parametrize("args", [("--develop",), ("one", "two")])
def test_setup_refuses_wrong_arguments(args, checkout):
    folder, setup, _ = checkout
    assert setup(*args).returncode == 2
    assert not (folder / ".venv").exists()


# Fashion-MNIST


def idx(array):
    """A uint8 array as the bytes of a gzipped idx file."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def fashion_mnist():
    spec = importlib.util.spec_from_file_location("fashion_mnist", REPO / "scripts/data/fashion_mnist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path):
    """The four idx files of a tiny data set: twelve training images (class i % 10), three to hold out."""
    folder = tmp_path / "source"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (15, 28, 28), dtype=np.uint8)
    for stem, chosen in (("train", slice(0, 12)), ("t10k", slice(12, 15))):
        part = images[chosen]
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(part))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(len(part)) % 10))
    return folder, images


def test_folders_hold_each_image_padded_under_its_class(fashion_mnist, source, tmp_path):
    folder, images = source
    out = tmp_path / "out"
    fashion_mnist.main([str(out), "--source", str(folder)])
    names = sorted(p.name for p in (out / "train").iterdir())
    assert names == list(fashion_mnist.CLASSES)
    assert sorted(p.relative_to(out).as_posix() for p in out.glob("*/*/*")) == sorted(
        [f"train/{names[i % 10]}/{i:05d}.png" for i in range(12)]
        + [f"val/{names[i]}/{i:05d}.png" for i in range(3)]
    )
    written = Image.open(out / "train" / names[1] / "00011.png")
    assert written.mode == "L" and written.size == (32, 32)
    assert np.array_equal(np.asarray(written), np.pad(images[11], 2))


def test_finished_folder_is_left_and_unfinished_one_completed(fashion_mnist, source, tmp_path, capsys):
    out = tmp_path / "out"
    args = [str(out), "--source", str(source[0])]
    fashion_mnist.main(args)
    kept = next((out / "train").glob("*/*.png"))
    kept.write_bytes(b"mine")
    shutil.rmtree(out / "val")
    (out / "val.partial").mkdir()  # what a killed run leaves
    (out / "val.partial" / "half").touch()
    fashion_mnist.main(args)
    assert "12 images are there already" in capsys.readouterr().out
    assert kept.read_bytes() == b"mine"
    assert sorted(p.name for p in out.iterdir()) == ["train", "val"]
    assert len(list((out / "val").glob("*/*.png"))) == 3 and not (out / "val/half").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("train-images-idx3-ubyte.gz", b"no gzip", "Not a gzipped file"),
        ("train-images-idx3-ubyte.gz", idx(np.zeros((12, 28, 28)))[:40], "ended before"),
        ("train-labels-idx1-ubyte.gz", idx(np.zeros((12, 2))), "not an idx file"),
        ("train-labels-idx1-ubyte.gz", idx(np.zeros(11)), "12 train images but 11 labels"),
        ("train-labels-idx1-ubyte.gz", idx(np.full(12, 10)), "label 10"),
        ("train-labels-idx1-ubyte.gz", None, "No such file"),
    ],
)
def test_bad_source_files_are_named_and_nothing_is_written(
    fashion_mnist, source, tmp_path, name, content, message
):
    (source[0] / name).unlink()
    if content is not None:
        (source[0] / name).write_bytes(content)
    with pytest.raises(SystemExit) as error:
        fashion_mnist.main([str(tmp_path / "out"), "--source", str(source[0])])
    assert str(error.value).startswith("error: ") and message in str(error.value)
    assert str(source[0]) in str(error.value)
    assert not (tmp_path / "out").exists()


def test_fashion_mnist_script_needs_one_folder():
    result = bash(REPO / "scripts/data/fashion_mnist.sh")
    assert result.returncode == 2 and result.stderr.startswith("usage: ")


# Sweeps


def test_guidance_sweep_tries_few_images_and_ends_with_the_published_number(paths):
    result = bash(REPO / "scripts/sweep_cfg.sh", "--model", "lpd_xl", env={**paths, "CFGS": "1.5 2"})
    assert (result.returncode, result.stderr) == (0, "")
    flags = flags_of(result.stdout)
    expected = {"--num_images": "10000", "--final_images": "50000", "--model": "lpd_xl",
                "--fid_stats": paths["FID_STATS"], "--lpd_order_file": paths["LPD_ORDER_FILE"]}  # fmt: skip
    assert expected.items() <= flags.items()
    assert "--sweep_cfg 1.5 2 --" in result.stdout


def test_guidance_sweep_of_one_scale_is_refused(paths):
    result = bash(REPO / "scripts/sweep_cfg.sh", env={**paths, "CFGS": "3"})
    assert result.returncode == 2 and result.stderr == "error: CFGS=3: name two guidance scales or more\n"


def test_fashion_sweep_compares_orders_by_steps_over_three_seeds(paths):
    result = bash(REPO / "scripts/sweep_fashion.sh", "--device", "cpu", env=paths)
    assert (result.returncode, result.stderr) == (0, "")
    flags = flags_of(result.stdout)
    reference = str(Path(paths["OUTPUT_DIR"], "fashion_mnist_val.npz"))
    expected = {"--features": "efficientnet_lite0", "--num_images": "2000", "--fid_stats": reference,
                "--pretrained_ckpt": paths["PRETRAINED_CKPT"], "--device": "cpu"}  # fmt: skip
    assert expected.items() <= flags.items()
    assert "--sweep_order lpd halton random raster --" in result.stdout
    assert "--sweep_steps 4 8 16 32 --seeds 0 1 2 --" in result.stdout
    assert not Path(paths["OUTPUT_DIR"]).exists()


def test_fashion_sweep_names_what_is_missing(paths):
    script = REPO / "scripts/sweep_fashion.sh"
    result = bash(script, env={k: v for k, v in paths.items() if k != "OUTPUT_DIR"})
    assert result.returncode == 2 and result.stderr.startswith("error: OUTPUT_DIR is not set")
    result = bash(script, env={**paths, "PRETRAINED_CKPT": "/no/such/path"})
    assert result.returncode == 2 and "PRETRAINED_CKPT: /no/such/path does not exist" in result.stderr


@pytest.mark.parametrize("script", ["sweep_cfg", "sweep_fashion"])
def test_command_of_a_sweep_is_one_main_lpd_takes(script, paths):
    """Parsed and checked as far as flags go: what the script puts together is allowed together."""
    words = shlex.split(bash(REPO / f"scripts/{script}.sh", env=paths).stdout)
    args = main_lpd.parse_args(words[words.index(str(REPO / "main_lpd.py")) + 1 :])
    Path(args.fid_stats).parent.mkdir(exist_ok=True)
    Path(args.fid_stats).touch()
    main_lpd.check_flags(args)
