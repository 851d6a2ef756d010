"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): an image tower and a text tower, trained to agree.

Checked against transformers' SiglipModel, on phrases without padding. Modules are named as the tensors
of google/siglip-so400m-patch14-384. Left out: the pooling head of the vision tower (segmentation needs
the feature map, not one vector) and the contrastive loss. Needs torch and safetensors.

B images or phrases, L text tokens (EOS included), D width, g patches per side, P = g * g, H W pixels.
"""
import math
import string
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

EOS = 1           # id of </s>, which is also the padding
MAX_TOKENS = 64   # rows of the text tower's position embedding


@dataclass(frozen=True)
class SigLIPConfig:
    width: int
    layers: int
    heads: int
    mlp: int
    image: int                # side of the vision tower's input in pixels
    patch: int                # side of a patch in pixels
    vocab: int
    stem: tuple = ()          # widths of stride-2 convolutions before the patch embedding (tiny)
    logit_scale: float = 0.0  # initial log of the cosine's scale a; weights replace it


CONFIGS = {
    "so400m": SigLIPConfig(width=1152, layers=27, heads=16, mlp=4304, image=384, patch=14, vocab=32000),
    # Untrained towers learn faster with a convolution stem and a cosine scale of exp(2.3) = 10.
    "tiny": SigLIPConfig(64, 3, 2, 192, image=96, patch=8, vocab=128, stem=(24, 48), logit_scale=2.3),
}


class Attention(nn.Module):
    """Multi-head self-attention. q, k and v are three Linears, because LoRA adapts each one."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, heads, L, D / heads)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # The fused kernel is the fastest on CUDA, and in bf16 on Intel CPUs with matrix units (AMX).
        fused = x.is_cuda or (q.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())
        if fused or mask is not None:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:              # the same, faster elsewhere: the scores of four heads stay in a CPU's cache
            parts = zip((q * q.shape[-1] ** -0.5).split(4, 1), k.split(4, 1), v.split(4, 1))
            x = torch.cat([(a @ b.transpose(2, 3)).softmax(-1) @ c for a, b, c in parts], 1)
        return self.out_proj(x.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class EncoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.self_attn = Attention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config.width, config.mlp)

    def forward(self, x, mask=None):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(config.layers)])
        self.checkpoint_activations = False      # True: recompute each layer in the backward pass

    def forward(self, x, mask=None):
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, mask, use_reentrant=False)
            else:
                x = layer(x, mask)
        return x


def sincos_position_embedding(g, width):
    """Returns (g * g, width): sines and cosines of row and column, with 1/4 to g/4 periods per side of
    the grid. A better start than noise for a tower without pretraining."""
    position = (torch.arange(g) + 0.5) / g
    periods = 2 ** torch.linspace(-2, math.log2(g / 4), width // 4)
    angles = 2 * torch.pi * position[:, None] * periods
    axis = torch.cat([angles.sin(), angles.cos()], 1) / 2                      # (g, width / 2)
    return torch.cat([axis.repeat_interleave(g, 0), axis.repeat(g, 1)], 1)     # row, column


class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = (3, *config.stem)
        stem = []
        for c_in, c_out in zip(widths, widths[1:]):             # each halves the side
            stem += [nn.Conv2d(c_in, c_out, 3, 2, 1, bias=False), nn.BatchNorm2d(c_out), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        patch = config.patch // 2 ** len(config.stem)
        g = config.image // config.patch
        self.patch_embedding = nn.Conv2d(widths[-1], config.width, patch, patch)
        self.position_embedding = nn.Embedding(g * g, config.width)
        self.position_embedding.weight.data = sincos_position_embedding(g, config.width)

    def forward(self, pixels):
        x = self.patch_embedding(self.stem(pixels)).flatten(2).transpose(1, 2)   # (B, P, D)
        return x + self.position_embedding.weight


class VisionTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, pixels):
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))


class TextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(MAX_TOKENS, config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.position_embedding.weight, std=0.5)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]


class TextTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.width)

    def forward(self, ids, mask):
        attn_mask = mask[:, None, None, :]             # so that a phrase means the same in any batch
        tokens = self.final_layer_norm(self.encoder(self.embeddings(ids), attn_mask))
        eos = mask.sum(1) - 1                          # index of each phrase's EOS
        return tokens, self.head(tokens[torch.arange(len(ids), device=ids.device), eos])


class SigLIP(nn.Module):
    """Both towers, with random weights (tuned for tiny) until `load_weights`. `config` is a SigLIPConfig
    or its name. logit_scale = log(a) and logit_bias = b turn a cosine into a logit, a * cos + b."""

    def __init__(self, config="so400m"):
        super().__init__()
        self.config = CONFIGS[config] if isinstance(config, str) else config
        self.text_model = TextTower(self.config)
        self.vision_model = VisionTower(self.config)
        self.logit_scale = nn.Parameter(torch.tensor([self.config.logit_scale]))
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def encode_image(self, images):
        """images (B, 3, H, W), RGB in [0, 1], any size -> feature map V (B, D, g, g)."""
        side = self.config.image
        pixels = F.interpolate((images - 0.5) / 0.5, size=(side, side), mode="bilinear")
        g = side // self.config.patch
        return self.vision_model(pixels).transpose(1, 2).unflatten(2, (g, g))

    def encode_text(self, ids, mask):
        """ids (B, L) and mask (B, L), True on tokens and False on padding, both from `tokenize`
        -> tokens T (B, L, D) after the final norm, sentence s (B, D): T at each phrase's EOS, through
        the head. SigLIP was trained on phrases padded to 64 tokens, unmasked, and read at the last one.
        RSRefSeg gives it phrases without padding; where a batch needs some, the mask hides it."""
        return self.text_model(ids, mask)


def canonical(phrase):
    """Lower case, no punctuation, single spaces: SigLIP's own text cleaning."""
    return " ".join(phrase.lower().translate(str.maketrans("", "", string.punctuation)).split())


def tokenize(tokenizer, phrases):
    """B phrases -> ids (B, L) int64 padded with EOS, mask (B, L) bool. L is the longest phrase, at most
    64 tokens: a longer phrase keeps its first 63 tokens and EOS."""
    rows = []
    for phrase in phrases:
        ids = tokenizer.encode(canonical(phrase)).ids              # ends with EOS
        if len(ids) > MAX_TOKENS:
            ids = ids[:MAX_TOKENS - 1] + [EOS]
        rows.append(torch.tensor(ids))
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EOS)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def out_of_vocabulary(tokenizer, phrases):
    """Returns the words that map to <unk>: none with SigLIP's tokenizer, which spells them in bytes."""
    words = {word for phrase in phrases for word in canonical(phrase).split()}
    return sorted(word for word in words if "<unk>" in tokenizer.encode(word).tokens)


def load_weights(target, path):
    """Copy a safetensors file in Hugging Face layout into `target`, {name: tensor to overwrite}, for
    example `model.state_dict()`. Raises ValueError naming the file and each tensor that does not fit."""
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}). Download it again.") from error
    pooling_head = "vision_model.head."                     # in the published file, not in this model
    found = {key: list(state[key].shape) for key in state if not key.startswith(pooling_head)}
    expected = {key: list(tensor.shape) for key, tensor in target.items()}
    mismatched = [key for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)]
    if mismatched:
        rows = [f"\n  {key}: file {found.get(key)}, model {expected.get(key)}" for key in mismatched]
        raise ValueError(f"{path} does not hold this SigLIP, {len(rows)} tensors differ:{''.join(rows)}")
    for key, tensor in target.items():
        tensor.copy_(state[key])
