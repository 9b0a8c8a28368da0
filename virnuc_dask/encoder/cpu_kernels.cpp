// Work that torch does slowly on a CPU: attention within short concatenated sequences, and the
// steps between two matrix products, each in one pass over memory. Called from
// cpu_kernels.py.
//
// Compiled for one kind of processor at a time (see hatch_build.py), with vectors of W floats. The
// operations for a token have the same order whatever its neighbours, so a sequence gives the same
// bits alone and in a batch. NaN and infinity spread over their row, because rows that are not
// finite must be detected.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace {

typedef float vec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bfloat16 {
    uint16_t bits;
};

INLINE vec splat(float x) { return x - vec{}; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE vec load(const bfloat16 *p) {
    return (vec)(__builtin_convertvector(*(const hvec *)p, ivec) << 16);
}
INLINE void store(float *p, vec x) { *(vec *)p = x; }

// b if either is NaN.
INLINE vec larger(vec a, vec b) { return a > b ? a : b; }

// Rotates the lanes by n. The next two functions fold a vector onto itself with it, which gives the
// result in every lane.
INLINE vec moved(vec x, int n) {
#if W == 16
    const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif W == 8
    const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7};
#else
    const ivec lanes = {0, 1, 2, 3};
#endif
#ifdef __clang__
    vec y;
    UNROLL for (int i = 0; i < W; i++) y[i] = x[(lanes[i] + n) & (W - 1)];
    return y;
#else
    return __builtin_shuffle(x, (lanes + n) & (W - 1));
#endif
}
INLINE float sum(vec x) {
    UNROLL for (int n = W / 2; n; n /= 2) x += moved(x, n);
    return x[0];
}
INLINE float largest(vec x) {
    UNROLL for (int n = W / 2; n; n /= 2) x = larger(x, moved(x, n));
    return x[0];
}

// exp of x <= 0 with a relative error of 1e-7, as in Cephes' expf. Below -87 it is 1.6e-38.
INLINE vec exponential(vec x) {
    x = larger(splat(-87.0f), x);
    vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer is in the last bits
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vec)(((ivec)shifted + 127) << 23);
}

// --- attention ---

// Product of R rows of a and C vectors of columns of b. The sums stay in registers.
template <int R, int C>
INLINE void tile(const float *a, int a_row, const float *b, int b_row, int n, float *c) {
    vec sums[R][C];
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < C; j++) sums[i][j] = vec{};
    for (int k = 0; k < n; k++) {
        vec columns[C];
        UNROLL for (int j = 0; j < C; j++) columns[j] = load(b + (size_t)k * b_row + j * W);
        UNROLL for (int i = 0; i < R; i++) {
            vec factor = splat(a[(size_t)i * a_row + k]);
            UNROLL for (int j = 0; j < C; j++) sums[i][j] += factor * columns[j];
        }
    }
    UNROLL for (int i = 0; i < R; i++)
        UNROLL for (int j = 0; j < C; j++) store(c + (size_t)i * b_row + j * W, sums[i][j]);
}

// c = a b for R rows. b and c have `columns` columns, a multiple of W.
template <int R>
INLINE void product(const float *a, int a_row, const float *b, int columns, int n, float *c) {
    int j = 0;
    for (; j + 2 * W <= columns; j += 2 * W) tile<R, 2>(a, a_row, b + j, columns, n, c + j);
    if (j < columns) tile<R, 1>(a, a_row, b + j, columns, n, c + j);
}

INLINE float number(float x) { return x; }
INLINE float number(bfloat16 x) {
    union {
        uint32_t bits;
        float value;
    } same = {(uint32_t)x.bits << 16};
    return same.value;
}

INLINE void put(float x, float *to) { *to = x; }
INLINE void put(float x, bfloat16 *to) {
    union {
        float value;
        uint32_t bits;
    } same = {x};
    uint32_t nearest = same.bits + 0x7fff + ((same.bits >> 16) & 1);  // ties go to even
    to->bits = (x == x ? nearest : (same.bits | 0x400000)) >> 16;     // a NaN stays a NaN
}

// Converts one head's features of one token to float32.
template <typename T>
INLINE void widen(const T *__restrict values, int d, float *__restrict to) {
    for (int f = 0; f < d; f++) to[f] = number(values[f]);
}

// Rotary embedding: feature f is paired with f + d / 2. `turn` has the cosines of the angles, then,
// d / 2 further, the sines.
INLINE void rotate(const float *__restrict plain, const float *__restrict turn, int d, float size,
                   float *__restrict to) {
    const int half = d / 2;
    for (int f = 0; f < half; f++) {
        to[f] = size * (plain[f] * turn[f] - plain[f + half] * turn[f + half]);
        to[f + half] = size * (plain[f] * turn[f + half] + plain[f + half] * turn[f]);
    }
}

// Replaces the scores by exp of the scores minus their maximum, and returns 1 / their sum. Scores
// from `length` on are padding.
INLINE float softmax(float *scores, int length, int padded) {
    for (int j = length; j < padded; j++) scores[j] = -INFINITY;
    vec top = load(scores), total = vec{};
    for (int j = W; j < padded; j += W) top = larger(top, load(scores + j));
    vec most = splat(largest(top));
    for (int j = 0; j < padded; j += W) {
        vec part = exponential(load(scores + j) - most);
        store(scores + j, part);
        total += part;
    }
    return 1 / sum(total);
}

template <typename T, int D>
int attend(const T *qkv, const float *turns, const int32_t *bounds, int begin, int end, int heads,
           int d_, T *out) {
    const int d = D ? D : d_;  // D is a constant for the compiler
    const int wide = (d + W - 1) / W * W, width = heads * d;
    int longest = 0;
    for (int s = begin; s < end; s++) {
        int length = bounds[s + 1] - bounds[s];
        if (length > longest) longest = length;
    }
    const size_t most = (longest + W - 1) / W * W;
    const size_t floats = most * (d + wide + ROWS) + ROWS * (d + wide) + 2 * d;
    float *scratch = (float *)calloc(floats, sizeof(float));
    if (!scratch) return 1;
    float *keys = scratch;               // features x tokens
    float *values = keys + most * d;     // tokens x features, padded with zeros
    float *scores = values + most * wide;
    float *queries = scores + most * ROWS;
    float *sums = queries + ROWS * d;
    float *plain = sums + ROWS * wide, *turned = plain + d;
    const float size = 1 / sqrtf(d);
    for (int s = begin; s < end; s++) {
        const int length = bounds[s + 1] - bounds[s], padded = (length + W - 1) / W * W;
        for (int h = 0; h < heads; h++) {
            const T *first = qkv + (size_t)bounds[s] * 3 * width + h * d;
            for (int j = 0; j < length; j++) {
                const T *token = first + (size_t)j * 3 * width;
                widen(token + width, d, plain);
                rotate(plain, turns + (size_t)j * d, d, 1, turned);
                for (int f = 0; f < d; f++) keys[(size_t)f * padded + j] = turned[f];
                widen(token + 2 * width, d, values + (size_t)j * wide);
            }
            for (int f = 0; f < d; f++)
                for (int j = length; j < padded; j++) keys[(size_t)f * padded + j] = 0;
            for (int block = 0; block < length; block += ROWS) {
                const int rows = length - block < ROWS ? length - block : ROWS;
                for (int i = 0; i < rows; i++) {
                    const int j = block + i;
                    widen(first + (size_t)j * 3 * width, d, plain);
                    rotate(plain, turns + (size_t)j * d, d, size, queries + i * d);
                }
                product<ROWS>(queries, d, keys, padded, d, scores);
                float shares[ROWS];
                for (int i = 0; i < rows; i++)
                    shares[i] = softmax(scores + (size_t)i * padded, length, padded);
                product<ROWS>(scores, padded, values, wide, length, sums);
                for (int i = 0; i < rows; i++) {
                    T *to = out + (size_t)(bounds[s] + block + i) * width + h * d;
                    for (int f = 0; f < d; f++) put(sums[i * wide + f] * shares[i], to + f);
                }
            }
        }
    }
    free(scratch);
    return 0;
}

template <typename T>
int attend_heads(const void *qkv, const float *turns, const int32_t *bounds, int begin, int end,
                 int heads, int d, void *out) {
#define ATTEND(D) attend<T, D>((const T *)qkv, turns, bounds, begin, end, heads, d, (T *)out)
    switch (d) {  // values of the published models, 8M to 15B
        case 16: return ATTEND(16);
        case 24: return ATTEND(24);
        case 32: return ATTEND(32);
        case 64: return ATTEND(64);
        case 128: return ATTEND(128);
    }
    return ATTEND(0);
}

// --- between two products ---

template <typename T>
INLINE void put_row(const float *__restrict row, int n, T *__restrict out) {
    for (int j = 0; j < n; j++) put(row[j], out + j);
}

template <typename T, typename U>
int add_norm(float *x, const T *product, const float *weight, const float *shift, float eps,
             int begin, int end, int n, U *out) {
    float *row = (float *)malloc(n * sizeof(float));
    if (!row) return 1;
    for (int t = begin; t < end; t++) {
        float *own = x + (size_t)t * n;
        vec total = vec{}, squares = vec{};
        for (int j = 0; j < n; j += W) {
            vec value = load(own + j);
            if (product) {
                value += load(product + (size_t)t * n + j);
                store(own + j, value);
            }
            total += value;
        }
        const vec mean = splat(sum(total) / n);
        for (int j = 0; j < n; j += W) {
            vec away = load(own + j) - mean;
            squares += away * away;
        }
        const vec size = splat(1 / sqrtf(sum(squares) / n + eps));
        for (int j = 0; j < n; j += W)
            store(row + j, (load(own + j) - mean) * size * load(weight + j) + load(shift + j));
        put_row(row, n, out + (size_t)t * n);
    }
    free(row);
    return 0;
}

}  // namespace

// Each function computes rows from begin to end: sequences in attend, tokens otherwise. It returns
// 0, or 1 if memory ran out. Kinds of numbers: 0 float32, 1 bfloat16. The number of features is a
// multiple of W.
extern "C" {

// SHA-256 of this file, from hatch_build.py. cpu_kernels.py refuses a library of another source.
extern const char virnuc_source[] = SOURCE;

// Softmax attention with rotary embedding. Sequence s has the tokens from bounds[s] to
// bounds[s + 1]. Input (tokens, 3, heads, d) and output (tokens, heads * d) are of the same kind.
// turns: (longest, 2, d / 2).
int virnuc_attend(int begin, int end, int kind, const void *qkv, const float *turns,
                  const int32_t *bounds, int heads, int d, void *out) {
    auto attend_all = kind ? attend_heads<bfloat16> : attend_heads<float>;
    return attend_all(qkv, turns, bounds, begin, end, heads, d, out);
}

// x += product, unless product is null; then the layer norm of x.
int virnuc_add_norm(int begin, int end, float *x, int kind, const void *product,
                    const float *weight, const float *shift, float eps, int n, int out_kind,
                    void *out) {
#define NORM(T, U) add_norm(x, (const T *)product, weight, shift, eps, begin, end, n, (U *)out)
    switch (2 * out_kind + kind) {
        case 0: return NORM(float, float);
        case 1: return NORM(bfloat16, float);
        case 2: return NORM(float, bfloat16);
        default: return NORM(bfloat16, bfloat16);
    }
}

}  // extern "C"
