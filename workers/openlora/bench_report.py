"""The bench's report as a page of Markdown tables. Only what was measured is in it."""

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    machine, options = report["machine"], report["options"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        f"# OpenLoRA on {machine['device']}",
        "",
        f"{options['shape']} random Llama in {options['dtype']}, batch {options['batch']}, "
        f"{options['adapters']} adapters, prompts of {options['prompt']} tokens. {versions}. "
        f"A copy on the device moves {machine['copy_gb_s']:.0f} GB/s, read and write.",
        "",
    ]
    for name, section in report["sections"].items():
        lines += [f"## {name}", ""]
        if not section["ok"]:
            lines += [f"failed: {section.get('error')}", ""]
        lines += [*_TABLES[name](section), ""]
        if "seconds" in section:
            lines += [f"{section['seconds']:.1f} s", ""]
    return "\n".join(lines)


def _kernels(s: dict[str, Any]) -> list[str]:
    rows = [
        f"{dtype}: {name} agrees with torch within the type."
        for dtype, name in s.get("kernels", {}).items()
    ]
    timed = s.get("timed", [])
    if timed:
        rows += ["", "| rank | in | out | shrink + expand | A and B at |", "|---|---|---|---|---|"]
    return rows + [
        f"| {t['rank']} | {t['in']} | {t['out']} | {t['us']:.1f} us | {t['gb_s']:.0f} GB/s |"
        for t in timed
    ]


def _greedy(s: dict[str, Any]) -> list[str]:
    return [
        f"{dtype}: {r['identical']} of {r['answers']} answers are plain torch's "
        f"({r['distinct']} distinct)."
        for dtype, r in s.items()
        if isinstance(r, dict)
    ]


def _decode(s: dict[str, Any]) -> list[str]:
    head = (
        "| adapters | tokens/s without | with | fraction | limit | share of it | step | traffic |"
    )
    return [head, "|---|---|---|---|---|---|---|---|"] + [
        f"| {r['distinct_adapters']} x {case} | {r['base_tokens_per_s']:.0f} "
        f"| {r['lora_tokens_per_s']:.0f} | {r['fraction']:.3f} | {r['limit']:.3f} "
        f"| {r['share_of_limit']:.3f} | {r['step_ms']:.2f} ms | {r['gb_s']:.0f} GB/s |"
        for case, r in s.items()
        if isinstance(r, dict) and "fraction" in r
    ]


def _ttft(s: dict[str, Any]) -> list[str]:
    if "base_ms" not in s:
        return []
    rows = ["| time to first token | slot | host memory | disk |", "|---|---|---|---|"]
    rows += [
        f"| {case} ({r['adapter_bytes'] / 1e6:.1f} MB) | {r['slot']:.1f} ms | {r['host']:.1f} ms "
        f"| {r['disk']:.1f} ms |"
        for case, r in s.items()
        if isinstance(r, dict)
    ]
    return [*rows, "", f"The base model alone: {s['base_ms']:.1f} ms."]


def _resident(s: dict[str, Any]) -> list[str]:
    if "resident" not in s:
        return []
    added = s["device_bytes_added"]
    return [
        f"{s['resident']} adapters of {s['adapter_bytes'] / 1e6:.1f} MB in slots "
        f"({s['asked']} were asked for) "
        f"({s['through_the_store']} by way of the store, the others copied on the device): "
        f"{s['slot_bytes'] / 1e9:.2f} GB, {s['bytes_per_adapter_ratio']:.3f} times their bytes"
        + ("" if added is None else f"; the allocator grew by {added / 1e9:.2f} GB")
        + f". {s['lora_tokens_per_s']:.0f} tokens/s."
    ]


_TABLES = {
    "kernels": _kernels,
    "greedy": _greedy,
    "decode": _decode,
    "ttft": _ttft,
    "resident": _resident,
}
