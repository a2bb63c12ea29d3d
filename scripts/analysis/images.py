"""What the analyses share: the images that they measure, their bits, and means with errors."""

import math

import numpy as np
import torch

from engine.cache import encode_views
from engine.likelihood import token_nll
from models.lpd import LPD, LPD_CONFIGS
from models.vqgan import VQModel
from models.weights import state_digest
from util import cli
from util.distributed import say
from util.folders import list_images, split_folder
from util.images import image_loader, in_order, readable_pixels
from util.token_cache import open_token_cache, split_cache


def add_flags(parser):
    """The weights and the images; for `load`."""
    cli.add_weights_flags(parser, LPD_CONFIGS)
    parser.add_argument("--cached_path", metavar="DIR", help="token cache")
    parser.add_argument("--data_path", metavar="DIR", help="or images: DIR/CLASS or DIR/val/CLASS")
    parser.add_argument(
        "--split", choices=["val", "train", "all"], default="val", help="val: those held out of training"
    )
    parser.add_argument("--num_images", type=cli.number(int, 2), default=1000, help="at most; spaced evenly")
    cli.add_device_flags(parser)


def load(args, device):
    """The model in eval mode on the device, and tokens int64 [n, L] and labels int64 [n] of the images.

    Raises ValueError for weights, images and a tokenizer that do not belong together.
    """
    cli.required(args, "pretrained_ckpt")
    if bool(args.cached_path) == bool(args.data_path):
        raise cli.UsageError("give either --cached_path, or --data_path with --vqgan_path")
    model, info = LPD.load(args.pretrained_ckpt, args.model)
    tokens, labels, names, digest = (_from_cache if args.cached_path else _from_files)(args, model, device)
    if digest and info.get("tokenizer_digest") not in (None, digest):
        raise ValueError(f"the images have tokenizer {digest}, the weights {info['tokenizer_digest']}")
    if list(info.get("class_names", names)) != list(names):
        raise ValueError("the classes of the images are not those of the weights")
    if tokens.shape[1] != model.config.num_tokens or tokens.max() >= model.config.vocab_size:
        found = f"{tokens.shape[1]} tokens up to {tokens.max()}"
        needed = f"{model.config.num_tokens} of {model.config.vocab_size} codes"
        raise ValueError(f"the images have {found}, the weights are for {needed}")
    return model.to(device), torch.from_numpy(tokens), torch.from_numpy(labels)


def evenly_spaced(part, num_images, name):
    """Indices of that many images of a folder or a cache, or of all if there are fewer. Raises ValueError:
    less than two; `name` is what the part is called."""
    count = len(part) if part else 0
    if count < 2:
        raise ValueError(f"{name} has {count} images")
    if count < num_images:
        say(f"--num_images {num_images}: {name} has {count}, all of which are used")
    return np.arange(min(count, num_images)) * count // min(count, num_images)


def _from_cache(args, model, device):
    config = model.config
    img_size = args.img_size or 16 * config.grid_size
    cache = open_token_cache(args.cached_path, vocab_size=config.vocab_size, img_size=img_size)
    parts = (cache, None) if args.split == "all" else split_cache(cache)
    cache = parts[args.split == "val"]
    indices = evenly_spaced(cache, args.num_images, f"--split {args.split}")
    tokens = cache.tokens(indices, np.zeros_like(indices))
    return tokens, cache.labels[indices], cache.meta.class_names, cache.meta.tokenizer_digest


def _from_files(args, model, device):
    cli.required(args, "vqgan_path")
    tokenizer, _ = VQModel.load(args.vqgan_path)
    tokenizer = tokenizer.to(device)
    parts = (list_images(args.data_path), None) if args.split == "all" else split_folder(args.data_path)
    folder = parts[args.split == "val"]
    indices = evenly_spaced(folder, args.num_images, f"--split {args.split}")
    size = model.config.grid_size * tokenizer.config.stride
    loader = image_loader(folder, size, in_order(indices, 64), args.num_workers)
    parts = [encode_views(tokenizer, readable_pixels(items)[1], device)[:, 0].cpu() for items in loader]
    tokens = torch.cat(parts).numpy().astype(np.int64)
    return tokens, folder.labels[indices], folder.class_names, state_digest(tokenizer)


def token_bits(model, tokens, labels, orders, group_sizes, batch_size=32):
    """Bits of the images' tokens in generation order, float32 [n, L]; orders are a NumPy array [n, L]."""
    device = model.pos_embed.device
    inputs = (tokens, labels, torch.from_numpy(orders.astype(np.int64)))
    batches = zip(*(x.split(batch_size) for x in inputs), strict=True)
    nats = [token_nll(model, *(x.to(device) for x in batch), group_sizes).cpu() for batch in batches]
    return torch.cat(nats).numpy() / math.log(2)


def mean_and_error(values):
    """Mean and standard error of values [n]."""
    return values.mean().item(), values.std(ddof=1).item() / math.sqrt(len(values))
