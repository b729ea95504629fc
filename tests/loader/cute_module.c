/* A module as CuTe DSL makes one: it needs the runtime library, and tells its signature in
 * CuTe's words. */
#include <tvm/ffi/c_api.h>

int CuteDSLRT_Answer(void);

__attribute__((visibility("default"))) int __tvm_ffi_twice(void *self, const TVMFFIAny *args,
                                                           int32_t count, TVMFFIAny *result) {
  if (count != 2) {
    TVMFFIErrorSetRaisedFromCStr("TypeError",
                                 "Expects 2 parameters when calling: `_twice(x: Tensor([n0, 4], "
                                 "float32), factor: int32)`");
    return -1;
  }
  result->type_index = kTVMFFIInt;
  result->v_int64 = args[1].v_int64 * CuteDSLRT_Answer();
  return 0;
}
