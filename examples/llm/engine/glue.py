"""The few small kernels between FlashInfer's, in CUDA (compiled by NVRTC) and in numpy.

Rows by index (embeddings, last tokens, states), what a GDN layer has around its rule, and a
token drawn from a row of probabilities with a number of the request's own, so that what a
request gets does not depend on where in the batch it is.
"""

import numpy as np

from . import products

# The model's dtype is handled by its bits: no headers are needed.
SOURCE = r"""
typedef unsigned short T;
#ifdef FLOAT16
__device__ float load(T x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ T store(float x) { T y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
__device__ float load(T x) { return __uint_as_float((unsigned)x << 16); }
__device__ T store(float x) { T y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#endif
__device__ float sigmoid(float x) { return 1 / (1 + __expf(-x)); }

extern "C" {
// out[i] = table[index[i]], in rows of `words` words of 4 bytes.
__global__ void take(unsigned* out, const unsigned* table, const int* index, long long step,
                     int words) {
  const unsigned* row = table + index[blockIdx.y] * step;
  for (int w = blockIdx.x * blockDim.x + threadIdx.x; w < words; w += gridDim.x * blockDim.x)
    out[blockIdx.y * (long long)words + w] = row[w];
}

// table[index[i]] = values[i]
__global__ void give(unsigned* table, const unsigned* values, const int* index, long long step,
                     int words) {
  unsigned* row = table + index[blockIdx.y] * step;
  for (int w = blockIdx.x * blockDim.x + threadIdx.x; w < words; w += gridDim.x * blockDim.x)
    row[w] = values[blockIdx.y * (long long)words + w];
}

// A token below 0 stands for the last one drawn for slot -1 - token.
__global__ void resolve(int* tokens, const int* latest, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count && tokens[i] < 0) tokens[i] = latest[-1 - tokens[i]];
}

// Each channel's causal convolution over four tokens, and SiLU.  A sequence's last three
// inputs stay in its slot.
__global__ void convolve(T* out, const T* x, const float* weight, T* state, const int* slots,
                         const long long* starts, long long x_step, long long slot_step,
                         int channels) {
  int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= channels) return;
  T* kept = state + slots[blockIdx.y] * slot_step + 3 * c;
  const float* w = weight + 4 * c;
  float a = load(kept[0]), b = load(kept[1]), d = load(kept[2]);
  for (long long t = starts[blockIdx.y]; t < starts[blockIdx.y + 1]; t++) {
    float e = load(x[t * x_step + c]);
    float y = w[0] * a + w[1] * b + w[2] * d + w[3] * e;
    out[t * channels + c] = store(y * sigmoid(y));
    a = b; b = d; d = e;
  }
  kept[0] = store(a); kept[1] = store(b); kept[2] = store(d);
}

// What a token keeps of the state and how much it writes, from (b, a) of each head.
__global__ void decays(float* alpha, float* beta, const T* ba, const float* a_log,
                       const float* dt_bias, int count, int heads) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, t = i / heads, h = i % heads;
  if (t >= count) return;
  float x = load(ba[t * 2 * heads + heads + h]) + dt_bias[h];
  float softplus = x > 20 ? x : log1pf(__expf(x));
  alpha[i] = __expf(-__expf(a_log[h]) * softplus);
  beta[i] = sigmoid(load(ba[t * 2 * heads + h]));
}

// x *= sigmoid(gate), and by the gate as well where it is SiLU.
__global__ void gated(T* x, const T* gate, long long gate_step, int width, int is_silu) {
  const T* row = gate + blockIdx.y * gate_step;
  for (int c = blockIdx.x * blockDim.x + threadIdx.x; c < width; c += gridDim.x * blockDim.x) {
    float g = load(row[c]), factor = sigmoid(g) * (is_silu ? g : 1);
    T* to = x + blockIdx.y * (long long)width + c;
    *to = store(load(*to) * factor);
  }
}

// The token at which the sum of what is at least min_p of the greatest passes `uniform` of the
// whole; the greatest where `uniform` is below 0.  One block of 1024 threads for a row.
__global__ void draw(int* tokens, const float* probs, const float* uniform, const float* min_p,
                     int vocab) {
  __shared__ float sums[1024];
  __shared__ int places[1024];
  const float* row = probs + blockIdx.x * (long long)vocab;
  const int me = threadIdx.x, warp = me / 32, lane = me % 32;
  float greatest = -1;
  int place = vocab;
#pragma unroll 8
  for (int i = me; i < vocab; i += 1024)
    if (row[i] > greatest) { greatest = row[i]; place = i; }
  sums[me] = greatest; places[me] = place;
  for (int half = 512; half; half /= 2) {
    __syncthreads();
    if (me >= half) continue;
    const float other = sums[me + half];
    const int there = places[me + half];
    if (other > sums[me] || (other == sums[me] && there < places[me])) {
      sums[me] = other; places[me] = there;
    }
  }
  __syncthreads();
  const float least = sums[0] * min_p[blockIdx.x], u = uniform[blockIdx.x];
  if (me == 0) tokens[blockIdx.x] = places[0];
  if (u < 0) return;
  // Each warp sums a 32nd of the row, then of the part with the token, until that is one token.
  float target = -1;
  int first = 0, end = vocab, part;
  do {
    part = (end - first + 31) / 32;
    const int start = first + warp * part, stop = min(start + part, end);
    float mine = 0;
#pragma unroll 8
    for (int i = start + lane; i < stop; i += 32) mine += row[i] >= least ? row[i] : 0;
    for (int half = 16; half; half /= 2) mine += __shfl_xor_sync(~0u, mine, half);
    __syncthreads();
    if (lane == 0) sums[warp] = mine;
    __syncthreads();
    if (target < 0) {
      float whole = 0;
      for (int w = 0; w < 32; w++) whole += sums[w];
      if (!(whole > 0)) return;
      target = u * whole;
    }
    int w = 0, chosen = 0;
    for (; w < 32; w++) {
      if (!(sums[w] > 0)) continue;
      chosen = w;
      if (target < sums[w]) break;
      target -= sums[w];
    }
    if (w == 32) target = 1e30f;  // rounding has led past the end: the last one that is left
    first += chosen * part;
    end = min(first + part, end);
  } while (part > 1);
  if (me == 0) tokens[blockIdx.x] = first;
}
}
"""
SOURCE += products.SOURCE
KERNELS = ("take", "give", "resolve", "convolve", "decays", "gated", "draw", *products.KERNELS)


def check(result, log=str):
    """What a call of cuda-python gives besides its error; RuntimeError with what `log` says."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"{type(error).__name__}: {error.name}{log()}")
    return values[0] if len(values) == 1 else values or None


def cubin(dtype, capability):
    """The kernels' machine code for a GPU; NVRTC needs no GPU to compile it."""
    from cuda.bindings import nvrtc

    program = check(nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"glue.cu", 0, [], []))

    def log():
        text = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, text))
        return "\n" + text.decode()

    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
    options += [b"-DFLOAT16"] if dtype == "float16" else []
    check(nvrtc.nvrtcCompileProgram(program, len(options), options), log)
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, code))
    check(nvrtc.nvrtcDestroyProgram(program))
    return code


def compiled(dtype, capability):
    """The kernels by name, in the current context."""
    from cuda.bindings import driver

    module = check(driver.cuModuleLoadData(cubin(dtype, capability)))
    return {name: check(driver.cuModuleGetFunction(module, name.encode())) for name in KERNELS}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def take(out, table, index, step, words):
    out[...] = table[index]


def give(table, values, index, step, words):
    table[index] = values


def resolve(tokens, latest, count):
    tokens[...] = np.where(tokens < 0, latest[-1 - np.minimum(tokens, -1)], tokens)


def convolve(out, x, weight, state, slots, starts, x_step, slot_step, channels):
    for slot, start, end in zip(slots, starts[:-1], starts[1:], strict=True):
        seen = np.concatenate([state[slot].T, x[start:end]]).astype(np.float32)
        y = sum(weight[:, i] * seen[i : i + end - start] for i in range(4))
        out[start:end] = y * sigmoid(y)
        state[slot] = seen[-3:].T


def decays(alpha, beta, ba, a_log, dt_bias, count, heads):
    b, a = ba[:, :heads].astype(np.float32), ba[:, heads:].astype(np.float32)
    alpha[...] = np.exp(-np.exp(a_log) * np.logaddexp(0, a + dt_bias))
    beta[...] = sigmoid(b)


def gated(x, gate, gate_step, width, is_silu):
    g = gate.astype(np.float32)
    x[...] = x.astype(np.float32) * sigmoid(g) * (g if is_silu else 1)


def draw(tokens, probs, uniform, min_p, vocab):
    for i, row in enumerate(probs):
        tokens[i] = row.argmax()
        if uniform[i] >= 0:
            sums = np.cumsum(np.where(row >= row.max() * min_p[i], row, 0), dtype=np.float64)
            tokens[i] = np.searchsorted(sums, uniform[i] * sums[-1], "right")


ON_CPU = {
    "take": take, "give": give, "resolve": resolve, "convolve": convolve, "decays": decays,
    "gated": gated, "draw": draw,
}  # fmt: skip
