// Stands in for the header of the dynamic linker: the library of CUDA's driver, as far as fastinterp opens it.
#pragma once

constexpr int RTLD_NOW = 2;

extern "C" void* fake_driver(const char* function);

inline void* dlopen(const char* name, int) { return const_cast<char*>(name); }
inline void* dlsym(void*, const char* function) { return fake_driver(function); }
