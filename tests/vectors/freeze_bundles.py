"""Make tests/vectors/bundles/v2: `python -m tests.vectors.freeze_bundles`.

Everything comes from fixed seeds, so the same script gives the same bytes; a test holds the frozen
files against it. Frozen means frozen: missing files are written, a file that would come out
differently stops the script. Bundles are put together from the log itself and not by
`ledger.log.bundle`, whose choice of entries may grow.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from ledger.chain.payouts import PayoutTree
from ledger.domain.canonical import canonical_json
from ledger.domain.rows import DataRow, rows_root, tree_path
from ledger.errors import VerificationError
from ledger.log.prover import Prover
from ledger.verify.bundle import verify_bundle
from ledger.verify.bundle_format import AnchoredCheckpoint, Bundle, BundledEntry, format_bundle
from ledger.verify.checkpoint import parse_checkpoint
from ledger.verify.disclosure import DisclosedRow
from ledger.verify.note import (
    COSIGNATURE,
    cosign_text,
    format_note,
    format_vkey,
    sign_text,
    vkey_of,
)
from ledger.verify.payouts import PayoutLine
from tests.unit.lineage_world import ADDRESSES, ORIGIN, World, key, manifest, name, rows, settled
from tests.unit.made_chain import l1_section

FOLDER = Path(__file__).parent / "bundles" / "v2"
WITNESSES = ("witness.example/north", "witness.example/south")
SEEN_AT_S = 1_700_000_100
STRANGE = DataRow(
    prompt='Wie heißt "tête-à-tête" auf 日本語? \U0001f642\n\t\\ /  ',
    completion="\u0000\u001f\u007f\u2028 é e\u0301 \U00010000 z",
    salt="00112233445566778899aabbccddeeff",
)

Change = Callable[[dict[str, Any]], object]


class Frozen:
    """The life of an answer, its payouts and one more contribution, and bundles of parts of it."""

    def __init__(self, folder: Path, *, training: bytes | None = None, rows_count: int = 6) -> None:
        self.world = World(folder)
        counted = {"run.completed": lambda body: {**body, "rows_count": rows_count}}
        self.world.tell(counted, training=training)
        self.trees = settled(self.world)
        self.contribute("cleo", [STRANGE])
        self.head = self.world.checkpoint()
        self.prover = Prover(self.world.tiles)
        self.index = {
            label: self.world.log.index_of(str(id)) or 0 for label, id in self.world.ids.items()
        }

    def contribute(self, who: str, given: Sequence[DataRow]) -> None:
        body = {
            "contribution": name(who), "datanet": name("net"), "licence": "CC-BY-4.0",
            "rows_root": rows_root(given).hex(), "rows_count": len(given), "rows_sha256": "ab" * 32,
            "title": f"rows of {who}",
        }  # fmt: skip
        self.world.add(who, "contribution.recorded", body, label=f"recorded {who}")

    def upto(self, label: str) -> list[str]:
        """Every label from the beginning to this one."""
        labels = list(self.world.ids)
        return labels[: labels.index(label) + 1]

    def bundle(
        self,
        subject: str,
        labels: Iterable[str],
        *,
        disclosed: Sequence[DisclosedRow] = (),
        payouts: Sequence[PayoutLine] = (),
        witnesses: Sequence[str] = (),
        anchored: bool = False,
    ) -> bytes:
        indexes = sorted(self.index[label] for label in labels)
        proofs = self.prover.inclusions(indexes, self.head.size)
        entries = tuple(
            BundledEntry(index=n, entry=self.world.log.entries(n, n + 1)[0], proof=tuple(proofs[n]))
            for n in indexes
        )
        note = cosigned(self.head.note, witnesses)
        section = l1_section(self.head.size, self.head.root)
        anchor = AnchoredCheckpoint(checkpoint=self.head.note, consistency=(), section=section)
        return format_bundle(
            Bundle(
                log=ORIGIN,
                vkey=self.world.vkey,
                subject=self.world.ids[subject],
                checkpoint=note,
                entries=entries,
                blobs=dict(self.world.blobs.blobs) if "run.completed" in labels else {},
                l1=anchor if anchored else None,
                disclosed=tuple(disclosed),
                payouts=tuple(payouts),
            )
        )


def shown(who: str, *numbers: int, given: Sequence[DataRow] | None = None) -> list[DisclosedRow]:
    mine = rows(who) if given is None else given
    hashes = [row.hash for row in mine]
    return [
        DisclosedRow(
            contribution=UUID(name(who)),
            row=n,
            value=mine[n],
            proof=tuple(tree_path(hashes, n)),
        )
        for n in numbers
    ]


def line(period: int, tree: PayoutTree, who: str) -> PayoutLine:
    account = ADDRESSES[who]
    return PayoutLine(
        period=period,
        account=account,
        cumulative_wei=tree.amount(account),
        proof=tree.proof(account),
    )


def cosigned(note: bytes, witnesses: Sequence[str]) -> bytes:
    """The note as the log publishes it, with these witnesses' lines below its own."""
    if not witnesses:
        return note
    text = note.decode().rpartition("\n\n")[0] + "\n"
    assert parse_checkpoint(text).origin == ORIGIN
    lines = [cosign_text(text, name, key(name), SEEN_AT_S) for name in witnesses]
    return format_note(text, [sign_text(text, ORIGIN, key("log")), *lines])


def witness_vkey(name: str) -> str:
    return format_vkey(vkey_of(name, key(name), COSIGNATURE))


def good(story: Frozen, partial: Frozen) -> dict[str, tuple[bytes, list[str]]]:
    """(bundle, witnesses to know) by name."""
    ann_and_net = ["datanet.created", "recorded ann", "approved ann"]
    by_id = sorted([*shown("ann", 0, 2), *shown("ben", 1)], key=lambda r: str(r.contribution))
    tree1, tree2 = story.trees
    lines1 = sorted((line(1, tree1, who) for who in ADDRESSES), key=lambda r: r.account)
    claimed = story.upto("payout.claimed 2")
    return {
        "row-of-adapter": (
            story.bundle(
                "adapter.published", story.upto("adapter.published"), disclosed=shown("ann", 1)
            ),
            [],
        ),
        "rows-of-contribution": (
            story.bundle("recorded ann", ann_and_net, disclosed=shown("ann", 0, 2)),
            [],
        ),
        "rows-of-answer": (
            story.bundle("inference.recorded", story.upto("attribution.recorded"), disclosed=by_id),
            [],
        ),
        "row-of-one-in-strange-letters": (
            story.bundle(
                "recorded cleo",
                ["datanet.created", "recorded cleo"],
                disclosed=shown("cleo", 0, given=[STRANGE]),
            ),
            [],
        ),
        "row-of-partial": (
            partial.bundle(
                "run.completed", partial.upto("run.completed"), disclosed=shown("ben", 1)
            ),
            [],
        ),
        "payout-lines": (
            story.bundle("period.closed 1", ["period.cutoff 1", "period.closed 1"], payouts=lines1),
            [],
        ),
        "payout-claimed": (
            story.bundle(
                "payout.claimed 2",
                claimed,
                payouts=[line(1, tree1, "ann"), line(2, tree2, "ann")],
            ),
            [],
        ),
        "witnessed": (
            story.bundle(
                "adapter.published",
                story.upto("adapter.published"),
                disclosed=shown("ben", 0),
                witnesses=WITNESSES,
            ),
            [witness_vkey(name) for name in WITNESSES],
        ),
        "everything": (
            story.bundle(
                "payout.claimed 1",
                claimed,
                disclosed=by_id,
                payouts=lines1,
                witnesses=WITNESSES,
                anchored=True,
            ),
            [witness_vkey(name) for name in WITNESSES],
        ),
    }


def bad(made: Mapping[str, tuple[bytes, list[str]]], partial: Frozen) -> dict[str, bytes]:
    """Each field in turn, changed alone."""
    sources = {name: json.loads(data) for name, (data, _) in made.items()}

    def changed(source: str, change: Change) -> bytes:
        value = copy.deepcopy(sources[source])
        change(value)
        return canonical_json(value)

    def row(change: Change, source: str = "rows-of-contribution", at: int = 0) -> bytes:
        return changed(source, lambda v: change(v["disclosed"][at]))

    def pay(change: Change, source: str = "payout-lines", at: int = 0) -> bytes:
        return changed(source, lambda v: change(v["payouts"][at]))

    def other(hex_digits: str) -> str:
        return hex_digits[:-1] + ("1" if hex_digits[-1] == "0" else "0")

    def many(value: dict[str, Any]) -> None:
        item = value["disclosed"][0]
        value["disclosed"] = [{**item, "row": n} for n in range(101)]

    def many_lines(value: dict[str, Any]) -> None:
        item = value["payouts"][0]
        value["payouts"] = [{**item, "period": n} for n in range(1, 102)]

    def witness_line(value: dict[str, Any], change: Callable[[list[str]], list[str]]) -> None:
        text, _, lines = value["checkpoint"].rpartition("\n\n")
        value["checkpoint"] = text + "\n\n" + "".join(change(lines.splitlines(keepends=True)))

    def altered(line: str) -> str:
        return line[:-6] + ("A" if line[-6] != "A" else "B") + line[-5:]

    return {
        # The whole.
        "both-lists-empty": changed("payout-lines", lambda v: v.update(payouts=[])),
        "lists-in-version-1": changed(
            "payout-lines", lambda v: v.update(format="tributary/lineage-bundle/v1")
        ),
        "version-3": changed(
            "payout-lines", lambda v: v.update(format="tributary/lineage-bundle/v3")
        ),
        "no-payouts-field": changed("row-of-adapter", lambda v: v.pop("payouts")),
        "no-disclosed-field": changed("payout-lines", lambda v: v.pop("disclosed")),
        "unknown-field": changed("payout-lines", lambda v: v.update(more=1)),
        "not-canonical": made["payout-lines"][0].replace(b'"period":1', b'"period": 1', 1),
        "hash-unused": changed("row-of-adapter", lambda v: v["hashes"].append("ab" * 32)),
        # Disclosed rows: form.
        "disclosed-no-list": changed("payout-lines", lambda v: v.update(disclosed={})),
        "disclosed-too-many": changed("rows-of-contribution", many),
        "disclosed-out-of-order": changed(
            "rows-of-contribution", lambda v: v["disclosed"].reverse()
        ),
        "disclosed-out-of-order-contributions": changed(
            "rows-of-answer", lambda v: v["disclosed"].reverse()
        ),
        "disclosed-twice": changed(
            "row-of-adapter", lambda v: v["disclosed"].append(v["disclosed"][0])
        ),
        "disclosed-item-no-object": changed(
            "row-of-adapter", lambda v: v.update(disclosed=["row"])
        ),
        "disclosed-item-unknown-field": row(lambda r: r.update(more=1)),
        "disclosed-item-missing-field": row(lambda r: r.pop("proof")),
        "disclosed-contribution-no-uuid": row(
            lambda r: r.update(contribution=r["contribution"].upper())
        ),
        "disclosed-row-negative": row(lambda r: r.update(row=-1)),
        "disclosed-row-text": row(lambda r: r.update(row="0")),
        "disclosed-row-true": row(lambda r: r.update(row=True)),
        "disclosed-value-unknown-field": row(lambda r: r["value"].update(more="")),
        "disclosed-value-missing-field": row(lambda r: r["value"].pop("salt")),
        "disclosed-prompt-empty": row(lambda r: r["value"].update(prompt="")),
        "disclosed-prompt-number": row(lambda r: r["value"].update(prompt=7)),
        "disclosed-completion-too-long": row(lambda r: r["value"].update(completion="x" * 8_001)),
        "disclosed-salt-upper-case": row(
            lambda r: r["value"].update(salt="ABCDEF" + r["value"]["salt"][6:])
        ),
        "disclosed-salt-short": row(lambda r: r["value"].update(salt="00")),
        "disclosed-proof-no-list": row(lambda r: r.update(proof="")),
        "disclosed-proof-too-long": row(lambda r: r.update(proof=["ab" * 32] * 64)),
        "disclosed-proof-hash-short": row(lambda r: r["proof"].__setitem__(1, "ab")),
        # Disclosed rows: truth.
        "row-prompt-changed": row(lambda r: r["value"].update(prompt="another?")),
        "row-completion-changed": row(lambda r: r["value"].update(completion="another.")),
        "row-salt-changed": row(lambda r: r["value"].update(salt=other(r["value"]["salt"]))),
        "row-letters-normalised": row(
            lambda r: r["value"].update(
                completion=r["value"]["completion"].replace("e\u0301", "\u00e9")
            ),
            "row-of-one-in-strange-letters",
        ),
        "row-number-changed": row(lambda r: r.update(row=1)),
        "row-number-beyond": row(lambda r: r.update(row=3), at=1),
        "row-number-beyond-one": row(lambda r: r.update(row=1), "row-of-one-in-strange-letters"),
        "row-proof-altered": row(lambda r: r["proof"].__setitem__(0, other(r["proof"][0]))),
        "row-proof-swapped": row(lambda r: r["proof"].reverse()),
        "row-proof-short": row(lambda r: r["proof"].pop()),
        "row-proof-long": row(lambda r: r["proof"].append("ab" * 32)),
        "row-proof-missing": row(lambda r: r.update(proof=[])),
        "row-second-altered": row(lambda r: r["value"].update(prompt="another?"), at=1),
        "row-of-another-contribution": changed(
            "row-of-adapter", lambda v: v["disclosed"][0].update(contribution=name("ben"))
        ),
        "row-of-absent-contribution": row(
            lambda r: r.update(contribution=name("nobody")), "row-of-adapter"
        ),
        "row-in-no-manifest": partial.bundle(
            "run.completed", partial.upto("run.completed"), disclosed=shown("ben", 2)
        ),
        "row-contribution-in-no-manifest": partial.bundle(
            "run.completed",
            [*partial.upto("run.completed"), "recorded cleo"],
            disclosed=shown("cleo", 0, given=[STRANGE]),
        ),
        # Payout lines: form.
        "payouts-no-list": changed("row-of-adapter", lambda v: v.update(payouts=None)),
        "payouts-too-many": changed("payout-lines", many_lines),
        "payouts-out-of-order": changed("payout-lines", lambda v: v["payouts"].reverse()),
        "payouts-out-of-order-periods": changed("payout-claimed", lambda v: v["payouts"].reverse()),
        "payouts-twice": changed("payout-lines", lambda v: v["payouts"].append(v["payouts"][-1])),
        "payouts-item-unknown-field": pay(lambda p: p.update(more=1)),
        "payouts-item-missing-field": pay(lambda p: p.pop("account")),
        "payouts-period-zero": pay(lambda p: p.update(period=0)),
        "payouts-period-text": pay(lambda p: p.update(period="1")),
        "payouts-account-upper-case": pay(
            lambda p: p.update(account="0x" + p["account"][2:].upper()), at=1
        ),
        "payouts-account-short": pay(lambda p: p.update(account=p["account"][:-2])),
        "payouts-amount-number": pay(lambda p: p.update(cumulative_wei=48)),
        "payouts-amount-leading-zero": pay(
            lambda p: p.update(cumulative_wei="0" + p["cumulative_wei"])
        ),
        "payouts-amount-negative": pay(lambda p: p.update(cumulative_wei="-1")),
        "payouts-amount-too-long": pay(lambda p: p.update(cumulative_wei="1" * 61)),
        "payouts-proof-no-list": pay(lambda p: p.update(proof={})),
        "payouts-proof-too-long": pay(lambda p: p.update(proof=["0x" + "ab" * 32] * 65)),
        "payouts-proof-hash-bare": pay(lambda p: p["proof"].__setitem__(0, p["proof"][0][2:])),
        # Payout lines: truth.
        "payout-amount-changed": pay(
            lambda p: p.update(cumulative_wei=str(int(p["cumulative_wei"]) + 1))
        ),
        "payout-account-changed": pay(lambda p: p.update(account="0x" + "00" * 20)),
        "payout-period-of-another-root": changed(
            "payout-claimed", lambda v: v.update(payouts=[{**v["payouts"][1], "period": 1}])
        ),
        "payout-period-absent": pay(lambda p: p.update(period=9), at=2),
        "payout-proof-altered": pay(lambda p: p["proof"].__setitem__(0, other(p["proof"][0]))),
        "payout-proof-short": pay(lambda p: p["proof"].pop()),
        "payout-proof-long": pay(lambda p: p["proof"].append("0x" + "ab" * 32)),
        "payout-second-altered": pay(
            lambda p: p.update(cumulative_wei=str(int(p["cumulative_wei"]) + 1)), at=1
        ),
        # Witnesses.
        "witness-signature-altered": changed(
            "witnessed",
            lambda v: witness_line(v, lambda lines: [*lines[:-1], altered(lines[-1])]),
        ),
        "witnesses-without-the-log": changed(
            "witnessed", lambda v: witness_line(v, lambda lines: lines[1:])
        ),
        # What version 1 checks holds in version 2 as well.
        "entry-altered": changed(
            "payout-claimed",
            lambda v: v["entries"][-1].update(entry=v["entries"][-1]["entry"][:-8] + "AAAAAAA="),
        ),
        "datanet-missing": changed("rows-of-contribution", drop_first),
    }


def drop_first(value: dict[str, Any]) -> None:
    """Without its first entry, and in the one spelling of what is left."""
    del value["entries"][0]
    order: dict[int, int] = {}
    for entry in value["entries"]:
        entry["proof"] = [order.setdefault(at, len(order)) for at in entry["proof"]]
    value["hashes"] = [value["hashes"][at] for at in order]


def make() -> dict[str, bytes]:
    """Every file of the folder by name."""

    def some_of_ben(value: Mapping[str, Any]) -> list[Any]:
        return [r for r in value["rows"] if r["contribution"] != name("ben") or r["row"] < 2]

    whole = json.loads(manifest())
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        story = Frozen(Path(one))
        partial = Frozen(Path(two), training=manifest(rows=some_of_ben(whole)), rows_count=5)
        made = good(story, partial)
        wrong = bad(made, partial)
    files: dict[str, bytes] = {}
    expected: dict[str, Any] = {"vkey": story.world.vkey, "good": {}, "bad": {}}
    for case, (data, witnesses) in made.items():
        verdict = verify_bundle(data, trusted_vkey=story.world.vkey, witness_vkeys=witnesses)
        expected["good"][case] = {
            "steps": [step.status for step in verdict.steps],
            "subject_index": verdict.facts["subject_index"],
            "size": verdict.facts["size"],
            "witness_vkeys": witnesses,
            "witnesses": verdict.facts["witnesses"],
        }
        files[f"{case}.lineage.json"] = data
    for case, data in wrong.items():
        witnesses = made["witnessed"][1] if case.startswith("witness") else []
        try:
            verify_bundle(data, witness_vkeys=witnesses)
        except VerificationError as error:
            expected["bad"][case] = {
                "error": error.slug,
                "field": error.detail.get("field"),
                "entry": error.detail.get("entry"),
                "witness_vkeys": witnesses,
            }
        else:
            raise AssertionError(f"{case} verifies")
        files[f"bad-{case}.lineage.json"] = data
    files["expected.json"] = (json.dumps(expected, indent=1) + "\n").encode()
    return files


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    files = make()
    there = {path.name: path.read_bytes() for path in FOLDER.iterdir()}
    changed = sorted(n for n, data in files.items() if there.get(n, data) != data)
    if changed or there.keys() - files.keys():
        print(
            f"frozen, and would change: {changed}; unknown: {sorted(there.keys() - files.keys())}"
        )
        return 1
    for file in sorted(files.keys() - there.keys()):
        (FOLDER / file).write_bytes(files[file])
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
