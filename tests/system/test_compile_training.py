"""Training with `--compile` gives what plain training gives, is compiled once, and never waits for a GPU."""

import dataclasses
from functools import partial

import helpers
import numpy as np
import processes
import pytest
import torch
from helpers import ALONE, CONFIG, MODEL, call, four_images, train_flags
from processes import finished
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.bench_train import model_operations
from engine.checkpoint import LAST, checkpoint_of, save_checkpoint
from engine.data import ResidentTokens
from engine.fast import compiled_lpd
from engine.loop import RunningMeans
from engine.train import draw_step, new_state, train_step
from models.lpd import LPD, LPDConfig
from orders.schedule import cosine_group_sizes
from util.logging import read_metrics
from util.token_cache import TokenCache


@pytest.fixture
def counted():
    """A backend that counts compilations from zero. It only traces, which takes seconds less."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def new_model(build=LPD, config=MODEL):
    return new_state(dataclasses.replace(CONFIG, model=config), ALONE.device, build).model.train()


def compiled(backend, **changes):
    return partial(compiled_lpd, device=ALONE.device, backend=backend, **changes)


def gradients(model, group_sizes=CONFIG.group_sizes[1]):
    """The loss of the four images and its gradient for every parameter."""
    tokens, labels = four_images()
    order = draw_step(CONFIG, 3)[1].argsort(dim=1)
    model.zero_grad()
    loss = model.loss(tokens, labels, order, group_sizes)
    loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.long)])
def test_compiled_blocks_give_the_plain_loss_and_gradients(counted, checkpointing):
    """1e-5: fp32, the same sums in another order; gradients are of size 0.01 to 1."""
    model = new_model(compiled(counted, grad_checkpointing=checkpointing))
    for ours, plain in zip(gradients(model), gradients(new_model()), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert counted.frame_count == 2  # the first block is handed nothing to add


def test_all_layers_and_schedules_share_one_compiled_function(counted):
    """Twelve schedules: beyond the recompile limit of 8 torch would silently run uncompiled."""
    config = dataclasses.replace(MODEL, depth=3, dropout=0.1)
    model = new_model(compiled(counted, loss_rows=5), config)
    for steps in range(2, 14):
        gradients(model, cosine_group_sizes(16, steps))
    assert counted.frame_count == 2


@pytest.mark.long
@torch.no_grad()
def test_flex_attention_is_compiled_once_for_all_schedules(counted):
    """Forward only: FlexAttention has no backward on a CPU."""
    model, plain = new_model(compiled(counted, mask="flex")), new_model()
    tokens, labels = four_images()
    order = draw_step(CONFIG, 3)[1].argsort(dim=1)
    for steps in range(2, 14):
        inputs = tokens, labels, order, cosine_group_sizes(16, steps)
        torch.testing.assert_close(model(*inputs), plain(*inputs), rtol=0, atol=1e-5)
    assert counted.frame_count == 2


@pytest.mark.parametrize("first, second", [(True, False), (False, True)], ids=["from_fused", "to_fused"])
def test_a_run_resumes_with_the_other_kind_of_adamw(tmp_path, first, second):
    """Which depends on the device. 1e-4: two steps of 3e-3 by kernels that round differently, from the same
    state."""
    forever = iter(four_images, None)

    def losses(state, count):
        return [train_step(state, state.model.loss, ALONE, 1, forever)[0].item() for _ in range(count)]

    def started(fused):
        state = new_state(CONFIG, ALONE.device)
        for group in state.optimizer.param_groups:
            group["fused"] = fused
        return state

    begun, resumed, straight = started(first), started(second), new_state(CONFIG, ALONE.device)
    losses(begun, 3)
    save_checkpoint(tmp_path / LAST, checkpoint_of(begun, {}, ema={}))
    resumed.load(tmp_path / LAST)
    assert {group["fused"] for group in resumed.optimizer.param_groups} == {second}
    assert losses(resumed, 2) == pytest.approx(losses(straight, 5)[3:], abs=1e-4)


def test_compile_flag_trains_as_without_it(tmp_path, monkeypatch, counted):
    """Logged losses to 1e-4, with tokens on the device instead of the memory-mapped file. Samples are not
    decoded by the compiled blocks."""
    monkeypatch.setattr("engine.data.free_memory", lambda _: 2**40)
    monkeypatch.setattr("main_lpd.compiled_lpd", partial(compiled_lpd, backend=counted))
    sampling = {"sample_freq": 0.5, "generation_steps": 4, "vqgan_path": helpers.tokenizer()}
    flags = {"epochs": 1, "proj_dropout": 0, **sampling}
    finished(call("lpd", *train_flags(tmp_path / "fast", **flags), "--compile"))
    finished(call("lpd", *train_flags(tmp_path / "plain", **flags)))
    fast, plain = ([line["loss"] for line in read_metrics(tmp_path / run)] for run in ("fast", "plain"))
    assert fast == pytest.approx(plain, abs=1e-4) and counted.frame_count == 2


DDP = """
import dataclasses, torch
from functools import partial
from helpers import ALONE, CONFIG, MODEL, four_images
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from engine.fast import compiled_lpd
from engine.train import LossForDDP, draw_step, new_state
from util import cli, distributed
def main():
    distributed.init("cpu")
    counted = CompileCounterWithBackend("aot_eager")
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, embed_dim=256))
    model = new_state(config, ALONE.device, partial(compiled_lpd, device=ALONE.device, backend=counted)).model
    tokens, labels = four_images()
    order = draw_step(CONFIG, 3)[1].argsort(dim=1)
    loss_of = DistributedDataParallel(LossForDDP(model.train()), bucket_cap_mb=1)
    loss_of(tokens[:1], labels[:1], order[:1], CONFIG.schedules[1]).backward()
    print("graphs", counted.frame_count)
cli.run(main)
"""


def test_ddp_does_not_cut_compiled_blocks():
    """Two blocks of 3 MB; the buckets are of 1 MB, at which torch would cut each of them in pieces."""
    assert finished(processes.forked_group(1, "-c", DDP)).out == "graphs 2\n"


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
@pytest.mark.parametrize("mask", ["flex", torch.bool, torch.float32])
def test_compiled_training_on_a_gpu_gives_the_plain_loss_and_gradients(gpu, mask):
    """512 rows, three schedules. 1e-3 for gradients of size 0.1: fp32 kernels may use TF32."""
    torch._dynamo.reset()
    model = dataclasses.replace(MODEL, grid_size=16, vocab_size=64, embed_dim=128, num_heads=2)
    config = dataclasses.replace(CONFIG, model=model)
    fast = partial(compiled_lpd, device=gpu, mask=mask, loss_rows=100)
    models = [new_state(config, gpu, build).model.train() for build in (fast, LPD)]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (4, 256), generator=generator).to(gpu)
    labels = torch.arange(4, device=gpu)
    order = torch.rand(4, 256, generator=generator).argsort(dim=1).to(gpu)
    for steps in (8, 20, 64):
        losses = [m.loss(tokens, labels, order, cosine_group_sizes(256, steps)) for m in models]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=0, atol=1e-4)
        for a, b in zip(*(m.parameters() for m in models), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


@pytest.mark.gpu
def test_a_training_step_on_a_gpu_never_waits(gpu):
    """Ten steps of resident tokens in which torch raises an error if the host would wait."""
    world = dataclasses.replace(ALONE, device=gpu)
    model = dataclasses.replace(MODEL, vocab_size=64)
    config = dataclasses.replace(CONFIG, model=model, bf16=True, ema=0.9)
    state = new_state(config, gpu, partial(compiled_lpd, device=gpu, bf16=True))
    plan = [(np.arange(4), np.array([0, 1, 0, 1]))] * 40
    batches = ResidentTokens(TokenCache(helpers.token_cache()), gpu).batches(plan)
    means = RunningMeans()
    for _ in range(30):  # meets every schedule, makes every mask
        train_step(state, state.model.loss, world, 1, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            loss, norm = train_step(state, state.model.loss, world, 1, batches)
            means.add(norm.isfinite(), {"loss": loss, "grad_norm": norm})
            assert not state.guard.check(state.step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert means.read(world)["loss"] < 10
