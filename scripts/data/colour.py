"""Photos, drawings and emoji -> 64x64 crops to train a tokenizer on; scripts/data/colour.sh fetches them."""

from util import cli  # isort: skip
import random
from pathlib import Path

from PIL import Image
from tqdm import tqdm

SIZE, LARGEST = 64, 1600  # pixels of a crop, and of the picture that it is taken from
HELD_OUT = 20  # one picture in so many, with all its crops
Image.MAX_IMAGE_PIXELS = None  # drawings made for print, which are left out
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")  # the same emoji five times more
PHOTOS = (
    "lomiri*/usr/share/backgrounds/*.jpg", "ukui*/usr/share/backgrounds/*.*g", "stdlib*/**/image.jpg",
    "scikit_learn/sklearn/datasets/images/*.jpg",
    *(f"scikit_image/skimage/data/{name}.*" for name in (
        "astronaut", "chelsea", "coffee", "hubble_deep_field", "rocket",
    )),
)
DRAWINGS = tuple(f"openclipart-png/usr/share/openclipart/png/{subject}/**/*.png" for subject in (
    "animals", "buildings", "electronics", "food", "geography", "office", "people", "plants", "recreation",
    "signs_and_symbols", "special", "tools", "transportation",
))
KINDS = {  # places; crops of a picture; their share that is all of it; the least side of others, as a share
    "photo": (PHOTOS, 240, 0.05, 0.05),
    "drawing": (DRAWINGS, 1, 0.6, 0.4),
    "emoji": (("lobehub*/**/*.webp",), 3, 0.6, 0.3),
}


def on_background(image, rng):
    """RGB: a transparent picture on white (half of the time), black, or a colour."""
    colour = rng.choice(["white", "white", "black", tuple(rng.randrange(256) for _ in range(3))])
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def crop(image, whole, least, rng):
    """A 64x64 picture: with probability `whole` all of an image in a square, or a square part of it."""
    shorter, side = sorted(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if rng.random() >= whole:
        side = round(shorter * min(1.0, max(SIZE / shorter, least)) ** rng.random())
        left, top = rng.randint(0, image.width - side), rng.randint(0, image.height - side)
    part = image.crop((left, top, left + side, top + side))  # transparent outside
    return on_background(part.resize((SIZE, SIZE), Image.Resampling.LANCZOS, reducing_gap=2), rng)


def write_crops(name, paths, output):
    """Write `output`/train/<name>/*.png and `output`/val/<name>/*.png, the same for the same pictures."""
    _, crops, whole, least = KINDS[name]
    for part in ("train", "val"):
        (output / part / name).mkdir(parents=True, exist_ok=True)
    for i, path in enumerate(tqdm(paths, desc=name, unit="img", mininterval=1)):
        rng, part = random.Random(f"{name}{i}"), "train" if i % HELD_OUT else "val"
        with Image.open(path) as image:
            if name == "drawing" and image.width * image.height > 2**21:
                continue
            image.thumbnail((LARGEST, LARGEST))
            image = image.convert("RGBA")
        for k in range(crops):
            crop(image, whole, least, rng).save(output / part / name / f"{i:05d}_{k:03d}.png")


def main(argv=None):
    parser = cli.Parser(description="64x64 crops of photos, drawings and emoji")
    parser.add_argument("sources", type=Path, metavar="SOURCES", help="what scripts/data/colour.sh fetched")
    parser.add_argument("output", type=Path, metavar="DIR", help="gets train/<kind>/*.png and val/...")
    args = parser.parse_args(argv)
    for name, (places, *_) in KINDS.items():
        paths = sorted(path for place in places for path in args.sources.glob(place))
        if not paths:
            raise cli.Failure(f"{args.sources}: no {name}s; scripts/data/colour.sh fetches them")
        kept = [path for path in paths if not any(tone in path.stem for tone in SKIN_TONES)]
        write_crops(name, kept, args.output)


if __name__ == "__main__":
    cli.run(main)
