"""Every check that a rendered release has to pass, by name.

Each takes a case and returns what is wrong; `test_checks.py` shows that each can fail.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.helm.consistency import (
    name_problems,
    pod_problems,
    reference_problems,
    selector_problems,
)
from tests.helm.custom_resources import all_custom_problems
from tests.helm.kuberay import operator_problems
from tests.helm.kubernetes_kinds import built_in_problems
from tests.helm.matrix import Case, Documents
from tests.helm.security import (
    download_problems,
    grace_problems,
    literal_secret_problems,
    privilege_problems,
    resource_problems,
    restart_problems,
    token_problems,
)
from tests.helm.serve_config import (
    moonshard_config,
    room_problems,
    serve_problems,
    variable_problems,
)

__all__ = ["CHECKS", "NEEDS_CRDS"]

CHECKS: dict[str, Callable[[Case, Documents], list[str]]] = {
    "Kubernetes' own kinds": lambda _, documents: built_in_problems(documents),
    "custom resources": lambda _, documents: all_custom_problems(documents),
    "KubeRay's operator": lambda _, documents: operator_problems(documents),
    "names and labels": lambda _, documents: name_problems(documents),
    "parts of pods": lambda _, documents: pod_problems(documents),
    "references": lambda case, documents: reference_problems(documents, case.given),
    "selectors": lambda _, documents: selector_problems(documents),
    "Ray Serve's and Moonshard's settings": lambda _, documents: serve_problems(documents),
    "variables of the settings": lambda _, documents: variable_problems(documents),
    "room on the nodes": lambda _, documents: room_problems(documents),
    "privileges": lambda _, documents: privilege_problems(documents),
    "amounts of resources": lambda _, documents: resource_problems(documents),
    "service account tokens": lambda _, documents: token_problems(documents),
    "secrets in plain text": lambda _, documents: literal_secret_problems(documents),
    "restarts on a change of settings": lambda _, documents: restart_problems(documents),
    "grace periods": lambda _, documents: grace_problems(
        documents, moonshard_config(documents).router.request_timeout_s
    ),
    "downloads at start": lambda _, documents: download_problems(documents),
}

NEEDS_CRDS = {"custom resources"}
