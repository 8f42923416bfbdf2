"""Scores for generated and reconstructed pictures: FID, PSNR, SSIM, LPIPS. This file works alone.

    python fid.py REAL FAKE                             # folders or .tar; or .npz of mu and sigma
    python fid.py imagenet/ samples/ --resize tf1 --json fid.json
    python fid.py imagenet/ --save-stats imagenet.npz   # once; then: fid.py imagenet.npz samples/
    python fid.py --pairs originals/ reconstructions/   # PSNR, SSIM, LPIPS of equal names

FID (Heusel et al., arXiv 1706.08500) is the Frechet distance of two Gaussians that are fitted to
features of Inception-v3. Scores compare only if the reference, the number of pictures, the resizing
and the weights agree. Letters in shapes: B pictures, C channels, H and W sides, D = 2048 features.

    FID = |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))                               (1)
"""
import argparse
import collections
import contextlib
import hashlib
import io
import json
import math
import os
import sys
import tarfile
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm


class UserError(ValueError):
    """An error that the user can correct. The command line prints it as one line, with status 2.

    tokenizer.py, decoder.py, mixer.py and fid.py each work alone and have a UserError each. They
    share ValueError: code that uses several of the files catches that.
    """

    def __init__(self, text):
        super().__init__(printable(text))


# ---- Inception-v3 (Szegedy et al., arXiv 1512.00567), as converted from TensorFlow's graph of 2015

# TensorFlow does not count the padding in an average.
AVG = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAX = nn.MaxPool2d(3, stride=1, padding=1)
HALF = nn.MaxPool2d(3, stride=2)


def conv(c_in, c_out, kernel=1, stride=1, padding="same"):
    """Convolution, batch norm and ReLU, named as in the published files."""
    layers = collections.OrderedDict()
    layers["conv"] = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    layers["bn"] = nn.BatchNorm2d(c_out, eps=1e-3)
    layers["relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)


class Mixed(nn.ModuleDict):
    """Branches side by side, concatenated over channels: (B,C,H,W) -> (B,sum of theirs,H,W).

    Each branch is a dict {published name: layer}. A layer that two branches share runs once.
    """

    def __init__(self, *branches):
        super().__init__({name: layer for branch in branches for name, layer in branch.items()})
        # Of each branch, the names of its layers.
        self.branches = [list(branch) for branch in branches]

    def forward(self, x):
        outputs = {}
        for branch in self.branches:
            y = x
            for name in branch:
                if name not in outputs:
                    outputs[name] = self[name](y)
                y = outputs[name]
        return torch.cat([outputs[branch[-1]] for branch in self.branches], 1)


def mixed_35(c_in, c_pool):
    """(B,c_in,35,35) -> (B,224+c_pool,35,35). All sides here are those of 299 x 299 pixels."""
    return Mixed(
        dict(branch1x1=conv(c_in, 64)),
        dict(
            branch5x5_1=conv(c_in, 48),
            branch5x5_2=conv(48, 64, 5)),
        dict(
            branch3x3dbl_1=conv(c_in, 64),
            branch3x3dbl_2=conv(64, 96, 3),
            branch3x3dbl_3=conv(96, 96, 3)),
        dict(pool=AVG, branch_pool=conv(c_in, c_pool)))


def mixed_17(c):
    """(B,768,17,17) -> the same. 7 x 7 kernels are a 1 x 7 and a 7 x 1, c channels between."""
    return Mixed(
        dict(branch1x1=conv(768, 192)),
        dict(
            branch7x7_1=conv(768, c),
            branch7x7_2=conv(c, c, (1, 7)),
            branch7x7_3=conv(c, 192, (7, 1))),
        dict(
            branch7x7dbl_1=conv(768, c),
            branch7x7dbl_2=conv(c, c, (7, 1)),
            branch7x7dbl_3=conv(c, c, (1, 7)),
            branch7x7dbl_4=conv(c, c, (7, 1)),
            branch7x7dbl_5=conv(c, 192, (1, 7))),
        dict(pool=AVG, branch_pool=conv(768, 192)))


def mixed_8(c_in, pool):
    """(B,c_in,8,8) -> (B,2048,8,8). Two stems fork into a 1 x 3 and a 3 x 1 kernel each."""
    first = dict(
        branch3x3_1=conv(c_in, 384))
    double = dict(
        branch3x3dbl_1=conv(c_in, 448),
        branch3x3dbl_2=conv(448, 384, 3))
    return Mixed(
        dict(branch1x1=conv(c_in, 320)),
        dict(first, branch3x3_2a=conv(384, 384, (1, 3))),
        dict(first, branch3x3_2b=conv(384, 384, (3, 1))),
        dict(double, branch3x3dbl_3a=conv(384, 384, (1, 3))),
        dict(double, branch3x3dbl_3b=conv(384, 384, (3, 1))),
        dict(pool=pool, branch_pool=conv(c_in, 192)))


class Inception(nn.Sequential):
    """uint8 pictures (B,3,H,W) of any size -> pooled features (B,2048) float32.

    `resize` is "pytorch-fid" (bilinear with a half-pixel shift, values in [-1,1]) or "tf1" (the
    original's and torch-fidelity's: bilinear without a shift, (x - 128) / 128). Raises TypeError
    for another `resize` and for pictures that are not uint8.
    """

    def __init__(self, resize):
        super().__init__()
        self.resize = resize
        self.Conv2d_1a_3x3 = conv(3, 32, 3, 2, 0)       # (B,32,149,149)
        self.Conv2d_2a_3x3 = conv(32, 32, 3, 1, 0)      # (B,32,147,147)
        self.Conv2d_2b_3x3 = conv(32, 64, 3)            # (B,64,147,147)
        self.pool1 = HALF                               # (B,64,73,73)
        self.Conv2d_3b_1x1 = conv(64, 80)               # (B,80,73,73)
        self.Conv2d_4a_3x3 = conv(80, 192, 3, 1, 0)     # (B,192,71,71)
        self.pool2 = HALF                               # (B,192,35,35)
        self.Mixed_5b = mixed_35(192, 32)               # (B,256,35,35)
        self.Mixed_5c = mixed_35(256, 64)               # (B,288,35,35)
        self.Mixed_5d = mixed_35(288, 64)               # (B,288,35,35)
        self.Mixed_6a = Mixed(                          # (B,768,17,17)
            dict(branch3x3=conv(288, 384, 3, 2, 0)),
            dict(
                branch3x3dbl_1=conv(288, 64),
                branch3x3dbl_2=conv(64, 96, 3),
                branch3x3dbl_3=conv(96, 96, 3, 2, 0)),
            dict(pool=HALF))
        self.Mixed_6b = mixed_17(128)                   # (B,768,17,17)
        self.Mixed_6c = mixed_17(160)                   # (B,768,17,17)
        self.Mixed_6d = mixed_17(160)                   # (B,768,17,17)
        self.Mixed_6e = mixed_17(192)                   # (B,768,17,17)
        self.Mixed_7a = Mixed(                          # (B,1280,8,8)
            dict(
                branch3x3_1=conv(768, 192),
                branch3x3_2=conv(192, 320, 3, 2, 0)),
            dict(
                branch7x7x3_1=conv(768, 192),
                branch7x7x3_2=conv(192, 192, (1, 7)),
                branch7x7x3_3=conv(192, 192, (7, 1)),
                branch7x7x3_4=conv(192, 192, 3, 2, 0)),
            dict(pool=HALF))
        self.Mixed_7b = mixed_8(1280, AVG)              # (B,2048,8,8)
        # The graph of 2015 takes a maximum here, where torchvision takes an average.
        self.Mixed_7c = mixed_8(2048, MAX)              # (B,2048,8,8)

    def prepare(self, x):
        """uint8 (B,3,H,W) -> float32 (B,3,299,299). Raises TypeError, see the class."""
        if x.dtype != torch.uint8:
            raise TypeError(f"need uint8 pictures (see to_uint8), not {x.dtype}")

        if self.resize == "pytorch-fid":
            x = F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False)
            return 2 * x - 1                                            # (B,3,299,299)

        if self.resize == "tf1":
            # TensorFlow 1 takes row i of 299 at i H / 299. With a copy of the last row added, 300
            # rows from corner to corner lie at i H / 299, too, and the first 299 are those.
            x = F.pad(x.float(), (0, 1, 0, 1), mode="replicate")        # (B,3,H+1,W+1)
            x = F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)
            return (x[..., :299, :299] - 128) / 128                     # (B,3,299,299)

        raise TypeError(f"resize is 'pytorch-fid' or 'tf1', not {self.resize!r}")

    @torch.no_grad()
    def forward(self, *groups):
        """uint8 (B1,3,H1,W1), (B2,3,H2,W2), ... -> (B1+B2+...,2048) float32, as one batch.

        Each group holds pictures of one size. Autocast and TF32 would move a score: both are off.
        """
        x = torch.cat([self.prepare(group) for group in groups])        # (B,3,299,299)
        with exact(x.device):
            return super().forward(x).mean((2, 3))                      # mean of (B,2048,8,8)


@contextlib.contextmanager
def exact(device):
    """Networks run in whole float32 inside this block, under any autocast and allow_tf32 outside.

    By default a GPU rounds the numbers that enter a convolution to TF32, which has 11 bits.
    """
    with torch.autocast(device.type, enabled=False):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield


# ---- Statistics of features, and the distance of two


def float64(x):
    """A tensor as float64, uint8 scaled to [0,1]; from mps, which has no float64, to the CPU."""
    x = x.detach()
    if x.device.type == "mps":
        x = x.cpu()
    if x.dtype == torch.uint8:
        return x.double() / 255
    return x.double()


class Statistics:
    """Mean and covariance of features, summed in float64 as a stream: any number of pictures fits.

    Call update() with every batch of features; then .n is their number, .mu (D,) the mean and .cov
    (D,D) the covariance, divided by n - 1, both numpy float64. `resize` and `inception` (SHA-256 of
    the weights) say how the features were made, or are None.
    """

    def __init__(self, dims=2048, resize=None, inception=None):
        self.resize = resize
        self.inception = inception

        # With a column of ones beside the features, one product [x 1]^T [x 1] sums all there is to
        # sum: x^T x, x, and 1, whose sum is n.
        self.sums = torch.zeros(dims + 1, dims + 1, dtype=torch.float64)

    def update(self, features):
        """Add features (B,D)."""
        x = F.pad(float64(features), (0, 1), value=1.0)                 # (B,D+1)
        self.sums = self.sums.to(x.device).addmm_(x.T, x)               # (D+1,D+1)

    @property
    def n(self):
        return int(self.sums[-1, -1])

    @property
    def mu(self):
        return (self.sums[-1, :-1] / self.n).cpu().numpy()              # (D,)

    @property
    def cov(self):
        centred = self.sums - self.sums[:, -1:] * self.sums[-1] / self.n
        return (centred[:-1, :-1] / (self.n - 1)).cpu().numpy()         # (D,D)


def frechet_distance(mu1, cov1, mu2, cov2):
    """Eq. 1 for means (D,) and covariances (D,D), also singular ones -> float >= 0.

    With C1 = A A^T, the trace of (C1 C2)^(1/2) is the sum of the roots of the eigenvalues of
    A^T C2 A. That matrix is symmetric, so eigenvalues in float64 are enough, and the root of a
    matrix, which fails where one is singular, is not needed.

    Raises UserError, a ValueError, where sizes differ or a number is NaN or infinite.
    """
    mu1, cov1, mu2, cov2 = [np.asarray(x, np.float64) for x in (mu1, cov1, mu2, cov2)]
    d = len(mu1)
    shapes = [mu1.shape, mu2.shape, cov1.shape, cov2.shape]
    finite = all(np.isfinite(x).all() for x in (mu1, mu2, cov1, cov2))
    if shapes != [(d,), (d,), (d, d), (d, d)] or not finite:
        raise UserError(f"mu and covariance must be finite and of one size, with N > 1: {shapes}")

    # Eigenvalues that are rounding of zero are left out, since a root would lift 1e-16 to 1e-8.
    rounding = d * np.finfo(np.float64).eps

    # torch finds eigenvalues faster than numpy.
    values, vectors = torch.linalg.eigh(torch.tensor(cov1))
    values = values.numpy()                                             # (D,)
    roots = vectors.numpy() * np.sqrt(values.clip(0))                   # (D,D)
    a = roots[:, values > values.max() * rounding]                      # (D, rank of C1)

    values = torch.linalg.eigvalsh(torch.tensor(a.T @ cov2 @ a)).numpy()
    values = values[values > values.max(initial=0) * rounding]
    trace_of_root = np.sqrt(values).sum()

    distance = ((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root
    return max(0.0, float(distance))


def fid(real, fake):
    """FID of two Statistics, or of what read_statistics returns -> float >= 0.

    Warns on stderr where so few pictures bias it: their covariance is then singular. Where a file
    gives no N, the rank of its covariance + 1 stands for it. Raises UserError, a ValueError, where
    the features of the two were made differently.
    """
    for key in ("resize", "inception"):
        known = {getattr(real, key), getattr(fake, key)} - {None}
        if len(known) > 1:
            both = " and ".join(sorted(known))
            raise UserError(f"features do not compare: {key} {both}; use one")

    score = frechet_distance(real.mu, real.cov, fake.mu, fake.cov)

    counts = []
    for side in (real, fake):
        if side.n:
            counts.append(side.n)
        else:
            counts.append(int(np.linalg.matrix_rank(side.cov, hermitian=True)) + 1)
    if min(counts) <= len(real.mu):
        warn(f"biased with N = {counts[0]} and {counts[1]}; take N = {len(real.mu) + 1} or more")
    return score


# ---- Scores of pairs of pictures


def to_uint8(x):
    """[-1,1] -> uint8, rounded as a saved picture is; every score of pictures starts here.

    Raises UserError, a ValueError, where a number is NaN or infinite.
    """
    if not x.isfinite().all():
        raise UserError("the model's pictures hold NaN or infinity; nothing was scored")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB: (B,C,H,W) twice -> (B,) float64; inf where a pair is equal.

    Both are uint8, or both are floats in [0,1].
    """
    error = (float64(a) - float64(b)).square().flatten(1).mean(1)       # (B,)
    return -10 * error.log10()


def ssim(a, b):
    """Structural similarity, mean over channels: (B,C,H,W) twice -> (B,) float64 in [-1,1].

    Both are uint8, or both are floats in [0,1]; sides >= 11. Wang et al. 2004, doi
    10.1109/TIP.2003.819861, with their Gaussian window of 11 x 11 pixels and sigma 1.5.
    """
    a = float64(a)
    b = float64(b)
    offsets = torch.arange(-5.0, 6.0, dtype=torch.float64, device=a.device)
    window = torch.softmax(-offsets**2 / (2 * 1.5**2), 0)               # (11,), of sum 1

    def blur(x):
        x = x.unfold(2, 11, 1) @ window                                 # (B,C,H-10,W)
        return x.unfold(3, 11, 1) @ window                              # (B,C,H-10,W-10)

    mu_a = blur(a)
    mu_b = blur(b)
    var_a = blur(a * a) - mu_a**2
    var_b = blur(b * b) - mu_b**2
    cov = blur(a * b) - mu_a * mu_b

    # The two constants are theirs, (0.01 L)^2 and (0.03 L)^2 with the range L = 1.
    above = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4)
    below = (mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    return (above / below).flatten(1).mean(1)


class LPIPS(nn.Module):
    """Perceptual distance: a, b (B,3,H,W) in [-1,1], sides >= 16 -> (B,) float32, 0 where equal.

    Zhang et al., arXiv 1801.03924, with VGG16 and their heads v0.1. `vgg_path` is torchvision's
    vgg16-397923af.pth, `heads_path` holds lin0 to lin4; .sha256 lists the SHA-256 of both. Raises
    UserError, a ValueError, on wrong files.
    """

    # Outputs of VGG16's convolutions, the last of each size, after their ReLU; and their channels.
    TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}

    def __init__(self, vgg_path, heads_path):
        super().__init__()
        layers = []
        c_in = 3
        for c in (64, 64, "half", 128, 128, "half", 256, 256, 256, "half",
                  512, 512, 512, "half", 512, 512, 512):
            if c == "half":
                layers.append(nn.MaxPool2d(2))
            else:
                layers.append(nn.Conv2d(c_in, c, 3, padding=1))
                layers.append(nn.ReLU())
                c_in = c
        self.vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})

        # The published heads hold a dropout, which does nothing here, before their convolution.
        self.heads = nn.ModuleDict()
        for i, c in enumerate(self.TAPS.values()):
            head = nn.Sequential(nn.Dropout(), nn.Conv2d(c, 1, 1, bias=False))
            self.heads[f"lin{i}"] = nn.ModuleDict({"model": head})

        self.sha256 = [
            load_weights(self.vgg, vgg_path, "torchvision's VGG16", ignore=("classifier.",)),
            load_weights(self.heads, heads_path, "the LPIPS v0.1 heads for VGG")]

        # Mean and deviation of ImageNet's colours, for pictures in [-1,1].
        norm = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("norm", norm.view(2, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        x = (torch.cat([a, b]).float() - self.norm[0]) / self.norm[1]   # (2B,3,H,W)
        heads = list(self.heads.values())
        taps = list(self.TAPS)
        total = 0.0
        with exact(x.device):
            for i, layer in enumerate(self.vgg["features"]):
                x = layer(x)
                if i in taps:
                    # At each pixel, the channels are a vector of length 1.
                    length = x.square().sum(1, keepdim=True).sqrt()     # (2B,1,h,w)
                    unit = x / (length + 1e-10)                         # (2B,C,h,w)
                    difference = unit[: len(a)] - unit[len(a):]         # (B,C,h,w)
                    head = heads[taps.index(i)]["model"]
                    total = total + head(difference.square()).mean((1, 2, 3))
        return total                                                    # (B,)


def pair_scores(real, fake, lpips=None):
    """uint8 (B,3,H,W) twice, sides >= 16 -> (B,3) float64: PSNR in dB, SSIM, LPIPS.

    Without a network `lpips` the third is NaN. Raises ValueError where sizes differ or are smaller.
    """
    if real.shape != fake.shape or min(real.shape[-2:]) < 16:
        sizes = f"{tuple(real.shape[-2:])} and {tuple(fake.shape[-2:])}"
        raise ValueError(f"a pair has one size, 16 x 16 or more, not {sizes}")

    if lpips:
        distance = lpips(real / 127.5 - 1, fake / 127.5 - 1)
    else:
        distance = torch.full((len(real),), math.nan)
    decibels = psnr(real, fake)
    return torch.stack([decibels, ssim(real, fake), float64(distance).to(decibels.device)], 1)


# ==== Nothing about the method below this line: files of weights and pictures, command line ====


# ---- Messages


def printable(text):
    """Any text or path -> text that can be printed: escapes stand for bytes that are not UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def warn(text):
    """One line on stderr, so that scores on stdout stay alone."""
    print(f"fid.py: warning: {printable(text)}", file=sys.stderr)


@contextlib.contextmanager
def naming(what, mend=""):
    """Any exception inside the block becomes UserError(f"{what} (reason){mend}").

    Readers of damaged files raise a dozen kinds of exceptions, which is why all are meant.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # torch's second sentence advises to trust the file.
        reason = " ".join(str(error).split()).split(". ")[0]
        raise UserError(f"{what} ({type(error).__name__}: {reason:.200}){mend}") from error


# ---- Files of weights and of statistics

URLS = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth")


def usual_path(url):
    """Where torch.hub would keep the file of an address."""
    return os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))


INCEPTION, VGG, HEADS = map(usual_path, URLS)


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_weights(module, path, what, ignore=()):
    """Fill `module` from a file's state dict, less the names that begin with one of `ignore`.

    Returns the file's SHA-256. Raises UserError, a ValueError, where the file is missing or wrong.
    """
    # CVE-2025-32434 and CVE-2026-24747: before, a file could run code in spite of weights_only.
    if torch.__version__ < (2, 10):
        raise UserError(f"{path} cannot be read safely by torch {torch.__version__}: "
                        "install torch 2.10 or newer")

    mend = ""
    for url in URLS:
        if url.endswith(os.path.basename(path)):
            mend = f"; get it from {url}"

    with naming(f"{path} is missing, damaged or not {what}", mend):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {name: x for name, x in state.items() if not name.startswith(ignore)}
        module.load_state_dict(state)
    return sha256(path)


def load_inception(path=INCEPTION, resize="pytorch-fid", device="cpu"):
    """Inception with weights from `path`, on `device`; .inception is the SHA-256 of the file.

    Raises UserError, a ValueError, where the file is missing or wrong.
    """
    net = Inception(resize).eval()
    net.inception = load_weights(net, path, "the FID Inception", ignore=("fc.", "AuxLogits."))

    # Batch norm goes into the convolution before it: one pass less over memory.
    for block in list(net.modules()):
        if hasattr(block, "bn"):
            fused = nn.utils.fuse_conv_bn_eval(block.conv.double(), block.bn.double())
            block.conv = fused.float()
            block.bn = nn.Identity()

    # A CPU is faster with channels last.
    layout = torch.channels_last if str(device) == "cpu" else torch.contiguous_format
    return net.to(device, memory_format=layout)


def is_npz(path):
    """Whether a source is a file of statistics, by its suffix."""
    return str(path).lower().endswith(".npz")


def read_statistics(path):
    """An .npz with mu (D,) and sigma (D,D), as pytorch-fid and ADM write it -> .mu, .cov, float64.

    .n, .resize and .inception are there too, None where the file does not say. Returns None where
    `path` is no .npz: it is a source of pictures then. Raises UserError, a ValueError, where an
    .npz cannot be read or holds no mu.
    """
    if not is_npz(path):
        return None

    with naming(f"cannot read {path}"), np.load(path, allow_pickle=False) as file:
        if "mu" not in file:
            raise UserError(f"{path} holds no mu and sigma but {', '.join(file) or 'nothing'}; "
                            "save its pictures as .png files in a folder")
        known = {}
        for key in ("n", "resize", "inception"):
            known[key] = file[key].item() if key in file else None
        mu = file["mu"].astype(np.float64)
        cov = file["sigma"].astype(np.float64)
        return types.SimpleNamespace(mu=mu, cov=cov, **known)


# What torch.save says where a disk is full: first its present format, then the one before 1.6. They
# were found by filling a file system of 1 MiB 1,500 times; what else it says has other reasons.
DISK_FULL = ("unexpected pos", "write(): fd")


def write_file(path, write):
    """Call write(open file) on a temporary file, then rename it: `path` is complete or unchanged.

    Raises UserError, a ValueError, where the disk is full or the path cannot be written. Any other
    error of `write` is passed on.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)

        full = isinstance(error, RuntimeError) and any(words in str(error) for words in DISK_FULL)
        if isinstance(error, OSError) or full:
            # What the system said before torch noticed, where it is known.
            reason = error.__context__ if full and error.__context__ else error
            advice = "make room on the disk or give another path"
            raise UserError(f"{path} cannot be written ({reason}); {advice}") from error
        raise


# ---- Files of pictures: folders and .tar archives

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")

# None that starts another program, as EPS does.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")


def hidden(name):
    """Whether a file or folder of this name is left out: what systems put beside pictures."""
    return name.startswith(".") or name == "__MACOSX"


def is_folder(entry):
    """Whether an entry of os.scandir is a folder or a link to one. A link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def walk_folder(folder, above, seen):
    """Yield (name, place) of the files below a folder, in sorted order. `above` begins every name.

    Links to folders are followed, but each real folder is walked once, under the first name that
    leads to it: `seen` holds those that were. So a link to a folder above itself adds nothing.
    """
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in seen:
        return
    seen.add(identity)

    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda entry: entry.name)
    for entry in entries:
        name = above + entry.name
        if hidden(entry.name):
            continue
        if is_folder(entry):
            yield from walk_folder(entry.path, f"{name}/", seen)
        elif name.lower().endswith(".tar"):
            for member, place in read_tar(entry.path):
                yield f"{name}/{member}", place
        elif entry.is_file(follow_symlinks=False) or entry.is_symlink():
            # Pipes and devices are no files.
            yield name, (entry.path,)


def read_tar(path):
    """walk_folder for a .tar: what it yields for a folder with the same files. Raises UserError."""
    with naming(f"{path} is not a whole .tar", "; get it again"):
        tree = tar_tree(path)
    yield from walk_tar(path, tree, tree, [], set())


def tar_tree(path):
    """The members of a .tar as nested dicts.

    A folder is a dict {name: child}, a file its place (path, offset, size), a link the text of its
    target. Archives that were joined by cat are read one after the other; the last of two members
    with the same name counts, as it does for tar. Raises what tarfile raises, and EOFError where
    the file ends too early or is damaged.
    """
    tree = {}
    start = 0
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        while start < size or size == 0:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    add_member(tree, member, path)
                start = archive.offset

            # tarfile stops without a word at a block that is no header. Zeros must end an archive.
            file.seek(start)
            block = file.read(tarfile.BLOCKSIZE)
            if not block:
                raise EOFError("the empty blocks at its end are missing")
            if block.strip(b"\0"):
                raise EOFError(f"no header at byte {start}")

            # Another archive may begin after the zeros.
            while block and not block.strip(b"\0"):
                start += len(block)
                block = file.read(tarfile.BLOCKSIZE)
    return tree


def add_member(tree, member, path):
    """Put a member of a .tar into the tree. ValueError where its bytes are not in one piece, or
    where its name climbs: without its "..", it could take another member's place."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"{member.name} climbs out of a folder; write it under another name")
    if not parts:
        return
    folder = tree
    for part in parts[:-1]:
        if not isinstance(folder.get(part), dict):
            folder[part] = {}
        folder = folder[part]
    name = parts[-1]

    if member.isdir():
        if not isinstance(folder.get(name), dict):
            folder[name] = {}
    elif member.issym():
        folder[name] = member.linkname
    elif member.islnk():
        # A hard link is a second name of a member before it. Should that be missing, the target's
        # path from the top of the archive stays, and walk_tar names it.
        folder[name] = follow(tree, [], member.linkname) or f"/{member.linkname}"
    elif member.issparse():
        raise ValueError(f"{member.name} is stored with holes; write it without --sparse")
    elif member.isfile():
        folder[name] = (path, member.offset_data, member.size)


def follow(tree, above, target):
    """What a link in the folder `above`, a list of names, leads to in the tree of a .tar.

    Returns a folder or a place; None where the archive does not hold the target.
    """
    here = [tree]
    steps = [*above, *target.split("/")]
    if target.startswith("/"):
        steps = target.split("/")

    # A link may lead through other links. Two that lead to each other never end: 40 are enough.
    links = 0
    while steps:
        step = steps.pop(0)
        if step in ("", "."):
            continue
        if step == "..":
            here = here[:-1]
            if not here:
                return None
            continue
        if not isinstance(here[-1], dict):
            return None
        child = here[-1].get(step)
        if child is None:
            return None
        if isinstance(child, str):
            links += 1
            if links > 40:
                return None
            if child.startswith("/"):
                here = here[:1]
            steps = child.split("/") + steps
        else:
            here.append(child)
    return here[-1]


def walk_tar(path, tree, folder, above, seen):
    """walk_folder for a folder of the tree of a .tar; `above` lists the names that lead to it.

    Raises UserError where a link leads out of the archive: its pictures would be missing.
    """
    if id(folder) in seen:
        return
    seen.add(id(folder))

    for name in sorted(folder):
        if hidden(name):
            continue
        child = folder[name]
        parts = [*above, name]
        if isinstance(child, str):
            child = follow(tree, above, child)
            if child is None:
                raise UserError(f"{path}: {'/'.join(parts)} is a link to {folder[name]}, which is "
                                "not in the archive; write it with tar --dereference")
        if isinstance(child, dict):
            yield from walk_tar(path, tree, child, parts, seen)
        else:
            yield "/".join(parts), child


def files(source):
    """Every file of a folder, of any depth, or of a .tar -> {name: place}, sorted by name.

    A name is a path relative to the source; read_bytes reads a place. The members of a .tar shard
    in a folder count as files of a folder with the shard's name. Links are followed, but each real
    folder is walked once, under the first of its names; hidden files are left out. A folder and a
    .tar of it give the same names. Raises UserError, a ValueError, where there is no source, or one
    that is no folder and no .tar.
    """
    source = os.fspath(source)
    suffix = os.path.splitext(source)[1].lower()
    with naming(f"cannot read {source}"):
        if os.path.isdir(source):
            return dict(sorted(walk_folder(source, "", set())))
        if not os.path.exists(source):
            raise UserError(f"{source}: no such folder or .tar; give one that holds pictures")
        if suffix == ".tar":
            return dict(sorted(read_tar(source)))

    if suffix in (".npy", ".npz"):
        found = "a file of numpy arrays"
        advice = "save its pictures as .png files in a folder"
    elif suffix in SUFFIXES:
        found = "one picture"
        advice = "give the folder around it"
    else:
        found = "a file"
        advice = "unpack a .zip or any other archive into a folder"
    raise UserError(f"{source} is {found}, not a folder or .tar of pictures; {advice}")


def left_out(names):
    """Count names of files() that are no pictures by their suffix -> {suffix: count}, most first.

    For example {".heic": 12, ".txt": 1}; "no suffix" counts those without. Callers print it, see
    listed, so that pictures of an unknown format do not vanish without a word.
    """
    counts = collections.Counter()
    for name in names:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in SUFFIXES:
            counts[suffix or "no suffix"] += 1
    return dict(counts.most_common())


def read_bytes(place):
    """The bytes at a place of files(): of a file, (path,), or of a .tar, (path, offset, size)."""
    path = place[0]
    with open(path, "rb") as file:
        if len(place) == 1:
            return file.read()
        offset, size = place[1:]
        file.seek(offset)
        return file.read(size)


def size(place):
    """The number of bytes at a place of files()."""
    return os.path.getsize(place[0]) if len(place) == 1 else place[2]


def decode(file, pixels=None):
    """A picture's path or open file -> uint8 (H,W,3). Raises what Pillow raises.

    Transparent parts are shown on white; pytorch-fid shows what lies under the transparency. 16-bit
    grey is divided by 257. With `pixels`, the side that is needed in the end, EXIF turns a picture
    upright and a large JPEG is decoded smaller; without, neither is done, as in pytorch-fid.
    """
    with Image.open(file, formats=FORMATS) as image:
        if image.mode == "F":
            raise ValueError("its pixels are floats of unknown range")

        if pixels:
            image.draft("RGB", (pixels, pixels))
            image = ImageOps.exif_transpose(image)

        transparent = "transparency" in image.info

        if image.mode == "I" and image.format == "TIFF":
            raise ValueError("its pixels are 32-bit numbers of unknown range")

        # 16-bit grey, which convert() would clip at 255. One of its values may be transparent.
        if image.mode.startswith("I"):
            grey = np.clip(image, 0, 65535)                             # (H,W)
            if transparent:
                grey = np.where(grey == image.info["transparency"], 65535, grey)
            grey = np.rint(grey / 257).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)                # (H,W,3)

        # A palette or a single colour may be transparent too, not only a fourth channel.
        if transparent or image.mode in ("RGBA", "LA", "PA"):
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        return np.array(image.convert("RGB"))                           # (H,W,3)


def pictures(source):
    """A folder or .tar -> (names, sorted by stem and suffix; read(name) -> uint8 (H,W,3)).

    Both raise UserError, a ValueError: where there are no pictures, and where one is unreadable.
    """
    found = files(source)
    names = [name for name in found if name.lower().endswith(SUFFIXES)]
    if not names:
        others = listed(left_out(found)) or "nothing"
        raise UserError(f"{source} holds no pictures ({' '.join(SUFFIXES)}); it holds {others}")

    def read(name):
        with naming(f"cannot read {name} in {source}"):
            return decode(io.BytesIO(read_bytes(found[name])))

    return sorted(names, key=os.path.splitext), read


def listed(counts):
    """{".heic": 12, ".txt": 1} -> "12 .heic, 1 .txt"."""
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.items())


def tell_left_out(source):
    """Print how many files of a folder or .tar are not scored, if any."""
    counts = left_out(files(source))
    if counts:
        warn(f"{source}: left out {listed(counts)}")


def read_ahead(read, names, wait=64, workers=8):
    """Yield read(name) of each name, in order, while threads read up to `wait` of the next."""
    with ThreadPoolExecutor(workers) as pool:
        ahead = collections.deque()
        for name in names:
            ahead.append(pool.submit(read, name))
            if len(ahead) == wait:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def to_batch(picture, device):
    """uint8 (H,W,3) of numpy -> a batch of one (1,3,H,W) on `device`."""
    return torch.from_numpy(picture).to(device).permute(2, 0, 1)[None]


# ---- The two commands


def measure(source, net, batch=50):
    """Statistics of the Inception features of a folder's or .tar's pictures, or those of an .npz.

    `batch` pictures go through the network `net` at a time. Raises UserError, a ValueError.
    """
    known = read_statistics(source)
    if known:
        return known

    stats = Statistics(2048, net.resize, net.inception)
    device = next(net.parameters()).device
    names, read = pictures(source)
    waiting = []
    with tqdm(total=len(names), desc=printable(source), leave=False, disable=None) as bar:
        for i, picture in enumerate(read_ahead(read, names), 1):
            waiting.append(to_batch(picture, device))
            if len(waiting) == batch or i == len(names):
                stats.update(net(*waiting))                             # (batch,2048)
                bar.update(len(waiting))
                waiting = []
    return stats


def partners(real, fake, names_real, names_fake):
    """Pair the names of two sources -> [(name of real, name of fake)], sorted.

    Equal names are a pair; of the others, those that are equal but for the suffix. Raises
    UserError, a ValueError, where a name is alone, or where two of the others differ in nothing but
    their suffix, so that nobody can say which of them is meant.
    """
    equal = set(names_real) & set(names_fake)
    pairs = [(name, name) for name in equal]

    stems = []
    for source, names in ((real, names_real), (fake, names_fake)):
        by_stem = {}
        for name in names:
            stem = os.path.splitext(name)[0]
            if name in equal:
                continue
            if stem in by_stem:
                raise UserError(f"{source} holds {by_stem[stem]} and {name}, which differ only in "
                                "their suffix, so it is unclear which is meant; take one away")
            by_stem[stem] = name
        stems.append(by_stem)

    of_real, of_fake = stems
    lonely = []
    for stem in sorted(of_real.keys() | of_fake.keys()):
        if stem not in of_fake:
            lonely.append(f"{stem} of {real}")
        elif stem not in of_real:
            lonely.append(f"{stem} of {fake}")
        else:
            pairs.append((of_real[stem], of_fake[stem]))
    if lonely:
        raise UserError(f"{len(lonely)} without a partner: {', '.join(lonely[:5])}; "
                        "names must pair one to one")
    return sorted(pairs)


def load_lpips(vgg, heads, device):
    """LPIPS with weights from two files, on `device`.

    None and a warning where the usual places are meant and hold none: PSNR and SSIM need no
    weights. Raises UserError, a ValueError, where a file that was named is missing, or is wrong.
    """
    missing = [path for path in (vgg, heads) if not os.path.exists(path)]
    if missing and (vgg, heads) == (VGG, HEADS):
        addresses = [url for url in URLS if usual_path(url) in missing]
        warn(f"LPIPS is left out, because its weights are missing: {' and '.join(missing)}; "
             f"get them from {' and '.join(addresses)}, or give --vgg and --lpips")
        return None
    return LPIPS(vgg, heads).to(device)


def score_pairs(real, fake, lpips, device):
    """Records of PSNR, SSIM and LPIPS of the pictures with the same name, see partners.

    `lpips` is (path of VGG16, path of the heads); load_lpips says when there is no record of it.
    Raises UserError, a ValueError.
    """
    names_real, read_real = pictures(real)
    names_fake, read_fake = pictures(fake)
    pairs = partners(real, fake, names_real, names_fake)
    net = load_lpips(*lpips, device)

    def read(pair):
        return read_real(pair[0]), read_fake(pair[1])

    rows = []
    with tqdm(total=len(pairs), desc="pairs", leave=False, disable=None) as bar:
        ahead = read_ahead(read, pairs)
        for name, _ in pairs:
            first, second = next(ahead)
            x = to_batch(first, device)                                 # (1,3,H,W)
            y = to_batch(second, device)                                # (1,3,H,W)
            try:
                rows.append(pair_scores(x, y, net).cpu())
            except ValueError as error:
                raise UserError(f"{name} cannot be scored: {error}") from error
            bar.update()
    scores = torch.cat(rows).numpy()                                    # (N,3)

    # One equal pair has an infinite PSNR and would make the mean infinite. It is left out and told.
    count = len(pairs)
    decibels = scores[:, 0]
    finite = decibels[np.isfinite(decibels)]
    equal = count - len(finite)
    note = None
    if equal and len(finite):
        note = f"mean of {len(finite)} pairs, without {equal} equal ones, whose PSNR is inf"
    elif equal:
        note = "all pairs are equal"

    mean = finite.mean() if len(finite) else math.inf
    records = [
        record("PSNR", mean, real, count, count, note=note),
        record("SSIM", scores[:, 1].mean(), real, count, count)]
    if net:
        distance = scores[:, 2].mean()
        records.append(record("LPIPS", distance, real, count, count, weights=net.sha256))
    return records


def score_fid(args, device):
    """Records of the FID, a list of one, or of none where only --save-stats is asked for.

    Raises UserError, a ValueError.
    """
    sources = [source for source in (args.real, args.fake) if source]

    # What is no statistics must hold pictures: known before a network is loaded.
    unmeasured = [source for source in sources if not read_statistics(source)]
    for source in unmeasured:
        pictures(source)
        tell_left_out(source)

    net = None
    if unmeasured:
        net = load_inception(args.inception, args.resize or "pytorch-fid", device)
    sides = [measure(source, net, args.batch) for source in sources]
    real = sides[0]

    for source, side in zip(sources, sides):
        if args.resize and side.resize and side.resize != args.resize:
            raise UserError(f"features do not compare: {source} was resized as {side.resize}, "
                            f"--resize is {args.resize}; use one")

    if args.save_stats:
        facts = {}
        for key in ("n", "resize", "inception"):
            if getattr(real, key):
                facts[key] = getattr(real, key)
        arrays = {"mu": real.mu, "sigma": real.cov, **facts}
        write_file(args.save_stats, lambda file: np.savez(file, **arrays))

    if not args.fake:
        return []
    fake = sides[1]

    # ADM's references do not say how their pictures were resized: as tf1 does.
    if not args.resize and {real.resize, fake.resize} == {None, "pytorch-fid"}:
        silent = args.real if real.resize is None else args.fake
        warn(f"{silent} does not say how its pictures were resized; the others were resized as "
             "pytorch-fid does; a reference of ADM needs --resize tf1")

    return [record("FID", fid(real, fake), args.real, real.n, fake.n,
                   preprocessing=fake.resize or real.resize,
                   weights=fake.inception or real.inception)]


def record(metric, value, reference, n_real, n_fake, preprocessing=None, weights=None, note=None):
    """Print the line of a score and return the same as a dict for JSON.

    `weights`: SHA-256 of the files of the networks. `note`: what else must be known of the value.
    """
    value = float(value)
    facts = {
        "n_real": n_real or "unknown",
        "n_fake": n_fake or "unknown",
        "note": note,
        "preprocessing": preprocessing,
        "weights_sha256": weights,
        "reference": printable(reference),
        "reference_sha256": sha256(reference) if is_npz(reference) else None,
        "versions": {
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "pillow": Image.__version__}}

    told = [f"{key} {fact}" for key, fact in facts.items() if fact is not None]
    tell("  ".join([f"{metric} {value:.6f}", *told]))

    # JSON has no infinity.
    return {"metric": metric, "value": value if math.isfinite(value) else str(value), **facts}


def tell(line):
    """Print a line. Where nobody reads it, as after `| head`, go on. UserError where it cannot be
    written, as on a full disk."""
    try:
        print(line, flush=True)
    except OSError as error:
        # What print has kept would be written again at the end: it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"standard output: {error.strerror}; give another place") from None


# ---- Command line


def find_device(name):
    """The value of --device -> "cpu", "cuda" or "mps". UserError where torch has no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no such device here; give --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no such device here; give --device cpu")
    return name


def is_out_of_memory(error):
    """Whether an exception says that memory is short. torch has no class for it on a CPU or mps."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("out of memory", "can't allocate memory"))


def positive(text):
    """A whole number above 0. Raises ValueError."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def options():
    """The parser of the command line. It takes no abbreviations and refuses in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        parser.exit(2, f"fid.py: error: {printable(' '.join(message.split()))}\n")

    parser.error = fail
    add = parser.add_argument
    add("real", metavar="REAL",
        help="reference: a folder or .tar of pictures, or an .npz with mu and sigma")
    add("fake", metavar="FAKE", nargs="?",
        help="what is scored, in any of these forms; not needed with --save-stats")
    add("--pairs", action="store_true",
        help="not FID but PSNR, SSIM and, with its weights, LPIPS of pictures with the same name")
    add("--resize", choices=("pytorch-fid", "tf1"),
        help="how pictures come to 299 x 299 pixels: pytorch-fid (default), or tf1 for ADM's files")
    add("--batch", metavar="N", type=positive, default=50,
        help="pictures that go through Inception at a time; changes rounding only (%(default)s)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
        help="auto is cuda where there is one, else cpu; mps is not tested (%(default)s)")
    add("--inception", metavar="FILE", default=INCEPTION,
        help="weights of the FID Inception (%(default)s)")
    add("--vgg", metavar="FILE", default=VGG,
        help="torchvision's VGG16, for LPIPS (%(default)s)")
    add("--lpips", metavar="FILE", default=HEADS,
        help="LPIPS v0.1 heads for VGG (%(default)s)")
    add("--save-stats", metavar="F.npz",
        help="write REAL's mu and sigma, which pytorch-fid reads too")
    add("--json", metavar="F",
        help="write a list of the scores with all that they depend on")
    return parser


def main(argv=None):
    """Scores from the command line."""
    parser = options()
    args = parser.parse_args(argv)
    if "" in (args.real, args.fake):
        parser.error("REAL or FAKE is empty; give the name of a folder, .tar or .npz")
    if args.pairs and args.save_stats:
        parser.error("--save-stats does not go with --pairs")
    if args.save_stats and not is_npz(args.save_stats):
        parser.error(f"--save-stats {args.save_stats}: the name must end in .npz, by which it is "
                     "known as statistics later")
    if not args.fake and not args.save_stats:
        parser.error("give REAL and FAKE; REAL alone goes with --save-stats")

    try:
        device = find_device(args.device)
        if args.pairs:
            for source in (args.real, args.fake):
                tell_left_out(source)
            records = score_pairs(args.real, args.fake, (args.vgg, args.lpips), device)
        else:
            records = score_fid(args, device)
        if args.json:
            text = json.dumps(records, indent=1) + "\n"
            write_file(args.json, lambda file: file.write(text.encode()))
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Pairs are scored one at a time, so that a smaller batch is no remedy there.
        remedies = []
        if args.batch > 1 and not args.pairs:
            remedies.append(f"a --batch below {args.batch}")
        if device != "cpu":
            remedies.append("--device cpu")
        remedy = " or ".join(remedies) or "smaller pictures"
        parser.error(f"out of memory on {device}: give {remedy}")


if __name__ == "__main__":
    main()
