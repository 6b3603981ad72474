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

#define TYPE float
#define NAME(function) function##_f32
#define FROM(value) (value)
#define TO(value) (value)
#define LOAD(from) load_f32(from)
#define STORE(to, value) store_f32(to, value)
#include "masked.h"
#undef TYPE
#undef NAME
#undef FROM
#undef TO
#undef LOAD
#undef STORE

#define TYPE uint16_t
#define NAME(function) function##_bf16
#define FROM(value) from_bf16(value)
#define TO(value) to_bf16(value)
#define LOAD(from) load_bf16(from)
#define STORE(to, value) store_bf16(to, value)
#include "masked.h"
