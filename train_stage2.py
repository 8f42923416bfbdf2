"""Stage 2: learn to generate the tokens of stage 1 (RepTok, arXiv 2510.14630, Sec. 4).

    python train_stage2.py                                        # after python train_stage1.py
    python train_stage2.py --data FOLDER --out OUT                # with OUT/stage1.pt
    python train_stage2.py --captions DATA --clip ViT-B-16.pt --bpe bpe_simple_vocab_16e6.txt.gz
    torchrun --nproc-per-node 8 train_stage2.py --data imagenet/train --stage1 reptok-xl-600k-ImageNet.ckpt

The frozen tokenizer turns every picture into tokens once (OUT/tokens-*.npy); an MLP-Mixer then learns the flow from noise to
them without reading a picture again. Writes OUT/stage2.pt (self-contained), OUT/stage2.jsonl and OUT/stage2.png (samples from
fixed noise, a row a class). Run again, it goes on.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from decoder import flow_loss
from mixer import Mixer
from sample import RepTok
from tokenizer import ClipText, UserError, WordEncoder, load_text_encoder
from train_stage1 import (SIZES, Order, Parser, Pictures, Ranks, Run, bench_rows, common_options, complete, computed_once, continued, fingerprint,
                          generator, grid, guarded, make_folder, move, number, whole)

PAPER = dict(steps=700_000, batch=256, lr=1e-4, warmup=2000, decay=False, ema=0.9999)
NANO = dict(steps=1400, batch=256, lr=2e-3, warmup=100, decay=True, ema=0.995)
NANO_TEXT = {**NANO, "steps": 850}  # text triples the cost of a step


class Stage2(nn.Module):
    """The Mixer, and the text encoder where there is one, as one module."""

    def __init__(self, mixer, text=None):
        super().__init__()
        self.mixer, self.text = mixer, text

    def forward(self, z, t, noise, classes, text=None, mask=None):
        """Eq. 1 on normalised tokens z (B,K,D): the loss of each, (B,). `text` is features (B,L,C), or ids (B,L) for the encoder."""
        text = self.text(text) if self.text else text
        return flow_loss(lambda z_t, s: self.mixer(z_t, s, classes, text, mask), z, t, noise)


def encode(model, pictures, ranks, args, digest):
    """Tokens of every picture (and, with --flip, of its mirror image), once: (N,V,K,D) float16, and labels (N,), on the device."""
    rows = computed_once(Path(args.out, f"tokens-{args.dtype}-{digest[:12]}.npy"), [("tokens", (model.tokenizer.K, model.tokenizer.width))], pictures, ranks,
                         args, lambda images: [model.tokenizer(images)])
    return torch.from_numpy(rows["tokens"].copy()).to(ranks.device), torch.from_numpy(rows["label"].astype(np.int64)).to(ranks.device)


def main():
    """Stage 2 from the command line: tokens once, then the loop over them. Raises UserError."""
    args = options()
    ranks, defaults = Ranks(args.device), (PAPER, NANO_TEXT if args.captions else NANO)
    if args.bench:
        complete(args, *defaults)
        return bench(args, ranks)
    model, out = RepTok.load(args.stage1, ranks.device), Path(args.out, "stage2.pt")
    complete(args, *defaults, model.decoder)
    ranks.divide(args)
    pictures = Pictures(args.data, model.pixels, args.seed, named=bool(args.captions))
    make_folder(args.out)
    digest = fingerprint(pictures, args.flip, model.tokenizer)
    last = continued(out, args, digest)
    torch.manual_seed(args.seed)
    text, width = text_source(args, pictures, ranks.device) if args.captions else (None, None)
    tokens, labels = encode(model, pictures, ranks, args, digest)
    (N, V, K, D), classes = tokens.shape, [] if args.captions else pictures.classes
    # normalised tokens have mean 0 and variance 1 in every dimension; a released checkpoint keeps its own factor
    mean, std = (model.mean, model.std) if model.released else (tokens.float().mean((0, 1))[None], tokens.float().std((0, 1))[None] + 1e-6)
    C, mixer = len(classes), build(args, K, D, len(classes), width).to(ranks.device)
    if last:
        mixer.load_state_dict(last["mixer"]["state"])
        if text:
            text.load_state_dict(last["text"]["state"])
    model.mixer, model.mean, model.std, model.classes, model.text = mixer, mean, std, classes, text
    shown = {"classes": torch.arange(min(10, max(1, C)))}  # to look at: fixed classes, or the captions of fixed pictures
    if args.captions:
        shown = dict(zip(("text", "mask"), read_text(pictures, text, width, [i * N // 10 for i in range(10)], [0.0] * 10, ranks.device)))

    def picture():
        given = {name: u.repeat_interleave(8, 0) for name, u in shown.items()}
        if text:
            given["text"] = text(given["text"])
        return grid(model.decode(model.generate(steps=20, **given), steps=20).split(8))

    run = Run(out, Stage2(mixer, text), args, ranks, last, pictures, digest=digest, content=model.parts, picture=picture)
    del last

    def losses(t, indices, z, *condition):
        loss = run.model(z, t, *condition)                                                         # Eq. 1 on tokens, (b,)
        return {"loss": loss, "flow": loss}

    for step, indices in enumerate(Order(N, args.batch, ranks, run.first, args.steps, args.seed), run.first):
        # drawn for the whole batch on every rank, so that ranks and accumulation do not change the sequence
        draw = generator(args.seed, step, 1, ranks.device)
        t, drop, view, choice = (ranks.part(torch.rand(args.batch, generator=draw, device=ranks.device)) for _ in range(4))
        noise = ranks.part(torch.randn(args.batch, K, D, generator=draw, device=ranks.device))
        rows = torch.tensor(indices, device=ranks.device)
        z = (tokens[rows, (view * V).long()].float() - mean) / std                                 # (b,K,D)
        keep = drop >= args.label_drop                                                             # (b,)
        condition = [torch.where(keep, labels[rows], C)]                                           # (b,), C is "none"
        if args.captions:
            words, mask = read_text(pictures, text, width, indices, choice.tolist(), ranks.device)
            condition += [words, mask & keep[:, None]]                                             # features (b,L,width) or ids (b,L); mask (b,L)
        # backward, gradient norm, AdamW, EMA, log, checkpoint
        if run.step(step, losses, t, torch.tensor(indices), z, noise, *condition):
            break


# ---- Below: the Mixer of a run, text, and the command line


def build(args, K, D, classes, text_width=None):
    """The Mixer of this size and these expansions, untrained."""
    shape, S = SIZES[args.size]["mixer"], K + bool(classes) + 4 * bool(text_width) + 1  # the length of its sequence, see Mixer
    return Mixer(K, D, **shape, classes=classes, token_hidden=args.token_expansion * S, channel_hidden=args.channel_expansion * shape["hidden"],
                 text_width=text_width)


def text_source(args, pictures, device):
    """What reads the captions: CLIP, made features (None), or a small encoder trained along; and its width. Raises UserError."""
    if args.clip:
        text = ClipText(load_text_encoder(args.clip), args.bpe).to(device)
        return text, text.width
    if pictures.npz:
        return None, pictures.features(next(iter(pictures.npz)))[0].shape[1]
    words = sorted({word for i in range(len(pictures)) for caption in pictures.captions(i) for word in WordEncoder.split(caption)})
    if len(words) > 20_000:
        raise UserError(f"--captions {args.data}: {len(words)} different words are too many for the small encoder; give --clip and --bpe")
    print("No language model given: a small word-level encoder is trained along; real use takes CLIP (--clip) or features made beforehand")
    text = WordEncoder(words).to(device)
    return text, text.width


def read_text(pictures, text, width, indices, draws, device):
    """Text of a batch: (ids (b,L) for the encoder `text`, or made features (b,L,C) where it is None; mask (b,L)). draws (b,) choose the caption."""
    if text is None:
        rows = [pictures.features(i) for i in indices]
        if any(f.shape[1] != width for f, _ in rows):
            raise UserError(f"--captions {pictures.source}: text features of other widths than {width}")
        features = nn.utils.rnn.pad_sequence([f for f, _ in rows], batch_first=True)
        return features.to(device), nn.utils.rnn.pad_sequence([m for _, m in rows], batch_first=True).to(device)
    captions = [pictures.captions(i) for i in indices]
    ids = text.ids([c[int(d * len(c))] for c, d in zip(captions, draws)]).to(device)
    return ids, text.mask(ids)


def options():
    """The command line of stage 2."""
    p = Parser(__doc__)
    common_options(p, 1000)
    p.add("--stage1", None, "checkpoint of stage 1, ours or the authors' (default: OUT/stage1.pt)")
    p.add("--captions", None, "captioned pictures instead of --data: folder, .tar, .tsv or .jsonl; without a value, the digits write them",
          nargs="?", const=True)
    p.add("--clip", None, "CLIP file whose text tower reads the captions; default: text features beside the pictures, or a small encoder trained along")
    p.add("--bpe", None, "CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz")
    p.add("--label-drop", 0.1, "share of labels or captions dropped for classifier-free guidance", type=number(0, 1))
    p.add("--channel-expansion", 4, "channel MLP's hidden width over the Mixer's (3 gives 279M at XL, as the paper's table)", type=whole(1))
    p.add("--token-expansion", 2, "token MLP's hidden width over the number of tokens", type=whole(1))
    args = p.parse_args()
    if bool(args.clip) != bool(args.bpe) or args.clip and not args.captions:
        raise UserError("--clip reads captions: give --captions, and --bpe with bpe_simple_vocab_16e6.txt.gz")
    if args.captions and args.data:
        raise UserError("--data: --captions names the pictures itself; leave the option out")
    if isinstance(args.captions, str):
        args.data, args.captions = args.captions, True
    args.stage1 = args.stage1 or str(Path(args.out, "stage1.pt"))
    return args


def bench(args, ranks):
    """--bench: the Mixer of this size with random weights, forward and in a training step."""
    nano, device = args.size == "nano", ranks.device
    n, D = args.batch if nano or device.type == "cuda" else min(args.batch, 32), 128 if nano else 768
    mixer = build(args, 1, D, 10 if nano else 1000).to(device)
    z, t, c = torch.randn(n, 1, D, device=device), torch.rand(n, device=device), torch.zeros(n, dtype=torch.long, device=device)
    stage2 = Stage2(mixer)
    net, optimizer = torch.compile(stage2) if args.compile else stage2, torch.optim.AdamW(mixer.parameters(), fused=True)

    def step():
        net(z, t, z, c).mean().backward()
        move(optimizer, list(mixer.parameters()), 1.0)

    print(f"size {args.size}, batch {n}: Mixer {sum(p.numel() for p in mixer.parameters()) / 1e6:.1f}M parameters")
    bench_rows([("Mixer", torch.no_grad()(lambda: mixer(z, t, c)), n), ("step: Mixer, backward", step, n)], ranks, args.dtype)


if __name__ == "__main__":
    guarded(main)
