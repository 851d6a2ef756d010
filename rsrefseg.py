"""RSRefSeg (Chen et al. 2025, arXiv:2501.06809): segment what a phrase names in an aerial image.

SigLIP reads image and phrase, AttnPrompter turns their agreement into prompts, SAM draws the mask.

    python rsrefseg.py IMAGE "the gray ship on the left" ["another phrase" ...] --checkpoint FILE

B images, N phrases (N = B k, k consecutive ones per image), L text tokens (EOS included), D SigLIP
width, C SAM prompt width, g side of SigLIP's grid, e of SAM's, M sparse prompts, S side of SAM's
input, H W pixels.
"""
import argparse
import json
import re
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from PIL import Image
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

import lora
import sam as sam_py                   # `sam` and `siglip` are arguments below
import siglip as siglip_py
from data import InputError, error_context, image_files, image_tensor, overlay, read_image, run
from data import tile_starts, to_rgb
from siglip import canonical

SIGLIP_SIZE = {"b": "so400m", "l": "so400m", "h": "so400m", "tiny": "tiny"}      # by size of SAM
# The published weights at the revisions this code was written for.
HUB = {"siglip": ("google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3"),
       "b": ("facebook/sam-vit-base", "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f"),
       "l": ("facebook/sam-vit-large", "6851e0441005b0fb96f2cc4dfac472f3d1b14af1"),
       "h": ("facebook/sam-vit-huge", "87aecf0df4ce6b30cd7de76e87673c49644bdf67")}

def conv_bn_gelu(c_in, c_out, kernel, stride=1, padding=0):
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(c_out), gelu=nn.GELU()))

class AttnPrompter(nn.Module):
    """SigLIP's features -> SAM's sparse prompts (section II-C, equations 3 and 4).

        v             image features V, repeated for each phrase              (N, D, g, g)
        t             token features T                                        (N, L, D)
        s             sentence feature                                        (N, D)
        token_mask    True on tokens, False on padding                        (N, L)
        a, b          SigLIP's scale exp(logit_scale) and bias logit_bias     (1,)
        word_map      how well each position matches each token, in [0, 1]    (N, L, g, g)
        sentence_map  how well each position matches the sentence, logits     (N, g, g)
    """

    def __init__(self, width, C, down_blocks=2, branches="both"):
        super().__init__()
        self.branches = branches       # "both", "local" or "global": an ablation of the paper
        parts = 3 if branches == "both" else 2
        self.channel = conv_bn_gelu(parts * width, C, 1)
        blocks = [conv_bn_gelu(C, C, 3, stride=2, padding=1) for _ in range(down_blocks)]
        self.spatial = nn.Sequential(*blocks)
        self.project = nn.Conv2d(C, C, 1)

    def forward(self, v, t, s, token_mask, a, b, image_pos):
        """Returns sparse prompts (N, M, C), word_map, sentence_map. image_pos (1, C, g, g) is SAM's
        positional encoding of the grid."""
        v_unit = F.normalize(v, dim=1)
        t_unit = F.normalize(t, dim=2)
        s_unit = F.normalize(s, dim=1)
        word_map = torch.sigmoid(a * torch.einsum("ndhw,nld->nlhw", v_unit, t_unit) + b)
        sentence_map = a * torch.einsum("ndhw,nd->nhw", v_unit, s_unit) + b

        # SigLIP's b is about -16, and a cos too small to outweigh it: at first f_local is about v / 2,
        # f_global about 0. The sentence map learns by the dense prompt, which receives its logits.
        # The mean is over real tokens; the released code's includes padding, if a batch has any.
        is_token = token_mask[:, :, None, None].to(word_map.dtype)
        mean_map = (word_map * is_token).sum(1, keepdim=True) / is_token.sum(1, keepdim=True)
        f_local = (v + v * mean_map) / 2                         # eq. 3, local semantics
        f_global = v * sentence_map.sigmoid()[:, None]           # eq. 3, global semantics
        parts = {"both": [f_local, f_global, v], "local": [f_local, v], "global": [f_global, v]}
        attended = torch.cat(parts[self.branches], 1)            # (N, 3D, g, g) with both
        x = self.channel(attended) + image_pos                   # (N, C, g, g)
        x = self.project(self.spatial(x))                        # eq. 4: (N, C, sqrt M, sqrt M)
        return x.flatten(2).transpose(1, 2), word_map, sentence_map

# What LoRA adapts (sections II-B and II-D), as in the released code: the Linears of SAM's image encoder,
# the convolutions of its neck, the attention Linears of SigLIP, and the head of its text tower.
LORA_TARGETS = [
    "sam.vision_encoder.layers.*.attn.qkv", "sam.vision_encoder.layers.*.attn.proj",
    "sam.vision_encoder.layers.*.mlp.lin[12]", "sam.vision_encoder.neck.conv[12]",
    "siglip.vision_model.encoder.layers.*.self_attn.*_proj"]
TEXT_LORA_TARGETS = ["siglip.text_model.encoder.layers.*.self_attn.*_proj", "siglip.text_model.head"]

class Output(NamedTuple):
    logits: torch.Tensor          # (N, 1, 4e, 4e), the mask is above 0
    word_map: torch.Tensor        # (N, L, g, g) in [0, 1]
    sentence_map: torch.Tensor    # (N, g, g) logits

class RSRefSeg(nn.Module):
    """The whole model, random until weights are loaded. `sam` is the size: b, l, h or tiny. lora_rank
    above 0 freezes the towers and adapts them, 0 trains them whole. The prompter and SAM's prompt
    encoder and decoder are trained, except for parts that get no gradient. text_lora, down_blocks,
    prompts ("both", "sparse", "dense") and branches ("both", "local", "global") are ablations. `vocab`
    is SigLIP's number of tokens, `towers` (SigLIP, SAM) in place of random ones. `dtype` is the type of
    the frozen Linears: bf16 or fp16 halves the memory, and needs autocast."""

    def __init__(self, sam="b", lora_rank=16, lora_alpha=16, lora_dropout=0.1, text_lora=True,
                 down_blocks=2, prompts="both", branches="both", vocab=None, dtype=torch.float32,
                 towers=None):
        super().__init__()
        if towers is None:
            config = siglip_py.CONFIGS[SIGLIP_SIZE[sam]]
            config = replace(config, vocab=vocab or config.vocab)
            towers = siglip_py.SigLIP(config), sam_py.SAM(sam)
        self.siglip, self.sam = towers
        self.settings = dict(
            sam=sam, lora_rank=lora_rank, lora_alpha=lora_alpha, lora_dropout=lora_dropout,
            text_lora=text_lora, down_blocks=down_blocks, prompts=prompts, branches=branches,
            vocab=self.siglip.config.vocab)
        self.tokenizer = None          # from_pretrained and from_checkpoint set it
        self.tower_sources = {}        # files of the towers; if empty, checkpoints hold the towers too
        self.image_size = self.sam.config.image_size
        C = self.sam.config.prompt_width
        self.prompter = AttnPrompter(self.siglip.config.width, C, down_blocks, branches)
        if lora_rank:
            self.siglip.requires_grad_(False)
            self.sam.vision_encoder.requires_grad_(False)
            targets = LORA_TARGETS + (TEXT_LORA_TARGETS if text_lora else [])
            lora.inject(self, targets, lora_rank, lora_alpha, lora_dropout)
        freeze_unused(self)
        cast_frozen_linears(self, dtype)

    @property
    def device(self):
        return self.siglip.logit_scale.device

    def forward(self, images, ids, token_mask):
        """images (B, 3, S, S) RGB in [0, 1], S = 1024 (tiny: 96); ids and token_mask (N, L) from
        `tokenize`, N a multiple of B -> Output. Its logits are (N, 1, 256, 256) for b and l."""
        if len(ids) % len(images):
            raise ValueError(f"{len(ids)} phrases for {len(images)} images: give k for each image.")
        f_sam = self.sam.encode_image(images)                                    # (B, C, e, e)
        v = self.siglip.encode_image(images)                                     # (B, D, g, g)
        t, s = self.siglip.encode_text(ids, token_mask)                          # (N, L, D), (N, D)
        # The rest in fp32: under 1 % of the FLOPs, but in bf16 it would cause most of the error.
        with torch.autocast(t.device.type, enabled=False):
            v = v.float().repeat_interleave(len(ids) // len(v), 0)               # one for each phrase
            a = self.siglip.logit_scale.exp()
            b = self.siglip.logit_bias
            pos = self.sam.shared_image_embedding.grid(v.shape[-1])
            sparse, word_map, sentence_map = self.prompter(
                v, t.float(), s.float(), token_mask, a, b, pos)
            # The sentence map, a rough segmentation once trained, becomes SAM's mask prompt.
            side = 4 * f_sam.shape[-1]
            mask_prompt = F.interpolate(sentence_map[:, None], size=(side, side), mode="bilinear")
            if self.settings["prompts"] == "dense":                              # ablations
                sparse = None
            if self.settings["prompts"] == "sparse":
                mask_prompt = None
            _, dense = self.sam.prompt_encoder(masks=mask_prompt)
            logits, _ = self.sam.decode(f_sam, sparse, dense, multimask=False)
        return Output(logits, word_map, sentence_map)

    def tokenize(self, phrases):
        """N phrases, none empty -> ids (N, L), token_mask (N, L), on the model's device."""
        if not all(canonical(phrase) for phrase in phrases):
            raise InputError(f"a phrase is empty: {phrases}. Name an object, as in 'the ship'.")
        ids, token_mask = siglip_py.tokenize(self.tokenizer, phrases)
        return ids.to(self.device, non_blocking=True), token_mask.to(self.device, non_blocking=True)

    def predict(self, image, ids, token_mask):
        """An RGB PIL image, resized to the model's input, and N phrases -> Output."""
        pixels = image_tensor(image, self.image_size)[None].to(self.device) / 255    # (1, 3, S, S)
        return self(pixels, ids, token_mask)

    @torch.inference_mode()
    def segment(self, image, phrases, tile=None):
        """A PIL image or path, and one phrase or N -> masks (N, H, W) bool and scores (N,), on the CPU.
        A score is the mean probability inside the mask, 0.5 to 1, or 0 for an empty one. With `tile` the
        model sees windows of tile x tile pixels; "left" then means left in a window. Sets eval mode."""
        self.eval()
        image = to_rgb(image) if isinstance(image, Image.Image) else read_image(image)
        ids, token_mask = self.tokenize([phrases] if isinstance(phrases, str) else phrases)
        if tile:
            maps = self.blend_windows(image, ids, token_mask, tile)
        else:                      # enlarged one by one: logits of a large scene can take gigabytes
            small = self.predict(image, ids, token_mask).logits.split(1)
            maps = (self.resize_logits(x, image.height, image.width)[0].cpu() for x in small)
        masks = []
        scores = []
        for logits in maps:                                                      # (H, W)
            masks.append(logits > 0)
            scores.append(logits[logits > 0].sigmoid().mean().nan_to_num(0))     # no pixels: NaN
        return torch.stack(masks), torch.stack(scores)

    def blend_windows(self, image, ids, token_mask, tile):
        """Mask logits (N, H, W): the mean over windows, weighted lowest at their borders: no seams."""
        h = min(tile, image.height)
        w = min(tile, image.width)
        rows = tile_starts(image.height, h)                    # neighbours overlap by at least half
        corners = [(y, x) for y in rows for x in tile_starts(image.width, w)]
        blend = torch.hann_window(h)[:, None] * torch.hann_window(w) + 1e-4
        logits = torch.zeros(len(ids), image.height, image.width)
        weights = torch.zeros(image.height, image.width)
        for y, x in tqdm(corners, "windows"):
            output = self.predict(image.crop((x, y, x + w, y + h)), ids, token_mask).logits
            logits[:, y:y + h, x:x + w] += self.resize_logits(output, h, w).cpu() * blend
            weights[y:y + h, x:x + w] += blend
        return logits / weights

    def resize_logits(self, logits, height, width):
        """Mask logits (N, 1, 4e, 4e) -> (N, height, width), by way of S x S, as SAM does."""
        side = (self.image_size, self.image_size)
        logits = F.interpolate(logits.float(), size=side, mode="bilinear")
        return F.interpolate(logits, size=(height, width), mode="bilinear")[:, 0]

    @classmethod
    def from_pretrained(cls, sam="b", siglip=None, sam_weights=None, **settings):
        """Pretrained towers, new adapters and prompter. `siglip` (with a tokenizer.json beside it) and
        `sam_weights` are a weight file, its folder or a Hugging Face name; None is the published one."""
        if sam not in HUB and not sam_weights:
            raise InputError(f"size {sam} has no published weights: give --siglip and --sam-weights.")
        siglip = siglip or HUB["siglip"][0]
        sam_weights = sam_weights or HUB[sam][0]
        with torch.device("meta"):                             # no memory: the files bring it
            towers = siglip_py.SigLIP(SIGLIP_SIZE[sam]), sam_py.SAM(sam)
        tokenizer = read_tokenizer(siglip)
        with error_context("pretrained weights"):
            siglip_py.load_weights(towers[0], fetch(siglip, "model.safetensors"))
            sam_py.load_weights(towers[1], fetch(sam_weights, "model.safetensors"))
        model = cls(sam, towers=towers, **settings)
        model.tokenizer = tokenizer
        if model.settings["lora_rank"]:
            model.tower_sources = dict(siglip=siglip, sam_weights=sam_weights)
        return model

    @classmethod
    def from_checkpoint(cls, path, siglip=None, sam_weights=None, dtype=torch.float32):
        """A trained model in eval mode, from a file or Hugging Face name, of train.py or the released
        code. Towers that are not in it are read from the sources it names, or from those given."""
        metadata, tensors = read_checkpoint(path)
        sources = metadata.get("tower_sources")
        if sources:                                            # ours with LoRA: only what was trained
            siglip = siglip or sources["siglip"]
            sam_weights = sam_weights or sources["sam_weights"]
            model = cls.from_pretrained(siglip=siglip, sam_weights=sam_weights, **metadata["settings"])
        else:                                                  # ours or the released code's, whole
            with torch.device("meta"):
                model = cls(**metadata["settings"])
            model.tokenizer = (Tokenizer.from_str(metadata["tokenizer"]) if "tokenizer" in metadata
                               else read_tokenizer(siglip or HUB["siglip"][0]))
        load_tensors(model, tensors, path, assign=True)
        cast_frozen_linears(model.float(), dtype)              # .float(): some files are in fp16
        model.metadata = metadata
        return model.eval()

    def save(self, path, **metadata):
        """Write a checkpoint: what training changes; everything if tower_sources is empty. lora.merge
        drops the adapters, so save before it."""
        sources = {}
        for tower, source in self.tower_sources.items():       # absolute: found from any folder
            sources[tower] = str(Path(source).absolute()) if Path(source).exists() else source
        metadata.update(settings=self.settings, tower_sources=sources)
        tensors = lora.trainable_state_dict(self)
        if not sources:
            tensors = self.state_dict()
            metadata["tokenizer"] = self.tokenizer.to_str()
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        metadata = {key: json.dumps(value) for key, value in metadata.items()}
        atomic_write(path, lambda file: file.write_bytes(to_bytes(tensors, metadata)))

def freeze_unused(model):
    """Freeze what cannot receive a gradient: DistributedDataParallel would wait for it."""
    encoder = model.sam.prompt_encoder
    prompts = model.settings["prompts"]
    unused = [encoder.point_embed, encoder.not_a_point_embed, model.sam.mask_decoder.iou_prediction_head]
    unused.append(encoder.mask_embed if prompts == "sparse" else encoder.no_mask_embed)
    if prompts == "dense":
        unused.append(model.prompter)
    if prompts == "sparse" and model.settings["branches"] == "local":    # only a map loss reads s
        unused.append(model.siglip.text_model.head)
    for module in unused:
        module.requires_grad_(False)

def cast_frozen_linears(model, dtype):
    for tower in (model.siglip, model.sam.vision_encoder):
        for module in tower.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:    # most of the memory
                module.to(dtype)

# ------------------------------------------------------------------------------- weights and checkpoints
def fetch(source, filename):
    """Returns the absolute path of `filename`. `source` is a file, its folder, or a Hugging Face name,
    which is downloaded once. Raises InputError if there is none."""
    path = Path(source).absolute()
    if path.is_file() and filename == "tokenizer.json":        # it lies beside the weight file
        path = path.parent
    if path.is_dir():
        path = path / filename
    if path.is_file():
        return str(path)
    name = str(source)
    revision = dict(HUB.values()).get(name)                    # HUB's values are (name, revision)
    if revision is None and (path.parent.is_dir() or name.count("/") != 1):        # no user/name
        raise InputError(f"there is no file {path}. If weights moved, give --siglip or --sam-weights. "
                         "Of a folder that DeepSpeed wrote, name the file mp_rank_00_model_states.pt.")
    with error_context(f"{filename} of {name} was not downloaded (HF_ENDPOINT may name a mirror)"):
        cached = try_to_load_from_cache(name, filename, revision=revision)
        if isinstance(cached, str):                            # else None or a marker
            return cached
        # Without a network this fails at once; the download would try again for 25 s.
        get_hf_file_metadata(hf_hub_url(name, filename, revision=revision))
        return hf_hub_download(name, filename, revision=revision)

def read_tokenizer(source):
    path = fetch(source, "tokenizer.json")
    with error_context(path):
        return Tokenizer.from_file(path)

def read_checkpoint(path):
    """Returns the metadata, with the model's settings, and {name: tensor}, of either kind of file."""
    path = fetch(path, "best.safetensors")
    with error_context("checkpoint"):
        state, metadata = sam_py.read_state(path)
        if "settings" in metadata:
            return {key: json.loads(text) for key, text in metadata.items()}, state
        return convert_official(state, path)

def load_tensors(model, tensors, path, assign=False):
    """Load {name: tensor}, read from `path`. Frozen ones may be missing, except on the meta device."""
    optional = {name for name, p in model.named_parameters() if not p.requires_grad and not p.is_meta}
    with error_context(path):
        missing, unknown = model.load_state_dict(tensors, strict=False, assign=assign)
        wrong = [*unknown, *sorted(set(missing) - optional)]
        if wrong:
            raise InputError(f"{len(wrong)} tensors are missing or unknown: {', '.join(wrong[:10])}")

def atomic_write(path, write):
    """Replace `path` by what write(file name) writes. A crash leaves the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    with error_context(f"writing {path}"):                     # a full disk
        write(temporary)
    temporary.replace(path)

# ------------------------------------------------------------------------------------------ command line
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737)      # a GeoTIFF's coordinates, which masks keep

def default_amp(device):
    """bf16 where a card computes in it, from Ampere on; fp16 on older cards; off elsewhere."""
    if torch.device(device).type != "cuda":
        return "off"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"

def autocast(device, amp):                                             # amp: a key of AMP
    return torch.autocast(torch.device(device).type, AMP[amp], enabled=amp != "off")

def segment_file(model, path, args):
    """Write mask and overlay of each phrase, and print what was found."""
    image = read_image(path)
    with Image.open(path) as file:
        tags = {tag: file.tag_v2[tag] for tag in GEO_TAGS if tag in getattr(file, "tag_v2", {})}
    masks, scores = model.segment(image, args.phrases, args.tile)
    for i, (phrase, mask, score) in enumerate(zip(args.phrases, masks.numpy(), scores.tolist()), 1):
        words = re.sub("[^a-z0-9]+", "_", canonical(phrase))[:60]
        stem = args.out / f"{path.name}_{i}_{words}"
        files = dict(mask=f"{stem}_mask.{'tif' if tags else 'png'}")
        picture = Image.fromarray(mask).convert("L")
        picture.save(files["mask"], tiffinfo=tags, compression="tiff_deflate")  # a PNG ignores both
        if not args.no_overlay:
            files["overlay"] = f"{stem}_overlay.png"
            overlay(image, mask).save(files["overlay"])
        if args.json:
            print(json.dumps(dict(image=str(path), phrase=phrase, area=int(mask.sum()), score=score,
                                  box=picture.getbbox(), **files)), flush=True)
        else:
            print(f"{phrase!r}: {mask.mean():.1%} of the image, score {score:.2f} ->",
                  ", ".join(files.values()), flush=True)

def main(argv=None):
    parser = argparse.ArgumentParser(description="Segment what each phrase names in an image.")
    add = parser.add_argument
    add("image", type=Path, help="an image of any size, or a folder of images")
    add("phrases", nargs="+", metavar="phrase")
    add("--checkpoint", required=True, help="of train.py or the released code: file, Hugging Face name")
    add("--out", type=Path, default=Path("pictures"), help="folder for the results (default: pictures)")
    add("--tile", type=int, help="use overlapping windows of this many pixels a side")
    add("--json", action="store_true", help="print one JSON record per phrase")
    add("--no-overlay", action="store_true", help="write masks only")
    add("--siglip", help="SigLIP weights, if they moved: file, folder or Hugging Face name")
    add("--sam-weights", help="SAM weights, if they moved")
    add("--device", default=DEVICE, help=f"default: {DEVICE}")
    add("--amp", choices=list(AMP), help="autocast type (default: what the device computes fastest)")
    args = parser.parse_args(argv)
    args.amp = args.amp or default_amp(args.device)
    if args.tile is not None and args.tile < 1:
        parser.error("--tile must be at least 1")
    if args.out.resolve() == args.image.resolve():
        parser.error("--out is the folder of the images: the next run would take the masks for images")
    paths = image_files(args.image) if args.image.is_dir() else [args.image]
    if not paths:
        parser.error(f"{args.image} holds no images")
    model = RSRefSeg.from_checkpoint(args.checkpoint, args.siglip, args.sam_weights, AMP[args.amp])
    lora.merge(model.to(args.device))      # in bf16 it rounds: masks keep an IoU of 0.998 (README)
    args.out.mkdir(parents=True, exist_ok=True)
    status = 0
    for path in paths:
        try:
            with autocast(args.device, args.amp):
                segment_file(model, path, args)
        except InputError as error:                            # a bad image does not end a folder
            print(f"error: {error}", file=sys.stderr)
            status = 1
    sys.exit(status)

# -------------------------------------------------------------------- the released code's checkpoints
# Parts of the released code's names -> ours, in this order. Its third spatial block is our `project`.
OFFICIAL_NAMES = (
    (r"^module\.", ""), (r"\.base_model\.model", ""), (r"\.base_layer\.", ".base."),
    (r"\.lora_([AB])\.default", r".\1"), ("^clip_vision_encoder.model", "siglip.vision_model"),
    ("^clip_text_encoder.model", "siglip.text_model"), ("^clip_text_encoder", "siglip"),
    ("^backbone.model", "sam.vision_encoder"), ("^backbone", "sam"),
    ("^sam_prompt_encoder.model", "sam.prompt_encoder"), ("^sam_mask_decoder.model", "sam.mask_decoder"),
    ("^prompter_down_spatial.2.conv", "prompter.project"), ("^prompter_down_", "prompter."),
    # Dropped under this name: SigLIP's pooling head, and a second name of SAM's positional encoding.
    (r".*(vision_model\.head|prompt_encoder\.shared_embedding)\..*", "unused"))

def convert_official(state, path):
    """State dict of the released code -> metadata with the model's settings, and {our name: tensor}.
    Size and rank follow from an adapter's shape; alpha is 16 there."""
    state = state.get("state_dict", state.get("module", state))            # frameworks wrap it
    tensors = {}
    for key, tensor in state.items():
        for pattern, ours in OFFICIAL_NAMES:                   # regular expressions
            key = re.sub(pattern, ours, key)
        tensors[key] = tensor
    tensors.pop("unused", None)
    sizes = {config.width: size for size, config in sam_py.CONFIGS.items()}
    adapter = tensors.get("sam.vision_encoder.layers.0.attn.qkv.A.weight")     # (r, width)
    if adapter is None or adapter.shape[1] not in sizes:
        raise InputError(f"{path} is neither a checkpoint of train.py nor one of the released code.")
    return dict(settings=dict(sam=sizes[adapter.shape[1]], lora_rank=len(adapter))), tensors

if __name__ == "__main__":
    run(main)      # a bad input ends in one line
