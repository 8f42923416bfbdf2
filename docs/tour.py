"""The pictures of docs/tour.md, made again.

python -m docs.tour        # in the folder of the repository; writes docs/tour_1.png to tour_10.png
"""

import contextlib
import re
import shutil
import tempfile
from pathlib import Path

import sample

DOCS = Path(__file__).parent


def tour(folder):
    """Run the blocks of docs/tour.md in order, in `folder`, where docs/shapes.pt is and their
    pictures will be.

    Returns how many there are."""
    text = (DOCS / "tour.md").read_text()
    blocks = re.findall(r"<!-- tour -->\n```python\n(.*?)```", text, re.S)
    names = {}
    with contextlib.chdir(folder):
        for block in blocks:
            exec(block, names)
    return len(blocks)


def main():
    """Run the tour in a temporary folder and copy its pictures into docs/."""
    # There are no options; others are refused.
    sample.Parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "docs").mkdir()
        shutil.copy(DOCS / "shapes.pt", Path(folder, "docs"))
        tour(folder)
        for path in Path(folder).glob("tour_*.png"):
            shutil.copy(path, DOCS)


if __name__ == "__main__":
    sample.guarded(main)
