"""Scores of trained models: what the token keeps, and whether pictures show what they should.

    python -m docs.score out/stage2.pt                       # in the folder of the repository
    python -m docs.score out/stage1.pt --decoder-steps 1 2 5 10 20 50     # scored each
    python -m docs.score out/stage2.pt --steps 1 2 5 10 20 50 --cfg 1 1.5 2.5
    python -m docs.score hand/stage2.pt --pictures train held
    python -m docs.score words/stage2.pt   # by its prompts
    python -m docs.score --write REAL --num 5000    # held-out shapes as files, for fid.py
    python -m docs.score --write few --num 250 --seed 0    # the first of the demo's training shapes

Held-out shapes are compared with what is drawn from z (the tuned token) and from z0 (the untuned
one), and read by a small network that has learnt from other shapes and has never seen a model's
picture. Letters: N pictures, B a batch of them."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import fid
import sample
import train_stage1 as one
from sample import RepTok

# Seeds of shapes that no training takes: one to learn reading from, one to hold out.
READER = 1_000_001
HELD_OUT = 1_000_002


def shapes(count, seed):
    """The default data: uint8 pictures (count,3,16,16), labels (count,), plans."""
    plans = [one.plan_shape(i, seed) for i in range(count)]
    pictures = np.stack([one.draw_shape(plan, 16) for plan in plans])  # (N,16,16,3)
    labels = torch.tensor([one.SHAPES.index(plan.shape) for plan in plans])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2), labels, plans


def train_reader(pictures, labels, steps=1200, batch=64):
    """Train a small convolutional network on uint8 pictures (N,3,16,16) and labels (N,).

    Returns read(images (B,3,16,16) in [-1,1]) -> (classes (B,), features (B,128))."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    # In one thread, or the reader, and with it every score, would depend on the machine.
    torch.set_num_threads(1)

    layers = []
    for before, after in ((3, 32), (32, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        if before == after:
            layers.append(nn.MaxPool2d(2))
    # Pictures of 16x16 have come to 4x4 already; larger ones are brought to it.
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU()]
    body = nn.Sequential(*layers)
    head = nn.Linear(128, int(labels.max()) + 1)
    reader = nn.Sequential(body, head)

    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        i = torch.randint(len(pictures), (batch,))
        loss = F.cross_entropy(reader(sample.to_float(pictures[i])), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    reader.eval()
    torch.set_num_threads(threads)

    @torch.no_grad()
    def read(images):
        features = torch.cat([body(part) for part in images.split(500)])
        return head(features).argmax(1), features

    return read


class Judge:
    """Scores of images (B,3,16,16) in [-1,1].

    known, held_out: (uint8 pictures, labels) to learn reading from, and to hold against. No model
    has seen them. steps: of the reader's training."""

    def __init__(self, known, held_out, steps=1200):
        self.read = train_reader(*known, steps)
        self.known = sample.to_float(known[0])
        self.known_labels = known[1]
        self.real = sample.to_float(held_out[0])
        self.labels = held_out[1]

    def right(self, images, labels):
        """Percentages that are read as their labels: of all images, and a list of each class's."""
        hit = 100 * (self.read(images)[0] == labels).double()
        return hit.mean().item(), [hit[labels == k].mean().item() for k in labels.unique()]

    def distance(self, images):
        """Frechet distance of the reader's features to those of the held-out pictures."""
        sides = []
        for x in (self.real, images):
            statistics = fid.Statistics(128)
            statistics.update(self.read(x)[1])
            sides += [statistics.mu, statistics.cov]
        return fid.frechet_distance(*sides)

    def psnr(self, images):
        """Mean over the held-out pictures, in dB."""
        return fid.psnr(fid.to_uint8(self.real), fid.to_uint8(images)).mean().item()

    def neighbours(self, encode):
        """Percentage of held-out pictures whose nearest known one, by the cosine of tokens, has
        their label."""

        def directions(images):
            tokens = torch.cat([encode(part) for part in images.split(500)])
            return F.normalize(tokens.flatten(1), dim=1)  # (N,K*D)

        nearest = (directions(self.real) @ directions(self.known).T).argmax(1)
        return 100 * (self.known_labels[nearest] == self.labels).float().mean().item()


def measure(model, judge, decoder_steps=20, steps=50, cfg=1.5, interval=(0.3, 0.9), per_class=0):
    """All scores of one model as a dict; those of `per_class` generated pictures a class where it
    is not 0. steps: Euler steps of the Mixer."""
    z = model.encode(judge.real)  # (N,K,D)
    z0 = model.tokenizer.z0(judge.real)  # (N,K,D)
    images = model.decode(z, decoder_steps)
    drawn, each_drawn = judge.right(images, judge.labels)
    scores = {
        "PSNR from z": judge.psnr(images),
        "PSNR from z0": judge.psnr(model.decode(z0, decoder_steps)),
        "neighbours by z, %": judge.neighbours(model.encode),
        "neighbours by z0, %": judge.neighbours(model.tokenizer.z0),
        "cos(z, z0)": F.cosine_similarity(z, z0, dim=-1).mean().item(),
        "reconstructed, read right, %": drawn,
        "worst class, %": min(each_drawn),
        "distance": judge.distance(images),
        "each reconstructed": each_drawn,
    }
    if per_class:
        labels = torch.arange(model.mixer.num_classes).repeat_interleave(per_class)
        images = model.decode(model.generate(labels, steps, cfg, interval), decoder_steps)
        new, each_new = judge.right(images, labels)
        scores["generated, read right, %"] = new
        scores["worst generated, %"] = min(each_new)
        scores["generated distance"] = judge.distance(images)
        scores["each generated"] = each_new
    return scores


def score(paths, judge, names, args):
    """Print the scores of every checkpoint, numbers of steps and guidance scale."""
    real = judge.right(judge.real, judge.labels)[0]
    print(f"{len(judge.real)} held-out pictures, {real:.1f} % of them read right")
    for path in paths:
        model = RepTok.load(path)
        per_class = args.per_class if model.mixer else 0
        # A model of stage 1 has no Mixer, whose steps and guidance would differ.
        mixing = list(itertools.product(args.steps, args.cfg)) if model.mixer else [(0, 0)]
        for decoder_steps, (steps, cfg) in itertools.product(args.decoder_steps, mixing):
            scores = measure(
                model, judge, decoder_steps, steps, cfg, args.cfg_interval, per_class
            )
            how = f"{decoder_steps} decoder steps"
            if model.mixer:
                how += f", {steps} steps of the Mixer, guidance {cfg:g}"
            print(f"\n{path}, {how}:")
            for what, value in scores.items():
                if isinstance(value, list):
                    each = [f"{name} {share:.0f}" for name, share in zip(names, value)]
                    print(f"  {what}, %: {', '.join(each)}")
                else:
                    digits = 3 if "cos" in what else 2
                    print(f"  {what}: {value:.{digits}f}")


def ink_and_area(picture):
    """What a uint8 picture (3,S,S) of one shape shows: rgb of ink and of ground, each (3,), and the
    ink's area in pixels.

    The ground is the median of the border, the ink the median of the pixels that are farthest from
    it in colour. A pixel counts to the area by how far its colour has come from the ground to the
    ink."""
    pixels = picture.permute(1, 2, 0).double().numpy()  # (S,S,3)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, 0)
    far = np.abs(pixels - ground).sum(-1)  # (S,S)
    ink = np.median(pixels[far > 0.6 * far.max()], 0)
    share = (pixels - ground) @ (ink - ground) / np.square(ink - ground).sum()
    return ink, ground, share.clip(0, 1).sum()


def score_prompts(model, count=320, cfg=3.0):
    """Print how many of `count` prompts show the named shape, ink, ground and size; the same for
    real pictures.

    "small" is right where the shape's area is below that of the same shape drawn at middle size,
    "large" where it is above."""
    read = train_reader(*shapes(5500, READER)[:2])
    real, labels, plans = shapes(count, HELD_OUT)
    prompts = [plan.captions[i % len(plan.captions)] for i, plan in enumerate(plans)]
    text, mask = model.prompts(prompts)
    z = model.generate(steps=50, cfg=cfg, cfg_interval=(0.3, 0.9), text=text, mask=mask)
    made = fid.to_uint8(model.decode(z, 20))

    middle = {}
    for shape in one.SHAPES:
        plan = dataclasses.replace(
            plans[0], shape=shape, size=sum(one.RADII) / 2, place=np.zeros(2), turn=0
        )
        drawn = torch.from_numpy(one.draw_shape(plan, 16)).permute(2, 0, 1)
        middle[shape] = ink_and_area(drawn)[2]

    for name, pictures in (
        ("real pictures of the prompts", real),
        (f"generated, guidance {cfg:g}", made),
    ):
        shape_right = read(sample.to_float(pictures))[0] == labels  # (N,)
        right = {"shape": shape_right.tolist(), "ink": [], "ground": [], "size": []}
        for picture, plan in zip(pictures, plans):
            ink, ground, area = ink_and_area(picture)
            right["ink"].append(one.nearest_colour(ink) == one.nearest_colour(plan.ink))
            right["ground"].append(one.nearest_colour(ground) == one.nearest_colour(plan.ground))
            word = one.size_word(plan.size)
            if word:
                right["size"].append((area > middle[plan.shape]) == (word == "large"))
        shares = [f"{what} {100 * np.mean(hits):.1f} %" for what, hits in right.items()]
        print(
            f"{name}: {', '.join(shares)} "
            f"({count} prompts, {len(right['size'])} of them name a size)"
        )


def options():
    """The command line."""
    p = sample.Parser(__doc__)
    p.add_argument("ckpt", nargs="*", help="checkpoints to score")
    p.add(
        "--pictures",
        None,
        "own folders: to learn reading from, and held out (default: shapes)",
        nargs=2,
    )
    p.add("--per-class", 64, "generated pictures of every class", type=sample.whole(1))
    several = "; several are scored each"
    p.add("--steps", [50], f"steps of the Mixer{several}", nargs="+", type=sample.whole(1))
    p.add("--decoder-steps", [20], f"of the decoder{several}", nargs="+", type=sample.whole(1))
    p.add("--cfg", [1.5], f"guidance scales{several}", nargs="+", type=sample.number(0))
    p.add(
        "--cfg-interval",
        [0.3, 0.9],
        "guidance acts while t is between these",
        nargs=2,
        type=sample.number(0, 1),
    )
    p.add("--write", None, "write --num shapes to this folder, and exit")
    p.add("--num", 5000, "how many pictures --write writes", type=sample.whole(1))
    p.add("--seed", HELD_OUT, "of the shapes of --write; the default's are held out", type=int)
    args = p.parse_args()
    if bool(args.ckpt) == bool(args.write):
        raise sample.UserError("give checkpoints to score, or --write FOLDER; see --help")
    return args


def write(folder, count, seed):
    """Shapes of a seed as files, FOLDER/shape/number.png."""
    for i in tqdm(range(count), "pictures", dynamic_ncols=True):
        plan = one.plan_shape(i, seed)
        path = Path(folder, plan.shape, f"{i:06d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one.draw_shape(plan, 16)).save(path)
    print(f"{folder}: {count} pictures, a folder for each shape")


def main():
    """Score the checkpoints of the command line."""
    args = options()
    if args.write:
        return write(args.write, args.num, args.seed)
    captioned = [path for path in args.ckpt if reads_text(path)]
    for path in captioned:
        print(path)
        score_prompts(RepTok.load(path))
    others = [path for path in args.ckpt if path not in captioned]
    if not others:
        return
    pixels = RepTok.load(others[0]).pixels if args.pictures else 16
    for path in others:
        if RepTok.load(path).pixels != pixels:
            raise sample.UserError(
                f"{path} does not draw {pixels}x{pixels} pixels: give --pictures, or score it alone"
            )
    if args.pictures:
        sets = [sample.Pictures(path, pixels) for path in args.pictures]
        known, held_out = [
            (torch.stack([s.open(i) for i in range(len(s))]), s.labels) for s in sets
        ]
        names = sets[0].class_names
    else:
        known = shapes(5500, READER)[:2]
        held_out = shapes(1000, HELD_OUT)[:2]
        names = one.SHAPES
    score(others, Judge(known, held_out), names, args)


def reads_text(path):
    """Whether a checkpoint generates from captions."""
    mixer = RepTok.load(path).mixer
    return bool(mixer and mixer.cross)


if __name__ == "__main__":
    sample.guarded(main)
