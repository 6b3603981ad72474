/* Many tokens in float32 of many experts: one product with A in bfloat16 tells which experts may be among a token's best, and
   these are scored by A itself. */

/* 16 rows of A in bfloat16, turned as lay_turned_f32 lays out a part. */
static inline void lay_rough(const uint16_t *from, long rows, long columns, uint16_t *to) {
  uint16_t places[DEEP], pairs[TILE];
  for (int c = 0; c < SIDE; c++) places[2 * c] = c, places[2 * c + 1] = c + SIDE;
  line beside = _mm512_loadu_si512(places);
  for (long c = 0; c < columns; c += DEEP, to += TILE) {
    __mmask32 there = columns - c >= DEEP ? 0xffffffff : (1u << (columns - c)) - 1;
    for (long r = 0; r < SIDE; r++) {
      line row = _mm512_maskz_loadu_epi16(r < rows ? there : 0, from + r * columns + c);
      _mm512_storeu_si512(pairs + r * DEEP, _mm512_permutexvar_epi16(beside, row));
    }
    for (int q = 0; q < SIDE; q += 4) {
      __m512 turned[4];
      transpose(pairs + 2 * q, DEEP * sizeof *pairs, turned);
      for (int r = 0; r < 4; r++) _mm512_store_ps(to + (q + r) * DEEP, turned[r]);
    }
  }
}

/* h roughly: by A in bfloat16, and the first parts of x. */
static void inner_rough(const struct layer *l, const struct tiles *s, int parts) {
  long width = 2 * SIDE, each = s->each / parts;
#pragma omp for schedule(static)
  for (long p = 0; p < s->rows; p += width) {
    uint16_t *panel = panel_of(s);
    for (long r = 0; r < width; r += SIDE)
      lay_rough(l->rough + (p + r) * l->inputs, l->rows - p - r, l->inputs, panel + r / SIDE * each);
    for (long t = 0; t < s->tokens; t += width) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      multiply_first(s->x + t / SIDE * s->each, panel, s->each, each / TILE, parts);
      store_square(s->h + t * s->rows + p, s->rows);
    }
  }
}

/* Lower bounds of the lengths of `there` tokens, at most 16, and of what the first parts of their numbers leave out. */
static void lengths_of(const float *x, long inputs, long there, vector *lengths, vector *left) {
  *lengths = *left = (vector){0};
  for (long u = 0; u < there; u++) {
    __m512 squares = {0}, left_squares = {0};
    for (long i = 0; i < inputs; i += WIDE) {
      __m512 number = _mm512_maskz_loadu_ps(first_of(inputs - i), x + u * inputs + i);
      __m512 part = (__m512)_mm512_and_epi32(rounded(number), _mm512_set1_epi32(0xffff0000)), rest = number - part;
      squares += number * number;
      left_squares += rest * rest;
    }
    (*lengths)[u] = _mm512_reduce_add_ps(squares);
    (*left)[u] = _mm512_reduce_add_ps(left_squares);
  }
  *lengths = _mm512_sqrt_ps(*lengths) * (1 + 1e-3f) + TINY;
  *left = _mm512_sqrt_ps(*left) * (1 + 1e-3f) + TINY;
}

/* For each expert, which of 16 tokens from place `t` on it may be among the best of, by rough h. As find_near_f32, but that what
   is left out of x, too, and sums one after the other add to what a score is off by. */
static void find_near_side(const struct layer *l, const struct tiles *s, const float *x, const float *const *prior, long t,
                           long there, vector *scratch, __mmask16 *near) {
  long experts = l->experts, rank = l->rows / experts;
  vector *scores = scratch, *least = scores + experts, *chosen = least + experts, *largest = chosen + l->k, length, left;
  float one_by_one = l->inputs * sqrtf(rank) * FLT_EPSILON / 2;
  score_side_f32(l, s, prior, t, scores);
  lengths_of(x, l->inputs, there, &length, &left);
  for (long e = 0; e < experts; e++) {
    vector error = (l->errors[e] + one_by_one * l->sizes[e]) * length + l->sizes[e] * left + TINY;
    if (prior) error *= (vector)_mm512_abs_ps(prior_of(prior, e));
    error += rounding_of(rank) * (vector)_mm512_abs_ps(scores[e]);
    least[e] = scores[e] - error;
    scores[e] += error;
  }
  find_largest(least, experts, l->k, chosen, largest);
  for (long e = 0; e < experts; e++)
    near[e] = ~_mm512_cmp_ps_mask(scores[e], largest[l->k - 1], _CMP_LT_OQ) & first_of(there);
}

#define PAIR 2 /* tokens, and */
#define BESIDE 8 /* rows of A whose sums are in registers */

/* Four vectors' sums. */
static inline __m128 sums_of(const vector *from) {
  __m512 a = _mm512_unpacklo_ps(from[0], from[1]) + _mm512_unpackhi_ps(from[0], from[1]);
  __m512 b = _mm512_unpacklo_ps(from[2], from[3]) + _mm512_unpackhi_ps(from[2], from[3]);
  __m512 both = (__m512)(_mm512_unpacklo_pd((__m512d)a, (__m512d)b)) + (__m512)(_mm512_unpackhi_pd((__m512d)a, (__m512d)b));
  __m256 half = _mm512_castps512_ps256(both) + _mm512_extractf32x8_ps(both, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}

/* Sums of products of BESIDE rows and PAIR tokens, wherever they lie. */
static inline void near_block(const float *const *rows, const float *const *x, long inputs, float to[PAIR][BESIDE]) {
  vector sums[PAIR][BESIDE];
  for (int u = 0; u < PAIR; u++)
    for (int r = 0; r < BESIDE; r++) sums[u][r] = (vector){0};
  for (long i = 0; i < inputs; i += WIDE) {
    __mmask16 there = first_of(inputs - i);
    vector numbers[PAIR];
    for (int u = 0; u < PAIR; u++) numbers[u] = _mm512_maskz_loadu_ps(there, x[u] + i);
    for (int r = 0; r < BESIDE; r++) {
      vector row = _mm512_maskz_loadu_ps(there, rows[r] + i);
      for (int u = 0; u < PAIR; u++) sums[u][r] += numbers[u] * row;
    }
  }
  for (int u = 0; u < PAIR; u++)
    for (int r = 0; r < BESIDE; r += 4) _mm_storeu_ps(to[u] + r, sums_of(sums[u] + r));
}

/* h = A x of the experts that are near: each one's rows once, with all of its tokens. */
static void inner_exact(const struct layer *l, const struct tiles *s, const float *x, long tokens) {
  long rank = l->rows / l->experts;
#pragma omp for schedule(dynamic, 2)
  for (long e = 0; e < l->experts; e++) {
    int32_t token[CHUNK + PAIR];
    long count = 0;
    for (long t = 0; t < tokens; t += SIDE)
      for (uint32_t whose = s->near[t / SIDE * l->experts + e]; whose; whose &= whose - 1)
        token[count++] = t + __builtin_ctz(whose);
    for (long u = 0; u < PAIR && count; u++) token[count + u] = token[count - 1]; /* to fill up */
    for (long r = 0; r < rank; r += BESIDE)
      for (long i = 0; i < count; i += PAIR) {
        const float *rows[BESIDE], *numbers[PAIR];
        float sums[PAIR][BESIDE];
        for (long q = 0; q < BESIDE; q++)
          rows[q] = (const float *)l->A + (e * rank + (r + q < rank ? r + q : rank - 1)) * l->inputs;
        for (long u = 0; u < PAIR; u++) numbers[u] = x + token[i + u] * l->inputs;
        near_block(rows, numbers, l->inputs, sums);
        for (long u = 0; u < PAIR; u++)
          for (long q = 0; q < BESIDE && r + q < rank; q++) s->h[token[i + u] * s->rows + e * rank + r + q] = sums[u][q];
      }
  }
}

/* Choose for some tokens, which begin at `begin`. */
static void choose_near(const struct layer *l, const struct tiles *s, const struct many *m, const struct given *given,
                        const float *x, long begin, long tokens, vector *scratch, int parts) {
  inner_rough(l, s, parts);
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t += SIDE) {
    const float *priors[SIDE];
    long there = tokens - t < SIDE ? tokens - t : SIDE;
    const float *const *prior = priors_of(l, given, begin + t, there, priors);
    find_near_side(l, s, x + t * l->inputs, prior, t, there, scratch, s->near + t / SIDE * l->experts);
  }
  inner_exact(l, s, x, tokens);
  long *chosen = (long *)(scratch + l->experts);
  float *scores = (float *)scratch, *weights = scores + l->experts;
  int32_t *near = (int32_t *)(scratch + l->experts + l->k);
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t++) {
    const float *ht = s->h + t * s->rows;
    const float *prior = given->rows ? (const float *)given->rows + row_of(given, begin + t) * l->experts : 0;
    near[0] = 0;
    for (long e = 0; e < l->experts; e++)
      if (s->near[t / SIDE * l->experts + e] >> t % SIDE & 1) near[++near[0]] = e;
    score_near_f32(l, ht, prior, near, scores);
    choose(scores, l->experts, l->k, l->temperature, chosen, weights);
    for (long c = 0; c < l->k; c++) remember(l, m, t, c, chosen[c], weights[c], ht);
  }
}
