"""What `fi_ffi.capture` refuses without a GPU."""

from __future__ import annotations

import pytest

import fi_ffi
from fi_ffi.abi import streams

VALUE, TYPE = fi_ffi.ArgumentError, fi_ffi.ArgumentTypeError
REFUSED = [
    *(("stream", stream, VALUE, "default stream") for stream in (0, 1, 2)),
    *(("stream", stream, VALUE, "") for stream in (None, "s", 1.5, -1, True)),
    *(("into", into, TYPE, "") for into in (0, "graph", object())),
    *(("device", device, VALUE, "") for device in ("cpu", "gpu", 3)),
]


@pytest.mark.parametrize(("argument", "value", "kind", "words"), REFUSED)
def test_what_is_refused(argument, value, kind, words):
    with pytest.raises(kind, match=f"capture: argument `{argument}`.*{words}"):
        fi_ffi.capture(**{"stream": 77, argument: value})


def test_a_new_graph_is_of_its_streams_device(monkeypatch):
    assert fi_ffi.capture(77).graph.device.index == 0
    monkeypatch.setattr(streams, "device_of", lambda handle: {77: 1}.get(handle))
    assert fi_ffi.capture(77).graph.device.index == 1
    assert fi_ffi.capture(78).graph.device.index == 0, "CUDA does not tell"
    with pytest.raises(VALUE, match="stream of cuda:1, expected a stream of cuda:0"):
        fi_ffi.capture(77, device="cuda:0")


def test_graphs_of_nothing_and_captures_that_are_not_open():
    graph = fi_ffi.Graph(fi_ffi.parse_device("cuda:0"))
    with pytest.raises(fi_ffi.ArgumentError, match="an empty graph"):
        graph.launch(77)
    with pytest.raises(fi_ffi.ArgumentError, match="a closed capture"):
        fi_ffi.capture(77).__exit__(None, None, None)
