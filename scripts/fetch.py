"""Fetch published models into the hub's cache, for machines without a network. There, HF_HUB_OFFLINE=1 saves
the attempt to reach it.

    python scripts/fetch.py lpd_l_256 lpd_l_512
    python scripts/fetch.py hf://owner/repo hf://owner/repo/orders.npy
"""

from engine.published import PUBLISHED, TOKENIZER, WEIGHTS, order_file
from models.weights import ORDER_SUFFIXES, WEIGHT_SUFFIXES, find
from util import cli


def files_of(name):
    """The files on the hub that a name stands for: of a published model, all that evaluating it reads."""
    if name not in PUBLISHED:
        return [name]
    orders = (order_file(PUBLISHED[name], steps) for steps in PUBLISHED[name].guidance)
    return [WEIGHTS.format(name), TOKENIZER, *orders]


def main(argv=None):
    parser = cli.Parser(description="Fetch published models into the hub's cache")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(PUBLISHED)}, or hf://...")
    args = parser.parse_args(argv)
    for file in (file for name in args.names for file in files_of(name)):
        with cli.checking():
            print(find(file, WEIGHT_SUFFIXES + ORDER_SUFFIXES), flush=True)


if __name__ == "__main__":
    cli.run(main)
