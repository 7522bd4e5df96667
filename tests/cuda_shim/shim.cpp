// The machine behind cuda_runtime.h: fibres, their order, and what is checked. State is global, a
// lock keeps launches apart.
#include <cuda_runtime.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define HAKD_SHIM_ASAN 1
#else
#define HAKD_SHIM_ASAN 0
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// --- switching between stacks --------------------------------------------------------------------
// A switch saves what a called function must preserve, and nothing else: no system call as in
// swapcontext. The floating-point modes are not saved; kernels do not change them.

#if !defined(HAKD_SHIM_UCONTEXT) && defined(__x86_64__)
#define HAKD_SHIM_ASSEMBLY 1
asm(R"(
.text
.hidden hakd_shim_switch
.globl hakd_shim_switch
.type hakd_shim_switch, @function
hakd_shim_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size hakd_shim_switch, .-hakd_shim_switch
)");
#elif !defined(HAKD_SHIM_UCONTEXT) && defined(__aarch64__)
#define HAKD_SHIM_ASSEMBLY 1
asm(R"(
.text
.hidden hakd_shim_switch
.globl hakd_shim_switch
.type hakd_shim_switch, %function
hakd_shim_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
.size hakd_shim_switch, .-hakd_shim_switch
)");
#else
#define HAKD_SHIM_ASSEMBLY 0
#include <ucontext.h>
#endif

#if HAKD_SHIM_ASSEMBLY
extern "C" void hakd_shim_switch(void** save, void* load);
#endif

namespace hakd_shim {
namespace {

#if HAKD_SHIM_ASSEMBLY
using Context = void*;  // the stack pointer; the registers lie there

void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack + bytes);
#if defined(__x86_64__)
  top[-1] = 0;  // where entry would return to: a debugger's backtrace ends here
  top[-2] = reinterpret_cast<uintptr_t>(entry);
  std::fill(top - 8, top - 2, 0);
  context = top - 8;
#else
  std::fill(top - 20, top, 0);
  top[-20 + 11] = reinterpret_cast<uintptr_t>(entry);  // x30
  context = top - 20;
#endif
}

void switch_context(Context& from, Context& to) { hakd_shim_switch(&from, to); }
#else
using Context = ucontext_t;

void make_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

// --- state ---------------------------------------------------------------------------------------

constexpr size_t kDefaultSharedBytes = 48 * 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;
constexpr size_t kBefore = 256;  // canaries around shared memory
constexpr size_t kAfter = 1024;
constexpr uint32_t kCanary = 0x7ff5a5a5u;  // NaN, read as float or as double

enum class State { kReady, kAtBarrier, kAtWarpOperation, kReturned };

struct Request {
  Op op;
  unsigned int mask;
  uint64_t bits;
  int operand, width, size, line;

  bool meets(const Request& other) const {
    return op == other.op && mask == other.mask && width == other.width && size == other.size;
  }
};

struct Fibre {
  Context context{};
  const void* stack = nullptr;  // for the address sanitizer, with what it keeps
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  bool started = false;
  State state = State::kReturned;
  uint3 index{};
  Request request{};
  uint64_t result = 0;
};

struct Warp {
  unsigned int waiting = 0;   // lanes in a warp operation
  unsigned int returned = 0;  // or never there
};

std::mutex launches;
std::map<const void*, int> allowed;  // bytes of shared memory, by kernel
size_t most_shared = kMaxSharedBytes;
bool seed_is_set = false;
uint64_t chosen_seed = 0;
thread_local const char* next_name = nullptr;
thread_local cudaError_t last_error = cudaSuccess;

const char* kernel_name;
const std::function<void()>* kernel_body;
uint64_t seed;
uint64_t random_state;
std::vector<Fibre> fibres;
std::vector<Warp> warps;
Fibre launcher;  // the stack of the launch call
Fibre* current = &launcher;
Fibre* previous = nullptr;
int threads, alive, at_barrier, predicates;
Request first_at_barrier;
std::string error;
char* shared;
size_t shared_bytes_now;

// A queue of threads that can run, as a ring: at most one entry per thread.
uint16_t ready[1024];
unsigned int ready_head, ready_count;
uint16_t released[1024];

uint64_t random_number() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// Threads that may run now: in order at the end of the queue, or, with a seed, in any order at
// either end, so that a warp may run ahead of the others or behind them.
void release(unsigned int count) {
  bool first = false;
  if (seed != 0) {
    for (unsigned int i = count; i > 1; --i) {
      std::swap(released[i - 1], released[random_number() % i]);
    }
    first = random_number() % 2 != 0;
  }
  for (unsigned int i = 0; i < count; ++i) {
    fibres[released[i]].state = State::kReady;
    if (first) {
      ready_head = (ready_head + 1023) % 1024;
      ready[ready_head] = released[i];
    } else {
      ready[(ready_head + ready_count) % 1024] = released[i];
    }
    ++ready_count;
  }
}

void arrived_on_stack() {
#if HAKD_SHIM_ASAN
  __sanitizer_finish_switch_fiber(current->fake_stack, &previous->stack, &previous->stack_bytes);
#endif
}

void switch_to(Fibre* next) {
  previous = current;
  current = next;
  threadIdx = next->index;
#if HAKD_SHIM_ASAN
  __sanitizer_start_switch_fiber(&previous->fake_stack, next->stack, next->stack_bytes);
#endif
  switch_context(previous->context, next->context);
  arrived_on_stack();
}

// Runs others until it is this thread's turn again. Without any that can run, the launch call ends
// the block, or says why it cannot end.
void wait() {
  Fibre* next = &launcher;
  if (ready_count != 0) {
    next = &fibres[ready[ready_head]];
    ready_head = (ready_head + 1) % 1024;
    --ready_count;
  }
  if (next != current) switch_to(next);
}

// --- words ---------------------------------------------------------------------------------------

const char* name_of(Op op) {
  static const char* const names[] = {
      "__syncthreads", "__syncthreads_or", "__syncthreads_and", "__syncthreads_count",
      "__syncwarp", "__any_sync", "__all_sync", "__ballot_sync",
      "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  return names[static_cast<int>(op)];
}

std::string hex(unsigned int x) {
  char text[16];
  std::snprintf(text, sizeof(text), "0x%08x", x);
  return text;
}

std::string where() {
  return std::string("CUDA shim: ") + (kernel_name != nullptr ? kernel_name : "a kernel") +
         ", block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
         std::to_string(blockIdx.z) + ") of " + std::to_string(threads) + " threads, seed " +
         std::to_string(seed) + ": ";
}

std::string describe(const Request& request) {
  std::string text = std::string(name_of(request.op)) + " (line " + std::to_string(request.line);
  if (request.op > Op::kBarrierCount) text += ", mask " + hex(request.mask);
  if (request.op >= Op::kShuffle) {
    text += ", width " + std::to_string(request.width) + ", " + std::to_string(request.size) +
            " bytes";
  }
  return text + ")";
}

std::string describe(const Fibre& fibre) {
  if (fibre.state == State::kReturned) return "returned";
  return "in " + describe(fibre.request);
}

// "threads 0-30 in __syncwarp (...), 31 returned"
std::string describe_block() {
  std::string text = "threads ";
  int groups = 0;
  for (int begin = 0, end; begin < threads; begin = end) {
    const std::string what = describe(fibres[static_cast<size_t>(begin)]);
    end = begin + 1;
    while (end < threads && describe(fibres[static_cast<size_t>(end)]) == what) ++end;
    if (++groups > 12) return text + ", ...";
    text += (begin == 0 ? "" : ", ") + std::to_string(begin);
    if (end - begin > 1) text += "-" + std::to_string(end - 1);
    text += " " + what;
  }
  return text;
}

// Ends the launch from within a thread, which never runs on: its stack is not unwound.
[[noreturn]] void give_up(const std::string& what) {
  error = where() + "thread " + std::to_string(current - fibres.data()) + ": " + what;
  switch_to(&launcher);
  std::abort();
}

// --- threads -------------------------------------------------------------------------------------

void end_barrier() {
  const Op op = first_at_barrier.op;
  const uint64_t result = op == Op::kBarrierAnd ? predicates == at_barrier
                                                : static_cast<uint64_t>(predicates);
  unsigned int count = 0;
  for (int i = 0; i < threads; ++i) {
    Fibre& fibre = fibres[static_cast<size_t>(i)];
    if (fibre.state != State::kAtBarrier) continue;
    fibre.result = result;
    released[count++] = static_cast<uint16_t>(i);
  }
  at_barrier = 0;
  predicates = 0;
  release(count);
}

void thread_returned() {
  const auto id = static_cast<size_t>(current - fibres.data());
  Warp& warp = warps[id / 32];
  for (size_t i = id / 32 * 32; i < id / 32 * 32 + 32; ++i) {
    if ((warp.waiting >> (i % 32) & 1) != 0 && (fibres[i].request.mask >> (id % 32) & 1) != 0) {
      give_up("returned, but thread " + std::to_string(i) + " waits for it in " +
              describe(fibres[i].request));
    }
  }
  current->state = State::kReturned;
  warp.returned |= 1u << (id % 32);
  --alive;
  if (at_barrier != 0 && at_barrier == alive) end_barrier();
  wait();
}

void run_threads() {
#if HAKD_SHIM_ASAN
  arrived_on_stack();
#endif
  for (;;) {  // once per block
    std::string thrown;
    try {
      (*kernel_body)();
    } catch (const std::exception& exception) {
      thrown = exception.what();
    } catch (...) {
      thrown = "an exception";
    }
    if (!thrown.empty()) give_up(thrown);
    thread_returned();
  }
}

#if HAKD_SHIM_ASAN
// What the sanitizer's report cannot know.
void say_where() {
  if (current == &launcher) return;
  const std::string text = where() + "thread " + std::to_string(current - fibres.data()) + "\n";
  std::fputs(text.c_str(), stderr);
}
#endif

// Stacks live as long as the process. Below each lies a page that must not be touched: a thread
// that needs more dies there (HAKD_SHIM_STACK_KIB gives it more).
void start_fibre(Fibre& fibre) {
  static const size_t bytes = [] {
    const char* text = std::getenv("HAKD_SHIM_STACK_KIB");
    const long kib = text != nullptr ? std::atol(text) : 0;
    return static_cast<size_t>(kib > 0 ? (kib + 3) / 4 * 4 : (HAKD_SHIM_ASAN ? 256 : 64)) * 1024;
  }();
  auto* stack = static_cast<char*>(const_cast<void*>(fibre.stack));
  if (stack == nullptr) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("CUDA shim: no memory for a stack");
    mprotect(memory, page, PROT_NONE);
    stack = static_cast<char*>(memory) + page;
  }
#if HAKD_SHIM_ASAN
  ASAN_UNPOISON_MEMORY_REGION(stack, bytes);  // frames that were left without returning
#endif
  fibre.stack = stack;
  fibre.stack_bytes = bytes;
  fibre.fake_stack = nullptr;
  fibre.started = true;
  make_context(fibre.context, stack, bytes, run_threads);
}

// --- shared memory -------------------------------------------------------------------------------

void fill_shared_memory() {
  std::memset(shared, 0xff, shared_bytes_now);
  for (size_t i = 0; i < kBefore; i += 4) std::memcpy(shared - kBefore + i, &kCanary, 4);
  for (size_t i = 0; i < kAfter; i += 4) std::memcpy(shared + shared_bytes_now + i, &kCanary, 4);
#if HAKD_SHIM_ASAN
  ASAN_POISON_MEMORY_REGION(shared - kBefore, kBefore);
  ASAN_POISON_MEMORY_REGION(shared + shared_bytes_now, kAfter);
#endif
}

void check_canaries() {
#if HAKD_SHIM_ASAN
  ASAN_UNPOISON_MEMORY_REGION(shared - kBefore, kBefore);
  ASAN_UNPOISON_MEMORY_REGION(shared + shared_bytes_now, kAfter);
#endif
  const auto check = [](const char* from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 4) {
      if (std::memcmp(from + i, &kCanary, 4) == 0) continue;
      throw std::runtime_error(where() + "wrote at byte " + std::to_string(from + i - shared) +
                               " of " + std::to_string(shared_bytes_now) +
                               " bytes of shared memory");
    }
  };
  check(shared - kBefore, kBefore);
  check(shared + shared_bytes_now, kAfter);
}

// --- a launch ------------------------------------------------------------------------------------

void run_block() {
  fill_shared_memory();
  const auto count = static_cast<size_t>(threads);
  warps.assign((count + 31) / 32, Warp{});
  if (count % 32 != 0) warps.back().returned = ~0u << (count % 32);
  alive = threads;
  at_barrier = predicates = 0;
  ready_head = ready_count = 0;
  error.clear();
  for (size_t i = 0; i < count; ++i) {
    Fibre& fibre = fibres[i];
    const auto id = static_cast<unsigned int>(i);
    if (!fibre.started) start_fibre(fibre);
    fibre.index = {id % blockDim.x, id / blockDim.x % blockDim.y, id / blockDim.x / blockDim.y};
    released[i] = static_cast<uint16_t>(i);
  }
  release(static_cast<unsigned int>(count));
  wait();
  if (error.empty() && alive != 0) {
    error = where() + "deadlock (divergent barrier?): " + describe_block();
  }
  if (!error.empty()) {  // what has not returned is abandoned: its fibre starts anew
    for (Fibre& fibre : fibres) fibre.started = fibre.started && fibre.state == State::kReturned;
  }
  if (error.empty()) {
    check_canaries();
  } else {
#if HAKD_SHIM_ASAN
    ASAN_UNPOISON_MEMORY_REGION(shared - kBefore, kBefore + shared_bytes_now + kAfter);
#endif
    throw std::runtime_error(error);
  }
}

std::string launched;  // names, a line each

uint64_t seed_of_this_launch() {
  if (seed_is_set) return chosen_seed;
  const char* text = std::getenv("HAKD_SHIM_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 0;
}

}  // namespace

void* shared_memory() { return shared; }

void name_next_launch(const char* name) {
  next_name = name;
  launched += std::string(name) + '\n';
}

void fail(const char* what) {
  if (current == &launcher) throw std::runtime_error(std::string("CUDA shim: ") + what);
  give_up(what);
}

uint64_t barrier(Op op, bool predicate, int line) {
  Request& request = current->request;
  request = Request{op, 0, predicate, 0, 32, 0, line};
  if (at_barrier == 0) first_at_barrier = request;
  if (op != first_at_barrier.op || line != first_at_barrier.line) {
    give_up("divergent barrier: in " + describe(request) + " while others are in " +
            describe(first_at_barrier));
  }
  current->state = State::kAtBarrier;
  predicates += predicate;
  if (++at_barrier == alive) end_barrier();
  Fibre* self = current;
  wait();
  return self->result;
}

uint64_t warp_operation(Op op, unsigned int mask, uint64_t bits, int operand, int width, int size,
                        int line) {
  Fibre* const self = current;
  const auto id = static_cast<unsigned int>(self - fibres.data());
  const unsigned int lane = id % 32;
  Fibre* const lanes = self - lane;
  Warp& warp = warps[id / 32];
  self->request = Request{op, mask, bits, operand, width, size, line};
  // Two lanes that wait for each other in different operations are a mistake. A lane that waits for
  // one which does not wait for it may have to be patient: part of a warp may do more on its own.
  const auto meets = [&](int other) {
    const Request& request = lanes[other].request;
    if (request.meets(self->request)) return true;
    if ((request.mask >> lane & 1) == 0) return false;
    give_up("in " + describe(self->request) + " while lane " + std::to_string(other) +
            " of the warp is in " + describe(request));
  };
  if ((mask >> lane & 1) == 0) {
    give_up(describe(self->request) + ": the mask does not name lane " + std::to_string(lane) +
            ", which calls it");
  }
  if ((mask & warp.returned) != 0) {
    give_up(describe(self->request) + ": the mask names lanes that returned or do not exist: " +
            hex(mask & warp.returned));
  }
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    give_up(describe(self->request) + ": the width is not a power of two up to 32");
  }
  if ((mask & warp.waiting) != 0) meets(__builtin_ctz(mask & warp.waiting));
  warp.waiting |= 1u << lane;
  self->state = State::kAtWarpOperation;
  bool all_met = (warp.waiting & mask) == mask;
  unsigned int votes = 0;
  for (int i = 0; all_met && i < 32; ++i) {
    if ((mask >> i & 1) == 0) continue;
    all_met = meets(i);
    votes |= static_cast<unsigned int>(lanes[i].request.bits != 0) << i;
  }
  if (all_met) {  // the last one computes for all
    unsigned int count = 0;
    for (int i = 0; i < 32; ++i) {
      if ((mask >> i & 1) == 0) continue;
      const int by = lanes[i].request.operand;
      const int segment = i & ~(width - 1);
      const int last = segment + width - 1;
      int source = i;
      switch (op) {  // as PTX defines shfl.sync: beyond the segment, a lane reads itself
        case Op::kShuffle: source = segment + (by & (width - 1)); break;
        case Op::kShuffleUp: source = i - (by & 31) >= segment ? i - (by & 31) : i; break;
        case Op::kShuffleDown: source = i + (by & 31) <= last ? i + (by & 31) : i; break;
        case Op::kShuffleXor: source = (i ^ (by & 31)) <= last ? i ^ (by & 31) : i; break;
        default: break;
      }
      uint64_t result = (mask >> source & 1) != 0 ? lanes[source].request.bits : ~uint64_t{0};
      if (op == Op::kAny) result = votes != 0;
      if (op == Op::kAll) result = votes == mask;
      if (op == Op::kBallot) result = votes;
      lanes[i].result = result;
      released[count++] = static_cast<uint16_t>(id - lane + static_cast<unsigned int>(i));
    }
    warp.waiting &= ~mask;
    release(count);
  }
  wait();
  return self->result;
}

cudaError_t remember(cudaError_t code) {
  if (code != cudaSuccess) last_error = code;
  return code;
}

cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  const std::lock_guard<std::mutex> lock(launches);
  if (bytes < 0 || static_cast<size_t>(bytes) > most_shared) return remember(cudaErrorInvalidValue);
  allowed[kernel] = bytes;
  return cudaSuccess;
}

int device_attribute(int attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return static_cast<int>(kDefaultSharedBytes);
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return 4;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return static_cast<int>(most_shared) + 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return static_cast<int>(most_shared);
    default: return -1;
  }
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t bytes,
                   const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(launches);
  kernel_name = std::exchange(next_name, nullptr);
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || count < 1 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      count > 1024) {
    return remember(cudaErrorInvalidConfiguration);
  }
  const auto asked = allowed.find(kernel);
  const size_t most = asked != allowed.end() ? static_cast<size_t>(asked->second) : 0;
  if (bytes > most_shared || bytes > std::max(most, kDefaultSharedBytes)) {
    return remember(cudaErrorInvalidValue);
  }
  if (shared == nullptr) {
    auto* memory = static_cast<char*>(std::aligned_alloc(256, kBefore + kMaxSharedBytes + kAfter));
    if (memory == nullptr) throw std::bad_alloc();
    shared = memory + kBefore;
  }
  if (fibres.empty()) {
    fibres.resize(1024);  // never moved: threads point into it
#if HAKD_SHIM_ASAN
    __sanitizer_set_death_callback(say_where);
#endif
  }
  kernel_body = &body;
  shared_bytes_now = bytes;
  threads = static_cast<int>(count);
  blockDim = block;
  gridDim = grid;
  seed = random_state = seed_of_this_launch();
  // i -> (a i + b) mod n is an order of any number of blocks, without a list of them
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  uint64_t factor = 1, offset = 0;
  if (seed != 0) {
    do factor = random_number() % std::min(blocks, uint64_t{1} << 31) + 1;
    while (std::gcd(factor, blocks) != 1);
    offset = random_number() % blocks;
  }
  for (uint64_t i = 0; i < blocks; ++i) {
    const auto id = static_cast<uint64_t>(
        (static_cast<unsigned __int128>(factor) * i + offset) % blocks);
    blockIdx = {static_cast<unsigned int>(id % grid.x),
                static_cast<unsigned int>(id / grid.x % grid.y),
                static_cast<unsigned int>(id / grid.x / grid.y)};
    run_block();
  }
  return cudaSuccess;
}

}  // namespace hakd_shim

cudaError_t cudaGetLastError() { return std::exchange(hakd_shim::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return hakd_shim::last_error; }
const char* cudaGetErrorString(cudaError_t code) {
  switch (code) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorNotSupported: return "operation not supported";
  }
  return "unrecognized error code";
}

// A kernel's assert() ends its launch, not the process: the sources' calls bind to this one.
extern "C" void __assert_fail(const char* assertion, const char* file, unsigned int line,
                              const char*) noexcept {
  const std::string text = std::string(file) + ":" + std::to_string(line) + ": assertion failed: " +
                           assertion;
  if (hakd_shim::current != &hakd_shim::launcher) hakd_shim::give_up(text);
  std::fprintf(stderr, "%s\n", text.c_str());
  std::abort();
}

// For tests. A set seed takes the place of HAKD_SHIM_SEED.
extern "C" __attribute__((visibility("default"))) void hakd_shim_set_seed(uint64_t seed) {
  hakd_shim::seed_is_set = true;
  hakd_shim::chosen_seed = seed;
}
// Names of the launches since the last call, a line each.
extern "C" __attribute__((visibility("default"))) const char* hakd_shim_launched() {
  static std::string names;
  names = std::exchange(hakd_shim::launched, std::string());
  return names.c_str();
}
// Devices have less than 227 KiB, too: bytes of shared memory that a block may ask for.
extern "C" __attribute__((visibility("default"))) int hakd_shim_set_shared_limit(size_t bytes) {
  if (bytes < hakd_shim::kDefaultSharedBytes || bytes > hakd_shim::kMaxSharedBytes) return 0;
  hakd_shim::most_shared = bytes;
  return 1;
}
