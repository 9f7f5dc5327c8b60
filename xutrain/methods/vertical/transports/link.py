"""gRPC with mutual TLS on one port per party: who calls is known by certificate, and what does not fit is refused before it is read.

One unary method carries all envelopes. Certificates are checked against the run's authority and by party name; the sender written in
an envelope must be a name of the certificate that the call came with.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import grpc

from xutrain.errors import Failed, Issue
from xutrain.methods.vertical.transports.identity import Identity
from xutrain.methods.vertical.transports.wire import Counters, Envelope, Refused, pack, unpack

METHOD = "/xutrain.vertical.Party/Send"
#: answers a checked envelope; may raise Refused
Handler = Callable[[Envelope], Envelope]


class Link:
    """This party's server, and its channels to the others.

    Args:
        addresses: party: host:port. refused: told of each refused message: sender (as far as known) and reason.
        nested: calls answered side by side that wait for others' answers (tree sums).
    """

    def __init__(
        self,
        identity: Identity,
        addresses: dict[str, str],
        run: str,
        recipe: str,
        handler: Handler,
        *,
        refused: Callable[[str, str], None],
        max_bytes: int = 64 << 20,
        timeout_s: float = 10.0,
        listen: str | None = None,
        nested: int = 0,
    ) -> None:
        self.identity, self.run, self.recipe, self.handler, self.refused = identity, run, recipe, handler, refused
        self.party, self.timeout_s = identity.party, timeout_s
        self._counters = Counters()
        self._counter = itertools.count(time.time_ns())  # above every counter of an earlier start of this party
        self._lock = threading.Lock()
        sizes = [("grpc.max_receive_message_length", max_bytes), ("grpc.max_send_message_length", max_bytes)]
        alive = [("grpc.keepalive_time_ms", 20_000), ("grpc.keepalive_timeout_ms", 10_000), ("grpc.http2.max_pings_without_data", 0)]
        quick = [
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        pair = [(identity.key, identity.certificate)]
        trust = grpc.ssl_server_credentials(pair, root_certificates=identity.authority, require_client_auth=True)
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=4 + 2 * len(addresses) + nested), options=[*sizes, *alive, ("grpc.so_reuseport", 0)]
        )
        method = grpc.unary_unary_rpc_method_handler(self._receive)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("xutrain.vertical.Party", {"Send": method}),))
        where = listen or addresses[self.party]
        try:
            self.port = self._server.add_secure_port(where, trust)
        except RuntimeError as reason:
            raise Failed(
                Issue("network.addresses", f"cannot listen: {reason}", where, "is the port free, and the address this machine's?")
            ) from None
        credentials = grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)
        self._channels = {
            p: grpc.secure_channel(a, credentials, [*sizes, *alive, *quick, ("grpc.ssl_target_name_override", p)])
            for p, a in addresses.items()
            if p != self.party
        }
        self._send = {p: c.unary_unary(METHOD) for p, c in self._channels.items()}

    def start(self) -> None:
        """Begin to listen."""
        self._server.start()

    def close(self, grace_s: float = 0.5) -> None:
        """Stop listening; answers under way may finish."""
        self._server.stop(grace_s).wait()
        for channel in self._channels.values():
            channel.close()

    def call(self, party: str, e: Envelope, done: Callable[[Envelope | None, str], None], timeout_s: float | None = None) -> None:
        """Send without waiting; ``done(reply, "")`` or ``done(None, reason)`` comes from another thread."""
        data = self._sealed(e)
        try:
            future = self._send[party].future(data, timeout=timeout_s or self.timeout_s)
        except ValueError as reason:  # the channel was closed meanwhile
            done(None, str(reason))
            return

        def finish(answer: Any) -> None:
            try:
                reply = unpack(answer.result())
                if (reply.sender, reply.run, reply.recipe) != (party, self.run, self.recipe):
                    raise Refused("the reply is of another party, run or recipe")
            except grpc.RpcError as reason:
                done(None, describe(reason))
            except grpc.FutureCancelledError:
                done(None, "cancelled")
            except Refused as reason:
                self.refused(party, f"reply: {reason}")
                done(None, f"refused reply: {reason}")
            else:
                done(reply, "")

        future.add_done_callback(finish)

    def ask(self, party: str, e: Envelope, timeout_s: float | None = None) -> Envelope:
        """Send and wait. Raises ConnectionError with the reason."""
        try:
            reply = unpack(self._send[party](self._sealed(e), timeout=timeout_s or self.timeout_s))
        except grpc.RpcError as reason:
            raise ConnectionError(describe(reason)) from None
        except Refused as reason:
            raise ConnectionError(f"refused reply: {reason}") from None
        except ValueError as reason:  # the channel was closed meanwhile
            raise ConnectionError(str(reason)) from None
        return reply

    def _sealed(self, e: Envelope) -> bytes:
        with self._lock:
            e.counter = next(self._counter)
        e.run, e.recipe, e.sender = self.run, self.recipe, self.party
        return pack(e)

    def _receive(self, data: bytes, context: Any) -> bytes:
        names = {n.decode() for n in context.auth_context().get("x509_subject_alternative_name", [])}
        sender = ",".join(sorted(names)) or context.peer()
        try:
            e = unpack(data)
            if e.sender not in names or e.sender not in self._channels:
                raise Refused(f"sender {e.sender[:40]!r} is not a party with this certificate")
            if e.run != self.run:
                raise Refused(f"another run: {e.run[:40]!r}, here {self.run!r}")
            if e.recipe != self.recipe:
                raise Refused("another recipe: the jobs of both parties differ")
            self._counters.accept(e.sender, e.counter)
            reply = self.handler(e)
        except Refused as reason:
            self.refused(sender, str(reason))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(reason))
            raise  # abort raises; this line satisfies the reader
        return self._sealed(reply)


def describe(error: Any) -> str:
    """A short reason of a failed call."""
    code = error.code() if callable(getattr(error, "code", None)) else None
    text = str(error.details() or "").splitlines()[0][:300] if callable(getattr(error, "details", None)) and error.details() else ""
    if code is grpc.StatusCode.UNAVAILABLE:
        text = text.split(": ")[-1]  # the rest lists addresses and retries
    gone = (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,
    )  # a party that is closing
    name = "unreachable" if code in gone else "no answer in time" if code is grpc.StatusCode.DEADLINE_EXCEEDED else "refused"
    return f"{name}: {text}" if text and name != "no answer in time" else name
