"""What the tests of the engine share: a vocabulary, runs in this process, a small trained model."""

from __future__ import annotations

import json
from pathlib import Path

import engine_fixtures
import numpy as np
import pytest
from engine_helpers import CONFIGS, TRAINED_NETWORK, run_here, tiny_arguments

vocabulary, finetune = engine_fixtures.vocabulary, engine_fixtures.finetune


@pytest.fixture(scope="session")
def trained(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a GLM3 of TRAINED_NETWORK that writes adverts, not always right ones."""
    folder = tmp_path_factory.mktemp("trained")
    line = tiny_arguments(
        "finetune", vocabulary, *TRAINED_NETWORK, "--output_dir", folder, "runner_config.max_steps=150",
        "runner_config.batch_size=8", "lr_schedule.learning_rate=0.01", "logging.tensorboard=False",
        "checkpoint.save_steps=null"
    )  # fmt: skip
    assert run_here(line) == 0
    return folder


@pytest.fixture(scope="session")
def answering(vocabulary: Path, tmp_path_factory: pytest.TempPathFactory):
    """answering(text): folder of a network of TRAINED_NETWORK that answers every prompt with `text`.

    Blocks add nothing and embeddings are unit vectors far from one another, so that the next token is a
    function of the last one alone. The tokens of `text` must differ.
    """

    def build(text: str) -> Path:
        from glm_ms import ChatGLM3Tokenizer
        from glm_ms.convert.safetensors_file import write_safetensors
        from glm_ms.generation import GLMForCausalLM
        from glm_ms.settings import load_settings, resolve_vocab_size

        tokenizer = ChatGLM3Tokenizer(vocabulary)
        path = CONFIGS / "tiny" / "eval_glm3_tiny.yaml"
        settings = load_settings(path, TRAINED_NETWORK, check_files=False)
        resolve_vocab_size(settings, tokenizer.vocab_size)
        config = settings.glm_config()
        chain = [
            tokenizer.get_command("<|assistant|>"), *tokenizer.encode(text, add_special_tokens=False),
            tokenizer.eos_token_id,
        ]  # fmt: skip
        assert len(set(chain)) == len(chain)
        weights = {
            name: np.zeros(parameter.shape, np.float32)
            for name, parameter in GLMForCausalLM(config).parameters().items()
        }
        embedding = weights["transformer.embedding.embedding_table"]
        embedding[:] = np.random.default_rng(0).standard_normal(embedding.shape)
        weights["transformer.encoder.final_layernorm.weight"][:] = 1
        for token, follower in zip(chain, chain[1:]):
            weights["transformer.output_layer.weight"][follower] = embedding[token]
        folder = tmp_path_factory.mktemp("answering")
        shapes = {name: value.shape for name, value in weights.items()}
        path = folder / "model.safetensors"
        write_safetensors(path, shapes, "float32", iter(weights.values()), {"format": "np"})
        (folder / "config.json").write_text(json.dumps(config.to_hf_dict()))
        return folder

    return build
