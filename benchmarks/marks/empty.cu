// What launching costs at the least: an empty kernel, launched in a loop.
#include <chrono>
#include <cstdint>

__global__ void nothing() {}

// Nanoseconds that `calls` launches took; `code` is CUDA's error code after the last.
extern "C" int64_t fi_ffi_launch(void *stream, int64_t calls, int *code) {
  auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls; ++i) nothing<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>();
  auto taken = std::chrono::steady_clock::now() - start;
  *code = cudaGetLastError();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count();
}
