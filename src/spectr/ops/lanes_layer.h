/* The functions of lanes.h for one dtype. */

/* Lay some tokens out as vectors, zeros for those that are not there. */
static void NAME(lay_lanes)(const TYPE *x, long tokens, long inputs, const struct lanes *s, long threads) {
  long side = s->side;
#pragma omp for schedule(static)
  for (long worker = 0; worker < threads; worker++)
    for (long begin = 0; begin < tokens; begin += side)
      for (long i = worker * inputs / threads; i < (worker + 1) * inputs / threads; i++)
        for (long u = 0; u < side; u++)
          s->x[(begin * inputs) + i * side + u] = begin + u < tokens ? FROM(x[(begin + u) * inputs + i]) : 0;
}

/* to = M x + bias for a block of M's rows, or what there is of it, and tokens from `begin` to `end`. */
static void NAME(multiply_block)(const TYPE *M, const TYPE *bias, long rows, long inputs, const struct lanes *s, long begin,
                                 long end, float *to, long stride) {
  const float *at[BLOCK];
  float *wide = s->wide + THREAD * BLOCK * inputs;
  for (long r = 0; r < BLOCK; r++) {
    long row = r < rows ? r : rows - 1;
    at[r] = (const float *)(M + row * inputs);
    if (sizeof(TYPE) == sizeof(float)) continue;
    at[r] = wide + row * inputs;
    for (long i = 0; i < inputs && r < rows; i++) wide[r * inputs + i] = FROM(M[r * inputs + i]);
  }
  for (long t = begin; t < end; t += s->side) {
    vector sums[BLOCK][LANES];
    (s->side == WIDE ? one_vector : all_vectors)(s->x + t * inputs, at, sums, inputs);
    long there = end - t < s->side ? end - t : s->side;
    for (long r = 0; r < BLOCK && r < rows; r++) {
      float add = bias ? FROM(bias[r]) : 0;
      for (long u = 0; u < there; u++) to[(t + u) * stride + r] = ((const float *)sums[r])[u] + add;
    }
  }
}

/* h = A x, rounded as this dtype rounds. */
static void NAME(inner_lanes)(const struct layer *l, const struct lanes *s, long tokens) {
  long side = s->side;
#pragma omp for schedule(static) collapse(2)
  for (long p = 0; p < l->rows; p += BLOCK)
    for (long begin = 0; begin < tokens; begin += 2 * side) {
      long rows = l->rows - p < BLOCK ? l->rows - p : BLOCK, end = begin + 2 * side < tokens ? begin + 2 * side : tokens;
      const TYPE *A = (const TYPE *)l->A + p * l->inputs;
      NAME(multiply_block)(A, 0, rows, l->inputs, s, begin, end, s->h + p, l->rows);
      for (long t = begin; t < end && sizeof(TYPE) < sizeof(float); t++)
        for (long r = p; r < p + rows; r++) s->h[t * l->rows + r] = FROM(TO(s->h[t * l->rows + r]));
    }
}

/* Choose for some tokens from number `begin` on, or take the weights that are held. */
static void NAME(choose_lanes)(const struct layer *l, const struct lanes *s, const struct many *m, long begin, long tokens,
                               float *scratch, long *chosen) {
  float *scores = scratch, *weights = scratch + l->experts;
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t++) {
    const float *h = s->h + t * l->rows;
    long row = (begin + t) * s->count / s->all;
    if (s->held) { /* all rows of A as if they were one expert */
      const TYPE *held = (const TYPE *)s->rows + row * l->rows;
      remember(l, m, t, 0, 0, 1, h);
      for (long p = 0; p < l->rows; p++) m->share[t * m->wide + p] *= FROM(held[p]);
      continue;
    }
    const float *prior = s->rows ? (const float *)s->rows + row * l->experts : 0;
    NAME(score)(h, l->centers, prior, scores, l->experts, l->rows / l->experts);
    choose(scores, l->experts, l->k, l->temperature, chosen, weights);
    for (long c = 0; c < l->k; c++) remember(l, m, t, c, chosen[c], weights[c], h);
  }
}

/* The base layer's outputs, or what `out` has of them, and the chosen experts'. */
static void NAME(outer_lanes)(const struct layer *l, const struct lanes *s, const struct many *m, TYPE *out, long tokens,
                              long threads) {
  float *strip = m->strips + THREAD * m->chunk * STRIP;
#pragma omp for schedule(static)
  for (long worker = 0; worker < threads; worker++) {
    struct part own = part_of(l->outputs, worker, threads);
    for (long from = own.begin; from < own.end; from += own.width) {
      long there = own.end - from < own.width ? own.end - from : own.width;
      if (!l->W) NAME(load_strip)(l, out, strip, from, there, tokens);
      for (long o = 0; o < there && l->W; o += BLOCK) {
        const TYPE *W = (const TYPE *)l->W + (from + o) * l->inputs, *bias = l->bias;
        long rows = there - o < BLOCK ? there - o : BLOCK;
        NAME(multiply_block)(W, bias ? bias + from + o : 0, rows, l->inputs, s, 0, tokens, strip + o, STRIP);
      }
      NAME(add_chosen)(l, m, strip, from, there);
      NAME(store_strip)(l, out, strip, from, there, tokens);
    }
  }
}

/* As route, or with `held` as held, of many tokens. */
int NAME(lanes)(const struct layer *l, const TYPE *x, const void *rows, TYPE *out, long tokens, long count, long held,
                long threads) {
  struct lanes s = {.rows = rows, .count = count, .held = held, .all = tokens, .side = tokens <= WIDE ? WIDE : LANES * WIDE};
  long chunk = ROUND(tokens < CHUNK ? tokens : CHUNK, s.side), own = l->experts + l->k;
  long longs = ROUND(threads * l->k, (long)(sizeof(vector) / sizeof(long)));
  long wide = sizeof(TYPE) == sizeof(float) ? 0 : threads * BLOCK * l->inputs;
  size_t floats = (chunk * (l->inputs + l->rows) + wide + threads * own) * sizeof(float);
  char *memory;
  struct many m = room_for(l, chunk, threads, longs * sizeof(long) + floats, &memory);
  if (!memory) return 1;
  s.x = (float *)((long *)memory + longs);
  s.h = s.x + chunk * l->inputs;
  s.wide = s.h + chunk * l->rows;
#pragma omp parallel num_threads(threads)
  for (long begin = 0; begin < tokens; begin += chunk) {
    long some = tokens - begin < chunk ? tokens - begin : chunk, *chosen = (long *)memory + THREAD * l->k;
    float *scratch = s.wide + wide + THREAD * own;
    NAME(lay_lanes)(x + begin * l->inputs, some, l->inputs, &s, threads);
    NAME(inner_lanes)(l, &s, some);
    NAME(choose_lanes)(l, &s, &m, begin, some, scratch, chosen);
    sort_chosen(l, &m, some);
    NAME(outer_lanes)(l, &s, &m, out + begin * l->stride, some, threads);
  }
  free(memory);
  return 0;
}
