"""`glm-ms chat`: a conversation in a terminal, and `launch_cli_demo`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from glm_ms.program import command_name, program, signal_thread
from glm_ms.serve.input_lines import InputLines
from glm_ms.serve.model_arguments import add_model_arguments, load_model, name_and_path
from glm_ms.storage.arguments import Parser
from glm_ms.storage.errors import FileError
from glm_ms.storage.readers import read_json, read_text
from glm_ms.tokenizer.chatglm3 import checked_tools, tool_names

if TYPE_CHECKING:
    from glm_ms.generation import GLMForCausalLM
    from glm_ms.generation.chat import Round
    from glm_ms.tokenizer import SentencePieceTokenizer

_WELCOME = """{}. Type a message, or:
  clear   forget the conversation
  stop    end the program (also Ctrl-D)
  \"""     begin and end a message of several lines
Ctrl-C stops an answer."""
# Tokens of an answer for which earlier rounds are forgotten.
_ANSWER_ROOM = 256
# Options of generation that are flags, with their types.
_OPTIONS = {
    "max_length": int, "max_new_tokens": int, "temperature": float, "top_p": float, "top_k": int,
    "repetition_penalty": float, "seed": int, "prompt_lookup_num_tokens": int,
}  # fmt: skip


class Terminal:
    """A conversation: reads messages, shows answers as they are made.

    Args:
        begin: called with query, history and role; returns the `Round` to be answered.
        history: messages before the first question, which `clear` keeps.
        with_tools: whether the model may call tools; the results of calls are asked for.
        out: where answers go.
    """

    def __init__(
        self, begin: Callable[[str, list[Any], str], Round], history: Sequence[Any], with_tools: bool, out: TextIO
    ) -> None:
        self._begin, self._first, self._with_tools, self._out = begin, list(history), with_tools, out
        self._lines = InputLines(self._note)
        self._history = list(history)

    @property
    def interactive(self) -> bool:
        """Whether a user sits at a screen."""
        return self._lines.interactive

    def run(self, title: str = "") -> None:
        """Until `stop` or the end of the input. A screen shows the title first."""
        if self.interactive:
            self._show(_WELCOME.format(title) + "\n")
        role = "user"
        while True:
            try:
                text = self._lines.read("> " if role == "user" else "result of the call> ")
            except EOFError:
                self._show("\n" if self.interactive else "")
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self._show("\n")
                role = "user"  # without a result, if one was asked for
                continue
            if text.strip() == "stop":
                return
            if text.strip() == "clear":
                role, self._history = "user", list(self._first)
                self._show("\x1b[2J\x1b[H" if self.interactive else "")
                self._note("the conversation is forgotten")
            elif text.strip():
                try:
                    role = self._answer(text, role)
                except KeyboardInterrupt:  # before the answer has begun, when `stop_key` does not take Ctrl-C yet
                    if not self.interactive:
                        raise
                    self._note("stopped")

    def _answer(self, text: str, role: str) -> str:
        """Shows the answer to a message; returns the role of the next one."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                calls = self._stream(self._fitting(text, role))
            except (ValueError, AssertionError, FloatingPointError) as error:
                self._note(f"error: {error}")
                return role
        for warning in caught:
            self._note(str(warning.message))
        for call in calls:
            self._note(f"{call['name']}({', '.join(f'{key}={value!r}' for key, value in call['parameters'].items())})")
        return "observation" if calls else "user"

    def _fitting(self, text: str, role: str) -> Round:
        """The round of a message; forgets the oldest rounds if they leave little room for an answer."""
        from glm_ms.generation.chat import ConversationTooLongError

        while True:
            shorter = without_oldest_round(self._history, len(self._first))
            if role != "user" and shorter is not None and len(shorter) == len(self._first):
                shorter = None  # the result of a call needs its round
            try:
                one = self._begin(text, self._history, role)
                if shorter is None or one.room >= min(_ANSWER_ROOM, one.options["max_length"] // 4):
                    return one
            except ConversationTooLongError:
                if shorter is None:
                    raise
            self._note("the conversation is long: its oldest round is forgotten")
            self._history = shorter

    def _stream(self, one: Round) -> list[dict[str, Any]]:
        """Shows an answer up to its end or Ctrl-C, and adds it to the history; returns the calls of tools in it."""
        shown = ""
        answer: Any = ""
        with self._lines.stop_key() as stop_pressed, closing(one.stream(stop_pressed)) as items:
            for answer, history in items:
                self._history = history
                if isinstance(answer, str) and answer.startswith(shown):
                    self._show(answer[len(shown) :])
                    shown = answer
        self._show("\n")
        if one.stopped:
            self._note("stopped")
            return []
        if one.cut:
            self._note(f"cut at {one.options['max_new_tokens']} tokens")
        if not self._with_tools or isinstance(answer, str):
            return []
        return answer if isinstance(answer, list) else [answer]

    def _show(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def _note(self, text: str) -> None:
        self._show(f"[{text}]\n")


def without_oldest_round(history: Sequence[Any], kept: int) -> list[Any] | None:
    """A history without its first question and all up to the next one; `kept` messages before it stay.

    None if there is no round to leave out.
    """
    if len(history) <= kept:
        return None
    later = (
        i for i in range(kept + 1, len(history)) if not isinstance(history[i], dict) or history[i]["role"] == "user"
    )
    return [*history[:kept], *history[next(later, len(history)) :]]


def launch_cli_demo(
    model: GLMForCausalLM, tokenizer: SentencePieceTokenizer, history: Sequence[Any] | None = None, **options: Any
) -> None:
    """A conversation in the terminal, until the user types `stop` or the input ends.

    Args:
        model, tokenizer, history: as of `GLMForCausalLM.chat`. The history stays when the user types `clear`.
        options: of generation.
    """
    begin, first = rounds_of(model, tokenizer, options), history or []
    terminal = Terminal(begin, first, bool(tokenizer.tools_of(first)), sys.stdout)
    terminal.run(type(tokenizer).__name__.removesuffix("Tokenizer"))


def rounds_of(
    model: GLMForCausalLM, tokenizer: SentencePieceTokenizer, options: dict[str, Any]
) -> Callable[[str, list[Any], str], Round]:
    """A function that begins the rounds of conversations with a model."""
    from glm_ms.generation.chat import Round

    return lambda query, history, role: Round(model, tokenizer, query, history, role, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 for files that cannot be used."""
    parser = _parser()
    given = parser.parse_args(arguments)
    options = {name: getattr(given, name) for name in _OPTIONS if getattr(given, name) is not None}
    if given.greedy:
        options["do_sample"] = False
    try:
        first = _first_messages(given.system, given.tools)
        name, path = name_and_path(given.adapter) if given.adapter else ("", None)
        with signal_thread() as loaded:
            model, tokenizer = load_model(given, path, _remark)
            check_options(options, parser)
            if first and "system" not in tokenizer.roles:
                parser.error(f"--system, --tools: {type(tokenizer).__name__} knows neither; leave them out")
            _use_kernels(model)
            title = Path(given.model).resolve().name + (f" with {name}" if name else "")
            begin = rounds_of(model, tokenizer, options)
            terminal = Terminal(begin, first, bool(tokenizer.tools_of(first)), sys.stdout)
            if not terminal.interactive:  # a signal ends the program as any other one
                loaded()
                terminal.run()
        if terminal.interactive:
            terminal.run(title)
    except FileError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _remark(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _use_kernels(model: GLMForCausalLM) -> None:
    """Installs the fused kernels of the device that agree with the portable operators, for one answer at a time."""
    from glm_ms.kernels.choice import use_kernels
    from glm_ms.kernels.run_checks import Use

    use = Use(slots=1, context=model.config.seq_length)
    use_kernels(model.network, model.config, use, "auto", _remark)


def check_options(options: dict[str, Any], parser: Parser) -> None:
    """Ends the program with status 2 if options of generation have values that no answer can use."""
    from glm_ms.generation import GenerationConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # each answer says which options have no effect
            GenerationConfig(**{"max_new_tokens": 1, "do_sample": True, **options})
    except ValueError as error:
        parser.error(str(error))


def _parser() -> Parser:
    parser = Parser(prog=command_name("glm-ms chat"), description="A conversation with a model in this terminal.")
    add_model_arguments(parser)
    parser.add_argument("--adapter", metavar="[NAME=]PATH", help="LoRA or P-Tuning adapter to attach")
    parser.add_argument("--system", metavar="FILE", help="text file with the system message (ChatGLM3)")
    parser.add_argument("--tools", metavar="FILE", help="JSON file with the list of tools (ChatGLM3)")
    parser.add_argument("--greedy", action="store_true", help="always take the best token, in place of sampling")
    for name, kind in _OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=f"generation.{name}")
    return parser


def _first_messages(system: str | None, tools: str | None) -> list[dict[str, Any]]:
    """The system message, with tools if they are given; none without either.

    Raises:
        FileError: a file is missing or damaged, or the tools have another form.
    """
    if system is None and tools is None:
        return []
    message: dict[str, Any] = {"role": "system", "content": "" if system is None else read_text(Path(system)).strip()}
    if tools is not None:
        try:
            message["tools"] = checked_tools(read_json(Path(tools)))
        except FileError:
            raise
        except ValueError as error:
            raise FileError(f"{tools}: {error}") from None
        if not tool_names(message["tools"]):
            raise FileError(f'{tools}: no tool has a name; a tool is {{"name": ..., "description": ...}}')
    return [message]


if __name__ == "__main__":
    sys.exit(program(main)())
