"""Stage 2: learn to generate the tokens of stage 1 (RepTok, arXiv 2510.14630, Sec. 4).

    python train_stage2.py                                        # after python train_stage1.py
    python train_stage2.py --data FOLDER --out OUT                # with OUT/stage1.pt
    python train_stage2.py --captions DATA --clip ViT-B-16.pt --bpe bpe_simple_vocab_16e6.txt.gz
    torchrun --nproc-per-node 8 train_stage2.py --data imagenet/train --stage1 reptok-xl-600k-ImageNet.ckpt

The frozen tokenizer turns every picture into tokens once (OUT/tokens-*.npy). An MLP-Mixer then learns the flow from
noise to them without reading a picture again. Writes OUT/stage2.pt (complete in itself), OUT/stage2.jsonl and
OUT/stage2.png (samples from fixed noise, one row per class). The same command resumes a stopped run.
Letters: B pictures a step, b of one forward pass, K tokens a picture, D token width, N pictures in all, V views of
each (2 with --flip), L text length, C text width.
"""
import io
import json
import math
from pathlib import Path

import torch
import torch.nn as nn

import fid
import sample
import train_stage1 as shared
from mixer import Mixer
from sample import Ranks, RepTok, autocast, number, whole
from tokenizer import ClipText, UserError, WordEncoder, load_text_encoder
from train_stage1 import EMA, SIZES, Log, Pictures, generator

PAPER = dict(steps=700_000, batch=256, lr=1e-4, warmup=2000, decay=False, ema=0.9999)
NANO = dict(steps=1400, batch=256, lr=2e-3, warmup=100, decay=True, ema=0.995)
NANO_TEXT = {**NANO, "steps": 850}  # text triples the cost of a step

def main():
    """Stage 2 from the command line: the tokens once, then the loop over them. Raises UserError."""
    args = options()
    model = RepTok.load(args.stage1)
    shared.fill_defaults(args, PAPER, NANO_TEXT if args.captions else NANO, model)
    ranks = Ranks(args.device, args)
    device = ranks.device
    model.to(device)
    out = Path(args.out, "stage2.pt")
    out.parent.mkdir(parents=True, exist_ok=True)
    source, stamp = model.data or (None, None)
    if args.data is None and not stamp:
        raise UserError("--data: the checkpoint does not say which pictures it was trained on; give a folder")
    pictures = (Captioned if args.captions else Pictures)(args.data or source, model.pixels, args.seed)
    if args.data is None and source and not args.captions and pictures.fingerprint != stamp:
        raise UserError(f"--data: the pictures of stage 1, {source}, have changed; give --data")
    digest = shared.fingerprint(args, pictures, "", model.tokenizer)
    saved = shared.checkpoint_to_resume(out, args, digest)
    torch.manual_seed(args.seed)
    text, width = text_source(args, pictures) if args.captions and not saved else (None, 0)
    fields = [("tokens", (model.tokenizer.K, model.tokenizer.width))]
    rows = shared.precompute("tokens", digest, fields, pictures, ranks, args, lambda images: [model.tokenizer(images)])
    tokens = torch.from_numpy(rows["tokens"].copy()).to(device)                                           # (N,V,K,D)
    picture_of = torch.from_numpy(rows["index"].copy()).long()  # (N,): another one where one could not be read
    labels = pictures.labels[picture_of]                                                                  # (N,)
    N, V, K, D = tokens.shape
    if saved:
        model = RepTok.from_checkpoint(saved, out, averaged=False).to(device)
    else:
        if not model.released:  # a released checkpoint keeps its own factor
            model.mean = tokens.float().mean((0, 1))[None]                                                # (1,K,D)
            model.std = tokens.float().std((0, 1))[None] + 1e-6
        model.classes = pictures.classes
        model.mixer = new_mixer(args, K, D, len(model.classes), width)
        model.text = text
        model.to(device)
    width = model.mixer.config["text_width"]
    model.tokenizer.requires_grad_(False)
    model.decoder.requires_grad_(False)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # Mixer, small text encoder
    optimizer = shared.adamw(trained, args)
    ema = EMA(trained, args.ema)
    first = shared.restore(saved, optimizer, ema) if saved else 0
    mixer = ranks.wrap(model.mixer, args.compile)  # the same networks, with gradients averaged over all processes
    encode_text = ranks.wrap(model.text, args.compile) if model.text else nn.Identity()  # Identity: made beforehand
    log = Log(out, args, ranks, first, pictures, trained)
    signals = shared.catch_signals()  # a list, filled by Ctrl-C and SIGTERM

    for step, indices in enumerate(shared.picture_order(N, args, ranks, first), first):
        # Drawn for the whole batch in every process, on the CPU: the same numbers on any device.
        draw = generator(args.seed, step, "cpu", stream=1)
        t, drop, view, choice = (torch.rand(args.batch, generator=draw) for _ in range(4))  # choice: of captions
        noise = torch.randn(args.batch, K, D, generator=draw)                                             # (B,K,D)
        t, drop, view, choice, noise = (ranks.share(u) for u in (t, drop, view, choice, noise))
        z = (tokens[torch.tensor(indices), (view * V).long()].float() - model.mean) / model.std           # (B,K,D)
        keep = drop >= args.label_drop  # labels and captions are dropped at random, for guidance
        classes = torch.where(keep, labels[indices], len(model.classes))  # the last number is "none"
        batch = [z, t, noise, classes]
        if args.captions:
            words, mask = text_of(pictures, model.text, width, picture_of[indices].tolist(), choice.tolist())
            batch += [words, mask & keep[:, None]]  # (B,L,C) or ids (B,L); mask (B,L), False is no text

        means = torch.zeros(1, device=device)
        pieces = zip(*(u.to(device, non_blocking=True).chunk(args.accumulate) for u in batch))            # b of B below
        for n, (z, t, noise, classes, *words) in enumerate(pieces, 1):
            for network in (mixer, encode_text):
                network.require_backward_grad_sync = n == args.accumulate  # DDP, if any, averages after the last piece
            with autocast(device, args.dtype):
                s = t[:, None, None]
                z_t = (1 - s) * noise + s * z                                                             # (b,K,D)
                if words:
                    words[0] = encode_text(words[0])                                                       # (b,L,C)
                v = mixer(z_t, t, classes, *words)
            flow = (v.float() - (z - noise)).square().flatten(1).mean(1)                                  # Eq. 1, (b,)
            loss = flow.mean()
            (loss / args.accumulate).backward()
            means += loss.detach() / args.accumulate
            log.add_by_time(t, flow.detach())

        norm = nn.utils.clip_grad_norm_(trained.values(), args.clip_grad or math.inf)
        rate = shared.set_learning_rate(optimizer, step, args)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(step)

        end = step + 1 == args.steps or ranks.any_process(signals)
        save = end or (step + 1) % args.save_every == 0
        log.bar.update()
        if save or (step + 1) % args.log_every == 0:
            loss = ranks.sum(means / ranks.world).item()
            log.write(step + 1, loss=loss, norm=norm.item(), lr=rate)  # raises on NaN
        if save and ranks.main:
            shared.save_run(out, step + 1, args, model, digest, optimizer, ema)
            with ema.applied(), torch.no_grad(), autocast(device, args.dtype):
                condition = preview(model, pictures, width)
                z = model.generate(steps=20, **condition)
                sample.save_grid(out.with_suffix(".png"), model.decode(z, steps=20).split(8))
        if end:
            break
    log.close(out, step + 1)

# ---- Below: the Mixer of a run, text, and the command line
def new_mixer(args, K, D, classes, text_width=None):
    """The Mixer of this size and these expansions, untrained."""
    shape = SIZES[args.size]["mixer"]
    S = K + bool(classes) + 4 * bool(text_width) + 1  # the length of its sequence, see Mixer
    return Mixer(K, D, **shape, classes=classes, text_width=text_width, token_hidden=args.token_expansion * S,
                 channel_hidden=args.channel_expansion * shape["hidden"])

def preview(model, pictures, width):
    """What the picture of a run shows, eight samples each: the first ten classes, or the captions of ten pictures."""
    if not model.mixer.cross:
        return {"classes": torch.arange(min(10, max(1, model.mixer.classes))).repeat_interleave(8)}
    chosen = [i * len(pictures) // 10 for i in range(10)]
    words, mask = text_of(pictures, model.text, width, chosen, [0.0] * 10)
    words, mask = (u.repeat_interleave(8, 0).to(model.device) for u in (words, mask))
    return {"text": model.text(words) if model.text else words, "mask": mask}

def text_source(args, pictures):
    """What reads the captions, and the width of its features: CLIP, None where features were made beforehand, or a
    small encoder that is trained along. Raises UserError."""
    if args.clip:
        text = ClipText(load_text_encoder(args.clip), args.bpe)
        return text, text.width
    if pictures.made:
        return None, pictures.features(0)[0].shape[1]
    captions = (caption for i in range(len(pictures)) for caption in pictures.captions(i))
    words = sorted({word for caption in captions for word in WordEncoder.split(caption)})
    print("No language model given: a small encoder of words is trained along; real use takes --clip, or features")
    text = WordEncoder(words)
    return text, text.width

class Captioned(Pictures):
    """Pictures with text and without classes: captions in name.txt (a line each) or name.json ("caption") beside
    name.jpg, or in a .jsonl with {"file": ..., "caption": text or list} a line; or text features made beforehand, in
    name.npz. Raises UserError where a picture has none."""
    def __init__(self, source, pixels, seed=0):
        found = read_table(Path(source)) if str(source).endswith(".jsonl") else None
        super().__init__(source, pixels, seed, captions=True, found=found)
        if source is None:
            self.texts = [plan.captions for plan in self.plans]  # the captions, or the place where they are read
            self.made = []
            return
        bare = [name.rsplit(".", 1)[0] for name in self.names]
        self.made = [self.found[b + ".npz"] for b in bare if b + ".npz" in self.found]
        beside = [next((b + end for end in (".txt", ".json") if b + end in self.found), None) for b in bare]
        self.texts = [self.found.get(name) for name in beside]
        missing = [name for name, text in zip(self.names, self.texts) if text is None]
        if missing and len(self.made) < len(self.names):
            raise UserError(f"--captions {source}: {len(missing)} of {len(self.names)} pictures have none, for one "
                            f"{missing[0]}; write it into a .txt of the same name, or take the picture out")

    def captions(self, i):
        """The captions of picture i. Raises UserError where they are empty or cannot be read."""
        captions = self.texts[i]
        with fid.naming(f"{self.source}: the caption of {self.names[i]} cannot be read"):
            if isinstance(captions, tuple):
                text = fid.read_bytes(captions).decode()
                captions = json.loads(text)["caption"] if text.lstrip().startswith("{") else text.strip().split("\n")
            captions = captions if isinstance(captions, list) else [captions]
            if not captions or not all(caption.strip() for caption in captions):
                raise ValueError("it is empty; write one or take the picture out")
        return captions

    def features(self, i):
        """Text features made beforehand: (features (L,C) float32, mask (L,) bool) of picture i. Raises UserError."""
        with fid.naming(f"{self.source}: no text features (L,C) for {self.names[i]}"):
            return sample.text_features(io.BytesIO(fid.read_bytes(self.made[i])))

def read_table(path):
    """{name: place, or captions} of a .jsonl, whose pictures' paths are relative to its folder. Raises UserError."""
    found = {}
    with fid.naming(f"{path}: expected lines of JSON with file and caption"):
        for row in map(json.loads, filter(str.strip, path.read_text(encoding="utf-8").split("\n"))):
            picture = (path.parent / row["file"]).resolve(strict=True)
            captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
            found[row["file"]] = (str(picture),)
            found.setdefault(row["file"].rsplit(".", 1)[0] + ".txt", []).extend(captions)
    return found

def text_of(pictures, text, width, indices, draws):
    """Text of a batch: ids (B,L) for the encoder `text`, or features (B,L,C) where it is None; mask (B,L). draws (B,)
    in [0,1) choose among the captions of each. Raises UserError."""
    if text is None:
        rows = [pictures.features(i) for i in indices]
        if any(features.shape[1] != width for features, _ in rows):
            raise UserError(f"--captions {pictures.source}: text features of other widths than {width}")
        return [nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(*rows)]
    captions = [pictures.captions(i) for i in indices]
    ids = text.ids([own[int(d * len(own))] for own, d in zip(captions, draws)])
    return ids, text.mask(ids)

def options():
    """The command line of stage 2."""
    p = sample.Parser(__doc__)
    shared.common_options(p, 1000)
    p.group("stage 2")
    p.add("--stage1", None, "checkpoint of stage 1, ours or the authors' (default: OUT/stage1.pt)")
    p.add("--captions", None, "captioned pictures, instead of --data; alone: captioned digits", nargs="?", const=True)
    p.add("--clip", None, "CLIP file that reads captions; default: features beside the pictures, or a small encoder")
    p.add("--bpe", None, "CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz")
    p.add("--label-drop", 0.1, "share of labels or captions dropped, for guidance", type=number(0, 1))
    p.add("--channel-expansion", 4, "channel MLPs are so many times as wide as the Mixer", type=whole(1))
    p.add("--token-expansion", 2, "token MLPs are so many times as wide as the sequence", type=whole(1))
    args = p.parse_args()
    if bool(args.clip) != bool(args.bpe) or args.clip and not args.captions:
        raise UserError("--clip reads captions: give --captions, and --bpe with bpe_simple_vocab_16e6.txt.gz")
    if args.captions and args.data:
        raise UserError("--data: --captions names the pictures itself; leave the option out")
    if isinstance(args.captions, str):
        args.data = args.captions
        args.captions = True
    args.stage1 = args.stage1 or str(Path(args.out, "stage1.pt"))
    return args

if __name__ == "__main__":
    sample.guarded(main)
