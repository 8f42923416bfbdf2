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


class CrossAttention(nn.Module):
    """From the Mixer's tokens to text features, keys masked by length; its output starts at zero. (B,S,hidden) -> the same."""

    def __init__(self, hidden, text_width):
        super().__init__()
        self.heads = max(1, hidden // 64)
        self.norm, self.q, self.kv = nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.Linear(text_width, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, text, mask):
        split = lambda u: u.unflatten(-1, (self.heads, -1)).transpose(1, 2)                        # (B,heads,.,hidden/heads)
        k, v = self.kv(text).chunk(2, -1)                                                          # each (B,L,hidden)
        y = F.scaled_dot_product_attention(split(self.q(self.norm(x))), split(k), split(v), attn_mask=mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))


class Mixer(nn.Module):
    """Velocity of the flow from noise to normalised tokens.

    forward(z_t (B,K,D), t (B,) or (1,) in [0,1], classes (B,) long, text (B,L,C), mask (B,L) bool) -> v (B,K,D). The Mixer's S
    tokens are the K noisy ones, the class where there are `classes`, four learned ones where there is text (Sec. 4.2; `text_width`
    is C), and time. Class number `classes`, and a text whose mask is all False, mean "none": the unconditional half of guidance.
    """

    def __init__(self, K=1, D=768, hidden=1280, depth=28, classes=1000, token_hidden=None, channel_hidden=None, time_scale=1000.0,
                 text_width=None):
        super().__init__()
        S = K + bool(classes) + 4 * bool(text_width) + 1
        token_hidden, channel_hidden = token_hidden or 2 * S, channel_hidden or 4 * hidden
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__", "S")}
        self.K, self.D, self.classes = K, D, classes
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, K, D))
        self.time = TimeEmbedding(D, time_scale)
        self.label = nn.Embedding(classes + 1, D) if classes else None
        self.proj_in = nn.Linear(D, hidden)
        self.layers = nn.ModuleList(Layer(S, hidden, token_hidden, channel_hidden) for _ in range(depth))
        self.norm, self.proj_out = nn.LayerNorm(hidden), nn.Linear(hidden, D)
        self.cross = nn.ModuleList(CrossAttention(hidden, text_width) for _ in range(depth if text_width else 0))
        if text_width:
            self.queries, self.null_text = nn.Parameter(0.02 * torch.randn(1, 4, D)), nn.Parameter(0.02 * torch.randn(text_width))
            self.text_norm = nn.LayerNorm(text_width, elementwise_affine=False)  # language models differ in scale

    def forward(self, z_t, t, classes=None, text=None, mask=None):
        B, rest = len(z_t), []
        if self.label is not None:
            rest.append(self.label(classes)[:, None])                                              # (B,1,D)
        if self.cross:
            rest.append(self.queries.expand(B, -1, -1))                                            # (B,4,D)
            none = ~mask.any(1, keepdim=True)                                                      # (B,1): no text, so one learned word
            first = torch.arange(mask.shape[1], device=mask.device) == 0                           # (L,)
            text = torch.where((none & first)[..., None], self.null_text, self.text_norm(text))    # (B,L,C)
            mask = mask | (none & first)
        rest.append(self.time(t)[:, None].expand(B, -1, -1))                                       # (B,1,D)
        x = self.proj_in(torch.cat([z_t + self.pos_embed, *rest], 1))                              # (B,S,hidden)
        for i, layer in enumerate(self.layers):
            if self.cross:
                x = x + self.cross[i](x, text, mask)
            x = layer(x)
        return self.proj_out(self.norm(x[:, :self.K]))                                             # (B,K,D)


def guided(mixer, classes=None, text=None, mask=None, scale=1.5, interval=(0.3, 0.9)):
    """Velocity under classifier-free guidance (Ho 2022): u + scale (c - u) while interval[0] <= t <= interval[1], else c.

    classes (B,) long and text (B,L,C), mask (B,L) as Mixer takes them. Both halves run as one batch; outside the interval
    (Kynkaanniemi 2024) only the conditional half runs. Returns velocity(z_t (B,K,D), t (1,)) -> v (B,K,D), for an ODE sampler.
    """
    null = (None if classes is None else torch.full_like(classes, mixer.classes), text, None if mask is None else torch.zeros_like(mask))
    both = [u if u is None else torch.cat([u, none]) for u, none in zip((classes, text, mask), null)]

    def velocity(z, t):
        if scale == 1 or (classes is None and text is None) or not interval[0] <= t <= interval[1]:
            return mixer(z, t, classes, text, mask)
        c, u = mixer(z.repeat(2, 1, 1), t, *both).chunk(2)
        return u + scale * (c - u)

    return velocity
