"""Stage 1: train the decoder and, of the encoder, only the token embedding (RepTok, arXiv 2510.14630, Sec. 3).

    python train_stage1.py                                        # coloured digits, no download: minutes on two CPU cores
    python train_stage1.py --data FOLDER                          # own pictures, small; sub-folders are classes
    torchrun --nproc-per-node 8 train_stage1.py --data imagenet/train --size XL --encoder dinov2_vitb14_reg \\
        --vae sd-vae-ft-mse/diffusion_pytorch_model.safetensors   # the paper's size

Writes OUT/stage1.pt (self-contained), OUT/stage1.jsonl (a line a logged step), OUT/stage1.png (inputs above, reconstructions
below) and, where it trains a prior of its own, OUT/prior.pt. Run again, it goes on.

The method is `Stage1` and the loop in `main`, which come first; below them stands what both trainers share.
"""
import argparse
import collections
import contextlib
import datetime
import errno
import functools
import hashlib
import io
import json
import math
import os
import signal
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.attention
import torch.utils.flop_counter
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import decoder as dec
import fid
import tokenizer as tok
from decoder import Decoder, PixelSpace, VAE, flow_loss
from tokenizer import Tokenizer, UserError, ViT, cosine_loss

# Sizes: the decoder's and the Mixer's; everything but nano works on 256 pixels, SD-VAE latents and a published encoder.
SIZES = {
    "nano": dict(pixels=16, decoder=dict(width=128, depth=4, heads=4, patch=4, mapping=128, learned_positions=True), mixer=dict(hidden=192, depth=6)),
    "S": dict(pixels=256, decoder=dict(width=384, depth=12, heads=6), mixer=dict(hidden=384, depth=12)),
    "B": dict(pixels=256, decoder=dict(width=768, depth=12, heads=12), mixer=dict(hidden=768, depth=16)),
    "L": dict(pixels=256, decoder=dict(width=1024, depth=24, heads=16), mixer=dict(hidden=1024, depth=24)),
    "XL": dict(pixels=256, decoder=dict(width=1152, depth=28, heads=16), mixer=dict(hidden=1280, depth=28)),
}
# Steps and batch are the paper's; what it leaves open is ours.
PAPER = dict(steps=1_000_000, batch=512, lr=1e-4, warmup=2000, decay=False, ema=0.9999, t_mean=0.0, cache=False)
NANO = dict(steps=1200, batch=96, lr=3e-3, warmup=100, decay=True, ema=0.995, t_mean=-0.3, cache=True)


# ---- Stage 1


class Stage1(nn.Module):
    """Tokenizer and decoder as one module, for DDP, --compile and one optimizer. Through the tokens the flow loss trains both (Eq. 2)."""

    def __init__(self, tokenizer, decoder):
        super().__init__()
        self.tokenizer, self.decoder = tokenizer, decoder

    def forward(self, images, latents, t, noise, prior):
        """Each picture's losses: flow (B,) of Eq. 1, cosine (B,) of Eq. 3. prior (B,K,D): the original tokens z0."""
        tokens = self.tokenizer(images)                                                            # (B,K,D)
        flow = flow_loss(lambda x_t, s: self.decoder(x_t, s, tokens), latents, t, noise)
        return flow, cosine_loss(tokens, prior)


@torch.no_grad()
def frozen_targets(stage1, vae, x):
    """What training does not change: mean and log-variance of the latents (b,C,h,w), the original tokens (b,K,D); x (b,3,S,S)."""
    return [u.float() for u in (*vae.posterior(x), stage1.tokenizer.prior(x))]


def cached_targets(args, stage1, vae, pictures, ranks):
    """--cache: targets(x, numbers of the pictures (b,), mirrored or not (b,)) -> the same, from a file that is made once."""
    tokenizer, config = stage1.tokenizer, stage1.decoder.config
    latent = (config["channels"], config["size"], config["size"])
    fields = [("mean", latent), ("logvar", latent), ("prior", (tokenizer.K, tokenizer.width))]
    digest = fingerprint(pictures, f"{args.flip} {tokenizer.index.tolist()}", tokenizer.original or tokenizer.vit, vae)
    path = Path(args.out, f"cache-{args.dtype}-{digest[:12]}.npy")
    rows = computed_once(path, fields, pictures, ranks, args, lambda x: frozen_targets(stage1, vae, x))

    def targets(x, indices, mirror):
        found = rows[indices.numpy()]
        views = [torch.from_numpy(found[name].copy()) for name, _ in fields]                       # each (b,V,...), V = 2 with --flip: mirrored
        views = [(u.pin_memory() if ranks.device.type == "cuda" else u).to(ranks.device, non_blocking=True).float() for u in views]
        return [u[torch.arange(len(u), device=u.device), mirror.long()] for u in views]

    return targets


def main():
    """Stage 1 from the command line: everything is checked, built or restored, then the loop. Raises UserError."""
    from sample import RepTok  # not above, for sample.py itself needs this file
    args = options()
    begun = RepTok.load(args.init) if args.init else None
    complete(args, PAPER, NANO, begun and begun.decoder)
    args.pixels = begun.pixels if begun else args.pixels or SIZES[args.size]["pixels"]
    if args.write_data:
        return write_data(args.write_data, args.num, args.seed, args.pixels)
    ranks = Ranks(args.device)
    if args.bench:
        return bench(args, ranks)
    ranks.divide(args)  # refuses a batch that does not divide
    out = Path(args.out, "stage1.pt")
    pictures = Pictures(args.data, args.pixels, args.seed)
    make_folder(args.out)
    last = continued(out, args, pictures.fingerprint)  # None, or the checkpoint of the same run to go on from
    tokenizer, decoder, vae = (u.to(ranks.device) for u in build(args, pictures, ranks, begun))
    tokenizer.vit.checkpointing = decoder.checkpointing = args.checkpointing
    if last:
        tokenizer.load_state_dict(last["tokenizer"]["state"]), decoder.load_state_dict(last["decoder"]["state"])
    # the same networks twice: to be trained, and to be saved and drawn with
    stage1, model = Stage1(tokenizer, decoder), RepTok(tokenizer, decoder, vae, classes=pictures.classes)

    def picture():
        x = torch.stack([pictures[i][0] for i in range(min(10, len(pictures)))]).float() / 127.5 - 1
        return grid([x, model.decode(model.encode(x), steps=20)])

    targets = cached_targets(args, stage1, vae, pictures, ranks) if args.cache else lambda x, i, m: frozen_targets(stage1, vae, x)
    run = Run(out, stage1, args, ranks, last, pictures, digest=pictures.fingerprint, content=model.parts, picture=picture,
              rates={"tokenizer.embedding": args.token_lr})
    del last, begun  # at XL, ten gigabytes

    def losses(t, indices, x, mirror, noise, vae_noise):
        mean, logvar, prior = targets(x, indices, mirror)                                          # (b,C,h,w) twice, (b,K,D)
        flow, cosine = run.model(x, vae.sample(mean, logvar, vae_noise), t, noise, prior)          # Eq. 1 and 2; Eq. 3
        return {"loss": flow + args.lam * cosine, "flow": flow, "cosine": cosine}

    shape = (args.batch, decoder.config["channels"], decoder.config["size"], decoder.config["size"])
    loader = Loader(pictures, Order(len(pictures), args.batch, ranks, run.first, args.steps, args.seed), ranks, args.workers, args.max_bad)
    for step, (x, _, indices) in enumerate(loader, run.first):
        # drawn for the whole batch on every rank, so that ranks and accumulation do not change the sequence
        draw = generator(args.seed, step, 0, ranks.device)
        t = ranks.part(torch.sigmoid(torch.randn(args.batch, generator=draw, device=ranks.device) + args.t_mean))
        noise, vae_noise = (ranks.part(torch.randn(shape, generator=draw, device=ranks.device)) for _ in range(2))
        mirror = ranks.part(torch.rand(args.batch, generator=draw, device=ranks.device)) < 0.5 * args.flip
        x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        # backward, through the tokens into the embedding too (Eq. 2); gradient norm, AdamW, EMA, log, checkpoint
        if run.step(step, losses, t, indices, x, mirror, noise, vae_noise):
            break


# ---- Below: what stage 1 is built from, and its command line


def options():
    """The command line of stage 1."""
    p = Parser(__doc__)
    common_options(p, 500)
    p.add("--encoder", None, "DINOv2, MAE or CLIP file or name, a prior.pt, or 'random' (all unfrozen, lambda 0); default: nano trains a prior")
    p.add("--vae", None, "SD VAE file; default: nano works on pixels")
    p.add("--init", None, "checkpoint (ours or the authors') to fine-tune from")
    p.add("--pixels", None, "side of the pictures (default: 16 for nano, else 256)", type=whole(1))
    p.add("--token-lr", 1.0, "learning rate of the token embedding, as a multiple of --lr", type=number(0))
    p.add("--lam", 0.1, "lambda, the weight of the cosine term (Eq. 3)", type=number(0))
    p.add("--unfreeze", "token", "what of the encoder is trained", choices=["token", "all", "none"])
    p.add("--token", "cls", "what is read: class token, one register, or all of them (K = 1 + registers)", choices=["cls", "reg", "all"])
    p.add("--reg-index", 0, "which register --token reg reads", type=whole(0))
    p.add("--prior", "self", "how nano's own prior is trained: self-supervised, or by the labels", choices=["self", "labels"])
    p.add("--registers", 4, "register tokens of nano's own prior", type=whole(0))
    p.add("--t-mean", None, "t = sigmoid(N(this,1)); below 0 nearer to noise", type=number(-10, 10))
    p.add("--cache", None, "compute VAE posteriors and original tokens once, into a float16 file (default: nano only)", action=argparse.BooleanOptionalAction)
    p.add("--checkpointing", False, "recompute activations in the backward pass: less memory, more time", action="store_true")
    p.add("--write-data", None, "write --num pictures of the default data as PNG in class folders to this folder, and exit")
    p.add("--num", 2000, "how many pictures --write-data writes", type=whole(1))
    args = p.parse_args()
    for condition, why, names in (
            (args.init, "--init takes its networks from the checkpoint", ("encoder", "vae", "pixels", "unfreeze", "token", "reg_index",
                                                                                       "prior", "registers", "bench", "write_data")),
            (args.encoder == "random", "a random encoder is trained whole, with lambda 0", ("unfreeze", "lam", "prior")),
            (args.encoder not in (None, "random") or args.size not in (None, "nano"), "this run trains no prior of its own", ("prior", "registers"))):
        for name in names:
            if condition and getattr(args, name) != p.get_default(name):
                raise UserError(f"--{name.replace('_', '-')}: {why}; leave the option out")
    if args.token != "cls" and not args.registers:
        raise UserError(f"--token {args.token} needs an encoder with register tokens; use --token cls")
    if args.encoder == "random":
        args.unfreeze, args.lam = "all", 0.0
    return args


def build(args, pictures, ranks, begun=None):
    """Tokenizer, decoder and VAE of this run, new or `begun` (the RepTok of --init), on the CPU. Raises UserError."""
    if begun:
        return begun.tokenizer, begun.decoder, begun.vae
    nano = args.size == "nano"
    if not nano and not args.vae:
        raise UserError(f"--size {args.size} works in SD-VAE latents: give --vae the file diffusion_pytorch_model.safetensors of "
                        f"stabilityai/sd-vae-ft-mse (address in the README)")
    if not nano and not args.encoder:
        raise UserError(f"--size {args.size} needs an encoder: give --encoder dinov2_vitb14_reg4_pretrain.pth, or its name "
                        f"dinov2_vitb14_reg to download it")
    vae = dec.load_vae(args.vae) if args.vae else PixelSpace()
    if args.pixels % vae.factor:
        raise UserError(f"--pixels {args.pixels} is not a multiple of the VAE's {vae.factor}")
    Decoder(**{**SIZES[args.size]["decoder"], "depth": 0}, channels=vae.channels, size=args.pixels // vae.factor)  # refuses bad sizes early
    vit = new_vit(args) if args.encoder == "random" else encoder(args.encoder) if args.encoder else self_supervised(args, pictures, ranks)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer(vit, args.token, args.reg_index, args.unfreeze)
    decoder = Decoder(**SIZES[args.size]["decoder"], channels=vae.channels, size=args.pixels // vae.factor,
                      token_dim=tokenizer.width, K=tokenizer.K)
    return tokenizer, decoder, vae


def encoder(path):
    """A frozen ViT from OUT/prior.pt or from any published file or name. Raises UserError."""
    path = tok.weight_file(path)
    content = tok.read_file(path)
    if not (isinstance(content, dict) and content.get("kind") == "prior"):
        return tok.load_encoder(path)
    with naming(f"{path}: a damaged prior", "; delete it or give another"):
        plausible(content["config"], content["state"])
        with torch.device("meta"):
            vit = ViT(**content["config"])
        return tok.fit(vit, content["state"], path, "a prior").requires_grad_(False)


def new_vit(args):
    """An untrained ViT: nano's own, or DINOv2 ViT-B/14's shape with registers."""
    torch.manual_seed(args.seed)
    if args.size == "nano":
        return ViT(pixels=args.pixels, grid=args.pixels // 4, hidden=256, registers=args.registers)
    return ViT(768, 12, 12, 3072, 14, 37, registers=4, layer_scale=True, pixels=224, mean=tok.IMAGENET[0], std=tok.IMAGENET[1])


def self_supervised(args, pictures, ranks):
    """The small prior: a ViT trained without labels on the pictures themselves, kept in OUT/prior.pt. Returns it frozen."""
    path = Path(args.out, "prior.pt")
    made = {"data": pictures.fingerprint, **{name: getattr(args, name) for name in ("seed", "prior", "prior_steps", "registers", "pixels")}}
    if args.prior == "labels" and not pictures.classes:
        raise UserError("--prior labels needs pictures in class folders; use --prior self")
    if path.exists() and not args.fresh:
        then = load_checkpoint(path, ["prior"])["settings"]
        for name in made:
            if made[name] != then.get(name):
                raise UserError(f"--{name.replace('_', '-')} is not that of {path}; use the same, another --out, or --fresh")
    elif ranks.main:
        how = "self-supervised on the pictures first, without labels" if args.prior == "self" else "supervised by the labels first"
        print(f"No encoder given: a ViT of {args.pixels}x{args.pixels} pixels is {how}; real use takes DINOv2 (--encoder)")
        vit = new_vit(args).to(ranks.device)
        solo = argparse.Namespace(rank=0, world=1, device=ranks.device)
        loader = Loader(pictures, Order(len(pictures), min(128, len(pictures)), solo, 0, args.prior_steps, args.seed + 1), solo,
                        args.workers, args.max_bad)
        classes = len(pictures.classes) if args.prior == "labels" else 0
        bar = tqdm(tok.pretrain(vit, loader, args.seed, classes=classes), "prior", len(loader), dynamic_ncols=True)
        for step, loss in enumerate(bar):
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}")
        save_checkpoint(path, {"kind": "prior", "settings": made, "config": vit.config, "state": vit.cpu().state_dict()})
    ranks.wait()
    return encoder(str(path))


def plausible(config, state):
    """Raises ValueError unless settings read from a file are plain values of a size that its tensors have or a network could: a
    stranger's file must not decide how much memory and time is taken before its weights are seen."""
    sides = {n for t in state.values() for n in t.shape}
    for name, value in config.items():
        for v in value[:16] if isinstance(value, (list, tuple)) else [value]:
            short = v is None or isinstance(v, bool) or isinstance(v, str) and len(v) < 20
            if not (short or isinstance(v, (int, float)) and (0 <= v <= 4096 or {v, v + 1} & sides)) or isinstance(value, (list, tuple)) and len(value) > 16:
                raise ValueError(f"{name} is no setting of its network")
    width, heads = config.get("width", 0), config.get("heads", 1)
    if config.get("depth", 0) > len(state) or not heads or width % heads:
        raise ValueError("its settings are not those of its network")


def write_data(folder, count, seed, pixels):
    """The default pictures as FOLDER/digit/number.png."""
    for i in tqdm(range(count), desc="pictures", dynamic_ncols=True):
        plan = plan_digit(i, seed)
        path = Path(folder, str(plan.digit), f"{i:06d}.png")
        make_folder(path.parent, "--write-data")
        Image.fromarray(draw_digit(plan, pixels)).save(path)


def bench(args, ranks):
    """--bench: this size's networks with random weights, and a training step."""
    torch.manual_seed(0)
    nano, device = args.size == "nano", ranks.device
    n = args.batch if nano else min(args.batch, 64 if device.type == "cuda" else 2)
    vae = PixelSpace() if nano else VAE().to(device, memory_format=torch.channels_last)
    tokenizer = Tokenizer(new_vit(args)).to(device)
    decoder = Decoder(**SIZES[args.size]["decoder"], channels=vae.channels, size=args.pixels // vae.factor, token_dim=tokenizer.width).to(device)
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.02) if p.ndim > 1 else None  # zero starts would stop the backward pass
    tokenizer.vit.checkpointing = decoder.checkpointing = args.checkpointing
    x, t = torch.rand(n, 3, args.pixels, args.pixels, device=device) * 2 - 1, torch.rand(n, device=device)
    noise = torch.randn(n, vae.channels, decoder.config["size"], decoder.config["size"], device=device)
    stage1 = Stage1(tokenizer, decoder)
    optimizer = torch.optim.AdamW([p for p in stage1.parameters() if p.requires_grad], fused=True)
    net = torch.compile(stage1) if args.compile else stage1

    def step():
        net(x, noise, t, noise, tokens)[0].mean().backward()
        move(optimizer, list(decoder.parameters()), 1.0)

    tokens, forward = tokenizer(x).detach(), torch.no_grad()
    rows = [("encoder", forward(lambda: tokenizer(x)), n), ("decoder velocity", forward(lambda: decoder(noise, t, tokens)), n),
            ("step: encoder, decoder, backward", step, n)]
    if not nano:
        rows += [("VAE encode", forward(lambda: vae.encode(x)), n), ("VAE decode", forward(lambda: vae.decode(noise)), n)]
    print(f"size {args.size}, batch {n}: decoder {sum(p.numel() for p in decoder.parameters()) / 1e6:.1f}M parameters, "
          f"encoder {sum(p.numel() for p in tokenizer.vit.parameters()) / 1e6:.1f}M")
    bench_rows(rows, ranks, args.dtype)


# ---- Below: shared by both trainers. First the run: one step, its log, its checkpoints


class Run:
    """What both trainers do around their losses: schedule, accumulation, AdamW, EMA, log, checkpoints, stopping.

    out: the checkpoint's path; module: holds the parameters; last: the checkpoint that is gone on from, or None; pictures: for their
    names; digest: what --data is held against later; content() gives what the checkpoint holds beside settings and states, picture()
    what is drawn; rates: {parameter's name: factor on its learning rate}.
    .model is the module as it is to be called, wrapped by DDP and --compile; .first is the first step.
    """

    def __init__(self, out, module, args, ranks, last, pictures, digest, content, picture, rates={}):
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        factors = sorted({rates.get(name, 1.0) for name in named})
        groups = [{"params": [p for name, p in named.items() if rates.get(name, 1.0) == f], "factor": f} for f in factors]
        self.optimizer, self.ema = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0, fused=True), EMA(named, args.ema)
        if last:
            self.optimizer.load_state_dict(last["optimizer"])
            torch.set_rng_state(last["rng"])
            torch._foreach_copy_(list(self.ema.average.values()), [last["ema"][name] for name in named])
        self.out, self.args, self.ranks, self.pictures, self.digest, self.content, self.picture = out, args, ranks, pictures, digest, content, picture
        self.model, self.first = ranks.wrap(torch.compile(module) if args.compile else module), last["step"] if last else 0
        if ranks.main:
            count = {part: sum(p.numel() for p in child.parameters() if p.requires_grad) for part, child in module.named_children()}
            print(f"{len(pictures)} pictures, {len(pictures.classes)} classes; trained: {', '.join(f'{n:,} numbers of the {part}' for part, n in count.items() if n)}; "
                  f"batch {args.batch} = {ranks.world} processes x {args.accumulate} x {args.batch // ranks.world // args.accumulate}; "
                  f"steps {self.first} to {args.steps}")
        self.log = Log(out.with_suffix(".jsonl"), ranks, self.first, args.steps, args.batch)
        self.bins, self.asked, self.flags = Bins(ranks.device), 0.0, []
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, self.ask)

    def ask(self, *_):
        """What a signal does: finish the step, save, exit 0. A second one changes nothing: launchers send several."""
        self.asked = 1.0

    def stopping(self, bad, losses, step, indices):
        """True if a signal asks any rank to stop. Raises UserError, naming step and pictures, where the loss was not finite.

        All ranks see it at the same step; on a GPU that is one step late, so that the loop does not wait for the device.
        """
        self.flags.append((self.ranks.sum(torch.stack([bad, torch.full_like(bad, self.asked)])), losses, step, indices))
        late, asked = bad.is_cuda and step < self.args.steps, 0.0
        while len(self.flags) > late:
            flags, losses, step, indices = self.flags.pop(0)
            bad, asked = flags.tolist()
            if bad:
                which = [self.pictures.names[i] for i in indices[~losses.isfinite().cpu()].tolist()] or ["none of this rank's alone"]
                raise UserError(f"the loss or its gradient is not finite at step {step}, pictures: {', '.join(which[:5])}; the last checkpoint "
                                f"is untouched: try a smaller --lr or --dtype float32")
        return asked > 0

    def step(self, step, losses, *inputs):
        """One optimizer step; returns whether to stop. inputs: time t (B,), numbers of the pictures (B,), and what else the losses need;
        losses(*a piece of each) -> {"loss": (b,), what is minimised, "flow": (b,), what is logged over t, and more to log}."""
        (t, indices, *_), args, done = inputs, self.args, []
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["factor"]
        for n, piece in enumerate(zip(*(u.chunk(args.accumulate) for u in inputs))):
            wait = contextlib.nullcontext() if n == args.accumulate - 1 or self.ranks.world == 1 else self.model.no_sync()
            with wait, autocast(self.ranks, args.dtype):
                parts = losses(*piece)
                (parts["loss"].mean() / args.accumulate).backward()
            done.append({name: part.detach() for name, part in parts.items()})
        parts = {name: torch.cat([piece[name] for piece in done]) for name in done[0]}                  # each (B of this rank,)
        norm, bad = move(self.optimizer, self.ema.parameters, args.clip_grad)
        self.ema.update(step)
        self.bins.add(t, parts["flow"])
        stopping, end = self.stopping(bad, parts["loss"], step + 1, indices), step + 1 == args.steps
        self.log.bar.update()
        if (step + 1) % args.log_every == 0 or end:
            means = self.ranks.sum(torch.stack([part.mean() for part in parts.values()]) / self.ranks.world).tolist()
            self.log.write(step + 1, **dict(zip(parts, means)), norm=norm.item(), lr=learning_rate(step, args), bins=self.bins.read(self.ranks))
        if (step + 1) % args.save_every == 0 or end or stopping:
            self.save(step + 1)
        if self.ranks.main and (end or stopping):
            self.log.bar.close()
            print(f"{self.out}: step {step + 1}" + ("" if end else f" of {args.steps}, interrupted; run the same command{' without --fresh' * args.fresh} to go on"))
        return stopping

    def save(self, step):
        """Checkpoint and picture, by rank 0."""
        if self.ranks.main:
            save_checkpoint(self.out, {
                **self.content(), "step": step, "settings": {**vars(self.args), "data": self.digest}, "ema": self.ema.average,
                "optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()})
            with torch.no_grad(), self.ema.applied(), autocast(self.ranks, self.args.dtype):
                picture = self.picture()
            fid.write_file(self.out.with_suffix(".png"), lambda f: picture.save(f, "PNG"))
        self.ranks.wait()


def move(optimizer, parameters, clip):
    """Clip the gradient and take the step, unless its norm is not finite: then nothing moves. Returns norm and that flag.

    Both stay on the device: the loop does not wait for them.
    """
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    bad = (~norm.isfinite()).float()
    optimizer.grad_scale, optimizer.found_inf = None, bad.clone()  # what a GradScaler sets; fused AdamW then skips on the device
    optimizer.step()
    optimizer.zero_grad()
    return norm, bad


def learning_rate(step, args):
    """Linear warm-up, then constant; nano's short runs then fall to a twentieth along a cosine."""
    rate = args.lr * min(1.0, (step + 1) / max(1, args.warmup))
    return rate * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / args.steps))) if args.decay else rate


def autocast(ranks, dtype):
    """The autocast context of --dtype; auto takes bfloat16 where the device has matrix instructions for it."""
    kind = ranks.device.type
    if dtype == "auto":
        able = torch.cuda.is_bf16_supported(including_emulation=False) if kind == "cuda" else kind == "cpu" and torch.cpu._is_amx_tile_supported()
        dtype = "bfloat16" if able else "float32"
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16")


class EMA:
    """Moving average of the trained parameters {name: parameter}; its decay warms up, or short runs would keep their initial weights."""

    def __init__(self, named, decay):
        self.parameters, self.decay = list(named.values()), decay
        self.average = {name: p.detach().clone() for name, p in named.items()}

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), self.parameters, 1 - decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self):
        """Within it the model holds the averaged weights."""
        kept = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, list(self.average.values()))
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, kept)


class Log:
    """OUT/NAME.jsonl, a flushed line a logged step, and a progress bar with smoothed loss, step time and time left."""

    def __init__(self, path, ranks, first, last, batch):
        self.ranks, self.batch, self.smooth, self.since = ranks, batch, None, (time.perf_counter(), first)
        self.bar = tqdm(total=last, initial=first, disable=not ranks.main, desc=path.stem, dynamic_ncols=True)
        if ranks.main:
            before = path.read_text().splitlines() if first and path.exists() else []
            kept = [line for line in before if line.endswith("}") and json.loads(line)["step"] <= first]
            self.file = open(path, "w", buffering=1)  # a line is out as soon as it is written
            self.file.writelines(f"{line}\n" for line in kept)  # what a killed run logged after its last checkpoint comes again

    def write(self, step, loss, **values):
        """`loss` is that step's, over the whole batch; `values` go into the file as they are."""
        self.smooth = loss if self.smooth is None else 0.7 * self.smooth + 0.3 * loss
        (then, before), self.since = self.since, (time.perf_counter(), step)
        seconds = (self.since[0] - then) / max(1, step - before)
        self.bar.set_postfix_str(f"loss {self.smooth:.4f}, {1e3 * seconds:.0f} ms, {self.batch / seconds:.0f} images/s", refresh=False)
        if self.ranks.main:
            self.file.write(json.dumps({"step": step, "loss": loss, **values, "images_per_second": round(self.batch / seconds, 1)}) + "\n")


class Bins:
    """Mean loss in eight equal segments of t, kept on the device: the cheapest look into a flow model."""

    def __init__(self, device):
        self.sums = torch.zeros(2, 8, device=device)  # of the losses, and how many

    def add(self, t, loss):
        """t (B,), loss (B,)."""
        self.sums.index_add_(1, (t * 8).long().clamp(max=7), torch.stack([loss.float(), torch.ones_like(t)]))

    def read(self, ranks):
        """Eight means over all ranks (None where nothing fell) since the last call."""
        total, count = ranks.sum(self.sums).tolist()
        self.sums.zero_()
        return [round(a / n, 5) if n else None for a, n in zip(total, count)]


def save_checkpoint(path, content):
    """Write to a temporary file, sync, rename; the checkpoint before stays as NAME.prev.pt. Raises UserError on a full disk."""
    temporary, previous = path.with_suffix(".tmp"), path.with_suffix(".prev.pt")
    try:
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        if path.exists() and path.suffix == ".pt":
            os.replace(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({str(e).splitlines()[0]}); make room and run the same command again") from None


def load_checkpoint(path, kinds):
    """The newest whole checkpoint at `path`: itself, or NAME.prev.pt where it is torn (said in one line). Raises UserError."""
    path = Path(path)
    previous = path.with_suffix(".prev.pt")
    try:
        content = tok.read_file(path)
    except UserError as e:
        if not previous.exists():
            raise
        print(f"{e}; going on from {previous}", file=sys.stderr)
        content = tok.read_file(previous)
    kind = content.get("kind", "the authors' RepTok" if "state_dict" in content else None) if isinstance(content, dict) else None
    if kind not in kinds:
        raise UserError(f"{path}: not a checkpoint of {' or '.join(kinds)}" + (f" but of {tok.plain(kind)}" if isinstance(kind, str) else "") +
                        "; give the right file")
    return content


# What may differ between a run and its continuation; all but --steps, on which nano's schedule hangs, leave its sequence as it is
FREE = {"out", "steps", "log_every", "save_every", "device", "workers", "fresh", "accumulate", "compile", "checkpointing", "max_bad",
        "bench", "write_data", "num", "stage1"}


def continued(path, args, digest):
    """The checkpoint that a run goes on from, or None; exits 0 where it is finished. Raises UserError where a setting differs."""
    if args.fresh or not (path.exists() or path.with_suffix(".prev.pt").exists()):
        return None
    content = load_checkpoint(path, [path.stem])
    if "settings" not in content:
        raise UserError(f"{path}: an export, which holds nothing to go on from; use it with --init or --stage1, and another --out or --fresh")
    now, then = {**vars(args), "data": digest}, content["settings"]
    for name in sorted(now, key=lambda name: (name != "size", name)):  # others hang on the size
        if name not in FREE and now.get(name) != then.get(name):
            option = "--" + name.replace("_", "-")
            how = "or the weights that read it are others than" if name == "data" else f"is {now.get(name)} but was {then.get(name)}"
            raise UserError(f"{option} {how} in {path}; use the same, another --out, or --fresh")
    if content["step"] >= args.steps:
        print(f"{path} is finished at step {content['step']}; a larger --steps goes on from there")
        sys.exit(0)
    return content


# ---- Shared: ranks, random numbers, what is computed once


class Ranks:
    """One process or many under torchrun: .rank, .world, .device, and the collectives the trainers need."""

    def __init__(self, device="auto"):
        self.rank, self.world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"  # mps lacks some of what the prior uses
        if device == "cuda" and not torch.cuda.is_available() or device == "mps" and not torch.backends.mps.is_available():
            raise UserError(f"--device {device}: this machine has none; use --device auto")
        self.device, self.main = torch.device(device, local) if device == "cuda" else torch.device(device), self.rank == 0
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(f"--nproc-per-node: more processes than the {torch.cuda.device_count()} GPUs of this machine")
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))

    def sum(self, x):
        """Sum of a tensor over all ranks, on all ranks."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def wait(self):
        """Until every rank is here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, module):
        """DDP where there are several ranks; it sends rank 0's weights to all, so that they start equal."""
        if self.world == 1:
            return module
        return nn.parallel.DistributedDataParallel(module, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def divide(self, args):
        """Raises UserError where the batch does not divide into equal parts."""
        if args.batch % (self.world * args.accumulate):
            raise UserError(f"--batch {args.batch} is not a multiple of {self.world} processes x --accumulate {args.accumulate}")

    def part(self, x):
        """This rank's slice of a tensor drawn for the whole batch."""
        return x.chunk(self.world)[self.rank]


def generator(seed, step, stream, device):
    """Random numbers that depend on (seed, step) and what they are for, never on ranks, accumulation or restarts."""
    return torch.Generator(device).manual_seed((seed * 1_000_000_007 + step) * 8 + stream)


def noise_for(seeds, shape, device, mixer=False):
    """One seed a picture: noise (len(seeds), *shape) that does not change with the batch it is drawn in. The Mixer's is drawn from other
    seeds than the decoder's (half of the 2**32 that there are): it was trained on noise that has nothing to do with its tokens."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s + mixer * 2**31)) for s in seeds]).to(device)


CHUNK = 64  # pictures of one forward pass, always the same ones, so that what is kept does not depend on ranks or restarts


def fingerprint(pictures, how, *modules):
    """SHA-256 of what frozen networks give: pictures, how they are taken (mirrored, say), weights."""
    digest = hashlib.sha256(f"{pictures.fingerprint} {how}".encode())
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def computed_once(path, fields, pictures, ranks, args, compute):
    """What frozen networks give for every picture (and, with --flip, its mirror image), in one pass, kept in a file.

    compute(images (b,3,S,S)) -> float tensors (b, ...), one for each of `fields`, (name, shape without b). Returns a memory-mapped array of N
    records: `label`, then the fields, (V,*shape) float16, V views, and a mark that the record is done, so that a stopped pass goes on where it
    was; every rank writes its own records. Raises UserError where a value does not fit into float16 or the disk is full.
    """
    N, V = len(pictures), 1 + args.flip
    record = np.dtype([("label", "<i4"), *((name, "<f2", (V, *shape)) for name, shape in fields), ("done", "u1")])
    if ranks.main:
        try:
            np.load(path, mmap_mode="r")  # its name says what is in it
        except (OSError, ValueError, EOFError):  # not there, or cut short when it was made
            np.lib.format.open_memmap(path, mode="w+", dtype=record, shape=(N,)).flush()
    ranks.wait()
    rows = np.load(path, mmap_mode="r")
    chunks = [list(range(i, min(i + CHUNK, N))) for i in range(0, N, CHUNK)][ranks.rank::ranks.world]
    chunks = [chunk for chunk in chunks if not rows["done"][chunk].all()]
    loader = Loader(pictures, chunks, ranks, args.workers, args.max_bad)
    bar = tqdm(loader, desc=path.stem.split("-")[0], unit_scale=CHUNK, disable=not ranks.main, dynamic_ncols=True)
    for (images, labels, _), chunk in zip(bar, chunks):  # in this order the loader draws its seed, also where nothing is left to compute
        block = np.zeros(len(chunk), record)
        block["label"], block["done"] = labels.cpu().numpy(), 1
        with autocast(ranks, args.dtype):
            views = [compute(view) for view in ([images, images.flip(-1)] if args.flip else [images])]
        for (name, _), values in zip(fields, zip(*views)):
            values = torch.stack(values, 1).to(torch.float16)                                      # (b,V,...)
            if not values.isfinite().all():
                raise UserError(f"{path}: the networks gave values that are not finite or beyond float16; check their weights, or use --dtype float32")
            block[name] = values.cpu().numpy()
        try:
            with open(path, "r+b") as f:  # not through the map: it would end the process where the disk is full
                f.seek(rows.offset + chunk[0] * record.itemsize)
                f.write(block.tobytes())
        except OSError as e:
            raise UserError(f"{path} could not be written ({e.strerror}); make room and run the same command again") from None
    ranks.wait()
    return np.load(path, mmap_mode="r")


# ---- Shared: pictures


DIGITS = 10_000  # pictures of the default data
COLOURS = {"black": (15, 15, 15), "white": (240, 240, 240), "grey": (128, 128, 128), "red": (200, 30, 30), "green": (40, 160, 40),
           "dark blue": (25, 25, 130), "light blue": (120, 190, 245), "yellow": (240, 220, 40), "purple": (150, 40, 180), "orange": (240, 130, 20)}
TEMPLATES = ["a {ink} {digit} on a {ground} ground", "the digit {digit} in {ink} on {ground}", "a {digit}, {ink}, on a {ground} background",
             "on {ground}, a {ink} {digit}", "{ground} ground with a {ink} {digit}"]


def plan_digit(i, seed, named=False):
    """What picture i of the default data shows, a function of (i, seed) alone; `named` takes the colours from COLOURS."""
    rng = np.random.default_rng([seed, i])
    plan = argparse.Namespace(digit=int(rng.integers(10)), height=rng.uniform(0.8, 1.0), shift=rng.uniform(-0.08, 0.08, 2),
                              stroke=int(rng.integers(4)), turn=rng.uniform(-15, 15))
    plan.ink = plan.ground = np.zeros(3)
    while np.abs(plan.ink - plan.ground).sum() < 250:
        plan.ink, plan.ground = rng.integers(256, size=(2, 3)).astype(float)
        if named:
            names = rng.choice(list(COLOURS), 2)
            plan.ink, plan.ground = (np.clip(COLOURS[name] + rng.uniform(-15, 15, 3), 0, 255) for name in names)
            plan.captions = [template.format(digit=plan.digit, ink=names[0], ground=names[1]) for template in TEMPLATES]
    return plan


def draw_digit(plan, size, fonts={}):
    """A planned picture, uint8 (size,size,3)."""
    big = 4 * size  # drawn large, then averaged down
    points, (x, y) = round(big * plan.height), big / 2 + plan.shift * big
    font = fonts.get(points) or fonts.setdefault(points, ImageFont.load_default(points))
    mask = Image.new("L", (big, big))
    ImageDraw.Draw(mask).text((x, y), str(plan.digit), fill=255, font=font, anchor="mm", stroke_width=plan.stroke)
    mask = mask.rotate(plan.turn, Image.Resampling.BILINEAR).resize((size, size), Image.Resampling.BOX)
    share = np.asarray(mask, np.float32)[..., None] / 255
    return (plan.ground + share * (plan.ink - plan.ground)).round().astype(np.uint8)


def text_features(file):
    """An .npz of `features` (L,C) and, where some of them are padding, `mask` (L,) -> float32 (L,C), bool (L,). ValueError and others."""
    with np.load(file, allow_pickle=False) as z:
        features = torch.from_numpy(z["features"].astype(np.float32))
        mask = torch.from_numpy(z["mask"].astype(bool)) if "mask" in z else torch.ones(len(features), dtype=torch.bool)
    if features.ndim != 2 or mask.shape != features.shape[:1]:
        raise ValueError(f"features {tuple(features.shape)}, mask {tuple(mask.shape)}; expected (L,C) and (L)")
    return features, mask


class Pictures(torch.utils.data.Dataset):
    """An indexed set of pictures, with captions where there are some.

    source: None (the default digits), a folder (any tree), a .zip of one, a .tar or a folder of .tar shards, or a .tsv or .jsonl of
    file and caption. Captions stand in name.txt (a line each) or name.json ("caption") beside name.jpg, text features in name.npz.
    `fingerprint` is the SHA-256 of the pictures' names and of their sizes, in a .zip of their checksums.
    [i] -> (uint8 (3,pixels,pixels), label, i, readable): shorter side to `pixels`, centre crop; an unreadable picture is replaced
    by the next readable one. labels (N,) long; classes: names of the top folders, sorted; none where there are none.
    Raises UserError where nothing is found, a listed picture is missing or a caption is empty.
    """

    def __init__(self, source, pixels, seed=0, named=False):
        self.source, self.pixels, self.kept, self.archives, self.texts, self.npz = source, pixels, {}, {}, {}, {}
        if source is None:
            self.plans = [plan_digit(i, seed, named) for i in range(DIGITS)]
            self.names, self.classes = [f"digit {i}" for i in range(DIGITS)], [str(d) for d in range(10)]
            self.labels, stamp = torch.tensor([plan.digit for plan in self.plans]), f"digits {seed} {DIGITS} {named}"
            self.texts = {i: plan.captions for i, plan in enumerate(self.plans)} if named else {}
        else:
            found = dict(sorted(self.find(Path(source)), key=lambda pair: pair[0]))                # name -> place
            table = Path(source).suffix in (".tsv", ".jsonl")
            self.names = [name for name in found if name.lower().endswith(fid.SUFFIXES) and (table or "__MACOSX" not in name and "/." not in name)]
            if not self.names:
                raise UserError(f"{source}: no pictures in it; expected a folder, .zip, .tar, .tsv or .jsonl with {', '.join(fid.SUFFIXES)} files")
            self.places = [found[name] for name in self.names]
            for i, name in enumerate(self.names):
                stem = name.rsplit(".", 1)[0]
                for beside, kept in ((f"{stem}.json", self.texts), (f"{stem}.txt", self.texts), (f"{name}.txt", self.texts), (f"{stem}.npz", self.npz)):
                    if beside in found:
                        kept[i] = found[beside]
            tops = [name.rsplit(".tar: ", 1)[-1].split("/")[:-1] for name in self.names]  # shards are no classes
            while all(len(top) > 1 and top[0] == tops[0][0] for top in tops):  # one folder around all, as in many archives
                tops = [top[1:] for top in tops]
            self.classes = sorted({top[0] for top in tops}) if all(tops) and not table else []
            number = {name: i for i, name in enumerate(self.classes)}
            self.labels = torch.tensor([number[top[0]] if number else 0 for top in tops])
            stamp = "".join(f"{name} {place[-1] if len(place) > 1 else os.path.getsize(place[0])}\n" for name, place in zip(self.names, self.places))
        self.fingerprint = hashlib.sha256(f"{pixels} {stamp}".encode()).hexdigest()
        self.small = len(self.names) * 3 * pixels**2 <= 2**28  # decoded pictures then stay in memory

    def find(self, source):
        """Yields (name, place) of every file; a place is (path), (path of a .zip, name in it, CRC) or (path of a .tar, offset, size), or the list of
        captions that a table gives."""
        if source.is_dir():
            for path in (path for path in source.rglob("*") if not path.name.startswith(".")):
                if path.suffix == ".tar":
                    yield from self.tar(path, f"{path.relative_to(source).as_posix()}: ")
                elif path.is_file():
                    yield path.relative_to(source).as_posix(), (str(path),)
        elif not source.is_file():
            raise UserError(f"{source}: no such file or folder; give a folder of pictures, a .zip or .tar of one, or a .tsv or .jsonl")
        elif source.suffix == ".tar":
            yield from self.tar(source, "")
        elif source.suffix in (".tsv", ".jsonl"):
            yield from self.table(source)
        else:
            with naming(f"{source}: neither a folder nor a whole .zip, .tar, .tsv or .jsonl"), zipfile.ZipFile(source) as archive:
                infos = [info for info in archive.infolist() if not info.is_dir()]
            yield from ((info.filename, (str(source), info.filename, info.CRC)) for info in infos)

    def tar(self, path, prefix):
        """The members of a .tar shard by offset, so that any of them can be read at once."""
        with naming(f"{path}: not a whole .tar", "; get it again"), tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isfile():
                    if member.offset_data + member.size > os.path.getsize(path):
                        raise tarfile.ReadError(f"{member.name} is cut short")
                    yield prefix + member.name, (str(path), member.offset_data, member.size)

    def table(self, path):
        """The pictures of a .tsv (file, tab, caption) or .jsonl ({"file": ..., "caption": ...}), relative to its folder."""
        listed = collections.defaultdict(list)
        with naming(f"{path}: expected lines of file, tab and caption, or of JSON with file and caption"):
            for line in filter(str.strip, path.read_text(encoding="utf-8").split("\n")):
                row = json.loads(line) if path.suffix == ".jsonl" else dict(zip(("file", "caption"), line.split("\t", 1)))
                listed[str(row["file"])] += row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        for file, captions in listed.items():
            if not (path.parent / file).is_file():
                raise UserError(f"{path}: {file} is not there; paths are relative to {path.parent}")
            if not all(str(caption).strip() for caption in captions):
                raise UserError(f"{path}: {file} has an empty caption; write one or leave the line out")
            yield file, (str(path.parent / file),)
            yield f"{file}.txt", [str(caption) for caption in captions]

    def bytes(self, place, limit=2**28):
        """What lies at a place, at most `limit` bytes."""
        path, *inside = place
        if inside and isinstance(inside[0], str):
            key = (os.getpid(), path)  # an open archive cannot be shared between processes
            if key not in self.archives:
                self.archives[key] = zipfile.ZipFile(path)
            with self.archives[key].open(inside[0]) as f:
                return f.read(limit)
        with open(path, "rb") as f:
            f.seek(inside[0] if inside else 0)
            return f.read(min(limit, inside[1]) if inside else limit)

    def captions(self, i):
        """The captions of picture i. Raises UserError where there is none or an empty one."""
        place = self.texts.get(i)
        if isinstance(place, list):
            return place
        with naming(f"{self.source}: the caption of {self.names[i]} cannot be read"):
            text = self.bytes(place, 2**20).decode() if place else ""
            captions = json.loads(text)["caption"] if text.lstrip().startswith("{") else text.strip().split("\n")
            captions = captions if isinstance(captions, list) else [captions]
        if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
            raise UserError(f"{self.source}: {self.names[i]} has no caption or an empty one; write one or take the picture out")
        return captions

    def features(self, i):
        """Text features made beforehand: (features (L,C) float32, mask (L,) bool) of picture i. Raises UserError."""
        with naming(f"{self.source}: no text features (L,C) for {self.names[i]}"):
            return text_features(io.BytesIO(self.bytes(self.npz[i])))

    def __len__(self):
        return len(self.names)

    def read(self, i):
        """uint8 (3,pixels,pixels). Raises UserError where it cannot be decoded."""
        if i not in self.kept:
            if self.source is None:
                image = draw_digit(self.plans[i], self.pixels)
            else:
                with naming(f"{self.names[i]}: not a readable picture"):
                    image = Image.fromarray(fid.decode(io.BytesIO(self.bytes(self.places[i]))))
                image = np.array(ImageOps.fit(image, (self.pixels, self.pixels), Image.Resampling.BICUBIC))
            x = torch.from_numpy(image).permute(2, 0, 1)
            if not self.small:
                return x
            self.kept[i] = x
        return self.kept[i]

    def __getitem__(self, i):
        for j in range(i, i + len(self)):
            try:
                return self.read(j % len(self)), self.labels[j % len(self)], i, j == i
            except UserError:
                pass
        raise UserError(f"{self.source}: not one of its {len(self)} pictures can be read")


class Order:
    """Batch sampler: this rank's picture numbers of the steps first..last-1. Every epoch is a permutation of its own, a function of
    (seed, epoch) alone, and an epoch may end within a batch; so nothing about the position has to be saved."""

    def __init__(self, n, batch, ranks, first, last, seed):
        self.n, self.batch, self.ranks, self.first, self.last, self.seed = n, batch, ranks, first, last, seed

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        permutation = functools.lru_cache(1)(lambda epoch: np.random.default_rng([self.seed, epoch]).permutation(self.n))
        share = self.batch // self.ranks.world
        for step in range(self.first, self.last):
            at = step * self.batch + self.ranks.rank * share
            yield [int(permutation(position // self.n)[position % self.n]) for position in range(at, at + share)]


class Loader:
    """Iterates over (images (b,3,S,S) in [-1,1], labels (b,), indices (b,) on the CPU), this rank's part of each step."""

    def __init__(self, pictures, sampler, ranks, workers=None, max_bad=0.0):
        gpu = ranks.device.type == "cuda"
        workers = workers if workers is not None else 4 if gpu and not pictures.small else 0
        self.loader = torch.utils.data.DataLoader(pictures, batch_sampler=sampler, num_workers=workers, pin_memory=gpu)
        self.pictures, self.ranks, self.bad, self.limit = pictures, ranks, set(), max_bad * len(pictures) / ranks.world

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels, indices, readable in self.loader:
            for i in set(indices[~readable].tolist()) - self.bad:
                self.bad.add(i)
                print(f"\nskipped: {self.pictures.names[i]} cannot be read ({len(self.bad)} so far)", file=sys.stderr)
                if len(self.bad) > self.limit:
                    raise UserError(f"{self.pictures.source}: {len(self.bad)} of {len(self.pictures)} pictures cannot be read, the "
                                    f"last {self.pictures.names[i]}; mend them or raise --max-bad")
            images, labels = (u.to(self.ranks.device, non_blocking=True) for u in (images, labels))
            yield images.float() / 127.5 - 1, labels, indices


def grid(rows):
    """Rows of images (each (B,3,H,W) in [-1,1]) -> one PIL picture, enlarged to be seen."""
    x = torch.stack([fid.to_uint8(row.cpu().nan_to_num()) for row in rows])                                 # (rows,B,3,H,W)
    R, B, _, H, W = x.shape
    picture = Image.fromarray(x.permute(0, 3, 1, 4, 2).reshape(R * H, B * W, 3).numpy())
    scale = max(1, 64 // H)
    return picture.resize((B * W * scale, R * H * scale), Image.Resampling.NEAREST)


# ---- Shared: options and errors


class Parser(argparse.ArgumentParser):
    """argparse that refuses in one line with status 2, takes no abbreviations and prints every default."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(self, name, default=None, help="", **kwargs):
        """add_argument with the default in the help text."""
        shown = "" if default is None or default is False else f" (default: {default})"
        self.add_argument(name, default=default, help=help + shown, **kwargs)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(low, high=math.inf, kind=float):
    """An argparse type: a finite number within [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")
        return value
    return parse


whole = functools.partial(number, high=2**31, kind=int)


def common_options(p, save_every):
    """The options of both trainers."""
    p.add("--out", "out", "folder for checkpoint, log and pictures")
    p.add("--data", None, "folder of pictures (sub-folders are classes), .zip of one, or .tar shards; default: coloured digits")
    p.add("--size", None, "size of the networks (default: that of the checkpoint that is begun with, else nano)", choices=list(SIZES))
    p.add("--steps", None, "optimizer steps in all", type=whole(1))
    p.add("--batch", None, "pictures a step, over all GPUs and accumulation", type=whole(1))
    p.add("--lr", None, "AdamW learning rate after warm-up", type=number(0))
    p.add("--warmup", None, "steps of linear warm-up", type=whole(0))
    p.add("--ema", None, "decay of the averaged weights", type=number(0, 1))
    p.add("--seed", 0, "seed of weights, picture order, noise and prior", type=whole(0))
    p.add("--flip", False, "mirror half of the pictures (not for digits)", action="store_true")
    p.add("--clip-grad", 1.0, "largest norm of the gradient; 0 is none", type=number(0))
    p.add("--accumulate", 1, "cut each GPU's part of the batch into this many pieces to save memory", type=whole(1))
    p.add("--prior-steps", 1600, "steps of nano's own prior, 128 pictures each; only stage 1 trains one", type=whole(1))
    p.add("--log-every", 20, "steps between lines of the log", type=whole(1))
    p.add("--save-every", save_every, "steps between checkpoints and pictures", type=whole(1))
    p.add("--device", "auto", "auto (cuda where there is one, else cpu), cpu, cuda or mps", choices=["auto", "cpu", "cuda", "mps"])
    p.add("--dtype", "auto", "of the networks: auto is bfloat16 where the device has matrix instructions for it",
          choices=["auto", "float32", "bfloat16"])
    p.add("--workers", None, "processes that read pictures (default: 4 with a GPU, else 0)", type=whole(0))
    p.add("--max-bad", 0.001, "share of unreadable pictures that is skipped", type=number(0, 1))
    p.add("--compile", False, "torch.compile the networks", action="store_true")
    p.add("--bench", False, "print times, GMACs and share of the matrix-multiply peak of this size's networks, and exit", action="store_true")
    p.add("--fresh", False, "start anew, over what lies in --out", action="store_true")


def complete(args, paper, nano, decoder=None):
    """Fill in what the command line left open: --size, that of the checkpoint's `decoder` where there is one, then what hangs on it."""
    if args.size is None:
        width = decoder.config["width"] if decoder else SIZES["nano"]["decoder"]["width"]
        args.size = next((size for size, shape in SIZES.items() if shape["decoder"]["width"] == width), None)
        if not args.size:
            raise UserError(f"--size: the checkpoint's decoder is {width} wide, which is none of {', '.join(SIZES)}; give the size")
    for name, value in (nano if args.size == "nano" else paper).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def make_folder(path, option="--out"):
    """The folder, made where it is missing. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{option} {path}: cannot be made a folder ({e.strerror}); give another") from None
    if not os.access(path, os.W_OK):
        raise UserError(f"{option} {path}: nothing may be written there; give another folder")


ERRORS = UserError, dec.UserError, fid.UserError  # each file that can be copied alone has its own


@contextlib.contextmanager
def naming(what, mend=""):
    """Strangers' files raise a dozen kinds of exceptions in their readers; each becomes a UserError: `what`, the reason, how to mend it."""
    try:
        yield
    except ERRORS:
        raise
    except Exception as e:
        raise UserError(f"{what} ({type(e).__name__}: {tok.plain(str(e), 120)}){mend}") from None


def guarded(main):
    """Call main(); what a user can mend ends in one line and status 2, a programmer's error in its traceback."""
    try:
        main()
    except (*ERRORS, torch.OutOfMemoryError, OSError) as e:
        said = str(e)
        if isinstance(e, torch.OutOfMemoryError):
            said = f"out of memory on the GPU ({said.split('. ')[0]}); use a larger --accumulate, --checkpointing or a smaller --batch"
        elif isinstance(e, OSError):
            if e.errno != errno.ENOSPC:
                raise
            said = "the disk is full; make room and run the same command again"
        for bar in list(getattr(tqdm, "_instances", ())):  # the sentence gets a line of its own
            bar.close()
        rank = f" on rank {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"{Path(sys.argv[0]).name}: error{rank}: {' '.join(said.split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


# ---- Shared: --bench


def count_macs(function):
    """Multiply-accumulates of a call, in 1e9: (linear and convolution layers, attention products)."""
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with plain, torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        function()
    ops = {str(op): n / 2e9 for op, n in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for op, n in ops.items() if "attention" in op or "bmm" in op)
    return sum(ops.values()) - attention, attention


def median_ms(function, device, seconds=4.0):
    """Median time of a call, after one that does not count."""
    times = []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    function(), wait()
    while len(times) < 3 or sum(times) < 1e3 * seconds and len(times) < 100:
        start = time.perf_counter()
        function(), wait()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


def bench_rows(rows, ranks, dtype):
    """Print name, milliseconds, images/s, GMACs an image (linear + attention), GFLOP/s and its share of the matrix-multiply peak.

    rows: (name, function, images a call), run under --dtype. The peak is that of a 4096^3 product in it, measured before and after.
    """
    device, (a, b) = ranks.device, (torch.randn(4096, 4096, device=ranks.device) for _ in range(2))
    with autocast(ranks, dtype):
        dtype = (a @ b).dtype
        a, b = a.to(dtype), b.to(dtype)
        peak = lambda: 2 * 4096**3 / median_ms(lambda: a @ b, device) / 1e6
        before, results = peak(), []
        for name, function, images in rows:
            (linear, attention), ms = count_macs(function), median_ms(function, device)
            results.append((name, ms, images / ms * 1e3, linear / images, attention / images, 2e3 * (linear + attention) / ms))
        top = max(before, peak())
    print(f"{device}, {dtype}: peak of a 4096^3 product {top:.0f} GFLOP/s; medians")
    print(f"{'':34s}{'ms':>9s}{'images/s':>10s}{'GMACs':>9s}{'+ attn':>8s}{'GFLOP/s':>9s}{'of peak':>9s}")
    for name, ms, rate, linear, attention, flops in results:
        print(f"{name:34s}{ms:9.1f}{rate:10.2f}{linear:9.3f}{attention:8.3f}{flops:9.0f}{flops / top:8.0%}")


if __name__ == "__main__":
    guarded(main)
