"""Imports go downward only; what a package may import stands in one table."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# Package or top module of glm_ms -> what else of glm_ms it may import. "model.config" allows that module alone.
MAY_IMPORT = {
    "version": (),
    "resources": (),
    "commands": ("version", "resources", "storage", "launch"),
    "storage": (),
    "ascend_hints": (),
    "ops": (),
    "model": ("ops",),
    "launch": ("storage", "ascend_hints"),
    "tokenizer": ("storage",),
    "metrics": ("storage",),
    "settings": ("storage", "model.config", "parallel.config", "ascend_hints"),
    "data": ("storage", "tokenizer"),
    "peft": ("storage", "model", "ops", "convert"),  # adapters are checkpoints
    "plan": ("storage", "settings", "convert", "peft", "parallel", "generation", "model.config"),
    "quant": ("model", "ops"),
    "parallel": ("model", "ops"),
    "generation": ("storage", "model", "tokenizer", "peft", "quant"),
    "convert": ("storage", "model.config"),
    "pretrained": ("storage", "model.config", "convert", "peft", "quant", "generation"),
    "serve": ("generation", "convert", "peft", "quant", "tokenizer"),
}
MAY_IMPORT["engine"] = tuple(name for name in MAY_IMPORT if name != "serve")
MAY_IMPORT["selfcheck"] = (*MAY_IMPORT["engine"], "engine")
MAY_IMPORT["mindformers_api"] = (*MAY_IMPORT["engine"], "engine")
MAY_IMPORT["engine"] += ("mindformers_api",)  # until its classes are no longer registered on import
# The lazy exports of glm_ms/__init__.py.
MAY_IMPORT["__init__"] = ("version", "model.config", "generation", "pretrained", "tokenizer")

WITHOUT_MINDSPORE = ("launch", "tokenizer", "metrics", "data", "settings")
MINDFORMERS_OWNERS = ("engine", "mindformers_api")
NOT_FOR_IMPORT = ("tools", "tests", "scripts", "run_glm")

# Import name -> distribution, where they differ by more than case and hyphens.
DISTRIBUTIONS = {"yaml": "pyyaml"}


class Import(NamedTuple):
    """One import of one module."""

    source: str  # importing module, glm_ms.data.records
    target: str  # imported module, as far as it is a module of glm_ms; else the dotted name
    line: int
    at_start: bool  # runs when the importing module is imported

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {self.target}"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class ImportCollector(ast.NodeVisitor):
    """Collects imports anywhere in a module: nested ones, relative ones, and import_module with a constant."""

    def __init__(self, source: str, is_package: bool, modules: set[str]) -> None:
        self.source, self.modules = source, modules
        self.package = source if is_package else source.rpartition(".")[0]
        self.found: list[Import] = []
        self._depth = 0

    def _add(self, target: str, node: ast.AST) -> None:
        self.found.append(Import(self.source, target, node.lineno, self._depth == 0))

    def _visit_deferred(self, node: ast.AST) -> None:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_deferred  # noqa: N815  (ast's names)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)
            return
        self._depth += 1
        for child in node.body:
            self.visit(child)
        self._depth -= 1
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join(
                [*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])]
            )
        for alias in node.names:
            member = f"{base}.{alias.name}"
            self._add(member if member in self.modules else base, node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called in ("importlib.import_module", "import_module", "__import__") and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self._add(name.value, node)
        self.generic_visit(node)


def collect(folder: Path, root: Path) -> list[Import]:
    paths = sorted(folder.rglob("*.py"))
    modules = {module_name(path, root) for path in paths}
    # A folder without __init__.py is a package as well.
    modules |= {".".join(name.split(".")[:n]) for name in modules for n in range(1, name.count(".") + 1)}
    found = []
    for path in paths:
        collector = ImportCollector(module_name(path, root), path.name == "__init__.py", modules)
        collector.visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        found += collector.found
    return found


def unit(module: str) -> str:
    """Package or top module of glm_ms that a module is part of."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def forbidden(imports: list[Import]) -> list[Import]:
    """Imports within glm_ms that the table does not allow."""
    wrong = []
    for item in imports:
        if item.target.split(".")[0] != "glm_ms":
            continue
        source = unit(item.source)
        allowed = (source, *MAY_IMPORT.get(source, ()))
        inside = item.target[len("glm_ms.") :]
        if not any(inside == name or inside.startswith(f"{name}.") for name in allowed):
            wrong.append(item)
    return wrong


@pytest.fixture(scope="module")
def imports():
    return collect(REPOSITORY / "glm_ms", REPOSITORY)


def third_party(item: Import) -> str:
    return item.target.split(".")[0]


def lines(found) -> str:
    return "\n".join(map(str, found))


def test_every_package_is_in_the_table(imports):
    assert {unit(item.source) for item in imports} <= set(MAY_IMPORT)


def test_imports_go_downward(imports):
    wrong = forbidden(imports)
    assert not wrong, lines(wrong)


def test_only_the_engine_imports_mindformers(imports):
    wrong = [
        item
        for item in imports
        if third_party(item) in ("mindformers", "transformers")
        and unit(item.source) not in MINDFORMERS_OWNERS
    ]
    assert not wrong, lines(wrong)


def test_packages_without_mindspore(imports):
    wrong = [
        item
        for item in imports
        if third_party(item) == "mindspore"
        and (unit(item.source) in WITHOUT_MINDSPORE or item.source == "glm_ms.model.config")
    ]
    assert not wrong, lines(wrong)


def test_torch_only_inside_functions(imports):
    everywhere = [*imports, *collect(REPOSITORY / "tools", REPOSITORY)]
    wrong = [item for item in everywhere if third_party(item) == "torch" and item.at_start]
    assert not wrong, lines(wrong)


def test_nothing_imports_the_outside(imports):
    wrong = [item for item in imports if third_party(item) in NOT_FOR_IMPORT]
    assert not wrong, lines(wrong)


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """One cycle of a directed graph as a path that ends where it begins; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for follower in sorted(edges.get(node, ())):
                cycle = walk(follower, [*path, node])
                if cycle:
                    return cycle
            done.add(node)
        return []

    return next((cycle for node in sorted(edges) for cycle in [walk(node, [])] if cycle), [])


def test_no_cycles_between_modules(imports):
    edges: dict[str, set[str]] = {}
    for item in imports:
        # A package and its own modules name each other by nature; the modules' imports tell.
        if item.at_start and not item.source.startswith(f"{item.target}."):
            edges.setdefault(item.source, set()).add(item.target)
    assert not find_cycle(edges), " -> ".join(find_cycle(edges))


def declared(section: str) -> set[str]:
    """Names of the distributions in one list of pyproject.toml (Python 3.9 has no TOML reader)."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(rf"^{section} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    assert block, f"pyproject.toml: no {section}"
    return {re.split(r"[^\w.-]", entry)[0].lower() for entry in ast.literal_eval(block[1])}


@pytest.mark.skipif(sys.version_info < (3, 10), reason="the list of standard modules needs Python 3.10")
def test_third_party_imports_are_declared():
    found = [
        *collect(REPOSITORY / "glm_ms", REPOSITORY),
        *collect(REPOSITORY / "tools", REPOSITORY),
    ]
    dependencies, extra = declared("dependencies"), declared("torch")
    beside = {path.stem for path in (REPOSITORY / "tools").glob("*.py")}
    wrong = []
    for item in found:
        name = third_party(item)
        if name in {"glm_ms", *sys.stdlib_module_names, *beside}:
            continue
        distribution = DISTRIBUTIONS.get(name, name.replace("_", "-")).lower()
        if distribution not in {entry.replace("_", "-") for entry in dependencies | extra}:
            wrong.append(item)
    assert not wrong, lines(wrong)
    assert "torch" in extra - dependencies


def run_python(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_load_without_mindformers():
    loaded = run_python(
        "import sys, glm_ms\n"
        "before = sorted({'mindspore', 'numpy'} & set(sys.modules))\n"
        "for name in glm_ms.__all__: assert getattr(glm_ms, name) is not None\n"
        "print(before, sorted({'mindformers', 'transformers', 'torch'} & set(sys.modules)))\n"
    )
    assert loaded == "[] []"


@pytest.mark.parametrize("package", WITHOUT_MINDSPORE)
def test_package_loads_without_mindspore(package):
    loaded = run_python(
        f"import sys, glm_ms.{package}\n"
        "print(sorted({'mindspore', 'mindformers', 'transformers', 'torch'} & set(sys.modules)))\n"
    )
    assert loaded == "[]"


def collected_from(tmp_path, files):
    for name, text in files.items():
        path = tmp_path / "glm_ms" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return collect(tmp_path / "glm_ms", tmp_path)


def test_the_collector_sees_every_form(tmp_path):
    found = collected_from(
        tmp_path,
        {
            "__init__.py": "",
            "ops/__init__.py": "def f():\n    from glm_ms.model import glm\n",
            "model/__init__.py": "from .glm import Net\nfrom ..ops import f\n",
            "model/glm.py": "import importlib\nimportlib.import_module('glm_ms.engine.run')\nclass Net: import torch\n",
            "data/rows.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import glm_ms.serve\n"
            "else:\n    from glm_ms import engine\n",
            "engine/run.py": "",
        },
    )
    seen = {(item.source, item.target, item.at_start) for item in found}
    assert seen == {
        ("glm_ms.ops", "glm_ms.model.glm", False),
        ("glm_ms.model", "glm_ms.model.glm", True),
        ("glm_ms.model", "glm_ms.ops", True),
        ("glm_ms.model.glm", "importlib", True),
        ("glm_ms.model.glm", "glm_ms.engine.run", True),
        ("glm_ms.model.glm", "torch", True),
        ("glm_ms.data.rows", "typing", True),
        ("glm_ms.data.rows", "glm_ms.serve", False),
        ("glm_ms.data.rows", "glm_ms.engine", True),
    }
    assert {(item.source, item.target) for item in forbidden(found)} == {
        ("glm_ms.ops", "glm_ms.model.glm"),
        ("glm_ms.model.glm", "glm_ms.engine.run"),
        ("glm_ms.data.rows", "glm_ms.serve"),
        ("glm_ms.data.rows", "glm_ms.engine"),
    }


def test_the_root_is_no_way_around_the_table(tmp_path):
    found = collected_from(tmp_path, {"__init__.py": "", "data/a.py": "from glm_ms import load_pretrained\n"})
    assert [str(item) for item in forbidden(found)] == ["glm_ms.data.a:1 imports glm_ms"]


def test_one_module_of_a_package_is_not_the_package(tmp_path):
    files = {
        "settings/a.py": "from glm_ms.model.config import C\nfrom glm_ms.model import glm\n",
        "model/glm.py": "",
    }
    found = collected_from(tmp_path, {**files, "model/config.py": ""})
    assert [str(item) for item in forbidden(found)] == ["glm_ms.settings.a:2 imports glm_ms.model.glm"]


def test_a_cycle_is_found():
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}}) == []
