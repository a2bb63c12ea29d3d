"""The loop of both trainers: signals, checkpoints, non-finite steps, and the log."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from engine.checkpoint import LAST, save_checkpoint
from engine.data import ImageStream
from util import distributed
from util.cli import setting
from util.device import AsyncScalar, peak_memory
from util.files import write_json

SAVE_SECONDS = 300  # between checkpoints, unless their frequency is given
MAX_IN_A_ROW = 10  # steps without a usable gradient that end a run
LAG = 2  # steps after which their count is read: a GPU has it ready by then


class LossNotFinite(Exception):
    """Training met non-finite losses, gradients or weights and cannot go on."""


@dataclass(frozen=True)
class RunSettings:
    """Where and how often a run saves and logs; frequencies count epochs (steps in tokenizer training).
    `hooks` are (frequency, function(state, log)) pairs. Every process calls them, with the model in eval mode
    and EMA weights; hooks with a frequency above 0 also run after the last step."""

    output_dir: str | Path
    hooks: tuple = ()
    accum_iter: int = setting(1, "micro-batches of a step", least=1)
    log_every: int = setting(50, "steps", least=1)
    save_last_freq: float | None = setting(
        None, f"epochs; default: every {SAVE_SECONDS // 60} minutes; 0: only at the end", kind=float, least=0
    )
    save_intermediate_freq: float = setting(0.0, "epochs; 0: never", least=0)
    val_freq: float = setting(1.0, "epochs between validations; 0: none", least=0)


@dataclass(frozen=True)
class Training:
    """What `run_training` needs to know about a training run. The functions are called on every process."""

    stream: ImageStream
    num_steps: int
    clock: Callable  # steps done -> what frequencies count
    take_step: Callable  # () takes one optimizer step, which it counts in `state.step`
    metrics: Callable  # () -> dict of numbers for the log, of the steps since the last call
    checkpoint: Callable  # () -> dict to save
    validate: Callable | None = None  # () -> dict of numbers of held-out images; the model is as for hooks
    describe: Callable = lambda step: {}  # step -> dict of facts for nonfinite_step.json, beside its images


def run_training(state, training, run, world, log):
    """Take steps from `state.step` to the last. Nothing in a step waits for the device.

    Args:
        state: has model, optimizer, step, guard and config. run: RunSettings. log: MetricsLog or None.
    Raises:
        Stopped: on a signal; LAST holds the last step.
        LossNotFinite: ten steps in a row had no usable gradient, or weights are non-finite.
    """

    def due(every, at_end=False):
        done, before = training.clock(state.step), training.clock(state.step - 1)
        return every > 0 and (at_end or math.floor(done / every) > math.floor(before / every))

    def save(name):
        check_weights(state.model)
        checkpoint = training.checkpoint()
        if world.is_main:
            save_checkpoint(Path(run.output_dir) / name, checkpoint)

    steps, agreed, timer = training.num_steps, distributed.Agreement(), SaveTimer()
    progress = Progress(state, training, world, log)
    with distributed.StopRequest() as request, progress as bar:
        while state.step < steps:
            training.take_step()
            bar.update()
            at_end, stop = state.step == steps, agreed(request.number)
            if bad_steps := state.guard.check(state.step, at_end):
                give_up(bad_steps, state.config.seed, training, run.output_dir, world)

            hooks = [hook for every, hook in run.hooks if due(every, at_end)]
            regular = state.step % run.log_every == 0
            if run.save_last_freq is None:
                to_save = regular and timer.due()
            else:
                to_save = due(run.save_last_freq)
            save_last = to_save or at_end or stop or hooks  # hooks: one that fails must lose no steps
            save_numbered = due(run.save_intermediate_freq)
            validate = training.validate and due(run.val_freq, at_end)
            to_log = regular or save_last or save_numbered or validate
            if to_log:
                progress.log_line(validate)
            if save_last:
                save(LAST)
                timer.restart()
            if save_numbered:
                save(numbered(training.clock(state.step), run.save_intermediate_freq))

            if stop and not at_end:
                distributed.barrier()  # the first process to exit ends the others, and must have saved
                raise distributed.Stopped(stop, f"{LAST} holds step {state.step} of {steps}")
            for hook in hooks:
                with state.averaged(), distributed.main_alone():  # metrics, pictures
                    hook(state, log)
            if to_log:
                progress.restart_clock()
    distributed.barrier()


def numbered(done, every):
    """The file of the checkpoint that is due each `every` epochs, after `done` of them; rounded as in `due`,
    since 0.9 // 0.1 is 8."""
    return f"checkpoint-{math.floor(done / every) * every:g}.pth"


class SaveTimer:
    """Says, to all processes alike, when the last checkpoint is SAVE_SECONDS old by one of their clocks."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.start = time.monotonic()

    def due(self):
        old = time.monotonic() - self.start >= SAVE_SECONDS
        return bool(distributed.all_sum(torch.tensor(int(old))))


class Progress:
    """The bar and the log of a run, with its images per second (of steps alone) and its GPU memory."""

    def __init__(self, state, training, world, log):
        self.state, self.training, self.world, self.log, self.shown = state, training, world, log, {}
        first, total, silent = state.step, training.num_steps, not world.is_main
        self.bar = tqdm(total=total, initial=first, unit="step", disable=silent, mininterval=2)
        self.restart_clock()

    def __enter__(self):
        return self.bar.__enter__()

    def __exit__(self, *error):
        return self.bar.__exit__(*error)

    def restart_clock(self):
        self.start, self.first = time.perf_counter(), self.state.step

    def log_line(self, validate):
        """Log the numbers of the steps since the last line, and of held-out images if `validate`."""
        values, images = self.training.metrics(), self.training.stream.global_batch
        seconds = time.perf_counter() - self.start
        values["images_per_s"] = round(images * (self.state.step - self.first) / seconds, 1)
        values["skipped"] = int(self.state.guard.skipped)
        if memory := peak_memory(self.world.device):
            values["gpu_memory_gib"] = round(memory / 2**30, 2)
        if validate:
            with self.state.averaged():
                values |= self.training.validate()
        self.shown |= values
        self.bar.set_postfix(self.shown)
        if self.log:
            self.log.write(self.state.step, **values)


class RunningMeans:
    """Means over the steps between two lines of the log and over all processes, skipped steps left out; kept
    on the device."""

    def __init__(self):
        self.sums, self.used = {}, 0

    def add(self, used, values):
        """Count a step's dict of scalars, if `used`, a bool on the device."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.where(used, 0)
        self.used = self.used + used

    def read(self, world):
        """The means as a dict, which is empty if no step was used; starts again. Every process must call
        it."""
        sums, used = torch.stack([*self.sums.values()]), int(self.used)
        means = distributed.all_sum(sums.float()) / (world.size * max(1, used))
        names = [*self.sums] if used else []
        self.__init__()
        return {name: round(mean, 5) for name, mean in zip(names, means.tolist(), strict=False)}


def backward(loss):
    """Gradients of a scalar loss; all NaN if the loss is not finite."""
    loss.backward(torch.where(loss.isfinite(), 1.0, float("nan")).to(loss.dtype))


def optimizer_step(state, lr, max_norm):
    """Clip the gradient and take a step, or skip it if the gradient is non-finite (a fused optimizer does not
    wait to know). Returns the gradient's norm before clipping, on the device."""
    optimizer = state.optimizer
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), max_norm)
    good = norm.isfinite()
    for group in optimizer.param_groups:
        group["lr"] = lr
    if optimizer.param_groups[0].get("fused"):
        optimizer.found_inf = (~good).float()  # how a GradScaler makes the fused kernels skip
        optimizer.step()
    elif good:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    state.guard.count(good)
    state.step += 1
    return norm


@dataclass
class NonFiniteGuard:
    """Counts skipped steps on the device: `skipped` in all, `in_a_row` the latest. All processes count alike,
    because one non-finite loss makes the averaged gradient non-finite."""

    skipped: torch.Tensor | int = 0
    in_a_row: torch.Tensor | int = 0
    _pending: deque = field(default_factory=deque)

    def count(self, good):
        self.skipped, self.in_a_row = self.skipped + ~good, (self.in_a_row + 1) * ~good

    def check(self, steps_done, at_end=False):
        """The numbers, from 0, of MAX_IN_A_ROW steps in a row that were skipped, else an empty range. Call it
        after each step: counts are read LAG steps late, or all of them `at_end`."""
        self._pending.append((steps_done, AsyncScalar(self.in_a_row)))
        while len(self._pending) > (0 if at_end else LAG):
            done, in_a_row = self._pending.popleft()
            if in_a_row.get() >= MAX_IN_A_ROW:
                return range(done - MAX_IN_A_ROW, done)
        return range(0)


def check_weights(model):
    """Raise LossNotFinite, naming the first weight that is not finite: no checkpoint may hold one."""
    names, weights = zip(*model.named_parameters(), strict=True)
    good = torch.stack([weight.isfinite().all() for weight in weights]).tolist()
    if not all(good):
        raise LossNotFinite(f"weights {names[good.index(False)]} are not finite: the last checkpoint is kept")


def give_up(steps, seed, training, output_dir, world):
    """Record in nonfinite_step.json what steps without a usable gradient were made of, and raise."""

    def record(step):
        images, views = (
            part.reshape(training.stream.accum_iter, world.size, -1).swapaxes(0, 1).tolist()
            for part in training.stream.images(step)
        )  # [process][micro-batch][image]
        return {"step": step, **training.describe(step), "images": images, "views": views}

    path = Path(output_dir) / "nonfinite_step.json"
    if world.is_main:
        write_json(path, {"seed": seed, "steps": [record(step) for step in steps]})
    distributed.barrier()
    raise LossNotFinite(
        f"no finite loss or gradient in steps {steps[0]}..{steps[-1]}, {len(steps)} in a row (seed {seed}): "
        f"their images are in {path}"
    )
