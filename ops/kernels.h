// What the kernels of the encoder share: the type of their tensors, dropout, e^x, and a matrix product.
//
// Real is the type of activations, of their gradients and of the weights that kernels read: float, or bfloat16 where the sources are
// compiled with -DREAL=bfloat16. All arithmetic is float32, as are normalizers, statistics and the gradients of parameters.
//
// Dropout keeps an element where a hash of (seed, position of the element) is at least `threshold` = p * 2^32, and scales what is kept
// by 1 / (1 - p): the backward pass computes the same mask again and stores none. With p = 0 that keeps everything as it is.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#ifndef REAL
#define REAL float
#endif

struct bfloat16 {
    uint16_t bits;

    bfloat16() = default;
    bfloat16(float value) { *this = value; }
    bfloat16& operator=(float value) {  // to nearest, ties to even, as PyTorch rounds; of NaN and infinity the end is cut off
        uint32_t wide;
        std::memcpy(&wide, &value, 4);
        const uint32_t finite = -uint32_t((wide & 0x7f800000) != 0x7f800000);
        bits = uint16_t((wide + (finite & (0x7fff + ((wide >> 16) & 1)))) >> 16);
        return *this;
    }
    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
};
typedef REAL Real;

namespace {

// ---- small functions that vectorise

inline uint32_t mix(uint32_t x) {  // a bijection of 32 bits in which each input bit flips about half of the output's ("lowbias32")
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ (x >> 16);
}

struct DropoutRow {  // what the elements of one row are multiplied by; a local copy, so that loops over columns vectorise
    uint32_t key, threshold;
    float scale;
    float operator()(long column) const { return mix(key + uint32_t(column) * 0x9e3779b9U) >= threshold ? scale : 0.0f; }
};

struct Dropout {
    uint32_t threshold;
    float scale;
    uint32_t seed_low, seed_high;

    Dropout(double p, uint64_t seed)
        : threshold(uint32_t(p * 4294967296.0)), scale(float(1.0 / (1.0 - p))), seed_low(uint32_t(seed)), seed_high(uint32_t(seed >> 32)) {}
    DropoutRow row(long number) const { return {mix(mix(uint32_t(number) ^ seed_low) + seed_high), threshold, scale}; }
};

inline float exponential(float x) {  // e^x to 2 units in the last place, for -87.3 <= x <= 88.3; what is beyond counts as that
    x = std::min(std::max(x, -87.3f), 88.3f);
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

// ---- a matrix product
//
// Its operands are made of units that are multiplied and summed at once: a float, or two bfloat16 that are neighbours along the sum.

#if defined(__AVX512F__)
constexpr int WIDTH = 16, VECTORS = 4;  // floats of a register; registers that a block of the product is wide
#elif defined(__AVX__)
constexpr int WIDTH = 8, VECTORS = 2;
#else
constexpr int WIDTH = 4, VECTORS = 4;
#endif
constexpr int BLOCK_ROWS = 6, BLOCK_COLUMNS = VECTORS * WIDTH;
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * sizeof(uint32_t)), aligned(4)));

template <typename T>
struct UnitOf;
template <>
struct UnitOf<float> {
    typedef float Unit;
};
template <>
struct UnitOf<bfloat16> {
    typedef uint32_t Unit;
};
typedef UnitOf<Real>::Unit Unit;
constexpr long PAIR = sizeof(Unit) / sizeof(Real);  // elements of a unit

inline long units(long elements) { return (elements + PAIR - 1) / PAIR; }

inline Vector multiply_add(Vector sum, float a, const float* b) { return sum + a * *(const Vector*)b; }

inline Vector multiply_add(Vector sum, uint32_t a, const uint32_t* b) {
    const Bits pairs = *(const Bits*)b;
#if defined(__AVX512BF16__)
    return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)pairs);
#else
    float low, high;
    const uint32_t low_bits = a << 16, high_bits = a & 0xffff0000U;
    std::memcpy(&low, &low_bits, 4);
    std::memcpy(&high, &high_bits, 4);
    return sum + low * (Vector)(pairs << 16) + high * (Vector)(pairs & 0xffff0000U);
#endif
}

template <int ROWS, int COLUMNS>
inline void product_block(const Unit* a, long a_row, long a_column, const Unit* b, long b_row, float* c, long c_row, long K, float scale,
                          bool add) {
    Vector sums[ROWS][COLUMNS] = {};
    for (int i = 0; i < ROWS; ++i)  // on their way while the sums are made
        for (int j = 0; j < COLUMNS * WIDTH; j += 16) __builtin_prefetch(c + i * c_row + j, 1);
    for (long k = 0; k < K; ++k)
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < COLUMNS; ++j)
                sums[i][j] = multiply_add(sums[i][j], a[i * a_row + k * a_column], b + k * b_row + j * WIDTH);
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) {
            Vector* out = (Vector*)(c + i * c_row + j * WIDTH);
            *out = add ? *out + scale * sums[i][j] : scale * sums[i][j];
        }
}

template <int COLUMNS>
void product_columns(const Unit* a, long a_row, long a_column, const Unit* b, long b_row, float* c, long c_row, long M, long K,
                     float scale, bool add) {
    long i = 0;
    for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS)
        product_block<BLOCK_ROWS, COLUMNS>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, K, scale, add);
    for (; i + 2 <= M; i += 2) product_block<2, COLUMNS>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, K, scale, add);
    if (i < M) product_block<1, COLUMNS>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, K, scale, add);
}

// C [M, N] = scale * A B (+ C where `add`), C in float32: A(i, k) = a[i * a_row + k * a_column], B [K, N], both in units. N is a multiple
// of WIDTH.
inline void product(const Unit* a, long a_row, long a_column, const Unit* b, long b_row, float* c, long c_row, long M, long N, long K,
                    float scale, bool add) {
    long j = 0;
    for (; j + BLOCK_COLUMNS <= N; j += BLOCK_COLUMNS)
        product_columns<VECTORS>(a, a_row, a_column, b + j, b_row, c + j, c_row, M, K, scale, add);
    for (; j < N; j += WIDTH) product_columns<1>(a, a_row, a_column, b + j, b_row, c + j, c_row, M, K, scale, add);
}

inline long whole(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }  // whole registers

// ---- from rows of elements to units

inline float pair_of(float first, float) { return first; }

inline uint32_t pair_of(bfloat16 first, bfloat16 second) { return first.bits | uint32_t(second.bits) << 16; }

// Units along the rows: out(k, j) are the elements in(k * PAIR, j), in(k * PAIR + 1, j), for j < columns; 0 beyond the rows and, up to
// `out_columns`, beyond the columns.
template <typename In>
void pair_rows(const In* in, long in_row, long rows, long columns, Unit* out, long out_row, long out_columns) {
    for (long k = 0; k < units(rows); ++k) {
        const In *first = in + k * PAIR * in_row, *second = first + in_row;
        Unit* to = out + k * out_row;
        if ((k + 1) * PAIR <= rows)
            for (long j = 0; j < columns; ++j) to[j] = pair_of(Real(first[j]), Real(PAIR == 2 ? second[j] : first[j]));
        else
            for (long j = 0; j < columns; ++j) to[j] = pair_of(Real(first[j]), Real(0.0f));
        std::fill(to + columns, to + out_columns, Unit(0));
    }
}

}  // namespace
