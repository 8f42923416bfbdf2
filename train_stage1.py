"""Stage 1: train the decoder and, of the encoder, only the class-token embedding (RepTok, arXiv
2510.14630, Sec. 3).

    python train_stage1.py --encoder docs/encoder.pt   # coloured shapes: minutes on two cores
    python train_stage1.py --data FOLDER               # own pictures; sub-folders are classes
    torchrun --nproc-per-node 8 train_stage1.py --data imagenet/train --size XL ...  # see README

Writes OUT/stage1.pt (complete in itself), OUT/stage1.jsonl (one line per logged step),
OUT/stage1.png (pictures; what is drawn from the untuned token z0; what is drawn from z), at its end
OUT/tokens.npy and OUT/tokens.pt (the token of every picture, which stage 2 reads) and, if it trains
a small encoder first, OUT/encoder.pt. The same command resumes a stopped run.

The method is the loop in `main`. Below it: the parts of stage 1, then the code that both trainers
share. Letters: B pictures of a step in one process, b of a micro-batch, K tokens per picture, D
token width, S side of a picture, (C,h,w) a latent, V views of a picture (2 with --flip)."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import decoder as dec
import fid
import sample
import tokenizer as tok
from sample import Pictures, Ranks, RepTok, load_checkpoint, number, save_checkpoint, whole
from tokenizer import Tokenizer, UserError, ViT, cosine_loss

# The networks of each size. All but nano work on 256 pixels, in SD-VAE latents, with a
# published encoder. A Mixer must be wider than a token, of 768 numbers with these encoders.
SIZES = {
    "nano": {
        "decoder": dict(width=128, depth=4, heads=4, patch=4, mapping=128, learned_positions=True),
        "mixer": dict(hidden=192, depth=3),
    },
    "S": {"decoder": dict(width=384, depth=12, heads=6), "mixer": dict(hidden=896, depth=12)},
    "B": {"decoder": dict(width=768, depth=12, heads=12), "mixer": dict(hidden=896, depth=16)},
    "L": {"decoder": dict(width=1024, depth=24, heads=16), "mixer": dict(hidden=1024, depth=24)},
    "XL": {"decoder": dict(width=1152, depth=28, heads=16), "mixer": dict(hidden=1280, depth=28)},
}

# The settings of a run, printed at its start; most have an option of their name. Nano is not
# in the paper: one setting for the drawn shapes and for own pictures, minutes long on two cores.
SETTINGS = {  # name: (sizes S to XL, nano)
    "pixels": (256, 16),
    # Steps and batch are the paper's.
    "steps": (1_000_000, 2200),
    "batch": (512, 64),
    # Nano is small and its run is short: 50 times the usual learning rate.
    "lr": (1e-4, 5e-3),
    # AdamW's second beta. In a short run the mean of squared gradients must follow fast.
    "beta2": (0.999, 0.95),
    # The embedding's learning rate, as a multiple of lr. It has few steps to go: AdamW moves each
    # number by about its learning rate a step.
    "token_lr": (1.0, 20.0),
    "warmup": (2000, 50),
    # Constant, or flat to half of the run and then a line to 0.
    "decay": (False, True),
    "ema": (0.9999, 0.99),
    # Nano's decoder works on pixels, not on a VAE's latents. It predicts them; v follows, and the
    # loss is Eq. 1 (as in JiT, Li, He 2025).
    "predict": ("velocity", "data"),
    # t = sigmoid(N(t_mean, 1)). Near noise the decoder has only the token to draw from, and learns
    # to read it.
    "t_mean": (0.0, -2.0),
    # Lambda of Eq. 3, as in the paper's ablations.
    "lam": (0.1, 0.1),
    "cache": (False, True),
    "save_every": (10_000, 500),
}
# The largest norm of a step's gradient, in both stages.
CLIP_GRAD = 1.0

# Nano's own encoder, where no --encoder is given.
ENCODER = dict(
    # Pictures a step, each in two views.
    batch=64,
    lr=1e-3,
    warmup=50,
    # The loss is the contrast of class tokens plus so many times the squared error of what the
    # register draws, see `pretrained`. With 50 the class token keeps more of colour and place, and
    # tuning brings less.
    drawing=10.0,
)


def main():
    """Stage 1 from the command line: check, build or restore, then the loop. Raises UserError."""
    args = options()
    initial = RepTok.load(args.init) if args.init else None
    if initial:
        args.pixels = initial.pixels
        args.predict = initial.decoder.config["predict"]
    complete(args, SETTINGS, initial)

    # The processes of torchrun, or this one alone.
    ranks = Ranks(args.device, args.dtype, args.batch, args.accumulate)
    device = ranks.device
    args.dtype = ranks.dtype
    folder = Path(args.out)
    out = folder / "stage1.pt"
    if args.data:
        pictures = Pictures(args.data, args.pixels, ranks)
    else:
        pictures = Shapes(args.pixels, args.seed)
    ranks.lock(folder)
    workers = args.workers
    if workers is None:
        # Reading files takes processes; a small set of pictures stays in memory.
        workers = 4 if device.type == "cuda" and not pictures.small else 0

    # Go on with a stopped run, or from --init, or begin with a new decoder.
    saved = checkpoint_to_resume(out, args, pictures.fingerprint, ranks)
    if saved and saved["step"] >= args.steps:
        if not (folder / "tokens.pt").exists():
            model = RepTok.from_checkpoint(saved, out).to(device)
            sample.write_tokens(folder, model, pictures, ranks, args.flip, workers)
        return say_finished(out, saved["step"])
    if saved:
        model = RepTok.from_checkpoint(saved, out, averaged=False)
    elif initial:
        model = RepTok(initial.tokenizer, initial.decoder, initial.vae)
    else:
        model = build(args, pictures, ranks)
    model.class_names = pictures.class_names
    model.to(device)
    model.tokenizer.vit.checkpointing = args.checkpointing
    model.decoder.checkpointing = args.checkpointing

    # What is trained: of the tokenizer the class-token embedding, and the decoder. Tokenizer and
    # RepTok have frozen all else.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = new_optimizer(trained, args.lr, args.token_lr, args.beta2)
    ema = EMA(trained, args.ema)
    first = restore(saved, optimizer, ema) if saved else 0

    # The same two networks, whose gradients are averaged over all processes.
    tokenizer = ranks.wrap(model.tokenizer, args.compile)
    decoder = ranks.wrap(model.decoder, args.compile)

    # With --cache, what frozen networks give for a picture is computed once and read from files.
    data = cached(pictures, model, args, ranks, workers) if args.cache else pictures
    order = picture_order(len(pictures), args, ranks, first)
    batches = sample.load_batches(data, order, device, workers)
    side = model.decoder.config["size"]
    shape = (args.batch, model.decoder.config["channels"], side, side)
    log = Log(out, args, SETTINGS, ranks, first, pictures.names, pictures.class_names, trained)
    flip_share = 0.5 if args.flip else 0.0
    # A list, filled by Ctrl-C and SIGTERM.
    signals = catch_signals()

    # images: the pictures of this process, (B,3,S,S), then their numbers. kept: with --cache what
    # frozen networks gave for them, three tensors (B,V,...), else nothing.
    for step, (images, _, kept) in enumerate(batches, first):
        # Every process draws for the whole batch and takes its share, so that the numbers depend
        # neither on the number of processes nor on accumulation.
        random = generator(args.seed, step, device, stream=0)
        normal = torch.randn(args.batch, generator=random, device=device)
        t = ranks.share(torch.sigmoid(normal + args.t_mean))        # (B,)
        noise = ranks.share(torch.randn(shape, generator=random, device=device))  # (B,C,h,w)
        vae_noise = ranks.share(torch.randn(shape, generator=random, device=device))
        mirror = ranks.share(torch.rand(args.batch, generator=random, device=device) < flip_share)
        x = torch.where(mirror[:, None, None, None], images.flip(-1), images)

        # The means of loss, flow and cosine over this process's pictures.
        means = torch.zeros(3, device=device)
        b = args.batch // ranks.world // args.accumulate
        for n in range(args.accumulate):
            # Micro-batch n, of b pictures.
            part = slice(n * b, (n + 1) * b)
            if ranks.world > 1:
                # Gradients are averaged over the processes once a step, after the last micro-batch.
                tokenizer.require_backward_grad_sync = n + 1 == args.accumulate
                decoder.require_backward_grad_sync = n + 1 == args.accumulate

            with ranks.autocast():
                # What is frozen: the VAE, which gives the latents, and the untuned encoder's z0.
                if args.cache:
                    mean, logvar, z0 = [pick_view(u[part], mirror[part]) for u in kept]
                else:
                    mean, logvar, z0 = run_frozen(model, x[part])
                latents = model.vae.sample(mean, logvar, vae_noise[part])  # (b,C,h,w)

                z = tokenizer(x[part])                              # (b,K,D)
                s = t[part][:, None, None, None]
                x_t = (1 - s) * noise[part] + s * latents           # (b,C,h,w)
                v = decoder(x_t, t[part], z)                        # (b,C,h,w)

            # Eq. 1. Through z its gradient reaches the class-token embedding (Eq. 2).
            flow = (v.float() - (latents - noise[part])).square().flatten(1).mean(1)  # (b,)
            # Eq. 3: z stays near z0.
            cosine = cosine_loss(z, z0)                             # (b,)
            loss = (flow + args.lam * cosine).mean()
            (loss / args.accumulate).backward()
            means += torch.stack([loss, flow.mean(), cosine.mean()]).detach() / args.accumulate

        norm = nn.utils.clip_grad_norm_(trained.values(), CLIP_GRAD)
        factor = rate_factor(step, args)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["rate"]
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)

        end = step + 1 == args.steps or ranks.any_process(signals)
        save = end or (step + 1) % args.save_every == 0
        log.bar.update()
        if save or (step + 1) % args.log_every == 0:
            means = ranks.sum(means / ranks.world)
            # Raises UserError if the loss is not finite.
            log.write(step + 1, ("loss", "flow", "cosine"), means, norm, factor * args.lr)
        if save and ranks.main:
            save_run(out, step + 1, args, model, pictures.fingerprint, optimizer, ema)
        if ranks.main and (end or picture_due(step + 1, args.steps)):
            with ema.applied(), torch.no_grad(), ranks.autocast():
                # Ten to look at; at the end, a hundred to measure what tuning has brought.
                shown = to_show(pictures, args, 100 if end else 10)  # (n,3,S,S)
                shown_z = model.encode(shown)                       # (n,K,D)
                shown_z0 = model.tokenizer.z0(shown.to(device))     # (n,K,D)
                from_z0 = model.decode(shown_z0, steps=20)          # (n,3,S,S)
                from_z = model.decode(shown_z, steps=20)            # (n,3,S,S)
            sample.save_grid(out.with_suffix(".png"), [shown[:10], from_z0[:10], from_z[:10]])
        if end:
            break

    log.close()
    if step + 1 < args.steps:
        exit_interrupted(out, step + 1, args, ranks)
    # The pictures' last use: each becomes a token.
    with ema.applied():
        sample.write_tokens(folder, model, pictures, ranks, args.flip, workers)
    if ranks.main:
        print(f"{out}, {folder / 'tokens.npy'}; next: python train_stage2.py --out {args.out}")
        print(lesson(args, model.tokenizer, pictures, shown, from_z0, from_z, shown_z0, shown_z))


# ---- Below: what stage 1 is built from, and its command line
@torch.no_grad()
def run_frozen(model, x):
    """What frozen networks give for images (b,3,S,S): mean and log-variance of the latents, each
    (b,C,h,w), and z0 (b,K,D), the token of the untuned encoder."""
    mean, logvar = model.vae.posterior(x)
    return mean.float(), logvar.float(), model.tokenizer.z0(x).float()


def cached(pictures, model, args, ranks, workers):
    """Pictures together with the outputs of their frozen networks, which are computed once and kept
    in OUT in float16: [i] -> image, number, mean (V,C,h,w), logvar (V,C,h,w), z0 (V,K,D)."""
    networks = (model.tokenizer.original or model.tokenizer.vit, model.vae)
    what = f"{pictures.fingerprint} {args.flip} {args.dtype} {model.tokenizer.positions}"
    mark = hashlib.sha256(f"{what} {sample.digest(*networks)}".encode()).hexdigest()[:12]
    names = ("mean", "logvar", "z0", "read")
    paths = [Path(args.out, f"cache-{mark}-{name}.npy") for name in names]
    if args.fresh or not all(path.exists() for path in paths):
        # No process may write before all have looked whether the files are there.
        ranks.barrier()
        read = sample.compute_once(
            paths[:3], lambda x: run_frozen(model, x), pictures, ranks, args.flip, workers
        )
        if ranks.main:
            fid.write_file(paths[3], lambda file: np.save(file, read.numpy()))
        ranks.barrier()
    *arrays, read = [np.load(path, mmap_mode="r") for path in paths]
    return Cached(pictures, arrays, read)


class Cached(torch.utils.data.Dataset):
    """Pictures with the rows of mapped arrays (N,V,...): [i] -> image, number, tensors (V,...).

    read (N,): which picture was read when row i was computed, another than i where i was damaged.
    """

    def __init__(self, pictures, arrays, read):
        self.pictures = pictures
        self.arrays = arrays
        self.read = read

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, i):
        x, j = self.pictures[int(self.read[i])]
        rows = [torch.from_numpy(array[j].copy()) for array in self.arrays]
        return [x, j, *rows]


def pick_view(u, mirror):
    """Of each row of u (b,V,...) the view that is mirrored or not, (b,...) float32."""
    rows = torch.arange(len(u), device=u.device)
    return u[rows, mirror.long()].float()


def lesson(args, tokenizer, pictures, shown, from_z0, from_z, z0, z):
    """The last line of a run: what tuning the token has brought, on images (n,3,S,S) and tokens
    (n,K,D)."""
    which = "training pictures" if pictures.source else "held-out shapes"
    real = fid.to_uint8(shown.cpu())
    psnr = fid.psnr(real, fid.to_uint8(from_z.cpu())).mean()
    psnr0 = fid.psnr(real, fid.to_uint8(from_z0.cpu())).mean()
    cosine = 1 - cosine_loss(z, z0).mean()
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    total = sum(p.numel() for p in tokenizer.vit.parameters())
    line = f"{which}: PSNR {psnr:.2f} dB from z, {psnr0:.2f} dB from z0; cos(z, z0) {cosine:.3f}; "
    line += f"{trained:,} of {total:,} encoder numbers trained"
    if trained:
        # An encoder that this run has trained itself is there, and need not be trained again.
        encoder = "" if args.encoder or args.init else f"--encoder {args.out}/encoder.pt "
        line += f"; to compare: the same with {encoder}--unfreeze none --out {args.out}-frozen"
    return line


def build(args, pictures, ranks):
    """New networks for this run, on the CPU. Raises UserError."""
    if args.size != "nano" and not (args.vae and args.encoder):
        raise UserError(
            f"--size {args.size}: give --encoder dinov2_vitb14_reg and --vae FILE; "
            "see docs/weights.md"
        )
    vae = dec.load_vae(args.vae) if args.vae else dec.PixelSpace()
    shape = dict(SIZES[args.size]["decoder"], channels=vae.channels, size=args.pixels // vae.factor)
    multiple = vae.factor * shape.get("patch", 2)
    if args.pixels % multiple:
        raise UserError(
            f"--pixels {args.pixels}: does not divide into patches; give a multiple of {multiple}"
        )
    if args.encoder == "random":
        vit = new_vit(args)
    elif args.encoder:
        vit = tok.load_encoder(ranks.fetch(args.encoder))
    else:
        vit = tok.load_encoder(pretrained(args, pictures, ranks))
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(vit, args.token, args.unfreeze)
    decoder = dec.Decoder(
        **shape,
        token_dim=tokenizer.width,
        K=tokenizer.K,
        predict=args.predict,
        t_max=latest_time(args.t_mean),
    )
    return RepTok(tokenizer, decoder, vae)


def latest_time(t_mean):
    """A time later than which training draws one in 75,000: that of 4.2 standard deviations."""
    return round(1 / (1 + math.exp(-t_mean - 4.2)), 3)


def new_vit(args):
    """An untrained ViT: nano's own, or DINOv2 ViT-B/14's shape with registers."""
    torch.manual_seed(args.seed)
    if args.size == "nano":
        return ViT(pixels=args.pixels, grid=args.pixels // 4, hidden=256, registers=1)
    return ViT(
        width=768,
        depth=12,
        heads=12,
        hidden=3072,
        patch=14,
        grid=37,
        registers=4,
        layer_scale=True,
        pixels=224,
        mean=tok.IMAGENET[0],
        std=tok.IMAGENET[1],
    )


def pretrained(args, pictures, ranks):
    """Nano's own encoder where none is given: a small ViT, trained on the pictures. Returns the
    path of OUT/encoder.pt.

    It stands in for DINOv2. Like DINOv2 it learns without labels: its class token learns to be the
    same for two views of a picture, moved and recoloured, and so keeps what the views share, the
    shape; its one register learns to draw its view, so that the network can compute colour and
    place too, which DINOv2's registers and patches hold better than its class token (the paper's
    Table 5). DINOv2 learns from a teacher and from masked patches, on 142 million photographs; this
    one by contrast within a batch (SimCLR) and by drawing, on the pictures of the run."""
    path = Path(args.out, "encoder.pt")
    settings = {name: getattr(args, name) for name in ("seed", "pretrain_steps", "pixels")}
    settings["data"] = pictures.fingerprint
    if path.exists() and not args.fresh:
        refuse_changes(path, load_checkpoint(path, ["encoder"])["settings"], settings)
        return path
    if ranks.main:
        print("No --encoder given: a small ViT is trained on the pictures first, without labels")
        vit = train_encoder(args, pictures, ranks.device, path.with_name("stage1.png"))
        # In float16 the file is half as large.
        state = {name: tensor.half() for name, tensor in vit.cpu().state_dict().items()}
        save_checkpoint(
            path, {"kind": "encoder", "settings": settings, "config": vit.config, "state": state}
        )
    # The others wait for the file.
    ranks.barrier()
    return path


def train_encoder(args, pictures, device, preview):
    """Returns the small ViT of `pretrained`; the file `preview` shows pictures, and below what its
    register draws."""
    vit = new_vit(args).to(device)
    width = vit.pos_embed.shape[-1]
    # From the register to the pixels of its view.
    draw = nn.Linear(width, 3 * args.pixels**2).to(device)
    trained = {**dict(vit.named_parameters()), **dict(draw.named_parameters())}
    optimizer = new_optimizer(trained, ENCODER["lr"])
    shown = to_show(pictures, args, 10).to(device)                 # (10,3,S,S)
    batch = min(ENCODER["batch"], len(pictures))
    random = torch.Generator(device).manual_seed(args.seed)
    shuffle = torch.Generator().manual_seed(args.seed)
    # The pictures that this epoch has left.
    order = []
    for step in tqdm(range(args.pretrain_steps), "encoder", dynamic_ncols=True):
        if len(order) < batch:
            order = torch.randperm(len(pictures), generator=shuffle).tolist()
        chosen = order[:batch]
        order = order[batch:]
        x = sample.to_float(torch.stack([pictures[i][0] for i in chosen])).to(device)  # (B,3,S,S)
        views = torch.cat([tok.augment(x, random), tok.augment(x, random)])  # (2B,3,S,S)
        tokens = vit(views)                                         # (2B,2+N,D)
        cls = tokens[:, 0]                                          # (2B,D)
        register = tokens[:, 1]                                     # (2B,D)
        contrast = tok.contrastive_loss(*cls.chunk(2))
        drawing = F.mse_loss(draw(register), views.flatten(1))
        loss = contrast + ENCODER["drawing"] * drawing
        loss.backward()
        factor = rise_stay_fall(step, args.pretrain_steps, ENCODER["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = factor * group["rate"]
        optimizer.step()
        optimizer.zero_grad()
        if picture_due(step + 1, args.pretrain_steps):
            with torch.no_grad():
                drawn = draw(vit(shown)[:, 1]).view_as(shown)       # (10,3,S,S)
            sample.save_grid(preview, [shown, drawn])
    return vit


def rise_stay_fall(step, steps, warmup):
    """The share of the learning rate in a short run: up in a line over `warmup` steps, flat to half
    of the run, and down to 0 in a line."""
    return min(1.0, (step + 1) / max(1, warmup), 2 * (1 - step / steps))


def picture_due(step, steps):
    """Whether the picture of a run is drawn after `step` of `steps`: early once, then ten times in
    a long run."""
    return step == 10 or step % max(30, steps // 10) == 0


def to_show(pictures, args, count):
    """Images (count,3,S,S) to look at: held-out shapes, or some of the pictures of --data, which
    are trained on."""
    if pictures.source:
        count = min(count, len(pictures))
        # The order lets the first ten, too, spread over all pictures.
        order = sorted(range(count), key=lambda i: i % max(1, count // 10))
        numbers = [i * len(pictures) // count for i in order]
        return sample.to_float(torch.stack([pictures[i][0] for i in numbers]))
    shapes = [draw_shape(plan_shape(i, args.seed + 1), args.pixels) for i in range(count)]
    return sample.to_float(torch.from_numpy(np.stack(shapes)).permute(0, 3, 1, 2))


def options():
    """The command line of stage 1."""
    p = sample.Parser(__doc__)
    common_options(p, SETTINGS)
    setting = functools.partial(add_setting, p, SETTINGS)
    p.section = p.sections["data"]
    p.add("--data", None, "folder (sub-folders are classes), .tar or .tar shards; default: shapes")
    p.add("--flip", False, "mirror half of the pictures, at random", action="store_true")
    p.section = p.sections["model"]
    p.add(
        "--encoder",
        None,
        "encoder.pt, a file or name of docs/weights.md, or 'random'; default: nano's own",
    )
    p.add("--vae", None, "SD VAE file; default: nano works on pixels")
    p.add("--init", None, "checkpoint (ours or the authors') to fine-tune from")
    setting("--pixels", "side of the pictures", type=whole(1))
    p.add("--unfreeze", "token", "what of the encoder is trained", choices=["token", "all", "none"])
    p.add(
        "--token",
        "cls",
        "read class token, first register, or all (K = 1 + registers)",
        choices=["cls", "reg", "all"],
    )
    p.section = p.sections["optimisation"]
    setting("--lam", "lambda, the weight of the cosine term, Eq. 3", type=number(0))
    setting("--token-lr", "the token embedding learns so many times faster", type=number(0))
    setting("--predict", "the decoder's output", choices=["velocity", "data"])
    setting("--t-mean", "t = sigmoid(N(this,1)); less than 0 favours noise", type=number(-10, 10))
    p.section = p.sections["rarely needed"]
    action = argparse.BooleanOptionalAction
    setting("--cache", "keep frozen networks' outputs in files", action=action)
    p.add(
        "--checkpointing",
        False,
        "recompute activations: less memory, more time",
        action="store_true",
    )
    p.add("--pretrain-steps", 2000, "steps of nano's own encoder, 64 pictures each", type=whole(1))
    args = p.parse_args()

    def refuse(why, *names):
        """Raises UserError where one of these options was given."""
        for name in names:
            if getattr(args, name) != p.get_default(name):
                raise UserError(f"--{name.replace('_', '-')}: {why}; leave the option out")

    if args.init:
        refuse("--init takes its networks from the checkpoint", "encoder", "vae", "pixels")
        refuse("--init takes its networks from the checkpoint", "unfreeze", "token", "predict")
    if args.init or args.encoder or args.size not in (None, "nano"):
        refuse("this run trains no encoder of its own", "pretrain_steps")
    if args.encoder == "random":
        refuse("--encoder random trains all, lambda 0", "unfreeze", "lam")
        args.unfreeze = "all"
        args.lam = 0.0
    return args


# ---- Below: shared by both trainers. First optimizer, averages, log, checkpoints
def new_optimizer(trained, lr, token_lr=1.0, beta2=0.999):
    """AdamW without weight decay for {name: parameter}. token_lr: the learning rate of the
    tokenizer's embedding, in lr. Each group keeps its rate, before warm-up and decay, as "rate"."""
    embedding = []
    others = []
    for name, p in trained.items():
        if name == "tokenizer.embedding":
            embedding.append(p)
        else:
            others.append(p)
    groups = [
        {"params": embedding, "rate": lr * token_lr},
        {"params": others, "rate": lr},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr, (0.9, beta2), weight_decay=0.0, fused=True)


def rate_factor(step, args):
    """The share of the learning rate: linear warm-up, then constant; for nano as in
    `rise_stay_fall`."""
    if args.decay:
        return rise_stay_fall(step, args.steps, args.warmup)
    return min(1.0, (step + 1) / max(1, args.warmup))


class EMA:
    """Moving average of the trained parameters. The decay warms up; otherwise short runs keep their
    initial weights."""

    def __init__(self, trained, decay):
        self.parameters = list(trained.values())
        self.average = {name: p.detach().clone() for name, p in trained.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self, step):
        """After the optimizer's step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), self.parameters, 1 - decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self):
        """Within it the networks hold the averaged weights."""
        kept = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, list(self.average.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, kept)


def catch_signals():
    """A list, empty until Ctrl-C or SIGTERM asks to finish the step, save and stop; launchers may
    send several."""
    asked = []

    def ask(which, frame):
        asked.append(which)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return asked


class Log:
    """Progress bar and OUT/NAME.jsonl, a line per logged step."""

    def __init__(self, out, args, settings, ranks, first, names, class_names, trained):
        self.args = args
        self.ranks = ranks
        self.first = first
        self.since = (time.perf_counter(), first)
        if ranks.main:
            print(
                f"{out.stem}: size {args.size}, {len(names)} pictures, {len(class_names)} classes; "
                f"{sum(p.numel() for p in trained.values()):,} trained weights; "
                f"{ranks.dtype} on {ranks.device}; batch {args.batch}, "
                f"{args.batch // ranks.world // args.accumulate} per pass; steps "
                f"{first} to {args.steps}"
            )
            values = [f"{name.replace('_', '-')} {getattr(args, name)}" for name in settings]
            print(f"settings: {', '.join(values)}")
            path = out.with_suffix(".jsonl")
            lines = path.read_text().splitlines() if first and path.exists() else []
            # A line is out as soon as it is written.
            self.file = open(path, "w", buffering=1)
            for line in lines:
                # Later lines are left out: their steps come again.
                if line.endswith("}") and json.loads(line)["step"] <= first:
                    print(line, file=self.file)
        self.bar = tqdm(
            total=args.steps,
            initial=first,
            disable=not ranks.main,
            desc=out.stem,
            dynamic_ncols=True,
        )

    def write(self, step, names, means, norm, lr):
        """A line of the mean losses, of which the first is what is minimised, the gradient's norm
        and the learning rate. Raises UserError if one is not finite: weights never recover from
        that."""
        values = dict(zip(names, means.tolist()), norm=norm.item(), lr=lr)
        self.loss = values["loss"]
        if not math.isfinite(values["loss"] + values["norm"]):
            raise UserError(
                f"loss not finite at step {step}; the last checkpoint is good: run the same again "
                "with a smaller --lr or --dtype float32"
            )
        then, before = self.since
        self.since = (time.perf_counter(), step)
        seconds = (self.since[0] - then) / max(1, step - before)
        rate = round(self.args.batch / seconds, 1)
        told = self.first + 50
        # Once, when the speed is known.
        if self.ranks.main and before < told <= step < self.args.steps:
            left = tqdm.format_interval(seconds * (self.args.steps - step))
            sample.tell(f"{rate} images/s: {left} left; for less time, reduce --steps or --size")
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {1e3 * seconds:.0f} ms, {rate:.0f} images/s", False
        )
        if self.ranks.main:
            print(json.dumps({"step": step, **values, "images_per_second": rate}), file=self.file)

    def close(self):
        """The end of the loop, when all processes are there; signals mean again what they usually
        do."""
        self.ranks.barrier()
        self.bar.close()
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.default_int_handler)


def exit_interrupted(out, step, args, ranks):
    """End an interrupted run, with a status by which `a && b` does not go on with b."""
    if ranks.main:
        print(
            f"{out}: step {step} of {args.steps}; interrupted; run the same command without "
            "--fresh to resume"
        )
    sys.exit(sample.INTERRUPTED)


def save_run(path, step, args, model, data, optimizer, ema):
    """A checkpoint from which the run can go on. data: the fingerprint of what it trains on."""
    save_checkpoint(
        path,
        {
            **model.content(),
            "step": step,
            "settings": {**vars(args), "data": data},
            "ema": ema.average,
            "optimizer": optimizer.state_dict(),
        },
    )


# Settings that may change when a run is resumed. None changes a loss, except --steps at nano,
# whose schedule it sets.
MAY_CHANGE = {
    "out",
    "steps",
    "log_every",
    "save_every",
    "device",
    "workers",
    "fresh",
    "accumulate",
    "compile",
    "checkpointing",
    "stage1",
    "tokens",
}
# These change losses, and may be changed against a loss that is not finite; a line says so.
CHANGE_IS_TOLD = {"lr", "dtype"}


def checkpoint_to_resume(path, args, data, ranks):
    """The checkpoint that this run goes on from, or None. data: the fingerprint of what it trains
    on. Raises UserError where settings differ."""
    if args.fresh or not path.exists():
        return None
    content = load_checkpoint(path, [path.stem])
    if "settings" not in content:
        raise UserError(
            f"{path}: an export cannot be resumed; give it to --init or --stage1, "
            "with another --out"
        )
    then = content["settings"]
    now = {**vars(args), "data": data}
    # The size is compared first, because other settings depend on it.
    kept = now.keys() - MAY_CHANGE - CHANGE_IS_TOLD
    names = sorted(kept, key=lambda name: (name != "size", name))
    refuse_changes(path, then, {name: now[name] for name in names})
    for name in sorted(CHANGE_IS_TOLD):
        if now[name] != then.get(name) and ranks.main:
            sample.tell(
                f"--{name} is {now[name]} from step {content['step']} on; it was {then.get(name)}"
            )
    return content


def say_finished(path, step):
    """The sentence of a run that has nothing to do."""
    print(f"{path} is finished at step {step}; give a larger --steps to resume it")


def refuse_changes(path, then, now):
    """UserError where a setting is not what it was when the file at `path` was made."""
    for name, value in now.items():
        was = then.get(name)
        # The checkpoint holds what was read from a file that has moved.
        moved = (
            name in ("encoder", "vae", "init", "clip", "bpe")
            and Path(f"{value}").name == Path(f"{was}").name
        )
        if value == was or moved:
            continue
        if name == "data":
            how = "the pictures, or their tokens, are not those with which it was begun"
        else:
            how = f"--{name.replace('_', '-')} is {value} but was {was}"
        raise UserError(f"{path}: {how}; use the same, another --out, or --fresh")


def restore(content, optimizer, ema):
    """Optimizer and averages of a checkpoint; returns the step that comes next."""
    rates = [group["rate"] for group in optimizer.param_groups]
    optimizer.load_state_dict(content["optimizer"])
    for group, rate in zip(optimizer.param_groups, rates):
        # The rate of now, where --lr is another.
        group["rate"] = rate
    torch._foreach_copy_(list(ema.average.values()), [content["ema"][name] for name in ema.average])
    return content["step"]


def generator(seed, step, device, stream):
    """Random numbers that depend on (seed, step) and their use, never on processes, accumulation or
    restarts."""
    return torch.Generator(device).manual_seed((seed * 1_000_000_007 + step) * 8 + stream)


# ---- Shared: pictures
# How many pictures the default data has.
NUM_SHAPES = 10_000
SHAPES = [
    "bar",
    "circle",
    "cross",
    "diamond",
    "heart",
    "moon",
    "ring",
    "square",
    "star",
    "triangle",
]
COLOURS = {
    "black": (15, 15, 15),
    "white": (240, 240, 240),
    "grey": (128, 128, 128),
    "red": (200, 30, 30),
    "green": (40, 160, 40),
    "dark blue": (25, 25, 130),
    "light blue": (120, 190, 245),
    "yellow": (240, 220, 40),
    "purple": (150, 40, 180),
    "orange": (240, 130, 20),
}
PALETTE = np.array(list(COLOURS.values()))                          # (10,3)
# The smallest and the largest radius of a shape, as a share of the picture's side.
RADII = (0.26, 0.42)
CAPTIONS = [
    "a {size} {ink} {shape} on a {ground} ground",
    "on {ground}, a {size} {ink} {shape}",
    "a {size} {shape}, {ink}, on a {ground} background",
    "the {size} {shape} in {ink} on {ground}",
    "{ground} ground with a {size} {ink} {shape}",
]


@dataclasses.dataclass
class ShapePlan:
    """What one picture of the default data shows."""

    shape: str  # one of SHAPES, which is its class
    size: float  # radius, as a share of the picture's side
    place: np.ndarray  # (2,) how far right and down of the middle, as a share of the side
    turn: float  # degrees
    ink: np.ndarray  # (3,) red, green, blue of the shape, 0 to 255
    ground: np.ndarray  # (3,) the same of what lies around it
    captions: list  # texts that name shape, colours and, at the ends of its range, size


def plan_shape(i, seed):
    """The plan of picture i, a function of (i, seed) alone. Everything but the shape's name is a
    detail that a class token which knows only the class cannot tell."""
    rng = np.random.default_rng([seed, i])
    shape = SHAPES[rng.integers(len(SHAPES))]
    size = rng.uniform(*RADII)
    place = rng.uniform(-0.1, 0.1, 2)
    turn = rng.uniform(-15, 15)
    ink, ground = rng.integers(256, size=(2, 3)).astype(float)
    # Colours that are too alike would hide the shape.
    while np.abs(ink - ground).sum() < 250:
        ink, ground = rng.integers(256, size=(2, 3)).astype(float)
    words = {
        "shape": shape,
        "size": size_word(size),
        "ink": nearest_colour(ink),
        "ground": nearest_colour(ground),
    }
    # Joining the words again removes the gap where a size is not named.
    captions = [" ".join(text.format(**words).split()) for text in CAPTIONS]
    captions = [text.replace("a orange", "an orange") for text in captions]
    return ShapePlan(shape, size, place, turn, ink, ground, captions)


def size_word(size):
    """The word for a size: small in the lower two fifths of RADII, large in the upper two, else
    none."""
    share = (size - RADII[0]) / (RADII[1] - RADII[0])
    if share < 0.4:
        return "small"
    return "large" if share > 0.6 else ""


def nearest_colour(rgb):
    """The name in COLOURS that is nearest to rgb (3,), 0 to 255, by the sum of absolute
    differences."""
    distance = np.abs(PALETTE - rgb).sum(1)                         # (10,)
    return list(COLOURS)[distance.argmin()]


def circle_of(points, radii=(1.0,)):
    """Corners (points,2) on a circle, from its top on, x to the right and y down. Radii alternate,
    as in a star."""
    angle = 2 * np.pi * np.arange(points) / points
    radius = np.resize(radii, points)
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)


def heart_outline():
    """Corners (60,2) of the well-known heart of sines and cosines."""
    a = 2 * np.pi * np.arange(60) / 60
    x = 16 * np.sin(a) ** 3
    y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return np.stack([x, 1 - y], 1) / 16.5


# The outline of each shape at radius 1: corners (n,2), x to the right and y down.
OUTLINES = {
    "bar": [(-0.3, -1.1), (0.3, -1.1), (0.3, 1.1), (-0.3, 1.1)],
    "circle": circle_of(60),
    "cross": [
        (-0.3, -1),
        (0.3, -1),
        (0.3, -0.3),
        (1, -0.3),
        (1, 0.3),
        (0.3, 0.3),
        (0.3, 1),
        (-0.3, 1),
        (-0.3, 0.3),
        (-1, 0.3),
        (-1, -0.3),
        (-0.3, -0.3),
    ],
    "diamond": [(0, -1.1), (0.72, 0), (0, 1.1), (-0.72, 0)],
    "heart": heart_outline(),
    "moon": circle_of(60),
    "ring": circle_of(60),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "star": circle_of(10, radii=(1.12, 0.47)),
    "triangle": [(0, -0.95), (0.95, 0.75), (-0.95, 0.75)],
}
# What is cut out of two of them.
HOLES = {
    "moon": 0.85 * circle_of(60) + (0.5, -0.15),
    "ring": 0.55 * circle_of(60),
}


def draw_shape(plan, size):
    """A planned picture, uint8 (size,size,3)."""
    # It is drawn large, then averaged down, for smooth edges.
    big = 8 * size
    mask = Image.new("L", (big, big))
    paint = ImageDraw.Draw(mask)
    angle = math.radians(plan.turn)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])

    def corners_of(outline):
        corners = plan.size * np.array(outline) @ rotation + plan.place + 0.5
        return [tuple(corner) for corner in big * corners]

    paint.polygon(corners_of(OUTLINES[plan.shape]), fill=255)
    if plan.shape in HOLES:
        paint.polygon(corners_of(HOLES[plan.shape]), fill=0)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    share = np.asarray(mask, np.float32)[..., None] / 255           # (size,size,1)
    return (plan.ground + share * (plan.ink - plan.ground)).round().astype(np.uint8)


class Shapes(Pictures):
    """The default data: NUM_SHAPES drawn shapes of a seed. Their names say which they are, see
    plan_of."""

    def __init__(self, pixels, seed=0):
        self.source = None
        self.plans = [plan_shape(i, seed) for i in range(NUM_SHAPES)]
        names = [f"shape {i} of seed {seed}" for i in range(NUM_SHAPES)]
        self.set_up(pixels, names, [plan.shape for plan in self.plans])

    def open(self, i):
        """uint8 (3,pixels,pixels) of shape i."""
        return torch.from_numpy(draw_shape(self.plans[i], self.pixels)).permute(2, 0, 1)


def plan_of(name):
    """The plan of a shape from its name in Shapes.names."""
    _, i, _, _, seed = name.split()
    return plan_shape(int(i), int(seed))


def picture_order(n, args, ranks, first=0):
    """Yields this process's picture numbers of each step. Every epoch is a permutation that depends
    on (seed, epoch) alone, and an epoch may end within a batch; so nothing about the position has
    to be saved."""

    @functools.lru_cache(1)
    def permutation(epoch):
        return np.random.default_rng([args.seed, epoch]).permutation(n)

    share = args.batch // ranks.world
    for step in range(first, args.steps):
        start = step * args.batch + ranks.rank * share
        yield [
            int(permutation(position // n)[position % n])
            for position in range(start, start + share)
        ]


# ---- Shared: options
def add_setting(p, settings, name, help, **kwargs):
    """An option whose default stands in a table of settings."""
    others, nano = settings[name.strip("-").replace("-", "_")]
    default = f"{others}" if others == nano else f"nano: {nano}; else {others}"
    p.add(name, None, f"{help} (default: {default})", **kwargs)


def common_options(p, settings):
    """The options of both trainers, in the groups of --help."""
    setting = functools.partial(add_setting, p, settings)
    p.sections = {
        name: p.add_argument_group(name)
        for name in ("data", "model", "optimisation", "rarely needed")
    }
    p.section = p.sections["data"]
    p.add("--out", "out", "folder for checkpoint, log, pictures and tokens")
    p.add("--fresh", False, "start again and overwrite --out", action="store_true")
    p.section = p.sections["model"]
    p.add("--size", None, "network size; default: the checkpoint's, or nano", choices=[*SIZES])
    p.section = p.sections["optimisation"]
    setting("--steps", "optimizer steps in all", type=whole(1))
    setting("--batch", "pictures per step, over all GPUs and micro-batches", type=whole(1))
    p.add(
        "--accumulate", 1, "micro-batches per GPU and step; more of them save memory", type=whole(1)
    )
    setting("--lr", "AdamW's learning rate after warm-up", type=number(0))
    setting("--warmup", "steps of linear warm-up", type=whole(0))
    setting("--ema", "decay of the averaged weights", type=number(0, 1))
    p.add("--seed", 0, "seed of weights, picture order and noise", type=whole(0))
    p.section = p.sections["rarely needed"]
    p.add("--log-every", 20, "steps between lines of the log", type=whole(1))
    setting("--save-every", "steps between checkpoints", type=whole(1))
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
    p.add(
        "--workers",
        None,
        "processes that read files (default: 4 with a GPU, else 0)",
        type=whole(0),
    )
    p.add("--compile", False, "torch.compile the networks", action="store_true")


def complete(args, settings, model=None):
    """Fill in what was left open: the size, from the checkpoint `model` where there is one, and
    then the settings of that size. Raises UserError."""
    if args.size is None and model:
        width = model.decoder.config["width"]
        fitting = [size for size, shape in SIZES.items() if shape["decoder"]["width"] == width]
        if not fitting:
            raise UserError(
                f"--size: checkpoint's decoder width {width} fits none of "
                f"{', '.join(SIZES)}; give --size"
            )
        args.size = fitting[0]
    args.size = args.size or "nano"
    for name, values in settings.items():
        if getattr(args, name, None) is None:
            others, nano = values
            setattr(args, name, nano if args.size == "nano" else others)


LESS_MEMORY = "use a larger --accumulate, --checkpointing (stage 1) or a smaller --batch"
if __name__ == "__main__":
    sample.guarded(main, LESS_MEMORY)
