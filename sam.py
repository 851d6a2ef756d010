"""Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): image encoder, prompt encoder, decoder.

Checked against transformers' SamModel. Modules are named as there; Meta's names are mapped on loading.
Here one call takes B images, each with its own prompts; the relative position bias is never an n^2 x n^2
matrix (see `attend`); neck and positional encoding stay in fp32 under autocast. Left out: the automatic
mask generator and the resizing of images. Needs torch and safetensors.

B images, N prompts (N = B k, k consecutive ones per image), D encoder width, d head width, C prompt
width, e side of the encoder's grid (image_size / patch), n side of a window or grid, H W sides of a grid
in cells, P points, M sparse prompt tokens, T decoder tokens.
"""
import math
import pickle
import re
import textwrap
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

NUM_MASK_TOKENS = 4   # mask 0 answers an unambiguous prompt; 1-3 are whole, part and subpart
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)
LARGE_GRID = 32       # from this side on a CPU uses attend_by_rows; windows have 14, the grid 64

@dataclass(frozen=True)
class SAMConfig:
    width: int
    layers: int
    heads: int
    global_layers: tuple       # these attend to the whole image, the others inside windows
    image_size: int = 1024     # side of the input in pixels
    patch: int = 16            # side of a patch in pixels
    window: int = 14
    prompt_width: int = 256
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    stem: tuple = ()           # widths of stride-2 convolutions before the patch embedding (tiny)

CONFIGS = {
    "b": SAMConfig(width=768, layers=12, heads=12, global_layers=(2, 5, 8, 11)),
    "l": SAMConfig(width=1024, layers=24, heads=16, global_layers=(5, 11, 17, 23)),
    "h": SAMConfig(width=1280, layers=32, heads=16, global_layers=(7, 15, 23, 31)),
    "tiny": SAMConfig(width=64, layers=3, heads=2, global_layers=(2,), image_size=96, patch=8, window=6,
                      prompt_width=64, decoder_mlp=128, decoder_heads=2, stem=(24, 48)),
}

class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):                                       # over the channels of (B, C, H, W)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class MLP(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.lin1 = nn.Linear(width, hidden)
        self.lin2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x):
        return self.lin2(self.activation(self.lin1(x)))

# ----------------------------------------------------------------------------------------- image encoder
def window_partition(x, n):
    """(B, H, W, D) -> (B * windows, n, n, D), zero-padded at the right and bottom to multiples of n.
    As published, the attention inside a window sees the padding."""
    _, H, W, _ = x.shape
    x = F.pad(x, (0, 0, 0, -W % n, 0, -H % n))                  # from the last dimension: D, W, H
    x = x.unflatten(2, (-1, n)).unflatten(1, (-1, n))           # (B, rows, n, columns, n, D)
    return x.transpose(2, 3).flatten(0, 2)

def window_unpartition(windows, H, W):
    """(B * rows * columns, n, n, D) -> (B, H, W, D), the padding removed."""
    n = windows.shape[1]
    x = windows.unflatten(0, (-1, math.ceil(H / n), math.ceil(W / n)))     # (B, rows, columns, n, n, D)
    x = x.transpose(2, 3).flatten(3, 4).flatten(1, 2)                      # (B, rows n, columns n, D)
    return x[:, :H, :W]

def attend(q, k, v, row_bias, column_bias):
    """softmax(q.k / sqrt(d) + bias) v over an n x n grid; q, k, v and the result (B, heads, n * n, d).
    The biases are (B, heads, n, n, n): row and column of the query, then row or column of the key.

    As an n^2 x n^2 matrix the bias of one global layer of SAM-b takes 0.4 GB per image in bf16. But
    plain attention on wider queries and keys adds it by itself: q.k / sqrt(d) + bias =
    (q / sqrt(d), row_bias, column_bias) . (k, one-hot code of its row, one-hot code of its column)."""
    n = row_bias.shape[-1]
    d = q.shape[-1]
    extra = -(d + 2 * n) % 8                # zeros: fast kernels want widths that are multiples of 8
    zeros = q.new_zeros(*q.shape[:3], extra)
    one_hot = torch.eye(n, dtype=k.dtype, device=k.device)
    codes = torch.cat([one_hot.repeat_interleave(n, 0), one_hot.repeat(n, 1)], 1)     # (n * n, 2n)
    q = torch.cat([q * d ** -0.5, row_bias.flatten(2, 3), column_bias.flatten(2, 3), zeros], -1)
    k = torch.cat([k, codes.expand(*k.shape[:2], -1, -1), zeros], -1)       # (..., d + 2n + extra)
    v = F.pad(v, (0, 2 * n + extra))        # the fused kernel needs one width for q, k and v
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]

def attend_row(q, k, v, row_bias, column_bias):
    """`attend` for one row: q (B, heads, n, d), k and v as there, biases (B, heads, n, n of keys)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)                     # (B, heads, n, n * n)
    scores = scores.unflatten(3, (q.shape[2], -1))       # (B, heads, query, row of key, column of key)
    scores += row_bias[..., None]
    scores += column_bias[..., None, :]
    return scores.flatten(3).softmax(-1) @ v

def attend_by_rows(q, k, v, row_bias, column_bias):
    """`attend`, one row of queries at a time, so that the scores stay in a CPU's cache: for speed only.
    The backward pass computes them again."""
    k = k.contiguous()
    v = v.contiguous()
    n = row_bias.shape[2]
    outputs = []
    for q_row, r, c in zip(q.unflatten(2, (n, n)).unbind(2), row_bias.unbind(2), column_bias.unbind(2)):
        outputs.append(checkpoint(attend_row, q_row, k, v, r, c, use_reentrant=False))
    return torch.cat(outputs, 2)

class Attention(nn.Module):
    """Self-attention over an n x n grid with decomposed relative positions (ViTDet, arXiv:2203.16527):
    bias = q . Rh[row of q - row of k] + q . Rw[column of q - column of k]."""

    def __init__(self, width, heads, n):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * n - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * n - 1, width // heads))

    def forward(self, x):                                  # (B, n, n, D), a window counts as an image
        B, n, _, D = x.shape
        qkv = self.qkv(x).reshape(B, n * n, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # (B, heads, n * n, d) each
        position = torch.arange(n, device=x.device)
        offset = position[:, None] - position + n - 1                      # (n, n), 0 to 2n - 2
        grid = q.unflatten(2, (n, n))                                      # (B, heads, n, n, d)
        row_bias = torch.einsum("bhyxd,ykd->bhyxk", grid, self.rel_pos_h[offset])    # k: row of the key
        column_bias = torch.einsum("bhyxd,xkd->bhyxk", grid, self.rel_pos_w[offset])
        # `attend` multiplies more, and is faster still, but for large grids on a CPU without AMX (bf16).
        fast_products = x.is_cuda or (q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())
        attention = attend if fast_products or n < LARGE_GRID else attend_by_rows
        x = attention(q, k, v, row_bias, column_bias)
        return self.proj(x.transpose(1, 2).reshape(B, n, n, D))

class EncoderLayer(nn.Module):
    """Attention inside windows of n x n positions; a window as large as the grid makes it global."""

    def __init__(self, config, n):
        super().__init__()
        self.n = n
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads, n)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config.width, 4 * config.width, nn.GELU())

    def forward(self, x):                                                  # (B, e, e, D)
        _, H, W, _ = x.shape
        windows = self.attn(window_partition(self.layer_norm1(x), self.n))
        x = x + window_unpartition(windows, H, W)
        return x + self.mlp(self.layer_norm2(x))

class PatchEmbed(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = (3, *config.stem)
        stem = []
        for c_in, c_out in zip(widths, widths[1:]):             # each halves the side
            conv = nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1, bias=False)
            stem += [conv, nn.BatchNorm2d(c_out), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        patch = config.patch // 2 ** len(config.stem)
        self.projection = nn.Conv2d(widths[-1], config.width, patch, patch)

    def forward(self, pixels):                                             # -> (B, e, e, D)
        return self.projection(self.stem(pixels)).permute(0, 2, 3, 1)

class ImageEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        e = config.image_size // config.patch
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.randn(1, e, e, config.width) * 0.02)    # weights replace it
        sides = [e if i in config.global_layers else config.window for i in range(config.layers)]
        self.layers = nn.ModuleList([EncoderLayer(config, n) for n in sides])
        C = config.prompt_width
        self.neck = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(config.width, C, 1, bias=False),
            layer_norm1=LayerNorm2d(C, eps=1e-6),
            conv2=nn.Conv2d(C, C, 3, padding=1, bias=False),
            layer_norm2=LayerNorm2d(C, eps=1e-6)))
        self.checkpoint_activations = False      # True: recompute each layer in the backward pass

    def forward(self, pixels):               # (B, 3, image_size, image_size) -> F_sam (B, C, e, e)
        x = self.patch_embed(pixels) + self.pos_embed                           # (B, e, e, D)
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        # In fp32: the neck is under 1 % of the work, but in bf16 it would add to the error of F_sam.
        with torch.autocast(x.device.type, enabled=False):
            return self.neck(x.permute(0, 3, 1, 2).float())

# ---------------------------------------------------------------------------------------- prompt encoder
class PositionalEncoding(nn.Module):
    """Random Fourier features of positions (x, y) in [0, 1]^2: (..., 2) -> (..., C)."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("positional_embedding", torch.randn(2, channels // 2))

    def forward(self, xy):
        x, y = (2 * xy.float() - 1).split(1, -1)
        fx, fy = self.positional_embedding.float()
        angles = 2 * math.pi * (x * fx + y * fy)                # autocast would round a matmul to bf16
        return torch.cat([angles.sin(), angles.cos()], -1)

    def grid(self, n):
        """Returns (1, C, n, n): the encoding of each cell's centre."""
        centres = (torch.arange(n, device=self.positional_embedding.device) + 0.5) / n
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self(torch.stack([x, y], -1)).permute(2, 0, 1)[None]

class PromptEncoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.image_size = config.image_size
        self.e = config.image_size // config.patch
        C = config.prompt_width
        self.mask_embed = nn.Sequential(OrderedDict(                # mask logits -> dense prompt
            conv1=nn.Conv2d(1, 4, kernel_size=2, stride=2),
            layer_norm1=LayerNorm2d(4, eps=1e-6), gelu1=nn.GELU(),
            conv2=nn.Conv2d(4, 16, kernel_size=2, stride=2),
            layer_norm2=LayerNorm2d(16, eps=1e-6), gelu2=nn.GELU(),
            conv3=nn.Conv2d(16, C, kernel_size=1)))
        self.no_mask_embed = nn.Embedding(1, C)
        self.not_a_point_embed = nn.Embedding(1, C)
        # Learned embeddings of: background point, foreground point, first and second corner of a box.
        self.point_embed = nn.ModuleList([nn.Embedding(1, C) for _ in range(4)])

    def forward(self, points=None, labels=None, boxes=None, masks=None, positional_encoding=None):
        """RSRefSeg passes masks, (N, 1, 4e, 4e) logits, or nothing, and needs the last five lines only.
        Points and boxes are for SAM alone: points (N, P, 2) are x, y in the encoder's pixels, with
        labels (N, P): 1 foreground, 0 background, -1 padding, so that images may have different numbers
        of points. Boxes (N, 4) are x1, y1, x2, y2. Both need positional_encoding.
        -> sparse (N, M, C) or None, M = P + 1 for points, 2 for a box, P + 2 for both; dense (N, C, e,
        e), or (1, C, e, e) without masks."""
        background, foreground, *corners = [embed.weight for embed in self.point_embed]
        sparse = []
        if points is not None:
            labels = labels.long()
            if ((labels < -1) | (labels > 1)).any():
                raise ValueError("labels are 1 (foreground), 0 (background) or -1 (padding).")
            if boxes is None:                        # as published: a padding point instead of a box
                points = F.pad(points, (0, 0, 0, 1))
                labels = F.pad(labels, (0, 1), value=-1)
            pos = positional_encoding((points + 0.5) / self.image_size)     # + 0.5: the pixel's centre
            pos = torch.where((labels == -1)[..., None], 0.0, pos)
            by_label = torch.cat([self.not_a_point_embed.weight, background, foreground])   # -1, 0, 1
            sparse.append(pos + by_label[labels + 1])                            # (N, P or P + 1, C)
        if boxes is not None:
            pos = positional_encoding((boxes.unflatten(-1, (2, 2)) + 0.5) / self.image_size)
            sparse.append(pos + torch.cat(corners))                                       # (N, 2, C)
        if masks is not None:
            dense = self.mask_embed(masks)
        else:
            dense = self.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, self.e, self.e)
        return torch.cat(sparse, 1) if sparse else None, dense

# ------------------------------------------------------------------------------------------ mask decoder
class DecoderAttention(nn.Module):
    """Attention from q (N, Q, C) to k and v (N, K, C), computed at 1 / downsample of the width."""

    def __init__(self, width, heads, downsample=2):
        super().__init__()
        inner = width // downsample
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, q, k, v):
        q = self.q_proj(q).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k = self.k_proj(k).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(v).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

class TwoWayLayer(nn.Module):
    """Tokens attend to themselves, then to the image, and pass an MLP; the image attends to them."""

    def __init__(self, config, first):
        super().__init__()
        C = config.prompt_width
        self.first = first
        self.self_attn = DecoderAttention(C, config.decoder_heads, downsample=1)
        self.layer_norm1 = nn.LayerNorm(C, eps=1e-6)
        self.cross_attn_token_to_image = DecoderAttention(C, config.decoder_heads)
        self.layer_norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = MLP(C, config.decoder_mlp, nn.ReLU())
        self.layer_norm3 = nn.LayerNorm(C, eps=1e-6)
        self.cross_attn_image_to_token = DecoderAttention(C, config.decoder_heads)
        self.layer_norm4 = nn.LayerNorm(C, eps=1e-6)

    def forward(self, tokens, features, token_pos, features_pos):          # (N, T, C), (N, e * e, C)
        if self.first:                               # as published: no position, no residual
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pos
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.layer_norm1(tokens)
        placed = features + features_pos
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_pos, placed, features)
        tokens = self.layer_norm2(tokens)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        features = features + self.cross_attn_image_to_token(placed, tokens + token_pos, tokens)
        return tokens, self.layer_norm4(features)

class TwoWayTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.prompt_width
        self.layers = nn.ModuleList([TwoWayLayer(config, first=True), TwoWayLayer(config, first=False)])
        self.final_attn_token_to_image = DecoderAttention(C, config.decoder_heads)
        self.layer_norm_final_attn = nn.LayerNorm(C, eps=1e-5)  # 1e-5 only here, as transformers

    def forward(self, tokens, features, features_pos):
        token_pos = tokens                           # a token's position is its own initial value
        for layer in self.layers:
            tokens, features = layer(tokens, features, token_pos, features_pos)
        placed = features + features_pos
        tokens = tokens + self.final_attn_token_to_image(tokens + token_pos, placed, features)
        return self.layer_norm_final_attn(tokens), features

class ThreeLayerMLP(nn.Module):                                 # its layers have their published names
    def __init__(self, width, out):
        super().__init__()
        self.proj_in = nn.Linear(width, width)
        self.layers = nn.ModuleList([nn.Linear(width, width)])
        self.proj_out = nn.Linear(width, out)

    def forward(self, x):
        x = F.relu(self.layers[0](F.relu(self.proj_in(x))))
        return self.proj_out(x)

class MaskDecoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.prompt_width
        self.iou_token = nn.Embedding(1, C)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, C)
        self.transformer = TwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(C, C // 4, kernel_size=2, stride=2)
        self.upscale_layer_norm = LayerNorm2d(C // 4, eps=1e-6)
        self.upscale_conv2 = nn.ConvTranspose2d(C // 4, C // 8, kernel_size=2, stride=2)
        self.output_hypernetworks_mlps = nn.ModuleList(
            [ThreeLayerMLP(C, C // 8) for _ in range(NUM_MASK_TOKENS)])
        self.iou_prediction_head = ThreeLayerMLP(C, NUM_MASK_TOKENS)

    def forward(self, features, features_pos, sparse, dense, multimask=True):
        """features (N, C, e, e), features_pos (1, C, e, e), sparse (N, M, C) or None, dense (N or 1, C,
        e, e) -> logits (N, 3 or 1, 4e, 4e) and predicted iou (N, 3 or 1) of masks 1-3, or of mask 0."""
        N, _, e, _ = features.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(N, -1, -1)
        if sparse is not None:
            tokens = torch.cat([tokens, sparse], 1)                             # (N, T, C)
        features = (features + dense).flatten(2).transpose(1, 2)                # (N, e * e, C)
        features_pos = features_pos.flatten(2).transpose(1, 2)
        tokens, features = self.transformer(tokens, features, features_pos)
        x = self.upscale_conv1(features.transpose(1, 2).unflatten(2, (e, e)))
        x = F.gelu(self.upscale_layer_norm(x))
        x = F.gelu(self.upscale_conv2(x))                                       # (N, C / 8, 4e, 4e)
        # Each mask token becomes the weights of a 1 x 1 convolution over x, which gives one mask.
        weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.einsum("nmc,nchw->nmhw", torch.stack(weights, 1), x)
        iou = self.iou_prediction_head(tokens[:, 0])
        if multimask:
            return masks[:, 1:], iou[:, 1:]
        return masks[:, :1], iou[:, :1]

class SAM(nn.Module):
    """The promptable model, random until `load_weights`. `config` is a SAMConfig or its name."""

    def __init__(self, config="b"):
        super().__init__()
        self.config = CONFIGS[config] if isinstance(config, str) else config
        self.shared_image_embedding = PositionalEncoding(self.config.prompt_width)
        self.vision_encoder = ImageEncoder(self.config)
        self.prompt_encoder = PromptEncoder(self.config)
        self.mask_decoder = MaskDecoder(self.config)

    def encode_image(self, images):
        """images (B, 3, image_size, image_size), RGB in [0, 1] -> F_sam (B, C, e, e). Raises ValueError
        for another size. SAM pads images to a square, RSRefSeg resizes them."""
        side = self.config.image_size
        if images.shape[-2:] != (side, side) or not images.is_floating_point():
            raise ValueError(f"images are {tuple(images.shape[-2:])} {images.dtype}: resize images to "
                             f"{side} x {side}, and divide integers by 255.")
        # By channel, with plain numbers: no copy to the GPU, and no buffer for weights to fill.
        channels = [(images[:, c] - PIXEL_MEAN[c]) / PIXEL_STD[c] for c in range(3)]
        return self.vision_encoder(torch.stack(channels, 1))

    def decode(self, features, sparse, dense, multimask=True):
        """Features of B images and prompts for N masks; other shapes as in MaskDecoder.forward."""
        N = len(dense) if sparse is None else len(sparse)
        if sparse is not None or N > 1:        # else dense is one row, and broadcast over the images
            if N % len(features):
                raise ValueError(f"{N} prompts for {len(features)} images: give k for each image.")
            features = features.repeat_interleave(N // len(features), 0)
        features_pos = self.shared_image_embedding.grid(features.shape[-1])
        return self.mask_decoder(features, features_pos, sparse, dense, multimask)

    def forward(self, images, points=None, labels=None, boxes=None, masks=None, multimask=True):
        """images, and prompts as in PromptEncoder.forward -> masks (N, 3 or 1, 4e, 4e) logits, iou. Not
        used by RSRefSeg, which calls encode_image and decode itself."""
        sparse, dense = self.prompt_encoder(points, labels, boxes, masks, self.shared_image_embedding)
        return self.decode(self.encode_image(images), sparse, dense, multimask)

# ----------------------------------------------------------------------------------------------- weights
def read_state(path):
    """Returns the tensors (and plain data) in a file of safetensors or torch.save, by name, and the
    metadata of the former. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            is_safetensors = file.read(9)[8:] == b"{"          # 8 bytes of a length, then JSON
        if is_safetensors:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        return dict(torch.load(path, "cpu", weights_only=True).items()), {}    # AttributeError: no dict
    # A damaged safetensors file, zip file or pickle:
    except (SafetensorError, RuntimeError, EOFError, AttributeError, LookupError,
            pickle.UnpicklingError) as error:
        # weights_only refuses any object but tensors and plain data, and PyTorch's message names it.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise ValueError(f"{path} holds {foreign[1]} beside its tensors. If you trust it, read it by"
                             " torch.load(path, weights_only=False), and save its entry 'state_dict' by "
                             "torch.save (of DeepSpeed: 'module') to another file.") from error
        raise ValueError(f"{path} is damaged or no dict of tensors: replace it.") from error

def load_weights(model, path):
    """Load a file of Hugging Face or Meta into a SAM, which may be on the meta device. Raises ValueError
    for a file that is damaged or does not fit."""
    state, _ = read_state(path)
    if "image_encoder.pos_embed" in state:                                 # Meta's names
        for pattern, ours in META_NAMES:
            state = {re.sub(pattern, ours, key): tensor for key, tensor in state.items()}
    # A copy of shared_image_embedding in some files.
    state.pop("prompt_encoder.shared_embedding.positional_embedding", None)
    try:
        model.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
    except RuntimeError as error:
        text = textwrap.shorten(str(error), 1000, placeholder=" ...")
        raise ValueError(f"{path} does not hold this SAM: {text}") from error

# For Meta's own files, sam_vit_*.pth: parts of their names -> ours, replaced in this order.
META_NAMES = (
    (r"^image_encoder\.blocks", "image_encoder.layers"), (r"^image_encoder", "vision_encoder"),
    (r"patch_embed\.proj\.", "patch_embed.projection."), (r"\.norm", ".layer_norm"),
    (r"neck\.0", "neck.conv1"), (r"neck\.1", "neck.layer_norm1"),
    (r"neck\.2", "neck.conv2"), (r"neck\.3", "neck.layer_norm2"),
    (r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix",
     "shared_image_embedding.positional_embedding"),
    (r"mask_downscaling\.0", "mask_embed.conv1"), (r"mask_downscaling\.1", "mask_embed.layer_norm1"),
    (r"mask_downscaling\.3", "mask_embed.conv2"), (r"mask_downscaling\.4", "mask_embed.layer_norm2"),
    (r"mask_downscaling\.6", "mask_embed.conv3"), (r"output_upscaling\.0", "upscale_conv1"),
    (r"output_upscaling\.1", "upscale_layer_norm"), (r"output_upscaling\.3", "upscale_conv2"),
    (r"(mlps\.\d|head)\.layers\.0", r"\1.proj_in"), (r"(mlps\.\d|head)\.layers\.1", r"\1.layers.0"),
    (r"(mlps\.\d|head)\.layers\.2", r"\1.proj_out"), (r"point_embeddings", "point_embed"))
