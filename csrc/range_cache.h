// Files that are elsewhere, as far as they are in memory: cells of a fixed size, which threads of the caller fetch when
// the pump asks for them, and which make room for others when they have been read.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace fi {

class RangeCache {
 public:
  // A cell that a fetching thread has taken: `bytes` of the file from `offset` on belong at `to`.
  struct Claim {
    int file;
    int64_t offset, bytes;
    char* to;
  };

  // sizes: of the files, in bytes. most: bytes of all cells together; at least a few cells are held.
  RangeCache(std::vector<int64_t> sizes, int64_t cell_bytes, int64_t most);

  // For readers, from several threads at once. Copies bytes out, and waits for those that are not here. Returns how
  // many it got: fewer behind the end of the file. Throws Stopped, if `cancelled` becomes true, or the file failed.
  struct Stopped {};
  int64_t read(int file, int64_t offset, int64_t size, char* to, const std::atomic<bool>* cancelled);
  // These will be read soon.
  void want(int file, int64_t offset, int64_t size);

  // For fetching threads. Waits at most `seconds` for a cell that is wanted, and for room. The cell stays where it is
  // until `filled`. Returns false, if there was none in this time.
  bool take(double seconds, Claim* claim);
  void filled(int file, int64_t offset);
  // Nothing of the file can be had any more: readers stop.
  void fail(int file);
  // No more cells are taken, and readers stop.
  void stop();
  bool stopped() const { return stopped_; }

  int64_t fetched() const { return fetched_; }  // bytes, those fetched again included

 private:
  enum class State { wanted, fetching, ready };
  struct Cell {
    State state = State::wanted;
    bool demanded = false;  // a reader waits for it
    int64_t read = 0;       // bytes that were read from it
    int readers = 0;
    int64_t turn = 0;  // when it was last read, or became ready
    std::unique_ptr<char[]> bytes = nullptr;
  };
  struct File {
    int64_t size;
    bool failed = false;
    std::unordered_map<int64_t, Cell> cells = {};
  };

  Cell& wanted(int file, int64_t cell, bool demanded);
  bool make_room(bool demanded);

  const int64_t cell_bytes_;
  const size_t most_cells_;
  std::vector<File> files_;
  std::deque<std::pair<int, int64_t>> queue_;   // cells that are wanted, by file; those that a reader waits for first
  size_t held_ = 0;                             // cells that have memory
  std::vector<std::unique_ptr<char[]>> spare_;  // of cells that made room: their pages are there already
  int64_t turn_ = 0;
  std::atomic<int64_t> fetched_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::condition_variable ready_, work_;  // for readers, for fetching threads
};

}  // namespace fi
