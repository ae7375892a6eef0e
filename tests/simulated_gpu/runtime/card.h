// A simulated card. Device memory is host memory, a stream is a thread with a queue, an event is a counter.
//
// The files: memory.cpp (device memory and locked pages), streams.cpp (streams, events, the clock of the card),
// races.cpp (which bytes two streams touch in no order), control.cpp (what Python reads and sets, calls that fail on
// purpose), cudart.cpp (the functions of CUDA's runtime, on top of these), cublas.cpp (what a matrix product costs).
#pragma once
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

namespace card {

using Seconds = double;
Seconds now();  // of the host and the card: what has really passed, and what was skipped

// ---- control.cpp

struct Rates {  // bytes and operations per second; 0: as fast as the host goes
  double flops = 0, memory = 0, link = 0, pageable = 0, lock = 0;
  Seconds latency = 0, launch = 0;
};
extern Rates rates;
extern bool empty_queues;  // work given to a stream is dropped: to time the host alone

struct Counts {  // read from Python in this order, as doubles
  double h2d_copies, h2d_bytes, d2h_copies, d2h_bytes, pageable_copies, pageable_bytes, kernels, products, flops;
  double host_waits, host_wait_seconds, locked_bytes, allocated_bytes, compute_seconds, h2d_seconds, d2h_seconds;
  double delays, delay_seconds;
};
void count(double Counts::* which, double much = 1);
void keep(double Counts::* which, double value);

int entered(const char* function);  // counts the call; an error code, where this use of it shall fail
const std::string& label();         // what the calling thread does now, in the words of whoever drives the card

// ---- memory.cpp

enum class Place { pageable, locked, device };
Place place_of(const void* address);
int allocate(void** address, size_t bytes);
int release(void* address);
int lock(void* address, size_t bytes);
int unlock(void* address);
void unlock_registered();  // all that `lock` has locked
void* allocate_locked(size_t bytes);
void release_locked(void* address);
size_t memory_total();
size_t memory_free();
void limit_memory(size_t bytes, size_t lockable);

// ---- races.cpp

struct Access {
  const void* address;
  size_t bytes;
  bool writes;
};
using Moment = std::vector<uint32_t>;  // how far each stream had come: a vector clock
namespace races {
extern bool watched;
void watch(bool on);
void touches(Moment& stream, size_t number, const std::vector<Access>& accesses, const std::string& what);
void forget(const void* address, size_t bytes);
std::vector<std::string> found();
}  // namespace races
void join(Moment& mine, const Moment& other);

// ---- streams.cpp

enum Engine { COMPUTE, H2D, D2H, NONE };  // one of each: what runs on an engine runs alone

struct Event {
  long recorded = 0, happened = 0;  // how often
  Seconds at[16] = {};              // when it last happened, and the times before; a wait means one of them
  Moment moment;
  Seconds& when(long turn) { return at[turn % 16]; }
};

class Stream {
 public:
  Stream();
  // Queues work. `seconds` of `engine` are charged once the work is done.
  using Work = std::function<void()>;
  void give(Work, Engine = NONE, Seconds = 0, const std::vector<Access>& = {}, const std::string& what = {});
  void record(Event*);
  void wait_for(Event*);
  void drain();  // blocks the host until the queue is empty
  bool is_idle();
  bool capturing = false;

  // For whoever holds the lock of all streams.
  static Seconds next_to_wake();
  static void skip_to(Seconds);

 private:
  struct Item {
    Seconds given, delay;
    Work work;
    Engine engine;
    Seconds seconds;
  };
  void run();
  void take(const Item&);
  void sleep_until(Seconds, Seconds slack);
  bool rests();
  std::deque<Item> queue;
  std::condition_variable more, alarm;
  long given = 0, done = 0;
  Seconds clock = 0, wakes = 0;  // its own time; when it wakes up, while it sleeps
  Event* awaited = nullptr;
  long awaited_turn = 0;
  size_t number;
  Moment moment;
};

Stream* stream_of(void* handle);
void drain_all();
bool any_capturing();
void wait_for(Event*);  // blocks the host
bool has_happened(Event*);
void delay_randomly(uint64_t seed, Seconds longest);
void skip_waits(bool skips);
void pass(Seconds);  // the host is busy for so long

}  // namespace card
