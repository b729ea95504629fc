// Types and functions that are registered, none exported, and that misbehave.
#include <tvm/ffi/function.h>
#include <tvm/ffi/object.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/reflection/overload.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/ffi/string.h>

#include <deque>

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

// Types that get more members later.
class GrowingObj : public Object {
 public:
  int64_t first = 1;
  TVM_FFI_DECLARE_OBJECT_INFO("fi_ffi_tests.Growing", GrowingObj, Object);
};

class GrownObj : public GrowingObj {
 public:
  int64_t second = 2;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("fi_ffi_tests.Grown", GrownObj, GrowingObj);
};

static int fail(void*, TVMFFIAny*) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", "no value today");
  return -1;
}

static int fail_to_set(void*, const TVMFFIAny*) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", "no value today");
  return -1;
}

// Members, and types, that are registered when a test asks for them.
static int get_seven(void*, TVMFFIAny* result) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = 7;
  return 0;
}

static int32_t index_of(const String& key) {
  TVMFFIByteArray name{key.data(), key.size()};
  int32_t index = 0;
  TVM_FFI_CHECK_SAFE_CALL(TVMFFITypeKeyToIndex(&name, &index));
  return index;
}

static void register_field(String key, String name) {
  TVMFFIFieldInfo field{};
  field.name = {name.data(), name.size()};
  field.getter = get_seven;
  field.default_value_or_factory = TVMFFIAny{};
  TVM_FFI_CHECK_SAFE_CALL(TVMFFITypeRegisterField(index_of(key), &field));
}

static void register_method(String key, String name, int64_t value) {
  static std::deque<Function> kept;
  kept.push_back(Function::FromTyped([value](AnyView) { return value; }));
  TVMFFIMethodInfo method{};
  method.name = {name.data(), name.size()};
  method.method = AnyView(kept.back()).CopyToTVMFFIAny();
  TVM_FFI_CHECK_SAFE_CALL(TVMFFITypeRegisterMethod(index_of(key), &method));
}

static void register_type(String key) {
  TVMFFIByteArray name{key.data(), key.size()};
  TVMFFITypeGetOrAllocIndex(&name, -1, 1, 0, 0, TypeIndex::kTVMFFIObject);
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
  refl::ObjectDef<GrowingObj>().def_ro("first", &GrowingObj::first);
  refl::ObjectDef<GrownObj>().def(refl::init<>()).def_ro("second", &GrownObj::second);
  refl::GlobalDef()
      .def("fi_ffi_tests.register_field", register_field)
      .def("fi_ffi_tests.register_method", register_method)
      .def("fi_ffi_tests.register_type", register_type);
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
