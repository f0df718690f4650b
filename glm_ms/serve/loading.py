"""From paths to an `Engine` that is compiled and runs."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

from glm_ms.convert.reader import has_adapter
from glm_ms.families import family_of
from glm_ms.generation import GLMForCausalLM
from glm_ms.generation.graph_choice import GraphMaker
from glm_ms.generation.paged import PagedDecoder
from glm_ms.kernels.choice import use_kernels
from glm_ms.kernels.run_checks import Use
from glm_ms.peft.adapter import StoredAdapter, base_remark, kind_of, lacks_alpha, read_adapter
from glm_ms.peft.rows import bounds_for
from glm_ms.pretrained import check_vocabulary
from glm_ms.serve.adapters import add
from glm_ms.serve.engine import Engine
from glm_ms.serve.model_arguments import load_model
from glm_ms.serve.scheduler import Scheduler
from glm_ms.serve.settings import ServeSettings
from glm_ms.storage.run_folder import resolve_checkpoint
from glm_ms.tokenizer import SentencePieceTokenizer

_LOG = logging.getLogger(__name__)
Say = Callable[[str], None]


def adapters_with_alpha(
    model: Path, adapters: Mapping[str, Path], alphas: Mapping[str | None, float]
) -> tuple[float | None, dict[str, tuple[Path, float | None]]]:
    """The alpha of an adapter beside the weights, and path and alpha of each named one, for `load_engine`.

    Args:
        model: the weights.
        adapters: name for clients -> path.
        alphas: see `glm_ms.serve.names.lora_alphas`. One without a name is for the adapters whose files do not have
            their own; if all have it, for all LoRA adapters, which must agree with it.

    Raises:
        FileError: an adapter cannot be read.
    """
    shared = alphas.get(None)
    if shared is None:
        return None, {name: (path, alphas.get(name)) for name, path in adapters.items()}
    paths: dict[str | None, Path] = {name: path for name, path in adapters.items() if name not in alphas}
    base = resolve_checkpoint(model)
    if has_adapter(base):
        paths[None] = base
    takers = [name for name, path in paths.items() if lacks_alpha(path)]
    takers = takers or [name for name, path in paths.items() if kind_of(path) == "lora"] or list(paths)
    named = {name: (path, alphas.get(name, shared if name in takers else None)) for name, path in adapters.items()}
    # Without an adapter that could take it `load_pretrained` refuses the alpha.
    return shared if None in takers or not paths else None, named


def load_engine(
    arguments: Namespace, name: str | None, adapters: Mapping[str, tuple[Path, float | None]], settings: ServeSettings,
    say: Say = _LOG.info
) -> Engine:  # fmt: skip
    """Loads weights, tokenizer and adapters; see `build_engine`.

    Args:
        arguments: of `add_model_arguments`.
        name: of the model for clients; None: that of the folder of the weights.
        adapters: name for clients -> path and alpha, see `read_adapter`.
        say: takes lines for the user.

    Raises:
        FileError: a file cannot be used, or files do not fit each other.
    """
    stored = {label: read_adapter(path, alpha) for label, (path, alpha) in adapters.items()}
    base = resolve_checkpoint(arguments.model)  # of a run that goes on: a later one is not what the server has
    model, tokenizer = load_model(arguments, say=say)
    for adapter in stored.values():
        if remark := base_remark(adapter.path, base):
            say(remark)
    engine = build_engine(model, tokenizer, name or Path(arguments.model).resolve().name, stored, settings, say)
    engine.base = base
    return engine


def build_engine(
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    name: str,
    adapters: Mapping[str, StoredAdapter],
    settings: ServeSettings,
    say: Say = _LOG.info,
) -> Engine:
    """Compiles a model for serving and starts its scheduler.

    Args:
        name: of the model for clients; adapters have other names.
        adapters: name for clients -> adapter.
        say: takes lines for the user, on an Ascend card those about its kernels.

    Raises:
        FileError: the tokenizer has more ids than the network, or an adapter does not fit.
    """
    check_vocabulary(tokenizer, model.config)
    context = min(settings.context, model.config.seq_length)
    use = Use(slots=settings.slots, context=context)
    use_kernels(model.network, model.config, use, "auto", say)
    bounds = bounds_for(list(adapters.values()), settings.max_adapters, settings.max_lora_rank, settings.max_prefix)
    graphs = GraphMaker(model.network, model.kv_cache)
    decoder = PagedDecoder(graphs(settings.slots, context, bounds=bounds))
    decoder.compile()
    scheduler = Scheduler(decoder, tokenizer, settings.max_queue)
    engine = Engine(
        scheduler, tokenizer, family_of(tokenizer), name, context, model.config.padded_vocab_size, settings.slots,
        seconds=settings.max_seconds, prompt_lookup_num_tokens=settings.prompt_lookup_num_tokens,
        decoder=decoder if bounds.max_adapters else None,
    )  # fmt: skip
    for label, stored in adapters.items():
        add(engine, label, stored)
    scheduler.start()
    return engine
