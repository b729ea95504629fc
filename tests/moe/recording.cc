// A module with the interface of fused_moe_90, 0.6.13, whose methods write down what they are
// given.  BEFORE_0_6_8: without swizzled_input_sf.  ABSOLUTE: as 0.6.18, with a workspace size.
// WRONG: a method takes an int too many.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/optional.h>

#include <sstream>
#include <string>
#include <vector>

using tvm::ffi::Array;
using tvm::ffi::Function;
using tvm::ffi::Optional;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

constexpr int64_t kGemm1 = 3, kGemm2 = 5;

class Writer {
 public:
  std::ostringstream out;
  Writer& put(TensorView view) {
    out << "t" << view.data_ptr() << "[";
    for (int i = 0; i < view.ndim(); ++i) out << (i ? "," : "") << view.size(i);
    out << "] ";
    return *this;
  }
  template <typename T>
  Writer& put(Optional<T> value) {
    if (value.has_value()) return put(value.value());
    out << "none ";
    return *this;
  }
  Writer& put(Array<Tensor> tensors) {
    out << "{ ";
    for (Tensor one : tensors) put(TensorView(one));
    out << "} ";
    return *this;
  }
  Writer& put(Array<int64_t> ints) {
    out << "( ";
    for (int64_t one : ints) out << one << " ";
    out << ") ";
    return *this;
  }
  Writer& put(bool value) {
    out << (value ? "yes " : "no ");
    return *this;
  }
  Writer& put(int64_t value) {
    out << value << " ";
    return *this;
  }
  template <typename First, typename... Rest>
  void all(First first, Rest... rest) {
    put(first);
    if constexpr (sizeof...(rest) > 0) all(rest...);
  }
};

std::vector<std::string>& calls() {
  static std::vector<std::string> made;
  return made;
}

template <typename... Args>
void record(const char* name, Args... args) {
  Writer writer;
  writer.out << name << ": ";
  writer.all(args...);
  calls().push_back(writer.out.str());
}

int& alive() {
  static int count = 0;
  return count;
}

class Runner : public tvm::ffi::ModuleObj {
 public:
  Runner() { ++alive(); }
  ~Runner() { --alive(); }
  const char* kind() const final { return "recording_runner"; }
  Tensor workspace;

  Optional<Function> GetFunction(const tvm::ffi::String& name) final {
    if (name == "run_gemm_profile") {
      return Function::FromTyped(
          [this](TensorView input, TensorView fc1, Optional<TensorView> b1, TensorView fc2,
                 Optional<TensorView> b2, int64_t top_k, int64_t tp_size, int64_t tp_rank,
                 int64_t ep_size, int64_t ep_rank, int64_t cluster_size, int64_t cluster_rank,
                 bool alltoall, bool min_latency, int64_t gemm_idx, int64_t profile_id,
                 bool do_preparation, bool enable_pdl, int64_t activation) {
            if (profile_id == 1) TVM_FFI_THROW(RuntimeError) << "not for these sizes";
            if (do_preparation)
              workspace = Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {1000},
                                               DLDataType{kDLInt, 8, 1}, input.device());
            record("profile", input, fc1, b1, fc2, b2, top_k, tp_size, tp_rank, ep_size, ep_rank,
                   cluster_size, cluster_rank, alltoall, min_latency, gemm_idx, profile_id,
                   do_preparation, enable_pdl, activation);
          });
    } else if (name == "get_gemm1_tactic_count") {
      return Function::FromTyped([]() -> int64_t { return kGemm1; });
    } else if (name == "get_gemm2_tactic_count") {
#ifdef WRONG
      return Function::FromTyped([](int64_t one_too_many) -> int64_t { return kGemm2; });
#else
      return Function::FromTyped([]() -> int64_t { return kGemm2; });
#endif
#ifndef BEFORE_0_6_8
    } else if (name == "get_tactic_occupancy") {
      return Function::FromTyped([](int64_t tactic) -> int64_t { return tactic == 4 ? 0 : 1; });
#endif
#ifdef ABSOLUTE
    } else if (name == "get_valid_tactics_for_shape") {
      // The first of each has wide tiles.
      return Function::FromTyped([](int64_t stage, int64_t n, int64_t k) -> Array<int64_t> {
        record("shape", stage, n, k);
        Array<int64_t> found;
        int64_t first = stage == 2 ? kGemm1 : 0, last = stage == 2 ? kGemm1 + kGemm2 : kGemm1;
        for (int64_t tactic = first; tactic < last; ++tactic) {
          if (tactic > first || k % 24 == 0) found.push_back(tactic);
        }
        return found;
      });
    } else if (name == "get_workspace_size") {
      return Function::FromTyped([](int64_t rows, int64_t hidden, int64_t inter, int64_t experts,
                                    int64_t top_k, int64_t tp_size, int64_t tp_rank,
                                    int64_t ep_size, int64_t ep_rank, bool min_latency,
                                    int64_t activation) -> int64_t {
        record("size", rows, hidden, inter, experts, top_k, tp_size, tp_rank, ep_size, ep_rank,
               min_latency, activation);
        return 12345;
      });
#endif
    } else if (name == "run_moe") {
      return Function::FromTyped(
          [](TensorView output, TensorView input, TensorView experts, Optional<TensorView> scales,
             TensorView fc1, Optional<TensorView> b1, TensorView fc2, Optional<TensorView> b2,
             Optional<Array<Tensor>> quant_scales, Optional<TensorView> input_sf,
             Optional<TensorView> alpha, Optional<TensorView> beta, Optional<TensorView> limit,
#ifndef BEFORE_0_6_8
             bool swizzled,
#endif
             int64_t tp_size, int64_t tp_rank, int64_t ep_size, int64_t ep_rank,
             int64_t cluster_size, int64_t cluster_rank, bool alltoall, bool min_latency,
             Optional<Array<int64_t>> profile_ids, bool enable_pdl, int64_t activation
#ifdef ABSOLUTE
             ,
             Optional<TensorView> workspace
#endif
          ) {
            record("run", output, input, experts, scales, fc1, b1, fc2, b2, quant_scales, input_sf,
                   alpha, beta, limit,
#ifndef BEFORE_0_6_8
                   swizzled,
#endif
                   tp_size, tp_rank, ep_size, ep_rank, cluster_size, cluster_rank, alltoall,
                   min_latency, profile_ids, enable_pdl, activation
#ifdef ABSOLUTE
                   ,
                   workspace
#endif
            );
            Tensor workspace_of_a_call = Tensor::FromEnvAlloc(
                TVMFFIEnvTensorAlloc, {4096}, DLDataType{kDLInt, 8, 1}, input.device());
            static_cast<int8_t*>(workspace_of_a_call.data_ptr())[4095] = 1;
          });
    }
    return Function(nullptr);
  }
};

tvm::ffi::Module init(DLDataType activation, DLDataType weight, DLDataType output, bool block_scale,
                      bool w4, bool mxfp8, bool packed
#ifdef ABSOLUTE
                      ,
                      bool fused_finalize, bool humming
#endif
) {
  std::ostringstream text;
  text << "init: " << tvm::ffi::DLDataTypeToString(activation) << " "
       << tvm::ffi::DLDataTypeToString(weight) << " " << tvm::ffi::DLDataTypeToString(output) << " "
       << block_scale << w4 << mxfp8 << packed;
#ifdef ABSOLUTE
  text << fused_finalize << humming;
#endif
  calls().push_back(text.str());
  return tvm::ffi::Module(tvm::ffi::make_object<Runner>());
}

void interleave(TensorView weight, TensorView interleaved, int64_t quant_type) {
  record("interleave", weight, interleaved, quant_type);
}

void set_dirs(Array<tvm::ffi::String> dirs) {
  std::string text = "dirs:";
  for (const auto& dir : dirs) text += " " + std::string(dir);
  calls().push_back(text);
}

tvm::ffi::String last() {
  std::string text = calls().empty() ? "" : calls().back();
  if (!calls().empty()) calls().pop_back();
  return text;
}

int64_t count_alive() { return alive(); }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(init, init);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(interleave_moe_weights_for_sm90_mixed_gemm, interleave);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_deepgemm_jit_include_dirs, set_dirs);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last, last);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(count_alive, count_alive);
