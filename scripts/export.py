"""Turn weights, or a token cache, into a folder with a card, ready for the hub.

    python scripts/export.py --checkpoint output/lpd --output_dir output/export/lpd --license apache-2.0
    python scripts/export.py --cached_path cache/imagenet256 --output_dir output/export/imagenet256

`from_pretrained`, --pretrained_ckpt and --vqgan_path take the folder of an LPD model or a tokenizer, local or
on the hub, --cached_path that of a cache. The card states only what the checkpoint or the cache records.
"""

import dataclasses
import re
import shutil

from models.lpd import LPD, LPD_CONFIGS
from models.vqgan import VQModel
from models.weights import CONFIG, WEIGHTS, find, read_weights, state_digest
from util import cli
from util.files import atomic
from util.token_cache import CACHE_FILES, META, TokenCache, split_cache

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
    parser = cli.Parser(description="Turn a checkpoint or a token cache into a folder for the hub")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights (.pth, .safetensors) or a run folder")
    parser.add_argument("--cached_path", metavar="DIR", help="or a token cache of main_cache.py")
    parser.add_argument("--model", choices=sorted(LPD_CONFIGS), help="size, if the weights do not record it")
    parser.add_argument("--license", help="identifier for the card, e.g. apache-2.0")
    cli.add_output_flags(parser)
    return parser.parse_args(argv)


def table(rows):
    """A Markdown table without a header."""
    cells = [(name, re.sub(r"[|`<>\s]+", " ", str(value))) for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def shown(names):
    """The first of the names of classes."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def facts(model, info):
    """Rows about the weights themselves."""
    size, names = info.get("img_size"), info.get("class_names") or []
    rows = {
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "image": f"{size}x{size} px" if size else None,
        "class names": shown(names),
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


def head(name, license_name):
    """The first lines of a card."""
    return [f"---\nlicense: {license_name}\n---\n"] * bool(license_name) + [f"# {name}\n"]


def card(model, info, name, license_name):
    """The text of the model card; OWNER is to be filled in by whoever uploads the folder."""
    kind, settings, report = type(model), training_settings(info), info.get("report", {})
    size = settings.get("img_size") or report.get("img_size") or 256
    command = COMMANDS[kind].format(place=f"hf://OWNER/{name}", size=size)
    parts = [*head(name, license_name), f"{ABOUT[kind]}\n", table(facts(model, info)), "\n## Training\n"]
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


def cache_card(meta, held_out, name, license_name):
    """The text of the card of a token cache."""
    rows = {
        "images": f"{meta.num_images - len(meta.unreadable):,}, each with its mirror image",
        "held-out images": f"{len(held_out):,}" if held_out else None,
        "image": f"{meta.img_size}x{meta.img_size} px, read as {meta.reading}",
        "tokens": f"{meta.num_tokens} of {meta.vocab_size} codes, encoded in {meta.precision}",
        "tokenizer digest": meta.tokenizer_digest,
        "classes": len(meta.class_names),
        "class names": shown(meta.class_names),
    }
    command = f"main_lpd.py --use_cached --cached_path hf://datasets/OWNER/{name} --vqgan_path TOKENIZER"
    return "\n".join([
        *head(name, license_name),
        "Tokens of images, to train Locality-aware Parallel Decoding (LPD), arXiv 2507.01957.\n",
        table({name: value for name, value in rows.items() if value is not None}), "\n## Use\n",
        "In the repository of the code, which checks that TOKENIZER is the one that made the tokens:\n",
        f"```bash\npython {command} --model lpd_l --output_dir output/lpd\n```\n",
    ])


def export_cache(args, folder):
    """Copy the files of a complete token cache, the description of each part last, and write the card."""
    with cli.checking("--cached_path: "):
        cache = TokenCache(args.cached_path)
        held_out = split_cache(cache, 0)[1]
    for earlier in [path for pattern in reversed(CACHE_FILES) for path in folder.glob(pattern)]:
        earlier.unlink()
    paths = [path for pattern in CACHE_FILES for path in cache.folder.glob(pattern)]
    for path in sorted(paths, key=lambda path: path.name == META):
        with atomic(folder / path.relative_to(cache.folder)) as partial:
            shutil.copyfile(path, partial)
    with atomic(folder / CARD) as partial:
        partial.write_text(cache_card(cache.meta, held_out, folder.resolve().name, args.license))
    print(f"{folder}: {len(paths)} files of {args.cached_path}, {CARD}")


def main(argv=None):
    args = parse_args(argv)
    cli.required(args, "output_dir")
    if bool(args.checkpoint) == bool(args.cached_path):
        raise cli.UsageError("give either --checkpoint or --cached_path")
    if args.license and not re.fullmatch(r"[a-z0-9.-]+", args.license):
        raise cli.UsageError(f"--license {args.license!r} is not an identifier such as apache-2.0")
    folder = cli.prepare_output(args, META if args.cached_path else CONFIG)
    if args.cached_path:
        return export_cache(args, folder)
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
