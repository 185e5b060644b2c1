"""Ray Serve deployments: ingress, router, application builder; the command line sits on top.

`deployments.app:build` is the `import_path` of every config file. It imports vLLM and Ray Serve,
so this package does not import it for you.
"""

from __future__ import annotations

__all__: list[str] = []
