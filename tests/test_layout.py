"""The bones: imports run one way, heavy libraries are imported where they belong, and mlflow/ holds no code."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("persona_models", "router", "pipelines")  # each may import those before it
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Top-level names a file imports; everywhere=False leaves out imports within functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def importers(name: str) -> set[str]:
    return {str(p.relative_to(ROOT)) for p in FILES if any(m.split(".")[0] == name for m in imports(p))}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = PACKAGES.index(path.relative_to(ROOT).parts[0])
    later = {m for m in imports(path) if m.split(".")[0] in PACKAGES[own + 1 :]}
    assert not later, f"{path.name} imports {later}; pipelines -> router -> persona_models"


def test_torch_is_never_imported_in_the_router():
    assert not {f for name in ("torch", "transformers", "peft") for f in importers(name) if f.startswith("router/")} - {"router/server.py"}


def test_mlflow_is_imported_by_one_reader_and_one_writer():
    assert importers("mlflow") == {"persona_models/registry.py", "pipelines/tracking.py"}


def test_ray_is_imported_where_things_are_deployed():
    assert importers("ray") == {"router/app.py", "router/server.py"}


def test_mlflow_folder_is_configuration_only():
    """An __init__.py there would shadow the installed package; any other .py would be silently unreachable."""
    assert not list((ROOT / "mlflow").rglob("*.py"))
    spec = importlib.util.find_spec("mlflow")
    assert "site-packages" in spec.origin


def test_no_init_under_tests_and_no_drawers():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not [p for p in FILES if p.stem in {"utils", "helpers", "common", "misc"}]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no module docstring"


@pytest.mark.parametrize("module", ["persona_models.fake_engine", "persona_models.protocol", "router.desk", "router.ingress", "pipelines.cli"])
def test_the_gateway_loads_without_torch(module):
    """Importing the front door must not cost seconds of torch, nor need it."""
    code = (
        f"import sys, {module}; heavy = [m for m in ('torch', 'transformers', 'mlflow', 'ray') if m in sys.modules]; sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["pipelines.pretrain", "persona_models.engine", "pipelines.bench_engine"])
def test_what_runs_on_a_gpu_machine_needs_no_ray_and_no_mlflow(module):
    code = f"import sys; sys.modules['ray'] = None; sys.modules['mlflow'] = None; import {module}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
