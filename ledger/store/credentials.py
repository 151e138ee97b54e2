"""API credentials, login nonces and who uploaded which blob, in PostgreSQL."""

import hashlib
import secrets
from collections.abc import Set

from ledger.errors import Unauthenticated
from ledger.store.postgres import Pool, lend

TOKEN_PREFIX = "trib_"  # noqa: S105  a name to recognise leaked tokens by, not a secret
TOKEN_BYTES = 32
MAX_TOKEN_CHARS = 128
NONCE_KEPT_US = 900 * 1_000_000


class PostgresCredentials:
    """Tokens are random, shown once, and looked up by SHA-256, so no comparison leaks time."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def issue(self, actor: str, label: str, nonce: str, now: int) -> str:
        """A new token for a verified login; each nonce serves once."""
        token = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        with lend(self._pool) as connection, connection.transaction():
            connection.execute(
                "DELETE FROM login_nonces WHERE used_at < %s", (now - NONCE_KEPT_US,)
            )
            fresh = connection.execute(
                "INSERT INTO login_nonces VALUES (%s, %s) ON CONFLICT DO NOTHING",
                (bytes.fromhex(nonce), now),
            )
            if fresh.rowcount == 0:
                raise Unauthenticated("this login request was used already; sign a new one")
            connection.execute(
                "INSERT INTO credentials VALUES (%s, %s, %s, %s, NULL)",
                (_digest(token), actor, label, now),
            )
        return token

    def actor_of(self, token: str) -> str | None:
        if len(token) > MAX_TOKEN_CHARS:
            return None
        with lend(self._pool) as connection:
            row = connection.execute(
                "SELECT actor FROM credentials WHERE token_sha256 = %s AND revoked_at IS NULL",
                (_digest(token),),
            ).fetchone()
        return str(row[0]) if row else None

    def revoke(self, token: str, now: int) -> None:
        with lend(self._pool) as connection:
            connection.execute(
                "UPDATE credentials SET revoked_at = %s WHERE token_sha256 = %s"
                " AND revoked_at IS NULL",
                (now, _digest(token)),
            )

    def record_upload(self, sha256: str, actor: str, size_bytes: int, now: int) -> None:
        with lend(self._pool) as connection:
            connection.execute(
                "INSERT INTO blob_uploads VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (sha256, actor, size_bytes, now),
            )

    def uploaded(self, sha256: str, actor: str) -> bool:
        return bool(self.uploads_among({(sha256, actor)}))

    def uploads_among(self, claims: Set[tuple[str, str]]) -> set[tuple[str, str]]:
        ordered = list(claims)
        with lend(self._pool) as connection:
            rows = connection.execute(
                "SELECT sha256, actor FROM blob_uploads"
                " JOIN unnest(%s::text[], %s::text[]) AS claims (sha256, actor)"
                " USING (sha256, actor)",
                ([sha256 for sha256, _ in ordered], [actor for _, actor in ordered]),
                prepare=True,
            ).fetchall()
        return {(str(sha256), str(actor)) for sha256, actor in rows}


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
