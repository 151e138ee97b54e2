"""What `Queries` answers about policies, holds, appeals and withdrawals: SQL over rows."""

from collections.abc import Sequence
from typing import Any, LiteralString

from ledger.domain.datanets import DatanetPolicy
from projections.run_inputs import KeptInputs, RunInputs

Found = dict[str, Any]
MAX_FOUND = 1_000


class ConsentQueries:
    """The part of `projections.queries.Queries` with these; it brings `_all` and `_one`."""

    _kept: KeptInputs

    def policy(self, datanet: str) -> DatanetPolicy:
        """The policy in force: the newest one that was set, or the defaults."""
        row = self._one("SELECT * FROM projections.datanet_policies WHERE datanet = %s", datanet)
        return DatanetPolicy.of(row) if row else DatanetPolicy()

    def hold(self, contribution: str) -> Found | None:
        """The newest hold, in force or not."""
        return self._one("SELECT * FROM projections.holds WHERE contribution = %s", contribution)

    def appeals(
        self,
        *,
        datanet: str | None = None,
        contribution: str | None = None,
        status: str | None = None,
        after: int = -1,
        limit: int = MAX_FOUND,
    ) -> list[Found]:
        """By the index of the (newest) appeal; `after` is that of the last one seen."""
        return self._all(
            "SELECT * FROM projections.appeals WHERE appealed_index > %(after)s"
            " AND (%(datanet)s::text IS NULL OR datanet = %(datanet)s)"
            " AND (%(contribution)s::text IS NULL OR contribution = %(contribution)s)"
            " AND (%(status)s::text IS NULL OR status = %(status)s)"
            " ORDER BY appealed_index LIMIT %(limit)s",
            after=after,
            datanet=datanet,
            contribution=contribution,
            status=status,
            limit=max(0, min(limit, MAX_FOUND)),
        )

    def inputs_of(self, run: str) -> RunInputs:
        """What a run may train on, whatever became of it later: `run_inputs` without the rows. Read
        once for each run and kept; empty for a run that is not projected yet."""
        found = self._kept.get(run)
        if found is None:
            found = RunInputs.of(self._all(_INPUTS, run))
            self._kept.keep(run, found)
        return found

    def run_terms(self, run: str) -> Found:
        """What the ledger says now about the inputs of a run, and at which size of the log.

        Which contributions those are is fixed, and kept; what was withdrawn, held or split is read
        each time, of the whole datanets, which are few rows beside a run's. It is one statement, so
        that rows and position are of one moment.
        """
        inputs = self.inputs_of(run)
        found = self._one(_TERMS, *[list(inputs.datanets)] * 3)
        assert found is not None, "position has one row"
        return {
            "log_size": found["log_size"],
            "withdrawn": [one for one in found["withdrawn"] if one in inputs.contributions],
            "held": [one for one in found["held"] if one in inputs.contributions],
            "splits": [[one, n] for one, n in found["splits"] if one in inputs.contributions],
        }

    def adapters_of(
        self, contribution: str, *, after: int = -1, limit: int = MAX_FOUND
    ) -> list[Found]:
        """Adapters of the runs whose inputs named the contribution, with the run's manifest: which
        rows were used, only that says. By leaf index."""
        return self._all(
            _ADAPTERS_OF + ' WHERE c.contribution = %s AND a."index" > %s'
            ' ORDER BY a."index" LIMIT %s',
            contribution,
            after,
            max(0, min(limit, MAX_FOUND)),
        )

    def recalls(self, *, after: tuple[int, str] = (-1, ""), limit: int = MAX_FOUND) -> list[Found]:
        """Published adapters of runs whose inputs named what was withdrawn since, where the datanet
        retires them; as `adapters_of`, by (leaf index of the adapter, contribution)."""
        return self._all(
            _ADAPTERS_OF + " JOIN projections.datanet_policies AS p ON p.datanet = c.datanet"
            " WHERE p.on_withdrawal = 'retire' AND c.status = 'withdrawn'"
            " AND a.status = 'published' AND (a.\"index\", c.contribution) > (%s, %s)"
            ' ORDER BY a."index", c.contribution LIMIT %s',
            *after,
            max(0, min(limit, MAX_FOUND)),
        )

    def given_since(
        self, datanet: str, contributor: str, since_us: int, among: Sequence[str]
    ) -> tuple[int, int, set[str]]:
        """Contributions and rows that one contributor gave a datanet after a time of the log, and
        which of the contributions in `among` are counted in it."""
        row = self._one(
            "SELECT count(*) AS count, coalesce(sum(rows_count), 0)::bigint AS rows,"
            " coalesce(json_agg(contribution) FILTER (WHERE contribution = ANY(%s)), '[]') AS known"
            " FROM projections.contributions WHERE datanet = %s AND contributor = %s AND at > %s",
            list(among),
            datanet,
            contributor,
            since_us,
        )
        assert row is not None, "an aggregate has one row"
        return int(row["count"]), int(row["rows"]), set(row["known"])

    def oldest_given(self, datanet: str, contributor: str, since_us: int) -> list[Found]:
        """The oldest MAX_FOUND of them: at, rows_count."""
        return self._all(
            "SELECT at, rows_count FROM projections.contributions"
            " WHERE datanet = %s AND contributor = %s AND at > %s ORDER BY at LIMIT %s",
            datanet,
            contributor,
            since_us,
            MAX_FOUND,
        )

    def _all(self, query: LiteralString, *values: object, **named: object) -> list[Found]:
        raise NotImplementedError

    def _one(self, query: LiteralString, *values: object) -> Found | None:
        raise NotImplementedError


# run -> the approvals that it rests on -> their contributions.
_INPUTS: LiteralString = """
    SELECT c.contribution, c.contributor, c.datanet
      FROM projections.things AS t
      JOIN projections.lineage AS l ON l.child = t."index" AND l.field = 'inputs'
      JOIN projections.lineage AS s ON s.child = l.parent AND s.field = 'contribution'
      JOIN projections.contributions AS c ON c."index" = s.parent
     WHERE t.kind = 'run' AND t.id = %s
"""
_TERMS: LiteralString = """
    SELECT events AS log_size,
           (SELECT coalesce(json_agg(contribution ORDER BY contribution), '[]')
              FROM projections.contributions
             WHERE status = 'withdrawn' AND datanet = ANY(%s)) AS withdrawn,
           (SELECT coalesce(json_agg(contribution ORDER BY contribution), '[]')
              FROM projections.holds WHERE active AND datanet = ANY(%s)) AS held,
           (SELECT coalesce(json_agg(json_build_array(contribution, "row")
                                     ORDER BY contribution, "row"), '[]')
              FROM projections.appeals WHERE status = 'split' AND datanet = ANY(%s)) AS splits
      FROM projections.position
"""
# contribution -> its approval -> the requests that rest on it -> run -> adapter.
_ADAPTERS_OF: LiteralString = """
    SELECT a.adapter, a.model, a.owner, a.run, a.status, a."index", a.retired_index, a.reason,
           c.contribution, c.datanet, c.note, c.decided_index, r.manifest_sha256
      FROM projections.contributions AS c
      JOIN projections.lineage AS s ON s.parent = c."index" AND s.field = 'contribution'
      JOIN projections.lineage AS l ON l.parent = s.child AND l.field = 'inputs'
      JOIN projections.runs AS r ON r.requested_index = l.child
      JOIN projections.adapters AS a ON a.run = r.run
"""
