/* A C program that has fi_ffi called on its own memory, by an interpreter inside of it.
 *
 * README.md has the line that builds it.  With -DWITH_CUDA memory is cudaMalloc's and the stream
 * its own; without, or with --cpu, it is malloc's, and the kernels are the reference ones.
 *
 * The rules: the memory stays valid until the stream's work on it is done.  A thread of C's takes
 * the GIL with PyGILState_Ensure for a call, and the main thread gives it up while it waits
 * (PyEval_SaveThread).  Py_FinalizeEx comes last, when no other thread is in a call.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#ifdef WITH_CUDA
#include <cuda_runtime_api.h>
#endif

enum { ROWS = 5, HIDDEN = 512, COUNT = ROWS * HIDDEN, THREADS = 2, CALLS = 20 };

static int on_cpu = 1;

static void die(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/* float16 as its bits: the random ones are normal numbers from 1/8 to 4, of either sign. */
static uint16_t random_half(unsigned *seed) {
    return (uint16_t)((rand_r(seed) & 0x83ff) | (12 + rand_r(seed) % 5) << 10);
}

static double value(uint16_t half) {
    int exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    if (exponent == 31) return NAN;
    double size = exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return half & 0x8000 ? -size : size;
}

#ifdef WITH_CUDA
static void cuda(cudaError_t code) {
    if (code != cudaSuccess) die(cudaGetErrorString(code));
}
#endif

static void *new_stream(void) {
#ifdef WITH_CUDA
    cudaStream_t stream = NULL;
    if (!on_cpu) cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
#else
    return NULL;
#endif
}

static void end(void *stream) {
#ifdef WITH_CUDA
    if (!on_cpu) cuda(cudaStreamDestroy(stream));
#endif
    (void)stream;
}

/* A copy that is done when this returns. */
static void copy(void *target, const void *source, size_t count, void *stream) {
#ifdef WITH_CUDA
    if (!on_cpu) {
        cuda(cudaMemcpyAsync(target, source, count, cudaMemcpyDefault, stream));
        cuda(cudaStreamSynchronize(stream));
        return;
    }
#endif
    (void)stream;
    memcpy(target, source, count);
}

static void *copied(const uint16_t *source, size_t count, void *stream) {
    void *memory = NULL;
#ifdef WITH_CUDA
    if (!on_cpu) cuda(cudaMalloc(&memory, 2 * count));
#endif
    if (on_cpu && !(memory = aligned_alloc(64, 2 * count))) die("no memory");
    copy(memory, source, 2 * count, stream);
    return memory;
}

static void give_back(void *memory) {
#ifdef WITH_CUDA
    if (!on_cpu) {
        cuda(cudaFree(memory));
        return;
    }
#endif
    free(memory);
}

/* One call of fi_ffi_calls.py from any thread: its code, and its message in `said`. */
static int call(void *x, void *residual, void *weight, int rows, void *stream, char said[512]) {
    PyGILState_STATE gil = PyGILState_Ensure();
    int code = -1;
    const char *words = NULL;
    PyObject *module = PyImport_ImportModule("fi_ffi_calls");
    PyObject *result = module ? PyObject_CallMethod(
        module, "fused_add_rmsnorm", "sKKKiiK", on_cpu ? "cpu" : "cuda:0",
        (unsigned long long)(uintptr_t)x, (unsigned long long)(uintptr_t)residual,
        (unsigned long long)(uintptr_t)weight, rows, (int)HIDDEN,
        (unsigned long long)(uintptr_t)stream) : NULL;
    if (!result || !PyArg_ParseTuple(result, "is", &code, &words)) PyErr_Print();
    snprintf(said, 512, "%s", words ? words : "a Python exception, told above");
    Py_XDECREF(result);
    Py_XDECREF(module);
    PyGILState_Release(gil);
    return code;
}

/* The same in C, and the largest error in parts of what two roundings to float16 may make. */
static double error_of(const uint16_t *was, const uint16_t *residual, const uint16_t *weight,
                       const uint16_t *got_x, const uint16_t *got_residual) {
    double worst = 0;
    for (int row = 0; row < ROWS; row++) {
        double squares = 0;
        for (int i = row * HIDDEN; i < (row + 1) * HIDDEN; i++)
            squares += pow(value(was[i]) + value(residual[i]), 2);
        for (int i = row * HIDDEN; i < (row + 1) * HIDDEN; i++) {
            double sum = value(was[i]) + value(residual[i]);
            double norm = sum / sqrt(squares / HIDDEN + 1e-6) * value(weight[i - row * HIDDEN]);
            double errors[] = {fabs(value(got_residual[i]) - sum) / (fabs(sum) + ldexp(1, -14)),
                               fabs(value(got_x[i]) - norm) / (fabs(norm) + ldexp(1, -14))};
            for (int k = 0; k < 2; k++)
                if (!(errors[k] * 512 <= worst)) worst = errors[k] * 512; /* NaN stays */
        }
    }
    return worst;
}

/* What each thread does, with memory and a stream of its own. */
static void *work(void *seed) {
    static __thread uint16_t x[COUNT], residual[COUNT], weight[HIDDEN], got[2][COUNT];
    double *worst = calloc(1, sizeof *worst);
    void *stream = new_stream();
    for (int turn = 0; turn < CALLS; turn++) {
        for (int i = 0; i < COUNT; i++) x[i] = random_half(seed), residual[i] = random_half(seed);
        for (int i = 0; i < HIDDEN; i++) weight[i] = random_half(seed);
        void *memory[] = {copied(x, COUNT, stream), copied(residual, COUNT, stream),
                          copied(weight, HIDDEN, stream)};
        char said[512];
        if (call(memory[0], memory[1], memory[2], ROWS, stream, said)) die(said);
        for (int i = 0; i < 2; i++) copy(got[i], memory[i], 2 * COUNT, stream);
        for (int i = 0; i < 3; i++) give_back(memory[i]);
        double error = error_of(x, residual, weight, got[0], got[1]);
        if (!(error <= *worst)) *worst = error;
    }
    end(stream);
    return worst;
}

int main(int argc, char **argv) {
#ifdef WITH_CUDA
    on_cpu = argc > 1 && !strcmp(argv[1], "--cpu");
#else
    (void)argc, (void)argv;
#endif
    Py_Initialize();
    PyThreadState *main_thread = PyEval_SaveThread();

    unsigned seeds[THREADS + 1];
    pthread_t threads[THREADS];
    for (int i = 0; i <= THREADS; i++) seeds[i] = (unsigned)time(NULL) * 31 + (unsigned)i;
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, &seeds[i])) die("no thread");
    int wrong = 0;
    for (int i = 0; i <= THREADS; i++) {
        void *result = NULL;
        if (i == THREADS) result = work(&seeds[i]); /* the main thread's turn */
        else pthread_join(threads[i], &result);
        double worst = *(double *)result;
        printf("thread %d: %d calls, largest error %.2f of what is allowed\n", i, CALLS, worst);
        wrong |= !(worst <= 1);
        free(result);
    }

    char said[512]; /* a wrong call: null for a tensor that would be written */
    void *some = copied((uint16_t[HIDDEN]){0}, HIDDEN, NULL);
    int code = call(NULL, some, some, 1, NULL, said);
    printf("refused with code %d: %s\n", code, said);
    wrong |= code != 1;
    give_back(some);

    PyEval_RestoreThread(main_thread);
    if (Py_FinalizeEx() < 0) die("Python did not end well");
    if (wrong) die("wrong");
    return 0;
}
