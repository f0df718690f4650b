"""Model and tokenizer of a program, from its command line. MindSpore is imported when they are loaded."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from glm_ms.ops.cpu.storage import STORAGE
from glm_ms.program import library_imports
from glm_ms.quant import BITS, GROUPS, from_flags
from glm_ms.storage.errors import FileError

if TYPE_CHECKING:
    from glm_ms.generation import GLMForCausalLM
    from glm_ms.tokenizer import SentencePieceTokenizer


class DeviceError(FileError):
    """A device of the command line cannot be used; the message says why."""


def add_model_arguments(parser: ArgumentParser, named_adapters: bool = False) -> None:
    """The flags that say which model is meant; `load_model` reads them.

    With `named_adapters` --lora-alpha is a list of texts, see `glm_ms.serve.names.lora_alphas`.
    """
    model = "Hugging Face folder, output folder of a run, .ckpt or .safetensors file"
    tokenizer = "tokenizer.model, or the folder or YAML that has it (default: beside the model)"
    generation = "2 for ChatGLM2, 3 for ChatGLM3, where nothing beside the model tells"
    alpha = "of a LoRA adapter of MindFormers, whose file does not have it"
    parser.add_argument("--model", required=True, metavar="PATH", help=model)
    parser.add_argument("--config", metavar="PATH", help="config.json or YAML of the network, for a file of weights")
    parser.add_argument("--tokenizer", metavar="PATH", help=tokenizer)
    parser.add_argument("--model-generation", type=int, choices=(2, 3), help=generation)
    if named_adapters:
        alpha += "; NAME=ALPHA: of one of --adapter"
        parser.add_argument("--lora-alpha", nargs="+", default=[], metavar="[NAME=]ALPHA", help=alpha)
    else:
        parser.add_argument("--lora-alpha", type=float, metavar="ALPHA", help=alpha)
    parser.add_argument("--quantize", type=int, choices=BITS, help="round weights to so many bits when they are loaded")
    group = "with --quantize 4: inputs that share a scale (default: 32)"
    parser.add_argument("--quantize-group", type=int, choices=GROUPS, help=group)
    kept = "type of keys and values in memory, for the C++ kernels of a CPU; default float32, which is exact"
    parser.add_argument("--kv-cache", choices=tuple(STORAGE), help=kept)
    parser.add_argument("--device-target", choices=("CPU", "Ascend"), help="device (default: that of MindSpore)")
    parser.add_argument("--device-id", type=int, metavar="N", help="number of the card (default: 0)")


def load_model(
    arguments: Namespace, adapter: str | Path | None = None, say: Callable[[str], None] = print
) -> tuple[GLMForCausalLM, SentencePieceTokenizer]:
    """The model with its tokenizer, and with an adapter if one is given. `say` takes remarks for the user.

    Raises:
        DeviceError: the device cannot be used.
        FileError: a file is missing or damaged, nothing tells which tokenizer belongs to the model, or it is of another
            model.
    """
    if os.environ.get("GLM_MS_VERBOSE", "0") == "0":
        os.environ.setdefault("GLOG_v", "3")  # MindSpore reads it once, on import: errors only
    with library_imports():
        import mindspore as ms

        from glm_ms.pretrained import load_with_tokenizer

    if arguments.device_target is not None or arguments.device_id is not None:
        _open_device(arguments.device_target or ms.get_context("device_target"), arguments.device_id or 0)
    return load_with_tokenizer(
        arguments.model,
        arguments.config,
        adapter,
        arguments.lora_alpha,
        arguments.tokenizer,
        arguments.model_generation,
        from_flags(arguments.quantize, arguments.quantize_group),
        arguments.kv_cache,
        say,
    )


def _open_device(target: str, number: int) -> None:
    """Raises DeviceError if MindSpore cannot use the device."""
    import mindspore as ms

    try:
        ms.set_device(target, number)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].partition(". ")[0].rstrip(".")  # a page of MindSpore's follows
        raise DeviceError(
            f"--device-target {target} --device-id {number}: cannot be used here: {reason}; leave both out, or give "
            "those of a device of this machine"
        ) from None


def name_and_path(value: str) -> tuple[str, Path]:
    """Name and path of `NAME=PATH`; the name of a path alone is its last part."""
    name, equals, path = value.partition("=")
    if not equals or Path(value).exists():
        return Path(value).resolve().name, Path(value)
    return name, Path(path)
