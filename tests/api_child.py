"""One more API process on a ledger that another one serves already: to be killed.

    python -m tests.api_child '{"url": ..., "home": ..., "adapter": ..., "path": ..., ...}'

Serves the adapter from an engine of its own, slowly, prints its URL, and ends with its input.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ledger.bootstrap import api_services
from tests.api_world import LocalEngine, serving_http, settings_for


def main(told: dict[str, Any]) -> None:
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
