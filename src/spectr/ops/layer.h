/* The functions of routing.c for one dtype; see dtypes.h. */


/* Sums of products of ROWS rows and some tokens, which are a constant of the caller, so that all sums are in registers. */
static inline __attribute__((always_inline)) void NAME(block)(const float *x, const TYPE *const *from, vector sums[][ROWS],
                                                              long inputs, long whole, int tokens) {
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < ROWS; r++) sums[t][r] = (vector){0};
  for (long i = 0; i < whole; i += WIDE) {
    vector m[ROWS];
    for (int r = 0; r < ROWS; r++) m[r] = LOAD(from[r] + i);
    for (int t = 0; t < tokens; t++) {
      vector xi = load_f32(x + t * inputs + i);
      for (int r = 0; r < ROWS; r++) sums[t][r] += xi * m[r];
    }
  }
}

/* to = M x + bias for all tokens: each row of M is read once, by one thread. A thread reads its rows in ROWS streams, each
   from end to end, as memory is read best. `rounds`: as the layer's dtype rounds. Threads do not wait for each other at
   the end. */
static void NAME(products)(const float *x, const TYPE *M, const TYPE *bias, float *to, long tokens, long inputs, long rows,
                           int rounds, long threads) {
  long whole = inputs - inputs % WIDE;
#pragma omp for schedule(static) nowait
  for (long worker = 0; worker < threads; worker++) {
    long begin = worker * rows / threads, end = (worker + 1) * rows / threads, stream = (end - begin + ROWS - 1) / ROWS;
    for (long first = begin; first < begin + stream; first++) {
      const TYPE *from[ROWS]; /* where a stream has ended the last row once more */
      long row[ROWS];
      for (int r = 0; r < ROWS; r++) {
        row[r] = first + r * stream < end ? first + r * stream : end - 1;
        from[r] = M + row[r] * inputs;
      }
      for (long t = 0; t < tokens;) {
        vector sums[TOKENS][ROWS];
        int some = tokens - t < TOKENS ? 1 : TOKENS;
        if (some == TOKENS)
          NAME(block)(x + t * inputs, from, sums, inputs, whole, TOKENS);
        else
          NAME(block)(x + t * inputs, from, sums, inputs, whole, 1);
        for (long u = 0; u < some; u++, t++)
          for (int r = 0; r < ROWS; r++) {
            float sum = bias ? FROM(bias[row[r]]) : 0;
            for (int v = 0; v < WIDE; v++) sum += sums[u][r][v];
            for (long i = whole; i < inputs; i++) sum += x[t * inputs + i] * FROM(from[r][i]);
            to[t * rows + row[r]] = rounds ? FROM(TO(sum)) : sum;
          }
      }
    }
  }
}

/* The tokens as floats: themselves, or in `room`. */
static const float *NAME(widened)(const TYPE *x, float *room, long numbers) {
  if (sizeof(TYPE) == sizeof(float)) return (const float *)x;
#pragma omp for schedule(static)
  for (long i = 0; i < numbers; i++) room[i] = FROM(x[i]);
  return room;
}

/* out = sums + sum over n rows of share * Bt[row], of few tokens, from where Bt lies: ROWS rows side by side from end to
   end, as memory is read best. Each thread has a part of the outputs. */
static void NAME(outer_few)(TYPE *out, const TYPE *Bt, const int32_t *row, const float *share, const int32_t *count,
                            long tokens, long n, long outputs, float *all, long threads) {
  long part = (outputs + threads - 1) / threads;
  part += (WIDE - part % WIDE) % WIDE;
#pragma omp for schedule(static)
  for (long worker = 0; worker < threads; worker++) {
    long from = worker * part, width = outputs - from < part ? outputs - from : part;
    long whole = width - width % WIDE;
    for (long t = 0; t < tokens && width > 0; t++) {
      const int32_t *rows = row + t * n;
      const float *shares = share + t * n;
      float *sums = all + t * outputs + from;
      for (long j = 0; j < count[t]; j += ROWS) {
        const TYPE *at[ROWS];
        float by[ROWS];
        for (int r = 0; r < ROWS; r++) { /* past the last row the first, by zero of it */
          int there = j + r < count[t];
          at[r] = Bt + (long)rows[there ? j + r : j] * outputs + from;
          by[r] = there ? shares[j + r] : 0;
        }
        for (long o = 0; o < whole; o += WIDE) {
          vector sum = load_f32(sums + o);
          for (int r = 0; r < ROWS; r++) sum += by[r] * LOAD(at[r] + o);
          store_f32(sums + o, sum);
        }
        for (long o = whole; o < width; o++)
          for (int r = 0; r < ROWS; r++) sums[o] += by[r] * FROM(at[r][o]);
      }
      for (long o = 0; o < width; o++) out[t * outputs + from + o] = TO(sums[o]);
    }
  }
}

/* HELD rows of Bt, HELD_WIDE vectors of each; zeros for rows and outputs that are not there. */
static inline void NAME(hold)(const TYPE *Bt, long rows, long stride, long outputs, vector held[HELD][HELD_WIDE]) {
  for (long r = 0; r < HELD; r++)
    for (long v = 0; v < HELD_WIDE; v++) {
      TYPE edge[WIDE] = {0};
      const TYPE *at = Bt + r * stride + v * WIDE;
      long there = outputs - v * WIDE;
      if (r >= rows || there <= 0)
        held[r][v] = (vector){0};
      else if (there >= WIDE)
        held[r][v] = LOAD(at);
      else {
        memcpy(edge, at, there * sizeof *edge);
        held[r][v] = LOAD(edge);
      }
    }
}

/* A strip of the outputs as floats by themselves, and back: `there` outputs of each token, from `from` on. */
static void NAME(load_strip)(const struct layer *l, const TYPE *out, float *strip, long from, long there, long tokens) {
  for (long t = 0; t < tokens; t++) {
    const TYPE *at = out + t * l->stride + from;
    long o = 0;
    for (; o + WIDE <= there; o += WIDE) {
      __builtin_prefetch(at + AHEAD * l->stride + o, 1);
      store_f32(strip + t * STRIP + o, LOAD(at + o));
    }
    for (; o < there; o++) strip[t * STRIP + o] = FROM(at[o]);
  }
}

static void NAME(store_strip)(const struct layer *l, TYPE *out, const float *strip, long from, long there, long tokens) {
  for (long t = 0; t < tokens; t++) {
    TYPE *at = out + t * l->stride + from;
    long o = 0;
    for (; o + WIDE <= there; o += WIDE) STORE(at + o, load_f32(strip + t * STRIP + o));
    for (; o < there; o++) at[o] = TO(strip[t * STRIP + o]);
  }
}

/* strip += sum over the chosen of w_t B_t h_t: one expert after the other, whose rows of Bt stay in registers while its
   tokens pass by. */
static void NAME(add_chosen)(const struct layer *l, const struct many *m, float *strip, long from, long there) {
  long rank = l->rows / l->experts, outputs = l->outputs;
  for (long e = 0; e < l->experts; e++)
    for (long r = 0; r < rank && m->begins[e] < m->begins[e + 1]; r += HELD) {
      const TYPE *rows = (const TYPE *)l->Bt + (e * rank + r) * outputs + from;
      for (long o = 0; o < there; o += HELD_WIDE * WIDE) {
        vector held[HELD][HELD_WIDE];
        NAME(hold)(rows + o, rank - r, outputs, there - o, held);
        for (long i = m->begins[e]; i < m->begins[e + 1]; i++) {
          const float *share = m->share + m->order[i] * m->wide + r;
          float *to = strip + (long)m->token[i] * STRIP + o;
          vector sums[HELD_WIDE];
          for (int v = 0; v < HELD_WIDE; v++) sums[v] = load_f32(to + v * WIDE);
          for (int q = 0; q < HELD; q++)
            for (int v = 0; v < HELD_WIDE; v++) sums[v] += share[q] * held[q][v];
          for (int v = 0; v < HELD_WIDE; v++) store_f32(to + v * WIDE, sums[v]);
        }
      }
    }
}

/* out += sum over the chosen of w_t B_t h_t, of many tokens. */
static void NAME(outer_many)(const struct layer *l, const struct many *m, TYPE *out, long tokens, long threads) {
  float *strip = m->strips + THREAD * m->chunk * STRIP;
#pragma omp for schedule(static)
  for (long worker = 0; worker < threads; worker++) {
    struct part own = part_of(l->outputs, worker, threads);
    for (long from = own.begin; from < own.end; from += own.width) {
      long there = own.end - from < own.width ? own.end - from : own.width;
      NAME(load_strip)(l, out, strip, from, there, tokens);
      NAME(add_chosen)(l, m, strip, from, there);
      NAME(store_strip)(l, out, strip, from, there, tokens);
    }
  }
}

static void NAME(score)(const float *ht, const TYPE *centers, const float *prior, float *scores, long experts,
                       long rank) {
  for (long e = 0; e < experts; e++) {
    float square = 0;
    for (long r = e * rank; r < (e + 1) * rank; r++) {
      float scored = centers ? FROM(TO(ht[r] - FROM(centers[r]))) : ht[r];
      square += scored * scored;
    }
    scores[e] = sqrtf(square) * (prior ? prior[e] : 1.0f);
  }
}

/* The experts that may be among the best of a token, as its rough h has it, into `near`; whose scores are no numbers may be.
   Returns how many. What a score is off by: what bfloat16 leaves out, and what float32 rounds in lengths and scores. */
static long NAME(find_near)(const struct layer *l, const float *x, const float *ht, const float *prior, float *scratch,
                            long *chosen, int32_t *near) {
  long experts = l->experts, rank = l->rows / experts, found = 0;
  float *scores = scratch, *least = scores + experts, *weights = least + experts, square = 0;
  for (long i = 0; i < l->inputs; i++) square += x[i] * x[i];
  float length = sqrtf(square) * (1 + 1e-3f) + TINY;
  NAME(score)(ht, l->centers, prior, scores, experts, rank);
  for (long e = 0; e < experts; e++) {
    float error = (l->errors[e] * length + TINY) * (prior ? fabsf(prior[e]) : 1) + rounding_of(rank) * fabsf(scores[e]);
    least[e] = scores[e] - error;
    scores[e] += error;
  }
  choose(least, experts, l->k, 0, chosen, weights);
  for (long e = 0; e < experts; e++)
    if (!(scores[e] < least[chosen[l->k - 1]])) near[found++] = e;
  return found;
}

/* h = A x of the experts that are near, `near` of each token first how many; found by what A is roughly, into `rough`. */
static void NAME(inner_near)(const struct layer *l, const float *x, const float *prior, long rows_of_prior, float *rough,
                             float *h, int32_t *near, float *scratch, long *chosen, long tokens, long threads) {
  long rank = l->rows / l->experts, own = l->experts + 1;
  products_bf16(x, l->rough, 0, rough, tokens, l->inputs, l->rows, 0, threads);
#pragma omp barrier
#pragma omp for schedule(static)
  for (long t = 0; t < tokens; t++) {
    const float *priors = prior ? prior + (t * rows_of_prior / tokens) * l->experts : 0;
    near[t * own] = NAME(find_near)(l, x + t * l->inputs, rough + t * l->rows, priors, scratch, chosen, near + t * own + 1);
  }
  for (long t = 0; t < tokens; t++)
    for (long i = 1; i <= near[t * own]; i++) {
      long row = near[t * own + i] * rank;
      const TYPE *rows = (const TYPE *)l->A + row * l->inputs;
      NAME(products)(x + t * l->inputs, rows, 0, h + t * l->rows + row, 1, l->inputs, rank, 1, threads);
    }
}

/* As score, of the experts that are near; of the others minus infinity. */
static void NAME(score_near)(const struct layer *l, const float *ht, const float *prior, const int32_t *near, float *scores) {
  long rank = l->rows / l->experts;
  for (long e = 0; e < l->experts; e++) scores[e] = -INFINITY;
  for (long i = 1; i <= near[0]; i++) {
    long e = near[i], row = e * rank;
    const TYPE *centers = l->centers ? (const TYPE *)l->centers + row : 0;
    NAME(score)(ht + row, centers, prior ? prior + e : 0, scores + e, 1, rank);
  }
}

/* Of h = A x in place: w_t h_t of the chosen, zero for the rest. Returns 1 where there is no memory. */
int NAME(select)(const struct layer *l, TYPE *h, const float *prior, long tokens, long rows_of_prior, long threads) {
  long rows = l->rows, experts = l->experts, rank = rows / experts, k = l->k, own = rows + experts + k;
  float *memory = malloc(threads * own * sizeof(float));
  long *choices = malloc(threads * k * sizeof(long));
  int failed = !memory || !choices;
  if (!failed) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long worker = 0; worker < threads; worker++) {
      float *ht = memory + worker * own, *scores = ht + rows, *weights = scores + experts;
      long *chosen = choices + worker * k;
      for (long t = worker * tokens / threads; t < (worker + 1) * tokens / threads; t++) {
        for (long p = 0; p < rows; p++) ht[p] = FROM(h[t * rows + p]);
        NAME(score)(ht, l->centers, prior ? prior + (t * rows_of_prior / tokens) * experts : 0, scores, experts, rank);
        choose(scores, experts, k, l->temperature, chosen, weights);
        memset(h + t * rows, 0, rows * sizeof *h);
        for (long c = 0; c < k; c++)
          for (long p = chosen[c] * rank; p < (chosen[c] + 1) * rank; p++) h[t * rows + p] = TO(weights[c] * ht[p]);
      }
    }
  }
  free(memory);
  free(choices);
  return failed;
}

/* The base layer's output, or what `out` has of it, as floats. */
static void NAME(begin)(const struct layer *l, const float *x, const TYPE *out, float *sums, long tokens,
                        long threads) {
  if (l->W) {
    NAME(products)(x, l->W, l->bias, sums, tokens, l->inputs, l->outputs, 0, threads);
    return;
  }
#pragma omp for schedule(static) nowait
  for (long o = 0; o < tokens * l->outputs; o++) sums[o] = FROM(out[o]);
}

/* out += sum over the chosen of w_t B_t h_t, with h = A x, of few tokens; where the layer has W, out = W x + bias + that sum.
   Returns 1 where there is no memory, and has changed nothing. */
int NAME(route)(const struct layer *l, const TYPE *x, const float *prior, TYPE *out, long tokens, long rows_of_prior,
                long threads) {
  long rows = l->rows, experts = l->experts, rank = rows / experts, k = l->k, n = k * rank, own = 2 * experts + k;
  int roughly = reads_roughly(l, tokens);
  long floats = tokens * ((roughly ? 2 : 1) * rows + n + l->outputs + l->inputs) + threads * own;
  float *memory = malloc(floats * sizeof(float));
  int32_t *places = malloc(tokens * (n + 2 + experts) * sizeof(int32_t));
  long *choices = malloc(threads * k * sizeof(long));
  int failed = !memory || !places || !choices;
  if (!failed) {
    float *h = memory, *share = h + tokens * rows, *sums = share + tokens * n;
    float *tokens_as_floats = sums + tokens * l->outputs, *scratches = tokens_as_floats + tokens * l->inputs;
    float *rough = scratches + threads * own;
    int32_t *row = places, *count = row + tokens * n, *near = count + tokens;
#pragma omp parallel num_threads(threads)
    {
      const float *wide = NAME(widened)(x, tokens_as_floats, tokens * l->inputs);
      float *scores = scratches + THREAD * own, *weights = scores + 2 * experts;
      long *chosen = choices + THREAD * k;
      NAME(begin)(l, wide, out, sums, tokens, threads);
      if (roughly)
        NAME(inner_near)(l, wide, prior, rows_of_prior, rough, h, near, scores, chosen, tokens, threads);
      else
        NAME(products)(wide, l->A, 0, h, tokens, l->inputs, rows, 1, threads);
#pragma omp barrier
#pragma omp for schedule(static)
      for (long t = 0; t < tokens; t++) {
        const float *ht = h + t * rows, *priors = prior ? prior + (t * rows_of_prior / tokens) * experts : 0;
        if (roughly)
          NAME(score_near)(l, ht, priors, near + t * (experts + 1), scores);
        else
          NAME(score)(ht, l->centers, priors, scores, experts, rank);
        choose(scores, experts, k, l->temperature, chosen, weights);
        count[t] = n;
        for (long c = 0; c < k; c++)
          for (long r = 0; r < rank; r++) {
            row[t * n + c * rank + r] = chosen[c] * rank + r;
            share[t * n + c * rank + r] = weights[c] * ht[chosen[c] * rank + r];
          }
      }
      NAME(outer_few)(out, l->Bt, row, share, count, tokens, n, l->outputs, sums, threads);
    }
  }
  free(memory);
  free(places);
  free(choices);
  return failed;
}

/* As route, of many tokens whose h is given. */
int NAME(route_many)(const struct layer *l, const TYPE *h, const float *prior, TYPE *out, long tokens, long rows_of_prior,
                     long threads) {
  long rows = l->rows, experts = l->experts, rank = rows / experts, k = l->k, own = rows + experts + k;
  char *memory;
  struct many m = room_for(l, CHUNK, threads, threads * (own * sizeof(float) + k * sizeof(long)), &memory);
  if (!memory) return 1;
#pragma omp parallel num_threads(threads)
  for (long begin = 0; begin < tokens; begin += CHUNK) {
    long some = tokens - begin < CHUNK ? tokens - begin : CHUNK;
#pragma omp for schedule(static)
    for (long worker = 0; worker < threads; worker++) {
      long *chosen = (long *)memory + worker * k;
      float *ht = (float *)((long *)memory + threads * k) + worker * own, *scores = ht + rows, *weights = scores + experts;
      for (long t = worker * some / threads; t < (worker + 1) * some / threads; t++) {
        long token = begin + t;
        for (long p = 0; p < rows; p++) ht[p] = FROM(h[token * rows + p]);
        NAME(score)(ht, l->centers, prior ? prior + (token * rows_of_prior / tokens) * experts : 0, scores, experts, rank);
        choose(scores, experts, k, l->temperature, chosen, weights);
        for (long c = 0; c < k; c++) remember(l, &m, t, c, chosen[c], weights[c], ht);
      }
    }
    sort_chosen(l, &m, some);
    NAME(outer_many)(l, &m, out + begin * l->stride, some, threads);
  }
  free(memory);
  return 0;
}

/* As route of few tokens, with weights of the rows of A that are held, one row of them for each equal share of the tokens. */
int NAME(held)(const struct layer *l, const TYPE *x, const TYPE *weights, TYPE *out, long tokens, long rows_of_weights,
               long threads) {
  long rows = l->rows;
  float *memory = malloc(tokens * (2 * rows + l->outputs + l->inputs) * sizeof(float));
  int32_t *places = malloc(tokens * (rows + 1) * sizeof(int32_t));
  int failed = !memory || !places;
  if (!failed) {
    float *h = memory, *share = h + tokens * rows, *sums = share + tokens * rows;
    float *tokens_as_floats = sums + tokens * l->outputs;
    int32_t *row = places, *count = row + tokens * rows;
#pragma omp parallel num_threads(threads)
    {
      const float *wide = NAME(widened)(x, tokens_as_floats, tokens * l->inputs);
      NAME(begin)(l, wide, out, sums, tokens, threads);
      NAME(products)(wide, l->A, 0, h, tokens, l->inputs, rows, 1, threads);
#pragma omp barrier
#pragma omp for schedule(static)
      for (long t = 0; t < tokens; t++) {
        long n = 0;
        for (long p = 0; p < rows; p++) {
          float weight = FROM(weights[(t * rows_of_weights / tokens) * rows + p]);
          if (weight == 0) continue;
          row[t * rows + n] = p;
          share[t * rows + n++] = weight * h[t * rows + p];
        }
        count[t] = n;
      }
      NAME(outer_few)(out, l->Bt, row, share, count, tokens, rows, l->outputs, sums, threads);
    }
  }
  free(memory);
  free(places);
  return failed;
}
