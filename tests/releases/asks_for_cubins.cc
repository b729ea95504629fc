// What FlashInfer's modules do with `cubin_loader.h` of their release, which stands beside this file.
#include <tvm/ffi/tvm_ffi.h>

#include <stdexcept>
#include <string>
#include <thread>

namespace asking {
#include "cubin_loader.h"

static std::string found(const std::string& name, const std::string& sha256) {
  std::string cubin = getCubin(name, sha256);
  if (cubin.empty()) throw std::runtime_error("Failed to load cubin for " + name);
  return cubin;
}

static tvm::ffi::Bytes get(tvm::ffi::String name, tvm::ffi::String sha256) {
  return tvm::ffi::Bytes(found(name, sha256));
}

// On a thread that Python does not know.
static int64_t size_on_a_thread(tvm::ffi::String name, tvm::ffi::String sha256) {
  size_t size = 0;
  std::thread([&] { size = getCubin(name, sha256).size(); }).join();
  if (size == 0) throw std::runtime_error("Failed to load cubin for " + std::string(name));
  return static_cast<int64_t>(size);
}

// As the cuDNN module, which reads all its files at first and uses one: 0 where it got none.
static int64_t size_of_any(tvm::ffi::String name, tvm::ffi::String sha256) {
  return static_cast<int64_t>(getCubin(name, sha256).size());
}

// Asks once in a process.
static tvm::ffi::Bytes get_kept(tvm::ffi::String name, tvm::ffi::String sha256) {
  static std::string kept = getCubin(name, sha256);
  if (kept.empty()) throw std::runtime_error("Failed to load cubin for " + std::string(name));
  return tvm::ffi::Bytes(kept);
}

static void fail() { throw std::runtime_error("not about device code"); }

// Calls Python, which may call this library again, and then gets its file.
static tvm::ffi::Bytes get_after(tvm::ffi::Function before, tvm::ffi::String name,
                                 tvm::ffi::String sha256) {
  before();
  return get(name, sha256);
}

// A thread that goes on asking while the interpreter ends.
static void ask_for_ever(tvm::ffi::String name, tvm::ffi::String sha256) {
  std::thread([name, sha256] {
    for (;;) {
      try {
        getCubin(name, sha256);
      } catch (const std::runtime_error&) {
        return;
      }
    }
  }).detach();
}
}  // namespace asking

TVM_FFI_DLL_EXPORT_TYPED_FUNC(get, asking::get);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(size_on_a_thread, asking::size_on_a_thread);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(size_of_any, asking::size_of_any);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(get_kept, asking::get_kept);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fail, asking::fail);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(get_after, asking::get_after);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ask_for_ever, asking::ask_for_ever);
