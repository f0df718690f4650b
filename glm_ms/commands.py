"""The console script `glm-ms`: one name for run_glm.py, the tools and the launchers, from any folder."""

from __future__ import annotations

import filecmp
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from glm_ms import spelling
from glm_ms.program import program
from glm_ms.resources import resource
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import not_written
from glm_ms.storage.suggest import did_you_mean
from glm_ms.version import __version__

RUN_MODES = {
    "train": "train all weights",
    "finetune": "train all weights or an adapter",
    "eval": "metrics on a data set",
    "predict": "generate answers to prompts",
    "export": "write MindIR files of the network",
}
# Command -> file of its tool, and what it does.
TOOLS = {
    "convert": ("convert_weight.py", "convert checkpoints between Hugging Face and MindSpore"),
    "merge-lora": ("merge_lora.py", "merge a LoRA adapter into its base, or remove it"),
    "quantize": ("quantize.py", "quantize weights to 8 or 4 bits"),
    "transform-ckpt": ("transform_ckpt.py", "merge or slice the checkpoints of a cluster"),
    "plan": ("plan.py", "memory, compute and traffic of a run before it starts"),
    "inspect": ("inspect_dataset.py", "lengths, truncation and encoded records of a data set"),
    "train-vocab": ("train_vocab.py", "train a SentencePiece vocabulary"),
    "format-tool-alpaca": ("format_tool_alpaca.py", "convert ToolAlpaca to conversations with tools"),
    "check-device": ("check_device.py", "check kernels and numbers of this device"),
    "rank-table": ("hccl_tools.py", "write the rank table of this server"),
    "merge-rank-tables": ("merge_hccl.py", "merge the rank tables of several servers"),
}
# Command -> module of its launcher, and what it does.
LAUNCHERS = {
    "msrun": ("glm_ms.launch.msrun", "start one process per card with msrun"),
    "distribute": ("glm_ms.launch.distribute", "start one process per card of a rank table"),
}
# Command -> module of its measurements, and what it does.
MEASURING = {
    "bench": ("glm_ms.bench.command", "speed and memory of this machine, alone or beside other programs"),
}
# Command -> module of its server or terminal, and what it does.
SERVING = {
    "chat": ("glm_ms.serve.terminal", "a conversation with a model in this terminal"),
    "serve": ("glm_ms.serve.server", "an OpenAI-compatible HTTP server"),
    "web": ("glm_ms.serve.web_demo", "the same server with a chat page"),
}
CONFIGS = "configs"
_USAGE = """usage: glm-ms COMMAND [ARGUMENTS]

{}

glm-ms COMMAND --help lists the arguments of a command. Begin with:
  glm-ms configs --copy tiny
  glm-ms finetune --config configs/tiny/finetune_glm3_tiny.yaml"""


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status, 2 for an unknown command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"glm_ms {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(_USAGE.format("\n".join(f"  {name:20}{text}" for name, text in _descriptions().items())))
        return 0
    before = sys.argv
    # argparse and the usage messages of the tools show this name.
    sys.argv = [f"glm-ms {words[0]}", *words[1:]]
    try:
        return _run(words[0], words[1:])
    finally:
        sys.argv = before


def _run(command: str, rest: Sequence[str]) -> int:
    spelling.register_commands({Path(file).stem: f"glm-ms {name}" for name, (file, _) in TOOLS.items()})
    if command in RUN_MODES and any(word.split("=")[0] in ("--run_mode", "run_mode") for word in rest):
        return _fail(f"glm-ms {command}: sets run_mode; remove it from the arguments")
    run = _find(command)
    if run is None:
        hint = did_you_mean(command, _descriptions(), "; run glm-ms --help")
        return _fail(f"glm-ms {command}: unknown command{hint}")
    return run(rest)


def _find(command: str) -> Callable[[Sequence[str]], int] | None:
    if command in RUN_MODES:
        run_glm = _load(resource("run_glm.py"))
        return lambda rest: run_glm.main(["--run_mode", command, *rest])
    if command in TOOLS:
        return _load(resource("tools") / TOOLS[command][0]).main
    modules = {**LAUNCHERS, **SERVING, **MEASURING}
    if command in modules:
        return importlib.import_module(modules[command][0]).main
    return configs if command == CONFIGS else None


def _load(path: Path) -> ModuleType:
    """Imports a file that is outside the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look up their module by name
    spec.loader.exec_module(module)
    return module


def _descriptions() -> dict[str, str]:
    """Every command and what it does."""
    others = {name: text for name, (_, text) in {**TOOLS, **LAUNCHERS, **SERVING, **MEASURING}.items()}
    return {**RUN_MODES, **others, CONFIGS: "list the configurations, or copy them to a folder"}


def configs(arguments: Sequence[str]) -> int:
    """`glm-ms configs`: lists the YAML files of the package, or copies them with their sample records."""
    parser = Parser(prog="glm-ms configs", description=configs.__doc__)
    parser.add_argument("--copy", nargs="+", metavar="NAME", help="files or folders of the list, or 'all'")
    parser.add_argument("--to", default=".", help="where the folder configs/ is made (default: this folder)")
    options = parser.parse_args(arguments)
    root = resource(CONFIGS)
    if options.copy is not None:
        return _copy(root, options.copy, options.to)
    for path in sorted(root.rglob("*.yaml")):
        print(path.relative_to(root).as_posix())
    return 0


def _copy(root: Path, names: Sequence[str], to: str) -> int:
    """Checks every name and target before it writes the first file."""
    sources: list[Path] = []
    for name in ["."] if "all" in names else names:
        path = (root / name.removeprefix("configs/")).resolve()
        if not name or not path.is_relative_to(root.resolve()) or not path.exists():
            known = [p.relative_to(root).as_posix() for p in [*root.iterdir(), *root.rglob("*.yaml")]]
            return _fail(f"{name}: not a configuration{did_you_mean(name, known, '; run glm-ms configs')}")
        inside = [path] if path.is_file() else sorted(path.rglob("*"))
        sources += [file for file in inside if file.is_file() and "__pycache__" not in file.parts]
    pairs = [(path, Path(to) / CONFIGS / path.relative_to(root.resolve())) for path in sources]
    for source, target in pairs:
        if target.is_file() and not filecmp.cmp(source, target, shallow=False):
            return _fail(f"{target}: exists with other content; rename it, or copy to another folder with --to")
    for source, target in pairs:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        except OSError as error:
            return _fail(not_written(target, error), status=1)
        print(target)
    return 0


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
