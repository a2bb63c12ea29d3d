"""Make a folder of config.json, model.safetensors and a model card from a training checkpoint or weights.

    python scripts/export.py --checkpoint output/lpd --output_dir output/export/lpd --license apache-2.0

Such a folder, put on the hub or left where it is, is what `from_pretrained`, --pretrained_ckpt and
--vqgan_path take. Works for LPD and for tokenizers. The card says only what the checkpoint holds.
"""

import json
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # imports start from the repository's root, not from this folder

from engine.checkpoint import load_either, state_digest  # noqa: E402
from models.lpd import LPD, LPD_CONFIGS  # noqa: E402
from models.pretrained import CONFIG, WEIGHTS  # noqa: E402
from util import cli  # noqa: E402
from util.files import atomic  # noqa: E402

CARD = "README.md"
ABOUT = {
    "LPD": "Weights of an image generator: Locality-aware Parallel Decoding (LPD), arXiv 2507.01957.",
    "VQModel": "Weights of an image tokenizer: a VQ model of the architecture of LlamaGen, arXiv 2406.06525.",
}
COMMANDS = {
    "LPD": "main_sample.py --pretrained_ckpt {place} --vqgan_path TOKENIZER --output_dir output/samples",
    "VQModel": "main_cache.py --vqgan_path {place} --img_size {size} --data_path DATA --cached_path CACHE",
}


def parse_args(argv=None):
    parser = cli.Parser(description="Make a folder for the hub of a checkpoint: config, weights, model card")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (.pth, .safetensors) or a run folder")
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), help="size of weights that do not say it")
    parser.add_argument("--output_dir", metavar="DIR")
    parser.add_argument("--license", help="identifier for the card, as apache-2.0")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser.parse_args(argv)


def check_output(folder, overwrite):
    """Refuse a folder that holds anything but hidden files and, with --overwrite, an earlier export."""
    cli.writable_folder("--output_dir", folder)
    there = {path.name for path in folder.iterdir() if path.name[0] != "."} if folder.exists() else set()
    others = sorted(there - {CONFIG, WEIGHTS, CARD})
    if others:
        raise cli.UsageError(f"--output_dir {folder} holds something else: {others[0]}")
    if there and not overwrite:
        raise cli.UsageError(f"--output_dir {folder} is not empty: give another or --overwrite")


def table(rows):
    """A Markdown table without a head; values are put on one line."""
    values = [re.sub(r"[|`<>\s]+", " ", str(value)) for value in rows.values()]
    lines = [f"| {name} | {value} |" for name, value in zip(rows, values, strict=True)]
    return "\n".join(["| | |", "|---|---|", *lines])


def facts(model, info):
    """What the weights are, by name."""
    config, names, size = model.config, info.get("class_names"), info.get("img_size")
    rows = {"parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}"}
    if isinstance(model, LPD):
        shown = f": {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}" if names else ""
        rows |= {"image": f"{size}x{size} px"} if size else {}
        rows |= {
            "tokens": f"{config.grid_size}x{config.grid_size}, of {config.vocab_size} codes",
            "width, depth, heads": f"{config.embed_dim}, {config.depth}, {config.num_heads}",
            "classes": f"{config.num_classes}{shown}",
            "trained with tokenizer": info.get("tokenizer_digest") or "not said",
        }
    else:
        rows |= {
            "tokens": f"one for {config.stride}x{config.stride} px",
            "codes": f"{config.vocab_size}, of {config.code_dim} dimensions",
            "width, multipliers": f"{config.base_width}, {list(config.multipliers)}",
        }
    return rows | {"digest of these weights": state_digest(model)}


def training(info):
    """The settings of the training run, by name, but the model's, which config.json has."""
    settings = info.get("train_config")
    settings = {k: v for k, v in settings.items() if k != "model"} if isinstance(settings, dict) else {}
    if isinstance(settings.get("schedules"), (list, tuple)):
        settings["schedules"] = f"of {', '.join(str(len(sizes)) for sizes in settings['schedules'])} steps"
    return settings


def card(model, info, name, license_name):
    """The text of the model card; OWNER is left for whoever puts the folder on the hub."""
    kind, settings = type(model).__name__, training(info)
    report = info["report"] if isinstance(info.get("report"), dict) else {}
    size = settings.get("img_size") or report.get("img_size") or 256
    command = COMMANDS[kind].format(place=f"hf://OWNER/{name}", size=size)
    parts = [f"---\nlicense: {license_name}\n---\n"] if license_name else []
    parts += [f"# {name}\n", f"{ABOUT[kind]}\n", table(facts(model, info)), "\n## Training\n"]
    parts += [table(settings) if settings else "The checkpoint does not say how these weights were trained."]
    parts += ["\nMeasured when training ended:\n", table(report)] if report else []
    parts += [
        "\n## Use\n",
        "In the repository of the code; a path of this folder does in place of its name:\n",
        f"```bash\npython {command}\n```\n",
        f"```python\nfrom {type(model).__module__} import {kind}\n",
        f'model = {kind}.from_pretrained("OWNER/{name}")\n```',
    ]
    return "\n".join(parts) + "\n"


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "checkpoint", "output_dir")
    if args.license and not re.fullmatch(r"[a-z0-9.-]+", args.license):
        raise cli.UsageError(f"--license {args.license!r} is no identifier as apache-2.0")
    path = cli.weights_file("--checkpoint", args.checkpoint)
    folder = Path(args.output_dir)
    check_output(folder, args.overwrite)
    with cli.checking():
        model, info = load_either(path, args.model)
        try:
            json.dumps(info)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: what it says of its weights is no JSON ({error})") from None
    model.save_pretrained(folder, **info)
    with atomic(folder / CARD) as partial:
        partial.write_text(card(model, info, folder.resolve().name, args.license))
    print(f"{folder}: {CONFIG}, {WEIGHTS}, {CARD}")


if __name__ == "__main__":
    cli.run(main)
