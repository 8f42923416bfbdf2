"""Images -> tokens: a frozen vision transformer; only its token embedding is trained (RepTok, arXiv 2510.14630).

    vit = load_encoder("dinov2_vitb14_reg4_pretrain.pth")
    tokenizer = Tokenizer(vit)                       # only tokenizer.embedding, 768 numbers, takes a gradient
    z = tokenizer(images)                            # (B,3,H,W) in [-1,1] -> (B,1,768)
    loss = 0.1 * cosine_loss(z, tokenizer.z0(images)).mean()

The file stands alone (torch, standard library). Letters: B batch, K image tokens, R registers, N patches, D width.
"""
import copy
import gzip
import html
import json
import pickle
import re
import unicodedata
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of R, G, B in [0,1]
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

class UserError(ValueError):
    """An error that the user can correct: one sentence naming the file or option. Scripts print it and exit."""

class Attention(nn.Module):
    """Multi-head self-attention, (B,N,D) -> (B,N,D). The rows of `qkv` are q, k, v, each divided into heads."""
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, causal=False, mask=None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B,heads,N,D/heads)
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))                           # (B,N,D)

class MLP(nn.Module):
    """Linear, GELU (exact, or CLIP's x * sigmoid(1.702 x)), Linear; (B,N,D) -> (B,N,D)."""
    def __init__(self, width, hidden, quick_gelu):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.quick_gelu = quick_gelu

    def forward(self, x):
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick_gelu else F.gelu(x))

class Block(nn.Module):
    """Pre-norm transformer block, (B,N,D) -> (B,N,D). layer_scale: a factor per channel on each branch (DINOv2)."""
    def __init__(self, width, heads, hidden, eps, layer_scale=False, quick_gelu=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.norm2 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads)
        self.mlp = MLP(width, hidden, quick_gelu)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)} if layer_scale else {})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)} if layer_scale else {})

    def forward(self, x, causal=False, mask=None):
        x = x + self.attn(self.norm1(x), causal, mask) * self.ls1.get("gamma", 1)
        return x + self.mlp(self.norm2(x)) * self.ls2.get("gamma", 1)

class ViT(nn.Module):
    """The vision transformer (Dosovitskiy 2021) of DINOv2 (Oquab, Darcet 2023), MAE and CLIP; DINOv2's tensor names.
    forward: normalised images (B,3,H,W), H and W multiples of `patch` -> (B,1+R+N,D): class token, registers, patches.
    `pixels`, `mean`, `std`: the size and the statistics of images that it expects; Tokenizer applies them. `position`:
    how the grid x grid position embedding is resized, "offset" (DINOv2 without registers) or "size" (all others)."""
    def __init__(self, width=128, depth=3, heads=4, hidden=None, patch=4, grid=4, registers=0, layer_scale=False,
                 pre_norm=False, quick_gelu=False, patch_bias=True, eps=1e-6, position="size", pixels=16,
                 mean=(0.5,) * 3, std=(0.5,) * 3):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.patch = patch
        self.pixels = pixels
        self.checkpointing = False
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch, bias=patch_bias)})
        self.cls_token = nn.Parameter(0.5 * torch.randn(1, 1, width))  # 0.5, not the usual 0.02: with less,
        self.register_tokens = nn.Parameter(0.5 * torch.randn(1, registers, width))  # a few hundred steps learn nothing
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 1 + grid * grid, width))
        self.norm_pre = nn.LayerNorm(width, eps) if pre_norm else nn.Identity()
        hidden = hidden or 4 * width
        self.blocks = nn.ModuleList(Block(width, heads, hidden, eps, layer_scale, quick_gelu) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)

    def prefix(self):
        """The learned embeddings in front of the patches, (1,1+R,D): class token, registers."""
        return torch.cat([self.cls_token, self.register_tokens], 1)

    def patch_positions(self, h, w):
        """Position embedding of an h x w grid of patches, (1,h*w,D)."""
        n = self.config["grid"]
        if h == w == n:
            return self.pos_embed[:, 1:]
        pos = self.pos_embed[:, 1:].view(1, n, n, -1).permute(0, 3, 1, 2)              # (1,D,n,n)
        if self.config["position"] == "offset":  # DINOv2 passes the scale (h+.1)/n, not the size
            pos = F.interpolate(pos, scale_factor=((h + 0.1) / n, (w + 0.1) / n), mode="bicubic")
        else:
            pos = F.interpolate(pos, size=(h, w), mode="bicubic", antialias=True)
        return pos.flatten(2).mT                                                       # (1,h*w,D)

    def forward(self, x, prefix=None):
        B, _, H, W = x.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"images of {H}x{W} pixels cannot be cut into patches of {self.patch}x{self.patch}")
        prefix = self.prefix() if prefix is None else prefix                           # (1,1+R,D)
        patches = self.patch_embed.proj(x).flatten(2).mT                               # (B,N,D)
        patches = patches + self.patch_positions(H // self.patch, W // self.patch)
        cls = prefix[:, :1] + self.pos_embed[:, :1]  # registers have no position
        x = torch.cat([cls.expand(B, -1, -1), prefix[:, 1:].expand(B, -1, -1), patches], 1)  # (B,1+R+N,D)
        x = self.norm_pre(x)
        for block in self.blocks:
            twice = self.checkpointing and torch.is_grad_enabled()  # recompute activations in the backward pass
            x = checkpoint(block, x, use_reentrant=False) if twice else block(x)
        return self.norm(x)

def resize(x, size):
    """(B,3,H,W) -> (B,3,size,size): central square, average pooling by a whole factor, bilinear for the rest."""
    H, W = x.shape[-2:]
    side = min(H, W)
    x = x[..., round((H - side) / 2):, round((W - side) / 2):][..., :side, :side]
    x = F.avg_pool2d(x, max(1, side // size))
    return x if x.shape[-1] == size else F.interpolate(x, (size, size), mode="bilinear", align_corners=False)

class Tokenizer(nn.Module):
    """RepTok's encoder: the frozen ViT; the input embedding of the K tokens that are read out is trained.
    token:    "cls" (the class token, K=1, as in the paper), "reg" (register number `reg_index`, K=1) or "all" (K=1+R).
    unfreeze: "token" (as in the paper), "none" (no training) or "all" (all, except embeddings of tokens not read).
    Raises UserError where `token` needs registers that the ViT does not have."""
    def __init__(self, vit, token="cls", reg_index=0, unfreeze="token"):
        super().__init__()
        registers = vit.register_tokens.shape[1]
        if token != "cls" and not 0 <= reg_index < registers:
            raise UserError(f"--token {token} --reg-index {reg_index}: this encoder has {registers} registers; try cls")
        index = {"cls": [0], "reg": [1 + reg_index], "all": list(range(1 + registers))}[token]
        self.config = {"vit": vit.config, "token": token, "reg_index": reg_index, "unfreeze": unfreeze}
        self.vit = vit
        self.K = len(index)
        self.width = vit.pos_embed.shape[-1]
        vit.requires_grad_(unfreeze == "all")
        # z0 comes from vit, whose own embeddings stay as they are, or from a copy if all of vit is trained
        self.original = copy.deepcopy(vit).requires_grad_(False) if unfreeze == "all" else None
        self.embedding = nn.Parameter(vit.prefix()[:, index].detach().clone(), unfreeze != "none")  # (1,K,D)
        vit.cls_token.requires_grad_(False)
        vit.register_tokens.requires_grad_(False)
        self.register_buffer("index", torch.tensor(index), persistent=False)
        self.register_buffer("mean", torch.tensor(vit.config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(vit.config["std"]).view(3, 1, 1), persistent=False)

    def normalise(self, images):
        """(B,3,H,W) in [-1,1], any size -> what the ViT expects, (B,3,pixels,pixels) normalised."""
        return ((resize(images, self.vit.pixels) + 1) / 2 - self.mean) / self.std

    def forward(self, images):
        """z = E(x): (B,3,H,W) in [-1,1] -> tokens (B,K,D), with gradient to the trained embedding (Sec. 3, Eq. 2)."""
        prefix = self.vit.prefix().index_copy(1, self.index, self.embedding)           # (1,1+R,D)
        return self.vit(self.normalise(images), prefix)[:, self.index]                 # (B,K,D)

    @torch.no_grad()
    def z0(self, images):
        """z0, the target of Eq. 3: the tokens that the original embedding gives, without gradient, (B,K,D)."""
        return (self.original or self.vit)(self.normalise(images))[:, self.index]

def cosine_loss(z, z0):
    """Eq. 3 without its lambda: 1 - cos(z, z0), averaged over the K tokens. (B,K,D), (B,K,D) -> (B,)."""
    return 1 - F.cosine_similarity(z.float(), z0.float(), dim=-1).mean(1)

# ---- A small self-supervised encoder, where DINOv2 cannot be downloaded (SimCLR, Chen 2020, on very small images)
def augment(images, generator):
    """A random view of each image, (B,3,H,W) -> (B,3,H,W): small affine move, rotation of the colours, gain, offset."""
    B = len(images)
    def uniform(*shape):  # in [-1,1)
        return torch.rand(shape, generator=generator, device=images.device) * 2 - 1
    angle = uniform(B) * 0.1
    cos, sin = (1 + 0.05 * uniform(B)) * torch.stack([angle.cos(), angle.sin()])
    affine = torch.stack([cos, -sin, 0.075 * uniform(B), sin, cos, 0.075 * uniform(B)], 1).view(B, 2, 3)
    grid = F.affine_grid(affine, images.shape, align_corners=False)                    # (B,H,W,2)
    x = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    mix = torch.linalg.qr(torch.randn(B, 3, 3, generator=generator, device=images.device))[0]  # a random rotation
    x = torch.einsum("bij,bjhw->bihw", mix, x)
    return x * (1 + 0.3 * uniform(B, 1, 1, 1)) + 0.3 * uniform(B, 3, 1, 1)

def contrastive_loss(a, b, temperature=0.1):
    """NT-Xent (Chen 2020, Eq. 1): (B,E), (B,E) -> scalar; each row has to find its partner among 2B-1 other rows."""
    x = F.normalize(torch.cat([a, b]).float(), dim=1)
    logits = (x @ x.T / temperature).fill_diagonal_(float("-inf"))                     # (2B,2B)
    return F.cross_entropy(logits, torch.arange(2 * len(a), device=x.device).roll(len(a)))

# ---- Reading weight files. torch.load(weights_only=True), as in decoder.py, would refuse OpenAI's CLIP archives.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
KINDS = "Double Float Half BFloat16 Bool Long Int Short Char Byte".split()  # torch's names of these, in this order
STORAGES = {f"torch.{kind}Storage": dtype for kind, dtype in zip(KINDS, DTYPES.values())}

class Inert(dict):
    """Placeholder for every class or function named in a pickle. Runs nothing; a pickled state becomes its items."""
    def __init__(self, *args, **kwargs):
        """Ignores its arguments; calling an instance does nothing either."""

    # a pickle calls append and extend on list subclasses, as_strided on complex or quantized tensors: all ignored
    __call__ = append = extend = as_strided = __init__
    __hash__ = object.__hash__  # so that it can be a key

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)

def numbers(storage, dtype):
    """A flat tensor over bytes of the mapped file; they are read only when used, so optimizer states cost nothing."""
    aligned = storage.data_ptr() % dtype.itemsize == 0
    return torch.empty(0, dtype=dtype).set_(storage if aligned else storage.clone())

class SafeUnpickler(pickle.Unpickler):
    """Reads a zip of torch.save or torch.jit.save. It can call nothing but what find_class returns, so no code runs."""
    def __init__(self, archive, file):
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        super().__init__(archive.open(name), encoding="bytes")
        self.archive = archive
        self.file = file
        self.folder = name.removesuffix("data.pkl")

    def find_class(self, module, name):
        known = STORAGES | {  # functions are made anew for each name, because a pickle can set attributes of them
            "torch._utils._rebuild_tensor_v2": lambda x, offset, size, stride, *_: x.as_strided(size, stride, offset),
            "torch._utils._rebuild_parameter": lambda data, *_: data}
        return known.get(f"{module}.{name}", Inert)

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        if not isinstance(dtype, torch.dtype):  # complex or quantized numbers
            return Inert()
        member = self.archive.getinfo(f"{self.folder}data/{key}")
        start = member.header_offset + 30  # a header, which ends in the lengths of two fields before the data
        start += sum(numbers(self.file[start - 4:start], torch.uint16).tolist())
        data = self.file[start:start + member.file_size]
        if member.compress_type != zipfile.ZIP_STORED and member.file_size:  # never by torch
            data = torch.frombuffer(bytearray(self.archive.read(member)), dtype=torch.uint8).untyped_storage()
        return numbers(data, dtype)

def read_safetensors(file):
    """{name: tensor} of a .safetensors file: the length of the header, the header in JSON, the bytes of the tensors."""
    length = int.from_bytes(bytes(file[:8]), "little")
    header = json.loads(bytes(numbers(file[8:8 + length], torch.uint8).tolist()))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = numbers(file[start:end], DTYPES[entry["dtype"]]).view(entry["shape"])
    return tensors

def read_file(path):
    """The dict in a weight file or checkpoint, whatever its name; runs no code of the file. Raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; give the path of a weight file")
    try:
        file = torch.UntypedStorage.from_file(str(path), False, Path(path).stat().st_size)  # mapped, never written
        if bytes(file[8:9]) == b"{":
            return read_safetensors(file)
        with zipfile.ZipFile(path) as archive:
            return dict(SafeUnpickler(archive, file).load())
    except Exception as e:  # a damaged file can raise anything
        why = " ".join(str(e).split())[:120] or type(e).__name__
        raise UserError(f"{path}: damaged, or not a safetensors or torch >= 1.6 file ({why}); give another") from None

def flatten(node, prefix=""):
    """{dotted name: tensor} of nested dicts and modules."""
    found = {f"{prefix}{key}": value for key, value in node.items() if isinstance(value, torch.Tensor)}
    for key, value in node.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{key}.")
    return found

def read_tensors(path):
    """{name: tensor} of a weight file in any of the formats above. Raises UserError."""
    tree = read_file(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(tree.get(wrapper), dict):
            tree = tree[wrapper]
    return flatten(tree)

def fit(module, tensors, path, what):
    """Load `tensors` into `module` as float32, leaving out what is no tensor of floats. Raises UserError."""
    tensors = {str(name): t.to(torch.float32, copy=True) for name, t in tensors.items()  # copies: the file may change
               if isinstance(t, torch.Tensor) and t.is_floating_point()}
    try:
        module.load_state_dict(tensors, assign=True)  # assign: the module may have been made on the meta device
    except RuntimeError as e:
        raise UserError(f"{path}: not {what}; give another file ({' '.join(str(e).split())[:500]})") from None
    return module

# ---- Image encoders: a layout is a table of renamings into DINOv2's names
HF_VIT = [(r"^((vit|dinov2|dinov2_with_registers)\.)?(embeddings\.)?", ""), (r"^position_embeddings", "pos_embed"),
          (r"^patch_embeddings\.projection", "patch_embed.proj"), (r"^(encoder\.)?layers?\.", "blocks."),
          (r"attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r"attn.\2."), (r"^layernorm\.", "norm."),
          (r"attention\.(output\.dense|o_proj)", "attn.proj"), (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
          (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
          (r"intermediate\.dense", "mlp.fc1"), (r"(blocks\.\d+)\.output\.dense", r"\1.mlp.fc2")]
CLIP_BLOCK = [  # of OpenAI and of Hugging Face
    (r"(transformer\.resblocks|encoder\.layers)\.", "blocks."), (r"\.(ln_|layer_norm)([12])\.", r".norm\2."),
    (r"attn\.in_proj_", "attn.qkv."), (r"self_attn\.(q|k|v)_proj\.", r"attn.\1."), (r"mlp\.c_fc", "mlp.fc1"),
    (r"(self_)?attn\.out_proj", "attn.proj"), (r"mlp\.c_proj", "mlp.fc2")]
CLIP_IMAGE = [(r"^(visual|vision_model)\.(embeddings\.)?", ""), (r"^(conv1|patch_embedding)\.", "patch_embed.proj."),
              (r"^class_embedding", "cls_token"), (r"^position(al_embedding|_embedding\.weight)", "pos_embed"),
              (r"^(ln_pre|pre_layrnorm)\.", "norm_pre."), (r"^(ln_post|post_layernorm)\.", "norm."), *CLIP_BLOCK]
NOT_IMAGE = r"mask_token$|^decoder|position_ids$|^head\.|^pooler\.|^(visual\.)?proj$"  # other contents of such files

def rename(tensors, table):
    """Apply a layout's (pattern, replacement) pairs to every name; join q, k and v, which some layouts keep apart."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    for name in [name for name in out if "attn.q." in name]:
        parts = [name.replace("attn.q.", f"attn.{part}.") for part in "qkv"]
        out[name.replace("attn.q.", "attn.qkv.")] = torch.cat([out.pop(part) for part in parts])
    return out

def heads_of(width):
    """Number of heads, which no file stores: each is 64 wide, or 32 in tiny models. ValueError if neither fits."""
    heads = max(1, width // (32 if width % 64 else 64))
    if width % heads:
        raise ValueError(f"width {width} does not divide into heads of 64 or 32")
    return heads

def vit_from(tensors, path, gelu=None):
    """A frozen ViT of the shapes found in `tensors`, named as by DINOv2 or as in a table above. Raises UserError.
    gelu="exact": for CLIP files not trained with OpenAI's QuickGELU; names and shapes do not show which they are."""
    what = "an image encoder (DINOv2, MAE or CLIP)"
    clip = "visual.class_embedding" in tensors or "vision_model.embeddings.class_embedding" in tensors
    tensors = {k: v for k, v in tensors.items() if not clip or k.startswith(("visual.", "vision_model."))}
    try:
        tensors = rename(tensors, CLIP_IMAGE if clip else HF_VIT)  # DINOv2's and MAE's own names stay as they are
        tensors = {k: v for k, v in tensors.items() if not re.search(NOT_IMAGE, k)}
        width = tensors["pos_embed"].shape[-1]
        tensors["cls_token"] = tensors["cls_token"].reshape(1, 1, -1)
        tensors["pos_embed"] = tensors["pos_embed"].reshape(1, -1, width)
        tensors.setdefault("register_tokens", torch.zeros(1, 0, width))
        registers = tensors["register_tokens"].shape[1]
        patch = tensors["patch_embed.proj.weight"].shape[3]
        grid = int((tensors["pos_embed"].shape[1] - 1) ** 0.5)
        hidden = len(tensors["blocks.0.mlp.fc1.weight"])
        depth = len({k.split(".")[1] for k in tensors if k.startswith("blocks.")})
        dino = "blocks.0.ls1.gamma" in tensors  # DINOv2 is used with 16 x 16 patches, 224 pixels, not with its 518
        mean, std = CLIP if clip else IMAGENET
        with torch.device("meta"):  # no memory yet
            vit = ViT(width, depth, heads_of(width), hidden, patch, grid, registers, layer_scale=dino, pre_norm=clip,
                      quick_gelu=clip and gelu != "exact", patch_bias=not clip, eps=1e-5 if clip else 1e-6, mean=mean,
                      std=std, pixels=patch * (16 if dino else grid),
                      position="offset" if dino and not registers else "size")
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not {what}; give one (missing or bad: {e}; has {', '.join(tensors)[:200]})") from None
    return fit(vit, tensors, path, what).requires_grad_(False)

OPENAI = "https://openaipublic.azureedge.net/clip/models"
PUBLISHED = {  # name: address; --encoder and --clip take either the name or a path
    "dinov2_vitb14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vitb14_reg": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "mae_vitb16": "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth",
    "clip_vitb16": f"{OPENAI}/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "clip_vitl14": f"{OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt"}

def weight_file(name_or_path):
    """A path as it is; a name of PUBLISHED is downloaded, with progress, to torch.hub's folder. Raises UserError."""
    if name_or_path not in PUBLISHED or Path(name_or_path).exists():
        return Path(name_or_path)
    url = PUBLISHED[name_or_path]
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = re.search(r"/([0-9a-f]{64})/", url)  # part of CLIP's addresses
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256[1] if sha256 else None)
        except (OSError, RuntimeError) as e:
            raise UserError(f"{name_or_path}: not loaded ({e}); put {url} into {path.parent}, or give a path") from None
    return path

def load_encoder(path, gelu=None):
    """A frozen ViT by path or name: DINOv2, MAE, or CLIP's image tower; gelu as in vit_from. Raises UserError."""
    path = weight_file(path)
    content = read_file(path)
    if content.get("kind") != "encoder":
        return vit_from(read_tensors(path), path, gelu)
    with torch.device("meta"):  # OUT/encoder.pt of train_stage1.py, which stores the arguments of its ViT
        vit = ViT(**content["config"])
    return fit(vit, content["state"], path, "an encoder").requires_grad_(False)

# ---- Text: CLIP's byte-pair tokenizer and transformer (Radford 2021, arXiv 2103.00020), and a small word encoder
QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
# special token, ending of a contraction, run of letters, one digit, run of anything else
PIECES = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\w\s]|_)+")

class BPE:
    """CLIP's tokenizer: BPE(vocabulary)(captions) -> ids (B,77), int64: start, the caption, end, zeros.
    vocabulary: the path or the bytes of bpe_simple_vocab_16e6.txt.gz (https://github.com/openai/CLIP/tree/main/clip).
    A longer caption is cut and keeps its end; `len(bpe.encode(s)) > bpe.context` tells. Raises UserError."""
    context = 77

    def __init__(self, vocabulary):
        self.path = "the vocabulary in the checkpoint" if isinstance(vocabulary, bytes) else vocabulary
        # the ids 0..255 are the bytes, printable ones first; the file writes the others as the characters from 256 on
        order = sorted(range(256), key=lambda byte: byte < 33 or 126 < byte < 161 or byte == 173)
        symbols = [chr(byte) for byte in order[:188]] + [chr(256 + i) for i in range(68)]
        ids = {symbol: i for i, symbol in enumerate(symbols + [symbol + "</w>" for symbol in symbols])}  # </w> ends it
        self.byte = {byte: i for i, byte in enumerate(order)}
        self.merges = {}  # (id, id) -> id of the two joined, in the order of the file
        try:
            self.file = vocabulary if isinstance(vocabulary, bytes) else Path(vocabulary).read_bytes()
            lines = gzip.decompress(self.file).decode().splitlines()[1:48895]  # CLIP uses 49152-256-2 of 262144
            for line in lines:
                first, second = line.split()
                ids[first + second] = len(ids)
                self.merges[ids[first], ids[second]] = ids[first + second]
            if not lines or len(ids) != 512 + len(lines):
                raise ValueError("no merges, or one of them twice")
        except Exception as e:  # a damaged file can raise anything
            raise UserError(f"{self.path} is not CLIP's bpe_simple_vocab_16e6.txt.gz ({e}); get it again") from None
        self.start = len(ids)
        self.end = len(ids) + 1
        self.size = len(ids) + 2  # 49408 for CLIP
        self.words = {"<|startoftext|>": [self.start], "<|endoftext|>": [self.end]}  # ids of all words met so far

    def _word(self, word):
        """Ids of one word: join the pair of neighbours that comes first in the file, until there is none."""
        ids = [self.byte[b] for b in word.encode(errors="replace")]
        ids[-1] += 256
        while True:
            found = [(self.merges[pair], i) for i, pair in enumerate(zip(ids, ids[1:])) if pair in self.merges]
            if not found:
                return ids
            joined, i = min(found)
            ids[i:i + 2] = [joined]

    def encode(self, text):
        """All ids of one caption as a list, start and end included, not cut; web captions are often escaped twice."""
        text = unicodedata.normalize("NFC", html.unescape(html.unescape(text))).translate(QUOTES)
        ids = []
        for word in PIECES.findall(" ".join(text.split()).lower()):
            if word not in self.words:
                self.words[word] = self._word(word)
            ids += self.words[word]
        return [self.start, *ids, self.end]

    def __call__(self, captions):
        rows = [ids[:-1][:self.context - 1] + ids[-1:] for ids in map(self.encode, captions)]
        rows = [row + [0] * (self.context - len(row)) for row in rows]
        return torch.tensor(rows, dtype=torch.long).view(-1, self.context)

class TextTower(nn.Module):
    """CLIP's causal text transformer, LayerNorm eps 1e-5; ids (B,L), L <= context -> features (B,L,C)."""
    def __init__(self, vocabulary, context, width, depth, out, quick_gelu=True):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.zeros(context, width))
        heads = heads_of(width)
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, 1e-5, quick_gelu=quick_gelu) for _ in range(depth))
        self.ln_final = nn.LayerNorm(width, 1e-5)
        self.text_projection = nn.Parameter(torch.zeros(width, out))

    def forward(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[:ids.shape[1]]       # (B,L,C)
        for block in self.blocks:
            x = block(x, causal=True)
        return self.ln_final(x)

    def embed(self, ids):
        """ids (B,L) -> (B,E), the projected feature at the end token, which is the largest id; the first one counts."""
        x = self(ids)[torch.arange(len(ids), device=ids.device), ids.argmax(-1)]       # (B,C)
        return x @ self.text_projection                                                # (B,E)

CLIP_TEXT = [(r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
             (r"^text_model\.(embeddings\.)?", ""), (r"^final_layer_norm\.", "ln_final."), *CLIP_BLOCK]
TEXT = r"^(text_model|transformer|token_emb|positional_emb|ln_final|text_projection).*(?<!position_ids)(?<!attn_mask)$"

def load_text_encoder(path, gelu=None):
    """CLIP's frozen text tower by path or name, OpenAI's or Hugging Face's; gelu as in vit_from. Raises UserError."""
    path = weight_file(path)
    tensors = {k: v for k, v in read_tensors(path).items() if re.search(TEXT, k)}
    try:
        tensors = rename(tensors, CLIP_TEXT)
        if "text_projection.weight" in tensors:  # Hugging Face's is transposed; where square, the shape does not tell
            tensors["text_projection"] = tensors.pop("text_projection.weight").t().contiguous()
        vocabulary, width = tensors["token_embedding.weight"].shape
        context = len(tensors["positional_embedding"])
        depth = len({k.split(".")[1] for k in tensors if k.startswith("blocks.")})
        with torch.device("meta"):  # no memory yet
            tower = TextTower(vocabulary, context, width, depth, tensors["text_projection"].shape[1], gelu != "exact")
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"{path}: not a CLIP text tower; give one (missing or bad: {e})") from None
    return fit(tower, tensors, path, "a CLIP text tower").requires_grad_(False).eval()

class WordEncoder(nn.Module):
    """A small text encoder over whole words, trained along with the Mixer: ids (B,L) -> features (B,L,C)."""
    def __init__(self, words, width=64, depth=2, context=24):
        super().__init__()
        self.config = {"words": list(words), "width": width, "depth": depth, "context": context}
        self.number = {word: i + 2 for i, word in enumerate(words)}
        self.context = context
        self.width = width
        self.embedding = nn.Embedding(len(words) + 2, width)
        self.position = nn.Parameter(0.5 * torch.randn(context, width))
        self.blocks = nn.ModuleList(Block(width, heads_of(width), 4 * width, 1e-6) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def split(caption):
        """Words, numbers and punctuation marks of a caption, in lower case."""
        return re.findall(r"\w+|[^\w\s]", caption.lower())

    def ids(self, captions):
        """Captions, truncated to `context` words -> (B,L) int64: 0 for padding, 1 for an unknown word."""
        words = [self.split(caption)[:self.context] for caption in captions]
        rows = [torch.tensor([self.number.get(word, 1) for word in row] or [0]) for row in words]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def mask(self, ids):
        """Where words stand, (B,L) bool."""
        return ids > 0

    def forward(self, ids):
        x = self.embedding(ids) + self.position[:ids.shape[1]]                         # (B,L,C)
        for block in self.blocks:
            x = block(x, mask=self.mask(ids)[:, None, None])
        return self.norm(x)

class ClipText(nn.Module):
    """CLIP's tower and BPE(vocabulary) with the methods of WordEncoder; frozen. Raises UserError if they do not fit."""
    def __init__(self, tower, vocabulary):
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.bpe = BPE(vocabulary)
        self.split = self.bpe.encode
        self.context = self.bpe.context
        self.width = tower.config["width"]
        if self.bpe.size != tower.config["vocabulary"]:
            raise UserError(f"{self.bpe.path}: a vocabulary of {self.bpe.size}, not the text tower's; use CLIP's file")
        self.config = {"tower": tower.config, "vocabulary": torch.tensor([*self.bpe.file], dtype=torch.uint8)}

    def ids(self, captions):
        ids = self.bpe(captions)
        return ids[:, :1 + ids.argmax(1).max()]  # nothing after the last end token

    def mask(self, ids):
        """Where the caption stands, up to its end token, (B,L) bool."""
        return torch.arange(ids.shape[1], device=ids.device) <= ids.argmax(1, keepdim=True)

    @torch.no_grad()
    def forward(self, ids):
        return self.tower(ids)
