// The sums of a warp leave it as one row of `partials`; sums.cu brings the rows together.
#pragma once

#include "pixel.h"

namespace heteroakd::cuda {

// The sum over a warp's lanes, in one order; in the first lane.
template <typename N>
HAKD_DEVICE N over_warp(N x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_down_sync(kAllLanes, x, offset);
  }
  return x;
}

// Every warp of the grid writes its row. own: whether the lane's pixels are its own, not a halo's.
template <class Set>
HAKD_DEVICE void write_sums(const Pass& p, int64_t row, const ThreadSums& sums, bool own,
                            int32_t lane) {
  const auto take = [&](double x) { return over_warp(own ? x : 0.0); };
  double of_term[kTerms] = {}, share[kShares] = {};
  for_each([&](auto tag) {
    using Term = typename decltype(tag)::type;
    if (!Set::template may_have<Term>()) return;
    of_term[index_of<Term>] = take(sums.of_term[index_of<Term>]);
    if constexpr (Term::kHasShares) {
      share[share_index_of<Term>] = take(sums.share[share_index_of<Term>]);
    }
  });
  const int64_t valid = over_warp(own ? sums.valid : int64_t{0});
  const int64_t bad = over_warp(own ? sums.bad : int64_t{0});
  if (lane != 0) return;
  double* out = p.partials + row * kPartials;
#pragma unroll
  for (int k = 0; k < kTerms; ++k) out[k] = of_term[k];
#pragma unroll
  for (int k = 0; k < kShares; ++k) out[kFirstShare + k] = share[k];
  out[kValid] = static_cast<double>(valid);
  out[kBad] = static_cast<double>(bad);
}

}  // namespace heteroakd::cuda
