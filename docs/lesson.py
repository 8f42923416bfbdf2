"""The picture at the top of the README: what tuning the token brings, then generated shapes.

python -m docs.lesson out/stage2.pt      # in the folder of the repository; writes lesson.png
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import sample
from fid import to_uint8
from sample import RepTok, to_float
from train_stage1 import SHAPES, draw_shape, plan_shape

COLUMNS = 16
SIDE = 48  # of each small picture, on paper
MARGIN = 150  # for the words on the left
GAP = 12  # after the first rows


def held_out(count, seed=1):
    """Images (count,3,16,16) in [-1,1] that no training with seed 0 has seen, class after class."""
    plans = [plan_shape(i, seed) for i in range(40 * count)]
    chosen = [
        next(plan for plan in plans[40 * n :] if plan.shape == SHAPES[n % 10]) for n in range(count)
    ]
    shapes = np.stack([draw_shape(plan, 16) for plan in chosen])  # (count,16,16,3)
    return to_float(torch.from_numpy(shapes).permute(0, 3, 1, 2))


def options():
    """The command line."""
    p = sample.Parser(__doc__)
    p.add_argument("ckpt", help="a stage-2 checkpoint of the demo")
    p.add("--out", "lesson.png", "the picture; that of the README is docs/shapes.png")
    return p.parse_args()


def main():
    """Write the picture of the checkpoint of the command line."""
    args = options()
    model = RepTok.load(args.ckpt)
    shown = held_out(COLUMNS)
    labels = torch.arange(10).repeat_interleave(COLUMNS)
    noise = model.noise(range(len(labels)))
    generated = model.decode(model.generate(labels), steps=20, noise=noise)

    rows = {
        "held-out picture": shown,
        "from untuned token z0": model.decode(model.tokenizer.z0(shown), steps=20),
        "from tuned token z": model.decode(model.encode(shown), steps=20),
    }
    for name, images in zip(SHAPES, generated.split(COLUMNS)):
        rows[f"generated {name}"] = images

    save_rows(args.out, rows, first=3)
    print(args.out)


def save_rows(path, rows, first):
    """A PNG of rows {what they are: images (N,3,16,16)}, with a gap after the `first` of them."""
    columns = max(len(images) for images in rows.values())
    paper = Image.new("RGB", (MARGIN + columns * SIDE, len(rows) * SIDE + GAP), "white")
    write = ImageDraw.Draw(paper)
    font = ImageFont.load_default(13)
    for i, (label, images) in enumerate(rows.items()):
        top = i * SIDE + (GAP if i >= first else 0)
        write.text((MARGIN - 8, top + SIDE // 2), label, "black", font, anchor="rm")
        for n, x in enumerate(to_uint8(images)):
            small = Image.fromarray(x.permute(1, 2, 0).numpy())
            large = small.resize((SIDE, SIDE), Image.Resampling.NEAREST)
            paper.paste(large, (MARGIN + n * SIDE, top))
    paper.save(path)


if __name__ == "__main__":
    sample.guarded(main)
