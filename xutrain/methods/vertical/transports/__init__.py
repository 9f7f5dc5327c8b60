"""What carries the messages between the seats: virtual time, and gRPC between real parties. Both are a ``seat.Port``."""
