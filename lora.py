"""LoRA (Hu et al. 2022, arXiv:2106.09685): adapt a frozen layer W by a low-rank product,
y = W x + (alpha / r) B A x, r the rank. Checked against peft. Needs torch and safetensors.

    inject(model, ["encoder.layers.*.self_attn.[qkv]_proj"], r=16, alpha=16, dropout=0.1)
    merge(model)                                                               # after training
"""
import json
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


class LoRA(nn.Module):
    """A frozen Linear or Conv2d with its adapter. A is a layer of the same kind (kernel, stride,
    padding) with r outputs; B maps them to the outputs of the base layer, for a Conv2d by a 1 x 1
    kernel. B starts at zero, so an adapted model starts as the model it adapts."""

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / r
        self.dropout = dropout
        kwargs = dict(bias=False, device=base.weight.device)    # no dtype: fp32, also on a bf16 base
        if isinstance(base, nn.Linear):
            self.A = nn.Linear(base.in_features, r, **kwargs)
            self.B = nn.Linear(r, base.out_features, **kwargs)
        else:
            self.A = nn.Conv2d(base.in_channels, r, base.kernel_size, base.stride, base.padding,
                               base.dilation, padding_mode=base.padding_mode, **kwargs)
            self.B = nn.Conv2d(r, base.out_channels, 1, **kwargs)
        nn.init.zeros_(self.B.weight)            # A keeps torch's default, Kaiming-uniform

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):        # cast once for base and adapter
            x = x.to(torch.get_autocast_dtype(x.device.type))
        dropped = x
        if self.training and self.dropout:                  # F.dropout takes more memory on a CPU
            dropped, _ = torch.native_dropout(x, self.dropout, True)
        if isinstance(self.base, nn.Linear):                # as the last line, but in place: y is large
            y = self.base(x.reshape(-1, x.shape[-1]))
            a = self.A(dropped.reshape(-1, x.shape[-1]))
            y.addmm_(a, self.B.weight.t().to(y.dtype), alpha=self.scale)
            return y.view(*x.shape[:-1], -1)
        return self.base(x) + self.B(self.A(dropped) * self.scale)


def inject(model, targets, r=16, alpha=16, dropout=0.0):
    """Wrap the layers that `targets` name and return their names. A target is a dotted name, or a
    pattern with * (any text, dots included), ? and [abc]. Only wrapped layers are frozen here: freeze
    the rest with `model.requires_grad_(False)` first. Raises ValueError, before anything is changed, for
    a target that matches nothing, or something other than a Linear or an ungrouped Conv2d."""
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
    """Add every adapter to its base weight and remove it, for inference."""
    for name, layer in adapted_layers(model).items():
        product = layer.B.weight.flatten(1) @ layer.A.weight.flatten(1)
        layer.base.weight += (layer.scale * product).view_as(layer.base.weight)
        model.set_submodule(name, layer.base)


def base_state_dict(model):
    """Returns the state dict as before `inject`: the same tensors, their original names, no A and B."""
    state = model.state_dict()
    for name, layer in adapted_layers(model).items():
        for key in layer.state_dict():
            del state[f"{name}.{key}"]
        state.update(layer.base.state_dict(prefix=f"{name}."))
    return state


def trainable_state_dict(model):
    """Returns the trainable parameters and all buffers: what training can change."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in frozen}


def parameter_table(model):
    """Returns text: trainable and all parameters of each component (the first two parts of a name)."""
    rows = {}
    for name, parameter in model.named_parameters():
        row = rows.setdefault(".".join(name.split(".")[:2]), [0, 0])
        row[0] += parameter.numel() if parameter.requires_grad else 0
        row[1] += parameter.numel()
    rows["total"] = [sum(column) for column in zip(*rows.values())]
    lines = [f"{name:30}{trainable:>15,}{total:>15,}" for name, (trainable, total) in rows.items()]
    return "\n".join([f"{'component':30}{'trainable':>15}{'parameters':>15}", *lines])


def save_peft(model, folder):
    """Write the adapters, which must share rank, alpha and dropout, for `peft.PeftModel.from_pretrained(
    other, folder)`, where `other` has the same layer names. Raises ValueError without adapters."""
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapters to write: call inject first.")
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.A.weight.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.B.weight.detach().contiguous()
    r = len(layer.A.weight)                    # every layer has the same
    config = dict(peft_type="LORA", r=r, lora_alpha=layer.scale * r, lora_dropout=layer.dropout,
                  bias="none", target_modules=list(layers), inference_mode=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, "adapter_model.safetensors"), {"format": "pt"})
    Path(folder, "adapter_config.json").write_text(json.dumps(config, indent=1))
