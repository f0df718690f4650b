"""`plan_run`: settings -> what the card that needs most holds, and what a step costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from glm_ms.generation.cached_decoder import cache_capacity
from glm_ms.metrics import TEXT, takes
from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig
from glm_ms.parallel.slices import Slice
from glm_ms.plan import traffic
from glm_ms.plan.activations import Work, activation_bytes, prefill_bytes
from glm_ms.plan.parameters import (
    FLOAT32,
    ITEM_BYTES,
    PlannedParameter,
    lora_targets,
    planned_parameters,
    planned_slices,
)
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded, parallel_of, training_length


@dataclass(frozen=True)
class CardMemory:
    """Bytes on one card.

    Attributes:
        stage: pipeline stage of the card.
        weights: as they are stored.
        gradients: of what is trained, with the sums of micro batches where there are any.
        optimizer: both moments.
        copies: weights in the compute type, and gathered from other cards, as far as a step keeps them.
        activations: intermediate results of a step, as the settings have `recompute`; in eval and predict of a prefill.
        activations_kept: the same without recompute.
        activations_recomputed: the same with recompute.
        kv_cache: keys and values of generation.
    """

    stage: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    activations_kept: int = 0
    activations_recomputed: int = 0
    kv_cache: int = 0

    @property
    def total(self) -> int:
        """All of it at once."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.kv_cache


@dataclass(frozen=True)
class RunPlan:
    """A run by its numbers.

    Attributes:
        settings: of the run.
        config: its architecture.
        parallel: the split.
        parameters: elements of the whole network, adapter included.
        trained: those that are trained.
        stages: memory of a card of each pipeline stage.
        rows: rows of an update on all cards; 0 if nothing is trained.
        tokens: positions of them.
        flops: of an update on all cards.
        sent: purpose -> bytes that the card which sends most sends in an update.
    """

    settings: Settings
    config: GLMConfig
    parallel: ParallelConfig
    parameters: int
    trained: int
    stages: tuple[CardMemory, ...]
    rows: int = 0
    tokens: int = 0
    flops: int = 0
    sent: Mapping[str, float] = field(default_factory=dict)

    @property
    def card(self) -> CardMemory:
        """The card that needs most."""
        return max(self.stages, key=lambda card: card.total)


def plan_run(settings: Settings, num_cards: int) -> RunPlan:
    """Plans a run.

    Args:
        settings: checked, with the size of the vocabulary known.
        num_cards: cards of the run.

    Raises:
        AdapterError: `target_modules` matches no module.
    """
    config, parallel = settings.glm_config(), parallel_of(settings, num_cards)
    parameters = planned_parameters(settings, config)
    slices = planned_slices(config, parallel, parameters)
    counts = {
        "parameters": sum(p.size for p in parameters.values()),
        "trained": sum(p.size for p in parameters.values() if p.trained),
    }
    if not settings.is_training():
        card = CardMemory(0, stored_bytes(parameters, slices, 0), **_generation(settings, config))
        return RunPlan(settings, config, parallel, stages=(card,), **counts)
    step = _Step(settings, config, parallel, parameters, slices)
    stages = tuple(step.memory(stage) for stage in range(parallel.pipeline_stages))
    return RunPlan(
        settings, config, parallel, stages=stages, rows=step.rows, tokens=step.tokens, flops=step.flops,
        sent=max((step.sent(stage) for stage in range(parallel.pipeline_stages)), key=lambda s: sum(s.values())),
        **counts,
    )  # fmt: skip


def stored_bytes(
    parameters: Mapping[str, PlannedParameter],
    slices: Mapping[str, Slice],
    stage: int,
    trained_only: bool = False,
) -> int:
    """Bytes of the slices of one card; of those that are trained, as float32 elements, with `trained_only`."""
    total = 0
    for name, parameter in parameters.items():
        if slices[name].stage == stage and (parameter.trained or not trained_only):
            total += math.prod(slices[name].shape) * (FLOAT32 if trained_only else parameter.item_bytes)
    return total


class _Step:
    """A training step, by stage."""

    def __init__(
        self,
        settings: Settings,
        config: GLMConfig,
        parallel: ParallelConfig,
        parameters: Mapping[str, PlannedParameter],
        slices: Mapping[str, Slice],
    ) -> None:
        self.settings, self.config, self.parallel = settings, config, parallel
        self.parameters, self.slices = parameters, slices
        self.recompute = settings.recompute_config.recompute
        self.gather_again = settings.recompute_config.parallel_optimizer_comm_recompute
        pet = settings.model.pet_config
        self.work = Work(
            config,
            parallel,
            settings.runner_config.batch_size,
            training_length(settings),
            prefix=pet.pre_seq_len if pet.pet_type == "ptuning2" else 0,
            sharded=is_sharded(settings),
            base_trained=pet.pet_type is None,
            lora_targets=frozenset(_ending(name) for name in lora_targets(settings, config)),
            lora_dropout=pet.pet_type == "lora" and pet.lora_dropout > 0,
            fused_attention=_fuses_attention(settings, config),
            keeps_sums=not settings.recompute_config.mp_comm_recompute,
        )
        self.accumulation = settings.runner_config.gradient_accumulation_steps
        self.rows = self.work.rows * parallel.data_parallel * parallel.micro_batch_num * self.accumulation
        self.tokens = self.rows * self.work.length
        self.flops = traffic.step_flops(
            config, self.tokens, self.work.length + self.work.prefix, self.work.base_trained, self.recompute
        )

    def memory(self, stage: int) -> CardMemory:
        """Of a card of a stage."""
        trained = stored_bytes(self.parameters, self.slices, stage, trained_only=True)
        kept, recomputed = self._activations(stage, False), self._activations(stage, True)
        caches = _generation(self.settings, self.config) if _generates(self.settings) else {}
        largest = max(recomputed if self.recompute else kept, caches.get("activations", 0))
        return CardMemory(
            stage=stage,
            weights=stored_bytes(self.parameters, self.slices, stage),
            gradients=trained + self._gradient_sums(stage) + self._gradient_in_work(stage),
            optimizer=2 * trained,
            copies=self._copies(stage),
            activations=largest,
            activations_kept=kept,
            activations_recomputed=recomputed,
            kv_cache=caches.get("kv_cache", 0),
        )

    def _layers(self, stage: int) -> int:
        number = self.config.num_layers
        return sum(self.parallel.stage_of(layer, number) == stage for layer in range(number))

    def _activations(self, stage: int, recompute: bool) -> int:
        stages = self.parallel.pipeline_stages
        # One forward, one backward: Narayanan et al. 2021, arXiv:2104.04473.
        in_flight = min(stages - stage, self.parallel.micro_batch_num)
        return activation_bytes(self.work, self._layers(stage), in_flight, recompute, stage == stages - 1)

    def _copies(self, stage: int) -> int:
        """A weight is cast to the compute type, and gathered, where it is multiplied; its product's derivative needs it
        again. Recomputed blocks give their copies back, but for gathered ones without
        `parallel_optimizer_comm_recompute`."""
        kept, by_block = 0, {}
        for name, parameter in self.parameters.items():
            piece = self.slices[name]
            same = parameter.item_bytes == self.work.item and piece.shards == 1
            if piece.stage != stage or same or len(piece.full) < 2 or ".embedding." in name:
                continue
            size = math.prod(piece.shape) * piece.shards * self.work.item
            block = name.partition("encoder.layers.")[2].partition(".")[0]
            gathered = piece.shards > 1
            stays = not block or not (self.gather_again if gathered else self.recompute)
            if stays:
                kept += size
            else:
                by_block[block] = by_block.get(block, 0) + size
        return kept + max(by_block.values(), default=0)

    def _gradient_sums(self, stage: int) -> int:
        """Gradients summed over the micro batches of an update. In a pipeline the compiler sums them before optimizer
        sharding cuts them."""
        if self.accumulation == 1 and self.parallel.pipeline_stages == 1:
            return 0
        pieces = (self.slices[name] for name, parameter in self.parameters.items() if parameter.trained)
        return sum(FLOAT32 * math.prod(p.shape) * p.shards for p in pieces if p.stage == stage)

    def _gradient_in_work(self, stage: int) -> int:
        """The largest gradient before it is cut: of the compute type, and as float32 on its way to other cards."""
        whole = [
            math.prod(self.slices[name].shape) * self.slices[name].shards * (self.work.item + FLOAT32)
            for name, parameter in self.parameters.items()
            if parameter.trained and self.slices[name].stage == stage
        ]
        return max(whole, default=0)

    def sent(self, stage: int) -> dict[str, float]:
        """Purpose -> bytes that a card of a stage sends in an update."""
        stages, micro = self.parallel.pipeline_stages, self.parallel.micro_batch_num
        gathered = 2 if self.gather_again else 1
        both = {"first": stage == 0, "last": stage == stages - 1}
        tensor = traffic.tensor_traffic(self.work, self._layers(stage), self.recompute, **both)
        return {
            "gradients": traffic.gradient_traffic(self.parameters, self.slices, stage),
            "gathered weights": traffic.weight_traffic(
                self.parameters, self.slices, stage, self.work.item, gathered
            ),
            "tensor parallelism": micro * tensor,
            "pipeline": micro * traffic.stage_traffic(self.work, self.parallel, stage),
        }


def _ending(module: str) -> str:
    """Name of a module within its block."""
    inside = module.partition("encoder.layers.")[2]
    return inside.partition(".")[2] or module.removeprefix("transformer.")


def _fuses_attention(settings: Settings, config: GLMConfig) -> bool:
    """Whether attention is one kernel, on cards that have it; see `glm_ms.ops.fusion`."""
    half = ITEM_BYTES[config.compute_dtype] < FLOAT32
    return settings.context.use_fused_kernels and half and not config.attention_dropout


def _generates(settings: Settings) -> bool:
    return settings.do_eval and takes(TEXT, settings.metric.type)


def _generation(settings: Settings, config: GLMConfig) -> dict[str, int]:
    """Bytes of the cache of keys and values, and of intermediate results while the prompts are read."""
    options, predicts = settings.generation, settings.run_mode == "predict"
    batch = settings.predict_batch_size if predicts else settings.eval_dataset.batch_size
    longest = config.seq_length if predicts else settings.eval_dataset.max_source_length
    prompt = min(longest, config.seq_length)
    slots = min(prompt + options.max_new_tokens, options.max_length or config.seq_length, config.seq_length)
    pet = settings.model.pet_config
    prefix = pet.pre_seq_len if pet.pet_type == "ptuning2" else 0
    rows, capacity = batch * options.num_beams, cache_capacity(slots) + prefix
    item = ITEM_BYTES[config.compute_dtype]
    cache = 2 * config.num_layers * rows * config.num_kv_heads * capacity * config.kv_channels * item
    if options.num_beams > 1:
        cache += cache // (2 * config.num_layers)  # one table of it while beams change places
    prompt = min(prompt, slots)
    fused = _fuses_attention(settings, config)
    work = Work(config, ParallelConfig(), rows, prompt, prefix=capacity - prompt, fused_attention=fused)
    return {"kv_cache": cache, "activations": prefill_bytes(work)}
