// The gradient of a linear layer's weight.
//
// T tokens, I input features, O output features; the matrices are row-major and contiguous.

#include <omp.h>

#include <vector>

#include "kernels.h"

namespace {

constexpr long TOKENS = 512 * PAIR;  // summed at a time: a block of x is as long
constexpr long OUTPUTS = 96;         // at most, of a thread at a time

template <typename T>
T* aligned(std::vector<T>& memory, long size) {
    memory.resize(std::max(memory.size(), size_t(size + 16)));
    return (T*)((uintptr_t(memory.data()) + 63) / 64 * 64);
}

}  // namespace

// sums [O, I] float32 += gradient [T, O] transposed times x [T, I].
extern "C" void weight_gradient(const Real* gradient, const Real* x, float* sums, long T, long O, long I) {
    const long blocks = (I + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS, threads = omp_get_max_threads();
    const long outputs = std::min(OUTPUTS, (O / (2 * threads) / BLOCK_ROWS + 1) * BLOCK_ROWS);
    static thread_local std::vector<Unit> shared;
    Unit* inputs = aligned(shared, blocks * units(TOKENS) * BLOCK_COLUMNS);
#pragma omp parallel
    {
        static thread_local std::vector<Unit> own;
        static thread_local std::vector<float> narrow;
        Unit* packed = aligned(own, units(TOKENS) * outputs);
        float* part = aligned(narrow, outputs * BLOCK_COLUMNS);
        for (long first = 0; first < T; first += TOKENS) {
            const long rows = std::min(TOKENS, T - first), K = units(rows);
#pragma omp for schedule(static)
            for (long block = 0; block < blocks; ++block) {
                const long column = block * BLOCK_COLUMNS, columns = std::min(long(BLOCK_COLUMNS), I - column);
                pair_rows(x + first * I + column, I, rows, columns, inputs + block * K * BLOCK_COLUMNS, BLOCK_COLUMNS, whole(columns));
            }
#pragma omp for schedule(dynamic)
            for (long output = 0; output < O; output += outputs) {
                const long M = std::min(outputs, O - output);
                pair_rows(gradient + first * O + output, O, rows, M, packed, outputs, M);
                for (long block = 0; block < blocks; ++block) {
                    const long column = block * BLOCK_COLUMNS, N = std::min(long(BLOCK_COLUMNS), I - column);
                    const Unit* block_inputs = inputs + block * K * BLOCK_COLUMNS;
                    float* to = sums + output * I + column;
                    if (N % WIDTH == 0) {
                        product(packed, 1, outputs, block_inputs, BLOCK_COLUMNS, to, I, M, N, K, 1.0f, true);
                        continue;
                    }
                    // A product writes whole registers, and what is beyond these columns is another thread's.
                    product(packed, 1, outputs, block_inputs, BLOCK_COLUMNS, part, BLOCK_COLUMNS, M, whole(N), K, 1.0f, false);
                    for (long i = 0; i < M; ++i)
                        for (long j = 0; j < N; ++j) to[i * I + j] += part[i * BLOCK_COLUMNS + j];
                }
            }
        }
    }
}
