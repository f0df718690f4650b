"""`glm-ms web`: `glm-ms serve --web`, a server whose address shows the chat page; and `launch_web_demo`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glm_ms.serve import server
from glm_ms.serve.settings import HOST, PORT

if TYPE_CHECKING:
    from glm_ms.generation import GLMForCausalLM
    from glm_ms.tokenizer import SentencePieceTokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """As `glm_ms.serve.server.main`; `--web` may be given or not."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return server.main(words if "--web" in words else ["--web", *words])


def launch_web_demo(
    model: GLMForCausalLM,
    tokenizer: SentencePieceTokenizer,
    share: bool = False,
    port: int = PORT,
    host: str = HOST,
    **options: Any,
) -> None:
    """A chat page for a model, until the program is interrupted, also in a notebook. The address is printed.

    Args:
        model, tokenizer, port, host, options: as of `launch_server`.
        share: must be False: no server of others carries the conversations.

    Raises:
        ValueError: share is not False.
        ServerError: the address cannot be used, or a package is missing.
    """
    if share is not False:
        raise ValueError(
            f"share={share!r}: the page is reached without a server of others only; for other machines give "
            f"host='0.0.0.0' and the variable {server.KEY_VARIABLE}, or, on the other machine, run: "
            f"ssh -L {port}:127.0.0.1:{port} this-machine"
        )
    server.launch_server(model, tokenizer, port, host, web=True, **options)


if __name__ == "__main__":
    sys.exit(main())
