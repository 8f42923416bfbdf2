"""The table of findings in docs/experiments.md: train and score its rows, with several seeds.

    python -m docs.experiment --seeds 0 1 2              # in the folder of the repository
    python -m docs.experiment --seeds 0 --rows frozen demo

All rows have the demo's own setting and docs/encoder.pt, and differ in the options below. Each is
both stages. The command resumes: what FOLDER/rows.jsonl holds is not done again, a row that was
stopped goes on, and processes with different seeds may share a folder. It prints the table and each
row's difference to the demo, seed by seed, and writes the plot FOLDER/rows.png and
FOLDER/rows_shapes.png: held-out shapes, then every row's drawing."""

import colorsys
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import sample
from docs.lesson import save_rows
from docs.score import HELD_OUT, READER, Judge, measure, shapes
from sample import RepTok
from train_stage1 import SHAPES

ROOT = Path(sample.__file__).parent
ENCODER = ROOT / "docs" / "encoder.pt"
ROWS = {  # {row: options of train_stage1.py}
    "frozen": "--unfreeze none",
    "lambda-0": "--lam 0",
    "lambda-0.01": "--lam 0.01",
    "lambda-0.03": "--lam 0.03",
    "demo": "",  # one embedding, lambda 0.1
    "lambda-1": "--lam 1",
    "everything": "--unfreeze all",
    # At the demo's learning rate, 0.005, an encoder that nothing holds learns badly.
    "everything-lambda-0": "--unfreeze all --lam 0 --lr 0.001 --token-lr 100",
    "random": "--encoder random --lr 0.001 --token-lr 100",  # trains everything, lambda 0
    "register-frozen": "--token reg --unfreeze none",
    "register": "--token reg",
    "both-tokens": "--token all",
}
# The columns in which a row is compared with the demo, seed by seed.
COMPARED = [
    "PSNR from z",
    "neighbours by z, %",
    "reconstructed, read right, %",
    "generated, read right, %",
    "generated of reconstructed, %",
]


def experiment(folder, seeds, names, options=("", "")):
    """Train and score the rows with every seed, then print the table. options: more ones, for every
    training of stage 1 and of stage 2."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    judge = Judge(shapes(5500, READER)[:2], shapes(1000, HELD_OUT)[:2])
    for seed in seeds:
        for name in names:
            if (name, seed) in [(row["row"], row["seed"]) for row in read_rows(path)]:
                continue
            out = ["--out", str(folder / f"{name}-{seed}"), "--seed", str(seed)]
            first = ["--encoder", str(ENCODER), *ROWS[name].split(), *options[0].split()]
            run("train_stage1.py", *out, *first)
            run("train_stage2.py", *out, *options[1].split())
            model = RepTok.load(folder / f"{name}-{seed}" / "stage2.pt")
            scores = measure(model, judge, per_class=64)
            share = scores["generated, read right, %"] / scores["reconstructed, read right, %"]
            scores["generated of reconstructed, %"] = 100 * share
            with open(path, "a") as file:
                file.write(json.dumps({"row": name, "seed": seed, **scores}) + "\n")

    # In the order of the table above.
    order = list(ROWS)
    rows = sorted(read_rows(path), key=lambda row: (order.index(row["row"]), row["seed"]))
    print_table(rows)
    plot(path.with_suffix(".png"), rows, "neighbours by z, %", "PSNR from z", unit=", dB")
    shown = judge.real[:20]
    drawings = {"held-out picture": shown}
    for row in rows:
        # Of every row the network with the first of its seeds.
        if row["row"] in drawings:
            continue
        model = RepTok.load(folder / f"{row['row']}-{row['seed']}" / "stage2.pt")
        drawings[row["row"]] = model.decode(model.encode(shown), steps=20)
    save_rows(folder / "rows_shapes.png", drawings, first=1)


def run(script, *args):
    """A script of the project as a process. Raises where it fails."""
    subprocess.run([sys.executable, str(ROOT / script), *args], check=True)


def read_rows(path):
    """The rows that are done, dicts."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def print_table(rows):
    """Two tables: of every row mean and standard deviation over its seeds, then of its differences
    to the demo with the same seed."""
    by_row = {name: {} for name in ROWS}
    for row in rows:
        by_row[row["row"]][row["seed"]] = row

    columns = [
        "row",
        "seeds",
        "PSNR from z, dB",
        "from z0",
        "cos(z, z0)",
        "neighbours by z; by z0, %",
        "reconstructed, read right; worst class, %",
        "generated, read right; worst class, %",
        "share, %",
    ]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, seeds in by_row.items():
        if not seeds:
            continue

        def cell(key, digits=1):
            return spread([row[key] for row in seeds.values()], digits)

        def worst(key):
            each = np.mean([row[key] for row in seeds.values()], axis=0)
            return f"{SHAPES[each.argmin()]} {each.min():.0f}"

        cells = [
            name,
            str(len(seeds)),
            cell("PSNR from z", 2),
            cell("PSNR from z0", 2),
            cell("cos(z, z0)", 3),
            f"{cell('neighbours by z, %')}; {cell('neighbours by z0, %')}",
            f"{cell('reconstructed, read right, %')}; {worst('each reconstructed')}",
            f"{cell('generated, read right, %')}; {worst('each generated')}",
            cell("generated of reconstructed, %"),
        ]
        print(f"| {' | '.join(cells)} |")

    demo = by_row["demo"]
    print(f"\n| row minus demo | seeds | {' | '.join(COMPARED)} |\n|{'---|' * (2 + len(COMPARED))}")
    for name, seeds in by_row.items():
        both = sorted(seeds.keys() & demo.keys())
        if name == "demo" or not both:
            continue
        cells = [name, str(len(both))]
        for column in COMPARED:
            differences = [seeds[seed][column] - demo[seed][column] for seed in both]
            cells.append(spread(differences, 2 if column == "PSNR from z" else 1))
        print(f"| {' | '.join(cells)} |")


def spread(values, digits):
    """ "mean ± standard deviation" of numbers; of one alone, or where all are equal, itself."""
    # z: a mean that rounds to 0 has no sign.
    mean = f"{np.mean(values):z.{digits}f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def plot(path, rows, x, y, unit=""):
    """A PNG: a dot for every row and seed at the values named `x` and `y`, a colour for every
    row. unit: what is written behind `y`."""
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
    draw.text((66, 16), y + unit, "black", font, "ls")

    for i, name in enumerate(names):
        # Neighbours in the list differ in brightness, too.
        light = (0.45, 0.95)[i % 2]
        colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(i / len(names), 0.9, light))
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
    p.add(
        "--seeds",
        [0, 1, 2],
        "a training of every row for each; processes may share the work",
        nargs="+",
        type=sample.whole(0),
    )
    p.add("--rows", [*ROWS], "the rows to train", nargs="+", choices=[*ROWS], metavar="ROW")
    p.add("--out", "experiments", "folder of its networks, table and pictures")
    return p.parse_args()


def main():
    """Make the table of the command line."""
    args = options()
    experiment(args.out, args.seeds, args.rows)


if __name__ == "__main__":
    sample.guarded(main)
