/* One routed layer: scores, selection and, of few tokens, the chosen experts' outputs, each in one pass.

   For float32, and for bfloat16, which is the upper half of a float32. Sums are float32. A is (P, inputs), Bt is
   (P, outputs): an expert's rows lie together, and all experts have `rank` rows. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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
static void choose(const float *scores, float *left, long experts, long k, float temperature, long *chosen,
                   float *weights) {
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

#define TYPE float
#define NAME(function) function##_f32
#define FROM(value) (value)
#define TO(value) (value)
#include "layer.h"
#undef TYPE
#undef NAME
#undef FROM
#undef TO

#define TYPE uint16_t
#define NAME(function) function##_bf16
#define FROM(value) from_bf16(value)
#define TO(value) to_bf16(value)
#include "layer.h"
