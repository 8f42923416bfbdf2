"""Images -> tokens: a frozen vision transformer whose class-token embedding alone is trained.

    vit = load_encoder("dinov2_vitb14_reg4_pretrain.pth")
    tokenizer = Tokenizer(vit)       # only tokenizer.embedding, 768 numbers, takes a gradient
    z = tokenizer(images)            # (B,3,H,W) in [-1,1] -> (B,1,768)
    loss = flow + 0.1 * cosine_loss(z, tokenizer.z0(images)).mean()      # flow: of decoder.py

RepTok (arXiv 2510.14630), Sec. 3. The file needs torch and the standard library, nothing else.
Letters: B batch, K tokens of an image, R registers, N patches, D width.
"""
import copy
import functools
import gzip
import html
import json
import os
import re
import unicodedata
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# Mean and standard deviation of red, green and blue in [0,1], of the pictures that encoders saw.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class UserError(ValueError):
    """An error that the user can correct: one sentence that names the file or the option.

    tokenizer.py, decoder.py, mixer.py and fid.py each work alone and have a UserError each. They
    share ValueError: code that uses several of the files catches that.
    """


class Attention(nn.Module):
    """Multi-head self-attention, (B,N,D) -> (B,N,D).

    The rows of `qkv` are q, k and v, in this order, and each of them is divided into heads.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, mask=None):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                       # each (B,heads,N,D/heads)
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        x = x.transpose(1, 2).reshape(B, N, D)                     # (B,N,D)
        return self.proj(x)


class MLP(nn.Module):
    """Linear, GELU, Linear; (B,N,D) -> (B,N,D). CLIP's QuickGELU is x * sigmoid(1.702 x)."""

    def __init__(self, width, hidden, quick_gelu):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.quick_gelu = quick_gelu

    def forward(self, x):
        x = self.fc1(x)                                            # (B,N,hidden)
        if self.quick_gelu:
            x = x * torch.sigmoid(1.702 * x)
        else:
            x = F.gelu(x)
        return self.fc2(x)


class LayerScale(nn.Module):
    """DINOv2's factor for each channel (Touvron 2021)."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, (B,N,D) -> (B,N,D)."""

    def __init__(self, width, heads, hidden, eps, layer_scale=False, quick_gelu=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, hidden, quick_gelu)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x, causal=False, mask=None):
        x = x + self.ls1(self.attn(self.norm1(x), causal, mask))
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy 2021), as in DINOv2 (Oquab, Darcet 2023), MAE and CLIP.

    Normalised images (B,3,H,W) -> (B,1+R+N,D): class token, registers, patches. H and W must be
    multiples of `patch`, or UserError, a ValueError, is raised. Its tensors have the names of
    DINOv2's files.

    grid:       the position embedding is made for grid x grid patches
    position:   how it is resized to others: "offset" (DINOv2 without registers), else "size"
    pre_norm:   a LayerNorm before the blocks (CLIP)
    pixels:     the size of the images that it expects; Tokenizer brings them to it
    mean, std:  the statistics of these images in [0,1]; Tokenizer normalises by them
    """

    def __init__(self, width=128, depth=3, heads=4, hidden=None, patch=4, grid=4, registers=0,
                 layer_scale=False, pre_norm=False, quick_gelu=False, patch_bias=True, eps=1e-6,
                 position="size", pixels=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)):
        super().__init__()
        # The arguments, which checkpoints store: ViT(**vit.config) is another one like it.
        self.config = dict(
            width=width, depth=depth, heads=heads, hidden=hidden, patch=patch, grid=grid,
            registers=registers, layer_scale=layer_scale, pre_norm=pre_norm, quick_gelu=quick_gelu,
            patch_bias=patch_bias, eps=eps, position=position, pixels=pixels, mean=mean, std=std)
        self.patch = patch
        self.pixels = pixels
        self.checkpointing = False
        hidden = hidden or 4 * width

        # Dividing into patches and the first linear layer are one convolution.
        proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=patch_bias)
        self.patch_embed = nn.ModuleDict({"proj": proj})

        # Embeddings start at 0.5, not the usual 0.02: with less, a few hundred steps learn nothing.
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, width))
        self.register_tokens = nn.Parameter(0.5 * torch.randn(1, registers, width))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 1 + grid * grid, width))

        self.norm_pre = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden, eps, layer_scale, quick_gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def prefix(self):
        """The learned embeddings in front of the patches: class token, registers; (1,1+R,D)."""
        return torch.cat([self.cls_token, self.register_tokens], dim=1)

    def patch_positions(self, h, w):
        """The position embedding of h x w patches, (1,h*w,D)."""
        n = self.config["grid"]
        if h == w == n:
            return self.pos_embed[:, 1:]
        pos = self.pos_embed[:, 1:].view(1, n, n, -1).permute(0, 3, 1, 2)      # (1,D,n,n)
        if self.config["position"] == "offset":
            # DINOv2 passes the factor (h + 0.1) / n, and interpolation uses it as it is.
            pos = F.interpolate(pos, scale_factor=((h + 0.1) / n, (w + 0.1) / n), mode="bicubic")
        else:
            pos = F.interpolate(pos, size=(h, w), mode="bicubic", antialias=True)
        return pos.flatten(2).mT                                               # (1,h*w,D)

    def forward(self, x, prefix=None):
        """prefix (1,1+R,D): to be read instead of the ViT's own class token and registers."""
        B, _, H, W = x.shape
        P = self.patch
        if H % P or W % P:
            raise UserError(f"images of {H}x{W} pixels cannot be cut into patches of {P}x{P}; "
                            f"give multiples of {P}")
        if prefix is None:
            prefix = self.prefix()

        patches = self.patch_embed.proj(x).flatten(2).mT           # (B,N,D)
        patches = patches + self.patch_positions(H // P, W // P)

        # Registers have no position.
        cls = prefix[:, :1] + self.pos_embed[:, :1]                # (1,1,D)
        registers = prefix[:, 1:]                                  # (1,R,D)
        x = torch.cat([cls.expand(B, -1, -1), registers.expand(B, -1, -1), patches], dim=1)

        x = self.norm_pre(x)                                       # (B,1+R+N,D)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                # The backward pass computes activations again, which saves their memory.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


class Tokenizer(nn.Module):
    """RepTok's encoder E (Sec. 3): a frozen ViT that reads one trained embedding.

    token:     which outputs of the ViT are an image's K tokens: "cls", the class token (K=1, as in
               the paper), "reg", the first register (K=1), or "all", class token and registers
    unfreeze:  what is trained: "token", their embedding (as in the paper), "none", or "all", the
               whole ViT except its own class token and registers, which stay as they were

    Images are in [-1,1]. Others, such as 0 to 255, give wrong tokens, and nothing here notices it.

    Raises UserError, a ValueError, where the ViT lacks the registers that `token` asks for.
    """

    def __init__(self, vit, token="cls", unfreeze="token"):
        super().__init__()
        # The token is the ViT's output at these positions; in the paper, at the class token's.
        self.positions = token_positions(vit, token)
        # The ViT is frozen. The one trained parameter starts as the embedding that it reads there.
        self.vit = vit.requires_grad_(False)
        self.embedding = nn.Parameter(vit.prefix()[:, self.positions].clone())         # (1,K,D)
        self.K, self.width = self.embedding.shape[1:]

        # Two ablations: nothing is trained, or all of the ViT is, and z0 comes from a copy of it.
        self.embedding.requires_grad_(unfreeze != "none")
        self.original = None
        if unfreeze == "all":
            self.original = copy.deepcopy(vit)
            vit.requires_grad_(True)
            vit.cls_token.requires_grad_(False)
            vit.register_tokens.requires_grad_(False)

        self.config = dict(vit=vit.config, token=token, unfreeze=unfreeze)
        mean = torch.tensor(vit.config["mean"]).view(3, 1, 1)
        std = torch.tensor(vit.config["std"]).view(3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images):
        """z = E(x): images (B,3,H,W) in [-1,1], of any size -> tokens (B,K,D).

        The gradient of the flow's loss reaches the trained embedding through here (Eq. 2).
        """
        prefix = self.vit.prefix()                                 # (1,1+R,D), a new tensor
        prefix[:, self.positions] = self.embedding
        z = self.vit(self.normalise(images), prefix)[:, self.positions]
        # Contiguous, that is a copy: the patches' outputs need not stay in memory.
        return z.contiguous()                                      # (B,K,D)

    @torch.no_grad()
    def z0(self, images):
        """The target of Eq. 3: the tokens of the ViT as it was, without gradient.

        Images (B,3,H,W) in [-1,1], of any size -> (B,K,D).
        """
        vit = self.vit if self.original is None else self.original
        return vit(self.normalise(images))[:, self.positions].contiguous()

    def normalise(self, images):
        """(B,3,H,W) in [-1,1] -> what the ViT expects, (B,3,pixels,pixels) normalised."""
        images = (resize(images, self.vit.pixels) + 1) / 2         # in [0,1]
        return (images - self.mean) / self.std


def cosine_loss(z, z0):
    """Eq. 3 without its lambda: 1 - cos(z, z0), the mean over tokens. (B,K,D), (B,K,D) -> (B,)."""
    return 1 - F.cosine_similarity(z.float(), z0.float(), dim=-1).mean(1)


def token_positions(vit, token):
    """Where the K tokens stand among class token and registers, a slice. Raises UserError."""
    registers = vit.register_tokens.shape[1]
    if token not in ("cls", "reg", "all"):
        raise UserError(f"--token {token}: give cls, reg or all")
    if token == "cls":
        return slice(0, 1)
    if not registers:
        raise UserError(f"--token {token}: this encoder has no registers; give cls")
    if token == "reg":
        return slice(1, 2)
    return slice(0, 1 + registers)


def resize(x, size):
    """(B,3,H,W) -> (B,3,size,size): its central square, averaged over blocks, then bilinear."""
    H, W = x.shape[-2:]
    side = min(H, W)
    top = round((H - side) / 2)
    left = round((W - side) / 2)
    x = x[..., top:top + side, left:left + side]                   # (B,3,side,side)
    # The average over the largest whole factor keeps bilinear interpolation from skipping pixels.
    x = F.avg_pool2d(x, max(1, side // size))
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    return x


# ---- A small encoder of one's own, where DINOv2 is not at hand: SimCLR (Chen 2020) on small images


def augment(images, generator):
    """A random view of each image, (B,3,H,W) -> (B,3,H,W): moved a little, its colours rotated."""
    B = len(images)

    def uniform(*shape):
        """Random numbers in [-1,1)."""
        return torch.rand(shape, generator=generator, device=images.device) * 2 - 1

    # Rotation by up to 0.1 radians, scale by up to 5 %, shift by up to 7.5 % of half the side.
    angle = 0.1 * uniform(B)
    scale = 1 + 0.05 * uniform(B)
    cos = scale * angle.cos()
    sin = scale * angle.sin()
    dx = 0.075 * uniform(B)
    dy = 0.075 * uniform(B)
    affine = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(B, 2, 3)
    grid = F.affine_grid(affine, images.shape, align_corners=False)            # (B,H,W,2)
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    # A random orthogonal matrix mixes the colours; then each image gets a gain and an offset.
    normal = torch.randn(B, 3, 3, generator=generator, device=images.device)
    mix, _ = torch.linalg.qr(normal)                                           # (B,3,3)
    x = torch.einsum("bij,bjhw->bihw", mix, x)
    x = x * (1 + 0.3 * uniform(B, 1, 1, 1))
    return x + 0.3 * uniform(B, 3, 1, 1)


def contrastive_loss(a, b, temperature=0.1):
    """NT-Xent (Chen 2020, Eq. 1): embeddings of two views of B images, (B,E), (B,E) -> scalar.

    Each of the 2B rows has to find its partner among the 2B-1 others.
    """
    x = F.normalize(torch.cat([a, b]).float(), dim=1)              # (2B,E)
    logits = x @ x.T / temperature                                 # (2B,2B)
    logits.fill_diagonal_(float("-inf"))
    # Row i and row i + B are views of one image.
    partner = torch.arange(2 * len(a), device=x.device).roll(len(a))
    return F.cross_entropy(logits, partner)


# ---- Below: what serves files and texts. Nothing of the method.


# ---- Reading a weight file: no code in it runs

# The names of .safetensors for types of numbers.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool}


class Inert(dict):
    """Stands for an object of any class that a file names; its pickled state becomes its items.

    A file can make one, with arguments that are ignored, and set its state. Neither runs code.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)

    # Such an object can be a key of a dict, or in a set.
    __hash__ = object.__hash__


def new_dict(*args):
    """Stands for collections.defaultdict, whose items torch sets only in plain dicts."""
    return {}


def read_checkpoint(path):
    """The object in a file of torch.save. Its tensors are mapped: read when they are used.

    torch.load(weights_only=True) calls nothing but its own list of functions that make tensors and
    plain containers, and what the program allows. Here that is a stand-in for each other name in
    the file, so a name such as builtins.eval means Inert. It refuses names of the module os.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise UserError(f"{path}: a TorchScript archive, as OpenAI published CLIP; give CLIP in "
                        "Hugging Face's layout instead (docs/weights.md)")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"{path}: was compressed after torch.save; give the file as it was before")

    # What the rest of the program allows files to name is set aside meanwhile, and then put back.
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        stand_ins = []
        for name in torch.serialization.get_unsafe_globals_in_checkpoint(path):
            stand_in = new_dict if name == "collections.defaultdict" else Inert
            stand_ins.append((stand_in, name))
        torch.serialization.add_safe_globals(stand_ins)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def read_safetensors(path):
    """{name: tensor} of a .safetensors file. The tensors are mapped: read when they are used.

    Such a file holds the length of the header (8 bytes), the header in JSON, then all numbers.
    """
    size = Path(path).stat().st_size
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)      # (size,)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, size)))

    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = DTYPES[entry["dtype"]]
        start = 8 + length + entry["data_offsets"][0]
        end = 8 + length + entry["data_offsets"][1]
        part = data[start:end]
        if start % dtype.itemsize:
            # Numbers that do not start at a multiple of their size have to be copied.
            part = part.clone()
        tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors


def read_file(path):
    """The dict in a weight file or checkpoint; no code of the file runs. Raises UserError."""
    # CVE-2025-32434 and CVE-2026-24747: before, a file could run code in spite of weights_only.
    if torch.__version__ < (2, 10):
        raise UserError(f"{path} cannot be read safely by torch {torch.__version__}: "
                        "install torch 2.10 or newer")
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of a weight file")
    try:
        with open(path, "rb") as file:
            start = file.read(9)
        # The header of .safetensors starts with a brace.
        content = read_safetensors(path) if start[8:] == b"{" else read_checkpoint(path)
        if not isinstance(content, dict):
            raise TypeError("holds no dict")
        return content
    except UserError:
        raise
    except Exception as e:
        # A damaged file can raise anything. torch.load's own messages advise to run its code.
        raise UserError(f"{path}: damaged, or neither .safetensors nor a file of torch.save "
                        f"(torch >= 1.6) that can be read safely ({type(e).__name__}); "
                        "give another") from e


def flatten(node, prefix=""):
    """{dotted name: tensor} of dicts within dicts."""
    found = {}
    for key, value in node.items():
        if isinstance(value, torch.Tensor):
            # Some files hold parameters, which would keep a graph.
            found[f"{prefix}{key}"] = value.detach()
        elif isinstance(value, dict):
            found.update(flatten(value, f"{prefix}{key}."))
    return found


def read_tensors(path):
    """{name: tensor} of a weight file, as it is or below "state_dict" or "model". UserError."""
    return tensors_in(read_file(path))


def tensors_in(content):
    """The same of what `read_file` has read."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    return flatten(content)


def fit(module, tensors, path, what):
    """Load the float tensors of `tensors` into `module`, as float32. Raises UserError.

    They are copied, because the mapped file may change. `module` may be on the meta device.
    """
    floats = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            floats[str(name)] = tensor.to(torch.float32, copy=True)
    try:
        module.load_state_dict(floats, assign=True)
    except RuntimeError as e:
        why = " ".join(str(e).split())[:500]
        raise UserError(f"{path}: not {what}; give another file ({why})") from None
    return module


# ---- Image encoders

# A layout is pairs (part of a name in the file, what replaces it here), applied in this order.
# DINOv2's and MAE's own names are the names here. Of CLIP the files of Hugging Face are read.
CLIP_BLOCK = [
    ("encoder.layers.", "blocks."),
    ("layer_norm1.", "norm1."),
    ("layer_norm2.", "norm2."),
    ("self_attn.q_proj.", "attn.q."),
    ("self_attn.k_proj.", "attn.k."),
    ("self_attn.v_proj.", "attn.v."),
    ("self_attn.out_proj.", "attn.proj.")]
CLIP_IMAGE = [
    ("vision_model.", ""),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    # So spelt in the files.
    ("pre_layrnorm.", "norm_pre."),
    ("post_layernorm.", "norm."),
    *CLIP_BLOCK]
CLIP_TEXT = [
    ("text_model.", ""),
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("final_layer_norm.", "ln_final."),
    *CLIP_BLOCK]
# What else DINOv2's and MAE's files hold: names that start so.
NOT_IMAGE = ("mask_token", "decoder", "head.")


def rename(tensors, layout):
    """{name: tensor} with the names of this file; q, k and v, apart in CLIP's files, are joined."""
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in layout:
            name = name.replace(old, new)
        renamed[name] = tensor

    joined = {}
    for name, tensor in renamed.items():
        if ".attn.q." in name:
            k = renamed[name.replace(".attn.q.", ".attn.k.")]
            v = renamed[name.replace(".attn.q.", ".attn.v.")]
            joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tensor, k, v])
        elif ".attn.k." not in name and ".attn.v." not in name:
            joined[name] = tensor
    return joined


def depth_of(tensors):
    """How many blocks there are."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def heads_of(width):
    """How many heads, which no file stores: each is 64 wide, or 32 where 64 does not divide.

    Raises ValueError where 32 does not divide either.
    """
    wide = 32 if width % 64 else 64
    heads = max(1, width // wide)
    if width % heads:
        raise ValueError(f"width {width} does not divide into heads of 64 or 32")
    return heads


@functools.cache
def say_quick_gelu(path):
    """Say once a file, in the first process, which CLIP is meant: names and shapes do not tell."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: read as OpenAI's CLIP, with QuickGELU (openai/clip-vit-base-patch16 or "
              "-large-patch14); features of other CLIP weights would be wrong by a few percent")


def vit_from(tensors, path):
    """A frozen ViT of the shapes that `tensors` have. Raises UserError.

    DINOv2 and MAE are known by their official names, CLIP by those of Hugging Face.
    """
    what = "an image encoder (DINOv2 or MAE as published, or CLIP in Hugging Face's layout)"
    clip = "vision_model.embeddings.class_embedding" in tensors
    kept = {}
    for name, tensor in tensors.items():
        if clip:
            wanted = name.startswith("vision_model.")
        else:
            wanted = not name.startswith(NOT_IMAGE)
        if wanted:
            kept[name] = tensor

    tensors = kept
    try:
        if clip:
            tensors = rename(tensors, CLIP_IMAGE)
        width = tensors["pos_embed"].shape[-1]
        tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
        tensors["pos_embed"] = tensors["pos_embed"].reshape(1, -1, width)
        tensors.setdefault("register_tokens", torch.zeros(1, 0, width))

        registers = tensors["register_tokens"].shape[1]
        patch = tensors["patch_embed.proj.weight"].shape[3]
        grid = int((tensors["pos_embed"].shape[1] - 1) ** 0.5)
        config = dict(
            width=width, depth=depth_of(tensors), heads=heads_of(width), patch=patch, grid=grid,
            hidden=len(tensors["blocks.0.mlp.fc1.weight"]), registers=registers)
        if clip:
            config.update(pre_norm=True, quick_gelu=True, patch_bias=False, eps=1e-5,
                          pixels=patch * grid, mean=CLIP[0], std=CLIP[1])
        elif "blocks.0.ls1.gamma" in tensors:
            # DINOv2 was trained at 518 pixels; it is used at 224, where it has 16 x 16 patches.
            config.update(layer_scale=True, position="size" if registers else "offset",
                          pixels=patch * 16, mean=IMAGENET[0], std=IMAGENET[1])
        else:
            config.update(pixels=patch * grid, mean=IMAGENET[0], std=IMAGENET[1])
        with torch.device("meta"):
            # The weights of a network on the meta device take no memory; `fit` brings them.
            vit = ViT(**config)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        names = ", ".join(tensors)[:200]
        raise UserError(f"{path}: not {what}; give one "
                        f"(missing or bad: {e}; has {names})") from None
    if clip:
        say_quick_gelu(path)
    return fit(vit, tensors, path, what).requires_grad_(False)


# --encoder takes a path or one of these names.
PUBLISHED = {
    "dinov2_vitb14":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vitb14_reg":
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "mae_vitb16":
        "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth"}


def weight_file(name_or_path):
    """A path as it is; a name of PUBLISHED is downloaded to torch.hub's folder. UserError."""
    if name_or_path not in PUBLISHED or Path(name_or_path).exists():
        return Path(name_or_path)
    url = PUBLISHED[name_or_path]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except (OSError, RuntimeError) as e:
            raise UserError(f"{name_or_path}: not loaded ({e}); put {url} into {path.parent}, "
                            "or give a path") from None
    return path


def load_encoder(path):
    """A frozen ViT by path or name: DINOv2, MAE, CLIP's, or one's own. Raises UserError."""
    path = weight_file(path)
    content = read_file(path)
    if content.get("kind") != "encoder":
        return vit_from(tensors_in(content), path)

    # OUT/encoder.pt of train_stage1.py stores the arguments of its ViT.
    try:
        with torch.device("meta"):
            vit = ViT(**content["config"])
        state = dict(content["state"])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not an encoder of this version ({e}); train it again") from None
    return fit(vit, state, path, "an encoder").requires_grad_(False)


# ---- Text: CLIP's byte-pair tokenizer and transformer (Radford 2021, arXiv 2103.00020)

QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
# A special token, the ending of a contraction, a run of letters, one digit, a run of anything else.
PIECES = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")


class BPE:
    """CLIP's tokenizer: BPE(vocabulary)(B captions) -> ids (B,77), int64: start, text, end, zeros.

    vocabulary: path or bytes of bpe_simple_vocab_16e6.txt.gz, from
    https://github.com/openai/CLIP/tree/main/clip. UserError where it is another file.
    A longer caption is cut and keeps its end; `len(bpe.encode(caption)) > bpe.context` tells.
    """
    context = 77

    def __init__(self, vocabulary):
        self.path = vocabulary
        if isinstance(vocabulary, bytes):
            self.path = "the vocabulary in the checkpoint"

        # Ids 0 to 255 are the bytes, printable ones first. In the file each byte is a character:
        # a printable one itself, the others those from number 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        symbols = [chr(byte) for byte in printable]
        symbols += [chr(256 + i) for i in range(len(others))]
        self.byte = {byte: i for i, byte in enumerate(printable + others)}

        # Ids 256 to 511 are the bytes that end a word, which </w> marks.
        symbols += [symbol + "</w>" for symbol in symbols]
        ids = {symbol: i for i, symbol in enumerate(symbols)}

        # Each further id joins two earlier ones, as a line of the file says.
        self.merges = {}
        try:
            if isinstance(vocabulary, bytes):
                self.file = vocabulary
            else:
                self.file = Path(vocabulary).read_bytes()
            # Of the 262144 lines below the header, CLIP uses 49152 - 256 - 2.
            lines = gzip.decompress(self.file).decode().splitlines()[1:48895]
            for line in lines:
                first, second = line.split()
                ids[first + second] = len(ids)
                self.merges[ids[first], ids[second]] = ids[first + second]
            if not lines or len(ids) != 512 + len(lines):
                raise ValueError("no merges, or one of them twice")
        except Exception as e:
            # A damaged file can raise anything.
            raise UserError(f"{self.path} is not CLIP's bpe_simple_vocab_16e6.txt.gz ({e}); "
                            "get it again") from None

        self.start = len(ids)
        self.end = len(ids) + 1
        # For CLIP, 49408.
        self.size = len(ids) + 2
        # The ids of all words met so far.
        self.words = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}

    def _word(self, word):
        """The ids of one word: of all neighbours, those join that come first in the file."""
        ids = [self.byte[byte] for byte in word.encode(errors="replace")]
        ids[-1] += 256
        while True:
            found = []
            for i in range(len(ids) - 1):
                pair = (ids[i], ids[i + 1])
                if pair in self.merges:
                    found.append((self.merges[pair], i))
            if not found:
                return ids
            joined, i = min(found)
            ids[i:i + 2] = [joined]

    def encode(self, text):
        """All ids of one caption as a list, not cut: start, text, end."""
        # Captions from the web are often escaped twice.
        text = html.unescape(html.unescape(text))
        text = unicodedata.normalize("NFC", text).translate(QUOTES)
        text = " ".join(text.split()).lower()
        ids = [self.start]
        for word in PIECES.findall(text):
            if word not in self.words:
                self.words[word] = self._word(word)
            ids += self.words[word]
        return ids + [self.end]

    def __call__(self, captions):
        rows = torch.zeros(len(captions), self.context, dtype=torch.long)
        for row, caption in zip(rows, captions):
            ids = self.encode(caption)
            ids = ids[:-1][:self.context - 1] + [self.end]
            row[:len(ids)] = torch.tensor(ids)
        return rows


class TextTower(nn.Module):
    """CLIP's causal text transformer, with QuickGELU: ids (B,L), L <= context, -> (B,L,C).

    vocabulary: how many ids there are; out: E, the width of `embed`.
    """

    def __init__(self, vocabulary, context, width, depth, out):
        super().__init__()
        self.config = dict(
            vocabulary=vocabulary, context=context, width=width, depth=depth, out=out)
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        heads = heads_of(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, 4 * width, eps=1e-5, quick_gelu=True) for _ in range(depth))
        self.ln_final = nn.LayerNorm(width, 1e-5)
        self.text_projection = nn.Parameter(torch.zeros(width, out))

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]       # (B,L,C)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.ln_final(x)

    def embed(self, ids):
        """ids (B,L) -> the caption's embedding (B,E), read at its end token."""
        # The end token is the largest id; of several the first one counts.
        end = ids.argmax(-1)                                                           # (B,)
        row = torch.arange(len(ids), device=ids.device)
        return self(ids)[row, end] @ self.text_projection                              # (B,E)


def load_text_encoder(path):
    """The frozen text tower in a CLIP file of Hugging Face's layout. Raises UserError."""
    tensors = {}
    for name, tensor in read_tensors(path).items():
        if name.startswith(("text_model.", "text_projection.")):
            tensors[name] = tensor
    try:
        tensors = rename(tensors, CLIP_TEXT)
        # Theirs is the weight of a linear layer, transposed. Where it is square, no shape tells.
        tensors["text_projection"] = tensors.pop("text_projection.weight").t().contiguous()
        vocabulary, width = tensors["token_embedding.weight"].shape
        context = len(tensors["positional_embedding"])
        out = tensors["text_projection"].shape[1]
        with torch.device("meta"):
            tower = TextTower(vocabulary, context, width, depth_of(tensors), out)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not a CLIP text tower in Hugging Face's layout; give one "
                        f"(missing or bad: {e})") from None
    say_quick_gelu(path)
    return fit(tower, tensors, path, "a CLIP text tower").requires_grad_(False).eval()


class ClipText(nn.Module):
    """CLIP's frozen tower and BPE(vocabulary), with the methods of WordEncoder below.

    Raises UserError where the tower was not made for this vocabulary.
    """

    def __init__(self, tower, vocabulary):
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.bpe = BPE(vocabulary)
        self.split = self.bpe.encode
        self.context = self.bpe.context
        self.width = tower.config["width"]
        if self.bpe.size != tower.config["vocabulary"]:
            raise UserError(f"{self.bpe.path}: a vocabulary of {self.bpe.size}, not the text "
                            "tower's; use CLIP's file")
        # A checkpoint carries the file of the vocabulary along.
        file = torch.tensor([*self.bpe.file], dtype=torch.uint8)
        self.config = dict(tower=tower.config, vocabulary=file)

    def ids(self, captions):
        """Captions -> (B,L) int64, cut after the last end token of all."""
        ids = self.bpe(captions)
        return ids[:, :1 + ids.argmax(1).max()]

    def mask(self, ids):
        """Where the caption stands, up to its end token, (B,L) bool."""
        position = torch.arange(ids.shape[1], device=ids.device)
        return position <= ids.argmax(1, keepdim=True)

    @torch.no_grad()
    def forward(self, ids):
        """ids (B,L) -> features (B,L,C)."""
        return self.tower(ids)


class WordEncoder(nn.Module):
    """A small text encoder over whole words, trained with the Mixer: ids (B,L) -> (B,L,C)."""

    def __init__(self, words, width=64, depth=2, context=24):
        super().__init__()
        self.config = dict(words=list(words), width=width, depth=depth, context=context)
        # 0 is padding, 1 an unknown word.
        self.number = {word: i + 2 for i, word in enumerate(words)}
        self.context = context
        self.width = width
        self.embedding = nn.Embedding(len(words) + 2, width)
        self.position = nn.Parameter(0.5 * torch.randn(context, width))
        heads = heads_of(width)
        self.blocks = nn.ModuleList(
            Block(width, heads, 4 * width, eps=1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def split(caption):
        """Words, numbers and punctuation marks of a caption, in lower case."""
        return re.findall(r"\w+|[^\w\s]", caption.lower())

    def ids(self, captions):
        """Captions, cut after `context` words -> (B,L) int64."""
        rows = []
        for caption in captions:
            words = self.split(caption)[:self.context]
            # A caption without words is one padding, because L must not be 0.
            numbers = [self.number.get(word, 1) for word in words] or [0]
            rows.append(torch.tensor(numbers))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def mask(self, ids):
        """Where words stand, (B,L) bool."""
        return ids > 0

    def forward(self, ids):
        x = self.embedding(ids) + self.position[:ids.shape[1]]     # (B,L,C)
        mask = self.mask(ids)[:, None, None]                       # (B,1,1,L)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.norm(x)
