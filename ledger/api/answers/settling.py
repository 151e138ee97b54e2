"""Answers of processes that died, and those that the ledger could not take at once.

Runs beside the API, at its start and every SETTLE_EVERY_S from then on. A journal whose owner is
gone is read under its lock: of each open answer the ledger gets `inference.recorded` with its fee
where all of it was delivered and its client was told so, `inference.interrupted` with what was
delivered where it broke off, and nothing where nothing had left. A crash in the middle of this
leaves the journal where it is; whoever reads it next finds what is recorded already. A journal or
an answer that fails in a way nobody foresaw is tried again, and does not stop the others.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from ledger.api.answers.asking import from_intent
from ledger.api.answers.journal import SUFFIX, Left, adopted
from ledger.api.answers.recording import settle
from ledger.api.services import Services
from ledger.errors import Backpressure, LedgerError, StorageError, Unavailable

SETTLE_EVERY_S = 2.0
REFUSED = ".refused"
"""Journals with damaged lines, or an answer that the ledger will never take: kept for people to
look at."""

log = structlog.get_logger(__name__)


async def keep_settled(box: Services) -> None:
    """Until cancelled."""
    own = anyio.CapacityLimiter(1)  # the pool's threads may all wait for the ledger
    while True:
        try:
            await anyio.to_thread.run_sync(settle_all, box, limiter=own)
        except Exception as error:
            log.error("answers_not_settled", why=str(error), error=type(error).__name__)
        await asyncio.sleep(SETTLE_EVERY_S)


def settle_all(box: Services) -> None:
    for _ in _settled_owed(box):
        pass
    waiting: set[str] = set()
    for path in sorted(box.answers.journal.folder.glob(f"*{SUFFIX}")):
        try:
            waiting |= _settle_journal(box, path)
        except Exception as error:
            log.error("journal_not_settled", path=str(path), why=str(error))
    # In this order: who finds `looked` finds what is still open, too.
    box.answers.unsettled = frozenset(waiting)
    box.answers.looked = True


def _settled_owed(box: Services) -> Iterator[str]:
    for inference, owed in list(box.answers.owed.items()):
        try:
            settle(box, owed.answer, owed.reason)
        except (Unavailable, Backpressure):
            return  # the ledger is still away
        except Exception as error:
            log.error("answer_refused", inference=inference, why=str(error))
            continue
        owed.intent.close()
        if owed.reason is None:
            box.reservations.release(owed.answer.consumer, owed.answer.held_wei)
        del box.answers.owed[inference]
        log.info("answer_settled", inference=inference)
        yield inference


def _settle_journal(box: Services, path: Path) -> set[str]:
    """Ids of answers that are still to be settled."""
    with adopted(path) as found:
        if found is None:
            return set()
        waiting, refused = set(), found.damaged > 0
        for left in found.answers:
            inference = str(left.intent.get("inference"))
            if inference in box.answers.running:
                waiting.add(inference)  # its key came again, to us: that answer takes the id
                continue
            try:
                _settle_left(box, left)
            except (Unavailable, Backpressure) as error:
                log.warning("answer_not_settled_yet", inference=inference, why=error.message)
                waiting.add(inference)
            except (LedgerError, KeyError, TypeError, ValueError) as error:
                log.error("answer_refused", inference=inference, why=str(error))
                refused = True
            except Exception as error:
                log.error("answer_not_settled", inference=inference, why=str(error))
                waiting.add(inference)
        if not waiting:
            _put_away(path, refused=refused)
        return waiting


def _settle_left(box: Services, left: Left) -> None:
    if not left.delivered:
        return
    answer = from_intent(left.intent)
    if left.ending is None:
        answer.text, answer.completion_tokens = left.text, left.tokens
        settle(box, answer, "crashed")
    else:
        answer.text = str(left.ending["text"])
        answer.finish_reason = str(left.ending["finish_reason"])
        answer.prompt_tokens = int(left.ending["prompt_tokens"])
        answer.completion_tokens = int(left.ending["completion_tokens"])
        settle(box, answer, None)
    log.info("answer_settled", inference=answer.inference, whole=left.ending is not None)


def _put_away(path: Path, *, refused: bool) -> None:
    try:
        if refused:
            path.rename(path.with_suffix(REFUSED))
        else:
            path.unlink()
    except OSError as error:
        raise StorageError(f"cannot put {path} away: {error.strerror}") from error
