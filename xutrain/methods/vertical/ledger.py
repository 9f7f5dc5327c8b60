"""What left each party: counted by message kind and target, in messages and bytes of payload."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from xutrain.methods.vertical.security import Message


class Ledger:
    """Counts of one or all parties. A line says: to whom, what, how many messages, how many bytes, masked or not."""

    def __init__(self) -> None:
        self.messages: Counter[tuple[int, int, str, bool]] = Counter()
        self.bits: Counter[tuple[int, int, str, bool]] = Counter()

    def add(self, messages: list[Message], times: int = 1) -> None:
        """Count each message ``times`` times."""
        for m in messages:
            self.messages[m.source, m.target, m.part, m.masked] += times
            self.bits[m.source, m.target, m.part, m.masked] += times * m.bits

    def lines(self, party: int, names: list[str]) -> list[dict[str, object]]:
        """What left ``party``."""
        return [
            {
                "from": names[party],
                "to": names[t],
                "kind": part,
                "masked": masked,
                "messages": n,
                "bytes": self.bits[s, t, part, masked] // 8,
            }
            for (s, t, part, masked), n in sorted(self.messages.items())
            if s == party and n
        ]

    def summary(self, party: int, names: list[str]) -> str:
        """What left ``party``, in one line for people."""
        said = [
            f"{line['kind']} to {line['to']}: {line['messages']} messages, {line['bytes']} bytes{', masked' if line['masked'] else ''}"
            for line in self.lines(party, names)
        ]
        return "; ".join(said) or "nothing"

    def write(self, path: Path, party: int, names: list[str]) -> None:
        """One JSON line per kind and target."""
        path.write_text("".join(json.dumps(line) + "\n" for line in self.lines(party, names)), encoding="utf-8")
