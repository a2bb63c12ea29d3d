"""The training loop of LPD.

Knows tokens, schedules, the optimizer and what must survive a crash. Does not know flags, nor where tokens
come from: any iterable of micro-batches will do. Every random draw of a step comes from (seed, step), so a
resumed run repeats an uninterrupted one bit for bit.
"""

import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.batches import num_steps, own_part, step_images
from engine.checkpoint import (
    check_parts,
    check_same_config,
    load_last_checkpoint,
    save_checkpoint,
    save_weights,
)
from engine.guard import Guard, backward, check_weights, give_up
from models.lpd import LPD, LPDConfig, lpd_loss
from models.pretrained import load_state
from util import dist
from util.images import image_loader, readable_pixels, to_unit
from util.signals import Stopped, StopRequest


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what is learned. `global_batch` is images per optimizer step, over all
    processes and micro-batches; epochs and frequencies count passes over the images."""

    model: LPDConfig
    num_images: int
    schedules: tuple[tuple[int, ...], ...]  # group sizes; each step draws one
    epochs: float = 450
    global_batch: int = 2048
    lr: float = 8e-4
    min_lr: float = 1e-5
    lr_schedule: str = "constant+cosine"
    warmup_epochs: float = 50
    lr_decay_start_epoch: float = 400
    weight_decay: float = 0.02
    grad_clip: float = 3.0
    ema: float = 0.0
    bf16: bool = False
    seed: int = 0

    @property
    def num_steps(self):
        return num_steps(self.num_images, self.epochs, self.global_batch)

    def epoch(self, step):
        """Passes over the images after `step` steps."""
        return step * self.global_batch / self.num_images


def learning_rate(config, epoch):
    """Linear warm-up, then constant, half a cosine to min_lr, or the one and then the other."""
    if epoch < config.warmup_epochs:
        return config.lr * epoch / config.warmup_epochs
    if config.lr_schedule == "constant":
        return config.lr
    start = config.warmup_epochs if config.lr_schedule == "cosine" else config.lr_decay_start_epoch
    if epoch < start:
        return config.lr
    progress = min(1.0, (epoch - start) / max(1e-9, config.epochs - start))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class TrainState:
    """Everything that must survive a crash. `ema` is a moving average of the weights, or empty."""

    model: LPD
    optimizer: torch.optim.Optimizer
    ema: dict
    step: int = 0
    guard: Guard = field(default_factory=Guard)

    def save(self, path, config, info):
        """Write a checkpoint; `info` says what the model was trained on."""
        save_checkpoint(path, {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": self.ema,
            "step": self.step, "skipped": int(self.guard.skipped), "train_config": asdict(config),
            "info": {**info, "config": asdict(config.model)},
        })  # fmt: skip

    def load(self, path, config):
        """Go on from a checkpoint.

        Raises:
            ValueError: it was made with other settings; the message names the first.
        """
        checkpoint = load_last_checkpoint(path)
        if "train_config" not in checkpoint:
            raise ValueError(
                f"{path}: weights without training state; start from them with --pretrained_ckpt"
            )
        check_same_config(path, checkpoint["train_config"], asdict(config))
        check_parts(path, checkpoint, "model", "optimizer", "ema", "step")
        load_state(self.model, checkpoint["model"], path)
        saved = checkpoint["optimizer"]
        for group, own in zip(saved["param_groups"], self.optimizer.param_groups, strict=True):
            group["fused"] = own["fused"]  # how steps are computed is this run's choice
        self.optimizer.load_state_dict(saved)
        self.step, self.guard.skipped = checkpoint["step"], checkpoint.get("skipped", 0)
        for name, tensor in checkpoint["ema"].items():
            self.ema[name].copy_(tensor)

    @contextmanager
    def averaged(self):
        """Inside it the model is in eval mode, with the moving average for weights where there is one."""
        own = {name: self.model.get_parameter(name).detach().clone() for name in self.ema}
        if self.ema:
            self.model.load_state_dict(self.ema)
        self.model.eval()
        try:
            yield
        finally:
            if own:
                self.model.load_state_dict(own)
            self.model.train()


def new_state(config, device, *, fused=False):
    """A fresh model, AdamW (no weight decay on vectors; fused: one kernel for all weights) and, if asked for,
    the moving average."""
    torch.manual_seed(config.seed)
    model = LPD(config.model).to(device)
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr, betas=(0.9, 0.95), fused=fused,
    )  # fmt: skip
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()} if config.ema else {}
    return TrainState(model, optimizer, ema)


class CachedTokens:
    """Micro-batches from a token cache."""

    def __init__(self, cache):
        self.cache, self.num_images = cache, len(cache)

    def batches(self, plan):
        """(indices, views) pairs -> (tokens int64 [b, L], labels int64 [b]) pairs."""
        for indices, views in plan:
            yield (
                torch.from_numpy(self.cache.tokens(indices, views)),
                torch.from_numpy(self.cache.labels[indices]),
            )


class EncodedImages:
    """Micro-batches straight from an image folder, encoded as they come."""

    def __init__(self, folder, tokenizer, img_size, num_workers, device):
        self.folder, self.tokenizer, self.num_images = folder, tokenizer, len(folder)
        self.img_size, self.num_workers, self.device = img_size, num_workers, device

    def batches(self, plan):
        """As `CachedTokens.batches`.

        Raises:
            UnreadableImage: naming the file.
        """
        for items in image_loader(self.folder, self.img_size, plan, self.num_workers):
            indices, pixels = readable_pixels(items)
            with torch.no_grad():
                tokens = self.tokenizer.encode(to_unit(pixels).to(self.device))
            yield tokens, torch.from_numpy(self.folder.labels[indices])


@dataclass(frozen=True)
class StepDraws:
    """The random choices of one step: group sizes for all, an order for each image of the global batch."""

    group_sizes: tuple[int, ...]
    keys: torch.Tensor  # float32 [global_batch, L]; a position's turn is the rank of its key

    @property
    def orders(self):
        """int64 [global_batch, L]."""
        return orders_of(self.keys)


def orders_of(keys):
    """Keys [b, L] -> orders int64 [b, L]; stable, so that two equal keys are the same order on any device."""
    return keys.argsort(dim=1, stable=True)


def draw_step(config, step):
    """The same on every process, from (seed, step) alone."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    choice = torch.randint(len(config.schedules), (), generator=generator).item()
    keys = torch.rand(config.global_batch, config.model.num_tokens, generator=generator)
    return StepDraws(config.schedules[choice], keys)


def train_step(state, model, config, world, accum_iter, micro_batches):
    """One optimizer step, or none where the loss or its gradient is no number.

    Args:
        model: `state.model`, or what wraps it. micro_batches: iterator of (tokens, labels).
    Returns:
        (loss, norm of the gradient before clipping), tensors on the device.
    """
    draws = draw_step(config, state.step)
    keys = own_part(draws.keys, world.rank, world.size, accum_iter)  # [accum, b, L]
    torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099 + world.rank)  # dropout
    total, rows = torch.zeros((), device=world.device), state.model.loss_rows
    for i in range(accum_iter):
        tokens, labels = (dist.to_device(x, world.device) for x in next(micro_batches))
        order = orders_of(dist.to_device(keys[i], world.device))
        last = i == accum_iter - 1
        with nullcontext() if last or model is state.model else model.no_sync():
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
                out = model(tokens, labels, order, draws.group_sizes, loss_rows=rows)
                loss = (lpd_loss(out, tokens, order) if rows is None else out) / accum_iter
            backward(loss)
        total += loss.detach()
    clip = config.grad_clip or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), clip)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, config.epoch(state.step))
    state.guard.step(state.optimizer, norm)
    state.step += 1
    if state.ema:
        weights = state.model.state_dict()
        torch._foreach_lerp_(list(state.ema.values()), [weights[k] for k in state.ema], 1 - config.ema)
    return total, norm


@dataclass
class Progress:
    """The running means between two lines of the log, over the steps that were not skipped; nothing waits for
    the device in between."""

    world: dist.World
    log: object  # MetricsLog, or None on all processes but the first
    config: TrainConfig

    def __post_init__(self):
        self._reset()

    def _reset(self):
        self.loss, self.norm, self.used, self.count, self.start = 0.0, 0.0, 0, 0, time.perf_counter()

    def add(self, loss, norm):
        used = norm.isfinite()
        self.loss, self.norm = self.loss + loss.where(used, 0), self.norm + norm.where(used, 0)
        self.used, self.count = self.used + used, self.count + 1

    def write(self, step, skipped):
        """Log the means; every process takes part. `skipped`: steps left out so far."""
        loss, used = (dist.all_sum(self.loss) / self.world.size).item(), int(self.used)
        norm = self.norm.item()
        values = {
            "epoch": round(self.config.epoch(step), 4),
            **({"loss": round(loss / used, 5), "grad_norm": round(norm / used, 4)} if used else {}),
            "lr": learning_rate(self.config, self.config.epoch(step - 1)),
            "images_per_s": round(
                self.config.global_batch * self.count / (time.perf_counter() - self.start), 1
            ),
            "skipped": int(skipped),
        }
        if self.log:
            self.log.write(step, **values)
        self._reset()
        return values


def train(
    state, config, source, output_dir, world, log, info, *, accum_iter=1, log_every=50, save_last_freq=1.0,
    save_intermediate_freq=0.0, hooks=(),
):  # fmt: skip
    """Train from `state.step` to the end.

    Args:
        source: CachedTokens or EncodedImages. output_dir: for checkpoints. log: MetricsLog or None.
        save_last_freq, save_intermediate_freq: epochs between checkpoint-last.pth and checkpoint-N.pth (N:
            epochs done); 0 is never, but the end is always saved.
        hooks: (epochs, function) pairs; the function is called on every process with the state, whose model
            is in eval mode and has the averaged weights if there are any, and the log.
    Raises:
        Stopped: a signal asked for it; checkpoint-last.pth holds the last step.
        LossNotFinite: ten steps in a row had no usable gradient, or the weights are no numbers.
    """
    steps, first = config.num_steps, state.step
    model = DistributedDataParallel(state.model, broadcast_buffers=False) if world.size > 1 else state.model
    model.train()

    def plan():
        for step in range(first, steps):
            parts = step_images(config.num_images, config.seed, config.global_batch, step)
            yield from zip(
                *(own_part(part, world.rank, world.size, accum_iter) for part in parts), strict=True
            )

    def due(every):
        return every > 0 and (
            math.floor(config.epoch(state.step) / every) > math.floor(config.epoch(state.step - 1) / every)
        )

    micro_batches = iter(source.batches(plan()))
    progress, agreed = Progress(world, log, config), dist.Agreement()
    with (
        StopRequest() as request,
        tqdm(total=steps, initial=first, unit="step", disable=not world.is_main, mininterval=2) as bar,
    ):
        while state.step < steps:
            progress.add(*train_step(state, model, config, world, accum_iter, micro_batches))
            bar.update()
            end, stop = state.step == steps, agreed(request.number)
            if bad := state.guard.bad_row(state.step, end=end):
                give_up_on(config, bad, output_dir, world, accum_iter)
            calls = [function for every, function in hooks if due(every) or (end and every > 0)]
            # Before the hooks too, which take long: what they end with is not worth the steps before.
            save_last = due(save_last_freq) or end or stop or calls
            save_intermediate = due(save_intermediate_freq)
            if state.step % log_every == 0 or save_last or save_intermediate:
                bar.set_postfix(progress.write(state.step, state.guard.skipped))
            if save_last or save_intermediate:
                check_weights(state.model)
            if world.is_main and save_last:
                state.save(Path(output_dir) / "checkpoint-last.pth", config, info)
            if world.is_main and save_intermediate:
                name = f"checkpoint-{math.floor(config.epoch(state.step))}.pth"
                state.save(Path(output_dir) / name, config, info)
            if stop and not end:
                dist.barrier()  # torchrun ends all with the first that ends: the checkpoint comes before
                raise Stopped(stop, f"checkpoint-last.pth holds step {state.step} of {steps}")
            for function in calls:
                with state.averaged():
                    function(state, log)
    if world.is_main:
        export(state, config, output_dir, info)
    dist.barrier()


def give_up_on(config, steps, output_dir, world, accum_iter):
    """End a run at steps (numbers from 0) without a usable gradient, and write down what was in them."""

    def facts(step):
        return {
            "group_sizes": draw_step(config, step).group_sizes,
            "lr": learning_rate(config, config.epoch(step)),
        }

    give_up(
        steps, output_dir, world, num_images=config.num_images, seed=config.seed,
        global_batch=config.global_batch, accum_iter=accum_iter, facts=facts,
    )  # fmt: skip


def export(state, config, output_dir, info):
    """Write the weights alone, the moving average where there is one, as `lpd.safetensors`."""
    model = LPD(config.model)
    model.load_state_dict(state.ema or state.model.state_dict())
    save_weights(Path(output_dir) / "lpd.safetensors", model, **info, train_config=asdict(config))
