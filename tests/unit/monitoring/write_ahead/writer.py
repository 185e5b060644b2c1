"""A process that counts until it is killed: run as a script by the tests.

After each change it says on its standard output what is stored.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from monitoring.usage import TokenCount
from monitoring.write_ahead import Slot, UsageLog
from tests.unit.monitoring.write_ahead.records import record

_MAX_OPEN = 150


def main(folder: str, seed: str) -> None:
    """Open, count and finish requests for ever."""
    chance = random.Random(int(seed))
    log = UsageLog.create(Path(folder), "writer")
    running: dict[int, tuple[Slot, TokenCount]] = {}
    number = 0
    while True:
        action = chance.random()
        if not running or (action < 0.1 and len(running) < _MAX_OPEN):
            number += 1
            running[number] = (log.open_slot(record(number)), TokenCount())
            print("open", number, 0, 0, 0, 0, flush=True)
        elif action < 0.15:
            done = chance.choice(list(running))
            slot, _ = running.pop(done)
            log.finish(slot, "ok")
            print("done", done, 0, 0, 0, 0, flush=True)
        else:
            one = chance.choice(list(running))
            slot, old = running[one]
            new = TokenCount(7, 3, old.completion + 1, old.reasoning + chance.randrange(2))
            slot.set(
                prompt=new.prompt,
                cached=new.cached,
                completion=new.completion,
                reasoning=new.reasoning,
            )
            running[one] = (slot, new)
            print("set", one, 7, 3, new.completion, new.reasoning, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
