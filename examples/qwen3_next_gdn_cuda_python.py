"""A Qwen3-Next linear attention layer's prefill with carried state, with cuda-python alone.

Two requests come in two pieces each.  Between the pieces a runtime keeps, for each request,
the rule's state and the last inputs of the short convolution.  Random numbers stand for the
model's weights; the projections around the kernel are numpy's, so that the layer can be
read here as a whole.  What the pieces give must be what the whole requests give, and what
the rule gives token by token in float64.

Needs a GPU of compute capability 9.0 and kernels with gdn_prefill_sm90 (FI_FFI_KERNELS, see
docs/gdn.md).  With --cpu it needs neither: the same call runs the reference kernel.
"""

import argparse

import numpy as np

import fi_ffi

KEY_HEADS, VALUE_HEADS, HEAD, CONV = 16, 32, 128, 4
KEYS, VALUES = KEY_HEADS * HEAD, VALUE_HEADS * HEAD
# The kernel rounds what it multiplies to float16: some steps of 2^-10 of the largest value.
TOLERANCE = 4 * 2.0**-10


def silu(x):
    return x / (1 + np.exp(-x))


class Layer:
    """The weights of one layer, and what comes before and after the rule."""

    def __init__(self, hidden, rng):
        def weight(*shape):
            return rng.standard_normal(shape, np.float32) / shape[0] ** 0.5

        self.project = weight(hidden, 2 * KEYS + 2 * VALUES)
        self.project_gates = weight(hidden, 2 * VALUE_HEADS)
        self.conv = weight(CONV, 2 * KEYS + VALUES)
        self.a_log = np.log(rng.uniform(1, 16, VALUE_HEADS)).astype(np.float32)
        self.dt_bias = rng.uniform(-4, 0, VALUE_HEADS).astype(np.float32)
        self.norm = np.ones(HEAD, np.float32)
        self.out = weight(VALUES, hidden)

    def before(self, x, conv_state):
        """The rule's inputs for a request's next tokens, and the convolution's state after."""
        mixed, z = np.split(x @ self.project, [2 * KEYS + VALUES], axis=1)
        padded = np.concatenate([conv_state, mixed])
        mixed = silu(sum(padded[i : i + len(x)] * self.conv[i] for i in range(CONV)))
        q, k, v = np.split(mixed, [KEYS, 2 * KEYS], axis=1)
        q, k, v = (part.reshape(len(x), -1, HEAD) for part in (q, k, v))
        q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
        b, a = np.split(x @ self.project_gates, 2, axis=1)
        inputs = {
            "q": q.astype(np.float16),
            "k": k.astype(np.float16),
            "v": v.astype(np.float16),
            # The gate is made as a logarithm; the kernel takes what it is the logarithm of.
            "alpha": np.exp(-np.exp(self.a_log) * np.logaddexp(0, a + self.dt_bias)),
            "beta": 1 / (1 + np.exp(-b)),
        }
        return inputs, z.reshape(len(x), VALUE_HEADS, HEAD), padded[-(CONV - 1) :]

    def after(self, output, z):
        """Gated RMSNorm of each head, and the projection back."""
        rows = output.astype(np.float32)
        rows /= np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-6)
        return (rows * self.norm * silu(z)).reshape(len(rows), VALUES) @ self.out


class Gpu:
    """Copies of host arrays on cuda:0, and a stream."""

    def __init__(self):
        from cuda.bindings import runtime

        self.cudart, self.arrays = runtime, []
        self.stream = self.check(runtime.cudaStreamCreate())

    @staticmethod
    def check(result):
        error, *values = result
        if int(error):
            raise RuntimeError(error.name)
        return values[0] if values else None

    def put(self, array):
        array = np.ascontiguousarray(array)
        address = self.check(self.cudart.cudaMalloc(max(array.nbytes, 1)))
        to_device = self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.check(self.cudart.cudaMemcpy(address, array.ctypes.data, array.nbytes, to_device))
        self.arrays.append(address)
        return fi_ffi.TensorDesc(address, array.shape, str(array.dtype), device="cuda:0")

    def get(self, desc):
        array = np.empty(desc.shape, desc.dtype.name)
        from_device = self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.check(self.cudart.cudaStreamSynchronize(self.stream))
        self.check(self.cudart.cudaMemcpy(array.ctypes.data, desc.ptr, array.nbytes, from_device))
        return array

    def close(self):
        for address in self.arrays:
            self.check(self.cudart.cudaFree(address))
        self.check(self.cudart.cudaStreamDestroy(self.stream))


class Host:
    """The same interface to plain numpy memory."""

    stream = None

    def put(self, array):
        return np.ascontiguousarray(array)

    def get(self, array):
        return array

    def close(self):
        pass


def prefill(device, layer, pieces, conv_states, state):
    """One piece of every request, its outputs; the states are carried on in place."""
    made = [layer.before(x, conv) for x, conv in zip(pieces, conv_states, strict=True)]
    conv_states[:] = [conv for _, _, conv in made]
    inputs = {
        name: device.put(np.concatenate([given[name] for given, _, _ in made]))
        for name in ("q", "k", "v", "alpha", "beta")
    }
    lengths = [len(x) for x in pieces]
    output = device.put(np.full((sum(lengths), VALUE_HEADS, HEAD), np.nan, np.float16))
    with fi_ffi.watchdog(30):
        fi_ffi.gdn_prefill(
            output=output,
            output_state=state,  # the very memory of input_state
            input_state=state,
            cu_seqlens=device.put(fi_ffi.cu_seqlens(lengths)),
            **inputs,
            stream=device.stream,
        )
    rows = np.split(device.get(output), np.cumsum(lengths)[:-1])
    return [layer.after(row, z) for row, (_, z, _) in zip(rows, made, strict=True)]


def token_by_token(layer, x):
    """A whole request by the rule's definition."""
    inputs, z, _ = layer.before(x, np.zeros((CONV - 1, 2 * KEYS + VALUES), np.float32))
    state, out = np.zeros((VALUE_HEADS, HEAD, HEAD)), []
    q, k = (np.repeat(inputs[name].astype(float), VALUE_HEADS // KEY_HEADS, 1) for name in "qk")
    for t in range(len(x)):
        state *= inputs["alpha"][t, :, None, None]
        new = inputs["v"][t] - np.einsum("hvk,hk->hv", state, k[t])
        state += (inputs["beta"][t, :, None] * new)[:, :, None] * k[t, :, None, :]
        out.append(np.einsum("hvk,hk->hv", state, q[t]) / HEAD**0.5)
    return layer.after(np.array(out), z), state


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="the reference kernel on the CPU")
    cpu = parser.parse_args().cpu
    hidden, lengths, first = (256, (40, 75), (13, 64)) if cpu else (2048, (300, 700), (65, 512))
    rng = np.random.default_rng()
    layer, device = Layer(hidden, rng), Host() if cpu else Gpu()
    requests = [rng.standard_normal((n, hidden), np.float32) for n in lengths]

    conv_states = [np.zeros((CONV - 1, 2 * KEYS + VALUES), np.float32) for _ in requests]
    state = device.put(np.zeros((len(requests), VALUE_HEADS, HEAD, HEAD), np.float32))
    pieces = [[x[:n] for x, n in zip(requests, first, strict=True)],
              [x[n:] for x, n in zip(requests, first, strict=True)]]  # fmt: skip
    outputs = [prefill(device, layer, piece, conv_states, state) for piece in pieces]
    states = device.get(state)
    for i, x in enumerate(requests):
        got = np.concatenate([output[i] for output in outputs])
        expected, last = token_by_token(layer, x)
        errors = [
            np.abs(a - b).max() / np.abs(b).max() for a, b in ((got, expected), (states[i], last))
        ]
        tokens = f"{first[i]} and {len(x) - first[i]} tokens"
        print(f"request {i}: {tokens}, largest error as a part of the largest value:", end=" ")
        print("output {:.1e}, state {:.1e}".format(*errors))
        assert max(errors) <= TOLERANCE, f"request {i} is wrong"
    device.close()


if __name__ == "__main__":
    main()
