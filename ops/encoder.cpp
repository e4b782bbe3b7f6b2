// The encoder's operations on the CPU that are no matrix product, each in as few passes over memory as there can be.
//
// T tokens, H hidden, V vocabulary. All matrices are row-major and contiguous. Work is divided such that no two threads write to one
// place, and every sum has one order: the results depend on the number of threads only in sums over tokens.

#include <omp.h>

#include <vector>

#include "kernels.h"

namespace {

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

}  // namespace

extern "C" {

// ---- dropout, residual, LayerNorm

// y = LayerNorm(dropout(x) + residual); x [T, H] becomes the sum that is normalised, statistics [T, 2] its mean and 1 / deviation.
void dropout_add_norm_forward(Real* x, const Real* residual, const Real* weight, const Real* bias, Real* y, float* statistics, long T,
                              long H, double eps, double p, uint64_t seed) {
    const Dropout dropout(p, seed);
#pragma omp parallel for schedule(static)
    for (long t = 0; t < T; ++t) {
        Real *in = x + t * H, *out = y + t * H;
        const Real* other = residual + t * H;
        const DropoutRow keep = dropout.row(t);
        float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long h = 0; h < H; ++h) {
            in[h] = float(in[h]) * keep(h) + float(other[h]);
            sum += float(in[h]);
        }
        const float mean = sum / float(H);
#pragma omp simd reduction(+ : squares)
        for (long h = 0; h < H; ++h) squares += (float(in[h]) - mean) * (float(in[h]) - mean);
        const float inverse = 1.0f / std::sqrt(squares / float(H) + float(eps));
        statistics[2 * t] = mean;
        statistics[2 * t + 1] = inverse;
#pragma omp simd
        for (long h = 0; h < H; ++h) out[h] = (float(in[h]) - mean) * inverse * float(weight[h]) + float(bias[h]);
    }
}

// From the gradient of y: those of x before dropout and of the residual [T, H]; added to what is there: those of weight and bias [H], and
// to x_sums [H] the sum of x's over the tokens (the gradient of the bias of the linear layer that x comes from).
void dropout_add_norm_backward(const Real* gradient, const Real* sum, const float* statistics, const Real* weight, Real* x_gradient,
                               Real* residual_gradient, float* weight_gradient, float* bias_gradient, float* x_sums, long T, long H,
                               double p, uint64_t seed) {
    const Dropout dropout(p, seed);
    const int threads = omp_get_max_threads();
    std::vector<float> partial(size_t(threads) * 3 * H, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        float *weight_sum = partial.data() + size_t(omp_get_thread_num()) * 3 * H, *bias_sum = weight_sum + H, *x_sum = bias_sum + H;
#pragma omp for schedule(static)
        for (long t = 0; t < T; ++t) {
            const Real *from = gradient + t * H, *in = sum + t * H;
            Real *to = residual_gradient + t * H, *dropped = x_gradient + t * H;
            const DropoutRow keep = dropout.row(t);
            const float mean = statistics[2 * t], inverse = statistics[2 * t + 1];
            float plain = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : plain, along)
            for (long h = 0; h < H; ++h) {
                const float given = from[h], normal = (float(in[h]) - mean) * inverse, weighted = given * float(weight[h]);
                plain += weighted;
                along += weighted * normal;
                weight_sum[h] += given * normal;
                bias_sum[h] += given;
            }
            plain /= float(H);
            along /= float(H);
#pragma omp simd
            for (long h = 0; h < H; ++h) {
                const float normal = (float(in[h]) - mean) * inverse;
                const float whole = (float(from[h]) * float(weight[h]) - plain - normal * along) * inverse, part = whole * keep(h);
                to[h] = whole;
                dropped[h] = part;
                x_sum[h] += part;
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

void gelu_forward(const Real* x, Real* y, long size) {
#pragma omp parallel for simd schedule(static)
    for (long i = 0; i < size; ++i) y[i] = 0.5f * float(x[i]) * (1.0f + error_function(float(x[i]) * 0.70710678f));
}

// From the gradient of y [T, H] that of x; its sum over the tokens is added to `sums` [H].
void gelu_backward(const Real* gradient, const Real* x, Real* x_gradient, float* sums, long T, long H) {
    const int threads = omp_get_max_threads();
    std::vector<float> partial(size_t(threads) * H, 0.0f);
#pragma omp parallel num_threads(threads)
    {
        float* sum = partial.data() + size_t(omp_get_thread_num()) * H;
#pragma omp for schedule(static)
        for (long t = 0; t < T; ++t) {
            const Real *from = gradient + t * H, *before = x + t * H;
            Real* to = x_gradient + t * H;
#pragma omp simd
            for (long h = 0; h < H; ++h) {
                const float in = before[h], below = 0.5f * (1.0f + error_function(in * 0.70710678f));
                const float value = float(from[h]) * (below + in * 0.39894228f * exponential(-0.5f * in * in));
                to[h] = value;
                sum[h] += value;
            }
        }
    }
    for (int thread = 0; thread < threads; ++thread)
        for (long h = 0; h < H; ++h) sums[h] += partial[size_t(thread) * H + h];
}

// sums [H] += the sum of x [T, H] over the tokens.
void add_token_sums(const Real* x, float* sums, long T, long H) {
#pragma omp parallel for schedule(static)
    for (long first = 0; first < H; first += 64) {
        const long columns = std::min(64L, H - first);
        float own[64] = {};
        for (long t = 0; t < T; ++t) {
            const Real* row = x + t * H + first;
#pragma omp simd
            for (long h = 0; h < columns; ++h) own[h] += float(row[h]);
        }
        for (long h = 0; h < columns; ++h) sums[first + h] += own[h];
    }
}

// ---- dropout alone: also its own backward pass

void dropout_apply(const Real* x, Real* y, long T, long H, double p, uint64_t seed) {
    const Dropout dropout(p, seed);
#pragma omp parallel for schedule(static)
    for (long t = 0; t < T; ++t) {
        const DropoutRow keep = dropout.row(t);
#pragma omp simd
        for (long h = 0; h < H; ++h) y[t * H + h] = float(x[t * H + h]) * keep(h);
    }
}

// ---- cross-entropy

// logits [T, V] become their gradients weights[t] * (softmax - one_hot(label)); losses[t] and correct[t] are the unweighted
// cross-entropy and whether the label is the first that has the highest logit.
void cross_entropy(Real* logits, const int64_t* labels, const float* weights, float* losses, float* correct, long T, long V) {
#pragma omp parallel for schedule(dynamic)
    for (long t = 0; t < T; ++t) {
        Real* row = logits + t * V;
        const float at_label = row[labels[t]], weight = weights[t];
        float highest = row[0], sum = 0.0f;
#pragma omp simd reduction(max : highest)
        for (long v = 0; v < V; ++v) highest = std::max(highest, float(row[v]));
#pragma omp simd reduction(+ : sum)
        for (long v = 0; v < V; ++v) sum += exponential(float(row[v]) - highest);
        losses[t] = highest + std::log(sum) - at_label;
        correct[t] = at_label == highest && std::find(row, row + labels[t], row[labels[t]]) == row + labels[t];
        const float factor = weight / sum;
        const float label_gradient = factor * exponential(at_label - highest) - weight;
#pragma omp simd
        for (long v = 0; v < V; ++v) row[v] = factor * exponential(float(row[v]) - highest);
        row[labels[t]] = label_gradient;
    }
}

}  // extern "C"
