/* The sums of checksums.py over a tensor's words: integers mod 2^64, so threads may share a sum. */
#include "cpu.h"

typedef uint64_t u64;

static inline u64 folded(u64 x) { return x ^ (x >> 32); }

/* w: the word, extended to 64 bits, with its sign unless it is a byte; i: its number in the whole tensor */
#define SUM(type)                                                                                                          \
    _Pragma("omp parallel for simd reduction(+ : one, other) if (n > 32768)") for (i64 i = 0; i < n; i++) {                \
        u64 w = (u64)(i64)((const type *)words)[i];                                                                        \
        u64 mixed = folded(folded(folded((u64)(first + i) * m[0]) ^ (w * m[1] + m[0])) * m[2]);                            \
        one += folded(mixed * m[4]);                                                                                       \
        other += folded((mixed ^ w) * m[3]);                                                                               \
    }

/* sums[2]; m: the five multipliers; size: bytes of a word */
void checksum(const void *words, u64 *sums, const u64 *m, i64 n, i64 first, int size) {
    u64 one = 0, other = 0;
    if (size == 8) { SUM(int64_t) }
    else if (size == 4) { SUM(int32_t) }
    else if (size == 2) { SUM(int16_t) }
    else { SUM(uint8_t) }
    sums[0] = one, sums[1] = other;
}
