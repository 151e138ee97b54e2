"""The engine alone, in a process of its own: what the load test holds the service against.

    python -m tests.bench.serving_alone PLAN.json

The same base, adapters, sizes and threads as the service's actor, and the same load: `clients`
requests under way at any time, each replaced by the next as it ends. It reads seconds from stdin, a
number a line, works for so long, and writes what it did as one line of JSON.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from workers import base_model
from workers.openlora.chat import encode_chat
from workers.openlora.engine import Engine, EngineConfig, GenerationRequest


class Alone:
    def __init__(self, plan: dict[str, Any]) -> None:
        torch.set_num_threads(int(plan["threads"]))
        path = Path(plan["base"])
        model, self._tokenizer = base_model.load(path)
        names = frozenset({f"sha256:{base_model.digest(path)}"})
        self._engine = Engine(model, self._tokenizer, EngineConfig(base_names=names))
        for number, (folder, sha256) in enumerate(plan["adapters"]):
            self._engine.load_adapter(f"a{number}", folder, sha256)
        self._plan = plan
        self._questions = itertools.count()
        self._client_of: dict[str, int] = {}

    def work(self, seconds: float) -> dict[str, float]:
        """Tokens and times after a warm-up that fills the batch; then all requests are ended."""
        for client in range(int(self._plan["clients"])):
            self._ask(client)
        self._steps_until(time.monotonic() + float(self._plan["warm_s"]))
        began, cpu = time.monotonic(), time.process_time()
        tokens = self._steps_until(began + seconds)
        wall_s, cpu_s = time.monotonic() - began, time.process_time() - cpu
        for request_id in list(self._client_of):
            self._engine.cancel(request_id)
        while self._engine.has_work():
            self._engine.step()
        self._client_of.clear()
        return {"tokens": tokens, "wall_s": wall_s, "cpu_s": cpu_s}

    def _steps_until(self, ends: float) -> int:
        tokens = 0
        while time.monotonic() < ends:
            for delta in self._engine.step():
                tokens += len(delta.token_ids)
                if delta.finish is not None:
                    assert delta.finish.error is None, delta.finish.error
                    self._ask(self._client_of.pop(delta.request_id))
        return tokens

    def _ask(self, client: int) -> None:
        question = next(self._questions)
        name = f"r{question}"
        content = self._plan["prompt"].format(client=client, question=question)
        adapters = len(self._plan["adapters"])
        self._engine.submit(
            GenerationRequest(
                request_id=name,
                adapter_id=f"a{client % adapters}",
                prompt_ids=encode_chat(self._tokenizer, [{"role": "user", "content": content}]),
                max_tokens=int(self._plan["max_tokens"]),
                seed=0,
            )
        )
        self._client_of[name] = client


def main() -> None:
    alone = Alone(json.loads(Path(sys.argv[1]).read_text()))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(alone.work(float(line))), flush=True)


if __name__ == "__main__":
    main()
