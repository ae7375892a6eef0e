// Streams, events and the clock of the card.
//
// Work begins when its stream, its engine and the host's call allow it, and takes what the rates say. Threads sleep
// until that moment of the card's own clock, so that a thread which wakes up late makes nothing else late. No thread
// here holds Python's lock while it waits.
#include <algorithm>
#include <chrono>
#include <dlfcn.h>
#include <sys/prctl.h>
#include <thread>
#include <time.h>

#include "card.h"

namespace card {
namespace {

std::mutex& world = *new std::mutex;  // queues, events, moments
std::condition_variable& happened = *new std::condition_variable;
std::mutex& engines = *new std::mutex;
Seconds busy_until[NONE];
std::deque<Stream*>& streams = *new std::deque<Stream*>;
Moment& host = *new Moment;  // what the host has waited for
uint64_t delay_seed = 0, delays = 0;
Seconds longest_delay = 0;

void sleep_until(Seconds moment, Seconds slack) {
  if (moment - now() < slack) return;
  timespec until{(time_t)moment, (long)((moment - (double)(time_t)moment) * 1e9)};
  while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr)) {}
}

// One work in four is late, by anything up to the longest delay. The same seed delays the same works.
Seconds next_delay() {
  if (longest_delay <= 0) return 0;
  uint64_t x = delay_seed + 0x9E3779B97F4A7C15ull * ++delays;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  x ^= x >> 31;
  Seconds delay = x & 3 ? 0 : longest_delay * (double)(x >> 11) / (double)(1ull << 53);
  if (delay > 0) count(&Counts::delays), count(&Counts::delay_seconds, delay);
  return delay;
}

// Lets other threads run Python while this one waits, where it is a thread that runs Python.
class WithoutPython {
 public:
  WithoutPython() {
    static auto holds = (int (*)())dlsym(RTLD_DEFAULT, "PyGILState_Check");
    static auto save = (void* (*)())dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    if (holds && save && holds()) state = save();
  }
  ~WithoutPython() {
    static auto restore = (void (*)(void*))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    if (state) restore(state);
  }

 private:
  void* state = nullptr;
};

template <class Condition>
void block_host(Condition over) {
  Seconds before = now();
  {
    WithoutPython released;
    std::unique_lock lock(world);
    happened.wait(lock, over);
  }
  count(&Counts::host_waits);
  count(&Counts::host_wait_seconds, now() - before);
}

void host_has_seen(const Moment& moment) {
  std::lock_guard lock(world);
  join(host, moment);
}

}  // namespace

Seconds now() { return std::chrono::duration<Seconds>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Stream::Stream() {
  std::lock_guard lock(world);
  number = streams.size();
  moment.resize(number + 1);
  streams.push_back(this);
  std::thread([this] { run(); }).detach();
}

void Stream::run() {
  prctl(PR_SET_TIMERSLACK, 1000);
  std::unique_lock lock(world);
  for (;;) {
    more.wait(lock, [&] { return !queue.empty(); });
    Item next = std::move(queue.front());
    queue.pop_front();
    lock.unlock();
    if (next.delay > 0) sleep_until(now() + next.delay, 0);
    next.work();
    take(next);
    lock.lock();
    done++;
    happened.notify_all();
  }
}

void Stream::take(const Item& item) {
  if (item.engine == NONE || item.seconds <= 0) return;
  {
    std::lock_guard lock(engines);
    Seconds begin = std::max({clock, item.given, busy_until[item.engine]});
    clock = busy_until[item.engine] = begin + item.seconds;
  }
  double Counts::*engine_seconds[] = {&Counts::compute_seconds, &Counts::h2d_seconds, &Counts::d2h_seconds};
  count(engine_seconds[item.engine], item.seconds);
  sleep_until(clock, 2e-4);
}

void Stream::give(Work work, Engine engine, Seconds seconds, const std::vector<Access>& accesses, const std::string& what) {
  if (empty_queues) return;
  std::lock_guard lock(world);
  if (capturing) return;
  if (races::watched) {
    join(moment, host);
    moment[number]++;
    if (!accesses.empty()) races::touches(moment, number, accesses, what);
  }
  queue.push_back({now(), next_delay(), std::move(work), engine, seconds});
  given++;
  more.notify_one();
}

void Stream::record(Event* event) {
  long turn;
  {
    std::lock_guard lock(world);
    if (capturing) return;
    turn = ++event->recorded;
    join(moment, host);
    event->moment = moment;
    if (empty_queues) event->happened = turn;
  }
  give([=, this, given = now()] {
    if (rates.link > 0 || rates.flops > 0) {
      clock = std::max(clock, given);
      sleep_until(clock, 2e-5);
    } else {
      clock = now();
    }
    std::lock_guard lock(world);
    event->when(turn) = clock;
    event->happened = std::max(event->happened, turn);
  });
}

void Stream::wait_for(Event* event) {
  long turn;
  {
    std::lock_guard lock(world);
    if (capturing) return;
    turn = event->recorded;
    join(moment, event->moment);
  }
  if (!turn) return;  // never recorded: CUDA waits for nothing
  give([=, this] {
    std::unique_lock lock(world);
    happened.wait(lock, [=] { return event->happened >= turn; });
    clock = std::max(clock, event->when(turn));
  });
}

void Stream::drain() {
  long all;
  Moment reached;
  {
    std::lock_guard lock(world);
    all = given;
    reached = moment;
  }
  block_host([&] { return done >= all; });
  host_has_seen(reached);
}

bool Stream::is_idle() {
  std::lock_guard lock(world);
  if (done < given) return false;
  join(host, moment);
  return true;
}

Stream* stream_of(void* handle) {
  static Stream* default_stream = new Stream;
  bool is_default = handle == nullptr || handle == (void*)1 || handle == (void*)2;
  return is_default ? default_stream : (Stream*)handle;
}

void drain_all() {
  std::deque<Stream*> all;
  {
    std::lock_guard lock(world);
    all = streams;
  }
  for (auto stream : all) stream->drain();
}

bool any_capturing() {
  std::lock_guard lock(world);
  return std::any_of(streams.begin(), streams.end(), [](auto stream) { return stream->capturing; });
}

void wait_for(Event* event) {
  long turn;
  Moment reached;
  {
    std::lock_guard lock(world);
    turn = event->recorded;
    reached = event->moment;
  }
  block_host([&] { return event->happened >= turn; });
  host_has_seen(reached);
}

bool has_happened(Event* event) {
  std::lock_guard lock(world);
  if (event->happened < event->recorded) return false;
  join(host, event->moment);
  return true;
}

void delay_randomly(uint64_t seed, Seconds longest) {
  std::lock_guard lock(world);
  delay_seed = seed;
  longest_delay = longest;
  delays = 0;
}

}  // namespace card
