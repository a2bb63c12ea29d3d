"""Time and memory of an evaluation: what share of it the metrics take, and the most memory it needs.

    python benchmarks/bench_evaluate.py --model lpd_l --num_images 1024 --bf16 --output_file NAME.json
    python benchmarks/bench_evaluate.py --metrics_only 50000 --output_file NAME.json

The first makes images with random weights of that size and of the VQ-16 tokenizer, and measures them with
Inception (random weights too: the time does not depend on them). Each phase's seconds are the device's own.
The second computes the metrics alone, of so many random features, for the memory that they need. A share is
of the whole: features and metrics over all phases; what runs on the CPU at the end does not shrink with more
GPUs and grows little with the number of images, so take --num_images 10000 for the share of a real run.

NOT YET RUN ON A GPU: there is no result of one in benchmarks/results.
"""

import json
import platform
import resource
import shlex
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch_fidelity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.random_inception import save_random_inception  # noqa: E402
from engine.evaluate import Evaluation, Judge  # noqa: E402
from engine.features import make_extractor  # noqa: E402
from engine.metrics import RunningStatistics, compute_metrics  # noqa: E402
from engine.settings import resolve_settings  # noqa: E402
from models.lpd import LPD, LPD_CONFIGS  # noqa: E402
from models.vqgan import VQConfig, VQModel  # noqa: E402
from util import cli, dist  # noqa: E402
from util.files import write_json  # noqa: E402


def parse_args(argv=None):
    parser = cli.Parser(description="Time and memory of an evaluation")
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), default="lpd_l")
    parser.add_argument("--num_images", type=cli.number(int, 2), default=1024)
    parser.add_argument("--eval_bsz", type=cli.number(int, 1), default=64)
    parser.add_argument("--generation_steps", type=cli.number(int, 1), default=20)
    parser.add_argument("--cfg", type=cli.number(float, 0), default=4.8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--metrics_only", type=cli.number(int, 2), metavar="N", help="of N random features")
    parser.add_argument("--prc", action="store_true", help="with --metrics_only: KID, precision, recall too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output_file", metavar="FILE", help=".json to write")
    return parser.parse_args(argv)


def random_reference(num_features, n=4000):
    """Statistics of random features of full rank, and the features."""
    features = torch.rand(n, num_features, generator=torch.Generator().manual_seed(1))
    running = RunningStatistics(num_features)
    running.add(features)
    return {**running.finish(), "features": features.numpy()}


def time_metrics(n, prc):
    """Seconds of the metrics of n random features and logits."""
    generator = torch.Generator().manual_seed(0)
    features, logits = torch.rand(n, 2048, generator=generator), torch.randn(n, 1008, generator=generator)
    reference = random_reference(2048, n if prc else 4000)
    start = time.perf_counter()
    compute_metrics(features, logits, "inception", reference, kid=prc, prc=prc)
    return {"images": n, "kid_and_prc": prc, "seconds": {"metrics": round(time.perf_counter() - start, 1)}}


def time_evaluation(args, world):
    """Seconds by phase of an evaluation with random weights, after a first one that warms up."""
    config = LPD_CONFIGS[args.model]
    torch.manual_seed(0)
    model = LPD(config).eval().to(world.device, torch.bfloat16 if args.bf16 else torch.float32)
    tokenizer = VQModel(VQConfig()).eval().to(world.device)
    settings = resolve_settings(config.grid_size, generation_steps=args.generation_steps, cfg=args.cfg)
    with tempfile.TemporaryDirectory() as folder:
        weights = save_random_inception(Path(folder) / "inception.pth")
        judge = Judge(make_extractor("inception", world.device, weights), random_reference(2048))
        for name, n in (("warm-up", args.eval_bsz + 1), ("timed", args.num_images)):
            start = time.perf_counter()
            evaluation = Evaluation(settings, judge, n, args.eval_bsz, Path(folder) / name, {})
            result = evaluation.run(model, tokenizer, world)
            wall = time.perf_counter() - start
    seconds = result["seconds"]
    measuring = seconds["features"] + seconds["metrics"]
    return {
        "images": args.num_images, "model": args.model, "steps": args.generation_steps, "bf16": args.bf16,
        "batch_size": args.eval_bsz, "cfg": args.cfg, "seconds": seconds, "wall_seconds": round(wall, 1),
        "share_of_features_and_metrics": round(measuring / sum(seconds.values()), 4),
        "share_of_features_alone": round(seconds["features"] / sum(seconds.values()), 4),
        "images_per_second": round(args.num_images / wall, 2),
    }  # fmt: skip


def main(argv=None):
    args = parse_args(argv)
    if args.output_file:
        cli.writable_folder("--output_file", Path(args.output_file).parent)
    with cli.checking():
        world = dist.init(args.device)
    measured = (
        time_metrics(args.metrics_only, args.prc) if args.metrics_only else time_evaluation(args, world)
    )
    report = {
        "date": str(date.today()), "command": shlex.join(sys.argv), "device": dist.device_name(world.device),
        "cpu_threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "torch_fidelity": torch_fidelity.__version__, "numpy": np.__version__,
        **measured,
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "peak_device_memory_gb": round(dist.peak_memory(world.device) / 2**30, 2),
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    if args.output_file:
        write_json(args.output_file, report)


if __name__ == "__main__":
    cli.run(main)
