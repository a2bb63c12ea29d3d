"""Encoding in bf16, and the benchmark of caching. The program main_cache is tested in test_token_cache.py."""

import json

import helpers
import pytest
import torch

from benchmarks import bench_cache
from engine.cache import encode_views, prepare_encoder


def test_preparing_an_encoder_leaves_the_tokens_of_the_tokenizer_itself(tiny_vq):
    images = [helpers.draw(label, 0) for label in range(3)]
    before = encode_views(tiny_vq, images, torch.device("cpu"))
    rounded = encode_views(prepare_encoder(tiny_vq, bf16=True), images, torch.device("cpu"))
    assert torch.equal(encode_views(tiny_vq, images, torch.device("cpu")), before)
    assert rounded.shape == before.shape == (3, 2, 64) and not torch.equal(rounded, before)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_benchmark_of_the_cache_writes_consistent_figures(tmp_path, monkeypatch, device):
    monkeypatch.setattr(bench_cache, "matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench_cache, "bandwidth", lambda device: 1e9)
    flags = {
        "cache_images": 50, "shard_size": 20, "read_batch": 8, "reads": 5, "n": 1, "encode_images": 6,
        "vqgan_path": helpers.tokenizer(), "data_path": helpers.images(), "img_size": helpers.SIZE,
        "batch_size": 4, "bf16": True, "device": device, "num_workers": 0,
        "output_file": tmp_path / "result.json",
    }
    bench_cache.main(helpers.words_of(flags))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["reading"]["shards"] == 3 and result["reading"]["samples_per_s"] > 0
    share = result["caching"]["caching_images_per_s"] / result["caching"]["encoder_images_per_s"]
    assert result["caching"]["caching_share_of_encoder"] == pytest.approx(share, rel=0.01)  # rounded figures
