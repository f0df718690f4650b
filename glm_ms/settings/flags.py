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
        former: its name in run_mindformer.py, accepted as well.
    """

    key: str | None
    value: str
    doc: str
    bare: str | None = None
    former: str | None = None


FLAGS = {
    "run_mode": Flag("run_mode", "{train,finetune,eval,predict}", "what to do"),
    "load_checkpoint": Flag(
        "load_checkpoint", "PATH", "weights: folder, .safetensors, .ckpt or a run's output"
    ),
    "load_adapter": Flag("load_adapter", "PATH", "LoRA or P-Tuning adapter on top of those weights"),
    "train_dataset": Flag(
        "train_dataset.data_loader.dataset_dir", "PATH", "training records", former="train_dataset_dir"
    ),
    "eval_dataset": Flag(
        "eval_dataset.data_loader.dataset_dir", "PATH", "records of evaluations", former="eval_dataset_dir"
    ),
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
    "do_eval": Flag("do_eval", "[BOOL]", "evaluate on eval_dataset while training", "True"),
    "epochs": Flag("runner_config.epochs", "N", "passes over the training data"),
    "batch_size": Flag(None, "N", "batch size of the run mode: training rows, eval rows or prompts"),
    "seed": Flag("seed", "N", "start of every random sequence"),
}
FORMER_FLAGS = {flag.former: name for name, flag in FLAGS.items() if flag.former is not None}
# Flags of run_mindformer.py whose job is done in another way, or not at all.
FLAGS_GONE = {
    "options": "write the overrides alone, key.sub=value",
    "sink_mode": "every step is run by itself; leave it out",
    "profile": "there is no profiler; leave it out",
    "remote_save_url": "nothing is uploaded; leave it out",
    "auto_trans_ckpt": "whole checkpoints are loaded, so there is nothing to transform; leave it out",
    "src_strategy_path_or_dir": "whole checkpoints are loaded; merge slices first with tools/transform_ckpt.py",
    "strategy_load_checkpoint": "whole checkpoints are loaded; merge slices first with tools/transform_ckpt.py",
    "only_save_strategy": "there is no run that only writes strategies",
}
