/* The functions of masked.c for one dtype. */

/* One token's weights among the experts that it may use: of `there` of these, as in a library that has no others. */
static void NAME(among)(const struct packed *l, const TYPE *h, const struct module *m, const uint8_t *allowed,
                        float *scores, float *weights, float *some, long *places) {
  long experts = l->experts, rank = m->rows / experts, there = 0;
  float *picked = some + experts;
  long *chosen = places + experts;
  for (long e = 0; e < experts; e++) {
    weights[e] = 0;
    float square = 0;
    for (long r = e * rank; r < (e + 1) * rank; r++) {
      float scored = m->centers ? FROM(TO(FROM(h[r]) - FROM(((const TYPE *)m->centers)[r]))) : FROM(h[r]);
      square += scored * scored;
    }
    scores[e] = sqrtf(square);
    if (allowed[l->columns[e]]) {
      some[there] = scores[e];
      places[there++] = e;
    }
  }
  long k = l->k < there ? l->k : there;
  if (k == 0) return;
  choose(some, there, k, l->temperature, chosen, picked);
  for (long c = 0; c < k; c++) weights[places[chosen[c]]] = picked[c];
}

/* Of each module, one after the other: w A x of its experts, (tokens, rows), zero where w is. `scores` and `weights`,
   (requests, modules, experts), are those of the tokens that `sampled` names, where they are wanted. */
int NAME(decide)(const struct packed *l, const TYPE *y, const uint8_t *allowed, long stride, TYPE *weighted,
                 const int64_t *sampled, long requests, float *scores, float *weights, long tokens, long threads) {
  long experts = l->experts, each = l->count * experts;
  float *memory = malloc((2 * tokens * each + 2 * threads * experts) * sizeof(float));
  long *choices = malloc(2 * threads * experts * sizeof(long));
  int failed = !memory || !choices;
  if (!failed) {
    float *every = memory, *shares = memory + tokens * each;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long worker = 0; worker < threads; worker++) {
      float *some = shares + tokens * each + 2 * worker * experts;
      long *places = choices + 2 * worker * experts;
      for (long t = worker * tokens / threads; t < (worker + 1) * tokens / threads; t++) {
        TYPE *block = weighted;
        for (long s = 0; s < l->count; s++) {
          const struct module *m = l->modules + s;
          const TYPE *h = y + t * l->width + m->first;
          float *share = shares + t * each + s * experts;
          NAME(among)(l, h, m, allowed + t * stride, every + t * each + s * experts, share, some, places);
          long rank = m->rows / experts;
          TYPE *to = block + t * m->rows;
          for (long e = 0; e < experts; e++)
            for (long r = e * rank; r < (e + 1) * rank; r++) to[r] = share[e] == 0 ? 0 : TO(share[e] * FROM(h[r]));
          block += tokens * m->rows;
        }
      }
    }
    for (long n = 0; n < requests; n++) {
      memcpy(scores + n * each, every + sampled[n] * each, each * sizeof(float));
      memcpy(weights + n * each, shares + sampled[n] * each, each * sizeof(float));
    }
  }
  free(memory);
  free(choices);
  return failed;
}

/* out = the base layer's outputs + B w A x, of few tokens. */
int NAME(add)(const struct packed *l, const TYPE *y, const TYPE *weighted, TYPE *out, long tokens) {
  long most = 0;
  for (long s = 0; s < l->count; s++) most = l->modules[s].rows > most ? l->modules[s].rows : most;
  float *memory = malloc((l->outputs + most) * sizeof(float));
  int32_t *row = malloc((most + 1) * sizeof(int32_t));
  int failed = !memory || !row;
  for (long t = 0; t < tokens && !failed; t++) {
    memcpy(out + t * l->outputs, y + t * l->width, l->outputs * sizeof(TYPE));
    const TYPE *block = weighted;
    for (long s = 0; s < l->count; s++) {
      const struct module *m = l->modules + s;
      const TYPE *own = block + t * m->rows;
      float *share = memory + l->outputs, *sums = memory;
      TYPE *to = out + t * l->outputs + m->begin;
      int32_t count = 0;
      for (long p = 0; p < m->rows; p++)
        if (FROM(own[p]) != 0) {
          row[count] = p;
          share[count++] = FROM(own[p]);
        }
      block += tokens * m->rows;
      if (count == 0) continue;
      for (long o = 0; o < m->length; o++) sums[o] = FROM(to[o]);
      NAME(outer_few)(to, m->Bt, row, share, &count, 1, m->rows, m->length, sums, 1);
    }
  }
  free(memory);
  free(row);
  return failed;
}

/* out = y + added, of `length` outputs of each token; their tokens lie as far apart as the next three say. */
void NAME(sum)(const TYPE *y, const TYPE *added, TYPE *out, long y_stride, long added_stride, long out_stride,
               long tokens, long length) {
  long whole = length - length % WIDE;
  for (long t = 0; t < tokens; t++) {
    const TYPE *from = y + t * y_stride, *more = added + t * added_stride;
    TYPE *to = out + t * out_stride;
    for (long o = 0; o < whole; o += WIDE) STORE(to + o, LOAD(from + o) + LOAD(more + o));
    for (long o = whole; o < length; o++) to[o] = TO(FROM(from[o]) + FROM(more[o]));
  }
}
