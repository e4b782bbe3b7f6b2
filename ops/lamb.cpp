// LAMB over all parameters at once (ops/lamb.py says the equations).
//
// Parameters are cut into chunks of a fixed size. Norms are summed per chunk in a fixed order and over chunks in their order, so
// results do not depend on the number of threads.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

extern "C" struct Parameter {  // as ops/lamb.py declares it
    float* weight;
    const float* gradient;
    float* exp_avg;
    float* exp_avg_sq;
    uint16_t* compute_weight;  // bfloat16, or null
    int64_t size;
    double learning_rate, beta1, beta2, eps, weight_decay;
    int64_t trust_ratio;
};

// What is called in several places is not inlined by itself: an update took 8 % longer.
#define INLINED __attribute__((always_inline)) inline

namespace {

// Elements. What a chunk needs of four tensors fits in a second-level cache, what a block needs in a first-level cache.
constexpr int64_t CHUNK = 16384, BLOCK = 512, LANES = 16;
// The second pass follows the first after this many elements, or one parameter: what it reads again may still be in a cache.
constexpr int64_t WINDOW_OF_A_THREAD = 256 * 1024;

struct Chunk {
    const Parameter* parameter;
    int64_t first, size, before;  // `before`: elements of all chunks before it
    double weight_square = 0, update_square = 0;
    bool finite = true;
};

bool all_finite(const Chunk& chunk) {
    const float* gradient = chunk.parameter->gradient + chunk.first;
    uint32_t largest = 0;
    for (int64_t i = 0; i < chunk.size; i++) {
        uint32_t bits;
        std::memcpy(&bits, gradient + i, sizeof bits);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    return largest < 0x7f800000;  // the exponent of infinity and NaN
}

INLINED void update_moments(const Parameter& p, int64_t first, int64_t size) {
    const float* __restrict gradient = p.gradient + first;
    float* __restrict exp_avg = p.exp_avg + first;
    float* __restrict exp_avg_sq = p.exp_avg_sq + first;
    const float beta1 = p.beta1, beta2 = p.beta2, rest1 = 1 - p.beta1, rest2 = 1 - p.beta2;
    for (int64_t i = 0; i < size; i++) {
        const float g = gradient[i];
        exp_avg[i] = beta1 * exp_avg[i] + rest1 * g;
        exp_avg_sq[i] = beta2 * exp_avg_sq[i] + (rest2 * g) * g;
    }
}

INLINED void compute_update(const Parameter& p, int64_t first, int64_t size, float* __restrict update) {
    const float* __restrict weight = p.weight + first;
    const float* __restrict exp_avg = p.exp_avg + first;
    const float* __restrict exp_avg_sq = p.exp_avg_sq + first;
    const float eps = p.eps, weight_decay = p.weight_decay;
    for (int64_t i = 0; i < size; i++)
        update[i] = exp_avg[i] / (std::sqrt(exp_avg_sq[i]) + eps) + weight_decay * weight[i];
}

// In double: the square of a float always fits. Lanes fix the order of the sum, whatever the compiler vectorises.
INLINED double sum_of_squares(const float* values, int64_t size) {
    double lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int64_t lane = 0; lane < LANES; lane++)
            lanes[lane] += double(values[i + lane]) * double(values[i + lane]);
    for (int64_t lane = 0; i < size; i++, lane++)
        lanes[lane] += double(values[i]) * double(values[i]);
    double sum = 0;
    for (double lane : lanes)
        sum += lane;
    return sum;
}

uint16_t to_bfloat16(float value) {  // to nearest, ties to even, as PyTorch rounds
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void apply(const Parameter& p, int64_t first, int64_t size, const float* __restrict update, float step) {
    float* __restrict weight = p.weight + first;
    for (int64_t i = 0; i < size; i++)
        weight[i] -= step * update[i];
    if (p.compute_weight) {
        uint16_t* __restrict rounded = p.compute_weight + first;
        for (int64_t i = 0; i < size; i++)
            rounded[i] = to_bfloat16(weight[i]);
    }
}

// Moments, and the squares of the norms.
INLINED void first_pass(Chunk& chunk) {
    const Parameter& p = *chunk.parameter;
    alignas(64) float update[BLOCK];
    for (int64_t begin = 0; begin < chunk.size; begin += BLOCK) {
        const int64_t first = chunk.first + begin, size = std::min(BLOCK, chunk.size - begin);
        update_moments(p, first, size);
        compute_update(p, first, size, update);
        chunk.weight_square += sum_of_squares(p.weight + first, size);
        chunk.update_square += sum_of_squares(update, size);
    }
}

// The same squares; the new moments are not kept.
INLINED void sum_squares(Chunk& chunk) {
    const Parameter& p = *chunk.parameter;
    alignas(64) float update[BLOCK], exp_avg[BLOCK], exp_avg_sq[BLOCK];
    Parameter block = p;
    block.exp_avg = exp_avg, block.exp_avg_sq = exp_avg_sq;
    for (int64_t begin = 0; begin < chunk.size; begin += BLOCK) {
        const int64_t first = chunk.first + begin, size = std::min(BLOCK, chunk.size - begin);
        block.weight = p.weight + first, block.gradient = p.gradient + first;
        std::copy_n(p.exp_avg + first, size, exp_avg);
        std::copy_n(p.exp_avg_sq + first, size, exp_avg_sq);
        update_moments(block, 0, size);
        compute_update(block, 0, size, update);
        chunk.weight_square += sum_of_squares(block.weight, size);
        chunk.update_square += sum_of_squares(update, size);
    }
}

// Moments and weights, once the step is known.
INLINED void write(const Chunk& chunk, float step) {
    const Parameter& p = *chunk.parameter;
    alignas(64) float update[BLOCK];
    for (int64_t begin = 0; begin < chunk.size; begin += BLOCK) {
        const int64_t first = chunk.first + begin, size = std::min(BLOCK, chunk.size - begin);
        update_moments(p, first, size);
        compute_update(p, first, size, update);
        apply(p, first, size, update, step);
    }
}

INLINED void second_pass(const Chunk& chunk, float step) {
    const Parameter& p = *chunk.parameter;
    alignas(64) float update[BLOCK];
    for (int64_t begin = 0; begin < chunk.size; begin += BLOCK) {
        const int64_t first = chunk.first + begin, size = std::min(BLOCK, chunk.size - begin);
        compute_update(p, first, size, update);
        apply(p, first, size, update, step);
    }
}

// Where the share of `thread` in chunks [begin, end) begins; shares are even in elements. Both passes cut in the same places: what
// another core has written is far away where cores do not share a cache.
int64_t share(const std::vector<Chunk>& chunks, int64_t begin, int64_t end, int64_t thread, int64_t threads) {
    const int64_t first = chunks[begin].before, size = chunks[end].before - first;
    return std::partition_point(chunks.begin() + begin, chunks.begin() + end, [=](const Chunk& chunk) {
        return (chunk.before - first) * threads < size * thread;
    }) - chunks.begin();
}

// learning rate * trust ratio.
float step_of(const Parameter& p, double weight_square, double update_square) {
    const double ratio = weight_square > 0 && update_square > 0 ? std::sqrt(weight_square / update_square) : 1;
    return std::min<double>(p.learning_rate * ratio, FLT_MAX);  // infinity times an update of 0 would be NaN
}

// That of the parameter that chunk `i` belongs to.
float step_of(const std::vector<Chunk>& chunks, int64_t i) {
    const Parameter* parameter = chunks[i].parameter;
    double weight_square = 0, update_square = 0;
    for (i -= chunks[i].first / CHUNK; chunks[i].parameter == parameter; i++) {
        weight_square += chunks[i].weight_square;
        update_square += chunks[i].update_square;
    }
    return step_of(*parameter, weight_square, update_square);
}

// All chunks, and one after them.
std::vector<Chunk> chunks_of(const Parameter* parameters, int64_t count) {
    std::vector<Chunk> chunks;
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t first = 0; first < parameters[i].size; first += CHUNK) {
            const int64_t size = std::min(CHUNK, parameters[i].size - first);
            chunks.push_back({parameters + i, first, size, elements});
            elements += size;
        }
    chunks.push_back({nullptr, 0, 0, elements});
    return chunks;
}

template <class Work> void for_each(std::vector<Chunk>& chunks, int threads, Work work) {
    const int64_t total = chunks.size() - 1;
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        for (int64_t i = share(chunks, 0, total, thread, team), last = share(chunks, 0, total, thread + 1, team); i < last; i++)
            work(chunks[i]);
    }
}

}  // namespace

// Parameters of which other processes have other parts take two calls. The sums of the first, over all processes, decide in the
// second. So the first writes nothing: one sum tells both the norms and whether to skip, and as many bytes move as where a sum of
// its own tells first that the moments may be written.

// Of each of the `count` parts the squares of the weight's norm, then of the update's (of those that have a trust ratio); last, how
// many chunks have a gradient that is not finite. `sums` has 2 * count + 1 values.
extern "C" void lamb_sums(const Parameter* parameters, int64_t count, int threads, double* sums) {
    std::vector<Chunk> chunks = chunks_of(parameters, count);
    for_each(chunks, threads, [](Chunk& chunk) {
        chunk.finite = all_finite(chunk);
        if (chunk.parameter->trust_ratio)
            sum_squares(chunk);
    });
    chunks.pop_back();
    std::fill_n(sums, 2 * count + 1, 0.0);
    for (const Chunk& chunk : chunks) {
        double* own = sums + (chunk.parameter - parameters);
        own[0] += chunk.weight_square;
        own[count] += chunk.update_square;
        sums[2 * count] += !chunk.finite;
    }
}

// The update, with the `sums` of all processes.
extern "C" void lamb_write(const Parameter* parameters, int64_t count, int threads, const double* sums) {
    std::vector<Chunk> chunks = chunks_of(parameters, count);
    for_each(chunks, threads, [=](Chunk& chunk) {
        const double* own = sums + (chunk.parameter - parameters);
        write(chunk, step_of(*chunk.parameter, own[0], own[count]));
    });
}

// Updates all `count` parameters on `threads` threads. Returns 1, with nothing changed, where a gradient is not finite; else 0.
extern "C" int lamb(const Parameter* parameters, int64_t count, int threads) {
    std::vector<Chunk> chunks = chunks_of(parameters, count);
    const int64_t total = chunks.size() - 1;
    std::vector<int64_t> windows;  // where each ends
    for (int64_t i = 1, begin = 0; i <= total; i++)
        if (i == total || (chunks[i].first == 0 && chunks[i].before - chunks[begin].before >= threads * WINDOW_OF_A_THREAD))
            windows.push_back(begin = i);
    bool finite = true;
#pragma omp parallel num_threads(threads) shared(chunks, windows, finite)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        // Reading the gradients once more, 4 bytes a parameter, is what a first pass that writes nothing, so that the second could
        // be left out, costs as well (it reads 32 bytes and writes 12): but then nothing is ever found in a cache. Measured: 95 ms
        // against 105 for BERT-base where cores share a cache and its way to memory, the same where they do not.
        bool own = true;
        for (int64_t i = share(chunks, 0, total, thread, team), last = share(chunks, 0, total, thread + 1, team); i < last; i++)
            own = own && all_finite(chunks[i]);
        if (!own)
#pragma omp atomic write
            finite = false;
#pragma omp barrier
        int64_t begin = 0;
        for (size_t window = 0; finite && window < windows.size(); begin = windows[window++]) {
            const int64_t first = share(chunks, begin, windows[window], thread, team);
            const int64_t last = share(chunks, begin, windows[window], thread + 1, team);
            for (int64_t i = first; i < last; i++)
                if (chunks[i].parameter->trust_ratio)
                    first_pass(chunks[i]);
                else  // at once
                    write(chunks[i], chunks[i].parameter->learning_rate);
#pragma omp barrier
            float step = 0;
            for (int64_t i = first; i < last; i++) {
                if (!chunks[i].parameter->trust_ratio)
                    continue;
                if (i == first || chunks[i].first == 0)
                    step = step_of(chunks, i);
                second_pass(chunks[i], step);
            }
        }
    }
    return !finite;
}
