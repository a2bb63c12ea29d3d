"""Train and evaluate LPD.

    torchrun --nproc_per_node 8 main_lpd.py --model lpd_l --use_cached --cached_path DIR --output_dir RUN
    torchrun --nproc_per_node 8 main_lpd.py --evaluate --model lpd_l_256 --bf16 --output_dir RESULT

Recipes are in scripts/train and scripts/eval. To resume, run the same command again; with more --epochs it
goes on from where it ended.
"""

import dataclasses
from functools import partial
from pathlib import Path

from engine import evaluate, published, report
from engine.checkpoint import LAST
from engine.data import EncodedImages, token_source
from engine.fast import FastGenerator, compiled_lpd, for_inference
from engine.generate import OrderChoice, load_pair, resolve_settings
from engine.loop import LossNotFinite, RunSettings
from engine.measure import MetricSpec
from engine.metrics import MetricSettings
from engine.sampling import Sampling
from engine.train import TrainConfig, new_state, train
from models.lpd import LPD, LPD_CONFIGS, Execution, LPDConfig
from models.vqgan import VQModel
from models.weights import ORDER_SUFFIXES, find, state_digest
from orders.schedule import check_group_sizes, cosine_group_sizes, training_steps
from util import cli, distributed, folders
from util.device import describe
from util.files import file_digest, refuse_changes
from util.token_cache import names_digest, open_token_cache, split_cache


def parse_args(argv=None):
    parser = cli.Parser(description="Train and evaluate LPD")
    cli.add_weights_flags(parser, published.MODELS)
    parser.add_argument("--class_num", type=cli.number(int, 1), help="checked against the data or weights")
    parser.add_argument("--output_dir", metavar="DIR")
    cli.add_seed_flag(parser)
    cli.add_device_flags(parser)
    cli.add_timeout_flag(parser)
    parser.add_argument("--compile", action="store_true", help="compiled training, captured generation")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--use_cached", action="store_true", help="train from --cached_path")
    add("--cached_path", metavar="DIR", help="token cache of main_cache.py, or a MAR-style folder")
    cli.add_folder_flags(training)
    add("--resume", metavar="DIR", help="run to resume if --output_dir has no checkpoint")
    add("--batch_size", type=cli.number(int, 1), default=64, help="per process and micro-batch")
    add("--blr", type=cli.number(float, 0), default=TrainConfig.blr)
    add("--group_sizes_list", action=cli.Schedules, nargs="+", help="step counts to train on, or a JSON file")
    add("--proj_dropout", type=cli.number(float, 0, 0.99), default=0.1)
    add("--grad_checkpointing", action="store_true", help="recompute blocks in the backward pass")
    cli.add_settings(training, LPDConfig)
    cli.add_settings(training, TrainConfig)
    cli.add_settings(training, RunSettings)
    add("--sample_freq", type=cli.number(float, 0), default=0, help="epochs between sample grids")
    add("--tensorboard", action="store_true")
    add("--use_wandb", action="store_true")
    add("--wandb_project", default="lpd")
    add("--wandb_run_name")
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--evaluate", action="store_true", help="evaluate instead of training")
    add("--published_protocol", action="store_true", help="decode as the published evaluation; needs --bf16")
    add("--online_eval", action="store_true", help="evaluate while training, every --eval_freq epochs")
    add("--eval_freq", type=cli.number(float, 0), default=40)
    add("--eval_bsz", type=cli.number(int, 1), default=64, help="images generated at a time")
    add("--num_images", type=cli.number(int, 2), default=50000)
    cli.add_settings(evaluation, MetricSettings)
    add("--save_images", metavar="DIR", type=Path, help="save the images as PNGs")
    add("--save_npz", metavar="FILE", type=Path, help="save the images as ADM does: arr_0 and labels")
    cli.add_settings(parser, OrderChoice)
    cli.add_settings(parser, Sampling)
    return published.parse(parser, argv)


def check_flags(args):
    """What can be checked without opening large files."""
    cli.required(args, "output_dir")
    cli.writable_folder("--output_dir", args.output_dir)
    if args.published_protocol and not (args.evaluate and args.bf16):
        raise cli.UsageError("--published_protocol needs --evaluate and --bf16")
    if args.evaluate:
        cli.required(args, "pretrained_ckpt")
        for flag, path in (("--save_images", args.save_images), ("--save_npz", args.save_npz)):
            cli.writable_folder(flag, path.parent if path else args.output_dir)
        if args.save_npz and args.save_npz.suffix != ".npz":
            raise cli.UsageError(f"--save_npz {args.save_npz} must end in .npz")
        return
    if args.use_cached == bool(args.data_path):
        raise cli.UsageError("training needs either --use_cached with --cached_path, or --data_path")
    cli.required(args, "model", "cached_path" if args.use_cached else "vqgan_path")
    if args.save_images or args.save_npz:
        raise cli.UsageError("--save_images and --save_npz need --evaluate")
    if (args.sample_freq or args.online_eval) and not args.vqgan_path:
        raise cli.UsageError("--sample_freq and --online_eval need --vqgan_path to decode images")


def generation_settings(args, grid_size, num_images):
    return resolve_settings(
        grid_size, sampling=cli.settings_from(Sampling, args), seed=args.seed, num_images=num_images,
        **cli.chosen(OrderChoice, args),
    )


def evaluation_of(args, model, tokenizer, device, weights_digest):
    """The Evaluation of a model in the precision in which it will generate."""
    settings = generation_settings(args, model.config.grid_size, args.num_images)
    facts = evaluate.evaluation_facts(model, tokenizer, device) | {
        "weights_digest": weights_digest, "compile": args.evaluate and args.compile,
        "order_file_digest": file_digest(args.lpd_order_file) if args.lpd_order_file else "",
    }
    if args.evaluate and args.published_protocol:
        facts["decoder"] = "published"
    metrics = MetricSpec.load(cli.settings_from(MetricSettings, args), device, facts["img_size"])
    places = args.output_dir, args.save_images, args.save_npz
    return evaluate.Evaluation(settings, facts, metrics, args.num_images, args.eval_bsz, *places)


def open_sources(args, tokenizer, world):
    """The sources of the training images and of those held out, if any; what is known of the data."""
    if args.data_path:
        img_size, stride = args.img_size or 256, tokenizer.config.stride
        folder, held_out = cli.open_folders(args, img_size, world, args.output_dir)
        if img_size % stride:
            raise ValueError(f"--img_size {img_size} is not a multiple of the tokenizer's stride {stride}")
        how = tokenizer, img_size, args.num_workers, world.device
        return [EncodedImages(part, *how) for part in (folder, held_out) if part], {
            "grid_size": img_size // stride, "vocab_size": tokenizer.config.vocab_size, "img_size": img_size,
            "class_names": list(folder.class_names), "tokenizer_digest": state_digest(tokenizer),
            "names_digest": names_digest(folder.names),
        }
    codes = tokenizer.config.vocab_size if tokenizer else args.vqgan_vocab_size or 16384
    cache = open_token_cache(args.cached_path, vocab_size=codes, img_size=args.img_size or 256)
    data = cache.meta.as_json()
    if tokenizer:
        digest = data["tokenizer_digest"] and state_digest(tokenizer)  # MAR's caches record none
        given = {"vocab_size": codes, "tokenizer_digest": digest}
        refuse_changes(args.cached_path, data, given, "give its tokenizer with --vqgan_path")
    train, val = split_cache(cache, args.val_fraction)
    distributed.say(folders.summary(args.cached_path, data["class_names"], train, val, cache.left_out))
    return [token_source(part, world.device, resident=args.compile) for part in (train, val) if part], data


def train_config(args, data, num_images, world):
    """The TrainConfig of the flags and of what is known of the data."""
    model = dataclasses.replace(
        LPD_CONFIGS[args.model], grid_size=data["grid_size"], vocab_size=data["vocab_size"],
        num_classes=len(data["class_names"]), dropout=args.proj_dropout, **cli.chosen(LPDConfig, args),
    )
    counts, global_batch = args.group_sizes_list, args.batch_size * args.accum_iter * world.size
    with cli.checking("--group_sizes_list: "):
        L = model.num_tokens
        schedules = tuple(
            check_group_sizes(steps, L) if isinstance(steps, list) else cosine_group_sizes(L, steps)
            for steps in counts or training_steps(L)
        )
    config = cli.settings_from(
        TrainConfig, args, model=model, num_images=num_images, schedules=schedules, seed=args.seed,
        global_batch=global_batch, blr=args.blr,
    )
    if not config.num_steps:
        raise ValueError(f"--epochs {args.epochs} of {num_images} images make no step of {global_batch}")
    return config


def train_state(args, config, class_names, device):
    """The training state: resumed, with the weights of --pretrained_ckpt, or new."""
    build = partial(LPD, execution=Execution(grad_checkpointing=args.grad_checkpointing))
    if args.compile:
        given = {"bf16": args.bf16, "grad_checkpointing": args.grad_checkpointing}
        build = partial(compiled_lpd, device=device, **given)
    state = new_state(config, device, build)
    places = [Path(folder) / LAST for folder in (args.output_dir, args.resume) if folder]
    last = next((path for path in places if path.exists()), None)
    if last:
        state.load(last)
    elif args.pretrained_ckpt:
        state.start_from(args.pretrained_ckpt, class_names)
    elif places[0] != places[-1]:
        raise ValueError(f"--resume: no {places[-1]}")
    return state


def run_training(args, world):
    with cli.checking():
        tokenizer = VQModel.load(args.vqgan_path)[0].to(world.device) if args.vqgan_path else None
        sources, data = open_sources(args, tokenizer, world)
        grid_size, img_size, names = data["grid_size"], data["img_size"], data["class_names"]
        cli.check_stated(
            args, vqgan_vocab_size=data["vocab_size"], vqgan_stride=img_size // grid_size, img_size=img_size,
            class_num=len(names),
        )
        config = train_config(args, data, sources[0].num_images, world)
        state, hooks = train_state(args, config, names, world.device), []
        if args.sample_freq:
            settings = generation_settings(args, grid_size, 8 * min(10, len(names)))
            hooks.append((args.sample_freq, report.sample_hook(settings, tokenizer, args.output_dir, names)))
        if args.online_eval:
            evaluation = evaluation_of(args, state.model, tokenizer, world.device, weights_digest="")
            hooks.append((args.eval_freq, report.evaluation_hook(evaluation, tokenizer, world)))
        run = cli.settings_from(RunSettings, args, output_dir=args.output_dir, hooks=tuple(hooks))
    info = {name: data[name] for name in ("class_names", "img_size", "tokenizer_digest", "names_digest")}
    info |= {"sampling": cli.chosen(Sampling, args)} if args.sample_freq else {}
    with cli.sole_writer("--output_dir", args.output_dir, world):
        wandb = (args.wandb_project, args.wandb_run_name) if args.use_wandb else None
        listeners = {"tensorboard": args.tensorboard, "wandb": wandb}
        log = report.start_run(args.output_dir, state, config.num_steps, info, world, **listeners)
        train(state, sources, run, world, log, info)
        if log:
            report.plot_losses(args.output_dir)


def run_evaluation(args, world):
    with cli.checking():
        model, tokenizer, _ = load_pair(args.pretrained_ckpt, args.vqgan_path, args.model)
        stride, codes = tokenizer.config.stride, tokenizer.config.vocab_size
        cli.check_stated(
            args, vqgan_vocab_size=codes, vqgan_stride=stride, img_size=model.config.grid_size * stride,
            class_num=model.config.num_classes,
        )
        digest = state_digest(model)  # of the weights in the file, before they become bfloat16
        distributed.say(describe(model, world.device, bf16=args.bf16))
        given = {"bf16": args.bf16, "compiled": args.compile}
        model, decoder = for_inference(model, tokenizer, world.device, **given)
        evaluation = evaluation_of(args, model, tokenizer, world.device, digest)
        evaluate.check_output(evaluation)
    decoder = evaluate.PublishedDecoder(tokenizer) if args.published_protocol else decoder
    generate = FastGenerator(model).generate_tokens if args.compile else None
    images = evaluate.GeneratedImages(evaluation.settings, args.num_images, model, decoder, generate)
    with cli.sole_writer("--output_dir", args.output_dir, world):
        result = evaluate.evaluate(evaluation, images, world)
    report.print_result(result)


def main(argv=None):
    args = parse_args(argv)
    check_flags(args)
    with cli.checking():
        args.lpd_order_file = args.lpd_order_file and find(args.lpd_order_file, ORDER_SUFFIXES)
        world = distributed.init(args.device, args.timeout)
    try:
        (run_evaluation if args.evaluate else run_training)(args, world)
    except (LossNotFinite, ModuleNotFoundError) as error:
        raise cli.Failure(error) from None  # the module: tensorboard or wandb


if __name__ == "__main__":
    cli.run(main)
