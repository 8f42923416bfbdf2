"""Images -> tokens: a frozen vision transformer of which only the token embedding is trained (RepTok, arXiv 2510.14630).

    vit = load_encoder("dinov2_vitb14_reg4_pretrain.pth")
    tokenizer = Tokenizer(vit)                       # only tokenizer.embedding, 768 numbers, takes a gradient
    z = tokenizer(images)                            # (B,3,H,W) in [-1,1] -> (B,1,768)
    loss = 0.1 * cosine_loss(z, tokenizer.prior(images)).mean()

The file stands alone: torch and the standard library. Letters: B batch, K image tokens, R registers, N patches, D width.
"""
import copy
import gzip
import html
import io
import itertools
import json
import math
import os
import pickle
import re
import unicodedata
import zipfile
import zlib
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class UserError(ValueError):
    """What a user can cause and mend: one sentence with the file or option in it; scripts print it without a traceback."""


class Attention(nn.Module):
    """Multi-head self-attention, (B,N,D) -> (B,N,D); rows of `qkv` are q, k, v, each head-major."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, mask=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # each (B,heads,N,D/heads)
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """Linear, GELU (exact, or CLIP's x * sigmoid(1.702 x)), Linear."""

    def __init__(self, width, hidden, quick_gelu):
        super().__init__()
        self.fc1, self.fc2, self.quick_gelu = nn.Linear(width, hidden), nn.Linear(hidden, width), quick_gelu

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))


class LayerScale(nn.Module):
    """One learned factor a channel on the branch, before the residual (DINOv2)."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block, (B,N,D) -> (B,N,D)."""

    def __init__(self, width, heads, hidden, eps, layer_scale=False, quick_gelu=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads), MLP(width, hidden, quick_gelu)
        self.ls1, self.ls2 = (LayerScale(width), LayerScale(width)) if layer_scale else (nn.Identity(), nn.Identity())

    def forward(self, x, causal=False, mask=None):
        x = x + self.ls1(self.attn(self.norm1(x), causal, mask))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """The vision transformer of DINOv2, MAE and CLIP, under DINOv2's tensor names.

    forward(x (B,3,H,W) normalised, H and W multiples of `patch`) -> (B,1+R+N,D) after the final norm: class, registers, patches.
    `pixels`, `mean`, `std` are what the network expects of a picture; Tokenizer applies them. `position` says how the stored
    grid x grid position embedding is resized: "offset" (DINOv2 without registers) or "size" (all others).
    Source: Dosovitskiy 2021; Oquab 2023 (DINOv2); Darcet 2023 (registers).
    """

    def __init__(self, width=128, depth=3, heads=4, hidden=None, patch=4, grid=4, registers=0, layer_scale=False, pre_norm=False,
                 quick_gelu=False, patch_bias=True, eps=1e-6, position="size", pixels=16, mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.patch, self.grid, self.position, self.pixels, self.checkpointing = patch, grid, position, pixels, False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch, bias=patch_bias)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.norm_pre = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(width, heads, hidden or 4 * width, eps, layer_scale, quick_gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self._resized = {}  # (h, w) -> (version of pos_embed, position embedding for an h x w grid)
        # std .5, not the usual .02: the contrastive prior below learns nothing in its few steps from a smaller start
        for p in (self.cls_token, self.register_tokens, self.pos_embed):
            nn.init.normal_(p, std=0.5)

    def prefix(self):
        """The learned embeddings in front of the patches, (1,1+R,D): class token, registers."""
        return torch.cat([self.cls_token, self.register_tokens], 1)

    def patch_positions(self, h, w):
        """Position embedding of an h x w grid of patches, (1,h*w,D); resized on the CPU, once a size unless it is trained."""
        if h == w == self.grid:
            return self.pos_embed[:, 1:]
        trained = self.pos_embed.requires_grad and torch.is_grad_enabled()
        version = (self.pos_embed.data_ptr(), None if self.pos_embed.is_inference() else self.pos_embed._version)
        if not trained and self._resized.get((h, w), (None,))[0] == version:
            return self._resized[h, w][1]
        n = self.grid
        pos = self.pos_embed[:, 1:].float().cpu().view(1, n, n, -1).permute(0, 3, 1, 2)                        # (1,D,n,n)
        if self.position == "offset":  # DINOv2 hands interpolate the factor (h+.1)/n, which then maps the coordinates
            pos = F.interpolate(pos, scale_factor=((h + 0.1) / n, (w + 0.1) / n), mode="bicubic")
        else:
            pos = F.interpolate(pos, size=(h, w), mode="bicubic", antialias=True)
        pos = pos.flatten(2).mT.to(self.pos_embed)                                                             # (1,h*w,D)
        if not trained:
            self._resized[h, w] = version, pos
        return pos

    def forward(self, x, prefix=None):
        B, _, H, W = x.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"a picture of {H}x{W} pixels cannot be cut into patches of {self.patch}x{self.patch}")
        patches = self.patch_embed.proj(x).flatten(2).mT                                                       # (B,N,D)
        patches = patches + self.patch_positions(H // self.patch, W // self.patch)
        prefix = self.prefix() if prefix is None else prefix                                                   # (1,1+R,D)
        cls = prefix[:, :1] + self.pos_embed[:, :1]  # registers have no position
        x = torch.cat([cls.expand(B, -1, -1), prefix[:, 1:].expand(B, -1, -1), patches], 1)                    # (B,1+R+N,D)
        x = self.norm_pre(x)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():  # keeps each block's input only and runs the block twice
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.norm(x)


def resize(x, size):
    """(B,3,H,W) -> (B,3,size,size): centre crop to the shorter side, average-pool by the whole factor, bilinear for the rest."""
    H, W = x.shape[-2:]
    side = min(H, W)
    top, left = round((H - side) / 2), round((W - side) / 2)
    x = x[..., top:top + side, left:left + side]
    if side // size > 1:
        x = F.avg_pool2d(x, side // size)
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", align_corners=False)


class Tokenizer(nn.Module):
    """RepTok's encoder: the frozen ViT, with the input embedding of its K read-out tokens trained.

    token:    "cls" (the class token, K=1, the paper's), "reg" (register number `reg_index`, K=1) or "all" (K=1+R).
    unfreeze: "token" (the paper's), "none" (its frozen ablation) or "all" (every weight but the embeddings of unread tokens; its
              random and unfrozen ablations).
    Raises UserError where `token` needs registers and the ViT has none.
    """

    def __init__(self, vit, token="cls", reg_index=0, unfreeze="token"):
        super().__init__()
        registers = vit.register_tokens.shape[1]
        if token != "cls" and registers == 0:
            raise UserError(f"--token {token} needs an encoder with register tokens, and this one has none; use --token cls")
        if token == "reg" and not 0 <= reg_index < registers:
            raise UserError(f"--reg-index {reg_index}: this encoder's registers are numbered 0 to {registers - 1}")
        self.config = {"vit": vit.config, "token": token, "reg_index": reg_index, "unfreeze": unfreeze}
        index = {"cls": [0], "reg": [1 + reg_index], "all": list(range(1 + registers))}[token]
        self.vit, self.K, self.width = vit, len(index), vit.pos_embed.shape[-1]
        vit.requires_grad_(unfreeze == "all")  # frozen, but for that ablation
        self.original = copy.deepcopy(vit).requires_grad_(False) if unfreeze == "all" else None  # else vit itself is the original
        self.embedding = nn.Parameter(vit.prefix()[:, index].detach().clone(), requires_grad=unfreeze != "none")  # (1,K,D)
        vit.cls_token.requires_grad_(False), vit.register_tokens.requires_grad_(False)  # kept as they were, for the prior
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.register_buffer("mean", torch.tensor(vit.config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vit.config["std"]).view(3, 1, 1), persistent=False)

    def pixels(self, images):
        """(B,3,H,W) in [-1,1], any size -> what the ViT expects, (B,3,pixels,pixels) normalised."""
        return ((resize(images, self.vit.pixels) + 1) / 2 - self.mean) / self.std

    def forward(self, images):
        """z = E(x): (B,3,H,W) in [-1,1] -> tokens (B,K,D), with gradient to the trained embedding (Sec. 3, Eq. 2)."""
        prefix = self.vit.prefix().index_copy(1, self.index, self.embedding)                                   # (1,1+R,D)
        return self.vit(self.pixels(images), prefix)[:, self.index]

    @torch.no_grad()
    def prior(self, images):
        """z0: the same from the original embedding, without gradient, (B,K,D); the target of Eq. 3."""
        return (self.original or self.vit)(self.pixels(images))[:, self.index]


def cosine_loss(tokens, prior):
    """Eq. 3 without its lambda: 1 - cos(z, z0), averaged over the K tokens. (B,K,D), (B,K,D) -> (B,)."""
    return 1 - F.cosine_similarity(tokens.float(), prior.float(), dim=-1).mean(1)


# ---- A small self-supervised prior, for where DINOv2 cannot be downloaded (SimCLR, Chen 2020, on very small pictures)


def views(images, generator):
    """Two-view augmentation, (B,3,H,W) -> (B,3,H,W): a small affine move, a random rotation of colour space, gain, offset."""
    B, device = len(images), images.device
    rand = lambda *shape: torch.rand(shape, generator=generator, device=device) * 2 - 1
    angle, scale = rand(B) * 0.2, 1 + 0.1 * rand(B)
    affine = torch.stack([scale * angle.cos(), -scale * angle.sin(), 0.15 * rand(B),
                          scale * angle.sin(), scale * angle.cos(), 0.15 * rand(B)], 1).view(B, 2, 3)
    x = F.grid_sample(images, F.affine_grid(affine, images.shape, align_corners=False), padding_mode="border", align_corners=False)
    mix = torch.linalg.qr(torch.randn(B, 3, 3, generator=generator, device=device))[0]  # the content must not hang on the colours
    x = torch.einsum("bij,bjhw->bihw", mix, x)
    return x * (1 + 0.3 * rand(B, 1, 1, 1)) + 0.3 * rand(B, 3, 1, 1)


def contrastive_loss(a, b, temperature=0.1):
    """NT-Xent (Chen 2020, Eq. 1): (B,E), (B,E) -> scalar; each row of a must find its partner in b among all 2B-1 others."""
    x = F.normalize(torch.cat([a, b]).float(), dim=1)
    logits = (x @ x.T / temperature).fill_diagonal_(float("-inf"))                                             # (2B,2B)
    return F.cross_entropy(logits, torch.arange(2 * len(a), device=x.device).roll(len(a)))


def pretrain(vit, batches, seed=0, lr=1e-3, classes=0):
    """Train `vit` without labels so that two views of one picture get one token; yields the loss of every step.

    batches: an iterable of (images (B,3,H,W) in [-1,1], labels (B,), ...), one a step; its length sets the schedule. The labels are
    used only where `classes` > 0, and then alone: a supervised prior, to compare with. The head on top is thrown away.
    Deterministic in (weights, batches, seed).
    """
    D, device = vit.pos_embed.shape[-1], vit.pos_embed.device
    head = nn.Sequential(nn.Linear(D, 2 * D), nn.BatchNorm1d(2 * D), nn.ReLU(), nn.Linear(2 * D, classes or D // 2)).to(device)
    parameters = [*vit.requires_grad_(True).parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, fused=True)
    generator = torch.Generator(device).manual_seed(seed)
    mean, std = (torch.tensor(vit.config[k], device=device).view(3, 1, 1) for k in ("mean", "std"))
    for step, (images, labels, *_) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50, 0.05 + 1.9 * (1 - step / len(batches)))
        images = resize(images, vit.pixels)
        x = (torch.cat([views(images, generator), views(images, generator)]) + 1) / 2
        out = head(vit((x - mean) / std)[:, 0])                                                                # (2B,E)
        loss = F.cross_entropy(out, labels.repeat(2)) if classes else contrastive_loss(*out.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()
    vit.requires_grad_(False)


# ---- Below: reading weight files. Nothing about the method; the block up to the next such line is the same in tokenizer.py and
# ---- decoder.py, so that either can be copied alone.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {("torch", f"{kind}Storage"): dtype for kind, dtype in dict(
    Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64, Int=torch.int32,
    Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool).items()}


class Inert(dict):
    """Stands for every class and function that a pickle names: takes any argument, keeps its state as its items, runs nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __call__(self, *args, **kwargs):
        return Inert()

    def append(self, item):
        """A pickled subclass of list ends here; nobody reads it."""

    __hash__ = object.__hash__


class SafeUnpickler(pickle._Unpickler):
    """Builds tensors and plain containers from the pickle inside a torch file, and Inert for all else.

    stream: the pickle; fetch(key, dtype): a 1-D tensor. The Python unpickler, since the one in C allocates what a length
    field claims; so does its BYTEARRAY8.
    """
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream, fetch):
        super().__init__(stream, encoding="bytes")
        self.fetch, self.storages = fetch, {}

    def load_bytearray8(self):
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_build(self):
        state, node = self.stack.pop(), self.stack[-1]
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(node, Inert) and isinstance(part, dict):  # on anything else a state could replace methods or enlarge a storage
                node.update(part)

    def hashing(load, keys):
        def checked(self):
            if any(isinstance(part, tuple) for key in self.stack[keys] if isinstance(key, tuple) for part in key):
                raise ValueError("a key of nested tuples")  # to hash one can take exponential time
            load(self)
        return checked

    dispatch.update({pickle.BYTEARRAY8[0]: load_bytearray8, pickle.BUILD[0]: load_build})
    for code, keys in ((pickle.SETITEM, slice(-2, -1)), (pickle.SETITEMS, slice(0, None, 2)), (pickle.DICT, slice(0, None, 2)),
                       (pickle.ADDITEMS, slice(None)), (pickle.FROZENSET, slice(None))):
        dispatch[code[0]] = hashing(dispatch[code[0]], keys)

    def find_class(self, module, name):
        known = STORAGES | {("collections", "OrderedDict"): lambda *_: OrderedDict(), ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
                            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data, ("torch", "Size"): tuple}
        return known.get((module, name), Inert)

    def persistent_load(self, pid):
        _, dtype, key, _, numel = pid[:5]
        if not isinstance(dtype, torch.dtype):  # complex and quantized numbers: no weights
            return Inert()
        if type(key) is not str or type(numel) is not int:
            raise ValueError("a storage without a name or size")
        if key not in self.storages:
            self.storages[key] = self.fetch(key, dtype)
        return self.storages[key][:numel]

    @staticmethod
    def tensor(storage, offset, size, stride, *_):
        if isinstance(storage, Inert):
            return storage
        if any(type(n) is not int for n in size) or math.prod(size) > len(storage):  # a zero stride would claim any size
            raise ValueError("a tensor is larger than its data")
        return storage.as_strided(size, stride, offset)


def read_zip(path):
    """The object that torch.save or torch.jit.save wrote; its tensors, and Inert where a class was."""
    with zipfile.ZipFile(path) as archive:
        roots = [name[:-len("/data.pkl")] for name in archive.namelist() if name.endswith("/data.pkl")]
        if not roots:
            raise ValueError("it is a zip archive, but not of torch")
        used = [i for i in archive.infolist() if i.filename.startswith((f"{roots[0]}/data.pkl", f"{roots[0]}/data/"))]
        if any(i.compress_type or i.compress_size != i.file_size for i in used) or sum(i.file_size for i in used) > os.path.getsize(path):
            raise ValueError("its tensors are compressed or overlap, which torch never writes")  # TorchScript compresses its code

        def fetch(key, dtype):
            data = archive.read(f"{roots[0]}/data/{key}")
            return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)

        return SafeUnpickler(archive.open(f"{roots[0]}/data.pkl"), fetch).load()


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: a length, a header of JSON, raw bytes; every offset is held against the file."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError("its header is longer than the file")
        header, start, tensors = json.loads(f.read(length)), 8 + length, {}
        header.pop("__metadata__", None)
        spans = sorted(entry["data_offsets"] for entry in header.values())
        if any(a < 0 or b < a for a, b in spans) or any(b > a for (_, b), (a, _) in zip(spans, spans[1:])) or spans[-1][1] > size - start:
            raise ValueError("its tensors overlap or reach beyond the end of the file")
        for name, entry in header.items():
            (a, b), dtype, shape = entry["data_offsets"], DTYPES[entry["dtype"]], entry["shape"]
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != b - a:
                raise ValueError(f"the shape of {name} does not fit its bytes")
            f.seek(start + a)
            tensors[name] = torch.frombuffer(bytearray(f.read(b - a)), dtype=dtype).view(shape) if b > a else torch.empty(shape, dtype=dtype)
    return tensors


def plain(text, length=80):
    """Text of a stranger's file made fit for a line of a terminal: printable and short."""
    return "".join(c if c.isprintable() else "?" for c in text[:length]) + "..." * (len(text) > length)


def read_file(path):
    """What a weight file or checkpoint holds, whatever its ending says; never runs code from it. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of a weight file")
    try:
        with open(path, "rb") as f:
            magic = f.read(9)
        if magic[:4] == b"PK\x03\x04":
            return read_zip(path)
        if magic[8:] == b"{":
            return read_safetensors(path)
    except Exception as e:  # the file is untrusted: whatever it breaks, it is the file
        reason = plain(str(e).split("\n")[0], 120) or type(e).__name__
        raise UserError(f"{path}: not a readable weight file, or cut short ({reason}); get it again") from None
    raise UserError(f"{path}: neither a .safetensors nor a torch file; one from before torch 1.6 has to be saved again by a newer torch")


def flatten(node, prefix="", seen=None):
    """{dotted name: tensor} of nested dicts and modules, each visited once."""
    found, seen = {}, set() if seen is None else seen
    for key, value in node.items():
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict) and id(value) not in seen and prefix.count(".") < 50:
            seen.add(id(value))
            found.update(flatten(value, f"{prefix}{key}.", seen))
    return found


def read_tensors(path):
    """{name: tensor} of a weight file in any of the formats above. Raises UserError."""
    tree = read_file(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(tree, dict) and isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    tensors = flatten(tree) if isinstance(tree, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no tensors; give a weight file")
    return tensors


LOOKS = [("first_stage.", "the authors' RepTok checkpoint"), ("Mixed_5b", "the FID Inception"), ("lin0.model", "LPIPS heads"),
         ("features.0.", "VGG16"), ("quant_conv", "an SD VAE"), ("vision_model.", "a CLIP of Hugging Face"), ("visual.", "a CLIP of OpenAI"),
         ("layer_scale1", "a DINOv2 of Hugging Face"), ("ls1.gamma", "a DINOv2"), ("decoder_embed", "an MAE with its decoder"),
         ("patch_embed", "a plain ViT"), ("text_model.", "a text tower"), ("token_embedding", "a text tower")]


def fit(module, tensors, path, what):
    """Load `tensors` into `module` as float32; a UserError says what the file looks like and up to five names of each kind."""
    want, tensors = module.state_dict(), {str(k): v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    alike = {k for k in want if k in tensors and tensors[k].shape == want[k].shape and tensors[k].is_floating_point() == want[k].is_floating_point()}
    missing, unexpected = ([k for k in names if k not in alike] for names in (want, tensors))
    if missing or unexpected:
        looks = next((text for part, text in LOOKS if any(part in k for k in tensors)), "something unknown")
        kind = lambda t: f"{tuple(t.shape[:8])}{'' if t.is_floating_point() else ' of whole numbers'}"
        names = lambda keys, of: ", ".join(f"{plain(k)} {kind(of[k])}" for k in keys[:5]) or "none"
        raise UserError(f"{path}: not {what}; it looks like {looks}; missing {len(missing)}: {names(missing, want)}; "
                        f"unexpected {len(unexpected)}: {names(unexpected, tensors)}")
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, assign=True)
    return module


# ---- Encoders: a layout is a table of renamings into DINOv2's names

HF_VIT = [(r"^((vit|dinov2|dinov2_with_registers)\.)?(embeddings\.)?", ""), (r"^patch_embeddings\.projection", "patch_embed.proj"),
          (r"^position_embeddings", "pos_embed"), (r"^(encoder\.)?layers?\.", "blocks."),
          (r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r"attn.\2."), (r"attention\.(output\.dense|o_proj)", "attn.proj"),
          (r"layer_scale([12])\.lambda1", r"ls\1.gamma"), (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
          (r"intermediate\.dense", "mlp.fc1"), (r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2"), (r"^layernorm\.", "norm.")]
OFFICIAL_VIT = [(r"^(module|backbone|teacher\.backbone)\.", ""), (r"^blocks\.\d+\.(\d+\.)", r"blocks.\1")]  # block chunks of training files
CLIP_BLOCK = [(r"(transformer\.resblocks|encoder\.layers)\.", "blocks."), (r"attn\.in_proj_", "attn.qkv."), (r"self_attn\.(q|k|v)_proj\.", r"attn.\1."),
              (r"(self_)?attn\.out_proj", "attn.proj"), (r"\.(ln_|layer_norm)([12])\.", r".norm\2."), (r"mlp\.c_fc", "mlp.fc1"), (r"mlp\.c_proj", "mlp.fc2")]
CLIP_IMAGE = [(r"^(visual|vision_model)\.(embeddings\.)?", ""), (r"^(conv1|patch_embedding)\.", "patch_embed.proj."), (r"^class_embedding", "cls_token"),
              (r"^position(al_embedding|_embedding\.weight)", "pos_embed"), (r"^(ln_pre|pre_layrnorm)\.", "norm_pre."),
              (r"^(ln_post|post_layernorm)\.", "norm."), *CLIP_BLOCK]
# what a file holds beside the image encoder
IGNORED = r"mask_token$|^decoder|position_ids$|^head\.|^pooler\.|^(visual\.)?proj$"


def rename(tensors, table):
    """Apply a layout's (pattern, replacement) pairs to every name, then join q, k and v, which some layouts keep apart."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    for name in [name for name in out if "attn.q." in name]:
        parts = [name.replace("attn.q.", f"attn.{part}.") for part in "qkv"]
        if all(part in out and out[part].shape == out[name].shape != () for part in parts):
            out[name.replace("attn.q.", "attn.qkv.")] = torch.cat([out.pop(part) for part in parts])
    return out


def heads_of(width):
    """No file stores the number of heads: they are 64 wide, or 32 in tiny models."""
    return width // 64 if width % 64 == 0 else max(1, width // 32)


def vit_from(tensors, path):
    """A ViT of the shapes found in `tensors`, named in any layout that the README lists; frozen. Raises UserError."""
    clip = "visual.class_embedding" in tensors or "vision_model.embeddings.class_embedding" in tensors
    if clip:
        tensors = {k: v for k, v in tensors.items() if k.startswith(("visual.", "vision_model."))}
    table = CLIP_IMAGE if clip else HF_VIT if any("embeddings.cls_token" in k for k in tensors) else OFFICIAL_VIT
    tensors = {k: v for k, v in rename(tensors, table).items() if not re.search(IGNORED, k)}
    shape = {k: tuple(v.shape) for k, v in tensors.items()}
    pos, proj, fc1 = shape.get("pos_embed", ()), shape.get("patch_embed.proj.weight", ()), shape.get("blocks.0.mlp.fc1.weight", ())
    config = {"width": 768, "depth": 12, "patch": 14, "grid": 37, "heads": 12}  # only to name what is missing
    if (2 <= len(pos) <= 3 and 0 not in pos and len(proj) == 4 and 0 not in proj and len(fc1) == 2 and "cls_token" in tensors
            and len(shape.get("register_tokens", (1, 0, 0))) == 3):
        scaled, width, grid = "blocks.0.ls1.gamma" in tensors, pos[-1], math.isqrt(max(pos[-2] - 1, 0))
        if width % heads_of(width):
            raise UserError(f"{path}: an image encoder {width} wide has no heads of 64 or 32; give a published DINOv2, MAE or CLIP")
        depth = len({k.split(".")[1] for k in tensors if k.startswith("blocks.")})
        config = {"width": width, "depth": depth, "heads": heads_of(width), "hidden": fc1[0], "patch": proj[-1], "grid": grid,
                  "registers": shape.get("register_tokens", (1, 0, 0))[1], "layer_scale": scaled, "pre_norm": clip, "quick_gelu": clip,
                  "patch_bias": not clip, "eps": 1e-5 if clip else 1e-6, "pixels": 16 * proj[-1] if scaled else grid * proj[-1],
                  "position": "offset" if scaled and "register_tokens" not in tensors else "size"}
        config["mean"], config["std"] = CLIP if clip else IMAGENET
        tensors["cls_token"], tensors["pos_embed"] = tensors["cls_token"].reshape(1, 1, -1), tensors["pos_embed"].reshape(1, -1, width)
        tensors.setdefault("register_tokens", torch.zeros(1, 0, width))
    with torch.device("meta"):
        vit = ViT(**config)
    return fit(vit, tensors, path, "an image encoder (DINOv2, MAE or CLIP)").requires_grad_(False)


PUBLISHED = {  # name: address; --encoder and --clip take either the name or a path
    "dinov2_vitb14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vitb14_reg": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "mae_vitb16": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth",
    "clip_vitb16": "https://openaipublic.azureedge.net/clip/models/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "clip_vitl14": "https://openaipublic.azureedge.net/clip/models/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
}


def weight_file(name_or_path):
    """A path as it is; a name of PUBLISHED is downloaded, with progress, to torch.hub's checkpoint folder. Raises UserError."""
    if name_or_path not in PUBLISHED or Path(name_or_path).exists():
        return Path(name_or_path)
    url = PUBLISHED[name_or_path]
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        hashed = re.search(r"/([0-9a-f]{64})/", url)  # CLIP's address holds the file's SHA-256
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=hashed and hashed[1])
        except (OSError, RuntimeError) as e:
            raise UserError(f"{name_or_path}: {path.name} could not be downloaded ({e}); get {url} and put it into {path.parent}, "
                            f"or give the path of the file") from None
    return path


def load_encoder(path):
    """A published ViT by path or by a name of PUBLISHED: DINOv2, MAE or CLIP's image tower, layout told by the tensor names.

    The module takes normalised pixels (B,3,H,W), sides multiples of its patch, and gives (B,1+R+N,D) after the final norm (for
    CLIP after ln_post, before the projection). Raises UserError.
    """
    path = weight_file(path)
    return vit_from(read_tensors(path), path)


# ---- CLIP's text side (Radford et al. 2021, arXiv 2103.00020): byte-pair tokenizer and text transformer

# The official tokenizer first runs ftfy.fix_text. This table and `repaired` do what it does to single characters; they
# leave alone all that it leaves alone. Not done: undoing mojibake, for which ftfy has long tables.
REPAIRS = {c: unicodedata.normalize("NFKC", chr(c)) for c in (  # ligatures and full-width forms
    0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07), 0x3000, *range(0xFF01, 0xFFF0))}
REPAIRS |= {c: html.unescape(f"&#{c};") for c in range(0x80, 0xA0)}  # HTML 5 reads these controls as Windows-1252, so does ftfy
REPAIRS |= dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)])
REPAIRS |= dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'") | dict.fromkeys(range(0x201C, 0x2020), '"')
REPAIRS[0xFB05] = "\u017ft"

# The official pattern needs the `regex` package: '<|...|>' | 's 't 're 've 'm 'll 'd | \p{L}+ | \p{N} | the rest, ignoring
# case. Here \p{L} and \p{N} arrive as one run, which `encode` divides. Two oddities of `regex` are kept: it takes the long
# s for an s, and U+0345, a mark whose capital is a letter, fits none of its alternatives and is dropped.
PIECES = re.compile("<\\|[s\u017f]tartoftext\\|>|<\\|endoftext\\|>|'(?:[s\u017ftmd]|re|ve|ll)|[^\\W_]+|(?:[^\\w\\s\u0345]|_)+")


def _entity(match):
    """One HTML reference as ftfy reads it: known and closed by a semicolon; names of letters also in capitals."""
    text, plain = match[0], html.unescape(match[0])
    if plain == text == text.upper():
        plain = html.unescape(text.lower()).upper()
    return text if ";" in plain else plain


def repaired(text):
    """A caption with its typography made plain, near to ftfy.fix_text (https://github.com/rspeer/python-ftfy)."""
    entities = "<" not in text
    for _ in range(8):  # one repair can uncover another; a bound, because captions are anybody's
        before = text
        if entities:
            text = re.sub("&#?[0-9A-Za-z]{1,24};", _entity, text)
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # half a pair has no UTF-8
        text = unicodedata.normalize("NFC", re.sub("\x1b\\[[\\d;]*[A-Za-z]", "", text).translate(REPAIRS))
        if text == before:
            break
    return text


class BPE:
    """CLIP's tokenizer: BPE(vocab_path)(strings) -> ids (B,77), int64: start, the caption, end, zeros.

    vocab_path is the published bpe_simple_vocab_16e6.txt.gz (https://github.com/openai/CLIP/tree/main/clip). A caption that
    is too long is cut and keeps its end token; `len(bpe.encode(s)) > bpe.context` tells. A damaged file raises UserError.
    Shorter vocabularies are read too: `size` is the number of ids, 49408 for CLIP; start and end are the last two.
    """

    context = 77

    def __init__(self, vocab_path):
        self.path = "the vocabulary in the checkpoint" if isinstance(vocab_path, bytes) else vocab_path
        try:
            self.file = vocab_path if isinstance(vocab_path, bytes) else Path(vocab_path).read_bytes()  # a checkpoint keeps it
            with gzip.open(io.BytesIO(self.file)) as f:
                lines = f.read(1 << 24).decode().removesuffix("\n").split("\n")  # the real one has 3.2 MB; a bomb ends here
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
            raise UserError(f"{self.path} is not a whole gzip file of CLIP's byte-pair vocabulary ({e}); get bpe_simple_vocab_16e6.txt.gz again") from None
        # Ids 0..255 are the bytes, printable ones first; the file writes the others as the characters from 256 on.
        order = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order += sorted({*range(256)} - {*order})
        symbols = [chr(b if i < 188 else 68 + i) for i, b in enumerate(order)]
        ids = {s: i for i, s in enumerate(symbols + [s + "</w>" for s in symbols])}
        self.byte, self.merges = {b: i for i, b in enumerate(order)}, {}
        for number, line in enumerate(lines[1:48895], 2):  # CLIP uses 49152-256-2 of the 262144
            pair, joined = tuple(ids.get(s) for s in line.split(" ")), line.replace(" ", "")
            if len(pair) != 2 or None in pair or joined in ids:
                raise UserError(f"{self.path} is not CLIP's byte-pair vocabulary: line {number} joins no two known symbols")
            ids[joined] = self.merges[pair] = len(ids)
        if not self.merges:
            raise UserError(f"{self.path} is not CLIP's byte-pair vocabulary: it has no merges")
        self.start, self.end, self.size = len(ids), len(ids) + 1, len(ids) + 2

    @lru_cache(1 << 16)  # captions repeat their words
    def _word(self, word):
        """Ids of one word: among its neighbouring pairs, join the one that comes first in the file, until none is in it."""
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return (self.start if word[2] == "s" else self.end,)
        ids = [self.byte[b] for b in word.encode()]
        ids[-1] += 256  # the last symbol of a word carries '</w>'
        while (joined := min((self.merges.get(p, self.size) for p in zip(ids, ids[1:])), default=self.size)) < self.size:
            out = []
            for i in ids:  # a symbol just joined is in no pair that gives `joined` again: ids grow with every merge
                if out and self.merges.get((out[-1], i)) == joined:
                    out[-1] = joined
                else:
                    out.append(i)
            ids = out
        return tuple(ids)

    def encode(self, text):
        """All ids of one caption as a list, start and end included, not cut."""
        # Captions from the web are often escaped twice, so the official one unescapes twice. split() is its `\s+`: the
        # controls 28..31, on which `re` and `regex` differ, are gone by now.
        text = " ".join(html.unescape(html.unescape(repaired(text))).split()).lower()
        ids = [self.start]
        for run in PIECES.findall(text):
            for whole, part in itertools.groupby(run, str.isalpha) if run[0].isalnum() else [(True, run)]:
                for word in ["".join(part)] if whole else part:  # letters stay together, digits stand alone
                    ids += self._word(word)
        return ids + [self.end]

    def __call__(self, strings):
        strings = [strings] if isinstance(strings, str) else strings
        rows = [(ids[:-1][:self.context - 1] + ids[-1:] + [0] * self.context)[:self.context] for ids in map(self.encode, strings)]
        return torch.tensor(rows, dtype=torch.long).view(-1, self.context)


class TextTower(nn.Module):
    """CLIP's causal text transformer: QuickGELU, LayerNorm eps 1e-5.

    forward: ids (B,L), L <= context -> features (B,L,C) after the final norm. embed: ids -> (B,E), the feature at the end
    token, projected, not normalised. What follows the end token changes neither it nor anything before it.
    """

    def __init__(self, vocabulary, context, width, depth, out):
        super().__init__()
        self.token_embedding, self.positional_embedding = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads_of(width), 4 * width, 1e-5, quick_gelu=True) for _ in range(depth))
        self.ln_final, self.text_projection = nn.LayerNorm(width, 1e-5), nn.Parameter(torch.zeros(width, out))

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]                   # (B,L,C)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.ln_final(x)

    def embed(self, ids):
        """The largest id is the end token; the first one counts."""
        x = self(ids)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]                   # (B,C)
        return x @ self.text_projection                                                            # (B,E)


CLIP_TEXT = [(r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"), (r"^text_model\.embeddings\.", ""),
             (r"^text_model\.final_layer_norm\.", "ln_final."), (r"^text_model\.", ""), *CLIP_BLOCK]
# the image half, scalars, index buffers, and the mask that OpenAI's archives keep as an attribute of every block
NOT_TEXT = r"^(visual|vision_model|visual_projection)\.|(position_ids|attn_mask)$|^(logit_scale|logit_bias|input_resolution|context_length|vocab_size)$"


def load_text_encoder(path):
    """CLIP's text tower, frozen, by path or a name of PUBLISHED: OpenAI's archive or state dict, or Hugging Face's CLIPModel. Raises UserError."""
    path = weight_file(path)
    tensors = rename({k: v for k, v in read_tensors(path).items() if not re.search(NOT_TEXT, k)}, CLIP_TEXT)
    if "text_projection.weight" in tensors and tensors["text_projection.weight"].ndim == 2:  # a Linear's; square in B/16, where a missed transpose would load
        tensors["text_projection"] = tensors.pop("text_projection.weight").t().contiguous()
    shape = {"token_embedding.weight": (49408, 512), "positional_embedding": (77, 512), "text_projection": (512, 512)}  # to name what is missing
    shape |= {k: v.shape for k, v in tensors.items() if k in shape and v.ndim == 2}
    (vocabulary, width), (context, _), (_, out) = shape.values()
    if width % 32:
        raise UserError(f"{path}: a text tower {width} wide has no heads of 64 or 32; give a published CLIP")
    depth = len({k.split(".")[1] for k in tensors if k.startswith("blocks.")})
    with torch.device("meta"):
        tower = TextTower(vocabulary, context, width, depth, out)
    return fit(tower, tensors, path, "a CLIP text tower").requires_grad_(False).eval()


class WordEncoder(nn.Module):
    """A small text encoder over whole words, trained along with the Mixer where no language model can be had.

    `ids`: captions -> (B,L) long, 0 where nothing stands, 1 for an unknown word; features: ids -> (B,L,C); a caption is cut at
    `context` words.
    """

    def __init__(self, words, width=64, depth=2, context=24):
        super().__init__()
        self.config = {"words": list(words), "width": width, "depth": depth, "context": context}
        self.number, self.context, self.width = {word: i + 2 for i, word in enumerate(words)}, context, width
        self.embedding, self.position = nn.Embedding(len(words) + 2, width), nn.Parameter(0.5 * torch.randn(context, width))
        self.blocks = nn.ModuleList(Block(width, heads_of(width), 4 * width, 1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def split(caption):
        """Words, numbers and marks of a caption, in small letters."""
        return re.findall(r"\w+|[^\w\s]", caption.lower())

    def ids(self, captions):
        rows = [[self.number.get(word, 1) for word in self.split(c)[:self.context]] or [0] for c in captions]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)

    def mask(self, ids):
        """Where words stand, (B,L) bool."""
        return ids > 0

    def forward(self, ids):
        x = self.embedding(ids) + self.position[:ids.shape[1]]                                     # (B,L,C)
        for block in self.blocks:
            x = block(x, mask=self.mask(ids)[:, None, None])
        return self.norm(x)


class ClipText(nn.Module):
    """CLIP's tower and byte-pair tokenizer behind WordEncoder's interface; frozen."""

    def __init__(self, tower, vocabulary):
        super().__init__()
        self.tower, self.bpe, self.width = tower, BPE(vocabulary), tower.positional_embedding.shape[1]
        self.split, self.context = self.bpe.encode, self.bpe.context
        if self.bpe.size != tower.token_embedding.num_embeddings:
            raise UserError(f"{self.bpe.path}: a vocabulary of {self.bpe.size}, and the text tower has {tower.token_embedding.num_embeddings}; "
                            f"use bpe_simple_vocab_16e6.txt.gz")

    def ids(self, captions):
        ids = self.bpe(captions)
        return ids[:, :1 + ids.argmax(1).max()]  # nothing after the last end token

    def mask(self, ids):
        """What stands up to the end token, (B,L) bool."""
        return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)

    @torch.no_grad()
    def forward(self, ids):
        return self.tower(ids)
