"""The engine on a thread of its own: requests go in, news of them comes out on the event loop."""

import asyncio
import contextlib
import threading
import time
import weakref
from collections import deque

from .schema import Refused


class Listener:
    """One request of the engine; it is in `queue` while there are news of it.

    A loop that falls behind the engine finds several tokens at once: fewer events, and no queue
    that grows.
    """

    def __init__(self, request, index, queue):
        self.request, self.index, self.queue = request, index, queue
        self.loop = asyncio.get_running_loop()
        self.asked, self.last = time.monotonic(), None
        self.there = 0, None  # tokens, and why there are no more; set on the engine's thread
        self.told, self.is_queued = 0, False  # of the loop's

    def note(self):
        """Keep how far the request is; returns its new tokens (on the engine's thread)."""
        before, request = self.there[0], self.request
        self.there = len(request.tokens), request.finished
        return self.there[0] - before

    def take(self):
        """The tokens since the last time with their logprobs, and why there are no more."""
        self.is_queued = False
        count, finished = self.there
        new = slice(self.told, count)
        self.told = count
        return self.request.tokens[new], self.request.logprobs[new], finished


class Service:
    """`submit` and `cancel` may be called from any thread, `is_closed` and `failure` be read."""

    def __init__(self, engine, metrics, max_queue, on_failure=None):
        self.engine, self.metrics, self.max_queue = engine, metrics, max_queue
        self.orders, self.wake = deque(), threading.Event()
        self.listeners, self.is_closed, self.failure = {}, False, None
        self.coming = weakref.WeakSet()  # requests with room that are not submitted yet
        self.on_failure = on_failure
        self.ended, self.ending = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self.thread.start()
        engine.watch_ranks(self.ended, lambda: self._end(RuntimeError("a rank is lost")))

    @property
    def is_serving(self):
        return not self.is_closed and self.thread.is_alive()

    def check_room(self, requests):
        """Refused where these would wait for too many others, which count them from here on."""
        if not self.is_serving:
            raise Refused("the engine has ended", 503, code="engine_ended")
        before = len(self.engine.waiting) + len(self.orders) + len(self.coming)
        # Those that have come since the last step and will find a slot wait for nobody.
        waiting = before + len(requests) - len(self.engine.slots)
        if waiting > self.max_queue:
            self.metrics.rejected.inc()
            raise Refused(f"{self.max_queue} requests are waiting: try again later", 429,
                          code="queue_full")  # fmt: skip
        self.coming.update(requests)

    def submit(self, listener):
        self.coming.discard(listener.request)
        if not self.is_serving:
            raise Refused("the engine has ended", 503, code="engine_ended")

        def order():
            self.listeners[listener.request] = listener
            self.engine.waiting.append(listener.request)

        self._order(order)

    def cancel(self, listener, why="cancelled"):
        """End a request whose text nobody reads, or whose text has ended before its tokens."""

        def order():
            if self.listeners.pop(listener.request, None):
                self.metrics.ended(listener, why)
            self.engine.cancel(listener.request)

        if listener.request.finished is None:
            self._order(order)

    def cancel_all(self):
        """End all requests, and tell of it."""

        def order():
            ended = [*self.listeners]
            for request in ended:
                self.engine.cancel(request)
            self._tell(ended)

        self._order(order)

    def _order(self, order):
        self.orders.append(order)
        self.wake.set()

    def _serve(self):
        try:
            while not self.is_closed:
                while self.orders:
                    self.orders.popleft()()
                start = time.monotonic()
                changed = self.engine.step()
                self._tell(changed or ())
                if changed is None:
                    self.metrics.idle(self.engine)
                    self.wake.wait()
                    self.wake.clear()
                else:
                    self.metrics.step(self.engine, time.monotonic() - start)
        except BaseException as failure:
            # An error of the device, for which there is no help.
            self._end(failure)
            raise
        self._end(None)

    def _end(self, failure):
        """The first call counts: requests end, and who listens for failures is told."""
        with self.ending:
            if self.ended.is_set():
                return
            self.ended.set()
        self.failure, self.is_closed = failure, True
        while self.orders:  # those that were not yet taken
            with contextlib.suppress(Exception):
                self.orders.popleft()()
        for request in self.listeners:
            request.finished = request.finished or "error"
        self._tell([*self.listeners])
        if failure is not None and self.on_failure:
            self.on_failure()

    def _tell(self, requests):
        """All news of a step by one call of each loop."""
        by_loop, now = {}, time.monotonic()
        for request in requests:
            listener = self.listeners.get(request)
            if listener is None:
                continue
            self.metrics.news(listener, listener.note(), now)
            by_loop.setdefault(listener.loop, []).append(listener)
            if request.finished:
                del self.listeners[request]
        for loop, told in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has the server
                loop.call_soon_threadsafe(_deliver, told)

    def close(self, seconds=30):
        """End the engine's thread; False where it does not end in time."""
        self.is_closed = True
        self.wake.set()
        self.thread.join(seconds)
        if self.thread.is_alive():
            return False
        if self.failure is None:
            self.engine.close()
        return True


def _deliver(listeners):
    for listener in listeners:
        if not listener.is_queued:
            listener.is_queued = True
            listener.queue.put_nowait(listener)
