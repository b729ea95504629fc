/* A library whose TVM-FFI objects are counted: errors with and without causes, and strings. */
#include <stdatomic.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#define EXPORT __attribute__((visibility("default")))

static atomic_long live = 0;
static void (*delete_error)(void *, int) = 0;
static void (*delete_string)(void *, int) = 0;

static void error_is_gone(void *self, int flags) {
  if (flags & kTVMFFIObjectDeleterFlagBitMaskWeak) --live;
  delete_error(self, flags);
}

static void string_is_gone(void *self, int flags) {
  if (flags & kTVMFFIObjectDeleterFlagBitMaskWeak) --live;
  delete_string(self, flags);
}

static void count(TVMFFIObject *made, void (**before)(void *, int), void (*after)(void *, int)) {
  *before = made->deleter;
  made->deleter = after;
  ++live;
}

static TVMFFIByteArray text(const char *words) {
  TVMFFIByteArray array = {words, strlen(words)};
  return array;
}

/* Raises: 0 a counted error, 1 a plain one with a counted cause, 2 one made of two words. */
EXPORT int __tvm_ffi_fail(void *self, const TVMFFIAny *args, int32_t n, TVMFFIAny *result) {
  int64_t kind = n ? args[0].v_int64 : 2;
  TVMFFIByteArray name = text("ValueError"), words = text("the kernel did not like its arguments");
  TVMFFIByteArray trace = text("  File \"kernel.cu\", line 1, in run\n");
  TVMFFIObjectHandle inner, outer;
  if (kind == 2) {
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", "of two words");
    return -1;
  }
  if (TVMFFIErrorCreate(&name, &words, &trace, &inner)) return -1;
  count((TVMFFIObject *)inner, &delete_error, error_is_gone);
  outer = inner;
  if (kind == 1) {
    if (TVMFFIErrorCreateWithCauseAndExtraContext(&name, &words, &trace, inner, 0, &outer))
      return -1;
    TVMFFIObjectDecRef(inner);
  }
  TVMFFIErrorSetRaised(outer);
  TVMFFIObjectDecRef(outer);
  return -1;
}

/* Returns a string that is too long to be kept in the value. */
EXPORT int __tvm_ffi_give(void *self, const TVMFFIAny *args, int32_t n, TVMFFIAny *result) {
  TVMFFIByteArray words = text("a string that is an object of its own");
  if (TVMFFIStringFromByteArray(&words, result)) return -1;
  count(result->v_obj, &delete_string, string_is_gone);
  return 0;
}

/* Scales the float32 elements of a tensor. */
EXPORT int __tvm_ffi_scale(void *self, const TVMFFIAny *args, int32_t n, TVMFFIAny *result) {
  if (n != 2) {
    TVMFFIErrorSetRaisedFromCStr("TypeError", "scale takes a tensor and a number");
    return -1;
  }
  DLTensor *tensor = args[0].type_index == kTVMFFITensor
                         ? (DLTensor *)((char *)args[0].v_ptr + sizeof(TVMFFIObject))
                         : (DLTensor *)args[0].v_ptr;
  for (int64_t i = 0; i < tensor->shape[0]; ++i) ((float *)tensor->data)[i] *= args[1].v_float64;
  result->type_index = kTVMFFINone;
  return 0;
}

/* How many objects there are now. */
EXPORT int __tvm_ffi_live(void *self, const TVMFFIAny *args, int32_t n, TVMFFIAny *result) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = live;
  return 0;
}
