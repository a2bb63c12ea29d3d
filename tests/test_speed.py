"""Each fast way to train gives what the plain one gives, is compiled once, and waits for nothing."""

import dataclasses
from functools import partial

import numpy as np
import programs
import pytest
import test_train
import torch
from programs import call, finished, train_flags
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode

import engine.train
from benchmarks.bench_train import model_operations
from engine.checkpoint import load_checkpoint
from engine.speed import ResidentTokens, compile_training, fits
from engine.train import CachedTokens, draw_step, new_state, orders_of, train_step
from models.layers import attend
from models.lpd import LPDConfig, lpd_loss
from models.masks import cached_block_mask, cached_training_mask, training_mask
from orders.schedule import cosine_group_sizes
from util.token_cache import CacheMeta, CacheWriter, DamagedCache, TokenCache

ALONE, CONFIG, MODEL = test_train.ALONE, test_train.CONFIG, test_train.MODEL
SCHEDULES = [(1, 2, 3), (1, 15), (1,) * 16, cosine_group_sizes(64, 8)]


def gradients(model, group_sizes=CONFIG.schedules[1], loss_rows=None, bf16=False):
    """The loss of the four images and its gradient for every parameter."""
    tokens, labels = test_train.four_images()
    order = draw_step(CONFIG, 3).orders
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(tokens, labels, order, group_sizes, loss_rows=loss_rows)
        loss = lpd_loss(out, tokens, order) if loss_rows is None else out
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_same(ours, theirs, atol=1e-5):
    """By default 1e-5: fp32, the same sums in another order; gradients here are of size 0.01 to 1."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def new_model(seed=0):
    return new_state(dataclasses.replace(CONFIG, seed=seed), ALONE.device).model.train()


# The loss in chunks.


@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_loss_in_chunks_is_the_plain_one_with_gradients(rows):
    """64 rows: one at a time, chunks with a rest, all at once, and fewer than asked for."""
    model = new_model()
    assert_same(gradients(model, loss_rows=rows), gradients(model))


def test_loss_in_chunks_under_autocast_is_the_plain_one():
    """0.01: bfloat16 keeps 8 bits, so a gradient of size 1 is off by up to 2^-9 for each of a few sums."""
    model = new_model()
    assert_same(gradients(model, loss_rows=7, bf16=True), gradients(model, bf16=True), atol=0.01)


def test_logits_of_a_chunked_loss_never_exist_all_at_once():
    model, rows = new_model(), []
    model.head.register_forward_hook(lambda module, inputs, out: rows.append(out.shape[0]))
    gradients(model, loss_rows=20)
    assert max(rows) == 20 and sum(rows) == 2 * 64  # each row in the forward pass, and again in the backward


# Masks.


@pytest.mark.parametrize("group_sizes", SCHEDULES, ids=lambda sizes: f"{len(sizes)}of{sum(sizes)}")
def test_block_mask_is_the_training_mask(group_sizes):
    rows = 2 * sum(group_sizes)
    mask_mod = cached_block_mask(group_sizes, ALONE.device).mask_mod
    assert torch.equal(create_mask(mask_mod, 1, 1, rows, rows, "cpu")[0, 0], training_mask(group_sizes))


def test_flex_attention_equals_the_plain_one_at_512_rows_where_blocks_are_left_out():
    """1e-5: fp32, the same sums in another order. Forward only: on a CPU it has no backward."""
    group_sizes = (1, 40, 100, 115)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 512, 16, generator=generator) for _ in range(3))
    block_mask = cached_block_mask(group_sizes, ALONE.device)
    assert block_mask.sparsity() > 10
    with torch.no_grad():
        flex = torch.compile(attend, backend="eager")(q, k, v, block_mask)
        torch.testing.assert_close(flex, attend(q, k, v, training_mask(group_sizes)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_sizes", CONFIG.schedules, ids=len)
def test_additive_mask_is_the_boolean_one_with_gradients(group_sizes):
    model = new_model()
    plain = gradients(model, group_sizes)
    model.mask_of = partial(cached_training_mask, dtype=torch.float32)
    assert_same(gradients(model, group_sizes), plain)


# Compiled blocks. The tracing backend is taken for the compiling one: it takes seconds less.


@pytest.fixture
def counted():
    """A backend that counts what is compiled, from nothing on."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_give_the_plain_loss_and_gradients(counted, checkpointing):
    model = new_model()
    plain = gradients(model)
    model.grad_checkpointing = checkpointing
    compile_training(model, ALONE.device, backend=counted)
    assert_same(gradients(model, loss_rows=model.loss_rows), plain)
    assert counted.frame_count == 1


def test_all_layers_and_schedules_share_one_compiled_function(counted):
    """Twelve schedules, more than the recompile limit of 8, behind which it would silently run uncompiled."""
    config = dataclasses.replace(MODEL, depth=3, dropout=0.1)
    model = new_state(dataclasses.replace(CONFIG, model=config), ALONE.device).model.train()
    compile_training(model, ALONE.device, backend=counted)
    for steps in range(2, 14):
        gradients(model, cosine_group_sizes(16, steps), loss_rows=5)
    assert counted.frame_count == 1


def test_flex_attention_of_all_schedules_is_compiled_once(counted):
    model = new_model()
    compile_training(model, ALONE.device, backend=counted)
    model.mask_of = cached_block_mask
    tokens, labels = test_train.four_images()
    order = draw_step(CONFIG, 3).orders
    with torch.no_grad():
        for steps in range(2, 14):
            group_sizes = cosine_group_sizes(16, steps)
            logits = model(tokens, labels, order, group_sizes)
            masked = new_model()(tokens, labels, order, group_sizes)
            torch.testing.assert_close(logits, masked, rtol=0, atol=1e-5)
    assert counted.frame_count == 1


def test_compiling_changes_no_key_of_the_state_dict():
    model, plain = new_model(), new_model()
    compile_training(model, ALONE.device)
    assert model.state_dict().keys() == plain.state_dict().keys()


# The optimizer.


def test_fast_steps_keep_to_the_golden_losses(counted, monkeypatch):
    """Compiled blocks, chunked loss and fused AdamW together, 20 steps; 1e-4 as of the golden losses."""

    def fast_state(config, device):
        state = new_state(config, device, fused=True)
        compile_training(state.model, device, backend=counted)
        state.model.loss_rows = 20
        return state

    plain = test_train.golden_losses()
    monkeypatch.setattr(test_train, "new_state", fast_state)
    assert test_train.golden_losses() == pytest.approx(plain, abs=1e-4)
    assert counted.frame_count == 1


@pytest.mark.parametrize("first, second", [(True, False), (False, True)], ids=["from_fused", "to_fused"])
def test_a_run_goes_on_with_the_other_kind_of_adamw(tmp_path, first, second):
    """1e-4: two steps of 3e-3 by kernels that round otherwise, from the very same state."""
    begun, straight = new_state(CONFIG, ALONE.device, fused=first), new_state(CONFIG, ALONE.device)
    test_train.steps_of(begun, CONFIG, 3)
    begun.save(tmp_path / "checkpoint-last.pth", CONFIG, {})
    resumed = new_state(CONFIG, ALONE.device, fused=second)
    resumed.load(tmp_path / "checkpoint-last.pth", CONFIG)
    assert {group["fused"] for group in resumed.optimizer.param_groups} == {second}
    expected = test_train.steps_of(straight, CONFIG, 5)[3:]
    assert test_train.steps_of(resumed, CONFIG, 2) == pytest.approx(expected, abs=1e-4)


# Nothing waits.


class HostReads(TorchDispatchMode):
    """Notes operations whose result the processor would wait for."""

    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.waiting:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device(monkeypatch):
    """The draws, made on the processor, stand ready. Fused AdamW, as the plain one counts its steps there."""
    config = dataclasses.replace(CONFIG, ema=0.9, model=dataclasses.replace(MODEL, label_drop_prob=0.1))
    state, draws = new_state(config, ALONE.device, fused=True), draw_step(CONFIG, 0)
    monkeypatch.setattr(engine.train, "draw_step", lambda *_: draws)
    progress = engine.train.Progress(ALONE, None, config)
    forever = iter(test_train.four_images, None)
    with HostReads() as reads:
        progress.add(*train_step(state, state.model, config, ALONE, 1, forever))
        assert reads.seen == []
        progress.write(1, state.guard.skipped)
    assert reads.seen


def test_equal_keys_keep_their_order():
    """So that a GPU's sort, told to be stable, draws what a CPU's does: keys of 24 bits do meet."""
    keys = torch.tensor([[0.5] * 40 + [0.25] * 40])
    assert orders_of(keys).tolist() == [[*range(40, 80), *range(40)]]


# Tokens on the device.


def test_resident_tokens_are_those_of_the_cache():
    cache = TokenCache(programs.token_cache())
    plan = [(np.array([3, 17, 3]), np.array([0, 1, 1])), (np.array([8]), np.array([0]))]
    ours = ResidentTokens(cache, ALONE.device, images_at_a_time=5).batches(iter(plan))
    assert test_train.same(list(ours), list(CachedTokens(cache).batches(iter(plan))))


def small_cache(folder, tokens, vocab_size):
    """A token cache of one image, in both views of these tokens [L]."""
    meta = CacheMeta(
        img_size=16, grid_size=int(len(tokens) ** 0.5), vocab_size=vocab_size, class_names=("a",),
        tokenizer_digest="", num_images=1, shard_size=1, names_digest="",
    )  # fmt: skip
    writer = CacheWriter(folder, meta)
    writer.begin()
    writer.write_shard(0, np.array([[tokens, tokens]]), np.array([0]), ["a/0.png"])
    writer.finish(["a/0.png"])
    return TokenCache(folder)


def test_resident_tokens_hold_the_largest_codebook(tmp_path):
    cache = small_cache(tmp_path, [0, 32767, 32768, 65535], 65536)
    ((tokens, _),) = ResidentTokens(cache, ALONE.device).batches([(np.array([0]), np.array([1]))])
    assert tokens.tolist() == [[0, 32767, 32768, 65535]]


def test_resident_tokens_of_a_damaged_cache_are_refused_at_once(tmp_path):
    with pytest.raises(DamagedCache, match="token 9, meta.json says 9 codes"):
        ResidentTokens(small_cache(tmp_path, [0, 1, 2, 9], 9), ALONE.device)


@pytest.mark.parametrize("free, expected", [(8 * 18 * 2 * 16, True), (8 * 18 * 2 * 16 - 1, False)])
def test_tokens_lie_on_a_device_with_four_times_their_size_free(monkeypatch, free, expected):
    """18 images in 2 views of 16 tokens of 2 bytes."""
    monkeypatch.setattr("util.dist.free_memory", lambda device: free)
    assert fits(TokenCache(programs.token_cache()), ALONE.device) is expected


# The program.


def test_compile_flag_trains_as_without_it(tmp_path, monkeypatch, counted):
    """Losses as logged, to 1e-4. Tokens lie on the device in place of the memory-mapped file."""
    monkeypatch.setattr("main_lpd.fits", lambda *_: True)
    monkeypatch.setattr("main_lpd.compile_training", partial(compile_training, backend=counted))
    flags = {"epochs": 1, "proj_dropout": 0}
    finished(call("lpd", *train_flags(tmp_path / "fast", **flags), "--compile"))
    finished(call("lpd", *train_flags(tmp_path / "plain", **flags)))
    fast, plain = (
        [line["loss"] for line in test_train.read_metrics(tmp_path / run)] for run in ("fast", "plain")
    )
    assert fast == pytest.approx(plain, abs=1e-4) and counted.frame_count == 1
    fused = load_checkpoint(tmp_path / "fast/checkpoint-last.pth")["optimizer"]["param_groups"]
    assert all(group["fused"] for group in fused)


# The benchmark's count.


def test_operations_of_a_step_by_hand():
    """Groups 1 and 3 of 4 tokens, 2 blocks, width 8, 5 codes. Context rows that count: the class token and
    token 0. Linears: 12 x 64 multiply-adds a row, 2 x 64 for a context row of the last block. Pairs: context
    1 + 2; queries 1 x 1 + 3 x 2 of context, 1 + 9 of their own group."""
    config = LPDConfig(grid_size=2, vocab_size=5, embed_dim=8, num_heads=2, depth=2)
    assert model_operations(config, (1, 3)) == {
        "linears": 2 * 64 * (12 * (2 + 4) + 12 * 4 + 2 * 2),
        "attention": 4 * 8 * ((3 + 17) + 17),
        "head": 2 * 8 * 5 * 4,
    }


# On a GPU.


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("mask_of", [cached_block_mask, cached_training_mask])
def test_compiled_training_on_a_gpu_gives_the_plain_loss_and_gradients(gpu, mask_of):
    """Both masks at 512 rows, three schedules. 1e-3 of gradients of size 0.1: fp32 kernels that may take
    tensor cores' short products."""
    model = dataclasses.replace(MODEL, grid_size=16, vocab_size=64, embed_dim=128, num_heads=2)
    config = dataclasses.replace(CONFIG, model=model)
    plain, fast = (new_state(config, gpu).model.train() for _ in range(2))
    compile_training(fast, gpu)
    fast.mask_of = mask_of
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (4, 256), generator=generator).to(gpu)
    labels, order = torch.arange(4, device=gpu), orders_of(torch.rand(4, 256, generator=generator)).to(gpu)
    for steps in (8, 20, 64):
        sizes = cosine_group_sizes(256, steps)
        expected = lpd_loss(plain(tokens, labels, order, sizes), tokens, order)
        loss = fast(tokens, labels, order, sizes, loss_rows=100)
        for result in (expected, loss):
            result.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-4)
        assert_same(*([p.grad for p in m.parameters()] for m in (fast, plain)), atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.gpu
def test_a_training_step_on_a_gpu_never_waits(gpu):
    """Ten steps of resident tokens in which torch raises an error where the processor would wait."""
    world = dataclasses.replace(ALONE, device=gpu)
    cache = TokenCache(programs.token_cache())
    model = dataclasses.replace(MODEL, vocab_size=64)
    config = dataclasses.replace(CONFIG, model=model, bf16=True, ema=0.9)
    state = new_state(config, gpu, fused=True)
    compile_training(state.model, gpu, bf16=True)
    plan = [(np.arange(4), np.array([0, 1, 0, 1]))] * 40
    batches = ResidentTokens(cache, gpu).batches(plan)
    progress = engine.train.Progress(world, None, config)
    for _ in range(30):  # every schedule is met, every mask made
        train_step(state, state.model, config, world, 1, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            progress.add(*train_step(state, state.model, config, world, 1, batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert progress.write(10)["loss"] < 10
