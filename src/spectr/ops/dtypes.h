/* FUNCTIONS once for each dtype: TYPE in memory, FROM, TO, LOAD and STORE between it and float. */

#define TYPE float
#define NAME(function) function##_f32
#define FROM(value) (value)
#define TO(value) (value)
#define LOAD(from) load_f32(from)
#define STORE(to, value) store_f32(to, value)
#include FUNCTIONS
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
#include FUNCTIONS
#undef TYPE
#undef NAME
#undef FROM
#undef TO
#undef LOAD
#undef STORE
