// The state of the emulated runtime: see runtime.cpp.
#pragma once

#include <cuda_runtime.h>

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

struct FakeEvent {
  FakeStream* stream = nullptr;
  uint64_t ticket = 0;  // passed when the stream has done so much
};

// Work of a stream: done once `ready` says so.
struct Work {
  FakeEvent after;  // of another stream, or none
  std::function<cudaError_t()> run;
};

struct FakeStream {
  int device = 0;
  std::deque<Work> work;
  uint64_t put = 0, done = 0;
  bool busy = false, capturing = false, closing = false;
  std::thread worker;
};

enum Mode { kEager = 0, kDeferred = 1, kThreads = 2 };
constexpr size_t kGuard = 64, kAlign = 256;
constexpr unsigned char kFresh = 0xA5, kGuardByte = 0x5C;

struct Memory {
  size_t bytes;
  int device;
  char* raw;
};

struct Fake {
  std::mutex mutex;
  std::condition_variable changed;
  int mode = kEager, devices = 1, delay_us = 0;
  bool pools = true;  // whether devices say that they have pools of memory
  size_t limit = size_t(1) << 32;
  std::map<int, size_t> used;          // by device
  std::map<uintptr_t, Memory> memory;  // of devices, by address
  std::map<uintptr_t, size_t> host;    // allocated here, by address
  std::set<FakeStream*> streams;
  std::map<int, std::unique_ptr<FakeStream>> defaults;  // by device
  std::map<int, uint64_t> kept;                         // bytes that its pool keeps, by device
  std::set<int> contexts;                               // devices that have one
  std::map<std::string, int64_t> calls;
  std::string fail_call;
  int64_t fail_at = 0;
  cudaError_t fail_with = cudaSuccess;
  std::string wrong;  // what a kernel did wrong, or a guard that was written over
  cudaError_t sticky = cudaSuccess;
};
