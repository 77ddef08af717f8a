#include "transposed.h"

#include <algorithm>

namespace fi {

const char* TransposedMatrix::filled(const std::function<void(int64_t, char*)>& fill) {
  if (done_ == slabs_) return bytes_.get();
  try {
    for (int64_t slab = next_++; slab < slabs_; slab = next_++) {
      fill(slab, bytes_.get());
      const std::lock_guard<std::mutex> lock(mutex_);
      if (++done_ == slabs_) ended_.notify_all();
    }
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex_);
    error_ = std::current_exception();
    ended_.notify_all();
    throw;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  ended_.wait(lock, [this] { return done_ == slabs_ || error_; });
  if (error_) std::rethrow_exception(error_);
  return bytes_.get();
}

std::shared_ptr<TransposedMatrix> TransposedMatrices::get(int64_t index, const void* thread) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (std::find(threads_.begin(), threads_.end(), thread) == threads_.end()) threads_.push_back(thread);
  for (auto kept = kept_.begin(); kept != kept_.end(); ++kept)
    if (kept->index == index) {
      std::rotate(kept, kept + 1, kept_.end());
      return kept_.back().matrix;
    }
  std::unique_ptr<char[]> bytes;
  if (spare_.empty()) {
    bytes.reset(new char[size_t(bytes_)]);
  } else {
    bytes = std::move(spare_.back());
    spare_.pop_back();
  }
  kept_.push_back({index, std::make_shared<TransposedMatrix>(std::move(bytes), slabs_)});
  if (kept_.size() > threads_.size() + 1) kept_.erase(kept_.begin());
  return kept_.back().matrix;
}

void TransposedMatrices::decoded(int64_t index, int64_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto kept = kept_.begin(); kept != kept_.end(); ++kept) {
    if (kept->index != index) continue;
    kept->matrix->decoded_ += count;
    if (kept->matrix->decoded_ < elements_) return;
    if (kept->matrix.use_count() == 1) spare_.push_back(std::move(kept->matrix->bytes_));
    kept_.erase(kept);
    return;
  }
}

void TransposedMatrices::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  kept_.clear();
  spare_.clear();
}

}  // namespace fi
