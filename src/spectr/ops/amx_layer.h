/* The functions of amx.h for one dtype. */

/* to = M x for some of M's rows, and tokens from `begin` to `end`, with `stride` between tokens. `panel` has room for the
   rows. */
INLINED void NAME(multiply_some)(const TYPE *M, long rows, long inputs, const struct tiles *s, long begin, long end,
                                 uint16_t *panel, float *to, long stride, int parts) {
  for (long r = 0; r < ROUND(rows, 2 * SIDE); r += SIDE)
    NAME(lay_turned)(M + r * inputs, rows - r, inputs, parts, panel + r / SIDE * s->each);
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

/* h = A x, rounded as this dtype rounds. */
INLINED void NAME(inner_tiles)(const struct layer *l, const struct tiles *s, long threads, int parts) {
  long width = 2 * SIDE, blocks = s->rows / width, groups = blocks % threads && blocks < 4 * threads ? threads : 1;
#pragma omp for schedule(static) collapse(2)
  for (long block = 0; block < blocks; block++)
    for (long group = 0; group < groups; group++) { /* of the tokens, so that all threads have as much to do */
      long p = block * width, rows = l->rows - p < width ? l->rows - p : width;
      long begin = ROUND(group * s->tokens / groups, width), end = ROUND((group + 1) * s->tokens / groups, width);
      const TYPE *A = (const TYPE *)l->A + p * l->inputs;
      NAME(multiply_some)(A, rows, l->inputs, s, begin, end, panel_of(s), s->h + p, s->rows, parts);
      for (long t = begin; t < end && sizeof(TYPE) < sizeof(float); t++)
        for (long r = p; r < p + width; r++) s->h[t * s->rows + r] = FROM(TO(s->h[t * s->rows + r]));
    }
}

/* The scores of 16 tokens from place `t` on; `prior` is that of each, or none. */
static void NAME(score_side)(const struct layer *l, const struct tiles *s, const float *const *prior, long t,
                             vector *scores) {
  long experts = l->experts, rank = l->rows / experts;
  memset(scores, 0, experts * sizeof *scores);
  for (long p = 0, e = 0, r = 0; p < l->rows; p += 4) {
    __m512 turned[4];
    transpose(s->h + t * s->rows + p, s->rows * sizeof *s->h, turned);
    for (long i = 0; i < 4 && p + i < l->rows; i++) {
      vector scored = turned[i];
      if (l->centers) {
        scored -= FROM(((const TYPE *)l->centers)[p + i]);
        for (int u = 0; u < SIDE && sizeof(TYPE) < sizeof(float); u++) scored[u] = FROM(TO(scored[u]));
      }
      scores[e] += scored * scored;
      if (++r == rank) r = 0, e++;
    }
  }
  for (long e = 0; e < experts; e++) {
    scores[e] = _mm512_sqrt_ps(scores[e]);
    if (prior) scores[e] *= prior_of(prior, e);
  }
}

/* Choose for some tokens, which begin at `begin`. */
static void NAME(choose_all)(const struct layer *l, const struct tiles *s, const struct many *m, const struct given *given,
                             long begin, long tokens, vector *scratch) {
  vector *chosen = scratch + l->experts, *weights = chosen + l->k;
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t += SIDE) {
    const float *priors[SIDE];
    long there = tokens - t < SIDE ? tokens - t : SIDE;
    NAME(score_side)(l, s, priors_of(l, given, begin + t, there, priors), t, scratch);
    choose_side(scratch, l->experts, l->k, l->temperature, chosen, weights);
    for (long u = 0; u < there; u++)
      for (long c = 0; c < l->k; c++) remember(l, m, t + u, c, chosen[c][u], weights[c][u], s->h + (t + u) * s->rows);
  }
}

/* All rows of A, as if they were one expert, with the weights that are held. */
static void NAME(hold_all)(const struct layer *l, const struct tiles *s, const struct many *m, const struct given *given,
                           long begin, long tokens) {
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t++) {
    const TYPE *weights = (const TYPE *)given->rows + row_of(given, begin + t) * l->rows;
    remember(l, m, t, 0, 0, 1, s->h + t * s->rows);
    for (long p = 0; p < l->rows; p++) m->share[t * m->wide + p] *= FROM(weights[p]);
  }
}

/* The chosen experts' outputs, added to those of the base layer. */
INLINED void NAME(outer_tiles)(const struct layer *l, const struct tiles *s, const struct many *m, TYPE *out, long tokens,
                               long threads, int parts) {
  float *strip = m->strips + THREAD * m->chunk * STRIP;
#pragma omp for schedule(static)
  for (long worker = 0; worker < threads; worker++) {
    struct part own = part_of(l->outputs, worker, threads);
    for (long from = own.begin; from < own.end; from += own.width) {
      long there = own.end - from < own.width ? own.end - from : own.width;
      if (l->W) {
        const TYPE *W = (const TYPE *)l->W + from * l->inputs, *bias = l->bias;
        NAME(multiply_some)(W, there, l->inputs, s, 0, s->tokens, panel_of(s), strip, STRIP, parts);
        for (long t = 0; t < tokens && bias; t++)
          for (long o = 0; o < there; o++) strip[t * STRIP + o] += FROM(bias[from + o]);
      } else
        NAME(load_strip)(l, out, strip, from, there, tokens);
      NAME(add_chosen)(l, m, strip, from, there);
      NAME(store_strip)(l, out, strip, from, there, tokens);
    }
  }
}

/* Lay some tokens out. */
INLINED void NAME(lay_tokens)(const struct layer *l, const struct tiles *s, const TYPE *x, long tokens, int parts) {
#pragma omp for schedule(static)
  for (long t = 0; t < s->tokens; t += SIDE)
    NAME(lay_rows)(x + t * l->inputs, tokens - t, l->inputs, parts, s->x + t / SIDE * s->each);
}

/* Some tokens, which begin at `begin`. */
INLINED void NAME(chunk)(const struct layer *l, const struct tiles *s, const struct many *m, const struct given *given,
                         const TYPE *x, TYPE *out, long begin, long tokens, vector *scratch, long threads, int parts) {
  NAME(lay_tokens)(l, s, x, tokens, parts);
  if (sizeof(TYPE) == sizeof(float) && s->near)
    choose_near(l, s, m, given, (const float *)x, begin, tokens, scratch, parts);
  else {
    NAME(inner_tiles)(l, s, threads, parts);
    if (given->held)
      NAME(hold_all)(l, s, m, given, begin, tokens);
    else
      NAME(choose_all)(l, s, m, given, begin, tokens, scratch);
  }
  sort_chosen(l, m, tokens);
  NAME(outer_tiles)(l, s, m, out, tokens, threads, parts);
}

/* As route, or with `held` as held, of many tokens. `parts` of each float32: 3, or 2 where less will do; bfloat16 is one. */
int NAME(tiles)(const struct layer *l, const TYPE *x, const void *rows, TYPE *out, long tokens, long count, long held,
                long parts, long threads) {
  parts = sizeof(TYPE) < sizeof(float) ? 1 : parts;
  long own = 2 * (l->experts + l->k), roughly = sizeof(TYPE) == sizeof(float) && l->rough && !held;
  size_t scratch = threads * own * sizeof(vector), near = roughly * CHUNK / SIDE * l->experts * sizeof(__mmask16);
  char *memory, *at = 0;
  struct given given = {rows, count, tokens, held};
  tiles_for(l->rows, l->inputs, tokens, parts, threads, &at);
  struct many m = room_for(l, CHUNK, threads, scratch + (size_t)at + near, &memory);
  if (!memory) return 1;
  at = memory + scratch;
  struct tiles s = tiles_for(l->rows, l->inputs, tokens, parts, threads, &at);
  if (roughly) s.near = (__mmask16 *)at;
#pragma omp parallel num_threads(threads)
  {
    tiles_begin();
    for (long begin = 0; begin < tokens; begin += CHUNK) {
      struct tiles here = s;
      long some = tokens - begin < CHUNK ? tokens - begin : CHUNK;
      here.tokens = ROUND(some, 2 * SIDE);
      const TYPE *from = x + begin * l->inputs;
      TYPE *to = out + begin * l->stride;
      vector *own_scratch = (vector *)memory + THREAD * own;
      if (sizeof(TYPE) < sizeof(float))
        NAME(chunk)(l, &here, &m, &given, from, to, begin, some, own_scratch, threads, 1);
      else if (parts == 3)
        NAME(chunk)(l, &here, &m, &given, from, to, begin, some, own_scratch, threads, 3);
      else
        NAME(chunk)(l, &here, &m, &given, from, to, begin, some, own_scratch, threads, 2);
    }
    _tile_release();
  }
  free(memory);
  return 0;
}

/* h = A x alone, of some tokens. */
static void NAME(inner_alone)(const struct layer *l, const struct tiles *s, const TYPE *x, long tokens, long parts,
                              long threads) {
#define INNER(parts) \
  NAME(lay_tokens)(l, s, x, tokens, parts); \
  NAME(inner_tiles)(l, s, threads, parts);
  if (sizeof(TYPE) < sizeof(float)) {
    INNER(1)
  } else if (parts == 3) {
    INNER(3)
  } else {
    INNER(2)
  }
#undef INNER
}
