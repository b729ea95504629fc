"""One client's connection, which ends where the client does nothing."""

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's, looked at each `seconds`: cut where the second look finds what the first did.

    That is a request whose head is not yet there, or as much left of an answer to be read.
    """

    seconds = 30

    def connection_made(self, transport):
        super().connection_made(transport)
        self.seen = self.look = None
        self._look()

    def connection_lost(self, exc):
        self.look.cancel()
        super().connection_lost(exc)

    def _look(self):
        left, cycle = self.transport.get_write_buffer_size(), self.cycle
        is_asked = cycle is not None and not cycle.response_complete
        # While an answer is being made the client has nothing to do.
        now = None if is_asked and not left else (cycle, left)
        if now is not None and now == self.seen:
            self.transport.abort()
            return
        self.seen = now
        self.look = self.loop.call_later(self.seconds, self._look)
