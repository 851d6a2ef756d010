"""SigLIP (Zhai et al. 2023, arXiv:2303.15343): an image tower and a text tower, trained to agree.

Checked against transformers' SiglipModel. Modules are named as there, so its weights load. Left out: the
vision tower's pooling head (segmentation needs a feature map) and the contrastive loss. Needs torch and
safetensors.

    tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")
    tokens, sentence = SigLIP("so400m").encode_text(*tokenize(tokenizer, ["the ship", "a red car"]))

B images, N phrases, L text tokens (EOS included), D width, g patches per side, P = g * g, H W pixels.
"""
import math
import string
import textwrap
from dataclasses import dataclass, replace

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
    mlp: int                  # hidden width of the MLPs
    image_size: int = 384     # side of the vision tower's input in pixels
    patch: int = 14           # side of a patch in pixels
    vocab: int = 32000        # number of text tokens
    stem: tuple = ()          # widths of stride-2 convolutions before the patch embedding (tiny)
    logit_scale: float = 0.0  # initial log of the cosine's scale a; weights replace it

CONFIGS = {
    "so400m": SigLIPConfig(width=1152, layers=27, heads=16, mlp=4304),
    # Untrained towers learn faster with a convolution stem and a cosine scale of exp(2.3) = 10.
    "tiny": SigLIPConfig(width=64, layers=3, heads=2, mlp=192, image_size=96, patch=8, vocab=128,
                         stem=(24, 48), logit_scale=2.3),
}

class Attention(nn.Module):
    """Multi-head self-attention. q, k and v are three Linears, as in the published weights."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask=None):                                       # x (B, P, D) or (N, L, D)
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)   # (B, heads, P, D / heads)
        k = self.k_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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

    def forward(self, x, mask=None):                                       # (B, P, D) or (N, L, D)
        for layer in self.layers:
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, mask, use_reentrant=False)
            else:
                x = layer(x, mask)
        return x

def sincos_position_embedding(g, width):
    """Returns (g * g, width): sines and cosines of a patch's row, then of its column. The weights of
    so400m replace it; tiny starts from it, and learns faster than from random numbers."""
    position = (torch.arange(g) + 0.5) / g
    frequencies = 2 ** torch.linspace(-2, math.log2(g / 4), width // 4)        # cycles per image side
    angles = 2 * torch.pi * position[:, None] * frequencies                    # (g, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], 1) / 2                      # / 2: as text embeddings
    rows = axis.repeat_interleave(g, 0)                                        # 0 0 1 1, if g were 2
    columns = axis.repeat(g, 1)                                                # 0 1 0 1
    return torch.cat([rows, columns], 1)

class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = (3, *config.stem)
        stem = []
        for c_in, c_out in zip(widths, widths[1:]):             # each halves the side
            conv = nn.Conv2d(c_in, c_out, kernel_size=3, stride=2, padding=1, bias=False)
            stem += [conv, nn.BatchNorm2d(c_out), nn.GELU()]
        self.stem = nn.Sequential(*stem)
        patch = config.patch // 2 ** len(config.stem)
        g = config.image_size // config.patch
        self.patch_embedding = nn.Conv2d(widths[-1], config.width, patch, patch)
        self.position_embedding = nn.Embedding(g * g, config.width)    # an Embedding only for its name
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

    def forward(self, pixels):                                     # (B, 3, H, W) -> (B, P, D)
        return self.post_layernorm(self.encoder(self.embeddings(pixels)))

class TextEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.width)
        self.position_embedding = nn.Embedding(MAX_TOKENS, config.width)
        nn.init.normal_(self.token_embedding.weight, std=0.5)        # for tiny: std 0.5 learns faster
        nn.init.normal_(self.position_embedding.weight, std=0.5)

    def forward(self, ids):                                                # (N, L) -> (N, L, D)
        return self.token_embedding(ids) + self.position_embedding.weight[:ids.shape[1]]

class TextTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.width)

    def forward(self, ids, mask):                                  # (N, L) -> (N, L, D), (N, D)
        attn_mask = mask[:, None, None, :]             # (N, 1, 1, L): no query sees padding
        tokens = self.final_layer_norm(self.encoder(self.embeddings(ids), attn_mask))
        eos = mask.sum(1) - 1                          # index of each phrase's EOS
        sentence = tokens[torch.arange(len(ids), device=ids.device), eos]                # (N, D)
        return tokens, self.head(sentence)

class SigLIP(nn.Module):
    """Both towers, random until `load_weights`. `config` is a SigLIPConfig or its name.
    logit_scale = log(a) and logit_bias = b turn a cosine into a logit, a * cos + b."""

    def __init__(self, config="so400m"):
        super().__init__()
        self.config = CONFIGS[config] if isinstance(config, str) else config
        self.text_model = TextTower(self.config)
        self.vision_model = VisionTower(self.config)
        self.logit_scale = nn.Parameter(torch.tensor([self.config.logit_scale]))
        self.logit_bias = nn.Parameter(torch.zeros(1))

    def encode_image(self, images):
        """images (B, 3, H, W), RGB in [0, 1], any size -> feature map V (B, D, g, g). They are resized
        without antialiasing, as in RSRefSeg's released code."""
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, not floating point in [0, 1]: divide by 255.")
        side = self.config.image_size
        pixels = F.interpolate((images - 0.5) / 0.5, size=(side, side), mode="bilinear")
        g = side // self.config.patch
        return self.vision_model(pixels).transpose(1, 2).unflatten(2, (g, g))

    def encode_text(self, ids, mask):
        """ids (N, L) and mask (N, L), True on tokens and False on padding, both from `tokenize`
        -> tokens T (N, L, D), sentence s (N, D): T at each phrase's EOS, through the head. SigLIP was
        trained on phrases padded to 64 tokens, without a mask, and read at the 64th. RSRefSeg does not
        pad to 64 and reads at the EOS, as its released code does; LoRA adapts the tower to that."""
        return self.text_model(ids, mask)

def canonical(phrase):
    """Lower case, no punctuation, single spaces: SigLIP's own text cleaning."""
    return " ".join(phrase.lower().translate(str.maketrans("", "", string.punctuation)).split())

def tokenize(tokenizer, phrases):
    """N phrases -> ids (N, L) int64 padded with EOS, mask (N, L) bool. L is the longest phrase, at most
    64 tokens: a longer phrase keeps its first 63 tokens and EOS. tokenizer: a tokenizers.Tokenizer."""
    tokenizer.no_padding()                          # a tokenizer.json may have both switched on
    tokenizer.no_truncation()
    rows = []
    for phrase in phrases:
        ids = [i for i in tokenizer.encode(canonical(phrase)).ids if i != EOS]
        rows.append(torch.tensor(ids[:MAX_TOKENS - 1] + [EOS]))           # EOS comes after the cut
    lengths = torch.tensor([len(row) for row in rows])
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EOS)
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]

def load_weights(model, path):
    """Load a safetensors file into a SigLIP, which may be on the meta device. Raises ValueError for a
    file that is damaged or does not fit."""
    try:
        state = load_file(path)
        state = {key: state[key].float() for key in state if not key.startswith("vision_model.head.")}
        vocab = len(state["text_model.embeddings.token_embedding.weight"])
        if vocab != model.config.vocab:              # SigLIP 2: the same towers, 256,000 tokens
            model.config = replace(model.config, vocab=vocab)
            model.text_model.embeddings = TextEmbeddings(model.config)
        model.load_state_dict(state, assign=True)
    except (SafetensorError, KeyError, RuntimeError) as error:
        text = textwrap.shorten(str(error), 1000, placeholder=" ...")
        raise ValueError(f"{path} is damaged or no SigLIP: {text}") from error
