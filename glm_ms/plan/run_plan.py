"""`plan_run`: settings -> memory of a card of each stage, and work and traffic of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glm_ms.generation.decoder import cache_capacity, slot_count
from glm_ms.metrics import TEXT, takes
from glm_ms.model.config import GLMConfig
from glm_ms.parallel.config import ParallelConfig
from glm_ms.plan import traffic
from glm_ms.plan.activations import Work, activation_bytes, prefill_bytes
from glm_ms.plan.planned_parameters import (
    FLOAT32,
    ITEM_BYTES,
    StoredPart,
    lora_targets,
    planned_parameters,
    stored_parts,
)
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded, parallel_of, training_length


@dataclass(frozen=True)
class CardMemory:
    """Bytes on one card.

    Attributes:
        stage: pipeline stage of the card.
        weights: in their storage type.
        gradients: of the trained parameters, with the sums of micro batches if there are any.
        optimizer: both moments.
        copies: weights in the compute type, and gathered from other cards, as far as a step keeps them.
        activations: intermediate results of a step, with or without recompute as set; in eval and predict of a prefill.
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
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.kv_cache


@dataclass(frozen=True)
class RunPlan:
    """Memory, work and traffic of a run.

    Attributes:
        settings: of the run.
        config: its architecture.
        parallel: the split.
        parameters: elements of the whole network, adapter included.
        trained: elements of the trained parameters.
        stages: memory of a card of each pipeline stage.
        rows: rows of an update on all cards; 0 if nothing is trained.
        tokens: positions of these rows.
        flops: floating point operations of an update on all cards.
        sent: purpose -> bytes that the card with most traffic sends in an update.
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
        """The card with the largest need of memory."""
        return max(self.stages, key=lambda card: card.total)


def plan_run(settings: Settings, num_cards: int) -> RunPlan:
    """Plans a run on a number of cards. The settings are checked, with the size of the vocabulary known.

    Raises:
        AdapterError: `target_modules` matches no module.
    """
    config, parallel = settings.glm_config(), parallel_of(settings, num_cards)
    parameters = planned_parameters(settings, config)
    parts = stored_parts(config, parallel, parameters)
    sizes = sum(p.size for p in parameters.values()), sum(p.size for p in parameters.values() if p.trained)
    if not settings.is_training():
        weights = sum(part.stored for part in parts if part.slice.stage == 0)
        card = CardMemory(0, weights, **_generation(settings, config))
        return RunPlan(settings, config, parallel, *sizes, stages=(card,))
    pet = settings.model.pet_config
    work = Work(
        config,
        parallel,
        settings.runner_config.batch_size,
        training_length(settings),
        prefix=_prefix(settings),
        sharded=is_sharded(settings),
        base_trained=pet.pet_type is None,
        lora_targets=frozenset(_name_in_block(name) for name in lora_targets(settings, config)),
        lora_dropout=pet.pet_type == "lora" and pet.lora_dropout > 0,
        fused_attention=_fuses_attention(settings, config),
        keeps_sums=not settings.recompute_config.mp_comm_recompute,
    )
    micro_batches = parallel.micro_batch_num * settings.runner_config.gradient_accumulation_steps
    rows = work.rows * parallel.data_parallel * micro_batches
    recompute, keys = settings.recompute_config.recompute, work.length + work.prefix
    stages = [
        _Stage(settings, work, stage, [part for part in parts if part.slice.stage == stage])
        for stage in range(parallel.pipeline_stages)
    ]
    return RunPlan(
        settings,
        config,
        parallel,
        *sizes,
        stages=tuple(stage.memory() for stage in stages),
        rows=rows,
        tokens=rows * work.length,
        flops=traffic.step_flops(config, rows * work.length, keys, work.base_trained, recompute),
        sent=max((stage.sent() for stage in stages), key=lambda sent: sum(sent.values())),
    )


@dataclass(frozen=True)
class _Stage:
    """A training step on a card of one pipeline stage; `parts` is what the card stores of the parameters."""

    settings: Settings
    work: Work
    stage: int
    parts: list[StoredPart]

    def memory(self) -> CardMemory:
        """Bytes on the card."""
        settings = self.settings
        trained = sum(FLOAT32 * part.elements for part in self.parts if part.parameter.trained)
        kept, recomputed = self._activations(False), self._activations(True)
        step = recomputed if settings.recompute_config.recompute else kept
        generates = settings.do_eval and takes(TEXT, settings.metric.type)
        caches = _generation(settings, self.work.config) if generates else {}
        return CardMemory(
            stage=self.stage,
            weights=sum(part.stored for part in self.parts),
            gradients=trained + self._gradient_sums() + self._uncut_gradient(),
            optimizer=2 * trained,
            copies=self._copies(),
            activations=max(step, caches.get("activations", 0)),
            activations_kept=kept,
            activations_recomputed=recomputed,
            kv_cache=caches.get("kv_cache", 0),
        )

    @property
    def _layers(self) -> int:
        number = self.work.config.num_layers
        return sum(self.work.parallel.stage_of(layer, number) == self.stage for layer in range(number))

    def _activations(self, recompute: bool) -> int:
        stages_left = self.work.parallel.pipeline_stages - self.stage
        # One forward, one backward: Narayanan et al. 2021, arXiv:2104.04473.
        in_flight = min(stages_left, self.work.parallel.micro_batch_num)
        return activation_bytes(self.work, self._layers, in_flight, recompute, has_loss=stages_left == 1)

    def _copies(self) -> int:
        """Weights cast to the compute type or gathered for a product, whose derivative needs them again. Recomputed
        blocks free their copies, but gathered ones only with `parallel_optimizer_comm_recompute`."""
        recompute, item = self.settings.recompute_config, self.work.item
        kept, by_block = 0, {"": 0}
        for part in self.parts:
            gathered = part.slice.shards > 1
            same = part.parameter.item_bytes == item and not gathered
            if same or len(part.slice.full) < 2 or ".embedding." in part.name:
                continue
            block = part.name.partition("encoder.layers.")[2].partition(".")[0]
            freed = recompute.parallel_optimizer_comm_recompute if gathered else recompute.recompute
            if block and freed:
                by_block[block] = by_block.get(block, 0) + part.whole * item
            else:
                kept += part.whole * item
        return kept + max(by_block.values())

    def _gradient_sums(self) -> int:
        """Gradients summed over the micro batches of an update. In a pipeline the compiler sums them before optimizer
        sharding cuts them."""
        accumulates = self.settings.runner_config.gradient_accumulation_steps > 1
        if not accumulates and self.work.parallel.pipeline_stages == 1:
            return 0
        return sum(FLOAT32 * part.whole for part in self.parts if part.parameter.trained)

    def _uncut_gradient(self) -> int:
        """The largest gradient before it is cut: in the compute type, and as float32 for the other cards."""
        whole = (part.whole for part in self.parts if part.parameter.trained)
        return max(whole, default=0) * (self.work.item + FLOAT32)

    def sent(self) -> dict[str, float]:
        """Purpose -> bytes that the card sends in an update."""
        work, recompute = self.work, self.settings.recompute_config
        passes = 2 if recompute.parallel_optimizer_comm_recompute else 1
        first, last = self.stage == 0, self.stage == work.parallel.pipeline_stages - 1
        tensor = traffic.tensor_traffic(work, self._layers, recompute.recompute, first, last)
        micro = work.parallel.micro_batch_num
        return {
            "gradients": traffic.gradient_traffic(self.parts),
            "gathered weights": traffic.weight_traffic(self.parts, work.item, passes),
            "tensor parallelism": micro * tensor,
            "pipeline": micro * traffic.stage_traffic(work, self.stage),
        }


def _name_in_block(module: str) -> str:
    """Name of a module within its block."""
    inside = module.partition("encoder.layers.")[2]
    return inside.partition(".")[2] or module.removeprefix("transformer.")


def _prefix(settings: Settings) -> int:
    pet = settings.model.pet_config
    return pet.pre_seq_len if pet.pet_type == "ptuning2" else 0


def _fuses_attention(settings: Settings, config: GLMConfig) -> bool:
    """Whether attention is one kernel, on cards that have it; see `glm_ms.ops.registry`."""
    half = ITEM_BYTES[config.compute_dtype] < FLOAT32
    return settings.context.use_fused_kernels and half and not config.attention_dropout


def _generation(settings: Settings, config: GLMConfig) -> dict[str, int]:
    """Bytes of the cache of keys and values, and of intermediate results while the network reads the prompts."""
    options, predicts = settings.generation, settings.run_mode == "predict"
    batch = settings.predict_batch_size if predicts else settings.eval_dataset.batch_size
    longest = config.seq_length if predicts else settings.eval_dataset.max_source_length
    prompt = min(longest, config.seq_length)
    slots = min(prompt + options.max_new_tokens, options.max_length or config.seq_length, config.seq_length)
    rows, capacity = slot_count(batch * options.num_beams), cache_capacity(slots) + _prefix(settings)
    item = ITEM_BYTES[config.compute_dtype]
    cache = 2 * config.num_layers * rows * config.num_kv_heads * capacity * config.kv_channels * item
    if options.num_beams > 1:
        cache += cache // (2 * config.num_layers)  # a copy of one table while beams are reordered
    prompt = min(prompt, slots)
    fused = _fuses_attention(settings, config)
    work = Work(config, ParallelConfig(), batch, prompt, prefix=capacity - prompt, fused_attention=fused)
    return {"kv_cache": cache, "activations": prefill_bytes(work)}
