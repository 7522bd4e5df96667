// Four neighbouring logits at once, and copies from global to shared memory that pass no register.
#pragma once

#include "memory.h"

namespace heteroakd::cuda {

// Starts a copy of 4 or 16 bytes; the thread itself may read it after `copies_arrived`.
template <int kBytes>
HAKD_DEVICE void start_copy(void* shared, const void* global) {
#if defined(__CUDA_ARCH__)
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {  // past the first cache: nothing is read twice
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
  }
#else
  std::memcpy(shared, global, kBytes);
#endif
}

HAKD_DEVICE void copies_arrived() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

HAKD_DEVICE float4 load_four(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat) {
    return *reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
  }
  const uint2 bits =
      *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + index);
  if (dtype == Dtype::kBFloat16) {
    return make_float4(from_bits(bits.x << 16), from_bits(bits.x & 0xffff0000u),
                       from_bits(bits.y << 16), from_bits(bits.y & 0xffff0000u));
  }
  return make_float4(half_from_bits(static_cast<uint16_t>(bits.x)),
                     half_from_bits(static_cast<uint16_t>(bits.x >> 16)),
                     half_from_bits(static_cast<uint16_t>(bits.y)),
                     half_from_bits(static_cast<uint16_t>(bits.y >> 16)));
}

HAKD_DEVICE uint32_t narrowed(Dtype dtype, float value) {
  return dtype == Dtype::kBFloat16 ? BFloat16(value).x : Half(value).x;
}

HAKD_DEVICE void store_four(void* data, Dtype dtype, int64_t index, const float (&v)[4]) {
  if (dtype == Dtype::kFloat) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + index) =
        make_float4(v[0], v[1], v[2], v[3]);
    return;
  }
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + index) =
      make_uint2(narrowed(dtype, v[0]) | narrowed(dtype, v[1]) << 16,
                 narrowed(dtype, v[2]) | narrowed(dtype, v[3]) << 16);
}

}  // namespace heteroakd::cuda
