"""What /metrics tells, by prometheus-client; written once a step."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SHORT = (.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5)  # fmt: skip
LONG = (.005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10, 30, 60, 120)  # fmt: skip


class Metrics:
    def __init__(self):
        registry = self.registry = CollectorRegistry()

        def of(kind, name, about, **more):
            return kind(f"fi_ffi_{name}", about, registry=registry, **more)

        self.prompt_tokens = of(Counter, "prompt_tokens", "Tokens of prompts of ended requests")
        self.cached_tokens = of(Counter, "cached_tokens", "Of these, found in the cache")
        self.tokens = of(Counter, "generated_tokens", "Tokens drawn")
        self.requests = of(
            Counter, "requests", "Ended requests by why they ended", labelnames=["reason"]
        )
        self.rejected = of(Counter, "rejected_requests", "Requests refused with 429")
        self.waiting = of(Gauge, "waiting_requests", "Requests without a slot")
        self.running = of(Gauge, "running_requests", "Requests with a slot")
        self.pages = of(Gauge, "used_pages", "Pages that requests have")
        self.all_pages = of(Gauge, "pages", "Pages that there are")
        self.step_time = of(Histogram, "step_seconds", "A step of the engine", buckets=SHORT)
        self.first = of(
            Histogram, "first_token_seconds", "From a request to its first token", buckets=LONG
        )
        self.each = of(
            Histogram, "token_seconds", "From a token to the next of a request", buckets=SHORT
        )

    def step(self, news):
        """How the engine is, by a `host.News`."""
        if news.seconds is not None:
            self.step_time.observe(news.seconds)
        self.waiting.set(news.waiting)
        self.running.set(news.running)
        self.pages.set(news.used_pages)
        self.all_pages.set(news.pages)

    def news(self, listener, tokens, now):
        """Of so many tokens of one request, and of its end."""
        if tokens:
            self.tokens.inc(tokens)
            if listener.last is None:
                self.first.observe(now - listener.asked)
            else:
                self.each.observe(now - listener.last)
            listener.last = now
        if listener.request.finished:
            self.ended(listener, listener.request.finished)

    def ended(self, listener, reason):
        self.requests.labels(reason).inc()
        self.prompt_tokens.inc(len(listener.request.prompt))
        self.cached_tokens.inc(listener.request.reused)

    def text(self):
        return generate_latest(self.registry)
