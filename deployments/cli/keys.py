"""`moonshard keys`: make, show and end API keys.

A secret goes to stdout alone, everything else to stderr: `KEY=$(moonshard keys create ...)`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time

from cluster.exceptions import MoonshardError
from deployments.cli.ledger_access import add_ledger_options, opened_ledger
from deployments.cli.quantities import (
    add_limit_options,
    duration_s,
    expiry,
    limits_from,
    listed,
    show_limits,
)
from deployments.cli.tables import show_table
from monitoring.ledger import KeyInfo, Limits

__all__ = ["add_keys_parser"]

_ROLES = ("user", "admin")


def add_keys_parser(parser: argparse.ArgumentParser) -> None:
    """Subcommands of `moonshard keys`."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    bootstrap = actions.add_parser("bootstrap", help="make the first administrator's key")
    bootstrap.set_defaults(run=_bootstrap)
    create = actions.add_parser("create", help="make a key")
    create.add_argument("--team", required=True, help="the team that pays")
    create.add_argument("--name", required=True, help="what the key is for")
    create.add_argument("--models", metavar="A,B", help="models that it may use (default: all)")
    create.add_argument("--expires", metavar="WHEN", help="such as 30d, or 2030-01-31")
    create.add_argument("--role", choices=_ROLES, default="user")
    add_limit_options(create, with_weight=False)
    create.set_defaults(run=_create)
    change = actions.add_parser("set", help="change the limits of a key")
    change.add_argument("key_id", metavar="KEY_ID")
    add_limit_options(change, with_weight=False)
    change.set_defaults(run=_set)
    shown = actions.add_parser("list", help="show all keys, without their secrets")
    shown.set_defaults(run=_list)
    revoke = actions.add_parser("revoke", help="end a key, within 5 s and for good")
    revoke.add_argument("key_id", metavar="KEY_ID")
    revoke.set_defaults(run=_revoke)
    rotate = actions.add_parser("rotate", help="give a key a new secret")
    rotate.add_argument("key_id", metavar="KEY_ID")
    rotate.add_argument(
        "--grace", metavar="TIME", default="0s", help="how long the old secret works on (24h)"
    )
    rotate.set_defaults(run=_rotate)
    for action in (bootstrap, create, change, shown, revoke, rotate):
        action.add_argument("--json", action="store_true", help="for programs")
        add_ledger_options(action)


def _bootstrap(arguments: argparse.Namespace) -> int:
    with opened_ledger(arguments) as ledger:
        secret = ledger.keys.bootstrap()
        principal = ledger.keys.find(secret)
    key_id = principal.key_id if principal else ""
    _tell(f"made the administrator's key {key_id}; its secret is shown only now")
    _give({"key_id": key_id, "secret": secret}, secret, as_json=arguments.json)
    return 0


def _create(arguments: argparse.Namespace) -> int:
    limits = limits_from(arguments, Limits())
    with opened_ledger(arguments) as ledger:
        key_id, secret = ledger.keys.create(
            arguments.team,
            arguments.name,
            models=listed(arguments.models),
            expires_at=expiry(arguments.expires, time.time()),
            is_admin=arguments.role == "admin",
            limits=limits,
        )
    _tell(f"made the key {key_id}; its secret is shown only now")
    _give({"key_id": key_id, "secret": secret}, secret, as_json=arguments.json)
    return 0


def _set(arguments: argparse.Namespace) -> int:
    with opened_ledger(arguments) as ledger:
        infos = {info.key_id: info for info in ledger.keys.list()}
        if arguments.key_id not in infos:
            raise MoonshardError(f"there is no key {arguments.key_id!r}; see `moonshard keys list`")
        limits = limits_from(arguments, infos[arguments.key_id].limits)
        ledger.keys.set_limits(arguments.key_id, limits)
    if arguments.json:
        print(json.dumps({"key_id": arguments.key_id, "limits": dataclasses.asdict(limits)}))
    _tell(f"limits of {arguments.key_id}: {show_limits(limits) or 'none'}")
    return 0


def _list(arguments: argparse.Namespace) -> int:
    with opened_ledger(arguments) as ledger:
        infos = ledger.keys.list()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
        return 0
    head = ("KEY", "TEAM", "NAME", "ROLE", "STATE", "MODELS", "LIMITS")
    now_s = time.time()
    rows = [
        (
            info.key_id,
            info.team,
            info.name,
            _ROLES[info.is_admin],
            _state(info, now_s),
            ",".join(info.models) or "all",
            show_limits(info.limits) or "none",
        )
        for info in infos
    ]
    print(show_table(head, rows))
    return 0


def _revoke(arguments: argparse.Namespace) -> int:
    with opened_ledger(arguments) as ledger:
        ledger.keys.revoke(arguments.key_id)
    if arguments.json:
        print(json.dumps({"key_id": arguments.key_id, "revoked": True}))
    _tell(f"revoked {arguments.key_id}; it works nowhere any more within 5 s")
    return 0


def _rotate(arguments: argparse.Namespace) -> int:
    grace_s = duration_s("--grace", arguments.grace)
    with opened_ledger(arguments) as ledger:
        secret = ledger.keys.rotate(arguments.key_id, grace_s)
    _tell(f"gave {arguments.key_id} a new secret, which is shown only now")
    _give({"key_id": arguments.key_id, "secret": secret}, secret, as_json=arguments.json)
    return 0


def _state(info: KeyInfo, now_s: float) -> str:
    if info.revoked_at_s is not None:
        return "revoked"
    if info.expires_at_s is None:
        return "works"
    date = datetime.datetime.fromtimestamp(info.expires_at_s, datetime.UTC).date()
    return f"works until {date}" if info.expires_at_s > now_s else "expired"


def _give(answer: dict[str, str], secret: str, *, as_json: bool) -> None:
    print(json.dumps(answer) if as_json else secret)


def _tell(text: str) -> None:
    print(f"moonshard: {text}", file=sys.stderr)
