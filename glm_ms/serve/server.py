"""`glm-ms serve`: a model behind an OpenAI-compatible HTTP interface.

    glm-ms serve --model chatglm3-6b
    glm-ms serve --model chatglm3-6b --adapter ads=output/ads titles=output/titles
    glm-ms serve --model chatglm3-6b --host 0.0.0.0 --api-key-file keys.txt

The port opens at once; /ready tells when the model is loaded and compiled. SIGTERM or Ctrl-C ends the server after the
answers that it has begun, a second one at once. Exit status: 0 after a signal, 1 if the model cannot be loaded, 2 for
arguments that cannot be used.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib.util
import ipaddress
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from glm_ms.program import library_imports, program
from glm_ms.serve.auth import KEY_VARIABLE, Keys, is_loopback, read_keys
from glm_ms.serve.model_arguments import add_model_arguments
from glm_ms.serve.names import lora_alphas, named_adapters
from glm_ms.serve.settings import HOST, PORT, ServeSettings
from glm_ms.storage.arguments import Parser, whole_number
from glm_ms.storage.errors import FileError

if TYPE_CHECKING:
    from glm_ms.generation import GLMForCausalLM
    from glm_ms.serve.engine import Engine
    from glm_ms.tokenizer import SentencePieceTokenizer

FAILED, UNUSABLE = 1, 2
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "llguidance")
_DEFAULTS = ServeSettings()


class ServerError(FileError):
    """The server cannot start; the message says why and what to do."""


@program
def main(arguments: Sequence[str] | None = None) -> int:
    """Serves a model until a signal comes; returns the exit status."""
    options = _parser().parse_args(arguments)
    settings = ServeSettings(**{item.name: getattr(options, item.name) for item in dataclasses.fields(ServeSettings)})
    try:
        check_packages()
        adapters = named_adapters(options.adapter)
        alphas = lora_alphas(options.lora_alpha, adapters)
        for origin in options.cors_origin:
            check_origin(origin)
        for name in options.allowed_hosts:
            check_name_of_host(name)
        keys = read_keys(options.api_key_file, os.environ)
        check_host(options.host, keys, options.insecure)
        bound = bind(options.host, options.port)
    except FileError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE

    def load() -> Engine:
        from glm_ms.serve.loading import adapters_with_alpha, load_engine

        options.lora_alpha, named = adapters_with_alpha(Path(options.model), adapters, alphas)
        return load_engine(options, options.served_model_name, named, settings, _show)

    allowed = hosts_for(options.host, keys, options.allowed_hosts)
    app = {"keys": keys, "cors_origins": options.cors_origin, "web": options.web, "allowed_hosts": allowed}
    try:
        serve(bound, load, settings.drain_seconds, **app)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    print("stopped", flush=True)
    return 0


def launch_server(
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    port: int = PORT,
    host: str = HOST,
    name: str = "chatglm",
    web: bool = False,
    **settings: Any,
) -> None:
    """Serves a model until the program is interrupted, also in a notebook.

    The variable GLM_MS_API_KEY is the key; without it the server is reached from this machine only.

    Args:
        port: 0: any free one, which is printed.
        name: of the model for clients.
        web: the address shows the chat page.
        settings: fields of `ServeSettings`, as `slots=4`.

    Raises:
        ServerError: the address cannot be used, or a package is missing.
    """
    check_packages()
    chosen = ServeSettings(**settings)
    keys = read_keys(None, os.environ)
    check_host(host, keys, insecure=False)
    bound = bind(host, port)

    def load() -> Engine:
        from glm_ms.serve.loading import build_engine

        return build_engine(model, tokenizer, name, {}, chosen, _show)

    serve(bound, load, chosen.drain_seconds, keys=keys, web=web, allowed_hosts=hosts_for(host, keys, ()))


def _show(line: str) -> None:
    print(line, flush=True)


def serve(bound: socket.socket, load: Callable[[], Engine], drain_seconds: float, **app: Any) -> None:
    """Serves an engine at a listening socket until a signal comes; `app` is for `create_app`.

    Beside an event loop, as notebooks have one, it uses a thread of its own. Raises what `load` does, and ServerError
    after a failure that ends all answers.
    """
    os.environ.setdefault("GLOG_v", "3")  # MindSpore reads it on import: errors only
    from glm_ms.serve.http_server import Server, address, signals_end_at_once

    if app.get("web"):
        _show(f"{address(bound)}/ is the chat page")
    _show(f"{address(bound)}: loading the model")
    with signals_end_at_once(), library_imports():
        from glm_ms.serve.app import create_app  # imports MindSpore

    server = Server(create_app(**app), bound, drain_seconds, _show)

    def run_server() -> None:
        server.serve_engine(load)
        if server.failure is not None:
            raise ServerError(f"the server has failed: {server.failure}; start it again") from server.failure

    if not _in_event_loop():
        run_server()
        return
    errors: list[BaseException] = []

    def run() -> None:
        try:
            run_server()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="glm_ms server")
    thread.start()
    try:
        thread.join()
    finally:
        server.should_exit = True
        thread.join()
    if errors:
        raise errors[0]


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def check_packages() -> None:
    """Raises ServerError if a package of the extra `serve` is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ServerError(f"not installed: {', '.join(missing)}; run: pip install 'glm_ms[serve]'")


def check_host(host: str, keys: Keys, insecure: bool) -> None:
    """Raises ServerError if other machines could use the server without a key, and nobody has said that they may."""
    try:
        local = is_loopback(host)
    except OSError as error:
        raise ServerError(f"--host {host}: no such address: {error.strerror or error}") from None
    if not (local or keys or insecure):
        raise ServerError(
            f"--host {host}: other machines reach this address, and there is no key; give --api-key-file FILE or the "
            f"variable {KEY_VARIABLE}, or, if everybody there may use the server, --insecure"
        )


def hosts_for(host: str, keys: Keys, allowed: Sequence[str]) -> frozenset[str] | None:
    """The hosts that requests may name besides this machine; None: any. A key protects from web pages as well, and the
    names of a server for other machines are known to their users only."""
    if not allowed and (keys or not is_loopback(host)):
        return None
    return frozenset(name.lower().rstrip(".") for name in [*allowed, host])


def check_name_of_host(name: str) -> None:
    """Raises ServerError if no Host header can have this as its host, as of a URL or of a name with a port."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if re.fullmatch(r"[\w-]+(\.[\w-]+)*\.?", name, re.ASCII) is None:
            raise ServerError(
                f"--allowed-hosts {name}: must be a name like models.example.org or an address, without scheme and port"
            ) from None


def check_origin(origin: str) -> None:
    """Raises ServerError if this is not an origin of web pages."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or f"{parts.scheme}://{parts.netloc}" != origin:
        raise ServerError(f"--cors-origin {origin}: must be like https://chat.example.org, without a path")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; ServerError if the port cannot be used."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ServerError(f"--host {host}: {error.strerror or error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(place)
        bound.listen(128)
    except OSError as error:
        bound.close()
        remedy = "give another --port, or 0 for any free one"
        raise ServerError(f"--host {host} --port {port}: {error.strerror}; {remedy}") from None
    return bound


def _parser() -> Parser:
    parser = Parser(prog="glm-ms serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add_model_arguments(parser, named_adapters=True)
    add("--adapter", nargs="+", default=[], metavar="NAME=PATH", help="adapters, by the name that requests give")
    add("--served-model-name", metavar="NAME", help="of the model without adapter; default: the folder of --model")
    add("--host", default=HOST, help=f"address to listen on; default {HOST}: this machine only")
    add("--port", type=whole_number(0, 65535), default=PORT, help=f"0: any free one; default {PORT}")
    add("--web", action="store_true", help="the address shows a chat page")
    for flag, kind, metavar, text in (
        ("--slots", whole_number(1, 1024), "N", "answers at a time"),
        ("--context", whole_number(16, 1 << 20), "N", "most tokens of prompt and answer, at most that of the model"),
        ("--max-queue", whole_number(0, 1 << 20), "N", "requests that wait for slots; more get status 429"),
        ("--max-seconds", _seconds, "S", "after so long an answer ends as it is, waiting included"),
        ("--drain-seconds", _seconds, "S", "for answers that have begun when the server is told to stop"),
        ("--prompt-lookup-num-tokens", whole_number(0, 1024), "N", "tokens of a step that repeat earlier text, or 0"),
        ("--max-adapters", whole_number(0, 1024), "N", "adapters at a time; default: those of --adapter"),
        ("--max-lora-rank", whole_number(1, 1024), "N", "of later adapters; default: what --adapter needs, or 16"),
        ("--max-prefix", whole_number(0, 8192), "N", "positions of P-Tuning prefixes; default: what --adapter needs"),
    ):
        default = getattr(_DEFAULTS, flag[2:].replace("-", "_"))
        add(flag, type=kind, default=default, metavar=metavar,
            help=text if default is None else f"{text}; default {default:g}")  # fmt: skip
    add("--api-key-file", type=Path, metavar="FILE",
        help=f"keys that open the server, one a line; the variable {KEY_VARIABLE} may have one, too")  # fmt: skip
    add("--insecure", action="store_true", help="no key, although other machines reach --host")
    add("--allowed-hosts", nargs="+", default=[], metavar="HOST",
        help="host names of requests; default: any with a key or another --host, else this machine")  # fmt: skip
    add("--cors-origin", nargs="+", default=[], metavar="URL", help="web pages of these origins may use the server")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds, above 0 and at most 86400")
    return value


if __name__ == "__main__":
    sys.exit(main())
