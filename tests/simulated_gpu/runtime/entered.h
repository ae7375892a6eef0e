// Every function of the runtime counts its calls, and fails where a test asked for it.
#pragma once
#include <atomic>
#include <unistd.h>

namespace card {

inline const pid_t born = getpid();

struct Uses {
  std::atomic<long> number = 0, fails_at = 0;
  int code = 0;
  int next() {
    if (born != getpid()) return 3;  // a forked process has no streams: cudaErrorInitializationError, as from a driver
    long mine = ++number;
    return mine == fails_at ? code : 0;
  }
};
Uses& uses_of(const char* function);

}  // namespace card

// The first line of a function: `ENTER(cudaMalloc);`
#define ENTER(function)                                       \
  static card::Uses& uses = card::uses_of(#function);         \
  if (int code = uses.next()) return failed((cudaError_t)code)
