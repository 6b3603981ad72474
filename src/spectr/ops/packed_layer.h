/* The functions of packed.c for one dtype. */

/* Lengths of the experts' parts of h, each row scaled, less the centers. */
static void NAME(score_scaled)(const float *h, const TYPE *centers, const float *scales, float *scores, long experts,
                               long rank) {
  for (long e = 0; e < experts; e++) {
    float square = 0;
    for (long r = e * rank; r < (e + 1) * rank; r++) {
      float scored = h[r] * scales[r] - FROM(centers[r]);
      square += scored * scored;
    }
    scores[e] = sqrtf(square);
  }
}

/* One token's weights for module `s`: those that it was given, or chosen among the experts that it may use, as in a library
   that has no others. */
static void NAME(choose_granted)(const struct packed *p, long s, const struct layer *l, const struct many *m,
                                 const float *h, long token, long place) {
  long experts = l->experts, chosen[l->k], count = 0;
  float scores[experts], weights[l->k];
  const float *granted = p->granted + token * p->apart;
  long router = p->routers ? p->routers[token] : 0;
  const struct top_k *select = p->selects + router;
  const float *scales = p->modules[s].scales;
  long own = router * l->rows, rank = l->rows / experts;
  if (scales)
    NAME(score_scaled)(h, (const TYPE *)l->centers + own, scales + own, scores, experts, rank);
  else
    NAME(score)(h, l->centers, 0, scores, experts, rank);
  for (long e = 0; e < experts; e++) {
    float given = granted[p->columns[e]];
    if (given >= 0) scores[e] *= given;
    if (given < 0 && count < l->k) {
      chosen[count] = e;
      weights[count++] = -given;
    }
  }
  for (long n = 0; p->sampled && n < p->requests; n++)
    if (p->sampled[n] == token) memcpy(p->scores + (n * p->count + s) * experts, scores, experts * sizeof *scores);
  if (count == 0) {
    for (long e = 0; e < experts; e++)
      if (!(granted[p->columns[e]] >= 0)) scores[e] = -INFINITY;
    choose(scores, experts, count = select->k, select->temperature, chosen, weights);
  }
  for (; count < l->k; count++) {
    chosen[count] = 0;
    weights[count] = 0;
  }
  for (long c = 0; c < l->k; c++) remember(l, m, place, c, chosen[c], weights[c], h);
  for (long n = 0; p->sampled && n < p->requests; n++)
    if (p->sampled[n] == token) {
      float *kept = p->weights + (n * p->count + s) * experts;
      memset(kept, 0, experts * sizeof *kept);
      for (long c = 0; c < l->k; c++) kept[chosen[c]] += weights[c];
    }
}

/* What one module's experts add to some tokens, which begin at `begin`. */
static void NAME(add_module)(const struct packed *p, long s, const struct many *m, const struct room *room, TYPE *out,
                             long stride, long begin, long tokens, long threads) {
  const struct module *own = p->modules + s;
  const struct layer l = {.Bt = own->B, .centers = own->centers, .outputs = own->length, .rows = own->rows,
                          .experts = p->experts, .k = p->most, .stride = stride};
  out += begin * stride + own->begin;
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t++)
    NAME(choose_granted)(p, s, &l, m, room->h + t * room->stride + own->first, begin + t, t);
  sort_chosen(&l, m, tokens);
  NAME(outer_many)(&l, m, out, tokens, threads);
}

/* h = A x of some tokens. */
static void NAME(inner)(const struct packed *p, const struct room *room, const TYPE *x, long tokens, long threads) {
#ifdef __AMX_BF16__
  if (room->tiles.each) {
    const struct layer l = {.A = p->A, .inputs = p->inputs, .rows = p->rows};
    struct tiles here = room->tiles;
    here.tokens = ROUND(tokens, 2 * SIDE);
    tiles_begin();
    NAME(inner_alone)(&l, &here, x, tokens, p->parts, threads);
    _tile_release();
    return;
  }
#endif
  const float *wide = NAME(widened)(x, room->wide, tokens * p->inputs);
  NAME(products)(wide, p->A, 0, room->h, tokens, p->inputs, p->rows, 1, threads);
#pragma omp barrier
}

/* out += what the experts add, with `stride` between its tokens. Returns 1 where there is no memory, and has changed nothing. */
int NAME(add)(const struct packed *p, const void *x, void *out, long stride, long tokens, long threads) {
  const struct layer one = {.rows = p->modules->rows, .experts = p->experts, .k = p->most};
  int narrow = sizeof(TYPE) < sizeof(float);
  char *memory;
  struct room room;
  struct many m = room_for(&one, CHUNK, threads, (size_t)lay_out(&room, p, tokens, narrow, threads, 0), &memory);
  if (!memory) return 1;
  lay_out(&room, p, tokens, narrow, threads, memory);
#pragma omp parallel num_threads(threads)
  for (long begin = 0; begin < tokens; begin += CHUNK) {
    long some = tokens - begin < CHUNK ? tokens - begin : CHUNK;
    NAME(inner)(p, &room, (const TYPE *)x + begin * p->inputs, some, threads);
    for (long s = 0; s < p->count; s++) NAME(add_module)(p, s, &m, &room, out, stride, begin, some, threads);
  }
  free(memory);
  return 0;
}
