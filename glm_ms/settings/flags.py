"""The one table of command line flags: name -> key, shape of the value, help."""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    """A flag of `run_glm.py`.

    Attributes:
        key: the key it sets; None for --batch_size, whose key depends on the run mode.
        value: what stands for the value in the help text.
        doc: one line of help.
        bare: what the flag means without a value; None: a value must follow.
    """

    key: str | None
    value: str
    doc: str
    bare: str | None = None


FLAGS = {
    "run_mode": Flag("run_mode", "{train,finetune,eval,predict}", "what to do"),
    "load_checkpoint": Flag(
        "load_checkpoint", "PATH", "weights: folder, .safetensors, .ckpt or a run's output"
    ),
    "load_adapter": Flag("load_adapter", "PATH", "LoRA or P-Tuning adapter on top of those weights"),
    "train_dataset": Flag("train_dataset.data_loader.dataset_dir", "PATH", "training records"),
    "eval_dataset": Flag("eval_dataset.data_loader.dataset_dir", "PATH", "records of --run_mode eval"),
    "predict_data": Flag(
        "predict_data", "TEXT", "a prompt, a .txt or .jsonl file of prompts, or - for stdin"
    ),
    "device_target": Flag("context.device_target", "{CPU,Ascend}", "kind of device"),
    "device_id": Flag("context.device_id", "N", "which card, for a run on a single card"),
    "use_parallel": Flag("use_parallel", "[BOOL]", "several cards; start with msrun", "True"),
    "output_dir": Flag("output_dir", "PATH", "folder for checkpoints, logs and predictions"),
    "resume_training": Flag(
        "resume_training",
        "[BOOL|PATH]",
        "go on from the newest checkpoint in output_dir, or from PATH",
        "True",
    ),
    "epochs": Flag("runner_config.epochs", "N", "passes over the training data"),
    "batch_size": Flag(None, "N", "batch size of the run mode: training rows, eval rows or prompts"),
    "seed": Flag("seed", "N", "start of every random sequence"),
}
