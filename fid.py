"""Scores for generated and reconstructed pictures: FID, PSNR, SSIM, LPIPS. This file works alone.

    python fid.py REAL FAKE                               # each a folder, a .tar, or an .npz (arr_0, or mu and sigma)
    python fid.py imagenet/ samples.npz --resize tf1 --json fid.json
    python fid.py imagenet/ --save-stats imagenet.npz     # once; then: python fid.py imagenet.npz samples/
    python fid.py --pairs originals/ reconstructions/     # PSNR, SSIM, LPIPS of pictures with the same name

FID (Heusel et al., arXiv 1706.08500) is the Frechet distance of two Gaussians fitted to Inception-v3 features. Scores
compare only if reference, number of pictures, preprocessing and weights agree. Letters: B pictures, D features (2048).

    FID = |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))                                                 (1)
"""
import argparse
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import sys
import tarfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

class UserError(ValueError):
    """Something the user can put right. The command line prints it as one line and exits with status 2."""

# ---- Inception-v3 (Szegedy et al., arXiv 1512.00567), as converted from TensorFlow's graph of 2015
AVG = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # TensorFlow does not count the padding
MAX = nn.MaxPool2d(3, 1, 1)
HALF = nn.MaxPool2d(3, 2)

def conv(c_in, c_out, kernel=1, stride=1, padding="same"):
    """Convolution, batch norm, ReLU, named as in the published files."""
    layer = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=layer, bn=nn.BatchNorm2d(c_out, eps=1e-3), relu=nn.ReLU(inplace=True)))

class Mixed(nn.ModuleDict):
    """Branches side by side, concatenated over channels; each is {published name: layer}. Shared layers run once."""
    def __init__(self, *branches):
        super().__init__({name: layer for branch in branches for name, layer in branch.items()})
        self.branches = [list(branch) for branch in branches]  # their names

    def forward(self, x):
        outputs = {}
        for branch in self.branches:
            y = x
            for name in branch:
                y = outputs[name] if name in outputs else self[name](y)
                outputs[name] = y
        return torch.cat([outputs[branch[-1]] for branch in self.branches], 1)

def mixed_35(c_in, c_pool):
    """(B,c_in,35,35) -> (B,224+c_pool,35,35). All sides here are those of Inception's own 299 x 299 pixels."""
    return Mixed(
        dict(branch1x1=conv(c_in, 64)),
        dict(branch5x5_1=conv(c_in, 48), branch5x5_2=conv(48, 64, 5)),
        dict(branch3x3dbl_1=conv(c_in, 64), branch3x3dbl_2=conv(64, 96, 3), branch3x3dbl_3=conv(96, 96, 3)),
        dict(pool=AVG, branch_pool=conv(c_in, c_pool)))

def mixed_17(c):
    """(B,768,17,17) -> the same. A 7 x 7 kernel is a 1 x 7 and a 7 x 1 kernel in turn, with c channels between."""
    return Mixed(
        dict(branch1x1=conv(768, 192)),
        dict(branch7x7_1=conv(768, c), branch7x7_2=conv(c, c, (1, 7)), branch7x7_3=conv(c, 192, (7, 1))),
        dict(branch7x7dbl_1=conv(768, c), branch7x7dbl_2=conv(c, c, (7, 1)), branch7x7dbl_3=conv(c, c, (1, 7)),
             branch7x7dbl_4=conv(c, c, (7, 1)), branch7x7dbl_5=conv(c, 192, (1, 7))),
        dict(pool=AVG, branch_pool=conv(768, 192)))

def mixed_8(c_in, pool):
    """(B,c_in,8,8) -> (B,2048,8,8). Two stems fork into a 1 x 3 and a 3 x 1 kernel each."""
    first = dict(branch3x3_1=conv(c_in, 384))
    double = dict(branch3x3dbl_1=conv(c_in, 448), branch3x3dbl_2=conv(448, 384, 3))
    return Mixed(
        dict(branch1x1=conv(c_in, 320)),
        dict(first, branch3x3_2a=conv(384, 384, (1, 3))),
        dict(first, branch3x3_2b=conv(384, 384, (3, 1))),
        dict(double, branch3x3dbl_3a=conv(384, 384, (1, 3))),
        dict(double, branch3x3dbl_3b=conv(384, 384, (3, 1))),
        dict(pool=pool, branch_pool=conv(c_in, 192)))

class Inception(nn.Sequential):
    """uint8 pictures (B,3,H,W) of any size -> pooled features (B,2048) float32. `resize` is "pytorch-fid" (bilinear
    with a half-pixel shift, [-1,1]) or "tf1" (torch-fidelity and the original: no shift, (x - 128) / 128)."""
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
            dict(branch3x3dbl_1=conv(288, 64), branch3x3dbl_2=conv(64, 96, 3), branch3x3dbl_3=conv(96, 96, 3, 2, 0)),
            dict(pool=HALF))
        self.Mixed_6b = mixed_17(128)
        self.Mixed_6c = mixed_17(160)
        self.Mixed_6d = mixed_17(160)
        self.Mixed_6e = mixed_17(192)
        self.Mixed_7a = Mixed(                          # (B,1280,8,8)
            dict(branch3x3_1=conv(768, 192), branch3x3_2=conv(192, 320, 3, 2, 0)),
            dict(branch7x7x3_1=conv(768, 192), branch7x7x3_2=conv(192, 192, (1, 7)),
                 branch7x7x3_3=conv(192, 192, (7, 1)), branch7x7x3_4=conv(192, 192, 3, 2, 0)),
            dict(pool=HALF))
        self.Mixed_7b = mixed_8(1280, AVG)              # (B,2048,8,8)
        self.Mixed_7c = mixed_8(2048, MAX)              # the graph of 2015 has a maximum here, torchvision an average

    def prepare(self, x):
        """uint8 (B,3,H,W) -> float32 (B,3,299,299)."""
        if x.dtype != torch.uint8 or self.resize not in ("pytorch-fid", "tf1"):
            raise TypeError(f"need uint8 (to_uint8) and 'pytorch-fid' or 'tf1', not {x.dtype}, {self.resize!r}")
        if self.resize == "pytorch-fid":
            return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        x = F.pad(x.float(), (0, 1, 0, 1), mode="replicate")    # H + 1 rows to 300: row i is taken at i H / 299
        return (F.interpolate(x, (300, 300), mode="bilinear", align_corners=True)[..., :299, :299] - 128) / 128

    @torch.no_grad()
    def forward(self, *groups):
        """Each group holds pictures of one size; all pass as one batch. Autocast and TF32 would move a score."""
        x = torch.cat([self.prepare(group) for group in groups])
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return super().forward(x).mean((2, 3))              # mean of (B,2048,8,8)

# ---- Statistics and the distance
def float64(x):
    """A tensor as float64; uint8 is scaled to [0,1]."""
    return x.detach().double() / (255 if x.dtype == torch.uint8 else 1)

class Statistics:
    """Running float64 sums: update() with every batch of features (B,D); then .n, .mu (D,) and .cov (D,D), divided by
    n - 1, in numpy. `resize` and `inception` (the weights' SHA-256) say how the features were made, where known."""
    def __init__(self, dims=2048, resize=None, inception=None):
        self.resize = resize
        self.inception = inception
        self.sums = torch.zeros(dims + 1, dims + 1, dtype=torch.float64)    # of [x 1]^T [x 1]: of x^T x, of x and of 1

    def update(self, features):
        x = F.pad(float64(features), (0, 1), value=1.0)                     # (B,D+1)
        self.sums = self.sums.to(x.device).addmm_(x.T, x)

    n = property(lambda self: int(self.sums[-1, -1]))
    mu = property(lambda self: (self.sums[-1, :-1] / self.n).cpu().numpy())

    @property
    def cov(self):
        centred = self.sums - self.sums[:, -1:] * self.sums[-1] / self.n
        return (centred[:-1, :-1] / (self.n - 1)).cpu().numpy()

def frechet_distance(mu1, cov1, mu2, cov2):
    """Eq. 1 for means (D,) and covariances (D,D), also singular ones; float64. Raises UserError on unlike sizes or NaN.
    With C1 = A A^T, tr((C1 C2)^(1/2)) is the sum of the roots of the eigenvalues of A^T C2 A, which is symmetric: no
    root of a matrix is needed. Eigenvalues that are rounding of zero are left out: a root would lift 1e-16 to 1e-8."""
    mu1, cov1, mu2, cov2 = (np.asarray(x, np.float64) for x in (mu1, cov1, mu2, cov2))
    shapes = [x.shape for x in (mu1, mu2, cov1, cov2)]
    if shapes != [mu1.shape] * 2 + [2 * mu1.shape] * 2 or not all(np.isfinite(x).all() for x in (mu1, mu2, cov1, cov2)):
        raise UserError(f"mu and covariance must be finite and of one size, with N > 1: {shapes}")
    rounding = len(mu1) * np.finfo(np.float64).eps
    values, vectors = (x.numpy() for x in torch.linalg.eigh(torch.tensor(cov1)))    # twice as fast as numpy's
    a = (vectors * np.sqrt(values.clip(0)))[:, values > values.max() * rounding]    # (D,rank of C1)
    values = torch.linalg.eigvalsh(torch.tensor(a.T @ cov2 @ a)).numpy()
    trace_of_root = np.sqrt(values[values > values.max(initial=0) * rounding]).sum()
    return max(0.0, float(((mu1 - mu2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root))

def fid(real, fake):
    """FID of two Statistics, or of what read_statistics returns. UserError where their features were made differently.
    Warns on stderr if too few pictures bias FID. If a file gives no N, the covariance's rank + 1 is used."""
    for key in ("resize", "inception"):
        known = {getattr(real, key), getattr(fake, key)} - {None}
        if len(known) > 1:
            raise UserError(f"features do not compare: {key} {' and '.join(sorted(known))}; use one")
    score = frechet_distance(real.mu, real.cov, fake.mu, fake.cov)
    n, m = (side.n or int(np.linalg.matrix_rank(side.cov, hermitian=True)) + 1 for side in (real, fake))
    if min(n, m) <= len(real.mu):
        print(f"fid.py: warning: biased with N = {n} and {m}; take N = {len(real.mu) + 1} or more", file=sys.stderr)
    return score

def to_uint8(x):
    """[-1,1] -> uint8, rounded as a saved picture is; every score of pictures starts here. UserError on NaN."""
    if not x.isfinite().all():
        raise UserError("the model's pictures hold NaN or infinity; nothing was scored")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)

def psnr(a, b):
    """Peak signal-to-noise ratio in dB: (B,C,H,W), both uint8 or both float in [0,1] -> (B,) float64; inf if equal."""
    return -10 * (float64(a) - float64(b)).square().flatten(1).mean(1).log10()

def ssim(a, b):
    """Structural similarity (Wang et al. 2004, doi 10.1109/TIP.2003.819861; Gaussian window 11, sigma 1.5), mean over
    channels: (B,C,H,W), uint8 or float in [0,1], sides >= 11 -> (B,) float64 in [-1,1]."""
    a = float64(a)
    b = float64(b)
    window = torch.softmax(-torch.arange(-5.0, 6.0, dtype=torch.float64, device=a.device)**2 / (2 * 1.5**2), 0)
    def blur(x):
        return (x.unfold(2, 11, 1) @ window).unfold(3, 11, 1) @ window  # (B,C,H,W) -> (B,C,H-10,W-10)
    mu_a = blur(a)
    mu_b = blur(b)
    var_a = blur(a * a) - mu_a**2
    var_b = blur(b * b) - mu_b**2
    cov = blur(a * b) - mu_a * mu_b
    score = (2 * mu_a * mu_b + 1e-4) * (2 * cov + 9e-4) / ((mu_a**2 + mu_b**2 + 1e-4) * (var_a + var_b + 9e-4))
    return score.flatten(1).mean(1)

class LPIPS(nn.Module):
    """Perceptual distance (Zhang et al., arXiv 1801.03924; VGG16, heads v0.1): a, b (B,3,H,W) in [-1,1], sides >= 16
    -> (B,) float32. vgg_path: torchvision's vgg16-397923af.pth; heads_path: lin0..lin4. UserError on wrong files."""
    def __init__(self, vgg_path, heads_path):
        super().__init__()
        layers = []
        c_in = 3
        for c in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512):  # 0: a pooling
            layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()] if c else [nn.MaxPool2d(2)]
            c_in = c or c_in
        self.vgg = nn.ModuleDict({"features": nn.Sequential(*layers)})
        heads = [nn.Sequential(nn.Dropout(), nn.Conv2d(c, 1, 1, bias=False)) for c in (64, 128, 256, 512, 512)]
        self.heads = nn.ModuleDict({f"lin{i}": nn.ModuleDict({"model": head}) for i, head in enumerate(heads)})
        self.sha256 = [load_weights(self.vgg, vgg_path, "torchvision's VGG16", ignore=("classifier.",)),
                       load_weights(self.heads, heads_path, "the LPIPS v0.1 heads for VGG")]
        self.register_buffer("norm", torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, a, b):
        x = (torch.cat([a, b]).float() - self.norm[0]) / self.norm[1]  # (2B,3,H,W), mean and deviation of ImageNet
        heads = iter(self.heads.values())
        total = 0.0
        with torch.autocast(x.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for i, layer in enumerate(self.vgg["features"]):
                x = layer(x)
                if i in (3, 8, 15, 22, 29):  # the last of each size
                    normed = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)  # (2B,C,h,w), length 1 at each pixel
                    difference = normed[: len(a)] - normed[len(a):]                # (B,C,h,w)
                    total = total + next(heads)["model"](difference.square()).mean((1, 2, 3))
        return total

def pair_scores(real, fake, lpips=None):
    """uint8 (B,3,H,W) twice, sides >= 16 -> (B,3) float64: PSNR, SSIM, LPIPS (NaN without `lpips`). ValueError."""
    if real.shape != fake.shape or min(real.shape[-2:]) < 16:
        raise ValueError(f"a pair has one size, 16 x 16 or more, not {(*real.shape[-2:],)} and {(*fake.shape[-2:],)}")
    distance = lpips(real / 127.5 - 1, fake / 127.5 - 1) if lpips else torch.full((len(real),), math.nan)
    return torch.stack([psnr(real, fake), ssim(real, fake), distance.to(real.device, torch.float64)], 1)

# ---- Below: weight files, picture files, the command line; nothing about the method
URLS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth")
INCEPTION, VGG, HEADS = (os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url)) for url in URLS)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # none that starts another program, as EPS does

@contextlib.contextmanager
def naming(what, mend=""):
    """Readers of damaged files raise a dozen kinds of exceptions; each becomes UserError(f"{what} (reason){mend}")."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0]  # torch's second sentence advises to trust the file
        raise UserError(f"{what} ({type(error).__name__}: {reason:.200}){mend}") from error

def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()

def load_weights(module, path, what, ignore=()):
    """Fill `module` from a file's state dict, less names that begin with one of `ignore` -> its SHA-256. UserError."""
    if torch.__version__ < (2, 6):  # CVE-2025-32434: weights_only ran code before
        raise UserError(f"{path} cannot be read safely by torch {torch.__version__}: install torch 2.6 or newer")
    addresses = [f"; get it from {url}" for url in URLS if url.endswith(os.path.basename(path))]
    with naming(f"{path} is missing, damaged or not {what}", "".join(addresses)):
        state = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict({name: x for name, x in state.items() if not name.startswith(ignore)})
    return sha256(path)

def load_inception(path=INCEPTION, resize="pytorch-fid", device="cpu"):
    """Inception with weights from `path`; .inception is their SHA-256. Channels last on the CPU: faster. UserError."""
    net = Inception(resize).eval()
    net.inception = load_weights(net, path, "the FID Inception", ignore=("fc.", "AuxLogits."))
    for block in list(net.modules()):
        if hasattr(block, "bn"):  # batch norm into the convolution: one pass less over memory
            block.conv = nn.utils.fuse_conv_bn_eval(block.conv.double(), block.bn.double()).float()
            block.bn = nn.Identity()
    return net.to(device, memory_format=torch.channels_last if str(device) == "cpu" else torch.contiguous_format)

def read_statistics(path):
    """An .npz with mu (D,) and sigma (D,D), as pytorch-fid and ADM write it -> .mu, .cov; .n, .resize, .inception where
    it says, else None. Returns None where `path` is another source or holds no mu: then the source is pictures."""
    if str(path).endswith(".npz"):
        with naming(f"cannot read {path}"), np.load(path, allow_pickle=False) as f:
            if "mu" in f:  # ADM's references hold pictures too; mu and sigma win
                known = {key: f[key].item() if key in f else None for key in ("n", "resize", "inception")}
                return argparse.Namespace(mu=f["mu"].astype(np.float64), cov=f["sigma"].astype(np.float64), **known)
    return None

def tar_members(path, prefix=""):
    """Yield (name, (path, offset, size)) of the files in a .tar, so that any of them can be read at once."""
    with naming(f"{path} is not a whole .tar", "; get it again"), tarfile.open(path, "r:") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and "/." not in f"/{name}" and "__MACOSX/" not in name:
                yield prefix + name, (path, member.offset_data, member.size)
        if archive.offset + tarfile.BLOCKSIZE > os.path.getsize(path):
            raise EOFError("the empty blocks at its end are missing")

def files(source):
    """Every file of a folder (any tree, with the members of the .tar shards in it) or of a .tar -> {name: place} sorted
    by name; read_bytes reads a place. Links are followed, hidden files left out. UserError where there is no source."""
    def stop(error):
        raise error
    top = os.path.join(source, "")
    found = {}
    with naming(f"cannot read {source}"):
        if os.path.isdir(source):
            for folder, folders, names in os.walk(top, onerror=stop, followlinks=True):
                folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
                for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
                    name = path[len(top):]
                    found.update(tar_members(path, f"{name}/") if name.endswith(".tar") else {name: (path,)})
        elif str(source).endswith(".tar"):
            found.update(tar_members(source))
        else:
            raise UserError(f"{source}: no such folder or .tar; unpack a .zip or any other archive")
    return dict(sorted(found.items()))

def read_bytes(place):
    """The bytes at a place of files(): a whole file, (path,), or a member of a .tar, (path, offset, size)."""
    path, offset, size = (*place, 0, -1)[:3]
    with open(path, "rb") as f:
        f.seek(offset)
        return f.read(size)

def decode(file, pixels=None):
    """A picture's path or open file -> uint8 (H,W,3); 16-bit grey is divided by 257. Raises what Pillow raises. With
    `pixels`, the final side, EXIF rotates it and a large JPEG is decoded smaller; pytorch-fid does neither."""
    with Image.open(file, formats=FORMATS) as image:
        if image.mode == "F":
            raise ValueError("its pixels are floats of unknown range")
        if pixels:
            image.draft("RGB", (pixels, pixels))
            image = ImageOps.exif_transpose(image)
        if image.mode[0] == "I":  # 16-bit grey, which convert() would clip at 255
            image = Image.fromarray(np.rint(np.clip(image, 0, 65535) / 257).astype(np.uint8))
        return np.array(image.convert("RGB"))

def pictures(source):
    """A folder, a .tar or an .npz (arr_0) -> (names, sorted, read(name) -> uint8 (H,W,3)). Both raise UserError."""
    if str(source).endswith(".npz"):
        with naming(f"cannot read {source}"), np.load(source, allow_pickle=False) as archive:
            array = archive["arr_0"]
        if array.dtype != np.uint8 or array.shape[3:] != (3,) or not array.size:
            raise UserError(f"{source}: arr_0 is {array.dtype} {array.shape}; pictures are uint8 (N,H,W,3)")
        return [f"{i:08d}" for i in range(len(array))], lambda name: array[int(name)]
    places = {name: place for name, place in files(source).items() if name.lower().endswith(SUFFIXES)}
    if not places:
        raise UserError(f"{source} holds no pictures ({' '.join(SUFFIXES)})")
    def read(name):
        with naming(f"cannot read {name} in {source}"):
            return decode(io.BytesIO(read_bytes(places[name])))
    return sorted(places, key=os.path.splitext), read

def images(source, workers=8):
    """Yield (name, uint8 (H,W,3)) of a folder, a .tar or an .npz. UserError names what is unreadable."""
    names, read = pictures(source)
    with ThreadPoolExecutor(workers) as pool:
        for i in range(0, len(names), 64):  # no more than 64 pictures wait in memory
            yield from zip(names[i: i + 64], pool.map(read, names[i: i + 64]))

def measure(source, net, batch=50, workers=8):
    """Statistics of the Inception features of the pictures of `source`, or those that an .npz holds."""
    known = read_statistics(source)
    if known:
        return known
    stats = Statistics(2048, net.resize, net.inception)
    device = next(net.parameters()).device
    arrays = (x for _, x in tqdm(images(source, workers), str(source), leave=False, disable=None))
    for chunk in iter(lambda: list(itertools.islice(arrays, batch)), []):
        stats.update(net(*(torch.from_numpy(x).to(device).permute(2, 0, 1)[None] for x in chunk)))
    return stats

def record(metric, value, reference, n_real, n_fake, preprocessing=None, weights=None):
    """Print a score's line and return the same as a dict for JSON. `weights`: SHA-256 of the networks' files."""
    facts = {"n_real": n_real or "unknown", "n_fake": n_fake or "unknown", "preprocessing": preprocessing,
             "weights_sha256": weights, "reference": str(reference),
             "reference_sha256": sha256(reference) if str(reference).endswith(".npz") else None,
             "versions": {"torch": str(torch.__version__), "numpy": np.__version__, "pillow": Image.__version__}}
    print(f"{metric} {value:.6f}", *(f"{key} {fact}" for key, fact in facts.items() if fact is not None), sep="  ")
    return {"metric": metric, "value": value if math.isfinite(value) else str(value), **facts}

def write_file(path, write):
    """Write a temporary file, then rename it: `path` is complete or unchanged. UserError where that fails."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            write(f)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save may raise either on a full disk
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise UserError(f"{path} cannot be written ({error}); make room on the disk or give another path") from error

def pairs(real, fake, lpips, device):
    """Records of PSNR, SSIM and LPIPS of pictures with the same name but for the suffix. UserError if one is alone."""
    a, b = ([os.path.splitext(name)[0] for name in pictures(source)[0]] for source in (real, fake))
    lonely = [f"{name} of {real if name in a else fake}" for name in sorted(set(a) ^ set(b))]
    if lonely or len(a) != len(b):
        raise UserError(f"{len(lonely)} without a partner: {', '.join(lonely[:5])}; names must pair one to one")
    net = LPIPS(*lpips).to(device)
    total = Statistics(3)
    for (name, x), (_, y) in tqdm(zip(images(real), images(fake)), "pairs", len(a), leave=False, disable=None):
        pair = [torch.from_numpy(image).to(device).permute(2, 0, 1)[None] for image in (x, y)]  # each (1,3,H,W)
        with naming(f"{name} cannot be scored"):
            total.update(pair_scores(*pair, net))
    rows = zip(("PSNR", "SSIM", "LPIPS"), total.mu.tolist(), (None, None, net.sha256))
    return [record(metric, value, real, total.n, total.n, weights=weights) for metric, value, weights in rows]

def main(argv=None):
    """Scores from the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=form)
    def fail(message):
        parser.exit(2, f"fid.py: error: {' '.join(message.split())}\n")
    parser.error = fail
    add = parser.add_argument
    add("real", metavar="REAL", help="reference: a folder, .tar or .npz (arr_0) of pictures, or .npz with mu and sigma")
    add("fake", metavar="FAKE", nargs="?", help="what is scored, in any of these forms; not needed with --save-stats")
    add("--pairs", action="store_true", help="not FID but PSNR, SSIM and LPIPS of pictures with the same name")
    add("--resize", choices=("pytorch-fid", "tf1"), default="pytorch-fid", help="tf1 for ADM's files (%(default)s)")
    add("--inception", metavar="FILE", default=INCEPTION, help="weights of the FID Inception (%(default)s)")
    add("--vgg", metavar="FILE", default=VGG, help="torchvision's VGG16, for LPIPS (%(default)s)")
    add("--lpips", metavar="FILE", default=HEADS, help="LPIPS v0.1 heads for VGG (%(default)s)")
    add("--save-stats", metavar="F.npz", help="write REAL's mu and sigma, which pytorch-fid reads too")
    add("--json", metavar="F", help="write a list of the scores with all that they depend on")
    args = parser.parse_args(argv)
    if args.pairs and args.save_stats or not (args.fake or args.save_stats):
        fail("give REAL and FAKE; REAL alone goes with --save-stats, and --save-stats does not go with --pairs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if args.pairs:
            records = pairs(args.real, args.fake, (args.vgg, args.lpips), device)
        else:
            sources = [source for source in (args.real, args.fake) if source]
            unmeasured = [source for source in sources if not read_statistics(source) and pictures(source)]
            net = load_inception(args.inception, args.resize, device) if unmeasured else None
            real, *fakes = (measure(source, net) for source in sources)
            if args.save_stats:
                facts = {key: getattr(real, key) for key in ("n", "resize", "inception") if getattr(real, key)}
                write_file(args.save_stats, lambda f: np.savez(f, mu=real.mu, sigma=real.cov, **facts))
            records = [record("FID", fid(real, fake), args.real, real.n, fake.n, fake.resize or real.resize,
                              fake.inception or real.inception) for fake in fakes]
        if args.json:
            write_file(args.json, lambda f: f.write(json.dumps(records, indent=1).encode() + b"\n"))
    except UserError as error:
        fail(str(error))

if __name__ == "__main__":
    main()
