"""What /metrics tells, by prometheus-client; written once a step."""

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SHORT = (.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5)  # fmt: skip
LONG = (.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 120)  # fmt: skip
ALL = {
    "prompt_tokens": (Counter, "Tokens of prompts of ended requests"),
    "cached_tokens": (Counter, "Of these, found in the cache"),
    "generated_tokens": (Counter, "Tokens drawn"),
    "requests": (partial(Counter, labelnames=["reason"]), "Ended requests by why they ended"),
    "rejected_requests": (Counter, "Requests refused with 429"),
    "waiting_requests": (Gauge, "Requests without a slot"),
    "running_requests": (Gauge, "Requests with a slot"),
    "used_pages": (Gauge, "Pages that requests have"),
    "pages": (Gauge, "Pages that there are"),
    "step_seconds": (partial(Histogram, buckets=SHORT), "A step of the engine"),
    "first_token_seconds": (partial(Histogram, buckets=LONG), "From a request to its first token"),
    "token_seconds": (partial(Histogram, buckets=SHORT), "From a token to the next of a request"),
}


class Metrics:
    def __init__(self):
        self.registry = CollectorRegistry()
        for name, (kind, about) in ALL.items():
            setattr(self, name, kind(f"fi_ffi_{name}", about, registry=self.registry))

    def step(self, news):
        if news.seconds is not None:
            self.step_seconds.observe(news.seconds)
        self.waiting_requests.set(news.waiting)
        self.running_requests.set(news.running)
        self.used_pages.set(news.used_pages)
        self.pages.set(news.pages)

    def news(self, listener, tokens, now):
        if tokens:
            self.generated_tokens.inc(tokens)
            if listener.last is None:
                self.first_token_seconds.observe(now - listener.asked)
            else:
                self.token_seconds.observe(now - listener.last)
            listener.last = now
        if listener.request.finished:
            self.ended(listener, listener.request.finished)

    def ended(self, listener, reason):
        self.requests.labels(reason).inc()
        self.prompt_tokens.inc(len(listener.request.prompt))
        self.cached_tokens.inc(listener.request.reused)
