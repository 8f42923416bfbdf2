"""Scores for generated and reconstructed pictures: FID, PSNR, SSIM, LPIPS. This file works alone.

    python fid.py REAL FAKE                               # each a folder, a .zip, or an .npz (arr_0 pictures, or mu and sigma)
    python fid.py imagenet/ samples.npz --resize tf1 --json fid.json
    python fid.py imagenet/ --save-stats imagenet.npz     # once; then: python fid.py imagenet.npz samples/
    python fid.py --pairs originals/ reconstructions/     # PSNR, SSIM, LPIPS of pictures with the same name

FID (Heusel et al., arXiv 1706.08500) is the Frechet distance between two Gaussians, fitted to the Inception-v3 features of
real and of generated pictures:

    FID = |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))                                                   (1)

Two FIDs compare only if reference, number of pictures, preprocessing and weights agree, so every score carries all four.
Letters in the shape comments: B pictures, H, W height and width, D features (2048).
"""
import argparse
import collections
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import platform
import re
import sys
import types
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm


class UserError(ValueError):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""


@contextlib.contextmanager
def exact(x):
    """float32 throughout, without autocast and TF32, which would move a score."""
    with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


# ---- Inception-v3, as converted from TensorFlow's 2015 graph ----

class Conv(nn.Module):
    """Convolution, batch norm, ReLU. Padding keeps the size at stride 1, unless given; there is none at stride 2."""

    def __init__(self, c_in, c_out, kernel, stride=1, pad=None):
        super().__init__()
        h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = pad if pad is not None else (h // 2, w // 2) if stride == 1 else 0
        self.conv, self.bn = nn.Conv2d(c_in, c_out, (h, w), stride, pad, bias=False), nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Branches side by side, concatenated over channels. A branch is a list of steps: (name, channels, kernel[, stride]) or a
    pooling; its last step may be a list of convolutions that share their input."""

    def __init__(self, c_in, *branches):
        super().__init__()
        self.branches = []
        for branch in branches:
            c, steps = c_in, []
            for step in branch:
                forks = step if isinstance(step, list) else [step]
                for fork in forks:
                    if isinstance(fork, tuple):
                        self.add_module(fork[0], Conv(c, *fork[1:]))
                steps.append([self.get_submodule(fork[0]) if isinstance(fork, tuple) else fork for fork in forks])
                c = forks[0][1] if isinstance(forks[0], tuple) else c
            self.branches.append(steps)

    def forward(self, x):
        outs = []
        for *stem, last in self.branches:
            y = x
            for (layer,) in stem:
                y = layer(y)
            outs += [layer(y) for layer in last]
        return torch.cat(outs, 1)


AVG = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # TensorFlow does not count the padding
SAME, HALF = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)


def _mixed_a(c, pool):  # 35 x 35
    return Mixed(c, [("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
                 [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)], [AVG, ("branch_pool", pool, 1)])


def _mixed_c(c):  # 17 x 17; a 7 x 7 kernel as 1 x 7 and 7 x 1
    return Mixed(768, [("branch1x1", 192, 1)], [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
                 [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
                  ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))], [AVG, ("branch_pool", 192, 1)])


def _mixed_e(c, pool):  # 8 x 8; the last block max-pools, as the 2015 graph does and torchvision does not
    return Mixed(c, [("branch1x1", 320, 1)], [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
                 [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
                  [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]], [pool, ("branch_pool", 192, 1)])


class Inception(nn.Module):
    """uint8 pictures (B,3,H,W) of any size -> pooled features (B,2048) float32 (Szegedy et al., arXiv 1512.00567).

    `resize` names the preprocessing, and the two do not compare: "pytorch-fid" (half-pixel bilinear without antialias, [-1,1])
    or "tf1" (torch-fidelity and the original TensorFlow: bilinear without the half-pixel shift, (x - 128) / 128)."""

    def __init__(self, resize):
        super().__init__()
        self.resize, self.layout = resize, torch.contiguous_format
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(3, 32, 3, 2), Conv(32, 32, 3, pad=0), Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3, pad=0)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _mixed_a(192, 32), _mixed_a(256, 64), _mixed_a(288, 64)
        self.Mixed_6a = Mixed(288, [("branch3x3", 384, 3, 2)],
                              [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)], [HALF])
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_mixed_c(c) for c in (128, 160, 160, 192))
        self.Mixed_7a = Mixed(768, [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)], [
            ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)], [HALF])
        self.Mixed_7b, self.Mixed_7c = _mixed_e(1280, AVG), _mixed_e(2048, SAME)
        layers = list(self.children())
        self.order = [*layers[:3], HALF, *layers[3:5], HALF, *layers[5:]]

    def prepare(self, x):
        """uint8 (B,3,H,W) -> float32 (B,3,299,299)."""
        if x.dtype != torch.uint8:
            raise TypeError(f"Inception takes uint8 pictures, not {x.dtype}; to_uint8 makes them from [-1,1]")
        x = x.float()
        if self.resize == "pytorch-fid":
            return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        for dim in (2, 3):
            n = x.shape[dim]
            source = torch.arange(299, device=x.device) * (n / 299)
            low = source.long().clamp(max=n - 1)
            weight = (source - low).view((-1, 1) if dim == 2 else (-1,))
            x = torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1)), weight)
        return (x - 128) / 128

    @torch.no_grad()
    def forward(self, *groups):
        """Each group holds pictures of one size; all pass as one batch."""
        with exact(groups[0]):
            x = torch.cat([self.prepare(g) for g in groups]).contiguous(memory_format=self.layout)  # (B,3,299,299)
            for layer in self.order:
                x = layer(x)                                                                        # (B,2048,8,8) at the end
            return x.mean((2, 3))                                                                   # (B,2048)


# ---- Statistics and the distance ----

class Statistics:
    """Mean and covariance of features (B,D), as streaming float64 sums: memory does not grow with the number of pictures.

    update() for every batch, reduce() once on every rank; then .n, .mu (D,) and .cov (D,D), numpy, ddof 1, alike on all ranks.
    `resize` and `inception` (the weights' SHA-256) say how the features were made, where known."""

    def __init__(self, dims=2048, resize=None, inception=None):
        self.resize, self.inception, self.n = resize, inception, 0
        self.sum, self.outer = torch.zeros(dims, dtype=torch.float64), torch.zeros(dims, dims, dtype=torch.float64)

    def update(self, features):
        x = _double(features.detach())                                      # (B,D)
        self.sum, self.outer = self.sum.to(x.device), self.outer.to(x.device)
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)                                           # (D,D)

    def reduce(self):
        """Sum over the ranks of torch.distributed, where it is initialised; a second call would count twice."""
        if dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            n, self.sum, self.outer = torch.tensor(self.n, device=device), self.sum.to(device), self.outer.to(device)
            for part in (n, self.sum, self.outer):
                dist.all_reduce(part)
            self.n = n.item()
        return self

    @property
    def mu(self):
        return (self.sum / self.n).cpu().numpy()

    @property
    def cov(self):
        return ((self.outer - torch.outer(self.sum, self.sum) / self.n) / (self.n - 1)).cpu().numpy()


def frechet_distance(mu1, cov1, mu2, cov2):
    """Eq. 1 for means (D,) and covariances (D,D), also singular ones; float64 inside. Raises UserError on unlike sizes or NaN.

    With C1 = A A^T, tr((C1 C2)^(1/2)) is the sum of the roots of the eigenvalues of A^T C2 A, which is symmetric: no matrix
    square root. Eigenvalues that are rounding of zero go before a root lifts 1e-16 to 1e-8, so singular C1 and C2 are exact."""
    mu1, cov1, mu2, cov2 = (torch.as_tensor(np.asarray(v, np.float64)) for v in (mu1, cov1, mu2, cov2))
    if mu1.shape != mu2.shape or cov1.shape != cov2.shape or cov1.shape != (*mu1.shape, *mu1.shape):
        raise UserError(f"statistics of unlike sizes: mu {tuple(mu1.shape)} and {tuple(mu2.shape)}, "
                        f"covariance {tuple(cov1.shape)} and {tuple(cov2.shape)}")
    if not all(v.isfinite().all() for v in (mu1, cov1, mu2, cov2)):
        raise UserError("statistics hold NaN or infinity; a covariance needs at least two pictures")

    def positive(values):
        return values > values.max() * len(values) * torch.finfo(torch.float64).eps

    values, vectors = torch.linalg.eigh(cov1)
    keep = positive(values)
    a = vectors[:, keep] * values[keep].sqrt()                              # (D,rank)
    values = torch.linalg.eigvalsh(a.T @ cov2 @ a) if keep.any() else values[:0]
    roots = values[positive(values)].sqrt().sum() if len(values) else 0.0
    return max(0.0, float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * roots))


def check_alike(a, b):
    """UserError where two sides (Statistics, or the network) are known to differ in preprocessing or weights."""
    for key, what in (("resize", "preprocessing (--resize)"), ("inception", "Inception weights (SHA-256)")):
        x, y = getattr(a, key), getattr(b, key)
        if x and y and x != y:
            raise UserError(f"features made with different {what} do not compare: {x} and {y}")


def fid(real, fake, names=("REAL", "FAKE")):
    """FID of two Statistics, or of what read_statistics returns; one line on stderr where N makes it biased."""
    check_alike(real, fake)
    dims, few = len(real.mu), []
    for name, side in zip(names, (real, fake)):
        n = side.n if side.n is not None else int(np.linalg.matrix_rank(side.cov, hermitian=True)) + 1  # a file may not say: N pictures have rank N - 1
        if n <= dims:
            few.append(f"N = {n}{' (by its rank)' if side.n is None else ''} of {name}")
    if few:
        print(f"fid.py: warning: the score is biased upwards, {' and '.join(few)} being too few pictures for {dims} features; "
              f"from N = {dims + 1} on the covariance is no longer singular (papers use 50000)", file=sys.stderr)
    return frechet_distance(real.mu, real.cov, fake.mu, fake.cov)


# ---- Scores of pairs ----

def to_uint8(x):
    """[-1,1] -> uint8, rounded as a saved picture is; every score of generated pictures starts here. Raises UserError on NaN."""
    if not x.isfinite().all():
        raise UserError("the model's pictures hold NaN or infinity; nothing was scored")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def _double(x):
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def _unit(x):
    return _double(x) / (255 if x.dtype == torch.uint8 else 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each pair: (B,C,H,W), both uint8 or both float in [0,1] -> (B,) float64; equal: inf."""
    return -10 * (_unit(a) - _unit(b)).square().flatten(1).mean(1).log10()


def ssim(a, b):
    """Structural similarity of each pair: (B,C,H,W), uint8 or float in [0,1], sides >= 11 -> (B,) float64 in [-1,1].

    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): Gaussian window 11, sigma 1.5, population covariance, channels averaged;
    equals scikit-image's structural_similarity(gaussian_weights=True, use_sample_covariance=False, data_range=1)."""
    if min(a.shape[-2:]) < 11:
        raise UserError(f"SSIM needs pictures of at least 11 x 11, not {a.shape[-2]} x {a.shape[-1]}")
    a, b = _unit(a), _unit(b)
    window = torch.exp(-torch.arange(-5.0, 6.0, dtype=torch.float64, device=a.device) ** 2 / (2 * 1.5**2))
    window = window / window.sum()

    def blur(x):                                                            # (B,C,H,W) -> (B,C,H-10,W-10)
        return (x.unfold(2, 11, 1) @ window).unfold(3, 11, 1) @ window

    mu_a, mu_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


class LPIPS(nn.Module):
    """Perceptual distance (Zhang et al., arXiv 1801.03924; VGG16, heads v0.1): a, b (B,3,H,W) in [-1,1] -> (B,) float32.

    vgg_path: torchvision's vgg16-397923af.pth; heads_path: lin0..lin4. Sides of at least 16. Raises UserError on wrong files."""

    def __init__(self, vgg_path, heads_path):
        super().__init__()
        widths, layers, c_in = (64, 128, 256, 512, 512), [], 3
        for c, convs in zip(widths, (2, 2, 3, 3, 3)):
            for _ in range(convs):
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
                c_in = c
            layers.append(nn.MaxPool2d(2))
        self.vgg = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Sequential(nn.Dropout(), nn.Conv2d(c, 1, 1, bias=False)) for c in widths)
        lins = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": head}) for i, head in enumerate(self.heads)})
        self.sha256 = [load_weights(nn.ModuleDict({"features": self.vgg}), vgg_path, "torchvision's VGG16", ignore=("classifier.",)),
                       load_weights(lins, heads_path, "the LPIPS v0.1 heads for VGG")]
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        if min(a.shape[-2:]) < 16:
            raise UserError(f"LPIPS needs pictures of at least 16 x 16, not {a.shape[-2]} x {a.shape[-1]}")
        x, total, heads = (torch.cat([a, b]).float() - self.shift) / self.scale, 0.0, iter(self.heads)
        with exact(x):
            for layer in self.vgg:
                if isinstance(layer, nn.MaxPool2d):  # before each pooling; the fifth is not needed
                    unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)     # (2B,C,h,w), a pixel's channels to length 1
                    total = total + next(heads)((unit[: len(a)] - unit[len(a):]).square()).mean((1, 2, 3))
                x = x if layer is self.vgg[-1] else layer(x)
        return total


def pair_scores(real, fake, lpips=None):
    """uint8 (B,3,H,W) twice -> (B,3) float64: PSNR, SSIM, LPIPS (NaN without one). Average them with Statistics(3) over batches
    and ranks: .update(pair_scores(a, b, lpips)), .reduce(), .mu."""
    p, s = psnr(real, fake), ssim(real, fake)
    distance = lpips(real / 127.5 - 1, fake / 127.5 - 1).to(p) if lpips else torch.full_like(p, math.nan)
    return torch.stack([p, s, distance], 1)


# ---- below: weight files, picture files, the command line; nothing about the method ----

URLS = {"pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
        "vgg16-397923af.pth": "https://download.pytorch.org/models/",
        "weights-vgg16-lpips.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"}
INCEPTION, VGG, HEADS = (os.path.join(torch.hub.get_dir(), "checkpoints", name) for name in URLS)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # none that starts another program, as EPS does
LARGEST = 2**26  # pixels of a picture; 2**31 bytes of an array


@contextlib.contextmanager
def naming(what):
    """Damaged files raise a dozen kinds of exceptions in their readers; each becomes a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what}: {str(e)[:200] or type(e).__name__}") from e


def address(path):
    """Where the published weights file of this name is, or None."""
    name = os.path.basename(path)
    return URLS[name] + name if name in URLS else None


def sha256(path):
    """Hex digest of a file; of a folder, that of the lines `<digest>  <name>` of its pictures, as sha256sum prints them."""
    if os.path.isdir(path):
        rows = [f"{sha256(os.path.join(path, n))}  {n}\n" for n in tqdm(pictures(path)[0], "SHA-256", leave=False, disable=None)]
        return hashlib.sha256("".join(rows).encode(errors="surrogateescape")).hexdigest()
    with naming(f"cannot read {path}"), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_weights(module, path, what, ignore=()):
    """Fill `module` from the state dict at `path`, running no code from it; returns the SHA-256. UserError names what is wrong."""
    if tuple(int(v) for v in torch.__version__.split(".")[:2]) < (2, 6):
        raise UserError(f"torch {torch.__version__} can run code hidden in a weights file (CVE-2025-32434): install 2.6 or newer")
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing; it should be {what}" + (f": download {address(path)} and put it there" if address(path) else ""))
    with naming(f"{path} is not {what}: damaged, or more than named tensors"):
        with open(path, "rb") as f:
            zipped = f.read(2) == b"PK"  # these are mapped: no size written in the file can then reach beyond it
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as e:
            raise ValueError(type(e).__name__) from e  # torch's own text advises to trust the file
        have = {k: v for k, v in state.items() if not k.startswith(ignore) and not k.endswith("num_batches_tracked")}
    want = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    good = {k for k, v in have.items() if k in want and isinstance(v, torch.Tensor) and v.shape == want[k].shape
            and v.is_floating_point() and v.layout == torch.strided and v.device.type == "cpu"}
    lost, odd = ([f"{k} {list(getattr(d[k], 'shape', ()))}" for k in d if k not in good] for d in (want, have))
    if lost or odd:
        first = [", ".join(names[:5]) + f" and {len(names) - 5} more" * (len(names) > 5) or "none" for names in (lost, odd)]
        raise UserError(f"{path} is not {what}: missing {first[0]}; unexpected {first[1]}")
    if not all(have[k].float().isfinite().all() for k in want):
        raise UserError(f"{path} is damaged: it holds NaN or infinity; get it again")
    module.load_state_dict(have, strict=False)
    digest, named = sha256(path), re.search(r"-([0-9a-f]{8})\.pth$", str(path))
    if named and not digest.startswith(named[1]):
        print(f"fid.py: warning: {path} is not the published file: its SHA-256 begins with {digest[:8]}", file=sys.stderr)
    return digest


def load_inception(path=INCEPTION, resize="pytorch-fid", device="cpu"):
    """The FID Inception from pytorch-fid's or torch-fidelity's file, as an Inception; UserError on a missing or wrong file."""
    if resize not in ("pytorch-fid", "tf1"):
        raise UserError(f"resize is 'pytorch-fid' or 'tf1', not {resize!r}")
    net = Inception(resize).eval().requires_grad_(False)
    net.inception = load_weights(net, path, "the FID Inception", ignore=("fc.", "AuxLogits."))
    for layer in [m for m in net.modules() if isinstance(m, Conv)]:  # batch norm into the convolution: one pass less over memory
        layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv.double(), layer.bn.double()).float(), nn.Identity()
    net.layout = torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format
    return net.to(device, memory_format=net.layout)


def _member(archive, name):
    """Open a member whose sizes are possible: deflate shrinks 1032 times at most, so what is promised beyond is not there."""
    info = archive.getinfo(name)
    if info.compress_type not in (0, 8) or info.flag_bits & 1 or info.file_size > min(1032 * info.compress_size + 64, 2**40):
        raise ValueError(f"{name} is encrypted, damaged or packed in an unusual way: pack it again")
    return archive.open(info), info.file_size


def _array(archive, name):
    """(stream at the first byte, shape, dtype) of an .npz array; its size must be what the archive holds, and nothing is pickled."""
    (stream, size), header = _member(archive, name + ".npy"), np.lib.format
    shape, fortran, dtype = {(1, 0): header.read_array_header_1_0, (2, 0): header.read_array_header_2_0}[header.read_magic(stream)](stream)
    if dtype.hasobject or min(shape, default=0) < 0 or fortran and len(shape) > 2 or stream.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} says {dtype} {shape}, which is not what its {size} bytes hold")
    return stream, shape, dtype


def has_statistics(source):
    """Whether source is an .npz with mu and sigma; they win over the pictures that ADM's reference batches also hold."""
    if not str(source).lower().endswith(".npz") or not os.path.isfile(source):
        return False
    with naming(f"cannot read {source}"), zipfile.ZipFile(source) as z:
        return {"mu.npy", "sigma.npy"} <= set(z.namelist())


def read_statistics(path):
    """.npz with mu (D,) and sigma (D,D), pytorch-fid's or ADM's -> .mu, .cov; .n, .resize, .inception where it says, else None."""
    found = {"n": None, "resize": None, "inception": None}
    with naming(f"cannot read {path}"), zipfile.ZipFile(path) as z:
        for name in ("mu", "sigma", *(k for k in found if k + ".npy" in z.namelist())):
            stream, shape, dtype = _array(z, name)
            if dtype.kind not in ("f" if name in ("mu", "sigma") else "iU") or math.prod(shape) * dtype.itemsize > 32 * LARGEST:
                raise ValueError(f"{name} is {dtype} {shape}, which no statistics are")
            found[name] = np.frombuffer(stream.read(), dtype).reshape(shape)[()]
        mu, cov = found["mu"].astype(np.float64), found["sigma"].astype(np.float64)
        if mu.ndim != 1 or cov.shape != (*mu.shape, *mu.shape) or not (np.isfinite(cov).all() and np.allclose(cov, cov.T)):
            raise ValueError(f"mu {mu.shape} and sigma {cov.shape} are not a mean (D,) and a finite symmetric covariance (D,D)")
        facts = {k: kind(found[k]) if found[k] is not None else None for k, kind in (("n", int), ("resize", str), ("inception", str))}
    return types.SimpleNamespace(mu=mu, cov=cov, **facts)


def decode(file):
    """A picture file -> uint8 (H,W,3), transparency dropped, 16-bit grey divided by 257. ValueError and others if unreadable."""
    with PIL.Image.open(file, formats=FORMATS) as im:
        if im.width * im.height > LARGEST:
            raise ValueError(f"{im.width} x {im.height} is too large")
        deep = np.asarray(im).astype(np.int64) if im.mode[0] == "I" else None  # Pillow would clip it at 255
        if im.mode == "F" or deep is not None and not 0 <= deep.min() <= deep.max() <= 65535:
            raise ValueError("its values go beyond 16 bits: convert it to 8 or 16 bits a channel")
        return np.array(im.convert("RGB")) if deep is None else np.repeat((deep[..., None] + 128) // 257, 3, 2).astype(np.uint8)


def _raise(error):
    raise error


def pictures(source):
    """A folder (any tree), .zip or .npz -> (names, sorted without suffix; read(name) -> uint8 (H,W,3)). UserError if it has none."""
    if not os.path.exists(source):
        raise UserError(f"{source} does not exist: give a folder of pictures, a .zip of one, or an .npz")
    with naming(f"cannot read {source}"):
        if os.path.isdir(source):
            names, seen = [], set()
            for root, folders, files in os.walk(source, followlinks=True, onerror=_raise):
                if (real := os.path.realpath(root)) in seen:  # a link in a circle
                    folders.clear()
                    continue
                seen.add(real)
                names += [pathlib.Path(root, f).relative_to(source).as_posix() for f in files if os.path.isfile(os.path.join(root, f))]
        else:
            archive = zipfile.ZipFile(source)
            names = archive.namelist()
            if str(source).lower().endswith(".npz"):
                if "arr_0.npy" not in names:
                    raise ValueError(f"it holds neither mu and sigma nor arr_0, but {', '.join(names[:5]) or 'nothing'}")
                stream, shape, dtype = _array(archive, "arr_0")
                if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not 0 < math.prod(shape[1:]) <= 3 * LARGEST or not shape[0]:
                    raise ValueError(f"arr_0 is {dtype} {shape}; pictures are uint8 (N,H,W,3)")
                start, size = stream.tell(), math.prod(shape[1:])

                def read(name):
                    stream.seek(start + int(name) * size)
                    return np.frombuffer(stream.read(size), np.uint8).reshape(shape[1:])

                return [f"{i:06d}" for i in range(shape[0])], read
        names = [n for n in names if n.lower().endswith(SUFFIXES) and not re.search(r"(^|/)(\.|__MACOSX/)", n)]
        if not names:
            raise ValueError(f"it holds no pictures ({' '.join(SUFFIXES)})")

    def read(name):
        if os.path.isdir(source):
            with open(os.path.join(source, name), "rb") as f:
                return decode(f)
        stream, size = _member(archive, name)
        if size > 4 * LARGEST:
            raise ValueError("it is larger than 256 MiB")
        return decode(io.BytesIO(stream.read()))

    return sorted(names, key=lambda n: (os.path.splitext(n)[0], n)), read


def images(source, workers=8, rank=0, world=1):
    """Yield (name, uint8 (H,W,3)) of a folder, .zip or .npz; every `world`-th from `rank` on. UserError names what is unreadable."""
    names, read = pictures(source)

    def named(name):
        with naming(f"cannot read {name} in {source}"):
            return name, read(name)

    with ThreadPoolExecutor(1 if str(source).lower().endswith(".npz") else workers) as pool:  # an array is read in its order
        todo = iter(names[rank::world])
        waiting = collections.deque(pool.submit(named, n) for n in itertools.islice(todo, 4 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(named, n) for n in itertools.islice(todo, 1))


def batches(arrays, size, device):
    """uint8 arrays (...,H,W,3) -> lists of tensors (b,...,3,H,W), one for each picture size, `size` pictures in a list."""
    arrays = iter(arrays)
    while chunk := list(itertools.islice(arrays, size)):
        groups = collections.defaultdict(list)
        for x in chunk:
            groups[x.shape].append(x)
        yield [torch.from_numpy(np.stack(g)).to(device).movedim(-1, -3) for g in groups.values()]


def measure(source, net, batch=50, workers=8):
    """Statistics of the pictures of `source` (under torchrun each rank reads its share), or those that an .npz holds."""
    if has_statistics(source):
        return read_statistics(source)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stats, total = Statistics(2048, net.resize, net.inception), len(pictures(source)[0][rank::world])
    progress = tqdm(images(source, workers, rank, world), os.path.basename(source), total, leave=False, disable=rank > 0 or None)
    for groups in batches((x for _, x in progress), batch, next(net.parameters()).device):
        stats.update(net(*groups))
    return stats.reduce()


def record(metric, value, n_real, n_fake, reference, preprocessing=None, weights=None):
    """Print a score's line and return the same as a dict for JSON; `weights` holds SHA-256s, `reference` is a path."""
    made = {"metric": metric, "value": value if math.isfinite(value) else str(value), "n_real": n_real or "unknown", "n_fake": n_fake or "unknown",
            "preprocessing": preprocessing, "weights_sha256": weights, "reference": os.fspath(reference), "reference_sha256": sha256(reference),
            "versions": f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, pillow {PIL.__version__}"}
    print(f"{metric} {value:.6f}", *(f"{k} {v}" for k, v in list(made.items())[2:] if v is not None), sep="  ", flush=True)
    return made


def write_file(path, write):
    """write(binary file) beside `path`, then rename: `path` is whole or as it was. UserError where that is not possible."""
    temporary = pathlib.Path(f"{path}.{os.getpid()}.tmp")
    with naming(f"cannot write {path}"):
        try:
            with open(temporary, "wb") as f:
                write(f)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _pairs(args, device):
    names = [{os.path.splitext(n)[0]: n for n in pictures(s)[0]} for s in (args.real, args.fake)]
    for source, own, other in ((args.real, *names), (args.fake, *names[::-1])):
        if lonely := [n for n in pictures(source)[0] if os.path.splitext(n)[0] not in other or n not in own.values()]:
            raise UserError(f"{len(lonely)} in {source} without a partner of its own: {', '.join(lonely[:5])}")
    lpips = None
    if (args.vgg, args.lpips) != (VGG, HEADS) or os.path.isfile(VGG) and os.path.isfile(HEADS):
        lpips = LPIPS(args.vgg, args.lpips).to(device)
    else:
        lost = next(f for f in (VGG, HEADS) if not os.path.isfile(f))
        print(f"fid.py: warning: no LPIPS, {lost} is missing: download {address(lost)} and put it there", file=sys.stderr)

    def both():
        sides = images(args.real, args.workers), images(args.fake, args.workers)
        for (name, a), (_, b) in tqdm(zip(*sides), "pairs", len(names[0]), leave=False, disable=None):
            if a.shape != b.shape:
                raise UserError(f"{name} is {a.shape[:2]} in {args.real} but {b.shape[:2]} in {args.fake}: a pair has one size")
            yield np.stack([a, b])

    total = Statistics(3)
    for groups in batches(both(), args.batch, device):
        for g in groups:                                                    # (b,2,3,H,W)
            total.update(pair_scores(g[:, 0], g[:, 1], lpips))
    return [record(metric, value, total.n, total.n, args.real, None, lpips.sha256 if metric == "LPIPS" else None)
            for metric, value in zip(("PSNR", "SSIM", "LPIPS"), total.mu.tolist()) if lpips or metric != "LPIPS"]


def _fid(args, device):
    sources = [s for s in (args.real, args.fake) if s]
    held = {s: read_statistics(s) for s in sources if has_statistics(s)}
    for s in set(sources) - set(held):  # what can be refused at once is refused before the network runs
        if len(pictures(s)[0]) < 2:
            raise UserError(f"{s} holds one picture; a covariance needs at least two")
    net = load_inception(args.inception, args.resize, device) if len(held) < len(set(sources)) else None
    for stats in held.values():
        check_alike(stats, net or held[sources[0]])
    sides = [held[s] if s in held else measure(s, net, args.batch, args.workers) for s in sources]
    if args.save_stats:
        facts = {k: v for k, v in vars(sides[0]).items() if k in ("n", "resize", "inception") and v is not None}
        write_file(args.save_stats, lambda f: np.savez(f, mu=sides[0].mu, sigma=sides[0].cov, **facts))
    if args.fake:
        a, b = sides
        return record("FID", fid(a, b, sources), a.n, b.n, args.real, b.resize or a.resize or "unknown", b.inception or a.inception)


class _Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, no usage block
        self.exit(2, f"fid.py: error: {' '.join(message.split())}\n")


def _count(text):
    if not text.isdecimal() or not 0 < int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def main(argv=None):
    """The command line; see --help."""
    parser = _Parser(description=__doc__.partition("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("real", metavar="REAL", help="reference: a folder (any tree), .zip or .npz of pictures, or an .npz with mu and sigma")
    add("fake", metavar="FAKE", nargs="?", help="what is scored, in any of the same forms; may be left out with --save-stats")
    add("--pairs", action="store_true", help="PSNR, SSIM and LPIPS of pictures with the same name (the suffix may differ), not FID")
    add("--resize", choices=("pytorch-fid", "tf1"), default="pytorch-fid", help="preprocessing; ADM's reference batches were made with tf1")
    add("--inception", metavar="FILE", default=INCEPTION, help="weights of the FID Inception")
    add("--vgg", metavar="FILE", default=VGG, help="torchvision's VGG16, for LPIPS")
    add("--lpips", metavar="FILE", default=HEADS, help="LPIPS v0.1 heads for VGG")
    add("--save-stats", metavar="F.npz", help="write REAL's mu and sigma, which pytorch-fid reads too")
    add("--json", metavar="F", help="write the score with all that it depends on; --pairs: a list of scores")
    add("--batch", type=_count, default=50, help="pictures in a batch; does not change the score")
    add("--workers", type=_count, default=8, help="threads that read pictures; does not change the score")
    add("--device", default="auto", help="cpu, cuda, mps, or auto: the best there is")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a picture is read or it is an error; Pillow's doubts are neither
    try:
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        device = best if args.device == "auto" else args.device
        with naming(f"--device {device}"):
            torch.zeros(1, device=device).cpu()
        for option, path, suffix in (("--save-stats", args.save_stats, ".npz"), ("--json", args.json, "")):
            if path and (os.path.isdir(path) or not path.endswith(suffix) or not os.access(os.path.dirname(path) or ".", os.W_OK)):
                raise UserError(f"{option} {path}: give a file {suffix and 'ending in '}{suffix} in a folder that can be written to")
        if args.save_stats and args.pairs or not args.fake and not args.save_stats:
            raise UserError("FAKE is missing (with --save-stats and without --pairs, REAL alone will do)" if not args.fake else
                            "--save-stats does not go with --pairs")
        with torch.inference_mode():
            made = (_pairs if args.pairs else _fid)(args, device)
        if args.json and made:
            write_file(args.json, lambda f: f.write(json.dumps(made, indent=1).encode() + b"\n"))
    except UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
