// Single-precision matrix products of the HyperLSTM on CPUs with AVX-512.
//
// The recurrent weights meet a few rows at every step of a sequence. A library packs them anew each
// time, and the one torch comes with leaves half of the vector width unused on many CPUs; here they
// are packed once a sequence. Blocked as usual (Goto and van de Geijn 2008): panels of kColumns
// columns of b, panels of kRows rows of a, a tile of their product held in registers. The order of
// the sums depends on the sizes alone.
#include "isa.h"
#include "memory.h"

namespace sketchfast {
namespace products_cpu {

// A matrix whose element (i, j) is data[i * row + j * column]; one of the two strides is 1.
struct Matrix {
  const float* data;
  int64_t row, column;
};
struct Sizes {
  int64_t m, n, k;
};

// What one instruction set offers. Panels are packed for all of k; `panel_of` panels by number.
struct Kernels {
  int64_t rows, columns;  // of a tile
  void (*pack_rows)(const Matrix& a, const Sizes&, int64_t first_row, int64_t last_row,
                    int64_t first_k, int64_t last_k, float* to);
  void (*pack_columns)(const Matrix& b, const Sizes&, int64_t first_panel, int64_t last_panel,
                       float* to);
  // out[:, panels] (+)= packed a times packed b, for column panels [first, last).
  void (*multiply_panels)(const float* a, const float* b, const Sizes&, float* out,
                          int64_t out_row, bool add, int64_t first, int64_t last);
  // out[rows] (+)= a[rows] times packed b; `block` holds row_block_floats.
  void (*multiply_rows)(const Matrix& a, const float* b, const Sizes&, float* out, int64_t out_row,
                        bool add, int64_t first_row, int64_t last_row, float* block);
  int64_t row_block_floats;
};

#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels;
#endif
extern const Kernels baseline_kernels;

inline namespace SKETCHFAST_ISA {

using V = FloatV;
constexpr int kWidth = kLanes<float>;
#if defined(SKETCHFAST_ISA_avx512)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kVectors = 3;  // of a tile's columns
constexpr int kColumns = kVectors * kWidth;
constexpr int64_t kDepth = 192;     // of k at a time: a panel of b then stays in the first cache
constexpr int64_t kRowBlock = 128;  // of rows at a time: their part of `out` stays in the second

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Steps of k at a time: equal parts of at most kDepth.
SKETCHFAST_INLINE int64_t depth_of(int64_t k) {
  const int64_t parts = (k + kDepth - 1) / kDepth;
  return parts ? (k + parts - 1) / parts : 1;
}

// Rows [first_row, last_row) as panels [k][kRows], zero beyond the last row.
void pack_rows(const Matrix& a, const Sizes&, int64_t first_row, int64_t last_row, int64_t first_k,
               int64_t last_k, float* to) {
  for (int64_t row = first_row; row < last_row; row += kRows) {
    const int64_t count = last_row - row < kRows ? last_row - row : kRows;
    const float* from = a.data + row * a.row;
    if (count < kRows) fill(to, (last_k - first_k) * kRows, 0.0f);
    if (a.row == 1) {
      for (int64_t k = first_k; k < last_k; ++k)
        for (int64_t i = 0; i < count; ++i)
          to[(k - first_k) * kRows + i] = from[i + k * a.column];
    } else {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t k = first_k; k < last_k; ++k)
          to[(k - first_k) * kRows + i] = from[i * a.row + k];
    }
    to += (last_k - first_k) * kRows;
  }
}

// Column panels as [k][kColumns], zero beyond the last column.
void pack_columns(const Matrix& b, const Sizes& sizes, int64_t first_panel, int64_t last_panel,
                  float* to) {
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    float* into = to + panel * sizes.k * kColumns;
    const int64_t column = panel * kColumns;
    const int64_t count = sizes.n - column < kColumns ? sizes.n - column : kColumns;
    const float* from = b.data + column * b.column;
    if (count < kColumns) fill(into, sizes.k * kColumns, 0.0f);
    if (b.column == 1) {
      for (int64_t k = 0; k < sizes.k; ++k)
        for (int64_t j = 0; j < count; ++j) into[k * kColumns + j] = from[k * b.row + j];
    } else {
      // blocks of k: the rows that are read and the lines that are written both stay in cache
      for (int64_t block = 0; block < sizes.k; block += 16) {
        const int64_t end = block + 16 < sizes.k ? block + 16 : sizes.k;
        for (int64_t j = 0; j < count; ++j)
          for (int64_t k = block; k < end; ++k)
            into[k * kColumns + j] = from[j * b.column + k];
      }
    }
  }
}

// `rows` of a tile: out (+)= a panel times b panel over `depth` steps of k.
template <int rows>
void tile(const float* __restrict a, const float* __restrict b, int64_t depth, float* out,
          int64_t out_row, int64_t columns, bool add) {
  V sum[rows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V from_b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) from_b[v] = load<V>(b + k * kColumns + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const V from_a = V{} + a[k * kRows + i];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += from_a * from_b[v];
    }
  }
  for (int i = 0; i < rows; ++i) {
    float* to = out + i * out_row;
    if (columns == kColumns) {
      for (int v = 0; v < kVectors; ++v) {
        V value = sum[i][v];
        if (add) value += load<V>(to + v * kWidth);
        store(to + v * kWidth, value);
      }
    } else {
      float part[kColumns];
      std::memcpy(part, sum[i], sizeof(part));
      for (int64_t j = 0; j < columns; ++j) to[j] = add ? to[j] + part[j] : part[j];
    }
  }
}

SKETCHFAST_INLINE void tile_of(int64_t rows, const float* a, const float* b, int64_t depth,
                               float* out, int64_t out_row, int64_t columns, bool add) {
  if (rows >= kRows) return tile<kRows>(a, b, depth, out, out_row, columns, add);
  if (rows >= 4 && kRows > 4) {
    tile<4>(a, b, depth, out, out_row, columns, add);
    a += 4, out += 4 * out_row, rows -= 4;
  }
  if (rows >= 2) {
    tile<2>(a, b, depth, out, out_row, columns, add);
    a += 2, out += 2 * out_row, rows -= 2;
  }
  if (rows >= 1) tile<1>(a, b, depth, out, out_row, columns, add);
}

void multiply_panels(const float* a, const float* b, const Sizes& sizes, float* out,
                     int64_t out_row, bool add, int64_t first, int64_t last) {
  const int64_t depth = depth_of(sizes.k);
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t column = panel * kColumns;
    const int64_t columns = sizes.n - column < kColumns ? sizes.n - column : kColumns;
    for (int64_t k = 0; k < sizes.k || k == 0; k += depth) {
      const int64_t steps = sizes.k - k < depth ? sizes.k - k : depth;
      const float* from_b = b + (panel * sizes.k + k) * kColumns;
      for (int64_t row = 0; row < sizes.m; row += kRows)
        tile_of(sizes.m - row, a + row * sizes.k + k * kRows, from_b, steps,
                out + row * out_row + column, out_row, columns, add || k > 0);
    }
  }
}

void multiply_rows(const Matrix& a, const float* b, const Sizes& sizes, float* out,
                   int64_t out_row, bool add, int64_t first_row, int64_t last_row, float* block) {
  const int64_t depth = depth_of(sizes.k), panels = (sizes.n + kColumns - 1) / kColumns;
  for (int64_t start = first_row; start < last_row; start += kRowBlock) {
    const int64_t end = start + kRowBlock < last_row ? start + kRowBlock : last_row;
    for (int64_t k = 0; k < sizes.k || k == 0; k += depth) {
      const int64_t steps = sizes.k - k < depth ? sizes.k - k : depth;
      pack_rows(a, sizes, start, end, k, k + steps, block);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t column = panel * kColumns;
        const int64_t columns = sizes.n - column < kColumns ? sizes.n - column : kColumns;
        const float* from_b = b + (panel * sizes.k + k) * kColumns;
        for (int64_t row = start; row < end; row += kRows)
          tile_of(end - row, block + (row - start) * steps, from_b, steps,
                  out + row * out_row + column, out_row, columns, add || k > 0);
      }
    }
  }
}

}  // namespace SKETCHFAST_ISA

extern const Kernels SKETCHFAST_KERNELS_OF(SKETCHFAST_ISA) = {
    kRows,           kColumns,      pack_rows, pack_columns,
    multiply_panels, multiply_rows, kRowBlock* kDepth};

}  // namespace products_cpu
}  // namespace sketchfast

// --- torch -------------------------------------------------------------------------------------

#if defined(SKETCHFAST_ISA_baseline)

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../check.h"

namespace sketchfast {
namespace products_cpu {
namespace {

using torch::stable::new_empty;

constexpr int64_t kLeastWork = 1 << 18;  // multiplications worth a thread of their own
constexpr int64_t kMostShared = 512;     // rows up to which threads share columns rather than rows

const Kernels& kernels() { SKETCHFAST_RETURN_KERNELS_OF_CHOSEN_ISA }

int64_t panels_of(int64_t count, int64_t width) { return (count + width - 1) / width; }

// The last two dimensions of `tensor`; a third before them counts groups.
int64_t groups_of(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 2 || tensor.dim() == 3, name, " must have 2 or 3 dimensions, got shape ",
        shape_of(tensor));
  check(tensor.scalar_type() == ScalarType::Float, name, " must be float32, got scalar type ",
        static_cast<int>(tensor.scalar_type()));
  return tensor.dim() == 3 ? tensor.size(0) : 1;
}

Matrix matrix_of(const char* name, const Tensor& tensor, int64_t group) {
  const int64_t d = tensor.dim();
  Matrix matrix{static_cast<const float*>(tensor.const_data_ptr()), tensor.stride(d - 2),
                tensor.stride(d - 1)};
  // a dimension of size 1 may have any stride
  if (tensor.size(d - 1) == 1 && matrix.row != 1) matrix.column = 1;
  if (tensor.size(d - 2) == 1 && matrix.column != 1) matrix.row = 1;
  check(matrix.row == 1 || matrix.column == 1, name, " must be contiguous in one dimension");
  if (d == 3) matrix.data += group * tensor.stride(0);
  return matrix;
}

// b [K, N] or [G, K, N] as panels, float32 [G, panels, K, columns].
Tensor pack(const Tensor& b) {
  const int64_t groups = groups_of("b", b), d = b.dim();
  const Sizes sizes{0, b.size(d - 1), b.size(d - 2)};
  const int64_t panels = panels_of(sizes.n, kernels().columns);
  Tensor packed = new_empty(b, {groups, panels, sizes.k, kernels().columns});
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  const int64_t floats = panels * sizes.k * kernels().columns;
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, sizes.k * 48));
  torch::stable::parallel_for(0, groups * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().pack_columns(matrix_of("b", b, i / panels), sizes, i % panels, i % panels + 1,
                             to + i / panels * floats);
  });
  return packed;
}

Tensor hyperlstm_pack(Tensor b) { return pack(b); }

// out [M, N] or [G, M, N] (+)= a b, where b [.., K, N] is packed by hyperlstm_pack, or not.
void hyperlstm_product(Tensor a, Tensor b, Tensor out, bool packed, bool add) {
  const int64_t groups = groups_of("out", out), d = out.dim();
  check(groups_of("a", a) == groups && a.dim() == d, "a must have as many groups as out, got ",
        shape_of(a), " and ", shape_of(out));
  const Sizes sizes{out.size(d - 2), out.size(d - 1), a.size(d - 1)};
  const Kernels& k = kernels();
  const int64_t panels = panels_of(sizes.n, k.columns);
  check(a.size(d - 2) == sizes.m, "a must have as many rows as out, got ", shape_of(a), " and ",
        shape_of(out));
  check(out.stride(d - 1) == 1 || sizes.n <= 1, "out's last dimension must be contiguous");
  if (packed) {
    check_tensor("b", b, ScalarType::Float, {groups, panels, sizes.k, k.columns});
  } else {
    check(groups_of("b", b) == groups && b.dim() == d && b.size(d - 2) == sizes.k &&
              b.size(d - 1) == sizes.n,
          "b must have shape [.., ", sizes.k, ", ", sizes.n, "], got ", shape_of(b));
  }
  if (groups * sizes.m * sizes.n == 0) return;
  const Tensor held = packed ? b : pack(b);
  const float* from_b = static_cast<const float*>(held.const_data_ptr());
  const int64_t floats_b = panels * sizes.k * k.columns;
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t out_row = out.stride(d - 2), out_group = d == 3 ? out.stride(0) : 0;

  if (sizes.m > kMostShared) {
    const int64_t blocks = panels_of(sizes.m, k.rows);
    const int64_t grain =
        std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, k.rows * sizes.n * sizes.k));
    for (int64_t g = 0; g < groups; ++g) {
      const Matrix from_a = matrix_of("a", a, g);
      torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
        Tensor block = new_empty(out, {k.row_block_floats});
        k.multiply_rows(from_a, from_b + g * floats_b, sizes, to + g * out_group, out_row, add,
                        begin * k.rows, std::min(end * k.rows, sizes.m),
                        static_cast<float*>(block.mutable_data_ptr()));
      });
    }
    return;
  }
  const int64_t row_panels = panels_of(sizes.m, k.rows), floats_a = row_panels * k.rows * sizes.k;
  Tensor rows = new_empty(out, {std::max<int64_t>(1, groups * floats_a)});
  float* packed_a = static_cast<float*>(rows.mutable_data_ptr());
  const int64_t pack_grain =
      std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, k.rows * sizes.k));
  torch::stable::parallel_for(0, groups * row_panels, pack_grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % row_panels * k.rows;
      k.pack_rows(matrix_of("a", a, i / row_panels), sizes, first,
                  std::min(first + k.rows, sizes.m), 0, sizes.k,
                  packed_a + i / row_panels * floats_a + first * sizes.k);
    }
  });
  const int64_t grain =
      std::max<int64_t>(1, kLeastWork / std::max<int64_t>(1, k.columns * sizes.m * sizes.k));
  torch::stable::parallel_for(0, groups * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end;) {
      const int64_t g = i / panels, first = i % panels;
      const int64_t last = std::min(panels, first + end - i);
      k.multiply_panels(packed_a + g * floats_a, from_b + g * floats_b, sizes, to + g * out_group,
                        out_row, add, first, last);
      i += last - first;
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sketchfast, CPU, library) {
  library.impl("hyperlstm_pack_native", TORCH_BOX(&hyperlstm_pack));
  library.impl("hyperlstm_product_native", TORCH_BOX(&hyperlstm_product));
}

}  // namespace products_cpu
}  // namespace sketchfast

#endif  // SKETCHFAST_ISA_baseline
