"""Training of LPD. All draws come from (seed, step), so a resumed run repeats an uninterrupted one."""

import math
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, asdict, dataclass, field
from functools import cache, cached_property
from itertools import pairwise, repeat
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.checkpoint import checkpoint_of, restore
from engine.data import ImageStream, num_steps, own_part
from engine.likelihood import token_nll
from engine.loop import NonFiniteGuard, TrainingLoop, adamw, backward, count_operations, optimizer_step
from models.lpd import LPD, LPDConfig
from models.weights import save_weights
from orders.schedule import cosine_group_sizes, in_brief
from util import distributed
from util.cli import setting
from util.device import to_device

VAL_IMAGES = 512  # of a validation
VAL_TOKENS = 8192  # of one forward pass of a validation
BLOCK = 64  # consecutive images of a step that share one schedule


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what is learned. `global_batch` is images per optimizer step over all processes
    and micro-batches; each BLOCK of a step draws one of `schedules`, numbers of steps or group sizes."""

    model: LPDConfig
    num_images: int
    schedules: tuple[int | tuple[int, ...], ...]
    epochs: float = setting(450.0, least=0)
    global_batch: int = 2048
    lr: float = setting(None, "default: blr * global batch / 256", kind=float, least=0)
    blr: InitVar[float] = 1e-4
    min_lr: float = setting(1e-5, least=0)
    lr_schedule: str = setting("constant+cosine", choices=["constant", "cosine", "constant+cosine"])
    warmup_epochs: float = setting(None, "default: a ninth of the epochs, 50 of 450", kind=float, least=0)
    lr_decay_start_epoch: float = setting(
        None, "of constant+cosine; default: eight ninths of the epochs, 400 of 450", kind=float, least=0
    )
    weight_decay: float = setting(0.02, least=0)
    grad_clip: float = setting(3.0, "0: none", least=0)
    ema: float = setting(0.0, "decay of the EMA of the weights, such as 0.9999; 0: none", least=0, most=1)
    bf16: bool = setting(False, "bfloat16; default: float32")
    no_mirror: bool = setting(False, "never mirror images, such as text or flags")
    seed: int = 0

    def __post_init__(self, blr):
        if self.lr is None:
            object.__setattr__(self, "lr", blr * self.global_batch / 256)
        L = self.model.num_tokens
        object.__setattr__(self, "schedules", tuple(in_brief(steps, L) for steps in self.schedules))
        phases = {"constant": [], "cosine": ["warmup_epochs"]}
        for name, share in (("warmup_epochs", 1 / 9), ("lr_decay_start_epoch", 8 / 9)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, share * self.epochs)
            elif getattr(self, name) > self.epochs and name in phases.get(self.lr_schedule, [name]):
                raise ValueError(f"--{name} {getattr(self, name)} is more than --epochs {self.epochs}")

    @cached_property
    def group_sizes(self):
        """The group sizes of each of `schedules`."""
        L = self.model.num_tokens
        return tuple(cosine_group_sizes(L, s) if isinstance(s, int) else s for s in self.schedules)

    @property
    def num_steps(self):
        return num_steps(self.num_images, self.epochs, self.global_batch)

    def clock(self, step):
        """Epochs after `step` steps, which the frequencies of RunSettings count."""
        return step * self.global_batch / self.num_images


def learning_rate(config, epoch):
    """Linear warm-up, then constant, cosine decay to min_lr, or constant followed by cosine decay."""
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
    """Everything that must survive a crash. `ema` maps names to EMA weights; empty without EMA."""

    config: TrainConfig
    model: LPD
    optimizer: torch.optim.Optimizer
    ema: dict
    step: int = 0
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)

    def load(self, path):
        """Resume from a checkpoint. Raises ValueError as `restore`."""
        for name, average in restore(self, path, "ema")["ema"].items():
            self.ema[name].copy_(average)

    def operations(self):
        """Of a training step, for one image."""
        c = self.config.model

        def loss_of_one():
            order = torch.zeros(1, c.num_tokens, dtype=torch.long)
            return LPD(c).loss(order, order[:, 0], order, self.config.group_sizes[0])

        return count_operations(loss_of_one)

    def start_from(self, name, class_names):
        """Start from the weights of a file, as `LPD.start_from`; so does the EMA, if there is one."""
        self.model.start_from(name, class_names)
        self.ema = {key: weight.clone() for key, weight in self.model.state_dict().items() if self.ema}

    @contextmanager
    def averaged(self):
        """Inside it the model is in eval mode and has the EMA weights, if there are any."""
        own = {name: self.model.get_parameter(name).detach().clone() for name in self.ema}
        self.model.load_state_dict(self.ema, strict=False)  # nothing, if there are none
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(own, strict=False)
            self.model.train()


def new_state(config, device, build=LPD):
    """A fresh model, `build(config.model)`, and AdamW without weight decay on biases, norms and other
    vectors."""
    torch.manual_seed(config.seed)
    model = build(config.model).to(device)
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    others = [p for p in model.parameters() if p.ndim > 1]
    decayed = {"params": others, "weight_decay": config.weight_decay}
    optimizer = adamw([decayed, {"params": vectors, "weight_decay": 0.0}], device, lr=config.lr)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()} if config.ema else {}
    return TrainState(config, model, optimizer, ema)


class LossForDDP(nn.Module):
    """Makes `LPD.loss` the `forward` that DistributedDataParallel wraps; the loss itself is in
    models/lpd.py."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model.loss(*batch)


def draw_step(config, step):
    """The random choices of a step, the same on every process: the group sizes of each block of images, and
    keys float32 [global_batch, L], which sorted are the orders."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    num_blocks = math.ceil(config.global_batch / BLOCK)
    choices = torch.randint(len(config.schedules), (num_blocks,), generator=generator).tolist()
    keys = torch.rand(config.global_batch, config.model.num_tokens, generator=generator)
    return [config.group_sizes[choice] for choice in choices], keys


def split_blocks(first, count):
    """Cut `count` images of a step, from number `first` on, where a block begins: (block, slice) pairs."""
    cuts = [first, *range((first // BLOCK + 1) * BLOCK, first + count, BLOCK), first + count]
    return [(start // BLOCK, slice(start - first, end - first)) for start, end in pairwise(cuts)]


def train_step(state, loss_of, world, accum_iter, micro_batches):
    """One optimizer step, skipped if the loss or its gradient is not finite.

    Args:
        loss_of: `state.model.loss`, or DDP around it. micro_batches: iterator of (tokens, labels).
    Returns:
        (loss, norm of the gradient before clipping), tensors on the device.
    """
    total = add_gradients(state, loss_of, world, accum_iter, micro_batches)
    config = state.config
    lr = learning_rate(config, config.clock(state.step))
    norm = optimizer_step(state, lr, config.grad_clip or math.inf)
    if state.ema:
        weights = state.model.state_dict()
        torch._foreach_lerp_(list(state.ema.values()), [weights[k] for k in state.ema], 1 - config.ema)
    return total, norm


def add_gradients(state, loss_of, world, accum_iter, micro_batches):
    """Add the gradients of this process's share of a step to those of the parameters; returns its loss.

    A micro-batch is one or more slices that share a schedule, each a forward and backward pass. Gradients are
    exchanged in the last pass only.
    """
    config = state.config
    schedules, keys = draw_step(config, state.step)
    keys = own_part(keys, world.rank, world.size, accum_iter)  # [accum_iter, b, L]
    torch.manual_seed((config.seed * 1_000_003 + state.step) * 4099 + world.rank)  # dropout
    total = torch.zeros((), device=world.device)
    for i in range(accum_iter):
        tokens, labels = (to_device(x, world.device) for x in next(micro_batches))
        order = to_device(keys[i], world.device).argsort(dim=1, stable=True)  # so the same on any device
        b = len(tokens)
        first = (i * world.size + world.rank) * b  # the micro-batch's first image, counted within the step
        for block, rows in split_blocks(first, b):
            last = i == accum_iter - 1 and rows.stop == b
            share = (rows.stop - rows.start) / (b * accum_iter)
            with nullcontext() if last or world.size == 1 else loss_of.no_sync():
                with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
                    loss = loss_of(tokens[rows], labels[rows], order[rows], schedules[block]) * share
                backward(loss)
            total += loss.detach()
    return total


def rehearse(state, loss_of, world, accum_iter):
    """Have DistributedDataParallel order its buckets now, as it does after its first gradients: the sums over
    processes depend on that order, so an uninterrupted run and a resumed one would differ by rounding."""
    b, L = state.config.global_batch // (accum_iter * world.size), state.config.model.num_tokens
    blank = torch.zeros(b, L, dtype=torch.long), torch.zeros(b, dtype=torch.long)
    add_gradients(state, loss_of, world, accum_iter, repeat(blank))
    state.optimizer.zero_grad(set_to_none=True)


def plain(model):
    """An LPD in eval mode that shares the weights of another but not its compiled functions, which would be
    compiled again for the shapes of validation and of decoding."""
    with torch.device("meta"):
        other = LPD(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


def validation(source, config, world):
    """A function that takes a model in eval mode and returns its mean loss, nats per token, on held-out
    images: VAL_IMAGES at most, evenly spaced in `source`. Image i always has the same random order and the
    i-th training schedule, cyclically, and the mean is the same for any number of processes."""
    count, L = min(VAL_IMAGES, source.num_images), config.model.num_tokens
    images = np.linspace(0, source.num_images - 1, count).astype(int)
    orders = torch.rand(count, L, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    cycle, at_a_time = len(config.group_sizes), max(1, VAL_TOKENS // L)
    batches_of = [torch.arange(count)[k::cycle].split(at_a_time) for k in range(cycle)]  # by schedule
    own = [ids for ids in sum(batches_of, ())[world.rank :: world.size] if len(ids)]

    @cache
    def batches():
        return list(source.batches((images[ids.numpy()], np.zeros(len(ids), int)) for ids in own))

    @torch.no_grad()
    def mean_loss(model):
        model = plain(model)
        nats = torch.zeros(count, dtype=torch.float64)  # on the CPU: mps has no float64
        for ids, batch in zip(own, batches(), strict=True):
            inputs = [to_device(x, world.device) for x in (*batch, orders[ids])]
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
                losses = token_nll(model, *inputs, config.group_sizes[ids[0] % cycle])  # [b, L]
            nats[ids] = losses.cpu().double().mean(dim=1)
        return distributed.all_sum(nats).mean().item()

    return mean_loss


def train(state, sources, run, world, log, info):
    """Train from `state.step` to the end and write `lpd.safetensors`. `sources` are those of the training
    images and of the images held out, if any; `info` is a dict about the data, saved with the weights; the
    rest is as of `TrainingLoop`."""
    config, loss_of, (source, *held_out) = state.config, state.model.loss, sources
    if world.size > 1:
        loss_of = DistributedDataParallel(LossForDDP(state.model))
    state.model.train()
    if world.size > 1:
        rehearse(state, loss_of, world, run.accum_iter)
    mirror = {"no_mirror": config.no_mirror}
    stream = ImageStream(config.num_images, config.seed, config.global_batch, run.accum_iter, **mirror)
    batches = source.batches(stream.micro_batches(range(state.step, config.num_steps), world))
    val_loss = validation(*held_out, config, world) if held_out else None

    def describe(step):
        lr = learning_rate(config, config.clock(step))
        return {"group_sizes": draw_step(config, step)[0], "lr": lr}

    with TrainingLoop(
        state, stream, config.num_steps, run, world, log, describe=describe,
        checkpoint=lambda: checkpoint_of(state, info, ema=state.ema),
        validate=val_loss and (lambda: {"val_loss": round(val_loss(state.model), 5)}),
    ) as loop:
        batches = loop.timed(batches)
        while loop.goes_on():
            loss, norm = train_step(state, loss_of, world, run.accum_iter, batches)
            loop.after_step(norm.isfinite(), {"loss": loss, "grad_norm": norm})
    if world.is_main:
        path = Path(run.output_dir) / "lpd.safetensors"
        with state.averaged():
            save_weights(path, state.model, **info, train_config=asdict(config))
