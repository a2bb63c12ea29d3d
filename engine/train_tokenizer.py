"""The training loop of a VQ tokenizer.

Knows pixels, the reconstruction and codebook losses, and the revival of dead codes. Does not know flags.
"""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from engine.batches import num_steps, own_part, step_images
from engine.checkpoint import check_parts, check_same_config, load_last_checkpoint, save_checkpoint
from engine.guard import Guard, backward, check_weights, give_up
from models.pretrained import load_state
from models.vqgan import VQConfig, VQModel
from util import dist, pictures
from util.images import image_loader, in_order, readable_pixels, to_uint8, to_unit
from util.logging import MetricsLog
from util.signals import Stopped, StopRequest


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How a tokenizer is trained. `batch_size` is of all processes together; `lr` is the highest."""

    model: VQConfig
    img_size: int
    epochs: float = 2.0
    batch_size: int = 64
    lr: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    commitment: float = 0.25
    revive_every: int = 50
    bf16: bool = False
    seed: int = 0


@dataclass
class TokenizerState:
    """Everything that must survive a crash."""

    model: VQModel
    optimizer: torch.optim.Optimizer
    code_use: torch.Tensor  # [V] how often this process used each code since the last revival
    step: int = 0
    guard: Guard = field(default_factory=Guard)

    def save(self, path, config, world):
        """Write a checkpoint; every process takes part.

        Raises:
            LossNotFinite: the weights are no numbers.
        """
        check_weights(self.model)
        code_use = dist.all_sum(self.code_use.clone())
        if not world.is_main:
            return
        save_checkpoint(path, {
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "code_use": code_use, "step": self.step, "skipped": int(self.guard.skipped),
            "train_config": asdict(config),
            "info": {"config": asdict(config.model)},
        })  # fmt: skip

    def load(self, path, config, world):
        """Go on from a checkpoint.

        Raises:
            ValueError: it was made with other settings; the message names the first.
        """
        checkpoint = load_last_checkpoint(path)
        if "code_use" not in checkpoint:
            raise ValueError(f"{path}: no checkpoint of tokenizer training: give another --output_dir")
        check_same_config(path, checkpoint["train_config"], asdict(config))
        check_parts(path, checkpoint, "model", "optimizer", "step")
        load_state(self.model, checkpoint["model"], path)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        if world.is_main:  # the sum over all processes is summed again at the next revival
            self.code_use.copy_(checkpoint["code_use"])
        self.step, self.guard.skipped = checkpoint["step"], checkpoint.get("skipped", 0)


def new_state(config, device):
    """A fresh model and optimizer, the same for the same seed."""
    torch.manual_seed(config.seed)
    model = VQModel(config.model).to(device)
    if device.type == "cpu":  # oneDNN convolutions run fastest so
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay,
        fused=dist.is_nvidia(device),  # else leaving out a step without a usable gradient waits for the GPU
    )  # fmt: skip
    return TokenizerState(model, optimizer, torch.zeros(config.model.vocab_size, device=device))


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
def revive_dead_codes(state, latents, seed):
    """Give each code unused since the last call the place of a random latent of this batch (rank 0's)."""
    latents = latents.detach().flatten(0, -2).contiguous()
    if torch.distributed.is_initialized():
        torch.distributed.broadcast(latents, src=0)
        dist.all_sum(state.code_use)
    dead = state.code_use == 0
    generator = torch.Generator().manual_seed(seed * 1_000_003 + state.step)
    picked = torch.randint(len(latents), (len(dead),), generator=generator).to(latents.device)
    weight = state.model.quantize.embedding.weight
    usable = dead & latents[picked].isfinite().all(dim=1)
    weight.copy_(torch.where(usable[:, None], latents[picked], weight))
    state.code_use.zero_()


def train_tokenizer(state, config, folder, output_dir, world, *, num_workers=0, save_every=500, log_every=50):
    """Train from `state.step` to the end; checkpoints and `metrics.jsonl` go to `output_dir`.

    Raises:
        Stopped: a signal asked for it; checkpoint-last.pth holds the last step.
        LossNotFinite: ten steps in a row had no usable gradient, or the weights are no numbers.
    """
    steps, first = num_steps(len(folder), config.epochs, config.batch_size), state.step
    model = DistributedDataParallel(state.model) if world.size > 1 else state.model
    state.model.train()
    log = MetricsLog(output_dir, resume_step=state.step) if world.is_main else None

    def plan():
        for step in range(first, steps):
            parts = step_images(len(folder), config.seed, config.batch_size, step)
            yield [own_part(part, world.rank, world.size, 1)[0].tolist() for part in parts]

    agreed = dist.Agreement()
    with StopRequest() as request, tqdm(
        total=steps, initial=first, unit="step", disable=not world.is_main, mininterval=5
    ) as progress:  # fmt: skip
        for items in image_loader(folder, config.img_size, plan(), num_workers):
            pixels = to_unit(readable_pixels(items)[1]).to(world.device)
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(config, state.step, steps)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=config.bf16):
                reconstruction, latents, codes, tokens = model(pixels)
            parts = losses(pixels, reconstruction, latents, codes, config.commitment)
            backward(sum(parts.values()))
            state.guard.step(state.optimizer, torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0))
            state.code_use += torch.bincount(tokens.flatten(), minlength=len(state.code_use))
            state.step += 1
            progress.update()
            end, stop = state.step == steps, agreed(request.number)
            if bad := state.guard.bad_row(state.step, end=end):
                give_up(
                    bad, output_dir, world, num_images=len(folder), seed=config.seed,
                    global_batch=config.batch_size,
                )  # fmt: skip
            if state.step % log_every == 0 and log:
                values = {name: round(value.item(), 5) for name, value in parts.items()}
                used = round((state.code_use > 0).float().mean().item(), 4)  # share, since the last revival
                log.write(
                    state.step, **values, codebook_use=used, lr=state.optimizer.param_groups[0]["lr"],
                    skipped=int(state.guard.skipped),
                )  # fmt: skip
                progress.set_postfix(values)
            # Late in training the codes must stay where the decoder expects them.
            if state.step % config.revive_every == 0 and state.step < 0.8 * steps:
                revive_dead_codes(state, latents, config.seed)
            if state.step % save_every == 0 or end or stop:
                state.save(Path(output_dir) / "checkpoint-last.pth", config, world)
            if stop and not end:
                dist.barrier()  # torchrun ends all with the first that ends: the checkpoint comes before
                raise Stopped(stop, f"checkpoint-last.pth holds step {state.step} of {steps}")
    dist.barrier()


@torch.inference_mode()
def evaluate_tokenizer(model, folder, img_size, device, *, batch_size=64, num_workers=0):
    """Reconstruct a folder.

    Returns:
        dict: n; psnr in dB (mean over images, of 8-bit pixels); codebook_use, share of codes that occur.
        Second, a sheet of 8 originals over their reconstructions, uint8 [H, W, 3].
    """
    model.eval()
    batches = list(in_order(range(len(folder)), batch_size))
    used = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    psnrs, shown = [], {}
    show = set(range(0, len(folder), max(1, len(folder) // 8)))
    for items in tqdm(
        image_loader(folder, img_size, batches, num_workers), unit="batch", desc="reconstruct", mininterval=2
    ):
        pixels = to_unit(readable_pixels(items)[1]).to(device)
        tokens = model.encode(pixels)
        before, after = to_uint8(pixels).cpu(), to_uint8(model.decode(tokens)).cpu()
        used[tokens.flatten().cpu()] = True
        error = (before.double() - after.double()).square().mean(dim=(1, 2, 3))  # [B]
        psnrs.append(10 * torch.log10(255**2 / error.clamp(min=1e-9)))
        shown.update({i: (before[k], after[k]) for k, (i, _) in enumerate(items) if i in show})
    pairs = [shown[i] for i in sorted(shown)][:8]
    images = torch.stack([pair[0] for pair in pairs] + [pair[1] for pair in pairs]).numpy()
    sheet = pictures.labelled_rows(images, ["original", "decoded"], scale=max(1, 96 // img_size))
    report = {
        "n": len(folder),
        "psnr": torch.cat(psnrs).mean().item(),
        "codebook_use": used.float().mean().item(),
    }
    return report, sheet
