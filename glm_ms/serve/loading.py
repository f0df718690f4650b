"""From paths to an `Engine` that is compiled and runs."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

from glm_ms.families import family_of
from glm_ms.generation import GLMForCausalLM
from glm_ms.generation.graph_choice import GraphMaker
from glm_ms.generation.paged import PagedDecoder
from glm_ms.kernels.choice import use_kernels
from glm_ms.kernels.run_checks import Use
from glm_ms.peft.adapter import StoredAdapter, read_adapter
from glm_ms.peft.rows import bounds_for
from glm_ms.pretrained import check_vocabulary
from glm_ms.serve.adapters import add
from glm_ms.serve.engine import Engine
from glm_ms.serve.model_arguments import load_model
from glm_ms.serve.scheduler import Scheduler
from glm_ms.serve.settings import ServeSettings
from glm_ms.tokenizer import SentencePieceTokenizer

_LOG = logging.getLogger(__name__)
Say = Callable[[str], None]


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
    model, tokenizer = load_model(arguments)
    return build_engine(model, tokenizer, name or Path(arguments.model).resolve().name, stored, settings, say)


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
