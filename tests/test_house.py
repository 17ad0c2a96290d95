"""The rules a machine can check: who imports whom, what stays light, what the map says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ernie", "erniekit", "fastdeploy")

# A package may not import these, however deep inside a function.
FORBIDDEN = {
    "ernie": {"erniekit", "fastdeploy", "transformers"},
    "erniekit": {"fastdeploy", "transformers"},
    "fastdeploy": {"erniekit", "transformers"},
}

# Inside `ernie`, a module may import only from its own layer or from one further left.
LAYERS = (
    {"settings"},
    {"config", "models"},
    {"kernels", "quant"},
    {"layers", "rope", "moe", "attention", "mtp"},
    {"model"},
    {"checkpoint", "generate", "fused", "adapters", "adapter_files"},
)
# These import neither torch nor the model.
LIGHT = (
    *("ernie.tokenizer", "ernie.chat", "ernie.config", "ernie.models", "ernie.settings"),
    *(
        "ernie.vision.prompt",
        "ernie.vision.processor",
        "ernie.vision.sources",
        "ernie.vision.video",
    ),
)
LIGHT_CLIS = ("erniekit.cli", "fastdeploy.cli", "fastdeploy.entrypoints.openai.api_server")


def modules() -> Iterator[tuple[str, Path]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), path


def imports_of(path: Path, *, run_at_import: bool = False) -> set[str]:
    """Modules that a file imports; `run_at_import` leaves out those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if run_at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides who imports whom"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    found = [i for i, names in enumerate(LAYERS) if len(parts) > 1 and parts[1] in names]
    return found[0] if parts[0] == "ernie" and found else None


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_follow_the_rules(name: str, path: Path) -> None:
    imported = imports_of(path)
    roots = {i.split(".")[0] for i in imported}
    assert not roots & FORBIDDEN[name.split(".")[0]], f"{name} imports {roots}"
    own = layer_of(name)
    for other in imports_of(path, run_at_import=True):
        theirs = layer_of(other)
        assert own is None or theirs is None or theirs <= own, f"{name} imports {other} above it"


@pytest.mark.parametrize("name", LIGHT + LIGHT_CLIS)
def test_light_modules_import_without_torch(name: str) -> None:
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"importing {name} also imports torch\n{done.stderr}"


def test_no_pickle_anywhere() -> None:
    for name, path in modules():
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\bimport pickle\b|torch\.(load|save)\(|allow_pickle=True", source), (
            name
        )


def test_readme_tables_and_tree_are_up_to_date() -> None:
    command = [sys.executable, "docs/readme.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
