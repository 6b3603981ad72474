/* Many tokens without a matrix unit: the lanes of vectors are tokens, so that no sum goes across lanes. A block of rows of a
   matrix is multiplied with one vector of tokens, or two, while all sums stay in registers. */

/* sums = rows x of `vectors` vectors of tokens, whose numbers lie side by side for each input. */
INLINED void lanes_block(const float *x, const float *const *rows, vector to[][LANES], long inputs, int vectors) {
  vector sums[BLOCK][LANES]; /* here, so that they are in registers */
  const float *at[BLOCK];
  for (int r = 0; r < BLOCK; r++) {
    at[r] = rows[r];
    for (int v = 0; v < vectors; v++) sums[r][v] = (vector){0};
  }
  for (long i = 0; i < inputs; i++) {
    vector xi[LANES];
    for (int v = 0; v < vectors; v++) xi[v] = load_f32(x + (i * vectors + v) * WIDE);
    for (int r = 0; r < BLOCK; r++)
      for (int v = 0; v < vectors; v++) sums[r][v] += at[r][i] * xi[v];
  }
  for (int r = 0; r < BLOCK; r++)
    for (int v = 0; v < vectors; v++) to[r][v] = sums[r][v];
}

static void one_vector(const float *x, const float *const *rows, vector sums[][LANES], long inputs) {
  lanes_block(x, rows, sums, inputs, 1);
}

static void all_vectors(const float *x, const float *const *rows, vector sums[][LANES], long inputs) {
  lanes_block(x, rows, sums, inputs, LANES);
}

/* What a call of many tokens works with. */
struct lanes {
  float *x, *h;          /* of some tokens: as vectors, and A x, one token after the other */
  float *wide;           /* of each thread a block of rows as floats, where they are not */
  const void *rows;      /* the prior, or with `held` the weights; `count` rows that share all `tokens` */
  long count, held, all;
  long side;             /* tokens side by side: one vector of them, or LANES */
};

#define FUNCTIONS "lanes_layer.h"
#include "dtypes.h"
#undef FUNCTIONS
