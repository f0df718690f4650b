"""`--run_mode export`: a network with its key/value cache as MindIR files, for programs without this package."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm_ms.convert.writers import check_space
from glm_ms.generation import GLMForCausalLM
from glm_ms.generation.decoder import DecoderGraphs
from glm_ms.generation.graphs import GRAPHS
from glm_ms.model.cache import PositionedGLM
from glm_ms.settings import Settings
from glm_ms.storage.atomic import staged

# Folders and files as in MindFormers. From 1 GB on, MindSpore puts the weights into `rank_0_variables` beside a graph.
PREFILL, STEP, GRAPH = "mindir_full_checkpoint", "mindir_inc_checkpoint", "rank_0_graph.mindir"


def export(settings: Settings, model: GLMForCausalLM) -> list[Path]:
    """Writes a graph for prompts and one for steps into the output folder; returns the paths of their files.

    Both take input_ids and position_ids int32 [B, S], where B is `predict_batch_size`, and return the logits after the
    last tokens, float32 [B, V]. A prompt has any length S, is padded on the right, and needs `last` int32 [B], the
    place of the last token in each row. A step has S = 1. Each graph has its own parameters, the weights and the cache
    (`key_cache.N`, `value_cache.N`) for `seq_length` tokens per row: the cache of the first becomes that of the second
    by `set_data`.

    Raises CheckpointError if the disk has too little space.
    """
    rows, output_dir = settings.predict_batch_size, Path(settings.output_dir)
    graphs = DecoderGraphs(model.network, rows, model.config.seq_length)
    GRAPHS.run(graphs.fill_prefix)
    cells = [PositionedGLM(model.network, graphs.cache, graphs.prefix) for _ in (PREFILL, STEP)]
    size = sum(parameter.nbytes for cell in cells for parameter in cell.get_parameters())
    check_space(output_dir, output_dir, size)
    words, token = Tensor(shape=[rows, None], dtype=ms.int32), Tensor(np.zeros((rows, 1), np.int32))
    last = Tensor(np.zeros(rows, np.int32))
    with staged(output_dir / PREFILL, folder=True) as first, staged(output_dir / STEP, folder=True) as second:
        GRAPHS.run(_write, cells[0], (words, words, last), first)
        GRAPHS.run(_write, cells[1], (token, token), second)
    return [output_dir / name / GRAPH for name in (PREFILL, STEP)]


def _write(cell: PositionedGLM, inputs: tuple[Tensor, ...], folder: Path) -> None:
    name = GRAPH.removesuffix("_graph.mindir")  # MindSpore appends `_graph` only to large graphs
    ms.export(cell, *inputs, file_name=str(folder / name), file_format="MINDIR")
    small = folder / f"{name}.mindir"
    if small.exists():
        small.rename(folder / GRAPH)
