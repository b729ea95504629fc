// A module of a class of its own, which libtvm_ffi calls, and that is asked through libtvm_ffi.
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

using namespace tvm::ffi;

class OwnModule : public ModuleObj {
 public:
  const char* kind() const final { return "fi_ffi_tests.own"; }
  Optional<Function> GetFunction(const String& name) final {
    if (name != "seven") return std::nullopt;
    return Function::FromTyped([]() -> int { return 7; });
  }
};

static Module make() { return Module(make_object<OwnModule>()); }

static int ask(Module module, String name) {
  Optional<Function> found = module->GetFunction(name, true);
  return found.has_value() ? found.value()().cast<int>() : -1;
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(make, make);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(ask, ask);
