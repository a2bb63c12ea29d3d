"""Train and evaluate LPD.

    torchrun --nproc_per_node 8 main_lpd.py --model lpd_l --use_cached --cached_path DIR --output_dir RUN
    torchrun --nproc_per_node 8 main_lpd.py --evaluate --model lpd_l --pretrained_ckpt FILE --cfg 4.8

The recipes are in scripts/train and scripts/eval. To resume, run the same command again.
"""

import argparse
import dataclasses
import importlib.util
import itertools
from pathlib import Path

import numpy
import torch
import torch_fidelity

from engine.checkpoint import load_lpd, load_tokenizer, start_from, state_digest
from engine.evaluate import Evaluation, EvaluationFailed, Judge, Keep
from engine.fast_generate import FastGenerator
from engine.features import EXTRACTORS, make_extractor
from engine.generate import generate_images
from engine.guard import LossNotFinite
from engine.metrics import load_statistics
from engine.settings import resolve_settings
from engine.speed import ResidentTokens, compile_training, fits
from engine.sweep import best_setting, plot_sweep, setting_key, summarise, table, write_csv
from engine.train import CachedTokens, EncodedImages, TrainConfig, new_state, train
from models.lpd import LPD_CONFIGS
from models.vqgan import FastDecoder
from orders.lpd_order import ORDER_KINDS
from orders.schedule import cosine_group_sizes, training_steps
from util import cli, dist, pictures
from util.files import file_digest, value_digest, write_json
from util.images import list_images, split_folder
from util.logging import MetricsLog, read_metrics, tensorboard_listener, wandb_listener
from util.token_cache import open_token_cache


def parse_args(argv=None):
    parser = cli.Parser(description="Train and evaluate LPD")
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), help="needed unless the weights say it")
    parser.add_argument(
        "--img_size", type=cli.number(int, 1), help="pixels; default: the token cache's, or 256"
    )
    cli.add_tokenizer_flags(parser)
    parser.add_argument("--class_num", type=cli.number(int, 1), help="checked against the data's own")
    parser.add_argument(
        "--pretrained_ckpt",
        metavar="FILE",
        help="weights to evaluate, or to start training from (.safetensors, .pth, folder, hf://owner/repo)",
    )
    parser.add_argument("--output_dir", metavar="DIR")
    parser.add_argument("--resume", metavar="DIR", help="run to go on with where --output_dir holds none")
    cli.add_seed_flag(parser)
    parser.add_argument("--bf16", action="store_true", help="bfloat16; without it float32")
    cli.add_device_flags(parser)
    add_training_flags(parser)
    cli.add_generation_flags(parser)
    add_evaluation_flags(parser)
    return parser.parse_args(argv)


def add_evaluation_flags(parser):
    e = parser.add_argument_group("evaluation")
    e.add_argument("--evaluate", action="store_true", help="evaluate instead of training")
    e.add_argument("--eval_bsz", type=cli.number(int, 1), default=64, help="images generated at a time")
    e.add_argument("--num_images", type=cli.number(int, 2), default=50000)
    e.add_argument("--seeds", type=cli.number(int, 0, 2**31 - 1), nargs="+", help="default: --seed alone")
    e.add_argument("--fid_stats", metavar="FILE", help="reference statistics, .npz with mu and sigma")
    e.add_argument("--features", choices=EXTRACTORS, default="inception", help="only inception gives FID")
    e.add_argument(
        "--inception", metavar="FILE", help="Inception weights; default: $LPD_INCEPTION, torch's cache"
    )
    e.add_argument("--kid", action="store_true", help="kernel distance; needs the reference's features")
    e.add_argument("--prc", action="store_true", help="precision and recall; likewise")
    e.add_argument("--save_images", metavar="DIR", help="keep the images as PNGs")
    e.add_argument("--save_npz", metavar="FILE", help="keep the images as ADM does: arr_0 and labels")
    e.add_argument("--sweep_cfg", type=cli.number(float, 0), nargs="+", help="evaluate each guidance scale")
    e.add_argument("--sweep_steps", type=cli.number(int, 1), nargs="+", help="evaluate each number of steps")
    e.add_argument("--sweep_order", choices=ORDER_KINDS, nargs="+", help="evaluate each kind of order")
    e.add_argument(
        "--final_images", type=cli.number(int, 2), help="the best of a sweep again, on so many images"
    )
    e.add_argument(
        "--online_eval", action="store_true", help="evaluate while training, every --eval_freq epochs"
    )
    e.add_argument("--eval_freq", type=cli.number(float, 0), default=40)
    e.add_argument(
        "--online_num_images", type=cli.number(int, 2), help="of --online_eval; default: --num_images"
    )
    e.add_argument(
        "--online_steps", type=cli.number(int, 1), help="of --online_eval; default: --generation_steps"
    )


def add_training_flags(parser):
    t = parser.add_argument_group("training")
    t.add_argument("--data_path", metavar="DIR", help="train straight from images: CLASS/IMAGE folders")
    t.add_argument("--use_cached", action="store_true", help="train from --cached_path")
    t.add_argument("--cached_path", metavar="DIR", help="token cache of main_cache.py, or a MAR-style folder")
    t.add_argument(
        "--group_sizes_list", type=cli.number(int, 1), nargs="+", help="numbers of steps to train for"
    )
    t.add_argument("--epochs", type=cli.number(float, 0), default=450)
    t.add_argument("--batch_size", type=cli.number(int, 1), default=64, help="per process and micro-batch")
    t.add_argument("--accum_iter", type=cli.number(int, 1), default=1, help="micro-batches of a step")
    t.add_argument("--lr", type=cli.number(float, 0), help="default: blr * global batch / 256")
    t.add_argument("--blr", type=cli.number(float, 0), default=1e-4)
    t.add_argument("--min_lr", type=cli.number(float, 0), default=1e-5)
    t.add_argument(
        "--lr_schedule", choices=["constant", "cosine", "constant+cosine"], default="constant+cosine"
    )
    t.add_argument("--warmup_epochs", type=cli.number(float, 0), default=50)
    t.add_argument("--lr_decay_start_epoch", type=cli.number(float, 0), default=400)
    t.add_argument("--weight_decay", type=cli.number(float, 0), default=0.02)
    t.add_argument("--grad_checkpointing", action="store_true")
    t.add_argument("--compile", action="store_true", help="the fast ways; untried on a GPU")
    t.add_argument("--grad_clip", type=cli.number(float, 0), default=3.0, help="0 is none")
    t.add_argument("--proj_dropout", type=cli.number(float, 0, 0.99), default=0.1)
    t.add_argument("--label_drop_prob", type=cli.number(float, 0, 0.99), default=0.1)
    t.add_argument("--ema", type=cli.number(float, 0, 1), default=0.0, help="decay, say 0.9999; 0 is none")
    t.add_argument(
        "--save_last_freq", type=cli.number(float, 0), default=5, help="epochs; 0 is only at the end"
    )
    t.add_argument(
        "--save_intermediate_freq", type=cli.number(float, 0), default=0, help="epochs; 0 is never"
    )
    t.add_argument("--sample_freq", type=cli.number(float, 0), default=0, help="epochs between sample grids")
    t.add_argument("--log_every", type=cli.number(int, 1), default=50, help="steps")
    t.add_argument("--tensorboard", action="store_true")
    t.add_argument("--use_wandb", action="store_true")
    t.add_argument("--wandb_project", default="lpd")
    t.add_argument("--wandb_run_name")


def generation_settings(args, grid_size, num_images):
    chosen = {name: getattr(args, name) for name in cli.GENERATION_FLAGS}
    return resolve_settings(grid_size, num_images=num_images, **chosen)


def check_flags(args):
    """What can be seen without opening large files."""
    if args.fid_stats:
        cli.existing_file("--fid_stats", args.fid_stats)
    if args.output_dir:
        cli.writable_folder("--output_dir", args.output_dir)
    for flag, package in (("tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if getattr(args, flag) and importlib.util.find_spec(package) is None:
            raise cli.UsageError(f"--{flag} needs the package {package}: pip install {package}")
    if args.evaluate:
        check_evaluation_flags(args)
        return
    cli.required(args, "model", "output_dir")
    if args.use_cached == bool(args.data_path):
        raise cli.UsageError("training needs either --use_cached with --cached_path, or --data_path")
    if args.use_cached:
        cli.required(args, "cached_path")
        cli.existing_folder("--cached_path", args.cached_path)
    else:
        cli.required(args, "vqgan_path")
        cli.existing_folder("--data_path", args.data_path)
    if args.final_images or args.save_images or args.save_npz or args.seeds:
        raise cli.UsageError("--seeds, --final_images, --save_images and --save_npz need --evaluate")
    if (args.sample_freq or args.online_eval) and not args.vqgan_path:
        raise cli.UsageError("--sample_freq and --online_eval need --vqgan_path to make images")
    if args.lr_schedule != "constant" and args.warmup_epochs > args.epochs:
        raise cli.UsageError(f"--warmup_epochs {args.warmup_epochs} is more than --epochs {args.epochs}")
    if args.lr_schedule == "constant+cosine" and args.lr_decay_start_epoch > args.epochs:
        raise cli.UsageError(
            f"--lr_decay_start_epoch {args.lr_decay_start_epoch} is more than --epochs {args.epochs}"
        )


SWEEPS = {"sweep_order": "order", "sweep_steps": "generation_steps", "sweep_cfg": "cfg", "seeds": "seed"}


def check_evaluation_flags(args):
    cli.required(args, "pretrained_ckpt", "vqgan_path", "output_dir")
    for flag in SWEEPS:
        values = getattr(args, flag) or []
        if len(set(values)) < len(values):
            raise cli.UsageError(f"--{flag} names one twice: {' '.join(map(str, values))}")
    if args.lpd_order_file and (args.sweep_order or args.sweep_steps):
        raise cli.UsageError("--lpd_order_file is of one order and schedule: no --sweep_order, --sweep_steps")
    several = any(len(getattr(args, flag) or []) > 1 for flag in SWEEPS)
    if (args.save_images or args.save_npz) and (several or args.final_images):
        raise cli.UsageError("--save_images and --save_npz are for one evaluation, not several")
    if args.save_images:
        cli.writable_folder("--save_images", args.save_images)
    if args.save_npz:
        if Path(args.save_npz).suffix != ".npz":
            raise cli.UsageError(f"--save_npz {args.save_npz} must end in .npz")
        cli.writable_folder("--save_npz", Path(args.save_npz).parent)
    if args.final_images is not None:
        if not several or not args.fid_stats:
            raise cli.UsageError(
                "--final_images needs --fid_stats and several settings: else there is no best"
            )
        if args.final_images <= args.num_images:
            raise cli.UsageError(
                f"--final_images {args.final_images} is not more than --num_images {args.num_images}"
            )


def check_tokenizer_made(args, tokenizer, meta):
    """Refuse a tokenizer that is not the one the token cache was made with."""
    digest, codes = state_digest(tokenizer), tokenizer.config.vocab_size
    if meta.tokenizer_digest not in ("", digest):
        raise ValueError(
            f"--vqgan_path {args.vqgan_path} is tokenizer {digest}, {args.cached_path} was made with "
            f"{meta.tokenizer_digest}"
        )
    if codes != meta.vocab_size:
        raise ValueError(f"--vqgan_path has {codes} codes, {args.cached_path} has {meta.vocab_size}")


def open_source(args, tokenizer, world):
    """What to train on: the source of tokens, and what is to be said of it."""
    if args.use_cached:
        codes = tokenizer.config.vocab_size if tokenizer else args.vqgan_vocab_size
        known = {"vocab_size": codes or 16384, "img_size": args.img_size or 256}
        cache = open_token_cache(args.cached_path, **known)
        meta = cache.meta
        if tokenizer:
            check_tokenizer_made(args, tokenizer, meta)
        if args.vqgan_vocab_size not in (None, meta.vocab_size):
            raise ValueError(
                f"--vqgan_vocab_size is {args.vqgan_vocab_size}, {args.cached_path} has {meta.vocab_size}"
            )
        if args.img_size not in (None, meta.img_size):
            raise ValueError(f"--img_size is {args.img_size}, {args.cached_path} holds {meta.img_size} px")
        shape = {"grid_size": meta.grid_size, "vocab_size": meta.vocab_size}
        info = {"class_names": list(meta.class_names), "img_size": meta.img_size,
                "tokenizer_digest": meta.tokenizer_digest}  # fmt: skip
        return CachedTokens(cache), shape, info
    folder = list_images(split_folder(args.data_path, "train"))
    img_size, stride = args.img_size or 256, tokenizer.config.stride
    if img_size % stride:
        raise ValueError(f"--img_size {img_size} is no multiple of the tokenizer's stride {stride}")
    shape = {"grid_size": img_size // stride, "vocab_size": tokenizer.config.vocab_size}
    info = {"class_names": list(folder.class_names), "img_size": img_size,
            "tokenizer_digest": state_digest(tokenizer)}  # fmt: skip
    return EncodedImages(folder, tokenizer, img_size, args.num_workers, world.device), shape, info


def train_config(args, shape, info, num_images, world):
    """The flags and the data's own numbers as one checked config."""
    num_classes = len(info["class_names"])
    if args.class_num not in (None, num_classes):
        raise ValueError(f"--class_num is {args.class_num}, the data has {num_classes} classes")
    model = dataclasses.replace(
        LPD_CONFIGS[args.model], **shape, num_classes=num_classes, dropout=args.proj_dropout,
        label_drop_prob=args.label_drop_prob,
    )  # fmt: skip
    counts = args.group_sizes_list or training_steps(model.num_tokens)
    try:
        schedules = tuple(cosine_group_sizes(model.num_tokens, steps) for steps in counts)
    except ValueError as error:
        raise ValueError(f"--group_sizes_list: {error}") from None
    global_batch = args.batch_size * args.accum_iter * world.size
    config = TrainConfig(
        model=model, num_images=num_images,
        schedules=schedules,
        epochs=args.epochs, global_batch=global_batch,
        lr=args.blr * global_batch / 256 if args.lr is None else args.lr, min_lr=args.min_lr,
        lr_schedule=args.lr_schedule, warmup_epochs=args.warmup_epochs,
        lr_decay_start_epoch=args.lr_decay_start_epoch, weight_decay=args.weight_decay,
        grad_clip=args.grad_clip, ema=args.ema, bf16=args.bf16, seed=args.seed,
    )  # fmt: skip
    if not config.num_steps:
        raise ValueError(
            f"--epochs {args.epochs} of {num_images} images are no step of {global_batch} images"
        )
    return config


def judge_of(args, device, img_size):
    """What images of this size are measured with, loaded and checked."""
    reference, digest = None, ""
    if args.fid_stats:
        reference, digest = load_statistics(args.fid_stats), file_digest(args.fid_stats)
    extractor = make_extractor(args.features, device, args.inception)
    judge = Judge(extractor, reference, digest, kid=args.kid, prc=args.prc)
    judge.check_size(img_size)
    return judge


def evaluation_facts(args, model, weights_digest, tokenizer, device):
    """What decides an evaluation's numbers beside its settings."""
    return {
        "weights_digest": weights_digest, "tokenizer_digest": state_digest(tokenizer),
        "num_classes": model.config.num_classes,
        "img_size": model.config.grid_size * tokenizer.config.stride,
        "order_file_digest": file_digest(args.lpd_order_file) if args.lpd_order_file else "",
        "precision": str(model.pos_embed.dtype).removeprefix("torch."),
        "compile": args.evaluate and args.compile, "device": dist.device_name(device),
        "torch": torch.__version__, "torch_fidelity": torch_fidelity.__version__, "numpy": numpy.__version__,
    }  # fmt: skip


def sampler(args, tokenizer, config, info, world):
    """A training hook that writes a grid, one row per class (ten at most)."""
    settings = generation_settings(args, config.model.grid_size, 1)
    rows = range(min(10, config.model.num_classes))
    labels = torch.tensor(rows).repeat_interleave(8)

    def write(state, log):
        if world.is_main:
            orders = settings.orders(range(len(labels)))
            images = generate_images(
                state.model, tokenizer, labels, orders, settings.group_sizes, **settings.decoding()
            )
            sheet = pictures.labelled_rows(images.cpu(), [info["class_names"][r] for r in rows])
            name = f"epoch-{config.epoch(state.step):07.2f}.png"
            pictures.save_png(Path(args.output_dir) / "samples" / name, sheet)

    return write


def prepare_training(args, world):
    """Everything training needs, loaded and checked: state, config, source, info and hooks."""
    tokenizer = load_tokenizer(args.vqgan_path).to(world.device) if args.vqgan_path else None
    if tokenizer:
        cli.check_tokenizer_flags(args, tokenizer.config)
    source, shape, info = open_source(args, tokenizer, world)
    config = train_config(args, shape, info, source.num_images, world)
    # On a GPU in any case: without it, leaving out a step that has no usable gradient waits for the GPU.
    state = new_state(config, world.device, fused=args.compile or dist.is_nvidia(world.device))
    state.model.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        compile_training(state.model, world.device, bf16=args.bf16)
        if args.use_cached and fits(source.cache, world.device):
            source = ResidentTokens(source.cache, world.device)
    own, other = (Path(p) / "checkpoint-last.pth" for p in (args.output_dir, args.resume or args.output_dir))
    last = own if own.exists() else other  # the same command again goes on where this run was killed
    if last.exists():
        state.load(last, config)
    elif args.pretrained_ckpt:
        start_from(state.model, args.pretrained_ckpt)
    elif args.resume and Path(args.resume) != Path(args.output_dir):
        raise ValueError(f"--resume: no {last}")
    hooks = []
    if args.sample_freq:
        hooks.append((args.sample_freq, sampler(args, tokenizer, config, info, world)))
    if args.online_eval:
        hooks.append((args.eval_freq, online_evaluation(args, tokenizer, config, world)))
    return state, config, source, info, hooks


def online_evaluation(args, tokenizer, config, world):
    """A training hook that evaluates and logs the metrics.

    Each has a folder named by the step and all that decides its numbers: nothing old is mixed in or refused.
    """
    num_images = args.online_num_images or args.num_images
    given = argparse.Namespace(**vars(args))
    given.generation_steps = args.online_steps or args.generation_steps
    settings = generation_settings(given, config.model.grid_size, num_images)
    judge = judge_of(args, world.device, config.model.grid_size * tokenizer.config.stride)

    def write(state, log):
        facts = evaluation_facts(args, state.model, state_digest(state.model), tokenizer, world.device)
        digest = value_digest([settings.as_json(), judge.as_json(), facts])
        folder = Path(args.output_dir) / "online_evaluation" / f"step-{state.step:07d}-{digest}"
        evaluation = Evaluation(settings, judge, num_images, args.eval_bsz, folder, facts)
        result = evaluation.run(state.model, tokenizer, world)
        if result:
            log.write(state.step, **result["metrics"])

    return write


def run_training(args, world):
    with cli.checking():
        state, config, source, info, hooks = prepare_training(args, world)
    with cli.sole_writer("--output_dir", args.output_dir, world):
        log = make_log(args, config, state.step) if world.is_main else None
        train(
            state, config, source, args.output_dir, world, log, info, accum_iter=args.accum_iter,
            log_every=args.log_every, save_last_freq=args.save_last_freq,
            save_intermediate_freq=args.save_intermediate_freq, hooks=hooks,
        )  # fmt: skip
    if world.is_main:
        lines = [line for line in read_metrics(args.output_dir) if "loss" in line]
        curve = [line["epoch"] for line in lines], [line["loss"] for line in lines]
        path = Path(args.output_dir) / "loss.png"
        pictures.save_curves(path, {args.model: curve}, xlabel="epoch", ylabel="loss, nats a token")


def make_log(args, config, step):
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "config.json", dataclasses.asdict(config))
    listeners = []
    if args.tensorboard:
        listeners.append(tensorboard_listener(output_dir))
    if args.use_wandb:
        listeners.append(wandb_listener(args.wandb_project, args.wandb_run_name, dataclasses.asdict(config)))
    return MetricsLog(output_dir, resume_step=step, listeners=listeners)


def sweep(args, grid_size):
    """The settings to evaluate: every combination of the lists given, once for each seed."""
    lists = {name: getattr(args, flag) or [getattr(args, name)] for flag, name in SWEEPS.items()}
    num_images = max(args.num_images, args.final_images or 0)
    for values in itertools.product(*lists.values()):
        given = argparse.Namespace(**{**vars(args), **dict(zip(lists, values, strict=True))})
        yield generation_settings(given, grid_size, num_images)


def prepare_evaluations(args, world):
    """Model, tokenizer, a function from a number of images to the evaluations, and `generate` as of
    `Evaluation.run`, all loaded and checked."""
    tokenizer = load_tokenizer(args.vqgan_path).to(world.device)
    cli.check_tokenizer_flags(args, tokenizer.config)
    model, info = load_lpd(args.pretrained_ckpt, args.model)
    cli.check_fit(args, model, tokenizer, info, state_digest(tokenizer))
    variants = list(sweep(args, model.config.grid_size))
    judge = judge_of(args, world.device, model.config.grid_size * tokenizer.config.stride)
    digest = state_digest(model)  # of the weights as they are in the file
    model = model.to(world.device, torch.bfloat16 if args.bf16 else torch.float32)
    facts = evaluation_facts(args, model, digest, tokenizer, world.device)
    keep = Keep(*(Path(place) if place else None for place in (args.save_images, args.save_npz)))

    def evaluations(num_images):
        return [
            Evaluation(settings, judge, num_images, args.eval_bsz, Path(args.output_dir), facts, keep)
            for settings in variants
        ]

    generate = None
    if args.compile:
        tokenizer = FastDecoder(tokenizer, model.pos_embed.dtype)
        generate = FastGenerator(model).generate_tokens
    return model, tokenizer, evaluations, generate


def run_evaluation(args, world):
    with cli.checking():
        model, tokenizer, evaluations, generate = prepare_evaluations(args, world)
        first = evaluations(args.num_images)
        final = evaluations(args.final_images) if args.final_images else []
    with cli.sole_writer("--output_dir", args.output_dir, world):
        results = [evaluation.run(model, tokenizer, world, generate=generate) for evaluation in first]
        if final:
            best = dist.gather_objects(best_setting(results) if world.is_main else None)[0]
            chosen = [evaluation for evaluation in final if setting_key(evaluation.protocol) == best]
            results += [evaluation.run(model, tokenizer, world, generate=generate) for evaluation in chosen]
        if world.is_main:
            report(args, results)


def report(args, results):
    """The table, and for a sweep its CSV and plot."""
    summary = summarise(results)
    if len(results) > 1:
        write_csv(Path(args.output_dir) / "sweep.csv", summary)
        plot_sweep(Path(args.output_dir) / "sweep.png", summary)
    print(table(summary))
    lines = [line for result in results for line in result["warnings"]]
    lines += [] if args.fid_stats else ["no --fid_stats: no distance from real images"]
    for line in dict.fromkeys(lines):
        print(f"warning: {line}")


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    cli.find_files(args)
    with cli.checking():
        world = dist.init(args.device)
    try:
        (run_evaluation if args.evaluate else run_training)(args, world)
    except (LossNotFinite, EvaluationFailed) as error:
        raise cli.Failure(error) from None
    dist.finish()


if __name__ == "__main__":
    cli.run(main)
