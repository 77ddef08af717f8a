#include "range_cache.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace fi {

namespace {

constexpr size_t kFewestCells = 8;
constexpr auto kTick = std::chrono::milliseconds(50);  // between looks at what cancels a reader

}  // namespace

RangeCache::RangeCache(std::vector<int64_t> sizes, int64_t cell_bytes, int64_t most)
    : cell_bytes_(cell_bytes), most_cells_(std::max(kFewestCells, size_t(most / cell_bytes))) {
  for (const int64_t size : sizes) files_.push_back({size});
}

RangeCache::Cell& RangeCache::wanted(int file, int64_t cell, bool demanded) {
  const auto [at, added] = files_[size_t(file)].cells.try_emplace(cell);
  Cell& found = at->second;
  if (added || (demanded && !found.demanded && found.state == State::wanted)) {
    demanded ? queue_.emplace_front(file, cell) : queue_.emplace_back(file, cell);
    work_.notify_one();
  }
  found.demanded |= demanded;
  return found;
}

int64_t RangeCache::read(int file_index, int64_t offset, int64_t size, char* to, const std::atomic<bool>* cancelled) {
  std::unique_lock<std::mutex> lock(mutex_);
  File& file = files_[size_t(file_index)];
  const int64_t end = std::min(offset + size, file.size);
  for (int64_t at = offset; at < end;) {
    const int64_t number = at / cell_bytes_, from = at % cell_bytes_;
    const int64_t count = std::min(end - at, cell_bytes_ - from);
    Cell* cell = &wanted(file_index, number, true);
    while (cell->state != State::ready) {
      if (file.failed || stopped_ || (cancelled && *cancelled)) throw Stopped{};
      ready_.wait_for(lock, kTick);
      cell = &wanted(file_index, number, true);
    }
    ++cell->readers;
    const char* const bytes = cell->bytes.get();
    lock.unlock();
    memcpy(to + (at - offset), bytes + from, size_t(count));
    lock.lock();
    cell = &file.cells.at(number);  // it stays while it has readers
    --cell->readers;
    const bool fresh = cell->read == 0;
    cell->read += count;
    cell->demanded = false;
    cell->turn = ++turn_;
    at += count;
    if (fresh || cell->read >= cell_bytes_) work_.notify_all();  // it can make room
  }
  return std::max<int64_t>(0, end - offset);
}

void RangeCache::want(int file_index, int64_t offset, int64_t size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  File& file = files_[size_t(file_index)];
  const int64_t end = std::min(offset + size, file.size);
  for (int64_t cell = offset / cell_bytes_; cell * cell_bytes_ < end; ++cell) wanted(file_index, cell, false);
}

// Frees the cell that was read longest ago; if a reader waits, else also one that nobody has read yet, and that was
// fetched last. False, if there is none.
bool RangeCache::make_room(bool demanded) {
  if (held_ < most_cells_) return true;
  File* of = nullptr;
  int64_t victim = 0;
  const Cell* best = nullptr;
  for (File& file : files_)
    for (const auto& [number, cell] : file.cells) {
      const bool used = cell.read > 0;
      if (cell.state != State::ready || cell.readers || cell.demanded || (!used && !demanded)) continue;
      const bool later = best && cell.turn > best->turn;
      if (!best || (used != (best->read > 0) ? used : used != later)) best = &cell, of = &file, victim = number;
    }
  if (!best) return false;
  spare_.push_back(std::move(of->cells.at(victim).bytes));
  of->cells.erase(victim);
  --held_;
  return true;
}

bool RangeCache::take(double seconds, Claim* claim) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  for (;;) {
    if (stopped_) return false;
    for (; !queue_.empty(); queue_.pop_front()) {
      const auto [file_index, number] = queue_.front();
      File& file = files_[size_t(file_index)];
      const auto found = file.cells.find(number);
      if (found == file.cells.end() || found->second.state != State::wanted || file.failed) continue;  // taken already
      Cell& cell = found->second;
      if (!make_room(cell.demanded)) break;
      queue_.pop_front();
      const int64_t offset = number * cell_bytes_, bytes = std::min(cell_bytes_, file.size - offset);
      if (spare_.empty()) {
        cell.bytes.reset(new char[size_t(cell_bytes_)]);
      } else {
        cell.bytes = std::move(spare_.back());
        spare_.pop_back();
      }
      cell.state = State::fetching;
      ++held_;
      *claim = {file_index, offset, bytes, cell.bytes.get()};
      return true;
    }
    if (work_.wait_until(lock, until) == std::cv_status::timeout) return false;
  }
}

void RangeCache::filled(int file_index, int64_t offset) {
  const std::lock_guard<std::mutex> lock(mutex_);
  File& file = files_[size_t(file_index)];
  Cell& cell = file.cells.at(offset / cell_bytes_);
  cell.state = State::ready;
  cell.turn = ++turn_;
  fetched_ += std::min(cell_bytes_, file.size - offset);
  ready_.notify_all();
  work_.notify_all();
}

void RangeCache::fail(int file_index) {
  const std::lock_guard<std::mutex> lock(mutex_);
  files_[size_t(file_index)].failed = true;
  ready_.notify_all();
}

void RangeCache::stop() {
  const std::lock_guard<std::mutex> lock(mutex_);
  stopped_ = true;
  ready_.notify_all();
  work_.notify_all();
}

}  // namespace fi
