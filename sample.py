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
    # Tokens of other pictures, for train_stage2.py.
    torchrun --nproc-per-node 8 -- sample.py --ckpt out/stage1.pt --encode PICTURES --save FOLDER
    # Without what only training needs.
    python sample.py --ckpt out/stage2.pt --export small.pt

In Python: model = RepTok.load(path); z = model.encode(images); images = model.decode(z); z =
model.generate(labels). First the model, then the pictures of a folder and their tokens, then the
command line, and at the end the authors' checkpoint. Letters: B pictures, b of one forward pass,
K tokens a picture, D token width, N pictures in all, V views of each, L text length, C text width,
S side of a picture."""

import argparse
import contextlib
import datetime
import errno
import functools
import hashlib
import io
import math
import os
import re
import signal
import sys
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:
    # Windows has none: there two runs in one folder are not noticed.
    fcntl = None

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageOps
from tqdm import tqdm

import decoder as dec
import fid
import mixer as mix
import tokenizer as tok
from mixer import Mixer, guided
from tokenizer import ClipText, TextTower, Tokenizer, UserError, ViT, WordEncoder


class RepTok(nn.Module):
    """Tokenizer, decoder, VAE and, from stage 2 on, Mixer and perhaps text encoder of one
    checkpoint. Tokens z (B,K,D) are in the encoder's own scale; the Mixer works on (z - mean) /
    std, with mean and std (1,K,D). class_names: [] if unknown. released: it is the authors'."""

    def __init__(
        self,
        tokenizer,
        decoder,
        vae,
        mixer=None,
        text=None,
        mean=None,
        std=None,
        class_names=(),
        released=False,
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
        self.class_names = list(class_names)
        self.released = released
        self.pixels = decoder.config["size"] * vae.factor

    @property
    def device(self):
        return self.decoder.freqs.device

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
            # Decoders without t_max are older: they ran time the other way.
            if "t_max" not in content["decoder"]["config"]:
                raise KeyError("t_max")
            networks = {}
            for part in ("tokenizer", "decoder", "vae", "mixer", "text"):
                if part not in content:
                    continue
                state = dict(content[part]["state"])
                if averaged:
                    for name, average in content.get("ema", {}).items():
                        if name.startswith(f"{part}."):
                            state[name.removeprefix(f"{part}.")] = average
                network = new_network(part, content[part]["config"])
                networks[part] = tok.fit(network, state, path, f"a {part}")
            return cls(
                **networks,
                **content["statistics"],
                class_names=content["class_names"],
                released=content["released"],
            )
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
            "class_names": self.class_names,
            "released": self.released,
            "statistics": {"mean": self.mean, "std": self.std},
            **networks,
        }

    def half_content(self):
        """The same with weights in float16, half as large. A weight beyond float16's range, 65504,
        keeps its float32."""
        content = self.content()
        for name, _ in self.named_children():
            state = content[name]["state"]
            for key, tensor in state.items():
                half = tensor.half()
                if half.isfinite().all():
                    state[key] = half
        return content

    def noise(self, seeds, mixer=False):
        """Where the decoder's flow starts, (B,C,size,size), or the Mixer's, (B,K,D): one seed a
        picture. The Mixer adds 2**31 to its seeds, so that its noise is independent of the
        decoder's, as in training."""
        if mixer:
            shape = (self.mixer.K, self.mixer.D)
            offset = 2**31
        else:
            side = self.decoder.config["size"]
            shape = (self.decoder.config["channels"], side, side)
            offset = 0
        noise = []
        for seed in seeds:
            random = torch.Generator().manual_seed(seed + offset)
            noise.append(torch.randn(shape, generator=random))
        return torch.stack(noise).to(self.device)

    @torch.no_grad()
    def encode(self, images):
        """Images (B,3,H,W) in [-1,1], any size -> tokens (B,K,D). ValueError where they are not in
        [-1,1]; a warning where nothing is below 0, as in images in [0,1]."""
        low, high = images.aminmax()
        if low < -1.001 or high > 1.001:
            raise ValueError(
                f"images must lie in [-1,1], not in [{low:.3g},{high:.3g}]: for pixels from 0 to "
                "255, images / 127.5 - 1"
            )
        if low >= 0:
            warnings.warn(
                "no pixel is below 0: images must lie in [-1,1], 2 * images - 1 for those in [0,1]",
                stacklevel=2,
            )
        return self.tokenizer(images.to(self.device))

    @torch.no_grad()
    def decode(self, z, steps=20, noise=None, batch=64):
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
        labels=None,
        steps=50,
        cfg=1.5,
        cfg_interval=(0.3, 0.9),
        noise=None,
        text=None,
        mask=None,
    ):
        """Labels (B,) long, or text (B,L,C) and mask (B,L) -> new tokens (B,K,D), by Euler steps of
        the Mixer's flow. cfg: guidance scale, used while cfg_interval[0] <= t <= cfg_interval[1];
        1: none. noise (B,K,D): where the flow of normalised tokens starts; by default picture i's
        is from seed i. Raises UserError on other conditions."""
        if self.mixer is None:
            raise UserError(
                "this checkpoint is of stage 1, which cannot generate: train stage 2 "
                "and give stage2.pt"
            )
        if bool(self.mixer.cross) != (text is not None):
            raise UserError(
                f"this checkpoint takes {'text: give a prompt' if self.mixer.cross else 'no text'}"
            )
        given = [u for u in (noise, text, labels) if u is not None]
        if not given or self.mixer.num_classes and labels is None:
            raise UserError("say which classes: generate(labels), a tensor (B,) of their numbers")
        count = len(given[0])
        if not self.mixer.num_classes:
            # They only gave the number of pictures.
            labels = None
        if noise is None:
            noise = self.noise(range(count), mixer=True)            # (B,K,D)

        z = []
        for i in range(0, count, 1024):
            part = slice(i, i + 1024)
            condition = [u if u is None else u[part].to(self.device) for u in (labels, text, mask)]
            velocity = guided(self.mixer, *condition, scale=cfg, interval=cfg_interval)
            data = dec.euler(velocity, noise[part].to(self.device), steps)  # (b,K,D), normalised
            z.append(data * self.std + self.mean)
        return torch.cat(z)


def new_network(name, config):
    """An untrained network of a checkpoint; those on the meta device take no memory before their
    weights come."""
    if name == "tokenizer":
        return Tokenizer(
            ViT(**config["vit"]), config["token"], config["unfreeze"]
        )
    if name == "text" and "vocabulary" in config:
        return ClipText(TextTower(**config["tower"]), bytes(config["vocabulary"].tolist()))
    if name == "vae" and not config:
        return dec.PixelSpace()
    kinds = {"decoder": dec.Decoder, "vae": dec.VAE, "mixer": Mixer, "text": WordEncoder}
    with torch.device("meta"):
        return kinds[name](**config)


def load_checkpoint(path, kinds):
    """The content of a checkpoint of one of these kinds. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(
            f"{path}: no such file; train first (train_stage1.py, then train_stage2.py), "
            "or give another checkpoint"
        )
    content = tok.read_file(path)
    if "kind" in content:
        kind = content["kind"]
    elif "state_dict" in content:
        kind = "the authors' RepTok"
    else:
        kind = "something else"
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


def tell(text):
    """A line on the terminal, above progress bars."""
    tqdm.write(fid.printable(text), file=sys.stderr)


def save_grid(path, rows):
    """Rows of images (each (B,3,H,W) in [-1,1]) as one PNG; small images are enlarged to be
    seen."""
    x = torch.stack([fid.to_uint8(row.cpu().nan_to_num()) for row in rows])  # (R,B,3,H,W)
    R, B, _, H, W = x.shape
    picture = Image.fromarray(x.permute(0, 3, 1, 4, 2).reshape(R * H, B * W, 3).numpy())
    scale = max(1, 64 // H)
    picture = picture.resize((B * W * scale, R * H * scale), Image.Resampling.NEAREST)
    fid.write_file(path, lambda f: picture.save(f, "PNG"))


# ---- Pictures, and their tokens. Both trainers use these too
class Pictures(torch.utils.data.Dataset):
    """The pictures of a folder (any tree), a .tar, or a folder of .tar shards.

    pictures[i] -> (uint8 (3,pixels,pixels), i). In the place of a picture that cannot be read
    stands the next one that can, with its own number. names: the pictures' paths within the source.
    labels (N,) long. class_names: the top folders, sorted, [] where there are none. fingerprint: a
    SHA-256 of the names, and of the sizes of up to 1,000 files, so that other pictures of the same
    names are noticed. Raises UserError where there are no pictures, or where only some of them lie
    in class folders."""

    def __init__(self, source, pixels, ranks=None):
        self.source = str(Path(source).resolve())
        self.found = ranks.once(self.find) if ranks else self.find()
        names = [name for name in self.found if name.lower().endswith(fid.SUFFIXES)]
        left_out = fid.left_out(self.found)
        if len(names) < 2:
            raise UserError(
                f"{source}: no pictures in it, or only one, and {fid.listed(left_out) or 'no'} "
                f"other files; expected {', '.join(fid.SUFFIXES)} files"
            )
        if left_out and (ranks is None or ranks.main):
            tell(f"{source}: left out {fid.listed(left_out)}")
        some = names[:: math.ceil(len(names) / 1000)]
        sizes = [fid.size(self.found[name]) for name in some]
        self.set_up(pixels, names, top_folders(source, names), sizes)

    def find(self):
        """{name: place} of all files of the source, see fid.files."""
        return fid.files(self.source)

    def set_up(self, pixels, names, folders, sizes=()):
        """What all sets of pictures have. folders: of each picture that of its class, or []. sizes:
        of some files, in bytes."""
        self.pixels = pixels
        self.names = names
        self.class_names = sorted(set(folders))
        number = {name: i for i, name in enumerate(self.class_names)}
        self.labels = torch.tensor([number[name] for name in folders] or [0] * len(names))
        text = "\n".join([str(pixels), *names, *map(str, sizes)])
        self.fingerprint = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
        # A small set of decoded pictures stays in memory.
        self.small = len(names) * 3 * pixels**2 <= 2**28
        self.kept = {}
        # In memory that a loader's workers share, so that a damaged picture is named once.
        self.named = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.names)

    def open(self, i):
        """uint8 (3,pixels,pixels) of picture i. Raises UserError where it cannot be decoded."""
        with fid.naming(f"{self.names[i]}: not a readable picture"):
            data = fid.read_bytes(self.found[self.names[i]])
            return load_picture(io.BytesIO(data), self.pixels)

    def __getitem__(self, i):
        for further in range(len(self)):
            j = (i + further) % len(self)
            if j in self.kept:
                return self.kept[j], j
            try:
                x = self.open(j)
            except fid.UserError as e:
                if not self.named[j]:
                    tell(f"skipped: {e}")
                self.named[j] = True
                continue
            if self.small:
                self.kept[j] = x
            return x, j
        raise UserError(
            f"{self.source}: not one of its {len(self)} pictures can be read; give others"
        )


def top_folders(source, names):
    """The class folder of each picture; [] where none lies in one. Raises UserError where only some
    do."""
    # The name of a shard is no class.
    folders = [re.split(r"\.tar/", name, flags=re.IGNORECASE)[-1].split("/")[:-1] for name in names]
    # A folder around all of them is no class either.
    while all(len(path) > 1 and path[0] == folders[0][0] for path in folders):
        folders = [path[1:] for path in folders]
    inside = [name for name, path in zip(names, folders) if path]
    outside = [name for name, path in zip(names, folders) if not path]
    if inside and outside:
        raise UserError(
            f"{source}: {inside[0]} lies in a class folder and {outside[0]} in "
            "none; move one of them"
        )
    return [path[0] for path in folders if path]


def load_batches(data, order, device, workers=0):
    """Yields a batch of a data set for each list of numbers in `order`: images (b,3,S,S) in [-1,1],
    their numbers (b,) on the CPU, and a list of what else it gives; images and list on `device`."""
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=leave_signals,
    )
    for images, numbers, *others in loader:
        images = to_float(images.to(device, non_blocking=True))
        yield images, numbers, [u.to(device, non_blocking=True) for u in others]


def leave_signals(_=0):
    """For a loader's workers. Ctrl-C and SIGTERM reach every process of a group: the trainer
    answers them when its step is done, and until then its workers must live."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@torch.no_grad()
def compute_once(paths, compute, pictures, ranks, flip=False, workers=0):
    """Run frozen networks over all pictures once, in order, and keep their outputs in files.

    compute(images (b,3,S,S)) -> a list of (b,...), of which one goes to each of `paths`: a .npy,
    float16 (N,V,...), with V = 2 views of each picture where `flip` (as it is, and mirrored), else
    1. The files are complete or absent; a pass that was stopped begins again. Returns the numbers
    of the pictures that were read, (N,) long. Raises UserError where a value does not fit into
    float16."""
    N = len(pictures)
    unfinished = [path.with_name(path.name + ".part") for path in paths]
    with ranks.autocast():
        blank = torch.zeros(1, 3, pictures.pixels, pictures.pixels, device=ranks.device)
        shapes = [(N, 1 + flip, *values.shape[1:]) for values in compute(blank)]
    if ranks.main:
        for path, shape in zip(unfinished, shapes):
            reserve(path, shape)
    ranks.barrier()
    if not all(path.exists() for path in unfinished):
        raise UserError(
            f"{unfinished[0]}: not on this machine's disk; give --out on a disk that all share"
        )

    # Rounding differs between batch sizes: 64 pictures are one pass, whatever the number of
    # processes. Each process takes passes that follow each other.
    chunks = [list(range(i, min(i + 64, N))) for i in range(0, N, 64)]
    begin = len(chunks) * ranks.rank // ranks.world
    end = len(chunks) * (ranks.rank + 1) // ranks.world
    chunks = chunks[begin:end]
    read = torch.zeros(N, dtype=torch.long)
    with tqdm(
        desc="encoding pictures",
        total=sum(len(chunk) for chunk in chunks),
        disable=not ranks.main,
        dynamic_ncols=True,
    ) as bar:
        batches = load_batches(pictures, chunks, ranks.device, workers)
        for chunk, (images, numbers, _) in zip(chunks, batches):
            with ranks.autocast():
                outputs = compute(images)
                mirrored = compute(images.flip(-1)) if flip else None
            for k, path in enumerate(unfinished):
                views = [outputs[k]]
                if flip:
                    views.append(mirrored[k])
                rows = torch.stack(views, 1).to(torch.float16)      # (b,V,...)
                if not rows.isfinite().all():
                    raise UserError(
                        f"{path}: the networks' values are not finite or beyond float16; "
                        "check their weights"
                    )
                write_rows(path, chunk[0], rows.cpu().numpy())
            read[chunk] = numbers
            bar.update(len(chunk))

    # Each process has filled in its own.
    read = ranks.sum(read)
    if ranks.main:
        for path, finished in zip(unfinished, paths):
            rows = np.load(path, mmap_mode="r")
            # reserve() left NaN, which no process writes.
            if np.isnan(rows.reshape(N, -1)[:, 0]).any():
                raise UserError(
                    f"{path}: what other processes wrote is missing; give --out on a disk that "
                    "keeps what several machines write"
                )
            os.replace(path, finished)
    ranks.barrier()
    return read


def reserve(path, shape):
    """A .npy of this shape, float16, full of NaN. Writing it takes the place on the disk now: a
    full disk raises OSError here. It would kill a process that writes into a mapped file."""
    row = np.full(shape[1:], np.nan, np.float16).tobytes()
    try:
        with open(path, "wb") as file:
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(shape[0]):
                file.write(row)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def write_rows(path, first, rows):
    """Write an array (b,...) into a .npy from row `first` on, and no other byte of it."""
    array = np.load(path, mmap_mode="r")
    with open(path, "r+b") as file:
        file.seek(array.offset + first * array[0].nbytes)
        file.write(rows.tobytes())


def write_tokens(folder, model, pictures, ranks, flip=False, workers=0):
    """Encode every picture once. After this no picture is opened: stage 2 reads only FOLDER's
    tokens.npy, float16 (N,V,K,D), and tokens.pt, which says what they are. Raises UserError."""
    about = Path(folder, "tokens.pt")
    path = Path(folder, "tokens.npy")
    new = Path(folder, "tokens-new.npy")
    read = compute_once(
        [new], lambda images: [model.tokenizer(images)], pictures, ranks, flip, workers
    )
    if ranks.main:
        # Tokens that are there already stay until these are done.
        about.unlink(missing_ok=True)
        os.replace(new, path)
        tokens = np.load(path, mmap_mode="r")
        mean, std = statistics(tokens)
        made_by = digest(model.tokenizer)
        content = {
            "kind": "tokens",
            "names": [pictures.names[i] for i in read],
            "labels": pictures.labels[read],                        # (N,)
            "class_names": pictures.class_names,
            "source": pictures.source,
            "mean": mean,                                           # (1,K,D)
            "std": std,
            "shape": tokens.shape,                                  # (N,V,K,D)
            "first": torch.from_numpy(tokens[0].copy()),            # (V,K,D)
            "tokenizer": made_by,
            "fingerprint": f"{pictures.fingerprint} {flip} {made_by}",
        }
        save_checkpoint(about, content)
    ranks.barrier()


def statistics(tokens):
    """Mean and deviation, each (1,K,D), of mapped tokens (N,V,K,D), by chunks of D: all in float32
    may be 8 GB."""
    means = []
    deviations = []
    for i in range(0, tokens.shape[-1], 64):
        chunk = torch.from_numpy(tokens[..., i : i + 64].astype("float32"))  # (N,V,K,64)
        means.append(chunk.mean((0, 1)))
        deviations.append(chunk.std((0, 1)))
    return torch.cat(means, -1)[None], torch.cat(deviations, -1)[None] + 1e-6


def digest(*networks):
    """SHA-256 of all weights of networks."""
    found = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            found.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


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
        # The section of --help in which the next options stand.
        self.section = self

    def add(self, name, default=None, help="", **kwargs):
        """add_argument with the default in the help text."""
        if default is not None and default is not False:
            help += f" (default: {default})"
        # The word that stands for the value in --help.
        if "choices" in kwargs:
            metavar = "|".join(kwargs["choices"])
        elif "type" in kwargs:
            metavar = "N"
        elif "nargs" in kwargs:
            metavar = "FILE"
        else:
            metavar = name.removeprefix("--").upper()
        if "action" not in kwargs:
            kwargs.setdefault("metavar", metavar)
        self.section.add_argument(name, default=default, help=help, **kwargs)

    def parse_args(self, args=None):
        """Raises UserError also where a value is "", as an unset variable of a shell gives."""
        found = super().parse_args(args)
        for name, value in vars(found).items():
            if value == "" or isinstance(value, list) and "" in value:
                self.error(f"--{name.replace('_', '-')} is empty; give a value or leave it out")
        return found

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
ERRORS = (tok.UserError, dec.UserError, mix.UserError, fid.UserError)


# The status by which a shell knows that a command was interrupted.
INTERRUPTED = 130


def guarded(main, less_memory="use a smaller --batch"):
    """Call main(). An error that a user can correct ends in one line and status 2, any other in its
    traceback. less_memory: what to do where the device's memory does not suffice."""
    # Until a trainer's loop answers SIGTERM itself, it is like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.redirect_stdout(Output(sys.stdout)) as out:
        with contextlib.redirect_stderr(Output(sys.stderr)):
            try:
                main()
                out.flush()
                if dist.is_initialized():
                    dist.destroy_process_group()
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.exit(INTERRUPTED)
            except (*ERRORS, torch.OutOfMemoryError, OSError) as e:
                refuse(e, less_memory)


def refuse(error, less_memory):
    """End with the sentence of an error, or raise it where it is not the user's."""
    # A loader's worker puts its traceback before the sentence.
    message = str(error).rsplit("UserError: ", 1)[-1]
    if isinstance(error, torch.OutOfMemoryError):
        message = f"{message.split('. ')[0]}; {less_memory}"
    elif isinstance(error, OSError):
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        closed = (errno.EACCES, errno.EPERM, errno.EROFS)
        wrong = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
        if error.errno not in (*full, *closed, *wrong):
            raise error
        place = error.filename or "the disk"
        message = f"{place}: {error.strerror}; make room, or give another path"
    # The sentence gets a line of its own.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
    sentence = fid.printable(" ".join(message.split()))
    print(f"{Path(sys.argv[0]).name}: error{rank}: {sentence}", file=sys.stderr)
    sys.exit(2)


class Output:
    """A stream that goes on when nobody reads it any more, as after `| head`, or when it was closed
    from the start: a training must not end by what it prints."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = self.stream.encoding or "utf-8"
        # Characters that the terminal's encoding lacks, in the names of classes, become \\u codes.
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        with self.going_on():
            self.stream.write(text)

    def flush(self):
        with self.going_on():
            self.stream.flush()

    @contextlib.contextmanager
    def going_on(self):
        """A broken pipe is replaced by one that leads nowhere."""
        try:
            yield
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())


def best_dtype(device):
    """What --dtype auto means: bfloat16 where a device has matrix instructions for it."""
    able = False
    if device == "cuda":
        able = torch.cuda.is_bf16_supported(False)
    if device == "cpu":
        able = torch.cpu._is_amx_tile_supported()
    return "bfloat16" if able else "float32"


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
        self.dtype = best_dtype(device) if dtype == "auto" else dtype
        # float32 means float32: by default a GPU rounds what enters a convolution to 11 bits.
        torch.backends.cudnn.allow_tf32 = False
        if self.world > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))

    def autocast(self):
        """The context of --dtype."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def sum(self, x):
        """Sum of a tensor over all processes, in all processes."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any_process(self, found):
        """Whether the list `found` is not empty in any process."""
        return bool(self.sum(torch.tensor(len(found))))

    def barrier(self):
        """Returns when all processes are here; it does not wait for their GPUs."""
        self.sum(torch.zeros(1))

    def lock(self, folder):
        """Make a folder, and keep other runs out of it until this process ends. Raises UserError
        where another run is in it."""
        if not self.main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.locked = open(folder / ".lock", "a")
        try:
            if fcntl:
                fcntl.lockf(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(
                f"{folder}: another run writes into it; wait for its end, or give another folder"
            ) from e

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
        self.barrier()
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
        action="extend",
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
        "the same from a file with a prompt a line",
    )
    p.add(
        "--features",
        None,
        "generate from text features (L,C) made beforehand, .npz, a row each",
        nargs="+",
        action="extend",
        metavar="FILE",
    )
    p.add(
        "--reconstruct",
        None,
        "encode and decode these pictures, or those of a folder",
        nargs="+",
        action="extend",
        metavar="FILE",
    )
    p.add("--interpolate", None, "two pictures; eight steps between their tokens", nargs=2)
    p.add(
        "--encode",
        None,
        "write the tokens of a folder's pictures to --save, for train_stage2.py",
    )
    p.add("--export", None, "write to this file what sampling needs, with weights in float16")
    p.section = p.add_argument_group("sampling")
    p.add("--out", "samples.png", "the picture to write")
    p.add("--per-class", 8, "pictures of each class or prompt", type=whole(1))
    p.add("--steps", 50, "Euler steps of the Mixer", type=whole(1))
    p.add("--decoder-steps", 20, "Euler steps of the decoder", type=whole(1))
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
        "folder for a file per picture, in generated/, or real/ and reconstructed/; or for tokens",
    )
    p.add(
        "--num",
        None,
        "pictures for --save to generate (default: --per-class of each)",
        type=whole(1),
    )
    p.add("--batch", 50, "pictures at once for --save", type=whole(1))
    p.add("--flip", False, "with --encode, the mirrored pictures too", action="store_true")
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
    if bool(args.encode) and not args.save:
        raise UserError("--encode writes tokens.npy and tokens.pt into --save FOLDER: give it too")
    if args.flip and not args.encode:
        raise UserError("--flip is for --encode; leave it out")
    if args.save and (args.interpolate or args.export):
        raise UserError("--save does not go together with --interpolate or --export; leave it out")
    if args.cfg_interval[0] > args.cfg_interval[1]:
        raise UserError("--cfg-interval: the first time must not be after the second")
    if args.export and Path(args.export).resolve() == Path(args.ckpt).resolve():
        raise UserError(f"--export {args.export}: is --ckpt itself, which it would replace")
    for name in ("out", "export"):
        path = getattr(args, name)
        if path and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise UserError(f"--{name} {path}: give a file name in an existing folder")
    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out {args.out}: a PNG is written; give a name that ends in .png")
    return args


def main():
    """The command line: load, then export, write files, or draw one picture. Raises UserError."""
    args = options()
    ranks = Ranks(args.device, args.dtype)
    model = RepTok.load(args.ckpt, ranks.device)
    if args.export:
        save_checkpoint(Path(args.export), model.half_content())
        size = Path(args.export).stat().st_size / 1e6
        print(f"{args.export}: for sampling, {size:.0f} MB")
    elif args.encode:
        pictures = Pictures(args.encode, model.pixels, ranks)
        ranks.lock(Path(args.save))
        write_tokens(args.save, model, pictures, ranks, args.flip)
        if ranks.main:
            print(f"{args.save}: tokens of {len(pictures)} pictures, for train_stage2.py --tokens")
    else:
        with ranks.autocast():
            if args.save and args.reconstruct:
                save_reconstructed(model, args, ranks)
            elif args.save:
                save_generated(model, args, ranks)
            else:
                draw(model, args)


def draw(model, args):
    """The picture of --interpolate, --reconstruct or, without them, of what is generated. Raises
    UserError."""
    names = ""
    if args.interpolate:
        places = [places_of([source])[0] for source in args.interpolate]
        images = to_float(read_pictures(places, model.pixels))      # (2,3,S,S)
        z = model.encode(images)                                    # (2,K,D)
        s = torch.linspace(0, 1, 8, device=model.device)[:, None, None]
        noise = model.noise([args.seed]).expand(8, -1, -1, -1)
        tokens = (1 - s) * z[:1] + s * z[1:]                        # (8,K,D)
        between = model.decode(tokens, args.decoder_steps, noise).cpu()  # (8,3,S,S)
        rows = [torch.cat([images[:1], between, images[1:]])]
    elif args.reconstruct:
        places = places_of(args.reconstruct)
        if len(places) > 16:
            names = f", of the first 16 of {len(places)}; --save writes all"
        places = places[:16]
        images = to_float(read_pictures(places, model.pixels))      # (B,3,S,S)
        noise = model.noise(range(args.seed, args.seed + len(images)))
        rows = [images, model.decode(model.encode(images), args.decoder_steps, noise)]
    else:
        kind, asked = requests(model, args)
        if model.class_names and kind == "classes":
            names = f"; from the top: {', '.join(model.class_names[i] for i in asked)}"
        wanted = [one for one in asked for _ in range(args.per_class)]
        seeds = range(args.seed, args.seed + len(wanted))
        images = generate_images(model, kind, wanted, seeds, args)
        rows = images.split(args.per_class)
    save_grid(args.out, rows)
    print(f"{args.out}: {len(rows)} x {len(rows[0])} pictures{names}")


def places_of(sources):
    """Picture files, folders or .tar -> the places of their pictures, see fid.read_bytes. Raises
    UserError."""
    places = []
    for source in sources:
        if Path(source).is_dir() or source.lower().endswith(".tar"):
            found = fid.files(source)
            for name, place in found.items():
                if name.lower().endswith(fid.SUFFIXES):
                    places.append(place)
            if fid.left_out(found):
                tell(f"{source}: left out {fid.listed(fid.left_out(found))}")
        elif Path(source).exists():
            places.append((source,))
        else:
            raise UserError(f"{source}: no such file; give picture files, folders or .tar")
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
    """What to generate, once each: ("classes", numbers), ("prompts", strings) or ("features", pairs
    of features (L,C) and mask (L,)). Raises UserError."""
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
        return "features", rows
    if not model.mixer.cross:
        if args.prompt or args.prompts:
            raise UserError("--prompt: this checkpoint takes classes, no text; give --classes")
        return "classes", class_numbers(model, args.classes, most=None if args.save else 10)
    prompts = args.prompt or []
    if args.prompts:
        with fid.naming(f"--prompts {args.prompts}: cannot be read; expected a prompt a line"):
            # utf-8-sig passes over the mark with which some editors begin a file.
            lines = Path(args.prompts).read_text(encoding="utf-8-sig").split("\n")
        prompts = [line for line in lines if line.strip()]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("this checkpoint takes text: give --prompt with some words in it")
    if model.text:
        warn_of_prompts(model.text, prompts)
    return "prompts", prompts


def warn_of_prompts(text, prompts):
    """Print what a text encoder does not read of prompts."""
    for prompt in prompts:
        words = text.split(prompt)
        if len(words) > text.context:
            print(f"--prompt {prompt[:60]!r}... is too long and was cut")
        if isinstance(text, WordEncoder):
            unknown = [word for word in words if word not in text.number]
            if unknown:
                print(f"--prompt {prompt[:60]!r}: not in the captions of training: {unknown}")


def class_numbers(model, wanted, most):
    """Names or numbers -> class numbers; the first `most` (None: all) where none are wanted. Raises
    UserError."""
    count = model.mixer.num_classes
    if wanted is None:
        # A checkpoint without classes gives one row.
        return list(range(count))[:most] or [0]
    names = model.class_names
    number = {name: i for i, name in enumerate(names)}
    # Where a name is a number, as in folders 1 2 10, numbers are names and nothing else.
    if not any(name.isdecimal() for name in names):
        number |= {str(i): i for i in range(count)}
    for name in wanted:
        if name not in number:
            raise UserError(
                f"--classes {name}: no such class; use {', '.join([*number][:10])}"
                f"{', ...' if count > 10 else ''}"
            )
    return [number[name] for name in wanted]


def generate_images(model, kind, wanted, seeds, args):
    """What `requests` returns, but one a picture -> images (B,3,S,S) in [-1,1], each from its own
    seed."""
    if kind == "classes":
        condition = {"labels": torch.tensor(wanted)}
    elif kind == "prompts":
        text, mask = model.prompts(wanted)
        condition = {"text": text, "mask": mask}
    elif kind == "features":
        features, masks = zip(*wanted)
        text = nn.utils.rnn.pad_sequence(features, batch_first=True)  # (B,L,C)
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)     # (B,L)
        condition = {"text": text, "mask": mask}
    noise = model.noise(seeds, mixer=True)
    z = model.generate(
        steps=args.steps, cfg=args.cfg, cfg_interval=args.cfg_interval, noise=noise, **condition
    )
    return model.decode(z, args.decoder_steps, model.noise(seeds))


# ---- --save: one file a picture, for fid.py. Under torchrun each process writes its share
def my_share(count, ranks, args):
    """Yields this process's numbers below `count`, --batch of them at a time."""
    mine = range(ranks.rank, count, ranks.world)
    with tqdm(desc="pictures", total=len(mine), disable=not ranks.main, dynamic_ncols=True) as bar:
        for i in range(0, len(mine), args.batch):
            numbers = mine[i : i + args.batch]
            yield numbers
            bar.update(len(numbers))


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
        images = model.decode(model.encode(to_float(real)), args.decoder_steps, noise)
        save_files(Path(args.save, "real"), numbers, real)
        save_files(Path(args.save, "reconstructed"), numbers, fid.to_uint8(images))
    # None leaves before the others are done.
    ranks.barrier()
    if ranks.main:
        print(f"{args.save}: {len(places)} pictures in real, as many in reconstructed")


def save_generated(model, args, ranks):
    """--num pictures to generated/; with --clip the CLIP score is printed. Raises UserError."""
    kind, asked = requests(model, args)
    count = args.num or args.per_class * len(asked)
    score = ClipScore(ranks.fetch(args.clip), args.bpe).to(model.device) if args.clip else None
    # The sum of the cosines, and how many they are.
    total = torch.zeros(2, dtype=torch.float64)
    for numbers in my_share(count, ranks, args):
        # Each is taken equally often.
        wanted = [asked[i % len(asked)] for i in numbers]
        seeds = [args.seed + i for i in numbers]
        images = fid.to_uint8(generate_images(model, kind, wanted, seeds, args))
        save_files(Path(args.save, "generated"), numbers, images)
        if score:
            # Scores are taken in float32.
            with torch.autocast(model.device.type, enabled=False):
                total += torch.tensor(
                    [score(to_float(images), wanted).sum(), len(numbers)], dtype=torch.float64
                )
    # This waits for the others, too.
    cosines, scored = ranks.sum(total).tolist()
    if ranks.main:
        print(f"{args.save}: {count} pictures in generated")
    if score and ranks.main:
        cosine = cosines / scored
        print(
            f"CLIP score {100 * cosine:.4f} (100 cos), CLIPScore {2.5 * max(cosine, 0):.4f}, "
            f"{scored:.0f} pictures"
        )


class ClipScore(nn.Module):
    """Cosine of CLIP's embeddings of picture and caption (Hessel 2021)."""

    def __init__(self, path, vocabulary):
        super().__init__()
        tensors = tok.read_tensors(path)
        # It normalises as CLIP wants it.
        self.image = Tokenizer(tok.vit_from(tensors, path))
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
        # Every block has the frequencies of block 0.
        if name.endswith("pos_emb.freqs"):
            del tensors[name]
    tensors["token_pos"] = tensors["token_pos"].view(1, 1, -1)
    tensors["mapping.in_proj.weight"] = reverse_time(
        tensors["mapping.in_proj.weight"], tensors["mapping.freqs"]
    )
    tensors["patch_out.weight"] = -tensors["patch_out.weight"]

    # There are patch * patch * channels inputs.
    width, inputs = tensors["patch_in.weight"].shape
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
    # Compilation leaves a mark.
    tensors = renamed(tensors, [("_orig_mod.", "")])
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
            # They are stored as convolutions of kernel size 1.
            tensors[name] = x.squeeze(-1)
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
    guarded(main, "use a smaller --batch, --per-class or --dtype bfloat16")
