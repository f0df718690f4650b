"""The tokenizers of glm_ms as MindFormers tokenizers, with the same ids and texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.models.tokenization_utils_base import BatchEncoding, PaddingStrategy, TruncationStrategy, to_py_obj

from glm_ms.families import FAMILIES, family_of
from glm_ms.mindformers_api.config import DOWNLOAD_OPTIONS, TOKENIZER_CLASS, create_folder
from glm_ms.mindformers_api.run_yaml import read_run_yaml
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.readers import read_object
from glm_ms.tokenizer import SentencePieceTokenizer, VocabularyError

MODEL_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer_config.json"
# ChatGLM2 and ChatGLM3 use the same SentencePiece model. tokenizer_config.json tells them apart: by this key, which
# `save_pretrained` writes, or by the name of the released model.
GENERATION_KEY = "model_generation"
_RELEASED = {name: family.generation for family in FAMILIES.values() for name in family.released}
_PUBLISHERS = ("THUDM", "zai-org", "ZhipuAI")
# Arguments of AutoTokenizer, and keys of the released tokenizer_config.json files that change nothing.
_IGNORED = (
    *DOWNLOAD_OPTIONS, "added_tokens_decoder", "auto_map", "chat_template", "clean_up_tokenization_spaces", "config",
    "do_lower_case", "remove_space", "tokenizer_class", "tokenizer_type", "use_fast", GENERATION_KEY,
)  # fmt: skip
_UNSUPPORTED = ("return_overflowing_tokens", "return_special_tokens_mask", "return_offsets_mapping", "stride")


class ChatPrompt(str):
    """Text of a prompt in the chat template, with its ids. The tokenizers use the ids alone: so the role tokens of a
    built prompt are special tokens, while the same spelling in a user's text is plain text."""

    token_ids: list[int]

    def __new__(cls, text: str, token_ids: Sequence[int]) -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.token_ids = list(token_ids)
        return prompt

    def __deepcopy__(self, _: dict) -> ChatPrompt:
        return self


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Base class of `GLM2Tokenizer` and `GLM3Tokenizer`; `from_pretrained` returns the one that fits the path.

    `core` is the tokenizer of glm_ms. `stop_token_ids` end an answer, for `generate(..., eos_token_id=...)`. Further
    arguments are keys of a tokenizer_config.json. Raises VocabularyError if the SentencePiece model cannot be used.
    """

    vocab_files_names = {"vocab_file": MODEL_FILE}  # noqa: RUF012 - declared by the base class
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012 - declared by the base class
    padding_side = "left"
    core_class: type[SentencePieceTokenizer] | None = None

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        if self.core_class is None:
            raise VocabularyError(
                f"{TOKENIZER_CLASS}(...): use GLM2Tokenizer, GLM3Tokenizer, or {TOKENIZER_CLASS}.from_pretrained"
            )
        self.core = self.core_class(vocab_file)
        self.vocab_file = str(vocab_file)
        kwargs = {key: value for key, value in kwargs.items() if key not in _IGNORED}
        if kwargs.get("padding_side", "left") != "left":
            raise ValueError(f"padding_side = {kwargs['padding_side']!r}: must be 'left'")
        tokens = {"eos_token": self.core.eos_token, "pad_token": self.core.pad_token}
        super().__init__(**{**tokens, "unk_token": self.core.unk_token, **kwargs})

    vocab_size = property(lambda self: self.core.vocab_size)
    pad_token_id = property(lambda self: self.core.pad_token_id)
    eos_token_id = property(lambda self: self.core.eos_token_id)
    stop_token_ids = property(lambda self: list(self.core.stop_token_ids))

    def __len__(self) -> int:
        return self.core.vocab_size

    def get_vocab(self) -> dict[str, int]:
        sp = self.core.sp
        pieces = {sp.IdToPiece(index): index for index in range(sp.GetPieceSize())}
        return {**pieces, **{token: self.core.get_command(token) for token in self.core.special_tokens}}

    def get_command(self, token: str) -> int:
        """Id of a special token."""
        return self.core.get_command(token)

    def tokenize(self, text: str, *_: Any, **__: Any) -> list[str]:
        return self.core.tokenize(text)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        return self.core.convert_tokens_to_ids(tokens)

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> Any:
        return self.core.convert_ids_to_tokens(ids)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.core.convert_tokens_to_string(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self.core.num_special_tokens_to_add(pair)

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Raises ValueError."""
        raise ValueError(f"{type(self).__name__}: cannot add tokens; the weights determine the vocabulary")

    add_special_tokens = add_tokens

    def _get_padding_truncation_strategies(
        self, padding: Any = False, truncation: Any = None, max_length: int | None = None, **kwargs: Any
    ) -> tuple:
        # Without max_length the base class would only log that it does not truncate or pad.
        cuts = truncation not in (None, False, TruncationStrategy.DO_NOT_TRUNCATE, "do_not_truncate")
        if max_length is None and (cuts or padding in ("max_length", PaddingStrategy.MAX_LENGTH)):
            raise ValueError("max_length is missing: truncation and padding='max_length' need it")
        return super()._get_padding_truncation_strategies(padding, truncation, max_length, **kwargs)

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> BatchEncoding:
        return self._encode_pairs([(text, text_pair)], single=True, **options)

    def _batch_encode_plus(self, batch_text_or_text_pairs: Sequence[Any], **options: Any) -> BatchEncoding:
        pairs = [item if _is_pair(item) else (item, None) for item in batch_text_or_text_pairs]
        return self._encode_pairs(pairs, single=False, **options)

    def _encode_pairs(
        self,
        pairs: Sequence[tuple[Any, Any]],
        single: bool,
        add_special_tokens: bool = True,
        truncation_strategy: TruncationStrategy = TruncationStrategy.DO_NOT_TRUNCATE,
        max_length: int | None = None,
        **options: Any,
    ) -> BatchEncoding:
        for name in _UNSUPPORTED:
            if options.get(name):
                raise ValueError(f"{name}: {type(self).__name__} does not support this option")
        if truncation_strategy in (TruncationStrategy.ONLY_FIRST, TruncationStrategy.ONLY_SECOND):
            raise ValueError(f"truncation = {truncation_strategy.value!r}: must be True or 'longest_first'")
        limit = None if truncation_strategy == TruncationStrategy.DO_NOT_TRUNCATE else max_length
        rows = [{"input_ids": self._ids(*pair, add_special_tokens, limit)} for pair in pairs]
        return self._pad_rows(rows, single, max_length=max_length, **options)

    def _ids(self, text: Any, pair: Any, add_special_tokens: bool, limit: int | None) -> list[int]:
        if isinstance(text, str) and not isinstance(text, ChatPrompt):
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
            raise ValueError(f"max_length = {limit} would cut the end of a chat prompt of {len(ids)} tokens; raise it")
        return ids

    def _pad_rows(
        self,
        rows: Any,
        single: bool,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: Any = None,
        return_length: bool = False,
        **_: Any,
    ) -> BatchEncoding:
        padding = False if padding_strategy == PaddingStrategy.DO_NOT_PAD else padding_strategy.value
        limit = max_length if padding == "max_length" else None
        data: dict[str, Any] = self.core.pad(rows, padding, limit, pad_to_multiple_of)
        if return_length:
            data["length"] = [len(row) for row in data["input_ids"]]
        if return_attention_mask is False:
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
        """Pads encoded texts on the left."""
        strategy, _, max_length, _ = self._get_padding_truncation_strategies(padding, None, max_length)
        rows = to_py_obj(encoded_inputs)
        return self._pad_rows(
            rows, False, strategy, max_length, pad_to_multiple_of, return_attention_mask, return_tensors
        )

    def build_prompt(self, query: str, history: Sequence[Any] | None = None, role: str = "user") -> ChatPrompt:
        """A question in the chat template, as input of this tokenizer or of a pipeline."""
        ids = self.core.build_chat_input(query, history, role)["input_ids"]
        return ChatPrompt(self.core.decode(ids), ids)

    def build_chat_input(
        self, query: str, history: Sequence[Any] | None = None, role: str = "user", return_tensors: Any = "np"
    ) -> BatchEncoding:
        """Ids, mask and positions of a question in the chat template, [1, S] each."""
        data = self.core.build_chat_input(query, history, role)
        return BatchEncoding({name: [values] for name, values in data.items()}, tensor_type=return_tensors)

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        """Raises ValueError: the base class would apply the template of other models."""
        raise ValueError("apply_chat_template: use build_prompt or build_chat_input")

    def decode(self, token_ids: Any, *_: Any, **__: Any) -> str | list[str]:
        """Text of ids, or a list of texts for a list of sequences, as pipelines need it.

        Ids beyond the vocabulary (padded rows of the embedding, which an untrained network may choose) give no text.
        Other arguments, as `skip_special_tokens`, change nothing, as in the reference.
        """
        ids = to_py_obj(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        single = not (ids and isinstance(ids[0], list))
        rows = [[token for token in row if token < self.vocab_size] for row in ([ids] if single else ids)]
        texts = [self.core.decode(row) for row in rows]
        return texts[0] if single else texts

    @classmethod
    def from_pretrained(cls, name_or_path: str, *_: Any, **kwargs: Any) -> ChatGLMTokenizer:
        """Loads a tokenizer; VocabularyError or SettingsError if there is none.

        Args:
            name_or_path: a folder with tokenizer.model (Hugging Face folder, or written by `save_pretrained`), the
                output folder of a run, a YAML of glm_ms, or the SentencePiece model itself.
            kwargs: `model_generation`: 2 or 3, if the folder does not tell which ChatGLM it belongs to.
        """
        path = Path(str(kwargs.pop("pretrained_model_name_or_path", None) or name_or_path))
        own = None if cls.core_class is None else family_of(cls.core_class.__name__).generation
        generation, vocab_file = _find_tokenizer(path, kwargs.pop(GENERATION_KEY, None) or own)
        return BY_GENERATION[generation](str(vocab_file), **{**kwargs, "name_or_path": str(path)})

    def save_pretrained(self, save_directory: str, *_: Any, **kwargs: Any) -> tuple[str, ...]:
        """Writes tokenizer.model and tokenizer_config.json, which AutoTokenizer reads; returns their paths."""
        folder = create_folder(save_directory)
        config = {"tokenizer_class": TOKENIZER_CLASS, GENERATION_KEY: family_of(self.core).generation}
        replace_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
        return (*self.save_vocabulary(str(folder)), str(folder / CONFIG_FILE))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the SentencePiece model into a folder; returns its path."""
        target = Path(save_directory) / MODEL_FILE
        if not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class GLM2Tokenizer(ChatGLMTokenizer):
    """`glm_ms.ChatGLM2Tokenizer` for MindFormers, which has a class of its own by that name."""

    core_class = FAMILIES["chatglm2"].tokenizer


class GLM3Tokenizer(ChatGLMTokenizer):
    """`glm_ms.ChatGLM3Tokenizer` for MindFormers, which has a class of its own by that name."""

    core_class = FAMILIES["chatglm3"].tokenizer


BY_GENERATION = {2: GLM2Tokenizer, 3: GLM3Tokenizer}


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item)


def _find_tokenizer(path: Path, generation: int | None = None) -> tuple[int, Path]:
    """The generation (2 or 3), by default the one found at the path, and the SentencePiece model."""
    found: int | None
    if path.is_dir() and not (path / MODEL_FILE).is_file():
        yaml_of_run = sorted(path.glob("*settings.yaml"))
        if not yaml_of_run:
            remedy = "copy the one of the weights into the folder, or give its path or the YAML of the run"
            raise VocabularyError(f"{path}: no {MODEL_FILE} here; {remedy}")
        path = yaml_of_run[0]
    if path.suffix in (".yaml", ".yml"):
        chosen = read_run_yaml(path).processor.tokenizer
        if not chosen.vocab_file:
            raise VocabularyError(f"{path}: processor.tokenizer.vocab_file: missing; give the path of a {MODEL_FILE}")
        vocab_file, found = Path(chosen.vocab_file), family_of(chosen.type).generation
    else:
        vocab_file = path / MODEL_FILE if path.is_dir() else path
        config = read_tokenizer_config(vocab_file.parent)
        publisher, _, name = str(config.get("name_or_path", "")).partition("/")
        found = config.get(GENERATION_KEY, _RELEASED.get(name) if publisher in _PUBLISHERS else None)
    generation = found if generation is None else generation
    if generation is None:
        raise VocabularyError(
            f"{path}: ChatGLM2 and ChatGLM3 have the same {MODEL_FILE}, and {CONFIG_FILE} does not tell which one this "
            f"is; give {GENERATION_KEY}=2 or {GENERATION_KEY}=3"
        )
    if generation not in BY_GENERATION:
        raise VocabularyError(f"{path}: {GENERATION_KEY} = {generation!r}: must be 2 or 3")
    return generation, vocab_file


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Content of `tokenizer_config.json`, empty without the file; VocabularyError if it is not a JSON object."""
    path = folder / CONFIG_FILE
    return read_object(path, VocabularyError) if path.is_file() else {}
