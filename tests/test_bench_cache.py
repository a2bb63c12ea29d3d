"""The benchmark of the token cache runs, on any device, and its figures belong together."""

import json

import programs
import pytest

from benchmarks import bench_cache


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_benchmark_of_the_cache_writes_its_figures_and_a_trace(tmp_path, device, capsys):
    bench_cache.main([str(word) for word in (
        "--cache_images", 50, "--shard_size", 20, "--mar_files", 3, "--read_batch", 8, "--reads", 5, "--n", 1,
        "--vqgan_path", programs.tokenizer(), "--data_path", programs.images(), "--img_size", programs.SIZE,
        "--encode_images", 6, "--batch_size", 4, "--bf16", "--device", device, "--num_workers", 0,
        "--profile", tmp_path / "trace.json", "--output_file", tmp_path / "result.json",
    )])  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    reading, caching = result["reading"], result["caching"]
    assert reading["shards"] == 3 and reading["samples_per_s"] > 0 and reading["mar_samples_per_s"] > 0
    assert caching["images"] == 6 and caching["precision"] == "bf16"
    share = caching["caching_images_per_s"] / caching["encoder_images_per_s"]
    assert caching["caching_share_of_encoder"] == pytest.approx(share, rel=0.01)  # of figures as rounded
    assert 0 <= caching["share_of_tokens_that_differ_from_fp32"] < 0.2
    assert "caching share of encoder" in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "trace.json"]
