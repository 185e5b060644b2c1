"""The one configuration tree of Moonshard.

A config file is a Ray Serve config file (`serve deploy` accepts it as it is) whose application
has `import_path: deployments.app:build` and, under `args`, the tree of `MoonshardConfig`. The
same keys are the Helm chart's values. Unknown keys are refused with their path and the nearest
valid name. Every default is meant for the shipped nano model on one small machine; the comments
on a field say what a large deployment sets instead.
"""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from cluster.config_section import MIB, REPO_ROOT, Section
from cluster.exceptions import ConfigError
from cluster.gateway_config import (
    CostsConfig,
    GatewayConfig,
    HttpConfig,
    LedgerConfig,
    MetricsConfig,
)

__all__ = [
    "REPO_ROOT",
    "AutoscalingConfig",
    "CostsConfig",
    "DispatchConfig",
    "EngineConfig",
    "GatewayConfig",
    "HttpConfig",
    "LedgerConfig",
    "MetricsConfig",
    "ModelConfig",
    "MoonshardConfig",
    "RayConfig",
    "RouterConfig",
    "ShardsConfig",
    "parse_config",
]

# vLLM kills an engine whose step takes longer (VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS): a step that
# waits for experts must give up before that, or the outage would cost the engine as well.
ENGINE_STEP_TIMEOUT_S = 300.0


class ModelConfig(Section):
    """Which model is served, under which name, and how its output is parsed."""

    id: str = Field(default="kimi-nano", min_length=1, pattern=r"^[\w.\-/]+$")
    """Name under which clients ask for the model (`model` in requests, `/v1/models`)."""

    path: str = "models/kimi-nano"
    """Checkpoint folder (Hugging Face layout), present on every node; absolute, or relative to
    the folder that holds Moonshard's packages. Nothing is downloaded."""

    max_model_len: int | None = Field(default=None, ge=16)
    """Longest prompt plus answer, in tokens; the model's own limit when unset."""

    tool_call_parser: str | None = "kimi_k2"
    """vLLM's parser for tool calls (`--tool-call-parser`); null switches tool calls off."""

    reasoning_parser: str | None = "kimi_k2"
    """vLLM's parser for thoughts (`--reasoning-parser`); null leaves them in the content."""

    @property
    def checkpoint(self) -> Path:
        """`path` made absolute (relative paths start at `REPO_ROOT`)."""
        path = Path(self.path).expanduser()
        return path if path.is_absolute() else REPO_ROOT / path


class EngineConfig(Section):
    """The vLLM engine that runs the dense part of the model in each router replica."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the dense model runs; auto takes the GPU where the replica is given one."""

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    """Type of activations and dense weights (`--dtype`)."""

    kv_cache_memory_bytes: int | None = Field(default=512 * MIB, ge=MIB)
    """Memory for the KV cache; null leaves it to vLLM (on CPU: nearly all the RAM there is)."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Most sequences in one step (`--max-num-seqs`)."""

    max_num_batched_tokens: int | None = Field(default=2048, ge=16)
    """Most tokens in one step (`--max-num-batched-tokens`); null leaves it to vLLM."""

    enable_prefix_caching: bool = True
    """Reuse the KV blocks of equal prompt prefixes."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share the dense model. Only 1 is supported with remote experts so far."""

    num_threads: int = Field(default=1, ge=1)
    """OpenMP threads of a CPU engine."""

    extra_args: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments by their Python name, passed on as they are."""

    @field_validator("tensor_parallel_size")
    @classmethod
    def _only_one_rank(cls, value: int) -> int:
        # vLLM's MoE runner all-reduces what every rank returns: full sums would come out N-fold.
        if value != 1:
            raise ValueError(
                "tensor parallelism is not supported with remote experts; set it to 1 "
                "and scale with router.autoscaling.max_replicas"
            )
        return value


class ShardsConfig(Section):
    """The expert shards: Ray actors that hold the routed experts."""

    count: int = Field(default=2, ge=1)
    """How many shards the experts are spread over (at most one per expert)."""

    num_cpus: float = Field(default=0.25, ge=0)
    """Logical CPUs that Ray reserves for a shard; on real nodes, its cores."""

    num_gpus: float = Field(default=0, ge=0)
    """Logical GPUs that Ray reserves for a shard."""

    memory_bytes: int | None = Field(default=None, ge=MIB)
    """Memory that Ray reserves for a shard; when unset, what its experts take plus a margin."""

    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of a shard, e.g. to pin shards to a group of nodes."""

    placement_strategy: Literal["SPREAD", "STRICT_SPREAD", "PACK"] = "SPREAD"
    """How shards lie on nodes: SPREAD prefers different nodes, STRICT_SPREAD insists, PACK fills
    one node before the next."""

    num_threads: int = Field(default=1, ge=1)
    """Compute threads of a shard; on real nodes, the cores of its NUMA domain."""

    kernel: Literal["auto", "vllm", "torch"] = "auto"
    """Expert kernel: vLLM's CPU op where the CPU has AMX or AVX-512, else plain torch."""

    bind_host: str = "auto"
    """Address of the data plane: auto binds the node's Ray address (loopback on a local start)."""

    @field_validator("bind_host")
    @classmethod
    def _one_address(cls, value: str) -> str:
        if value in ("", "0.0.0.0", "::", "*"):
            raise ValueError("dispatchers connect to it, so it must be one address; set it to auto")
        return value

    start_timeout_s: float = Field(default=600, gt=0)
    """Longest time in which a shard must have loaded its experts, also after a restart."""

    max_restarts: int = Field(default=-1, ge=-1)
    """How often Ray restarts a shard that died; -1 is always."""

    drain_timeout_s: float = Field(default=30, gt=0)
    """How long a shard that is stopped may still answer what it has accepted."""


class DispatchConfig(Section):
    """How rows travel between a router replica and the shards."""

    transport: Literal["tcp"] = "tcp"
    """Way of the rows. TCP is the only one so far."""

    request_timeout_s: float = Field(default=30, gt=0)
    """Longest time for one exchange with a shard, before the rows are sent elsewhere."""

    connect_timeout_s: float = Field(default=2, gt=0)
    """Longest time to connect to a shard."""

    recovery_timeout_s: float = Field(default=60, gt=0)
    """How long a step waits for experts that nobody serves, before the running requests end with
    503 `experts_unavailable`. Must stay below vLLM's own limit for a step (300 s)."""

    @model_validator(mode="after")
    def _below_engine_timeout(self) -> DispatchConfig:
        longest_s = self.recovery_timeout_s + self.request_timeout_s + self.connect_timeout_s
        if longest_s >= ENGINE_STEP_TIMEOUT_S:
            raise ValueError(
                f"recovery_timeout_s ({self.recovery_timeout_s:g}) plus request_timeout_s "
                f"({self.request_timeout_s:g}) and connect_timeout_s ({self.connect_timeout_s:g}) "
                f"must stay below {ENGINE_STEP_TIMEOUT_S:g}, where vLLM "
                "(VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS) gives its engine up"
            )
        return self


class AutoscalingConfig(Section):
    """Ray Serve's autoscaling of router replicas, on ongoing requests."""

    min_replicas: int = Field(default=1, ge=1)
    """Replicas that always run."""

    max_replicas: int = Field(default=2, ge=1)
    """Most replicas."""

    target_ongoing_requests: float = Field(default=16, gt=0)
    """Requests per replica that Serve aims at."""

    upscale_delay_s: float = Field(default=5, ge=0)
    """How long the load must last before a replica is added."""

    downscale_delay_s: float = Field(default=60, ge=0)
    """How long the lull must last before a replica is removed."""

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) is below min_replicas ({self.min_replicas})"
            )
        return self


class RouterConfig(Section):
    """The router deployment: replicas that each run one vLLM engine."""

    autoscaling: AutoscalingConfig = Field(default_factory=AutoscalingConfig)
    """When replicas come and go."""

    num_cpus: float = Field(default=0.5, ge=0)
    """Logical CPUs that Ray reserves for a replica."""

    num_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for a replica."""

    resources: dict[str, float] = Field(default_factory=dict)
    """Custom Ray resources of a replica, e.g. to keep replicas to a group of nodes."""

    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests that a replica takes at once; more wait at the ingress."""

    request_timeout_s: float = Field(default=600, gt=0)
    """Longest time for one request, its stream included."""

    graceful_shutdown_timeout_s: float = Field(default=630, gt=0)
    """How long a replica that is removed may finish its streams; longer than request_timeout_s."""

    start_timeout_s: float = Field(default=900, gt=0)
    """Longest time for an engine to load, compile and warm up."""

    @model_validator(mode="after")
    def _streams_end_before_shutdown(self) -> RouterConfig:
        if self.graceful_shutdown_timeout_s < self.request_timeout_s:
            raise ValueError(
                f"graceful_shutdown_timeout_s ({self.graceful_shutdown_timeout_s:g}) is below "
                f"request_timeout_s ({self.request_timeout_s:g}): a removed replica would cut "
                "streams off"
            )
        return self


class RayConfig(Section):
    """The Ray node that `moonshard serve` starts when it is not given a cluster."""

    num_cpus: float | None = Field(default=None, gt=0)
    """Logical CPUs of the node; the machine's cores when unset."""

    object_store_memory_bytes: int = Field(default=128 * MIB, ge=75 * MIB)
    """Object store of the node. Kept small: rows do not pass through it, weights need the RAM."""


class MoonshardConfig(Section):
    """The whole tree: what stands under `args` in the config file."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    shards: ShardsConfig = Field(default_factory=ShardsConfig)
    dispatch: DispatchConfig = Field(default_factory=DispatchConfig)
    router: RouterConfig = Field(default_factory=RouterConfig)
    http: HttpConfig = Field(default_factory=HttpConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    ledger: LedgerConfig = Field(default_factory=LedgerConfig)
    costs: CostsConfig = Field(default_factory=CostsConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    @model_validator(mode="after")
    def _one_writer_of_a_file(self) -> MoonshardConfig:
        if self.ledger.is_sqlite and self.http.num_replicas > 1:
            raise ValueError(
                f"http.num_replicas ({self.http.num_replicas}): ingress replicas on several nodes "
                "cannot share a SQLite ledger; set ledger.url to a PostgreSQL database, or "
                "http.num_replicas to 1"
            )
        return self


def parse_config(tree: Any, *, where: str = "args") -> MoonshardConfig:
    """Validate a parsed YAML tree.

    Args:
        tree: what stood under `args`; None (nothing there) means all defaults.
        where: prefix of the key paths in messages.

    Raises:
        ConfigError: one line for the first thing that is wrong (and how many more there are).
    """
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{where}: expected a mapping of settings, got {type(tree).__name__}")
    try:
        return MoonshardConfig.model_validate(tree or {})
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False)
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(_describe(problems[0], where) + more) from None


def _describe(problem: ErrorDetails, where: str) -> str:
    location = problem["loc"]
    path = ".".join([where, *map(str, location)])
    if problem["type"] == "extra_forbidden":
        valid = _valid_names(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid are: {', '.join(valid)}"
        return f"{path}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message[0].lower()}{message[1:]} (got {problem['input']!r})"


def _valid_names(section: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = MoonshardConfig
    for name in section:
        model = _section_type(model.model_fields[str(name)].annotation)
    return list(model.model_fields)


def _section_type(annotation: Any) -> type[BaseModel]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation
