"""The tests:  python -m pytest -q test_all.py

They stand in the order of the files, and each begins with what must hold. Tests compare with a
closed form, another implementation or its figures, or a property that must hold.
"""

import argparse
import ast
import collections
import contextlib
import functools
import gzip
import importlib
import io
import json
import math
import operator
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
import zipfile
import zlib
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import EpsImagePlugin, Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

import decoder as dec
import fid
import mixer as mix
import sample
import tokenizer as tok
import train_stage1 as one
import train_stage2 as two
from docs import bench, experiment, lesson, score
from docs.tour import tour
from sample import RepTok


# ---- For several sections: weights and pictures as functions of their names
HERE = Path(sample.__file__).parent
TINY = dict(width=32, depth=2, heads=2, patch=4, mapping=16)


def draws(name):
    """Random numbers that depend on the name alone."""
    return np.random.RandomState(zlib.crc32(name.encode()))


def uniform(name, shape):
    """A tensor of float32, mean 0, variance 1, that depends on its name."""
    return torch.from_numpy(
        np.asarray((draws(name).random_sample(tuple(shape)) * 2 - 1) * 3**0.5, np.float32)
    )


KINDS = [  # an ending of a tensor's name, the mean and the deviation of such weights
    (r"running_mean", 0, 0.1),
    (r"\.gamma", 0.5, 0.2),
    (r"self_attn\.scale", 10, 2),
    (r"\.scale", 1, 0.2),
    (r"(pos_embed|positional_embedding|token_embedding\.weight|class_embedding)", 0, 0.5),
    (r"(cls_token|register_tokens|mask_token|new_reg)", 0, 0.5),
]


def seeded(name, shape, gain=1.0, salt=""):
    """The weight stored under an official tensor name."""
    u = uniform(salt + name, shape)
    if name.endswith("freqs"):
        f = torch.linspace(math.log(math.pi), math.log(10 * math.pi), 145)[:-1].exp()
        return torch.stack([f, f]).view(2, 9, 16).mT.contiguous()
    if name.endswith(("logit_scale", "num_batches_tracked")):
        return torch.tensor(3.0)
    for ending, mean, deviation in KINDS:
        if re.search(ending + "$", name):
            return mean + deviation * u
    if re.search(r"(visual\.proj|text_projection)$", name):
        return u * shape[0] ** -0.5
    if len(shape) >= 2:
        return gain * u * math.prod(shape[1:]) ** -0.5
    return 1 + 0.2 * u if name.endswith("weight") else 0.1 * u


def official(shapes, salt=""):
    """Weights of these names and shapes: {name: tensor}."""
    return {name: seeded(name, shape, salt=salt) for name, shape in shapes.items()}


def shapes_of(kind, **settings):
    """Names and shapes of the tensors of a module."""
    with torch.device("meta"):
        return {
            name: tuple(tensor.shape)
            for name, tensor in kind(**settings).state_dict().items()
            if tensor.numel()
        }


def picture(name, batch, height, width):
    """Smooth waves plus noise, rounded to 8 bits, (batch,3,height,width) in [-1,1]."""
    r = draws(name)
    yy, xx = np.mgrid[:height, :width]
    out = np.zeros((batch, 3, height, width))
    for i in range(batch):
        for c in range(3):
            fy, fx, p, q = r.random_sample(4)
            out[i, c] = (
                127
                + 60 * np.sin(yy * (fy + 0.2) / 9 + 6 * p)
                + 50 * np.cos(xx * (fx + 0.2) / 13 + 6 * q)
            )
    out = np.clip(out + r.random_sample(out.shape) * 40 - 20, 0, 255)
    return torch.from_numpy(out.astype(np.uint8)).float() / 127.5 - 1


def near(ours, figures, tolerance=2e-5):
    """No number of `ours` is further than `tolerance` from the figures."""
    assert (ours - torch.as_tensor(figures)).abs().max() < tolerance, (ours, figures)


def safetensors(tensors, align=1):
    """The bytes of such a file: the length of the header, the header, the tensors."""
    names = {dtype: name for name, dtype in tok.DTYPES.items()}
    entries, data = {}, bytearray()
    for name, tensor in tensors.items():
        start = len(data)
        data += tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "dtype": names[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [start, len(data)],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % align)
    return len(header).to_bytes(8, "little") + header + data


def normalised(x, kind=tok.IMAGENET):
    """Images in [-1,1] as an encoder of that kind takes them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in kind)
    return ((x + 1) / 2 - mean) / std


def busy(module):
    """Random weights everywhere, zero starts included; the scales, which are positive, stay."""
    for name, p in module.named_parameters():
        if not name.endswith("scale"):
            nn.init.normal_(p, std=0.2)
    return module


def tiny_vit():
    """A ViT with two registers, always of the same weights."""
    torch.manual_seed(1)
    return tok.ViT(width=32, depth=2, heads=2, registers=2)


# ---- For several sections: layouts of published weights, and a small CLIP
def rewritten(name, table):
    """The name after every (pattern, replacement)."""
    return functools.reduce(lambda name, pair: re.sub(*pair, name), table, name)


def renamed(tensors, table):
    """Another layout of the same weights: new names; CLIP's q, k and v apart, and its projections
    transposed."""
    out = {}
    for name, tensor in tensors.items():
        name = rewritten(name, table)
        if "qkv" in name:
            for part, rows in zip("qkv", tensor.chunk(3)):
                out[name.replace("qkv", f"{part}_proj")] = rows
        else:
            out[name] = tensor.T.contiguous() if "_projection.weight" in name else tensor
    return out


def table_of(prefix, text):
    """{"prefix.a": (2, 3), "prefix.b": (2,)} of the prefix "prefix." and the text "a 2x3 b 2"."""
    words = text.split()
    return {
        prefix + name: tuple(map(int, shape.split("x")))
        for name, shape in zip(words[::2], words[1::2])
    }


HF_CLIP = [
    ("^visual.proj", "visual_projection.weight"),
    ("^text_projection", "text_projection.weight"),
    (r"^visual\.", "vision_model."),
    ("^(?=transformer|token_emb|positional|ln_final)", "text_model."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("conv1", "embeddings.patch_embedding"),
    ("(class_embedding|token_embedding)", r"embeddings.\1"),
    ("transformer.resblocks", "encoder.layers"),
    ("ln_final", "final_layer_norm"),
    ("ln_pre", "pre_layrnorm"),
    ("ln_post", "post_layernorm"),
    (r"ln_(\d)", r"layer_norm\1"),
    ("c_fc", "fc1"),
    ("c_proj", "fc2"),
    ("attn.(out_proj|in_proj_)", r"self_attn.\1"),
    ("in_proj_", "qkv."),
]


def hugging_face(weights):
    """CLIP in the layout that is read."""
    return renamed(weights, HF_CLIP) | {
        "text_model.embeddings.position_ids": torch.arange(77)[None]
    }


def clip_shapes(width=128, text=64, depth=2):
    """Names and shapes of OpenAI's CLIP with an image tower `width` wide and a text tower `text`
    wide."""
    shapes = {"logit_scale": ()} | table_of(
        "",
        f"""
        positional_embedding 77x{text} text_projection {text}x{text}
        token_embedding.weight 49408x{text}
        visual.class_embedding {width} visual.positional_embedding 17x{width}
        visual.proj {width}x{text}
        visual.conv1.weight {width}x3x16x16 visual.ln_pre.weight {width} visual.ln_pre.bias {width}
        visual.ln_post.weight {width} visual.ln_post.bias {width} ln_final.weight {text}
        ln_final.bias {text}""",
    )
    for tower, w in [("visual.transformer", width), ("transformer", text)]:
        for i in range(depth):
            shapes |= table_of(
                f"{tower}.resblocks.{i}.",
                f"""attn.in_proj_weight {3 * w}x{w} attn.in_proj_bias {3 * w}
                attn.out_proj.weight {w}x{w} attn.out_proj.bias {w} mlp.c_fc.weight {4 * w}x{w}
                mlp.c_fc.bias {4 * w}
                mlp.c_proj.weight {w}x{4 * w} mlp.c_proj.bias {w} ln_1.weight {w} ln_1.bias {w}
                ln_2.weight {w}
                ln_2.bias {w}""",
            )
    return shapes


# Ids 512..517, start 518, end 519.
MERGES = ["c a", "ca t</w>", "t h", "th e</w>", "a t</w>", "Ã ©</w>"]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The vocabulary of MERGES."""
    path = tmp_path_factory.mktemp("bpe") / "vocab.gz"
    path.write_bytes(gzip.compress("\n".join(["header", *MERGES, ""]).encode()))
    return tok.BPE(path)


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory, bpe):
    """A tiny CLIP whose text tower knows `bpe`, and that vocabulary: two paths."""
    folder = tmp_path_factory.mktemp("clip")
    weights = official({**clip_shapes(), "token_embedding.weight": (bpe.size, 64)})
    torch.save(hugging_face(weights), folder / "clip.bin")
    (folder / "vocab.gz").write_bytes(bpe.file)
    return folder / "clip.bin", folder / "vocab.gz"


# ---- For several sections: scripts as functions and as processes, and what they say
def inside(script, *args):
    """Run a script of the project in this process, which spares the seconds of a start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        # The trainers' handlers would outlive them.
        patch.setattr(signal, "signal", lambda *_: None)
        sample.guarded(sys.modules[script.removesuffix(".py")].main)


def refusal(script, args, capsys):
    """The one line with which a script, run in this process, refuses its arguments with status
    2."""
    capsys.readouterr()  # what was said before
    with pytest.raises(SystemExit) as stop:
        inside(script, *args)
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if line.strip() and not re.search("it/s|s/it", line)
    ]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{script}: error: "), (
        lines
    )
    return lines[0]


def refuses(words, call, *args, **options):
    """The call raises a UserError that says `words`."""
    with pytest.raises(sample.ERRORS, match=words):
        call(*args, **options)


def launch(script, *args, world=1):
    """A script as a process, or as `world` processes under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), "--"]
    line = [sys.executable, *(torchrun if world > 1 else []), str(HERE / script), *map(str, args)]
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finished(process):
    """Wait for a run that must end well."""
    output = process.communicate(timeout=200)
    assert process.returncode == 0, output


# ---- For several sections: both stages, trained once
QUICK1 = [
    "--pretrain-steps",
    2,
    "--steps",
    6,
    "--batch",
    8,
    "--log-every",
    1,
    "--save-every",
    3,
    "--device",
    "cpu",
]
QUICK2 = ["--steps", 6, "--batch", 8, "--log-every", 1, "--save-every", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of both stages, a few steps, on forty shapes written to files."""
    root = tmp_path_factory.mktemp("trained")
    score.write(root / "data", 40, seed=0)
    inside("train_stage1.py", "--data", root / "data", "--out", root / "out", *QUICK1)
    inside("train_stage2.py", "--out", root / "out", *QUICK2)
    return root


def losses(path):
    """{step: loss} of a log."""
    return {
        row["step"]: row["loss"] for row in map(json.loads, Path(path).read_text().splitlines())
    }


def pixels_of(pictures, numbers):
    """The pictures of these numbers as images in [-1,1]."""
    return sample.to_float(torch.stack([pictures[i][0] for i in numbers]))


# ---- The form of the files: width, one statement a line, imports one way
SOURCES = [
    "tokenizer.py",
    "decoder.py",
    "mixer.py",
    "fid.py",
    "sample.py",
    "train_stage1.py",
    "train_stage2.py",
]


@pytest.mark.parametrize("file", [*SOURCES, "test_all.py"])
def test_lines_are_short(file):
    """No line of a file is longer than 100 characters."""
    lines = (HERE / file).read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("file", [*SOURCES, "test_all.py"])
def test_one_statement_a_line(file):
    """Every statement stands on a line of its own.

    No expression statement holds several; in the program's files no assignment pairs two tuples or
    gives a lambda a name."""
    text, wrong = (HERE / file).read_bytes(), []
    for node in ast.walk(ast.parse(text)):
        value = getattr(node, "value", None)
        if (
            isinstance(node, ast.stmt)
            and text.splitlines()[node.lineno - 1][: node.col_offset].strip()
        ):
            wrong.append(f"{node.lineno}: not the first on its line")
        if isinstance(node, ast.Expr) and isinstance(value, (ast.Tuple, ast.BoolOp, ast.IfExp)):
            wrong.append(f"{node.lineno}: several in one expression")
        pair = (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(value, ast.Tuple)
        )
        if file in SOURCES and (
            pair or isinstance(node, ast.Assign) and isinstance(value, ast.Lambda)
        ):
            wrong.append(f"{node.lineno}: two assignments, or a lambda with a name")
    assert wrong == []


@pytest.mark.parametrize("file", SOURCES)
def test_imports_go_one_way(file):
    """A file imports at its top, and of the project only the files before it.

    The first four stand alone, and the first three need no package but torch."""
    tree = ast.parse((HERE / file).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        getattr(node, "module", None) or alias.name for node in imports for alias in node.names
    }
    number = SOURCES.index(file)
    packages = ["torch"] if number < 3 else ["torch", "numpy", "PIL", "scipy", "tqdm"]
    before = [name.removesuffix(".py") for name in SOURCES[:number]] if number > 3 else []
    assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, *packages, *before}
    # What a system may lack stands at the top too, in a `try`.
    tried = [node for block in tree.body if isinstance(block, ast.Try) for node in block.body]
    assert [node.lineno for node in imports if node not in tree.body + tried] == []


@pytest.mark.parametrize("file", sorted(HERE.glob("docs/*.py")))
def test_lines_of_docs_are_short(file):
    """Lines of the scripts in docs/ are at most 100 characters long."""
    lines = file.read_text().splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


@pytest.mark.parametrize("file", [*SOURCES, "docs/diagram.py"])
def test_blank_lines_between_definitions(file):
    """Two blank lines stand between definitions at the top of a file, one between methods."""
    text = (HERE / file).read_text()
    lines = text.splitlines()
    kinds = (ast.FunctionDef, ast.ClassDef)
    wanted = []
    for node in ast.parse(text).body:
        if isinstance(node, kinds):
            wanted.append((node.lineno, 2))
        if isinstance(node, ast.ClassDef):
            wanted += [(method.lineno, 1) for method in node.body if isinstance(method, kinds)]

    wrong = []
    for number, count in wanted:
        above = lines[: number - 1]
        # Decorators and comments above a definition belong to it.
        while above[-1].strip().startswith(("@", "#")):
            above.pop()
        blank = 0
        while not above[-1].strip():
            above.pop()
            blank += 1
        if blank != count:
            wrong.append(number)
    assert wrong == []


def test_the_errors_of_all_files_are_value_errors():
    """The UserError of each file that works alone is a ValueError, and says so."""
    for module in (tok, dec, mix, fid):
        assert module.UserError.__module__ == module.__name__
        assert issubclass(module.UserError, ValueError)
        assert "ValueError" in module.UserError.__doc__


# ---- tokenizer.py: the read tokens, resizing, losses
@pytest.mark.parametrize("token, positions", [("cls", [0]), ("reg", [1]), ("all", [0, 1, 2])])
def test_only_the_read_tokens_are_trained(token, positions):
    """Only the embedding of the read tokens is trained; z starts as z0, and z0 stays as it was."""
    t, x = tok.Tokenizer(tiny_vit(), token), torch.rand(3, 3, 20, 17) * 2 - 1
    z = t(x)
    assert z.shape == (3, len(positions), 32) and torch.equal(z, t.z0(x))  # before training z = z0
    (z.square().sum() + tok.cosine_loss(z, torch.randn_like(z)).sum()).backward()
    assert [name for name, p in t.named_parameters() if p.grad is not None] == ["embedding"]
    assert t.embedding.grad.abs().min() > 0
    t.embedding.data *= 2
    assert not torch.allclose(t(x), t.z0(x)) and torch.equal(t.z0(x), z.detach())  # z0 stays
    assert torch.equal(z, t.vit(t.normalise(x))[:, positions])


def test_unfreezing_all_keeps_the_original_for_z0():
    """With unfreeze="all" every trainable weight gets a gradient, and z0 stays the original's.

    With "none" nothing is trainable; registers of a ViT that has none are refused."""
    t, x = tok.Tokenizer(tiny_vit(), unfreeze="all"), torch.rand(2, 3, 16, 16) * 2 - 1
    z0 = t.z0(x)
    t(x).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in t.parameters())
    for p in t.parameters():
        p.data += 0.1 * p.requires_grad
    assert torch.equal(t.z0(x), z0) and not torch.allclose(t(x), z0)
    assert not any(p.requires_grad for p in tok.Tokenizer(tiny_vit(), unfreeze="none").parameters())
    refuses("register", tok.Tokenizer, tok.ViT(), "reg")


def test_resizing():
    """Images are cut to their central square and averaged; position embeddings stay up to date.

    Constants stay, and so do images of the right size. Position embeddings are those of now. All is
    one graph for --compile."""
    x = torch.zeros(1, 3, 40, 70)
    x[..., 15:55] = 1  # the centre square alone
    assert torch.equal(tok.resize(x, 16), torch.ones(1, 3, 16, 16))
    y = torch.rand(1, 3, 32, 32)
    assert torch.allclose(tok.resize(y, 16), F.avg_pool2d(y, 2)) and torch.equal(
        tok.resize(y, 32), y
    )
    vit = tiny_vit().requires_grad_(False)
    first = vit.patch_positions(3, 5)
    assert first.shape == (1, 15, 32) and vit.patch_positions(4, 4).shape == (1, 16, 32)
    vit.pos_embed.add_(1)
    assert torch.allclose(vit.patch_positions(3, 5), first + 1, atol=1e-5)
    vit.pixels = 32  # its positions have to be resized
    tokenizer = tok.Tokenizer(vit)
    assert torch.equal(torch.compile(tokenizer, backend="eager", fullgraph=True)(y), tokenizer(y))


def test_losses_have_their_closed_forms():
    """The cosine and the contrastive loss have the values of their closed forms."""
    a = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[2.0, 0.0]]])
    b = torch.tensor([[[0.0, 5.0]], [[-3.0, 0.0]], [[1.0, 1.0]]])
    assert torch.allclose(tok.cosine_loss(a, b), torch.tensor([1.0, 2.0, 1 - 0.5**0.5]))
    ones = torch.ones(4, 3)  # all embeddings equal: log(2B-1)
    assert torch.allclose(tok.contrastive_loss(ones, ones), torch.tensor(7.0).log())
    e = torch.eye(4)  # partners equal, others orthogonal: the softmax is known
    assert torch.allclose(
        tok.contrastive_loss(e, e, 0.5), torch.tensor(math.log(math.e**2 + 6) - 2), atol=1e-5
    )


# ---- tokenizer.py: published encoders, against figures of their own code
VIT = {
    "width": 96,
    "depth": 3,
    "heads": 3,
    "hidden": 384,
    "patch": 14,
    "grid": 9,
    "layer_scale": True,
}


# {(height, width): (class token [1,:3], last patch [1,-1,:2])}.
@pytest.mark.parametrize(
    "registers, figures",
    [
        (
            0,
            {
                (126, 126): ([1.3909583, -0.6111237, 0.9246164], [1.0020436, -0.2605651]),
                (56, 56): ([1.038504, -0.7463139, 1.0393908], [0.2235843, 0.3490676]),
                (182, 140): ([2.0131795, -0.4523501, 0.7861331], [1.5738912, -0.1345164]),
                (70, 98): ([1.069735, -0.8705731, 1.6015197], [1.5155047, 0.2929357]),
            },
        ),
        (
            4,
            {
                (126, 126): ([1.4405926, -0.5822288, 0.9463598], [0.9992852, -0.2280324]),
                (56, 56): ([1.2834781, -0.5669176, 1.1057715], [0.6126821, 0.5377855]),
                (182, 140): ([2.0196564, -0.440992, 0.8076234], [1.6081079, -0.1249322]),
                (70, 98): ([1.3624084, -0.7944974, 1.3052913], [1.3705868, 0.3859628]),
            },
        ),
    ],
)
def test_dinov2(tmp_path, registers, figures):
    """The ViT gives the figures of DINOv2's own code, with and without registers, at any size.

    The official code has two ways to resize position embeddings; the figures are of both."""
    weights = official({**shapes_of(tok.ViT, **VIT, registers=registers), "mask_token": (1, 96)})
    torch.save(weights, tmp_path / "a.pth")
    vit = tok.load_encoder(tmp_path / "a.pth")
    assert vit.pixels == 224 and not any(p.requires_grad for p in vit.parameters())
    for size, (cls, patch) in figures.items():
        tokens = vit(normalised(picture(f"tiny-{size[0]}x{size[1]}", 2, *size)))
        near(tokens[1, 0, :3], cls)
        near(tokens[1, -1, :2], patch)


def test_mae(tmp_path):
    """The ViT gives the figures of MAE's own code, though the file holds a decoder as well."""
    weights = official(shapes_of(tok.ViT, **{**VIT, "patch": 16, "grid": 4, "layer_scale": False}))
    others = {"decoder_embed.weight": torch.zeros(3, 3), "mask_token": torch.zeros(1, 1, 8)}
    torch.save({"model": weights | others}, tmp_path / "a.pth")
    tokens = tok.load_encoder(tmp_path / "a.pth")(normalised(picture("tiny-mae", 2, 64, 64)))
    near(tokens[1, 0, :4], [1.207941, -0.4187583, 1.3290678, 0.8449023])


def test_clip(tmp_path, capsys):
    """CLIP's image token and text feature are those of OpenAI's own code.

    The image token before the projection, and the text feature of 'a photo of a cat', from Hugging
    Face's layout; a line says that QuickGELU is taken. OpenAI's layout and registers are
    refused."""
    weights = official(clip_shapes())
    torch.save(hugging_face(weights), tmp_path / "a.bin")
    (tmp_path / "b.safetensors").write_bytes(safetensors(hugging_face(weights)))
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, :7] = torch.tensor([49406, 320, 1125, 539, 320, 2368, 49407])
    for file in ("a.bin", "b.safetensors"):
        vit = tok.load_encoder(tmp_path / file)
        tokens = vit(normalised(picture("clip-64", 3, 64, 64), tok.CLIP))
        near(tokens[1, 0, :4], [-0.6273584, 0.0036576, 1.7625371, -1.8191109])
        near(
            tok.load_text_encoder(tmp_path / file).embed(ids)[0, :4],
            [0.4188382, -1.0934184, -0.2489413, -1.64716],
        )
        # Names and shapes do not tell, so a line does.
        assert capsys.readouterr().out.count("QuickGELU") == 1
        assert tok.Tokenizer(vit).config["vit"]["mean"] == tok.CLIP[0] and vit.pixels == 64
        x, mlp = torch.randn(9, 128), vit.blocks[0].mlp
        assert torch.allclose(
            mlp(x), mlp.fc2(mlp.fc1(x) * torch.sigmoid(1.702 * mlp.fc1(x))), atol=1e-5
        )
        refuses("register", tok.Tokenizer, vit, "all")
    torch.save(weights, tmp_path / "a.pt")  # OpenAI's names
    for read in (tok.load_encoder, tok.load_text_encoder):
        refuses("a.pt: not .* Hugging Face's layout", read, tmp_path / "a.pt")


@torch.no_grad()
def test_against_transformers(tmp_path):
    """Both towers of CLIP give what transformers' CLIPModel gives, where it is installed.

    The very class that CLIP's files come from, with random weights."""
    hf = pytest.importorskip("transformers")
    size = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=128, intermediate_size=512)
    image, text = (
        dict(size, image_size=64, patch_size=16),
        dict(size, vocab_size=1000, eos_token_id=999),
    )
    torch.manual_seed(0)
    theirs = hf.CLIPModel(
        hf.CLIPConfig(vision_config=image, text_config=text, projection_dim=64)
    ).eval()
    for p in theirs.parameters():
        # Biases, norms and scales start at values that hide mistakes.
        p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    theirs.double()  # such weights magnify rounding
    x, ids = torch.randn(2, 3, 64, 64).double(), torch.randint(1, 999, (3, 77))
    ids[[0, 1, 2], [5, 30, 76]] = 999
    tower, out = (
        tok.load_text_encoder(tmp_path / "model.safetensors").double(),
        theirs.text_model(ids),
    )
    near(
        tok.load_encoder(tmp_path / "model.safetensors").double()(x)[:, 0],
        theirs.vision_model(x).pooler_output,
    )
    near(tower(ids), out.last_hidden_state)
    near(tower.embed(ids), theirs.text_projection(out.pooler_output))


def test_named_weights_are_downloaded_and_offline_says_what_to_do(tmp_path, monkeypatch):
    """Weights named by a word are downloaded and kept; a failed download says what to do."""
    weights = official(shapes_of(tok.ViT, **VIT))
    torch.save(weights, tmp_path / "vit.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setitem(tok.PUBLISHED, "dinov2_vitb14", (tmp_path / "vit.pth").as_uri())
    assert torch.equal(tok.load_encoder("dinov2_vitb14").cls_token, weights["cls_token"])
    assert list(tmp_path.rglob("hub/*/checkpoints/vit.pth"))
    monkeypatch.setitem(tok.PUBLISHED, "mae_vitb16", (tmp_path / "gone.pth").as_uri())
    refuses("(?s)gone.pth.*file://.*checkpoints", tok.load_encoder, "mae_vitb16")


# ---- tokenizer.py: text
ORDER = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]


# Want: words that no merge touches as text, ids of merged ones as numbers.
@pytest.mark.parametrize(
    "text, want",
    [
        ("", []),
        ("The  CAT\n", [515, 513]),
        ("cat é", [513, 517]),
        ("e\u0301", [517]),
        ("cat\u2019s", [513, "'s"]),
        ("42", ["4", "2"]),
        ("a_b", ["a", "_", "b"]),
        ("日本", ["日本"]),
        ("😀👍", ["😀👍"]),
        ("&amp;amp;amp;", ["&", "amp", ";"]),
        ("&eacute;&amp;cat", [517, "&", 513]),
        ("a<|startoftext|>cat<|EndOfText|>", ["a", 518, 513, 519]),
    ],
)
def test_ids(bpe, text, want):
    """A text becomes its start, the ids of its merged words or else of their bytes, and its end.

    Zeros fill it up to 77. Case, blanks, accents and HTML's entities are made one way first."""
    ids = [518]
    for word in want:
        ids += [word] if isinstance(word, int) else [ORDER.index(b) for b in word.encode()]
        ids[-1] += 256 * isinstance(word, str)
    assert bpe.encode(text) == [*ids, 519] and bpe([text])[0].tolist() == [*ids, 519] + [0] * (
        76 - len(ids)
    )


def test_captions_are_cut_at_77(bpe, tmp_path):
    """A caption is cut at 77 ids, the last of which is the end token.

    `encode` cuts nothing: its length tells that a caption is too long. A damaged vocabulary is
    refused."""
    ids = bpe(["cat " * 75, "cat " * 76, "the"])
    assert (
        ids.shape == (3, 77)
        and ids.dtype == torch.long
        and torch.equal(ids[0], ids[1])
        and ids[1, -1] == 519
    )
    assert len(bpe.encode("cat " * 75)) == bpe.context < len(bpe.encode("cat " * 76))
    assert bpe([]).shape == (0, 77)
    for data in (
        b"text",
        gzip.compress(b"header\nnot a merge\n"),
        gzip.compress(b"header\na b\n")[:-9],
    ):
        (tmp_path / "v.gz").write_bytes(data)
        refuses("v.gz is not", tok.BPE, tmp_path / "v.gz")


def test_padding_changes_no_text_feature(small_clip, bpe):
    """What follows the end token changes neither its feature nor any before it.

    The first end token counts."""
    tower, ids = tok.load_text_encoder(small_clip[0]), bpe(["a cat", "the bat sat", ""])
    padded = torch.where(ids == 0, torch.randint(1, 520, ids.shape), ids)
    assert torch.equal(tower.embed(ids), tower.embed(padded))
    assert torch.allclose(tower(ids[:, :9]), tower(ids)[:, :9], atol=1e-5)
    for a, b, n in zip(tower(ids), tower(padded), ids.argmax(1) + 1):
        assert torch.equal(a[:n], b[:n]) and not torch.equal(a[n:], b[n:])


def test_word_encoder_masks_padding():
    """Padding changes no feature of a word, and the order of the words counts.

    A word that is not known has the id 1; `split` cuts nothing."""
    w = tok.WordEncoder(["a", "red", "seven", "on", "blue"])
    short, both = w.ids(["a red seven"]), w.ids(["a red seven", "a red seven on blue on blue"])
    assert both.tolist()[0] == [2, 3, 4, 0, 0, 0, 0] and w.ids(["zebra"]).tolist() == [[1]]
    assert len(w.split("a " * 30)) == 30 > w.context
    assert torch.allclose(w(short)[0], w(both)[0, :3], atol=1e-5)
    # Order counts.
    assert (w(w.ids(["red on blue"])) - w(w.ids(["blue on red"])))[0, 1].abs().max() > 1e-4


# ---- decoder.py: flow and sampler
def test_euler_follows_an_analytic_flow():
    """On dx/dt = -x, n Euler steps give x(0) (1 - 1/n)^n, which tends to x(0)/e.

    t runs 0, 1/n, ..."""
    times = []

    def velocity(x, t):
        times.append(t.item())
        return -x

    assert torch.allclose(dec.euler(velocity, torch.ones(3), 10), torch.full((3,), 0.9**10))
    assert np.allclose(times, np.arange(10) / 10)
    assert abs(dec.euler(velocity, torch.ones(1), 4000).item() - math.exp(-1)) < 1e-4


def test_gaussian_flow_has_the_right_end(m=1.5, s=0.3):
    """Along the flow from N(0,1) to N(m, s^2), Euler steps carry noise n to m + s n.

    Noise N(0,1), data N(m, s^2): the marginal velocity is known."""

    def velocity(x, t):
        return m + (t * s**2 - (1 - t)) / ((1 - t) ** 2 + (t * s) ** 2) * (x - t * m)

    n = torch.linspace(-2, 2, 9)
    assert torch.allclose(dec.euler(velocity, n, 2000), m + s * n, atol=5e-3)


@torch.no_grad()
def test_sampling_reads_nothing_from_the_device():
    """Sampling reads no number from the device, for which it would have to wait.

    A fake tensor raises where its number is read."""
    with FakeTensorMode():
        m = mix.Mixer(K=1, D=16, hidden=32, depth=2, num_classes=5)
        d = dec.Decoder(3, 16, token_dim=16, predict="data", **TINY)
        labels = torch.zeros(2, dtype=torch.long)
        z = dec.euler(mix.guided(m, labels), torch.randn(2, 1, 16), 10)
        x = dec.euler(lambda x_t, t: d(x_t, t, z), torch.randn(2, 3, 16, 16), 10)
    assert x.shape == (2, 3, 16, 16)

    # The time itself stays on the CPU, wherever the flow is.
    places = []

    def velocity(x, t):
        places.append((t.device.type, t.shape))
        return x * t

    assert dec.euler(velocity, torch.zeros(2, device="meta"), 3).device.type == "meta"
    assert places == [("cpu", ())] * 3


# ---- decoder.py: the decoder
def test_fourier_features_read_the_time_of_the_paper():
    """The condition of a time t is sqrt(2) [cos(2 pi f t), sin(2 pi f t)], t=0 being the noise.

    That is so with zero blocks and a plain in_proj."""
    m = dec.Decoder(3, 16, token_dim=24, **TINY).mapping
    nn.init.eye_(m.in_proj.weight)
    t = torch.tensor([0.0, 0.1, 0.35, 1.0])
    angles = 2 * np.pi * t.double().numpy()[:, None] * m.freqs.double().numpy()[:, 0]
    near(m(t), 2**0.5 * np.concatenate([np.cos(angles), np.sin(angles)], 1))


def test_decoder_starts_as_zero_and_every_block_as_the_identity():
    """A new decoder gives zero, its blocks are the identity, and a token enters as itself."""
    d = dec.Decoder(3, 16, token_dim=24, **TINY)
    x, z = torch.randn(2, 17, 32), torch.randn(2, 1, 24)
    assert all(torch.equal(block(x, torch.randn(2, 16), d.rotary(4)), x) for block in d.blocks)
    assert d(torch.randn(2, 3, 16, 16), torch.rand(2), z).abs().max() == 0
    assert torch.equal(d.project(z), F.pad(z, (0, 8)))  # a token enters as itself


def test_a_decoder_narrower_than_the_token():
    """Into a decoder narrower than the token, LayerNorm(Linear(z)) alone enters.

    Its start lets the gradient through to the token."""
    d = dec.Decoder(3, 16, token_dim=40, **TINY)
    z = torch.randn(2, 1, 40, requires_grad=True)
    linear = z.detach() @ d.token_fc.weight.T + d.token_fc.bias
    var, mean = torch.var_mean(linear, -1, correction=0, keepdim=True)
    assert torch.allclose(d.project(z), (linear - mean) / (var + 1e-5).sqrt(), atol=1e-5)
    (d.project(z) * torch.randn(32)).sum().backward()
    assert z.grad.abs().min() > 0


def test_decoder_that_predicts_data():
    """A decoder that predicts data is finite at t=1, and its velocity points to the data.

    The same network, read as data, is x + (1 - t) times its velocity. Euler steps, few or many, end
    at the data. A word that `predict` does not know is refused."""
    d = busy(dec.Decoder(3, 16, token_dim=24, predict="data", t_max=0.9, **TINY))
    v = dec.Decoder(**{**d.config, "predict": "velocity"})
    v.load_state_dict(d.state_dict())
    x, z, t = torch.randn(4, 3, 16, 16), torch.randn(4, 1, 24), torch.tensor([0.0, 0.2, 0.5, 0.9])
    assert torch.allclose(x + (1 - t)[:, None, None, None] * d(x, t, z), v(x, t, z), atol=1e-5)
    assert d(x, torch.ones(4), z).isfinite().all()
    d.zero_init()
    assert all(
        dec.euler(lambda x_t, t: d(x_t, t, z), x, steps).abs().max() < 1e-5
        for steps in (20, 50, 250)
    )
    with pytest.raises(ValueError, match="predict"):
        dec.Decoder(predict="noise")


def test_the_largest_time_that_the_network_is_told():
    """At times above t_max the decoder gives what it gives at t_max.

    Below it, the time counts."""
    d = busy(dec.Decoder(3, 16, token_dim=24, t_max=0.9, **TINY))
    x, z = torch.randn(4, 3, 16, 16), torch.randn(4, 1, 24)
    early, last, late = (d(x, torch.tensor([t]), z) for t in (0.8, 0.9, 0.98))
    assert torch.equal(last, late) and not torch.allclose(early, last, atol=1e-3)


def test_decoder_attention_against_float64_formulas():
    """The decoder's attention is cosine attention with axial RoPE, written out in float64.

    The formulas are written out with loops and complex numbers."""
    torch.manual_seed(0)
    d = busy(dec.Decoder(3, 8, token_dim=24, **TINY)).double()
    attn = d.blocks[0].attn
    attn.scale.data = torch.tensor([4.0, 9.0]).double()
    x = torch.randn(1, 5, 32).double()
    q, k, v = attn.qkv_proj(x)[0].view(5, 3, 2, 16).unbind(1)
    # The token, then rows first.
    centres = [(0.0, 0.0), (-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]
    freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), 5)[:-1].exp().double()
    out = torch.zeros(5, 2, 16).double()
    for h, s in ((0, 4.0), (1, 9.0)):

        def turned(u, n):
            u = u[n, h] * s**0.5 / (u[n, h].square().sum() + 1e-6).sqrt()
            theta = torch.cat(
                [centres[n][0] * freqs[[h, 2 + h]], centres[n][1] * freqs[[h, 2 + h]]]
            )
            pair = torch.complex(u[:4], u[4:8]) * torch.polar(torch.ones(4).double(), theta)
            return torch.cat([pair.real, pair.imag, u[8:]])

        for n in range(5):
            weight = torch.stack([turned(q, n) @ turned(k, j) for j in range(5)]).softmax(0)
            out[n, h] = sum(weight[j] * v[j, h] for j in range(5))
    assert torch.allclose(attn(x, d.rotary(2)), attn.out_proj(out.view(1, 5, 32)), atol=1e-5)


def test_decoder_batch_invariance_time_and_tokens():
    """A picture's output ignores the rest of its batch, and depends on the time and the tokens.

    The K tokens are told apart. A size that is no multiple of the patch is refused."""
    d = busy(dec.Decoder(3, 16, token_dim=24, K=3, **TINY))
    x, z, t = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 24), torch.tensor([0.3])
    whole = d(x, t, z)
    assert torch.allclose(
        whole, torch.cat([d(x[i : i + 1], t, z[i : i + 1]) for i in range(4)]), atol=1e-5
    )
    assert (whole - d(x, torch.tensor([0.31]), z)).abs().max() > 1e-4
    assert (whole - d(x, t, z.flip(1))).abs().max() > 1e-4  # the K tokens are told apart
    refuses("patches", dec.Decoder, size=30, patch=4)


def test_autocast_keeps_times_apart():
    """Under bfloat16 autocast, times and the norms' scales keep the precision of float32.

    bfloat16 has 8 bits: it would leave 129 of the times from 0.5 to 1, and round 1 + the scales of
    the norms."""
    torch.manual_seed(0)
    norm, times = dec.RMSNorm(32, 16), torch.linspace(0, 1, 5000)
    x, c = torch.randn(4, 5, 32), torch.randn(4, 16)
    want = x / x.square().mean(-1, keepdim=True).sqrt() * (1 + c @ norm.linear.weight.T)[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(norm(x, c), want, atol=1e-4)
    for embed in (dec.Decoder(3, 16, token_dim=24, **TINY).mapping, mix.TimeEmbedding(24, 1000.0)):
        exact = embed(times)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(embed(times), exact) and len(exact.unique(dim=0)) == 5000


def test_attention_keeps_q_and_k_once():
    """For the backward pass attention keeps at most 24 bytes for each number of its input.

    Kept are x, q, k, v and the output in bfloat16, q and k in float32 once, and their lengths."""
    attention, x = dec.Attention(64, 2), torch.randn(4, 100, 64)
    rotary = torch.rand(100, 2, 8), torch.rand(100, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        one_more = bench.kept_bytes(lambda: attention(x, rotary)) - bench.kept_bytes(
            lambda: attention(x[:3], rotary)
        )
    assert one_more <= 24 * 100 * 64


def test_checkpointing_gives_the_same_gradients():
    """With checkpointing a block runs twice, and the gradients are the same."""
    t, d = tok.Tokenizer(tiny_vit()), busy(dec.Decoder(3, 16, token_dim=32, **TINY))
    x, calls, gradients = torch.rand(2, 3, 16, 16), [], []
    trained = [t.embedding, *d.parameters()]
    for block in (t.vit.blocks[0], d.blocks[0]):
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for t.vit.checkpointing in (False, True):
        d.checkpointing = t.vit.checkpointing
        gradients.append(
            torch.autograd.grad(d(x, torch.full((1,), 0.3), t(x)).square().mean(), trained)
        )
    assert len(calls) == 2 + 4  # each block runs twice the second time
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))


@pytest.mark.parametrize("steps", [1, 10, 100, 150, 1000])
def test_data_prediction_ends_on_the_prediction(steps):
    """However many Euler steps there are, the last one leads onto the predicted picture."""
    d = dec.Decoder(3, 16, token_dim=24, predict="data", t_max=0.9, **TINY)
    end = torch.linspace(-3, 3, 3 * 16 * 16).view(1, 3, 16, 16)
    d.patch_out.register_forward_hook(lambda *_: dec.to_patches(end, 4))
    noise = torch.randn(1, 3, 16, 16)
    z = torch.randn(1, 1, 24)
    with torch.no_grad():
        near(dec.euler(lambda x_t, t: d(x_t, t, z), noise, steps), end, 1e-5)


# ---- decoder.py: the VAE
def test_the_vae_works_on_few_images_at_a_time(monkeypatch):
    """The VAE gives the same for many images, of which AT_ONCE at most are inside it at a time."""
    vae = dec.VAE((32, 32, 32)).eval()
    sizes = []
    for net in (vae.encoder, vae.decoder):
        net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    x = torch.rand(37, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean, logvar = vae.posterior(x)
        images = vae.decode(mean)
        monkeypatch.setattr(dec.VAE, "AT_ONCE", 64)
        near(mean, vae.posterior(x)[0], 1e-4)
        near(logvar, vae.posterior(x)[1], 1e-4)
        near(images, vae.decode(mean), 1e-4)
    assert sizes == [16, 16, 5] * 2 + [37] * 3


# The seeds of the figures go by the names in CompVis's own code, which gave them.
COMPVIS = [
    (r"down_blocks.(\d)", r"down.\1"),
    (r"up_blocks.(\d)", lambda found: f"up.{3 - int(found[1])}"),
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("resnets", "block"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("group_norm", "norm"),
    ("to_out.0", "proj_out"),
    ("to_", ""),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("(down|up)samplers.0", r"\1sample"),
]
OLD_DIFFUSERS = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")]


def test_vae_layouts(tmp_path):
    """The VAE's posterior is that of CompVis's own code, in each of diffusers' layouts.

    diffusers' new and old names, .safetensors and .bin. A sample is the scaled mean plus noise.
    CompVis's own layout is refused."""
    shapes = shapes_of(dec.VAE, widths=[64, 128, 256, 256])
    ours = {name: seeded(rewritten(name, COMPVIS), shape) for name, shape in shapes.items()}
    old = renamed(ours, OLD_DIFFUSERS)
    (tmp_path / "new.safetensors").write_bytes(safetensors(ours))
    (tmp_path / "old.safetensors").write_bytes(safetensors(old))
    torch.save(old, tmp_path / "old.bin")
    x = picture("vae-32x72", 1, 32, 72)
    for file in ("new.safetensors", "old.safetensors", "old.bin"):
        vae = dec.load_vae(tmp_path / file)
        mean, logvar = vae.posterior(x)
        near(mean[0, :, 3, 8], [0.1509764, 0.6491106, -0.4958231, 0.9428135])
        near(logvar[0, :, 1, 2], [-0.5687925, -0.2563109, -0.358317, 0.3784242])
    noise = torch.randn(mean.shape)
    latents = vae.sample(*vae.posterior(x), noise)
    assert torch.allclose(latents, 0.18215 * (mean + (logvar / 2).exp() * noise), atol=1e-6)
    # Another layout: a sentence, no traceback.
    torch.save({"state_dict": renamed(ours, COMPVIS)}, tmp_path / "kl.ckpt")
    refuses("diffusers' layout", dec.load_vae, tmp_path / "kl.ckpt")


@torch.no_grad()
def test_against_diffusers(tmp_path):
    """The VAE gives what diffusers' AutoencoderKL gives, where it is installed."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours, x = (
        dec.load_vae(tmp_path / "diffusion_pytorch_model.safetensors"),
        torch.rand(2, 3, 64, 48) * 2 - 1,
    )
    posterior = theirs.encode(x).latent_dist
    mean, logvar = ours.posterior(x)
    near(mean, posterior.mean)
    near(logvar, posterior.logvar)
    near(ours.decode(0.18215 * mean), theirs.decode(mean).sample, 5e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_little_memory(tmp_path):
    """The peak of memory is at most 1.3 times the stored weights plus the model."""
    look = "print(open('/proc/self/status').read())"
    for call, kind, settings in (
        ("tokenizer.load_encoder", tok.ViT, dict(width=512, depth=20, heads=8)),
        ("decoder.load_vae", dec.VAE, dict(widths=[64, 128, 256, 256])),
    ):
        code = f"import {call.split('.')[0]}, sys; {look}; {call}(sys.argv[1]); {look}"
        state = {name: torch.zeros(shape) for name, shape in shapes_of(kind, **settings).items()}
        # Published files are aligned; numbers that are not have to be copied once more.
        (tmp_path / "a.safetensors").write_bytes(safetensors(state, align=8))
        torch.save(state, tmp_path / "a.bin")
        for file in (tmp_path / "a.safetensors", tmp_path / "a.bin"):
            command = [sys.executable, "-c", code, file]
            done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
            before, after = map(int, re.findall(r"VmHWM:\s+(\d+) kB", done.stdout))
            assert (
                0 < 1024 * (after - before) < 1.3 * 2 * sum(4 * x.numel() for x in state.values())
            ), file


# ---- mixer.py: layers, guidance, text
def test_mixer_layers_start_as_the_identity_and_widths_are_not_swapped():
    """A new Mixer's layers are the identity, and its hidden widths are not swapped.

    The numbers of parameters are those of the paper."""
    m = mix.Mixer(K=2, D=8, hidden=16, depth=2, num_classes=5, token_hidden=7, channel_hidden=11)
    x, first = torch.randn(3, 4, 16), m.layers[0]
    assert all(torch.equal(layer(x), x) for layer in m.layers)
    assert first.tokens.up.weight.shape == (7, 4) and first.channels.up.weight.shape == (11, 16)
    with torch.device("meta"):
        millions = [
            sum(p.numel() for p in mix.Mixer(channel_hidden=n * 1280).parameters()) / 1e6
            for n in (3, 4)
        ]
    # The paper: 276 without embeddings; 4 x hidden.
    assert abs(millions[0] - 279) < 1 and 365 < millions[1] < 373


def test_guidance():
    """Guidance is null + scale (plain - null) within its interval, and plain outside.

    The ends belong to the interval; a scale of 1 is plain too."""
    m = busy(mix.Mixer(K=1, D=8, hidden=16, depth=2, num_classes=5))
    z, c = torch.randn(3, 1, 8), torch.tensor([0, 1, 4])
    middle, outside, end = torch.tensor([[0.5], [0.2], [0.7]])
    plain, null = m(z, middle, c), m(z, middle, torch.full((3,), 5))
    guided = mix.guided(m, c, scale=2.0, interval=(0.3, 0.9))
    assert torch.allclose(guided(z, middle), null + 2 * (plain - null), atol=1e-5)
    assert torch.equal(mix.guided(m, c, scale=1.0)(z, middle), plain)
    assert torch.equal(guided(z, outside), m(z, outside, c))
    # The ends belong to the interval, though .7 is no float32.
    for ends in ((0.7, 0.9), (0.1, 0.7)):
        assert not torch.allclose(
            mix.guided(m, c, scale=2.0, interval=ends)(z, end), m(z, end, c), atol=1e-4
        )


def test_text_in_the_mixer():
    """At first text changes nothing, later padding never does, and no text is the learned null.

    Zero start: text changes nothing yet. Guidance holds for text as for classes."""
    torch.manual_seed(0)
    m = mix.Mixer(K=2, D=8, hidden=16, depth=2, num_classes=0, text_width=12)
    z, t, text = torch.randn(3, 2, 8), torch.rand(3), torch.randn(3, 5, 12)
    mask = torch.arange(5) < torch.tensor([[5], [2], [3]])
    assert m.layers[0].tokens.up.weight.shape[1] == 2 + 4 + 1
    assert torch.equal(m(z, t, None, text, mask), m(z, t, None, text * 2 + 1, mask))
    busy(m)
    out, noise = (
        m(z, t, None, text, mask),
        torch.where(mask[..., None], text, torch.randn_like(text)),
    )
    assert torch.equal(out, m(z, t, None, noise, mask))
    assert (out - m(z, t, None, text + 1, mask.roll(1, 1))).abs().max() > 1e-4
    assert torch.allclose(
        out, m(z, t, None, F.pad(text, (0, 0, 0, 4)), F.pad(mask, (0, 4))), atol=1e-5
    )
    null = m(z, t, None, text, mask & False)
    assert (
        torch.equal(null, m(z, t, None, torch.randn_like(text), mask & False))
        and (null - out).abs().max() > 1e-4
    )
    at = torch.tensor([0.5])
    u, c = m(z, at, None, text, mask & False), m(z, at, None, text, mask)
    assert torch.allclose(mix.guided(m, None, text, mask, 3.0)(z, at), u + 3 * (c - u), atol=1e-4)
    assert torch.equal(mix.guided(m, None, text, mask, 1.0)(z, at), c)


def test_cross_attention_against_torch():
    """The Mixer's cross-attention, with a mask, gives what torch's own attention gives."""
    c = busy(mix.CrossAttention(128, 24))
    x, text, mask = (
        torch.randn(2, 3, 128),
        torch.randn(2, 5, 24),
        torch.arange(5) < torch.tensor([[5], [2]]),
    )
    kv, ref = text @ c.kv.weight.T + c.kv.bias, nn.MultiheadAttention(128, 2, batch_first=True)
    with torch.no_grad():  # its own projections are made the identity
        ref.in_proj_weight.copy_(torch.eye(128).repeat(3, 1))
        ref.in_proj_bias.zero_()
        ref.out_proj.load_state_dict(c.out.state_dict())
    want, _ = ref(c.q(c.norm(x)), kv[..., :128], kv[..., 128:], key_padding_mask=~mask)
    assert torch.allclose(c(x, text, mask), want, atol=1e-5)


@torch.no_grad()
def test_a_time_may_be_one_number_of_any_shape():
    """Decoder, Mixer and guidance take a time of the shape (), (1,) or (B,) alike."""
    m = busy(mix.Mixer(K=1, D=8, hidden=16, depth=2, num_classes=5))
    d = busy(dec.Decoder(3, 16, token_dim=8, predict="data", **TINY))
    z = torch.randn(2, 1, 8)
    x = torch.randn(2, 3, 16, 16)
    labels = torch.tensor([0, 4])
    one_number = torch.tensor(0.7)
    for t in (one_number[None], one_number.expand(2)):
        near(m(z, one_number, labels), m(z, t, labels), 1e-5)
        near(d(x, one_number, z), d(x, t, z), 1e-4)
        guided = mix.guided(m, labels, scale=2.0, interval=(0.1, 0.7))
        near(guided(z, one_number), guided(z, one_number[None]), 1e-5)


def sampled_directions(hidden, bottleneck=None, D=16, steps=400):
    """Trains a Mixer on Gaussian tokens of a known covariance, which has full rank.

    bottleneck: the Mixer's last layer reads so few numbers. Returns, for each of the D
    eigen-directions of the covariance, the variance of the samples divided by that of the data; and
    the D eigenvalues, ascending, of the covariance of (sample - starting noise).
    """
    torch.manual_seed(0)
    # As in normalised tokens, the mean of all variances is 1.
    variances = torch.tensor([0.2] * 10 + [1.0] * 2 + [3.0] * 4)
    directions, _ = torch.linalg.qr(torch.randn(D, D))                  # its columns
    mixer = mix.Mixer(K=1, D=D, hidden=hidden, depth=1, num_classes=0)
    if bottleneck:
        # What a Mixer of this width ends with, which would be refused.
        mixer.norm = nn.Sequential(nn.Linear(hidden, bottleneck), nn.LayerNorm(bottleneck))
        mixer.proj_out = nn.Linear(bottleneck, D)

    optimizer = torch.optim.Adam(mixer.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        z = (torch.randn(256, 1, D) * variances.sqrt()) @ directions.T
        noise = torch.randn(256, 1, D)
        t = torch.rand(256)
        s = t[:, None, None]
        loss = (mixer((1 - s) * noise + s * z, t) - (z - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    with torch.no_grad():
        noise = torch.randn(8000, 1, D)
        samples = dec.euler(mixer, noise, 50)
    ratios = (samples[:, 0] @ directions).var(0) / variances
    moves = torch.linalg.eigvalsh((samples - noise)[:, 0].double().T.cov())
    return ratios, moves


def test_a_mixer_has_to_be_as_wide_as_a_token():
    """Wider than a token, its samples have the variance of the data in every direction.

    As wide as a token, it adds a constant to the noise in one direction, because of its last norm;
    half as wide, in more than half of the directions. A narrower one than a token is refused.
    """
    ratios, moves = sampled_directions(hidden=24)
    assert 0.7 < ratios.min() and ratios.max() < 1.4, ratios
    assert moves[0] > 1e-4

    ratios, moves = sampled_directions(hidden=16)
    assert (moves < 1e-9).sum() == 1, moves

    ratios, moves = sampled_directions(hidden=16, bottleneck=8)
    assert (moves < 1e-9).sum() == 9, moves
    assert (ratios > 2).sum() >= 4, ratios

    mix.Mixer(K=1, D=16, hidden=16, depth=1)
    with pytest.raises(ValueError, match="width 15 cannot generate tokens of width 16; give "):
        mix.Mixer(K=1, D=16, hidden=15, depth=1)


# ---- train_stage1.py: the shapes that it draws
def test_shapes_have_the_areas_of_geometry():
    """A drawn shape covers the area that its formula says, around its place, on plain ground."""
    plans = [one.plan_shape(i, 5) for i in range(300)]
    # A moon is a disc of radius 1 without what it shares with one of radius r, d away.
    r, d = 0.85, math.hypot(0.5, 0.15)
    shared = math.acos((d * d + 1 - r * r) / (2 * d))
    shared += r * r * math.acos((d * d + r * r - 1) / (2 * d * r))
    shared -= 0.5 * math.sqrt((1 + r - d) * (d + 1 - r) * (d - 1 + r) * (d + 1 + r))
    unit = {
        "bar": 0.6 * 2.2,
        "circle": np.pi,
        "cross": 4 * 0.6 - 0.36,
        "diamond": 2 * 1.1 * 0.72,
        "square": 1.6**2,
        "ring": np.pi * (1 - 0.55**2),
        "triangle": 1.9 * 1.7 / 2,
        "star": 5 * 1.12 * 0.47 * np.sin(np.pi / 5),
        "heart": 180 * np.pi / 16.5**2,
        "moon": np.pi - shared,
    }
    assert sorted(unit) == one.SHAPES and {plan.shape for plan in plans} == set(unit)
    for plan in plans:
        picture = one.draw_shape(plan, 64).astype(float)
        assert picture.shape == (64, 64, 3) and np.array_equal(picture, one.draw_shape(plan, 64))
        assert np.abs(picture[0, 0] - plan.ground).max() < 1
        share = (
            (picture - plan.ground)
            @ (plan.ink - plan.ground)
            / np.square(plan.ink - plan.ground).sum()
        )
        area = share.sum() / 64**2
        assert abs(area - unit[plan.shape] * plan.size**2) < 0.05 * plan.size**2, plan
        # Their middle is their centre.
        if plan.shape in ("bar", "circle", "cross", "diamond", "ring", "square"):
            middle = (
                np.array([share.sum(0) @ np.arange(64), share.sum(1) @ np.arange(64)]) / share.sum()
            )
            # Large bars are cut.
            assert np.abs((middle + 0.5) / 64 - 0.5 - plan.place).max() < 0.02, plan


def test_captions_of_shapes_say_what_is_drawn():
    """Every caption names the shape and its nearest colours, and a size that is small or large.

    Small are the lower two fifths of the sizes, large the upper two; between them none is named."""
    low, high = one.RADII
    seen = set()
    for i in range(200):
        plan = one.plan_shape(i, 0)
        words = {
            min(
                one.COLOURS,
                key=lambda name: sum(abs(a - b) for a, b in zip(one.COLOURS[name], rgb)),
            )
            for rgb in (plan.ink, plan.ground)
        }
        size = {
            "small": plan.size < low + 0.4 * (high - low),
            "large": plan.size > high - 0.4 * (high - low),
        }
        assert len(plan.captions) == 5
        for caption in plan.captions:
            assert plan.shape in caption and all(word in caption for word in words), (plan, words)
            assert {word: word in caption for word in size} == size and "  " not in caption
        seen |= {word for word in size if size[word]} or {"middle"}
    assert seen == {"small", "large", "middle"}
    assert "an orange" in " ".join(
        text for i in range(50) for text in one.plan_shape(i, 0).captions
    )


# ---- train_stage1.py: the small encoder
@torch.no_grad()
def test_the_class_token_knows_the_shape_and_the_register_the_picture():
    """The class token knows the shape and not the pixels, the register the other way round.

    docs/encoder.pt, on shapes that it has not seen: neighbours by each token, linear regression to
    the pixels."""
    vit = tok.load_encoder(HERE / "docs" / "encoder.pt")
    (x, labels, _), (known, known_labels, _) = score.shapes(300, 11), score.shapes(1200, 12)
    tokens, known_tokens = ((vit(sample.to_float(u))[:, :2]) for u in (x, known))
    pixels, known_pixels = (sample.to_float(u).flatten(1) for u in (x, known))
    right, error = [], []
    for k in range(2):
        a, b = F.normalize(tokens[:, k], dim=-1), F.normalize(known_tokens[:, k], dim=-1)
        right.append((known_labels[(a @ b.T).argmax(1)] == labels).float().mean().item())
        solution = torch.linalg.lstsq(known_tokens[:, k], known_pixels).solution
        error.append((tokens[:, k] @ solution - pixels).square().mean().item())
    assert right[0] > 0.95 > 0.8 > right[1] and error[1] < 0.3 * error[0], (right, error)


# ---- train_stage1.py: pictures and folders
def test_pictures_are_turned_upright_and_read_small(tmp_path):
    """Training turns pictures upright and reads large ones small; scores take them as stored.

    A telephone's JPEG: EXIF turns it for training, not for scores; a large one is decoded at a
    lower resolution."""
    x, exif = (np.mgrid[:600, :400, :3].sum(0) // 4).astype(np.uint8), Image.Exif()
    exif[0x112] = 6  # to be turned by a quarter
    Image.fromarray(np.rot90(x)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert [fid.decode(tmp_path / "a.jpg", pixels).shape[:2] for pixels in (None, 64)] == [
        (400, 600),
        (150, 100),
    ]
    want = np.array(ImageOps.fit(Image.fromarray(x), (64, 64), Image.Resampling.BICUBIC)).astype(
        int
    )
    assert (
        np.abs(sample.load_picture(tmp_path / "a.jpg", 64).permute(1, 2, 0).numpy() - want).max()
        < 6
    )


def test_class_folders(tmp_path, monkeypatch):
    """Top folders are the classes, sorted, whether in a folder, a .tar or a folder of .tar.

    A folder around all of them does not count; nor do hidden names. What lies beside a picture
    takes no class away. Links to folders are followed, without an os.stat of every picture. A
    picture beside the folders is refused; a flat folder has no classes."""
    files = {"b/x/1.png": 1, "a/2.png": 0, "a/4.png": 0, "c/3.png": 2}
    for top, root in (("f", "f"), ("g", "g/wrapper")):
        for name in [*files, ".ipynb_checkpoints/2.png"]:
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 30), 77).save(tmp_path / root / name)
        # What lies beside a picture takes no class away.
        (tmp_path / root / "a" / "2.json").write_text("{}")
        shard = tmp_path / f"{top}-shards" / ("0.tar" if top == "f" else "0.TAR")
        shard.parent.mkdir()
        with tarfile.open(shard, "w") as tar:
            tar.add(tmp_path / top, ".")
        for source in (tmp_path / top, shard, shard.parent):
            pictures = sample.Pictures(str(source), 16)
            labels = zip(pictures.names, pictures.labels.tolist())
            assert pictures.class_names == ["a", "b", "c"] and len(pictures) == 4
            assert {
                file: label for name, label in labels for file in files if name.endswith(file)
            } == files
            assert torch.equal(pictures[0][0], torch.full((3, 16, 16), 77, dtype=torch.uint8))
    links = tmp_path / "links"
    links.mkdir()
    for name in "ab":
        (links / name).symlink_to(tmp_path / "f" / name)
    stat = Mock(side_effect=os.stat)
    # Links to folders are followed.
    assert sample.Pictures(str(links), 16).class_names == ["a", "b"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert len(fid.files(str(links))) == 4
        # A million take seconds.
        assert not any(str(call.args[0]).endswith(".png") for call in stat.call_args_list)
    Image.new("RGB", (9, 9)).save(links / "stray.png")
    refuses("a/2.png.*stray.png", sample.Pictures, str(links), 16)
    assert sample.Pictures(str(tmp_path / "f" / "a"), 16).class_names == []


def test_what_was_really_read_decides_label_and_caption(tmp_path, capfd):
    """The picture after an unreadable one stands in for it, with its own label and number.

    Also among the tokens. Where no picture can be read, that is refused."""
    for i, name in enumerate(("a/0.png", "a/1.png", "b/2.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i,) * 3).save(tmp_path / name)
    (tmp_path / "a/1.png").write_bytes(b"no picture")
    pictures = sample.Pictures(str(tmp_path), 16)
    x, number = pictures[1]
    assert (x[0, 0, 0], pictures.labels[number], number) == (80, 1, 2)
    assert "a/1.png" in capfd.readouterr().err and pictures[1][1] == 2
    assert capfd.readouterr().err == ""  # a damaged picture is named once
    path = tmp_path / "means.npy"
    ranks = sample.Ranks("cpu", "float32")
    read = sample.compute_once([path], lambda x: [x.mean((1, 2, 3))[:, None]], pictures, ranks)
    rows = np.load(path)
    assert read.tolist() == [0, 2, 2] and rows[1] == rows[2] != rows[0]
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"")
    refuses("not one", sample.Pictures(str(tmp_path), 16).__getitem__, 0)


def test_files_that_are_no_pictures_are_counted(tmp_path, capfd):
    """How many files of a folder were left out, and of which suffix, is said.

    A class of nothing but .heic would vanish without a word."""
    for name in ("a/1.png", "a/2.png", "b/1.heic", "b/2.heic", "b/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (20, 20)).save(tmp_path / name, "PNG")
    assert sample.Pictures(str(tmp_path), 16).class_names == ["a"]
    assert "left out 2 .heic, 1 .txt" in capfd.readouterr().err
    refuses("2 .heic, 1 .txt", sample.Pictures, str(tmp_path / "b"), 16)


# ---- train_stage1.py: the loop and its options
def test_the_trainer_is_a_plain_loop(trained, tmp_path, monkeypatch):
    """Stage 1's losses are those of a loop without its helpers.

    Unfused AdamW, autograd through plain modules."""
    args = [
        "--data",
        trained / "data",
        "--out",
        tmp_path,
        *QUICK1[2:],
        "--encoder",
        trained / "out" / "encoder.pt",
    ]
    args += [
        "--token-lr",
        1,
        "--lr",
        1e-3,
        "--warmup",
        0,
        "--no-cache",
    ]
    monkeypatch.setattr(one, "CLIP_GRAD", 1e9)
    inside("train_stage1.py", *args)
    got, pictures = losses(tmp_path / "stage1.jsonl"), sample.Pictures(str(trained / "data"), 16)
    torch.manual_seed(0)
    t = tok.Tokenizer(tok.load_encoder(trained / "out" / "encoder.pt"))
    d = dec.Decoder(
        **one.SIZES["nano"]["decoder"], channels=3, size=16, token_dim=128, predict="data"
    )
    optimizer = torch.optim.AdamW(
        [t.embedding, *d.parameters()], betas=(0.9, 0.95), weight_decay=0.0
    )
    permutation = np.random.default_rng([0, 0]).permutation(40)
    for step in range(5):
        x, draw = (
            pixels_of(pictures, permutation[8 * step : 8 * step + 8].tolist()),
            one.generator(0, step, "cpu", 0),
        )
        time_ = torch.sigmoid(torch.randn(8, generator=draw) + one.SETTINGS["t_mean"][1])
        noise = torch.randn(8, 3, 16, 16, generator=draw)
        z, s = t(x), time_[:, None, None, None]
        loss = (d((1 - s) * noise + s * x, time_, z) - (x - noise)).square().mean()
        loss = loss + 0.1 * (1 - F.cosine_similarity(z, t.z0(x), dim=-1)).mean()
        assert abs(loss.item() - got[step + 1]) < 2e-4, step
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, 2 * (1 - step / 6))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_what_the_trainers_leave(trained):
    """Both stages leave a log of every step, a picture, and a checkpoint that loads its average.

    The average is of the embedding and the decoder; stage 2 knows the tokens' mean and
    deviation."""
    out = trained / "out"
    for stage in ("stage1", "stage2"):
        assert sorted(losses(out / f"{stage}.jsonl")) == [1, 2, 3, 4, 5, 6]
        assert Image.open(out / f"{stage}.png").size[0] >= 8 * 16
    model = RepTok.load(out / "stage2.pt")
    assert model.class_names == one.SHAPES
    z = model.encode(torch.rand(5, 3, 40, 30) * 2 - 1)
    assert z.shape == (5, 1, 128) and model.decode(z, steps=2).shape == (5, 3, 16, 16)
    z = (
        model.encode(pixels_of(sample.Pictures(str(trained / "data"), 16), range(40))) - model.mean
    ) / model.std
    assert z.mean((0, 1)).abs().max() < 0.1 and (z.std((0, 1)) - 1).abs().max() < 0.1
    content, model = (
        sample.load_checkpoint(out / "stage1.pt", ["stage1"]),
        RepTok.load(out / "stage1.pt"),
    )
    # The average is loaded.
    assert torch.equal(model.tokenizer.embedding, content["ema"]["tokenizer.embedding"])
    assert not torch.equal(
        content["tokenizer"]["state"]["embedding"], content["ema"]["tokenizer.embedding"]
    )
    names = {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}
    assert set(content["ema"]) == {"tokenizer.embedding", *names}


def test_the_picture_and_the_last_line_of_stage_1(trained, tmp_path, capsys):
    """Stage 1 ends with a picture, and with a line whose PSNR can be taken again from its model.

    Three rows: pictures, from z0, from z; with nothing trained the last two are the same, and the
    line says so. It also counts what was trained."""
    args = ["--data", trained / "data", *QUICK1[2:], "--encoder", trained / "out" / "encoder.pt"]
    args += ["--steps", 30, "--warmup", 0, "--token-lr", 100]
    vit = tok.load_encoder(trained / "out" / "encoder.pt")
    total = sum(p.numel() for p in vit.parameters())
    # All: but the two unread embeddings.
    for what, count in (("none", 0), ("token", 128), ("all", total - 256 + 128)):
        capsys.readouterr()
        inside("train_stage1.py", *args, "--unfreeze", what, "--out", tmp_path / what)
        line = capsys.readouterr().out.splitlines()[-1]
        rows = fid.decode(tmp_path / what / "stage1.png").reshape(3, 64, -1, 3).astype(int)
        assert np.array_equal(rows[1], rows[2]) == (what == "none")
        said = re.search(
            r"PSNR ([\d.]+) dB from z, ([\d.]+) dB from z0; cos\(z, z0\) ([\d.]+); "
            r"([\d,]+) of ([\d,]+)",
            line,
        )
        assert [int(said[i].replace(",", "")) for i in (4, 5)] == [count, total], line
        assert (
            (said[1] == said[2])
            == (said[3] == "1.000")
            == (what == "none")
            != ("--unfreeze none" in line)
        )
        assert line.endswith(f"--unfreeze none --out {tmp_path / what}-frozen") == (what != "none")
        assert "--encoder" not in line
        content = RepTok.load(tmp_path / what / "stage1.pt")
        pictures = sample.Pictures(str(trained / "data"), 16)
        # In the order of the run, which fixes their noise.
        x = one.to_show(pictures, argparse.Namespace(), 100)
        images = [content.decode(z, 20) for z in (content.encode(x), content.tokenizer.z0(x))]
        for images, figure in zip(images, (said[1], said[2])):
            assert (
                abs(fid.psnr(fid.to_uint8(x), fid.to_uint8(images)).mean() - float(figure)) < 0.01
            )
    # An encoder that the run trained itself is not to be trained again for the comparison.
    args = argparse.Namespace(encoder=None, init=None, out="mine")
    z = torch.ones(2, 1, 128)
    line = one.lesson(args, content.tokenizer, pictures, x, x, x, z, z)
    assert line.endswith(" with --encoder mine/encoder.pt --unfreeze none --out mine-frozen")


def test_what_a_run_says(tmp_path, monkeypatch, capsys):
    """A run says first what it will do, with its settings, and after 50 steps how much time is
    left."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for size in ("XL", "nano"):
        args = argparse.Namespace(size=size, steps=None, batch=512, accumulate=2, lam=7.0)
        one.complete(args, one.SETTINGS)
        ranks, trained = sample.Ranks("cpu", "float32"), {"a": torch.ones(70, 30)}
        path = tmp_path / "stage1.pt"
        log = one.Log(path, args, one.SETTINGS, ranks, 0, range(100), [*"abc"], trained)
        for step in range(1, 101):
            now[0] += 40.0
            if step % 20 == 0:
                log.write(step, ("loss",), torch.ones(1), torch.ones(()), 1.0)
        said = capsys.readouterr()
        assert f"size {size}, 100 pictures, 3 classes; 2,100 trained" in said.out
        assert f"pixels {args.pixels}, steps {args.steps}, batch 512, lr {args.lr}," in said.out
        assert "lam 7.0" in said.out
        left = (args.steps - 60) * 40 // 3600
        assert said.err.count("--steps or --size") == 1 and f"12.8 images/s: {left}:" in said.err


def test_fine_tuning_from_a_checkpoint(trained, tmp_path):
    """A run with --init starts at the other run's averages, and trains embedding and decoder.

    With a learning rate of 0 these stay; the ViT is not trained either way."""
    start = trained / "out" / "stage2.pt"
    inside(
        "train_stage1.py",
        "--init",
        start,
        "--data",
        trained / "data",
        "--out",
        tmp_path,
        *QUICK1[2:],
    )
    was, now = (
        RepTok.load(start).state_dict(),
        sample.load_checkpoint(tmp_path / "stage1.pt", ["stage1"]),
    )
    rest = ["--init", start, "--data", trained / "data", "--out", tmp_path / "rest", *QUICK1[2:]]
    inside("train_stage1.py", *rest, "--lr", 0, "--steps", 1)
    state = sample.load_checkpoint(tmp_path / "rest" / "stage1.pt", ["stage1"])["decoder"]["state"]
    assert all(torch.equal(was[f"decoder.{name}"], state[name]) for name in state)
    for name, value in now["tokenizer"]["state"].items():
        if name.startswith("vit."):
            assert torch.equal(was[f"tokenizer.{name}"], value), name
    for network, name in (("tokenizer", "embedding"), ("decoder", "merge.weight")):
        assert 0 < (was[f"{network}.{name}"] - now[network]["state"][name]).abs().max() < 0.1


def test_pictures_without_classes_and_a_token_that_rests(trained, tmp_path):
    """A flat folder trains and samples without classes; --token-lr 0 leaves the embedding alone.

    --token-lr scales the embedding's learning rate alone: the decoder moves."""
    data, out, encoder = (
        ["--data", trained / "data" / "heart"],
        ["--out", tmp_path],
        trained / "out" / "encoder.pt",
    )
    inside(
        "train_stage1.py",
        *data,
        *out,
        *QUICK1[2:],
        "--batch",
        2,
        "--encoder",
        encoder,
        "--token-lr",
        0,
    )
    content = sample.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])
    assert torch.equal(
        content["tokenizer"]["state"]["embedding"], tok.load_encoder(encoder).cls_token
    )
    assert content["decoder"]["state"]["patch_out.weight"].abs().max() > 0
    inside("train_stage2.py", *out, *QUICK2, "--batch", 2)
    assert RepTok.load(tmp_path / "stage2.pt").mixer.label is None
    inside(
        "sample.py",
        "--ckpt",
        tmp_path / "stage2.pt",
        "--per-class",
        3,
        "--steps",
        2,
        "--out",
        tmp_path / "s.png",
    )
    assert Image.open(tmp_path / "s.png").size == (3 * 64, 64)


def test_size_is_that_of_the_checkpoint():
    """Without --size, the decoder's width in the checkpoint gives the size and its defaults.

    Values that are given stay; a width that no size has is refused."""
    for size, steps in (("nano", 2200), ("S", 1_000_000), ("XL", 1_000_000)):
        with torch.device("meta"):
            model = RepTok(
                None, dec.Decoder(**{**one.SIZES[size]["decoder"], "depth": 0}), dec.PixelSpace()
            )
        args = argparse.Namespace(size=None, steps=None, lr=7.0)
        one.complete(args, one.SETTINGS, model)
        assert (args.size, args.steps, args.lr) == (size, steps, 7.0)
    model.decoder.config["width"] = 64
    refuses("--size", one.complete, argparse.Namespace(size=None), one.SETTINGS, model)


# ---- train_stage1.py: the cache
def test_cache_is_what_the_networks_give(trained, tmp_path):
    """The cache holds the posteriors and z0 that the networks give, also of mirrored pictures.

    A run on it equals one without, but for float16. Other tokens have files of their own."""
    encoder, file = trained / "out" / "encoder.pt", tmp_path / "vae.safetensors"
    torch.manual_seed(1)
    file.write_bytes(safetensors(dec.VAE((32, 32, 32, 32)).state_dict()))
    args = [
        "--data",
        trained / "data",
        *QUICK1[2:],
        "--vae",
        file,
        "--pixels",
        64,
        "--flip",
        "--encoder",
        encoder,
    ]
    for out, more in (("with", "--cache"), ("without", "--no-cache")):
        inside("train_stage1.py", "--out", tmp_path / out, *args, more)
    a, b = (losses(tmp_path / out / "stage1.jsonl") for out in ("with", "without"))
    assert all(abs(a[step] - b[step]) < 5e-3 * b[step] for step in range(1, 7)) and a != b
    kept = {
        name: np.load(next((tmp_path / "with").glob(f"cache-*-{name}.npy")))
        for name in ("mean", "logvar", "z0")
    }
    pictures, vae, vit = (
        sample.Pictures(str(trained / "data"), 64),
        dec.load_vae(file),
        tok.load_encoder(encoder),
    )
    assert all(len(rows) == len(pictures) for rows in kept.values())
    x = pixels_of(pictures, [7])
    for view, image in enumerate((x, x.flip(-1))):
        values = (*vae.posterior(image), tok.Tokenizer(vit).z0(image))
        for rows, value in zip(kept.values(), values):
            error = np.abs(rows[7, view] - value[0].detach().numpy()).max()
            assert error < 1e-3 * value.abs().max()
    args = argparse.Namespace(out=tmp_path, flip=True, dtype="float32", fresh=False)
    vit = tiny_vit()
    for token in ("cls", "reg"):  # one folder, other tokens
        model = argparse.Namespace(tokenizer=tok.Tokenizer(vit, token), vae=vae)
        data = one.cached(pictures, model, args, sample.Ranks("cpu", "float32"), 0)
        _, number, *_, z0 = data[7]
        assert number == 7 and torch.allclose(z0[:1].float(), model.tokenizer.z0(x), atol=5e-3)


def test_fresh_reads_pictures_again(trained, tmp_path, capsys):
    """After --fresh, cache and tokens are those of pictures that were replaced under their names.

    Without it, other pictures are refused, by the sizes of their files, and all stays as it is."""
    data = shutil.copytree(trained / "data" / "heart", tmp_path / "data")
    args = ["--data", data, "--out", tmp_path, "--encoder", trained / "out" / "encoder.pt"]
    args += [*QUICK1[2:], "--batch", 2, "--steps", 1]
    inside("train_stage1.py", *args)
    kept = [*tmp_path.glob("*.npy")]
    before = {path: np.load(path) for path in kept}
    for path in data.glob("*.png"):
        Image.new("RGB", (16, 16), "orange").save(path)
    said = refusal("train_stage1.py", args, capsys)
    assert "the pictures" in said and "--fresh" in said
    assert len(kept) == 5 and all(np.array_equal(np.load(path), before[path]) for path in kept)
    inside("train_stage1.py", *args, "--fresh")
    again = {*tmp_path.glob("*.npy")} - {*kept}
    assert len(again) == 4
    for path in (*again, tmp_path / "tokens.npy"):
        if "read" not in path.name:  # all pictures are the same now
            assert np.abs(np.load(path) - np.load(path)[:1]).max() < 1e-2, path
    # Copied elsewhere, they are the same pictures.
    copy = shutil.copytree(data, tmp_path / "copy")
    a, b = (sample.Pictures(str(folder), 16).fingerprint for folder in (data, copy))
    assert a == b


def test_a_picture_that_was_damaged_when_the_cache_was_made():
    """A picture that can be read again has no row of its own: its neighbour stays in its place."""
    pictures = [("picture 0", 0), ("picture 1", 1)]
    rows = np.array([[1.0], [1.0]])  # of picture 1, both
    data = one.Cached(pictures, [rows], np.array([1, 1]))
    assert data[0][:2] == ["picture 1", 1] and data[1][:2] == ["picture 1", 1]


def test_a_pass_over_all_pictures_is_complete_or_absent(trained, tmp_path):
    """The files of a pass over all pictures are complete or absent.

    One that was stopped begins again; values beyond float16 are refused; the second view is that of
    the mirrored picture."""
    pictures, ranks = sample.Pictures(str(trained / "data"), 16), sample.Ranks("cpu", "float32")
    paths = [tmp_path / "left.npy", tmp_path / "all.npy"]

    def left_and_all(x):
        return [x[..., :8].mean((2, 3)), x.mean((1, 2, 3))[:, None]]

    def stopped(x):
        if len(x) > 1:
            raise KeyboardInterrupt
        return left_and_all(x)

    with pytest.raises(KeyboardInterrupt):
        sample.compute_once(paths, stopped, pictures, ranks, flip=True)
    assert not any(path.exists() for path in paths)
    refuses("float16", sample.compute_once, paths, lambda x: [x * 1e6, x], pictures, ranks)
    assert not any(path.exists() for path in paths)
    read = sample.compute_once(paths, left_and_all, pictures, ranks, flip=True)
    left, mean = (torch.from_numpy(np.load(path)).float() for path in paths)
    x = pixels_of(pictures, range(40))
    assert read.tolist() == list(range(40)) and left.shape == (40, 2, 3) and mean.dtype
    assert torch.allclose(left[:, 0], x[..., :8].mean((2, 3)), atol=1e-3)
    assert torch.allclose(left[:, 1], x[..., 8:].mean((2, 3)), atol=1e-3)
    assert torch.allclose(mean[:, 0, 0], x.mean((1, 2, 3)), atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.npy", "left.npy"]


# ---- train_stage1.py: never lose a run
def stop_at(process, log, step, which):
    """Send a signal to a run once `log` shows `step`; SIGKILL to all of its processes, others twice
    to the first."""
    for _ in range(10_000):
        if process.poll() is not None or log.exists() and log.read_text().count("\n") >= step:
            break
        time.sleep(0.02)
    if which == signal.SIGKILL:  # torchrun's workers are in groups of their own
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if str(log.parent).encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), which)
    else:
        process.send_signal(which)
        process.send_signal(which)
    return process.communicate(timeout=120)


def short(trained, script, out):
    """Options of a run of 18 steps that saves every six."""
    if script == "train_stage1.py":
        start = ["--data", trained / "data", "--encoder", trained / "out" / "encoder.pt"]
    else:
        start = ["--stage1", trained / "out" / "stage1.pt", "--tokens", trained / "out"]
    return [*start, "--out", out, *QUICK2, "--steps", 18, "--save-every", 6]


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """A function: (script, processes) -> losses of a run that is never stopped, made once.

    Its `.begin` starts the run, to go on beside another."""

    @functools.cache
    def begin(script, world):
        out = tmp_path_factory.mktemp("whole")
        return out, launch(script, *short(trained, script, out), world=world)

    @functools.cache
    def run(script, world):
        out, process = begin(script, world)
        finished(process)
        return losses(out / f"{script[6:12]}.jsonl")

    run.begin = begin
    return run


def test_continuing_extending_and_refusing(trained, tmp_path, capsys):
    """A finished run says so, goes on with more --steps, and refuses other options.

    A refusal leaves the checkpoint as it was."""
    out, args = tmp_path / "out", ["--data", trained / "data", "--out", tmp_path / "out", *QUICK1]
    shutil.copytree(trained / "out", out)
    before = (out / "stage1.pt").read_bytes()
    inside("train_stage1.py", *args)
    assert "finished" in capsys.readouterr().out
    for options, says in (
        ([*args, "--batch", 4], "--batch"),
        ([*args, "--lam", 0.5], "--lam"),
        (args[2:], "the pictures, or their tokens"),
    ):
        assert says in refusal("train_stage1.py", options, capsys)
    assert (out / "stage1.pt").read_bytes() == before
    inside("train_stage1.py", *args, "--steps", 8)
    assert sorted(losses(out / "stage1.jsonl")) == list(range(1, 9))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py"])
def test_killed_and_continued_equals_never_stopped(trained, whole, tmp_path, script, world):
    """A run that was killed and continued has bit for bit the losses of one never stopped.

    SIGKILL in the middle of a run, at whatever step it is, then the same command."""
    stage, args = script[6:12], short(trained, script, tmp_path)
    whole.begin(script, world)
    stop_at(launch(script, *args, world=world), tmp_path / f"{stage}.jsonl", 8, signal.SIGKILL)
    path = tmp_path / f"{stage}.pt"
    assert not path.exists() or sample.load_checkpoint(path, [stage])["step"] < 18
    finished(launch(script, *args, world=world))
    killed = losses(tmp_path / f"{stage}.jsonl")
    assert killed == whole(script, world) and len(killed) == 18


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_finishes_the_step_and_saves(trained, tmp_path, world):
    """On SIGTERM a run finishes its step, saves it, says how to go on, and ends with 130.

    The log ends with the step of the checkpoint."""
    args = [
        "--data",
        trained / "data",
        "--out",
        tmp_path,
        "--steps",
        100_000,
        "--batch",
        8,
        "--log-every",
        1,
        "--encoder",
        trained / "out" / "encoder.pt",
    ]
    process = launch("train_stage1.py", *args, world=world)
    output, error = stop_at(process, tmp_path / "stage1.jsonl", 3, signal.SIGTERM)
    assert output.count("run the same command") == 1, (output, error)
    assert world == 2 or process.returncode == 130, (output, error)
    step = sample.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])["step"]
    assert step >= 3 and max(losses(tmp_path / "stage1.jsonl")) == step


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """On a full disk the old checkpoint stays as it was, and nothing is left beside it."""

    def full(content, file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    path = tmp_path / "stage1.pt"
    sample.save_checkpoint(path, {"kind": "stage1", "step": 1})
    monkeypatch.setattr(torch, "save", full)
    refuses(
        "stage1.pt cannot be written .*No space left.*make room",
        sample.save_checkpoint,
        path,
        {"step": 2},
    )
    assert sample.load_checkpoint(path, ["stage1"])["step"] == 1 and list(tmp_path.iterdir()) == [
        path
    ]


@pytest.mark.parametrize("every", [1, 4])
def test_a_run_that_diverges_stops_and_keeps_its_checkpoint(trained, tmp_path, capsys, every):
    """A run that diverges stops and says where; a checkpoint that it leaves is finite."""
    args = [
        "--data",
        trained / "data",
        "--out",
        tmp_path,
        "--batch",
        8,
        "--save-every",
        every,
        "--device",
        "cpu",
        "--encoder",
        trained / "out" / "encoder.pt",
        "--lr",
        1e25,
        "--warmup",
        0,
        "--steps",
        9,
    ]
    assert "not finite at step" in refusal("train_stage1.py", args, capsys)
    # With every fourth step saved, the run may diverge before the first checkpoint.
    assert (tmp_path / "stage1.pt").exists() or every == 4
    if (tmp_path / "stage1.pt").exists():
        state = sample.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])["decoder"]["state"]
        assert all(
            tensor.isfinite().all() for tensor in state.values() if isinstance(tensor, torch.Tensor)
        )


@pytest.mark.parametrize(
    "which, world", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_to_all_processes_saves_the_run(trained, tmp_path, which, world):
    """A signal to every process of a run, its loader's workers too, ends it with a checkpoint.

    So do torchrun, `timeout` and Ctrl-C on a terminal. Alone, it ends with status 130, by which
    `a && b` stops."""
    args = ["--data", trained / "data", "--encoder", trained / "out" / "encoder.pt"]
    args += ["--out", tmp_path, "--steps", 100_000, "--batch", 8, "--log-every", 1, "--workers", 2]
    process = launch("train_stage1.py", *args, "--no-cache", world=world)
    log = tmp_path / "stage1.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.02)
    count = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(tmp_path).encode() in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), which)
                count += 1
    output = process.communicate(timeout=120)
    assert count >= 3 * world, output
    assert world == 2 or process.returncode == 130, output
    step = sample.load_checkpoint(tmp_path / "stage1.pt", ["stage1"])["step"]
    assert step >= 3 and max(losses(log)) == step, output


def test_two_runs_in_one_folder_are_refused(trained, tmp_path):
    """A second run in the same --out is refused, and the first goes on."""
    args = ["--data", trained / "data", "--encoder", trained / "out" / "encoder.pt"]
    args += ["--out", tmp_path, "--steps", 100_000, "--batch", 8, "--log-every", 1]
    process = launch("train_stage1.py", *args)
    log = tmp_path / "stage1.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.02)
    second = launch("train_stage1.py", *args)
    output, error = second.communicate(timeout=60)
    assert second.returncode == 2 and "another run writes into it" in error
    before = max(losses(log))
    stop_at(process, log, before + 3, signal.SIGTERM)
    assert max(losses(log)) >= before + 3


def test_lr_and_dtype_may_change_and_a_line_says_so(trained, tmp_path, capsys):
    """A run goes on with another --lr or --dtype, as after a loss that is not finite."""
    out = shutil.copytree(trained / "out", tmp_path / "out")
    args = ["--data", trained / "data", "--out", out, *QUICK1, "--steps", 8, "--warmup", 0]
    assert "--warmup is 0 but was 50" in refusal("train_stage1.py", args, capsys)
    inside("train_stage1.py", *args[:-2], "--lr", 1e-4, "--dtype", "bfloat16")
    said = capsys.readouterr().err
    assert "--lr is 0.0001 from step 6 on; it was 0.005" in said
    assert "--dtype is bfloat16 from step 6 on; it was float32" in said
    rows = [json.loads(line) for line in (out / "stage1.jsonl").read_text().splitlines()]
    assert rows[5]["lr"] > 20 * rows[6]["lr"] > 0 and len(rows) == 8
    settings = sample.load_checkpoint(out / "stage1.pt", ["stage1"])["settings"]
    assert settings["dtype"] == "bfloat16"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_run_goes_on_when_nobody_reads_its_output(trained, tmp_path, closed):
    """A run whose output is piped into a program that has ended, as `| head`, ends well."""
    args = ["--data", trained / "data", "--out", tmp_path, *QUICK1[2:]]
    args += ["--encoder", trained / "out" / "encoder.pt"]
    process = launch("train_stage1.py", *args)
    getattr(process, closed).close()
    setattr(process, closed, None)
    output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert (tmp_path / "tokens.pt").exists() and "Traceback" not in f"{output}"


def test_a_terminal_without_some_letters_or_none_at_all():
    """What a terminal's encoding lacks is printed as a code; without a terminal nothing is."""
    bytes = io.BytesIO()
    terminal = sample.Output(io.TextIOWrapper(bytes, "ascii"))
    terminal.write("a кошка\udcff")
    terminal.flush()
    assert bytes.getvalue() == rb"a \u043a\u043e\u0448\u043a\u0430\udcff"
    sample.Output(None).write("goes nowhere")


def test_sigterm_before_the_first_step(trained, tmp_path):
    """A signal while the encoder is trained ends the run in one line and status 130."""
    args = ["--data", trained / "data", "--out", tmp_path, "--pretrain-steps", 100_000]
    process = launch("train_stage1.py", *args)
    while process.poll() is None and not (tmp_path / "stage1.png").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and error.endswith("interrupted\n"), error


# ---- train_stage1.py and train_stage2.py: ranks
@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py"])
def test_two_ranks_equal_one_process(trained, whole, tmp_path, script):
    """Two ranks, and one process with accumulation, have the losses of one process.

    torchrun with two gloo processes; ten steps are compared."""
    shutil.copytree(trained / "out", tmp_path / "out")
    inside(script, *short(trained, script, tmp_path / "out"), "--accumulate", 2, "--fresh")
    want, pieces = whole(script, 1), losses(tmp_path / "out" / f"{script[6:12]}.jsonl")
    for got in (whole(script, 2), pieces):
        assert (
            max(abs(got[step] - want[step]) for step in range(1, 11))
            < 1e-5
            < abs(want[10] - want[1])
        )


# ---- train_stage2.py: tokens
def test_stage_2_opens_no_picture(trained, tmp_path, capsys):
    """Stage 2 trains where the pictures are gone, and refuses tokens of another tokenizer."""
    shutil.copytree(trained / "data", tmp_path / "data")
    first = ["train_stage1.py", "--data", tmp_path / "data", "--out", tmp_path, *QUICK1]
    inside(*first, "--steps", 1, "--lam", 0.2)
    shutil.rmtree(tmp_path / "data")
    inside("train_stage2.py", "--out", tmp_path, *QUICK2, "--steps", 1)
    other = ["--tokens", trained / "out", "--stage1", tmp_path / "stage1.pt", "--out", tmp_path]
    assert "another tokenizer" in refusal("train_stage2.py", [*other, *QUICK2], capsys)
    longer = shutil.copytree(trained / "out", tmp_path / "longer")
    inside("train_stage1.py", "--data", trained / "data", "--out", longer, *QUICK1, "--steps", 7)
    said = refusal("train_stage2.py", ["--out", longer, *QUICK2, "--steps", 7], capsys)
    assert "stage2.pt: the pictures, or their tokens, are not those" in said and "--fresh" in said
    # Tokens of other pictures, more of them or as many, beside this tokens.pt.
    array = np.load(tmp_path / "tokens.npy")
    for wrong in (array[:30], np.concatenate([array, array]), array[::-1], array[..., :5]):
        np.save(tmp_path / "tokens.npy", wrong)
        said = refusal("train_stage2.py", ["--out", tmp_path, *QUICK2], capsys)
        assert "other tokens than those" in said
    # A file from before "first" was in it.
    about = torch.load(tmp_path / "tokens.pt", weights_only=True)
    older = {key: value for key, value in about.items() if key != "first"}
    torch.save(older, tmp_path / "tokens.pt")
    said = refusal("train_stage2.py", ["--out", tmp_path, *QUICK2], capsys)
    assert "older version" in said and "--encode" in said
    torch.save(about, tmp_path / "tokens.pt")
    # An --encode that fails leaves tokens as they were.
    before = (tmp_path / "tokens.npy").read_bytes(), (tmp_path / "tokens.pt").read_bytes()
    for name in ("a.png", "b.png"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).write_text("no picture")
    bad = ["--ckpt", tmp_path / "stage1.pt", "--encode", tmp_path / "bad", "--save", tmp_path]
    with pytest.raises(SystemExit):
        inside("sample.py", *bad)
    assert "not one of its 2 pictures" in capsys.readouterr().err
    after = (tmp_path / "tokens.npy").read_bytes(), (tmp_path / "tokens.pt").read_bytes()
    assert after == before
    (tmp_path / "tokens.pt").unlink()
    assert "--encode PICTURES" in refusal("train_stage2.py", ["--out", tmp_path, *QUICK2], capsys)


def test_tokens_are_those_of_the_trained_tokenizer(trained, tmp_path):
    """Stage 1 ends with the tokens of its averaged tokenizer, and makes them again where they are
    gone; sample.py --encode gives the same."""
    tokens, about = np.load(trained / "out" / "tokens.npy"), torch.load(
        trained / "out" / "tokens.pt", weights_only=True
    )
    pictures = sample.Pictures(str(trained / "data"), 16)
    model = RepTok.load(trained / "out" / "stage1.pt")
    z = model.encode(pixels_of(pictures, range(40)))
    near(torch.from_numpy(tokens[:, 0]).float(), z, 5e-3)
    assert tokens.dtype == np.float16 and about["class_names"] == one.SHAPES
    assert about["names"] == pictures.names and torch.equal(about["labels"], pictures.labels)
    near(about["mean"], z.mean(0, keepdim=True), 1e-3)
    near(about["std"], z.std(0, keepdim=True), 1e-3)

    ckpt = ["--ckpt", trained / "out" / "stage1.pt", "--encode", trained / "data"]
    inside("sample.py", *ckpt, "--save", tmp_path / "once", "--device", "cpu")
    inside("sample.py", *ckpt, "--save", tmp_path / "twice", "--flip", "--device", "cpu")
    assert np.array_equal(np.load(tmp_path / "once" / "tokens.npy"), tokens)
    mirrored = np.load(tmp_path / "twice" / "tokens.npy")
    assert np.array_equal(mirrored[:, :1], tokens) and mirrored.shape[1] == 2
    want = model.encode(pixels_of(pictures, [3]).flip(-1))
    near(torch.from_numpy(mirrored[3:4, 1]).float(), want, 5e-3)

    shutil.copytree(trained / "out", tmp_path / "out")
    (tmp_path / "out" / "tokens.pt").unlink()
    inside("train_stage1.py", "--data", trained / "data", "--out", tmp_path / "out", *QUICK1)
    assert np.array_equal(np.load(tmp_path / "out" / "tokens.npy"), tokens)


def test_every_size_has_a_mixer_wider_than_a_token():
    """Mixers of all sizes are wider than DINOv2's tokens; nano's is widened."""
    for size in one.SIZES:
        args = argparse.Namespace(size=size, channel_expansion=4)
        with torch.device("meta"):
            mixer = two.new_mixer(args, 1, 768, 10)
        assert mixer.proj_out.weight.shape[1] > 768, size
        assert mixer.layers[0].channels.up.weight.shape[0] == 4 * mixer.config["hidden"]


# ---- train_stage2.py: captions
def write_pairs(folder, count=12):
    """Write captioned shapes as folder of pairs and as two .tar shards."""
    plans = [one.plan_shape(i, 3) for i in range(count)]
    for part in ("pairs", "shards"):
        (folder / part).mkdir()
    for i, plan in enumerate(plans):
        Image.fromarray(one.draw_shape(plan, 16)).save(folder / "pairs" / f"{i:02d}.png")
        (folder / "pairs" / f"{i:02d}.txt").write_text("\n".join(plan.captions[:2]))
    for shard in range(2):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for path in sorted((folder / "pairs").glob("*"))[shard * count : (shard + 1) * count]:
                tar.add(path, path.name)
    return plans


def texts_of(source, captions=True):
    """The texts of the pictures of a folder or .tar, as stage 2 finds them."""
    pictures = sample.Pictures(str(source), 16)
    about = {"names": pictures.names, "source": pictures.source}
    return two.Texts(about, captions, sample.Ranks("cpu"))


def test_captioned_sources_agree(tmp_path):
    """A folder of pairs and .tar shards give the same pictures and captions.

    Two ranks see every picture of an epoch once. Blank lines and a byte-order mark are passed over.
    A caption that is empty or not there is refused."""
    plans = write_pairs(tmp_path)
    for name in ("pairs", "shards"):
        pictures, texts = sample.Pictures(str(tmp_path / name), 16), texts_of(tmp_path / name)
        assert len(texts) == len(pictures) == 12 and not pictures.class_names
        for i, plan in enumerate(plans):
            assert texts.captions(i) == plan.captions[:2]
            drawn = torch.from_numpy(one.draw_shape(plan, 16)).permute(2, 0, 1)
            assert torch.equal(pictures[i][0], drawn)
    drawn = two.Texts({"names": one.Shapes(16, 3).names, "source": None}, True, None)
    assert all(drawn.captions(i) == plan.captions for i, plan in enumerate(plans))

    plan = argparse.Namespace(batch=4, steps=3, seed=0)
    seen = [
        list(one.picture_order(12, plan, argparse.Namespace(rank=rank, world=2))) for rank in (0, 1)
    ]
    # Two ranks, one epoch: every picture once.
    assert sorted(sum(sum(seen, []), [])) == list(range(12))

    other = shutil.copytree(tmp_path / "pairs", tmp_path / "other")
    (other / "03.txt").write_bytes("\ufeffa\u2028red 7\n\n  \nb\n".encode())
    texts = texts_of(tmp_path / "pairs", str(other))
    assert texts.captions(3) == ["a\u2028red 7", "b"] and texts.captions(4) == plans[4].captions[:2]
    (other / "03.txt").write_text(" ")
    refuses("03.png.*empty", texts.captions, 3)
    (other / "03.txt").unlink()
    # Known from the names at the start.
    refuses("03.png", texts_of, other)


# ---- train_stage2.py: text, from training to samples
def test_text_to_image_commands(trained, tmp_path, capsys):
    """Stage 2 trains on words or on features made beforehand, and sample.py draws from both.

    Accumulation and the loader's processes leave the losses as they are, and what a mask leaves out
    changes nothing. What does not fit is refused."""
    write_pairs(tmp_path)
    stage1 = trained / "out" / "stage1.pt"

    def start(source, *more):
        """Encode captioned pictures, and the options of a run on them."""
        folder = tmp_path / f"{source.name}-tokens"
        if not folder.exists():
            inside("sample.py", "--ckpt", stage1, "--encode", source, "--save", folder)
        return ["--captions", "--stage1", stage1, "--tokens", folder, *QUICK2, *more]

    for out, more in (("words", []), ("again", ["--accumulate", 2])):
        inside("train_stage2.py", *start(tmp_path / "shards"), "--out", tmp_path / out, *more)
    assert f"next: python sample.py --ckpt {tmp_path / 'again' / 'stage2.pt'} --prompt WORDS" in (
        capsys.readouterr().out
    )
    want, got = (losses(tmp_path / out / "stage2.jsonl") for out in ("words", "again"))
    assert len(want) == 6 and all(abs(got[step] - want[step]) < 1e-5 for step in want)
    ckpt, pairs = tmp_path / "words" / "stage2.pt", tmp_path / "pairs"
    (tmp_path / "prompts.txt").write_text("a red heart\n\non black, a grey star\n")
    for prompts in (
        ["--prompts", tmp_path / "prompts.txt"],
        ["--prompt", "a red heart", "--prompt", "on black, a grey elephant"],
    ):
        inside(
            "sample.py",
            "--ckpt",
            ckpt,
            *prompts,
            "--per-class",
            2,
            "--steps",
            2,
            "--out",
            tmp_path / "p.png",
        )
        assert Image.open(tmp_path / "p.png").size == (2 * 64, 2 * 64)
    assert "not in the captions of training: ['elephant']" in capsys.readouterr().out
    for args, says in (
        ("", "--prompt"),
        ("--prompts gone.txt", "--prompts"),
        ("--prompt x --classes star", "--classes"),
    ):
        assert says in refusal("sample.py", ["--ckpt", ckpt, *args.split()], capsys)
    for i in range(12):
        features = np.random.randn(3 + i % 2, 6).astype(np.float16)
        np.savez(pairs / f"{i:02d}.npz", features=features, mask=np.ones(len(features), bool))
    with tarfile.open(tmp_path / "with.tar", "w") as tar:
        for path in sorted(pairs.glob("*")):
            tar.add(path, path.name)
    # Features come through the loader, in the order of the loop.
    for out, workers in (("read", 2), ("made", 0)):
        more = ["--out", tmp_path / out, "--workers", workers]
        inside("train_stage2.py", *start(tmp_path / "with.tar"), *more)
    assert losses(tmp_path / "read" / "stage2.jsonl") == losses(tmp_path / "made" / "stage2.jsonl")
    made = ["--ckpt", tmp_path / "made" / "stage2.pt", "--steps", 2]
    np.savez(tmp_path / "padded.npz", features=np.ones((5, 6)), mask=np.arange(5) < 2)
    np.savez(tmp_path / "cut.npz", features=np.ones((2, 6)))
    for file in ("padded", "cut"):  # what the mask leaves out changes nothing
        files = [tmp_path / f"{file}.npz", pairs / "00.npz"]
        inside("sample.py", *made, "--features", *files, "--out", tmp_path / f"{file}.png")
    assert np.array_equal(*(fid.decode(tmp_path / f"{file}.png") for file in ("padded", "cut")))
    assert "no text encoder" in refusal("sample.py", [*made, "--prompt", "x"], capsys)
    np.savez(pairs / "05.npz", features=np.zeros((3, 7), np.float16))
    assert "(L,6)" in refusal("sample.py", [*made, "--features", pairs / "05.npz"], capsys)
    more = start(pairs, "--workers", 1)
    assert "width" in refusal("train_stage2.py", ["--out", tmp_path / "wide", *more], capsys)
    np.savez(pairs / "05.npz", features=np.full((3, 6), 1e5))
    assert "05.png (ValueError: NaN, or" in refusal(
        "train_stage2.py", ["--out", tmp_path / "huge", *more], capsys
    )


def test_clip_text_end_to_end(trained, small_clip, tmp_path, capsys):
    """Captions read by CLIP train stage 2, and the CLIP score is that which is taken by hand.

    Training, going on with weight files that have moved, prompts, one of them too long, and the
    score."""
    write_pairs(tmp_path)
    clip, out = ["--clip", small_clip[0], "--bpe", small_clip[1]], tmp_path / "out"
    stage1 = trained / "out" / "stage1.pt"
    inside("sample.py", "--ckpt", stage1, "--encode", tmp_path / "pairs", "--save", tmp_path / "z")
    train = [
        "train_stage2.py",
        "--captions",
        "--tokens",
        tmp_path / "z",
        *clip,
        "--out",
        out,
        *QUICK2,
        "--stage1",
        stage1,
    ]
    inside(*train)
    # A weight file may move between two runs.
    moved = shutil.copytree(small_clip[0].parent, tmp_path / "moved")
    inside(*train, "--steps", 7, "--clip", moved / "clip.bin", "--bpe", moved / "vocab.gz")
    draw = ["sample.py", "--ckpt", out / "stage2.pt", "--steps", 2, "--device", "cpu"]
    inside(
        *draw,
        "--prompt",
        "the cat",
        "--prompt",
        "a " * 100,
        "--per-class",
        2,
        "--out",
        tmp_path / "p.png",
    )
    assert "too long" in capsys.readouterr().out and Image.open(tmp_path / "p.png").size == (
        2 * 64,
        2 * 64,
    )
    captions = [one.plan_shape(i, 3).captions[0] for i in range(12)]
    (tmp_path / "t.txt").write_text("\ufeff" + "\n".join(captions), encoding="utf-8")
    inside(*draw, "--prompts", tmp_path / "t.txt", "--num", 12, *clip, "--save", tmp_path)
    score = float(re.search(r"CLIP score ([\d.-]+)", capsys.readouterr().out)[1])
    tensors, words, cosines = (
        torch.load(small_clip[0], weights_only=True),
        tok.BPE(small_clip[1]),
        [],
    )
    vit, tower = tok.load_encoder(small_clip[0]), tok.load_text_encoder(small_clip[0])
    for i in range(12):
        x = (
            torch.from_numpy(fid.decode(tmp_path / "generated" / f"{i:06d}.png")).permute(2, 0, 1)[
                None
            ]
            / 127.5
            - 1
        )
        x = F.interpolate(x, (64, 64), mode="bicubic", antialias=True)
        image = vit(normalised(x, tok.CLIP))[0, 0] @ tensors["visual_projection.weight"].T
        text = (
            tower(words([captions[i]]))[0][len(words.encode(captions[i])) - 1]
            @ tensors["text_projection.weight"].T
        )
        cosines.append(F.cosine_similarity(image, text, dim=0).item())
    assert abs(score - 100 * np.mean(cosines)) < 0.01


# ---- sample.py: RepTok and its checkpoints
def test_samples_do_not_depend_on_the_batch(trained):
    """A sample does not depend on the other samples of its batch.

    Its noise is that of its number, and the Mixer's is not the decoder's."""
    model, classes = RepTok.load(trained / "out" / "stage2.pt"), torch.arange(10)
    z = model.generate(classes, steps=3, cfg=1.5)
    assert torch.allclose(z[:3], model.generate(classes[:3], steps=3, cfg=1.5), atol=1e-5)
    assert torch.allclose(model.decode(z, steps=3)[:3], model.decode(z[:3], steps=3), atol=1e-5)
    own = model.noise(range(10), mixer=True)
    assert torch.equal(model.generate(classes, steps=3, noise=own), z)
    # Not the decoder's numbers.
    assert (own[:, 0] - model.noise(range(10)).flatten(1)[:, :128]).abs().mean() > 0.5
    refuses("classes", model.generate)


def test_images_outside_their_range_are_refused(trained):
    """encode refuses images that are not in [-1,1], and warns where none is below 0."""
    model = RepTok.load(trained / "out" / "stage1.pt")
    x = pixels_of(sample.Pictures(str(trained / "data"), 16), range(4))
    model.encode(x)
    for bad in (127.5 * (x + 1), 2 * x):
        with pytest.raises(ValueError, match="must lie in"):
            model.encode(bad)
    with pytest.warns(UserWarning, match="below 0"):
        model.encode((x + 1) / 2)


def test_classes_whose_names_are_numbers():
    """Where classes are called by numbers, --classes takes names and nothing else."""
    mixer = argparse.Namespace(num_classes=3)
    model = argparse.Namespace(mixer=mixer, class_names=["1", "10", "2"])
    assert sample.class_numbers(model, ["2", "1"], 10) == [2, 0]
    refuses("--classes 0", sample.class_numbers, model, ["0"], 10)
    model.class_names = ["cat", "dog", "owl"]
    assert sample.class_numbers(model, ["2", "cat"], 10) == [2, 0]
    model.class_names = []
    assert sample.class_numbers(model, ["2", "0"], 10) == [2, 0]


def test_checkpoints_with_time_the_other_way_are_refused():
    """A checkpoint without t_max among the decoder's settings is refused.

    Decoders were trained on 1-t before their settings had t_max; their weights would load without a
    word."""
    decoder = dec.Decoder(3, 16, token_dim=32, **TINY)
    content = RepTok(tok.Tokenizer(tiny_vit()), decoder, dec.PixelSpace()).content()
    same = RepTok.from_checkpoint(content, "a.pt").decoder.state_dict()
    assert all(torch.equal(same[name], x) for name, x in decoder.state_dict().items())
    del content["decoder"]["config"]["t_max"]
    refuses("a.pt.*t_max.*train again", RepTok.from_checkpoint, content, "a.pt")


# ---- sample.py: commands, --export, and bad input to every script
def test_sample_commands(trained, tmp_path, capfd):
    """Each command of sample.py writes a picture of its size; an export draws the same samples.

    But for the rounding to float16, in which the export is less than a quarter as large. bfloat16
    rounds too, and draws the same picture."""
    ckpt = ["--ckpt", trained / "out" / "stage2.pt", "--steps", 2]
    some = sorted((trained / "data").rglob("*.png"))[:2]
    for args, size in [
        (["--classes", "heart", "star", "--per-class", 4], (4, 2)),
        (["--reconstruct", *some], (2, 2)),
        (["--interpolate", *some], (10, 1)),
        (["--interpolate", trained / "data", some[0]], (10, 1)),
        (["--reconstruct", trained / "data"], (16, 2)),
    ]:
        inside("sample.py", *ckpt, *args, "--out", tmp_path / "s.png")
        assert Image.open(tmp_path / "s.png").size == (64 * size[0], 64 * size[1])
    assert "the first 16 of 40" in capfd.readouterr().out
    twice = ["--classes", "heart", "--classes", "star", "--out", tmp_path / "s.png"]
    inside("sample.py", *ckpt, *twice)
    assert "heart, star" in capfd.readouterr().out
    inside("sample.py", *ckpt, "--export", tmp_path / "small.pt")
    a, b = RepTok.load(ckpt[1]), RepTok.load(tmp_path / "small.pt")
    a, b = (model.generate(torch.arange(3), steps=2) for model in (a, b))
    assert 0 < (a - b).abs().max() < 0.01 * a.abs().max()
    assert (tmp_path / "small.pt").stat().st_size < ckpt[1].stat().st_size / 4
    refuses("stage 1", RepTok.load(trained / "out" / "stage1.pt").generate, torch.arange(3))
    for dtype in ("float32", "bfloat16"):
        more = ["--dtype", dtype, "--device", "cpu", "--out", tmp_path / f"{dtype}.png"]
        inside("sample.py", *ckpt, "--classes", "star", *more)
    a, b = (fid.decode(tmp_path / f"{dtype}.png").astype(int) for dtype in ("float32", "bfloat16"))
    # Of 255: rounded, not another picture.
    assert 0 < np.abs(a - b).max() and np.abs(a - b).mean() < 8


BAD = {  # options, with {names} of files, and what the sentence says
    "train_stage1.py": """--data {empty}: no pictures; --data {gone}: no such; --step 5: --step
        --lam inf: --lam
        --batch 0: --batch; --lr fast: --lr; --batch 9 --accumulate 2: --batch; --size S: --vae
        --init {stage2} --unfreeze all: --unfreeze
        --encoder {encoder} --pretrain-steps 9: --pretrain-steps
        --pixels 18 {d}: patches; --encoder {text} {d}: text.png
        --token five: --token
        --encoder random --lam 1: --lam""",
    "train_stage2.py": """--seed 0: stage1.pt; --bpe a: --bpe; --clip a.pt: --captions
        --data {empty}: --data
        --stage1 {encoder}: encoder; --stage1 {half}: half.pt""",
    "sample.py": """--seed 0: --ckpt; {c} --classes eleven: eleven; {c} --classes 10: 10
        {c} --num 3: --num
        --ckpt {stage1}: stage 1; {c} --reconstruct {text}: text.png; {c} --reconstruct {gone}: gone
        {c} --reconstruct {text} --interpolate a b: --interpolate
        {c} --features {features}: no text
        {c} --prompt x: no text; {c} --prompts {blank}: no text
        {c} --export {stage2}: --ckpt itself
        --ckpt {long}: too long; {c} --out {long}.png: too long
        {c} --out {gone}/a.png: --out; {c} --out {empty}: --out
        {c} --classes \u00b2: --classes; {c} --clip a --bpe b: --clip
        {c} --per-class 0: --per-class
        {c} --save s --export e.pt: --export; {c} --encode {empty}: --save; {c} --flip: --flip
        {c} --encode {empty} --save {gone}: no pictures; {c} --out a.jpg: .png""",
}


def test_bad_input(trained, tmp_path, monkeypatch, capsys):
    """Bad input to a script ends in one sentence and status 2, and leaves nothing behind.

    A mistake of our own still shows its traceback."""
    out = trained / "out"
    paths = {name: out / f"{name}.pt" for name in ("stage1", "stage2", "encoder")}
    paths |= {
        n.split(".")[0]: tmp_path / n
        for n in ("empty", "gone", "text.png", "half.pt", "features.npz", "blank.txt", "x" * 300)
    }
    paths["long"] = paths.pop("x" * 300)
    paths |= {"c": f"--ckpt {paths['stage2']}", "d": f"--data {trained / 'data'}"}
    paths["empty"].mkdir()
    paths["text"].write_text("no picture")
    paths["blank"].write_text(" \n\n")
    paths["half"].write_bytes((out / "stage2.pt").read_bytes()[:5000])
    np.savez(paths["features"], features=np.zeros((3, 6), np.float32))
    for script, lines in BAD.items():
        for line in re.split(r";|\n", lines):
            args, says = line.strip().rsplit(": ", 1)
            where = [] if script == "sample.py" else ["--out", tmp_path / "new"]
            assert says in refusal(script, [*args.format(**paths).split(), *where], capsys), args
    # As an unset variable of a shell gives it.
    for script, option in (("train_stage1", "--data"), ("train_stage2", "--captions")):
        assert f"{option} is empty" in refusal(f"{script}.py", [option, ""], capsys)
    ckpt = ["--ckpt", paths["stage2"]]
    for args in (["--save", ""], ["--classes", "heart", ""]):
        assert f"{args[0]} is empty" in refusal("sample.py", [*ckpt, *args], capsys)
    assert not list(tmp_path.glob("new/*.pt"))
    # What is not there is said to be missing, with what to do, and leaves no folder.
    gone = tmp_path / "gone.jpg"
    for script, args, says in (
        ("sample.py", ["--ckpt", gone], "no such file; train first"),
        ("train_stage2.py", ["--stage1", gone, "--out", tmp_path / "none"], "train first"),
        ("sample.py", [*ckpt, "--reconstruct", gone], "no such file; give picture files"),
        ("train_stage1.py", ["--data", gone, "--out", tmp_path / "none"], "give one that holds"),
    ):
        assert f"{gone}: no such " in (line := refusal(script, args, capsys)) and says in line
        assert not (tmp_path / "none").exists()
    if not torch.cuda.is_available():
        assert "--device cuda" in refusal(
            "sample.py", ["--ckpt", out / "stage2.pt", "--device", "cuda"], capsys
        )
    inside("sample.py", "--ckpt", out / "stage1.pt", "--export", tmp_path / "empty" / "stage1.pt")
    assert "an export" in refusal(
        "train_stage1.py", ["--data", trained / "data", "--out", tmp_path / "empty"], capsys
    )
    run = launch("sample.py")  # and as a process
    assert run.communicate()[1].count("\n") == 1 and run.returncode == 2
    for error, says in (
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "smaller --batch"),
        (PermissionError(13, "Permission denied", "a"), "a: Permission"),
    ):
        monkeypatch.setattr(sample, "main", Mock(side_effect=error))
        assert says in refusal("sample.py", [], capsys)
    monkeypatch.setattr(sample, "main", Mock(side_effect=FileNotFoundError(2, "a mistake of ours")))
    with pytest.raises(FileNotFoundError):
        inside("sample.py")


# ---- sample.py: --save
def test_saved_files_are_the_same_on_two_ranks(trained, tmp_path, monkeypatch):
    """Two processes save the pictures that one saves, to one level of 255.

    --save of one process and of two; real/ holds the pictures as they are cut, for fid.py to
    compare with."""
    ckpt = ["--ckpt", trained / "out" / "stage2.pt", "--steps", 2, "--decoder-steps", 2]
    ckpt += ["--batch", 5, "--device", "cpu"]
    jobs = [["--num", 12], ["--reconstruct", trained / "data"]]
    runs = [launch("sample.py", *ckpt, *job, "--save", tmp_path / "2", world=2) for job in jobs]
    asked, generate = [], RepTok.generate
    monkeypatch.setattr(
        RepTok,
        "generate",
        lambda model, labels, **more: (
            asked.extend(labels.tolist()) or generate(model, labels, **more)
        ),
    )
    for job in jobs:
        inside("sample.py", *ckpt, *job, "--save", tmp_path / "1")
    assert asked == [i % 10 for i in range(12)]
    for run in runs:
        finished(run)
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.png"))
    assert len(files) == 12 + 2 * 40
    a, b = (
        {str(file): fid.decode(tmp_path / world / file).astype(int) for file in files}
        for world in "12"
    )
    assert max(np.abs(a[name] - b[name]).max() for name in a) <= 1  # of 255
    pictures, model = (
        sample.Pictures(str(trained / "data"), 16),
        RepTok.load(trained / "out" / "stage1.pt"),
    )
    assert np.array_equal(a["real/000007.png"], pictures[7][0].permute(1, 2, 0))
    again = fid.to_uint8(model.decode(model.encode(pixels_of(pictures, [7])), 2, model.noise([7])))[
        0
    ].permute(1, 2, 0)
    assert np.abs(a["reconstructed/000007.png"] - again.numpy()).max() <= 1


# ---- sample.py: the authors' checkpoint
# The authors' checkpoint with fewer layers: prefixes, the numbers in them, names and shapes.
RELEASED = [
    (
        "first_stage.decoder.decoder.",
        [0],
        """
        time_emb.weight 512x1 time_in_proj.weight 1024x1024 mapping.in_norm.scale 1024
        mapping.out_norm.scale 1024
        encoder.dino.temp_pos_embed 1x1x1x768 encoder.dino.new_reg 1x2x768
        encoder.dino.backbone.fc.weight 1152x768
        encoder.dino.backbone.fc.bias 1152 encoder.dino.backbone.ln.weight 1152
        encoder.dino.backbone.ln.bias 1152
        backbone.mid_merge.proj.weight 1152x1152 backbone.mid_merge.pre_proj.proj.weight 1152x16
        backbone.mid_split.post_proj.norm.scale 1152
        backbone.mid_split.post_proj.proj.weight 16x1152""",
    ),
    (
        "first_stage.decoder.decoder.mapping.blocks.{}.",
        range(2),
        "norm.scale 1024 up_proj.weight 6144x1024 down_proj.weight 1024x3072",
    ),
    (
        "first_stage.decoder.decoder.backbone.mid_level.{}.",
        range(4),
        """
        self_attn.scale 16 self_attn.norm.linear.weight 1152x1024
        self_attn.qkv_proj.weight 3456x1152
        self_attn.out_proj.weight 1152x1152 self_attn.pos_emb.freqs 2x16x9
        ff.norm.linear.weight 1152x1024
        ff.up_proj.weight 6912x1152 ff.down_proj.weight 1152x3456""",
    ),
    (
        "ema_model.net.",
        [0],
        """
        pos_embed 1x1x768 label_embedder.embedding_table.weight 1001x768
        t_embedder.mlp.0.weight 768x256
        t_embedder.mlp.0.bias 768 t_embedder.mlp.2.weight 768x768 t_embedder.mlp.2.bias 768
        mixer._orig_mod.0.weight 1280x768 mixer._orig_mod.0.bias 1280 mixer._orig_mod.7.weight 1280
        mixer._orig_mod.7.bias 1280 mixer._orig_mod.8.weight 768x1280 mixer._orig_mod.8.bias 768""",
    ),
    (
        "ema_model.net.mixer._orig_mod.{}.",
        range(1, 7),
        """
        0.fn.0.weight 12x3x1 0.fn.0.bias 12 0.fn.3.weight 3x12x1 0.fn.3.bias 3 0.norm.weight
        1280 0.norm.bias 1280
        1.fn.0.weight 5120x1280 1.fn.0.bias 5120 1.fn.3.weight 1280x5120 1.fn.3.bias
        1280 1.norm.weight 1280
        1.norm.bias 1280""",
    ),
]


def test_the_authors_checkpoint(tmp_path):
    """The authors' checkpoint loads, and gives the figures of the authors' own code.

    Encoder, decoder, Mixer and guidance, from their layout (theirs runs time backwards)."""
    vit = shapes_of(
        tok.ViT, width=768, depth=12, heads=12, patch=14, grid=37, registers=4, layer_scale=True
    )
    shapes = {f"first_stage.encoder.encoder.{name}": shape for name, shape in vit.items()}
    shapes |= {
        f"first_stage.decoder.decoder.ae.ae.{name}": shape
        for name, shape in shapes_of(dec.VAE).items()
    }
    for prefix, numbers, table in RELEASED:
        for i in numbers:
            shapes |= table_of(prefix.format(i), table)
    state = official(shapes, salt="a:") | {"metric_tracker.other": torch.ones(3)}
    first_stage = {"_content": {"params": {"_content": {"scale_factor": {"_val": 1.3}}}}}
    config = {"first_stage_cfg": first_stage, "other": {"scale_factor": 0.18215}}
    # Not named .ckpt.
    torch.save({"state_dict": state, "hyper_parameters": config, "epoch": 1}, tmp_path / "a.pt")
    del state
    model = RepTok.load(tmp_path / "a.pt")
    (tmp_path / "a.pt").unlink()
    near(
        model.encode(picture("a:reptok-375x500", 1, 375, 500))[0, 0, :3],
        [0.0541501, 0.3860424, 0.5609152],
    )
    z, x = model.encode(picture("a:reptok-256", 2, 256, 256)), uniform("a:noise", (2, 4, 32, 32))
    n, classes = uniform("a:latent-noise", (4, 1, 768))[:3], torch.tensor([1, 207, 981])
    with torch.no_grad():
        v = -model.decoder(x, torch.full((2,), 0.5), z)
        near(v[1, :, 3, 4], [-2.0065675, 0.505765, -0.8570567, 0.6616135], 5e-5)
        near(
            model.mixer(n, torch.full((3,), 0.25), classes)[1, 0, :3],
            [0.2368025, -0.0491665, 1.5444434],
        )
    guided = model.generate(classes, steps=10, cfg=1.5, cfg_interval=(0.3, 0.9), noise=n)
    near(guided[1, 0, :3] / 1.3, [0.9503103, 0.7618908, 3.0905805], 5e-5)
    images = model.decode(z[1:], steps=4, noise=x[1:])
    near(images[0, :, 12, 16], [-1.0, 1.0, -0.1287327], 5e-5)


def test_time_is_reversed_in_the_weights():
    """A reversed map gives for time t what the map gives for time 1-t.

    A map of the Fourier features of 1-t is the turned map of those of t."""
    weight, freqs = torch.randn(16, 16).double(), torch.randn(8, 1).double()

    def features(t):
        return torch.cat(
            [(2 * math.pi * freqs[:, 0] * t).cos(), (2 * math.pi * freqs[:, 0] * t).sin()]
        )

    for t in (0.0, 0.3, 1.0):
        assert torch.allclose(
            sample.reverse_time(weight, freqs) @ features(t), weight @ features(1 - t), atol=1e-12
        )


# ---- fid.py: features, statistics, distance
def fid_picture(i, h, w):
    """Waves that differ with i."""
    y, x, c = np.mgrid[:h, :w, :3]
    return ((y * (3 + i) + x * (5 + 2 * i) + (x * y) // (7 + i) + 60 * c) % 256).astype(np.uint8)


def fid_batch(*numbers, size=(40, 56)):
    """The pictures of these numbers, uint8 (B,3,H,W)."""
    return torch.from_numpy(np.stack([fid_picture(i, *size) for i in numbers])).permute(0, 3, 1, 2)


def save_tree(folder, sizes, start=0):
    """Save pictures of these sizes as .png in two folders of `folder`."""
    for i, size in enumerate(sizes):
        path = folder / str(i % 2) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(fid_picture(start + i, *size)).save(path)
    return folder


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """The path of weights of Inception, which depend on their names."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    state = {
        name: 1 + 0.25 * uniform(name, x.shape)
        if name.endswith("_var")
        else seeded(name, x.shape, 2**0.5)
        for name, x in fid.Inception("tf1").state_dict().items()
        if "tracked" not in name
    }
    torch.save(state, path)
    return path


@pytest.mark.parametrize(
    "resize, expected",
    [  # as pytorch-fid 0.3.0 and torch-fidelity 0.4.0 give
        ("pytorch-fid", [0.16020, 0.26052, 0.91411, 1.39036, 2.02914, 12.74936]),
        ("tf1", [0.16430, 0.24872, 0.92448, 1.38595, 2.03273, 12.93768]),
    ],
)
def test_inception_features(inception, resize, expected):
    """Inception gives the features that pytorch-fid and torch-fidelity give.

    Several groups of pictures in one call give the same. TensorFlow's resizing does not shift by
    half a pixel."""
    net, x = fid.load_inception(inception, resize), fid_batch(0, 1)
    features = net(x)
    assert (
        features[1, [0, 400, 800, 1200, 1600, 1926]] - torch.tensor(expected)
    ).abs().max() < 5e-5
    assert (net(x[:1], x[1:]) - features).abs().max() < 5e-5
    if resize == "tf1":  # source = 2 target, no half-pixel shift
        x = torch.arange(3 * 598 * 598).view(1, 3, 598, 598).remainder(251).byte()
        assert torch.equal(net.prepare(x), (x[..., ::2, ::2].float() - 128) / 128)


def test_statistics_of_batches():
    """Statistics of batches are the mean and the covariance of all features together."""
    x, stats = np.random.RandomState(0).rand(101, 20).astype(np.float32) * 3 + 1, fid.Statistics(20)
    for batch in torch.from_numpy(x).split(20):
        stats.update(batch)
    assert stats.n == 101 and np.allclose(stats.mu, x.mean(0, dtype=float), rtol=1e-12, atol=0)
    assert np.allclose(stats.cov, np.cov(x.astype(float), rowvar=False), rtol=1e-9, atol=1e-12)


def test_frechet_closed_forms():
    """The Frechet distance has the values of its closed forms, also for singular covariances.

    Statistics that are not finite or not of one size are refused."""
    r = np.random.RandomState(0)
    mu, shift, cov, d1, d2 = (
        r.randn(40),
        r.randn(40),
        np.cov(r.randn(90, 40), rowvar=False),
        r.rand(40),
        r.rand(40),
    )
    for args, exact in (
        ((cov, mu, cov), 0),
        ((cov, mu + shift, cov), (shift**2).sum()),
        ((4 * cov, mu, 9 * cov), np.trace(cov)),
        ((np.diag(d1), mu, np.diag(d2)), ((d1**0.5 - d2**0.5) ** 2).sum()),
    ):
        assert math.isclose(fid.frechet_distance(mu, *args), exact, rel_tol=1e-9, abs_tol=1e-9)
    # Singular: tr (C1 C2)^(1/2) is the nuclear norm of A B^T.
    for n1, n2 in ((5, 7), (30, 4), (4, 90)):
        x, y = 100 + r.randn(n1, 40), r.randn(n2, 40)
        a, b = (x - x.mean(0)) / (n1 - 1) ** 0.5, (y - y.mean(0)) / (n2 - 1) ** 0.5
        nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
        exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * nuclear
        assert math.isclose(
            fid.frechet_distance(x.mean(0), np.cov(x.T), y.mean(0), np.cov(y.T)),
            exact,
            rel_tol=1e-12,
        )
    for other in ((mu[:9], cov[:9, :9]), (mu * np.nan, cov)):
        refuses("finite and of one size", fid.frechet_distance, mu, cov, *other)


def test_scores_are_taken_in_whole_float32():
    """TF32 and autocast are off within Inception and LPIPS, and on again behind them."""
    seen = []

    def look(module, inputs, output):
        seen.append((torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")))

    net = fid.Inception("tf1").eval()
    net.Conv2d_1a_3x3.conv.register_forward_hook(look)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        with torch.autocast("cpu", torch.bfloat16):
            features = net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
            look(None, None, None)
    assert features.dtype == torch.float32
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        sample.Ranks("cpu")
        assert not torch.backends.cudnn.allow_tf32  # the trainers and sample.py
    assert seen == [(False, False), (True, True)]


# ---- fid.py: pairs
def test_psnr_ssim_and_rounding():
    """PSNR and SSIM have their closed forms, SSIM also that of scipy's filter; pixels are rounded.

    Pictures that are too small for SSIM, and pixels that are no numbers, are refused."""
    a, b = fid_batch(0, 1, size=(24, 31)), fid_batch(0, 5, size=(24, 31))
    zero = torch.zeros(1, 3, 16, 16)
    assert fid.psnr(a, a).tolist() == [math.inf] * 2 and torch.allclose(
        fid.ssim(a, a), torch.ones(2).double()
    )
    assert math.isclose(fid.psnr(zero, zero + 0.1).item(), 20, rel_tol=1e-6)
    assert math.isclose(fid.ssim(zero, zero + 1).item(), 1e-4 / 1.0001, rel_tol=1e-6)

    def blur(x):
        return scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5, axes=(0, 1))[5:-5, 5:-5]

    p, q = (x[1].permute(1, 2, 0).double().numpy() / 255 for x in (a, b))
    m, n = blur(p), blur(q)
    vp, vq, c = blur(p * p) - m * m, blur(q * q) - n * n, blur(p * q) - m * n
    score = (2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (vp + vq + 9e-4))
    assert math.isclose(fid.ssim(a, b)[1], score.mean(), abs_tol=1e-9)
    with pytest.raises(ValueError, match="16"):
        fid.pair_scores(a[..., :10], b[..., :10])
    assert fid.to_uint8(torch.tensor([-2.0, -1, 0.003, 0.9999, 1])).tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]
    refuses("NaN or infinity", fid.to_uint8, zero / 0)


def test_lpips_and_pairs(tmp_path, capsys, monkeypatch):
    """LPIPS is that of lpips 0.1.4, and --pairs prints the means over the pairs.

    Names are paired whatever the case of their suffix; those without a partner are refused and
    named. Without the files of LPIPS in their usual places PSNR and SSIM are scored all the same,
    and a line says that it is left out; a file that is named has to be there."""
    with monkeypatch.context() as patch:
        patch.setattr(fid, "load_weights", lambda *args, **options: None)
        empty = fid.LPIPS(None, None)
    vgg = {name: seeded(name, x.shape, 2**0.5) for name, x in empty.vgg.state_dict().items()}
    heads = {name: seeded(name[:4], x.shape).abs() for name, x in empty.heads.state_dict().items()}
    weights = [tmp_path / "vgg.pth", tmp_path / "heads.pth"]
    torch.save(
        {**vgg, "classifier.0.weight": torch.zeros(3)},
        weights[0],
        _use_new_zipfile_serialization=False,
    )
    torch.save(heads, weights[1])
    net, sizes = fid.LPIPS(*weights), [(32, 40), (20, 24)]
    x = fid_batch(0, 1, size=sizes[0]) / 127.5 - 1
    assert torch.allclose(net(x, x[[1, 1]]), torch.tensor([0.1519165, 0]), rtol=1e-5)  # lpips 0.1.4
    real, fake = save_tree(tmp_path / "real", sizes), save_tree(tmp_path / "fake", sizes, 2)
    (fake / "1" / "001.png").rename(fake / "1" / "001.PNG")
    args = [str(a) for a in (real, fake, "--pairs", "--vgg", weights[0], "--lpips", weights[1])]
    fid.main([*args, "--json", str(tmp_path / "s.json")])
    rows = json.loads((tmp_path / "s.json").read_text())
    assert capsys.readouterr().out.count("\n") == 3 and [row["metric"] for row in rows] == [
        "PSNR",
        "SSIM",
        "LPIPS",
    ]
    want = (
        sum(
            fid.pair_scores(fid_batch(i, size=s), fid_batch(i + 2, size=s), net)[0]
            for i, s in enumerate(sizes)
        )
        / 2
    )
    assert np.allclose([row["value"] for row in rows], want, rtol=1e-6)
    assert (
        rows[2]["weights_sha256"] == [fid.sha256(path) for path in weights]
        and rows[0]["weights_sha256"] is None
    )
    for name in ("VGG", "HEADS"):
        monkeypatch.setattr(fid, name, str(tmp_path / f"no {name}"))
    fid.main(args[:3])
    said = capsys.readouterr()
    assert [line.split()[:2] for line in said.out.splitlines()] == [
        [row["metric"], f"{row['value']:.6f}"] for row in rows[:2]
    ]
    assert said.err.count("\n") == 1 and "LPIPS is left out" in said.err and "no VGG" in said.err
    assert "none.pth is missing" in refusal("fid.py", [*args[:5], "--lpips", "none.pth"], capsys)
    (fake / "0" / "000.png").rename(fake / "0" / "stray.png")
    assert f"2 without a partner: 0/000 of {real}, 0/stray of {fake}" in refusal(
        "fid.py", args, capsys
    )


def test_pairs_by_name_and_equal_pairs(tmp_path, capsys, monkeypatch):
    """Pictures are paired by name, by suffix too if possible; equal pairs leave the mean PSNR.

    Flat pictures that differ by d have a PSNR of 20 log10(255 / d): it tells which were paired.
    Where names that differ only in their suffix leave a choice, they are refused."""

    class Zero(nn.Module):
        sha256 = ["of", "files"]

        def forward(self, a, b):
            return torch.zeros(len(a))

    monkeypatch.setattr(fid, "LPIPS", lambda *paths: Zero())

    def score(real, fake):
        for side, levels in (("real", real), ("fake", fake)):
            shutil.rmtree(tmp_path / side, ignore_errors=True)
            (tmp_path / side).mkdir()
            for name, level in levels.items():
                Image.new("RGB", (16, 16), (level,) * 3).save(tmp_path / side / name, lossless=True)
        folders = [str(tmp_path / "real"), str(tmp_path / "fake")]
        fid.main(["--pairs", *folders, "--json", str(tmp_path / "s.json")])
        row = json.loads((tmp_path / "s.json").read_text())[0]
        return row, capsys.readouterr().out.splitlines()[0]

    def mean(*differences):
        return np.mean([20 * math.log10(255 / d) for d in differences])

    real = {"x.bmp": 100, "x.png": 50, "y.png": 9}
    row, line = score(real, {"x.png": 60, "x.webp": 120, "y.PNG": 14})
    assert math.isclose(row["value"], mean(10, 20, 5), rel_tol=1e-6) and row["note"] is None
    real = {"a.png": 1, "b.png": 2, "c.png": 3}
    row, line = score(real, {"a.png": 11, "b.png": 2, "c.png": 23})
    assert math.isclose(row["value"], mean(10, 20), rel_tol=1e-6) and row["n_real"] == 3
    assert "mean of 2 pairs, without 1 equal ones" in row["note"] and row["note"] in line
    row, line = score({"a.png": 1}, {"a.png": 1})
    assert row["value"] == "inf" and "PSNR inf" in line and "all pairs are equal" in line
    fake = {"x.webp": 1, "x.ppm": 2}
    for real in ({"x.png": 1, "x.bmp": 2}, {"x.png": 1}):
        with pytest.raises(SystemExit):
            score(real, fake)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "differ only in their suffix" in said, said


# ---- fid.py: pictures, folders and archives
def contents(source):
    """{name: bytes} of a folder or .tar."""
    return {name: fid.read_bytes(place) for name, place in fid.files(source).items()}


def test_pictures_are_read_as_rgb(tmp_path):
    """Grey, palette, 16-bit and CMYK pictures are read as RGB, in the order of their names."""
    rgb = fid_picture(3, 12, 9)
    three = np.repeat(rgb[..., :1], 3, 2)
    web = three // 51 * 51  # in the web palette
    kinds = {
        "a.png": (rgb, "RGB", rgb),
        "b.png": (three, "L", three),
        "c.png": (web, "P", web),
        "d.png": (rgb[..., 0].astype(np.uint16) * 257, "I;16", three),
        "e.tif": (rgb, "CMYK", rgb),
    }
    for name, (x, mode, _) in kinds.items():
        Image.fromarray(x).convert(mode).save(tmp_path / name)
    names, read = fid.pictures(tmp_path)
    assert names == list(kinds)
    for name, x in zip(names, fid.read_ahead(read, names, wait=2)):
        assert x.dtype == np.uint8 and np.array_equal(x, kinds[name][2]), name


def test_transparent_pictures_are_shown_on_white(tmp_path):
    """A transparent picture is shown on white, whichever way its file says it.

    The closed form is alpha colour + (1 - alpha) white; what is opaque stays."""
    draw = draws("transparent")
    rgba = draw.randint(0, 256, (12, 9, 4), np.uint8)
    rgba[0, :, 3] = 255
    grey = draw.randint(0, 256, (12, 9), np.uint8)
    deep = draw.randint(0, 65536, (12, 9)).astype(np.uint16)
    grey[1, 1] = 7
    deep[1, 1] = 1799
    rgba[1, 1, :3] = 7

    def over(colour, alpha):
        alpha = np.float64(alpha)[..., None] / 255
        return alpha * colour + (1 - alpha) * 255

    def keyed(colour):  # one value is transparent
        colour = colour.reshape(12, 9, -1)
        return np.where((colour == 7).all(-1, keepdims=True), 255, colour) * np.ones(3)

    palette = Image.fromarray(grey).convert("P")
    index = np.array(palette)
    colours = np.array(palette.getpalette()).reshape(-1, 3)[index]
    alphas = draw.randint(0, 256, 256, np.uint8)
    rgb = rgba[..., :3].copy()
    alpha = rgba[..., 3]
    la = Image.merge("LA", [Image.fromarray(rgba[..., 0].copy()), Image.fromarray(alpha.copy())])
    exact = {"lossless": True, "exact": True}
    cases = {
        "a.png": (Image.fromarray(rgba), {}, over(rgb, alpha)),
        "b.webp": (Image.fromarray(rgba), exact, over(rgb, alpha)),
        "c.png": (la, {}, over(rgb[..., :1], alpha) * np.ones(3)),
        "d.png": (palette, {"transparency": bytes(alphas)}, over(colours, alphas[index])),
        "e.gif": (palette, {"transparency": 7}, np.where((index == 7)[..., None], 255, colours)),
        "f.png": (Image.fromarray(grey), {"transparency": 7}, keyed(grey)),
        "g.png": (Image.fromarray(rgb), {"transparency": (7, 7, 7)}, keyed(rgb)),
        "h.png": (Image.fromarray(deep), {"transparency": 1799}, keyed(deep / 257)),
    }
    for name, (image, options, want) in cases.items():
        image.save(tmp_path / name, **options)
        got = fid.decode(tmp_path / name)
        assert got.shape == (12, 9, 3) and np.abs(got - want).max() <= 1, name
    # What is opaque stays as it is.
    assert np.array_equal(fid.decode(tmp_path / "a.png")[0], rgb[0])


def test_files_of_folders_links_and_shards(tmp_path):
    """Every file of a folder or .tar is found by its relative name and read in place.

    Links are followed; a shard's members are read in place; hidden names do not count. A .tar that
    was cut, and what is no folder or .tar, is refused."""
    for name in (
        "in/a/1.png",
        "in/a/1.txt",
        "in/a/._1.png",
        "in/.git/2.png",
        "in/__MACOSX/3.png",
        "other/b/4.JPG",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "in" / "5.png").symlink_to(tmp_path / "in" / "a" / "1.png")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as shard:
        shard.add(tmp_path / "in" / "a", "./a")
        shard.add(tmp_path / "other" / "b" / "4.JPG", "4.JPG")
    a = {"a/1.png": "in/a/1.png", "a/1.txt": "in/a/1.txt"}
    members = {"4.JPG": "other/b/4.JPG", **a}
    for source, want in (
        ("in", {"5.png": "in/a/1.png", **a, "linked/b/4.JPG": "other/b/4.JPG"}),
        ("shards/0.tar", members),
        ("shards", {f"0.tar/{k}": v for k, v in members.items()}),
    ):
        found = fid.files(tmp_path / source)
        assert {name: fid.read_bytes(place).decode() for name, place in found.items()} == want
        assert list(found) == sorted(want)
        assert set(fid.pictures(tmp_path / source)[0]) == {
            name for name in want if not name.endswith(".txt")
        }
    whole = (tmp_path / "shards" / "0.tar").read_bytes()
    last = max(offset for _, offset, _ in fid.files(tmp_path / "shards").values())
    # In a header, in a member's data, at the end of the last.
    for cut in (700, last - 100, last, last + 512):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        refuses("cut.tar is not a whole .tar .*; get it again", fid.files, tmp_path / "cut.tar")
    refuses("a.zip: no such folder or .tar", fid.files, tmp_path / "a.zip")
    wrong = {"a.zip": "a file, .*unpack", "a.npy": "a file of numpy arrays", "a.jpg": "one picture"}
    for name, words in wrong.items():
        (tmp_path / name).write_bytes(b"x")
        refuses(f"{name} is {words}", fid.files, tmp_path / name)


def test_every_real_folder_is_walked_once(tmp_path):
    """Every real folder is walked once, though several links lead to it.

    Links to a folder above add nothing, and end; another folder counts under its first name."""
    want = {f"{name}/{i}.png": b"%d" % i for name in ("cats", "dogs") for i in range(6)}
    for name, content in want.items():
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / name).write_bytes(content)
    (tmp_path / "pets" / "cats" / "all").symlink_to(tmp_path / "pets")
    assert contents(tmp_path / "pets") == want
    (tmp_path / "pets" / "dogs" / "all").symlink_to("../../pets")
    (tmp_path / "pets" / "a.png").symlink_to("a.png")  # leads to itself: a file that cannot be read
    assert list(fid.files(tmp_path / "pets")) == ["a.png", *sorted(want)]
    (tmp_path / "pets" / "a.png").unlink()
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "7.png").write_bytes(b"7")
    for name in ("zebras", "birds", "eagles"):
        (tmp_path / "pets" / name).symlink_to(tmp_path / "birds")
    assert contents(tmp_path / "pets") == {"birds/7.png": b"7", **want}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_holds_what_its_folder_holds(tmp_path, kind):
    """A .tar gives the names and contents that its folder gives.

    Links, hidden folders, capitals, names that are not UTF-8, archives joined by cat. A damaged
    archive, and a link that leads out of it, are refused."""
    folder = tmp_path / "in"
    for name in ("cats/1.png", "cats/old/2.png", "dogs/3.PNG", ".hidden/4.png", "emus/5.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 99)
    (folder / "dogs" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"latin")
    (folder / "dogs" / "hard.png").hardlink_to(folder / "cats" / "1.png")
    links = {
        "cats/all": "..",
        "cats/old/up": "../..",
        "visible": ".hidden",
        "elks": "dogs",
        "dogs/soft.png": "../cats/old/2.png",
        "dogs/twice.png": "soft.png",
        "emus/zoo/inner": "../../cats/old",
        "emus/zoo/6.png": "inner/2.png",
    }
    for name, target in links.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(target)
    with tarfile.open(tmp_path / "whole.TAR", "w", format=kind) as tar:
        tar.add(folder, ".")
    for part in (1, 2):
        with tarfile.open(tmp_path / f"{part}.tar", "w", format=kind) as tar:
            for name in sorted(os.listdir(folder))[part - 1 :: 2]:
                tar.add(folder / name, name)
    parts = [(tmp_path / f"{part}.tar").read_bytes() for part in (1, 2)]
    (tmp_path / "joined.tar").write_bytes(parts[0] + parts[1])
    want = contents(tmp_path / "whole.TAR")
    assert {name: content[:10] for name, content in want.items()} == {
        "cats/1.png": b"cats/1.png",
        "cats/old/2.png": b"cats/old/2",
        "dogs/3.PNG": b"dogs/3.PNG",
        "dogs/caf\udce9.png": b"latin",
        "dogs/hard.png": b"cats/1.png",
        "dogs/soft.png": b"cats/old/2",
        "dogs/twice.png": b"cats/old/2",
        "emus/5.txt": b"emus/5.txt",
        "emus/zoo/6.png": b"cats/old/2",
        "visible/4.png": b".hidden/4.",
    }
    assert contents(tmp_path / "joined.tar") == want
    assert contents(folder) == want
    (tmp_path / "shards").mkdir()
    (tmp_path / "whole.TAR").rename(tmp_path / "shards" / "0.TAR")
    assert contents(tmp_path / "shards") == {f"0.TAR/{name}": x for name, x in want.items()}
    data = bytearray(parts[0])
    with tarfile.open(tmp_path / "1.tar") as tar:
        data[tar.getmembers()[-1].offset] ^= 1
    (tmp_path / "1.tar").write_bytes(data)
    refuses("1.tar is not a whole .tar", fid.files, tmp_path / "1.tar")
    (folder / "out").symlink_to(tmp_path / "shards")
    with tarfile.open(tmp_path / "out.tar", "w") as tar:
        tar.add(folder / "out", "out")
    words = "out is a link to .*shards, which is not in the archive; .*--dereference"
    refuses(words, fid.files, tmp_path / "out.tar")


def test_names_that_are_not_utf_8(tmp_path, inception, capsys, monkeypatch):
    """Files whose names are not UTF-8 are scored, printed and named in refusals."""
    monkeypatch.chdir(tmp_path)
    folder, name = (os.fsdecode(part) for part in (b"a\xe9", b"\xe9.png"))
    Path(folder).mkdir()
    for i in range(2):
        Image.fromarray(fid_picture(i, 32, 32)).save(Path(folder) / (str(i) + name))
    np.savez(folder + ".npz", mu=np.zeros(6), sigma=np.eye(6), n=9)
    fid.main([folder + ".npz", folder + ".npz", "--json", folder + ".json"])
    assert "reference a\\udce9.npz" in capsys.readouterr().out
    assert json.loads(Path(folder + ".json").read_text())[0]["reference"] == "a\\udce9.npz"
    fid.main([folder, "--inception", str(inception), "--save-stats", "s.npz"])
    (Path(folder) / ("0" + name)).write_bytes(b"")
    said = refusal("fid.py", [folder, folder, "--inception", inception], capsys)
    assert "cannot read 0\\udce9.png in a\\udce9" in said
    with pytest.raises(ValueError) as error:
        fid.files(os.fsdecode(b"\xff"))
    print(error.value)
    capsys.readouterr().out.encode()


def test_pictures_of_unknown_formats_are_counted(tmp_path, capsys):
    """Files that are no known picture are counted by their suffix, and a line says so."""
    for name in ("a/1.HEIC", "a/2.heic", "b/1.png", "b/1.txt", "README"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert list(fid.left_out(fid.files(tmp_path)).items())[0] == (".heic", 2)
    assert fid.left_out(fid.files(tmp_path)) == {".heic": 2, ".txt": 1, "no suffix": 1}
    refuses("holds no pictures .*; it holds 2 .heic", fid.pictures, tmp_path / "a")
    fid.tell_left_out(tmp_path)
    assert "left out 2 .heic, 1 " in capsys.readouterr().err


# ---- fid.py: the command
def test_pipes_are_no_pictures_and_32_bit_tiffs_are_refused(tmp_path):
    """A pipe with the name of a picture is left out: reading it would wait for ever. 32-bit grey,
    whose white nobody states, is refused."""
    save_tree(tmp_path / "a", [(8, 8)] * 2)
    os.mkfifo(tmp_path / "a" / "0" / "pipe.png")
    assert list(fid.files(tmp_path / "a")) == ["0/000.png", "1/001.png"]
    Image.fromarray(np.full((8, 8), 200, np.int32)).save(tmp_path / "grey.tiff")
    with pytest.raises(ValueError, match="32-bit"):
        fid.decode(tmp_path / "grey.tiff")


def test_members_of_a_tar_that_climb_are_refused(tmp_path):
    """b.png and ../b.png are two pictures. Neither may silently take the other's place."""
    save_tree(tmp_path / "a", [(8, 8)])
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("b.png", "../b.png"):
            tar.add(tmp_path / "a" / "0" / "000.png", name)
    refuses("../b.png climbs", fid.files, tmp_path / "a.tar")


def test_fid_where_nobody_reads_its_scores(tmp_path):
    """A broken pipe does not keep --json from being written; a full disk is told in one line."""
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=np.eye(5))
    line = [sys.executable, HERE / "fid.py", "s.npz", "s.npz"]
    with subprocess.Popen([*line, "--json", "j"], cwd=tmp_path, stdout=subprocess.PIPE) as process:
        process.stdout.close()
    assert process.returncode == 0 and json.loads((tmp_path / "j").read_text())[0]["value"] == 0
    with open("/dev/full", "w") as full:
        run = subprocess.run(line, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "No space" in run.stderr
    run = subprocess.run([*line[:2], "", "s.npz"], stderr=subprocess.PIPE, text=True)
    assert run.returncode == 2 and "is empty" in run.stderr and run.stderr.count("\n") == 1


def test_fid_command(tmp_path, inception, capsys, monkeypatch):
    """The command gives the known FID of two folders, and says what it depends on.

    It saves statistics, reads its own and ADM's, warns of few pictures, and refuses to compare two
    ways of resizing."""
    monkeypatch.chdir(tmp_path)
    save_tree(tmp_path / "a", [(32, 32)] * 5)
    save_tree(tmp_path / "b", [(32, 32)] * 3 + [(20, 40)], 7)
    fid.main(f"a b --inception {inception} --save-stats s.npz --json s.json".split())
    out, line = capsys.readouterr()
    (made,) = json.loads((tmp_path / "s.json").read_text())
    assert math.isclose(made["value"], 764.834130, rel_tol=1e-5)
    known = [
        made[key] for key in ("n_real", "n_fake", "preprocessing", "weights_sha256", "reference")
    ]
    assert (
        known == [5, 4, "pytorch-fid", fid.sha256(inception), "a"]
        and made["reference_sha256"] is None
    )
    assert out.count("\n") == line.count("\n") == 1 and "biased" in line and "N = 2049" in line
    net = fid.load_inception(inception)
    side, saved = (fid.measure(path, net, batch=3) for path in ("a", "s.npz"))
    assert side.n == saved.n == 5 and np.allclose(side.mu, saved.mu, atol=1e-5)
    assert np.allclose(side.cov, saved.cov, atol=1e-3)
    # mu and sigma win; no weights are needed; N by the rank, as the file does not say
    np.savez(
        "adm.npz",
        mu=np.zeros(6),
        sigma=np.diag([3, 2, 1.0, 0, 0, 0]),
        arr_0=np.zeros((3, 8, 8, 3), np.uint8),
    )
    fid.main(["adm.npz", "adm.npz"])
    out, line = capsys.readouterr()
    assert (
        "FID 0.000000  n_real unknown" in out and f"reference_sha256 {fid.sha256('adm.npz')}" in out
    )
    assert "N = 4 and 4" in line and "N = 7" in line
    assert "do not compare" in refusal(
        "fid.py", f"s.npz b --inception {inception} --resize tf1".split(), capsys
    )
    # ADM's file does not say how its pictures were resized
    np.savez("t.npz", mu=np.zeros(6), sigma=np.eye(6), n=9, resize="pytorch-fid")
    fid.main(["adm.npz", "t.npz"])
    assert "adm.npz does not say how" in capsys.readouterr().err
    fid.main(["adm.npz", "t.npz", "--resize", "pytorch-fid"])
    assert "does not say" not in capsys.readouterr().err
    assert "do not compare" in refusal("fid.py", ["adm.npz", "t.npz", "--resize", "tf1"], capsys)


def test_progress_batches_and_memory(tmp_path, inception, capsys, monkeypatch):
    """The bar counts pictures, --batch is obeyed, and advice on memory names options that help.

    What is advised where memory is short depends on device and scores, and exists. An error of our
    own is passed on."""
    folder = save_tree(tmp_path / "a", [(32, 32)] * 5)
    bars, sizes = [], []

    class Bar(fid.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **{**options, "disable": False})
            bars.append(self)

    def network(self, *groups):
        sizes.append(len(groups))
        return torch.rand(len(groups), 2048)

    monkeypatch.setattr(fid, "tqdm", Bar)
    net = fid.load_inception(inception)
    monkeypatch.setattr(fid, "load_inception", lambda *args: net)
    monkeypatch.setattr(fid.Inception, "forward", network)
    fid.main(f"{folder} --save-stats {tmp_path}/s.npz --batch 2 --device cpu".split())
    assert sizes == [2, 2, 1] and [(bar.n, bar.total) for bar in bars] == [(5, 5)]
    line = [folder, folder]
    cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
    mps = RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), cpu, mps):
        monkeypatch.setattr(fid.Inception, "forward", Mock(side_effect=error))
        monkeypatch.setattr(fid, "load_lpips", Mock(side_effect=error))
        for device, mode, remedies in (
                ("cpu", [], ["--batch"]), ("cuda", [], ["--batch", "--device"]),
                ("cpu", ["--pairs"], []), ("cuda", ["--pairs"], ["--device"])):
            monkeypatch.setattr(fid, "find_device", lambda name: device)
            said = refusal("fid.py", [*line, *mode], capsys)
            assert f"out of memory on {device}: give " in said
            assert re.findall(r"--[a-z-]+", said) == remedies, said
    monkeypatch.setattr(fid.Inception, "forward", Mock(side_effect=RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="ours"):
        fid.main([str(arg) for arg in line])
    monkeypatch.undo()
    for device, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(module, "is_available", lambda: False)
        assert "--device cpu" in refusal("fid.py", [*line, "--device", device], capsys)
    for wrong in ("0", "-1", "x"):
        assert "--batch" in refusal("fid.py", [*line, "--batch", wrong], capsys)


def test_only_a_full_disk_is_called_one(tmp_path):
    """A write that the disk refuses says to make room and keeps the old file; no other error does.

    The limit on a process's files stands for a full disk, and torch itself says its words."""
    code = """if True:
        import fid, resource, torch
        resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
        for new in (True, False):
            for content in ({"a": torch.rand(90000)}, {i: torch.rand(90) for i in range(900)}):
                def write(file):
                    torch.save(content, file, _use_new_zipfile_serialization=new)
                try:
                    fid.write_file("a.pt", write)
                except fid.UserError as error:
                    print(error)
    """
    (tmp_path / "a.pt").write_bytes(b"old")
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    said = run.stdout.splitlines()
    assert len(said) == 4, run
    assert all("File too large" in line and "make room" in line for line in said), said
    assert (tmp_path / "a.pt").read_bytes() == b"old"
    for error in (
        RuntimeError("CUDA error: device-side assert"),
        KeyError("x"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(type(error)):
            fid.write_file(tmp_path / "a.pt", Mock(side_effect=error))
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]
    refuses("cannot be written .*; make room", fid.write_file, tmp_path / "none" / "a.pt", None)


def test_fid_bad_input(tmp_path, inception, capsys, monkeypatch):
    """Bad input to fid.py ends in one line that names what is wrong."""
    monkeypatch.chdir(tmp_path)
    arrays = {"other": {"arr_0": np.ones((2, 8, 8, 3), np.uint8)}, "object": {"mu": np.array([{}])}}
    for name, content in arrays.items():
        np.savez(name, **content)
    (tmp_path / "short.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:300])
    bad = save_tree(tmp_path / "broken", [(16, 16)]) / "bad.png"
    bad.write_bytes(
        (save_tree(tmp_path / "good", [(16, 16)] * 2) / "0" / "000.png").read_bytes()[:60]
    )
    (tmp_path / "empty").mkdir()
    torch.save({"conv.weight": torch.zeros(2), "epoch": torch.zeros(1)}, "wrong.pth")
    (tmp_path / "cut.pth").write_bytes(inception.read_bytes()[:100000])
    gone = fid.URLS[0].split("/")[-1]
    for line, words in {
        "": "required",
        "good": "REAL and FAKE",
        "good good --resiz tf1": "unrecognized",
        "good good --pairs --save-stats a.npz": "not go with --pairs",
        "good none": "no such folder",
        "good empty": "no pictures",
        "good other.npz": "no mu and sigma but arr_0; save its pictures",
        "--pairs good other.npz": "numpy arrays, not a folder",
        "good object.npz": "cannot read",
        "good short.npz": "short.npz",
        "good good --inception cut.pth": "damaged",
        f"good good --inception {gone}": f"get it from {fid.URLS[0]}",
        "good good --inception wrong.pth": "Missing",
        f"broken good --inception {inception}": "bad.png",
    }.items():
        assert words in refusal("fid.py", line.split(), capsys), line


def test_statistics_are_saved_under_a_name_that_is_read_as_statistics(tmp_path, capsys):
    """--save-stats takes a name in .npz, by which fid.py knows statistics later."""
    folder = save_tree(tmp_path / "a", [(16, 16)] * 2)
    said = refusal("fid.py", [folder, "--save-stats", tmp_path / "stats"], capsys)
    assert "stats: the name must end in .npz" in said


# ---- Files of others: nothing in them runs, and a wrong one is named in one sentence
READERS = [tok.load_encoder, tok.load_text_encoder, dec.load_vae, fid.load_inception, RepTok.load]


class Run:  # unpickling it calls function(*args)
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call

    __call__ = __reduce__  # only so that it can stand where pickle wants a function


class Ordinary(pickle.Unpickler):
    def persistent_load(self, pid):
        return pid


class Settings(types.SimpleNamespace):  # like OmegaConf's: a method takes the state
    def __setstate__(self, state):
        raise RuntimeError("code of a class that the file names ran")


@pytest.mark.filterwarnings("ignore")  # torch sees that these files are odd
@pytest.mark.parametrize("which", range(10))
def test_files_made_to_run_code_do_not(which, tmp_path, monkeypatch):
    """No reader runs the code in a file that an ordinary reader would run.

    In every place of a pickle where something can stand, and in every kind of file that is read."""
    m, path, code = (
        str(tmp_path / "ran.npy"),
        str(tmp_path / "a.ckpt"),
        f"open({str(tmp_path / 'ran.npy')!r}, 'w')",
    )
    harm = [
        Run(os.system, f"touch {m}"),
        Run(exec, code),
        Run(eval, code),
        Run(Run(functools.partial, eval, code)),
        # Torch allows it, and it calls eval.
        Run(torch._tensor._rebuild_from_type_v2, eval, dict, (code,), {}),
        Run(subprocess.check_call, ["touch", m]),
        Run(np.save, m, 0),
        Run(torch.save, 0, m),
        Run(getattr, Run(open, m, "w"), "name"),
        Run(Run(getattr, Run(__import__, "os"), "mkdir"), m),
    ][which]
    # Quick to build; the file is what matters.
    monkeypatch.setattr(fid, "Inception", lambda resize: nn.Linear(1, 1))

    def check(*readers, ordinary):
        for read in readers:
            with contextlib.suppress(Exception):
                read(path)
            assert not os.path.exists(m), read
        with contextlib.suppress(Exception):
            ordinary()
        # An ordinary reader ran it: the file is as bad as it should be.
        os.rename(m, f"{m}{time.monotonic_ns()}")

    contents = [
        harm,
        {"state_dict": {"x": harm}},
        {"state_dict": {harm: 0}},
        {"state_dict": (0, (harm,))},
        [harm],
        {"kind": {harm}},
        collections.OrderedDict(state_dict=harm),
        argparse.Namespace(x=harm),
    ]
    pickles = [pickle.dumps(content, protocol) for content in contents for protocol in (2, 4)]
    # A tensor's persistent id.
    pickles.append(pickle.dumps(("storage", harm, "0", "cpu", 1), 2)[:-1] + b"Q.")
    for data in pickles:
        # The latter: TorchScript.
        for ending, *names in (
            (".ckpt", "data.pkl"),
            (".ckpt", "data.pkl", "constants.pkl"),
            (".safetensors", "data.pkl"),
        ):
            path = str(tmp_path / f"a{ending}")
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("a/version", b"3\n")
                for name in names:
                    archive.writestr(f"a/{name}", data)
            check(*READERS, ordinary=Ordinary(io.BytesIO(data)).load)
        # Begins as .safetensors does.
        Path(path).write_bytes(len(data).to_bytes(8, "little") + b"{" + data)
        check(*READERS, ordinary=Ordinary(io.BytesIO(data)).load)
    path = str(tmp_path / "a.ckpt")
    # As before torch 1.6.
    torch.save({"state_dict": harm}, path, _use_new_zipfile_serialization=False)
    check(*READERS, ordinary=lambda: torch.load(path, weights_only=False))
    path += ".npz"
    for key, read in {"mu": fid.read_statistics, "features": sample.text_features}.items():
        np.savez(path, **{key: np.array([harm], object)})
        check(read, ordinary=lambda: np.load(path, allow_pickle=True)[key])


@pytest.mark.parametrize(
    "function",
    [
        getattr,
        setattr,
        eval,
        exec,
        __import__,
        type,
        open,
        map,
        functools.partial,
        functools.reduce,
        subprocess.Popen,
        operator.attrgetter,
        importlib.import_module,
        pickle.loads,
        torch.load,
        torch.hub.load,
        Path,
    ],
)
def test_every_name_in_a_file_means_a_stand_in(function, tmp_path):
    """Every name in a file means a stand-in that does nothing.

    Also where the program lets files use it; what files may use, and the stand-in, are the same
    afterwards."""
    path, ran = tmp_path / "a.pt", str(tmp_path / "ran")

    def written(data):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/version", b"3\n")
            archive.writestr("a/data.pkl", data)
        return path

    allowed, stand_in = set(torch.serialization.get_safe_globals()), dict(vars(tok.Inert))
    with torch.serialization.safe_globals([function]):
        torch.save(
            {
                "name": function,
                "call": Run(function, ran, "w"),
                "again": Run(Run(function, ran), "w"),
            },
            path,
        )
        refuses("a.pt: damaged", tok.read_file, path)  # it calls what a stand-in gave
        torch.save({"name": function, "call": Run(function, ran, "w")}, path)
        found = tok.read_file(path)
        assert (
            found["name"] is tok.Inert and type(found["call"]) is tok.Inert and found["call"] == {}
        )
        assert not callable(found["call"]) and not os.path.exists(ran)
        name, state = (
            pickle.dumps(function, 2)[:-1],
            pickle.dumps({"update": 1, "__class__": 2}, 2)[2:-1],
        )
        found = tok.read_file(written(name + b")R" + state + b"b."))  # of an object: its items
        assert (
            type(found) is tok.Inert and found == {"update": 1, "__class__": 2} and not vars(found)
        )
        # Of the class itself.
        refuses("a.pt: damaged", tok.read_file, written(name + state + b"b."))
        assert set(torch.serialization.get_safe_globals()) == allowed | {function}
    assert (
        set(torch.serialization.get_safe_globals()) == allowed and dict(vars(tok.Inert)) == stand_in
    )


def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """No picture starts a program when it is read.

    Pillow draws PostScript by Ghostscript, for which a script stands here that leaves a file."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(tmp_path / "gs"))
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", "EPS")
    for read, ran in ((fid.decode, False), (lambda path: Image.open(path).load(), True)):
        with contextlib.suppress(OSError):
            read(tmp_path / "a.png")
        assert (tmp_path / "ran").exists() == ran


@pytest.mark.parametrize(
    "thing, items",
    [
        (argparse.Namespace(a=1), {"a": 1}),
        (Settings(scale_factor=1.3), {"scale_factor": 1.3}),
        (signal.SIGTERM, {}),
        (Path("a"), {}),
        (np.float64(3), {}),
        (collections.defaultdict(list, b=[1]), {"b": [1]}),
    ],
)
def test_objects_of_other_packages_load_as_inert_stand_ins(thing, items, tmp_path):
    """Objects of other packages load as stand-ins that hold their items and do nothing."""
    path, state = tmp_path / "a.ckpt", {"a": torch.ones(3)}
    torch.save({"state_dict": state, "callbacks": {"last": thing}}, path)
    found = tok.read_file(path)["callbacks"]["last"]
    assert type(found) is (dict if "b" in items else tok.Inert) and found == items


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
def test_kinds_of_files_agree_or_say_what_to_do(tmp_path):
    """The same weights in other kinds of files load the same, or a sentence says what to do.

    float16, parameters, and numbers that start anywhere, as in .safetensors, load the same;
    TorchScript and compressed archives are refused."""
    state = hugging_face(official(clip_shapes(64, 32, 1)))
    state = {
        name: x.half() if x.ndim > 1 and x.is_floating_point() else x for name, x in state.items()
    }
    torch.save(state, tmp_path / "a.bin")
    torch.save(
        {k: nn.Parameter(x) if x.is_floating_point() else x for k, x in state.items()},
        tmp_path / "b.bin",
    )
    (tmp_path / "c.safetensors").write_bytes(
        safetensors({"odd": torch.zeros(3, dtype=torch.uint8)} | state)
    )
    for read in (tok.load_encoder, tok.load_text_encoder):
        a, *others = (
            read(tmp_path / name).state_dict() for name in ("a.bin", "b.bin", "c.safetensors")
        )
        assert {x.dtype for x in a.values()} == {torch.float32} and not any(
            x.requires_grad for x in a.values()
        )
        for other in others:
            assert a.keys() == other.keys() and all(torch.equal(a[name], other[name]) for name in a)
        torch.jit.trace(nn.Linear(1, 1), torch.zeros(1)).save(str(tmp_path / "script.pt"))
        refuses(
            "script.pt: a TorchScript archive.*Hugging Face's layout", read, tmp_path / "script.pt"
        )
        with (
            zipfile.ZipFile(tmp_path / "a.bin") as old,
            zipfile.ZipFile(tmp_path / "d.bin", "w", 8) as new,
        ):
            for name in old.namelist():
                new.writestr(name, old.read(name))
        refuses("d.bin: was compressed", read, tmp_path / "d.bin")


@pytest.mark.parametrize("read", READERS)
def test_wrong_files_are_named_in_one_sentence(read, tmp_path, monkeypatch):
    """A wrong or damaged file is named in one sentence, and an old torch is refused."""
    path = tmp_path / "a.pth"
    torch.save({"state_dict": nn.Linear(3, 3).state_dict()}, path)
    network, header = path.read_bytes(), safetensors({"a": torch.zeros(4)})
    for data in (network, network[:-300], header, header[:-3], header[:20], b"some text", b""):
        path.write_bytes(data)
        with pytest.raises(sample.ERRORS) as error:
            read(path)
        said = str(error.value)
        assert str(path) in said and len(said) < 999 and "\n" not in said and "trust" not in said, (
            said
        )
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    refuses(r"2\.(6|10) or newer", read, path)  # all rely on weights_only, which ran code before


@pytest.mark.parametrize("read", [tok.load_encoder, dec.load_vae, fid.load_inception])
def test_files_are_read_by_a_torch_that_runs_nothing_in_them(read, tmp_path, monkeypatch):
    """Weight files are read only by a torch that runs nothing in them.

    Before 2.10, weights_only=True could run code of a file (CVE-2026-24747)."""
    torch.save({}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    with pytest.raises(ValueError, match="install torch 2.10 or newer"):
        read(tmp_path / "a.pth")


# ---- README.md and docs/
PAGES = {
    page: page.read_text() for page in (HERE / "README.md", *sorted((HERE / "docs").glob("*.md")))
}
README = "\n".join(PAGES.values())


def readme_commands(text):
    """(script, its options) of every command in bash blocks, with the first value of each shell
    variable."""
    names = dict(re.findall(r'(?m)^(\w+)="(.*)"$', text))
    for block in re.findall(r"```bash\n(.*?)```", re.sub(r'(?m)^\w+=".*"$', "", text), re.S):
        for name, value in {**names, **dict(re.findall(r"for (\w+) in (\S+)", block))}.items():
            block = re.sub(rf"\${name}\b", value, block)
        assert "$" not in block, block
        block = block.replace("\\\n", " ")
        command = r"(?:(train_stage1|train_stage2|sample|fid)\.py|-m (docs\.\w+))( [^\n;&|#]*)?"
        for script, module, line in re.findall(command, block):
            yield script or module, shlex.split(line)


TINY_RUN = {
    "train_stage1": QUICK1,
    "train_stage2": QUICK2,
    "sample": ["--steps", 2, "--device", "cpu"],
}


@pytest.mark.parametrize("script, line", [*readme_commands(README)])
def test_readme_commands_have_known_options(script, line, tmp_path, monkeypatch, capsys):
    """Every command in README.md and docs/ has options that its script knows."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *line])
    # One command exports into docs/.
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    if script == "fid":  # its options stand in main, which refuses the folders: they are not here
        with pytest.raises(SystemExit):
            fid.main(line)
        assert re.search("cannot read|no such folder", capsys.readouterr().err)
    else:
        assert importlib.import_module(script).options()


def test_readme_commands_run(trained, tmp_path, monkeypatch, capsys):
    """The commands marked as tiny run one after another and leave their pictures.

    The blocks marked as tiny, line by line, with a few steps and in a folder where their pictures
    lie; then the blocks of Python that read what these wrote."""
    for name in ("cats", "dogs"):
        shutil.copytree(trained / "data" / "heart", tmp_path / "my_pictures" / name)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(one, "NUM_SHAPES", 400)
    tiny = "".join(re.findall(r"<!-- tiny -->\n(```bash\n.*?```\n)", README, re.S))
    commands = [("train_stage1", []), *readme_commands(tiny)]
    assert len(commands) >= 9
    for script, line in commands:
        inside(f"{script}.py", *line, *TINY_RUN[script])
    made = {path.name for path in tmp_path.rglob("*.p[nt]*")}
    assert {"stage1.png", "stage2.png", "pets.png", "heart.png", "between.png", "small.pt"} <= made
    blocks = re.findall(r"<!-- own code -->\n```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    # What the block that looks for copies reads.
    shutil.copytree(trained / "data", "few")
    Path("few250").mkdir()
    shutil.copy(HERE / "docs" / "shapes.pt", "few250/stage2.pt")
    names = {}
    for block in blocks:
        exec(block, names)
    # It prints how close pictures come to the nearest known one: here again, pair by pair.
    known = [np.asarray(Image.open(path), float) for path in Path("few").rglob("*.png")]
    closest = []
    for picture in score.shapes(100, score.HELD_OUT)[0].permute(0, 2, 3, 1).numpy():
        mse = min(np.mean((picture - other) ** 2) for other in known)
        closest.append(10 * np.log10(255**2 / mse))
    _, figure = re.findall(r"(?m)^\d+\.\d+$", capsys.readouterr().out)
    # torch's median of 100 numbers is the fiftieth.
    assert abs(float(figure) - np.sort(closest)[49]) < 0.001
    trained_decoder = RepTok.load("mine/stage2.pt").decoder.state_dict()
    for name, tensor in names["decoder"].state_dict().items():
        assert torch.equal(tensor, trained_decoder[name].half().float())


def test_tour(tmp_path):
    """The tour makes its ten pictures, and they look like those in docs/.

    Rounding differs a little from machine to machine."""
    shutil.copytree(HERE / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.png"))
    assert tour(tmp_path) == 10
    for i in range(1, 11):
        made, shown = (fid.decode(folder / f"tour_{i}.png") for folder in (tmp_path, HERE / "docs"))
        assert made.shape == shown.shape
        assert np.abs(made.astype(float) - shown).mean() < 2, i


def test_readme_links():
    """Every link leads to a file that is there; links to lines lead to what they name.

    At least nine lead to lines."""
    links = [
        (page, *link)
        for page, text in PAGES.items()
        for link in re.findall(r"\[(.*?)\]\((?!http)(.*?)\)", text)
    ]
    assert sum("#L" in target for _, _, target in links) >= 9
    for page, name, target in links:
        file, _, line = target.partition("#L")
        assert (page.parent / file).is_file(), (page, target)
        if line:
            text = (page.parent / file).read_text().splitlines()[int(line) - 1]
            assert re.match(rf"\s*(def|class) {name.strip('`')}\b", text), (page, target)


@pytest.mark.parametrize("name", ["tokenizer", "decoder", "mixer", "fid"])
def test_readme_examples_of_one_file_alone(name, tmp_path):
    """The example of a file runs in a folder that holds that file alone.

    It has at most ten lines."""
    (code,) = re.findall(rf"<!-- alone: {name}\.py -->\n```python\n(.*?)```", README, re.S)
    shutil.copy(HERE / f"{name}.py", tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0 and len(code.strip().splitlines()) <= 10, run.stderr


def test_readme_blocks_that_need_other_packages(tmp_path, monkeypatch):
    """The other blocks of Python compile, and write their pictures where they can run.

    They are three; those that write pictures are run where scikit-learn and scikit-image are
    installed."""
    blocks = re.findall(r"(?<!-->\n)```python\n(.*?)```", README, re.S)
    codes = [compile(block, "README.md", "exec") for block in blocks]
    assert len(codes) == 3
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    monkeypatch.chdir(tmp_path)
    for code in codes[:2]:
        exec(code, {})
    assert [len([*(tmp_path / name).rglob("*.*")]) for name in ("train", "held", "crops")] == [
        1297,
        500,
        2400,
    ]


def test_sizes_in_the_docs():
    """The sizes and GMACs in the docs' table are those of the networks, to the last digit."""
    rows = re.findall(
        r"(?m)^\| (\w+) \| ([\d.]+)M \| ([\d.]+) \+ ([\d.]+) \| ([\d.]+)M.*? \| ([\d.]+) \|$",
        README,
    )
    assert len(rows) == 4
    for size, *figures in rows:
        with FakeTensorMode():  # shapes without memory; torch.autocast knows no meta device
            decoder, mixer = (
                dec.Decoder(**one.SIZES[size]["decoder"]),
                mix.Mixer(**one.SIZES[size]["mixer"]),
            )
            t, z = torch.rand(1), torch.randn(1, 1, 768)
            macs = bench.count_macs(lambda: decoder(torch.randn(1, 4, 32, 32), t, z))
            mixer_macs = sum(
                bench.count_macs(lambda: mixer(z, t, torch.zeros(1, dtype=torch.long)))
            )
        for got, said in zip(
            (bench.millions(decoder), *macs, bench.millions(mixer), mixer_macs), figures
        ):
            assert abs(got - float(said)) <= 0.51 * 10 ** -len(said.split(".")[1]), (
                size,
                got,
                said,
            )


# ---- What docs/ measures
def test_bench(monkeypatch, capsys):
    """The GMACs of bench.py are those that the layers' shapes give.

    The Mixer's linear layers, a multiply-accumulate a weight and token."""
    monkeypatch.setattr(bench, "median_ms", lambda function, device: 10.0)
    monkeypatch.setattr(sys, "argv", ["bench", "nano", "--batch", "4", "--device", "cpu"])
    bench.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:34].strip(): line[34:].split() for line in lines[6:]}
    assert 0.1 < float(re.search(r"and ([\d.]+) MB a picture", lines[0])[1]) < 10
    mixer = mix.Mixer(1, 128, **one.SIZES["nano"]["mixer"], num_classes=10)
    macs = 128 * 256 + 128**2 + 3 * 128 * 192 + 192 * 128  # time, three tokens in, one out
    macs += sum(
        2 * (192 * l.tokens.up.weight.numel() + 3 * l.channels.up.weight.numel())
        for l in mixer.layers
    )
    assert (
        rows["Mixer"][:2] == ["10.0", "400.00"] and abs(float(rows["Mixer"][2]) - macs / 1e9) < 1e-3
    )
    # Backward has two products for one.
    assert abs(float(rows["step: Mixer, backward"][2]) - 3 * macs / 1e9) < 2e-3
    assert len(rows) == 5 and all(float(row[2]) > 0 for row in rows.values())


def test_peak_counts_what_lives_at_one_time():
    """The peak is the largest sum of what new tensors hold at one time, views not counted twice."""
    x = torch.zeros(1000)
    with bench.Peak() as counter:
        y = x + 1
        for _ in range(5):
            y = (y + 1)[None][0]
        del y
    assert counter.peak == 2 * 4000 and counter.now == 0
    # The VAE works on 16 pictures at a time, the decoder on all.
    peaks = bench.sampling_peaks("S", pictures=32)
    fewer = bench.sampling_peaks("S", pictures=16)
    assert peaks["VAE decode"] - fewer["VAE decode"] < 0.1 * fewer["VAE decode"]
    assert peaks["decoder"] > 1.4 * fewer["decoder"]


def test_experiments(trained, tmp_path, monkeypatch, capsys):
    """An experiment leaves figures and pictures for its rows, and makes none of them again.

    Two rows of a table, tiny: networks, figures and pictures; what is there is not made again."""
    pictures, labels, _ = score.shapes(60, 3)
    judge = score.Judge.__new__(score.Judge)
    judge.real = judge.known = sample.to_float(pictures)
    judge.labels = judge.known_labels = labels
    judge.read = lambda x: (
        torch.arange(len(x)) % 10,
        x[:, :, 0].flatten(1).double().repeat(1, 3)[:, :128],
    )
    monkeypatch.setattr(experiment, "Judge", lambda *_: judge)
    monkeypatch.setattr(experiment, "shapes", lambda *_: (None, None, None))
    monkeypatch.setattr(experiment, "run", inside)
    fewer = lambda model, judge, per_class: score.measure(model, judge, 2, 2, per_class=1)
    monkeypatch.setattr(experiment, "measure", fewer)
    monkeypatch.setattr(experiment, "ENCODER", trained / "out" / "encoder.pt")
    tiny = (f"--steps 2 --batch 8 --data {trained / 'data'}", "--steps 2 --batch 8")
    names = ["frozen", "demo"]
    experiment.experiment(tmp_path, [0], names, tiny)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    said = capsys.readouterr().out
    assert [row["row"] for row in rows] == names and "| demo |" in said
    difference = rows[0]["PSNR from z"] - rows[1]["PSNR from z"]
    assert f"| row minus demo | seeds | {experiment.COMPARED[0]}" in said
    assert f"\n| frozen | 1 | {difference:.2f} | 0.0 |" in said
    # Each picture is among those known.
    assert all(row["neighbours by z, %"] == 100 for row in rows)
    assert (
        rows[0]["PSNR from z"] == rows[0]["PSNR from z0"] and abs(rows[0]["cos(z, z0)"] - 1) < 1e-5
    )
    right = [100 * float(i % 10 == k) for i, k in enumerate(labels.tolist())]
    assert abs(rows[0]["reconstructed, read right, %"] - np.mean(right)) < 1e-6
    each = rows[0]["each reconstructed"]
    worst = f"{np.mean(right):.1f}; {one.SHAPES[each.index(min(each))]} {min(each):.0f}"
    assert f"| {worst} |" in said.split("| frozen | 1 |")[1].split("\n")[0]
    assert Image.open(tmp_path / "rows.png").size == (900, 560)
    # Shapes, frozen, demo.
    assert Image.open(tmp_path / "rows_shapes.png").size == (150 + 20 * 48, 3 * 48 + 12)
    monkeypatch.setattr(experiment, "run", Mock(side_effect=RuntimeError))
    experiment.experiment(tmp_path, [0], names, tiny)


def test_scores_of_other_sizes(monkeypatch):
    """The reader of docs.score takes pictures of other sizes than 16x16; shapes have only these.

    A model of 32x32 pixels is refused without --pictures."""
    pictures = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    read = score.train_reader(pictures, torch.arange(8) % 2, steps=2, batch=4)
    classes, features = read(sample.to_float(pictures))
    assert classes.shape == (8,) and features.shape == (8, 128)
    monkeypatch.setattr(score, "reads_text", lambda path: False)
    monkeypatch.setattr(score.RepTok, "load", lambda path: Mock(pixels=32))
    monkeypatch.setattr(sys, "argv", ["score", "large.pt"])
    with pytest.raises(sample.UserError, match="large.pt does not draw 16x16 pixels: give --pict"):
        score.main()


def test_the_trained_model_keeps_its_scores():
    """docs/shapes.pt scores as it did when it was trained.

    So no change of the code breaks trained models unseen. The figures are those of this code on
    the day of the training; the tolerances are for other machines' rounding."""
    known = score.shapes(1500, score.READER)[:2]
    held_out = score.shapes(200, score.HELD_OUT)[:2]
    judge = score.Judge(known, held_out, steps=200)
    assert judge.right(judge.real, judge.labels)[0] >= 98
    model = RepTok.load(HERE / "docs" / "shapes.pt")
    scores = score.measure(model, judge, decoder_steps=5, steps=20, per_class=20)
    # Decibels, then percentages; two pictures are 1 %.
    assert abs(scores["PSNR from z"] - 26.87) < 0.1
    assert abs(scores["PSNR from z0"] - 14.73) < 0.1
    assert abs(scores["reconstructed, read right, %"] - 100) <= 2
    assert abs(scores["generated, read right, %"] - 99.5) <= 3
    assert scores["neighbours by z, %"] >= 99


def test_the_picture_of_the_lesson(trained, tmp_path, monkeypatch):
    """The lesson's picture begins with held-out pictures, none of them a training picture.

    The first three rows: pictures of all classes, none of them a training picture; their drawings;
    ten rows more."""
    shown = lesson.held_out(16)
    training = [one.draw_shape(one.plan_shape(i, 0), 16) for i in range(500)]
    assert not any(
        np.array_equal(fid.to_uint8(x).permute(1, 2, 0), y) for x in shown for y in training
    )
    monkeypatch.setattr(
        sys,
        "argv",
        ["lesson", str(trained / "out" / "stage2.pt"), "--out", str(tmp_path / "a.png")],
    )
    monkeypatch.setattr(lesson, "COLUMNS", 2)
    lesson.main()
    made = fid.decode(tmp_path / "a.png")
    assert made.shape == (13 * 48 + 12, 150 + 2 * 48, 3)
    assert np.array_equal(
        made[24:48:48, 150 + 24 :: 48], fid.to_uint8(shown[:2])[:, :, 8, 8].numpy()[None]
    )


def test_colours_and_area_are_read_from_a_picture():
    """The colours and the area read from a drawn shape are those of its plan.

    Of real shapes: the plan's own colours, and, for a circle, an area as geometry has it."""
    pictures, _, plans = score.shapes(100, 4)
    for picture, plan in zip(pictures, plans):
        ink, ground, area = score.ink_and_area(picture)
        assert np.abs(ground - plan.ground).max() < 1 and np.abs(ink - plan.ink).max() < 60, plan
        if plan.shape == "circle":
            assert abs(area / 256 - np.pi * plan.size**2) < 0.02


def test_the_diagram_is_what_its_script_draws(tmp_path):
    """docs/diagram.svg is what docs/diagram.py draws."""
    shutil.copy(HERE / "docs" / "diagram.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "diagram.py"], check=True)
    drawn = (tmp_path / "diagram.svg").read_bytes()
    assert drawn == (HERE / "docs" / "diagram.svg").read_bytes()
