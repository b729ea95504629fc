"""What `fi_ffi.capture` refuses without a GPU."""

from __future__ import annotations

import pytest

import fi_ffi


@pytest.mark.parametrize("stream", [0, 1, 2])
def test_default_streams_cannot_be_recorded(stream):
    with pytest.raises(fi_ffi.ArgumentError, match="capture: argument `stream`.*default stream"):
        fi_ffi.capture(stream)


@pytest.mark.parametrize("stream", [None, "s", 1.5, -1, True])
def test_what_is_no_stream(stream):
    with pytest.raises(fi_ffi.ArgumentError, match="argument `stream`"):
        fi_ffi.capture(stream)


@pytest.mark.parametrize("into", [0, "graph", object()])
def test_what_is_no_graph(into):
    with pytest.raises(fi_ffi.ArgumentTypeError, match="argument `into`"):
        fi_ffi.capture(77, into=into)


@pytest.mark.parametrize("device", ["cpu", "gpu", None, 3])
def test_devices(device):
    with pytest.raises(fi_ffi.ArgumentError, match="argument `device`"):
        fi_ffi.capture(77, device=device)


def test_a_graph_of_nothing():
    graph = fi_ffi.Graph(fi_ffi.parse_device("cuda:0"))
    with pytest.raises(fi_ffi.ArgumentError, match="a graph of nothing"):
        graph.launch(77)


def test_closing_what_is_not_open():
    with pytest.raises(fi_ffi.ArgumentError, match="one not open"):
        fi_ffi.capture(77).__exit__(None, None, None)
