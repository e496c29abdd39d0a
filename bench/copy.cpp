// A copy with non-temporal stores; compiled and loaded by bench/native_copy.py.
#include <immintrin.h>

extern "C" void copy(char* to, const char* from, long bytes) {  // multiples of 64, aligned to 64
  for (long i = 0; i < bytes; i += 64) {
    for (long j = 0; j < 64; j += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + j),
                          _mm256_load_si256(reinterpret_cast<const __m256i*>(from + i + j)));
    }
  }
  _mm_sfence();
}
