"""Names of the Serve deployments."""

from __future__ import annotations

__all__ = ["INGRESS_NAME", "ROUTER_NAME"]

INGRESS_NAME = "ingress"
"""Serve deployment of the ingress."""

ROUTER_NAME = "router"
"""Serve deployment of the router replicas."""
