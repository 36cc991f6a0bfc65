// The machine under simt.h: stacks to switch between; the threads, warps and barriers of a block; launches.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <sys/mman.h>

#if defined(__x86_64__) && defined(__ELF__) && !defined(SIMT_UCONTEXT)
#define SIMT_ASSEMBLY_SWITCH
#else
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN
#endif
#ifdef SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

using cudaStream_t = struct CUstream_st*;

struct uint3 {
  unsigned x, y, z;
};

// The dynamic shared memory of the running block; LOSSMETA_DYNAMIC_SHARED (csrc/cuda/launch.h) names it.
inline unsigned char* lossmeta_dynamic_shared = nullptr;

namespace simt {

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fputs("simt: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::abort();
}

}  // namespace simt

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace simt {

inline cudaError_t last_error = cudaSuccess;
inline std::string last_failure;
inline cudaError_t broken =
    cudaSuccess;  // what launches and other calls answer without doing anything, for tests

__attribute__((format(printf, 2, 3))) inline cudaError_t refuse(cudaError_t error, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  last_failure = text;
  return last_error = error;
}

inline unsigned checked_extent(long long n) {
  if (n < 0 || n > 0xffffffffll) fail("launch failure: extent %lld does not fit an unsigned int", n);
  return unsigned(n);
}

}  // namespace simt

struct dim3 {
  unsigned x, y, z;
  dim3(long long nx = 1, long long ny = 1, long long nz = 1)
      : x(simt::checked_extent(nx)), y(simt::checked_extent(ny)), z(simt::checked_extent(nz)) {}
};

inline uint3 threadIdx{}, blockIdx{};
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- Contexts: a stack each, and a switch between them. ----

#ifdef SIMT_ASSEMBLY_SWITCH
// Saves the callee-saved registers on the running stack, stores its pointer in *from, and continues at `to`.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
  .text
  .weak simt_switch
  .type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size simt_switch, .-simt_switch
)");
#endif

namespace simt {

struct Context {
#ifdef SIMT_ASSEMBLY_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

inline Context* switched_from = nullptr;

// AddressSanitizer is told of the stack at both ends of a switch; the host's is learnt when it is first left.
inline void arrive(Context& self) {
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(self.fake_stack, &switched_from->stack, &switched_from->stack_bytes);
#endif
  (void)self;
}

inline void switch_context(Context& from, Context& to) {
  switched_from = &from;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef SIMT_ASSEMBLY_SWITCH
  simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
  arrive(from);
}

// `stagger` keeps the tops of many stacks from falling into the same cache sets.
inline void make_context(Context& context, void (*entry)(), unsigned stagger) {
  constexpr std::size_t guard = 4096, bytes = 256 << 10;
  constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, guard + bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE)) fail("no memory for the stack of a thread");
  char* bottom = static_cast<char*>(memory) + guard;
  context.stack = bottom;
  context.stack_bytes = bytes - stagger % 64 * 64;
#ifdef SIMT_ASSEMBLY_SWITCH
  void** top = reinterpret_cast<void**>(bottom + context.stack_bytes);
  *--top = nullptr;  // a return address that ends back-traces, and aligns the stack as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = context.stack_bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

// ---- Threads, warps and the running block. ----

enum Operation {  // shuffles, votes, then barriers of the block
  syncwarp,
  shfl,
  shfl_up,
  shfl_down,
  shfl_xor,
  ballot,
  any,
  all,
  syncthreads,
  syncthreads_or,
  syncthreads_and,
  syncthreads_count,
  none
};
constexpr const char* operation_names[none] = {
    "__syncwarp",      "__shfl_sync",      "__shfl_up_sync",    "__shfl_down_sync",
    "__shfl_xor_sync", "__ballot_sync",    "__any_sync",        "__all_sync",
    "__syncthreads",   "__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};

struct Thread {
  Context context;
  uint3 index;
  unsigned linear;
  bool returned;
  Operation waits_at;  // `none` while it may run
  unsigned mask;       // of the warp operation it waits at
  unsigned source;     // lane a shuffle reads from
  std::uint64_t in, out;
};

struct Meeting {  // lanes of a warp that wait at the same operation with the same mask
  Operation operation;
  unsigned mask, arrived;
};

struct Warp {
  unsigned live;  // lanes that have not returned
  int meetings;
  Meeting meeting[32];
};

constexpr unsigned max_threads = 1024;
// The devices differ in the shared memory that a block may have: that of sm_90 and sm_100, of sm_80, of sm_86 and sm_89.
constexpr std::size_t default_shared_bytes = 48 << 10;
constexpr std::size_t max_shared_bytes[] = {227 << 10, 163 << 10, 99 << 10};
constexpr int devices = 3;
inline int device = 0;

inline std::vector<Thread> threads(max_threads);
inline Warp warps[max_threads / 32];
inline unsigned live = 0;            // threads of the block that have not returned
inline unsigned arrived[none] = {};  // at each kind of block barrier
inline unsigned ready[max_threads], ready_count = 0;
inline Thread* current = nullptr;  // null outside kernels
inline Context host;
inline const char* kernel_name = "";
inline const std::function<void()>* kernel_body = nullptr;
inline std::uint64_t random_state = 0;

inline void set_seed(std::uint64_t seed) { random_state = seed; }

inline std::uint64_t random_bits() {  // splitmix64
  std::uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline unsigned block_threads() { return blockDim.x * blockDim.y * blockDim.z; }

inline void release(Thread& thread) {
  thread.waits_at = none;
  ready[ready_count++] = thread.linear;
}

inline std::string describe(const Thread& thread) {
  if (thread.returned) return "returned";
  std::string text = std::string("wait at ") + operation_names[thread.waits_at];
  if (thread.waits_at >= syncthreads) return text;
  const Warp& warp = warps[thread.linear / 32];
  unsigned absent = thread.mask & warp.live;
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Thread& other = threads[thread.linear / 32 * 32 + lane];
    if (other.waits_at == thread.waits_at && other.mask == thread.mask) absent &= ~(1u << lane);
  }
  char lanes[80];
  std::snprintf(lanes, sizeof lanes, " with mask 0x%08x for lanes 0x%08x of warp %u", thread.mask, absent,
                thread.linear / 32);
  return text + lanes;
}

[[noreturn]] inline void report_divergence() {
  std::fprintf(stderr, "simt: divergent barrier: %s, block (%u, %u, %u) of grid (%u, %u, %u), %u threads\n",
               kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, gridDim.x, gridDim.y, gridDim.z,
               block_threads());
  std::map<std::string, std::vector<unsigned>> groups;
  for (unsigned t = 0; t < block_threads(); ++t) groups[describe(threads[t])].push_back(t);
  for (const auto& [state, members] : groups) {
    std::fputs("  threads", stderr);
    for (std::size_t i = 0, j; i < members.size(); i = j + 1) {
      for (j = i; j + 1 < members.size() && members[j + 1] == members[j] + 1;) ++j;
      std::fprintf(stderr, i == j ? " %u" : " %u-%u", members[i], members[j]);
    }
    std::fprintf(stderr, ": %s\n", state.c_str());
  }
  std::abort();
}

// Leaves the running fiber (or the host) for a ready one; returns when the caller is chosen again.
inline void run_another() {
  Thread* self = current;
  if (ready_count) {
    unsigned pick = unsigned((random_bits() >> 32) * ready_count >> 32);
    current = &threads[std::exchange(ready[pick], ready[ready_count - 1])];
    --ready_count;
    threadIdx = current->index;
  } else {
    if (live) report_divergence();
    current = nullptr;
  }
  if (current != self) switch_context(self ? self->context : host, current ? current->context : host);
}

inline void complete_warp(Warp& warp, int m) {
  Meeting meeting = warp.meeting[m];
  warp.meeting[m] = warp.meeting[--warp.meetings];
  Thread* lanes = &threads[(&warp - warps) * 32];
  std::uint64_t votes = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (meeting.arrived >> i & 1) votes |= std::uint64_t(lanes[i].in != 0) << i;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(meeting.arrived >> i & 1)) continue;
    if (meeting.operation >= ballot)
      lanes[i].out = votes;
    else if (meeting.arrived >> lanes[i].source & 1)
      lanes[i].out = lanes[lanes[i].source].in;
    else
      lanes[i].out = ~std::uint64_t(0);
    release(lanes[i]);
  }
}

inline void complete_block(Operation operation) {
  unsigned votes = 0, present = std::exchange(arrived[operation], 0);
  for (unsigned t = 0; t < block_threads(); ++t) votes += threads[t].waits_at == operation && threads[t].in;
  if (operation == syncthreads_or) votes = votes != 0;
  if (operation == syncthreads_and) votes = votes == present;
  for (unsigned t = 0; t < block_threads(); ++t) {
    if (threads[t].waits_at != operation) continue;
    threads[t].out = votes;
    release(threads[t]);
  }
}

// A thread that returns may be the one that others waited for.
inline void leave_block(Thread& self) {
  self.returned = true;
  Warp& warp = warps[self.linear / 32];
  warp.live &= ~(1u << self.linear % 32);
  for (int m = warp.meetings; m-- > 0;)
    if (warp.meeting[m].arrived == (warp.meeting[m].mask & warp.live)) complete_warp(warp, m);
  --live;
  for (int o = syncthreads; o <= syncthreads_count; ++o)
    if (arrived[o] && arrived[o] == live) complete_block(Operation(o));
}

// A fiber is made once and serves the thread of its number in every block.
inline void fiber_entry() {
  arrive(current->context);
  for (;;) {
    (*kernel_body)();
    leave_block(*current);
    run_another();
  }
}

inline Thread& running_thread(Operation operation) {
  if (!current) fail("%s is called outside a kernel", operation_names[operation]);
  return *current;
}

inline std::uint64_t meet_in_warp(Operation operation, unsigned mask, std::uint64_t in, unsigned source = 0) {
  Thread& self = running_thread(operation);
  Warp& warp = warps[self.linear / 32];
  unsigned lane = 1u << self.linear % 32;
  if (!(mask & lane))
    fail("%s, block (%u, %u, %u), thread %u: the mask 0x%08x of %s does not name the calling lane %u",
         kernel_name, blockIdx.x, blockIdx.y, blockIdx.z, self.linear, mask, operation_names[operation],
         self.linear % 32);
  self.waits_at = operation, self.mask = mask, self.in = in, self.source = source;
  int m = 0;
  while (m < warp.meetings && !(warp.meeting[m].operation == operation && warp.meeting[m].mask == mask)) ++m;
  if (m == warp.meetings) warp.meeting[warp.meetings++] = {operation, mask, 0};
  warp.meeting[m].arrived |= lane;
  if (warp.meeting[m].arrived == (mask & warp.live)) complete_warp(warp, m);
  run_another();
  return self.out;
}

inline int meet_in_block(Operation operation, int predicate) {
  Thread& self = running_thread(operation);
  self.waits_at = operation, self.in = predicate != 0;
  if (++arrived[operation] == live) complete_block(operation);
  run_another();
  return int(self.out);
}

// Lets others run in between, so that what an atomic sees is not the program's order.
inline void interleave() {
  if (!current) return;
  release(*current);
  run_another();
}

// ---- Launches. ----

inline std::map<const void*, std::size_t>& shared_limits() {  // of the device, raised by cudaFuncSetAttribute
  static std::map<const void*, std::size_t> limits[devices];
  return limits[device];
}

inline void run_block() {
  live = block_threads();
  for (unsigned t = 0; t < live; ++t) {
    Thread& thread = threads[t];
    if (!thread.context.stack) make_context(thread.context, fiber_entry, t);
    thread.index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
    thread.linear = t;
    thread.returned = false;
    release(thread);
  }
  for (unsigned first = 0; first < live; first += 32)
    warps[first / 32].live = live - first < 32 ? (1u << (live - first)) - 1 : ~0u;
  run_another();
}

inline void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shared_bytes)) fail("no memory for %zu shared bytes", shared_bytes);
  lossmeta_dynamic_shared = static_cast<unsigned char*>(shared);
  gridDim = grid, blockDim = block, kernel_body = &body;
  // The n-th block to run is (start + n·step) mod blocks, with a step prime to the number of blocks.
  std::uint64_t blocks = std::uint64_t(grid.x) * grid.y * grid.z;
  std::uint64_t block_index = random_bits() % blocks, step = random_bits() % blocks;
  while (std::gcd(blocks, step) != 1) ++step;
  for (std::uint64_t n = 0; n < blocks; ++n, block_index = (block_index + step) % blocks) {
    std::uint64_t row = block_index / grid.x;
    blockIdx = {unsigned(block_index % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)};
    if (shared_bytes) std::memset(shared, 0xff, shared_bytes);
    run_block();
  }
  lossmeta_dynamic_shared = nullptr;
  std::free(shared);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t shared_bytes, cudaStream_t, Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Parameters> && ...), "kernel parameters are copied as bytes");
  if (current) fail("launch failure: %s is launched inside a kernel", name);
  if (broken) return refuse(broken, "the launch of %s fails", name);
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse(cudaErrorInvalidConfiguration,
                  "%s: grid must lie in [1, 2147483647] x [1, 65535] x [1, 65535], got (%u, %u, %u)", name,
                  grid.x, grid.y, grid.z);
  if (!block.x || !block.y || !block.z || block.x > max_threads || block.y > max_threads || block.z > 64 ||
      block.x * block.y * block.z > max_threads)
    return refuse(cudaErrorInvalidConfiguration,
                  "%s: a block must have 1 to 1024 threads (z at most 64), got (%u, %u, %u)", name, block.x,
                  block.y, block.z);
  auto limit = shared_limits().find(reinterpret_cast<const void*>(kernel));
  std::size_t allowed = limit == shared_limits().end() ? default_shared_bytes : limit->second;
  if (shared_bytes > allowed)
    return refuse(cudaErrorInvalidValue, "%s: dynamic shared memory must be at most %zu bytes, got %zu%s",
                  name, allowed, shared_bytes,
                  shared_bytes <= max_shared_bytes[device] ? "; cudaFuncSetAttribute raises the limit" : "");
  kernel_name = name;
  std::tuple<Parameters...> parameters(std::forward<Arguments>(arguments)...);
  run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, parameters); });
  return cudaSuccess;
}

}  // namespace simt
