"""API keys: made, found, changed. The secrets themselves are stored nowhere."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from monitoring.ledger.budgets import BudgetRows
from monitoring.ledger.database import Database
from monitoring.ledger.entries import checked_limits, checked_name, checked_time
from monitoring.ledger.exceptions import BootstrapError, InvalidEntryError, UnknownEntryError
from monitoring.ledger.limits import Limits
from monitoring.ledger.schema import api_keys, limit_values, limits_of
from monitoring.usage import Principal

__all__ = ["BOOTSTRAP_TEAM", "SECRET_PREFIX", "KeyInfo", "KeyStore", "hash_secret"]

SECRET_PREFIX = "sk-ms-"

BOOTSTRAP_TEAM = "admin"
"""Team, and name, of the first administrator's key."""

_SECRET_BYTES = 32
_MIN_GIVEN_SECRET = len(SECRET_PREFIX) + 32
_ID_ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
_ID_LENGTH = 12
_MAX_MODELS = 100
_LOOKUP_AT_ONCE = 1000

_COLUMNS = api_keys.c


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What may be known of a key. Times are Unix seconds.

    Attributes:
        key_id: public id.
        team: that pays.
        name: for people.
        is_admin: may see and change everything.
        models: that it may use; empty allows all.
        limits: of the key itself, beside its team's.
        created_at_s, expires_at_s, revoked_at_s: None for what was not set or has not happened.
    """

    key_id: str
    team: str
    name: str
    is_admin: bool
    models: tuple[str, ...]
    limits: Limits
    created_at_s: float
    expires_at_s: float | None
    revoked_at_s: float | None


def hash_secret(secret: str) -> bytes:
    """What is stored of a secret: its SHA-256, 32 bytes.

    A slow hash guards passwords because they can be guessed; a secret of 256 random bits cannot,
    and has to be looked up by its hash on every request.
    """
    return hashlib.sha256(secret.encode(errors="replace")).digest()


class KeyStore:
    """The API keys.

    Args:
        clock: Unix time in seconds.
        changed: called after a change of limits.

    All methods raise `LedgerUnavailable` when the database does not answer.
    """

    def __init__(
        self,
        database: Database,
        budgets: BudgetRows,
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._database = database
        self._budgets = budgets
        self._clock = clock
        self._changed = changed

    def create(
        self,
        team: str,
        name: str,
        *,
        models: Sequence[str] = (),
        expires_at: float | None = None,
        is_admin: bool = False,
        limits: Limits | None = None,
    ) -> tuple[str, str]:
        """Make a key.

        Args:
            team: that pays; need not exist.
            name: for people; need not be unique.
            models: that it may use; all if empty.
            expires_at: Unix time in seconds.
            is_admin: may see and change everything.
            limits: of the key itself.

        Returns:
            Its id and its secret. This is the only time that the secret can be seen.

        Raises:
            InvalidEntryError: something cannot be stored.
        """
        row, secret = self._new_row(team, name, models, expires_at, is_admin, limits or Limits())
        self._prepare(row["key_id"], limits or Limits())
        self._database.write(lambda connection: connection.execute(sa.insert(api_keys), row))
        return row["key_id"], secret

    def bootstrap(self) -> str:
        """Make the first administrator's key.

        Returns:
            Its secret.

        Raises:
            BootstrapError: an administrator's key that works exists.
        """
        row, secret = self._new_row(BOOTSTRAP_TEAM, BOOTSTRAP_TEAM, (), None, True, Limits())
        works = self._works()
        admins = sa.select(_COLUMNS.key_id).where(_COLUMNS.is_admin, *works).limit(1)

        def insert(connection: Connection) -> None:
            self._database.lock_totals(connection, exclusive=True)  # one bootstrap at a time
            found = connection.execute(admins).scalar()
            if found is not None:
                raise BootstrapError(
                    f"there is an administrator's key already ({found}); "
                    "whoever has it can make more"
                )
            connection.execute(sa.insert(api_keys), row)

        self._database.write(insert)
        return secret

    def ensure_admin(self, secret: str) -> bool:
        """Make an administrator's key of a given secret, unless that was done before: one that was
        revoked or rotated since stays so. Any number of processes may do it at once.

        Args:
            secret: `sk-ms-` and at least 32 more characters, as random as ours.

        Returns:
            Whether it was made.

        Raises:
            InvalidEntryError: the secret is too short, or has another prefix.
        """
        if not secret.startswith(SECRET_PREFIX) or len(secret) < _MIN_GIVEN_SECRET:
            raise InvalidEntryError(
                f"the administrator's key must be {SECRET_PREFIX!r} and at least "
                f"{_MIN_GIVEN_SECRET - len(SECRET_PREFIX)} random characters"
            )
        row, _ = self._new_row(BOOTSTRAP_TEAM, BOOTSTRAP_TEAM, (), None, True, Limits())
        row["secret_hash"] = hash_secret(secret)
        # The same for the same secret, whatever becomes of the row.
        row["key_id"] = _key_id(int.from_bytes(hash_secret(f"id of {secret}")))
        known = sa.select(_COLUMNS.key_id).where(_COLUMNS.key_id == row["key_id"])

        def insert(connection: Connection) -> bool:
            self._database.lock_totals(connection, exclusive=True)  # one at a time
            if connection.execute(known).first() is not None:
                return False
            connection.execute(sa.insert(api_keys), row)
            return True

        return self._database.write(insert)

    def list(self) -> list[KeyInfo]:
        """All keys that were ever made, by team, name and age."""
        query = sa.select(api_keys).order_by(
            _COLUMNS.team, _COLUMNS.name, _COLUMNS.created_at_s, _COLUMNS.key_id
        )
        rows = self._database.read(lambda connection: connection.execute(query).all())
        return [_key_info(row) for row in rows]

    def revoke(self, key_id: str) -> None:
        """Let a key work no more, for good. Revoking it again changes nothing.

        Raises:
            UnknownEntryError: there is no such key.
        """
        first = sa.func.coalesce(_COLUMNS.revoked_at_s, self._clock())
        self._update(key_id, {"revoked_at_s": first, "previous_hash": None})

    def rotate(self, key_id: str, grace_s: float = 0) -> str:
        """Give a key a new secret; id, limits and usage stay.

        Args:
            key_id: of the key.
            grace_s: seconds for which the present secret still works. One from a rotation before
                stops at once.

        Returns:
            The new secret.

        Raises:
            UnknownEntryError: there is no such key, or it was revoked.
            InvalidEntryError: `grace_s` is negative or no number.
        """
        if not 0 <= grace_s < float("inf"):
            raise InvalidEntryError(f"grace_s: must be 0 or more seconds, got {grace_s!r}")
        secret = _new_secret()
        values = {
            "previous_hash": _COLUMNS.secret_hash if grace_s else None,
            "previous_until_s": self._clock() + grace_s if grace_s else None,
            "secret_hash": hash_secret(secret),
        }
        self._update(key_id, values, _COLUMNS.revoked_at_s.is_(None))
        return secret

    def set_limits(self, key_id: str, limits: Limits) -> None:
        """Set all limits of a key; see `TeamStore.set`.

        Raises:
            UnknownEntryError: there is no such key.
            InvalidEntryError: a limit cannot be stored.
        """
        values = limit_values(checked_limits(limits))
        query = sa.select(_COLUMNS.key_id).where(_COLUMNS.key_id == key_id)
        if self._database.read(lambda connection: connection.execute(query).first()) is not None:
            # First, so that no request under the new budget has to wait for the sum.
            self._prepare(key_id, limits)
        self._update(key_id, values)
        self._changed()

    def find(self, secret: str) -> Principal | None:
        """Whose secret this is; None if nobody's, or of a key that works no more."""
        digest = hash_secret(secret)
        return self.lookup([digest]).get(digest)

    def lookup(self, hashes: Sequence[bytes]) -> dict[bytes, Principal]:
        """Who is behind each hash; what is missing in the answer does not work (any more).

        One query for up to 1000: a cache refreshes all that it holds with it.
        """
        found: dict[bytes, Principal] = {}
        for start in range(0, len(hashes), _LOOKUP_AT_ONCE):
            found |= self._lookup(set(hashes[start : start + _LOOKUP_AT_ONCE]))
        return found

    def _lookup(self, wanted: set[bytes]) -> dict[bytes, Principal]:
        now_s = self._clock()
        previous_works = sa.and_(
            _COLUMNS.previous_hash.in_(wanted), _COLUMNS.previous_until_s > now_s
        )
        query = sa.select(api_keys).where(
            sa.or_(_COLUMNS.secret_hash.in_(wanted), previous_works), *self._works()
        )
        found: dict[bytes, Principal] = {}
        for row in self._database.read(lambda connection: connection.execute(query).all()):
            principal = _principal(row)
            if row.secret_hash in wanted:
                found[row.secret_hash] = principal
            if row.previous_hash in wanted and row.previous_until_s > now_s:
                found[row.previous_hash] = principal
        return found

    def _works(self) -> tuple[sa.ColumnElement[bool], ...]:
        return (
            _COLUMNS.revoked_at_s.is_(None),
            sa.or_(_COLUMNS.expires_at_s.is_(None), _COLUMNS.expires_at_s > self._clock()),
        )

    def _new_row(
        self,
        team: str,
        name: str,
        models: Sequence[str],
        expires_at: float | None,
        is_admin: bool,
        limits: Limits,
    ) -> tuple[dict[str, Any], str]:
        now_s = self._clock()
        if len(models) > _MAX_MODELS:
            raise InvalidEntryError(f"models: at most {_MAX_MODELS}, got {len(models)}")
        if expires_at is not None:
            expires_at = checked_time("expires_at", expires_at, now_s)
        secret = _new_secret()
        row = {
            "key_id": _key_id(secrets.randbits(256)),
            "team": checked_name("team", team),
            "name": checked_name("name", name),
            "secret_hash": hash_secret(secret),
            "is_admin": is_admin,
            "models": json.dumps([checked_name("model", model) for model in models]),
            "created_at_s": now_s,
            "expires_at_s": expires_at,
            **limit_values(checked_limits(limits)),
        }
        return row, secret

    def _update(
        self, key_id: str, values: dict[str, Any], *conditions: sa.ColumnElement[bool]
    ) -> None:
        statement = sa.update(api_keys).where(_COLUMNS.key_id == key_id, *conditions)
        statement = statement.values(values)
        if self._database.write(lambda connection: connection.execute(statement).rowcount) == 0:
            raise UnknownEntryError(f"there is no key {key_id!r} that works")

    def _prepare(self, key_id: str, limits: Limits) -> None:
        if limits.budget_nano_usd is not None:
            self._budgets.ensure("key", key_id, limits, self._clock())


def _new_secret() -> str:
    return SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def _key_id(number: int) -> str:
    """Of a random number of 256 bits."""
    letters = []
    for _ in range(_ID_LENGTH):
        number, place = divmod(number, len(_ID_ALPHABET))
        letters.append(_ID_ALPHABET[place])
    return "key_" + "".join(letters)


def _principal(row: sa.Row[Any]) -> Principal:
    return Principal(
        key_id=row.key_id,
        team=row.team,
        name=row.name,
        is_admin=row.is_admin,
        models=tuple(json.loads(row.models)),
    )


def _key_info(row: sa.Row[Any]) -> KeyInfo:
    return KeyInfo(
        key_id=row.key_id,
        team=row.team,
        name=row.name,
        is_admin=row.is_admin,
        models=tuple(json.loads(row.models)),
        limits=limits_of(row),
        created_at_s=row.created_at_s,
        expires_at_s=row.expires_at_s,
        revoked_at_s=row.revoked_at_s,
    )
