"""Contenders take turns: each is loaded in its own process, and works only during its turn.

A contender is a function `work(send, **settings)`. `send(answer)` sends the answer of a turn (JSON), waits for the next
turn, and returns its request (JSON). The first answer means that the contender is loaded and warm.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Trained = TypeVar("Trained")
Send = Callable[[Any], Any]


@dataclass(frozen=True)
class Contender:
    """A contender: its name in the table, "module:function", its settings, and its environment variables."""

    name: str
    function: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """A contender's process. Use as a context manager; `ready` is its first answer.

    Raises:
        RuntimeError: the process ended; the message holds its last output.
    """

    def __init__(self, contender: Contender) -> None:
        self.name = contender.name
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workers", contender.function, json.dumps(contender.settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=os.environ | contender.environment,
        )
        self.ready = self._answer()

    def ask(self, request: Any = None) -> Any:
        """Take one turn: send the request, and return the answer."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._said.seek(0)
        raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{self._said.read()[-3000:]}")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes the input of the process, which ends it
        self._said.close()


def alternate(
    contenders: Sequence[Contender], requests: Sequence[Any], after: Callable[[Any], object] = lambda answer: None
) -> dict[str, list[Any]]:
    """The answers of each contender: all are loaded, then each request goes to one contender after the other.

    `after` may add to each answer before the next turn begins.
    """
    with ExitStack() as stack:
        workers = []
        for contender in contenders:
            print(f"  loading: {contender.name}", flush=True)
            workers.append(stack.enter_context(Worker(contender)))
        answers: dict[str, list[Any]] = {worker.name: [] for worker in workers}
        for i, request in enumerate(requests, 1):
            for worker in workers:
                after(answer := worker.ask(request))
                answers[worker.name].append(answer)
                print(f"  turn {i} of {len(requests)}: {worker.name}: {json.dumps(answer)}", flush=True)
    return answers


def alone(contender: Contender) -> Any:
    """The answer of one turn in a process that ends after it."""
    with Worker(contender) as worker:
        return worker.ask()


def cost(start: float, steps: int) -> dict[str, float]:
    """The cost of a turn: seconds per step since `start` (of time.perf_counter), and the peak of memory so far."""
    import torch

    if not torch.cuda.is_available():
        # not getrusage, whose peak also counts the parent's memory
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"seconds": (time.perf_counter() - start) / steps, "mib": int(status["VmHWM"].split()[0]) / 1024}
    torch.cuda.synchronize()
    measured = {"seconds": (time.perf_counter() - start) / steps, "mib": torch.cuda.max_memory_allocated() / 2**20}
    torch.cuda.empty_cache()  # leave the memory to the next contender
    return measured


def repeat(send: Send, step: Callable[[], object], steps: int, **more: Any) -> None:
    """Take turns of `steps` steps, the first to warm up. `more` is sent with the cost."""
    while True:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        send(cost(start, steps) | more)


def trainings(send: Send, train: Callable[[int], Trained], draw: Callable[[Trained], np.ndarray], out: str) -> None:
    """Turns of a training of as many steps as the request says, answered by its CPU-seconds; or, where the request is
    None, of saving samples of the last one to `out`. The first training, of a few steps, is to warm up."""
    trained = train(3)
    request = send("ready")
    while True:
        start = time.process_time()
        if request is None:
            np.save(out, draw(trained))
        else:
            trained = train(request)
        request = send(time.process_time() - start)


def main() -> None:
    """Run a contender: the process that a `Worker` starts."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other output must not mix with the answers

    def send(answer: Any) -> Any:
        print(json.dumps(answer), file=answers, flush=True)
        if not (line := sys.stdin.readline()):
            sys.exit()
        return json.loads(line)

    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function)(send, **json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
