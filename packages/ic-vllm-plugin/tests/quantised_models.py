"""Checkpoints whose linear layers are stored in 4 bits or adapted by LoRA, and the same in plain float32."""

import json
from pathlib import Path

import torch
from ic_model import ICForCausalLM
from safetensors.torch import save_file

GROUP = 128
LORA_RANK, LORA_ALPHA = 4, 16


def write_gptq(source: Path, quantised: Path, plain: Path) -> None:
    """Round every linear layer of `source` to 4 bits: packed as GPTQ has it, and as the numbers that stands for.

    Symmetric, in groups of 128 inputs: `w = (n - 8) * scale`, eight numbers n to an int32 along the inputs.
    """
    model = ICForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors, rounded = {}, model.state_dict()
    for name, weight in model.state_dict().items():
        if not name.endswith(("proj.weight", "proj_with_mqa.weight")):
            if name != "lm_head.weight":
                tensors[name] = weight.contiguous()
            continue
        outputs, inputs = weight.shape
        groups = weight.view(outputs, inputs // GROUP, GROUP)
        scales = groups.abs().amax(-1, keepdim=True) / 7
        numbers = ((groups / scales).round() + 8).clamp(0, 15)
        # what is stored in 16 bits is what has to be computed with
        scales = scales.to(torch.bfloat16).float()
        rounded[name] = ((numbers - 8) * scales).view(outputs, inputs)
        tensors |= _pack(name.removesuffix("weight"), numbers.view(outputs, inputs), scales.squeeze(-1))
    model.load_state_dict(rounded)
    model.save_pretrained(plain)
    for folder in (quantised, plain):
        folder.mkdir(exist_ok=True)
        for file in source.glob("token*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }
    (quantised / "config.json").write_text(json.dumps(config))


def _pack(prefix: str, numbers: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    outputs, inputs = numbers.shape
    shifts = torch.arange(0, 32, 4)
    eights = numbers.T.to(torch.int64).view(inputs // 8, 8, outputs)
    packed = (eights << shifts[None, :, None]).sum(1)
    # GPTQ stores the zero point less one
    zeros = (torch.full((inputs // GROUP, outputs // 8, 8), 7, dtype=torch.int64) << shifts).sum(-1)
    return {
        f"{prefix}qweight": _int32(packed),
        f"{prefix}qzeros": _int32(zeros),
        f"{prefix}scales": scales.T.contiguous().to(torch.bfloat16),
        f"{prefix}g_idx": torch.arange(inputs, dtype=torch.int32) // GROUP,
    }


def _int32(numbers: torch.Tensor) -> torch.Tensor:
    return torch.where(numbers >= 2**31, numbers - 2**32, numbers).to(torch.int32).contiguous()


def write_lora(source: Path, adapter: Path, merged: Path | None, modules: list[str]) -> None:
    """A LoRA adapter for some linear layers, as PEFT writes it, and the model with it merged."""
    torch.manual_seed(1)
    model = ICForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors, weights = {}, model.state_dict()
    for name, weight in list(weights.items()):
        if name.split(".")[-2] not in modules:
            continue
        outputs, inputs = weight.shape
        down, up = torch.randn(LORA_RANK, inputs) * 0.05, torch.randn(outputs, LORA_RANK) * 0.05
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        weights[name] = weight + LORA_ALPHA / LORA_RANK * up @ down
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "target_modules": modules,
        "bias": "none",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    if merged is not None:
        model.load_state_dict(weights)
        model.save_pretrained(merged)
