"""Segment Anything (Kirillov et al. 2023, arXiv:2304.02643): an image encoder, a prompt encoder and a mask decoder.

Checked against transformers' SamModel; the weights are facebook/sam-vit-{base,large,huge}, whose tensor names the
modules below repeat, or Meta's own sam_vit_{b,l,h}_*.pth, which are renamed. Two things differ from the published code.
Everything is batched: B images, each with its own prompts, are one call. And the relative position bias never exists as
a matrix (see `Attention`). Left out: the automatic mask generator and the box and image helpers around the model.

Shapes: B batch, C prompt width, D encoder width, e encoder grid side (image / 16), n grid or window side,
M sparse prompts, H W pixels. This file needs torch and safetensors, and works when copied alone.
"""
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

MASKS = 4   # mask 0 answers a clear prompt; 1-3 are whole, part and subpart of an ambiguous one


@dataclass(frozen=True)
class SAMSize:
    width: int
    layers: int
    heads: int
    global_layers: tuple       # these attend over the whole image, the others inside windows
    image: int = 1024
    patch: int = 16
    window: int = 14
    prompt: int = 256          # C
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    stem: tuple = ()           # widths of stride-2 convolutions before the patch convolution; SAM itself has none


SIZES = {
    "b": SAMSize(768, 12, 12, (2, 5, 8, 11)),
    "l": SAMSize(1024, 24, 16, (5, 11, 17, 23)),
    "h": SAMSize(1280, 32, 16, (7, 15, 23, 31)),
    "tiny": SAMSize(64, 3, 2, (2,), image=96, patch=8, window=6, prompt=64, decoder_mlp=128, decoder_heads=2, stem=(24, 48)),
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Module):
    def __init__(self, width, hidden, activation):
        super().__init__()
        self.lin1, self.lin2, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, x):
        return self.lin2(self.activation(self.lin1(x)))


# ----------------------------------------------------------------------------------------------------- image encoder

def relative_position(table, n):
    """(2n - 1, d) learned offsets -> (n, n, d): entry [i, j] is the code of looking from place i to place j."""
    place = torch.arange(n, device=table.device)
    return table[place[:, None] - place[None, :] + n - 1]


def window_partition(x, n):
    """(B, H, W, D) -> (B * windows, n, n, D), zeros on the right and at the bottom where n does not divide H or W."""
    B, H, W, D = x.shape
    x = F.pad(x, (0, 0, 0, -W % n, 0, -H % n))
    return x.reshape(B, x.shape[1] // n, n, x.shape[2] // n, n, D).transpose(2, 3).reshape(-1, n, n, D)


def window_unpartition(windows, H, W):
    """(B * windows, n, n, D) -> (B, H, W, D), the padding cut off."""
    n, D = windows.shape[1], windows.shape[3]
    rows, columns = -(-H // n), -(-W // n)
    x = windows.reshape(-1, rows, columns, n, n, D).transpose(2, 3).reshape(-1, rows * n, columns * n, D)
    return x[:, :H, :W]


class Attention(nn.Module):
    """Self-attention over an n x n grid with decomposed relative positions (ViTDet): softmax(q.k / sqrt(d) + bias),
    bias = q.Rh[row of q, row of k] + q.Rw[column of q, column of k].

    As an n^2 x n^2 matrix the bias of one global block of SAM-b would take 0.4 GB per image in bf16. But it is an inner
    product: append (q Rh, q Rw) to each query and one-hot (row, column) codes to each key, and plain attention adds it.
    """

    def __init__(self, width, heads, n):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * n - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * n - 1, width // heads))

    def forward(self, x):
        B, n, _, D = x.shape
        d = D // self.heads
        q, k, v = self.qkv(x).reshape(B, n * n, 3, self.heads, d).permute(2, 0, 3, 1, 4)   # each (B, heads, n * n, d)
        grid = q.unflatten(2, (n, n))
        rows = torch.einsum("bayxd,ykd->bayxk", grid, relative_position(self.rel_pos_h, n)).flatten(2, 3)
        columns = torch.einsum("bayxd,xkd->bayxk", grid, relative_position(self.rel_pos_w, n)).flatten(2, 3)
        one = torch.eye(n, dtype=k.dtype, device=k.device)
        codes = torch.cat([one.repeat_interleave(n, 0), one.repeat(n, 1)], 1)              # (n * n, 2n): row, column
        q = torch.cat([q * d ** -0.5, rows, columns], -1)
        k = torch.cat([k, codes.expand(B, self.heads, -1, -1)], -1)
        v = F.pad(v, (0, 2 * n))                                    # fused kernels want q, k and v of one width
        x = F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]
        return self.proj(x.transpose(1, 2).reshape(B, n, n, D))


class EncoderLayer(nn.Module):
    """Attention inside windows of window x window places; one window as large as the grid makes it global."""

    def __init__(self, size, window):
        super().__init__()
        self.window = window
        self.layer_norm1 = nn.LayerNorm(size.width, eps=1e-6)
        self.attn = Attention(size.width, size.heads, window)
        self.layer_norm2 = nn.LayerNorm(size.width, eps=1e-6)
        self.mlp = MLP(size.width, 4 * size.width, nn.GELU())

    def forward(self, x):
        windows = window_partition(self.layer_norm1(x), self.window)
        x = x + window_unpartition(self.attn(windows), *x.shape[1:3])
        return x + self.mlp(self.layer_norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, size):
        super().__init__()
        widths = (3, *size.stem)
        self.stem = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.GELU())
                                    for a, b in zip(widths, widths[1:])])
        patch = size.patch >> len(size.stem)                        # each stem convolution halves the side
        self.projection = nn.Conv2d(widths[-1], size.width, patch, patch)

    def forward(self, pixels):
        return self.projection(self.stem(pixels)).permute(0, 2, 3, 1)


class Neck(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.conv1, self.layer_norm1 = nn.Conv2d(width, channels, 1, bias=False), LayerNorm2d(channels)
        self.conv2, self.layer_norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels)

    def forward(self, x):
        return self.layer_norm2(self.conv2(self.layer_norm1(self.conv1(x))))


class ImageEncoder(nn.Module):
    """Pixels (B, 3, image, image), normalised -> (B, C, e, e)."""

    def __init__(self, size):
        super().__init__()
        e = size.image // size.patch
        self.patch_embed = PatchEmbed(size)
        self.pos_embed = nn.Parameter(torch.randn(1, e, e, size.width) * 0.02)
        self.layers = nn.ModuleList(EncoderLayer(size, e if i in size.global_layers else size.window)
                                    for i in range(size.layers))
        self.neck = Neck(size.width, size.prompt)
        self.checkpoint = False    # True: training keeps only what enters each layer and computes the rest again, backwards

    def forward(self, pixels):
        x = self.patch_embed(pixels) + self.pos_embed              # (B, e, e, D)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoint and self.training else layer(x)
        with torch.autocast(x.device.type, enabled=False):         # under autocast the neck stays fp32: 1 % of the work, and in
            return self.neck(x.permute(0, 3, 1, 2).to(self.pos_embed.dtype))   # bf16 it makes a fifth of the error of F_sam


# ---------------------------------------------------------------------------------------------------- prompt encoder

class PositionCode(nn.Module):
    """Random Fourier features of a place (x, y) in [0, 1]^2, shared by image grid, points and boxes: (..., 2) -> (..., C)."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("positional_embedding", torch.randn(2, channels // 2))

    def forward(self, xy):
        x, y = (2 * xy.float() - 1).split(1, -1)
        fx, fy = self.positional_embedding.float()
        angle = 2 * math.pi * (x * fx + y * fy)                    # no matmul: autocast would round the angles to bf16
        return torch.cat([angle.sin(), angle.cos()], -1)

    def grid(self, n):
        """(1, C, n, n): the code of each cell's centre."""
        centre = (torch.arange(n, device=self.positional_embedding.device) + 0.5) / n
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        return self(torch.stack([x, y], -1)).permute(2, 0, 1)[None]


class MaskEmbed(nn.Module):
    """Mask logits (B, 1, 4e, 4e) -> dense prompt (B, C, e, e)."""

    def __init__(self, channels):
        super().__init__()
        self.conv1, self.layer_norm1 = nn.Conv2d(1, 4, 2, 2), LayerNorm2d(4)
        self.conv2, self.layer_norm2 = nn.Conv2d(4, 16, 2, 2), LayerNorm2d(16)
        self.conv3 = nn.Conv2d(16, channels, 1)

    def forward(self, masks):
        x = F.gelu(self.layer_norm1(self.conv1(masks)))
        x = F.gelu(self.layer_norm2(self.conv2(x)))
        return self.conv3(x)


class PromptEncoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.image, self.e = size.image, size.image // size.patch
        self.mask_embed = MaskEmbed(size.prompt)
        self.no_mask_embed = nn.Embedding(1, size.prompt)
        self.not_a_point_embed = nn.Embedding(1, size.prompt)
        self.point_embed = nn.ModuleList(nn.Embedding(1, size.prompt) for _ in range(4))   # background, object, two corners

    def forward(self, position_code, points=None, labels=None, boxes=None, masks=None):
        """points (B, P, 2) as x, y in pixels with labels (B, P): 1 object, 0 background, -1 padding, so that images may
        have different numbers of points; boxes (B, 4) as x1, y1, x2, y2; masks (B, 1, 4e, 4e) logits
        -> sparse (B, M, C), dense (B or 1, C, e, e)."""
        background, thing, *corners = (embedding.weight for embedding in self.point_embed)         # each (1, C)
        sparse = []
        if points is not None:
            if boxes is None:                                      # SAM was trained with a padding point when no box follows
                points, labels = F.pad(points, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=-1)
            code = position_code((points + 0.5) / self.image)      # + 0.5: the middle of the pixel
            role = torch.cat([self.not_a_point_embed.weight, background, thing])
            sparse.append(torch.where((labels == -1)[..., None], 0.0, code) + role[labels + 1])
        if boxes is not None:
            sparse.append(position_code((boxes.unflatten(-1, (2, 2)) + 0.5) / self.image) + torch.cat(corners))
        if masks is not None:
            dense = self.mask_embed(masks)
        else:
            dense = self.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, self.e, self.e)
        return torch.cat(sparse, 1) if sparse else None, dense


# ------------------------------------------------------------------------------------------------------ mask decoder

class DecoderAttention(nn.Module):
    """The decoder's attention from q to k and v; between tokens and image it works at half the width."""

    def __init__(self, width, heads, downsample=2):
        super().__init__()
        inner = width // downsample
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, inner), nn.Linear(width, inner)
        self.v_proj, self.out_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, q, k, v):
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for proj, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v)))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves, then to the image, pass an MLP, and the image attends to the tokens."""

    def __init__(self, size, first):
        super().__init__()
        C, heads = size.prompt, size.decoder_heads
        self.first = first
        self.self_attn = DecoderAttention(C, heads, downsample=1)
        self.layer_norm1 = nn.LayerNorm(C, eps=1e-6)
        self.cross_attn_token_to_image = DecoderAttention(C, heads)
        self.layer_norm2 = nn.LayerNorm(C, eps=1e-6)
        self.mlp = MLP(C, size.decoder_mlp, nn.ReLU())
        self.layer_norm3 = nn.LayerNorm(C, eps=1e-6)
        self.cross_attn_image_to_token = DecoderAttention(C, heads)
        self.layer_norm4 = nn.LayerNorm(C, eps=1e-6)

    def forward(self, tokens, image, token_code, image_code):
        if self.first:                                             # the tokens still are the prompts, their own position code
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            q = tokens + token_code
            tokens = tokens + self.self_attn(q, q, tokens)
        tokens = self.layer_norm1(tokens)
        tokens = tokens + self.cross_attn_token_to_image(tokens + token_code, image + image_code, image)
        tokens = self.layer_norm2(tokens)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        image = image + self.cross_attn_image_to_token(image + image_code, tokens + token_code, tokens)
        return tokens, self.layer_norm4(image)


class TwoWayTransformer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(size, first=i == 0) for i in range(2))
        self.final_attn_token_to_image = DecoderAttention(size.prompt, size.decoder_heads)
        self.layer_norm_final_attn = nn.LayerNorm(size.prompt, eps=1e-5)

    def forward(self, prompts, image, image_code):
        tokens = prompts
        for layer in self.layers:
            tokens, image = layer(tokens, image, prompts, image_code)
        tokens = tokens + self.final_attn_token_to_image(tokens + prompts, image + image_code, image)
        return self.layer_norm_final_attn(tokens), image


class HyperMLP(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(width, width), nn.Linear(width, out)
        self.layers = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x):
        return self.proj_out(F.relu(self.layers[0](F.relu(self.proj_in(x)))))


class MaskDecoder(nn.Module):
    def __init__(self, size):
        super().__init__()
        C = size.prompt
        self.iou_token, self.mask_tokens = nn.Embedding(1, C), nn.Embedding(MASKS, C)
        self.transformer = TwoWayTransformer(size)
        self.upscale_conv1, self.upscale_conv2 = nn.ConvTranspose2d(C, C // 4, 2, 2), nn.ConvTranspose2d(C // 4, C // 8, 2, 2)
        self.upscale_layer_norm = LayerNorm2d(C // 4)
        self.output_hypernetworks_mlps = nn.ModuleList(HyperMLP(C, C // 8) for _ in range(MASKS))
        self.iou_prediction_head = HyperMLP(C, MASKS)

    def forward(self, image, image_code, sparse, dense, multimask=True):
        """image (B, C, e, e), image_code (1, C, e, e), sparse (B, M, C) or None, dense (B or 1, C, e, e)
        -> masks (B, 3 or 1, 4e, 4e) logits, iou (B, 3 or 1) as predicted by the model."""
        B, _, e, _ = image.shape
        tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(B, -1, -1)
        if sparse is not None:
            tokens = torch.cat([tokens, sparse.to(tokens.dtype)], 1)
        image, image_code = ((x.flatten(2).transpose(1, 2)) for x in (image + dense, image_code))  # (B, e * e, C)
        tokens, image = self.transformer(tokens, image, image_code)
        x = self.upscale_conv1(image.transpose(1, 2).unflatten(2, (e, e)))
        x = F.gelu(self.upscale_conv2(F.gelu(self.upscale_layer_norm(x))))                        # (B, C / 8, 4e, 4e)
        weights = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        masks = (weights @ x.flatten(2)).unflatten(2, x.shape[2:])
        iou = self.iou_prediction_head(tokens[:, 0])
        chosen = slice(1, None) if multimask else slice(0, 1)
        return masks[:, chosen], iou[:, chosen]


# ------------------------------------------------------------------------------------------------------------- SAM

class SAM(nn.Module):
    """The promptable model. `size` is a name in SIZES or a SAMSize; weights are random until `load_weights`."""

    def __init__(self, size="b"):
        super().__init__()
        self.size = SIZES[size] if isinstance(size, str) else size
        self.shared_image_embedding = PositionCode(self.size.prompt)
        self.vision_encoder = ImageEncoder(self.size)
        self.prompt_encoder = PromptEncoder(self.size)
        self.mask_decoder = MaskDecoder(self.size)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def encode_image(self, images):
        """images (B, 3, image, image), RGB in [0, 1] -> F_sam (B, C, e, e). Raises ValueError for another size: the
        position tables are learned for one grid."""
        side = self.size.image
        if images.shape[-2:] != (side, side):
            raise ValueError(f"SAM takes images of {side} x {side} pixels, got {tuple(images.shape[-2:])}: resize them first.")
        return self.vision_encoder((images - self.mean) / self.std)

    def decode(self, image, sparse, dense, multimask=True):
        """Masks for encoded images; shapes as in MaskDecoder.forward."""
        return self.mask_decoder(image, self.shared_image_embedding.grid(image.shape[-1]), sparse, dense, multimask)

    def forward(self, images, points=None, labels=None, boxes=None, masks=None, multimask=True):
        """images and the prompts of PromptEncoder.forward -> masks (B, 3 or 1, 4e, 4e) logits, iou (B, 3 or 1)."""
        sparse, dense = self.prompt_encoder(self.shared_image_embedding, points, labels, boxes, masks)
        return self.decode(self.encode_image(images), sparse, dense, multimask)


# A second name of shared_image_embedding.positional_embedding in some files.
UNUSED = {"prompt_encoder.shared_embedding.positional_embedding"}

# Meta's own files (sam_vit_b_01ec64.pth): pattern in their names -> ours, all applied in this order.
META_NAMES = (
    (r"^image_encoder\.", "vision_encoder."), (r"\.blocks\.", ".layers."), (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"neck\.0\.", "neck.conv1."), (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."), (r"neck\.3\.", "neck.layer_norm2."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."), (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."), (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."), (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(mlps\.\d|prediction_head)\.layers\.0\.", r"\1.proj_in."), (r"(mlps\.\d|prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(mlps\.\d|prediction_head)\.layers\.2\.", r"\1.proj_out."),
)


def open_weights(path):
    """A safetensors file in Hugging Face layout, or one of Meta's .pth files -> {name: shape}, function from name to tensor."""
    if path.suffix == ".pth":
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for pattern, ours in META_NAMES:
            state = {re.sub(pattern, ours, key): tensor for key, tensor in state.items()}
        return {key: tuple(tensor.shape) for key, tensor in state.items()}, state.__getitem__

    def read(key):
        with safe_open(path, "pt") as file:                        # closing returns the pages read: one copy in memory, not two
            return file.get_tensor(key)

    with safe_open(path, "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if key not in UNUSED}, read


def load_weights(tensors, path):
    """Copy a weight file, Hugging Face's safetensors or Meta's .pth, into `tensors`, a dict name -> tensor to overwrite
    (`model.state_dict()`), in the tensors' own types. Raises FileNotFoundError, or ValueError naming the file and every
    key that does not fit."""
    path = Path(path)
    path = path / "model.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Expected SAM weights as model.safetensors, or Meta's .pth.")
    try:
        shapes, read = open_weights(path)
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole file of SAM's weights ({error}). Fetch it again: model.safetensors from a "
                         "Hugging Face repository such as facebook/sam-vit-base, or Meta's .pth.") from error
    except (AttributeError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} holds something else than a state dict of tensors ({error}). Save that alone, or fetch Meta's "
                         "file.") from error
    wanted = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wrong = sorted(key for key in shapes.keys() | wanted.keys() if shapes.get(key) != wanted.get(key))
    if wrong:
        rows = "".join(f"\n  {key}: file {shapes.get(key, 'lacks it')}, model {wanted.get(key, 'lacks it')}" for key in wrong)
        raise ValueError(f"{path} does not hold this SAM; {len(wrong)} tensors do not fit:{rows}")
    for key, tensor in tensors.items():
        tensor.copy_(read(key))
