"""The process of one subject: reads calls as lines of JSON, answers with lines of JSON.

    python glm_ms/bench/worker.py SUBJECT CORES

Runs by its path, in any interpreter: it makes the package `glm_ms` importable without the folder around it, in which
packages for another interpreter may be.
"""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent


def add_package() -> None:
    """Imports `glm_ms` from where this file is."""
    spec = importlib.util.spec_from_file_location(
        "glm_ms", PACKAGE / "__init__.py", submodule_search_locations=[str(PACKAGE)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["glm_ms"] = module
    spec.loader.exec_module(module)


def main() -> int:
    """Answers calls until the input ends."""
    name, cores = sys.argv[1], [int(core) for core in sys.argv[2].split(",")]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before anything counts cores
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != PACKAGE / "bench"]
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if "glm_ms" not in sys.modules:
        add_package()
    subject: Any = None
    for line in sys.stdin:
        call = json.loads(line)
        try:
            from glm_ms.bench.subjects import Setup, make, peak_memory

            if subject is None:
                subject = make(name)
            arguments = call["arguments"]
            if "setup" in arguments:
                arguments = {**arguments, "setup": Setup(**arguments["setup"])}
            answer = {"value": _plain(getattr(subject, call["method"])(**arguments)), "peak_memory": peak_memory()}
        except Exception as error:
            said = " ".join(str(error).split())  # a message of several lines would break the table
            answer = {"error": f"{type(error).__name__}: {said}", "kind": type(error).__name__}
            traceback.print_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


def _plain(value: Any) -> Any:
    """Arrays as their bytes."""
    return {"float32": base64.b64encode(value.tobytes()).decode()} if hasattr(value, "tobytes") else value


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # libraries may wait for their threads at exit
