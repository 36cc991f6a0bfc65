// Tests of the CPU emulator of CUDA kernels.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <limits>
#include <set>

#include "check.h"
#include "cuda/launch.h"

// What `run` wrote to stderr before it aborted; empty if it did not abort.
template <class Run>
static std::string message_of_abort(Run run) {
  int ends[2];
  if (pipe(ends)) return "";
  std::cout.flush();
  pid_t child = fork();
  if (child == 0) {
    rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(ends[1], 2);
    run();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) text.append(buffer, std::size_t(n));
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? text : "";
}

static void check_contains(const std::string& text, const std::string& part) {
  CHECK(text.find(part) != std::string::npos, "no `", part, "` in: ", text);
}

template <class Run>
static std::string message_of_exception(Run run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

#define CHECK_THROWS(part, ...) check_contains(message_of_exception([&] { __VA_ARGS__; }), part)
#define CHECK_ABORT(part, ...) check_contains(message_of_abort([&] { __VA_ARGS__; }), part)

// ---- Indices ----

__global__ void write_indices(int* out) {
  int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * (blockDim.x * blockDim.y * blockDim.z) + thread] += 1 + block * 1000 + thread;
}

TEST(every_thread_of_a_3d_grid_runs_once) {
  dim3 grid(3, 4, 5), block(5, 3, 7);
  for (int seed = 0; seed < 5; ++seed) {
    simt::set_seed(seed);
    std::vector<int> out(60 * 105);
    LOSSMETA_LAUNCH(write_indices, grid, block, 0, nullptr, out.data());
    for (int i = 0; i < 60 * 105; ++i)
      CHECK(out[i] == 1 + i / 105 * 1000 + i % 105, "thread ", i, ": ", out[i]);
  }
}

__global__ void write_lane(int* out) {
  int t = threadIdx.x + blockDim.x * threadIdx.y;
  out[t] = __shfl_sync(0xffffffff, t, 0);
}

TEST(warps_are_32_consecutive_linear_threads) {
  std::vector<int> out(70);
  LOSSMETA_LAUNCH(write_lane, 1, dim3(7, 10), 0, nullptr, out.data());
  for (int t = 0; t < 70; ++t) CHECK(out[t] == t / 32 * 32, "thread ", t, ": ", out[t]);
}

__global__ void record_order(int* order, int* count) {
  order[(*count)++] = blockIdx.x * blockDim.x + threadIdx.x;
}

TEST(seed_decides_the_order_of_blocks_and_threads) {
  std::set<std::vector<int>> block_orders, thread_orders;
  for (int seed = 0; seed < 20; ++seed) {
    for (int repeat = 0; repeat < 2; ++repeat) {
      int count = 0;
      simt::set_seed(seed);
      std::vector<int> order(16);
      LOSSMETA_LAUNCH(record_order, 16, 1, 0, nullptr, order.data(), &count);
      block_orders.insert(order);
      count = 0;
      LOSSMETA_LAUNCH(record_order, 1, 16, 0, nullptr, order.data(), &count);
      thread_orders.insert(order);
    }
  }
  CHECK(block_orders.size() > 10 && block_orders.size() <= 20, block_orders.size());
  CHECK(thread_orders.size() > 10 && thread_orders.size() <= 20, thread_orders.size());
}

// ---- Barriers and shared memory ----

template <class T, int kThreads, bool kBarrier>
__global__ void block_sum(const T* x, T* sums) {
  __shared__ T partial[kThreads];
  int t = threadIdx.x;
  partial[t] = x[blockIdx.x * kThreads + t];
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) partial[t] += partial[t + half];
    if (kBarrier) __syncthreads();
  }
  if (t == 0) sums[blockIdx.x] = partial[0];
}

template <bool kBarrier>
static std::set<std::vector<double>> sums_over_seeds() {
  std::vector<double> x(3 * 128);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = double(i * i);
  std::set<std::vector<double>> results;
  for (int seed = 0; seed < 20; ++seed) {
    simt::set_seed(seed);
    std::vector<double> sums(3);
    LOSSMETA_LAUNCH((block_sum<double, 128, kBarrier>), 3, 128, 0, nullptr, x.data(), sums.data());
    results.insert(sums);
  }
  return results;
}

TEST(shared_memory_reduction) {
  auto results = sums_over_seeds<true>();
  CHECK(results.size() == 1, results.size());
  for (int b = 0; b < 3; ++b) {
    double expected = 0;
    for (int i = b * 128; i < (b + 1) * 128; ++i) expected += double(i) * i;
    CHECK_NEAR((*results.begin())[b], expected, 0, 0, "block ", b);
  }
}

TEST(a_missing_barrier_shows_over_seeds) { CHECK(sums_over_seeds<false>().size() > 1); }

__global__ void block_votes(int* out) {
  int t = threadIdx.x;
  int votes[] = {__syncthreads_or(t > 5), __syncthreads_or(0), __syncthreads_and(t < 100),
                 __syncthreads_and(t != 70), __syncthreads_count(t % 3)};
  for (int i = 0; i < 5; ++i) out[t * 5 + i] = votes[i];
}

TEST(block_votes) {
  std::vector<int> out(100 * 5);
  LOSSMETA_LAUNCH(block_votes, 1, 100, 0, nullptr, out.data());
  for (int t = 0; t < 100; ++t) {
    const int* v = &out[t * 5];
    CHECK(v[0] == 1 && !v[1] && v[2] == 1 && !v[3] && v[4] == 66, v[0], v[1], v[2], v[3], " ", v[4]);
  }
}

__global__ void reverse_dynamic(const short* x, short* y, int n) {
  LOSSMETA_DYNAMIC_SHARED(short, row);
  if (int(threadIdx.x) >= n) return;
  row[threadIdx.x] = x[blockIdx.x * n + threadIdx.x];
  __syncthreads();
  y[blockIdx.x * n + threadIdx.x] = row[n - 1 - threadIdx.x];
}

TEST(dynamic_shared_memory_and_early_return) {
  constexpr int n = 37, blocks = 6;
  std::vector<short> x(n * blocks), y(n * blocks);
  for (int i = 0; i < n * blocks; ++i) x[i] = short(i);
  LOSSMETA_LAUNCH(reverse_dynamic, blocks, 128, n * sizeof(short), nullptr, x.data(), y.data(), n);
  for (int i = 0; i < n * blocks; ++i) CHECK(y[i] == i / n * n + n - 1 - i % n, i, ": ", y[i]);
}

__global__ void read_uninitialised(float* out) {
  LOSSMETA_DYNAMIC_SHARED(float, memory);
  out[blockIdx.x] = memory[7];
  memory[7] = 1;
}

TEST(dynamic_shared_memory_starts_as_nan_in_every_block) {
  std::vector<float> out(4);
  LOSSMETA_LAUNCH(read_uninitialised, 4, 1, 32, nullptr, out.data());
  for (float value : out) CHECK(std::isnan(value), value);
}

__global__ void return_while_others_wait(int* out) {
  if (threadIdx.x % 2) {
    __syncwarp(0xaaaaaaaa);
    if (threadIdx.x > 40) __syncwarp(0xaaaaaaaa);
    return;
  }
  __syncthreads();
  out[threadIdx.x] = __popc(__ballot_sync(0xffffffff, 1));
}

TEST(returned_threads_are_not_waited_for) {
  for (int seed = 0; seed < 20; ++seed) {
    simt::set_seed(seed);
    std::vector<int> out(64);
    LOSSMETA_LAUNCH(return_while_others_wait, 1, 64, 0, nullptr, out.data());
    for (int t = 0; t < 64; ++t) CHECK(out[t] == (t % 2 ? 0 : 16), "thread ", t, ": ", out[t]);
  }
}

// ---- Shuffles and votes ----

enum { down, up, exclusive_or, indexed };

template <class T>
__global__ void shuffle_all(T* out, int operand, int width) {
  T value = T(threadIdx.x % 2 ? threadIdx.x : -T(threadIdx.x));
  T* row = out + 4 * threadIdx.x;
  row[down] = __shfl_down_sync(0xffffffff, value, operand, width);
  row[up] = __shfl_up_sync(0xffffffff, value, operand, width);
  row[exclusive_or] = __shfl_xor_sync(0xffffffff, value, operand, width);
  row[indexed] = __shfl_sync(0xffffffff, value, operand, width);
}

// The lane that a lane reads, by the CUDA C++ Programming Guide.
static int source_lane(int kind, int lane, int operand, int width) {
  int first = lane / width * width;
  if (kind == down) return lane + operand < first + width ? lane + operand : lane;
  if (kind == up) return lane - operand >= first ? lane - operand : lane;
  if (kind == exclusive_or) return (lane ^ operand) < first + width ? lane ^ operand : lane;
  return first + operand % width;
}

template <class T>
static void check_shuffles() {
  for (int width = 1; width <= 32; width *= 2) {
    for (int operand = 0; operand < 32; ++operand) {
      std::vector<T> out(64 * 4);
      LOSSMETA_LAUNCH(shuffle_all<T>, 1, 64, 0, nullptr, out.data(), operand, width);
      for (int t = 0; t < 64; ++t) {
        for (int kind = 0; kind < 4; ++kind) {
          unsigned source = t / 32 * 32 + source_lane(kind, t % 32, operand, width);
          T expected = T(source % 2 ? source : -T(source)), got = out[t * 4 + kind];
          CHECK(got == expected, "kind ", kind, ", width ", width, ", operand ", operand, ", thread ", t);
        }
      }
    }
  }
}

TEST(shuffles_of_all_widths_and_types) {
  check_shuffles<int>();
  check_shuffles<unsigned>();
  check_shuffles<long long>();
  check_shuffles<unsigned long long>();
  check_shuffles<float>();
  check_shuffles<double>();
}

__global__ void shuffle_bool(int* out) {
  bool odd = threadIdx.x % 2;
  static_assert(std::is_same_v<decltype(__shfl_xor_sync(0xffffffff, odd, 1)), int>, "as by CUDA's overloads");
  out[threadIdx.x] = __shfl_xor_sync(0xffffffff, odd, 1);
}

TEST(shuffle_of_bool) {
  std::vector<int> out(32);
  LOSSMETA_LAUNCH(shuffle_bool, 1, 32, 0, nullptr, out.data());
  for (int t = 0; t < 32; ++t) CHECK(out[t] == (t + 1) % 2, t, ": ", out[t]);
}

__global__ void shuffle_from_absent(float* out) { out[threadIdx.x] = __shfl_down_sync(0xffffffff, 1.0f, 16); }

TEST(an_absent_lane_reads_as_nan) {
  std::vector<float> out(40);
  LOSSMETA_LAUNCH(shuffle_from_absent, 1, 40, 0, nullptr, out.data());
  for (int t = 0; t < 40; ++t) CHECK(t < 32 ? out[t] == 1 : std::isnan(out[t]), t, ": ", out[t]);
}

__global__ void warp_votes(unsigned* out) {
  int t = threadIdx.x;
  out[t * 5] = __ballot_sync(0xffffffff, t % 3 == 0);
  out[t * 5 + 1] = __any_sync(0xffffffff, t == 33);
  out[t * 5 + 2] = __all_sync(0xffffffff, t != 33);
  out[t * 5 + 3] = __any_sync(0xffffffff, 0);
  out[t * 5 + 4] = __all_sync(0xffffffff, 256);
}

TEST(warp_votes_with_a_partial_last_warp) {
  std::vector<unsigned> out(40 * 5);
  LOSSMETA_LAUNCH(warp_votes, 1, 40, 0, nullptr, out.data());
  for (int t = 0; t < 40; ++t) {
    unsigned ballot = 0;
    for (int i = t / 32 * 32; i < (t < 32 ? 32 : 40); ++i) ballot |= unsigned(i % 3 == 0) << i % 32;
    const unsigned* v = &out[t * 5];
    CHECK(v[0] == ballot, t, ": ", v[0], " not ", ballot);
    CHECK(v[1] == (t >= 32) && v[2] == (t < 32) && v[3] == 0 && v[4] == 1, t, ": ", v[1], v[2], v[3], v[4]);
  }
}

// Quarters of a warp do different operations at once, in loops of different length.
__global__ void sub_warps(int* out) {
  int lane = threadIdx.x % 32, quarter = lane / 8, value = lane;
  unsigned mask = 0xffu << 8 * quarter;
  for (int round = 0; round <= quarter; ++round) {
    if (quarter == 1) {
      value += __popc(__ballot_sync(mask, lane % 2));
    } else {
      for (int offset = 4; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
    }
    __syncwarp(mask);
  }
  out[threadIdx.x] = value;
}

TEST(sub_warp_masks_meet_only_among_their_lanes) {
  for (int seed = 0; seed < 10; ++seed) {
    simt::set_seed(seed);
    std::vector<int> out(64);
    LOSSMETA_LAUNCH(sub_warps, 1, 64, 0, nullptr, out.data());
    for (int t = 0; t < 64; ++t) {
      int quarter = t % 32 / 8, expected = 28 + quarter * 64;
      for (int round = 0; round < quarter; ++round) expected *= 8;
      if (quarter == 1) expected = t % 32 + 8;
      CHECK(out[t] == expected, "seed ", seed, " thread ", t, ": ", out[t], " not ", expected);
    }
  }
}

// A lane meets three others in turn: what it left for one must not be overwritten by the next.
__global__ void pairs_in_turn(int* out) {
  int lane = threadIdx.x, sum = 0;
  for (int partner = 1; partner < 4; ++partner)
    sum = sum * 10 + __shfl_xor_sync(1u << lane | 1u << (lane ^ partner), lane * partner, partner);
  out[lane] = sum;
}

TEST(meetings_with_changing_partners) {
  for (int seed = 0; seed < 50; ++seed) {
    simt::set_seed(seed);
    std::vector<int> out(4);
    LOSSMETA_LAUNCH(pairs_in_turn, 1, 4, 0, nullptr, out.data());
    for (int t = 0; t < 4; ++t) {
      int expected = ((t ^ 1) * 10 + (t ^ 2) * 2) * 10 + (t ^ 3) * 3;
      CHECK(out[t] == expected, "seed ", seed, " lane ", t, ": ", out[t], " not ", expected);
    }
  }
}

__global__ void unsynchronised_warp(int* out) {
  __shared__ int values[32];
  values[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = values[threadIdx.x ^ 1];
  __syncwarp();
  values[threadIdx.x] = -1;
}

TEST(a_missing_syncwarp_shows) {
  std::vector<int> out(32);
  LOSSMETA_LAUNCH(unsynchronised_warp, 2, 32, 0, nullptr, out.data());
  int stale = 0;
  for (int t = 0; t < 32; ++t) stale += out[t] != (t ^ 1);
  CHECK(stale > 0);
}

// ---- Atomics ----

template <class T>
__global__ void integer_atomics(T* cell) {
  T t = T(threadIdx.x);
  atomicAdd(cell, t);
  atomicMin(cell + 1, t);
  atomicMax(cell + 2, t);
  atomicAnd(cell + 3, ~(T(1) << t % 16));
  atomicOr(cell + 4, T(1) << t % 16);
  T assumed, seen = cell[5];
  do {
    assumed = seen;
    seen = atomicCAS(cell + 5, assumed, T(assumed + 2));
  } while (seen != assumed);
  if (atomicExch(cell + 6, T(1)) == 0) cell[7] = 1 + t;
}

template <class T>
static void check_integer_atomics() {
  T cell[8] = {1, T(1000), 0, T(0xfffff), 0, 0, 0, 0};
  LOSSMETA_LAUNCH(integer_atomics<T>, 1, 100, 0, nullptr, cell);
  T expected[7] = {4951, 0, 99, 0xf0000, 0xffff, 200, 1};
  for (int i = 0; i < 7; ++i) CHECK(cell[i] == expected[i], "cell ", i, ": ", cell[i]);
  CHECK(cell[7] > 0, "one thread was first");
}

template <class T>
__global__ void add_one(T* x) {
  atomicAdd(x, 1);
}

TEST(atomics) {
  check_integer_atomics<int>();
  check_integer_atomics<unsigned>();
  check_integer_atomics<unsigned long long>();
  float sum = 0.5f;
  double wide = 0.25;
  LOSSMETA_LAUNCH(add_one<float>, 5, 33, 0, nullptr, &sum);
  LOSSMETA_LAUNCH(add_one<double>, 5, 33, 0, nullptr, &wide);
  CHECK(sum == 165.5f && wide == 165.25, sum, " ", wide);
  int largest = std::numeric_limits<int>::max();
  CHECK(atomicAdd(&largest, 1) > 0 && largest == std::numeric_limits<int>::min(), "integer sums wrap");
}

__global__ void wait_for_flag(int* flag, int* out) {
  if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) {
    }
    *out = 7;
  } else if (threadIdx.x == 1) {
    atomicExch(flag, 1);
  }
}

TEST(a_thread_may_spin_on_an_atomic) {
  for (int seed = 0; seed < 5; ++seed) {
    simt::set_seed(seed);
    int flag = 0, out = 0;
    LOSSMETA_LAUNCH(wait_for_flag, 1, 64, 0, nullptr, &flag, &out);
    CHECK(out == 7);
  }
}

// ---- Scalars, vectors and runtime calls ----

TEST(device_functions) {
  CHECK(__popc(0xf0f0u) == 8 && __popcll(~0ull) == 64 && __ffs(0) == 0 && __ffs(8) == 4);
  CHECK(__clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0 && __clzll(1) == 63);
  CHECK(__float_as_int(1.0f) == 0x3f800000 && __int_as_float(0x40000000) == 2.0f);
  CHECK(__float_as_uint(-0.0f) == 0x80000000u && __uint_as_float(0x80000000u) == 0);
  CHECK(__longlong_as_double(__double_as_longlong(1.5)) == 1.5);
  CHECK_NEAR(rsqrtf(4.0f), 0.5, 0, 1e-7);
  CHECK_NEAR(rsqrt(16.0), 0.25, 0, 1e-15);
  float nan = __int_as_float(-1);
  CHECK(max(nan, 1.0f) == 1 && min(1.0f, nan) == 1 && fmaxf(nan, 2.0f) == 2, "a NaN loses");
  static_assert(std::is_same_v<decltype(min(1, 2u)), unsigned> &&
                std::is_same_v<decltype(min(short(1), 2)), int>);
  static_assert(std::is_same_v<decltype(max(1.f, 2.)), double> &&
                std::is_same_v<decltype(max(1.f, 2.f)), float>);
  CHECK(min(-1, 1u) == 1 && max(-1LL, 3LL) == 3 && min(2.5, 1.5f) == 1.5);
  CHECK(__activemask() != 0 && warpSize == 32);
}

TEST(vector_types) {
  alignas(16) float x[4] = {1, 2, 3, 4};
  float4 all = __ldg(reinterpret_cast<const float4*>(x));
  CHECK(all.x == 1 && all.w == 4);
  __stcs(reinterpret_cast<float4*>(x), make_float4(5, 6, 7, 8));
  CHECK(x[0] == 5 && x[3] == 8);
  uint4 bits = __ldcs(reinterpret_cast<const uint4*>(x));
  CHECK(bits.x == __float_as_uint(5));
  static_assert(sizeof(double2) == 16 && alignof(double2) == 16 && alignof(int2) == 8 && alignof(int4) == 16);
  CHECK(make_float2(1, 2).y == 2 && make_double2(1, 2).y == 2 && make_int2(1, 2).y == 2);
  CHECK(make_uint2(1, 2).y == 2 && make_uint4(1, 2, 3, 4).z == 3 && make_int4(1, 2, 3, 4).w == 4);
}

TEST(runtime_calls) {
  int x[4] = {1, 2, 3, 4}, y[4];
  cudaStream_t stream = nullptr;
  CHECK(cudaMemcpyAsync(y, x, sizeof x, cudaMemcpyDeviceToDevice, stream) == cudaSuccess && y[3] == 4);
  CHECK(cudaMemsetAsync(y, 0, sizeof y, stream) == cudaSuccess && y[3] == 0);
  CHECK(cudaGetLastError() == cudaSuccess && cudaGetErrorString(cudaSuccess) != std::string());
}

__global__ void take(const double* pointer, double factor, long long n, double* out) {
  *out = pointer ? n : n * factor;
}

TEST(arguments_are_converted_to_the_parameters) {
  double out = 0;
  auto kernel = take;
  LOSSMETA_LAUNCH(kernel, 1, 1, 0, nullptr, nullptr, 2.5f, 3, &out);
  CHECK(out == 7.5, out);
}

// ---- What fails or aborts ----

__global__ void nothing(int) {}

TEST(launch_failures) {
  CHECK_THROWS("grid must lie in", LOSSMETA_LAUNCH(nothing, 0, 32, 0, nullptr, 0));
  CHECK_THROWS("grid must lie in", LOSSMETA_LAUNCH(nothing, 0x80000000u, 32, 0, nullptr, 0));
  CHECK_THROWS("got (1, 65536, 1)", LOSSMETA_LAUNCH(nothing, dim3(1, 65536), 32, 0, nullptr, 0));
  CHECK_THROWS("got (1, 1, 65536)", LOSSMETA_LAUNCH(nothing, dim3(1, 1, 65536), 32, 0, nullptr, 0));
  CHECK_ABORT("does not fit an unsigned int", LOSSMETA_LAUNCH(nothing, 1ll << 32, 32, 0, nullptr, 0));
  CHECK_THROWS("nothing: a block must have 1 to 1024", LOSSMETA_LAUNCH(nothing, 1, 1025, 0, nullptr, 0));
  CHECK_THROWS("got (33, 32, 1)", LOSSMETA_LAUNCH(nothing, 1, dim3(33, 32), 0, nullptr, 0));
  CHECK_THROWS("got (1, 1, 65)", LOSSMETA_LAUNCH(nothing, 1, dim3(1, 1, 65), 0, nullptr, 0));
}

TEST(shared_memory_limits) {
  LOSSMETA_LAUNCH(nothing, 1, 1024, 48 << 10, nullptr, 0);
  CHECK_THROWS("cudaFuncSetAttribute raises", LOSSMETA_LAUNCH(nothing, 1, 1, (48 << 10) + 1, nullptr, 0));
  auto raise = [](int bytes) {
    return cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  CHECK(raise((227 << 10) + 1) == cudaErrorInvalidValue);
  CHECK(raise(227 << 10) == cudaSuccess);
  LOSSMETA_LAUNCH(nothing, 1, 1, 227 << 10, nullptr, 0);
  CHECK_THROWS("at most 232448 bytes, got 232449", LOSSMETA_LAUNCH(nothing, 1, 1, 232449, nullptr, 0));
  CHECK(cudaSetDevice(3) == cudaErrorInvalidValue);
  const int other[] = {163 << 10, 99 << 10};
  for (int device : {1, 2}) {
    CHECK(cudaSetDevice(device) == cudaSuccess);
    CHECK_THROWS("at most 49152 bytes",
                 LOSSMETA_LAUNCH(nothing, 1, 1, 49153, nullptr, 0));  // raised for device 0
    CHECK(raise(other[device - 1] + 1) == cudaErrorInvalidValue);
    CHECK(raise(other[device - 1]) == cudaSuccess);
    LOSSMETA_LAUNCH(nothing, 1, 1, other[device - 1], nullptr, 0);
  }
  cudaSetDevice(0);
}

TEST(a_failed_launch_is_an_exception_that_is_reported_once) {
  cudaGetLastError();
  CHECK_THROWS("a block must have", LOSSMETA_LAUNCH(nothing, 1, 1025, 0, nullptr, 0));
  CHECK(cudaGetLastError() == cudaSuccess);
  simt::refuse(cudaErrorInvalidValue, "left behind by others");
  LOSSMETA_LAUNCH(nothing, 1, 1, 0, nullptr, 0);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue, "not ours to take");
}

__global__ void divergent(int kind, int* out) {
  int t = threadIdx.x;
  unsigned full = 0xffffffff;
  if (kind == 0) t < 40 ? __syncthreads() : void(out[t] = __syncthreads_or(1));
  if (kind == 1) t == 3 ? __syncthreads() : void(out[t] = __shfl_xor_sync(full, t, 1));
  if (kind == 2) out[t] = t % 32 < 4 ? __shfl_sync(full, t, 0) : __shfl_down_sync(full, t, 1);
  if (kind == 3) out[t] = __shfl_sync(0x0000ffff, t, 0);
  if (kind == 4) out[t] = t % 2 ? __ballot_sync(full, 1) : __ballot_sync(0x55555555, 1);
  if (kind == 5) out[t] = __shfl_xor_sync(full, t, 1, 12);
  __syncthreads();
}

TEST(divergence_is_described_and_aborts) {
  std::vector<int> out(64);
  auto message = [&](int kind) {
    dim3 grid(1, 2);
    return message_of_abort([&] { LOSSMETA_LAUNCH(divergent, grid, 64, 0, nullptr, kind, out.data()); });
  };
  check_contains(message(0),
                 "of grid (1, 2, 1), 64 threads\n  threads 0-39: wait at __syncthreads\n"
                 "  threads 40-63: wait at __syncthreads_or\n");
  check_contains(message(1),
                 "threads 0-2 4-31: wait at __shfl_xor_sync with mask 0xffffffff "
                 "for lanes 0x00000008 of warp 0");
  check_contains(message(1), "threads 3 32-63: wait at __syncthreads\n");
  check_contains(message(2),
                 "threads 0-3: wait at __shfl_sync with mask 0xffffffff "
                 "for lanes 0xfffffff0 of warp 0");
  check_contains(message(3), "the mask 0x0000ffff of __shfl_sync does not name the calling lane");
  check_contains(message(4), "wait at __ballot_sync with mask 0xffffffff for lanes 0x55555555 of warp 1");
  check_contains(message(5), "width must be a power of two up to 32, got 12");
  CHECK_ABORT("__syncthreads is called outside a kernel", __syncthreads());
}

__global__ void one_barrier_fewer(int) {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x == 40) __syncwarp(1u << 8 | 1u << 9);
  if (threadIdx.x == 41) __syncthreads();
}

TEST(divergence_beside_returned_threads) {
  std::string text = message_of_abort([] { LOSSMETA_LAUNCH(one_barrier_fewer, 1, 64, 0, nullptr, 0); });
  check_contains(text, "one_barrier_fewer, block (0, 0, 0)");
  check_contains(text, "threads 32-39 42-63: returned\n");
  check_contains(text, "threads 40: wait at __syncwarp with mask 0x00000300 for lanes 0x00000200 of warp 1");
}

// ---- A whole kernel ----

namespace {

template <int kThreads>
__global__ void __launch_bounds__(kThreads) row_logsumexp(const float* __restrict__ x,  // [rows, columns]
                                                          float* __restrict__ out,      // [rows]
                                                          long long columns) {
  __shared__ float shared[kThreads / warpSize];
  const float* row = x + blockIdx.x * columns;
  auto reduce = [&](float value, auto combine) {
    for (int offset = 16; offset > 0; offset /= 2)
      value = combine(value, __shfl_xor_sync(0xffffffff, value, offset));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
    __syncthreads();
    value = shared[0];
    for (int w = 1; w < kThreads / warpSize; ++w) value = combine(value, shared[w]);
    __syncthreads();
    return value;
  };
  float largest = -INFINITY, sum = 0;
  for (long long c = threadIdx.x; c < columns; c += kThreads) largest = fmaxf(largest, __ldg(row + c));
  largest = reduce(largest, [](float a, float b) { return fmaxf(a, b); });
  for (long long c = threadIdx.x; c < columns; c += kThreads) sum += expf(row[c] - largest);
  sum = reduce(sum, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) out[blockIdx.x] = largest + logf(sum);
}

}  // namespace

TEST(row_logsumexp) {
  constexpr int rows = 100, columns = 1000;
  std::vector<float> x(rows * columns), out(rows);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = 9 * std::sin(0.37f * float(i));
  LOSSMETA_LAUNCH(row_logsumexp<256>, rows, 256, 0, nullptr, x.data(), out.data(), columns);
  for (int r = 0; r < rows; ++r) {
    double sum = 0;
    for (int c = 0; c < columns; ++c) sum += std::exp(double(x[r * columns + c]));
    CHECK_NEAR(out[r], std::log(sum), 1e-6, 1e-6, "row ", r);
  }
}
