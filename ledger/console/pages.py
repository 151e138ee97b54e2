"""The in-browser verifier as bytes and as an HTTP answer. Imports `errors` only.

`verifier/verifier.html` is one file with everything inside: it works from a disk, from any web
server and from ours. Its content security policy stands in the file, names script and style by
their hashes, and allows no connection. The headers repeat it, with what only a header can say.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

VERIFIER = Path(__file__).parent / "verifier" / "verifier.html"
_POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">')


@cache
def verifier_page() -> bytes:
    """The verifier, as it was built and committed."""
    return VERIFIER.read_bytes()


@cache
def verifier_headers() -> Mapping[str, str]:
    """What to serve it with. A frame is refused: a page around it could dress up its verdict."""
    policy = _POLICY.search(verifier_page().decode())
    assert policy, "the built verifier has no content security policy"
    return {
        "content-security-policy": f"{policy[1]}; frame-ancestors 'none'",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
