"""Token -> image: a flow-matching transformer that decodes K tokens into SD-VAE latents (RepTok, arXiv 2510.14630).

    decoder = Decoder()                                           # width 1152, depth 28: the paper's, 570M parameters
    loss = flow_loss(lambda x_t, t: decoder(x_t, t, tokens), latents, t, noise).mean()           # Eq. 1
    latents = euler(lambda x, t: decoder(x, t, tokens), noise, steps=50)
    images = load_vae("diffusion_pytorch_model.safetensors").decode(latents)

The file stands alone: torch and the standard library. Letters: B batch, K image tokens, N patches, C channels.
Time: t=0 is noise, t=1 data (Eq. 1).
"""
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint


class UserError(ValueError):
    """What a user can cause and mend: one sentence with the file or option in it; scripts print it without a traceback."""


def flow_loss(velocity, x1, t, noise):
    """Eq. 1: the mean squared error of the velocity on the straight path from noise (t=0) to data (t=1).

    velocity(x_t, t) -> like x1; x1: data (B,...); t (B,) in [0,1]; noise like x1. Returns one loss an example, (B,).
    Where it trains the tokenizer too (Eq. 2), the tokens inside `velocity` carry the gradient.
    """
    s = t.view(-1, *[1] * (x1.ndim - 1))
    x_t = (1 - s) * noise + s * x1
    return (velocity(x_t, t).float() - (x1 - noise)).square().flatten(1).mean(1)


def euler(velocity, x, steps):
    """Follow dx/dt = velocity(x, t) from noise at t=0 to data at t=1 in equal steps; t is handed over with shape (1,)."""
    for i in range(steps):
        x = x + velocity(x, torch.full((1,), i / steps, device=x.device)) / steps
    return x


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32. With a condition c, scale = 1 + linear(c), which `Decoder.start` sets to 1."""

    def __init__(self, width, condition=None):
        super().__init__()
        if condition is None:
            self.scale = nn.Parameter(torch.ones(width))
        else:
            self.linear = nn.Linear(condition, width, bias=False)

    def forward(self, x, c=None):
        scale = self.scale if c is None else 1 + self.linear(c)[:, None]                           # (B,1,width)
        return (F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * scale).to(x.dtype)


class SwiGLU(nn.Module):
    """up to (value, gate), value * silu(gate), down (Shazeer 2020)."""

    def __init__(self, width):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, 6 * width, bias=False), nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        value, gate = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(value * F.silu(gate))


class Attention(nn.Module):
    """Cosine attention: q and k have the norm sqrt(scale_h), then are rotated; no further 1/sqrt(d)."""

    def __init__(self, width, heads):
        super().__init__()
        self.qkv_proj, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.full((heads,), 10.0))

    def forward(self, x, rotary):
        B, N, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, N, 3, len(self.scale), -1).unbind(2)                    # each (B,N,heads,d)
        length = self.scale.sqrt()[:, None]
        q, k = (rotate(u.float() * (length * torch.rsqrt(u.float().square().sum(-1, keepdim=True) + 1e-6)), rotary) for u in (q, k))
        q, k, v = (u.to(v.dtype).transpose(1, 2) for u in (q, k, v))                               # each (B,heads,N,d)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(B, N, D))


def rotate(x, rotary):
    """Axial RoPE on the first half of each head's channels (Su 2021); the second half passes. (B,N,heads,d) -> the same."""
    cos, sin = rotary                                                                              # each (N,heads,d/4)
    a, b, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class Block(nn.Module):
    """Self-attention, then SwiGLU; time enters by the scale of the norms only. The identity after `Decoder.start`."""

    def __init__(self, width, heads, condition):
        super().__init__()
        self.norm1, self.attn = RMSNorm(width, condition), Attention(width, heads)
        self.norm2, self.ff = RMSNorm(width, condition), SwiGLU(width)

    def forward(self, x, c, rotary):
        x = x + self.attn(self.norm1(x, c), rotary)
        return x + self.ff(self.norm2(x, c))


class Mapping(nn.Module):
    """The network's own time (B,), 1 - t (see `Decoder.condition`) -> condition c (B,M): random Fourier features, then two residual
    SwiGLU blocks (Crowson 2024)."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2, 1))
        self.in_proj = nn.Linear(width, width, bias=False)
        self.in_norm, self.out_norm = RMSNorm(width), RMSNorm(width)
        self.norms, self.blocks = nn.ModuleList(RMSNorm(width) for _ in range(2)), nn.ModuleList(SwiGLU(width) for _ in range(2))

    def forward(self, t):
        angle = 2 * math.pi * t.float()[:, None] @ self.freqs.mT                                   # (B,M/2)
        c = self.in_norm(self.in_proj(torch.cat([angle.cos(), angle.sin()], -1)))
        for norm, block in zip(self.norms, self.blocks):
            c = c + block(norm(c))
        return self.out_norm(c)


class Decoder(nn.Module):
    """D: velocity of the flow from noise to latents, given tokens.

    forward(x_t (B,C,size,size), t (B,) or (1,) in [0,1], tokens (B,K,token_dim)) -> v (B,C,size,size).
    The projected tokens stand in front of the patches, all attend to all, and the tokens' outputs are dropped (Sec. 3).
    Sampling calls `project` once, `condition` once a step and `velocity`: forward is just the three.
    """

    def __init__(self, channels=4, size=32, patch=2, width=1152, depth=28, heads=16, mapping=1024, token_dim=768, K=1,
                 learned_positions=False):
        super().__init__()
        if size % patch:
            raise UserError(f"latents of {size}x{size} cannot be cut into patches of {patch}x{patch}: choose a picture size that divides")
        if width % (8 * heads):
            raise ValueError(f"width {width} / {heads} heads must be a multiple of 8: two axes, two rotated halves, half of the head")
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.patch, self.width, self.K, self.checkpointing = patch, width, K, False
        self.mapping = Mapping(mapping)
        self.token_pos = nn.Parameter(torch.zeros(1, K, token_dim))  # learned position; at K=1 a bias
        self.token_fc, self.token_ln = nn.Linear(token_dim, width), nn.LayerNorm(width)
        self.patch_in = nn.Linear(patch * patch * channels, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        # rotary attention finds out where a patch is only slowly; nano, with its few steps, is told
        self.patch_pos = nn.Parameter(0.5 * torch.randn(1, (size // patch) ** 2, width)) if learned_positions else None
        self.blocks = nn.ModuleList(Block(width, heads, mapping) for _ in range(depth))
        self.norm_out = RMSNorm(width)
        self.patch_out = nn.Linear(width, patch * patch * channels, bias=False)
        # frequencies from pi to 10 pi, spread over all heads: freqs[axis, head, j]
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), width // 8 + 1)[:-1].exp()
        self.register_buffer("freqs", freqs.view(-1, heads).T.expand(2, -1, -1).contiguous())      # (2,heads,d/8)
        self.start()

    def start(self):
        """Zero starts: every block is the identity, the velocity is 0, and a token enters as itself."""
        zero = [self.token_fc, self.patch_out, *(b.attn.out_proj for b in self.blocks), *(b.ff.down_proj for b in self.blocks),
                *(b.norm1.linear for b in self.blocks), *(b.norm2.linear for b in self.blocks), *(b.down_proj for b in self.mapping.blocks)]
        for linear in zero:
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.token_fc.bias)
        if self.K > 1:  # the positions tell them apart
            nn.init.normal_(self.token_pos, std=0.5)

    def rotary(self, side):
        """cos and sin for K tokens at the origin, not rotated, and side x side patches at their centres in [-1,1]^2."""
        centre = (2 * torch.arange(side, device=self.freqs.device) + 1) / side - 1
        rows, columns = centre.repeat_interleave(side), centre.repeat(side)                        # each (N,)
        theta = torch.cat([rows[:, None, None] * self.freqs[0], columns[:, None, None] * self.freqs[1]], -1)  # (N,heads,d/4)
        theta = torch.cat([theta.new_zeros(self.K, *theta.shape[1:]), theta])                      # (K+N,heads,d/4)
        return theta.cos(), theta.sin()

    def project(self, tokens):
        """(B,K,token_dim) -> (B,K,width): the token itself, padded with zeros (at size S cut to its first `width` numbers), plus
        LayerNorm(Linear(token)), which sees all of it."""
        z = tokens + self.token_pos
        return F.pad(z, (0, self.width - z.shape[-1])) + self.token_ln(self.token_fc(z))

    def condition(self, t):
        """t (B,), 0 noise and 1 data -> c (B,mapping). The authors trained with 1 as noise, so the network is fed 1-t."""
        return self.mapping(1 - t)

    def velocity(self, x_t, c, projected):
        """x_t (B,C,H,W), c (B or 1,mapping), projected tokens (B,K,width) -> v (B,C,H,W)."""
        (B, C, H, W), p = x_t.shape, self.patch
        x = x_t.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)  # (B,N,p*p*C)
        x = self.patch_in(x) if self.patch_pos is None else self.patch_in(x) + self.patch_pos      # (B,N,width)
        x = self.merge(torch.cat([projected, x], 1))                                               # (B,K+N,width)
        rotary = self.rotary(H // p)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():  # keeps each block's input only and runs the block twice
                x = torch.utils.checkpoint.checkpoint(block, x, c, rotary, use_reentrant=False)
            else:
                x = block(x, c, rotary)
        x = self.patch_out(self.norm_out(x[:, self.K:]))                                           # (B,N,p*p*C)
        x = x.view(B, H // p, W // p, p, p, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return -x  # with time reversed the network predicts noise - data

    def forward(self, x_t, t, tokens):
        return self.velocity(x_t, self.condition(t), self.project(tokens))


# ---- The SD VAE (kl-f8, Rombach 2022), frozen; under diffusers' tensor names


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice; (B,C,H,W) -> (B,out,H,W)."""

    def __init__(self, channels, out):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, channels, eps=1e-6), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, eps=1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class SpatialAttention(nn.Module):
    """One head over all positions, (B,C,H,W) -> the same."""

    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).mT                                                       # (B,H*W,C)
        y = F.scaled_dot_product_attention(self.to_q(y)[:, None], self.to_k(y)[:, None], self.to_v(y)[:, None])[:, 0]
        return x + self.to_out[0](y).mT.reshape(x.shape)


class Level(nn.Module):
    """ResBlocks at one resolution, then halving or doubling it (`scale` -1, +1; 0 keeps it)."""

    def __init__(self, channels, out, blocks, scale):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels if i == 0 else out, out) for i in range(blocks))
        conv = nn.ModuleDict({"conv": nn.Conv2d(out, out, 3, stride=2) if scale < 0 else nn.Conv2d(out, out, 3, padding=1)})
        self.downsamplers = nn.ModuleList([conv] if scale < 0 else [])
        self.upsamplers = nn.ModuleList([conv] if scale > 0 else [])

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        for down in self.downsamplers:
            x = down.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only
        for up in self.upsamplers:
            x = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(channels)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEHalf(nn.Module):
    """Encoder (2 blocks a level, downwards) or decoder (3, upwards) of the VAE."""

    def __init__(self, channels, inputs, outputs, encoder):
        super().__init__()
        widths = [channels[0], *channels] if encoder else [channels[-1], *reversed(channels)]
        last, n = len(channels) - 1, 2 if encoder else 3
        levels = nn.ModuleList(Level(a, b, n, 0 if i == last else -1 if encoder else 1) for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.conv_in, self.mid_block = nn.Conv2d(inputs, widths[0], 3, padding=1), Middle(channels[-1])
        self.down_blocks, self.up_blocks = (levels, nn.ModuleList()) if encoder else (nn.ModuleList(), levels)
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x):
        for part in (self.conv_in, *self.down_blocks, self.mid_block, *self.up_blocks):
            x = part(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Images (B,3,H,W) in [-1,1], H and W multiples of `factor` <-> latents (B,4,H/8,W/8), scaled to about unit variance."""

    def __init__(self, channels=(128, 256, 512, 512), latent=4, scale=0.18215):
        super().__init__()
        self.config = {"channels": list(channels), "latent": latent, "scale": scale}
        self.channels, self.scale, self.factor = latent, scale, 2 ** (len(channels) - 1)
        self.encoder, self.decoder = VAEHalf(channels, 3, 2 * latent, True), VAEHalf(channels, latent, 3, False)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1), nn.Conv2d(latent, latent, 1)

    def posterior(self, x):
        """(B,3,H,W) -> mean, log-variance, each (B,4,H/8,W/8), unscaled; log-variance within [-30,20]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, mean, logvar, noise):
        """Scaled latents from the posterior; noise ~ N(0,I) like mean."""
        return self.scale * (mean + (0.5 * logvar).exp() * noise)

    def encode(self, x, noise=None):
        """(B,3,H,W) in [-1,1] -> latents, a posterior sample times `scale`."""
        mean, logvar = self.posterior(x)
        return self.sample(mean, logvar, torch.randn_like(mean) if noise is None else noise)

    def decode(self, latents):
        """Latents (B,4,h,w), scaled -> (B,3,8h,8w), about [-1,1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scale))


class PixelSpace(nn.Module):
    """The VAE's identity twin: latents are the pixels themselves."""
    channels, factor, config = 3, 1, {}

    def posterior(self, x):
        """(B,3,H,W) -> the same, and a log-variance that `sample` ignores."""
        return x, torch.zeros_like(x)

    def sample(self, mean, logvar, noise):
        """The mean."""
        return mean

    def decode(self, latents):
        """(B,3,H,W) -> the same."""
        return latents


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


# ---- VAEs: a layout is a table of renamings into diffusers' names

COMPVIS = [(r"^first_stage_model\.", ""), (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
           (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"), (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
           (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."), (r"\.down\.(\d)\.block\.", r".down_blocks.\1.resnets."),
           (r"\.down\.(\d)\.downsample", r".down_blocks.\1.downsamplers.0"), (r"\.up\.(\d)\.block\.", r".up.\1.resnets."),
           (r"\.up\.(\d)\.upsample\.", r".up.\1.upsamplers.0."), ("nin_shortcut", "conv_shortcut"), (r"\.norm_out", ".conv_norm_out"),
           *((rf"\.up\.{i}\.", f".up_blocks.{3 - i}.") for i in range(4))]  # CompVis counts the decoder's levels from the full size
OLD_DIFFUSERS = [(r"\.query\.", ".to_q."), (r"\.key\.", ".to_k."), (r"\.value\.", ".to_v."), (r"\.proj_attn\.", ".to_out.0.")]


def vae_from(tensors, path):
    """A VAE of the shapes found in `tensors` (diffusers with new or old attention names, or CompVis); frozen. Raises UserError."""
    if any(k.startswith("first_stage_model.") for k in tensors):  # a whole Stable Diffusion
        tensors = {k: v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    compvis, named = any(".mid.block_1." in k for k in tensors), {}
    for name, tensor in tensors.items():
        if name.startswith(("loss.", "model_ema.")):
            continue
        for pattern, replacement in COMPVIS if compvis else OLD_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor.flatten(1) if "attentions" in name and tensor.ndim == 4 else tensor
    widths = [named.get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(4)]
    channels = [128, 256, 512, 512] if any(w is None or w.ndim != 4 or w.shape[0] % 32 for w in widths) else [w.shape[0] for w in widths]
    with torch.device("meta"):
        vae = VAE(channels)
    return fit(vae, named, path, "an SD VAE (kl-f8)").requires_grad_(False)


def load_vae(path):
    """The SD VAE from a diffusers .safetensors or a CompVis .ckpt, told by the tensor names. Raises UserError."""
    return vae_from(read_tensors(path), path).to(memory_format=torch.channels_last)  # what convolutions are fastest in
