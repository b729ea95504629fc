/* Every C declaration fi_ffi relies on, once.  tools/generate_cffi.py turns this
 * into _cffi.py (cffi's out-of-line ABI mode: no compiler, no parsing at import);
 * tests/abi/test_declarations.py compares each struct, field by field, with
 * tvm/ffi/c_api.h, tvm/ffi/extra/c_env_api.h and dlpack.h of the pinned
 * apache-tvm-ffi wheel. */

/* dlpack/dlpack.h (enums are written as the integers they are stored in) */
typedef struct { uint32_t major; uint32_t minor; } DLPackVersion;
typedef struct { int32_t device_type; int32_t device_id; } DLDevice;
typedef struct { uint8_t code; uint8_t bits; uint16_t lanes; } DLDataType;
typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape;
  int64_t *strides;
  uint64_t byte_offset;
} DLTensor;
typedef struct DLManagedTensor {
  DLTensor dl_tensor;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;
typedef struct DLManagedTensorVersioned {
  DLPackVersion version;
  void *manager_ctx;
  void (*deleter)(struct DLManagedTensorVersioned *self);
  uint64_t flags;
  DLTensor dl_tensor;
} DLManagedTensorVersioned;
typedef int (*DLPackManagedTensorAllocator)(
    DLTensor *prototype, DLManagedTensorVersioned **out, void *error_ctx,
    void (*SetError)(void *error_ctx, const char *kind, const char *message));

/* tvm/ffi/c_api.h */
typedef struct { uint32_t major; uint32_t minor; uint32_t patch; } TVMFFIVersion;
typedef void *TVMFFIObjectHandle;
typedef struct {
  uint64_t combined_ref_count;
  int32_t type_index;
  uint32_t __padding;
  union {
    void (*deleter)(void *self, int flags);
    int64_t __ensure_align;
  };
} TVMFFIObject;
typedef struct {
  int32_t type_index;
  union { uint32_t zero_padding; uint32_t small_str_len; };
  union {
    int64_t v_int64;
    double v_float64;
    void *v_ptr;
    const char *v_c_str;
    TVMFFIObject *v_obj;
    DLDataType v_dtype;
    DLDevice v_device;
    char v_bytes[8];
    uint64_t v_uint64;
  };
} TVMFFIAny;
typedef struct { const char *data; size_t size; } TVMFFIByteArray;
typedef struct { const int64_t *data; size_t size; } TVMFFIShapeCell;
typedef struct {
  TVMFFIByteArray kind;
  TVMFFIByteArray message;
  TVMFFIByteArray backtrace;
  void (*update_backtrace)(TVMFFIObjectHandle self, const TVMFFIByteArray *backtrace,
                           int32_t update_mode);
  TVMFFIObjectHandle cause_chain;
  TVMFFIObjectHandle extra_context;
} TVMFFIErrorCell;
typedef int (*TVMFFISafeCallType)(void *handle, const TVMFFIAny *args, int32_t num_args,
                                  TVMFFIAny *result);
typedef struct { TVMFFISafeCallType safe_call; void *cpp_call; } TVMFFIFunctionCell;

/* What a library tells of the types it registers */
typedef int (*TVMFFIFieldGetter)(void *field, TVMFFIAny *result);
typedef int (*TVMFFIFieldSetter)(void *field, const TVMFFIAny *value);
typedef int (*TVMFFIObjectCreator)(TVMFFIObjectHandle *result);
typedef struct {
  TVMFFIByteArray name;
  TVMFFIByteArray doc;
  TVMFFIByteArray metadata;
  int64_t flags;
  int64_t size;
  int64_t alignment;
  int64_t offset;
  TVMFFIFieldGetter getter;
  void *setter;
  TVMFFIAny default_value_or_factory;
  int32_t field_static_type_index;
} TVMFFIFieldInfo;
typedef struct {
  TVMFFIByteArray name;
  TVMFFIByteArray doc;
  TVMFFIByteArray metadata;
  int64_t flags;
  TVMFFIAny method;
} TVMFFIMethodInfo;
typedef struct {
  TVMFFIByteArray doc;
  TVMFFIObjectCreator creator;
  int32_t total_size;
  int32_t structural_eq_hash_kind;
} TVMFFITypeMetadata;
typedef struct TVMFFITypeInfo {
  int32_t type_index;
  int32_t type_depth;
  TVMFFIByteArray type_key;
  const struct TVMFFITypeInfo **type_ancestors;
  uint64_t type_key_hash;
  int32_t num_fields;
  int32_t num_methods;
  const TVMFFIFieldInfo *fields;
  const TVMFFIMethodInfo *methods;
  const TVMFFITypeMetadata *metadata;
} TVMFFITypeInfo;
typedef struct {
  const TVMFFIAny *data;
  int32_t size;
  int32_t begin_index;
} TVMFFITypeAttrColumn;

/* An owned object is its header followed by its cell; these pairs are ours, so
 * that no code adds sizes to pointers. */
typedef struct { TVMFFIObject header; TVMFFIByteArray cell; } FiFfiBytesObject;
typedef struct { TVMFFIObject header; TVMFFIErrorCell cell; } FiFfiErrorObject;
typedef struct { TVMFFIObject header; TVMFFIFunctionCell cell; } FiFfiFunctionObject;
typedef struct { TVMFFIObject header; TVMFFIShapeCell cell; } FiFfiShapeObject;
typedef struct { TVMFFIObject header; DLTensor cell; } FiFfiTensorObject;

void TVMFFIGetVersion(TVMFFIVersion *out_version);
int TVMFFIObjectIncRef(TVMFFIObjectHandle obj);
int TVMFFIObjectDecRef(TVMFFIObjectHandle obj);
int TVMFFIFunctionCreate(void *self, TVMFFISafeCallType safe_call, void (*deleter)(void *self),
                         TVMFFIObjectHandle *out);
int TVMFFIFunctionGetGlobal(const TVMFFIByteArray *name, TVMFFIObjectHandle *out);
int TVMFFIFunctionSetGlobal(const TVMFFIByteArray *name, TVMFFIObjectHandle f,
                            int allow_override);
int TVMFFIAnyViewToOwnedAny(const TVMFFIAny *any_view, TVMFFIAny *out);
int TVMFFIFunctionCall(TVMFFIObjectHandle func, TVMFFIAny *args, int32_t num_args,
                       TVMFFIAny *result);
void TVMFFIErrorMoveFromRaised(TVMFFIObjectHandle *result);
void TVMFFIErrorSetRaised(TVMFFIObjectHandle error);
int TVMFFIErrorCreate(const TVMFFIByteArray *kind, const TVMFFIByteArray *message,
                      const TVMFFIByteArray *backtrace, TVMFFIObjectHandle *out);
int TVMFFITensorFromDLPack(DLManagedTensor *from, int32_t require_alignment,
                           int32_t require_contiguous, TVMFFIObjectHandle *out);
int TVMFFIStringFromByteArray(const TVMFFIByteArray *input, TVMFFIAny *out);
int TVMFFITypeKeyToIndex(const TVMFFIByteArray *type_key, int32_t *out_tindex);
const TVMFFITypeInfo *TVMFFIGetTypeInfo(int32_t type_index);
const TVMFFITypeAttrColumn *TVMFFIGetTypeAttrColumn(const TVMFFIByteArray *attr_name);

/* tvm/ffi/extra/c_env_api.h */
typedef void *TVMFFIStreamHandle;
int TVMFFIEnvSetStream(int32_t device_type, int32_t device_id, TVMFFIStreamHandle stream,
                       TVMFFIStreamHandle *opt_out_original_stream);
TVMFFIStreamHandle TVMFFIEnvGetStream(int32_t device_type, int32_t device_id);
int TVMFFIEnvSetDLPackManagedTensorAllocator(
    DLPackManagedTensorAllocator allocator, int write_to_global_context,
    DLPackManagedTensorAllocator *opt_out_original_allocator);
int TVMFFIEnvTensorAlloc(DLTensor *prototype, TVMFFIObjectHandle *out);

/* stdlib.h: memory that outlives the interpreter */
void *aligned_alloc(size_t alignment, size_t size);
void free(void *ptr);

/* dlfcn.h: what cffi's own dlopen does not offer (symbols by name, RTLD_NOLOAD) */
void *dlopen(const char *filename, int flags);
void *dlsym(void *handle, const char *symbol);
char *dlerror(void);
typedef struct {
  const char *dli_fname;
  void *dli_fbase;
  const char *dli_sname;
  void *dli_saddr;
} FiFfiDlInfo;
int dladdr(const void *addr, FiFfiDlInfo *info);

/* cuda_runtime_api.h, the same in CUDA 12 and 13: the device of a thread */
int cudaGetDevice(int *device);
int cudaSetDevice(int device);

/* memory of plans and of kernels that allocate */
int cudaMalloc(void **devPtr, size_t size);
int cudaFree(void *devPtr);
int cudaFreeHost(void *ptr);
int cudaMallocAsync(void **devPtr, size_t size, void *hStream);
int cudaFreeAsync(void *devPtr, void *hStream);
int cudaMemsetAsync(void *devPtr, int value, size_t count, void *stream);
int cudaMemset2DAsync(void *devPtr, size_t pitch, int value, size_t width, size_t height,
                      void *stream);
int cudaStreamSynchronize(void *stream);
int cudaDeviceSynchronize(void);

/* what is asked once a call has failed */
int cudaGetLastError(void);
const char *cudaGetErrorString(int error);
int cudaStreamQuery(void *stream);

/* cublasLt.h: the handle that kernels over cuBLASLt are given */
int cublasLtCreate(void **lightHandle);

/* what a plan does around its kernel's own work: stage arrays, guard the staging memory */
int cudaMemcpyAsync(void *dst, const void *src, size_t count, int kind, void *stream);
int cudaEventCreateWithFlags(void **event, unsigned int flags);
int cudaEventRecord(void *event, void *stream);
int cudaEventElapsedTime(float *ms, void *start, void *end);
int cudaEventQuery(void *event);
int cudaEventSynchronize(void *event);
int cudaEventDestroy(void *event);
int cudaStreamWaitEvent(void *stream, void *event, unsigned int flags);
int cudaStreamIsCapturing(void *stream, int *status);
int cudaStreamGetFlags(void *hStream, unsigned int *flags);

/* what a watchdog needs: host memory that streams write to, and which stream a handle is */
int cudaHostAlloc(void **pHost, size_t size, unsigned int flags);
int cudaStreamGetDevice(void *hStream, int *device); // from 12.8 on
int cudaStreamGetId(void *hStream, unsigned long long *streamId);
int cudaThreadExchangeStreamCaptureMode(int *mode);

/* Graphs; what an update's result says of its failure is not read: 24 bytes */
int cudaStreamBeginCapture(void *stream, int mode);
int cudaStreamEndCapture(void *stream, void **pGraph);
int cudaGraphInstantiate(void **pGraphExec, void *graph, unsigned long long flags);
int cudaGraphExecUpdate(void *hGraphExec, void *hGraph, void *resultInfo);
int cudaGraphGetNodes(void *graph, void **nodes, size_t *numNodes);
int cudaGraphLaunch(void *graphExec, void *stream);
int cudaGraphExecDestroy(void *graphExec);
int cudaGraphDestroy(void *graph);

/* Memory of several GPUs, in one process and in several */
typedef struct { char reserved[64]; } cudaIpcMemHandle_t;
int cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *devPtr);
int cudaIpcOpenMemHandle(void **devPtr, cudaIpcMemHandle_t handle, unsigned int flags);
int cudaIpcCloseMemHandle(void *devPtr);
typedef struct { int type; int id; } cudaMemLocation;
typedef struct { cudaMemLocation location; int flags; } cudaMemAccessDesc;
typedef struct {
    int allocType; int handleTypes; cudaMemLocation location; void *win32SecurityAttributes;
    size_t maxSize; uint16_t usage; uint8_t reserved[54];
} cudaMemPoolProps;
int cudaMemPoolCreate(void **pool, const cudaMemPoolProps *props);
int cudaMemPoolSetAccess(void *pool, const cudaMemAccessDesc *access, size_t count);
int cudaMallocFromPoolAsync(void **place, size_t count, void *pool, void *stream);
int cudaMemPoolDestroy(void *pool);
int cudaDeviceEnablePeerAccess(int peerDevice, unsigned int flags);
int cudaDeviceGetP2PAttribute(int *value, int attr, int srcDevice, int dstDevice);
int cudaDeviceGetPCIBusId(char *pciBusId, int len, int device);
int cudaDeviceGetByPCIBusId(int *device, const char *pciBusId);
int cudaStreamCreateWithFlags(void **pStream, unsigned int flags);
int cudaStreamDestroy(void *stream);

/* cuda.h, of libcuda.so.1, the same for every CUDA: what is asked of a machine */
int cuInit(unsigned int Flags);
int cuDriverGetVersion(int *driverVersion);
int cuDeviceGetCount(int *count);
int cuDeviceGetAttribute(int *pi, int attrib, int dev);

/* a CUdeviceptr is an integer, a cuuint32_t 32 bits of one */
int cuStreamWriteValue32_v2(void *stream, unsigned long long addr, uint32_t value,
                            unsigned int flags);

/* Python's own C API: the address inside a capsule.  Called without the GIL,
 * which is safe for this function while it succeeds: see interop.py. */
void *PyCapsule_GetPointer(void *capsule, const char *name);
