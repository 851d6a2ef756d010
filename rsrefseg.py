"""RSRefSeg (Chen et al. 2025, arXiv:2501.06809): segment what a phrase names in an aerial image.

SigLIP reads image and phrase, AttnPrompter turns their agreement into prompts, and SAM draws the mask.
LoRA adapts the two frozen towers.

    python rsrefseg.py IMAGE "the gray ship on the left" ["another phrase" ...] --checkpoint FILE

B images, N phrases (N = B k, k consecutive ones per image), L text tokens (EOS included), D SigLIP
width, C SAM prompt width, g side of SigLIP's grid, e of SAM's, M sparse prompts, S side of SAM's
input, H W pixels.
"""
import argparse
import hashlib
import json
import re
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

import lora
from data import image_tensor, overlay, read_image, run, tile_starts, to_rgb
from sam import CONFIGS, SAM, copy_tensors, load_weights as load_sam, read_state
from siglip import SigLIP, canonical, load_weights as load_siglip, out_of_vocabulary, tokenize

SIGLIP_SIZE = {"b": "so400m", "l": "so400m", "h": "so400m", "tiny": "tiny"}      # by size of SAM


# ------------------------------------------------------------------------------------------ AttnPrompter

def conv_bn_gelu(c_in, c_out, kernel, stride=1, padding=0):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out), gelu=nn.GELU()))


class AttnPrompter(nn.Module):
    """SigLIP's features -> SAM's sparse prompts (section II-C, equations 3 and 4).

        v             image features V, repeated for each phrase              (N, D, g, g)
        t             token features T                                        (N, L, D)
        token_mask    True on tokens, False on padding                        (N, L)
        s             sentence feature                                        (N, D)
        a, b          SigLIP's scale exp(logit_scale) and bias logit_bias     (1,)
        word_map      how well each position matches each token, in [0, 1]    (N, L, g, g)
        sentence_map  how well each position matches the sentence, logits     (N, g, g)

    `text`, "both", "local" or "global", names the text branches to use, an ablation of the paper.
    """

    def __init__(self, width, channels, down_blocks=2, text="both"):
        super().__init__()
        self.text = text
        branches = 3 if text == "both" else 2
        self.channel = conv_bn_gelu(branches * width, channels, 1)
        blocks = [conv_bn_gelu(channels, channels, 3, stride=2, padding=1) for _ in range(down_blocks)]
        self.spatial = nn.Sequential(*blocks)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, v, t, s, token_mask, a, b, image_pos):
        """Returns sparse prompts (N, M, C), word_map, sentence_map. image_pos (1, C, g, g) is SAM's
        positional encoding of the grid."""
        v_unit = F.normalize(v, dim=1)
        t_unit = F.normalize(t, dim=2)
        s_unit = F.normalize(s, dim=1)
        word_map = torch.sigmoid(a * torch.einsum("ndhw,nld->nlhw", v_unit, t_unit) + b)
        sentence_map = a * torch.einsum("ndhw,nd->nhw", v_unit, s_unit) + b

        # The mean over real tokens. The released code's includes padding, if a batch has any.
        is_token = token_mask[:, :, None, None].to(word_map.dtype)
        mean_map = (word_map * is_token).sum(1, keepdim=True) / is_token.sum(1, keepdim=True)
        f_local = (v + v * mean_map) / 2                                       # eq. 3, local semantics
        f_global = v * sentence_map.sigmoid()[:, None]           # eq. 3, global semantics
        branches = {"both": [f_local, f_global, v], "local": [f_local, v], "global": [f_global, v]}
        attended = torch.cat(branches[self.text], 1)               # (N, 3D, g, g) with both

        x = self.channel(attended) + image_pos                     # (N, C, g, g)
        x = self.project(self.spatial(x))                          # eq. 4: (N, C, sqrt M, sqrt M)
        return x.flatten(2).transpose(1, 2), word_map, sentence_map


# ---------------------------------------------------------------------------------------------- RSRefSeg

# What LoRA adapts (sections II-B and II-D): the Linears of SAM's image encoder, the convolutions of its
# neck, the attention Linears of SigLIP, and the head of its text tower.
LORA_TARGETS = [
    "sam.vision_encoder.layers.*.attn.qkv", "sam.vision_encoder.layers.*.attn.proj",
    "sam.vision_encoder.layers.*.mlp.lin[12]", "sam.vision_encoder.neck.conv[12]",
    "siglip.vision_model.encoder.layers.*.self_attn.*_proj"]
TEXT_LORA_TARGETS = ["siglip.text_model.encoder.layers.*.self_attn.*_proj", "siglip.text_model.head"]


class RSRefSeg(nn.Module):
    """The whole model, with random weights until some are loaded. `sam` is the size: b, l, h or tiny.
    The defaults are the paper's model; text_lora, down_blocks, prompts and text are its ablations.

    lora_rank > 0 freezes the towers and adapts them, 0 trains them whole. All else in use is trained.
    `dtype` is the type of the towers' frozen Linear weights. In the autocast type they take half the
    memory and need no casts, but then the model runs only under autocast.
    `init=False` skips random initialisation: load weights before use."""

    def __init__(self, sam="b", lora_rank=16, lora_alpha=16, lora_dropout=0.1, text_lora=True,
                 down_blocks=2, prompts="both", text="both", dtype=torch.float32, init=True):
        super().__init__()
        self.settings = dict(
            sam=sam, lora_rank=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            text_lora=text_lora, down_blocks=down_blocks, prompts=prompts, text=text)
        self.backbones = {}        # sources of the frozen towers; {}: a checkpoint holds every tensor
        self.tokenizer = None                                  # set it, or call load_backbones
        with torch.device("cpu" if init else "meta"):          # meta tensors have no memory
            self.siglip = SigLIP(SIGLIP_SIZE[sam])
            self.sam = SAM(sam)
        if lora_rank:
            self.siglip.requires_grad_(False)
            self.sam.vision_encoder.requires_grad_(False)
            for module in self.modules():
                if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                    module.to(dtype)
        if not init:
            self.to_empty(device="cpu")                        # what follows is initialised in any case
        if lora_rank:
            targets = LORA_TARGETS + TEXT_LORA_TARGETS if text_lora else LORA_TARGETS
            lora.inject(self, targets, lora_rank, lora_alpha, lora_dropout)
        self.image_size = self.sam.config.image
        self.prompter = AttnPrompter(self.siglip.config.width, self.sam.config.prompt, down_blocks, text)
        # Freeze what cannot receive a gradient: DistributedDataParallel would wait for it. The
        # hypernetworks of masks 1-3 get a gradient of zero and stay trainable, as in the released code.
        encoder = self.sam.prompt_encoder
        head = self.sam.mask_decoder.iou_prediction_head
        unused = [encoder.point_embed, encoder.not_a_point_embed, head]
        unused.append(encoder.mask_embed if prompts == "sparse" else encoder.no_mask_embed)
        if prompts == "dense":
            unused.append(self.prompter)
        if prompts == "sparse" and text == "local":                         # then nothing reads s
            unused.append(self.siglip.text_model.head)
        for module in unused:
            module.requires_grad_(False)

    @property
    def device(self):
        return self.siglip.logit_scale.device

    def encode(self, images):
        """images (B, 3, S, S) in [0, 1] -> F_sam (B, C, e, e), V (B, D, g, g)."""
        return self.sam.encode_image(images), self.siglip.encode_image(images)

    def decode(self, features, ids, token_mask, intermediates=None):
        """What `encode` returned, and N phrases -> mask logits (N, 1, 4e, 4e)."""
        t, s = self.siglip.encode_text(ids, token_mask)                          # (N, L, D), (N, D)
        # Prompter and mask decoder run in fp32: under 1 % of the FLOPs, but in bf16 most of the error.
        with torch.autocast(t.device.type, enabled=False):
            k = len(ids) // len(features[0])                               # phrases per image
            f_sam, v = [x.float().repeat_interleave(k, 0) for x in features]
            a = self.siglip.logit_scale.exp()
            b = self.siglip.logit_bias
            encoding = self.sam.shared_image_embedding
            sparse, word_map, sentence_map = self.prompter(
                v, t.float(), s.float(), token_mask, a, b, encoding.grid(v.shape[-1]))
            # The sentence map, a rough segmentation once trained, becomes SAM's mask prompt.
            side = 4 * f_sam.shape[-1]
            mask_prompt = F.interpolate(sentence_map[:, None], size=(side, side), mode="bilinear")
            if self.settings["prompts"] == "dense":
                sparse = None
            if self.settings["prompts"] == "sparse":
                mask_prompt = None
            _, dense = self.sam.prompt_encoder(encoding, masks=mask_prompt)
            logits, _ = self.sam.decode(f_sam, sparse, dense, multimask=False)
        if intermediates is not None:
            intermediates.update(f_sam=f_sam, v=v, t=t, s=s, word_map=word_map,
                                 sentence_map=sentence_map, sparse=sparse, dense=dense)
        return logits

    def forward(self, images, ids, token_mask, intermediates=None):
        """images (B, 3, S, S) RGB in [0, 1], S = 1024 (tiny: 96); ids and token_mask (N, L) from
        `tokenize`, N a multiple of B -> mask logits (N, 1, 4e, 4e), for b and l (N, 1, 256, 256).
        `intermediates`, a dict, receives f_sam, v, t, s, word_map, sentence_map, sparse and dense."""
        return self.decode(self.encode(images), ids, token_mask, intermediates)

    def tokenize(self, phrases):
        """N phrases, none empty -> ids (N, L), token_mask (N, L), on the model's device."""
        if self.tokenizer is None:
            raise ValueError("the model has no tokenizer: call load_backbones, or set it.")
        if not all(canonical(phrase) for phrase in phrases):
            raise ValueError(f"a phrase is empty: {phrases}. Name an object, as in 'the ship'.")
        return [tensor.to(self.device) for tensor in tokenize(self.tokenizer, phrases)]

    @torch.inference_mode()
    def segment(self, image, phrases, tile=None, intermediates=None):
        """A PIL image or path, and N phrases -> masks (N, H, W) bool and scores (N,), on the CPU.
        A score is the mean probability inside the mask, 0 for an empty one. Sets eval mode.

        The model sees the whole image, resized. `tile`, for small objects in large scenes, makes it see
        overlapping windows of tile x tile pixels, whose logits are blended. "Left" then means left in a
        window; `intermediates` receives the last one's. Needs autocast unless `dtype` is fp32."""
        image = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        ids, token_mask = self.tokenize([phrases] if isinstance(phrases, str) else phrases)
        self.eval()
        h = min(tile or image.height, image.height)
        w = min(tile or image.width, image.width)
        corners = [(y, x) for y in tile_starts(image.height, h) for x in tile_starts(image.width, w)]
        # Blend weights of a window's pixels, lowest at its borders, so that no seam shows.
        blend = torch.hann_window(h)[:, None] * torch.hann_window(w) + 1e-4
        logits = torch.zeros(len(ids), image.height, image.width)
        weights = torch.zeros(image.height, image.width)
        for y, x in tqdm(corners, "windows", disable=len(corners) == 1):
            window = image_tensor(image.crop((x, y, x + w, y + h)), self.image_size)
            output = self(window[None].to(self.device) / 255, ids, token_mask, intermediates)
            logits[:, y:y + h, x:x + w] += resize_logits(output, self.image_size, h, w).cpu() * blend
            weights[y:y + h, x:x + w] += blend
        logits /= weights
        masks = logits > 0
        scores = [logit[mask].sigmoid().mean().nan_to_num(0) for logit, mask in zip(logits, masks)]
        return masks, torch.stack(scores)

    def load_backbones(self, siglip=None, sam_weights=None):
        """Load both towers and SigLIP's tokenizer. A source is a safetensors file, its folder, a Hugging
        Face name, or for SAM one of Meta's .pth files; None is the published one."""
        siglip = siglip or HUB["siglip"][0]
        sam_weights = sam_weights or HUB[self.settings["sam"]][0]
        self.tokenizer = Tokenizer.from_file(fetch(siglip, "tokenizer.json"))
        load_siglip(lora.base_state_dict(self.siglip), fetch(siglip, "model.safetensors"))
        load_sam(lora.base_state_dict(self.sam), fetch(sam_weights, "model.safetensors"))
        if self.settings["lora_rank"]:
            sources = dict(siglip=siglip, sam=sam_weights)          # a file is found from any folder
            self.backbones = {tower: str(Path(source).absolute()) if Path(source).exists() else source
                              for tower, source in sources.items()}
        return self

    @classmethod
    def from_pretrained(cls, sam="b", siglip=None, sam_weights=None, **settings):
        """Pretrained towers with new LoRA adapters and prompter: where training starts."""
        return cls(sam, init=False, **settings).load_backbones(siglip, sam_weights)

    def checkpoint_state_dict(self):
        """Returns what a checkpoint holds: what training changes, and towers without their own files."""
        return lora.trainable_state_dict(self) if self.backbones else self.state_dict()

    def save(self, path, **metadata):
        """Write a checkpoint for `from_checkpoint`, as safetensors."""
        if self.settings["lora_rank"] and not lora.adapted_layers(self):
            raise ValueError("save before lora.merge: a checkpoint keeps the adapters.")
        metadata.update(settings=self.settings, backbones=self.backbones)
        if not self.backbones:
            metadata["tokenizer"] = self.tokenizer.to_str()
        tensors = {key: tensor.contiguous() for key, tensor in self.checkpoint_state_dict().items()}
        metadata = {key: json.dumps(value) for key, value in metadata.items()}
        atomic_write(path, to_bytes(tensors, metadata))

    @classmethod
    def from_checkpoint(cls, path, siglip=None, sam_weights=None, dtype=torch.float32):
        """A trained model in eval mode, from a checkpoint of train.py or of the released code. The
        frozen towers, unless in the file, come from where training had them, or from given sources."""
        metadata, tensors = read_checkpoint(path)
        model = cls(**metadata["settings"], dtype=dtype, init=False)
        backbones = metadata.get("backbones")
        if backbones:
            model.load_backbones(siglip or backbones["siglip"], sam_weights or backbones["sam"])
        elif "tokenizer" in metadata:
            model.tokenizer = Tokenizer.from_str(metadata["tokenizer"])
        else:                                                       # of the released code
            model.tokenizer = Tokenizer.from_file(fetch(siglip or HUB["siglip"][0], "tokenizer.json"))
        copy_tensors(tensors, model.checkpoint_state_dict(), path)
        return model.eval()

    load_official = from_checkpoint        # it tells the two kinds of checkpoint apart


def resize_logits(logits, image_size, height, width):
    """Mask logits (N, 1, 4e, 4e) -> (N, height, width), first at the input's size. The mask is > 0."""
    logits = F.interpolate(logits.float(), size=(image_size, image_size), mode="bilinear")
    return F.interpolate(logits, size=(height, width), mode="bilinear")[:, 0]


def read_checkpoint(path):
    """Returns the metadata, with the model's settings, and {name: tensor}, of either kind of file."""
    state = read_state(path)
    if str(path).endswith(".safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "settings" in metadata:
            return {key: json.loads(text) for key, text in metadata.items()}, state
    for key in ("state_dict", "module"):                            # frameworks wrap the state dict
        state = state.get(key, state)
    return convert_official(state, path)


def atomic_write(path, content):
    """Replace `path` by the bytes `content`. A crash leaves the old file or the new one, complete."""
    temporary = Path(f"{path}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


# The published weights at the revisions this code was written for, with the sha256 of model.safetensors.
HUB = {
    "siglip": ("google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3",
               "ea2abad2b7f8a9c1aa5e49a244d5d57ffa71c56f720c94bc5d240ef4d6e1d94a"),
    "b": ("facebook/sam-vit-base", "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f",
          "892c410e496344e527255ccdcb2cb7244a609acb5389c7c4fdba1288f861c579"),
    "l": ("facebook/sam-vit-large", "6851e0441005b0fb96f2cc4dfac472f3d1b14af1",
          "a57e1b13cd1545938dfcbc9fb26df7f60de6650237a9383382a874a623564b81"),
    "h": ("facebook/sam-vit-huge", "87aecf0df4ce6b30cd7de76e87673c49644bdf67",
          "edfb0462392541fca9af44ff039bfb32dbd0c939997f3abb77a26e23af7afd7c")}


def fetch(source, filename):
    """Returns the path of `filename`. `source` is a weight file, its folder, or a Hugging Face name,
    which is downloaded once. Raises OSError, or ValueError for weights other than the published."""
    path = Path(source)
    if path.is_file() and filename == "tokenizer.json":            # it lies beside the weights
        path = path.parent
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return str(path)
    pinned = {name: (revision, sha256) for name, revision, sha256 in HUB.values()}
    revision, sha256 = pinned.get(source, (None, None))
    try:
        cached = try_to_load_from_cache(source, filename, revision=revision)
        path = Path(hf_hub_download(source, filename, revision=revision))
    except Exception as error:                    # its type depends on the version of huggingface_hub
        raise OSError(f"there is no file {path}, and {source} cannot be downloaded: {error} Give local "
                      "files with --siglip and --sam-weights, or a mirror in HF_ENDPOINT.") from error
    if filename == "model.safetensors" and sha256 and not cached:      # once: hashing 4 GB takes long
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != sha256:
            path.resolve().unlink()                           # in the cache, `path` is a link
            raise ValueError(f"{path} does not have the published sha256 and was deleted: try again.")
    return str(path)


# -------------------------------------------------------------------- the released code's checkpoints

OFFICIAL_NAMES = (   # regular expression for the released code's names -> our name, in this order
    (r"\.base_model\.model", ""), (r"\.base_layer\.", ".base."), (r"\.lora_([AB])\.default", r".\1"),
    ("^clip_vision_encoder.model", "siglip.vision_model"),
    ("^clip_text_encoder.model", "siglip.text_model"), ("^clip_text_encoder", "siglip"),
    ("^backbone.model", "sam.vision_encoder"), ("^backbone", "sam"),
    ("^sam_prompt_encoder.model", "sam.prompt_encoder"), ("^sam_mask_decoder.model", "sam.mask_decoder"),
    ("^prompter_down_", "prompter."))
# SigLIP's pooling head, and a second name of SAM's positional encoding.
OFFICIAL_UNUSED = ("siglip.vision_model.head.", "sam.prompt_encoder.shared_embedding.")


def convert_official(state, path):
    """State dict of the released code -> metadata with the model's settings, and {our name: tensor}.
    Size, rank and prompter depth follow from the keys; alpha is 16 there."""
    depth = sum(re.fullmatch(r"prompter_down_spatial\.\d\.bn\.weight", key) is not None for key in state)
    tensors = {}
    for key, tensor in state.items():
        for pattern, ours in (*OFFICIAL_NAMES, (rf"spatial\.{depth}\.conv", "project")):
            key = re.sub(pattern, ours, key)
        if not key.startswith(OFFICIAL_UNUSED):
            tensors[key] = tensor
    layers = len({key.split(".")[3] for key in tensors if key.startswith("sam.vision_encoder.layers.")})
    sizes = {CONFIGS[size].layers: size for size in SIGLIP_SIZE}
    key = "sam.vision_encoder.layers.0.attn.qkv.A.weight"
    if layers not in sizes or key not in tensors:
        raise ValueError(f"{path} is neither a checkpoint of train.py nor one of the released code.")
    settings = dict(sam=sizes[layers], lora_rank=tensors[key].shape[0], down_blocks=depth)
    return dict(settings=settings), tensors


# ------------------------------------------------------------------------------------------ command line

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
DEFAULT_AMP = "bf16" if DEVICE == "cuda" else "off"


def autocast(device, amp):
    return torch.autocast(torch.device(device).type, AMP[amp], enabled=amp != "off")


GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)      # a GeoTIFF's coordinates, which masks keep
SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".jp2")    # of images in a folder


def segment_file(model, path, args):
    """Write mask and overlay of each phrase, and print what was found."""
    image = read_image(path)
    with Image.open(path) as file:
        tags = getattr(file, "tag_v2", {})
        tags = {tag: tags[tag] for tag in GEO_TAGS if tag in tags}
    masks, scores = model.segment(image, args.phrases, args.tile)
    for i, (phrase, mask, score) in enumerate(zip(args.phrases, masks.numpy(), scores.tolist()), 1):
        words = re.sub("[^a-z0-9]+", "_", canonical(phrase))[:60]
        stem = args.out / f"{path.name}_{i}_{words}"
        files = dict(mask=f"{stem}_mask.{'tif' if tags else 'png'}", overlay=f"{stem}_overlay.png")
        Image.fromarray(mask).convert("L").save(files["mask"], tiffinfo=tags)
        overlay(image, mask).save(files["overlay"])
        if args.explain:
            from evaluate import explain                       # here, because it imports this file
            files["explained"] = f"{stem}_explained.png"
            explain(model, image, phrase).save(files["explained"])
        if args.json:
            box = Image.fromarray(mask).getbbox()
            record = dict(image=str(path), phrase=phrase, area=int(mask.sum()), box=box, score=score)
            print(json.dumps(record | files), flush=True)
        else:
            found = f"{mask.mean():.1%} of the image, score {score:.2f}"
            print(f"{phrase!r}: {found} -> {', '.join(files.values())}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Segment what each phrase names in an image.")
    add = parser.add_argument
    add("image", type=Path, help="an image of any size, or a folder of images")
    add("phrases", nargs="+", metavar="phrase")
    add("--checkpoint", type=Path, required=True, help="of train.py or of the released code")
    add("--out", type=Path, default=Path("pictures"), help="folder for the results (default: pictures)")
    add("--tile", type=int, help="use overlapping windows of this many pixels a side")
    add("--json", action="store_true", help="print one JSON record per phrase")
    add("--explain", action="store_true", help="also draw the maps behind each mask, of the whole image")
    add("--siglip", help="SigLIP weights, if they moved: file, folder or Hugging Face name")
    add("--sam-weights", help="SAM weights, if they moved")
    add("--device", default=DEVICE, help=f"default: {DEVICE}")
    add("--amp", choices=list(AMP), default=DEFAULT_AMP, help=f"autocast type (default: {DEFAULT_AMP})")
    args = parser.parse_args(argv)
    Image.MAX_IMAGE_PIXELS = None                           # satellite scenes exceed Pillow's limit
    paths = [args.image]
    if args.image.is_dir():
        paths = sorted(path for path in args.image.iterdir() if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{args.image} holds no images")
    if args.tile is not None and args.tile < 1:
        parser.error("--tile must be at least 1")
    dtype = AMP[args.amp] or torch.float32
    model = RSRefSeg.from_checkpoint(args.checkpoint, args.siglip, args.sam_weights, dtype)
    model.to(args.device)
    unknown = out_of_vocabulary(model.tokenizer, args.phrases)
    if unknown:
        print(f"the model does not know these words: {', '.join(unknown)}", file=sys.stderr)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        with autocast(args.device, args.amp):
            segment_file(model, path, args)


if __name__ == "__main__":
    run(main)      # a bad input ends in one line
