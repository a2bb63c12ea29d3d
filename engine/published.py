"""The published models by name: where their weights are, and the settings of the published table (arXiv
2507.01957, tables 1 and 2)."""

import os
from dataclasses import dataclass
from pathlib import Path

from models.lpd import LPD_CONFIGS

WEIGHTS = "hf://mit-han-lab/{}"
ORDERS = "hf://mit-han-lab/lpd_orders/res{}_steps{}_repulsion{}.json"
TOKENIZER = "hf://FoundationVision/LlamaGen/vq_ds16_c2i.pt"
LOCAL_TOKENIZER = Path(__file__).resolve().parents[1] / "tokenizers" / "vq_ds16_c2i.pt"


@dataclass(frozen=True)
class Published:
    """A key of LPD_CONFIGS, pixels, the guidance scale by number of steps, the usual number first, and the
    repulsion threshold of the orders."""

    size: str
    img_size: int
    guidance: dict
    repulsion: int

    def flags(self, name, steps=None):
        """Flag -> value, to generate in `steps`, with the scale of the nearest number that was published."""
        steps = steps or next(iter(self.guidance))
        nearest = min(self.guidance, key=lambda known: abs(known - steps))
        return {
            "pretrained_ckpt": WEIGHTS.format(name),
            "vqgan_path": str(LOCAL_TOKENIZER) if LOCAL_TOKENIZER.exists() else TOKENIZER,
            "img_size": self.img_size, "generation_steps": steps, "cfg": self.guidance[nearest],
            "repulsion_threshold": self.repulsion,
        }


PUBLISHED = {
    "lpd_l_256": Published("lpd_l", 256, {20: 4.8, 32: 5.4}, 2),
    "lpd_xl_256": Published("lpd_xl", 256, {20: 4.9, 32: 5.0}, 2),
    "lpd_xxl_256": Published("lpd_xxl", 256, {20: 5.9}, 3),
    "lpd_l_512": Published("lpd_l", 512, {48: 7.3}, 4),
    "lpd_xl_512": Published("lpd_xl", 512, {48: 6.0}, 4),
}
MODELS = (*LPD_CONFIGS, *PUBLISHED)  # what --model may be


def order_file(model, steps):
    """The name on the hub of the 60,000 orders of a Published model in a number of steps."""
    return ORDERS.format(model.img_size, steps, model.repulsion)


def parse(parser, argv):
    """The flags of a program that takes MODELS. A published name becomes its size, and gives values to the
    flags that the program has and that were not given; a line says which."""
    args = parser.parse_args(argv)
    if args.model not in PUBLISHED:
        return args
    name, model = args.model, PUBLISHED[args.model]
    sizes = getattr(args, "group_sizes", None)
    steps = len(sizes) if sizes else getattr(args, "generation_steps", None)
    defaults = {flag: value for flag, value in model.flags(name, steps).items() if hasattr(args, flag)}
    parser.set_defaults(**defaults)
    given, args = args, parser.parse_args(argv)
    changed = (flag for flag in defaults if getattr(args, flag) != getattr(given, flag))
    used = (f"--{flag} {getattr(args, flag)}" for flag in changed)
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {' '.join(used)}", flush=True)
    args.model = model.size
    return args
