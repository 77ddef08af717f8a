#include "runtime.h"

#include <dlfcn.h>

#include <cstring>

#include "folds.h"

namespace fi {
namespace cuda {

namespace {

[[noreturn]] void fail(cudaError_t error, const std::string& call, int device, int64_t bytes) {
  std::string text = call + " failed";
  if (device >= 0) text += " on cuda:" + std::to_string(device);
  if (bytes >= 0) text += ", " + std::to_string(bytes) + " bytes";
  text += std::string(": ") + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")";
  throw Error(text, error == cudaErrorMemoryAllocation);
}

constexpr uint64_t kRetainedScratch = 64 << 20;  // bytes of each device

// Functions of the driver that the runtime lacks, from the library that it opens itself.
struct Driver {
  int (*get)(void**);  // cuCtxGetCurrent
  int (*set)(void*);   // cuCtxSetCurrent
};

const Driver& driver() {
  static const Driver functions = [] {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    const auto function = [&](const char* name) {
      void* const at = library ? dlsym(library, name) : nullptr;
      if (!at) throw Error(std::string("there is no driver of CUDA: libcuda.so.1 has no ") + name);
      return at;
    };
    return Driver{reinterpret_cast<int (*)(void**)>(function("cuCtxGetCurrent")),
                  reinterpret_cast<int (*)(void*)>(function("cuCtxSetCurrent"))};
  }();
  return functions;
}

}  // namespace

void check(cudaError_t error, const char* call, int device, int64_t bytes) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // what is reported here is not to be reported again by the check of a launch
  fail(error, call, device, bytes);
}

void check_launch(const char* kernel, int device) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) fail(error, std::string("the launch of ") + kernel, device, -1);
}

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice) {
    (void)cudaGetLastError();
    return 0;
  }
  check(error, "cudaGetDeviceCount", -1);
  return count;
}

std::string device_label(int device) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties", device);
  return properties.name;
}

int64_t free_bytes(int device) {
  const OnDevice on(device);
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo", device);
  return int64_t(free);
}

std::string unusable(int device) {
  const OnDevice on(device);
  int pools = 0, major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&pools, cudaDevAttrMemoryPoolsSupported, device), "cudaDeviceGetAttribute", device);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute", device);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute", device);
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, fold_function());
  if (error != cudaSuccess) {
    (void)cudaGetLastError();
    return "this build has no kernels for its compute capability, " + std::to_string(major) + "." +
           std::to_string(minor) + " (" + cudaGetErrorName(error) + ")";
  }
  return pools ? "" : "it has no memory pools (cudaMallocAsync)";
}

OnDevice::OnDevice(int device) {
  if (driver().get(&before_) != 0) before_ = nullptr;  // nobody has used CUDA in this process
  check(cudaSetDevice(device), "cudaSetDevice", device);
}

OnDevice::~OnDevice() { (void)driver().set(before_); }

// ---- memory --------------------------------------------------------------------------------------------------------

Buffer::Buffer(int device, int64_t bytes, bool host) : device_(device), bytes_(bytes), host_(host) {
  const OnDevice on(device);
  const size_t size = bytes > 0 ? size_t(bytes) : 1;  // so that every buffer has an address
  if (host)
    check(cudaHostAlloc(&at_, size, cudaHostAllocPortable), "cudaHostAlloc", device, bytes);
  else
    check(cudaMalloc(&at_, size), "cudaMalloc", device, bytes);
}

Buffer::~Buffer() {
  try {
    free();
  } catch (const std::exception&) {
    // The device's error is reported at the event that is waited for.
  }
}

void Buffer::free() {
  void* const at = at_;
  at_ = nullptr;
  if (!at) return;
  const OnDevice on(device_);
  if (host_)
    check(cudaFreeHost(at), "cudaFreeHost", device_, bytes_);
  else
    check(cudaFree(at), "cudaFree", device_, bytes_);
}

// ---- queues --------------------------------------------------------------------------------------------------------

Event::Event(int device) : device_(device) {
  const OnDevice on(device);
  // Threads that wait sleep: others need their processors to read and write meanwhile.
  check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming | cudaEventBlockingSync), "cudaEventCreate", device);
}

Event::~Event() {
  try {
    const OnDevice on(device_);
    (void)cudaEventDestroy(event_);
  } catch (const std::exception&) {
    // As in ~Buffer.
  }
}

bool Event::done() const {
  const OnDevice on(device_);
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) {
    (void)cudaGetLastError();  // no error, but CUDA notes it as one, and the check of a launch would find it
    return false;
  }
  check(error, "cudaEventQuery", device_);
  return true;
}

void Event::wait() const {
  const OnDevice on(device_);
  check(cudaEventSynchronize(event_), "cudaEventSynchronize", device_);
}

std::shared_ptr<HostPool::Block> HostPool::take(int64_t bytes) {
  int64_t size = 4096;
  while (size < bytes) size *= 2;
  auto block = std::make_unique<Block>();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < unused_.size() && !block->buffer; ++i) {
      if (unused_[i].buffer->bytes() != size || (unused_[i].last && !unused_[i].last->done())) continue;
      *block = std::move(unused_[i]);
      unused_.erase(unused_.begin() + ptrdiff_t(i));
    }
  }
  if (!block->buffer) block->buffer = std::make_unique<Buffer>(device_, size, true);
  return std::shared_ptr<Block>(block.release(), [self = shared_from_this()](Block* used) {
    const std::unique_ptr<Block> returned(used);
    const std::lock_guard<std::mutex> lock(self->mutex_);
    self->unused_.push_back(std::move(*returned));
  });
}

void HostPool::retain_scratch() {
  std::call_once(retained_, [this] {
    cudaMemPool_t pool = nullptr;
    uint64_t threshold = 0, wanted = kRetainedScratch;
    check(cudaDeviceGetDefaultMemPool(&pool, device_), "cudaDeviceGetDefaultMemPool", device_);
    check(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold), "cudaMemPoolGetAttribute",
          device_);
    if (threshold >= wanted) return;  // others use the same pool
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &wanted), "cudaMemPoolSetAttribute", device_);
  });
}

Queue::Queue(int device, std::shared_ptr<HostPool> pool) : device_(device), owns_stream_(true), pool_(std::move(pool)) {
  const OnDevice on(device);
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate", device);
}

Queue::Queue(int device, std::shared_ptr<HostPool> pool, uintptr_t stream)
    : device_(device), owns_stream_(false), pool_(std::move(pool)), stream_(reinterpret_cast<cudaStream_t>(stream)) {}

Queue::~Queue() {
  if (!owns_stream_) return;
  try {
    const OnDevice on(device_);
    (void)cudaStreamDestroy(stream_);
  } catch (const std::exception&) {
    // As in ~Buffer.
  }
}

void Queue::upload(uintptr_t to, uintptr_t host, int64_t bytes) {
  const OnDevice on(device_);
  check(cudaMemcpyAsync(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(host), size_t(bytes),
                        cudaMemcpyHostToDevice, stream_),
        "cudaMemcpyAsync to the device", device_, bytes);
}

void Queue::download(uintptr_t host, uintptr_t of, int64_t bytes) {
  const OnDevice on(device_);
  check(cudaMemcpyAsync(reinterpret_cast<void*>(host), reinterpret_cast<const void*>(of), size_t(bytes),
                        cudaMemcpyDeviceToHost, stream_),
        "cudaMemcpyAsync from the device", device_, bytes);
}

void Queue::copy(void* to, const void* from, int64_t bytes) {
  const OnDevice on(device_);
  check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToDevice, stream_),
        "cudaMemcpyAsync within the device", device_, bytes);
}

void Queue::zero(void* at, int64_t bytes) {
  const OnDevice on(device_);
  check(cudaMemsetAsync(at, 0, size_t(bytes), stream_), "cudaMemsetAsync", device_, bytes);
}

std::shared_ptr<Event> Queue::record() {
  const OnDevice on(device_);
  auto event = std::make_shared<Event>(device_);
  check(cudaEventRecord(event->handle(), stream_), "cudaEventRecord", device_);
  return event;
}

void Queue::after(const Event& event) {
  const OnDevice on(device_);
  check(cudaStreamWaitEvent(stream_, event.handle(), 0), "cudaStreamWaitEvent", device_);
}

void Queue::send(void* to, const void* from, int64_t bytes) {
  const std::shared_ptr<HostPool::Block> block = pool_->take(bytes);
  memcpy(block->at(), from, size_t(bytes));
  upload(uintptr_t(to), block->buffer->address(), bytes);
  block->last = record();
}

std::shared_ptr<const char> Queue::fetch(const void* of, int64_t bytes) {
  const std::shared_ptr<HostPool::Block> block = pool_->take(bytes);
  download(block->buffer->address(), uintptr_t(of), bytes);
  block->last = record();
  return {block, block->at()};
}

bool Queue::capturing() const {
  const OnDevice on(device_);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_, &status), "cudaStreamIsCapturing", device_);
  return status != cudaStreamCaptureStatusNone;
}

Scratch::Scratch(Queue* queue, int64_t bytes, const char* what) : queue_(queue) {
  if (queue->capturing())
    throw Error(std::string(what) + " need memory of cuda:" + std::to_string(queue->device()) +
                ", which cannot be part of a CUDA graph");
  const OnDevice on(queue->device());
  queue->pool().retain_scratch();
  check(cudaMallocAsync(&at_, bytes > 0 ? size_t(bytes) : 1, queue->stream()), "cudaMallocAsync", queue->device(),
        bytes);
}

Scratch::~Scratch() {
  try {
    const OnDevice on(queue_->device());
    (void)cudaFreeAsync(at_, queue_->stream());
  } catch (const std::exception&) {
    // As in ~Buffer.
  }
}

}  // namespace cuda
}  // namespace fi
