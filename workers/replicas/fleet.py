"""All replicas of a home, as one client's process sees them: a session to each, kept up.

Follows `<home>/ray/replicas`: a file that is new or of another instance begins a session, a session
that ended is tried again with a growing pause, a file that is gone ends the trying (answers under
way go on while the replica lives). Belongs to one event loop, and everything in it ends with it.
"""

import asyncio
import contextlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from workers.replicas import registry
from workers.replicas.protocol import READY
from workers.replicas.registry import Registration
from workers.replicas.session import DOWN, Session

log = structlog.get_logger(__name__)

LOOK_S = 0.25
"""Between two looks at the folder: some small files, read on the event loop. The home is on a local
disk or a mount that answers."""
FIRST_PAUSE_S = 0.1
MAX_PAUSE_S = 2.0


@dataclass(kw_only=True)
class Member:
    """A replica that is registered, and the session to it now."""

    registration: Registration
    session: Session
    task: asyncio.Task[None]


class Fleet:
    """Made within the event loop that it belongs to. `close` or the loop's end ends it. Raises
    ComputeError when the home's secret cannot be read."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._secret = registry.secret(home)
        self._members: dict[str, Member] = {}
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._look()
        self._watch = asyncio.create_task(self._watching())

    @property
    def usable(self) -> bool:
        """Whether this is its event loop, and it was not closed."""
        return self._loop is asyncio.get_running_loop() and not self._watch.done()

    @property
    def members(self) -> Mapping[str, Member]:
        return self._members

    def ready(self) -> dict[str, Session]:
        """Replicas that take requests now."""
        return {n: m.session for n, m in self._members.items() if m.session.state == READY}

    async def change(self, timeout_s: float) -> None:
        """Until something about the replicas changed, at most `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    async def close(self) -> None:
        tasks = [self._watch, *(m.task for m in self._members.values())]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._members.clear()

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self._look()

    def _look(self) -> None:
        found = registry.registered(self._home)
        for name, registration in found.items():
            known = self._members.get(name)
            if known is None or not _same(known.registration, registration):
                self._begin(registration, known)
        for name in self._members.keys() - found.keys():
            # Stopped in order, or erased; who is still answered keeps the session.
            if self._members[name].session.state == DOWN:
                self._members.pop(name).task.cancel()
                self._news()

    def _begin(self, registration: Registration, former: Member | None) -> None:
        if former is not None:
            former.task.cancel()
        session = self._session(registration)
        task = asyncio.create_task(self._keep(registration.name, session))
        self._members[registration.name] = Member(
            registration=registration, session=session, task=task
        )

    async def _keep(self, name: str, session: Session) -> None:
        """Run the session, and the next one whenever it ended, for as long as this is the task."""
        pause_s = FIRST_PAUSE_S
        while True:
            await session.run()
            if session.greeted:
                log.warning("replica lost", replica=name, why=session.why)
                pause_s = FIRST_PAUSE_S
            await asyncio.sleep(pause_s * random.uniform(0.8, 1.2))  # noqa: S311
            pause_s = min(MAX_PAUSE_S, 2 * pause_s)
            member = self._members[name]
            session = member.session = self._session(member.registration)

    def _session(self, registration: Registration) -> Session:
        return Session(registration, self._secret, self._news)

    def _news(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _same(one: Registration, other: Registration) -> bool:
    """The same process. Its state is what the session says, not what the file says."""
    return (one.instance, one.address) == (other.instance, other.address)
