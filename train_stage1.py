"""Stage 1: train the decoder and, of the encoder, only the class-token embedding (RepTok, arXiv
2510.14630, Sec. 3).

    python train_stage1.py --encoder docs/encoder.pt   # coloured shapes: minutes on two cores
    python train_stage1.py --data FOLDER               # own pictures; sub-folders are classes
    torchrun --nproc-per-node 8 train_stage1.py --data imagenet/train --size XL ...  # see README

Writes OUT/stage1.pt (complete in itself), OUT/stage1.jsonl (one line per logged step),
OUT/stage1.png (pictures; what is drawn from the untuned token z0; what is drawn from z) and, if it
trains a small encoder first, OUT/encoder.pt. The same command resumes a stopped run.

The method is the loop in `main`. Below it: the parts of stage 1, then the code that both trainers
share. Letters: B pictures per step, b per micro-batch, K tokens per picture, D token width, S side
of a picture, (C,h,w) a latent."""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import re
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
from sample import Ranks, RepTok, load_checkpoint, number, save_checkpoint, to_float, whole
from tokenizer import Tokenizer, UserError, ViT, cosine_loss

# The networks of each size. All but nano work on 256 pixels, in SD-VAE latents, with a
# published encoder.
SIZES = {
    "nano": {
        "decoder": dict(width=128, depth=4, heads=4, patch=4, mapping=128, learned_positions=True),
        "mixer": dict(hidden=192, depth=3),
    },
    "S": {"decoder": dict(width=384, depth=12, heads=6), "mixer": dict(hidden=384, depth=12)},
    "B": {"decoder": dict(width=768, depth=12, heads=12), "mixer": dict(hidden=768, depth=16)},
    "L": {"decoder": dict(width=1024, depth=24, heads=16), "mixer": dict(hidden=1024, depth=24)},
    "XL": {"decoder": dict(width=1152, depth=28, heads=16), "mixer": dict(hidden=1280, depth=28)},
}
# Steps and batch are the paper's; what it leaves open is ours.
PAPER = dict(
    pixels=256,
    steps=10**6,
    batch=512,
    lr=1e-4,
    warmup=2000,
    decay=False,
    ema=0.9999,
    t_mean=0,
    cache=False,
    token_lr=1.0,
    predict="velocity",
    save_every=10_000,
)
# Nano is not in the paper: one setting for the drawn shapes and for own pictures, minutes long.
NANO = dict(
    pixels=16,
    steps=1600,
    batch=64,
    lr=3e-3,  # 30 times the usual one: the network is small and the run is short
    muon_lr=0.02,  # Muon for the decoder's matrices: AdamW alone needs far more steps
    # The embedding's rate is 10 times lr: AdamW moves each of its 128 numbers by about that a step.
    token_lr=10.0,
    warmup=50,
    decay=True,  # flat to half of the run, then a line to 0
    ema=0.99,
    # The decoder works on pixels, not on a VAE's latents; v follows, and the loss is Eq. 1 (JiT).
    predict="data",
    # Near noise the decoder has only the token to draw from, and learns to read it.
    t_mean=-2,
    cache=True,
    save_every=500,
)
# Nano's own encoder, where no --encoder is given.
ENCODER = dict(
    batch=64,  # each of them in two views
    lr=1e-3,
    muon_lr=0.01,
    warmup=50,
    drawing=10.0,  # weight of the register's squared error, which is small beside the contrast
)


def main():
    """Stage 1 from the command line: check, build or restore, then the loop. Raises UserError."""
    args = options()
    initial = RepTok.load(args.init) if args.init else None
    fill_defaults(args, PAPER, NANO, initial)
    if initial:
        args.predict = initial.decoder.config["predict"]
    if args.write_data:
        return write_data(args.write_data, args.num, args.seed, args.pixels)

    # The processes of torchrun, or this one alone.
    ranks = Ranks(args.device, args.dtype, args.batch, args.accumulate)
    device = ranks.device
    out = Path(args.out, "stage1.pt")
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(args.data, args.pixels, args.seed, ranks=ranks)

    # Go on with a stopped run, or from --init, or begin with a new decoder.
    # A finished run ends here.
    saved = checkpoint_to_resume(out, args, pictures.fingerprint)
    if saved:
        model = RepTok.from_checkpoint(saved, out, averaged=False)
    elif initial:
        model = RepTok(initial.tokenizer, initial.decoder, initial.vae)
    else:
        model = build(args, pictures, ranks)
    model.classes = pictures.classes
    model.data = (pictures.source, pictures.fingerprint)
    model.to(device)
    model.tokenizer.vit.checkpointing = args.checkpointing
    model.decoder.checkpointing = args.checkpointing

    # What is trained: of the tokenizer the class-token embedding, and the decoder.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = new_optimizer(trained, args.lr, args.muon_lr, args.token_lr)
    ema = EMA(trained, args.ema)
    first = restore(saved, optimizer, ema) if saved else 0

    # The same two networks, whose gradients are averaged over all processes.
    tokenizer = ranks.wrap(model.tokenizer, args.compile)
    decoder = ranks.wrap(model.decoder, args.compile)

    # What frozen networks give for a picture; with --cache it is computed once and read from a
    # file.
    frozen = frozen_networks(args, model.tokenizer, model.vae, pictures, ranks)
    order = picture_order(len(pictures), args, ranks, first)
    batches = load_batches(pictures, order, device, args.workers)
    side = model.decoder.config["size"]
    shape = (args.batch, model.decoder.config["channels"], side, side)
    log = Log(out, args, ranks, first, pictures, trained)
    signals = catch_signals()  # a list, filled by Ctrl-C and SIGTERM

    # x: the pictures of this process, (B,3,S,S).
    for step, (x, _, indices) in enumerate(batches, first):
        # Every process draws for the whole batch and takes its share, so that the numbers depend
        # neither on the number of processes nor on accumulation.
        random = generator(args.seed, step, device, stream=0)
        t = torch.sigmoid(torch.randn(args.batch, generator=random, device=device) + args.t_mean)
        noise = torch.randn(shape, generator=random, device=device)  # (B,C,h,w)
        vae_noise = torch.randn(shape, generator=random, device=device)
        mirror = torch.rand(args.batch, generator=random, device=device) < (0.5 if args.flip else 0)
        t = ranks.share(t)                                          # (B,)
        noise = ranks.share(noise)
        vae_noise = ranks.share(vae_noise)
        mirror = ranks.share(mirror)                                # (B,)
        x = torch.where(mirror[:, None, None, None], x.flip(-1), x)

        means = torch.zeros(3, device=device)  # of loss, flow, cosine
        size = len(x) // args.accumulate
        for n in range(args.accumulate):
            part = slice(n * size, (n + 1) * size)  # micro-batch n, of b pictures
            if ranks.world > 1:
                # Gradients are averaged over the processes once a step, after the last micro-batch.
                tokenizer.require_backward_grad_sync = n + 1 == args.accumulate
                decoder.require_backward_grad_sync = n + 1 == args.accumulate

            with ranks.autocast():
                # The VAE's posterior and the token of the untuned encoder.
                mean, logvar, z0 = frozen(x[part], indices[part], mirror[part])
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

        norm = nn.utils.clip_grad_norm_(trained.values(), args.clip_grad or math.inf)
        rate = set_learning_rate(optimizer, step, args)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)

        end = step + 1 == args.steps or ranks.any_process(signals)
        save = end or (step + 1) % args.save_every == 0
        log.bar.update()
        if save or (step + 1) % args.log_every == 0:
            loss, flow, cosine = ranks.sum(means / ranks.world).tolist()
            # Raises UserError if the loss is not finite.
            log.write(step + 1, loss=loss, flow=flow, cosine=cosine, norm=norm.item(), lr=rate)
        if save and ranks.main and log.due(end):
            save_run(out, step + 1, args, model, pictures.fingerprint, optimizer, ema)
        if ranks.main and (end or picture_due(step + 1, args.steps)):
            with ema.applied(), torch.no_grad(), ranks.autocast():
                shown = held_out(pictures, args, 100 if end else 10)  # (n,3,S,S)
                z = model.encode(shown)                             # (n,K,D)
                z0 = model.tokenizer.z0(shown.to(device))           # (n,K,D)
                from_z0 = model.decode(z0, steps=20)                # (n,3,S,S)
                from_z = model.decode(z, steps=20)                  # (n,3,S,S)
            sample.save_grid(out.with_suffix(".png"), [shown[:10], from_z0[:10], from_z[:10]])
        if end:
            break

    log.close(out, step + 1, f"next: python train_stage2.py --out {args.out}")
    if ranks.main:
        print(lesson(model.tokenizer, pictures, shown, from_z0, from_z, z0, z))


# ---- Below: what stage 1 is built from, and its command line
def lesson(tokenizer, pictures, shown, from_z0, from_z, z0, z):
    """The last line of a run: what tuning the token has brought, on images (n,3,S,S) and tokens
    (n,K,D)."""
    which = "training pictures" if pictures.source else "held-out shapes"
    psnr, psnr0 = (
        fid.psnr(fid.to_uint8(shown.cpu()), fid.to_uint8(x.cpu())).mean() for x in (from_z, from_z0)
    )
    cosine = 1 - cosine_loss(z, z0).mean()
    trained = sum(p.numel() for p in tokenizer.parameters() if p.requires_grad)
    total = sum(p.numel() for p in tokenizer.vit.parameters())
    line = f"{which}: PSNR {psnr:.2f} dB from z, {psnr0:.2f} dB from z0; cos(z, z0) {cosine:.3f}; "
    line += f"{trained:,} of {total:,} encoder numbers trained"
    return line + ("; to compare: the same with --unfreeze none --out frozen" if trained else "")


def frozen_networks(args, tokenizer, vae, pictures, ranks):
    """Returns a function: images (b,3,S,S), their indices (b,), mirrored or not (b,) -> the frozen
    networks' outputs, mean and log-variance of the latents (b,C,h,w), z0 (b,K,D); with --cache,
    from a file."""

    @torch.no_grad()
    def compute(x, *_):
        return [u.float() for u in (*vae.posterior(x), tokenizer.z0(x))]

    if not args.cache:
        return compute
    latent = (vae.channels, args.pixels // vae.factor, args.pixels // vae.factor)
    fields = [("mean", latent), ("logvar", latent), ("z0", (tokenizer.K, tokenizer.width))]
    digest = fingerprint(
        args, pictures, tokenizer.positions, tokenizer.original or tokenizer.vit, vae
    )
    rows = precompute("cache", digest, fields, pictures, ranks, args, compute)

    def read(x, indices, mirror):
        found = rows[indices.numpy()]
        views = [
            torch.from_numpy(found[name].copy()).to(ranks.device).float() for name, _ in fields
        ]  # each (b,V,...)
        # There are V = 2 views of a picture with --flip, otherwise one.
        return [u[torch.arange(len(u), device=u.device), mirror.long()] for u in views]

    return read


def build(args, pictures, ranks):
    """New networks for this run, on the CPU. Raises UserError."""
    if args.size != "nano" and not (args.vae and args.encoder):
        raise UserError(
            f"--size {args.size}: give --encoder dinov2_vitb14_reg and --vae FILE; "
            "see docs/weights.md"
        )
    vae = dec.load_vae(args.vae) if args.vae else dec.PixelSpace()
    if args.pixels % vae.factor:
        raise UserError(f"--pixels {args.pixels}: the VAE needs a multiple of {vae.factor}")
    shape = dict(SIZES[args.size]["decoder"], channels=vae.channels, size=args.pixels // vae.factor)
    dec.Decoder(**{**shape, "depth": 0})  # fails early if the size does not divide into patches
    path = args.encoder or pretrained(args, pictures, ranks)
    vit = new_vit(args) if path == "random" else tok.load_encoder(ranks.fetch(path))
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(vit, args.token, args.reg_index, args.unfreeze)
    decoder = dec.Decoder(
        **shape,
        token_dim=tokenizer.width,
        K=tokenizer.K,
        predict=args.predict,
        # With its t_mean, training hardly ever draws a larger t.
        t_max=0.9 if args.predict == "data" else 1.0,
    )
    return RepTok(tokenizer, decoder, vae)


def new_vit(args):
    """An untrained ViT: nano's own, or DINOv2 ViT-B/14's shape with registers."""
    torch.manual_seed(args.seed)
    if args.size == "nano":
        return ViT(pixels=args.pixels, grid=args.pixels // 4, hidden=256, registers=1)
    return ViT(
        768, 12, 12, 3072, 14, 37, 4, True, pixels=224, mean=tok.IMAGENET[0], std=tok.IMAGENET[1]
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
    ranks.any_process()  # the others wait for the file
    return path


def train_encoder(args, pictures, device, preview):
    """Returns the small ViT of `pretrained`; the file `preview` shows pictures, and below what its
    register draws."""
    vit = new_vit(args).to(device)
    width = vit.pos_embed.shape[-1]
    draw = nn.Linear(width, 3 * args.pixels**2).to(device)  # register -> the pixels of its view
    trained = {**dict(vit.named_parameters()), **dict(draw.named_parameters())}
    optimizer = new_optimizer(trained, ENCODER["lr"], ENCODER["muon_lr"])
    shown = held_out(pictures, args, 10).to(device)                 # (10,3,S,S)
    batch = min(ENCODER["batch"], len(pictures))
    random = torch.Generator(device).manual_seed(args.seed)
    shuffle = torch.Generator().manual_seed(args.seed)
    order = []  # the pictures that this epoch has left
    for step in tqdm(range(args.pretrain_steps), "encoder", dynamic_ncols=True):
        if len(order) < batch:
            order = torch.randperm(len(pictures), generator=shuffle).tolist()
        chosen = order[:batch]
        order = order[batch:]
        x = to_float(torch.stack([pictures[i][0] for i in chosen])).to(device)  # (B,3,S,S)
        views = torch.cat([tok.augment(x, random), tok.augment(x, random)])  # (2B,3,S,S)
        tokens = vit(views)                                         # (2B,2+N,D)
        cls = tokens[:, 0]                                          # (2B,D)
        register = tokens[:, 1]                                     # (2B,D)
        contrast = tok.contrastive_loss(*cls.chunk(2))
        drawing = F.mse_loss(draw(register), views.flatten(1))
        loss = contrast + ENCODER["drawing"] * drawing
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * short_run(step, args.pretrain_steps, ENCODER["warmup"])
        optimizer.step()
        optimizer.zero_grad()
        if picture_due(step + 1, args.pretrain_steps):
            with torch.no_grad():
                drawn = draw(vit(shown)[:, 1]).view_as(shown)       # (10,3,S,S)
            sample.save_grid(preview, [shown, drawn])
    return vit


def short_run(step, steps, warmup):
    """The share of the learning rate in a short run: up in a line over `warmup` steps, flat to half
    of the run, and down to 0 in a line."""
    return min(1.0, (step + 1) / max(1, warmup), 2 * (1 - step / steps))


def picture_due(step, steps):
    """Whether the picture of a run is drawn after `step` of `steps`: early once, then ten times in
    a long run."""
    return step == 10 or step % max(30, steps // 10) == 0


def held_out(pictures, args, count):
    """Images (count,3,S,S) to look at: held-out shapes, or some of the pictures of --data, which
    are trained on."""
    if pictures.source:
        count = min(count, len(pictures))
        # The order lets the first ten, too, spread over all pictures.
        order = sorted(range(count), key=lambda i: i % max(1, count // 10))
        return to_float(torch.stack([pictures[i * len(pictures) // count][0] for i in order]))
    shapes = [draw_shape(plan_shape(i, args.seed + 1), args.pixels) for i in range(count)]
    return to_float(torch.from_numpy(np.stack(shapes)).permute(0, 3, 1, 2))


def write_data(folder, count, seed, pixels):
    """The default pictures as FOLDER/shape/number.png."""
    for i in tqdm(range(count), desc="pictures", dynamic_ncols=True):
        plan = plan_shape(i, seed)
        path = Path(folder, plan.shape, f"{i:06d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_shape(plan, pixels)).save(path)


def options():
    """The command line of stage 1."""
    p = sample.Parser(__doc__)
    common_options(p)
    p.section = p.sections["model"]
    p.add(
        "--encoder",
        None,
        "DINOv2, MAE or CLIP file or name, encoder.pt or 'random'; default: nano's own",
    )
    p.add("--vae", None, "SD VAE file; default: nano works on pixels")
    p.add("--init", None, "checkpoint (ours or the authors') to fine-tune from")
    p.add("--pixels", None, "side of the pictures (default: 16 for nano, else 256)", type=whole(1))
    p.add("--unfreeze", "token", "what of the encoder is trained", choices=["token", "all", "none"])
    p.add(
        "--token",
        "cls",
        "read class token, one register, or all (K = 1 + registers)",
        choices=["cls", "reg", "all"],
    )
    p.section = p.sections["optimisation"]
    p.add("--lam", 0.1, "lambda, the weight of the cosine term (Eq. 3)", type=number(0))
    p.add(
        "--token-lr",
        None,
        "learning rate of the token embedding, in --lr (nano: 10; else 1)",
        type=number(0),
    )
    p.add(
        "--predict",
        None,
        "the decoder's output (nano: data; else velocity)",
        choices=["velocity", "data"],
    )
    p.add(
        "--t-mean",
        None,
        "t = sigmoid(N(this,1)); negative values favour noise",
        type=number(-10, 10),
    )
    p.section = p.sections["rarely needed"]
    p.add(
        "--cache",
        None,
        "file cache of frozen networks' outputs (nano: on)",
        action=argparse.BooleanOptionalAction,
    )
    p.add(
        "--checkpointing",
        False,
        "recompute activations: less memory, more time",
        action="store_true",
    )
    p.add("--pretrain-steps", 800, "steps of nano's own encoder, 64 pictures each", type=whole(1))
    p.add("--reg-index", 0, "which register --token reg reads", type=whole(0))
    p.add("--write-data", None, "write --num pictures of the default data to this folder, and exit")
    p.add("--num", 2000, "how many pictures --write-data writes", type=whole(1))
    args = p.parse_args()
    own = not args.encoder and args.size in (None, "nano")
    for condition, why, names in (
        (
            args.init,
            "--init takes its networks from the checkpoint",
            "encoder vae pixels unfreeze token reg_index pretrain_steps predict",
        ),
        (args.encoder == "random", "--encoder random trains all, lambda 0", "unfreeze lam"),
        (not own, "this run trains no encoder of its own", "pretrain_steps"),
    ):
        for name in names.split():
            if condition and getattr(args, name) != p.get_default(name):
                raise UserError(f"--{name.replace('_', '-')}: {why}; leave the option out")
    if args.encoder == "random":
        args.unfreeze = "all"
        args.lam = 0.0
    return args


# ---- Below: shared by both trainers. First optimizer, averages, log, checkpoints
class Muon(torch.optim.AdamW):
    """AdamW, but the matrices in groups with "muon" are updated by their orthogonalised momentum
    (Jordan 2024, https://kellerjordan.github.io/posts/muon), which has the same length in all
    directions."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"] if group["muon"] else ():
                state = self.state[p]
                if not state:
                    # AdamW expects a number of steps in each parameter's state.
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
                state["momentum"].lerp_(p.grad, 0.05)
                update = orthogonal(p.grad.lerp(state["momentum"], 0.95))  # Nesterov
                p.sub_(update, alpha=group["lr"] * max(1, len(p) / p[0].numel()) ** 0.5)
                p.grad = None  # AdamW passes over it
        super().step()


def orthogonal(x, steps=5):
    """About U V^T of a matrix U S V^T, by Newton-Schulz iterations in float32 (torch.optim.Muon
    takes bfloat16, slow on processors without it). They run on the small matrix a = x x^T; x
    becomes q x."""
    if len(x) > x[0].numel():
        return orthogonal(x.mT, steps).mT
    x = x / (x.norm() + 1e-7)
    a = x @ x.mT
    one = q = torch.eye(len(x), device=x.device)
    for _ in range(steps):
        p = 3.4445 * one - 4.775 * a + 2.0315 * a @ a
        q = p @ q
        a = p @ a @ p
    return q @ x


def new_optimizer(trained, lr, muon_lr=0.0, token_lr=1.0):
    """AdamW without weight decay for {name: parameter}; with `muon_lr`, Muon for the matrices of
    attention and MLPs. token_lr: the rate of the tokenizer's embedding, as a multiple of lr."""
    groups = {}
    for name, p in trained.items():
        muon = (
            muon_lr > 0
            and p.ndim == 2
            and bool(re.search(r"\.(attn|ff|mlp|tokens|channels)\.", name))
        )
        rate = lr * token_lr if name == "tokenizer.embedding" else muon_lr if muon else lr
        groups.setdefault((muon, rate), {"params": [], "muon": muon, "lr": rate, "rate": rate})[
            "params"
        ].append(p)
    return Muon(groups.values(), lr=lr, weight_decay=0.0, fused=True)


def set_learning_rate(optimizer, step, args):
    """Linear warm-up, then constant; for nano, as in `short_run`. Returns the current value of
    --lr."""
    if args.decay:
        factor = short_run(step, args.steps, args.warmup)
    else:
        factor = min(1.0, (step + 1) / max(1, args.warmup))
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return args.lr * factor


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
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda *_: asked.append(which))
    return asked


class Log:
    """Progress bar and OUT/NAME.jsonl, a line per logged step."""

    def __init__(self, out, args, ranks, first, pictures, trained):
        self.args = args
        self.ranks = ranks
        self.first = first
        self.since = (time.perf_counter(), first)
        self.saved = time.perf_counter()
        if ranks.main:
            print(
                f"{out.stem}: size {args.size}, {len(pictures)} pictures at "
                f"{args.pixels}x{args.pixels} pixels, "
                f"{len(pictures.classes)} classes; "
                f"{sum(p.numel() for p in trained.values()):,} trained weights; "
                f"{ranks.dtype} on {ranks.device}; batch {args.batch}, "
                f"{args.batch // ranks.world // args.accumulate} per pass; steps "
                f"{first} to {args.steps}"
            )
            path = out.with_suffix(".jsonl")
            lines = path.read_text().splitlines() if first and path.exists() else []
            self.file = open(path, "w", buffering=1)  # a line is out as soon as it is written
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

    def write(self, step, **values):
        """A line of `values`. Raises UserError if `loss` or `norm` is not finite: weights never
        recover from that."""
        if not math.isfinite(values["loss"] + values["norm"]):
            raise UserError(
                f"loss not finite at step {step}; last checkpoint is good; use a "
                "smaller --lr, new --out"
            )
        then, before = self.since
        self.since = (time.perf_counter(), step)
        seconds = (self.since[0] - then) / max(1, step - before)
        rate = round(self.args.batch / seconds, 1)
        if step >= self.first + 50 > before:
            left = tqdm.format_interval(seconds * (self.args.steps - step))
            self.bar.write(f"{rate} images/s: {left} left; for less time, reduce --steps or --size")
        self.bar.set_postfix_str(
            f"loss {values['loss']:.4f}, {1e3 * seconds:.0f} ms, {rate:.0f} images/s", False
        )
        if self.ranks.main:
            print(json.dumps({"step": step, **values, "images_per_second": rate}), file=self.file)

    def due(self, end):
        """Whether to write a checkpoint now: where --save-every is left open above nano, at most
        one an hour."""
        early = (
            time.perf_counter() < self.saved + 3600
            and self.args.hourly
            and self.args.size != "nano"
        )
        self.saved = self.saved if early else time.perf_counter()
        return end or not early

    def close(self, out, step, then):
        """The last line on the terminal, when all processes are done: what there is, and what comes
        `then`."""
        self.ranks.any_process()
        self.bar.close()
        then = (
            then
            if step == self.args.steps
            else "interrupted; run the same command without --fresh to resume"
        )
        if self.ranks.main:
            print(
                f"{out}: step {step} of {self.args.steps}; pictures in "
                f"{out.with_suffix('.png')}; {then}"
            )


def save_run(path, step, args, model, digest, optimizer, ema):
    """A checkpoint from which the run can go on."""
    save_checkpoint(
        path,
        {
            **model.content(),
            "step": step,
            "settings": {**vars(args), "data": digest},
            "ema": ema.average,
            "optimizer": optimizer.state_dict(),
        },
    )


# Settings that may change when a run is resumed. None changes a loss, except --steps at nano,
# whose schedule it sets.
FREE = {
    "out",
    "steps",
    "log_every",
    "save_every",
    "hourly",
    "device",
    "workers",
    "fresh",
    "accumulate",
    "compile",
    "checkpointing",
    "write_data",
    "num",
    "stage1",
}


def checkpoint_to_resume(path, args, digest):
    """The checkpoint that this run goes on from, or None; exits 0 where it is finished. UserError:
    settings differ."""
    if args.fresh or not path.exists():
        return None
    content = load_checkpoint(path, [path.stem])
    if "settings" not in content:
        raise UserError(
            f"{path}: an export cannot be resumed; give it to --init or --stage1, "
            "with another --out"
        )
    now = {**vars(args), "data": digest}
    # The size is compared first, because other settings depend on it.
    names = sorted(now.keys() - FREE, key=lambda name: (name != "size", name))
    refuse_changes(path, content["settings"], {name: now[name] for name in names})
    if content["step"] >= args.steps:
        print(f"{path} is finished at step {content['step']}; give a larger --steps to resume it")
        sys.exit(0)
    return content


def refuse_changes(path, then, now):
    """UserError where a setting is not what it was when the file at `path` was made."""
    for name, value, was in ((name, now[name], then.get(name)) for name in now):
        moved = (
            name in ("encoder", "vae", "init", "clip", "bpe")
            and Path(f"{value}").name == Path(f"{was}").name
        )
        # The checkpoint holds what was read from a file that has moved.
        if value != was and not moved:
            how = "not the same as" if name == "data" else f"{value} but was {was}"
            raise UserError(
                f"--{name.replace('_', '-')} is {how} in {path}; use the same, another "
                "--out, or --fresh"
            )


def restore(content, optimizer, ema):
    """Optimizer and averages of a checkpoint; returns the step that comes next."""
    optimizer.load_state_dict(content["optimizer"])
    torch._foreach_copy_(list(ema.average.values()), [content["ema"][name] for name in ema.average])
    return content["step"]


# ---- Shared: processes, random numbers, what is computed once
def generator(seed, step, device, stream):
    """Random numbers that depend on (seed, step) and their use, never on processes, accumulation or
    restarts."""
    return torch.Generator(device).manual_seed((seed * 1_000_000_007 + step) * 8 + stream)


def fingerprint(args, pictures, how, *networks):
    """SHA-256 of all that the outputs of frozen networks depend on: pictures, how they are taken,
    weights."""
    digest = hashlib.sha256(f"{pictures.fingerprint} {args.flip} {how}".encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def precompute(name, digest, fields, pictures, ranks, args, compute):
    """What frozen networks give for every picture (and, with --flip, its mirror image), in one
    pass, kept in a file.

    compute(images (b,3,S,S)) -> float tensors (b,...), one for each of `fields`, (name, shape
    without b). Returns a memory-mapped array of N records: `index`, the picture that was really
    read; the fields, float16 (V,*shape), V views; `done`, so that a stopped pass goes on where it
    was. UserError where a value does not fit into float16."""
    path = Path(args.out, f"{name}-{ranks.dtype}-{digest[:12]}.npy")
    N = len(pictures)
    V = 1 + args.flip
    record = np.dtype(
        [
            ("index", "<i4"),
            *((field, "<f2", (V, *shape)) for field, shape in fields),
            ("done", "u1"),
        ]
    )
    if ranks.main:
        try:
            np.load(path, mmap_mode="r")  # its name says what is in it
        except (OSError, ValueError, EOFError):  # not there, or cut short when it was made
            np.lib.format.open_memmap(path, mode="w+", dtype=record, shape=(N,)).flush()
    ranks.any_process()
    rows = np.load(path, mmap_mode="r")
    # Pictures of one forward pass, whatever the number of processes: rounding differs between
    # batch sizes.
    size = 64
    chunks = [list(range(i, min(i + size, N))) for i in range(0, N, size)][
        ranks.rank :: ranks.world
    ]
    chunks = [chunk for chunk in chunks if not rows["done"][chunk].all()]
    batches = load_batches(pictures, chunks, ranks.device, args.workers)
    bar = tqdm(
        batches, name, len(chunks), unit_scale=size, disable=not ranks.main, dynamic_ncols=True
    )
    # With no chunk left the loader still draws its seed.
    for (images, _, indices), chunk in zip(bar, chunks):
        block = np.zeros(len(chunk), record)
        block["index"] = indices
        block["done"] = 1
        with ranks.autocast():
            views = [
                compute(view) for view in ([images, images.flip(-1)] if args.flip else [images])
            ]
        for (field, _), values in zip(fields, zip(*views)):
            values = torch.stack(values, 1).to(torch.float16)       # (b,V,...)
            if not values.isfinite().all():
                raise UserError(
                    f"{path}: the networks' values are not finite or beyond float16; "
                    "check their weights"
                )
            block[field] = values.cpu().numpy()
        with open(path, "r+b") as f:  # not into the map: on a full disk that would kill the process
            f.seek(rows.offset + chunk[0] * record.itemsize)
            f.write(block.tobytes())
    ranks.any_process()
    return np.load(path, mmap_mode="r")


# ---- Shared: pictures
NUM_SHAPES = 10_000  # pictures of the default data
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
SIZE = (0.26, 0.42)  # smallest and largest radius of a shape, as a share of the picture's side
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
    size = rng.uniform(*SIZE)
    place = rng.uniform(-0.1, 0.1, 2)
    turn = rng.uniform(-15, 15)
    ink, ground = rng.integers(256, size=(2, 3)).astype(float)
    while np.abs(ink - ground).sum() < 250:  # too alike to see the shape
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
    """ "small" for the lower two fifths of SIZE, "large" for the upper two, no word between."""
    share = (size - SIZE[0]) / (SIZE[1] - SIZE[0])
    if share < 0.4:
        return "small"
    return "large" if share > 0.6 else ""


def nearest_colour(rgb):
    """The name in COLOURS that is nearest to rgb (3,), 0 to 255, by the sum of absolute
    differences."""
    distance = np.abs(PALETTE - rgb).sum(1)                         # (10,)
    return list(COLOURS)[distance.argmin()]


def circle_of(points, radii=(1.0,)):
    """Corners (points,2), x to the right and y down, on a circle from its top on; `radii` take
    turns."""
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
HOLES = {  # what is cut out of two of them
    "moon": 0.85 * circle_of(60) + (0.5, -0.15),
    "ring": 0.55 * circle_of(60),
}


def draw_shape(plan, size):
    """A planned picture, uint8 (size,size,3)."""
    big = 8 * size  # drawn large, then averaged down, for smooth edges
    mask = Image.new("L", (big, big))
    paint = ImageDraw.Draw(mask)
    angle = math.radians(plan.turn)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    for outlines, fill in ((OUTLINES, 255), (HOLES, 0)):
        if plan.shape in outlines:
            corners = plan.size * np.array(outlines[plan.shape]) @ rotation + plan.place + 0.5
            paint.polygon([tuple(corner) for corner in big * corners], fill=fill)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    share = np.asarray(mask, np.float32)[..., None] / 255           # (size,size,1)
    return (plan.ground + share * (plan.ink - plan.ground)).round().astype(np.uint8)


class Pictures(torch.utils.data.Dataset):
    """An indexed set of pictures: the default shapes where `source` is None, else a folder (any
    tree), a .tar, or a folder of .tar shards. [i] -> (uint8 (3,pixels,pixels), label, index): the
    next readable picture stands in for one that cannot be read. labels (N,) long; classes: names of
    the top folders, sorted, [] where there are none. fingerprint: SHA-256 of the names. UserError
    where there are no pictures or only some lie in class folders."""

    def __init__(self, source, pixels, seed=0, captions=False, ranks=None):
        self.source = source and str(Path(source).resolve())
        self.pixels = pixels
        self.kept = {}
        if source is None:
            self.plans = [plan_shape(i, seed) for i in range(NUM_SHAPES)]
            self.names = [f"shape {i}" for i in range(NUM_SHAPES)]
            tops = [plan.shape for plan in self.plans]
            stamp = f"shapes {seed} {NUM_SHAPES}"
        else:
            self.found = (
                ranks.once(lambda: list_files(self.source)) if ranks else list_files(self.source)
            )
            self.names = [name for name in self.found if name.lower().endswith(fid.SUFFIXES)]
            if len(self.names) < 2:
                raise UserError(
                    f"{source}: no pictures in it, or only one; expected "
                    f"{', '.join(fid.SUFFIXES)} files"
                )
            tops = self.names if captions else top_folders(source, self.names)
            stamp = "".join(f"{name}\n" for name in self.names)
        self.classes = [] if captions else sorted(set(tops))
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor(
            [number[top] for top in tops] if number else [0] * len(self.names)
        )
        self.fingerprint = hashlib.sha256(f"{pixels} {stamp}".encode()).hexdigest()
        # A small set of decoded pictures stays in memory.
        self.small = len(self.names) * 3 * pixels**2 <= 2**28

    def __len__(self):
        return len(self.names)

    def read(self, i):
        """uint8 (3,pixels,pixels) of picture i. Raises UserError where it cannot be decoded."""
        if i in self.kept:
            return self.kept[i]
        if self.source is None:
            x = torch.from_numpy(draw_shape(self.plans[i], self.pixels)).permute(2, 0, 1)
        else:
            with fid.naming(f"{self.names[i]}: not a readable picture"):
                x = sample.load_picture(
                    io.BytesIO(fid.read_bytes(self.found[self.names[i]])), self.pixels
                )
        if self.small:
            self.kept[i] = x
        return x

    def __getitem__(self, i):
        for j in [*range(i, len(self)), *range(i)]:
            try:
                return self.read(j), self.labels[j], j
            except fid.UserError as e:
                print(f"\nskipped: {e}", file=sys.stderr)
        raise UserError(
            f"{self.source}: not one of its {len(self)} pictures can be read; give other --data"
        )


def list_files(source):
    """{name: place} of all files of a folder or .tar, see fid.files. Lines of a .jsonl have "file",
    a path relative to it, and "caption", a text or a list; they give {file: place} and {file with
    suffix .txt: captions}. UserError."""
    if not source.endswith(".jsonl"):
        return fid.files(source)
    found = {}
    with fid.naming(f"{source}: expected lines of JSON with file and caption"):
        for row in map(
            json.loads, filter(str.strip, Path(source).read_text(encoding="utf-8").split("\n"))
        ):
            captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
            found[row["file"]] = (
                str(Path(source).parent.joinpath(row["file"]).resolve(strict=True)),
            )
            found.setdefault(row["file"].rsplit(".", 1)[0] + ".txt", []).extend(captions)
    return found


def top_folders(source, names):
    """The class folder of each picture; [] where none lies in one. Raises UserError where only some
    do."""
    # The name of a shard is no class.
    folders = [name.rsplit(".tar/", 1)[-1].split("/")[:-1] for name in names]
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


def load_batches(pictures, order, device, workers=None):
    """Yields (images (b,3,S,S) in [-1,1], labels (b,), indices (b,) on the CPU) for each list of
    numbers in `order`."""
    gpu = device.type == "cuda"
    workers = 4 * (gpu and not pictures.small) if workers is None else workers
    loader = torch.utils.data.DataLoader(
        pictures, batch_sampler=order, num_workers=workers, pin_memory=gpu
    )
    for images, *rest in loader:
        yield to_float(images.to(device, non_blocking=True)), *rest


# ---- Shared: options
def common_options(p):
    """The options of both trainers, in the groups of --help."""
    p.sections = {
        name: p.add_argument_group(name)
        for name in ("data", "model", "optimisation", "rarely needed")
    }
    p.section = p.sections["data"]
    p.add(
        "--data",
        None,
        "folder (sub-folders are classes), .tar, .tar shards, or .jsonl; default: shapes",
    )
    p.add("--out", "out", "folder for checkpoint, log and pictures")
    p.add(
        "--flip",
        False,
        "mirror half of the pictures (not for captions that say left or right)",
        action="store_true",
    )
    p.add("--fresh", False, "start again and overwrite --out", action="store_true")
    p.section = p.sections["model"]
    p.add("--size", None, "network size; default: the checkpoint's, or nano", choices=[*SIZES])
    p.section = p.sections["optimisation"]
    p.add("--steps", None, "optimizer steps in all", type=whole(1))
    p.add("--batch", None, "pictures per step, over all GPUs and micro-batches", type=whole(1))
    p.add(
        "--accumulate", 1, "micro-batches per GPU and step; more of them save memory", type=whole(1)
    )
    p.add("--lr", None, "AdamW learning rate after warm-up", type=number(0))
    p.add(
        "--muon-lr",
        None,
        "Muon's learning rate (nano's stage 1: 0.02; else 0, AdamW alone)",
        type=number(0),
    )
    p.add("--warmup", None, "steps of linear warm-up", type=whole(0))
    p.add("--ema", None, "decay of the averaged weights", type=number(0, 1))
    p.add("--clip-grad", 1.0, "largest norm of the gradient; 0 is none", type=number(0))
    p.add("--seed", 0, "seed of weights, picture order and noise", type=whole(0))
    p.section = p.sections["rarely needed"]
    p.add("--log-every", 20, "steps between lines of the log", type=whole(1))
    p.add(
        "--save-every",
        None,
        "steps between saves (nano: 500, 1000; else 10,000, at most hourly)",
        type=whole(1),
    )
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
        "processes that read pictures (default: 4 with a GPU, else 0)",
        type=whole(0),
    )
    p.add("--compile", False, "torch.compile the networks", action="store_true")


def fill_defaults(args, paper, nano, model=None):
    """Set what was left open: --size (that of the checkpoint `model`), then what depends on it.
    Raises UserError."""
    args.hourly = getattr(args, "save_every", None) is None
    if model:
        args.pixels = model.pixels
    if args.size is None:
        width = model.decoder.config["width"] if model else SIZES["nano"]["decoder"]["width"]
        args.size = next(
            (size for size, shape in SIZES.items() if shape["decoder"]["width"] == width), None
        )
        if not args.size:
            raise UserError(
                f"--size: checkpoint's decoder width {width} fits none of "
                f"{', '.join(SIZES)}; give --size"
            )
    for name, value in {"muon_lr": 0.0, **(nano if args.size == "nano" else paper)}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


if __name__ == "__main__":
    sample.guarded(main)
