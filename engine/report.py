"""What people see of a run: log, loss curve, sample grids, online evaluation, the table of a result."""

import copy
import dataclasses
from pathlib import Path

import torch

from engine.evaluate import evaluate
from engine.fast import for_inference
from engine.generate import generate_images
from models.weights import state_digest
from util import pictures
from util.files import value_digest, write_json
from util.logging import MetricsLog, read_metrics, tensorboard_listener, wandb_listener


def open_log(output_dir, config, step, world, *, tensorboard=False, wandb=None):
    """Write config.json; returns the MetricsLog of a run that starts or resumes at `step`, None on other
    processes than the first. `wandb` is a pair (project, run name) or None."""
    if not world.is_main:
        return None
    settings, listeners = dataclasses.asdict(config), []
    write_json(Path(output_dir) / "config.json", settings)
    if tensorboard:
        listeners.append(tensorboard_listener(output_dir))
    if wandb:
        listeners.append(wandb_listener(*wandb, settings))
    return MetricsLog(output_dir, resume_step=step, listeners=listeners)


def plot_loss(output_dir, name):
    """Plot the loss of a run's log into loss.png."""
    lines = [line for line in read_metrics(output_dir) if "loss" in line]
    curve = [line["epoch"] for line in lines], [line["loss"] for line in lines]
    path = Path(output_dir) / "loss.png"
    pictures.save_curves(path, {name: curve}, xlabel="epoch", ylabel="loss, nats per token")


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
            state.model, tokenizer, labels, orders, settings.group_sizes, settings.sampling,
            seed=settings.seed,
        )
        path = Path(output_dir) / "samples" / f"epoch-{state.config.epoch(state.step):07.2f}.png"
        pictures.save_png(path, pictures.labelled_rows(images.cpu(), rows))

    return save_grid


def evaluation_hook(spec, tokenizer, output_dir, world):
    """A training hook that evaluates an EvaluationSpec in the precision of the training and logs the metrics.

    Each evaluation has a folder named by the step and everything that decides its numbers, so nothing older
    is mixed in or refused.
    """

    def evaluate_now(state, log):
        bf16 = state.config.bf16
        model = copy.deepcopy(state.model) if bf16 else state.model  # bfloat16 must not stay in training
        model, decoder = for_inference(model, tokenizer, world.device, bf16=bf16)
        precision = "bfloat16" if bf16 else "float32"
        facts = {**spec.facts, "precision": precision, "decoder": precision}
        facts["weights_digest"] = state_digest(state.model)
        name = value_digest([spec.settings.as_json(), spec.metrics.as_json(), facts])
        folder = Path(output_dir) / "online_evaluation" / f"step-{state.step:07d}-{name}"
        result = evaluate(dataclasses.replace(spec, facts=facts), folder, model, decoder, world)
        if log:
            log.write(state.step, **result["metrics"])

    return evaluate_now


def print_result(result):
    """Print an evaluation's settings and metrics as a table, and its warnings."""
    seconds = result["seconds"]["generate"] + result["seconds"]["decode"]
    table = {name: result[name] for name in ("order", "steps", "cfg", "num_images")} | result["metrics"]
    for name, value in {**table, "seconds_per_image": seconds / result["num_images"]}.items():
        print(f"{name:<24}{value if isinstance(value, (int, str)) else format(value, '.5g')}")
    for line in result["warnings"]:
        print(f"warning: {line}")
    if not result["reference_digest"]:
        print("warning: no --fid_stats: no distance from real images")
