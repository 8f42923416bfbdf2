"""Draws docs/diagram.svg, the two stages:  python docs/diagram.py"""
from pathlib import Path

TRAINED, FROZEN = "#ffe2b8", "#dfe7f2"
BOXES = [  # x, y, width, height, lines, colour
    (20, 60, 90, 50, ["image x"], "white"),
    (150, 20, 170, 50, ["class-token embedding"], TRAINED),
    (150, 90, 170, 60, ["encoder: DINOv2", "ViT-B/14, frozen"], FROZEN),
    (370, 90, 110, 60, ["token z", "(B,1,768)"], "white"),
    (540, 75, 170, 90, ["decoder: transformer", "velocity v(x_t, t, z)", "flow loss, Eq. 1"], TRAINED),
    (760, 90, 120, 60, ["SD-VAE decoder", "frozen"], FROZEN),
    (920, 95, 90, 50, ["image"], "white"),
    (370, 20, 110, 46, ["1 - cos(z, z0)", "Eq. 3"], "white"),
    (560, 20, 130, 40, ["noise x_0"], "white"),
    (20, 260, 90, 50, ["class or text"], "white"),
    (20, 200, 90, 50, ["noise"], "white"),
    (150, 210, 170, 90, ["Mixer: MLPs only", "velocity v(z_t, t)", "flow loss, Eq. 1"], TRAINED),
    (370, 225, 110, 60, ["new token z", "(B,1,768)"], "white"),
    (540, 225, 170, 60, ["decoder of stage 1", "frozen"], FROZEN),
    (760, 225, 120, 60, ["SD-VAE decoder", "frozen"], FROZEN),
    (920, 230, 90, 50, ["new image"], "white")]
ARROWS = [((110, 90), (150, 115)), ((235, 70), (235, 90)), ((320, 120), (370, 120)), ((480, 120), (540, 120)),
          ((710, 120), (760, 120)), ((880, 120), (920, 120)), ((425, 90), (425, 66)), ((625, 60), (625, 75)),
          ((110, 225), (150, 240)), ((110, 285), (150, 270)), ((320, 255), (370, 255)), ((480, 255), (540, 255)),
          ((710, 255), (760, 255)), ((880, 255), (920, 255))]

def text(x, y, line, anchor="middle", size=13):
    return f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="{size}" text-anchor="{anchor}">{line}</text>'

parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1030 330">',
         '<defs><marker id="tip" markerWidth="9" markerHeight="8" refX="8" refY="4" orient="auto">'
         '<path d="M0,0 L9,4 L0,8 z"/></marker></defs><rect width="1030" height="330" fill="white"/>',
         text(20, 16, "Stage 1: image to token and back. Orange is trained, blue is frozen.", "start", 14),
         text(20, 192, "Stage 2: new tokens from noise", "start", 14)]
for x, y, width, height, lines, colour in BOXES:
    parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{colour}" stroke="black"/>')
    for i, line in enumerate(lines):
        parts.append(text(x + width / 2, y + height / 2 + 5 + 17 * (i - (len(lines) - 1) / 2), line))
for (x1, y1), (x2, y2) in ARROWS:
    parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="black" marker-end="url(#tip)"/>')
Path(__file__).with_suffix(".svg").write_text("\n".join([*parts, "</svg>", ""]))
