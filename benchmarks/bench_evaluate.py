"""Time and memory of an evaluation: the share of features and metrics, and the peak memory.

    python benchmarks/bench_evaluate.py --model lpd_l --num_images 1024 --bf16 --output_file NAME.json
    python benchmarks/bench_evaluate.py --metrics_only 50000 --output_file NAME.json

The first generates and measures images with random weights, which take the same time. The second computes the
metrics alone, of random features. What runs on the CPU at the end does not shrink with more GPUs and grows
little with the number of images: take --num_images 10000 for the share in a real run. Not yet run on a GPU.
"""

from util import cli  # isort: skip
import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch_fidelity

from benchmarks.measure import publish, record
from benchmarks.random_inception import save_random_inception
from engine.evaluate import Evaluation, GeneratedImages, evaluate
from engine.fast import for_inference
from engine.features import Inception
from engine.generate import resolve_settings
from engine.measure import MetricSpec
from engine.metrics import compute_metrics, statistics_of
from engine.sampling import Sampling
from models.lpd import LPD, LPD_CONFIGS
from models.vqgan import VQConfig, VQModel
from util import distributed


def parse_args(argv=None):
    parser = cli.Parser(description="Time and memory of an evaluation")
    add = parser.add_argument
    add("--model", choices=sorted(LPD_CONFIGS), default="lpd_l")
    add("--grid_size", type=cli.number(int, 1), default=16, help="32 for 512 px")
    add("--num_images", type=cli.number(int, 2), default=1024)
    add("--eval_bsz", type=cli.number(int, 1), default=64)
    add("--generation_steps", type=cli.number(int, 1), default=20)
    add("--cfg", type=cli.number(float, 0), default=4.8)
    add("--bf16", action="store_true")
    add("--metrics_only", type=cli.number(int, 2), metavar="N", help="of N random features")
    add("--prc", action="store_true", help="with --metrics_only: KID, precision, recall too")
    add("--device", default="auto")
    add("--output_file", metavar="FILE", help=".json to write")
    return parser.parse_args(argv)


def random_reference(n=4000):
    """Statistics of random Inception features of full rank, and the features."""
    features = torch.rand(n, 2048, generator=torch.Generator().manual_seed(1))
    return {**statistics_of(features), "features": features.numpy()}


def time_metrics(n, prc):
    """Seconds of the metrics of n random features and logits."""
    torch.manual_seed(0)
    outputs = {"features": torch.rand(n, 2048), "logits": torch.randn(n, 1008)}
    reference = random_reference(n if prc else 4000)
    start = time.perf_counter()
    compute_metrics(Inception, outputs, reference, ("kid", "prc") if prc else ())
    return {"images": n, "kid_and_prc": prc, "seconds": {"metrics": round(time.perf_counter() - start, 1)}}


def time_evaluation(args, world):
    """Seconds by phase of an evaluation with random weights, after a short one that warms up."""
    config = dataclasses.replace(LPD_CONFIGS[args.model], grid_size=args.grid_size)
    torch.manual_seed(0)
    model, tokenizer = LPD(config).eval(), VQModel(VQConfig()).eval()
    model, decoder = for_inference(model, tokenizer, world.device, bf16=args.bf16)
    steps, sampling = args.generation_steps, Sampling(cfg=args.cfg)
    settings = resolve_settings(config.grid_size, generation_steps=steps, sampling=sampling)
    with tempfile.TemporaryDirectory() as folder:
        weights = save_random_inception(Path(folder) / "inception.pth")
        metrics = MetricSpec([Inception(weights, world.device)], {"inception": random_reference()})
        for n in (args.eval_bsz + 1, args.num_images):
            start = time.perf_counter()
            place = Path(folder, str(start))
            evaluation = Evaluation(settings, {}, metrics, n, args.eval_bsz, place)
            result = evaluate(evaluation, GeneratedImages(settings, n, model, decoder), world)
            wall = time.perf_counter() - start
    seconds = result["seconds"]
    measuring = seconds["features"] + seconds["metrics"]
    return {
        "images": args.num_images, "model": args.model, "steps": args.generation_steps, "bf16": args.bf16,
        "batch_size": args.eval_bsz, "cfg": args.cfg, "seconds": seconds, "wall_seconds": round(wall, 1),
        "share_of_features_and_metrics": round(measuring / sum(seconds.values()), 4),
        "share_of_features_alone": round(seconds["features"] / sum(seconds.values()), 4),
        "images_per_second": round(args.num_images / wall, 2),
    }


def main(argv=None):
    args = parse_args(argv)
    if args.output_file:
        cli.writable_folder("--output_file", Path(args.output_file).parent)
    with cli.checking():
        world = distributed.init(args.device)
    only = args.metrics_only
    measured = time_metrics(only, args.prc) if only else time_evaluation(args, world)
    versions = {"torch_fidelity": torch_fidelity.__version__, "numpy": np.__version__}
    report = record(world.device, **versions, **measured)
    seconds = ", ".join(f"{phase} {value} s" for phase, value in measured["seconds"].items())
    publish(report, args.output_file, f"{measured['images']} images: {seconds}")


if __name__ == "__main__":
    cli.run(main)
