/* Packed layers in bfloat16 on a machine with a matrix unit (AMX): A x, each token's decision among the experts that it may
   use, and B w A x added to what the base layer has answered. Sums are float32. Other dtypes and machines: packed.c.

   Factors lie as the unit reads them: tiles of 16 columns and 32 terms of their sums, a kilobyte each, those of the same
   columns after each other. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "packed.h"
#include "unit.h"

#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

#define PANEL 4  /* tiles of columns that are summed side by side */
#define NEAR 64  /* tokens whose outputs stay in the cache while they are added to */
#define FEW 3    /* tokens up to which only the chosen experts' terms are read, as measured */
#define UP(n, to) (((n) + (to) - 1) / (to) * (to))

/* One expert, of 16 tokens. */
struct lanes {
  __m512 granted, score, among, weight; /* `among`: the score, or less than any of who is not to be chosen */
};

/* Configure the unit for blocks of this many tokens; 0 releases it. */
static void configure(long tokens) {
  static _Thread_local long before;
  if (tokens == before) return;
  before = tokens;
  if (tokens == 0) {
    _tile_release();
    return;
  }
  struct {
    uint8_t palette, start, none[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) {
    config.bytes[tile] = 64;
    config.rows[tile] = tile <= PANEL ? tokens : SIDE;
  }
  written(&config);
  written(&config);
  _tile_loadconfig(&config);
}

/* to = x M of up to 16 tokens and PANEL tiles of columns. */
static void block(const uint16_t *x, long x_stride, const uint16_t *M, long deep, long tiles, float *to, long to_stride) {
  written(x);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long d = 0; d < deep; d++) {
    const uint16_t *from = M + d * TILE;
    _tile_loadd(4, x + d * DEEP, x_stride * 2);
    _tile_loadd(5, from, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (tiles > 1) {
      _tile_loadd(6, from + deep * TILE, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (tiles > 2) {
      _tile_loadd(7, from + 2 * deep * TILE, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (tiles > 3) {
      _tile_loadd(5, from + 3 * deep * TILE, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, to, to_stride * 4);
  if (tiles > 1) _tile_stored(1, to + SIDE, to_stride * 4);
  if (tiles > 2) _tile_stored(2, to + 2 * SIDE, to_stride * 4);
  if (tiles > 3) _tile_stored(3, to + 3 * SIDE, to_stride * 4);
}

static inline __m512 widened(const uint16_t *from, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)), 16));
}

static inline void narrow(uint16_t *to, __mmask16 some, __m512 value) {
  _mm256_mask_storeu_epi16(to, some, (__m256i)_mm512_cvtneps_pbh(value));
}

/* How 16 tokens select experts. */
struct selecting {
  __m512i router, k;
  __m512 temperature;
  __mmask16 soft; /* who has a temperature */
};

/* For up to 16 numbers that lie `stride` apart, where each of 16 lanes finds its own, those past the end the last one. */
static __m512i apart(long stride, long numbers) {
  int32_t place[SIDE];
  for (long u = 0; u < SIDE; u++) place[u] = (u < numbers ? u : numbers - 1) * stride;
  return _mm512_loadu_si512(place);
}

/* Up to 16 tokens of one module: scores, the weights that each has been given, or among the experts that it may use, as in a
   library that has no others, and w A x. Tokens are the lanes of vectors. */
static void decide(const struct packed *l, const struct module *m, const float *h, long h_stride,
                   const struct selecting *selecting, struct lanes *lanes, uint16_t *to, long to_stride, long tokens) {
  long experts = l->experts, rank = m->rows / experts;
  const float *centers = m->centers;
  __m512i places = apart(h_stride, tokens), one = _mm512_set1_epi32(1);
  __m512i own = _mm512_mullo_epi32(selecting->router, _mm512_set1_epi32(m->rows));
  __m512 none = _mm512_setzero_ps(), best = _mm512_set1_ps(-INFINITY), total = none;
  for (long e = 0; e < experts; e++) {
    __m512 sum = _mm512_setzero_ps();
    for (long r = e * rank; r < (e + 1) * rank; r++) {
      __m512 each = _mm512_i32gather_ps(places, h + r, 4);
      if (m->scales)
        each = _mm512_fmsub_ps(each, _mm512_i32gather_ps(own, m->scales + r, 4), _mm512_i32gather_ps(own, centers + r, 4));
      else if (centers)
        each = _mm512_sub_ps(each, _mm512_set1_ps(centers[r]));
      sum = _mm512_fmadd_ps(each, each, sum);
    }
    __m512 score = _mm512_sqrt_ps(sum), granted = lanes[e].granted;
    __mmask16 chosen = _mm512_cmp_ps_mask(granted, none, _CMP_GE_OQ);
    lanes[e].score = _mm512_mask_mul_ps(score, chosen, score, granted);
    lanes[e].among = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), chosen, lanes[e].score);
    best = _mm512_max_ps(best, lanes[e].among);
  }
  for (long e = 0; e < experts; e++) { /* chosen is who has fewer than k before it, the first of equals first */
    __m512i before = _mm512_setzero_si512();
    __m512 its = lanes[e].among, weight = _mm512_set1_ps(1);
    for (long f = 0; f < e; f++)
      before = _mm512_mask_add_epi32(before, _mm512_cmp_ps_mask(lanes[f].among, its, _CMP_GE_OQ), before, one);
    for (long f = e + 1; f < experts; f++)
      before = _mm512_mask_add_epi32(before, _mm512_cmp_ps_mask(lanes[f].among, its, _CMP_GT_OQ), before, one);
    for (long u = 0; u < SIDE && selecting->soft; u++)
      if (selecting->soft >> u & 1) weight[u] = expf((its[u] - best[u]) / selecting->temperature[u]);
    __mmask16 chosen = _mm512_cmp_ps_mask(lanes[e].granted, none, _CMP_GE_OQ);
    lanes[e].weight = _mm512_maskz_mov_ps(chosen & _mm512_cmplt_epi32_mask(before, selecting->k), weight);
    total = _mm512_add_ps(total, lanes[e].weight);
  }
  for (long e = 0; e < experts; e++) {
    __m512 weight = lanes[e].weight, granted = lanes[e].granted;
    weight = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(weight, none, _CMP_NEQ_UQ), weight, total);
    lanes[e].weight = _mm512_mask_sub_ps(weight, _mm512_cmp_ps_mask(granted, none, _CMP_LT_OQ), none, granted);
    for (long u = 0; u < tokens; u++)
      for (long r = e * rank; r < (e + 1) * rank; r += SIDE) {
        float share = lanes[e].weight[u];
        __mmask16 rows = share == 0 ? 0 : first_of((e + 1) * rank - r); /* zero for who is not chosen, whatever A x is */
        __m512 weighted = _mm512_mul_ps(_mm512_maskz_loadu_ps(rows, h + u * h_stride + r), _mm512_set1_ps(share));
        narrow(to + u * to_stride + r, first_of((e + 1) * rank - r), weighted);
      }
  }
}

/* How up to 16 tokens from `t` on select experts. */
static struct selecting read_selecting(const struct packed *l, long t, long tokens) {
  struct selecting selecting = {.soft = 0};
  for (long u = 0; u < SIDE; u++) {
    long router = l->routers ? l->routers[t + (u < tokens ? u : tokens - 1)] : 0;
    ((int32_t *)&selecting.router)[u] = router;
    ((int32_t *)&selecting.k)[u] = l->selects[router].k;
    selecting.temperature[u] = l->selects[router].temperature;
    selecting.soft |= (__mmask16)(l->selects[router].temperature > 0) << u;
  }
  return selecting;
}

/* The masks of up to 16 tokens. */
static void read_masks(const struct packed *l, const float *granted, long tokens, struct lanes *lanes) {
  __m512i places = apart(l->apart, tokens);
  for (long e = 0; e < l->experts; e++) lanes[e].granted = _mm512_i32gather_ps(places, granted + l->columns[e], 4);
}

/* out += w A x B of few tokens: of each tile the chosen experts' rows alone, two terms a row. */
static void add_few(const struct module *m, const uint16_t *weighted, uint16_t *out, long out_stride, long tokens) {
  long deep = UP(m->rows, DEEP) / DEEP, pairs = deep * SIDE, place[pairs];
  int32_t pair[pairs];
  for (long t = 0; t < tokens; t++) {
    long count = 0;
    for (long p = 0; p < pairs; p++) {
      memcpy(pair + count, weighted + t * deep * DEEP + 2 * p, sizeof *pair);
      place[count] = p * DEEP;
      count += pair[count] != 0;
    }
#pragma omp for schedule(static) nowait
    for (long tile = 0; tile < UP(m->length, SIDE) / SIDE; tile++) {
      uint16_t *to = out + t * out_stride + m->begin + tile * SIDE;
      __mmask16 some = first_of(m->length - tile * SIDE);
      const uint16_t *from = (const uint16_t *)m->B + tile * deep * TILE;
      __m512 sum = widened(to, some);
      for (long c = 0; c < count; c++)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(from + place[c]), (__m512bh)_mm512_set1_epi32(pair[c]));
      narrow(to, some, sum);
    }
  }
}

/* out += w A x B of many tokens. */
static void add_many(const struct module *m, const uint16_t *weighted, uint16_t *out, long out_stride, long tokens) {
  long deep = UP(m->rows, DEEP) / DEEP, tiles = UP(m->length, SIDE) / SIDE;
  const uint16_t *B = m->B;
  float sums[SIDE * PANEL * SIDE];
#pragma omp for collapse(2) schedule(static) nowait
  for (long near = 0; near < tokens; near += NEAR)
    for (long panel = 0; panel < tiles; panel += PANEL)
      for (long t = near; t < tokens && t < near + NEAR; t += SIDE) {
        long some = tokens - t < SIDE ? tokens - t : SIDE, wide = tiles - panel < PANEL ? tiles - panel : PANEL;
        for (long u = 0; u < some; u++) /* under way while the unit multiplies */
          for (long tile = 0; tile < wide; tile += 2)
            _mm_prefetch(out + (t + u) * out_stride + m->begin + (panel + tile) * SIDE, _MM_HINT_T0);
        configure(some);
        block(weighted + t * deep * DEEP, deep * DEEP, B + panel * deep * TILE, deep, wide, sums, PANEL * SIDE);
        for (long u = 0; u < some; u++)
          for (long tile = 0; tile < wide; tile++) {
            uint16_t *to = out + (t + u) * out_stride + m->begin + (panel + tile) * SIDE;
            __mmask16 there = first_of(m->length - (panel + tile) * SIDE);
            narrow(to, there, _mm512_add_ps(widened(to, there), _mm512_loadu_ps(sums + (u * PANEL + tile) * SIDE)));
          }
      }
}

/* What the experts add to the base layer's answer. Gives whether there was no memory for it. */
int add(const struct packed *l, const void *tokens_in, void *answer, long stride, long tokens, long threads) {
  const uint16_t *x = tokens_in, *A = l->A;
  long wide = UP(l->rows, SIDE), tiles = wide / SIDE, deep = l->inputs / DEEP, each = l->count * l->experts, places = 0;
  for (long s = 0; s < l->count; s++) places += UP(l->modules[s].rows, DEEP);
  float *h = malloc(tokens * wide * sizeof *h), *scores = 0, *weights = 0;
  uint16_t *weighted = calloc(tokens * places, sizeof *weighted);
  struct lanes *memory = aligned_alloc(64, threads * l->experts * sizeof *memory);
  if (l->sampled) scores = malloc(2 * tokens * each * sizeof *scores), weights = scores + tokens * each;
  int failed = !h || !weighted || !memory || (l->sampled && !scores);
  if (!failed) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static)
      for (long t = 0; t < tokens; t += SIDE)
        for (long panel = 0; panel < tiles; panel += PANEL) {
          configure(tokens - t < SIDE ? tokens - t : SIDE);
          long columns = tiles - panel < PANEL ? tiles - panel : PANEL;
          block(x + t * l->inputs, l->inputs, A + panel * deep * TILE, deep, columns, h + t * wide + panel * SIDE, wide);
        }
#pragma omp for schedule(static)
      for (long t = 0; t < tokens; t += SIDE) {
        long some = tokens - t < SIDE ? tokens - t : SIDE;
        struct lanes *lanes = memory + THREAD * l->experts;
        struct selecting selecting = read_selecting(l, t, some);
        read_masks(l, l->granted + t * l->apart, some, lanes);
        uint16_t *to = weighted;
        for (long s = 0; s < l->count; s++) {
          const struct module *m = l->modules + s;
          long room = UP(m->rows, DEEP);
          decide(l, m, h + t * wide + m->first, wide, &selecting, lanes, to + t * room, room, some);
          to += tokens * room;
          for (long n = 0; l->sampled && n < some * l->experts; n++) {
            long u = n / l->experts, e = n % l->experts, at = (t + u) * each + s * l->experts + e;
            scores[at] = lanes[e].score[u];
            weights[at] = lanes[e].weight[u];
          }
        }
      }
      const uint16_t *from = weighted;
      for (long s = 0; s < l->count; s++) {
        const struct module *m = l->modules + s;
        (tokens <= FEW ? add_few : add_many)(m, from, answer, stride, tokens);
        from += tokens * UP(m->rows, DEEP);
      }
      configure(0);
    }
    for (long n = 0; l->sampled && n < l->requests; n++) {
      memcpy(l->scores + n * each, scores + l->sampled[n] * each, each * sizeof(float));
      memcpy(l->weights + n * each, weights + l->sampled[n] * each, each * sizeof(float));
    }
  }
  free(h);
  free(weighted);
  free(memory);
  free(scores);
  return failed;
}
