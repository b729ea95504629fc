"""Text from a checkpoint, token by token.

    python3 examples/llm/generate.py "Once upon a time"            # a tiny random model, made here
    python3 examples/llm/generate.py --model FOLDER "Once upon a time"

Several prompts are served together.  Without a GPU, or with --cpu, numpy computes.  With --tp N
the model is split over N GPUs, a process each, or with --ray over those that Ray has.
"""

import argparse
import functools
import sys
import tempfile
import threading
import time
from pathlib import Path

import early

if __name__ == "__main__" and "--cpu" not in sys.argv:
    early.begin()  # beside the imports

from engine import Sampling, end_process, load, watch
from engine.words import Decoder, Words
from tokenizers import Tokenizer

PAGES = 1024  # of the cache, 16 tokens each
ASKED = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", help="a folder in the hub's layout; else a tiny one is made")
    parser.add_argument("--tiny", default="qwen3", choices=("llama", "qwen3", "qwen3_next"))
    parser.add_argument("--cpu", action="store_true", help="the reference kernels, in numpy")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that the model is split over")
    parser.add_argument("--ray", action="store_true", help="Ray places ranks, on any machine")
    parser.add_argument("--max-tokens", type=int, default=32)
    for name, kind in ASKED.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, help="(default: the checkpoint's)")
    parser.add_argument("--seed", type=int)
    return parser.parse_args()


def main():
    given = arguments()
    asked = {name: value for name in ASKED if (value := getattr(given, name)) is not None}
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if model is None:
            from tiny import make_tiny

            model = make_tiny(folder, given.tiny)
            about = f"a tiny {given.tiny} of random weights: what it writes means nothing"
            print(about, file=sys.stderr)
        try:
            Sampling(**asked)  # before a model is loaded for nothing
            device, way = "cpu" if given.cpu else None, "ray" if given.ray else "processes"
            engine = load(model, device, num_pages=PAGES, tp=given.tp, way=way)
            drawn = engine.config.sampling | asked
            sampling = Sampling(seed=given.seed, max_tokens=given.max_tokens, **drawn)
            words = Words(Tokenizer.from_file(str(Path(model) / "tokenizer.json")))
            prompts = [words.tokenizer.encode(text).ids for text in given.prompts]
            requests = [engine.submit(ids, sampling) for ids in prompts]
        except (OSError, ValueError, KeyError) as wrong:
            sys.exit(f"generate.py: {wrong.args[0] if isinstance(wrong, KeyError) else wrong}")
    ended, start = threading.Event(), time.perf_counter()
    said = functools.partial(print, "generate.py: a rank is lost", file=sys.stderr)
    watch(engine.runner, ended, lambda: (said(), end_process()))
    decoders = [Decoder(words, request.prompt) for request in requests]
    texts, told, is_one = [*given.prompts], [0] * len(requests), len(requests) == 1
    if is_one:  # as it comes; several would mix
        print(texts[0], end="", flush=True)
    while engine.step() is not None:
        for i, request in enumerate(requests):
            piece = "".join(map(decoders[i].step, request.tokens[told[i] :]))
            texts[i], told[i] = texts[i] + piece, len(request.tokens)
            if is_one:
                print(piece, end="", flush=True)
    if not is_one:
        print(*texts, sep="\n---\n", end="")
    seconds = time.perf_counter() - start
    print(f"\n{sum(told)} tokens, {sum(told) / seconds:.1f} a second", file=sys.stderr)
    ended.set()
    engine.close()


if __name__ == "__main__":
    main()
