"""`moonshard keys`, `teams`, `usage`, against a real SQLite ledger."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.exceptions import ConfigError
from deployments.cli import main
from deployments.cli.ledger_access import LEDGER_URL
from deployments.cli.quantities import duration_s, expiry
from deployments.cli.serve import serve_command
from monitoring.ledger import Ledger, Limits
from monitoring.prices import PriceTable
from monitoring.usage import UsageRecord

APPLICATION = "applications:\n- name: m\n  import_path: deployments.app:build\n"


@pytest.fixture(autouse=True)
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    monkeypatch.setenv(LEDGER_URL, url)
    return url


@pytest.fixture
def ledger(url: str) -> Any:
    ledger = Ledger.open(url, PriceTable())
    yield ledger
    ledger.close()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    written = capsys.readouterr()
    return status, written.out, written.err


def test_the_secret_is_all_of_stdout(capsys: pytest.CaptureFixture[str], ledger: Ledger) -> None:
    status, out, err = run(capsys, "keys", "bootstrap")
    assert status == 0
    secret = out.removesuffix("\n")
    assert secret.split() == [secret]
    principal = ledger.keys.find(secret)
    assert principal is not None
    assert principal.is_admin
    assert principal.key_id in err
    assert secret not in err


def test_there_is_one_bootstrap(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "keys", "bootstrap")
    status, out, err = run(capsys, "keys", "bootstrap")
    assert (status, out) == (2, "")
    assert "administrator's key already" in err
    assert err.count("\n") == 1


def test_a_key_is_made_with_all_that_was_said(
    capsys: pytest.CaptureFixture[str], ledger: Ledger
) -> None:
    arguments = (
        "keys create --team research --name notebook --models a,b --expires 30d --role admin "
        "--budget-usd 2.5 --period week --soft --requests-per-minute 60 --tokens-per-minute 1000 "
        "--max-parallel 4 --json"
    )
    status, out, _ = run(capsys, *arguments.split())
    assert status == 0
    made = json.loads(out)
    (info,) = ledger.keys.list()
    assert info.key_id == made["key_id"]
    assert (info.team, info.name, info.is_admin) == ("research", "notebook", True)
    assert info.models == ("a", "b")
    assert info.limits == Limits(2_500_000_000, "week", False, 60, 1000, 4)
    assert info.expires_at_s == pytest.approx(time.time() + 30 * 86_400, abs=60)
    assert ledger.keys.find(made["secret"]) is not None


def test_keys_are_listed_without_secrets(
    capsys: pytest.CaptureFixture[str], ledger: Ledger
) -> None:
    key_id, secret = ledger.keys.create("research", "notebook", limits=Limits(10**10))
    ended, _ = ledger.keys.create("research", "old")
    ledger.keys.revoke(ended)
    _, out, _ = run(capsys, "keys", "list")
    assert key_id in out
    assert "10.00 USD/month" in out
    assert "revoked" in out
    _, as_json, _ = run(capsys, "keys", "list", "--json")
    assert {info["key_id"] for info in json.loads(as_json)} == {key_id, ended}
    assert secret not in out + as_json


def test_a_key_is_revoked_and_rotated(capsys: pytest.CaptureFixture[str], ledger: Ledger) -> None:
    key_id, before = ledger.keys.create("research", "notebook")
    _, out, _ = run(capsys, "keys", "rotate", key_id, "--grace", "1h")
    assert ledger.keys.find(out.strip()) is not None
    assert ledger.keys.find(before) is not None
    _, out, _ = run(capsys, "keys", "rotate", key_id)
    assert ledger.keys.find(before) is None
    assert run(capsys, "keys", "revoke", key_id)[0] == 0
    assert ledger.keys.find(out.strip()) is None


def test_limits_of_a_key_change_one_by_one(
    capsys: pytest.CaptureFixture[str], ledger: Ledger
) -> None:
    key_id, _ = ledger.keys.create("research", "n", limits=Limits(10**9, max_parallel=3))
    run(capsys, "keys", "set", key_id, "--budget-usd", "none", "--requests-per-minute", "5")
    (info,) = ledger.keys.list()
    assert info.limits == Limits(requests_per_minute=5, max_parallel=3)
    assert run(capsys, "keys", "set", "key_none", "--max-parallel", "1")[0] == 2


def test_what_a_command_does_not_name_stays(
    capsys: pytest.CaptureFixture[str], ledger: Ledger
) -> None:
    run(capsys, "teams", "set", "research", "--budget-usd", "500", "--soft", "--weight", "3")
    run(capsys, "teams", "set", "research", "--max-parallel", "32", "--hard")
    assert ledger.teams.get("research") == Limits(
        budget_nano_usd=500 * 10**9, max_parallel=32, weight=3.0
    )
    _, out, _ = run(capsys, "teams", "list")
    assert "500.00 USD/month, 32 parallel, weight 3" in out
    _, out, _ = run(capsys, "teams", "list", "--json")
    assert json.loads(out)[0]["limits"]["weight"] == 3


def test_usage_as_a_table_json_and_csv(capsys: pytest.CaptureFixture[str], ledger: Ledger) -> None:
    ledger.settle(
        [
            UsageRecord(
                request_id="1" * 32,
                key_id="key_1",
                team="=HYPERLINK()",
                model="m",
                endpoint="chat",
                started_s=1_769_817_600,
                finished_s=1_769_817_601,
                outcome="ok",
                prompt_tokens=7,
            )
        ]
    )
    _, out, _ = run(capsys, "usage", "--start", "2026-01-31", "--end", "2026-02-01")
    assert out.splitlines()[0].split()[:4] == ["DAY", "TEAM", "MODEL", "REQUESTS"]
    assert out.splitlines()[1].split()[:5] == ["2026-01-31", "=HYPERLINK()", "m", "1", "7"]
    _, out, _ = run(capsys, "usage", "--json", "--group-by", "key")
    assert json.loads(out)["data"][0]["key_id"] == "key_1"
    _, out, _ = run(capsys, "usage", "--csv", "--group-by", "team")
    assert out.splitlines()[1].startswith("'=HYPERLINK(),1,7,")
    _, out, _ = run(capsys, "usage", "--json", "--team", "nobody")
    assert json.loads(out)["data"] == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("keys create --team t --name n --budget-usd x", "--budget-usd: must be an amount"),
        ("keys create --team t --name n --budget-usd -1", "--budget-usd"),
        ("keys create --team t --name n --budget-usd nan", "--budget-usd"),
        ("keys create --team t --name n --budget-usd 0.0000000001", "at most 9 decimals"),
        ("keys create --team t --name n --budget-usd 1e30", "budget_nano_usd"),
        ("keys create --team t --name n --max-parallel 0", "max_parallel"),
        ("keys create --team t --name n --max-parallel 1.5", "a whole number"),
        ("keys create --team t --name n --expires soon", "--expires"),
        ("keys create --team t --name n --expires 2001-01-01", "expires_at"),
        ("keys revoke key_none", "no key"),
        ("keys rotate key_none", "no key"),
        ("keys rotate key_none --grace 5", "--grace"),
        ("teams set t --weight 0", "weight"),
        ("teams set t --weight heavy", "--weight"),
        ("usage --group-by user", "group_by"),
        ("usage --start yesterday", "a time must be"),
        ("usage --ledger-url mysql://x", "sqlite"),
        ("usage --config /none.yaml", "No such file"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, expected: str
) -> None:
    status, out, err = run(capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("moonshard: ")
    assert expected in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["'; DROP TABLE teams; --", 'a"b', "Ж 🚀"])
def test_names_are_only_names(
    capsys: pytest.CaptureFixture[str], ledger: Ledger, name: str
) -> None:
    assert run(capsys, "keys", "create", "--team", name, "--name", name)[0] == 0
    assert run(capsys, "teams", "set", name, "--max-parallel", "3")[0] == 0
    assert [info.team for info in ledger.keys.list()] == [name]
    assert [team.name for team in ledger.teams.list()] == [name]


def test_without_a_ledger_the_command_says_how_to_name_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LEDGER_URL)
    status, _, err = run(capsys, "keys", "list")
    assert status == 2
    assert "--config" in err


def test_the_config_file_names_the_ledger_before_the_environment_does(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    state = tmp_path / "state"
    path.write_text(APPLICATION + f"  args: {{ledger: {{state_dir: {state}}}}}\n")
    run(capsys, "keys", "bootstrap", "--config", str(path))
    assert (state / "ledger.db").exists()
    _, out, _ = run(capsys, "keys", "list", "--json")
    assert json.loads(out) == []


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15m", 900), ("12H", 43_200), ("30d", 2_592_000)]
)
def test_durations(text: str, seconds: int) -> None:
    assert duration_s("--grace", text) == seconds
    assert expiry(text, 1000.0) == 1000 + seconds


def test_serving_the_network_without_keys_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("http_options: {host: 0.0.0.0, port: 1}\n" + APPLICATION)
    with pytest.raises(ConfigError, match=r"args\.gateway\.require_keys: must be true.*0\.0\.0\.0"):
        serve_command(path, None)


def test_a_wrong_price_table_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    args = f"  args: {{ledger: {{prices: {tmp_path / 'none.yaml'}}}}}\n"
    path.write_text("http_options: {port: 28111}\n" + APPLICATION + args)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        serve_command(path, None)
