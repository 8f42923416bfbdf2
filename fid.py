"""Scores for generated and reconstructed pictures: FID, PSNR, SSIM, LPIPS. This file works alone.

    python fid.py REAL FAKE                               # each a folder, a .zip, or an .npz (arr_0 pictures, or mu and sigma)
    python fid.py imagenet/ samples.npz --resize tf1 --json fid.json
    python fid.py imagenet/ --save-stats imagenet.npz     # once; then: python fid.py imagenet.npz samples/
    python fid.py --pairs originals/ reconstructions/     # PSNR, SSIM, LPIPS of pictures with the same name

FID (Heusel et al., arXiv 1706.08500) is the Frechet distance of two Gaussians, fitted to Inception-v3 features of real and of
generated pictures. Two FIDs compare only if reference, number of pictures, preprocessing and weights agree: all are recorded.
Letters in the shape comments: B pictures, H, W height and width, D features (2048).

    FID = |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))                                                   (1)
"""
import argparse
import contextlib
import glob
import hashlib
import importlib.metadata
import io
import itertools
import json
import math
import mmap
import os
import sys
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


class UserError(ValueError):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""


# ---- Inception-v3, as converted from TensorFlow's 2015 graph
AVG = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # TensorFlow does not count the padding
SAME, HALF = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)


def conv(c_in, c_out, kernel=1, stride=1, padding="same"):
    """Convolution, batch norm, ReLU, named as in the published files."""
    layers = {"conv": nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), "bn": nn.BatchNorm2d(c_out, eps=1e-3)}
    return nn.Sequential(OrderedDict(layers, relu=nn.ReLU(inplace=True)))


class Mixed(nn.ModuleDict):
    """Branches side by side, concatenated over channels. A branch is a list of poolings and convolutions (name after "branch",
    channels[, kernel, stride, padding]); a step that comes again is the same layer, so that two branches fork from one stem."""
    def __init__(self, c_in, *branches):
        super().__init__()
        self.branches = branches
        for branch in branches:
            c = c_in
            for name, c_out, *how in (step for step in branch if isinstance(step, tuple)):
                self[f"branch{name}"], c = conv(c, c_out, *how), c_out

    def forward(self, x):
        done = {}
        for branch in self.branches:
            y = x
            for step in branch:
                layer = self[f"branch{step[0]}"] if isinstance(step, tuple) else step
                y = done[step] = done[step] if step in done else layer(y)
        return torch.cat([done[branch[-1]] for branch in self.branches], 1)


class Inception(nn.Sequential):
    """uint8 pictures (B,3,H,W) of any size -> pooled features (B,2048) float32 (Szegedy et al., arXiv 1512.00567).
    `resize` names the preprocessing, and the two do not compare: "pytorch-fid" (half-pixel bilinear without antialias, [-1,1])
    or "tf1" (torch-fidelity and the original TensorFlow: bilinear without the half-pixel shift, (x - 128) / 128)."""
    def __init__(self, resize):
        high, wide, dbl = (7, 1), (1, 7), [("3x3dbl_1", 64), ("3x3dbl_2", 96, 3)]  # a 7 x 7 kernel as 7 x 1 and 1 x 7
        s, t = [("3x3_1", 384)], [("3x3dbl_1", 448), ("3x3dbl_2", 384, 3)]  # stems that fork
        a = lambda c, pool: Mixed(c, [("1x1", 64)], [("5x5_1", 48), ("5x5_2", 64, 5)], [*dbl, ("3x3dbl_3", 96, 3)], [AVG, pool])
        b = lambda c: Mixed(768, [("1x1", 192)], [("7x7_1", c), ("7x7_2", c, wide), ("7x7_3", 192, high)], [("7x7dbl_1", c),
            ("7x7dbl_2", c, high), ("7x7dbl_3", c, wide), ("7x7dbl_4", c, high), ("7x7dbl_5", 192, wide)], [AVG, ("_pool", 192)])
        c = lambda c, pool: Mixed(c, [("1x1", 320)], [*s, ("3x3_2a", 384, (1, 3))], [*s, ("3x3_2b", 384, (3, 1))],
            [*t, ("3x3dbl_3a", 384, (1, 3))], [*t, ("3x3dbl_3b", 384, (3, 1))], [pool, ("_pool", 192)])
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, 3, 2, 0), Conv2d_2a_3x3=conv(32, 32, 3, 1, 0), Conv2d_2b_3x3=conv(32, 64, 3), pool1=HALF,
            Conv2d_3b_1x1=conv(64, 80), Conv2d_4a_3x3=conv(80, 192, 3, 1, 0), pool2=HALF,
            Mixed_5b=a(192, ("_pool", 32)), Mixed_5c=a(256, ("_pool", 64)), Mixed_5d=a(288, ("_pool", 64)),
            Mixed_6a=Mixed(288, [("3x3", 384, 3, 2, 0)], [*dbl, ("3x3dbl_3", 96, 3, 2, 0)], [HALF]),
            Mixed_6b=b(128), Mixed_6c=b(160), Mixed_6d=b(160), Mixed_6e=b(192),
            Mixed_7a=Mixed(768, [("3x3_1", 192), ("3x3_2", 320, 3, 2, 0)], [
                ("7x7x3_1", 192), ("7x7x3_2", 192, wide), ("7x7x3_3", 192, high), ("7x7x3_4", 192, 3, 2, 0)], [HALF]),
            Mixed_7b=c(1280, AVG), Mixed_7c=c(2048, SAME)))  # the 2015 graph max-pools at last, torchvision does not
        self.resize = resize

    def prepare(self, x):
        """uint8 (B,3,H,W) -> float32 (B,3,299,299)."""
        if x.dtype != torch.uint8 or self.resize not in ("pytorch-fid", "tf1"):
            raise TypeError(f"uint8 pictures (to_uint8 makes them) by 'pytorch-fid' or 'tf1', not {x.dtype} by {self.resize!r}")
        if self.resize == "pytorch-fid":
            return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        x = F.pad(x.float(), (0, 1, 0, 1), mode="replicate")  # H + 1 rows to 300, corner to corner: row i is row i H / 299
        return (F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299] - 128) / 128

    @torch.no_grad()
    def forward(self, *groups):
        """Each group holds pictures of one size; all pass as one batch. float32 throughout: autocast and TF32 move a score."""
        with torch.autocast(groups[0].device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return super().forward(torch.cat([self.prepare(g) for g in groups])).mean((2, 3))  # of (B,2048,8,8)


# ---- Statistics and the distance
def float64(x):
    """A tensor as float64; uint8 is scaled to [0,1]."""
    x = (x.cpu() if x.device.type == "mps" else x).detach()  # MPS has no float64
    return x.double() / 255 if x.dtype == torch.uint8 else x.double()


class Statistics:
    """Mean and covariance of features (B,D), as streaming float64 sums: memory does not grow with the number of pictures.
    update() for every batch, reduce() once on every rank; then .n, .mu (D,) and .cov (D,D), numpy, ddof 1, alike on all ranks.
    `resize` and `inception` (the weights' SHA-256) say how the features were made, where known."""
    def __init__(self, dims=2048, resize=None, inception=None):
        self.resize, self.inception = resize, inception
        self.sums = torch.zeros(dims + 1, dims + 1, dtype=torch.float64)    # of [x 1]^T [x 1]: of x^T x, of x and of 1

    def update(self, features):
        """Add a batch (B,D)."""
        x = F.pad(float64(features), (0, 1), value=1.0)                     # (B,D+1)
        self.sums = self.sums.to(x.device).addmm_(x.T, x)

    def reduce(self):
        """Sum over the ranks of torch.distributed, where it is initialised; a second call would count twice."""
        if dist.is_initialized():
            self.sums = self.sums.to("cuda" if dist.get_backend() == "nccl" else "cpu")
            dist.all_reduce(self.sums)
        return self

    n = property(lambda self: int(self.sums[-1, -1]))
    mu = property(lambda self: (self.sums[-1, :-1] / self.n).cpu().numpy())
    cov = property(lambda self: ((self.sums - self.sums[:, -1:] * self.sums[-1] / self.n)[:-1, :-1] / (self.n - 1)).cpu().numpy())


def frechet_distance(mu1, cov1, mu2, cov2):
    """Eq. 1 for means (D,) and covariances (D,D), also singular ones; float64 inside. Raises UserError on unlike sizes or NaN.
    With C1 = A A^T, tr((C1 C2)^(1/2)) is the sum of the roots of the eigenvalues of A^T C2 A, which is symmetric: no matrix
    square root. Eigenvalues that are rounding of zero go before a root lifts 1e-16 to 1e-8, so singular C1 and C2 are exact."""
    mu1, cov1, mu2, cov2 = (np.asarray(v, np.float64) for v in (mu1, cov1, mu2, cov2))
    if not cov1.shape == cov2.shape == 2 * mu1.shape == 2 * mu2.shape or not all(np.isfinite(v).all() for v in (mu1, cov1, mu2, cov2)):
        raise UserError(f"no finite statistics of one size (N > 1): mu {mu1.shape}, {mu2.shape}, covariance {cov1.shape}, {cov2.shape}")
    rounding = len(mu1) * np.finfo(np.float64).eps
    values, vectors = (v.numpy() for v in torch.linalg.eigh(torch.tensor(cov1)))    # torch's are twice as fast as numpy's
    a = (vectors * np.sqrt(values.clip(0)))[:, values > values.max() * rounding]    # (D,rank)
    values = torch.linalg.eigvalsh(torch.tensor(a.T @ cov2 @ a)).numpy()
    roots = np.sqrt(values[values > values.max(initial=0) * rounding]).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * roots))


def compare(real, fake):
    """UserError where two Statistics, or what read_statistics returns, are of features made in different ways."""
    for key in ("resize", "inception"):
        if len(known := {getattr(real, key), getattr(fake, key)} - {None}) > 1:
            raise UserError(f"features of unlike {key} do not compare: {' and '.join(sorted(known))}")


def fid(real, fake):
    """FID of two Statistics, or of what read_statistics returns; warns on stderr where N makes it biased. UserError if not alike."""
    compare(real, fake)
    score, dims = frechet_distance(real.mu, real.cov, fake.mu, fake.cov), len(real.mu)
    n = [s.n or int(np.linalg.matrix_rank(s.cov, hermitian=True)) + 1 for s in (real, fake)]  # a file may not say; rank is N - 1
    if min(n) <= dims:
        print(f"fid.py: warning: biased upwards, N = {n[0]} and {n[1]}: too few below N = {dims + 1} (papers: 50000)", file=sys.stderr)
    return score


def to_uint8(x):
    """[-1,1] -> uint8, rounded as a saved picture is; every score of generated pictures starts here. Raises UserError on NaN."""
    if not x.isfinite().all():
        raise UserError("the model's pictures hold NaN or infinity; nothing was scored")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of each pair: (B,C,H,W), both uint8 or both float in [0,1] -> (B,) float64; equal: inf."""
    return -10 * (float64(a) - float64(b)).square().flatten(1).mean(1).log10()


def ssim(a, b):
    """Structural similarity of each pair: (B,C,H,W), uint8 or float in [0,1], sides >= 11 -> (B,) float64 in [-1,1].
    Wang et al. 2004 (doi 10.1109/TIP.2003.819861): Gaussian window 11, sigma 1.5, population covariance, channels averaged;
    equals scikit-image's structural_similarity(gaussian_weights=True, use_sample_covariance=False, data_range=1)."""
    a, b = float64(a), float64(b)
    window = torch.softmax(-torch.arange(-5.0, 6.0, dtype=torch.float64, device=a.device) ** 2 / (2 * 1.5**2), 0)
    blur = lambda x: (x.unfold(2, 11, 1) @ window).unfold(3, 11, 1) @ window  # (B,C,H,W) -> (B,C,H-10,W-10)
    mu_a, mu_b, c1, c2 = blur(a), blur(b), 0.01**2, 0.03**2
    var_a, var_b, cov = blur(a * a) - mu_a**2, blur(b * b) - mu_b**2, blur(a * b) - mu_a * mu_b
    return ((2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).flatten(1).mean(1)


class LPIPS(nn.Module):
    """Perceptual distance (Zhang et al., arXiv 1801.03924; VGG16, heads v0.1): a, b (B,3,H,W) in [-1,1] -> (B,) float32.
    vgg_path: torchvision's vgg16-397923af.pth; heads_path: lin0..lin4. Sides of at least 16. Raises UserError on wrong files."""
    def __init__(self, vgg_path, heads_path):
        super().__init__()
        c_in, layers = 3, []
        for c in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()] if c else [nn.MaxPool2d(2)]
            c_in = c or c_in
        self.vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})
        self.heads = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": nn.Sequential(nn.Dropout(), nn.Conv2d(c, 1, 1, bias=False))})
                                    for i, c in enumerate((64, 128, 256, 512, 512))})
        self.sha256 = [load_weights(self.vgg, vgg_path, "torchvision's VGG16", ignore=("classifier.",)),
                       load_weights(self.heads, heads_path, "the LPIPS v0.1 heads for VGG")]
        self.register_buffer("norm", torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        x, total, heads = (torch.cat([a, b]).float() - self.norm[0]) / self.norm[1], 0.0, iter(self.heads.values())
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for i, layer in enumerate(self.vgg["features"]):
                x = layer(x)
                if i in (3, 8, 15, 22, 29):  # the last of each size
                    unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)  # (2B,C,h,w), a pixel's channels to length 1
                    total = total + next(heads)["model"]((unit[: len(a)] - unit[len(a):]).square()).mean((1, 2, 3))
        return total


def pair_scores(real, fake, lpips=None):
    """uint8 (B,3,H,W) twice, sides >= 16 -> (B,3) float64: PSNR, SSIM, LPIPS (NaN without one). Average them with Statistics(3)
    over batches and ranks: .update(pair_scores(a, b, lpips)), .reduce(), .mu. ValueError on unlike or smaller sizes."""
    if real.shape != fake.shape or min(real.shape[-2:]) < 16:
        raise ValueError(f"a pair has one size, at least 16 x 16, not {tuple(real.shape[-2:])} and {tuple(fake.shape[-2:])}")
    distance = lpips(real / 127.5 - 1, fake / 127.5 - 1) if lpips else torch.full((len(real),), math.nan)
    return torch.stack([p := psnr(real, fake), ssim(real, fake), distance.to(p)], 1)


# ---- Below: weight files, picture files, the command line; nothing about the method
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth")
INCEPTION, VGG, HEADS = (os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url)) for url in URLS)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # none that starts another program, as EPS does
LARGEST = 2**28  # bytes that one picture or one array may take


@contextlib.contextmanager
def naming(what):
    """Damaged files raise a dozen kinds of exceptions in their readers; each becomes a UserError that begins with `what`."""
    try:
        yield
    except Exception as e:  # its first sentence only: torch's second one advises to trust the file
        raise e if isinstance(e, UserError) else UserError(f"{what}: {' '.join((str(e) or repr(e)).split()).split('. ')[0]:.200}")


def sha256(path):
    """Hex digest of a file; of a folder, that of the lines `<digest>  <name>` of its .tar shards or pictures, as sha256sum prints them."""
    if os.path.isdir(path):
        names = sorted(glob.glob("**/*.tar", root_dir=path, recursive=True)) or pictures(path)[0]
        rows = [f"{sha256(os.path.join(path, n))}  {n}\n" for n in tqdm(names, "SHA-256", leave=False, disable=None)]
        return hashlib.sha256(os.fsencode("".join(rows))).hexdigest()
    with naming(f"cannot read {path}"), open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_weights(module, path, what, ignore=()):
    """Fill `module` from the state dict at `path`, running no code from it; returns the SHA-256. UserError says what is wrong."""
    if torch.__version__ < (2, 6):  # CVE-2025-32434: weights_only ran code before
        raise UserError(f"{path} cannot be read safely by torch {torch.__version__}: install torch 2.6 or newer")
    if not os.path.isfile(path):
        raise UserError(", from ".join([f"{path} is missing: put {what} there", *(u for u in URLS if u.endswith(os.path.basename(path)))]))
    with naming(f"{path} is not {what}, or damaged"):
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as held:  # mapped: no size in the file is believed
            zipped = zipfile.is_zipfile(path)
            state = torch.load(path if zipped else held, map_location="cpu", weights_only=True, mmap=zipped)
        have, want = ({k: v for k, v in s.items() if not k.endswith("num_batches_tracked")} for s in (state, module.state_dict()))
        wrong = [k for k in want if k not in have or have[k].shape != want[k].shape or not have[k].float().isfinite().all()]
        if wrong := wrong + [k for k in have if k not in want and not k.startswith(ignore)]:
            raise ValueError(f"{len(wrong)} names missing, unknown, of another shape or not finite, as {', '.join(wrong[:5])}")
        module.load_state_dict(have, strict=False)
    return sha256(path)


def load_inception(path=INCEPTION, resize="pytorch-fid", device="cpu"):
    """The FID Inception from pytorch-fid's or torch-fidelity's file, as an Inception; UserError on a missing or wrong file."""
    net = Inception(resize).eval()
    net.inception = load_weights(net, path, "the FID Inception", ignore=("fc.", "AuxLogits."))
    for layer in [m for m in net.modules() if hasattr(m, "bn")]:  # batch norm into the convolution: one pass less over memory
        layer.conv, layer.bn = nn.utils.fuse_conv_bn_eval(layer.conv.double(), layer.bn.double()).float(), nn.Identity()
    return net.to(device, memory_format=torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format)


def member(archive, name):
    """A member of a ZipFile -> (stream, header); of an array (.npy), header is (shape, Fortran order, dtype) and the stream is at its
    first byte. No size is believed, nothing unpickled. ValueError on bz2 and lzma, which may unpack to any size in one read."""
    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in an unusual way")
    stream = archive.open(name)
    return stream, name.endswith(".npy") and np.lib.format.read_magic(stream) and np.lib.format.read_array_header_1_0(stream)


def has_statistics(source):
    """Whether source is an .npz with mu and sigma; they win over the pictures that ADM's reference batches also hold."""
    with naming(f"cannot read {source}"):
        return str(source).endswith(".npz") and {"mu.npy", "sigma.npy"} <= set(zipfile.ZipFile(source).namelist())


def read_statistics(path):
    """.npz with mu (D,) and sigma (D,D), pytorch-fid's or ADM's -> .mu, .cov; .n, .resize, .inception where it says, else None."""
    got = {"n": 0, "resize": "", "inception": ""}
    with naming(f"cannot read {path}"), zipfile.ZipFile(path) as archive:
        for name in ["mu", "sigma", *(k for k in got if f"{k}.npy" in archive.namelist())]:
            stream, (shape, _, dtype) = member(archive, f"{name}.npy")
            got[name] = np.frombuffer(stream.read(LARGEST), dtype).reshape(shape)
        mu, cov = got["mu"].astype(np.float64), got["sigma"].astype(np.float64)
        if mu.ndim != 1 or not mu.size or cov.shape != 2 * mu.shape or not (np.isfinite(mu).all() and np.allclose(cov, cov.T)):
            raise ValueError(f"mu {mu.shape} and sigma {cov.shape} are not a finite mean (D,) and a finite symmetric covariance (D,D)")
        return argparse.Namespace(mu=mu, cov=cov, n=int(got["n"]) or None, **{k: str(got[k]) or None for k in ("resize", "inception")})


def decode(file):
    """A picture file -> uint8 (H,W,3), transparency dropped, 16-bit grey divided by 257. ValueError and others if unreadable."""
    with PIL.Image.open(file, formats=FORMATS) as im:
        if im.width * im.height * 3 > LARGEST or im.mode == "F":
            raise ValueError(f"{im.width} x {im.height} in Pillow's mode {im.mode} is more than can be read")
        if im.mode[0] != "I":
            return np.array(im.convert("RGB"))
        return np.repeat(np.rint(np.clip(im, 0, 65535)[..., None] / 257).astype(np.uint8), 3, 2)  # convert() would clip at 255


def pictures(source):
    """A folder (linked folders are not entered), .zip or .npz (arr_0) -> (sorted names, read(name) -> uint8 (H,W,3)), or UserError."""
    with naming(f"cannot read {source}"):
        errors, archive = [], None if os.path.isdir(source) else zipfile.ZipFile(source)
        if archive and str(source).endswith(".npz"):
            stream, (shape, fortran, dtype) = member(archive, "arr_0.npy")
            start, size = stream.tell(), math.prod(shape[1:])
            if dtype != np.uint8 or shape[3:] != (3,) or fortran or not 0 < size <= LARGEST or not 0 < shape[0] <= 2**24:
                raise ValueError(f"arr_0 is {dtype} {shape}; pictures are uint8 (N,H,W,3)")
            at = lambda i: stream.seek(start + i * size) and np.frombuffer(bytearray(stream.read(size)), np.uint8).reshape(shape[1:])
            return [f"{i:08d}" for i in range(shape[0])], lambda name: at(int(name))
        paths = [os.path.join(top, f) for top, _, files in os.walk(source, onerror=errors.append) for f in files]
        names = archive.namelist() if archive else [os.path.relpath(path, source) for path in paths if os.path.isfile(path)]
        names = sorted((n for n in names if n.lower().endswith(SUFFIXES) and "/." not in f"/{n}"), key=os.path.splitext)
        if not names or errors and not archive:
            raise ValueError(errors[0] if names else f"it holds no pictures ({' '.join(SUFFIXES)})")
    return names, lambda name: decode(io.BytesIO(member(archive, name)[0].read(LARGEST)) if archive else os.path.join(source, name))


def images(source, workers=8, rank=0, world=1):
    """Yield (name, uint8 (H,W,3)) of a folder, .zip or .npz; every `world`-th from `rank` on. UserError names what is unreadable."""
    names, read = pictures(source)
    with ThreadPoolExecutor(1 if str(source).endswith(".npz") else workers) as pool:  # an array is read in its order
        for first in range(rank, len(names), 64 * world):
            for name, x in [(n, pool.submit(read, n)) for n in names[first:first + 64 * world:world]]:
                with naming(f"cannot read {name} in {source}"):
                    x = x.result()
                yield name, x


def measure(source, net, batch=50, workers=8):
    """Statistics of the pictures of `source` (under torchrun each rank reads its share), or those that an .npz holds."""
    if has_statistics(source):
        return read_statistics(source)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stats, device = Statistics(2048, net.resize, net.inception), next(net.parameters()).device
    arrays = iter(tqdm(images(source, workers, rank, world), f"{source}", leave=False, disable=rank > 0 or None))
    while chunk := [torch.from_numpy(x).to(device).permute(2, 0, 1)[None] for _, x in itertools.islice(arrays, batch)]:
        stats.update(net(*chunk))
    return stats.reduce()


def record(metric, value, n_real, n_fake, reference, digest, preprocessing=None, weights=None):
    """Print a score's line and return the same as a dict for JSON; `digest` is the SHA-256 of `reference`, `weights` those of the networks."""
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("torch", "numpy", "scipy", "pillow")}
    made = {"metric": metric, "value": value if math.isfinite(value) else str(value), "n_real": n_real or "unknown",
            "n_fake": n_fake or "unknown", "preprocessing": preprocessing, "weights_sha256": weights,
            "reference": f"{reference}", "reference_sha256": digest, "versions": versions}
    print(f"{metric} {value:.6f}", *(f"{k} {v}" for k, v in list(made.items())[2:] if v is not None), sep="  ", flush=True)
    return made


def record_pairs(total, lpips, reference, digest):
    """Records of the means of pair_scores in `total`, a Statistics(3); of LPIPS only where there is an `lpips`."""
    return [record(metric, value, total.n, total.n, reference, digest, weights=net and net.sha256)
            for metric, value, net in zip(("PSNR", "SSIM", "LPIPS"), total.mu.tolist(), (None, None, lpips)) if net or metric != "LPIPS"]


def write_file(path, write):
    """write(binary file) beside `path`, then rename: `path` is whole or as it was. UserError where that is not possible."""
    with naming(f"cannot write {path}"):
        with open(f"{path}.tmp", "wb") as f:
            write(f)
        os.replace(f"{path}.tmp", path)


def pairs(real, fake, lpips, device):
    """Records of PSNR, SSIM and LPIPS of the pictures of two sources that have the same names. UserError names the lonely."""
    a, b = ([os.path.splitext(n)[0] for n in pictures(source)[0]] for source in (real, fake))
    if lonely := [f"{n} of {s}" for s, own, other in ((real, a, b), (fake, b, a)) for n in Counter(own) - Counter(other)]:
        raise UserError(f"{len(lonely)} without a partner: {', '.join(lonely[:5])}")
    lpips, total = LPIPS(*lpips).to(device), Statistics(3)
    for (name, x), (_, y) in tqdm(zip(images(real), images(fake)), "pairs", len(a), leave=False, disable=None):
        with naming(f"{name} cannot be scored"):
            total.update(pair_scores(*(torch.from_numpy(v).to(device).permute(2, 0, 1)[None] for v in (x, y)), lpips))
    return record_pairs(total, lpips, real, sha256(real))


def options(argv=None):
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"fid.py: error: {' '.join(message.split())}\n")
    add = parser.add_argument
    add("real", metavar="REAL", help="reference: a folder (any tree), .zip or .npz of pictures, or an .npz with mu and sigma")
    add("fake", metavar="FAKE", nargs="?", help="what is scored, in any of the same forms; may be left out with --save-stats")
    add("--pairs", action="store_true", help="PSNR, SSIM and LPIPS of pictures with the same name (the suffix may differ), not FID")
    add("--resize", choices=("pytorch-fid", "tf1"), default="pytorch-fid", help="preprocessing; ADM's references were made with tf1")
    add("--inception", metavar="FILE", default=INCEPTION, help="weights of the FID Inception (%(default)s)")
    add("--vgg", metavar="FILE", default=VGG, help="torchvision's VGG16, for LPIPS (%(default)s)")
    add("--lpips", metavar="FILE", default=HEADS, help="LPIPS v0.1 heads for VGG (%(default)s)")
    add("--save-stats", metavar="F.npz", help="write REAL's mu and sigma, which pytorch-fid reads too")
    add("--json", metavar="F", help="write a list of the scores with all that they depend on")
    args = parser.parse_args(argv)
    if args.pairs and args.save_stats or not (args.fake or args.save_stats):
        parser.error("FAKE is missing, or --save-stats stands beside --pairs; only with --save-stats is REAL enough")
    return args, parser.error


def main(argv=None):
    """Scores from the command line."""
    (args, error), device = options(argv), "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if args.pairs:
            made = pairs(args.real, args.fake, (args.vgg, args.lpips), device)
        else:
            sources = [s for s in (args.real, args.fake) if s]
            unmeasured = [s for s in sources if not has_statistics(s) and pictures(s)]  # refuses what it can before the network runs
            net = load_inception(args.inception, args.resize, device) if unmeasured else None
            a, *others = (measure(s, net) for s in sources)
            if args.save_stats:
                facts = {k: getattr(a, k) for k in ("n", "resize", "inception") if getattr(a, k)}
                write_file(args.save_stats, lambda f: np.savez(f, mu=a.mu, sigma=a.cov, **facts))
            made = [record("FID", fid(a, b), a.n, b.n, args.real, sha256(args.real), b.resize or a.resize, b.inception or a.inception) for b in others]
        if args.json:
            write_file(args.json, lambda f: f.write(json.dumps(made, indent=1).encode() + b"\n"))
    except UserError as e:
        error(str(e))


if __name__ == "__main__":
    main()
