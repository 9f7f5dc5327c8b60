"""The bytes between real parties: protobuf envelopes with raw little-endian arrays. No pickle, no code, nothing executable.

Every envelope says which run and which recipe it belongs to, who sends it, and a counter that is never used twice; a receiver refuses
what does not fit, before anything else looks at it. The schema is built here, so no generated file can drift from it:

    message Array    { string dtype = 1; repeated uint64 shape = 2; bytes data = 3; }
    message Envelope { uint32 version = 1; string run = 2; string recipe = 3; string sender = 4; uint64 counter = 5; string kind = 6;
                       uint64 number = 7; uint64 request = 8; repeated string parties = 9; repeated bytes sessions = 10;
                       Array rows = 11; Array values = 12; string text = 13; }
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
from numpy.typing import NDArray

VERSION = 1
KINDS = ("hello", "ping", "ask", "ask_all", "evaluate", "tell", "refer", "done", "stop", "meet", "mask", "blind", "blinded", "score")
DTYPES = {"u4": "<u4", "u8": "<u8", "f8": "<f8"}
_WINDOW = 4096  # how far messages of one sender may overtake each other


class Refused(ValueError):
    """A message that must not be acted upon; the text says why."""


def _schema() -> tuple[Any, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="xutrain/vertical.proto", package="xutrain.vertical", syntax="proto3")
    one, many = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL, descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    kinds = {"string": 9, "bytes": 12, "uint32": 13, "uint64": 4, "Array": 11}
    array = [("dtype", "string", one), ("shape", "uint64", many), ("data", "bytes", one)]
    envelope = [
        ("version", "uint32", one),
        ("run", "string", one),
        ("recipe", "string", one),
        ("sender", "string", one),
        ("counter", "uint64", one),
        ("kind", "string", one),
        ("number", "uint64", one),
        ("request", "uint64", one),
        ("parties", "string", many),
        ("sessions", "bytes", many),
        ("rows", "Array", one),
        ("values", "Array", one),
        ("text", "string", one),
    ]
    for name, fields in (("Array", array), ("Envelope", envelope)):
        made = file.message_type.add(name=name)
        for number, (field_name, kind, label) in enumerate(fields, 1):
            made.field.add(
                name=field_name,
                number=number,
                label=label,
                type=kinds[kind],
                type_name=".xutrain.vertical.Array" if kind == "Array" else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return tuple(message_factory.GetMessageClass(pool.FindMessageTypeByName(f"xutrain.vertical.{n}")) for n in ("Array", "Envelope"))  # type: ignore[return-value]


_Array, _Envelope = _schema()


@dataclass
class Envelope:
    """One message. ``rows`` uint32 (b,); ``values`` uint64 (ring elements) or float64, any shape; ``text`` JSON for small facts."""

    kind: str
    run: str = ""
    recipe: str = ""
    sender: str = ""
    counter: int = 0
    number: int = 0
    request: int = 0
    parties: list[str] = field(default_factory=list)
    sessions: list[bytes] = field(default_factory=list)
    rows: NDArray | None = None
    values: NDArray | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def payload_bits(self) -> int:
        """Bits of rows and values, which is what the ledger counts."""
        return 8 * sum(a.nbytes for a in (self.rows, self.values) if a is not None)


def pack(e: Envelope) -> bytes:
    """The wire form."""
    made = _Envelope(
        version=VERSION, run=e.run, recipe=e.recipe, sender=e.sender, counter=e.counter, kind=e.kind, number=e.number, request=e.request,
        parties=e.parties, sessions=e.sessions, text=json.dumps(e.facts) if e.facts else "",
    )  # fmt: skip
    for name in ("rows", "values"):
        array = getattr(e, name)
        if array is not None:
            code = {"u": "u4" if array.dtype.itemsize == 4 else "u8", "f": "f8"}[array.dtype.kind]
            into = getattr(made, name)
            into.dtype, into.data = code, np.ascontiguousarray(array, dtype=DTYPES[code]).tobytes()
            into.shape.extend(array.shape)
    return bytes(made.SerializeToString())


def unpack(data: bytes) -> Envelope:
    """Raises Refused for anything that is not a whole envelope of this version with consistent arrays and finite numbers."""
    made = _Envelope()
    try:
        made.ParseFromString(data)
    except (message.DecodeError, RuntimeError) as reason:  # the C++ and the Python implementation differ
        raise Refused(f"no envelope: {reason}") from None
    if made.version != VERSION:
        raise Refused(f"protocol version {made.version}, this program speaks {VERSION}")
    if made.kind not in KINDS:
        raise Refused(f"unknown kind of message {made.kind[:40]!r}")
    try:
        facts = json.loads(made.text) if made.text else {}
    except (ValueError, RecursionError):
        raise Refused("the text is no JSON") from None
    if not isinstance(facts, dict):
        raise Refused("the text is no JSON object")
    rows = _array(made.rows, "rows", ("u4",)) if made.HasField("rows") else None
    values = _array(made.values, "values", ("u8", "f8")) if made.HasField("values") else None
    if rows is not None and rows.ndim != 1:
        raise Refused("rows must have one dimension")
    return Envelope(
        made.kind,
        made.run,
        made.recipe,
        made.sender,
        made.counter,
        made.number,
        made.request,
        list(made.parties),
        list(made.sessions),
        rows,
        values,
        facts,
    )


def _array(a: Any, name: str, allowed: Sequence[str]) -> NDArray:
    if a.dtype not in allowed:
        raise Refused(f"{name} of type {a.dtype[:10]!r}")
    size = 1
    for n in a.shape:
        size *= n
        if size > 1 << 40:
            raise Refused(f"{name} too large")
    if len(a.shape) > 2 or size * np.dtype(DTYPES[a.dtype]).itemsize != len(a.data):
        raise Refused(f"{name}: {len(a.data)} bytes for the shape {list(a.shape)[:4]}")
    array = np.frombuffer(a.data, dtype=DTYPES[a.dtype]).reshape(tuple(a.shape)).astype(DTYPES[a.dtype][1:])
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused(f"{name} holds NaN or infinity")
    return array


class Counters:
    """Refuses what was received before: a window per sender below the highest counter seen."""

    def __init__(self) -> None:
        self._highest: dict[str, int] = {}
        self._seen: dict[str, set[int]] = {}
        self._lock = threading.Lock()

    def accept(self, sender: str, counter: int) -> None:
        """Raises Refused for a counter that was used, or that is too old to tell."""
        with self._lock:
            highest = self._highest.get(sender, 0)
            seen = self._seen.setdefault(sender, set())
            if counter in seen or counter + _WINDOW <= highest or counter == 0:
                raise Refused(f"replayed or stale counter {counter}")
            seen.add(counter)
            if counter > highest:
                self._highest[sender] = counter
                if len(seen) > 2 * _WINDOW:
                    self._seen[sender] = {c for c in seen if c + _WINDOW > counter}
