"""Turn a training checkpoint or weights into a folder of config.json, model.safetensors and a model card.

    python scripts/export.py --checkpoint output/lpd --output_dir output/export/lpd --license apache-2.0

`from_pretrained`, --pretrained_ckpt and --vqgan_path take such a folder, local or on the hub. Works for LPD
and tokenizers; the card states only what the checkpoint records.
"""

import dataclasses
import re

from models.lpd import LPD, LPD_CONFIGS
from models.vqgan import VQModel
from models.weights import CONFIG, WEIGHTS, find, read_weights, state_digest
from util import cli
from util.files import atomic

CARD = "README.md"
ABOUT = {
    LPD: "Weights of an image generator: Locality-aware Parallel Decoding (LPD), arXiv 2507.01957.",
    VQModel: "Weights of an image tokenizer: a VQ model of the architecture of LlamaGen, arXiv 2406.06525.",
}
COMMANDS = {
    LPD: "main_sample.py --pretrained_ckpt {place} --vqgan_path TOKENIZER --output_dir output/samples",
    VQModel: "main_cache.py --vqgan_path {place} --img_size {size} --data_path DATA --cached_path CACHE",
}


def parse_args(argv=None):
    parser = cli.Parser(description="Turn a checkpoint into a folder for the hub")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (.pth, .safetensors) or a run folder")
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), help="size, if the weights do not record it")
    parser.add_argument("--license", help="identifier for the card, e.g. apache-2.0")
    cli.add_output_flags(parser)
    return parser.parse_args(argv)


def table(rows):
    """A Markdown table without a header."""
    cells = [(name, re.sub(r"[|`<>\s]+", " ", str(value))) for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def facts(model, info):
    """Rows about the weights themselves."""
    size, names = info.get("img_size"), info.get("class_names") or []
    rows = {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "image": f"{size}x{size} px" if size else None,
        "class names": ", ".join(names[:10]) + (", ..." if len(names) > 10 else ""),
        "trained with tokenizer": info.get("tokenizer_digest"),
        "digest of these weights": state_digest(model),
        **dataclasses.asdict(model.config),
    }
    return {name: value for name, value in rows.items() if value not in (None, "")}


def training_settings(info):
    """Rows about the training run, without the model's config."""
    rows = {name: value for name, value in info.get("train_config", {}).items() if name != "model"}
    if "schedules" in rows:
        steps = (str(s if isinstance(s, int) else len(s)) for s in rows["schedules"])
        rows["schedules"] = f"of {', '.join(steps)} steps"
    return rows


def card(model, info, name, license_name):
    """The text of the model card; OWNER is to be filled in by whoever uploads the folder."""
    kind, settings, report = type(model), training_settings(info), info.get("report", {})
    size = settings.get("img_size") or report.get("img_size") or 256
    command = COMMANDS[kind].format(place=f"hf://OWNER/{name}", size=size)
    parts = [f"---\nlicense: {license_name}\n---\n"] if license_name else []
    parts += [f"# {name}\n", f"{ABOUT[kind]}\n", table(facts(model, info)), "\n## Training\n"]
    parts += [table(settings) if settings else "The checkpoint does not record how it was trained."]
    if report:
        parts += ["\nMeasured at the end of training:\n", table(report)]
    parts += [
        "\n## Use\n",
        "In the repository of the code; the path of this folder works in place of its name:\n",
        f"```bash\npython {command}\n```\n",
        f"```python\nfrom {kind.__module__} import {kind.__name__}\n",
        f'model = {kind.__name__}.from_pretrained("OWNER/{name}")\n```\n',
    ]
    return "\n".join(parts)


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "checkpoint", "output_dir")
    if args.license and not re.fullmatch(r"[a-z0-9.-]+", args.license):
        raise cli.UsageError(f"--license {args.license!r} is not an identifier such as apache-2.0")
    folder = cli.prepare_output(args, CONFIG)
    with cli.checking("--checkpoint: "):
        path = find(args.checkpoint)
        state, info = read_weights(path, VQModel, LPD)
        kind = VQModel if VQModel.marker in state else LPD
        model = kind.build(state, info, args.model, path)
    model.save_pretrained(folder, **info)
    with atomic(folder / CARD) as partial:
        partial.write_text(card(model, info, folder.resolve().name, args.license))
    print(f"{folder}: {CONFIG}, {WEIGHTS}, {CARD}")


if __name__ == "__main__":
    cli.run(main)
