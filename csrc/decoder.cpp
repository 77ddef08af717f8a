#include "decoder.h"

#include <cstring>
#include <list>
#include <mutex>
#include <string>

#include "ops.h"

namespace fi {

namespace {

struct Registered {
  std::string name;
  Decoder decoder;
};
std::list<Registered>& registered() {
  static std::list<Registered> all;
  return all;
}
std::mutex& registering() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace

const Decoder* find_decoder(const Decoder* const* own, const char* name) {
  for (const Decoder* const* decoder = own; *decoder; ++decoder)
    if (strcmp((*decoder)->name, name) == 0) return *decoder;
  const std::lock_guard<std::mutex> lock(registering());
  for (const Registered& one : registered())
    if (one.name == name) return &one.decoder;
  return nullptr;
}

bool register_decoder(const Decoder& decoder) {
  const int64_t elements = decoder.block_elements, bytes = decoder.block_bytes;
  if (elements < 1 || elements > kChunk || bytes < 1 || bytes > 16 * elements) return false;
  const std::lock_guard<std::mutex> lock(registering());
  for (Registered& one : registered())
    if (one.name == decoder.name) {
      one.decoder = decoder;
      one.decoder.name = one.name.c_str();
      return true;
    }
  registered().push_back({decoder.name, decoder});
  Registered& last = registered().back();
  last.decoder.name = last.name.c_str();
  return true;
}

}  // namespace fi
