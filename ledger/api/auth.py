"""Who calls, and how often they may.

`Authorization: Bearer trib_...` names an actor; routes that need one depend on `caller`. Reading
the public parts of the ledger needs nobody's leave. Every caller (by actor, else by address) has a
sliding window of `requests_per_minute`: two counters, however many requests it allows.
"""

import math
import time
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from ledger.api.services import Services, services
from ledger.errors import Backpressure, Forbidden, Unauthenticated


class RateLimit:
    def __init__(self, requests_per_minute: int) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._item = RateLimitItemPerMinute(requests_per_minute)

    def hit(self, who: str, cost: int = 1) -> None:
        """Count `cost` requests; Backpressure when the window has no room for them."""
        if not self._limiter.hit(self._item, who, cost=cost):
            # What counts of the window before this one fades until then.
            wait_s = self._limiter.get_window_stats(self._item, who).reset_time - time.time()
            raise Backpressure(
                f"more than {self._item.amount} requests in a minute; wait and retry",
                retry_after_s=max(1, math.ceil(wait_s)),
                code="rate_limit_exceeded",
            )


def address_of(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def optional_caller(request: Request, box: Annotated[Services, Depends(services)]) -> str | None:
    """The actor behind the credential, or None without one. A wrong credential is an error."""
    header = request.headers.get("authorization")
    if header is None:
        box.rate_limit.hit(address_of(request))
        return None
    scheme, _, token = header.partition(" ")
    actor = box.credentials.actor_of(token.strip()) if scheme.lower() == "bearer" else None
    if actor is None:
        box.rate_limit.hit(address_of(request))
        raise Unauthenticated("unknown credential; obtain one with `tributary login`")
    box.rate_limit.hit(actor)
    return actor


async def caller_of(request: Request, box: Services) -> str | None:
    """`optional_caller` on the event loop, with a thread only where the store must be asked."""
    if "authorization" in request.headers:
        return await run_in_threadpool(optional_caller, request, box)
    return optional_caller(request, box)


async def caller(actor: Annotated[str | None, Depends(optional_caller)]) -> str:
    if actor is None:
        raise Unauthenticated(
            "this needs a credential: Authorization: Bearer <token>; get one with `tributary login`"
        )
    return actor


def operator(
    actor: Annotated[str, Depends(caller)], box: Annotated[Services, Depends(services)]
) -> str:
    if not box.has_role(actor, "operator"):
        raise Forbidden("only an operator of this ledger does that")
    return actor


Anyone = Annotated[str | None, Depends(optional_caller)]
Caller = Annotated[str, Depends(caller)]
Operator = Annotated[str, Depends(operator)]
Box = Annotated[Services, Depends(services)]
