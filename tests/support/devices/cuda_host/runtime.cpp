// A CUDA runtime on the host's memory, for tests. Streams hold work in order; fake_reset sets how it is done:
//
// kEager     at once
// kDeferred  when somebody waits for it, or asks whether it is done; what is not awaited does not happen
// kThreads   by a thread per stream, beside the caller
//
// Device memory is filled with 0xA5 before its first use and has guards around it; copies from or to what is no
// device memory, where it should be, fail. The C functions that begin with fake_ are the controls and counters.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "include/fake.h"

namespace {

// Never destroyed: threads of streams may still run when the process ends.
Fake& fake() {
  static Fake* const all = new Fake;
  return *all;
}

using Lock = std::unique_lock<std::mutex>;

thread_local int current_device = 0;
thread_local int current_context = -1;  // the device that it is of; -1: none
thread_local cudaError_t last_error = cudaSuccess;

// Counts a call, and says whether it is to fail.
cudaError_t called(const char* name) {
  Fake& f = fake();
  const Lock lock(f.mutex);
  const int64_t n = ++f.calls[name];
  if (f.sticky != cudaSuccess) return f.sticky;
  if (f.fail_call == name && n == f.fail_at) return f.fail_with;
  return cudaSuccess;
}

// Makes the context of a device the thread's, as all calls do with the current device where the thread has none.
void use_context(int device) {
  Fake& f = fake();
  const Lock lock(f.mutex);
  f.contexts.insert(device);
  current_device = current_context = device;
}

FakeStream* stream_of(cudaStream_t given) {
  if (given) return given;
  Fake& f = fake();
  const Lock lock(f.mutex);
  std::unique_ptr<FakeStream>& own = f.defaults[current_device];
  if (!own) {
    own = std::make_unique<FakeStream>();
    own->device = current_device;
    f.streams.insert(own.get());
  }
  return own.get();
}

bool passed(const FakeEvent& event) { return !event.stream || event.stream->done >= event.ticket; }

// Does the next work of a stream; of the stream that it waits for, if it waits. False if there is nothing to do.
bool step(FakeStream* stream, Lock* lock) {
  while (!stream->work.empty() && !passed(stream->work.front().after)) {
    if (fake().mode == kThreads) return false;
    stream = stream->work.front().after.stream;
  }
  if (stream->busy || stream->work.empty()) return false;
  Work work = std::move(stream->work.front());
  stream->work.pop_front();
  stream->busy = true;
  const int delay_us = fake().delay_us;
  lock->unlock();
  if (delay_us) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
  const cudaError_t error = work.run ? work.run() : cudaSuccess;
  lock->lock();
  if (error != cudaSuccess) fake().sticky = error;
  stream->busy = false;
  ++stream->done;
  fake().changed.notify_all();
  return true;
}

void serve(FakeStream* stream) {
  Lock lock(fake().mutex);
  while (!stream->closing)
    if (!step(stream, &lock)) fake().changed.wait(lock);
}

// Waits until a stream has done so much.
cudaError_t await(const FakeEvent& event) {
  Fake& f = fake();
  Lock lock(f.mutex);
  while (!passed(event) && f.sticky == cudaSuccess)
    if (f.mode == kThreads || !step(event.stream, &lock)) f.changed.wait_for(lock, std::chrono::milliseconds(100));
  return f.sticky;
}

cudaError_t put(cudaStream_t given, std::function<cudaError_t()> run, FakeEvent after = {}) {
  FakeStream* const stream = stream_of(given);
  Fake& f = fake();
  FakeEvent end;
  {
    const Lock lock(f.mutex);
    if (!f.streams.count(stream)) return cudaErrorInvalidResourceHandle;
    stream->work.push_back({after, std::move(run)});
    end = {stream, ++stream->put};
    if (f.mode == kThreads && !stream->worker.joinable()) stream->worker = std::thread(serve, stream);
    f.changed.notify_all();
    if (f.mode != kEager) return cudaSuccess;
  }
  return await(end);
}

// Whether all of a range is memory of a device.
bool is_device(const void* at, size_t bytes) {
  Fake& f = fake();
  const Lock lock(f.mutex);
  auto found = f.memory.upper_bound(uintptr_t(at));
  if (found == f.memory.begin()) return false;
  --found;
  return uintptr_t(at) + bytes <= found->first + found->second.bytes;
}

cudaError_t allocate(void** to, size_t bytes) {
  Fake& f = fake();
  const Lock lock(f.mutex);
  *to = nullptr;
  if (current_device >= f.devices) return cudaErrorNoDevice;
  if (f.used[current_device] + bytes > f.limit) return cudaErrorMemoryAllocation;
  const size_t whole = (bytes + 2 * kAlign + kAlign - 1) / kAlign * kAlign;
  char* const raw = static_cast<char*>(std::aligned_alloc(kAlign, whole));
  if (!raw) return cudaErrorMemoryAllocation;
  memset(raw, kGuardByte, whole);
  memset(raw + kAlign, kFresh, bytes);
  f.used[current_device] += bytes;
  f.memory[uintptr_t(raw + kAlign)] = {bytes, current_device, raw};
  *to = raw + kAlign;
  return cudaSuccess;
}

cudaError_t release(void* memory) {
  Fake& f = fake();
  const Lock lock(f.mutex);
  const auto found = f.memory.find(uintptr_t(memory));
  if (found == f.memory.end()) return cudaErrorInvalidValue;
  const Memory m = found->second;
  for (size_t i = 0; i < kGuard; ++i)
    if (m.raw[kAlign - 1 - i] != char(kGuardByte) || m.raw[kAlign + m.bytes + i] != char(kGuardByte))
      f.wrong = "something was written beside a device's memory of " + std::to_string(m.bytes) + " bytes";
  f.used[m.device] -= m.bytes;
  f.memory.erase(found);
  memset(m.raw, kGuardByte, m.bytes + kAlign);
  std::free(m.raw);
  return cudaSuccess;
}

void drain() {
  Fake& f = fake();
  std::vector<FakeEvent> ends;
  {
    const Lock lock(f.mutex);
    for (FakeStream* s : f.streams) ends.push_back({s, s->put});
  }
  for (const FakeEvent& end : ends) await(end);
}

}  // namespace

namespace fi_host {

void launch(uint32_t blocks, uint32_t threads, cudaStream_t stream, std::function<void()> thread) {
  cudaError_t error = called("launch");
  if (error == cudaSuccess)
    error = put(stream, [=] {
      const char* const wrong = run_grid(blocks, threads, thread);
      if (!wrong) return cudaSuccess;
      const Lock lock(fake().mutex);
      fake().wrong = wrong;
      return cudaErrorLaunchFailure;
    });
  if (error != cudaSuccess) last_error = error;
}

}  // namespace fi_host

#define FI_CALLED(name)                                               \
  if (const cudaError_t error = called(name); error != cudaSuccess) { \
    last_error = error;                                               \
    return error;                                                     \
  }
#define FI_IN_CONTEXT(name) \
  FI_CALLED(name)           \
  if (current_context < 0) use_context(current_device)

extern "C" {

// ---- controls ------------------------------------------------------------------------------------------------------

#define FI_CONTROL __attribute__((visibility("default")))

// Everything as at the start; work that was put in is dropped.
FI_CONTROL void fake_reset(int mode, int devices, uint64_t limit_bytes, int delay_us) {
  drain();
  Fake& f = fake();
  const Lock lock(f.mutex);
  for (FakeStream* s : f.streams) s->work.clear(), s->done = s->put;
  f.mode = mode, f.devices = devices, f.limit = limit_bytes, f.delay_us = delay_us;
  f.calls.clear(), f.fail_call.clear(), f.wrong.clear();
  f.pools = true;
  f.sticky = cudaSuccess;
  f.contexts.clear(), f.kept.clear();
  last_error = cudaSuccess;
  current_device = 0, current_context = -1;
}
// The n-th call of a name from now on fails, n = 1 for the next one; "launch" is a call, too.
FI_CONTROL void fake_fail(const char* call, int64_t n, int error) {
  Fake& f = fake();
  const Lock lock(f.mutex);
  f.fail_call = call, f.fail_at = f.calls[call] + n, f.fail_with = cudaError_t(error);
}
FI_CONTROL int64_t fake_calls(const char* call) {
  const Lock lock(fake().mutex);
  return fake().calls[call];
}
FI_CONTROL int64_t fake_used(int device) {
  const Lock lock(fake().mutex);
  return int64_t(fake().used[device]);
}
// Bytes that the pool of a device keeps after a wait; -1 only asks.
FI_CONTROL int64_t fake_kept(int device, int64_t bytes) {
  const Lock lock(fake().mutex);
  if (bytes >= 0) fake().kept[device] = uint64_t(bytes);
  return int64_t(fake().kept[device]);
}
FI_CONTROL int fake_has_context(int device) {
  const Lock lock(fake().mutex);
  return int(fake().contexts.count(device));
}
FI_CONTROL int64_t fake_host_blocks() {
  const Lock lock(fake().mutex);
  return int64_t(fake().host.size());
}
// What was done wrong since the last reset, or an empty string.
FI_CONTROL const char* fake_wrong() {
  static thread_local std::string text;
  const Lock lock(fake().mutex);
  text = fake().wrong;
  return text.c_str();
}
// Whether devices say that they have pools of memory.
FI_CONTROL void fake_pools(int there) {
  const Lock lock(fake().mutex);
  fake().pools = there != 0;
}
FI_CONTROL void fake_capture(cudaStream_t stream, int on) { stream_of(stream)->capturing = on != 0; }

// ---- devices -------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  FI_CALLED("cudaGetDeviceCount");
  const Lock lock(fake().mutex);
  *count = fake().devices;
  return *count ? cudaSuccess : last_error = cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
  FI_CALLED("cudaSetDevice");
  if (device < 0 || device >= fake().devices) return last_error = cudaErrorInvalidDevice;
  use_context(device);
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  FI_CALLED("cudaGetDevice");
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* prop, int device) {
  FI_CALLED("cudaGetDeviceProperties");
  if (device < 0 || device >= fake().devices) return last_error = cudaErrorInvalidDevice;
  snprintf(prop->name, sizeof prop->name, "Emulated device %d", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  FI_CALLED("cudaDeviceGetAttribute");
  *value = attribute == cudaDevAttrMultiProcessorCount      ? 4
           : attribute == cudaDevAttrMemoryPoolsSupported   ? int(fake().pools)
           : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                            : 0;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  FI_IN_CONTEXT("cudaFuncGetAttributes");
  attributes->numRegs = 32;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  FI_IN_CONTEXT("cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  *blocks = 3;
  return cudaSuccess;
}

// ---- memory --------------------------------------------------------------------------------------------------------

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  FI_IN_CONTEXT("cudaMemGetInfo");
  const Lock lock(fake().mutex);
  *total = fake().limit;
  *free = fake().limit - fake().used[current_device];
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** to, size_t bytes) {
  FI_IN_CONTEXT("cudaMalloc");
  const cudaError_t error = allocate(to, bytes);
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t cudaFree(void* memory) {
  FI_IN_CONTEXT("cudaFree");
  drain();
  return memory ? release(memory) : cudaSuccess;
}
cudaError_t cudaMallocAsync(void** to, size_t bytes, cudaStream_t) {
  FI_IN_CONTEXT("cudaMallocAsync");
  const cudaError_t error = allocate(to, bytes);
  if (error != cudaSuccess) last_error = error;
  return error;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  FI_IN_CONTEXT("cudaFreeAsync");
  return put(stream, [=] { return release(memory); });
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  FI_IN_CONTEXT("cudaDeviceGetDefaultMemPool");
  const Lock lock(fake().mutex);
  *pool = &fake().kept[device];
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr, void* value) {
  FI_IN_CONTEXT("cudaMemPoolGetAttribute");
  const Lock lock(fake().mutex);
  *static_cast<uint64_t*>(value) = *pool;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr, void* value) {
  FI_IN_CONTEXT("cudaMemPoolSetAttribute");
  const Lock lock(fake().mutex);
  *pool = *static_cast<const uint64_t*>(value);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) {
  FI_IN_CONTEXT("cudaHostAlloc");
  *to = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096 + 4096);
  if (!*to) return last_error = cudaErrorMemoryAllocation;
  memset(*to, kFresh, bytes);
  const Lock lock(fake().mutex);
  fake().host[uintptr_t(*to)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory) {
  FI_IN_CONTEXT("cudaFreeHost");
  drain();
  const Lock lock(fake().mutex);
  if (!fake().host.erase(uintptr_t(memory))) return last_error = cudaErrorInvalidValue;
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  FI_IN_CONTEXT("cudaMemcpyAsync");
  if ((kind == cudaMemcpyHostToDevice && !is_device(to, bytes)) ||
      (kind == cudaMemcpyDeviceToHost && !is_device(from, bytes)))
    return last_error = cudaErrorInvalidValue;
  return put(stream, [=] { return memcpy(to, from, bytes), cudaSuccess; });
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  FI_IN_CONTEXT("cudaMemsetAsync");
  if (!is_device(to, bytes)) return last_error = cudaErrorInvalidValue;
  return put(stream, [=] { return memset(to, value, bytes), cudaSuccess; });
}

// ---- streams and events --------------------------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  FI_IN_CONTEXT("cudaStreamCreateWithFlags");
  const Lock lock(fake().mutex);
  *stream = new FakeStream;
  (*stream)->device = current_device;
  fake().streams.insert(*stream);
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  FI_IN_CONTEXT("cudaStreamDestroy");
  await({stream, stream->put});
  {
    const Lock lock(fake().mutex);
    if (!fake().streams.erase(stream)) return last_error = cudaErrorInvalidResourceHandle;
    stream->closing = true;
    stream->done = ~uint64_t(0);
    fake().changed.notify_all();
  }
  if (stream->worker.joinable()) stream->worker.join();
  return cudaSuccess;  // events may still name it, so it stays where it is
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  FI_IN_CONTEXT("cudaStreamSynchronize");
  FakeStream* const s = stream_of(stream);
  return await({s, s->put});
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  FI_IN_CONTEXT("cudaStreamWaitEvent");
  return put(stream, nullptr, *event);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  FI_IN_CONTEXT("cudaStreamIsCapturing");
  *status = stream_of(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  FI_IN_CONTEXT("cudaEventCreateWithFlags");
  *event = new FakeEvent;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  FI_IN_CONTEXT("cudaEventDestroy");
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  FI_IN_CONTEXT("cudaEventRecord");
  FakeStream* const s = stream_of(stream);
  const Lock lock(fake().mutex);
  *event = {s, s->put};
  return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  FI_IN_CONTEXT("cudaEventQuery");
  Lock lock(fake().mutex);
  if (fake().sticky != cudaSuccess) return fake().sticky;
  if (passed(*event)) return cudaSuccess;
  if (fake().mode == kDeferred) step(event->stream, &lock);  // so that asking again and again comes to an end
  return last_error = cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  FI_IN_CONTEXT("cudaEventSynchronize");
  return await(*event);
}

// ---- the driver ----------------------------------------------------------------------------------------------------

// Contexts are numbers: that of device 0 is 1, and so on.
static int get_context(void** context) {
  *context = reinterpret_cast<void*>(intptr_t(current_context) + 1);
  return 0;
}
static int set_context(void* context) {
  current_context = int(intptr_t(context)) - 1;
  return 0;
}
void* fake_driver(const char* function) {
  return reinterpret_cast<void*>(strcmp(function, "cuCtxGetCurrent") ? uintptr_t(set_context) : uintptr_t(get_context));
}

// ---- errors --------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
}  // extern "C"
