"""Draws docs/diagram.svg, the two stages and sampling:  python docs/diagram.py"""
from pathlib import Path

TRAINED = "#ffe2b8"
FROZEN = "#dfe7f2"
DATA = "white"
LOSS = "#e3f1dc"

# Each box: x, y of its upper left corner, width, height, lines of text, colour.
BOXES = [
    # Stage 1: from the image to the token and the latents, then the flow loss.
    (20, 100, 80, 44, ["image x"], DATA),
    (140, 40, 180, 36, ["class-token embedding"], TRAINED),
    (140, 96, 180, 52, ["encoder: DINOv2", "ViT-B/14"], FROZEN),
    (140, 172, 180, 40, ["SD-VAE encoder"], FROZEN),
    (370, 96, 110, 52, ["token z", "(B,1,768)"], DATA),
    (370, 40, 110, 36, ["1 - cos(z, z0)"], LOSS),
    (370, 172, 110, 40, ["latents"], DATA),
    (530, 166, 180, 52, ["x_t =", "(1-t) noise + t latents"], DATA),
    (530, 90, 180, 60, ["decoder: transformer", "velocity v(x_t, t, z)"], TRAINED),
    (760, 90, 230, 60, ["flow loss (Eq. 1): mean of", "(v - (latents - noise))²"], LOSS),

    # Stage 2: the same flow, of tokens.
    (20, 290, 80, 44, ["image x"], DATA),
    (140, 286, 180, 52, ["encoder of stage 1"], FROZEN),
    (370, 286, 110, 52, ["token z"], DATA),
    (530, 286, 180, 52, ["z_t = (1-t) noise + t z"], DATA),
    (760, 286, 230, 52, ["Mixer: velocity v(z_t, t, class)", "flow loss (Eq. 1)"], TRAINED),
    (370, 352, 110, 36, ["class or text"], DATA),

    # Sampling.
    (20, 434, 80, 44, ["noise"], DATA),
    (140, 430, 180, 52, ["Mixer, Euler steps", "with guidance"], FROZEN),
    (370, 430, 110, 52, ["new token z"], DATA),
    (530, 430, 180, 52, ["decoder, Euler steps"], FROZEN),
    (760, 430, 120, 52, ["SD-VAE decoder"], FROZEN),
    (910, 434, 80, 44, ["new image"], DATA)]

# Each arrow: from (x, y), to (x, y).
ARROWS = [
    # Stage 1.
    ((100, 122), (140, 122)),
    ((100, 140), (140, 184)),
    ((230, 76), (230, 96)),
    ((320, 122), (370, 122)),
    ((425, 96), (425, 76)),
    ((320, 192), (370, 192)),
    ((480, 122), (530, 122)),
    ((480, 192), (530, 192)),
    ((620, 166), (620, 150)),
    ((710, 120), (760, 120)),

    # Stage 2.
    ((100, 312), (140, 312)),
    ((320, 312), (370, 312)),
    ((480, 312), (530, 312)),
    ((710, 312), (760, 312)),
    ((480, 370), (790, 338)),

    # Sampling.
    ((100, 456), (140, 456)),
    ((320, 456), (370, 456)),
    ((480, 456), (530, 456)),
    ((710, 456), (760, 456)),
    ((880, 456), (910, 456))]

# Each title: y, its text.
TITLES = [
    (20, "Stage 1 trains (orange) the class-token embedding and the decoder. "
         "Blue is frozen, green is a loss."),
    (270, "Stage 2 trains the Mixer to generate tokens"),
    (416, "Sampling: a class or a text, and noise, become an image")]

# The white ground, and the tip that every arrow ends with.
START = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1010 500">\n'
    '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
    '<path d="M0,0 L9,4 L0,8 z"/></marker></defs>'
    '<rect width="1010" height="500" fill="white"/>')


def text(x, y, line, anchor="middle", size=13):
    """A line of text; (x, y) is the middle of its base line, or its start."""
    return (f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="{size}" '
            f'text-anchor="{anchor}">{line}</text>')


def box(x, y, width, height, lines, colour):
    """A box with its lines of text in the middle, 17 from one to the next."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" '
             f'fill="{colour}" stroke="black"/>']
    for i, line in enumerate(lines):
        below = 17 * (i - (len(lines) - 1) / 2)
        # A base line lies 5 below the middle of its letters.
        parts.append(text(x + width / 2, y + height / 2 + 5 + below, line))
    return parts


def arrow(start, end):
    """An arrow from one point to another."""
    x1, y1 = start
    x2, y2 = end
    return (f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" '
            'stroke="black" marker-end="url(#tip)"/>')


def main():
    parts = [START]
    for y, title in TITLES:
        parts.append(text(20, y, title, "start", 14))
    for place in BOXES:
        parts += box(*place)
    for start, end in ARROWS:
        parts.append(arrow(start, end))
    parts.append("</svg>\n")
    Path(__file__).with_suffix(".svg").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
