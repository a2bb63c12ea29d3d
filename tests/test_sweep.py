"""Results side by side: mean and spread over seeds, the table, the CSV, the plot, the best setting."""

import csv
import statistics

import pytest
from PIL import Image

from engine import sweep
from engine.sweep import best_setting, plot_sweep, summarise, table, write_csv


def result(fid, *, order="lpd", steps=8, cfg=3.0, seed=0, n=100):
    metrics = {"is": 10.0 + seed, "is_std": 0.5, "fid": fid}
    seconds = {"generate": 30.0, "decode": 20.0, "features": 7.0, "metrics": 1.0}
    return {"order": order, "steps": steps, "cfg": cfg, "seed": seed, "num_images": n, "metrics": metrics,
            "seconds": seconds}  # fmt: skip


SEEDS = [result(fid, seed=seed) for seed, fid in enumerate((20.0, 21.0, 25.0))]


def test_seeds_of_a_setting_are_one_row_with_mean_and_spread():
    (row,) = summarise(SEEDS)
    assert row["seeds"] == 3 and row["fid"] == 22
    assert row["fid_spread"] == pytest.approx(statistics.stdev([20, 21, 25]))
    assert row["seconds_per_image"] == 0.5
    assert "is_std" not in row  # of the splits of one evaluation


def test_one_seed_has_no_spread():
    (row,) = summarise(SEEDS[:1])
    assert row["fid_spread"] is None


@pytest.mark.parametrize("other", [{"order": "random"}, {"steps": 4}, {"cfg": 2.0}, {"n": 200}], ids=str)
def test_other_settings_are_other_rows(other):
    assert [row["fid"] for row in summarise([*SEEDS, result(7.0, **other)])] == [22, 7]


def test_best_setting_has_the_least_mean_and_not_the_luckiest_seed():
    results = [result(10.0, cfg=4.0), result(40.0, cfg=4.0, seed=1), *SEEDS]
    assert best_setting(results) == ("lpd", 8, 3.0)


def test_table_has_a_line_for_each_setting_under_its_heads():
    lines = table(summarise([*SEEDS, result(7.0, order="random")])).splitlines()
    assert lines[0].split() == ["order", "steps", "cfg", "images", "seeds", "IS", "FID", "s/image"]
    assert lines[1].split() == ["lpd", "8", "3", "100", "3", "11", "±", "1", "22", "±", "2.6", "0.5000"]
    assert lines[2].split() == ["random", "8", "3", "100", "1", "10", "7", "0.5000"]
    assert len({len(line) for line in lines}) == 1


def test_distance_on_other_features_is_not_headed_fid():
    results = [{**SEEDS[0], "metrics": {"frechet_distance_x": 9.0, "score_std_x": 1.0}}]
    assert "FID" not in table(summarise(results)) and "frechet_distance_x" in table(summarise(results))
    assert best_setting(results) == ("lpd", 8, 3.0)


def test_csv_holds_every_row(tmp_path):
    rows = summarise([*SEEDS, result(7.0, steps=4)])
    write_csv(tmp_path / "sweep.csv", rows)
    with (tmp_path / "sweep.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(row["order"], int(row["steps"]), float(row["fid"])) for row in written] == [
        ("lpd", 8, 22.0), ("lpd", 4, 7.0)
    ]  # fmt: skip


def plotted(monkeypatch, results):
    """What is given to the drawing function."""
    seen = []
    monkeypatch.setattr(sweep, "save_curves", lambda path, curves, **labels: seen.append((curves, labels)))
    plot_sweep("none.png", summarise(results))
    return seen[0]


def test_plot_over_steps_has_a_curve_of_each_order(monkeypatch):
    results = [
        result(fid, order=order, steps=steps, seed=seed)
        for order, fid in (("lpd", 5.0), ("raster", 9.0))
        for steps in (16, 4)
        for seed in (0, 1)
    ]
    curves, labels = plotted(monkeypatch, results)
    assert curves == {"lpd, cfg 3": ((4, 16), (5, 5), (0, 0)), "raster, cfg 3": ((4, 16), (9, 9), (0, 0))}
    assert labels == {"xlabel": "steps", "ylabel": "FID,\n100 images"}


def test_plot_over_guidance_leaves_the_final_evaluation_out(monkeypatch):
    """Of more images, it lies lower whatever its guidance."""
    results = [result(5.0, cfg=2.0), result(4.0, cfg=3.0), result(2.0, cfg=3.0, n=500)]
    curves, labels = plotted(monkeypatch, results)
    assert curves == {"lpd, steps 8": ((2, 3), (5, 4), (0, 0))} and labels["xlabel"] == "guidance scale"


def test_plot_is_a_picture(tmp_path):
    plot_sweep(tmp_path / "sweep.png", summarise([*SEEDS, result(7.0, steps=4)]))
    with Image.open(tmp_path / "sweep.png") as image:
        assert min(image.convert("RGB").size) > 300
