// Attention within samples on the CPU, forward and backward.
//
// T tokens, A heads, D head size, N samples. Matrices are row-major and contiguous. Work is divided such that no two threads write to
// one place, and every sum has one order: the results do not depend on the number of threads.

#include <omp.h>

#include <vector>

#include "kernels.h"

namespace {

constexpr long QUERIES = 48;  // queries at a time: their scores stay in the second-level cache

long padded(long n) { return (whole(n) / WIDTH | 1) * WIDTH; }  // an odd number of registers: rows do not share cache sets

// Units along the columns: out(k, i) is the k-th unit of row i; 0 beyond the rows, up to `out_row`.
void transpose_units(const Real* in, long in_row, long rows, long columns, Unit* out, long out_row) {
    for (long k = 0; k < columns / PAIR; ++k) std::fill(out + k * out_row + rows, out + (k + 1) * out_row, Unit(0));
    for (long first = 0; first < rows; first += 16)
        for (long k = 0; k < columns / PAIR; ++k)
            for (long i = first; i < std::min(first + 16, rows); ++i) out[k * out_row + i] = *(const Unit*)(in + i * in_row + k * PAIR);
}

void write_rows(const float* in, long in_row, long rows, long columns, Real* out, long out_row) {
    for (long i = 0; i < rows; ++i)
        for (long j = 0; j < columns; ++j) out[i * out_row + j] = in[i * in_row + j];
}

const Unit* as_units(const Real* x) { return (const Unit*)x; }

// A row of n floats as units along it, 0 at an odd end; `out` is the row itself where a unit is a float.
void narrow(float* row, long n, Unit* out) {
    if (PAIR == 1) return;
    Real* to = (Real*)out;
    for (long j = 0; j < n; ++j) to[j] = row[j];
    if (n % PAIR) to[n] = 0.0f;
}

struct Memory {  // of a thread; its parts are taken one after the other
    std::vector<float> floats;
    float* next;

    void start(long size) {
        floats.resize(std::max(floats.size(), size_t(size + 16)));
        next = (float*)((uintptr_t(floats.data()) + 63) / 64 * 64);
    }
    float* part(long size) { return (next += size) - size; }
    Unit* units(long size) { return (Unit*)part(size); }
};

struct Head {
    long number, start, tokens;  // of which sample: its first token, and how many it has
    long line, origin;           // floats of a row of scores; where the head begins in a tensor [T, A * D]
};

// Calls body(head, memory) for each head of each sample, on all threads.
template <typename Body>
void for_each_head(const int32_t* starts, long N, long A, long D, Body body) {
#pragma omp parallel
    {
        static thread_local Memory memory;
#pragma omp for schedule(dynamic)
        for (long task = 0; task < N * A; ++task) {
            const long number = task % A, start = starts[task / A], n = starts[task / A + 1] - start;
            body(Head{number, start, n, padded(n), start * A * D + number * D}, memory);
        }
    }
}

}  // namespace

extern "C" {

// query, key, value, context [T, A * D]; D is even where a unit is a pair; sample n has the tokens from starts[n] up to starts[n + 1];
// normalizers [T, A]: log of the sum of exp(scores), for the backward pass.
void attention_forward(const Real* query, const Real* key, const Real* value, const int32_t* starts, Real* context, float* normalizers,
                       long N, long A, long D, double p, uint64_t seed) {
    const long H = A * D, size = whole(D);
    const float scale = 1.0f / std::sqrt(float(D));
    const Dropout dropout(p, seed);
    for_each_head(starts, N, A, D, [=](const Head& head, Memory& memory) {
        const long n = head.tokens, line = head.line, origin = head.origin;
        memory.start((D + n) * std::max(line, size) + 2 * QUERIES * line + QUERIES * size);
        Unit *keys = memory.units(D / PAIR * line), *values = memory.units(units(n) * size);
        float *scores = memory.part(QUERIES * line), *out = memory.part(QUERIES * size);
        Unit* weights = PAIR == 1 ? (Unit*)scores : memory.units(QUERIES * line);
        transpose_units(key + origin, H, n, D, keys, line);
        pair_rows(value + origin, H, n, D, values, size, size);
        for (long first = 0; first < n; first += QUERIES) {
            const long rows = std::min(QUERIES, n - first), at = origin + first * H;
            product(as_units(query + at), H / PAIR, 1, keys, line, scores, line, rows, whole(n), D / PAIR, scale, false);
            for (long i = 0; i < rows; ++i) {
                const long place = (head.start + first + i) * A + head.number;
                const DropoutRow keep = dropout.row(place);
                float *row = scores + i * line, highest = row[0], sum = 0.0f;
#pragma omp simd reduction(max : highest)
                for (long j = 0; j < n; ++j) highest = std::max(highest, row[j]);
#pragma omp simd reduction(+ : sum)
                for (long j = 0; j < n; ++j) sum += row[j] = exponential(row[j] - highest);
                const float inverse = 1.0f / sum;
                normalizers[place] = highest + std::log(sum);
#pragma omp simd
                for (long j = 0; j < n; ++j) row[j] *= inverse * keep(j);
                narrow(row, n, weights + i * line);
            }
            product(weights, line, 1, values, size, out, size, rows, size, units(n), 1.0f, false);
            write_rows(out, size, rows, D, context + at, H);
        }
    });
}

// The gradients of query, key and value [T, A * D], from that of the context and what attention_forward took and gave.
void attention_backward(const Real* gradient, const Real* query, const Real* key, const Real* value, const int32_t* starts,
                        const Real* context, const float* normalizers, Real* query_gradient, Real* key_gradient, Real* value_gradient,
                        long N, long A, long D, double p, uint64_t seed) {
    const long H = A * D, size = whole(D);
    const float scale = 1.0f / std::sqrt(float(D));
    const Dropout dropout(p, seed);
    for_each_head(starts, N, A, D, [=](const Head& head, Memory& memory) {
        const long n = head.tokens, line = head.line, origin = head.origin;
        memory.start(2 * D * line + 3 * (n + 1) * size + 5 * QUERIES * line + 3 * QUERIES * size);
        Unit *keys_transposed = memory.units(D / PAIR * line), *values_transposed = memory.units(D / PAIR * line);
        Unit *keys = memory.units(units(n) * size), *queries = memory.units(QUERIES * size), *outputs = memory.units(QUERIES * size);
        float *key_sums = memory.part(n * size), *value_sums = memory.part(n * size), *out = memory.part(QUERIES * size);
        float *weights = memory.part(QUERIES * line), *weight_gradients = memory.part(QUERIES * line);
        // The same as units along the queries, and the gradients along the keys.
        Unit *of_queries = (Unit*)weights, *gradients_of_queries = (Unit*)weight_gradients, *gradients_of_keys = (Unit*)weight_gradients;
        if (PAIR == 2) {
            of_queries = memory.units(QUERIES * line), gradients_of_queries = memory.units(QUERIES * line);
            gradients_of_keys = memory.units(QUERIES * line);
        }
        transpose_units(key + origin, H, n, D, keys_transposed, line);
        transpose_units(value + origin, H, n, D, values_transposed, line);
        pair_rows(key + origin, H, n, D, keys, size, size);
        for (long first = 0; first < n; first += QUERIES) {
            const long rows = std::min(QUERIES, n - first), at = origin + first * H;
            const Unit *asked = as_units(query + at), *given = as_units(gradient + at);
            pair_rows(query + at, H, rows, D, queries, size, size);
            pair_rows(gradient + at, H, rows, D, outputs, size, size);
            product(asked, H / PAIR, 1, keys_transposed, line, weights, line, rows, whole(n), D / PAIR, scale, false);
            product(given, H / PAIR, 1, values_transposed, line, weight_gradients, line, rows, whole(n), D / PAIR, 1.0f, false);
            for (long i = 0; i < rows; ++i) {
                const long place = (head.start + first + i) * A + head.number;
                const DropoutRow keep = dropout.row(place);
                float *weight = weights + i * line, *weight_gradient = weight_gradients + i * line;
                const float normalizer = normalizers[place];
                // The sum over keys of weight * its gradient is, for a row, context * its gradient.
                float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
                for (long j = 0; j < D; ++j) mean += float(gradient[at + i * H + j]) * float(context[at + i * H + j]);
#pragma omp simd
                for (long j = 0; j < n; ++j) {
                    const float share = exponential(weight[j] - normalizer), scaled = keep(j);
                    weight[j] = share * scaled;
                    weight_gradient[j] = share * (weight_gradient[j] * scaled - mean);
                }
                narrow(weight_gradient, n, gradients_of_keys + i * line);
            }
            if (PAIR == 2) {
                pair_rows(weights, line, rows, n, of_queries, line, n);
                pair_rows(weight_gradients, line, rows, n, gradients_of_queries, line, n);
            }
            product(of_queries, 1, line, outputs, size, value_sums, size, n, size, units(rows), 1.0f, first > 0);
            product(gradients_of_queries, 1, line, queries, size, key_sums, size, n, size, units(rows), scale, first > 0);
            product(gradients_of_keys, line, 1, keys, size, out, size, rows, size, units(n), scale, false);
            write_rows(out, size, rows, D, query_gradient + at, H);
        }
        write_rows(key_sums, size, n, D, key_gradient + origin, H);
        write_rows(value_sums, size, n, D, value_gradient + origin, H);
    });
}

}  // extern "C"
