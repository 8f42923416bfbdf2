"""Tokens to images: a flow-matching transformer that decodes K tokens into SD VAE latents (RepTok, arXiv 2510.14630).

    decoder = Decoder()                                           # width 1152, depth 28: the paper's, 570M parameters
    s = t.view(-1, 1, 1, 1)                                       # t (B,); latents, noise (B,4,32,32); z (B,1,768)
    x_t = (1 - s) * noise + s * latents
    v = decoder(x_t, t, z)
    flow = (v - (latents - noise)).square().mean()                # Eq. 1
    latents = euler(lambda x, t: decoder(x, t, z), noise, steps=50)
    images = load_vae("diffusion_pytorch_model.safetensors").decode(latents)

The file needs only torch and the standard library. Time: t=0 is noise, t=1 is data.
Letters: B batch, K tokens of an image, N patches, C channels, D width of a token, d channels of one head.
"""
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

class UserError(ValueError):
    """An error that the user can correct: one sentence, with the file or option; scripts print it without traceback."""

def euler(velocity, x, steps):
    """Integrate dx/dt = velocity(x, t) from noise (t=0) to data (t=1) in equal steps; t is passed with shape (1,)."""
    for i in range(steps):
        t = torch.full((1,), i / steps, device=x.device)
        x = x + velocity(x, t) / steps
    return x

class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32. With a condition c (B,M), scale = 1 + linear(c)."""
    def __init__(self, width, condition=None):
        super().__init__()
        if condition is None:
            self.scale = nn.Parameter(torch.ones(width))
        else:
            self.linear = nn.Linear(condition, width, bias=False)

    def forward(self, x, c=None):
        if c is None:
            scale = self.scale                                    # (width,)
        else:
            with torch.autocast(x.device.type, enabled=False):    # bfloat16 would round 1 + linear(c) to 8 bits
                scale = 1 + self.linear(c)[:, None]               # (B,1,width)
        return (F.rms_norm(x.float(), x.shape[-1:], eps=1e-6) * scale).to(x.dtype)

class SwiGLU(nn.Module):
    """A linear map to (value, gate), value * silu(gate), a linear map back (Shazeer 2020)."""
    def __init__(self, width):
        super().__init__()
        self.up_proj = nn.Linear(width, 6 * width, bias=False)
        self.down_proj = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        value, gate = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(value * F.silu(gate))

class Attention(nn.Module):
    """Cosine attention: q and k get the norm sqrt(scale of the head) and are rotated; no further 1/sqrt(d)."""
    def __init__(self, width, heads):
        super().__init__()
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.full((heads,), 10.0))

    def forward(self, x, rotary):
        B, N, D = x.shape
        q, k, v = self.qkv_proj(x).view(B, N, 3, len(self.scale), -1).unbind(2)        # each (B,N,heads,d)
        length = self.scale.sqrt()[:, None]                                            # (heads,1)
        q = rotate(normalize(q, length), rotary).to(v.dtype)
        k = rotate(normalize(k, length), rotary).to(v.dtype)
        q, k, v = (u.transpose(1, 2) for u in (q, k, v))                               # each (B,heads,N,d)
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.out_proj(x.transpose(1, 2).reshape(B, N, D))

def normalize(x, length):
    """Give each vector of x (B,N,heads,d) the length (heads,1), in float32."""
    x = x.float()
    return x * (length * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6))

def rotate(x, rotary):
    """Axial RoPE (Su 2021) on the first half of each head's channels; the rest stays. (B,N,heads,d) -> the same."""
    cos, sin = rotary                                             # each (N,heads,d/4)
    n = cos.shape[-1]
    a, b, rest = x.split([n, n, x.shape[-1] - 2 * n], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

class Block(nn.Module):
    """Self-attention, then SwiGLU, (B,N,width) -> the same; time c (B,M) enters only as the scale of the norms."""
    def __init__(self, width, heads, condition):
        super().__init__()
        self.norm1 = RMSNorm(width, condition)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width, condition)
        self.ff = SwiGLU(width)

    def forward(self, x, c, rotary):
        x = x + self.attn(self.norm1(x, c), rotary)
        return x + self.ff(self.norm2(x, c))

class Mapping(nn.Module):
    """Time (B,) -> condition c (B,M): random Fourier features, then two residual SwiGLU blocks (Crowson 2024)."""
    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2, 1))
        self.in_proj = nn.Linear(width, width, bias=False)
        self.in_norm = RMSNorm(width)
        self.out_norm = RMSNorm(width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(2))
        self.blocks = nn.ModuleList(SwiGLU(width) for _ in range(2))

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):        # bfloat16 holds only 129 times from 0.5 to 1
            angle = 2 * math.pi * t.float()[:, None] * self.freqs[:, 0]                # (B,M/2)
            c = self.in_norm(self.in_proj(torch.cat([angle.cos(), angle.sin()], -1)))  # (B,M)
            for norm, block in zip(self.norms, self.blocks):
                c = c + block(norm(c))
            return self.out_norm(c)

class Decoder(nn.Module):
    """The velocity of the flow from noise to latents, given the tokens z of an image.
    forward(x_t (B,C,size,size), t (B,) or (1,) in [0,1], z (B,K,token_dim)) -> v (B,C,size,size).
    The projected tokens stand in front of the patches, all attend to all, and the tokens' outputs are dropped (Sec. 3).
    forward is project, then velocity; a sampler calls project once. predict: the network's output, "velocity" (as in
    the paper) or "data", from which v is computed. Raises UserError where `size` is no multiple of `patch`."""
    def __init__(self, channels=4, size=32, patch=2, width=1152, depth=28, heads=16, mapping=1024, token_dim=768, K=1,
                 learned_positions=False, predict="velocity"):
        super().__init__()
        if size % patch:
            raise UserError(f"latents of size {size} do not divide into patches of {patch}; choose other --pixels")
        if width % (8 * heads):
            raise ValueError(f"width {width} must be a multiple of 8 * {heads} heads")  # 2 (pair) * 2 (axes) * 2 (half)
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.patch = patch
        self.width = width
        self.K = K
        self.checkpointing = False
        self.mapping = Mapping(mapping)
        self.token_pos = nn.Parameter(torch.zeros(1, K, token_dim))  # learned positions; a bias where K=1
        self.token_fc = nn.Linear(token_dim, width)
        self.token_ln = nn.LayerNorm(width)
        self.patch_in = nn.Linear(patch * patch * channels, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)
        # with RoPE alone, positions are learned too slowly for nano's short training
        self.patch_pos = nn.Parameter(0.5 * torch.randn(1, (size // patch) ** 2, width)) if learned_positions else 0
        self.blocks = nn.ModuleList(Block(width, heads, mapping) for _ in range(depth))
        self.norm_out = RMSNorm(width)
        self.patch_out = nn.Linear(width, patch * patch * channels, bias=False)
        # RoPE frequencies, the same for both axes: from pi to 10 pi in geometric steps, spread over all heads
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), width // 8 + 1)[:-1].exp()
        self.register_buffer("freqs", freqs.view(-1, heads).T.expand(2, -1, -1).contiguous())  # (2,heads,d/8)
        self.zero_init()

    def zero_init(self):
        """At the start every block is the identity, the output is 0, and a token enters unchanged."""
        nn.init.zeros_(self.patch_out.weight)
        nn.init.zeros_(self.token_fc.weight)
        nn.init.zeros_(self.token_fc.bias)
        for block in self.blocks:
            for linear in (block.attn.out_proj, block.ff.down_proj, block.norm1.linear, block.norm2.linear):
                nn.init.zeros_(linear.weight)
        for block in self.mapping.blocks:
            nn.init.zeros_(block.down_proj.weight)
        if self.K > 1:  # equal positions would make the K tokens interchangeable
            nn.init.normal_(self.token_pos, std=0.5)

    def rotary(self, side):
        """cos and sin, each (K+N,heads,d/4): K tokens at angle 0, then side x side patches, centres in [-1,1]^2."""
        centre = (2 * torch.arange(side, device=self.freqs.device) + 1) / side - 1
        y = centre.repeat_interleave(side)[:, None, None]         # (N,1,1)
        x = centre.repeat(side)[:, None, None]                    # (N,1,1)
        angle = torch.cat([y * self.freqs[0], x * self.freqs[1]], -1)                  # (N,heads,d/4)
        angle = torch.cat([angle.new_zeros(self.K, *angle.shape[1:]), angle])          # (K+N,heads,d/4)
        return angle.cos(), angle.sin()

    def project(self, z):
        """z (B,K,token_dim) -> (B,K,width): z, padded with zeros or cut to `width`, plus LayerNorm(Linear(z))."""
        z = z + self.token_pos
        return F.pad(z, (0, self.width - z.shape[-1])) + self.token_ln(self.token_fc(z))

    def velocity(self, x_t, t, projected):
        """x_t (B,C,H,W), t (B,) or (1,), projected tokens (B,K,width) -> v (B,C,H,W)."""
        B, C, H, W = x_t.shape
        p = self.patch
        x = x_t.view(B, C, H // p, p, W // p, p)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)                      # (B,N,p*p*C)
        x = self.patch_in(x) + self.patch_pos                                          # (B,N,width)
        x = self.merge(torch.cat([projected, x], 1))                                   # (B,K+N,width)
        rotary = self.rotary(H // p)
        data = self.config["predict"] == "data"  # trained mostly near noise, it hardly learns t > 0.9: it is told 0.9
        c = self.mapping((1 - t).clamp(min=0.1 if data else 0))  # (B or 1,mapping); the authors reverse time
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():  # recompute activations in the backward pass
                x = torch.utils.checkpoint.checkpoint(block, x, c, rotary, use_reentrant=False)
            else:
                x = block(x, c, rotary)
        x = self.patch_out(self.norm_out(x[:, self.K:]))                               # (B,N,p*p*C)
        x = x.view(B, H // p, W // p, p, p, C)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        if data:  # v = (data - x_t) / (1-t), here bounded at t=1 (Li, He 2025)
            return (x - x_t) / (1 - t).clamp(min=0.01).view(-1, 1, 1, 1)
        return -x  # with time reversed, the network predicts noise - data

    def forward(self, x_t, t, z):
        return self.velocity(x_t, t, self.project(z))

# ---- The SD VAE (kl-f8, Rombach 2022), frozen, with the tensor names of diffusers
class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, with a residual; (B,channels,H,W) -> (B,out,H,W)."""
    def __init__(self, channels, out):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, out, eps=1e-6)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(y)))

class SpatialAttention(nn.Module):
    """Residual self-attention over all positions with one head, (B,C,H,W) -> the same."""
    def __init__(self, channels):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).mT[:, None]             # (B,1,H*W,C)
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        return x + self.to_out[0](y[:, 0]).mT.reshape(x.shape)

class Level(nn.Module):
    """ResBlocks at one resolution, then H and W are halved (scale -1), doubled (1) or kept (0)."""
    def __init__(self, channels, out, blocks, scale):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(channels if i == 0 else out, out) for i in range(blocks))
        resample = nn.ModuleDict({"conv": nn.Conv2d(out, out, 3, 2) if scale < 0 else nn.Conv2d(out, out, 3, 1, 1)})
        self.downsamplers = nn.ModuleList([resample] if scale < 0 else [])
        self.upsamplers = nn.ModuleList([resample] if scale > 0 else [])

    def forward(self, x):
        for block in self.resnets:
            x = block(x)
        for down in self.downsamplers:
            x = down.conv(F.pad(x, (0, 1, 0, 1)))  # padded on the right and at the bottom only
        for up in self.upsamplers:
            x = up.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x

class VAEHalf(nn.Module):
    """The VAE's encoder (two ResBlocks a level, downwards) or decoder (three, upwards), with attention in between."""
    def __init__(self, channels, inputs, outputs, encoder):
        super().__init__()
        widths = [channels[0], *channels] if encoder else [channels[-1], *reversed(channels)]
        blocks = 2 if encoder else 3
        scales = [-1 if encoder else 1] * (len(channels) - 1) + [0]
        levels = nn.ModuleList(Level(a, b, blocks, scale) for a, b, scale in zip(widths, widths[1:], scales))
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        pair = nn.ModuleList(ResBlock(channels[-1], channels[-1]) for _ in range(2))
        self.mid_block = nn.ModuleDict({"resnets": pair, "attentions": nn.ModuleList([SpatialAttention(channels[-1])])})
        self.down_blocks = levels if encoder else nn.ModuleList()
        self.up_blocks = nn.ModuleList() if encoder else levels
        self.conv_norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x):
        first, second = self.mid_block.resnets
        middle = (first, *self.mid_block.attentions, second)
        for part in (self.conv_in, *self.down_blocks, *middle, *self.up_blocks):
            x = part(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

class VAE(nn.Module):
    """Images (B,3,H,W) in [-1,1], H and W multiples of `factor` <-> latents (B,4,H/8,W/8) of about unit variance."""
    def __init__(self, channels=(128, 256, 512, 512), latent=4, scale=0.18215):
        super().__init__()
        self.config = {"channels": list(channels), "latent": latent, "scale": scale}
        self.channels = latent
        self.scale = scale
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = VAEHalf(channels, 3, 2 * latent, encoder=True)
        self.decoder = VAEHalf(channels, latent, 3, encoder=False)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def posterior(self, x):
        """(B,3,H,W) -> mean, log-variance, each (B,4,H/8,W/8), unscaled; log-variance within [-30,20]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, mean, logvar, noise):
        """Latents: a sample of the posterior times `scale`; noise ~ N(0,I) like mean."""
        return self.scale * (mean + (0.5 * logvar).exp() * noise)

    def decode(self, latents):
        """Latents (B,4,h,w) -> images (B,3,8h,8w), about [-1,1], not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scale))

class PixelSpace(nn.Module):
    """Takes the place of a VAE where the latents are the pixels themselves, (B,3,H,W) in [-1,1]; nothing is random."""
    channels = 3
    factor = 1
    config = {}

    def posterior(self, x):
        return x, torch.zeros_like(x)

    def sample(self, mean, logvar, noise):
        return mean

    def decode(self, latents):
        return latents

# ---- Below: reading the VAE's file. Nothing about the method.
class Inert:
    """Stands for each class and function that a file names."""
    def __init__(self, *args):
        """Takes any arguments and does nothing."""
    __setstate__ = __init__

def read_safetensors(path):
    """{name: tensor} of a .safetensors file: the length of a JSON header, the header, raw bytes; float tensors only."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        for name, entry in header.items():
            if entry.get("dtype") in dtypes:
                start, end = entry["data_offsets"]
                f.seek(8 + length + start)
                data = bytearray(f.read(end - start))
                tensors[name] = torch.frombuffer(data, dtype=dtypes[entry["dtype"]]).view(entry["shape"])
    return tensors

def read_tensors(path):
    """{name: tensor} of a .safetensors file or a checkpoint of torch. Raises UserError."""
    if torch.__version__ < (2, 6):  # CVE-2025-32434: weights_only ran code before
        raise UserError(f"{path} cannot be read safely by torch {torch.__version__}: install torch 2.6 or newer")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give the path of a weight file")
    try:
        with open(path, "rb") as f:
            safetensors = f.read(9)[8:] == b"{"
        if safetensors:
            return read_safetensors(path)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)  # all classes but tensors and containers
        with torch.serialization.safe_globals([(Inert, name) for name in names]):  # no code of the file runs
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        content = content.get("state_dict", content)
        return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    except Exception as e:  # whatever goes wrong here, the reason is the file
        raise UserError(f"{path}: damaged, or not a weight file of safetensors or torch >= 1.6; get it again") from e

# names of CompVis -> names of diffusers; CompVis counts the levels of the decoder from the full resolution
COMPVIS = [
    ("first_stage_model.", ""), (".nin_shortcut.", ".conv_shortcut."), (".mid.attn_1.", ".mid_block.attentions.0."),
    (".mid.block_1.", ".mid_block.resnets.0."), (".mid.block_2.", ".mid_block.resnets.1."), (".norm.", ".group_norm."),
    (".norm_out.", ".conv_norm_out."), (".proj_out.", ".to_out.0."), (".down.", ".down_blocks."),
    (".block.", ".resnets."), (".downsample.", ".downsamplers.0."), (".upsample.", ".upsamplers.0."),
    *((f".{name}.", f".to_{name}.") for name in "qkv"), *((f".up.{i}.", f".up_blocks.{3 - i}.") for i in range(4))]
OLD_DIFFUSERS = [(".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0.")]

def vae_from(tensors, path):
    """A frozen float32 VAE from {name: tensor} of diffusers, CompVis or a whole Stable Diffusion. Raises UserError."""
    prefix = "first_stage_model." if any(name.startswith("first_stage_model.") for name in tensors) else ""
    table = COMPVIS if any(".mid.block_1." in name for name in tensors) else OLD_DIFFUSERS
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith(prefix) or name.startswith(("loss.", "model_ema.")) or not tensor.is_floating_point():
            continue
        for old, new in table:
            name = name.replace(old, new)
        if "attentions" in name and tensor.ndim == 4:  # CompVis has 1x1 convolutions there
            tensor = tensor.flatten(1)
        found[name] = tensor.to(torch.float32, copy=True)  # a copy, because the file may change
    biases = [found.get(f"encoder.down_blocks.{i}.resnets.0.conv1.bias", torch.empty(128)) for i in range(4)]
    with torch.device("meta"):
        vae = VAE([bias.numel() // 32 * 32 for bias in biases])  # GroupNorm takes multiples of 32
    try:
        vae.load_state_dict(found, assign=True)
    except RuntimeError as e:
        raise UserError(f"{path}: not an SD VAE (kl-f8); give another file ({' '.join(str(e).split()):.500})") from e
    return vae.requires_grad_(False)

def load_vae(path):
    """The SD VAE from a diffusers .safetensors or a CompVis .ckpt; the tensor names tell which. Raises UserError."""
    return vae_from(read_tensors(path), path).to(memory_format=torch.channels_last)  # fastest for convolutions
