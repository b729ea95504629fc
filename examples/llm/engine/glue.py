"""The few small kernels between FlashInfer's, in CUDA (compiled by NVRTC) and in numpy.

A token is drawn with a number of the request's own, so that what a request gets does not depend on
where in the batch it is.
"""

import re

import numpy as np

from . import products

PLUS, TIMES, SIGMOID, SILU = range(4)  # how `combined` does it
# The model's dtype is handled by its bits: no headers are needed.
SOURCE = r"""
typedef unsigned short T;
#define INFINITY __int_as_float(0x7f800000)
#ifdef FLOAT16
__device__ float load(T x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ T store(float x) { T y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#else
__device__ float load(T x) { return __uint_as_float((unsigned)x << 16); }
__device__ T store(float x) { T y; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x)); return y; }
#endif
struct alignas(8) Four { unsigned x, y; };  // numbers, two by two
struct Both { Four low, high; };
struct Floats { float of[8]; };
__device__ unsigned pair(float x, float y) { return store(x) | (unsigned)store(y) << 16; }
__device__ Floats numbers(Both x) {
  return {load(x.low.x), load(x.low.x >> 16), load(x.low.y), load(x.low.y >> 16),
          load(x.high.x), load(x.high.x >> 16), load(x.high.y), load(x.high.y >> 16)};
}
__device__ float sigmoid(float x) { return 1 / (1 + __expf(-x)); }

// A kernel is put in place while the one before still runs.  It waits for what that writes, perhaps
// after work that needs nothing of it.
__device__ void wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel after this may be put in place from here on.
__device__ void make_way() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Of a kernel that waits first of all; the thread's place along x.
__device__ int begin() {
  make_way();
  wait();
  return blockIdx.x * blockDim.x + threadIdx.x;
}

struct Top { float most; int place; };

// The greatest that the lanes of a warp have, the first of equal ones.
__device__ Top of_warp(Top mine) {
  for (int half = 16; half; half /= 2) {
    const float other = __shfl_xor_sync(~0u, mine.most, half);
    const int there = __shfl_xor_sync(~0u, mine.place, half);
    if (other > mine.most || (other == mine.most && there < mine.place)) mine = {other, there};
  }
  return mine;
}

__device__ float of_warp(float x) {
  for (int half = 16; half; half /= 2) x += __shfl_xor_sync(~0u, x, half);
  return x;
}

// The greatest of a row and its place (the first of equal ones), of those that come after the
// element `before` at `at` in that order; -infinity and `vocab` if there is none.  A block of 1024
// threads, all of which have the result.
__device__ Top greatest(const float* row, int vocab, float before, int at) {
  __shared__ Top tops[32];
  Top mine = {-INFINITY, vocab};
#pragma unroll 8
  for (int i = threadIdx.x; i < vocab; i += 1024)
    if (row[i] > mine.most && (row[i] < before || (row[i] == before && i > at)))
      mine = {row[i], i};
  mine = of_warp(mine);
  __syncthreads();
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = mine;
  __syncthreads();
  return of_warp(tops[threadIdx.x % 32]);
}

// How many of the pieces of a row's request have pages; these come first.  For whole warps.
__device__ int count_of(const int* starts, int pieces) {
  const int lane = threadIdx.x % 32, at = blockIdx.y * pieces + lane;
  return __popc(__ballot_sync(~0u, lane < pieces && starts[at + 1] > starts[at]));
}

extern "C" {
// out[i] = table[index[i] - start], in rows of `words` words of 4 bytes; zeros where the table
// of `count` rows has none.  With `latest`, an index below 0 stands for latest[-1 - index]: the
// last token drawn for a slot.
// The first kernel of a step: those after it may read the step's arrays before they wait, so it
// makes way when these are there.
__global__ void take(unsigned* out, const unsigned* table, const int* index, const int* latest,
                     long long step, int words, int start, int count) {
  wait();
  make_way();
  int at = index[blockIdx.y];
  if (latest && at < 0) at = latest[-1 - at];
  at -= start;
  const bool is_there = at >= 0 && at < count;
  const unsigned* row = table + (is_there ? at : 0) * step;
  for (int w = blockIdx.x * blockDim.x + threadIdx.x; w < words; w += gridDim.x * blockDim.x)
    out[blockIdx.y * (long long)words + w] = is_there ? row[w] : 0;
}

// A few words, of which the host's are page-locked: a copy engine takes longer to begin.
__global__ void moved(unsigned* out, const unsigned* words, int count) {
  const int i = begin();
  if (i < count) out[i] = words[i];
}

// The ranks' parts of rows side by side, from [ranks, rows, width]; the last may be too wide.
__global__ void joined(float* out, const float* parts, int width, int whole) {
  const int c = begin();
  if (c >= whole) return;
  const long long row = c / width * (long long)gridDim.y + blockIdx.y;
  out[blockIdx.y * (long long)whole + c] = parts[row * width + c % width];
}

// table[index[i]] = values[i]
__global__ void give(unsigned* table, const unsigned* values, const int* index, long long step,
                     int words) {
  const int first = begin();
  unsigned* row = table + index[blockIdx.y] * step;
  for (int w = first; w < words; w += gridDim.x * blockDim.x)
    row[w] = values[blockIdx.y * (long long)words + w];
}

// Each channel's causal convolution over four tokens, and SiLU.  A sequence's last three
// inputs stay in its slot.
__global__ void convolve(T* out, const T* x, const float* weight, T* state, const int* slots,
                         const long long* starts, long long x_step, long long slot_step,
                         int channels) {
  const int c = begin();
  if (c >= channels) return;
  T* kept = state + slots[blockIdx.y] * slot_step + 3 * c;
  const float* w = weight + 4 * c;
  float a = load(kept[0]), b = load(kept[1]), d = load(kept[2]);
  for (long long t = starts[blockIdx.y]; t < starts[blockIdx.y + 1]; t++) {
    float e = load(x[t * x_step + c]);
    float y = w[0] * a + w[1] * b + w[2] * d + w[3] * e;
    out[t * channels + c] = store(y * sigmoid(y));
    a = b; b = d; d = e;
  }
  kept[0] = store(a); kept[1] = store(b); kept[2] = store(d);
}

// What a token keeps of the state and how much it writes, from (b, a) of each head.
__global__ void decays(float* alpha, float* beta, const T* ba, const float* a_log,
                       const float* dt_bias, int count, int heads) {
  const int i = begin(), t = i / heads, h = i % heads;
  if (t >= count) return;
  float x = load(ba[t * 2 * heads + heads + h]) + dt_bias[h];
  float softplus = x > 20 ? x : log1pf(__expf(x));
  alpha[i] = __expf(-__expf(a_log[h]) * softplus);
  beta[i] = sigmoid(load(ba[t * 2 * heads + h]));
}

// x of each row and another number, as `how` says: their sum, their product, or x times the sigmoid
// or SiLU of that number.  With a step of 0 all rows have the same.
__global__ void combined(T* x, const T* others, long long step, int width, int how) {
  const T* row = others + blockIdx.y * step;
  for (int c = begin(); c < width; c += gridDim.x * blockDim.x) {
    T* to = x + blockIdx.y * (long long)width + c;
    const float a = load(*to), b = load(row[c]);
    const float factor = how == 1 ? b : sigmoid(b) * (how == 3 ? b : 1);
    *to = store(how ? a * factor : a + b);
  }
}

// Of a token's row (q, k and v) each head of q and k normalised (is_normed) and turned by its
// position.  k and v go to their page; q, where `pieces` is not 0, to each piece of its request
// that has pages.  What the product before does not write is read while that still runs.
// A head has a few lanes, a power of two.  Each takes four numbers and those that they turn with,
// or eight that do not turn; of one head after another, as a token's page and cosines are the same.
__global__ void place(T* q, T* k_cache, T* v_cache, const T* qkv, const T* q_norm,
                      const T* k_norm, const float* cos_sin, const int* positions,
                      const int* requests, const int* indptr, const int* indices,
                      const int* starts, long long step, long long page_step, int pieces,
                      int heads, int kv_heads, int dim, int rotary, int page_size, float eps,
                      int is_normed) {
  make_way();
  int lanes = 1;
  while (8 * lanes < dim) lanes *= 2;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, lane = thread % lanes;
  const int all = heads + 2 * kv_heads, every = gridDim.x * blockDim.x / lanes;
  const bool is_turned = lane < rotary / 8, is_some = 8 * lane < dim;
  const int low = is_turned ? 4 * lane : 8 * lane, high = low + (is_turned ? rotary / 2 : 4);
  const int position = positions[blockIdx.y];
  const int first = indptr[requests[blockIdx.y]], row = position % page_size;
  const long long page = indices[first + position / page_size];
  const int copies = pieces ? count_of(starts, pieces) : 1;
  float4 cosines = {1, 1, 1, 1}, sines = {};
  if (is_turned) {
    const float* turns = cos_sin + position * (long long)rotary;
    cosines = *(const float4*)(turns + low);
    sines = *(const float4*)(turns + high);
  }
  auto read = [&](const T* from, bool is_there) {
    Both both = {};
    if (is_there && is_some) both = {*(const Four*)(from + low), *(const Four*)(from + high)};
    return both;
  };
  const Both norm_of_q = read(q_norm, is_normed), norm_of_k = read(k_norm, is_normed);
  wait();
  const T* from = qkv + blockIdx.y * step;
  Both next = read(from + thread / lanes * (long long)dim, thread / lanes < all);
  // Each warp goes on together.
  for (int before = 0; thread / 32 * 32 / lanes + before < all; before += every) {
    const int head = thread / lanes + before;
    const Both raw = next;
    next = read(from + (head + every) * (long long)dim, head + every < all);
    const int kind = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
    Floats x = numbers(raw);
    if (is_normed) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < 8; i++) sum += x.of[i] * x.of[i];
      for (int half = lanes / 2; half; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
      const float factor = rsqrtf(sum / dim + eps);
      const Floats scales = numbers(kind == 0 ? norm_of_q : norm_of_k);
#pragma unroll
      for (int i = 0; i < 8; i++) x.of[i] *= factor * scales.of[i];
    }
    if (head >= all || !is_some) continue;
    const int mine = head - (kind == 0 ? 0 : kind == 1 ? heads : heads + kv_heads);
    T* cache = kind == 1 ? k_cache : v_cache;
    T* to = kind == 0 ? q + (blockIdx.y * (long long)max(pieces, 1) * heads + mine) * dim
                      : cache + page * page_step + (row * (long long)kv_heads + mine) * dim;
    const Both turned = kind == 2 ? raw : Both{
        {pair(x.of[0] * cosines.x - x.of[4] * sines.x, x.of[1] * cosines.y - x.of[5] * sines.y),
         pair(x.of[2] * cosines.z - x.of[6] * sines.z, x.of[3] * cosines.w - x.of[7] * sines.w)},
        {pair(x.of[4] * cosines.x + x.of[0] * sines.x, x.of[5] * cosines.y + x.of[1] * sines.y),
         pair(x.of[6] * cosines.z + x.of[2] * sines.z, x.of[7] * cosines.w + x.of[3] * sines.w)}};
    for (int i = 0; i < (kind == 0 ? copies : 1); i++, to += heads * (long long)dim) {
      *(Four*)(to + low) = turned.low;
      *(Four*)(to + high) = turned.high;
    }
  }
}

// A request's attention from that of its pieces, which weigh by the sums of their exponentials.
// 128 threads for a head, a part of them for every few pieces.  All that is read is asked for at
// once: of pieces without pages too, where anything may be.
__global__ void merged(T* out, const T* parts, const float* lse, const int* starts, int pieces,
                       int dim) {
  constexpr int MOST = 4;  // pieces of a thread at once
  __shared__ float sums[512];
  const int lane = threadIdx.x % 32, lanes = dim / 4, groups = 128 / lanes, heads = gridDim.x;
  const int group = threadIdx.x / lanes, c = threadIdx.x % lanes * 4;
  const long long first = blockIdx.y * (long long)pieces * heads + blockIdx.x;
  begin();
  float mine = lane < pieces ? lse[first + lane * heads] : 0;
  Four fours[MOST];
  auto read = [&](int from) {
#pragma unroll
    for (int i = 0; i < MOST; i++) {
      const int piece = from + group + i * groups;
      if (group < groups && piece < pieces)
        fours[i] = *(const Four*)(parts + (first + piece * heads) * dim + c);
    }
  };
  read(0);
  const int count = count_of(starts, pieces);
  if (lane >= count) mine = -INFINITY;
  float most = mine, to[4] = {};
  for (int half = 16; half; half /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, half));
  const float share = lane < count ? exp2f(mine - most) : 0;
  const float sum = of_warp(share);
  for (int from = 0; from < count; from += MOST * groups) {
    if (from) read(from);
#pragma unroll
    for (int i = 0; i < MOST; i++) {
      const int piece = from + group + i * groups;
      const float factor = __shfl_sync(~0u, share, piece % 32);
      if (group >= groups || piece >= count) continue;
      to[0] += factor * load(fours[i].x); to[1] += factor * load(fours[i].x >> 16);
      to[2] += factor * load(fours[i].y); to[3] += factor * load(fours[i].y >> 16);
    }
  }
  if (group < groups)
    for (int i = 0; i < 4; i++) sums[group * dim + c + i] = to[i];
  __syncthreads();
  out += (blockIdx.y * (long long)heads + blockIdx.x) * dim;
  for (int i = threadIdx.x; i < dim; i += 128) {
    float all = 0;
    for (int g = 0; g < groups; g++) all += sums[g * dim + i];
    out[i] = store(all / sum);
  }
}

// The experts with the greatest of a token's logits, the first of equal ones before, and what
// their softmax gives them: among all, or (is_normed) among themselves.  With `shared` comes one
// more, last, by the sigmoid of its own logit.  32 threads for a token.
__global__ void route(int* experts, float* shares, const float* logits, const float* bias,
                      int count, int chosen, int is_normed, int shared) {
  begin();
  __shared__ float left[1024];
  const float* row = logits + blockIdx.y * (long long)(count + shared);
  experts += blockIdx.y * (long long)(chosen + shared);
  shares += blockIdx.y * (long long)(chosen + shared);
  const int lane = threadIdx.x;
  if (lane == 0 && shared) { experts[chosen] = count; shares[chosen] = sigmoid(row[count]); }
  float greatest = 0, whole = 0;
  for (int e = lane; e < count; e += 32) left[e] = row[e] + bias[e];
  for (int i = 0; i < chosen; i++) {
    Top best = {-1e38f, count - 1};
    __syncwarp();
    for (int e = lane; e < count; e += 32)
      if (left[e] > best.most) best = {left[e], e};
    best = of_warp(best);
    if (i == 0) {
      greatest = best.most;
      for (int e = lane; e < count && !is_normed; e += 32) whole += __expf(left[e] - greatest);
      whole = of_warp(whole);
    }
    const float share = __expf(best.most - greatest);
    if (is_normed) whole += share;
    __syncwarp();
    if (lane == 0) { left[best.place] = -2e38f; experts[i] = best.place; shares[i] = share; }
  }
  __syncwarp();
  for (int i = lane; i < chosen; i += 32) shares[i] /= whole;
}

// What is known of a row's 32nds: the greatest, its place, the sum of what all weigh beside it,
// and how many of them are done.
struct Parts { float most[32], sums[32]; int places[32], done, unused[31]; };

// Of the lanes with something the first at which the sum passes `target`, which becomes what is
// left of it there; the last one with something if rounding has led past the end.
__device__ int passed(float mine, float upto, float& target) {
  const float before = __shfl_up_sync(~0u, upto, 1);
  const unsigned some = __ballot_sync(~0u, mine > 0);
  const unsigned those = some & __ballot_sync(~0u, target < upto);
  const int lane = those ? __ffs(those) - 1 : some ? 31 - __clz(some) : 0;
  const float left = __shfl_sync(~0u, threadIdx.x % 32 ? target - before : target, lane);
  target = those ? left : 1e30f;
  return lane;
}

// The token at which the sum of what weighs at least min_p of the greatest passes `uniform` of the
// whole; the greatest where `uniform` is below 0.  What a token weighs is its filtered probability
// where the row has a filter, or else that of its logit.  32 blocks of 1024 threads for a row,
// the last of which draws.
__global__ void draw(int* tokens, Parts* parts, const float* logits, const float* probs,
                     const float* temperature, const int* top_k, const float* top_p,
                     const float* uniform, const float* min_p, int vocab) {
  __shared__ float sums[32];
  __shared__ bool is_last;
  make_way();
  const int at = blockIdx.y, me = threadIdx.x, warp = me / 32, lane = me % 32;
  const bool is_whole = top_k[at] >= vocab && top_p[at] >= 1;
  const float factor = 1 / temperature[at], u = uniform[at], share = min_p[at];
  wait();
  const float* row = (is_whole ? logits : probs) + at * (long long)vocab;
  float mine = 0;
  int part = (vocab + 31) / 32, first = min((int)blockIdx.x * part, vocab);
  const int size = min(part, vocab - first);
  Top top = greatest(row + first, size, INFINITY, -1);
  auto weigh = [&](float x) { return is_whole ? __expf((x - top.most) * factor) : x; };
  if (top.most > -INFINITY)
    for (int i = me; i < size; i += 1024) mine += weigh(row[first + i]);
  mine = of_warp(mine);
  if (lane == 0) sums[warp] = mine;
  __syncthreads();
  mine = of_warp(sums[lane]);
  if (me == 0) {
    parts[at].most[blockIdx.x] = top.most;
    parts[at].sums[blockIdx.x] = mine;
    parts[at].places[blockIdx.x] = first + top.place;
    __threadfence();
    is_last = atomicAdd(&parts[at].done, 1) == 31;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  const Top here = {__ldcg(&parts[at].most[lane]), __ldcg(&parts[at].places[lane])};
  const float total = __ldcg(&parts[at].sums[lane]);
  if (me == 0) parts[at].done = 0;
  top = of_warp(here);
  if (top.most == -INFINITY) top.place = vocab - 1;  // of NaNs none is the greatest
  if (me == 0) tokens[at] = top.place;
  if (u < 0) return;
  __syncthreads();  // another thread may write it again
  const float least = share * (is_whole ? 1 : top.most);
  auto counted = [&](int i) {
    const float x = weigh(row[i]);
    return x >= least ? x : 0;
  };
  float target = -1;
  // Of what the lanes have: the one at which the sum passes the target; none if there is no sum.
  auto found = [&]() {
    mine = mine > 0 ? mine : 0;
    float upto = mine;
    for (int step = 1; step < 32; step *= 2) {
      const float before = __shfl_up_sync(~0u, upto, step);
      if (lane >= step) upto += before;
    }
    const float whole = __shfl_sync(~0u, upto, 31);
    if (target < 0) target = u * whole;
    return whole > 0 ? passed(mine, upto, target) : -1;
  };
  // Each warp sums a 32nd of the row, then of the part with the token, until that is short.
  int end = vocab, chosen;
  for (first = 0; end - first > 128; end = min(first + part, end)) {
    part = (end - first + 31) / 32;
    if (target < 0 && !(share > 0)) {  // known
      mine = total > 0 ? total * (is_whole ? weigh(here.most) : 1) : 0;
    } else {
      const int start = first + warp * part, stop = min(start + part, end);
      mine = 0;
      for (int i = start + lane; i < stop; i += 32) mine += counted(i);
      mine = of_warp(mine);
      __syncthreads();
      if (lane == 0) sums[warp] = mine;
      __syncthreads();
      mine = sums[lane];
    }
    chosen = found();
    if (chosen < 0) return;
    first += chosen * part;
  }
  // Then each lane a few tokens, and the chosen one takes them one by one.
  part = (end - first + 31) / 32;
  const int start = min(first + lane * part, end), stop = min(start + part, end);
  mine = 0;
  for (int i = start; i < stop; i++) mine += counted(i);
  chosen = found();
  if (warp > 0 || lane != chosen) return;
  int token = start;
  for (int i = start; i < stop; i++) {
    const float x = counted(i);
    if (!(x > 0)) continue;
    token = i;
    if (target < x) break;
    target -= x;
  }
  tokens[at] = token;
}

// Counts of 2 for each time that a token was drawn, and 1 where it is in the prompt.
__global__ void penalise(float* logits, const int* counts, const int* slots,
                         const float* presence, const float* frequency, const float* repetition,
                         int vocab) {
  const int v = begin(), i = blockIdx.y;
  if (v >= vocab) return;
  const int count = counts[slots[i] * (long long)vocab + v];
  if (!count) return;
  float* to = logits + i * (long long)vocab + v;
  const float x = *to > 0 ? *to / repetition[i] : *to * repetition[i];
  *to = x - frequency[i] * (count >> 1) - (count > 1 ? presence[i] : 0);
}

__global__ void count(int* counts, const int* tokens, const int* slots, int n, int vocab) {
  const int i = begin();
  if (i < n) atomicAdd(counts + slots[i] * (long long)vocab + tokens[i], 2);
}

__global__ void add(float* logits, const int* places, const float* values, int n) {
  const int i = begin();
  if (i < n) atomicAdd(logits + places[i], values[i]);
}

// Minus infinity where a row of `bits` has none; row i is of places[i] of the logits.
__global__ void allow(float* logits, const unsigned* bits, const int* places, int vocab) {
  const int v = begin(), words = (vocab + 31) / 32;
  if (v < vocab && !(bits[blockIdx.y * words + v / 32] >> v % 32 & 1))
    logits[places[blockIdx.y] * (long long)vocab + v] = -INFINITY;
}

// The logarithms of the probabilities of tokens[i] and then of the `top` most probable, in rows
// of 21; and those tokens, in rows of 20.  One block of 1024 threads for a row.
__global__ void logprobs(float* values, int* ids, const float* logits, const int* tokens,
                         int vocab, int top) {
  begin();
  __shared__ float sums[32];
  const float* row = logits + blockIdx.y * (long long)vocab;
  values += blockIdx.y * 21; ids += blockIdx.y * 20;
  const int me = threadIdx.x;
  const float most = greatest(row, vocab, INFINITY, -1).most;
  float mine = 0;
  for (int i = me; i < vocab; i += 1024) mine += expf(row[i] - most);
  mine = of_warp(mine);
  if (me % 32 == 0) sums[me / 32] = mine;
  __syncthreads();
  const float whole = most + logf(of_warp(sums[me % 32]));
  if (me == 0) values[0] = row[tokens[blockIdx.y]] - whole;
  Top before = {INFINITY, -1};
  for (int k = 0; k < top; k++) {
    before = greatest(row, vocab, before.most, before.place);
    before.place = min(before.place, vocab - 1);
    if (me == 0) { values[k + 1] = before.most - whole; ids[k] = before.place; }
  }
}
}
"""
KERNELS = *re.findall(r"__global__ void (\w+)\(", SOURCE), *products.KERNELS
SOURCE += products.SOURCE


def check(result, log=str):
    """What a call of cuda-python gives besides its error; RuntimeError with what `log` says."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"{type(error).__name__}: {error.name}{log()}")
    return values[0] if len(values) == 1 else values or None


def cubin(dtype, capability):
    """The kernels' machine code for a GPU; NVRTC needs no GPU to compile it."""
    from cuda.bindings import nvrtc

    program = check(nvrtc.nvrtcCreateProgram(SOURCE.encode(), b"glue.cu", 0, [], []))

    def log():
        text = b" " * check(nvrtc.nvrtcGetProgramLogSize(program))
        check(nvrtc.nvrtcGetProgramLog(program, text))
        return "\n" + text.decode()

    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}".encode()]
    options += [b"-DFLOAT16"] if dtype == "float16" else []
    check(nvrtc.nvrtcCompileProgram(program, len(options), options), log)
    code = b" " * check(nvrtc.nvrtcGetCUBINSize(program))
    check(nvrtc.nvrtcGetCUBIN(program, code))
    check(nvrtc.nvrtcDestroyProgram(program))
    return code


def loaded(code):
    from cuda.bindings import driver

    module = check(driver.cuModuleLoadData(code))
    return {name: check(driver.cuModuleGetFunction(module, name.encode())) for name in KERNELS}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def take(out, table, index, latest, step, words, start, count):
    if np.ndim(latest):
        index = np.where(index < 0, latest[-1 - np.minimum(index, -1)], index)
    at = index - start
    is_there = (at >= 0) & (at < count)
    out[...] = table[np.where(is_there, at, 0)]
    out[~is_there] = 0


def joined(out, parts, width, whole):
    out[...] = np.concatenate([*parts], 1)[:, :whole]


def give(table, values, index, step, words):
    table[index] = values


def convolve(out, x, weight, state, slots, starts, x_step, slot_step, channels):
    for slot, start, end in zip(slots, starts[:-1], starts[1:], strict=True):
        seen = np.concatenate([state[slot].T, x[start:end]]).astype(np.float32)
        y = sum(weight[:, i] * seen[i : i + end - start] for i in range(4))
        out[start:end] = y * sigmoid(y)
        state[slot] = seen[-3:].T


def decays(alpha, beta, ba, a_log, dt_bias, count, heads):
    b, a = ba[:, :heads].astype(np.float32), ba[:, heads:].astype(np.float32)
    alpha[...] = np.exp(-np.exp(a_log) * np.logaddexp(0, a + dt_bias))
    beta[...] = sigmoid(b)


def combined(x, others, step, width, how):
    a, b = x.astype(np.float32), others.astype(np.float32)
    factor = b if how == TIMES else sigmoid(b) * (b if how == SILU else 1)
    x[...] = a * factor if how else a + b


def place(
    q, k_cache, v_cache, qkv, q_norm, k_norm, cos_sin, positions, requests, indptr, indices, starts,
    step, page_step, pieces, heads, kv_heads, dim, rotary, page_size, eps, is_normed,
):  # fmt: skip
    x = qkv[:, : (heads + 2 * kv_heads) * dim].reshape(len(qkv), -1, dim)
    both = x[:, : heads + kv_heads].astype(np.float32)
    if is_normed:
        weights = [np.tile(w, (n, 1)) for w, n in ((q_norm, heads), (k_norm, kv_heads))]
        both /= np.sqrt((both * both).mean(-1, keepdims=True) + eps)
        both *= np.concatenate(weights).astype(np.float32)
    cos, sin = np.split(cos_sin[positions][:, None], 2, axis=-1)
    low, high, rest = np.split(both, [rotary // 2, rotary], axis=-1)
    turned = [low * cos - high * sin, high * cos + low * sin, rest]
    turned = np.concatenate(turned, axis=-1).astype(qkv.dtype)
    if pieces:
        is_some = (np.diff(starts) > 0).reshape(len(qkv), pieces)
        q.reshape(*is_some.shape, heads, dim)[is_some] = turned[np.where(is_some)[0], :heads]
    else:
        q[...] = turned[:, :heads]
    at = indices[indptr[requests] + positions // page_size], positions % page_size
    k_cache[at], v_cache[at] = turned[:, heads:], x[:, heads + kv_heads :]


def merged(out, parts, lse, starts, pieces, dim):
    is_some = (np.diff(starts) > 0).reshape(-1, pieces, 1)
    lse = np.where(is_some, lse.reshape(len(out), pieces, -1), -np.inf)
    shares = np.exp2(lse - lse.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    parts = parts.reshape(*lse.shape, dim).astype(np.float32)
    out[...] = np.where(is_some[..., None], parts * shares[..., None], 0).sum(1)


def route(experts, shares, logits, bias, count, chosen, is_normed, shared):
    x = logits[:, :count] + bias
    best = np.argsort(-x, axis=1, kind="stable")[:, :chosen]
    of_all = np.exp(x - x.max(1, keepdims=True))
    mine = np.take_along_axis(of_all, best, 1)
    experts[:, :chosen], experts[:, chosen:] = best, count
    shares[:, :chosen] = mine / (mine if is_normed else of_all).sum(1, keepdims=True)
    shares[:, chosen:] = sigmoid(logits[:, count:])


def draw(tokens, parts, logits, probs, temperature, top_k, top_p, uniform, min_p, vocab):
    for i in range(len(tokens)):
        is_whole = top_k[i] >= vocab and top_p[i] >= 1
        row = logits[i] if is_whole else probs[i]
        tokens[i] = row.argmax()
        if is_whole:
            row = np.exp((row - row.max()) / temperature[i])
        if uniform[i] >= 0:
            sums = np.cumsum(np.where(row >= row.max() * min_p[i], row, 0), dtype=np.float64)
            place = np.searchsorted(sums, uniform[i] * sums[-1], "right")
            if place < vocab:  # else they are NaN
                tokens[i] = place


def penalise(logits, counts, slots, presence, frequency, repetition, vocab):
    seen = counts[slots]
    factor = np.where(logits > 0, 1 / repetition[:, None], repetition[:, None])
    changed = logits * factor.astype(np.float32) - frequency[:, None] * (seen >> 1)
    changed -= presence[:, None] * (seen > 1)
    logits[...] = np.where(seen > 0, changed, logits)


def count(counts, tokens, slots, n, vocab):
    np.add.at(counts, (slots, tokens), 2)


def add(logits, places, values, n):
    np.add.at(logits.reshape(-1), places, values)


def allow(logits, bits, places, vocab):
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")[:, :vocab]
    logits[places] = np.where(allowed, logits[places], -np.inf)


def logprobs(values, ids, logits, tokens, vocab, top):
    exact = logits.astype(np.float64)
    exact -= exact.max(1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    values[:, 0] = np.take_along_axis(exact, tokens[:, None], 1)[:, 0]
    top = min(top, vocab)
    ids[:, :top] = np.argsort(-exact, 1, "stable")[:, :top]
    values[:, 1 : top + 1] = np.take_along_axis(exact, ids[:, :top], 1)


ON_CPU = {name: globals()[name] for name in KERNELS if name in globals()}
