/* Products by AMX, whose tiles multiply bfloat16 and sum in float32.

   A float32 is the sum of three bfloat16 of 8 bits each: high, middle and low. Of the nine products of two such sums six are
   made; what is left out is below float32's own rounding. Where torch is set to accept less
   (torch.set_float32_matmul_precision), numbers have two parts, and sums three products, as torch says of "high". */

#include "unit.h"

typedef __m512i line;     /* a tile's row */

static void tiles_begin(void) {
  struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } all = {.palette = 1};
  for (int tile = 0; tile < 8; tile++) {
    all.bytes[tile] = 4 * SIDE;
    all.rows[tile] = SIDE;
  }
  written(&all);
  _tile_loadconfig(&all);
}

/* Tiles 0 to 3, two by two, into a matrix; `stride` is between its rows. */
static inline void store_square(float *to, long stride) {
  long apart = stride * sizeof(float);
  _tile_stored(0, to, apart);
  _tile_stored(1, to + SIDE, apart);
  _tile_stored(2, to + SIDE * stride, apart);
  _tile_stored(3, to + SIDE * stride + SIDE, apart);
}

/* Bits of numbers whose upper halves are the nearest bfloat16, unless that is infinite. */
static inline line rounded(__m512 numbers) {
  line bits = (line)numbers, magnitude = _mm512_and_epi32(bits, _mm512_set1_epi32(0x7fffffff));
  __mmask16 finite = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x7f7f8000));
  return _mm512_mask_add_epi32(bits, finite, bits, _mm512_set1_epi32(0x8000));
}

/* The next part of 16 pairs of numbers, in pairs; the numbers keep the remainder. It is truncated, or rounded if `nearest` or
   `last`. */
static inline line next_part(__m512 *first, __m512 *second, int nearest, int last) {
  const line upper = _mm512_set1_epi32(0xffff0000);
  line a = (line)*first, b = (line)*second;
  if (nearest || last) {
    a = rounded(*first);
    b = rounded(*second);
  }
  if (!last) {
    *first -= (__m512)_mm512_and_epi32(a, upper);
    *second -= (__m512)_mm512_and_epi32(b, upper);
  }
  return _mm512_or_epi32(_mm512_and_epi32(b, upper), _mm512_srli_epi32(a, 16));
}

/* 16 tokens as tiles, `parts` for each DEEP of their numbers; number c is next to number c + 16. The first part is the nearest
   bfloat16. Missing tokens and numbers are zero. */
static inline void lay_rows_f32(const float *from, long rows, long columns, int parts, uint16_t *to) {
  for (long c = 0; c < columns; c += DEEP, to += parts * TILE) {
    __mmask16 near = first_of(columns - c), far = first_of(columns - c - SIDE);
    for (long r = 0; r < SIDE; r++) {
      __m512 first = {0}, second = {0};
      if (r < rows) {
        first = _mm512_maskz_loadu_ps(near, from + r * columns + c);
        second = _mm512_maskz_loadu_ps(far, from + r * columns + c + SIDE);
      }
      for (int p = 0; p < parts; p++)
        _mm512_store_si512(to + p * TILE + r * DEEP, next_part(&first, &second, p == 0, p == parts - 1));
    }
  }
}

/* 4 words of 16 rows, which are `stride` bytes apart, turned. */
static inline void transpose(const void *from, long stride, __m512 turned[4]) {
#define WORDS(r) _mm_loadu_ps((const float *)((const char *)from + (r) * stride))
  __m512 rows[4], pairs[4];
  for (int r = 0; r < 4; r++) { /* of rows r, r + 4, r + 8 and r + 12 */
    rows[r] = _mm512_castps128_ps512(WORDS(r));
    rows[r] = _mm512_mask_broadcast_f32x4(rows[r], 0x00f0, WORDS(r + 4));
    rows[r] = _mm512_mask_broadcast_f32x4(rows[r], 0x0f00, WORDS(r + 8));
    rows[r] = _mm512_mask_broadcast_f32x4(rows[r], 0xf000, WORDS(r + 12));
  }
  for (int r = 0; r < 2; r++) {
    pairs[2 * r] = _mm512_unpacklo_ps(rows[2 * r], rows[2 * r + 1]);
    pairs[2 * r + 1] = _mm512_unpackhi_ps(rows[2 * r], rows[2 * r + 1]);
  }
  for (int r = 0; r < 2; r++) {
    turned[2 * r] = (__m512)_mm512_unpacklo_pd((__m512d)pairs[r], (__m512d)pairs[r + 2]);
    turned[2 * r + 1] = (__m512)_mm512_unpackhi_pd((__m512d)pairs[r], (__m512d)pairs[r + 2]);
  }
#undef WORDS
}

/* What comes 16 rows later, on its way while these are worked on; `stride` is in bytes. */
static inline void fetch_next(const void *from, long stride, long bytes) {
  for (long r = SIDE; r < 2 * SIDE; r++)
    for (long line = 0; line < bytes; line += 64) _mm_prefetch((const char *)from + r * stride + line, _MM_HINT_T1);
}

/* The same of 16 rows of a matrix, each tile turned: the second factor of a product. */
static inline void lay_turned_f32(const float *from, long rows, long columns, int parts, uint16_t *to) {
  for (long c = 0; c < columns; c += DEEP, to += parts * TILE) {
    float edge[SIDE][DEEP];
    const float *at = from + c;
    long apart = columns, length = columns - c < DEEP ? columns - c : DEEP;
    if (rows < SIDE || length < DEEP) {
      memset(edge, 0, sizeof edge);
      for (long r = 0; r < SIDE && r < rows; r++) memcpy(edge[r], at + r * columns, length * sizeof(float));
      at = edge[0];
      apart = DEEP;
    }
    fetch_next(from + c, columns * sizeof *from, DEEP * sizeof *from);
    for (int q = 0; q < SIDE; q += 4) {
      __m512 first[4], second[4];
      transpose(at + q, apart * sizeof *at, first);
      transpose(at + SIDE + q, apart * sizeof *at, second);
      for (int r = 0; r < 4; r++)
        for (int p = 0; p < parts; p++)
          _mm512_store_si512(to + p * TILE + (q + r) * DEEP, next_part(first + r, second + r, 0, p == parts - 1));
    }
  }
}

/* The same for bfloat16, which is one part: number c is next to number c + 1. */
static inline void lay_rows_bf16(const uint16_t *from, long rows, long columns, int parts, uint16_t *to) {
  for (long c = 0; c < columns; c += DEEP, to += parts * TILE)
    for (long r = 0; r < SIDE; r++) {
      __mmask32 there = r >= rows ? 0 : columns - c >= DEEP ? 0xffffffff : (1u << (columns - c)) - 1;
      _mm512_store_si512(to + r * DEEP, _mm512_maskz_loadu_epi16(there, from + r * columns + c));
    }
}

static inline void lay_turned_bf16(const uint16_t *from, long rows, long columns, int parts, uint16_t *to) {
  for (long c = 0; c < columns; c += DEEP, to += parts * TILE) {
    uint16_t edge[TILE];
    const uint16_t *at = from + c;
    long apart = columns;
    if (rows < SIDE || columns - c < DEEP) {
      for (long r = 0; r < SIDE; r++) {
        __mmask32 there = r >= rows ? 0 : columns - c >= DEEP ? 0xffffffff : (1u << (columns - c)) - 1;
        _mm512_storeu_si512(edge + r * DEEP, _mm512_maskz_loadu_epi16(there, at + r * columns));
      }
      at = edge;
      apart = DEEP;
    }
    fetch_next(from + c, columns * sizeof *from, DEEP * sizeof *from);
    for (int q = 0; q < SIDE; q += 4) {
      __m512 turned[4];
      transpose(at + 2 * q, apart * sizeof *at, turned);
      for (int r = 0; r < 4; r++) _mm512_store_ps(to + (q + r) * DEEP, turned[r]);
    }
  }
}

/* Adds to tiles 0 to 3 the products of two rows of tiles `a` and two of `b`; each two are `apart`. Small ones first. */
static inline void multiply(const uint16_t *a, const uint16_t *b, long apart, long deep, int parts) {
#define FIRST(p) \
  _tile_loadd(4, a + (p) * TILE, 4 * SIDE); \
  _tile_loadd(5, a + apart + (p) * TILE, 4 * SIDE);
#define SECOND(p) \
  _tile_loadd(6, b + (p) * TILE, 4 * SIDE); \
  _tile_loadd(7, b + apart + (p) * TILE, 4 * SIDE);
#define SUM \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);
  written(a);
  for (long c = 0; c < deep; c++, a += parts * TILE, b += parts * TILE) {
    if (parts == 3) {
      FIRST(2) SECOND(0) SUM FIRST(1) SUM SECOND(1) SUM FIRST(0) SUM SECOND(2) SUM SECOND(0) SUM
    } else if (parts == 2) {
      FIRST(1) SECOND(0) SUM FIRST(0) SUM SECOND(1) SUM
    } else {
      FIRST(0) SECOND(0) SUM
    }
  }
}

/* The same with the first part of `a`, which has `parts`, and `b`, which has one. */
static inline void multiply_first(const uint16_t *a, const uint16_t *b, long apart, long deep, int parts) {
  written(a);
  for (long c = 0; c < deep; c++, a += parts * TILE, b += TILE) {
    _tile_loadd(6, b, 4 * SIDE);
    _tile_loadd(7, b + apart / parts, 4 * SIDE);
    FIRST(0) SUM
  }
}
#undef FIRST
#undef SECOND
#undef SUM

/* Room for tiles of x and, for each thread, of STRIP rows of a matrix, and for h = A x, (tokens, rows). */
struct tiles {
  uint16_t *x, *panels;
  __mmask16 *near; /* of 16 tokens after the other, for each expert, which of them it may be among the best of; or none */
  float *h;
  long tokens, rows, each; /* those numbers, as many as fill tiles; and bfloat16 numbers of 16 rows of x or a matrix */
};

/* Memory for this many tokens, starting at `at`. */
static struct tiles tiles_for(long rows, long inputs, long tokens, long parts, long threads, char **at) {
  struct tiles s = {.rows = ROUND(rows, 2 * SIDE), .each = ROUND(inputs, DEEP) / DEEP * parts * TILE};
  long most = tokens < CHUNK ? ROUND(tokens, 2 * SIDE) : CHUNK, panels = threads * STRIP;
  s.h = taken(at, most * s.rows * sizeof *s.h);
  s.x = taken(at, most / SIDE * s.each * sizeof *s.x);
  s.panels = taken(at, panels / SIDE * s.each * sizeof *s.panels);
  return s;
}

static inline uint16_t *panel_of(const struct tiles *s) { return s->panels + THREAD * STRIP / SIDE * s->each; }

/* Data of a call's tokens in addition to x: a prior of the scores, float32, or fixed weights of the rows of A; one row for each
   equal share of `all` tokens. */
struct given {
  const void *rows;
  long count, all, held;
};

static inline long row_of(const struct given *given, long token) { return token * given->count / given->all; }

/* The priors of the `there` tokens from `begin` on, at most 16; `priors` itself, if there are any. */
static const float *const *priors_of(const struct layer *l, const struct given *given, long begin, long there,
                                     const float *priors[SIDE]) {
  for (long u = 0; u < SIDE && given->rows; u++)
    priors[u] = (const float *)given->rows + row_of(given, begin + (u < there ? u : 0)) * l->experts;
  return given->rows ? priors : 0;
}

/* What they say of an expert. */
static inline vector prior_of(const float *const priors[SIDE], long expert) {
  vector by;
  for (int u = 0; u < SIDE; u++) by[u] = priors[u][expert];
  return by;
}

/* The k largest scores of 16 tokens, and whose they are: `scores` of one expert after the other. */
static void find_largest(const vector *scores, long experts, long k, vector *chosen, vector *largest) {
  for (long e = 0; e < experts; e++) {
    long place = e < k ? e : k - 1;
    __mmask16 larger = e < k ? 0xffff : _mm512_cmp_ps_mask(scores[e], largest[place], _CMP_GT_OQ);
    if (!larger) continue;
    largest[place] = _mm512_mask_mov_ps(largest[place], larger, scores[e]);
    chosen[place] = _mm512_mask_mov_ps(chosen[place], larger, _mm512_set1_ps(e));
    for (; place > 0; place--) {
      larger = _mm512_cmp_ps_mask(largest[place], largest[place - 1], _CMP_GT_OQ);
      if (!larger) break;
      vector score = largest[place], who = chosen[place];
      largest[place] = _mm512_mask_mov_ps(score, larger, largest[place - 1]);
      chosen[place] = _mm512_mask_mov_ps(who, larger, chosen[place - 1]);
      largest[place - 1] = _mm512_mask_mov_ps(largest[place - 1], larger, score);
      chosen[place - 1] = _mm512_mask_mov_ps(chosen[place - 1], larger, who);
    }
  }
}

/* They with their weights, as choose() has them. */
static void choose_side(const vector *scores, long experts, long k, float temperature, vector *chosen, vector *weights) {
  find_largest(scores, experts, k, chosen, weights);
  vector best = weights[0], total = {0};
  for (long c = 0; c < k; c++) {
    for (int t = 0; t < SIDE; t++)
      weights[c][t] = temperature > 0 ? expf((weights[c][t] - best[t]) / temperature) : 1.0f;
    total += weights[c];
  }
  for (long c = 0; c < k; c++) weights[c] /= total;
}

static void choose_near(const struct layer *l, const struct tiles *s, const struct many *m, const struct given *given,
                        const float *x, long begin, long tokens, vector *scratch, int parts);

#define FUNCTIONS "amx_layer.h"
#include "dtypes.h"
#undef FUNCTIONS

#include "amx_near.h"
