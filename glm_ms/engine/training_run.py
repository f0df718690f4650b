"""What is known of a training run before anything is built or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_ms.engine.batches import TrainingPlan, TrainingRows
from glm_ms.engine.checkpoints.manifest import Manifest
from glm_ms.engine.evaluate import Evaluator
from glm_ms.engine.ranks import Ranks
from glm_ms.engine.step.training import Training
from glm_ms.settings import Settings
from glm_ms.tokenizer import SentencePieceTokenizer


@dataclass(frozen=True)
class TrainingRun:
    """A checked run.

    Attributes:
        settings, tokenizer, ranks: of the run.
        say: takes lines for the user.
        rows, plan: training rows, and which of them each step takes.
        position: what a resumed run must share with it, see `glm_ms.engine.checkpoints.position`.
        checkpoint, manifest: the checkpoint to resume from; None for a new run.
        training: network, training step and checkpoints, not built yet.
        evaluator: of `do_eval`, or None.
    """

    settings: Settings
    tokenizer: SentencePieceTokenizer
    ranks: Ranks
    say: Callable[[str], None]
    rows: TrainingRows
    plan: TrainingPlan
    position: dict[str, Any]
    checkpoint: Path | None
    manifest: Manifest | None
    training: Training
    evaluator: Evaluator | None

    @property
    def start(self) -> int:
        """Updates already made."""
        return 0 if self.manifest is None else self.manifest.step

    @property
    def output_dir(self) -> Path:
        return Path(self.settings.output_dir)

    def plot(self) -> None:
        """Draws the curves of the run."""
        from glm_ms.engine.report.plots import write_plots  # matplotlib takes half a second

        write_plots(self.output_dir, self.say)
