"""House rules that can be measured: sizes, forbidden calls, the top level, the version."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from glm_ms.version import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
TOP_LEVEL = {
    "configs", "glm_ms", "tools", "scripts", "tests", "run_glm.py", "README.md", "README_CN.md",
    "pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs",
}  # fmt: skip
# Packages whose work it is to write to the terminal.
TERMINAL_OWNERS = ("glm_ms/commands.py", "glm_ms/engine/", "glm_ms/mindformers_api/", "glm_ms/selfcheck/")


def product_files() -> list[str]:
    folders = [path for name in ("glm_ms", "tools") for path in (REPOSITORY / name).rglob("*.py")]
    paths = [path for path in [*folders, REPOSITORY / "run_glm.py"] if path.is_file()]
    return sorted(path.relative_to(REPOSITORY).as_posix() for path in paths)


FILES = product_files()


def syntax_tree(name: str) -> ast.Module:
    return ast.parse((REPOSITORY / name).read_text(encoding="utf-8"), filename=name)


def plain_calls(tree: ast.Module, names: set[str]) -> list[str]:
    """Calls of built-in functions; `metric.eval()` is a method and none of them."""
    return [
        f"line {node.lineno}: {node.func.id}()"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]


def long_functions(tree: ast.Module) -> list[str]:
    return [
        f"line {node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno - node.lineno + 1 >= MAX_FUNCTION_LINES
    ]


def bare_excepts(tree: ast.Module) -> list[str]:
    return [
        f"line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]


@pytest.mark.parametrize("name", FILES)
def test_file_and_functions_are_short(name):
    assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) < MAX_FILE_LINES
    assert not long_functions(syntax_tree(name))


@pytest.mark.parametrize("name", FILES)
def test_no_dangerous_or_careless_code(name):
    tree = syntax_tree(name)
    assert not plain_calls(tree, {"eval", "exec"})
    assert not bare_excepts(tree)
    stars = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]
    assert not stars


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("glm_ms/")])
def test_library_does_not_print(name):
    if not name.startswith(TERMINAL_OWNERS):
        assert not plain_calls(syntax_tree(name), {"print"})


def test_checks_find_what_they_look_for():
    body = "\n".join(["    pass"] * (MAX_FUNCTION_LINES - 1))
    tree = ast.parse(f"try:\n    eval('1')\nexcept:\n    metric.eval(); print(1)\ndef f():\n{body}\n")
    assert plain_calls(tree, {"eval", "exec"}) == ["line 2: eval()"]
    assert plain_calls(tree, {"print"}) == ["line 4: print()"]
    assert bare_excepts(tree) == ["line 3"]
    assert long_functions(tree) == [f"line 5: f has {MAX_FUNCTION_LINES} lines"]


def test_top_level_holds_what_a_user_expects():
    if shutil.which("git") is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: build products cannot be told from files of the project")
    command = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout.decode("utf-8")
    names = {path.split("/")[0] for path in listing.split("\0") if path}
    assert {name for name in names if not name.startswith(".")} <= TOP_LEVEL


def test_version_is_in_the_changelog():
    path = REPOSITORY / "CHANGELOG.md"
    assert path.is_file(), "CHANGELOG.md is missing"
    changelog = path.read_text(encoding="utf-8")
    assert re.search(rf"^#+ .*(?<![\d.]){re.escape(__version__)}(?![\d.])", changelog, re.MULTILINE), (
        f"CHANGELOG.md: no heading for version {__version__}"
    )
