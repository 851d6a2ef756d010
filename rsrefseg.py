"""RSRefSeg (Chen et al. 2025, arXiv:2501.06809): segment what a phrase names in a satellite or aerial image.

SigLIP reads image and phrase, AttnPrompter turns their agreement into prompts, SAM draws the mask; LoRA adapts the
frozen towers.

    python rsrefseg.py IMAGE "the gray ship on the left" ["another phrase" ...] --checkpoint FILE [--out DIR]
        [--phrases FILE] [--tile PIXELS] [--json] [--explain]       IMAGE may be a folder of images

Shapes: B images, N phrases (N = B k, the k phrases of an image side by side), L text tokens of a phrase (EOS included),
D SigLIP width, C SAM prompt width, g SigLIP grid, e SAM grid, M sparse prompts, H W pixels, r rank.
"""
import argparse
import json
import math
import os
import pickle
import re
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import lora
import sam as sam_file
import siglip as siglip_file
from data import IMAGES, image_tensor, lines, overlay, positive, read_image, run, to_rgb, toy_tokenizer, verify
from sam import SAM
from siglip import SigLIP, canonical, load_tokenizer, tokenize, unknown_words


@dataclass(frozen=True)
class Size:
    sam: object          # a row of sam.SIZES by its name, or a SAMSize
    siglip: object       # a row of siglip.SIZES by its name, or a SigLIPSize
    lora_rank: int       # 0: the towers train whole


SIZES = {name: Size(name, "so400m", 16) for name in ("b", "l", "h")} | {"tiny": Size("tiny", "tiny", 0)}

# What the paper's ablations change, beside lora_rank and down_blocks; the paper's model has the first of each.
ABLATIONS = {"text_lora": (True, False), "prompts": ("both", "sparse", "dense"), "text": ("both", "local", "global")}

# Where the weights come from, at the revisions this code was written for, and the sha256 of model.safetensors there.
SIGLIP_HUB = "google/siglip-so400m-patch14-384"
SAM_HUB = {"b": "facebook/sam-vit-base", "l": "facebook/sam-vit-large", "h": "facebook/sam-vit-huge"}
PINNED = {
    "google/siglip-so400m-patch14-384": ("9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
                                         "ea2abad2b7f8a9c1aa5e49a244d5d57ffa71c56f720c94bc5d240ef4d6e1d94a"),
    "facebook/sam-vit-base": ("70c1a07f894ebb5b307fd9eaaee97b9dfc16068f",
                              "892c410e496344e527255ccdcb2cb7244a609acb5389c7c4fdba1288f861c579"),
    "facebook/sam-vit-large": ("6851e0441005b0fb96f2cc4dfac472f3d1b14af1",
                               "a57e1b13cd1545938dfcbc9fb26df7f60de6650237a9383382a874a623564b81"),
    "facebook/sam-vit-huge": ("87aecf0df4ce6b30cd7de76e87673c49644bdf67",
                              "edfb0462392541fca9af44ff039bfb32dbd0c939997f3abb77a26e23af7afd7c"),
}

# What LoRA adapts (section II-B and II-D): every Linear of SAM's encoder and its neck, every attention Linear of SigLIP,
# and the head that makes the sentence vector.
LORA_TARGETS = [
    "sam.vision_encoder.layers.*.attn.qkv", "sam.vision_encoder.layers.*.attn.proj",
    "sam.vision_encoder.layers.*.mlp.lin[12]", "sam.vision_encoder.neck.conv[12]",
    "siglip.vision_model.encoder.layers.*.self_attn.[qkv]_proj", "siglip.vision_model.encoder.layers.*.self_attn.out_proj",
]
TEXT_LORA_TARGETS = [
    "siglip.text_model.encoder.layers.*.self_attn.[qkv]_proj", "siglip.text_model.encoder.layers.*.self_attn.out_proj",
    "siglip.text_model.head",
]


# ------------------------------------------------------------------------------------------------------ AttnPrompter

class ConvBNGELU(nn.Module):
    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        return F.gelu(self.bn(self.conv(x)))


class AttnPrompter(nn.Module):
    """SigLIP's features -> SAM's prompts (section II-C, equations 3 and 4).

        here          meaning                                                        shape
        v             image features V                                               (N, D, g, g)
        t, mask       word features T, and which of them are words, not padding      (N, L, D), (N, L)
        s             sentence feature                                               (N, D)
        a, b          SigLIP's scale exp(logit_scale) and bias                       (1,)
        word_map      how well each place matches each word, in [0, 1]               (N, L, g, g)
        sentence_map  how well each place matches the sentence, logits               (N, g, g)
        attended      local, global and plain features                               (N, 3D, g, g)

    `text`, "local" or "global", leaves the other out: 2D channels.
    """

    def __init__(self, width, channels, down_blocks=2, text="both"):
        super().__init__()
        self.text = text
        self.channel = ConvBNGELU((3 if text == "both" else 2) * width, channels, 1)
        self.spatial = nn.Sequential(*[ConvBNGELU(channels, channels, 3, 2, 1) for _ in range(down_blocks)])
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, v, t, s, mask, a, b, position_code):
        """-> sparse prompts (N, M, C), word_map, sentence_map. position_code (1, C, g, g) is SAM's code of the grid."""
        v_unit, t_unit, s_unit = F.normalize(v, dim=1), F.normalize(t, dim=2), F.normalize(s, dim=1)
        word_map = torch.sigmoid(a * torch.einsum("ndhw,nld->nlhw", v_unit, t_unit) + b)
        sentence_map = a * torch.einsum("ndhw,nd->nhw", v_unit, s_unit) + b
        words = mask[:, :, None, None].to(word_map.dtype)
        mean_map = (word_map * words).sum(1, keepdim=True) / words.sum(1, keepdim=True)          # released: padding too
        f_local = (v + v * mean_map) / 2                                                         # eq. 3, local semantics
        f_global = v * sentence_map.sigmoid()[:, None]                                           # eq. 3, global semantics
        parts = {"both": [f_local, f_global, v], "local": [f_local, v], "global": [f_global, v]}[self.text]
        attended = torch.cat(parts, 1)                                                           # (N, 3D, g, g)
        x = self.channel(attended) + position_code                                               # (N, C, g, g)
        x = self.project(self.spatial(x))                                                        # eq. 4: (N, C, sqrt M, sqrt M)
        return x.flatten(2).transpose(1, 2), word_map, sentence_map


# ---------------------------------------------------------------------------------------------------------- RSRefSeg

class Unwritten(TorchFunctionMode):
    """Under this mode torch.nn.init leaves memory as it is: b's random numbers take 8 s, and a weight file overwrites them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"]
        return function(*args, **kwargs or {})


def logits_at(logits, image_size, height, width):
    """Mask logits (N, 1, 4e, 4e) -> (N, height, width): bilinear to the model's input, then to the image. Above 0 is the mask."""
    full = F.interpolate(logits.float(), size=(image_size, image_size), mode="bilinear", align_corners=False)
    return F.interpolate(full, size=(height, width), mode="bilinear", align_corners=False)[:, 0]


def windows(length, tile):
    """Along one side of an image: the length of a window and where the windows start, at least half over each other."""
    tile = min(tile or length, length)
    steps = math.ceil(2 * (length - tile) / tile)
    return tile, [round(i * (length - tile) / max(1, steps)) for i in range(steps + 1)]


def shares(starts, tile, length):
    """(windows, tile): how much each window counts at its pixels along one side, together 1 at each pixel of the image, least
    where it ends inside the image, so that no seam shows."""
    hill, total = torch.sin((torch.arange(tile) + 0.5) / tile * math.pi) ** 2 + 1e-4, torch.zeros(length)
    for start in starts:
        total[start:start + tile] += hill
    return [hill / total[start:start + tile] for start in starts]


class RSRefSeg(nn.Module):
    """The whole model. `sam` is a name in SIZES, or a Size, which `save` cannot write; weights are random until loaded. The
    defaults are the paper's model; text_lora, down_blocks, prompts and text are what its ablations change.

    With lora_rank > 0 the towers are frozen and adapted; prompter, mask-prompt convolutions and mask decoder train
    whole. With lora_rank = 0 the towers train whole too. `lora_rank=None` takes the size's own. Parameters that
    cannot receive a gradient (SAM's IoU head, point and no-mask embeddings, and what an ablation leaves out) are
    frozen; of the mask decoder's four masks only the first is used, so the hyper-networks of the others train with a
    gradient of zero, as in the released code.

    `dtype` is the type of the towers' frozen Linear and convolution weights: the autocast type halves their memory and saves
    casting them at every call (the model then runs under autocast of that type only). What trains stays fp32. `init=False`
    leaves the towers unwritten, to be loaded at once.
    """

    def __init__(self, sam="b", lora_rank=None, lora_alpha=16, lora_dropout=0.1, text_lora=True, down_blocks=2, prompts="both",
                 text="both", dtype=torch.float32, init=True):
        super().__init__()
        size = SIZES[sam] if isinstance(sam, str) else sam
        lora_rank = size.lora_rank if lora_rank is None else lora_rank
        self.settings = dict(sam=sam, lora_rank=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout, text_lora=text_lora,
                             down_blocks=down_blocks, prompts=prompts, text=text)
        with nullcontext() if init else Unwritten():
            self.siglip, self.sam = SigLIP(size.siglip), SAM(size.sam)
        self.prompter = AttnPrompter(self.siglip.size.width, self.sam.size.prompt, down_blocks, text)
        self.image_size = self.sam.size.image
        self.tokenizer = toy_tokenizer() if sam == "tiny" else None     # b, l, h: comes with SigLIP's weights
        self.backbones = {}                                             # where the weights came from
        self.official_extra = {}                                        # what load_official met and this model has no use for
        if lora_rank:
            self.siglip.requires_grad_(False)
            encoder = self.sam.vision_encoder.requires_grad_(False)
            for module in (*self.siglip.modules(), *encoder.patch_embed.modules(), *encoder.layers.modules()):  # autocast's part
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    for parameter in module.parameters():           # unwritten ones hold nothing to convert: 2 s less
                        parameter.data = parameter.data.to(dtype) if init else torch.empty_like(parameter, dtype=dtype)
            lora.inject(self, LORA_TARGETS + TEXT_LORA_TARGETS * text_lora, lora_rank, lora_alpha, lora_dropout)
        prompt_encoder = self.sam.prompt_encoder
        unused = [self.sam.mask_decoder.iou_prediction_head, prompt_encoder.point_embed, prompt_encoder.not_a_point_embed,
                  prompt_encoder.mask_embed if prompts == "sparse" else prompt_encoder.no_mask_embed]
        if prompts == "dense":
            unused.append(self.prompter)
        if prompts == "sparse" and text == "local":
            unused.append(self.siglip.text_model.head)
        for module in unused:
            module.requires_grad_(False)

    def checkpoint_activations(self):
        """From now on training keeps only what enters each layer of the towers, and computes the rest again, backwards."""
        for encoder in (self.siglip.text_model.encoder, self.siglip.vision_model.encoder, self.sam.vision_encoder):
            encoder.checkpoint = True

    def encode(self, images):
        """images (B, 3, S, S) in [0, 1] -> F_sam (B, C, e, e), V (B, D, g, g): what both towers see, without the phrase."""
        return self.sam.encode_image(images), self.siglip.encode_image(images)

    def decode(self, features, ids, mask=None, taps=None):
        """Encoded images and N = B k phrases, those of one image side by side -> mask logits (N, 1, 4e, 4e)."""
        if len(ids) % len(features[0]):
            raise ValueError(f"{len(ids)} phrases for {len(features[0])} images: every image needs the same number.")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        t, s = self.siglip.encode_text(ids, mask)                                               # (N, L, D), (N, D)
        # Autocast is for the towers. The rest is 2 % of the work, and in bf16 it would move the mask's edge more than they do.
        with torch.autocast(t.device.type, enabled=False):
            t, s, f_sam, v = (x.float() for x in (t, s, *features))
            f_sam, v = (x.repeat_interleave(len(ids) // len(x), 0) for x in (f_sam, v))         # (N, C, e, e), (N, D, g, g)
            code = self.sam.shared_image_embedding
            a, b = self.siglip.logit_scale.exp(), self.siglip.logit_bias
            sparse, word_map, sentence_map = self.prompter(v, t, s, mask, a, b, code.grid(v.shape[-1]))
            side = 4 * f_sam.shape[-1]
            prior = F.interpolate(sentence_map[:, None], size=(side, side), mode="bilinear", align_corners=False)
            sparse = None if self.settings["prompts"] == "dense" else sparse
            prior = None if self.settings["prompts"] == "sparse" else prior
            _, dense = self.sam.prompt_encoder(code, masks=prior)                               # (N, C, e, e)
            logits, _ = self.sam.decode(f_sam, sparse, dense, multimask=False)                  # (N, 1, 4e, 4e)
        if taps is not None:
            taps.update(f_sam=f_sam, v=v, t=t, s=s, word_map=word_map, sentence_map=sentence_map, sparse=sparse, dense=dense)
        return logits

    def forward(self, images, ids, mask=None, taps=None):
        """images (B, 3, S, S) RGB in [0, 1], S = 1024 (tiny: 96); ids (N, L) int64 ending in EOS and mask (N, L), True on
        tokens, from `tokenize`; N = B k -> mask logits (N, 1, 4e, 4e), for b and l (N, 1, 256, 256).

        `taps`, a dict, receives the stages by name: f_sam, v, t, s, word_map, sentence_map, sparse, dense."""
        return self.decode(self.encode(images), ids, mask, taps)

    @staticmethod
    def loss(logits, masks, dice=False):
        """5 x binary cross-entropy at the size of masks (N, 1, H, W) in {0, 1} (areas in [0, 1] also serve); the logits are
        brought there bilinearly. `dice` adds a soft Dice loss: not in the paper, tiny uses it."""
        masks = masks.float()
        logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
        loss = 5 * F.binary_cross_entropy_with_logits(logits, masks)
        if dice:
            p = logits.sigmoid()
            overlap, area = (p * masks).sum((1, 2, 3)), (p + masks).sum((1, 2, 3))
            loss = loss + (1 - (2 * overlap + 1) / (area + 1)).mean()
        return loss

    @classmethod
    def map_loss(cls, sentence_map, masks, dice=False):
        """The same loss on the sentence map (N, g, g), against how much of each cell the mask covers: not in the paper.
        From scratch it is what makes the towers agree; pretrained towers do already."""
        cover = F.adaptive_avg_pool2d(masks.float(), sentence_map.shape[-2:])
        return cls.loss(sentence_map[:, None], cover, dice)

    def read_phrases(self, phrases):
        """N phrases -> ids (N, L), mask (N, L) on the model's device. Raises ValueError for none or an empty one."""
        for phrase in phrases or [""]:                                  # none is treated as an empty one
            if not canonical(phrase):
                raise ValueError(f"phrase {phrase!r} is empty: say what to segment, for example 'the ship on the left'.")
        return (x.to(self.sam.mean.device) for x in tokenize(self.tokenizer, phrases))

    @torch.inference_mode()
    def segment(self, image, phrases, tile=None, scores=None):
        """A PIL image or path, any size and mode, and N phrases -> (N, H, W) bool at the image's own size, on the CPU.

        The image is seen whole, at the model's input size, and encoded once. With `tile` the model sees windows of tile x tile
        pixels, half over each other, whose logits are blended: for small things in large scenes ("on the left" is then the
        left of a window). `scores`, a list, receives each phrase's mean probability over its mask, 0 for an empty one: an
        all-False mask means that nothing was found. Raises ValueError for an empty phrase.
        """
        image = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        phrases = [phrases] if isinstance(phrases, str) else phrases
        ids, mask = self.read_phrases(phrases)
        device, was_training = self.sam.mean.device, self.training
        self.eval()
        (h, ys), (w, xs) = windows(image.height, tile), windows(image.width, tile)
        down, across = shares(ys, h, image.height), shares(xs, w, image.width)
        found = torch.zeros(len(phrases), image.height, image.width, dtype=torch.bool)
        total = torch.zeros(len(phrases))                                               # of the probabilities inside each mask
        above = [torch.zeros(0, image.width)] * len(phrases)                            # what the strip above adds to this one
        with tqdm(total=len(ys) * len(xs), desc="windows", disable=len(ys) * len(xs) == 1) as bar:
            for y, following, share_y in zip(ys, [*ys[1:], image.height], down):        # a strip of windows, from top to bottom
                answers = []
                for x in xs:
                    pixels = image_tensor(image.crop((x, y, x + w, y + h)), self.image_size)[None].to(device) / 255
                    answers.append(self(pixels, ids, mask))
                    bar.update()
                done = following - y                                                    # no later window reaches these rows
                for i in range(len(phrases)):                                           # one at a time: their logits are large
                    logits = F.pad(above[i], (0, 0, 0, h - len(above[i])))
                    for x, share_x, answer in zip(xs, across, answers):
                        answer = logits_at(answer[i:i + 1], self.image_size, h, w)[0].cpu()
                        logits[:, x:x + w] += answer.mul_(share_x).mul_(share_y[:, None])
                    final, above[i] = logits[:done], logits[done:].clone()
                    found[i, y:following] = above_zero = final > 0
                    total[i] += final[above_zero].sigmoid().sum()
        if scores is not None:                                                          # one.sum() would take 8 bytes a pixel
            scores += [float(p / one.count_nonzero().clamp(min=1)) for p, one in zip(total, found)]
        self.train(was_training)
        return found

    # ------------------------------------------------------------------------------------------------ weights on disk

    def load_backbones(self, siglip=SIGLIP_HUB, sam=None):
        """Load both towers, each from a safetensors file, a folder holding model.safetensors, or a hub name, and the
        tokenizer.json beside SigLIP's. `sam` may also be one of Meta's .pth files; None takes the size's own hub name.
        Raises FileNotFoundError or ValueError."""
        sam = sam or SAM_HUB[self.settings["sam"]]
        self.tokenizer = load_tokenizer(fetch(siglip, "tokenizer.json"))
        siglip_file.load_weights(lora.base_state_dict(self.siglip), fetch(siglip, "model.safetensors"))
        sam_file.load_weights(lora.base_state_dict(self.sam), fetch(sam, "model.safetensors"))
        self.backbones = dict(siglip=lasting(siglip), sam=lasting(sam))
        return self

    @classmethod
    def from_pretrained(cls, sam="b", siglip=SIGLIP_HUB, sam_weights=None, **settings):
        """Pretrained towers, fresh LoRA and prompter: where training starts. Downloads on first use."""
        return cls(sam, init=False, **settings).load_backbones(siglip, sam_weights)

    def save(self, path, **metadata):
        """Write what training changes, and all that `from_checkpoint` needs, as safetensors: a whole file or none."""
        about = dict(metadata, settings=self.settings)
        self.refuse_merged()
        if self.settings["lora_rank"]:
            if not self.backbones:
                raise ValueError("the frozen towers hold random weights, which a checkpoint leaves out: call load_backbones "
                                 "first.")
            about["backbones"] = self.backbones                         # the frozen towers stay where they are
        else:
            about["tokenizer"] = self.tokenizer.to_str()                # the file holds all there is, so this too
        tensors = {key: tensor.contiguous() for key, tensor in lora.trained_state_dict(self).items()}
        with whole_file(path) as partial:
            save_file(tensors, partial, {key: json.dumps(value) for key, value in about.items()})

    def refuse_merged(self):
        if self.settings["lora_rank"] and not lora.adapted_layers(self):
            raise ValueError("lora.merge has folded the adapters into weights that this file leaves out: save before merging.")

    def load_trained(self, path):
        """Load what `save` wrote. Raises ValueError unless its tensors are exactly those that train here."""
        about, tensors = read_checkpoint(path)
        self.copy_trained(tensors, about["settings"], path)

    def copy_trained(self, tensors, settings, path):
        """Overwrite what trains with `tensors`, which were trained with `settings` and come from `path`."""
        wanted = lora.trained_state_dict(self)
        wrong = sorted(key for key in tensors.keys() | wanted.keys()
                       if key not in tensors or key not in wanted or tensors[key].shape != wanted[key].shape)
        if wrong or any(settings[name] != self.settings[name] for name in ABLATIONS):        # some ablations differ in no shape
            raise ValueError(f"{path} was trained as {settings}, this model is {self.settings}: {len(wrong)} tensors do not fit"
                             f"{', first ' + wrong[0] if wrong else ''}. Build the model with the checkpoint's settings (--sam "
                             f"{settings['sam']}).")
        for key, tensor in wanted.items():
            tensor.copy_(tensors[key])

    @classmethod
    def load_official(cls, path, siglip=SIGLIP_HUB, **settings):
        """A checkpoint in the released code's layout, whole, in eval mode. Its size, rank and prompter depth are read from
        the keys (alpha is 16 unless `settings` say otherwise), the tokenizer from SigLIP's source. Raises
        FileNotFoundError, or ValueError naming every key that does not fit."""
        state = read_official(path)
        block = "backbone.base_model.model.model.layers."
        layers = len({key.removeprefix(block).split(".")[0] for key in state if key.startswith(block)})
        sizes = {sam_file.SIZES[size.sam].layers: name for name, size in SIZES.items()}
        first = state.get(f"{block}0.attn.qkv.lora_A.default.weight")
        if layers not in sizes or first is None:
            raise ValueError(f"{path} is no checkpoint of the released code: {layers} adapted SAM layers under {block}")
        down_blocks = len({key.split(".")[1] for key in state if key.startswith("prompter_down_spatial.")}) - 1
        model = cls(**settings | dict(sam=sizes[layers], lora_rank=first.shape[0], down_blocks=down_blocks), init=False)
        model.tokenizer = load_tokenizer(fetch(siglip, "tokenizer.json"))
        wanted = {official_name(key, down_blocks): tensor for key, tensor in model.state_dict().items()}
        extra = state.keys() & (pooling_names().keys() | {POSITION_ALIAS})
        wrong = sorted(key for key in (state.keys() | wanted.keys()) - extra
                       if key not in state or key not in wanted or state[key].shape != wanted[key].shape)
        if wrong:
            raise ValueError(f"{path} does not fit size {sizes[layers]}; {len(wrong)} keys missing, left over or misshapen:\n  " +
                             "\n  ".join(wrong))
        for key, tensor in wanted.items():
            tensor.copy_(state[key])
        model.official_extra = {key: state[key].clone() for key in extra - {POSITION_ALIAS}}
        model.backbones = dict(official=lasting(path), siglip=lasting(siglip))
        return model.eval()

    def export_official(self, path):
        """Write the whole model as a state dict in the released code's layout, .pth or .safetensors, so that it runs there.
        The pooling head comes from the checkpoint this model was loaded from, or from SigLIP's file with a LoRA of zeros."""
        self.refuse_merged()
        if not self.settings["lora_rank"] or any(self.settings[name] != values[0] for name, values in ABLATIONS.items()):
            raise ValueError(f"the released layout is for the paper's model with LoRA, not for {self.settings}.")
        if self.siglip.text_model.head.base.weight.dtype != torch.float32:
            raise ValueError("the frozen towers are not fp32, and would be written rounded: load the model without dtype first.")
        r, width, extra = self.settings["lora_rank"], self.siglip.size.width, self.official_extra
        if not extra:
            if not self.backbones:
                raise ValueError("the released layout holds SigLIP's pooling head, which this model has not: call load_backbones "
                                 "first.")
            with safe_open(fetch(self.backbones["siglip"], "model.safetensors"), "pt") as file:
                extra = {theirs: file.get_tensor(key) if key else torch.zeros((r, width) if "lora_A" in theirs else (width, r))
                         for theirs, key in pooling_names().items()}
        down_blocks = self.settings["down_blocks"]
        state = {official_name(key, down_blocks): tensor.contiguous() for key, tensor in self.state_dict().items()}
        state |= extra | {POSITION_ALIAS: self.sam.shared_image_embedding.positional_embedding.clone()}
        save_file(state, path) if Path(path).suffix == ".safetensors" else torch.save(state, path)

    def export_peft(self, folder):
        """Write the three LoRA sets as peft adapter folders for the same parts of transformers' models: siglip_vision and
        siglip_text for SiglipModel's vision_model and text_model, sam_vision for SamModel's vision_encoder."""
        for name, part in (("siglip_vision", self.siglip.vision_model), ("siglip_text", self.siglip.text_model),
                           ("sam_vision", self.sam.vision_encoder)):
            if name != "siglip_text" or self.settings["text_lora"]:
                lora.save_peft(part, Path(folder) / name)

    @classmethod
    def from_checkpoint(cls, path, siglip=None, sam_weights=None, dtype=torch.float32):
        """A trained model, in eval mode. The frozen towers come from where training had them, or from the sources given
        (`sam_weights` names the released checkpoint when training started from one)."""
        about, tensors = read_checkpoint(path)
        settings, towers = dict(about["settings"], dtype=dtype), about.get("backbones", {})
        if "tokenizer" in about:                                        # a model without LoRA: the file holds all there is
            model = cls(**settings)
            try:
                model.tokenizer = Tokenizer.from_str(about["tokenizer"])
            except Exception as error:                                  # tokenizers raises nothing more specific
                raise ValueError(f"{path} holds a damaged tokenizer ({error}). Copy it again.") from error
        elif "official" in towers:
            model = cls.load_official(sam_weights or towers["official"], siglip or towers["siglip"], **settings)
        else:
            model = cls(**settings, init=False).load_backbones(siglip or towers["siglip"], sam_weights or towers["sam"])
        model.copy_trained(tensors, about["settings"], path)
        return model.eval()


# Checkpoints of the released code: our prefix -> theirs, first match wins; peft's wrappers make theirs long.
OFFICIAL = (
    ("siglip.vision_model.", "clip_vision_encoder.base_model.model.model."),
    ("siglip.text_model.", "clip_text_encoder.base_model.model.model."),
    ("siglip.", "clip_text_encoder.base_model.model."),
    ("sam.vision_encoder.", "backbone.base_model.model.model."),
    ("sam.prompt_encoder.", "sam_prompt_encoder.model."),
    ("sam.mask_decoder.", "sam_mask_decoder.model."),
    ("sam.", "backbone.base_model.model."),
    ("prompter.channel.", "prompter_down_channel."),
    ("prompter.spatial.", "prompter_down_spatial."),
    ("prompter.project.", "prompter_down_spatial.{}.conv."),
)
POSITION_ALIAS = "sam_prompt_encoder.model.shared_embedding.positional_embedding"      # SAM's position code, a second time
POOLING = "clip_vision_encoder.base_model.model.model.head."                           # SigLIP's pooling head with a LoRA: unused


def official_name(name, down_blocks):
    """Our state-dict key -> the released code's."""
    ours, theirs = next(pair for pair in OFFICIAL if name.startswith(pair[0]))
    name = theirs.format(down_blocks) + name.removeprefix(ours)
    return re.sub(r"\.([AB])\.weight$", r".lora_\1.default.weight", name.replace(".base.", ".base_layer."))


def pooling_names():
    """The pooling head's keys there -> its keys in SigLIP's own file, None for the LoRA on its out_proj."""
    names = {POOLING + key.removeprefix("vision_model.head.").replace("out_proj.", "out_proj.base_layer."): key
             for key in siglip_file.UNUSED}
    return names | {f"{POOLING}attention.out_proj.lora_{ab}.default.weight": None for ab in "AB"}


def read_official(path):
    """A .pth (a state dict, alone or under 'state_dict' or 'module') or safetensors file -> {key: tensor}."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint.")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors ({error}). Save its state dict alone.") from error
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole file of plain tensors ({error}). Copy it again.") from error
    for key in ("state_dict", "module"):
        state = state[key] if isinstance(state, dict) and key in state else state
    if not isinstance(state, dict) or not all(type(key) is str and torch.is_tensor(value) for key, value in state.items()):
        raise ValueError(f"{path} holds a {type(state).__name__} that is no state dict, names to tensors. Save that alone.")
    return state


def read_checkpoint(path):
    """-> metadata dict, tensors dict. Raises FileNotFoundError, or ValueError naming what is wrong with the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint. train.py writes last.safetensors and best.safetensors into --out.")
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}). Copy it again or train anew; train.py writes "
                         "best.safetensors and last.safetensors.") from error
    settings = about.get("settings")
    choices = dict(ABLATIONS, sam=tuple(SIZES))
    numbers = dict(lora_rank=[int], down_blocks=[int], lora_alpha=[int, float], lora_dropout=[int, float])
    if not isinstance(settings, dict) or settings.keys() != choices.keys() | numbers.keys() or not all(
            [type(settings[name]) is type(values[0]) and settings[name] in values for name, values in choices.items()] +
            [type(settings[name]) in types and 0 <= settings[name] <= 1024 for name, types in numbers.items()]):
        raise ValueError(f"{path} is a safetensors file but no checkpoint of this train.py: its settings are {settings}, not "
                         f"values for {', '.join([*choices, *numbers])}.")
    return about, tensors


@contextmanager
def whole_file(path):
    """-> a temporary name to write to. Only what is complete and on the disk takes the name `path`: a crash at any moment
    leaves the old file or the new one, whole. Raises OSError naming the file, with the old one in place."""
    partial = Path(f"{path}.partial")
    try:
        yield partial
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        partial.chmod(0o644)                                            # safetensors writes for the owner alone
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        reason = (str(error) or repr(error)).splitlines()[0]
        raise OSError(f"cannot write {path} ({reason}). Is the disk full? What {path} held before is whole.") from error


def is_checkpoint(path):
    """Whether a file is a checkpoint of train.py, by its metadata."""
    try:
        with safe_open(path, "pt") as file:
            return "settings" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False                                                    # whoever reads it as something else says what is wrong


def lasting(source):
    """The name under which a file or folder is found from any folder; a hub's name stays what it is."""
    return str(Path(source).absolute() if Path(source).exists() else source)


def fetch(source, name):
    """A file, a folder holding `name`, or a hub name -> path of the file `name` there. A download goes into the hub's cache,
    once, and pinned weights are checked against their sha256. Raises FileNotFoundError, or ValueError for a wrong sum."""
    path = Path(source)
    if path.is_file() and name == "model.safetensors":
        return path
    if path.exists() or str(source).count("/") != 1 or path.suffix in (".safetensors", ".pth"):
        found = (path.parent if path.is_file() else path) / name        # tokenizer.json lies beside the weights
        if not found.is_file():
            what = f"{found} is missing" if path.exists() else f"{path}: no such file or folder"
            raise FileNotFoundError(f"{what}. Give a safetensors file, a folder with {name}, or a Hugging Face name such as "
                                    f"{SIGLIP_HUB} or {SAM_HUB['b']}. `--sam tiny` needs no weights.")
        return found
    revision, expected = PINNED.get(str(source), (None, None))
    try:
        cached = try_to_load_from_cache(str(source), name, revision=revision)
        found = Path(hf_hub_download(str(source), name, revision=revision))
    except Exception as error:                                          # each version of the client has its own kinds
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise FileNotFoundError(f"cannot fetch {name} of {source}: {reason.rstrip('.')}. Without a network, copy the "
                                "repository's files to a folder and name that (--siglip, --sam-weights). `--sam tiny` needs no "
                                "weights.") from error
    if expected and name == "model.safetensors" and not isinstance(cached, str):
        verify(found, expected, f"{name} of {source}")
    return found


def heat(image, values, side):
    """(h, w) values over a PIL image, dark where they are least, the image in full light where they are most."""
    low, high = values.min(), values.max()
    light = Image.fromarray(((values - low) / max(high - low, 1e-9) * 255).astype(np.uint8)).resize((side, side), Image.BICUBIC)
    image = image.resize((side, side))
    return Image.composite(image, image.point(lambda value: int(0.15 * value)), light)


def attention_weights(attention, q, k):
    """What a DecoderAttention looks at: (B, heads, queries, keys), each row adding up to 1."""
    q, k = (proj(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for proj, x in ((attention.q_proj, q), (attention.k_proj, k)))
    return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)


@torch.inference_mode()
def explain(model, image, phrase, side=256):
    """What the model computes for one phrase, as a PIL image: each word's map, their mean, the sentence map (each from its
    least to its most), where the mask decoder's mask token looks at last, and the mask."""
    image = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
    ids, mask = model.read_phrases([phrase])
    taps, was_training = {}, model.training
    with model.sam.mask_decoder.transformer.final_attn_token_to_image.register_forward_pre_hook(     # token 0 is the IoU token
            lambda attention, inputs: taps.update(look=attention_weights(attention, *inputs[:2])[0, :, 1].mean(0))):
        logits = model.eval()(image_tensor(image, model.image_size)[None].to(ids.device) / 255, ids, mask, taps)
    model.train(was_training)
    found = logits_at(logits, model.image_size, image.height, image.width)[0].cpu() > 0
    words = model.tokenizer.encode(canonical(phrase)).tokens[:ids.shape[1]]
    e = taps["f_sam"].shape[-1]
    maps = [(f"word map: {word.strip(chr(0x2581))}", taps["word_map"][0, i]) for i, word in enumerate(words)]
    maps += [("mean of the word maps", taps["word_map"][0].mean(0)), ("sentence map", taps["sentence_map"][0].sigmoid()),
             ("mask token looks at", taps["look"].unflatten(0, (e, e)))]
    panels = [(phrase, image.resize((side, side)))]
    panels += [(f"{name}, {values.min():.2g} to {values.max():.2g}", heat(image, values.cpu().numpy(), side))
               for name, values in maps]
    panels.append(("mask", overlay(image, found).resize((side, side))))
    columns, font = 4, ImageFont.load_default(13)
    sheet = Image.new("RGB", (columns * (side + 8), -(-len(panels) // columns) * (side + 26)), "white")
    for i, (title, picture) in enumerate(panels):
        x, y = i % columns * (side + 8), i // columns * (side + 26)
        sheet.paste(picture, (x, y))
        ImageDraw.Draw(sheet).text((x, y + side + 4), title[:42], fill="black", font=font)
    return sheet


def usable_device(name):
    """argparse type: the name of a device that this machine has."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


# Where a GeoTIFF lies on the earth: pixel scale, tie points, transformation, and the keys of its coordinate system.
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)


def geo_tags(path):
    """The tags of an image that place it on the earth; empty for one that has none."""
    with Image.open(path, formats=IMAGES) as file:
        tags = getattr(file, "tag_v2", {})
        return {tag: tags[tag] for tag in GEO_TAGS if tag in tags}


def short(text):
    """At most 80 bytes of a text, in letters, digits and _: part of a file name."""
    text = "".join(c if c.isalnum() else "_" for c in text)
    return text.encode()[:80].decode(errors="ignore").strip("_")


def segment_file(model, path, name, phrases, args):
    """Write masks and overlays of one image file, and yield a record per phrase: image, phrase, area in pixels, its share of
    the image, box x1 y1 x2 y2, score, files."""
    image, tags, scores = read_image(path), geo_tags(path), []
    for i, (phrase, mask) in enumerate(zip(phrases, model.segment(image, phrases, args.tile, scores).numpy()), 1):
        stem = args.out / f"{short(name)}_{i}_{short(canonical(phrase))}"
        files = dict(mask=f"{stem}_mask.{'tif' if tags else 'png'}", overlay=f"{stem}_overlay.png")
        if tags:                                                                    # grey: QGIS shows 0 and 255
            Image.fromarray(mask).convert("L").save(files["mask"], tiffinfo=tags, compression="tiff_deflate")
        else:
            Image.fromarray(mask).save(files["mask"])
        overlay(image, mask).save(files["overlay"])
        if args.explain:
            files["explained"] = f"{stem}_explained.png"
            explain(model, image, phrase).save(files["explained"])
        yield dict(image=str(path), phrase=phrase, area=int(mask.sum()), share=float(mask.mean()),
                   box=Image.fromarray(mask).getbbox(), score=scores[i - 1], **files)


def images_in(folder):
    """The images of a folder, without what this program wrote there. Raises ValueError if there are none."""
    ours = ("_mask.png", "_mask.tif", "_overlay.png", "_explained.png", "check.jpg")
    formats = Image.registered_extensions()
    paths = sorted(path for path in folder.iterdir()
                   if formats.get(path.suffix.lower()) in IMAGES and not path.name.endswith(ours))
    if not paths:
        raise ValueError(f"{folder} holds no images.")
    return paths


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Segment what each phrase names; writes a mask and an "
                                     "overlay per phrase.")
    add = parser.add_argument
    add("image", type=Path, help="an image of any size, or a folder of images")
    add("phrases", nargs="*", metavar="phrase")
    add("--phrases", dest="phrase_file", type=Path, help="a file with a phrase a line")
    add("--checkpoint", type=Path, required=True, help="a file that train.py wrote")
    add("--out", type=Path, default=Path("."), help="folder for the pictures; unset the current one")
    add("--tile", type=positive, help="see windows of this many pixels a side at full resolution, not the scene as a whole")
    add("--json", action="store_true", help="print a line of JSON per phrase: box, area, score, files")
    add("--explain", action="store_true", help="also draw what the model computed on the way; not with --tile")
    add("--siglip", help="file, folder or hub name, if not where training had it")
    add("--sam-weights", help="likewise for SAM, or for the released checkpoint that training started from")
    add("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.phrase_file and not args.phrase_file.is_file():
        parser.error(f"--phrases {args.phrase_file}: no such file")
    phrases = args.phrases + ([text for _, text in lines(args.phrase_file)] if args.phrase_file else [])
    if not phrases:
        parser.error("say what to segment: a phrase, or --phrases FILE")
    if args.out.is_file():
        parser.error(f"--out {args.out} is a file: name a folder")
    if args.explain and args.tile:
        parser.error("--explain shows the scene seen whole: leave out --tile, or cut the window out yourself")
    Image.MAX_IMAGE_PIXELS = None                                                   # one's own scenes may be large
    paths = images_in(args.image) if args.image.is_dir() else [args.image]
    if len(paths) == 1:
        read_image(paths[0])                                                        # before the weights: those take longer
    model = RSRefSeg.from_checkpoint(args.checkpoint, args.siglip, args.sam_weights).to(args.device)
    if unknown := unknown_words(model.tokenizer, phrases):
        print(f"the model does not know these words: {', '.join(unknown)}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    stems, failed = [path.stem for path in paths], []
    for path in paths:
        name = path.name if stems.count(path.stem) > 1 else path.stem
        try:
            records = list(segment_file(model, path, name, phrases, args))
        except (OSError, ValueError) as error:                                      # the other images of a folder still count
            failed.append(str(error))
            continue
        for record in records:
            share = f"{record['share']:.1%} of the image, score {record['score']:.2f}" if record["box"] else "nothing found"
            files = ", ".join(record[kind] for kind in ("mask", "overlay", "explained") if kind in record)
            print(json.dumps(record) if args.json else f"{record['phrase']!r}: {share} -> {files}", flush=True)
    if failed:
        raise ValueError(f"{len(failed)} of {len(paths)} images: " + " ".join(failed) if len(paths) > 1 else failed[0])


if __name__ == "__main__":
    run(main)
