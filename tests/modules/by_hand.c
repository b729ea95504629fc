/* A library as code generators make it: its functions take what they are given, count
 * nothing, and crash on less than they expect. */
#include <tvm/ffi/c_api.h>

static int64_t runs = 0;

__attribute__((visibility("default"))) int __tvm_ffi_scale(void *self, const TVMFFIAny *args,
                                                           int32_t count, TVMFFIAny *result) {
  DLTensor *tensor = args[0].type_index == kTVMFFITensor
                         ? (DLTensor *)((char *)args[0].v_ptr + sizeof(TVMFFIObject))
                         : (DLTensor *)args[0].v_ptr;
  ++runs;
  for (int64_t i = 0; i < tensor->shape[0]; ++i) ((float *)tensor->data)[i] *= args[1].v_float64;
  result->type_index = kTVMFFINone;
  return 0;
}

__attribute__((visibility("default"))) int __tvm_ffi_runs(void *self, const TVMFFIAny *args,
                                                          int32_t count, TVMFFIAny *result) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = runs;
  return 0;
}
