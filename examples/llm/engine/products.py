"""Matrix products on a GPU: cuBLAS's, and a kernel for the few rows of a small batch.

A product of few rows takes as long as its weights take to be read.  cuBLAS begins with that
when the kernel before has ended; this kernel asks for its first weights before, and for more
of them at a time.
"""

import numpy as np

ROWS = 8  # the most that the kernel takes
# Rows of the weight that a block has, columns that a warp takes at once, warps of a block.
TALL, RUN, WARPS = 16, 128, 16

SOURCE = f"""
constexpr int RUN = {RUN}, WARPS = {WARPS};
"""
SOURCE += r"""
#ifdef FLOAT16
#define KIND "f16"
#else
#define KIND "bf16"
#endif
struct alignas(16) Eight { unsigned x, y, z, w; };  // numbers, two by two

__device__ Eight read_once(const T* from) {
  Eight v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
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

__device__ void write(T* to, float x) { *to = store(x); }
__device__ void write(float* to, float x) { *to = x; }

// out = x @ weight.T for at most 8 rows of x.  Each block has 16 rows of the weight, and each
// of its 16 warps every 16th run of 128 columns of them; a row's sums do not depend on how many
// rows there are.  Which columns the tensor cores take for the first 16 does not matter as long
// as a lane has the same of both matrices, so each reads 8 neighbours at once.
//
// IS_GATED: out = silu(x @ gate.T) * (x @ up.T), of a weight that is gate's rows and then up's;
// a block has 8 rows of each.
template <typename O, bool IS_GATED>
__device__ void few_rows(O* out, const T* x, const T* weight, int rows, int columns,
                         long long x_step, long long out_step) {
  constexpr int PARTS = RUN / 32;
  __shared__ float found[WARPS][4][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, place = lane % 4;
  const int start = warp * RUN + place * 8;
  const T* upper = weight + (blockIdx.x * (IS_GATED ? 8LL : 16LL) + row) * columns;
  const T* lower = upper + (IS_GATED ? 8LL * gridDim.x : 8LL) * columns;
  Eight up[PARTS], low[PARTS];
  float sums[4] = {};
  auto read = [&](int from) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      up[i] = read_once(upper + from + 32 * i);
      low[i] = read_once(lower + from + 32 * i);
    }
  };
#if __CUDA_ARCH__ >= 900
  // The kernel after this may be put in place now; this one's weights are nobody's result.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  if (start < columns) read(start);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  x += min(row, rows - 1) * x_step;
  for (int from = start; from < columns;) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      const Eight b = *(const Eight*)(x + from + 32 * i);
      multiply(sums, up[i].x, low[i].x, up[i].y, low[i].y, b.x, b.y);
      multiply(sums, up[i].z, low[i].z, up[i].w, low[i].w, b.z, b.w);
    }
    from += WARPS * RUN;
    if (from < columns) read(from);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) found[warp][i][lane] = sums[i];
  __syncthreads();
  const int column = place * 2 + warp % 2;
  if (warp >= (IS_GATED ? 2 : 4) || column >= rows) return;
  auto sum = [&](int which) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += found[w][which][lane];
    return all;
  };
  const float mine = sum(warp);
  const int at = blockIdx.x * (IS_GATED ? 8 : 16) + warp / 2 * 8 + row;
  write(out + column * out_step + at, IS_GATED ? mine * sigmoid(mine) * sum(warp + 2) : mine);
}

#define FEW_ROWS(name, O, IS_GATED)                                                         \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) name(                         \
      O* out, const T* x, const T* weight, int rows, int columns, long long x_step,         \
      long long out_step) {                                                                 \
    few_rows<O, IS_GATED>(out, x, weight, rows, columns, x_step, out_step);                 \
  }
FEW_ROWS(few_rows_to_half, T, false)
FEW_ROWS(few_rows_to_float, float, false)
FEW_ROWS(few_rows_silu, T, true)
"""
KERNELS = ("few_rows_to_half", "few_rows_to_float", "few_rows_silu")


class Products:
    """`linear` of a `Gpu`, with a cuBLAS handle on its stream."""

    WORKSPACE = 32 << 20  # what NVIDIA recommends for cuBLAS on Hopper

    def __init__(self, gpu):
        from nvmath.bindings import cublas

        self.gpu, self.cublas = gpu, cublas
        self.blas = cublas.create()
        cublas.set_stream(self.blas, gpu.stream)
        # Of its own, for cuBLAS may not allocate while a graph is captured.
        workspace = gpu.empty((self.WORKSPACE,), "uint8")
        cublas.set_workspace(self.blas, workspace.ptr, self.WORKSPACE)
        self.factors = np.array([1.0, 0.0], np.float32)

    def is_few(self, x, weight):
        """Whether the kernel takes them."""
        return x.shape[0] <= ROWS and not (weight.shape[0] % TALL or weight.shape[1] % RUN)

    def linear(self, out, x, weight):
        """out = x @ weight.T, summed in float32."""
        if not self.is_few(x, weight):
            self.by_cublas(out, x, weight)
        elif out.dtype.name == "float32":
            self._few("few_rows_to_float", out, x, weight)
        else:
            self._few("few_rows_to_half", out, x, weight)

    def linear_silu(self, out, x, weight):
        """out = silu(x @ gate.T) * (x @ up.T), of few rows; the weight is gate and then up."""
        self._few("few_rows_silu", out, x, weight)

    def _few(self, kernel, out, x, weight):
        steps = np.int64(x.strides[0]), np.int64(out.strides[0])
        grid = (weight.shape[0] // TALL, 1)
        self.gpu.launch(kernel, grid, 32 * WARPS, out, x, weight, *x.shape, *steps, early=True)

    def by_cublas(self, out, x, weight):
        """cuBLAS counts columns first, so that a row-major matrix is its transpose there."""
        kinds = {"float16": 2, "bfloat16": 14, "float32": 0}  # cudaDataType
        (count, inner), width = x.shape, weight.shape[0]
        one, nought = self.factors.ctypes.data, self.factors.ctypes.data + 4
        kind, blas = kinds[x.dtype.name], self.cublas
        blas.gemm_ex(
            self.blas, blas.Operation.T, blas.Operation.N, width, count, inner,
            one, weight.ptr, kind, weight.strides[0], x.ptr, kind, x.strides[0],
            nought, out.ptr, kinds[out.dtype.name], out.strides[0],
            blas.ComputeType.COMPUTE_32F, blas.GemmAlgo.DEFAULT,
        )  # fmt: skip

    def close(self):
        self.cublas.destroy(self.blas)
