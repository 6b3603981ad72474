/* Packed layers whose tokens may each use other experts: what these add to the base layer's output, as an operation of torch.
   For float32 and bfloat16 by the kernels of routing.c, with A as it is and each module's B turned; tiles.c has another way.
   */

#include "routing.c"

#include <stdio.h>

#include "packed.h"

#ifdef _OPENMP
#define THREADS omp_get_max_threads()
#else
#define THREADS 1
#endif
#define FEW 16 /* tokens up to which vectors are faster than tiles, as measured */

/* What a call works with. */
struct room {
  float *h, *wide; /* A x of a CHUNK of tokens, `stride` apart, and the tokens as floats where they are not */
  long stride;
#ifdef __AMX_BF16__
  struct tiles tiles;
#endif
};

/* Room from `at` on; gives where it ends. */
static char *lay_out(struct room *r, const struct packed *p, long tokens, int narrow, long threads, char *at) {
  long most = tokens < CHUNK ? tokens : CHUNK;
  *r = (struct room){.stride = p->rows};
#ifdef __AMX_BF16__
  if (p->parts && tokens > FEW) {
    r->tiles = tiles_for(p->rows, p->inputs, tokens, p->parts, threads, &at);
    r->h = r->tiles.h;
    r->stride = r->tiles.rows;
    return at;
  }
#endif
  r->h = taken(&at, most * p->rows * sizeof *r->h);
  r->wide = taken(&at, narrow * most * p->inputs * sizeof *r->wide);
  return at;
}

#define FUNCTIONS "packed_layer.h"
#include "dtypes.h"
#undef FUNCTIONS

/* What torch has for operations that are written in C; all give 0. */
static struct {
  int (*data)(void *tensor, void **found), (*size)(void *tensor, int64_t dimension, int64_t *found);
  int (*stride)(void *tensor, int64_t dimension, int64_t *found), (*release)(void *tensor);
} torch;

void meet(void *data, void *size, void *stride, void *release) {
  memcpy(&torch, (void *[]){data, size, stride, release}, sizeof torch);
}

/* The operation (out, x, where the layer is), as torch's dispatcher calls it. */
void operation(uint64_t *stack, uint64_t inputs, uint64_t outputs) {
  void *tensors[3], *data[3];
  int64_t tokens, stride;
  int failed = inputs != 3 || outputs != 0;
  memcpy(tensors, stack, sizeof tensors);
  for (int n = 0; n < 3; n++) failed |= torch.data(tensors[n], data + n);
  failed |= torch.size(tensors[0], 0, &tokens) | torch.stride(tensors[0], 0, &stride);
  const struct packed *layer = failed ? 0 : *(struct packed **)data[2];
  if (failed || layer->add(layer, data[1], data[0], stride, tokens, THREADS)) {
    fprintf(stderr, "spectr: no memory for the experts of %ld tokens\n", (long)tokens);
    abort(); /* there is no way to tell torch */
  }
  for (int n = 0; n < 3; n++) torch.release(tensors[n]);
}
