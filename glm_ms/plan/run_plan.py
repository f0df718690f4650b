"""`plan_run`: settings -> memory of a card of each stage, work and traffic of a step; and the plan as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from glm_ms.generation.decoder import cache_capacity, slot_count
from glm_ms.generation.page_graphs import CHUNK, pages_of
from glm_ms.generation.pages import PAGE, RESERVED
from glm_ms.metrics import LOSS, TEXT, takes
from glm_ms.model.config import GLMConfig
from glm_ms.ops.cpu.rows import page_bytes
from glm_ms.parallel.config import ParallelConfig
from glm_ms.plan import work as costs
from glm_ms.plan.planned_parameters import FLOAT32, StoredPart, lora_targets, planned_parameters, stored_parts
from glm_ms.plan.work import Work
from glm_ms.settings import Settings
from glm_ms.settings.schema import is_sharded, parallel_of, training_length

GIB = 2**30


@dataclass(frozen=True)
class CardMemory:
    """Bytes on one card."""

    stage: int  # pipeline stage of the card
    weights: int  # in their storage type
    gradients: int = 0  # of the trained parameters, with the sums of micro batches if there are any
    optimizer: int = 0  # both moments
    copies: int = 0  # weights in the compute type, and gathered from other cards, as far as a step keeps them
    activations: int = 0  # of a step, with or without recompute as set; in eval and predict of a prefill
    activations_kept: int = 0  # the same without recompute
    activations_recomputed: int = 0  # the same with recompute
    kv_cache: int = 0  # keys and values of generation

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations + self.kv_cache


@dataclass(frozen=True)
class RunPlan:
    """Memory, work and traffic of a run."""

    settings: Settings
    parallel: ParallelConfig
    parameters: int  # elements of the whole network, adapter included
    trained: int  # elements of the trained parameters
    stages: tuple[CardMemory, ...]  # memory of a card of each pipeline stage
    rows: int = 0  # of an update on all cards; 0 if nothing is trained
    tokens: int = 0  # positions of these rows
    flops: int = 0  # floating point operations of an update on all cards
    sent: Mapping[str, float] = field(default_factory=dict)  # purpose -> bytes in an update, card with most traffic

    @property
    def card(self) -> CardMemory:
        """The card with the largest need of memory."""
        return max(self.stages, key=lambda card: card.total)


def plan_run(settings: Settings, num_cards: int) -> RunPlan:
    """Plans a run on a number of cards, from checked settings with the size of the vocabulary known.

    Raises AdapterError if `target_modules` matches no module.
    """
    config, parallel = settings.glm_config(), parallel_of(settings, num_cards)
    parameters = planned_parameters(settings, config)
    parts = stored_parts(config, parallel, parameters)
    elements = {name: math.prod(parameter.shape) for name, parameter in parameters.items()}
    sizes = sum(elements.values()), sum(elements[name] for name in parameters if parameters[name].trained)
    if not settings.is_training():
        weights = sum(part.stored for part in parts if part.slice.stage == 0)
        card = CardMemory(0, weights, **_generation(settings, config))
        return RunPlan(settings, parallel, *sizes, stages=(card,))
    pet = settings.model.pet_config
    work = Work(
        config,
        parallel,
        settings.runner_config.batch_size,
        training_length(settings),
        prefix=_prefix(settings),
        sharded=is_sharded(settings),
        base_trained=pet.pet_type is None,
        lora_targets=lora_targets(settings, config),
        lora_dropout=pet.pet_type == "lora" and pet.lora_dropout > 0,
        fused_kernels=_fused(settings),
        keeps_sums=not settings.recompute_config.mp_comm_recompute,
    )
    micro_batches = parallel.micro_batch_num * settings.runner_config.gradient_accumulation_steps
    rows = work.rows * parallel.data_parallel * micro_batches
    recompute, keys = settings.recompute_config.recompute, work.length + work.prefix
    flops = costs.step_flops(config, rows * work.length, keys, work.base_trained, recompute)
    stages = [
        _Stage(settings, work, stage, [part for part in parts if part.slice.stage == stage])
        for stage in range(parallel.pipeline_stages)
    ]
    memory = tuple(stage.memory() for stage in stages)
    sent = max((stage.sent() for stage in stages), key=lambda sent: sum(sent.values()))
    return RunPlan(settings, parallel, *sizes, memory, rows, rows * work.length, flops, sent)


@dataclass(frozen=True)
class _Stage:
    """A training step on a card of one pipeline stage; `parts` is what the card stores of the parameters."""

    settings: Settings
    work: Work
    stage: int
    parts: list[StoredPart]

    def memory(self) -> CardMemory:
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
        return costs.activation_bytes(self.work, self._layers, in_flight, recompute, has_loss=stages_left == 1)

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
        tensor = costs.tensor_traffic(work, self._layers, recompute.recompute, first, last)
        micro = work.parallel.micro_batch_num
        return {
            "gradients": costs.gradient_traffic(self.parts),
            "gathered weights": costs.weight_traffic(self.parts, work.item, passes),
            "tensor parallelism": micro * tensor,
            "pipeline": micro * costs.stage_traffic(work, self.stage),
        }


def _prefix(settings: Settings) -> int:
    pet = settings.model.pet_config
    return pet.pre_seq_len if pet.pet_type == "ptuning2" else 0


def _fused(settings: Settings) -> bool:
    """Whether attention is surely a fused kernel. With `auto` the card decides; the portable operator needs more."""
    return settings.context.use_fused_kernels is True


def _generation(settings: Settings, config: GLMConfig) -> dict[str, int]:
    """Bytes of the cache of keys and values, and of intermediate results."""
    options, prefix = settings.generation, _prefix(settings)
    predicts, fused = settings.run_mode in ("predict", "export"), _fused(settings)
    batch = settings.predict_batch_size if predicts else settings.eval_dataset.batch_size
    if settings.run_mode == "export":  # the graphs take whole prompts
        tokens = batch * (config.seq_length + prefix)
        passes = [Work(config, ParallelConfig(), batch, config.seq_length, prefix=prefix, fused_kernels=fused)]
    else:
        prompt = min(config.seq_length if predicts else settings.eval_dataset.max_source_length, config.seq_length)
        longest = min(prompt + options.max_new_tokens, options.max_length or config.seq_length, config.seq_length)
        pages, prefix_pages = pages_of(cache_capacity(longest)), pages_of(prefix)
        rows = slot_count(batch * max(options.num_beams, options.num_return_sequences))
        keys, tokens = (pages + prefix_pages) * PAGE, (RESERVED + rows * pages + prefix_pages) * PAGE
        chunk = min(prompt, CHUNK)
        step = Work(config, ParallelConfig(), rows, 1, prefix=keys - 1, fused_kernels=fused)
        passes = [step, replace(step, rows=1, length=chunk, prefix=keys - chunk)]
    if not predicts and takes(LOSS, settings.metric.type):
        length = min(
            settings.eval_dataset.max_source_length + settings.eval_dataset.max_target_length, config.seq_length
        )
        passes.append(replace(passes[0], rows=batch, length=length, prefix=prefix))
    token = 2 * config.num_kv_heads * config.kv_channels * passes[0].item
    if (kept := settings.model.kv_cache) is not None:
        token = page_bytes(kept, config.num_kv_heads, config.kv_channels) // PAGE
    cache = config.num_layers * tokens * token
    return {"kv_cache": cache, "activations": max(map(costs.prefill_bytes, passes))}


def describe(plan: RunPlan, memory: int | None) -> Iterator[str]:
    """Lines about a run on cards with `memory` bytes for it (None: unknown): what it is, its memory, its work."""
    parallel, card = plan.parallel, plan.card
    yield (
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; {parallel.cards} card"
        f"{'' if parallel.cards == 1 else 's'}: data_parallel {parallel.data_parallel} x "
        f"model_parallel {parallel.model_parallel} x pipeline_stage {parallel.pipeline_stages}"
    )
    where = f" (stage {card.stage}, which needs most)" if len(plan.stages) > 1 else ""
    yield f"memory of a card{where}:"
    for name, size, note in (*_memory(plan, card), ("in all", card.total, "")):
        yield f"  {name:<18}{size_text(size):>12}  {size:>15,} bytes{'  ' + note if note else ''}"
    if memory is not None:
        free = memory - card.total
        more = f"{size_text(free)} left" if free >= 0 else f"{size_text(-free)} too much"
        verdict = "fits" if free >= 0 else "does not fit"
        yield f"{verdict}: {size_text(card.total)} of {size_text(memory)}, {more}"
    if plan.rows:
        yield "one update:"
        yield f"  {plan.rows:,} rows, {plan.tokens:,} tokens (padding included)"
        yield f"  {plan.flops / 1e12:,.1f} TFLOP, {plan.flops / parallel.cards / 1e12:,.1f} on each card"
        parts = ", ".join(f"{name} {size_text(size)}" for name, size in plan.sent.items() if size)
        yield f"  {size_text(sum(plan.sent.values()))} sent by each card{': ' + parts if parts else ''}"


def _memory(plan: RunPlan, card: CardMemory) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and note of each part."""
    yield "weights", card.weights, ""
    note = "while prompts are read"
    if plan.settings.is_training():
        yield "gradients", card.gradients, "float32"
        yield "optimizer", card.optimizer, "two float32 moments"
        yield "copies of weights", card.copies, "cast to the compute type, or gathered"
        recompute = plan.settings.recompute_config.recompute
        step, other = card.activations_kept, card.activations_recomputed
        step, other = (other, step) if recompute else (step, other)
        note = (
            f"{'with' if recompute else 'without'} recompute; {'without' if recompute else 'with'} {size_text(other)}"
        )
        if card.activations > step:
            note = "while an evaluation reads prompts, more than a step's"
    yield "activations", card.activations, note
    yield "KV cache", card.kv_cache, ""


def size_text(size: float) -> str:
    """Bytes as text, in GiB or MiB."""
    if not size:
        return "0"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"
