"""What an order is worth in pictures: a distance and the share that a classifier recognises, over seeds.

    python scripts/analysis/pictures.py --pretrained_ckpt FILE --vqgan_path FILE --fid_stats FILE \\
        --classifier FILE --orders lpd halton confident --steps 4 8 --seeds 0 1 2 --cfg 3 --output_dir OUT

Every combination is measured once and kept in OUT; to resume, run the same again. With --given K the tokens
of the first K groups are those of a sample drawn one token at a time or, with --data_path or --cached_path,
of real images: what is left of the difference between orders is not a matter of their first groups.
"""

from util import cli  # isort: skip
import itertools
import time
from functools import partial

import torch

from benchmarks.classifier import load_classifier, predict
from engine.decoding import generate_tokens, step_shapes
from engine.features import flat, nested
from engine.generate import ORDERS, load_pair, resolve_settings
from engine.measure import MetricSpec
from engine.metrics import MetricSettings
from engine.sampling import Sampling
from models.weights import state_digest
from orders.policies import POLICIES
from scripts import sweep
from scripts.analysis import images
from util import distributed
from util.files import file_digest, read_json, refuse_changes, value_digest, write_csv, write_json
from util.images import to_uint8


def parse_args(argv=None):
    parser = cli.Parser(description="Pictures by order and number of steps: distance and share recognised")
    images.add_flags(parser)
    add = parser.add_argument
    add("--output_dir", metavar="DIR")
    add("--orders", choices=ORDERS, nargs="+", default=["lpd", "halton", "spread", "random"])
    add("--steps", type=cli.number(int, 1), nargs="+", default=[3, 4, 6, 8])
    add("--group_sizes", action=cli.GroupSizes, nargs="+", help="tokens of each step, in place of --steps")
    add("--seeds", type=cli.number(int, 0), nargs="+", default=[0, 1, 2])
    add("--given", type=cli.number(int, 0), default=0, metavar="K", help="groups that are not drawn")
    add("--classifier", metavar="FILE", help="of benchmarks/classifier.py")
    add("--batch_size", type=cli.number(int, 1), default=50)
    cli.add_settings(parser, MetricSettings)
    cli.add_settings(parser, Sampling)
    return parser.parse_args(argv)


def settings_of(args, grid_size):
    """The `GenerationSettings` of the flags. ValueError for given groups that an order cannot have."""
    found, sampling = [], cli.settings_from(Sampling, args)
    for order, steps, seed in itertools.product(args.orders, args.steps, args.seeds):
        schedule = {"group_sizes": args.group_sizes} if args.group_sizes else {"generation_steps": steps}
        found.append(resolve_settings(grid_size, order=order, seed=seed, sampling=sampling, **schedule))
        if args.given >= (groups := len(found[-1].group_sizes)):
            raise ValueError(f"--given {args.given} is not fewer than {groups} groups")
        if args.given and order in POLICIES:
            raise ValueError(f"--given: {order} decides its first groups itself")
    return found


class Pictures:
    """The models, and with `given` groups the real images, or None, that give them."""

    def __init__(self, args, device):
        self.model, self.tokenizer, _ = load_pair(args.pretrained_ckpt, args.vqgan_path, args.model)
        self.model, self.tokenizer = self.model.to(device), self.tokenizer.to(device)
        size = self.model.config.grid_size * self.tokenizer.config.stride
        self.metrics = MetricSpec.load(cli.settings_from(MetricSettings, args), device, size)
        self.classifier, _ = load_classifier(args.classifier)
        if (known := self.classifier.config.img_size) != size:
            raise ValueError(f"--classifier is of {known} px images, the weights make {size} px")
        self.given, self.batch_size, self.real = args.given, args.batch_size, None
        self.labels = torch.arange(args.num_images) * self.model.config.num_classes // args.num_images
        if args.data_path or args.cached_path:
            _, self.real, self.labels = images.load(args, device)

    def tokens(self, plan, ids):
        """Of the images of these ids, int64 [b, L]."""
        order, sizes = plan.orders(ids.numpy()), plan.group_sizes
        options = {"sampling": plan.sampling, "seed": plan.seed, "image_ids": ids}
        make = partial(generate_tokens, self.model, self.labels[ids], order, **options)
        if not self.given:
            return make(sizes)
        source = make((1,) * order.shape[1]).cpu() if self.real is None else self.real[ids]
        return make(sizes[self.given :], known=source.gather(1, order[:, : sum(sizes[: self.given])]))

    @torch.inference_mode()
    def measure(self, plan):
        """A result as of an evaluation, a dict for `sweep.summarise`; `seconds` are those of the tokens."""
        outputs, seconds, hits = [], 0.0, 0
        for ids in torch.arange(len(self.labels)).split(self.batch_size):
            begin = time.perf_counter()
            tokens = self.tokens(plan, ids).cpu()  # waits for the device
            seconds += time.perf_counter() - begin
            pixels = to_uint8(self.tokenizer.decode(tokens.to(self.model.pos_embed.device)))
            found = flat({extractor.name: extractor(pixels) for extractor in self.metrics.extractors})
            outputs.append({key: value.float().cpu() for key, value in found.items()})
            grey = pixels.cpu().float().mean(dim=3).to(torch.uint8)[:, None]
            hits += (predict(self.classifier, grey) == self.labels[ids]).sum().item()
        found = {key: torch.cat([part[key] for part in outputs]) for key in outputs[0]}
        names = [extractor.name for extractor in self.metrics.extractors]
        metrics = self.metrics.compute(nested(found, names))
        return {
            "order": plan.order, "steps": len(plan.group_sizes), "cfg": plan.sampling.cfg,
            "num_images": len(self.labels), "metrics": {**metrics, "recognised": hits / len(self.labels)},
            "seconds": {"generate": seconds, "decode": 0.0},
        }


def work_of(plan):
    """Group sizes of an image, its forwards and rows, without guidance."""
    looks = plan.order in POLICIES and POLICIES[plan.order].looks
    steps = step_shapes(plan.group_sizes, plan.grid_size**2, looks)
    sizes, rows = " ".join(map(str, plan.group_sizes)), sum(sum(step[:3]) for step in steps)
    return {"group_sizes": sizes, "forwards": len(steps), "rows": rows}


def facts_of(args, pictures):
    """What decides a result besides its order, steps and seed."""
    real = None if pictures.real is None else value_digest(pictures.real.tolist())
    return {
        "weights": state_digest(pictures.model), "tokenizer": state_digest(pictures.tokenizer),
        "classifier": file_digest(args.classifier), **pictures.metrics.as_json(), "given": args.given,
        "real": real, "labels": value_digest(pictures.labels.tolist()), "batch_size": args.batch_size,
    }


def main(argv=None):
    args = parse_args(argv)
    with cli.checking():
        cli.required(args, "output_dir", "pretrained_ckpt", "fid_stats", "classifier")
        folder, world = cli.writable_folder("--output_dir", args.output_dir), distributed.init(args.device)
        pictures = Pictures(args, world.device)
        plans, facts = settings_of(args, pictures.model.config.grid_size), facts_of(args, pictures)
        todo = {folder / f"{p.order}_{len(p.group_sizes)}_seed{p.seed}.json": p for p in plans}
        for path, plan in todo.items():
            if path.exists():
                now, remedy = plan.as_json() | facts, "give another --output_dir"
                refuse_changes(path, read_json(path)["protocol"], now, remedy)
    with cli.sole_writer("--output_dir", folder, world):
        for path, plan in todo.items():
            if not path.exists():
                write_json(path, pictures.measure(plan) | {"protocol": plan.as_json() | facts})
                print(path.stem, flush=True)
        work = {(plan.order, len(plan.group_sizes)): work_of(plan) for plan in plans}
        rows = [row | work[row["order"], row["steps"]] for row in sweep.summarise(map(read_json, todo))]
        write_csv(folder / "pictures.csv", rows)
        sweep.plot(folder / "pictures.png", rows)
        print(sweep.table(rows))


if __name__ == "__main__":
    cli.run(main)
