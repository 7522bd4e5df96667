// Compiled into the sanitized extension (sanitizers.py): memory beside unreadable pages, threads
// that ThreadSanitizer understands, and defects that must be reported.
#undef TORCH_TARGET_VERSION  // the allocator is not part of the stable ABI
#include <c10/core/Allocator.h>
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#define HAKD_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// On the heap, or against the unreadable page behind the memory or the one before it.
enum Place { kHeap, kEnd, kStart };
Place place = kHeap;
std::mutex mutex;
const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
constexpr char kGarbage = 0x7f;  // the heap is filled with something else

struct Mapping {
  char *first, *data, *last;  // without the unreadable pages
  size_t bytes;
};
std::unordered_map<void*, Mapping> mappings;

void* allocate(size_t bytes) {
  const size_t inside = (bytes + page - 1) / page * page;
  void* memory = mmap(nullptr, inside + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  char* first = static_cast<char*>(memory) + page;
  mprotect(first, inside, PROT_READ | PROT_WRITE);
  std::memset(first, kGarbage, inside);
  char* data = place == kEnd ? first + inside - bytes : first;
  const std::lock_guard<std::mutex> lock(mutex);
  mappings[data] = {first, data, first + inside, bytes};
  return data;
}

// False for memory on the heap.
bool release(void* data) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = mappings.find(data);
  if (found == mappings.end()) return false;
  const auto [first, begin, last, bytes] = found->second;
  const auto touched = [](char byte) { return byte != kGarbage; };
  if (std::any_of(first, begin, touched) || std::any_of(begin + bytes, last, touched)) {
    std::fprintf(stderr, "something was written beside an array of %zu bytes\n", bytes);
    std::abort();
  }
  munmap(first - page, static_cast<size_t>(last - first) + 2 * page);
  mappings.erase(found);
  return true;
}

struct PageAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = ::allocate(bytes);
    return {data, data, [](void* memory) { release(memory); }, c10::DeviceType::CPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};

}  // namespace

// From now on, of tensors and of what the extension itself allocates.
HAKD_EXPORT void heteroakd_place_memory(int where) {
  static c10::Allocator* const heap = c10::GetAllocator(c10::DeviceType::CPU);
  static PageAllocator pages;
  place = static_cast<Place>(where);
  c10::SetAllocator(c10::DeviceType::CPU, place == kHeap ? heap : &pages);
}

HAKD_EXPORT int heteroakd_overflow(int largest) { return largest + 1; }

HAKD_EXPORT int heteroakd_race() {
  int count = 0;
  torch::stable::parallel_for(0, 8, 1, [&](int64_t, int64_t) { ++count; });
  return count;
}

// The linker sends the extension's calls here (-Wl,--wrap).
extern "C" {

void* __real_malloc(size_t);
void __real_free(void*);
void* __real__Znam(size_t);
void __real__ZdaPv(void*);

void* __wrap_malloc(size_t bytes) { return place == kHeap ? __real_malloc(bytes) : allocate(bytes); }
void __wrap_free(void* data) {
  if (!release(data)) __real_free(data);
}

// new T[] and delete[]
void* __wrap__Znam(size_t bytes) { return place == kHeap ? __real__Znam(bytes) : allocate(bytes); }
void __wrap__ZdaPv(void* data) {
  if (!release(data)) __real__ZdaPv(data);
}

// Torch's own threads are not instrumented, and keep workspaces that were made for larger calls.
AOTITorchError __wrap_torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                         ParallelFunc function, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; i += grain) {
    threads.emplace_back(function, i, std::min(i + grain, end), context);
  }
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}
}
