"""Noise to tokens: an attention-free MLP-Mixer that learns the flow of the tokens (RepTok, arXiv 2510.14630).

    mixer = Mixer(classes=1000)                                   # hidden 1280, depth 28: the paper's
    s = t[:, None, None]                                          # t (B,) in [0,1]; z, noise (B,K,D); labels (B,)
    z_t = (1 - s) * noise + s * z                                 # z: normalised tokens; t=0 is noise, t=1 is data
    v = mixer(z_t, t, labels)
    flow = (v - (z - noise)).square().mean()                      # Eq. 1 on tokens

The file needs only torch and the standard library.
Letters: B batch, K tokens of an image, S all tokens of the Mixer, D width of a token, L words of a text, C text width.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

class MLP(nn.Module):
    """Linear, exact GELU, Linear over the last axis. The second starts at zero: a residual starts as the identity."""
    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))

class Layer(nn.Module):
    """A Mixer layer (Tolstikhin 2021): an MLP across the tokens, one across the channels. (B,S,hidden) -> the same."""
    def __init__(self, S, hidden, token_hidden, channel_hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.tokens = MLP(S, token_hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.channels = MLP(hidden, channel_hidden)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))

class TimeEmbedding(nn.Module):
    """t (B,) in [0,1] -> (B,D), in float32: 256 sinusoids of scale * t, then an MLP; the released Mixer has scale 1."""
    def __init__(self, width, scale):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        with torch.autocast(t.device.type, enabled=False):        # bfloat16 would round the sinusoids to 8 bits
            freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
            angle = self.scale * t.float()[:, None] * freqs                            # (B,128)
            return self.mlp(torch.cat([angle.cos(), angle.sin()], -1))                 # (B,D)

class CrossAttention(nn.Module):
    """Tokens x (B,S,hidden) attend to text (B,L,C) where mask (B,L) is True -> (B,S,hidden), zero at the start."""
    def __init__(self, hidden, text_width):
        super().__init__()
        self.heads = max(1, hidden // 64)
        self.norm = nn.LayerNorm(hidden)
        self.q = nn.Linear(hidden, hidden)
        self.kv = nn.Linear(text_width, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x, text, mask):
        qkv = self.q(self.norm(x)), *self.kv(text).chunk(2, -1)                        # (B,S,hidden), (B,L,hidden) x 2
        q, k, v = (u.unflatten(-1, (self.heads, -1)).transpose(1, 2) for u in qkv)     # (B,heads,S or L,hidden/heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))                                  # (B,S,hidden)

class Mixer(nn.Module):
    """The velocity of the flow from noise to normalised tokens.
    forward(z_t (B,K,D), t (B,) or (1,) in [0,1], classes (B,) long, text (B,L,C), mask (B,L) bool) -> v (B,K,D).
    The Mixer's S tokens are the K noisy ones, one for the class (where `classes` is not 0), four learned ones where
    there is text (Sec. 4.2; C is `text_width`), and one for time. The class number `classes`, or a text whose mask is
    all False, means "no condition": the unconditional half of guidance."""
    def __init__(self, K=1, D=768, hidden=1280, depth=28, classes=1000, token_hidden=None, channel_hidden=None,
                 time_scale=1000.0, text_width=None):
        super().__init__()
        S = K + bool(classes) + 4 * bool(text_width) + 1
        token_hidden = token_hidden or 2 * S
        channel_hidden = channel_hidden or 4 * hidden
        self.config = {name: value for name, value in locals().items() if name not in ("self", "__class__", "S")}
        self.K = K
        self.D = D
        self.classes = classes
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, K, D))
        self.time = TimeEmbedding(D, time_scale)
        self.label = nn.Embedding(classes + 1, D) if classes else None
        self.proj_in = nn.Linear(D, hidden)
        self.layers = nn.ModuleList(Layer(S, hidden, token_hidden, channel_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.proj_out = nn.Linear(hidden, D)
        self.cross = nn.ModuleList(CrossAttention(hidden, text_width) for _ in range(depth if text_width else 0))
        if text_width:
            self.queries = nn.Parameter(0.02 * torch.randn(1, 4, D))
            self.null_text = nn.Parameter(0.02 * torch.randn(text_width))
            self.text_norm = nn.LayerNorm(text_width, elementwise_affine=False)  # language models differ in scale

    def forward(self, z_t, t, classes=None, text=None, mask=None):
        B = len(z_t)
        tokens = [z_t + self.pos_embed]                                                # (B,K,D)
        if self.label is not None:
            tokens.append(self.label(classes)[:, None])                                # (B,1,D)
        if self.cross:
            tokens.append(self.queries.expand(B, -1, -1))                              # (B,4,D)
            # attention needs at least one word: if the mask is all False, null_text replaces the first
            empty = ~mask.any(1, keepdim=True)                                         # (B,1)
            first = torch.arange(mask.shape[1], device=mask.device) == 0               # (L,)
            null = empty & first                                                       # (B,L)
            text = torch.where(null[..., None], self.null_text, self.text_norm(text))  # (B,L,C)
            mask = mask | null                                                         # (B,L)
        tokens.append(self.time(t)[:, None].expand(B, -1, -1))                         # (B,1,D)
        x = self.proj_in(torch.cat(tokens, 1))                                         # (B,S,hidden)
        for i, layer in enumerate(self.layers):
            if self.cross:
                x = x + self.cross[i](x, text, mask)
            x = layer(x)
        return self.proj_out(self.norm(x[:, :self.K]))                                 # (B,K,D)

def guided(mixer, classes=None, text=None, mask=None, scale=1.5, interval=(0.3, 0.9)):
    """Classifier-free guidance (Ho 2022): the velocity u + scale (c - u) for t in `interval`, and c for other times.
    c, u: the velocities with and without the condition; they run as one batch, and c alone outside the interval
    (Kynkaanniemi 2024). classes, text, mask: as Mixer takes them. Returns velocity(z_t (B,K,D), t (1,)) -> v."""
    both = {}
    if classes is not None:
        both["classes"] = torch.cat([classes, torch.full_like(classes, mixer.classes)])    # (2B,)
    if text is not None:
        both["text"] = torch.cat([text, text])                                             # (2B,L,C)
        both["mask"] = torch.cat([mask, torch.zeros_like(mask)])                           # (2B,L)
    def velocity(z_t, t):
        if scale == 1 or not both or not interval[0] <= t <= interval[1]:
            return mixer(z_t, t, classes, text, mask)
        c, u = mixer(z_t.repeat(2, 1, 1), t, **both).chunk(2)
        return u + scale * (c - u)
    return velocity
