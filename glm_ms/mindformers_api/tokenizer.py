"""The tokenizers of glm_ms as MindFormers tokenizers, with the same ids and texts."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mindformers.models.base_processor import BaseProcessor
from mindformers.models.tokenization_utils import PreTrainedTokenizer
from mindformers.models.tokenization_utils_base import (
    BatchEncoding,
    PaddingStrategy,
    TruncationStrategy,
    to_py_obj,
)

from glm_ms.families import FAMILIES, family_of
from glm_ms.mindformers_api.config import DOWNLOAD_OPTIONS, TOKENIZER_CLASS, create_folder
from glm_ms.mindformers_api.released import is_name, settings_of_name, yaml_path
from glm_ms.pretrained import GENERATION_KEY, TOKENIZER_CONFIG, TOKENIZER_FILE, find_tokenizer
from glm_ms.storage.atomic import replace_text
from glm_ms.storage.suggest import did_you_mean
from glm_ms.tokenizer import SentencePieceTokenizer, VocabularyError
from glm_ms.tokenizer.base import truncate_ids

# Spellings of special tokens in the released files and those of MindFormers 1.0 to 1.3. The vocabulary determines the
# tokens, so all other values are refused.
_SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "bos_token": ("<s>", "<bos>", "sop", "<sop>"), "eos_token": ("</s>", "<eos>", "<eop>"), "end_token": ("</s>",),
    "pad_token": ("<unk>", "<pad>"), "unk_token": ("<unk>",), "mask_token": ("[MASK]",), "gmask_token": ("[gMASK]",),
    "sep_token": (), "cls_token": (), "additional_special_tokens": (),
}  # fmt: skip
# Options of the base class that have an effect here -> whether a value is one of the option. They can be set later too.
_BASE_OPTIONS: dict[str, Callable[[Any], bool]] = {
    "clean_up_tokenization_spaces": lambda value: isinstance(value, bool),
    "model_input_names": lambda value: isinstance(value, (list, tuple)) and "input_ids" in value,
    "model_max_length": lambda value: type(value) in (int, float) and value >= 1,
    "name_or_path": lambda value: isinstance(value, str),
    "verbose": lambda value: isinstance(value, bool),
}
# Options of the release and of MindFormers that change nothing -> their values; None: any value.
_NEUTRAL: dict[str, tuple[Any, ...] | None] = {
    "do_lower_case": (False,), "remove_space": (False,), "split_special_tokens": (False,), "chat_template": (None,),
    "encode_special_tokens": (False,), "added_tokens_decoder": (None, {}), "extra_special_tokens": (None, {}, []),
    "allow_other_vocab": None,  # of processor.tokenizer, for runs
    **dict.fromkeys(("auto_map", "config", "processor_class", "tokenizer_class", "tokenizer_type", "use_fast")),
    **dict.fromkeys(DOWNLOAD_OPTIONS),
}  # fmt: skip
# Keys of a tokenizer_config.json that repeat the vocabulary and the chat template of the release.
_DESCRIPTIVE = ("added_tokens_decoder", "chat_template", "extra_special_tokens", GENERATION_KEY)
_REFUSED_IN_CALLS = (
    "is_split_into_words", "return_offsets_mapping", "return_overflowing_tokens", "return_special_tokens_mask",
    "return_token_type_ids", "stride",
)  # fmt: skip
_NO_LIMIT = 1e20  # a larger model_max_length is MindFormers' way to say none
# Options of `save_pretrained` without effect.
_SAVING = ("save_name", "file_format", "save_json", "legacy_format")
# Options of `decode` without effect in the released tokenizers.
_WITHOUT_EFFECT = ("skip_special_tokens", "spaces_between_special_tokens", "use_source_tokenizer")


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


class TokenIds(list):
    """Ids of a text, or rows of several, with the ids that end an answer: a pipeline gives the model nothing else of
    its tokenizer."""

    def __init__(self, ids: Iterable[Any], stop_token_ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.stop_token_ids = list(stop_token_ids)


def _option(name: str) -> Any:
    """An option of the tokenizer of glm_ms as an attribute."""
    return property(lambda self: getattr(self.core, name), lambda self, value: setattr(self.core, name, value))


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Base class of `GLM2Tokenizer` and `GLM3Tokenizer`; `from_pretrained` returns the one that fits the path.

    `core` is the tokenizer of glm_ms. `stop_token_ids` end an answer, for `generate(..., eos_token_id=...)`.

    Args:
        vocab_file: the SentencePiece model.
        kwargs: the options of `core` (padding_side, truncation_side, for ChatGLM3 encode_special_tokens), and
            clean_up_tokenization_spaces, model_input_names, model_max_length. They can be set later as attributes.
            Special tokens must be those of the vocabulary.

    Raises:
        VocabularyError: the SentencePiece model cannot be used.
        ValueError: an unknown option, or a value that is not supported; also when an attribute is set.
    """

    vocab_files_names = {"vocab_file": TOKENIZER_FILE}  # noqa: RUF012 - declared by the base class
    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012 - declared by the base class
    core_class: type[SentencePieceTokenizer] | None = None

    def __init__(self, vocab_file: str, **kwargs: Any) -> None:
        if self.core_class is None:
            raise VocabularyError(
                f"{TOKENIZER_CLASS}(...): use GLM2Tokenizer, GLM3Tokenizer, or {TOKENIZER_CLASS}.from_pretrained"
            )
        options = {key: kwargs.pop(key) for key in self.core_class.options if key in kwargs}
        self.core = self.core_class(vocab_file, **options)
        self.vocab_file = str(vocab_file)
        for key, value in kwargs.items():
            self._check(key, value)
        tokens = {name: getattr(self.core, name) for name in ("eos_token", "pad_token", "unk_token")}
        given = {key: value for key, value in kwargs.items() if key in _BASE_OPTIONS}
        super().__init__(**{"clean_up_tokenization_spaces": False, **given, **tokens})
        self._complete = True

    template, padding_side, truncation_side = map(_option, SentencePieceTokenizer.options)
    vocab_size = property(lambda self: self.core.vocab_size)
    pad_token_id = property(lambda self: self.core.pad_token_id)
    eos_token_id = property(lambda self: self.core.eos_token_id)
    stop_token_ids = property(lambda self: list(self.core.stop_token_ids))

    def __setattr__(self, name: str, value: Any) -> None:
        if "_complete" in self.__dict__ and not name.startswith("_") and name not in self.core.options:
            self._check(name, value)
            if name in _SPECIAL_TOKENS:
                return  # another spelling of a token of the vocabulary
        super().__setattr__(name, value)

    def _check(self, key: str, value: Any) -> None:
        """Raises ValueError for an option that is unknown or has a value that is not supported."""
        name = f"{type(self).__name__}: {key}"
        if key in _BASE_OPTIONS:
            if not _BASE_OPTIONS[key](value):
                raise ValueError(f"{name} = {value!r}: not a value of this option")
        elif key in _SPECIAL_TOKENS:
            own = getattr(self.core, key, None)
            known = {*_SPECIAL_TOKENS[key], own, None}
            if key == "additional_special_tokens":
                known.update(self.core.special_tokens)
            for token in value if isinstance(value, (list, tuple)) else [value]:
                text = token.get("content") if isinstance(token, Mapping) else token
                if text not in known and str(text) not in known:
                    raise ValueError(f"{name} = {str(text)!r}: the vocabulary determines the special tokens; remove it")
        elif key not in _NEUTRAL:
            known_keys = [*self.core.options, *_BASE_OPTIONS, *_SPECIAL_TOKENS]
            hint = did_you_mean(key, known_keys, f"; known: {', '.join(known_keys)}")
            raise ValueError(f"{name}: unknown option{hint}")
        elif (neutral := _NEUTRAL[key]) is not None and value not in neutral:
            raise ValueError(f"{name} = {value!r}: not supported; remove it")

    def __len__(self) -> int:
        return self.core.vocab_size

    def get_vocab(self) -> dict[str, int]:
        sp = self.core.sp
        pieces = {sp.IdToPiece(index): index for index in range(sp.GetPieceSize())}
        return {**pieces, **{token: self.core.get_command(token) for token in self.core.special_tokens}}

    def get_command(self, token: str) -> int:
        """Id of a special token."""
        return self.core.get_command(token)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Pieces of a text. ValueError for a pair or `add_special_tokens`, which only `encode` supports."""
        if pair is not None or add_special_tokens:
            raise ValueError("tokenize: pair and add_special_tokens are not supported; use encode")
        _refuse_unknown("tokenize", kwargs, ())
        return self.core.tokenize(text)

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        return self.core.convert_tokens_to_ids(tokens)

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> Any:
        """Pieces of ids; `skip_special_tokens` leaves <unk> and </s> out of a list, as in the release."""
        if skip_special_tokens and not isinstance(ids, int):
            ids = [index for index in to_py_obj(ids) if index not in (self.pad_token_id, self.eos_token_id)]
        return self.core.convert_ids_to_tokens(ids)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self.core.convert_tokens_to_string(tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self.core.num_special_tokens_to_add(pair)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """`[gMASK] sop` and the ids; with a second text also its ids and </s>."""
        second = [] if token_ids_1 is None else [*token_ids_1, self.core.eos_token_id]
        return [*self.core.prefix_tokens, *token_ids_0, *second]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 for every special token, 0 for others, of ids that `build_inputs_with_special_tokens` would join."""
        if already_has_special_tokens:
            if token_ids_1 is not None:
                raise ValueError("already_has_special_tokens: give the ids of both texts as one list")
            special = {self.core.get_command(token) for token in self.core.special_tokens}
            return [int(index in special or index == self.eos_token_id) for index in token_ids_0]
        second = [] if token_ids_1 is None else [*[0] * len(token_ids_1), 1]
        return [*[1] * len(self.core.prefix_tokens), *[0] * len(token_ids_0), *second]

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        padding: bool | str | PaddingStrategy = False,
        truncation: bool | str | TruncationStrategy | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: Any = None,
        padding_side: str | None = None,
        **options: Any,
    ) -> BatchEncoding:
        """As a call, for the ids of one text or of a pair.

        Raises:
            ValueError: an unknown option, one that is not supported, or too long ids without `truncation`.
        """
        for name in _REFUSED_IN_CALLS:
            if options.pop(name, None):
                raise ValueError(f"{name}: {type(self).__name__} does not support this option")
        strategy, cuts, limit, _ = self._get_padding_truncation_strategies(padding, truncation, max_length)
        if cuts in (TruncationStrategy.ONLY_FIRST, TruncationStrategy.ONLY_SECOND):
            raise ValueError(f"truncation = {cuts.value!r}: must be True or 'longest_first'")
        first, second = list(ids), None if pair_ids is None else list(pair_ids)
        if cuts != TruncationStrategy.DO_NOT_TRUNCATE:
            special = self.num_special_tokens_to_add(second is not None) if add_special_tokens else 0
            first, second = truncate_ids(first, second, special, limit, self.truncation_side)
        whole = (
            self.build_inputs_with_special_tokens(first, second) if add_special_tokens else [*first, *(second or ())]
        )
        return self._pad_rows(
            [{"input_ids": whole}], True, strategy, limit, pad_to_multiple_of, return_tensors=return_tensors,
            padding_side=padding_side, **options
        )  # fmt: skip

    def prepare_seq2seq_batch(self, *_: Any, **__: Any) -> BatchEncoding:
        """Raises ValueError: it is for networks with an encoder and a decoder."""
        raise ValueError("prepare_seq2seq_batch: not supported; call the tokenizer with the texts")

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
            if self.model_max_length >= _NO_LIMIT:
                raise ValueError("max_length is missing: truncation and padding='max_length' need it")
            max_length = int(self.model_max_length)
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
        for name in _REFUSED_IN_CALLS:
            if options.pop(name, None):
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
        verbose: bool = True,
        padding_side: str | None = None,
        **unknown: Any,
    ) -> BatchEncoding:
        _refuse_unknown("tokenizer", unknown, ("padding", "truncation", "max_length", "return_tensors", "padding_side"))
        padding = False if padding_strategy == PaddingStrategy.DO_NOT_PAD else padding_strategy.value
        limit = max_length if padding == "max_length" else None
        padded = self.core.pad(rows, padding, limit, pad_to_multiple_of, padding_side)
        data: dict[str, Any] = {name: padded[name] for name in self.model_input_names if name in padded}
        if return_length:
            data["length"] = [len(row) for row in data["input_ids"]]
        if return_attention_mask is not None:
            data.pop("attention_mask", None)
        if return_attention_mask:
            data["attention_mask"] = padded["attention_mask"]
        if single:
            data = {name: values[0] for name, values in data.items()}
        data["input_ids"] = TokenIds(data["input_ids"], self.stop_token_ids)
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
        padding_side: str | None = None,
    ) -> BatchEncoding:
        """Pads encoded texts, or one; see `SentencePieceTokenizer.pad`."""
        strategy, _, max_length, _ = self._get_padding_truncation_strategies(padding, False, max_length)
        rows = to_py_obj(encoded_inputs)
        single = isinstance(rows, Mapping) and not any(isinstance(row, list) for row in rows.get("input_ids", []))
        return self._pad_rows(
            [rows] if single else rows, single, strategy, max_length, pad_to_multiple_of, return_attention_mask,
            return_tensors, padding_side=padding_side
        )  # fmt: skip

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

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str | list[str]:
        """Text of ids, or a list of texts for a list of sequences, as pipelines need it.

        Ids beyond the vocabulary (padded rows of the embedding, which an untrained network may choose) give no text.
        `skip_special_tokens` and `spaces_between_special_tokens` change nothing, as in the reference. ValueError for
        an unknown option.
        """
        _refuse_unknown("decode", {key: value for key, value in kwargs.items() if key not in _WITHOUT_EFFECT}, ())
        ids = to_py_obj(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        single = not (ids and isinstance(ids[0], list))
        rows = [[token for token in row if token < self.vocab_size] for row in ([ids] if single else ids)]
        texts = [self.core.decode(row) for row in rows]
        if self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            texts = [self.clean_up_tokenization(text) for text in texts]
        return texts[0] if single else texts

    @classmethod
    def from_pretrained(cls, name_or_path: str = "", *args: Any, **kwargs: Any) -> ChatGLMTokenizer:
        """Loads a tokenizer; VocabularyError or SettingsError if there is none, ValueError for an unknown option.

        Args:
            name_or_path: the name of a released model, a folder with tokenizer.model (Hugging Face folder, or written
                by `save_pretrained`), the output folder of a run, a YAML of glm_ms or of MindFormers, or the
                SentencePiece model itself. Options in a tokenizer_config.json apply.
            kwargs: options of the class; `model_generation`: 2 or 3, if the folder does not tell which ChatGLM it
                belongs to; `vocab_file`: replaces the SentencePiece model found there.
        """
        if args:
            raise ValueError(f"from_pretrained: {args!r}: give options by name")
        name = str(kwargs.pop("pretrained_model_name_or_path", None) or name_or_path)
        given = kwargs.pop("vocab_file", None)
        generation = kwargs.pop(GENERATION_KEY, None)
        if generation is None and cls.core_class is not None:
            generation = family_of(cls.core_class.__name__).generation
        if is_name(name):
            chosen = settings_of_name(yaml_path(name)).processor.tokenizer
            family, vocab_file, config = family_of(chosen.type), Path(given or chosen.vocab_file), dict[str, Any]()
        else:
            family, vocab_file, config = find_tokenizer(name, generation, given)
        tokenizer = BY_GENERATION[family.generation](str(vocab_file), **{**kwargs, "name_or_path": name})
        tokenizer._apply(config, (Path(name) if Path(name).is_dir() else Path(name).parent) / TOKENIZER_CONFIG, kwargs)
        return tokenizer

    def _apply(self, config: Mapping[str, Any], file: Path, given: Mapping[str, Any]) -> None:
        """Sets the options of a tokenizer_config.json that the call did not give; tells which keys have no effect."""
        unknown = []
        added = config.get("added_tokens_decoder")
        for token in added if isinstance(added, Mapping) else ():
            if not token.isdecimal() or int(token) >= self.vocab_size:
                raise VocabularyError(
                    f"{file}: added_tokens_decoder: {token}: the vocabulary has the ids 0..{self.vocab_size - 1}; no "
                    "token can be added"
                )
        for key, value in config.items():
            if key in _DESCRIPTIVE or key in given or key == "name_or_path":
                continue
            try:
                if key in (*self.core.options, *_BASE_OPTIONS):
                    setattr(self, key, value)
                elif key in _SPECIAL_TOKENS or key in _NEUTRAL:
                    self._check(key, value)
                else:
                    unknown.append(key)
            except ValueError as error:
                raise VocabularyError(f"{file}: {error}") from None
        if unknown:
            warnings.warn(f"{file}: {', '.join(unknown)}: no effect here", stacklevel=3)

    def save_pretrained(self, save_directory: str, *_: Any, **kwargs: Any) -> tuple[str, ...]:
        """Writes tokenizer.model and tokenizer_config.json, which AutoTokenizer reads; returns their paths.

        `save_name`, `file_format`, `save_json` and `legacy_format` of MindFormers have no effect. ValueError for other
        options.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: not supported; save into a folder and upload it")
        options = {key: value for key, value in kwargs.items() if value not in (None, False)}
        _refuse_unknown("save_pretrained", {key: options[key] for key in options if key not in _SAVING}, _SAVING)
        folder = create_folder(save_directory)
        config: dict[str, Any] = {"tokenizer_class": TOKENIZER_CLASS, GENERATION_KEY: family_of(self.core).generation}
        config.update({name: getattr(self.core, name) for name in self.core.options})
        config["clean_up_tokenization_spaces"] = self.clean_up_tokenization_spaces
        if self.model_max_length < _NO_LIMIT:
            config["model_max_length"] = self.model_max_length
        replace_text(folder / TOKENIZER_CONFIG, json.dumps(config, indent=2) + "\n")
        return (*self.save_vocabulary(str(folder)), str(folder / TOKENIZER_CONFIG))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the SentencePiece model into a folder; returns its path."""
        target = Path(save_directory) / (f"{filename_prefix}-{TOKENIZER_FILE}" if filename_prefix else TOKENIZER_FILE)
        if not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)


class GLM2Tokenizer(ChatGLMTokenizer):
    """`glm_ms.ChatGLM2Tokenizer` for MindFormers, which has a class of its own by that name."""

    core_class = FAMILIES["chatglm2"].tokenizer


class GLM3Tokenizer(ChatGLMTokenizer):
    """`glm_ms.ChatGLM3Tokenizer` for MindFormers, which has a class of its own by that name."""

    core_class = FAMILIES["chatglm3"].tokenizer
    encode_special_tokens = _option("encode_special_tokens")


BY_GENERATION = {2: GLM2Tokenizer, 3: GLM3Tokenizer}


class GLMTextProcessor(BaseProcessor):
    """The processor of a YAML: a tokenizer whose call gives `{"text": ids}`, padded to `max_length` as in MindFormers.

    `processor(texts)` and `processor(text_input=texts)` return ids [B, max_length] as a Tensor by default.
    """

    def __init__(
        self, tokenizer: Any = None, max_length: int = 128, padding: str = "max_length", return_tensors: str = "ms"
    ) -> None:
        super().__init__(tokenizer=tokenizer, max_length=max_length, padding=padding, return_tensors=return_tensors)

    def __call__(self, text_input: Any = None, image_input: Any = None) -> dict[str, Any]:
        """ValueError for images, which the models do not know."""
        if image_input is not None:
            raise ValueError("image_input: ChatGLM2 and ChatGLM3 read text only")
        return super().__call__(text_input=text_input)

    @classmethod
    def from_pretrained(cls, yaml_name_or_path: str = "", **kwargs: Any) -> GLMTextProcessor:
        """The processor with the tokenizer of a path; `max_length`, `padding` and `return_tensors` are its own."""
        own = {key: kwargs.pop(key) for key in ("max_length", "padding", "return_tensors") if key in kwargs}
        return cls(ChatGLMTokenizer.from_pretrained(yaml_name_or_path, **kwargs), **own)


def _is_pair(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and len(item) == 2 and all(isinstance(text, str) for text in item)


def _refuse_unknown(where: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ValueError for the first option."""
    for name in options:
        raise ValueError(f"{name}: unknown option of {where}(){did_you_mean(name, known)}")
