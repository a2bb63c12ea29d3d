"""Evaluation: images of a model as a stream, their features, the metrics.

Knows which image has which number, label and order. Does not know model internals or flags.
"""

import time

import torch
from tqdm import tqdm

from engine.generate import generate_images
from engine.metrics import compute_metrics
from util import dist


def balanced_label(image_id, num_images, num_classes):
    """The class of an image of an evaluation: classes in label order, equally many of each."""
    return image_id * num_classes // num_images


def generated_images(model, tokenizer, settings, num_images, batch_size, world):
    """This process's share of the images of an evaluation, in batches.

    Yields:
        (image ids int64 [b], uint8 [b, H, W, 3] on the device)
    """
    mine = torch.arange(world.rank, num_images, world.size)
    for ids in mine.split(batch_size):
        labels = balanced_label(ids, num_images, model.config.num_classes)
        images = generate_images(
            model, tokenizer, labels, settings.orders(ids.numpy()), settings.group_sizes, image_ids=ids,
            **settings.decoding(),
        )  # fmt: skip
        yield ids, images


def evaluate(model, tokenizer, settings, num_images, batch_size, extractor, reference, world):
    """FID and Inception Score of generated images.

    Returns:
        dict of metrics on the first process, None on the others.
    """
    start = time.perf_counter()
    ids, parts = [], []
    with tqdm(total=num_images, unit="img", disable=not world.is_main, mininterval=1) as progress:
        for batch_ids, images in generated_images(model, tokenizer, settings, num_images, batch_size, world):
            parts.append(extractor(images))
            ids.append(batch_ids)
            progress.update(len(batch_ids) * world.size)
    ids = torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
    mine = (ids, *(torch.cat(part) for part in zip(*parts, strict=True))) if parts else None
    gathered = [part for part in dist.gather_objects(mine) if part is not None]
    if not world.is_main:
        return None
    ids, features, logits = (torch.cat(part) for part in zip(*gathered, strict=True))
    by_id = ids.argsort()  # the same sums for any number of processes
    metrics = compute_metrics(features[by_id], logits[by_id], reference)
    return {**metrics, "num_images": len(ids), "seconds": round(time.perf_counter() - start, 2)}
