// Finds races: bytes that one stream writes while another one may touch them, in whatever order they happened today.
//
// Every stream has a vector clock. Work joins what its stream waited for, and what the host had waited for when it gave
// the work. Two accesses of the same bytes, one of them a write, must be ordered by that.
#include <algorithm>
#include <map>
#include <set>

#include "card.h"

namespace card {

void join(Moment& mine, const Moment& other) {
  if (mine.size() < other.size()) mine.resize(other.size());
  for (size_t i = 0; i < other.size(); i++) mine[i] = std::max(mine[i], other[i]);
}

namespace races {
namespace {

struct Touch {
  size_t stream;
  uint32_t tick;
  std::string what;
};
struct Bytes {  // from its key in `memory` on
  const char* stop;
  std::vector<Touch> writes, reads;  // one write at the most; one read of each stream since then
};

std::mutex& guarded = *new std::mutex;
std::map<const char*, Bytes>& memory = *new std::map<const char*, Bytes>;
std::set<std::string>& reports = *new std::set<std::string>;

void cut(const char* at) {
  auto after = memory.upper_bound(at);
  if (after == memory.begin()) return;
  auto& [start, bytes] = *--after;
  if (start == at || bytes.stop <= at) return;
  memory[at] = bytes;
  bytes.stop = at;
}

bool is_before(const Touch& touch, const Moment& now) {
  return touch.stream < now.size() && touch.tick <= now[touch.stream];
}

void compare(const std::vector<Touch>& earlier, const char* verb, const Moment& now, size_t number, const char* mine,
             const std::string& what) {
  for (auto& touch : earlier)
    if (touch.stream != number && !is_before(touch, now))
      reports.insert("[" + what + "] " + mine + " bytes that [" + touch.what + "] " + verb +
                     ", and waits for no event behind it");
}

}  // namespace

bool watched = false;

void touches(Moment& now, size_t number, const std::vector<Access>& accesses, const std::string& what) {
  std::lock_guard guard(guarded);
  for (auto& access : accesses) {
    if (!access.bytes) continue;
    const char *start = (const char*)access.address, *stop = start + access.bytes;
    cut(start);
    cut(stop);
    Touch mine{number, now[number], what};
    for (auto at = start; at < stop;) {
      auto next = memory.lower_bound(at);
      if (next == memory.end() || next->first > at) {  // bytes that nobody has touched yet
        auto end = next == memory.end() ? stop : std::min(stop, next->first);
        next = memory.insert({at, Bytes{end, {}, {}}}).first;
      }
      auto& bytes = next->second;
      compare(bytes.writes, "writes", now, number, access.writes ? "writes" : "reads", what);
      if (access.writes) {
        compare(bytes.reads, "reads", now, number, "writes", what);
        bytes.writes = {mine};
        bytes.reads.clear();
      } else {
        auto same =
            std::find_if(bytes.reads.begin(), bytes.reads.end(), [&](auto& read) { return read.stream == number; });
        if (same == bytes.reads.end())
          bytes.reads.push_back(mine);
        else
          *same = mine;
      }
      at = bytes.stop;
    }
  }
}

void forget(const void* address, size_t bytes) {
  if (!watched) return;
  std::lock_guard guard(guarded);
  cut((const char*)address);
  cut((const char*)address + bytes);
  memory.erase(memory.lower_bound((const char*)address), memory.lower_bound((const char*)address + bytes));
}

void watch(bool on) {
  std::lock_guard guard(guarded);
  watched = on;
  memory.clear();
  reports.clear();
}

std::vector<std::string> found() {
  std::lock_guard guard(guarded);
  return {reports.begin(), reports.end()};
}

}  // namespace races
}  // namespace card
