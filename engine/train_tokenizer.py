"""Training and evaluation of a VQ tokenizer."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.checkpoint import checkpoint_of, restore
from engine.data import ImageStream, num_steps
from engine.loop import NonFiniteGuard, TrainingLoop, adamw, backward, count_operations, optimizer_step
from models.vqgan import VQConfig, VQModel
from models.weights import TOKENIZER, save_weights
from util import distributed, pictures
from util.cli import setting
from util.device import is_cuda, to_device
from util.images import image_loader, in_order, readable_pixels, to_uint8, to_unit

MIN_STEPS = 2000  # by default
VAL_IMAGES, VALIDATIONS = 128, 10  # of a validation at most; in a run


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How a tokenizer is trained. Here `batch_size` is global (the flag is per process); `lr` is the peak."""

    model: VQConfig
    img_size: int = setting(256, "pixels", least=1)
    epochs: float = setting(None, f"default: 2, or as many as make {MIN_STEPS} steps", kind=float, least=0)
    batch_size: int = setting(64, "per process", least=1)
    lr: float = setting(1e-3, least=0)
    warmup_steps: int = setting(None, "default: 100, at most a tenth of all steps", kind=int, least=0)
    weight_decay: float = 0.0
    commitment: float = 0.25
    revive_every: int = 50
    bf16: bool = setting(False, "bfloat16; default: float32")
    no_mirror: bool = setting(False, "never mirror images, such as text or flags")
    keep_tokens: bool = setting(False, "train the decoder only: tokens, and what LPD knows of them, stay")
    seed: int = 0

    def for_images(self, num_images):
        """These settings with the defaults of epochs and warmup_steps for that many images filled in."""
        epochs, warmup_steps = self.epochs, self.warmup_steps
        if epochs is None:
            epochs = max(2.0, MIN_STEPS * self.batch_size / num_images)
        if warmup_steps is None:
            warmup_steps = min(100, num_steps(num_images, epochs, self.batch_size) // 10)
        return replace(self, epochs=epochs, warmup_steps=warmup_steps)

    def clock(self, step):
        """What the frequencies of RunSettings count: steps."""
        return step

    def num_steps(self, num_images):
        """Steps of the whole run on that many images."""
        return num_steps(num_images, self.epochs, self.batch_size)


@dataclass
class TokenizerState:
    """Everything that must survive a crash."""

    config: TokenizerTrainConfig
    model: VQModel
    optimizer: torch.optim.Optimizer
    code_use: torch.Tensor  # [V], how often this process used each code since the last revival
    step: int = 0
    guard: NonFiniteGuard = field(default_factory=NonFiniteGuard)

    def operations(self):
        """Of a training step, for one image."""
        c = self.config

        def loss_of_one():
            pixels = torch.zeros(1, 3, c.img_size, c.img_size)
            reconstruction, latents, codes, _ = VQModel(c.model)(pixels)
            return sum(losses(pixels, reconstruction, latents, codes, c.commitment).values())

        return count_operations(loss_of_one)

    @contextmanager
    def averaged(self):
        """Inside it the model is in eval mode; there is no average of its weights."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()

    def load(self, path, world):
        """Resume from a checkpoint. Raises ValueError as `restore`."""
        checkpoint = restore(self, path, "code_use")
        if world.is_main:  # it is a sum over all processes, and will be summed again
            self.code_use.copy_(checkpoint["code_use"])


def new_state(config, device):
    """A fresh model and AdamW, the same for the same seed."""
    torch.manual_seed(config.seed)
    model = VQModel(config.model).to(device)
    if not is_cuda(device):  # oneDNN convolutions run fastest so
        model = model.to(memory_format=torch.channels_last)
    if config.keep_tokens:
        for part in (model.encoder, model.quant_conv, model.quantize):
            part.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = adamw(trained, device, lr=config.lr, weight_decay=config.weight_decay)
    return TokenizerState(config, model, optimizer, torch.zeros(config.model.vocab_size, device=device))


def learning_rate(config, step, steps):
    """Linear warm-up, then half a cosine to a hundredth."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def losses(pixels, reconstruction, latents, codes, commitment):
    """Reconstruction (L1 + L2), codebook and commitment losses, each a scalar."""
    error = reconstruction.float() - pixels
    return {
        "reconstruction": error.abs().mean() + error.square().mean(),
        "codebook": F.mse_loss(codes, latents.detach()) * codes.shape[-1],
        "commitment": commitment * F.mse_loss(latents, codes.detach()) * codes.shape[-1],
    }


@torch.no_grad()
def revive_dead_codes(state, latents):
    """Move each code unused since the last call to a random latent of this batch (of rank 0). Draws by their
    squared distance from their codes, as in k-means++, gave no more decibels."""
    latents = latents.detach().flatten(0, -2).contiguous()  # [n, code_dim]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(latents, src=0)
        distributed.all_sum(state.code_use)
    dead = state.code_use == 0
    generator = torch.Generator().manual_seed(state.config.seed * 1_000_003 + state.step)
    picked = to_device(torch.randint(len(latents), (len(dead),), generator=generator), latents.device)
    weight = state.model.quantize.embedding.weight
    usable = dead & latents[picked].isfinite().all(dim=1)
    weight.copy_(torch.where(usable[:, None], latents[picked], weight))
    state.code_use.zero_()


def add_gradients(config, model, pixels):
    """Losses by name with their gradients added, latents and tokens; arguments as in `train_step`."""
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.bf16):
        reconstruction, latents, codes, tokens = model(pixels)
    parts = losses(pixels, reconstruction, latents, codes, config.commitment)
    backward(sum(parts.values()))
    return parts, latents, tokens


def train_step(state, model, pixels, steps):
    """One optimizer step of `steps`, skipped if the loss or its gradient is not finite.

    Args:
        model: `state.model`, or DDP around it. pixels: float32 [B, 3, H, W] in [-1, 1].
    Returns:
        dict of scalars on the device: the losses, the norm of the gradient before clipping, and the share of
        codes used since the last revival.
    """
    config = state.config
    parts, latents, tokens = add_gradients(config, model, pixels)
    norm = optimizer_step(state, learning_rate(config, state.step, steps), max_norm=1.0)
    used = tokens.flatten()
    state.code_use.index_add_(0, used, torch.ones_like(used, dtype=torch.float32))  # bincount would wait
    values = {name: value.detach() for name, value in parts.items()}
    values |= {"grad_norm": norm, "codebook_use": (state.code_use > 0).float().mean()}
    # Late in training the codes must stay where the decoder expects them.
    if state.step % config.revive_every == 0 and state.step < 0.8 * steps and not config.keep_tokens:
        revive_dead_codes(state, latents)
    return values


def validation(config, folder, device):
    """A function that takes a model in eval mode and returns its reconstruction loss on images that are held
    out: VAL_IMAGES at most, evenly spaced in `folder`, the same on every process."""
    images = np.linspace(0, len(folder) - 1, min(VAL_IMAGES, len(folder))).astype(int)
    loader = image_loader(folder, config.img_size, list(in_order(images, 32)), 0)
    batches = [torch.from_numpy(readable_pixels(items)[1]) for items in loader]

    @torch.no_grad()
    def mean_loss(model):
        total = 0.0
        for pixels in (to_unit(to_device(batch, device)) for batch in batches):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
                outputs = model(pixels)
            parts = losses(pixels, *outputs[:3], config.commitment)
            total += parts["reconstruction"].item() * len(pixels)
        return total / len(images)

    return mean_loss


def train_tokenizer(state, folders, run, world, log, num_workers=0):
    """Train from `state.step` to the end on the first of two ImageSets; the second, or None, is held out.
    `run` is a RunSettings whose frequencies count steps. Weights are written with every checkpoint. Raises
    UnreadableImage, naming the file, and what `TrainingLoop` raises."""
    config, (folder, held_out) = state.config, folders
    steps = config.num_steps(len(folder))
    stream = ImageStream(len(folder), config.seed, config.batch_size, no_mirror=config.no_mirror)
    plan = stream.micro_batches(range(state.step, steps), world)
    loader = image_loader(folder, config.img_size, plan, num_workers)
    images = (torch.from_numpy(readable_pixels(items)[1]) for items in loader)
    model = DistributedDataParallel(state.model) if world.size > 1 else state.model
    state.model.train()
    if world.size > 1:  # orders the buckets now: see `engine.train.rehearse`
        blank = torch.zeros(1, 3, config.img_size, config.img_size, device=world.device)
        add_gradients(config, model, blank)
        state.optimizer.zero_grad(set_to_none=True)

    def checkpoint():
        if world.is_main:
            save_weights(Path(run.output_dir) / TOKENIZER, state.model, img_size=config.img_size)
        return checkpoint_of(state, {}, code_use=distributed.all_sum(state.code_use.clone()))

    val_loss = validation(config, held_out, world.device) if held_out else None
    with TrainingLoop(
        state, stream, steps, run, world, log, checkpoint=checkpoint,
        validate=val_loss and (lambda: {"val_reconstruction": round(val_loss(state.model), 5)}),
    ) as loop:
        images = loop.timed(images)
        while loop.goes_on():
            pixels = to_unit(to_device(next(images), world.device))
            values = train_step(state, model, pixels, steps)
            loop.after_step(values["grad_norm"].isfinite(), values)


@torch.inference_mode()
def evaluate_tokenizer(model, folder, img_size, device, *, batch_size=64, num_workers=0, title=None):
    """Reconstruct a folder of images.

    Returns:
        dict of n, psnr in dB (mean over images, of 8-bit pixels), codebook_use (share of codes that occur);
        a sheet of 8 originals above their reconstructions, uint8 [H, W, 3].
    """
    model.eval()
    loader = image_loader(folder, img_size, in_order(range(len(folder)), batch_size), num_workers)
    used = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    psnrs, pairs, every = [], [], max(1, len(folder) // 8)
    total = -(-len(folder) // batch_size)
    for items in tqdm(loader, total=total, unit="batch", desc="reconstruct", mininterval=2):
        indices, images = readable_pixels(items)
        pixels = to_unit(images).to(device)
        tokens = model.encode(pixels)
        before, after = to_uint8(pixels).cpu(), to_uint8(model.decode(tokens)).cpu()
        used[tokens.flatten().cpu()] = True
        error = (before.double() - after.double()).square().mean(dim=(1, 2, 3))  # [B]
        psnrs.append(10 * torch.log10(255**2 / error.clamp(min=1e-9)))
        pairs += [(before[k], after[k]) for k, index in enumerate(indices) if index % every == 0]
    images = torch.stack([image for row in zip(*pairs[:8], strict=True) for image in row]).numpy()
    sheet = pictures.labelled_rows(images, ["original", "decoded"], title=title)
    psnr, use = torch.cat(psnrs).mean().item(), used.float().mean().item()
    return {"n": len(folder), "psnr": psnr, "codebook_use": use}, sheet
