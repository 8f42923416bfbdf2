"""Use a trained RepTok: generate pictures from classes, reconstruct, interpolate, export.

    python sample.py --ckpt out/stage2.pt                                      # a row of every class, up to ten
    python sample.py --ckpt out/stage2.pt --classes 3 7 --per-class 16 --cfg 1.5
    python sample.py --ckpt out/stage1.pt --reconstruct a.png b.png            # inputs above, reconstructions below
    python sample.py --ckpt out/stage1.pt --interpolate a.png b.png            # a straight line between two tokens
    python sample.py --ckpt reptok-xl-600k-ImageNet.ckpt --classes 207 981     # the authors' checkpoint
    torchrun --nproc-per-node 8 -- sample.py --ckpt out/stage2.pt --eval imagenet/val --num 50000   # rFID, PSNR, gFID, ...
    python sample.py --ckpt out/stage2.pt --export small.pt                    # without what only training needs

In Python: model = RepTok.load(path); z = model.encode(images); images = model.decode(z); z = model.generate(classes).
"""
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import fid
import tokenizer as tok
from decoder import Decoder, PixelSpace, VAE, euler, flow_loss, vae_from
from mixer import Mixer, guided
from tokenizer import ClipText, TextTower, Tokenizer, UserError, ViT, WordEncoder
from train_stage1 import (Bins, Parser, Pictures, Ranks, grid, guarded, load_checkpoint, make_folder, naming, noise_for, number, plausible,
                          save_checkpoint, text_features, whole)


class RepTok:
    """Tokenizer, decoder, VAE and, from stage 2 on, Mixer of one checkpoint, with their averaged (EMA) weights.

    Tokens z are (B,K,D) in the encoder's own scale; the Mixer works on normalised ones, (z - mean) / std, mean and std (1,K,D).
    """

    def __init__(self, tokenizer, decoder, vae, mixer=None, mean=None, std=None, classes=(), released=False, text=None):
        self.tokenizer, self.decoder, self.vae, self.mixer, self.text = tokenizer, decoder, vae, mixer, text
        self.mean, self.std, self.classes, self.released = mean, std, list(classes), released
        self.pixels = decoder.config["size"] * vae.factor

    device = property(lambda self: self.decoder.freqs.device)

    @classmethod
    def load(cls, path, device="cpu"):
        """Any checkpoint: stage1.pt, stage2.pt, an export, or the authors' release. Raises UserError."""
        content = load_checkpoint(path, ["stage1", "stage2", "the authors' RepTok"])
        return (cls.from_checkpoint if "kind" in content else released)(content, path).to(device)

    @classmethod
    def from_checkpoint(cls, content, path):
        """Builds the networks that the checkpoint describes; the averaged weights replace the last ones."""
        with naming(f"{path}: a damaged checkpoint", "; use the one before it, NAME.prev.pt"):
            state = {name: dict(content[name]["state"]) for name in ("tokenizer", "decoder", "vae", "mixer", "text") if name in content}
            for name, average in content.get("ema", {}).items():
                part, name = name.split(".", 1)
                state[part][name] = average
            t, config = content["tokenizer"]["config"], {name: content[name]["config"] for name in state}
            for name in state:
                plausible({k: v for k, v in config[name].items() if k not in ("vit", "words", "vocabulary")}, state[name])
            plausible(t["vit"], state["tokenizer"])
            with torch.device("meta"):
                vit = ViT(**t["vit"])
            vit = tok.fit(vit, under(state["tokenizer"], "vit."), path, "a tokenizer")  # before anything takes memory
            tokenizer = tok.fit(Tokenizer(vit, t["token"], t["reg_index"], t["unfreeze"]), state["tokenizer"], path, "a tokenizer")
            with torch.device("meta"):
                decoder, vae = Decoder(**config["decoder"]), VAE(**config["vae"]) if config["vae"] else PixelSpace()
                mixer = Mixer(**config["mixer"]) if "mixer" in state else None
            tok.fit(decoder, state["decoder"], path, "a decoder"), tok.fit(vae, state["vae"], path, "a VAE")
            if mixer:
                tok.fit(mixer, state["mixer"], path, "a Mixer")
            text = text_from(content["text"], state["text"], path) if "text" in state else None
            latent = content.get("latent", {})
            if mixer and not all(latent[k].shape == (1, mixer.K, mixer.D) for k in ("mean", "std")):
                raise ValueError("latent statistics of another size")
            return cls(tokenizer, decoder, vae, mixer, latent.get("mean"), latent.get("std"), content["classes"], content.get("released", False), text)

    def to(self, device):
        """Move every part; returns self."""
        for part in (self.tokenizer, self.decoder, self.vae, self.mixer, self.text):
            if part is not None:
                part.to(device).eval()
        self.vae.to(memory_format=torch.channels_last)
        if self.mean is not None:
            self.mean, self.std = self.mean.to(device), self.std.to(device)
        return self

    def parts(self):
        """What a checkpoint needs to be self-contained, as plain containers and tensors."""
        part = lambda module: {"config": module.config, "state": module.state_dict()}
        content = {"kind": "stage1", "step": 0, "classes": self.classes, "released": self.released,
                   "tokenizer": part(self.tokenizer), "decoder": part(self.decoder), "vae": part(self.vae)}
        if self.mixer is not None:
            content.update(kind="stage2", mixer=part(self.mixer), latent={"mean": self.mean, "std": self.std})
        if isinstance(self.text, ClipText):
            content["text"] = {"config": {"vocabulary": torch.tensor(list(self.text.bpe.file), dtype=torch.uint8)}, "state": self.text.state_dict()}
        elif self.text is not None:
            content["text"] = part(self.text)
        return content

    def noise(self, seeds, mixer=False):
        """Where the decoder's flow starts, (n,C,size,size), or the Mixer's, (n,K,D): one seed a picture, whatever the batch."""
        size = self.decoder.config["size"]
        return noise_for(seeds, (self.mixer.K, self.mixer.D) if mixer else (self.decoder.config["channels"], size, size), self.device, mixer)

    @torch.no_grad()
    def encode(self, images):
        """Images (B,3,H,W) in [-1,1], any size -> tokens (B,K,D)."""
        return self.tokenizer(images.to(self.device))

    @torch.no_grad()
    def decode(self, tokens, steps=50, noise=None, batch=64):
        """Tokens (B,K,D) -> images (B,3,pixels,pixels) in [-1,1], by `steps` Euler steps of the decoder's flow.

        noise (B,C,size,size): where the flow starts; by default picture i starts from seed i, whatever the batch.
        """
        images, noise = [], self.noise(range(len(tokens))) if noise is None else noise.to(self.device)
        for z, x in zip(tokens.to(self.device).split(batch), noise.split(batch)):
            projected = self.decoder.project(z)
            x = euler(lambda x_t, t: self.decoder.velocity(x_t, self.decoder.condition(t), projected), x, steps)
            images.append(self.vae.decode(x).clamp(-1, 1))
        return torch.cat(images)

    @torch.no_grad()
    def prompts(self, strings):
        """Strings -> (text (B,L,C), mask (B,L)) for `generate`. Raises UserError where the checkpoint cannot read text."""
        if self.text is None:
            raise UserError("this checkpoint has no text encoder" + (": it takes --features, an .npz of text features" if self.mixer is not None and
                            self.mixer.cross else ": it was trained on classes or on none; train with train_stage2.py --captions"))
        ids = self.text.ids(strings).to(self.device)
        return self.text(ids), self.text.mask(ids)

    @torch.no_grad()
    def generate(self, classes=None, steps=50, cfg=1.0, cfg_interval=(0, 1), noise=None, text=None, mask=None, batch=1024):
        """Classes (B,) long, or text (B,L,C) with its mask (B,L) -> new tokens (B,K,D), by `steps` Euler steps of the Mixer's flow.

        cfg: guidance scale, used while cfg_interval[0] <= t <= cfg_interval[1]; 1 is none. noise (B,K,D) is normalised; by default
        picture i starts from seed i. Raises UserError on a checkpoint of stage 1.
        """
        if self.mixer is None:
            raise UserError("this checkpoint is of stage 1, which reconstructs but cannot generate: train stage 2 and give its stage2.pt")
        if bool(self.mixer.cross) != (text is not None):
            raise UserError("this checkpoint takes " + ("text: give a prompt" if self.mixer.cross else "no text: give classes"))
        if classes is None and text is None and (noise is None or self.mixer.classes):
            raise UserError("say which classes: generate(classes), a tensor (B,) of their numbers")
        conditions = [u if u is None else u.to(self.device) for u in (classes if self.mixer.classes else None, text, mask)]
        count, tokens = len(noise if noise is not None else text if classes is None else classes), []
        noise = self.noise(range(count), mixer=True) if noise is None else noise.to(self.device)
        for i in range(0, count, batch):
            velocity = guided(self.mixer, *(u if u is None else u[i:i + batch] for u in conditions), scale=cfg, interval=cfg_interval)
            tokens.append(euler(velocity, noise[i:i + batch], steps) * self.std + self.mean)
        return torch.cat(tokens)


def text_from(stored, state, path):
    """The text encoder of a checkpoint. Raises UserError."""
    if "vocabulary" not in stored["config"]:
        with torch.device("meta"):  # before anything takes memory
            text = WordEncoder(**stored["config"])
        return tok.fit(text, state, path, "a text encoder")
    shape = {k.removeprefix("tower."): v.shape for k, v in state.items()}
    (vocabulary, width), context = shape["token_embedding.weight"], len(state["tower.positional_embedding"])
    with torch.device("meta"):
        tower = TextTower(vocabulary, context, width, len({k.split(".")[1] for k in shape if k.startswith("blocks.")}), shape["text_projection"][1])
    return tok.fit(ClipText(tower, bytes(stored["config"]["vocabulary"].tolist())), state, path, "a text encoder")


# ---- Command line


def options():
    """The command line."""
    p = Parser(__doc__)
    p.add("--ckpt", None, "checkpoint: stage1.pt, stage2.pt, an export, or the authors'", required=True)
    p.add("--classes", None, "names or numbers of classes; a row of pictures each (default: all, up to ten)", nargs="+")
    p.add("--prompt", None, "a prompt; a row of pictures each (may be given several times)", action="append")
    p.add("--prompts", None, "file with a prompt a line")
    p.add("--features", None, "text features (L,C) made beforehand instead of a prompt, .npz; a row each", nargs="+")
    p.add("--per-class", 8, "pictures a row, of a class or prompt", type=whole(1))
    p.add("--reconstruct", None, "pictures to encode and decode", nargs="+")
    p.add("--interpolate", None, "two pictures; eight steps between their tokens", nargs=2)
    p.add("--eval", None, "score the checkpoint on these pictures: rFID, PSNR, SSIM, LPIPS, and from stage 2 on gFID; under torchrun too")
    p.add("--num", None, "pictures to reconstruct and to generate for --eval (default: as many as there are)", type=whole(2))
    p.add("--labels", "equal", "classes of the generated pictures of --eval: equal numbers, or random", choices=["equal", "random"])
    p.add("--reference", None, "statistics .npz that gFID is held against, instead of the pictures of --eval")
    p.add("--save", None, "folder that keeps the pictures of --eval, in reconstructed/ and generated/")
    p.add("--inception", fid.INCEPTION, "FID Inception weights")
    p.add("--resize", "pytorch-fid", "preprocessing of FID", choices=["pytorch-fid", "tf1"])
    p.add("--vgg", None, "VGG16 weights for LPIPS; without them it is left out")
    p.add("--lpips", None, "LPIPS heads")
    p.add("--clip", None, "CLIP file for the CLIP score of captioned pictures")
    p.add("--bpe", None, "CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz")
    p.add("--json", None, "write the scores of --eval to this file")
    p.add("--batch", 50, "pictures at once in --eval", type=whole(1))
    p.add("--steps", 50, "Euler steps of Mixer and decoder", type=whole(1))
    p.add("--cfg", 1.5, "guidance scale; 1 is none", type=number(0))
    p.add("--cfg-interval", [0.3, 0.9], "guidance acts while t is between these", nargs=2, type=number(0, 1))
    p.add("--seed", 0, "seed of the first picture; the next ones count on", type=whole(0))
    p.add("--out", "samples.png", "the picture to write")
    p.add("--export", None, "write the checkpoint to this file without what only training needs, and exit")
    p.add("--device", "auto", "auto, cpu, cuda or mps", choices=["auto", "cpu", "cuda", "mps"])
    args = p.parse_args()
    for one, other in (("vgg", "lpips"), ("clip", "bpe")):
        if bool(getattr(args, one)) != bool(getattr(args, other)):
            raise UserError(f"--{one} and --{other} go together: give both or neither")
    for prompt in ("prompt", "prompts"):  # which may be given both
        given = [name for name in ("eval", "export", "reconstruct", "interpolate", "classes", "features", prompt) if getattr(args, name)]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} do not go together; give one of them")
    for name in ("out", "export", "json"):
        path = getattr(args, name)
        if path and (not Path(path).parent.is_dir() or Path(path).is_dir()):
            raise UserError(f"--{name} {path}: not the path of a file in a folder that is there")
    return args


def class_numbers(model, wanted):
    """Names or numbers -> class numbers; all, up to ten, where none are wanted. Raises UserError."""
    count = model.mixer.classes
    if wanted is None:
        return list(range(min(count, 10))) or [0]
    if not count:
        raise UserError("--classes: this checkpoint has no classes; leave the option out")
    numbers = []
    for name in wanted:
        if name in model.classes:
            numbers.append(model.classes.index(name))
        elif name.isdecimal() and int(name) < count:
            numbers.append(int(name))
        else:
            known = f"; by name: {', '.join(model.classes[:10])}" + (" ..." if len(model.classes) > 10 else "") if model.classes else ""
            raise UserError(f"--classes {name}: no such class; they are numbered 0 to {count - 1}{known}")
    return numbers


def conditions_of(model, args):
    """What the command line asks for, as arguments of `generate`: classes, or text and its mask. Raises UserError."""
    prompts = list(args.prompt or [])
    if args.prompts:
        with naming(f"--prompts {args.prompts}: cannot be read as text"):
            prompts += [line for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    if args.features:
        with naming("--features: not an .npz with features (L,C)"):
            rows = [text_features(path) for path in args.features]
        width = model.mixer.config["text_width"]
        if not width:
            raise UserError("--features: this checkpoint takes no text; give --classes")
        if any(features.shape[1] != width for features, _ in rows):
            raise UserError(f"--features: expected (L,{width}), as the checkpoint was trained with; got {[tuple(f.shape) for f, _ in rows]}")
        return {name: torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for name, part in zip(("text", "mask"), zip(*rows))}
    if not prompts and not model.mixer.cross:
        return {"classes": torch.tensor(class_numbers(model, args.classes))}
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise UserError("this checkpoint takes text: give --prompt with some words in it")
    for prompt in prompts:
        if model.text is not None and len(model.text.split(prompt)) > model.text.context:
            print(f"--prompt {prompt[:60]!r}... is too long and was cut")
    text, mask = model.prompts(prompts)
    return {"text": text, "mask": mask}


class ClipScore:
    """Cosine of CLIP's embeddings of picture and caption (Hessel 2021)."""

    def __init__(self, path, vocabulary, device):
        path = tok.weight_file(path)
        tensors = tok.read_tensors(path)
        self.vit, self.text = tok.vit_from(tensors, path).to(device), ClipText(tok.load_text_encoder(path), vocabulary).to(device)
        proj = tensors["visual.proj"] if "visual.proj" in tensors else tensors["visual_projection.weight"].T
        self.proj, self.mean, self.std = proj.float().to(device), *(torch.tensor(v, device=device).view(3, 1, 1) for v in tok.CLIP)

    @torch.no_grad()
    def __call__(self, images, captions):
        """Images (B,3,H,W) in [-1,1], B strings -> cosine (B,)."""
        x = torch.nn.functional.interpolate(images, (self.vit.pixels,) * 2, mode="bicubic", antialias=True)
        a = self.vit(((x + 1) / 2 - self.mean) / self.std)[:, 0] @ self.proj                       # (B,E)
        return torch.cosine_similarity(a, self.text.tower.embed(self.text.bpe(captions).to(a.device)))


@torch.no_grad()
def evaluate(args, model, ranks):
    """--eval: scores of the tokenizer on these pictures, and of the generator; every picture by its own seed, whatever the ranks."""
    pictures, text = Pictures(args.eval, model.pixels), model.mixer is not None and bool(model.mixer.cross)
    if model.pixels < 16:
        raise UserError(f"--eval: SSIM and LPIPS need pictures of at least 16 pixels, and this checkpoint makes {model.pixels}")
    if text and model.text is None:
        raise UserError("--eval: the checkpoint was trained on features made beforehand, and has no encoder for the captions")
    if args.clip and not text:
        raise UserError("--clip: the checkpoint takes no text to hold its pictures against; leave the option out")
    if text and not pictures.texts:
        raise UserError(f"--eval {args.eval}: the checkpoint takes text, and these pictures have no captions")
    net = fid.load_inception(args.inception, args.resize, ranks.device)
    reference = fid.read_statistics(args.reference) if args.reference else None
    if reference:
        fid.compare(reference, net)
    lpips = fid.LPIPS(args.vgg, args.lpips).to(ranks.device) if args.vgg else None
    clip = ClipScore(args.clip, args.bpe, ranks.device) if args.clip else None
    real, recon, made, pairs, cosine, losses = sums(args, model, ranks, pictures, net, lpips, clip)
    if not ranks.main:
        return
    how, digest = {"preprocessing": args.resize, "weights": net.inception}, fid.sha256(args.eval)
    rows = [fid.record("rFID", fid.fid(real, recon), real.n, recon.n, args.eval, digest, **how), *fid.record_pairs(pairs, lpips, args.eval, digest)]
    if model.mixer is not None:
        side, *where = (reference, args.reference, fid.sha256(args.reference)) if reference else (real, args.eval, digest)
        rows.append(fid.record("gFID", fid.fid(side, made), side.n, made.n, *where, **how))
        print("loss of Eq. 1 in eight segments of t:", " ".join("-" if v is None else f"{v:.4f}" for v in losses))
    if clip:
        rows.append(fid.record("CLIP score", 100 * cosine.mu[0], cosine.n, cosine.n, args.eval, digest, weights=fid.sha256(tok.weight_file(args.clip))))
        print(f"CLIPScore (2.5 max(cos, 0)): {2.5 * max(cosine.mu[0], 0):.4f}")
    if args.json:
        fid.write_file(args.json, lambda f: f.write(json.dumps(rows, indent=1).encode()))


def sums(args, model, ranks, pictures, net, lpips, clip):
    """The loop of `evaluate`: Statistics over all ranks of real, reconstructed and generated pictures, of pair_scores and of CLIP's cosine,
    and the Mixer's loss in eight segments of t."""
    real, recon, made = (fid.Statistics(2048, args.resize, net.inception) for _ in range(3))
    pairs, cosine, bins = fid.Statistics(3), fid.Statistics(1), Bins(ranks.device)
    mixer, N, C = model.mixer, len(pictures), model.mixer.classes if model.mixer else 0
    count, order = args.num or N, np.arange(N)
    if count < N:  # a part of them is drawn from all, not from the first classes
        order = np.random.default_rng(args.seed).permutation(N)
    labels = torch.arange(count) % max(C, 1)
    if args.labels == "random":
        labels = torch.randint(max(C, 1), (count,), generator=torch.Generator().manual_seed(args.seed))
    mine = range(ranks.rank, count, ranks.world)
    for at in tqdm(range(0, len(mine), args.batch), desc="eval", unit_scale=args.batch, disable=not ranks.main, dynamic_ncols=True):
        chunk = list(mine[at:at + args.batch])
        seeds, shown = [args.seed + i for i in chunk], [int(order[i % N]) for i in chunk]          # the picture that goes with each number
        noise, n = model.noise(seeds), sum(i < N for i in chunk)                                   # from number N on they come again
        if here := shown[:n]:
            x = torch.stack([pictures.read(i) for i in here]).to(ranks.device)                     # uint8 (n,3,S,S)
            z = model.encode(x.float() / 127.5 - 1)
            y = fid.to_uint8(model.decode(z, args.steps, noise[:n]))
            real.update(net(x)), recon.update(net(y)), pairs.update(fid.pair_scores(x, y, lpips))
            keep(args.save, "reconstructed", here, y)
        if mixer is None:
            continue
        captions = [(own := pictures.captions(p))[i // N % len(own)] for i, p in zip(chunk, shown)] if mixer.cross else None
        features = model.prompts(captions) if captions else (None, None)
        start = model.noise(seeds, mixer=True)
        if here:  # the loss of Eq. 1 on these tokens
            t = torch.tensor([i * 0.6180339887 % 1 for i in here], device=ranks.device)
            known = (pictures.labels[here] if len(pictures.classes) == C else torch.full((n,), C)).to(ranks.device)
            bins.add(t, flow_loss(lambda z_t, s: mixer(z_t, s, known, *(u if u is None else u[:n] for u in features)),
                                  (z - model.mean) / model.std, t, start[:n]))
        y = fid.to_uint8(model.decode(model.generate(labels[chunk], args.steps, args.cfg, args.cfg_interval, start, *features), args.steps, noise))
        made.update(net(y))
        keep(args.save, "generated", chunk, y)
        if clip:
            cosine.update(clip(y.float() / 127.5 - 1, captions)[:, None])
    return *(side.reduce() for side in (real, recon, made, pairs, cosine)), bins.read(ranks)


def keep(folder, kind, numbers, images):
    """Save uint8 pictures (B,3,H,W) as folder/kind/number.png, where a folder is given."""
    if folder:
        make_folder(Path(folder, kind), "--save")
        for i, x in zip(numbers, images.cpu()):
            Image.fromarray(x.permute(1, 2, 0).numpy()).save(Path(folder, kind, f"{i:06d}.png"))


def load_images(paths, pixels):
    """Picture files, any size -> [(1,3,H,W) in [-1,1]] and, cropped to pixels x pixels for the eye, (B,3,pixels,pixels)."""
    images = []
    for path in paths:
        with naming(f"{path}: not a readable picture"):
            x = fid.decode(path)
        images.append(torch.from_numpy(x).permute(2, 0, 1)[None].float() / 127.5 - 1)
    return images, torch.cat([tok.resize(x, pixels) for x in images])


def main():
    """The command line: load, then score, export, or draw one picture. Raises UserError."""
    args = options()
    ranks = Ranks(args.device)
    model = RepTok.load(args.ckpt, ranks.device)
    if args.eval:
        return evaluate(args, model, ranks)
    if args.export:
        return save_checkpoint(Path(args.export), model.parts())
    seeds = lambda n: range(args.seed, args.seed + n)
    if args.reconstruct or args.interpolate:
        images, shown = load_images(args.reconstruct or args.interpolate, model.pixels)
        z = torch.cat([model.encode(x) for x in images])                                           # (B,K,D)
        if args.interpolate:
            s = torch.linspace(0, 1, 8, device=model.device)[:, None, None]
            strip = model.decode((1 - s) * z[:1] + s * z[1:], args.steps, model.noise(seeds(1)).expand(8, -1, -1, -1))
            rows = [torch.cat([shown[:1], strip.cpu(), shown[1:]])]                                # input, eight steps, input
        else:
            rows = [shown, model.decode(z, args.steps, model.noise(seeds(len(z)))).cpu()]
    else:
        if model.mixer is None:
            raise UserError(f"--ckpt {args.ckpt}: a checkpoint of stage 1, which cannot generate; give a stage2.pt, or use --reconstruct")
        conditions = conditions_of(model, args)  # classes (B,) or text (B,L,C) and mask (B,L), each once
        conditions = {k: u.repeat_interleave(args.per_class, 0) for k, u in conditions.items()}
        seeds = seeds(len(next(iter(conditions.values()))))
        z = model.generate(steps=args.steps, cfg=args.cfg, cfg_interval=args.cfg_interval, noise=model.noise(seeds, mixer=True), **conditions)
        rows = model.decode(z, args.steps, model.noise(seeds)).split(args.per_class)
    fid.write_file(args.out, lambda f: grid(rows).save(f, "PNG"))
    print(f"{args.out}: {len(rows)} x {len(rows[0])} pictures")


# ---- Below: the authors' checkpoint, a table of renamings into our names (facts of its layout only)

DECODER = [(r"^time_emb\.weight", "mapping.freqs"), (r"^time_in_proj", "mapping.in_proj"), (r"^mapping\.blocks\.(\d)\.norm", r"mapping.norms.\1"),
           (r"^encoder\.dino\.temp_pos_embed", "token_pos"), (r"^encoder\.dino\.backbone\.(fc|ln)\.", r"token_\1."),
           (r"^backbone\.mid_merge\.pre_proj\.proj", "patch_in"), (r"^backbone\.mid_merge\.proj", "merge"),
           (r"^backbone\.mid_split\.post_proj\.norm", "norm_out"), (r"^backbone\.mid_split\.post_proj\.proj", "patch_out"),
           (r"^backbone\.mid_level\.0\.self_attn\.pos_emb\.freqs", "freqs"),  # the same in every block
           (r"^backbone\.mid_level\.(\d+)\.self_attn\.norm", r"blocks.\1.norm1"), (r"^backbone\.mid_level\.(\d+)\.self_attn\.", r"blocks.\1.attn."),
           (r"^backbone\.mid_level\.(\d+)\.ff\.norm", r"blocks.\1.norm2"), (r"^backbone\.mid_level\.(\d+)\.ff\.", r"blocks.\1.ff.")]
MIXER = [(r"_orig_mod\.", ""), (r"^t_embedder\.", "time."), (r"^label_embedder\.embedding_table\.", "label."), (r"^mixer\.0\.(weight|bias)", r"proj_in.\1"),
         (r"^mixer\.(\d+)\.0\.norm\.", r"layers.\1.norm1."), (r"^mixer\.(\d+)\.1\.norm\.", r"layers.\1.norm2."),
         (r"^mixer\.(\d+)\.0\.fn\.0\.", r"layers.\1.tokens.up."), (r"^mixer\.(\d+)\.0\.fn\.3\.", r"layers.\1.tokens.down."),
         (r"^mixer\.(\d+)\.1\.fn\.0\.", r"layers.\1.channels.up."), (r"^mixer\.(\d+)\.1\.fn\.3\.", r"layers.\1.channels.down.")]


def under(tensors, prefix):
    """The tensors below a prefix, without it."""
    return {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}


def scale_factor(settings):
    """The first number of this name in nested plain containers and inert nodes (OmegaConf keeps a leaf's value in `_val`), the first
    stage's before all others; 1 where there is none."""
    found, seen, nodes = [], set(), [(True, settings)]
    for other, node in nodes:  # which grows meanwhile: no recursion, however deep a stranger's file is
        if isinstance(node, (dict, list, tuple)) and id(node) not in seen:
            seen.add(id(node))
            for k, value in node.items() if isinstance(node, dict) else enumerate(node):
                leaf = value.get("_val", value) if isinstance(value, dict) else value
                if k == "scale_factor" and isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
                    found.append((other, float(leaf)))
                nodes.append((other and not (isinstance(k, str) and "first_stage" in k), value))
    return min(found, key=lambda pair: pair[0], default=(True, 1.0))[1] or 1.0


def released(content, path):
    """The authors' checkpoint as a RepTok: widths and depths are counted from the stored shapes. Raises UserError."""
    tensors = tok.flatten(content["state_dict"]) if isinstance(content.get("state_dict"), dict) else {}
    prefix = "first_stage.decoder.decoder."
    if prefix + "time_emb.weight" not in tensors:
        raise UserError(f"{path}: not a RepTok checkpoint; expected stage1.pt, stage2.pt or the authors' reptok-xl-600k-ImageNet.ckpt")
    with naming(f"{path}: looks like the authors' checkpoint but has tensors missing or misshapen"):
        vit = tok.vit_from(under(tensors, "first_stage.encoder.encoder."), path)
        tokenizer = Tokenizer(vit)
        vit.cls_token.data = tensors.get(prefix + "encoder.dino.target_model.cls_token", vit.cls_token).float()  # the original, for the prior
        vae = vae_from(under(tensors, prefix + "ae.ae."), path)
        unused = r"^ae\.|dino\.(model|target_model)\.|new_reg|\.[1-9]\d*\.self_attn\.pos_emb"     # rotary frequencies are block 0's in all
        named = tok.rename({k: v for k, v in under(tensors, prefix).items() if not re.search(unused, k)}, DECODER)
        named["token_pos"] = named["token_pos"].view(1, 1, -1)
        shape = {k: tuple(v.shape) for k, v in named.items()}
        patch = round((shape["patch_in.weight"][1] / vae.channels) ** 0.5)
        depth = 1 + max(int(k.split(".")[1]) for k in named if k.startswith("blocks."))
        with torch.device("meta"):
            decoder = Decoder(vae.channels, 256 // vae.factor, patch, shape["patch_in.weight"][0], depth, shape["blocks.0.attn.scale"][0],
                              shape["mapping.in_proj.weight"][0], shape["token_fc.weight"][1])
        tok.fit(decoder, named, path, "the authors' decoder")
        net = under(tensors, "ema_model.net.") or under(tensors, "model.net.")
        net = {k: v.squeeze(-1) if re.search(r"\.0\.fn\.\d\.weight", k) else v for k, v in tok.rename(net, MIXER[:1]).items()}
        last = max(int(k.split(".")[1]) for k in net if k.startswith("mixer."))                    # 0, layers, norm, last
        table = [*MIXER, (rf"^mixer\.{last - 1}\.", "norm."), (rf"^mixer\.{last}\.", "proj_out.")]
        net = {re.sub(r"^layers\.(\d+)", lambda m: f"layers.{int(m[1]) - 1}", k): v for k, v in tok.rename(net, table).items()}
        shape = {k: tuple(v.shape) for k, v in net.items()}
        K, classes = shape["layers.0.tokens.up.weight"][1] - 2, shape["label.weight"][0] - 1
        with torch.device("meta"):
            mixer = Mixer(K, shape["proj_in.weight"][1], shape["proj_in.weight"][0], last - 2, classes,
                          shape["layers.0.tokens.up.weight"][0], shape["layers.0.channels.up.weight"][0], time_scale=1.0)
        tok.fit(mixer, net, path, "the authors' Mixer")
        scale = scale_factor(content.get("hyper_parameters", {}))
    return RepTok(tokenizer, decoder, vae, mixer, torch.zeros(1, K, mixer.D), torch.full((1, K, mixer.D), scale), released=True)


if __name__ == "__main__":
    guarded(main)
