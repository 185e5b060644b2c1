"""The price table: patterns, dates, versions, and what is refused."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from monitoring.prices import Price, PriceError, PriceTable

REPO_ROOT = Path(__file__).resolve().parents[3]
SHIPPED = REPO_ROOT / "configs" / "prices.yaml"
LIST_PRICES = REPO_ROOT.parent / "shared" / "kimi" / "README.md"

ENTRY = {"model": "m", "from": "2026-01-01", "input": 1, "cached_input": 0.1, "output": 2}


def _s(date: str) -> float:
    return datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC).timestamp()


def _table(*entries: dict[str, Any]) -> PriceTable:
    return PriceTable.parse({"prices": [{**ENTRY, **entry} for entry in entries]}, "test")


def _input(table: PriceTable, model: str, at_s: float) -> int | None:
    price = table.price(model, at_s)
    return None if price is None else price.input_nano_usd


@pytest.mark.parametrize(
    ("model", "cached", "prompt", "output"),
    [
        ("moonshotai/Kimi-K2-Instruct", 0.15, 0.60, 2.50),
        ("kimi-k2-0711-preview", 0.15, 0.60, 2.50),
        ("kimi-k2", 0.15, 0.60, 2.50),
        ("kimi-k2-0905-preview", 0.15, 0.60, 2.50),
        ("moonshotai/Kimi-K2-Instruct-0905", 0.15, 0.60, 2.50),
        ("moonshotai/Kimi-K2-Thinking", 0.15, 0.60, 2.50),
        ("moonshotai/Kimi-K2.5", 0.10, 0.60, 3.00),
        ("kimi-k2.6", 0.16, 0.95, 4.00),
        ("Kimi-K3-Instruct", 0.30, 3.00, 15.00),
        ("kimi-nano", 0.15, 0.60, 2.50),
    ],
)
def test_the_shipped_table_has_moonshots_list_prices(
    model: str, cached: float, prompt: float, output: float
) -> None:
    price = PriceTable.load(SHIPPED).price(model, _s("2026-11-24"))
    assert price is not None
    assert price.cached_input_nano_usd == round(cached * 1000)
    assert price.input_nano_usd == round(prompt * 1000)
    assert price.output_nano_usd == round(output * 1000)


@pytest.mark.parametrize("model", ["kimi-k2.7", "gpt-oss", "llama", ""])
def test_the_shipped_table_prices_nobody_else(model: str) -> None:
    assert PriceTable.load(SHIPPED).price(model, _s("2026-11-24")) is None


def test_names_match_without_regard_to_case() -> None:
    table = _table({"model": "*Kimi-K2.5*"})
    assert _input(table, "org/KIMI-k2.5-INT4", _s("2026-02-01")) == 1000
    assert table.price("kimi-k2x5", _s("2026-02-01")) is None


def test_the_first_pattern_counts() -> None:
    table = _table({"model": "a*", "input": 1}, {"model": "*", "input": 2})
    assert _input(table, "ab", _s("2026-02-01")) == 1000
    assert _input(table, "b", _s("2026-02-01")) == 2000


def test_the_newest_price_in_force_counts_from_midnight_utc_on() -> None:
    table = _table(
        {"from": "2026-01-01", "input": 1},
        {"from": "2026-07-01", "input": 3},
        {"from": "2026-03-01", "input": 2},
    )
    assert table.price("m", _s("2026-01-01") - 0.001) is None
    assert _input(table, "m", _s("2026-01-01")) == 1000
    assert _input(table, "m", _s("2026-03-01") - 0.001) == 1000
    assert _input(table, "m", _s("2026-03-01")) == 2000
    assert _input(table, "m", _s("2027-01-01")) == 3000


def test_a_price_that_is_not_yet_in_force_hides_nothing() -> None:
    table = _table({"model": "m", "from": "2026-06-01", "input": 9}, {"model": "*", "input": 2})
    assert _input(table, "m", _s("2026-05-31")) == 2000
    assert _input(table, "m", _s("2026-06-01")) == 9000


def test_the_version_names_the_date_and_changes_with_the_entry() -> None:
    def version(**changes: Any) -> str:
        price = _table(changes).price("m", _s("2027-01-01"))
        assert price is not None
        return price.version

    versions = [
        version(),
        version(input=1.001),
        version(cached_input=0.2),
        version(output=3),
        version(model="[m]"),
        version(**{"from": "2026-01-02"}),
    ]
    assert len(set(versions)) == len(versions)
    assert version() == version(input=1.0)
    assert all(re.fullmatch(r"2026-01-0[12]/[0-9a-f]{8}", it) for it in versions)


@pytest.mark.parametrize("amount", [0.6, 0.1, 0.007, 2.675, 1.005, 15, 0, 999_999.999])
def test_decimals_are_meant_as_they_are_written(amount: float) -> None:
    table = _table({"input": amount, "cached_input": 0})
    assert _input(table, "m", _s("2026-02-01")) == round(amount * 1000)


@given(
    prompt=st.integers(0, 10**6),
    share=st.floats(0, 1),
    completion=st.integers(0, 10**6),
)
def test_a_cost_is_the_sum_of_its_tokens(prompt: int, share: float, completion: int) -> None:
    price = Price("v", 600, 150, 2500)
    cached = int(prompt * share)
    cost = PriceTable.cost_nano_usd(price, prompt, cached, completion)
    assert cost == 600 * (prompt - cached) + 150 * cached + 2500 * completion
    assert cost <= PriceTable.cost_nano_usd(price, prompt, 0, completion)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outptu": 1}, r"prices[0]: unknown key 'outptu'; did you mean 'output'?"),
        ({"zzz": 1}, "unknown key 'zzz'; valid are: model, from, input, cached_input, output"),
        ({"input": 0.6001}, "prices[0] (m): input: at most 3 decimals, got 0.6001"),
        ({"input": "0.6"}, "prices[0] (m): input: expected USD per 1M tokens, got '0.6'"),
        ({"input": True}, "input: expected USD per 1M tokens"),
        ({"output": None}, "output: expected USD per 1M tokens, got None"),
        ({"output": -1}, "output: must lie in 0..1000000"),
        ({"output": float("nan")}, "output: must lie in 0..1000000"),
        ({"output": float("inf")}, "output: must lie in 0..1000000"),
        ({"cached_input": 1.5}, "prices[0] (m): cached_input: must not be above input (1)"),
        ({"from": "soon"}, "prices[0] (m): from: expected a date such as 2026-01-27"),
        ({"from": 2026}, "from: expected a date"),
        ({"from": datetime.datetime(2026, 1, 1)}, "from: expected a date"),
        ({"model": ""}, "prices[0]: model: expected a pattern"),
        ({"model": 5}, "prices[0]: model: expected a pattern"),
    ],
)
def test_a_wrong_entry_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PriceError, match=re.escape(message)) as caught:
        _table(changes)
    assert str(caught.value).startswith("test: ")
    assert "\n" not in str(caught.value)


def test_a_missing_key_and_a_second_price_of_one_day_are_refused() -> None:
    for key in ENTRY:
        rest = {name: value for name, value in ENTRY.items() if name != key}
        with pytest.raises(PriceError, match=rf"prices\[0\]: '{key}' is missing"):
            PriceTable.parse({"prices": [rest]}, "test")
    with pytest.raises(PriceError, match=r"prices\[1\]: a second price of 'm' from 2026-01-01"):
        _table({}, {"model": "M"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected `prices:`"),
        ("- a", "expected `prices:`"),
        ("price: []", "unknown key 'price'; did you mean 'prices'?"),
        ("{}", "'prices' is missing"),
        ("prices: 3", "prices: expected a list, got 3"),
        ("prices: [3]", "prices[0]: expected model, from"),
        ("prices: [", "not a YAML file"),
        ("prices: \x00", "not a YAML file"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    with pytest.raises(PriceError, match=re.escape(message)) as caught:
        PriceTable.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PriceError, match=r"none.yaml: cannot read the price table: No such file"):
        PriceTable.load(tmp_path / "none.yaml")


def test_an_empty_table_prices_nothing(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("prices: []")
    assert PriceTable.load(path).price("kimi-nano", 0) is None


def test_list_prices_agree_with_the_notes_they_come_from() -> None:
    if not LIST_PRICES.exists():
        pytest.skip(f"needs {LIST_PRICES.name} of the shared notes")
    notes = LIST_PRICES.read_text()
    shipped = yaml.safe_load(SHIPPED.read_text())["prices"]
    told = re.search(r"K2\.5 ([\d.]+) / ([\d.]+) / ([\d.]+)", notes)
    assert told is not None
    (entry,) = (it for it in shipped if "k2.5" in it["model"])
    amounts = [entry["cached_input"], entry["input"], entry["output"]]
    assert amounts == [float(amount) for amount in told.groups()]
