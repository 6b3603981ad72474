/* Few tokens through one routed layer in one call: scores, selection and the chosen experts' outputs.

   Written twice by the preprocessor, for float32 and for bfloat16 (kept as the upper half of a float32). Sums are float32.
   A is (P, inputs), Bt is (P, outputs): an expert's rows lie together, all experts have `rank` rows. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static inline float from_f32(float value) { return value; }
static inline float to_f32(float value) { return value; }

static inline float from_bf16(uint16_t value) {
  uint32_t bits = (uint32_t)value << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

static inline uint16_t to_bf16(float value) { /* to the nearest, ties to even, as torch rounds */
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* The k largest scores of one token, the first of equals first, and their weights: 1 / k or a softmax. */
static void choose(const float *scores, float *left, long experts, long k, float temperature, long *chosen, float *weights) {
  memcpy(left, scores, experts * sizeof *left);
  for (long c = 0; c < k; c++) {
    long best = 0;
    for (long e = 1; e < experts; e++)
      if (left[e] > left[best]) best = e;
    chosen[c] = best;
    left[best] = -INFINITY;
  }
  float total = 0;
  for (long c = 0; c < k; c++) {
    weights[c] = temperature > 0 ? expf((scores[chosen[c]] - scores[chosen[0]]) / temperature) : 1.0f;
    total += weights[c];
  }
  for (long c = 0; c < k; c++) weights[c] /= total;
}

#define KERNELS(NAME, TYPE, FROM, TO)                                                                                  \
                                                                                                                       \
  /* h = A x for all tokens: each row of A is read once. Rounded as the layer's dtype rounds. */                       \
  static void inner_##NAME(const float *x, const TYPE *A, float *row, float *h, long tokens, long inputs, long rows) { \
    for (long p = 0; p < rows; p++) {                                                                                  \
      for (long i = 0; i < inputs; i++) row[i] = FROM(A[p * inputs + i]);                                              \
      for (long t = 0; t < tokens; t++) {                                                                              \
        const float *xt = x + t * inputs;                                                                              \
        float sum = 0;                                                                                                 \
        for (long i = 0; i < inputs; i++) sum += row[i] * xt[i];                                                       \
        h[t * rows + p] = FROM(TO(sum));                                                                               \
      }                                                                                                                \
    }                                                                                                                  \
  }                                                                                                                    \
                                                                                                                       \
  static void outer_##NAME(float weight, const TYPE *row, float *sum, long outputs) {                                  \
    for (long o = 0; o < outputs; o++) sum[o] += weight * FROM(row[o]);                                                \
  }                                                                                                                    \
                                                                                                                       \
  /* out += sum over the chosen of w_t B_t h_t. Returns 1 where there is no memory, and has changed nothing. */        \
  int route_##NAME(const TYPE *x, const TYPE *A, const TYPE *Bt, const TYPE *centers, const float *prior, TYPE *out,   \
                   long tokens, long rows_of_prior, long inputs, long outputs, long experts, long rank, long k,        \
                   float temperature) {                                                                                \
    long rows = experts * rank;                                                                                        \
    size_t size = tokens * (inputs + rows) + inputs + outputs + 2 * experts + k;                                       \
    float *memory = malloc((size + 1) * sizeof(float) + k * sizeof(long));                                                   \
    if (!memory) return 1;                                                                                             \
    float *wide = memory, *h = wide + tokens * inputs, *row = h + tokens * rows, *sum = row + inputs,                  \
          *scores = sum + outputs, *left = scores + experts, *weights = left + experts;                                \
    long *chosen = (long *)(memory + ((size + 1) & ~(size_t)1));                                                       \
    for (long i = 0; i < tokens * inputs; i++) wide[i] = FROM(x[i]);                                                   \
    inner_##NAME(wide, A, row, h, tokens, inputs, rows);                                                               \
    for (long t = 0; t < tokens; t++) {                                                                                \
      const float *ht = h + t * rows;                                                                                  \
      for (long e = 0; e < experts; e++) {                                                                             \
        float square = 0;                                                                                              \
        for (long r = e * rank; r < (e + 1) * rank; r++) {                                                             \
          float scored = centers ? FROM(TO(ht[r] - FROM(centers[r]))) : ht[r];                                         \
          square += scored * scored;                                                                                   \
        }                                                                                                              \
        scores[e] = sqrtf(square);                                                                                     \
        if (prior) scores[e] *= prior[(t * rows_of_prior / tokens) * experts + e];                                     \
      }                                                                                                                \
      choose(scores, left, experts, k, temperature, chosen, weights);                                                  \
      memset(sum, 0, outputs * sizeof *sum);                                                                           \
      for (long c = 0; c < k; c++)                                                                                     \
        for (long r = chosen[c] * rank; r < (chosen[c] + 1) * rank; r++)                                               \
          outer_##NAME(weights[c] * ht[r], Bt + r * outputs, sum, outputs);                                            \
      for (long o = 0; o < outputs; o++) out[t * outputs + o] = TO(FROM(out[t * outputs + o]) + sum[o]);               \
    }                                                                                                                  \
    free(memory);                                                                                                      \
    return 0;                                                                                                          \
  }                                                                                                                    \
                                                                                                                       \
  /* out += B (w h) with weights that are held, one row of them for each equal share of the tokens. */                 \
  int held_##NAME(const TYPE *x, const TYPE *A, const TYPE *Bt, const TYPE *weights, TYPE *out, long tokens,           \
                  long rows_of_weights, long inputs, long outputs, long rows) {                                        \
    float *memory = malloc((tokens * (inputs + rows) + inputs + outputs) * sizeof(float));                             \
    if (!memory) return 1;                                                                                             \
    float *wide = memory, *h = wide + tokens * inputs, *row = h + tokens * rows, *sum = row + inputs;                  \
    for (long i = 0; i < tokens * inputs; i++) wide[i] = FROM(x[i]);                                                   \
    inner_##NAME(wide, A, row, h, tokens, inputs, rows);                                                               \
    for (long t = 0; t < tokens; t++) {                                                                                \
      memset(sum, 0, outputs * sizeof *sum);                                                                           \
      for (long p = 0; p < rows; p++) {                                                                                \
        float weight = FROM(weights[(t * rows_of_weights / tokens) * rows + p]);                                       \
        if (weight != 0) outer_##NAME(weight * h[t * rows + p], Bt + p * outputs, sum, outputs);                       \
      }                                                                                                                \
      for (long o = 0; o < outputs; o++) out[t * outputs + o] = TO(FROM(out[t * outputs + o]) + sum[o]);               \
    }                                                                                                                  \
    free(memory);                                                                                                      \
    return 0;                                                                                                          \
  }

KERNELS(f32, float, to_f32, from_f32)
KERNELS(bf16, uint16_t, from_bf16, to_bf16)
