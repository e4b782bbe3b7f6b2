// The encoder's operations on the CPU, float32, each in as few passes over memory as there can be.
//
// T tokens, H hidden, A heads, D head size, N samples, V vocabulary. All matrices are row-major and contiguous.
// Dropout keeps an element where a hash of (seed, position of the element) is at least `threshold` = p * 2^32, and scales what is kept
// by 1 / (1 - p): the backward pass computes the same mask again and stores none. With p = 0 that keeps everything as it is.
// Work is divided such that no two threads write to one place, and every sum has one order: the results depend on the number of
// threads only in sums over tokens.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16, VECTORS = 4;  // floats of a register; registers that a block of the product is wide
#elif defined(__AVX__)
constexpr int WIDTH = 8, VECTORS = 2;
#else
constexpr int WIDTH = 4, VECTORS = 4;
#endif
constexpr int BLOCK_ROWS = 6;
typedef float Vector __attribute__((vector_size(WIDTH * sizeof(float)), aligned(4)));

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

inline float error_function(float x) {  // erf(x) to 2 units in the last place: a rational function of x^2, constant beyond |x| = 4
    x = std::min(std::max(x, -4.0f), 4.0f);
    float y = x * x;
    float p = -2.72614225801306e-10f;
    p = p * y + 2.77068142495902e-08f;
    p = p * y + -2.10102402082508e-06f;
    p = p * y + -5.69250639462346e-05f;
    p = p * y + -7.34990630326855e-04f;
    p = p * y + -2.95459980854025e-03f;
    p = p * y + -1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * y + -2.13374055278905e-04f;
    q = q * y + -1.68282697438203e-03f;
    q = q * y + -7.37332916720468e-03f;
    q = q * y + -1.42647390514189e-02f;
    return x * p / q;
}

// ---- C [M, N] = scale * A B (+ C where `add`): A(i, k) = a[i * a_row + k * a_column], B [K, N]. N is a multiple of WIDTH.

template <int ROWS, int COLUMNS>
inline void product_block(const float* a, long a_row, long a_column, const float* b, long b_row, float* c, long c_row, long K, float scale,
                          bool add) {
    Vector sums[ROWS][COLUMNS] = {};
    for (long k = 0; k < K; ++k) {
        Vector line[COLUMNS];
        for (int j = 0; j < COLUMNS; ++j) line[j] = *(const Vector*)(b + k * b_row + j * WIDTH);
        for (int i = 0; i < ROWS; ++i) {
            float factor = a[i * a_row + k * a_column];
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] += factor * line[j];
        }
    }
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < COLUMNS; ++j) {
            Vector* out = (Vector*)(c + i * c_row + j * WIDTH);
            *out = add ? *out + scale * sums[i][j] : scale * sums[i][j];
        }
}

template <int COLUMNS>
void product_columns(const float* a, long a_row, long a_column, const float* b, long b_row, float* c, long c_row, long M, long K,
                     float scale, bool add) {
    long i = 0;
    for (; i + BLOCK_ROWS <= M; i += BLOCK_ROWS)
        product_block<BLOCK_ROWS, COLUMNS>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, K, scale, add);
    for (; i + 2 <= M; i += 2) product_block<2, COLUMNS>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, K, scale, add);
    if (i < M) product_block<1, COLUMNS>(a + i * a_row, a_row, a_column, b, b_row, c + i * c_row, c_row, K, scale, add);
}

void product(const float* a, long a_row, long a_column, const float* b, long b_row, float* c, long c_row, long M, long N, long K,
             float scale, bool add) {
    long j = 0;
    for (; j + VECTORS * WIDTH <= N; j += VECTORS * WIDTH)
        product_columns<VECTORS>(a, a_row, a_column, b + j, b_row, c + j, c_row, M, K, scale, add);
    for (; j < N; j += WIDTH) product_columns<1>(a, a_row, a_column, b + j, b_row, c + j, c_row, M, K, scale, add);
}

// ---- attention

long whole(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }  // whole registers
long padded(long n) { return (whole(n) / WIDTH | 1) * WIDTH; }  // an odd number of registers: rows do not share cache sets

void copy_rows(const float* in, long in_row, long rows, long columns, float* out, long out_row) {
    for (long i = 0; i < rows; ++i) std::memcpy(out + i * out_row, in + i * in_row, columns * sizeof(float));
}

void copy_padded(const float* in, long in_row, long rows, long columns, float* out, long out_row) {
    for (long i = 0; i < rows; ++i) std::fill(out + i * out_row + columns, out + (i + 1) * out_row, 0.0f);
    copy_rows(in, in_row, rows, columns, out, out_row);
}

void transpose_padded(const float* in, long in_row, long rows, long columns, float* out, long out_row) {
    for (long j = 0; j < columns; ++j) std::fill(out + j * out_row + rows, out + (j + 1) * out_row, 0.0f);
    for (long first = 0; first < rows; first += 16)
        for (long j = 0; j < columns; ++j)
            for (long i = first; i < std::min(first + 16, rows); ++i) out[j * out_row + i] = in[i * in_row + j];
}

constexpr long QUERIES = 48;  // queries at a time: their scores stay in the second-level cache

struct Head {
    long number, start, tokens;  // of which sample: its first token, and how many it has
    long line, origin;           // floats of a row of scores; where the head begins in a tensor [T, A * D]
};

// Calls body(head, memory) for each head of each sample, on all threads; body takes memory(size) floats, aligned, its own.
template <typename Body>
void for_each_head(const int32_t* starts, long N, long A, long D, Body body) {
#pragma omp parallel
    {
        std::vector<float> scratch;
        auto memory = [&scratch](long size) {
            scratch.resize(std::max(scratch.size(), size_t(size + 16)));
            return (float*)((uintptr_t(scratch.data()) + 63) / 64 * 64);
        };
#pragma omp for schedule(dynamic)
        for (long task = 0; task < N * A; ++task) {
            const long number = task % A, start = starts[task / A], n = starts[task / A + 1] - start;
            body(Head{number, start, n, padded(n), start * A * D + number * D}, memory);
        }
    }
}

}  // namespace

extern "C" {

// query, key, value, context [T, A * D]; sample n has the tokens from starts[n] up to starts[n + 1]; normalizers [T, A]: log of the
// sum of exp(scores), for the backward pass.
void attention_forward(const float* query, const float* key, const float* value, const int32_t* starts, float* context, float* normalizers,
                       long N, long A, long D, double p, uint64_t seed) {
    const long H = A * D, size = whole(D);
    const float scale = 1.0f / std::sqrt(float(D));
    const Dropout dropout(p, seed);
    for_each_head(starts, N, A, D, [=](const Head& head, auto& memory) {
        const long n = head.tokens, line = head.line, origin = head.origin;
        float* keys = memory(D * line + n * size + QUERIES * line + QUERIES * size);
        float *values = keys + D * line, *scores = values + n * size, *out = scores + QUERIES * line;
        transpose_padded(key + origin, H, n, D, keys, line);
        copy_padded(value + origin, H, n, D, values, size);
        for (long first = 0; first < n; first += QUERIES) {
            const long rows = std::min(QUERIES, n - first), at = origin + first * H;
            product(query + at, H, 1, keys, line, scores, line, rows, whole(n), D, scale, false);
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
            }
            product(scores, line, 1, values, size, out, size, rows, size, n, 1.0f, false);
            copy_rows(out, size, rows, D, context + at, H);
        }
    });
}

// The gradients of query, key and value [T, A * D], from that of the context and what attention_forward took and gave.
void attention_backward(const float* gradient, const float* query, const float* key, const float* value, const int32_t* starts,
                        const float* context, const float* normalizers, float* query_gradient, float* key_gradient, float* value_gradient,
                        long N, long A, long D, double p, uint64_t seed) {
    const long H = A * D, size = whole(D);
    const float scale = 1.0f / std::sqrt(float(D));
    const Dropout dropout(p, seed);
    for_each_head(starts, N, A, D, [=](const Head& head, auto& memory) {
        const long n = head.tokens, line = head.line, origin = head.origin;
        float* next = memory(2 * D * line + 3 * n * size + 2 * QUERIES * line + 3 * QUERIES * size);
        auto part = [&next](long floats) { return (next += floats) - floats; };
        float *keys_transposed = part(D * line), *values_transposed = part(D * line), *keys = part(n * size);
        float *key_sums = part(n * size), *value_sums = part(n * size), *weights = part(QUERIES * line);
        float *weight_gradients = part(QUERIES * line), *queries = part(QUERIES * size), *outputs = part(QUERIES * size);
        float* out = part(QUERIES * size);
        transpose_padded(key + origin, H, n, D, keys_transposed, line);
        transpose_padded(value + origin, H, n, D, values_transposed, line);
        copy_padded(key + origin, H, n, D, keys, size);
        for (long first = 0; first < n; first += QUERIES) {
            const long rows = std::min(QUERIES, n - first), at = origin + first * H;
            copy_padded(query + at, H, rows, D, queries, size);
            copy_padded(gradient + at, H, rows, D, outputs, size);
            product(queries, size, 1, keys_transposed, line, weights, line, rows, whole(n), D, scale, false);
            product(outputs, size, 1, values_transposed, line, weight_gradients, line, rows, whole(n), D, 1.0f, false);
            for (long i = 0; i < rows; ++i) {
                const long place = (head.start + first + i) * A + head.number;
                const DropoutRow keep = dropout.row(place);
                float *weight = weights + i * line, *weight_gradient = weight_gradients + i * line;
                const float normalizer = normalizers[place];
                // The sum over keys of weight * its gradient is, for a row, context * its gradient.
                float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
                for (long j = 0; j < D; ++j) mean += outputs[i * size + j] * context[at + i * H + j];
#pragma omp simd
                for (long j = 0; j < n; ++j) {
                    const float share = exponential(weight[j] - normalizer), scaled = keep(j);
                    weight[j] = share * scaled;
                    weight_gradient[j] = share * (weight_gradient[j] * scaled - mean);
                }
            }
            product(weights, 1, line, outputs, size, value_sums, size, n, size, rows, 1.0f, first > 0);
            product(weight_gradients, 1, line, queries, size, key_sums, size, n, size, rows, scale, first > 0);
            product(weight_gradients, line, 1, keys, size, out, size, rows, size, n, scale, false);
            copy_rows(out, size, rows, D, query_gradient + at, H);
        }
        copy_rows(key_sums, size, n, D, key_gradient + origin, H);
        copy_rows(value_sums, size, n, D, value_gradient + origin, H);
    });
}

// ---- dropout, residual, LayerNorm

// y = LayerNorm(dropout(x) + residual); x [T, H] becomes the sum that is normalised, statistics [T, 2] its mean and 1 / deviation.
void dropout_add_norm_forward(float* x, const float* residual, const float* weight, const float* bias, float* y, float* statistics, long T,
                              long H, double eps, double p, uint64_t seed) {
    const Dropout dropout(p, seed);
#pragma omp parallel for schedule(static)
    for (long t = 0; t < T; ++t) {
        float *in = x + t * H, *out = y + t * H;
        const float* other = residual + t * H;
        const DropoutRow keep = dropout.row(t);
        float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long h = 0; h < H; ++h) sum += in[h] = in[h] * keep(h) + other[h];
        const float mean = sum / float(H);
#pragma omp simd reduction(+ : squares)
        for (long h = 0; h < H; ++h) squares += (in[h] - mean) * (in[h] - mean);
        const float inverse = 1.0f / std::sqrt(squares / float(H) + float(eps));
        statistics[2 * t] = mean;
        statistics[2 * t + 1] = inverse;
#pragma omp simd
        for (long h = 0; h < H; ++h) out[h] = (in[h] - mean) * inverse * weight[h] + bias[h];
    }
}

// From the gradient of y: those of x before dropout and of the residual [T, H]; added to what is there: those of weight and bias [H], and
// to x_sums [H] the sum of x's over the tokens (the gradient of the bias of the linear layer that x comes from).
void dropout_add_norm_backward(const float* gradient, const float* sum, const float* statistics, const float* weight, float* x_gradient,
                               float* residual_gradient, float* weight_gradient, float* bias_gradient, float* x_sums, long T, long H,
                               double p, uint64_t seed) {
    const Dropout dropout(p, seed);
    const int threads = omp_get_max_threads();
    std::vector<float> partial(size_t(threads) * 3 * H, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        float *weight_sum = partial.data() + size_t(omp_get_thread_num()) * 3 * H, *bias_sum = weight_sum + H, *x_sum = bias_sum + H;
#pragma omp for schedule(static)
        for (long t = 0; t < T; ++t) {
            const float *from = gradient + t * H, *in = sum + t * H;
            float *to = residual_gradient + t * H, *dropped = x_gradient + t * H;
            const DropoutRow keep = dropout.row(t);
            const float mean = statistics[2 * t], inverse = statistics[2 * t + 1];
            float plain = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : plain, along)
            for (long h = 0; h < H; ++h) {
                const float normal = (in[h] - mean) * inverse, weighted = from[h] * weight[h];
                plain += weighted;
                along += weighted * normal;
                weight_sum[h] += from[h] * normal;
                bias_sum[h] += from[h];
            }
            plain /= float(H);
            along /= float(H);
#pragma omp simd
            for (long h = 0; h < H; ++h) {
                to[h] = (from[h] * weight[h] - plain - (in[h] - mean) * inverse * along) * inverse;
                dropped[h] = to[h] * keep(h);
                x_sum[h] += dropped[h];
            }
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long h = 0; h < H; ++h) {
            const float* sums = partial.data() + size_t(thread) * 3 * H + h;
            weight_gradient[h] += sums[0];
            bias_gradient[h] += sums[H];
            x_sums[h] += sums[2 * H];
        }
}

// ---- GELU

void gelu_forward(const float* x, float* y, long size) {
#pragma omp parallel for simd schedule(static)
    for (long i = 0; i < size; ++i) y[i] = 0.5f * x[i] * (1.0f + error_function(x[i] * 0.70710678f));
}

// From the gradient of y [T, H] that of x; its sum over the tokens is added to `sums` [H].
void gelu_backward(const float* gradient, const float* x, float* x_gradient, float* sums, long T, long H) {
    const int threads = omp_get_max_threads();
    std::vector<float> partial(size_t(threads) * H, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        float* sum = partial.data() + size_t(omp_get_thread_num()) * H;
#pragma omp for schedule(static)
        for (long t = 0; t < T; ++t) {
#pragma omp simd
            for (long h = 0; h < H; ++h) {
                const float in = x[t * H + h], below = 0.5f * (1.0f + error_function(in * 0.70710678f));
                sum[h] += x_gradient[t * H + h] = gradient[t * H + h] * (below + in * 0.39894228f * exponential(-0.5f * in * in));
            }
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long h = 0; h < H; ++h) sums[h] += partial[size_t(thread) * H + h];
}

// ---- dropout alone: also its own backward pass

void dropout_apply(const float* x, float* y, long T, long H, double p, uint64_t seed) {
    const Dropout dropout(p, seed);
#pragma omp parallel for schedule(static)
    for (long t = 0; t < T; ++t) {
        const DropoutRow keep = dropout.row(t);
#pragma omp simd
        for (long h = 0; h < H; ++h) y[t * H + h] = x[t * H + h] * keep(h);
    }
}

// ---- cross-entropy

// logits [T, V] become their gradients weights[t] * (softmax - one_hot(label)); losses[t] and correct[t] are the unweighted
// cross-entropy and whether the label has the highest logit.
void cross_entropy(float* logits, const int64_t* labels, const float* weights, float* losses, float* correct, long T, long V) {
#pragma omp parallel for schedule(dynamic)
    for (long t = 0; t < T; ++t) {
        float *row = logits + t * V, highest = row[0], sum = 0.0f;
        const float at_label = row[labels[t]];
#pragma omp simd reduction(max : highest)
        for (long v = 0; v < V; ++v) highest = std::max(highest, row[v]);
#pragma omp simd reduction(+ : sum)
        for (long v = 0; v < V; ++v) sum += row[v] = exponential(row[v] - highest);
        losses[t] = highest + std::log(sum) - at_label;
        correct[t] = at_label == highest;
        const float factor = weights[t] / sum;
#pragma omp simd
        for (long v = 0; v < V; ++v) row[v] *= factor;
        row[labels[t]] -= weights[t];
    }
}

}  // extern "C"
