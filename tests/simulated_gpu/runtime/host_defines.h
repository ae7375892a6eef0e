// What CUDA's headers want of their compiler. Ours is an ordinary one: these words mean nothing to it.
#pragma once
#define __host__
#define __device__
#define __forceinline__ inline
#define __device_builtin__
#define __device_builtin_surface_type__
#define __device_builtin_texture_type__
#define __cudart_builtin__
#define __location__(where)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __builtin_align__(bytes) __align__(bytes)
#define CUDARTAPI
#define CUDARTAPI_CDECL
