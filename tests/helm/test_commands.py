"""Commands that pods run and people are told to run are ones that there are."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import pytest
from ray.scripts.scripts import cli as ray_cli

from deployments.cli.main import _parser
from tests.helm.consistency import quantity
from tests.helm.documents import find, of_kind, pods, walk
from tests.helm.helm_cli import CHART, REPO_ROOT, render4
from tests.helm.matrix import CASES, EVERYTHING, FILE_CASES, Case, rendered
from tests.helm.serve_config import RESOURCE_OF_GROUP

DOCUMENTATION = REPO_ROOT / "docs" / "kubernetes.md"
# Ends a command in a shell's line.
_END = re.compile(r"[;|&)>`]|$")


def moonshard_commands(text: str) -> list[list[str]]:
    """Arguments of every `moonshard ...` that a text tells to run."""
    joined = text.replace("\\\n", " ")
    found = []
    for line in joined.splitlines():
        for match in re.finditer(
            r"(?:^|-- |until |\s)moonshard (?=(?:keys|teams|usage|status) )", line
        ):
            rest = line[match.end() :]
            end = _END.search(rest)
            assert end is not None
            found.append(shlex.split(rest[: end.start()], comments=True))
    return found


def complaint(arguments: Sequence[str]) -> str:
    """What the command line says about them; empty if it takes them."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            _parser().parse_args(list(arguments))
        except SystemExit:
            return said.getvalue()
    return ""


def scripts_of_pods() -> Iterator[str]:
    for pod in pods(rendered(EVERYTHING).documents):
        for _, value in walk(dict(pod.spec)):
            if isinstance(value, str):
                yield value


def test_moonshards_commands_in_pods_exist() -> None:
    for script in scripts_of_pods():
        for arguments in moonshard_commands(script):
            assert complaint(arguments) == "", arguments


@pytest.mark.parametrize("case", FILE_CASES, ids=str)
def test_moonshards_commands_in_the_notes_exist(case: Case) -> None:
    for arguments in moonshard_commands(rendered(case).notes):
        assert complaint(arguments) == "", arguments


def test_moonshards_commands_in_the_documentation_exist() -> None:
    commands = moonshard_commands(DOCUMENTATION.read_text())
    assert len(commands) >= 2
    for arguments in commands:
        assert complaint(arguments) == "", arguments


def test_a_command_that_is_none_would_be_seen() -> None:
    [arguments] = moonshard_commands("until moonshard keys boostrap --json; do")
    assert arguments == ["keys", "boostrap", "--json"]
    assert "invalid choice" in complaint(arguments)


def started(parameters: Mapping[str, str], *, is_head: bool) -> dict[str, Any]:
    """What `ray start` makes of `rayStartParams`, through a shell as the operator writes it.

    Raises:
        click.UsageError: there is no such option, or it does not take the value.
    """
    line = " ".join(
        f"--{name}" if value == "true" else f"--{name}={value}"
        for name, value in sorted(parameters.items())
    )
    words = shlex.split(line) + (["--head"] if is_head else ["--address=head:6379"])
    context = ray_cli.commands["start"].make_context("start", words)
    found: dict[str, Any] = context.params
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ray_start_takes_its_parameters(case: Case) -> None:
    cluster = find(rendered(case).documents, "RayService")["spec"]["rayClusterConfig"]
    head = started(cluster["headGroupSpec"]["rayStartParams"], is_head=True)
    assert head["num_cpus"] == 0
    for group in cluster["workerGroupSpecs"]:
        node = started(group["rayStartParams"], is_head=False)
        assert RESOURCE_OF_GROUP[group["groupName"]] in json.loads(node["resources"])
        # Policies name the ports, so none may be picked at random.
        for port in ("node_manager_port", "object_manager_port", "metrics_export_port"):
            assert int(node[port]) > 0
        assert 0 < int(node["min_worker_port"]) < int(node["max_worker_port"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_object_store_fits_into_its_shared_memory(case: Case) -> None:
    """Ray falls back to /tmp, a disk, where /dev/shm is too small."""
    cluster = find(rendered(case).documents, "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        volumes = {one["name"]: one for one in group["template"]["spec"]["volumes"]}
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        [name] = [mount["name"] for mount in mounts if mount["mountPath"] == "/dev/shm"]
        shared = volumes[name]["emptyDir"]
        assert shared["medium"] == "Memory"
        store = int(group["rayStartParams"]["object-store-memory"])
        assert quantity(shared["sizeLimit"]) > store


def test_a_parameter_that_ray_does_not_know_would_be_seen() -> None:
    with pytest.raises(click.UsageError):
        started({"num-cpu": "1"}, is_head=False)


def ray_calls(source: str) -> Iterator[list[str]]:
    """Constant words of lists that begin with "ray", in a Python script."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.List):
            words = [one.value for one in node.elts if isinstance(one, ast.Constant)]
            if words[:1] == ["ray"]:
                yield [str(word) for word in words[1:]]


def test_rays_commands_exist() -> None:
    documents = rendered(EVERYTHING).documents
    sources = [
        text
        for config in of_kind(documents, "ConfigMap")
        for name, text in config.get("data", {}).items()
        if name.endswith(".py")
    ]
    assert len(sources) >= 2
    calls = [call for source in sources for call in ray_calls(source)]
    calls += [
        hook["exec"]["command"][1:]
        for pod in pods(documents)
        for path, hook in walk(dict(pod.spec))
        if path.endswith("preStop") and hook["exec"]["command"][0] == "ray"
    ]
    assert calls
    for call in calls:
        command = ray_cli.commands[call[0]]
        options = {option for one in command.params for option in one.opts}
        assert {word for word in call[1:] if word.startswith("--")} <= options, call


def test_options_of_the_drain_exist() -> None:
    source = (CHART / "files" / "drain.py").read_text()
    known = {o for one in ray_cli.commands["drain-node"].params for o in one.opts}
    used = set(re.findall(r'"(--[a-z-]+)"', source)) - {"--seconds"}
    assert used
    assert used <= known


def test_scripts_take_the_arguments_that_pods_give_them() -> None:
    """`preStop` of router pods: the script's own options, and a file that is mounted there."""
    documents = rendered(EVERYTHING).documents
    commands = [
        (pod, value)
        for pod in pods(documents)
        for path, value in walk(dict(pod.spec))
        if path.endswith("command") and isinstance(value, list) and value[:1] == ["python"]
    ]
    assert len(commands) >= 2
    for pod, (_, path, *options) in commands:
        folder, _, name = path.rpartition("/")
        volumes = {
            mount["name"]
            for container in pod.spec["containers"]
            for mount in container.get("volumeMounts") or []
            if mount["mountPath"] == folder
        }
        maps = {
            volume["configMap"]["name"]
            for volume in pod.spec["volumes"]
            if volume["name"] in volumes and "configMap" in volume
        }
        scripts = [
            config["data"][name]
            for config in of_kind(documents, "ConfigMap")
            if config["metadata"]["name"] in maps and name in config["data"]
        ]
        assert len(scripts) == 1, f"{pod.role}: {path}"
        for option in options[::2]:
            assert f'"{option}"' in scripts[0]


NOTES_CASES = [case for case in CASES if case.name != "values"]


@pytest.mark.parametrize("case", NOTES_CASES, ids=str)
def test_notes_name_objects_that_are_there(case: Case) -> None:
    """Secrets and Services in `kubectl get secret NAME`, `service/NAME`."""
    result = rendered(case)
    made = {
        kind: {document["metadata"]["name"] for document in of_kind(result.documents, kind)}
        for kind in ("Secret", "Service")
    }
    service = find(result.documents, "RayService")["metadata"]["name"]
    made["Service"] |= {f"{service}-head-svc", f"{service}-serve-svc"}
    for name in re.findall(r"get secret ([\w.-]+)", result.notes):
        assert name in made["Secret"] | case.given, name
    for name in re.findall(r"service/([\w.-]+)", result.notes):
        assert name in made["Service"], name
    assert "<no value>" not in result.notes
    assert "%!" not in result.notes
    for secret in of_kind(result.documents, "Secret"):
        for value in secret["data"].values():
            assert value not in result.notes


def test_notes_tell_the_way_to_the_api_the_dashboards_and_the_key() -> None:
    notes = render4({}).notes
    assert "port-forward" in notes
    assert "MOONSHARD_API_KEY" in notes
    assert "8265" in notes
    assert "dashboards" in notes
