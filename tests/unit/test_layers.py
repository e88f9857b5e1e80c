"""What import-linter cannot say: which parts of llama_stack a room may import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TYPES = ("llama_stack.apis",)


def llama_stack_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "llama_stack"}


@pytest.mark.parametrize("room", ["app/domain", "app/api"])
def test_the_domain_and_the_routes_know_only_types(room: str) -> None:
    """llama_stack's APIs and providers are reached through tasks/stack.py and the mounted application alone."""
    modules = sorted((ROOT / room).rglob("*.py"))
    assert modules
    for path in modules:
        assert {name for name in llama_stack_imports(path) if not name.startswith(TYPES)} == set(), path


def test_there_is_no_module_app_main() -> None:
    """It would take the place of the application that `uvicorn app:main` looks for."""
    assert not (ROOT / "app" / "main.py").exists()
