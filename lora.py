"""LoRA (Hu et al. 2022, arXiv:2106.09685): adapt a frozen layer W by a product of rank r,
y = W x + (alpha / r) B A x. Checked against peft. Needs torch and safetensors.

    inject(model, ["encoder.layers.*.self_attn.[qkv]_proj"], r=16, alpha=16, dropout=0.1)
    merge(model)                                                               # after training
"""
import json
from fnmatch import fnmatchcase
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

class AdapterLinear(nn.Linear):
    """Its weight stays fp32 and is used in the type of the input. So it fits a bf16 or fp64 layer also
    without autocast; under autocast this changes nothing."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

class AdapterConv2d(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), None)

class LoRA(nn.Module):
    """A frozen Linear or Conv2d with its adapter. A is a layer of the same kind (kernel, stride,
    padding) with r outputs; B maps them to the outputs of the base layer, for a Conv2d by a 1 x 1
    kernel. B starts at zero, so an adapted model starts as the model it adapts."""

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        self.dropout = nn.Dropout(dropout)
        options = dict(bias=False, device=base.weight.device)
        if isinstance(base, nn.Linear):
            self.A = AdapterLinear(base.in_features, r, **options)
            self.B = AdapterLinear(r, base.out_features, **options)
        else:
            self.A = AdapterConv2d(base.in_channels, r, base.kernel_size, base.stride, base.padding,
                                   base.dilation, padding_mode=base.padding_mode, **options)
            self.B = AdapterConv2d(r, base.out_channels, 1, **options)
        nn.init.zeros_(self.B.weight)            # A keeps torch's default, Kaiming-uniform

    def forward(self, x):
        return self.base(x) + self.B(self.A(self.dropout(x))) * self.scale

    @property
    def weight(self):                            # for other code that reads layer.weight
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

def inject(model, targets, r=16, alpha=16, dropout=0.0):
    """Wrap the layers that `targets` name and return their names. A target is a dotted name, or a
    pattern with * (any text, dots included), ? and [abc]. The rest of the model is not frozen here.
    Raises ValueError for a target that names no layer, or no Linear or ungrouped Conv2d."""
    layers = {}
    for target in targets:
        matches = {name: layer for name, layer in model.named_modules() if fnmatchcase(name, target)}
        if not matches:
            raise ValueError(f"LoRA target {target!r} matches no layer of {type(model).__name__}.")
        layers.update(matches)
    for name, layer in layers.items():
        if type(layer) not in (nn.Linear, nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            raise ValueError(f"LoRA target {name!r} is {layer}, not a Linear or an ungrouped Conv2d.")
    for name, layer in layers.items():
        model.set_submodule(name, LoRA(layer, r, alpha, dropout))
    return list(layers)

def adapted_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}

@torch.no_grad()
def merge(model):
    """Add every adapter to its base weight and remove it, for faster inference."""
    for name, layer in adapted_layers(model).items():
        product = layer.B.weight.flatten(1) @ layer.A.weight.flatten(1)     # (out, r) @ (r, in * kernel)
        layer.base.weight += (layer.scale * product).view_as(layer.base.weight)
        model.set_submodule(name, layer.base)

def trainable_state_dict(model):
    """Returns the trainable parameters and all buffers: what training can change."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in frozen}

def save_peft(model, folder):
    """Export the adapters for `peft.PeftModel.from_pretrained(other, folder)`, where `other` has the
    same layer names. Raises ValueError for a model that peft's one config cannot describe."""
    layers = adapted_layers(model)
    shared = {(len(layer.A.weight), layer.scale, layer.dropout.p) for layer in layers.values()}
    if len(shared) != 1:
        raise ValueError("peft's format has one rank, scale and dropout; this model has "
                         f"{len(shared)} different ones (0: no LoRA).")
    tensors = {}
    for name, layer in layers.items():
        if getattr(layer.base, "padding_mode", "zeros") != "zeros":
            raise ValueError(f"{name}: peft pads with zeros, not {layer.base.padding_mode}.")
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A.weight.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B.weight.detach().contiguous()
    r, scale, dropout = shared.pop()
    config = dict(peft_type="LORA", r=r, lora_alpha=scale * r, lora_dropout=dropout, bias="none",
                  target_modules=list(layers), inference_mode=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, "adapter_model.safetensors"), {"format": "pt"})
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=1))
