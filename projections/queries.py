"""What the API, the console and the command line read: SQL over the projected rows, no more.

Every method is one read-only statement and returns plain dictionaries: wei as `int`, hashes and ids
as the text that events carry, JSON columns parsed. Lists are paged by the index (or key) that they
are ordered by, with a named limit. Rows are as fresh as `Runner.position`; a caller that must see
its own write calls `Runner.wait_for` first.
"""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, LiteralString

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from ledger.errors import StorageError, TooLarge
from projections.consent_queries import ConsentQueries
from projections.run_inputs import KeptInputs

MAX_PAGE = 1_000
MAX_LINEAGE = 100_000
BUCKETS = ("prepaid", "accrued", "withheld", "held", "available", "paid")

Found = dict[str, Any]
_JSON_COLUMNS = frozenset({"reviewers", "config", "datanets"})


class Queries(ConsentQueries):
    """Read helpers over one pool. Thread-safe, like the pool."""

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._kept = KeptInputs()

    # -- money ---------------------------------------------------------------------------------

    def balances(self, owner: str) -> dict[str, int]:
        """Wei by bucket. An actor always has all BUCKETS; the ledger's own accounts have `main`."""
        rows = self._all(
            "SELECT bucket, amount_wei FROM projections.balances WHERE owner = %s", owner
        )
        found = {row["bucket"]: row["amount_wei"] for row in rows}
        return dict.fromkeys(BUCKETS, 0) | found if owner.startswith("ed25519:") else found

    def balance(self, owner: str, bucket: str) -> int:
        return self.balances(owner).get(bucket, 0)

    def statement(
        self, owner: str, *, limit: int = 100, after: tuple[int, int] = (-1, -1)
    ) -> list[Found]:
        """Lines in the order of the log, those after (index, n)."""
        return self._all(
            "SELECT * FROM projections.statement_lines"
            ' WHERE owner = %s AND ("index", n) > (%s, %s) ORDER BY "index", n LIMIT %s',
            owner,
            *after,
            _page(limit),
        )

    def statement_newest(self, owner: str, *, limit: int = 100) -> list[Found]:
        """The newest lines, newest first."""
        return self._all(
            "SELECT * FROM projections.statement_lines"
            ' WHERE owner = %s ORDER BY "index" DESC, n DESC LIMIT %s',
            owner,
            _page(limit),
        )

    def postings(self, inference: str) -> list[Found]:
        """Every statement line that one inference caused, for every owner."""
        return self._all(
            "SELECT * FROM projections.statement_lines"
            ' WHERE inference = %s ORDER BY "index", n LIMIT %s',
            inference,
            MAX_PAGE,
        )

    def top_contributors(self, *, limit: int = 20) -> list[Found]:
        """Who earned most: owner, name, earned_wei, inferences. Reads all contributors' lines."""
        return self._all(
            "SELECT l.owner, sum(l.amount_wei) AS earned_wei, count(*) AS inferences, i.name"
            " FROM projections.statement_lines AS l"
            " LEFT JOIN projections.identities AS i ON i.actor = l.owner"
            " WHERE l.part = 'contributor' GROUP BY l.owner, i.name"
            " ORDER BY earned_wei DESC, l.owner LIMIT %s",
            _page(limit),
        )

    def totals(self) -> dict[str, int]:
        """Wei by bucket over all owners, the ledger's own under their names; they sum to zero."""
        rows = self._all(
            "SELECT CASE bucket WHEN 'main' THEN owner ELSE bucket END AS account,"
            " sum(amount_wei) AS amount_wei FROM projections.balances GROUP BY 1 ORDER BY 1"
        )
        return {row["account"]: row["amount_wei"] for row in rows}

    def periods(self, *, limit: int = 100) -> list[Found]:
        """Newest first."""
        return self._all(
            "SELECT * FROM projections.periods ORDER BY period DESC LIMIT %s", _page(limit)
        )

    def period(self, period: int) -> Found | None:
        return self._one("SELECT * FROM projections.periods WHERE period = %s", period)

    def payout_lines(self, period: int) -> list[Found]:
        """The whole payout list of a period: address, owner, amount_wei, cumulative_wei."""
        return self._all(
            "SELECT address, owner, amount_wei, cumulative_wei FROM projections.payout_lines"
            " WHERE period = %s ORDER BY address, owner",
            period,
        )

    def cumulative_lines(self, period: int) -> list[tuple[str, int]]:
        """Leaves of the period's payout tree: (address, cumulative wei), by address."""
        rows = self._all(
            "SELECT address, sum(cumulative_wei) AS cumulative_wei FROM projections.payout_lines"
            " WHERE period = %s GROUP BY address ORDER BY address",
            period,
        )
        return [(row["address"], row["cumulative_wei"]) for row in rows]

    def payable(self) -> list[Found]:
        """What a cut-off now would move: address, owner, amount_wei."""
        return self._all(
            "SELECT b.address, b.actor AS owner, a.amount_wei FROM projections.bindings AS b"
            " JOIN projections.balances AS a ON a.owner = b.actor AND a.bucket = 'accrued'"
            " WHERE a.amount_wei > 0 ORDER BY b.address"
        )

    def payees(self, address: str) -> list[Found]:
        """What an EVM address is owed in all, may claim now and was paid, by owner."""
        return self._all(
            "SELECT * FROM projections.payees WHERE address = %s ORDER BY owner", address.lower()
        )

    def claims(self, address: str) -> list[Found]:
        return self._all(
            'SELECT * FROM projections.claims WHERE address = %s ORDER BY "index"',
            address.lower(),
        )

    def unexplained_claims(self, *, limit: int = 100) -> list[Found]:
        """Claims that the chain paid and no active period covers. Should be empty or brief."""
        return self._all(
            "SELECT * FROM projections.claims WHERE applied_index IS NULL"
            ' ORDER BY "index" LIMIT %s',
            _page(limit),
        )

    def anomalies(self, *, limit: int = 100) -> list[Found]:
        """Events that asked for something the rules do not allow, newest first."""
        return self._all(
            'SELECT * FROM projections.anomalies ORDER BY "index" DESC, n LIMIT %s', _page(limit)
        )

    # -- catalogue -----------------------------------------------------------------------------

    def ledger(self) -> Found | None:
        """How the ledger was opened: log, name, opened_by, index, at."""
        return self._one('SELECT * FROM projections.ledgers ORDER BY "index" LIMIT 1')

    def datanets(self, *, status: str | None = None, limit: int = MAX_PAGE) -> list[Found]:
        return self._all(
            "SELECT * FROM projections.datanets WHERE %s::text IS NULL OR status = %s"
            " ORDER BY created_index LIMIT %s",
            status,
            status,
            _page(limit),
        )

    def datanet(self, datanet: str) -> Found | None:
        return self._one("SELECT * FROM projections.datanets WHERE datanet = %s", datanet)

    def contributions(
        self,
        *,
        datanet: str | None = None,
        status: str | None = None,
        contributor: str | None = None,
        after: int = -1,
        limit: int = MAX_PAGE,
    ) -> list[Found]:
        """In the order of the log; `after` is the index of the last one seen. `held`: now."""
        return self._all(
            "SELECT c.*, coalesce(h.active, false) AS held FROM projections.contributions AS c"
            " LEFT JOIN projections.holds AS h ON h.contribution = c.contribution"
            ' WHERE c."index" > %(after)s'
            " AND (%(datanet)s::text IS NULL OR c.datanet = %(datanet)s)"
            " AND (%(status)s::text IS NULL OR c.status = %(status)s)"
            " AND (%(contributor)s::text IS NULL OR c.contributor = %(contributor)s)"
            ' ORDER BY c."index" LIMIT %(limit)s',
            after=after,
            datanet=datanet,
            status=status,
            contributor=contributor,
            limit=_page(limit),
        )

    def contribution(self, contribution: str) -> Found | None:
        return self._one(
            "SELECT * FROM projections.contributions WHERE contribution = %s", contribution
        )

    def runs(self, *, status: str | None = None, limit: int = 100) -> list[Found]:
        """Oldest request first with a status (a queue), newest first without."""
        if status is None:
            return self._all(
                "SELECT * FROM projections.runs ORDER BY requested_index DESC LIMIT %s",
                _page(limit),
            )
        return self._all(
            "SELECT * FROM projections.runs WHERE status = %s ORDER BY requested_index LIMIT %s",
            status,
            _page(limit),
        )

    def run(self, run: str) -> Found | None:
        return self._one("SELECT * FROM projections.runs WHERE run = %s", run)

    def run_inputs(self, run: str) -> list[Found]:
        """The contributions that a run may train on: approved, and neither withdrawn nor held, when
        it was requested, whatever became of them later. In the order of approval; `held` says
        whether they are held now."""
        return self._all(
            "SELECT c.*, l.parent AS approved_index, coalesce(h.active, false) AS held"
            " FROM projections.things AS t"
            " JOIN projections.lineage AS l ON l.child = t.\"index\" AND l.field = 'inputs'"
            " JOIN projections.lineage AS s"
            "   ON s.child = l.parent AND s.field = 'contribution'"
            ' JOIN projections.contributions AS c ON c."index" = s.parent'
            " LEFT JOIN projections.holds AS h ON h.contribution = c.contribution"
            " WHERE t.kind = 'run' AND t.id = %s ORDER BY l.parent",
            run,
        )

    def adapters(self, *, status: str | None = "published", limit: int = MAX_PAGE) -> list[Found]:
        """Newest first; `status=None` for all. With their usage counters."""
        return self._all(
            "SELECT a.*, coalesce(u.inferences, 0) AS inferences,"
            " coalesce(u.fees_wei, 0) AS fees_wei FROM projections.adapters AS a"
            " LEFT JOIN projections.adapter_usage AS u USING (adapter)"
            ' WHERE %s::text IS NULL OR a.status = %s ORDER BY a."index" DESC LIMIT %s',
            status,
            status,
            _page(limit),
        )

    def adapter(self, adapter: str) -> Found | None:
        return self._one("SELECT * FROM projections.adapters WHERE adapter = %s", adapter)

    def adapter_by_model(self, model: str) -> Found | None:
        """The newest adapter under this name that is not retired, of the name's owner: whoever
        published it first. Others may use the string, but nothing resolves to theirs."""
        return self._one(
            "SELECT * FROM projections.adapters WHERE model = %s AND status = 'published'"
            " AND owner = (SELECT owner FROM projections.adapters WHERE model = %s"
            ' ORDER BY "index" LIMIT 1)'
            ' ORDER BY "index" DESC LIMIT 1',
            model,
            model,
        )

    def identities(self, *, limit: int = MAX_PAGE) -> list[Found]:
        return self._all(
            'SELECT * FROM projections.identities ORDER BY "index" LIMIT %s', _page(limit)
        )

    def identity(self, actor: str) -> Found | None:
        return self._one("SELECT * FROM projections.identities WHERE actor = %s", actor)

    def actor_of_address(self, address: str) -> str | None:
        row = self._one(
            "SELECT actor FROM projections.addresses WHERE address = %s", address.lower()
        )
        return str(row["actor"]) if row else None

    def roles(self, member: str | None = None) -> list[Found]:
        return self._all(
            "SELECT * FROM projections.roles WHERE %s::text IS NULL OR member = %s"
            " ORDER BY member, role",
            member,
            member,
        )

    def fee_policies(self) -> list[Found]:
        return self._all("SELECT * FROM projections.fee_policies ORDER BY version")

    def fee_policy_at(self, index: int) -> Found | None:
        """The policy in force for an inference at this leaf index."""
        return self._one(
            'SELECT * FROM projections.fee_policies WHERE "index" <= %s'
            ' ORDER BY "index" DESC LIMIT 1',
            index,
        )

    # -- usage ---------------------------------------------------------------------------------

    def inference(self, inference: str) -> Found | None:
        """An inference, and its attribution with shares (largest first) or None."""
        found = self._one("SELECT * FROM projections.inferences WHERE inference = %s", inference)
        if found is not None:
            found["attribution"] = self.attribution(inference)
        return found

    def inferences(
        self,
        *,
        adapter: str | None = None,
        consumer: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[Found]:
        """Newest first; `before` is the index of the last one seen."""
        return self._all(
            "SELECT * FROM projections.inferences"
            " WHERE (%(adapter)s::text IS NULL OR adapter = %(adapter)s)"
            " AND (%(consumer)s::text IS NULL OR consumer = %(consumer)s)"
            ' AND (%(before)s::bigint IS NULL OR "index" < %(before)s)'
            ' ORDER BY "index" DESC LIMIT %(limit)s',
            adapter=adapter,
            consumer=consumer,
            before=before,
            limit=_page(limit),
        )

    def attribution(self, inference: str) -> Found | None:
        found = self._one("SELECT * FROM projections.attributions WHERE inference = %s", inference)
        if found is not None:
            found["shares"] = self._all(
                "SELECT contributor, ppm FROM projections.shares WHERE inference = %s"
                " ORDER BY ppm DESC, contributor",
                inference,
            )
        return found

    def pending_attributions(self, *, limit: int = 100) -> list[Found]:
        """Inferences that wait for attribution, oldest first, with the run of their adapter. Those
        that broke off paid nothing and wait for nobody."""
        return self._all(
            "SELECT i.*, a.run FROM projections.inferences AS i"
            " JOIN projections.adapters AS a USING (adapter)"
            " WHERE i.attribution_index IS NULL AND i.finish_reason <> 'interrupted'"
            ' ORDER BY i."index" LIMIT %s',
            _page(limit),
        )

    def adapter_usage(self, adapter: str) -> Found | None:
        return self._one("SELECT * FROM projections.adapter_usage WHERE adapter = %s", adapter)

    def consumer_usage(self, consumer: str) -> Found | None:
        return self._one("SELECT * FROM projections.consumer_usage WHERE consumer = %s", consumer)

    def anchors(self, *, limit: int = 100) -> list[Found]:
        """Largest first."""
        return self._all(
            "SELECT * FROM projections.anchors ORDER BY size DESC LIMIT %s", _page(limit)
        )

    def anchor_covering(self, index: int) -> Found | None:
        """The smallest anchored checkpoint that holds the entry at `index`."""
        return self._one(
            "SELECT * FROM projections.anchors WHERE size > %s ORDER BY size LIMIT 1", index
        )

    # -- lineage -------------------------------------------------------------------------------

    def event(self, index: int) -> Found | None:
        """Type, signer, stream, id and time of the event at a leaf index."""
        return self._one('SELECT * FROM projections.edges WHERE "index" = %s', index)

    def events(self, *, before: int | None = None, limit: int = 100) -> list[Found]:
        """Newest first; `before` is the index of the last one seen."""
        return self._all(
            'SELECT * FROM projections.edges WHERE %s::bigint IS NULL OR "index" < %s'
            ' ORDER BY "index" DESC LIMIT %s',
            before,
            before,
            _page(limit),
        )

    def history(self, index: int, *, limit: int = MAX_PAGE) -> list[Found]:
        """Every event of the same stream as the event at `index`, in order."""
        return self._all(
            "SELECT e.* FROM projections.edges AS e"
            ' JOIN projections.edges AS one ON one.stream = e.stream AND one."index" = %s'
            ' ORDER BY e."index" LIMIT %s',
            index,
            _page(limit),
        )

    def index_of(self, kind: str, id: str) -> int | None:
        """Leaf index of the event that created a thing: ("adapter", id), ("run", id), ..."""
        row = self._one(
            'SELECT "index" FROM projections.things WHERE kind = %s AND id = %s', kind, id
        )
        return None if row is None else int(row["index"])

    def lineage_of(self, index: int) -> list[int]:
        """Leaf indexes of everything that the event at `index` rests on, itself last.

        Raises TooLarge beyond MAX_LINEAGE: part of a lineage proves nothing.
        """
        found = [row["index"] for row in self._all(_ANCESTORS, index, MAX_LINEAGE + 1)]
        if len(found) > MAX_LINEAGE:
            raise TooLarge(f"the lineage of {index} is longer than MAX_LINEAGE = {MAX_LINEAGE}")
        return found

    def descendants_of(self, index: int, *, limit: int = MAX_PAGE) -> list[int]:
        """Leaf indexes of what rests on the event at `index`, itself first; the first `limit`."""
        return [row["index"] for row in self._all(_DESCENDANTS, index, _page(limit))]

    def lineage_edges(self, indexes: Sequence[int]) -> list[Found]:
        """Edges (child, parent, field) whose child is among `indexes`, for a drawing."""
        return self._all(
            "SELECT child, parent, field FROM projections.lineage"
            " WHERE child = ANY(%s) ORDER BY child, n",
            list(indexes),
        )

    # -- blobs ---------------------------------------------------------------------------------

    def is_public_blob(self, sha256: str) -> bool:
        """Whether an event names these bytes as something that every auditor may read."""
        return self._one(_PUBLIC_BLOB, *[sha256] * 8) is not None

    def blob_readers(self, sha256: str) -> list[str]:
        """Who may read private bytes: rows are for their contributor and the datanet's owner and
        reviewers, and so is what a hold rests on; a transcript is for the consumer who paid."""
        readers: set[str] = set()
        for row in self._all(_ROWS_READERS, sha256, sha256):
            readers |= {row["contributor"], row["owner"], *row["reviewers"]}
        readers |= {row["consumer"] for row in self._all(_TRANSCRIPT_READERS, sha256)}
        return sorted(readers)

    def holds_words(self, sha256: str) -> bool:
        """Whether these are the rows of a contribution or the transcript of an answer."""
        return self._one(_WORDS, sha256, sha256) is not None

    # -- how it is done ------------------------------------------------------------------------

    def _all(self, query: LiteralString, *values: object, **named: object) -> list[Found]:
        try:
            with self._pool.connection() as connection:
                cursor = connection.cursor(row_factory=dict_row)
                return [_plain(row) for row in cursor.execute(query, named or values)]
        except (psycopg.Error, PoolTimeout, PoolClosed) as error:
            raise StorageError(
                f"the projected rows cannot be read: {str(error).strip()}; "
                "check DATABASE_URL and run `tributary doctor`"
            ) from error

    def _one(self, query: LiteralString, *values: object) -> Found | None:
        rows = self._all(query, *values)
        return rows[0] if rows else None


# UNION (not ALL) visits an event once, however many paths lead to it.
_ANCESTORS: LiteralString = """
    WITH RECURSIVE reached("index") AS (
        SELECT %s::bigint
        UNION
        SELECT l.parent FROM projections.lineage AS l JOIN reached AS r ON l.child = r."index"
    )
    SELECT "index" FROM reached ORDER BY "index" LIMIT %s
"""
_DESCENDANTS: LiteralString = """
    WITH RECURSIVE reached("index") AS (
        SELECT %s::bigint
        UNION
        SELECT l.child FROM projections.lineage AS l JOIN reached AS r ON l.parent = r."index"
    )
    SELECT "index" FROM reached ORDER BY "index" LIMIT %s
"""


_PUBLIC_BLOB: LiteralString = """
    SELECT 1 FROM projections.runs
     WHERE manifest_sha256 = %s OR adapter_sha256 = %s OR adapter_config_sha256 = %s
        OR index_sha256 = %s
    UNION ALL SELECT 1 FROM projections.attributions WHERE evidence_sha256 = %s
    UNION ALL SELECT 1 FROM projections.periods WHERE tree_sha256 = %s
    UNION ALL SELECT 1 FROM projections.anchors WHERE l1_sha256 = %s
    UNION ALL SELECT 1 FROM projections.adapters WHERE adapter_sha256 = %s
    LIMIT 1
"""
_ROWS_READERS: LiteralString = """
    SELECT c.contributor, d.owner, d.reviewers FROM projections.contributions AS c
      JOIN projections.datanets AS d USING (datanet) WHERE c.rows_sha256 = %s
    UNION ALL
    SELECT h.contributor, d.owner, d.reviewers FROM projections.holds AS h
      JOIN projections.datanets AS d USING (datanet) WHERE h.evidence_sha256 = %s
"""
_WORDS: LiteralString = """
    SELECT 1 FROM projections.contributions WHERE rows_sha256 = %s
    UNION ALL SELECT 1 FROM projections.inferences WHERE transcript_sha256 = %s
    LIMIT 1
"""
_TRANSCRIPT_READERS: LiteralString = """
    SELECT consumer FROM projections.inferences WHERE transcript_sha256 = %s
"""


def _page(limit: int) -> int:
    return max(0, min(limit, MAX_PAGE))


def _plain(row: Found) -> Found:
    for name, value in row.items():
        if isinstance(value, Decimal):
            row[name] = int(value)
        elif name in _JSON_COLUMNS and isinstance(value, str):
            row[name] = json.loads(value)
    return row
