"""The pictures of docs/tour.md, made again.

python -m docs.tour out/stage2.pt        # in the folder of the repository
"""

import contextlib
import re
import shutil
import tempfile
from pathlib import Path

import sample
from sample import RepTok

DOCS = Path(__file__).parent


def tour(folder):
    """Run the blocks of docs/tour.md in order, in `folder`, where out/stage2.pt is and their
    pictures will be.

    Returns how many there are."""
    text = (DOCS / "tour.md").read_text()
    blocks = re.findall(r"<!-- tour -->\n```python\n(.*?)```", text, re.S)
    names = {}
    with contextlib.chdir(folder):
        for block in blocks:
            exec(block, names)
    return len(blocks)


def options():
    """The command line."""
    p = sample.Parser(__doc__)
    p.add_argument("ckpt", help="a stage-2 checkpoint of the demo")
    return p.parse_args()


def main():
    """Run the tour on the checkpoint of the command line and copy its pictures into docs/."""
    args = options()
    RepTok.load(args.ckpt)  # refuses what is none
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "out").mkdir()
        shutil.copy(args.ckpt, Path(folder, "out", "stage2.pt"))
        tour(folder)
        for path in Path(folder).glob("tour_*.png"):
            shutil.copy(path, DOCS)


if __name__ == "__main__":
    sample.guarded(main)
