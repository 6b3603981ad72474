/* The matrix unit of a processor (AMX). Its tiles multiply bfloat16 and sum in float32. */

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SIDE 16           /* rows of a tile, and words of a row */
#define DEEP (2 * SIDE)   /* terms of a sum that two tiles have */
#define TILE (SIDE * DEEP) /* bfloat16 numbers of a tile */

/* Whether the system lets this process have tiles. */
int tiles_allowed(void) {
  const long ask_for = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
}

/* What was written to this place and others is in memory: compilers do not know that tiles read it. */
static inline void written(const void *place) { __asm__ volatile("" ::"r"(place) : "memory"); }

/* A mask of the first `there` of 16 lanes. */
static inline __mmask16 first_of(long there) { return there >= SIDE ? 0xffff : there <= 0 ? 0 : (1 << there) - 1; }
