"""Steps without a usable gradient: left out, counted, and the end of a run when they do not stop.

Knows losses, gradient norms, optimizers and which images a step saw. Does not know models. All processes
decide alike, because a loss that is no number makes the averaged gradient none; and nothing waits for the
device, if the optimizer is fused.
"""

from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.batches import own_part, step_images
from util import dist
from util.files import write_json

IN_A_ROW = 10  # ends a run
LAG = 2  # steps by which a count is read late, when a GPU has it ready


class LossNotFinite(Exception):
    """Training met losses, gradients or weights that are no numbers."""


def backward(loss):
    """Gradients of a scalar loss; not a number each, if the loss is none."""
    loss.backward(torch.where(loss.isfinite(), 1.0, float("nan")).to(loss.dtype))


@dataclass
class Guard:
    """Counts the steps left out: `skipped` in all and `row` without a break, ints on the device."""

    skipped: torch.Tensor | int = 0
    row: torch.Tensor | int = 0
    _late: deque = field(default_factory=deque)

    def step(self, optimizer, norm):
        """Step, unless `norm`, the gradient's on the device, is no number: then nothing changes."""
        good = norm.isfinite()
        if optimizer.param_groups[0].get("fused"):
            optimizer.found_inf = (~good).float()  # what a GradScaler gives the fused kernels
            optimizer.step()
        elif good:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.skipped, self.row = self.skipped + ~good, (self.row + 1) * ~good

    def bad_row(self, step, *, end=False):
        """Call it after each step with the number of steps done; `end`: it was the last. Returns the numbers,
        from 0, of ten steps that were left out in a row, as soon as it is known, else none."""
        self._late.append((step, dist.Later(self.row)))
        while len(self._late) > (0 if end else LAG):
            last, row = self._late.popleft()
            if row.get() >= IN_A_ROW:
                return range(last - IN_A_ROW, last)
        return range(0)


def check_weights(model):
    """Refuse weights that are not numbers: no checkpoint may hold them.

    Raises:
        LossNotFinite: naming the first.
    """
    names, weights = zip(*model.named_parameters(), strict=True)
    good = torch.stack([weight.isfinite().all() for weight in weights]).tolist()
    if not all(good):
        raise LossNotFinite(f"weights {names[good.index(False)]} are not finite: the last checkpoint is kept")


def give_up(steps, output_dir, world, *, num_images, seed, global_batch, accum_iter=1, facts=lambda step: {}):
    """Write down what was in steps that had no usable gradient, in OUTPUT_DIR/nonfinite_step.json, and end.

    Args:
        steps: their numbers, from 0. facts: what else is to be said of each.
    Raises:
        LossNotFinite: always.
    """

    def record(step):
        indices, views = step_images(num_images, seed, global_batch, step)
        parts = {"images": indices, "views": views}
        by_rank = {
            name: [own_part(part, rank, world.size, accum_iter).tolist() for rank in range(world.size)]
            for name, part in parts.items()
        }  # [process][micro-batch][image]
        return {"step": step, **facts(step), **by_rank}

    path = Path(output_dir) / "nonfinite_step.json"
    if world.is_main:
        write_json(path, {"seed": seed, "steps": [record(step) for step in steps]})
    dist.barrier()
    raise LossNotFinite(
        f"no finite loss or gradient in steps {steps[0]}..{steps[-1]}, {len(steps)} in a row (seed {seed}): "
        f"their images are in {path}"
    )
