// Types and functions that are registered, none exported, and that misbehave.
#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/reflection/overload.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

using namespace tvm::ffi;

class OddObj : public Object {
 public:
  int64_t release;
  int64_t handle = 6;
  int64_t fails = 0;
  explicit OddObj(int64_t value) : release(value) {}
  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("fi_ffi_tests.Odd", OddObj, Object);
};

class Odd : public ObjectRef {
 public:
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(Odd, ObjectRef, OddObj);
};

// Holds objects of any type.
class HolderObj : public Object {
 public:
  ObjectRef value;
  Optional<ObjectRef> optional_value;
  HolderObj(ObjectRef value, Optional<ObjectRef> optional_value)
      : value(value), optional_value(optional_value) {}
  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("fi_ffi_tests.Holder", HolderObj, Object);
};

static int fail(void*, TVMFFIAny*) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", "no value today");
  return -1;
}

static int fail_to_set(void*, const TVMFFIAny*) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", "no value today");
  return -1;
}

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  refl::OverloadObjectDef<OddObj>()
      .def(refl::init<int64_t>())
      .def_rw("release", &OddObj::release)
      .def_rw("_handle", &OddObj::handle)
      .def("field", [](const OddObj*) { return 7; })
      .def("itself", [](Odd self) { return self; })
      .def("either", [](const OddObj*, int64_t value) { return value; })
      .def("either", [](const OddObj*, String text) { return static_cast<int64_t>(text.size()); });
  refl::ObjectDef<HolderObj>()
      .def(refl::init<ObjectRef, Optional<ObjectRef>>())
      .def_rw("value", &HolderObj::value)
      .def_rw("optional_value", &HolderObj::optional_value);
  // By hand: a field whose getter fails, and a method that takes any number of arguments.
  TVMFFIFieldInfo field{};
  field.name = {"fails", 5};
  field.flags = kTVMFFIFieldFlagBitMaskWritable;
  field.getter = fail;
  field.setter = reinterpret_cast<void*>(fail_to_set);
  TVMFFIAny nothing{};
  field.default_value_or_factory = nothing;
  TVM_FFI_CHECK_SAFE_CALL(TVMFFITypeRegisterField(OddObj::_GetOrAllocRuntimeTypeIndex(), &field));
  static Function packed = Function::FromPacked(
      [](PackedArgs args, Any* result) { *result = static_cast<int64_t>(args.size()); });
  TVMFFIMethodInfo method{};
  method.name = {"packed", 6};
  method.method = AnyView(packed).CopyToTVMFFIAny();
  TVM_FFI_CHECK_SAFE_CALL(TVMFFITypeRegisterMethod(OddObj::_GetOrAllocRuntimeTypeIndex(), &method));
}
