// UNSWAG_HD: a function of host and device; UNSWAG_HOST: one that chooses among them, on the host.  On the host it is inlined
// always: src/math is compiled once per instruction set, and a copy that the linker could share among them would run AVX-512
// code on a machine without it.
#pragma once

#ifdef __FAST_MATH__
#error "UnSwag cannot be built with -ffast-math: NaN, infinities and -0 have meaning here; remove the option"
#endif

#define UNSWAG_HOST [[gnu::always_inline]]
#ifdef __CUDACC__
#define UNSWAG_HD __host__ __device__ __attribute__((always_inline))
#define UNSWAG_UNROLL _Pragma("unroll")
#else
#define UNSWAG_HD [[gnu::always_inline]]
#define UNSWAG_UNROLL
#endif
