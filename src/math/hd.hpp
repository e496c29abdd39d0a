// UNSWAG_HD: a function of host and device.  On the host it is inlined always: src/math is compiled once per instruction set,
// and a copy that the linker could share among them would run AVX-512 code on a machine without it.
#pragma once

#ifdef __FAST_MATH__
#error "UnSwag cannot be built with -ffast-math: NaN, infinities and -0 have meaning here; remove the option"
#endif

#ifdef __CUDACC__
#define UNSWAG_HD __host__ __device__ __forceinline__
#else
#define UNSWAG_HD [[gnu::always_inline]]
#endif
