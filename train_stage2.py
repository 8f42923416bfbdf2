"""Stage 2: learn to generate the tokens of stage 1 (RepTok, arXiv 2510.14630, Sec. 4).

    python train_stage2.py                                        # after python train_stage1.py
    python train_stage2.py --data FOLDER --out OUT                # with OUT/stage1.pt
    python train_stage2.py --captions DATA --clip model.safetensors --bpe VOCABULARY
    torchrun --nproc-per-node 8 train_stage2.py --data imagenet/train --out xl

The frozen tokenizer turns every picture into tokens once (OUT/tokens-*.npy). An MLP-Mixer then
learns the flow from noise to them without reading a picture again. Writes OUT/stage2.pt (complete
in itself), OUT/stage2.jsonl and OUT/stage2.png (samples from fixed noise, one row per class). The
same command resumes a stopped run. Letters: B pictures a step, b of one forward pass, K tokens a
picture, D token width, N pictures in all, V views of each (2 with --flip), L text length, C text
width."""

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
from sample import Ranks, RepTok, number, whole
from tokenizer import ClipText, UserError, WordEncoder, load_text_encoder
from train_stage1 import EMA, SIZES, Log, Pictures, generator

PAPER = dict(
    steps=700_000, batch=256, lr=1e-4, warmup=2000, decay=False, ema=0.9999, save_every=10_000
)
NANO = dict(steps=3200, batch=128, lr=3e-3, warmup=100, decay=True, ema=0.995, save_every=1000)


def main():
    """Stage 2 from the command line: the tokens once, then the loop over them. Raises UserError."""
    args = options()
    model = RepTok.load(args.stage1)
    shared.fill_defaults(
        args, PAPER, {**NANO, "steps": 2000 if args.captions else NANO["steps"]}, model
    )
    ranks = Ranks(args.device, args.dtype, args.batch, args.accumulate)
    device = ranks.device
    model.to(device)
    out = Path(args.out, "stage2.pt")
    out.parent.mkdir(parents=True, exist_ok=True)
    source, stamp = model.data or (None, None)
    if args.data is None and not stamp:
        raise UserError(
            "--data: the checkpoint does not say which pictures it was trained on; give a folder"
        )
    kind = Captioned if args.captions else Pictures
    pictures = kind(args.data or source, model.pixels, args.seed, ranks=ranks)
    if args.data is None and source and not args.captions and pictures.fingerprint != stamp:
        raise UserError(f"--data: the pictures of stage 1, {source}, have changed; give --data")
    digest = shared.fingerprint(args, pictures, "", model.tokenizer)
    saved = shared.checkpoint_to_resume(out, args, digest)
    torch.manual_seed(args.seed)
    text, width = text_source(args, pictures, ranks) if args.captions and not saved else (None, 0)
    fields = [("tokens", (model.tokenizer.K, model.tokenizer.width))]
    rows = shared.precompute(
        "tokens", digest, fields, pictures, ranks, args, lambda images: [model.tokenizer(images)]
    )
    _, _, K, D = rows["tokens"].shape
    if saved:
        model = RepTok.from_checkpoint(saved, out, averaged=False).to(device)
    else:
        if not model.released:  # a released checkpoint keeps its own factor
            model.mean, model.std = statistics(rows["tokens"])      # (1,K,D)
        model.classes = pictures.classes
        model.mixer = new_mixer(args, K, D, len(model.classes), width)
        model.text = text
        model.to(device)
    width = model.mixer.config["text_width"]
    model.tokenizer.requires_grad_(False)
    model.decoder.requires_grad_(False)
    # The Mixer is trained, and the small text encoder if there is one.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = shared.new_optimizer(trained, args.lr, args.muon_lr)
    ema = EMA(trained, args.ema)
    first = shared.restore(saved, optimizer, ema) if saved else 0
    # The same networks, with gradients averaged over all processes.
    mixer = ranks.wrap(model.mixer, args.compile)
    # Text features made beforehand are taken as they are.
    encode_text = ranks.wrap(model.text, args.compile) if model.text else nn.Identity()
    batches = load_tokens(Batches(rows, pictures, model.text, width), args, ranks, first)
    log = Log(out, args, ranks, first, pictures, trained)
    signals = shared.catch_signals()  # a list, filled by Ctrl-C and SIGTERM

    # z: the tokens of this process, (B,K,D); labels (B,).
    for step, (z, labels, words, mask) in enumerate(batches, first):
        # Every process draws for the whole batch, on the CPU: the same numbers on any device.
        random = generator(args.seed, step, "cpu", stream=1)
        t, drop, *_ = torch.rand(4, args.batch, generator=random)  # the other two are load_tokens'
        noise = torch.randn(args.batch, K, D, generator=random)     # (B,K,D)
        t = ranks.share(t)                                          # (B,)
        drop = ranks.share(drop)                                    # (B,)
        noise = ranks.share(noise)

        # Labels and captions are dropped at random, so that guidance has a network without
        # condition.
        keep = drop >= args.label_drop                              # (B,)
        labels = torch.where(keep, labels, len(model.classes))  # the last number is "no class"
        if words is not None:
            # words: ids (B,L), or features (B,L,C) made beforehand. Without a True in its mask
            # a row has no text.
            mask = mask & keep[:, None]                             # (B,L)

        means = torch.zeros(1, device=device)
        size = len(z) // args.accumulate
        for n in range(args.accumulate):
            part = slice(n * size, (n + 1) * size)  # micro-batch n, of b tokens
            if ranks.world > 1:
                # Gradients are averaged over the processes once a step, after the last micro-batch.
                mixer.require_backward_grad_sync = n + 1 == args.accumulate
                encode_text.require_backward_grad_sync = n + 1 == args.accumulate

            def move(u):
                return u[part].to(device, non_blocking=True)

            data = (move(z).float() - model.mean) / model.std       # (b,K,D), normalised
            start = move(noise)                                     # (b,K,D)
            time = move(t)                                          # (b,)
            s = time[:, None, None]
            with ranks.autocast():
                z_t = (1 - s) * start + s * data                    # (b,K,D)
                if words is None:
                    v = mixer(z_t, time, move(labels))              # (b,K,D)
                else:
                    text = encode_text(move(words)).float()         # (b,L,C)
                    v = mixer(z_t, time, move(labels), text, move(mask))

            flow = (v.float() - (data - start)).square().flatten(1).mean(1)  # Eq. 1, (b,)
            loss = flow.mean()
            (loss / args.accumulate).backward()
            means += loss.detach() / args.accumulate

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
        if save and ranks.main and log.due(end):
            shared.save_run(out, step + 1, args, model, digest, optimizer, ema)
        if ranks.main and (end or shared.picture_due(step + 1, args.steps)):
            with ema.applied(), torch.no_grad(), ranks.autocast():
                condition = preview(model, pictures, width)
                z = model.generate(steps=20, **condition)
                sample.save_grid(out.with_suffix(".png"), model.decode(z, steps=20).split(8))
        if end:
            break
    log.close(out, step + 1, f"flow loss {loss:.4f}; next: python sample.py --ckpt {out}")


# ---- Below: the Mixer of a run, text, and the command line
def new_mixer(args, K, D, classes, text_width=None):
    """The Mixer of this size and these expansions, untrained."""
    shape = SIZES[args.size]["mixer"]
    S = K + bool(classes) + 4 * bool(text_width) + 1  # the length of its sequence, see Mixer
    return Mixer(
        K,
        D,
        **shape,
        num_classes=classes,
        text_width=text_width,
        token_hidden=args.token_expansion * S,
        channel_hidden=args.channel_expansion * shape["hidden"],
    )


def statistics(tokens):
    """Mean and deviation, each (1,K,D), of mapped tokens (N,V,K,D), by chunks of D: all in float32
    may be 8 GB."""
    chunks = (
        torch.from_numpy(tokens[..., i : i + 64].astype("float32"))
        for i in range(0, tokens.shape[-1], 64)
    )
    mean, std = zip(*((chunk.mean((0, 1)), chunk.std((0, 1))) for chunk in chunks))
    return torch.cat(mean, -1)[None], torch.cat(std, -1)[None] + 1e-6


def preview(model, pictures, width):
    """What the picture of a run shows, eight samples each: the first ten classes, or the captions
    of ten pictures."""
    if not model.mixer.cross:
        return {
            "classes": torch.arange(min(10, max(1, model.mixer.num_classes))).repeat_interleave(8)
        }
    chosen = [i * len(pictures) // 10 for i in range(10)]
    words, mask = Batches(None, pictures, model.text, width).read_text(chosen, [0.0] * 10)
    words, mask = (u.repeat_interleave(8, 0).to(model.device) for u in (words, mask))
    return {"text": model.text(words) if model.text else words.float(), "mask": mask}


def text_source(args, pictures, ranks):
    """The text encoder (CLIP, a small one trained with the Mixer, None for features) and its width.
    UserError."""
    if args.clip:
        text = ClipText(load_text_encoder(ranks.fetch(args.clip)), args.bpe)
    elif pictures.made:
        return None, pictures.features(0)[0].shape[1]
    else:
        print(
            "No language model given: training a small word encoder; for real use give "
            "--clip or text features"
        )
        captions = (caption for i in range(len(pictures)) for caption in pictures.captions(i))
        text = WordEncoder(
            sorted({word for caption in captions for word in WordEncoder.split(caption)})
        )
    return text, text.width


class Captioned(Pictures):
    """Pictures with text, without classes: beside name.jpg captions in name.txt (a line each) or
    name.json ("caption"), or features made beforehand in name.npz; or a .jsonl (see list_files).
    UserError where a picture has no text."""

    def __init__(self, source, pixels, seed=0, ranks=None):
        super().__init__(source, pixels, seed, captions=True, ranks=ranks)
        if source is None:
            # The captions, or the place where they are read.
            self.texts = [plan.captions for plan in self.plans]
            self.made = []
            return
        bare = [name.rsplit(".", 1)[0] for name in self.names]
        self.made = [self.found[b + ".npz"] for b in bare if b + ".npz" in self.found]
        beside = [
            next((b + end for end in (".txt", ".json") if b + end in self.found), None)
            for b in bare
        ]
        self.texts = [self.found.get(name) for name in beside]
        missing = [name for name, text in zip(self.names, self.texts) if text is None]
        if missing and len(self.made) < len(self.names):
            raise UserError(
                f"--captions {source}: {len(missing)} pictures lack a caption, first "
                f"{missing[0]}; add it"
            )

    def captions(self, i):
        """The captions of picture i. Raises UserError where they are empty or cannot be read."""
        captions = self.texts[i]
        with fid.naming(f"{self.source}: the caption of {self.names[i]} cannot be read"):
            if isinstance(captions, tuple):
                text = fid.read_bytes(captions).decode()
                captions = (
                    json.loads(text)["caption"]
                    if text.lstrip().startswith("{")
                    else text.strip().split("\n")
                )
            captions = captions if isinstance(captions, list) else [captions]
            if not captions or not all(caption.strip() for caption in captions):
                raise ValueError("it is empty; write one or take the picture out")
        return captions

    def features(self, i):
        """Text features made beforehand: (features (L,C) float16, mask (L,) bool) of picture i.
        Raises UserError."""
        with fid.naming(f"{self.source}: bad text features (L,C) of {self.names[i]}"):
            features, mask = sample.text_features(io.BytesIO(fid.read_bytes(self.made[i])))
            if not features.half().isfinite().all():
                raise ValueError("NaN, or beyond float16; replace them")
            return features.half(), mask


class Batches(torch.utils.data.Dataset):
    """[indices, view, choice] -> tokens (B,K,D) float16, labels (B,), and what read_text returns,
    or None, None. view and choice, each (B,) in [0,1), choose among the views of a picture and its
    captions. Raises UserError."""

    def __init__(self, rows, pictures, text, width):
        self.rows = rows  # mapped: the device and its memory only ever see a batch
        self.pictures = pictures
        self.text = text
        self.width = width

    def __getitem__(self, key):
        indices, view, choice = key
        views = (view * self.rows["tokens"].shape[1]).long()
        z = torch.from_numpy(self.rows["tokens"][indices, views.numpy()])  # (B,K,D)
        read = self.rows["index"][indices].tolist()  # another picture where one could not be read
        words = None
        mask = None
        if isinstance(self.pictures, Captioned):
            words, mask = self.read_text(read, choice.tolist())
        return z, self.pictures.labels[read], words, mask

    def read_text(self, indices, choice):
        """ids (B,L) for the encoder `text`, or features (B,L,C) float16 where it is None; mask
        (B,L)."""
        if self.text is None:
            rows = [self.pictures.features(i) for i in indices]
            if any(features.shape[1] != self.width for features, _ in rows):
                raise UserError(
                    f"--captions {self.pictures.source}: text features need width {self.width}"
                )
            return [nn.utils.rnn.pad_sequence(column, batch_first=True) for column in zip(*rows)]
        captions = [self.pictures.captions(i) for i in indices]
        ids = self.text.ids([own[int(u * len(own))] for own, u in zip(captions, choice)])
        return [ids, self.text.mask(ids)]


def load_tokens(data, args, ranks, first):
    """This process's part of every batch, from the loader's workers where there are files of text
    to read."""

    def order():
        for step, indices in enumerate(
            shared.picture_order(len(data.rows), args, ranks, first), first
        ):
            # These are the draws of main, of which two rows serve here.
            draws = torch.rand(4, args.batch, generator=generator(args.seed, step, "cpu", stream=1))
            yield indices, *(ranks.share(u) for u in draws[2:])

    gpu = ranks.device.type == "cuda"
    workers = 4 * (gpu and data.text is None) if args.workers is None else args.workers
    return torch.utils.data.DataLoader(
        data, None, sampler=order(), num_workers=workers, pin_memory=gpu
    )


def options():
    """The command line of stage 2."""
    p = sample.Parser(__doc__)
    shared.common_options(p)
    p.section = p.sections["model"]
    p.add("--stage1", None, "checkpoint of stage 1, ours or the authors' (default: OUT/stage1.pt)")
    p.add(
        "--captions",
        None,
        "captioned pictures, instead of --data; alone: captioned shapes",
        nargs="?",
        const=True,
    )
    p.add(
        "--clip",
        None,
        "CLIP file that reads captions; default: features beside the pictures, or a small encoder",
    )
    p.add("--bpe", None, "CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz")
    p.section = p.sections["optimisation"]
    p.add(
        "--label-drop", 0.1, "share of labels or captions dropped, for guidance", type=number(0, 1)
    )
    p.section = p.sections["rarely needed"]
    p.add(
        "--channel-expansion",
        4,
        "channel MLPs are so many times as wide as the Mixer",
        type=whole(1),
    )
    p.add(
        "--token-expansion",
        2,
        "token MLPs are so many times as wide as the sequence",
        type=whole(1),
    )
    args = p.parse_args()
    if bool(args.clip) != bool(args.bpe) or args.clip and not args.captions:
        raise UserError(
            "--clip needs --captions and --bpe bpe_simple_vocab_16e6.txt.gz; --bpe needs --clip"
        )
    if args.captions and args.data:
        raise UserError("--data: --captions names the pictures itself; leave the option out")
    if isinstance(args.captions, str):
        args.data = args.captions
        args.captions = True
    args.stage1 = args.stage1 or str(Path(args.out, "stage1.pt"))
    return args


if __name__ == "__main__":
    sample.guarded(main)
