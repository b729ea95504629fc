/* A library whose functions return, raise and call whatever they are told to. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#define EXPORT(name)                                                                          \
  __attribute__((visibility("default"))) int __tvm_ffi_##name(                                \
      void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result)

static int64_t alive = 0;

typedef struct {
  TVMFFIObject header;
  char cell[128];
} Made;

static void made_deleter(void *object, int flags) {
  if (flags & kTVMFFIObjectDeleterFlagBitMaskStrong) --alive;
  if (flags & kTVMFFIObjectDeleterFlagBitMaskWeak) free(object);
}

static TVMFFIByteArray bytes_of(const TVMFFIAny *any) {
  if (any->type_index == kTVMFFIByteArrayPtr) return *(TVMFFIByteArray *)any->v_ptr;
  return (TVMFFIByteArray){NULL, 0};
}

/* An object of any type index, its cell as given. */
static Made *make(int32_t type_index, TVMFFIByteArray cell) {
  Made *made = calloc(1, sizeof(Made));
  made->header.combined_ref_count = ((uint64_t)1 << 32) | 1;
  made->header.type_index = type_index;
  made->header.__padding = 0xA5A5A5A5;
  made->header.deleter = made_deleter;
  if (cell.size) memcpy(made->cell, cell.data, cell.size < 128 ? cell.size : 128);
  ++alive;
  return made;
}

EXPORT(alive) {
  result->type_index = kTVMFFIInt;
  result->v_int64 = alive;
  return 0;
}

/* (type index, padding, payload): these, as the result. */
EXPORT(give) {
  result->type_index = (int32_t)args[0].v_int64;
  result->zero_padding = (uint32_t)args[1].v_int64;
  result->v_int64 = args[2].v_int64;
  return 0;
}

/* (type index told, type index of the object, cell): an owned object, garbage in paddings. */
EXPORT(give_made) {
  result->type_index = (int32_t)args[0].v_int64;
  result->zero_padding = 0xDEADBEEF;
  result->v_ptr = make((int32_t)args[1].v_int64, bytes_of(&args[2]));
  return 0;
}

/* (object): one more reference to it. */
EXPORT(give_back) {
  *result = args[0];
  result->zero_padding = 0xDEADBEEF;
  TVMFFIObjectIncRef(args[0].v_ptr);
  return 0;
}

/* (code): that, and no error; the result is written all the same. */
EXPORT(fail) {
  result->type_index = kTVMFFIStr;
  result->v_int64 = 0x10;
  return (int)args[0].v_int64;
}

/* (value): fails with it as the result, which holds no reference of its own. */
EXPORT(fail_holding) {
  *result = args[0];
  TVMFFIErrorSetRaisedFromCStr("Failed", "with a result");
  return -1;
}

/* (type index, cell): an object like this where the error belongs. */
EXPORT(fail_made) {
  Made *made = make((int32_t)args[0].v_int64, bytes_of(&args[1]));
  TVMFFIErrorSetRaised(made);
  TVMFFIObjectDecRef(made);
  return -1;
}

/* (kind, message, backtrace). */
EXPORT(fail_with) {
  TVMFFIByteArray kind = bytes_of(&args[0]), message = bytes_of(&args[1]);
  TVMFFIByteArray backtrace = bytes_of(&args[2]);
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorCreate(&kind, &message, &backtrace, &error);
  TVMFFIErrorSetRaised(error);
  TVMFFIObjectDecRef(error);
  return -1;
}

/* (depth, extra context or None, whether the last cause is the first again). */
EXPORT(fail_chain) {
  TVMFFIByteArray kind = {"ValueError", 10}, empty = {"", 0};
  TVMFFIObjectHandle extra = args[1].type_index >= 64 ? args[1].v_ptr : NULL;
  TVMFFIObjectHandle cause = NULL, first = NULL;
  for (int64_t i = 0; i < args[0].v_int64; ++i) {
    char words[32];
    TVMFFIByteArray message = {words, 8};
    for (int k = 7, n = (int)i; k >= 0; --k, n /= 10) words[k] = '0' + n % 10;
    TVMFFIObjectHandle error = NULL;
    TVMFFIErrorCreateWithCauseAndExtraContext(&kind, &message, &empty, cause, extra, &error);
    if (cause) TVMFFIObjectDecRef(cause);
    if (!first) first = error;
    cause = error;
  }
  if (args[2].v_int64) { /* a cycle is never released: nobody can */
    TVMFFIObjectIncRef(cause);
    ((TVMFFIErrorCell *)((char *)first + sizeof(TVMFFIObject)))->cause_chain = cause;
  }
  TVMFFIErrorSetRaised(cause);
  TVMFFIObjectDecRef(cause);
  return -1;
}

/* Leaves an error behind and succeeds. */
EXPORT(leave_error) {
  TVMFFIErrorSetRaisedFromCStr("LeftError", "left by a call that succeeded");
  return 0;
}

typedef struct {
  TVMFFIObjectHandle function, error;
  const TVMFFIAny *args;
  int32_t count;
  TVMFFIAny result;
  int code;
} Job;

static int call(TVMFFIObjectHandle function, const TVMFFIAny *args, int32_t count,
                TVMFFIAny *result) {
  TVMFFIFunctionCell *cell = (TVMFFIFunctionCell *)((char *)function + sizeof(TVMFFIObject));
  return cell->safe_call(function, args, count, result);
}

static void *work(void *given) {
  Job *job = given;
  job->code = call(job->function, job->args, job->count, &job->result);
  if (job->code) TVMFFIErrorMoveFromRaised(&job->error);
  return NULL;
}

static void *raise_here(void *given) {
  TVMFFIErrorSetRaisedFromCStr("OtherThread", "raised on a thread that nobody asks");
  return given;
}

/* (function, ...): called with the rest on a thread that Python does not know. */
EXPORT(on_thread) {
  Job job = {args[0].v_ptr, NULL, args + 1, count - 1, {0}, 0};
  pthread_t thread;
  if (pthread_create(&thread, NULL, work, &job)) return -1;
  pthread_join(thread, NULL);
  if (job.code) {
    if (job.error) TVMFFIErrorSetRaised(job.error), TVMFFIObjectDecRef(job.error);
    return job.code;
  }
  *result = job.result;
  return 0;
}

/* Fails here with an error that is on another thread. */
EXPORT(fail_elsewhere) {
  pthread_t thread;
  if (pthread_create(&thread, NULL, raise_here, NULL)) return -1;
  pthread_join(thread, NULL);
  return -1;
}

/* (function, ...): called with the rest. */
EXPORT(call) { return call(args[0].v_ptr, args + 1, count - 1, result); }

/* (function, type index, padding, payload): called with that one argument. */
EXPORT(call_with) {
  TVMFFIAny given = {0};
  given.type_index = (int32_t)args[1].v_int64;
  given.zero_padding = (uint32_t)args[2].v_int64;
  given.v_int64 = args[3].v_int64;
  return call(args[0].v_ptr, &given, 1, result);
}

/* (function): the type index of the result that its failure leaves; -1 where it succeeds. */
EXPORT(left_by) {
  TVMFFIAny found = {.type_index = kTVMFFIInt};
  int code = call(args[0].v_ptr, NULL, 0, &found);
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  if (error) TVMFFIObjectDecRef(error);
  if (!code && found.type_index >= 64) TVMFFIObjectDecRef(found.v_ptr);
  result->type_index = kTVMFFIInt;
  result->v_int64 = code ? found.type_index : -1;
  return 0;
}

/* (first, second): both fail; the second while the first's error is there. */
EXPORT(fail_while_failing) {
  TVMFFIAny dropped = {0};
  call(args[0].v_ptr, NULL, 0, &dropped);
  return call(args[1].v_ptr, NULL, 0, result);
}

/* (function, depth): an error that is released while its own callback raises another. */
EXPORT(call_many) {
  int failures = 0;
  for (int64_t i = 0; i < args[1].v_int64; ++i) {
    TVMFFIAny dropped = {0};
    if (call(args[0].v_ptr, NULL, 0, &dropped)) ++failures;
  }
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  if (error) TVMFFIObjectDecRef(error);
  result->type_index = kTVMFFIInt;
  result->v_int64 = failures;
  return 0;
}
