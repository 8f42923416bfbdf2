"""Noise to tokens: an MLP-Mixer that learns the flow of the tokens (RepTok, arXiv 2510.14630).

Where an image is one token there is little to attend to: MLPs across the tokens and across the
channels do. With normalised tokens z and noise (B,1,768), times t (B,) from 0 (noise) to 1 (data),
and labels (B,):

    mixer = Mixer(num_classes=1000)                    # the paper's: hidden 1280, depth 28
    s = t[:, None, None]
    z_t = (1 - s) * noise + s * z
    v = mixer(z_t, t, labels)
    loss = (v - (z - noise)).square().mean()                                   # Eq. 1 on tokens

The file needs only torch and the standard library. Letters in shapes: B batch, K tokens of an
image, S all tokens of the Mixer, D width of a token, L words of a text, C width of a text.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class UserError(ValueError):
    """An error that the user can correct: one sentence that names the setting.

    tokenizer.py, decoder.py, mixer.py and fid.py each work alone and have a UserError each. They
    share ValueError: code that uses several of the files catches that.
    """


class Mixer(nn.Module):
    """Predicts the velocity of the flow from noise to normalised tokens.

    Its sequence of S tokens: the K noisy ones, one for the class, four learned ones if there is
    text (Sec. 4.2), and one for the time.

    forward: z_t (B,K,D), t (B,), (1,) or () in [0,1], labels (B,) long, text (B,L,C), mask (B,L)
    bool, True for words, False for padding -> v (B,K,D). t () may be on the CPU.

    K, D            number and width of the tokens
    hidden, depth   width and number of the layers
    num_classes     0: there are no labels. The label `num_classes` means "no class"
    token_hidden    width of the MLPs across tokens; by default 2 S (the paper: "expansion 2")
    channel_hidden  width of the MLPs across channels; by default 4 hidden (the paper: "4")
    time_scale      factor of t before the sinusoids, which were made for times up to 1000
    text_width      C; None or 0: there is no text. A mask that is all False means "no text"

    Raises UserError, a ValueError, where `hidden` is smaller than D. The velocity is a linear map
    of `hidden` numbers, so it moves a token in no more than so many directions, and in all others
    the starting noise would stay. The last norm takes one direction more: choose more than D.
    """

    def __init__(self, K=1, D=768, hidden=1280, depth=28, num_classes=1000, token_hidden=None,
                 channel_hidden=None, time_scale=1000.0, text_width=None):
        super().__init__()
        if hidden < D:
            raise UserError(f"a Mixer of width {hidden} cannot generate tokens of width {D}; "
                            f"give hidden={D + 1} or more")

        S = K + 1
        if num_classes:
            S += 1
        if text_width:
            S += 4
        if token_hidden is None:
            token_hidden = 2 * S
        if channel_hidden is None:
            channel_hidden = 4 * hidden

        self.config = dict(
            K=K, D=D, hidden=hidden, depth=depth, num_classes=num_classes,
            token_hidden=token_hidden, channel_hidden=channel_hidden, time_scale=time_scale,
            text_width=text_width)
        self.K = K
        self.D = D
        self.num_classes = num_classes

        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, K, D))
        self.time = TimeEmbedding(D, time_scale)
        if num_classes:
            self.label = nn.Embedding(num_classes + 1, D)
        else:
            self.label = None

        self.proj_in = nn.Linear(D, hidden)
        self.layers = nn.ModuleList(
            Layer(S, hidden, token_hidden, channel_hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden)
        self.proj_out = nn.Linear(hidden, D)

        # One cross-attention per layer; without text the list is empty.
        self.cross = nn.ModuleList()
        if text_width:
            self.cross.extend(CrossAttention(hidden, text_width) for _ in range(depth))
            self.queries = nn.Parameter(0.02 * torch.randn(1, 4, D))
            self.null_text = nn.Parameter(0.02 * torch.randn(text_width))
            # Language models differ in scale.
            self.text_norm = nn.LayerNorm(text_width, elementwise_affine=False)

    def forward(self, z_t, t, labels=None, text=None, mask=None):
        B = len(z_t)
        # A sum brings a t () on the CPU to the device. A copy would wait for the device.
        t = t + torch.zeros(1, device=z_t.device)                       # (B,) or (1,)

        sequence = [z_t + self.pos_embed]                               # (B,K,D)
        if self.label is not None:
            sequence.append(self.label(labels)[:, None])                # (B,1,D)
        if self.cross:
            sequence.append(self.queries.expand(B, -1, -1))             # (B,4,D)
            text, mask = self.read_text(text, mask)                     # (B,L,C), (B,L)
        sequence.append(self.time(t)[:, None].expand(B, -1, -1))        # (B,1,D)

        x = self.proj_in(torch.cat(sequence, 1))                        # (B,S,hidden)
        for i, layer in enumerate(self.layers):
            if self.cross:
                x = x + self.cross[i](x, text, mask)
            x = layer(x)
        return self.proj_out(self.norm(x[:, :self.K]))                  # (B,K,D)

    def read_text(self, text, mask):
        """Text (B,L,C) and mask (B,L), normalised, and with a learned word where there is none.

        Attention needs at least one word. If the mask is all False, null_text becomes the first.
        """
        no_text = ~mask.any(1, keepdim=True)                            # (B,1)
        first = torch.arange(mask.shape[1], device=mask.device) == 0    # (L,)
        null = no_text & first                                          # (B,L)
        text = torch.where(null[..., None], self.null_text, self.text_norm(text))
        return text, mask | null


def guided(mixer, labels=None, text=None, mask=None, scale=1.5, interval=(0.3, 0.9)):
    """Classifier-free guidance (Ho 2022), as a function velocity(z_t (B,K,D), t) -> (B,K,D).

    With c and u, the velocities with and without the condition, it gives u + scale (c - u) while t
    is in `interval`, ends included, and c at other times (Kynkaanniemi 2024). labels, text, mask:
    the condition, as Mixer takes it. scale 1 means no guidance. t is () or (1,); on the CPU, it is
    compared without waiting for the device.
    """
    def velocity(z_t, t):
        condition = labels is not None or text is not None
        if not condition or scale == 1 or not interval[0] <= t <= interval[1]:
            return mixer(z_t, t, labels=labels, text=text, mask=mask)

        # Both run as one batch: the first half has the condition, the second has none.
        twice = {}
        if labels is not None:
            none = torch.full_like(labels, mixer.num_classes)
            twice["labels"] = torch.cat([labels, none])                 # (2B,)
        if text is not None:
            twice["text"] = torch.cat([text, text])                     # (2B,L,C)
            twice["mask"] = torch.cat([mask, torch.zeros_like(mask)])   # (2B,L)
        both = mixer(torch.cat([z_t, z_t]), t, **twice)                 # (2B,K,D)
        c, u = both.chunk(2)
        return u + scale * (c - u)
    return velocity


# ---- Below: the parts of the Mixer
class Layer(nn.Module):
    """An MLP across the tokens, then one across the channels (Tolstikhin 2021).

    forward: (B,S,hidden) -> the same
    """

    def __init__(self, S, hidden, token_hidden, channel_hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden)
        self.tokens = MLP(S, token_hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.channels = MLP(hidden, channel_hidden)

    def forward(self, x):
        y = self.norm1(x).mT                                            # (B,hidden,S)
        x = x + self.tokens(y).mT
        return x + self.channels(self.norm2(x))


class MLP(nn.Module):
    """Linear, exact GELU, Linear over the last axis.

    The second starts at zero, so a layer starts as the identity.
    """

    def __init__(self, width, hidden):
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class TimeEmbedding(nn.Module):
    """Time t (B,) in [0,1] -> (B,width), in float32: 256 sinusoids of scale * t, then an MLP."""

    def __init__(self, width, scale):
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        # bfloat16 would round the sinusoids to 8 bits.
        with torch.autocast(t.device.type, enabled=False):
            freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
            angles = self.scale * t.float()[:, None] * freqs            # (B,128)
            features = torch.cat([angles.cos(), angles.sin()], -1)      # (B,256)
            return self.mlp(features)


class CrossAttention(nn.Module):
    """Tokens x (B,S,hidden) attend to text (B,L,C) where mask (B,L) is True -> (B,S,hidden).

    It starts at zero, so that text changes nothing at first. Heads are 64 wide.
    """

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
        q = self.into_heads(self.q(self.norm(x)))                       # (B,heads,S,hidden/heads)
        k, v = self.kv(text).chunk(2, -1)                               # each (B,L,hidden)
        k = self.into_heads(k)                                          # (B,heads,L,hidden/heads)
        v = self.into_heads(v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))                   # (B,S,hidden)

    def into_heads(self, x):
        """(B,n,hidden) -> (B,heads,n,hidden/heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
