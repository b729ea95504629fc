"""What the event loop and the engine have to tell each other."""

import asyncio
import contextlib
import threading
import time
import weakref
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue

from .schema import Refused

SCHEMA_SECONDS = 60  # in which a schema has its turn and compiles
MOST_SCHEMAS = 16  # requests that wait for schemas to compile

ENDED = "the engine has ended", 503, None, "engine_ended"


class Listener:
    """One request of the engine; it is in `queue`, once, while there are news of it."""

    def __init__(self, request, index, queue):
        self.request, self.index, self.queue = request, index, queue
        self.loop = asyncio.get_running_loop()
        self.asked, self.last = time.monotonic(), None
        self.there = 0, None  # tokens, and why there are no more; set by who brings the news
        self.told, self.is_queued = 0, False  # of the loop's

    def note(self):
        """Keep how far the request is; returns how many tokens are new."""
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
    """An engine and who listens for news of it; any thread may call all but `constrain`."""

    def __init__(self, link, metrics, max_queue, on_failure=None):
        self.link, self.metrics, self.max_queue = link, metrics, max_queue
        self.on_failure, self.failure = on_failure, None
        self.is_closed, self.has_ended = False, False
        self.ending = threading.Lock()
        self.listeners = {}  # by the number of a request
        self.submitted, self.coming = 0, weakref.WeakSet()  # those with room, not submitted yet
        self.compiling = {}  # what waits for a schema, by the number of its first request
        _, self.news = link.pipe.recv()
        self.thread = threading.Thread(target=self._listen, name="news", daemon=True)
        self.thread.start()
        # A pipe is full where the engine stands still, for which no loop may wait.
        self.orders = SimpleQueue()
        threading.Thread(target=self._send, name="orders", daemon=True).start()

    @property
    def is_serving(self):
        return not self.is_closed and not self.has_ended

    def check_room(self, requests):
        """Refused where these would wait for too many others, which count them from here on."""
        if not self.is_serving:
            raise Refused(*ENDED)
        news = self.news
        before = news.waiting + self.submitted - news.submitted + len(self.coming)
        # Those that have come since the last step and will find a slot wait for nobody.
        if before + len(requests) - news.slots > self.max_queue:
            self.metrics.rejected_requests.inc()
            raise Refused(f"{self.max_queue} requests are waiting: try again later", 429,
                          code="queue_full")  # fmt: skip
        self.coming.update(requests)

    def submit(self, listener):
        request = listener.request
        self.coming.discard(request)
        self.listeners[request.number] = listener
        if not self.is_serving:  # after that: `_end` tells those that it finds
            self.listeners.pop(request.number, None)
            raise Refused(*ENDED)
        self.submitted += 1
        self.order("submit", request)

    def cancel(self, listener, why="cancelled"):
        """End a request whose text nobody reads, or whose text has ended before its tokens."""
        request = listener.request
        if request.finished is None:
            if self.listeners.pop(request.number, None):
                self.metrics.ended(listener, why)
            self.order("cancel", request.number)

    async def constrain(self, requests, schema, param):
        """Have these requests, before they are submitted, follow a schema; Refused for none."""
        if len(self.compiling) >= MOST_SCHEMAS:
            raise Refused("too many schemas are waiting: try again later", 429)
        numbers, done = [request.number for request in requests], Future()
        self.compiling[numbers[0]] = done
        for request in requests:  # it may be gone before it was ever submitted
            weakref.finalize(request, self.order, "cancel", request.number)
        try:
            if not self.is_serving:  # after that: `_end` tells those that it finds
                raise Refused(*ENDED)
            self.order("constrain", numbers, schema, param)
            if refused := await asyncio.wait_for(asyncio.wrap_future(done), SCHEMA_SECONDS):
                raise refused
        except asyncio.TimeoutError:
            raise Refused("others' schemas take too long: try again later", 429) from None
        finally:
            del self.compiling[numbers[0]]

    def order(self, *order):
        """Have the engine's `Host` do what the first says."""
        self.orders.put(order)

    def _send(self):
        with contextlib.suppress(OSError):  # it has ended, as `_listen` finds
            for order in iter(self.orders.get, None):
                self.link.pipe.send(order)

    def _listen(self):
        try:
            while True:
                name, *news = self.link.pipe.recv()
                getattr(self, f"_{name}")(*news)
        except (EOFError, OSError):
            self._end(None if self.is_closed else RuntimeError("its process has ended"))
        except BaseException as failure:
            self._end(failure)

    def _failed(self, words):
        raise RuntimeError(words)

    def _compiled(self, number, refused):
        """Tell who waits, whose client may have gone."""
        done = self.compiling.get(number, Future())
        with contextlib.suppress(InvalidStateError):
            done.set_result(refused)

    def _step(self, news):
        self.news, changed = news, []
        for number, new, reused, finished in news.changed:
            listener = self.listeners.get(number)
            if listener is None:
                continue
            request = listener.request
            for name, values in new.items():
                getattr(request, name).extend(values)
            request.reused, request.finished = reused, finished
            changed.append(listener)
        self._tell(changed)
        self.metrics.step(news)

    def _end(self, failure):
        """The first call counts: requests end, and who listens for failures is told."""
        with self.ending:
            if self.has_ended:
                return
            self.has_ended, self.failure = True, failure
            self.orders.put(None)
        listeners = [*self.listeners.values()]
        for listener in listeners:
            listener.request.finished = listener.request.finished or "error"
        self._tell(listeners)
        for number in [*self.compiling]:
            self._compiled(number, Refused(*ENDED))
        if failure is not None and self.on_failure:
            self.on_failure()

    def _tell(self, listeners):
        """All news of a step by one call of each loop."""
        by_loop, now = {}, time.monotonic()
        for listener in listeners:
            self.metrics.news(listener, listener.note(), now)
            by_loop.setdefault(listener.loop, []).append(listener)
            if listener.request.finished:
                self.listeners.pop(listener.request.number, None)
        for loop, told in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has the server
                loop.call_soon_threadsafe(_deliver, told)

    def close(self, seconds=30):
        """End the engine; False where it does not end in time."""
        self.is_closed = True
        self.order("close")
        self.thread.join(seconds)
        return self.link.close(seconds)


def _deliver(listeners):
    for listener in listeners:
        if not listener.is_queued:
            listener.is_queued = True
            listener.queue.put_nowait(listener)
