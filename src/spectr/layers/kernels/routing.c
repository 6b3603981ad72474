/* One routed layer: scores, selection and the chosen experts' outputs, each in one pass.

   For float32, and for bfloat16, which is the upper half of a float32. Sums are float32. Threads are OpenMP's, where the
   compiler was told to make them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define FEW 32          /* tokens up to which Bt is read from where it lies */
#define WIDE 16         /* numbers of a vector; narrower machines take it in parts */
#define BLOCK (4 * WIDE) /* outputs that are summed in registers */
#define ROWS 4           /* rows of a matrix that are read side by side */
#ifdef __AVX512F__       /* tokens that a row is multiplied with at once: as registers allow */
#define TOKENS 4
#else
#define TOKENS 1
#endif
typedef float vector __attribute__((vector_size(4 * WIDE)));
typedef uint32_t words __attribute__((vector_size(4 * WIDE)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDE)));

/* What stays the same from call to call. */
struct layer {
  const void *W, *bias;   /* (outputs, inputs) and (outputs) of the base layer; none where that has answered already */
  const void *A, *Bt;     /* (rows, inputs), or none where A x is given, and (rows, outputs): an expert's rows lie together */
  const void *centers;    /* (rows), taken away before scoring, or none */
  long inputs, outputs, rows, experts, k; /* all experts have as many rows */
  float temperature;      /* of the softmax over the chosen scores; 0 weighs them alike */
};

/* The next place where a vector crosses no line of the cache. */
static inline float *aligned(float *place) { return (float *)(((uintptr_t)place + 63) & ~(uintptr_t)63); }

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

static inline vector load_f32(const float *from) {
  vector loaded;
  memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

static inline vector load_bf16(const uint16_t *from) {
  halves loaded;
  memcpy(&loaded, from, sizeof loaded);
  words bits = __builtin_convertvector(loaded, words) << 16;
  vector wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

static inline void store_f32(float *to, vector value) { memcpy(to, &value, sizeof value); }

static inline void store_bf16(uint16_t *to, vector value) {
  words bits;
  memcpy(&bits, &value, sizeof bits);
  words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, number = (words)(value == value);
  halves stored = __builtin_convertvector((rounded & number) | (0x7fc0 & ~number), halves);
  memcpy(to, &stored, sizeof stored);
}

/* The k largest scores of one token, the first of equals first, and their weights: 1 / k or a softmax. */
static void choose(const float *scores, long experts, long k, float temperature, long *chosen, float *weights) {
  for (long e = 0, there = 0; e < experts; e++) { /* weights: for now the chosen scores */
    if (there == k && !(scores[e] > weights[k - 1])) continue;
    long place = there < k ? there++ : k - 1;
    for (; place > 0 && scores[e] > weights[place - 1]; place--) {
      weights[place] = weights[place - 1];
      chosen[place] = chosen[place - 1];
    }
    weights[place] = scores[e];
    chosen[place] = e;
  }
  float total = 0;
  for (long c = 0; c < k; c++) {
    weights[c] = temperature > 0 ? expf((scores[chosen[c]] - scores[chosen[0]]) / temperature) : 1.0f;
    total += weights[c];
  }
  for (long c = 0; c < k; c++) weights[c] /= total;
}

#define FUNCTIONS "layer.h"
#include "dtypes.h"
#undef FUNCTIONS
