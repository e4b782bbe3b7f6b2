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

namespace {

// Elements. What a chunk needs of four tensors fits in a second-level cache, what a block needs in a first-level cache.
constexpr int64_t CHUNK = 16384, BLOCK = 512, LANES = 16;
// The second pass follows the first after this many elements, or one parameter: what it reads again may still be in a cache.
constexpr int64_t WINDOW_OF_A_THREAD = 256 * 1024;

struct Chunk {
    const Parameter* parameter;
    int64_t first, size, before;  // `before`: elements of all chunks before it
    double weight_square = 0, update_square = 0;
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

void update_moments(const Parameter& p, int64_t first, int64_t size) {
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

void compute_update(const Parameter& p, int64_t first, int64_t size, float* __restrict update) {
    const float* __restrict weight = p.weight + first;
    const float* __restrict exp_avg = p.exp_avg + first;
    const float* __restrict exp_avg_sq = p.exp_avg_sq + first;
    const float eps = p.eps, weight_decay = p.weight_decay;
    for (int64_t i = 0; i < size; i++)
        update[i] = exp_avg[i] / (std::sqrt(exp_avg_sq[i]) + eps) + weight_decay * weight[i];
}

// In double: the square of a float always fits. Lanes fix the order of the sum, whatever the compiler vectorises.
double sum_of_squares(const float* values, int64_t size) {
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

// Moments; then the squares of the norms, or at once the weights where there is no trust ratio.
void first_pass(Chunk& chunk) {
    const Parameter& p = *chunk.parameter;
    alignas(64) float update[BLOCK];
    for (int64_t begin = 0; begin < chunk.size; begin += BLOCK) {
        const int64_t first = chunk.first + begin, size = std::min(BLOCK, chunk.size - begin);
        update_moments(p, first, size);
        compute_update(p, first, size, update);
        if (p.trust_ratio) {
            chunk.weight_square += sum_of_squares(p.weight + first, size);
            chunk.update_square += sum_of_squares(update, size);
        } else {
            apply(p, first, size, update, p.learning_rate);
        }
    }
}

void second_pass(const Chunk& chunk, float step) {
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

// learning rate * trust ratio of the parameter that chunk `i` belongs to.
float step_of(const std::vector<Chunk>& chunks, int64_t i) {
    const Parameter* parameter = chunks[i].parameter;
    double weight_square = 0, update_square = 0;
    for (i -= chunks[i].first / CHUNK; chunks[i].parameter == parameter; i++) {
        weight_square += chunks[i].weight_square;
        update_square += chunks[i].update_square;
    }
    const double ratio = weight_square > 0 && update_square > 0 ? std::sqrt(weight_square / update_square) : 1;
    return std::min<double>(parameter->learning_rate * ratio, FLT_MAX);  // infinity times an update of 0 would be NaN
}

}  // namespace

// Updates all `count` parameters on `threads` threads. Returns 1, with nothing changed, where a gradient is not finite; else 0.
extern "C" int lamb(const Parameter* parameters, int64_t count, int threads) {
    std::vector<Chunk> chunks;
    int64_t elements = 0;
    for (int64_t i = 0; i < count; i++)
        for (int64_t first = 0; first < parameters[i].size; first += CHUNK) {
            const int64_t size = std::min(CHUNK, parameters[i].size - first);
            chunks.push_back({parameters + i, first, size, elements});
            elements += size;
        }
    const int64_t total = chunks.size();
    chunks.push_back({nullptr, 0, 0, elements});
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
                first_pass(chunks[i]);
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
