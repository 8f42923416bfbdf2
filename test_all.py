"""The tests:  python -m pytest -q test_all.py      Scores and timings:  python test_all.py --score CKPT ... | --bench | --fid ...

Every test compares with something that is not this code: a closed form, another implementation, figures that the published
implementations gave for weights and pictures that are functions of their names, or a property that must hold.
"""
import collections
import contextlib
import enum
import faulthandler
import functools
import gzip
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import types
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import decoder as dec
import fid
import mixer as mix
import sample  # noqa: F401  (refusal() finds scripts by name)
import tokenizer as tok
import train_stage1 as one
import train_stage2  # noqa: F401
from sample import RepTok

HERE = Path(__file__).parent
TINY = dict(width=32, depth=2, heads=2, patch=4, mapping=16)


# ---- Weights and pictures as functions of their names


def draws(name):
    return np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)


def uniform(name, shape):
    """float32, mean 0, variance 1."""
    return torch.from_numpy(np.asarray((draws(name).random_sample(tuple(shape)) * 2 - 1) * 3**0.5, np.float32))


def seeded(name, shape, gain=1.0, salt=""):
    """The weight stored under an official tensor name."""
    u = uniform(salt + name, shape)
    if name.endswith("freqs"):
        f = torch.linspace(math.log(math.pi), math.log(10 * math.pi), 145)[:-1].exp()
        return torch.stack([f, f]).view(2, 9, 16).mT.contiguous()
    if name.endswith("running_var"):
        return torch.from_numpy((draws(salt + name).random_sample(shape) + 0.5).astype(np.float32))
    if name.endswith("running_mean"):
        return 0.1 * u
    if name.endswith(("logit_scale", "num_batches_tracked")):
        return torch.tensor(3.0)
    if name.endswith(".gamma"):
        return 0.5 + 0.2 * u
    if name.endswith("self_attn.scale"):
        return 10 + 2 * u
    if name.endswith(".scale"):
        return 1 + 0.2 * u
    if re.search(r"(pos_embed|positional_embedding|cls_token|class_embedding|register_tokens|mask_token|new_reg|token_embedding\.weight)$", name):
        return 0.5 * u
    if re.search(r"^lin\d\.model", name):
        return u.abs() * 0.1
    if re.search(r"(visual\.proj|text_projection)$", name):
        return u * shape[0] ** -0.5
    if len(shape) >= 2:
        return gain * u * math.prod(shape[1:]) ** -0.5
    return 1 + 0.2 * u if name.endswith("weight") else 0.1 * u


def picture(name, batch, height, width):
    """Smooth waves plus noise, uint8 (batch,3,height,width)."""
    r, (yy, xx) = draws(name), np.mgrid[:height, :width]
    out = np.zeros((batch, 3, height, width))
    for i in range(batch):
        for c in range(3):
            fy, fx, p, q = r.random_sample(4)
            out[i, c] = 127 + 60 * np.sin(yy * (fy + 0.2) / 9 + 6 * p) + 50 * np.cos(xx * (fx + 0.2) / 13 + 6 * q)
    return np.clip(out + r.random_sample(out.shape) * 40 - 20, 0, 255).astype(np.uint8)


def signed(u8):
    return torch.from_numpy(u8).float() / 127.5 - 1


def command(script, *args, ok=True, **env):
    """Run a script of the project as a process; its output. Fails unless the exit status is 0 (or 2 with one line on stderr)."""
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, args)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "2", **env})
    if ok:
        assert done.returncode == 0, done.stderr
        return done.stdout
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, (done.returncode, done.stderr)
    return lines[0]


# ---- Flow and sampler


def test_euler_follows_an_analytic_flow():
    """dx/dt = -x has x(1) = x(0) (1 - 1/n)^n under n Euler steps, and e^-1 x(0) in the limit; t runs 0, 1/n, ..."""
    times = []
    x = dec.euler(lambda x, t: times.append(t.item()) or -x, torch.ones(3), 10)
    assert torch.allclose(x, torch.full((3,), 0.9**10)) and np.allclose(times, np.arange(10) / 10)
    assert abs(dec.euler(lambda x, t: -x, torch.ones(1), 4000).item() - math.exp(-1)) < 1e-4


def test_flow_loss_is_zero_at_the_true_velocity_and_known_elsewhere():
    x1, noise, t = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.rand(5)
    assert dec.flow_loss(lambda x_t, s: x1 - noise, x1, t, noise).abs().max() == 0
    loss = dec.flow_loss(lambda x_t, s: x_t, x1, t, noise)  # velocity = x_t: residual (1-t) n + t x - x + n
    s = t[:, None, None]
    assert torch.allclose(loss, ((2 - s) * noise - (1 - s) * x1).square().mean((1, 2)), atol=1e-6)
    assert dec.flow_loss(lambda x_t, s: x_t, x1, torch.ones(5), torch.zeros_like(x1)).abs().max() < 1e-12  # t=1 is data


def test_gaussian_flow_has_the_right_end():
    """Noise N(0,1), data N(m, s^2): the marginal velocity is known, and its ODE carries noise n to m + s n."""
    m, s = 1.5, 0.3
    def velocity(x, t):
        variance = (1 - t) ** 2 + (t * s) ** 2
        return m + (t * s**2 - (1 - t)) / variance * (x - t * m)
    n = torch.linspace(-2, 2, 9)
    assert torch.allclose(dec.euler(velocity, n, 2000), m + s * n, atol=5e-3)


# ---- Decoder


def test_decoder_starts_as_zero_and_every_block_as_the_identity():
    d = dec.Decoder(3, 16, token_dim=24, **TINY)
    x, c = torch.randn(2, 17, 32), torch.randn(2, 16)
    for block in d.blocks:
        assert torch.equal(block(x, c, d.rotary(4)), x)
    assert d(torch.randn(2, 3, 16, 16), torch.rand(2), torch.randn(2, 1, 24)).abs().max() == 0
    z = torch.randn(2, 1, 24)
    assert torch.equal(d.project(z), F.pad(z, (0, 8)))  # a token enters as itself


def busy(module):
    """Random weights everywhere, zero starts included; the scales, which are positive, stay."""
    for name, p in module.named_parameters():
        if not name.endswith("scale"):
            nn.init.normal_(p, std=0.2)
    return module


def test_decoder_attention_against_float64_formulas():
    """Cosine attention with axial RoPE, written out with loops and complex numbers."""
    torch.manual_seed(0)
    d = busy(dec.Decoder(3, 8, token_dim=24, **TINY)).double()
    attn, x = d.blocks[0].attn, torch.randn(1, 5, 32).double()
    attn.scale.data = torch.tensor([4.0, 9.0]).double()
    q, k, v = attn.qkv_proj(x)[0].view(5, 3, 2, 16).unbind(1)
    centres = [(0.0, 0.0), (-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]  # the token, then rows first
    freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), 5)[:-1].exp().double()
    out = torch.zeros(5, 2, 16).double()
    for h, s in ((0, 4.0), (1, 9.0)):
        def turned(u, n):
            u = u[n, h] * s**0.5 / (u[n, h].square().sum() + 1e-6).sqrt()
            theta = torch.cat([centres[n][0] * freqs[[h, 2 + h]], centres[n][1] * freqs[[h, 2 + h]]])
            pair = torch.complex(u[:4], u[4:8]) * torch.polar(torch.ones(4).double(), theta)
            return torch.cat([pair.real, pair.imag, u[8:]])
        for n in range(5):
            weight = torch.stack([turned(q, n) @ turned(k, j) for j in range(5)]).softmax(0)
            out[n, h] = sum(weight[j] * v[j, h] for j in range(5))
    assert torch.allclose(attn(x, d.rotary(2)), attn.out_proj(out.view(1, 5, 32)), atol=1e-5)


def test_decoder_batch_invariance_time_and_rectangles():
    d = busy(dec.Decoder(3, 16, token_dim=24, **TINY))
    x, z = torch.randn(4, 3, 16, 16), torch.randn(4, 1, 24)
    whole = d(x, torch.full((1,), 0.3), z)
    assert torch.allclose(whole, torch.cat([d(x[i:i + 1], torch.full((1,), 0.3), z[i:i + 1]) for i in range(4)]), atol=1e-5)
    assert torch.allclose(d.condition(torch.tensor([0.3])), d.mapping(torch.tensor([0.7])))  # fed 1 - t
    assert (whole - d(x, torch.full((1,), 0.31), z)).abs().max() > 1e-4
    with pytest.raises(dec.UserError, match="patches"):
        dec.Decoder(size=30, patch=4)


def test_checkpointing_gives_the_same_gradients():
    t, d, grads = tok.Tokenizer(tiny_vit()), busy(dec.Decoder(3, 16, token_dim=32, **TINY)), []
    x, s = torch.rand(2, 3, 16, 16), torch.rand(2)
    for on in (False, True):
        calls, t.vit.checkpointing, d.checkpointing = [], on, on
        hooks = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in (t.vit.blocks[0], d.blocks[0])]
        d(x, s, t(x)).square().mean().backward()
        grads.append([p.grad for p in (t.embedding, *d.parameters())])
        t.embedding.grad, _ = None, [d.zero_grad(), [hook.remove() for hook in hooks]]
        assert len(calls) == 2 + 2 * on  # each block runs twice
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*grads))


def test_multi_token_decoder_tells_tokens_apart():
    d = busy(dec.Decoder(3, 16, token_dim=24, K=3, **TINY))
    x, z = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 24)
    assert (d(x, torch.rand(2) * 0 + 0.5, z) - d(x, torch.rand(2) * 0 + 0.5, z.flip(1))).abs().max() > 1e-4


# ---- Tokenizer


def tiny_vit(**more):
    torch.manual_seed(1)
    return tok.ViT(width=32, depth=2, heads=2, registers=2, **more)


@pytest.mark.parametrize("token, K", [("cls", 1), ("reg", 1), ("all", 3)])
def test_only_the_read_tokens_are_trained(token, K):
    t = tok.Tokenizer(tiny_vit(), token, reg_index=1)
    x = torch.rand(3, 3, 20, 17) * 2 - 1
    z = t(x)
    assert z.shape == (3, K, 32) and torch.equal(z, t.prior(x))  # before training z = z0
    (z.square().sum() + tok.cosine_loss(z, torch.randn_like(z)).sum()).backward()
    assert [n for n, p in t.named_parameters() if p.grad is not None] == ["embedding"] and t.embedding.grad.abs().min() > 0
    t.embedding.data += 1
    assert not torch.allclose(t(x), t.prior(x)) and torch.equal(t.prior(x), z.detach())  # the prior stays
    position = {"cls": [0], "reg": [2], "all": [0, 1, 2]}[token]
    assert torch.equal(z, t.vit(t.pixels(x))[:, position])


def test_unfreezing_all_keeps_the_original_for_the_prior():
    t = tok.Tokenizer(tiny_vit(), unfreeze="all")
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z0 = t.prior(x)
    t(x).square().sum().backward()
    assert {n for n, p in t.named_parameters() if p.grad is None and p.requires_grad} == set()
    for p in t.parameters():
        p.data += 0.1 * p.requires_grad
    assert torch.equal(t.prior(x), z0) and not torch.allclose(t(x), z0)
    assert not any(p.requires_grad for p in tok.Tokenizer(tiny_vit(), unfreeze="none").parameters())
    with pytest.raises(tok.UserError, match="register"):
        tok.Tokenizer(tok.ViT(), "reg")


def test_cosine_loss_closed_form():
    a = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]]])
    b = torch.tensor([[[0.0, 5.0]], [[-3.0, 0.0]], [[1.0, 1.0]]])
    assert torch.allclose(tok.cosine_loss(a, b), torch.tensor([1.0, 2.0, 1 - 0.5**0.5]))


def test_vit_block_against_torch():
    """The pre-norm block is torch.nn's own encoder layer when LayerScale is 1."""
    b = tok.Block(32, 4, 64, 1e-6, layer_scale=True)
    ref = nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj": "attn.proj", "linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    for name, p in ref.named_parameters():
        for a, c in names.items():
            name = name.replace(a, c)
        p.data = seeded(name, p.shape)
        b.get_parameter(name).data = p.data
    x = torch.randn(2, 7, 32)
    assert torch.allclose(b(x), ref(x), atol=1e-5)


def test_resize_crops_pools_and_keeps_constants():
    x = torch.zeros(1, 3, 40, 70)
    x[..., 15:55] = 1  # the centre square alone
    assert torch.equal(tok.resize(x, 16), torch.ones(1, 3, 16, 16))
    y = torch.rand(1, 3, 32, 32)
    assert torch.allclose(tok.resize(y, 16), F.avg_pool2d(y, 2)) and torch.equal(tok.resize(y, 32), y)


def test_position_embedding_is_resized_once_and_not_when_it_changes():
    vit = tiny_vit().requires_grad_(False)
    first = vit.patch_positions(3, 5)
    assert vit.patch_positions(3, 5) is first and vit.patch_positions(4, 4).shape == (1, 16, 32)
    vit.pos_embed.data.copy_(torch.randn_like(vit.pos_embed))
    vit.pos_embed.add_(1)
    assert not torch.allclose(vit.patch_positions(3, 5), first)


def test_contrastive_loss_closed_form():
    """All embeddings equal: log(2B-1). Partners equal and others orthogonal: the softmax is known."""
    assert torch.allclose(tok.contrastive_loss(torch.ones(4, 3), torch.ones(4, 3)), torch.tensor(7.0).log())
    e = torch.eye(4)
    assert torch.allclose(tok.contrastive_loss(e, e, 0.5), (math.e**2 + 6 * torch.tensor(1.0)).log() - 2, atol=1e-5)


# ---- Mixer


def test_mixer_layers_start_as_the_identity_and_widths_are_not_swapped():
    m = mix.Mixer(K=2, D=8, hidden=16, depth=2, classes=5, token_hidden=7, channel_hidden=11)
    x = torch.randn(3, 4, 16)
    assert all(torch.equal(layer(x), x) for layer in m.layers)
    assert m.layers[0].tokens.up.weight.shape == (7, 4) and m.layers[0].channels.up.weight.shape == (11, 16)
    with torch.device("meta"):
        paper = {e: sum(p.numel() for p in mix.Mixer(channel_hidden=e * 1280).parameters()) / 1e6 for e in (3, 4)}
    assert abs(paper[3] - 279) < 1 and 365 < paper[4] < 373  # the table's 276M without embeddings; the text's x4


def test_mixer_layer_against_convolutions():
    """The token MLP is two kernel-1 convolutions over the token axis, as the authors store it."""
    m = busy(mix.Layer(4, 16, 7, 11))
    x = torch.randn(2, 4, 16)
    y = F.layer_norm(x, (16,), m.norm1.weight, m.norm1.bias)
    y = F.conv1d(F.gelu(F.conv1d(y, m.tokens.up.weight[..., None], m.tokens.up.bias)), m.tokens.down.weight[..., None], m.tokens.down.bias)
    x1 = x + y
    want = x1 + m.channels.down(F.gelu(m.channels.up(F.layer_norm(x1, (16,), m.norm2.weight, m.norm2.bias))))
    assert torch.allclose(m(x), want, atol=1e-5)


def test_guidance():
    m = busy(mix.Mixer(K=1, D=8, hidden=16, depth=2, classes=5))
    z, c = torch.randn(3, 1, 8), torch.tensor([0, 1, 4])
    t = lambda s: torch.tensor([s])
    plain, null = m(z, t(0.5), c), m(z, t(0.5), torch.full((3,), 5))
    assert torch.allclose(mix.guided(m, c, scale=2.0, interval=(0.3, 0.9))(z, t(0.5)), null + 2 * (plain - null), atol=1e-5)
    assert torch.equal(mix.guided(m, c, scale=1.0)(z, t(0.5)), plain)
    assert torch.equal(mix.guided(m, c, scale=2.0, interval=(0.3, 0.9))(z, t(0.2)), m(z, t(0.2), c))  # outside the interval
    for ends in ((0.7, 0.9), (0.1, 0.7)):  # the ends belong to it, though .7 is no float32
        assert not torch.allclose(mix.guided(m, c, scale=2.0, interval=ends)(z, t(0.7)), m(z, t(0.7), c), atol=1e-4)


# ---- Published files: figures that the official implementations gave for weights and pictures of these names

VIT = {"width": 96, "depth": 3, "heads": 3, "hidden": 384, "patch": 14, "grid": 9, "layer_scale": True}
HF = [(r"patch_embed\.proj", "embeddings.patch_embeddings.projection"), (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"),
      (r"^pos_embed", "embeddings.position_embeddings"), (r"^norm\.", "layernorm."), (r"^blocks\.", "encoder.layer."),
      (r"attn\.proj", "attention.output.dense"), (r"ls(\d)\.gamma", r"layer_scale\1.lambda1")]
HF_MAE = [*HF[:5], (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"), (r"attn\.proj", "attention.output.dense"),
          (r"mlp\.fc1", "intermediate.dense"), (r"mlp\.fc2", "output.dense"), (r"^", "vit.")]
HF_CLIP = [(r"^visual\.proj", "visual_projection.weight"), (r"^text_projection", "text_projection.weight"), (r"^visual\.", "vision_model."),
           (r"^(?=transformer|token_emb|positional|ln_final)", "text_model."), (r"class_embedding", "embeddings.class_embedding"),
           (r"positional_embedding", "embeddings.position_embedding.weight"), (r"conv1", "embeddings.patch_embedding"), (r"token_emb", "embeddings.token_emb"),
           (r"ln_pre", "pre_layrnorm"), (r"ln_post", "post_layernorm"), (r"ln_final", "final_layer_norm"), (r"transformer\.resblocks", "encoder.layers"),
           (r"ln_(\d)", r"layer_norm\1"), (r"c_fc", "fc1"), (r"c_proj", "fc2"), (r"attn\.out_proj", "self_attn.out_proj"), (r"attn\.in_proj_", "self_attn.qkv.")]


def official(shapes, gain=1.0, salt=""):
    return {name: seeded(name, shape, gain, salt) for name, shape in shapes.items()}


def vit_shapes(**config):
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in tok.ViT(**config).state_dict().items() if v.numel()}


def renamed(tensors, table, split="attention.attention.", parts=("query", "key", "value")):
    """Another layout of the same weights: new names, q, k and v apart, CLIP's projections transposed."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        if "qkv" in name:
            out.update({re.sub(r"(self_)?attn\.qkv\.", split + part + ("_proj." if len(part) == 1 else "."), name): t for part, t in zip(parts, tensor.chunk(3))})
        else:
            out[name] = tensor.T.contiguous() if "_projection.weight" in name else tensor
    return out


def safetensors(tensors, header=None):
    """The bytes of a .safetensors file; `header` (a dict or bytes) replaces the true one."""
    names, entries, blobs, at = {v: k for k, v in tok.DTYPES.items()}, {}, [], 0
    for k, v in tensors.items():
        blobs.append(v.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        entries[k] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    header = entries if header is None else header
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + b"".join(blobs)


def save_safetensors(tensors, path):
    path.write_bytes(safetensors(tensors))


def near(ours, figures, tolerance=2e-5):
    assert (torch.as_tensor(ours) - torch.tensor(figures)).abs().max() < tolerance, (ours, figures)


def normalised(name, batch, size, kind=tok.IMAGENET):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in kind)
    return ((signed(picture(name, batch, *size)) + 1) / 2 - mean) / std


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_layouts(tmp_path, registers):
    """Class token [1,:3] and last patch [1,-1,:2] of the official code, with its two ways to resize position embeddings."""
    want = {(126, 126): ([1.3909583, -.6111237, .9246164], [1.0020436, -.2605651]), (56, 56): ([1.038504, -.7463139, 1.0393908], [.2235843, .3490676]),
            (182, 140): ([2.0131795, -.4523501, .7861331], [1.5738912, -.1345164]), (70, 98): ([1.069735, -.8705731, 1.6015197], [1.5155047, .2929357])}
    if registers:
        want = {(126, 126): ([1.4405926, -.5822288, .9463598], [.9992852, -.2280324]), (56, 56): ([1.2834781, -.5669176, 1.1057715], [.6126821, .5377855]),
                (182, 140): ([2.0196564, -.440992, .8076234], [1.6081079, -.1249322]), (70, 98): ([1.3624084, -.7944974, 1.3052913], [1.3705868, .3859628])}
    weights = official({**vit_shapes(**VIT, registers=registers), "mask_token": (1, 96)})
    torch.save(weights, tmp_path / "a.pth")
    save_safetensors(renamed(weights, HF), tmp_path / "b.safetensors")
    torch.save({k: v.half() for k, v in weights.items()}, tmp_path / "half.pth")
    save_safetensors({k: v.bfloat16() for k, v in renamed(weights, HF).items()}, tmp_path / "bf.safetensors")
    for file, tolerance in (("a.pth", 2e-5), ("b.safetensors", 2e-5), ("half.pth", 2e-2), ("bf.safetensors", 2e-1)):
        vit = tok.load_encoder(tmp_path / file)
        assert vit.pixels == 224 and not any(p.requires_grad or p.dtype != torch.float32 for p in vit.parameters())
        for size, (cls, patch) in want.items():
            tokens = vit(normalised(f"tiny-{size[0]}x{size[1]}", 2, size))
            near(tokens[1, 0, :3], cls, tolerance), near(tokens[1, -1, :2], patch, tolerance)


def test_mae_layouts(tmp_path):
    weights = official(vit_shapes(**{**VIT, "patch": 16, "grid": 4, "layer_scale": False}))
    torch.save({"model": {**weights, "decoder_embed.weight": torch.zeros(3, 3), "mask_token": torch.zeros(1, 1, 8)}}, tmp_path / "a.pth")
    save_safetensors(renamed(weights, HF_MAE), tmp_path / "b.safetensors")
    for file in ("a.pth", "b.safetensors"):
        near(tok.load_encoder(tmp_path / file)(normalised("tiny-mae", 2, (64, 64)))[1, 0, :4], [1.207941, -.4187583, 1.3290678, .8449023])


def clip_shapes(width=128, text=64, depth=2):
    block = lambda prefix, w: {f"{prefix}.{k}": v for k, v in {
        "attn.in_proj_weight": (3 * w, w), "attn.in_proj_bias": (3 * w,), "attn.out_proj.weight": (w, w), "attn.out_proj.bias": (w,), "ln_1.weight": (w,),
        "ln_1.bias": (w,), "mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,), "mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,),
        "ln_2.weight": (w,), "ln_2.bias": (w,)}.items()}
    shapes = {"positional_embedding": (77, text), "text_projection": (text, text), "visual.class_embedding": (width,), "logit_scale": (),
              "visual.positional_embedding": (17, width), "visual.proj": (width, text), "visual.conv1.weight": (width, 3, 16, 16),
              "token_embedding.weight": (49408, text), **{f"{n}.{k}": (w,) for n, w in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text))
                                                          for k in ("weight", "bias")}}
    for i in range(depth):
        shapes |= block(f"visual.transformer.resblocks.{i}", width) | block(f"transformer.resblocks.{i}", text)
    return shapes


def test_clip_layouts(tmp_path):
    """Image token before the projection, and the text feature of 'a photo of a cat', of OpenAI's code."""
    weights = official(clip_shapes())
    torch.save(weights, tmp_path / "a.pt")
    save_safetensors(renamed(weights, HF_CLIP, "self_attn.", "qkv"), tmp_path / "b.safetensors")
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, :7] = torch.tensor([49406, 320, 1125, 539, 320, 2368, 49407])
    for file in ("a.pt", "b.safetensors"):
        vit = tok.load_encoder(tmp_path / file)
        near(vit(normalised("clip-64", 3, (64, 64), tok.CLIP))[1, 0, :4], [-.6273584, .0036576, 1.7625371, -1.8191109])
        near(tok.load_text_encoder(tmp_path / file).embed(ids)[0, :4], [.4188382, -1.0934184, -.2489413, -1.64716])
        assert tok.Tokenizer(vit).config["vit"]["mean"] == tok.CLIP[0] and vit.pixels == 64
        with pytest.raises(tok.UserError, match="register"):
            tok.Tokenizer(vit, "all")


def compvis(name):
    """The CompVis name of a tensor of our VAE."""
    name = re.sub(r"(down|up)_blocks\.(\d)", lambda m: f"{m[1]}.{m[2] if m[1] == 'down' else 3 - int(m[2])}", name)
    for a, b in (("conv_norm_out", "norm_out"), ("mid_block.resnets.0", "mid.block_1"), ("mid_block.resnets.1", "mid.block_2"), ("resnets", "block"),
                 ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"), ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"), ("conv_shortcut", "nin_shortcut"),
                 ("mid_block.attentions.0.to_", "mid.attn_1."), ("downsamplers.0", "downsample"), ("upsamplers.0", "upsample")):
        name = name.replace(a, b)
    return name


def test_vae_layouts(tmp_path):
    """Posterior and decoding of CompVis's own code, from its layout and from diffusers' new and old names."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in dec.VAE([64, 128, 256, 256]).state_dict().items()}
    square = lambda name, shape: (*shape, 1, 1) if ".attn_1." in name and len(shape) == 2 else shape
    weights = {k: seeded(compvis(k), square(compvis(k), shape)) for k, shape in shapes.items()}
    flat = {k: v.flatten(1) if "attentions" in k and v.ndim == 4 else v for k, v in weights.items()}
    old = {re.sub(r"to_([qkv])", lambda m: {"q": "query", "k": "key", "v": "value"}[m[1]], k).replace("to_out.0", "proj_attn"): v for k, v in flat.items()}
    torch.save({"state_dict": {f"first_stage_model.{compvis(k)}": v for k, v in weights.items()} | {"model.other": torch.ones(2)}}, tmp_path / "sd.ckpt")
    torch.save({"state_dict": {compvis(k): v for k, v in weights.items()} | {"loss.logvar": torch.ones(())}}, tmp_path / "kl.ckpt")
    save_safetensors(flat, tmp_path / "new.safetensors"), save_safetensors(old, tmp_path / "old.safetensors")
    x = signed(picture("vae-32x72", 1, 32, 72))
    for file in ("sd.ckpt", "kl.ckpt", "new.safetensors", "old.safetensors"):
        vae = dec.load_vae(tmp_path / file)
        mean, logvar = vae.posterior(x)
        near(mean[0, :, 3, 8], [.1509764, .6491106, -.4958231, .9428135]), near(logvar[0, :, 1, 2], [-.5687925, -.2563109, -.358317, .3784242])
    noise = torch.randn(mean.shape)
    assert torch.allclose(vae.encode(x, noise), 0.18215 * (mean + (logvar / 2).exp() * noise), atol=1e-6)


@pytest.mark.parametrize("kind", ["Dinov2Model", "Dinov2WithRegistersModel", "ViTMAEModel", "CLIPModel"])
@torch.no_grad()
def test_against_transformers(kind, tmp_path):
    """The very classes that users' files come from, where they are installed, with random weights."""
    hf = pytest.importorskip("transformers")
    common = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    if kind == "CLIPModel":
        text = dict(common, hidden_size=64, num_attention_heads=1, intermediate_size=256, vocab_size=1000, eos_token_id=999)
        config = hf.CLIPConfig(vision_config=dict(common, image_size=64, patch_size=16), text_config=text, projection_dim=64)
    else:
        config = getattr(hf, kind.replace("Model", "Config"))(**common, image_size=56, patch_size=14, layer_norm_eps=1e-6, **({"mask_ratio": 0.0} if "MAE" in kind else {}))
    torch.manual_seed(0)
    theirs = getattr(hf, kind)(config).eval()
    for p in theirs.parameters():
        p.add_(0.1 * torch.randn_like(p))  # biases, norms and scales start at values that hide mistakes
    theirs.save_pretrained(tmp_path)
    theirs.double()  # such weights magnify rounding
    x, vit = torch.randn(2, 3, *[64 if kind == "CLIPModel" else 56] * 2).double(), tok.load_encoder(tmp_path / "model.safetensors").double()
    if kind == "CLIPModel":
        assert (vit(x)[:, 0] - theirs.vision_model(x).pooler_output).abs().max() < 2e-5
        ids = torch.randint(1, 999, (3, 77))
        ids[[0, 1, 2], [5, 30, 76]] = 999
        tower, out = tok.load_text_encoder(tmp_path / "model.safetensors").double(), theirs.text_model(ids)
        assert (tower(ids) - out.last_hidden_state).abs().max() < 2e-5
        assert (tower.embed(ids) - theirs.text_projection(out.pooler_output)).abs().max() < 2e-5
    else:
        y, wanted = vit(x), theirs(x).last_hidden_state
        assert (y[:, 0] - wanted[:, 0]).abs().max() < 2e-5
        assert "MAE" in kind or (y - wanted).abs().max() < 2e-5  # MAE's patches come shuffled


@torch.no_grad()
def test_against_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(block_out_channels=(32, 32, 64, 64), layers_per_block=2, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
                                     up_block_types=["UpDecoderBlock2D"] * 4).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = dec.load_vae(tmp_path / "diffusion_pytorch_model.safetensors"), torch.rand(2, 3, 64, 48) * 2 - 1
    posterior = theirs.encode(x).latent_dist
    mean, logvar = ours.posterior(x)
    assert (mean - posterior.mean).abs().max() < 2e-5 and (logvar - posterior.logvar).abs().max() < 2e-5
    assert (ours.decode(0.18215 * mean) - theirs.decode(mean).sample).abs().max() < 5e-5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_memory(tmp_path):
    """The peak over what was there before is at most 1.3 times file plus model, for a file read whole and for one with optimizer states."""
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in dec.VAE().state_dict().items()}
    state = {k: torch.zeros(shape) for k, shape in shapes.items()}
    save_safetensors(state, tmp_path / "a.safetensors"), torch.save({"state_dict": state, "optimizer_states": [state]}, tmp_path / "a.ckpt")
    code = ("import decoder, re, sys; peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]); before = peak(); "
            "decoder.load_vae(sys.argv[1]); print(1024 * (peak() - before))")
    for file in ("a.safetensors", "a.ckpt"):
        done = subprocess.run([sys.executable, "-c", code, tmp_path / file], cwd=HERE, capture_output=True, text=True, timeout=120)
        model = sum(4 * shape.numel() for shape in shapes.values())
        assert 0 < int(done.stdout) < 1.3 * (model + (tmp_path / file).stat().st_size), (file, done.stdout, done.stderr)


def released_shapes(depth=4, layers=6):
    """Names and shapes of the authors' checkpoint with fewer layers; the encoder and the VAE in full."""
    first, d = "first_stage.decoder.decoder.", {}
    vit = {k: v for k, v in vit_shapes(width=768, depth=12, heads=12, patch=14, grid=37, registers=4, layer_scale=True).items()}
    d |= {f"first_stage.encoder.encoder.{k}": v for k, v in vit.items()}
    with torch.device("meta"):
        d |= {f"{first}ae.ae.{k}": tuple(v.shape) for k, v in dec.VAE().state_dict().items()}
    names = {"time_emb.weight": (512, 1), "time_in_proj.weight": (1024, 1024), "mapping.in_norm.scale": (1024,), "mapping.out_norm.scale": (1024,),
             "encoder.dino.temp_pos_embed": (1, 1, 1, 768), "encoder.dino.new_reg": (1, 2, 768), "encoder.dino.backbone.fc.weight": (1152, 768),
             **{f"encoder.dino.backbone.{k}": (1152,) for k in ("fc.bias", "ln.weight", "ln.bias")}, "backbone.mid_merge.proj.weight": (1152, 1152),
             "backbone.mid_merge.pre_proj.proj.weight": (1152, 16), "backbone.mid_split.post_proj.norm.scale": (1152,),
             "backbone.mid_split.post_proj.proj.weight": (16, 1152)}
    for i in range(2):
        names |= {f"mapping.blocks.{i}.{k}": v for k, v in {"norm.scale": (1024,), "up_proj.weight": (6144, 1024), "down_proj.weight": (1024, 3072)}.items()}
    for i in range(depth):
        names |= {f"backbone.mid_level.{i}.{k}": v for k, v in {
            "self_attn.scale": (16,), "self_attn.norm.linear.weight": (1152, 1024), "self_attn.qkv_proj.weight": (3456, 1152), "self_attn.pos_emb.freqs": (2, 16, 9),
            "self_attn.out_proj.weight": (1152, 1152), "ff.norm.linear.weight": (1152, 1024), "ff.up_proj.weight": (6912, 1152), "ff.down_proj.weight": (1152, 3456)}.items()}
    d |= {first + k: v for k, v in names.items()}
    m = {"0.weight": (1280, 768), "0.bias": (1280,), f"{layers + 1}.weight": (1280,), f"{layers + 1}.bias": (1280,), f"{layers + 2}.weight": (768, 1280), f"{layers + 2}.bias": (768,)}
    for i in range(1, layers + 1):
        m |= {f"{i}.{k}": v for k, v in {"0.fn.0.weight": (12, 3, 1), "0.fn.0.bias": (12,), "0.fn.3.weight": (3, 12, 1), "0.fn.3.bias": (3,), "0.norm.weight": (1280,),
              "0.norm.bias": (1280,), "1.fn.0.weight": (5120, 1280), "1.fn.0.bias": (5120,), "1.fn.3.weight": (1280, 5120), "1.fn.3.bias": (1280,),
              "1.norm.weight": (1280,), "1.norm.bias": (1280,)}.items()}
    net = {"pos_embed": (1, 1, 768), "t_embedder.mlp.0.weight": (768, 256), "t_embedder.mlp.0.bias": (768,), "t_embedder.mlp.2.weight": (768, 768),
           "t_embedder.mlp.2.bias": (768,), "label_embedder.embedding_table.weight": (1001, 768), **{f"mixer._orig_mod.{k}": v for k, v in m.items()}}
    return d | {f"ema_model.net.{k}": v for k, v in net.items()}


def test_the_authors_checkpoint(tmp_path):
    """Encoder, decoder, Mixer and guidance of the authors' own code, through a file of their layout (theirs runs time backwards)."""
    state = official(released_shapes(), salt="a:") | {"metric_tracker.other": torch.ones(3)}
    config = {"first_stage_cfg": {"_content": {"params": {"_content": {"scale_factor": {"_val": 1.3}}}}}, "other": {"scale_factor": 0.18215}}
    torch.save({"state_dict": state, "hyper_parameters": config, "epoch": 1}, tmp_path / "a.pt")  # the ending says nothing
    del state
    model = RepTok.load(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()
    near(model.encode(signed(picture("a:reptok-375x500", 1, 375, 500)))[0, 0, :3], [.0541501, .3860424, .5609152])
    z = model.encode(signed(picture("a:reptok-256", 2, 256, 256)))
    x, n = uniform("a:noise", (2, 4, 32, 32)), uniform("a:latent-noise", (4, 1, 768))
    with torch.no_grad():
        near(-model.decoder(x, torch.full((2,), 0.5), z)[1, :, 3, 4], [-2.0065675, .505765, -.8570567, .6616135], 5e-5)
        near(model.mixer(n[:3], torch.full((3,), 0.25), torch.tensor([1, 207, 981]))[1, 0, :3], [.2368025, -.0491665, 1.5444434])
    guided = model.generate(torch.tensor([1, 207, 981]), steps=10, cfg=1.5, cfg_interval=(0.3, 0.9), noise=n[:3])
    near(guided[1, 0, :3] / 1.3, [.9503103, .7618908, 3.0905805], 5e-5)
    near(model.decode(z, steps=4, noise=x)[1, :, 12, 16], [-1.0, 1.0, -.1287327], 5e-5)


def test_named_weights_are_downloaded_and_offline_says_what_to_do(tmp_path, monkeypatch):
    weights = official(vit_shapes(**VIT))
    torch.save(weights, tmp_path / "vit.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setitem(tok.PUBLISHED, "dinov2_vitb14", (tmp_path / "vit.pth").as_uri())
    assert torch.equal(tok.load_encoder("dinov2_vitb14").cls_token, weights["cls_token"]) and list(tmp_path.rglob("hub/*/checkpoints/vit.pth"))
    monkeypatch.setitem(tok.PUBLISHED, "mae_vitb16", (tmp_path / "gone.pth").as_uri())
    with pytest.raises(tok.UserError, match="(?s)gone.pth.*file://.*checkpoints"):
        tok.load_encoder("mae_vitb16")


# ---- Trainers and sampler as processes

QUICK1 = ["--prior-steps", 2, "--steps", 6, "--batch", 8, "--log-every", 1, "--save-every", 3, "--device", "cpu"]
QUICK2 = ["--steps", 6, "--batch", 8, "--log-every", 1, "--save-every", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both stages, a few steps, on forty written-out digits."""
    root = tmp_path_factory.mktemp("trained")
    inside("train_stage1.py", "--write-data", root / "data", "--num", 40)
    inside("train_stage1.py", "--data", root / "data", "--out", root / "out", *QUICK1)
    inside("train_stage2.py", "--data", root / "data", "--out", root / "out", *QUICK2)
    return root


def losses(path):
    return {row["step"]: row["loss"] for row in map(json.loads, Path(path).read_text().splitlines())}


def test_what_the_trainers_leave(trained):
    out = trained / "out"
    for stage in ("stage1", "stage2"):
        assert sorted(losses(out / f"{stage}.jsonl")) == [1, 2, 3, 4, 5, 6]
        assert (out / f"{stage}.pt").exists() and (out / f"{stage}.prev.pt").exists()
        assert Image.open(out / f"{stage}.png").size[0] >= 8 * 16
    model = RepTok.load(out / "stage2.pt")
    assert model.classes == [str(d) for d in range(10)]
    x = torch.rand(5, 3, 40, 30) * 2 - 1
    z = model.encode(x)
    assert z.shape == (5, 1, 128) and model.decode(z, steps=2).shape == (5, 3, 16, 16)
    assert torch.allclose(model.generate(torch.arange(5), steps=2), torch.cat([model.generate(torch.arange(5), steps=2, batch=2)]), atol=1e-5)
    tokens = one.Pictures(str(trained / "data"), 16)
    z = model.encode(torch.stack([tokens[i][0] for i in range(40)]).float() / 127.5 - 1)
    normal = (z - model.mean) / model.std
    assert normal.mean((0, 1)).abs().max() < 0.1 and (normal.std((0, 1)) - 1).abs().max() < 0.1


def test_samples_do_not_depend_on_the_batch(trained):
    model = RepTok.load(trained / "out" / "stage2.pt")
    classes = torch.arange(10)
    z = model.generate(classes, steps=3, cfg=1.5)
    assert torch.allclose(z[:3], model.generate(classes[:3], steps=3, cfg=1.5), atol=1e-5)
    assert torch.allclose(model.decode(z, steps=3)[:3], model.decode(z[:3], steps=3), atol=1e-5)
    own, other = (one.noise_for(range(10), (1, 128), "cpu", mixer) for mixer in (True, False))  # the decoder starts from other numbers
    assert torch.equal(model.generate(classes, steps=3, noise=own), model.generate(classes, steps=3)) and (own - other).abs().mean() > 0.5
    with pytest.raises(tok.UserError, match="classes"):
        model.generate()


def test_sample_commands(trained, tmp_path):
    ckpt, some = trained / "out" / "stage2.pt", sorted((trained / "data").rglob("*.png"))[:2]
    inside("sample.py", "--ckpt", ckpt, "--classes", "3", "7", "--per-class", 4, "--steps", 2, "--out", tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").size == (4 * 64, 2 * 64)
    inside("sample.py", "--ckpt", trained / "out" / "stage1.pt", "--reconstruct", *some, "--steps", 2, "--out", tmp_path / "r.png")
    assert Image.open(tmp_path / "r.png").size == (2 * 64, 2 * 64)
    inside("sample.py", "--ckpt", ckpt, "--interpolate", *some, "--steps", 2, "--out", tmp_path / "i.png")
    assert Image.open(tmp_path / "i.png").size == (10 * 64, 64)
    inside("sample.py", "--ckpt", ckpt, "--export", tmp_path / "small.pt")
    a, b = RepTok.load(ckpt), RepTok.load(tmp_path / "small.pt")
    c = torch.arange(3)
    assert torch.equal(a.generate(c, steps=2), b.generate(c, steps=2)) and (tmp_path / "small.pt").stat().st_size < ckpt.stat().st_size / 2
    with pytest.raises(tok.UserError, match="stage 1"):
        RepTok.load(trained / "out" / "stage1.pt").generate(c)


def test_loading_uses_the_averaged_weights(trained):
    content = one.load_checkpoint(trained / "out" / "stage1.pt", ["stage1"])
    model = RepTok.load(trained / "out" / "stage1.pt")
    assert torch.equal(model.tokenizer.embedding, content["ema"]["tokenizer.embedding"])
    assert not torch.equal(content["tokenizer"]["state"]["embedding"], content["ema"]["tokenizer.embedding"])
    assert set(content["ema"]) == {"tokenizer.embedding", *(f"decoder.{n}" for n, _ in model.decoder.named_parameters())}


def test_continuing_extending_and_refusing(trained, tmp_path, capsys):
    out, args = tmp_path / "out", ["--data", trained / "data", "--out", tmp_path / "out", *QUICK1]
    shutil.copytree(trained / "out", out)
    before = (out / "stage1.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        inside("train_stage1.py", *args)
    assert stop.value.code == 0 and "finished" in capsys.readouterr().out
    for options, says in (([*args, "--batch", 4], "--batch"), ([*args, "--lam", 0.5], "--lam"), (args[2:], "--data")):
        assert says in refusal("train_stage1.py", options, capsys)
    assert (out / "stage1.pt").read_bytes() == before
    inside("train_stage1.py", *args, "--steps", 8)
    assert sorted(losses(out / "stage1.jsonl")) == list(range(1, 9))


def inside(script, *args):
    """Run a script of the project in this process, which spares the seconds of a start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.setattr(signal, "signal", lambda *_: None)  # the trainers' handlers would outlive them, and pytest could not be interrupted
        one.guarded(sys.modules[script[:-3]].main)


def refusal(script, args, capsys):
    """The one line with which a script, run in this process, refuses its arguments with status 2."""
    capsys.readouterr()  # what was said before
    with pytest.raises(SystemExit) as stop:
        inside(script, *args)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "it/s" not in line]  # no progress bars
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{script}: error: "), lines
    return lines[0]


def test_bad_input(trained, tmp_path, monkeypatch, capsys):
    out, ckpt, prior = ["--out", tmp_path / "new"], trained / "out" / "stage2.pt", trained / "out" / "prior.pt"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.pt").write_bytes(ckpt.read_bytes()[:5000])
    data, features = ["--data", trained / "data"], tmp_path / "f.npz"
    np.savez(features, features=np.zeros((3, 6), np.float32))
    for script, args, says in [
            ("train_stage1.py", ["--data", tmp_path / "empty"], "no pictures"), ("train_stage1.py", ["--data", tmp_path / "gone"], "no such"),
            ("train_stage1.py", ["--data", tmp_path / "text.png"], "text.png"), ("train_stage1.py", ["--step", 5], "--step"),
            ("train_stage1.py", ["--batch", 0], "--batch"), ("train_stage2.py", ["--bpe", "a"], "--bpe"),
            ("train_stage1.py", ["--init", ckpt, "--unfreeze", "all"], "--unfreeze"), ("train_stage1.py", ["--encoder", prior, "--registers", 2], "--registers"),
            ("train_stage1.py", ["--size", "S", *data], "--vae"),
            ("train_stage1.py", ["--pixels", 18, *data], "patches"), ("train_stage1.py", ["--encoder", tmp_path / "text.png", *data], "text.png"),
            ("train_stage1.py", ["--token", "reg", "--registers", 0, *data], "--token reg"), ("train_stage1.py", ["--token", "reg", "--reg-index", 4, "--encoder", prior, *data], "--reg-index"), ("train_stage1.py", ["--batch", 9, "--accumulate", 2], "--batch"),
            ("train_stage1.py", ["--lr", "fast"], "--lr"), ("train_stage1.py", ["--lam", "inf"], "--lam"), ("train_stage1.py", ["--init", ckpt, "--bench"], "--bench"),
            ("train_stage1.py", ["--prior", "labels", "--data", trained / "data" / "3"], "--prior labels"), ("train_stage2.py", ["--clip", "a.pt"], "--captions"),
            *([] if torch.cuda.is_available() else [("sample.py", ["--ckpt", ckpt, "--device", "cuda"], "--device cuda")]),
            ("train_stage1.py", ["--encoder", "random", "--lam", 1], "--lam"), ("train_stage2.py", ["--captions", *data], "--data"),
            ("sample.py", ["--ckpt", ckpt, "--out", tmp_path], "--out"), ("sample.py", ["--ckpt", ckpt, "--reconstruct", tmp_path / "gone.png"], "gone.png"), ("train_stage1.py", ["--write-data", tmp_path / "text.png"], "--write-data"),
            ("train_stage2.py", [], "stage1.pt"), ("train_stage2.py", ["--stage1", prior], "prior"),
            ("train_stage2.py", ["--stage1", tmp_path / "half.pt"], "half.pt"), ("sample.py", [], "--ckpt"),
            ("sample.py", ["--ckpt", ckpt, "--classes", "eleven"], "eleven"), ("sample.py", ["--ckpt", ckpt, "--classes", "10"], "10"),
            ("sample.py", ["--ckpt", trained / "out" / "stage1.pt"], "stage 1"), ("sample.py", ["--ckpt", prior], "prior"),
            ("sample.py", ["--ckpt", ckpt, "--reconstruct", tmp_path / "text.png"], "text.png"),
            ("sample.py", ["--ckpt", ckpt, "--reconstruct", tmp_path / "text.png", "--interpolate", "a", "b"], "--interpolate"),
            ("sample.py", ["--ckpt", ckpt, "--classes", "\u00b2"], "--classes"), ("sample.py", ["--ckpt", ckpt, "--json", tmp_path / "gone" / "a.json"], "--json"),
            ("sample.py", ["--ckpt", ckpt, "--features", features], "takes no text"),
            ("sample.py", ["--ckpt", ckpt, "--eval", trained / "data", "--clip", "a", "--bpe", "b"], "--clip"),
            ("sample.py", ["--ckpt", ckpt, "--eval", trained / "data", "--vgg", "a.pth"], "--lpips"), ("sample.py", ["--ckpt", ckpt, "--out", tmp_path / "gone" / "a.png"], "--out")]:
        assert says in refusal(script, [*args, *([] if script == "sample.py" else out)], capsys)
    assert not list(tmp_path.glob("new/*.pt"))
    (tmp_path / "exported").mkdir()
    inside("sample.py", "--ckpt", trained / "out" / "stage1.pt", "--export", tmp_path / "exported" / "stage1.pt")
    assert "an export" in refusal("train_stage1.py", ["--data", trained / "data", "--out", tmp_path / "exported"], capsys)
    monkeypatch.setattr(sample, "main", lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")))
    assert "--accumulate" in refusal("sample.py", [], capsys)
    monkeypatch.setattr(sample, "main", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "disk is full" in refusal("sample.py", [], capsys)
    monkeypatch.setattr(sample, "main", lambda: (_ for _ in ()).throw(FileNotFoundError(2, "a mistake of ours")))
    with pytest.raises(FileNotFoundError):
        inside("sample.py")
    assert "--ckpt" in command("sample.py", ok=False)  # and as a process


@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py"])
def test_two_ranks_equal_one_process(trained, whole, tmp_path, script):
    """torchrun with two gloo processes, and one process with accumulation, see the same losses for ten steps."""
    shutil.copytree(trained / "out", tmp_path / "out")
    inside(script, *short(trained, script, tmp_path / "out"), "--accumulate", 2, "--fresh")
    want, pieces = whole(script, 1), losses(tmp_path / "out" / f"{script[6:12]}.jsonl")
    assert want[10] != want[1]
    for got in (whole(script, 2), pieces):
        assert max(abs(got[s] - want[s]) for s in range(1, 11)) < 1e-5


def test_fine_tuning_from_a_checkpoint(trained, tmp_path):
    """--init starts at the averaged weights of the other run, and trains the embedding and the decoder, not the ViT."""
    start = trained / "out" / "stage1.pt"
    inside("train_stage1.py", "--init", start, "--data", trained / "data", "--out", tmp_path, "--steps", 3, "--batch", 8, "--log-every", 1, "--device", "cpu")
    a, b = RepTok.load(start), one.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])
    assert torch.equal(a.tokenizer.vit.norm.weight, b["tokenizer"]["state"]["vit.norm.weight"])
    for was, now in ((a.tokenizer.embedding, b["tokenizer"]["state"]["embedding"]), (a.decoder.merge.weight, b["decoder"]["state"]["merge.weight"])):
        assert 0 < (was - now).abs().max() < 0.1


def test_pictures_without_classes_and_a_token_that_rests(trained, tmp_path):
    """A flat folder trains and samples without classes; --token-lr scales the embedding's learning rate alone."""
    data, out = ["--data", trained / "data" / "3"], ["--out", tmp_path]
    inside("train_stage1.py", *data, *out, *QUICK1, "--batch", 2, "--encoder", trained / "out" / "prior.pt", "--token-lr", 0)
    content, prior = one.load_checkpoint(tmp_path / "stage1.pt", ["stage1"]), one.encoder(trained / "out" / "prior.pt")
    assert torch.equal(content["tokenizer"]["state"]["embedding"], prior.cls_token) and content["decoder"]["state"]["patch_out.weight"].abs().max() > 0
    inside("train_stage2.py", *data, *out, *QUICK2, "--batch", 2)
    assert RepTok.load(tmp_path / "stage2.pt").mixer.label is None
    inside("sample.py", "--ckpt", tmp_path / "stage2.pt", "--per-class", 3, "--steps", 2, "--out", tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").size == (3 * 64, 64)


def test_size_is_that_of_the_checkpoint():
    args = lambda: one.argparse.Namespace(size=None, steps=None, lr=7.0)
    for size, steps in (("nano", 1200), ("S", 1_000_000), ("XL", 1_000_000)):
        with torch.device("meta"):
            decoder = dec.Decoder(**{**one.SIZES[size]["decoder"], "depth": 0})
        one.complete(a := args(), one.PAPER, one.NANO, decoder)
        assert (a.size, a.steps, a.lr) == (size, steps, 7.0)
    with pytest.raises(tok.UserError, match="--size"):
        one.complete(args(), one.PAPER, one.NANO, dec.Decoder(width=64, depth=0, heads=8))


@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py"])
def test_bench(script, monkeypatch, capsys):
    """GMACs as the layers' shapes give them: the Mixer's linear layers, a multiply-accumulate a weight and token."""
    monkeypatch.setattr(one, "median_ms", lambda function, device: (function(), 10.0)[1])
    monkeypatch.setattr(sys, "argv", [script, "--bench", "--batch", "4", "--device", "cpu"])
    one.guarded(sys.modules[script[:-3]].main)
    rows = {line[:34].strip(): line[34:].split() for line in capsys.readouterr().out.splitlines()[3:]}
    if script == "train_stage2.py":
        m = mix.Mixer(1, 128, **one.SIZES["nano"]["mixer"], classes=10)
        macs = 128 * 256 + 128**2 + 3 * 128 * 192 + 192 * 128 + sum(192 * l.tokens.up.weight.numel() * 2 + 3 * l.channels.up.weight.numel() * 2 for l in m.layers)
        assert rows["Mixer"][:2] == ["10.0", "400.00"] and abs(float(rows["Mixer"][2]) - macs / 1e9) < 1e-3
    assert len(rows) == 2 + (script == "train_stage1.py") and all(float(row[2]) > 0 for row in rows.values())


def test_class_folders(tmp_path):
    """Top folders are classes, sorted; a folder around all of them does not count; pictures beside folders mean none."""
    files = {"b/x/1.png": 1, "a/2.png": 0, "c/3.png": 2}
    for root in ("", "wrapper/"):
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
            for name in files:
                (tmp_path / "f" / root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (20, 30), 77).save(tmp_path / "f" / root / name)
                z.write(tmp_path / "f" / root / name, root + name)
            z.writestr("__MACOSX/._1.png", b"")
        for source in (tmp_path / "z.zip", tmp_path / "f" / root):
            p = one.Pictures(str(source), 16)
            assert p.classes == ["a", "b", "c"] and {n[len(root) if str(source).endswith("zip") else 0:]: int(l) for n, l in zip(p.names, p.labels)} == files
            assert torch.equal(p[0][0], torch.full((3, 16, 16), 77, dtype=torch.uint8))
        if not root:
            with tarfile.open(tmp_path / "0.tar", "w") as shard:
                shard.add(tmp_path / "f", ".")
            (tmp_path / "shards").mkdir()
            (tmp_path / "0.tar").rename(tmp_path / "shards" / "0.tar")
            (tmp_path / "f" / "a" / "2.json").write_text("{}")  # what lies beside a picture takes no class away
            for source in (tmp_path / "shards", tmp_path / "f"):
                assert one.Pictures(str(source), 16).classes == ["a", "b", "c"]
        shutil.rmtree(tmp_path / "f")
    prints = set()
    for data in (b"one", b"two"):
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
            z.writestr("1.png", data)
        prints.add(one.Pictures(str(tmp_path / "z.zip"), 16).fingerprint)
    assert len(prints) == 2  # other pictures of the same names
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "flat" / "1.png")
    assert one.Pictures(str(tmp_path / "flat"), 16).classes == []


# ---- Never lose a run


def launch(script, *args, world=1, port=29633):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(port), "--"] if world > 1 else []  # "--", or torchrun takes --num for its own
    return subprocess.Popen([sys.executable, *torchrun, str(HERE / script), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def stop_at(process, log, step, which, only=b""):
    """Send a signal to all processes of a run (or those with `only` in their environment) once `log` shows `step`."""
    for _ in range(3000):
        if process.poll() is not None or log.exists() and log.read_text().count("\n") >= step:
            break
        time.sleep(0.02)
    if which == signal.SIGKILL:  # torchrun's workers are in groups of their own
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if str(log.parent).encode() in (entry / "cmdline").read_bytes() and only in (entry / "environ").read_bytes():
                    os.kill(int(entry.name), which)
            except OSError:
                pass
    else:
        process.send_signal(which)
    return process.communicate(timeout=120)


def short(trained, script, out):
    """Options of a run of 18 steps that saves every six."""
    start = ["--encoder", trained / "out" / "prior.pt"] if script == "train_stage1.py" else ["--stage1", trained / "out" / "stage1.pt"]
    return ["--data", trained / "data", "--out", out, "--steps", 18, "--batch", 8, "--log-every", 1, "--save-every", 6, "--device", "cpu", *start]


def finished(process):
    """Wait for a run that must end well."""
    output = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output[0]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """(script, processes) -> losses of a run that is never stopped; made once."""
    @functools.cache
    def run(script, world):
        out = tmp_path_factory.mktemp("whole")
        finished(launch(script, *short(trained, script, out), world=world))
        return losses(out / f"{script[6:12]}.jsonl")
    return run


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py"])
def test_killed_and_continued_equals_never_stopped(trained, whole, tmp_path, script, world):
    """SIGKILL at any step, then the same command: bit for bit the losses of a run that was never stopped."""
    stage, args = script[6:12], short(trained, script, tmp_path)
    stop_at(launch(script, *args, world=world), tmp_path / f"{stage}.jsonl", 8, signal.SIGKILL)
    assert not (tmp_path / f"{stage}.pt").exists() or one.load_checkpoint(tmp_path / f"{stage}.pt", [stage])["step"] < 18
    finished(launch(script, *args, world=world))
    killed = losses(tmp_path / f"{stage}.jsonl")
    assert killed == whole(script, world) and len(killed) == 18


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
def test_a_dead_rank_ends_the_others_and_is_named(trained, tmp_path):
    args = ["--data", trained / "data", "--out", tmp_path, "--steps", 100_000, "--batch", 8, "--log-every", 1, "--stage1", trained / "out" / "stage1.pt"]
    process = launch("train_stage2.py", *args, "--device", "cpu", world=2, port=29641)
    _, said = stop_at(process, tmp_path / "stage2.jsonl", 3, signal.SIGKILL, b"\0RANK=1\0")
    assert process.returncode == 1 and re.search(r"rank\s*: 1 ", said) and "train_stage2.py" in said


def test_sigterm_finishes_the_step_and_saves(trained, tmp_path):
    args = ["--data", trained / "data", "--out", tmp_path, "--steps", 100_000, "--batch", 8, "--log-every", 1, "--encoder", trained / "out" / "prior.pt"]
    process = launch("train_stage1.py", *args)
    output, _ = stop_at(process, tmp_path / "stage1.jsonl", 3, signal.SIGTERM)
    assert process.returncode == 0 and "run the same command" in output
    assert one.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])["step"] >= 3


def test_a_torn_checkpoint_is_named_and_the_one_before_used(trained, tmp_path, capsys):
    for name in ("stage1.pt", "stage1.prev.pt"):
        (tmp_path / name).write_bytes((trained / "out" / name).read_bytes())
    (tmp_path / "stage1.pt").write_bytes((trained / "out" / "stage1.pt").read_bytes()[:-1000])
    assert one.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])["step"] == 3
    assert "stage1.pt" in capsys.readouterr().err
    assert RepTok.load(tmp_path / "stage1.pt").pixels == 16


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "stage1.pt"
    one.save_checkpoint(path, {"kind": "stage1", "step": 1})
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(tok.UserError, match="No space"):
        one.save_checkpoint(path, {"kind": "stage1", "step": 2})
    assert one.load_checkpoint(path, ["stage1"])["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_moves_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    for grad, moved in ((torch.tensor([1.0, math.nan, 0.0]), False), (torch.ones(3), True)):
        p.grad = grad
        _, bad = one.move(optimizer, [p], 1.0)
        assert bool(bad) != moved and bool((p != 1).any()) == moved and p.grad is None


def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(trained, tmp_path):
    args = ["--data", trained / "data", "--out", tmp_path, "--batch", 8, "--save-every", 1, "--encoder", trained / "out" / "prior.pt", "--device", "cpu"]
    done = launch("train_stage1.py", *args, "--lr", 1e25, "--warmup", 0, "--steps", 9)
    _, error = done.communicate(timeout=120)
    line = error.strip().splitlines()[-1]
    assert done.returncode == 2 and "not finite at step" in line and ".png" in line and "Traceback" not in error, error
    assert one.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])["step"] < 9


def test_bad_pictures_are_skipped_up_to_a_share(trained, tmp_path, capfd):
    pictures = one.Pictures(str(trained / "data"), 16)
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(pictures.places[5][0]).read_bytes()[:60])
    pictures.places[5] = (str(broken),)
    ranks = one.argparse.Namespace(rank=0, world=1, device=torch.device("cpu"))
    order = one.Order(len(pictures), 8, ranks, 0, 5, 0)
    batches = list(one.Loader(pictures, order, ranks, 0, max_bad=0.1))
    assert len(batches) == 5 and capfd.readouterr().err.count(pictures.names[5]) == 1
    with pytest.raises(tok.UserError, match="--max-bad"):
        list(one.Loader(pictures, order, ranks, 0, max_bad=0.001))


def test_the_trainer_is_a_plain_loop(trained, tmp_path):
    """Stage 1's losses are those of a loop written without its helpers: unfused AdamW, autograd through plain modules."""
    args = ["--data", trained / "data", "--out", tmp_path, "--steps", 6, "--batch", 8, "--log-every", 1, "--lr", 1e-3, "--warmup", 0, "--device", "cpu",
            "--encoder", trained / "out" / "prior.pt"]
    inside("train_stage1.py", *args, "--clip-grad", 1e9, "--no-cache")
    got, pictures = losses(tmp_path / "stage1.jsonl"), one.Pictures(str(trained / "data"), 16)
    vit = one.encoder(str(trained / "out" / "prior.pt"))
    torch.manual_seed(0)
    t = tok.Tokenizer(vit)
    d = dec.Decoder(**one.SIZES["nano"]["decoder"], channels=3, size=16, token_dim=128)
    optimizer = torch.optim.AdamW([t.embedding, *d.parameters()], weight_decay=0.0)
    permutation = np.random.default_rng([0, 0]).permutation(40)
    for step in range(5):
        x = torch.stack([pictures[int(i)][0] for i in permutation[8 * step:8 * step + 8]]).float() / 127.5 - 1
        draw = one.generator(0, step, 0, "cpu")
        time_ = torch.sigmoid(torch.randn(8, generator=draw) - 0.3)
        noise = torch.randn(8, 3, 16, 16, generator=draw)
        s = time_[:, None, None, None]
        z = t(x)
        loss = (d((1 - s) * noise + s * x, time_, z) - (x - noise)).square().mean() + 0.1 * (1 - F.cosine_similarity(z, t.prior(x), dim=-1)).mean()
        assert abs(loss.item() - got[step + 1]) < 2e-4, step
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / 6)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def small_vae(tmp_path_factory):
    """An SD VAE file of few channels."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_safetensors(dec.VAE((32, 32, 32, 32)).state_dict(), path)
    return path


def test_cache_is_what_the_networks_give(trained, small_vae, tmp_path):
    """The file of --cache holds posteriors and original tokens, both mirrored; a run on it equals one without to float16's accuracy."""
    args = ["--data", trained / "data", *QUICK1, "--vae", small_vae, "--pixels", 64, "--flip", "--encoder", trained / "out" / "prior.pt"]
    for out, more in (("with", ["--cache"]), ("without", ["--no-cache"])):
        inside("train_stage1.py", "--out", tmp_path / out, *args, *more)
    a, b = (losses(tmp_path / out / "stage1.jsonl") for out in ("with", "without"))
    assert all(abs(a[step] - b[step]) < 5e-3 * b[step] for step in range(1, 7)) and a != b
    rows = np.load(next((tmp_path / "with").glob("cache-*.npy")))
    pictures, vae, vit = one.Pictures(str(trained / "data"), 64), dec.load_vae(small_vae), one.encoder(trained / "out" / "prior.pt")
    assert len(rows) == len(pictures) and rows["done"].all() and rows["label"].tolist() == pictures.labels.tolist()
    x = pictures[7][0][None].float() / 127.5 - 1
    for view, image in enumerate((x, x.flip(-1))):
        for name, value in zip(("mean", "logvar", "prior"), (*vae.posterior(image), tok.Tokenizer(vit).prior(image))):
            assert np.abs(rows[name][7, view] - value[0].detach().numpy()).max() < 1e-3 * value.abs().max(), name
    args = one.argparse.Namespace(out=tmp_path, flip=True, dtype="float32", workers=0, max_bad=0.0)
    for token, reg in (("cls", 0), ("reg", 0), ("reg", 1)):  # one folder, other tokens
        net = one.Stage1(tok.Tokenizer(vit, token, reg), dec.Decoder(4, 8, token_dim=128, **TINY))
        *_, prior = one.cached_targets(args, net, vae, pictures, one.Ranks("cpu"))(None, torch.tensor([7]), torch.tensor([False]))
        assert torch.allclose(prior, net.tokenizer.prior(x), atol=5e-3)


def test_a_stopped_pass_goes_on(trained, tmp_path, monkeypatch):
    """Records that are done are not made again; the others are."""
    pictures, made = one.Pictures(str(trained / "data"), 16), []
    args, ranks = one.argparse.Namespace(flip=False, workers=0, max_bad=0.0, dtype="float32"), one.Ranks("cpu")
    compute = lambda x: (made.append(len(x)), [x.mean((1, 2, 3))[:, None]])[1]
    whole = np.array(one.computed_once(tmp_path / "a.npy", [("mean", (1,))], pictures, ranks, args, compute))
    assert sum(made) == len(pictures) == 40
    rows = np.load(tmp_path / "a.npy", mmap_mode="r+")
    rows["done"][3], rows["mean"][3], rows["mean"][30] = 0, 9, 9
    rows.flush()
    again = one.computed_once(tmp_path / "a.npy", [("mean", (1,))], pictures, ranks, args, compute)
    assert sum(made) == 80 and np.array_equal(again, whole)  # 40 pictures are one chunk
    again = one.computed_once(tmp_path / "a.npy", [("mean", (1,))], pictures, ranks, args, compute)
    assert sum(made) == 80
    def full(path, mode="r", *args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(tok.UserError, match="c.npy.*No space"):
        patch.setattr(one, "open", full, raising=False)
        one.computed_once(tmp_path / "c.npy", [("mean", (1,))], pictures, ranks, args, compute)
    (tmp_path / "c.npy").write_bytes(b"")
    assert np.array_equal(one.computed_once(tmp_path / "c.npy", [("mean", (1,))], pictures, ranks, args, compute), whole)
    with pytest.raises(tok.UserError, match="float16"):
        one.computed_once(tmp_path / "b.npy", [("mean", (1,))], pictures, ranks, args, lambda x: [x[:, 0, 0, :1] + 1e6])


# ---- Text


ORDER = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]
MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "a t</w>", "Ã ©</w>"]  # ids 512..517, start 518, end 519


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "vocab.gz"
    path.write_bytes(gzip.compress("\n".join(["header", *MERGES, ""]).encode()))
    return tok.BPE(path)


@pytest.mark.parametrize("text, want", [  # want: words that no merge touches as text, ids of merged ones as numbers
    ("", []), ("cat", [513]), ("The  CAT\n", [515, 513]), ("cat\u3000the", [513, 515]), ("cat é", [513, 517]), ("e\u0301", [517]),
    ("cat's", [513, "'s"]), ("cat\u2019s", [513, "'s"]), ("'\u017f", ["'\u017f"]), ("42", ["4", "2"]), ("a_b", ["a", "_", "b"]),
    ("x²Ⅷ一", ["x", "²", "ⅷ", "一"]), ("日本", ["日本"]), ("😀👍", ["😀👍"]), ("x\u0345x", ["x", "x"]), ("\u0130", ["i", "\u0307"]),
    ("&eacute;&amp;cat", [517, "&", 513]), ("&EACUTE;", [517]), ("&amp;amp;amp;", ["&"]), ("<&amp;amp;amp;", ["<&", "amp", ";"]),
    ("c\0at", [513]), ("\ud800", ["\ufffd"]), ("ｃａｔ", [513]), ("ﬁ", ["fi"]), ("\x1b[31mcat", [513]), ("\x93!", ['"!']),
    ("a<|startoftext|>cat<|EndOfText|>", ["a", 518, 513, 519]), ("<|\u017ftartoftext|>", ["<|\u017ftartoftext|>"])])
def test_ids(bpe, text, want):
    ids = [518]
    for word in want:
        ids += [word] if isinstance(word, int) else [ORDER.index(b) for b in word.encode()]
        ids[-1] += 256 * isinstance(word, str)
    assert bpe.encode(text) == [*ids, 519] and bpe([text])[0].tolist() == [*ids, 519] + [0] * (76 - len(ids))


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory, bpe):
    """A tiny CLIP of OpenAI's names whose text tower knows `bpe`, and that vocabulary: two paths."""
    folder = tmp_path_factory.mktemp("clip")
    shapes = {**clip_shapes(), "token_embedding.weight": (bpe.size, 64)}
    torch.save(official(shapes), folder / "clip.pt")
    (folder / "vocab.gz").write_bytes(bpe.file)
    return folder / "clip.pt", folder / "vocab.gz"


def test_clip_text_end_to_end(trained, small_clip, inception, tmp_path, capsys):
    """Training on captions read by CLIP, prompts, and --eval of captions with a CLIP score that is taken again by hand."""
    write_pairs(tmp_path)
    clip, out = ["--clip", small_clip[0], "--bpe", small_clip[1]], tmp_path / "out"
    inside("train_stage2.py", "--captions", tmp_path / "t.jsonl", *clip, "--out", out, "--stage1", trained / "out" / "stage1.pt", *QUICK2)
    ckpt = out / "stage2.pt"
    inside("sample.py", "--ckpt", ckpt, "--prompt", "the cat", "--prompt", "a " * 100, "--per-class", 2, "--steps", 2, "--out", tmp_path / "p.png")
    assert "too long" in capsys.readouterr().out and Image.open(tmp_path / "p.png").size == (2 * 64, 2 * 64)
    inside("sample.py", "--ckpt", ckpt, "--eval", tmp_path / "t.jsonl", "--num", 12, "--steps", 2, *clip, "--inception", inception,
           "--json", tmp_path / "s.json", "--save", tmp_path / "kept", "--device", "cpu")
    said = capsys.readouterr().out
    rows = {row["metric"]: row["value"] for row in json.loads((tmp_path / "s.json").read_text())}
    pictures, tensors, words = one.Pictures(str(tmp_path / "t.jsonl"), 16), torch.load(small_clip[0], weights_only=True), tok.BPE(small_clip[1])
    vit, tower, cosines = tok.load_encoder(small_clip[0]), tok.load_text_encoder(small_clip[0]), []
    for i in range(12):
        x = torch.from_numpy(np.array(Image.open(tmp_path / "kept" / "generated" / f"{i:06d}.png"))).permute(2, 0, 1)[None] / 127.5 - 1
        x = F.interpolate(x, (64, 64), mode="bicubic", antialias=True)
        x = ((x + 1) / 2 - torch.tensor(tok.CLIP[0]).view(3, 1, 1)) / torch.tensor(tok.CLIP[1]).view(3, 1, 1)
        image = vit(x)[0, 0] @ tensors["visual.proj"]
        text = tower(words([pictures.captions(i)[0]]))[0][len(words.encode(pictures.captions(i)[0])) - 1] @ tensors["text_projection"]
        cosines.append((image @ text / image.norm() / text.norm()).item())
    assert abs(rows["CLIP score"] - 100 * np.mean(cosines)) < 0.01 and {"rFID", "gFID"} <= set(rows) and "eight segments" in said
    assert f"{2.5 * max(0, rows['CLIP score'] / 100):.4f}" in said


def test_cut_and_shapes(bpe):
    ids = bpe(["cat " * 75, "cat " * 76, "the"])
    assert ids.shape == (3, 77) and ids.dtype == torch.long and torch.equal(ids[0], ids[1]) and ids[1, -1] == 519
    assert len(bpe.encode("cat " * 75)) == bpe.context < len(bpe.encode("cat " * 76))
    assert bpe([]).shape == (0, 77) and torch.equal(bpe("cat"), bpe(["cat"]))
    assert bpe.encode("cats bat")[1:-1] == [512, ORDER.index(116), 256 + ORDER.index(115), ORDER.index(98), 516]


@pytest.mark.parametrize("data", [b"", b"text", gzip.compress(b"header\nnot a merge\n"), gzip.compress(b"header\na b\na b\n"),
                                  gzip.compress(b"header\na b\n")[:-9], gzip.compress(b"\xff"), gzip.compress(b"a" * (1 << 25))])
def test_damaged_vocabulary(tmp_path, data):
    (tmp_path / "v.gz").write_bytes(data)
    with pytest.raises(tok.UserError, match="v.gz is not"):
        tok.BPE(tmp_path / "v.gz")
    with pytest.raises(tok.UserError, match="^the vocabulary in the checkpoint is not"):
        tok.BPE(data)


class Reference(nn.Module):
    """The tower from torch.nn's own layers, in float64."""

    def __init__(self, width, heads):
        super().__init__()
        self.token_embedding, self.positional_embedding = nn.Embedding(520, width), nn.Parameter(torch.empty(77, width))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(
            width, heads, 4 * width, 0, lambda x: x * torch.sigmoid(1.702 * x), norm_first=True, batch_first=True)
            for _ in range(2))
        self.ln_final, self.text_projection = nn.LayerNorm(width), nn.Parameter(torch.empty(width, width))
        for i, p in enumerate(self.double().parameters()):
            p.data.normal_(0, .2, generator=torch.Generator().manual_seed(i))

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding
        for block in self.blocks:
            x = block(x, nn.Transformer.generate_square_subsequent_mask(77, dtype=x.dtype))
        x = self.ln_final(x)
        return x, torch.stack([row[n] for row, n in zip(x, (ids == 519).int().argmax(1))]) @ self.text_projection


def layouts(width):
    """The same weights with OpenAI's and with Hugging Face's names, and with what else such files hold."""
    openai, face = {"visual.proj": torch.ones(3, 3), "blocks.0.attn_mask": torch.ones(77, 77)}, {"logit_scale": torch.ones(())}
    for k, v in Reference(width, width // 32 if width % 64 else width // 64).float().state_dict().items():
        n = k.replace("self_attn", "attn").replace("norm", "ln_")
        openai[n.replace("blocks", "transformer.resblocks").replace("linear1", "mlp.c_fc").replace("linear2", "mlp.c_proj")] = v
        n = k.replace("blocks", "encoder.layers").replace("norm", "layer_norm").replace("linear", "mlp.fc").replace("ln_f", "f")
        n = n.replace("token_", "embeddings.token_").replace("positional_embedding", "embeddings.position_embedding.weight")
        for part, rows in zip("qkv", v.chunk(3)) if "in_proj" in n else [("", v)]:
            face["text_model." + n.replace("in_proj_", part + "_proj.").replace("final.", "final_layer_norm.")] = rows
    face["text_projection.weight"] = face.pop("text_model.text_projection").t()  # square: a missed transpose would load
    return openai, face


@pytest.mark.parametrize("width, heads", [(96, 3), (128, 2)])
def test_tower_layouts_and_padding(monkeypatch, bpe, width, heads):
    ids = bpe(["a cat", "the bat sat", ""])
    features, end = Reference(width, heads)(ids)
    openai, face = layouts(width)
    for file, far in (openai, 1e-5), (face, 1e-5), ({k: v.half() for k, v in openai.items()}, 1e-2):
        monkeypatch.setattr(tok, "read_tensors", lambda path: file)
        tower = tok.load_text_encoder("file")
        assert (tower(ids) - features).abs().max() < far and (tower.embed(ids) - end).abs().max() < far
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in tower.parameters())
    padded = torch.where(ids == 0, torch.randint(1, 520, ids.shape), ids)  # other end tokens too: the first one counts
    assert torch.equal(tower.embed(ids), tower.embed(padded)) and torch.allclose(tower(ids[:, :9]), tower(ids)[:, :9], atol=1e-5)
    for a, b, n in zip(tower(ids), tower(padded), ids.argmax(1) + 1):
        assert torch.equal(a[:n], b[:n]) and not torch.equal(a[n:], b[n:])


@pytest.mark.parametrize("layout, kept, more, says", [
    (0, "^$", ["patch_embed.x"], "looks like a plain ViT"), (1, "^text_model", [], "missing 1: text_projection"), (0, "", ["spare"], "spare"),
    (0, "^(?!.*resblocks.0.ln_1)", [], "blocks.0.norm1.weight"),
    (1, "^(?!.*0.self_attn.q_proj.w)", [], "blocks.0.attn.qkv.weight")])
def test_wrong_text_file(monkeypatch, layout, kept, more, says):
    file = {k: v for k, v in layouts(96)[layout].items() if re.search(kept, k)} | {k: torch.ones(2) for k in more}
    monkeypatch.setattr(tok, "read_tensors", lambda path: file)
    with pytest.raises(tok.UserError, match="^wrong.pth.*" + says):
        tok.load_text_encoder("wrong.pth")


def test_text_in_the_mixer():
    """Zero start: text changes nothing yet. Then padding never changes an output, and no text is the learned null."""
    torch.manual_seed(0)
    m = mix.Mixer(K=2, D=8, hidden=16, depth=2, classes=0, text_width=12)
    z, t, text, mask = torch.randn(3, 2, 8), torch.rand(3), torch.randn(3, 5, 12), torch.arange(5) < torch.tensor([[5], [2], [3]])
    assert m.layers[0].tokens.up.weight.shape[1] == 2 + 4 + 1 and torch.equal(m(z, t, None, text, mask), m(z, t, None, text * 2 + 1, mask))
    busy(m)
    out = m(z, t, None, text, mask)
    noise = torch.where(mask[..., None], text, torch.randn_like(text))
    assert torch.equal(out, m(z, t, None, noise, mask)) and (out - m(z, t, None, text + 1, mask.roll(1, 1))).abs().max() > 1e-4
    longer = m(z, t, None, F.pad(text, (0, 0, 0, 4)), F.pad(mask, (0, 4)))
    assert torch.allclose(out, longer, atol=1e-5)
    null = m(z, t, None, text, mask & False)
    assert torch.equal(null, m(z, t, None, torch.randn_like(text), mask & False)) and (null - out).abs().max() > 1e-4
    at = torch.tensor([0.5])
    guided = mix.guided(m, None, text, mask, 3.0)(z, at)
    u, c = m(z, at, None, text, mask & False), m(z, at, None, text, mask)
    assert torch.allclose(guided, u + 3 * (c - u), atol=1e-4) and torch.equal(mix.guided(m, None, text, mask, 1.0)(z, at), c)


def test_cross_attention_against_torch():
    c = busy(mix.CrossAttention(128, 24))
    x, text, mask = torch.randn(2, 3, 128), torch.randn(2, 5, 24), torch.arange(5) < torch.tensor([[5], [2]])
    kv = text @ c.kv.weight.T + c.kv.bias
    ref = nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():  # its own projections are made the identity
        ref.in_proj_weight.copy_(torch.eye(128).repeat(3, 1)), ref.in_proj_bias.zero_(), ref.out_proj.load_state_dict(c.out.state_dict())
    want, _ = ref(c.q(c.norm(x)), kv[..., :128], kv[..., 128:], key_padding_mask=~mask)
    assert torch.allclose(c(x, text, mask), want, atol=1e-5)


def test_word_encoder_masks_padding():
    w = tok.WordEncoder(["a", "red", "seven", "on", "blue"])
    short, both = w.ids(["a red seven"]), w.ids(["a red seven", "a red seven on blue on blue"])
    assert both.tolist()[0] == [2, 3, 4, 0, 0, 0, 0] and w.ids(["zebra"]).tolist() == [[1]] and len(w.split("a " * 30)) == 30 > w.context
    assert torch.allclose(w(short)[0], w(both)[0, :3], atol=1e-5)
    assert (w(w.ids(["red on blue"])) - w(w.ids(["blue on red"])))[0, 1].abs().max() > 1e-4  # order counts


def write_pairs(folder, count=12):
    """Captioned digits as folder of pairs, .tsv, .jsonl and two .tar shards; pictures' names."""
    (folder / "pairs").mkdir()
    plans = [one.plan_digit(i, 3, named=True) for i in range(count)]
    for i, plan in enumerate(plans):
        Image.fromarray(one.draw_digit(plan, 16)).save(folder / "pairs" / f"{i:02d}.png")
        (folder / "pairs" / f"{i:02d}.txt").write_text("\n".join(plan.captions[:2]))
    rows = [(f"pairs/{i:02d}.png", c) for i, plan in enumerate(plans) for c in plan.captions[:2]]
    (folder / "t.tsv").write_text("".join(f"{file}\t{c}\n" for file, c in rows))
    (folder / "t.jsonl").write_text("".join(json.dumps({"file": file, "caption": c}) + "\n" for file, c in rows))
    (folder / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for path in sorted((folder / "pairs").glob("*"))[shard * count:(shard + 1) * count]:
                tar.add(path, path.name)
    return plans


def test_captioned_sources_agree(tmp_path):
    plans = write_pairs(tmp_path)
    sets = [one.Pictures(str(tmp_path / name), 16) for name in ("pairs", "t.tsv", "t.jsonl", "shards")]
    for i, plan in enumerate(plans):
        for p in sets:
            assert len(p) == 12 and not p.classes and p.captions(i) == plan.captions[:2]
            assert torch.equal(p[i][0], torch.from_numpy(one.draw_digit(plan, 16)).permute(2, 0, 1))
    seen = [sum((list(o) for o in one.Order(12, 4, one.argparse.Namespace(rank=r, world=2), 0, 3, 0)), []) for r in (0, 1)]
    assert sorted(sum(seen, [])) == list(range(12))  # two ranks, one epoch: every picture once
    (tmp_path / ".odd").mkdir()  # a table names its pictures itself, whatever their folder; a caption may hold Unicode's line ends
    shutil.copy(tmp_path / "pairs" / "03.png", tmp_path / ".odd" / "a.png")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"file": "./.odd/a.png", "caption": "a\u2028red 7"}, ensure_ascii=False), encoding="utf-8")
    assert one.Pictures(str(tmp_path / "odd.jsonl"), 16).captions(0) == ["a\u2028red 7"]
    (tmp_path / "shards" / "._0.tar").write_bytes(b"what macOS leaves beside a file")
    assert len(one.Pictures(str(tmp_path / "shards"), 16)) == 12
    with zipfile.ZipFile(tmp_path / "torn.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "pairs" / "03.png", "a.png"), archive.writestr("a.txt", "red seven" * 99)
    data = (tmp_path / "torn.zip").read_bytes()
    at = data.index(b"a.txt") + 5
    (tmp_path / "torn.zip").write_bytes(data[:at] + b"\xff" * 9 + data[at + 9:])
    with pytest.raises(tok.UserError, match="a.png"):
        one.Pictures(str(tmp_path / "torn.zip"), 16).captions(0)
    (tmp_path / "pairs" / "03.txt").write_text(" ")
    with pytest.raises(tok.UserError, match="03.png"):
        one.Pictures(str(tmp_path / "pairs"), 16).captions(3)
    (tmp_path / "t.tsv").write_text("pairs/77.png\ta red 7\n")
    with pytest.raises(tok.UserError, match="77.png"):
        one.Pictures(str(tmp_path / "t.tsv"), 16)
    (tmp_path / "t.tsv").write_text("pairs/01.png\t \n")
    with pytest.raises(tok.UserError, match="empty"):
        one.Pictures(str(tmp_path / "t.tsv"), 16)


def test_text_to_image_commands(trained, tmp_path, capsys):
    """Words trained along, features made beforehand, CLIP; prompts, features and refusals."""
    write_pairs(tmp_path)
    stage1 = ["--stage1", trained / "out" / "stage1.pt"]
    inside("train_stage2.py", "--captions", tmp_path / "shards", "--out", tmp_path / "words", *stage1, *QUICK2)
    ckpt, whole = tmp_path / "words" / "stage2.pt", losses(tmp_path / "words" / "stage2.jsonl")
    ckpt.unlink()  # goes on from the one before it, of step 3: Mixer and text encoder
    inside("train_stage2.py", "--captions", tmp_path / "shards", "--out", tmp_path / "words", *stage1, *QUICK2)
    assert losses(tmp_path / "words" / "stage2.jsonl") == whole and len(whole) == 6
    (tmp_path / "prompts.txt").write_text("a red 7\n\non black, a grey 3\n")
    inside("sample.py", "--ckpt", ckpt, "--prompts", tmp_path / "prompts.txt", "--per-class", 2, "--steps", 2, "--out", tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size == (2 * 64, 2 * 64)
    inside("sample.py", "--ckpt", ckpt, "--prompt", "a red 7 on white", "--prompt", "on black, a grey 3", "--per-class", 3, "--steps", 2, "--cfg", 3,
            "--out", tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size == (3 * 64, 2 * 64)
    assert fid.sha256(tmp_path / "shards") != fid.sha256(tmp_path / "pairs")  # a folder of shards is a reference too
    for args, says in ((["--ckpt", ckpt], "--prompt"), (["--ckpt", ckpt, "--prompt", " "], "--prompt"), (["--ckpt", trained / "out" / "stage2.pt", "--prompt", "x"], "no text"),
                       (["--ckpt", ckpt, "--prompts", tmp_path / "gone.txt"], "--prompts"), (["--ckpt", ckpt, "--prompt", "x", "--classes", 3], "--classes"),
                       (["--ckpt", ckpt, "--eval", trained / "data"], "no captions")):
        assert says in refusal("sample.py", args, capsys)
    for i in range(12):
        np.savez(tmp_path / "pairs" / f"{i:02d}.npz", features=np.random.randn(3 + i % 2, 6).astype(np.float16), mask=np.ones(3 + i % 2, bool))
    with tarfile.open(tmp_path / "with.tar", "w") as tar:
        for path in sorted((tmp_path / "pairs").glob("*")):
            tar.add(path, path.name)
    for out, source in (("made", "pairs"), ("tarred", "with.tar")):
        inside("train_stage2.py", "--captions", tmp_path / source, "--out", tmp_path / out, *stage1, *QUICK2)
    assert losses(tmp_path / "made" / "stage2.jsonl") == losses(tmp_path / "tarred" / "stage2.jsonl")
    inside("sample.py", "--ckpt", tmp_path / "made" / "stage2.pt", "--features", tmp_path / "pairs" / "00.npz", "--steps", 2, "--out", tmp_path / "f.png")
    np.savez(tmp_path / "padded.npz", features=np.ones((5, 6)), mask=np.arange(5) < 2)
    args = one.argparse.Namespace(prompt=None, prompts=None, features=[tmp_path / "pairs" / "00.npz", tmp_path / "padded.npz"], classes=None)
    got = sample.conditions_of(RepTok.load(tmp_path / "made" / "stage2.pt"), args)
    assert got["text"].shape == (2, 5, 6) and got["mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 2 + [False] * 3]
    assert "no text encoder" in refusal("sample.py", ["--ckpt", tmp_path / "made" / "stage2.pt", "--prompt", "x"], capsys)
    np.savez(tmp_path / "pairs" / "05.npz", features=np.zeros((3, 7), np.float16))
    for file, says in (("05.npz", "(L,6)"), ("05.txt", "not an .npz")):
        assert says in refusal("sample.py", ["--ckpt", tmp_path / "made" / "stage2.pt", "--features", tmp_path / "pairs" / file], capsys)
    assert "width" in refusal("train_stage2.py", ["--captions", tmp_path / "pairs", "--out", tmp_path / "wide", *stage1, *QUICK2], capsys)


# ---- Scores: fid.py


def fid_picture(i, h, w):
    """uint8 (h,w,3): waves that differ with i, from integers only."""
    y, x, c = np.mgrid[:h, :w, :3]
    return ((y * (3 + i) + x * (5 + 2 * i) + (x * y) // (7 + i) + 60 * c) % 256).astype(np.uint8)


def fid_batch(*numbers, size=(40, 56)):
    return torch.from_numpy(np.stack([fid_picture(i, *size) for i in numbers])).permute(0, 3, 1, 2)


def save_tree(folder, sizes, start=0):
    for i, size in enumerate(sizes):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(fid_picture(start + i, *size)).save(folder / str(i % 2) / f"{i:03d}.png")
    return folder


def fid_refuses(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        fid.main([str(a) for a in args])
    out, line = capsys.readouterr()
    assert stop.value.code == 2 and not out and line.count("\n") == 1 and line.startswith("fid.py: error: "), (args, out, line)
    return line


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    shapes = {k: v.shape for k, v in fid.Inception("tf1").state_dict().items() if "tracked" not in k}
    torch.save({k: 1 + 0.25 * uniform(k, s) if k.endswith("_var") else seeded(k, s, 2**0.5) for k, s in shapes.items()}, path)
    return path


def test_inception_features(inception):
    for resize, expected in (  # as pytorch-fid 0.3.0 and torch-fidelity 0.4.0 give
            ("pytorch-fid", [0.16020, 0.26052, 0.91411, 1.39036, 2.02914, 12.74936]), ("tf1", [0.16430, 0.24872, 0.92448, 1.38595, 2.03273, 12.93768])):
        net, x = fid.load_inception(inception, resize), fid_batch(0, 1)
        features = net(x)
        assert (features[1, [0, 400, 800, 1200, 1600, 1926]] - torch.tensor(expected)).abs().max() < 5e-5
        assert (net(x[:1], x[1:]) - features).abs().max() < 5e-5 and (net(x[1:]) - features[1:]).abs().max() < 5e-5
    with pytest.raises(TypeError, match="uint8"):
        net(x.float())
    x = torch.arange(3 * 598 * 598).view(1, 3, 598, 598).remainder(251).byte()  # tf1: source = 2 target, no half-pixel shift
    assert torch.equal(net.prepare(x), (x[..., ::2, ::2].float() - 128) / 128)


def test_frechet_closed_forms():
    r = np.random.RandomState(0)
    mu, shift, cov, d1, d2 = r.randn(40), r.randn(40), np.cov(r.randn(90, 40), rowvar=False), r.rand(40), r.rand(40)
    for args, exact in (((cov, mu, cov), 0), ((cov, mu + shift, cov), (shift**2).sum()), ((4 * cov, mu, 9 * cov), np.trace(cov)),
                        ((np.diag(d1), mu, np.diag(d2)), ((d1**0.5 - d2**0.5) ** 2).sum())):
        assert math.isclose(fid.frechet_distance(mu, *args), exact, rel_tol=1e-9, abs_tol=1e-9)
    for n1, n2 in ((5, 7), (30, 4), (4, 90)):  # singular: tr (C1 C2)^(1/2) is the nuclear norm of A B^T
        x, y = 100 + r.randn(n1, 40), r.randn(n2, 40)
        u, v = (x - x.mean(0)) / (n1 - 1) ** 0.5, (y - y.mean(0)) / (n2 - 1) ** 0.5
        exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (u**2).sum() + (v**2).sum() - 2 * np.linalg.svd(u @ v.T, compute_uv=False).sum()
        assert math.isclose(fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)), exact, rel_tol=1e-12)
    for other in ((mu[:9], cov[:9, :9]), (mu * np.nan, cov)):
        with pytest.raises(fid.UserError, match="no finite statistics of one size"):
            fid.frechet_distance(mu, cov, *other)


RANK = """import sys, numpy as np, torch, fid
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
s = fid.Statistics(20)
for chunk in torch.from_numpy(np.load(sys.argv[3]))[int(sys.argv[2])::2].split(7):
    s.update(chunk)
np.savez(sys.argv[4], mu=s.reduce().mu, cov=s.cov, n=s.n)
torch.distributed.barrier(), torch.distributed.destroy_process_group()"""


def test_statistics_batches_and_ranks(tmp_path):
    x = np.random.RandomState(0).rand(101, 20).astype(np.float32) * 3 + 1
    np.save(tmp_path / "x.npy", x)
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, tmp_path / "meet", str(r), tmp_path / "x.npy", tmp_path / f"{r}.npz"],
                              cwd=HERE, stderr=subprocess.DEVNULL) for r in range(2)]
    made = [fid.Statistics(20) for _ in range(3)]
    for s, batch in zip(made, (1, 8, 101)):
        for chunk in torch.from_numpy(x).split(batch):
            s.update(chunk)
    assert [p.wait(60) for p in ranks] == [0, 0]
    found = [(s.n, s.mu, s.cov) for s in made] + [[np.load(tmp_path / f"{r}.npz")[k] for k in ("n", "mu", "cov")] for r in range(2)]
    for n, mu, cov in found:
        assert n == 101 and np.allclose(mu, x.mean(0, dtype=float), rtol=1e-12, atol=0)
        assert np.allclose(cov, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)


def test_psnr_ssim_and_rounding():
    a, b, zero = fid_batch(0, 1, size=(24, 31)), fid_batch(0, 5, size=(24, 31)), torch.zeros(1, 3, 16, 16)
    assert fid.psnr(a, a).tolist() == [math.inf] * 2 and torch.allclose(fid.ssim(a, a), torch.ones(2).double())
    assert math.isclose(fid.psnr(zero, zero + 0.1).item(), 20, rel_tol=1e-6) and math.isclose(fid.ssim(zero, zero + 1).item(), 1e-4 / 1.0001, rel_tol=1e-6)
    blur = lambda x: scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5, axes=(0, 1))[5:-5, 5:-5]  # noqa: E731
    for i, value in enumerate(fid.ssim(a, b)):
        p, q = (x[i].permute(1, 2, 0).double().numpy() / 255 for x in (a, b))
        m, n = blur(p), blur(q)
        vp, vq, c = blur(p * p) - m * m, blur(q * q) - n * n, blur(p * q) - m * n
        score = (2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (vp + vq + 9e-4))
        assert math.isclose(value, score.mean(), abs_tol=1e-9)
    with pytest.raises(ValueError, match="16"):
        fid.pair_scores(a[..., :10], b[..., :10])
    assert fid.to_uint8(torch.tensor([-2.0, -1, 0.003, 0.9999, 1])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(fid.UserError):
        fid.to_uint8(zero / 0)


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """--vgg and --lpips, with weights that are functions of their names."""
    folder = tmp_path_factory.mktemp("lpips")
    convs = [(0, 64, 3), (2, 64, 64), (5, 128, 64), (7, 128, 128), (10, 256, 128), (12, 256, 256), (14, 256, 256), (17, 512, 256)]
    convs += [(i, 512, 512) for i in (19, 21, 24, 26, 28)]
    vgg = {f"features.{i}.{k}": seeded(f"features.{i}.{k}", s, 2**0.5) for i, o, c in convs for k, s in (("weight", (o, c, 3, 3)), ("bias", (o,)))}
    heads = {f"lin{i}.model.1.weight": seeded(f"lin{i}", (1, c, 1, 1)).abs() for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(vgg | {"classifier.0.weight": torch.zeros(3)}, folder / "vgg.pth", _use_new_zipfile_serialization=False)
    torch.save(heads, folder / "heads.pth")
    return ["--vgg", folder / "vgg.pth", "--lpips", folder / "heads.pth"]


def test_lpips_and_pairs(lpips, tmp_path, capsys):
    net, x = fid.LPIPS(*lpips[1::2]), fid_batch(0, 1, size=(32, 40)) / 127.5 - 1
    assert torch.allclose(net(x, x[[1, 1]]), torch.tensor([0.1519165, 0]), rtol=1e-5)  # lpips 0.1.4
    sizes, args = [(32, 40), (20, 24)], [tmp_path / "real", tmp_path / "fake", "--pairs", *lpips]
    save_tree(args[0], sizes), save_tree(args[1], sizes, 2)
    fid.main([str(a) for a in [*args, "--json", tmp_path / "s.json"]])
    scores, each = json.loads((tmp_path / "s.json").read_text()), [(fid_batch(i, size=s), fid_batch(i + 2, size=s)) for i, s in enumerate(sizes)]
    assert capsys.readouterr().out.count("\n") == 3 and [s["metric"] for s in scores] == ["PSNR", "SSIM", "LPIPS"]
    assert np.allclose([s["value"] for s in scores], torch.cat([fid.pair_scores(*pair, net) for pair in each]).mean(0), rtol=1e-6)
    (args[1] / "0" / "000.png").rename(args[1] / "0" / "stray.png")
    assert f"2 without a partner: 0/000 of {args[0]}, 0/stray of {args[1]}" in fid_refuses(capsys, *args)


def test_pictures_are_read_as_rgb(tmp_path):
    rgb, grey = fid_picture(3, 12, 9), fid_picture(3, 12, 9)[..., 0]
    three = np.repeat(grey[..., None], 3, 2)
    kinds = {"a.png": (rgb, None, rgb), "b.png": (grey, None, three), "c.png": (three // 51 * 51, "P", three // 51 * 51),  # the web palette
             "d.png": (grey.astype(np.uint16) * 257, None, three), "e.tif": (rgb, "CMYK", rgb), "f.png": (rgb, "RGBA", rgb)}
    for name, (x, mode, _) in kinds.items():
        (Image.fromarray(x).convert(mode) if mode else Image.fromarray(x)).save(tmp_path / name)
    read = dict(fid.images(tmp_path, workers=2))
    assert list(read) == list(kinds) and all(x.dtype == np.uint8 and np.array_equal(x, kinds[n][2]) for n, x in read.items())


def test_fid_command(tmp_path, inception, capsys):
    a, b = save_tree(tmp_path / "a", [(32, 32)] * 5), save_tree(tmp_path / "b", [(32, 32)] * 3 + [(20, 40)], 7)
    fid.main([str(v) for v in (a, b, "--inception", inception, "--save-stats", tmp_path / "s.npz", "--json", tmp_path / "s.json")])
    (out, line), (made,) = capsys.readouterr(), json.loads((tmp_path / "s.json").read_text())
    assert (made["n_real"], made["n_fake"], made["preprocessing"]) == (5, 4, "pytorch-fid") and made["weights_sha256"] == fid.sha256(inception)
    assert {"torch", "numpy", "scipy", "pillow"} <= set(made["versions"]) and made["reference"] == str(a) and len(made["reference_sha256"]) == 64
    assert out.count("\n") == line.count("\n") == 1 and "biased" in line and "N = 2049" in line and math.isclose(made["value"], 764.834130, rel_tol=1e-5)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        [z.write(f, f.relative_to(a)) for f in a.rglob("*.png")]
    net, order, saved = fid.load_inception(inception), [0, 2, 4, 1, 3], fid.read_statistics(tmp_path / "s.npz")
    np.savez_compressed(tmp_path / "a.npz", np.stack([fid_picture(i, 32, 32) for i in order]))
    for source in (tmp_path / "a.zip", tmp_path / "a.npz"):
        assert all(np.array_equal(x, fid_picture(i, 32, 32)) for i, (_, x) in zip(order, fid.images(source, workers=2), strict=True))
        assert all(np.array_equal(x, fid_picture(i, 32, 32)) for i, (_, x) in zip((2, 1), fid.images(source, rank=1, world=2), strict=True))
        side = fid.measure(source, net, batch=3, workers=1)
        assert side.n == saved.n == 5 and np.allclose(side.mu, saved.mu, atol=1e-5) and np.allclose(side.cov, saved.cov, atol=1e-3)
    adm = tmp_path / "adm.npz"  # mu and sigma win; no weights are needed; N by the rank, as the file does not say
    np.savez(adm, mu=np.zeros(6), sigma=np.diag([3, 2, 1.0, 0, 0, 0]), arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    fid.main([str(adm), str(adm)])
    out, line = capsys.readouterr()
    assert "FID 0.000000" in out and "N = 4 and 4" in line and "N = 7" in line
    assert "do not compare" in fid_refuses(capsys, tmp_path / "s.npz", b, "--inception", inception, "--resize", "tf1")


def test_fid_bad_input(tmp_path, inception, capsys):
    good, gone = save_tree(tmp_path / "good", [(16, 16)] * 2), tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    for name, arrays in {"other": {"x": np.zeros(3)}, "float": {"arr_0": np.zeros((2, 8, 8, 3))}, "object": {"arr_0": np.array([{}])},
                         "nan": {"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "pickle": {"mu": np.array([{}]), "sigma": np.eye(4)},
                         "full": {"arr_0": np.stack([fid_picture(i, 16, 16) for i in range(9)])}}.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    whole = (tmp_path / "full.npz").read_bytes()
    for name, data in (("full.zip", whole), ("short.npz", whole[:3000]), ("flip.npz", whole[:3000] + bytes([whole[3000] ^ 64]) + whole[3001:])):
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "lies.npz", "w") as z, zipfile.ZipFile(tmp_path / "claims.npz", "w") as c:
        z.writestr("arr_0.npy", whole[whole.index(b"\x93NUMPY"):][:5000].replace(b"(9, 16, 16, 3), }     ", b"(900009, 16, 16, 3), }"))
        c.writestr("mu.npy", b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (900000000,), }".ljust(117) + b"\n")
        c.writestr("sigma.npy", b"")
    (save_tree(tmp_path / "broken", [(16, 16)]) / "bad.png").write_bytes((good / "0" / "000.png").read_bytes()[:60])
    torch.save({"conv.weight": torch.zeros(2), "epoch": 3}, tmp_path / "wrong.pth")
    (tmp_path / "cut.pth").write_bytes(inception.read_bytes()[:100000])
    for args, words in {
            (): "required", (good,): "FAKE is missing", (good, good, "--resiz", "tf1"): "unrecognized", (good, good, "--resize", "x"): "invalid choice",
            (good, tmp_path / "none"): "No such file", (good, tmp_path / "full.zip"): "no pictures", (good, tmp_path / "other.npz"): "arr_0",
            (good, tmp_path / "float.npz"): "uint8", (good, tmp_path / "object.npz"): "object", (good, tmp_path / "short.npz"): "short.npz",
            (tmp_path / "nan.npz",) * 2: "finite", (tmp_path / "pickle.npz",) * 2: "OBJECT", (good, tmp_path / "cut.pth"): "cut.pth",
            (tmp_path / "claims.npz",) * 2: "cannot reshape", (good, good, "--inception", gone): f"fid_weights/{gone.name}",
            (good, good, "--inception", tmp_path / "wrong.pth"): "names missing", (good, good, "--inception", tmp_path / "cut.pth"): "damaged",
            (tmp_path / "broken", good, "--inception", inception): "bad.png"}.items():
        assert words in fid_refuses(capsys, *args), args
    for source, word in (("broken", "bad.png"), ("flip.npz", "flip.npz"), ("lies.npz", "00000006 in ")):
        with pytest.raises(fid.UserError, match=word):
            list(fid.images(tmp_path / source))


# ---- Files from strangers: nothing in them runs, a wrong one names itself, a broken one is one line

ERRORS = (tok.UserError, dec.UserError, fid.UserError)


def sentence(read, path):
    """The sentence with which `read` refuses the file, "" where it takes it; other exceptions go through."""
    try:
        read(path)
    except ERRORS as e:
        said, cause = " ".join(str(e).split()), e
        while cause := cause.__context__:
            assert not isinstance(cause, MemoryError), said  # nothing may ask for what a file claims
        assert str(path) in said and len(said) < 1500 + len(str(path)) and "trust" not in said and said.isprintable(), said
        return said
    return ""


def dinov2(width=64):
    state = tok.ViT(width=width, depth=2, heads=2, registers=2, layer_scale=True, patch=14, grid=2).state_dict()
    return state | {"mask_token": torch.zeros(1, width)}


def clip(dtype=torch.float32):
    """{name: tensor} in OpenAI's names, both towers, matrices in `dtype`, with the scalars that the archives hold."""
    shapes = clip_shapes(64, 32, 1) | {"token_embedding.weight": (99, 32), "visual.conv1.weight": (64, 3, 4, 4), "visual.positional_embedding": (5, 64)}
    state = {k: v.to(dtype) if v.ndim > 1 else v for k, v in official(shapes).items()}
    return state | {k: torch.tensor(n) for k, n in (("input_resolution", 8), ("context_length", 77), ("vocab_size", 99))}


class Branch(nn.Sequential):
    """A module whose children and tensors have any names; torch.jit keeps them all."""

    def forward(self, x):
        return x + 1


def torchscript(state, path):
    """What OpenAI published: the tensors as attributes of a traced module, and a mask that is no weight."""
    root = Branch()
    for name, tensor in state.items():
        node, (*above, last) = root, name.split(".")
        for step in above:
            if step not in node._modules:
                node.add_module(step, Branch())
            node = node._modules[step]
        node.register_buffer(last, tensor)
    root.transformer.attn_mask = torch.zeros(77, 77)
    with warnings.catch_warnings(action="ignore"):  # torch deprecates what OpenAI used
        torch.jit.trace(root.eval(), torch.zeros(1), check_trace=False).save(str(path))
    return path.read_bytes()


def members(data):
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        return {name: z.read(name) for name in z.namelist()}


def zipped(parts, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(made := io.BytesIO(), "w", method) as z:
        for name, data in parts.items():
            z.writestr(name, data)
    return made.getvalue()


def written(write, *args, **more):
    """The bytes that `write` leaves: of torch.save(content, file), np.savez(file, ...), Image.save(file, ...)."""
    made = io.BytesIO()
    write(args[0], made, **more) if write is torch.save else write(made, *args, **more)
    return made.getvalue()


OLD = {"_use_new_zipfile_serialization": False}  # torch's format before 1.6


class Run:
    """Unpickling it calls f(*args)."""

    def __init__(self, f, *args):
        self.call = f, args

    def __reduce__(self):
        return self.call


def test_files_made_to_run_code_do_not(tmp_path, capsys):
    mark, inner = tmp_path / "ran.npy", tmp_path / "inner.pkl"
    m, script = str(mark), members(torchscript(clip(), tmp_path / "script.pt"))
    root = next(k for k in script if k.endswith("/data.pkl"))
    inner.write_bytes(pickle.dumps(Run(os.mkdir, m)))
    harms = [
        Run(os.system, f"touch {m}"),
        Run(exec, f"open({m!r}, 'w')"),
        Run(eval, f"open({m!r}, 'w')"),
        Run(open, m, "w"),
        Run(os.mkdir, m),
        Run(subprocess.check_call, ["touch", m]),
        Run(np.save, m, 0),
        Run(torch.save, 0, m),
        Run(getattr, Run(open, m, "w"), "name"),
        Run(functools.partial(torch.load, weights_only=False), inner),
    ]
    readers = [tok.load_encoder, tok.load_text_encoder, dec.load_vae, RepTok.load, one.encoder, fid.read_statistics]
    for n, harm in enumerate(harms):
        with contextlib.suppress(RuntimeError):  # of torch.load, after it has run inner.pkl
            pickle.loads(pickle.dumps(harm))  # the other unpickler does harm
        assert mark.exists(), harm.call
        mark.rmdir() if mark.is_dir() else mark.unlink()
        bare = {"kind": "prior", "state_dict": {"cls_token": torch.ones(1), "x": harm}, "config": harm}
        data = pickle.dumps(bare | {"state_dict": harm, "state": 0}, n % 6)
        files = {
            "zip.pt": written(torch.save, bare),
            "whole.pt": written(torch.save, harm),
            "zip.ckpt": written(torch.save, bare),
            "old.pth": written(torch.save, bare, **OLD),
            "plain.pth": data,
            "plain.ckpt": data,
            "plain.safetensors": data,
            "plain.npz": data,
            "script.pt": zipped(script | {root: data}),
            "mu.npz": written(np.savez, mu=np.array([harm], object), sigma=np.eye(1)),
        }
        for name in files:
            (tmp_path / name).write_bytes(files[name])
            for read in readers + [fid.load_inception] * (n == 0 and name in ("zip.pt", "old.pth", "script.pt")):
                assert sentence(read, tmp_path / name), (read, name)  # none of them is a whole encoder, VAE or checkpoint
                assert not mark.exists(), (harm.call, read, name)
    for script, *options in (
        ("sample.py", "--ckpt"),
        ("train_stage1.py", "--out", tmp_path / "o", "--encoder"),
        ("train_stage1.py", "--out", tmp_path / "o", "--vae"),
    ):
        assert "zip.ckpt" in refusal(script, [*options, tmp_path / "zip.ckpt"], capsys) and not mark.exists()


class Colour(enum.Enum):
    RED = 1


def test_classes_of_other_packages_load_inertly(tmp_path):
    """A file of Lightning's kind, with classes that cannot be imported when it is read."""
    gone, state = types.ModuleType("gone"), dinov2()
    for base in (dict, list, set, object, collections.OrderedDict, collections.defaultdict, collections.namedtuple("Pair", "a b")):
        setattr(gone, base.__name__, type(base.__name__, (base,), {"__module__": "gone"}))
    gone.Slots, gone.Colour, Colour.__module__ = type("Slots", (), {"__slots__": ("a",), "__module__": "gone"}), Colour, "gone"
    node, slots, pair = gone.object(), gone.Slots(), gone.Pair(1, torch.ones(1))
    node.__dict__.update(_content={"scale_factor": 1.3}, _parent=node)
    slots.a = 1
    other = [
        gone.dict(a=1),
        gone.list([1, 2]),
        gone.set([3]),
        gone.OrderedDict(b=2),
        gone.defaultdict(list, c=[1]),
        node,
        pair,
        slots,
        Colour.RED,
        {Colour.RED: 1, gone.object: 2, pair: 3, (1, 2): 4},
        PurePosixPath("/a"),
        np.float64(3),
        np.arange(3),
        {1, 2},
        functools.partial(max, 1),
        collections.Counter("aab"),
        collections.deque([1]),
        torch.device("cpu"),
        torch.bfloat16,
        torch.Size([1]),
        1j,
        range(3),
        b"x",
        bytearray(b"y"),
        frozenset([1]),
        nn.Linear(1, 1),
        torch.complex(torch.ones(1), torch.ones(1)),
    ]
    lightning = {"epoch": 1, "state_dict": collections.OrderedDict(state), "hyper_parameters": node, "callbacks": other, "loops": {"x": other}}
    for more in {}, {"pickle_protocol": 3}, {"pickle_protocol": 4}, {"pickle_protocol": 5}:
        sys.modules["gone"] = gone
        (tmp_path / "a.ckpt").write_bytes(written(torch.save, lightning, **more))
        del sys.modules["gone"]
        settings = tok.read_file(tmp_path / "a.ckpt")["hyper_parameters"]
        assert settings["_content"]["scale_factor"] == 1.3 and "gone" not in sys.modules
        loaded = tok.load_encoder(tmp_path / "a.ckpt").state_dict()
        assert all(torch.equal(loaded[k], state[k]) for k in loaded) and len(loaded) == len(state) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torchscript_archive_of_clip_equals_its_state_dict(tmp_path, dtype):
    torchscript(state := clip(dtype), tmp_path / "script.pt"), torch.save(state, tmp_path / "state.pt")
    for read in (tok.load_encoder, tok.load_text_encoder):
        a, b = (read(tmp_path / name).state_dict() for name in ("script.pt", "state.pt"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == torch.float32 for k in a)


def test_safetensors(tmp_path):
    path, state, two, huge = tmp_path / "a.safetensors", dinov2(), {"a": torch.zeros(4), "b": torch.zeros(4)}, 2**40
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        path.write_bytes(safetensors({k: v.to(dtype) for k, v in state.items()}))
        assert all(torch.equal(v, state[k].to(dtype).float()) for k, v in tok.load_encoder(path).state_dict().items())
    entry = lambda shape, a, b, dtype="F32": {"dtype": dtype, "shape": shape, "data_offsets": [a, b]}
    lies = [
        ([8], 16, 48),
        ([huge], 0, 4 * huge),
        ([-4], 0, 16),
        ([-2, -2], 0, 16),
        ([4], -16, 0),
        ([4], 16, 0),
        ([3], 0, 16),
        ([huge, huge], 0, 16),
        ([4], 0, 16, "F99"),
        ([[0], huge], 0, 16),
        (["x", huge], 0, 16),
        ([4.0], 0, 16),
        ([4], 0.0, 16.0),
        ([4], "0", "16"),
    ]
    headers = (
        [{"a": entry(*lie)} for lie in lies]
        + [{"a": entry([4], 0, 16), "b": entry([4], at, at + 16)} for at in (0, 12)]
        + [
            {},
            {"a": 1},
            {"a": {}},
            {"a": None},
            {"__metadata__": {"x": "y"}},
            b'{"a": ',
            b"{}}}",
            b"{" + b"[" * 10**5,
            b'{"a":' * 10**5,
            b'{"a": ' + b"9" * 10**5 + b"}",
            b"{\xff\xfe}",
            b'{"a": [NaN]}',
            b'{"a": {"dtype": "F32", "shape": [4]}}',
        ]
    )
    files = [safetensors(two, header) for header in headers] + [n.to_bytes(8, "little") + safetensors(two)[8:] for n in (0, 1, 17, 2**32, 2**44, 2**63)]
    files += [safetensors(two, {"a" * 10**6: entry([4], 0, 16), "\x1b[2J\n\u202e": entry([4], 16, 32)})]  # names not for a terminal
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here, not from earlier tests
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for n, data in enumerate(files):
        path.write_bytes(data)
        for read in tok.load_encoder, dec.load_vae:  # all but the last by the reader, not for missing tensors
            assert ("weight file" if n < len(files) - 1 else "missing") in sentence(read, path), n
    assert time.process_time() - began < 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


def test_wrong_files_name_themselves(tmp_path):
    t, whole, path = torch.zeros, dinov2(), tmp_path / "a.pth"
    inception = {f"Mixed_5b.branch1x1_{i}.conv.weight": t(1) for i in range(9)} | {"fc.weight": t(9, 9)}
    heads, vgg = {f"lin{i}.model.1.weight": t(1, 4, 1, 1) for i in range(5)}, {f"features.{i}.weight": t(1) for i in range(9)}
    vae = {"first_stage_model." + k.replace("mid_block.resnets.0", "mid.block_1"): v for k, v in dec.VAE((32,) * 4).state_dict().items()}
    cut = {k: v for k, v in whole.items() if not k.startswith(("blocks.1", "norm"))} | {"blocks.1.norm1.weight": t(64)}
    for content, read, looks, missing, unexpected in [
        (inception, tok.load_encoder, "FID Inception", "cls_token", "Mixed_5b"),
        (inception, dec.load_vae, "FID Inception", "encoder.conv_in", "Mixed"),
        (inception, tok.load_text_encoder, "FID Inception", "token_embedding.weight", "Mixed"),
        (vae, tok.load_encoder, "SD VAE", "cls_token", "first_"),
        (whole, dec.load_vae, "DINOv2", "encoder.conv_in.weight", "cls_token"),
        (heads, tok.load_encoder, "LPIPS", "cls_token", "lin0"),
        (vgg, dec.load_vae, "VGG16", "encoder.conv_in", "features.0"),
        (cut, tok.load_encoder, "DINOv2", "blocks.1.norm1.bias", "none"),
        (clip(), dec.load_vae, "CLIP", "encoder.conv_in", "text_projection"),
        (whole, tok.load_text_encoder, "DINOv2", "token_embedding", "cls_token"),
        (dinov2(32) | {"cls_token": t(1, 1, 64)}, tok.load_encoder, "DINOv2", "cls_token (1, 1, 32)", "cls_token (1, 1, 64)"),
    ]:
        torch.save(content, path)
        said = re.fullmatch(r".*: not (an? .*); it looks like (.*); missing (\d+): (.*); unexpected (\d+): (.*)", sentence(read, path))
        assert said and looks in said[2] and missing in said[4] and unexpected in said[6], said
        assert {dec.load_vae: "SD VAE", tok.load_encoder: "image encoder", tok.load_text_encoder: "text tower"}[read] in said[1]
        assert all(len(re.findall(r"[\w.]+ \([\d, ]*\)", said[n + 1])) == min(5, int(said[n])) for n in (3, 5)), said
    torch.save(inception, path)
    assert "FID Inception" in sentence(one.encoder, path) and "RepTok" in sentence(RepTok.load, path)
    path.write_bytes(written(torch.save, whole)[:-1000])
    assert "cut short" in sentence(tok.load_encoder, path)
    torch.save(dinov2(100), path)
    assert "100 wide" in sentence(tok.load_encoder, path)
    vocabulary = gzip.compress(b"header\n" + b"".join(b"%c %c\n" % (c, c) for c in range(97, 123)))
    with pytest.raises(tok.UserError, match="^the vocabulary in the checkpoint: a vocabulary of 540, .{9,99}$"):  # and not its bytes
        tok.ClipText(tok.TextTower(520, 77, 32, 1, 32), vocabulary)


def test_a_checkpoint_cannot_order_a_large_word_encoder(monkeypatch):
    made = []
    monkeypatch.setattr(tok, "fit", lambda module, *_: made.append(module))
    sample.text_from({"config": {"words": ["a"] * 9, "width": 4096}}, {}, "file")
    assert all(p.is_meta for p in made[0].parameters())  # no memory before the weights are seen


def test_torch_that_unpickles_unsafely_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    with pytest.raises(fid.UserError, match="2.6 or newer"):
        fid.load_inception(tmp_path / "a.pth")


def test_crafted_pickles_take_neither_time_nor_memory(tmp_path):
    path, nested = tmp_path / "a.pt", [0]
    inside = members(written(torch.save, {"full": torch.ones(2), "empty": torch.empty(0)}))
    pkl = next(k for k in inside if k.endswith("/data.pkl"))
    for _ in range(30):
        nested = [nested] * 10  # as text it would have 10**30 letters
    for content in {"kind": nested}, {"kind": "stage1", "tokenizer": nested}, {"kind": "prior", "config": {"width": nested}, "state": {}}:
        torch.save(content, path)
        assert sentence(RepTok.load, path) and sentence(one.encoder, path)
    tuples = b"".join(b"(" + (b"h" + bytes([i])) * 10 + b"tq" + bytes([i + 1]) + b"0" for i in range(30))
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"1X\3\0\0\0cpuK\0tQ"  # member data/1 is the empty one
    grown = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\0\x85K\1\x85\x89NtR(" + storage + b"K\0J\0\0\0\x10\x85K\1\x85tb."
    path.write_bytes(zipped(inside | {pkl: b"\x80\2K\0\x85q\0000" + tuples + b"}h\x1eK\1s."}))
    assert "nested" in sentence(tok.read_file, path)  # a dict whose key takes 10**30 steps to hash
    path.write_bytes(zipped(inside | {pkl: b"\x80\2" + grown}))
    assert sentence(tok.read_file, path) or tok.read_file(path).numel() == 0  # a state of 2**28 numbers for an empty tensor


def broken(data, draw):
    """A copy cut short, with a piece overwritten, dropped or doubled, or with bits flipped."""
    b, how, at, n = bytearray(data), draw.randrange(8), draw.randrange(len(data)), draw.choice((1, 2, 4, 8, 32))
    if how == 0:
        return bytes(b[:at])
    if how < 4:
        b[at : at + n] = (bytes([draw.choice((0, 1, 127, 255))]) * n, b"", bytes(b[at : at + n]) * 2)[how - 1]
    for _ in range(n * (how > 3)):
        b[draw.randrange(len(b)) if how == 4 else min(at + draw.randrange(3), len(b) - 1)] ^= 1 << draw.randrange(8)
    return bytes(b)


def bent(node, draw):
    """A copy of nested dicts and tensors with one entry of another value, shape or type, renamed or lost."""
    node, key = dict(node), draw.choice(list(node))
    value, how = node.pop(key), draw.randrange(10)
    if isinstance(value, dict) and value and how:
        node[key] = bent(value, draw)
    elif isinstance(value, torch.Tensor) and how > 1:
        flat = value.flatten()
        node[key] = draw.choice(
            [
                value[None],
                flat,
                flat[:1],
                flat[:0],
                value.to(draw.choice(list(tok.DTYPES.values()))),
                torch.cat([flat, flat]),
                value.reshape(-1, 1),
                value.mT if value.ndim > 1 else flat,
                value[: len(flat) // 2] if value.ndim else flat,
            ]
        )
    elif how != 2:  # a wrong size, kind or shape somewhere
        node[draw.choice([*node, "odd"]) if how == 3 else key] = draw.choice(
            [0, -1, 1, 7, 2**20, 2**31, 2**62, 2**70, 0.5, 1e308, math.nan, None, True, "cls", "x" * 99, [], [1, 2], {}, {"a": 1}, b"x", (3, 4)]
        )
    return node


def look(path):
    """Both readers of pictures; the trainers' may skip what cannot be read."""
    source = path.parent if path.parent.name == "data" else path
    found = one.Pictures(source, 8)
    for i in range(len(found)):
        for use in [found.read] + [found.captions] * (i in found.texts) + [found.features] * (i in found.npz):
            with contextlib.suppress(tok.UserError):
                use(i)
    if path.suffix not in (".tar", ".tsv", ".jsonl"):
        list(fid.images(source, workers=1))


def kinds(tmp):
    """(reader, file name, whole file, functions draw -> broken file) of everything that is read from strangers."""
    torch.manual_seed(0)
    vit = tok.ViT(width=8, depth=1, heads=1, hidden=8, patch=4, grid=2, pixels=8)
    small, mixer = dec.Decoder(3, 4, 2, 8, 1, 1, 4, 8), mix.Mixer(1, 8, 8, 1, 2)
    stage2 = RepTok(tok.Tokenizer(vit), small, dec.PixelSpace(), mixer, torch.zeros(1, 1, 8), torch.ones(1, 1, 8), ["a", "b"]).parts()
    stage1 = {k: v for k, v in stage2.items() if k not in ("mixer", "latent")} | {"kind": "stage1", "ema": {"tokenizer.embedding": torch.zeros(1, 1, 8)}}
    prior, state = {"kind": "prior", "settings": {}, "config": vit.config, "state": vit.state_dict()}, vit.state_dict()
    hf = {k.replace("qkv", part).replace("cls_token", "embeddings.cls_token"): v[:8] if "qkv" in k else v for k, v in state.items() for part in "qkv"}
    for read, name, content in [
        (RepTok.load, "a.ckpt", stage1),
        (RepTok.load, "a.pt", stage2),
        (one.encoder, "a.pt", prior),
        (tok.load_encoder, "a.pth", hf),
        (dec.load_vae, "a.ckpt", dec.VAE((32,) * 4).state_dict()),
        (tok.load_encoder, "b.pt", clip()),
        (tok.load_text_encoder, "c.pt", clip()),
    ]:
        data = torchscript(content, tmp / name) if name == "c.pt" else written(torch.save, content)
        inside = members(data)
        pkl = next(k for k in inside if k.endswith("/data.pkl"))
        yield (
            read,
            name,
            data,
            [
                lambda draw: broken(data, draw),
                lambda draw: zipped(inside | {pkl: broken(inside[pkl], draw)}),
                lambda draw: written(torch.save, bent(content, draw)),
            ],
        )
    for data in written(torch.save, {"weight": torch.ones(1, 1)}), written(torch.save, {"weight": torch.ones(1, 1)}, **OLD):
        yield lambda path: fid.load_weights(nn.Linear(1, 1, bias=False), path, "a layer"), "a.pth", data, [lambda draw: broken(data, draw)]
    data = safetensors({k: v.half() for k, v in hf.items()})
    end = 8 + int.from_bytes(data[:8], "little")
    yield (
        tok.load_encoder,
        "a.safetensors",
        data,
        [
            lambda draw: broken(data[:end], draw) + data[end:],
            lambda draw: safetensors({k: v for k, v in bent(hf, draw).items() if isinstance(v, torch.Tensor)}),
        ],
    )
    image, photos = Image.fromarray(np.random.default_rng(0).integers(256, size=(9, 12, 3), dtype=np.uint8)), []
    for kind, mode, more in [
        ("png", "RGB", {}),
        ("png", "I;16", {}),
        ("png", "P", {}),
        ("jpeg", "RGB", {}),
        ("jpeg", "RGB", {"progressive": True}),
        ("gif", "P", {}),
        ("tiff", "RGB", {}),
        ("tiff", "RGB", {"compression": "tiff_lzw"}),
        ("webp", "RGB", {}),
        ("bmp", "RGB", {}),
        ("ppm", "RGB", {}),
    ]:
        photos.append(data := written(image.convert("I" if mode == "I;16" else mode).convert(mode).save, kind, **more))
        yield look, f"data/a.{kind}", data, [lambda draw: broken(data, draw)]
    npz = (
        {"mu": np.zeros(4), "sigma": np.eye(4), "n": np.array(5), "resize": np.array("tf1")},
        {"arr_0": np.zeros((3, 4, 5, 3), np.uint8)},
        {"features": np.zeros((2, 3))},
    )
    npz = [written(np.savez, **arrays) for arrays in npz]
    headers = lambda data, draw: zipped({k: broken(v[:128], draw) + v[128:] for k, v in members(data).items()})  # of the arrays
    for read, data in (fid.read_statistics, npz[0]), (lambda path: list(fid.images(path, 1)), npz[1]):
        yield read, "a.npz", data, [lambda draw: broken(data, draw), lambda draw: headers(data, draw)]
    said = {"a/x.png": photos[0], "a/x.txt": b"one\ntwo", "a/x.npz": npz[2], "b/y.png": photos[0], "b/y.json": b'{"caption": "three"}'}
    data = zipped(said, zipfile.ZIP_DEFLATED)
    yield (
        look,
        "a.zip",
        data,
        [
            lambda draw: broken(data, draw),
            lambda draw: zipped({k: broken(v, draw) if k[-1] != "g" else v for k, v in said.items()}),
            lambda draw: zipped(said | {"a/x.npz": headers(npz[2], draw)}),
        ],
    )
    with tarfile.open(fileobj=(made := io.BytesIO()), mode="w") as shard:
        for name, member in said.items():
            (info := tarfile.TarInfo(name)).size = len(member)
            shard.addfile(info, io.BytesIO(member))
    (tmp / "a.png").write_bytes(photos[0])
    for name, data in ("a.tar", made.getvalue()), ("a.tsv", b"a.png\ta caption\n" * 3), ("a.jsonl", b'{"file": "a.png", "caption": ["one", "two"]}\n' * 3):
        yield look, name, data, [lambda draw: broken(data, draw)]


class Hang(BaseException):
    """Nothing under test catches it."""


def fuzz(tmp, each, seed):
    """`each` broken files of every kind; prints what went wrong and how many were tried. Runs in a process of its own."""

    def hang(*_):
        raise Hang

    faulthandler.enable(), warnings.simplefilter("ignore"), (tmp / "data").mkdir(parents=True)
    signal.signal(signal.SIGPROF, hang)  # after processor time, for the machine may have other work
    draw, tried, taken = random.Random(seed), 0, 0
    for read, file, whole, makes in kinds(tmp):
        path = tmp / file
        path.write_bytes(whole), read(path)  # the whole file is taken; what is imported late is in memory then
        size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) if sys.platform == "linux" else 0
        if size:
            resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 2**30, -1))  # beyond it an allocation fails
        for n in range(each * len(makes)):
            path.write_bytes(makes[n % len(makes)](draw))
            tried, error = tried + 1, None
            try:
                signal.setitimer(signal.ITIMER_PROF, 2)
                read(path)
                taken += 1
            except ERRORS as e:
                said = error = e
                while error and not (isinstance(error, MemoryError) or "allocate" in str(error)):
                    error = error.__context__  # what was refused for want of memory had been tried
                error = error or (said if len(str(said)) > 2000 else None)
            except (Exception, Hang) as e:
                error = e
            signal.setitimer(signal.ITIMER_PROF, 0)
            if error:
                kept = path.replace(tmp / f"bad{tried}-{path.name}")
                print(kept, repr(error)[:200], "".join(traceback.format_tb(error.__traceback__)[-2:]).replace("\n", " "))
        path.unlink(missing_ok=True)
    print(f"{tried} files, {taken} taken")


def test_broken_files_of_every_kind(tmp_path):
    """At least 2,000: each is read or refused in one line, within 2 s and 1 GiB."""
    code = f"import {Path(__file__).stem} as t, pathlib; t.fuzz(pathlib.Path({str(tmp_path)!r}) / '%d', 24, %d)"
    halves = [subprocess.Popen([sys.executable, "-c", code % (seed, seed)], cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}) for seed in range(2)]
    tried = 0
    for half in halves:
        said, error = half.communicate(timeout=300)
        *bad, last = said.splitlines() or [""]
        assert half.returncode == 0 and not bad, "\n".join([*bad, error[-3000:]])
        tried += int(last.split()[0])
    assert tried >= 2000


# ---- sample.py --eval and the README


def test_eval_is_the_same_on_two_ranks(trained, inception, tmp_path, capsys):
    """Scores of one process and of two; FID against the same pictures written out and scored by fid.py."""
    args = ["--ckpt", trained / "out" / "stage2.pt", "--eval", trained / "data", "--num", 12, "--steps", 2, "--inception", inception, "--batch", 5, "--device", "cpu"]
    scores = {}
    for world in (1, 2):
        here = [*args, "--json", tmp_path / f"{world}.json", "--save", tmp_path / f"kept{world}"]
        output = inside("sample.py", *here) if world == 1 else finished(launch("sample.py", *here, world=2, port=29655))
        scores[world] = {row["metric"]: row for row in json.loads((tmp_path / f"{world}.json").read_text())}
    assert set(scores[1]) == {"rFID", "PSNR", "SSIM", "gFID"} and "eight segments" in output
    for metric, row in scores[1].items():
        assert abs(row["value"] - scores[2][metric]["value"]) < 1e-5 * max(1, abs(row["value"])), metric
        assert row["n_fake"] == 12 and row["reference_sha256"]
    assert len(list((tmp_path / "kept1" / "generated").iterdir())) == 12
    pictures, drawn = one.Pictures(str(trained / "data"), 16), {int(path.stem) for path in (tmp_path / "kept1" / "reconstructed").iterdir()}
    assert len(drawn) == 12 and max(drawn) >= 12  # of all 40, not the first
    for i in drawn:
        Image.fromarray(pictures.read(i).permute(1, 2, 0).numpy()).save(tmp_path / f"{i:06d}.png")
    (tmp_path / "real").mkdir()
    for path in tmp_path.glob("0*.png"):
        path.rename(tmp_path / "real" / path.name)
    net = fid.load_inception(inception)
    np.savez(tmp_path / "tf1.npz", mu=np.zeros(2048), sigma=np.eye(2048), n=9, resize="tf1")
    assert "do not compare" in refusal("sample.py", [*args, "--reference", tmp_path / "tf1.npz"], capsys)
    again = fid.fid(fid.measure(str(tmp_path / "real"), net), fid.measure(str(tmp_path / "kept1" / "reconstructed"), net))
    assert abs(again - scores[1]["rFID"]["value"]) < 1e-4 * again


def test_eval_against_a_reference(trained, inception, lpips, tmp_path, monkeypatch):
    """More pictures generated than there are, in random classes; gFID against given statistics; LPIPS as of the pictures that were kept."""
    data, asked = tmp_path / "data", []
    shutil.copytree(trained / "data" / "3", data / "a")
    N, net = len([*(data / "a").iterdir()]), fid.load_inception(inception)
    generate = RepTok.generate
    monkeypatch.setattr(RepTok, "generate", lambda model, classes, *rest: asked.extend(classes.tolist()) or generate(model, classes, *rest))
    np.savez(tmp_path / "stats.npz", mu=np.ones(2048), sigma=np.diag(np.arange(2048.0)), n=9)
    inside("sample.py", "--ckpt", trained / "out" / "stage2.pt", "--eval", data, "--num", N + 2, "--labels", "random", "--reference", tmp_path / "stats.npz", *lpips,
           "--inception", inception, "--json", tmp_path / "s.json", "--save", tmp_path / "kept", "--steps", 2, "--batch", 3, "--device", "cpu")
    rows = {row["metric"]: row for row in json.loads((tmp_path / "s.json").read_text())}
    assert [(rows[m]["n_real"], rows[m]["n_fake"]) for m in ("rFID", "LPIPS", "gFID")] == [(N, N), (N, N), (9, N + 2)]
    assert rows["gFID"]["reference_sha256"] == fid.sha256(tmp_path / "stats.npz") and len(rows["LPIPS"]["weights_sha256"]) == 2
    made = fid.measure(str(tmp_path / "kept" / "generated"), net)
    want = fid.frechet_distance(made.mu, made.cov, np.ones(2048), np.diag(np.arange(2048.0)))
    assert abs(rows["gFID"]["value"] - want) < 1e-5 * want
    pictures, score = one.Pictures(str(data), 16), fid.LPIPS(*lpips[1::2])
    kept = [torch.from_numpy(fid.decode(tmp_path / "kept" / "reconstructed" / f"{i:06d}.png")).permute(2, 0, 1) for i in range(N)]
    want = [fid.pair_scores(pictures.read(i)[None], x[None], score)[0, 2].item() for i, x in enumerate(kept)]
    assert abs(rows["LPIPS"]["value"] - np.mean(want)) < 1e-5
    assert len(asked) == N + 2 and asked != [i % 10 for i in range(N + 2)] and set(asked) <= set(range(10))


README = (HERE / "README.md").read_text()


def readme_commands(text):
    """(script, its options) of every command in bash blocks; NAME="..." stands for its value, a variable of a shell loop for its first."""
    names = dict(re.findall(r'(?m)^(\w+)="(.*)"$', text))
    for block in re.findall(r"```bash\n(.*?)```", re.sub(r'(?m)^\w+=".*"$', "", text), re.S):
        for name, value in {**names, **dict(re.findall(r"for (\w+) in (\S+)", block))}.items():
            block = re.sub(rf"\${name}\b", value, block)
        assert "$" not in block, block
        for script, line in re.findall(r"(train_stage1|train_stage2|sample|fid|test_all)\.py( [^\n;&|#]*)?", block):
            if "pytest" not in block.split(f"{script}.py{line}")[0].split("\n")[-1]:
                yield script, shlex.split(line)


@pytest.mark.parametrize("script, line", [*readme_commands(README)])
def test_readme_commands_have_known_options(script, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *line])
    assert sys.modules.get(script, sys.modules[__name__]).options()


TINY_RUN = {"train_stage1": [*QUICK1, "--num", 40], "train_stage2": QUICK2, "sample": ["--steps", 2, "--device", "cpu"]}


def test_readme_commands_run(trained, tmp_path, monkeypatch):
    """The blocks marked as tiny, line by line, with a few steps and in a folder where their pictures lie."""
    for name in ("cats", "dogs"):
        shutil.copytree(trained / "data" / "3", tmp_path / "my_pictures" / name)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(one, "DIGITS", 400)
    commands = [("train_stage1", []), *readme_commands("".join(re.findall(r"<!-- tiny -->\n(```bash\n.*?```\n)", README, re.S)))]
    assert len(commands) >= 9
    for script, line in commands:
        inside(f"{script}.py", *line, *TINY_RUN[script])
    made = {path.name for path in tmp_path.rglob("*.p[nt]*")}
    assert {"stage1.png", "stage2.png", "samples.png", "reconstructions.png", "between.png", "small.pt"} <= made


def test_readme_links_to_lines():
    links = re.findall(r"\[`(\w+)`\]\(([^)]*)\)", README)
    assert len(links) >= 10
    for name, link in links:
        file, line = link.split("#L")
        assert re.match(rf"\s*(def|class) {name}\b", (HERE / file).read_text().splitlines()[int(line) - 1]), (name, link)


def test_readme_examples_of_one_file_alone(tmp_path):
    runs = []
    for file, code in re.findall(r"<!-- alone: (\w+\.py) -->\n```python\n(.*?)```", README, re.S):
        (tmp_path / file[:-3]).mkdir()
        (tmp_path / file[:-3] / file).write_bytes((HERE / file).read_bytes())
        runs.append(subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path / file[:-3], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                     env={**os.environ, "OMP_NUM_THREADS": "1"}))
        assert len(code.strip().splitlines()) <= 10, file
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0] * 4, said


def test_readme_blocks_that_need_other_packages(tmp_path, monkeypatch):
    """They compile; those that write pictures are run where scikit-learn and scikit-image are installed."""
    codes = [compile(code, "README.md", "exec") for code in re.findall(r"(?<!-->\n)```python\n(.*?)```", README, re.S)]
    assert len(codes) == 3
    pytest.importorskip("sklearn"), pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    for code in codes[:2]:
        exec(code, {})
    assert [len([*(tmp_path / name).rglob("*.*")]) for name in ("train", "held", "crops")] == [1297, 500, 2400]


def test_readme_line_counts_and_sizes():
    counts = re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README)
    assert len(counts) == 8
    for file, lines in counts:
        assert (HERE / file).read_text().count("\n") == int(lines), file
    rows = re.findall(r"(?m)^\| (\w+) \| ([\d.]+)M \| ([\d.]+) \+ ([\d.]+) \| ([\d.]+)M.*? \| ([\d.]+) \|$", README)
    assert len(rows) == 4
    for size, *figures in rows:
        shapes = one.SIZES[size]
        with torch.device("meta"):
            d, m = dec.Decoder(**shapes["decoder"]), mix.Mixer(**shapes["mixer"])
            count = lambda net: sum(p.numel() for p in net.parameters()) / 1e6
            linear, attention = one.count_macs(lambda: d(torch.randn(1, 4, 32, 32), torch.rand(1), torch.randn(1, 1, 768)))
            mixer = sum(one.count_macs(lambda: m(torch.randn(1, 1, 768), torch.rand(1), torch.zeros(1, dtype=torch.long))))
        for got, said in zip((count(d), linear, attention, count(m), mixer), figures):
            assert abs(got - float(said)) <= 0.51 * 10 ** -len(said.split(".")[1]), (size, got, said)


def test_the_reading_block_is_the_same_in_both_files():
    block = lambda file: (HERE / file).read_text().split("so that either can be copied alone.\n")[1].split("\n\n\n# ----")[0]
    assert len(block("tokenizer.py")) > 5000 and block("tokenizer.py") == block("decoder.py")


# ---- Timings against peers:  python test_all.py --bench      FID against peers:  python test_all.py --fid WEIGHTS REAL FAKE


def pytorch_fid_net(path):
    """pytorch-fid's Inception with the weights at path. Raises where it is not installed."""
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("unused"))  # needs torchvision's compiled half
    import pytorch_fid.inception as theirs
    theirs.load_state_dict_from_url = lambda *a, **k: torch.load(path, weights_only=True)
    return theirs.InceptionV3([3]).eval()


@torch.no_grad()
def interleaved(what, calls, rounds=7):
    """Print the median time of each call, run in turn after one round that does not count, and its ratio to the first."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name] += [time.perf_counter() - start] * (i > 0)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name, value in median.items():
        print(f"{what}, {name}: {1e3 * value:.0f} ms, {value / next(iter(median.values())):.2f} of ours (median of {rounds})", flush=True)


def peer(make):
    """The call that `make` returns, or None, with a line that says why, where its package is not installed or usable."""
    try:
        return make()
    except Exception as e:
        return print(f"left out: {type(e).__name__}: {str(e).splitlines()[0][:150]}")


def bench_peers():
    """DINOv2 ViT-B/14, SD VAE and FID Inception with random weights, ours and others'; float32, the CPU."""
    def dinov2():
        from transformers import Dinov2Config, Dinov2Model
        net = Dinov2Model(Dinov2Config(image_size=518, patch_size=14)).eval()
        return lambda: net(x)

    def vae():
        from diffusers import AutoencoderKL
        widths = (128, 256, 512, 512)
        net = AutoencoderKL(block_out_channels=widths, layers_per_block=2, latent_channels=4, sample_size=256, down_block_types=["DownEncoderBlock2D"] * 4,
                            up_block_types=["UpDecoderBlock2D"] * 4).eval()
        return lambda: net.encode(images), lambda: net.decode(latents)

    def inception(last):
        net = pytorch_fid_net(path).to(memory_format=torch.channels_last if last else torch.contiguous_format)
        form = torch.channels_last if last else torch.contiguous_format
        return lambda: net((pictures.float() / 255).contiguous(memory_format=form))

    print(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}")
    x, vit = torch.randn(8, 3, 224, 224), tok.ViT(768, 12, 12, 3072, 14, 37, layer_scale=True, position="offset").requires_grad_(False)
    present = lambda **calls: {name.replace("_", " "): call for name, call in calls.items() if call}
    interleaved("DINOv2 ViT-B/14, 224 px, batch 8", present(ours=lambda: vit(x), transformers=peer(dinov2)))
    images, latents, own, theirs = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randn(1, 4, 32, 32), dec.VAE().requires_grad_(False).to(memory_format=torch.channels_last), peer(vae) or (None, None)
    interleaved("VAE encode, 256 px", present(ours=lambda: own.posterior(images), diffusers=theirs[0]))
    interleaved("VAE decode, 256 px", present(ours=lambda: own.decode(latents), diffusers=theirs[1]))
    with tempfile.TemporaryDirectory() as folder:
        path = folder + "/inception.pth"
        torch.save({**fid.Inception("tf1").state_dict(), "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
        net, pictures = fid.load_inception(path), torch.from_numpy(np.random.RandomState(0).randint(0, 256, (16, 3, 256, 256), np.uint8))
        interleaved("FID Inception, 256 px, batch 16", present(ours=lambda: net(pictures), pytorch_fid=peer(lambda: inception(False)),
                                                               pytorch_fid_channels_last=peer(lambda: inception(True))))
    r = np.random.RandomState(0)
    a, b = (np.cov(r.rand(2600, 2048), rowvar=False) for _ in range(2))
    start = time.perf_counter()
    fid.frechet_distance(np.zeros(2048), a, np.ones(2048), b)
    print(f"Frechet distance at 2048 dimensions: {time.perf_counter() - start:.1f} s")


def table_fid(weights, real, fake):
    """FID of two folders by ours, pytorch-fid and torch-fidelity, from the same weights file."""
    net = pytorch_fid_net(weights)
    import torch_fidelity
    from pytorch_fid import fid_score
    files = lambda d: sorted(Path(d).rglob("*.png"))
    sides = [fid_score.calculate_activation_statistics(files(d), net, 10, 2048, "cpu", 0) for d in (real, fake)]
    theirs = fid_score.calculate_frechet_distance(*sides[0], *sides[1])
    metrics = torch_fidelity.calculate_metrics(input1=real, input2=fake, cuda=False, fid=True, isc=False, verbose=False, batch_size=10,
                                               samples_find_deep=True, feature_extractor_weights_path=weights, cache=False, save_cpu_ram=True)
    ours = {r: fid.frechet_distance(a.mu, a.cov, b.mu, b.cov) for r in ("pytorch-fid", "tf1")
            for a, b in [[fid.measure(d, fid.load_inception(weights, r), 10) for d in (real, fake)]]}
    print(f"pytorch-fid: ours {ours['pytorch-fid']:.6f}, pytorch-fid {theirs:.6f}, relative {ours['pytorch-fid'] / theirs - 1:.1e}")
    f = metrics["frechet_inception_distance"]
    print(f"tf1: ours {ours['tf1']:.6f}, torch-fidelity {f:.6f}, relative {ours['tf1'] / f - 1:.1e}")


# ---- Scores of a checkpoint of the default data:  python test_all.py --score out/stage2.pt


def digits(count, seed):
    """(uint8 (N,3,16,16), labels) of the default data."""
    plans = [one.plan_digit(i, seed) for i in range(count)]
    return torch.from_numpy(np.stack([one.draw_digit(p, 16) for p in plans])).permute(0, 3, 1, 2), torch.tensor([p.digit for p in plans])


class Reader(nn.Module):
    """A small convolutional reader of 16x16 digits; `features` (B,128) feed the Frechet distance."""

    def __init__(self, classes=10):
        super().__init__()
        conv = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())
        self.body = nn.Sequential(conv(3, 32), conv(32, 32), nn.MaxPool2d(2), conv(32, 64), conv(64, 64), nn.MaxPool2d(2), nn.Flatten(),
                                  nn.Linear(1024, 128), nn.ReLU())
        self.head = nn.Linear(128, classes)

    def forward(self, x):
        return self.head(self.body(x))

    @torch.no_grad()
    def read(self, x):
        """Images in [-1,1] -> (classes (B,), features (B,128))."""
        features = torch.cat([self.body(part) for part in x.split(500)])
        return self.head(features).argmax(1), features


def train_reader(x, y, steps=1200, batch=64):
    """A reader trained on uint8 pictures (N,3,16,16) and labels, in eval mode; it has never seen a model's picture."""
    threads = torch.get_num_threads()
    torch.manual_seed(0), torch.set_num_threads(1)  # or the reader, and with it every distance, would depend on the machine
    reader = Reader(int(y.max()) + 1)
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        i = torch.randint(len(x), (batch,))
        loss = F.cross_entropy(reader(x[i].float() / 127.5 - 1), y[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return reader.eval()


def score(paths, train, held, evaluations, scales, interval, per_class=32):
    """Print a table: a row a checkpoint, number of decoder evaluations and guidance scale.

    PSNR of held-out pictures (mean of each one's own), the share that a reader reads as their class, the Frechet distance in the reader's 128
    features. Generated: `per_class` pictures a class, 50 steps of Mixer and decoder; left out where several `evaluations` are asked for.
    """
    (x, y), (real, labels) = train, held
    reader, real = train_reader(x, y), real.float() / 127.5 - 1
    share = lambda images, wanted: f"{100 * (reader.read(images)[0] == wanted).float().mean().item():.1f} %"

    def distance(images):
        sides = [fid.Statistics(128) for _ in range(2)]
        for side, pictures in zip(sides, (real, images)):
            side.update(reader.read(pictures)[1])
        return f"{fid.frechet_distance(sides[0].mu, sides[0].cov, sides[1].mu, sides[1].cov):.0f}"

    print(f"{len(real)} held-out pictures, of which the reader reads {share(real, labels)}; guidance in {list(interval)}\n")
    print("| checkpoint | evaluations | PSNR | reconstructed, read right | distance | guidance | generated, read right | distance |")
    print("|---|---|---|---|---|---|---|---|")
    for path in paths:
        model = RepTok.load(path)
        tokens, classes = model.encode(real), torch.arange(model.mixer.classes if model.mixer else 0).repeat_interleave(per_class)
        for n in evaluations:
            recon = model.decode(tokens, n)
            psnr = fid.psnr(fid.to_uint8(real), fid.to_uint8(recon)).mean().item()
            row = f"| {path} | {n} | {psnr:.2f} dB | {share(recon, labels)} | {distance(recon)} |"
            if len(evaluations) > 1 or not len(classes):
                print(f"{row} - | - | - |", flush=True)
                continue
            for scale in scales:
                images = model.decode(model.generate(classes, 50, scale, interval), 50)
                print(f"{row} {scale:g} | {share(images, classes)} | {distance(images)} |", flush=True)


def nearest_colour(rgb):
    """The name of the nearest of the named colours, of (3,) in 0..255."""
    return min(one.COLOURS, key=lambda name: np.abs(np.subtract(one.COLOURS[name], rgb)).sum())


def read_colours(x):
    """Names of ink and ground of a uint8 picture (3,16,16): the median of its border, and of the pixels far from that."""
    pixels = x.permute(1, 2, 0).double().numpy()
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), 0)
    far = np.abs(pixels - ground).sum(-1)
    return nearest_colour(np.median(pixels[far > 0.6 * far.max()], 0)), nearest_colour(ground)


def score_prompts(model, count=160, cfg=3.0):
    """Print how many of `count` prompts show the named digit, ink and ground; and the same for the real captioned digits."""
    plans = [one.plan_digit(i, 99, named=True) for i in range(count)]
    prompts = [plan.captions[i % len(plan.captions)] for i, plan in enumerate(plans)]
    reader = train_reader(*digits(5500, 1))
    text, mask = model.prompts(prompts)
    made = fid.to_uint8(model.decode(model.generate(steps=50, cfg=cfg, cfg_interval=(0.3, 0.9), text=text, mask=mask), 50))
    real = torch.from_numpy(np.stack([one.draw_digit(plan, 16) for plan in plans])).permute(0, 3, 1, 2)
    want = [(nearest_colour(plan.ink), nearest_colour(plan.ground)) for plan in plans]
    for name, pictures in (("real pictures of the prompts", real), (f"generated, guidance {cfg}", made)):
        read = reader.read(pictures.float() / 127.5 - 1)[0].tolist()
        seen = [read_colours(x) for x in pictures]
        share = lambda hits: f"{100 * sum(hits) / count:.1f} %"
        print(f"{name:30s} digit {share(r == p.digit for r, p in zip(read, plans))}, ink {share(a == c for (a, _), (c, _) in zip(seen, want))}, "
              f"ground {share(b == d for (_, b), (_, d) in zip(seen, want))}, both {share(s == w for s, w in zip(seen, want))} ({count} prompts)")


def options():
    """The command line."""
    p = one.Parser("Scores and timings; the tests are run by python -m pytest -q test_all.py")
    p.add("--score", None, "checkpoints to score: a row each; one that takes captions is scored by its prompts", nargs="+")
    p.add("--pictures", None, "pictures of one's own for --score: a folder to learn reading from, and one held out (default: digits)", nargs=2)
    p.add("--per-class", 32, "pictures of every class that --score generates", type=one.whole(1))
    p.add("--evaluations", [20], "evaluations of the decoder in a reconstruction; several give a row each", nargs="+", type=one.whole(1))
    p.add("--cfg", [1.5], "guidance scales; several give a row each", nargs="+", type=one.number(0))
    p.add("--cfg-interval", [0.3, 0.9], "guidance acts while t is between these", nargs=2, type=one.number(0, 1))
    p.add("--bench", False, "time the networks against transformers, diffusers and pytorch-fid, where they are installed", action="store_true")
    p.add("--fid", None, "Inception weights and two folders: FID by ours, pytorch-fid and torch-fidelity", nargs=3)
    return p.parse_args()


def main():
    """What is measured and not tested. Raises UserError."""
    args = options()
    if args.bench:
        return bench_peers()
    if args.fid:
        return table_fid(*args.fid)
    if not args.score:
        raise tok.UserError("give --score, --bench or --fid; the tests are run by python -m pytest -q test_all.py")
    models = [RepTok.load(path) for path in args.score]
    if any(model.mixer is not None and model.mixer.cross for model in models):
        return [score_prompts(model) for model in models]
    folder = lambda path: (lambda p: (torch.stack([p.read(i) for i in range(len(p))]), p.labels))(one.Pictures(path, 16))
    train, held = map(folder, args.pictures) if args.pictures else (digits(5500, 1), digits(1000, 2))
    score(args.score, train, held, args.evaluations, args.cfg, args.cfg_interval, args.per_class)


if __name__ == "__main__":
    one.guarded(main)
