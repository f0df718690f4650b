"""`--run_mode export`: a network with its key/value cache as MindIR files, for programs without this package."""

from __future__ import annotations

import os
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from glm_ms.convert.writers import check_space
from glm_ms.engine.process import Say
from glm_ms.engine.ranks import ranks_of
from glm_ms.engine.results import result_folder
from glm_ms.generation import GLMForCausalLM
from glm_ms.generation.graphs import GRAPHS, run_cell
from glm_ms.model.cache import KVCache, PositionedGLM, WritePrefix
from glm_ms.settings import Settings
from glm_ms.storage.atomic import staged
from glm_ms.storage.run_folder import MODE_RESULTS

# As in MindFormers. From 1 GB on, MindSpore puts the weights into `rank_0_variables` beside the file.
GRAPH = "rank_0_graph.mindir"


def export(settings: Settings, model: GLMForCausalLM, say: Say) -> list[Path]:
    """Writes a graph for prompts and one for steps into the output folder; returns the paths of their files.

    Both take input_ids and position_ids int32 [B, S], where B is `predict_batch_size`, and return the logits after the
    last tokens, float32 [B, V]. A prompt has any length S, is padded on the right, and needs `last` int32 [B], the
    place of the last token in each row. A step has S = 1. Each graph has its own parameters, the weights and the cache
    (`key_cache.N`, `value_cache.N`) for `seq_length` tokens of a row: the cache of the first becomes that of the second
    by `set_data`.

    Raises CheckpointError if the disk has too little space, or another process writes into the folder.
    """
    rows, output_dir = settings.predict_batch_size, Path(settings.output_dir)
    encoder = model.network.transformer.prefix_encoder
    prefix = 0 if encoder is None else encoder.length
    cache = KVCache(model.config, rows, model.config.seq_length + prefix)
    cells = [PositionedGLM(model.network, cache, prefix) for _ in range(2)]
    size = sum(parameter.nbytes for cell in cells for parameter in cell.get_parameters())
    check_space(output_dir, output_dir, size)
    words, token = Tensor(shape=[rows, None], dtype=ms.int32), Tensor(np.zeros((rows, 1), np.int32))
    last = Tensor(np.zeros(rows, np.int32))
    folders = [output_dir / name for name in MODE_RESULTS[settings.run_mode]]
    with result_folder(settings, {}, ranks_of(settings), say):
        if encoder is not None:
            indices = np.tile(np.arange(prefix), (rows, 1))
            run_cell(WritePrefix(encoder, rows, cache), cache.rows(np.arange(rows), indices))
        with staged(folders[0], folder=True) as prefill, staged(folders[1], folder=True) as step:
            GRAPHS.run(_write, cells[0], (words, words, last), prefill)
            GRAPHS.run(_write, cells[1], (token, token), step)
    return [folder / GRAPH for folder in folders]


def _write(cell: PositionedGLM, inputs: tuple[Tensor, ...], folder: Path) -> None:
    folder = folder.resolve()
    name = GRAPH.removesuffix("_graph.mindir")  # MindSpore appends `_graph` only to large graphs
    before = Path.cwd()
    os.chdir(folder)  # MindSpore refuses spaces and Chinese characters in the name that it is given
    try:
        ms.export(cell, *inputs, file_name=name, file_format="MINDIR")
    finally:
        os.chdir(before)
    small = folder / f"{name}.mindir"
    if small.exists():
        small.rename(folder / GRAPH)
