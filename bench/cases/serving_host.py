"""Prepare a GPU host that has no package registry: entry points of our packages, and models to serve.

    python -m bench.cases.serving_host --site FOLDER_ON_PYTHONPATH --models FOLDER [--presets ic-1b ...]

vLLM finds plugins by the metadata of installed packages. Where the packages are only on PYTHONPATH there is none:
`--site` gets a `.dist-info` folder for each, made from its pyproject.toml. `--models` gets, per preset, a
checkpoint with random weights and the byte tokenizer, and the same as a DeepSeek-V3, which stock vLLM serves (the
embedded ic-nano is exported, too). Random weights take as long and as much memory as trained ones; their text is
noise.
"""

from __future__ import annotations

import argparse
import os
import tomllib
from pathlib import Path

import torch
from ic_model import ICConfig, checkpoint_path
from ic_model.byte_tokenizer import build_byte_tokenizer
from ic_model.presets import preset, preset_names
from ic_model.weights import export_deepseek_v3, tensor_shapes
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
# the embedded checkpoint has real weights
EMBEDDED = "ic-nano"


def write_dist_info(site: Path) -> list[Path]:
    """Write the metadata of our packages into a folder of PYTHONPATH, as an installer would.

    Args:
        site: made if it is not there.

    Returns:
        the `.dist-info` folders.
    """
    folders = []
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
        name, version = project["name"], project["version"]
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        lines: list[str] = []
        groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
        for group, entries in groups.items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()), ""]
        (folder / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        folders.append(folder)
    return folders


def write_random_checkpoint(
    folder: Path, config: ICConfig, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Write a checkpoint with random weights, as an initialised model has them, and the byte tokenizer.

    It writes printable ASCII: tokens that are no text have zeros as rows of the output. vLLM's detokenizer decodes
    the whole prompt again with every token as long as what was written is no text, 0.2 s a token behind a million.

    Args:
        folder: made if it is not there; what is in it already is kept if the shapes are the same.
        config: shapes.
        dtype: of the weights.
        seed: of the weights.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        if len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=dtype)
        else:
            drawn = torch.empty(shape, device=device, dtype=dtype)
            tensors[name] = drawn.normal_(0, config.initializer_range, generator=generator).cpu()
    tokenizer = build_byte_tokenizer()
    text = tokenizer("".join(map(chr, range(32, 127))), add_special_tokens=False)["input_ids"]
    output = tensors["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    silent = torch.ones(len(output), dtype=torch.bool)
    silent[text] = False
    output[silent] = 0
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype = ["InfiniteContextForCausalLM"], dtype
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def model_folder(models: Path, model: str, *, stock: bool = False) -> Path:
    """Where a model is, ours or as DeepSeek-V3; written first if it is not there.

    Args:
        models: of `--models`.
        model: preset, or a checkpoint folder.
        stock: as DeepSeek-V3.

    Raises:
        ValueError: the model is neither.
    """
    if Path(model).is_dir():
        own = Path(model)
    elif model == EMBEDDED:
        own = checkpoint_path(model)
    elif model in preset_names():
        own = models / model
        if not (own / "tokenizer.json").is_file():
            write_random_checkpoint(own, preset(model))
    else:
        raise ValueError(f"model is {model!r}; accepted: {', '.join(preset_names())}, or a checkpoint folder")
    if not stock:
        return own
    exported = models / f"{Path(model).name}-deepseek"
    if not exported.is_dir():
        partial = models / f"{Path(model).name}-deepseek.{os.getpid()}"
        export_deepseek_v3(own, partial)
        partial.rename(exported)
    return exported


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--site", type=Path, help="folder of PYTHONPATH that gets the entry points")
    parser.add_argument("--models", type=Path, help="folder for checkpoints")
    parser.add_argument("--presets", nargs="*", default=["ic-1b"], help="default: ic-1b")
    options = parser.parse_args(arguments)
    if options.site is None and options.models is None:
        parser.error("nothing to do; accepted: --site, --models or both")
    if options.site is not None:
        for folder in write_dist_info(options.site):
            print(f"wrote {folder}")
    if options.models is not None:
        for name in (EMBEDDED, *options.presets):
            for stock in (False, True):
                folder = model_folder(options.models, name, stock=stock)
                print(f"{name}{' as DeepSeek-V3' if stock else ''}: {folder}")


if __name__ == "__main__":
    main()
