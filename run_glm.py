"""Trains, evaluates and prompts ChatGLM2 / ChatGLM3 networks from a YAML file and flags.

`python run_glm.py --help` explains the flags.
"""

from __future__ import annotations

import sys
from pathlib import Path

from glm_ms.program import library_imports, program, signal_thread


def main(argv: list[str]) -> int:
    """Returns the exit status: 0, 1 for a run that failed on its input, 2 for unusable settings."""
    with signal_thread() as imported:
        from glm_ms.ascend_hints import error_lines, hints
        from glm_ms.engine.process import is_verbose, quiet_imports
        from glm_ms.settings import SettingsError, settings_from_command_line

        settings = settings_from_command_line(argv)
        try:
            _make_output_dir(settings.output_dir)
            with quiet_imports(log_folder=settings.output_dir), library_imports():
                # They take seconds, so only after the settings are checked.
                from glm_ms.engine.run import import_libraries, run

                import_libraries(settings)
            imported()
            run(settings)
        except SettingsError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:
            raise
        except (ValueError, OSError, FloatingPointError, RuntimeError, ImportError) as error:
            # Cards and their libraries raise RuntimeError and ImportError; unknown ones keep their traceback.
            unknown = isinstance(error, (RuntimeError, ImportError)) and not hints(str(error))
            if unknown or is_verbose():
                raise
            for line in error_lines(error):
                print(line, file=sys.stderr)
            return 1
    return 0


def _make_output_dir(path: str) -> None:
    """Raises SettingsError if the folder cannot be made."""
    from glm_ms.settings import SettingsError

    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"--output_dir: {path}: cannot be made: {error.strerror}; name a folder that can be written"
        ) from None


if __name__ == "__main__":
    sys.exit(program(main)(sys.argv[1:]))
