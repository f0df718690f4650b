"""The model at the start of a run: architecture from the settings, weights from load_checkpoint, adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

from glm_ms.convert.reader import CheckpointReader, check_names_and_shapes, open_checkpoint
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import ranks_of
from glm_ms.families import read_config
from glm_ms.generation import GLMForCausalLM
from glm_ms.kernels.choice import use_kernels
from glm_ms.kernels.run_checks import Use
from glm_ms.metrics import LOSS, TEXT, takes
from glm_ms.model.config import FREE_FIELDS, GLMConfig
from glm_ms.parallel.layers import sharded_glm
from glm_ms.peft import ADAPTERS, is_adapter_folder
from glm_ms.peft.adapter import (
    AdapterConfig,
    AdapterError,
    StoredAdapter,
    adapter_with,
    base_remark,
    read_adapter,
    replaced_adapter,
)
from glm_ms.settings import Settings, SettingsError, resolve_vocab_size
from glm_ms.settings.schema import AUTO, parallel_of, quantization_of, training_length
from glm_ms.spelling import tool
from glm_ms.storage.errors import CheckpointError
from glm_ms.storage.integrity import file_sha256, position_beside
from glm_ms.storage.run_folder import resolve_checkpoint
from glm_ms.tokenizer.base import CHAT

_EMBEDDING = "transformer.embedding.embedding_table"


def build_model(settings: Settings, vocab_size: int, say: Say, checkpoint: Path | None = None) -> GLMForCausalLM:
    """Builds the network of a run, loads its weights, and attaches its adapter.

    `padded_vocab_size: auto` becomes the size of the checkpoint, or without one that of the tokenizer, `vocab_size`.

    `checkpoint`, of the run that is resumed, replaces `load_checkpoint`, or `load_adapter` if the run trains an
    adapter, because that checkpoint contains no base weights.

    Raises:
        CheckpointError: the weights cannot be read, do not belong to the configured network, or were trained with
            another vocabulary.
        SettingsError: the vocabulary does not fit the tokenizer, or there is no adapter to evaluate.
        StorageError: keys and values cannot have the type of the settings.
    """
    check_vocabulary(settings, say)
    adapter = adapter_config(settings)
    base = checkpoint if adapter is None else None
    if base is None and settings.load_checkpoint:
        base = resolve_checkpoint(settings.load_checkpoint)
    model, named = _base_model(settings, vocab_size, say, base)
    model.kv_cache = settings.model.kv_cache
    if adapter is not None and checkpoint is not None:
        # With its stored config: it may be an adapter from `peft` that the settings cannot express.
        model.restore_adapter(_checked_against_settings(model, read_adapter(checkpoint), adapter))
    elif named:
        stored = read_adapter(named, lora_alpha(settings))
        if base is not None and base in (stored.path, *stored.path.parents):  # its base has been loaded
            stored = dataclasses.replace(stored, weights_beside=0)
        if adapter is not None:
            stored = _checked_against_settings(model, stored, adapter)
        say(str(model.load_adapter(stored)))
        if base is not None and (remark := base_remark(stored.path, base)):
            say(remark)
    elif adapter is not None and settings.is_training():
        model.add_adapter(adapter, settings.seed)
    else:
        check_adapter_found(settings, model)
    return model


def lora_alpha(settings: Settings) -> float | None:
    """The numerator of the scale of a LoRA adapter that does not have it itself; None if the settings name no LoRA."""
    pet = settings.model.pet_config
    return pet.lora_alpha if pet.pet_type == "lora" else None


def check_adapter_found(settings: Settings, model: GLMForCausalLM) -> None:
    """Raises SettingsError if an evaluation or prediction names a type of adapter, and the model has none."""
    kind = settings.model.pet_config.pet_type
    if kind is not None and model.adapter is None:
        raise SettingsError(
            f"{settings.where('model.pet_config.pet_type')}: model.pet_config.pet_type: {kind}, but there is no "
            "adapter to load; name it (--load_adapter PATH), or set model.pet_config.pet_type=null for the base alone "
            "or for merged weights"
        )


def check_vocabulary(settings: Settings, say: Say) -> None:
    """Checks that weights and adapter of a run are used with its vocabulary, unless the settings allow another.

    `say` takes a line if they were trained with another `processor.tokenizer.template`. Raises CheckpointError.
    """
    tokenizer = settings.processor.tokenizer
    vocab_file = tokenizer.vocab_file
    for path in (settings.load_checkpoint, settings.load_adapter):
        position = position_beside(resolve_checkpoint(path)) if path else {}
        if not position:
            continue
        template = position.get("template") or CHAT
        if template != tokenizer.template:
            say(f"{path}: trained with processor.tokenizer.template: {template}, here it is {tokenizer.template}")
        then = None if tokenizer.allow_other_vocab else position.get("vocabulary")
        if then not in (None, file_sha256(Path(vocab_file))):
            raise CheckpointError(
                f"{vocab_file}: not the vocabulary with which {path} was trained (SHA-256 {then}); give that one as "
                "processor.tokenizer.vocab_file, or set processor.tokenizer.allow_other_vocab=True"
            )


def fuse(settings: Settings, model: GLMForCausalLM, say: Say) -> None:
    """Installs the fused kernels that the settings ask for in a network that is not compiled yet. All ranks call it,
    and have the kernels of the first one."""
    ranks = ranks_of(settings)
    use_kernels(
        model.network,
        model.config,
        kernel_use(settings, model.config),
        settings.context.use_fused_kernels,
        say,
        lambda work: ranks.from_first(work() if ranks.first else None),
    )


def kernel_use(settings: Settings, config: GLMConfig) -> Use:
    """What a run computes with the operators of its network."""
    pet, batch, generation = settings.model.pet_config, settings.batch_size(), settings.generation
    prefix = pet.pre_seq_len if pet.pet_type == "ptuning2" else 0
    use = Use(prefix=prefix)
    if settings.is_training():
        use = replace(use, rows=batch, length=training_length(settings), trains=True)
    evaluates = settings.run_mode == "eval" or (settings.is_training() and settings.do_eval)
    if settings.run_mode == "eval" and takes(LOSS, settings.metric.type):
        data = settings.eval_dataset
        length = min(data.max_source_length + data.max_target_length, config.seq_length)
        use = replace(use, rows=data.batch_size, length=length)
    if takes(TEXT, settings.metric.type) if evaluates else not settings.is_training():
        answers = max(generation.num_beams, generation.num_return_sequences)
        size = settings.eval_dataset.batch_size if evaluates else batch
        use = replace(use, slots=size * answers, context=prefix + config.seq_length)
    return use


def adapter_config(settings: Settings) -> AdapterConfig | None:
    """The adapter of `model.pet_config`; None for training of all weights."""
    pet = settings.model.pet_config
    return None if pet.pet_type is None else ADAPTERS[pet.pet_type].config(pet)


def _checked_against_settings(model: GLMForCausalLM, stored: StoredAdapter, wanted: AdapterConfig) -> StoredAdapter:
    """A stored adapter with the settings' own values, for further training; others, such as use_rslora, stay.

    Raises AdapterError if its kind or its sizes are not those of the settings.
    """
    then: Any = stored.config
    if then.kind != wanted.kind:
        raise AdapterError(f"{stored.path}: a {then.kind} adapter, but model.pet_config.pet_type is {wanted.kind}")
    different = ADAPTERS[wanted.kind].load().differences(stored, wanted, model.network)
    if different:
        raise AdapterError(f"{stored.path}: does not fit the settings: {'; '.join(different)}")
    return dataclasses.replace(stored, config=ADAPTERS[wanted.kind].load().renewed(then, wanted))


def _base_model(
    settings: Settings, vocab_size: int, say: Say, checkpoint: Path | None
) -> tuple[GLMForCausalLM, str | Path | None]:
    """The network with its weights, and the adapter that belongs to them."""
    if checkpoint is None:
        config, chosen = _config_for(settings, vocab_size), quantization_of(settings)
        say("weights: random")
        model = GLMForCausalLM(config)
        if chosen is not None:
            model.quantize(*chosen.numbers)
            say(f"weights of linear layers: {model.quantization}")
        return model, settings.load_adapter
    if is_adapter_folder(checkpoint):
        raise CheckpointError(
            f"{settings.where('load_checkpoint')}: load_checkpoint: {checkpoint} contains an adapter, not weights; "
            "name it with --load_adapter, and with --load_checkpoint the base weights it was trained on"
        )
    with open_checkpoint(checkpoint) as reader:
        named, remark = adapter_with(reader, settings.load_adapter), replaced_adapter(reader, settings.load_adapter)
        if reader.adapter_names() and settings.is_training() and settings.model.pet_config.pet_type is None:
            raise CheckpointError(
                f"{settings.where('load_checkpoint')}: load_checkpoint: {checkpoint} contains an adapter beside the "
                "weights, and training would change the weights under it; set model.pet_config.pet_type to continue "
                "training the adapter, or merge it "
                f"first ({tool('merge_lora')}) and start from the result"
            )
        config = _config_for(settings, vocab_size, checkpoint, reader)
        for line in filter(None, (f"weights: {checkpoint}", remark)):
            say(line)
        # Training overwrites its weights, so it has them in memory of its own.
        mapped = not settings.is_training()
        model = GLMForCausalLM.from_checkpoint(reader, config, quantization_of(settings), mapped)
    if model.quantization is None and model.config.param_init_type != config.param_init_type:
        say(f"weights are {model.config.param_init_type} in memory, not {config.param_init_type}")
    if model.quantization is not None:
        _check_use_of_integers(settings, checkpoint)
        say(f"weights of linear layers: {model.quantization}")
    return model, named


def _check_use_of_integers(settings: Settings, checkpoint: Path) -> None:
    """Raises CheckpointError for a run that needs floating point weights, if those of the checkpoint are quantized."""
    place = f"{settings.where('load_checkpoint')}: load_checkpoint: {checkpoint} has quantized weights"
    if settings.is_training() and settings.model.pet_config.pet_type is None:
        raise CheckpointError(
            f"{place}, which cannot be trained; set model.pet_config.pet_type to train an adapter over them, or give "
            "the unquantized release"
        )
    if settings.run_mode == "export":
        raise CheckpointError(f"{place}, which cannot be exported; give the unquantized release")


def build_unfilled_model(settings: Settings, vocab_size: int, say: Say) -> GLMForCausalLM:
    """The network of a sharded run, with a new adapter if it trains one; its weights are loaded after it is sliced.

    Raises as `build_model`.
    """
    check_vocabulary(settings, say)
    if settings.load_checkpoint:
        checkpoint = resolve_checkpoint(settings.load_checkpoint)
        with open_checkpoint(checkpoint) as reader:
            config = _config_for(settings, vocab_size, checkpoint, reader)
            check_names_and_shapes(config, reader)
        say(f"weights: {checkpoint}")
    else:
        config = _config_for(settings, vocab_size)
        say("weights: random")
    model = GLMForCausalLM(config, sharded_glm(config, parallel_of(settings)))
    adapter = adapter_config(settings)
    if adapter is not None:
        model.add_adapter(adapter, settings.seed)
    return model


def _config_for(
    settings: Settings, vocab_size: int, checkpoint: Path | None = None, reader: CheckpointReader | None = None
) -> GLMConfig:
    """The architecture, checked against the checkpoint of its weights, which `reader` reads."""
    model_config = settings.model.model_config
    if reader is not None and model_config.padded_vocab_size == AUTO and _EMBEDDING in reader.names():
        model_config.padded_vocab_size = reader.shape(_EMBEDDING)[0]
    resolve_vocab_size(settings, vocab_size)
    config = settings.glm_config()
    if checkpoint is not None:  # shapes do not determine head sizes or rope_ratio
        prefixed = reader is not None and bool(reader.adapter_names())
        check_config_beside(checkpoint, config, settings.source, prefixed)
    return config


def check_config_beside(checkpoint: Path, config: GLMConfig, source: str, with_prefix: bool = False) -> None:
    """Checks a config, read from the file `source`, against the config.json beside the weights, if there is one.

    `with_prefix`: the weights contain a P-Tuning prefix, which is loaded too.

    Raises CheckpointError if both describe different networks.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    if not (folder / "config.json").is_file():
        return
    different = different_fields(config, read_config(folder, with_prefix), "config.json")
    if different:
        raise CheckpointError(
            f"{folder / 'config.json'} and {source} describe different networks: {'; '.join(different)}"
        )


def different_fields(config: GLMConfig, other: GLMConfig, place: str) -> list[str]:
    """`model.model_config.name: value, in <place> value` for every field in which two configs describe different
    networks; `place` names the source of `other`."""
    return [
        f"model.model_config.{name}: {value}, in {place} {getattr(other, name)}"
        for name, value in config.to_dict().items()
        if name not in FREE_FIELDS and value != getattr(other, name)
    ]
