// A TVM-FFI entry called in a loop, as a C++ program would call it: packed arguments, a
// stream that is set once, and nothing looked at but the error code.
#include <chrono>
#include <cstdint>

using Entry = int (*)(void *handle, const void *args, int32_t count, void *result);
using SetStream = int (*)(int32_t device_type, int32_t device, void *stream, void **before);

// Nanoseconds that `calls` calls took; `code` is the first error code that was not 0.
// `set_stream` is libtvm_ffi's TVMFFIEnvSetStream, or null for entries without a stream.
extern "C" int64_t fi_ffi_loop(void *entry, void *handle, const void *args, int32_t count,
                               void *result, void *set_stream, void *stream, int64_t calls,
                               int *code) {
  constexpr int32_t cuda = 2, device = 0;  // kDLCUDA
  auto call = reinterpret_cast<Entry>(entry);
  auto set = reinterpret_cast<SetStream>(set_stream);
  void *before = nullptr;
  *code = set ? set(cuda, device, stream, &before) : 0;
  auto start = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls && *code == 0; ++i) {
    *code = call(handle, args, count, result);
  }
  auto taken = std::chrono::steady_clock::now() - start;
  if (set) set(cuda, device, before, nullptr);
  return std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count();
}
