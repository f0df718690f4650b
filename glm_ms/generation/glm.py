"""`GLMForCausalLM`: a network with its logits, loss and generation."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor
from mindspore.common import np_dtype
from mindspore.nn.utils import no_init_parameters

from glm_ms.convert.dtypes import bfloat16_to_float32
from glm_ms.convert.reader import CheckpointReader
from glm_ms.families import family_of
from glm_ms.generation.chat import Round
from glm_ms.generation.config import GenerationConfig
from glm_ms.generation.decode import answers, check_streamable, generate, stream
from glm_ms.generation.graphs import GRAPHS, MATRIX, VECTOR, Logits, run_cell
from glm_ms.generation.inputs import Prompt, checked_rows, integer_rows, new_token_limits, prepare_prompts
from glm_ms.generation.pool import DecoderPool
from glm_ms.model.config import GLMConfig
from glm_ms.model.glm import Cells, GLMNetwork
from glm_ms.model.loss import IGNORED_LABEL, GLMWithLoss
from glm_ms.ops.registry import device
from glm_ms.peft.adapter import Adapter, AdapterConfig, AdapterError, StoredAdapter, attach, read_adapter
from glm_ms.quant import Quantization, quantization
from glm_ms.quant.checkpoint import storage_on_cpu, weights_of
from glm_ms.quant.network import quantize_network
from glm_ms.tokenizer import SentencePieceTokenizer

TokenIds = Any  # one prompt or a batch: (nested) lists, NumPy arrays or MindSpore tensors of integers
_PROBE_LENGTH = 16
_MOST_SLOTS = 32


@dataclass(frozen=True)
class AdapterReport:
    """The result of loading an adapter."""

    path: Path
    kind: str  # "lora" or "ptuning2"
    tensors: int  # number of tensors in the file; each has a parameter
    parameters: int  # number of values in them
    norm: float  # root of the sum of their squares
    logit_change: float  # largest absolute change of a logit on a probe prompt
    weights_beside: int = 0  # tensors of a base in the same file, which were not loaded with the adapter

    def __str__(self) -> str:
        beside = f"; the {self.weights_beside} weights in the same file were not loaded" if self.weights_beside else ""
        return (
            f"adapter: {self.path} ({self.kind}): {self.tensors} of {self.tensors} tensors matched, "
            f"{self.parameters:,} parameters, norm {self.norm:.4g}, largest logit change on a probe prompt "
            f"{self.logit_change:.4g}{beside}"
        )


class GLMForCausalLM:
    """A network with its weights: logits, loss, adapters, generation. Any thread may call it.

    Runs as compiled graphs, in PyNative programs too. The first call of each kind compiles (about a second for a
    tiny network, 20 s for the 6B); later calls with other shapes do not, except that generation compiles for each
    size in `slot_count` and `cache_capacity`.

    Args:
        config: architecture. Weights are random; `glm_ms.load_pretrained` builds one with weights.
        network: built for this config, for example of other linear layers; None: the plain network.

    Attributes:
        adapter: LoRA or P-Tuning on the network, which then is frozen; None without one.
        quantization: of the weights of the linear layers; None: they are floating point.
        stop_token_ids: end an answer unless a call gives others; None: the `eos_token_id` of the config.
    """

    def __init__(self, config: GLMConfig, network: GLMNetwork | None = None) -> None:
        self.config = config
        self.network: GLMNetwork = family_of(config).build_network(config) if network is None else network
        self.adapter: Adapter | None = None
        self.stop_token_ids: list[int] | None = None
        self.quantization: Quantization | None = None
        self._kv_cache: str | None = None
        self.network.set_train(False)
        self._build_cells()

    @classmethod
    def from_parameters(
        cls, config: GLMConfig, parameters: Iterable[tuple[str, np.ndarray]], cells: Cells | None = None,
        share: bool = False
    ) -> GLMForCausalLM:  # fmt: skip
        """Builds a model around given weights without drawing random ones first.

        Args:
            parameters: (name, array) of every parameter, each used once and then dropped; uint16: bit patterns of
                bfloat16. Memory-mapped arrays of the type of their parameter are not copied.
            cells: the classes of the network; None: the plain ones.
            share: other arrays are not copied either; nobody else may use them.

        Raises:
            ValueError: a name or shape does not fit, or a parameter is missing.
        """
        with no_init_parameters():
            network = family_of(config).build_network(config, cells)
        model = cls(config, network)
        model.load_parameters(parameters, share)
        return model

    @classmethod
    def from_checkpoint(
        cls, reader: CheckpointReader, config: GLMConfig, quantization: Quantization | None = None, mapped: bool = True
    ) -> GLMForCausalLM:
        """Builds a model around the weights of a checkpoint, quantized if they are, or while they are read.

        Args:
            quantization: how to quantize weights that are not; None: not at all.
            mapped: weights of safetensors files in the type of the parameters are used in the memory of the file, which
                must not be overwritten.

        Raises:
            CheckpointError: see `glm_ms.quant.checkpoint.weights_of`.
        """
        if device() == "CPU":
            config = dataclasses.replace(config, param_init_type=storage_on_cpu(reader, config))
        cells, parameters, found = weights_of(reader, config, quantization, mapped)
        model = cls.from_parameters(config, parameters, cells, share=mapped)
        model.quantization = found
        return model

    def _build_cells(self) -> None:
        """Creates the compiled cells anew: MindSpore keeps the graph of a cell whose network gets an adapter."""
        network = self.network
        self._logits = Logits(network)
        self._logits.set_inputs(MATRIX, MATRIX, MATRIX, VECTOR)
        self._with_loss = GLMWithLoss(network)
        self._with_loss.set_train(False)
        self._with_loss.set_inputs(MATRIX, MATRIX, MATRIX, MATRIX, VECTOR)
        self._decoders = DecoderPool(network, self._kv_cache)

    @property
    def kv_cache(self) -> str | None:
        """Type of keys and values in memory: "float32", which is exact, "bfloat16" (half the memory) or "int8" (about a
        quarter), of the C++ kernels of a CPU; None, the default: the type in which the network computes.

        Raises:
            StorageError: when it is set to an unknown type, or the network runs without these kernels.
        """
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, storage: str | None) -> None:
        self._decoders = DecoderPool(self.network, storage)
        self._kv_cache = storage

    def parameters(self) -> dict[str, Parameter]:
        """Name -> parameter of every weight, without those of an adapter."""
        own = set() if self.adapter is None else {id(parameter) for parameter in self.adapter.parameters()}
        return {p.name: p for p in self.network.get_parameters() if id(p) not in own}

    def quantize(self, bits: int, group: int | None = None) -> GLMForCausalLM:
        """Turns the weights of all linear layers into integers of 8 or 4 bits with scales, and returns the model.

        The error is that of rounding, see docs/quantization.md. An adapter is loaded afterwards.

        Args:
            group: with 4 bits, inputs that share a scale: 32 (default), 64 or 128.

        Raises:
            QuantizationError: other bits or groups, the model is quantized already, or it has an adapter.
        """
        chosen = quantization(bits, group)
        quantize_network(self.network, chosen)
        self.quantization = chosen
        self._build_cells()
        return self

    def add_adapter(self, config: AdapterConfig, seed: int = 0) -> Adapter:
        """Attaches a new adapter, with random values drawn from `seed`, for training, and freezes the weights.

        Raises:
            AdapterError: a target that matches no module, or there is an adapter already.
        """
        self.adapter = attach(self.network, config, seed)
        self._build_cells()
        return self.adapter

    def restore_adapter(self, stored: StoredAdapter) -> None:
        """Attaches a stored adapter to resume its training. It may still have no effect, so nothing checks that.

        Raises:
            AdapterError: it was made for another base, or there is an adapter already.
        """
        adapter = attach(self.network, stored.config, stored=stored)
        adapter.assign(stored.tensors, stored.path)
        self.adapter = adapter
        self._build_cells()

    def load_adapter(self, source: str | Path | StoredAdapter, lora_alpha: float | None = None) -> AdapterReport:
        """Attaches a stored adapter and checks that it has an effect.

        Args:
            source: path of an adapter of this project, of the library `peft`, of MindFormers, or of a P-Tuning
                checkpoint of the original code; see `glm_ms.peft.adapter.read_adapter`, whose result is accepted as
                well.
            lora_alpha: of the training, for LoRA of MindFormers, whose checkpoints do not have it.

        Raises:
            AdapterError: it cannot be read, is empty, was made for another base, or changes nothing. The model does
                not change then.
        """
        stored = source if isinstance(source, StoredAdapter) else read_adapter(source, lora_alpha)
        before = self._probe()
        adapter = attach(self.network, stored.config, stored=stored)
        try:
            adapter.assign(stored.tensors, stored.path)
            change = float(np.abs(self._probe() - before).max())
            if not np.isfinite(change):
                raise AdapterError(f"{stored.path}: with this adapter the network gives no numbers (NaN or infinity)")
            if change == 0:
                raise AdapterError(
                    f"{stored.path}: this adapter changes nothing: the logits of a probe prompt are those of the base. "
                    "Was it saved before training, or for another model?"
                )
        except AdapterError:
            adapter.detach()
            raise
        self.adapter = adapter
        self._build_cells()
        count = sum(tensor.size for tensor in stored.tensors.values())
        sizes = len(stored.tensors), count
        return AdapterReport(stored.path, adapter.kind, *sizes, stored.norm, change, stored.weights_beside)

    def _probe(self) -> np.ndarray:
        """Logits of ids spread over the vocabulary, float32 [1, S, V]."""
        length = min(_PROBE_LENGTH, self.config.seq_length)
        ids = np.linspace(0, self.config.padded_vocab_size - 1, length).astype(np.int32)[None]
        places = np.arange(length)
        return run_cell(Logits(self.network), ids, np.ones_like(ids), places[None], places).asnumpy()

    def load_parameters(self, parameters: Iterable[tuple[str, np.ndarray]], share: bool = False) -> None:
        """Overwrites all weights; see `from_parameters`."""
        missing = self.parameters()
        for name, value in parameters:
            if name not in missing:
                raise ValueError(f"parameter {name!r} is unknown or given twice")
            parameter = missing.pop(name)
            if tuple(value.shape) != tuple(parameter.shape):
                raise ValueError(f"{name}: shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")
            value = _typed(value, parameter.dtype)
            viewed = Tensor.from_numpy(value) if share or isinstance(value, np.memmap) else None
            if viewed is not None and viewed.dtype == parameter.dtype:
                parameter.set_data(viewed, slice_shape=True)
            else:
                parameter.set_data(Tensor(value, parameter.dtype))
            # Else a copy, such as the moments of an optimizer, first draws the random values that nobody needs.
            parameter.init_mode = None
        if missing:
            raise ValueError(f"{len(missing)} parameters are missing: {', '.join(list(missing)[:5])} ...")

    def __call__(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds | None = None,
        position_ids: TokenIds | None = None,
        labels: TokenIds | None = None,
    ) -> Tensor:
        """Logits, float32 [B, S, V], or with labels the mean loss over the labelled tokens, float32 scalar.

        Args:
            input_ids, attention_mask, position_ids: [B, S], or [S] as a batch of one; see `checked_rows`.
            labels: [B, S], -100 for a token without loss; shifted inside.

        Raises:
            ValueError: a shape, type or id that does not fit, positions beyond `config.seq_length`, or labels
                that are all -100.
        """
        rows, *others = checked_rows(input_ids, attention_mask, position_ids, self.config.padded_vocab_size)
        if len({row.size for row in rows}) > 1:
            raise ValueError("input_ids: rows of different lengths; pad them and give an attention_mask")
        ids, mask, positions = (np.stack(array) for array in (rows, *others))
        if positions.max() >= self.config.seq_length:
            raise ValueError(
                f"position_ids: {positions.max()} is outside 0..{self.config.seq_length - 1} (config.seq_length)"
            )
        slots = np.arange(ids.shape[1])
        if labels is None:
            return run_cell(self._logits, ids, mask, positions, slots)
        labels = np.stack(integer_rows(labels, "labels", like=rows))
        labelled = labels[:, 1:][labels[:, 1:] != IGNORED_LABEL]
        if not labelled.size:
            raise ValueError(f"labels: no label besides {IGNORED_LABEL} after the first token: no loss to compute")
        for wrong in labelled[(labelled < 0) | (labelled >= self.config.padded_vocab_size)]:
            raise ValueError(f"labels: {wrong} is outside the vocabulary 0..{self.config.padded_vocab_size - 1}")
        total, count = run_cell(self._with_loss, ids, labels, mask, positions, slots)
        return GRAPHS.run(operator.truediv, total, count)

    def loss_sum(self, rows: Sequence[np.ndarray]) -> tuple[float, int]:
        """Summed loss and number of labelled tokens of a batch: input_ids, labels, attention_mask, position_ids, int32
        [B, S] each."""
        total, count = run_cell(self._with_loss, *rows, np.arange(rows[0].shape[1]))
        return float(total.asnumpy()), int(count.asnumpy())

    def generate(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds | None = None,
        position_ids: TokenIds | None = None,
        *,
        configs: Sequence[GenerationConfig] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """Continues prompts by greedy decoding, sampling or beam search.

        Args:
            input_ids: one prompt or several of any lengths; see `prepare_prompts`.
            attention_mask, position_ids: as in `__call__`, only needed for prompts that are already padded.
            configs: options of each prompt, in place of `options`.
            options: options of all prompts: `max_new_tokens`, which is required, eos_token_id, do_sample, num_beams,
                num_return_sequences, length_penalty, early_stopping, temperature, top_k, top_p, repetition_penalty,
                max_length, seed; see `GenerationConfig`. Two have other defaults here: eos_token_id None stands for
                `stop_token_ids` ([]: nothing ends a sequence), and pad_token_id is that of the network's config.

        Returns:
            One list of ids per sequence, prompt included, without padding; `num_return_sequences` lists for each
            prompt, side by side.

        Raises:
            ValueError: an argument that does not fit, or prompt and new tokens exceed `config.seq_length`.
        """
        prompts, configs = self._prepare((input_ids, attention_mask, position_ids), configs, options)
        slots, length = _decoder_size(prompts, configs)
        return generate(self._decoders.decoder(min(slots, _most_slots(configs)), length), prompts, configs)

    def answers(
        self, prompts: Sequence[Sequence[int]], *, slots: int, length: int | None = None,
        copies: Sequence[int] | None = None, **options: Any
    ) -> Iterator[tuple[int, list[list[int]]]]:  # fmt: skip
        """`generate` for any number of prompts, each as soon as it has ended: yields its number and its generated ids.

        Prompts join in order whenever others leave. For the same `slots` and `length` each gets the same, whatever
        others there are.

        Args:
            prompts: ids of each.
            slots: prompts that run at a time; a prompt with several beams or sequences takes as many slots.
            length: room for so many tokens, prompt and answer; None: for the longest one.
            copies: how many sequences of the same prompt precede each one, which decides what it samples; None: those
                among these prompts. See `glm_ms.generation.sampling.copy_numbers`.
            options: as of `generate`.

        Raises as `generate`.
        """
        ready, configs = self._prepare((list(prompts), None, None), None, options)
        decoder = self._decoders.decoder(slots * _width(configs[0]), length or _decoder_size(ready, configs)[1])
        yield from answers(decoder, ready, configs, copies)

    def stream(
        self,
        input_ids: TokenIds,
        attention_mask: TokenIds | None = None,
        position_ids: TokenIds | None = None,
        *,
        configs: Sequence[GenerationConfig] | None = None,
        **options: Any,
    ) -> Iterator[np.ndarray]:
        """`generate` a step at a time, not for beam search: yields int32 [B], the next token of every sequence; the
        padding id for a sequence that has ended."""
        prompts, configs = self._prepare((input_ids, attention_mask, position_ids), configs, options)
        for config in configs:
            check_streamable(config)

        def steps() -> Iterator[np.ndarray]:  # makes a decoder when the first step is asked for
            yield from stream(self._decoders.decoder(*_decoder_size(prompts, configs)), prompts, configs)

        return steps()

    def chat(
        self,
        tokenizer: SentencePieceTokenizer,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        **options: Any,
    ) -> tuple[Any, list[Any]]:
        """One round of a conversation, as `chat` of the released models.

        Args:
            tokenizer: of this model; it decides about the prompt template and the stop tokens.
            query: the new message, of `role`. ChatGLM3 also has "observation", the result of a tool.
            history: earlier (question, answer) pairs for ChatGLM2, messages `{"role", "content"}` for either; in a
                system message of ChatGLM3 also `tools`. It does not change.
            options: as of `generate`. By default the released models sample with top_p = 0.8 and temperature = 0.8, and
                prompt and answer together have at most `max_length` = 8192 tokens, or as many as the network has.

        Returns:
            The answer and the new history. For tool calls see `ChatGLM3Tokenizer.process_response`.

        Raises:
            ValueError: an option, a role or a history that does not fit, or a conversation that is too long.
        """
        return Round(self, tokenizer, query, history, role, options).answer()

    def stream_chat(
        self,
        tokenizer: SentencePieceTokenizer,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        past_key_values: None = None,
        return_past_key_values: bool = False,
        **options: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """`chat` whose answer arrives bit by bit: yields (answer so far, history with it).

        The last item has what `chat` returns; before it the answer is text, which only grows. There is one item at
        least. With `return_past_key_values` the items have None as a third part, which the next call takes as
        `past_key_values`: a conversation is its history alone.
        """
        if past_key_values is not None:
            raise ValueError("past_key_values: must be None; the history alone continues a conversation")
        items = Round(self, tokenizer, query, history, role, options).stream()
        return ((*item, None) for item in items) if return_past_key_values else items

    def _prepare(
        self,
        inputs: tuple[TokenIds, TokenIds | None, TokenIds | None],
        configs: Sequence[GenerationConfig] | None,
        options: dict[str, Any],
    ) -> tuple[list[Prompt], Sequence[GenerationConfig]]:
        """Checked prompts, and one config for each."""
        vocab_size, pad_token_id = self.config.padded_vocab_size, self.config.pad_token_id
        if configs is None:
            eos = options.get("eos_token_id")
            if eos is None:
                eos = self.stop_token_ids or self.config.eos_token_id
            elif isinstance(eos, Sequence):
                eos = list(eos) or None
            options = {"pad_token_id": pad_token_id, **options, "eos_token_id": eos}
            config = GenerationConfig.from_dict(options)
            pad_token_id = config.pad_token_id
        elif options:
            raise ValueError(f"{', '.join(options)}: give options or configs, not both")
        prompts = prepare_prompts(*inputs, vocab_size=vocab_size, pad_token_id=pad_token_id)
        configs = [config] * len(prompts) if configs is None else list(configs)
        if len(configs) != len(prompts):
            raise ValueError(f"configs: {len(configs)} for {len(prompts)} prompts; give one for each prompt")
        for prompt, config, limit in zip(prompts, configs, new_token_limits(prompts, configs)):
            last = int(prompt.positions.max())
            if last + limit > self.config.seq_length:
                raise ValueError(
                    f"prompt of {last + 1} tokens and max_new_tokens = {config.max_new_tokens} "
                    f"exceed config.seq_length = {self.config.seq_length}; shorten one, or raise seq_length"
                )
        return prompts, configs


def _typed(value: np.ndarray, dtype: ms.Type) -> np.ndarray:
    """An array whose uint16 are bit patterns of bfloat16 as one that MindSpore takes for a parameter of this type."""
    if value.dtype != np.uint16:
        return value
    if dtype == ms.bfloat16 and np_dtype.bfloat16 is not None:
        return value.view(np_dtype.bfloat16)
    return bfloat16_to_float32(value)


def _decoder_size(prompts: list[Prompt], configs: Sequence[GenerationConfig]) -> tuple[int, int]:
    """Sequences that run at the same time, and the most tokens of one."""
    lengths = [len(prompt.ids) for prompt in prompts] + new_token_limits(prompts, configs)
    return sum(map(_width, configs)), int(lengths.max())


def _width(config: GenerationConfig) -> int:
    """Slots of a prompt."""
    return max(config.num_beams, config.num_return_sequences)


def _most_slots(configs: Sequence[GenerationConfig]) -> int:
    """Slots beyond which prompts wait until others end."""
    return max(_MOST_SLOTS, *map(_width, configs))
