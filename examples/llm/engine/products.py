"""Matrix products on a GPU: cuBLAS's, and a kernel for the few rows of a small batch.

A product of few rows takes as long as its weights take to be read.  cuBLAS begins with that
when the kernel before has ended; this kernel asks for its first weights before, and for more
of them at a time.
"""

import functools
import importlib.util
import itertools
from typing import NamedTuple

import numpy as np

from .weights import Blocks

ROWS = 8  # the most that the kernel takes
NORMED_ROWS = 2  # the most that it normalises on the way: more take longer than a kernel of its own
# How much of the next weight it brings to L2 at its end: before kernels that leave the memory idle,
# and where its blocks leave no room for the next product's, which would read early.
AHEAD = 4 << 20
# Rows of the weight that a block has, columns that a warp takes at once, and the most warps of a
# block, two of which a multiprocessor has room for; one of twice as many, too.
TALL, RUN, WARPS = 16, 128, 16

SOURCE = f"constexpr int RUN = {RUN}, WARPS = {WARPS}, NORMED_ROWS = {NORMED_ROWS};"
SOURCE += r"""
// What makes a float8_e4m3fn in the upper half of 16 bits one of these: its exponent goes
// to the lower end of theirs, and the number is as much too small as their bias is larger.
#ifdef FLOAT16
#define KIND "f16"
constexpr unsigned SHIFT = 1, BITS = 0x3F803F80, LARGER = 0x5C005C00;  // 2^8
#else
#define KIND "bf16"
constexpr unsigned SHIFT = 4, BITS = 0x07F007F0, LARGER = 0x7B807B80;  // 2^120
#endif
constexpr unsigned NOUGHT = 0x80008000;  // -0, which changes nothing that it is added to
typedef unsigned char F8;
struct alignas(16) Eight { unsigned x, y, z, w; };  // numbers, two by two

// a * b + c of two numbers, each rounded once.
__device__ unsigned fma(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn." KIND "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Two numbers of four in fp8, which the selector names.
__device__ unsigned two_of(unsigned four, unsigned which) {
  const unsigned two = __byte_perm(four, 0, which);
  return fma((two & 0x80008000) | ((two >> SHIFT) & BITS), LARGER, NOUGHT);
}

__device__ Eight widened(unsigned x, unsigned y) {
  return {two_of(x, 0x1404), two_of(x, 0x3424), two_of(y, 0x1404), two_of(y, 0x3424)};
}

// Not as memory that is only read (nc): those reads the compiler may put after a wait.
__device__ Eight read_once(const void* from) {
  Eight v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}

// sums += 16 rows of a by 8 rows of b, over 16 columns of both.
__device__ void multiply(float* sums, unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                         unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ float squares_of(unsigned two) {
  return load(two) * load(two) + load(two >> 16) * load(two >> 16);
}

__device__ void write(T* to, float x) { *to = store(x); }
__device__ void write(float* to, float x) { *to = x; }
__device__ float load(float x) { return x; }

// out = x @ weight.T for at most 8 rows of x.  Each block has 16 rows of the weight, and its warps
// take runs of 128 columns of them in turn; a row's sums do not depend on how many rows there are.
// Which columns the tensor cores take for the first 16 does not matter as long as a lane has the
// same of both matrices, so each reads 8 neighbours at once.
// IS_GATED: out = silu(x @ gate.T) * (x @ up.T), of a weight that is gate's rows and then up's; a
// block has 8 rows of each.
// IS_NORMED: of the norm of x.  Each block sums squares up as it goes, and divides by the root of
// their mean at the end.  Else, if `adds`, the products are added to what is in `out`.
// Last, each block asks L2 for its share of what the next product reads.
// A weight in fp8 (W) has a scale for each 128 x 128, which a run of columns is multiplied with.
template <typename O, typename W, bool IS_GATED, bool IS_NORMED>
__device__ void few_rows(O* out, const T* x, const W* weight, const float* scales, int rows,
                         int columns, long long x_step, long long out_step, const T* norm,
                         float eps, int adds, const char* ahead, int share) {
  constexpr bool IS_FP8 = sizeof(W) == 1;
  constexpr int EACH = 16 / sizeof(W), PARTS = RUN / (4 * EACH);  // what a lane reads at once
  __shared__ float found[IS_NORMED ? WARPS : 2 * WARPS][4][32], squares[WARPS][NORMED_ROWS];
  __shared__ __align__(16) T scaled[IS_NORMED ? WARPS : 1][NORMED_ROWS][RUN + 8];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = lane / 4, place = lane % 4, start = warp * RUN + place * EACH;
  const int first = blockIdx.x * (IS_GATED ? 8 : 16);
  const int second = first + (IS_GATED ? 8 * gridDim.x : 8);
  const W* upper = weight + (first + row) * (long long)columns;
  const W* lower = weight + (second + row) * (long long)columns;
  Eight up[PARTS], low[PARTS];
  float sums[4] = {};
  auto read = [&](int from) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      up[i] = read_once(upper + from + 4 * EACH * i);
      low[i] = read_once(lower + from + 4 * EACH * i);
    }
  };
  make_way();
  if (start < columns) read(start);
  Four scale;
  if (IS_NORMED && start < columns) scale = *(const Four*)(norm + warp * RUN + 4 * lane);
  wait();
  const int column = place * 2 + warp % 2;
  const bool is_writer = warp < (IS_GATED ? 2 : 4) && column < rows;
  O* to = out + column * out_step + blockIdx.x * (IS_GATED ? 8 : 16) + warp / 2 * 8 + row;
  float before = 0;
  if (!IS_GATED && !IS_NORMED && adds && is_writer) before = load(*to);
  const int row_of_x = min(row, rows - 1);
  float squared[NORMED_ROWS] = {};
  for (int from = start; from < columns;) {
    constexpr int GROUPS = EACH / 8;  // of 8 numbers, of what a lane reads at once
    const int at = from - place * EACH + 4 * lane;  // of the numbers that this lane scales
    if (IS_NORMED) {
      if (from != start) scale = *(const Four*)(norm + at);
      __syncwarp();
#pragma unroll
      for (int r = 0; r < NORMED_ROWS; r++) {
        if (r >= rows) break;
        const Four a = *(const Four*)(x + r * x_step + at);
        squared[r] += squares_of(a.x) + squares_of(a.y);
        Four* to = (Four*)scaled[warp][r] + lane;
        *to = {fma(a.x, scale.x, NOUGHT), fma(a.y, scale.y, NOUGHT)};
      }
      __syncwarp();
    }
    const T* mine_of_x =
        IS_NORMED ? scaled[warp][row_of_x] + place * EACH : x + row_of_x * x_step + from;
    Eight b[PARTS * GROUPS];
#pragma unroll
    for (int i = 0; i < PARTS * GROUPS; i++)
      b[i] = *(const Eight*)(mine_of_x + 4 * EACH * (i / GROUPS) + 8 * (i % GROUPS));
    float run[4] = {};
    float* into = IS_FP8 ? run : sums;
    auto add = [&](Eight a, Eight c, Eight b) {
      multiply(into, a.x, c.x, a.y, c.y, b.x, b.y);
      multiply(into, a.z, c.z, a.w, c.w, b.z, b.w);
    };
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const Eight a = up[i], c = low[i];
      if (IS_FP8) {
        add(widened(a.x, a.y), widened(c.x, c.y), b[2 * i]);
        add(widened(a.z, a.w), widened(c.z, c.w), b[2 * i + 1]);
      } else {
        add(a, c, b[i]);
      }
    }
    if (IS_FP8) {
      const float* of_run = scales + from / RUN;
      const float high = of_run[first / 128 * (columns / RUN)];
      const float deep = of_run[second / 128 * (columns / RUN)];
      sums[0] += run[0] * high; sums[1] += run[1] * high;
      sums[2] += run[2] * deep; sums[3] += run[3] * deep;
    }
    from += warps * RUN;
    if (from < columns) read(from);
  }
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0 && share)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                 : : "l"(ahead + blockIdx.x * (long long)share), "r"(share) : "memory");
#endif
#pragma unroll
  for (int i = 0; i < 4; i++) found[warp][i][lane] = sums[i];
  if (IS_NORMED)
#pragma unroll
    for (int r = 0; r < NORMED_ROWS; r++) {
      for (int half = 16; half; half /= 2) squared[r] += __shfl_xor_sync(~0u, squared[r], half);
      if (lane == 0) squares[warp][r] = squared[r];
    }
  __syncthreads();
  if (!is_writer) return;
  float factor = 1;
  if (IS_NORMED) {
    float all = 0;
#pragma unroll 4
    for (int w = 0; w < warps; w++) all += squares[w][column];
    factor = rsqrtf(all / columns + eps);
  }
  auto sum = [&](int which) {
    float all = 0;
#pragma unroll 4
    for (int w = 0; w < warps; w++) all += found[w][which][lane];
    return all * factor;
  };
  const float mine = sum(warp);
  write(to, IS_GATED ? mine * sigmoid(mine) * sum(warp + 2) : before + mine);
}

#define FEW_ROWS(name, O, W, IS_GATED, IS_NORMED)                                             \
  extern "C" __global__ void                                                                  \
  __launch_bounds__(IS_NORMED ? 32 * WARPS : 64 * WARPS, IS_NORMED ? 2 : 1) name(             \
      O* out, const T* x, const W* weight, const float* scales, int rows, int columns,        \
      long long x_step, long long out_step, const T* norm, float eps, int adds,               \
      const char* ahead, int share) {                                                         \
    few_rows<O, W, IS_GATED, IS_NORMED>(out, x, weight, scales, rows, columns, x_step,        \
                                        out_step, norm, eps, adds, ahead, share);             \
  }
"""


def _name(*kinds):
    return "_".join(("few_rows", *map(str, kinds))).lower()


# By name: what comes out, the weight, whether it is of two halves, and whether x is a norm.
KERNELS = {
    _name(*kinds): ", ".join(kinds)
    for kinds in itertools.product(("T", "float"), ("T", "F8"), *[("false", "true")] * 2)
}
SOURCE += "".join(f"FEW_ROWS({name}, {kinds})\n" for name, kinds in KERNELS.items())


class Norm(NamedTuple):
    """What `Products` take for the norm of x."""

    x: object  # [rows, columns]
    weight: object  # [columns]
    eps: float

    @property
    def shape(self):
        return self.x.shape


class Products:
    """`linear` of a `Gpu`, with a cuBLAS handle on its stream."""

    WORKSPACE = 32 << 20  # what NVIDIA recommends for cuBLAS on Hopper

    def __init__(self, gpu):
        if importlib.util.find_spec("nvmath") is None:
            raise ImportError("products on a GPU need cuBLAS: pip install nvmath-python")
        self.gpu, self.blas = gpu, None
        self.factors = np.array([1.0, 0.0], np.float32)
        # out = silu(x @ gate.T) * (x @ up.T), of few rows; the weight is gate and then up.
        self.linear_silu = functools.partial(self._few, is_gated=True)
        self.room = 2 * WARPS * gpu.multiprocessors  # warps of the kernel that run at once
        self.after, self.last = {}, 0  # by address: the weight that is read next

    @functools.cached_property
    def cublas(self):
        from nvmath.bindings import cublas

        self.blas = cublas.create()
        cublas.set_stream(self.blas, self.gpu.stream)
        # Of its own, for cuBLAS may not allocate while a graph is captured.
        workspace = self.gpu.empty((self.WORKSPACE,), "uint8")
        cublas.set_workspace(self.blas, workspace.ptr, self.WORKSPACE)
        return cublas

    def is_few(self, x, weight):
        return x.shape[0] <= ROWS and not (weight.shape[0] % TALL or weight.shape[1] % RUN)

    def linear(self, out, x, weight, is_last=False, adds=False):
        """As `Cpu.linear`, summed in float32; `is_last`: other kernels come before the next."""
        if not self.is_few(x, weight):
            self.by_cublas(out, x, weight, adds)
        else:
            self._few(out, x, weight, is_last=is_last, adds=adds)

    def can_norm(self, x, weight):
        """Whether products of these are quicker with a `Norm`."""
        # float16 may not hold what is not divided yet.
        if x.dtype.name != "bfloat16" or not self.is_few(x, weight):
            return False
        # Each block normalises for itself.
        return x.shape[0] == 1 or (x.shape[0] <= NORMED_ROWS and self._warps(weight)[1])

    def _warps(self, weight):
        """Warps of a block, and whether there is room for all blocks at once."""
        rows, columns = weight.shape
        blocks = rows // TALL
        warps = min(max(columns // RUN, 4), WARPS)  # four of them write
        if blocks <= self.gpu.multiprocessors and columns >= 2 * WARPS * RUN:
            return 2 * WARPS, True
        if blocks * warps <= self.room:
            return warps, True
        return WARPS, False  # fewer at once read faster

    def _few(self, out, x, weight, is_gated=False, is_last=False, adds=False):
        is_normed = isinstance(x, Norm)
        x, norm, eps = x if is_normed else (x, np.uint64(0), 0)
        if is_normed and x.shape[0] > NORMED_ROWS:
            raise ValueError(f"{x.shape[0]} rows; {NORMED_ROWS} at most are normalised on the way")
        is_fp8 = isinstance(weight, Blocks)
        kind = "float" if out.dtype.name == "float32" else "T"
        name = _name(kind, "F8" if is_fp8 else "T", is_gated, is_normed)
        blocks, (warps, _) = weight.shape[0] // TALL, self._warps(weight)
        warps = min(warps, WARPS) if is_normed else warps
        given = weight if is_fp8 else (weight, np.uint64(0))
        steps = np.int64(x.strides[0]), np.int64(out.strides[0])
        is_full = blocks * warps > 0.9 * self.room
        most = AHEAD if is_last or is_full else 0
        ahead = self._next(given[0], most, blocks)
        self.gpu.launch(name, (blocks * 32 * warps, 1), out, x, *given, *x.shape, *steps, norm,
                        np.float32(eps), int(adds), *ahead, block=32 * warps)  # fmt: skip

    def _next(self, weight, most, blocks):
        """The weight that was read next the last time, and how much of it each block asks for."""
        self.after[self.last], self.last = weight, weight.ptr
        if weight.ptr not in self.after:
            return np.uint64(0), 0
        following = self.after[weight.ptr]
        return following, min(following.span_bytes, most) // blocks // 16 * 16

    def by_cublas(self, out, x, weight, adds=False):
        """cuBLAS counts columns first, so that a row-major matrix is its transpose there."""
        kinds = {"float16": 2, "bfloat16": 14, "float32": 0}  # cudaDataType
        (count, inner), width = x.shape, weight.shape[0]
        one, nought = self.factors.ctypes.data, self.factors.ctypes.data + 4
        kind, blas = kinds[x.dtype.name], self.cublas
        blas.gemm_ex(
            self.blas, blas.Operation.T, blas.Operation.N, width, count, inner,
            one, weight.ptr, kind, weight.strides[0], x.ptr, kind, x.strides[0],
            one if adds else nought, out.ptr, kinds[out.dtype.name], out.strides[0],
            blas.ComputeType.COMPUTE_32F, blas.GemmAlgo.DEFAULT,
        )  # fmt: skip

    def close(self):
        if self.blas is not None:
            self.cublas.destroy(self.blas)
