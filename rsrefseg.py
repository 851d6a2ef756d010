"""RSRefSeg (Chen et al. 2025, arXiv:2501.06809): segment what a phrase names in a satellite or aerial image.

SigLIP reads image and phrase, AttnPrompter turns their agreement into prompts, SAM draws the mask; LoRA adapts the
frozen towers.

    python rsrefseg.py IMAGE "the gray ship on the left" ["another phrase" ...] --checkpoint FILE [--out DIR]

Shapes: B images, N phrases (N = B k, the k phrases of an image side by side), L text tokens of a phrase (EOS included),
D SigLIP width, C SAM prompt width, g SigLIP grid, e SAM grid, M sparse prompts, H W pixels, r rank.
"""
import argparse
import json
import os
import pickle
import re
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from PIL import Image, ImageFilter
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode

import lora
import sam as sam_file
import siglip as siglip_file
from data import image_tensor, read_image, run, to_rgb, toy_tokenizer, verify
from sam import SAM
from siglip import SigLIP, canonical, load_tokenizer, tokenize


@dataclass(frozen=True)
class Size:
    sam: str             # a row of sam.SIZES, or a SAMSize
    siglip: str          # a row of siglip.SIZES, or a SigLIPSize
    lora_rank: int       # 0: nothing is frozen


SIZES = {
    "b": Size("b", "so400m", 16),
    "l": Size("l", "so400m", 16),
    "h": Size("h", "so400m", 16),
    "tiny": Size("tiny", "tiny", 0),
}

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
    """

    def __init__(self, width, channels, down_blocks=2):
        super().__init__()
        self.channel = ConvBNGELU(3 * width, channels, 1)
        self.spatial = nn.Sequential(*[ConvBNGELU(channels, channels, 3, 2, 1) for _ in range(down_blocks)])
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, v, t, s, mask, a, b, position_code):
        """-> sparse prompts (N, M, C), word_map, sentence_map. position_code (1, C, g, g) is SAM's code of the grid."""
        v_unit, t_unit, s_unit = F.normalize(v, dim=1), F.normalize(t, dim=2), F.normalize(s, dim=1)
        word_map = torch.sigmoid(a * torch.einsum("ndhw,nld->nlhw", v_unit, t_unit) + b)
        sentence_map = a * torch.einsum("ndhw,nd->nhw", v_unit, s_unit) + b
        words = mask[:, :, None, None].to(word_map.dtype)
        mean_map = (word_map * words).sum(1, keepdim=True) / words.sum(1, keepdim=True)          # differs: padding left out
        local = (v + v * mean_map) / 2                                                           # eq. 3, local semantics
        globally = v * sentence_map.sigmoid()[:, None]                                           # eq. 3, global semantics
        attended = torch.cat([local, globally, v], 1)                                            # (N, 3D, g, g)
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


class RSRefSeg(nn.Module):
    """The whole model. `sam` is a name in SIZES or a Size; weights are random until loaded.

    With lora_rank > 0 the towers are frozen and adapted; prompter, mask-prompt convolutions and mask decoder train
    whole. With lora_rank = 0 the towers train whole too. `lora_rank=None` takes the size's own. Parameters that cannot receive
    a gradient (SAM's IoU head, point and no-mask embeddings) are always frozen; of the mask decoder's four masks only
    the first is used, so the hyper-networks of the others train with a gradient of zero, as in the released code.

    `dtype` is the type of the towers' frozen Linear and convolution weights: the autocast type halves their memory and saves
    casting them at every call (the model then runs under autocast of that type only). What trains stays fp32. `init=False`
    leaves the towers unwritten, to be loaded at once.
    """

    def __init__(self, sam="b", lora_rank=None, lora_alpha=16, lora_dropout=0.1, down_blocks=2, dtype=torch.float32, init=True):
        super().__init__()
        size = SIZES[sam] if isinstance(sam, str) else sam
        lora_rank = size.lora_rank if lora_rank is None else lora_rank
        self.settings = dict(sam=sam, lora_rank=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
                             down_blocks=down_blocks)
        with nullcontext() if init else Unwritten():
            self.siglip, self.sam = SigLIP(size.siglip), SAM(size.sam)
        self.prompter = AttnPrompter(self.siglip.size.width, self.sam.size.prompt, down_blocks)
        self.image_size = self.sam.size.image
        self.tokenizer = toy_tokenizer() if sam == "tiny" else None     # b, l, h: comes with SigLIP's weights
        self.backbones = {}                                             # where the weights came from
        self.official_extra = {}                                        # what load_official met and this model has no use for
        if lora_rank:
            self.siglip.requires_grad_(False)
            self.sam.requires_grad_(False)
            lora.inject(self, LORA_TARGETS, lora_rank, lora_alpha, lora_dropout)
            self.sam.prompt_encoder.mask_embed.requires_grad_(True)
            self.sam.mask_decoder.requires_grad_(True)
        prompts = self.sam.prompt_encoder
        for unused in (self.sam.mask_decoder.iou_prediction_head, prompts.point_embed, prompts.not_a_point_embed,
                       prompts.no_mask_embed):
            unused.requires_grad_(False)
        encoder = self.sam.vision_encoder
        for module in (*self.siglip.modules(), *encoder.patch_embed.modules(), *encoder.layers.modules()):   # where autocast acts
            if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
                module.to(dtype)

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
    def loss(logits, masks, dice=0.0):
        """5 x binary cross-entropy at the size of masks (N, 1, H, W) in {0, 1} (areas in [0, 1] also serve); the logits are
        brought there bilinearly. `dice` weighs a soft Dice loss added to it: not in the paper, needed from scratch."""
        masks = masks.float()
        logits = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
        loss = 5 * F.binary_cross_entropy_with_logits(logits, masks)
        if dice:
            p = logits.sigmoid()
            overlap, area = (p * masks).sum((1, 2, 3)), (p + masks).sum((1, 2, 3))
            loss = loss + dice * (1 - (2 * overlap + 1) / (area + 1)).mean()
        return loss

    @classmethod
    def map_loss(cls, sentence_map, masks, dice=0.0):
        """The same loss on the sentence map (N, g, g), against how much of each cell the mask covers: not in the paper.
        From scratch it is what makes the towers agree; pretrained towers do already."""
        cover = F.adaptive_avg_pool2d(masks.float(), sentence_map.shape[-2:])
        return cls.loss(sentence_map[:, None], cover, dice)

    @torch.inference_mode()
    def segment(self, image, phrases):
        """A PIL image or path, any size and mode, and N phrases -> (N, H, W) bool at the image's own size.

        The image is encoded once. An all-False mask means that nothing was found. Raises ValueError for an empty phrase.
        """
        image = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        phrases = [phrases] if isinstance(phrases, str) else phrases
        for phrase in phrases:
            if not canonical(phrase):
                raise ValueError(f"phrase {phrase!r} is empty: say what to segment, for example 'the ship on the left'.")
        device, was_training = self.sam.mean.device, self.training
        self.eval()
        ids, mask = (x.to(device) for x in tokenize(self.tokenizer, phrases))
        pixels = image_tensor(image, self.image_size)[None].to(device) / 255
        found = masks_at(self(pixels, ids, mask), self.image_size, image.height, image.width)
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
        self.backbones = dict(siglip=str(siglip), sam=str(sam))
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
                raise ValueError("the frozen towers hold random weights, which a checkpoint leaves out: call load_backbones first.")
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
        if wrong:
            raise ValueError(f"{path} was trained as {settings}, this model is {self.settings}: {len(wrong)} tensors "
                             f"do not fit, first {wrong[0]}. Build the model with the checkpoint's settings (--sam {settings['sam']}).")
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
        model.backbones = dict(official=str(Path(path).resolve()), siglip=str(siglip))
        return model.eval()

    def export_official(self, path):
        """Write the whole model as a state dict in the released code's layout, .pth or .safetensors, so that it runs there.
        The pooling head comes from the checkpoint this model was loaded from, or from SigLIP's file with a LoRA of zeros."""
        self.refuse_merged()
        if self.siglip.text_model.head.base.weight.dtype != torch.float32:
            raise ValueError("the frozen towers are not fp32, and would be written rounded: load the model without dtype first.")
        names, r, extra = pooling_names(), self.settings["lora_rank"], self.official_extra
        if not extra:
            if not self.backbones:
                raise ValueError("the released layout holds SigLIP's pooling head, which this model has not: call load_backbones first.")
            with safe_open(fetch(self.backbones["siglip"], "model.safetensors"), "pt") as file:
                extra = {theirs: file.get_tensor(key) for theirs, key in names.items() if key}
            extra |= {theirs: torch.zeros((r, self.siglip.size.width) if "lora_A" in theirs else (self.siglip.size.width, r))
                      for theirs, key in names.items() if not key}
        state = {official_name(key, self.settings["down_blocks"]): tensor.contiguous() for key, tensor in self.state_dict().items()}
        state |= extra | {POSITION_ALIAS: self.sam.shared_image_embedding.positional_embedding.clone()}
        save_file(state, path) if Path(path).suffix == ".safetensors" else torch.save(state, path)

    def export_peft(self, folder):
        """Write the three LoRA sets as peft adapter folders for the same parts of transformers' models: siglip_vision and
        siglip_text for SiglipModel's vision_model and text_model, sam_vision for SamModel's vision_encoder."""
        for name, part in (("siglip_vision", self.siglip.vision_model), ("siglip_text", self.siglip.text_model),
                           ("sam_vision", self.sam.vision_encoder)):
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
    names = {}
    for key in siglip_file.UNUSED:
        names[POOLING + key.removeprefix("vision_model.head.").replace("out_proj.", "out_proj.base_layer.")] = key
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
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict.")
    return state


SETTINGS = {"sam", "lora_rank", "lora_alpha", "lora_dropout", "down_blocks"}           # with which a checkpoint's model was built


def read_checkpoint(path):
    """-> metadata dict, tensors dict. Raises FileNotFoundError, or ValueError naming what is wrong with the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint. train.py writes last.safetensors and best.safetensors into its --out.")
    try:
        with safe_open(path, "pt") as file:
            about = {key: json.loads(value) for key, value in (file.metadata() or {}).items() if key != "format"}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a whole checkpoint ({error}). Copy it again or train anew.") from error
    settings = about.get("settings")
    if not isinstance(settings, dict) or settings.keys() != SETTINGS or settings["sam"] not in list(SIZES) or not all(
            isinstance(settings[name], (int, float)) and 0 <= settings[name] <= 1024 for name in SETTINGS - {"sam"}):
        raise ValueError(f"{path} is a safetensors file but no checkpoint of train.py: its metadata does not hold {sorted(SETTINGS)}.")
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
        os.replace(partial, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} ({(str(error) or repr(error)).splitlines()[0]}). Is the disk full? What {path} held before is whole.") from error


def is_checkpoint(path):
    """Whether a file is a checkpoint of train.py, by its metadata."""
    try:
        with safe_open(path, "pt") as file:
            return "settings" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False                                                    # whoever reads it as something else says what is wrong


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
        raise FileNotFoundError(f"cannot fetch {name} of {source}: {reason} Without a network, copy the repository's files to a "
                                "folder and name that (--siglip, --sam-weights). `--sam tiny` needs no weights.") from error
    if expected and name == "model.safetensors" and not isinstance(cached, str):
        verify(found, expected, f"{name} of {source}")
    return found


def masks_at(logits, image_size, height, width):
    """Mask logits (N, 1, 4e, 4e) -> (N, height, width) bool: bilinear to the model's input, then to the image, sigmoid > 0.5."""
    full = F.interpolate(logits.float(), size=(image_size, image_size), mode="bilinear", align_corners=False)
    return F.interpolate(full, size=(height, width), mode="bilinear", align_corners=False)[:, 0] > 0


def overlay(image, mask, colour=(255, 40, 40)):
    """PIL image RGB and (H, W) bool -> the image, the mask in its own light with an outline, the rest dimmed."""
    pixels, mask = np.asarray(image, np.float32), np.asarray(mask)
    outline = np.array(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(5))) > 0
    painted = np.where(mask[..., None], pixels, 0.55 * pixels)
    painted[outline & ~mask] = colour
    return Image.fromarray(painted.astype(np.uint8))


def usable_device(name):
    """argparse type: the name of a device that this machine has."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def main():
    parser = argparse.ArgumentParser(description="Segment what each phrase names; writes a mask and an overlay per phrase.")
    parser.add_argument("image", type=Path)
    parser.add_argument("phrases", nargs="+", metavar="phrase")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a file that train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures")
    parser.add_argument("--siglip", help="file, folder or hub name, if not where training had it")
    parser.add_argument("--sam-weights", help="likewise for SAM, or for the released checkpoint that training started from")
    parser.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    image = read_image(args.image)
    model = RSRefSeg.from_checkpoint(args.checkpoint, args.siglip, args.sam_weights).to(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    for i, (phrase, mask) in enumerate(zip(args.phrases, model.segment(image, args.phrases).cpu().numpy()), 1):
        words = canonical(phrase).replace(" ", "_")[:60].strip("_")                # a file name has its limits
        stem = args.out / f"{args.image.stem}_{i}_{words}"
        Image.fromarray(mask).save(f"{stem}_mask.png")
        overlay(image, mask).save(f"{stem}_overlay.png")
        share = f"{mask.mean():.1%} of the image" if mask.any() else "nothing found"
        print(f"{phrase!r}: {share} -> {stem}_mask.png, {stem}_overlay.png")


if __name__ == "__main__":
    run(main)
