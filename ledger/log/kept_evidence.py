"""A folder of evidence files: what a witness, or the log itself, found and must not lose.

Each finding is judged before it is kept (`ledger.verify.evidence`): what its bytes do not show is
not written. One file per pair of checkpoints, however often somebody sends them again, and a limit
on each sort, since whoever can send requests could otherwise fill the disk with testimony.
"""

import logging
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from ledger.errors import VerificationError
from ledger.files import write_durably
from ledger.ports import Clock
from ledger.verify.evidence import Evidence, check_evidence, format_evidence, one_line
from ledger.verify.note import VerifierKey, format_vkey

MAX_PROVEN_FILES = 1_000
MAX_TESTIMONY_FILES = 100
_PROVEN, _TESTIMONY = "proven", "testimony"

logger = logging.getLogger(__name__)


class EvidenceFolder:
    """Files `<sort>-<kind>-<hash>.json` in `path`, which is made when the first one comes."""

    def __init__(self, path: Path, *, clock: Clock) -> None:
        self.path = path
        self._clock = clock

    def count(self) -> int:
        """Files kept so far."""
        return len(list(self.path.glob("*.json")))

    def keep(
        self, kind: str, *, log: str, key: VerifierKey, says: str, items: Mapping[str, bytes]
    ) -> Path | None:
        """Judge and store one finding; the file, or None when it shows nothing or cannot be stored.

        Never raises for a full disk: the refusal that goes with the finding must be given anyway.
        """
        evidence = Evidence(
            kind=kind,
            log=log,
            vkey=format_vkey(key),
            found_at=self._clock(),
            says=one_line(says),
            items=items,
        )
        try:
            conclusive = check_evidence(evidence, format_vkey(key)).facts["conclusive"]
        except VerificationError as error:
            logger.info("no evidence of %s: %s", kind, error)
            return None
        sort, most = (
            (_PROVEN, MAX_PROVEN_FILES) if conclusive else (_TESTIMONY, MAX_TESTIMONY_FILES)
        )
        digest = sha256(b"\0".join(items[name] for name in sorted(items))).hexdigest()[:16]
        path = self.path / f"{sort}-{kind}-{digest}.json"
        if path.exists():
            return path
        if len(list(self.path.glob(f"{sort}-*.json"))) >= most:
            logger.error("evidence dropped: %s holds %s files of its sort", self.path, most)
            return None
        try:
            write_durably(path, format_evidence(evidence))
        except OSError as error:
            logger.exception("cannot keep evidence in %s: %s", path, error.strerror)
            return None
        logger.critical("evidence kept", extra={"path": str(path), "kind": kind, "log": log})
        return path
