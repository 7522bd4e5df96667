// What the warps of a pass left, brought together; in one order, whatever ran first.
//
// finish_sums: a block per column of `partials`, which it reads once. combine_gradients: the sum over
// terms of the scale times the gradient of each group, in the dtype and the strides of the logits; reads
// each saved gradient and writes the result once: 4 (K (chunk_rows + 1) / chunk_rows + 1) bytes per
// logit, memory bound. reduce_space: the denominators of softmaxes over space. settle: what terms over
// classes make of their sums.
#include "kernels.h"
#include "memory.h"
#include "runtime.h"

namespace heteroakd::cuda {
namespace {

constexpr int kSumThreads = 256;
constexpr int kCombineThreads = 256;
constexpr int kSpaceThreads = 64;

// The sum over a block of kSumThreads, in the first thread. memory: a double per thread.
HAKD_DEVICE double over_block(double x, double* memory) {
  __syncthreads();  // whoever still reads what was there
  memory[threadIdx.x] = x;
  for (int half = kSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) memory[threadIdx.x] += memory[threadIdx.x + half];
  }
  return threadIdx.x == 0 ? memory[0] : 0.0;
}

HAKD_DEVICE double column_sum(const double* column, int64_t rows) {
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < rows; row += kSumThreads) sum += column[row * kPartials];
  return sum;
}

__global__ void __launch_bounds__(kSumThreads) finish_sums_kernel(const __grid_constant__ Finish f) {
  HAKD_SHARED_MEMORY(double, memory);
  const auto column = static_cast<int32_t>(blockIdx.x);
  const double* first = f.partials + column;
  const double total = over_block(column_sum(first, f.rows * f.images), memory);
  double images_with_pixels = 0.0;
  bool per_image = false;
  for (int k = 0; k < kTerms; ++k) {
    per_image |= f.group[k] >= 0 && f.denominator[k] == Denominator::kImages;
  }
  if (column == kValid && per_image) {
    for (int64_t image = 0; image < f.images; ++image) {
      const double* valid = f.partials + image * f.rows * kPartials + kValid;
      const double pixels = over_block(column_sum(valid, f.rows), memory);
      images_with_pixels += pixels > 0.0 ? 1.0 : 0.0;
    }
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; k < kTerms; ++k) {
    if (f.position[k] < 0) continue;
    // A sum of divergences is never negative, its rounding may be. A NaN comes through.
    if (column == k) {
      f.numerators[f.position[k]] = f.value[k] != nullptr ? *f.value[k]
                                    : f.is_divergence[k]  ? max_or_nan(0.0, total)
                                                          : total;
    }
    const Denominator kind = f.denominator[k];
    double* denominator = f.denominators + f.group[k];
    if (kind == Denominator::kValid && column == kValid) {
      *denominator = f.weighted         ? f.pixels[f.needs_label[k] ? 1 : 2]
                     : f.pixels == nullptr || !f.needs_label[k] ? total
                                                                : f.pixels[0];
    }
    if (kind == Denominator::kClasses && column == kValid) {
      const double pixels = f.pixels == nullptr ? total : f.pixels[f.weighted ? 1 : 0];
      *denominator = pixels > 0.0 ? f.classes : 0.0;
    }
    if (kind == Denominator::kImages && column == kValid) {
      *denominator = images_with_pixels * f.classes;
    }
    if ((kind == Denominator::kShares || kind == Denominator::kClassWeight) &&
        column == f.share_of[k]) {
      *denominator = total;
    }
  }
  if (f.report == nullptr) return;
  if (column == kValid) {
    f.report[0] = static_cast<int64_t>(f.pixels == nullptr ? total : f.pixels[0]);
    f.report[1] = static_cast<int64_t>(total);
    f.report[3] = f.pixels == nullptr ? 0 : static_cast<int64_t>(f.pixels[3]);
  }
  if (column == kBad) f.report[2] = static_cast<int64_t>(total);
}

// Each block its share of the pixels, always the same; then one block brings them together.
template <typename F>
__global__ void __launch_bounds__(kSumThreads)
    count_pixels_kernel(const __grid_constant__ Pass p, double* counts) {
  HAKD_SHARED_MEMORY(double, memory);
  const int64_t plane = static_cast<int64_t>(p.label_height) * p.label_width;
  const int64_t pixels = plane * p.batch;
  double sum[kPixelCounts] = {};
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSumThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x; at < pixels;
       at += step) {
    const int64_t image = divide(at, plane);
    const int64_t y = divide(at - image * plane, p.label_width);
    int32_t label[1][1], valid = 0, bad = 0;
    load_labels<F>(p, static_cast<int32_t>(image), static_cast<int32_t>(y),
                static_cast<int32_t>(at - image * plane - y * p.label_width), 1, 1, label, valid,
                bad);
    const bool labelled = label[0][0] >= 0 && label[0][0] < p.classes;
    sum[0] += labelled ? 1.0 : 0.0;
    if (p.pixel_weight == nullptr) continue;
    const auto weight = static_cast<double>(weight_at<F>(p, at));
    sum[1] += labelled ? weight : 0.0;
    sum[2] += label[0][0] >= 0 ? weight : 0.0;
    sum[3] += weight >= 0.0 && weight <= 1.7976931348623157e308 ? 0.0 : 1.0;
  }
  for (int k = 0; k < kPixelCounts; ++k) {
    const double total = over_block(sum[k], memory);
    if (threadIdx.x == 0) counts[(blockIdx.x + 1) * kPixelCounts + k] = total;
  }
}

__global__ void __launch_bounds__(kSumThreads) total_pixels_kernel(double* counts, int32_t blocks) {
  HAKD_SHARED_MEMORY(double, memory);
  for (int k = 0; k < kPixelCounts; ++k) {
    double sum = 0.0;
    for (int32_t block = static_cast<int32_t>(threadIdx.x); block < blocks; block += kSumThreads) {
      sum += counts[(block + 1) * kPixelCounts + k];
    }
    sum = over_block(sum, memory);
    if (threadIdx.x == 0) counts[k] = sum;
  }
}

__global__ void __launch_bounds__(kWarpSize) group_totals_kernel(const __grid_constant__ GroupTotals t) {
  const auto g = static_cast<int32_t>(threadIdx.x);
  if (g >= t.groups) return;
  double total = 0.0;
  for (int32_t k = 0; k < t.terms; ++k) {
    if (t.group[k] == g) total += t.weight[k] * t.numerators[k];
  }
  t.totals[g] = total;
}

// Four logits of a row of a plane per thread, so that what depends on the place is found once.
constexpr int kCombined = 4;

template <typename F>
__global__ void __launch_bounds__(kCombineThreads)
    combine_gradients_kernel(const __grid_constant__ Combine k) {
  const int64_t width = k.out.width;
  const int64_t plane = k.chunks * (k.chunk_rows + 1) * width;
  const int64_t all = plane * k.classes * k.batch;
  const int64_t per_row = (width + kCombined - 1) / kCombined;
  const int64_t per_plane = per_row * k.out.height;
  const int64_t count = per_plane * k.classes * k.batch;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCombineThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x; at < count;
       at += step) {
    const int64_t channel = divide(at, per_plane);  // image * C + c
    const int64_t in_plane = at - channel * per_plane;
    const int64_t i = divide(in_plane, per_row);
    const int64_t j = (in_plane - i * per_row) * kCombined;
    // logits row i is the top of cell row i + 1 (counted from 0) and the bottom of the one above
    const int64_t chunk = k.chunk_rows == 1 ? i + 1 : (i + 1) / kMostChunkRows;
    const int64_t t = i + 1 - chunk * k.chunk_rows;
    const F* top = static_cast<const F*>(k.saved) + channel * plane +
                   (chunk * (k.chunk_rows + 1) + t) * width + j;
    // where a chunk begins, the bottom of the last chunk's last cell is a row of its own
    const F* above = t == 0 && chunk > 0 ? top - width : nullptr;
    F total[kCombined];
#pragma unroll
    for (int x = 0; x < kCombined; ++x) total[x] = F(0);
    for (int s = 0; s < k.gradients; ++s) {
      const F scale = static_cast<F>(k.weight[s] * k.grad_totals[k.group[s]]);
#pragma unroll
      for (int x = 0; x < kCombined; ++x) {
        if (j + x >= width) continue;
        F g = top[s * all + x];
        if (above != nullptr) g += above[s * all + x];
        total[x] += scale * g;
      }
    }
    const int64_t image = channel / k.classes;
    const int64_t place = image * k.out.batch_stride +
                          (channel - image * k.classes) * k.out.class_stride +
                          i * k.out.row_stride + j * k.out.column_stride;
#pragma unroll
    for (int x = 0; x < kCombined; ++x) {
      if (j + x >= width) continue;
      store_logit(const_cast<void*>(k.out.data), k.out.dtype, place + x * k.out.column_stride,
                  total[x]);
    }
  }
}

template <typename F>
__global__ void __launch_bounds__(kSpaceThreads)
    reduce_space_kernel(const __grid_constant__ SpaceReduce r) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kSpaceThreads + threadIdx.x;
  if (at >= r.images * r.classes) return;
  const int64_t image = at / r.classes;
  const F* found = static_cast<const F*>(r.found) + (image * r.rows * r.classes + at % r.classes) * 2;
  F largest = F(-1e30);
  double total = 0.0;  // over a million pixels
  for (int64_t row = 0; row < r.rows; ++row) {
    const F here = found[row * r.classes * 2];
    const F part = found[row * r.classes * 2 + 1];
    const F bound = max_or_nan(largest, here);
    total = total * static_cast<double>(exp2((largest - bound) * F(kLog2E))) +
            static_cast<double>(part * exp2((here - bound) * F(kLog2E)));
    largest = bound;
  }
  static_cast<F*>(r.shift)[at] = largest;
  static_cast<F*>(r.inverse)[at] = static_cast<F>(1.0 / total);
  static_cast<F*>(r.log)[at] = static_cast<F>(static_cast<double>(largest) + ::log(total));
}

// A block per class and number.
__global__ void __launch_bounds__(kSumThreads) add_tallies_kernel(const __grid_constant__ Settle s) {
  HAKD_SHARED_MEMORY(double, memory);
  const int64_t count = static_cast<int64_t>(kMostTallies) * s.classes;
  double sum = 0.0;
  for (int64_t row = threadIdx.x; row < s.rows; row += kSumThreads) {
    sum += s.tallies[row * count + blockIdx.x];
  }
  sum = over_block(sum, memory);
  if (threadIdx.x == 0) s.sums[blockIdx.x] = sum;
}

// One block.
template <class Term, typename F>
__global__ void __launch_bounds__(kSumThreads) settle_kernel(const __grid_constant__ Settle s) {
  HAKD_SHARED_MEMORY(double, memory);
  const auto settled = [&](int32_t c) {
    double sums[kMostTallies];
    for (int j = 0; j < kMostTallies; ++j) sums[j] = s.sums[j * static_cast<int64_t>(s.classes) + c];
    return Term::settle(s.options, sums);
  };
  double value = 0.0;
  for (auto c = static_cast<int32_t>(threadIdx.x); c < s.classes; c += kSumThreads) {
    value += settled(c).value;
  }
  value = over_block(value, memory);
  if (threadIdx.x == 0) memory[0] = value;
  __syncthreads();
  const Conclusion all = Term::conclude(s.options, memory[0], s.classes);
  if (threadIdx.x == 0) *s.value = all.value;
  F* numbers = static_cast<F*>(s.numbers);
  for (auto c = static_cast<int32_t>(threadIdx.x); c < s.classes; c += kSumThreads) {
    const Settled one = settled(c);
    numbers[c] = static_cast<F>(one.number[0] * all.factor);
    numbers[s.classes + c] = static_cast<F>(one.number[1] * all.factor);
  }
}

}  // namespace

void launch_finish_sums(const Finish& f, cudaStream_t stream) {
  launch(finish_sums_kernel, dim3(kPartials), dim3(kSumThreads), kSumThreads * sizeof(double),
         stream, "finish_sums", f);
}

void launch_count_pixels(const Pass& p, double* counts, cudaStream_t stream) {
  launch(p.wide ? count_pixels_kernel<double> : count_pixels_kernel<float>, dim3(kCountBlocks), dim3(kSumThreads), kSumThreads * sizeof(double),
         stream, "count_pixels", p, counts);
  launch(total_pixels_kernel, dim3(1), dim3(kSumThreads), kSumThreads * sizeof(double), stream,
         "total_pixels", counts, kCountBlocks);
}

void launch_group_totals(const GroupTotals& t, cudaStream_t stream) {
  launch(group_totals_kernel, dim3(1), dim3(kWarpSize), 0, stream, "group_totals", t);
}

void launch_combine_gradients(const Combine& k, cudaStream_t stream) {
  const int64_t count = (static_cast<int64_t>(k.out.width) + kCombined - 1) / kCombined *
                        k.out.height * k.classes * k.batch;
  if (count == 0) return;
  const int64_t blocks = (count + kCombineThreads - 1) / kCombineThreads;
  const dim3 grid(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20));
  launch(k.wide ? combine_gradients_kernel<double> : combine_gradients_kernel<float>, grid,
         dim3(kCombineThreads), 0, stream, "combine_gradients", k);
}

void launch_settle(const Settle& s, cudaStream_t stream) {
  constexpr size_t bytes = kSumThreads * sizeof(double);
  launch(add_tallies_kernel, dim3(static_cast<unsigned>(kMostTallies * s.classes)),
         dim3(kSumThreads), bytes, stream, "add_tallies", s);
  for_each_term([&](auto tag, int k) {
    using Term = typename decltype(tag)::type;
    if constexpr (Term::kTallies > 0) {
      if (k != s.term) return;
      launch(s.wide ? settle_kernel<Term, double> : settle_kernel<Term, float>, dim3(1),
             dim3(kSumThreads), bytes, stream, "settle", s);
    }
  });
}

void launch_reduce_space(const SpaceReduce& r, cudaStream_t stream) {
  const int64_t blocks = (r.images * r.classes + kSpaceThreads - 1) /
                         kSpaceThreads;
  launch(r.wide ? reduce_space_kernel<double> : reduce_space_kernel<float>,
         dim3(static_cast<unsigned>(blocks)), dim3(kSpaceThreads), 0, stream, "reduce_space", r);
}

}  // namespace heteroakd::cuda
