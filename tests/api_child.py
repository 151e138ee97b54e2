"""One more API process on a ledger that another one serves already: to be killed.

    python -m tests.api_child '{"url": ..., "home": ..., "adapter": ..., "path": ..., ...}'

Serves the adapter from an engine of its own, slowly, prints its URL, and ends with its input. An
answer that may have `hang_at` tokens stops before its append, for good; one that may have `die_at`
is stored, and is the last that this process does.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ledger.api.answers import recording
from ledger.bootstrap import api_services
from tests.api_world import LocalEngine, serving_http, settings_for

HANG_S = 60.0


def break_appends(told: dict[str, Any]) -> None:
    real = recording._append

    def append(*arguments: Any, **more: Any) -> Any:
        max_tokens = arguments[1].request.max_tokens
        if max_tokens == told.get("hang_at"):
            threading.Event().wait(HANG_S)
        done = real(*arguments, **more)
        if max_tokens == told.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    recording._append = append


def main(told: dict[str, Any]) -> None:
    break_appends(told)
    engine = LocalEngine()
    engine.pace_s = float(told["pace_s"])
    engine.serving.engine.load_adapter(
        told["adapter"], told["path"], told["sha256"], config_sha256=told["config_sha256"]
    )
    settings = settings_for(told["url"], Path(told["home"]))
    with api_services(settings, serving=engine) as services, serving_http(services) as at:
        print(at, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
