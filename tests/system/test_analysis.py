"""The analysis programs, on the shared small run: 4x4 tokens."""

import csv
import math

import numpy as np
import pytest
import torch
from helpers import ON_CPU, call_main, contents, images, token_cache, tokenizer, trained, words_of
from processes import finished

from engine.likelihood import token_nll
from models.lpd import LPD
from models.masks import Mask, training_mask
from orders.lpd_order import make_orders
from orders.schedule import cosine_group_sizes
from scripts.analysis import ablation, attention, likelihood
from scripts.analysis import images as images_of
from util.files import read_arrays, read_json
from util.token_cache import TokenCache

# likelihood


def likelihood_flags(output_dir, **changes):
    flags = {
        "pretrained_ckpt": trained() / "lpd.safetensors", "cached_path": token_cache(), "num_images": 6,
        "split": "all", "output_dir": output_dir, "orders": ["halton", "lpd"], "steps": [3, 5],
    }
    return [*words_of({**flags, **changes}), *ON_CPU]


def rows_of(folder):
    with (folder / "likelihood.csv").open() as file:
        return {(row["rule"], int(row["steps"])): row for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("likelihood")
    finished(call_main(likelihood.main, *likelihood_flags(folder)))
    return folder


def test_bits_are_those_of_token_nll_on_evenly_spaced_images(measured):
    """1e-4 bits of about 100: fp32, another batch."""
    model = LPD.load(trained() / "lpd.safetensors")[0]
    cache, indices = TokenCache(token_cache()), np.arange(6) * 3
    sizes = cosine_group_sizes(16, 3)
    orders = make_orders("lpd", 6, sizes, 4)
    tokens, labels = cache.tokens(indices, 0 * indices), cache.labels[indices]
    inputs = (torch.from_numpy(x.astype(np.int64)) for x in (tokens, labels, orders))
    found = read_arrays(measured / "lpd_p1_r1_3_3.npz", ["bits", "orders"])
    assert read_json(measured / "likelihood.json")[2]["rule"] == "lpd p1 r1"
    assert np.array_equal(found["orders"], orders)
    bits = token_nll(model, *inputs, sizes).numpy() / math.log(2)
    np.testing.assert_allclose(found["bits"], bits, atol=1e-4)


def test_bits_of_a_policy_are_those_of_the_order_it_decides(tmp_path):
    finished(call_main(likelihood.main, *likelihood_flags(tmp_path, orders=["confident"], steps=[3])))
    found = read_arrays(tmp_path / "confident_3_3.npz", ["bits", "orders"])
    alone = read_arrays(tmp_path / "confident_3_16.npz", ["bits", "orders"])
    assert np.array_equal(np.sort(found["orders"], axis=1), np.tile(np.arange(16), (6, 1)))
    assert np.array_equal(found["orders"], alone["orders"]) and (found["bits"] != alone["bits"]).any()
    tokens, sizes = TokenCache(token_cache()), cosine_group_sizes(16, 3)
    indices = np.arange(6) * 3
    given = tokens.tokens(indices, 0 * indices), tokens.labels[indices], found["orders"]
    inputs = (torch.from_numpy(x.astype(np.int64)) for x in given)
    bits = token_nll(LPD.load(trained() / "lpd.safetensors")[0], *inputs, sizes).numpy() / math.log(2)
    np.testing.assert_allclose(found["bits"], bits, atol=1e-4)


def test_the_price_is_that_of_the_order_plus_that_of_parallelism(measured):
    rows = rows_of(measured)
    assert set(rows) == {(rule, steps) for rule in ("halton", "lpd p1 r1") for steps in (3, 5)}
    assert float(rows["halton", 3]["difference"]) == 0
    assert float(rows["lpd p1 r1", 3]["difference"]) == pytest.approx(
        float(rows["lpd p1 r1", 3]["bits"]) - float(rows["halton", 3]["bits"])
    )
    for row in rows.values():
        price, order, parallelism = (float(row[name]) for name in ("price", "order", "parallelism"))
        assert price == pytest.approx(order + parallelism)
    assert min(float(row["order"]) for row in rows.values()) >= 0  # against the best of these


def test_a_second_run_measures_only_what_is_missing_and_refuses_other_images(measured):
    before = contents(measured)
    again = finished(call_main(likelihood.main, *likelihood_flags(measured, steps=[3, 4, 5])))
    assert " 4 steps: " in again.out and " 3 steps: " not in again.out
    kept = {name: digest for name, digest in before.items() if name.endswith("npz")}
    assert kept.items() <= contents(measured).items()
    refused = call_main(likelihood.main, *likelihood_flags(measured, num_images=7))
    assert refused.status == 2 and "images" in refused.err and "--output_dir" in refused.err


def test_images_from_files_are_those_of_the_cache(measured, tmp_path):
    """1e-3 bits: the tokens are equal, other batches."""
    flags = {"cached_path": None, "data_path": images() / "train", "vqgan_path": tokenizer(), "steps": [3]}
    finished(call_main(likelihood.main, *likelihood_flags(tmp_path / "files", **flags)))
    for key, row in rows_of(tmp_path / "files").items():
        assert float(row["bits"]) == pytest.approx(float(rows_of(measured)[key]["bits"]), abs=1e-3)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"cached_path": None}, "--cached_path"),
        ({"steps": [17]}, "17 steps for 16 tokens"),
        ({"orders": ["missing.npy"]}, "missing.npy"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes, message, tmp_path):
    outcome = call_main(likelihood.main, *likelihood_flags(tmp_path / "out", **changes))
    assert outcome.status == 2 and message in outcome.err
    assert not (tmp_path / "out").exists()


def test_all_images_are_taken_where_there_are_fewer_than_asked_for(capsys):
    assert images_of.evenly_spaced(range(18), 19, "--split all").tolist() == list(range(18))
    assert "--num_images 19: --split all has 18, all of which are used" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--split val has 0 images"):
        images_of.evenly_spaced(None, 19, "--split val")


# attention


def test_attention_weights_give_the_output_of_the_layer(tiny_lpd):
    """1e-6: fp32, the same sums in another order."""
    layer, seen = tiny_lpd.blocks[0].attn, training_mask((1, 3, 5, 7))
    x = torch.randn(32, 2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weights = attention.attention_weights(layer, x, seen)
        assert (weights[:, :, ~seen] == 0).all()
        v = layer.qkv(x)[..., 64:].view(32, 2, 4, 8).permute(1, 2, 0, 3)  # [B, H, N, d]
        found = layer.proj((weights @ v).permute(2, 0, 1, 3).flatten(2))
        torch.testing.assert_close(found, layer(x, Mask(16, seen)), rtol=0, atol=1e-6)


def test_a_query_pays_all_of_its_weight_and_sees_all_tokens_before_its_group(tmp_path):
    flags = {**dict.fromkeys(["orders", "steps"]), "generation_steps": 4}
    finished(call_main(attention.main, *likelihood_flags(tmp_path, **flags)))
    found = read_json(tmp_path / "attention.json")
    np.testing.assert_allclose(np.sum(found["weight"], axis=-1), 1, atol=1e-5)
    sizes = np.array(cosine_group_sizes(16, 4))
    before = np.cumsum(sizes) - sizes
    assert sum(found["tokens_seen"][:-2]) == pytest.approx((sizes * before).sum() / 16)
    assert found["tokens_seen"][-2:] == pytest.approx([1, (sizes**2).sum() / 16])
    assert (tmp_path / "attention.png").exists()


# ablation


def test_what_queries_of_a_group_see_of_one_another():
    masks = {name: ablation.mask_of(name, (1, 2), torch.device("cpu")) for name in ablation.VARIANTS}
    assert {name: mask.seen[3:, 3:].exp().int().tolist() for name, mask in masks.items()} == {
        "each other": [[1, 0, 0], [0, 1, 1], [0, 1, 1]],
        "context only": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "those before": [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
    }


def test_the_ablation_trains_and_compares_three_models(tmp_path):
    flags = {"cached_path": token_cache(), "output_dir": tmp_path, "train_steps": 3, "num_images": 3}
    words = words_of({**flags, "batch_size": 4, "steps": [3, 4], "order": "spread"})
    finished(call_main(ablation.main, *words, *ON_CPU))
    rows = read_json(tmp_path / "ablation.json")["rows"]
    assert len(rows) == 6 and {row["difference"] for row in rows[:2]} == {0.0}
    assert all(row["difference"] for row in rows[2:])
