// A function for every kind of parameter and result that TVM-FFI has, compiled by the tests.
#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/dict.h>
#include <tvm/ffi/container/list.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/container/tuple.h>
#include <tvm/ffi/container/variant.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <stdexcept>
#include <string>

using namespace tvm::ffi;

#define EXPORT(name) TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, name)

template <typename T>
T same(T value) {
  return value;
}

#define SAME(name, ...) TVM_FFI_DLL_EXPORT_TYPED_FUNC(same_##name, same<__VA_ARGS__>)

enum class Colour : int64_t { kRed = 0, kGreen = 1 };
using Pair = Tuple<int64_t, String>;
using Numbers = Array<int64_t>;
using OptionalNumbers = Optional<Array<Optional<int64_t>>>;
using Named = Map<String, Numbers>;
using Mutable = Dict<String, int64_t>;
using Either = Variant<double, int64_t, String, Numbers>;

SAME(int, int64_t)
SAME(float, double)
SAME(bool, bool)
SAME(str, String)
SAME(std_string, std::string)
SAME(bytes, Bytes)
SAME(dtype, DLDataType)
SAME(device, DLDevice)
SAME(any, Any)
SAME(colour, Colour)
SAME(optional, Optional<int64_t>)
SAME(numbers, Numbers)
SAME(nested, OptionalNumbers)
SAME(list, List<int64_t>)
SAME(pair, Pair)
SAME(named, Named)
SAME(dict, Mutable)
SAME(either, Either)
SAME(shape, Shape)
SAME(pointer, void*)
SAME(tensor, Tensor)
SAME(tensors, Array<Tensor>)
SAME(object, ObjectRef)
SAME(array, Array<Any>)
SAME(function, Function)
SAME(module, Module)

int64_t c_text_length(const char* text) { return static_cast<int64_t>(std::string(text).size()); }
EXPORT(c_text_length)

int64_t nothing() { return 7; }
EXPORT(nothing)

void no_result(int64_t) {}
EXPORT(no_result)

// What a kernel is told of a tensor.
template <typename T>
Array<Any> tell(const T& tensor) {
  Array<Any> shape, strides;
  for (int i = 0; i < tensor.ndim(); ++i) {
    shape.push_back(tensor.size(i));
    strides.push_back(tensor.stride(i));
  }
  int64_t address = reinterpret_cast<int64_t>(tensor.data_ptr());
  return {address, shape, strides, tensor.dtype(), tensor.device()};
}
Array<Any> told_pointer(DLTensor* tensor) { return tell(TensorView(tensor)); }
Array<Any> told_view(TensorView tensor) { return tell(tensor); }
Array<Any> told_tensor(Tensor tensor) { return tell(tensor); }
Array<Any> told_optional(Optional<TensorView> tensor) {
  return tensor.has_value() ? tell(tensor.value()) : Array<Any>{};
}
EXPORT(told_pointer)
EXPORT(told_view)
EXPORT(told_tensor)
EXPORT(told_optional)

// out[i] = sum of the tensors' elements i, as a kernel would write it.
void add_all(TensorView out, Optional<Array<Tensor>> tensors, Optional<Array<int64_t>> weights) {
  float* to = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < out.size(0); ++i) to[i] = 0;
  if (!tensors.has_value()) return;
  for (size_t t = 0; t < tensors.value().size(); ++t) {
    const float* from = static_cast<const float*>(tensors.value()[t].data_ptr());
    int64_t weight = weights.has_value() ? weights.value()[t] : 1;
    for (int64_t i = 0; i < out.size(0); ++i) to[i] += weight * from[i];
  }
}
EXPORT(add_all)

// The order of many parameters, as a fused MoE's run has them.
String many(int64_t a, double b, bool c, Optional<TensorView> d, Optional<TensorView> e,
            Optional<Array<Tensor>> f, String g, int64_t h, Optional<Array<int64_t>> i, bool j) {
  auto yes = [](bool there) { return std::string(there ? "1" : "0"); };
  return std::to_string(a) + ";" + std::to_string(b) + ";" + yes(c) + ";" + yes(d.has_value()) + ";" +
         yes(e.has_value()) + ";" + std::to_string(f.has_value() ? f.value().size() : 0) + ";" +
         std::string(g) + ";" + std::to_string(h) + ";" +
         std::to_string(i.has_value() ? i.value().size() : 0) + ";" + yes(j);
}
EXPORT(many)

Tensor make_tensor(Shape shape, DLDataType dtype, DLDevice device) {
  return Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, shape, dtype, device);
}
EXPORT(make_tensor)

void fail(String kind, String message) { throw Error(kind, message, ""); }
void fail_std() { throw std::runtime_error("from the standard library"); }
EXPORT(fail)
EXPORT(fail_std)

Any apply(Function function, Array<Any> args) {
  std::vector<AnyView> packed(args.begin(), args.end());
  Any result;
  function.CallPacked(packed.data(), packed.size(), &result);
  return result;
}
int64_t apply_typed(TypedFunction<int64_t(int64_t)> function, int64_t value) {
  return function(value);
}
bool is_null(Function function) { return function == nullptr; }
Function adder(int64_t more) {
  return Function::FromTyped([more](int64_t value) { return value + more; });
}
EXPORT(apply)
EXPORT(apply_typed)
EXPORT(is_null)
EXPORT(adder)

// What a callee keeps after its call.
static Any kept;
void keep(Any value) { kept = value; }
void keep_tensor(Tensor value) { kept = value; }
Any kept_value() { return kept; }
EXPORT(keep)
EXPORT(keep_tensor)
EXPORT(kept_value)

// An object with methods, as runners are.
static int64_t counters = 0;
static int64_t looked_up = 0;

class CounterObj : public ModuleObj {
 public:
  explicit CounterObj(int64_t start) : value_(start) { ++counters; }
  ~CounterObj() { --counters; }
  const char* kind() const final { return "test_counter"; }
  Optional<Function> GetFunction(const String& name) final {
    ++looked_up;
    if (name == "add") {
      return Function::FromTyped([this](int64_t more) { return value_ += more; });
    } else if (name == "value") {
      return Function::FromTyped([this]() { return value_; });
    } else if (name == "sum") {
      return Function::FromTyped([this](Array<Tensor> tensors, Optional<Numbers> weights) {
        double sum = 0;
        for (size_t t = 0; t < tensors.size(); ++t) {
          const float* from = static_cast<const float*>(tensors[t].data_ptr());
          for (int64_t i = 0; i < tensors[t].numel(); ++i) {
            sum += from[i] * (weights.has_value() ? weights.value()[t] : 1);
          }
        }
        return sum;
      });
    } else if (name == "fail") {
      return Function::FromTyped(
          [](String message) -> void { TVM_FFI_THROW(ValueError) << message; });
    } else if (name == "count") {  // takes any arguments
      return Function::FromPacked([this](PackedArgs args, Any* result) {
        ++value_;
        *result = static_cast<int64_t>(args.size());
      });
    } else if (name == "scratch") {
      return Function::FromTyped([this](int64_t bytes) {
        int64_t shape[1] = {bytes};
        scratch_ = make_tensor(Shape(shape, shape + 1), {kDLUInt, 8, 1}, {kDLCPU, 0});
      });
    }
    return Function(nullptr);
  }

 private:
  int64_t value_;
  Optional<Tensor> scratch_;
};

Module counter(int64_t start) { return Module(make_object<CounterObj>(start)); }
Array<Module> two_counters() { return {counter(1), counter(2)}; }
int64_t live_counters() { return counters; }
int64_t lookups() { return looked_up; }
EXPORT(counter)
EXPORT(two_counters)
EXPORT(live_counters)
EXPORT(lookups)

class HiddenObj : public Object {
 public:
  static constexpr bool _type_mutable = true;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("fi_ffi.tests.Hidden", HiddenObj, Object);
};
class Hidden : public ObjectRef {
 public:
  explicit Hidden(ObjectPtr<Object> made) : ObjectRef(made) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Hidden, ObjectRef, HiddenObj);
};
Hidden hidden() { return Hidden(make_object<HiddenObj>()); }
bool takes_hidden(Hidden) { return true; }
EXPORT(hidden)
EXPORT(takes_hidden)

// A packed function beside typed ones.
static int64_t packed_runs = 0;
extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_packed_count(void*, const TVMFFIAny*, int32_t count,
                                                         TVMFFIAny* result) {
  ++packed_runs;
  result->type_index = kTVMFFIInt;
  result->v_int64 = count;
  return 0;
}
int64_t runs() { return packed_runs; }
EXPORT(runs)
