// Streams, events and the clock of the card.
//
// Work begins when its stream, its engine and the host's call allow it, and takes what the rates say. Threads sleep
// until that moment of the card's own clock, so that a thread which wakes up late makes nothing else late. No thread
// here holds Python's lock while it waits.
//
// Time that nobody needs can be skipped: where the host waits for the card, all streams sleep, and so do all other
// threads of the process, the clock goes on to the moment at which the first stream wakes up.
#include <dirent.h>
#include <dlfcn.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <set>
#include <thread>

#include "card.h"
#include "entered.h"

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
bool skipping = false;
std::atomic<Seconds> skipped = 0;
std::mutex& threads = *new std::mutex;
std::set<pid_t>& own_threads = *new std::set<pid_t>;  // those of streams

using Clock = std::chrono::steady_clock;
constexpr auto A_MOMENT = std::chrono::microseconds(50);  // to look again whether another thread of the host works

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

// Whether every thread of the host but this one sleeps. Whoever holds a lock of ours lets others sleep that work.
bool host_sleeps() {
  std::lock_guard lock(threads);
  DIR* all = opendir("/proc/self/task");
  bool sleeps = all;
  while (sleeps) {
    dirent* thread = readdir(all);
    if (!thread) break;
    pid_t id = atoi(thread->d_name);
    if (id <= 0 || id == gettid() || own_threads.count(id)) continue;
    std::string about;
    std::getline(std::ifstream("/proc/self/task/" + std::to_string(id) + "/stat"), about);
    auto name_ends = about.rfind(") ");
    sleeps = name_ends == std::string::npos || about[name_ends + 2] == 'S';
  }
  if (all) closedir(all);
  return sleeps;
}

template <class Condition>
void block_host(Condition over) {
  Seconds before = now();
  {
    WithoutPython released;
    std::unique_lock lock(world);
    long seen = entries;
    for (int quiet = 0; !over();) {
      Seconds next = skipping ? Stream::next_to_wake() : 0;
      if (next > 0 && quiet < 2) {  // look twice: a thread that works may sleep for a moment, too
        lock.unlock();
        quiet = host_sleeps() && entries == seen ? quiet + 1 : 0;
        seen = entries;
        if (quiet < 2) std::this_thread::sleep_for(A_MOMENT);
        lock.lock();
        continue;
      }
      if (next > 0) Stream::skip_to(next);
      quiet = 0;
      happened.wait(lock);
    }
  }
  count(&Counts::host_waits);
  count(&Counts::host_wait_seconds, now() - before);
}

void host_has_seen(const Moment& moment) {
  std::lock_guard lock(world);
  join(host, moment);
}

}  // namespace

Seconds now() { return std::chrono::duration<Seconds>(Clock::now().time_since_epoch()).count() + skipped; }

Stream::Stream() {
  std::lock_guard lock(world);
  number = streams.size();
  moment.resize(number + 1);
  streams.push_back(this);
  std::thread([this] { run(); }).detach();
}

void Stream::run() {
  prctl(PR_SET_TIMERSLACK, 1000);
  {
    std::lock_guard lock(threads);
    own_threads.insert(gettid());
  }
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

void Stream::sleep_until(Seconds moment, Seconds slack) {
  std::unique_lock lock(world);
  if (moment - now() < slack) return;
  wakes = moment;
  if (skipping) happened.notify_all();
  while (now() < moment)
    alarm.wait_until(lock, Clock::time_point(std::chrono::duration_cast<Clock::duration>(
                               std::chrono::duration<Seconds>(moment - skipped))));
  wakes = 0;
}

bool Stream::rests() { return done == given || wakes > now() || (awaited && awaited->happened < awaited_turn); }

// When the first stream wakes up, where all of them rest; else 0.
Seconds Stream::next_to_wake() {
  Seconds next = 0;
  for (auto stream : streams) {
    if (!stream->rests()) return 0;
    if (stream->wakes > 0 && (next == 0 || stream->wakes < next)) next = stream->wakes;
  }
  return next;
}

void Stream::skip_to(Seconds moment) {
  skipped = skipped + std::max(0.0, moment - now());
  for (auto stream : streams) stream->alarm.notify_one();
}

void Stream::take(const Item& item) {
  if (item.engine == NONE || item.seconds <= 0) return;
  {
    std::lock_guard lock(engines);
    Seconds begin = std::max({clock, item.given, busy_until[item.engine]});
    clock = busy_until[item.engine] = begin + item.seconds;
  }
  double Counts::* engine_seconds[] = {&Counts::compute_seconds, &Counts::h2d_seconds, &Counts::d2h_seconds};
  count(engine_seconds[item.engine], item.seconds);
  sleep_until(clock, 2e-4);
}

void Stream::give(Work work, Engine engine, Seconds seconds, const std::vector<Access>& accesses,
                  const std::string& what) {
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
    awaited = event;
    awaited_turn = turn;
    if (skipping) happened.notify_all();
    happened.wait(lock, [=] { return event->happened >= turn; });
    awaited = nullptr;
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

void pass(Seconds seconds) {
  std::unique_lock lock(world);
  if (skipping) return Stream::skip_to(now() + seconds);
  lock.unlock();
  std::this_thread::sleep_for(std::chrono::duration<Seconds>(seconds));
}

void skip_waits(bool skips) {
  std::lock_guard lock(world);
  skipping = skips;
}

void delay_randomly(uint64_t seed, Seconds longest) {
  std::lock_guard lock(world);
  delay_seed = seed;
  longest_delay = longest;
  delays = 0;
}

}  // namespace card
