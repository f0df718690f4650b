"""The wheel: what it contains, and that it works in a new environment, from a folder that is not the project."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from engine_helpers import SMALL_NETWORK

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDERS = ("glm_ms", "configs", "tools")
# Without those that run in the interpreter of another program, with its packages.
MODULES = sorted(
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for path in (REPOSITORY / "glm_ms").rglob("*.py")
    if not path.name.endswith("_peer.py")
)
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.prefix), module.__file__
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: building writes into the source folder."""
    pytest.importorskip("pip", reason="needs pip in the environment of the tests")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "run_glm.py"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-input", "--wheel-dir", target, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("glm_ms-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with the wheel; other packages come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("new") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    # Lines of a .pth file extend the path, but .pth files found there are not read: an editable glm_ms stays out.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        folder / "bin" / "python",
        "install",
        "--no-deps",
        "--no-input",
    ]
    done = subprocess.run([*command, wheel], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(environment: Path, *command: str, cwd: Path | str = "/", status: int = 0) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=560, check=False,
        stdin=subprocess.DEVNULL
    )  # fmt: skip
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_wheel_has_every_file_of_the_package_the_configurations_and_the_tools(wheel):
    def expected(folder: str) -> set[str]:
        inside = folder if folder == "glm_ms" else f"glm_ms/{folder}"
        paths = (path for path in (REPOSITORY / folder).rglob("*") if path.is_file())
        return {
            f"{inside}/{path.relative_to(REPOSITORY / folder).as_posix()}"
            for path in paths
            if "__pycache__" not in path.parts
        }

    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {"run_glm.py"}.union(*map(expected, FOLDERS))
    if "glm_ms/ops/cpu/_kernels.so" in names:  # for one platform, but for every Python 3
        assert "-py3-none-" in wheel.name
        assert not wheel.name.endswith("-any.whl")


def test_every_module_imports(environment, tmp_path):
    assert len(MODULES) > 50
    run(environment, "python", "-I", "-c", IMPORT_ALL, *MODULES, cwd=tmp_path)


def test_glm_ms_works_from_the_root_folder(environment, tmp_path):
    assert "finetune" in run(environment, "glm-ms", "--help")
    assert "tiny/finetune_glm3_tiny.yaml" in run(environment, "glm-ms", "configs")
    run(environment, "glm-ms", "configs", "--copy", "tiny", "--to", str(tmp_path))
    sample = tmp_path / "configs" / "tiny" / "sample" / "train.json"
    vocabulary, output = tmp_path / "tokenizer.model", tmp_path / "run"
    run(
        environment, "glm-ms", "train-vocab", "--input", str(sample), "--columns", "content", "summary",
        "--vocab_size", "800", "--output", str(vocabulary)
    )  # fmt: skip
    config = str(tmp_path / "configs" / "tiny" / "finetune_glm3_tiny.yaml")
    keys = [
        f"processor.tokenizer.vocab_file={vocabulary}",
        f"train_dataset.data_loader.dataset_dir={sample}",
        "do_eval=False",
        "runner_config.max_steps=2",
        *SMALL_NETWORK,
    ]
    before = set(os.listdir("/"))
    run(environment, "glm-ms", "finetune", "--config", config, "--output_dir", str(output), *keys)
    run(
        environment, "glm-ms", "predict", "--config", config, "--load_checkpoint", str(output), "--output_dir",
        str(tmp_path / "answers"), "--predict_data", "类型#裤", "generation.max_new_tokens=2", *keys
    )  # fmt: skip
    answers = tmp_path / "answers" / "predict_results.jsonl"
    assert "类型#裤" in answers.read_text(encoding="utf-8")
    run(environment, "glm-ms", "convert", "--input", str(output), "--output", str(tmp_path / "whole.ckpt"))
    assert (tmp_path / "whole.ckpt").is_file()
    plan = run(environment, "glm-ms", "plan", "--config", config, *keys[:2])
    assert "memory" in plan.lower()
    assert set(os.listdir("/")) == before


def test_the_trainer_of_mindformers_finds_its_configurations(environment, tmp_path):
    code = (
        "import glm_ms.mindformers_api\nfrom mindformers import Trainer\n"
        "print(Trainer(task='text_generation', model='glm3_tiny').config.glm_ms.source)"
    )
    shown = run(environment, "python", "-c", code, cwd=tmp_path).splitlines()
    assert any(line.startswith(str(environment)) and line.endswith("_glm3_tiny.yaml") for line in shown)


def test_an_unknown_command_is_refused_with_a_suggestion(environment):
    shown = run(environment, "glm-ms", "finetun", status=2)
    assert "unknown command" in shown
    assert "finetune" in shown


def test_copies_of_configurations_replace_nothing(environment, tmp_path):
    arguments = ("glm-ms", "configs", "--copy", "tiny/finetune_glm3_tiny.yaml", "--to", str(tmp_path))
    run(environment, *arguments)
    copy = tmp_path / "configs" / "tiny" / "finetune_glm3_tiny.yaml"
    run(environment, *arguments)  # an equal file is no obstacle
    copy.write_text("changed", encoding="utf-8")
    assert "exists with other content" in run(environment, *arguments, status=2)
    assert copy.read_text(encoding="utf-8") == "changed"
    assert "not a configuration" in run(environment, "glm-ms", "configs", "--copy", "../tools", status=2)
