"""Training state on disk: `checkpoint-last.pth`, the one before it, and numbered ones."""

import math
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch

from models.weights import CHECKPOINT, load_state, read_pth
from util.distributed import warn
from util.files import atomic, refuse_changes

LAST, PREVIOUS = CHECKPOINT, "checkpoint-previous.pth"
REMEDY = "resume with the same settings, or more --epochs, or give another --output_dir"
SCHEDULE = ("epochs", "warmup_steps", "warmup_epochs", "lr_decay_start_epoch")  # may change in a longer run


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values as `.pth`, atomically. An earlier LAST becomes PREVIOUS."""
    path = Path(path)
    with atomic(path) as partial:
        with partial.open("wb") as file:  # torch.save(path) would write the temporary name into the file
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch raises it in place of the OSError of a full disk
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        if path.name == LAST and path.exists():
            with atomic(path.with_name(PREVIOUS)) as previous:
                os.link(path, previous)


def load_checkpoint(path, parts=()):
    """The dict of a checkpoint, on the CPU; if LAST is damaged, of PREVIOUS, with a warning.

    Raises:
        ValueError: damaged, or one of `parts` is not in it; the message names the file.
    """
    path, previous = Path(path), Path(path).with_name(PREVIOUS)
    try:
        checkpoint = read_pth(path)
    except ValueError as error:
        if path.name != LAST or not previous.exists():
            raise
        checkpoint = read_pth(previous)
        warn(f"warning: {error}; resuming from {previous}")
    for name in ("train_config", *parts):
        if name not in checkpoint:
            raise ValueError(
                f"{path} is not a checkpoint of this training: no {name}; weights go to --pretrained_ckpt"
            )
    return checkpoint


def recorded_settings(config, saved):
    """The dict of settings in a checkpoint as the class of `config` writes it today, or as it is if that is
    impossible. A setting that is newer than the checkpoint has its default."""

    def known(like, values):
        return type(like)(**{f.name: values[f.name] for f in fields(like) if f.name in values})

    try:
        return asdict(known(config, {**saved, "model": known(config.model, saved["model"])}))
    except (LookupError, TypeError, ValueError):
        return saved


def checkpoint_of(state, info, **parts):
    """The dict to save: what both trainings have, and `parts`. `info` describes the training data."""
    return {
        "model": state.model.state_dict(), "optimizer": state.optimizer.state_dict(), **parts,
        "step": state.step, "skipped": int(state.guard.skipped), "train_config": asdict(state.config),
        "info": {**info, "config": asdict(state.config.model)},
    }


def restore(state, path, *parts):
    """Put a checkpoint back into a training state; returns its dict. Its settings must be those of the state,
    but for SCHEDULE if the state has more epochs, which continue the run. Raises ValueError, naming the file
    and the setting, or as `load_checkpoint`."""
    checkpoint = load_checkpoint(path, ("model", "optimizer", "step", *parts))
    saved, now = recorded_settings(state.config, checkpoint["train_config"]), asdict(state.config)
    free = SCHEDULE if now["epochs"] > saved.get("epochs", math.inf) else ()
    refuse_changes(path, saved, {name: value for name, value in now.items() if name not in free}, REMEDY)
    load_state(state.model, checkpoint["model"], path)
    saved = checkpoint["optimizer"]
    for group, own in zip(saved["param_groups"], state.optimizer.param_groups, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})  # chosen by this run
    state.optimizer.load_state_dict(saved)
    state.step, state.guard.skipped = checkpoint["step"], checkpoint.get("skipped", 0)
    return checkpoint
