"""The shell scripts and the data converter: what they start, what they refuse, what they write.

Nothing here installs, downloads or trains: `DRY_RUN=1` prints the command, a stand-in replaces Python.
"""

import gzip
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import call_main
from PIL import Image
from processes import REPO

from engine.published import PUBLISHED, order_file
from scripts import sweep
from scripts.data import fashion_mnist

SHELL_SCRIPTS = [REPO / "environment_setup.sh", REPO / ".ci/run", *sorted(REPO.glob("[!.]*/**/*.sh"))]
CLEAN = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}

TRAIN_COMMON = {
    "--blr": "1e-4", "--min_lr": "1e-5", "--weight_decay": "0.02", "--grad_clip": "3.0",
    "--label_drop_prob": "0.1",
}
FROM_256 = {"--epochs": "50", "--lr_schedule": "cosine", "--warmup_epochs": "1"}
FROM_SCRATCH = {
    "--epochs": "450", "--lr_schedule": "constant+cosine", "--warmup_epochs": "50",
    "--lr_decay_start_epoch": "400",
}
TRAINING = {  # model, pixels, global batch, the rest
    "lpd_l_256": ("lpd_l", 256, 2048, FROM_SCRATCH),
    "lpd_xl_256": ("lpd_xl", 256, 1024, FROM_SCRATCH),
    "lpd_xxl_256": ("lpd_xxl", 256, 1024, FROM_SCRATCH),
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


def bash(script, *args, env=None):
    """Run a script with bash, from another working directory, in an environment of its own."""
    words = ["bash", str(script), *args]
    return subprocess.run(words, env={**CLEAN, **(env or {})}, cwd="/", capture_output=True, text=True)


def flags_of(result):
    """The flags after main_lpd.py in a printed command, as a dict; a flag without a value has ''."""
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
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
    """An environment that sets everything a recipe needs, in a folder with a space in its name."""
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
    assert "set -euo pipefail" in script.read_text() or script.name == "common.sh"  # which is sourced
    git = subprocess.run(["git", "check-attr", "eol", script], cwd=REPO, capture_output=True, text=True)
    assert git.stdout.endswith(": eol: lf\n")  # whatever Windows would make of it


def test_every_published_run_has_a_script():
    assert {p.stem for p in (REPO / "scripts/train").iterdir()} == set(TRAINING)
    assert {p.stem for p in (REPO / "scripts/eval").iterdir()} == set(EVALUATION)


@pytest.mark.parametrize("name", TRAINING)
def test_training_script_has_the_published_recipe(name, paths):
    model, pixels, batch, recipe = TRAINING[name]
    flags = flags_of(bash(REPO / f"scripts/train/{name}.sh", "--seed", "7", env=paths))
    flags_on_cpu = flags_of(bash(REPO / f"scripts/train/{name}.sh", "--device", "cpu", env=paths))
    assert flags_on_cpu["--device"] == "cpu"
    expected = {
        **TRAIN_COMMON, **recipe, "--model": model, "--img_size": str(pixels), "--bf16": "",
        "--use_cached": "", "--seed": "7", "--device": "cuda",
        "--cached_path": paths["CACHED_PATH"], "--vqgan_path": paths["VQGAN_PATH"],
        "--output_dir": paths["OUTPUT_DIR"],
    }
    assert expected.items() <= flags.items()
    assert 8 * int(flags["--batch_size"]) * int(flags["--accum_iter"]) == batch
    assert flags.get("--pretrained_ckpt") == (paths["PRETRAINED_CKPT"] if pixels == 512 else None)


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_script_has_the_published_settings(name, paths):
    model, pixels, steps, cfg, repulsion = EVALUATION[name]
    script = REPO / f"scripts/eval/{name}.sh"
    flags = flags_of(bash(script, "--eval_bsz", "5", env=paths))
    expected = {
        "--evaluate": "", "--device": "cuda", "--model": f"{model}_{pixels}", "--img_size": str(pixels),
        "--generation_steps": str(steps), "--num_images": "50000", "--cfg_schedule": "linear",
        "--temperature": "1.0", "--eval_bsz": "5",
        "--pretrained_ckpt": paths["PRETRAINED_CKPT"], "--fid_stats": paths["FID_STATS"],
        "--lpd_order_file": paths["LPD_ORDER_FILE"], "--vqgan_path": paths["VQGAN_PATH"],
    }
    assert expected.items() <= flags.items() and float(flags["--cfg"]) == cfg
    assert f"eval_lpd res{pixels}_steps{steps}_repulsion{repulsion} " in script.read_text()
    published = PUBLISHED[flags["--model"]]
    assert (published.size, published.img_size, published.repulsion) == (model, pixels, repulsion)
    assert published.guidance[steps] == cfg


@pytest.mark.parametrize("name", EVALUATION)
def test_evaluation_without_files_reads_the_published_ones(name, paths):
    """Weights that are not given are those of the published name, which main_lpd.py knows."""
    flags = flags_of(bash(REPO / f"scripts/eval/{name}.sh", env={
        name: paths[name] for name in ("DRY_RUN", "NGPU", "FID_STATS")
    }))
    published, steps = PUBLISHED[flags["--model"]], int(flags["--generation_steps"])
    made = REPO / f"orders/lpd_orders_generated/{Path(order_file(published, steps)).name}"
    assert flags["--lpd_order_file"] == (str(made) if made.exists() else order_file(published, steps))
    assert flags["--vqgan_path"] == published.flags(name)["vqgan_path"]
    assert "--pretrained_ckpt" not in flags and flags["--output_dir"] == f"output/eval/{name}"


@pytest.mark.parametrize("reachable", [True, False])
def test_orders_are_made_here_if_the_hub_is_not_reachable(reachable, tmp_path):
    """A stand-in for Python fetches nothing, or fails to, and makes orders without any work."""
    for name in ("scripts/common.sh", "orders/run_lpd_order.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"#!/usr/bin/env bash\n[[ $1 == */fetch.py ]] && exit {0 if reachable else 2}\n"
        'while [[ $1 != --output_file ]]; do shift; done\nmkdir -p "${2%/*}" && touch "$2"\n'
    )
    python.chmod(0o755)
    name = "res256_steps20_repulsion2"
    command = f"source scripts/common.sh; require_orders {name}; echo $LPD_ORDER_FILE"
    words = ["bash", "-euc", command]
    result = subprocess.run(words, env=CLEAN, cwd=tmp_path, capture_output=True, text=True)
    made = tmp_path / f"orders/lpd_orders_generated/{name}.json"
    expected = f"hf://mit-han-lab/lpd_orders/{name}.json" if reachable else str(made)
    assert (result.stdout, made.exists()) == (f"{expected}\n", not reachable), result.stderr


def test_names_on_the_hub_are_passed_on(paths):
    paths["PRETRAINED_CKPT"] = "hf://owner/lpd"
    flags = flags_of(bash(REPO / "scripts/eval/lpd_l_res256_steps20.sh", env=paths))
    assert flags["--pretrained_ckpt"] == "hf://owner/lpd"


@pytest.mark.parametrize("script, needed", [
    ("train/lpd_l_512", {"OUTPUT_DIR", "CACHED_PATH", "PRETRAINED_CKPT"}),
    ("sweep_fashion", {"OUTPUT_DIR"}),
])
def test_missing_variable_or_file_is_named_before_anything_starts(script, needed, paths):
    script = REPO / f"scripts/{script}.sh"
    for name in needed:
        result = bash(script, env={k: v for k, v in paths.items() if k != name})
        assert result.returncode == 2 and result.stderr.startswith(f"error: {name} is not set")
    for name in needed - {"OUTPUT_DIR"} | {"VQGAN_PATH"}:
        result = bash(script, env={**paths, name: "/no/such/path"})
        assert result.returncode == 2 and f"{name}: /no/such/path does not exist" in result.stderr
    assert not Path(paths["OUTPUT_DIR"]).exists()


@pytest.mark.parametrize("pixels, steps", [(256, 20), (512, 48)])
def test_evaluation_compares_with_the_published_statistics(pixels, steps, paths):
    script = REPO / f"scripts/eval/lpd_l_res{pixels}_steps{steps}.sh"
    del paths["FID_STATS"]
    result, default = bash(script, env=paths), REPO / f"fid_stats/adm_in{pixels}_stats.npz"
    if default.exists():
        assert flags_of(result)["--fid_stats"] == str(default)
    else:
        assert result.returncode == 2 and f"FID_STATS: {default} does not exist" in result.stderr


@pytest.mark.parametrize("env, batch_size, accum_iter", [
    ({"NGPU": "8", "NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "node0"}, 64, 1),
    ({"NGPU": "8", "MAX_BATCH_PER_GPU": "100"}, 64, 4),
    ({"NGPU": "8"}, 64, 4),
    ({"NGPU": "1", "MAX_BATCH_PER_GPU": "256"}, 256, 8),
])
def test_global_batch_is_the_same_on_any_number_of_gpus(env, batch_size, accum_iter, paths):
    flags = flags_of(bash(REPO / "scripts/train/lpd_l_256.sh", env={**paths, **env}))
    assert (flags["--batch_size"], flags["--accum_iter"]) == (str(batch_size), str(accum_iter))
    assert batch_size * accum_iter * int(env["NGPU"]) * int(env.get("NNODES", 1)) == 2048


@pytest.mark.parametrize("env, message", [
    ({"NGPU": "3"}, "NGPU x NNODES = 3 does not divide the global batch of 2048"),
    ({"NNODES": "2"}, "MASTER_ADDR is not set"),
])
def test_impossible_layout_is_refused(env, message, paths):
    result = bash(REPO / "scripts/train/lpd_l_256.sh", env={**paths, **env})
    assert result.returncode == 2 and message in result.stderr


# Sweeps: the printed command is parsed as scripts/sweep.py would.


def sweep_of(result):
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
    args = sweep.parse_args(words[words.index(str(REPO / "scripts/sweep.py")) + 1 :])
    sweep.check(args)
    return args


def test_guidance_sweep_ends_with_the_published_number_of_images(paths):
    script = REPO / "scripts/sweep_cfg.sh"
    args = sweep_of(bash(script, "--model", "lpd_xl", env={**paths, "CFGS": "1.5 2"}))
    assert (args.cfg, args.final_images) == ([1.5, 2], 50000)
    assert (args.given.num_images, args.given.model) == (10000, "lpd_xl")
    assert args.given.lpd_order_file == paths["LPD_ORDER_FILE"]
    assert args.command[1] == str(REPO / "scripts/cli/agent.py")
    result = bash(script, env={**paths, "CFGS": "3"})
    assert result.returncode == 2 and result.stderr == "error: CFGS=3: name two guidance scales or more\n"


def test_fashion_sweep_compares_orders_by_steps_over_three_seeds(paths):
    args = sweep_of(bash(REPO / "scripts/sweep_fashion.sh", "--device", "cpu", env=paths))
    assert args.orders == ["lpd", "halton", "random", "raster"]
    assert (args.steps, args.seeds) == ([4, 8, 16, 32], [0, 1, 2])
    assert (args.given.features, args.given.num_images) == (["efficientnet_lite0"], 2000)
    assert args.given.fid_stats == str(Path(paths["OUTPUT_DIR"], "fashion_mnist_val.npz"))
    assert not Path(paths["OUTPUT_DIR"]).exists()


# Set-up: a stand-in for Python answers environment_setup.sh and logs each pip install.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    *sysconfig*) mkdir -p site && echo "$PWD/site" ;;
    -c*) echo "$FAKE_VERSION" ;;
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*)
        if [[ $* == *--no-compile* ]]; then words=$*; echo "${words#*--no-compile }" >>pip.log; fi
        exit "${FAKE_PIP_STATUS:-0}" ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what environment_setup.sh needs, with a stand-in for Python."""
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
        return log.read_text().splitlines() if log.exists() else []

    return tmp_path, setup, installed


def test_setup_refuses_an_old_python_and_wrong_arguments(checkout):
    folder, setup, _ = checkout
    result = setup(version="3.9")
    assert result.returncode == 2 and result.stderr.startswith("error: PYTHON=") and "3.9" in result.stderr
    assert setup("--develop").returncode == 2 and setup("one", "two").returncode == 2
    assert not (folder / ".venv").exists()


def test_setup_installs_once_and_again_what_changed(checkout):
    folder, setup, installed = checkout
    assert setup().returncode == 0 and installed() == ["-r requirements.txt"]
    assert (folder / "site/lpd.pth").read_text() == f"{folder}\n"
    assert setup("--dev").returncode == 0 and setup("--dev").returncode == 0
    assert installed() == ["-r requirements.txt", "-r requirements-data.txt -r requirements-dev.txt"]
    (folder / "requirements.txt").write_text("torch>=2.6\n")
    assert setup("--app").returncode == 0
    assert installed()[2:] == ["-r requirements.txt -r requirements-app.txt"]


def test_setup_of_the_oldest_versions_has_a_place_of_its_own(checkout):
    folder, setup, installed = checkout
    (folder / "requirements.txt").write_text("# a reason: x>=1\ntorch>=2.6\ntimm==1.0.9\n")
    assert setup("--oldest").returncode == 0 and not (folder / ".venv").exists()
    oldest = folder / ".venv-oldest/lpd/oldest.txt"
    assert installed() == [f"-r requirements.txt -c {oldest}"]
    assert oldest.read_text() == "torch==2.6\npyarrow==14.0.1\n"


def test_setup_resumes_after_a_failed_install_and_replaces_a_broken_venv(checkout):
    folder, setup, installed = checkout
    (folder / ".venv/bin").mkdir(parents=True)
    result = setup(FAKE_PIP_STATUS="1")
    assert ".venv does not work: making it again" in result.stdout
    assert "pip could not be upgraded: going on" in result.stdout
    assert result.returncode == 1 and re.search(r"installing requirements.txt .* free there", result.stderr)
    assert setup().returncode == 0 and installed() == ["-r requirements.txt"] * 2


# Fashion-MNIST


def idx(array):
    """A uint8 array as a gzipped idx file."""
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.fixture
def source(tmp_path):
    """The four idx files of a tiny data set (12 training images of class i % 10, 3 others), and images."""
    folder = tmp_path / "source"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (15, 28, 28), dtype=np.uint8)
    for stem, part in (("train", images[:12]), ("t10k", images[12:])):
        (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(idx(part))
        (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(len(part)) % 10))
    return folder, images


def convert(source, out):
    return call_main(fashion_mnist.main, out, "--source", source[0])


def test_folders_have_each_image_padded_under_its_class_also_after_a_kill(source, tmp_path):
    out = tmp_path / "out"
    assert convert(source, out).status == 0
    names = sorted(p.name for p in (out / "train").iterdir())
    assert names == list(fashion_mnist.CLASSES)
    written = sorted(p.relative_to(out).as_posix() for p in out.glob("*/*/*"))
    expected = [f"train/{names[i % 10]}/{i:05d}.png" for i in range(12)]
    assert written == sorted(expected + [f"val/{names[i]}/{i:05d}.png" for i in range(3)])
    image = Image.open(out / "train" / names[1] / "00011.png")
    assert image.mode == "L" and np.array_equal(np.asarray(image), np.pad(source[1][11], 2))
    (out / "val").rename(out / "val.partial")  # as a killed run leaves it
    (out / "val.partial/half").touch()
    assert "12 images are there already" in convert(source, out).out
    assert sorted(p.relative_to(out).as_posix() for p in out.glob("*/*/*")) == written
    assert sorted(p.name for p in out.iterdir()) == ["train", "val"] and not (out / "val/half").exists()


@pytest.mark.parametrize("name, content", [
    ("train-images-idx3-ubyte.gz", b"no gzip"),
    ("train-images-idx3-ubyte.gz", idx(np.zeros((12, 28, 28)))[:40]),
    ("train-labels-idx1-ubyte.gz", idx(np.zeros(11))),
    ("train-labels-idx1-ubyte.gz", idx(np.full(12, 10))),
])
def test_bad_source_is_reported_and_nothing_is_written(source, tmp_path, name, content):
    (source[0] / name).write_bytes(content)
    outcome = convert(source, tmp_path / "out")
    assert outcome.status == 1 and outcome.err.startswith(f"error: {source[0]}: no train split (")
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
