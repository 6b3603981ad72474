/* Scores of many float32 tokens by AMX, whose tiles multiply bfloat16 and sum in float32.

   A float32 is the sum of three bfloat16 of 8 bits each: high, middle and low. Of the nine products of two such sums six are
   made; what is left out is below float32's own rounding. Where torch is told that less will do
   (torch.set_float32_matmul_precision), numbers have two parts, and sums three products, as torch says of "high". */

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16           /* rows of a tile, and words of a row */
#define DEEP (2 * SIDE)   /* terms of a sum that two tiles have */
#define TILE (SIDE * DEEP) /* bfloat16 numbers of a tile */

typedef __m512i line;     /* a tile's row */

/* Whether the system lets this process have tiles. */
int tiles_allowed(void) {
  const long ask_for = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
}

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

/* The next part of 16 pairs of numbers, pair beside pair, which are left with what remains. The last one is rounded. */
static inline line next_part(__m512 *first, __m512 *second, int last) {
  const line upper = _mm512_set1_epi32(0xffff0000), half = _mm512_set1_epi32(0x8000);
  line a = (line)*first, b = (line)*second;
  if (last) {
    a = _mm512_add_epi32(a, half);
    b = _mm512_add_epi32(b, half);
  } else {
    *first -= (__m512)_mm512_and_epi32(a, upper);
    *second -= (__m512)_mm512_and_epi32(b, upper);
  }
  return _mm512_or_epi32(_mm512_and_epi32(b, upper), _mm512_srli_epi32(a, 16));
}

static inline __mmask16 first_of(long there) { return there >= SIDE ? 0xffff : there <= 0 ? 0 : (1 << there) - 1; }

/* 16 rows of a matrix as tiles, `parts` for each DEEP of its columns, of which number c is beside number c + 16. Zero for rows
   and columns that are not there. */
static inline void lay_rows(const float *from, long rows, long columns, int parts, uint16_t *to) {
  for (long c = 0; c < columns; c += DEEP, to += parts * TILE) {
    __mmask16 near = first_of(columns - c), far = first_of(columns - c - SIDE);
    for (long r = 0; r < SIDE; r++) {
      __m512 first = {0}, second = {0};
      if (r < rows) {
        first = _mm512_maskz_loadu_ps(near, from + r * columns + c);
        second = _mm512_maskz_loadu_ps(far, from + r * columns + c + SIDE);
      }
      for (int p = 0; p < parts; p++)
        _mm512_store_si512(to + p * TILE + r * DEEP, next_part(&first, &second, p == parts - 1));
    }
  }
}

/* 4 numbers of 16 rows, turned. */
static inline void turn(const float *from, long stride, __m512 turned[4]) {
  __m512 rows[4], pairs[4];
  for (int r = 0; r < 4; r++) { /* of rows r, r + 4, r + 8 and r + 12 */
    rows[r] = _mm512_castps128_ps512(_mm_loadu_ps(from + r * stride));
    rows[r] = _mm512_mask_broadcast_f32x4(rows[r], 0x00f0, _mm_loadu_ps(from + (r + 4) * stride));
    rows[r] = _mm512_mask_broadcast_f32x4(rows[r], 0x0f00, _mm_loadu_ps(from + (r + 8) * stride));
    rows[r] = _mm512_mask_broadcast_f32x4(rows[r], 0xf000, _mm_loadu_ps(from + (r + 12) * stride));
  }
  for (int r = 0; r < 2; r++) {
    pairs[2 * r] = _mm512_unpacklo_ps(rows[2 * r], rows[2 * r + 1]);
    pairs[2 * r + 1] = _mm512_unpackhi_ps(rows[2 * r], rows[2 * r + 1]);
  }
  for (int r = 0; r < 2; r++) {
    turned[2 * r] = (__m512)_mm512_unpacklo_pd((__m512d)pairs[r], (__m512d)pairs[r + 2]);
    turned[2 * r + 1] = (__m512)_mm512_unpackhi_pd((__m512d)pairs[r], (__m512d)pairs[r + 2]);
  }
}

/* As lay_rows, each tile turned: the second factor of a product. */
static inline void lay_turned(const float *from, long rows, long columns, int parts, uint16_t *to) {
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
    for (int q = 0; q < SIDE; q += 4) {
      __m512 first[4], second[4];
      turn(at + q, apart, first);
      turn(at + SIDE + q, apart, second);
      for (int r = 0; r < 4; r++)
        for (int p = 0; p < parts; p++)
          _mm512_store_si512(to + p * TILE + (q + r) * DEEP, next_part(first + r, second + r, p == parts - 1));
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
  for (long c = 0; c < deep; c++, a += parts * TILE, b += parts * TILE) {
    if (parts == 3) {
      FIRST(2) SECOND(0) SUM FIRST(1) SUM SECOND(1) SUM FIRST(0) SUM SECOND(2) SUM SECOND(0) SUM
    } else {
      FIRST(1) SECOND(0) SUM FIRST(0) SECOND(1) SUM SECOND(0) SUM
    }
  }
#undef FIRST
#undef SECOND
#undef SUM
}

/* Room for tiles of x and, for each thread, of STRIP rows of a matrix, and for h = A x, (tokens, rows). */
struct tiles {
  uint16_t *x, *panels;
  float *h;
  long tokens, rows, each; /* those numbers, as many as fill tiles; and bfloat16 numbers of 16 rows of x or a matrix */
};

static inline uint16_t *panel_of(const struct tiles *s) { return s->panels + THREAD * STRIP / SIDE * s->each; }

/* to = M x for some of M's rows, and tokens from `begin` to `end`, with `stride` between tokens. `panel` has room for the rows. */
static inline __attribute__((always_inline)) void multiply_some(const float *M, long rows, long inputs, const struct tiles *s,
                                                               long begin, long end, uint16_t *panel, float *to, long stride,
                                                               int parts) {
  for (long r = 0; r < ROUND(rows, 2 * SIDE); r += SIDE)
    lay_turned(M + r * inputs, rows - r, inputs, parts, panel + r / SIDE * s->each);
  for (long t = begin; t < end; t += 2 * SIDE)
    for (long r = 0; r < rows; r += 2 * SIDE) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      multiply(s->x + t / SIDE * s->each, panel + r / SIDE * s->each, s->each, s->each / (parts * TILE), parts);
      store_square(to + t * stride + r, stride);
    }
}

/* The largest scores of 16 tokens and their weights, as choose() has them: `scores` of one expert after the other. */
static void choose_side(const vector *scores, long experts, long k, float temperature, vector *chosen, vector *weights) {
  for (long e = 0; e < experts; e++) {
    long place = e < k ? e : k - 1;
    __mmask16 larger = e < k ? 0xffff : _mm512_cmp_ps_mask(scores[e], weights[place], _CMP_GT_OQ);
    if (!larger) continue;
    weights[place] = _mm512_mask_mov_ps(weights[place], larger, scores[e]);
    chosen[place] = _mm512_mask_mov_ps(chosen[place], larger, _mm512_set1_ps(e));
    for (; place > 0; place--) {
      larger = _mm512_cmp_ps_mask(weights[place], weights[place - 1], _CMP_GT_OQ);
      if (!larger) break;
      vector weight = weights[place], who = chosen[place];
      weights[place] = _mm512_mask_mov_ps(weight, larger, weights[place - 1]);
      chosen[place] = _mm512_mask_mov_ps(who, larger, chosen[place - 1]);
      weights[place - 1] = _mm512_mask_mov_ps(weights[place - 1], larger, weight);
      chosen[place - 1] = _mm512_mask_mov_ps(chosen[place - 1], larger, who);
    }
  }
  vector best = weights[0], total = {0};
  for (long c = 0; c < k; c++) {
    for (int t = 0; t < SIDE; t++)
      weights[c][t] = temperature > 0 ? expf((weights[c][t] - best[t]) / temperature) : 1.0f;
    total += weights[c];
  }
  for (long c = 0; c < k; c++) weights[c] /= total;
}

/* The choice of 16 tokens from place `t` on, into `scratch`; `prior` is that of each. */
static void choose_among(const struct layer *l, const struct tiles *s, const float *const prior[SIDE], long t,
                         vector *scratch) {
  long experts = l->experts, rank = l->rows / experts;
  memset(scratch, 0, experts * sizeof *scratch);
  for (long p = 0, e = 0, r = 0; p < l->rows; p += 4) {
    __m512 turned[4];
    turn(s->h + t * s->rows + p, s->rows, turned);
    for (long i = 0; i < 4 && p + i < l->rows; i++) {
      vector scored = turned[i];
      if (l->centers) scored -= ((const float *)l->centers)[p + i];
      scratch[e] += scored * scored;
      if (++r == rank) r = 0, e++;
    }
  }
  for (long e = 0; e < experts; e++) {
    vector by;
    scratch[e] = _mm512_sqrt_ps(scratch[e]);
    if (!prior[0]) continue;
    for (int u = 0; u < SIDE; u++) by[u] = prior[u][e];
    scratch[e] *= by;
  }
  choose_side(scratch, experts, l->k, l->temperature, scratch + experts, scratch + experts + l->k);
}

/* What a call has of its tokens beside x: a prior of the scores, or weights that are held of the rows of A; one row of
   these for each equal share of `all` tokens. */
struct given {
  const float *rows;
  long count, all, held;
};

static inline const float *given_to(const struct given *given, long token, long numbers) {
  return given->rows + token * given->count / given->all * numbers;
}

/* Choose for some tokens, which begin at `begin`. */
static void choose_all(const struct layer *l, const struct tiles *s, const struct many *m, const struct given *given,
                       long begin, long tokens, vector *scratch) {
  vector *chosen = scratch + l->experts, *weights = chosen + l->k;
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t += SIDE) {
    const float *priors[SIDE] = {0};
    long there = tokens - t < SIDE ? tokens - t : SIDE;
    for (long u = 0; u < SIDE && given->rows; u++)
      priors[u] = given_to(given, begin + t + (u < there ? u : 0), l->experts);
    choose_among(l, s, priors, t, scratch);
    for (long u = 0; u < there; u++)
      for (long c = 0; c < l->k; c++) remember(l, m, t + u, c, chosen[c][u], weights[c][u], s->h + (t + u) * s->rows);
  }
}

/* All rows of A, as if they were one expert, with the weights that are held. */
static void hold_all(const struct layer *l, const struct tiles *s, const struct many *m, const struct given *given, long begin,
                     long tokens) {
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t++) {
    const float *weights = given_to(given, begin + t, l->rows);
    remember(l, m, t, 0, 0, 1, s->h + t * s->rows);
    for (long p = 0; p < l->rows; p++) m->share[t * m->wide + p] *= weights[p];
  }
}

/* The chosen experts' outputs, added to those of the base layer. */
static inline __attribute__((always_inline)) void outer_tiles(const struct layer *l, const struct tiles *s, const struct many *m,
                                                             float *out, long tokens, long threads, int parts) {
  float *strip = m->strips + THREAD * CHUNK * STRIP;
#pragma omp for schedule(static)
  for (long worker = 0; worker < threads; worker++) {
    struct part own = part_of(l->outputs, worker, threads);
    for (long from = own.begin; from < own.end; from += own.width) {
      long there = own.end - from < own.width ? own.end - from : own.width;
      if (l->W) {
        const float *W = (const float *)l->W + from * l->inputs, *bias = l->bias;
        multiply_some(W, there, l->inputs, s, 0, s->tokens, panel_of(s), strip, STRIP, parts);
        for (long t = 0; t < tokens && bias; t++)
          for (long o = 0; o < there; o++) strip[t * STRIP + o] += bias[from + o];
      } else
        load_strip_f32(l, out, strip, from, there, tokens);
      add_chosen_f32(l, m, strip, from, there);
      store_strip_f32(l, out, strip, from, there, tokens);
    }
  }
}

/* Some tokens, which begin at `begin`. */
static inline __attribute__((always_inline)) void chunk_tiles(const struct layer *l, const struct tiles *s, const struct many *m,
                                                             const struct given *given, const float *x, float *out, long begin,
                                                             long tokens, vector *scratch, long threads, int parts) {
#pragma omp for schedule(static)
  for (long t = 0; t < s->tokens; t += SIDE)
    lay_rows(x + t * l->inputs, tokens - t, l->inputs, parts, s->x + t / SIDE * s->each);
  long blocks = s->rows / (2 * SIDE), groups = blocks % threads && blocks < 4 * threads ? threads : 1;
#pragma omp for schedule(static) collapse(2)
  for (long block = 0; block < blocks; block++)
    for (long group = 0; group < groups; group++) { /* of the tokens, so that all threads have as much to do */
      long p = 2 * SIDE * block, rows = l->rows - p < 2 * SIDE ? l->rows - p : 2 * SIDE;
      long first = ROUND(group * s->tokens / groups, 2 * SIDE), last = ROUND((group + 1) * s->tokens / groups, 2 * SIDE);
      const float *A = (const float *)l->A + p * l->inputs;
      multiply_some(A, rows, l->inputs, s, first, last, panel_of(s), s->h + p, s->rows, parts);
    }
  if (given->held)
    hold_all(l, s, m, given, begin, tokens);
  else
    choose_all(l, s, m, given, begin, tokens, scratch);
  sort_chosen(l, m, tokens);
  outer_tiles(l, s, m, out, tokens, threads, parts);
}

/* As route, or with `held` as held, of many tokens of float32. `parts` of each number: 3, or 2 where less will do. */
int tiles_f32(const struct layer *l, const float *x, const float *rows, float *out, long tokens, long count, long held,
              long parts, long threads) {
  long own = l->experts + 2 * l->k, most = tokens < CHUNK ? ROUND(tokens, 2 * SIDE) : CHUNK;
  struct tiles s = {.rows = ROUND(l->rows, 2 * SIDE), .each = ROUND(l->inputs, DEEP) / DEEP * parts * TILE};
  struct given given = {rows, count, tokens, held};
  size_t scratch = threads * own * sizeof(vector), products = s.rows * most * sizeof(float);
  size_t laid = (most + threads * STRIP) / SIDE * s.each * sizeof *s.x;
  char *memory;
  struct many m = room_for(l, threads, scratch + products + laid, &memory);
  if (!memory) return 1;
  s.h = (float *)(memory + scratch);
  s.x = (uint16_t *)(memory + scratch + products);
  s.panels = s.x + most / SIDE * s.each;
#pragma omp parallel num_threads(threads)
  {
    tiles_begin();
    for (long begin = 0; begin < tokens; begin += CHUNK) {
      struct tiles here = s;
      long some = tokens - begin < CHUNK ? tokens - begin : CHUNK;
      here.tokens = ROUND(some, 2 * SIDE);
      const float *from = x + begin * l->inputs;
      float *to = out + begin * l->outputs;
      vector *own_scratch = (vector *)memory + THREAD * own;
      if (parts == 3)
        chunk_tiles(l, &here, &m, &given, from, to, begin, some, own_scratch, threads, 3);
      else
        chunk_tiles(l, &here, &m, &given, from, to, begin, some, own_scratch, threads, 2);
    }
    _tile_release();
  }
  free(memory);
  return 0;
}
