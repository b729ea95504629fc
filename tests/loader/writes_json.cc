// Calls a function of libtvm_ffi whose parameter became a reference.
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/tvm_ffi.h>

static tvm::ffi::String text(tvm::ffi::Any value) { return tvm::ffi::json::Stringify(value); }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(text, text);
