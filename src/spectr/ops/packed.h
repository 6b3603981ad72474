/* Packed layers, as packed.c and tiles.c read them. */

struct module {
  const void *B, *centers; /* output factors as the function has them, and (routers, rows), taken away before scoring, or none */
  const float *scales; /* (routers, rows), A x is multiplied by before that, or none; then there are centers, too */
  long rows, first, begin, length; /* where its A x and its output begin in the layer's */
};

/* How a router selects experts. */
struct top_k {
  long k; /* experts at most */
  float temperature; /* of the softmax over their scores; 0 weighs them alike */
};

struct packed {
  int (*add)(const struct packed *l, const void *x, void *out, long stride, long tokens, long threads);
  const void *A; /* of all modules, as the function has them */
  const struct module *modules;
  const int32_t *columns; /* of the experts in a token's mask */
  const float *granted; /* masks of the tokens, `apart`: of an expert that may not be used no number; of one that may be chosen
                           what its score is multiplied by, from zero on; else minus the weight that it has unchosen */
  const struct top_k *selects; /* one for each router */
  const int32_t *routers; /* each token's, or none, where there is one router */
  const int64_t *sampled; /* tokens whose scores and weights, (requests, modules, experts), are kept, or none */
  float *scores, *weights;
  long apart, requests, count, experts, inputs, rows;
  long most;  /* experts of a token that have a weight, chosen or not */
  long parts; /* of each float32 where many tokens are multiplied by tiles; 0 without a matrix unit */
};
