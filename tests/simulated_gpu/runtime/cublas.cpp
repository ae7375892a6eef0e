// Stand-ins for cuBLAS and cuBLASLt: nothing is computed, the stream is charged what a matrix product costs.
#include <cstddef>
#include <cstdint>

extern "C" {

void simulated_cost(void* stream, double flops, double bytes);  // of the runtime

static int product(void* stream, double m, double n, double k, double size, double batch = 1) {
  simulated_cost(stream, 2 * m * n * k * batch, (m * k + k * n + m * n) * size * batch);
  return 0;
}
static double size_of(int type) {
  return type == 0 || type == 10 ? 4 : type == 1 ? 8 : type == 2 || type == 14 ? 2 : 1;
}  // cudaDataType

#ifdef SIMULATES_LIBCUBLASLT

struct Layout {
  int type;
  double rows, columns;
  int32_t batch;
};
int cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t columns, int64_t) {
  *layout = new Layout{type, (double)rows, (double)columns, 1};
  return 0;
}
int cublasLtMatrixLayoutDestroy(Layout* layout) {
  delete layout;
  return 0;
}
int cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t) {
  if (attribute == 5) layout->batch = *(const int32_t*)value;  // CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT
  return 0;
}
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) {
  *found = 1;
  return 0;
}
int cublasLtMatmul(void*, void*, const void*, const void*, const Layout* a, const void*, const Layout*, const void*,
                   const void*, const void*, void*, const Layout* out, const void*, void*, size_t, void* stream) {
  return product(stream, out->rows, out->columns, a->rows * a->columns / out->rows, size_of(a->type), out->batch);
}

#else

struct Handle {
  void* stream;
};
int cublasCreate_v2(Handle** handle) {
  *handle = new Handle{nullptr};
  return 0;
}
int cublasDestroy_v2(Handle*) { return 0; }
int cublasSetStream_v2(Handle* handle, void* stream) {
  handle->stream = stream;
  return 0;
}
int cublasSgemm_v2(Handle* handle, int, int, int m, int n, int k) { return product(handle->stream, m, n, k, 4); }
int cublasSgemv_v2(Handle* handle, int, int m, int n) { return product(handle->stream, m, n, 1, 4); }
int cublasSgemmEx(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int type) {
  return product(handle->stream, m, n, k, size_of(type));
}
int cublasGemmEx(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int type) {
  return product(handle->stream, m, n, k, size_of(type));
}
int cublasSgemmStridedBatched(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int, long long,
                              const void*, int, long long, const void*, void*, int, long long, int batch) {
  return product(handle->stream, m, n, k, 4, batch);
}
int cublasGemmStridedBatchedEx(Handle* handle, int, int, int m, int n, int k, const void*, const void*, int type, int,
                               long long, const void*, int, int, long long, const void*, void*, int, int, long long,
                               int batch) {
  return product(handle->stream, m, n, k, size_of(type), batch);
}

#endif

}  // extern "C"
