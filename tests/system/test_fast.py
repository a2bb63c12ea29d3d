"""The fast path gives what the plain one gives, captured and compiled no more often than promised."""

import copy
import dataclasses
import itertools
import json
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks import bench_generate
from engine.decoding import generate_tokens
from engine.fast import (
    FastDecoder,
    FastGenerator,
    PackedLinear,
    can_pack,
    compiled,
    for_inference,
    packed,
)
from engine.generate import generate_images
from engine.sampling import Sampling
from models.lpd import LPD
from models.masks import Mask
from orders.lpd_order import make_orders
from orders.policies import Confident
from orders.schedule import cosine_group_sizes

CPU = torch.device("cpu")
GROUPS = (1, 3, 5, 7)
SAMPLINGS = [
    Sampling(), Sampling(temperature=0), Sampling(cfg=3.0, temperature=0.9),
    Sampling(cfg=2.0, cfg_schedule="constant"), Sampling(top_k=9, top_p=0.8),
]


def examples(n, first=0):
    """Labels, orders and image ids of images first..first+n-1."""
    ids = torch.arange(first, first + n)
    orders = make_orders("lpd", n, GROUPS, 4, image_ids=ids.numpy()).astype("int64")
    return ids % 5, torch.from_numpy(orders), ids


class CountingCapture:
    """Replaces `GraphCapture`: counts captures, and like a graph returns the same memory at each replay."""

    captured = 0

    def __call__(self, function):
        self.captured += 1
        output = function().clone()
        return lambda: output.copy_(function())


@pytest.fixture
def fast(tiny_lpd, tiny_vq):
    return FastGenerator(tiny_lpd, tiny_vq, capacity=3, capture=CountingCapture())


@pytest.fixture
def counted():
    """A backend that counts compilations; it only traces, which takes seconds less."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


# Generation.


def check_batches(model, fast, sampling):
    """Three batches through the same memory, the last two padded; results outlive the next call."""
    results = []
    for first, n, seed in ((0, 4, 0), (9, 3, 1), (4, 1, 2)):
        labels, order, ids = examples(n, first)
        arguments = labels, order, GROUPS, sampling
        expected = generate_tokens(model, *arguments, seed=seed, image_ids=ids)
        results.append((fast.generate_tokens(*arguments, seed=seed, image_ids=ids), expected))
    assert all(torch.equal(tokens, expected) for tokens, expected in results)
    assert len(fast.trajectories) == 1


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_fast_tokens_are_the_plain_ones(tiny_lpd, fast, sampling):
    check_batches(tiny_lpd, fast, sampling)
    assert fast.capture.captured == 1


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_compiled_layers_and_parts_give_the_plain_tokens(tiny_lpd, sampling):
    fast = FastGenerator(tiny_lpd, capture=CountingCapture(), backend="inductor")
    with torch.compiler.set_stance("force_eager"):
        check_batches(tiny_lpd, fast, sampling)


def test_a_policy_is_captured_once_and_gives_the_plain_tokens(tiny_lpd, fast):
    policy, sampling = Confident(4, 1.5), Sampling(cfg=3.0)
    for first, n in ((0, 4), (9, 3)):
        labels, _, ids = examples(n, first)
        expected = generate_tokens(tiny_lpd, labels, policy, GROUPS, sampling, image_ids=ids)
        made = fast.generate_tokens(labels, policy, GROUPS, sampling, image_ids=ids)
        assert torch.equal(made, expected)
    assert fast.capture.captured == 1


def frames_of(models, schedules=(5, 9)):
    """How often functions were compiled, after each schedule of each model."""
    torch._dynamo.reset()
    compiled.cache_clear()
    counted, counts = CompileCounterWithBackend("eager"), []
    for model, steps in itertools.product(models, schedules):
        fast = FastGenerator(model, backend=counted)
        order = torch.rand(20, 16).argsort(dim=1)
        fast.generate_tokens(torch.zeros(20).long(), order, cosine_group_sizes(16, steps), Sampling(cfg=2.0))
        counts.append(counted.frame_count)
    torch._dynamo.reset()
    return counts


def test_decoding_compiles_once_for_all_layers_and_few_times_for_all_group_sizes(tiny_lpd):
    """Another schedule compiles only sizes of 1 and new classes of size; another model nothing, but in torch
    2.6 everything once more."""
    shallow, deep = (LPD(dataclasses.replace(tiny_lpd.config, depth=depth)).eval() for depth in (2, 6))
    counts, oldest = frames_of([shallow, deep]), torch.__version__.startswith("2.6")
    assert counts[1] <= (20 if oldest else 12)
    assert counts[-1] == counts[1] or oldest


@pytest.mark.long
def test_decoding_as_inductor_compiles_it_gives_the_plain_tokens(tiny_lpd):
    fast = FastGenerator(tiny_lpd, capture=CountingCapture(), backend="inductor")
    check_batches(tiny_lpd, fast, Sampling(cfg=3.0, top_k=20, top_p=0.9))


def test_fast_images_are_the_plain_ones(tiny_lpd, tiny_vq, fast):
    arguments = *examples(3)[:2], GROUPS, Sampling(cfg=3.0)
    expected = generate_images(tiny_lpd, tiny_vq, *arguments)
    assert torch.equal(fast.generate_images(*arguments), expected)


def test_a_batch_takes_the_smallest_captured_one_that_fits(fast):
    for n, captured in ((1, 1), (4, 2), (8, 3), (3, 3), (1, 3)):
        fast.generate_tokens(*examples(n)[:2], GROUPS)
        assert fast.capture.captured == captured
    assert [batch for batch, _ in fast.trajectories] == [8, 4, 1]


def test_each_setting_is_captured_once_and_the_least_recently_used_is_dropped(fast):
    arguments = *examples(2)[:2], GROUPS
    samplings = [Sampling(cfg=scale) for scale in (1, 2, 3, 1, 4, 1, 2)]
    for sampling, captured in zip(samplings, (1, 2, 3, 3, 4, 4, 5), strict=True):
        fast.generate_tokens(*arguments, sampling)
        assert fast.capture.captured == captured and len(fast.trajectories) <= 3
    fast.generate_images(*arguments, sampling)
    assert fast.capture.captured == 6


def test_callbacks_and_wrong_arguments_capture_nothing(fast):
    filled = []
    for method in (fast.generate_tokens, fast.generate_images):
        method(*examples(2)[:2], GROUPS, on_group=lambda tokens, slots, _: filled.append(slots))
    assert filled == [1, 4, 9, 16] * 2
    with pytest.raises(ValueError, match="sum to 15"):
        fast.generate_tokens(*examples(2)[:2], (1, 3, 5, 6))
    assert fast.capture.captured == 0 and not fast.trajectories


@torch.inference_mode()
def first_logits(model):
    """Logits [3, L, V] of one step that queries all positions, given the class token."""
    queries = model.query_table()[:, None].expand(-1, 3, -1)
    x = torch.cat([model.embed_labels(torch.arange(3)), queries])
    return model.head(model.features(x, Mask(1), model.new_kv_cache(3))).transpose(0, 1)


def test_logits_of_packed_linears_and_of_bfloat16(tiny_lpd):
    """Packed: 1e-5, the same fp32 products in another order, logits of size 1. bfloat16: tens of roundings of
    2^-9 of a value over two blocks stay under 2^-4 of the logits' standard deviation."""
    expected = first_logits(tiny_lpd)
    torch.testing.assert_close(first_logits(packed(tiny_lpd)), expected, rtol=0, atol=1e-5)
    assert torch.equal(first_logits(tiny_lpd), expected)
    half = packed(copy.deepcopy(tiny_lpd).bfloat16())
    assert (first_logits(half) - expected).abs().max() < 2**-4 * expected.std()


def num_plain_linears(model):
    return sum(isinstance(module, nn.Linear) for module in model.modules())


def frames(model, **options):
    """The tokens of three images after each group, [groups, B, L]."""
    (labels, order, _), seen = examples(3), []
    generate_tokens(model, labels, order, **options, on_group=lambda tokens, *_: seen.append(tokens.clone()))
    return torch.stack(seen)


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")
def test_on_a_cpu_all_generation_takes_packed_linears_and_gives_the_same(tiny_lpd, tiny_vq):
    model, tokenizer = for_inference(tiny_lpd, tiny_vq, CPU)
    assert num_plain_linears(model) == 0 and num_plain_linears(tiny_lpd) == 9 and tokenizer is tiny_vq
    known = torch.arange(12).view(3, 4)
    for edit in ({"group_sizes": GROUPS}, {"group_sizes": GROUPS[2:], "known": known}):
        assert torch.equal(frames(model, **edit), frames(tiny_lpd, **edit))


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_without_the_private_operators_linears_stay_as_they_are(monkeypatch, tiny_lpd, tiny_vq, error):
    """An operator that is missing, or refuses the dtype on this CPU."""
    def refuse(*_):
        raise error("no such operator")

    monkeypatch.setattr(PackedLinear, "forward", refuse)
    model, _ = for_inference(tiny_lpd, tiny_vq, CPU)
    assert not can_pack(torch.float32) and num_plain_linears(model) == 9


def test_fast_decoder_gives_the_pixels_of_the_tokenizer(tiny_vq):
    """fp32: 1e-4, the same sums in another order, pixels of size 1. bfloat16: some forty roundings of 2^-8 of
    a value, which add up as their root."""
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad():
        expected = tiny_vq.decode(tokens)
        exact = FastDecoder(tiny_vq, torch.float32).decode(tokens)
        torch.testing.assert_close(exact, expected, rtol=0, atol=1e-4)
        fast = FastDecoder(tiny_vq)
        assert torch.equal(fast.encode(expected), tiny_vq.encode(expected))
        half = fast.decode(tokens)
        assert half.dtype == torch.float32
        assert (half - expected).square().mean() < (2**-5.3 * expected.std()) ** 2
        assert torch.equal(tiny_vq.decode(tokens), expected)  # the tokenizer is as before


# The benchmark.


def test_products_of_a_trajectory_by_hand(tiny_lpd):
    """Rows times weights for D = 32, two blocks, 32 codes; groups 1, 3, 5, 7 have 1 + 1 + 3 + 5 = 10 context
    rows and 16 queries. A whole block has 12 D^2, the last one 2 D^2 for context."""
    products = list(bench_generate.needed_products(tiny_lpd, GROUPS, 1))
    expected = 26 * 12 * 32**2 + 10 * 2 * 32**2 + 16 * 12 * 32**2 + 16 * 32 * 32
    assert sum(rows * weight.numel() for rows, weight in products) == expected


def test_the_benchmark_times_each_path_and_batch(tmp_path, monkeypatch, tiny_lpd, tiny_vq):
    monkeypatch.setattr(bench_generate, "load", lambda args, device: (tiny_lpd, tiny_vq))
    monkeypatch.setattr(bench_generate, "matmul_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench_generate.measure, "bandwidth", lambda device: 1e9)
    out = tmp_path / "out.json"
    flags = "--device cpu --batch_sizes 1 2 --against plain --n 1 --generation_steps 4 --output_file"
    bench_generate.main([*flags.split(), str(out)])
    report = json.loads(out.read_text())
    paths = ["fast tokens", "fast images", "plain tokens", "plain images", "products"]
    assert [(row["batch"], row["path"]) for row in report["rows"]] == [(b, p) for b in (1, 2) for p in paths]
    assert report["decoder_psnr_db"] > 40 and all(row["seconds"] > 0 for row in report["rows"])


# On a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_graph_gives_the_tokens_of_the_plain_path(tiny_lpd, sampling):
    model = tiny_lpd.cuda()
    check_batches(model, FastGenerator(model), sampling)


@pytest.mark.gpu
def test_graphs_that_share_memory_do_not_disturb_one_another(tiny_lpd, tiny_vq):
    model, tokenizer = tiny_lpd.cuda(), tiny_vq.cuda()
    fast = FastGenerator(model, tokenizer, capacity=3)
    plain, cut, guided = Sampling(), Sampling(top_p=0.5), Sampling(cfg=3.0)
    for n, sampling in [(2, plain), (4, guided), (3, cut), (2, plain), (5, plain), (4, guided)] * 2:
        arguments = *examples(n)[:2], GROUPS, sampling
        expected = generate_images(model, tokenizer, *arguments)
        difference = fast.generate_images(*arguments).int() - expected.int()
        assert difference.abs().max() <= 1  # padded batches may round convolutions otherwise


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [False, True], ids=["plain", "fast"])
def test_decoding_never_waits_for_the_gpu(tiny_lpd, tiny_vq, captured):
    """Any hidden wait raises. Inputs lie on the GPU; the first call, which captures, is left out."""
    model, decoder = tiny_lpd.cuda().bfloat16(), FastDecoder(tiny_vq.cuda())
    labels, order, ids = (x.to(model.pos_embed.device) for x in examples(3))
    make = FastGenerator(model, decoder).generate_images
    make = make if captured else partial(generate_images, model, decoder)
    arguments = labels, order, GROUPS, Sampling(cfg=3.0, top_k=20, top_p=0.9)
    make(*arguments, image_ids=ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make(*arguments, image_ids=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
