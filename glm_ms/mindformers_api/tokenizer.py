"""The tokenizers of this project as MindFormers knows tokenizers. Ids and texts are exactly the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mindformers import AutoTokenizer
from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.models.tokenization_utils_base import (
    BatchEncoding,
    PaddingStrategy,
    TruncationStrategy,
    to_py_obj,
)

from glm_ms.families import FAMILIES, family_of
from glm_ms.mindformers_api.auto import TOKENIZER_CLASS, made_folder
from glm_ms.mindformers_api.vocabulary import CONFIG_FILE, GENERATION_KEY, VOCABULARY_FILE, find_vocabulary
from glm_ms.mindformers_api.yaml import is_run_yaml
from glm_ms.storage.atomic import replace_text
from glm_ms.tokenizer import SentencePieceTokenizer, VocabularyError

# What AutoTokenizer passes along; and keys of the released tokenizer_config.json files without effect.
_WITHOUT_MEANING = (
    "_commit_hash", "_from_auto", "_from_pipeline", "added_tokens_decoder", "auto_map", "cache_dir", "chat_template",
    "clean_up_tokenization_spaces", "do_lower_case", "force_download", "local_files_only", "proxies", "remove_space",
    "resume_download", "revision", "token", "tokenizer_class", "trust_remote_code", "use_fast", GENERATION_KEY,
)  # fmt: skip


class ChatPrompt(str):
    """Text of a prompt in the chat template, with its ids: the tokenizers take those and do not read the text.

    So the role tokens of a prompt that was built here count as such, while text of a user that spells one does not.

    Attributes:
        token_ids: what the text stands for.
    """

    token_ids: list[int]

    def __new__(cls, text: str, token_ids: Sequence[int]) -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.token_ids = list(token_ids)
        return prompt

    def __deepcopy__(self, _: dict) -> ChatPrompt:
        return self


class ChatGLMTokenizer(PreTrainedTokenizer):
    """What `GLM2Tokenizer` and `GLM3Tokenizer` share. `from_pretrained` chooses the one that a folder or YAML is for.

    Args:
        vocab_file: the SentencePiece model.
        kwargs: keys of a tokenizer_config.json.

    Attributes:
        core: the tokenizer of this project.

    Raises:
        VocabularyError: the file is missing or not a SentencePiece model.
    """

    vocab_files_names = {"vocab_file": VOCABULARY_FILE}  # noqa: RUF012 - declared by the base class
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012 - declared by the base class
    padding_side = "left"
    core_class: type[SentencePieceTokenizer] | None = None

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        if self.core_class is None:
            raise VocabularyError(
                f"{TOKENIZER_CLASS}(...): write GLM2Tokenizer or GLM3Tokenizer, or {TOKENIZER_CLASS}.from_pretrained"
            )
        self.core = self.core_class(vocab_file)
        self.vocab_file = str(vocab_file)
        kwargs = {key: value for key, value in kwargs.items() if key not in _WITHOUT_MEANING}
        if kwargs.get("padding_side", "left") != "left":
            raise ValueError(
                f"padding_side = {kwargs['padding_side']!r}: these models are padded on the left only"
            )
        tokens = {"eos_token": self.core.eos_token, "pad_token": self.core.pad_token}
        super().__init__(**{**tokens, "unk_token": self.core.unk_token, **kwargs})

    # ------------------------------------------------------------------ vocabulary

    @property
    def vocab_size(self) -> int:
        """Pieces and special tokens together."""
        return self.core.vocab_size

    def __len__(self) -> int:
        return self.core.vocab_size

    @property
    def pad_token_id(self) -> int:
        """Id of <unk>, which pads."""
        return self.core.pad_token_id

    @property
    def eos_token_id(self) -> int:
        """Id of </s>."""
        return self.core.eos_token_id

    @property
    def stop_token_ids(self) -> list[int]:
        """Ids that end an answer, for `generate(..., eos_token_id=...)`."""
        return list(self.core.stop_token_ids)

    def get_vocab(self) -> dict[str, int]:
        """Piece or special token -> id."""
        sp = self.core.sp
        pieces = {sp.IdToPiece(index): index for index in range(sp.GetPieceSize())}
        return {**pieces, **{token: self.core.get_command(token) for token in self.core.special_tokens}}

    def get_command(self, token: str) -> int:
        """Id of a special token; see the tokenizer of this project."""
        return self.core.get_command(token)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Raises ValueError: the vocabulary is that of the weights."""
        raise ValueError(
            f"{type(self).__name__}: tokens cannot be added, the vocabulary is that of the weights"
        )

    add_special_tokens = add_tokens

    # ------------------------------------------------------------------ text to ids

    def tokenize(self, text: str, *_: Any, **__: Any) -> list[str]:
        """Pieces of a text, without special tokens."""
        return self.core.tokenize(text)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """Id of a piece or special token, or of each in a list."""
        return self.core.convert_tokens_to_ids(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Special tokens around one text or two."""
        return self.core.num_special_tokens_to_add(pair)

    def _get_padding_truncation_strategies(
        self, padding: Any = False, truncation: Any = None, max_length: int | None = None, **kwargs: Any
    ) -> tuple:
        """The base class goes on without cutting or padding where max_length is missing, and only logs it."""
        cuts = truncation not in (None, False, TruncationStrategy.DO_NOT_TRUNCATE, "do_not_truncate")
        if max_length is None and (cuts or padding in ("max_length", PaddingStrategy.MAX_LENGTH)):
            raise ValueError("max_length is missing: truncation and padding='max_length' need it")
        return super()._get_padding_truncation_strategies(padding, truncation, max_length, **kwargs)

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        return self._encoded([(text, text_pair)], single=True, **options)

    def _batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **options: Any) -> BatchEncoding:
        pairs = [item if _is_pair(item) else (item, None) for item in batch_text_or_text_pairs]
        return self._encoded(pairs, single=False, **options)

    def _encoded(
        self,
        pairs: Sequence[tuple[Any, Any]],
        single: bool,
        add_special_tokens: bool = True,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        return_length: bool = False,
        **others: Any,
    ) -> BatchEncoding:
        for name in (
            "return_overflowing_tokens",
            "return_special_tokens_mask",
            "return_offsets_mapping",
            "stride",
        ):
            if others.get(name):
                raise ValueError(f"{name}: {type(self).__name__} has no such option")
        if truncation_strategy in (TruncationStrategy.ONLY_FIRST, TruncationStrategy.ONLY_SECOND):
            raise ValueError(f"truncation = {truncation_strategy.value!r}: must be True or 'longest_first'")
        truncation = truncation_strategy != TruncationStrategy.DO_NOT_TRUNCATE
        limit = max_length if truncation else None
        rows = [{"input_ids": self._ids(*pair, add_special_tokens, limit)} for pair in pairs]
        return self._padded(
            rows,
            single,
            padding_strategy,
            max_length,
            pad_to_multiple_of,
            return_tensors,
            return_attention_mask is not False,
            return_length,
        )

    def _ids(self, text: Any, pair: Any, add_special_tokens: bool, limit: int | None) -> list[int]:
        if not isinstance(text, ChatPrompt) and isinstance(text, str):
            return self.core.encode(text, pair, add_special_tokens, limit is not None, limit)
        if pair is not None:
            raise ValueError("a chat prompt or a list of ids cannot be the first of a pair")
        if isinstance(text, ChatPrompt):
            ids = list(text.token_ids)
        elif isinstance(text, (list, tuple)) and all(type(token) is int for token in text):
            ids = [*(self.core.prefix_tokens if add_special_tokens else ()), *text]
        else:
            raise TypeError(f"text must be a string or a list of ids, found {type(text).__name__}")
        if limit is not None and len(ids) > limit:
            raise ValueError(
                f"a chat prompt of {len(ids)} tokens would lose its end at max_length = {limit}; raise it"
            )
        return ids

    def _padded(
        self,
        rows: Sequence[dict[str, list[int]]],
        single: bool,
        strategy: PaddingStrategy,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        return_tensors: Any,
        with_mask: bool,
        with_length: bool,
    ) -> BatchEncoding:
        padding: bool | str = False if strategy == PaddingStrategy.DO_NOT_PAD else strategy.value
        limit = max_length if padding == "max_length" else None
        data: dict[str, Any] = self.core.pad(rows, padding, limit, pad_to_multiple_of)
        if with_length:
            data["length"] = [len(row) for row in data["input_ids"]]
        if not with_mask:
            del data["attention_mask"]
        if single:
            data = {name: values[0] for name, values in data.items()}
        return BatchEncoding(data, tensor_type=return_tensors)  # one text: no batch axis, as in MindFormers

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads encoded texts on the left; see the tokenizer of this project for errors."""
        strategy, _, max_length, _ = self._get_padding_truncation_strategies(padding, None, max_length)
        plain = to_py_obj(encoded_inputs)
        if isinstance(plain, dict):
            plain = [dict(zip(plain, values)) for values in zip(*plain.values())]
        with_mask = return_attention_mask is not False
        return self._padded(
            plain, False, strategy, max_length, pad_to_multiple_of, return_tensors, with_mask, False
        )

    # ------------------------------------------------------------------ chat

    def build_prompt(
        self, query: str, history: Sequence[Any] | None = None, role: str = "user"
    ) -> ChatPrompt:
        """A question in the chat template of the model, ready for a call of this tokenizer or a pipeline.

        Args:
            query: the question.
            history: earlier messages, see `build_chat_input` of the tokenizer of this project.
            role: of the question.
        """
        ids = self.core.build_chat_input(query, history, role)["input_ids"]
        return ChatPrompt(self.core.decode(ids), ids)

    def build_chat_input(
        self,
        query: str,
        history: Sequence[Any] | None = None,
        role: str = "user",
        return_tensors: Any = "np",
    ) -> BatchEncoding:
        """Ids, mask and positions of a question in the chat template, [1, S] each."""
        data = self.core.build_chat_input(query, history, role)
        return BatchEncoding({name: [values] for name, values in data.items()}, tensor_type=return_tensors)

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError: the base class would apply the template of other models."""
        raise ValueError("apply_chat_template: use build_prompt or build_chat_input")

    # ------------------------------------------------------------------ ids to text

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int], skip_special_tokens: bool = False
    ) -> str | list[str]:
        """Piece of an id, or of each in a list."""
        return self.core.convert_ids_to_tokens(ids)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of pieces."""
        return self.core.convert_tokens_to_string(tokens)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Text of ids; a list of texts for a list of sequences, as pipelines want it.

        Ids of padded rows of the vocabulary, which an untrained network picks, stand for nothing.
        `skip_special_tokens` changes nothing, as in the reference; nor does `clean_up_tokenization_spaces`.
        """
        plain = to_py_obj(token_ids)
        if isinstance(plain, int):
            plain = [plain]
        if plain and isinstance(plain[0], list):
            return [self.decode(row) for row in plain]
        return self.core.decode([token for token in plain if token < self.core.vocab_size])

    # ------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(cls, name_or_path: str, *_: Any, **kwargs: Any) -> ChatGLMTokenizer:
        """Loads a tokenizer.

        Args:
            name_or_path: a folder with tokenizer.model (Hugging Face folder, or what `save_pretrained` wrote), the
                output folder of a run, a YAML of this project, or the vocabulary itself.
            kwargs: `model_generation`: 2 or 3, where the folder does not tell which ChatGLM it is for.

        Raises:
            VocabularyError: no vocabulary there, or nothing tells the generation.
            SettingsError: a YAML that cannot be read.
        """
        path = Path(str(kwargs.pop("pretrained_model_name_or_path", None) or name_or_path))
        own = None if cls.core_class is None else family_of(cls.core_class.__name__).generation
        generation, vocab_file = find_vocabulary(path, kwargs.pop(GENERATION_KEY, None) or own)
        return BY_GENERATION[generation](str(vocab_file), **{**kwargs, "name_or_path": str(path)})

    def save_pretrained(self, save_directory: str, *_: Any, **kwargs: Any) -> tuple[str, ...]:
        """Writes tokenizer.model and tokenizer_config.json, which AutoTokenizer reads; returns their paths."""
        folder = made_folder(save_directory)
        config = {"tokenizer_class": TOKENIZER_CLASS, GENERATION_KEY: family_of(self.core).generation}
        replace_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        return (*self.save_vocabulary(str(folder)), str(folder / CONFIG_FILE))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the vocabulary into a folder; returns its path."""
        target = Path(save_directory) / VOCABULARY_FILE
        if not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class GLM2Tokenizer(ChatGLMTokenizer):
    """`glm_ms.ChatGLM2Tokenizer` for MindFormers, whose registry has a stock class by that name."""

    core_class = FAMILIES["chatglm2"].tokenizer


class GLM3Tokenizer(ChatGLMTokenizer):
    """`glm_ms.ChatGLM3Tokenizer` for MindFormers, whose registry has a stock class by that name."""

    core_class = FAMILIES["chatglm3"].tokenizer


BY_GENERATION = {2: GLM2Tokenizer, 3: GLM3Tokenizer}


def install_auto_tokenizer() -> None:
    """Lets `AutoTokenizer.from_pretrained("x.yaml")` take YAMLs of this project.

    MindFormers takes the path of a file for something to download, before it asks any class: the method that does so is
    replaced by one that hands everything else to the original. Safe to call again.
    """
    stock = AutoTokenizer.__dict__["get_class_from_experimental_mode"].__func__
    if getattr(stock, "of_glm_ms", False):
        return

    def choose(cls: type, path: str, *inputs: Any, **kwargs: Any) -> Any:
        lost = Path(path).suffix in (".yaml", ".yml") and not Path(path).exists()
        if lost or is_run_yaml(path):
            return ChatGLMTokenizer.from_pretrained(path, **kwargs)
        return stock(cls, path, *inputs, **kwargs)

    choose.of_glm_ms = True
    AutoTokenizer.get_class_from_experimental_mode = classmethod(choose)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item)
