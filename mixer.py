"""Noise -> tokens: an attention-free MLP-Mixer that learns the flow of the tokens (RepTok, arXiv 2510.14630).

    mixer = Mixer(classes=1000)                                   # hidden 1280, depth 28: the paper's
    t, noise = torch.rand(B), torch.randn_like(z)                 # z (B,K,D): normalised tokens, t=0 noise, t=1 data
    v = mixer((1 - t)[:, None, None] * noise + t[:, None, None] * z, t, labels)
    loss = (v - (z - noise)).square().mean()                      # Eq. 1 on tokens

The file stands alone: torch only. Letters: B batch, K image tokens, S all tokens of the Mixer, D token width, L text length.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class MLP(nn.Module):
    """Linear, exact GELU, Linear, over the last axis; the second starts at zero, so that a residual starts as the identity."""

    def __init__(self, width, hidden):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """One Mixer layer (Tolstikhin 2021): an MLP across the S tokens, then one across the channels. (B,S,hidden) -> the same."""

    def __init__(self, S, hidden, token_hidden, channel_hidden):
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(hidden), MLP(S, token_hidden)
        self.norm2, self.channels = nn.LayerNorm(hidden), MLP(hidden, channel_hidden)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class TimeEmbedding(nn.Module):
    """t (B,) in [0,1] -> (B,D): 256 sinusoids, then an MLP.

    scale: 1000 spreads t over the wavelengths, which were made for 0..1000; the released Mixer was trained with 1.
    """

    def __init__(self, width, scale):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angle = self.scale * t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)  # (B,128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))


class Mixer(nn.Module):
    """Velocity of the flow from noise to normalised tokens.

    forward(z_t (B,K,D), t (B,) or (1,) in [0,1], classes (B,) long) -> v (B,K,D). The Mixer's S tokens are the K noisy ones,
    the class where there are classes, and time. Class number `classes` is "no class": the unconditional half of guidance.
    """

    def __init__(self, K=1, D=768, hidden=1280, depth=28, classes=1000, token_hidden=None, channel_hidden=None, time_scale=1000.0):
        super().__init__()
        S = K + bool(classes) + 1
        token_hidden, channel_hidden = token_hidden or 2 * S, channel_hidden or 4 * hidden
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "S")}
        self.K, self.D, self.classes = K, D, classes
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, K, D))
        self.time = TimeEmbedding(D, time_scale)
        self.label = nn.Embedding(classes + 1, D) if classes else None
        self.proj_in = nn.Linear(D, hidden)
        self.layers = nn.ModuleList(Layer(S, hidden, token_hidden, channel_hidden) for _ in range(depth))
        self.norm, self.proj_out = nn.LayerNorm(hidden), nn.Linear(hidden, D)

    def forward(self, z_t, t, classes=None):
        B = len(z_t)
        rest = [self.time(t)[:, None].expand(B, -1, -1)]                                           # (B,1,D)
        if self.label is not None:
            rest.insert(0, self.label(classes)[:, None])                                           # (B,1,D)
        x = self.proj_in(torch.cat([z_t + self.pos_embed, *rest], 1))                              # (B,S,hidden)
        for layer in self.layers:
            x = layer(x)
        return self.proj_out(self.norm(x[:, :self.K]))                                             # (B,K,D)


def guided(mixer, classes, scale=1.5, interval=(0.3, 0.9)):
    """Velocity under classifier-free guidance (Ho 2022): u + scale (c - u) while interval[0] <= t <= interval[1], else c.

    classes (B,) long. Both halves run as one batch; outside the interval (Kynkaanniemi 2024) only the conditional half runs.
    Returns velocity(z_t (B,K,D), t (1,)) -> v (B,K,D), for an ODE sampler.
    """
    def velocity(z, t):
        if scale == 1 or mixer.label is None or not interval[0] <= t.item() <= interval[1]:
            return mixer(z, t, classes)
        both = torch.cat([classes, torch.full_like(classes, mixer.classes)])
        c, u = mixer(z.repeat(2, 1, 1), t, both).chunk(2)
        return u + scale * (c - u)

    return velocity
