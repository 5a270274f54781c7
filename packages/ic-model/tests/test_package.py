"""What the package imports and what its wheel contains."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ic_model
from ic_model.checkpoints import EMBEDDED, checkpoint_path

PACKAGE = Path(ic_model.__file__).parent
BANNED = {"vllm", "trl", "accelerate", "peft", "datasets", "ic_train", "ic_vllm_plugin"}


def imported_modules(tree: ast.AST) -> set[str]:
    """Top-level names of all modules imported anywhere in a file, also by a string."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names.add(str(node.args[0].value).split(".")[0])
    return names


def test_the_walk_sees_all_forms_of_import() -> None:
    source = (
        "import a.b\ndef f():\n    from c import d\n    importlib.import_module('e.f')\nfrom . import g\n"
    )
    assert imported_modules(ast.parse(source)) == {"a", "c", "e"}


def test_banned_modules_are_not_imported() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        banned = imported_modules(ast.parse(path.read_text(encoding="utf-8"))) & BANNED
        assert not banned, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(banned))}"


def test_files_and_functions_stay_short() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                decorators = [getattr(decorator, "func", decorator) for decorator in node.decorator_list]
                kernel = any(ast.unparse(decorator).endswith(".jit") for decorator in decorators)
                lines = node.end_lineno - node.lineno
                assert lines < (150 if kernel else 80), f"{path}: {node.name}"


def test_the_wheel_contains_the_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    subprocess.run([*command, str(PACKAGE.parents[1])], check=True)
    (wheel,) = tmp_path.glob("ic_model-*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert "ic_model/presets.toml" in packed
    files = [path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*") if path.is_file()]
    # caches of Python and of tools
    data = [path for path in files if not any(part.startswith((".", "__py")) for part in path.parts)]
    missing = {path.as_posix() for path in data} - packed
    assert not missing, "in the source tree, but not in the wheel"


def test_unknown_checkpoint_is_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint 'ic-1b' is not one of ic-nano"):
        checkpoint_path("ic-1b")


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_checkpoint_loads(name: str) -> None:
    folder = checkpoint_path(name)
    if not folder.is_dir():
        pytest.fail(f"the embedded checkpoint {name} is missing from {folder.parent}")
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / file).is_file(), file
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.config.architectures == ["InfiniteContextForCausalLM"]
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    ids = AutoTokenizer.from_pretrained(folder)("The pass key", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids).logits.shape == (1, 12, model.config.vocab_size)
