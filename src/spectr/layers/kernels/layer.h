/* The functions of routing.c for one dtype: TYPE in memory, FROM(value) and TO(value) between it and float. */

/* h = A x for all tokens: each row of A is read once. Rounded as the layer's dtype rounds. */
static void NAME(inner)(const float *x, const TYPE *A, float *row, float *h, long tokens, long inputs, long rows) {
  for (long p = 0; p < rows; p++) {
    for (long i = 0; i < inputs; i++) row[i] = FROM(A[p * inputs + i]);
    for (long t = 0; t < tokens; t++) {
      const float *xt = x + t * inputs;
      float sum = 0;
      for (long i = 0; i < inputs; i++) sum += row[i] * xt[i];
      h[t * rows + p] = FROM(TO(sum));
    }
  }
}

static void NAME(outer)(float weight, const TYPE *row, float *sum, long outputs) {
  for (long o = 0; o < outputs; o++) sum[o] += weight * FROM(row[o]);
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

/* Of h = A x of any number of tokens the chosen: their rows and w_t h_t into `picked` and `shares`, (tokens, k rank)
   each; or, where `picked` is null, w_t h_t in place and zero for the rest. Returns 1 where there is no memory. */
int NAME(select)(TYPE *h, const TYPE *centers, const float *prior, int64_t *picked, TYPE *shares, long tokens,
                long rows_of_prior, long experts, long rank, long k, float temperature) {
  long rows = experts * rank;
  float *memory = malloc((rows + 2 * experts + k + 1) * sizeof(float) + k * sizeof(long));
  if (!memory) return 1;
  float *ht = memory, *scores = ht + rows, *left = scores + experts, *weights = left + experts;
  long *chosen = (long *)(memory + ((rows + 2 * experts + k + 1) & ~1L));
  for (long t = 0; t < tokens; t++) {
    for (long p = 0; p < rows; p++) ht[p] = FROM(h[t * rows + p]);
    const float *here = prior ? prior + (t * rows_of_prior / tokens) * experts : 0;
    NAME(score)(ht, centers, here, scores, experts, rank);
    choose(scores, left, experts, k, temperature, chosen, weights);
    if (!picked) memset(h + t * rows, 0, rows * sizeof *h);
    for (long c = 0; c < k; c++)
      for (long r = 0; r < rank; r++) {
        long p = chosen[c] * rank + r, place = (t * k + c) * rank + r;
        TYPE share = TO(weights[c] * ht[p]);
        if (picked) {
          picked[place] = p;
          shares[place] = share;
        } else {
          h[t * rows + p] = share;
        }
      }
  }
  free(memory);
  return 0;
}

/* out += sum over the chosen of w_t B_t h_t. Returns 1 where there is no memory, and has changed nothing. */
int NAME(route)(const TYPE *x, const TYPE *A, const TYPE *Bt, const TYPE *centers, const float *prior, TYPE *out,
               long tokens, long rows_of_prior, long inputs, long outputs, long experts, long rank, long k,
               float temperature) {
  long rows = experts * rank;
  size_t size = tokens * (inputs + rows) + inputs + outputs + 2 * experts + k;
  float *memory = malloc((size + 1) * sizeof(float) + k * sizeof(long));
  if (!memory) return 1;
  float *wide = memory, *h = wide + tokens * inputs, *row = h + tokens * rows, *sum = row + inputs,
        *scores = sum + outputs, *left = scores + experts, *weights = left + experts;
  long *chosen = (long *)(memory + ((size + 1) & ~(size_t)1));
  for (long i = 0; i < tokens * inputs; i++) wide[i] = FROM(x[i]);
  NAME(inner)(wide, A, row, h, tokens, inputs, rows);
  for (long t = 0; t < tokens; t++) {
    const float *ht = h + t * rows;
    const float *here = prior ? prior + (t * rows_of_prior / tokens) * experts : 0;
    NAME(score)(ht, centers, here, scores, experts, rank);
    choose(scores, left, experts, k, temperature, chosen, weights);
    memset(sum, 0, outputs * sizeof *sum);
    for (long c = 0; c < k; c++)
      for (long r = chosen[c] * rank; r < (chosen[c] + 1) * rank; r++)
        NAME(outer)(weights[c] * ht[r], Bt + r * outputs, sum, outputs);
    for (long o = 0; o < outputs; o++) out[t * outputs + o] = TO(FROM(out[t * outputs + o]) + sum[o]);
  }
  free(memory);
  return 0;
}

/* out += B (w h) with weights that are held, one row of them for each equal share of the tokens. */
int NAME(held)(const TYPE *x, const TYPE *A, const TYPE *Bt, const TYPE *weights, TYPE *out, long tokens,
                long rows_of_weights, long inputs, long outputs, long rows) {
  float *memory = malloc((tokens * (inputs + rows) + inputs + outputs) * sizeof(float));
  if (!memory) return 1;
  float *wide = memory, *h = wide + tokens * inputs, *row = h + tokens * rows, *sum = row + inputs;
  for (long i = 0; i < tokens * inputs; i++) wide[i] = FROM(x[i]);
  NAME(inner)(wide, A, row, h, tokens, inputs, rows);
  for (long t = 0; t < tokens; t++) {
    memset(sum, 0, outputs * sizeof *sum);
    for (long p = 0; p < rows; p++) {
      float weight = FROM(weights[(t * rows_of_weights / tokens) * rows + p]);
      if (weight != 0) NAME(outer)(weight * h[t * rows + p], Bt + p * outputs, sum, outputs);
    }
    for (long o = 0; o < outputs; o++) out[t * outputs + o] = TO(FROM(out[t * outputs + o]) + sum[o]);
  }
  free(memory);
  return 0;
}
