"""Rules of the whole repository that can be checked: imports, sizes, documents."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from ic_model.presets import preset
from ic_model.sizing import GIB, size

ROOT = Path(__file__).parents[1]
BANNED_IMPORTS = {
    "ic-model": {"vllm", "trl", "accelerate", "ic_train", "ic_vllm_plugin"},
    "ic-train": {"vllm", "ic_vllm_plugin"},
    "ic-vllm-plugin": {"trl", "accelerate", "ic_train"},
}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 150
MAX_CONTRIBUTING_LINES = 150
# a folder of one person's machine
PRIVATE_PATH = re.compile(r"(?<![\w.$}])/(?:work|root|home/\w+)/")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".ini", ".sh", ""}


def _tracked() -> list[Path]:
    """Files under version control or about to be, that exist; of a tree without git, all."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = list(ROOT.rglob("*"))
    return [path for path in paths if path.is_file()]


def _sources() -> list[Path]:
    return sorted(path for path in _tracked() if path.suffix == ".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", BANNED_IMPORTS)
def test_no_package_imports_what_it_must_not(package):
    files = sorted((ROOT / "packages" / package / "src").rglob("*.py"))
    assert files
    broken = {str(path): sorted(_imports(path) & BANNED_IMPORTS[package]) for path in files}
    assert {path: names for path, names in broken.items() if names} == {}


def _is_kernel(node):
    """One loop over tiles, which Triton inlines anyway."""
    decorators = (getattr(decorator, "func", decorator) for decorator in node.decorator_list)
    return any(ast.unparse(decorator).endswith(".jit") for decorator in decorators)


def test_files_and_functions_stay_short():
    too_long = []
    for path in _sources():
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            too_long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > (MAX_KERNEL_LINES if _is_kernel(node) else MAX_FUNCTION_LINES):
                    too_long.append(f"{path}: {node.name} has {lines} lines")
    assert too_long == []


def test_no_path_of_anyones_machine():
    found = []
    for path in _tracked():
        if path.suffix in TEXT and path != Path(__file__):
            found += [
                f"{path}: {match[0]}" for match in PRIVATE_PATH.finditer(path.read_text(errors="replace"))
            ]
    assert found == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_commands_in_documents_exist(document):
    environments = tomllib.loads((ROOT / "hatch.toml").read_text())["envs"]
    scripts = {f"{name}:{script}" for name, one in environments.items() for script in one.get("scripts", {})}
    named = set(re.findall(r"hatch run ((?:[a-z]+:)?[a-z]+)", (ROOT / document).read_text()))
    assert named
    assert {name if ":" in name else f"default:{name}" for name in named} <= scripts


def test_ci_runs_the_readmes_test_command():
    command = "pip install hatch && hatch run test"
    assert f"\n{command}\n" in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci" / "run").read_text().rstrip().splitlines()[-1] == command


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "tools/cpu-env/README.md"])
def test_links_in_documents_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_memory_in_the_readme_is_what_sizing_says():
    config = preset("ic-1b")
    sizes = size(config, context_tokens=1_048_576)
    text = (ROOT / "README.md").read_text()
    assert f"{sizes.kv_bytes / GIB:.2f} GiB for 1,048,576 tokens" in text
    assert f"takes {sizes.mha_kv_bytes / GIB:.0f} GiB" in text


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= MAX_CONTRIBUTING_LINES


def test_decisions_are_numbered_and_dated():
    decisions = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in decisions] == list(range(1, len(decisions) + 1))
    for path in decisions:
        text = path.read_text()
        assert re.search(r"^Date: \d{4}-\d{2}-\d{2}$", text, re.MULTILINE), path
        for heading in ("## Context", "## Decision", "## Consequences"):
            assert heading in text, path
