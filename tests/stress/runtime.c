/* A CUDA runtime without a GPU: it counts its objects, and refuses a free in a wrong capture mode. */

#include <stddef.h>
#include <stdlib.h>

static int alive;
static _Thread_local int mode, error;

static int made(void **slot, size_t size) {
  *slot = aligned_alloc(256, (size / 256 + 1) * 256);
  __sync_fetch_and_add(&alive, 1);
  return 0;
}

static int ended(void *object) {
  if (mode != 2) return error = 900; /* cudaErrorStreamCaptureUnsupported */
  free(object);
  __sync_fetch_and_sub(&alive, 1);
  return 0;
}

int live(void) { return alive; }
int current_mode(void) { return mode; }

int cudaThreadExchangeStreamCaptureMode(int *other) {
  int before = mode;
  mode = *other;
  *other = before;
  return 0;
}

int cudaGetLastError(void) {
  int before = error;
  error = 0;
  return before;
}

int cudaGetDevice(int *device) { return *device = 0; }
int cudaSetDevice(int device) { return device; }
int cudaMalloc(void **slot, size_t size) { return made(slot, size); }
int cudaHostAlloc(void **slot, size_t size, unsigned flags) { return made(slot, size); }
int cudaFree(void *place) { return ended(place); }
int cudaFreeHost(void *place) { return ended(place); }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return made(event, 1); }
int cudaEventDestroy(void *event) { return ended(event); }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return made(stream, 1); }
int cudaStreamGetId(void *stream, unsigned long long *id) { return (*id = (size_t)stream, 0); }
int cudaStreamBeginCapture(void *stream, int how) { return 0; }
int cudaStreamEndCapture(void *stream, void **graph) { return made(graph, 1); }
int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) { return *count = 0; }
int cudaGraphInstantiate(void **made_of, void *graph, unsigned long long flags) {
  return made(made_of, 1);
}
int cudaGraphExecUpdate(void *executable, void *graph, void *info) { return 910; }
int cudaGraphLaunch(void *executable, void *stream) { return 0; }
int cudaGraphDestroy(void *graph) { return ended(graph); }
int cudaGraphExecDestroy(void *executable) { return ended(executable); }
