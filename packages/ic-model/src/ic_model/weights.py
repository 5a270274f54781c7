"""Names and shapes of the weights, and the way to and from DeepSeek-V3 checkpoints.

A dense DeepSeek-V3 stores the same tensors under the same names, so a conversion copies the weight files as
they are and translates config.json. vLLM merges some tensors at loading; `VLLM_MERGED` says which.

    python -m ic_model.weights export SOURCE TARGET
    python -m ic_model.weights import SOURCE TARGET

Letters: D hidden_size, F intermediate_size, N num_attention_heads, C kv_lora_rank, R qk_rope_head_dim,
P qk_nope_head_dim, V v_head_dim.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DeepseekV3Config

from ic_model.configuration import ICConfig
from ic_model.rope import cos_sin_scale, yarn_mscale

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
# part of a stored name: (its part of the name in vLLM, index of the slice within vLLM's merged tensor)
VLLM_MERGED = {".gate_proj.": (".gate_up_proj.", 0), ".up_proj.": (".gate_up_proj.", 1)}
# transformers' DeepSeek-V3 builds its latent norms without an epsilon argument, so they always use its
# RMSNorm's default, while the other norms use rms_norm_eps. One field of ours sets all of them, and vLLM's
# DeepSeek-V3 reads it the same way: this is the only value on which everybody agrees.
DEEPSEEK_NORM_EPS = 1e-6

_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)
_COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)
# what has a bias where the configuration says attention_bias
_BIASED = ("self_attn.q_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj")
_FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")


def tensor_shapes(config: ICConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint by its name: ours, vLLM's input and DeepSeek-V3's.

    Linear weights are `[outputs, inputs]` (DeepSeek-V3, arXiv 2412.19437, section 2.1.1, eqs. 1 to 11).

    Returns:
        name to shape. With tied embeddings there is no `lm_head.weight`.
    """
    width, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocabulary, width), "model.norm.weight": (width,)}
    if not config.tie_word_embeddings:
        shapes[OUTPUT] = (vocabulary, width)
    for index in range(config.num_hidden_layers):
        for name, shape in _layer_shapes(config).items():
            shapes[f"model.layers.{index}.{name}.weight"] = shape
            if config.attention_bias and name in _BIASED:
                shapes[f"model.layers.{index}.{name}.bias"] = shape[:1]
    return shapes


def _layer_shapes(config: ICConfig) -> dict[str, tuple[int, ...]]:
    width, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    shapes: dict[str, tuple[int, ...]] = {}
    if config.q_lora_rank is None:
        shapes["self_attn.q_proj"] = (queries, width)
    else:
        shapes["self_attn.q_a_proj"] = (config.q_lora_rank, width)
        if config.q_latent_norm:
            shapes["self_attn.q_a_layernorm"] = (config.q_lora_rank,)
        shapes["self_attn.q_b_proj"] = (queries, config.q_lora_rank)
    shapes["self_attn.kv_a_proj_with_mqa"] = (config.kv_lora_rank + config.qk_rope_head_dim, width)
    if config.kv_latent_norm:
        shapes["self_attn.kv_a_layernorm"] = (config.kv_lora_rank,)
    expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
    return shapes | {
        "self_attn.kv_b_proj": (expanded, config.kv_lora_rank),
        "self_attn.o_proj": (width, heads * config.v_head_dim),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }


def to_deepseek_config(config: ICConfig) -> DeepseekV3Config:
    """The configuration of a dense DeepSeek-V3 that computes the same function.

    It never ties its embeddings: vLLM's DeepSeek-V3 does not know that option and would serve an
    uninitialised output projection.

    Raises:
        ValueError: DeepSeek-V3 cannot express a field's value.
    """
    if not config.kv_latent_norm:
        raise ValueError(
            "kv_latent_norm is False; DeepSeek-V3 always norms the key-value latent (accepted: True)"
        )
    if config.q_lora_rank is not None and not config.q_latent_norm:
        raise ValueError(
            "q_latent_norm is False; DeepSeek-V3 always norms the query latent (accepted: True, or "
            "q_lora_rank None)"
        )
    if config.attention_bias:
        raise ValueError(
            "attention_bias is True; DeepSeek-V3 has biases in other places, and vLLM's in none (accepted: False)"
        )
    rope = config.rope_parameters or {}
    if rope.get("rope_type") == "explicit":
        raise ValueError(
            "rope_parameters['rope_type'] is 'explicit'; DeepSeek-V3's angles follow from rope_theta (accepted: "
            "'default', 'yarn'; convert with --frequencies standard)"
        )
    _check_norm_eps(config.rms_norm_eps)
    _check_mscale(config)
    return DeepseekV3Config(
        **{field: getattr(config, field) for field in _SHARED_FIELDS},
        rope_parameters=dict(rope),
        first_k_dense_replace=config.num_hidden_layers,
        num_mtp_layers=0,
        tie_word_embeddings=False,
        architectures=["DeepseekV3ForCausalLM"],
    )


def from_deepseek_config(config: DeepseekV3Config) -> ICConfig:
    """Our configuration of a dense DeepSeek-V3.

    Raises:
        ValueError: the model is not dense, or has a field value that we cannot express.
    """
    dense_layers = config.first_k_dense_replace or 0
    if dense_layers < config.num_hidden_layers:
        raise ValueError(
            f"first_k_dense_replace is {dense_layers} with num_hidden_layers {config.num_hidden_layers}: the "
            "model has mixture-of-experts layers; accepted: dense models, first_k_dense_replace >= "
            "num_hidden_layers"
        )
    accepted_values = {"attention_bias": False, "rope_interleave": True, "attention_dropout": 0}
    for field, accepted in accepted_values.items():
        if (value := getattr(config, field)) != accepted:
            raise ValueError(f"{field} is {value!r}; accepted: {accepted!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("quantization_config is set; accepted: checkpoints that are not quantised")
    _check_norm_eps(config.rms_norm_eps)
    imported = ICConfig(
        **{field: getattr(config, field) for field in _SHARED_FIELDS},
        rope_parameters=dict(config.rope_parameters or {}),
        tie_word_embeddings=config.tie_word_embeddings,
        architectures=["InfiniteContextForCausalLM"],
    )
    _check_mscale(imported)
    return imported


def export_deepseek_v3(source_dir: str | Path, target_dir: str | Path) -> Path:
    """Write one of our checkpoints as a dense DeepSeek-V3 for transformers, vLLM and others.

    Args:
        source_dir: folder with config.json and safetensors (one file, or shards and their index). Tokenizer
            files and generation_config.json are copied.
        target_dir: folder to make; it must not exist, or be empty.

    Returns:
        target_dir.

    Raises:
        ValueError: DeepSeek-V3 cannot express the model, tensors are missing, unexpected or misshapen, or
            target_dir is not empty.
    """
    source, target = Path(source_dir), Path(target_dir)
    _check_model_type(source, ICConfig.model_type)
    config = ICConfig.from_pretrained(source)
    exported = to_deepseek_config(config)
    stored = _check_tensors(source, config)
    _make_empty(target)
    files = _weight_files(source)
    extra = {}
    if config.tie_word_embeddings:
        extra = _untied_output(source, stored)
    _write_weights(files, extra, stored, target)
    _copy_companions(source, target)
    exported.save_pretrained(target)
    return target


def import_deepseek_v3(source_dir: str | Path, target_dir: str | Path) -> Path:
    """Write a dense DeepSeek-V3 checkpoint as one of ours.

    Args:
        source_dir: folder with config.json and safetensors (one file, or shards and their index). Tokenizer
            files and generation_config.json are copied.
        target_dir: folder to make; it must not exist, or be empty.

    Returns:
        target_dir.

    Raises:
        ValueError: the model has experts, biases, a quantisation or another field that we cannot express,
            tensors are missing, unexpected or misshapen, or target_dir is not empty.
    """
    source, target = Path(source_dir), Path(target_dir)
    _check_model_type(source, DeepseekV3Config.model_type)
    config = from_deepseek_config(DeepseekV3Config.from_pretrained(source))
    stored = _check_tensors(source, config)
    _make_empty(target)
    _write_weights(_weight_files(source), {}, stored, target)
    _copy_companions(source, target)
    config.save_pretrained(target)
    return target


def _check_norm_eps(eps: float) -> None:
    if eps != DEEPSEEK_NORM_EPS:
        raise ValueError(
            f"rms_norm_eps is {eps}; accepted: {DEEPSEEK_NORM_EPS}, because transformers' DeepSeek-V3 uses "
            "that value for its latent norms whatever the configuration says"
        )


def _check_mscale(config: ICConfig) -> None:
    """Refuse the YaRN parameters on which DeepSeek's release and transformers disagree.

    DeepSeek's release scales cos and sin by `m(factor, mscale) / m(factor, mscale_all_dim)` with the defaults
    1 and 0; transformers (`_compute_yarn_parameters`) does so only where both are given and not 0, and else
    uses `m(factor, 1)`.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "yarn" or (rope.get("mscale") and rope.get("mscale_all_dim")):
        return
    if not math.isclose(cos_sin_scale(config), yarn_mscale(rope["factor"], 1.0), rel_tol=1e-9):
        raise ValueError(
            f"rope_parameters has mscale {rope.get('mscale')!r} and mscale_all_dim "
            f"{rope.get('mscale_all_dim')!r}; transformers' DeepSeek-V3 scales cos and sin as DeepSeek's "
            "release does only where both are given and not 0, or where both are left out"
        )


def _check_model_type(folder: Path, accepted: str) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json")
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if raw.get("model_type") != accepted:
        raise ValueError(f"model_type in {path} is {raw.get('model_type')!r}; accepted: {accepted!r}")


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files, in order."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        raise ValueError(f"{folder} has neither model.safetensors nor {index.name}")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{index.name} in {folder} names files that are not there: {', '.join(absent)}")
    return [folder / name for name in names]


def _check_tensors(folder: Path, config: ICConfig) -> dict[str, Path]:
    """Compare the stored tensors with the configuration; returns the file of each tensor."""
    expected = tensor_shapes(config)
    stored: dict[str, Path] = {}
    wrong: list[str] = []
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is not a mapping)
                stored[name] = path
                part = tensors.get_slice(name)
                shape = tuple(part.get_shape())
                if name in expected and shape != expected[name]:
                    wrong.append(f"{name} is {list(shape)} and should be {list(expected[name])}")
                if part.get_dtype() not in _FLOAT_DTYPES:
                    wrong.append(f"{name} has dtype {part.get_dtype()}; accepted: {', '.join(_FLOAT_DTYPES)}")
    # some writers store a tied output projection twice
    optional = {OUTPUT} if config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(stored))
    unexpected = sorted(set(stored) - set(expected) - optional)
    if missing or unexpected or wrong:
        problems = [f"missing tensors: {', '.join(missing)}"] if missing else []
        problems += [f"unexpected tensors: {', '.join(unexpected)}"] if unexpected else []
        raise ValueError(f"the weights in {folder} do not fit its config.json: {'; '.join(problems + wrong)}")
    return stored


def _untied_output(folder: Path, stored: dict[str, Path]) -> dict[str, torch.Tensor]:
    """The output projection of a tied model as a tensor of its own; empty if the files have it already."""
    with safe_open(stored[EMBEDDING], framework="pt") as tensors:
        embedding = tensors.get_tensor(EMBEDDING)
    if OUTPUT not in stored:
        return {OUTPUT: embedding}
    with safe_open(stored[OUTPUT], framework="pt") as tensors:
        if not torch.equal(tensors.get_tensor(OUTPUT), embedding):
            raise ValueError(
                f"tie_word_embeddings is True, but {OUTPUT} in {folder} differs from {EMBEDDING}; accepted: "
                "equal tensors, or no output projection"
            )
    return {}


def _make_empty(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder; accepted: a new or an empty folder")
    folder.mkdir(parents=True, exist_ok=True)


def _write_weights(
    files: list[Path], extra: dict[str, torch.Tensor], stored: dict[str, Path], target: Path
) -> None:
    """Copy weight files bit by bit, add one for the extra tensors, and index them if there are several."""
    count = len(files) + bool(extra)
    if count == 1:
        shutil.copyfile(files[0], target / "model.safetensors")
        return
    new_names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    renamed = dict(zip(files, new_names, strict=False))
    for path, name in renamed.items():
        shutil.copyfile(path, target / name)
    weight_map = {name: renamed[path] for name, path in stored.items()}
    if extra:
        save_file(extra, target / new_names[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(extra, new_names[-1])
    total_bytes = sum((target / name).stat().st_size for name in new_names)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_companions(source: Path, target: Path) -> None:
    for name in _COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def main(arguments: list[str] | None = None) -> None:
    """Command line: convert a checkpoint folder; exit code 2 with one line on bad input."""
    parser = argparse.ArgumentParser(prog="python -m ic_model.weights", description="Convert checkpoints.")
    parser.add_argument("direction", choices=("export", "import"), help="to DeepSeek-V3, or from it")
    parser.add_argument("source", type=Path, help="checkpoint folder to read")
    parser.add_argument("target", type=Path, help="new or empty folder to write")
    options = parser.parse_args(arguments)
    convert = export_deepseek_v3 if options.direction == "export" else import_deepseek_v3
    try:
        convert(options.source, options.target)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    sys.stdout.write(f"wrote {options.target}\n")


if __name__ == "__main__":
    main()
