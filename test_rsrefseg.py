"""`python -m pytest` takes at most 4 minutes on two cores; `-s` shows the measured errors; `-m ""` adds
full size and more ways to stop a run. In order: formulas and files; parity with transformers and peft
in outputs and gradients; training and the other commands; full size, which is two commands too:

    python test_rsrefseg.py parity b [l]
    python test_rsrefseg.py bench b infer|train bf16          (--help lists its flags)
"""
import argparse
import copy
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import data
import evaluate
import lora
import rsrefseg
import sam
import siglip
import train
from rsrefseg import RSRefSeg
from sam import SAM, SAMConfig
from siglip import SigLIP, SigLIPConfig

HERE = Path(__file__).parent
CPU = ["--device", "cpu", "--amp", "off"]

# The published architecture with small numbers: no stem, windows that do not divide the grid.
SMALL_SIGLIP = siglip.CONFIGS["small"] = SigLIPConfig(48, 3, 6, 96, image=70, patch=14, vocab=120)
SMALL_SAM = sam.CONFIGS["small"] = SAMConfig(32, 4, 2, (1, 3), 128, window=3, prompt=32, decoder_mlp=64)
rsrefseg.SIGLIP_SIZE["small"] = "small"


def fill(model):
    """Random values of a trained model's scale: a fresh model's zeros and ones would hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator)
            values *= tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.1
            if name.endswith((".B.weight", "lora_B.default.weight")):     # an adapter is a small change
                values *= 0.2
            if re.search(r"(norm|bn)[^.]*\.weight|running_var|logit_scale", name):
                values = values.abs() + 1
            if name.endswith("logit_bias"):
                values -= 1
            tensor.copy_(values)
    return model


def small_model(lora_rank=4, **settings):
    return fill(RSRefSeg("small", lora_rank, **settings))


def meta_model(size):                                                 # at full size without memory
    return RSRefSeg(size, init=False).to("meta")


def batch(images=2, phrases=1, length=7, side=SMALL_SAM.image):
    """Returns random images, ids and mask of phrases of one length, and target masks."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 120, (images * phrases, length), generator=generator)
    ids[:, -1] = siglip.EOS
    coarse = torch.rand(images * phrases, 1, 4, 4, generator=generator) > 0.5
    targets = F.interpolate(coarse.float(), size=(side, side)).bool()
    pixels = torch.rand(images, 3, side, side, generator=generator)
    return pixels, ids, torch.ones_like(ids, dtype=torch.bool), targets


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def check(name, ours, theirs, tolerance=1e-4):
    error = relative(ours.detach(), theirs.detach())
    print(f"  {name:42} relative error {error:.1e} (at most {tolerance:.0e})")
    assert ours.shape == theirs.shape
    assert error <= tolerance, f"{name}: {error:.2e}"


def call(main, *arguments):
    """Run a program in this process."""
    main([str(argument) for argument in arguments])


def run(*arguments, cwd=HERE, fails=False):
    """Run Python in a process of its own. Returns what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Enough for small models; two threads that wait for each other lose to any other program."""
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def small(tmp_path):
    """A small model in eval mode, loaded from two folders in Hugging Face layout."""
    model = small_model().eval()
    for name, tower in (("siglip", model.siglip), ("sam", model.sam)):
        (tmp_path / name).mkdir()
        save_file(lora.base_state_dict(tower), tmp_path / name / "model.safetensors")
    data.toy_tokenizer().save(str(tmp_path / "siglip" / "tokenizer.json"))
    return model.load_backbones(tmp_path / "siglip", tmp_path / "sam")


# ================================================================================= 1. formulas and files

def test_metrics_by_hand():
    # Masks of 4 pixels.      target 1100, found 1000: intersection 1, union 2, IoU 1/2, not > 0.5
    #                         target 1111, found 1111: 4 / 4 = 1
    #                         target 0000, found 0000: IoU 1 by definition
    #                         target 1000, found 0111: 0 / 4 = 0
    #                         target 1111, found 1110: 3 / 4 = 0.75
    pairs = [(1, 2), (4, 4), (0, 0), (0, 4), (3, 4)]
    result = evaluate.scores([dict(intersection=i, union=u) for i, u in pairs])
    assert result["gIoU"] == pytest.approx(100 * (0.5 + 1 + 1 + 0 + 0.75) / 5)
    assert result["cIoU"] == pytest.approx(100 * 8 / 14)
    assert [result[f"Pr@{x}"] for x in evaluate.THRESHOLDS] == pytest.approx([60, 60, 60, 40, 40])
    assert (result["samples"], result["both_empty"]) == (5, 1)


def encode_rle(mask):
    coco = pytest.importorskip("pycocotools.mask")
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()


def test_run_lengths_equal_pycocotools():
    # 2 x 3, columns 01 | 11 | 00: one 0, three 1s, two 0s; 1 -> "1", 3 -> "3", 2 -> "2"
    assert data.decode_rle("132", 2, 3).tolist() == [[False, True, False], [True, True, False]]
    for counts in ("", "13", "1320", "13\x7f", "13o", "o"):
        with pytest.raises(ValueError, match="run lengths"):
            data.decode_rle(counts, 2, 3)
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width = rng.integers(1, 90, 2)
        mask = data.resize_mask(rng.random(rng.integers(1, 12, 2)) > 0.5, height, width)
        mask ^= rng.random((height, width)) > rng.choice([0.9, 0.99, 1.0])
        assert (data.decode_rle(encode_rle(mask), height, width) == mask).all()


def test_toy_tokenizer():
    tokenizer = data.toy_tokenizer()
    ids, mask = siglip.tokenize(tokenizer, ["The ship.", "A  RED, ship on the left", "ship " * 100, ""])
    assert ids.shape == (4, 64)
    assert mask.sum(1).tolist() == [3, 7, 64, 1]
    assert ids[torch.arange(4), mask.sum(1) - 1].tolist() == [siglip.EOS] * 4
    assert tokenizer.decode(ids[1][mask[1]].tolist()) == "a red ship on the left </s>"
    assert tokenizer.get_vocab_size() <= siglip.CONFIGS["tiny"].vocab
    assert siglip.out_of_vocabulary(tokenizer, ["The crane!", "a ship there"]) == ["crane", "there"]
    phrases = [phrase for index in range(20) for _, phrase in data.toy_scene(3, index)[1]]
    assert siglip.out_of_vocabulary(tokenizer, phrases) == []


def test_golden_token_ids():
    path = os.environ.get("RSREFSEG_TOKENIZER") or pytest.skip("RSREFSEG_TOKENIZER is not set")
    tokenizer = rsrefseg.Tokenizer.from_file(path)
    golden = {
        "The baseball field on the top": [260, 6722, 942, 277, 260, 549, 1],
        "A vehicle on the lower right of the gray ship.":
            [262, 266, 1410, 277, 260, 1213, 441, 267, 260, 6911, 2665, 1],
        "": [1]}
    for phrase, row in golden.items():
        assert siglip.tokenize(tokenizer, [phrase])[0].tolist() == [row]
    assert torch.equal(*[siglip.tokenize(tokenizer, [text])[0] for text in ("a <pad> b/c", "A pad bc!")])
    assert siglip.out_of_vocabulary(tokenizer, [*golden, "the ship \u6f22"]) == []


def released_schedule(n, epochs, warmup, period, lr=1e-4):
    """The released learning rates, step by step as its framework multiplies them: linear per iteration,
    then a cosine per epoch, whose period begins after the warm-up."""
    rate = lr * 0.01
    rates = []
    total = warmup * n - 1
    for epoch in range(epochs):
        if epoch > warmup:
            now = 1 + math.cos(math.pi / period * (epoch - warmup))
            before = 1 + math.cos(math.pi / period * (epoch - warmup - 1))
            rate = lr * 0.001 + (rate - lr * 0.001) * now / before
        for i in range(epoch * n, epoch * n + n):
            if 0 < i <= total:
                rate *= 1 + 0.99 / (total * 0.01 + (i - 1) * 0.99)
            rates.append(rate)
    return rates


def test_schedule():
    """Rounded down to whole epochs, and with 5 more of them, it is the released schedule. As it is, it
    equals one whose period ends with the run, at the start of each epoch."""
    n, epochs, warmup = 7, 20, 5
    longer = train.parse_args(["--sam", "b", "--epochs", str(epochs + warmup)])
    steps = [step if step < warmup * n else step // n * n for step in range(epochs * n)]
    rounded = [train.learning_rate(step, n, longer) for step in steps]
    assert rounded == pytest.approx(released_schedule(n, epochs, warmup, epochs), rel=1e-9, abs=0)
    args = train.parse_args(["--sam", "b", "--epochs", str(epochs)])
    ours = [train.learning_rate(step, n, args) for step in range(epochs * n)]
    theirs = released_schedule(n, epochs, warmup, epochs - warmup)
    assert ours[::n] == pytest.approx(theirs[::n], rel=1e-9, abs=0)
    assert (ours[0], ours[warmup * n - 1]) == pytest.approx((1e-6, 1e-4))
    assert train.learning_rate(epochs * n, n, args) == pytest.approx(1e-7)


def test_defaults_are_the_papers():
    expected = dict(epochs=200, total_batch=32, lr=1e-4, weight_decay=0.05, warmup_epochs=5,
                    lora_rank=16, lora_alpha=16, lora_dropout=0.1, phrases=1, map_loss=0, clip=0,
                    text_lora=True, down_blocks=2, prompts="both", text="both")
    args = vars(train.parse_args(["--sam", "b"]))
    assert {key: args[key] for key in expected} == expected
    assert set(train.TINY) <= set(args)


def test_a_phrase_gives_the_same_mask_in_any_batch():
    model = small_model().eval()
    images, ids, _, _ = batch(1, 3, 12)
    lengths = torch.tensor([5, 12, 8])
    mask = torch.arange(12) < lengths[:, None]
    ids = ids.scatter(1, lengths[:, None] - 1, siglip.EOS).masked_fill(~mask, siglip.EOS)
    together = model(images, ids, mask)
    for i, n in enumerate(lengths):
        alone = model(images, ids[i:i + 1, :n], mask[i:i + 1, :n])
        check(f"phrase {i} alone and in a batch", alone, together[i:i + 1], 1e-5)
    images, ids, mask, _ = batch(2, 3)
    singles = [model(images[i // 3:i // 3 + 1], ids[i:i + 1], mask[i:i + 1]) for i in range(6)]
    check("three phrases per image and one", model(images, ids, mask), torch.cat(singles), 1e-5)


@pytest.mark.parametrize("size, trainable", [("b", 16_478_252), ("l", 20_414_508)])
def test_full_size_shapes(size, trainable, monkeypatch):
    """On the meta device, which refuses most tensors that the code makes on the CPU, like a GPU."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())      # meta has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = meta_model(size)
    with torch.device("meta"):
        images = torch.empty(2, 3, 1024, 1024, dtype=torch.uint8)
        targets = torch.empty(6, 1, 1024, 1024, dtype=torch.bool)
        ids = torch.empty(6, 9, dtype=torch.int64)
    logits = model(images / 255, ids, ids > 0)
    train.segmentation_loss(logits, targets).backward()
    assert logits.shape == (6, 1, 256, 256)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("settings", [
    dict(), dict(prompts="sparse"), dict(prompts="dense"), dict(text="local"), dict(text="global"),
    dict(prompts="sparse", text="local"), dict(text_lora=False), dict(down_blocks=3)], ids=str)
def test_what_can_get_a_gradient_trains(settings, rank):
    """Also in the ablations: what they leave out gets none."""
    model = small_model(rank, lora_dropout=0.0, **settings)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        model.requires_grad_(True)
    images, ids, mask, targets = batch()
    train.segmentation_loss(model(images, ids, mask), targets).backward()
    assert trainable == {name for name, p in model.named_parameters() if p.grad is not None}
    zero = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert all(re.search(r"hypernetworks_mlps\.[123]", name) for name in zero), zero      # of masks 1-3


def test_checkpointed_activations_give_the_same_gradients():
    """Dropout included: the second forward pass of a layer draws the same numbers."""
    model = small_model().train()
    images, ids, mask, targets = batch()
    calls = []
    model.sam.vision_encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for recompute in (False, True):
        for module in model.modules():
            module.checkpoint_activations = recompute
        torch.manual_seed(1)
        train.segmentation_loss(model(images, ids, mask), targets).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_lora_targets_and_names():
    model = nn.ModuleDict(dict(base=nn.Linear(4, 4), b=nn.Conv2d(3, 4, 3), c=nn.LayerNorm(4),
                               d=nn.Conv2d(4, 4, 3, groups=2)))
    names = set(model.state_dict())
    assert lora.inject(model, ["base", "b*"], r=2) == ["base", "b"]
    assert set(lora.base_state_dict(model)) == names
    for target, message in (("nothing.*", "matches no layer"), ("c", "not a Linear"), ("d", "ungrouped"),
                            ("base", "not a Linear")):
        with pytest.raises(ValueError, match=message):
            lora.inject(model, [target])


@pytest.mark.parametrize("module, model, unused", [
    (siglip, SigLIP, "vision_model.head.probe"),
    (sam, SAM, "prompt_encoder.shared_embedding.positional_embedding")])
def test_weight_files_are_compared_exactly(tmp_path, module, model, unused):
    source = fill(model("small")).state_dict()
    target = model("small").state_dict()
    path = tmp_path / "model.safetensors"
    save_file(source | {unused: torch.zeros(3)}, path)
    module.load_weights(target, path)
    assert all(torch.equal(tensor, target[key]) for key, tensor in source.items())
    first = next(iter(source))
    less = {key: tensor for key, tensor in source.items() if key != first}
    for wrong, message in ((source | {"stray": torch.zeros(2)}, "stray: file .2., model None"),
                           (less, "file None"), (less | {first: torch.zeros(5, 5)}, "file .5, 5.")):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=f"(?s)model.safetensors .*1 tensors differ.*{message}"):
            module.load_weights(target, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        module.load_weights(target, path)


META_NAMES = (   # our name -> the name in Meta's sam_vit_*.pth, regular expressions in this order
    ("shared_image_embedding.positional_embedding",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("vision_encoder.layers", "image_encoder.blocks"), ("vision_encoder", "image_encoder"),
    ("patch_embed.projection", "patch_embed.proj"), ("neck.conv1", "neck.0"), ("neck.conv2", "neck.2"),
    ("neck.layer_norm1", "neck.1"), ("neck.layer_norm2", "neck.3"),
    ("prompt_encoder.point_embed", "prompt_encoder.point_embeddings"),
    ("mask_embed.conv1", "mask_downscaling.0"), ("mask_embed.layer_norm1", "mask_downscaling.1"),
    ("mask_embed.conv2", "mask_downscaling.3"), ("mask_embed.layer_norm2", "mask_downscaling.4"),
    ("mask_embed.conv3", "mask_downscaling.6"), ("upscale_conv1", "output_upscaling.0"),
    ("upscale_layer_norm", "output_upscaling.1"), ("upscale_conv2", "output_upscaling.3"),
    (r"(mlps\..|head)\.layers\.0", r"\1.layers.1"), (r"(mlps\..|head)\.proj_in", r"\1.layers.0"),
    (r"(mlps\..|head)\.proj_out", r"\1.layers.2"), ("layer_norm", "norm"))


@pytest.mark.parametrize("as_zip", [True, False])
def test_metas_own_files(small, tmp_path, as_zip):
    """In torch's zip format and in the older one."""
    source = fill(SAM("small")).state_dict()
    state = {}
    for name, tensor in source.items():
        for ours, theirs in META_NAMES:
            name = re.sub(ours, theirs, name)
        state[name] = tensor
    path = tmp_path / "sam_vit_b_01ec64.pth"
    torch.save(state, path, _use_new_zipfile_serialization=as_zip)
    small.load_backbones(tmp_path / "siglip", path)
    loaded = lora.base_state_dict(small.sam)
    assert all(torch.equal(tensor, loaded[key]) for key, tensor in source.items())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="sam_vit_b_01ec64.pth is truncated"):
        sam.load_weights(loaded, path)


def test_checkpoint_round_trip(small, tmp_path):
    """A checkpoint holds settings, what training changes, and where the towers come from."""
    settings = dict(lora_rank=2, text_lora=False, down_blocks=1, prompts="sparse", text="global")
    towers = (tmp_path / "siglip", tmp_path / "sam")
    ablated = RSRefSeg.from_pretrained("small", *towers, **settings).eval()
    assert ablated.settings.items() >= settings.items()
    images, ids, mask, _ = batch()
    path = tmp_path / "x.safetensors"
    for model in (ablated, small):
        model.save(path, step=3)
        again = RSRefSeg.from_checkpoint(path)
        assert again.settings == model.settings
        assert torch.equal(again(images, ids, mask), model(images, ids, mask))
    metadata, tensors = rsrefseg.read_checkpoint(path)
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert set(tensors) == set(small.state_dict()) - frozen
    assert metadata["step"] == 3
    # Frozen weights in the autocast type are the bits that autocast makes of fp32. What trains is fp32.
    half = RSRefSeg.from_checkpoint(path, dtype=torch.bfloat16)
    assert half.sam.vision_encoder.layers[0].mlp.lin1.base.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(images, ids, mask), again(images, ids, mask))
    # A model without frozen towers, or whose towers came from no file, is saved whole.
    for whole in (RSRefSeg.from_pretrained("small", *towers, lora_rank=0), small_model()):
        whole.tokenizer = data.toy_tokenizer()
        whole.eval().save(path)
        again = RSRefSeg.from_checkpoint(path, "absent", "absent")
        assert torch.equal(again(images, ids, mask), whole(images, ids, mask))
    lora.merge(whole)
    with pytest.raises(ValueError, match="save before lora.merge"):
        whole.save(path)
    with pytest.raises(ValueError, match="no tokenizer"):
        small_model().segment(Image.new("RGB", (50, 40)), "the ship")


def peft_name(name):
    name = re.sub(r"(^|\.)base\.", r"\1base_layer.", name)
    return re.sub(r"(^|\.)([AB])\.weight$", r"\1lora_\2.default.weight", name)


def official_name(name):
    """The released code's key for a key of RSRefSeg with two down blocks."""
    for ours, theirs in (
            ("siglip.vision_model", "clip_vision_encoder.base_model.model.model"),
            ("siglip.text_model", "clip_text_encoder.base_model.model.model"),
            ("siglip", "clip_text_encoder.base_model.model"),
            ("sam.vision_encoder", "backbone.base_model.model.model"),
            ("sam.prompt_encoder", "sam_prompt_encoder.model"),
            ("sam.mask_decoder", "sam_mask_decoder.model"), ("sam", "backbone.base_model.model"),
            ("prompter.project", "prompter_down_spatial.2.conv"), ("prompter.", "prompter_down_")):
        if name.startswith(ours):
            return peft_name(theirs + name.removeprefix(ours))


def official_state(model):
    """The state dict of RSRefSeg as the released code saves it, with two parts that it never uses."""
    state = {official_name(key): tensor for key, tensor in model.state_dict().items()}
    state["clip_vision_encoder.base_model.model.model.head.probe"] = torch.zeros(3)
    state["sam_prompt_encoder.model.shared_embedding.positional_embedding"] = torch.zeros(2, 16)
    return state


def test_checkpoints_of_the_released_code(small, tmp_path):
    state = official_state(small)
    images, ids, mask, _ = batch()
    path = tmp_path / "official.pth"
    for content in (state, {"state_dict": state}, {"module": state, "epoch": 3}):
        torch.save(content, path)
        model = RSRefSeg.from_checkpoint(path, tmp_path / "siglip")
        assert torch.equal(model(images, ids, mask), small(images, ids, mask))
    for wrong, message in ((state | {"stray": torch.zeros(1)}, "1 tensors differ.*stray"),
                           ({}, "neither .* nor one of the released")):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=f"(?s)official.pth .*{message}"):
            RSRefSeg.from_checkpoint(path, tmp_path / "siglip")


@pytest.mark.parametrize("size", ["b", "l"])
def test_official_keys_at_full_size(size):
    """Every name and shape in the released code's checkpoints, but for two parts that it never uses."""
    folder = os.environ.get("RSREFSEG_OFFICIAL_KEYS") or pytest.skip("RSREFSEG_OFFICIAL_KEYS is not set")
    lines = Path(folder, f"official_keys_{size}.tsv").read_text().splitlines()[1:]
    state = {key: torch.empty([int(n) for n in shape.split(",") if n], device="meta")
             for key, shape, _ in (line.split("\t") for line in lines)}
    metadata, tensors = rsrefseg.convert_official(state, "keys")
    assert metadata["settings"] == dict(sam=size, lora_rank=16, down_blocks=2)
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    assert shapes == {key: tensor.shape for key, tensor in meta_model(size).state_dict().items()}


def test_weights_by_name(small, tmp_path, monkeypatch):
    """Downloaded at the pinned revision; a file without the published sha256 is deleted."""
    (tmp_path / "cache").mkdir()

    def download(repository, filename, revision):
        assert revision == "1" * 40
        return shutil.copy(tmp_path / Path(repository).name / filename, tmp_path / "cache")

    client = create_autospec(rsrefseg.hf_hub_download, side_effect=download)
    monkeypatch.setattr(rsrefseg, "hf_hub_download", client)
    for key, tower in (("siglip", "siglip"), ("small", "sam")):
        sha256 = hashlib.sha256((tmp_path / tower / "model.safetensors").read_bytes()).hexdigest()
        monkeypatch.setitem(rsrefseg.HUB, key, (f"some/{tower}", "1" * 40, sha256))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="sha256 and was deleted"):
        patch.setitem(rsrefseg.HUB, "small", ("some/sam", "1" * 40, "another"))
        RSRefSeg.from_pretrained("small")
    assert not (tmp_path / "cache" / "model.safetensors").exists()
    loaded = lora.base_state_dict(RSRefSeg.from_pretrained("small"))
    for key, tensor in lora.base_state_dict(small).items():
        assert key.startswith("prompter.") or torch.equal(loaded[key], tensor), key


def test_only_plain_data_is_unpickled(tmp_path):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "rrsisd" / "refs(unc).p"
    path.parent.mkdir()
    for value in (Exploit(), np.float64(1)):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps([{"a": value}], protocol))
            with pytest.raises(ValueError, match="cannot read rrsisd after row 0, .* would call"):
                data.read_refs(tmp_path)
    assert list(tmp_path.iterdir()) == [path.parent]


def test_images_of_every_mode(tmp_path):
    ramp = np.linspace(0, 255, 30 * 20).reshape(20, 30).astype(np.uint8)
    rgb = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1))
    grey = rgb.convert("L").convert("RGB")
    path = tmp_path / "x.png"
    for mode, expected in (("RGB", rgb), ("RGBA", rgb), ("L", grey), ("LA", grey)):
        rgb.convert(mode).save(path)
        assert data.read_image(path).tobytes() == expected.tobytes()
    Image.fromarray(ramp.astype(np.uint16) * 16).save(path)
    low, high = np.percentile(ramp, (2, 98))
    stretched = np.clip((ramp - low) * 255 / (high - low), 0, 255)
    assert abs(np.asarray(data.read_image(path))[..., 0] - stretched).max() <= 1


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A toy data set of 24 + 8 + 8 scenes of four phrases."""
    root = tmp_path_factory.mktemp("toy")
    call(data.main, "toy", root, "--train", 24, "--val", 8, "--test", 8, "--seed", 5)
    return root


def test_toy_scenes(toy):
    """They follow from their seed, their objects do not overlap, and their masks are stored."""
    image, rows = data.toy_scene(5, 0)
    assert image.tobytes() == data.toy_scene(5, 0)[0].tobytes()
    assert np.sum([item.mask for item, _ in rows], 0).max() == 1
    for (item, phrase), ref in zip(rows, data.read_refs(toy)[1]):
        assert (ref.phrase, ref.category, ref.split) == (phrase, item.category, "train")
        assert (data.read_mask(ref) == item.mask).all()


SIDES = dict(left=(-1, 0), right=(1, 0), top=(0, -1), upper=(0, -1), bottom=(0, 1), lower=(0, 1))


def matches(objects, phrase):
    """The objects that a phrase fits, read from its words alone."""
    head, _, anchor = phrase.lower().partition(" of the ")
    name, _, position = re.sub(" (on|in) the ", "|", head).partition("|")
    words = name.split()
    found = [item for item in objects if data.OBJECTS[item.category][0] in name]
    if set(data.COLOURS) & set(words):
        found = [item for item in found if item.colour in words]
    if set(data.SIZES) & set(words):
        found = [item for item in found if item.size in words]
    if position == "middle":
        return [item for item in found if max(abs(item.x - 0.5), abs(item.y - 0.5)) < 0.2]
    side = np.sum([SIDES[word] for word in position.split()] or [(0, 0)], 0)
    if not anchor:
        return [item for item in found
                if np.all((side == 0) | (side * (item.x - 0.5, item.y - 0.5) > 0.03))]
    (other,) = matches(objects, anchor)
    offsets = [np.array([item.x - other.x, item.y - other.y]) for item in found]
    return [item for item, offset in zip(found, offsets)
            if offset @ side > 0.8 * np.linalg.norm(offset) * np.linalg.norm(side)]


def test_toy_phrases_name_one_object():
    phrases = 0
    distractors = 0
    for index in range(300):
        rng = np.random.default_rng([9, index])
        objects = data.place_objects(rng, np.array(data.draw_terrain(rng))[::3, ::3])
        for item in objects:
            phrase = data.choose_phrase(rng, objects, item)
            if phrase is not None:
                assert matches(objects, phrase) == [item], (phrase, objects)
                phrases += 1
                distractors += sum(other.category == item.category for other in objects) > 1
    print(f"  {distractors / phrases:.0%} of {phrases} targets have a distractor of their class")
    assert distractors / phrases > 0.5


def test_items_of_a_data_set(toy):
    one = data.RefSegDataset(toy, "val", 96)
    four = data.RefSegDataset(toy, "val", 96, phrases=4)
    assert (len(one), len(four)) == (32, 8)
    items = data.collate(list(four)[:2])
    assert (items["images"].shape, items["images"].dtype) == ((2, 3, 96, 96), torch.uint8)
    assert (items["masks"].shape, items["masks"].dtype) == ((8, 1, 96, 96), torch.bool)
    assert items["refs"] == one.refs[:8]
    assert all(torch.equal(one[i]["masks"][0], items["masks"][i]) for i in range(8))
    three = data.RefSegDataset(toy, "val", 96, phrases=3)              # the last group is filled up
    assert [[one.refs.index(ref) for ref in refs] for refs in three.items[:2]] == [[0, 1, 2], [3, 0, 1]]


def write_rrsisd(root, refs):
    """Write rows of the toy set as RRSIS-D's files. Returns the contents of its two lists."""
    images = root / "images" / "rrsisd" / "JPEGImages"
    images.mkdir(parents=True)
    (root / "rrsisd").mkdir()
    rows = []
    annotations = []
    for number, ref in enumerate(refs):
        shutil.copy(ref.image, images)
        mask = data.read_mask(ref)
        rows.append(dict(ref_id=number, ann_id=100 + number, category_id=7, split=ref.split,
                         file_name=ref.image.name, sentences=[dict(sent=ref.phrase)]))
        segmentation = dict(size=mask.shape, counts=encode_rle(mask))
        annotations.append(dict(id=100 + number, segmentation=[segmentation]))
    instances = dict(categories=[dict(id=7, name="ship")], annotations=annotations)
    (root / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(rows))
    (root / "rrsisd" / "instances.json").write_text(json.dumps(instances))
    return rows, instances


def write_format(root, dataset, refs):
    """Write rows of the toy set as another data set's files."""
    images = root / ("img_rgb" if dataset.startswith("risbench") else "images")
    masks = root / ("mask" if dataset.startswith("risbench") else "masks")
    images.mkdir(parents=True)
    masks.mkdir()
    for number, ref in enumerate(refs):
        suffix = "tif" if dataset == "refsegrs" else "png"
        name = f"train_{number}.{suffix}"                     # RISBench's names say train in every split
        mask = data.read_mask(ref)
        Image.open(ref.image).save(images / name)
        Image.fromarray(mask.astype(np.uint8) * 255).save(masks / name)
        file = f"output_phrase_{ref.split}.txt"
        line = f"{name.removesuffix('.tif')} {ref.phrase}"
        if dataset == "risbench_lines":
            file = f"{ref.split}.jsonl"
            segmentation = dict(size=mask.shape, counts=encode_rle(mask))
            line = json.dumps(dict(split=ref.split, sent=f" {ref.phrase}  ", file_name=name,
                                   segmentation=segmentation))
        with open(root / file, "a") as lines:
            lines.write(f"{line}\n")


@pytest.mark.parametrize("dataset", ["rrsisd", "refsegrs", "risbench", "risbench_lines"])
def test_other_data_sets(toy, tmp_path, dataset, capsys):
    refs = [ref for split in data.SPLITS for ref in data.RefSegDataset(toy, split, 96).refs[:3]]
    if dataset == "rrsisd":
        write_rrsisd(tmp_path, refs)
    else:
        write_format(tmp_path, dataset, refs)
    assert data.read_refs(tmp_path)[0] == dataset.removesuffix("_lines")
    items = [item for split in data.SPLITS for item in data.RefSegDataset(tmp_path, split, 96)]
    for item, ref in zip(items, refs, strict=True):
        assert (item["refs"][0].phrase, item["refs"][0].split) == (ref.phrase, ref.split)
        assert (item["originals"][0] == data.read_mask(ref)).all()
        assert torch.equal(item["image"], data.image_tensor(data.read_image(ref.image), 96))
    call(data.main, "check", tmp_path)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"\w+: {('\w+': 3,? ?){3}} phrases.*\nwrote .*\n", printed)
    assert Image.open(tmp_path / "check.jpg").width > 1000


def test_check_lists_every_defect(toy, tmp_path, capsys):
    rows, instances = write_rrsisd(tmp_path, data.RefSegDataset(toy, "train", 96).refs[:16])
    rows[0]["sentences"][0]["sent"] = " ?"
    instances["annotations"][1]["segmentation"][0]["counts"] = "132"
    instances["annotations"][2]["segmentation"][0]["counts"] = encode_rle(np.zeros((256, 256), bool))
    (tmp_path / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(rows))
    (tmp_path / "rrsisd" / "instances.json").write_text(json.dumps(instances))
    images = tmp_path / "images" / "rrsisd" / "JPEGImages"
    (images / "00001.jpg").write_bytes((images / "00001.jpg").read_bytes()[:900])
    (images / "00002.jpg").unlink()
    Image.open(images / "00003.jpg").resize((256, 257)).save(images / "00003.jpg")
    with pytest.raises(ValueError, match="training would fail: 10 bad rows"):
        call(data.main, "check", tmp_path)
    pattern = r"(\w+): train, ref_id (\d+), .*(empty|run lengths|cannot read|no such|another size)"
    found = re.findall(pattern, capsys.readouterr().out)
    expected = [("error", 0, "empty"), ("error", 1, "run lengths"), ("warning", 2, "empty")]
    expected += [("error", i, "cannot read" if i < 8 else "no such") for i in range(4, 12)]
    expected += [("warning", i, "another size") for i in range(12, 16)]
    assert found == [(kind, str(ref_id), what) for kind, ref_id, what in expected]
    with pytest.raises(ValueError, match="2 problems.*: the phrase of ref_id 0 .*00002.jpg"):
        data.RefSegDataset(tmp_path, "train", 96)


def test_download(toy, tmp_path, monkeypatch, capsys):
    """RRSIS-D as the hub has it is unpacked into its folders and checked."""
    write_rrsisd(tmp_path, data.read_refs(toy)[1])
    snapshot = tmp_path / "rrsisd"
    shutil.make_archive(snapshot / "JPEGImages", "zip", tmp_path / "images" / "rrsisd", "JPEGImages")
    client = create_autospec(huggingface_hub.snapshot_download, return_value=str(snapshot))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    call(data.main, "download", "rrsisd", tmp_path / "data")
    assert "Published: train 12,181" in capsys.readouterr().out


# ================================================================== 2. parity with transformers and peft

def reference_siglip(config):
    transformers = pytest.importorskip("transformers")
    tower = dict(hidden_size=config.width, intermediate_size=config.mlp, num_hidden_layers=config.layers,
                 num_attention_heads=config.heads)
    text = dict(tower, vocab_size=config.vocab, max_position_embeddings=64, projection_size=config.width)
    vision = dict(tower, image_size=config.image, patch_size=config.patch)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return transformers.SiglipModel(config).eval()


def reference_sam(config):
    transformers = pytest.importorskip("transformers")
    C = config.prompt
    sizes = dict(image_size=config.image, patch_size=config.patch)
    vision = dict(sizes, hidden_size=config.width, num_hidden_layers=config.layers,
                  num_attention_heads=config.heads, output_channels=C, window_size=config.window,
                  global_attn_indexes=list(config.global_layers), num_pos_feats=C // 2)
    decoder = dict(hidden_size=C, mlp_dim=config.decoder_mlp, iou_head_hidden_dim=C)
    config = transformers.SamConfig(vision_config=vision, mask_decoder_config=decoder,
                                    prompt_encoder_config=dict(sizes, hidden_size=C))
    return transformers.SamModel(config).eval()


def transfer(ours, theirs):
    """Copy our weights into the reference. All names must match, but for what we leave out."""
    state = {peft_name(key): tensor for key, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(re.search("vision_model.head|encoder.shared_emb", name) for name in missing), missing


def check_gradients(name, ours, theirs, tolerance=1e-4):
    """Compare the gradient of every parameter that trains with that of its namesake."""
    reference = {key: p.grad for key, p in theirs.named_parameters()}
    gradients = {key: p.grad for key, p in ours.named_parameters() if p.requires_grad}
    errors = {}
    for key, gradient in gradients.items():
        expected = reference[peft_name(key)]
        if key.endswith("k_proj.bias"):              # softmax cancels it: its gradient is rounding noise
            scale = gradients[key.replace("bias", "weight")].norm()
            assert max(gradient.norm(), expected.norm()) < 1e-4 * scale, key
        elif gradient is None or not gradient.any():
            assert expected is None or not expected.any(), key
        else:
            errors[key] = relative(gradient, expected)
    worst = max(errors, key=errors.get)
    print(f"  {name}: {len(errors)} gradients, worst {worst} {errors[worst]:.1e} (at most {tolerance})")
    assert errors[worst] <= tolerance
    return len(errors)


def test_siglip_parity():
    ours = fill(SigLIP("small")).eval()
    theirs = reference_siglip(SMALL_SIGLIP)
    transfer(ours, theirs)
    images, ids, mask, _ = batch(side=70, length=9)
    v = ours.encode_image(images)
    t, s = ours.encode_text(ids, mask)
    their_v = theirs.vision_model((images - 0.5) / 0.5).last_hidden_state
    text = theirs.text_model(input_ids=ids)
    check("SigLIP image features", v, their_v.transpose(1, 2).unflatten(2, (5, 5)))
    check("SigLIP tokens", t, text.last_hidden_state)
    check("SigLIP sentence", s, text.pooler_output)
    (v.square().mean() + t.square().mean() + s.square().mean()).backward()
    sum(x.square().mean() for x in (their_v, text.last_hidden_state, text.pooler_output)).backward()
    assert check_gradients("SigLIP", ours, theirs) > 90
    mask = torch.arange(9) < torch.tensor([[6], [9]])                        # the first phrase is padded
    ids = ids.masked_fill(~mask, siglip.EOS)
    t, s = ours.encode_text(ids, mask)
    alone = theirs.text_model(input_ids=ids[:1, :6])
    check("SigLIP tokens of a padded phrase", t[:1, :6], alone.last_hidden_state)
    check("SigLIP sentence of a padded phrase", s[:1], theirs.text_model.head(alone[0][:, -1]))


def sam_pixels(images):
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device).view(3, 1, 1)
    return (images - mean) / torch.tensor([0.229, 0.224, 0.225], device=images.device).view(3, 1, 1)


@pytest.mark.parametrize("kinds", [
    "points labels", "boxes", "masks", "points labels boxes", "points labels boxes masks", "nothing"])
def test_sam_parity(kinds):
    """Three images whose numbers of points differ."""
    ours = fill(SAM("small")).eval()
    theirs = reference_sam(SMALL_SAM)
    transfer(ours, theirs)
    theirs.prompt_encoder.shared_embedding = theirs.shared_image_embedding
    images, _, _, _ = batch(3)
    pixels = sam_pixels(images)
    check("SAM image features", ours.encode_image(images), theirs.vision_encoder(pixels)[0])
    prompts = dict(points=128 * torch.rand(3, 3, 2), masks=torch.randn(3, 1, 32, 32),
                   labels=torch.tensor([[1, 0, 1], [1, 1, -1], [0, -1, -1]]),
                   boxes=(128 * torch.rand(3, 2, 2)).sort(1).values.flatten(1))
    prompts = {name: value for name, value in prompts.items() if name in kinds.split()}
    their_prompts = {f"input_{name}": value if name == "masks" else value[:, None]
                     for name, value in prompts.items()}
    for multimask in (True, False):
        name = f"{kinds}, {3 if multimask else 1} masks"
        masks, iou = ours(images, **prompts, multimask=multimask)
        result = theirs(pixel_values=pixels, **their_prompts, multimask_output=multimask)
        check(f"SAM masks, {name}", masks, result.pred_masks[:, 0])
        check(f"SAM iou, {name}", iou, result.iou_scores[:, 0])
        (masks.square().mean() + iou.square().mean()).backward()
        (result.pred_masks.square().mean() + result.iou_scores.square().mean()).backward()
        assert check_gradients(f"SAM, {name}", ours, theirs, 1e-3) > 120
        ours.zero_grad()
        theirs.zero_grad()
    one = {name: value[1:2] for name, value in prompts.items()}
    check("SAM batch and single", masks[1:2], ours(images[1:2], **one, multimask=False)[0], 1e-5)
    with pytest.raises(ValueError, match="resize images to 128 x 128"):
        ours.encode_image(images[..., :64])


@pytest.mark.parametrize("cuda", [True, False])
@pytest.mark.parametrize("n", [5, 33])
def test_relative_position_is_the_bias_it_stands_for(n, cuda, monkeypatch):
    """Windows, large grids by rows, and the fused call, beside the N x N bias written out in float64."""
    model = fill(sam.Attention(32, 2, n)).double()
    x = torch.randn(2, n, n, 32, dtype=torch.float64)
    q, k, v = model.qkv(x).reshape(2, n * n, 3, 2, 16).permute(2, 0, 3, 1, 4)
    position = torch.cartesian_prod(torch.arange(n), torch.arange(n))           # (n * n, 2): row, column
    offset = position[:, None] - position + n - 1                               # (n * n, n * n, 2)
    table = model.rel_pos_h[offset[..., 0]] + model.rel_pos_w[offset[..., 1]]   # (n * n, n * n, 16)
    bias = torch.einsum("bhnd,nmd->bhnm", q, table)
    y = torch.softmax(q @ k.transpose(2, 3) / 4 + bias, -1) @ v
    expected = model.proj(y.transpose(1, 2).reshape(2, n, n, 32))
    monkeypatch.setattr(torch.Tensor, "is_cuda", cuda)                          # chooses the form only
    output = model(x)
    check(f"relative position, {n} x {n}, {cuda=}", output, expected, 1e-12)
    gradients = torch.autograd.grad(output.square().sum(), model.parameters())
    theirs = torch.autograd.grad(expected.square().sum(), model.parameters())
    assert all(relative(a, b) < 1e-12 for a, b in zip(gradients, theirs))


@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(12, 20), (12,)), (nn.Linear(12, 20), (2, 5, 12)),
    (nn.Conv2d(6, 10, 3, 2, 1), (2, 6, 9, 9)), (nn.Conv2d(6, 10, 1, bias=False), (2, 6, 9, 9))], ids=str)
def test_lora_parity(layer, shape):
    peft = pytest.importorskip("peft")
    ours = nn.ModuleDict(dict(x=copy.deepcopy(layer)))
    theirs = nn.ModuleDict(dict(x=layer))
    lora.inject(ours, ["x"], r=4, alpha=6)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["x"]), theirs)
    transfer(fill(ours), theirs)
    x = torch.randn(shape)
    output = ours["x"](x)
    their_output = theirs["x"](x)
    check(f"LoRA {layer}", output, their_output, 1e-5)
    output.square().sum().backward()
    their_output.square().sum().backward()
    check_gradients(f"LoRA {layer}", ours, theirs, 1e-5)
    theirs["x"].merge()
    lora.merge(ours)
    check(f"LoRA {layer}, merged weight", ours["x"].weight, theirs["x"].base_layer.weight, 1e-5)


@pytest.mark.parametrize("part", ["siglip.vision_model", "siglip.text_model", "sam.vision_encoder"])
def test_peft_loads_what_save_peft_writes(part, tmp_path):
    """peft puts the adapters onto transformers' own tower: equal outputs."""
    peft = pytest.importorskip("peft")
    model = small_model(lora_alpha=6).eval()
    ours = model.get_submodule(part)
    lora.save_peft(ours, tmp_path)
    towers = nn.ModuleDict(dict(siglip=reference_siglip(SMALL_SIGLIP), sam=reference_sam(SMALL_SAM)))
    towers.load_state_dict(lora.base_state_dict(model), strict=False)
    theirs = towers.get_submodule(part)
    images, ids, mask, _ = batch(side=128 if part == "sam.vision_encoder" else 70)
    inputs = [ids] if part == "siglip.text_model" else [images]
    expected = ours(ids, mask)[0] if part == "siglip.text_model" else ours(images)
    assert relative(theirs(*inputs)[0], expected) > 1e-3, "the adapters must matter"
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    check(f"peft, {part}", expected, adapted(*inputs)[0], 1e-5)


PEFT_TARGETS = {   # what the released code adapts
    "sam.vision_encoder": r"(layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12]))|(neck\.conv[12])",
    "siglip.vision_model": r"encoder\.layers\.\d+\.self_attn\.\w+_proj",
    "siglip.text_model": r"(encoder\.layers\.\d+\.self_attn\.\w+_proj)|(head)",
}


class Assembly(nn.Module):
    """The published model, put together from transformers' and peft's parts. Phrases of one length, one
    per image."""

    def __init__(self, size, rank=16, dropout=0.0):
        super().__init__()
        peft = pytest.importorskip("peft")
        config = sam.CONFIGS[size]
        self.siglip = reference_siglip(siglip.CONFIGS[rsrefseg.SIGLIP_SIZE[size]])
        self.sam = reference_sam(config)
        for part, target in PEFT_TARGETS.items() if rank else ():
            adapter = peft.LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=target)
            peft.inject_adapter_in_model(adapter, self.get_submodule(part))
        D = self.siglip.config.vision_config.hidden_size
        C = config.prompt

        def block(c_in, *shape):
            conv = nn.Conv2d(c_in, C, *shape, bias=False)
            return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(C), gelu=nn.GELU()))

        self.prompter = nn.ModuleDict(dict(
            channel=block(3 * D, 1), spatial=nn.Sequential(block(C, 3, 2, 1), block(C, 3, 2, 1)),
            project=nn.Conv2d(C, C, 1)))

    def positions(self, n):
        centre = (torch.arange(n, device=self.siglip.logit_scale.device) + 0.5) / n
        grid = torch.stack(torch.meshgrid(centre, centre, indexing="xy"), -1)                    # (x, y)
        return self.sam.shared_image_embedding(grid).permute(2, 0, 1)[None]

    def resize(self, x, side):
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)

    def forward(self, images, ids):
        f_sam = self.sam.vision_encoder(sam_pixels(images))[0]
        side = self.siglip.config.vision_config.image_size
        v = self.siglip.vision_model(self.resize((images - 0.5) / 0.5, side)).last_hidden_state
        g = math.isqrt(v.shape[1])
        v = v.transpose(1, 2).unflatten(2, (g, g))
        text = self.siglip.text_model(input_ids=ids)
        t = text.last_hidden_state
        s = text.pooler_output
        features = torch.cat([t, s[:, None]], 1)[..., None, None]         # the tokens, then the sentence
        cosine = torch.cosine_similarity(v[:, None], features, dim=2)
        logits = cosine * self.siglip.logit_scale.exp() + self.siglip.logit_bias
        word_map = logits[:, :-1].sigmoid()
        sentence = logits[:, -1:]
        f_local = (v + v * word_map.mean(1, keepdim=True)) / 2
        x = torch.cat([f_local, v * sentence.sigmoid(), v], 1)
        x = self.prompter["channel"](x) + self.positions(g)
        sparse = self.prompter["project"](self.prompter["spatial"](x)).flatten(2).transpose(1, 2)
        e = f_sam.shape[-1]
        _, dense = self.sam.prompt_encoder(input_points=None, input_labels=None, input_boxes=None,
                                           input_masks=self.resize(sentence, 4 * e))
        positions = self.positions(e).expand(len(ids), -1, -1, -1)
        masks, *_ = self.sam.mask_decoder(
            image_embeddings=f_sam, image_positional_embeddings=positions, multimask_output=False,
            sparse_prompt_embeddings=sparse[:, None], dense_prompt_embeddings=dense)
        return masks[:, 0], dict(f_sam=f_sam, v=v, t=t, s=s, word_map=word_map,
                                 sentence_map=sentence[:, 0], sparse=sparse, dense=dense)

    def loss(self, logits, targets):
        logits = self.resize(logits, targets.shape[-1])
        return 5 * F.binary_cross_entropy_with_logits(logits, targets.float())


@pytest.mark.parametrize("mode, rank", [("eval", 4), ("train", 4), ("train", 0)])
def test_rsrefseg_parity(mode, rank):
    """Rank 4: LoRA on frozen towers, as b and l train. Rank 0: all weights train, as in tiny."""
    ours = small_model(rank, lora_dropout=0.0).train(mode == "train")
    theirs = Assembly("small", rank).train(mode == "train")
    transfer(ours, theirs)
    images, ids, mask, targets = batch(3, 1, 9)
    intermediates = {}
    logits = ours(images, ids, mask, intermediates)
    their_logits, stages = theirs(images, ids)
    name = f"{mode}, rank {rank}"
    for stage, value in stages.items():
        check(f"{name}: {stage}", intermediates[stage], value)
    check(f"{name}: mask logits", logits, their_logits)
    loss = train.segmentation_loss(logits, targets)
    their_loss = theirs.loss(their_logits, targets)
    check(f"{name}: loss", loss, their_loss, 1e-5)
    loss.backward()
    their_loss.backward()
    assert check_gradients(name, ours, theirs) > 150


# ======================================================================== 3. training and other commands

@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    """The folder of a run of tiny, two epochs of three steps."""
    out = tmp_path_factory.mktemp("run")
    run("train.py", "--sam", "tiny", "--data", toy, "--out", out, "--epochs", 2, *CPU)
    assert " ".join(sorted(path.name for path in out.iterdir())) == (
        "best.safetensors last.safetensors log.jsonl resume.pt val_000003.jpg val_000006.jpg")
    assert log_rows(out, "test")[6]["samples"] == 32
    return out


def log_rows(folder, kind):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == kind}


def assert_same_run(a, b):
    """Two finished runs agree to the last bit: weights, optimizer, logged losses, best checkpoint."""
    leaves = []
    for folder in (a, b):
        state = torch.load(folder / "resume.pt", weights_only=True)
        losses = [(row["loss"], row["gradient_norm"]) for row in log_rows(folder, "train").values()]
        best = load_file(folder / "best.safetensors")
        leaves.append(tree_leaves([state["progress"], state["model"], state["optimizer"], losses, best]))
    for x, y in zip(*leaves, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


def keep_rows(root, rows):
    lines = (root / "phrases.jsonl").read_text().splitlines()
    (root / "phrases.jsonl").write_text("\n".join(lines[rows]))


def test_a_broken_run_resumes_to_the_bit(toy, trained, tmp_path, monkeypatch):
    """A loss that is not finite ends a run before the optimizer's step. Then the data move."""
    out = tmp_path / "out"
    arguments = ["--sam", "tiny", "--out", out, "--epochs", 2, "--save-every", 2, *CPU]
    loss = train.segmentation_loss
    calls = []

    def broken_loss(*args):
        calls.append(args)
        return loss(*args) * (math.nan if len(calls) == 9 else 1)      # step 4; a step has two losses

    monkeypatch.setattr(train, "segmentation_loss", broken_loss)
    old_umask = os.umask(0o027)
    with pytest.raises(ValueError, match="step 4: loss nan.* samples .*--lr") as error:
        call(train.main, *arguments, "--data", toy)
    os.umask(old_umask)
    monkeypatch.undo()
    assert str(error.value).count("phrases:") == 8 * 4
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}
    assert torch.load(out / "resume.pt", weights_only=True)["progress"]["step"] == 4
    moved = shutil.copytree(toy, tmp_path / "moved")
    call(train.main, *arguments, "--data", moved, "--resume")
    assert_same_run(trained, out)
    keep_rows(moved, slice(4, None))
    for flags, message in ((["--data", moved, "--resume"], "other arguments or data: training_rows"),
                           (["--data", toy, "--resume", "--lr", 1], "other arguments or data: lr 0.001"),
                           (["--data", toy], "holds a run: "),
                           (["--data", toy, "--out", tmp_path, "--resume"], "holds no run to resume")):
        with pytest.raises(ValueError, match=message):
            call(train.main, *arguments, *flags)


def small_arguments(toy, folder):                  # from the files of `small`: nine steps of two batches
    return ["--sam", "small", "--data", toy, "--siglip", folder / "siglip", "--phrases", 4, "--lr", 1e-3,
            "--sam-weights", folder / "sam", "--batch-size", 4, "--total-batch", 8, "--epochs", 3,
            "--warmup-epochs", 1, "--workers", 1]


@pytest.mark.parametrize("number, times", [
    (signal.SIGINT, 1),
    pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, 5, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_bit(toy, small, tmp_path, number, times):
    """SIGTERM to the run, the others to its workers too. LoRA, dropout, accumulated gradients."""
    arguments = [*small_arguments(toy, tmp_path), "--epochs", 3 * times, "--save-every", 1, *CPU]
    call(train.main, *arguments, "--out", tmp_path / "whole")
    resume = tmp_path / "out" / "resume.pt"
    program = "import sys, test_rsrefseg, train; train.run(lambda: train.main(sys.argv[1:]))"
    for _ in range(times):
        flags = ["--out", resume.parent, *["--resume"] * resume.exists()]
        before = resume.stat().st_mtime_ns if resume.exists() else None
        command = [sys.executable, "-c", program, *map(str, [*arguments, *flags])]
        process = subprocess.Popen(command, cwd=HERE, start_new_session=True)
        while not resume.exists() or resume.stat().st_mtime_ns == before:
            assert process.poll() is None, "it ended before its first step"
            time.sleep(0.01)
        time.sleep(np.random.uniform(0, 0.2))
        send = os.kill if number == signal.SIGTERM else os.killpg
        send(process.pid, number)
        assert process.wait() == (-number if number == signal.SIGKILL else 128 + signal.SIGTERM)
    call(train.main, *arguments, "--out", resume.parent, "--resume")
    assert_same_run(tmp_path / "whole", resume.parent)


def test_two_processes_follow_one(toy, tmp_path):
    """Each micro-batch, and so BatchNorm, sees the same samples: gradients and weights agree."""
    root = shutil.copytree(toy, tmp_path / "toy")
    keep_rows(root, slice(-1))
    arguments = ["--sam", "tiny", "--data", root, "--epochs", 2, "--batch-size", 4, "--lr", 1e-4, *CPU]
    call(train.main, *arguments, "--out", tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "train.py", *arguments,
        "--out", tmp_path / "two")
    one, two = [log_rows(tmp_path / name, "train") for name in ("one", "two")]
    worst = max(abs(one[step]["gradient_norm"] / two[step]["gradient_norm"] - 1) for step in (3, 6))
    one, two = [load_file(tmp_path / name / "last.safetensors") for name in ("one", "two")]
    compared = [key for key in one if not re.search("running|num_batches|k_proj.bias", key)]
    moved = max(relative(two[key], one[key]) for key in compared)
    assert worst < 1e-4 and moved < 1e-3
    model = RSRefSeg.from_checkpoint(tmp_path / "two" / "last.safetensors")
    alone = evaluate.evaluate(model, data.RefSegDataset(root, "val", 96), 4)
    logged = log_rows(tmp_path / "two", "val")[6]["cIoU"]
    assert logged > 1 and logged == pytest.approx(evaluate.scores(alone)["cIoU"], abs=1e-3)


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_lora_training_in_mixed_precision(toy, small, tmp_path, amp):
    out = tmp_path / "out"
    call(train.main, *small_arguments(toy, tmp_path), "--val-every", 3, "--out", out, "--amp", amp)
    losses = [row["loss"] for row in log_rows(out, "train").values()]
    assert losses[-1] < losses[0]
    tensors = load_file(out / "last.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.int64}
    assert all(tensor.any() for name, tensor in tensors.items() if name.endswith(".B.weight"))


@pytest.mark.parametrize("name", ["own.safetensors", "official.pth"])
def test_training_starts_from_a_checkpoint(toy, small, tmp_path, name):
    """--init, with this program's own checkpoint and with one of the released code."""
    small.save(tmp_path / "own.safetensors")
    torch.save(official_state(small), tmp_path / "official.pth")
    arguments = [*small_arguments(toy, tmp_path), "--init", tmp_path / name, "--out", tmp_path / "out"]
    call(train.main, *arguments, "--epochs", 1, "--lr", 1e-12, *CPU)
    after = RSRefSeg.from_checkpoint(tmp_path / "out" / "last.safetensors").state_dict()
    for key, tensor in small.state_dict().items():
        assert re.search("running|num_batches", key) or relative(after[key], tensor) < 1e-6, key
    with pytest.raises(ValueError, match="holds size small, not --sam tiny"):
        call(train.main, *arguments, "--sam", "tiny", "--out", tmp_path / "other")


def test_tiny_learns_to_follow_the_phrase(toy, tmp_path):
    """It must fit 24 scenes in 120 steps, and fail when their phrases are exchanged."""
    call(train.main, "--sam", "tiny", "--data", toy, "--out", tmp_path, "--epochs", 40,
         "--val-every", 40, "--warmup-epochs", 3, *CPU)
    model = RSRefSeg.from_checkpoint(tmp_path / "last.safetensors")
    scenes = data.RefSegDataset(toy, "train", model.image_size)
    plain = evaluate.scores(evaluate.evaluate(model, scenes, 16))["gIoU"]
    shuffled = evaluate.scores(evaluate.evaluate(model, scenes, 16, shuffle_phrases=True))["gIoU"]
    print(f"  24 scenes, 120 steps: gIoU {plain:.1f}, with shuffled phrases {shuffled:.1f}")
    assert plain > 50 and shuffled < 25


def test_evaluate_command(trained, capsys):
    checkpoint = trained / "best.safetensors"
    call(evaluate.main, checkpoint, *CPU)
    pattern = r"(?s)\| storagetank \|.*\ntest \| gIoU .* \| samples 32 \| both_empty 0\n"
    assert re.search(pattern, capsys.readouterr().out)
    report = json.loads((trained / "best.test.json").read_text())
    assert report["metrics"] == evaluate.scores(report["samples"])
    assert Image.open(trained / "best.test.jpg").width > 1000
    call(evaluate.main, checkpoint, "--split", "val", "--shuffle-phrases", *CPU)
    rows = json.loads((trained / "best.shuffled.val.json").read_text())["samples"]
    refs = data.RefSegDataset(report["data"], "val", 96).refs
    assert [row["ref_id"] for row in rows] == [ref.ref_id for ref in refs]
    assert [row["phrase"] for row in rows] == [ref.phrase for ref in refs[16:] + refs[:16]]
    call(evaluate.main, "--bench", "tiny", "--batch-size", 2, *CPU)
    assert re.search(r"\ntiny, batch 2, autocast off, cpu: [\d.]+ images/s", capsys.readouterr().out)


def test_windows_cover_a_scene_without_seams(trained, tmp_path, monkeypatch):
    """With a model that answers each pixel by its brightness, windows give the mask of the whole."""
    for length, tile in ((100, 30), (96, 96), (97, 96), (1000, 7)):
        starts = data.tile_starts(length, tile)
        assert (starts[0], starts[-1] + tile) == (0, length)
        assert all(b - a <= tile / 2 + 1 for a, b in zip(starts, starts[1:]))
    seen = []

    def brightness(self, images, ids, mask, intermediates=None):
        seen.append(images)
        return (images.mean(1, keepdim=True) - 0.5).expand(len(ids), -1, -1, -1)

    monkeypatch.setattr(RSRefSeg, "forward", brightness)
    model = RSRefSeg.from_checkpoint(trained / "last.safetensors")
    squares = np.random.default_rng(0).integers(0, 2, (9, 12), np.uint8) * 255
    scene = Image.fromarray(np.kron(squares, np.ones((24, 24), np.uint8))).convert("RGB")
    masks, scores = model.segment(scene, ["the ship", "the vehicle"], tile=96)
    assert (masks.numpy() == (np.asarray(scene.convert("L")) > 127)).all()
    assert len(seen) == 4 * 5
    assert scores.tolist() == pytest.approx([0.6225] * 2, abs=1e-3)                      # sigmoid(0.5)
    Image.new("RGB", (40, 30)).save(tmp_path / "black.png")
    masks, scores = model.segment(tmp_path / "black.png", "the ship", tile=300)
    assert (masks.shape, masks.any(), scores.tolist(), len(seen)) == ((1, 30, 40), False, [0.0], 21)
    with pytest.raises(ValueError, match=r"empty: \['ship', '!\?'\]"):
        model.segment(scene, ["ship", "!?"])


def test_segment_command(trained, toy, tmp_path, capsys):
    """Every image of a folder, each with its own files. What --json prints is what the mask shows."""
    (tmp_path / "scenes").mkdir()
    names = ["a.jpg", "a.png", "crosscheck.jpg", "water_mask.png"]
    for name, scene in zip(names, sorted((toy / "images").iterdir())):
        Image.open(scene).resize((200, 150)).save(tmp_path / "scenes" / name)
    (tmp_path / "scenes" / "notes.txt").write_text("no image")
    phrases = ["the ship", "A gray storage tank, on the left!", "the crane"]
    arguments = ["--checkpoint", trained / "best.safetensors", "--out", tmp_path / "out", *CPU]
    call(rsrefseg.main, tmp_path / "scenes", *phrases, *arguments, "--json", "--explain")
    printed = capsys.readouterr()
    assert "does not know these words: crane" in printed.err
    records = [json.loads(line) for line in printed.out.splitlines()]
    expected = [(str(tmp_path / "scenes" / name), phrase) for name in names for phrase in phrases]
    assert [(record["image"], record["phrase"]) for record in records] == expected
    files = [record[kind] for record in records for kind in ("mask", "overlay", "explained")]
    assert sorted(files) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert records[4]["mask"].endswith("/a.png_2_a_gray_storage_tank_on_the_left_mask.png")
    for record in records:
        mask = np.asarray(Image.open(record["mask"])) > 0
        assert (mask.shape, mask.sum()) == ((150, 200), record["area"])
        x1, y1, x2, y2 = record["box"] or (0, 0, 0, 0)
        assert mask[y1:y2, x1:x2].sum() == record["area"]
        assert 0.5 < record["score"] <= 1 or not record["area"]
    call(rsrefseg.main, tmp_path / "scenes" / "a.png", "the ship", *arguments, "--tile", 64)
    text = capsys.readouterr().out
    assert re.match("'the ship': .*% of the image, score .* -> ", text)


def test_masks_of_georeferenced_scenes(trained, toy, tmp_path):
    """The mask of a GeoTIFF lies where the image does, as rasterio reads it."""
    rasterio = pytest.importorskip("rasterio")
    place = dict(crs="EPSG:32631", transform=rasterio.Affine(0.43, -0.25, 431000, -0.25, -0.43, 5411000))
    path = tmp_path / "scene.tif"
    with rasterio.open(path, "w", "GTiff", 256, 256, 3, dtype="uint8", **place) as file:
        file.write(np.full((3, 256, 256), 90, np.uint8))
    checkpoint = trained / "last.safetensors"
    call(rsrefseg.main, path, "the ship", "--checkpoint", checkpoint, "--out", tmp_path, *CPU)
    with rasterio.open(tmp_path / "scene.tif_1_the_ship_mask.tif") as mask:
        assert mask.crs == place["crs"]
        assert mask.transform.almost_equals(place["transform"])


def test_bad_input_ends_in_one_line(tmp_path):
    """`data.run` prints the message instead of a traceback, also that of a process that reads images."""
    assert re.fullmatch("error: .*absent.*\n", run("evaluate.py", tmp_path / "absent.pth", fails=True))
    pytest.raises(SystemExit, train.parse_args, ["--phrases", "0"])
    pytest.raises(SystemExit, rsrefseg.main, ["a.png", "ship", "--checkpoint", "a.pth", "--tile", "-5"])

    def main():
        raise ValueError("Caught in DataLoader worker process 0.\nTraceback\nValueError: a.jpg is cut")

    pytest.raises(SystemExit, data.run, main).match("^error: .*a.jpg is cut$")


@pytest.mark.parametrize("name, code", [
    ("siglip", "siglip.SigLIP('tiny').encode_image(torch.rand(1, 3, 500, 400))"),
    ("sam", "sam.SAM('tiny')(torch.rand(2, 3, 96, 96), boxes=torch.tensor([[10, 10, 50, 60.0]] * 2))"),
    ("lora", "lora.inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), ['0'], r=2, alpha=2)"),
    ("data", "data.main(['toy', 'toy', '--train', '1', '--val', '1', '--test', '1'])")])
def test_each_file_works_alone(name, code, tmp_path):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    run("-c", f"import torch, {name}\n{code}", cwd=tmp_path)


def test_readme_is_true(capsys):
    """Its commands and flags exist, its links lead somewhere, the code that it quotes is the code."""
    flags = {}
    for name, main, *command in (
            ("train", train.main), ("evaluate", evaluate.main), ("rsrefseg", rsrefseg.main),
            ("data", data.main, "toy"), ("data", data.main, "check"), ("data", data.main, "download"),
            ("test_rsrefseg", bench_command), ("test_rsrefseg", parity_command)):
        with pytest.raises(SystemExit):
            call(main, *command, "--help")
        flags.setdefault(name, set()).update(re.findall("--[a-z-]+", capsys.readouterr().out))
    readme = (HERE / "README.md").read_text()
    for name, arguments in re.findall(r"(?:python|torchrun).* (\w+)\.py\b([^`\n]*)", readme):
        assert set(re.findall("--[a-z-]+", arguments)) <= flags[name], f"{name}.py{arguments}"
    assert set(re.findall("`(--[a-z-]+)", readme)) <= set.union(*flags.values())
    text = re.sub("^```.*?^```", "", readme, flags=re.S | re.M)
    titles = [re.sub("[^a-z0-9 -]", "", title.lower()) for title in re.findall("^#+ (.*)", text, re.M)]
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert link[1:] in [title.replace(" ", "-") for title in titles] or (HERE / link).is_file(), link
    for name, quoted in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", readme, re.S):
        code = [line.partition("  #")[0].rstrip() for line in (HERE / name).read_text().splitlines()]
        for line in quoted.splitlines():
            assert line.partition("  #")[0].rstrip() in code, f"{name}: {line}"


# ========================================================================================= 4. full size

@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["b", "l --forward"])
def test_parity_at_full_size(arguments):
    """In a process of its own, which gives its memory back."""
    pytest.importorskip("peft")
    print(run("test_rsrefseg.py", "parity", *arguments.split()))


def train_as_ours(theirs, size):
    """Freeze in the assembly what RSRefSeg freezes."""
    trained = {peft_name(name) for name, p in meta_model(size).named_parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trained)


def peak_memory(device):
    """GiB that this process has held at most."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def full_size_parity(size, forward_only, folder):
    """One image of 1024 x 1024, fp32, random weights of a trained model's scale, which the assembly
    saves as the released code does. Returns rows of name, error, tolerance."""
    images, ids, mask, targets = batch(1, 1, 9, 1024)
    theirs = fill(Assembly(size).eval())
    train_as_ours(theirs, size)
    state = theirs.state_dict()
    official = {official_name(key): state[peft_name(key)] for key in meta_model(size).state_dict()}
    torch.save(official, folder / "official.pth")
    for layer in theirs.sam.vision_encoder.layers:         # all attention matrices would take over 20 GB
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    with torch.set_grad_enabled(not forward_only):
        their_logits, stages = theirs(images, ids)
    if not forward_only:
        theirs.loss(their_logits, targets).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    del theirs, state, official
    data.toy_tokenizer().save(str(folder / "tokenizer.json"))
    ours = RSRefSeg.from_checkpoint(folder / "official.pth", folder)
    parameters = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    intermediates = {}
    with torch.set_grad_enabled(not forward_only):
        logits = ours(images, ids, mask, intermediates)
    rows = [(name, relative(intermediates[name], value), 1e-5) for name, value in stages.items()]
    rows.append(("mask logits", relative(logits, their_logits), 1e-5))
    if not forward_only:
        train.segmentation_loss(logits, targets).backward()
        errors = []
        for name, parameter in parameters.items():
            expected = gradients[peft_name(name)].norm()
            if expected and not name.endswith("k_proj.bias"):
                errors.append(abs(parameter.grad.norm() / expected - 1).item())
        rows.append((f"norm of each of {len(errors)} gradients", max(errors), 1e-4))
    print(f"{size}: {sum(p.numel() for p in parameters.values()):,} train, {peak_memory('cpu'):.1f} GiB")
    return rows


def parity_command(argv):
    """Print the README's table. Exit with status 1 if an error is above its tolerance."""
    parser = argparse.ArgumentParser(description="Compare full sizes with transformers and peft.")
    parser.add_argument("sizes", nargs="+", choices=["b", "l"])
    parser.add_argument("--forward", action="store_true", help="leave out the gradients")
    args = parser.parse_args(argv)
    columns = []
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            columns.append(full_size_parity(size, args.forward, Path(folder)))
    print(f"\n| error | at most | {' | '.join(args.sizes)} |\n|---|---{'|---' * len(args.sizes)}|")
    for rows in zip(*columns):
        print(f"| {rows[0][0]} | {rows[0][2]:.0e} | {' | '.join(f'{row[1]:.1e}' for row in rows)} |")
    if not all(error <= tolerance for rows in columns for _, error, tolerance in rows):
        sys.exit("above the tolerance")


def bench_model(name, args):
    """Returns the median seconds of a step, and the peak memory, of "ours" or the reference."""
    if name == "ours":
        model = RSRefSeg(args.size, dtype=rsrefseg.AMP[args.amp] or torch.float32, init=False)
        for module in model.modules():
            module.checkpoint_activations = args.checkpoint_activations
    else:
        model = Assembly(args.size, dropout=0.1)
        train_as_ours(model, args.size)
    fill(model).to(args.device).train(args.mode == "train")
    images, ids, mask, targets = [x.to(args.device) for x in batch(args.batch, args.phrases, 10, 1024)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    seconds = []
    for _ in range(4):                                                      # the first does not count
        start = time.perf_counter()
        with torch.set_grad_enabled(args.mode == "train"), rsrefseg.autocast(args.device, args.amp):
            if name == "ours":
                logits = model(images, ids, mask)
            else:
                logits, _ = model(images.repeat_interleave(args.phrases, 0), ids)
        if args.mode == "train":
            train.segmentation_loss(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits.sum().item()                                                 # waits for the device
        seconds.append(time.perf_counter() - start)
    return np.median(seconds[1:]), peak_memory(args.device)


# Matrix products of a step with one image and one phrase, counted by FlopCounterMode on the assembly.
TFLOP = {("b", "infer"): 1.683, ("b", "train"): 3.662, ("l", "infer"): 3.731, ("l", "train"): 7.901}


def bench_command(argv):
    """Ours, the reference and the floor in one run, a process per model in turn."""
    parser = argparse.ArgumentParser(description="Time and memory beside transformers and peft.")
    add = parser.add_argument
    add("size", choices=["b", "l"])
    add("mode", choices=["infer", "train"])
    add("amp", choices=list(rsrefseg.AMP), help="autocast type")
    add("--batch", type=int, default=1, help="images per step")
    add("--phrases", type=int, default=1, help="phrases per image")
    add("--device", default="cpu")
    add("--checkpoint-activations", action="store_true")
    args = parser.parse_args(argv)
    results = {}
    for name in ("ours", "reference"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[name] = pool.apply(bench_model, (name, args))
    a = torch.randn(4096, 4096, device=args.device).to(rsrefseg.AMP[args.amp] or torch.float32)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    rate = 2 * 4096**3 / min(seconds)
    flops = 1e12 * args.batch * TFLOP[args.size, args.mode]
    print(f"{' '.join(argv)}, a step:")
    for name, (seconds, memory) in results.items():
        print(f"  {name:10} {seconds:8.3f} s {memory:8.2f} GiB")
    print(f"  floor      {flops / rate:8.3f} s = {flops / 1e12:.2f} TFLOP at {rate / 1e12:.2f} TFLOP/s")
    (ours, our_memory), (theirs, their_memory) = results.values()
    print(f"  reference / ours: {theirs / ours:.2f} in time, {their_memory / our_memory:.2f} in memory; "
          f"ours / floor: {ours * rate / flops:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["parity"]:
        parity_command(sys.argv[2:])
    elif sys.argv[1:2] == ["bench"]:
        bench_command(sys.argv[2:])
