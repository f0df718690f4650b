"""Names of released models in place of paths: `AutoModel.from_pretrained("glm3_6b")`, `Trainer(model="glm2_6b")`.

Nothing is downloaded. Weights and vocabulary are expected where MindFormers 1.0 to 1.3 downloaded them:
`checkpoint_download/glm3/glm3_6b.ckpt` and `checkpoint_download/glm3/tokenizer.model`.
"""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
from mindformers.mindformer_book import MindFormerBook

from glm_ms.pretrained import TOKENIZER_FILE
from glm_ms.resources import resource
from glm_ms.settings import Settings
from glm_ms.settings.loader import unchecked_settings

# Name of a model -> its YAML.
MODEL_NAMES = {
    "glm2_tiny": "configs/tiny/finetune_glm2_tiny.yaml",
    "glm3_tiny": "configs/tiny/finetune_glm3_tiny.yaml",
    "glm2_6b": "configs/glm2/run_glm2_6b_finetune_800T_A2_64G.yaml",
    "glm2_6b_lora": "configs/glm2/run_glm2_6b_lora_800T_A2_64G.yaml",
    "glm2_6b_ptuning2": "configs/glm2/run_glm2_6b_ptuning2_800T_A2_64G.yaml",
    "glm3_6b": "configs/glm3/run_glm3_6b_finetune_800T_A2_64G.yaml",
    "glm3_6b_lora": "configs/glm3/run_glm3_6b_lora_800T_A2_64G.yaml",
    "glm3_6b_ptuning2": "configs/glm3/run_glm3_6b_ptuning2_800T_A2_64G.yaml",
}
# MindFormers reads the YAML of a name by a path; no file has this one.
_VIRTUAL = "glm_ms://configs/"


def is_name(path: str) -> bool:
    """Whether this is the name of a model, also as `mindspore/glm3_6b`, and not an existing file."""
    return path.removeprefix("mindspore/") in MODEL_NAMES and not Path(path).exists()


def yaml_path(name: str) -> str:
    """The path by which `MindFormerConfig` reads the YAML of a name; any other path as it is."""
    return f"{_VIRTUAL}{name.removeprefix('mindspore/')}.yaml" if is_name(name) else name


def is_virtual(path: str) -> bool:
    """Whether a path is one of `yaml_path` for a name."""
    return path.startswith(_VIRTUAL)


def expected_files(name: str) -> tuple[Path, Path]:
    """Weights and vocabulary of a name: those that exist, or else the paths where they should be."""
    model = "_".join(name.removeprefix("mindspore/").split("_")[:2])
    folder = Path(MindFormerBook.get_default_checkpoint_download_folder(), model.split("_")[0])
    weights = [folder / f"{model}.ckpt", folder / f"{model}.safetensors", folder / model]
    weights += [folder] if (folder / "config.json").is_file() else []
    found = next((path for path in weights if path.exists()), weights[0])
    vocabulary = [folder / TOKENIZER_FILE, folder / model / TOKENIZER_FILE]
    return found, next((path for path in vocabulary if path.is_file()), vocabulary[0])


def settings_of_name(path: str) -> Settings:
    """The settings of a virtual path: those of the YAML on the current device, with the files of `expected_files` for
    files that do not exist."""
    name = path.removeprefix(_VIRTUAL).removesuffix(".yaml")
    settings = unchecked_settings(resource(MODEL_NAMES[name]))
    settings.context.device_target = ms.get_context("device_target")
    weights, vocabulary = expected_files(name)
    configured = settings.load_checkpoint
    if weights.exists() or (configured and not Path(configured).exists()):
        settings.load_checkpoint = str(weights)
    chosen = settings.processor.tokenizer
    if not chosen.vocab_file or not Path(chosen.vocab_file).is_file():
        chosen.vocab_file = str(vocabulary)
    return settings
