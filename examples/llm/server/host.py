"""The engine behind a pipe: orders go in, and news of its steps come out.

It runs in a process of its own, so that what clients are told delays no step; or on a thread.
"""

import atexit
import contextlib
import itertools
import multiprocessing
import threading
import time
import traceback
from collections import namedtuple
from queue import PriorityQueue

from engine import Requests, alone, end_process, spawned, watch

from .schema import Refused

# What a request gets as it goes on.
GROWING = ("tokens", "logprobs", "prompt_logprobs")

# How the engine is: requests that it was given so far, free slots, the seconds of the step or None;
# of each that has `changed`: (number, {name: new values}, tokens found in the cache, why it ended).
News = namedtuple("News", "changed submitted waiting running slots pages used_pages seconds")


class Host:
    """Runs an engine, which is its own, as the orders say that come through a pipe.

    An order is the name of a method and what it is given; so are news, of one of `Service`.
    `grammars` is called on a thread of its own, so that a slow schema blocks no step: schemas that
    others wait for come before it.
    """

    def __init__(self, engine, pipe, grammars=None):
        self.engine, self.pipe, self.grammars = engine, pipe, grammars
        self.told, self.compiled, self.submitted = {}, {}, 0
        self.sending, self.ended = threading.Lock(), threading.Event()
        # Of schemas: (whether it has been tried, its turn, what it is); and requests that wait.
        self.schemas, self.turns, self.awaited = PriorityQueue(), itertools.count(), set()
        threading.Thread(target=self._compile, name="compile", daemon=True).start()

    def run(self):
        """Until the order to close, or the pipe's other end is closed; False after an error."""
        watch(self.engine.runner, self.ended, self._lost)
        try:
            self._tell(())
            is_idle = True
            while self._take(is_idle):
                start = time.monotonic()
                changed = self.engine.step()
                is_idle = changed is None
                self._tell(changed or (), None if is_idle else time.monotonic() - start)
        except BaseException as failure:
            # An error of the device, for which there is no help.
            traceback.print_exc()
            self._send("failed", str(failure))
            return False
        else:
            self.engine.close()
            return True
        finally:
            self.ended.set()
            self.schemas.put((False, -1, None))
            self.pipe.close()

    def _lost(self):
        self._send("failed", "a rank is lost")
        if multiprocessing.parent_process():
            end_process()  # the step may never return

    def _take(self, is_idle):
        """Do as is ordered; where there is nothing else to do, wait for that.  False at the end."""
        with contextlib.suppress(EOFError, OSError):
            while self.pipe.poll(None if is_idle else 0):
                name, *given = self.pipe.recv()
                if name == "close":
                    return False
                getattr(self, name)(*given)
                is_idle = False
            return True
        return False

    def _send(self, *news):
        with self.sending, contextlib.suppress(OSError):  # nobody listens any more
            self.pipe.send(news)

    def _tell(self, requests, seconds=None):
        changed = []
        for request in requests:
            told = self.told.get(request.number)
            if told is None:  # it was cancelled
                continue
            counts = told[1]  # of what was told, by name
            grown = [name for name, count in counts.items() if len(getattr(request, name)) > count]
            new = {name: getattr(request, name)[counts[name] :] for name in grown}
            counts.update((name, counts[name] + len(values)) for name, values in new.items())
            changed.append((request.number, new, request.reused, request.finished))
            if request.finished:
                del self.told[request.number]
        engine, pages = self.engine, self.engine.pages
        used = pages.total - len(pages.free) - len(pages.idle)
        counts = map(len, (engine.waiting, engine.running, engine.slots))
        self._send("step", News(changed, self.submitted, *counts, pages.total, used, seconds))

    def submit(self, request):
        request.grammar = self.compiled.pop(request.number, None)
        self.told[request.number] = request, dict.fromkeys(GROWING, 0)
        self.submitted += 1
        self.engine.waiting.append(request)

    def cancel(self, number):
        self.awaited.discard(number)
        self.compiled.pop(number, None)
        if told := self.told.pop(number, None):
            self.engine.cancel(told[0])

    def cancel_all(self):
        ended = [request for request, _ in self.told.values()]
        for request in ended:
            self.engine.cancel(request)
        self._tell(ended)

    def constrain(self, numbers, schema, param):
        """Make a grammar for each of these requests, which are submitted after that."""
        self.awaited.update(numbers)
        self.schemas.put((False, next(self.turns), (numbers, schema, param)))

    def _compile(self):
        while True:
            is_patient, _, job = self.schemas.get()
            if job is None:
                return
            numbers, *given = job
            wanted, refused = [n for n in numbers if n in self.awaited], None
            try:
                for number in wanted:
                    grammar = self.grammars(*given, is_patient)
                    if number in self.awaited:
                        self.compiled[number] = grammar
            except TimeoutError:  # when nobody else waits there is more time for it
                self.schemas.put((True, next(self.turns), job))
                continue
            except Refused as wrong:
                refused = wrong
            except Exception:
                traceback.print_exc()
                refused = Refused("the server has failed", 500)
            self.awaited.difference_update(numbers)
            self._send("compiled", numbers[0], refused)


class Link:
    """The other end: `requests` makes those of the engine, `pipe` takes orders and brings news."""

    def __init__(self, requests, pipe, worker):
        self.requests, self.pipe, self.worker = requests, pipe, worker

    @classmethod
    def here(cls, engine, grammars=None):
        """To an engine on a thread of this process."""
        pipe, there = multiprocessing.Pipe()
        host = Host(engine, there, grammars)
        worker = threading.Thread(target=host.run, name="engine", daemon=True)
        worker.start()
        return cls(engine, pipe, worker)

    @classmethod
    def apart(cls, make, *given):
        """To the engine and grammars that `make` gives in a process of its own; what it raises."""
        pipe, worker = spawned(_host, make, *given, name="engine")
        try:
            made = pipe.recv()
        except EOFError:
            made = RuntimeError("the engine has not started")
        if isinstance(made, Exception):
            worker.join()
            raise made
        atexit.register(pipe.close)  # or this process would wait for that one's end
        return cls(Requests(*made), pipe, worker)

    def close(self, seconds):
        self.worker.join(seconds)
        self.pipe.close()
        return not self.worker.is_alive()


def _host(pipe, make, *given):
    with alone():
        try:
            engine, grammars = make(*given)
        except Exception as wrong:
            pipe.send(wrong)
            return
        pipe.send((engine.config, engine.room))
        if not Host(engine, pipe, grammars).run():
            end_process()  # the device may hang
