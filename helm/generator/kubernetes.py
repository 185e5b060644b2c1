"""JSON schemas of the Kubernetes types that values hand on, closed to unknown keys.

Kubernetes ignores what it does not know, so a misspelt key in a toleration would be lost silently;
here it is refused. Names are Kubernetes's own where there is one.
"""

from __future__ import annotations

from typing import Any

__all__ = ["DEFINITIONS", "Schema", "closed", "list_of", "map_of", "reference"]

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
BOOLEAN: Schema = {"type": "boolean"}


def reference(name: str) -> Schema:
    """The definition with a name."""
    return {"$ref": f"#/definitions/{name}"}


def closed(properties: dict[str, Schema], *required: str) -> Schema:
    """A mapping with these keys and no others."""
    schema: Schema = {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    return schema | ({"required": list(required)} if required else {})


def list_of(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def map_of(values: Schema) -> Schema:
    """A mapping with any keys."""
    return {"type": "object", "additionalProperties": values}


def _strings(*names: str) -> dict[str, Schema]:
    return dict.fromkeys(names, STRING)


def _choice(*values: str) -> Schema:
    return {"enum": list(values)}


_KEY_REFERENCE = closed(_strings("name", "key") | {"optional": BOOLEAN}, "name", "key")
_FIELD = closed(_strings("apiVersion", "fieldPath"), "fieldPath")
_RESOURCE_FIELD = closed(
    _strings("containerName", "resource") | {"divisor": reference("Quantity")}, "resource"
)
_KEY_TO_PATH = closed(_strings("key", "path") | {"mode": INTEGER}, "key", "path")
_DOWNWARD_FILE = closed(
    {"path": STRING, "mode": INTEGER, "fieldRef": _FIELD, "resourceFieldRef": _RESOURCE_FIELD},
    "path",
)
_ITEMS: dict[str, Schema] = {"items": list_of(_KEY_TO_PATH), "optional": BOOLEAN}
_CLAIM_SPEC = closed(
    {
        "accessModes": reference("AccessModes"),
        "resources": reference("Resources"),
        "selector": reference("LabelSelector"),
    }
    | _strings("storageClassName", "volumeName", "volumeMode", "volumeAttributesClassName"),
    "accessModes",
    "resources",
)
_PROJECTION = closed(
    {
        "secret": closed({"name": STRING} | _ITEMS),
        "configMap": closed({"name": STRING} | _ITEMS),
        "downwardAPI": closed({"items": list_of(_DOWNWARD_FILE)}),
        "serviceAccountToken": closed(
            _strings("audience", "path") | {"expirationSeconds": INTEGER}, "path"
        ),
    }
)
_VOLUME_SOURCES: dict[str, Schema] = {
    "emptyDir": closed(
        {"medium": _choice("", "Memory", "HugePages"), "sizeLimit": reference("Quantity")}
    ),
    "hostPath": closed(_strings("path", "type"), "path"),
    "persistentVolumeClaim": closed({"claimName": STRING, "readOnly": BOOLEAN}, "claimName"),
    "configMap": closed({"name": STRING, "defaultMode": INTEGER} | _ITEMS, "name"),
    "secret": closed({"secretName": STRING, "defaultMode": INTEGER} | _ITEMS, "secretName"),
    "projected": closed({"sources": list_of(_PROJECTION), "defaultMode": INTEGER}, "sources"),
    "downwardAPI": closed({"items": list_of(_DOWNWARD_FILE), "defaultMode": INTEGER}),
    "nfs": closed(_strings("server", "path") | {"readOnly": BOOLEAN}, "server", "path"),
    "csi": closed(
        _strings("driver", "fsType")
        | {
            "readOnly": BOOLEAN,
            "volumeAttributes": map_of(STRING),
            "nodePublishSecretRef": closed({"name": STRING}),
        },
        "driver",
    ),
    "ephemeral": closed(
        {
            "volumeClaimTemplate": closed(
                {
                    "metadata": closed({"labels": map_of(STRING), "annotations": map_of(STRING)}),
                    "spec": _CLAIM_SPEC,
                },
                "spec",
            )
        }
    ),
}

_SELECTOR_REQUIREMENT = closed(
    {
        "key": STRING,
        "operator": _choice("In", "NotIn", "Exists", "DoesNotExist"),
        "values": list_of(STRING),
    },
    "key",
    "operator",
)
_NODE_REQUIREMENT = closed(
    {
        "key": STRING,
        "operator": _choice("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
        "values": list_of(STRING),
    },
    "key",
    "operator",
)
_NODE_TERM = closed(
    {
        "matchExpressions": list_of(_NODE_REQUIREMENT),
        "matchFields": list_of(_NODE_REQUIREMENT),
    }
)
_POD_TERM = closed(
    {
        "labelSelector": reference("LabelSelector"),
        "namespaceSelector": reference("LabelSelector"),
        "namespaces": list_of(STRING),
        "topologyKey": STRING,
        "matchLabelKeys": list_of(STRING),
        "mismatchLabelKeys": list_of(STRING),
    },
    "topologyKey",
)
_POD_AFFINITY = closed(
    {
        "requiredDuringSchedulingIgnoredDuringExecution": list_of(_POD_TERM),
        "preferredDuringSchedulingIgnoredDuringExecution": list_of(
            closed({"weight": INTEGER, "podAffinityTerm": _POD_TERM}, "weight", "podAffinityTerm")
        ),
    }
)
_NODE_AFFINITY = closed(
    {
        "requiredDuringSchedulingIgnoredDuringExecution": closed(
            {"nodeSelectorTerms": list_of(_NODE_TERM)}, "nodeSelectorTerms"
        ),
        "preferredDuringSchedulingIgnoredDuringExecution": list_of(
            closed({"weight": INTEGER, "preference": _NODE_TERM}, "weight", "preference")
        ),
    }
)

_PROFILE = closed(_strings("type", "localhostProfile"), "type")
_CONTEXT: dict[str, Schema] = {
    "runAsUser": INTEGER,
    "runAsGroup": INTEGER,
    "runAsNonRoot": BOOLEAN,
    "seccompProfile": _PROFILE,
    "appArmorProfile": _PROFILE,
    "seLinuxOptions": closed(_strings("level", "role", "type", "user")),
}

_POLICY_PORT = closed(
    {
        "protocol": _choice("TCP", "UDP", "SCTP"),
        "port": {"type": ["integer", "string"]},
        "endPort": INTEGER,
    }
)

DEFINITIONS: dict[str, Schema] = {
    "Quantity": {
        "type": ["string", "number"],
        "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]|[KMGTPE]i|[eE][0-9]+)?$",
    },
    "Resources": closed(
        {"requests": map_of(reference("Quantity")), "limits": map_of(reference("Quantity"))}
    ),
    "Tolerations": list_of(
        closed(
            _strings("key", "value")
            | {
                "operator": _choice("Exists", "Equal", "Gt", "Lt"),
                "effect": _choice("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
                "tolerationSeconds": INTEGER,
            }
        )
    ),
    "Affinity": closed(
        {
            "nodeAffinity": _NODE_AFFINITY,
            "podAffinity": _POD_AFFINITY,
            "podAntiAffinity": _POD_AFFINITY,
        }
    ),
    "LabelSelector": closed(
        {"matchLabels": map_of(STRING), "matchExpressions": list_of(_SELECTOR_REQUIREMENT)}
    ),
    "SpreadConstraints": list_of(
        closed(
            {
                "maxSkew": INTEGER | {"minimum": 1},
                "minDomains": INTEGER | {"minimum": 1},
                "topologyKey": STRING,
                "whenUnsatisfiable": _choice("DoNotSchedule", "ScheduleAnyway"),
                "labelSelector": reference("LabelSelector"),
                "matchLabelKeys": list_of(STRING),
                "nodeAffinityPolicy": _choice("Honor", "Ignore"),
                "nodeTaintsPolicy": _choice("Honor", "Ignore"),
            },
            "maxSkew",
            "topologyKey",
            "whenUnsatisfiable",
        )
    ),
    "Environment": list_of(
        closed(
            _strings("name", "value")
            | {
                "valueFrom": closed(
                    {
                        "secretKeyRef": _KEY_REFERENCE,
                        "configMapKeyRef": _KEY_REFERENCE,
                        "fieldRef": _FIELD,
                        "resourceFieldRef": _RESOURCE_FIELD,
                    }
                )
            },
            "name",
        )
    ),
    "Volumes": list_of(
        closed({"name": STRING} | _VOLUME_SOURCES, "name")
        | {"minProperties": 2, "maxProperties": 2}
    ),
    "VolumeMounts": list_of(
        closed(
            _strings("name", "mountPath", "subPath", "subPathExpr", "recursiveReadOnly")
            | {
                "readOnly": BOOLEAN,
                "mountPropagation": _choice("None", "HostToContainer", "Bidirectional"),
            },
            "name",
            "mountPath",
        )
    ),
    "AccessModes": list_of(
        _choice("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
    )
    | {"minItems": 1},
    "PodSecurityContext": closed(
        _CONTEXT
        | {
            "fsGroup": INTEGER,
            "fsGroupChangePolicy": _choice("Always", "OnRootMismatch"),
            "supplementalGroups": list_of(INTEGER),
            "supplementalGroupsPolicy": _choice("Merge", "Strict"),
            "sysctls": list_of(closed(_strings("name", "value"), "name", "value")),
        }
    ),
    "SecurityContext": closed(
        _CONTEXT
        | {
            "allowPrivilegeEscalation": BOOLEAN,
            "readOnlyRootFilesystem": BOOLEAN,
            "privileged": BOOLEAN,
            "capabilities": closed({"add": list_of(STRING), "drop": list_of(STRING)}),
            "procMount": STRING,
        }
    ),
    "Peers": list_of(
        closed(
            {
                "podSelector": reference("LabelSelector"),
                "namespaceSelector": reference("LabelSelector"),
                "ipBlock": closed({"cidr": STRING, "except": list_of(STRING)}, "cidr"),
            }
        )
        | {"minProperties": 1}
    ),
    "IngressRules": list_of(closed({"from": reference("Peers"), "ports": list_of(_POLICY_PORT)})),
    "EgressRules": list_of(closed({"to": reference("Peers"), "ports": list_of(_POLICY_PORT)})),
    "IngressTls": list_of(closed({"hosts": list_of(STRING), "secretName": STRING})),
    "ParentReferences": list_of(
        closed(
            _strings("group", "kind", "namespace", "name", "sectionName")
            | {"port": reference("Port")},
            "name",
        )
    ),
}
