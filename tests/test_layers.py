import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "encoders": set(),
    "llm": {"encoders.media"},
    "decoders": {"encoders.media"},
    "alignment": {"encoders", "llm", "decoders"},
    "services": {"alignment", "encoders", "llm", "decoders"},
    "deploy": {"services", "alignment", "encoders", "llm", "decoders"},
}
RAY_FILES = {"services/deployments.py", "services/cluster.py", "deploy/app.py", "deploy/serve.py"}
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Yield the full names of all modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; imports are absolute here"
            module = node.module or ""
            is_ours = module.partition(".")[0] in MAY_IMPORT
            # `from encoders import media` imports encoders.media
            yield from (f"{module}.{alias.name}" for alias in node.names) if is_ours else [module]


def allowed(package: str, name: str) -> bool:
    owner = name.partition(".")[0]
    if owner == package or owner not in MAY_IMPORT:
        return True
    return any(name == known or name.startswith(f"{known}.") for known in MAY_IMPORT[package])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = [name for name in imported(path) if not allowed(package, name)]
    assert not wrong, f"{package} may import {sorted(MAY_IMPORT[package])} only"


def test_ray_is_imported_in_the_deployment_shells_and_in_deploy_only() -> None:
    users = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name.partition(".")[0] == "ray" for name in imported(path))
    }
    assert users == RAY_FILES


def test_the_guard_sees_a_forbidden_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from services.agent import Agent\n    import encoders.imagebind\n")
    names = list(imported(bad))
    assert [allowed("llm", name) for name in names] == [False, False]
    assert allowed("llm", "encoders.media.Modality")
    assert not allowed("llm", "encoders.media_headers")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_top_level_names_are_those_of_this_checkout(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    assert Path(module.__file__).resolve().parent == ROOT / package


def test_the_gateway_and_the_agent_do_without_torch() -> None:
    import subprocess

    code = (
        "import sys, services.gateway, services.agent, services.client\n"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
