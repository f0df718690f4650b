"""A server in a process of its own, over a decoder without a network: `replica.py VOCABULARY NAME PORT`.

It prints its port. Every replica gives the same answer to the same prompt, a token in 10 milliseconds.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence

import numpy as np
import uvicorn
from serve.fakes import FakeDecoder
from serve.service import make_engine

from glm_ms.serve.app import create_app
from glm_ms.tokenizer import ChatGLM3Tokenizer


class SlowDecoder(FakeDecoder):
    """Takes its time for each step, as networks do."""

    def step(self, slots: Sequence[int], tokens: np.ndarray) -> np.ndarray:
        time.sleep(0.01)
        return super().step(slots, tokens)


def main(vocabulary: str, name: str, port: str) -> None:
    tokenizer = ChatGLM3Tokenizer(vocabulary)
    engine = make_engine(tokenizer, SlowDecoder(tokenizer.vocab_size + 8, slots=16, capacity=256))
    engine.name = name
    bound = socket.socket(proto=socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", int(port)))
    print(bound.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(create_app(engine), log_level="error", lifespan="off")).run(sockets=[bound])
    engine.scheduler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
