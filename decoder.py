"""Tokens to images: a transformer that decodes K tokens into latents (RepTok, arXiv 2510.14630).

It learns the flow from noise to data. Time t runs from 0 (noise) to 1 (data), on straight paths:

    x_t = (1-t) noise + t data
    loss = mean of (v - (data - noise))^2, with v = D(x_t, t, z)                         (Eq. 1)

In code, with SD-VAE latents and noise (B,4,32,32), tokens z (B,1,768) and times t (B,):

    decoder = Decoder()                                # the paper's: width 1152, depth 28, 16 heads
    s = t[:, None, None, None]
    x_t = (1 - s) * noise + s * latents
    v = decoder(x_t, t, z)
    loss = (v - (latents - noise)).square().mean()
    latents = euler(lambda x, t: decoder(x, t, z), noise, steps=50)
    images = load_vae("diffusion_pytorch_model.safetensors").decode(latents)

The file needs only torch and the standard library. First the method, then the parts of the
decoder, then the SD VAE, and at the end the reading of its file. Letters in shapes: B batch,
K tokens of an image, N patches, C channels of a latent, M width of the condition, d channels of
one head.
"""
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class UserError(ValueError):
    """An error that the user can correct: one sentence that names the file or the option.

    tokenizer.py, decoder.py, mixer.py and fid.py each work alone and have a UserError each. They
    share ValueError: code that uses several of the files catches that.
    """


def euler(velocity, x, steps):
    """Follows dx/dt = velocity(x, t) from noise (t=0) to data (t=1) in equal steps of 1/steps.

    x: the noise, any shape. velocity is asked at t = 0, 1/steps, ... 1 - 1/steps, never at t=1;
    t is a tensor of one number, of the shape (). Returns the data, shaped like x.
    """
    for i in range(steps):
        # t is made on the CPU: `guided` compares it, and would wait for a device.
        t = torch.tensor(i / steps)
        x = x + velocity(x, t) / steps
    return x


class Decoder(nn.Module):
    """Predicts the velocity of the flow, given the tokens z of an image (Sec. 3 of the paper).

    The projected tokens stand in front of the noisy patches, all attend to all, and the tokens'
    outputs are dropped. Time enters through the norms, which it scales.

    forward: x_t (B,C,size,size), t (B,), (1,) or () in [0,1], z (B,K,token_dim) -> v like x_t.
    t () may be on the CPU, as euler gives it.

    channels, size     C and side of the latents
    patch              side of a patch, in latent pixels
    width, depth       of the transformer
    heads              of its attention
    mapping            M, the width of the condition, into which the time is mapped
    token_dim, K       width and number of the tokens
    learned_positions  whether each patch gets a learned vector, besides RoPE
    predict            what the network puts out: "velocity", as in the paper, or "data", from which
                       the velocity is computed (Li, He 2025)
    t_max              the largest time that the network is told; it was hardly trained at later
                       ones

    Raises UserError, a ValueError, where `size` is no multiple of `patch`, and a plain ValueError
    on other settings that do not fit together.
    """

    def __init__(self, channels=4, size=32, patch=2, width=1152, depth=28, heads=16, mapping=1024,
                 token_dim=768, K=1, learned_positions=False, predict="velocity", t_max=1.0):
        super().__init__()
        if size % patch:
            raise UserError(f"latents of size {size} do not divide into patches of {patch}; "
                            "choose other --pixels")
        if width % (8 * heads):
            # RoPE turns pairs, for rows and for columns, in one half of each head: 2 * 2 * 2.
            raise ValueError(f"width {width} must be a multiple of 8 * {heads} heads")
        if predict not in ("velocity", "data"):
            raise ValueError(f"predict {predict!r} must be 'velocity' or 'data'")

        self.config = dict(
            channels=channels, size=size, patch=patch, width=width, depth=depth, heads=heads,
            mapping=mapping, token_dim=token_dim, K=K, learned_positions=learned_positions,
            predict=predict, t_max=t_max)
        self.patch = patch
        self.width = width
        self.K = K
        self.predict = predict
        self.t_max = t_max
        # If True, the backward pass computes the blocks' activations again, to save their memory.
        self.checkpointing = False

        self.mapping = Mapping(mapping)

        # Learned positions of the tokens, which tell K tokens apart; for K=1 it is a bias.
        self.token_pos = nn.Parameter(torch.zeros(1, K, token_dim))
        self.token_fc = nn.Linear(token_dim, width)
        self.token_ln = nn.LayerNorm(width)

        self.patch_in = nn.Linear(patch * patch * channels, width, bias=False)
        self.merge = nn.Linear(width, width, bias=False)

        # From RoPE alone, a short training learns too slowly where a patch is.
        if learned_positions:
            self.patch_pos = nn.Parameter(0.5 * torch.randn(1, (size // patch) ** 2, width))
        else:
            self.patch_pos = None

        self.blocks = nn.ModuleList(Block(width, heads, mapping) for _ in range(depth))
        self.norm_out = RMSNorm(width)
        self.patch_out = nn.Linear(width, patch * patch * channels, bias=False)

        # RoPE's frequencies go from pi to 10 pi in geometric steps. They are dealt to the heads in
        # turn: the first head gets numbers 0, heads, 2 heads, ... Rows and columns have the same.
        freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), width // 8 + 1)[:-1].exp()
        freqs = freqs.view(-1, heads).T                                 # (heads,d/8)
        self.register_buffer("freqs", torch.stack([freqs, freqs]))      # (2,heads,d/8)

        self.zero_init()

    def zero_init(self):
        """At the start the last layer puts out 0, every block is the identity, and a single token
        that is no wider than the decoder enters as it is.
        """
        nn.init.zeros_(self.patch_out.weight)
        for block in self.blocks:
            nn.init.zeros_(block.attn.out_proj.weight)
            nn.init.zeros_(block.ff.down_proj.weight)
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm2.linear.weight)
        for block in self.mapping.blocks:
            nn.init.zeros_(block.down_proj.weight)

        # In a decoder narrower than a token the projection is all that enters (see project). Zeros
        # there would keep the gradient from the class-token embedding.
        if self.width >= self.token_fc.in_features:
            nn.init.zeros_(self.token_fc.weight)
            nn.init.zeros_(self.token_fc.bias)

        # Equal positions would make K tokens interchangeable.
        if self.K > 1:
            nn.init.normal_(self.token_pos, std=0.5)

    def project(self, z):
        """Tokens z (B,K,token_dim) -> (B,K,width), what the transformer reads.

        A decoder at least as wide as a token reads the token itself, padded with zeros, plus
        LayerNorm(Linear(z)). A narrower one reads LayerNorm(Linear(z)) alone.
        """
        z = z + self.token_pos
        projected = self.token_ln(self.token_fc(z))                     # (B,K,width)
        if self.width < z.shape[-1]:
            return projected
        return F.pad(z, (0, self.width - z.shape[-1])) + projected

    def rotary(self, side):
        """RoPE's cosines and sines at each position, both (K+N,heads,d/4), for side x side patches.

        A patch is placed by its centre in the square from -1 to 1, row first. For two patches a
        side the centres are -0.5 and 0.5:

            patch     0     1     2     3
            row    -0.5  -0.5   0.5   0.5
            column -0.5   0.5  -0.5   0.5
        """
        centres = (2 * torch.arange(side, device=self.freqs.device) + 1) / side - 1
        rows = centres.repeat_interleave(side)                          # (N,)
        columns = centres.repeat(side)                                  # (N,)

        # The tokens have no place in the image. At (0, 0) they are not rotated.
        rows = F.pad(rows, (self.K, 0))[:, None, None]                  # (K+N,1,1)
        columns = F.pad(columns, (self.K, 0))[:, None, None]            # (K+N,1,1)

        # Half of the angles tell the row, half the column.
        row_angles = rows * self.freqs[0]                               # (K+N,heads,d/8)
        column_angles = columns * self.freqs[1]                         # (K+N,heads,d/8)
        angles = torch.cat([row_angles, column_angles], -1)             # (K+N,heads,d/4)
        return angles.cos(), angles.sin()

    def forward(self, x_t, t, z):
        # A sum brings euler's t () to the device. A copy would wait for the device.
        t = t + torch.zeros(1, device=x_t.device)                       # (B,) or (1,)

        tokens = self.project(z)                                        # (B,K,width)
        patches = self.patch_in(to_patches(x_t, self.patch))            # (B,N,width)
        if self.patch_pos is not None:
            patches = patches + self.patch_pos
        x = self.merge(torch.cat([tokens, patches], 1))                 # (B,K+N,width)

        # Of times that its training hardly drew, the network knows nothing: it is not told them.
        c = self.mapping(t.clamp(max=self.t_max))                       # (B,M) or (1,M)

        rotary = self.rotary(x_t.shape[-1] // self.patch)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, c, rotary, use_reentrant=False)
            else:
                x = block(x, c, rotary)

        x = self.patch_out(self.norm_out(x[:, self.K:]))                # (B,N,patch*patch*C)
        output = from_patches(x, self.patch, x_t.shape)                 # (B,C,size,size)
        if self.predict == "velocity":
            return output

        # The output is the data. From x_t, (1-t) (data - noise) are left to go: v = rest / (1-t).
        # The bound only keeps a t that was rounded to 1 from dividing by zero.
        left = (1 - t).clamp(min=1e-6)
        return (output - x_t) / left[:, None, None, None]


# ---- Below: the parts of the decoder
def to_patches(x, p):
    """Images (B,C,H,W) -> patches (B,N,p*p*C), row by row; a patch holds (row, column, channel)."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 3, 5, 1)                                     # (B,H/p,W/p,p,p,C)
    return x.reshape(B, -1, p * p * C)


def from_patches(x, p, shape):
    """The way back: patches (B,N,p*p*C) -> images of this shape (B,C,H,W)."""
    B, C, H, W = shape
    x = x.view(B, H // p, W // p, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)                                     # (B,C,H/p,p,W/p,p)
    return x.reshape(B, C, H, W)


class Block(nn.Module):
    """Self-attention, then SwiGLU, both residual.

    forward: x (B,K+N,width), condition c (B,M), rotary (see Decoder.rotary) -> like x
    """

    def __init__(self, width, heads, condition):
        super().__init__()
        self.norm1 = RMSNorm(width, condition)
        self.attn = Attention(width, heads)
        self.norm2 = RMSNorm(width, condition)
        self.ff = SwiGLU(width)

    def forward(self, x, c, rotary):
        x = x + self.attn(self.norm1(x, c), rotary)
        return x + self.ff(self.norm2(x, c))


class Attention(nn.Module):
    """Cosine attention with RoPE, (B,N,width) -> the same.

    Every q and k of a head has the length sqrt(scale), so that q k^T is scale * cosine. It is not
    divided by sqrt(d).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.full((heads,), 10.0))

    def forward(self, x, rotary):
        B, N, D = x.shape
        qkv = self.qkv_proj(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.unbind(2)                                         # each (B,N,heads,d)

        length = self.scale.sqrt()[:, None]                             # (heads,1)
        q = rotate(normalize(q, length), rotary).to(v.dtype)
        k = rotate(normalize(k, length), rotary).to(v.dtype)

        q = q.transpose(1, 2)                                           # (B,heads,N,d)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.out_proj(x)


def normalize(x, length):
    """Gives each vector of x (B,N,heads,d) the length (heads,1), in float32."""
    x = x.float()
    return x * (length * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6))


def rotate(x, rotary):
    """RoPE (Su 2021), x (B,N,heads,d) -> the same; cosines and sines, each (N,heads,d/4).

    The first quarter of the channels and the second are the two coordinates of d/4 points, which
    turn. The second half of the channels stays as it is.
    """
    cos, sin = rotary
    n = cos.shape[-1]
    a, b, rest = x.split([n, n, x.shape[-1] - 2 * n], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


class SwiGLU(nn.Module):
    """A linear map to (value, gate), value * silu(gate), a linear map back (Shazeer 2020)."""

    def __init__(self, width):
        super().__init__()
        self.up_proj = nn.Linear(width, 6 * width, bias=False)
        self.down_proj = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        value, gate = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(value * F.silu(gate))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32.

    Without a condition, x has any shape (...,width) and the scale is learned. With a condition
    c (B,M), x is (B,N,width) and the scale is 1 + linear(c).
    """

    def __init__(self, width, condition=None):
        super().__init__()
        if condition is None:
            self.scale = nn.Parameter(torch.ones(width))
        else:
            self.linear = nn.Linear(condition, width, bias=False)

    def forward(self, x, c=None):
        if c is None:
            scale = self.scale                                          # (width,)
        else:
            # bfloat16 would round 1 + linear(c) to 8 bits.
            with torch.autocast(x.device.type, enabled=False):
                scale = 1 + self.linear(c)[:, None]                     # (B,1,width)
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)
        return (normed * scale).to(x.dtype)


class Mapping(nn.Module):
    """Time t (B,) in [0,1] -> condition c (B,M).

    Random Fourier features cos(2 pi f t) and sin(2 pi f t), with frequencies f that are drawn once
    and stored, then two residual SwiGLU blocks (Crowson 2024).
    """

    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", torch.randn(width // 2, 1))
        self.in_proj = nn.Linear(width, width, bias=False)
        self.in_norm = RMSNorm(width)
        self.out_norm = RMSNorm(width)
        self.norms = nn.ModuleList(RMSNorm(width) for _ in range(2))
        self.blocks = nn.ModuleList(SwiGLU(width) for _ in range(2))

    def forward(self, t):
        # bfloat16 holds only 129 times from 0.5 to 1.
        with torch.autocast(t.device.type, enabled=False):
            angles = 2 * math.pi * t.float()[:, None] * self.freqs[:, 0]    # (B,M/2)
            features = torch.cat([angles.cos(), angles.sin()], -1)          # (B,M)
            c = self.in_norm(self.in_proj(features))
            for norm, block in zip(self.norms, self.blocks):
                c = c + block(norm(c))
            return self.out_norm(c)


# ---- Below: the SD VAE (kl-f8, Rombach 2022), frozen, with the tensor names of diffusers
class VAE(nn.Module):
    """Images (B,3,H,W) in [-1,1], H and W multiples of `factor` <-> latents (B,C,H/8,W/8).

    widths: channels inside, a level each; every level but the last halves H and W. channels: C of
    the latents. scale: a latent is `scale` times a sample of the posterior, about of variance 1.
    `posterior` and `decode` work on AT_ONCE images at a time: inside, an image of 256 pixels takes
    about 170 MB of memory.
    """
    AT_ONCE = 16

    def __init__(self, widths=(128, 256, 512, 512), channels=4, scale=0.18215):
        super().__init__()
        self.config = dict(widths=list(widths), channels=channels, scale=scale)
        self.channels = channels
        self.scale = scale
        self.factor = 2 ** (len(widths) - 1)

        self.encoder = VAEEncoder(widths, channels)
        self.decoder = VAEDecoder(widths, channels)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def posterior(self, x):
        """Images (B,3,H,W) -> mean and log-variance, each (B,C,H/8,W/8), not scaled.

        The log-variance is kept within [-30,20].
        """
        parts = [self.quant_conv(self.encoder(part)) for part in x.split(self.AT_ONCE)]
        mean, logvar = torch.cat(parts).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, mean, logvar, noise):
        """Latents, scaled: a sample of the posterior. noise ~ N(0,I), shaped like mean."""
        return self.scale * (mean + (0.5 * logvar).exp() * noise)

    def decode(self, latents):
        """Latents (B,C,h,w) -> images (B,3,8h,8w), about in [-1,1], not clamped."""
        parts = (latents / self.scale).split(self.AT_ONCE)
        return torch.cat([self.decoder(self.post_quant_conv(part)) for part in parts])


class PixelSpace(nn.Module):
    """Takes the place of a VAE where the latents are the pixels themselves; nothing is random.

    Images and latents are the same (B,3,H,W) in [-1,1].
    """
    channels = 3
    factor = 1
    config = {}

    def posterior(self, x):
        return x, torch.zeros_like(x)

    def sample(self, mean, logvar, noise):
        return mean

    def decode(self, latents):
        return latents


class VAEEncoder(nn.Module):
    """Images (B,3,H,W) -> (B,2C,H/8,W/8). From level to level, H and W are halved."""

    def __init__(self, widths, channels):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.down_blocks.append(DownLevel(before, width, last))
            before = width
        self.mid_block = Middle(before)
        self.conv_norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 2 * channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAEDecoder(nn.Module):
    """Latents (B,C,h,w) -> images (B,3,8h,8w). From level to level, h and w are doubled."""

    def __init__(self, widths, channels):
        super().__init__()
        widths = list(reversed(widths))
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0])
        self.up_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            self.up_blocks.append(UpLevel(before, width, last))
            before = width
        self.conv_norm_out = nn.GroupNorm(32, before, eps=1e-6)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid_block(x)
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class DownLevel(nn.Module):
    """Two ResBlocks, then half of the resolution, except on the last level.

    The modules stand in lists, even if there is only one, because the stored names have a number
    there.
    """

    def __init__(self, before, width, last):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(before, width), ResBlock(width, width)])
        self.downsamplers = nn.ModuleList()
        if not last:
            self.downsamplers.append(Downsample(width))

    def forward(self, x):
        for part in (*self.resnets, *self.downsamplers):
            x = part(x)
        return x


class UpLevel(nn.Module):
    """Three ResBlocks, then twice the resolution, except on the last level."""

    def __init__(self, before, width, last):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResBlock(before, width), ResBlock(width, width), ResBlock(width, width)])
        self.upsamplers = nn.ModuleList()
        if not last:
            self.upsamplers.append(Upsample(width))

    def forward(self, x):
        for part in (*self.resnets, *self.upsamplers):
            x = part(x)
        return x


class Downsample(nn.Module):
    """(B,C,H,W) -> (B,C,H/2,W/2). Zeros are added on the right and at the bottom only."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B,C,H,W) -> (B,C,2H,2W): every pixel four times, then a convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution, (B,C,H,W) -> the same."""

    def __init__(self, width):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(width, width), ResBlock(width, width)])
        self.attentions = nn.ModuleList([SpatialAttention(width)])

    def forward(self, x):
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, residual; (B,before,H,W) -> (B,width,H,W)."""

    def __init__(self, before, width):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, before, eps=1e-6)
        self.conv1 = nn.Conv2d(before, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(32, width, eps=1e-6)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        if before == width:
            self.conv_shortcut = nn.Identity()
        else:
            self.conv_shortcut = nn.Conv2d(before, width, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.conv_shortcut(x) + y


class SpatialAttention(nn.Module):
    """Self-attention over all positions, one head, residual; (B,C,H,W) -> the same."""

    def __init__(self, width):
        super().__init__()
        self.group_norm = nn.GroupNorm(32, width, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        y = self.group_norm(x).flatten(2).mT[:, None]                   # (B,1,H*W,C), one head
        y = F.scaled_dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
        y = self.to_out[0](y[:, 0])                                     # (B,H*W,C)
        return x + y.mT.reshape(x.shape)


# ---- Below: reading the VAE's file. Nothing about the method.
# Older files of diffusers have other names in the attention.
OLD_NAMES = [
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
]
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_vae(path):
    """The SD VAE in diffusers' layout, from .safetensors or .bin (torch).

    Raises UserError, a ValueError.
    """
    vae = vae_from(read_tensors(path), path)
    # This memory layout is the fastest for convolutions.
    return vae.to(memory_format=torch.channels_last)


def vae_from(tensors, path):
    """A frozen float32 VAE from {name: tensor} in diffusers' layout; `path` is for the error.

    The widths are read off the tensors. Raises UserError, a ValueError, where names or shapes are
    others.
    """
    found = {}
    for name, tensor in tensors.items():
        for old, new in OLD_NAMES:
            name = name.replace(old, new)
        # A copy, because `tensor` may be a view of the file, which may change.
        found[name] = tensor.to(torch.float32, copy=True)
    try:
        widths = [len(found[f"encoder.down_blocks.{i}.resnets.0.conv1.bias"]) for i in range(4)]
        with torch.device("meta"):
            vae = VAE(widths)
        vae.load_state_dict(found, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        why = " ".join(str(e).split())[:500]
        raise UserError(f"{path}: not an SD VAE (kl-f8) in diffusers' layout; "
                        f"give diffusion_pytorch_model.safetensors ({why})") from e
    return vae.requires_grad_(False)


def read_tensors(path):
    """{name: tensor} of a .safetensors file, or of a dict that torch saved.

    Raises UserError, a ValueError.
    """
    # CVE-2025-32434 and CVE-2026-24747: before, a file could run code in spite of weights_only.
    if torch.__version__ < (2, 10):
        raise UserError(f"{path} cannot be read safely by torch {torch.__version__}: "
                        "install torch 2.10 or newer")
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give the path of a weight file")
    try:
        if is_safetensors(path):
            return read_safetensors(path)
        # mmap: of a large file, only the tensors that are used take memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {name: x for name, x in content.items() if isinstance(x, torch.Tensor)}
    except Exception as e:
        # Whatever goes wrong here, the reason is the file.
        raise UserError(f"{path}: damaged, or not a weight file of safetensors or torch >= 1.6; "
                        "get it again") from e


def is_safetensors(path):
    """Whether the file begins as .safetensors do: eight bytes of a length, then JSON."""
    with open(path, "rb") as f:
        return f.read(9)[8:] == b"{"


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: length of the header, header in JSON, raw bytes.

    Tensors that are not of floats are left out.
    """
    tensors = {}
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        for name, entry in header.items():
            dtype = DTYPES.get(entry.get("dtype"))
            if dtype is None:
                continue
            start, end = entry["data_offsets"]
            f.seek(8 + length + start)
            data = bytearray(f.read(end - start))
            tensors[name] = torch.frombuffer(data, dtype=dtype).view(entry["shape"])
    return tensors
