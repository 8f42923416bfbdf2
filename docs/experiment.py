"""Tables of docs/experiments.md: train and score their rows, with several seeds.

    python -m docs.experiment token --seeds 0 1 2        # in the folder of the repository

All rows have the demo's own setting and docs/encoder.pt, and differ in the options below. The
command resumes: what FOLDER/NAME.jsonl holds is not done again, a row that was stopped goes on, and
processes with different seeds may share a folder. It writes the plot FOLDER/NAME.png and
FOLDER/NAME_shapes.png: held-out shapes, then every row's drawing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import colorsys
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sample
from docs.score import HELD_OUT, READER, Judge, measure, shapes
from sample import RepTok

ROOT = Path(sample.__file__).parent
ENCODER = ROOT / "docs" / "encoder.pt"
EXPERIMENTS = {  # {name: {row: options of train_stage1.py}}
    "token": {
        "nothing": "--unfreeze none",
        "class-token embedding": "",
        "everything": "--unfreeze all",
    },
}


def experiment(name, folder, seeds, options=""):
    """Train and score the rows of a table with every seed, then print it. `options` go to every
    training."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    judge = Judge(shapes(5500, READER)[:2], shapes(1000, HELD_OUT)[:2])
    for seed in seeds:
        for row, own in EXPERIMENTS[name].items():
            if (row, seed) in [(done["row"], done["seed"]) for done in read_rows(path)]:
                continue
            checkpoint = place(folder, row, seed)
            line = [sys.executable, str(ROOT / "train_stage1.py"), "--encoder", str(ENCODER)]
            line += ["--out", str(checkpoint.parent), "--seed", str(seed)]
            subprocess.run([*line, *own.split(), *options.split()], check=True)
            scores = measure(RepTok.load(checkpoint), judge)
            with open(path, "a") as file:
                file.write(json.dumps({"row": row, "seed": seed, **scores}) + "\n")

    rows = read_rows(path)
    print_table(name, rows)
    plot(path.with_suffix(".png"), rows, "neighbours by z, %", "PSNR from z")
    shown = judge.real[:20]
    drawings = [shown]
    for row in EXPERIMENTS[name]:
        model = RepTok.load(place(folder, row, seeds[0]))
        drawings.append(model.decode(model.encode(shown), steps=20))
    sample.save_grid(folder / f"{name}_shapes.png", drawings)


def place(folder, row, seed):
    """The checkpoint of a row and seed."""
    return folder / f"{re.sub('[^a-z0-9]+', '-', row)}-{seed}" / "stage1.pt"


def read_rows(path):
    """The rows that are done, dicts."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_table(name, rows):
    """Mean and standard deviation over the seeds of every row and column."""
    columns = [key for key, value in rows[0].items() if isinstance(value, float)]
    print(f"\n| {name} | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
    for row in dict.fromkeys(done["row"] for done in rows):
        cells = []
        for column in columns:
            values = [done[column] for done in rows if done["row"] == row]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0
            cells.append(f"{np.mean(values):.2f} ± {spread:.2f}")
        print(f"| {row} | {' | '.join(cells)} |")


def plot(path, rows, x, y):
    """A PNG: a dot for every row and seed at the values named `x` and `y`, a colour for every
    row."""
    names = list(dict.fromkeys(row["row"] for row in rows))
    picture = Image.new("RGB", (900, 560), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(16)
    low = {key: min(row[key] for row in rows) for key in (x, y)}
    span = {key: max(1e-9, max(row[key] for row in rows) - low[key]) for key in (x, y)}

    draw.rectangle((60, 20, 640, 500), outline="grey")
    for key in (x, y):
        sizes = [m * 10.0**e for e in range(-3, 5) for m in (1, 2, 5)]
        tick = min(size for size in sizes if span[key] <= 6 * size)
        for k in range(math.ceil(low[key] / tick), math.floor((low[key] + span[key]) / tick) + 1):
            share = (k * tick - low[key]) / span[key]
            if key == x:
                draw.text((80 + 540 * share, 508), f"{k * tick:g}", "black", font, "ma")
            else:
                draw.text((54, 480 - 440 * share), f"{k * tick:g}", "black", font, "rm")
    draw.text((350, 548), x, "black", font, "ms")
    draw.text((66, 16), y, "black", font, "ls")

    for i, name in enumerate(names):
        colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / len(names), 0.9, 0.75))
        draw.ellipse((660, 40 + 30 * i, 672, 52 + 30 * i), fill=colour)
        draw.text((682, 46 + 30 * i), name, "black", font, "lm")
        for row in rows:
            if row["row"] == name:
                px = 80 + 540 * (row[x] - low[x]) / span[x]
                py = 480 - 440 * (row[y] - low[y]) / span[y]
                draw.ellipse((px - 6, py - 6, px + 6, py + 6), fill=colour)
    picture.save(path)


def options():
    """The command line."""
    p = sample.Parser(__doc__)
    p.add_argument("name", choices=[*EXPERIMENTS], help="the table")
    p.add(
        "--seeds",
        [0, 1, 2],
        "a training of every row for each; processes may share the work",
        nargs="+",
        type=sample.whole(0),
    )
    p.add("--out", "experiments", "folder of its networks, table and pictures")
    return p.parse_args()


def main():
    """Make the table of the command line."""
    args = options()
    experiment(args.name, args.out, args.seeds)


if __name__ == "__main__":
    sample.guarded(main)
