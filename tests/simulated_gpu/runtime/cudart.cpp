// The functions of CUDA's runtime that torch calls, with the signatures of NVIDIA's own headers.
//
// Kernels compute nothing here: what they cost is charged, and Python computes the same operator (compute.py).
// Functions that are not here are made by stubs.py: they do nothing and say that all is well.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

#include "card.h"
#include "entered.h"

using namespace card;

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;

cudaError_t failed(cudaError_t code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}
cudaError_t failed(int code) { return failed((cudaError_t)code); }

// A link is slow, and each direction has an engine of its own. A copy of pageable memory blocks the host.
cudaError_t copy(void* target, const void* source, size_t bytes, Stream* stream, bool waits) {
  Place to = place_of(target), from = place_of(source);
  bool crosses = (to == Place::device) != (from == Place::device), in = to == Place::device;
  bool slow = crosses && (to == Place::pageable || from == Place::pageable);
  Seconds seconds = 0;
  if (crosses) {
    double rate = slow ? rates.pageable : rates.link;
    count(in ? &Counts::h2d_copies : &Counts::d2h_copies);
    count(in ? &Counts::h2d_bytes : &Counts::d2h_bytes, bytes);
    if (slow) count(&Counts::pageable_copies), count(&Counts::pageable_bytes, bytes);
    if (rate > 0) seconds = rates.latency + bytes / rate;
  } else if (in && rates.memory > 0) {
    seconds = rates.launch + 2.0 * bytes / rates.memory;
  }
  std::string what = label() + (crosses ? in ? " (h2d copy)" : " (d2h copy)" : " (copy)");
  stream->give([=] { memmove(target, source, bytes); }, crosses ? in ? H2D : D2H : COMPUTE, seconds,
               {{source, bytes, false}, {target, bytes, true}}, what);
  if (waits || slow) stream->drain();
  return cudaSuccess;
}

cudaError_t fill(void* address, int value, size_t bytes, Stream* stream) {
  Seconds seconds = rates.memory > 0 ? rates.launch + bytes / rates.memory : 0;
  stream->give([=] { memset(address, value, bytes); }, COMPUTE, seconds, {{address, bytes, true}},
               label() + " (memset)");
  return cudaSuccess;
}

// Nobody knows what a kernel moves: 48 bytes a thread is what torch's elementwise kernels do on average.
cudaError_t kernel(Stream* stream, dim3 grid, dim3 block) {
  count(&Counts::kernels);
  if (rates.flops <= 0) return cudaSuccess;
  double threads = (double)grid.x * grid.y * grid.z * block.x * block.y * block.z;
  stream->give([] {}, COMPUTE, rates.launch + (rates.memory > 0 ? 48 * threads / rates.memory : 0));
  return cudaSuccess;
}

cudaError_t locking(size_t bytes) {
  if (rates.lock > 0) pass(bytes / rates.lock);
  return cudaSuccess;
}

cudaError_t synchronize() {
  if (any_capturing()) return failed(cudaErrorStreamCaptureUnsupported);
  drain_all();
  return cudaSuccess;
}

void describe(cudaDeviceProp* about) {
  memset(about, 0, sizeof *about);
  strcpy(about->name, "Simulated GPU");
  about->totalGlobalMem = memory_total();
  about->major = 9;
  about->multiProcessorCount = 132;
  about->warpSize = 32;
  about->maxThreadsPerBlock = 1024;
  about->maxThreadsPerMultiProcessor = 2048;
  about->sharedMemPerBlock = 48 << 10;
  about->sharedMemPerBlockOptin = 227 << 10;
  about->sharedMemPerMultiprocessor = 228 << 10;
  about->regsPerBlock = about->regsPerMultiprocessor = 1 << 16;
  about->l2CacheSize = 50 << 20;
  for (int& size : about->maxThreadsDim) size = 1024;
  for (int& size : about->maxGridSize) size = 65535;
  about->maxGridSize[0] = INT32_MAX;
  about->unifiedAddressing = 1;
}

}  // namespace

extern "C" {

// ---- the device

cudaError_t cudaGetDeviceCount(int* number) {
  ENTER(cudaGetDeviceCount);
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  *number = visible && !*visible ? 0 : 1;
  return *number ? cudaSuccess : failed(cudaErrorNoDevice);
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? failed(cudaErrorInvalidDevice) : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* about, int) {
  describe(about);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int room, int) {
  strncpy(text, "0000:00:00.0", room);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  ENTER(cudaDeviceSynchronize);
  return synchronize();
}

// ---- errors

cudaError_t cudaGetLastError() {
  cudaError_t code = last_error;
  last_error = cudaSuccess;
  return code;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorName(cudaError_t code) {
  static auto& names =
      *new std::map<int, const char*>{{cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation"},
                                      {cudaErrorInvalidValue, "cudaErrorInvalidValue"},
                                      {cudaErrorHostMemoryAlreadyRegistered, "cudaErrorHostMemoryAlreadyRegistered"},
                                      {cudaErrorLaunchFailure, "cudaErrorLaunchFailure"},
                                      {cudaErrorHostMemoryNotRegistered, "cudaErrorHostMemoryNotRegistered"},
                                      {cudaSuccess, "no error"}};
  auto found = names.find(code);
  return found == names.end() ? "cudaErrorUnknown" : found->second;
}
const char* cudaGetErrorString(cudaError_t code) {
  if (code == cudaErrorMemoryAllocation) return "out of memory";
  if (code == cudaErrorHostMemoryAlreadyRegistered)
    return "part or all of the requested memory range is already mapped";
  return cudaGetErrorName(code);
}

// ---- memory

cudaError_t cudaMalloc(void** address, size_t bytes) {
  ENTER(cudaMalloc);
  return failed(allocate(address, bytes));
}
cudaError_t cudaFree(void* address) {
  if (!address) return cudaSuccess;
  ENTER(cudaFree);
  drain_all();
  return failed(release(address));
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = memory_free();
  *total = memory_total();
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  ENTER(cudaHostAlloc);
  locking(bytes);
  return (*address = allocate_locked(bytes)) ? cudaSuccess : failed(cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocHost(void** address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }
cudaError_t cudaFreeHost(void* address) {
  ENTER(cudaFreeHost);
  release_locked(address);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  ENTER(cudaHostRegister);
  locking(bytes);
  return failed(lock(address, bytes));
}
cudaError_t cudaHostUnregister(void* address) {
  ENTER(cudaHostUnregister);
  return failed(unlock(address));
}
cudaError_t cudaHostGetDevicePointer(void** there, void* here, unsigned) {
  *there = here;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* about, const void* address) {
  Place place = place_of(address);
  memset(about, 0, sizeof *about);
  about->devicePointer = about->hostPointer = (void*)address;
  about->device = place == Place::pageable ? -2 : 0;
  about->type = place == Place::device   ? cudaMemoryTypeDevice
                : place == Place::locked ? cudaMemoryTypeHost
                                         : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

// ---- copies

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  ENTER(cudaMemcpyAsync);
  return copy(target, source, bytes, stream_of(stream), false);
}
cudaError_t cudaMemcpyPeerAsync(void* target, int, const void* source, int, size_t bytes, cudaStream_t stream) {
  ENTER(cudaMemcpyPeerAsync);
  return copy(target, source, bytes, stream_of(stream), false);
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind) {
  ENTER(cudaMemcpy);
  return copy(target, source, bytes, stream_of(nullptr), true);
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  ENTER(cudaMemsetAsync);
  return fill(address, value, bytes, stream_of(stream));
}
cudaError_t cudaMemset(void* address, int value, size_t bytes) {
  ENTER(cudaMemset);
  return fill(address, value, bytes, stream_of(nullptr));
}

// ---- streams. None of them waits for the default stream: torch makes them so.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  ENTER(cudaStreamCreateWithPriority);
  *stream = (cudaStream_t) new Stream;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  stream_of(stream)->drain();
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  ENTER(cudaStreamSynchronize);
  if (stream_of(stream)->capturing) return failed(cudaErrorStreamCaptureUnsupported);
  stream_of(stream)->drain();
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return stream_of(stream)->is_idle() ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void* data) {
  stream_of(stream)->give([=] { call(data); });
  return cudaSuccess;
}

// ---- graphs: a stream that captures drops its work

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream_of(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
static cudaError_t capture_info(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                cudaGraph_t* graph, const cudaGraphNode_t** nodes, size_t* number) {
  if (id) *id = 1;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (number) *number = 0;
  return cudaStreamIsCapturing(stream, status);
}
#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* number) {
  if (edges) *edges = nullptr;
  return capture_info(stream, status, id, graph, nodes, number);
}
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                        cudaGraph_t* graph, const cudaGraphNode_t** nodes, size_t* number) {
  return capture_info(stream, status, id, graph, nodes, number);
}
#endif
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  stream_of(stream)->capturing = true;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  stream_of(stream)->capturing = false;
  *graph = (cudaGraph_t)8;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
  *graph = (cudaGraphExec_t)8;
  return cudaSuccess;
}

// ---- events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  ENTER(cudaEventCreateWithFlags);
  *event = (cudaEvent_t) new Event;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }  // kept: a stream may still come to it
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  ENTER(cudaEventRecord);
  stream_of(stream)->record((Event*)event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  ENTER(cudaStreamWaitEvent);
  stream_of(stream)->wait_for((Event*)event);
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  ENTER(cudaEventSynchronize);
  wait_for((Event*)event);
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return has_happened((Event*)event) ? cudaSuccess : cudaErrorNotReady; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  auto start = (Event*)from, stop = (Event*)to;
  if (!has_happened(start) || !has_happened(stop)) return failed(cudaErrorNotReady);
  *milliseconds = (float)((stop->when(stop->happened) - start->when(start->happened)) * 1e3);
  return cudaSuccess;
}

// ---- kernels

cudaError_t cudaLaunchKernel(const void*, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
  ENTER(cudaLaunchKernel);
  return kernel(stream_of(stream), grid, block);
}
cudaError_t __cudaLaunchKernel(const void* which, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(which, grid, block, arguments, shared, stream);
}
#if CUDART_VERSION >= 11080
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* which, void** arguments) {
  return cudaLaunchKernel(which, how->gridDim, how->blockDim, arguments, how->dynamicSmemBytes, how->stream);
}
#endif
static thread_local struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *(void**)stream = pushed.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
  static void* handle[4];
  return handle;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* about, const void*) {
  memset(about, 0, sizeof *about);
  about->maxThreadsPerBlock = 1024;
  about->numRegs = 32;
  about->ptxVersion = about->binaryVersion = 90;
  about->maxDynamicSharedSizeBytes = 227 << 10;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 8;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 8;
  return cudaSuccess;
}

}  // extern "C"
