"""The loop of both trainers: signals, checkpoints, non-finite steps, and the log."""

import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from engine.checkpoint import LAST, save_checkpoint
from util import distributed
from util.cli import setting
from util.device import AsyncCopy, is_cuda, matmul_rate, peak_memory
from util.files import write_json

SAVE_SECONDS = 300  # between checkpoints, unless their frequency is given
MAX_IN_A_ROW = 10  # steps without a usable gradient that end a run
RATE_AFTER = 60  # seconds of training, after which the device's rate is worth a second to measure
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


class TrainingLoop:
    """What happens between the steps of a training, in either trainer:

        with TrainingLoop(state, stream, steps, run, world, log, checkpoint=...) as loop:
            while loop.goes_on():
                ...  # take a step, which counts itself in state.step
                loop.after_step(good, values)

    Nothing in it waits for the device but every `log_every` steps.

    Args:
        state: has model, optimizer, step, guard, and config, whose `clock(step)` is what frequencies count.
        stream: the ImageStream of all `steps`. run: RunSettings. log: MetricsLog or None.
        checkpoint: () -> dict to save. validate: () -> dict of numbers of held-out images, or None; the model
            is as for hooks. describe: step -> dict of facts for nonfinite_step.json, beside its images. All
            are called on every process.
    """

    def __init__(self, state, stream, steps, run, world, log, *, checkpoint, validate=None, describe=None):
        self.state, self.stream, self.steps, self.run = state, stream, steps, run
        self.world, self.log = world, log
        self.checkpoint, self.validate, self.describe = checkpoint, validate, describe or (lambda step: {})
        self.means, self.save_timer, self.agreed = RunningMeans(), SaveTimer(), distributed.Agreement()
        self.request, self.shown, self.waited = distributed.StopRequest(), {}, 0.0
        self.begin, self.most = time.monotonic(), None

    def __enter__(self):
        first, silent = self.state.step, not self.world.is_main
        self.request.__enter__()
        self.bar = tqdm(total=self.steps, initial=first, unit="step", disable=silent, mininterval=2)
        self.restart_clock()
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.request.__exit__(*error)
        if error[0] is None:
            distributed.barrier()

    def goes_on(self):
        return self.state.step < self.steps

    def timed(self, batches):
        """The batches, with the time that they are waited for in the log."""
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - begin
            yield batch

    def after_step(self, good, values):
        """Count a step's dict of scalars, on the device, if it was `good`; log, save, and call what is due.

        Raises:
            Stopped: on a signal; LAST holds the last step.
            LossNotFinite: ten steps in a row had no usable gradient, or weights are non-finite.
        """
        state, run = self.state, self.run
        self.means.add(good, values)
        self.bar.update()
        at_end, stop = state.step == self.steps, self.agreed(self.request.number)
        if bad_steps := state.guard.check(state.step, at_end):
            self.give_up(bad_steps)

        hooks = [hook for every, hook in run.hooks if self.due(every, at_end)]
        regular = state.step % run.log_every == 0
        if run.save_last_freq is None:
            save_last = regular and self.save_timer.due()
        else:
            save_last = self.due(run.save_last_freq)
        save_last = save_last or at_end or stop or hooks  # hooks: one that fails must lose no steps
        save_numbered = self.due(run.save_intermediate_freq)
        validate = self.validate and self.due(run.val_freq, at_end)
        to_log = regular or save_last or save_numbered or validate
        if to_log:
            self.log_line(validate)
        if save_last:
            self.save(LAST)
            self.save_timer.restart()
        if save_numbered:
            self.save(numbered(state.config.clock(state.step), run.save_intermediate_freq))

        if stop and not at_end:
            distributed.barrier()  # the first process to exit ends the others, and must have saved
            raise distributed.Stopped(stop, f"{LAST} holds step {state.step} of {self.steps}")
        for hook in hooks:
            with state.averaged(), distributed.main_alone():  # metrics, pictures
                hook(state, self.log)
        if to_log:
            self.restart_clock()

    def due(self, every, at_end=False):
        done, before = (self.state.config.clock(self.state.step - ago) for ago in (0, 1))
        return every > 0 and (at_end or math.floor(done / every) > math.floor(before / every))

    def save(self, name):
        check_weights(self.state.model)
        checkpoint = self.checkpoint()
        if self.world.is_main:
            save_checkpoint(Path(self.run.output_dir) / name, checkpoint)

    def restart_clock(self):
        self.start, self.first, self.waited = time.perf_counter(), self.state.step, 0.0

    def log_line(self, validate):
        """Log the numbers of the steps since the last line, and of held-out images if `validate`."""
        state = self.state
        epoch = state.step * self.stream.global_batch / self.stream.num_images
        values = {"epoch": round(epoch, 4), **self.means.read(self.world)}
        values["lr"] = state.optimizer.param_groups[0]["lr"]
        seconds, steps = time.perf_counter() - self.start, state.step - self.first
        values["images_per_s"] = round(self.stream.global_batch * steps / seconds, 1)
        values["data_wait"] = round(self.waited / seconds, 3)
        if most := self.most_images_per_s():
            values["share_of_matrix_rate"] = round(values["images_per_s"] / most, 3)
        values["skipped"] = int(state.guard.skipped)
        if memory := peak_memory(self.world.device):
            values["gpu_memory_gib"] = round(memory / 2**30, 2)
        if validate:
            with state.averaged():
                values |= self.validate()
        self.shown |= values
        self.bar.set_postfix(self.shown)
        if self.log:
            self.log.write(state.step, **values)

    def most_images_per_s(self):
        """Images a second if all devices did a step's operations at the rate of large products, which is
        measured on this one after RATE_AFTER seconds; None until then."""
        if self.most is None and time.monotonic() - self.begin > RATE_AFTER:
            dtype = torch.bfloat16 if self.state.config.bf16 else torch.float32
            self.most = self.world.size * matmul_rate(self.world.device, dtype) / self.state.operations()
        return self.most

    def give_up(self, steps):
        """Record in nonfinite_step.json what steps without a usable gradient were made of, and raise."""
        stream, seed = self.stream, self.state.config.seed

        def record(step):
            images, views = (
                part.reshape(stream.accum_iter, self.world.size, -1).swapaxes(0, 1).tolist()
                for part in stream.images(step)
            )  # [process][micro-batch][image]
            return {"step": step, **self.describe(step), "images": images, "views": views}

        path = Path(self.run.output_dir) / "nonfinite_step.json"
        if self.world.is_main:
            write_json(path, {"seed": seed, "steps": [record(step) for step in steps]})
        distributed.barrier()
        raise LossNotFinite(
            f"no finite loss or gradient in steps {steps[0]}..{steps[-1]}, {len(steps)} in a row "
            f"(seed {seed}): their images are in {path}"
        )


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


def count_operations(loss_of_one):
    """Operations, two per multiply-add, of the forward and backward pass of a function without arguments that
    makes a model and its loss of one image: counted on the "meta" device, which computes nothing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        loss_of_one().backward()
    return counter.get_total_flops()


def backward(loss):
    """Gradients of a scalar loss; all NaN if the loss is not finite."""
    loss.backward(torch.where(loss.isfinite(), 1.0, float("nan")).to(loss.dtype))


def adamw(parameters, device, **settings):
    """AdamW as all trainings use it; fused where that is known to skip a non-finite step without a wait."""
    fused = is_cuda(device) or device.type == "cpu"
    return torch.optim.AdamW(parameters, betas=(0.9, 0.95), fused=fused, **settings)


def optimizer_step(state, lr, max_norm):
    """Clip the gradient and take a step, or skip it if the gradient is non-finite (a fused optimizer does not
    wait to know). A parameter group has the rate `lr`, times its "lr_scale" if it has one. Returns the
    gradient's norm before clipping, on the device."""
    optimizer = state.optimizer
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), max_norm)
    good = norm.isfinite()
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    if all(group.get("fused") for group in optimizer.param_groups):
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
        self._pending.append((steps_done, AsyncCopy(self.in_a_row)))
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
