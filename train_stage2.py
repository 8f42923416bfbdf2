"""Stage 2: learn to generate the tokens of stage 1 (RepTok, arXiv 2510.14630, Sec. 3.3).

    python train_stage2.py                         # after python train_stage1.py
    python train_stage2.py --out OUT               # OUT/stage1.pt, OUT/tokens.npy, OUT/tokens.pt
    python train_stage2.py --captions PAIRS --clip model.safetensors --bpe VOCABULARY
    torchrun --nproc-per-node 8 train_stage2.py --out xl

No picture is opened here: stage 1 has turned each into a token. An MLP-Mixer learns the flow from
noise to tokens, given a class or a text. Writes OUT/stage2.pt (complete in itself),
OUT/stage2.jsonl and OUT/stage2.png (samples from fixed noise, one row per class). The same command
resumes a stopped run. Letters: B tokens a step, b of one forward pass, K tokens a picture, D token
width, N pictures in all, V views of each (2 with --flip), L text length, C text width."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

import fid
import sample
import train_stage1 as shared
from mixer import Mixer
from sample import Ranks, RepTok, load_checkpoint, number, whole
from tokenizer import ClipText, UserError, WordEncoder, load_text_encoder
from train_stage1 import CLIP_GRAD, EMA, SIZES, Log, generator

# The settings of a run, printed at its start; most have an option of their name.
SETTINGS = {  # name: (sizes S to XL, nano)
    # Steps and batch are the paper's.
    "steps": (700_000, 3200),
    "batch": (256, 128),
    "lr": (1e-4, 3e-3),
    "warmup": (2000, 100),
    # Constant, or flat to half of the run and then a line to 0.
    "decay": (False, True),
    "ema": (0.9999, 0.995),
    # The share of labels or captions that are dropped, for guidance.
    "label_drop": (0.1, 0.1),
    "save_every": (10_000, 1000),
}


def main():
    """Stage 2 from the command line: load tokens, then the loop over them. Raises UserError."""
    args = options()
    model = RepTok.load(args.stage1)
    shared.complete(args, SETTINGS, model)
    ranks = Ranks(args.device, args.dtype, args.batch, args.accumulate)
    device = ranks.device
    args.dtype = ranks.dtype
    out = Path(args.out, "stage2.pt")
    ranks.lock(out.parent)

    # tokens (N,V,K,D) float16, mapped: memory only ever holds a batch of them.
    tokens, about = load_tokens(args, model)
    texts = Texts(about, args.captions, ranks) if args.captions else None

    # Go on with a stopped run, or begin with a new Mixer.
    saved = shared.checkpoint_to_resume(out, args, about["fingerprint"], ranks)
    if saved and saved["step"] >= args.steps:
        return shared.say_finished(out, saved["step"])
    if saved:
        model = RepTok.from_checkpoint(saved, out, averaged=False)
    else:
        torch.manual_seed(args.seed)
        build(model, args, about, texts, ranks)
    model.to(device)
    model.tokenizer.requires_grad_(False)
    model.decoder.requires_grad_(False)

    # The Mixer is trained, and the small text encoder if there is one.
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = shared.new_optimizer(trained, args.lr)
    ema = EMA(trained, args.ema)
    first = shared.restore(saved, optimizer, ema) if saved else 0

    # The same networks, with gradients averaged over all processes.
    mixer = ranks.wrap(model.mixer, args.compile)
    # Text features made beforehand are taken as they are.
    encode_text = ranks.wrap(model.text, args.compile) if model.text else nn.Identity()
    width = model.mixer.config["text_width"]
    data = Tokens(tokens, about["labels"], texts, model.text, width)
    batches = load_batches(data, args, ranks, first)
    log = Log(out, args, SETTINGS, ranks, first, about["names"], model.class_names, trained)
    # A list, filled by Ctrl-C and SIGTERM.
    signals = shared.catch_signals()

    # batch: of this process, tokens (B,K,D) and labels (B,); with captions also words, their ids
    # (B,L) or features (B,L,C) made beforehand, and mask (B,L), where there are words.
    for step, batch in enumerate(batches, first):
        # Every process draws for the whole batch and takes its share, so that the numbers depend
        # neither on the number of processes nor on accumulation.
        random = generator(args.seed, step, device, stream=1)
        shape = (args.batch, *tokens.shape[2:])
        t = ranks.share(torch.rand(args.batch, generator=random, device=device))  # (B,)
        drop = ranks.share(torch.rand(args.batch, generator=random, device=device))
        noise = ranks.share(torch.randn(shape, generator=random, device=device))  # (B,K,D)

        # The data of the flow: normalised tokens.
        z = (batch["tokens"].float() - model.mean) / model.std      # (B,K,D)
        # Labels and captions are dropped at random, so that guidance has a network without
        # condition. The last number means "no class"; a row of the mask without a True, no text.
        keep = drop >= args.label_drop                              # (B,)
        labels = torch.where(keep, batch["labels"], len(model.class_names))
        if texts:
            words = batch["words"]
            mask = batch["mask"] & keep[:, None]                    # (B,L)

        # The mean of the loss over this process's tokens.
        means = torch.zeros(1, device=device)
        b = args.batch // ranks.world // args.accumulate
        for n in range(args.accumulate):
            # Micro-batch n, of b tokens.
            part = slice(n * b, (n + 1) * b)
            if ranks.world > 1:
                # Gradients are averaged over the processes once a step, after the last micro-batch.
                mixer.require_backward_grad_sync = n + 1 == args.accumulate
                encode_text.require_backward_grad_sync = n + 1 == args.accumulate

            s = t[part][:, None, None]
            z_t = (1 - s) * noise[part] + s * z[part]               # (b,K,D)
            with ranks.autocast():
                if texts:
                    text = encode_text(words[part]).float()         # (b,L,C)
                    v = mixer(z_t, t[part], labels[part], text, mask[part])
                else:
                    v = mixer(z_t, t[part], labels[part])           # (b,K,D)

            # Eq. 1, with tokens in the place of latents.
            flow = (v.float() - (z[part] - noise[part])).square().flatten(1).mean(1)  # (b,)
            loss = flow.mean()
            (loss / args.accumulate).backward()
            means += loss.detach() / args.accumulate

        norm = nn.utils.clip_grad_norm_(trained.values(), CLIP_GRAD)
        factor = shared.rate_factor(step, args)
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
            log.write(step + 1, ("loss",), means, norm, factor * args.lr)
        if save and ranks.main:
            shared.save_run(out, step + 1, args, model, about["fingerprint"], optimizer, ema)
        if ranks.main and (end or shared.picture_due(step + 1, args.steps)):
            with ema.applied(), torch.no_grad(), ranks.autocast():
                # Eight in each of the picture's rows.
                new = model.generate(steps=20, **preview(model, texts))  # (rows*8,K,D)
                images = model.decode(new, steps=20)                # (rows*8,3,S,S)
            sample.save_grid(out.with_suffix(".png"), images.split(8))
        if end:
            break

    log.close()
    if step + 1 < args.steps:
        shared.exit_interrupted(out, step + 1, args, ranks)
    if ranks.main:
        # What a Mixer of text generates from.
        text = ""
        if model.mixer.cross:
            text = " --prompt WORDS" if model.text else " --features FILE.npz"
        print(f"{out}: flow loss {log.loss:.4f}; next: python sample.py --ckpt {out}{text}")


# ---- Below: tokens, the Mixer of a run, text, and the command line
def load_tokens(args, model):
    """What stage 1 has left, or sample.py --encode: tokens (N,V,K,D) float16, mapped, and a dict of
    what they are, see sample.write_tokens. Raises UserError where they are of another tokenizer."""
    path = Path(args.tokens, "tokens.pt")
    if not path.exists():
        raise UserError(
            f"{path}: not there; run train_stage1.py to its end, or make it of any pictures: "
            f"python sample.py --ckpt {args.stage1} --encode PICTURES --save {args.tokens}"
        )
    about = load_checkpoint(path, ["tokens"])
    if about["tokenizer"] != sample.digest(model.tokenizer):
        raise UserError(
            f"{path}: made by another tokenizer than that of --stage1 {args.stage1}; run "
            "train_stage1.py to its end, or sample.py --encode again"
        )
    if not {"shape", "first"} <= about.keys():
        raise UserError(
            f"{path}: made by an older version of this code; delete it and run train_stage1.py or "
            "sample.py --encode again, which write it anew"
        )
    with fid.naming(f"{path.with_suffix('.npy')}: not whole", "; run sample.py --encode again"):
        tokens = np.load(path.with_suffix(".npy"), mmap_mode="r")
        first = torch.from_numpy(tokens[:1].copy())
    if tokens.shape != tuple(about["shape"]) or not torch.equal(first[0], about["first"]):
        raise UserError(
            f"{path.with_suffix('.npy')}: other tokens than those that {path} describes; run "
            "sample.py --encode again"
        )
    return tokens, about


def build(model, args, about, texts, ranks):
    """Give the model of stage 1 what stage 2 adds: statistics of tokens, a Mixer, and perhaps a
    text encoder."""
    # The authors' checkpoint keeps its one number, which stands in std.
    if not model.released:
        model.mean = about["mean"]                                  # (1,K,D)
        model.std = about["std"]
    model.class_names = [] if texts else about["class_names"]
    width = 0
    if texts:
        model.text, width = text_encoder(args, texts, ranks)
    _, K, D = about["mean"].shape
    model.mixer = new_mixer(args, K, D, len(model.class_names), width)


def new_mixer(args, K, D, num_classes, text_width=0):
    """The Mixer of this size, untrained. It is wider than a token: a narrower one could not put out
    a velocity in every direction, and starting noise would stay in the samples."""
    shape = SIZES[args.size]["mixer"]
    hidden = max(shape["hidden"], D + 64)
    return Mixer(
        K,
        D,
        hidden=hidden,
        depth=shape["depth"],
        num_classes=num_classes,
        text_width=text_width,
        channel_hidden=args.channel_expansion * hidden,
    )


def preview(model, texts):
    """What the picture of a run shows, eight samples each: the first ten classes, or the captions
    of ten pictures. Arguments of RepTok.generate."""
    if not texts:
        count = min(10, max(1, model.mixer.num_classes))
        return {"labels": torch.arange(count).repeat_interleave(8)}
    chosen = [i * len(texts) // 10 for i in range(10)]
    width = model.mixer.config["text_width"]
    words, mask = read_texts(texts, chosen, [0.0] * 10, model.text, width)
    words = words.repeat_interleave(8, 0).to(model.device)
    mask = mask.repeat_interleave(8, 0).to(model.device)
    return {"text": model.text(words) if model.text else words.float(), "mask": mask}


def text_encoder(args, texts, ranks):
    """CLIP, a small one trained with the Mixer, or None for features made beforehand; and the width
    C of what it puts out. Raises UserError."""
    if args.clip:
        text = ClipText(load_text_encoder(ranks.fetch(args.clip)), args.bpe)
        return text, text.width
    if texts.made_beforehand:
        return None, texts.features(0)[0].shape[1]
    if ranks.main:
        print(
            "No language model given: training a small word encoder; for real use give "
            "--clip or text features"
        )
    words = set()
    for i in range(len(texts)):
        for caption in texts.captions(i):
            words.update(WordEncoder.split(caption))
    text = WordEncoder(sorted(words))
    return text, text.width


class Texts:
    """The texts of pictures, found by the pictures' names: beside name.jpg captions in name.txt (a
    line each), or features made beforehand in name.npz, in a folder or .tar. Those of the default
    shapes are known from their names. Raises UserError where a picture has no text."""

    def __init__(self, about, source, ranks):
        self.names = about["names"]
        self.source = about["source"] if source is True else source
        self.made_beforehand = False
        if self.source is None:
            return
        self.found = ranks.once(lambda: fid.files(str(Path(self.source).resolve())))
        self.made_beforehand = not self.without(".npz")
        missing = self.without(".txt")
        if missing and not self.made_beforehand:
            raise UserError(
                f"--captions {self.source}: {len(missing)} pictures lack a caption, first "
                f"{missing[0]}; add it"
            )

    def without(self, suffix):
        """The pictures beside which there is no file of this suffix."""
        return [name for name in self.names if beside(name, suffix) not in self.found]

    def __len__(self):
        return len(self.names)

    def captions(self, i):
        """The captions of picture i, a list. Raises UserError where they are empty or cannot be
        read."""
        name = self.names[i]
        if self.source is None:
            return shared.plan_of(name).captions
        with fid.naming(f"{self.source}: the caption of {name} cannot be read"):
            # utf-8-sig passes over the mark with which some editors begin a file.
            text = fid.read_bytes(self.found[beside(name, ".txt")]).decode("utf-8-sig")
            lines = [line.strip() for line in text.split("\n") if line.strip()]
            if not lines:
                raise ValueError("it is empty; write one or take the picture out")
        return lines

    def features(self, i):
        """Text features made beforehand: (features (L,C) float16, mask (L,) bool) of picture i.
        Raises UserError."""
        name = self.names[i]
        with fid.naming(f"{self.source}: bad text features (L,C) of {name}"):
            data = fid.read_bytes(self.found[beside(name, ".npz")])
            features, mask = sample.text_features(io.BytesIO(data))
            if not features.half().isfinite().all():
                raise ValueError("NaN, or beyond float16; replace them")
            return features.half(), mask


def beside(name, suffix):
    """The name of a file that differs in its suffix."""
    return name.rsplit(".", 1)[0] + suffix


def read_texts(texts, numbers, choice, encoder, width):
    """The texts of pictures: ids (B,L) for the encoder, or where it is None features (B,L,C),
    float16, C = width; and their mask (B,L). choice: B numbers in [0,1), which choose among a
    picture's captions. Raises UserError."""
    if encoder is None:
        features = []
        masks = []
        for i in numbers:
            one, mask = texts.features(i)                           # (L,C), (L,)
            if one.shape[1] != width:
                raise UserError(f"--captions {texts.source}: text features need width {width}")
            features.append(one)
            masks.append(mask)
        features = nn.utils.rnn.pad_sequence(features, batch_first=True)  # (B,L,C)
        return features, nn.utils.rnn.pad_sequence(masks, batch_first=True)
    chosen = []
    for i, u in zip(numbers, choice):
        captions = texts.captions(i)
        chosen.append(captions[int(u * len(captions))])
    ids = encoder.ids(chosen)                                       # (B,L)
    return ids, encoder.mask(ids)


class Tokens(torch.utils.data.Dataset):
    """[numbers, view_draw, choice] -> a dict of tokens (B,K,D) float16, labels (B,) and, where
    there are texts, the words and mask of read_texts. Two draws, each (B,) in [0,1), choose:
    view_draw among a picture's views, choice among its captions. Raises UserError."""

    def __init__(self, tokens, labels, texts, encoder, width):
        self.tokens = tokens
        self.labels = labels
        self.texts = texts
        self.encoder = encoder
        self.width = width

    def __getitem__(self, key):
        numbers, view_draw, choice = key
        views = (view_draw * self.tokens.shape[1]).long()
        z = torch.from_numpy(self.tokens[numbers, views.numpy()])   # (B,K,D)
        batch = {"tokens": z, "labels": self.labels[numbers]}
        if self.texts:
            words, mask = read_texts(
                self.texts, numbers, choice.tolist(), self.encoder, self.width
            )
            batch["words"] = words
            batch["mask"] = mask
        return batch


def load_batches(data, args, ranks, first):
    """Yields this process's part of every batch, on its device; files of text are read by the
    loader's workers."""

    def order():
        numbers = shared.picture_order(len(data.tokens), args, ranks, first)
        for step, mine in enumerate(numbers, first):
            random = generator(args.seed, step, "cpu", stream=2)
            view_draw = torch.rand(args.batch, generator=random)
            choice = torch.rand(args.batch, generator=random)
            yield mine, ranks.share(view_draw), ranks.share(choice)

    gpu = ranks.device.type == "cuda"
    workers = args.workers
    if workers is None:
        workers = 4 if gpu and data.texts and data.texts.source else 0
    loader = torch.utils.data.DataLoader(
        data,
        batch_size=None,
        sampler=order(),
        num_workers=workers,
        pin_memory=gpu,
        worker_init_fn=sample.leave_signals,
    )
    for batch in loader:
        yield {name: u.to(ranks.device, non_blocking=True) for name, u in batch.items()}


def options():
    """The command line of stage 2."""
    p = sample.Parser(__doc__)
    shared.common_options(p, SETTINGS)
    p.section = p.sections["data"]
    p.add("--stage1", None, "checkpoint of stage 1, ours or the authors' (default: OUT/stage1.pt)")
    p.add("--tokens", None, "folder of tokens.npy and tokens.pt (default: OUT)")
    p.add(
        "--captions",
        None,
        "train on captions; FILE: their folder or .tar, if it is not that of the pictures",
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
    shared.add_setting(
        p, SETTINGS, "--label-drop", "share of labels or captions dropped", type=number(0, 1)
    )
    p.section = p.sections["rarely needed"]
    p.add(
        "--channel-expansion",
        4,
        "channel MLPs are so many times as wide as the Mixer",
        type=whole(1),
    )
    args = p.parse_args()
    if bool(args.clip) != bool(args.bpe) or args.clip and not args.captions:
        raise UserError(
            "--clip needs --captions and --bpe bpe_simple_vocab_16e6.txt.gz; --bpe needs --clip"
        )
    args.stage1 = args.stage1 or str(Path(args.out, "stage1.pt"))
    args.tokens = args.tokens or args.out
    return args


if __name__ == "__main__":
    sample.guarded(main, shared.LESS_MEMORY)
