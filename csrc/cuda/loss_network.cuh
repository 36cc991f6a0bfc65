// The loss network on a flat list of elements, shared by the exact kernels and the table's: a block takes tiles of
// elements through the layers as small matrix products in shared memory, a thread four units of four elements at once.
#pragma once

#include "cuda/launch.h"
#include "math/loss_network.h"

namespace lossmeta::cuda {

int64_t table_workspace(const LossNetwork& a);  // of the table's kernels, in elements of A

namespace {

constexpr int max_network_threads = 256;
// Blocks of the backward pass that the registers of a processor hold.
template <class A>
constexpr int network_blocks = sizeof(A) == 4 ? 2 : 1;

// ---- What decides on the device which kernels run.

template <class A>
struct Gate {
  const A* flag;  // last element of the table, or null
  A opens;        // value of the flag at which the kernel runs
  __device__ bool closed() const { return flag && *flag != opens; }
};

template <class A>
Gate<A> exact_gate(const LossNetwork& a) {
  const A* table = static_cast<const A*>(a.table);
  return {table ? table + loss_network_table_size(a.intervals) - 1 : nullptr, A(0)};
}

template <class A>
Gate<A> table_gate(const LossNetwork& a) {
  return {exact_gate<A>(a).flag, A(1)};
}

// ---- Sums in a fixed order over a part of a warp, a warp, or a block of `lanes` threads; each of them gets the result.

template <int lanes, class A, class Combine>
__device__ A reduce(A value, Combine combine) {
  for (int offset = (lanes < 32 ? lanes : 32) / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if constexpr (lanes > 32) {
    __shared__ A parts[lanes / 32];
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = parts[0];
    for (int k = 1; k < lanes / 32; ++k) value = combine(value, parts[k]);
    __syncthreads();
  }
  return value;
}

template <int lanes, class A>
__device__ A reduce_sum(A value) {
  return reduce<lanes>(value, [](A x, A y) { return x + y; });
}

// The larger one, or NaN if there is one.
template <class A>
__device__ A larger(A x, A y) {
  return x > y || x != x ? x : y;
}

// Dynamic shared memory that a block may have on the current device: 226 KiB on sm_90 and sm_100, 162 on sm_80, 98 on
// sm_86 and sm_89. 1 KiB is left for what kernels declare. No call here waits for the device.
inline int shared_limit() {
  thread_local int known = -1, bytes = 0;
  int device = 0;
  check_cuda(cudaGetDevice(&device));
  if (device != known) {
    check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    known = device;
  }
  return bytes - 1024;
}

template <class Kernel>
void allow_shared(Kernel* kernel, int64_t bytes) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)));
}

// ---- The network.

template <class A>
struct alignas(16) Quad {
  A v[4];
};

template <class A>
__device__ Quad<A> load_quad(const A* p) {
  return *reinterpret_cast<const Quad<A>*>(p);
}
template <class A>
__device__ void store_quad(A* p, const A (&x)[4]) {
  *reinterpret_cast<Quad<A>*>(p) = {x[0], x[1], x[2], x[3]};
}

template <class A>
struct Network {
  const A* input_weight;   // [H, 2]
  const A* hidden_weight;  // [H, H]
  const A* output_weight;  // [H]
  int width, padded;       // H, and H rounded up to whole quads
  int tile;                // elements handled together, a power of two >= 4
  bool softplus;
  math::HiddenActivation<A> activation;

  explicit Network(const LossNetwork& a)
      : input_weight(static_cast<const A*>(a.input_weight)),
        hidden_weight(static_cast<const A*>(a.hidden_weight)),
        output_weight(static_cast<const A*>(a.output_weight)),
        width(int(a.width)),
        padded((width + 3) / 4 * 4),
        tile(64),
        softplus(a.softplus),
        activation(a) {
    // With 4 elements, loss_network_cuda_width units fit 98 KiB.
    while (tile > 4 &&
           (5 * padded * stride() * int(sizeof(A)) > 128 << 10 || shared_bytes(true, false) > shared_limit()))
      tile /= 2;
  }

  // Rows of a tile's activations are shifted by four banks: a column of quads is read without conflicts.
  __host__ __device__ int stride() const { return tile + 4; }
  __host__ __device__ int gradient_size() const { return width * (width + 3); }

  int shared_bytes(bool backward, bool resident) const {
    const int activations = (backward ? 5 : 2) * padded * stride() + padded / 2 * tile, elements = 7 * tile;
    return int(sizeof(A)) * (3 * padded + (resident ? padded * padded : 0) + activations + elements);
  }
  // Whether W2 fits beside the activations; if not it is read through the caches.
  bool resident(bool backward) const { return shared_bytes(backward, true) <= shared_limit(); }
  int threads() const {
    const int tasks = padded / 4 * (tile / 4),
              rounds = (tasks + max_network_threads - 1) / max_network_threads;
    return ((tasks + rounds - 1) / rounds + 31) / 32 * 32;
  }
};

template <class A>
struct Sums {
  A first, second;
};
template <class A>
struct Input {
  A f, y;
};
template <class A>
struct Cotangents {
  A u, v;
};

// Shared memory of a block, and the layers. `resident`: W2 lies in shared memory.
template <class A, bool resident>
struct Layers {
  const Network<A>& net;
  const int width, padded, quads, tile, stride;
  A *y_in, *f_in, *out, *hidden;  // [padded], and [padded, padded]
  A *h1, *t1;                     // [padded, stride]
  A *z_parts, *s_parts;           // [quads, tile]
  A *f, *y, *dz, *ds, *slope;     // [tile]
  Sums<A>* sums;                  // [tile]
  A *x, *g, *b;  // [padded, stride]: h2, its gate and b2; then x and g the cotangents A2 and B2

  __device__ Layers(const Network<A>& network, A* shared)
      : net(network),
        width(network.width),
        padded(network.padded),
        quads(padded / 4),
        tile(network.tile),
        stride(network.stride()) {
    const auto take = [&](int count) {
      A* p = shared;
      shared += count;
      return p;
    };
    y_in = take(padded), f_in = take(padded), out = take(padded);
    hidden = resident ? take(padded * padded) : nullptr;
    h1 = take(padded * stride), t1 = take(padded * stride);
    z_parts = take(quads * tile), s_parts = take(quads * tile);
    f = take(tile), y = take(tile), dz = take(tile), ds = take(tile), slope = take(tile);
    sums = reinterpret_cast<Sums<A>*>(take(2 * tile));
    x = take(padded * stride), g = take(padded * stride), b = shared;
    for (int k = threadIdx.x; k < padded; k += blockDim.x) {
      y_in[k] = k < width ? net.input_weight[2 * k] : A(0);
      f_in[k] = k < width ? net.input_weight[2 * k + 1] : A(0);
      out[k] = k < width ? net.output_weight[k] : A(0);
    }
    if (resident)
      for (int i = threadIdx.x; i < padded * padded; i += blockDim.x)
        hidden[i] = weight(i / padded, i % padded);
  }

  __device__ A weight(int o, int k) const {
    return o < width && k < width ? net.hidden_weight[int64_t(o) * width + k] : A(0);
  }
  // W2[o][k .. k + 3]
  __device__ Quad<A> weights(int o, int k) const {
    if constexpr (resident) return load_quad(hidden + o * padded + k);
    return {weight(o, k), weight(o, k + 1), weight(o, k + 2), weight(o, k + 3)};
  }

  // Columns of the activations that belong to a thread: f(quad of units, first of four elements).
  template <class F>
  __device__ void each_block(F&& f_) const {
    const int columns = tile / 4;
    for (int t = threadIdx.x; t < quads * columns; t += blockDim.x) f_(t / columns, t % columns * 4);
  }

  // Padding stays zero: an infinite activation must not meet its zeros.
  __device__ void first_layer() const {
    for (int i = threadIdx.x; i < padded * tile; i += blockDim.x) {
      const int k = i / tile, e = i % tile;
      const auto unit = net.activation(y_in[k] * y[e] + f_in[k] * f[e]);
      h1[k * stride + e] = k < width ? unit.value : A(0);
      t1[k * stride + e] = k < width ? f_in[k] * net.activation.slope(unit.gate) : A(0);
    }
  }

  // z and s of the tile in parts, one per quad of units. With `keep` also h2, its gate and b2.
  template <bool keep>
  __device__ void second_layer() const {
    each_block([&](int quad, int e) {
      A a2[4][4] = {}, b2[4][4] = {};
#pragma unroll 1
      for (int k = 0; k < padded; k += 4) {
        Quad<A> w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = weights(4 * quad + i, k);
#pragma unroll
        for (int kk = 0; kk < 4; ++kk) {
          const Quad<A> h = load_quad(h1 + (k + kk) * stride + e), t = load_quad(t1 + (k + kk) * stride + e);
#pragma unroll
          for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) a2[i][j] += w[i].v[kk] * h.v[j], b2[i][j] += w[i].v[kk] * t.v[j];
        }
      }
      A z[4] = {}, s[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int o = 4 * quad + i;
        if (o >= width) continue;
        A value[4], gate[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const auto unit = net.activation(a2[i][j]);
          value[j] = unit.value, gate[j] = unit.gate;
          z[j] += out[o] * unit.value;
          s[j] += out[o] * net.activation.slope(unit.gate) * b2[i][j];
        }
        if constexpr (keep) {
          store_quad(x + o * stride + e, value);
          store_quad(g + o * stride + e, gate);
          store_quad(b + o * stride + e, b2[i]);
        }
      }
      store_quad(z_parts + quad * tile + e, z);
      store_quad(s_parts + quad * tile + e, s);
    });
  }

  // Output of element e; s is the tangent of z.
  __device__ math::Output<A> output(int e, A& s) const {
    A z = s = 0;
    for (int quad = 0; quad < quads; ++quad) z += z_parts[quad * tile + e], s += s_parts[quad * tile + e];
    return math::output_activation<A>(z, net.softplus);
  }

  // Rows of a tile, a warp each: f(unit, lane).
  template <class F>
  __device__ void each_unit(int count, F&& f_) const {
    for (int k = threadIdx.x / 32; k < count; k += blockDim.x / 32) f_(k, int(threadIdx.x % 32));
  }

  // A2 and B2, and sum_e dJ/dw3.
  __device__ void second_cotangents(A* grad_out,  // [width] or null
                                    bool first) const {
    each_unit(padded, [&](int o, int lane) {
      A sum = 0;
      for (int e = lane; e < tile; e += 32) {
        const int at = o * stride + e;
        if (o >= width) {
          x[at] = g[at] = 0;
          continue;
        }
        const A slope2 = net.activation.slope(g[at]), bend = net.activation.curvature(g[at]);
        sum += dz[e] * x[at] + ds[e] * slope2 * b[at];
        x[at] = out[o] * (dz[e] * slope2 + ds[e] * b[at] * bend);
        g[at] = out[o] * ds[e] * slope2;
      }
      if (o < width && grad_out) add(grad_out + o, reduce_sum<32>(sum), first, lane == 0);
    });
  }

  // sum_e dJ/dW2. The entries of a thread are always the same, rows and columns `quads` apart.
  __device__ void hidden_gradient(A* grad,  // [width, width]
                                  bool first) const {
    for (int task = threadIdx.x; task < quads * quads; task += blockDim.x) {
      const int o = task / quads, k = task % quads;
      A sum[4][4] = {};
      // A2 h1, then B2 t1: in one loop they would take too many registers.
#pragma unroll 1
      for (int part = 0; part < 2; ++part) {
        const A *const left = (part ? g : x) + o * stride, *const right = (part ? t1 : h1) + k * stride;
#pragma unroll 1
        for (int e = 0; e < tile; e += 4) {
          Quad<A> cotangent[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) cotangent[i] = load_quad(left + i * quads * stride + e);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Quad<A> unit = load_quad(right + j * quads * stride + e);
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
              for (int l = 0; l < 4; ++l) sum[i][j] += cotangent[i].v[l] * unit.v[l];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          add(grad + int64_t(o + i * quads) * width + k + j * quads, sum[i][j], first,
              o + i * quads < width && k + j * quads < width);
    }
  }

  // Leaves A1 in h1 and A1 f + act'(a1) W2^T B2 in t1.
  __device__ void first_cotangents() const {
    each_block([&](int quad, int e) {
      A p[4][4] = {}, q[4][4] = {};
      for (int o = 0; o < padded; ++o) {
        const Quad<A> w = weights(o, 4 * quad), a2 = load_quad(x + o * stride + e),
                      b2 = load_quad(g + o * stride + e);
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) p[i][j] += w.v[i] * a2.v[j], q[i][j] += w.v[i] * b2.v[j];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = 4 * quad + i;
        A a1[4], by_f[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const A gate = net.activation(y_in[k] * y[e + j] + f_in[k] * f[e + j]).gate;
          const A slope1 = net.activation.slope(gate);
          a1[j] = slope1 * p[i][j] + net.activation.curvature(gate) * f_in[k] * q[i][j];
          by_f[j] = a1[j] * f[e + j] + slope1 * q[i][j];
        }
        store_quad(h1 + k * stride + e, a1);
        store_quad(t1 + k * stride + e, by_f);
      }
    });
  }

  // sum_e dJ/dW1
  __device__ void input_gradient(A* grad,  // [width, 2]
                                 bool first) const {
    each_unit(width, [&](int k, int lane) {
      A by_y = 0, by_f = 0;
      for (int e = lane; e < tile; e += 32) by_y += h1[k * stride + e] * y[e], by_f += t1[k * stride + e];
      add(grad + 2 * k, reduce_sum<32>(by_y), first, lane == 0);
      add(grad + 2 * k + 1, reduce_sum<32>(by_f), first, lane == 0);
    });
  }

  // dJ/df of element e
  __device__ A input_cotangent(int e) const {
    A sum = 0;
    for (int k = 0; k < width; ++k) sum += f_in[k] * h1[k * stride + e];
    return sum;
  }

  __device__ static void add(A* sum, A value, bool first, bool mine) {
    if (mine) *sum = first ? value : *sum + value;
  }
};

// What the two passes ask of Elements (its kinds: the elements of pred, the nodes of the table):
//   count, Input input(e);  forward: Sums finish(e, f, l, l');  backward: Cotangents cotangents(e, f),
//   Sums finish(e, f, dJ/df, l');  segments(layers, tile) adds up the Sums of each row.
template <class A, bool resident, class Elements>
__global__ void network_forward_kernel(Gate<A> gate, Network<A> net, Elements elements) {
  LOSSMETA_DYNAMIC_SHARED(A, shared);
  if (gate.closed()) return;
  const Layers<A, resident> layers(net, shared);
  for (int64_t tile = blockIdx.x; tile * net.tile < elements.count; tile += gridDim.x) {
    const int64_t start = tile * net.tile;
    for (int e = threadIdx.x; e < net.tile; e += blockDim.x) {
      const Input<A> in = start + e < elements.count ? elements.input(start + e) : Input<A>{};
      layers.f[e] = in.f, layers.y[e] = in.y;
    }
    __syncthreads();
    layers.first_layer();
    __syncthreads();
    layers.template second_layer<false>();
    __syncthreads();
    for (int e = threadIdx.x; e < net.tile && start + e < elements.count; e += blockDim.x) {
      A s;
      const math::Output<A> out = layers.output(e, s);
      layers.sums[e] = elements.finish(start + e, layers.f[e], out.value, out.slope * s);
    }
    __syncthreads();
    elements.segments(layers.sums, tile, net.tile);
    __syncthreads();
  }
}

// Gradients of the weights go to the block's row of `partials`.
template <class A, bool resident, class Elements>
__device__ void network_backward(const Network<A>& net, const Elements& elements, A* shared,
                                 A* partials) {  // [blocks, gradient_size] or null
  const Layers<A, resident> layers(net, shared);
  A* const grad_hidden = partials ? partials + int64_t(blockIdx.x) * net.gradient_size() : nullptr;
  A* const grad_in = partials ? grad_hidden + net.width * net.width : nullptr;
  A* const grad_out = partials ? grad_in + 2 * net.width : nullptr;
  for (int64_t tile = blockIdx.x; tile * net.tile < elements.count; tile += gridDim.x) {
    const int64_t start = tile * net.tile;
    const bool first = tile == blockIdx.x;
    for (int e = threadIdx.x; e < net.tile; e += blockDim.x) {
      const Input<A> in = start + e < elements.count ? elements.input(start + e) : Input<A>{};
      layers.f[e] = in.f, layers.y[e] = in.y;
    }
    __syncthreads();
    layers.first_layer();
    __syncthreads();
    layers.template second_layer<true>();
    __syncthreads();
    for (int e = threadIdx.x; e < net.tile; e += blockDim.x) {
      A s;
      const math::Output<A> out = layers.output(e, s);
      const bool exists = start + e < elements.count;
      const Cotangents<A> c = exists ? elements.cotangents(start + e, layers.f[e]) : Cotangents<A>{};
      layers.dz[e] = c.u * out.slope + c.v * out.curvature * s;
      layers.ds[e] = c.v * out.slope;
      layers.slope[e] = out.slope * s;
    }
    __syncthreads();
    layers.second_cotangents(grad_out, first);
    __syncthreads();
    if (partials) {
      layers.hidden_gradient(grad_hidden, first);
      __syncthreads();
    }
    layers.first_cotangents();
    __syncthreads();
    if (partials) layers.input_gradient(grad_in, first);
    if constexpr (Elements::has_input_gradient) {
      for (int e = threadIdx.x; e < net.tile && start + e < elements.count; e += blockDim.x)
        layers.sums[e] = elements.finish(start + e, layers.f[e], layers.input_cotangent(e), layers.slope[e]);
      __syncthreads();
      elements.segments(layers.sums, tile, net.tile);
    }
    __syncthreads();
  }
}

// Entry i of the three gradients, laid out one after the other: W2, W1, w3.
template <class A>
struct WeightGradients {
  A *input, *hidden, *output;
  int width;

  explicit WeightGradients(const LossNetwork& a)
      : input(static_cast<A*>(a.grad_input_weight)),
        hidden(static_cast<A*>(a.grad_hidden_weight)),
        output(static_cast<A*>(a.grad_output_weight)),
        width(int(a.width)) {}

  __device__ A& operator[](int i) const {
    const int squares = width * width;
    return i < squares               ? hidden[i]
           : i < squares + 2 * width ? input[i - squares]
                                     : output[i - squares - 2 * width];
  }
};

}  // namespace
}  // namespace lossmeta::cuda
