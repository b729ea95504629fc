// A library as TVM's compiler and `tvm_ffi` builds make them: with bytes of other modules inside
// (`inside.h`, which the test writes), and variables that are filled in when it is loaded.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string>

namespace ffi = tvm::ffi;

extern "C" {
void* __tvm_ffi__library_ctx = nullptr;
int (*__TVMFFIEnvModLookupFromImports)(TVMFFIObjectHandle, const char*, TVMFFIObjectHandle*) = nullptr;
int (*__TVMFFIFunctionCall)(TVMFFIObjectHandle, TVMFFIAny*, int32_t, TVMFFIAny*) = nullptr;
#ifdef BACKEND
int (*__TVMBackendOfNobody)(int) = nullptr;
#endif
#ifdef INSIDE
extern const unsigned char __tvm_ffi__library_bin[];
const unsigned char __tvm_ffi__library_bin[] = {
#include "inside.h"
};
#endif
}

// A module of bytes: `stored` gives them.
class Stored : public ffi::ModuleObj {
 public:
  explicit Stored(ffi::Bytes content) : content_(std::move(content)) {}
  const char* kind() const final { return KIND; }
  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    if (name != "stored") return std::nullopt;
    return ffi::Function::FromTyped([content = content_]() { return content; });
  }

 private:
  ffi::Bytes content_;
};

#ifdef LOADER  // once in a process for each KIND
TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def(
      "ffi.Module.load_from_bytes." KIND,
      [](ffi::Bytes content) { return ffi::Module(ffi::make_object<Stored>(content)); });
}
#endif

// Calls a function that it imports, as TVM's generated code does.
static ffi::Any call(ffi::String name) {
  TVMFFIObjectHandle function = nullptr;
  TVM_FFI_CHECK_SAFE_CALL(
      __TVMFFIEnvModLookupFromImports(__tvm_ffi__library_ctx, name.c_str(), &function));
  TVMFFIAny result = {};
  TVM_FFI_CHECK_SAFE_CALL(__TVMFFIFunctionCall(function, nullptr, 0, &result));
  return ffi::details::AnyUnsafe::MoveTVMFFIAnyToAny(&result);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(call, call);
