"""What the live page of serving shows, as text and coordinates: the page's template and its script
put them in place and know nothing of serving. All numbers are of replicas that answer, summed."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from ledger.api.serving_totals import TIERS, Totals
from ledger.api.serving_watch import HISTORY, Look, Replica, ServingWatch

WINDOW_S = 60.0
"""Percentiles and shares are of so long."""
SHOWN_ADAPTERS = 10
CHART_HEIGHT = 60
NOTHING = "–"
UNNAMED = {"other": "all others", "base": "the base model itself"}
FORMS = {"row": "row form", "dense": "dense form", "none": "base rows only"}


def message(watch: ServingWatch) -> bytes:
    """The data of one server-sent event."""
    return json.dumps(figures(watch), separators=(",", ":"), ensure_ascii=True).encode()


def figures(watch: ServingWatch) -> dict[str, Any]:
    """`text` by place, `points` of lines, `width` of bars in percent, `rows` of tables."""
    recent = watch.window(WINDOW_S)
    replicas = sorted(watch.replicas.values(), key=lambda replica: replica.name)
    up = [replica for replica in replicas if replica.up]
    looks = list(watch.history)
    return {
        "text": {
            "at": datetime.now(UTC).strftime("%H:%M:%S UTC"),
            **_load(up, looks),
            **_waits(recent),
            **_batch(up, recent),
            **_tiers(up, recent),
        },
        "points": _lines(looks),
        "width": {**_batch_bars(up), **_shares("tier", _found(recent))},
        "rows": {
            "replicas": [_replica(replica) for replica in replicas],
            "adapters": _adapters(up, watch.names),
            "ends": _counted(_sum(up, "finished")),
            "refusals": _counted(_sum(up, "refused")),
        },
    }


# --- tiles and charts --------------------------------------------------------------------------


def _load(up: Sequence[Replica], looks: Sequence[Look]) -> dict[str, str]:
    rows = _total(up, "rows")
    peak = max((look.tokens_per_s for look in looks), default=0.0)
    slowest = max((look.ttft_s for look in looks if look.ttft_s is not None), default=None)
    return {
        "rate": _whole(sum(replica.tokens_per_s for replica in up)),
        "tokens": _whole(sum(_metric(replica, "tokens") for replica in up)),
        "running": _whole(rows),
        "max_rows": _whole(_total(up, "max_rows")),
        "waiting": _whole(_total(up, "queued")),
        "rate_peak": _whole(peak),
        "load_peak": _whole(max((look.rows + look.waiting for look in looks), default=0)),
        "ttft_peak": _seconds(slowest),
    }


def _waits(recent: Totals) -> dict[str, str]:
    return {
        f"{place}_p{percent}": _seconds(recent.quantile(name, percent / 100))
        for place, name in (("ttft", "ttft_s"), ("gap", "inter_token_s"), ("queue", "queue_s"))
        for percent in (50, 95, 99)
    }


def _lines(looks: Sequence[Look]) -> dict[str, str]:
    """Points of the three minutes, newest at the right; `area_*` closed along the bottom."""
    load = max([1, *(look.rows + look.waiting for look in looks)])
    rate = max([1.0, *(look.tokens_per_s for look in looks)])
    ttft = max([0.001, *(look.ttft_s or 0.0 for look in looks)])
    return {
        "rate": _line([look.tokens_per_s / rate for look in looks]),
        "area_rate": _line([look.tokens_per_s / rate for look in looks], closed=True),
        "rows": _line([look.rows / load for look in looks]),
        "area_load": _line([(look.rows + look.waiting) / load for look in looks], closed=True),
        "load": _line([(look.rows + look.waiting) / load for look in looks]),
        "ttft": _line([(look.ttft_s or 0.0) / ttft for look in looks]),
        "area_ttft": _line([(look.ttft_s or 0.0) / ttft for look in looks], closed=True),
    }


def _line(parts: Sequence[float], *, closed: bool = False) -> str:
    """Parts of the height, 0 at the bottom."""
    first = HISTORY - len(parts)
    top, bottom = 2, CHART_HEIGHT - 1
    points = [
        f"{first + place},{bottom - part * (bottom - top):.1f}" for place, part in enumerate(parts)
    ]
    if closed and points:
        points = [f"{first},{bottom}", *points, f"{HISTORY - 1},{bottom}"]
    return " ".join(points)


# --- the batch and the tiers -------------------------------------------------------------------


def _batch(up: Sequence[Replica], recent: Totals) -> dict[str, str]:
    steps = max(1, recent.counts["decode_steps"])
    forms = {name: count for name, count in recent.under("form").items() if count}
    shown = [
        f"{FORMS.get(name, name)} {count / sum(forms.values()):.0%}"
        for name, count in sorted(forms.items(), key=lambda item: -item[1])
    ]
    last = _last(up)
    return {
        "batch_adapters": _whole(last["adapters"]),
        "batch_lora": _whole(last["rows"] - last["base_rows"]),
        "batch_base": _whole(last["base_rows"]),
        "batch_free": _whole(max(0, _total(up, "max_rows") - _total(up, "rows"))),
        "batch_mean": f"{recent.counts['decode_rows'] / steps:.1f}",
        "forms": ", ".join(shown) or NOTHING,
        "steps": _whole(recent.counts["decode_steps"] / WINDOW_S),
        "step_p50": _seconds(recent.quantile("decode_step_s", 0.5)),
        "prompt_rate": _whole(recent.counts["prefill_tokens"] / WINDOW_S),
    }


def _batch_bars(up: Sequence[Replica]) -> dict[str, float]:
    """Bars of one strip, side by side: each has a width and begins where the last one ends."""
    last = _last(up)
    room = max(1, _total(up, "max_rows"))
    lora = 100 * min(1.0, (last["rows"] - last["base_rows"]) / room)
    base = 100 * min(1.0, last["base_rows"] / room)
    return {"batch_lora": round(lora, 1), "batch_base": round(min(100.0, lora + base), 1)}


def _tiers(up: Sequence[Replica], recent: Totals) -> dict[str, str]:
    store = {key: sum(int(_store(r).get(key, 0)) for r in up) for key in _STORE}
    found = _found(recent)
    evicted = recent.under("evicted")
    return {
        **{f"tier_{name}": _whole(count) for name, count in found.items()},
        **{f"store_{key}": _whole(count) for key, count in store.items() if key != "host_bytes"},
        "store_host_mb": _whole(store["host_bytes"] / 2**20),
        "evicted": _whole(sum(evicted.values())),
    }


_STORE = ("registered", "in_slots", "slots", "in_host", "host_bytes")


def _found(recent: Totals) -> dict[str, int]:
    return {tier: recent.under("tier").get(tier, 0) for tier in TIERS}


def _shares(prefix: str, counts: dict[str, int]) -> dict[str, float]:
    total = max(1, sum(counts.values()))
    return {f"{prefix}_{name}": round(100 * count / total, 1) for name, count in counts.items()}


# --- tables ------------------------------------------------------------------------------------


def _replica(replica: Replica) -> dict[str, Any]:
    finished = sum(_named(replica, "finished").values())
    rows = f"{replica.stats.get('rows', 0)} of {replica.stats.get('max_rows', 0)}"
    cells = [rows, _whole(replica.stats.get("queued", 0)), _whole(replica.tokens_per_s)]
    if not replica.up:
        cells = [NOTHING] * len(cells)
    return {
        "state": replica.state,
        "cells": [replica.name, replica.state, *cells, _whole(finished)],
    }


def _adapters(up: Sequence[Replica], names: dict[str, str]) -> list[dict[str, Any]]:
    """The busiest by tokens, all replicas together."""
    found: dict[str, dict[str, float]] = {}
    for replica in up:
        for adapter, counts in _named(replica, "adapters").items():
            mine = found.setdefault(adapter, dict.fromkeys(counts, 0.0))
            for key, count in counts.items():
                mine[key] += count
    ranked = sorted(found.items(), key=lambda item: (-item[1]["completion_tokens"], item[0]))
    total = max(1.0, sum(counts["completion_tokens"] for counts in found.values()))
    most = max([1.0, *(counts["completion_tokens"] for counts in found.values())])
    return [
        {
            "cells": [
                UNNAMED.get(adapter) or names.get(adapter, adapter),
                _whole(counts["requests"]),
                _whole(counts["completion_tokens"]),
                _seconds(counts["ttft_s"] / counts["first_tokens"])
                if counts["first_tokens"]
                else NOTHING,
                f"{counts['completion_tokens'] / total:.0%}",
            ],
            "bar": round(100 * counts["completion_tokens"] / most, 1),
        }
        for adapter, counts in ranked[:SHOWN_ADAPTERS]
    ]


def _counted(counts: dict[str, int]) -> list[dict[str, Any]]:
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"cells": [name.replace("-", " "), _whole(count)]} for name, count in ranked]


# --- reading snapshots -------------------------------------------------------------------------


def _sum(up: Iterable[Replica], key: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for replica in up:
        for name, count in _named(replica, key).items():
            found[name] = found.get(name, 0) + int(count)
    return found


def _last(up: Iterable[Replica]) -> dict[str, int]:
    """The newest decode steps, one of each replica that has rows now."""
    busy = [r for r in up if r.stats.get("rows")]
    return {
        key: sum(int(_named(r, "last_step").get(key, 0)) for r in busy)
        for key in ("rows", "adapters", "base_rows")
    }


def _named(replica: Replica, key: str) -> dict[str, Any]:
    return dict(replica.stats.get("metrics", {}).get(key, {}))


def _metric(replica: Replica, key: str) -> int:
    return int(replica.stats.get("metrics", {}).get(key, 0))


def _store(replica: Replica) -> dict[str, Any]:
    return dict(replica.stats.get("adapters", {}))


def _total(up: Iterable[Replica], key: str) -> int:
    return sum(int(replica.stats.get(key, 0)) for replica in up)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    """Three digits, in the unit that suits them."""
    if value is None:
        return NOTHING
    if value < 0.0995:
        return f"{1000 * value:.1f} ms"
    return f"{1000 * value:.0f} ms" if value < 0.9995 else f"{value:.2f} s"
