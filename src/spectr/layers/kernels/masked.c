/* A packed layer whose tokens may each use other experts: the decisions, and few tokens' outputs. See routing.c. */

#include "routing.c"

struct module {
  const void *Bt, *centers; /* (rows, length), and (rows) or none */
  long rows, first, begin, length; /* where its A x lies in y and its output in out */
};

struct packed {
  const struct module *modules;
  const int32_t *columns; /* of the experts in a token's mask */
  long count, experts, k, outputs, width; /* y is (tokens, width): the base layer's outputs, then A x of the modules */
  float temperature;
};

#define FUNCTIONS "masked.h"
#include "dtypes.h"
#undef FUNCTIONS
