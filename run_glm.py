"""Trains, evaluates and asks ChatGLM2 / ChatGLM3 networks as a YAML file and flags say.

The flags are explained by `python run_glm.py --help`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from glm_ms.ascend_hints import error_lines, hints
from glm_ms.settings import SettingsError, settings_from_command_line


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, 1 for a run that failed on its input, 2 for unusable settings, 130 interrupted,
    141 for an output pipe that was closed."""
    settings = settings_from_command_line(argv)
    try:
        _make_output_dir(settings.output_dir)
        # MindFormers opens its log files under this folder when it is imported.
        os.environ["LOCAL_DEFAULT_PATH"] = settings.output_dir
        from glm_ms.engine.run import run  # seconds of imports, only once the settings are right

        run(settings)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who reads the output has seen enough (`| head`): no error, and nothing more to write at exit either.
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as error:
        # Errors of cards and their libraries come as the last two; unknown ones keep their traceback.
        unknown = isinstance(error, (RuntimeError, ImportError)) and not hints(str(error))
        if unknown or os.environ.get("GLM_MS_VERBOSE", "0") != "0":
            raise
        for line in error_lines(error):
            print(line, file=sys.stderr)
        return 1
    return 0


def _make_output_dir(path: str) -> None:
    """Raises SettingsError where the folder cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--output_dir: {path}: cannot be made: {error.strerror}; name a folder that can be written"
        ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
