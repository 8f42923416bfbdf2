"""A trained RepTok: generate pictures, reconstruct, interpolate, write pictures for scoring,
export.

    # A row of every class, up to ten.
    python sample.py --ckpt out/stage2.pt
    python sample.py --ckpt out/stage2.pt --classes heart star --per-class 16 --cfg 1.5
    # Inputs above, reconstructions below.
    python sample.py --ckpt out/stage1.pt --reconstruct a.png b.png
    # A straight line between two tokens.
    python sample.py --ckpt out/stage1.pt --interpolate a.png b.png
    # The authors' checkpoint.
    python sample.py --ckpt reptok-xl-600k-ImageNet.ckpt --classes 207 981
    # Files for fid.py.
    torchrun --nproc-per-node 8 -- sample.py --ckpt out/stage2.pt --save scores --num 50000
    # Without what only training needs.
    python sample.py --ckpt out/stage2.pt --export small.pt

In Python: model = RepTok.load(path); z = model.encode(images); images = model.decode(z); z =
model.generate(classes). Letters: B pictures, K tokens a picture, D token width, L text length, C
text width, S side of a picture."""

import argparse
import datetime
import errno
import functools
import io
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageOps
from tqdm import tqdm

import decoder as dec
import fid
import tokenizer as tok
from mixer import Mixer, guided
from tokenizer import ClipText, TextTower, Tokenizer, UserError, ViT, WordEncoder


class RepTok(nn.Module):
    """Tokenizer, decoder, VAE and, from stage 2 on, Mixer and perhaps text encoder of one
    checkpoint. Tokens z (B,K,D) are in the encoder's own scale; the Mixer works on (z - mean) /
    std, with mean and std (1,K,D). classes: their names, [] if unknown. released: it is the
    authors'. data: stage 1's (source, fingerprint)."""

    def __init__(
        self,
        tokenizer,
        decoder,
        vae,
        mixer=None,
        text=None,
        mean=None,
        std=None,
        classes=(),
        released=False,
        data=None,
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.decoder = decoder
        # This memory layout is the fastest for convolutions.
        self.vae = vae.to(memory_format=torch.channels_last).requires_grad_(False)
        self.mixer = mixer
        self.text = text
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.classes = list(classes)
        self.released = released
        self.data = data
        self.pixels = decoder.config["size"] * vae.factor

    device = property(lambda self: self.decoder.freqs.device)

    @classmethod
    def load(cls, path, device="cpu"):
        """Any checkpoint: stage1.pt, stage2.pt, an export, or the authors' release. Raises
        UserError."""
        content = load_checkpoint(path, ["stage1", "stage2", "the authors' RepTok"])
        model = cls.from_checkpoint(content, path) if "kind" in content else released(content, path)
        return model.to(device)

    @classmethod
    def from_checkpoint(cls, content, path, averaged=True):
        """The networks of a checkpoint of ours, with their averaged (EMA) or their last weights.
        Raises UserError."""
        try:
            names = [
                name for name in ("tokenizer", "decoder", "vae", "mixer", "text") if name in content
            ]
            states = {name: dict(content[name]["state"]) for name in names}
            for name, average in content.get("ema", {}).items() if averaged else ():
                network, name = name.split(".", 1)
                states[network][name] = average
            if "t_max" not in content["decoder"]["config"]:  # older decoders ran time the other way
                raise KeyError("t_max")
            networks = {name: new_network(name, content[name]["config"]) for name in names}
            for name in names:
                tok.fit(networks[name], states[name], path, f"a {name}")
            facts = {name: content.get(name) for name in ("classes", "released", "data")}
            return cls(**networks, **content["statistics"], **facts)
        except (KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{path}: not a checkpoint of this version ({type(e).__name__}: {e}); train again"
            ) from e

    def content(self):
        """What a checkpoint needs to stand alone, as plain containers and tensors."""
        networks = {
            name: {"config": net.config, "state": net.state_dict()}
            for name, net in self.named_children()
        }
        return {
            "kind": "stage2" if self.mixer else "stage1",
            "classes": self.classes,
            "released": self.released,
            "data": self.data,
            "statistics": {"mean": self.mean, "std": self.std},
            **networks,
        }

    def noise(self, seeds, mixer=False):
        """Where the decoder's flow starts, (B,C,size,size), or the Mixer's, (B,K,D): one seed a
        picture. The Mixer adds 2**31 to its seeds, so that its noise is independent of the
        decoder's, as in training."""
        size = self.decoder.config["size"]
        shape = (
            (self.mixer.K, self.mixer.D) if mixer else (self.decoder.config["channels"], size, size)
        )
        draws = [torch.Generator().manual_seed(seed + 2**31 * mixer) for seed in seeds]
        return torch.stack([torch.randn(shape, generator=draw) for draw in draws]).to(self.device)

    @torch.no_grad()
    def encode(self, images):
        """Images (B,3,H,W) in [-1,1], any size -> tokens (B,K,D)."""
        return self.tokenizer(images.to(self.device))

    @torch.no_grad()
    def decode(self, z, steps=50, noise=None, batch=64):
        """Tokens (B,K,D) -> images (B,3,S,S) in [-1,1], by `steps` Euler steps of the decoder's
        flow from noise (B,C,size,size); by default picture i starts from seed i, whatever the
        batch."""
        noise = self.noise(range(len(z))) if noise is None else noise.to(self.device)
        images = []
        for tokens, x in zip(z.to(self.device).split(batch), noise.split(batch)):
            x = dec.euler(lambda x_t, t: self.decoder(x_t, t, tokens), x, steps)
            images.append(self.vae.decode(x).clamp(-1, 1))
        return torch.cat(images)

    @torch.no_grad()
    def prompts(self, strings):
        """Strings -> (text (B,L,C), mask (B,L)) for `generate`. Raises UserError where the
        checkpoint cannot read."""
        if self.text is None:
            raise UserError("this checkpoint has no text encoder: give --classes, or --features")
        ids = self.text.ids(strings).to(self.device)
        return self.text(ids), self.text.mask(ids)

    @torch.no_grad()
    def generate(
        self,
        classes=None,
        steps=50,
        cfg=1.5,
        cfg_interval=(0.3, 0.9),
        noise=None,
        text=None,
        mask=None,
    ):
        """Classes (B,) long, or text (B,L,C) and mask (B,L) -> new tokens (B,K,D), by Euler steps
        of the Mixer's flow. cfg: guidance scale, used while cfg_interval[0] <= t <=
        cfg_interval[1]; 1: none. noise (B,K,D): where the flow of normalised tokens starts; by
        default picture i's is from seed i. Raises UserError on other conditions."""
        if self.mixer is None:
            raise UserError(
                "this checkpoint is of stage 1, which cannot generate: train stage 2 "
                "and give stage2.pt"
            )
        if bool(self.mixer.cross) != (text is not None):
            raise UserError(
                f"this checkpoint takes {'text: give a prompt' if self.mixer.cross else 'no text'}"
            )
        given = [u for u in (noise, text, classes) if u is not None]
        if not given or self.mixer.num_classes and classes is None:
            raise UserError("say which classes: generate(classes), a tensor (B,) of their numbers")
        if not self.mixer.num_classes:
            classes = None  # they only gave the number of pictures
        noise = (
            self.noise(range(len(given[0])), mixer=True) if noise is None else noise.to(self.device)
        )
        z = []
        for i in range(0, len(given[0]), 1024):
            condition = [
                u if u is None else u[i : i + 1024].to(self.device) for u in (classes, text, mask)
            ]
            velocity = guided(self.mixer, *condition, scale=cfg, interval=cfg_interval)
            z.append(dec.euler(velocity, noise[i : i + 1024], steps) * self.std + self.mean)
        return torch.cat(z)


def new_network(name, config):
    """An untrained network of a checkpoint; those on the meta device take no memory before their
    weights come."""
    if name == "tokenizer":
        return Tokenizer(
            ViT(**config["vit"]), config["token"], config["reg_index"], config["unfreeze"]
        )
    if name == "text" and "vocabulary" in config:
        return ClipText(TextTower(**config["tower"]), bytes(config["vocabulary"].tolist()))
    if name == "vae" and not config:
        return dec.PixelSpace()
    with torch.device("meta"):
        return {"decoder": dec.Decoder, "vae": dec.VAE, "mixer": Mixer, "text": WordEncoder}[name](
            **config
        )


def load_checkpoint(path, kinds):
    """The content of a checkpoint of one of these kinds. Raises UserError."""
    content = tok.read_file(path)
    kind = content.get(
        "kind", "the authors' RepTok" if "state_dict" in content else "something else"
    )
    if kind not in kinds:
        raise UserError(
            f"{path}: expected a checkpoint of {' or '.join(kinds)}, found {kind}; give another"
        )
    return content


def save_checkpoint(path, content):
    """Write a temporary file, then rename it: `path` is complete or unchanged. UserError where that
    fails."""
    fid.write_file(path, lambda f: torch.save(content, f))


def load_picture(file, pixels):
    """A picture file -> uint8 (3,pixels,pixels): shorter side to `pixels`, centre crop. Raises what
    Pillow raises."""
    image = ImageOps.fit(
        Image.fromarray(fid.decode(file, pixels)), (pixels, pixels), Image.Resampling.BICUBIC
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_float(images):
    """uint8 -> float32 in [-1,1]."""
    return images.float() / 127.5 - 1


def text_features(file):
    """An .npz of `features` (L,C) and, where some of them are padding, `mask` (L,) -> float32
    (L,C), bool (L,)."""
    with np.load(file, allow_pickle=False) as z:
        features = torch.from_numpy(z["features"].astype(np.float32))
        mask = (
            torch.from_numpy(z["mask"].astype(bool))
            if "mask" in z
            else torch.ones(len(features), dtype=torch.bool)
        )
    if features.ndim != 2 or mask.shape != features.shape[:1]:
        raise ValueError(
            f"features {tuple(features.shape)}, mask {tuple(mask.shape)}; expected (L,C) and (L)"
        )
    return features, mask


def save_grid(path, rows):
    """Rows of images (each (B,3,H,W) in [-1,1]) as one PNG; small images are enlarged to be
    seen."""
    x = torch.stack([fid.to_uint8(row.cpu().nan_to_num()) for row in rows])  # (R,B,3,H,W)
    R, B, _, H, W = x.shape
    picture = Image.fromarray(x.permute(0, 3, 1, 4, 2).reshape(R * H, B * W, 3).numpy())
    scale = max(1, 64 // H)
    picture = picture.resize((B * W * scale, R * H * scale), Image.Resampling.NEAREST)
    fid.write_file(path, lambda f: picture.save(f, "PNG"))


# ---- Command line
class Parser(argparse.ArgumentParser):
    """argparse that shows every default, takes no abbreviations and refuses in one line."""

    def __init__(self, doc):
        form = functools.partial(
            argparse.RawDescriptionHelpFormatter, width=118, max_help_position=33
        )
        super().__init__(
            usage="%(prog)s [options]; -h shows this",
            description="\n\n".join(doc.split("\n\n")[:2]),
            allow_abbrev=False,
            formatter_class=form,
            add_help=False,
        )
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
        self.section = self  # of --help, in which the next options stand

    def add(self, name, default=None, help="", **kwargs):
        """add_argument with the default in the help text."""
        shown = "" if default is None or default is False else f" (default: {default})"
        word = "N" if "type" in kwargs else "FILE" if "nargs" in kwargs else name[2:].upper()
        value = {} if "action" in kwargs else {"metavar": "|".join(kwargs.get("choices", [word]))}
        self.section.add_argument(name, default=default, help=help + shown, **{**value, **kwargs})

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(low, high=math.inf, kind=float):
    """An argparse type: a finite number from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"
    return parse


whole = functools.partial(number, high=2**31, kind=int)
# Each file that can be copied alone has its own.
ERRORS = (tok.UserError, dec.UserError, fid.UserError)


def guarded(main):
    """Call main(). An error that a user can correct ends in one line and status 2, any other in its
    traceback."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (*ERRORS, torch.OutOfMemoryError, OSError) as e:
        # A loader's worker puts its traceback before the sentence.
        message = str(e).rsplit("UserError: ", 1)[-1]
        if isinstance(e, torch.OutOfMemoryError):
            first = message.split(". ")[0]
            message = f"{first}; use a larger --accumulate, --checkpointing or a smaller --batch"
        elif isinstance(e, OSError):
            if e.errno not in (
                errno.ENOSPC,
                errno.EACCES,
                errno.EROFS,
                errno.ENOTDIR,
                errno.EEXIST,
            ):
                raise
            message = f"{e.filename or 'the disk'}: {e.strerror}; make room, or give another path"
        for bar in list(getattr(tqdm, "_instances", ())):  # the sentence gets a line of its own
            bar.close()
        rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(
            f"{Path(sys.argv[0]).name}: error{rank}: {' '.join(message.split())}", file=sys.stderr
        )
        sys.exit(2)


class Ranks:
    """One process, or one of many under torchrun: .rank, .world, .main, .device, .dtype, and what
    they do together. Raises UserError where the device is missing, or where `batch` cannot be cut
    into `pieces` in each process."""

    def __init__(self, device="auto", dtype="auto", batch=0, pieces=1):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        if batch % (self.world * pieces):
            raise UserError(
                f"--batch {batch}: give a multiple of {self.world} processes x "
                f"--accumulate {pieces}"
            )
        if device == "auto":
            # mps is never picked by itself, because it lacks some operations.
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device != "cpu" and not getattr(torch, device).is_available():
            raise UserError(f"--device {device}: this machine has none; use --device auto")
        local = int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None
        if device == "cuda" and local >= torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node: give at most {torch.cuda.device_count()}, the "
                "GPUs of this machine"
            )
        self.device = torch.device(device, local)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        able = device == "cuda" and torch.cuda.is_bf16_supported(False)
        able = able or device == "cpu" and torch.cpu._is_amx_tile_supported()
        self.dtype = dtype if dtype != "auto" else "bfloat16" if able else "float32"
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))

    def autocast(self):
        """The context of --dtype; auto takes bfloat16 where the device has matrix instructions for
        it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def sum(self, x):
        """Sum of a tensor over all processes, in all processes."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any_process(self, found=()):
        """Whether the list `found` is not empty in any process. All wait for each other, but not
        for their GPUs."""
        return bool(self.sum(torch.tensor(len(found))))

    def once(self, function):
        """Runs function() in the first process, returns its result in all."""
        found = [function() if self.main else None]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def fetch(self, name_or_path):
        """The path of a weight file. One process a machine downloads a named one, the others
        wait."""
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            tok.weight_file(name_or_path)
        self.any_process()
        return tok.weight_file(name_or_path)

    def share(self, x):
        """This process's part of a tensor that was drawn for the whole batch."""
        return x.chunk(self.world)[self.rank]

    def wrap(self, module, compile):
        """torch.compile and, among many processes, DDP: equal weights at the start, gradients
        averaged."""
        module = torch.compile(module) if compile else module
        if self.world == 1 or not any(p.requires_grad for p in module.parameters()):
            return module
        return nn.parallel.DistributedDataParallel(
            module, [self.device.index] if self.device.type == "cuda" else None
        )


def options():
    """The command line."""
    p = Parser(__doc__)
    p.add(
        "--ckpt",
        None,
        "checkpoint: stage1.pt, stage2.pt, an export, or the authors'",
        required=True,
    )
    p.section = p.add_argument_group(
        "what to do; default: generate pictures of all classes, up to ten"
    )
    p.section = p.section.add_mutually_exclusive_group()
    p.add(
        "--classes",
        None,
        "generate these classes, by name or number, one row each",
        nargs="+",
        metavar="CLASS",
    )
    p.add(
        "--prompt",
        None,
        "generate from a prompt; several --prompt give one row each",
        action="append",
    )
    p.add(
        "--prompts",
        None,
        "the same from a file with a prompt a line, or .jsonl with a caption a line",
    )
    p.add(
        "--features",
        None,
        "generate from text features (L,C) made beforehand, .npz, a row each",
        nargs="+",
    )
    p.add(
        "--reconstruct", None, "encode and decode these pictures, or those of a folder", nargs="+"
    )
    p.add("--interpolate", None, "two pictures; eight steps between their tokens", nargs=2)
    p.add("--export", None, "write the checkpoint to this file without what only training needs")
    p.section = p.add_argument_group("sampling")
    p.add("--out", "samples.png", "the picture to write")
    p.add("--per-class", 8, "pictures of each class or prompt", type=whole(1))
    p.add("--steps", 50, "Euler steps of Mixer and decoder", type=whole(1))
    p.add("--cfg", 1.5, "guidance scale; 1 is none", type=number(0))
    p.add(
        "--cfg-interval",
        [0.3, 0.9],
        "guidance acts while t is between these",
        nargs=2,
        type=number(0, 1),
    )
    p.add("--seed", 0, "seed of the first picture; each next one adds 1", type=whole(0))
    p.section = p.add_argument_group("many pictures, for scores; rarely needed")
    p.add(
        "--save",
        None,
        "folder for one file per picture, not --out: generated/, or real/ and reconstructed/",
    )
    p.add(
        "--num",
        None,
        "pictures for --save to generate (default: --per-class of each)",
        type=whole(1),
    )
    p.add("--batch", 50, "pictures at once for --save", type=whole(1))
    p.add(
        "--clip", None, "CLIP file, to print the CLIP score of --save's pictures and their prompts"
    )
    p.add("--bpe", None, "CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz")
    p.add(
        "--device",
        "auto",
        "auto is cuda where there is one, else cpu",
        choices=["auto", "cpu", "cuda", "mps"],
    )
    p.add(
        "--dtype",
        "auto",
        "auto: bfloat16 where the device is made for it",
        choices=["auto", "float32", "bfloat16"],
    )
    args = p.parse_args()
    if (
        bool(args.clip) != bool(args.bpe)
        or args.clip
        and not (args.save and (args.prompt or args.prompts))
    ):
        raise UserError(
            "--clip scores pictures against their prompts: give --bpe, --save and --prompts too"
        )
    if args.num and (args.reconstruct or not args.save):
        raise UserError("--num is for pictures that are generated with --save; leave it out")
    if args.save and (args.interpolate or args.export):
        raise UserError("--save does not go together with --interpolate or --export; leave it out")
    if args.cfg_interval[0] > args.cfg_interval[1]:
        raise UserError("--cfg-interval: the first time must not be after the second")
    for name in ("out", "export"):
        path = getattr(args, name)
        if path and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise UserError(f"--{name} {path}: give a file name in an existing folder")
    return args


def main():
    """The command line: load, then export, write files, or draw one picture. Raises UserError."""
    args = options()
    ranks = Ranks(args.device, args.dtype)
    model = RepTok.load(args.ckpt, ranks.device)
    if args.export:
        save_checkpoint(Path(args.export), {**model.content(), "data": None})
        return print(
            f"{args.export}: for sampling, {Path(args.export).stat().st_size / 1e6:.0f} MB"
        )
    action = draw if not args.save else save_reconstructed if args.reconstruct else save_generated
    with ranks.autocast():
        action(model, args, ranks)


def draw(model, args, _):
    """The picture of --interpolate, --reconstruct or, without them, of what is generated. Raises
    UserError."""
    if args.interpolate:
        images = to_float(read_pictures(places_of(args.interpolate), model.pixels))  # (2,3,S,S)
        z = model.encode(images)                                    # (2,K,D)
        s = torch.linspace(0, 1, 8, device=model.device)[:, None, None]
        noise = model.noise([args.seed]).expand(8, -1, -1, -1)
        between = model.decode((1 - s) * z[:1] + s * z[1:], args.steps, noise).cpu()  # (8,3,S,S)
        rows = [torch.cat([images[:1], between, images[1:]])]
    elif args.reconstruct:
        images = to_float(
            read_pictures(places_of(args.reconstruct)[:16], model.pixels)
        )  # (B,3,S,S)
        noise = model.noise(range(args.seed, args.seed + len(images)))
        rows = [images, model.decode(model.encode(images), args.steps, noise)]
    else:
        wanted = [one for one in requests(model, args) for _ in range(args.per_class)]
        images = generate_images(model, wanted, range(args.seed, args.seed + len(wanted)), args)
        rows = images.split(args.per_class)
    save_grid(args.out, rows)
    print(f"{args.out}: {len(rows)} x {len(rows[0])} pictures")


def places_of(sources):
    """Picture files, folders or .tar -> the places of their pictures, see fid.read_bytes. Raises
    UserError."""
    places = []
    for source in sources:
        many = Path(source).is_dir() or source.endswith(".tar")
        found = fid.files(source).items() if many else [(fid.SUFFIXES[0], (source,))]
        places += [place for name, place in found if name.lower().endswith(fid.SUFFIXES)]
    if not places:
        raise UserError(
            f"{' '.join(sources)}: no pictures in it; expected {', '.join(fid.SUFFIXES)} files"
        )
    return places


def read_pictures(places, pixels):
    """uint8 (B,3,pixels,pixels). Raises UserError."""
    images = []
    for place in places:
        with fid.naming(f"{place[0]}: not a readable picture"):
            images.append(load_picture(io.BytesIO(fid.read_bytes(place)), pixels))
    return torch.stack(images)


def requests(model, args):
    """What to generate, once each: class numbers, prompts, or (features, mask) of the --features.
    Raises UserError."""
    if model.mixer is None:
        raise UserError(
            f"--ckpt {args.ckpt}: of stage 1, which cannot generate; give a "
            "stage2.pt, or --reconstruct"
        )
    if args.features:
        with fid.naming("--features: not an .npz with features (L,C)"):
            rows = [text_features(path) for path in args.features]
        width = model.mixer.config["text_width"]
        if width and any(features.shape[1] != width for features, _ in rows):
            raise UserError(
                f"--features: the checkpoint takes (L,{width}), not "
                f"{[(*text.shape,) for text, _ in rows]}"
            )
        return rows
    prompts = args.prompt or []
    if args.prompts:
        with fid.naming(
            f"--prompts {args.prompts}: cannot be read; expected a prompt a line, or "
            ".jsonl with captions"
        ):
            prompts = [
                line
                for line in Path(args.prompts).read_text(encoding="utf-8").split("\n")
                if line.strip()
            ]
            if args.prompts.endswith(".jsonl"):
                captions = [json.loads(line)["caption"] for line in prompts]
                prompts = [
                    caption if isinstance(caption, str) else caption[0] for caption in captions
                ]
    if not prompts and not model.mixer.cross:
        return class_numbers(model, args.classes, most=None if args.save else 10)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("this checkpoint takes text: give --prompt with some words in it")
    for prompt in prompts:
        if model.text is not None and len(model.text.split(prompt)) > model.text.context:
            print(f"--prompt {prompt[:60]!r}... is too long and was cut")
    return prompts


def class_numbers(model, wanted, most):
    """Names or numbers -> class numbers; the first `most` (None: all) where none are wanted. Raises
    UserError."""
    count = model.mixer.num_classes
    if wanted is None:
        return list(range(count))[:most] or [0]  # a checkpoint without classes gives one row
    number = {
        name: i for i, name in [*enumerate(map(str, range(count))), *enumerate(model.classes)]
    }
    for name in wanted:
        if name not in number:
            raise UserError(
                f"--classes {name}: no such class; use 0 to {count - 1} or "
                f"{' '.join(model.classes[:10])}"
            )
    return [number[name] for name in wanted]


def generate_images(model, wanted, seeds, args):
    """Class numbers, prompts or features, one a picture -> images (B,3,S,S) in [-1,1], each from
    its own seed."""
    if isinstance(wanted[0], int):
        condition = {"classes": torch.tensor(wanted)}
    else:
        padded = (nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(*wanted))
        condition = dict(
            zip(("text", "mask"), model.prompts(wanted) if isinstance(wanted[0], str) else padded)
        )
    noise = model.noise(seeds, mixer=True)
    z = model.generate(
        steps=args.steps, cfg=args.cfg, cfg_interval=args.cfg_interval, noise=noise, **condition
    )
    return model.decode(z, args.steps, model.noise(seeds))


# ---- --save: one file a picture, for fid.py. Under torchrun each process writes its share
def my_share(count, ranks, args):
    """Yields this process's numbers below `count`, --batch of them at a time."""
    mine = range(ranks.rank, count, ranks.world)
    for i in tqdm(
        range(0, len(mine), args.batch), "pictures", unit_scale=args.batch, disable=not ranks.main
    ):
        yield mine[i : i + args.batch]


def save_files(folder, numbers, images):
    """uint8 images (B,3,H,W) as folder/number.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, x in zip(numbers, images.cpu()):
        picture = Image.fromarray(x.permute(1, 2, 0).numpy())
        fid.write_file(folder / f"{i:06d}.png", lambda f: picture.save(f, "PNG"))


def save_reconstructed(model, args, ranks):
    """Pictures as the model sees them to real/, their reconstructions to reconstructed/. Raises
    UserError."""
    places = places_of(args.reconstruct)
    for numbers in my_share(len(places), ranks, args):
        real = read_pictures([places[i] for i in numbers], model.pixels)  # (B,3,S,S)
        noise = model.noise([args.seed + i for i in numbers])
        images = model.decode(model.encode(to_float(real)), args.steps, noise)
        save_files(Path(args.save, "real"), numbers, real)
        save_files(Path(args.save, "reconstructed"), numbers, fid.to_uint8(images))
    ranks.any_process()  # none leaves before the others are done


def save_generated(model, args, ranks):
    """--num pictures to generated/; with --clip the CLIP score is printed. Raises UserError."""
    asked = requests(model, args)
    count = args.num or args.per_class * len(asked)
    score = ClipScore(ranks.fetch(args.clip), args.bpe).to(model.device) if args.clip else None
    total = torch.zeros(2, dtype=torch.float64)  # sum of the cosines, and how many
    for numbers in my_share(count, ranks, args):
        wanted = [asked[i % len(asked)] for i in numbers]  # each equally often
        images = fid.to_uint8(
            generate_images(model, wanted, [args.seed + i for i in numbers], args)
        )
        save_files(Path(args.save, "generated"), numbers, images)
        if score:
            with torch.autocast(model.device.type, enabled=False):  # scores are taken in float32
                total += torch.tensor(
                    [score(to_float(images), wanted).sum(), len(numbers)], dtype=torch.float64
                )
    cosines, count = ranks.sum(total).tolist()
    if score and ranks.main:
        cosine = cosines / count
        print(
            f"CLIP score {100 * cosine:.4f} (100 cos), CLIPScore {2.5 * max(cosine, 0):.4f}, "
            f"{count:.0f} pictures"
        )


class ClipScore(nn.Module):
    """Cosine of CLIP's embeddings of picture and caption (Hessel 2021)."""

    def __init__(self, path, vocabulary):
        super().__init__()
        tensors = tok.read_tensors(path)
        self.image = Tokenizer(tok.vit_from(tensors, path))  # it normalises as CLIP wants it
        self.text = ClipText(tok.load_text_encoder(path), vocabulary)
        self.register_buffer("projection", tensors["visual_projection.weight"].T.float())

    @torch.no_grad()
    def forward(self, images, captions):
        """Images (B,3,H,W) in [-1,1], B strings -> cosine (B,)."""
        size = (self.image.vit.pixels,) * 2
        images = nn.functional.interpolate(
            images.to(self.projection), size, mode="bicubic", antialias=True
        )
        image = self.image(images)[:, 0] @ self.projection          # (B,E)
        text = self.text.tower.embed(self.text.bpe(captions).to(image.device))  # (B,E)
        return torch.cosine_similarity(image, text)


# ---- Below: the authors' checkpoint. Its names and conventions stand here and nowhere else.
# Their names, ours; every pair is replaced in turn.
DECODER = [
    ("time_emb.weight", "mapping.freqs"),
    ("time_in_proj.", "mapping.in_proj."),
    ("mapping.blocks.0.norm.", "mapping.norms.0."),
    ("mapping.blocks.1.norm.", "mapping.norms.1."),
    ("encoder.dino.temp_pos_embed", "token_pos"),
    ("encoder.dino.backbone.fc.", "token_fc."),
    ("encoder.dino.backbone.ln.", "token_ln."),
    ("backbone.mid_merge.pre_proj.proj.", "patch_in."),
    ("backbone.mid_merge.proj.", "merge."),
    ("backbone.mid_split.post_proj.norm.", "norm_out."),
    ("backbone.mid_split.post_proj.proj.", "patch_out."),
    ("backbone.mid_level.0.self_attn.pos_emb.freqs", "freqs"),
    ("backbone.mid_level.", "blocks."),
    (".self_attn.norm.", ".norm1."),
    (".self_attn.", ".attn."),
    (".ff.norm.", ".norm2."),
]
# VAE and encoder are read by themselves. What new_reg gives is thrown away there.
DECODER_UNUSED = (
    "ae.",
    "encoder.dino.model.",
    "encoder.dino.target_model.",
    "encoder.dino.new_reg",
)
MIXER = [
    ("t_embedder.", "time."),
    ("label_embedder.embedding_table.", "label."),
]
MIXER_LAYER = [
    ("0.norm.", "norm1."),
    ("0.fn.0.", "tokens.up."),
    ("0.fn.3.", "tokens.down."),
    ("1.norm.", "norm2."),
    ("1.fn.0.", "channels.up."),
    ("1.fn.3.", "channels.down."),
]


def released(content, path):
    """The authors' checkpoint as a RepTok. Widths and depths are counted from the stored shapes.

    Raises UserError where something is missing.
    """
    tensors = tok.flatten(content["state_dict"])
    decoder_tensors = under(tensors, "first_stage.decoder.decoder.")
    mixer_tensors = under(tensors, "ema_model.net.") or under(tensors, "model.net.")
    if "time_emb.weight" not in decoder_tensors or not mixer_tensors:
        raise UserError(
            f"{path}: not a RepTok checkpoint; expected stage1.pt, stage2.pt or the authors' .ckpt"
        )
    try:
        # Our tokenizer keeps the tuned class token beside the ViT, which gets the original one.
        vit = tok.vit_from(under(tensors, "first_stage.encoder.encoder."), path)
        tokenizer = Tokenizer(vit)
        original = decoder_tensors.get("encoder.dino.target_model.cls_token", vit.cls_token)
        vit.cls_token.data = original.float()

        vae = dec.vae_from(under(decoder_tensors, "ae.ae."), path)
        decoder = released_decoder(decoder_tensors, vae, path)
        mixer = released_mixer(mixer_tensors, path)
    except KeyError as e:
        raise UserError(
            f"{path}: looks like the authors' checkpoint, but {e} is missing; get it again"
        ) from None

    mean = torch.zeros(1, mixer.K, mixer.D)
    std = torch.full_like(mean, scale_factor(content.get("hyper_parameters", {})))
    return RepTok(tokenizer, decoder, vae, mixer, mean=mean, std=std, released=True)


def released_decoder(tensors, vae, path):
    """The decoder of the authors' checkpoint, turned to the paper's time and sign.

    Theirs is told 1-t, and predicts noise - data.
    """
    tensors = {name: x for name, x in tensors.items() if not name.startswith(DECODER_UNUSED)}
    tensors = renamed(tensors, DECODER)
    for name in list(tensors):
        if name.endswith("pos_emb.freqs"):  # every block has the frequencies of block 0
            del tensors[name]
    tensors["token_pos"] = tensors["token_pos"].view(1, 1, -1)
    tensors["mapping.in_proj.weight"] = reverse_time(
        tensors["mapping.in_proj.weight"], tensors["mapping.freqs"]
    )
    tensors["patch_out.weight"] = -tensors["patch_out.weight"]

    width, inputs = tensors["patch_in.weight"].shape  # inputs: patch * patch * channels
    numbers = [int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")]
    with torch.device("meta"):
        decoder = dec.Decoder(
            channels=vae.channels,
            size=256 // vae.factor,
            patch=round((inputs / vae.channels) ** 0.5),
            width=width,
            depth=max(numbers) + 1,
            heads=len(tensors["blocks.0.attn.scale"]),
            mapping=len(tensors["mapping.in_proj.weight"]),
            token_dim=tensors["token_fc.weight"].shape[1],
        )
    return tok.fit(decoder, tensors, path, "the authors' decoder")


def reverse_time(weight, freqs):
    """A linear map of the Fourier features of 1-t, rewritten as a map of the features of t.

    weight (M,M), for [cos(2 pi f (1-t)), sin(2 pi f (1-t))], freqs f (M/2,1) -> (M,M) float64, for
    [cos(2 pi f t), sin(2 pi f t)]. With a = 2 pi f and b = 2 pi f t:

        cos(a - b) = cos a cos b + sin a sin b
        sin(a - b) = sin a cos b - cos a sin b
    """
    a = 2 * math.pi * freqs[:, 0].double()                          # (M/2,)
    from_cos, from_sin = weight.double().chunk(2, dim=1)            # each (M,M/2)
    cos_b = from_cos * a.cos() + from_sin * a.sin()
    sin_b = from_cos * a.sin() - from_sin * a.cos()
    return torch.cat([cos_b, sin_b], 1)


def released_mixer(tensors, path):
    """The Mixer of the authors' checkpoint.

    It is a numbered list: entry 0 projects in, then come the layers, a norm, the projection out.
    """
    tensors = renamed(tensors, [("_orig_mod.", "")])  # a mark that compilation leaves
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("mixer."))
    depth = last - 2
    names = [*MIXER, ("mixer.0.", "proj_in.")]
    for i in range(depth):
        for theirs, ours in MIXER_LAYER:
            names.append((f"mixer.{i + 1}.{theirs}", f"layers.{i}.{ours}"))
    names.append((f"mixer.{last - 1}.", "norm."))
    names.append((f"mixer.{last}.", "proj_out."))
    tensors = renamed(tensors, names)

    for name, x in tensors.items():
        if name.endswith(("tokens.up.weight", "tokens.down.weight")):
            tensors[name] = x.squeeze(-1)  # stored as convolutions of kernel size 1
    token_hidden, S = tensors["layers.0.tokens.up.weight"].shape
    hidden, D = tensors["proj_in.weight"].shape
    with torch.device("meta"):
        mixer = Mixer(
            K=S - 2,
            D=D,
            hidden=hidden,
            depth=depth,
            num_classes=len(tensors["label.weight"]) - 1,
            token_hidden=token_hidden,
            channel_hidden=len(tensors["layers.0.channels.up.weight"]),
            time_scale=1.0,
        )
    return tok.fit(mixer, tensors, path, "the authors' Mixer")


def under(tensors, prefix):
    """The tensors below a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def renamed(tensors, pairs):
    """The same tensors under new names: in each name, old is replaced by new, pair after pair."""
    out = {}
    for name, tensor in tensors.items():
        for old, new in pairs:
            name = name.replace(old, new)
        out[name] = tensor
    return out


def scale_factor(hyper_parameters):
    """The factor by which the authors divide tokens before stage 2; 1 if the file has none.

    Other networks have a scale_factor, too: that of the first stage is meant, if there are several.
    """
    found = []
    for place, value in settings(hyper_parameters):
        if place.removesuffix("._val").endswith(".scale_factor"):
            found.append((place, value))
    for place, value in found:
        if "first_stage" in place:
            return value
    return found[0][1] if found else 1.0


def settings(node, place=""):
    """Yields (its place as keys with dots, number) of every number in nested containers.

    OmegaConf's nodes hold their children as _content, their value as _val, and as _parent the node
    above, which leads in circles.
    """
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "_parent":
            continue
        if isinstance(value, (int, float)):
            yield f"{place}.{key}", float(value)
        elif isinstance(value, (dict, list, tuple)):
            yield from settings(value, f"{place}.{key}")


if __name__ == "__main__":
    guarded(main)
