// What Python reads and sets: counts, rates, limits, delays, calls that fail on purpose, races.
#include <atomic>
#include <cstring>
#include <map>

#include "card.h"
#include "entered.h"

namespace card {

Rates rates;
bool empty_queues = false;

namespace {

std::mutex& guarded = *new std::mutex;
Counts counts;
thread_local std::string current_label;

std::map<std::string, Uses>& functions() {
  static auto& all = *new std::map<std::string, Uses>;
  return all;
}

}  // namespace

void count(double Counts::* which, double much) {
  std::lock_guard lock(guarded);
  counts.*which += much;
}

void keep(double Counts::* which, double value) {
  std::lock_guard lock(guarded);
  counts.*which = value;
}

const std::string& label() { return current_label; }

Uses& uses_of(const char* function) {
  std::lock_guard lock(guarded);
  return functions()[function];
}

}  // namespace card

using namespace card;

extern "C" {

void simulated_counts(double* out) {
  std::lock_guard lock(guarded);
  memcpy(out, &counts, sizeof counts);
}

void simulated_rates(double flops, double memory, double link, double pageable, double latency, double launch,
                     double lock) {
  rates = {flops, memory, link, pageable, lock, latency, launch};
}

void simulated_limits(size_t memory, size_t lockable) { limit_memory(memory, lockable); }
void simulated_unlock_all() { unlock_registered(); }
void simulated_delays(uint64_t seed, double longest) { delay_randomly(seed, longest); }
void simulated_skip_waits(int skips) { skip_waits(skips); }
double simulated_now() { return now(); }
void simulated_empty_queues(int empty) { empty_queues = empty; }
void simulated_label(const char* text) { current_label = text; }

// The nth use of the function from now on gives this code. 0: never.
void simulated_failure(const char* function, long nth, int code) {
  auto& uses = uses_of(function);
  uses.code = code;
  uses.fails_at = nth ? uses.number + nth : 0;
}
long simulated_uses(const char* function) { return uses_of(function).number; }

void simulated_watch(int on) { races::watch(on); }
size_t simulated_races(char* out, size_t room) {  // a line each; returns how much room all of them want
  std::string text;
  for (auto& race : races::found()) text += race + "\n";
  if (room) {
    strncpy(out, text.c_str(), room - 1);
    out[room - 1] = 0;
  }
  return text.size() + 1;
}

// Work of Python's in a stream: `call(which)` runs when the stream gets there.
void simulated_work(void* stream, void (*call)(long), long which, const char* what, const Access* accesses,
                    size_t number) {
  stream_of(stream)->give([=] { call(which); }, NONE, 0, {accesses, accesses + number}, label() + " " + what);
}

// Charges what a kernel costs that no stand-in counts.
void simulated_cost(void* stream, double flops, double bytes) {
  if (rates.flops <= 0) return;
  count(&Counts::products);
  count(&Counts::flops, flops);
  Seconds moving = rates.memory > 0 ? bytes / rates.memory : 0;
  stream_of(stream)->give([] {}, COMPUTE, rates.launch + std::max(flops / rates.flops, moving));
}

}  // extern "C"
