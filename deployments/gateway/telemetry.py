"""What the gateway counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from monitoring.declaration import MAX_TEAMS
from monitoring.ledger import BudgetState, Settled
from monitoring.metrics import Metrics
from monitoring.prices import NANO_USD_PER_USD

__all__ = ["Telemetry"]

_MAX_OBSERVATIONS = 64
_BY_TEAM = ("requests", "tokens", "cost_usd")
_BY_MODEL = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
)


class Telemetry:
    """Turns events into `Metrics("gateway")`.

    Args:
        model: that is served.
    """

    def __init__(self, model: str) -> None:
        self.metrics = Metrics("gateway")
        self._model = model
        self._budgets: set[tuple[str, str]] = set()
        self._teams: set[str] = set()
        for name in _BY_MODEL:
            self.metrics.begin(name, model=model)
        # For every token: looking the series up costs as much as the count itself.
        self._inter_token_latency = self.metrics.inter_token_latency_seconds.labels(model=model)

    def arrived(self, team: str) -> None:
        """A request of a team has come: from here on all that may become of it has series."""
        label = self.metrics.team_label(team)
        if label not in self._teams:
            self._teams.add(label)
            for name in _BY_TEAM:
                self.metrics.begin(name, model=self._model, team=label)

    def teams(self, names: Collection[str]) -> None:
        """These teams are known: a scrape should see their series before their first request."""
        if len(names) > MAX_TEAMS:
            return  # then the labels are for those that ask
        for name in names:
            self.arrived(name)

    def rejected(self, reason: str) -> None:
        """A request was refused."""
        self.metrics.rejections.labels(reason=reason).inc()

    def queued(self, model: str, wait_s: float) -> None:
        """A request has found a place after that long."""
        self.metrics.request_queue_time_seconds.labels(model=model).observe(wait_s)

    def places(self, num_queued: int, num_running: int) -> None:
        """So many requests wait and run now."""
        self.metrics.gateway_queued_requests.set(num_queued)
        self.metrics.gateway_running_requests.set(num_running)

    def first_token(self, model: str, since_arrival_s: float) -> None:
        """A stream has begun."""
        self.metrics.time_to_first_token_seconds.labels(model=model).observe(since_arrival_s)

    def next_tokens(self, num_tokens: int, gap_s: float) -> None:
        """That many more tokens came, each so long after the one before."""
        for _ in range(min(num_tokens, _MAX_OBSERVATIONS)):
            self._inter_token_latency.observe(gap_s)

    def ended(self, model: str, team: str, outcome: str, duration_s: float) -> None:
        """A request is over."""
        team = self.metrics.team_label(team)
        self.metrics.requests.labels(model=model, team=team, outcome=outcome).inc()
        if outcome == "ok":
            self.metrics.e2e_request_latency_seconds.labels(model=model).observe(duration_s)

    def settled(self, new: Iterable[Settled], num_duplicates: int, duration_s: float) -> None:
        """Usage records were written, which took that long."""
        num_new = 0
        for item in new:
            num_new += 1
            record, team = item.record, self.metrics.team_label(item.record.team)
            for kind, count in (
                ("prompt", record.prompt_tokens),
                ("cached", record.cached_tokens),
                ("completion", record.completion_tokens),
                ("reasoning", record.reasoning_tokens),
            ):
                self.metrics.tokens.labels(kind=kind, model=record.model, team=team).inc(count)
            for basis, cost in (
                ("list", item.cost_nano_usd),
                ("experts", item.expert_cost_nano_usd),
            ):
                usd = cost / NANO_USD_PER_USD
                self.metrics.cost_usd.labels(basis=basis, model=record.model, team=team).inc(usd)
        self.metrics.ledger_records.labels(result="inserted").inc(num_new)
        self.metrics.ledger_records.labels(result="duplicate").inc(num_duplicates)
        self.metrics.ledger_append_seconds.observe(duration_s)

    def ledger_failed(self) -> None:
        """The database failed a call."""
        self.metrics.ledger_errors.inc()

    def budgets(self, states: Iterable[BudgetState]) -> None:
        """The budgets as they stand; those that are gone lose their series."""
        present: set[tuple[str, str]] = set()
        for state in states:
            labels = {"scope": state.scope, "name": state.name}
            present.add((state.scope, state.name))
            left = state.limit_nano_usd - state.spent_nano_usd - state.reserved_nano_usd
            limit_usd = state.limit_nano_usd / NANO_USD_PER_USD
            self.metrics.budget_limit_usd.labels(**labels).set(limit_usd)
            self.metrics.budget_remaining_usd.labels(**labels).set(left / NANO_USD_PER_USD)
        for gone in self._budgets - present:
            self.metrics.budget_limit_usd.remove(*gone)
            self.metrics.budget_remaining_usd.remove(*gone)
        self._budgets = present
