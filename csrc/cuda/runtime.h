// Devices, their memory, queues and events, and how the errors of CUDA's runtime become exceptions. For the host alone:
// no kernel is compiled with it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace fi {
namespace cuda {

// An error of CUDA, with a message for users. Python gets it as fastinterp.errors.BackendError, or OutOfMemory.
struct Error : std::runtime_error {
  explicit Error(const std::string& message, bool memory = false) : std::runtime_error(message), memory(memory) {}
  const bool memory;  // there was too little
};

// Throws Error unless the call succeeded. The message names the call, the device, the requested bytes, and CUDA's text.
// bytes: -1 if the call has none.
void check(cudaError_t error, const char* call, int device, int64_t bytes = -1);
// Throws Error if the launch of the kernel failed.
void check_launch(const char* kernel, int device);

// The number of devices. Throws Error, if there is no driver, or none that this build can use.
int device_count();
std::string device_label(int device);
// Free memory now, in bytes.
int64_t free_bytes(int device);
// Why no kernel of this build can run on the device, or nothing can be allocated in the order of a queue; empty if both
// can. Makes a context on the device. Throws Error, if not even that can be made.
std::string unusable(int device);

// Makes a device the calling thread's current one, for a scope. Afterwards the thread has the context that it had, or
// none: to set the device that it had instead would make a context there, of hundreds of megabytes, even if nobody uses
// it.
class OnDevice {
 public:
  explicit OnDevice(int device);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  void* before_ = nullptr;  // a CUcontext
};

// Memory of a device (host = false), or of the host and pinned. free() waits until the device is done with it.
class Buffer {
 public:
  Buffer(int device, int64_t bytes, bool host);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uintptr_t address() const { return uintptr_t(at_); }
  int64_t bytes() const { return bytes_; }
  bool host() const { return host_; }
  void free();

 private:
  const int device_;
  const int64_t bytes_;
  const bool host_;
  void* at_ = nullptr;
};

// A moment in a queue.
class Event {
 public:
  explicit Event(int device);
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  bool done() const;
  void wait() const;
  cudaEvent_t handle() const { return event_; }

 private:
  const int device_;
  cudaEvent_t event_ = nullptr;
};

// Pinned host memory of a device for small things, used again and again: to make it takes long, and may wait for the
// device.
class HostPool : public std::enable_shared_from_this<HostPool> {
 public:
  explicit HostPool(int device) : device_(device) {}

  // Memory of at least the requested size. It goes back to the pool when nobody holds it any more, and is reused only
  // when the event, of its last use by the device, has passed.
  struct Block {
    std::unique_ptr<Buffer> buffer;
    std::shared_ptr<Event> last;

    char* at() const { return reinterpret_cast<char*>(buffer->address()); }
  };
  std::shared_ptr<Block> take(int64_t bytes);

  // Raises the release threshold of CUDA's memory pool, so that it retains a little of the memory of Scratch: else it
  // gives that back to the system at every wait, and takes as long as a pass over the data to have it again.
  void retain_scratch();

 private:
  const int device_;
  std::once_flag retained_;
  std::mutex mutex_;
  std::vector<Block> unused_;
};

// A stream. Nothing here waits for the device.
class Queue {
 public:
  Queue(int device, std::shared_ptr<HostPool> pool);                    // a new stream
  Queue(int device, std::shared_ptr<HostPool> pool, uintptr_t stream);  // somebody else's
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }
  HostPool& pool() const { return *pool_; }

  void upload(uintptr_t to, uintptr_t host, int64_t bytes);
  void download(uintptr_t host, uintptr_t of, int64_t bytes);
  void copy(void* to, const void* from, int64_t bytes);  // within the device
  void zero(void* at, int64_t bytes);
  std::shared_ptr<Event> record();
  void after(const Event& event);

  // Whether what is put in becomes a CUDA graph; then nothing may be allocated, and nothing answers.
  bool capturing() const;
  // Copies bytes of pageable memory, which may change afterwards, to the device.
  void send(void* to, const void* from, int64_t bytes);
  // Copies bytes of the device to pinned memory, which lives as long as somebody holds it. They are there when an event
  // that was recorded later has passed.
  std::shared_ptr<const char> fetch(const void* of, int64_t bytes);

 private:
  const int device_;
  const bool owns_stream_;
  const std::shared_ptr<HostPool> pool_;
  cudaStream_t stream_ = nullptr;
};

// Device memory for some launches: allocated, and freed at the end of the scope, in the order of the queue.
// Throws Error, if the queue is capturing: `what` is what the memory is for.
class Scratch {
 public:
  Scratch(Queue* queue, int64_t bytes, const char* what);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* at() const { return at_; }

 private:
  Queue* const queue_;
  void* at_ = nullptr;
};

}  // namespace cuda
}  // namespace fi
