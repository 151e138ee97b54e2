"""One answer while it is given: what is held for it, and how it ends.

However it ends, the account's money is free again, or spent, or held for an event that the ledger
is owed; and the journal's intent is closed, or what another process needs to close it.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import anyio.to_thread
import structlog

from ledger.api.answers.answer import Answer
from ledger.api.answers.desk import Owed, Running
from ledger.api.answers.journal import Intent
from ledger.api.answers.recording import UNPAID, Recorded, interrupt, record
from ledger.api.services import Services
from ledger.api.shapes import plain
from ledger.errors import Backpressure, PaymentRequired, Unavailable

LOOK_EVERY_S = 0.05

log = structlog.get_logger(__name__)


class Sitting:
    def __init__(
        self, box: Services, answer: Answer, intent: Intent, running: Running, *, wait_s: float = 0
    ) -> None:
        """`wait_s`: how long the receipt may wait for the answer's attribution."""
        self.box, self.answer, self.intent = box, answer, intent
        self._running = running
        self._wait_s = wait_s
        self._over = False
        box.answers.not_delivered(answer.consumer, running.request_sha256, answer.inference)

    # --- endings -------------------------------------------------------------------------------

    async def finish(self) -> Mapping[str, Any]:
        """Record the answer as it is now, and charge it; the receipt for its client.

        Where the ledger cannot be reached it is written down as owed, and recorded later.
        Raises PaymentRequired where another answer has spent the account's money meanwhile.
        """
        try:
            recorded = await anyio.to_thread.run_sync(record, self.box, self.answer)
        except (Unavailable, Backpressure) as error:
            self._owe(None, error)
            return self._receipt(None)
        except PaymentRequired:
            if self.intent.delivered:
                await self.break_off(UNPAID)
            raise
        self._settled()
        return await self._with_attribution(self._receipt(recorded))

    async def break_off(self, reason: str) -> Mapping[str, Any] | None:
        """By our fault: record what was delivered, for nothing. None where nothing was."""
        if self._over:
            return None
        if not self.intent.delivered:
            self._settled()
            return None
        try:
            recorded = await anyio.to_thread.run_sync(interrupt, self.box, self.answer, reason)
        except Exception as error:  # whatever it is, it must not lose the answer
            self._owe(reason, error)
            return self._broken(reason, None)
        self._settled()
        return self._broken(reason, recorded)

    def delivered(self) -> None:
        """The client has the answer, or the beginning of its stream: it will not ask again."""
        sha256 = self._running.request_sha256
        self.box.answers.delivered(self.answer.consumer, sha256, self.answer.inference)

    def leave(self) -> None:
        """The last thing. An answer that nobody has settled by now is the journal's."""
        if not self._over:
            self._end()
            if not self.intent.delivered:
                self.intent.close()
            self._release()

    # --- parts ---------------------------------------------------------------------------------

    def _settled(self) -> None:
        self._end()
        self.intent.close()
        self._release()

    def _owe(self, reason: str | None, error: Exception) -> None:
        answer = self.answer
        if reason is None:
            self.intent.owe(ending(answer))
        # No await between: the same request sees it running or owed, never neither.
        self.box.answers.owed[answer.inference] = Owed(
            answer=answer, intent=self.intent, reason=reason
        )
        self._end()
        log.warning("answer_owed", inference=answer.inference, why=str(error))
        if reason is not None:
            self._release()  # it costs nothing

    def _end(self) -> None:
        self._over = True
        self.box.answers.running.pop(self.answer.inference, None)
        self._running.over.set()

    def _release(self) -> None:
        self.box.reservations.release(self.answer.consumer, self.answer.held_wei)

    def _receipt(self, recorded: Recorded | None) -> dict[str, Any]:
        return receipt_of(self.answer, recorded)

    def _broken(self, reason: str, recorded: Recorded | None) -> dict[str, Any]:
        return {**self._receipt(recorded), "fee_wei": "0", "interrupted": reason}

    async def _with_attribution(self, receipt: dict[str, Any]) -> dict[str, Any]:
        """With whom the answer paid, where that is known within `wait_s`; else the link stays."""
        deadline = asyncio.get_running_loop().time() + self._wait_s
        while self._wait_s and asyncio.get_running_loop().time() < deadline:
            found = await anyio.to_thread.run_sync(attribution_of, self.box, self.answer)
            if found is not None:
                return {**receipt, "attribution": found}
            await asyncio.sleep(LOOK_EVERY_S)
        return receipt


def ending(answer: Answer) -> dict[str, Any]:
    """What the journal's intent lacks of a whole answer."""
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }


def receipt_of(answer: Answer, recorded: Recorded | None) -> dict[str, Any]:
    """The member `tributary`: what a consumer needs to see whom they paid, and to hold the log to
    its word. `attribution` is a link until there is one."""
    link = f"/v1/inferences/{answer.inference}"
    told: dict[str, Any] = {
        "inference": answer.inference,
        "index": recorded.index if recorded else None,
        "fee_wei": str(answer.fee_wei),
        "attribution": link,
        "receipt": recorded.receipt if recorded else None,
    }
    if answer.ended_as is not None and answer.ended_as != answer.finish_reason:
        told["ended_as"] = answer.ended_as
    if recorded is None:
        told["pending"] = (
            "the ledger could not be reached; the answer is kept on disk and recorded under this "
            f"id as soon as it can: GET /v1/receipts/{answer.inference}"
        )
    return told


def attribution_of(box: Services, answer: Answer) -> dict[str, Any] | None:
    """Whom the answer paid, in ppm and wei, once that is recorded and posted."""
    found = box.queries.attribution(answer.inference)
    if found is None:
        return None
    paid = {
        posting["owner"]: int(posting["amount_wei"])
        for posting in box.queries.postings(answer.inference)
        if posting["part"] == "contributor"
    }
    shares = [{**share, "wei": str(paid.get(share["contributor"], 0))} for share in found["shares"]]
    return {
        **plain({k: found[k] for k in ("method", "unattributed_ppm")}),
        "index": int(found["index"]),
        "shares": shares,
        "link": f"/v1/inferences/{answer.inference}",
    }
