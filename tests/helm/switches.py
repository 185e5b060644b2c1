"""The chart's switches: what a platform may choose, and the values that choose it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.helm.helm_cli import REPO_ROOT

__all__ = ["SWITCHES", "Values", "merged"]

Values = dict[str, Any]


def merged(*trees: Mapping[str, Any]) -> Values:
    """Trees on top of each other, as Helm merges values."""
    whole: Values = {}
    for tree in trees:
        for key, value in tree.items():
            both = isinstance(value, Mapping) and isinstance(whole.get(key), Mapping)
            whole[key] = merged(whole[key], value) if both else value
    return whole


_SPREAD = [
    {
        "maxSkew": 1,
        "topologyKey": "topology.kubernetes.io/zone",
        "whenUnsatisfiable": "DoNotSchedule",
    }
]
# All that a group of pods takes from its user.
_PLACED: Values = {
    "nodeSelector": {"pool": "large"},
    "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
                ]
            }
        }
    },
    "priorityClassName": "important",
    "podAnnotations": {"example.com/note": "one: two"},
    "podLabels": {"example.com/team": "research"},
    "extraEnv": [{"name": "EXTRA", "value": 'a "b" {c}'}],
    "extraVolumes": [{"name": "extra", "configMap": {"name": "extra", "optional": True}}],
    "extraVolumeMounts": [{"name": "extra", "mountPath": "/extra", "readOnly": True}],
}
_PLACED_WORKERS = merged(
    _PLACED,
    {
        "runtimeClassName": "nvidia",
        "topologySpreadConstraints": _SPREAD,
        "cache": {"hostPath": "/mnt/cache"},
        "terminationGracePeriodSeconds": 7200,
    },
)
_GROUPS = ("router", "shardsCpu", "shardsGpu")
_OUTSIDE = [{"ipBlock": {"cidr": "10.20.0.0/16"}}]
_GPU_SHARDS: Values = {"shardsGpu": {"enabled": True}, "config": {"shards": {"num_gpus": 1}}}

# Switch -> its positions -> the values of a position. The first is the chart's own.
SWITCHES: Mapping[str, Mapping[str, Values]] = {
    "autoscaler": {"on": {}, "off": {"autoscaler": {"enabled": False}}},
    "shards": {
        "cpu": {},
        "gpu": merged(_GPU_SHARDS, {"shardsCpu": {"enabled": False}}),
        "both": _GPU_SHARDS,
    },
    "weights": {
        "image": {},
        "claim": {
            "weights": {
                "path": "k2",
                "persistentVolumeClaim": {"enabled": True, "claimName": "given-weights"},
            }
        },
        "new-claim": {
            "weights": {
                "persistentVolumeClaim": {
                    "enabled": True,
                    "create": True,
                    "storageClassName": "nfs",
                    "subPath": "kimi",
                    "accessModes": ["ReadWriteMany"],
                }
            }
        },
        "host": {
            "weights": {"hostPath": {"enabled": True, "path": "/mnt/nvme"}, "path": "kimi/k2"}
        },
    },
    "state": {
        "pod": {},
        "host": {"state": {"type": "hostPath", "hostPath": "/mnt/state"}},
        "new-claim": {
            "state": {
                "type": "persistentVolumeClaim",
                "persistentVolumeClaim": {"accessModes": ["ReadWriteMany"]},
            }
        },
        "claim": {
            "state": {
                "type": "persistentVolumeClaim",
                "persistentVolumeClaim": {"create": False, "claimName": "given-state"},
            }
        },
    },
    "ledger": {
        "file": {},
        "database": {
            "ledger": {"existingSecret": "given-ledger", "urlKey": "dsn"},
            "networkPolicy": {"ledger": {"to": _OUTSIDE}},
            "config": {"http": {"num_replicas": 2}},
        },
        "prices": {"ledger": {"prices": (REPO_ROOT / "configs/prices.yaml").read_text()}},
    },
    "auth": {"made": {}, "given": {"auth": {"existingSecret": "given-auth"}}},
    "admin": {
        "made": {},
        "given": {"adminKey": {"existingSecret": "given-admin", "secretKey": "admin"}},
        "off": {
            "adminKey": {"enabled": False},
            "metrics": {"apiKey": {"existingSecret": "given-metrics", "secretKey": "token"}},
            "tests": {"existingSecret": "given-tests", "secretKey": "token"},
        },
    },
    "redis": {
        "own": {},
        "own-in-memory": {
            "redis": {"persistence": {"enabled": False}, "existingSecret": "given-redis"}
        },
        "external": {
            "redis": {
                "enabled": False,
                "external": {"address": "redis.example:6379", "existingSecret": "given-external"},
            },
            "networkPolicy": {"redis": {"to": _OUTSIDE}},
        },
        "external-open": {
            "redis": {"enabled": False, "external": {"address": "rediss://r.example:6380"}},
            "networkPolicy": {"redis": {"to": _OUTSIDE}},
        },
        "off": {"redis": {"enabled": False}},
    },
    "policies": {
        "on": {},
        "off": {"networkPolicy": {"enabled": False}},
        "narrow": {
            "networkPolicy": {
                "gateway": {"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]},
                "apiServer": {"to": [{"ipBlock": {"cidr": "10.0.0.1/32"}}], "ports": [6443]},
                "extraEgress": {"router": [{"to": _OUTSIDE, "ports": [{"port": 443}]}]},
                "extraIngress": {
                    "head": [{"from": [{"podSelector": {}}], "ports": [{"port": 8265}]}]
                },
            }
        },
    },
    "service": {
        "inside": {},
        "balanced": {
            "service": {
                "type": "LoadBalancer",
                "loadBalancerSourceRanges": ["203.0.113.0/24"],
                "externalTrafficPolicy": "Local",
                "annotations": {"example.com/kind": "internal"},
            }
        },
        "node": {"service": {"type": "NodePort", "nodePort": 30080, "port": 8080}},
    },
    "ingress": {
        "off": {},
        "tls": {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "hosts": ["api.example", "api2.example"],
                "tls": [{"secretName": "given-tls", "hosts": ["api.example"]}],
            }
        },
        "plain": {
            "ingress": {"enabled": True, "hosts": ["api.example"], "nginxAnnotations": False}
        },
    },
    "route": {
        "off": {},
        "on": {
            "httpRoute": {
                "enabled": True,
                "parentRefs": [{"name": "public", "namespace": "gateways", "sectionName": "https"}],
                "hostnames": ["api.example"],
            }
        },
        "timed": {
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "timeout": "1h30m"}
        },
    },
    "metrics": {
        "on": {},
        "off": {
            "metrics": {
                name: {"enabled": False}
                for name in ("serviceMonitor", "podMonitor", "prometheusRule", "dashboards")
            }
        },
        "labelled": {
            "metrics": {
                "serviceMonitor": {"labels": {"release": "prometheus"}, "interval": "1m"},
                "podMonitor": {"labels": {"release": "prometheus"}},
                "prometheusRule": {"labels": {"release": "prometheus"}},
                "dashboards": {"annotations": {"grafana_folder": "Moonshard"}},
            }
        },
    },
    "accounts": {
        "made": {},
        "named": {
            "serviceAccount": {
                "create": True,
                "name": "moon",
                "headName": "moon-head",
                "annotations": {"example.com/role": "arn:aws:iam::1:role/moon"},
            }
        },
        "given": {
            "serviceAccount": {"create": False, "name": "given-pods", "headName": "given-head"}
        },
        "none": {"serviceAccount": {"create": False}},
    },
    "image": {
        "tag": {},
        "digest": {
            "image": {
                "repository": "registry.example:5000/moonshard",
                "digest": f"sha256:{'ab' * 32}",
            },
            "imagePullSecrets": [{"name": "given-registry"}],
            "router": {"image": {"tag": "0.1.0-gpu"}},
            "redis": {"image": {"digest": "", "tag": "7.2"}},
        },
    },
    "names": {
        "release": {},
        "chart": {"nameOverride": "ms"},
        "full": {"fullnameOverride": "kimi-prod", "commonLabels": {"example.com/cost": "42"}},
    },
    "pods": {
        "plain": {},
        "placed": {"head": _PLACED, **dict.fromkeys(_GROUPS, _PLACED_WORKERS)},
        "commanded": {
            "head": {
                "preStop": {"command": ["ray", "stop"]},
                "rayStartParams": {"verbose": "true"},
            },
            **{
                group: {
                    "preStop": {"command": ["sleep", "5"]},
                    "podDisruptionBudget": {"enabled": False},
                    "numCpus": 4,
                }
                for group in _GROUPS
            },
        },
        "many": {
            "router": {"replicas": 3, "minReplicas": 3, "maxReplicas": 5},
            "shardsCpu": {"replicas": 4, "minReplicas": 4, "maxReplicas": 4},
            "shardsGpu": {"podDisruptionBudget": {"minAvailable": 1}},
            "config": {"router": {"autoscaling": {"max_replicas": 3}}},
        },
    },
    "upgrade": {
        "none": {},
        "new-cluster": {"rayService": {"upgradeStrategy": "NewCluster", "deletionDelaySeconds": 5}},
        "suspended": {"rayService": {"suspend": True, "annotations": {"example.com/a": "b"}}},
    },
    "streams": {
        "normal": {},
        "long": {
            "config": {"router": {"request_timeout_s": 7200, "graceful_shutdown_timeout_s": 7300}}
        },
        "short": {
            "serve": {"requestTimeoutSeconds": 200, "httpPort": 8001, "logEncoding": "TEXT"},
            "config": {"router": {"request_timeout_s": 120, "graceful_shutdown_timeout_s": 130}},
        },
    },
    "tests": {"on": {}, "off": {"tests": {"enabled": False}}},
}
