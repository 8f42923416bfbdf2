"""Timings of the networks and counts of what they need.

    python -m docs.bench XL   # in the folder of the repository
    python -m docs.bench nano --peers        # and others' DINOv2, VAE and Inception beside ours

Weights are random. Times are medians; GMACs are 1e9 multiply-accumulates.
"""

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
import time
import types
import weakref

import numpy as np
import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import decoder as dec
import fid
import mixer as mix
import sample
import tokenizer as tok
import train_stage1 as one
import train_stage2 as two


def millions(net):  # its parameters in 1e6
    return sum(p.numel() for p in net.parameters()) / 1e6


def count_macs(function):
    """Multiply-accumulates of a call, in 1e9: (linear layers and convolutions, attention
    products)."""
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):  # it knows no fused attention
        function()
    macs = {str(name): flops / 2e9 for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(n for name, n in macs.items() if "attention" in name or "bmm" in name)
    return sum(macs.values()) - attention, attention


def kept_bytes(function):
    """Bytes that the autograd graph of function()'s result holds."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # alive until the sum, so that no storage comes twice
    return (sum(kept.values()), result)[0]


def step_kept_bytes(stage, args, ranks):
    """Bytes that a training step holds for its backward pass: (whatever the batch, a picture);
    nothing is computed."""
    kept = []
    for n in (1, 2):
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            ranks.autocast(),
            contextlib.redirect_stdout(None),
        ):
            calls = stage(argparse.Namespace(**{**vars(args), "compile": False}), ranks.device, n)
            kept.append(kept_bytes(next(call for name, call in calls if name.startswith("step"))))
    return 2 * kept[0] - kept[1], kept[1] - kept[0]


class Peak(TorchDispatchMode):
    """Within it, `peak` becomes the largest sum of bytes that new tensors hold at one time."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self.now = 0
        # {storage: [how many tensors show it, its bytes]}
        self.live = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                entry = self.live.setdefault(storage._cdata, [0, storage.nbytes()])
                if entry[0] == 0:
                    self.now += entry[1]
                    self.peak = max(self.peak, self.now)
                entry[0] += 1
                weakref.finalize(tensor, self.forget, storage._cdata)
        return result

    def forget(self, key):
        """A tensor is gone, and with the last one its storage."""
        entry = self.live[key]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= entry[1]
            del self.live[key]


def sampling_peaks(size, pictures=64):
    """Bytes beside the weights that drawing and encoding pictures of 256 pixels take in bfloat16: a
    dict. Nothing is computed."""

    def as_on_cuda(module, inputs):
        """There, autocast runs GroupNorm in float32."""
        return inputs[0].float()

    peaks = {}
    with FakeTensorMode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        decoder = dec.Decoder(**one.SIZES[size]["decoder"])
        vae = dec.VAE()
        for module in vae.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(as_on_cuda)
        latents = torch.randn(pictures, 4, 32, 32)
        z = torch.randn(pictures, 1, 768)
        x = torch.randn(pictures, 3, 256, 256)
        for name, call in (
            ("decoder", lambda: decoder(latents, torch.rand(1), z)),
            ("VAE decode", lambda: vae.decode(latents)),
            ("VAE encode", lambda: vae.posterior(x)),
        ):
            with Peak() as counter:
                call()
            peaks[name] = counter.peak
    return peaks


def median_ms(function, device, seconds=4.0):
    """Median time of a call, after one that does not count."""
    times = []
    while len(times) < 4 or sum(times[1:]) < 1e3 * seconds and len(times) <= 100:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median_high(times[1:])


def training_step(loss, trained):  # a call: forward and backward pass and an update
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step():
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_stage1(args, device, n):
    """Yields (name, call) of the networks of stage 1, with random weights, and of a training step,
    for n pictures."""
    torch.manual_seed(0)
    nano = args.size == "nano"
    pixels = 16 if nano else 256
    channels, size = (3, 16) if nano else (4, 32)
    with device:  # made there: FakeTensorMode moves no module
        vit = one.new_vit(argparse.Namespace(size=args.size, seed=0, pixels=pixels))
        tokenizer = tok.Tokenizer(vit)
        shape = dict(
            one.SIZES[args.size]["decoder"], channels=channels, size=size, token_dim=tokenizer.width
        )
        decoder = dec.Decoder(**shape)
    for p in decoder.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)  # zero starts would stop the backward pass
    vit.checkpointing = decoder.checkpointing = args.checkpointing
    print(
        f"size {args.size}, batch {n}: decoder {millions(decoder):.1f}M, "
        f"encoder {millions(vit):.1f}M parameters"
    )
    x, t = torch.rand(n, 3, pixels, pixels, device=device) * 2 - 1, torch.rand(n, device=device)
    noise, z0 = torch.randn(n, channels, size, size, device=device), tokenizer.z0(x)
    encode, decode = (torch.compile(net) if args.compile else net for net in (tokenizer, decoder))

    def loss():
        z = encode(x)
        return decode(noise, t, z).float().square().mean() + 0.1 * tok.cosine_loss(z, z0).mean()

    yield "encoder", lambda: encode(x)
    yield "decoder velocity", lambda: decode(noise, t, z0)
    yield (
        "step: encoder, decoder, backward",
        training_step(loss, [tokenizer.embedding, *decoder.parameters()]),
    )
    if not nano:
        vae = dec.VAE().to(device, memory_format=torch.channels_last)
        yield "VAE encode", lambda: vae.posterior(x)
        yield "VAE decode", lambda: vae.decode(noise)


def bench_stage2(args, device, n):  # the same of the Mixer
    if args.size == "nano":
        D = 128
        num_classes = 10
    else:
        D = 768
        num_classes = 1000
    with device:
        mixer = mix.Mixer(1, D, **one.SIZES[args.size]["mixer"], num_classes=num_classes)
    print(f"size {args.size}, batch {n}: Mixer {millions(mixer):.1f}M parameters")
    inputs = [
        u.to(device)
        for u in (torch.randn(n, 1, D), torch.rand(n), torch.zeros(n, dtype=torch.long))
    ]
    velocity = torch.compile(mixer) if args.compile else mixer
    yield "Mixer", lambda: velocity(*inputs)
    trained = [*mixer.parameters()]
    yield (
        "step: Mixer, backward",
        training_step(lambda: velocity(*inputs).float().square().mean(), trained),
    )


def bench(args):
    """Print a row a network: milliseconds, pictures/s, GMACs a picture (linear + attention),
    GFLOP/s and their share of the peak, which is that of a 4096^3 product in the same dtype,
    measured before and after."""
    ranks = sample.Ranks(args.device, args.dtype)
    device = ranks.device
    batches = (64, 256) if device.type == "cuda" else (2, 32)
    if args.size == "nano":
        batches = (one.SETTINGS["batch"][1], two.SETTINGS["batch"][1])
    else:
        peaks = [f"{what} {n / 1e9:.1f} GB" for what, n in sampling_peaks(args.size).items()]
        print(f"64 pictures take, beside the weights: {', '.join(peaks)}, bfloat16, counted")
    with ranks.autocast():
        square = torch.randn(4096, 4096, device=device)
        square = square.to((square @ square).dtype)
    before, rows = median_ms(lambda: square @ square, device), []
    for stage, n in zip((bench_stage1, bench_stage2), batches):
        n = args.batch or n
        always, each = (n / 1e6 for n in step_kept_bytes(stage, args, ranks))
        print(
            f"a step keeps {always:.0f} MB and {each:.2f} MB a picture for its backward pass, "
            f"{ranks.dtype}, counted"
        )
        for name, call in stage(args, device, n):
            call = ranks.autocast()(call if name.startswith("step") else torch.no_grad()(call))
            linear, attention = (macs / n for macs in count_macs(call))
            ms = median_ms(call, device)
            rows.append(
                (name, ms, 1e3 * n / ms, linear, attention, 2e3 * n * (linear + attention) / ms)
            )
    peak = 2 * 4096**3 / 1e6 / min(before, median_ms(lambda: square @ square, device))
    print(f"{device}, {square.dtype}: peak of a 4096^3 product {peak:.0f} GFLOP/s; medians")
    print(
        f"{'':34s}{'ms':>9s}{'images/s':>10s}{'GMACs':>9s}{'+ attn':>8s}"
        f"{'GFLOP/s':>9s}{'of peak':>9s}"
    )
    for name, ms, rate, linear, attention, flops in rows:
        print(
            f"{name:34s}{ms:9.1f}{rate:10.2f}{linear:9.3f}{attention:8.3f}"
            f"{flops:9.0f}{flops / peak:8.0%}"
        )


@torch.no_grad()
def interleaved(what, ours, rounds=7, **peers):
    """Print median times of calls that run in turn. peers: what makes their calls, where their
    packages are usable."""
    calls = {"ours": ours}
    for name, make in peers.items():
        try:
            calls[name] = make()
        except Exception as e:
            print(f"{name} left out: {type(e).__name__}: {str(e).splitlines()[0][:150]}")
    seconds = {name: [] for name in calls}
    for name in (rounds + 1) * [*calls]:
        start = time.perf_counter()
        calls[name]()
        seconds[name].append(time.perf_counter() - start)
    median = {name: 1e3 * statistics.median(times[1:]) for name, times in seconds.items()}
    for name, ms in median.items():
        print(
            f"{what}, {name}: {ms:.0f} ms, {ms / median['ours']:.2f} of ours (median of {rounds})",
            flush=True,
        )


def bench_peers():
    """DINOv2 ViT-B/14, SD VAE and FID Inception with random weights, ours and others'; float32, the
    CPU."""

    def transformers():
        from transformers import Dinov2Config, Dinov2Model

        return functools.partial(Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).eval(), x)

    def diffusers():
        from diffusers import AutoencoderKL

        return AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        ).eval()

    def pytorch_fid(form=torch.contiguous_format):
        sys.modules.setdefault(
            "torchvision._meta_registrations", types.ModuleType("unused")
        )  # needs a compiled half
        import pytorch_fid.inception as module

        module.load_state_dict_from_url = lambda *a, **k: state
        net = module.InceptionV3([3]).eval().to(memory_format=form)
        return lambda: net((pictures.float() / 255).contiguous(memory_format=form))

    print(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}")
    x, vit = (
        torch.randn(8, 3, 224, 224),
        tok.ViT(768, 12, 12, 3072, 14, 37, layer_scale=True, position="offset"),
    )
    interleaved("DINOv2 ViT-B/14, 224 px, batch 8", lambda: vit(x), transformers=transformers)
    vae = dec.VAE().to(memory_format=torch.channels_last)
    for half, ours, u in (
        ("encode", vae.posterior, torch.rand(1, 3, 256, 256) * 2 - 1),
        ("decode", vae.decode, torch.randn(1, 4, 32, 32)),
    ):
        interleaved(
            f"VAE {half}, 256 px",
            functools.partial(ours, u),
            diffusers=lambda: functools.partial(getattr(diffusers(), half), u),
        )
    state = fid.Inception("tf1").state_dict() | {
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
    }
    with tempfile.NamedTemporaryFile() as file:
        torch.save(state, file.name)
        net = fid.load_inception(file.name)
    pictures = torch.from_numpy(
        np.random.RandomState(0).randint(0, 256, (16, 3, 256, 256), np.uint8)
    )
    interleaved(
        "FID Inception, 256 px, batch 16",
        lambda: net(pictures),
        pytorch_fid=pytorch_fid,
        pytorch_fid_channels_last=lambda: pytorch_fid(torch.channels_last),
    )


def options():
    """The command line."""
    p = sample.Parser(__doc__)
    p.add_argument("size", choices=[*one.SIZES], help="the networks to time")
    p.add("--batch", None, "pictures a call (default: by size and device)", type=sample.whole(1))
    p.add("--device", "auto", "where", choices=["auto", "cpu", "cuda", "mps"])
    p.add("--dtype", "auto", "as in the trainers", choices=["auto", "float32", "bfloat16"])
    p.add("--compile", False, "torch.compile the networks", action="store_true")
    p.add(
        "--checkpointing", False, "recompute activations in the training step", action="store_true"
    )
    p.add("--peers", False, "also time others' networks beside ours", action="store_true")
    return p.parse_args()


def main():
    """Print the tables of the command line."""
    args = options()
    bench(args)
    if args.peers:
        bench_peers()


if __name__ == "__main__":
    sample.guarded(main)
