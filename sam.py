"""Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): image encoder, prompt encoder, decoder.

Checked against transformers' SamModel. Modules are named as the tensors of facebook/sam-vit-base,
-large and -huge; Meta's sam_vit_*.pth are renamed on loading. What differs from the published code: one
call takes B images, each with its own prompts; the relative position bias is never stored as a matrix
(`Attention`); neck and positional encoding stay in fp32 under autocast. Left out: the automatic mask
generator and the helpers that resize images and boxes. Needs torch and safetensors.

B batch, C prompt width, D encoder width, d head width, e side of the encoder's grid (image / patch),
n side of a window or grid, M sparse prompts, H W pixels.
"""
import math
import pickle
import re
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

NUM_MASK_TOKENS = 4   # mask 0 answers an unambiguous prompt; 1-3 are whole, part and subpart
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SAMConfig:
    width: int
    layers: int
    heads: int
    global_layers: tuple       # these attend to the whole image, the others inside windows
    image: int = 1024          # side of the input in pixels
    patch: int = 16
    window: int = 14
    prompt: int = 256          # C
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    stem: tuple = ()           # widths of stride-2 convolutions before the patch embedding (tiny)


CONFIGS = {
    "b": SAMConfig(768, 12, 12, (2, 5, 8, 11)),
    "l": SAMConfig(1024, 24, 16, (5, 11, 17, 23)),
    "h": SAMConfig(1280, 32, 16, (7, 15, 23, 31)),
    "tiny": SAMConfig(64, 3, 2, (2,), image=96, patch=8, window=6, prompt=64, decoder_mlp=128,
                      decoder_heads=2, stem=(24, 48)),
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
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
    """(B, H, W, D) -> (B * windows, n, n, D), zero-padded at the right and bottom to multiples of n."""
    _, H, W, _ = x.shape
    x = F.pad(x, (0, 0, 0, -W % n, 0, -H % n))
    x = x.unflatten(2, (-1, n)).unflatten(1, (-1, n))           # (B, rows, n, columns, n, D)
    return x.transpose(2, 3).flatten(0, 2)


def window_unpartition(windows, H, W):
    """(B * rows * columns, n, n, D) -> (B, H, W, D), the padding removed."""
    n = windows.shape[1]
    x = windows.unflatten(0, (-1, math.ceil(H / n), math.ceil(W / n)))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]


def attend_row(q, k, v, row_bias, column_bias):
    """softmax(q.k + bias) v for one row of an n x n grid: n queries, (B, heads, n, d), and all n^2 keys.
    The biases (B, heads, n, n) hold for each query a number per row and one per column of the keys."""
    scores = (q @ k.transpose(2, 3)).unflatten(3, (q.shape[2], -1))     # (..., key row, key column)
    scores += row_bias[..., None]
    scores += column_bias[..., None, :]
    return scores.flatten(3).softmax(-1) @ v


class Attention(nn.Module):
    """Self-attention over an n x n grid with decomposed relative positions (ViTDet, arXiv:2203.16527):
    softmax(q.k / sqrt(d) + bias) v, with bias = q.Rh[row of q - row of k] + q.Rw[column of q - column
    of k].

    As an n^2 x n^2 matrix the bias of one global layer of SAM-b takes 0.4 GB per image in bf16. But it
    is an inner product too: append q Rh and q Rw to each query, and to each key the one-hot codes of the
    key's own row and column. Plain attention on these longer vectors then adds the bias by itself."""

    def __init__(self, width, heads, n):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * n - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * n - 1, width // heads))

    def forward(self, x):
        B, n, _, D = x.shape
        d = D // self.heads
        qkv = self.qkv(x).reshape(B, n * n, 3, self.heads, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # (B, heads, n * n, d)

        position = torch.arange(n, device=x.device)
        offset = position[:, None] - position + n - 1                   # (n, n), 0 to 2n - 2
        grid = q.unflatten(2, (n, n))
        row_bias = torch.einsum("bhyxd,ykd->bhyxk", grid, self.rel_pos_h[offset])
        column_bias = torch.einsum("bhyxd,xkd->bhyxk", grid, self.rel_pos_w[offset])

        q = q * d ** -0.5
        # The fused kernel is the fastest on CUDA, and in bf16 on Intel CPUs with matrix units (AMX).
        fused = x.is_cuda or (q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())
        if n > 32 and not fused:
            # Row by row the scores stay in a CPU's cache. The backward pass computes them again.
            k = k.contiguous()
            v = v.contiguous()
            rows = []
            for q_row, *biases in zip(q.chunk(n, 2), row_bias.unbind(2), column_bias.unbind(2)):
                rows.append(checkpoint(attend_row, q_row, k, v, *biases, use_reentrant=False))
            x = torch.cat(rows, 2)
        else:
            one_hot = torch.eye(n, dtype=k.dtype, device=k.device)
            codes = torch.cat([one_hot.repeat_interleave(n, 0), one_hot.repeat(n, 1)], 1)
            q = torch.cat([q, row_bias.flatten(2, 3), column_bias.flatten(2, 3)], -1)
            k = torch.cat([k, codes.expand(B, self.heads, -1, -1)], -1)    # (B, heads, n * n, d + 2n)
            if fused:
                v = F.pad(v, (0, 2 * n))                   # fused kernels want q, k and v of one width
                x = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]
            else:                                          # faster on other CPUs than the fused kernel
                x = (q @ k.transpose(2, 3)).softmax(-1) @ v
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

    def forward(self, x):
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
            stem += [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        patch = config.patch // 2 ** len(config.stem)
        self.projection = nn.Conv2d(widths[-1], config.width, patch, patch)

    def forward(self, pixels):
        return self.projection(self.stem(pixels)).permute(0, 2, 3, 1)


class ImageEncoder(nn.Module):
    """Normalised pixels (B, 3, image, image) -> image features F_sam (B, C, e, e)."""

    def __init__(self, config):
        super().__init__()
        e = config.image // config.patch
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Parameter(torch.randn(1, e, e, config.width) * 0.02)
        sides = [e if i in config.global_layers else config.window for i in range(config.layers)]
        self.layers = nn.ModuleList([EncoderLayer(config, n) for n in sides])
        C = config.prompt
        self.neck = nn.Sequential(OrderedDict(
            conv1=nn.Conv2d(config.width, C, 1, bias=False), layer_norm1=LayerNorm2d(C, eps=1e-6),
            conv2=nn.Conv2d(C, C, 3, padding=1, bias=False), layer_norm2=LayerNorm2d(C, eps=1e-6)))
        self.checkpoint_activations = False      # True: recompute each layer in the backward pass

    def forward(self, pixels):
        x = self.patch_embed(pixels) + self.pos_embed                           # (B, e, e, D)
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        # The neck is under 1 % of the work; in bf16 it would add to the error of F_sam.
        with torch.autocast(x.device.type, enabled=False):
            return self.neck(x.permute(0, 3, 1, 2).float())


# ---------------------------------------------------------------------------------------- prompt encoder

class PositionalEncoding(nn.Module):
    """Random Fourier features of (x, y) in [0, 1]^2, of image, points or boxes: (..., 2) -> (..., C)."""

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
        self.image = config.image
        self.e = config.image // config.patch
        self.mask_embed = nn.Sequential(OrderedDict(                # mask logits -> dense prompt
            conv1=nn.Conv2d(1, 4, 2, 2), layer_norm1=LayerNorm2d(4, eps=1e-6), gelu1=nn.GELU(),
            conv2=nn.Conv2d(4, 16, 2, 2), layer_norm2=LayerNorm2d(16, eps=1e-6), gelu2=nn.GELU(),
            conv3=nn.Conv2d(16, config.prompt, 1)))
        self.no_mask_embed = nn.Embedding(1, config.prompt)
        self.not_a_point_embed = nn.Embedding(1, config.prompt)
        # Learned embeddings of: background point, foreground point, first and second corner of a box.
        self.point_embed = nn.ModuleList([nn.Embedding(1, config.prompt) for _ in range(4)])

    def forward(self, positional_encoding, points=None, labels=None, boxes=None, masks=None):
        """points (B, P, 2) as x, y in pixels with labels (B, P): 1 foreground, 0 background, -1
        padding, so that images may have different numbers of points; boxes (B, 4) as x1, y1, x2, y2;
        masks (B, 1, 4e, 4e) logits -> sparse (B, M, C) or None, dense (B or 1, C, e, e)."""
        background, foreground, *corners = [embed.weight for embed in self.point_embed]
        sparse = []
        if points is not None:
            if boxes is None:                        # as published: a padding point instead of a box
                points = F.pad(points, (0, 0, 0, 1))
                labels = F.pad(labels, (0, 1), value=-1)
            pos = positional_encoding((points + 0.5) / self.image)     # + 0.5: the pixel's centre
            pos = torch.where((labels == -1)[..., None], 0.0, pos)
            by_label = torch.cat([self.not_a_point_embed.weight, background, foreground])
            sparse.append(pos + by_label[labels + 1])
        if boxes is not None:
            pos = positional_encoding((boxes.unflatten(-1, (2, 2)) + 0.5) / self.image)
            sparse.append(pos + torch.cat(corners))
        if masks is not None:
            dense = self.mask_embed(masks)
        else:
            dense = self.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, self.e, self.e)
        return torch.cat(sparse, 1) if sparse else None, dense


# ------------------------------------------------------------------------------------------ mask decoder

class DecoderAttention(nn.Module):
    """Attention from q to k and v, computed at 1 / downsample of the width."""

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
        C = config.prompt
        self.first = first
        self.self_attn = DecoderAttention(C, config.decoder_heads, downsample=1)
        self.layer_norm1 = nn.LayerNorm(C, eps=1e-6)
        self.cross_attn_token_to_image = DecoderAttention(C, config.decoder_heads)
        self.layer_norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = MLP(C, config.decoder_mlp, nn.ReLU())
        self.layer_norm3 = nn.LayerNorm(C, eps=1e-6)
        self.cross_attn_image_to_token = DecoderAttention(C, config.decoder_heads)
        self.layer_norm4 = nn.LayerNorm(C, eps=1e-6)

    def forward(self, tokens, image, token_pos, image_pos):
        if self.first:                               # as published: no position, no residual
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_pos
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.layer_norm1(tokens)
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_pos, image + image_pos, image)
        tokens = self.layer_norm2(tokens)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(image + image_pos, tokens + token_pos, tokens)
        return tokens, self.layer_norm4(image)


class TwoWayTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([TwoWayLayer(config, first=True), TwoWayLayer(config, first=False)])
        self.final_attn_token_to_image = DecoderAttention(config.prompt, config.decoder_heads)
        self.layer_norm_final_attn = nn.LayerNorm(config.prompt, eps=1e-5)       # as published

    def forward(self, token_pos, image, image_pos):
        tokens = token_pos                           # a token's position is its own initial value
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_pos, image_pos)
        tokens = tokens + self.final_attn_token_to_image(tokens + token_pos, image + image_pos, image)
        return self.layer_norm_final_attn(tokens), image


class HypernetworkMLP(nn.Module):
    """Three layers, named as in the published weights; the IoU head has the same form."""

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
        C = config.prompt
        self.iou_token = nn.Embedding(1, C)
        self.mask_tokens = nn.Embedding(NUM_MASK_TOKENS, C)
        self.transformer = TwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(C, C // 4, 2, 2)
        self.upscale_layer_norm = LayerNorm2d(C // 4, eps=1e-6)
        self.upscale_conv2 = nn.ConvTranspose2d(C // 4, C // 8, 2, 2)
        self.output_hypernetworks_mlps = nn.ModuleList(
            [HypernetworkMLP(C, C // 8) for _ in range(NUM_MASK_TOKENS)])
        self.iou_prediction_head = HypernetworkMLP(C, NUM_MASK_TOKENS)

    def forward(self, image, image_pos, sparse, dense, multimask=True):
        """image (B, C, e, e), image_pos (1, C, e, e), sparse (B, M, C) or None, dense (B or 1, C, e, e)
        -> masks (B, 3 or 1, 4e, 4e) logits, iou (B, 3 or 1) as predicted by the model."""
        B, _, e, _ = image.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(B, -1, -1)
        if sparse is not None:
            tokens = torch.cat([tokens, sparse], 1)
        image = (image + dense).flatten(2).transpose(1, 2)                      # (B, e * e, C)
        image_pos = image_pos.flatten(2).transpose(1, 2)
        tokens, image = self.transformer(tokens, image, image_pos)
        x = self.upscale_conv1(image.transpose(1, 2).unflatten(2, (e, e)))
        x = F.gelu(self.upscale_layer_norm(x))
        x = F.gelu(self.upscale_conv2(x))                                       # (B, C / 8, 4e, 4e)
        # Each mask token becomes the weights of a 1 x 1 convolution over x, which gives one mask.
        weights = [mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        masks = (torch.stack(weights, 1) @ x.flatten(2)).unflatten(2, x.shape[2:])
        iou = self.iou_prediction_head(tokens[:, 0])
        if multimask:
            return masks[:, 1:], iou[:, 1:]
        return masks[:, :1], iou[:, :1]


# --------------------------------------------------------------------------------------------------- SAM

class SAM(nn.Module):
    """The promptable model, random until `load_weights`. `config` is a SAMConfig or its name."""

    def __init__(self, config="b"):
        super().__init__()
        self.config = CONFIGS[config] if isinstance(config, str) else config
        self.shared_image_embedding = PositionalEncoding(self.config.prompt)
        self.vision_encoder = ImageEncoder(self.config)
        self.prompt_encoder = PromptEncoder(self.config)
        self.mask_decoder = MaskDecoder(self.config)

    def encode_image(self, images):
        """images (B, 3, image, image), RGB in [0, 1] -> F_sam (B, C, e, e). Raises ValueError for
        another size: the position embeddings belong to one grid."""
        side = self.config.image
        if images.shape[-2:] != (side, side):
            raise ValueError(f"resize images to {side} x {side}, got {tuple(images.shape[-2:])}.")
        mean = images.new_tensor(PIXEL_MEAN).view(3, 1, 1)
        std = images.new_tensor(PIXEL_STD).view(3, 1, 1)
        return self.vision_encoder((images - mean) / std)

    def decode(self, image, sparse, dense, multimask=True):
        """Masks for encoded images; shapes as in MaskDecoder.forward."""
        image_pos = self.shared_image_embedding.grid(image.shape[-1])
        return self.mask_decoder(image, image_pos, sparse, dense, multimask)

    def forward(self, images, points=None, labels=None, boxes=None, masks=None, multimask=True):
        """images and the prompts of PromptEncoder.forward -> masks (B, 3 or 1, 4e, 4e) logits, iou."""
        sparse, dense = self.prompt_encoder(self.shared_image_embedding, points, labels, boxes, masks)
        return self.decode(self.encode_image(images), sparse, dense, multimask)


META_NAMES = (   # regular expression for names in Meta's .pth files -> our name, applied in this order
    ("^image_encoder.blocks", "image_encoder.layers"), ("^image_encoder", "vision_encoder"),
    ("patch_embed.proj", "patch_embed.projection"), (r"\.norm", ".layer_norm"),
    ("neck.0", "neck.conv1"), ("neck.1", "neck.layer_norm1"),
    ("neck.2", "neck.conv2"), ("neck.3", "neck.layer_norm2"),
    ("prompt_encoder.pe_layer", "shared_image_embedding"),
    ("positional_encoding_gaussian_matrix", "positional_embedding"), ("point_embeddings", "point_embed"),
    ("mask_downscaling.0", "mask_embed.conv1"), ("mask_downscaling.1", "mask_embed.layer_norm1"),
    ("mask_downscaling.3", "mask_embed.conv2"), ("mask_downscaling.4", "mask_embed.layer_norm2"),
    ("mask_downscaling.6", "mask_embed.conv3"), ("output_upscaling.0", "upscale_conv1"),
    ("output_upscaling.1", "upscale_layer_norm"), ("output_upscaling.3", "upscale_conv2"),
    (r"(mlps\.\d|head)\.layers\.0", r"\1.proj_in"), (r"(mlps\.\d|head)\.layers\.1", r"\1.layers.0"),
    (r"(mlps\.\d|head)\.layers\.2", r"\1.proj_out"),
)


def read_state(path):
    """Returns what is in a safetensors file, or in a file that torch.save wrote: tensors and plain data.
    Raises ValueError for a corrupt file."""
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is truncated, corrupt or not plain tensors: replace it.") from error


def copy_tensors(source, target, path):
    """Copy the tensors of `source`, read from `path`, into those of the same names in `target`. Raises
    ValueError naming each tensor that does not fit."""
    found = {key: list(tensor.shape) for key, tensor in source.items()}
    expected = {key: list(tensor.shape) for key, tensor in target.items()}
    mismatched = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
    if mismatched:
        rows = [f"\n  {key}: file {found.get(key)}, model {expected.get(key)}" for key in mismatched]
        raise ValueError(f"{path} does not fit this model, {len(rows)} tensors differ:{''.join(rows)}")
    for key, tensor in target.items():
        tensor.copy_(source[key])


def load_weights(target, path):
    """Copy a weight file, of Hugging Face or Meta, into `target`, for example `model.state_dict()`."""
    state = read_state(path)
    if str(path).endswith(".pth"):
        for pattern, ours in META_NAMES:
            state = {re.sub(pattern, ours, key): tensor for key, tensor in state.items()}
    # Some files store shared_image_embedding.positional_embedding a second time.
    state.pop("prompt_encoder.shared_embedding.positional_embedding", None)
    copy_tensors(state, target, path)
