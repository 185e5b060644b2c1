"""The gateway in front of the routers: who may ask, how much, and what it cost.

`GatewayMiddleware` goes around the HTTP application, `Gateway` is what an ingress replica has one
of. It imports nothing by itself: the command line uses some of its modules without Ray or vLLM.
"""

from __future__ import annotations

__all__: list[str] = []
