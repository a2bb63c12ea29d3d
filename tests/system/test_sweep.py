"""scripts/sweep.py: what is evaluated, and results side by side (spread over seeds, table, CSV, plot)."""

import csv
import statistics
import sys

import pytest
from helpers import call_main
from matplotlib.figure import Figure
from PIL import Image

from scripts import sweep
from scripts.sweep import best_row, plot, summarise, table
from util.pictures import save_curves


def result(fid, *, order="lpd", steps=8, cfg=3.0, seed=0, n=100):
    metrics = {"is": 10.0 + seed, "is_std": 0.5, "fid": fid}
    seconds = {"generate": 30.0, "decode": 20.0, "features": 7.0, "metrics": 1.0}
    return {
        "order": order, "steps": steps, "cfg": cfg, "seed": seed, "num_images": n, "metrics": metrics,
        "seconds": seconds, "warnings": ["few images"],
    }


SEEDS = [result(fid, seed=seed) for seed, fid in enumerate((20.0, 21.0, 25.0))]


def test_seeds_of_a_setting_are_one_row_with_mean_and_spread():
    (row,) = summarise(SEEDS)
    assert row["seeds"] == 3 and row["fid"] == 22
    assert row["fid_spread"] == pytest.approx(statistics.stdev([20, 21, 25]))
    assert row["seconds_per_image"] == 0.5
    assert "is_std" not in row  # over the splits of one evaluation
    assert summarise(SEEDS[:1])[0]["fid_spread"] is None


def test_best_setting_has_the_least_mean_and_not_the_luckiest_seed():
    rows = summarise([result(10.0, cfg=4.0), result(40.0, cfg=4.0, seed=1), *SEEDS])
    assert best_row(rows)["cfg"] == 3.0


def test_table_has_an_aligned_line_for_each_setting():
    lines = table(summarise([*SEEDS, result(7.0, order="random", n=50000)])).splitlines()
    assert lines[0].split() == ["order", "steps", "cfg", "images", "seeds", "IS", "FID", "s/image"]
    assert lines[1].split() == ["lpd", "8", "3", "100", "3", "11", "±", "1", "22", "±", "2.6", "0.5"]
    assert lines[2].split() == ["random", "8", "3", "50000", "1", "10", "7", "0.001"]
    assert len({len(line) for line in lines}) == 1
    rows = summarise([{**SEEDS[0], "metrics": {"frechet_distance_x": 9.0}}])  # not on Inception features
    assert "FID" not in table(rows) and best_row(rows)["frechet_distance_x"] == 9


def plotted(monkeypatch, results):
    """The arguments of the drawing function."""
    seen = []
    monkeypatch.setattr(sweep, "save_curves", lambda path, curves, **labels: seen.append((curves, labels)))
    plot("none.png", summarise(results))
    return seen[0]


def test_plot_over_steps_has_a_curve_for_each_order(monkeypatch):
    pairs = [(order, steps) for order in ("lpd", "raster") for steps in (16, 4)]
    results = [result(5.0 if order == "lpd" else 9.0, order=order, steps=steps) for order, steps in pairs]
    curves, labels = plotted(monkeypatch, results)
    points = {name: [(4, fid), (16, fid)] for name, fid in (("lpd, cfg 3", 5), ("raster, cfg 3", 9))}
    assert curves == points
    assert labels == {"xlabel": "steps", "ylabel": "FID,\n100 images"}


def test_plot_over_guidance_leaves_out_the_final_evaluation(monkeypatch):
    results = [result(5.0, cfg=2.0), result(4.0, cfg=3.0), result(2.0, cfg=3.0, n=500)]
    curves, labels = plotted(monkeypatch, results)
    assert curves == {"lpd, steps 8": [(2, 5), (3, 4)]} and labels["xlabel"] == "guidance scale"


def test_one_number_of_steps_has_one_tick(tmp_path, monkeypatch):
    axes = Figure().subplots()
    monkeypatch.setattr(Figure, "subplots", lambda figure: axes)
    save_curves(tmp_path / "curves.png", {"lpd": [(8, 1.0)]}, xlabel="steps", ylabel="bits")
    low, high = axes.get_xlim()
    assert [x for x in axes.get_xticks() if low < x < high] == [8]


# The whole program, with a stand-in for main_lpd.py whose distance falls with the guidance scale.

STAND_IN = """
import json, pathlib, sys
words = sys.argv[1:]
value = lambda flag: words[len(words) - words[::-1].index(flag)]
if value("--cfg") == "9.0":
    sys.exit("error: no such luck")
setting = {"order": value("--order"), "steps": int(value("--generation_steps")), "cfg": float(value("--cfg")),
           "seed": int(value("--seed")), "num_images": int(value("--num_images"))}
folder = pathlib.Path(value("--output_dir"))
folder.mkdir(exist_ok=True)
with (folder / "calls").open("a") as file:
    print(*setting.values(), file=file)
result = {**setting, "metrics": {"fid": 10 - setting["cfg"]}, "seconds": {"generate": 1, "decode": 1},
          "warnings": ["few images"]}
(folder / f"{'-'.join(map(str, setting.values()))}.json").write_text(json.dumps(result))
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "main_lpd.py").write_text(STAND_IN)
    (tmp_path / "ref.npz").touch()
    out = tmp_path / "out"

    def act(*lists, command=("--generation_steps", 4, "--num_images", 6)):
        program = [sys.executable, tmp_path / "main_lpd.py", "--evaluate", "--output_dir", out]
        outcome = call_main(sweep.main, *lists, "--", *program, "--fid_stats", tmp_path / "ref.npz", *command)
        return outcome, (out / "calls").read_text().splitlines() if out.exists() else []

    return act


def test_every_combination_is_evaluated_and_the_best_again_on_more_images(run, tmp_path):
    outcome, calls = run("--cfg", 2, 3, "--seeds", 0, 1, "--final_images", 9)
    assert outcome.status == 0, outcome.err
    assert calls == [
        *[f"lpd 4 {cfg} {seed} 6" for cfg in (2.0, 3.0) for seed in (0, 1)],
        *[f"lpd 4 3.0 {seed} 9" for seed in (0, 1)],
    ]
    lines = outcome.out.splitlines()
    assert [line.split()[2:5] for line in lines[-4:-1]] == [["2", "6", "2"], ["3", "6", "2"], ["3", "9", "2"]]
    assert lines[-1] == "warning: few images"
    with (tmp_path / "out/sweep.csv").open() as file:
        assert [float(row["fid"]) for row in csv.DictReader(file)] == [8, 7, 7]
    with Image.open(tmp_path / "out/sweep.png") as image:
        assert min(image.size) > 300


def test_failed_evaluation_ends_the_sweep_with_its_status(run, tmp_path):
    outcome, calls = run("--cfg", 2, 9, 3)
    assert outcome.status == 1 and calls == ["lpd 4 2.0 0 6"]
    assert not (tmp_path / "out/sweep.csv").exists()


@pytest.mark.parametrize("lists, command, message", [
    (["--steps", "2"], ["--lpd_order_file", "o.npy"], "--lpd_order_file"),
    (["--final_images", "9"], ["--num_images", 6], "several settings"),
    (["--cfg", "1", "2", "--final_images", "6"], ["--num_images", 6], "--final_images 6 is not more"),
    (["--cfg", "1", "2"], ["--no_such_flag"], "--no_such_flag"),
])
def test_mistake_is_refused_before_anything_runs(lists, command, message, run):
    outcome, calls = run(*lists, command=command)
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1 and not calls
