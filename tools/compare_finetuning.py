"""Full finetuning, LoRA and P-Tuning v2 from one base on ADGEN records: a table of cost and effect.

    python tools/compare_finetuning.py --records AdvertiseGen/dev.json --output_dir output/comparison

Half of the records train the base, which writes an advert from attributes. The others turn the task round: the
attributes are to be read off the advert. All three ways learn that from the same base, batch for batch, and are
measured on the same held-out records. The networks are tiny and the records few, so the table compares the ways with
each other and says nothing about a 6B model.

Every step is a run of run_glm.py. A step that is done is not repeated: give the same --output_dir again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

if __name__ == "__main__":  # runs from a checkout without installation
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from glm_ms.convert.safetensors_file import SafetensorsFile
from glm_ms.data.datasets import epoch_order
from glm_ms.data.encoder import Columns
from glm_ms.data.records import read_prompt_and_answer
from glm_ms.program import program
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import CheckpointError, DataError
from glm_ms.storage.json_lines import parse_value, raw_values
from glm_ms.storage.run_folder import resolve_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "tiny" / "finetune_glm3_tiny.yaml"
COLUMNS = ("content", "summary")
SOURCE_LENGTH = TARGET_LENGTH = 127
WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "prefix_encoder.safetensors")


@dataclass(frozen=True)
class Way:
    """One way to finetune.

    Attributes:
        name: as it stands in the table.
        settings: overrides of the run.
    """

    name: str
    settings: tuple[str, ...] = ()


# Learning rates are the best of a few on held-out records; a prefix wants a larger one than weights.
WAYS = {
    "full": Way("full", ("lr_schedule.learning_rate=1e-3",)),
    "lora": Way(
        "LoRA, rank 8, all linear layers",
        ("model.pet_config.pet_type=lora", "model.pet_config.lora_dropout=0.0",
         r"model.pet_config.target_modules=.*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)",
         "lr_schedule.learning_rate=5e-3")
    ),
    "ptuning2": Way(
        "P-Tuning v2, 32 positions",
        ("model.pet_config.pet_type=ptuning2", "model.pet_config.pre_seq_len=32",
         "model.pet_config.dropout_prob=0.0", "lr_schedule.learning_rate=0.3")
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line; flags may not be shortened."""
    parser = Parser(
        description=(__doc__ or "").split("\n")[0],
        epilog="Example: python tools/compare_finetuning.py --records AdvertiseGen/dev.json",
    )
    parser.add_argument("--records", required=True, metavar="FILE", help="ADGEN records, JSON lines")
    parser.add_argument("--output_dir", default="output/comparison", metavar="FOLDER", help="runs and table")
    parser.add_argument(
        "--vocab_file", metavar="FILE", help="tokenizer.model (default: 2000 pieces trained on the base's records)"
    )
    parser.add_argument("--pretrain_steps", type=int, default=400, metavar="N", help="updates of the base")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="updates of each way")
    parser.add_argument("--held_out", type=int, default=100, metavar="N", help="records to measure on")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the split and of the runs")
    return parser


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the comparison; returns the exit status: 0 done, 1 a step failed, 2 wrong usage."""
    options = build_parser().parse_args(arguments)
    try:
        comparison = Comparison(options)
        comparison.prepare()
        table = comparison.run()
    except (DataError, CheckpointError, OSError, StepError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; what is done is kept", file=sys.stderr)
        return 130
    (comparison.folder / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")
    return 0


class StepError(RuntimeError):
    """A run of another program failed; the message names its log."""


class Comparison:
    """The runs of a comparison in one folder.

    Args:
        options: see `build_parser`.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.output_dir).resolve()
        self.vocab_file = Path(options.vocab_file or self.folder / "tokenizer.model").resolve()

    def prepare(self) -> None:
        """Splits the records and sees to the vocabulary."""
        path = Path(self.options.records)
        found = (
            read_prompt_and_answer(parse_value(raw, path), f"{path}:{raw.line}", Columns(*COLUMNS))
            for raw in raw_values(path)
        )
        records = [record for record in found if record is not None]
        held_out, half = self.options.held_out, len(records) // 2
        if held_out < 1 or half <= held_out:
            raise DataError(f"{self.options.records}: {len(records)} records; more than {2 * held_out} are needed")
        order = epoch_order(len(records), self.options.seed, 0)
        parts = {"base": order[:half], "train": order[half:-held_out], "held_out": order[-held_out:]}
        self.folder.mkdir(parents=True, exist_ok=True)
        for part, chosen in parts.items():
            lines = (
                json.dumps(dict(zip(COLUMNS, (message.content for message in records[i]))), ensure_ascii=False)
                for i in chosen
            )
            self._records(part).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        if not self.vocab_file.is_file():
            self._call(
                "vocabulary", [str(ROOT / "tools" / "train_vocab.py"), "--input", str(self._records("base")),
                "--columns", *COLUMNS, "--vocab_size", "2000", "--output", str(self.vocab_file)]
            )  # fmt: skip

    def run(self) -> str:
        """Trains and measures everything; returns the table."""
        self._train("base", COLUMNS, self.options.pretrain_steps, "base", ("lr_schedule.learning_rate=3e-3",))
        base = f"load_checkpoint={self.folder / 'base'}"
        before = self._evaluate("base", (base,))
        rows = [("the base as it is", 0, None, before)]
        backwards = COLUMNS[::-1]
        for key, way in WAYS.items():
            seconds = self._train(key, backwards, self.options.steps, "train", (*way.settings, base))
            trained = self.folder / key
            load = (f"load_checkpoint={trained}",) if key == "full" else (base, f"load_adapter={trained}")
            rows.append((way.name, self._trained(key), seconds, self._evaluate(key, load)))
        return self._table(rows)

    def _train(self, name: str, columns: Sequence[str], steps: int, part: str, settings: Sequence[str]) -> float:
        epochs = -(-steps // max(_count_lines(self._records(part)) // 16, 1))
        return self._step(
            name, "finetune",
            (f"train_dataset.data_loader.dataset_dir={self._records(part)}",
             f"train_dataset.data_loader.origin_columns=[{','.join(columns)}]", f"runner_config.epochs={epochs}",
             f"runner_config.max_steps={steps}", "checkpoint.save_steps=null", "logging.tensorboard=False", *settings)
        )  # fmt: skip

    def _evaluate(self, name: str, load: Sequence[str]) -> dict[str, float]:
        arguments = (
            *load, "eval_dataset.batch_size=20",
            f"eval_dataset.data_loader.dataset_dir={self._records('held_out')}",
            f"eval_dataset.data_loader.origin_columns=[{','.join(COLUMNS[::-1])}]",
        )  # fmt: skip
        self._step(f"{name}_eval", "eval", arguments)
        return json.loads((self.folder / f"{name}_eval" / "eval_scores.json").read_text(encoding="utf-8"))

    def _step(self, name: str, run_mode: str, settings: Sequence[str]) -> float:
        """One run of run_glm.py, unless it has been made; its seconds, start of the program included."""
        lengths = {"max_source_length": SOURCE_LENGTH, "max_target_length": TARGET_LENGTH}
        arguments = [
            str(ROOT / "run_glm.py"), "--config", str(CONFIG), "--run_mode", run_mode, "--seed", str(self.options.seed),
            "--output_dir", str(self.folder / name), f"processor.tokenizer.vocab_file={self.vocab_file}",
            f"model.model_config.seq_length={SOURCE_LENGTH + TARGET_LENGTH + 1}",
            *(f"{part}_dataset.{key}={value}" for part in ("train", "eval") for key, value in lengths.items()),
            f"generation.max_new_tokens={TARGET_LENGTH}", *settings,
        ]  # fmt: skip
        return self._call(name, arguments)

    def _call(self, name: str, arguments: list[str]) -> float:
        """Runs a Python program once; a record of it tells a later call that nothing is left to do.

        A record is for these arguments and for the contents of all that was there when the program began: records,
        vocabulary, and the records of the steps before it.
        """
        record, key = self.folder / f"{name}.done.json", self._key(name, arguments)
        if record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            if known["key"] == key:
                return known["seconds"]
            record.unlink()
        print(f"{name} ...", file=sys.stderr, flush=True)
        started, log = time.monotonic(), self.folder / f"{name}.log"
        with log.open("w", encoding="utf-8") as output:
            command = [sys.executable, *arguments]
            status = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
        if status:
            raise StepError(f"{name} ended with status {status}; see {log}")
        seconds = time.monotonic() - started
        record.write_text(json.dumps({"key": key, "seconds": seconds}), encoding="utf-8")
        return seconds

    def _key(self, name: str, arguments: list[str]) -> str:
        """SHA-256 of arguments and inputs. All depends on the base, an evaluation on its training as well."""
        before = [step for step in ("base", name.removesuffix("_eval")) if step != name]
        inputs = [self._records(part) for part in ("base", "train", "held_out")]
        inputs += [self.folder / f"{step}.done.json" for step in before if name not in ("vocabulary", "base")]
        inputs += [self.vocab_file] if name != "vocabulary" else []
        digest = hashlib.sha256(json.dumps(arguments).encode())
        for path in inputs:
            digest.update(path.read_bytes() if path.is_file() else b"")
        return digest.hexdigest()

    def _trained(self, name: str) -> int:
        """Numbers that a run has trained: those of the weights it has saved."""
        folder = resolve_checkpoint(self.folder / name)
        file = SafetensorsFile(next(folder / weights for weights in WEIGHTS if (folder / weights).is_file()))
        return sum(prod(info.shape) for info in file.entries.values())

    def _table(self, rows: list[tuple[str, int, float | None, dict[str, float]]]) -> str:
        whole = self._trained("full")
        lines = [
            "| | trained parameters | share | time | held-out perplexity | rouge-l |",
            "|---|---|---|---|---|---|",
        ]
        for name, trained, seconds, scores in rows:
            cells = [
                name, f"{trained:,}", f"{100 * trained / whole:.1f} %", "" if seconds is None else f"{seconds:.0f} s",
                f"{scores['perplexity']:.2f}", f"{scores['rouge-l']:.1f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
        options, count = self.options, _count_lines(self._records("train"))
        lines += [
            "",
            f"{options.steps} updates of 16 rows each, from a base of {options.pretrain_steps}; {count} records to "
            f"train on, {options.held_out} held out. Time with the start of the program. Machine: {machine()}.",
        ]
        return "\n".join(lines) + "\n"

    def _records(self, part: str) -> Path:
        return self.folder / f"{part}.json"


def _count_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def machine() -> str:
    """Processor, cores this process may use, memory."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {cores} cores, {memory:.0f} GiB"


if __name__ == "__main__":
    sys.exit(main())
