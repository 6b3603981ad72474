/* One routed layer: scores, selection and the chosen experts' outputs, each in one pass.

   For float32, and for bfloat16, which is the upper half of a float32. Sums are float32. Threads are OpenMP's, where
   the compiler has it. */

#include <float.h>
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

#define ROWS 4    /* rows of a matrix that are read side by side */
#define CHUNK 256 /* tokens at once, where they are many, so that what is laid out stays near */
#define STRIP 128 /* their outputs at once at most, */
#define SIDES 32  /* and what parts of the outputs are multiples of */
#define AHEAD 4   /* tokens whose outputs are fetched before they are needed */
#define TINY 1e-17f /* more than sums of squares lose that are too small for float32 */
#define ROUND(n, to) (((n) + (to) - 1) / (to) * (to))
#ifdef __AVX512F__ /* numbers of a vector: wider ones than the machine's would be kept in memory; and as registers allow, */
#define WIDE 16
#define TOKENS 4    /* tokens that a row is multiplied with at once, */
#define BLOCK 12    /* rows that one or two vectors of tokens are multiplied with, */
#define HELD 8      /* rows of Bt that are held, */
#define HELD_WIDE 2 /* and their vectors */
#else
#define WIDE 8
#define TOKENS 3
#define BLOCK 6
#define HELD 4
#define HELD_WIDE 2
#endif
#define LANES 2 /* vectors of tokens at most */
#define INLINED static inline __attribute__((always_inline)) /* so that what is given is a constant in it */
typedef float vector __attribute__((vector_size(4 * WIDE)));
typedef uint32_t words __attribute__((vector_size(4 * WIDE)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDE)));

/* What stays the same from call to call. */
struct layer {
  const void *W, *bias;   /* (outputs, inputs) and (outputs) of the base layer; none where that has answered already */
  const void *A, *Bt;     /* (rows, inputs), or none where A x is given, and (rows, outputs): an expert's rows lie together */
  const void *centers;    /* (rows), taken away before scoring, or none */
  const uint16_t *rough;  /* A in bfloat16, which is read first, or none; */
  const float *errors;    /* of each expert, by how much of a token's length its score is off by that at most, */
  const float *sizes;     /* and by how much of the length of what is left out of a token */
  long inputs, outputs, rows, experts, k; /* all experts have as many rows */
  long stride;            /* between the outputs of two tokens */
  float temperature;      /* of the softmax over the chosen scores; 0 weighs them alike */
};

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

/* The k largest scores of one token, the first of equals first, and their weights: 1 / k or a softmax. Who has a score of
   -INFINITY is not there: where fewer than k are, it weighs nothing. */
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
    float score = scores[chosen[c]];
    weights[c] = score == -INFINITY ? 0 : temperature > 0 ? expf((score - scores[chosen[0]]) / temperature) : 1.0f;
    total += weights[c];
  }
  for (long c = 0; c < k && total != 0; c++) weights[c] /= total;
}

/* What was chosen for a CHUNK of tokens, and what it takes to add their outputs. */
struct many {
  int32_t *chosen;         /* (tokens, k) */
  int32_t *begins, *order; /* by expert, the places in `chosen` that are its: from `begins` on in `order`, */
  int32_t *token;          /* and whose they are */
  float *share;            /* (tokens, k, wide): w h of the chosen, with zeros to fill up */
  float *strips;           /* of each thread, (tokens, STRIP): outputs */
  long wide, chunk;        /* numbers of a share, and tokens that there is room for */
};

/* A thread's outputs, in strips of equal width. */
struct part {
  long begin, end, width;
};

static struct part part_of(long outputs, long worker, long threads) {
  long each = ROUND((outputs + threads - 1) / threads, SIDES), strips = (each + STRIP - 1) / STRIP;
  struct part own = {worker * each, (worker + 1) * each, ROUND((each + strips - 1) / strips, SIDES)};
  if (own.end > outputs) own.end = outputs;
  return own;
}

/* Room from `at` on, which goes past it. */
static void *taken(char **at, size_t bytes) {
  void *here = *at;
  *at += ROUND(bytes, sizeof(vector));
  return here;
}

/* Room for `chunk` tokens at once, and `more` bytes at its beginning; `memory` is to be freed. */
static struct many room_for(const struct layer *l, long chunk, long threads, size_t more, char **memory) {
  long rank = l->rows / l->experts;
  struct many m = {.wide = ROUND(rank, HELD), .chunk = chunk};
  size_t strips = threads * chunk * STRIP * sizeof(float), shares = chunk * l->k * m.wide * sizeof(float);
  size_t places = chunk * l->k * sizeof(int32_t);
  more = ROUND(more, sizeof(vector));
  *memory = aligned_alloc(sizeof(vector), ROUND(more + strips + shares + 3 * places + (l->experts + 1) * 4, sizeof(vector)));
  m.strips = (float *)(*memory + more);
  m.share = m.strips + threads * chunk * STRIP;
  m.chosen = (int32_t *)(m.share + chunk * l->k * m.wide);
  m.order = m.chosen + chunk * l->k;
  m.token = m.order + chunk * l->k;
  m.begins = m.token + chunk * l->k;
  return m;
}

/* Remember what token `t`, whose h that is, has chosen as its number `c`; what weighs nothing is nobody's. */
static inline void remember(const struct layer *l, const struct many *m, long t, long c, long expert, float weight,
                            const float *h) {
  long rank = l->rows / l->experts;
  float *share = m->share + (t * l->k + c) * m->wide;
  m->chosen[t * l->k + c] = weight == 0 ? l->experts : expert;
  for (long r = 0; r < rank; r++) share[r] = weight * h[expert * rank + r];
  for (long r = rank; r < m->wide; r++) share[r] = 0;
}

/* Sort what was chosen by expert. By one thread, for which the others wait. */
static void sort_chosen(const struct layer *l, const struct many *m, long tokens) {
#pragma omp single
  {
    memset(m->begins, 0, (l->experts + 1) * sizeof *m->begins);
    for (long i = 0; i < tokens * l->k; i++) m->begins[m->chosen[i]]++;
    for (long e = 0, sum = 0; e <= l->experts; e++) { /* where the expert's places end, */
      sum += m->begins[e];
      m->begins[e] = sum;
    }
    for (long t = tokens - 1; t >= 0; t--) /* and begin */
      for (long i = (t + 1) * l->k - 1; i >= t * l->k; i--) {
        int32_t place = --m->begins[m->chosen[i]];
        m->order[place] = i;
        m->token[place] = t;
      }
  }
}

/* Whether so few tokens choose that half of A, and then whose scores are near, are less to read than A. */
static inline int reads_roughly(const struct layer *l, long tokens) {
  return l->rough && 2 * tokens * (l->k + 2) < l->experts;
}

/* By how much scores of experts of this rank are rounded at most, relatively. */
static inline float rounding_of(long rank) { return (rank + 4) * 2 * FLT_EPSILON; }

static void products_bf16(const float *x, const uint16_t *M, const uint16_t *bias, float *to, long tokens, long inputs,
                          long rows, int rounds, long threads);

#define FUNCTIONS "layer.h"
#include "dtypes.h"
#undef FUNCTIONS

#include "lanes.h"

#ifdef __AMX_BF16__
#include "amx.h"
#endif
