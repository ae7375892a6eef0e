// Device memory, filled with 0xFF (not-a-number, in every floating type) when it comes and when it goes; locked pages.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "card.h"

namespace card {
namespace {

constexpr size_t PAGE = 4096, GRAIN = 2 << 20;
using Ranges = std::map<char*, size_t>;

std::mutex& tables = *new std::mutex;
Ranges& on_device = *new Ranges;
Ranges& on_host = *new Ranges;                 // locked
std::set<char*>& ours = *new std::set<char*>;  // those of them that `allocate_locked` gave
size_t total = (size_t)8 << 30, used = 0;
size_t lockable = SIZE_MAX, locked = 0;

bool holds(const Ranges& ranges, const void* address) {
  auto after = ranges.upper_bound((char*)address);
  if (after == ranges.begin()) return false;
  auto& [start, bytes] = *--after;
  return (char*)address < start + bytes;
}

char* page_of(const void* address) { return (char*)((size_t)address / PAGE * PAGE); }
size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

void keep_locked(void* address, size_t bytes) {
  on_host[(char*)address] = bytes;
  keep(&Counts::locked_bytes, locked += bytes);
}

}  // namespace

Place place_of(const void* address) {
  std::lock_guard guard(tables);
  return holds(on_device, address) ? Place::device : holds(on_host, address) ? Place::locked : Place::pageable;
}

int allocate(void** address, size_t bytes) {
  std::lock_guard guard(tables);
  if (used + bytes > total || posix_memalign(address, GRAIN, rounded(bytes, GRAIN))) return cudaErrorMemoryAllocation;
  memset(*address, 0xFF, bytes);
  on_device[(char*)*address] = bytes;
  keep(&Counts::allocated_bytes, used += bytes);
  return cudaSuccess;
}

int release(void* address) {
  std::lock_guard guard(tables);
  auto found = on_device.find((char*)address);
  if (found == on_device.end()) return cudaErrorInvalidValue;
  memset(address, 0xFF, found->second);
  races::forget(address, found->second);
  keep(&Counts::allocated_bytes, used -= found->second);
  on_device.erase(found);
  free(address);
  return cudaSuccess;
}

int lock(void* address, size_t bytes) {
  std::lock_guard guard(tables);
  char *first = page_of(address), *last = page_of((char*)address + bytes - 1);
  for (auto& [start, size] : on_host)
    if (first <= page_of(start + size - 1) && page_of(start) <= last) return cudaErrorHostMemoryAlreadyRegistered;
  if (locked + bytes > lockable) return cudaErrorMemoryAllocation;
  keep_locked(address, bytes);
  return cudaSuccess;
}

int unlock(void* address) {
  std::lock_guard guard(tables);
  auto found = on_host.find((char*)address);
  if (found == on_host.end()) return cudaErrorHostMemoryNotRegistered;
  keep(&Counts::locked_bytes, locked -= found->second);
  on_host.erase(found);
  return cudaSuccess;
}

void* allocate_locked(size_t bytes) {
  void* address;
  std::lock_guard guard(tables);
  if (locked + bytes > lockable || posix_memalign(&address, PAGE, rounded(bytes, PAGE))) return nullptr;
  keep_locked(address, bytes);
  ours.insert((char*)address);
  return address;
}

void release_locked(void* address) {
  if (unlock(address) != cudaSuccess) return;
  ours.erase((char*)address);
  free(address);
}

void unlock_registered() {
  std::vector<char*> registered;
  {
    std::lock_guard guard(tables);
    for (auto& [start, size] : on_host)
      if (!ours.count(start)) registered.push_back(start);
  }
  for (auto start : registered) unlock(start);
}

size_t memory_total() { return total; }
size_t memory_free() {
  std::lock_guard guard(tables);
  return total > used ? total - used : 0;
}

void limit_memory(size_t bytes, size_t bytes_lockable) {
  std::lock_guard guard(tables);
  total = bytes;
  lockable = bytes_lockable;
}

}  // namespace card
