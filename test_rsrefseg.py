"""`python -m pytest` takes at most 5 minutes on two cores; `-s` shows the measured errors; `-m ""` adds
full size and more ways to stop a run. In order: formulas and files; parity with transformers and peft
in outputs and gradients; training and the other commands; full size, which is two commands too:
    python test_rsrefseg.py parity b [l]
    python test_rsrefseg.py bench b infer|train bf16          (--help lists its flags)
"""
import argparse
import copy
import dataclasses
import functools
import hashlib
import http.server
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path
from unittest.mock import Mock, create_autospec

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
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
SMALL_SIGLIP = siglip.CONFIGS["small"] = SigLIPConfig(
    width=48, layers=3, heads=6, mlp=96, image_size=70, patch=14, vocab=120)
SMALL_SAM = sam.CONFIGS["small"] = SAMConfig(
    width=32, layers=4, heads=2, global_layers=(1, 3), image_size=128, window=3, prompt_width=32,
    decoder_mlp=64)
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
            tensor.copy_(values - int(name.endswith("logit_bias")))
    return model

def small_model(lora_rank=4, **settings):
    return fill(RSRefSeg("small", lora_rank, **settings))

def meta_model(size, **settings):                                     # at full size without memory
    with torch.device("meta"):
        return RSRefSeg(size, **settings)

def batch(images=2, phrases=1, length=7, side=SMALL_SAM.image_size):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 120, (images * phrases, length), generator=generator)
    ids[:, -1] = siglip.EOS
    coarse = torch.rand(len(ids), 1, 4, 4, generator=generator) > 0.5
    targets = F.interpolate(coarse.float(), size=(side, side)).bool()
    return torch.rand(images, 3, side, side, generator=generator), ids, ids > 0, targets

def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()

def check(name, ours, theirs, tolerance=1e-4):
    error = relative(ours.detach(), theirs.detach())
    print(f"  {name:42} relative error {error:.1e} (at most {tolerance:.0e})")
    assert ours.shape == theirs.shape and error <= tolerance, f"{name}: {error:.2e}"

def call(main, *arguments):                                # in this process
    main([str(argument) for argument in arguments])

def run(*arguments, cwd=HERE, fails=False):
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr

def rejects(message, function, *arguments, error=data.InputError):
    pytest.raises(error, function, *arguments).match(f"(?s){message}")

@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)     # two that wait for each other lose to any other program
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.manual_seed(0)

@pytest.fixture
def small(tmp_path):
    for name, tower in (("siglip", SigLIP), ("sam", SAM)):
        (tmp_path / name).mkdir()
        save_file(fill(tower("small")).state_dict(), tmp_path / name / "model.safetensors")
    data.toy_tokenizer().save(str(tmp_path / "siglip" / "tokenizer.json"))
    model = RSRefSeg.from_pretrained("small", tmp_path / "siglip", tmp_path / "sam", lora_rank=4)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    trained = {key: x for key, x in small_model().state_dict().items() if key not in frozen}
    model.load_state_dict(trained, strict=False)
    return model.eval()

# ================================================================================= 1. formulas and files
def test_metrics_by_hand():
    # Target and found: 1100 1000 (not above 0.5), 1111 1111, 0000 0000 (1), 1000 0111, 1111 1110.
    pairs = [(1, 2), (4, 4), (0, 0), (0, 4), (3, 4)]
    result = evaluate.metrics([dict(intersection=i, union=u) for i, u in pairs])
    assert result["gIoU"] == pytest.approx(100 * (0.5 + 1 + 1 + 0 + 0.75) / 5)
    assert result["cIoU"] == pytest.approx(100 * 8 / 14)
    assert [result[f"Pr@{x}"] for x in evaluate.THRESHOLDS] == pytest.approx([60, 60, 60, 40, 40])
    assert (result["samples"], result["both_empty"]) == (5, 1)

def test_toy_tokenizer():
    """Saved after use, it may pad, cut, or lack the EOS: the ids are the same."""
    tokenizer = data.toy_tokenizer()
    texts = ["The ship.", "A  RED, ship on the left", "ship " * 100, ""]
    ids, mask = siglip.tokenize(tokenizer, texts)
    assert (ids.shape, mask.sum(1).tolist()) == ((4, 64), [3, 7, 64, 1])
    assert ids[torch.arange(4), mask.sum(1) - 1].tolist() == [siglip.EOS] * 4
    assert tokenizer.decode(ids[1][mask[1]].tolist()) == "a red ship on the left </s>"
    tokenizer.enable_padding(length=64, pad_id=0)
    tokenizer.enable_truncation(3)
    for lacking in ({}, dict(post_processor=None)):
        saved = json.dumps(json.loads(tokenizer.to_str()) | lacking)
        again = siglip.tokenize(rsrefseg.Tokenizer.from_str(saved), texts)
        assert torch.equal(again[0], ids) and torch.equal(again[1], mask)

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

def released_schedule(n, epochs, warmup, period):
    """The released rates from torch's schedulers: linear per iteration, then a cosine per epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 1e-4)
    linear = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup * n - 1)
    rates = []
    for step in range(1, epochs * n + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        if step < warmup * n:
            linear.step()
        elif step == warmup * n:
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period, 1e-7)
        elif step % n == 0:
            cosine.step()
    return rates

@pytest.mark.filterwarnings("ignore:Detected call")
@pytest.mark.parametrize("n, epochs, warmup", [(7, 20, 5)])
def test_schedule_and_defaults(monkeypatch, n, epochs, warmup):
    """The paper's. Rounded down to whole epochs, and with 5 more of them, the schedule is the released
    one. As it is, it equals one whose period ends with the run, at each epoch's start."""
    expected = dict(epochs=200, total_batch=32, lr=1e-4, weight_decay=0.05, warmup_epochs=5, clip=0,
                    lora_rank=16, lora_alpha=16, lora_dropout=0.1, phrases_per_image=1, map_loss=0,
                    text_lora=True, down_blocks=2, prompts="both", branches="both")
    assert vars(train.parse_args(["--sam", "b"])).items() >= expected.items()
    exact = functools.partial(pytest.approx, rel=1e-9, abs=0)
    longer = train.parse_args(["--epochs", str(epochs + warmup)])
    steps = [step if step < warmup * n else step // n * n for step in range(epochs * n)]
    rounded = [train.learning_rate(step, n, longer) for step in steps]
    assert rounded == exact(released_schedule(n, epochs, warmup, epochs))
    args = train.parse_args(["--epochs", str(epochs)])
    starts = [train.learning_rate(step, n, args) for step in range(0, epochs * n, n)]
    assert starts == exact(released_schedule(n, epochs, warmup, epochs - warmup)[::n])
    for supported, amp in ((True, "bf16"), (False, "fp16")):          # before Ampere bf16 is emulated
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        assert rsrefseg.default_amp("cuda:0") == train.parse_args(["--device", "cuda"]).amp == amp
        assert train.parse_args(["--device", "cpu"]).amp == "off"

def test_a_phrase_gives_the_same_mask_in_any_batch():
    model = small_model().eval()
    images, ids, _, _ = batch(2, 3, 12)
    lengths = torch.tensor([5, 12, 8, 12, 3, 9])
    mask = torch.arange(12) < lengths[:, None]
    ids = ids.scatter(1, lengths[:, None] - 1, siglip.EOS).masked_fill(~mask, siglip.EOS)
    together = model(images, ids, mask).logits
    for i, n in enumerate(lengths):
        alone = model(images[i // 3][None], ids[i:i + 1, :n], mask[i:i + 1, :n]).logits
        check(f"phrase {i} alone and in a batch", alone, together[i:i + 1], 1e-5)

def to_fake_cuda(model):
    """Give a model on the meta device, within FakeTensorMode, tensors on CUDA without values."""
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
                    table[name] = nn.Parameter(new, old.requires_grad) if old.requires_grad else new

@pytest.mark.parametrize("size, amp, trainable", [
    ("b", "bf16", 16_478_252), ("l", "fp16", 20_414_508), ("b", "off", 16_478_252)])
def test_full_size_on_a_fake_cuda_device(size, amp, trainable, monkeypatch):
    """Under the real autocast("cuda"), without values. A tensor left on the CPU raises, as on a GPU."""
    if torch.__version__ < "2.7":
        pytest.skip("before 2.7 PyTorch asks the driver also for fake CUDA tensors")
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    model = meta_model(size, dtype=rsrefseg.AMP[amp] or torch.float32).train()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    with FakeTensorMode():
        to_fake_cuda(model)
        images = torch.empty(2, 3, 1024, 1024, dtype=torch.uint8, device="cuda")
        targets = torch.empty(6, 1, 1024, 1024, dtype=torch.bool, device="cuda")
        ids = torch.empty(6, 9, dtype=torch.int64, device="cuda")
        with rsrefseg.autocast("cuda", amp):
            output = model(images / 255, ids, ids > 0)
        loss = train.segmentation_loss(output.logits, targets)
        assert (output.logits.shape, output.logits.dtype) == ((6, 1, 256, 256), torch.float32)
        assert {x.device.type for x in (*output, loss)} == {"cuda"}
        model.sam.shared_image_embedding.positional_embedding = torch.empty(2, 128)     # a forgotten one
        with pytest.raises(RuntimeError, match="device"), rsrefseg.autocast("cuda", amp):
            model(images / 255, ids, ids > 0)

@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("settings", [
    dict(), dict(prompts="sparse"), dict(prompts="dense"), dict(branches="local"), dict(text_lora=False),
    dict(branches="global"), dict(prompts="sparse", branches="local"), dict(down_blocks=3)], ids=str)
def test_what_can_get_a_gradient_trains(settings, rank):
    """Also in the ablations: what they leave out gets none."""
    model = small_model(rank, lora_dropout=0.0, **settings)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if rank == 0:
        model.requires_grad_(True)
    images, ids, mask, targets = batch()
    train.segmentation_loss(model(images, ids, mask).logits, targets).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert trainable == set(gradients)
    zero = [name for name, gradient in gradients.items() if not gradient.any()]
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
        train.segmentation_loss(model(images, ids, mask).logits, targets).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(calls) == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients))

@pytest.mark.parametrize("module, model, unused", [
    (siglip, SigLIP, "vision_model.head.probe"),
    (sam, SAM, "prompt_encoder.shared_embedding.positional_embedding")])
def test_weight_files_are_compared_exactly(tmp_path, module, model, unused):
    """Half precision becomes fp32, one unused tensor is known, and whatever else differs is named."""
    source = fill(model("small")).state_dict()
    path = tmp_path / "model.safetensors"
    target = model("small")
    for dtype in (torch.float32, torch.float16):
        stored = {key: tensor.to(dtype) for key, tensor in source.items()}
        save_file(stored | {unused: torch.zeros(3)}, path)
        module.load_weights(target.to("meta"), path)
        loaded = target.state_dict()
        assert all(torch.equal(tensor.float(), loaded[key]) for key, tensor in stored.items())
    first, *others = source
    less = {key: source[key] for key in others}
    for wrong, name in ((source | {"stray": torch.zeros(2)}, "stray"), (less, first),
                        (less | {first: torch.zeros(5, 5)}, first)):
        save_file(wrong, path)
        rejects(f"model.safetensors .*{name}", module.load_weights, target, path, error=ValueError)
    path.write_bytes(path.read_bytes()[:-100])
    rejects("model.safetensors", module.load_weights, target, path, error=ValueError)

def test_types_of_images_and_labels():
    """What would be garbage without an error: integers as pixels. True and False are labels 1 and 0."""
    model = fill(SAM("small")).eval()
    for encode, side in ((model.encode_image, 128), (SigLIP("small").encode_image, 70)):
        rejects("255", encode, torch.zeros(1, 3, side, side, dtype=torch.uint8), error=ValueError)
    images, _, _, _ = batch(2)
    points = 128 * torch.rand(4, 2, 2)                                # two prompts for each image
    labels = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]])
    masks, _ = model(images, points, labels)
    assert torch.equal(masks, model(images, points, labels.bool())[0])
    check("SAM, second prompt", masks[3:], model(images[1:], points[3:], labels[3:])[0], 1e-5)
    rejects("labels are 1", model, images, points, labels + 1, error=ValueError)

META_NAMES = (   # our name -> the name in Meta's sam_vit_*.pth, regular expressions in this order
    ("shared_image_embedding.positional_embedding",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    ("vision_encoder.layers", "image_encoder.blocks"), ("vision_encoder", "image_encoder"),
    ("patch_embed.projection", "patch_embed.proj"), ("neck.conv1", "neck.0"), ("neck.conv2", "neck.2"),
    ("neck.layer_norm1", "neck.1"), ("neck.layer_norm2", "neck.3"), ("point_embed", "point_embeddings"),
    ("mask_embed.conv1", "mask_downscaling.0"), ("mask_embed.layer_norm1", "mask_downscaling.1"),
    ("mask_embed.conv2", "mask_downscaling.3"), ("mask_embed.layer_norm2", "mask_downscaling.4"),
    ("mask_embed.conv3", "mask_downscaling.6"), ("upscale_conv1", "output_upscaling.0"),
    ("upscale_layer_norm", "output_upscaling.1"), ("upscale_conv2", "output_upscaling.3"),
    (r"(mlps\..|head)\.layers\.0", r"\1.layers.1"), (r"(mlps\..|head)\.proj_in", r"\1.layers.0"),
    (r"(mlps\..|head)\.proj_out", r"\1.layers.2"), ("layer_norm", "norm"))

def test_metas_own_files(small, tmp_path):
    """In torch's zip format and in the older one. The names inside decide, not the file's."""
    source = fill(SAM("small")).state_dict()
    state = {}
    for name, tensor in source.items():
        for ours, theirs in META_NAMES:
            name = re.sub(ours, theirs, name)
        state[name] = tensor
    for path, as_zip in ((tmp_path / "sam_vit_b_01ec64.pth", True), (tmp_path / "sam.bin", False)):
        torch.save(state, path, _use_new_zipfile_serialization=as_zip)
        model = RSRefSeg.from_pretrained("small", tmp_path / "siglip", path, lora_rank=0)
        loaded = model.sam.state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in source.items())
        path.write_bytes(path.read_bytes()[:-5000])
        rejects(f"{path} is damaged", RSRefSeg.from_pretrained, "small", tmp_path / "siglip", path)

def test_checkpoint_round_trip(small, tmp_path):
    """Without frozen towers, or with towers from no file, it holds all. SigLIP 2 has other tokens."""
    load = functools.partial(RSRefSeg.from_pretrained, "small", sam_weights=tmp_path / "sam")
    settings = dict(text_lora=False, down_blocks=1, prompts="sparse", branches="global")
    ablated = load(tmp_path / "siglip", lora_rank=2, **settings)
    shutil.copytree(tmp_path / "siglip", tmp_path / "siglip_2")
    larger = SigLIP(dataclasses.replace(SMALL_SIGLIP, vocab=150))
    save_file(fill(larger).state_dict(), tmp_path / "siglip_2" / "model.safetensors")
    unfrozen = load(tmp_path / "siglip_2", lora_rank=0)
    assert unfrozen.settings["vocab"] == 150
    whole = small_model()
    whole.tokenizer = data.toy_tokenizer()
    images, ids, mask, _ = batch()
    path = tmp_path / "x.safetensors"
    for model in (whole, unfrozen, ablated, small):
        model.eval().save(path, step=3)
        again = RSRefSeg.from_checkpoint(path, *[] if model.tower_sources else ["absent", "absent"])
        assert again.settings == model.settings
        assert torch.equal(again(images, ids, mask).logits, model(images, ids, mask).logits)
    metadata, tensors = rsrefseg.read_checkpoint(path)
    frozen = {name for name, p in small.named_parameters() if not p.requires_grad}
    assert (metadata["step"], set(tensors)) == (3, set(small.state_dict()) - frozen)
    # Frozen weights in the autocast type are the bits that autocast makes of fp32. What trains is fp32.
    half = RSRefSeg.from_checkpoint(path, dtype=torch.bfloat16)
    assert half.sam.vision_encoder.layers[0].mlp.lin1.base.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half(images, ids, mask).logits, again(images, ids, mask).logits)

def peft_name(name):
    name = re.sub(r"(^|\.)base\.", r"\1base_layer.", name)
    return re.sub(r"(^|\.)([AB])\.weight$", r"\1lora_\2.default.weight", name)

def official_name(name):
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
    unused = {"clip_vision_encoder.base_model.model.model.head.probe": torch.zeros(3),
              "sam_prompt_encoder.model.shared_embedding.positional_embedding": torch.zeros(2, 16)}
    return unused | {official_name(key): tensor for key, tensor in model.state_dict().items()}

def test_checkpoints_of_the_released_code(small, tmp_path):
    state = official_state(small)
    images, ids, mask, _ = batch()
    path = tmp_path / "x.pth"
    parallel = {f"module.{key}": tensor for key, tensor in state.items()}
    half = {key: x.half() if x.is_floating_point() else x for key, x in state.items()}
    expected = small(images, ids, mask).logits
    for content in (state, {"state_dict": state}, {"module": state, "epoch": 3}, parallel, half):
        torch.save(content, path)
        model = RSRefSeg.from_checkpoint(path, tmp_path / "siglip")
        assert relative(model(images, ids, mask).logits, expected) <= (1e-2 if content is half else 0)
    stray = torch.zeros(1)
    less = {key: tensor for key, tensor in state.items() if "lora_B" not in key}
    misfit = {key: tensor[:1] if "lora_B" in key else tensor for key, tensor in state.items()}
    for wrong, message in ((state | dict(stray=stray), ": 1 tensors are .*stray"),
                           ([state], "no dict of"), (less, f": {len(state) - len(less)} tensors are"),
                           (misfit, "size mismatch"),
                           (dict(stray=stray), "neither .* nor one of the released"),
                           (dict(a=argparse.Namespace()), "argparse.Namespace.*weights_only=False")):
        torch.save(wrong, path)
        rejects(f"x.pth.*{message}", RSRefSeg.from_checkpoint, path, tmp_path / "siglip")
    rejects("siglip.*DeepSpeed", RSRefSeg.from_checkpoint, tmp_path / "siglip")           # a folder

@pytest.mark.parametrize("size", ["b", "l"])
def test_official_keys_at_full_size(size):
    """Every name and shape in the released code's checkpoints, but for two parts that it never uses."""
    folder = os.environ.get("RSREFSEG_OFFICIAL_KEYS") or pytest.skip("RSREFSEG_OFFICIAL_KEYS is not set")
    lines = Path(folder, f"official_keys_{size}.tsv").read_text().splitlines()[1:]
    state = {key: torch.empty([int(n) for n in shape.split(",") if n], device="meta")
             for key, shape, _ in (line.split("\t") for line in lines)}
    metadata, tensors = rsrefseg.convert_official(state, "keys")
    assert metadata["settings"].items() >= dict(sam=size, lora_rank=16).items()
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    assert shapes == {key: tensor.shape for key, tensor in meta_model(size).state_dict().items()}

class Hub(http.server.SimpleHTTPRequestHandler):
    """Answers as Hugging Face does for the folders of `directory`: /user/name/resolve/REVISION/FILE."""

    def translate_path(self, path):
        user, name, _, self.revision, file = path.strip("/").split("/")
        return str(Path(self.directory, user, name, file))

    def end_headers(self):
        self.send_header("X-Repo-Commit", self.revision if len(self.revision) == 40 else "2" * 40)
        self.send_header("ETag", f'"{hashlib.sha1(self.path.encode()).hexdigest()}"')
        super().end_headers()

def test_weights_and_checkpoints_by_name(small, tmp_path, monkeypatch):
    """From a local stand-in for Hugging Face, at the pinned revision; then from the cache alone."""
    program = """
import sys, time, rsrefseg, test_rsrefseg
rsrefseg.HUB.update(siglip=("google/siglip", "1" * 40), small=("facebook/sam", "1" * 40))
start = time.time()
try:
    print(rsrefseg.RSRefSeg.from_checkpoint(sys.argv[1]).prompter.project.bias.sum().item())
except rsrefseg.InputError as error:
    print("refused:", error, time.time() - start < 10)
"""
    hub = tmp_path / "hub"
    small.tower_sources = dict(siglip="google/siglip", sam_weights="facebook/sam")
    (hub / "user" / "name").mkdir(parents=True)
    small.save(hub / "user" / "name" / "best.safetensors")
    shutil.copytree(tmp_path / "siglip", hub / "google" / "siglip")
    shutil.copytree(tmp_path / "sam", hub / "facebook" / "sam")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, directory=hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    found = str(small.prompter.project.bias.sum().item())
    assert found in run("-c", program, "user/name")
    server.shutdown()
    server.server_close()
    assert found in run("-c", program, "user/name")
    refused = "refused: best.safetensors of user/other was not down.*HF_ENDPOINT.*Connect.* True"
    assert re.search(refused, run("-c", program, "user/other"))

TOP = dict(size=[40, 60], counts=[0, 3, 2397])                    # the first three pixels of column 0
DOT = dict(size=[40, 60], counts=[2399, 1])                       # the last pixel
RAMP = np.linspace(500, 4500, 600).astype(np.int32).reshape(20, 30)
NIGHT = 9000 * np.int32(np.eye(200, 200)[:, :1])                  # one lamp: black and white
FOLDERS = dict(rrsisd=("images/rrsisd/JPEGImages", "rrsisd"), refsegrs=("images", "masks"),
               risbench=("img_rgb", "mask"), risbench_lines=("img_rgb", "mask"))
GOOD = dict(image="a.png", mask="a.png", phrase="the ship", split="train")
OTHERS = [dict(GOOD, split="val"), dict(GOOD, split="test")]

def encode_rle(mask):
    coco = pytest.importorskip("pycocotools.mask")
    return coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()

def test_run_lengths_equal_pycocotools():
    for counts in ("132", [1, 3, 2]):              # columns 01 | 11 | 00: one 0, three 1s, two 0s
        found = data.decode_segmentation(dict(size=[2, 3], counts=counts))
        assert found.tolist() == [[False, True, False], [True, True, False]]
    for counts in ("", "13", "1320", "13\x7f", "13o", "o", [], [1, 3], [1, 3, 3], [1, 6, -1]):
        rejects("run lengths", data.decode_segmentation, dict(size=[2, 3], counts=counts))
    rng = np.random.default_rng(1)
    for _ in range(200):
        height, width = rng.integers(1, 90, 2)
        mask = data.resize_mask(rng.random(rng.integers(1, 12, 2)) > 0.5, height, width)
        mask ^= rng.random((height, width)) > rng.choice([0.9, 0.99, 1.0])
        segmentation = dict(size=[height, width], counts=encode_rle(mask))
        assert (data.decode_segmentation(segmentation) == mask).all()

@pytest.mark.parametrize("segmentation, pixels", [
    (TOP, 3), ([TOP, DOT], 4), ([TOP, TOP], 3), ([[TOP], [DOT]], 4), (None, 0), ([], 0), ("132", 0),
    (dict(size=[40, 60]), 0), ([[10.0, 20, 30, 20, 30, 25]], "polygon"), ([1, 2, 3], "polygon"),
    (dict(TOP, counts=[0.5, 2399.5]), 0), ([dict(TOP, size=[20, 120]), DOT], 0)], ids=str)
def test_segmentations_of_coco(segmentation, pixels):
    ref = data.Ref(7, "train", Path("x.png"), "a ship", "-", segmentation)
    if pixels in (0, "polygon"):
        rejects(rf"^mask of ref_id 7 \(x.png\).*{pixels or ''}", data.read_mask, ref)
    else:
        mask = data.read_mask(ref)
        assert (mask.shape, mask.dtype, mask.sum()) == ((40, 60), bool, pixels)

def test_images_and_masks_of_every_mode(tmp_path):
    """A mask is what is above 0 in any channel but transparency. Files that are no images are named."""
    ramp = np.arange(600).reshape(20, 30).astype(np.uint8)
    rgb = Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1))
    grey = rgb.convert("L").convert("RGB")
    path = tmp_path / "x.png"
    for mode, expected in (("RGB", rgb), ("RGBA", rgb), ("L", grey), ("LA", grey)):
        rgb.convert(mode).save(path)
        assert data.read_image(path).tobytes() == expected.tobytes()
    on = np.array([[0, 0, 1], [2, 0, 255]], np.uint8)
    zero = on * 0
    images = [Image.fromarray(x) for x in (
        on, on > 0, on.astype(np.uint16) * 256, on.astype(np.int32), on.astype(np.float32) / 300,
        np.stack([zero, zero, on], -1), np.stack([on, zero, zero, zero], -1), np.stack([on, zero], -1),
        np.uint8(on == 0))]
    images[-1].putpalette([0, 0, 9, 0, 0, 0])                         # index 0 is blue, 1 is black
    for image in images:
        image.save(tmp_path / "x.tif")
        mask = data.read_mask(data.Ref(0, "train", path, "a", "-", tmp_path / "x.tif"))
        assert (mask.dtype, mask.tolist()) == (bool, (on > 0).tolist()), image.mode
    wide = b"P6 1 1 65535\n" + bytes(6)
    for name, content, message in (("e.JPG", b"", "identify"), ("._a.png", wide, "16 bits")):
        (tmp_path / name).write_bytes(content)
        rejects(message, data.read_image, tmp_path / name)
    assert [path.name for path in data.image_files(tmp_path)] == ["e.JPG", "x.png", "x.tif"]
    Image.effect_noise((64, 64), 90).save(tmp_path / "x.tif", compression="tiff_lzw")
    damaged = (tmp_path / "x.tif").read_bytes()
    (tmp_path / "x.tif").write_bytes(damaged[:2000] + bytes(40) + damaged[2040:])
    rejects("x.tif: .*-2", data.read_image, tmp_path / "x.tif")
    rejects("No such file", data.read_image, tmp_path / "absent.png")

@pytest.mark.parametrize("values, border, colour", [
    (RAMP, -9999, 0), (RAMP, 65535, 255), (RAMP, math.nan, 0), (RAMP, None, 0), (NIGHT, None, 0)])
@pytest.mark.parametrize("tag", ["", "None", "-9999 ", "1,5"])
def test_grey_of_16_bits_is_stretched(tmp_path, values, border, colour, tag):
    """By its own percentiles, whatever a tag says, without a border of "no data"."""
    low, high = (0, 9000) if values is NIGHT else np.percentile(values, (2, 98))
    stretched = np.clip((values - low) * 255 / (high - low), 0, 255)
    margin = 0 if border is None else 3
    values = np.pad(values.astype(np.float32), ((0, 0), (margin, 0)), constant_values=border or 0)
    Image.fromarray(values).save(tmp_path / "x.tif", tiffinfo={42113: tag})
    found = np.asarray(data.read_image(tmp_path / "x.tif"))[..., 0]
    assert abs(found[:, margin:] - stretched).max() <= 1
    assert (found[:, :margin] == colour).all()

@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "tif"])
@pytest.mark.parametrize("orientation, mirrored, turns", [
    (1, 0, 0), (2, 1, 0), (3, 0, 2), (4, 1, 2), (5, 1, 1), (6, 0, -1), (7, 1, -1), (8, 0, 1)])
def test_images_as_every_viewer_shows_them(tmp_path, suffix, orientation, mirrored, turns):
    """Files, masks and PIL images; of a TIFF the stored rows and columns, however often it is read."""
    blocks = np.zeros((16, 32, 3), np.uint8)
    blocks[:8, :16] = 240
    shown = np.rot90(blocks[:, ::-1] if mirrored else blocks, turns)
    expected = blocks if suffix == "tif" else shown
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(blocks).save(path, exif=exif, lossless=True)
    with Image.open(path) as image:
        for found in (data.read_image(path), data.to_rgb(image), data.to_rgb(image)):
            assert found.size == expected.shape[1::-1]
            assert abs(np.asarray(found, int) - expected).max() < 16
    mask = data.read_mask(data.Ref(0, "train", path, "a", "-", path))
    assert suffix == "jpg" or (mask == (expected[..., 0] > 0)).all()

@pytest.mark.parametrize("driver, count, dtype, options, message", [
    ("PNG", 2, "uint16", {}, "colour of 16 bits"), ("PNG", 3, "uint16", {}, "colour of 16 bits"),
    ("PNG", 1, "uint16", {}, None),
    ("GTiff", 3, "uint16", dict(photometric="RGB"), "colour of 16 bits"),
    ("JP2OpenJPEG", 3, "uint16", {}, "colour of 16 bits"), ("GTiff", 5, "uint8", {}, "up to four"),
    ("GTiff", 1, "float64", {}, "up to four"), ("GTiff", 4, "uint8", dict(photometric="RGB"), None)])
def test_what_pillow_does_not_read(tmp_path, driver, count, dtype, options, message):
    """One error that names the file and the cure, never black in silence."""
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "x.tif"
    with rasterio.open(path, "w", driver, 5, 4, count, dtype=dtype, **options) as file:
        file.write(np.arange(20 * count).reshape(count, 4, 5).astype(dtype))
    ref = data.Ref(0, "val", path, "a", "-", path)
    for read, source in ((data.read_image, path), (data.read_mask, ref)):
        if message is None:
            assert np.asarray(read(source)).shape[:2] == (4, 5)
        else:
            rejects(f"(?=.*{message})(?=.*{path}).*gdal_translate -", read, source)

@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy")
    call(data.main, "toy", root, "--train", 24, "--val", 8, "--test", 8, "--seed", 5)
    return root

def test_toy_scenes_and_items(toy, tmp_path, capsys):
    """Scenes follow from their seed, objects do not overlap, masks are stored. An item has k phrases."""
    image, rows = data.toy_scene(5, 0)
    assert image.tobytes() == data.toy_scene(5, 0)[0].tobytes()
    assert np.sum([item.mask for item, _ in rows], 0).max() == 1
    for (item, phrase), ref in zip(rows, data.read_refs(toy)[1]):
        assert (ref.phrase, ref.category, ref.split) == (phrase, item.category, "train")
        assert data.OBJECTS[item.category][0] in phrase
        assert (data.read_mask(ref) == item.mask).all()
    one, three, four = [data.RefSegDataset(toy, "val", 96, phrases=k) for k in (1, 3, 4)]
    items = data.collate([four[0], four[1]])
    assert (items["images"].shape, items["images"].dtype) == ((2, 3, 96, 96), torch.uint8)
    assert (items["masks"].shape, items["masks"].dtype) == ((8, 1, 96, 96), torch.bool)
    assert (len(one), len(four), items["refs"]) == (32, 8, one.refs[:8])
    assert all(torch.equal(one[i]["masks"][0], items["masks"][i]) for i in range(8))
    assert [[one.refs.index(ref) for ref in refs] for refs in three.items[:2]] == [[0, 1, 2], [3, 0, 1]]
    call(data.main, "toy", tmp_path, "--train", 2, "--val", 1, "--test", 0)
    assert f"wrote {tmp_path}: 8 phrases for train, 4 for val, 0 for test" in capsys.readouterr().out
    rejects("already holds", data.write_toy, tmp_path)

def write_format(root, dataset, refs):
    """Write rows of the toy set as another data set's files. Returns the contents of RRSIS-D's lists."""
    images, masks = [root / folder for folder in FOLDERS[dataset]]
    images.mkdir(parents=True)
    masks.mkdir()
    rows = []
    instances = dict(categories=[dict(id=7, name="ship")], annotations=[])
    for i, ref in enumerate(refs):
        mask = data.read_mask(ref)
        segmentation = [dict(size=mask.shape, counts=encode_rle(mask))]
        instances["annotations"].append(dict(id=100 + i, segmentation=segmentation))
        rows.append(dict(ref_id=i, ann_id=100 + i, category_id=7, split=ref.split,
                         file_name=ref.image.name, sentences=[dict(sent=ref.phrase)]))
        name = f"train_{i}.{'tif' if dataset == 'refsegrs' else 'png'}"    # RISBench says train always
        shutil.copy(ref.image, images)
        Image.open(ref.image).save(images / name)
        Image.fromarray(mask).save(masks / name)
        file = f"output_phrase_{ref.split}.txt"
        line = f"{name.removesuffix('.tif')} {ref.phrase}"
        if dataset == "risbench_lines":
            file = f"{ref.split}.jsonl"
            line = json.dumps(dict(split=ref.split, sent=f" {ref.phrase}  ", file_name=name,
                                   segmentation=segmentation, category_name=ref.category))
        with open(root / file, "a") as lines:
            lines.write(f"{line}\n")
    if dataset == "rrsisd":
        write_lists(root, rows, instances)
    return rows, instances

def write_lists(root, rows, instances):
    (root / "rrsisd" / "refs(unc).p").write_bytes(pickle.dumps(rows))
    (root / "rrsisd" / "instances.json").write_text(json.dumps(instances))

@pytest.mark.parametrize("dataset", FOLDERS)
def test_other_data_sets(toy, tmp_path, dataset, capsys):
    refs = [ref for split in data.SPLITS for ref in data.RefSegDataset(toy, split, 96).refs[:3]]
    write_format(tmp_path, dataset, refs)
    assert data.read_refs(tmp_path)[0] == dataset.removesuffix("_lines")
    items = [item for split in data.SPLITS for item in data.RefSegDataset(tmp_path, split, 96)]
    for item, ref in zip(items, refs, strict=True):
        found = item["refs"][0]
        category = dict(rrsisd="ship", risbench_lines=ref.category).get(dataset, "-")
        assert (found.phrase, found.split, found.category) == (ref.phrase, ref.split, category)
        assert (item["originals"][0] == data.read_mask(ref)).all()
        assert torch.equal(item["image"], data.image_tensor(data.read_image(ref.image), 96))
    call(data.main, "check", tmp_path)
    printed = capsys.readouterr().out
    assert re.fullmatch(r"\w+: {('\w+': 3,? ?){3}} phrases.*\nwrote .*\n", printed)

def test_lists_of_rrsisd(toy, tmp_path):
    """Every sentence is a row. A list that is damaged, or that would run code, is named."""
    rows, instances = write_format(tmp_path, "rrsisd", data.read_refs(toy)[1][:2])
    rows[0]["sentences"] += [dict(sent=" a second "), dict(sent="?")]
    del rows[1]["category_id"]
    write_lists(tmp_path, rows, instances)
    _, refs, problems = data.read_refs(tmp_path)
    assert [(ref.ref_id, ref.category) for ref in refs] == [(0, "ship"), (0, "ship"), (1, "-")]
    assert (refs[1].phrase, problems) == ("a second", ["refs(unc).p row 1: the phrase '?' has no words"])
    del instances["annotations"][1]["segmentation"]
    write_lists(tmp_path, rows, instances)
    assert "row 2: the object has no segmentation" in data.read_refs(tmp_path)[2][1]
    for file, content, message in (
            ("instances.json", b"{", "fetch it again"), ("instances.json", b"{}", "fetch it again"),
            ("refs(unc).p", b"\x80", "fetch it again"),
            ("refs(unc).p", pickle.dumps(print), "would call builtins.print")):
        (tmp_path / "rrsisd" / file).write_bytes(content)
        rejects(f"{re.escape(file)}: .* {message}", data.check, tmp_path)

def write_own(root, rows):
    """Write phrases.jsonl, an image and its mask, half of which is black."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    Image.new("RGB", (8, 8), "red").save(root / "images" / "a.png")
    Image.fromarray(np.arange(8) > np.full((8, 1), 3)).save(root / "masks" / "a.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "phrases.jsonl").write_text("\n".join(lines))

@pytest.mark.parametrize("row, message", [
    (dict(image="a.png", mask="a.png", split="val"), "no field 'phrase'"),
    (dict(image="a.png", phrase="a ship", split="val"), "no field 'mask'"),
    (dict(GOOD, split="valid"), "split 'valid' is not"), (dict(GOOD, phrase=" _?"), "phrase ' _.' has"),
    (dict(GOOD, phrase=None), "phrase None"), ("{'a': 1}", "JSON"), ("[1]", "list")])
def test_bad_lines_are_named(tmp_path, capsys, row, message):
    write_own(tmp_path, [GOOD, "", row, GOOD, row, *OTHERS])
    rejects(f"^2 bad rows .*phrases.jsonl line 3: .*{message}", data.RefSegDataset, tmp_path, "train", 8)
    rejects(r"^training would fail: 2 bad rows\.$", data.check, tmp_path)
    printed = capsys.readouterr().out
    assert re.findall(r"error: phrases.jsonl line (\d)", printed) == ["3", "5"]
    assert "'train': 2, 'val': 1, 'test': 1" in printed

def test_categories_and_missing_data(tmp_path):
    rejects(f"python data.py download rrsisd {tmp_path}", data.read_refs, tmp_path)
    values = {None: "-", math.nan: "-", "": "-", 7: "7", 0: "0", 2.5: "2.5", "ship": "ship"}
    write_own(tmp_path, [dict(GOOD, category=value) for value in values])
    assert [ref.category for ref in data.read_refs(tmp_path)[1]] == list(values.values())
    rejects("training would fail: no val rows, no test rows", data.check, tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    rejects("no val rows", data.RefSegDataset, tmp_path, "val", 8)
    rejects("1 files of the train .*masks/a.png", data.RefSegDataset, tmp_path, "train", 8)

def test_check_lists_every_defect(toy, tmp_path, capsys):
    rows, instances = write_format(tmp_path, "rrsisd", data.RefSegDataset(toy, "train", 96).refs[:16])
    empty = np.zeros((256, 256), bool)
    for i, counts in ((1, "132"), (2, encode_rle(empty)), (3, encode_rle(~empty))):
        instances["annotations"][i]["segmentation"][0]["counts"] = counts
    write_lists(tmp_path, rows, instances)
    images = tmp_path / "images" / "rrsisd" / "JPEGImages"
    (images / "00001.jpg").write_bytes((images / "00001.jpg").read_bytes()[:900])
    (images / "00002.jpg").unlink()
    Image.open(images / "00003.jpg").resize((256, 257)).save(images / "00003.jpg")
    rejects("fail: 9 bad rows, no val rows, no test rows", call, data.main, "check", tmp_path)
    printed = capsys.readouterr().out
    found = re.findall(r"error: train, ref_id (\d+), .*(run lengths are|truncated|No such)", printed)
    assert found == [("1", "run lengths are"), *[(str(i), "truncated") for i in range(4, 8)],
                     *[(str(i), "No such") for i in range(8, 12)]]
    found = re.findall(r"warning: the mask (.*), (\d+) rows: train, ref_id (\d+),", printed)
    assert found == [("is empty", "1", "2"), ("covers everything", "1", "3"),
                     ("has another size than the image", "4", "12")]
    write_own(tmp_path / "own", [GOOD] * 12 + [dict(row, mask="b.tif") for row in OTHERS])
    Image.fromarray(np.resize(np.float32([3, 7, 9]), (8, 8))).save(tmp_path / "own" / "masks" / "b.tif")
    data.check(tmp_path / "own")
    printed = capsys.readouterr().out
    for text in ("the mask has more than two values, 2 rows: val, ref_id phrases:13, a.png; test",
                 "the mask covers everything, 2 rows: val",
                 "another split has this image and phrase, 14 rows: train"):
        assert text in printed

def test_download(toy, tmp_path, monkeypatch, capsys):
    write_format(tmp_path, "rrsisd", data.read_refs(toy)[1])
    snapshot = tmp_path / "rrsisd"
    shutil.make_archive(snapshot / "JPEGImages", "zip", tmp_path / "images" / "rrsisd", "JPEGImages")
    client = create_autospec(huggingface_hub.snapshot_download, return_value=str(snapshot))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", client)
    call(data.main, "download", "rrsisd", tmp_path / "data")
    assert "Published: train 12,181" in capsys.readouterr().out
    client.side_effect = RuntimeError("no network\nat all")
    rejects(f"{tmp_path}, see data.py.*HF_ENDPOINT.*: no network at all", data.download, tmp_path)

def test_bad_input_ends_in_one_line(tmp_path, monkeypatch):
    """Also in a process that reads images; a mistake in the code keeps its traceback."""
    worker = "Caught InputError in DataLoader worker process 0.\nTrace\ndata.InputError: a.jpg is cut\n"
    for text in ("a.jpg is cut", worker):
        main = create_autospec(data.main, side_effect=data.InputError(text))
        pytest.raises(SystemExit, data.run, main).match("^error: a.jpg is cut$")
    rejects("mistake", data.run, Mock(side_effect=ValueError("mistake")), error=ValueError)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    code = "import data\ndef main():\n    print('漢')\n    raise OSError('漢')\ndata.run(main)"
    assert run("-c", code, fails=True) == "\\u6f22\nerror: \\u6f22\n"
    assert re.fullmatch("error: .*absent.*\n", run("evaluate.py", tmp_path / "absent.pth", fails=True))
    pytest.raises(SystemExit, train.main, ["--phrases-per-image", "0"]).match("2")

# ================================================================== 2. parity with transformers and peft
def reference_siglip(config):
    transformers = pytest.importorskip("transformers")
    tower = dict(hidden_size=config.width, intermediate_size=config.mlp, num_hidden_layers=config.layers,
                 num_attention_heads=config.heads)
    text = dict(tower, vocab_size=config.vocab, max_position_embeddings=64, projection_size=config.width)
    vision = dict(tower, image_size=config.image_size, patch_size=config.patch)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    return transformers.SiglipModel(config).eval()

def reference_sam(config):
    transformers = pytest.importorskip("transformers")
    C = config.prompt_width
    sizes = dict(image_size=config.image_size, patch_size=config.patch)
    vision = dict(sizes, hidden_size=config.width, num_hidden_layers=config.layers,
                  num_attention_heads=config.heads, output_channels=C, window_size=config.window,
                  global_attn_indexes=list(config.global_layers), num_pos_feats=C // 2)
    decoder = dict(hidden_size=C, mlp_dim=config.decoder_mlp, iou_head_hidden_dim=C)
    config = transformers.SamConfig(vision_config=vision, mask_decoder_config=decoder,
                                    prompt_encoder_config=dict(sizes, hidden_size=C))
    return transformers.SamModel(config).eval()

def transfer(ours, theirs):
    state = {peft_name(key): tensor for key, tensor in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(re.search("vision_model.head|encoder.shared_emb", name) for name in missing), missing

def check_gradients(name, ours, theirs, tolerance=1e-4):
    """Compare the gradient of every parameter that trains with that of its namesake."""
    reference = {key: p.grad for key, p in theirs.named_parameters()}
    gradients = {key: p.grad for key, p in ours.named_parameters() if p.requires_grad}
    errors = []
    for key, gradient in gradients.items():
        expected = reference[peft_name(key)]
        if key.endswith("k_proj.bias"):              # softmax cancels it: its gradient is rounding noise
            assert gradient.norm() < 1e-4 * gradients[key.replace("bias", "weight")].norm(), key
        elif gradient is None or not gradient.any():
            assert expected is None or not expected.any(), key
        else:
            errors.append(relative(gradient, expected))
    print(f"  {name}: {len(errors)} gradients, relative error {max(errors):.1e} (at most {tolerance})")
    assert max(errors) <= tolerance
    return len(errors)

def sam_pixels(images):
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device).view(3, 1, 1)
    return (images - mean) / torch.tensor([0.229, 0.224, 0.225], device=images.device).view(3, 1, 1)

@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kinds", [
    "points labels", "boxes", "masks", "points labels boxes", "points labels boxes masks", "nothing"])
def test_sam_parity(kinds, multimask):
    """Three images whose numbers of points differ."""
    ours = fill(SAM("small")).eval()
    theirs = reference_sam(SMALL_SAM)
    transfer(ours, theirs)
    theirs.prompt_encoder.shared_embedding = theirs.shared_image_embedding
    images, _, _, _ = batch(3)
    prompts = dict(points=128 * torch.rand(3, 3, 2), masks=torch.randn(3, 1, 32, 32),
                   labels=torch.tensor([[1, 0, 1], [1, 1, -1], [0, -1, -1]]),
                   boxes=(128 * torch.rand(3, 2, 2)).sort(1).values.flatten(1))
    prompts = {name: value for name, value in prompts.items() if name in kinds.split()}
    their_prompts = {f"input_{name}": value if name == "masks" else value[:, None]
                     for name, value in prompts.items()}
    masks, iou = ours(images, **prompts, multimask=multimask)
    result = theirs(pixel_values=sam_pixels(images), **their_prompts, multimask_output=multimask)
    check(f"SAM masks, {kinds}", masks, result.pred_masks[:, 0])
    check(f"SAM iou, {kinds}", iou, result.iou_scores[:, 0])
    (masks.square().mean() + iou.square().mean()).backward()
    (result.pred_masks.square().mean() + result.iou_scores.square().mean()).backward()
    assert check_gradients(f"SAM, {kinds}", ours, theirs, 1e-3) > 120

@pytest.mark.parametrize("n, cuda", [(5, True), (5, False), (33, True), (33, False)])
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
    fused = Mock(side_effect=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    output = model(x)
    widths = [arguments[0][0].shape[-1] for arguments in fused.call_args_list]
    assert widths == ([] if n == 33 and not cuda else [-(-(16 + 2 * n) // 8) * 8])     # a multiple of 8
    gradients = torch.autograd.grad(output.square().sum(), model.parameters())
    theirs = torch.autograd.grad(expected.square().sum(), model.parameters())
    assert all(relative(a, b) < 1e-12 for a, b in zip((output, *gradients), (expected, *theirs)))

@pytest.mark.parametrize("layer, shape", [
    (nn.Linear(12, 20), (3, 12)), (nn.Linear(12, 20), (2, 5, 12)),
    (nn.Conv2d(6, 10, 3, 2, 1), (2, 6, 9, 9)), (nn.Conv2d(6, 10, 1, bias=False), (2, 6, 9, 9))], ids=str)
def test_lora_parity(layer, shape):
    """Also merged. The output has the type of the input, on a base layer of another type than fp32."""
    peft = pytest.importorskip("peft")
    ours = nn.ModuleDict(dict(x=copy.deepcopy(layer), c=nn.LayerNorm(4), d=nn.Conv2d(4, 4, 3, groups=2)))
    theirs = nn.ModuleDict(dict(ours, x=copy.deepcopy(layer)))
    assert lora.inject(ours, ["x*"], r=4, alpha=6) == ["x"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["x"]), theirs)
    transfer(fill(ours), theirs)
    adapted = ours["x"]
    assert adapted.weight is adapted.base.weight and adapted.bias is adapted.base.bias
    x = torch.randn(shape)
    outputs = [adapted(x), theirs["x"](x)]
    check(f"LoRA {layer}", *outputs, 1e-5)
    sum(output.square().sum() for output in outputs).backward()
    check_gradients(f"LoRA {layer}", ours, theirs, 1e-5)
    for target, message in (("y*", "no layer"), ("c", "not a"), ("d", "ungrouped"), ("x", "not a")):
        rejects(message, lora.inject, ours, [target], error=ValueError)
    theirs["x"].merge()
    lora.merge(ours)
    check(f"LoRA {layer}, merged weight", ours["x"].weight, theirs["x"].base_layer.weight, 1e-5)
    for dtype in (torch.bfloat16, torch.float64):
        adapted.base.to(dtype)
        x = x.to(dtype)
        output = adapted(x)
        assert output.dtype == dtype and len(adapted(x[:0])) == 0
        assert torch.equal(output, adapted.base(x) + adapted.B(adapted.A(x)) * adapted.scale)

@pytest.mark.parametrize("part", ["siglip.vision_model", "siglip.text_model", "sam.vision_encoder"])
def test_peft_loads_what_save_peft_writes(part, tmp_path):
    peft = pytest.importorskip("peft")
    model = small_model(lora_alpha=6).eval()
    ours = model.get_submodule(part)
    lora.save_peft(ours, tmp_path)
    towers = nn.ModuleDict(dict(siglip=reference_siglip(SMALL_SIGLIP), sam=reference_sam(SMALL_SAM)))
    plain = {key.replace(".base.", "."): tensor for key, tensor in model.state_dict().items()}
    towers.load_state_dict(plain, strict=False)
    theirs = towers.get_submodule(part)
    images, ids, mask, _ = batch(side=128 if part == "sam.vision_encoder" else 70)
    inputs = ids if part == "siglip.text_model" else images
    expected = ours(ids, mask)[0] if part == "siglip.text_model" else ours(images)
    assert relative(theirs(inputs)[0], expected) > 1e-3, "the adapters must matter"
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    check(f"peft, {part}", expected, adapted(inputs)[0], 1e-5)
    layer = next(iter(lora.adapted_layers(ours).values()))
    layer.base.padding_mode = "reflect"
    rejects("peft pads with zeros", lora.save_peft, ours, tmp_path, error=ValueError)
    layer.scale *= 2
    rejects("one rank, scale and dropout", lora.save_peft, ours, tmp_path, error=ValueError)

PEFT_TARGETS = {   # what the released code adapts
    "sam.vision_encoder": r"(layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12]))|(neck\.conv[12])",
    "siglip.vision_model": r"encoder\.layers\.\d+\.self_attn\.\w+_proj",
    "siglip.text_model": r"(encoder\.layers\.\d+\.self_attn\.\w+_proj)|(head)"}

class Assembly(nn.Module):
    """The published model of transformers' and peft's parts. Phrases of one length, one per image."""

    def __init__(self, size, rank=16, dropout=0.0):
        super().__init__()
        peft = pytest.importorskip("peft")
        self.siglip = reference_siglip(siglip.CONFIGS[rsrefseg.SIGLIP_SIZE[size]])
        self.sam = reference_sam(sam.CONFIGS[size])
        targets = PEFT_TARGETS if rank else {}
        for part, target in targets.items():
            adapter = peft.LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=target)
            peft.inject_adapter_in_model(adapter, self.get_submodule(part))
        D = self.siglip.config.vision_config.hidden_size
        C = sam.CONFIGS[size].prompt_width
        def block(*shape):
            conv = nn.Conv2d(*shape, bias=False)
            return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(C), gelu=nn.GELU()))
        self.prompter = nn.ModuleDict(dict(
            channel=block(3 * D, C, 1), project=nn.Conv2d(C, C, 1),
            spatial=nn.Sequential(block(C, C, 3, 2, 1), block(C, C, 3, 2, 1))))

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
        t, s = self.siglip.text_model(input_ids=ids).to_tuple()
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
        _, dense = self.sam.prompt_encoder(None, None, None, self.resize(sentence, 4 * e))
        masks, *_ = self.sam.mask_decoder(
            f_sam, self.positions(e).expand(len(ids), -1, -1, -1), multimask_output=False,
            sparse_prompt_embeddings=sparse[:, None], dense_prompt_embeddings=dense)
        return masks[:, 0], dict(f_sam=f_sam, v=v, t=t, s=s, word_map=word_map,
                                 sentence_map=sentence[:, 0], sparse=sparse, dense=dense)

    def loss(self, logits, targets):
        logits = self.resize(logits, targets.shape[-1])
        return 5 * F.binary_cross_entropy_with_logits(logits, targets.float())

def forward_with_stages(model, *inputs):
    stages = {}
    for names, part in (("f_sam", "sam.vision_encoder"), ("v", "siglip.vision_model"),
                        ("t s", "siglip.text_model"), ("sparse word_map sentence_map", "prompter"),
                        ("none dense", "sam.prompt_encoder")):
        def keep(module, inputs, output, names=names.split()):
            stages.update(zip(names, output if isinstance(output, tuple) else [output]))

        model.get_submodule(part).register_forward_hook(keep)
    output = model(*inputs)
    stages["v"] = stages["v"].transpose(1, 2).unflatten(2, output.sentence_map.shape[1:])
    return output, stages

@pytest.mark.parametrize("mode, rank", [("eval", 4), ("train", 4), ("train", 0)])
def test_rsrefseg_parity(mode, rank):
    """Rank 4: LoRA on frozen towers, as b and l train. Rank 0: all weights train, as in tiny."""
    ours = small_model(rank, lora_dropout=0.0).train(mode == "train")
    theirs = Assembly("small", rank).train(mode == "train")
    transfer(ours, theirs)
    images, ids, mask, targets = batch(3, 1, 9)
    output, stages = forward_with_stages(ours, images, ids, mask)
    their_logits, their_stages = theirs(images, ids)
    for stage, value in their_stages.items():
        check(f"{mode}, rank {rank}: {stage}", stages[stage], value)
    check(f"{mode}, rank {rank}: mask logits", output.logits, their_logits)
    loss = train.segmentation_loss(output.logits, targets)
    their_loss = theirs.loss(their_logits, targets)
    check(f"{mode}, rank {rank}: loss", loss, their_loss, 1e-5)
    (loss + their_loss).backward()
    assert check_gradients(f"{mode}, rank {rank}", ours, theirs) > 150

# ======================================================================== 3. training and other commands
@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    run("train.py", "--sam", "tiny", "--data", toy, "--out", out, "--epochs", 40, "--val-every", 20,
        "--warmup-epochs", 3, *CPU)
    assert " ".join(sorted(path.name for path in out.iterdir())) == (
        "best.safetensors last.safetensors log.jsonl resume.pt val_000060.jpg val_000120.jpg")
    return out

def log_rows(folder, kind):
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in rows if row["kind"] == kind}

def assert_same_run(*folders):
    """Two finished runs agree to the last bit: weights, optimizer, logged gradients, best checkpoint."""
    leaves = []
    for folder in folders:
        state = torch.load(folder / "resume.pt", weights_only=True)
        norms = [row["gradient_norm"] for row in log_rows(folder, "train").values()]
        parts = [state[key] for key in ("step", "best", "model", "optimizer")]
        leaves.append(tree_leaves([parts, norms, load_file(folder / "best.safetensors")]))
    for x, y in zip(*leaves, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y

def copy_rows(toy, root, rows):
    shutil.copytree(toy, root)
    lines = (root / "phrases.jsonl").read_text().splitlines()
    (root / "phrases.jsonl").write_text("\n".join(lines[rows]))
    return root

def test_a_broken_run_resumes_to_the_bit(toy, tmp_path, monkeypatch):
    """A loss that is not finite ends a run before the optimizer's step. Then the data move."""
    arguments = ["--sam", "tiny", "--epochs", 2, "--save-every", 2, *CPU, "--out"]
    call(train.main, *arguments, tmp_path / "whole", "--data", toy)
    loss = train.segmentation_loss
    broken = Mock(side_effect=lambda *args: loss(*args) * (math.nan if broken.call_count == 9 else 1))
    monkeypatch.setattr(train, "segmentation_loss", broken)           # a step has two losses
    arguments.append(tmp_path / "out")
    message = "step 4: loss nan.* samples ([^p]*phrases:){32}.*--lr"
    rejects(message, call, train.main, *arguments, "--data", toy)
    monkeypatch.undo()
    call(train.main, *arguments, "--data", copy_rows(toy, tmp_path / "moved", slice(None)), "--resume")
    assert_same_run(tmp_path / "whole", tmp_path / "out")
    less = copy_rows(toy, tmp_path / "less", slice(4, None))
    for message, *flags in (
            ("other flags or data: training_items was 24, is 23", "--data", less, "--resume"),
            ("other flags or data: lr was 0.001, is 1.0", "--data", toy, "--resume", "--lr", 1),
            ("holds a run: ", "--data", toy), ("holds no run to resume", "--out", tmp_path, "--resume")):
        rejects(message, call, train.main, *arguments, *flags)

def small_arguments(toy, folder):                  # from the files of `small`: nine steps of two batches
    return ["--sam", "small", "--data", toy, "--siglip", folder / "siglip",
            "--sam-weights", folder / "sam", "--phrases-per-image", 4, "--lr", 1e-3, "--batch-size", 4,
            "--total-batch", 8, "--epochs", 3, "--warmup-epochs", 1, "--workers", 1]

def processes_of(session):
    """The states of a session's processes that still run, as `ps` lists them."""
    command = ["ps", "-o", "stat=", "-s", str(session)]
    states = subprocess.run(command, capture_output=True, text=True).stdout.split()
    return [state for state in states if not state.startswith("Z")]

@pytest.mark.parametrize("number, times", [
    (signal.SIGINT, 1), pytest.param(signal.SIGTERM, 3, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, 5, marks=pytest.mark.slow)])
def test_a_stopped_run_resumes_to_the_bit(toy, small, tmp_path, number, times):
    """At any moment. Ctrl-C reaches the workers too, the other signals the main process alone."""
    arguments = [*small_arguments(toy, tmp_path), "--epochs", 3 * times, "--save-every", 1, *CPU]
    call(train.main, *arguments, "--out", tmp_path / "whole")
    resume = tmp_path / "out" / "resume.pt"
    arguments += ["--out", resume.parent]
    for attempt in range(times):
        before = resume.stat().st_mtime_ns if attempt else None
        command = [sys.executable, HERE / "test_rsrefseg.py", "train", *map(str, arguments)]
        if attempt > 0:
            command.append("--resume")
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
        while not resume.exists() or resume.stat().st_mtime_ns == before:
            assert process.poll() is None, "it ended before its first step"
            time.sleep(0.01)
        time.sleep(np.random.uniform(0, 0.5))
        send = os.killpg if number == signal.SIGINT else os.kill
        send(process.pid, number)
        printed = process.communicate()[1]
        assert process.returncode == (1 if number == signal.SIGINT else -number)
        assert "Traceback" not in printed, printed
        assert number != signal.SIGINT or "with --resume" in printed, printed
        deadline = time.time() + 5
        while processes_of(process.pid):
            assert time.time() < deadline, processes_of(process.pid)
            time.sleep(0.1)
    call(train.main, *arguments, "--resume")
    assert_same_run(tmp_path / "whole", resume.parent)

@pytest.mark.parametrize("size, changes", [("tiny", []), ("small", ["--checkpoint-activations"])])
def test_two_processes_follow_one(toy, small, tmp_path, size, changes):
    """To rounding. small: two micro-batches per process, LoRA, recomputed activations."""
    root = copy_rows(toy, tmp_path / "toy", slice(-1))
    arguments = ["--sam", "tiny", "--data", root, "--batch-size", 4]
    if size == "small":
        arguments = [*small_arguments(root, tmp_path), "--batch-size", 2, "--lora-dropout", 0]
    arguments += ["--epochs", 1, "--lr", 1e-4, *CPU, "--out"]
    call(train.main, *arguments, tmp_path / "one")
    run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "test_rsrefseg.py",
        "train", *arguments, tmp_path / "two", *changes)
    one, two = [log_rows(tmp_path / name, "train")[3] for name in ("one", "two")]
    for key in ("loss", "gradient_norm"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    one, two = [load_file(tmp_path / name / "last.safetensors") for name in ("one", "two")]
    compared = [key for key in one if not re.search("running|num_batches|k_proj.bias", key)]
    assert max(relative(two[key], one[key]) for key in compared) < 1e-3
    model = RSRefSeg.from_checkpoint(tmp_path / "two" / "last.safetensors")
    alone = evaluate.evaluate(model, data.RefSegDataset(root, "val", model.image_size), 4)
    logged = log_rows(tmp_path / "two", "val")[3]["cIoU"]
    assert logged > 1 and logged == pytest.approx(evaluate.metrics(alone)["cIoU"], abs=1e-3)

def test_what_ends_a_run_in_one_line(toy, small, tmp_path, monkeypatch, capsys):
    """fp16 whose gradients are never finite: GradScaler skips every step, no score may come of it."""
    scale = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: scale(self, loss) * math.inf)
    arguments = [*small_arguments(toy, tmp_path), "--epochs", 12, "--val-every", 12, "--out", tmp_path]
    arguments += [*CPU, "--amp", "fp16"]
    rejects("step 2[0-9]: loss .*gradient (inf|nan)", call, train.main, *arguments)
    short = [*arguments, "--epochs", 1, "--out", tmp_path / "short"]
    rejects("no step was made", call, train.main, *short)
    assert not (tmp_path / "short" / "best.safetensors").exists()
    assert not (tmp_path / "best.safetensors").exists()
    assert log_rows(tmp_path, "train")[3]["gradient_norm"] is None         # JSON has no Infinity
    root = copy_rows(toy, tmp_path / "toy", slice(None, None, 9))          # 11 rows of train
    arguments = ["--sam", "tiny", "--data", root, "--out", tmp_path / "out", *CPU, "--total-batch"]
    rejects("--total-batch 2 must be a multiple of --batch-size 8 x 1", call, train.main, *arguments, 2)
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
    monkeypatch.setattr(train, "training_step", create_autospec(train.training_step, side_effect=memory))
    with pytest.raises(SystemExit, match="out of memory. Lower --batch-size.*--checkpoint-act"):
        data.run(functools.partial(call, train.main, *arguments, 32))
    assert "--total-batch is lowered to 8" in capsys.readouterr().out

@pytest.mark.parametrize("name, amp", [
    ("own.safetensors", "bf16"), pytest.param("own.safetensors", "fp16", marks=pytest.mark.slow),
    ("official.pth", "off")])
def test_training_starts_from_a_checkpoint(toy, small, tmp_path, name, amp):
    """--init, also a released checkpoint. In mixed precision the weights that train stay in fp32."""
    small.save(tmp_path / "own.safetensors")
    torch.save(official_state(small), tmp_path / "official.pth")
    arguments = [*small_arguments(toy, tmp_path), "--init", tmp_path / name, "--device", "cpu", "--out"]
    call(train.main, *arguments, tmp_path / "a", "--epochs", 1, "--lr", 1e-12, "--amp", amp)
    after = load_file(tmp_path / "a" / "last.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32, torch.int64}
    for key, tensor in after.items():
        assert re.search("running|num_batches", key) or relative(tensor, small.state_dict()[key]) < 1e-6
    rejects("size small, not --sam tiny", call, train.main, *arguments, tmp_path / "b", "--sam", "tiny")
    call(train.main, *arguments, tmp_path / "c", "--amp", amp)
    losses = [row["loss"] for row in log_rows(tmp_path / "c", "train").values()]
    assert losses[-1] < losses[0]

def test_tiny_learns_to_follow_the_phrase(trained, toy, capsys):
    """It must fit 24 scenes, and fail when their phrases are exchanged. Saved masks have the scores."""
    arguments = [trained / "last.safetensors", "--split", "train", *CPU]
    call(evaluate.main, *arguments, "--shuffle-phrases")
    call(evaluate.main, *arguments, "--save-masks", trained / "masks")
    pattern = r"(?s)\| storagetank \|.*\ntrain \| gIoU .* \| samples 96 \| both_empty 0\n"
    assert re.search(pattern, capsys.readouterr().out)
    report, shuffled = [json.loads((trained / f"last.{name}.json").read_text())
                        for name in ("train", "shuffled.train")]
    assert report["metrics"]["gIoU"] > 50 and shuffled["metrics"]["gIoU"] < 25
    assert report["metrics"] == evaluate.metrics(report["samples"])
    refs = data.RefSegDataset(toy, "train", 96).refs
    for i, (ref, row, other) in enumerate(zip(refs, report["samples"], shuffled["samples"])):
        mask = np.asarray(Image.open(trained / "masks" / f"{i:06d}.png"))
        assert (mask & data.read_mask(ref)).sum() == row["intersection"]
        assert (other["ref_id"], other["phrase"]) == (ref.ref_id, refs[(i + 48) % 96].phrase)

def test_windows_cover_a_scene_without_seams(trained, monkeypatch):
    """With a model that answers each pixel by its brightness, windows give the mask of the whole."""
    seen = []

    def brightness(self, images, ids, mask):
        seen.append(images)
        logits = (images.mean(1, keepdim=True) - 0.5).expand(len(ids), -1, -1, -1)
        return rsrefseg.Output(logits, None, None)

    monkeypatch.setattr(RSRefSeg, "forward", brightness)
    model = RSRefSeg.from_checkpoint(trained / "last.safetensors")
    squares = np.random.default_rng(0).integers(0, 2, (9, 12), np.uint8) * 255
    scene = Image.fromarray(np.kron(squares, np.ones((24, 24), np.uint8))).convert("RGB")
    masks, scores = model.segment(scene, ["the ship", "the vehicle"], tile=96)
    assert (masks.numpy() == (np.asarray(scene.convert("L")) > 127)).all()
    assert len(seen) == 4 * 5
    assert scores.tolist() == pytest.approx([0.6225] * 2, abs=1e-3)                      # sigmoid(0.5)
    rejects(r"empty: \['ship', '!\?'\]", model.segment, scene, ["ship", "!?"])

def segment(*arguments):
    return pytest.raises(SystemExit, call, rsrefseg.main, *arguments).value.code

def test_segment_command(trained, toy, tmp_path, capsys):
    """Each image has its own files. --json prints what the mask shows. A bad image is reported."""
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    names = ["a.jpg", "a.png", "water_mask.png"]
    for name, scene in zip(names, sorted((toy / "images").iterdir())):
        Image.open(scene).resize((200, 150)).save(scenes / name)
    for name in ("notes.txt", "._a.jpg", "bad.jpg"):
        (scenes / name).write_text("no image")
    phrases = ["the ship", "A gray storage tank, on the left!", "the crane"]
    arguments = ["--checkpoint", trained / "best.safetensors", *CPU, "--out"]
    assert segment(scenes, *phrases, *arguments, tmp_path / "out", "--json") == 1
    printed = capsys.readouterr()
    assert re.findall("error: .*?(bad.jpg|$)", printed.err, re.M) == ["bad.jpg"]
    records = [json.loads(line) for line in printed.out.splitlines()]
    expected = [(str(scenes / name), phrase) for name in names for phrase in phrases]
    assert [(record["image"], record["phrase"]) for record in records] == expected
    files = [record[kind] for record in records for kind in ("mask", "overlay")]
    assert sorted(files) == sorted(str(path) for path in (tmp_path / "out").iterdir())
    assert "/a.png_2_a_gray_storage_tank_on_the_left_mask.png" in records[4]["mask"]
    for record in records:
        mask = np.asarray(Image.open(record["mask"])) > 0
        x1, y1, x2, y2 = record["box"] or (0, 0, 0, 0)
        assert (mask.shape, mask.sum(), mask[y1:y2, x1:x2].sum()) == ((150, 200), *[record["area"]] * 2)
        assert 0.5 < record["score"] <= 1 or not record["area"]
    tiles = [*arguments, tmp_path / "tiles", "--tile", 64, "--no-overlay"]
    assert segment(scenes / "a.png", "the ship", *tiles) == 0
    assert re.match("'the ship': .*%.*, score .* -> .*_mask.png\n", capsys.readouterr().out)
    assert segment(scenes, "the ship", *arguments, scenes) == 2

def test_masks_of_georeferenced_scenes(trained, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    place = dict(crs="EPSG:32631", transform=rasterio.Affine(0.43, -0.25, 431000, -0.25, -0.43, 5411000))
    with rasterio.open(tmp_path / "x.tif", "w", "GTiff", 256, 256, 3, dtype="uint8", **place) as file:
        file.write(np.full((3, 256, 256), 90, np.uint8))
    arguments = ["--checkpoint", trained / "last.safetensors", "--out", tmp_path, *CPU]
    assert segment(tmp_path / "x.tif", "the ship", *arguments) == 0
    with rasterio.open(tmp_path / "x.tif_1_the_ship_mask.tif") as mask:
        assert mask.crs == place["crs"] and mask.compression.name == "deflate"
        assert mask.transform.almost_equals(place["transform"])

@pytest.mark.parametrize("name, code", [
    ("siglip", "siglip.SigLIP('tiny').encode_image(torch.rand(1, 3, 500, 400))"),
    ("sam", "sam.SAM('tiny')(torch.rand(2, 3, 96, 96), boxes=torch.tensor([[10, 10, 50, 60.0]] * 2))"),
    ("lora", "lora.inject(torch.nn.Sequential(torch.nn.Linear(8, 8)), ['0'], r=2, alpha=2)"),
    ("data", "data.main(['toy', 'toy', '--train', '1', '--val', '1', '--test', '1'])")])
def test_each_file_works_alone(name, code, tmp_path):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    run("-c", f"import torch, {name}\n{code}", cwd=tmp_path)

def test_readme_is_true(capsys):
    """Its commands and flags exist, its links are files, the code that it quotes is the code."""
    flags = {}
    for name, main, *command in (
            ("train", train.main), ("evaluate", evaluate.main), ("rsrefseg", rsrefseg.main),
            ("data", data.main, "toy"), ("data", data.main, "check"), ("data", data.main, "download"),
            ("test_rsrefseg", bench_command), ("test_rsrefseg", parity_command)):
        pytest.raises(SystemExit, call, main, *command, "--help")
        flags.setdefault(name, set()).update(re.findall("--[a-z-]+", capsys.readouterr().out))
    readme = (HERE / "README.md").read_text()
    for name, arguments in re.findall(r"(?:python|torchrun).* (\w+)\.py\b([^`\n]*)", readme):
        assert set(re.findall("--[a-z-]+", arguments)) <= flags[name], f"{name}.py{arguments}"
    assert set(re.findall("`(--[a-z-]+)", readme)) <= set.union(*flags.values())
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", readme):
        assert (HERE / link).is_file(), link
    for name, quoted in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", readme, re.S):
        code, quoted = [[line.partition("  #")[0].rstrip() for line in text.splitlines()]
                        for text in ((HERE / name).read_text(), quoted)]
        assert set(quoted) <= set(code), name

# ========================================================================================= 4. full size
@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["b", "l --forward"])
def test_parity_at_full_size(arguments):
    pytest.importorskip("peft")
    print(run("test_rsrefseg.py", "parity", *arguments.split()))

def train_as_ours(theirs, size):
    trained = {peft_name(name) for name, p in meta_model(size).named_parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trained)

def full_size_parity(size, forward_only, folder):
    """One image of 1024 x 1024, fp32, random weights of a trained model's scale, which the assembly
    saves as the released code does. Returns rows of name, error, tolerance."""
    torch.set_grad_enabled(not forward_only)
    images, ids, mask, targets = batch(1, 1, 9, 1024)
    theirs = fill(Assembly(size).eval())
    train_as_ours(theirs, size)
    state = theirs.state_dict()
    official = {official_name(key): state[peft_name(key)] for key in meta_model(size).state_dict()}
    torch.save(official, folder / "official.pth")
    for layer in theirs.sam.vision_encoder.layers:         # all attention matrices would take over 20 GB
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    their_logits, their_stages = theirs(images, ids)
    if not forward_only:
        theirs.loss(their_logits, targets).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    del theirs, state, official
    data.toy_tokenizer().save(str(folder / "tokenizer.json"))
    ours = RSRefSeg.from_checkpoint(folder / "official.pth", folder)
    output, stages = forward_with_stages(ours, images, ids, mask)
    rows = [(name, relative(stages[name], value), 1e-5) for name, value in their_stages.items()]
    rows.append(("mask logits", relative(output.logits, their_logits), 1e-5))
    if not forward_only:
        train.segmentation_loss(output.logits, targets).backward()
        norms = [(parameter.grad.norm(), gradients[peft_name(name)].norm())
                 for name, parameter in ours.named_parameters()
                 if parameter.requires_grad and not name.endswith("k_proj.bias")]
        errors = [abs(norm / expected - 1).item() for norm, expected in norms if expected]
        rows.append((f"norm of each of {len(errors)} gradients", max(errors), 1e-4))
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
        model = meta_model(args.size, dtype=rsrefseg.AMP[args.amp] or torch.float32)
        model.to_empty(device="cpu")
        for module in model.modules():
            module.checkpoint_activations = args.checkpoint_activations
    else:
        model = Assembly(args.size, dropout=0.1)
        train_as_ours(model, args.size)
    fill(model).to(args.device).train(args.mode == "train")
    if name == "ours" and args.mode == "infer":
        lora.merge(model)                                                   # as rsrefseg.py does
    images, ids, mask, targets = [x.to(args.device) for x in batch(args.batch, args.phrases, 10, 1024)]
    inputs = [images, ids, mask] if name == "ours" else [images.repeat_interleave(args.phrases, 0), ids]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    seconds = []
    for _ in range(4):                                                      # the first does not count
        start = time.perf_counter()
        with torch.set_grad_enabled(args.mode == "train"), rsrefseg.autocast(args.device, args.amp):
            logits = model(*inputs)[0]
        if args.mode == "train":
            train.segmentation_loss(logits, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits.sum().item()                                                 # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if args.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return np.median(seconds[1:]), peak / 2**30

def bench_command(argv):
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
    for name in ("ours", "reference"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(bench_model, (name, args))
        print(f"  {name:10} {seconds:8.3f} s {memory:8.2f} GiB {args.batch / seconds:8.2f} images/s")
    a = torch.randn(4096, 4096, device=args.device).to(rsrefseg.AMP[args.amp] or torch.float32)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    rate = 2 * 4096**3 / min(seconds) / 1e12
    # Matrix products of a step with one image and one phrase, by FlopCounterMode on the assembly.
    counted = dict(binfer=1.683, btrain=3.662, linfer=3.731, ltrain=7.901)
    tflop = args.batch * counted[args.size + args.mode]
    print(f"  floor      {tflop / rate:8.3f} s = {tflop:.2f} TFLOP at {rate:.2f} TFLOP/s")

if __name__ == "__main__":
    commands = dict(parity=parity_command, bench=bench_command, train=train.main)    # for the tests
    data.run(functools.partial(commands[sys.argv[1]], sys.argv[2:]))
    sys.stdout.flush()
    os._exit(0)     # some exits of gloo processes abort, with all that this file imports
