"""The fast path gives what the plain one gives; trajectories are captured seldom and kept few."""

import copy
import json
from functools import partial

import pytest
import torch

from benchmarks import bench_generate
from engine.fast_generate import FastGenerator
from engine.generate import generate_images, generate_tokens
from models.packed import packed
from models.vqgan import FastDecoder
from orders.lpd_order import make_orders
from util import dist

GROUPS = (1, 3, 5, 7)
MODES = {
    "plain": {},
    "greedy": {"temperature": 0},
    "guided": {"cfg": 3.0, "temperature": 0.9},
    "constant": {"cfg": 2.0, "cfg_schedule": "constant"},
    "cut": {"top_k": 9, "top_p": 0.8},
}


def examples(n, first=0):
    """Labels, orders and image ids of images first..first+n-1."""
    ids = torch.arange(first, first + n)
    orders = make_orders("lpd", n, GROUPS, 4, image_ids=ids.numpy()).astype("int64")
    return ids % 5, torch.from_numpy(orders), ids


class CountingCapture:
    """Stands for `dist.GraphCapture`: counts, and like a graph hands out the same memory at each replay."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, function):
        self.captured += 1
        output = function().clone()

        def replay():
            self.replayed += 1
            return output.copy_(function())

        return replay


@pytest.fixture
def fast(tiny_lpd, tiny_vq):
    return FastGenerator(tiny_lpd, tiny_vq, capture=CountingCapture())


# the same results


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_fast_tokens_are_the_plain_ones(tiny_lpd, fast, settings):
    labels, order, ids = examples(3, first=7)
    settings = {**settings, "seed": 5, "image_ids": ids}
    expected = generate_tokens(tiny_lpd, labels, order, GROUPS, **settings)
    assert torch.equal(fast.generate_tokens(labels, order, GROUPS, **settings), expected)


def test_fast_images_are_the_plain_ones(tiny_lpd, tiny_vq, fast):
    labels, order, _ = examples(3)
    expected = generate_images(tiny_lpd, tiny_vq, labels, order, GROUPS, cfg=3.0)
    assert torch.equal(fast.generate_images(labels, order, GROUPS, cfg=3.0), expected)


@torch.inference_mode()
def decoded_logits(model):
    """Logits [3, L, V] of decoding step by step, teacher-forced, on the model's device."""
    labels, order, _ = (x.to(model.pos_embed.device) for x in examples(3))
    tokens = torch.arange(48, device=labels.device).view(3, 16) % 32
    kv_cache, context, logits = model.new_kv_cache(3), model.embed_labels(labels), []
    for positions in order.split(GROUPS, dim=1):
        logits.append(model.predict(context, model.query_table()[positions], kv_cache))
        context = model.embed_tokens(tokens.gather(1, positions), positions)
    return torch.cat(logits, dim=1)


def test_logits_with_packed_linears_are_the_plain_ones(tiny_lpd):
    """1e-5: the same fp32 products in another order; logits are of size 1."""
    torch.testing.assert_close(decoded_logits(packed(tiny_lpd)), decoded_logits(tiny_lpd), rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_bfloat16_logits_stay_near_those_in_float32(tiny_lpd, device):
    """A rounding is 2^-9 of a value; some tens of them add up over two blocks, to under 2^-4 of the logits'
    standard deviation."""
    expected = decoded_logits(tiny_lpd.to(dist.choose_device(device)))
    model = copy.deepcopy(tiny_lpd).bfloat16()
    logits = decoded_logits(packed(model) if device == "cpu" else model)
    assert (logits - expected).abs().max() < 2**-4 * expected.std()


def test_packing_leaves_the_model_as_it_was(tiny_lpd):
    names = [type(module) for module in tiny_lpd.modules()]
    copy = packed(tiny_lpd)
    assert [type(module) for module in tiny_lpd.modules()] == names
    assert copy.pos_embed is tiny_lpd.pos_embed


def test_what_came_before_leaves_no_trace(tiny_lpd, fast):
    """Inputs, noise and cache of one call are in the same memory as those of the call before."""
    for first, seed in ((0, 0), (9, 1), (4, 2)):
        labels, order, ids = examples(3, first)
        settings = {"seed": seed, "image_ids": ids, "cfg": 3.0}
        expected = generate_tokens(tiny_lpd, labels, order, GROUPS, **settings)
        assert torch.equal(fast.generate_tokens(labels, order, GROUPS, **settings), expected)
    assert fast.capture.captured == 1


def test_a_result_outlives_the_next_call(fast):
    first = fast.generate_tokens(*examples(2)[:2], GROUPS, seed=0)
    kept = first.clone()
    fast.generate_tokens(*examples(2)[:2], GROUPS, seed=1)
    assert torch.equal(first, kept)


def test_a_callback_takes_the_plain_path(fast):
    filled = []
    fast.generate_tokens(*examples(2)[:2], GROUPS, on_group=lambda tokens, slots: filled.append(slots))
    fast.generate_images(*examples(2)[:2], GROUPS, on_group=lambda tokens, slots: filled.append(slots))
    assert filled == [1, 4, 9, 16] * 2 and fast.capture.captured == 0


# what is captured


def test_a_partial_batch_is_padded_and_gives_the_same_images(tiny_lpd, fast):
    settings = {"cfg": 3.0, "seed": 3}
    whole = torch.cat([
        fast.generate_tokens(*examples(n, first)[:2], GROUPS, image_ids=examples(n, first)[2], **settings)
        for first, n in ((0, 4), (4, 4), (8, 3), (11, 1))
    ])  # fmt: skip
    labels, order, ids = examples(12)
    assert torch.equal(whole, generate_tokens(tiny_lpd, labels, order, GROUPS, image_ids=ids, **settings))
    assert fast.capture.captured == 1


def test_a_batch_is_padded_to_the_least_that_fits(fast):
    for n, captured in ((1, 1), (4, 2), (8, 3), (3, 3), (1, 3)):
        fast.generate_tokens(*examples(n)[:2], GROUPS)
        assert fast.capture.captured == captured
    assert [batch for batch, _ in fast.trajectories] == [8, 4, 1]


@pytest.mark.parametrize(
    "other",
    [{"cfg": 2.0}, {"cfg_schedule": "constant"}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0.5}],
)
def test_other_settings_are_captured_by_themselves(fast, other):
    fast.generate_tokens(*examples(2)[:2], GROUPS, cfg=3.0)
    fast.generate_tokens(*examples(2)[:2], GROUPS, **{"cfg": 3.0, **other})
    fast.generate_tokens(*examples(2)[:2], GROUPS, cfg=3.0)
    assert fast.capture.captured == 2


def test_images_and_tokens_are_captured_apart(fast):
    fast.generate_tokens(*examples(2)[:2], GROUPS)
    fast.generate_images(*examples(2)[:2], GROUPS)
    assert fast.capture.captured == 2


def test_the_store_is_bounded_and_drops_what_was_unused_for_longest(tiny_lpd):
    fast = FastGenerator(tiny_lpd, capacity=2, capture=CountingCapture())
    for temperature, captured in ((1.0, 1), (0.9, 2), (1.0, 2), (0.8, 3), (1.0, 3), (0.9, 4)):
        fast.generate_tokens(*examples(2)[:2], GROUPS, temperature=temperature)
        assert fast.capture.captured == captured and len(fast.trajectories) <= 2


def test_a_refused_call_captures_nothing(fast):
    with pytest.raises(ValueError, match="sum to 15"):
        fast.generate_tokens(*examples(2)[:2], (1, 3, 5, 6))
    assert fast.capture.captured == 0 and not fast.trajectories


def test_off_a_gpu_capture_returns_the_function():
    def function():
        return 1

    assert dist.GraphCapture(torch.device("cpu"))(function) is function


# on a GPU


def on_gpu(model, dtype=torch.float32):
    return model.to(dist.choose_device("cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
def test_a_graph_gives_the_tokens_of_the_plain_path(tiny_lpd, settings):
    """In float32, three batches in turn through the same graph, so that nothing is left of the one before."""
    model = on_gpu(tiny_lpd)
    fast = FastGenerator(model)
    for first, seed in ((0, 0), (9, 1), (4, 2)):
        labels, order, ids = examples(3, first)
        given = {**settings, "seed": seed, "image_ids": ids}
        expected = generate_tokens(model, labels, order, GROUPS, **given)
        assert torch.equal(fast.generate_tokens(labels, order, GROUPS, **given), expected)
    assert len(fast.trajectories) == 1


@pytest.mark.gpu
def test_graphs_that_share_memory_do_not_disturb_one_another(tiny_lpd, tiny_vq):
    model, tokenizer = on_gpu(tiny_lpd), on_gpu(tiny_vq)
    fast = FastGenerator(model, tokenizer, capacity=3)
    for n, settings in [
        (2, {}),
        (4, {"cfg": 3.0}),
        (3, {"top_p": 0.5}),
        (2, {}),
        (5, {}),
        (4, {"cfg": 3.0}),
    ] * 2:
        labels, order, _ = examples(n)
        expected = generate_images(model, tokenizer, labels, order, GROUPS, **settings)
        difference = fast.generate_images(labels, order, GROUPS, **settings).int() - expected.int()
        assert difference.abs().max() <= 1  # padded batches may round convolutions otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["plain", "fast"])
def test_decoding_never_waits_for_the_gpu(tiny_lpd, tiny_vq, captured):
    """Any hidden wait raises; inputs lie on the GPU, the first call, which captures, is left out."""
    model, tokenizer = on_gpu(tiny_lpd, torch.bfloat16), FastDecoder(on_gpu(tiny_vq))
    labels, order, ids = (x.to(model.pos_embed.device) for x in examples(3))
    make = FastGenerator(model, tokenizer).generate_images if captured else None
    make = make or partial(generate_images, model, tokenizer)
    given = {"cfg": 3.0, "top_k": 20, "top_p": 0.9, "image_ids": ids}
    make(labels, order, GROUPS, **given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make(labels, order, GROUPS, **given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_benchmark_runs_on_a_gpu(tmp_path):
    out = tmp_path / "out.json"
    bench_generate.main(
        ["--model", "lpd_tiny", "--bf16", "--batch_sizes", "1", "2", "--against", "plain", "--n", "2",
         "--generation_steps", "8", "--device", "cuda", "--output_file", str(out)]
    )  # fmt: skip
    assert len(json.loads(out.read_text())["rows"]) == 10


# the benchmark, off a GPU


def test_the_benchmark_counts_the_products_of_a_trajectory(tiny_lpd):
    """By hand, in rows times weights: D = 32, two blocks, 32 codes; groups 1, 3, 5, 7 have 1 + 1 + 3 + 5 = 10
    rows of context and 16 queries. A whole block has 12 D^2, the last one 2 D^2 for context."""
    products = list(bench_generate.needed_products(tiny_lpd, GROUPS, 1))
    expected = 26 * 12 * 32**2 + 10 * 2 * 32**2 + 16 * 12 * 32**2 + 16 * 32 * 32
    assert sum(rows * weight.numel() for rows, weight in products) == expected


def test_the_benchmark_reports_a_row_for_each_path_and_batch(tmp_path, monkeypatch, tiny_lpd, tiny_vq):
    monkeypatch.setattr(bench_generate, "load", lambda args, device: (tiny_lpd, tiny_vq))
    monkeypatch.setattr(bench_generate.measure, "matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench_generate.measure, "bandwidth", lambda device: 1e9)
    out = tmp_path / "out.json"
    bench_generate.main(
        ["--device", "cpu", "--batch_sizes", "1", "2", "--against", "plain", "--n", "1",
         "--generation_steps", "4", "--output_file", str(out)]
    )  # fmt: skip
    report = json.loads(out.read_text())
    paths = ["fast tokens", "fast images", "plain tokens", "plain images", "products"]
    paths += ["packed products"] if torch.backends.mkldnn.is_available() else []
    found = [(row["batch"], row["path"]) for row in report["rows"]]
    assert found == [(batch, path) for batch in (1, 2) for path in paths]
    assert report["decoder_psnr_db"] > 40 and all(row["seconds"] > 0 for row in report["rows"])
