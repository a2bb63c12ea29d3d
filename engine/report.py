"""What people see of a run: log, loss curve, sample grids, online evaluation, the table of a result."""

import copy
import dataclasses
from pathlib import Path

import torch

from engine.evaluate import GeneratedImages, evaluate
from engine.fast import for_inference
from engine.generate import generate_images
from engine.train import plain
from models.weights import state_digest
from util import pictures
from util.device import describe, device_name
from util.distributed import say
from util.files import value_digest, write_json
from util.logging import MetricsLog, read_metrics, record_start, tensorboard_listener, wandb_listener


def start_run(output_dir, state, steps, data, world, *, tensorboard=False, wandb=None):
    """Print what a training run is, write config.json and a line of runs.jsonl unless it has finished.

    Args:
        steps: of the whole run. data: facts about its images, for the record. wandb: (project, run name).
    Returns:
        the MetricsLog of a run that starts or resumes at `state.step`; None on all but the first process.
    """
    config, precision = state.config, "bfloat16" if state.config.bf16 else "float32"
    say(describe(state.model, world.device, bf16=config.bf16))
    left = f", resumed with {steps - state.step:,} of them left" if state.step else ""
    processes = f" on {world.size} processes" if world.size > 1 else ""
    say(f"{steps:,} steps{left}{processes}, learning rate {config.lr:g}")
    if not world.is_main:
        return None
    settings, listeners = dataclasses.asdict(config), []
    write_json(Path(output_dir) / "config.json", settings)
    if state.step < steps:
        place = {"device": device_name(world.device), "precision": precision, "processes": world.size}
        record_start(output_dir, step=state.step, steps=steps, **place, data=data)
    if tensorboard:
        listeners.append(tensorboard_listener(output_dir, state.step))
    if wandb:
        listeners.append(wandb_listener(output_dir, *wandb, settings))
    return MetricsLog(output_dir, resume_step=state.step, listeners=listeners)


LPD_CURVES = {"training images": "loss", "held-out images": "val_loss"}


def plot_losses(output_dir, curves=LPD_CURVES, ylabel="loss, nats per token"):
    """Plot numbers of a run's log over its epochs into loss.png; `curves` is a dict of label -> number. A run
    of no steps has none."""
    if not (Path(output_dir) / "metrics.jsonl").exists():
        return
    lines = read_metrics(output_dir)
    shown = {label: curve for label, name in curves.items() if (curve := points(lines, name))}
    pictures.save_curves(Path(output_dir) / "loss.png", shown, xlabel="epoch", ylabel=ylabel)


def points(lines, name):
    """(epoch, mean) of a number of the log, each over a hundredth of the run or more: a line may stand for a
    step or two, at the end of an epoch."""
    start, total, found = 0, 0.0, []
    before = start
    for line in lines:
        if name in line:
            total += (line["step"] - before) * line[name]
            before = line["step"]
            if before - start >= lines[-1]["step"] / 100:
                found.append((line["epoch"], total / (before - start)))
                start, total = before, 0.0
    return found


def sample_hook(settings, tokenizer, output_dir, class_names):
    """A training hook that saves eight samples of each class (ten at most), one row per class, made with
    GenerationSettings."""
    rows = list(class_names[:10])
    labels = torch.arange(len(rows)).repeat_interleave(8)
    orders = settings.orders(range(len(labels)))

    def save_grid(state, log):
        if log is None:
            return
        images = generate_images(
            plain(state.model), tokenizer, labels, orders, settings.group_sizes, settings.sampling,
            seed=settings.seed,
        )
        path = Path(output_dir) / "samples" / f"epoch-{state.config.clock(state.step):07.2f}.png"
        pictures.save_png(path, pictures.labelled_rows(images.cpu(), rows))

    return save_grid


def evaluation_hook(evaluation, tokenizer, world):
    """A training hook that runs an Evaluation in the precision of the training and logs the metrics.

    Each has a folder named by the step and everything that decides its numbers, so nothing older is mixed in
    or refused.
    """

    def evaluate_now(state, log):
        bf16 = state.config.bf16
        model = plain(state.model)
        model = copy.deepcopy(model) if bf16 else model  # bfloat16 must not stay in training
        model, decoder = for_inference(model, tokenizer, world.device, bf16=bf16)
        precision = "bfloat16" if bf16 else "float32"
        facts = {**evaluation.facts, "precision": precision, "decoder": precision}
        facts["weights_digest"] = state_digest(state.model)
        name = value_digest([evaluation.settings.as_json(), evaluation.metrics.as_json(), facts])
        folder = Path(evaluation.output_dir, "online_evaluation", f"step-{state.step:07d}-{name}")
        images = GeneratedImages(evaluation.settings, evaluation.num_images, model, decoder)
        now = dataclasses.replace(evaluation, facts=facts, output_dir=folder)
        result = evaluate(now, images, world)
        if log:
            log.write(state.step, **result["metrics"])

    return evaluate_now


def print_result(result):
    """Print the settings and metrics of an evaluation, or of stored images, as a table, and its warnings;
    `result` is None on all processes but the first."""
    if result is None:
        return
    settings = ("preparation", "order", "steps", "cfg", "num_images")
    table = {name: result[name] for name in settings if name in result} | result["metrics"]
    if "generate" in result["seconds"]:
        seconds = result["seconds"]["generate"] + result["seconds"]["decode"]
        table["seconds_per_image"] = seconds / result["num_images"]
    width = max(map(len, table))
    for name, value in table.items():
        print(f"{name:<{width}}  {value if isinstance(value, (int, str)) else format(value, '.5g')}")
    for line in result["warnings"]:
        print(f"warning: {line}")
    if not result["reference_digest"]:
        print("warning: no --fid_stats: no distance from real images")
