// Every function of the runtime counts its calls, and fails where a test asked for it.
#pragma once
#include <unistd.h>

#include <atomic>

namespace card {

inline std::atomic<long> entries = 0;  // calls of all functions
inline std::atomic<pid_t> user = 0;    // the first process that used the runtime

struct Uses {
  std::atomic<long> number = 0, fails_at = 0;
  int code = 0;
  int next() {
    ++entries;
    pid_t nobody = 0, mine = getpid();
    if (!user.compare_exchange_strong(nobody, mine) && nobody != mine)
      return 3;  // a forked process has no streams: cudaErrorInitializationError, as from a driver
    return ++number == fails_at ? code : 0;
  }
};
Uses& uses_of(const char* function);

}  // namespace card

// The first line of a function: `ENTER(cudaMalloc);`
#define ENTER(function)                               \
  static card::Uses& uses = card::uses_of(#function); \
  if (int code = uses.next()) return failed((cudaError_t)code)
