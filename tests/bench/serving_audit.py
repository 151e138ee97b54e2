"""What the ledger says of a load test, held against what its clients heard."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ledger.client import Client
from ledger.domain.envelope import Envelope
from tests.bench.serving_world import Consumer
from tests.service_world import download

PARTS = ("protocol_wei", "owner_wei", "operator_wei", "contributors_wei")


def audit(
    url: str, answers: Iterable[Mapping[str, Any]], consumers: Sequence[Consumer]
) -> dict[str, int]:
    """Downloads the whole log as an outsider does: its signatures and order are checked on the way.

    `lost`: a whole answer without exactly its event. `doubled`: an inference with two events or two
    fees, or recorded and interrupted as well. `interrupted`: answers that broke off by our fault
    and cost nothing. `unheard`: recorded, but no client heard its end (it went away, or we were
    killed). `wrong_money`: an amount that differs between receipt, event, fee, its parts, or the
    balance.
    """
    log = download(url)
    recorded = _by_inference(log.of("inference.recorded"))
    charged = _by_inference(log.of("fee.charged"))
    interrupted = _by_inference(log.of("inference.interrupted"))
    told = [answer for answer in answers if answer["done"] and answer["receipt"]]
    heard = Counter(str(answer["receipt"]["inference"]) for answer in told)
    lost = wrong = 0
    for answer in told:
        receipt = answer["receipt"]
        events = recorded.get(str(receipt["inference"]), [])
        there = log.events[int(receipt["index"])].body.get("inference") == receipt["inference"]
        lost += not (len(events) == 1 and there)
        wrong += bool(events) and events[0].body["fee_wei"] != receipt["fee_wei"]
    for inference, events in recorded.items():
        fees = charged.get(inference, [])
        wrong += len(fees) != 1 or not _adds_up(events[0], fees[0])
    kinds = (recorded, charged, interrupted)
    doubled = sum(len(found) > 1 for kind in kinds for found in kind.values())
    doubled += len(interrupted.keys() & recorded.keys())
    doubled += sum(count > 1 for count in heard.values())
    return {
        "events": len(log.events),
        "answers_heard": len(told),
        "inferences": len(recorded),
        "fees": len(charged),
        "interrupted": len(interrupted),
        "lost": lost,
        "doubled": doubled,
        "unheard": len(recorded.keys() - heard.keys()),
        "wrong_money": wrong + _wrong_balances(url, recorded, consumers),
        "fees_wei": sum(int(fee.body["amount_wei"]) for fees in charged.values() for fee in fees),
    }


def _by_inference(events: Iterable[Envelope]) -> dict[str, list[Envelope]]:
    found: dict[str, list[Envelope]] = {}
    for event in events:
        found.setdefault(str(event.body["inference"]), []).append(event)
    return found


def _adds_up(recorded: Envelope, charged: Envelope) -> bool:
    amount = int(charged.body["amount_wei"])
    parts = sum(int(charged.body[part]) for part in PARTS)
    return amount == parts == int(recorded.body["fee_wei"])


def _wrong_balances(
    url: str, recorded: Mapping[str, Sequence[Envelope]], consumers: Sequence[Consumer]
) -> int:
    """Consumers whose prepaid balance is not the deposit less the fees of their answers."""
    spent: Counter[str] = Counter()
    for events in recorded.values():
        spent[str(events[0].body["consumer"])] += int(events[0].body["fee_wei"])
    wrong = 0
    with Client(url) as client:
        size = int(client.get("/v1/info")["size"])
        client.wait_until("/v1/info", lambda info: int(info["projected"]) >= size - 1)
        for consumer in consumers:
            balances = client.get(f"/v1/accounts/{consumer.actor}/balances")
            wrong += int(balances["prepaid"]) != consumer.deposit_wei - spent[consumer.actor]
    return wrong
